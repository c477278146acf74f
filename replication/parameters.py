"""The parameters of the notebooks: none is misspelt, and relative paths start at the repository's root."""

import ast
import os

from replication.engine import files
from replication.runs import choice

FOLDERS = ("results", "data", "output")  # joined to longer paths, which would take a number too
FLAGS = ("fresh", "readme")  # only ever asked whether they are true, as "no" would be


def start_notebook(namespace):
    """Call first in every notebook, with its ``globals()``: check its parameters, change to the repository's root.

    papermill puts the parameters it is given into a cell of their own and only warns of unknown ones: a misspelt name
    would leave the default in force. JupyterLab starts a notebook in its own folder, papermill in the caller's.
    Values are checked by the functions that they are passed to; here, only those that would slip through.

    Raises ValueError for a name that is not in the notebook's own parameter cell, TypeError or ValueError for a folder
    that cannot be one, TypeError for a flag that is neither True nor False.
    """
    cells = namespace.get("In", [])
    given = [number for number, cell in enumerate(cells) if cell.startswith("# Parameters\n")]
    for number in given:
        for name in _assigned(cells[number]):
            choice("parameter", name, _assigned(cells[given[0] - 1]))
    for name in FOLDERS:
        if name in namespace:
            files.folder(name, namespace[name])
    for name in FLAGS:
        if not isinstance(namespace.get(name, False), bool):
            raise TypeError(f"{name} {namespace[name]!r}: choose True or False")
    os.chdir(files.root())


def _assigned(cell):
    return [target.id for line in ast.parse(cell).body if isinstance(line, ast.Assign) for target in line.targets]
