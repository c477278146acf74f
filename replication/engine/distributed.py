"""Several processes that train one run together, on one machine or many, by torch's own engine."""

import contextlib
import datetime
import os
import time
import uuid
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from replication.engine import files

WAIT_FOR_OTHERS = datetime.timedelta(hours=12)  # while one process of a machine reads all images for their mean
MAX_RESTARTS = 3  # of all processes of a run, each time that one of them dies


class Ranks(NamedTuple):
    """The processes that train a run together: this one's number and their count, overall and on this machine."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1

    def gather(self, value):
        """The values of all processes, in the order of their ranks."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value)
        return values


def check_alike(ranks, folder, seen):
    """Raise ValueError unless all processes have the same values in ``seen``, {what: value}, and the same folder."""
    mark = folder / "alike.part"
    (name, *_) = ranks.gather(uuid.uuid4().hex)
    if ranks.rank == 0:
        files.write(mark, name)
    dist.barrier()
    deadline = time.monotonic() + 60  # a network file system may show a new file late
    while not mark.exists() and time.monotonic() < deadline:
        time.sleep(0.5)
    for what, value in {**seen, "folders of results": mark.read_text() if mark.exists() else None}.items():
        values = ranks.gather(value)
        if len(set(values)) > 1:
            raise ValueError(
                f"{folder.name}: its processes see different {what} ({', '.join(map(str, values))}): on all machines "
                "give the same options, the same images, and a folder of results that all of them see"
            )
    if ranks.rank == 0:
        mark.unlink(missing_ok=True)


@contextlib.contextmanager
def members():
    """The ``Ranks`` of this process: as torchrun started it, or those of a single process."""
    if not dist.is_torchelastic_launched():
        yield Ranks()
        return
    local_rank = int(os.environ["LOCAL_RANK"])
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
    store, rank, count = next(dist.rendezvous("env://", timeout=WAIT_FOR_OTHERS))
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    meeting = dist.PrefixStore(_meet(store, rank, count), store)
    dist.init_process_group(backend, store=meeting, rank=rank, world_size=count)
    try:
        yield Ranks(rank, count, local_rank, int(os.environ["LOCAL_WORLD_SIZE"]))
    finally:
        dist.destroy_process_group()


def _meet(store, rank, count):
    """A new name that the processes now alive agree on.

    After a restart torchrun's store still holds the addresses of the previous processes; a process that reads one of
    them waits for the dead (pytorch issue 135712). A question with a unique name has no stale answer.
    """
    if rank:
        question = uuid.uuid4().hex
        store.set(f"question of {rank}", question)
        name = store.get(f"answer to {question}").decode()
        store.set(f"{name} {rank}", "is here")
        return name
    name, absent, deadline = uuid.uuid4().hex, set(range(1, count)), time.monotonic() + WAIT_FOR_OTHERS.total_seconds()
    while absent:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{len(absent)} of {count} processes did not come within {WAIT_FOR_OTHERS}")
        for other in absent:
            if store.check([f"question of {other}"]):
                store.set(f"answer to {store.get(f'question of {other}').decode()}", name)
        absent = {other for other in absent if not store.check([f"{name} {other}"])}
        time.sleep(0.02)
    return name


def launch(function, arguments, processes, name):
    """Call ``function(*arguments)`` in several processes of this machine, which train together.

    Torch's elastic engine watches them: if one fails, all are started again, up to ``MAX_RESTARTS`` times.
    Raises RuntimeError, with the error of the first process to fail, when they fail once more.
    """
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=name,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=MAX_RESTARTS,
    )
    try:
        elastic_launch(config, function)(*arguments)
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        message = failure.message["message"] if isinstance(failure.message, dict) else failure.message
        raise RuntimeError(f"{name}: its processes failed {MAX_RESTARTS + 1} times; the last: {message}") from error
