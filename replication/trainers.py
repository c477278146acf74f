"""Trains one run: the loop, its checkpoints, and the record it leaves."""

import contextlib
import functools
import importlib.metadata
import math
import os
import platform
import subprocess
import threading
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from replication import data as datasets
from replication import evaluate, measure, runs

RECORDINGS = 100  # rows of a full history
CHECKPOINT_SECONDS = 60
ONE_AT_A_TIME = threading.Lock()  # torch's generator, threads and convolution settings are the whole process's
MULTIPLY_ADDS_A_THREAD = 2.5e9  # of one batch's forward pass: below, a second core gains less than a second run on it


def cores():
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def cost(run, size):
    """Multiply-adds of one forward pass of a batch of images of that height and width."""
    return run.settings.batch * _multiply_adds(run.name, size)


@functools.cache
def _multiply_adds(name, size):
    with torch.device("meta"):
        return measure.multiply_adds(name.build(classes=10), size)


def threads_for(run, size):
    """Threads that a run is trained with on this machine.

    The order of floating-point sums, and so the last digits of a result, depends on their number. It is therefore a
    function of run and machine alone, whatever else is trained beside it.
    """
    return int(min(cores(), max(1, cost(run, size) // MULTIPLY_ADDS_A_THREAD)))


def recording_points(iterations, batch, test_images):
    """Numbers of iterations after which the training error is recorded, and those where the test error is measured too.

    A hundred at equal distances; the test error at ten of them at least, and at more as long as it costs little: one
    test image for six trained. Both contain the last iteration.
    """
    count = min(RECORDINGS, iterations)
    points = [round(number * iterations / count) for number in range(1, count + 1)]
    affordable = iterations * batch // (6 * max(1, test_images))
    step = -(-count // min(count, max(10, affordable)))
    return set(points), set(points[::-1][::step])


def train(run, results="results", data="data"):
    """Train a run and write its record; go on from its checkpoint if there is one, return at once if it is finished.

    Runs on the CUDA device if there is one, else on the CPU. Returns the run's ``Record``. In one process, one run is
    trained at a time, whatever threads call this.
    Raises ValueError for a data set that cannot be loaded or that a checkpoint does not fit, and FloatingPointError
    when the loss is no longer finite.
    """
    record = runs.finished(run, results)
    if record is not None:
        return record
    dataset = datasets.load(run.dataset, data, progress=False)
    folder = run.folder(results)
    folder.mkdir(parents=True, exist_ok=True)
    with ONE_AT_A_TIME, _computing(run, dataset):
        _Training(run, dataset, folder).finish()
    return runs.finished(run, results)


@contextlib.contextmanager
def _computing(run, dataset):
    """The state of torch that a result depends on, put back afterwards: threads and exact, repeatable convolutions."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads_for(run, dataset.size))
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.set_num_threads(before)


class _Training:
    """A run on its way: the net, its optimizer, the history so far."""

    def __init__(self, run, dataset, folder):
        self.run, self.folder, self.fingerprint = run, folder, dataset.fingerprint
        self.recipe = run.settings
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.dataset = dataset.hold_out(run.holdout)
        self.batches = datasets.Batches(self.dataset, self.recipe.batch, run.seed, self.device)
        self.points, self.test_points = recording_points(
            self.recipe.iterations, self.recipe.batch, len(self.dataset.test.labels)
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(run.seed)
            net = run.name.build(len(self.dataset.classes))
        self.net = net.to(self.device, memory_format=torch.channels_last).train()
        self.optimizer = torch.optim.SGD(
            self.net.parameters(),
            lr=self.recipe.lr,
            momentum=self.recipe.momentum,
            weight_decay=self.recipe.weight_decay,
            fused=True,
        )
        self.iteration, self.history = 0, []
        self.seconds = self.training_seconds = 0.0
        self.totals = torch.zeros(2, dtype=torch.float64, device=self.device)  # loss and errors since the last row
        self._resume()

    def finish(self):
        """Train to the last iteration and write the record; the summary comes last, since it says that all is there."""
        runs.write(self.folder / "run.json", runs.run_text(self.run, self.fingerprint))
        runs.write(self.folder / "environment.json", runs.json_text(environment(self.device)))
        self.started = self.saved = time.perf_counter()
        while self.iteration < self.recipe.iterations:
            self._step()
            if self._due():
                self._record()
            if time.perf_counter() - self.saved > CHECKPOINT_SECONDS:
                self._save()
        weights = {name: value.cpu() for name, value in self.net.state_dict().items()}
        runs.write(self.folder / "weights.pt", lambda file: torch.save(weights, file))
        runs.write(self.folder / "summary.json", runs.json_text(self._summary()))
        (self.folder / "checkpoint.pt").unlink(missing_ok=True)

    def _due(self):
        """Whether a row is recorded now: during a warm-up after whole windows, since their errors end it."""
        if self.recipe.warming(self.history) and self.iteration < self.recipe.iterations:
            return self.iteration % self.recipe.warmup.window == 0
        return self.iteration in self.points

    def _step(self):
        images, labels = self.batches(self.iteration)
        self.rate = self.recipe.learning_rate(self.iteration, self.history)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate
        with evaluate.autocast(self.device, self.run.precision):
            logits = self.net(images)
        logits = logits.float()
        loss = F.cross_entropy(logits, labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        # Summed on the device and read back only when a row is recorded: no step waits for the one before.
        wrong = (logits.detach().argmax(1) != labels).sum()
        self.totals += torch.stack([loss.detach() * len(labels), wrong])
        self.iteration += 1

    def _record(self):
        """Add a row to the history: the training error is the mean over all batches since the row before."""
        seen = (self.iteration - (self.history[-1]["iteration"] if self.history else 0)) * self.recipe.batch
        loss, wrong = (self.totals / seen).tolist()
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the loss is {loss} after {self.iteration} iterations at a rate of {self.rate:g}: {self.run.net} "
                f"diverged with recipe {self.run.recipe!r}; {self.folder} keeps its history"
            )
        self.totals.zero_()
        row = {"iteration": self.iteration, "lr": self.rate, "train_error": 100 * wrong, "train_loss": loss}
        started = time.perf_counter()
        parts = {"test": self.dataset.test} | ({"val": self.dataset.validation} if self.run.holdout else {})
        for part, images in parts.items():
            error = measured = None
            if self.iteration in self.test_points:
                error, measured = evaluate.single_view(
                    self.net, images, self.dataset.mean, self.device, self.run.precision
                )
            row |= {f"{part}_error": error, f"{part}_loss": measured}
        evaluation = time.perf_counter() - started
        self._count_time()
        self.training_seconds -= evaluation
        self.history.append(row | {"seconds": self.seconds})
        runs.write(self.folder / "history.csv", runs.rows_text(self.history))

    def _count_time(self):
        now = time.perf_counter()
        self.seconds += now - self.started
        self.training_seconds += now - self.started
        self.started = now

    def _summary(self):
        last = self.history[-1]
        self._count_time()
        return {
            **{name: last[name] for name in last if name.endswith(("_error", "_loss"))},
            "parameters": measure.parameters(self.net),
            "multiply_adds": measure.multiply_adds(self.net, self.dataset.size),
            "seconds": self.seconds,
            "images_per_second": self.iteration * self.recipe.batch / self.training_seconds,
            "iterations": self.iteration,
        }

    def _save(self):
        self._count_time()
        state = {
            "fingerprint": self.fingerprint,
            "threads": torch.get_num_threads(),
            "iteration": self.iteration,
            "history": self.history,
            "seconds": self.seconds,
            "training_seconds": self.training_seconds,
            "totals": self.totals,
            "net": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        runs.write(self.folder / "checkpoint.pt", lambda file: torch.save(state, file))
        self.saved = time.perf_counter()

    def _resume(self):
        path = self.folder / "checkpoint.pt"
        if not path.exists():
            return
        state = torch.load(path, map_location=self.device, weights_only=True)
        if state["fingerprint"] != self.fingerprint:
            raise ValueError(
                f"{path} was made from other images than {self.run.dataset!r} now holds: bring these back, "
                f"or remove {self.folder} to begin again"
            )
        torch.set_num_threads(state["threads"])
        self.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.totals.copy_(state["totals"])
        for name in ("iteration", "history", "seconds", "training_seconds"):
            setattr(self, name, state[name])


def environment(device):
    """Versions, hardware and commit that a run was made with."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": importlib.metadata.version("torchvision"),
        "numpy": np.__version__,
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": cores(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
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
    package = Path(__file__).parent

    def git(*command):
        return subprocess.run(
            ["git", "-C", package, *command], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")  # fails for a copy that lies in some other project's checkout
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--", "."))}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}
