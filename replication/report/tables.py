"""Tables of errors, ours beside the paper's, and what they say in sentences."""

import pathlib

import pandas as pd
from markupsafe import escape

from replication.engine.files import write
from replication.paper import TABLE_6
from replication.runs.records import CONDITIONS, in_words

KINDS = {"plain": "plain nets", "resnet": "residual nets"}
ERRORS = {"train_error": "training error", "test_error": "test error"}
TESTED = {"top1": "top-1 error", "top5": "top-5 error"}
LOOKS = [
    {"selector": "caption", "props": "caption-side: bottom; text-align: left; padding-top: 0.5em"},
    {"selector": "td", "props": "white-space: nowrap"},
]


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
    whole = ("parameters", "iterations", "holdout", "bn_batch", "diverged")
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
    table = pd.DataFrame(rows, columns=columns).astype({"iterations": "Int64", "holdout": "Int64", "bn_batch": "Int64"})
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
    if (done["recipe"] == "smoke").any():
        sentences.append("A smoke test: these errors mean nothing.")
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
