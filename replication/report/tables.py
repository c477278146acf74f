"""Tables of errors, ours beside the paper's, and sentences on what they show."""

import html
import pathlib
import re

import pandas as pd

from replication.engine.files import write
from replication.paper import PLAIN_READ, TABLE_6, WARMED_UP, YARDSTICKS, Yardstick
from replication.recipes import SMOKE_TESTS
from replication.runs.records import CONDITIONS, by_conditions, ended, in_words, is_published

KINDS = {"plain": "plain nets", "resnet": "residual nets"}
ERRORS = {"train_error": "training error", "test_error": "test error"}
TOP_K = {"top1": "top-1 error", "top5": "top-5 error"}
WHOLE = {"parameters", "iterations", "holdout", "bn_batch", "diverged"}
ELSEWHERE = (
    "These are not the paper's conditions: compare the nets of one column with each other, not ours with the paper's."
)
DATASETS = {
    "digits": "scikit-learn's handwritten digits, 8x8 pixels, installed with the package",
    "cifar10": "the original CIFAR-10, 32x32 pixels, checked by its published checksums",
    "cifar100": "the original CIFAR-100, 32x32 pixels, checked by its published checksums",
    "imagenet": "ImageNet's photographs, 1,000 classes",
    "voc": "PASCAL VOC's images with objects: trainval of 2007 and 2012, tested on those of 2007",
    "coco": "MS COCO's images with objects, trained on its train images and tested on its val images",
}
RECIPES = {
    "cifar": "section 4.2 of the paper, its recipe for CIFAR-10",
    "imagenet": "section 3.4 of the paper, its recipe for ImageNet",
    "digits": "section 4.2 in about a sixtieth of its iterations, for the few images of digits",
    "quick": "that of digits with batches of 64, half the work, for the quickstart",
    "note": "a Chinese reading note on the paper, with batches of 100 and momentum 0.8",
    "voc": "that of Faster R-CNN on PASCAL VOC, all layers trained at once",
    "coco": "appendix A of the paper, all layers trained at once",
    "smoke": "a smoke test of a few iterations, which learns nothing",
}
FEW = 3  # runs whose values are shown one by one; of more, mean and standard deviation


def spelled(text):
    """Text for readers, its nets spelled as in the paper: "ResNet-20" for "resnet-20". Names of others stay."""
    return re.sub(r"(?<![\w/-])resnet-((?:\d+|N)(?:-[A-C])?)(?![\w-]|\.\w)", r"ResNet-\1", text)


def what_is(recipe="", dataset=""):
    """What a recipe or a data set of this name is and where it comes from, in words."""
    if recipe:
        return RECIPES.get(recipe, "a recipe of one's own, all of whose fields are in the run.json of its records")
    layout = " in ImageNet's layout" if dataset.startswith("imagenet") else ""
    return DATASETS.get(dataset, f"images of one's own, from a folder of this name{layout}")


def listed(records):
    """Runs in a notebook, a row for each: net, seed, iterations, minutes, what trained it, and whose record it is."""
    rows = [
        {"net": spelled(record.net), "seed": record.run.seed, "iterations": f"{record.summary['iterations']:,}"}
        | {"minutes": f"{record.summary['seconds'] / 60:.1f}", "trained on": record.hardware}
        | {"record": "published with this repository" if is_published(record) else "your own"}
        for record in records
    ]
    table = pd.DataFrame(rows, columns=["net", "seed", "iterations", "minutes", "trained on", "record"])
    return table.style.hide().format(escape="html")


def errors(records, nets=(), published=TABLE_6, others=()):
    """One row for each net and condition: mean and standard deviation of its errors over n seeds, beside the paper's.

    Errors are in percent; ``train_error`` is the mean over the batches of the history's last row, a hundredth of a
    full run, as they were trained on. ``_values`` columns hold the errors of all runs as text. A standard deviation is
    empty for a single run. ``nets``: names that come first, in this order, and get a row even without a record.
    ``others``: rows of their own, as of ``evaluate.errors_of_others``.
    ``comparable`` says whether a row was measured under the paper's conditions, ``diverged`` how many of the n runs
    did: these are left out of the means.
    """
    runs = [
        {"net": record.net} | record.conditions | record.summary | {"diverged": record.diverged is not None}
        for record in records
    ]
    runs = [run | {"seconds": None} if run["diverged"] else run for run in runs]
    rows = group(runs, ["net", *CONDITIONS], [*ERRORS, "parameters", "seconds"])
    rows += [{"net": net, "n": 0} for net in nets if net not in {row["net"] for row in rows}]
    order = {net: place for place, net in enumerate(nets)}
    rows.sort(key=lambda row: order.get(row["net"], len(order)))
    rows += [dict(other) | {"n": 1} for other in others]
    theirs = {"paper_error": [published.errors.get(row["net"]) for row in rows]}
    return tabulated(rows, "parameters", ERRORS, theirs, published, paper=published.title)


def distance(table):
    """By how many points the test errors of a table of ``errors`` are above the paper's, under its conditions alone."""
    return (table["test_error"] - table["paper_error"]).where(table["comparable"])


def tested(records, evaluations, published):
    """Tables 2 to 5: top-1 and top-5 errors in percent by the table's own protocol, beside the paper's.

    evaluations: as ``evaluate.evaluations`` gives them. One row for each net of the paper's table, run or not (``n`` is
    the number of runs tested), then one for each of the weights of others.
    ``comparable`` says whether a row was measured under the paper's conditions.
    """
    evaluations = {label: each for label, each in evaluations.items() if published.way in each}
    found = {label: each[published.way] for label, each in evaluations.items()}
    own = {record.run.id: record for record in records}
    runs = [{"net": own[name].net} | own[name].conditions | found[name] for name in own if name in found]
    rows = [row for row in group(runs, ["net", *CONDITIONS], TOP_K) if row["net"] in published.errors]
    for label in found:
        if label not in own and (label == "ensemble") == ("ensemble" in published.errors):
            members = [own[name] for name in evaluations[label].get("members") or ()]
            shared = set.intersection(*(set(member.conditions.items()) for member in members)) if members else ()
            nets = ", ".join(member.net for member in members)
            rows.append(dict(shared) | {"net": label, "n": 1, "members": nets} | found[label])
    rows += [{"net": net, "n": 0} for net in published.errors if net not in {row["net"] for row in rows}]
    order = [*published.errors, *found]
    rows.sort(key=lambda row: order.index(row["net"]))
    pairs = [published.errors.get(row["net"], (None, None)) for row in rows]
    theirs = {f"paper_{name}": [pair[place] for pair in pairs] for place, name in enumerate(TOP_K)}
    images = max((each["images"] for each in evaluations.values()), default=0)
    table = tabulated(rows, "members", TOP_K, theirs, published, images=images)
    return table.assign(comparable=table["comparable"] & (images == 50_000)).drop(columns=["diverged", "seconds"])


def like_table_6(records):
    """The records that may be compared with Table 6: of its nets and the plain ones, on CIFAR-10, in full length."""
    nets, wanted = TABLE_6.errors | PLAIN_READ, TABLE_6.conditions.items()
    return [record for record in ended(records)[0] if record.net in nets and wanted <= record.conditions.items()]


def yardsticks(records=()):
    """Test errors on CIFAR-10 as text, in percent: the paper's, what others measured for the same nets, and ours.

    A row for each kind of net and source, a column for each depth. Of several runs they are mean ± standard deviation;
    ours are the last errors of runs under the paper's own conditions, up to three of them one by one.
    """
    theirs = [Yardstick("the paper's Table 6", "not stated", 1, TABLE_6.errors)]
    theirs += [Yardstick("the paper's Fig. 6, as a-martyn/resnet reads it", "not stated", 1, PLAIN_READ), *YARDSTICKS]
    rows = []
    for kind, words in reversed(KINDS.items()):
        shown = [(each, {net: _as_text(error) for net, error in each.errors.items()}) for each in theirs]
        own = [record for record in like_table_6(records) if record.net.startswith(kind)]
        for _, conditions, members in by_conditions(own):
            table = errors(members).to_dict("records")
            counts = " to ".join(map(str, sorted({row["n"] for row in table})))
            texts = {row["net"]: spread(row, "test_error") for row in table}
            shown.append((Yardstick(f"ours: {conditions}", "last", counts, {}), texts))
        for each, texts in shown:
            cells = {net.split("-")[1]: text for net, text in texts.items() if net.startswith(kind)}
            if cells:
                rows.append({"nets": words, "source": each.source, "epoch": each.rule, "runs": str(each.runs)} | cells)
    rows[0]["110"] += f" best, {_as_text(WARMED_UP)} of 5"
    return pd.DataFrame(rows).fillna("–")


def _as_text(error):
    return " ± ".join(map("{:.2f}".format, error)) if isinstance(error, tuple) else f"{error:.2f}"


def group(rows, keys, names, digits=",.2f"):
    """A row for each combination of keys: n, the mean of every name, its ``_std``, and its ``_values`` as text."""
    groups = []
    for values, members in pd.DataFrame(rows).groupby(keys, sort=False, dropna=False) if rows else ():
        row = dict(zip(keys, values, strict=True)) | {"n": len(members)}
        for name in names:
            column = members[name].astype(float)
            row |= {name: column.mean(), f"{name}_std": column.std()}
            row[f"{name}_values"] = ", ".join(number(value, digits) for value in column.dropna())
        if "diverged" in members:
            row["diverged"] = int(members["diverged"].sum())
        groups.append(row)
    return groups


def tabulated(rows, special, names, theirs, published, **constants):
    """Rows with conditions, numbers of runs and errors, by ``names``; then the columns of ``theirs`` and constants."""
    numbers = [f"{name}{end}" for name in names for end in ("", "_std")]
    columns = ["net", special, *CONDITIONS, "n", "diverged", *numbers, "seconds", *(f"{name}_values" for name in names)]
    table = pd.DataFrame(rows, columns=columns).fillna({"diverged": 0}).assign(**theirs)
    table = table.astype(dict.fromkeys(WHOLE & set(columns), "Int64") | dict.fromkeys([*numbers, *theirs], float))
    wanted = published.conditions
    alike = [wanted is not None and wanted.items() <= row.items() for row in rows]
    return table.assign(**constants, comparable=alike)


def described(runs):
    """The conditions of rows in words: "digits, recipe digits, 1,100 iterations, float32, 1 run per net"."""
    parts = map(in_words, runs[[*CONDITIONS]].drop_duplicates().to_dict("records"))
    counts = " to ".join(map(str, sorted({runs["n"].min(), runs["n"].max()})))
    return "; ".join(parts) + f", {counts} run{'' if counts == '1' else 's'} per net"


def readable(table, published=TABLE_6):
    """A table of ``errors`` or ``tested`` for the eye, ours beside the paper's; with conditions that differ.

    Runs under the paper's own conditions also have their distance to the paper's test error, the mean's of several.
    """
    differing = [name for name in CONDITIONS if table[name].nunique() > 1]
    shown = {"net": table["net"].map(spelled)}
    shown |= {name: table[name].map(number) for name in ["parameters", *differing] if name in table}
    ours = table["dataset"].notna() | ((table["n"] == 0) & table["net"].map(_is_ours))
    shown["runs"] = table["n"].where(ours, "–")
    if "diverged" in table and table["diverged"].any():
        shown["diverged"] = table["diverged"]
    for error, words in (TOP_K if "top1" in table else ERRORS).items():
        shown[f"ours: {words} %"] = [_error_text(row, error) for row in table.to_dict("records")]
        if f"paper_{error}" in table and table[f"paper_{error}"].notna().any():
            shown[f"paper: {words} %"] = table[f"paper_{error}"].map(number)
    if "paper_error" in table:
        shown[published.title] = table["paper_error"].map(number)
        if (apart := distance(table)).notna().any():
            shown["ours less the paper's, points"] = apart.map(signed)
    return pd.DataFrame(shown)


def _is_ours(net):
    """Whether a net of the paper's tables can be run here."""
    return net == "ensemble" or net.startswith(tuple(KINDS))


def _error_text(row, error):
    if row["n"] == 0:
        return "not run" if _is_ours(row["net"]) else "–"
    return "diverged" if row["n"] == row.get("diverged") else spread(row, error)


def spread(row, name, digits=",.2f"):
    """A number of a row of ``group``: the values of up to three runs, of more runs mean ± standard deviation."""
    values = row.get(f"{name}_values")
    if isinstance(values, str) and values and values.count(", ") < FEW:
        return values
    text = number(row[name], digits)
    return text if pd.isna(row[f"{name}_std"]) else f"{text} ± {number(row[f'{name}_std'], digits)}"


def number(value, digits=",.2f"):
    """A cell for the eye: floats in a format, but never with a power of ten above 1; "–" where it is empty."""
    if pd.isna(value):
        return "–"
    if isinstance(value, str):
        return value
    text = f"{value:{digits}}" if isinstance(value, float) else f"{value:,}"
    return f"{value:,.0f}" if "e+" in text else text


def signed(points):
    """A distance for the eye, with its sign; that of nothing is positive."""
    return number(round(points, 2) + 0.0, "+.2f")


def styled(table, published=TABLE_6):
    """``readable`` for a notebook, with its caution as the caption."""
    below = [{"selector": "caption", "props": "caption-side: bottom; text-align: left"}]
    shown = readable(table, published).style.hide().format(escape="html").set_table_styles(below)
    return shown.set_caption(html.escape(caution(table)))


def caution(table):
    """What must stand under a table: what it was measured on, and whether it may be compared with the paper's."""
    tried = table[table["n"] > 0]
    runs, others = tried.dropna(subset="dataset"), tried[tried["dataset"].isna()]
    if tried.empty:
        return "Nothing has been run yet."
    sentences = [f"Ours: {described(runs)}."] if len(runs) else []
    if "images" in table:
        sentences.append(f"Tested on {table['images'].iloc[0]:,} images.")
    for row in runs[runs["diverged"] > 0].itertuples() if "diverged" in table else ():
        rest = ": the errors are those of the others" if row.diverged < row.n else ""
        sentences.append(f"{row.diverged} of {row.n} run{'s' if row.n > 1 else ''} of {row.net} diverged{rest}.")
    if "members" in table:
        sentences += [f"The ensemble: {names}." for names in table["members"].dropna() if names]
    if len(others):
        sentences.append(f"Trained by others, tested here: {', '.join(others['net'])}.")
    if runs["recipe"].isin(SMOKE_TESTS).any():
        sentences.append("A smoke test: these errors mean nothing.")
    elif len(runs) and runs["comparable"].all():
        sentences.append("Measured as the paper's.")
    else:
        sentences.append(ELSEWHERE)
    return spelled(" ".join(sentences))


def save_errors(table, folder, published=TABLE_6, name="table"):
    """Write a table of ``errors`` or ``tested``: all numbers to ``<name>.csv``, ``readable`` to ``<name>.md``."""
    save_table(table, folder, name, readable(table, published), caution(table))


def save_table(table, folder, name="table", shown=None, note=""):
    """Write a table to ``<name>.csv``, and ``shown``, or itself, in Markdown to ``<name>.md``, with a note below it."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if "weights" in table and table["weights"].isna().all():  # that of nets which all start from their seeds
        table = table.drop(columns="weights")
    write(folder / f"{name}.csv", table.to_csv(index=False, lineterminator="\n"))
    text = markdown(table if shown is None else shown)
    write(folder / f"{name}.md", f"{text}\n\n{in_markdown(note)}\n" if note else f"{text}\n")


def markdown(table, left=1):
    """A table in Markdown for readers, its first ``left`` columns aligned to the left; no name can become HTML."""
    shown = table.map(number).map(spelled).map(in_markdown).rename(columns=in_markdown)
    aligned = ["left" if number < left else "right" for number in range(table.shape[1])]
    return shown.to_markdown(index=False, disable_numparse=True, colalign=aligned)


def in_markdown(text):
    """Text that may hold names of others, so that none of it is taken for HTML, a link or the end of a cell."""
    return text.translate(str.maketrans({"\\": "\\\\", "&": "&amp;", "<": "&lt;", "|": "\\|", "[": "\\["}))


def conditions_of(records):
    """The conditions of records in words; raises ValueError for none, and for records of different conditions."""
    table = errors(records)
    if table.empty:
        raise ValueError("there is no record to show: give at least one finished run")
    differing = [name for name in CONDITIONS if table[name].nunique() > 1]
    if differing:
        values = "; ".join(f"{name}: {', '.join(map(str, table[name].unique()))}" for name in differing)
        raise ValueError(f"these runs were not made under the same conditions ({values}): show them one by one")
    return described(table)
