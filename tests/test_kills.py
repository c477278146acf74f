"""Nothing is lost: training is killed, interrupted and damaged, and ends as if nothing had been."""

import hashlib
import io
import json
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from test_files import without_flock

from replication import Run, RunsFailedError, finished, recipes, run_all, trainers
from replication.engine import checkpoint, files, machine
from replication.runs import environment, recorder, records

SWEEP = [  # with a plateau, a warm-up, groups and held out images
    Run("resnet-8", schedule=0.1, precision="bfloat16", holdout=100),
    Run("plain-14", recipe="note", schedule=2e-4),
    Run("resnet-110", schedule=0.03),
    Run("resnet-14", schedule=0.05, bn_batch=32),
]
SPAWN = multiprocessing.get_context("forkserver")
SPAWN.set_forkserver_preload(["replication", "sklearn.datasets", "sklearn.model_selection", "torch._dynamo"])


@pytest.fixture(scope="module", autouse=True)
def no_process_is_left():
    yield
    multiprocessing.forkserver._forkserver._stop()  # else it lives as long as any process that it ever started
    multiprocessing.resource_tracker._resource_tracker._stop()


def left(run, results):
    """What a run left, by file: SHA-256 of everything but times."""
    record = finished(run, results)
    summary = {name: value for name, value in record.summary.items() if "second" not in name}
    contents = {
        "history": record.history.drop(columns="seconds").to_csv().encode(),
        "summary": json.dumps(summary).encode(),
        **{name: (record.folder / name).read_bytes() for name in ("weights.pt", "layers.csv", "predictions.csv")},
    }
    return {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}


def work(runs, results, data="data", every=0.0, death=None, readers=None, output=None, largest=None):
    """Train in a process of its own, with a checkpoint every so many seconds.

    death: (what, number): at the write of the so manieth checkpoint the process kills itself, "within" it or "between"
    moving the one before away and putting the new one in its place. readers: processes that read photographs.
    output: a file for what is printed, and "trained" for each run that was trained here. largest: bytes that a file may
    have, after which the system refuses to write.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has what it puts in the background ignore it
    recorder.CHECKPOINT_SECONDS = every
    if output is not None:
        sys.stdout = sys.stderr = output.open("w", buffering=1)
        train = trainers._train
        trainers._train = lambda *arguments: print("trained", train(*arguments))
    if readers is not None:
        environment.threads_for = lambda *_: 1
        machine.cores = lambda: readers
        short = replace(recipes.RECIPES["smoke"], iterations=3, batch=4, bn_batch=2)
        recipes.RECIPES["smoke"] = short
    if largest is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
    if death is not None:
        die_at(*death)
    for run in runs:
        trainers.train(run, results, data)


def die_at(what, number):
    """Have the process kill itself by SIGKILL at some file system call of the so manieth checkpoint's write."""
    call = {"within": "fsync", "between": "replace"}[what]
    original, seen = getattr(os, call), []

    def counted(*arguments):
        mine = call == "replace" or os.readlink(f"/proc/self/fd/{arguments[0]}").count("checkpoint.pt")
        if mine and (call == "fsync" or str(arguments[1]).endswith("checkpoint.pt")):
            seen.append(1)
            if len(seen) == number:
                if call == "fsync":
                    os.ftruncate(arguments[0], 1000)  # the rest has not reached the disk yet
                os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments)

    setattr(os, call, counted)


def start(*arguments, **options):
    process = SPAWN.Process(target=work, args=arguments, kwargs=options)
    process.start()
    return process


def test_training_that_is_killed_again_and_again_ends_as_if_it_had_not_been(tmp_path, pytestconfig, capsys):
    kills, chance = pytestconfig.getoption("kills"), random.Random(0)
    undisturbed, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    sweep = [replace(run, seed=seed) for seed in range(-(-kills // 25)) for run in SWEEP]
    process = start(sweep, undisturbed, every=60)
    process.join()
    assert process.exitcode == 0
    seconds = sum(finished(run, undisturbed).summary["seconds"] for run in sweep)
    killed, resumes, parts = {"any time": 0, "within": 0, "between": 0}, 0, 0
    while sum(killed.values()) < kills:
        how = ("any time", "any time", "within", "any time", "between")[sum(killed.values()) % 5]
        begun = {path.parent for path in disturbed.glob("runs/*/checkpoint*.pt")}
        resumes += bool(begun)
        death = None if how == "any time" else (how, chance.randint(1, 4))
        process = start(sweep, disturbed, every=0, death=death)
        # Of 25 kills, each lets training go on for about a fortieth of its time.
        process.join(None if death else chance.uniform(0, 2 * seconds / kills) + 0.1)
        if process.exitcode == 0:
            break
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        killed[how] += 1
        parts += len(list(disturbed.glob("runs/*/*.part")))
    for run in sweep:  # what was finished before its time is killed again from the start, the rest comes to its end
        trainers.train(run, disturbed)
    with capsys.disabled():
        counts = ", ".join(f"{number} {how}" for how, number in killed.items())
        print(
            f"\n{sum(killed.values())} kills ({counts}), {parts} writes cut off, {resumes} resumes of {len(sweep)} runs"
        )
    assert sum(killed.values()) >= kills, "the sweep was over too early"
    assert parts >= killed["within"]
    for run in sweep:
        assert left(run, disturbed) == left(run, undisturbed), run.id
        assert not [path.name for path in run.folder(disturbed).iterdir() if path.suffix == ".part"]
        with capsys.disabled():
            print(f"{run.id}: {left(run, disturbed)['weights.pt'][:16]} = {left(run, undisturbed)['weights.pt'][:16]}")


def run_to_the_end(*arguments, **options):
    process = start(*arguments, **options)
    process.join()
    return process.exitcode


@pytest.mark.long  # with as many it is tested in test_trainers
def test_a_run_goes_on_with_any_number_of_readers(photographs, tmp_path):
    run = Run("resnet-18", "imagenet-small", recipe="smoke", holdout=3)
    assert run_to_the_end([run], tmp_path / "undisturbed", photographs, every=60, readers=1) == 0
    killed = tmp_path / "killed"
    assert run_to_the_end([run], killed, photographs, readers=1, death=("within", 2)) == -signal.SIGKILL
    assert run_to_the_end([run], killed, photographs, readers=2, death=("between", 1)) == -signal.SIGKILL
    assert run_to_the_end([run], killed, photographs, readers=2) == 0
    assert left(run, killed) == left(run, tmp_path / "undisturbed")


def test_of_two_that_want_the_same_run_one_trains_and_the_other_waits(tmp_path):
    run, other = Run("resnet-14", schedule=0.1), Run("plain-8", schedule=0.02)
    outputs = [tmp_path / name for name in ("first", "second", "third")]
    first = start([run], tmp_path / "results", every=60, output=outputs[0])
    while not outputs[0].exists() or not (run.folder(tmp_path / "results") / "environment.json").exists():
        time.sleep(0.01)
    second = start([run], tmp_path / "results", every=60, output=outputs[1])
    assert run_to_the_end([other], tmp_path / "results", every=60, output=outputs[2]) == 0  # is not kept waiting
    first.join()
    second.join()
    said = [path.read_text() for path in outputs]
    assert (first.exitcode, second.exitcode) == (0, 0)
    assert said[0] == said[2] == "trained None\n"
    assert said[1].startswith(f"{run.id} is being trained by process {first.pid} on ")
    assert said[1].endswith(": waiting for it.\n")
    work([run], tmp_path / "alone", every=60)
    assert left(run, tmp_path / "results") == left(run, tmp_path / "alone")


@pytest.mark.long  # that it waits is tested above
def test_a_sweep_says_which_run_it_waits_for(tmp_path, capfd):
    run, results = Run("resnet-14", schedule=0.3), tmp_path / "results"
    first = start([run], results, every=60, output=tmp_path / "first")
    while not (run.folder(results) / "environment.json").exists():
        time.sleep(0.01)
    (record,) = run_all([run], results)
    first.join()
    assert record.summary["iterations"] == 330
    assert f"{run.id} is being trained by process {first.pid} on " in capfd.readouterr().out  # its worker says so
    assert (tmp_path / "first").read_text() == "trained None\n"


def test_a_full_disk_ends_a_run_and_loses_nothing(tmp_path):
    done, run = Run("plain-8", schedule=0.02), Run("resnet-14", schedule=0.02)
    results, output = tmp_path / "results", tmp_path / "output"
    work([done, run], tmp_path / "undisturbed", every=60)
    work([done], results, every=60)
    assert run_to_the_end([run], results, output=output, largest=200_000) == 1
    path = run.folder(results) / "checkpoint.pt"
    assert f"{path} cannot be written (File too large); what was there is untouched" in output.read_text()
    assert left(done, results) == left(done, tmp_path / "undisturbed")
    assert not list(results.glob("runs/*/*.part"))
    work([done, run], results)
    assert left(run, results) == left(run, tmp_path / "undisturbed")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folders of one run: undisturbed, and killed with checkpoints of 20 and 21 of its 22 iterations."""
    run, folder = Run("resnet-8", schedule=0.02), tmp_path_factory.mktemp("trained")
    assert run_to_the_end([run], folder / "undisturbed", every=60) == 0
    assert run_to_the_end([run], folder / "killed", death=("within", 22)) == -signal.SIGKILL
    return run, folder


@pytest.fixture
def killed(trained, tmp_path):
    """The run that was killed, its results, and what it leaves undisturbed."""
    run, folder = trained
    shutil.copytree(folder / "killed", tmp_path / "killed")
    return run, tmp_path / "killed", left(run, folder / "undisturbed")


def flipped(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


DAMAGES = {"flipped": flipped, "cut": lambda content: content[:-1], "empty": lambda content: b""}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(killed, damage, capsys):
    run, results, undisturbed = killed
    last, before = (run.folder(results) / name for name in checkpoint.NAMES)
    assert [stored(path)["iteration"] for path in (last, before)] == [21, 20]
    last.write_bytes(DAMAGES[damage](last.read_bytes()))
    record = trainers.train(run, results)
    notes = [f"{last} is damaged: its checksum is wrong", "resumed from the previous checkpoint, of 20 iterations"]
    assert record.summary["notes"] == notes
    assert all(note in capsys.readouterr().out for note in notes[:1])
    assert same_but_notes(record, undisturbed)
    assert not list(record.folder.glob("checkpoint*"))


def same_but_notes(record, undisturbed):
    found = left(record.run, record.folder.parent.parent)
    return all(found[name] == undisturbed[name] for name in found if name != "summary")


def test_without_a_good_checkpoint_a_run_begins_again_and_says_so(killed):
    run, results, undisturbed = killed
    for name in checkpoint.NAMES:
        path = run.folder(results) / name
        path.write_bytes(flipped(path.read_bytes()))
    record = trainers.train(run, results)
    assert record.summary["notes"][-1] == "no checkpoint was left to resume from: started again"
    assert same_but_notes(record, undisturbed)


def test_damaged_history_and_environment_of_an_unfinished_run_are_made_anew(killed):
    run, results, undisturbed = killed
    for name in ("run.json", "environment.json", "history.csv", "layers.csv"):
        path = run.folder(results) / name
        path.write_bytes(flipped(path.read_bytes()))
    trainers.train(run, results)
    assert left(run, results) == undisturbed


def test_a_damaged_record_stays_as_it_is_until_it_is_removed(killed):
    run, results, undisturbed = killed
    folder = trainers.train(run, results).folder
    path = folder / "history.csv"
    path.write_bytes(flipped(path.read_bytes()))
    before = {each: each.read_bytes() for each in folder.iterdir()}
    for train in (lambda: trainers.train(run, results), lambda: run_all([run], results)):
        with pytest.raises(
            (files.DamagedError, RunsFailedError), match=f"history.csv is not .*Remove {folder} to train"
        ):
            train()
    assert {each: each.read_bytes() for each in folder.iterdir()} == before
    shutil.rmtree(folder)
    trainers.train(run, results)
    assert left(run, results) == undisturbed


class Hostile:
    """What executes code when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("hostile",)


@pytest.mark.parametrize("content", [pickle.dumps(Hostile()), b"something else", b""], ids=["pickle", "text", "empty"])
def test_a_hostile_checkpoint_is_an_error_and_executes_nothing(killed, content, monkeypatch, tmp_path):
    run, results, _ = killed
    monkeypatch.chdir(tmp_path)
    packed = io.BytesIO()
    torch.save(Hostile(), packed)
    for each in (content, packed.getvalue()):
        files.write_sealed(run.folder(results) / "checkpoint.pt", each)
        with pytest.raises(
            ValueError, match=r"checkpoint.pt is no checkpoint of this version of the code .*remove .* to"
        ):
            trainers.train(run, results)
    assert not (tmp_path / "hostile").exists()
    pickle.loads(pickle.dumps(Hostile()))  # it would have
    assert (tmp_path / "hostile").exists()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"version": 0}, "by another version of the code, whose results differ: go on with that"),
        ({"recipe": "Recipe()"}, "with another recipe"),
        ({"run": {}}, "for another run"),
        ({"fingerprint": "f"}, "from other images than 'digits' now holds"),
    ],
)
def test_a_stale_checkpoint_is_refused(killed, changed, message):
    run, results, _ = killed
    path = run.folder(results) / "checkpoint.pt"
    state, packed = stored(path), io.BytesIO()
    torch.save(state | changed, packed)
    files.write_sealed(path, packed.getvalue())
    with pytest.raises(ValueError, match=f"checkpoint.pt was made {message}.*, or remove .* to begin again"):
        trainers.train(run, results)


def test_a_run_that_goes_on_elsewhere_says_so(killed):
    run, results, undisturbed = killed
    path = run.folder(results) / "checkpoint.pt"
    state, packed = stored(path), io.BytesIO()
    begun = {"torch": "2.11.0", "processor": "another"}
    state["environment"] |= begun
    torch.save(state, packed)
    files.write_sealed(path, packed.getvalue())
    record = trainers.train(run, results)
    said = "started with torch 2.11.0, processor another, resumed after 21 iterations with others"
    assert record.summary["notes"] == [said]
    assert record.environment["begun"] == begun
    assert record.environment["torch"] == str(torch.__version__)
    assert record.hardware.startswith("another, ")
    assert ", then " in record.hardware
    assert same_but_notes(record, undisturbed)


def test_a_run_that_was_begun_on_a_gpu_goes_on_with_the_threads_of_this_machine(killed):
    run, results, _ = killed
    path = run.folder(results) / "checkpoint.pt"
    state, packed = stored(path), io.BytesIO()
    state["environment"]["device"], state["threads"] = "a GPU", 6
    torch.save(state, packed)
    files.write_sealed(path, packed.getvalue())
    record = trainers.train(run, results)
    assert record.environment["threads"] == 1
    assert record.begun["device"] == "a GPU"
    assert record.hardware.startswith("a GPU, then ")


def stored(path):
    return torch.load(io.BytesIO(files.read_sealed(path)), weights_only=True)


def test_an_interrupt_leaves_a_checkpoint_and_says_how_to_go_on(tmp_path):
    run, results, output = Run("resnet-14", schedule=0.12), tmp_path / "results", tmp_path / "output"
    process = start([run], results, every=60, output=output)
    while not (run.folder(results) / "history.csv").exists():
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    process.join()
    assert process.exitcode != 0
    reached = stored(run.folder(results) / "checkpoint.pt")["iteration"]
    assert 0 < reached < 132
    said = (
        f"{run.id} was interrupted after {reached} of 132 iterations. The same call resumes from there: a checkpoint is"
    )
    assert said in output.read_text()
    work([run], results, every=60)
    work([run], tmp_path / "undisturbed", every=60)
    assert left(run, results) == left(run, tmp_path / "undisturbed")


TRAINING = """
import sys
from replication import Run, run_all, trainers
run, results = Run("resnet-8", schedule=0.1), sys.argv[2]
print([trainers.train(run, results)] if sys.argv[1] == "train" else run_all([run], results))
"""


def test_without_flock_a_killed_training_hinders_nobody(tmp_path):
    """Neither the next call nor its own: a sweep replaces its worker."""
    run, results, dead = Run("resnet-8", schedule=0.1), tmp_path / "results", None
    flockless = without_flock(tmp_path)
    for call in ("train", "sweep"):
        process = subprocess.Popen([sys.executable, "-c", TRAINING, call, results], env=flockless)
        while (trainer := trainer_of(run, results)) in (None, dead):
            assert process.poll() is None
            time.sleep(0.01)
        os.kill(trainer, signal.SIGKILL)
        assert process.wait() == {"train": -signal.SIGKILL, "sweep": 0}[call]
        dead = trainer
    assert finished(run, results).summary["iterations"] == 110


def trainer_of(run, results):
    """The process that trains a run, or did; None before there is one."""
    try:
        return int(records.lock(run, results).read_text().split()[1])
    except (FileNotFoundError, IndexError):
        return None
