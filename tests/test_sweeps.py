import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import write_images

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


def test_emulated_bfloat16_is_said_before_training(tmp_path, here, monkeypatch, capsys):
    words = "no instructions for bfloat16 (avx512_bf16 or amx_bf16): it is emulated, two to three times slower"
    monkeypatch.setattr(trainers.machine, "emulates_bfloat16", lambda: True)
    runs = grid(["resnet-8", "plain-8"], schedule=SCHEDULE, precision="bfloat16")
    run_all([*runs, Run("resnet-8", schedule=SCHEDULE)], tmp_path, executor=here)
    text = capsys.readouterr().out
    assert text.count(words) == 1
    assert text.index(words) < text.index("Training 3 runs")
    run_all(runs, tmp_path)  # nothing is trained
    run_all([Run("plain-8", schedule=SCHEDULE)], tmp_path, executor=here)
    assert words not in capsys.readouterr().out
    trainers.train(Run("resnet-14", schedule=SCHEDULE, precision="bfloat16"), tmp_path, progress=True)
    assert capsys.readouterr().out.count(words) == 1  # on the command line


def kill_workers_of(run, results, times):
    """Start a thread that kills all workers so many times, each time when the run has written rows anew."""
    history = run.folder(results) / "history.csv"

    def watch():
        seen = None
        for _ in range(times):
            while not history.exists() or history.stat().st_mtime_ns == seen:
                time.sleep(0.01)
            seen = history.stat().st_mtime_ns
            for process in multiprocessing.active_children():
                process.kill()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


@pytest.fixture
def pools(monkeypatch):
    """Counts the pools of processes that are made."""
    made = []
    make = sweeps.ProcessPoolExecutor
    monkeypatch.setattr(sweeps, "ProcessPoolExecutor", lambda *arguments: made.append(make(*arguments)) or made[-1])
    return made


def test_runs_of_a_worker_that_dies_are_tried_again(tmp_path, pools):
    runs = [Run("resnet-14", schedule=0.5), Run("resnet-8", schedule=SCHEDULE)]
    killer = kill_workers_of(runs[0], tmp_path, times=1)
    records = run_all(runs, tmp_path)
    killer.join()
    assert [record.run for record in records] == runs
    assert len(pools) > 1


def test_a_run_that_kills_its_worker_every_time_loses_no_other(tmp_path, pools):
    deadly = Run("resnet-14", schedule=1.0)
    others = grid(["resnet-8", "plain-8"], schedule=SCHEDULE)
    killer = kill_workers_of(deadly, tmp_path, times=2)
    with pytest.raises(RunsFailedError, match=f"1 of 3 runs failed.*\n  {deadly.id}: BrokenProcessPool"):
        run_all([others[0], deadly, others[1]], tmp_path)
    killer.join()
    assert all(finished(run, tmp_path) for run in others)
    assert len(pools) >= 2


SCRIPT = """
import signal
from replication import Run, run_all
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever the shell that runs the tests does with it
    run_all([Run("resnet-20", bn_batch=64)], {results!r}, processes={processes})
"""


def alive(group):
    """Whether any process of a group is left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize(("how", "processes"), [(signal.SIGINT, 1), (signal.SIGKILL, 1), (signal.SIGKILL, 2)])
def test_workers_end_with_the_process_that_waits_for_them(tmp_path, how, processes):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(results=str(tmp_path), processes=processes))
    output = tmp_path / "output"
    with output.open("w") as file:
        process = subprocess.Popen([sys.executable, script], start_new_session=True, stdout=file, stderr=file)
    history = Run("resnet-20", bn_batch=64).folder(tmp_path) / "history.csv"
    while not history.exists():
        assert process.poll() is None
        time.sleep(0.05)
    # A terminal, and Jupyter, send an interrupt to all processes.
    (os.killpg if how is signal.SIGINT else os.kill)(process.pid, how)
    assert process.wait(timeout=20) != 0
    deadline = time.monotonic() + 20
    while alive(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(process.pid)
    assert (history.parent / "checkpoint.pt").exists() == (processes == 1)
    if how is signal.SIGINT:
        said = (
            "Interrupted: 0 of 1 runs were finished. The same call, or running this cell again, goes on with the others"
        )
        assert said in output.read_text()


def test_an_interrupt_ends_the_threads_that_train(tmp_path, here, monkeypatch):
    run = Run("resnet-14", schedule=0.5)
    history = run.folder(tmp_path) / "history.csv"

    def interrupted(*_):
        if history.exists():
            raise KeyboardInterrupt

    monkeypatch.setattr(sweeps, "_show", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_all([run], tmp_path, executor=here)
    assert (history.parent / "checkpoint.pt").exists()
    monkeypatch.undo()
    assert run_all([run], tmp_path, executor=here)[0].summary["iterations"] == 550


def test_records_of_other_images_are_refused(pets, tmp_path, here):
    run = Run("resnet-8", "pets", schedule=SCHEDULE / 60)
    run_all([run], tmp_path / "results", pets, executor=here)
    write_images(tmp_path / "other" / "pets", seed=1)
    with pytest.raises(
        ValueError, match=r"was made from other images than 'pets' in .*other now holds: bring these back"
    ):
        run_all([run], tmp_path / "results", tmp_path / "other")
    assert len(run_all([run], tmp_path / "results", tmp_path / "nothing")) == 1


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
