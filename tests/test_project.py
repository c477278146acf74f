import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
README = (ROOT / "README.md").read_text()
CHINESE = ROOT / "README.zh.md"
PAGES = [ROOT / "README.md", CHINESE, *sorted((ROOT / "docs").glob("*.md"))]

# What each part of the package may import of the others. Those above know nothing of those below; what reports never
# trains, and only it draws.
MAY_IMPORT = {
    "paper": set(),
    "recipes": {"engine"},
    "engine": set(),
    "models": {"engine"},
    "data": {"engine"},
    "detection": {"engine", "models", "measure"},
    "runs": {"engine", "models", "data", "recipes", "measure", "evaluate", "detection"},
    "parameters": {"engine", "runs"},
    "measure": {"engine"},
    "evaluate": {"engine", "data", "detection"},
    "pretrained": {"engine", "models", "data", "measure", "evaluate", "runs"},
    "hub": {"engine", "models", "data", "runs"},
    "trainers": {"engine", "data", "pretrained", "runs"},
    "clusters": {"engine", "data", "trainers"},
    "sweeps": {"engine", "data", "runs", "trainers", "clusters"},
    "verify": {"engine", "data", "runs", "trainers"},
    "preview": {"data", "measure", "models", "report", "runs"},
    "explore": {"engine", "data", "models", "recipes", "evaluate", "report", "runs"},
    "report": {"engine", "paper", "recipes", "runs"},
    "benchmark": {"engine", "data", "paper", "runs", "trainers", "sweeps", "report"},
    "__main__": {"engine", "runs", "trainers", "verify"},
}


def files_of(part):
    folder = ROOT / "replication" / part
    return sorted(folder.glob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]


def imports(path):
    """The full names of the modules and objects that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{name.name}" for name in node.names)


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_imports_point_one_way(part):
    found = [name for path in files_of(part) for name in imports(path)]
    parts = {"Run": "runs"}  # what the package itself offers
    ours = {name.split(".")[1] for name in found if name.startswith("replication.")}
    assert {parts.get(name, name) for name in ours} - {part} <= MAY_IMPORT[part]
    if part != "report":
        assert not {name.split(".")[0] for name in found} & {"matplotlib", "seaborn"}


def test_every_module_has_its_place():
    parts = {path.stem for path in (ROOT / "replication").iterdir() if path.suffix == ".py" or path.is_dir()}
    assert parts - {"__init__", "__pycache__"} == set(MAY_IMPORT)


def test_importing_the_package_draws_nothing():
    code = "import sys, replication; print({'matplotlib', 'seaborn', 'torchvision'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_torchvision_imports_beside_this_torch():
    code = "import replication, torchvision.transforms.v2, torchvision.models, torchvision.datasets"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_the_conda_environment_installs_what_pip_does():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert environment["name"] == PROJECT["name"]
    python, pip, by_pip = environment["dependencies"]
    assert pip == "pip"
    # All else is left to pyproject.toml, so that the two cannot disagree.
    assert by_pip == {"pip": ["-e .[test]"]}
    lowest = re.fullmatch(r">=(3\.\d+)", PROJECT["requires-python"])[1]
    assert python == f"python={lowest}"


def test_torch_and_torchvision_are_pinned_as_a_pair():
    assert {"torch==2.13.0", "torchvision==0.28.0"} <= set(PROJECT["dependencies"])


def test_the_readme_has_two_commands_of_set_up():
    commands = [line for line in README.splitlines() if "pip install" in line and "venv" in line.split()]
    assert len(commands) == 2
    assert all(command.startswith("python3 -m venv .venv && ") for command in commands)
    assert "0_quickstart" in commands[0]
    assert commands[1].endswith(".venv/bin/python -m pytest")
    assert 'grep "^python3 -m venv .*pytest$" README.md' in (ROOT / ".ci" / "run").read_text()


def anchors(text):
    """What links to headings of a Markdown text are called, as GitHub makes them."""
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^#+ (.*)$", text, re.M)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        path, _, anchor = target.partition("#")
        place = page.parent / path if path else page
        assert target.startswith("https://") or place.exists(), target
        assert not anchor or anchor in anchors(place.read_text()), target


def test_the_readme_leads_to_every_other_page():
    for page in PAGES[1:]:
        assert f"]({page.relative_to(ROOT).as_posix()})" in README


def test_both_readmes_fit_on_a_few_screens():
    assert max(len(text.splitlines()) for text in (README, CHINESE.read_text())) <= 150


def commands(text):
    """The blocks of code of a page, without comments."""
    return [re.sub(r"  # .*", "", block) for block in re.findall(r"```\w*\n(.*?)```", text, re.DOTALL)]


def numbers(text):
    return sorted(re.findall(r"\d[\d,.]*(?<![,.])", text))


def rows(text):
    """The numbers, links and code of each row of the tables of a page, in order."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [(numbers(line), re.findall(r"\]\((.*?)\)", line), re.findall("`.*?`", line)) for line in lines]


def test_the_chinese_readme_has_the_same_commands_numbers_and_links():
    english, chinese = README, CHINESE.read_text()
    assert commands(chinese) == commands(english)
    assert rows(chinese) == rows(english)
    english, chinese = (re.sub(r"```.*?```", "", text, flags=re.DOTALL).split("\n## ") for text in (english, chinese))
    assert list(map(numbers, chinese)) == list(map(numbers, english))
    links = [[sorted(re.findall(r"\]\((.*?)\)", part)) for part in parts[1:]] for parts in (chinese, english)]
    assert links[0] == links[1]


def test_the_readme_names_every_notebook():
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        assert path.stem in README


def test_licence_and_citation_agree_with_the_package():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()  # what the format requires
    assert citation["cff-version"] == "1.2.0"
    assert str(citation["version"]) == PROJECT["version"]
    assert citation["license"] == PROJECT["license"] == "MIT"
    assert citation["authors"] == [{"name": "The maintainers of this replication"}]
    (paper,) = citation["references"]
    assert [author["family-names"] for author in paper["authors"]] == ["He", "Zhang", "Ren", "Sun"]
    assert (paper["doi"], paper["year"]) == ("10.1109/CVPR.2016.90", 2016)
    assert paper["identifiers"][0]["value"] == "arXiv:1512.03385"
    assert PROJECT["license-files"] == ["LICENSE"]
    assert (ROOT / "LICENSE").read_text().startswith("MIT License\n\nCopyright (c) 2026 the maintainers of this replic")
    assert f"## {PROJECT['version']}\n" in (ROOT / "CHANGELOG.md").read_text()
