"""What this machine has and can do: cores, memory, a compiler, a processor's instructions."""

import atexit
import contextlib
import ctypes
import getpass
import importlib.util
import os
import shutil
import signal
import sys
import sysconfig
import tempfile
from pathlib import Path

import torch


def cores():
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def tune_malloc():
    """Have glibc keep the blocks that a step frees for the next one instead of returning them to the system."""
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return  # another C library
    for option, value in ((-3, 1 << 30), (-1, 2**31 - 1), (-2, 1 << 28)):  # mmap threshold, trim threshold, top pad
        mallopt(option, value)


def end_with_parent():
    """Have Linux kill this process when its parent dies; a reader that writes to a dead process would never end."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def emulates_bfloat16(cpuinfo=Path("/proc/cpuinfo")):
    """Whether bfloat16 is slower than float32 here, since this x86 processor has no instructions for it.

    False where that is not known: on other processors, and with a GPU.
    """
    try:
        lines = [] if torch.cuda.is_available() else cpuinfo.read_text().splitlines()
    except OSError:  # not Linux
        return False
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), None)
    return flags is not None and not {"avx512_bf16", "amx_bf16"} & set(flags)


def prepare_cache():
    """Have torch keep compiled code in a temporary folder where its own cannot be written: else its import fails."""
    try:
        default = Path(tempfile.gettempdir(), f"torchinductor_{getpass.getuser()}")
    except (KeyError, OSError):  # a user without a name
        default = Path(tempfile.gettempdir(), f"torchinductor_uid_{os.getuid()}")
    folder = Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR", default))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = temporary = tempfile.mkdtemp(prefix="torchinductor_")
        atexit.register(shutil.rmtree, temporary, ignore_errors=True)
        print(f"torch cannot keep compiled code in {folder} ({error.strerror}): nets will be compiled anew each time")


def can_compile():
    """Whether this machine has what ``torch.compile`` needs, and it is not disabled by ``TORCH_COMPILE_DISABLE=1``."""
    if os.environ.get("TORCH_COMPILE_DISABLE") == "1" or not sys.platform.startswith("linux"):
        return False
    if torch.cuda.is_available() and importlib.util.find_spec("triton") is None:
        return False
    headers = Path(sysconfig.get_path("include"), "Python.h").exists()
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    return headers and compiler is not None


def autocast(device, precision):
    """The context in which a net runs: bfloat16 autocast, or float32 as it is."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bfloat16")
