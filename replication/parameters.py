"""The parameters of the notebooks: none is misspelt, and relative paths start at the repository's root."""

import ast
import os
import re
import sys

from replication.engine import files
from replication.engine.workers import says_all
from replication.runs import choice

FOLDERS = ("results", "data", "output")  # joined to longer paths, which would take a number too
FLAGS = ("fresh", "readme")  # only ever asked whether they are true, as "no" would be
PATHS = ("PAPERMILL_INPUT_PATH", "PAPERMILL_OUTPUT_PATH")  # which papermill adds to its cell with --inject-paths


def start_notebook(namespace):
    """Call first in every notebook, with its ``globals()``: check its parameters, change to the repository's root.

    papermill puts the parameters it is given into a cell of their own and only warns of unknown ones: a misspelt name
    would leave the default in force. JupyterLab starts a notebook in its own folder, papermill in the caller's.
    Values are checked by the functions that they are passed to; here, only those that would slip through. ``~`` and
    environment variables in ``results`` and ``output`` are replaced. From then on, errors whose message says all there
    is to say are shown without a traceback.

    Raises ValueError for a name that is not in the notebook's own parameter cell, TypeError or ValueError for a folder
    that cannot be one, TypeError for a flag that is neither True nor False.
    """
    if "get_ipython" in namespace:
        namespace["get_ipython"]().set_custom_exc((Exception,), _show)
    _check_names(namespace.get("In", []))
    for name in FOLDERS:
        if name in namespace:
            files.folder(name, namespace[name])
            if name != "data":  # which each worker of a cluster finds for itself
                namespace[name] = files.expanded(name, namespace[name])
    for name in FLAGS:
        if not isinstance(namespace.get(name, False), bool):
            raise TypeError(f"{name} {namespace[name]!r}: choose True or False")
    sys.path[:] = [place or os.getcwd() for place in sys.path]  # files beside the notebook can still be imported
    root = files.root()
    if root != files.SOURCE:
        print(f"The repository is neither here nor above: relative folders start at {root}.")
    os.chdir(root)


def _check_names(cells):
    """Refuse a parameter that the notebook does not have. ``cells``: their sources, in the order of execution.

    The notebook's own parameter cell assigns ``results``, and papermill puts its cell right behind it. Either may have
    been executed again, edited and in any order; other cells that begin as papermill's does are the user's.
    """
    own, given, before = [], [], None
    for cell in cells:
        names = _assigned(cell)
        if own and cell.startswith("# Parameters\n") and not re.search(r"\s#", cell):  # papermill comments no more
            if before is own or (given and set(names) & set(own)):
                given = names
        elif "results" in names or (names and not given and "results" not in own):
            own, given = names, []
        before = names
    for name in given:
        if name not in PATHS:
            choice("parameter", name, own)


def _assigned(cell):
    """The names that a cell assigns; none where it is no Python, which IPython keeps among its cells too."""
    try:
        nodes = ast.walk(ast.parse(cell))
    except SyntaxError:
        return []
    return [node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]


def _show(shell, kind, error, trace, tb_offset=None):
    """Show an error as IPython does, but as a single message where that says all there is to say."""
    if says_all(error):
        error._render_traceback_ = lambda: [f"{kind.__name__}: {error}"]
    shell.showtraceback((kind, error, trace), tb_offset=tb_offset, running_compiled_code=True)
