"""Error curves: Figs. 1, 4 and 6; errors against depth; and the figure of speeds."""

import pathlib
import re
import zlib

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from sklearn.isotonic import isotonic_regression

from replication.engine.files import write
from replication.paper import PLAIN_READ, TABLE_6, WARMED_UP, YARDSTICKS
from replication.report.tables import ERRORS, KINDS, conditions_of, like_table_6, spelled

STYLE = sns.axes_style("whitegrid") | sns.plotting_context("notebook", font_scale=1.1)
STYLES = {
    "training error": {"linewidth": 1.3, "linestyle": (0, (3, 3))},
    "test error": {"linewidth": 2.6, "linestyle": "solid"},
}
# A colour map for each kind of net, with its ends for the shallowest and the deepest nets; and how far between these
# a depth lies. The deeper, the darker, so that the order of depths also shows in greyscale and to the colour-blind.
COLOURS = {
    "plain": ("gist_heat", 0.85, 0.1),
    "resnet": ("viridis", 0.85, 0),
    "A": ("copper", 0.6, 0.2),  # where it is not the paper's own choice, which has no letter
    "B": ("cool", 0.6, 1),
    "C": ("Greys", 0.8, 1),
    "without warm-up": ("copper", 0.6, 0.2),
}
SHADES = {8: 0, 20: 0.1, 32: 0.27, 44: 0.44, 56: 0.6, 110: 0.78, 152: 0.9, 1202: 1}
OTHERS = {"color": "0.65", "marker": "s", "markersize": 5, "linestyle": ""}  # marks of what others measured
BEST = OTHERS | {"markerfacecolor": "white"}


def save_figure(figure, folder, name):
    """Write ``<name>.png`` and ``<name>.svg``; the same figure always gives the same bytes."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with plt.rc_context({"svg.hashsalt": name}):
        for ending, options in (("png", {}), ("svg", {"metadata": {"Date": None}})):
            options |= {"format": ending, "dpi": 150, "bbox_inches": "tight"}
            write(folder / f"{name}.{ending}", lambda file, options=options: figure.savefig(file, **options))


def colour(net):
    """The colour of a net, the same in all figures: its hue says the kind of net, its shade the depth."""
    parts = re.fullmatch(r"(plain|resnet)-(\d+)(?:-([A-C]))?(?: (.*))?", net)
    if parts is None:  # one's own: any colour, but always the same
        return plt.get_cmap("tab20b")(zlib.crc32(net.encode()) % 20)
    kind, depth, shortcut, start = parts.groups()
    name, shallowest, deepest = COLOURS[start or shortcut or kind]
    shade = np.interp(np.log(int(depth)), np.log(list(SHADES)), list(SHADES.values()))
    return plt.get_cmap(name)(shallowest + shade * (deepest - shallowest))


def label_iterations(axes, last):
    """Label an axis of iterations up to ``last``, in ten thousands from there on, as the paper does."""
    unit, words = (1e4, "iter. (1e4)") if last >= 1e4 else (1, "iterations")
    axes.set_xlabel(words)
    axes.xaxis.set_major_locator(plt.MaxNLocator("auto", steps=[1, 2, 2.5, 5, 10], integer=True))
    axes.xaxis.set_major_formatter(lambda iteration, _: f"{iteration / unit:,g}")


@plt.rc_context(STYLE)
def curves(records, panels, stacked=False):
    """Error curves in the manner of Figs. 1 and 6, one panel for each entry of ``panels``, side by side or stacked.

    ``panels``: titles, each with the names of its nets and the errors to show (keys of ``STYLES``). The training error
    is thin and dashed, the test error bold, over iterations. Several seeds are shown as their mean with a band from the
    lowest to the highest; but one by one, as thin lines, where no run followed the mean: where their training errors
    are more than 10 points apart for a twentieth of the training. Triangles above show where the learning rate was
    divided: grey where it was for all runs, else in the colours of the nets. Nets without a record are left out.
    Raises ValueError for no records, and for records of different conditions: those are not seeds of one another.
    """
    conditions = conditions_of(records)
    histories = _histories(records)
    histories = histories[histories["net"].isin([net for nets, _ in panels.values() for net in nets])]
    training = histories[histories["part"] == "training error"].groupby("net")
    singly = {net for net, rows in training if _far_apart(_runs(rows))}
    rows, columns = (len(panels), 1) if stacked else (1, len(panels))
    figure, grid = plt.subplots(rows, columns, figsize=(6.5 * columns, 5 * rows), sharey=True, squeeze=False)
    last = max(histories["iteration"], default=1)
    top = max(_top(histories[histories["net"].isin(nets)]) for nets, _ in panels.values())
    for axes, (title, (nets, parts)) in zip(grid.flat, panels.items(), strict=True):
        axes.set(ylim=(0, top), xlim=(0, last), ylabel="error (%)")
        axes.set_title(title, pad=14)  # above the triangles
        members = histories[histories["net"].isin(nets)]
        _mark_rates(axes, members)
        _panel(axes, members[members["part"].isin(parts)], nets, singly)
        label_iterations(axes, last)
        axes.yaxis.set_major_locator(plt.MaxNLocator(6, steps=[1, 2, 5, 10]))
    handles = [plt.Line2D([], [], color="0.2", label=part, **STYLES[part]) for part in parts if len(parts) > 1]
    if histories["divided"].any():
        handles.append(plt.Line2D([], [], color="0.5", marker="v", linestyle="", label="learning rate divided"))
    if handles:
        below = {"loc": "upper center", "bbox_to_anchor": (0.5, 0), "ncol": 3 if columns > 1 else 2, "frameon": False}
        figure.legend(handles=handles, **below)
    counts = histories.groupby("net")["seed"].nunique()
    notes = ": mean and range" if set(counts[counts > 1].index) - singly else ""
    notes += "\nthin lines: single runs" if singly else ""
    figure.suptitle(f"{conditions}{notes}", fontsize="small", color="0.35")
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


@plt.rc_context(STYLE)
def figure_depths(records):
    """Test error on CIFAR-10 against depth: one's own runs beside Table 6, and in grey what others measured.

    One's own are the last errors of every run under the paper's conditions; other runs are not shown. A panel for each
    kind of net among the records. Others' marks are hollow for the best epoch, and have bars of one standard deviation.
    """
    own = like_table_6(records)
    kinds = [kind for kind in KINDS if any(record.net.startswith(kind) for record in records)] or ["resnet"]
    figure, panels = plt.subplots(1, len(kinds), figsize=(6.5 * len(kinds), 5), squeeze=False)
    papers = {"black": TABLE_6.errors | {"resnet-110": WARMED_UP[0]}, "0.4": PLAIN_READ}
    for axes, kind in zip(panels[0], kinds, strict=True):
        nets = [net for net in TABLE_6.errors | PLAIN_READ if net.startswith(kind)]
        for number, each in enumerate(YARDSTICKS):
            for place, net in enumerate(nets):
                if net in each.errors:
                    mean, deviation = each.errors[net] if each.runs > 1 else (each.errors[net], None)
                    at, style = (
                        place - 0.3 + 0.6 * number / (len(YARDSTICKS) - 1),
                        BEST if "best" in each.rule else OTHERS,
                    )
                    axes.errorbar(at, mean, deviation, ecolor="0.75", **style)
        for place, net in enumerate(nets):
            for shade, errors in papers.items():
                if net in errors:
                    axes.hlines(errors[net], place - 0.4, place + 0.4, color=shade, linewidth=2)
            values = [record.summary["test_error"] for record in own if record.net == net]
            axes.plot([place] * len(values), values, "o", color=colour(net), markersize=9, markeredgecolor="white")
        axes.set(title=KINDS[kind], xlabel="layers", ylabel="test error (%)")
        axes.set_xticks(range(len(nets)), [net.split("-")[1] for net in nets])
        axes.grid(False, axis="x")
    shown = {
        "ours: every run": {"color": colour("resnet-56"), "marker": "o", "linestyle": "", "markersize": 9},
        "paper (110 layers: mean of five)": {"color": "black", "linewidth": 2},
        "others, last epoch or not stated": OTHERS,
        "others, best epoch, or probably": BEST,
    }
    if "plain" in kinds:
        shown["read off the paper's Fig. 6"] = {"color": "0.4", "linewidth": 2}
    if not own:
        del shown["ours: every run"]
    handles = [plt.Line2D([], [], label=label, **style) for label, style in shown.items()]
    figure.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, 0), ncol=2, frameon=False)
    count = f"{len(own) or 'no'} run{'' if len(own) == 1 else 's'} of ours"
    figure.suptitle(
        f"cifar10, 64,000 iterations: {count}; others also 160 to 200 epochs", fontsize="small", color="0.35"
    )
    figure.tight_layout(w_pad=3)
    plt.close(figure)  # as in ``curves``
    return figure


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
        axes.set(
            title=spelled(net), xlabel="images per second", xlim=(0, 1.4 * max(high for _, _, _, high, *_ in bars))
        )
        axes.set_yticks(range(len(bars)), [name for name, *_ in bars])
        axes.invert_yaxis()
        sns.despine(ax=axes)
    plt.close(figure)  # as in ``curves``
    return figure


def _histories(records):
    """All histories as one long table, with a row for each training error and each test error.

    ``divided``: whether the learning rate was divided behind the row.
    """
    columns = {"var_name": "part", "value_name": "error"}
    parts = [
        record.history.rename(columns=ERRORS)
        .assign(divided=record.history["lr"].diff(-1) > 0)
        .melt(["iteration", "divided"], list(STYLES), **columns)
        .assign(net=record.net, seed=record.run.seed)
        for record in records
    ]
    return pd.concat(parts, ignore_index=True).dropna(subset="error")


def _runs(rows):
    """The errors of a net, a row for each iteration and a column for each run.

    Runs are not all recorded at the same iterations where a warm-up ended at different times.
    """
    runs = rows.pivot_table(index="iteration", columns="seed", values="error")
    return runs.interpolate("index", limit_area="inside")


def _far_apart(runs):
    return (runs.max(axis=1) - runs.min(axis=1) > 10).mean() >= 0.05


def _top(shown):
    """The upper end of the error axis: like the paper's, it leaves out the first part of training.

    The paper's 20 % for long runs, if most nets end below that. Else it includes every net's median error shortly
    before the rate is first divided, and every run's final error.
    """
    part = shown["iteration"] / shown["iteration"].max()
    ends = shown[part == 1]
    if shown["iteration"].max() >= 1e4 and ends.groupby("net")["error"].max().median() < 20:
        return 20
    middle = shown[part.between(0.3, 0.5)].groupby(["net", "part"])["error"].median().max()
    return min(100, pd.Series([20, 1.15 * middle, 1.05 * ends["error"].max()]).max())


def _mark_rates(axes, histories):
    """Mark where the rate was divided: in grey for all runs, else in the colour of each net."""
    count = histories.groupby(["net", "seed"]).ngroups
    for iteration, rows in histories[histories["divided"]].groupby("iteration"):
        runs = rows.drop_duplicates(["net", "seed"])
        for mark in ["0.5"] if len(runs) == count else map(colour, runs["net"]):
            where = {"transform": axes.get_xaxis_transform(), "clip_on": False}
            axes.scatter(iteration, 1.02, color=[mark], marker="v", s=30, **where)


def _panel(axes, histories, nets, singly):
    """Draw the nets, with their names at the ends of their curves.

    What lies below another curve still shows: each bold line is wider than the next one, dashes fill others' gaps.
    """
    nets, ends, (low, high) = [net for net in nets if net in set(histories["net"])], {}, axes.get_ylim()
    widths = np.linspace(3.4, 2.2, len(nets)) if len(nets) > 1 else [STYLES["test error"]["linewidth"]]
    for place, (net, width) in enumerate(zip(nets, widths, strict=True)):
        for part, rows in histories[histories["net"] == net].groupby("part", sort=False):
            runs, style = _runs(rows), {"color": colour(net), "zorder": 2} | STYLES[part]
            if part == "test error":
                style["linewidth"] = 1.2 if net in singly else width
            else:
                style["linewidth"] = 0.8 if net in singly else style["linewidth"]
                dash = 4 / style["linewidth"]  # in widths of the line
                style |= {"linestyle": (2 * dash * place / len(nets), (dash, dash)), "zorder": 2.5}
            if net in singly:
                axes.plot(runs.index, runs, **style)
            else:
                axes.plot(runs.index, runs.mean(axis=1), **style)
                if runs.shape[1] > 1:
                    edges = runs.min(axis=1), runs.max(axis=1)
                    axes.fill_between(runs.index, *edges, color=colour(net), alpha=0.2, linewidth=0)
            final = runs.iloc[-1].dropna()
            ends[net] = (runs.index[-1], list(final) if net in singly else [final.mean()])
    means = {net: sum(final) / len(final) for net, (_, final) in ends.items()}
    for net, place in _apart({net: min(mean, high) for net, mean in means.items()}, low, high).items():
        name = spelled(net) if means[net] <= high else f"{spelled(net)}: {means[net]:.0f} %"
        text = {"va": "center", "color": colour(net), "weight": "bold", "fontsize": "small"}
        text |= {"xytext": (1.04, place), "textcoords": ("axes fraction", "data"), "annotation_clip": False}
        line = {"arrowstyle": "-", "color": colour(net), "relpos": (0, 0.5), "shrinkA": 3, "shrinkB": 0}
        last, final = ends[net]
        for number, end in enumerate(final):  # one name, and a line to each end
            axes.annotate("" if number else name, (last, min(end, high)), arrowprops=line, **text)


def _apart(ends, low, high):
    """Heights of the labels: as near to the ends of the curves as they can be without overlap, within the axis."""
    order = sorted(ends, key=ends.get)
    gap = min(0.055, 1 / max(1, len(order))) * (high - low)
    offsets = gap * np.arange(len(order))
    fitted = isotonic_regression([ends[net] for net in order] - offsets) if order else offsets
    return dict(zip(order, np.clip(fitted, low, high - offsets[-1:].sum()) + offsets, strict=True))
