"""A replication of Deep Residual Learning for Image Recognition (He, Zhang, Ren, Sun; CVPR 2016)."""

import importlib.machinery
import importlib.util
import os

import torch


def _declare_missing_torchvision_ops():
    """Let ``import torchvision`` work beside a CPU-only torch.

    The wheel on the package index is built for CUDA torch: beside a CPU-only one its compiled ops do not load, and the
    import fails where it first refers to them (pytorch/vision issues 9077 and 9085). Data sets, transforms and models
    need none of these ops; declaring the two that the import refers to is enough.
    """
    torchvision = importlib.util.find_spec("torchvision")
    if torchvision is None or torch.version.cuda is not None:
        return
    ops = importlib.machinery.PathFinder.find_spec("_C", [os.path.dirname(torchvision.origin)])
    try:
        if ops is None:
            raise OSError("no compiled ops")
        torch.ops.load_library(ops.origin)
    except OSError:
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _KEPT.append(library)  # a collected library takes its declarations along


_KEPT = []
_declare_missing_torchvision_ops()

from replication.engine.machine import prepare_cache  # noqa: E402 (after the declaration)

prepare_cache()

from replication.hub import load_net  # noqa: E402 (after the declaration)
from replication.parameters import start_notebook  # noqa: E402
from replication.runs import Run, grid, net_names  # noqa: E402
from replication.runs.records import Record, all_finished, finished  # noqa: E402
from replication.sweeps import RunsFailedError, run_all  # noqa: E402

__all__ = [
    "Record",
    "Run",
    "RunsFailedError",
    "all_finished",
    "finished",
    "grid",
    "load_net",
    "net_names",
    "run_all",
    "start_notebook",
]
