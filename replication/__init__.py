"""A replication of Deep Residual Learning for Image Recognition (He, Zhang, Ren, Sun; CVPR 2016)."""

from replication.engine.vision import declare_missing_ops

declare_missing_ops()

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
