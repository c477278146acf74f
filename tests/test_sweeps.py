import multiprocessing
import os
import shutil
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from replication import Run, RunsFailedError, finished, grid, run_all, sweeps, trainers

SCHEDULE = 0.02  # 22 iterations on digits


@pytest.fixture
def here():
    """An executor that trains in this process: no time is lost in starting others."""
    with ThreadPoolExecutor(1) as executor:
        yield executor


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_records_come_in_order_and_are_loaded_the_second_time(pets, tmp_path, monkeypatch):
    runs = grid(["resnet-8", "plain-8"], "pets", [1, 0], schedule=SCHEDULE / 60)
    records = run_all([*runs, runs[0]], tmp_path / "results", pets)
    assert [record.run for record in records] == [*runs, runs[0]]
    assert len(list((tmp_path / "results" / "runs").iterdir())) == 4
    before = contents(tmp_path / "results")
    shutil.rmtree(pets)  # neither data nor training is needed any more
    monkeypatch.setattr(trainers, "train", lambda *_: pytest.fail("trained again"))
    again = run_all(runs, tmp_path / "results", pets)
    assert [record.summary for record in again] == [record.summary for record in records[:4]]
    assert contents(tmp_path / "results") == before


def test_processes_and_executors_give_the_same_results(tmp_path, here):
    runs = grid(["resnet-8", "plain-8"], schedule=SCHEDULE)
    by_processes = run_all(runs, tmp_path / "processes")
    by_executor = run_all(runs, tmp_path / "executor", executor=here)
    for one, other in zip(by_processes, by_executor, strict=True):
        assert one.history.drop(columns="seconds").equals(other.history.drop(columns="seconds"))


def test_one_failing_run_loses_no_other(tmp_path, here):
    runs = grid(["resnet-8", "plain-8", "resnet-14"], schedule=SCHEDULE)
    blocked = runs[1].folder(tmp_path)
    blocked.parent.mkdir()
    blocked.write_text("a file where the run's folder should be")
    with pytest.raises(RunsFailedError, match=f"1 of 3 runs failed.*\n  {runs[1].id}: FileExistsError"):
        run_all(runs, tmp_path, executor=here)
    assert [finished(run, tmp_path) is None for run in runs] == [False, True, False]
    blocked.unlink()
    assert len(run_all(runs, tmp_path, executor=here)) == 3


def test_runs_of_a_worker_that_dies_are_tried_again(tmp_path):
    runs = grid(["resnet-8", "plain-8", "resnet-14"], schedule=0.05)
    killed = []

    def kill_one():
        while not list(tmp_path.glob("runs/*/history.csv")):
            time.sleep(0.01)
        victim = multiprocessing.active_children()[0]
        killed.append(victim.pid)
        os.kill(victim.pid, signal.SIGKILL)

    killer = threading.Thread(target=kill_one)
    killer.start()
    records = run_all(runs, tmp_path)
    killer.join()
    assert killed
    assert [record.run for record in records] == runs
    assert all(record.summary["iterations"] == 55 for record in records)


@pytest.mark.parametrize(
    ("runs", "error", "message"),
    [
        (["resnet-20"], TypeError, "'resnet-20' is no Run"),
        ([Run("resnet-20"), Run("resnet-20", "digit")], ValueError, "did you mean 'digits'"),
        ([Run("resnet-20", holdout=1437)], ValueError, "holdout 1437"),
    ],
)
def test_bad_input_fails_before_anything_is_written(tmp_path, runs, error, message):
    with pytest.raises(error, match=message):
        run_all(runs, tmp_path / "results", tmp_path / "data")
    assert list(tmp_path.iterdir()) == []


def test_progress_is_read_from_the_histories(tmp_path, here):
    run = Run("resnet-8", schedule=SCHEDULE)
    history = run.folder(tmp_path) / "history.csv"
    assert sweeps._last_row(history) is None
    record = run_all([run], tmp_path, executor=here)[0]
    assert sweeps._last_row(history) == (22, record.summary["train_error"])
