"""Tables and figures of what passes through the layers: Fig. 7, and the evidence on vanishing gradients (4.1)."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from replication.report.error_curves import STYLE, colour, label_iterations
from replication.report.metrics import gradient_gain, least_variance, mean_residual, mean_response
from replication.report.tables import conditions_of, group, spelled, spread
from replication.runs.records import ended


def _growth(record):
    """By what factor the weights of any 3x3 layer grew at most."""
    norms = record.layers[record.layers["kind"] == "3x3 conv"].pivot(index="layer", columns="iteration")["weight_norm"]
    return (norms[norms.columns.max()] / norms[0]).max()


COLUMNS = {
    "response": ("mean response", mean_response),
    "gain_start": ("gradient ratio: at the start", lambda record: gradient_gain(record.layers).iloc[0]),
    "gain_least": ("lowest afterwards", lambda record: gradient_gain(record.layers).iloc[1:].min()),
    "gain_most": ("highest afterwards", lambda record: gradient_gain(record.layers).iloc[1:].max()),
    "weights": ("largest growth of weights", _growth),
    "variance": ("least variance entering", least_variance),
    "residual": ("residual functions relative to shortcuts", mean_residual),
}


def table(records):
    """What the layers of each net show: a row for each net, every number the mean over its runs.

    Columns: net; n, the number of runs; and those of ``COLUMNS``: response, as in Fig. 7; gain_start, gain_least and
    gain_most, the norm of the gradients of the first five 3x3 layers relative to the last five, at the start and, its
    lowest and its highest value, afterwards; weights, their largest growth; variance, the least of any 3x3 layer's
    input; residual, the mean size of a residual function relative to its shortcut, at the end. For each also ``_std``,
    the standard deviation over the runs, and ``_values``, those of all runs as text.
    """
    rows = [
        {"net": record.net} | {name: of(record) for name, (_, of) in COLUMNS.items()} for record in _measured(records)
    ]
    return pd.DataFrame(group(rows, ["net"], COLUMNS, ".3g"))


def readable(measured):
    """A table of ``table`` for the eye."""
    shown = {"net": measured["net"].map(spelled), "runs": measured["n"]}
    for name, (words, _) in COLUMNS.items():
        shown[words] = [spread(row, name, ".3g") for row in measured.to_dict("records")]
    return pd.DataFrame(shown)


@plt.rc_context(STYLE)
def figure_7(records):
    """Fig. 7: standard deviations of the responses of all 3x3 layers at the end of training.

    Top: in layer order; bottom: from the largest to the smallest. Plain nets are dashed. Several seeds are shown as
    their mean. The axis is linear as in the paper, and ends at three times the median; a line in the figure says what
    lies above. Raises ValueError for records of different conditions and for those without layers.
    """
    layers = _mean_layers(records, "3x3 conv")
    at_end = layers[layers["iteration"] == layers["iteration"].max()]
    last, values = at_end.groupby("net", sort=False)["response_std"], at_end["response_std"].dropna()
    figure, (above, below) = plt.subplots(2, 1, figsize=(7.5, 7), sharex=True, sharey=True)
    _lines(above, {net: (range(1, len(rows) + 1), rows) for net, rows in last})
    _lines(below, {net: (range(1, len(rows) + 1), rows.sort_values(ascending=False)) for net, rows in last})
    top = min(1.05 * values.max(), 3 * values.median()) if len(values) else 1  # none: nets of one's own alone
    above.set(title="in the order of the layers", ylabel="standard deviation", ylim=(0, top))
    notes = [_beyond(net, rows, top) for net, rows in last if (rows > top).any()]
    below.text(0.98, 0.95, "\n".join(notes), transform=below.transAxes, ha="right", va="top", fontsize="small")
    below.set(title="from the largest to the smallest", ylabel="standard deviation", xlabel="3x3 layer")
    return _with_legend(figure, records)


@plt.rc_context(STYLE)
def gradients(records):
    """Gradient norms by layer, at the start and at the end; and those of the first layers relative to the last."""
    layers = _mean_layers(records, "3x3 conv")
    gains = {net: gradient_gain(rows) for net, rows in layers.groupby("net", sort=False)}
    figure, (start, end, along) = plt.subplots(1, 3, figsize=(16, 5))
    end.sharey(start)
    _at_start_and_end((start, end), layers, "gradient_norm", "norm of the gradient", "3x3 layer")
    _lines(along, {net: (rows.index, rows) for net, rows in gains.items()}, log=True)
    along.axhline(1, color="0.4", linewidth=0.8)
    along.set(title="along training", ylabel="first five layers / last five layers")
    label_iterations(along, layers["iteration"].max())
    return _with_legend(figure, records)


@plt.rc_context(STYLE)
def signals(records):
    """Variances of the inputs of blocks, and weight norms of all 3x3 layers, at the start and at the end."""
    layers = _mean_layers(records)
    blocks = layers[layers["name"].str.match(r"layer.*conv1$")]
    figure, panels = plt.subplots(2, 2, figsize=(12, 8), sharex="row", sharey="row")
    _at_start_and_end(panels[0], blocks, "signal_variance", "variance of what enters", "block")
    _at_start_and_end(panels[1], _mean_layers(records, "3x3 conv"), "weight_norm", "norm of the weights", "3x3 layer")
    return _with_legend(figure, records)


@plt.rc_context(STYLE)
def residuals(records):
    """Size of every residual function relative to what its shortcut passes on, at the start and at the end.

    None where no net is residual.
    """
    layers = _mean_layers(records).dropna(subset="residual_ratio")
    if layers.empty:
        return None
    figure, panels = plt.subplots(1, 2, figsize=(12, 4.5), sharey=True)
    _at_start_and_end(panels, layers, "residual_ratio", "F(x) relative to the shortcut", "block", log=False)
    panels[0].set_ylim(bottom=0)
    return _with_legend(figure, records)


def _measured(records):
    """The records of runs that did not diverge; raises ValueError unless all have their layers measured."""
    conditions_of(records)
    records, diverged = ended(records)
    if not records:
        raise ValueError(f"all runs of {', '.join(diverged)} diverged: there are no layers to show")
    without = ", ".join(record.run.id for record in records if not (record.layers["kind"] == "3x3 conv").any())
    if without:
        raise ValueError(
            f"{without}: recorded before layers were measured, or a net without 3x3 layers; remove its folder to train "
            "it again, or leave it out"
        )
    return records


def _mean_layers(records, kind=""):
    """The layers of each net at each measurement, of one kind or all, averaged over its runs."""
    every = pd.concat([record.layers.assign(net=record.net) for record in _measured(records)])
    every = every[every["kind"].str.startswith(kind)]
    return every.groupby(["net", "iteration", "layer", "name", "kind"], sort=False, as_index=False).mean()


def _beyond(net, rows, top):
    """What of a net's line lies above the axis, in words."""
    count = (rows > top).sum()
    layers = f"{count} layer{'s' if count > 1 else ''} of {spelled(net)}"
    return f"not shown: {layers} above {top:.1f}, up to {rows.max():.3g}"


def _at_start_and_end(panels, layers, column, ylabel, xlabel, log=True):
    times = {"at the start": 0, "at the end": layers["iteration"].max()}
    for axes, (title, time) in zip(panels, times.items(), strict=True):
        shown = layers[layers["iteration"] == time].groupby("net", sort=False)[column]
        _lines(axes, {net: (range(1, len(rows) + 1), rows) for net, rows in shown}, log)
        axes.set(title=title, xlabel=xlabel, ylabel=ylabel)


def _lines(axes, lines, log=False):
    """One line per net, dashed for plain nets. What lies below another line still shows: each is wider than the next
    one, and dashes are on top."""
    if log and lines:  # none where there are only nets of one's own whose layers have other names
        axes.set_yscale("log")
    for (net, (x, y)), width in zip(lines.items(), np.linspace(3, 1.4, len(lines)), strict=True):
        plain = net.startswith("plain-")
        style = {"linestyle": "--", "zorder": 2.5, "linewidth": 1.8} if plain else {"linewidth": width}
        axes.plot(x, y, label=spelled(net), color=colour(net), **style)


def _with_legend(figure, records):
    """The figure with one legend for all panels, and its conditions above."""
    lines = {line.get_label(): line for axes in figure.axes for line in axes.get_legend_handles_labels()[0]}
    figure.suptitle(conditions_of(records), fontsize="small", color="0.35")
    figure.tight_layout(w_pad=2)
    columns = len(lines) if figure.get_figwidth() > 10 else 2 if len(lines) == 4 else 3
    options = {"loc": "upper center", "bbox_to_anchor": (0.5, 0), "frameon": False}
    figure.legend(handles=list(lines.values()), ncol=columns, **options)
    plt.close(figure)
    return figure
