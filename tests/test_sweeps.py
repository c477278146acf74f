import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import Here, processes_of, write_images

from replication import Run, RunsFailedError, data, finished, grid, run_all, sweeps, trainers
from replication.engine import machine, workers
from replication.runs import records

SCHEDULE = 0.02  # 22 iterations on digits


@pytest.fixture
def here():
    return Here()


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
    monkeypatch.setattr(machine, "emulates_bfloat16", lambda: True)
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


def kill_the_worker_of(run, results, times):
    """Start a thread that kills the process that trains a run so many times, each time after new rows are written."""
    history, lock = run.folder(results) / "history.csv", records.lock(run, results)

    def watch():
        seen = None
        for _ in range(times):
            while not history.exists() or history.stat().st_mtime_ns == seen:
                time.sleep(0.01)
            seen = history.stat().st_mtime_ns
            os.kill(int(lock.read_text().split()[1]), signal.SIGKILL)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


@pytest.fixture
def started(monkeypatch):
    """Lists the workers that are started."""
    found = []

    class Listed(workers.Worker):
        def __init__(self):
            super().__init__()
            found.append(self)

    monkeypatch.setattr(workers, "Worker", Listed)
    return found


@pytest.mark.long  # the next one needs it, too
def test_the_run_of_a_worker_that_dies_is_tried_again(tmp_path, started):
    runs = [Run("resnet-14", schedule=0.3), Run("resnet-8", schedule=SCHEDULE)]
    killer = kill_the_worker_of(runs[0], tmp_path, times=1)
    result = run_all(runs, tmp_path)
    killer.join()
    assert [record.run for record in result] == runs
    assert sorted(worker.process.returncode for worker in started if worker.process.returncode) == [-signal.SIGKILL]


def test_a_run_that_kills_its_worker_every_time_takes_no_other_along(tmp_path, started):
    deadly, *others = Run("resnet-14", schedule=1.0), *grid(["resnet-14", "plain-14"], seeds=[1], schedule=0.1)
    killer = kill_the_worker_of(deadly, tmp_path, times=2)
    with pytest.raises(
        RunsFailedError, match=f"1 of 3 runs failed.*\n  {deadly.id}: WorkerDiedError: its process was killed"
    ):
        run_all([others[0], deadly, others[1]], tmp_path)
    killer.join()
    assert all(finished(run, tmp_path) for run in others)
    assert [worker.process.returncode for worker in started].count(-signal.SIGKILL) == 2
    assert all(worker.process.returncode in (0, -signal.SIGKILL) for worker in started)


def test_threads_are_no_executor(tmp_path):
    with ThreadPoolExecutor(1) as executor, pytest.raises(TypeError, match="executor: threads cannot train side by"):
        run_all([Run("resnet-8")], tmp_path, executor=executor)
    assert list(tmp_path.iterdir()) == []


SCRIPT = """
import signal
from replication import Run, run_all
signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever the shell that runs the tests does with it
run_all([Run("resnet-20", bn_batch=64)], {results!r}, processes={processes})
"""


@pytest.mark.parametrize(
    ("how", "processes"),
    [(signal.SIGINT, 1), (signal.SIGKILL, 1), pytest.param(signal.SIGKILL, 2, marks=pytest.mark.long)],
)
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
    # A terminal, and Jupyter, send an interrupt to all processes of the caller's group.
    (os.killpg if how is signal.SIGINT else os.kill)(process.pid, how)
    assert process.wait(timeout=20) != 0
    deadline = time.monotonic() + 20
    while processes_of(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not processes_of(process.pid)
    assert (history.parent / "checkpoint.pt").exists() == (processes == 1)
    if how is signal.SIGINT:
        words = "Interrupted: 0 of 1 runs were finished. The same call, or running this cell again, continues with the"
        assert words in output.read_text()
        assert output.read_text().count("KeyboardInterrupt") == 1  # of the caller, none of its workers


UNGUARDED = """
from replication import Run, run_all
print([record.summary["iterations"] for record in run_all([Run("resnet-8", schedule=0.02)] * 2, {results!r})])
"""


@pytest.mark.parametrize(
    "how",
    [["script.py"], pytest.param(["-"], marks=pytest.mark.long), pytest.param(["-i"], marks=pytest.mark.long)],
    ids=["script", "standard input", "REPL"],
)
def test_a_caller_needs_no_guard(how, tmp_path):
    text = UNGUARDED.format(results=str(tmp_path / "results"))
    (tmp_path / "script.py").write_text(text)
    command = [sys.executable, "-W", "error", *how]
    done = subprocess.run(command, input=text, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "[22, 22]" in done.stdout


def test_an_error_of_a_worker_is_told_in_a_line(tmp_path):
    """Also to a caller whose standard input was its script; the traceback is that of the error which run_all raises."""
    blocked = Run("resnet-8", schedule=0.02).folder(tmp_path)
    blocked.parent.mkdir()
    blocked.write_text("a file where the run's folder should be")
    done = subprocess.run(
        [sys.executable, "-"],
        input=UNGUARDED.format(results=str(tmp_path)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("  resnet-8__digits__schedule-0.02__seed-0: FileExistsError: ")
    assert done.stderr.count("Traceback") == 1


def test_a_damaged_record_is_refused_and_the_other_runs_are_trained(tmp_path, here, capsys):
    damaged, other = grid(["resnet-8", "plain-8"], schedule=SCHEDULE)
    path = run_all([damaged], tmp_path, executor=here)[0].folder / "history.csv"
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    words = rf"{damaged.id}: DamagedError: .* history.csv is not what SHA256SUMS says. Remove {path.parent} to train"
    with pytest.raises(RunsFailedError, match=f"1 of 2 runs failed.*\n.*{words}"):
        run_all([damaged, other], tmp_path, executor=here)
    assert finished(other, tmp_path) is not None
    assert path.read_bytes() == content[:-1]  # nothing is written over it
    shutil.rmtree(path.parent)
    assert run_all([damaged], tmp_path, executor=here)[0].summary["iterations"] == 22


@pytest.fixture
def published(tmp_path, monkeypatch, here):
    """A run whose record is published with the repository, and the folder of such records."""
    run = Run("resnet-8", schedule=SCHEDULE)
    run_all([run], tmp_path / "published", executor=here)
    monkeypatch.setattr(records, "PUBLISHED", tmp_path / "published")
    return run, tmp_path / "published"


def test_published_records_are_loaded_and_told_from_ones_own(published, tmp_path, here, capsys):
    run, folder = published
    other, before, results = Run("plain-8", schedule=SCHEDULE), contents(folder), tmp_path / "results"
    loaded, trained = run_all([run, other], results, executor=here)
    assert (loaded.folder, trained.folder) == (run.folder(folder), other.folder(results))
    text = capsys.readouterr().out
    assert "1 run loaded, 1 of them published with this repository; fresh=True trains again." in text
    assert "Training 1 run." in text
    assert contents(folder) == before
    run_all([run, other], results)
    words = "2 runs loaded, 1 of them published with this repository. Nothing had to be trained; fresh=True trains"
    assert capsys.readouterr().out == f"{words} again.\n"


def test_fresh_runs_are_trained_again_and_replace_ones_own(published, tmp_path, here, monkeypatch, capsys):
    run, folder = published
    before, results = contents(folder), tmp_path / "results"
    (record,) = run_all([run], results, executor=here, fresh=True)
    assert record.folder == run.folder(results)
    assert contents(folder) == before
    own = finished(run, results).history
    capsys.readouterr()
    assert finished(run, results).history.equals(run_all([run], results)[0].history)  # one's own comes first
    assert capsys.readouterr().out == "1 run loaded. Nothing had to be trained; fresh=True trains again.\n"
    (again,) = run_all([run], results, executor=here, fresh=True)
    assert not again.history["seconds"].equals(own["seconds"])
    assert again.history.drop(columns="seconds").equals(own.drop(columns="seconds"))
    assert {path.name for path in results.iterdir()} == {"runs", ".locks"}
    # Of an interrupted call all is kept: what was finished, and the record from before.
    other, kept = Run("plain-8", schedule=SCHEDULE), contents(run.folder(results))
    train = trainers.train
    monkeypatch.setattr(trainers, "train", lambda each, *rest: interrupt() if each == other else train(each, *rest))
    with pytest.raises(KeyboardInterrupt):
        run_all([run, other], results, executor=here, fresh=True)
    assert contents(run.folder(results)) == kept
    monkeypatch.setattr(
        trainers, "train", lambda each, *rest: train(each, *rest) if each == other else pytest.fail("again")
    )
    run_all([run, other], results, executor=here, fresh=True)
    assert contents(run.folder(results)) != kept


def interrupt():
    raise KeyboardInterrupt


def test_records_of_other_images_are_refused(pets, tmp_path, here):
    run = Run("resnet-8", "pets", schedule=SCHEDULE / 60)
    run_all([run], tmp_path / "results", pets, executor=here)
    write_images(tmp_path / "other" / "pets", seed=1)
    with pytest.raises(
        ValueError, match=r"was made from other images than 'pets' in .*other now holds: bring these back"
    ):
        run_all([run], tmp_path / "results", tmp_path / "other")
    with pytest.raises(ValueError, match="was made from other images than 'pets'"):  # as python -m replication does
        trainers.train(run, tmp_path / "results", tmp_path / "other")
    assert len(run_all([run], tmp_path / "results", tmp_path / "nothing")) == 1
    assert trainers.train(run, tmp_path / "results", tmp_path / "nothing").run == run


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


def test_the_first_line_says_how_long_it_takes_and_what_shortens_it(pets, here, monkeypatch):
    """12 images in batches of 128: 64,000 iterations are 682,666 epochs."""
    images = {"pets": data.load("pets", pets)}
    runs = grid(["resnet-20"], "pets", [0, 1])
    monkeypatch.setattr(sweeps, "_iteration_seconds", lambda run, size: 0.09)
    seconds = sweeps._estimate(runs, {"pets": (32, 32)}, 2, here)
    assert seconds == pytest.approx(2 * 64_000 * 0.09 / 2)
    line = sweeps._training_line(runs, images, 2, seconds)
    assert line.startswith("Training 2 runs, 2 side by side, about 96 min here. 64,000 iterations are 682,666 epochs")
    assert "of the 12 images of 'pets': schedule 0.1 makes a tenth of them, recipe 'digits' has 1,100" in line
    twice = sweeps._estimate(grid(["resnet-38"], "pets", [0, 1]), {"pets": (32, 32)}, 2, here)
    assert twice / seconds == pytest.approx(2, rel=0.05)  # 38 - 2 = 2 x (20 - 2) layers, nearly all multiply-adds
    short = grid(["resnet-20"], "pets", schedule=0.001)
    assert sweeps._estimate(short, {"pets": (8, 8)}, 1, here) is None
    assert sweeps._training_line(short, images, 1) == "Training 1 run."
    assert sweeps._training_line(grid(["resnet-20"]), {"digits": data.load("digits")}, 1) == "Training 1 run."


def test_an_iteration_is_timed_on_the_net_that_is_trained():
    assert 0 < sweeps._iteration_seconds(Run("resnet-8", bn_batch=64), (8, 8)) < 60


@pytest.mark.parametrize("replaced", [False, True], ids=["first", "replacement"])
def test_a_worker_that_starts_during_an_interrupt_trains_nothing(tmp_path, monkeypatch, replaced):
    """Nor does one that takes the place of another."""
    starting, count = threading.Event(), 1 + replaced

    class Slow(workers.Worker):
        def __init__(self):
            nonlocal count
            super().__init__()
            count -= 1
            if count == 0:
                starting.set()
                while not pool._interrupted:
                    time.sleep(0.01)
                time.sleep(0.1)  # the others are interrupted meanwhile

    monkeypatch.setattr(workers, "Worker", Slow)
    pool, calls = workers.Workers(1), tmp_path / "calls"
    with contextlib.suppress(KeyboardInterrupt), pool:
        future = pool.submit(exec, f"print(file=open({str(calls)!r}, 'a'), flush=True); import os; os._exit(1)")
        assert starting.wait(60)
        raise KeyboardInterrupt
    assert isinstance(future.exception(), workers.WorkerDiedError)
    assert calls.exists() == replaced
    assert not replaced or calls.read_text() == "\n"


def test_an_idle_worker_is_not_called_after_an_interrupt(tmp_path):
    pool, called = workers.Workers(1), tmp_path / "called"
    pool.submit(time.sleep, 0).result()
    pool._interrupted = True
    assert isinstance(pool.submit(called.touch).exception(), workers.WorkerDiedError)
    pool.shutdown()
    assert not called.exists()
