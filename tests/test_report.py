import itertools
import json
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from torchvision.models import alexnet, vgg19

from replication import measure, models, paper, report
from replication.report import error_curves
from replication.runs import records as kept


def test_errors_are_means_and_deviations_over_seeds(make):
    records = [make(error, error + 5, net="resnet-20", seed=seed) for seed, error in enumerate((1.0, 2.0, 6.0))]
    row = report.errors(records).iloc[0]
    assert (row["n"], row["train_error"], row["test_error"]) == (3, 3.0, 8.0)
    assert row["train_error_std"] == pytest.approx((14 / 2) ** 0.5)  # of a sample: (4 + 1 + 9) / (3 - 1)
    assert row["parameters"] == 269_722
    assert row["paper_error"] == 8.75
    text = report.readable(report.errors(records))
    assert text["ours: training error %"].item() == "1.00, 2.00, 6.00"
    assert text["runs"].item() == 3
    records.append(make(7.0, 12.0, net="resnet-20", seed=3))
    text = report.readable(report.errors(records))
    assert text["ours: training error %"].item() == "4.00 ± 2.94"  # (9 + 4 + 4 + 9) / 3 = 8.67, its root 2.94


def test_runs_under_other_conditions_never_share_a_row(make):
    varied = [{}, {"schedule": 0.1}, {"precision": "bfloat16"}, {"dataset": "pets"}, {"recipe": "note"}, {"holdout": 9}]
    records = [make(1, 1, net="resnet-20", **fields) for fields in varied]
    records.append(replace(records[0], fingerprint="g"))  # the same run, made from other images
    table = report.errors(records)
    assert table["n"].tolist() == [1] * 7
    shown = report.readable(table)
    assert {"dataset", "fingerprint", "recipe", "iterations", "precision", "holdout"} < set(shown)
    assert not shown.duplicated().any()
    with pytest.raises(ValueError, match=r"not made under the same conditions \(dataset: digits, pets; "):
        report.figure_6(records, {"all": ["resnet-20"]})


def test_nothing_to_show_is_said():
    with pytest.raises(ValueError, match="at least one finished run"):
        report.figure_6([], {"plain": ["plain-20"]})
    assert report.findings([]) == ["These nets decide none of these claims: see the criteria in 7_scorecard."]


def test_runs_are_listed_with_what_they_took_and_whose_they_are(make, tmp_path, monkeypatch):
    own, published = make(5, 6, net="resnet-20", seed=1), make(5, 6, net="plain-20", schedule=0.5)
    shutil.move(published.folder, tmp_path / "published" / "runs" / published.run.id)
    monkeypatch.setattr(kept, "PUBLISHED", tmp_path / "published")
    table = report.listed([own, kept.finished_or_published(published.run, tmp_path)]).data
    assert table.to_numpy().tolist() == [
        ["ResNet-20", 1, "1,100", "1.0", "a processor, 1 thread", "your own"],
        ["plain-20", 0, "550", "1.0", "a processor, 1 thread", "published with this repository"],
    ]
    environment = json.loads((own.folder / "environment.json").read_text())
    (own.folder / "environment.json").write_text(json.dumps(environment | {"device": "<b>GPU"}))
    assert "&lt;b&gt;GPU" in report.listed([replace(own)]).to_html()
    assert report.listed([]).data.empty


def test_only_the_papers_own_conditions_are_comparable(make):
    alike = make(8, 9, net="resnet-20", dataset="cifar10")
    others = [
        make(8, 9, net="resnet-20", dataset="cifar10", schedule=0.5),
        make(8, 9, net="resnet-20", dataset="cifar10-small"),
        make(8, 9, net="resnet-20", dataset="cifar10", recipe="note"),
        make(8, 9, net="resnet-20", dataset="cifar10", holdout=5000),
    ]
    assert report.errors([alike])["comparable"].tolist() == [True]
    assert "Measured as the paper's" in report.caution(report.errors([alike]))
    assert not report.errors(others)["comparable"].any()
    for record in others:
        assert "not the paper's conditions" in report.caution(report.errors([alike, record]))
    published = paper.TABLE_6.at_depth(20)
    assert not report.errors([alike], published=published)["comparable"].any()


def test_only_under_the_papers_conditions_a_distance_to_it_is_shown(make):
    distance, cifar10 = "ours less the paper's, points", {"dataset": "cifar10"}
    records = [make(8, 9, net="resnet-20", **cifar10), make(8, 9.5, net="resnet-20", seed=1, **cifar10)]
    records += [make(8, 6.97, net="resnet-56", **cifar10), make(8, 7, net="resnet-32", **cifar10)]
    records += [make(8, 9, net="plain-20", **cifar10)]  # of which the paper has no number
    shown = report.readable(report.errors(records))
    assert shown[distance].tolist() == ["+0.50", "+0.00", "-0.51", "–"]  # 9.25, 6.97 and 7 less 8.75, 6.97 and 7.51
    short = make(8, 9, net="resnet-20", schedule=0.5, **cifar10)
    assert report.readable(report.errors([*records, short]))[distance].tolist()[-1] == "–"
    assert distance not in report.readable(report.errors([short]))
    assert distance not in report.readable(report.errors(records, published=paper.TABLE_6.at_depth(20)))


def test_nets_that_were_not_run_show_as_such(make):
    records = [make(5, 7, net="resnet-56"), make(8, 9, net="resnet-20")]
    table = report.errors(records, nets=paper.TABLE_6.errors)
    text = report.readable(table).set_index("net")
    assert list(text.index) == [f"ResNet-{depth}" for depth in (20, 32, 44, 56, 110, 1202)]
    assert text.loc["ResNet-1202", "ours: test error %"] == "not run"
    assert text.loc["ResNet-1202", paper.TABLE_6.title] == "7.93"


def test_tables_are_written_for_eye_and_machine(make, tmp_path):
    table = report.errors([make(30.0, 31.0, net="plain-20"), make(20.0, 21.0, net="resnet-20")])
    report.save_errors(table, tmp_path / "out")
    read = pd.read_csv(tmp_path / "out" / "table.csv")
    assert read["train_error"].tolist() == [30.0, 20.0]
    text = (tmp_path / "out" / "table.md").read_text()
    assert "| plain-20  |      269,722 |" in text
    assert "| ResNet-20 |      269,722 |" in text
    assert read["net"].tolist() == ["plain-20", "resnet-20"]  # what code calls it
    assert "These are not the paper's conditions" in text
    first = (tmp_path / "out" / "table.csv").read_bytes()
    report.save_errors(table, tmp_path / "out")
    assert (tmp_path / "out" / "table.csv").read_bytes() == first


def test_findings_name_claims_and_differences_with_their_sign(make):
    errors = {"plain-20": 30, "plain-56": 64, "resnet-20": 25, "resnet-56": 46}
    records = [make(error, error + 1, net=net) for net, error in errors.items()]
    text = report.findings(records, claims=[1, 3])
    assert text[0] == "Deeper plain nets train worse: mixed (digits, recipe digits, 1,100 iterations, float32)."
    assert "The training error of plain-20 is 30.00 %, 34.00 points lower than the 64.00 % of plain-56" in text[1]
    assert any("The test error of ResNet-56 is 47.00 %, 18.00 points lower than the 65.00 %" in line for line in text)
    assert not any("Deeper residual nets" in line for line in text)
    (line,) = [
        line for line in report.findings(records, claims=[2]) if "21.00 points higher" in line and "test" in line
    ]
    assert line.endswith("(one run each): fails.")


def test_curves_show_every_net_with_training_dashed_and_test_bold(make):
    records = [make(30, 31, net="plain-20"), make(60, 61, net="plain-56"), make(20, 21, net="resnet-20")]
    panels = {"plain": ["plain-20", "plain-56"], "residual": ["resnet-20", "resnet-56"]}
    figure = report.figure_6(records, panels)
    left, right = figure.axes
    assert [axes.get_title() for axes in figure.axes] == ["plain", "residual"]
    assert len(left.lines) == 4
    assert len(right.lines) == 2
    assert {text.get_text() for text in left.texts} == {"plain-20", "plain-56"}
    assert figure.get_suptitle() == "digits, recipe digits, 1,100 iterations, float32, 1 run per net"
    for line in left.lines:
        assert (line.get_linestyle() == "--") == (line.get_linewidth() < 2)
    x, y = left.lines[1].get_data()  # the test error of plain-20, where it was measured
    assert list(x) == [220, 440, 660, 880, 1100]
    assert list(y) == [39, 37, 35, 33, 31]


def test_figure_1_has_training_left_and_test_right(make):
    records = [make(30, 31, net="plain-20"), make(60, 61, net="plain-56")]
    left, right = report.figure_1(records).axes
    assert (left.get_title(), right.get_title()) == ("training error", "test error")
    assert [len(axes.lines) for axes in (left, right)] == [2, 2]
    assert left.lines[1].get_ydata()[-1] == 60
    assert right.lines[1].get_ydata()[-1] == 61


def test_several_seeds_are_a_mean_and_a_range_within_the_axis(make):
    records = [make(error, error, net="plain-20", seed=seed) for seed, error in enumerate((80, 81, 90))]
    figure = report.figure_6(records, {"plain": ["plain-20"]})
    (axes,) = figure.axes
    assert [line.get_ydata()[-1] for line in axes.lines] == pytest.approx([251 / 3] * 2)
    assert len(axes.collections) == 2
    for band in axes.collections:
        ends = [height for place, height in band.get_paths()[0].vertices if place == 1100]
        assert (min(ends), max(ends)) == (80, 90)
    assert axes.get_ylim()[1] > 90  # what ended high is not cut off
    assert figure.get_suptitle().endswith("3 runs per net: mean and range")


def test_runs_far_apart_are_drawn_one_by_one(make):
    records = [make(error, error, net="plain-56", seed=seed) for seed, error in enumerate((10, 11, 90))]
    records += [make(error, error, net="plain-20", seed=seed) for seed, error in enumerate((5, 6, 7))]
    figure = report.figure_6(records, {"plain": ["plain-20", "plain-56"]})
    (axes,) = figure.axes
    assert [line.get_ydata()[-1] for line in axes.lines] == [6, 6, 10, 11, 90, 10, 11, 90]  # no mean of 37
    assert all(line.get_linewidth() < 1.3 for line in axes.lines[2:])
    assert len(axes.collections) == 2  # bands of plain-20
    assert [text.xy for text in axes.texts] == [(1100, 6), (1100, 10), (1100, 11), (1100, 90)]  # where lines lead to
    assert figure.get_suptitle().endswith("3 runs per net: mean and range\nthin lines: single runs")


@pytest.mark.parametrize(
    ("apart", "rows", "singly"),
    [
        (10, 100, False),
        (11, 100, True),
        (90, 5, True),  # a plateau that one run leaves a twentieth of the training later
        (90, 4, False),
    ],
)
def test_how_far_apart_runs_are_drawn_one_by_one(apart, rows, singly):
    runs = pd.DataFrame({0: 5.0, 1: [5.0 + apart] * rows + [5.0] * (100 - rows)})
    assert error_curves._far_apart(runs) == singly


def test_recordings_of_one_run_alone_do_not_bend_the_mean():
    """A warm-up is recorded once an epoch, so that runs differ in their first rows."""
    rows = pd.DataFrame({"seed": [0, 0, 0, 1, 1], "iteration": [10, 12, 20, 10, 20], "error": [50.0, 45, 40, 30, 20]})
    assert error_curves._runs(rows)[1].tolist() == [30, 28, 20]


LATE, EARLY = [0.1] * 5 + [0.01] * 3 + [0.001] * 2, [0.1] * 4 + [0.01] * 6


@pytest.mark.parametrize(
    ("rates", "shared", "own"),
    [
        ([LATE, LATE], [550, 880], []),
        ([EARLY, LATE], [], [440, 550, 880]),
        ([[0.01, *LATE[1:]], LATE], [550, 880], []),  # a rate that rises, at the end of a warm-up, is no division
        ([[0.1] * 10] * 2, [], []),
    ],
)
def test_divisions_of_the_rate_are_marked(make, rates, shared, own):
    records = [make(9, 9, net=net, rates=each) for net, each in zip(("plain-20", "plain-56"), rates, strict=True)]
    figure = report.figure_6(records, {"plain": ["plain-20", "plain-56"]})
    marks = {True: [], False: []}
    for mark in figure.axes[0].collections:
        red, green, blue, _ = mark.get_facecolor()[0]
        marks[red == green == blue].append(mark.get_offsets()[0][0])
    assert (marks[True], marks[False]) == (shared, own)
    (legend,) = figure.legends
    assert ("learning rate divided" in {text.get_text() for text in legend.get_texts()}) == bool(shared + own)


def test_long_runs_have_the_papers_axes(make):
    errors = {"plain-20": 9, "plain-56": 13, "plain-110": 61, "resnet-20": 8.5}
    records = [make(error - 1, error, net=net, dataset="cifar10") for net, error in errors.items()]
    panels = {"plain": ["plain-20", "plain-56", "plain-110"], "residual": ["resnet-20"]}
    figure = report.figure_6(records, panels)
    figure.canvas.draw()
    for axes in figure.axes:
        assert axes.get_ylim() == (0, 20)
        assert axes.get_xlabel() == "iter. (1e4)"
        assert [label.get_text() for label in axes.get_xticklabels() if label.get_position()[0] <= 64e3] == list(
            "0123456"
        )
    names = {text.get_text() for text in figure.axes[0].texts}
    assert names == {"plain-20", "plain-56", "plain-110: 61 %"}  # what does not fit is said


@pytest.mark.parametrize("fields", [{"dataset": "digits"}, {"dataset": "cifar10", "schedule": 0.05}])
def test_short_runs_have_axes_of_their_own(make, fields):
    (axes,) = report.figure_6([make(29, 30, net="plain-20", **fields)], {"plain": ["plain-20"]}).axes
    assert axes.get_ylim()[1] > 31
    assert axes.get_xlabel() == "iterations"


def test_long_runs_of_high_errors_are_not_cut_off(make):
    (axes,) = report.figure_6([make(29, 30, net="resnet-20", dataset="cifar100")], {"": ["resnet-20"]}).axes
    assert axes.get_ylim()[1] > 31


def test_what_lies_below_another_curve_still_shows(make):
    nets = ["resnet-20", "resnet-20-B", "resnet-20-C"]
    (axes,) = report.figure_6([make(9, 9, net=net) for net in nets], {"": nets}).axes
    bold = [line.get_linewidth() for line in axes.lines if line.get_linestyle() == "-"]
    assert bold == sorted(set(bold), reverse=True)
    assert len(bold) == 3
    assert len({line._unscaled_dash_pattern[0] for line in axes.lines if line.get_linestyle() == "--"}) == 3


# How colours look without one kind of cone: Machado, Oliveira and Fernandes 2009, severity 1, on linear RGB.
SEEN = {
    "all cones": np.eye(3),
    "no long": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "no medium": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "no short": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def lab(colour, seen):
    """CIELAB of an sRGB colour, as seen with these cones."""
    rgb = np.array(colour[:3])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    x, y, z = np.cbrt(XYZ @ np.clip(np.array(seen) @ linear, 1e-3, 1) / XYZ.sum(axis=1))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("seen", SEEN)
@pytest.mark.parametrize(
    "nets",
    [
        [f"plain-{depth}" for depth in (20, 32, 44, 56, 110)],
        [f"resnet-{depth}" for depth in (20, 32, 44, 56, 110, 1202)],
        list(paper.FIGURE_7),
        ["plain-20", "resnet-20", "resnet-20-B", "resnet-20-C"],
        ["plain-56", "resnet-56", "resnet-56-B", "resnet-56-C"],
        ["plain-18", "resnet-18", "plain-34", "resnet-34", "resnet-34-B", "resnet-34-C"],
        ["plain-110", "resnet-110", "resnet-110 without warm-up"],
        ["plain-8", "plain-14", "resnet-8", "resnet-14"],
    ],
    ids=" ".join,
)
def test_colours_of_nets_in_one_figure_differ_for_all_eyes(nets, seen):
    colours = [lab(error_curves.colour(net), SEEN[seen]) for net in nets]
    least = 2 if nets[0] == "plain-8" else 8  # a difference of 2 is one that can just be seen
    assert min(np.linalg.norm(one - other) for one, other in itertools.combinations(colours, 2)) > least
    assert max(colour[0] for colour in colours) < 82  # of 100, which is the white behind them


def test_a_net_has_one_colour_in_all_figures(make):
    records = [make(error, error, net=net) for net, error in {"plain-20": 9, "plain-56": 30, "resnet-56": 10}.items()]
    figures = [
        report.figure_1(records),
        report.figure_6(records, {"": ["plain-56", "resnet-56"]}),
        report.figure_6(records, {"": ["plain-20", "plain-56"]}),
    ]
    shown = [text for figure in figures for axes in figure.axes for text in axes.texts]
    colours = {(text.get_text(), text.get_color()) for text in shown}
    assert len(colours) == len({name for name, _ in colours}) == 3


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("resnet-20", "ResNet-20"),
        ("resnet-110 without warm-up", "ResNet-110 without warm-up"),
        ("resnet-34-C", "ResNet-34-C"),
        ("resnet-50, stride on 3x3", "ResNet-50, stride on 3x3"),
        ("not run: resnet-56, plain-20.", "not run: ResNet-56, plain-20."),
        (
            "test error of resnet-N lower than that of resnet-N-B.",
            "test error of ResNet-N lower than that of ResNet-N-B.",
        ),
        *[(same, same) for same in ("plain-20", "resnet-20-of-theirs", "my-resnet-20", "resnet-20__digits__seed-0")],
        *[(same, same) for same in ("zoo/resnet-20", "resnet-20.pth", "gcr/torch-residual-networks", "ResNet-20", "–")],
    ],
)
def test_nets_are_spelled_as_in_the_paper_and_other_names_stay(text, shown):
    assert report.spelled(text) == shown


def test_names_at_the_ends_of_curves_never_overlap():
    ends = {"a": 5.0, "b": 5.1, "c": 5.2, "d": 99.0, "e": 99.5, "f": 100.0}
    places = sorted(error_curves._apart(ends, 0, 100).values())
    assert all(above - below >= 5.5 - 1e-9 for below, above in itertools.pairwise(places))
    assert 0 <= places[0] <= places[-1] <= 100
    assert [net for net, _ in sorted(error_curves._apart(ends, 0, 100).items(), key=lambda item: item[1])] == list(ends)


@pytest.mark.parametrize(
    ("ends", "places"),
    [
        ({"a": 24, "b": 50}, {"a": 24, "b": 50}),
        ({"a": 50, "b": 50, "c": 50}, {"a": 44.5, "b": 50, "c": 55.5}),
        ({"plain": 40, "A": 20, "B": 21, "C": 22}, {"plain": 40, "A": 15.5, "B": 21, "C": 26.5}),
        ({"plain": 30, "A": 20, "B": 21, "C": 22}, {"plain": 31.5, "A": 15, "B": 20.5, "C": 26}),
        ({"a": 0, "b": 0}, {"a": 0, "b": 5.5}),
        ({"a": 100, "b": 99}, {"a": 100, "b": 94.5}),
        ({}, {}),
    ],
)
def test_names_are_as_near_to_the_ends_as_they_can_be(ends, places):
    assert error_curves._apart(ends, 0, 100) == pytest.approx(places)


def test_more_names_than_fit_stay_within_the_axis():
    places = error_curves._apart({str(number): 3.0 for number in range(30)}, 0, 60).values()
    assert 0 <= min(places) <= max(places) <= 60
    assert len(set(places)) == 30


def test_lines_lead_from_names_to_the_ends_of_curves(make):
    ends = {"plain-20": 24, "resnet-20": 21, "resnet-20-B": 21.2, "resnet-20-C": 21.1}
    (axes,) = report.figure_6([make(20, end, net=net) for net, end in ends.items()], {"": list(ends)}).axes
    assert {text.get_text(): text.xy for text in axes.texts} == {
        report.spelled(net): (1100, end) for net, end in ends.items()
    }
    assert all(text.arrow_patch is not None for text in axes.texts)


def test_figures_are_written_twice_with_the_same_bytes(make, tmp_path):
    records = [make(30, 31, net="plain-20")]
    for folder in ("one", "two"):
        report.save_figure(report.figure_6(records, {"plain": ["plain-20"]}), tmp_path / folder, "figure_6")
    for name in ("figure_6.png", "figure_6.svg"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_figure_3_is_drawn_from_the_nets():
    layers = measure.layers(models.imagenet_net(34, shortcut="A"), 224)
    axes = report.figure_3({"residual": layers}).axes[0]
    boxes = [text.get_text() for text in axes.texts]
    assert boxes.count("3x3 conv, 64") == 6
    assert boxes.count("3x3 conv, 512, /2") == 1
    shortcuts = [
        patch for patch in axes.patches if patch.get_linestyle() in ("-", ":") and "Arrow" in type(patch).__name__
    ]
    dotted = [patch for patch in shortcuts if patch.get_linestyle() == ":"]
    assert len(dotted) == 3
    # As printed in the paper's figure; shortcuts start below the first pooling and end above the second.
    assert boxes.index("pool, /2") == boxes.index("7x7 conv, 64, /2") + 2  # after that layer's map
    assert boxes[-2:] == ["avg pool", "fc, 1000"]


@pytest.mark.parametrize(
    ("net", "size", "pools"),
    [
        (lambda: vgg19(), 224, ["pool, /2"] * 5),
        (lambda: models.imagenet_net(34, residual=False), 224, ["pool, /2", "avg pool"]),
        (lambda: models.imagenet_net(50), 224, ["pool, /2", "avg pool"]),
        (lambda: models.cifar_net(20), 32, ["avg pool"]),
        (lambda: models.cifar_net(20), 8, ["avg pool"]),
        (lambda: models.imagenet_net(18), 32, ["pool, /2"]),  # its last maps have one value: nothing to average
        (lambda: alexnet(), 224, ["pool, /2"] * 3),
    ],
)
def test_figure_3_shows_where_nets_pool(net, size, pools):
    with torch.device("meta"):
        axes = report.figure_3({"": measure.layers(net(), size)}).axes[0]
    assert [text.get_text() for text in axes.texts if "pool" in text.get_text()] == pools


def test_figure_5_shows_the_blocks_of_the_paper():
    nets = {"34": models.imagenet_net(34, shortcut="A"), "50": models.imagenet_net(50)}
    figure = report.figure_5({name: measure.layers(net, 224) for name, net in nets.items()})
    left, right = ({text.get_text() for text in axes.texts} - {"relu", "+"} for axes in figure.axes)
    assert left == {"64-d", "3x3, 64"}
    assert right == {"256-d", "1x1, 64", "3x3, 64", "1x1, 256"}


def test_published_errors_move_to_another_depth():
    assert paper.TABLE_3_SHORTCUTS.at_depth(56).errors == {
        "plain-56": 28.54,
        "resnet-56": 25.03,
        "resnet-56-B": 24.52,
        "resnet-56-C": 24.19,
    }


def evaluated(record, top1, top5, way="10-crop", images=50_000):
    return {record.run.id: {way: {"top1": top1, "top5": top5}, "images": images, "unreadable": 0}}


def test_tables_of_imagenet_stand_beside_the_papers(make):
    records = [make(40, 30, net="resnet-34", dataset="imagenet", seed=seed) for seed in (0, 1)]
    records += [make(40, 30, net="plain-34", dataset="imagenet"), make(9, 9, net="resnet-50", dataset="imagenet")]
    found = evaluated(records[0], 25.0, 8.0) | evaluated(records[1], 27.0, 8.0) | evaluated(records[2], 28.0, 0.0)
    found |= {"theirs": {"10-crop": {"top1": 26.0, "top5": 9.0}, "images": 50_000}}
    found |= {"ensemble": {"10-crop": {"top1": 20.0, "top5": 3.0}, "images": 50_000}}
    table = report.tested(records, found, paper.TABLE_3).set_index("net")
    assert list(table.index) == [*paper.TABLE_3.errors, "theirs"]
    assert table.loc["resnet-34", ["n", "top1", "paper_top1", "top5", "paper_top5"]].tolist() == [2, 26, 25.03, 8, 7.76]
    assert table.loc["resnet-34", "top1_std"] == pytest.approx(2**0.5)
    assert table.loc["plain-34", "top5"] == 0
    text = report.readable(table.reset_index()).set_index("net")
    assert text.loc["ResNet-34", "ours: top-1 error %"] == "25.00, 27.00"
    assert text.loc["ResNet-50", "ours: top-1 error %"] == "not run"  # trained, but not tested in this way
    assert text.loc["VGG-16"].tolist() == ["–", "–", "28.07", "–", "9.33"]
    assert text.loc["theirs", ["runs", "ours: top-1 error %", "paper: top-1 error %"]].tolist() == ["–", "26.00", "–"]
    caution = report.caution(table.reset_index())
    assert "Tested on 50,000 images. Trained by others, tested here: theirs. Measured as the paper's." in caution
    assert table["comparable"].sum() == 2


def test_a_table_of_ensembles_has_theirs_and_ours(make):
    record = make(40, 30, net="resnet-34", dataset="imagenet")
    found = evaluated(record, 25.0, 8.0, "multi-scale")
    found |= {"ensemble": {"multi-scale": {"top1": 20.0, "top5": 3.5}, "images": 50_000, "members": [record.run.id]}}
    table = report.tested([record], found, paper.TABLE_5)
    text = report.readable(table).set_index("net")
    assert "600,000 iterations, float32, 1 run per net. Tested on 50,000 images. The ensemble: ResNet-34." in (
        report.caution(table)
    )
    assert "not the paper's conditions" in report.caution(table)  # which are the test set
    assert list(text.index) == list(paper.TABLE_5.errors)
    assert text.loc["ensemble", ["ours: top-5 error %", "paper: top-5 error %"]].tolist() == ["3.50", "3.57"]
    nothing = report.tested([], {}, paper.TABLE_5)
    assert report.readable(nothing).set_index("net").loc["ensemble", "ours: top-5 error %"] == "not run"
    assert report.caution(nothing) == "Nothing has been run yet."


@pytest.mark.parametrize(
    ("fields", "images"),
    [({"schedule": 0.5}, 50_000), ({"recipe": "note"}, 50_000), ({}, 49_999), ({"dataset": "imagenet-100"}, 50_000)],
)
def test_only_all_of_imagenet_in_full_length_is_comparable(make, fields, images):
    record = make(40, 30, **({"net": "resnet-34", "dataset": "imagenet"} | fields))
    table = report.tested([record], evaluated(record, 25.0, 8.0, images=images), paper.TABLE_2)
    assert not table["comparable"].any()
    assert "not the paper's conditions" in report.caution(table)


def test_a_smoke_test_is_called_one(make):
    record = make(40, 30, net="resnet-34", dataset="imagenet-smoke")
    assert "A smoke test: these errors mean nothing." in report.caution(report.errors([record]))
    found = {"ensemble": {"multi-scale": {"top1": 20.0, "top5": 3.5}, "images": 6, "members": [record.run.id]}}
    assert "A smoke test: these errors mean nothing." in report.caution(report.tested([record], found, paper.TABLE_5))


def test_figure_4_shows_what_was_run_of_its_nets(make):
    nets = ["plain-18", "resnet-18", "plain-34", "resnet-34", "resnet-50"]
    records = [make(40, 30, net=net, dataset="imagenet") for net in nets]
    assert [len(axes.lines) for axes in report.figure_4(records).axes] == [4, 4]
    short = make(40, 30, net="resnet-18", dataset="imagenet-smoke")
    assert all(tick == round(tick) for tick in report.figure_4([short]).axes[0].get_xticks())  # of four iterations
    (axes,) = report.figure_4([records[1], records[4]]).axes
    assert axes.get_title() == "residual nets"
    (axes,) = report.figure_4(records[4:]).axes
    assert axes.get_title() == "not in the paper's figure"


def test_weights_of_others_are_rows_of_their_own_and_no_runs(make):
    records = [make(8, 9, net="resnet-20"), make(7, 8, net="resnet-32")]
    others = [{"net": "resnet-20-of-theirs", "parameters": 269_722, "test_error": 8.27}]
    table = report.errors(records, others=others)
    text = report.readable(table).set_index("net")
    assert text.loc["resnet-20-of-theirs"].tolist() == ["269,722", "–", "–", "8.27", "–"]
    assert "1 run per net. Trained by others, tested here: resnet-20-of-theirs." in report.caution(table)


def test_the_papers_tables_agree_with_each_other():
    """Numbers that the paper prints twice: a slip of the pen in one of them shows."""
    for net in set(paper.TABLE_2.errors) & set(paper.TABLE_3.errors):
        assert paper.TABLE_2.errors[net][0] == paper.TABLE_3.errors[net][0]
    for net in set(paper.TABLE_3.errors) & set(paper.TABLE_4.errors):
        ten_crop, scales = paper.TABLE_3.errors[net], paper.TABLE_4.errors[net]
        assert all(more is None or less is None or less < more for more, less in zip(ten_crop, scales, strict=True))
    assert paper.TABLE_3.errors["plain-34"][0] - paper.TABLE_3.errors["resnet-34"][0] == pytest.approx(3.5, abs=0.05)
    assert paper.TABLE_2.errors["resnet-18"][0] - paper.TABLE_2.errors["resnet-34"][0] == pytest.approx(2.8, abs=0.06)


def test_a_run_that_diverged_is_shown_and_kept_out_of_the_means(make, tmp_path):
    records = [make(1, 10, net="plain-20"), make(3, 12, net="plain-20", seed=1)]
    records += [make(0, 0, net="plain-20", seed=2, diverged=40), make(0, 0, net="plain-56", diverged=7)]
    table = report.errors(records)
    assert table[["n", "diverged"]].to_numpy().tolist() == [[3, 1], [1, 1]]
    assert table["test_error"].iloc[0] == 11
    shown = report.readable(table)
    assert shown["ours: test error %"].tolist() == ["10.00, 12.00", "diverged"]
    assert shown["diverged"].tolist() == [1, 1]
    caution = report.caution(table)
    assert "1 of 3 runs of plain-20 diverged: the errors are those of the others." in caution
    assert "1 of 1 run of plain-56 diverged." in caution
    report.save_errors(table, tmp_path)
    assert "diverged" in (tmp_path / "table.md").read_text()
    text = " ".join(report.findings(records, claims=[1]))
    assert "1 run of plain-20 diverged and 1 run of plain-56 diverged, so there is no training error to compare" in text
    report.figure_6(records, {"plain nets": ["plain-20", "plain-56"]})  # its history is drawn as far as it goes


def test_names_from_outside_are_escaped(make, tmp_path):
    others = [{"net": "<script>alert(1)</script>|x", "parameters": 1, "test_error": 9.0}]
    table = report.errors([make(1, 10, net="plain-20")], others=others)
    html = report.styled(table).to_html()
    assert "<script" not in html
    assert html.count("&lt;script&gt;alert(1)") == 2  # in its row and below the table
    report.save_errors(table, tmp_path)
    text = (tmp_path / "table.md").read_text()
    assert "<script" not in text
    assert r"</script>\|x" in text.replace("&lt;", "<")


def test_yardsticks_stand_beside_ours_and_are_never_ours(make):
    records = [make(1, error, net="resnet-20", dataset="cifar10", seed=seed) for seed, error in enumerate((8.3, 8.5))]
    records += [
        make(1, 9.4, net="plain-20", dataset="cifar10"),
        make(0, 0, net="resnet-32", dataset="cifar10", diverged=9),
    ]
    records.append(make(1, 7.7, net="resnet-20", dataset="cifar10", seed=2, bn_batch=64))
    others = [
        {"dataset": "cifar10-small"},
        {"dataset": "cifar10", "schedule": 0.5},
        {"dataset": "cifar10", "holdout": 5000},
    ]
    records += [make(1, 3.21, net="resnet-20", **fields) for fields in others]
    table = report.yardsticks(records)
    theirs, ours = (table[table["source"].str.startswith("ours") == own] for own in (False, True))
    assert ours[["nets", "epoch", "runs", "20", "32"]].to_numpy().tolist() == [
        ["residual nets", "last", "2", "8.30, 8.50", "–"],
        ["residual nets", "last", "1", "7.70", "–"],
        ["plain nets", "last", "1", "9.40", "–"],
    ]
    pd.testing.assert_frame_equal(theirs.reset_index(drop=True), report.yardsticks())
    assert not table.isin(["3.21", "4.56"]).any(axis=None)
    first = theirs.iloc[0]
    assert [first[name] for name in ("20", "32", "44", "56")] == ["8.75", "7.51", "7.17", "6.97"]
    assert (first["110"], first["1202"]) == ("6.43 best, 6.61 ± 0.16 of 5", "7.93")


def test_yardsticks_are_complete_and_plausible():
    for each in paper.YARDSTICKS:
        assert each.rule in ("last", "best", "not stated", "not stated, probably best")
        for net, error in each.errors.items():
            models.NetName.parse(net)
            assert isinstance(error, tuple) == (each.runs > 1)  # mean and standard deviation of several
            mean = error[0] if each.runs > 1 else error
            if net.startswith("resnet"):
                assert abs(mean - paper.TABLE_6.errors[net]) < 1.8, (each.source, net)
            else:
                assert abs(mean - paper.PLAIN_READ[net]) < 1.8, (each.source, net)
    (again,) = (each for each in paper.YARDSTICKS if each.runs == 6)
    runs = [7.4, 7.29, 7.4, 6.89, 8.42, 7.95]
    assert again.errors["resnet-56"] == pytest.approx((np.mean(runs), np.std(runs, ddof=1)), abs=0.005)


def test_errors_against_depth_show_ones_own_runs_under_the_papers_conditions(make):
    records = [make(1, error, net="resnet-20", dataset="cifar10", seed=seed) for seed, error in enumerate((8.3, 8.5))]
    records += [make(1, 6.7, net="resnet-110", dataset="cifar10"), make(1, 9, net="resnet-56", dataset="cifar10-small")]
    figure = report.figure_depths(records)
    (axes,) = figure.axes
    own = [line for line in axes.lines if line.get_markersize() == 9 and len(line.get_xdata())]
    assert [(list(line.get_xdata()), list(line.get_ydata())) for line in own] == [([0, 0], [8.3, 8.5]), ([4], [6.7])]
    assert own[0].get_color() == error_curves.colour("resnet-20")
    others = [line for line in axes.lines if line.get_color() == "0.65"]
    assert len(others) == sum(net.startswith("resnet") for each in paper.YARDSTICKS for net in each.errors)
    assert "3 runs of ours" in figure.get_suptitle()
    plain = report.figure_depths([*records, make(1, 9.4, net="plain-20", dataset="cifar10")])
    assert [axes.get_title() for axes in plain.axes] == ["plain nets", "residual nets"]


def test_errors_against_depth_without_a_run_say_so(make):
    for records in ([], [make(1, 9, net="resnet-56")], [make(0, 0, net="resnet-20", dataset="cifar10", diverged=3)]):
        figure = report.figure_depths(records)
        assert "no runs of ours" in figure.get_suptitle()
        assert "ours: every run" not in {text.get_text() for text in figure.legends[0].get_texts()}
