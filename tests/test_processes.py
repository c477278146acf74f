"""Batches in groups, and runs that several processes share by torch's own engine."""

import contextlib
import copy
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import termios
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from replication import Run, data, finished, models, recipes, run_all, trainers
from replication.__main__ import main
from replication.engine import files, machine
from replication.engine.workers import says_all
from replication.runs import divisors

SCHEDULE = 0.02  # 22 iterations on digits


def weights(record):
    return torch.load(record.folder / "weights.pt", weights_only=True)


def rows(record):
    return record.history.drop(columns="seconds")


def assert_identical(one, other):
    assert rows(one).equals(rows(other))
    assert all(torch.equal(value, weights(other)[name]) for name, value in weights(one).items())


def test_groups_are_normalized_one_by_one_and_their_gradients_averaged(tmp_path):
    """Two iterations of four groups, written out here on nets of their own, one for each group."""
    run = Run("resnet-8", schedule=2 / 1100, bn_batch=32)
    record = trainers.train(run, tmp_path)
    digits = data.load("digits")
    batches = data.Batches(digits, 128, seed=0)
    torch.manual_seed(0)
    net = models.cifar_net(8)
    velocity = [torch.zeros_like(parameter) for parameter in net.parameters()]
    for iteration, rate in enumerate([0.1, 0.01]):  # of two iterations the second is behind half of them
        images, labels = batches(iteration)
        copies = [copy.deepcopy(net) for _ in range(4)]
        losses = [
            F.cross_entropy(copied(images[start : start + 32].contiguous()), labels[start : start + 32])
            for copied, start in zip(copies, (0, 32, 64, 96), strict=True)
        ]
        for loss in losses:
            loss.backward()
        with torch.no_grad():
            of_copies = zip(*[list(copied.parameters()) for copied in copies], strict=True)
            for parameter, parts, speed in zip(net.parameters(), of_copies, velocity, strict=True):
                gradient = torch.stack([part.grad for part in parts]).mean(0)
                speed.mul_(0.9).add_(gradient + 1e-4 * parameter)
                parameter -= rate * speed
            for buffer, *parts in zip(net.buffers(), *[copied.buffers() for copied in copies], strict=True):
                buffer.copy_(torch.stack(parts).float().mean(0))
        assert record.history["train_loss"][iteration] == pytest.approx(torch.stack(losses).mean().item(), rel=1e-4)
    for name, value in weights(record).items():
        counted = name.endswith("num_batches_tracked")  # by the trainer, not by batch norm
        expected = torch.tensor(2) if counted else net.state_dict()[name]
        torch.testing.assert_close(value, expected, rtol=1e-3, atol=1e-5, msg=name)


def test_one_group_of_the_whole_batch_is_the_run_itself():
    assert Run("resnet-8", bn_batch=128) == Run("resnet-8")
    assert Run("resnet-8", bn_batch=128).id == "resnet-8__digits__seed-0"
    assert Run("resnet-8", bn_batch=64).id == "resnet-8__digits__group-64__seed-0"
    assert Run("resnet-18", "imagenet").settings.bn_batch == 32
    assert Run("resnet-18", "imagenet", bn_batch=256).settings.bn_batch == 256


@pytest.mark.parametrize("bn_batch", [0, 48, 256, -1])
def test_bn_batch_divides_the_batch(bn_batch):
    with pytest.raises(ValueError, match=f"bn_batch {bn_batch}: choose"):
        Run("resnet-8", bn_batch=bn_batch)


def test_two_processes_give_the_weights_of_one(tmp_path):
    run = Run("resnet-8", schedule=4 / 1100, bn_batch=32, holdout=100)
    alone = trainers.train(run, tmp_path / "alone")
    (shared,) = run_all([run], tmp_path / "shared", processes=2)
    assert (alone.environment["processes"], shared.environment["processes"]) == (1, 2)
    assert len(rows(alone)) == len(rows(shared)) == 4
    for name in rows(alone):
        assert rows(shared)[name].tolist() == pytest.approx(
            rows(alone)[name].tolist(), rel=1e-4, abs=0.3, nan_ok=True
        ), name
    assert alone.predictions["label"].equals(shared.predictions["label"])
    assert (alone.predictions["predicted"] == shared.predictions["predicted"]).mean() > 0.98
    measured = ["layer", "response_std", "signal_variance", "gradient_norm", "weight_norm", "residual_ratio"]
    for name in measured:
        assert shared.layers[name].tolist() == pytest.approx(alone.layers[name].tolist(), rel=1e-3, nan_ok=True), name
    first, second = weights(alone), weights(shared)
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=1e-4, atol=1e-5, msg=name)


SCRIPT = """
import os, signal, sys
from pathlib import Path
from replication import Run, data, trainers
from replication.runs import recorder

recorder.CHECKPOINT_SECONDS = 0
marker, results = Path(sys.argv[1]), sys.argv[2]
batch = data.Batches.__call__

def deadly(self, iteration):
    if iteration == 15 and self.share[0] == 1 and not marker.exists():
        marker.write_text("")
        os.kill(os.getpid(), signal.SIGKILL)
    resumed = marker.with_name("resumed")
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "1" and not resumed.exists():
        resumed.write_text(str(iteration))
    return batch(self, iteration)

data.Batches.__call__ = deadly
trainers.train(Run("resnet-8-C", schedule=0.02, bn_batch=32, precision="bfloat16"), results)
"""
KILLED = Run("resnet-8-C", schedule=SCHEDULE, bn_batch=32, precision="bfloat16")


def torchrun(*arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--max-restarts", "2", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.long  # that two processes do is tested above
def test_two_machines_complete_a_run_and_a_killed_process_changes_nothing(tmp_path):
    """Two agents of torchrun that meet on the loopback, against one agent that has one of its processes killed.

    Of four processes, since the sum of two numbers is the same in any order.
    """
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    meeting = f"--nnodes 2 --nproc-per-node 2 --rdzv-backend c10d --rdzv-endpoint localhost:{free_port()}".split()
    options = ["--local-addr", "localhost", "-m", "replication", "resnet-8-C", "--schedule", "0.02", "--bn-batch", "32"]
    options += ["--precision", "bfloat16", "--results", tmp_path / "two"]
    machines = [torchrun(*meeting, *options) for _ in range(2)]
    texts = [machine.communicate(timeout=240)[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], texts
    assert "".join(texts).count("resnet-8-C: 0 of 22 iterations") == 1  # the first process shows how far all are
    undisturbed = finished(KILLED, tmp_path / "two")
    assert undisturbed.environment["processes"] == 4

    marker = tmp_path / "somebody died"
    machine = torchrun("--standalone", "--nproc-per-node", 4, script, marker, tmp_path / "killed")
    text = machine.communicate(timeout=240)[0]
    assert machine.returncode == 0, text
    assert marker.exists()
    assert int((tmp_path / "resumed").read_text()) >= 14  # it did go on, and did not begin anew
    assert_identical(finished(KILLED, tmp_path / "killed"), undisturbed)


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def test_a_number_of_processes_or_threads_that_cannot_be_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"processes 2: .*batches of 1 x 128 images, choose 1, or a bn_batch below 128"
    ):
        run_all([Run("resnet-8")], tmp_path, processes=2)
    with pytest.raises(ValueError, match=r"processes 3: .*batches of 4 x 32 images, choose 1, 2, 4$"):
        run_all([Run("resnet-8", bn_batch=32)], tmp_path, processes=3)
    with pytest.raises(ValueError, match="processes 0"):
        trainers.train(Run("resnet-8"), tmp_path, processes=0)
    with pytest.raises(TypeError, match=r"processes 2\.0"):
        run_all([Run("resnet-8", bn_batch=32)], tmp_path, processes=2.0)
    for threads in (0, machine.cores() + 1):
        with pytest.raises(ValueError, match=rf"threads {threads}: choose a whole number from 1 to {machine.cores()}$"):
            trainers.train(Run("resnet-8"), tmp_path, threads=threads)
    assert not list(tmp_path.iterdir())


def test_a_bad_checkpoint_is_refused_before_processes_are_started(tmp_path, monkeypatch):
    monkeypatch.setattr(trainers, "launch", lambda *_: pytest.fail("started"))
    run = Run("resnet-8", schedule=SCHEDULE, bn_batch=64)
    trainers.train(run, tmp_path)
    folder = run.folder(tmp_path)
    (folder / "summary.json").unlink()
    files.write_sealed(folder / "checkpoint.pt", b"something else")
    with pytest.raises(ValueError, match=r"checkpoint\.pt is no checkpoint of this version"):
        trainers.train(run, tmp_path, processes=2)


PHOTOGRAPHS = """
import sys
from dataclasses import replace
from pathlib import Path
from replication import Run, recipes, trainers

recipes.RECIPES["smoke"] = replace(recipes.RECIPES["smoke"], iterations=2, batch=4, bn_batch=2)
results, data = sys.argv[1:]
trainers.train(Run("resnet-18", "imagenet-small", recipe="smoke"), results, data)
"""


def test_photographs_are_shared_and_what_cannot_be_read_is_known_to_all(photographs, tmp_path, monkeypatch):
    """The second process meets the file that is damaged; both go on and count it once."""
    path = photographs / "imagenet-small" / "val" / "n00000001" / "1.JPEG"
    path.write_bytes(path.read_bytes()[:2000])
    script = tmp_path / "script.py"
    script.write_text(PHOTOGRAPHS)
    machine = torchrun("--standalone", "--nproc-per-node", 2, script, tmp_path / "shared", photographs)
    text = machine.communicate(timeout=240)[0]
    assert machine.returncode == 0, text
    run = Run("resnet-18", "imagenet-small", recipe="smoke")
    recipe = replace(recipes.RECIPES["smoke"], iterations=2, batch=4, bn_batch=2)
    monkeypatch.setitem(recipes.RECIPES, "smoke", recipe)
    shared, alone = finished(run, tmp_path / "shared"), trainers.train(run, tmp_path / "alone", photographs)
    assert rows(shared)["train_loss"].tolist() == pytest.approx(rows(alone)["train_loss"].tolist(), rel=0.05)
    assert rows(shared)["train_loss"][0] == pytest.approx(rows(alone)["train_loss"][0], rel=1e-4)
    for record in (shared, alone):
        assert record.summary["unreadable"] == 1
        assert record.predictions.empty  # of all test images or of none
        assert (record.folder / "unreadable.txt").read_text().startswith(f"{path}: OSError")


COMMAND_LINE = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever the shell that runs the tests does with it
from replication.__main__ import main
main()
"""


def test_the_command_line_trains_a_run(tmp_path, monkeypatch, capsys):
    command = [sys.executable, "-W", "error", "-m", "replication", "resnet-8", "--results", str(tmp_path)]
    done = subprocess.run([*command, "--schedule", "0.01"], capture_output=True, text=True, check=True)
    assert "resnet-8__digits__schedule-0.01__seed-0: test error" in done.stdout
    assert "resnet-8__digits__schedule-0.01__seed-0: 11 iterations, checkpoints and record in" in done.stdout
    assert done.stderr == "resnet-8: 0 of 11 iterations, 00:00 gone, ? left\n"
    assert finished(Run("resnet-8", schedule=0.01), tmp_path).summary["iterations"] == 11
    cold = ["replication", "resnet-110", "--no-warmup", "--schedule", "0.001", "--results", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", cold)
    main()
    assert finished(Run("resnet-110", schedule=0.001, warmup=False), tmp_path).history["lr"][0] == pytest.approx(0.1)
    monkeypatch.setattr(sys, "argv", [*command[4:], "--bn-batch", "100"])
    with pytest.raises(SystemExit) as refused:
        main()
    assert refused.value.code == 2
    assert "bn_batch 100: choose a divisor of the batch of 128" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (["resnet-21"], 2, "the nearest to yours is 20"),
        (["resnet-8", "--results="], 2, "results '': give a path in printable characters"),
        (["resnet-8", "--results=$NOT_SET/x"], 2, "the environment has no variable NOT_SET"),
        (["resnet-8", "--data", "~nobody-of-this-name"], 2, "data '~nobody-of-this-name': there is no such user"),
        (["resnet-8", "--data", __file__], 2, f"{__file__} is a file, give the path of a folder"),
        (["resnet-8", "--dataset", "nowhere"], 1, "dataset 'nowhere': choose digits"),
        (["resnet-8", "--holdout", "5000"], 1, "holdout 5000: digits has 1437 training images, choose fewer"),
    ],
)
def test_the_command_line_ends_in_the_message_of_an_error(options, status, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["replication", *options, *(["--data=d"] if "--data" not in options else [])])
    with pytest.raises(SystemExit) as ended:
        main()
    last = capsys.readouterr().err.splitlines()[-1]
    assert ended.value.code == status
    assert last.startswith("python -m replication: error: ")
    assert message in last
    assert list(tmp_path.iterdir()) == []


def test_the_command_line_replaces_home_and_starts_from_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    run = Run("resnet-8", schedule=0.001)
    for results, expected in {"~/r": "home/r", "r": "r"}.items():
        monkeypatch.setattr(sys, "argv", ["replication", "resnet-8", "--schedule=0.001", f"--results={results}"])
        main()
        assert finished(run, tmp_path / expected).folder.is_dir()


def test_only_errors_that_say_all_are_shown_without_a_traceback(tmp_path):
    def said(call):
        try:
            call()
        except Exception as error:
            return says_all(error)

    record = Run("resnet-8").folder(tmp_path)
    record.parent.mkdir(parents=True)
    record.write_text("a file")
    for call in (
        lambda: Run("resnet-8", seed=-1),
        lambda: Run(8),
        lambda: data.load("nowhere"),
        lambda: trainers.train(Run("resnet-8"), tmp_path),  # the system's own words
        lambda: run_all([Run("resnet-8")], tmp_path),  # of a worker
    ):
        assert said(call) is True
    for call in (
        lambda: 1 / 0,
        lambda: int("x"),
        lambda: (tmp_path / "nowhere").read_text(),  # the caller's own
        lambda: divisors("x"),  # a bug of this package
        lambda: models.cifar_net(8)(None),
    ):
        assert said(call) is False


def test_the_command_line_shows_a_bar_in_a_terminal_and_ends_it_when_interrupted(tmp_path):
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    command = [sys.executable, "-c", COMMAND_LINE, "resnet-20", "--results", str(tmp_path)]
    text, interrupted, process = b"", False, subprocess.Popen(command, stdout=theirs, stderr=theirs)
    os.close(theirs)
    with contextlib.suppress(OSError):  # Linux's way of telling that the other end was closed
        while part := os.read(ours, 4096):
            text += part
            if not interrupted and len(re.findall(rb"test \d", text)) > 2:
                process.send_signal(signal.SIGINT)
                interrupted = True
    os.close(ours)
    text = text.decode()
    assert process.wait() == 130, text
    assert text.startswith("resnet-20__digits__seed-0: 1,100 iterations, checkpoints and record in ")
    states = [state for state in re.split("[\r\n]", text) if state.startswith("resnet-20:")]
    assert re.search(r" \d+/1100 \[\d\d:\d\d<\d\d:\d\d, train \d+\.\d %, test \d+\.\d %\]$", states[-1])
    # The bar is wiped out before the next words.
    assert re.search(r"\r +\rresnet-20__digits__seed-0 was interrupted after \d+ of 1,100 iterations\.", text)
