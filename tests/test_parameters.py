import re
from pathlib import Path

import nbformat
import pytest
from papermill.translators import translate_parameters

from replication import parameters
from replication.engine import files

NOTEBOOKS = {path.stem: path for path in sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))}
# By parameter, what none of them may be: of another kind, or no choice.
WRONG = {
    "dataset": (None, 7, "", ["digits"]),
    "seeds": (None, 0, "0", {}, [0.0], [True], [0, 0]),
    "schedule": (None, "0.1", True, 0, [1.0]),
    "precision": (None, 16, "float16"),
    "recipe": (7, "", "cifer"),
    "depth": (None, 20.0, "20", True, [20]),
    "depths": (None, 20, "20", [20.0], []),
    "nets": (None, 20, "resnet-20", [20], {}),
    "shortcuts": (7, "ABC", [1], []),
    "bn_batch": ("32", 0.5, True),
    "processes": (None, "2", 0, True),
    "ways": (None, "10-crop", [10], []),
    "ensemble": (7, "", "resnet-18", [18]),
    "weights": (7, "resnet18.pth", ["resnet18.pth"], {"theirs": 18}, {18: {}}),
    "rounds": (None, "5", 1.5, True, 0),
    "iterations": (None, "20", 1.5, True, 0),
    "notebooks": (None, 0, "0", ["0"], [True]),
    "cluster": (7, True, [], "nowhere"),
    "fresh": (None, 0, "no"),
    "readme": (None, 0, "no"),
    "shown": (None, "4", 0, True),
    "judged": (None, 7, "all", []),
    "lesions": (None, "resnet-20", [20], ["resnet-21"]),
    "pair": (None, "resnet-20", [20], ["plain-20-C"]),
    "results": (None, 7, ""),
    "data": (None, 7, ""),
    "output": (None, 7, ""),
}
NAMED = {
    "cluster": "executor",
    "ensemble": "ensemble|net of the ensemble",
    "lesions": "lesions|net|depth",
    "nets": "nets?",
    "pair": "pair|net|shortcut",
    "shortcuts": "shortcuts?|net",
}


def code(name):
    return [cell.source for cell in nbformat.read(NOTEBOOKS[name], 4).cells if cell.cell_type == "code"]


def checking(name):
    """The cells that check parameters: the first after them, and the first that trains by ``run_all`` or measures."""
    first, *others = code(name)[1:]
    return "\n".join([first, next(cell for cell in others if "preview." not in cell and "torch" not in cell)])


def defaults(name):
    values = {}
    exec(code(name)[0], values)
    return {parameter: value for parameter, value in values.items() if parameter != "__builtins__"}


@pytest.mark.parametrize("cells", [["", "a = 1\nb = 2", "# Parameters\na = 3\n"], ["", "a = 1"], []])
def test_known_parameters_pass(cells):
    parameters.start_notebook({"In": cells})


def test_parameters_may_be_edited_and_run_again():
    cells = ["", "a = 1", "# Parameters\na = 3\n", "%matplotlib inline", "figure = 1", "# Parameters\na = 4\n"]
    parameters.start_notebook({"In": cells})


def test_an_unknown_parameter_is_an_error_that_names_the_nearest():
    cells = [
        "",
        "schedule = 1.0  # fraction\nseeds = [0]\n",
        "# Parameters\nshedule = 0.1\n",
        "start_notebook(globals())",
    ]
    with pytest.raises(ValueError, match=r"parameter 'shedule': choose schedule, seeds \(did you mean 'schedule'\?\)"):
        parameters.start_notebook({"In": cells})


OWN = 'results = "results"  # folder\nschedule = 1.0  # fraction\nseeds = [0]  # runs'
START = "from replication import start_notebook\n\nstart_notebook(globals())"


def given(**values):
    """The cell of these parameters, by papermill itself."""
    return translate_parameters("python3", "python", values, "Parameters").rstrip("\n")  # as IPython keeps it


@pytest.mark.parametrize(
    "cells",
    [
        [OWN, given(PAPERMILL_INPUT_PATH="a.ipynb", PAPERMILL_OUTPUT_PATH="b.ipynb"), START],
        [OWN, given(PAPERMILL_OUTPUT_PATH="b.ipynb", results="run #3", schedule=0.1), START],
        # The notebook's own cell has that heading.
        [f"# Parameters\n{OWN}", START],
        [f"# Parameters\n{OWN}", given(seeds=[1]), START],
        [f"# Parameters\n{OWN}", START, f"# Parameters\n{OWN}", START],
        # A cell of the user's has it.
        [OWN, "# Parameters\nrate = 0.3  # mine", START],
        [OWN, given(seeds=[1]), START, "# Parameters\nrate, width = 0.3, 16", START],
        [OWN, given(seeds=[1]), "# Parameters\nrate = 0.3", START],
        [OWN, START, "# Parameters\nrate = 0.3", START],
        [OWN, START, "# Parameters\nseeds = [1]\nrate = 0.3", START],
        # Executed twice, or in another order.
        [OWN, given(results="x", seeds=[1]), given(results="x", seeds=[1], schedule=0.1), START],
        [OWN, given(seeds=[1]), START, "figure = 1", given(seeds=[2]), START],
        [given(results="x", seeds=[1]), OWN, START, given(results="x", seeds=[1]), START],
        [OWN, START, "figure = 1", given(seeds=[2]), START],
        ["scratch = 1", given(seeds=[2]), OWN, START],
        # Mended, after it was refused.
        [OWN, given(shedule=0.1), START, OWN, START],
        [OWN, given(shedule=0.1), START, given(schedule=0.1), START],
        # No Python, or with types.
        [OWN, "# Parameters\nschedule = = 0.1", START],
        ["results: str = 'x'  # folder\nseeds: list = [0]  # runs", given(seeds=[1]), START],
    ],
)
def test_cells_may_be_anyones_and_executed_in_any_order(cells):
    parameters.start_notebook({"In": ["", *cells]})


@pytest.mark.parametrize(
    "cells",
    [
        [OWN, given(shedule=0.1), START],
        [OWN, given(results="x", shedule=0.1), START],
        [OWN, given(PAPERMILL_INPUT_PATH="a.ipynb", shedule=float("nan")), START],
        [f"# Parameters\n{OWN}", given(shedule=0.1), START],
        ["%matplotlib inline", "scratch = 1", OWN, given(shedule=0.1), START],
        [OWN, given(seeds=[1]), START, "# Parameters\nseeds = [1]\nshedule = 0.1", START],
        [OWN, given(seeds=[1]), START, OWN, given(shedule=0.1), START],
        ["results: str = 'x'  # folder\nschedule: float = 1.0  # fraction", given(shedule=0.1), START],
    ],
)
def test_a_misspelt_parameter_is_found_wherever_its_cell_was_executed(cells):
    with pytest.raises(ValueError, match=r"^parameter 'shedule': choose .*did you mean 'schedule'"):
        parameters.start_notebook({"In": ["", *cells]})


def test_folders_are_replaced_where_they_are_joined(tmp_path, monkeypatch):
    monkeypatch.setenv("PLACE", str(tmp_path))
    namespace = {"results": "$PLACE/r", "output": "$PLACE/o", "data": "$PLACE/d"}
    parameters.start_notebook(namespace)
    assert namespace == {"results": f"{tmp_path}/r", "output": f"{tmp_path}/o", "data": "$PLACE/d"}
    for name in namespace:
        with pytest.raises(ValueError, match=f"^{name} '.NOT_SET/x': the environment has no variable NOT_SET"):
            parameters.start_notebook({name: "$NOT_SET/x"})


def test_without_a_repository_a_line_says_where_relative_folders_start(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(files, "SOURCE", tmp_path / "site-packages")
    parameters.start_notebook({})
    assert capsys.readouterr().out == (
        f"The repository is neither here nor above: relative folders start at {tmp_path}.\n"
    )


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_the_defaults_pass(name):
    parameters.start_notebook(defaults(name))


@pytest.mark.parametrize(
    ("name", "parameter"),
    [
        (name, parameter)
        for name in NOTEBOOKS
        for parameter in defaults(name)
        if (name, parameter) != ("8_speed", "cluster")  # of its last cell
    ],
)
def test_wrong_parameters_are_refused_by_name_before_anything_is_written(name, parameter, tmp_path):
    """By the notebook's own cells, up to the first that trains or measures."""
    for value in WRONG[parameter]:
        namespace = defaults(name) | {"results": str(tmp_path / "results")} | {parameter: value}
        with pytest.raises((TypeError, ValueError), match=f"^(?:{NAMED.get(parameter, parameter + '?')}) "):
            exec(checking(name), namespace)
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("2_plain_vs_residual", {"dataset": "digit"}, "dataset 'digit': choose digits, cifar10, cifar100"),
        ("2_plain_vs_residual", {"schedule": 0}, "schedule 0: choose a fraction"),
        ("4_shortcuts", {"shortcuts": ["A", "D"]}, "shortcut 'D': choose A"),
        ("6_imagenet", {"ways": ["12-crop"]}, "way '12-crop': choose centre crop, 10-crop, multi-scale"),
        ("6_imagenet", {"processes": 3}, "choose 1, 2, or a bn_batch below 8"),
        ("3_cifar_depths", {"cluster": 7}, "executor 7: give a concurrent.futures executor, the address"),
        ("7_scorecard", {"readme": "no"}, "readme 'no': choose True or False"),
        ("8_speed", {"seeds": [0], "precision": "float16"}, "precision 'float16': choose float32, bfloat16"),
    ],
)
def test_the_message_names_the_choices(name, given, message, tmp_path):
    namespace = defaults(name) | {"results": str(tmp_path / "results")} | given
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        exec(checking(name), namespace)
    assert list(tmp_path.iterdir()) == []
