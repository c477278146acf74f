"""Tables and figures of what passes through the layers: Fig. 7, and the evidence on vanishing gradients (4.1)."""

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns

from replication.report.metrics import gradient_gain, mean_residual, mean_response
from replication.report.tables import conditions_of, group, spread
from replication.runs.records import ended

WORDS = {
    "response": "mean response",
    "gain_start": "gradient ratio: at the start",
    "gain_least": "lowest afterwards",
    "gain_most": "highest afterwards",
    "weights": "largest growth of weights",
    "variance": "least variance entering",
    "residual": "residual functions relative to shortcuts",
}


def table(records):
    """What the layers of each net show: a row for each net, every number the mean over its runs.

    Columns: net; n, the number of runs; response, the mean over all 3x3 layers of the standard deviation of their
    responses at the end of training (Fig. 7); gain_start, gain_least and gain_most, the norm of the gradients of the
    first five 3x3 layers relative to the last five, at the start and, its lowest and its highest value, afterwards;
    weights, by what factor the weights of any layer grew at most; variance, the least of any 3x3 layer's input;
    residual, the mean size of a residual function relative to what the shortcut passes on, at the end. For each also
    ``_std``, the standard deviation over the runs, and ``_values``, those of all runs as text.
    """
    rows = []
    for record in _measured(records):
        layers = record.layers[record.layers["kind"] == "3x3 conv"]
        start, end = (layers[layers["iteration"] == time] for time in (0, layers["iteration"].max()))
        gains = gradient_gain(layers)
        rows.append(
            {
                "net": record.net,
                "response": mean_response(layers),
                "gain_start": gains.iloc[0],
                "gain_least": gains.iloc[1:].min(),
                "gain_most": gains.iloc[1:].max(),
                "weights": (end["weight_norm"].to_numpy() / start["weight_norm"].to_numpy()).max(),
                "variance": layers["signal_variance"].min(),
                "residual": mean_residual(layers),
            }
        )
    return pd.DataFrame(group(rows, ["net"], WORDS, ".3g"))


def readable(measured):
    """A table of ``table`` for the eye."""
    shown = {"net": measured["net"], "runs": measured["n"]}
    for name, words in WORDS.items():
        shown[words] = [spread(row, name, ".3g") for row in measured.to_dict("records")]
    return pd.DataFrame(shown)


def figure_7(records):
    """Fig. 7: standard deviations of the responses of all 3x3 layers at the end of training.

    Top: in layer order; bottom: from the largest to the smallest. Plain nets are dashed. Several seeds are shown as
    their mean. Raises ValueError for records of different conditions and for those without layers.
    """
    layers = _mean_layers(records)
    last = layers[(layers["kind"] == "3x3 conv") & (layers["iteration"] == layers["iteration"].max())]
    order = {net: rows["response_std"].to_numpy() for net, rows in last.groupby("net", sort=False)}
    panels = {
        "in the order of the layers": order,
        "from the largest to the smallest": {net: sorted(values, reverse=True) for net, values in order.items()},
    }
    with _style():
        figure, rows = plt.subplots(2, 1, figsize=(7.5, 7), sharex=True, sharey=True)
        for axes, (title, lines) in zip(rows, panels.items(), strict=True):
            _lines(axes, {net: (range(1, len(values) + 1), values) for net, values in lines.items()})
            axes.set(title=title, ylabel="standard deviation")
        rows[-1].set(xlabel="3x3 layer")
        return _with_legend(figure, rows, records)


def gradients(records):
    """Gradient norms by layer, at the start and at the end; and those of the first layers relative to the last."""
    layers = _mean_layers(records)
    layers = layers[layers["kind"] == "3x3 conv"]
    gains = {net: gradient_gain(rows) for net, rows in layers.groupby("net", sort=False)}
    with _style():
        figure, panels = plt.subplots(1, 3, figsize=(16, 5))
        panels[1].sharey(panels[0])
        _at_start_and_end(panels, layers, "gradient_norm", "norm of the gradient", "3x3 layer")
        _lines(panels[2], {net: (rows.index, rows) for net, rows in gains.items()}, log=True)
        panels[2].axhline(1, color="0.4", linewidth=0.8)
        panels[2].set(title="along training", xlabel="iterations", ylabel="first five layers / last five layers")
        panels[2].xaxis.set_major_formatter("{x:,.0f}")
        return _with_legend(figure, panels, records)


def signals(records):
    """Variances of the inputs of blocks, and weight norms of all 3x3 layers, at the start and at the end."""
    layers = _mean_layers(records)
    blocks = layers[layers["name"].str.match(r"layer.*conv1$")]
    with _style():
        figure, panels = plt.subplots(2, 2, figsize=(12, 8), sharex="row", sharey="row")
        _at_start_and_end(panels[0], blocks, "signal_variance", "variance of what enters", "block")
        weights = layers[layers["kind"] == "3x3 conv"]
        _at_start_and_end(panels[1], weights, "weight_norm", "norm of the weights", "3x3 layer")
        return _with_legend(figure, panels.flat, records)


def residuals(records):
    """Size of every residual function relative to what its shortcut passes on, at the start and at the end.

    None where no net is residual.
    """
    layers = _mean_layers(records).dropna(subset="residual_ratio")
    if layers.empty:
        return None
    with _style():
        figure, panels = plt.subplots(1, 2, figsize=(12, 4.5), sharey=True)
        _at_start_and_end(panels, layers, "residual_ratio", "F(x) relative to the shortcut", "block", log=False)
        panels[0].set_ylim(bottom=0)
        return _with_legend(figure, panels, records)


def _measured(records):
    """The records of runs that did not diverge; raises ValueError unless all have their layers measured."""
    conditions_of(records)
    records, diverged = ended(records)
    if not records:
        raise ValueError(f"all runs of {', '.join(diverged)} diverged: there are no layers to show")
    without = [record.run.id for record in records if record.layers.empty]
    if without:
        raise ValueError(
            f"{', '.join(without)}: recorded before layers were measured; remove its folder to train it again"
        )
    return records


def _mean_layers(records):
    """The layers of each net at each measurement, averaged over its runs."""
    every = pd.concat([record.layers.assign(net=record.net) for record in _measured(records)])
    return every.groupby(["net", "iteration", "layer", "name", "kind"], sort=False, as_index=False).mean()


def _style():
    return plt.rc_context(sns.axes_style("whitegrid") | sns.plotting_context("notebook", font_scale=1.1))


def _at_start_and_end(panels, layers, column, ylabel, xlabel, log=True):
    times = {"at the start": 0, "at the end": layers["iteration"].max()}
    for axes, (title, time) in zip(panels[:2], times.items(), strict=True):
        shown = layers[layers["iteration"] == time].groupby("net", sort=False)
        _lines(axes, {net: (range(1, len(rows) + 1), rows[column]) for net, rows in shown}, log)
        axes.set(title=title, xlabel=xlabel, ylabel=ylabel)


def _lines(axes, lines, log=None):
    """One line per net, dashed for plain nets. If ``log`` is None, the axis is logarithmic for values far apart."""
    values = pd.concat([pd.Series(y) for _, y in lines.values()])
    if values.max() > 10 * values.median() if log is None else log:
        axes.set_yscale("log")
    for net, (x, y) in lines.items():
        axes.plot(x, y, label=net, linewidth=1.8, linestyle="--" if "plain" in net else "-")


def _with_legend(figure, panels, records):
    """The figure with a colour for each net, one legend for all panels, and its conditions above."""
    nets = list(dict.fromkeys(record.net for record in records))
    colours = dict(zip(nets, sns.color_palette("colorblind", len(nets)), strict=True))
    named = {}
    for line in (line for axes in panels for line in axes.lines if line.get_label() in colours):
        line.set_color(colours[line.get_label()])
        named[line.get_label()] = line
    figure.suptitle(conditions_of(records), fontsize="small", color="0.35")
    figure.tight_layout(w_pad=2)
    columns = len(named) if figure.get_figwidth() > 10 else 3
    figure.legend(
        handles=list(named.values()), loc="upper center", bbox_to_anchor=(0.5, 0), ncol=columns, frameon=False
    )
    plt.close(figure)
    return figure
