"""Many runs: what is finished is loaded, the rest is trained side by side."""

import contextlib
import ctypes
import multiprocessing
import os
import threading
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, ProcessPoolExecutor, wait
from pathlib import Path

import torch

from replication import data as datasets
from replication import trainers
from replication.images import cores, progress_bar
from replication.runs import Run, finished

POLL_SECONDS = 0.5


class RunsFailedError(RuntimeError):
    """Some runs failed; those that did not are finished and will be loaded when asked for again."""


def run_all(runs, results="results", data="data", executor=None, processes=1):
    """Train what is missing, load what is finished: a list of records in the order of ``runs``.

    Runs are trained in processes of their own, as many side by side as the cores allow; or on ``executor``, any
    ``concurrent.futures`` executor whose workers see the same folders. With ``processes``, runs are trained one after
    the other, each by that many processes that share its batches. Finished runs need neither data nor training.
    A progress bar shows iterations and current training errors. In a script, call this under
    ``if __name__ == "__main__":``, since the processes that train import the script.

    Raises TypeError or ValueError before anything is trained or written when an entry is no ``Run``, a data set cannot
    be loaded, ``processes`` cannot share a batch, or a finished run was made from other images than are there now;
    RunsFailedError, naming each failed run and its error, after all others are finished.
    """
    runs = list(runs)
    for run in runs:
        if not isinstance(run, Run):
            raise TypeError(f"{run!r} is no Run: make one with Run(net, dataset, ...)")
        trainers.check_processes(run, processes)
    trainers.check_devices(processes)
    if processes > 1 and executor is not None:
        raise ValueError(
            f"processes {processes}: an executor's workers train in one process each, leave one of the two"
        )
    results, data = Path(results).absolute(), Path(data).absolute()
    done = {run: finished(run, results) for run in runs}
    _check_data([record for record in done.values() if record is not None], data)
    missing = [run for run, record in done.items() if record is None]
    if missing:
        _train(missing, results, data, executor, processes)
    records = [finished(run, results) for run in runs]
    for record in dict(zip(runs, records, strict=True)).values():
        if record.summary.get("unreadable"):
            print(
                f"{record.run.id}: {record.summary['unreadable']} unreadable files, see {record.folder}/unreadable.txt"
            )
    return records


def _check_data(records, data):
    """Refuse records of other images than are here now; where there are none, the records stand for themselves."""
    for name in dict.fromkeys(record.run.dataset for record in records):
        if not datasets.present(name, data):
            continue
        dataset = datasets.load(name, data)
        if not len(dataset.train.labels):
            continue  # photographs for tests alone
        fingerprint = dataset.fingerprint
        for record in records:
            if record.run.dataset == name and record.fingerprint != fingerprint:
                raise ValueError(
                    f"{record.folder} was made from other images than {name!r} in {data} now holds: bring these back, "
                    "give the new images another name, or remove the record"
                )


def _train(runs, results, data, executor, processes):
    # Loaded here first, so that bad data fails at once and the workers find it downloaded and decoded.
    loaded = {name: datasets.load(name, data) for name in dict.fromkeys(run.dataset for run in runs)}
    for name, count, unreadable in dict.fromkeys((run.dataset, run.holdout, run.unreadable) for run in runs):
        loaded[name].hold_out(count).unreadable(unreadable)
    sizes = {name: dataset.size for name, dataset in loaded.items()}
    del loaded
    costs = {run: trainers.cost(run, sizes[run.dataset]) * run.settings.iterations for run in runs}
    runs = sorted(runs, key=costs.get, reverse=True)  # the longest first: none is left running alone at the end
    total = sum(run.settings.iterations for run in runs)
    with progress_bar(total, _title(runs), "iterations") as bar:
        if executor is not None:
            errors = _follow(_submit(executor, runs, results, data), results, bar)
        else:
            threads = max(trainers.threads_for(run, sizes[run.dataset]) for run in runs)
            alone = torch.cuda.is_available() or processes > 1
            workers = 1 if alone else min(len(runs), max(1, cores() // threads))
            errors = _train_locally(runs, results, data, processes, workers, bar)
    if errors:
        listing = "\n".join(f"  {run.id}: {type(error).__name__}: {error}" for run, error in errors.items())
        raise RunsFailedError(
            f"{len(errors)} of {len(runs)} runs failed, the others are finished and are not trained again:\n{listing}"
        ) from next(iter(errors.values()))


def _train_locally(runs, results, data, processes, workers, bar):
    errors = _train_in_pool(runs, results, data, processes, workers, bar)
    for run in [run for run, error in errors.items() if isinstance(error, BrokenExecutor)]:
        # A worker that dies takes its pool along, with runs that are none the worse: each is tried again by itself.
        del errors[run]
        errors |= _train_in_pool([run], results, data, processes, 1, bar)
    return errors


def _train_in_pool(runs, results, data, processes, workers, bar):
    context = multiprocessing.get_context("spawn")
    theirs, ours = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(workers, context, _start_worker, (theirs,))
    try:
        with _huge_pages():
            futures = _submit(pool, runs, results, data, processes)
        return _follow(futures, results, bar)
    except BaseException:
        ours.close()  # an interrupt waits for no training: the workers end at once, their checkpoints stay
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        ours.close()
        theirs.close()


def _submit(executor, runs, results, data, processes=1):
    return {executor.submit(trainers.train, run, results, data, processes): run for run in runs}


def _follow(futures, results, bar):
    """Wait for the runs, show how far they are, return the error of each that failed."""
    errors, left = {}, set(futures)
    while left:
        done, left = wait(left, timeout=POLL_SECONDS, return_when=FIRST_COMPLETED)
        for future in done:
            if future.exception() is not None:
                errors[futures[future]] = future.exception()
        _show(futures.values(), results, bar)
    return errors


def _show(runs, results, bar):
    """Read progress from the histories, which every worker writes as it goes."""
    reached, current = 0, []
    for run in runs:
        row = _last_row(run.folder(results) / "history.csv")
        if row is not None:
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


def _title(runs):
    return runs[0].id if len(runs) == 1 else f"{len(runs)} runs"


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
    _keep_memory()
    threading.Thread(target=_end_with, args=(pipe,), daemon=True).start()


def _end_with(pipe):
    """End this worker when its pipe is closed: by an interrupt, or because the process that waits for it is gone."""
    with contextlib.suppress(EOFError):
        pipe.recv()
    os._exit(1)


def _keep_memory():
    """Have glibc keep the freed blocks of a step for the next one instead of returning them to the system."""
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return  # another C library
    for option, value in ((-3, 1 << 30), (-1, 2**31 - 1), (-2, 1 << 28)):  # mmap threshold, trim threshold, top pad
        mallopt(option, value)
