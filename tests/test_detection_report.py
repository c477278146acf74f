"""Tables 7 and 8, and figures of detectors, from records."""

import numpy as np
import pandas as pd
import pytest

from replication import data, paper, report
from replication.report import detections
from replication.runs import records as kept

SMALL, VGG = "faster-rcnn-resnet-18-quarter", "faster-rcnn-vgg-16-quarter"


@pytest.fixture
def detect(make):
    def write(net, seed=0, **precisions):
        found = {"train_error": None, "test_error": None, "map_voc07": 50.0, "map_voc": 51.0}
        found |= {"map_50": 52.0, "map_50_95": 30.0} | precisions
        return make(0, 0, net=net, dataset="voc-smoke", seed=seed, more=found)

    return write


def test_the_papers_tables():
    """Its printed numbers, and their differences: 3.2 points in Table 7, 6.0 in Table 8, where they are 28 % more."""
    for table, gain in ((paper.TABLE_7, (3.2, 3.4)), (paper.TABLE_8, (6.9, 6.0))):
        vgg, resnet = table.errors["faster-rcnn-vgg-16"], table.errors["faster-rcnn-resnet-101"]
        assert np.subtract(resnet, vgg) == pytest.approx(gain)
    assert round(27.2 / 21.2, 2) == 1.28


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
