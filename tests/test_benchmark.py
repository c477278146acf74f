import time

import pandas as pd
import pytest
import torch
from conftest import Here

from replication import Run, benchmark
from replication.engine import steps
from replication.engine.machine import cores
from replication.engine.progress import in_words
from replication.runs.environment import cost, threads_for


def test_rounds_are_told_by_their_median_and_ends():
    rounds = pd.DataFrame(
        {
            "net": ["resnet-20"] * 3,
            "precision": ["float32"] * 3,
            "round": range(3),
            "common": [100.0, 90, 200],
            "ours": [300.0, 180, 800],
            "ratio": [3.0, 2, 4],
            "over_float32": [1.0, 0.25, 3],
            "limit": [1000.0] * 3,
        }
    )
    (row,) = benchmark.summarized(rounds).to_dict("records")
    assert (row["rounds"], row["common"], row["ours"], row["ratio"]) == (3, 100, 300, 3)
    assert (row["ratio_min"], row["ratio_max"], row["of_limit"]) == (2, 4, 0.3)
    shown = benchmark.readable(benchmark.summarized(rounds))
    assert shown["ours / common loop"].tolist() == ["3.00 (2.00 to 4.00)"]
    assert shown["ours / ours in float32"].tolist() == ["1.00 (0.25 to 3.00)"]
    assert shown["common loop, images/s"].tolist() == ["100 (90 to 200)"]
    assert shown["ours / limit"].tolist() == ["30 %"]


def test_precisions_are_compared_seed_by_seed(make):
    """Differences of 0.2, 0.4 and 0.6: their mean, and its interval by Student's t with two degrees of freedom."""
    records = []
    for seed, (error, worse) in enumerate([(10.0, 0.2), (12.0, 0.4), (20.0, 0.6)]):
        for precision, by in (("float32", 0), ("bfloat16", worse)):
            records.append(make(error / 2, error + by, net="resnet-20", seed=seed, precision=precision))
    records.append(make(5.0, 50.0, net="resnet-20", seed=7))  # without a counterpart
    train, test = benchmark.precisions(records).to_dict("records")
    assert (test["error"], test["seeds"], test["float32"]) == ("test", 3, 14)
    half = 4.302653 * 0.2 / 3**0.5
    assert (test["difference"], test["low"], test["high"]) == pytest.approx((0.4, 0.4 - half, 0.4 + half), abs=1e-4)
    assert (train["difference"], train["low"], train["high"]) == (0, 0, 0)
    assert benchmark.readable(benchmark.precisions(records))["bfloat16 less float32, points"].tolist() == [
        "+0.00 (+0.00 to +0.00)",
        "+0.40 (-0.10 to +0.90)",
    ]


def test_without_records_there_is_a_table_without_rows():
    table = benchmark.precisions([])
    assert list(table) == benchmark.COMPARED
    assert benchmark.readable(table).empty


def test_the_protocols_are_those_of_the_paper():
    planned = benchmark.protocols()
    assert len(planned["3_cifar_depths"]) == 6  # Table 6
    assert {run.name.depth for run in planned["3_cifar_depths"]} == {20, 32, 44, 56, 110, 1202}
    assert len(planned["6_imagenet"]) == 9
    for name, runs in planned.items():
        assert {run.settings.iterations for run in runs} == {600_000 if name == "6_imagenet" else 64_000}
        assert {run.schedule for run in runs} == {1.0}


def test_times_follow_from_what_was_measured():
    """Two nets are measured; the others lie on the line through them, over their multiply-adds."""
    planned = benchmark.planned([2, 5])
    ends = {run: 0.01 + 2e-11 * cost(run, (32, 32)) for run in planned["5_layer_responses"]}
    measured = {run: ends[run] for run in ends if run.net in ("plain-20", "resnet-110")}
    nets = benchmark.net_times(planned, measured).set_index("net")
    assert set(nets.index) == {run.net for runs in planned.values() for run in runs}
    assert nets["how"].value_counts().to_dict() == {"computed": 7, "measured": 2}
    for run, seconds in ends.items():
        assert nets.loc[run.net, "speed"] == pytest.approx(128 / seconds, rel=1e-6)
        assert nets.loc[run.net, "seconds"] == pytest.approx(64_000 * seconds, rel=1e-6)
    times = benchmark.protocol_times(planned, measured).set_index("notebook")
    lanes = max(1, cores() // max(threads_for(run, (32, 32)) for run in ends))
    alone = 64_000 * sum(ends.values())
    assert times.loc["5_layer_responses", "seconds"] == pytest.approx(alone / min(lanes, len(ends)), rel=1e-6)
    assert times.loc["2_plain_vs_residual", "iterations"] == 8 * 64_000


def test_noise_does_not_make_deeper_nets_faster():
    planned = benchmark.planned([3])
    shallow, deep = (Run(net, "cifar10") for net in ("resnet-20", "resnet-110"))
    nets = benchmark.net_times(planned, {shallow: 0.1, deep: 0.01}).set_index("net")
    assert nets.loc["resnet-1202", "seconds"] > nets.loc["resnet-56", "seconds"] > 64_000 * 0.1


def test_an_iteration_is_timed_and_nothing_is_left_behind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    started = time.perf_counter()
    each = benchmark.iteration_seconds(Run("resnet-8"), (8, 8), iterations=5)
    assert 0 < 5 * each < time.perf_counter() - started
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)
    assert list(tmp_path.iterdir()) == []


def test_one_part_stands_for_a_batch_of_them(monkeypatch):
    """Of 4 parts that batch norm sees one is timed and counted four times."""
    sizes, step = [], steps.Step.__call__
    monkeypatch.setattr(
        steps.Step,
        "__call__",
        lambda self, images, labels, rate: sizes.append(len(labels)) or step(self, images, labels, rate),
    )
    clock = iter(range(100))
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: float(next(clock)))
    assert benchmark.iteration_seconds(Run("plain-8", bn_batch=32), (8, 8), iterations=1) == 4
    assert set(sizes) == {32}


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
    assert in_words(seconds) == words


def test_nothing_planned_takes_no_time():
    assert benchmark.measure({}) == {}
    assert benchmark.net_times({}, {}).empty
    assert benchmark.protocol_times({}, {}).empty


def test_unknown_choices_are_refused():
    with pytest.raises(ValueError, match="notebook 7: choose 0, 2, 3, 4, 5, 6"):
        benchmark.planned([0, 7])
    with pytest.raises(ValueError, match="precision 'float16': choose float32, bfloat16"):
        benchmark.planned([0], "float16")
    with pytest.raises(ValueError, match="rounds 0: give at least 1"):
        benchmark.compare(["resnet-8"], rounds=0)
    assert list(benchmark.planned([4, 2])) == ["4_shortcuts", "2_plain_vs_residual"]


def test_ratios_and_limit_follow_from_what_is_measured(monkeypatch):
    """Two operations a multiply-add, three passes; ResNet-20 has 40.6 million of them. Batches of 128."""
    seconds = {"float32": 0.64, "bfloat16": 1.92}
    monkeypatch.setattr(benchmark, "matrix_product", lambda precision: 1e12)
    monkeypatch.setattr(benchmark, "common_loop", lambda *_: 100.0)
    monkeypatch.setattr(benchmark, "iteration_seconds", lambda run, *_: seconds[run.precision])
    monkeypatch.setattr(benchmark, "Workers", lambda count: Here())
    table = benchmark.compare(["resnet-20"], rounds=2)
    assert table["precision"].tolist() == ["float32", "bfloat16"] * 2
    assert table["ours"].tolist() == pytest.approx([200, 200 / 3] * 2)
    assert table["ratio"].tolist() == pytest.approx([2, 2 / 3] * 2)
    assert table["over_float32"].tolist() == pytest.approx([1, 1 / 3] * 2)
    assert table["limit"].iloc[0] == pytest.approx(1e12 / (6 * 40.6e6), rel=0.01)
    alone = benchmark.compare(["resnet-20"], rounds=1, precisions=["bfloat16"])
    assert alone["over_float32"].isna().all()
