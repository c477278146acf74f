"""The scorecard for people: its page, its table in the README, and what both say at the top."""

import base64
import os
import re
from pathlib import Path

import jinja2
import pandas as pd
from markupsafe import Markup, escape

from replication import report
from replication.engine.files import write
from replication.paper import CLAIMS, FIGURE_7, TABLE_6
from replication.report import layers
from replication.report.claims import THEIRS
from replication.report.comparisons import VERDICTS
from replication.report.tables import KINDS
from replication.runs.records import all_finished, by_conditions, ended, json_text, read_json

ROOT = Path(__file__).parents[2]  # of the source tree: README and notebooks lie there
DATA = {
    "digits": "scikit-learn's handwritten digits, 8x8 pixels",
    "cifar10": "CIFAR-10",
    "cifar100": "CIFAR-100",
    "imagenet": "ImageNet",
}


def everything(results="results"):
    """All records of a folder but smoke tests', and the errors of an ensemble that ``6_imagenet`` left there."""
    records = [record for record in all_finished(results) if record.run.recipe != "smoke"]
    return records, read_json(Path(results) / "6_imagenet" / "evaluations.json")


def summary(card, records):
    """What a scorecard says at a glance: a dict.

    answer: a sentence on the paper's own conditions, since runs under others say nothing on its numbers;
    claims: {number: {conditions: verdict}}, first under the paper's;
    runs: for each set of conditions the number of runs and nets, hours of training, hardware, verdicts in words.
    """
    seen = readable(card)
    tested = card[card["verdict"] != "not attempted"]
    claims = {row[0]: dict(zip(seen.columns[2:], row[2:], strict=True)) for row in seen.to_numpy().tolist()}
    runs = _runs(records)
    for row in runs:
        row["found"] = _counted(tested[tested["conditions"] == row["conditions"]])
    return {"answer": _answer(card), "claims": claims, "runs": runs}


def _answer(card):
    alike = card[card["as_paper"] & (card["verdict"] != "not attempted")]
    if alike.empty:
        return f"Not yet: none of the paper's {len(CLAIMS)} claims was tested under its own conditions."
    return f"Under its own conditions, {_counted(alike)} of {len(CLAIMS)} claims."


def runs_table(card, records):
    """What was run: a row for each set of conditions, with its verdicts."""
    return pd.DataFrame(summary(card, records)["runs"])


def _counted(rows):
    counts = rows.groupby("verdict")["claim"].nunique()
    return ", ".join(f"{counts[each]} {each}" for each in VERDICTS if each in counts) or "no claim tested"


def _runs(records):
    rows = []
    for _, conditions, members in by_conditions(records):
        machines = dict.fromkeys(_machine(record.environment) for record in members)
        hours = sum(record.summary["seconds"] for record in members) / 3600
        nets = len({record.net for record in members})
        data = DATA.get(members[0].run.dataset, "a folder of images")
        row = {"conditions": conditions, "data": data, "runs": len(members), "nets": nets, "hours": round(hours, 2)}
        diverged = sum(ended(members)[1].values())
        row |= {"diverged": diverged} if diverged else {}
        rows.append(row | {"hardware": ", ".join(machines)})
    return rows


def _machine(environment):
    if environment["device"] != "cpu":
        return environment["device"]
    return f"{environment['processor']}, {environment['cores']} core{'s' if environment['cores'] != 1 else ''}"


def distances(records):
    """Ours beside Table 6, as far as it was run under the paper's conditions: a row for each of its nets.

    Errors are in percent, distances in points; ours are the mean and the standard deviation over n runs.
    """
    table = report.errors(records, TABLE_6.errors)
    table = table[table["net"].isin(list(TABLE_6.errors)) & (table["comparable"] | (table["n"] == 0))]
    rows = []
    for net, paper in TABLE_6.errors.items():
        found = table[(table["net"] == net) & (table["n"] > table["diverged"])]
        for row in found.itertuples():
            ours = {"ours": row.test_error, "std": row.test_error_std, "n": row.n - row.diverged}
            ours["precision"] = row.precision
            rows.append({"net": net, "paper": paper} | ours | {"distance": row.test_error - paper})
        if found.empty:
            rows.append({"net": net, "paper": paper, "n": 0})
    columns = ["net", "paper", "ours", "std", "distance", "n", "precision"]
    return pd.DataFrame(rows, columns=columns)


def readable(card):
    """The scorecard for the eye: a row for each claim, a column for each set of conditions, the paper's first."""
    card = card.assign(place=card["place"].where(~card["as_paper"], THEIRS))
    places = [THEIRS, *card["place"][~card["as_paper"]].unique()]
    shown = card.groupby(["claim", "name", "place"], sort=False)["verdict"].agg(" / ".join).unstack()
    return shown.reindex(columns=places).fillna("–").reset_index().rename(columns={"claim": "", "name": "claim"})


def markdown(card):
    """``readable`` as a table in Markdown."""
    shown = readable(card)
    aligned = ["right"] + ["left"] * (shown.shape[1] - 1)
    return shown.to_markdown(index=False, disable_numparse=True, colalign=aligned)


def listing(card, folder):
    """The claims one by one in Markdown: criteria, verdicts, what was found; links are those from ``folder``."""
    notebooks, lines = _notebooks(folder), []
    for number, rows in card.groupby("claim", sort=False):
        first = rows.iloc[0]
        lines += [f"### {number}. {first['name']}", f"{first['statement']} (Section {first['section']})"]
        lines.append(f"The paper: {first['printed']}. Compared: {first['comparison']}. Criterion: {first['criterion']}")
        if first["notebook"]:
            lines[-1] += f" Notebook: [{first['notebook']}]({notebooks}/{first['notebook']}.ipynb)."
        for row in rows.itertuples():
            records = "; ".join(_linked(row.records))
            lines.append(
                f"- **{row.verdict}**, {row.conditions}: {' '.join(row.found)}"
                + (f" Records: {records}." * bool(records))
            )
    return "\n\n".join(lines)


def _linked(names):
    """By net, links to its records: "plain-20, seeds [0](...), [1](...)"."""
    seeds = {}
    for name in names:
        net, *options, seed = name.split("__")
        net += " without warm-up" if "warmup-False" in options else ""
        seeds.setdefault(net, []).append(f"[{seed.removeprefix('seed-')}](../runs/{name}/summary.json)")
    return [f"{net}, seed{'s' if len(links) > 1 else ''} {', '.join(links)}" for net, links in seeds.items()]


def figures(records, folder):
    """Error curves, and Fig. 7 where layers were measured, for each set of conditions: written to the folder.

    Returns {caption: file's name without its ending}.
    """
    saved = {}
    for number, (_, conditions, members) in enumerate(by_conditions(records), start=1):
        panels = {words: _by_depth(members, kind) for kind, words in KINDS.items()}
        panels = {words: nets for words, nets in panels.items() if nets}
        if panels:
            report.save_figure(report.figure_6(members, panels, stacked=True), folder, f"errors_{number}")
            saved[f"Training error (dashed) and test error (bold): {conditions}."] = f"errors_{number}"
        kept, _ = ended(members)
        measured = [record for net in FIGURE_7 for record in kept if record.net == net and len(record.layers)]
        if measured:
            report.save_figure(layers.figure_7(measured), folder, f"responses_{number}")
            saved[f"Standard deviations of layer responses, as Fig. 7: {conditions}."] = f"responses_{number}"
    return saved


def _by_depth(records, kind):
    """The nets of a kind, each as the paper has it: without those of other shortcuts or without warm-up."""
    depths = {record.run.name.depth for record in records if record.net == f"{kind}-{record.run.name.depth}"}
    return [f"{kind}-{depth}" for depth in sorted(depths)]


def save(card, records, folder, figures=()):
    """Write ``scorecard.json``, ``table.csv``, ``table.md`` and the page ``index.html``, which embeds the figures.

    figures: {caption: name}, as of ``figures`` for the same folder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    said, rows, seen, table_6 = summary(card, records), card.to_dict("records"), readable(card), distances(records)
    told = {"summary": said, "table_6": _plain(table_6), "verdicts": rows}
    write(folder / "scorecard.json", json_text(told))
    write(folder / "table.csv", _flat(card).to_csv(index=False, lineterminator="\n"))
    write(folder / "table.md", f"{markdown(card)}\n\n{listing(card, folder)}\n")
    for row in rows:
        row["conditions"] = (
            f"{THEIRS}: {row['conditions']}" if row["as_paper"] and row["records"] else row["conditions"]
        )
    by_claim = {number: [row for row in rows if row["claim"] == number] for number in CLAIMS}
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=False)
    template = environment.from_string((Path(__file__).parent / "page.html").read_text())
    text = template.render(
        summary=said,
        places=list(seen.columns[2:]),
        matrix=seen.to_numpy().tolist(),
        claims=[found[0] for found in by_claim.values()],
        rows=by_claim,
        distances=table_6.to_dict("records"),
        deviations=_items(deviations()),
        figures={caption: _picture(folder / f"{name}.svg") for caption, name in dict(figures).items()},
        notebooks=_notebooks(folder),
        runs="../runs",
    )
    write(folder / "index.html", text)


def _notebooks(folder):
    return Path(os.path.relpath(ROOT / "notebooks", folder)).as_posix()


def _plain(table):
    """A table as json can hold it: None where a cell is empty."""
    return table.astype(object).where(table.notna(), None).to_dict("records")


def _flat(card):
    """The scorecard with its lists and dicts as text."""
    nets = [", ".join(f"{net}: {count}" for net, count in counts.items()) for counts in card["nets"]]
    return card.assign(found=card["found"].map(" ".join), nets=nets, records=card["records"].map(" ".join))


def _picture(path):
    return base64.b64encode(path.read_bytes()).decode()


def deviations():
    """What differs from the paper, and why: a list in Markdown, the README's; empty where that did not come along."""
    path = ROOT / "README.md"
    section = path.read_text().partition("## What differs from the paper, and why")[2] if path.exists() else ""
    return section.partition("\n## ")[0].strip()


def _items(text):
    """The items of a list in Markdown as HTML."""
    items = [str(escape(" ".join(item.split()))) for item in re.split(r"^- ", text, flags=re.M)[1:]]
    bold = [re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", item) for item in items]
    return [Markup(re.sub(r"`(.+?)`", r"<code>\1</code>", item)) for item in bold]


def errors_by_conditions(records):
    """The errors of all nets in Markdown: a table for each set of conditions, without the paper's, which has others."""
    parts = []
    for _, conditions, members in by_conditions(records):
        members = sorted(members, key=lambda record: (record.run.name.residual, record.run.name.depth, record.net))
        shown = report.readable(report.errors(members)).filter(regex="^(net|runs|diverged|ours: .*)$")
        shown = shown.rename(columns=lambda name: name.removeprefix("ours: "))
        shown["net"] = shown["net"].str.replace("resnet", "ResNet")
        aligned = ["left"] + ["right"] * (shown.shape[1] - 1)
        parts.append(f"{conditions}:\n\n{shown.to_markdown(index=False, disable_numparse=True, colalign=aligned)}")
    return "\n\n".join(parts)


def for_readme(card, records):
    """What belongs into the README, by the name of its place."""
    return {"results": errors_by_conditions(records), "scorecard": f"{_answer(card)}\n\n{markdown(card)}"}


def update_readme(card, records, path=ROOT / "README.md"):
    """Put results and scorecard into the README, between their marks. Raises ValueError where these are missing."""
    text = path.read_text()
    for name, content in for_readme(card, records).items():
        marks = f"<!-- {name} -->", f"<!-- /{name} -->"
        before, begin, rest = text.partition(marks[0])
        _, end, after = rest.partition(marks[1])
        if not begin or not end:
            raise ValueError(f"{path} has no place for the {name}: mark one by {marks[0]} and {marks[1]}")
        text = f"{before}{begin}\n\n{content}\n\n{end}{after}"
    write(path, text)
