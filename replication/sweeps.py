"""Many runs: what is finished is loaded, the rest is trained side by side."""

import contextlib
import shutil
import time
from collections.abc import Iterable
from concurrent.futures import FIRST_COMPLETED, CancelledError, ThreadPoolExecutor, wait
from dataclasses import replace
from functools import partial

import torch

from replication import clusters, trainers
from replication import data as datasets
from replication.engine import files
from replication.engine.files import DamagedError
from replication.engine.machine import cores
from replication.engine.progress import in_words, progress_bar
from replication.engine.workers import WorkerDiedError, WorkerError, Workers
from replication.runs import Run, records
from replication.runs.environment import (
    check_devices,
    check_net,
    check_processes,
    cost,
    note_on_length,
    reproducible,
    threads_for,
    warn_of_precision,
)

POLL_SECONDS = 0.5
LONG = 1e13  # multiply-adds of all forward passes: minutes on two cores, worth a second to say how many
UNKNOWN_SIZE = {True: (224, 224), False: (32, 32)}  # of images that are only where a cluster's workers are, by layout


class RunsFailedError(RuntimeError):
    """Some runs failed; those that did not are finished and will be loaded when asked for again."""


def run_all(runs, results="results", data="data", executor=None, processes=1, fresh=False):
    """Train what is missing, load what is finished: a list of records in the order of ``runs``.

    A finished run is loaded from ``results`` or, if it is not there, from the records published with this repository;
    that needs neither data nor training. ``fresh=True`` trains all of them again; their records in ``results`` are
    replaced when the last is finished.

    Runs are trained in worker processes, as many side by side as the cores allow: from a notebook, a script (no
    ``if __name__ == "__main__":`` is needed), a REPL or standard input. Or on ``executor``:

    - the address of a Dask scheduler, such as "tcp://10.0.0.5:8786", or a Dask client. Its workers need this package,
      but not these folders: each trains in a folder of its own, finds its images in ``data`` from where it was started,
      and sends record and weights back, which are written here. What a worker that dies was training is tried again on
      another; without any worker for an hour, what is left has failed. The bar counts runs when they are finished.
    - any other ``concurrent.futures`` executor whose workers are processes that see the same folders.

    With ``processes``, runs are trained one after the other, each by that many processes that share its batches.
    A progress bar shows iterations, current training errors and the time left. A run that another process is training
    is waited for. A run that diverged is finished: its record says so. An interrupt leaves checkpoints of what is being
    trained on this machine: the same call resumes from them.

    Raises TypeError or ValueError before anything is trained or written when an entry is no ``Run``, a folder cannot be
    one, a data set cannot be loaded, ``processes`` cannot share a batch, a net of one's own does not fit the images, a
    finished run was made from other images than are there now or by other code, no Dask scheduler answers, or none of
    its workers has this package; NoWorkersError, an OSError, when no worker comes; RunsFailedError, naming each failed
    run and its error, after all others are finished. A damaged record fails its run: nothing is trained over it.
    """
    runs, on_cluster = _as_list(runs), clusters.is_one(executor)
    results, here = files.folder("results", results), files.folder("data", data)
    _check_options(runs, executor, processes, fresh)
    folder = results / ".fresh" if fresh else results  # until the last is finished
    finished, errors = _find_finished(runs, folder, records.finished if fresh else records.finished_or_published)
    trainers.check_images(finished.values(), here)
    missing = [run for run in dict.fromkeys(runs) if run not in finished and run not in errors]
    if finished and not fresh:
        print(_loading_line(finished.values(), bool(missing or errors)))
    try:
        if missing and on_cluster:
            with clusters.connected(executor) as client:
                errors |= _train_there(missing, folder, data, here, client)
        elif missing:
            errors |= _train_here(missing, folder, here, executor, processes)
    except KeyboardInterrupt:
        count = sum(records.finished(run, folder) is not None for run in missing)
        print(
            f"Interrupted: {count} of {len(missing)} runs were finished. The same call, or running this cell again, "
            f"continues with the others{'' if on_cluster else ' from their checkpoints'}."
        )
        raise
    if errors:
        listing = "\n".join(f"  {run.id}: {_in_words(error)}" for run, error in errors.items())
        raise RunsFailedError(
            f"{len(errors)} of {len(set(runs))} runs failed, the others are finished and will not be trained again:"
            f"\n{listing}"
        )
    if fresh:
        _replace(set(runs), folder, results)
    finished |= {run: records.finished(run, results) for run in (runs if fresh else missing)}
    for record in finished.values():
        _print_notes(record)
    return [finished[run] for run in runs]


def _as_list(runs):
    """The runs as a list; raises TypeError for anything else."""
    if isinstance(runs, Run | str | bytes | dict) or not isinstance(runs, Iterable):
        raise TypeError(f"runs {runs!r}: give a list of Run(net, dataset, ...)")
    runs = list(runs)
    for run in runs:
        if not isinstance(run, Run):
            raise TypeError(f"{run!r} is no Run: make one with Run(net, dataset, ...)")
    return runs


def _check_options(runs, executor, processes, fresh):
    if not isinstance(fresh, bool):
        raise TypeError(f"fresh {fresh!r}: choose True or False")
    if isinstance(executor, ThreadPoolExecutor):
        raise TypeError("executor: threads cannot train side by side, leave it out or give one of processes")
    for run in runs:
        check_processes(run, processes)
    check_devices(processes)
    if processes > 1 and executor is not None:
        raise ValueError(
            f"processes {processes}: an executor's workers train in one process each, leave one of the two"
        )


def _find_finished(runs, results, find):
    """The records of the runs that ``find`` finds, and the errors of those whose records are damaged."""
    finished, errors = {}, {}
    for run in dict.fromkeys(runs):
        try:
            record = find(run, results)
            finished |= {} if record is None else {run: record}
        except DamagedError as error:
            errors[run] = error
    return finished, errors


def _loading_line(finished, others):
    """How many runs were loaded; ``others``: whether that is not all that was asked for."""
    published = sum(records.is_published(record) for record in finished)
    origin = f", {published} of them published with this repository" if published else ""
    rest = "" if others else ". Nothing had to be trained"
    return f"{len(finished)} run{'s' * (len(finished) > 1)} loaded{origin}{rest}; fresh=True trains again."


def _print_notes(record):
    for note in record.summary.get("notes", ()):
        print(f"{record.run.id}: {note}")
    if record.summary.get("unreadable"):
        print(f"{record.run.id}: {record.summary['unreadable']} unreadable files, see {record.folder}/unreadable.txt")


def _in_words(error):
    return str(error) if isinstance(error, WorkerError) else f"{type(error).__name__}: {error}"


def _load(runs, data):
    """Load the runs' data sets once, so that bad data fails at once and the workers find it downloaded and decoded."""
    loaded = {name: datasets.load(name, data) for name in dict.fromkeys(run.dataset for run in runs)}
    for name, count in dict.fromkeys((run.dataset, run.holdout) for run in runs):
        loaded[name].hold_out(count).unreadable()
    for run in runs:
        check_net(run, loaded[run.dataset].size, len(loaded[run.dataset].classes))
    trainers.check_detectors(runs)
    return loaded


def _longest_first(runs, sizes):
    """So that none is left running alone at the end."""
    costs = {run: cost(run, sizes[run.dataset]) * run.settings.iterations for run in runs}
    return sorted(runs, key=costs.get, reverse=True)


def lanes_for(runs, sizes, processes=1):
    """How many runs are trained side by side on this machine; ``sizes``: height and width of images by data set."""
    threads = max(threads_for(run, sizes[run.dataset]) for run in runs)
    alone = torch.cuda.is_available() or processes > 1
    return 1 if alone else min(len(runs), max(1, cores() // threads))


def _train_here(runs, results, data, executor, processes):
    """Train in workers of this machine, or of an executor that sees the same folders; {run: error} of failed runs."""
    warn_of_precision(runs)
    images = _load(runs, data)
    sizes = {name: dataset.size for name, dataset in images.items()}
    runs, lanes = _longest_first(runs, sizes), lanes_for(runs, sizes, processes)
    with _bar(runs) as bar, Workers(lanes) if executor is None else contextlib.nullcontext(executor) as pool:
        seconds = _estimate(runs, sizes, lanes * processes, pool) if executor is None else None
        print(_training_line(runs, images, lanes if executor is None else 1, seconds))
        return _follow({pool.submit(trainers.train, run, results, data, processes): run for run in runs}, results, bar)


def _train_there(runs, results, data, here, client, attempts=3):
    """Train on the workers of a cluster, and write here what they send; {run: error} of those that failed."""
    images = _load([run for run in runs if datasets.present(run.dataset, here)], here)
    sizes = {run.dataset: UNKNOWN_SIZE[datasets.is_imagenet(run.dataset)] for run in runs}
    runs = _longest_first(runs, sizes | {name: dataset.size for name, dataset in images.items()})
    prints = {name: dataset.fingerprint for name, dataset in images.items()}
    watch = clusters.able(client)
    print(_training_line(runs, images, min(len(watch()), len(runs))))
    pool = client.get_executor(pure=False, workers=watch.among)  # every call is a new one
    with _bar(runs) as bar:
        calls = {run: partial(clusters.train_elsewhere, run, str(data), prints.get(run.dataset)) for run in runs}
        futures = {pool.submit(clusters.portable(call)): run for run, call in calls.items()}
        errors = _follow(futures, results, bar, lambda run, contents: records.keep(run, contents, results), watch)
    again = [run for run, error in errors.items() if isinstance(error, ImportError)]  # of workers that came later
    if again and attempts > 1:
        others = {run: error for run, error in errors.items() if run not in again}
        return others | _train_there(again, results, data, here, client, attempts - 1)
    return errors


def _training_line(runs, images, lanes, seconds=None):
    """What is about to be trained, ``lanes`` runs side by side; ``images``: data sets by name, as far as known."""
    line = f"Training {len(runs)} run{'s' * (len(runs) > 1)}{f', {lanes} side by side' if lanes > 1 else ''}"
    line += "." if seconds is None else f", about {in_words(seconds)} here."
    longest = {run.dataset: run for run in sorted(runs, key=lambda run: run.settings.iterations)}
    notes = [note_on_length(run, len(images[name].train.labels)) for name, run in longest.items() if name in images]
    return line + "".join(notes)


def _estimate(runs, sizes, processes, pool):
    """Roughly the seconds that long runs take with so many processes at work; None for short ones and detectors.

    A few steps of a small net are timed in a worker; other nets take longer in proportion to their multiply-adds.
    """
    costs = {run: cost(run, sizes[run.dataset]) * run.settings.iterations for run in runs}
    if sum(costs.values()) < LONG or any(run.detects for run in runs):
        return None
    small = max(runs, key=costs.get)
    small = replace(small, net="resnet-18" if small.name.imagenet else "resnet-20", bn_batch=None)
    size = sizes[small.dataset]
    try:
        seconds = pool.submit(_iteration_seconds, small, size).result()
    except (WorkerError, WorkerDiedError):
        return None  # the runs themselves will say why
    return sum(costs.values()) / cost(small, size) * seconds / processes


def _iteration_seconds(run, size):
    """Seconds of an iteration of a run, from three steps on blank images; the net is not compiled."""
    with reproducible(run, size):
        step, part = trainers.new_step(run, classes=10), run.settings.bn_batch
        images = torch.zeros(part, 3, *size, device=step.device).to(memory_format=torch.channels_last)
        labels = torch.zeros(part, dtype=torch.int64, device=step.device)
        for iteration in range(6):
            if iteration == 3:
                step.pop_totals()  # waits for the device
                started = time.perf_counter()
            step(images, labels, run.settings.lr)
        step.pop_totals()
        return (time.perf_counter() - started) / 3 * run.settings.batch / part


def _bar(runs):
    total = sum(run.settings.iterations for run in runs)
    return progress_bar(total, runs[0].id if len(runs) == 1 else f"{len(runs)} runs", "iterations")


def _follow(futures, results, bar, keep=lambda run, value: None, watch=lambda: None):
    """Wait for the runs, show how far they are, ``keep`` what they return; {run: error} of those that failed.

    A NoWorkersError of ``watch``, which is called now and then, is the error of all that are left.
    """
    errors, left = {}, set(futures)
    try:
        while left:
            done, left = wait(left, timeout=POLL_SECONDS, return_when=FIRST_COMPLETED)
            for future in done:
                run = futures[future]
                if future.cancelled():
                    errors[run] = CancelledError("cancelled by its executor, or the connection to it was lost")
                elif future.exception() is not None:
                    errors[run] = future.exception()
                else:
                    keep(run, future.result())
            _show(futures.values(), results, bar)
            watch()
    except clusters.NoWorkersError as error:
        errors |= {futures[future]: error for future in left}
    finally:
        for future in left:  # what has not started will not
            future.cancel()
    return errors


def _show(runs, results, bar):
    """Read progress from the histories, which every worker writes as it goes."""
    reached, current = 0, []
    for run in runs:
        row = _last_row(run.folder(results) / "history.csv")
        if (run.folder(results) / "summary.json").exists():
            reached += run.settings.iterations
        elif row is not None:
            reached += row[0]
            if row[0] < run.settings.iterations:
                words = f"loss {row[1]:.3f}" if run.detects else f"{row[1]:.1f} %"
                current.append(f"{run.name.label} {words}")
    bar.set_postfix_str(", ".join(current), refresh=False)
    bar.update(reached - bar.n)


def _last_row(path):
    """The last iteration in a history and its training error, or the loss of a detector, which has no error."""
    try:
        fields = path.read_text().rsplit("\n", 2)[-2].split(",")
        return int(fields[0]), float(fields[2] or fields[3])
    except (OSError, ValueError, IndexError):
        return None


def _replace(runs, fresh, results):
    """Put records that were trained again in the place of those from before."""
    for run in runs:
        with records.locked(run, results):
            new, folder = run.folder(fresh), run.folder(results)
            before = new.with_name(f"{new.name}.before")
            if folder.exists():
                folder.rename(before)
            folder.parent.mkdir(parents=True, exist_ok=True)
            new.rename(folder)
    shutil.rmtree(fresh)
