"""What a run is computed with: threads, compiling, and for its record versions, hardware and commit."""

import contextlib
import functools
import importlib.metadata
import platform
import subprocess
import threading
from pathlib import Path

import numpy as np
import torch

from replication import evaluate, measure
from replication.detection import DetectorName
from replication.engine import machine, steps
from replication.engine.machine import cores
from replication.runs import divisors, whole
from replication.runs.own import OwnNet

MULTIPLY_ADDS_A_THREAD = 2.5e9  # of one batch's forward pass: below, a second core gains less than a second run on it
COMPILED_FROM = 5e12  # multiply-adds of all forward passes of a run: below, compiling takes longer than it saves
MANY_EPOCHS = 2_000  # the paper's recipe has 164 on CIFAR, that of digits 98
_TORCH = threading.Lock()  # torch's generator, threads and convolution settings belong to the whole process


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


def cost(run, size):
    """Multiply-adds of a forward pass of one batch of a run; ``size``: height and width of its images."""
    return run.settings.batch * _multiply_adds(run.name, size)


@functools.cache
def _multiply_adds(name, size):
    if isinstance(name, DetectorName):
        return name.multiply_adds()
    with torch.device("meta"), torch.random.fork_rng(devices=[]):  # a net of one's own is built on the CPU
        return measure.multiply_adds(name.build(classes=10), size)


def note_on_length(run, images):
    """For a run of very many epochs, how many these are of as many training images, and what shortens it; else ""."""
    epochs = run.settings.iterations * run.settings.batch // max(1, images)
    if epochs < MANY_EPOCHS:
        return ""
    return (
        f" {run.settings.iterations:,} iterations are {epochs:,} epochs of the {images:,} images of {run.dataset!r}: "
        "schedule 0.1 makes a tenth of them, recipe 'digits' has 1,100 iterations."
    )


def threads_for(run, size, processes=1):
    """Threads for each of a run's processes on this machine.

    Their number determines the order of floating-point sums, and so the last digits of a result. It therefore depends
    on the run and the machine alone, not on what else is being trained.
    """
    return int(min(max(1, cores() // processes), max(1, cost(run, size) // MULTIPLY_ADDS_A_THREAD)))


def compiles(run, size, processes=1):
    """Whether a run's net is compiled: that of a long run, where this machine can compile.

    Like the number of threads it changes the last digits of a result, and depends on the run and the machine alone.
    """
    if run.detects:
        return False
    long = cost(run, size) * run.settings.iterations >= COMPILED_FROM
    return long and processes == 1 and run.name.depth <= steps.DEEPEST_COMPILED and machine.can_compile()


@contextlib.contextmanager
def reproducible(run, size, processes=1, threads=None):
    """The context in which a run is computed: its number of threads, and repeatable convolutions in full precision.

    Other threads of this process that want it wait. ``threads``: left out, those of ``threads_for``.
    """
    with _TORCH:
        before = torch.get_num_threads()
        torch.set_num_threads(threads or threads_for(run, size, processes))
        try:
            with evaluate.deterministic():
                yield
        finally:
            torch.set_num_threads(before)


def warn_of_precision(runs):
    """Print a line if some of these runs are in bfloat16 and this processor only emulates it."""
    if any(run.precision == "bfloat16" for run in runs) and machine.emulates_bfloat16():
        print(
            "This processor has no instructions for bfloat16 (avx512_bf16 or amx_bf16): it is emulated, two to three "
            'times slower than float32. Choose precision "float32".',
            flush=True,
        )


def check_processes(run, processes):
    """Raise TypeError or ValueError unless that many processes can share the batches of a run."""
    whole("processes", processes)
    parts = run.settings.batch // run.settings.bn_batch
    if not processes or parts % processes:
        raise ValueError(
            f"processes {processes}: {run.id} has batches of {parts} x {run.settings.bn_batch} images, "
            f"choose {divisors(parts)}"
            + (f", or a bn_batch below {run.settings.bn_batch}" if processes > parts else "")
        )


def check_net(run, size, classes):
    """Raise ValueError where batch norm would see a single value per channel, or a net of one's own does not fit.

    ``size``: images' height and width.
    """
    if isinstance(run.name, OwnNet):
        run.name.check(size, classes, run.settings.bn_batch)
    elif not run.name.imagenet and run.settings.bn_batch == 1 and max(size) <= 4:
        raise ValueError(
            f"bn_batch 1: {run.dataset!r} has images of {size[1]}x{size[0]}, whose last maps in {run.net} are 1x1, and "
            "a single value cannot be normalized: choose a bn_batch of 2 or more"
        )


def check_devices(processes):
    """Raise ValueError if there are GPUs, but fewer than processes."""
    if processes > 1 and torch.cuda.is_available() and processes > torch.cuda.device_count():
        raise ValueError(f"processes {processes}: there are {torch.cuda.device_count()} GPUs, one for each process")
