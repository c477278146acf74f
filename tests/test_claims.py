from dataclasses import replace

import pytest
import torch.nn.functional as F

from replication import Run, models, paper, report, trainers
from replication.report import claims, comparisons, metrics
from replication.report.comparisons import Finding
from replication.runs import records as kept

SPREAD = (0.0, 0.2, -0.2, 0.1, -0.1)  # of the errors of five seeds about their mean
GOOD = {  # training and test errors in the paper's order
    "plain-20": (2, 9),
    "plain-32": (3, 10),
    "plain-44": (5, 12),
    "plain-56": (8, 13),
    "resnet-20": (2, 8.75),
    "resnet-32": (1.3, 7.5),
    "resnet-44": (1, 7.2),
    "resnet-56": (0.7, 7),
    "resnet-110": (0.2, 6.4),
}


@pytest.fixture
def make_all(make):
    """Makes runs of several nets: {net: (training error, test error)}, with every seed."""

    def write(errors, seeds=range(5), dataset="cifar10", **fields):
        return [
            make(train + SPREAD[seed], test + SPREAD[seed], net=net, dataset=dataset, seed=seed, **fields)
            for net, (train, test) in errors.items()
            for seed in seeds
        ]

    return write


def judged(records, number, **options):
    """Of a claim: the rows of the scorecard."""
    card = report.scorecard(records, **options)
    return card[card["claim"] == number]


def verdict_of(records, number, **options):
    row = judged(records, number, **options)
    assert len(row) == 1
    return row["verdict"].item()


def test_every_claim_of_the_paper_has_a_criterion_and_a_row():
    assert list(paper.CLAIMS) == list(range(1, 14))
    assert {row.claim for row in claims.CRITERIA} == {*range(1, 12), 13}  # 12 is the ensemble's
    card = report.scorecard([])
    assert card["claim"].tolist() == list(range(1, 14))
    assert (card["verdict"] == "not attempted").all()
    assert card["criterion"].str.len().min() > 10
    assert not card["criterion"].str.contains("[{}]").any()
    assert card["found"].map(len).min() == 1


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_clear_effect_over_seeds_is_reproduced(make_all, number):
    row = judged(make_all(GOOD), number)
    assert row["verdict"].tolist() == ["reproduced"]
    assert row["as_paper"].all()
    assert "5 runs each; 95 % interval" in row["found"].item()[0]
    assert set(row["nets"].item().values()) == {5}


@pytest.mark.parametrize("number", [1, 2, 3])
def test_no_effect_is_inconclusive(make_all, number):
    assert verdict_of(make_all(dict.fromkeys(GOOD, (5, 10))), number) == "inconclusive"


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_reversed_effect_is_not_reproduced(make_all, number):
    swapped = {net: (10 - train, 30 - test) for net, (train, test) in GOOD.items()}
    assert verdict_of(make_all(swapped), number) == "not reproduced"


def test_a_reversal_in_between_makes_it_partly(make_all):
    assert verdict_of(make_all(GOOD | {"plain-32": (7, 10)}), 1) == "partly"


@pytest.mark.parametrize("number", [1, 2, 3])
def test_one_seed_is_never_more_than_partly_and_says_so(make_all, number):
    large = {net: (10 * train, 7 * test) for net, (train, test) in GOOD.items()}
    row = judged(make_all(large, seeds=[0]), number)
    assert row["verdict"].tolist() == ["partly"]
    assert "(one run each)" in row["found"].item()[0]
    more = make_all({net: large[net] for net in large if net.startswith("plain")}, seeds=[1, 2], schedule=0.5)
    more += make_all({net: large[net] for net in large if net.startswith("resnet")}, seeds=[1], schedule=0.5)
    assert judged(more, 3)["verdict"].tolist() == ["not attempted", "mixed"]


@pytest.mark.parametrize(
    ("deep", "expected"), [(6.4, "inconclusive"), (6.6, "partly"), (3.6, "inconclusive"), (3.4, "not reproduced")]
)
def test_between_single_runs_a_point_and_a_half_says_nothing(make_all, deep, expected):
    assert verdict_of(make_all({"plain-20": (5, 9), "plain-56": (deep, 10)}, seeds=[0]), 1) == expected


def test_mixed_schedules_are_judged_separately(make_all):
    shallow = make_all({"plain-20": (2, 9)})
    deep = make_all({net: GOOD[net] for net in ("plain-32", "plain-56")}, schedule=0.1)
    row = judged(shallow + deep, 1)
    assert row["verdict"].tolist() == ["not attempted", "mixed"]
    assert row["as_paper"].tolist() == [True, False]
    assert row["place"].tolist() == ["the paper's conditions", "cifar10, 6,400 iterations"]
    assert row["nets"].tolist() == [{}, {"plain-32": 5, "plain-56": 5}]
    assert "Not run: plain-20." in row["found"].iloc[1]
    both = shallow + deep + make_all({"plain-56": (8, 13)}) + make_all({"plain-20": (9, 9)}, schedule=0.1)
    assert judged(both, 1)["verdict"].tolist() == ["reproduced", "inconsistent"]


def test_other_data_are_judged_separately(make_all):
    records = make_all(GOOD) + make_all(GOOD, dataset="cifar10-small") + make_all(GOOD, recipe="note")
    row = judged(records, 1)
    assert row["as_paper"].tolist() == [True, False, False]
    assert row["conditions"].nunique() == row["place"].nunique() == 3


def test_other_pixels_named_cifar10_are_not_the_papers(make_all):
    records = make_all(GOOD, fingerprint="f68bb3dbbcc1")
    row = judged(records, 1)
    assert row["as_paper"].tolist() == [True, False]
    assert row["verdict"].tolist() == ["not attempted", "consistent"]


def test_conditions_have_names_of_their_own(make_all, tmp_path):
    nets = {"plain-20": (2, 9), "plain-56": (8, 13)}
    records = make_all(nets, seeds=[0]) + make_all(nets, seeds=[0], bn_batch=64) + make_all(nets, seeds=[1])
    records[-2:] = [replace(record, fingerprint="another") for record in records[-2:]]  # of images of the same name
    row = judged(records, 1)
    full = "cifar10, recipe cifar, 64,000 iterations, float32"
    names = [f"{full}, images f68bb3dbbcc0", f"{full}, batch norm over 64", f"{full}, images another"]
    assert row["conditions"].tolist() == row["place"].tolist() == names
    assert row["nets"].map(lambda counts: set(counts.values()) == {1}).all()


def test_missing_nets_are_named(make_all):
    row = judged(make_all({net: error for net, error in GOOD.items() if net != "resnet-110"}), 2)
    assert row["verdict"].tolist() == ["partly"]
    assert "Not run: ResNet-110." in row["found"].item()
    assert verdict_of(make_all({"resnet-20": (2, 9)}, schedule=0.5), 2) == "not attempted"


def test_a_smoke_test_is_no_evidence(make_all):
    nets = {"plain-18": (1, 5), "plain-34": (50, 60)}
    records = make_all(nets, dataset="imagenet-smoke")
    assert (report.scorecard(records)["verdict"] == "not attempted").all()


@pytest.mark.parametrize(
    ("findings", "expected"),
    [
        ([], "not attempted"),
        ([("missing", None)], "not attempted"),
        ([("holds", 2), ("holds", 5), ("holds", None)], "reproduced"),
        ([("holds", 2), ("holds", 1)], "partly"),
        ([("holds", 2), ("missing", None)], "partly"),
        ([("holds", 2), ("unclear", 2)], "partly"),
        ([("holds", 2), ("fails", 2)], "partly"),
        ([("fails", 2), ("unclear", 2)], "not reproduced"),
        ([("fails", 2), ("missing", None)], "not reproduced"),
        ([("unclear", 2), ("missing", None)], "inconclusive"),
    ],
)
def test_what_findings_add_up_to(findings, expected):
    findings = [Finding(outcome, "", count) for outcome, count in findings]
    assert comparisons.verdict(findings, as_paper=True) == expected
    elsewhere = {"reproduced": "consistent", "partly": "mixed", "not reproduced": "inconsistent"}.get(
        expected, expected
    )
    assert comparisons.verdict(findings, as_paper=False) == elsewhere
    ignored = [Finding(outcome, "", 1, role=comparisons.NOT_HIGHER) for outcome in ("holds", "unclear", "missing")]
    assert comparisons.verdict(findings + ignored, as_paper=True) == expected


def test_what_supports_a_claim_does_not_decide_it():
    supporting = Finding("holds", "", 2, role="supporting")
    assert comparisons.verdict([supporting], as_paper=True) == "not attempted"
    assert comparisons.verdict([Finding("fails", "", 2), supporting], as_paper=True) == "not reproduced"
    for outcome in ("fails", "unclear", "missing"):
        findings = [Finding("holds", "", 2), supporting._replace(outcome=outcome)]
        assert comparisons.verdict(findings, as_paper=True) == "partly"


def test_an_interval_is_that_of_other_software():
    """Of R's t.test and statsmodels, which agree on this example."""
    one, other = [float(number) for number in range(10, 21)], [20 + number / 2 for number in range(13)]
    assert comparisons._interval(one, other) == pytest.approx((-10.414599391793885, -5.5854006082061138))
    assert comparisons._interval([1.0, 1.0], [0.5, 0.5]) == (0.5, 0.5)
    # Of one sample, by hand: mean 2, standard error 1 / sqrt(3), Student's t of 2 degrees of freedom 4.302653.
    low, high = comparisons._interval([1.0, 2.0, 3.0], [0.5])
    assert (low, high) == pytest.approx((1.5 - 4.302653 / 3**0.5, 1.5 + 4.302653 / 3**0.5), rel=1e-6)


@pytest.mark.parametrize(("worse", "expected"), [(6.4, "inconclusive"), (6.6, "consistent")])
def test_runs_without_any_spread_must_differ_by_more_than_single_runs(make, worse, expected):
    errors = {"resnet-56": 5, "plain-56": worse}
    records = [make(5, error, net=net, seed=seed) for net, error in errors.items() for seed in (0, 1)]
    assert judged(records, 3).iloc[-1]["verdict"] == expected


def layers(first, last, response=1.0, variance=0.3, open_blocks=True, count=20):
    """Rows of layers.csv: gradients go evenly from the first to the last 3x3 layer, at the start and at the end."""
    return [
        {
            "iteration": iteration,
            "layer": layer,
            "name": f"layer1.{(layer - 1) // 2}.conv{(layer - 1) % 2 + 1}",
            "kind": "3x3 conv",
        }
        | {"response_std": response, "signal_variance": variance, "weight_norm": 1.0}
        | {"gradient_norm": first * (last / first) ** ((layer - 1) / (count - 1))}
        | {"residual_ratio": 0.5 if open_blocks and layer % 2 == 0 else None}
        for iteration in (0, 64_000)
        for layer in range(1, count + 1)
    ]


@pytest.mark.parametrize(
    ("first", "last", "variance", "expected"),
    [
        (3.0, 1.0, 0.3, "reproduced"),
        (1e-4, 1.0, 0.3, "not reproduced"),  # vanish
        (1e4, 1.0, 0.3, "partly"),  # explode
        (1.0, 1.0, 0.001, "partly"),  # signals vanish
        (float("nan"), 1.0, 0.3, "not reproduced"),
    ],
)
def test_vanishing_and_exploding_gradients_are_seen(make, first, last, variance, expected):
    records = [
        make(8, 9, layers=layers(first, last, variance=variance), net="plain-34", dataset="imagenet", seed=seed)
        for seed in (0, 1)
    ]
    row = judged(records, 5)
    assert row["verdict"].tolist() == [expected]
    assert row["as_paper"].all()
    outcomes = [text.rpartition(": ")[2] for text in row["found"].item()]
    holds = [first >= 0.01, first <= 100, variance >= 0.01]
    assert outcomes == ["holds." if good else "fails." for good in holds]


def test_gains_are_ratios_of_geometric_means(make):
    record = make(8, 9, layers=layers(1e4, 1.0, count=12), net="plain-56")
    gains = metrics.gradient_gain(record.layers)
    # Norms fall by equal factors; from the third of twelve layers to the tenth are seven of eleven steps.
    assert gains.tolist() == pytest.approx([1e4 ** (7 / 11)] * 2, rel=1e-4)


def test_smaller_responses_are_reproduced_and_larger_ones_not(make):
    responses = {"plain-20": 2.0, "plain-56": 2.5, "resnet-20": 1.0, "resnet-56": 0.8, "resnet-110": 0.6}
    records = [
        make(8, 9, layers=layers(1, 1, response + SPREAD[seed] / 10), net=net, dataset="cifar10", seed=seed)
        for net, response in responses.items()
        for seed in range(3)
    ]
    assert verdict_of(records, 10) == "reproduced"
    swapped = [
        make(8, 9, layers=layers(1, 1, 3 - response + SPREAD[seed] / 10), net=net, dataset="cifar100", seed=seed)
        for net, response in responses.items()
        for seed in range(3)
    ]
    assert judged(swapped, 10)["verdict"].tolist() == ["not attempted", "inconsistent"]


def test_what_is_counted_needs_no_second_seed(make):
    for dataset, open_blocks, expected in (("cifar10", True, "reproduced"), ("cifar100", False, "mixed")):
        records = [
            make(8, 9, layers=layers(1, 1, open_blocks=open_blocks), net=net, dataset=dataset)
            for net in ("plain-20", "resnet-20")
        ]
        assert judged(records, 11)["verdict"].tolist()[-1] == expected
    assert judged(records[:1], 11)["verdict"].tolist() == ["not attempted"]


SHORTCUTS = {"plain-34": (9, 28.54), "resnet-34": (9, 25.03), "resnet-34-B": (9, 24.52), "resnet-34-C": (9, 24.19)}


def test_shortcuts_as_in_the_paper_are_reproduced(make_all):
    assert verdict_of(make_all(SHORTCUTS, dataset="imagenet"), 6) == "reproduced"
    worse = make_all(SHORTCUTS | {"resnet-34-B": (9, 27)}, dataset="imagenet", precision="bfloat16")
    assert verdict_of(worse, 6) == "partly"


def test_what_is_found_says_how_much_it_counts(make_all):
    """Intervals of differences are 0.23 to either side: SPREAD has a variance of 0.025, Student's t of 8 is 2.306."""
    errors = {"plain-34": (9, 10.6), "resnet-34": (9, 10), "resnet-34-B": (9, 10.5), "resnet-34-C": (9, 10)}
    lines = report.findings(make_all(errors, dataset="imagenet", schedule=0.5), [6])
    assert lines[0].startswith("Projections are not essential: mixed (")
    roles = ["Required", *["Supporting"] * 3, *["Counts only if clearly violated"] * 2]
    found, weights = lines[1:7], " ".join(lines[7:])
    assert [line.strip().partition(": The ")[0] for line in found] == roles
    outcomes = [line.rpartition(": ")[2] for line in found]
    assert outcomes == ["holds.", "holds.", "unclear.", "holds.", "clearly violated.", "not clearly violated."]
    assert "Unclear: the runs are too few or differ too much to tell" in weights
    assert weights in comparisons.RULES


def test_without_projections_nothing_is_said_of_them(make_all):
    assert verdict_of(make_all({"plain-20": (9, 30), "resnet-20": (9, 20)}), 6) == "not attempted"


def test_essential_projections_are_seen(make_all):
    errors = SHORTCUTS | {"resnet-34": (9, 28), "resnet-34-B": (9, 20), "resnet-34-C": (9, 20)}
    row = judged(make_all(errors, dataset="imagenet"), 6)
    assert row["verdict"].tolist() == ["not reproduced"]
    text = "The test error of ResNet-34-C is 20.00 %, 8.00 points lower than the 28.00 % of ResNet-34"
    assert text in row["found"].item()[0]


def test_deeper_bottlenecks_are_judged_against_34_layers(make_all):
    nets = {"resnet-34": (9, 25.03), "resnet-50": (9, 22.85), "resnet-101": (9, 21.75), "resnet-152": (9, 21.43)}
    row = judged(make_all(nets, dataset="imagenet"), 7)
    assert row["verdict"].tolist() == ["reproduced"]
    assert "(below 15,300,000,000 required): holds." in row["found"].item()[-1]
    worse = make_all(nets | {"resnet-152": (9, 24)}, dataset="imagenet", seeds=range(4), precision="bfloat16")
    assert verdict_of(worse, 7) == "partly"  # degradation beyond 101 layers


def test_the_warm_up_is_judged_against_runs_without(make):
    def runs_of(test_error, lead, **fields):
        return [
            make(
                0.2 + lead,
                test_error + SPREAD[seed],
                rates=[0.01] * lead + [0.1] * (10 - lead),
                net="resnet-110",
                dataset="cifar10",
                seed=seed,
                **fields,
            )
            for seed in range(5)
        ]

    def cold(**fields):  # below 80 % in the fourth of ten rows, with the warm-up in the first
        return [
            make(73.5 + SPREAD[seed], 6.7 + SPREAD[seed], net="resnet-110", dataset="cifar10", seed=seed, **fields)
            for seed in range(5)
        ]

    warm = runs_of(6.6, 1)
    assert verdict_of(warm, 8) == "not attempted"
    row = judged(warm + cold(warmup=False), 8)
    assert row["verdict"].tolist() == ["partly"]
    found = row["found"].item()
    assert "is 6.60 %, 0.01 points lower than the 6.61 % of the paper (5 runs; " in found[-1]
    assert found[-1].endswith("at most 0.50 points required): holds.")
    words = "The length of the warm-up of ResNet-110 is 6,400 iterations (5 runs; at most 1,000 "
    assert found[-2].startswith(f"Supporting: {words}")
    assert found[-2].endswith("fails.")
    assert judged(warm, 2)["nets"].tolist() == [{}]
    short = runs_of(6.6, 1, schedule=0.1) + cold(warmup=False, schedule=0.1)
    row = judged(short, 8)
    assert row["verdict"].tolist() == ["not attempted", "consistent"]
    assert "is 640 iterations (5 runs; at most 1,000 iterations required): holds." in row["found"].iloc[1][-1]
    assert judged(short, 2)["nets"].tolist() == [{}]  # not mixed into the other claims


def test_overfitting_needs_a_low_training_error_and_a_higher_test_error(make_all):
    nets = {"resnet-110": (0.5, 6.43), "resnet-1202": (-0.15, 7.93)}  # the spread is 0.2 at the most
    assert verdict_of(make_all(nets), 9) == "reproduced"
    assert verdict_of(make_all(nets | {"resnet-1202": (0.5, 7.93)}, precision="bfloat16"), 9) == "partly"


def test_an_ensemble_is_judged_against_its_best_member(make):
    records = [make(9, 22, net=net, dataset="imagenet") for net in ("resnet-50", "resnet-101")]
    for record, error in zip(records, (5.25, 4.60), strict=True):
        (record.folder / "evaluation.json").write_text(kept.json_text({"multi-scale": {"top1": 20.0, "top5": error}}))
    for error, expected in ((3.57, "partly"), (4.7, "not reproduced")):
        found = {"multi-scale": {"top1": 19.0, "top5": error}, "members": [record.run.id for record in records]}
        row = judged(records, 12, evaluations={"ensemble": found})
        assert row["verdict"].tolist() == [expected]
        assert f"top-5 error of {error:.2f} %, its best member 4.60 %" in row["found"].item()[0]
    assert verdict_of(records, 12) == "not attempted"


def cut(self, x):
    return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


def unheard(self, x):
    around = x if self.downsample is None else self.downsample(x)
    return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + 0 * around)


def test_nets_whose_shortcuts_are_cut_are_not_consistent_with_the_paper(tmp_path, monkeypatch):
    """Runs of nets that are called residual, but whose blocks leave the shortcut out: they are the plain nets."""
    runs_of = {
        kind: [Run(f"{kind}-{depth}", seed=seed, schedule=0.005) for depth in (20, 32) for seed in range(2)]
        for kind in ("plain", "resnet")
    }
    plain = [trainers.train(run, tmp_path) for run in runs_of["plain"]]
    honest = [trainers.train(run, tmp_path / "honest") for run in runs_of["resnet"]]
    assert judged(plain + honest, 11)["verdict"].iloc[-1] == "consistent"
    for sabotage in (cut, unheard):
        monkeypatch.setattr(models.BasicBlock, "forward", sabotage)
        sabotaged = [trainers.train(run, tmp_path / sabotage.__name__) for run in runs_of["resnet"]]
        for one, other in zip(plain, sabotaged, strict=True):
            assert one.summary["test_error"] == other.summary["test_error"]
        card = report.scorecard(plain + sabotaged)
        tested = card[card["claim"].isin([2, 3, 4, 6, 10, 11]) & (card["verdict"] != "not attempted")]
        assert set(tested["claim"]) >= {2, 3, 4, 11}
        assert not {"reproduced", "consistent"} & set(tested["verdict"])
        assert (
            "Supporting: The share of working shortcuts of ResNet-32 is 0 % (at least 100 % required): fails."
            in (tested["found"].iloc[-1])
        )


def test_a_net_of_which_a_run_diverged_is_no_evidence(make, make_all):
    assert verdict_of(make_all({"plain-20": (2, 9), "plain-56": (8, 13)}), 1) == "reproduced"
    lost = [make(0, 0, net="plain-56", dataset="cifar10", seed=9, diverged=500)]
    row = judged(make_all({"plain-20": (2, 9), "plain-56": (8, 13)}, precision="bfloat16"), 1)
    assert row["verdict"].tolist() == ["reproduced"]
    records = make_all({"plain-20": (2, 9), "plain-56": (8, 13)}, schedule=0.5)
    lost = [make(0, 0, net="plain-56", dataset="cifar10", seed=9, schedule=0.5, diverged=500)]
    row = judged(records + lost, 1)
    assert row["verdict"].tolist() == ["not attempted", "inconclusive"]
    assert "1 run of plain-56 diverged" in row["found"].iloc[1][0]
    alone = [record for record in records if record.net == "plain-20"] + lost
    row = judged(alone, 1)
    assert row["verdict"].tolist() == ["not attempted", "inconclusive"]
    text = "Required: 1 run of plain-56 diverged, so there is no training error to compare: unclear."
    assert row["found"].iloc[1] == [text]


@pytest.fixture
def detect(make, tmp_path):
    """Makes two runs of both detectors of Table 8, which start from weights: {net: mAP@[.5, .95]}."""
    (tmp_path / "any.pth").write_bytes(b"any")

    def write(precisions, dataset="coco", weights=True, **fields):
        start = {"path": str(tmp_path / "any.pth"), "inputs": "torchvision"}
        errors = dict.fromkeys(("train_error", "test_error"))
        starts = {net: start | ({"stride_on": "3x3"} if "101" in net else {}) for net in precisions} if weights else {}
        runs = [(net, seed, value + seed / 10) for net, value in precisions.items() for seed in (0, 1)]
        fields |= {"dataset": dataset}
        return [
            make(0, 0, net=net, seed=seed, weights=starts.get(net), more=errors | {"map_50_95": value}, **fields)
            for net, seed, value in runs
        ]

    return write


VGG, RESNET = "faster-rcnn-vgg-16", "faster-rcnn-resnet-101"


def test_detectors_of_the_papers_precision_reproduce_its_claim(detect):
    row = judged(detect({VGG: 21.2, RESNET: 27.2}), 13)
    assert row["verdict"].tolist() == ["reproduced"]
    assert row["as_paper"].all()
    assert row["nets"].item() == {VGG: 2, RESNET: 2}
    assert "6.00 points lower than the 27.25 % of faster-rcnn-resnet-101" in row["found"].item()[0]


@pytest.mark.parametrize(
    ("precisions", "verdict"),
    [
        ({VGG: 27.2, RESNET: 21.2}, "not reproduced"),
        ({VGG: 25, RESNET: 31}, "partly"),  # a gain, but of others than the paper's detectors
        ({VGG: 24, RESNET: 24}, "inconclusive"),
        ({RESNET: 27.2}, "not attempted"),
    ],
)
def test_other_precisions_do_not(precisions, verdict, detect):
    assert verdict_of(detect(precisions), 13) == verdict


def test_detectors_from_scratch_or_on_voc_are_other_conditions(detect):
    assert verdict_of(detect({VGG: 21.2, RESNET: 27.2}, weights=False), 13) == "not attempted"
    row = judged(detect({VGG: 30, RESNET: 40}, dataset="voc"), 13)
    assert row["verdict"].tolist() == ["not attempted", "consistent"]


def test_detectors_decide_no_other_claim_and_smoke_tests_none(detect):
    card = report.scorecard(detect({VGG: 21.2, RESNET: 27.2}))
    assert set(card["claim"][card["verdict"] != "not attempted"]) == {13}
    smoke = detect({VGG: 21.2, RESNET: 27.2}, recipe="detection-smoke", dataset="voc-smoke")
    assert (report.scorecard(smoke)["verdict"] == "not attempted").all()
