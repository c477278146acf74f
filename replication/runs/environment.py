"""What a run was made with: versions, hardware, commit."""

import contextlib
import functools
import importlib.metadata
import platform
import subprocess
from pathlib import Path

import numpy as np
import torch

from replication.engine.machine import cores


def environment(device, processes=1, compiled=False):
    """Versions, hardware and commit that a run was made with, and whether its net was compiled."""
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torchvision": importlib.metadata.version("torchvision"),
        "numpy": np.__version__,
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": cores(),
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else "cpu",
        "processes": processes,
        "threads": torch.get_num_threads(),
        "compiled": compiled,
        **_commit(),
    }


def _processor():
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


@functools.cache  # the source may change while a long sweep goes on, the code in memory does not
def _commit():
    """The commit of this package's source tree and whether it was changed since; None outside of a checkout."""
    package = Path(__file__).parents[1]

    def git(*command):
        return subprocess.run(
            ["git", "-C", package, *command], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")  # fails for a copy that lies in some other project's checkout
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--", "."))}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}
