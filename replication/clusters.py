"""Training on a Dask cluster; its package ``distributed`` is an optional extra."""

import contextlib
import platform
import tempfile
from concurrent.futures import Executor
from pathlib import Path

from replication import data as datasets
from replication.engine import files
from replication.engine.machine import tune_malloc
from replication.trainers import train

WAIT_SECONDS = 10  # for a scheduler to answer
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
        yield _checked(executor._client if isinstance(executor, Executor) else executor)
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
        yield _checked(client)
    finally:
        client.close()


def _checked(client):
    if not client.nthreads():
        print("The cluster has no workers yet: waiting for one.")
    return client


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
