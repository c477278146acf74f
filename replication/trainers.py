"""Trains one run: the loop, its checkpoints, and the record it leaves."""

import contextlib
import functools
import io
import math
import os
import platform
import signal
import tempfile
import threading
import time
import uuid
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist

from replication import data as datasets
from replication import evaluate, measure, runs
from replication.engine import files, machine, steps
from replication.engine.distributed import Group, launch, members
from replication.engine.machine import cores
from replication.engine.progress import progress_bar
from replication.runs import records
from replication.runs.environment import environment

RECORDINGS = 100  # rows of a full history
MEASUREMENTS = 10  # of what passes through the layers, after the one at the start
CHECKPOINT_SECONDS = 60
LOCK_SECONDS = 5  # between looks of a group of processes at the lock of another
ONE_AT_A_TIME = threading.Lock()  # torch's generator, threads and convolution settings are the whole process's
MULTIPLY_ADDS_A_THREAD = 2.5e9  # of one batch's forward pass: below, a second core gains less than a second run on it
STATE = ("iteration", "history", "layers", "seconds", "training_seconds", "unreadable", "notes", "diverged")
KEPT = ("environment", "threads", "compiled", "net", "optimizer", "totals")  # in a checkpoint beside these
STOP = threading.Event()  # asks the training in this process to end, with a checkpoint, after the iteration it is in
UNDER_WAY = threading.Event()  # there is something to keep of the training in this process
COMPILED_FROM = 5e12  # multiply-adds of all forward passes of a run: below, compiling takes longer than it saves


def cost(run, size):
    """Multiply-adds of one forward pass of a batch of images of that height and width."""
    return run.settings.batch * _multiply_adds(run.name, size)


@functools.cache
def _multiply_adds(name, size):
    with torch.device("meta"):
        return measure.multiply_adds(name.build(classes=10), size)


def threads_for(run, size, processes=1):
    """Threads that each of a run's processes on this machine is trained with.

    The order of floating-point sums, and so the last digits of a result, depends on their number. It is therefore a
    function of run and machine alone, whatever else is trained beside it.
    """
    return int(min(max(1, cores() // processes), max(1, cost(run, size) // MULTIPLY_ADDS_A_THREAD)))


def compiles(run, size, processes=1):
    """Whether a run is trained on a compiled net, which changes the last digits of a result.

    As the number of threads it is a function of run and machine alone: of long runs, where this machine can compile.
    """
    long = cost(run, size) * run.settings.iterations >= COMPILED_FROM
    return long and processes == 1 and run.name.depth <= steps.DEEPEST_COMPILED and machine.can_compile()


def recording_points(recipe, test_images):
    """Numbers of iterations after which the training error is recorded, the test error too, the layers are measured.

    A hundred at equal distances; the test error at ten of them at least, and at more as long as it costs little: one
    test image for six trained. A plateau that watches the test error needs it three times within its patience. The
    layers at up to ten of those. All three contain the last iteration.
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


def train(run, results="results", data="data", processes=1, progress=False):
    """Train a run and write its record; go on from its checkpoint if there is one, return at once if it is finished.

    Runs on the CUDA device if there is one, else on the CPU. With ``processes``, that many on this machine share every
    batch, each on a device of its own; if one dies, all are started again from the checkpoint. Called by torchrun, this
    is one of its processes; several machines must see the same ``results``. Returns the run's ``Record``. In one
    process, one run is trained at a time, whatever threads call this; if another process trains this run, its record is
    waited for. ``progress``: show bars while data is prepared and while this process trains, of several the first.

    A run whose loss is no longer finite ends there, and its record says so. An interrupt in a single process leaves a
    checkpoint before KeyboardInterrupt is raised; one more does not wait for it. Of two checkpoints, the last and the
    one before, a damaged one is left out, with a line that says so.

    Raises TypeError or ValueError for folders that cannot be, for a data set that cannot be loaded or that a checkpoint
    does not fit, for a record or checkpoint of other code and for a number of processes that does not divide the batch;
    OSError when something cannot be written, and RuntimeError when processes die again and again.
    """
    check_processes(run, processes)
    check_devices(processes)
    files.folder("results", results), files.folder("data", data)
    together = dist.is_torchelastic_launched()
    record = records.usable(run, results, alone=not together)
    if record is not None and not together:
        return record
    dataset = None if record else _loaded(run, data, progress)
    if together:  # what one of the processes has seen by now another may not have
        _train_together(run, results, data, dataset, progress)
        return records.finished(run, results)
    with records.locked(run, results):
        if records.finished(run, results) is None:
            if processes > 1:
                launch(_train_launched, (run, results, data), processes, run.id)
            else:
                _train(run, results, dataset, Group(), progress)
    return records.finished(run, results)


def _loaded(run, data, progress=False):
    first_here = int(os.environ.get("LOCAL_RANK", 0)) == 0
    dataset = datasets.load(run.dataset, data, progress=progress and first_here)
    if first_here:  # where photographs are read for their mean, one process of a machine does so, the others wait
        dataset.hold_out(run.holdout).unreadable(run.unreadable)
    return dataset


def _train_launched(run, results, data):
    """Train as one of the processes that ``train`` started, and holds the lock for."""
    dataset = _loaded(run, data)
    with members() as group:
        _train(run, results, dataset, group)


def _train_together(run, results, data, dataset, progress):
    """Train as one of the processes that torchrun started; the first one's word counts for all."""
    with members() as group:
        lock, told = None, False
        try:
            while True:
                lock = files.acquire(records.lock(run, results)) if group.rank == 0 else None
                if group.gather(lock is not None)[0]:
                    break
                if group.rank == 0 and not told:
                    print(files.waiting(records.lock(run, results), f"{run.id} is being trained"), flush=True)
                    told = True
                time.sleep(LOCK_SECONDS)
            finished = records.usable(run, results, alone=False) if group.rank == 0 else None
            if group.gather(finished is not None)[0]:
                return
            _train(run, results, dataset or _loaded(run, data), group, progress)
        finally:
            if lock is not None:
                lock.release()


def _train(run, results, dataset, group, progress=False):
    folder = run.folder(results)
    if group.rank == 0:
        records.set_aside(run, results)
    progress = progress and group.rank == 0
    if progress:  # before the net is compiled, which takes minutes
        warn_of_precision([run])
        print(f"{run.id}: {run.settings.iterations:,} iterations, checkpoints and record in {folder}", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    if group.rank == 0:
        files.remove_parts(folder)
    with computing(run, dataset.size, group.local_count):
        _Training(run, dataset, folder, group).finish(progress)


def train_elsewhere(run, data="data", fingerprint=None, weights=False):
    """Train a run in a folder that is removed afterwards, and return the files of its record: {name: bytes}.

    For workers that see no common folder. The weights are among the files if asked for.
    Raises as ``train`` does, and ValueError for other images than those of the fingerprint.
    """
    machine.keep_memory()
    if fingerprint not in (None, datasets.load(run.dataset, data, progress=False).fingerprint):
        raise ValueError(
            f"{run.dataset!r} in {Path(data).absolute()} on {platform.node()} holds other images than are here: "
            "put the same ones there"
        )
    with tempfile.TemporaryDirectory(prefix="replication-") as results:
        folder = train(run, results, data).folder
        return {path.name: path.read_bytes() for path in folder.iterdir() if weights or path.suffix != ".pt"}


def warn_of_precision(runs):
    """Say in a line, before they are trained, if this processor is slower in the precision of some of these runs."""
    if any(run.precision == "bfloat16" for run in runs) and machine.emulates_bfloat16():
        print(
            "This processor has no instructions for bfloat16 (avx512_bf16 or amx_bf16): it is emulated, two to three "
            'times slower than float32. Choose precision "float32".',
            flush=True,
        )


def check_processes(run, processes):
    """Raise TypeError or ValueError unless the groups of a run's batch can be shared by that many processes."""
    runs.whole("processes", processes)
    groups = run.settings.batch // run.settings.group
    if not processes or groups % processes:
        raise ValueError(
            f"processes {processes}: {run.id} has batches of {groups} x {run.settings.group} images, "
            f"choose {runs.divisors(groups)}"
            + (f", or a smaller group than {run.settings.group}" if processes > groups else "")
        )


def check_devices(processes):
    """Raise ValueError if there are GPUs, but fewer than processes."""
    if processes > 1 and torch.cuda.is_available() and processes > torch.cuda.device_count():
        raise ValueError(f"processes {processes}: there are {torch.cuda.device_count()} GPUs, one for each process")


@contextlib.contextmanager
def computing(run, size, processes=1, threads=None):
    """The state of torch that a result depends on, put back afterwards: threads and exact, repeatable convolutions.

    One run at a time has it: others in this process wait. ``threads``: left out, those of ``threads_for``.
    """
    with ONE_AT_A_TIME:
        before = torch.get_num_threads()
        torch.set_num_threads(threads or threads_for(run, size, processes))
        try:
            with evaluate.exact():
                yield
        finally:
            torch.set_num_threads(before)


def new_step(run, classes, group=Group()):  # noqa: B008 (a tuple)
    """A run's net with its initial weights and what moves them: a ``Step``, not yet begun."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)
        net = run.name.build(classes)
    return steps.Step(net, run.settings, run.precision, group)


@contextlib.contextmanager
def _stoppable():
    """Have the first interrupt set ``STOP`` instead, where interrupts come to this thread; the next is one again."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)

    def stop(*_):
        STOP.set()
        signal.signal(signal.SIGINT, before)

    if callable(before):  # neither ignored, as in processes that are told by their parent, nor left to the system
        signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        if callable(before):
            signal.signal(signal.SIGINT, before)
            STOP.clear()


def _current_errors(history):
    """The last errors of a history in words: "train 51.0 %, test 36.3 %"."""
    words = []
    for part in ("train", "test"):
        measured = [row[f"{part}_error"] for row in history if row[f"{part}_error"] is not None]
        words += [f"{part} {measured[-1]:.1f} %"] if measured else []
    return ", ".join(words)


class _Training:
    """A run on its way: the net, its optimizer, the history so far.

    Every process of a group holds the same: gradients, running statistics and errors are those of the whole batch. So
    any number of processes gives the same result but for the order of sums, and the first one's checkpoint is all's.
    """

    def __init__(self, run, dataset, folder, group):
        self.run, self.folder, self.fingerprint, self.group = run, folder, dataset.fingerprint, group
        self.recipe = run.settings
        check_processes(run, group.count)
        self.device = steps.device_of(group)
        self.dataset = dataset.hold_out(run.holdout)
        self.reading = {"workers": max(1, cores() // group.local_count), "unreadable": run.unreadable}
        self.batches = self.dataset.batches(
            self.recipe.batch, run.seed, self.device, group[:2], iterations=self.recipe.iterations, **self.reading
        )
        self.points, self.test_points, self.layer_points = recording_points(self.recipe, len(self.dataset.test.labels))
        self.compiled = compiles(run, dataset.size, group.count)
        self.step = new_step(run, len(self.dataset.classes), group)
        self.net, self.totals = self.step.net, self.step.totals
        self.batches.unreadable |= self.dataset.unreadable(run.unreadable)
        self.iteration, self.history, self.layers, self.unreadable, self.notes = 0, [], [], {}, []
        self.diverged, self.begun = None, None
        self.seconds = self.training_seconds = 0.0
        self._resume()
        if group.count > 1:
            self._check_alike()
        self.step.begin(self.dataset.size, self.compiled)

    def finish(self, progress=False):
        """Train to the last iteration and write the record; the summary comes last, since it says that all is there.

        progress: show a bar of iterations and errors.
        """
        made = environment(self.device, self.group.count, self.compiled)
        self._compare(made)
        self._write("run.json", records.run_text(self.run, self.fingerprint))
        self._write("environment.json", records.json_text(made))
        self._report_unreadable()
        self.started = self.saved = time.perf_counter()
        try:
            with _stoppable() if self.group.count == 1 else contextlib.nullcontext(), self._bar(progress) as bar:
                self._iterate(bar)
                stopped = STOP.is_set() and self.group.count == 1
            if self.iteration < self.recipe.iterations and self.diverged is None:
                self._stop()
            self._end()
            if stopped:  # in the last iteration
                raise KeyboardInterrupt
        finally:
            UNDER_WAY.clear()

    def _bar(self, progress):
        return progress_bar(self.recipe.iterations, self.run.net, "iterations", not progress, self.iteration)

    def _iterate(self, bar):
        bar.set_postfix_str(_current_errors(self.history), refresh=False)
        while self.iteration < self.recipe.iterations and self.diverged is None:
            if STOP.is_set() and self.group.count == 1:  # of several processes none may end before the others
                return
            self._train()
            if self._due():
                self._record()
                bar.set_postfix_str(_current_errors(self.history), refresh=False)
            bar.update()
            if self.group.rank == 0 and time.perf_counter() - self.saved > CHECKPOINT_SECONDS:
                self._save()

    def _end(self):
        if self.diverged is not None:
            rate = self.history[-1]["lr"]
            self._note(f"diverged: the loss was no longer finite after {self.diverged:,} iterations, at {rate:g}")
        else:
            weights = {name: value.cpu() for name, value in self.net.state_dict().items()}
            for name, value in weights.items():
                if name.endswith("num_batches_tracked"):
                    value.fill_(self.iteration)  # of whole batches, in however many groups they were trained
            content = io.BytesIO()  # torch would hide why a file cannot be written
            torch.save(weights, content)
            self._write("weights.pt", content.getvalue())
        summary = self._summary()
        if self.group.rank == 0:
            records.write_summary(self.folder, summary)
            records.remove_checkpoints(self.folder)
        self._wait()

    def _stop(self):
        """End with a checkpoint, as the main process or an interrupt asked for."""
        if self.iteration:
            self._save()
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # else its main process tells
            how = f"goes on from there: a checkpoint is in {self.folder}" if self.iteration else "begins it"
            print(
                f"{self.run.id} was interrupted after {self.iteration:,} of {self.recipe.iterations:,} iterations. "
                f"The same call {how}.",
                flush=True,
            )
        raise KeyboardInterrupt

    def _write(self, name, content):
        """Write a file of the record: the first process does so for all."""
        if self.group.rank == 0:
            files.write(self.folder / name, content)

    def _wait(self):
        if self.group.count > 1:
            dist.barrier()

    def _due(self):
        """Whether a row is recorded now: during a warm-up after whole epochs, since their errors end it."""
        if self.recipe.warming(self.history) and self.iteration < self.recipe.iterations:
            epoch = math.ceil(len(self.dataset.train.labels) / self.recipe.batch)
            return self.iteration % epoch == 0
        return self.iteration in self.points

    def _train(self):
        images, labels = self.batches(self.iteration)
        self.rate = self.recipe.learning_rate(self.iteration, self.history)
        self.seen = images[: self.recipe.group], labels[: self.recipe.group]
        if self.iteration == 0:
            self._measure_layers()
        self.step(images, labels, self.rate)
        self.iteration += 1
        UNDER_WAY.set()

    def _record(self):
        """Add a row to the history: the training error is the mean over all batches since the row before."""
        seen = (self.iteration - (self.history[-1]["iteration"] if self.history else 0)) * self.recipe.batch
        loss, wrong = (self.totals / seen).tolist()
        if not math.isfinite(loss):
            self.diverged, loss = self.iteration, None
        self.totals.zero_()
        row = {"iteration": self.iteration, "lr": self.rate, "train_error": 100 * wrong, "train_loss": loss}
        started = time.perf_counter()
        parts = {"test": self.dataset.test} | ({"val": self.dataset.validation} if self.run.holdout else {})
        for part, images in parts.items():
            error = measured = None
            if self._reached(self.test_points) and self.diverged is None:
                views = self.dataset.views(
                    images, self.device, self.group[:2], failed=self.batches.unreadable, **self.reading
                )
                kept = [] if part == "test" and self.iteration == self.recipe.iterations else None
                error, measured = evaluate.single_view(self.net, views, self.device, self.run.precision, kept)
                if kept is not None:
                    self._keep_predictions(torch.cat(kept, dim=1))
            if measured is not None and not math.isfinite(measured):
                measured = None  # of a net that is on its way to diverge, or just past its end
            row |= {f"{part}_error": error, f"{part}_loss": measured}
        if self._reached(self.layer_points) and self.diverged is None:
            self._measure_layers()
        evaluation = time.perf_counter() - started
        self._count_time()
        self.training_seconds -= evaluation
        self.history.append(row | {"seconds": self.seconds})
        self._write("history.csv", records.rows_text(self.history))
        self._report_unreadable()

    def _reached(self, points):
        """Whether one of these numbers of iterations was reached since the row before: a warm-up has rows at others."""
        last = self.history[-1]["iteration"] if self.history else 0
        return not points.isdisjoint(range(last + 1, self.iteration + 1))

    def _measure_layers(self):
        """Add rows to ``layers.csv``, on what batch norm saw at once of the batch that is being trained on."""
        if self.group.rank == 0:
            images, labels = self.seen
            rows = measure.signals(self.net, images, labels, self.run.precision)
            self.layers += [{"iteration": self.iteration} | row for row in rows]
            self._write("layers.csv", records.rows_text(self.layers, (), digits=6))

    def _keep_predictions(self, mine):
        """Write labels and predicted classes of all test images, of which each process has its own, in turns."""
        parts = self.group.gather(mine)
        together = torch.empty(2, len(self.dataset.test.labels), dtype=torch.int64)
        if sum(part.shape[1] for part in parts) == together.shape[1]:  # less where images could not be read
            for place, part in enumerate(parts):
                together[:, place :: len(parts)] = part
            rows = [{"label": label, "predicted": predicted} for label, predicted in together.T.tolist()]
            self._write("predictions.csv", records.rows_text(rows, ()))

    def _report_unreadable(self):
        """Keep a list of the files that could not be read by any of the processes."""
        known = len(self.unreadable)
        for found in self.group.gather(self.batches.unreadable):
            self.unreadable |= found
        if len(self.unreadable) > known:
            lines = [f"{self.dataset.folder / path}: {error}\n" for path, error in sorted(self.unreadable.items())]
            self._write("unreadable.txt", "".join(lines))

    def _check_alike(self):
        """Raise ValueError unless all processes train the same run on the same images and see the same results."""
        mark = self.folder / "group.part"
        (name, *_) = self.group.gather(uuid.uuid4().hex)
        self._write(mark.name, name)
        self._wait()
        deadline = time.monotonic() + 60  # a network's file system may show a new file late
        while not mark.exists() and time.monotonic() < deadline:
            time.sleep(0.5)
        seen = {
            "runs": self.run.id,
            "images": self.fingerprint,
            "checkpoints": self.iteration,
            "folders of results": mark.read_text() if mark.exists() else None,
        }
        for what, value in seen.items():
            values = self.group.gather(value)
            if len(set(values)) > 1:
                raise ValueError(
                    f"{self.run.id}: its processes see different {what} ({', '.join(map(str, values))}): on all "
                    "machines give the same options, the same images, and a folder of results that all of them see"
                )
        if self.group.rank == 0:
            mark.unlink(missing_ok=True)

    def _count_time(self):
        now = time.perf_counter()
        self.seconds += now - self.started
        self.training_seconds += now - self.started
        self.started = now

    def _summary(self):
        last = self.history[-1]
        self._count_time()
        ended = {name: last[name] for name in last if name.endswith(("_error", "_loss"))}
        if self.diverged is not None:  # errors of a net whose weights are no numbers say nothing
            ended = dict.fromkeys(ended) | {"diverged": self.diverged}
        return {
            **ended,
            "parameters": measure.parameters(self.net),
            "multiply_adds": measure.multiply_adds(self.net, self.dataset.size),
            "seconds": self.seconds,
            "images_per_second": self.iteration * self.recipe.batch / self.training_seconds,
            "iterations": self.recipe.iterations,
            "unreadable": len(self.unreadable),
            **({"notes": self.notes} if self.notes else {}),
        }

    def _note(self, text):
        """Say something that also belongs into the record."""
        if self.group.rank == 0:
            print(f"{self.run.id}: {text}", flush=True)
        self.notes.append(text)

    def _compare(self, made):
        """Note it if this run was begun elsewhere or by other versions: then it is equal but for the last digits."""
        self.begun = self.begun or made
        names = ("torch", "device", "processor", "processes", "compiled")
        changed = [f"{name} {self.begun[name]}" for name in names if self.begun[name] != made[name]]
        if changed:
            self._note(f"begun with {', '.join(changed)}, gone on after {self.iteration:,} iterations with others")

    def _save(self):
        self._count_time()
        state = {
            "version": records.VERSION,
            "run": asdict(self.run),
            "recipe": repr(self.recipe),
            "fingerprint": self.fingerprint,
            "environment": self.begun,
            "threads": torch.get_num_threads(),
            "compiled": self.compiled,
            "net": self.net.state_dict(),
            "optimizer": self.step.optimizer.state_dict(),
            "totals": self.totals,
            **{name: getattr(self, name) for name in STATE},
        }
        content = io.BytesIO()
        torch.save(state, content)
        last, before = (self.folder / name for name in records.CHECKPOINTS)
        files.write_sealed(last, content.getvalue(), before)
        self.saved = time.perf_counter()

    def _resume(self):
        state = self._checkpoint()
        if state is None:
            return
        torch.set_num_threads(state["threads"])
        self.compiled = state["compiled"] and self.group.count == 1 and machine.can_compile()
        self.net.load_state_dict(state["net"])
        self.step.optimizer.load_state_dict(state["optimizer"])
        self.totals.copy_(state["totals"])
        self.begun = state["environment"]
        found = self.notes  # of this checkpoint
        for name in STATE:
            setattr(self, name, state[name])
        self.notes += found

    def _checkpoint(self):
        """The last checkpoint that is not damaged; None if there is none."""
        damaged = []
        for path in (self.folder / name for name in records.CHECKPOINTS):
            try:
                state = files.load(io.BytesIO(files.read_sealed(path)))
                theirs, _ = self._origin(state), [state[name] for name in (*STATE, *KEPT)]
            except FileNotFoundError:
                continue
            except files.DamagedError as error:
                damaged.append(path)
                self._note(str(error))
                continue
            except (ValueError, LookupError, TypeError) as error:
                raise ValueError(
                    f"{path} is no checkpoint of this version of the code ({error}): "
                    f"remove {self.folder} to begin again"
                ) from error
            for words, value in self._origin().items():
                if theirs[words] != value:
                    raise ValueError(
                        f"{path} was made {words.format(self.run.dataset)}, or remove {self.folder} to begin again"
                    )
            if damaged:
                self._note(f"went on from the checkpoint before, of {state['iteration']:,} iterations")
            break
        else:
            state = None
            if damaged:
                self._note("no checkpoint was left to go on from: began again")
        if self.group.rank == 0:
            for path in damaged:  # it would take the place of a good one
                path.replace(path.with_name(f"{path.stem}-damaged.pt"))
        return state

    def _origin(self, state=None):
        """What must be the same for a checkpoint to be gone on from: of a state, or of this run."""
        state = state or {
            "fingerprint": self.fingerprint,
            "run": asdict(self.run),
            "recipe": repr(self.recipe),
            "version": records.VERSION,
        }
        return {
            "from other images than {!r} now holds: bring these back": state["fingerprint"],
            "for another run: put it back where it was": state["run"],
            "with another recipe: bring this back": state["recipe"],
            "by another version of the code, whose results differ: go on with that": state["version"],
        }
