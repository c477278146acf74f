"""Many runs: what is finished is loaded, the rest is trained side by side."""

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterable
from concurrent.futures import (
    FIRST_COMPLETED,
    BrokenExecutor,
    CancelledError,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
    wait,
)
from pathlib import Path
from typing import NamedTuple

import torch

from replication import clusters, forecasts, trainers
from replication import data as datasets
from replication.engine import files
from replication.engine.machine import cores, tune_malloc
from replication.engine.progress import progress_bar
from replication.runs import Run, records

POLL_SECONDS = 0.5
GRACE_SECONDS = 300  # for an interrupted worker to end its iteration and write a checkpoint


class RunsFailedError(RuntimeError):
    """Some runs failed; those that did not are finished and will be loaded when asked for again."""


def run_all(runs, results="results", data="data", executor=None, processes=1, weights=False):
    """Train what is missing, load what is finished: a list of records in the order of ``runs``.

    Runs are trained in processes of their own, as many side by side as the cores allow; or on ``executor``:

    - the address of a Dask scheduler, such as "tcp://10.0.0.5:8786", or a Dask client. Its workers need this package,
      but not these folders: each trains in a folder of its own, finds its images in ``data`` from where it was started,
      and sends the small files of the record back, which are written here; with ``weights`` the trained weights, too.
      What a worker that dies was training is tried again on another. The bar counts runs when they are finished.
    - any other ``concurrent.futures`` executor, whose workers see the same folders.

    With ``processes``, runs are trained one after the other, each by that many processes that share its batches.
    Finished runs need neither data nor training. Before training a few iterations are measured, and what all will take
    is printed; a progress bar shows iterations and current training errors. In a script, call this under
    ``if __name__ == "__main__":``, since the processes that train import the script.

    What another process is training is waited for. A damaged record is moved to ``<results>/damaged/`` and trained
    again. A run that diverged is finished: its record says so. An interrupt leaves checkpoints of what is being trained
    on this machine: the same call goes on from there.

    Raises TypeError or ValueError before anything is trained or written when an entry is no ``Run``, a folder cannot be
    one, a data set cannot be loaded, ``processes`` cannot share a batch, a finished run was made from other images than
    are there now or by other code, or no Dask scheduler answers; RunsFailedError, naming each failed run and its error,
    after all others are finished.
    """
    runs, on_cluster = _listed(runs), clusters.is_one(executor)
    files.folder("results", results), files.folder("data", data)
    if not isinstance(weights, bool):
        raise TypeError(f"weights {weights!r}: choose True or False")
    for run in runs:
        trainers.check_processes(run, processes)
    trainers.check_devices(processes)
    if processes > 1 and executor is not None:
        raise ValueError(
            f"processes {processes}: an executor's workers train in one process each, leave one of the two"
        )
    results, here = Path(results).absolute(), Path(data).absolute()
    done = {run: records.usable(run, results, alone=False) for run in runs}
    _check_data([record for record in done.values() if record is not None], here)
    missing = [run for run, record in done.items() if record is None]
    if not on_cluster:
        trainers.warn_of_precision(missing)
    try:
        if missing and on_cluster:
            with clusters.connected(executor) as cluster:
                _train_there(missing, results, data, cluster, weights)
        elif missing:
            _train(missing, results, here, executor, processes)
    except KeyboardInterrupt:
        left = sum(records.finished(run, results) is None for run in missing)
        print(
            f"Interrupted: {len(missing) - left} of {len(missing)} runs were finished. The same call, or running this "
            f"cell again, goes on with the others{'' if on_cluster else ' from their checkpoints'}."
        )
        raise
    found = [records.finished(run, results) for run in runs]
    for record in dict(zip(runs, found, strict=True)).values():
        for note in record.summary.get("notes", ()):
            print(f"{record.run.id}: {note}")
        if record.summary.get("unreadable"):
            print(
                f"{record.run.id}: {record.summary['unreadable']} unreadable files, see {record.folder}/unreadable.txt"
            )
    return found


def _listed(runs):
    """The runs as a list; raises TypeError for anything else."""
    if isinstance(runs, Run | str | bytes | dict) or not isinstance(runs, Iterable):
        raise TypeError(f"runs {runs!r}: give a list of Run(net, dataset, ...)")
    runs = list(runs)
    for run in runs:
        if not isinstance(run, Run):
            raise TypeError(f"{run!r} is no Run: make one with Run(net, dataset, ...)")
    return runs


def _check_data(finished, data):
    """Refuse records of other images than are here now; where there are none, the records stand for themselves."""
    for name in dict.fromkeys(record.run.dataset for record in finished):
        if not datasets.present(name, data):
            continue
        dataset = datasets.load(name, data)
        if not len(dataset.train.labels):
            continue  # photographs for tests alone
        fingerprint = dataset.fingerprint
        for record in finished:
            if record.run.dataset == name and record.fingerprint != fingerprint:
                raise ValueError(
                    f"{record.folder} was made from other images than {name!r} in {data} now holds: bring these back, "
                    "give the new images another name, or remove the record"
                )


class _Images(NamedTuple):
    """What training needs to know of the data sets of some runs, by name."""

    size: dict
    test_images: dict
    fingerprint: dict


def _loaded(runs, data):
    """Load the runs' data sets once, so that bad data fails at once and the workers find it downloaded and decoded."""
    images = _Images({}, {}, {})
    loaded = {name: datasets.load(name, data) for name in dict.fromkeys(run.dataset for run in runs)}
    for name, count in dict.fromkeys((run.dataset, run.holdout) for run in runs):
        loaded[name].hold_out(count).unreadable()
    for name, dataset in loaded.items():
        images.size[name], images.fingerprint[name] = dataset.size, dataset.fingerprint
        images.test_images[name] = len(dataset.test.labels)
    return images


def _set_aside(runs, results):
    """What is damaged goes away now, before it is trained again, so that it is said here."""
    for run in runs:
        records.usable(run, results)


def _longest_first(runs, size):
    """So that none is left running alone at the end."""
    costs = {run: trainers.cost(run, size[run.dataset]) * run.settings.iterations for run in runs}
    return sorted(runs, key=costs.get, reverse=True)


def workers_for(runs, sizes, processes=1):
    """How many runs are trained side by side on this machine; ``sizes``: height and width of images by data set."""
    threads = max(trainers.threads_for(run, sizes[run.dataset]) for run in runs)
    alone = torch.cuda.is_available() or processes > 1
    return 1 if alone else min(len(runs), max(1, cores() // threads))


def _train(runs, results, data, executor, processes):
    images = _loaded(runs, data)
    _set_aside(runs, results)
    runs = _longest_first(runs, images.size)
    with _timed(results) as forecast:
        if executor is not None:
            threads = isinstance(executor, ThreadPoolExecutor)  # of one process, where one run at a time is trained
            forecast(executor, runs, images, 1 if threads else getattr(executor, "_max_workers", 1))
            with _bar(runs) as bar, _stopping(threads) as futures:
                futures |= _submit(executor, runs, results, data)
                errors = _follow(futures, results, bar)
        else:
            workers = workers_for(runs, images.size, processes)
            errors = _train_locally(runs, results, data, processes, workers, images, forecast)
        _raise(errors, len(runs))


@contextlib.contextmanager
def _stopping(threads):
    """Gives a dict for futures; where threads of this process train, an interrupt ends them, with a checkpoint."""
    futures = {}
    try:
        yield futures
    except KeyboardInterrupt:
        if threads:
            trainers.STOP.set()  # until the last of them has ended, whatever becomes of the wait for it
            for future in futures:
                future.add_done_callback(lambda _: all(each.done() for each in futures) and trainers.STOP.clear())
            wait(futures)
        raise


def _raise(errors, count):
    if errors:
        listing = "\n".join(f"  {run.id}: {type(error).__name__}: {error}" for run, error in errors.items())
        raise RunsFailedError(
            f"{len(errors)} of {count} runs failed, the others are finished and are not trained again:\n{listing}"
        ) from next(iter(errors.values()))


@contextlib.contextmanager
def _timed(results):
    """Gives what prints how long some runs will take on some workers; prints at the end how close it came."""
    expected, started = None, time.monotonic()

    def forecast(executor, runs, images, workers=1, processes=1):
        nonlocal expected, started
        try:
            workers = min(workers, len(runs))
            begun = {run: (_last_row(run.folder(results) / "history.csv") or (0,))[0] for run in runs}
            expected = forecasts.seconds(executor, runs, images.size, images.test_images, workers, processes, begun)
        except Exception as error:  # if it is the runs' own, they will tell
            print(f"No estimate of the time: {type(error).__name__}: {error}")
            return
        together = f", {workers} side by side" if workers > 1 else ""
        print(f"Training {len(runs)} run{'s' * (len(runs) > 1)}{together}: about {forecasts.in_words(expected)}.")
        started = time.monotonic()

    yield forecast
    if expected is not None:
        took = forecasts.in_words(time.monotonic() - started)
        print(f"It took {took}, where {forecasts.in_words(expected)} were expected.")


def _bar(runs):
    total = sum(run.settings.iterations for run in runs)
    return progress_bar(total, runs[0].id if len(runs) == 1 else f"{len(runs)} runs", "iterations")


def _train_locally(runs, results, data, processes, workers, images, forecast):
    with local_pool(workers) as pool:
        forecast(pool, runs, images, workers, processes)
        with _bar(runs) as bar:
            errors = _train_in(pool, runs, results, data, processes, bar)
    for run in [run for run, error in errors.items() if isinstance(error, BrokenExecutor)]:
        # A worker that dies takes its pool along, with runs that are none the worse: each is tried again by itself.
        del errors[run]
        with local_pool(1) as pool, _bar([run]) as bar:
            errors |= _train_in(pool, [run], results, data, processes, bar)
    return errors


def _train_in(pool, runs, results, data, processes, bar):
    try:
        futures = _submit(pool, runs, results, data, processes)
    except BrokenExecutor as error:  # a worker died before it was given anything
        return dict.fromkeys(runs, error)
    return _follow(futures, results, bar, local=True)


@contextlib.contextmanager
def local_pool(workers):
    """Processes of this machine to train in. On an error here they end at once: their checkpoints stay."""
    context = multiprocessing.get_context("spawn")
    theirs, ours = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(workers, context, _start_worker, (theirs,))
    try:
        with _huge_pages():
            for _ in range(workers):
                pool.submit(os.getpid)  # starts a process
        yield pool
    except BaseException:
        ours.close()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        ours.close()
        theirs.close()


def _train_there(runs, results, data, cluster, weights):
    """Train on the workers of a cluster, and write here what they send."""
    known = [run for run in runs if datasets.present(run.dataset, Path(data).absolute())]
    images = _loaded(known, Path(data).absolute())
    for run in runs:  # images that are not here are not checked here, and taken to be of the usual size
        images.size.setdefault(run.dataset, (224, 224) if datasets.is_imagenet(run.dataset) else (32, 32))
        images.test_images.setdefault(run.dataset, 0)
    runs = _longest_first(runs, images.size)
    _set_aside(runs, results)
    with _timed(results) as forecast:
        forecast(cluster.executor, runs, images, cluster.workers)
        with _bar(runs) as bar:
            futures = {
                cluster.executor.submit(
                    trainers.train_elsewhere, run, str(data), images.fingerprint.get(run.dataset), weights
                ): run
                for run in runs
            }
            errors = _follow(futures, results, bar, keep=lambda run, contents: records.keep(run, contents, results))
            _raise(errors, len(runs))


def _submit(executor, runs, results, data, processes=1):
    return {executor.submit(trainers.train, run, results, data, processes): run for run in runs}


def _follow(futures, results, bar, keep=None, local=False):
    """Wait for the runs, show how far they are, return the error of each that failed; ``keep`` what they return.

    local: the workers are children of this process, so that it can tell whether others train a run.
    """
    errors, left, waiting = {}, set(futures), set()
    try:
        while left:
            done, left = wait(left, timeout=POLL_SECONDS, return_when=FIRST_COMPLETED)
            for future in done:
                run = futures[future]
                if future.cancelled():
                    errors[run] = CancelledError("cancelled by its executor, or the connection to it was lost")
                elif future.exception() is not None:
                    errors[run] = future.exception()
                elif keep is not None:
                    keep(run, future.result())
            _show(futures.values(), results, bar)
            if local:
                _tell_waiting([futures[future] for future in left], results, waiting)
    except BaseException:
        for future in left:  # what has not begun will not
            future.cancel()
        raise
    return errors


def _tell_waiting(runs, results, told):
    """Say which runs another process is training; ``told``: of which ones this was said before."""
    for run in set(runs) - told:
        who = files.held_elsewhere(records.lock(run, results))
        if who is not None:
            told.add(run)
            print(f"{run.id} is being trained by {who}: waiting for its record.")


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
                current.append(f"{run.net} {row[1]:.1f} %")
    bar.set_postfix_str(", ".join(current), refresh=False)
    bar.update(reached - bar.n)


def _last_row(path):
    try:
        fields = path.read_text().rsplit("\n", 2)[-2].split(",")
        return int(fields[0]), float(fields[2])
    except (OSError, ValueError, IndexError):
        return None


@contextlib.contextmanager
def _huge_pages():
    """Have processes started meanwhile ask Linux for huge pages: glibc reads this before anything else runs."""
    name, before = "GLIBC_TUNABLES", os.environ.get("GLIBC_TUNABLES")
    if before is None:
        os.environ[name] = "glibc.malloc.hugetlb=1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]


def _start_worker(pipe):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all: the main process tells when to end
    tune_malloc()
    threading.Thread(target=_end_with, args=(pipe,), daemon=True).start()


def _end_with(pipe):
    """End this worker when its pipe is closed: by an interrupt, or because the process that waits for it is gone.

    What it is training it leaves a checkpoint of.
    """
    with contextlib.suppress(EOFError):
        pipe.recv()
    trainers.STOP.set()
    deadline = time.monotonic() + GRACE_SECONDS
    while trainers.UNDER_WAY.is_set() and time.monotonic() < deadline:
        time.sleep(0.05)
    os._exit(1)
