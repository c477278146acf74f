"""Trains one run as sections 3.4 and 4.2 of the paper describe: ``fit`` is the loop, ``train`` prepares it."""

import contextlib
import os
import signal
import threading
import time

import numpy as np
import torch
import torch.distributed as dist

from replication import data as datasets
from replication.engine import checkpoint, files, machine, steps
from replication.engine.checks import whole
from replication.engine.distributed import Ranks, launch, members
from replication.engine.progress import progress_bar
from replication.pretrained import check_detectors, load_detector
from replication.runs import records
from replication.runs.environment import (
    check_devices,
    check_net,
    check_processes,
    note_on_length,
    reproducible,
    warn_of_precision,
)
from replication.runs.own import OwnNet
from replication.runs.recorder import DetectionRecorder, Recorder

STATISTICS = 16  # images that the fixed batch norm of a detector takes its statistics from, where nothing was trained
LOCK_SECONDS = 5  # between the first rank's attempts to take a lock that another training holds


def fit(run, dataset, folder, ranks, progress=False):
    """Train a run from its last checkpoint, or from the start, to its end, and write its record (sections 3.4, 4.2).

    All ranks call this and hold the same net. Batch norm normalizes ``bn_batch`` images at a time; a batch consists of
    one or more such parts, of which each rank has its share. Gradients, running statistics and errors are averaged over
    all parts, so the result does not depend on the number of processes, except for the order of floating-point sums.
    Raises KeyboardInterrupt after the iteration in which an interrupt came, once a checkpoint is written, or at the end
    the record.
    """
    recipe, part = run.settings, dataset.hold_out(run.holdout)
    workers = max(1, machine.cores() // ranks.local_world_size)  # processes that decode photographs
    step = new_step(run, len(part.classes), ranks)
    batches = part.batches(
        recipe.batch, run.seed, step.device, ranks[:2], iterations=recipe.iterations, workers=workers
    )
    if run.detects and run.weights is None:
        run.name.measure_statistics(step.net, part.examples(STATISTICS))
    kind = DetectionRecorder if run.detects else Recorder
    recorder = kind(run, part, dataset.fingerprint, folder, step, batches, workers)  # loads the last checkpoint
    state = recorder.state
    recorder.begin(step.begin(part.size, recorder.compiled))
    with (
        _interruptible(ranks) as interrupted,
        progress_bar(recipe.iterations, run.name.label, "iterations", not progress, state.iteration) as bar,
    ):
        bar.set_postfix_str(state.current_errors(), refresh=False)
        while state.iteration < recipe.iterations and state.diverged is None and not interrupted.is_set():
            images, labels = batches(state.iteration)
            rate = recipe.learning_rate(state.iteration, state.history)
            if run.detects or isinstance(run.name, OwnNet):  # which may draw at random, the same after a checkpoint
                entropy = np.random.SeedSequence([run.seed, 2, state.iteration, ranks.rank])
                torch.manual_seed(int(entropy.generate_state(1)[0]))
            if state.iteration == 0:
                recorder.measure_layers(images, labels)
            step(images, labels, rate)
            state.iteration += 1
            if recorder.row_is_due():  # a hundred times a run, and after every epoch of a warm-up
                recorder.add_row(images, labels, rate)  # mean training error since the last row; looks for divergence
                bar.set_postfix_str(state.current_errors(), refresh=False)
            if recorder.checkpoint_is_due():
                recorder.save_checkpoint()
            bar.update()
    if state.iteration < recipe.iterations and state.diverged is None:
        raise KeyboardInterrupt(recorder.interrupt())
    recorder.finish(progress)
    if interrupted.is_set():  # in the last iteration, or in one that diverged
        raise KeyboardInterrupt


def new_step(run, classes, ranks=Ranks()):  # noqa: B008 (a tuple)
    """The ``Step`` that trains a run's net, which has its initial weights; call its ``begin`` before the first step."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)
        net = run.name.build(classes) if run.weights is None else load_detector(run, classes)
    kind = steps.DetectionStep if run.detects else steps.Step
    return kind(net, run.settings, run.precision, ranks)


@contextlib.contextmanager
def _interruptible(ranks):
    """An event that the first interrupt sets, to end training after the iteration; the second is a KeyboardInterrupt.

    Of several processes none may stop before the others: there already the first is.
    """
    event, previous = threading.Event(), signal.getsignal(signal.SIGINT)

    def stop(*_):
        event.set()
        signal.signal(signal.SIGINT, previous)

    # Python delivers interrupts to the main thread alone.
    if ranks.world_size > 1 or threading.current_thread() is not threading.main_thread() or not callable(previous):
        yield event
        return
    signal.signal(signal.SIGINT, stop)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, previous)


def train(run, results="results", data="data", processes=1, progress=False, threads=None):
    """Train a run, resuming from its last checkpoint, and return its ``Record``; that of a finished run at once.

    Trains on the CUDA device if there is one, else on the CPU. ``processes`` of this machine share every batch, each on
    a device of its own; if one dies, all start again from the checkpoint. Under torchrun the calling process is one of
    the ranks, and all machines must see the same ``results``. If another process trains this run, wait for its record.
    ``progress``: show bars while data is prepared and while the run is trained; of several ranks the first does.
    ``threads``: of each process, which decide the last digits; left out, as many as suit the run and the machine. On a
    CPU a run goes on with those of its checkpoint.

    Training stops when the loss is no longer finite, and the record says so. An interrupt in a single process leaves a
    checkpoint before KeyboardInterrupt is raised; a second one does not wait for it. The last two checkpoints are kept;
    a damaged one is skipped, and the record says so.

    Raises TypeError or ValueError for impossible folders, for a data set that cannot be loaded or that a checkpoint was
    not made from, for a record that is damaged, for a record or checkpoint of other code, for a number of processes
    that does not divide the batch, and for more threads than cores; OSError when something cannot be written;
    RuntimeError when processes die again and again.
    """
    check_processes(run, processes)
    check_devices(processes)
    if threads is not None:
        threads = whole("threads", threads, least=1, most=machine.cores())
    results, data = files.folder("results", results), files.folder("data", data)
    finished = records.finished(run, results)
    if finished is not None:
        check_images([finished], data)
    if dist.is_torchelastic_launched():  # not all processes may see a finished record yet: the first rank decides
        _train_as_rank(run, results, data, progress, threads)
    elif finished is None:
        dataset = _load(run, data, progress)
        if processes > 1:
            # An unusable checkpoint is an error here already: the processes would be started again in vain.
            checkpoint.load(run.folder(results), records.origin(run, dataset.fingerprint))
            launch(_train_as_rank, (run, results, data, progress, threads), processes, run.id)
        else:
            with records.locked(run, results):
                if records.finished(run, results) is None:
                    _train(run, results, dataset, Ranks(), progress, threads)
    return records.finished(run, results)


def check_images(finished, data):
    """Raise ValueError for records of other images than are here now; where there are none, records are taken as is."""
    for name in dict.fromkeys(record.run.dataset for record in finished):
        if not datasets.present(name, data):
            continue
        dataset = datasets.load(name, data)
        if not len(dataset.train.labels):
            continue  # photographs for tests alone
        for record in finished:
            if record.run.dataset == name and record.fingerprint != dataset.fingerprint:
                raise ValueError(
                    f"{record.folder} was made from other images than {name!r} in {data} now holds: bring these back, "
                    "give the new images another name, or remove the record"
                )


def _load(run, data, progress=False):
    first_here = int(os.environ.get("LOCAL_RANK", 0)) == 0
    dataset = datasets.load(run.dataset, data, progress=progress and first_here)
    check_net(run, dataset.size, len(dataset.classes))
    check_detectors([run])
    if first_here:  # this reads all photographs, for their mean: one process per machine does, the others wait
        dataset.hold_out(run.holdout).unreadable()
    return dataset


def _train_as_rank(run, results, data, progress, threads):
    """Train as one of several processes; the first rank decides for all."""
    with members() as ranks:
        lock, waiting = None, False
        try:
            while True:
                lock = files.acquire(records.lock(run, results)) if ranks.rank == 0 else None
                if ranks.gather(lock is not None)[0]:
                    break
                if ranks.rank == 0 and not waiting:
                    print(files.waiting(records.lock(run, results), f"{run.id} is being trained"), flush=True)
                    waiting = True
                time.sleep(LOCK_SECONDS)
            finished = records.finished(run, results) if ranks.rank == 0 else None
            if not ranks.gather(finished is not None)[0]:
                _train(run, results, _load(run, data, progress), ranks, progress, threads)
        finally:
            if lock is not None:
                lock.release()


def _train(run, results, dataset, ranks, progress, threads):
    folder, first = run.folder(results), ranks.rank == 0
    if progress and first:  # before the net is compiled, which takes minutes
        warn_of_precision([run])
        where = f"checkpoints and record in {folder}.{note_on_length(run, len(dataset.train.labels))}"
        print(f"{run.id}: {run.settings.iterations:,} iterations, {where}", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    if first:
        files.remove_parts(folder)
    with reproducible(run, dataset.size, ranks.local_world_size, threads), torch.random.fork_rng(devices=[]):
        check_processes(run, ranks.world_size)
        fit(run, dataset, folder, ranks, progress and first)
