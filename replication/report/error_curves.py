"""Error curves: Figs. 1, 4 and 6; and the figure of speeds."""

import pathlib

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns

from replication.engine.files import write
from replication.report.tables import ERRORS, KINDS, conditions_of

STYLE = sns.axes_style("whitegrid") | sns.plotting_context("notebook", font_scale=1.1)
STYLES = {
    "training error": {"linewidth": 1.3, "linestyle": (0, (4, 2))},
    "test error": {"linewidth": 2.6, "linestyle": "solid"},
}


def save_figure(figure, folder, name):
    """Write ``<name>.png`` and ``<name>.svg``; the same figure always gives the same bytes."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with plt.rc_context({"svg.hashsalt": name}):
        for ending, options in (("png", {}), ("svg", {"metadata": {"Date": None}})):
            options |= {"format": ending, "dpi": 150, "bbox_inches": "tight"}
            write(folder / f"{name}.{ending}", lambda file, options=options: figure.savefig(file, **options))


@plt.rc_context(STYLE)
def curves(records, panels, stacked=False):
    """Error curves in the manner of Figs. 1 and 6, one panel for each entry of ``panels``, side by side or stacked.

    ``panels``: titles, each with the names of its nets and the errors to show (keys of ``STYLES``). The training error
    is thin and dashed, the test error bold, over iterations; several seeds are shown as their mean with a band from the
    lowest to the highest. Nets without a record are left out.
    Raises ValueError for no records, and for records of different conditions: those are not seeds of one another.
    """
    conditions = conditions_of(records)
    histories = _histories(records)
    run = set(histories["net"])
    rows, columns = (len(panels), 1) if stacked else (1, len(panels))
    figure, grid = plt.subplots(rows, columns, figsize=(6.5 * columns, 5 * rows), sharey=True, squeeze=False)
    top = max(_top(histories[histories["net"].isin(nets)]) for nets, _ in panels.values())
    for axes, (title, (nets, parts)) in zip(grid.flat, panels.items(), strict=True):
        axes.set(title=title, ylim=(0, top), xlim=(0, max(histories["iteration"], default=1)))
        _panel(axes, histories[histories["part"].isin(parts)], [net for net in nets if net in run])
        axes.set(xlabel="iterations", ylabel="error (%)")
        axes.xaxis.set_major_locator(plt.MaxNLocator("auto", steps=[1, 2, 2.5, 5, 10], integer=True))
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.yaxis.set_major_locator(plt.MaxNLocator(6, steps=[1, 2, 5, 10]))
    if len(parts) > 1:
        axes.legend(handles=[plt.Line2D([], [], color="0.2", label=part, **STYLES[part]) for part in parts])
    bands = "" if histories.groupby("net")["seed"].nunique().max() <= 1 else ": mean and range"
    figure.suptitle(f"{conditions}{bands}", fontsize="small", color="0.35")
    figure.tight_layout(w_pad=3)
    plt.close(figure)  # the notebook shows what the function returns, once
    return figure


def figure_1(records, shallow="plain-20", deep="plain-56"):
    """Fig. 1: training error (left) and test error (right) of a shallow and a deep plain net."""
    return curves(records, {part: ((shallow, deep), (part,)) for part in STYLES})


def figure_6(records, panels, stacked=False):
    """Fig. 6: training and test error of several nets; ``panels``: titles, each with the names of its nets."""
    return curves(records, {title: (nets, tuple(STYLES)) for title, nets in panels.items()}, stacked)


def figure_4(records):
    """Fig. 4: training error and, bold, the validation error of the centre crop; plain nets left, residual nets right.

    Shows the nets of 18 and 34 layers as far as they were run; where none was, whatever was run.
    """
    nets = list(dict.fromkeys(record.net for record in records))
    panels = by_kind(records, (18, 34)) or {"not in the paper's figure": nets}
    shown = [net for nets in panels.values() for net in nets]
    return figure_6([record for record in records if record.net in shown], panels)


def by_kind(records, depths):
    """Panels of the plain and of the residual nets with these depths, the paper's own variants, as far as they ran."""
    run, panels = {record.net for record in records}, {}
    for kind, words in KINDS.items():
        if nets := [net for net in (f"{kind}-{depth}" for depth in depths) if net in run]:
            panels[words] = nets
    return panels


def speeds(table):
    """Images per second of the common loop and of ours, a panel for each net; ``table`` as of ``benchmark.summarized``.

    Bars are medians, lines run from the slowest round to the fastest.
    """
    nets = list(table["net"].unique())
    figure, panels = plt.subplots(1, len(nets), figsize=(4.2 * len(nets), 2.4), squeeze=False, layout="constrained")
    for axes, net in zip(panels[0], nets, strict=True):
        group = table[table["net"] == net]
        bars = [("common loop", *group.iloc[0][["common", "common_min", "common_max"]], "", "0.6")]
        for row, colour in zip(group.itertuples(), sns.color_palette("Blues", 4)[1::2], strict=False):
            bars.append((f"ours, {row.precision}", row.ours, row.ours_min, row.ours_max, f"{row.ratio:.1f}x", colour))
        for place, (_, middle, low, high, ratio, colour) in enumerate(bars):
            axes.barh(place, middle, xerr=[[middle - low], [high - middle]], color=colour, ecolor="0.2", height=0.7)
            style = {"textcoords": "offset points", "va": "center", "fontsize": 10}
            axes.annotate(f"{middle:,.0f}  {ratio}", (high, place), (5, 0), **style)
        axes.set(title=net, xlabel="images per second", xlim=(0, 1.4 * max(high for _, _, _, high, *_ in bars)))
        axes.set_yticks(range(len(bars)), [name for name, *_ in bars])
        axes.invert_yaxis()
        sns.despine(ax=axes)
    plt.close(figure)  # as in ``curves``
    return figure


def _histories(records):
    """All histories as one long table, with a row for each training error and each test error."""
    columns = {"var_name": "part", "value_name": "error"}
    parts = [
        record.history.rename(columns=ERRORS)
        .melt("iteration", list(STYLES), **columns)
        .assign(net=record.net, seed=record.run.seed)
        for record in records
    ]
    return pd.concat(parts, ignore_index=True).dropna(subset="error")


def _top(shown):
    """The upper end of the error axis: like the paper's, it leaves out the first part of training.

    It includes every net's median error shortly before the rate is first divided, and every run's final error.
    """
    part = shown["iteration"] / shown["iteration"].max()
    middle = shown[part.between(0.3, 0.5)].groupby(["net", "part"])["error"].median().max()
    return min(100, pd.Series([20, 1.15 * middle, 1.05 * shown["error"][part == 1].max()]).max())


def _panel(axes, histories, nets):
    """Draw the nets from light (first) to dark (last), so that their order also shows in greyscale."""
    last = max(1, len(nets) - 1)
    colours = {net: plt.get_cmap("viridis")(0.65 * (1 - place / last)) for place, net in enumerate(nets)}
    ends = {}
    for net in nets:
        for part, rows in histories[histories["net"] == net].groupby("part", sort=False):
            options = {"errorbar": ("pi", 100), "color": colours[net], "ax": axes} | STYLES[part]
            sns.lineplot(rows, x="iteration", y="error", **options)
            ends[net] = rows.loc[rows["iteration"] == rows["iteration"].max(), "error"].mean()
    for net, place in _apart(ends, *axes.get_ylim()).items():
        text = {"va": "center", "color": colours[net], "weight": "bold", "fontsize": "small"}
        axes.annotate(net, (1.01, place), xycoords=("axes fraction", "data"), annotation_clip=False, **text)


def _apart(ends, low, high):
    """Heights of the labels: at the ends of the curves, moved up where two would overlap, within the axis."""
    gap, place, places = 0.055 * (high - low), low - high, {}
    order = sorted(ends, key=ends.get)
    for number, net in enumerate(order):
        highest = high - gap * (len(order) - 1 - number)
        place = max(place + gap, min(ends[net], highest))
        places[net] = place
    return places
