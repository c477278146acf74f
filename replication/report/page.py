"""The scorecard for people: its page, its tables in README and docs, and what these say at the top."""

import os
from pathlib import Path

import nbformat.v4
import pandas as pd
from nbconvert import HTMLExporter

from replication import report
from replication.engine import files
from replication.engine.checks import choice
from replication.engine.files import write
from replication.paper import CLAIMS, FIGURE_7, TABLE_6
from replication.recipes import SMOKE_TESTS
from replication.report import layers
from replication.report.claims import THEIRS
from replication.report.comparisons import RULES, VERDICTS
from replication.report.error_curves import by_kind
from replication.report.tables import distance, in_markdown, markdown, signed, spelled, spread, what_is
from replication.runs import records as run_records
from replication.runs.records import by_conditions, ended, json_text, read_json

ROOT = files.SOURCE  # with README, docs and notebooks
HEAD = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>Deep Residual Learning, a replication: the scorecard</title>
<style>
body { max-width: 76rem; margin: 0 auto; padding: 1rem; font: 16px/1.5 system-ui, sans-serif; }
table { display: block; overflow-x: auto; border-collapse: collapse; font-size: .9rem; }
th, td { padding: .25rem .75rem .25rem 0; border-bottom: 1px solid #d9dde1; vertical-align: top; }
img { width: 100%; max-width: 60rem; } .anchor-link { display: none; }
</style>
"""


def everything(results="results", judged="published"):
    """The records to judge, smoke tests left out, and the errors of an ensemble that ``6_imagenet`` left beside them.

    judged: "published", those that come with this repository; "own", those in ``results``; or "both", where an own
    record takes the place of a published one of the same run. Raises ValueError for another ``judged``, and where there
    is no folder of the records asked for.
    """
    own, published = files.folder("results", results), run_records.PUBLISHED
    there = [folder for folder in (published, own) if folder is not None and folder.is_dir()]
    folders = {"published": [published], "own": [own], "both": there}
    if folders[choice("judged", judged, folders)] == [None]:
        raise ValueError("judged 'published': this package was installed without its repository, choose own")
    records, evaluations = {}, {}
    for folder in folders[judged]:
        records |= {record.run.id: record for record in run_records.all_finished(folder)}
        evaluations |= read_json(folder / "6_imagenet" / "evaluations.json")
    return [record for _, record in sorted(records.items()) if record.run.recipe not in SMOKE_TESTS], evaluations


def sources(records):
    """In words, how many of the records come with this repository and how many are one's own."""
    published = sum(map(run_records.is_published, records))
    counts = {"published with this repository": published, "of your own": len(records) - published}
    parts = [f"{count} run{'s' if count > 1 else ''} {whose}" for whose, count in counts.items() if count]
    return f"Judged from {' and '.join(parts) or 'no runs'}."


def summary(card, records):
    """What a scorecard says at a glance: whose records were judged, an answer, {claim: {conditions: verdict}}, runs."""
    verdicts = readable(card).set_index("").drop(columns="claim").to_dict("index")
    runs = _cells(runs_table(card, records))
    return {"judged": sources(records), "answer": answer(card), "claims": verdicts, "runs": runs}


def answer(card):
    """Whether the paper was reproduced, in a sentence."""
    counts = _counted(card[card["as_paper"]])
    if not counts:
        return f"Not yet: none of the paper's {len(CLAIMS)} claims was tested under its own conditions."
    return f"Of the paper's {len(CLAIMS)} claims, judged under its own conditions: {counts}."


def _counted(rows):
    """How many claims have which verdict, in words."""
    counts = rows.groupby("verdict")["claim"].nunique().drop("not attempted", errors="ignore")
    return ", ".join(f"{counts[each]} {each}" for each in VERDICTS if each in counts)


def runs_table(card, records):
    """What was run: a row for each set of conditions, with hours of training, hardware and verdicts."""
    return pd.DataFrame(
        {
            "conditions": conditions,
            "runs": len(members),
            "diverged": sum(ended(members)[1].values()),
            "nets": len({record.net for record in members}),
            "hours": round(sum(record.summary["seconds"] for record in members) / 3600, 2),
            "hardware": ", ".join(dict.fromkeys(_machine(record.environment) for record in members)),
            "verdicts": _counted(card[card["conditions"] == conditions]) or "no claim tested",
        }
        for _, conditions, members in by_conditions(records)
    )


def _machine(environment):
    plural = "s" if environment["cores"] != 1 else ""
    cpu = f"{environment['processor']}, {environment['cores']} core{plural}"
    return cpu if environment["device"] == "cpu" else environment["device"]


def distances(records):
    """Ours beside Table 6, as far as it was run under the paper's conditions: a row for each of its nets and precision.

    Errors are in percent, distances in points; ours are the mean and the standard deviation over n runs.
    """
    table = report.errors(records)
    table = table.assign(n=table["n"] - table["diverged"], distance=distance(table))
    names = {"test_error": "ours", "test_error_std": "ours_std", "test_error_values": "ours_values"}
    table = table[table["comparable"] & (table["n"] > 0)].rename(columns=names)
    nets = pd.DataFrame(TABLE_6.errors.items(), columns=["net", "paper"])
    table = nets.merge(table[["net", *names.values(), "distance", "n", "precision"]], how="left", on="net")
    return table.astype({"n": "Int64"}).fillna({"n": 0})


def readable(card):
    """The scorecard for the eye: a row for each claim, a column for each set of conditions, the paper's first."""
    card = card.assign(place=card["place"].where(~card["as_paper"], THEIRS))
    shown = card.groupby(["claim", "name", "place"], sort=False)["verdict"].agg(" / ".join).unstack()
    places = dict.fromkeys([THEIRS, *card["place"]])
    return shown.reindex(columns=places).fillna("–").reset_index().rename(columns={"claim": "", "name": "claim"})


def sections(card, records, folder):
    """The scorecard in Markdown, by the titles of its sections; links are those from ``folder``."""
    table_6 = distances(records)
    table_6["ours"] = [spread(row, "ours") for row in table_6.to_dict("records")]
    table_6["distance"] = table_6["distance"].map(signed)
    runs = "Nothing has been run yet."
    if records:
        runs = f"{markdown(runs_table(card, records), 99)}\n\nHours are the sum over all runs, several of which may "
        runs += f"have been trained side by side.\n\n{origins(records)}"
    return {
        "Was the paper reproduced?": f"{answer(card)} {sources(records)}\n\n{markdown(readable(card), 99)}\n\n{RULES}",
        "What was run": runs,
        "The claims one by one": listing(card, folder),
        "Distances to Table 6": "CIFAR-10 test errors in percent after 64,000 iterations; the paper's error of "
        "ResNet-110 is the best of five runs. Only runs under the paper's conditions are shown.\n\n"
        + markdown(table_6.drop(columns=["ours_std", "ours_values"])),
        "What differs from the paper, and why": deviations(),
    }


def origins(records):
    """What the data sets and recipes of records are and where they come from: a list in Markdown."""
    words = {f"Data set `{name}`": what_is(dataset=name) for name in sorted({record.run.dataset for record in records})}
    recipes = sorted({record.run.recipe_name for record in records})
    words |= {f"Recipe `{name}`": what_is(recipe=name) for name in recipes}
    return "\n".join(f"- {name}: {text}." for name, text in words.items())


def listing(card, folder):
    """The claims one by one in Markdown: criteria, verdicts and what was found; links are those from ``folder``."""
    notebooks, lines = Path(os.path.relpath(ROOT / "notebooks", folder)).as_posix(), []
    for number, rows in card.groupby("claim", sort=False):
        first = rows.iloc[0]
        lines += [f"### {number}. {first['name']}", f"{first['statement']} (Section {first['section']})"]
        lines.append(f"The paper: {first['printed']}. Compared: {first['comparison']}. Criterion: {first['criterion']}")
        if first["notebook"]:
            lines[-1] += f" Notebook: [{first['notebook']}]({notebooks}/{first['notebook']}.ipynb)."
        for row in rows.itertuples():
            runs = ", ".join(f"{count} of {spelled(net)}" for net, count in row.nets.items())
            items = [f"- **{row.verdict}**, {row.conditions}" + (f" ({runs})" if runs else "")]
            items += [f"  - {sentence}" for sentence in row.found]
            lines.append(in_markdown("\n".join(items)))
    return "\n\n".join(lines)


def figures(records, folder):
    """Error curves, and Fig. 7 where layers were measured, for each set of conditions: written to the folder.

    Returns {caption: file's name without its ending}.
    """
    for kind in ("errors", "responses"):  # of conditions of which there are no records any more
        for old in Path(folder).glob(f"{kind}_[0-9]*.[ps][nv]g"):
            old.unlink()
    names = {}
    for number, (_, conditions, members) in enumerate(by_conditions(records), start=1):
        if panels := by_kind(members, sorted({record.run.name.depth for record in members})):
            report.save_figure(report.figure_6(members, panels, stacked=True), folder, f"errors_{number}")
            names[f"Training error (dashed) and test error (bold): {conditions}."] = f"errors_{number}"
        finite, _ = ended(members)
        measured = [record for net in FIGURE_7 for record in finite if record.net == net and len(record.layers)]
        if measured:
            report.save_figure(layers.figure_7(measured), folder, f"responses_{number}")
            names[f"Standard deviations of layer responses, as in Fig. 7: {conditions}."] = f"responses_{number}"
    return names


def save(card, records, folder, figures=()):
    """Write ``scorecard.json``, ``table.csv``, ``table.md`` and the page ``index.html``, which embeds the figures.

    figures: {caption: name}, as of ``figures`` for the same folder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    contents = {"summary": summary(card, records), "table_6": _cells(distances(records)), "verdicts": _cells(card)}
    write(folder / "scorecard.json", json_text(contents))
    nets = [", ".join(f"{net}: {count}" for net, count in counts.items()) for counts in card["nets"]]
    flat = card.assign(found=card["found"].map(" ".join), nets=nets, records=card["records"].map(" ".join))
    write(folder / "table.csv", flat.to_csv(index=False, lineterminator="\n"))
    parts = [f"## {title}\n\n{text}" for title, text in sections(card, records, folder).items()]
    write(folder / "table.md", "\n\n".join(parts) + "\n")
    title = "# Deep Residual Learning for Image Recognition (CVPR 2016), a replication: the scorecard"
    pictures = [f"![]({name}.svg)\n\n{in_markdown(caption)}" for caption, name in dict(figures).items()]
    text = "\n\n".join([title, *parts[:3], *(["## Figures"] if pictures else []), *pictures, *parts[3:]])
    page = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(text, id="scorecard")])
    exporter = HTMLExporter(template_name="basic", embed_images=True)
    body, _ = exporter.from_notebook_node(page, {"metadata": {"path": str(folder)}})
    write(folder / "index.html", f"{HEAD}{body}</html>\n")


def _cells(table):
    """The rows of a table as JSON can hold them: None where a cell is empty."""
    return table.astype(object).where(table.notna(), None).to_dict("records")


def deviations():
    """What differs from the paper, and why: a list in Markdown; empty where the docs did not come along."""
    path = ROOT / "docs" / "deviations.md"
    return path.read_text("utf-8").partition("\n")[2].strip() if path.exists() else ""


def errors_by_conditions(records):
    """The errors of all nets in Markdown: a table for each set of conditions, without the paper's, which has others."""
    parts = []
    for _, conditions, members in by_conditions(records):
        members = sorted(members, key=lambda record: (record.run.name.residual, record.run.name.depth, record.net))
        shown = report.readable(report.errors(members)).filter(regex="^(net|runs|diverged|ours: .*)$")
        shown = shown.rename(columns=lambda name: name.removeprefix("ours: "))
        parts.append(f"{conditions}:\n\n{markdown(shown)}")
    return "\n\n".join(parts)


def claims_table(card):
    """The claims in Markdown, a row each, judged under the paper's conditions or else under the first others there are.

    Rows are not padded: a column is as wide as its longest cell otherwise.
    """
    lines = ["| | claim | the paper | ours | conditions | verdict | notebook |", f"{'|:--' * 7}|"]
    for number, rows in card.groupby("claim", sort=False):
        row = min(rows.to_dict("records"), key=lambda row: row["verdict"] == "not attempted")
        place = row["place"] if row["ours"] else "–"
        cells = [str(number), row["name"], row["printed"], row["ours"] or "–", place, row["verdict"]]
        name = row["notebook"]
        link = f"[{name.partition('_')[0]}](notebooks/{name}.ipynb)" if name else "–"
        lines.append(f"| {' | '.join([*map(in_markdown, map(spelled, cells)), link])} |")
    return "\n".join(lines)


def for_docs(card, records):
    """What the README and docs/results.md hold of the results: {page: {name of the place: text}}."""
    verdicts = f"{answer(card)}\n\n{markdown(readable(card), 99)}"
    results = {"results": errors_by_conditions(records), "scorecard": verdicts}
    claims = f"{answer(card)}\n\n{claims_table(card)}"
    return {"README.md": {"claims": claims}, "docs/results.md": results}


def update_docs(card, records, root=ROOT):
    """Put results and verdicts into README and docs, between their marks. Raises ValueError where these are missing."""
    for page, texts in for_docs(card, records).items():
        files.fill(root / page, texts)
