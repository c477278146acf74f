"""Tables, curves, drawings and findings, made from the paper's numbers and the runs' records alone."""

import pathlib

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from markupsafe import escape
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from matplotlib.path import Path

from replication.files import write
from replication.paper import TABLE_6
from replication.records import CONDITIONS, in_words
from replication.verdicts import scorecard as scorecard  # offered here, too

KINDS = {"plain": "plain nets", "resnet": "residual nets"}
ERRORS = {"train_error": "training error", "test_error": "test error"}
TESTED = {"top1": "top-1 error", "top5": "top-5 error"}
LOOKS = [
    {"selector": "caption", "props": "caption-side: bottom; text-align: left; padding-top: 0.5em"},
    {"selector": "td", "props": "white-space: nowrap"},
]
STYLES = {
    "training error": {"linewidth": 1.3, "linestyle": (0, (4, 2))},
    "test error": {"linewidth": 2.6, "linestyle": "solid"},
}


def errors(records, nets=(), published=TABLE_6, others=()):
    """One row for each net and condition: mean and standard deviation of its errors over n seeds, beside the paper's.

    Errors are in percent; ``train_error`` is the mean over the batches of the history's last row, a hundredth of a
    full run, as they were trained on. A deviation is empty for a single run. ``nets``: names that get a row even
    without a record. ``others``: rows of their own, as of ``evaluate.errors_of_others``.
    ``comparable`` says whether a row was measured under the paper's conditions, ``diverged`` how many of the n runs
    did: these are left out of the means.
    """
    rows = _means(records, _ended, ERRORS)
    rows += [{"net": net, "n": 0} for net in nets if net not in {row["net"] for row in rows}]
    rows += [dict(other) | {"n": 1} for other in others]
    spreads = [name for error in ERRORS for name in (error, f"{error}_std")]
    table = pd.DataFrame(rows, columns=["net", "parameters", *CONDITIONS, "n", "diverged", *spreads, "seconds"])
    table["diverged"] = table["diverged"].fillna(0)
    whole = ("parameters", "iterations", "holdout", "group", "diverged")
    table = table.astype(dict.fromkeys(whole, "Int64"))
    alike = [published.conditions is not None and published.conditions.items() <= row.items() for row in rows]
    paper_errors = table["net"].map(published.errors).astype(float)
    return table.assign(paper_error=paper_errors, paper=published.title, comparable=alike)


def _ended(record):
    """The summary of a record; without times where it ended too soon."""
    diverged = record.diverged is not None
    return record.summary | {"diverged": diverged} | ({"seconds": None} if diverged else {})


def _means(records, measured, names):
    """A row for each net and condition: number of runs, mean and deviation of what is ``measured(record)``."""
    rows = []
    if records:
        every = pd.DataFrame([{"net": record.net} | record.conditions | measured(record) for record in records])
        for values, group in every.groupby(["net", *CONDITIONS], sort=False):
            row = dict(zip(["net", *CONDITIONS], values, strict=True)) | {"n": len(group)}
            for name in names:
                values = group[name].astype(float)
                row |= {name: values.mean(), f"{name}_std": values.std()}
            if "diverged" in group:
                row["diverged"] = int(group["diverged"].sum())
            rows.append(
                row | {name: group[name].astype(float).mean() for name in ("parameters", "seconds") if name in group}
            )
    return rows


def tested(records, evaluations, published):
    """Tables 2 to 5: top-1 and top-5 errors in percent in the table's own way of testing, beside the paper's.

    evaluations: as ``evaluate.evaluations`` gives them. One row for each net of the paper's table, run or not (``n`` is
    the number of runs tested), then one for each of the weights of others.
    ``comparable`` says whether a row was measured under the paper's conditions.
    """
    way, names = published.way, ("top1", "top5")
    done = [record for record in records if way in evaluations.get(record.run.id, {})]

    def measured(record):
        return {name: evaluations[record.run.id][way][name] for name in names}

    rows = _means(done, measured, names)
    rows = [row for row in rows if row["net"] in published.errors]
    own, single = {record.run.id: record for record in records}, "ensemble" not in published.errors
    for label, found in evaluations.items():
        if label not in own and way in found and single == (label != "ensemble"):
            members = [own[name] for name in found.get("members") or ()]
            conditions = [member.conditions for member in members]
            alike = {name: conditions[0][name] for name in CONDITIONS if len({c[name] for c in conditions}) == 1}
            rows.append(alike | {"net": label, "n": 1, "members": ", ".join(m.net for m in members), **found[way]})
    present = {row["net"] for row in rows}
    rows += [{"net": net, "n": 0} for net in published.errors if net not in present]
    place = {net: number for number, net in enumerate(published.errors)}
    rows.sort(key=lambda row: place.get(row["net"], len(place)))
    columns = ["net", "members", *CONDITIONS, "n", "top1", "top1_std", "top5", "top5_std"]
    table = pd.DataFrame(rows, columns=columns).astype({"iterations": "Int64", "holdout": "Int64", "group": "Int64"})
    for number, name in enumerate(names):
        table[f"paper_{name}"] = [published.errors.get(net, (None, None))[number] for net in table["net"]]
    table = table.astype(dict.fromkeys([*columns[-4:], "paper_top1", "paper_top5"], float))
    images = max((found["images"] for found in evaluations.values() if way in found), default=0)
    wanted = published.conditions
    alike = [images == 50_000 and wanted is not None and wanted.items() <= row.items() for row in rows]
    return table.assign(images=images, comparable=alike)


def _runs(table):
    """The rows of a table that stand for runs: neither nets not yet run nor weights of others."""
    return table[(table["n"] > 0) & table["dataset"].notna()]


def described(table):
    """The conditions of a table's runs in words: "digits, recipe digits, 1,100 iterations, float32, 1 run per net"."""
    table = _runs(table)
    parts = map(in_words, table[[*CONDITIONS]].drop_duplicates().to_dict("records"))
    low, high = table["n"].min(), table["n"].max()
    runs = f"{low}" if low == high else f"{low} to {high}"
    return "; ".join(parts) + f", {runs} run{'' if high == 1 else 's'} per net"


def readable(table, published=TABLE_6):
    """A table of ``errors`` or ``tested`` for the eye: mean ± standard deviation, the paper's errors beside ours.

    Conditions that differ between its rows are columns, too.
    """
    shown = {"net": table["net"]}
    if "parameters" in table:
        shown["parameters"] = [_number(count) for count in table["parameters"]]
    for name in CONDITIONS:
        if table[name].nunique() > 1:
            shown[name] = [_number(value) for value in table[name]]
    shown["runs"] = [n if ours else "–" for n, ours in zip(table["n"], _trained_here(table), strict=True)]
    if "diverged" in table and table["diverged"].any():
        shown["diverged"] = list(table["diverged"])
    for error, words in (TESTED if "top1" in table else ERRORS).items():
        lost = (table["n"] > 0) & (table["n"] == table["diverged"]) if "diverged" in table else [False] * len(table)
        rows = zip(table[error], table[f"{error}_std"], table["n"], table["net"], lost, strict=True)
        shown[f"ours: {words} %"] = [_with_spread(*row) for row in rows]
        if f"paper_{error}" in table and table[f"paper_{error}"].notna().any():
            shown[f"paper: {words} %"] = [_number(value) for value in table[f"paper_{error}"]]
    if "paper_error" in table:
        shown[published.title] = [_number(error) for error in table["paper_error"]]
    return pd.DataFrame(shown)


def _trained_here(table):
    """Whether a row stands for runs of ours, done or not: not so nets of others."""
    return table["dataset"].notna() | ((table["n"] == 0) & table["net"].map(_ours))


def _ours(net):
    return net == "ensemble" or net.startswith(tuple(KINDS))


def styled(table, published=TABLE_6):
    """``readable`` for a notebook, with its caution as the caption."""
    shown = readable(table, published).style.hide().format(escape="html").set_table_styles(LOOKS)
    return shown.set_caption(str(escape(caution(table))))


def _number(value):
    if pd.isna(value):
        return "–"
    return value if isinstance(value, str) else f"{value:,.2f}" if isinstance(value, float) else f"{value:,}"


def _with_spread(mean, deviation, n, net, diverged):
    if diverged:
        return "diverged"
    if pd.isna(mean):
        return "not run" if n == 0 and _ours(net) else "–"
    return f"{mean:.2f}" if pd.isna(deviation) else f"{mean:.2f} ± {deviation:.2f}"


def caution(table):
    """What must stand under a table: what it was measured on, and whether it may be held against the paper's."""
    done, others = _runs(table), table[(table["n"] > 0) & table["dataset"].isna()]
    sentences = []
    if len(done):
        sentences.append(f"Ours: {described(table)}.")
    if "images" in table and (table["n"] > 0).any():
        sentences.append(f"Tested on {table['images'].iloc[0]:,} images.")
    if "diverged" in table:
        sentences += [
            f"{row.diverged} of {row.n} run{'s' if row.n > 1 else ''} of {row.net} diverged"
            f"{': the errors are those of the others' if row.diverged < row.n else ''}."
            for row in table[table["diverged"] > 0].itertuples()
        ]
    members = [names for names in table.get("members", ()) if isinstance(names, str) and names]
    if members:
        sentences.append(f"The ensemble: {members[0]}.")
    if len(others):
        sentences.append(f"Trained by others, tested here: {', '.join(others['net'])}.")
    if (done["recipe"] == "rehearsal").any():
        sentences.append("A rehearsal: these errors mean nothing.")
    elif len(done) and done["comparable"].all():
        sentences.append("Measured as the paper's.")
    elif (table["n"] > 0).any():
        sentences.append(
            "These are not the paper's conditions: compare the nets of one column with each other, "
            "not ours with the paper's."
        )
    return " ".join(sentences) or "Nothing was run yet."


def save_errors(table, folder, published=TABLE_6, name="table"):
    """Write a table of ``errors`` or ``tested``: all numbers to ``<name>.csv``, ``readable`` to ``<name>.md``."""
    shown = readable(table, published)
    aligned = ["left", *["right"] * (shown.shape[1] - 1)]
    names = shown.assign(net=[_in_markdown(net) for net in shown["net"]])
    text = names.to_markdown(index=False, disable_numparse=True, colalign=aligned)
    write_table(table, f"{text}\n\n{_in_markdown(caution(table))}\n", folder, name)


def _in_markdown(text):
    """Text that may hold names of others, so that none of it is taken for HTML or the end of a cell."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")


def save_table(table, folder, name="table", shown=None, note=""):
    """Write any other table to ``<name>.csv`` and ``<name>.md``, where its place is taken by ``shown``, if given.

    note: a sentence below the table.
    """
    numbers = table.select_dtypes("number").columns
    if shown is None:
        shown = table.assign(**{column: [_number(value) for value in table[column]] for column in numbers})
        aligned = ["right" if column in numbers else "left" for column in table]
    else:
        aligned = ["left", *["right"] * (shown.shape[1] - 1)]
    text = shown.to_markdown(index=False, disable_numparse=True, colalign=aligned)
    write_table(table, f"{text}\n\n{note}\n" if note else f"{text}\n", folder, name)


def write_table(table, text, folder, name="table"):
    """Write all numbers to ``<name>.csv``, the text to ``<name>.md``."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / f"{name}.csv", table.to_csv(index=False, lineterminator="\n"))
    write(folder / f"{name}.md", text)


def save_figure(figure, folder, name):
    """Write ``<name>.png`` and ``<name>.svg``; the same figure gives the same bytes."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    options = {"dpi": 150, "bbox_inches": "tight"}
    with plt.rc_context({"svg.hashsalt": name}):
        write(folder / f"{name}.png", lambda file: figure.savefig(file, format="png", **options))
        write(
            folder / f"{name}.svg", lambda file: figure.savefig(file, format="svg", metadata={"Date": None}, **options)
        )


def curves(records, panels, stacked=False):
    """Error curves in the manner of Figs. 1 and 6, one panel for each entry of ``panels``, side by side or stacked.

    ``panels``: titles, each with the names of its nets and the errors to show (keys of ``STYLES``). The training error
    is thin and dashed, the test error bold, over iterations; several seeds are shown as their mean with a band from the
    lowest to the highest. Nets without a record are left out.
    Raises ValueError for no records at all, and for records of different conditions: these are no seeds of one another.
    """
    conditions = conditions_of(records)
    histories = _histories(records)
    run = set(histories["net"])
    with sns.axes_style("whitegrid"), sns.plotting_context("notebook", font_scale=1.1):
        rows, columns = (len(panels), 1) if stacked else (1, len(panels))
        figure, grid = plt.subplots(rows, columns, figsize=(6.5 * columns, 5 * rows), sharey=True, squeeze=False)
        top = max(_top(histories, nets) for nets, _ in panels.values())
        for axes, (title, (nets, parts)) in zip(grid.flat, panels.items(), strict=True):
            axes.set(title=title, ylim=(0, top), xlim=(0, max(histories["iteration"], default=1)))
            _panel(axes, histories, [net for net in nets if net in run], parts)
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
    run = list(dict.fromkeys(record.net for record in records))
    panels = {words: [net for net in (f"{kind}-18", f"{kind}-34") if net in run] for kind, words in KINDS.items()}
    panels = {words: nets for words, nets in panels.items() if nets} or {"not in the paper's figure": run}
    shown = {net for nets in panels.values() for net in nets}
    return figure_6([record for record in records if record.net in shown], panels)


def speeds(table):
    """Images per second of the common loop and of ours, one panel for each net; ``table`` as of ``speed.summarized``.

    Bars are medians, lines run from the slowest round to the fastest.
    """
    nets = list(table["net"].unique())
    figure, panels = plt.subplots(1, len(nets), figsize=(4.2 * len(nets), 2.4), squeeze=False, layout="constrained")
    for axes, net in zip(panels[0], nets, strict=True):
        group = table[table["net"] == net]
        first = group.iloc[0]
        bars = [("common loop", first["common"], first["common_min"], first["common_max"], "", "0.6")]
        for row, colour in zip(group.itertuples(), sns.color_palette("Blues", 4)[1::2], strict=False):
            bars.append((f"ours, {row.precision}", row.ours, row.ours_min, row.ours_max, f"{row.ratio:.1f}x", colour))
        for place, (_, middle, low, high, ratio, colour) in enumerate(bars):
            axes.barh(place, middle, xerr=[[middle - low], [high - middle]], color=colour, ecolor="0.2", height=0.7)
            axes.annotate(
                f"{middle:,.0f}  {ratio}", (high, place), (5, 0), textcoords="offset points", va="center", fontsize=10
            )
        axes.set(title=net, xlabel="images per second", xlim=(0, 1.4 * max(high for _, _, _, high, *_ in bars)))
        axes.set_yticks(range(len(bars)), [name for name, *_ in bars])
        axes.invert_yaxis()
        sns.despine(ax=axes)
    plt.close(figure)  # as in ``curves``
    return figure


def _histories(records):
    """All histories below each other, training and test error as rows of their own."""
    parts = []
    for record in records:
        history = record.history.rename(columns=ERRORS)
        long = history.melt("iteration", list(STYLES), var_name="part", value_name="error").dropna()
        parts.append(long.assign(net=record.net, seed=record.run.seed))
    return pd.concat(parts, ignore_index=True)


def _top(histories, nets):
    """The upper end of the error axis: like the paper's, it leaves out the first part of training.

    All are in it that nets have before the first division of the rate, on the average, and each run in the end.
    """
    shown = histories[histories["net"].isin(nets)]
    part = shown["iteration"] / shown["iteration"].max()
    middle = shown[part.between(0.3, 0.5)].groupby(["net", "part"])["error"].median().max()
    ends = shown[part == 1]["error"].max()
    highest = [value for value in (1.15 * middle, 1.05 * ends) if not pd.isna(value)]
    return min(100, max([20, *highest]))


def _panel(axes, histories, nets, parts):
    """Draw nets from light, the first, to dark, the last: the order of lightness is read in grey, too."""
    last = max(1, len(nets) - 1)
    colours = {net: plt.get_cmap("viridis")(0.65 * (1 - place / last)) for place, net in enumerate(nets)}
    ends = {}
    for net in nets:
        for part in parts:
            rows = histories[(histories["net"] == net) & (histories["part"] == part)]
            sns.lineplot(
                rows, x="iteration", y="error", errorbar=("pi", 100), color=colours[net], ax=axes, **STYLES[part]
            )
            if len(rows):
                ends[net] = rows.loc[rows["iteration"] == rows["iteration"].max(), "error"].mean()
    for net, place in _apart(ends, *axes.get_ylim()).items():
        text = {"va": "center", "color": colours[net], "weight": "bold", "fontsize": "small"}
        axes.annotate(net, (1.01, place), xycoords=("axes fraction", "data"), annotation_clip=False, **text)


def _apart(ends, low, high):
    """Where to name each curve: at its end, moved up where two names would overlap, within the axis."""
    gap, place, places = 0.055 * (high - low), low - high, {}
    order = sorted(ends, key=ends.get)
    for number, net in enumerate(order):
        highest = high - gap * (len(order) - 1 - number)
        place = max(place + gap, min(ends[net], highest))
        places[net] = place
    return places


def _alike(table):
    """The rows of a table that were run, if there are any and all under the same conditions."""
    table = _runs(table)
    if table.empty:
        raise ValueError("there is no record to show: give at least one finished run")
    differing = [name for name in CONDITIONS if table[name].nunique() > 1]
    if differing:
        values = "; ".join(f"{name}: {', '.join(map(str, table[name].unique()))}" for name in differing)
        raise ValueError(f"these runs were not made under the same conditions ({values}): show them one by one")
    return table


def conditions_of(records):
    """The conditions of records in words; raises ValueError for none, and for records of different conditions."""
    return described(_alike(errors(records)))


def findings(table):
    """What the numbers say on depth and on shortcuts: sentences that each name the nets they compare.

    Raises ValueError for a table without runs or with runs of different conditions.
    """
    table = _alike(table).set_index("net")
    depths = {
        kind: sorted(int(net.split("-")[1]) for net in table.index if net.startswith(kind) and net.count("-") == 1)
        for kind in KINDS
    }
    pairs = [
        (words, f"{kind}-{depths[kind][0]}", f"{kind}-{depths[kind][-1]}")
        for kind, words in KINDS.items()
        if len(depths[kind]) > 1
    ]
    both = sorted(set(depths["plain"]) & set(depths["resnet"]))
    pairs += [(f"{depth} layers", f"plain-{depth}", f"resnet-{depth}") for depth in both]
    projections = [net for net in table.index if net.count("-") == 2 and net.rpartition("-")[0] in table.index]
    pairs += [(f"shortcut {net[-1]} for A", net.rpartition("-")[0], net) for net in projections]
    return [compared(table, error, first, second, words) for words, first, second in pairs for error in ERRORS]


def compared(table, error, first, second, words):
    """One sentence: by how many points an error of the second net is above or below that of the first."""
    before, after = table.loc[first, error], table.loc[second, error]
    lost = [net for net, value in ((first, before), (second, after)) if pd.isna(value)]
    if lost:
        return f"{words}: all runs of {' and '.join(lost)} diverged, there is no {ERRORS[error]} to compare."
    runs = min(table.loc[net, "n"] - table.loc[net, "diverged"] for net in (first, second))
    return (
        f"{words}: {second} has a {ERRORS[error]} of {after:.2f} %, {abs(after - before):.2f} points "
        f"{'higher' if after > before else 'lower'} than {first} with {before:.2f} % "
        f"({'one run each' if runs == 1 else f'means of {runs} runs or more'})."
    )


STAGE_COLOURS = sns.color_palette("pastel", 5).as_hex()


def figure_2():
    """Fig. 2: residual learning, a building block."""
    figure, axes = plt.subplots(figsize=(4.6, 3.8))
    bottom = _block(axes, ["weight layer", "weight layer"], "x")
    axes.text(-0.2, bottom + 0.7, "F(x)", ha="right", va="center")
    axes.text(-0.35, bottom, "F(x) + x", ha="right", va="center")
    axes.text(1.75, bottom / 2 + 0.3, "x\nidentity", ha="left", va="center")
    return _bare(figure)


def figure_5(nets):
    """Fig. 5: the second block of nets, such as the basic block of ResNet-34 and the bottleneck of ResNet-50.

    ``nets``: titles, each with a table of ``measure.layers``.
    """
    figure, row = plt.subplots(1, len(nets), figsize=(4 * len(nets), 4.8), sharey=True, squeeze=False)
    for axes, (title, layers) in zip(row[0], nets.items(), strict=True):
        block = layers[layers["name"].str.startswith("layer1.1.")]
        labels = [f"{layer.kind.split()[0]}, {layer.channels}" for layer in block.itertuples()]
        _block(axes, labels, f"{block['channels'].iloc[-1]}-d")
        axes.set_title(title, fontsize=11)
    return _bare(figure)


def _block(axes, layers, above):
    """Draw a residual block from the top (0, 0.9) down; returns the height of its addition."""
    step, bottom, right, corner = 1.5, -1.5 * len(layers), 1.6, 0.3
    _arrow(axes, (0, 0.9), (0, 0.25))
    axes.text(-0.2, 0.7, above, ha="right", va="center")
    for number, layer in enumerate(layers):
        top, last = -step * number, number + 1 == len(layers)
        _box(axes, 0, top, layer, 2.4, 0.5, STAGE_COLOURS[0])
        _arrow(axes, (0, top - 0.25), (0, top - step + (0.2 if last else 0.25)))
        if not last:
            axes.text(0.15, top - step / 2, "relu", va="center", style="italic")
    axes.text(0, bottom, "+", ha="center", va="center", fontsize=15, bbox={"boxstyle": "circle,pad=0.1", "fc": "white"})
    _arrow(axes, (0, bottom - 0.2), (0, bottom - 0.85))
    axes.text(0.15, bottom - 0.55, "relu", va="center", style="italic")
    turns = [(0, 0.6), (right - corner, 0.6), (right, 0.6), (right, 0.6 - corner)]
    turns += [(right, bottom + corner), (right, bottom), (right - corner, bottom), (0.22, bottom)]
    around = Path(
        turns, [Path.MOVETO, Path.LINETO, Path.CURVE3, Path.CURVE3, Path.LINETO, Path.CURVE3, Path.CURVE3, Path.LINETO]
    )
    axes.add_patch(FancyArrowPatch(path=around, arrowstyle="-|>", mutation_scale=12, color="0.25"))
    axes.set(xlim=(-1.9, 2.9), ylim=(min(bottom - 1, axes.get_ylim()[0]), 1))
    return bottom


def figure_3(nets):
    """Fig. 3: nets as columns of their weighted layers, with their shortcuts.

    ``nets``: titles, each with a table of ``measure.layers``. One colour is one size of map, written beside its first
    layer. A shortcut is drawn solid where it is an identity, dotted where dimensions grow.
    """
    height = max(len(layers) for layers in nets.values())
    figure, row = plt.subplots(1, len(nets), figsize=(2.9 * len(nets), 0.27 * height + 1), sharey=True, squeeze=False)
    for axes, (title, layers) in zip(row[0], nets.items(), strict=True):
        sizes = list(layers["map"].unique())
        for place, layer in enumerate(layers.itertuples()):
            halving = "" if layer.stride == 1 else f", /{layer.stride}"
            colour = "white" if layer.kind == "fc" else STAGE_COLOURS[sizes.index(layer.map) % len(STAGE_COLOURS)]
            _box(axes, 0, -place, f"{layer.kind}, {layer.channels}{halving}", 2.2, 0.7, colour, fontsize=8)
            if layer.kind != "fc" and layer.map not in layers["map"][:place].values:
                axes.text(-1.2, -place, f"{layer.map}", ha="right", va="center", fontsize=8, color="0.35")
            if place:
                _arrow(axes, (0, 0.65 - place), (0, 0.35 - place), size=6)
            if layer.around:
                start, line = place - layer.around + 0.5, ":" if layer.grows else "-"
                style = {"arrowstyle": "-|>", "mutation_scale": 7, "color": "0.25", "linestyle": line}
                bow = {"connectionstyle": "arc3,rad=-0.55", "shrinkA": 0, "shrinkB": 0}
                axes.add_patch(FancyArrowPatch((1.1, -start), (1.1, -place - 0.45), **style, **bow))
        axes.set(xlim=(-1.7, 1.7), ylim=(-height, 0.6))
        axes.set_title(title, fontsize=11)
    return _bare(figure)


def _box(axes, x, y, text, width, height, colour, fontsize=11):
    corner = (x - width / 2, y - height / 2)
    style = {"boxstyle": "round,pad=0,rounding_size=0.08", "facecolor": colour, "edgecolor": "0.25"}
    axes.add_patch(FancyBboxPatch(corner, width, height, **style))
    axes.text(x, y, text, ha="center", va="center", fontsize=fontsize)


def _arrow(axes, start, end, size=12):
    style = {"arrowstyle": "-|>", "mutation_scale": size, "color": "0.25", "shrinkA": 0, "shrinkB": 0}
    axes.add_patch(FancyArrowPatch(start, end, **style))


def _bare(figure):
    for axes in figure.axes:
        axes.axis("off")
    figure.tight_layout()
    plt.close(figure)
    return figure
