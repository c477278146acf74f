"""Trains the beginning of a finished run again, and compares it with what its record says."""

import contextlib
import math
import tempfile
import time
from dataclasses import dataclass

import pandas as pd

from replication import data as datasets
from replication import trainers
from replication.engine import machine
from replication.engine.progress import progress_bar
from replication.engine.workers import Workers
from replication.runs.records import Record

ALIKE = ("torch", "processor", "device", "threads", "compiled", "processes")  # what the last bits depend on
# On another machine sums are rounded differently, and training amplifies that: two processors ended the first 640
# iterations of plain-20 on CIFAR-10 with training errors of 58.3 and 60.7 %. What is measured before the first step
# differs by rounding alone. Test errors at the full learning rate vary more than a tolerance could tell anything by.
TRAINING = {"iteration": 0, "lr": 0, "train_error": 8.0, "train_loss": 0.25}  # percentage points, and units of loss
# Before the first step, relative. In bfloat16 what passes forward is up to 3 % from what float32 gives, and gradients,
# whose errors add up layer by layer, up to 39 % (plain-56, two seeds).
SIGNALS = {"float32": 1e-3, "bfloat16": 5e-2}
GRADIENTS = {"float32": 1e-3, "bfloat16": 0.5}
POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Verification:
    """Whether a record was confirmed, on a machine that is ``alike`` (bit by bit) or not (within the tolerances).

    differences: sentences, each with the file, row and column, the record's value and the one computed here.
    """

    record: Record
    rows: int
    alike: bool
    differences: tuple[str, ...]

    def __str__(self):
        how = "to the last bit" if self.alike else "within the tolerances of another machine"
        last = self.record.history["iteration"][self.rows - 1]
        what = f"the layers before the first step and {self.rows} of {len(self.record.history)} rows of the history"
        if self.differences:
            return f"{self.record.run.id} is not confirmed {how}:\n  " + "\n  ".join(self.differences)
        return f"{self.record.run.id} is confirmed {how}: {what} ({last:,} iterations)."


def verify(record, data="data", rows=1):
    """Train the first iterations of a record's run again, up to a row of its history: a ``Verification``.

    Nothing of it is kept. It takes as many threads as the record's run, where there are cores enough. Where processor,
    torch and threads are those of the record, it must be equal to the last bit.
    Raises ValueError for images other than the record's, and where there are not so many rows.
    """
    run, history = record.run, record.history
    if not 1 <= rows <= len(history):
        raise ValueError(f"rows {rows}: the history of {run.id} has {len(history)}, choose 1 or more of them")
    dataset = datasets.load(run.dataset, data)
    if dataset.fingerprint != record.fingerprint:
        raise ValueError(f"{run.dataset!r} in {data} holds other images than {run.id} was trained on: bring these back")
    with tempfile.TemporaryDirectory() as folder:
        there = run.folder(folder)
        with contextlib.suppress(KeyboardInterrupt), Workers(1) as pool:
            threads = min(record.begun.get("threads", 1), machine.cores())
            training = pool.submit(trainers.train, run, folder, data, threads=threads)
            _train_until(record, rows, training, there / "history.csv")
            raise KeyboardInterrupt  # has the worker end; it leaves a checkpoint, which goes with the folder
        again = Record(run, there, record.fingerprint, {})
        alike = all(again.environment.get(name) == record.begun.get(name) for name in ALIKE)
        first = [each.layers[each.layers["iteration"] == 0] for each in (record, again)]
        found = [each.history[:rows].drop(columns="seconds") for each in (record, again)]
        tolerances = {"gradient_norm": GRADIENTS[run.precision]}
        differences = _compare(
            "layers.csv",
            *first,
            lambda value, name: 0 if alike else tolerances.get(name, SIGNALS[run.precision]) * abs(value),
        )
        differences += _compare("history.csv", *found, lambda _, name: 0 if alike else TRAINING.get(name, math.inf))
    return Verification(record, rows, alike, tuple(differences))


def _train_until(record, rows, training, path):
    """Wait until a training has written so many rows of its history; raises what it raises before that."""
    last, done = int(record.history["iteration"][rows - 1]), 0
    with progress_bar(rows, f"{record.run.net} again, {last:,} iterations", "rows") as bar:
        while done < rows:
            if training.done():
                training.result()
            with contextlib.suppress(FileNotFoundError):
                bar.update(path.read_text().count("\n") - 1 - done)
                done = bar.n
            time.sleep(POLL_SECONDS)


def _compare(file, recorded, again, tolerance):
    """Sentences on the values of two tables that differ by more than ``tolerance(value, column)``."""
    sentences = []
    for (index, row), (_, new) in zip(recorded.iterrows(), again.iterrows(), strict=True):
        for column in recorded:
            one, other = row[column], new[column]
            if one == other or (pd.isna(one) and pd.isna(other)):
                continue
            if isinstance(one, str) or not abs(one - other) <= tolerance(one, column):
                sentences.append(f"{file}, row {index + 1}, {column}: {one} in the record, {other} here")
    return sentences
