"""Tables 7 and 8, ours beside the paper's; what detectors find, in pictures; and their losses."""

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns

from replication.paper import TABLE_7, TABLE_8
from replication.report import tables
from replication.report.error_curves import STYLE
from replication.report.tables import caution, group, spread
from replication.runs.records import CONDITIONS, SHOWN, ended

# By table: ours, by its name in a run's summary, and what the paper prints.
COLUMNS = {
    7: (TABLE_7, {"map_voc07": "mAP@.5, VOC's 11 points", "map_voc": "mAP@.5, area"}, ("VOC 2007", "VOC 2012")),
    8: (TABLE_8, {"map_50": "mAP@.5", "map_50_95": "mAP@[.5, .95]"}, ("mAP@.5", "mAP@[.5, .95]")),
}
LOSSES = {
    "train_loss": "sum of the losses",
    "loss_objectness": "proposals: object or not",
    "loss_rpn_box_reg": "proposals: boxes",
    "loss_classifier": "regions: classes",
    "loss_box_reg": "regions: boxes",
}
CONFIDENT = 0.5  # lowest score of the detections that are drawn


def precisions(records, number):
    """Table 7 or 8: the precisions of detectors in percent, ours over n runs beside the paper's.

    A row for each net and condition, and for the paper's nets even without a record. ``comparable`` as in ``errors``.
    """
    published, ours, _ = COLUMNS[number]
    runs = [
        {"net": record.net} | record.conditions | record.summary | {"diverged": record.diverged is not None}
        for record in records
    ]
    runs = [dict.fromkeys(["seconds", *ours]) | run for run in runs]
    rows = group(runs, ["net", *CONDITIONS], [*ours, "parameters", "seconds"])
    rows += [{"net": net, "n": 0} for net in published.errors if net not in {row["net"] for row in rows}]
    pairs = [published.errors.get(row["net"], (None, None)) for row in rows]
    theirs = {f"paper_{place}": [pair[place] for pair in pairs] for place in (0, 1)}
    return tables.tabulated(rows, "parameters", ours, theirs, published)


def readable(table, number):
    """A table of ``precisions`` for the eye."""
    _, ours, theirs = COLUMNS[number]
    differing = [name for name in CONDITIONS if table[name].nunique() > 1]
    shown = {"detector": table["net"]} | {name: table[name].map(tables.number) for name in ["parameters", *differing]}
    shown["runs"] = table["n"]
    rows = table.to_dict("records")
    for name, words in ours.items():
        shown[f"ours: {words} %"] = ["not run" if row["n"] == 0 else spread(row, name) for row in rows]
    for place, words in enumerate(theirs):
        shown[f"paper: {words} %"] = table[f"paper_{place}"].map(tables.number)
    return pd.DataFrame(shown)


def note(table):
    """What must stand under a table of ``precisions``."""
    return caution(table).replace("these errors mean nothing", "these precisions say nothing about the paper")


@plt.rc_context(STYLE)
def losses(records):
    """The losses of detectors along training, a panel for each: means over the images since the point before."""
    finite, _ = ended(records)
    figure, panels = plt.subplots(1, len(LOSSES), figsize=(4 * len(LOSSES), 3.6), layout="constrained")
    nets = list(dict.fromkeys(record.net for record in finite))
    palette = "colorblind" if len(nets) <= 10 else "husl"  # the first would begin again
    colours = dict(zip(nets, sns.color_palette(palette, len(nets)), strict=True))
    for axes, (name, words) in zip(panels, LOSSES.items(), strict=True):
        for record in finite:
            axes.plot(record.history["iteration"], record.history[name], color=colours[record.net], linewidth=1.3)
        axes.set(title=words, xlabel="iteration", ylim=(0, None))
    for net, colour in colours.items():
        panels[0].plot([], [], color=colour, label=net)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    plt.close(figure)  # as in ``curves``
    return figure


def pictures(records, dataset, count=4):
    """The first test images with objects: what there is, and what the first run of each net detects with confidence.

    They are of the ``SHOWN`` images that records have detections of; where too few have objects, others follow.
    dataset: the ``DetectionSet`` of the records. Dashed boxes are of objects that do not count as missed.
    """
    first = {record.net: record for record in reversed(records)}
    nets = list(dict.fromkeys(record.net for record in records))
    labels = dataset.test.labels[:SHOWN]
    places = sorted(range(len(labels)), key=lambda place: not len(labels[place].labels))[:count]
    colours = dict(zip(dataset.classes, sns.color_palette("husl", len(dataset.classes)), strict=True))
    size = (3.2 * (1 + len(nets)), 3 * len(places))
    figure, panels = plt.subplots(len(places), 1 + len(nets), figsize=size, layout="constrained", squeeze=False)
    for row, place in zip(panels, places, strict=True):
        path, objects = dataset.test.paths[place], dataset.test.labels[place]
        for axes in row:
            axes.imshow(dataset.read(path).permute(1, 2, 0).numpy())
            axes.set_axis_off()
        for box, label, ignored, _ in zip(*objects, strict=True):
            name = dataset.classes[label]
            _draw(row[0], box, name, colours[name], "dashed" if ignored else "solid")
        for axes, net in zip(row[1:], nets, strict=True):
            found = first[net].detections
            for each in found[(found["image"] == path) & (found["score"] >= CONFIDENT)].itertuples():
                box = (each.left, each.top, each.right, each.bottom)
                _draw(axes, box, f"{each.label} {each.score:.2f}", colours[each.label], "solid")
    for axes, title in zip(panels[0], ["the objects", *nets], strict=True):
        axes.set_title(title, fontsize=9)
    plt.close(figure)
    return figure


def _draw(axes, box, text, colour, line):
    left, top, right, bottom = box
    shape = plt.Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor=colour, lw=2, ls=line)
    axes.add_patch(shape)
    where = {"xy": (left, top), "ha": "left", "va": "bottom" if top > 15 else "top"}
    axes.annotate(text, **where, fontsize=8, bbox={"facecolor": colour, "edgecolor": "none", "pad": 1, "alpha": 0.85})
