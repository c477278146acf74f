"""Tables of errors, ours beside the paper's, and sentences on what they show."""

import html
import pathlib

import pandas as pd

from replication.engine.files import write
from replication.paper import TABLE_6
from replication.report.metrics import number
from replication.runs.records import CONDITIONS, in_words

KINDS = {"plain": "plain nets", "resnet": "residual nets"}
ERRORS = {"train_error": "training error", "test_error": "test error"}
TOP_K = {"top1": "top-1 error", "top5": "top-5 error"}
WHOLE = ("parameters", "iterations", "holdout", "bn_batch", "diverged")
FEW = 3  # runs whose values are shown one by one; of more, mean and standard deviation
STYLES = [
    {"selector": "caption", "props": "caption-side: bottom; text-align: left; padding-top: 0.5em"},
    {"selector": "td", "props": "white-space: nowrap"},
]


def errors(records, nets=(), published=TABLE_6, others=()):
    """One row for each net and condition: mean and standard deviation of its errors over n seeds, beside the paper's.

    Errors are in percent; ``train_error`` is the mean over the batches of the history's last row, a hundredth of a
    full run, as they were trained on. ``_values`` columns hold the errors of all runs as text. A standard deviation is
    empty for a single run. ``nets``: names that get a row even without a record. ``others``: rows of their own, as of
    ``evaluate.errors_of_others``.
    ``comparable`` says whether a row was measured under the paper's conditions, ``diverged`` how many of the n runs
    did: these are left out of the means.
    """
    rows = group([_summary(record) for record in records], ["net", *CONDITIONS], ERRORS)
    rows += [{"net": net, "n": 0} for net in nets if net not in {row["net"] for row in rows}]
    rows += [dict(other) | {"n": 1} for other in others]
    spreads = [f"{error}{end}" for error in ERRORS for end in ("", "_std")]
    columns = ["net", "parameters", *CONDITIONS, "n", "diverged", *spreads, "seconds"]
    table = pd.DataFrame(rows, columns=[*columns, *(f"{error}_values" for error in ERRORS)])
    table["diverged"] = table["diverged"].fillna(0)
    table = table.astype(dict.fromkeys(WHOLE, "Int64"))
    alike = [published.conditions is not None and published.conditions.items() <= row.items() for row in rows]
    paper_errors = table["net"].map(published.errors).astype(float)
    return table.assign(paper_error=paper_errors, paper=published.title, comparable=alike)


def _summary(record):
    """What ``errors`` needs of a run; without its time if it diverged."""
    diverged = record.diverged is not None
    row = {"net": record.net} | record.conditions | record.summary | {"diverged": diverged}
    return row | ({"seconds": None} if diverged else {})


def group(rows, keys, names, digits=".2f"):
    """A row for each combination of keys: n, the mean of every name, its ``_std``, and its ``_values`` as text."""
    groups = []
    for values, members in pd.DataFrame(rows).groupby(keys, sort=False) if rows else ():
        row = dict(zip(keys, values, strict=True)) | {"n": len(members)}
        for name in names:
            column = members[name].astype(float)
            row |= {name: column.mean(), f"{name}_std": column.std()}
            row[f"{name}_values"] = ", ".join(number(value, digits) for value in column.dropna())
        if "diverged" in members:
            row["diverged"] = int(members["diverged"].sum())
        means = {name: members[name].astype(float).mean() for name in ("parameters", "seconds") if name in members}
        groups.append(row | means)
    return groups


def tested(records, evaluations, published):
    """Tables 2 to 5: top-1 and top-5 errors in percent by the table's own protocol, beside the paper's.

    evaluations: as ``evaluate.evaluations`` gives them. One row for each net of the paper's table, run or not (``n`` is
    the number of runs tested), then one for each of the weights of others.
    ``comparable`` says whether a row was measured under the paper's conditions.
    """
    protocol = published.way
    errors_of = {label: each[protocol] for label, each in evaluations.items() if protocol in each}
    own = {record.run.id: record for record in records}
    runs = [
        {"net": record.net} | record.conditions | errors_of[name] for name, record in own.items() if name in errors_of
    ]
    rows = [row for row in group(runs, ["net", *CONDITIONS], TOP_K) if row["net"] in published.errors]
    ensembles = "ensemble" in published.errors
    for label in errors_of:
        if label not in own and ensembles == (label == "ensemble"):
            members = [own[name] for name in evaluations[label].get("members") or ()]
            conditions = pd.DataFrame([member.conditions for member in members], columns=CONDITIONS).drop_duplicates()
            shared = {name: conditions[name].iloc[0] for name in CONDITIONS if conditions[name].nunique() == 1}
            nets = ", ".join(member.net for member in members)
            rows.append(shared | {"net": label, "n": 1, "members": nets, **errors_of[label]})
    rows += [{"net": net, "n": 0} for net in published.errors if net not in {row["net"] for row in rows}]
    order = list(published.errors)
    rows.sort(key=lambda row: order.index(row["net"]) if row["net"] in order else len(order))
    numbers = [f"{name}{end}" for name in TOP_K for end in ("", "_std")]
    columns = ["net", "members", *CONDITIONS, "n", *numbers, *(f"{name}_values" for name in TOP_K)]
    table = pd.DataFrame(rows, columns=columns).astype(dict.fromkeys(WHOLE[1:4], "Int64"))
    for place, name in enumerate(TOP_K):
        table[f"paper_{name}"] = [published.errors.get(net, (None, None))[place] for net in table["net"]]
    table = table.astype(dict.fromkeys([*numbers, "paper_top1", "paper_top5"], float))
    images = max((evaluations[label]["images"] for label in errors_of), default=0)
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
    """A table of ``errors`` or ``tested`` for the eye, the paper's errors beside ours.

    Conditions that differ between its rows are columns, too.
    """
    shown = {"net": table["net"]}
    if "parameters" in table:
        shown["parameters"] = table["parameters"].map(number_text)
    for name in CONDITIONS:
        if table[name].nunique() > 1:
            shown[name] = table[name].map(number_text)
    ours = table["dataset"].notna() | ((table["n"] == 0) & table["net"].map(_is_ours))
    shown["runs"] = table["n"].where(ours, "–")
    if "diverged" in table and table["diverged"].any():
        shown["diverged"] = table["diverged"]
    for error, words in (TOP_K if "top1" in table else ERRORS).items():
        shown[f"ours: {words} %"] = [_error_text(row, error) for row in table.to_dict("records")]
        if f"paper_{error}" in table and table[f"paper_{error}"].notna().any():
            shown[f"paper: {words} %"] = table[f"paper_{error}"].map(number_text)
    if "paper_error" in table:
        shown[published.title] = table["paper_error"].map(number_text)
    return pd.DataFrame(shown)


def _is_ours(net):
    """Whether a net of the paper's tables can be run here."""
    return net == "ensemble" or net.startswith(tuple(KINDS))


def _error_text(row, error):
    if row["n"] > 0 and row["n"] == row.get("diverged"):
        return "diverged"
    if row["n"] == 0:
        return "not run" if _is_ours(row["net"]) else "–"
    return spread(row, error)


def spread(row, name, digits=".2f"):
    """A number of a row of ``group``: the values of up to three runs, of more runs mean ± standard deviation."""
    values = row.get(f"{name}_values")
    if pd.isna(row[name]):
        return "–"
    if isinstance(values, str) and values.count(", ") < FEW:
        return values
    mean, deviation = row[name], row[f"{name}_std"]
    return number(mean, digits) + ("" if pd.isna(deviation) else f" ± {number(deviation, digits)}")


def number_text(value):
    """A cell for the eye: two decimals, thousands separated, "–" where it is empty."""
    if pd.isna(value):
        return "–"
    return value if isinstance(value, str) else f"{value:,.2f}" if isinstance(value, float) else f"{value:,}"


def styled(table, published=TABLE_6):
    """``readable`` for a notebook, with its caution as the caption."""
    shown = readable(table, published).style.hide().format(escape="html").set_table_styles(STYLES)
    return shown.set_caption(html.escape(caution(table)))


def caution(table):
    """What must stand under a table: what it was measured on, and whether it may be compared with the paper's."""
    runs, others = _runs(table), table[(table["n"] > 0) & table["dataset"].isna()]
    sentences = []
    if len(runs):
        sentences.append(f"Ours: {described(table)}.")
    if "images" in table and (table["n"] > 0).any():
        sentences.append(f"Tested on {table['images'].iloc[0]:,} images.")
    if "diverged" in table:
        sentences += [
            f"{row.diverged} of {row.n} run{'s' if row.n > 1 else ''} of {row.net} diverged"
            f"{': the errors are those of the others' if row.diverged < row.n else ''}."
            for row in table[table["diverged"] > 0].itertuples()
        ]
    sentences += [f"The ensemble: {names}." for names in table.get("members", ()) if isinstance(names, str) and names]
    if len(others):
        sentences.append(f"Trained by others, tested here: {', '.join(others['net'])}.")
    if (runs["recipe"] == "smoke").any():
        sentences.append("A smoke test: these errors mean nothing.")
    elif len(runs) and runs["comparable"].all():
        sentences.append("Measured as the paper's.")
    elif (table["n"] > 0).any():
        sentences.append(
            "These are not the paper's conditions: compare the nets of one column with each other, "
            "not ours with the paper's."
        )
    return " ".join(sentences) or "Nothing has been run yet."


def save_errors(table, folder, published=TABLE_6, name="table"):
    """Write a table of ``errors`` or ``tested``: all numbers to ``<name>.csv``, ``readable`` to ``<name>.md``."""
    save_table(table, folder, name, readable(table, published), caution(table))


def save_table(table, folder, name="table", shown=None, note=""):
    """Write a table to ``<name>.csv``, and ``shown``, or itself, in Markdown to ``<name>.md``, with a note below it."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / f"{name}.csv", table.to_csv(index=False, lineterminator="\n"))
    text = markdown(table if shown is None else shown)
    write(folder / f"{name}.md", f"{text}\n\n{in_markdown(note)}\n" if note else f"{text}\n")


def markdown(table, left=1):
    """A table in Markdown, its first ``left`` columns aligned to the left; no name in it can become HTML."""
    shown = table.map(number_text).map(in_markdown).rename(columns=in_markdown)
    aligned = ["left" if number < left else "right" for number in range(table.shape[1])]
    return shown.to_markdown(index=False, disable_numparse=True, colalign=aligned)


def in_markdown(text):
    """Text that may hold names of others, so that none of it is taken for HTML, a link or the end of a cell."""
    for character, escaped in (("\\", "\\\\"), ("&", "&amp;"), ("<", "&lt;"), ("|", "\\|"), ("[", "\\[")):
        text = text.replace(character, escaped)
    return text


def _same_conditions(table):
    """The rows of a table that were run; raises ValueError unless there are some, all under the same conditions."""
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
    return described(_same_conditions(errors(records)))
