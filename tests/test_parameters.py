import ast
from pathlib import Path

import nbformat
import pytest
from hypothesis import given
from hypothesis import strategies as st

from replication import parameters

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


def defaults(path):
    cell = next(cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code")
    return {line.targets[0].id: ast.literal_eval(line.value) for line in ast.parse(cell.source).body}


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


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_every_parameter_may_be_is_known_and_its_default_is_that(path):
    found = defaults(path)
    assert set(found) <= {*parameters.PARAMETERS, *parameters.FOLDERS}
    parameters.start_notebook(found)


SIMPLE = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary()
ANYTHING = SIMPLE | st.lists(SIMPLE, max_size=3) | st.dictionaries(SIMPLE, SIMPLE, max_size=2)


@given(st.sampled_from(sorted(parameters.PARAMETERS)), ANYTHING)
def test_a_parameter_of_another_kind_is_refused_by_name(name, value):
    kind = parameters.PARAMETERS[name]
    if kind.fits(value):
        parameters.start_notebook({name: value})
    else:
        with pytest.raises(TypeError, match=f"^{name} .*: give "):
            parameters.start_notebook({name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("readme", "no"),
        ("readme", 0),
        ("schedule", "0.1"),
        ("schedule", True),
        ("seeds", 0),
        ("seeds", [0.0]),
        ("seeds", [True]),
        ("seeds", "[0]"),
        ("nets", "resnet-20"),
        ("nets", [20]),
        ("depth", 20.0),
        ("cluster", 7),
        ("ensemble", "resnet-20"),
        ("weights", ["resnet18.pth"]),
        ("precision", None),
    ],
)
def test_mistakes_that_users_make(name, value):
    with pytest.raises(TypeError, match=f"^{name} "):
        parameters.start_notebook({name: value})


@pytest.mark.parametrize("name", parameters.FOLDERS)
def test_folders_of_a_notebook_are_checked(name):
    with pytest.raises(ValueError, match=f"^{name} ''"):
        parameters.start_notebook({name: ""})
