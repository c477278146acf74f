import re
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from replication import Run, forecasts, grid, run_all, trainers

SIZES = {"digits": (8, 8), "cifar10": (32, 32), "imagenet": (224, 224)}


@pytest.mark.parametrize(
    ("needed", "lanes", "expected"), [([5], 2, 5), ([3, 3, 2, 2], 2, 5), ([1, 1, 1, 4], 2, 4), ([1, 2, 3], 1, 6)]
)
def test_the_longest_lane_is_that_of_workers_who_take_the_longest_task_left(needed, lanes, expected):
    assert forecasts.longest_lane(needed, lanes) == expected


def test_of_each_kind_of_runs_the_ends_are_measured():
    runs = [Run(f"{kind}-{depth}", "cifar10") for depth in (32, 20, 56) for kind in ("plain", "resnet")]
    runs += [Run("resnet-20", "cifar10", precision="bfloat16"), Run("resnet-110")]
    chosen = forecasts.chosen(runs, SIZES)
    assert [(run.name.depth, run.precision, run.dataset) for run in chosen] == [
        (20, "float32", "cifar10"),
        (56, "float32", "cifar10"),
        (20, "bfloat16", "cifar10"),
        (110, "float32", "digits"),
    ]


def test_what_takes_very_long_to_measure_is_not():
    """ResNet-1202 would take minutes, and more memory than many machines have."""
    nets = [Run(f"resnet-{depth}", "cifar10") for depth in (1202, 110, 20)]
    assert [run.net for run in forecasts.chosen(nets, SIZES)] == ["resnet-20", "resnet-110"]
    nets = [Run(f"resnet-{depth}", "imagenet") for depth in (18, 50, 152)]
    assert [run.net for run in forecasts.chosen(nets, SIZES)] == ["resnet-18", "resnet-50"]


def test_what_is_not_measured_lies_on_the_line_of_what_is():
    runs = [Run(f"resnet-{depth}", "cifar10") for depth in (20, 32, 56, 110)]
    costs = {run: trainers.cost(run, (32, 32)) for run in runs}
    measured = {run: 0.01 + 2e-11 * costs[run] for run in (runs[0], runs[2])}
    found = forecasts.predicted(runs, SIZES, measured)
    assert found == pytest.approx({run: 0.01 + 2e-11 * costs[run] for run in runs})


def test_the_tests_of_a_run_are_counted():
    run = Run("resnet-20", "cifar10")
    _, tests, _ = trainers.recording_points(run.settings, 10_000)
    images = 64_000 * 128 + len(tests) * 10_000 / 3  # forward alone is a third of forward and backward
    assert forecasts.total([run], [run], SIZES, {"cifar10": 10_000}, {run: 0.128}) == pytest.approx(images / 1000)


def test_an_iteration_is_measured_and_nothing_is_left_behind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    started = time.perf_counter()
    each = forecasts.iteration_seconds(Run("resnet-8"), (8, 8), iterations=5)
    assert 0 < 5 * each < time.perf_counter() - started
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)
    assert list(tmp_path.iterdir()) == []


def test_one_group_stands_for_a_batch_of_them(monkeypatch):
    """Of 4 groups one is measured and counted four times; two processes share them."""
    sizes = []
    step = forecasts.trainers.steps.Step.__call__
    monkeypatch.setattr(
        forecasts.trainers.steps.Step,
        "__call__",
        lambda self, images, labels, rate: sizes.append(len(labels)) or step(self, images, labels, rate),
    )
    clock = iter(range(100))
    monkeypatch.setattr(forecasts.time, "perf_counter", lambda: float(next(clock)))
    assert forecasts.iteration_seconds(Run("plain-8", bn_batch=32), (8, 8), iterations=1) == 4
    assert forecasts.iteration_seconds(Run("plain-8", bn_batch=32), (8, 8), iterations=1, processes=2) == 2
    assert set(sizes) == {32}


def test_training_says_how_long_it_will_take_and_how_close_that_came(tmp_path, capsys):
    with ThreadPoolExecutor(1) as here:
        run_all(grid(["plain-8", "resnet-8"], schedule=0.1), tmp_path, executor=here)
        lines = capsys.readouterr().out.splitlines()
        assert re.fullmatch(r"Training 2 runs: about \d+ s\.", lines[0])
        assert re.fullmatch(r"It took \d+ s, where \d+ s were expected\.", lines[1])
        run_all(grid(["plain-8", "resnet-8"], schedule=0.1), tmp_path, executor=here)
        assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.4, "0 s"),
        (99, "99 s"),
        (100, "1.7 min"),
        (5_000, "83 min"),
        (20_000, "5.6 hours"),
        (172_799, "48 hours"),
        (172_801, "2.0 days"),
        (40_000_000, "463 days"),
        (63_115_200, "2.0 years"),
    ],
)
def test_times_for_the_eye(seconds, words):
    assert forecasts.in_words(seconds) == words
