import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import write_images
from test_trainers import assert_same, without_time

from replication import Run, RunsFailedError, clusters, finished, grid, run_all, trainers
from replication.engine import files
from replication.runs import records

SCHEDULE = 0.02  # 22 iterations on digits
WAIT = 60  # seconds


def started(command, folder, **options):
    folder.mkdir(parents=True)
    with (folder / "log").open("w") as log:
        return subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, start_new_session=True, **options)


def until(happened, what):
    deadline = time.monotonic() + WAIT
    while not happened():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


@pytest.fixture
def cluster(tmp_path):
    """A Dask scheduler and two workers of one thread, each started in a folder of its own: address and processes."""
    pytest.importorskip("distributed")
    file, module = tmp_path / "scheduler.json", "distributed.cli"
    common = [sys.executable, "-m"]
    options = ["--no-dashboard", "--host", "127.0.0.1", "--port", "0", "--scheduler-file", str(file)]
    processes = [started([*common, f"{module}.dask_scheduler", *options], tmp_path / "scheduler")]
    until(file.exists, "no scheduler")
    for name in ("first", "second"):
        options = ["--no-nanny", "--no-dashboard", "--nthreads", "1", "--scheduler-file", str(file)]
        processes.append(started([*common, f"{module}.dask_worker", *options], tmp_path / name))
    from distributed import Client

    with Client(scheduler_file=str(file), set_as_default=False) as client:
        client.wait_for_workers(2, timeout=WAIT)
        address = client.scheduler.address
    yield address, processes[1:]
    for process in processes[::-1]:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=WAIT)


def test_a_cluster_gives_the_records_of_this_machine(cluster, tmp_path):
    """Without a common folder: the workers leave nothing in theirs, and the caller writes what they send."""
    address, _ = cluster
    sweep = grid(["plain-8", "resnet-8"], seeds=list(range(3)), schedule=SCHEDULE)
    there = run_all(sweep, tmp_path / "there", executor=address)
    here = [trainers.train(run, tmp_path / "here") for run in sweep]
    assert len(there) == 6
    for one, other in zip(there, here, strict=True):
        assert one.run == other.run
        assert one.folder.is_relative_to(tmp_path / "there")
        assert without_time(one).equals(without_time(other))
        assert one.layers.equals(other.layers)
        assert one.predictions.equals(other.predictions)
        assert {path.name for path in one.folder.iterdir()} == {path.name for path in other.folder.iterdir()}
        assert_same(one, other)
    for worker in ("first", "second"):
        assert not [path for path in (tmp_path / worker).rglob("*") if path.name in ("runs", "results", "summary.json")]


@pytest.mark.long  # what is finished when the last one dies is tested below
def test_a_worker_that_dies_loses_no_run(cluster, tmp_path):
    address, workers = cluster
    sweep = grid(["plain-8", "resnet-8"], seeds=[0, 1, 2], schedule=0.15)
    with ThreadPoolExecutor(1) as beside:
        training = beside.submit(run_all, sweep, tmp_path / "results", executor=address)
        until(lambda: len(list(tmp_path.glob("results/runs/*/summary.json"))) >= 2, "no run was finished")
        workers[0].send_signal(signal.SIGKILL)
        records = training.result(timeout=5 * WAIT)
    assert len(list(tmp_path.glob("results/runs/*/summary.json"))) == 6
    assert [record.run for record in records] == sweep
    assert {record.summary["iterations"] for record in records} == {165}


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(clusters, "QUIET_SECONDS", 1)
    monkeypatch.setattr(clusters, "PATIENCE_SECONDS", 6)


def workers_of(address):
    """How many workers a cluster has."""
    from distributed import Client

    with Client(address, set_as_default=False) as client:
        return len(client.nthreads())


def stop(workers, address, left=0):
    for worker in workers:
        worker.kill()
    until(lambda: workers_of(address) == left, "a worker that was killed is still there")


def test_a_sweep_that_loses_its_last_worker_says_so_and_ends(cluster, tmp_path, impatient, capsys):
    """What was finished is kept."""
    address, workers = cluster
    stop(workers[:1], address, left=1)
    sweep = grid(["resnet-8"], seeds=list(range(4)), schedule=0.3)
    with ThreadPoolExecutor(1) as beside:
        training = beside.submit(run_all, sweep, tmp_path / "results", executor=address)
        until(lambda: list(tmp_path.glob("results/runs/*/summary.json")), "no run was finished")
        workers[1].kill()
        error = training.exception(timeout=WAIT)
    kept = sum(finished(run, tmp_path / "results") is not None for run in sweep)
    assert 1 <= kept < 4
    assert isinstance(error, RunsFailedError)
    assert (
        str(error).count("NoWorkersError: the cluster has had no workers for 0.1 minutes: start one with") == 4 - kept
    )
    assert capsys.readouterr().out.count("The cluster has no workers left: waiting for one, for 0.1 minutes.") == 1


@pytest.mark.long
def test_a_cluster_that_never_has_a_worker_is_waited_for_as_long(cluster, tmp_path, impatient, capsys):
    address, workers = cluster
    stop(workers, address)
    with pytest.raises(clusters.NoWorkersError, match=r"no workers for 0.1 minutes: start one with 'dask scheduler'"):
        run_all([Run("resnet-8")], tmp_path / "results", executor=address)
    assert capsys.readouterr().out == "The cluster has no workers yet: waiting for one, for 0.1 minutes.\n"
    assert not (tmp_path / "results").exists()


LACKING = """
import sys
sys.modules[sys.argv.pop()] = None
from distributed.cli.dask_worker import main
main()
"""


@contextlib.contextmanager
def worker_without(module, address, folder):
    """A third worker, to which that module is missing."""
    options = [address, "--no-nanny", "--no-dashboard", "--nthreads", "1", module]
    process = started([sys.executable, "-c", LACKING, *options], folder)
    until(lambda: workers_of(address) == 3, "no third worker")
    yield
    process.terminate()
    process.wait(timeout=WAIT)


@pytest.mark.parametrize(
    ("module", "late"),
    [
        ("replication", True),
        *(pytest.param(*case, marks=pytest.mark.long) for case in (("replication", False), ("torch", False))),
    ],
)
def test_a_worker_that_lacks_the_package_is_left_out(cluster, tmp_path, capsys, monkeypatch, module, late):
    """Also one that comes when runs have been sent already; without any other, nothing is trained."""
    address, workers = cluster
    results, able = tmp_path / "results", clusters.able
    sweep = grid(["resnet-8"], seeds=list(range(6)), schedule=SCHEDULE)
    with worker_without(module, address, tmp_path / "third"):
        if late:
            looks = iter([clusters.Watch])
            monkeypatch.setattr(clusters, "able", lambda client: next(looks, able)(client))
        assert len(run_all(sweep, results, executor=address)) == 6
        said = capsys.readouterr().out
        assert re.findall(r"The worker (.*) is left out: .*: install '.\[dask\]' of this repository there\.", said)
        monkeypatch.setattr(clusters, "able", able)
        stop(workers, address, left=1)
        with pytest.raises(ValueError, match=r"no worker of the cluster can train: .*: install '.\[dask\]' of this"):
            run_all(sweep, tmp_path / "again", executor=address)
    assert not (tmp_path / "again").exists()


def test_images_are_those_that_the_caller_has(cluster, tmp_path, monkeypatch):
    """A worker finds its images from where it was started; others than the caller's are refused."""
    address, _ = cluster
    write_images(tmp_path / "data" / "pets")
    for worker in ("first", "second"):
        write_images(tmp_path / worker / "data" / "pets")
    monkeypatch.setattr(files, "root", lambda: tmp_path)
    run = Run("resnet-8", "pets", schedule=SCHEDULE / 60)
    (record,) = run_all([run], executor=address)
    assert record.summary["iterations"] == run.settings.iterations
    shutil.rmtree(tmp_path / "results")
    shutil.rmtree(tmp_path / "data")
    run_all([run], executor=address)  # the caller needs none
    shutil.rmtree(tmp_path / "results")
    write_images(tmp_path / "data" / "pets", seed=1)
    with pytest.raises(RunsFailedError, match=r"ValueError: 'pets' in .* holds other images than are here"):
        run_all([run], executor=address)
    assert finished(run) is None


@pytest.mark.parametrize("executor", [7, ["tcp://127.0.0.1:8786"], object])
def test_what_is_no_executor_is_refused(executor, tmp_path):
    with pytest.raises(TypeError, match=r"give a concurrent.futures executor, the address of a Dask scheduler"):
        run_all([Run("resnet-8")], tmp_path, executor=executor)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:9", "nowhere at all", ""])
def test_an_address_where_nobody_answers_is_refused(address, tmp_path, monkeypatch):
    pytest.importorskip("distributed")
    monkeypatch.setattr(clusters, "WAIT_SECONDS", 1)
    with pytest.raises(ValueError, match=r"no Dask scheduler answers there .*start one with 'dask scheduler'"):
        run_all([Run("resnet-8")], tmp_path, executor=address)
    assert list(tmp_path.iterdir()) == []


def test_without_the_extra_a_cluster_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(ValueError, match=r"install '.\[dask\]'"):
        run_all([Run("resnet-8")], tmp_path, executor="tcp://127.0.0.1:8786")


def test_a_run_elsewhere_leaves_nothing_and_gives_its_files(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    run = Run("resnet-8", schedule=SCHEDULE)
    contents = clusters.train_elsewhere(run, "data")
    assert list(tmp_path.iterdir()) == []
    folder = run.folder(tmp_path)
    folder.mkdir(parents=True)
    (folder / "checkpoint.pt").write_bytes(b"of a run that was interrupted here")
    records.keep(run, contents, tmp_path)
    assert finished(run, tmp_path).summary["iterations"] == 22
    assert not (folder / "checkpoint.pt").exists()


def test_a_variable_in_data_is_that_of_the_worker(pets, monkeypatch):
    monkeypatch.setenv("PLACE", str(pets.parent))
    assert clusters.train_elsewhere(Run("resnet-8", "pets", schedule=2e-5), "$PLACE/data")
