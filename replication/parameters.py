"""The parameters of the notebooks: what each may be, and that none is misspelt."""

import ast
import numbers
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from replication.engine import files
from replication.runs import choice


class Kind(NamedTuple):
    """What a parameter may be: in words, with an example, and as a test."""

    words: str
    fits: Callable


def _is_whole(value):
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_text(value):
    return isinstance(value, str)


def _or_none(kind):
    return Kind(f"{kind.words}, or None", lambda value: value is None or kind.fits(value))


def _list_of(each, words):
    return Kind(words, lambda value: isinstance(value, list | tuple) and all(map(each, value)))


TEXT = Kind("a text", _is_text)
WHOLE = Kind("a whole number", _is_whole)
NUMBER = Kind("a number", lambda value: isinstance(value, numbers.Real) and not isinstance(value, bool))
FLAG = Kind("True or False", lambda value: isinstance(value, bool))
NUMBERS = _list_of(_is_whole, "a list of whole numbers, such as [0, 1]")
TEXTS = _list_of(_is_text, 'a list of names, such as ["resnet-20"]')
OPTIONS = Kind("a dict of dicts", lambda value: isinstance(value, dict) and all(map(_is_text, value)))
# Of all notebooks: a name means the same in each.
PARAMETERS = {
    "dataset": TEXT,
    "seeds": NUMBERS,
    "schedule": NUMBER,
    "precision": TEXT,
    "recipe": _or_none(TEXT),
    "depth": WHOLE,
    "depths": NUMBERS,
    "nets": TEXTS,
    "shortcuts": TEXTS,
    "bn_batch": _or_none(WHOLE),
    "processes": WHOLE,
    "ways": TEXTS,
    "ensemble": _or_none(TEXTS),
    "weights": OPTIONS,
    "rounds": WHOLE,
    "iterations": WHOLE,
    "notebooks": NUMBERS,
    "judged": TEXT,
    "readme": FLAG,
    "cluster": _or_none(TEXT),
}
FOLDERS = ("results", "data", "output")


def start_notebook(namespace):
    """The first call of every notebook, with its ``globals()``: check its parameters, go to the repository's root.

    papermill puts the parameters it is given into a cell of their own and only warns of unknown ones; a misspelt name
    would leave the default in force. JupyterLab starts a notebook in its own folder, papermill in the caller's:
    relative paths are the root's in both.
    Raises ValueError for a name that the notebook's own parameter cell does not have and for a folder that cannot be
    one, TypeError for a parameter of another kind than it may be.
    """
    cells = namespace.get("In", [])
    given = [number for number, cell in enumerate(cells) if cell.startswith("# Parameters\n")]
    for number in given:
        for name in _assigned(cells[number]):
            choice("parameter", name, _assigned(cells[given[0] - 1]))
    for name, kind in PARAMETERS.items():
        if name in namespace and not kind.fits(namespace[name]):
            raise TypeError(f"{name} {namespace[name]!r}: give {kind.words}")
    for name in FOLDERS:
        if name in namespace:
            files.folder(name, namespace[name])
    if Path.cwd().name == "notebooks" and (Path.cwd().parent / "replication" / "__init__.py").exists():
        os.chdir("..")


def _assigned(cell):
    return [target.id for line in ast.parse(cell).body if isinstance(line, ast.Assign) for target in line.targets]
