"""Many runs: what is finished is loaded, the rest is trained side by side."""

import contextlib
import shutil
from collections.abc import Iterable
from concurrent.futures import FIRST_COMPLETED, CancelledError, ThreadPoolExecutor, wait

import torch

from replication import clusters, trainers
from replication import data as datasets
from replication.engine import files
from replication.engine.files import DamagedError
from replication.engine.machine import cores
from replication.engine.progress import progress_bar
from replication.engine.workers import WorkerError, Workers
from replication.runs import Run, records
from replication.runs.environment import check_devices, check_processes, cost, threads_for, warn_of_precision

POLL_SECONDS = 0.5
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
      another. The bar counts runs when they are finished.
    - any other ``concurrent.futures`` executor whose workers are processes that see the same folders.

    With ``processes``, runs are trained one after the other, each by that many processes that share its batches.
    A progress bar shows iterations, current training errors and the time left. A run that another process is training
    is waited for. A run that diverged is finished: its record says so. An interrupt leaves checkpoints of what is being
    trained on this machine: the same call resumes from them.

    Raises TypeError or ValueError before anything is trained or written when an entry is no ``Run``, a folder cannot be
    one, a data set cannot be loaded, ``processes`` cannot share a batch, a finished run was made from other images than
    are there now or by other code, or no Dask scheduler answers; RunsFailedError, naming each failed run and its error,
    after all others are finished. A damaged record fails its run: nothing is trained over it.
    """
    runs, on_cluster = _as_list(runs), clusters.is_one(executor)
    results, here = files.folder("results", results), files.folder("data", data)
    _check_options(runs, executor, processes, fresh)
    folder = results / ".fresh" if fresh else results  # until the last is finished
    finished, errors = _find_finished(runs, folder, records.finished if fresh else records.finished_or_published)
    _check_images(finished.values(), here)
    missing = [run for run in dict.fromkeys(runs) if run not in finished and run not in errors]
    if finished and not fresh:
        print(_loading_line(finished.values()))
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


def _loading_line(finished):
    published = sum(records.is_published(record) for record in finished)
    origin = f", {published} of them published with this repository" if published else ""
    return f"{len(finished)} run{'s' * (len(finished) > 1)} loaded{origin}; fresh=True trains again."


def _check_images(finished, data):
    """Refuse records of other images than are here now; where there are none, the records stand for themselves."""
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
    sizes = {name: dataset.size for name, dataset in _load(runs, data).items()}
    runs, lanes = _longest_first(runs, sizes), lanes_for(runs, sizes, processes)
    print(_training_line(runs, lanes if executor is None else 1))
    with _bar(runs) as bar, Workers(lanes) if executor is None else contextlib.nullcontext(executor) as pool:
        return _follow({pool.submit(trainers.train, run, results, data, processes): run for run in runs}, results, bar)


def _train_there(runs, results, data, here, client):
    """Train on the workers of a cluster, and write here what they send; {run: error} of those that failed."""
    images = _load([run for run in runs if datasets.present(run.dataset, here)], here)
    sizes = {run.dataset: UNKNOWN_SIZE[datasets.is_imagenet(run.dataset)] for run in runs}
    runs = _longest_first(runs, sizes | {name: dataset.size for name, dataset in images.items()})
    prints = {name: dataset.fingerprint for name, dataset in images.items()}
    print(_training_line(runs, min(len(client.nthreads()), len(runs))))
    pool = client.get_executor(pure=False)  # every call is a new one
    with _bar(runs) as bar:
        futures = {pool.submit(clusters.train_elsewhere, run, str(data), prints.get(run.dataset)): run for run in runs}
        return _follow(futures, results, bar, lambda run, contents: records.keep(run, contents, results))


def _training_line(runs, lanes):
    return f"Training {len(runs)} run{'s' * (len(runs) > 1)}{f', {lanes} side by side' if lanes > 1 else ''}."


def _bar(runs):
    total = sum(run.settings.iterations for run in runs)
    return progress_bar(total, runs[0].id if len(runs) == 1 else f"{len(runs)} runs", "iterations")


def _follow(futures, results, bar, keep=lambda run, value: None):
    """Wait for the runs, show how far they are, ``keep`` what they return; {run: error} of those that failed."""
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
    except BaseException:
        for future in left:  # what has not started will not
            future.cancel()
        raise
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
                current.append(f"{run.net} {row[1]:.1f} %")
    bar.set_postfix_str(", ".join(current), refresh=False)
    bar.update(reached - bar.n)


def _last_row(path):
    try:
        fields = path.read_text().rsplit("\n", 2)[-2].split(",")
        return int(fields[0]), float(fields[2])
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
