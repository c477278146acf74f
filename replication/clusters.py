"""Training on a Dask cluster; its package ``distributed`` is an optional extra."""

import contextlib
import pickle
import platform
import tempfile
import time
from concurrent.futures import Executor
from pathlib import Path

from replication import data as datasets
from replication.engine import files
from replication.engine.machine import tune_malloc
from replication.trainers import train

WAIT_SECONDS = 10  # for a scheduler to answer
QUIET_SECONDS = 5  # without a worker, before saying so
PATIENCE_SECONDS = 3600  # for a worker to come, or to come back
POLL_SECONDS = 0.5
RETRY = "start one with 'dask scheduler', workers with 'dask worker <address> --nthreads 1 --memory-limit 0'"


def is_one(executor):
    """Whether an executor is a cluster: an address, a Dask client or its executor.

    Raises TypeError for anything that is no executor, ValueError for text that is no address.
    """
    if isinstance(executor, str) and ":" not in executor:  # for an empty one, Dask would start a cluster of its own
        problem = "it is no address such as 'tcp://10.0.0.5:8786'"
        raise ValueError(f"executor {executor!r}: no Dask scheduler answers there ({problem}): {RETRY}")
    if executor is None or isinstance(executor, Executor):
        return type(executor).__module__ == "distributed.cfexecutor"
    if isinstance(executor, str) or type(executor).__module__ == "distributed.client":
        return True
    raise TypeError(
        f"executor {executor!r}: give a concurrent.futures executor, the address of a Dask scheduler such as "
        "'tcp://10.0.0.5:8786' or a Dask client, or leave it out to train on this machine"
    )


@contextlib.contextmanager
def connected(executor):
    """The client of a cluster given by an address, a Dask client or its executor. One made here is closed at the end.

    Raises ValueError when ``distributed`` is not installed or no scheduler answers.
    """
    if not isinstance(executor, str):
        yield executor._client if isinstance(executor, Executor) else executor
        return
    try:
        from distributed import Client
    except ImportError as error:
        raise ValueError(f"executor {executor!r}: for a Dask cluster install '.[dask]' ({error})") from error
    try:
        client = Client(executor, timeout=WAIT_SECONDS, set_as_default=False)
    except (OSError, ValueError, TypeError, ImportError) as error:
        raise ValueError(f"executor {executor!r}: no Dask scheduler answers there ({error}): {RETRY}") from error
    try:
        yield client
    finally:
        client.close()


class NoWorkersError(OSError):
    """A cluster has had no worker for too long."""


class Watch:
    """Looks for the workers of a cluster, or for those that are left of ``among``, a list of addresses.

    A call gives their addresses. Without any it says so after ``QUIET_SECONDS``, once, and raises NoWorkersError after
    ``PATIENCE_SECONDS``.
    """

    def __init__(self, client):
        self.client, self.among, self.seen, self.said, self.when = client, None, time.monotonic(), False, "yet"

    def __call__(self):
        workers, now, patience = [], time.monotonic(), f"{PATIENCE_SECONDS / 60:g} minutes"
        with contextlib.suppress(OSError):  # without its scheduler, a client ends by itself
            workers = [worker for worker in self.client.nthreads() if self.among is None or worker in self.among]
        if workers:
            self.seen, self.said, self.when = now, False, "left"
        elif now > self.seen + PATIENCE_SECONDS:
            raise NoWorkersError(
                f"the cluster has had no workers for {patience}: {RETRY}, and make the same call again"
            )
        elif now > self.seen + QUIET_SECONDS and not self.said:
            self.said = True
            print(f"The cluster has no workers {self.when}: waiting for one, for {patience}.", flush=True)
        return workers


def able(client):
    """A ``Watch`` of the workers that have this package; waits for the first, and says which others have not.

    Raises NoWorkersError, and ValueError when there are workers but none has the package.
    """
    watch = Watch(client)
    while not watch():
        time.sleep(POLL_SECONDS)
    answers = client.run(portable(tune_malloc), on_error="return")
    lacking = {worker: error for worker, error in answers.items() if isinstance(error, ImportError)}
    if lacking:
        watch.among = [worker for worker in answers if worker not in lacking]
        if not watch.among:
            raise ValueError(f"no worker of the cluster can train: {next(iter(lacking.values()))}")
        for worker, error in lacking.items():
            print(f"The worker {worker} is left out: {error}.", flush=True)
    return watch


def portable(function):
    """The same function, for workers that may lack this package: there it raises ImportError.

    Dask sends a function within a function by its code, others by their names, which would end such a worker.
    """
    content = pickle.dumps(function)

    def call():
        try:
            function = pickle.loads(content)
        except ImportError as error:
            raise ImportError(f"{error} on {platform.node()}: install '.[dask]' of this repository there") from None
        return function()

    return call


def train_elsewhere(run, data, fingerprint=None):
    """Train a run in a temporary folder and return the files of its record and its weights: {name: bytes}.

    For cluster workers, which share no folder with the caller; a relative ``data`` starts from where they were started.
    Raises as ``train`` does, and ValueError for other images than those of the fingerprint.
    """
    tune_malloc()
    data = Path(files.expanded("data", data)).absolute()
    if fingerprint not in (None, datasets.load(run.dataset, data, progress=False).fingerprint):
        raise ValueError(
            f"{run.dataset!r} in {data} on {platform.node()} holds other images than are here: put the same ones there"
        )
    with tempfile.TemporaryDirectory(prefix="replication-") as results:
        folder = train(run, results, data).folder
        return {path.name: path.read_bytes() for path in folder.iterdir()}
