import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from replication import paper, report
from replication.recipes import Recipe
from replication.report import page
from replication.runs import records as kept


class Page(HTMLParser):
    """What a page refers to, its text, and whether all that it opens is closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.loads, self.links, self.text, self.tags = [], [], [], "", set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.tags.add(tag)
        if tag not in ("meta", "img"):
            self.open.append(tag)
        self.links += [values["href"]] if tag == "a" else []
        self.loads += [values[name] for name in ("src", "href") if tag != "a" and name in values]

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag != "img":
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def records(make):
    errors = {"plain-20": (2, 9), "plain-56": (8, 13), "resnet-20": (1, 8.5)}
    made = [
        make(train + seed / 10, test + seed / 10, net=net, dataset="cifar10", seed=seed)
        for net, (train, test) in errors.items()
        for seed in (0, 1)
    ]
    return [*made, make(50, 60, net="plain-20"), make(80, 90, net="plain-56")]


def test_the_page_holds_all_it_needs(records, tmp_path):
    folder = tmp_path / "7_scorecard"
    page.save(report.scorecard(records), records, folder, page.figures(records, folder))
    shown = Page((folder / "index.html").read_text())
    assert not shown.open
    assert len(shown.loads) == 2
    assert all(load.startswith("data:image/svg+xml;base64,") for load in shown.loads)
    assert not re.search(r"@import|url\(|<script|<link", (folder / "index.html").read_text())
    for claim in paper.CLAIMS.values():
        assert claim.statement in " ".join(shown.text.split())
    # Claim 1 by two runs a net; of claim 11 the counts alone, since these runs measured no layers.
    assert "Of the paper's 13 claims, judged under its own conditions: 1 reproduced, 1 partly." in shown.text
    assert "Judged from 8 runs of your own." in shown.text
    assert all(link.startswith("#") or (folder / link).exists() for link in shown.links)


def test_data_sets_and_recipes_that_occur_are_explained(records, make, tmp_path):
    own = Recipe(10, batch=64)
    every = [*records, make(1, 2, net="plain-8", dataset="pets", recipe="note"), make(1, 2, net="plain-8", recipe=own)]
    lines = page.sections(report.scorecard(every), every, tmp_path)["What was run"].splitlines()
    told = {line.partition(":")[0]: line.partition(": ")[2] for line in lines if line.startswith("- ")}
    names = ["Data set `cifar10`", "Data set `digits`", "Data set `pets`", "Recipe `cifar`", "Recipe `digits`"]
    assert list(told) == [f"- {name}" for name in (*names, "Recipe `note`", f"Recipe `{own.name}`")]
    assert told["- Recipe `note`"] == "a Chinese reading note on the paper, with batches of 100 and momentum 0.8."
    assert told["- Recipe `cifar`"].startswith("section 4.2 of the paper")
    assert told["- Data set `pets`"] == "images of one's own, from a folder of this name."
    assert "run.json" in told[f"- Recipe `{own.name}`"]


def test_figures_of_records_that_are_gone_go_too(records, tmp_path):
    folder = tmp_path / "7_scorecard"
    assert list(page.figures(records, folder).values()) == ["errors_1", "errors_2"]
    assert list(page.figures(records[:6], folder).values()) == ["errors_1"]
    assert sorted(path.name for path in folder.iterdir()) == ["errors_1.png", "errors_1.svg"]


def test_a_page_of_nothing_says_so(tmp_path):
    page.save(report.scorecard([]), [], tmp_path, page.figures([], tmp_path))
    shown = Page((tmp_path / "index.html").read_text())
    assert "Not yet: none of the paper's 13 claims was tested under its own conditions." in shown.text
    assert "Nothing has been run yet." in shown.text


def test_the_scorecard_for_machines_says_the_same(records, tmp_path):
    card = report.scorecard(records)
    page.save(card, records, tmp_path)
    told = json.loads((tmp_path / "scorecard.json").read_text())
    assert [row["verdict"] for row in told["verdicts"]] == card["verdict"].tolist()
    assert {row["claim"] for row in told["verdicts"]} == set(range(1, 14))
    assert [row["net"] for row in told["table_6"]] == list(paper.TABLE_6.errors)
    assert [row["runs"] for row in told["summary"]["runs"]] == [6, 2]
    assert told["summary"]["runs"][0]["hours"] == pytest.approx(6 / 60)
    assert told["summary"]["runs"][0]["hardware"] == "a processor, 2 cores"


def test_distances_are_to_runs_under_the_papers_conditions_alone(records, make):
    table = page.distances([*records, make(1, 7, net="resnet-56", dataset="cifar10-small")]).set_index("net")
    assert table.loc["resnet-20", "ours_values"] == "8.50, 8.60"
    assert table.loc["resnet-20", ["paper", "ours", "distance", "n"]].tolist() == pytest.approx([8.75, 8.55, -0.2, 2])
    assert table["n"].sum() == 2


@pytest.mark.parametrize(
    "name",
    [
        "<script>alert(1)</script>",
        "<img src=x onerror=alert(1)>",
        "|<b onclick=alert(1)>|",
        "![x](x.png)",
        "[x](javascript:alert(1))",
        r"\[x](javascript:alert(1))",
        "`<script>`&lt;script>alert(1)",
    ],
)
def test_what_comes_from_outside_is_escaped(records, tmp_path, name):
    path = records[0].folder / "environment.json"
    path.write_text(json.dumps({"device": name, "processor": "", "cores": 1}))
    page.save(report.scorecard(records), records, tmp_path)
    text = (tmp_path / "index.html").read_text()
    assert "alert(1)" in text or "x.png" in text
    shown = Page(text)
    assert not shown.open
    assert not shown.loads
    assert not {"script", "b", "img"} & shown.tags
    assert all(link.startswith("#") or link.endswith(".ipynb") for link in shown.links)


def test_the_table_of_verdicts_has_the_papers_conditions_first(records):
    shown = page.readable(report.scorecard(records)).set_index("claim")
    places = ["digits, 1,100 iterations", "cifar10, 64,000 iterations"]  # the last for claims made of ImageNet nets
    assert list(shown.columns) == ["", "the paper's conditions", *places]
    assert shown.iloc[0].tolist() == [1, "reproduced", "mixed", "–"]
    assert shown.iloc[3].tolist() == [4, "not attempted", "–", "consistent"]
    assert shown.iloc[12].tolist() == [13, "not attempted", "–", "–"]


def test_readme_and_docs_hold_results_and_verdicts_of_the_committed_records(committed):
    records, evaluations = page.everything(committed / "results" / "published", "own")
    for name, texts in page.for_docs(report.scorecard(records, evaluations), records).items():
        for place, content in texts.items():
            block = (committed / name).read_text().partition(f"<!-- {place} -->")[2].partition(f"<!-- /{place} -->")[0]
            assert block.strip() == content, "run 7_scorecard with readme: True"


def test_the_readme_has_a_row_for_each_claim_with_the_numbers_that_decide(records):
    lines = page.claims_table(report.scorecard(records)).splitlines()[2:]
    rows = [line.removeprefix("| ").removesuffix(" |").split(" | ") for line in lines]
    assert [row[0] for row in rows] == list(map(str, paper.CLAIMS))
    claims = [(row[1], row[2]) for row in rows]
    assert claims == [(claim.name, claim.printed) for claim in paper.CLAIMS.values()]
    # Two runs a net under the paper's conditions, which come first: training errors of 2 and 2.1, 8 and 8.1.
    ours, place = "training error: plain-20 2.05 %, plain-56 8.05 % (n = 2)", "cifar10, 64,000 iterations"
    assert rows[0][3:] == [ours, place, "reproduced", "[2](notebooks/2_plain_vs_residual.ipynb)"]
    assert rows[6][3:] == ["–", "–", "not attempted", "[6](notebooks/6_imagenet.ipynb)"]


def test_errors_are_shown_by_conditions_without_the_papers(records):
    text = page.errors_by_conditions(records)
    assert text.count("iterations, float32:\n\n| net") == 2
    assert "ResNet-20" in text
    assert "8.75" not in text  # the paper's, whose conditions are others


def test_readme_and_docs_are_updated_between_their_marks(records, tmp_path):
    card = report.scorecard(records)
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text("<!-- claims --><!-- /claims -->")
    path = tmp_path / "docs" / "results.md"
    path.write_text("before\n<!-- results -->\nold\n<!-- /results -->\n<!-- scorecard --><!-- /scorecard -->\nafter\n")
    page.update_docs(card, records, tmp_path)
    results, scorecard = page.for_docs(card, records)["docs/results.md"].values()
    first = f"<!-- results -->\n\n{results}\n\n<!-- /results -->"
    second = f"<!-- scorecard -->\n\n{scorecard}\n\n<!-- /scorecard -->"
    assert path.read_text() == f"before\n{first}\n{second}\nafter\n"
    path.write_text("<!-- results --><!-- /results -->\nno place\n")
    with pytest.raises(ValueError, match="has no place for the scorecard: mark one by <!-- scorecard -->"):
        page.update_docs(card, records, tmp_path)
    assert path.read_text() == "<!-- results --><!-- /results -->\nno place\n"


def test_the_committed_scorecard_is_that_of_the_committed_records(committed, monkeypatch):
    monkeypatch.setattr(kept, "PUBLISHED", committed / "results" / "published")
    records, evaluations = page.everything()
    names = [committed / "results" / "published" / "7_scorecard" / name for name in ("scorecard.json", "table.csv")]
    before = [path.read_bytes() for path in names]
    page.save(report.scorecard(records, evaluations), records, committed / "results" / "published" / "7_scorecard")
    assert [path.read_bytes() for path in names] == before


def test_deviations_are_a_list_from_the_docs():
    lines = page.deviations().splitlines()
    assert sum(line.startswith("- **") for line in lines) > 10
    assert all(line.startswith(("- **", "  ")) or not line for line in lines)
    assert "`Run(..., bn_batch=64)`" in page.deviations()


def test_the_scorecard_judges_published_records_or_ones_own_or_both(make, tmp_path, monkeypatch):
    published = tmp_path / "repository" / "results" / "published"
    for number, seed in enumerate((0, 1)):
        record = make(5, 6 + number, net="plain-20", seed=seed)
        shutil.copytree(record.folder, published / "runs" / record.run.id)
    shutil.rmtree(record.folder)
    (published / "6_imagenet").mkdir()
    (published / "6_imagenet" / "evaluations.json").write_text('{"ensemble": {}}')
    make(5, 8, net="plain-20", seed=2)
    monkeypatch.setattr(kept, "PUBLISHED", published)
    texts = {
        "published": "2 runs published with this repository",
        "own": "2 runs of your own",
        "both": "1 run published with this repository and 2 runs of your own",
    }
    for judged, text in texts.items():
        records, evaluations = page.everything(tmp_path, judged)
        assert page.sources(records) == f"Judged from {text}."
        assert len(records) == (3 if judged == "both" else 2)
        assert evaluations == ({} if judged == "own" else {"ensemble": {}})
    assert [record.run.seed for record in records] == [0, 1, 2]
    with pytest.raises(ValueError, match="judged 'all': choose published, own, both"):
        page.everything(tmp_path, "all")


ASCII = """
import locale, sys
from pathlib import Path
from replication import all_finished, report
from replication.report import page
assert sys.platform != "linux" or locale.getencoding() == "ANSI_X3.4-1968"
records = all_finished(sys.argv[1])
card = report.scorecard(records)
page.save(card, records, sys.argv[2])
page.update_docs(card, records, Path(sys.argv[3]))
"""


def test_text_is_utf_8_in_any_locale(records, committed):
    folder = committed / "7_scorecard"
    variables = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    results = records[0].folder.parents[1]
    subprocess.run([sys.executable, "-c", ASCII, results, folder, committed], env=variables, check=True)
    assert "–" in (committed / "README.md").read_text("utf-8")
    assert "–" in (folder / "table.md").read_text("utf-8")
