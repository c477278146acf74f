"""What small images and photographs have in common: order, shares, inputs of a net, folders, caches, bars."""

import contextlib
import io
import os
import sys
from dataclasses import replace

import numpy as np
import torch.nn.functional as F
import tqdm.auto
import tqdm.notebook
import tqdm.std
from PIL import Image

from replication import files

VERSION = 1  # of the decoding: part of the key of what is cached
LINE_SECONDS = 180  # between lines of progress where the output is no terminal
BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"  # without the rate: it fits 80 columns
READING_ERRORS = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)


def cores():
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


class Order:
    """Which images make up a batch: every epoch is a new order of all, a batch may end one and begin the next."""

    def __init__(self, count, batch, seed):
        self.count, self.batch, self.seed = count, batch, seed
        self._last = (None, None)

    def __call__(self, iteration):
        """The images of a batch: integers ``(batch,)``."""
        places = np.arange(iteration * self.batch, (iteration + 1) * self.batch)
        epochs, offsets = np.divmod(places, self.count)
        return np.concatenate([self._epoch(epoch)[offsets[epochs == epoch]] for epoch in np.unique(epochs)])

    def _epoch(self, epoch):
        if self._last[0] != epoch:
            self._last = epoch, np.random.default_rng([self.seed, 0, epoch]).permutation(self.count)
        return self._last[1]


def shared(batch, share):
    """The slice of a batch that one of several processes trains on."""
    process, processes = share
    return slice(process * batch // processes, (process + 1) * batch // processes)


def centred(pixels, mean, std=None):
    """Pixels ``(N, H, W, 3)`` in uint8 as a net's input ``(N, 3, H, W)`` in float32: less the mean, divided by 255.

    ``mean``: ``(3,)`` or ``(h, w, 3)``, which is stretched to images of another size. ``std``: ``(3,)``, in units of 0
    to 1, divides what is left, as nets of others want it.
    """
    if mean.ndim == 3 and mean.shape[:2] != pixels.shape[1:3]:
        stretched = F.interpolate(mean.permute(2, 0, 1)[None], pixels.shape[1:3], mode="bilinear", align_corners=False)
        mean = stretched[0].permute(1, 2, 0)
    inputs = pixels.float().sub_(mean).div_(255)
    return (inputs if std is None else inputs.div_(std)).permute(0, 3, 1, 2)


def hold_out(dataset, count):
    """The data set with ``count`` of its training images kept for validation, the same ones each time."""
    if count == 0:
        return dataset
    total = len(dataset.train.labels)
    if count >= total:
        raise ValueError(f"holdout {count}: {dataset.name} has {total} training images, choose fewer")
    order = np.random.default_rng([45_000, 5_000]).permutation(total)
    kept, held = (
        type(dataset.train)(*(part[np.sort(chosen)] for part in dataset.train))
        for chosen in (order[count:], order[:count])
    )
    return replace(dataset, train=kept, validation=held)


class _Lines(tqdm.std.tqdm):
    """A bar for files and pipes: a plain line at the start and every few minutes."""

    def __init__(self, **options):
        line = "{desc}: {n_fmt} of {total_fmt}{unit}, {elapsed} gone, {remaining} left{postfix}"
        super().__init__(**options, mininterval=LINE_SECONDS, miniters=0, bar_format=line)

    def display(self, msg=None, pos=None):
        if msg is None:  # tqdm displays an empty text to wipe out a bar; lines stay
            self.fp.write(f"{self}\n")
            self.fp.flush()


@contextlib.contextmanager
def progress_bar(total, title, unit, disable=False, initial=0):
    """A tqdm bar that leaves nothing behind, or plain lines where the output is no terminal.

    initial: how much of the total was done before.
    A closed widget stays in the executed copy of a notebook as the text of an empty bar: it is taken out here.
    """
    options = {"total": total, "desc": title, "unit": f" {unit}", "leave": False}
    options |= {"disable": disable, "initial": initial}
    if disable or not issubclass(tqdm.auto.tqdm, tqdm.notebook.tqdm):
        terminal = sys.stderr is not None and sys.stderr.isatty()
        with tqdm.auto.tqdm(**options, bar_format=BAR) if terminal else _Lines(**options) as bar:
            yield bar
        return
    from IPython.display import display

    with tqdm.auto.tqdm(**options, display=False) as bar:
        shown = display(bar.container, display_id=True)
        try:
            yield bar
        finally:
            shown.update({"text/plain": ""}, raw=True)


def listing(folder, parts):
    """The classes of a folder of images, and the files of each part: (path below it, label, size, time of change)."""
    found = {}
    for part in parts:
        if not (folder / part).is_dir():
            raise ValueError(f"{folder} has no folder {part}/: put its images into {folder / part}/<class>/")
        found[part] = {name: visible(folder / part / name) for name, *_ in visible(folder / part, folders=True)}
        for name, members in found[part].items():
            if not members:
                raise ValueError(f"class {folder / part / name} is empty: put images into it or remove it")
    first, last = parts[0], parts[-1]
    if set(found[first]) != set(found[last]):
        raise ValueError(
            f"{folder}: {first} and {last} must have the same classes, but only {first} has "
            f"{sorted(set(found[first]) - set(found[last]))} and only {last} has "
            f"{sorted(set(found[last]) - set(found[first]))}: add or remove these folders"
        )
    classes = tuple(found[first])
    if len(classes) < 2:
        raise ValueError(f"{folder / first} holds {len(classes)} class folders: at least 2 are needed")
    files = {
        part: [
            (f"{name}/{file}", label, size, changed)
            for label, name in enumerate(classes)
            for file, size, changed in found[part][name]
        ]
        for part in parts
    }
    return classes, files


def visible(folder, folders=False):
    """Names, sizes and times of change of what is in a folder and not hidden, in the order of their names."""
    with os.scandir(folder) as entries:
        kept = [entry for entry in entries if not entry.name.startswith(".") and (entry.is_dir() or not folders)]
        found = []
        for entry in kept:
            try:
                status = entry.stat()
                found.append((entry.name, status.st_size, status.st_mtime_ns))
            except OSError:  # a link that leads nowhere: reading it says so
                found.append((entry.name, -1, 0))
        return sorted(found)


def read_cache(path, key):
    """The arrays cached under that key; None when there are none or the files have changed since."""
    try:
        with np.load(io.BytesIO(files.read_sealed(path)), allow_pickle=False) as stored:
            if str(stored["key"]) == key:
                return {name: stored[name] for name in stored.files if name != "key"}
    except FileNotFoundError:
        return None
    except Exception as error:  # whatever numpy makes of a file that holds something else
        print(f"{error if isinstance(error, files.DamagedError) else f'{path}: {error}'}: decoding the images again")
    return None


def write_cache(path, key, arrays):
    path.parent.mkdir(exist_ok=True)
    files.remove_parts(path.parent, path.name, files.ABANDONED)
    content = io.BytesIO()
    np.savez(content, key=np.array(key), **arrays)
    files.write_sealed(path, content.getvalue())
