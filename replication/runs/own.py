"""Nets of one's own: a function of a module, by its name and a digest of the module's source."""

import functools
import importlib.util
import platform
import re
import sys
import traceback
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from replication import measure
from replication.engine import files
from replication.models import NetName

SPELLED = re.compile(r"((?:[A-Za-z_]\w*\.)*[A-Za-z_]\w*):([A-Za-z_]\w*)(?:@([0-9a-f]{8})-(\d+))?", re.ASCII)
CHOICE = "<module>:<function> for a net of your own, "
_BEGUN = set()  # modules whose code is being executed
REMEDY = "put it into a file of its own beside the notebook or script and give '<file>:<function>', as 'nets:preact'"


def named(net, imagenet=False):
    """The ``NetName`` or ``OwnNet`` of a name of the paper's, of "module:function", or of such a function.

    Raises TypeError or ValueError for what is none of these, for a module that cannot be imported, and for a function
    that gives no net.
    """
    if callable(net):
        module, function = getattr(net, "__module__", None), getattr(net, "__qualname__", None)
        if not function:  # an object, such as a net that is built already
            raise TypeError(f"net of type {type(net).__name__}: give the function that builds it")
        if module == "__main__" or not function.isidentifier():
            raise ValueError(f"net {function!r} of {module}: workers cannot import this function: {REMEDY}")
        net = f"{module}:{function}"
    return OwnNet.parse(net, imagenet) if isinstance(net, str) and ":" in net else NetName.parse(net, imagenet, CHOICE)


class OwnNet(NamedTuple):
    """A net of one's own, which has the interface of ``NetName``: "module:function@digest-depth" in its parts.

    digest: 8 digits that change with "module:function" and the text of the module's file. Files that it imports are
        not seen.
    depth: its convolutions and linear layers without those of shortcuts, which are told by "downsample" or "shortcut"
        in their names; all of them where none has such a name.
    """

    module: str
    function: str
    digest: str
    depth: int
    imagenet: bool = False
    residual = True  # tables list it behind the plain nets

    @classmethod
    def parse(cls, name, imagenet=False):
        """Parse a name; without digest and depth, they are those of the module as it now is."""
        match = SPELLED.fullmatch(name)
        if match is None:
            raise ValueError(f"net {name!r}: give '<module>:<function>', as 'nets:preact' for preact in nets.py")
        module, function, digest, depth = match.groups()
        if depth is None:
            source = _source(module, function)
            digest, depth = _digest(module, function, source.text), _depth(source)
        return cls(module, function, digest, int(depth), imagenet)

    def __str__(self):
        return f"{self.module}:{self.function}@{self.digest}-{self.depth}"

    @property
    def label(self):
        """A short name for tables, figures and run ids."""
        return f"{self.module.rpartition('.')[2]}.{self.function}"[:32] + f"-{self.digest}"

    def build(self, classes):
        """The net itself, initialized from torch's global generator; raises ValueError if its source is another one."""
        source = _source(self.module, self.function)
        if _digest(self.module, self.function, source.text) != self.digest:
            raise ValueError(
                f"net {source}: {source.path} on {platform.node()} is not as it was when this run was made: bring that "
                "back, or make the run again"
            )
        return _build(source, classes)

    def check(self, size, classes, images):
        """Raise ValueError unless it maps images (N, 3, *size) to (N, classes), in training and in tests.

        images: how many batch norm will see at a time.
        """
        _check(_source(self.module, self.function), self, tuple(size), classes, min(images, 2))


class _Source(NamedTuple):
    """The file of a module, and its text."""

    module: str
    function: str
    path: str
    text: str

    def __str__(self):
        return repr(f"{self.module}:{self.function}")

    def fails(self, what, error):
        """The ValueError for an error in this code, which says where that is."""
        frame = traceback.extract_tb(error.__traceback__)[-1]
        place = "" if frame.filename == __file__ else f" ({frame.filename}, line {frame.lineno})"
        return ValueError(f"net {self}: {what}: {type(error).__name__}: {error}{place}")


def _source(module, function):
    if module in _BEGUN:
        raise ValueError(f"net '{module}:{function}': its file makes this run while it is imported: {REMEDY}")
    importlib.invalidate_caches()  # the file may be new
    imported = sys.modules.pop(module, None)  # perhaps from where the file no longer is
    try:
        spec = importlib.util.find_spec(module)
    except ImportError:  # of a package above it
        spec = None
    finally:
        if imported is not None:
            sys.modules[module] = imported
    if spec is None or not (spec.origin or "").endswith(".py"):
        raise ValueError(
            f"net '{module}:{function}': on {platform.node()} there is no module {module!r} with a source file, "
            f"neither in {Path.cwd()} nor elsewhere on Python's path: {REMEDY}; workers on other machines need it too"
        )
    text = importlib.util.decode_source(files.read(Path(spec.origin)))
    return _Source(module, function, spec.origin, text)


def _digest(module, function, text):
    return files.digest(f"{module}:{function}\n{text}".encode())[:8]


@functools.cache
def _module(module, path, text):
    """The module that this text makes, which may be newer than the one that was imported."""
    spec = importlib.util.spec_from_file_location(module, path)
    made = importlib.util.module_from_spec(spec)
    known = sys.modules.setdefault(module, made)  # where dataclasses look for it
    _BEGUN.add(module)
    try:
        exec(compile(text, path, "exec"), vars(made))
    except BaseException:
        if known is made:
            del sys.modules[module]
        raise
    finally:
        _BEGUN.remove(module)
    return made


def _build(source, classes):
    try:
        function = getattr(_module(source.module, source.path, source.text), source.function, None)
    except Exception as error:
        raise source.fails(f"{source.module!r} cannot be imported", error) from error
    if not callable(function):
        raise ValueError(f"net {source}: {source.path} has no function {source.function!r}")
    try:
        with torch.device("cpu"):
            net = function(classes)
    except Exception as error:
        raise source.fails(f"{source.function}({classes}), for {classes} classes, fails", error) from error
    if not isinstance(net, nn.Module):
        raise TypeError(f"net {source}: {source.function}({classes}) gives {type(net).__name__}, not a torch.nn.Module")
    if not any(parameter.requires_grad for parameter in net.parameters()):
        raise ValueError(f"net {source}: it has no parameters to train")
    return net


@functools.cache
def _depth(source):
    with torch.random.fork_rng(devices=[]):
        return sum(1 for _ in measure.weighted_layers(_build(source, 10)))


@functools.cache
def _check(source, name, size, classes, images):
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        net, blank = name.build(classes), torch.zeros(images, 3, *size)
        for mode in (True, False):
            try:
                found = net.train(mode)(blank)
            except Exception as error:
                raise source.fails(f"{images} images of {size[1]}x{size[0]} do not pass through it", error) from error
            shape = tuple(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
            if shape != (images, classes):
                words = f"for {images} images of {size[1]}x{size[0]} it gives {shape}, not {(images, classes)}"
                raise ValueError(f"net {source}: {words}, a number for each of {classes} classes")
