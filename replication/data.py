"""Small images in memory, and the batches a net is trained on (section 4.2).

A batch is a pure function of (seed, iteration): nothing has to be restored to go on from any point.
"""

import contextlib
import difflib
import hashlib
import os
import re
import zipfile
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import tqdm.auto
import tqdm.notebook

BUILT_IN = ("digits", "cifar10", "cifar100")
NAME = re.compile(r"[A-Za-z0-9](?:[._-]?[A-Za-z0-9])*")  # of a folder of images: no path, no two separators in a row
VERSION = 1  # of the decoding: part of the key of what is cached


class Images(NamedTuple):
    """A part of a data set: ``pixels`` (N, H, W, 3) in uint8, ``labels`` (N,) in int64."""

    pixels: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True, eq=False)
class Dataset:
    """Training and test part, and what can be held out of the training part for validation."""

    name: str
    classes: tuple[str, ...]
    train: Images
    test: Images
    validation: Images | None = None

    @cached_property
    def fingerprint(self):
        """SHA-256 over all classes, pixels and labels, as 64 hexadecimal digits."""
        digest = hashlib.sha256(repr(self.classes).encode())
        for pixels, labels in (self.train, self.test):
            digest.update(repr(pixels.shape).encode())
            digest.update(np.ascontiguousarray(pixels))
            digest.update(np.ascontiguousarray(labels))
        return digest.hexdigest()

    @cached_property
    def mean(self):
        """Mean of every pixel over the training part, (H, W, 3) in float32, in units of 0 to 255."""
        return self.train.pixels.mean(0, dtype=np.float64).astype(np.float32)

    @property
    def size(self):
        """Height and width of every image."""
        return self.train.pixels.shape[1:3]

    @property
    def padding(self):
        """Zero pixels on each side before the random crop: the paper's 4 for 32x32 images, in proportion for others."""
        return min(self.size) // 8

    @property
    def flips(self):
        """Whether images are mirrored at random: all but ``digits``, since a mirrored digit is none."""
        return self.name != "digits"

    def hold_out(self, count):
        """The same data set with ``count`` random training images kept for validation: the same ones for every seed.

        Raises ValueError unless at least one image is left for training.
        """
        if count == 0:
            return self
        total = len(self.train.labels)
        if count >= total:
            raise ValueError(f"holdout {count}: {self.name} has {total} training images, choose fewer")
        order = np.random.default_rng([45_000, 5_000]).permutation(total)
        kept, held = np.sort(order[count:]), np.sort(order[:count])
        part = self.train
        return replace(
            self,
            train=Images(part.pixels[kept], part.labels[kept]),
            validation=Images(part.pixels[held], part.labels[held]),
        )


class Batches:
    """The training batches of a data set: shifted, mirrored, the mean subtracted.

    ``batches(iteration)`` gives images ``(batch, 3, H, W)`` in float32, channels last, and labels ``(batch,)``, both on
    ``device``.
    Every epoch is a new order of all images, and a batch may end one epoch and begin the next.
    """

    def __init__(self, dataset, batch, seed, device="cpu"):
        pixels, labels = dataset.train
        self.batch, self.seed, self.count = batch, seed, len(labels)
        self.padding, self.flips = dataset.padding, dataset.flips
        edge = (self.padding, self.padding)
        padded = torch.from_numpy(np.pad(pixels, ((0, 0), edge, edge, (0, 0)))).to(device)
        n, h, w, c = padded.stride()
        shifts = 2 * self.padding + 1
        # Every crop of every image as a view: one indexing operation cuts out a whole batch.
        self.crops = padded.as_strided((self.count, shifts, shifts, *pixels.shape[1:]), (n, h, w, h, w, c))
        self.labels = torch.from_numpy(labels).to(device)
        self.mean = torch.from_numpy(dataset.mean).to(device)
        self._order = (None, None)

    def indices(self, iteration):
        """Which training images make up a batch: integers ``(batch,)``."""
        places = np.arange(iteration * self.batch, (iteration + 1) * self.batch)
        epochs, offsets = np.divmod(places, self.count)
        return np.concatenate([self._epoch(epoch)[offsets[epochs == epoch]] for epoch in np.unique(epochs)])

    def _epoch(self, epoch):
        if self._order[0] != epoch:
            self._order = epoch, np.random.default_rng([self.seed, 0, epoch]).permutation(self.count)
        return self._order[1]

    def augmentation(self, iteration):
        """Of every image of a batch: rows and columns cut off the padded image, and whether it is mirrored."""
        generator = np.random.default_rng([self.seed, 1, iteration])
        rows, columns = generator.integers(0, 2 * self.padding + 1, (2, self.batch))
        return rows, columns, generator.integers(0, 2, self.batch).astype(bool) & self.flips

    def __call__(self, iteration):
        drawn = torch.from_numpy(np.stack([self.indices(iteration), *self.augmentation(iteration)]))
        if self.crops.is_cuda:
            drawn = drawn.pin_memory()  # else the copy would wait for the device
        indices, rows, columns, mirrored = drawn.to(self.crops.device, non_blocking=True)
        pixels = self.crops[indices, rows, columns]
        if self.flips:
            pixels = torch.where(mirrored.bool()[:, None, None, None], pixels.flip(2), pixels)
        return centred(pixels, self.mean), self.labels[indices]


def centred(pixels, mean):
    """Pixels ``(N, H, W, 3)`` in uint8 as a net's input ``(N, 3, H, W)`` in float32: less the mean, divided by 255."""
    return pixels.float().sub_(mean).div_(255).permute(0, 3, 1, 2)


def load(name, root="data", progress=True):
    """The data set of that name: ``digits``, ``cifar10``, ``cifar100`` or a folder of images.

    A folder is laid out as ``<root>/<name>/{train,test}/<class>/*``, all images of one size.
    CIFAR is downloaded into ``root`` on first use; a folder is decoded once and cached in ``<root>/.cache``.
    Raises ValueError naming what is wrong with the name or the files and what to do.
    """
    root = Path(root)
    if name == "digits":
        return _digits()
    if name in ("cifar10", "cifar100"):
        return _cifar(name, root)
    check_name(name)
    if not (root / name).is_dir():
        raise ValueError(unknown(name, root))
    return _folder(name, root, progress)


def present(name, root="data"):
    """Whether a data set is here, so that ``load`` would download nothing."""
    folder = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}.get(name, name)
    return name == "digits" or (Path(root) / folder).is_dir()


def check_name(name):
    """Raise TypeError or ValueError unless ``name`` can be that of a data set."""
    if not isinstance(name, str):
        raise TypeError(f"dataset {name!r}: give a name, one of {', '.join(BUILT_IN)} or a folder's")
    if len(name) > 64 or NAME.fullmatch(name) is None:
        raise ValueError(
            f"dataset {name!r}: choose {', '.join(BUILT_IN)} or the name of a folder of images, "
            "made of letters, digits and single '.', '_' or '-' between them, 64 at the most"
        )


def unknown(name, root):
    folders = sorted(path.name for path in root.glob("*") if (path / "train").is_dir() and NAME.fullmatch(path.name))
    choices = [*BUILT_IN, *folders]
    close = difflib.get_close_matches(name, choices, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    return (
        f"dataset {name!r}: choose {', '.join(choices)}{hint}, "
        f"or put images into {root / name}/train/<class>/ and {root / name}/test/<class>/"
    )


def _digits():
    """scikit-learn's handwritten digits: 1,437 to train and 360 to test, every class in the same proportion."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    grey = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # the originals run from 0 to 16
    pixels = np.repeat(grey[..., None], 3, axis=3)  # three equal channels: the nets stay those of the paper
    train, test = train_test_split(np.arange(len(pixels)), test_size=360, stratify=digits.target, random_state=0)
    labels = digits.target.astype(np.int64)
    names = tuple(str(name) for name in digits.target_names)
    return Dataset("digits", names, Images(pixels[train], labels[train]), Images(pixels[test], labels[test]))


def _cifar(name, root):
    from torchvision import datasets  # a second to import: only where it is needed

    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    try:
        train, test = (kind(root, train=part, download=True) for part in (True, False))
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"dataset {name!r} is not in {root} and could not be downloaded ({error}): download {kind.url} "
            f"by other means and put it into {root}, or choose 'digits' or a folder of images"
        ) from error
    parts = [Images(part.data, np.array(part.targets, dtype=np.int64)) for part in (train, test)]
    return Dataset(name, tuple(train.classes), *parts)


@contextlib.contextmanager
def progress_bar(total, title, unit, disable=False):
    """A tqdm bar that leaves nothing behind.

    A closed widget stays in the executed copy of a notebook as the text of an empty bar: it is taken out here.
    """
    options = {"total": total, "desc": title, "unit": f" {unit}", "leave": False, "disable": disable}
    if disable or not issubclass(tqdm.auto.tqdm, tqdm.notebook.tqdm):
        with tqdm.auto.tqdm(**options) as bar:
            yield bar
        return
    from IPython.display import display

    with tqdm.auto.tqdm(**options, display=False) as bar:
        shown = display(bar.container, display_id=True)
        try:
            yield bar
        finally:
            shown.update({"text/plain": ""}, raw=True)


def _folder(name, root, progress):
    classes, files = _listing(root / name)
    key = hashlib.sha256(f"{VERSION} {classes}".encode())
    for path, _ in files["train"] + files["test"]:
        status = path.stat()
        key.update(f"{path.relative_to(root)} {status.st_size} {status.st_mtime_ns}\n".encode(errors="surrogateescape"))
    cache = root / ".cache" / f"{name}.npz"
    arrays = _read_cache(cache, key.hexdigest())
    if arrays is None:
        arrays = {}
        total = sum(map(len, files.values()))
        with progress_bar(total, f"decoding {name}", "images", disable=not progress) as bar:
            for part, members in files.items():
                arrays[f"{part}_pixels"] = _decode(members, bar)
                arrays[f"{part}_labels"] = np.array([label for _, label in members], dtype=np.int64)
        if arrays["train_pixels"].shape[1:] != arrays["test_pixels"].shape[1:]:
            sizes = [tuple(arrays[f"{part}_pixels"].shape[2:0:-1]) for part in files]
            raise ValueError(
                f"{root / name}: train has images of {_size(sizes[0])}, test of {_size(sizes[1])}: resize one"
            )
        _write_cache(cache, key.hexdigest(), arrays)
    parts = [Images(arrays[f"{part}_pixels"], arrays[f"{part}_labels"]) for part in files]
    return Dataset(name, classes, *parts)


def _listing(folder):
    """The classes of a folder of images, and its files as (path, label) of each part, in the order of their names."""
    found = {}
    for part in ("train", "test"):
        if not (folder / part).is_dir():
            raise ValueError(f"{folder} has no folder {part}/: put its images into {folder / part}/<class>/")
        found[part] = {
            path.name: sorted(file for file in path.iterdir() if not file.name.startswith("."))
            for path in sorted((folder / part).iterdir())
            if path.is_dir() and not path.name.startswith(".")
        }
        for name, members in found[part].items():
            if not members:
                raise ValueError(f"class {folder / part / name} is empty: put images into it or remove it")
    if set(found["train"]) != set(found["test"]):
        raise ValueError(
            f"{folder}: train and test must have the same classes, but only train has "
            f"{sorted(set(found['train']) - set(found['test']))} and only test has "
            f"{sorted(set(found['test']) - set(found['train']))}: add or remove these folders"
        )
    classes = tuple(found["train"])
    if len(classes) < 2:
        raise ValueError(f"{folder / 'train'} holds {len(classes)} class folders: at least 2 are needed")
    files = {part: [(path, classes.index(name)) for name in classes for path in found[part][name]] for part in found}
    return classes, files


def _decode(members, bar):
    from PIL import Image

    pixels = None
    for number, (path, _) in enumerate(members):
        try:
            with Image.open(path) as image:
                decoded = np.asarray(image.convert("RGB"))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise ValueError(f"{path} cannot be read as an image ({error}): replace or remove it") from error
        if pixels is None:
            pixels = np.empty((len(members), *decoded.shape), dtype=np.uint8)
        if decoded.shape != pixels.shape[1:]:
            size, first = _size(decoded.shape[1::-1]), _size(pixels.shape[2:0:-1])
            raise ValueError(
                f"{path} is {size}, {members[0][0]} is {first}: resize them, all images must be of one size"
            )
        pixels[number] = decoded
        bar.update()
    return pixels


def _size(size):
    return f"{size[0]}x{size[1]}"


def _read_cache(path, key):
    """The arrays cached under that key; None when there are none or the files have changed since."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            if str(stored["key"]) == key:
                return {name: stored[name] for name in stored.files if name != "key"}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        print(f"{path} is damaged ({error}): decoding the images again")
    return None


def _write_cache(path, key, arrays):
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(exist_ok=True)
        with part.open("wb") as file:
            np.savez(file, key=np.array(key), **arrays)
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        print(f"{path} cannot be written ({error}): the images will be decoded anew each time")
