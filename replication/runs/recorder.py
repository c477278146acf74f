"""The files of a run while it is trained: its history and layers row by row, its checkpoints, at last its record."""

import io
import math
import time
from dataclasses import dataclass, field, fields

import torch
import torch.distributed as dist

from replication import evaluate, measure
from replication.detection import precision
from replication.engine import checkpoint, files, machine
from replication.engine.distributed import check_alike
from replication.runs import records
from replication.runs.environment import compiles, environment

RECORDINGS = 100  # rows of a full history
MEASUREMENTS = 10  # of what passes through the layers, after the one at the start
CHECKPOINT_SECONDS = 60
SIDES = ("left", "top", "right", "bottom")


def recording_points(recipe, test_images):
    """Three sets of iterations after which to record the training error, the test error, and the layers' signals.

    The training error a hundred times at equal distances; the test error at ten or more of these, as long as it costs
    little: one test image for six training images. A plateau that watches the test error needs it three times within
    its patience. The layers at up to ten of those. All three contain the last iteration.
    """
    iterations, plateau = recipe.iterations, recipe.plateau
    count = min(RECORDINGS, iterations)
    points = [round(number * iterations / count) for number in range(1, count + 1)]
    affordable = iterations * recipe.batch // (6 * max(1, test_images))
    step = -(-count // min(count, max(10, affordable)))
    if plateau is not None and plateau.watch == "test_error":
        step = min(step, max(1, plateau.patience * count // (3 * iterations)))
    tested = points[::-1][::step]
    return set(points), set(tested), set(tested[:: -(-len(tested) // MEASUREMENTS)])


@dataclass
class State:
    """How far a run is and what it recorded so far: in every checkpoint, beside net and optimizer."""

    iteration: int = 0
    history: list = field(default_factory=list)  # the rows of history.csv
    layers: list = field(default_factory=list)  # the rows of layers.csv
    seconds: float = 0.0
    training_seconds: float = 0.0  # without tests and measurements
    unreadable: dict = field(default_factory=dict)  # {file: error}
    notes: list = field(default_factory=list)  # sentences for the record
    diverged: int | None = None  # the iteration after which the loss was no longer finite
    environment: dict | None = None  # in which the run started

    def current_errors(self):
        """The last errors in words: "train 51.0 %, test 36.3 %"; of a detector its loss."""
        words = []
        for part in ("train", "test"):
            measured = [row[f"{part}_error"] for row in self.history if row[f"{part}_error"] is not None]
            words += [f"{part} {measured[-1]:.1f} %"] if measured else []
        if self.history and not words:  # of a detector
            words = [f"loss {self.history[-1]['train_loss']:.3f}"]
        return ", ".join(words)


class Recorder:
    """Writes the history, the layers, the checkpoints and at last the record of a run; of several ranks the first does.

    dataset: without what is held out. batches: whose unreadable files are listed. workers: that read photographs.
    ``state`` is that of the last checkpoint, which net and optimizer of ``step`` are put into, or a new one.
    Raises ValueError for a checkpoint that this run cannot go on from.
    """

    def __init__(self, run, dataset, fingerprint, folder, step, batches, workers):
        self.run, self.recipe, self.dataset, self.folder = run, run.settings, dataset, folder
        self.step, self.ranks, self.batches, self.workers = step, step.ranks, batches, workers
        self.fingerprint, self.origin = fingerprint, records.origin(run, fingerprint)
        self.points, self.test_points, self.layer_points = recording_points(self.recipe, len(dataset.test.labels))
        self.compiled = compiles(run, dataset.size, self.ranks.world_size)
        self.batches.unreadable |= dataset.unreadable()
        self.state = self._resumed()
        self.started = self.saved = time.perf_counter()
        if self.ranks.world_size > 1:
            seen = {"runs": run.id, "images": fingerprint, "checkpoints": self.state.iteration}
            check_alike(self.ranks, folder, seen)

    def _resumed(self):
        names = [field.name for field in fields(State)]
        stored, damaged, notes = checkpoint.load(
            self.folder, self.origin, [*names, "threads", "compiled", *self.step.state_dict()]
        )
        state = State()
        if stored is not None:
            if (stored["environment"]["device"] != "cpu") == self.step.on_gpu:
                torch.set_num_threads(stored["threads"])  # those of a machine with a GPU compute nothing
            self.compiled = stored["compiled"] and self.ranks.world_size == 1 and machine.can_compile()
            self.step.load_state_dict(stored)
            state = State(**{name: stored[name] for name in names})
        for note in notes:
            self._note(note, state)
        if self.ranks.rank == 0:
            checkpoint.quarantine(damaged)
        return state

    def begin(self, compiled):
        """Write what is known before the first iteration. ``compiled``: whether the net is, as ``Step.begin`` says."""
        self.compiled = compiled
        state, now = self.state, environment(self.step.device, self.ranks.world_size, self.compiled)
        state.environment = begun = state.environment or now
        names = ("torch", "device", "processor", "processes", "compiled")
        differed = {name: begun[name] for name in now if begun[name] != now[name]}
        changed = [f"{name} {differed[name]}" for name in names if name in differed]
        if changed:  # the result is the same up to its last digits
            self._note(
                f"started with {', '.join(changed)}, resumed after {state.iteration:,} iterations with others", state
            )
        self._write("run.json", records.run_text(self.run, self.fingerprint))
        self._write("environment.json", records.json_text(now | ({"begun": differed} if differed else {})))
        self._list_unreadable()
        self.started = self.saved = time.perf_counter()

    def row_is_due(self):
        """Whether a row is added now: during a warm-up after whole epochs, since their errors end it."""
        iteration = self.state.iteration
        if self.recipe.warming(self.state.history) and iteration < self.recipe.iterations:
            return iteration % math.ceil(len(self.dataset.train.labels) / self.recipe.batch) == 0
        return iteration in self.points

    def add_row(self, images, labels, rate):
        """Add a row to the history: the training error is the mean over all batches since the row before."""
        state = self.state
        last = state.history[-1]["iteration"] if state.history else 0
        seen = (state.iteration - last) * self.recipe.batch
        row = {"iteration": state.iteration, "lr": rate} | self._trained(seen)
        if not math.isfinite(row["train_loss"]):
            state.diverged, row["train_loss"] = state.iteration, None
        passed = set(range(last + 1, state.iteration + 1))  # a warm-up has rows at other iterations than the points
        started = time.perf_counter()
        row |= self._tested(bool(self.test_points & passed) and state.diverged is None)
        if self.layer_points & passed and state.diverged is None:
            self.measure_layers(images, labels)
        evaluation = time.perf_counter() - started
        self._count_time()
        state.training_seconds -= evaluation
        state.history.append(row | {"seconds": state.seconds})
        self._write("history.csv", records.rows_text(state.history))
        self._list_unreadable()

    def _trained(self, seen):
        """Error and loss of the training images since the row before, of which so many were ``seen``."""
        loss, wrong = (total / seen for total in self.step.pop_totals())
        return {"train_error": 100 * wrong, "train_loss": loss}

    def _tested(self, due):
        """Error and loss of the test part, and of what is held out: None unless they are due."""
        parts = {"test": self.dataset.test} | ({"val": self.dataset.validation} if self.run.holdout else {})
        measured = {}
        for part, images in parts.items():
            error = loss = None
            if due:
                views = self.dataset.eval_batches(images, self.step.device, self.ranks[:2], self.workers)
                tested = evaluate.single_view(self.step.net, views, self.step.device, self.run.precision)
                self.batches.unreadable |= tested.unreadable
                if part == "test" and self.state.iteration == self.recipe.iterations:
                    self._write_predictions(tested.predictions)
                error = tested.error
                loss = tested.loss if math.isfinite(tested.loss) else None  # else the net is about to diverge
            measured |= {f"{part}_error": error, f"{part}_loss": loss}
        return measured

    def measure_layers(self, images, labels):
        """Add rows to ``layers.csv``, measured on the first ``bn_batch`` images of the training batch."""
        if self.ranks.rank == 0:
            part = images[: self.recipe.bn_batch], labels[: self.recipe.bn_batch]
            rows = measure.signals(self.step.net, *part, self.run.precision)
            self.state.layers += [{"iteration": self.state.iteration} | row for row in rows]
            if rows:
                self._write("layers.csv", records.rows_text(self.state.layers, (), digits=6))
            elif not self.state.iteration:
                self._note("no layers.csv: the net has no convolutions or linear layers to measure", self.state)

    def checkpoint_is_due(self):
        return self.ranks.rank == 0 and time.perf_counter() - self.saved > CHECKPOINT_SECONDS

    def save_checkpoint(self):
        self._count_time()
        state = {"threads": torch.get_num_threads(), "compiled": self.compiled, **self.step.state_dict()}
        checkpoint.save(self.folder, self.origin, state | vars(self.state))
        self.saved = time.perf_counter()

    def interrupt(self):
        """Write a checkpoint; returns what to tell the user."""
        iteration = self.state.iteration
        if iteration:
            self.save_checkpoint()
        how = f"resumes from there: a checkpoint is in {self.folder}" if iteration else "starts it"
        return (
            f"{self.run.id} was interrupted after {iteration:,} of {self.recipe.iterations:,} iterations. "
            f"The same call {how}."
        )

    def finish(self, progress=False):
        """Write the weights and, last of all, the summary, which marks the record as complete.

        ``progress``: show a bar where its test takes long.
        """
        state = self.state
        if state.diverged is None:
            weights = {name: value.cpu() for name, value in self.step.net.state_dict().items()}
            for name, value in weights.items():
                if name.endswith("num_batches_tracked"):
                    value.fill_(state.iteration)  # of whole batches, whatever their parts
            content = io.BytesIO()  # torch would hide why a file cannot be written
            torch.save(weights, content)
            self._write("weights.pt", content.getvalue())
        else:
            rate = state.history[-1]["lr"]
            self._note(
                f"diverged: the loss was no longer finite after {state.diverged:,} iterations, at {rate:g}", state
            )
        summary = self._summary(progress)
        if self.ranks.rank == 0:
            records.write_summary(self.folder, summary)
            checkpoint.remove(self.folder)
        if self.ranks.world_size > 1:
            dist.barrier()

    def _summary(self, progress):
        state = self.state
        self._count_time()
        errors = {name: value for name, value in state.history[-1].items() if name.endswith(("_error", "_loss"))}
        if state.diverged is not None:  # errors of a net whose weights are NaN mean nothing
            errors = dict.fromkeys(errors) | {"diverged": state.diverged}
        return {
            **errors,
            "parameters": measure.parameters(self.step.net),
            "multiply_adds": self._multiply_adds(),
            "seconds": state.seconds,
            "images_per_second": state.iteration * self.recipe.batch / state.training_seconds,
            "iterations": self.recipe.iterations,
            "unreadable": len(state.unreadable),
            **({"notes": state.notes} if state.notes else {}),
        }

    def _multiply_adds(self):
        return measure.multiply_adds(self.step.net, self.dataset.size)

    def _write_predictions(self, mine):
        """Write labels and predicted classes of all test images; the ranks have every n-th of them."""
        parts = self.ranks.gather(mine)
        together = torch.empty(2, len(self.dataset.test.labels), dtype=torch.int64)
        if sum(part.shape[1] for part in parts) == together.shape[1]:  # less where images could not be read
            for place, part in enumerate(parts):
                together[:, place :: len(parts)] = part
            rows = [{"label": label, "predicted": predicted} for label, predicted in together.T.tolist()]
            self._write("predictions.csv", records.rows_text(rows, ()))

    def _list_unreadable(self):
        """List the files that any of the processes could not read."""
        unreadable = self.state.unreadable
        known = len(unreadable)
        for failed in self.ranks.gather(self.batches.unreadable):
            unreadable |= failed
        if len(unreadable) > known:
            lines = [f"{self.dataset.folder / path}: {error}\n" for path, error in sorted(unreadable.items())]
            self._write("unreadable.txt", "".join(lines))

    def _count_time(self):
        now = time.perf_counter()
        self.state.seconds += now - self.started
        self.state.training_seconds += now - self.started
        self.started = now

    def _note(self, text, state):
        """Print a sentence and keep it for the record."""
        if self.ranks.rank == 0:
            print(f"{self.run.id}: {text}", flush=True)
        state.notes.append(text)

    def _write(self, name, content):
        if self.ranks.rank == 0:
            files.write(self.folder / name, content)


class DetectionRecorder(Recorder):
    """The same for a detector: rows have its losses, and its record what it detects on the test images at the end.

    Its errors are empty: detectors are measured by their precision, ``detection.precision.summary``, in the summary.
    """

    def measure_layers(self, images, labels):
        """Nothing: its layers are those of an ImageNet net, some of which see images and others regions."""

    def _trained(self, seen):
        losses = [total / seen for total in self.step.pop_totals()]
        losses = dict(zip(self.step.LOSSES, losses, strict=True))
        return {"train_error": None, "train_loss": sum(losses.values())} | losses

    def _tested(self, due):
        return {"test_error": None, "test_loss": None}

    def _summary(self, progress):
        return super()._summary(progress) | (self._precisions(progress) if self.state.diverged is None else {})

    def _multiply_adds(self):
        return self.run.name.multiply_adds()

    def _precisions(self, progress):
        """What is detected on the test images, each process detecting on every n-th of them."""
        test, ranks = self.dataset.test, self.ranks
        if ranks.rank == 0:
            self.save_checkpoint()  # an image that cannot be decoded ends the test
        detections = [None] * len(test.labels)
        mine = test.paths[ranks.rank :: ranks.world_size]
        mine = evaluate.detections(self.step.net, self.dataset, mine, self.step.device, self.run.precision, progress)
        for place, part in enumerate(ranks.gather(mine)):
            detections[place :: ranks.world_size] = part
        rows = [
            {"image": path, "label": self.dataset.classes[label], "score": float(score)}
            | dict(zip(SIDES, map(float, box), strict=True))
            for path, found in zip(test.paths[: records.SHOWN], detections, strict=False)
            for box, label, score in zip(*found, strict=True)
        ]
        self._write("detections.csv", records.rows_text(rows, ("image", "label", "score", *SIDES), digits=6))
        return precision.summary(detections, test.labels, self.dataset.classes)
