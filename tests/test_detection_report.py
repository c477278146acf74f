"""Tables 7 and 8, and figures of detectors, from records."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from replication import data, paper, report
from replication.data import detection
from replication.report import detections
from replication.runs import records as kept

SMALL, VGG = "faster-rcnn-resnet-18-quarter", "faster-rcnn-vgg-16-quarter"
GREY = {"mean": [0.5] * 3, "std": [0.5] * 3}


@pytest.fixture
def detect(make):
    def write(net, seed=0, dataset="voc-smoke", weights=None, **precisions):
        found = {"train_error": None, "test_error": None, "map_voc07": 50.0, "map_voc": 51.0}
        found |= {"map_50": 52.0, "map_50_95": 30.0} | precisions
        return make(0, 0, net=net, dataset=dataset, seed=seed, weights=weights, more=found)

    return write


@pytest.fixture
def starts(tmp_path):
    """Weights that a detector can start from, two of them, as options of a run."""
    for name in ("one", "other"):
        (tmp_path / name).write_text(name)
    return [{"path": str(tmp_path / name), "inputs": "torchvision"} for name in ("one", "other")]


def test_the_papers_tables():
    """Its printed numbers, and their differences: 3.2 points in Table 7, 6.0 in Table 8, where they are 28 % more."""
    for table, gain in ((paper.TABLE_7, (3.2, 3.4)), (paper.TABLE_8, (6.9, 6.0))):
        vgg, resnet = table.errors["faster-rcnn-vgg-16"], table.errors["faster-rcnn-resnet-101"]
        assert np.subtract(resnet, vgg) == pytest.approx(gain)
    theirs = [paper.TABLE_8.errors[f"faster-rcnn-{net}"][1] for net in ("vgg-16", "resnet-101")]
    assert theirs[1] / theirs[0] == pytest.approx(1.28, abs=0.005)


def test_tables_have_the_papers_rows_and_ours(detect):
    records = [detect(SMALL, 0), detect(SMALL, 1, map_voc07=60.0), detect(VGG)]
    shown = detections.readable(detections.precisions(records, 7), 7).set_index("detector")
    assert list(shown.index) == [f"{SMALL} from scratch", f"{VGG} from scratch", *paper.TABLE_7.errors]
    assert shown.loc[f"{SMALL} from scratch", "ours: mAP@.5, VOC's 11 points %"] == "50.00, 60.00"
    assert shown.loc["faster-rcnn-vgg-16"].tolist()[-4:] == ["not run", "not run", "73.20", "70.40"]
    table = detections.precisions(records, 8)
    shown = detections.readable(table, 8).set_index("detector")
    assert shown.loc[f"{VGG} from scratch", "ours: mAP@[.5, .95] %"] == "30.00"
    assert shown.loc["faster-rcnn-resnet-101", "paper: mAP@[.5, .95] %"] == "27.20"
    assert not table["comparable"].any()
    assert detections.note(table).endswith("A smoke test: these precisions say nothing about the paper.")


def test_runs_that_start_from_different_weights_are_rows_of_their_own(detect, starts):
    """Not seeds of each other; the same weights twice are one row. Each row says which weights it started from."""
    one, other = starts
    records = [detect(SMALL, seed, weights=one, map_voc07=50.0 + 10 * seed) for seed in (0, 1)]
    records += [detect(SMALL, 0, weights=other, map_voc07=80.0), detect(SMALL, map_voc07=20.0)]
    names = [each.run.weights.name for each in (records[0], records[2])]
    table = detections.precisions(records, 7)
    shown = detections.readable(table, 7)[:3]
    assert shown["detector"].tolist() == [SMALL, SMALL, f"{SMALL} from scratch"]
    assert shown["weights"].tolist() == [*names, "–"]
    assert shown["ours: mAP@.5, VOC's 11 points %"].tolist() == ["50.00, 60.00", "80.00", "20.00"]
    for name in names:
        assert f"float32, weights {name}" in detections.note(table)


def test_claims_are_judged_for_each_choice_of_weights(detect, starts):
    """Nets start from weights of their own and are compared; of two for one net, each with the other net."""
    one, other = starts
    vgg, resnet = "faster-rcnn-vgg-16", "faster-rcnn-resnet-34"
    records = [detect(vgg, dataset="voc", weights=one), detect(resnet, dataset="voc", weights=one | {"inputs": GREY})]
    ((_, words, members),) = kept.by_conditions(records)
    assert (members, "weights" in words) == (records, False)
    records.append(detect(resnet, dataset="voc", weights=other))
    groups = kept.by_conditions(records)
    assert [members for _, _, members in groups] == [records[:2], records[::2]]
    start, *others = (record.run.weights.name for record in records)
    ends = [f"weights {start} and {each}" for each in others]
    assert [words.split(", ")[-1] for _, words, _ in groups] == ends
    assert len({short for short, _, _ in groups}) == 2


def test_tables_of_nets_that_start_from_their_seeds_do_not_speak_of_weights(make, tmp_path):
    table = report.errors([make(1, 2, net="plain-20")])
    report.save_errors(table, tmp_path)
    assert "weights" not in (tmp_path / "table.csv").read_text() + (tmp_path / "table.md").read_text()


def test_without_pycocotools_table_8_is_empty(detect):
    shown = detections.readable(detections.precisions([detect(SMALL, map_50=None, map_50_95=None)], 8), 8)
    assert shown["ours: mAP@.5 %"].tolist()[0] == "–"


def test_tables_of_errors_and_lines_of_findings_stand_detectors_too(detect):
    table = report.errors([detect(SMALL)])
    assert table["test_error"].isna().all()
    assert report.findings([detect(VGG)], claims=[13]) == [
        "These nets decide none of these claims: see the criteria in 7_scorecard."
    ]


def test_figures_show_losses_objects_and_what_was_found(detect, tmp_path):
    record = detect(SMALL)
    history = record.history.assign(**dict.fromkeys(list(detections.LOSSES)[1:], 0.5))
    (record.folder / "history.csv").write_text(kept.rows_text(history.to_dict("records")))
    drawn = data.load("voc-smoke", tmp_path)
    places = [place for place, each in enumerate(drawn.test.labels) if len(each.labels)][:2]
    rows = [
        {"image": drawn.test.paths[place], "label": "disc", "score": score}
        | {"left": 10.0, "top": 20.0, "right": 40.0, "bottom": 60.0}
        for place in places
        for score in (0.9, 0.49)
    ]
    (record.folder / "detections.csv").write_text(pd.DataFrame(rows).to_csv(index=False))
    kept.write_summary(record.folder, record.summary)
    record = kept.finished(record.run, record.folder.parents[1])
    figure = detections.losses([record])
    assert [axes.lines[0].get_ydata()[-1] for axes in figure.axes] == [0.5] * 5
    figure = detections.pictures([record], drawn, 2)
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == ["the objects", f"{SMALL} from scratch", "", ""]
    for row, place in enumerate(places):
        objects, found = figure.axes[2 * row], figure.axes[2 * row + 1]
        assert len(objects.patches) == len(drawn.test.labels[place].labels)
        (patch,) = found.patches  # of those with a score of 0.5 or more
        assert (patch.get_x(), patch.get_y(), patch.get_width(), patch.get_height()) == (10, 20, 30, 40)
        assert [text.get_text() for text in found.texts] == ["disc 0.90"]


def test_every_net_of_a_figure_has_a_colour_of_its_own(detect):
    names = [f"faster-rcnn-{net}" for net in ("vgg-11", "vgg-13", "vgg-16", "vgg-19", "resnet-18", "resnet-34")]
    made = []
    for net in [*names, *(f"{name}-quarter" for name in names)]:
        record = detect(net)
        history = record.history.assign(**dict.fromkeys(list(detections.LOSSES)[1:], 0.5))
        (record.folder / "history.csv").write_text(kept.rows_text(history.to_dict("records")))
        kept.write_summary(record.folder, record.summary)
        made.append(kept.finished(record.run, record.folder.parents[1]))
    figure = detections.losses(made)
    assert len({line.get_color() for line in figure.axes[0].lines}) == 12


def test_pictures_are_of_images_whose_detections_are_kept(detect, tmp_path):
    """The first 100: objects of others would stand beside detections that no record has."""
    drawn = data.load("voc-smoke", tmp_path)
    scene = next(place for place, each in enumerate(drawn.test.labels) if len(each.labels))
    bare = drawn.test.labels[scene].__class__(*(column[:0] for column in drawn.test.labels[scene]))
    labels = np.empty(102, dtype=object)
    labels[:] = [bare] * 99 + [drawn.test.labels[scene]] * 3
    paths = np.array([drawn.test.paths[scene]] * 102)
    figure = detections.pictures([detect(SMALL)], replace(drawn, test=detection.Scenes(paths, labels)), 2)
    count = len(drawn.test.labels[scene].labels)
    assert [len(axes.patches) for axes in figure.axes] == [count, 0, 0, 0]
