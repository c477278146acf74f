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
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
import torch.distributed as dist

from replication import data as datasets
from replication import evaluate, measure, runs
from replication.engine import checkpoint, files, machine, steps
from replication.engine.distributed import Ranks, check_alike, launch, members
from replication.engine.machine import cores
from replication.engine.progress import progress_bar
from replication.runs import records
from replication.runs.environment import environment

RECORDINGS = 100  # rows of a full history
MEASUREMENTS = 10  # of what passes through the layers, after the one at the start
CHECKPOINT_SECONDS = 60
LOCK_SECONDS = 5  # between looks of several processes at the lock of others
ONE_AT_A_TIME = threading.Lock()  # torch's generator, threads and convolution settings are the whole process's
MULTIPLY_ADDS_A_THREAD = 2.5e9  # of one batch's forward pass: below, a second core gains less than a second run on it
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
                _train(run, results, dataset, Ranks(), progress)
    return records.finished(run, results)


def _loaded(run, data, progress=False):
    first_here = int(os.environ.get("LOCAL_RANK", 0)) == 0
    dataset = datasets.load(run.dataset, data, progress=progress and first_here)
    if first_here:  # where photographs are read for their mean, one process of a machine does so, the others wait
        dataset.hold_out(run.holdout).unreadable()
    return dataset


def _train_launched(run, results, data):
    """Train as one of the processes that ``train`` started, and holds the lock for."""
    dataset = _loaded(run, data)
    with members() as ranks:
        _train(run, results, dataset, ranks)


def _train_together(run, results, data, dataset, progress):
    """Train as one of the processes that torchrun started; the first one's word counts for all."""
    with members() as ranks:
        lock, told = None, False
        try:
            while True:
                lock = files.acquire(records.lock(run, results)) if ranks.rank == 0 else None
                if ranks.gather(lock is not None)[0]:
                    break
                if ranks.rank == 0 and not told:
                    print(files.waiting(records.lock(run, results), f"{run.id} is being trained"), flush=True)
                    told = True
                time.sleep(LOCK_SECONDS)
            finished = records.usable(run, results, alone=False) if ranks.rank == 0 else None
            if ranks.gather(finished is not None)[0]:
                return
            _train(run, results, dataset or _loaded(run, data), ranks, progress)
        finally:
            if lock is not None:
                lock.release()


def _train(run, results, dataset, ranks, progress=False):
    folder = run.folder(results)
    if ranks.rank == 0:
        records.set_aside(run, results)
    progress = progress and ranks.rank == 0
    if progress:  # before the net is compiled, which takes minutes
        warn_of_precision([run])
        print(f"{run.id}: {run.settings.iterations:,} iterations, checkpoints and record in {folder}", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    if ranks.rank == 0:
        files.remove_parts(folder)
    with computing(run, dataset.size, ranks.local_world_size):
        check_processes(run, ranks.world_size)
        try:
            fit(run, dataset, folder, ranks, progress)
        finally:
            UNDER_WAY.clear()


def train_elsewhere(run, data="data", fingerprint=None, weights=False):
    """Train a run in a folder that is removed afterwards, and return the files of its record: {name: bytes}.

    For workers that see no common folder. The weights are among the files if asked for.
    Raises as ``train`` does, and ValueError for other images than those of the fingerprint.
    """
    machine.tune_malloc()
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
    """Raise TypeError or ValueError unless that many processes can share the batches of a run."""
    runs.whole("processes", processes)
    parts = run.settings.batch // run.settings.bn_batch
    if not processes or parts % processes:
        raise ValueError(
            f"processes {processes}: {run.id} has batches of {parts} x {run.settings.bn_batch} images, "
            f"choose {runs.divisors(parts)}"
            + (f", or a bn_batch below {run.settings.bn_batch}" if processes > parts else "")
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
            with evaluate.deterministic():
                yield
        finally:
            torch.set_num_threads(before)


def new_step(run, classes, ranks=Ranks()):  # noqa: B008 (a tuple)
    """A run's net with its initial weights and what moves them: a ``Step``, not yet begun."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)
        net = run.name.build(classes)
    return steps.Step(net, run.settings, run.precision, ranks)


@dataclass
class State:
    """How far a run is, and what was recorded on the way: in every checkpoint, beside net and optimizer."""

    iteration: int = 0
    history: list = field(default_factory=list)  # the rows of history.csv
    layers: list = field(default_factory=list)  # the rows of layers.csv
    seconds: float = 0.0
    training_seconds: float = 0.0  # without tests and measurements
    unreadable: dict = field(default_factory=dict)  # {file: error}
    notes: list = field(default_factory=list)  # sentences that belong into the record
    diverged: int | None = None  # the iteration after which the loss was found to be no longer finite
    environment: dict | None = None  # in which the run was begun

    def current_errors(self):
        """The last errors in words: "train 51.0 %, test 36.3 %"."""
        words = []
        for part in ("train", "test"):
            measured = [row[f"{part}_error"] for row in self.history if row[f"{part}_error"] is not None]
            words += [f"{part} {measured[-1]:.1f} %"] if measured else []
        return ", ".join(words)


def fit(run, dataset, folder, ranks, progress=False):
    """Train a run from its last checkpoint, or from the start, to its end, and write its record (sections 3.4, 4.2).

    Each of several processes does this and holds the same: gradients, running statistics and errors are those of the
    whole batch. So any number of processes gives the same result but for the order of sums, and the first one's
    checkpoint is everybody's. Raises KeyboardInterrupt, with a checkpoint written, when it is asked to stop.
    """
    recipe, part = run.settings, dataset.hold_out(run.holdout)
    reading = {"workers": max(1, cores() // ranks.local_world_size)}
    step = new_step(run, len(part.classes), ranks)
    batches = part.batches(recipe.batch, run.seed, step.device, ranks[:2], iterations=recipe.iterations, **reading)
    log = _Log(run, part, dataset.fingerprint, folder, step, batches, reading)
    state = log.state
    step.begin(part.size, log.compiled)
    log.begin()
    with (
        _stoppable(ranks) as stopped,
        progress_bar(recipe.iterations, run.net, "iterations", not progress, state.iteration) as bar,
    ):
        bar.set_postfix_str(state.current_errors(), refresh=False)
        while state.iteration < recipe.iterations and state.diverged is None and not stopped():
            images, labels = batches(state.iteration)
            rate = recipe.learning_rate(state.iteration, state.history)
            if state.iteration == 0:
                log.measure_layers(images, labels)
            step(images, labels, rate)
            state.iteration += 1
            UNDER_WAY.set()
            if log.row_is_due():
                log.add_row(images, labels, rate)
                bar.set_postfix_str(state.current_errors(), refresh=False)
            if log.checkpoint_is_due():
                log.save_checkpoint()
            bar.update()
        interrupted = stopped()
    if state.iteration < recipe.iterations and state.diverged is None:
        log.interrupt()
        raise KeyboardInterrupt
    log.finish()
    if interrupted:  # in the last iteration
        raise KeyboardInterrupt


@contextlib.contextmanager
def _stoppable(ranks):
    """Have the first interrupt end the training after its iteration; the next is a KeyboardInterrupt at once.

    Gives what says whether it is to end. Of several processes none may end before the others: none is asked.
    """
    if ranks.world_size > 1:
        yield lambda: False
        return
    before = signal.getsignal(signal.SIGINT)

    def stop(*_):
        STOP.set()
        signal.signal(signal.SIGINT, before)

    # Interrupts come to the main thread alone. Processes that are told by their parent ignore them.
    ours = threading.current_thread() is threading.main_thread() and callable(before)
    if ours:
        signal.signal(signal.SIGINT, stop)
    try:
        yield STOP.is_set
    finally:
        if ours:
            signal.signal(signal.SIGINT, before)
            STOP.clear()


class _Log:
    """Keeps the record and the checkpoints of a run while it is trained; of several processes the first writes them."""

    def __init__(self, run, dataset, fingerprint, folder, step, batches, reading):
        self.run, self.recipe, self.dataset, self.folder = run, run.settings, dataset, folder
        self.step, self.ranks, self.batches, self.reading = step, step.ranks, batches, reading
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
            torch.set_num_threads(stored["threads"])
            self.compiled = stored["compiled"] and self.ranks.world_size == 1 and machine.can_compile()
            self.step.load_state_dict(stored)
            state = State(**{name: stored[name] for name in names})
        for note in notes:
            self._note(note, state)
        if self.ranks.rank == 0:
            checkpoint.quarantine(damaged)
        return state

    def begin(self):
        """Write what is known before the first iteration."""
        state, now = self.state, environment(self.step.device, self.ranks.world_size, self.compiled)
        state.environment = begun = state.environment or now
        names = ("torch", "device", "processor", "processes", "compiled")
        changed = [f"{name} {begun[name]}" for name in names if begun[name] != now[name]]
        if changed:  # the result is equal but for the last digits
            self._note(
                f"begun with {', '.join(changed)}, gone on after {state.iteration:,} iterations with others", state
            )
        self._write("run.json", records.run_text(self.run, self.fingerprint))
        self._write("environment.json", records.json_text(now))
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
        loss, wrong = (total / seen for total in self.step.pop_totals())
        if not math.isfinite(loss):
            state.diverged, loss = state.iteration, None
        row = {"iteration": state.iteration, "lr": rate, "train_error": 100 * wrong, "train_loss": loss}
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

    def _tested(self, due):
        """Error and loss of the test part, and of what is held out: None unless they are due."""
        parts = {"test": self.dataset.test} | ({"val": self.dataset.validation} if self.run.holdout else {})
        measured = {}
        for part, images in parts.items():
            error = loss = None
            if due:
                views = self.dataset.eval_batches(
                    images, self.step.device, self.ranks[:2], failed=self.batches.unreadable, **self.reading
                )
                kept = [] if part == "test" and self.state.iteration == self.recipe.iterations else None
                error, loss = evaluate.single_view(self.step.net, views, self.step.device, self.run.precision, kept)
                if kept is not None:
                    self._keep_predictions(torch.cat(kept, dim=1))
                if not math.isfinite(loss):
                    loss = None  # of a net that is on its way to diverge, or just past its end
            measured |= {f"{part}_error": error, f"{part}_loss": loss}
        return measured

    def measure_layers(self, images, labels):
        """Add rows to ``layers.csv``, on what batch norm sees at once of the batch that is being trained on."""
        if self.ranks.rank == 0:
            seen = images[: self.recipe.bn_batch], labels[: self.recipe.bn_batch]
            rows = measure.signals(self.step.net, *seen, self.run.precision)
            self.state.layers += [{"iteration": self.state.iteration} | row for row in rows]
            self._write("layers.csv", records.rows_text(self.state.layers, (), digits=6))

    def checkpoint_is_due(self):
        return self.ranks.rank == 0 and time.perf_counter() - self.saved > CHECKPOINT_SECONDS

    def save_checkpoint(self):
        self._count_time()
        state = {"threads": torch.get_num_threads(), "compiled": self.compiled, **self.step.state_dict()}
        checkpoint.save(self.folder, self.origin, state | vars(self.state))
        self.saved = time.perf_counter()

    def interrupt(self):
        """Leave a checkpoint, and say so unless the main process does."""
        iteration = self.state.iteration
        if iteration:
            self.save_checkpoint()
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            how = f"goes on from there: a checkpoint is in {self.folder}" if iteration else "begins it"
            print(
                f"{self.run.id} was interrupted after {iteration:,} of {self.recipe.iterations:,} iterations. "
                f"The same call {how}.",
                flush=True,
            )

    def finish(self):
        """Write the weights and, last of all, the summary: it says that everything is there."""
        state = self.state
        if state.diverged is None:
            weights = {name: value.cpu() for name, value in self.step.net.state_dict().items()}
            for name, value in weights.items():
                if name.endswith("num_batches_tracked"):
                    value.fill_(state.iteration)  # of whole batches, in however many parts they were trained
            content = io.BytesIO()  # torch would hide why a file cannot be written
            torch.save(weights, content)
            self._write("weights.pt", content.getvalue())
        else:
            rate = state.history[-1]["lr"]
            self._note(
                f"diverged: the loss was no longer finite after {state.diverged:,} iterations, at {rate:g}", state
            )
        summary = self._summary()
        if self.ranks.rank == 0:
            records.write_summary(self.folder, summary)
            checkpoint.remove(self.folder)
        if self.ranks.world_size > 1:
            dist.barrier()

    def _summary(self):
        state = self.state
        self._count_time()
        errors = {name: value for name, value in state.history[-1].items() if name.endswith(("_error", "_loss"))}
        if state.diverged is not None:  # errors of a net whose weights are no numbers say nothing
            errors = dict.fromkeys(errors) | {"diverged": state.diverged}
        return {
            **errors,
            "parameters": measure.parameters(self.step.net),
            "multiply_adds": measure.multiply_adds(self.step.net, self.dataset.size),
            "seconds": state.seconds,
            "images_per_second": state.iteration * self.recipe.batch / state.training_seconds,
            "iterations": self.recipe.iterations,
            "unreadable": len(state.unreadable),
            **({"notes": state.notes} if state.notes else {}),
        }

    def _keep_predictions(self, mine):
        """Write labels and predicted classes of all test images, of which each process has its own, in turns."""
        parts = self.ranks.gather(mine)
        together = torch.empty(2, len(self.dataset.test.labels), dtype=torch.int64)
        if sum(part.shape[1] for part in parts) == together.shape[1]:  # less where images could not be read
            for place, part in enumerate(parts):
                together[:, place :: len(parts)] = part
            rows = [{"label": label, "predicted": predicted} for label, predicted in together.T.tolist()]
            self._write("predictions.csv", records.rows_text(rows, ()))

    def _list_unreadable(self):
        """Keep a list of the files that could not be read by any of the processes."""
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
        """Say something that also belongs into the record."""
        if self.ranks.rank == 0:
            print(f"{self.run.id}: {text}", flush=True)
        state.notes.append(text)

    def _write(self, name, content):
        if self.ranks.rank == 0:
            files.write(self.folder / name, content)
