"""Small images in memory, photographs in files, and the batches a net is trained on (sections 3.4 and 4.2).

A batch is a pure function of (seed, iteration): nothing has to be restored to go on from any point, and it is the same
for any number of processes that share it or workers that read it.
"""

import contextlib
import difflib
import hashlib
import itertools
import math
import os
import re
import uuid
import warnings
import zipfile
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import tqdm.auto
import tqdm.notebook
from PIL import Image

BUILT_IN = ("digits", "cifar10", "cifar100")
NAME = re.compile(r"[A-Za-z0-9](?:[._-]?[A-Za-z0-9])*")  # of a folder of images: no path, no two separators in a row
VERSION = 1  # of the decoding: part of the key of what is cached
CROP = 224  # the side of what an ImageNet net is trained on, in pixels
TEST_SIDE = 256  # the shorter side that a photograph is resized to for crops at test time
TEST_SIDES = (224, 256, 384, 480, 640)  # ... for whole photographs
TRAIN_SIDES = (256, 480)  # ... and at random, both included, in training
UNREADABLE = ("skip", "error")
IN_A_ROW = 100  # files that cannot be read one after the other: no longer a few bad ones


def cores():
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def is_imagenet(name):
    """Whether a data set of that name is made of photographs in ImageNet's layout, for the nets of Table 1."""
    return name.startswith("imagenet")


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

    def batches(self, batch, seed, device="cpu", share=(0, 1), **_):
        """The training batches, as ``Batches``; all images are in memory, so nothing is read ahead or left out."""
        return Batches(self, batch, seed, device, share)

    def unreadable(self, choice="skip"):
        """Training images known to be unreadable: none, since all were read."""
        return {}

    def views(self, images, device="cpu", share=(0, 1), mean=None, std=None, **_):
        """What a net sees of a part in a test: the single, unaltered view of every image (section 4.2).

        Gives inputs ``(N, 3, H, W)`` and labels ``(N,)`` of ``share`` = (this process, processes) of the part.
        ``mean`` and ``std``: as ``centred`` takes them, for nets of others; left out, the data set's own mean.
        """
        mean = torch.from_numpy(self.mean).to(device) if mean is None else mean
        for start in range(share[0] * 500, len(images.labels), share[1] * 500):
            pixels = torch.from_numpy(images.pixels[start : start + 500]).to(device)
            yield centred(pixels, mean, std), torch.from_numpy(images.labels[start : start + 500]).to(device)

    def hold_out(self, count):
        """The same data set with ``count`` random training images kept for validation: the same ones for every seed.

        Raises ValueError unless at least one image is left for training.
        """
        return _hold_out(self, count)


def _hold_out(dataset, count):
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


class Batches:
    """The training batches of a data set in memory: shifted, mirrored, the mean subtracted.

    ``batches(iteration)`` gives images ``(batch, 3, H, W)`` in float32, channels last, and labels ``(batch,)``, both on
    ``device``; of several processes each gets its ``share`` = (which, of how many) of that batch.
    """

    def __init__(self, dataset, batch, seed, device="cpu", share=(0, 1)):
        pixels, labels = dataset.train
        self.batch, self.seed, self.share = batch, seed, share
        self.padding, self.flips = dataset.padding, dataset.flips
        self.indices = Order(len(labels), batch, seed)
        self.unreadable = {}
        edge = (self.padding, self.padding)
        padded = torch.from_numpy(np.pad(pixels, ((0, 0), edge, edge, (0, 0)))).to(device)
        n, h, w, c = padded.stride()
        shifts = 2 * self.padding + 1
        # Every crop of every image as a view: one indexing operation cuts out a whole batch.
        self.crops = padded.as_strided((len(labels), shifts, shifts, *pixels.shape[1:]), (n, h, w, h, w, c))
        self.labels = torch.from_numpy(labels).to(device)
        self.mean = torch.from_numpy(dataset.mean).to(device)

    def augmentation(self, iteration):
        """Of every image of a batch: rows and columns cut off the padded image, and whether it is mirrored."""
        generator = np.random.default_rng([self.seed, 1, iteration])
        rows, columns = generator.integers(0, 2 * self.padding + 1, (2, self.batch))
        return rows, columns, generator.integers(0, 2, self.batch).astype(bool) & self.flips

    def __call__(self, iteration):
        drawn = np.stack([self.indices(iteration), *self.augmentation(iteration)])
        drawn = torch.from_numpy(np.ascontiguousarray(drawn[:, shared(self.batch, self.share)]))
        if self.crops.is_cuda:
            drawn = drawn.pin_memory()  # else the copy would wait for the device
        indices, rows, columns, mirrored = drawn.to(self.crops.device, non_blocking=True)
        pixels = self.crops[indices, rows, columns]
        if self.flips:
            pixels = torch.where(mirrored.bool()[:, None, None, None], pixels.flip(2), pixels)
        return centred(pixels, self.mean), self.labels[indices]


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


class Files(NamedTuple):
    """A part of a data set left in its files: ``paths`` (N,) in bytes, below the data set's folder; ``labels`` (N,)."""

    paths: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True, eq=False)
class ImageNet:
    """Photographs in torchvision's ImageNet layout, ``{train,val}/<wnid>/*``, read when they are needed (section 3.4).

    Classes are in the order of their synsets' numbers. ``test`` is the part ``val``.
    """

    name: str
    root: Path
    classes: tuple[str, ...]
    train: Files
    test: Files
    fingerprint: str  # SHA-256 over classes, names and sizes of all files: to read 140 GB each time would be too slow
    progress: bool = True
    validation: Files | None = None
    size = (CROP, CROP)

    def hold_out(self, count):
        """As ``Dataset.hold_out``."""
        return _hold_out(self, count)

    @property
    def folder(self):
        """Where the files lie."""
        return self.root / self.name

    @cached_property
    def _statistics(self):
        return _statistics(self)

    @property
    def mean(self):
        """Mean of every pixel over the training images' central crops, (224, 224, 3) in float32, units of 0 to 255.

        Computed once, with a bar, and cached in ``<root>/.cache``. Raises ValueError if that cannot be written, or for
        a folder without training images.
        """
        return self._statistics["mean"]

    @property
    def components(self):
        """Principal components of the training pixels' colours, (3, 3) in float32, in units of 0 to 1.

        One a row, times its eigenvalue: what Krizhevsky et al. 2012 shift colours along.
        """
        values, vectors = np.linalg.eigh(self._statistics["covariance"])
        vectors = vectors * np.sign(vectors[np.abs(vectors).argmax(0), range(3)])  # else the sign is the library's
        return (vectors * values).T[::-1].astype(np.float32)

    def unreadable(self, choice="skip"):
        """Training files that could not be read when the mean was computed, as {path: error}.

        Raises ValueError naming them if ``choice`` is "error" and there are any.
        """
        found = _failures(self._statistics)
        if found and choice == "error":
            listing = "\n".join(f"  {path}: {error}" for path, error in found.items())
            raise ValueError(
                f"{len(found)} of the files of {self.folder} cannot be read: replace or remove them, "
                f"or choose unreadable='skip'\n{listing}"
            )
        return found

    def batches(self, batch, seed, device="cpu", share=(0, 1), **options):
        """The training batches, as ``Stream``."""
        return Stream(self, batch, seed, device, share, **options)

    def views(self, files, device="cpu", share=(0, 1), workers=None, unreadable="skip", failed=None):
        """What a net sees of a part in tests during training: the central crop of every photograph.

        Gives inputs ``(N, 3, 224, 224)`` and labels ``(N,)``, as ``Dataset.views`` does. What cannot be read is left
        out and goes to ``failed``, {path: error}; with ``unreadable="error"`` it raises ValueError.
        """
        mean = torch.from_numpy(self.mean).to(device)
        mine = Files(*(part[share[0] :: share[1]] for part in files))
        for images, labels, errors in read(self, mine, central_crop, workers=workers, unreadable=unreadable):
            if failed is not None:
                failed |= errors
            if images:
                yield centred(torch.cat([crop for (crop,) in images]).to(device), mean), labels.to(device)


class Stream:
    """The training batches of an ``ImageNet``: scaled, cropped, mirrored, less the mean, shifted in colour.

    As ``Batches``; files are read and decoded ahead, in ``workers`` processes (None: one for each core; 0: in this one)
    and up to ``iterations``. A file that cannot be read is replaced by the next one of its folder and goes to
    ``unreadable``, {path: error}; with ``unreadable="error"`` it raises ValueError instead.
    """

    def __init__(
        self, dataset, batch, seed, device="cpu", share=(0, 1), iterations=None, workers=None, unreadable="skip"
    ):
        self.batch, self.share, self.iterations, self.workers = batch, share, iterations, workers
        self.indices = Order(len(dataset.train.labels), batch, seed)
        self.reader, self.choice = _TrainingCrops(dataset.folder, dataset.train, seed), unreadable
        self.mean = torch.from_numpy(dataset.mean).to(device)
        self.components = torch.from_numpy(dataset.components).to(device)
        self.unreadable = {}
        self._next, self._iterator = None, None

    def __call__(self, iteration):
        if iteration != self._next:
            self._iterator = _loader(self.reader, _collated, self._places(iteration), self.workers, self.mean.is_cuda)
        pixels, labels, shifts, failed = next(self._iterator)
        self._next = iteration + 1
        refuse(self.reader.folder, failed, self.choice)
        self.unreadable |= failed
        device = self.mean.device
        pixels, labels, shifts = (part.to(device, non_blocking=True) for part in (pixels, labels, shifts))
        return centred(pixels, self.mean).add_((shifts @ self.components)[:, :, None, None]), labels

    def _places(self, start):
        """Of every batch to come, the images of this process and their places in the whole training."""
        mine = shared(self.batch, self.share)
        for iteration in itertools.count(start) if self.iterations is None else range(start, self.iterations):
            places = range(iteration * self.batch, (iteration + 1) * self.batch)
            yield list(zip(places[mine], self.indices(iteration)[mine].tolist(), strict=True))


class _TrainingCrops(torch.utils.data.Dataset):
    """Crops of training files; ``(place, index)`` asks for one, and its place alone says how it is altered."""

    def __init__(self, folder, files, seed):
        self.folder, self.files, self.seed = folder, files, seed

    def __getitem__(self, key):
        place, index = key
        generator = np.random.default_rng([self.seed, 1, place])
        side = int(generator.integers(TRAIN_SIDES[0], TRAIN_SIDES[1] + 1))
        corner, mirrored = generator.random(2), bool(generator.integers(2))
        shift = generator.normal(0, 0.1, 3).astype(np.float32)
        failed, count = {}, len(self.files.paths)
        for number in range(index, index + IN_A_ROW):
            name = os.fsdecode(self.files.paths[number % count])
            try:
                pixels = random_crop(self.folder / name, side, corner, mirrored)
            except READING_ERRORS as error:
                failed |= [failure(name, error)]
                continue
            return pixels, self.files.labels[number % count], shift, failed
        raise OSError(too_many(*failed.popitem()))


READING_ERRORS = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)


def failure(name, error):
    """What is kept of a file that cannot be read: its name below the data set's folder, and why."""
    return name, f"{type(error).__name__}: {error}".replace("\n", " ").replace("\t", " ")


def refuse(folder, failed, choice):
    """Raise ValueError for the first of the failures, {name: error}, if that was chosen."""
    for name, error in failed.items() if choice == "error" else ():
        raise ValueError(f"{folder / name} cannot be read ({error}): replace it, or choose unreadable='skip'")


def too_many(path, error):
    return f"{IN_A_ROW} files one after the other cannot be read, the last is {path} ({error}): is the disk there?"


def random_crop(path, side, corner, mirrored):
    """A 224 crop of the photograph with its shorter side resized to ``side``: (224, 224, 3) in uint8 (section 3.4).

    ``corner``: where it lies, 0 to 1 from top and from left. Only what the crop shows is resampled.
    """
    image, (width, height) = opened(path, side)
    top, left = (int(part * (length - CROP + 1)) for part, length in zip(corner, (height, width), strict=True))
    across, down = image.width / width, image.height / height
    box = (left * across, top * down, (left + CROP) * across, (top + CROP) * down)
    pixels = torch.from_numpy(np.array(image.resize((CROP, CROP), Image.Resampling.BILINEAR, box=box)))
    return pixels.flip(1) if mirrored else pixels


def opened(path, side):
    """A photograph in RGB, and the (width, height) at which its shorter side is ``side``.

    JPEG is decoded at a half, a quarter or an eighth of its size where that is still enough: much faster.
    """
    with Image.open(path) as image:
        width, height = image.size
        size = (side, int(side * height / width)) if width < height else (int(side * width / height), side)
        image.draft(None, size)
        return image.convert("RGB"), size


def resized(image, side):
    """A photograph with its shorter side resized to ``side``."""
    from torchvision.transforms.v2 import functional as v2

    return v2.resize(image, [side])


def central_crop(image):
    """The central 224 crop of a photograph with a shorter side of 256: one view (1, 224, 224, 3) in uint8."""
    from torchvision.transforms.v2 import functional as v2

    return [v2.pil_to_tensor(v2.center_crop(resized(image, TEST_SIDE), [CROP])).permute(1, 2, 0)[None]]


def read(dataset, files, view, batch=32, workers=None, unreadable="skip"):
    """Read the files of a part in their order: lists of the views of up to ``batch`` photographs, labels, failures.

    ``view(image)``: the tensors of views (k, H, W, 3) in uint8 to be seen of a photograph in RGB, made in ``workers``
    processes (None: one for each core; 0: in this one). Labels are a tensor (N,), failures {path: error} of the files
    that cannot be read and are left out; with ``unreadable="error"`` they raise ValueError instead.
    Raises OSError when so many files fail one after the other that these are no longer a few bad ones.
    """
    for pixels, shapes, labels, failed in _batches(dataset, files, view, _packed, batch, workers, unreadable):
        parts = iter(pixels.split([math.prod(shape) for views in shapes for shape in views]))
        yield [[next(parts).view(shape) for shape in views] for views in shapes], torch.tensor(labels), failed


def _batches(dataset, files, view, collated, batch=32, workers=None, unreadable="skip"):
    """What ``collated`` makes of each batch of samples, and its failures; stops a run of failures."""
    import torchvision.transforms.v2  # noqa: F401 (here, once, and not in every worker anew)

    indices = range(len(files.labels))
    places = (list(indices[start : start + batch]) for start in indices[::batch])
    reader, in_a_row = _Views(dataset.folder, files, view), 0
    for *content, failures in _loader(reader, collated, places, workers):
        failed = dict(found for found in failures if found is not None)
        refuse(dataset.folder, failed, unreadable)
        for found in failures:
            in_a_row = 0 if found is None else in_a_row + 1
            if in_a_row == IN_A_ROW:
                raise OSError(too_many(*found))
        yield *content, failed


class _Views(torch.utils.data.Dataset):
    def __init__(self, folder, files, view):
        self.folder, self.files, self.view = folder, files, view

    def __getitem__(self, index):
        path = os.fsdecode(self.files.paths[index])
        try:
            image, _ = opened(self.folder / path, max(TEST_SIDES))
            return self.view(image), self.files.labels[index], None
        except READING_ERRORS as error:
            return None, self.files.labels[index], failure(path, error)


def _packed(samples):
    """All views of a batch in one tensor: what comes from a worker takes one file descriptor, not one for each view."""
    seen = [(views, label) for views, label, _ in samples if views is not None]
    pixels = [view.flatten() for views, _ in seen for view in views]
    shapes, labels = [[view.shape for view in views] for views, _ in seen], [int(label) for _, label in seen]
    return torch.cat(pixels) if pixels else torch.empty(0), shapes, labels, [found for *_, found in samples]


def _collated(samples):
    pixels, labels, shifts, failed = zip(*samples, strict=True)
    failed = {path: error for errors in failed for path, error in errors.items()}
    return torch.stack(pixels), torch.tensor(np.array(labels)), torch.from_numpy(np.stack(shifts)), failed


class _Places(torch.utils.data.Sampler):
    def __init__(self, places):
        self.places = places

    def __iter__(self):
        return iter(self.places)


def _loader(reader, collated, places, workers=None, pinned=False):
    loader = torch.utils.data.DataLoader(
        reader,
        batch_sampler=_Places(places),
        collate_fn=collated,
        num_workers=cores() if workers is None else workers,
        pin_memory=pinned,
    )
    with warnings.catch_warnings():
        # Python 3.12 and later warn of every fork in a process with threads; these children only read files.
        warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
        return iter(loader)


def load(name, root="data", progress=True):
    """The data set of that name: ``digits``, ``cifar10``, ``cifar100`` or a folder of images.

    A folder is laid out as ``<root>/<name>/{train,test}/<class>/*``, all images of one size.
    CIFAR is downloaded into ``root`` on first use; a folder is decoded once and cached in ``<root>/.cache``.
    A name that begins with ``imagenet`` is that of a folder ``{train,val}/<wnid>/*`` of photographs, in torchvision's
    layout of ImageNet; they stay in their files. ``imagenet-rehearsal`` is a small one, made on first use.
    Raises ValueError naming what is wrong with the name or the files and what to do.
    """
    root = Path(root)
    if name == "digits":
        return _digits()
    if name in ("cifar10", "cifar100"):
        return _cifar(name, root)
    check_name(name)
    if name == "imagenet-rehearsal" and not (root / name).is_dir():
        _make_rehearsal(root / name)
    if not (root / name).is_dir():
        raise ValueError(unknown(name, root))
    return _imagenet(name, root, progress) if is_imagenet(name) else _folder(name, root, progress)


def present(name, root="data"):
    """Whether a data set is here, so that ``load`` would download and make nothing."""
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
    parts = ("train", "val") if is_imagenet(name) else ("train", "test")
    folders = {path.name for path in root.glob("*") if (path / "train").is_dir() and NAME.fullmatch(path.name)}
    builtin = ("imagenet-rehearsal",) if is_imagenet(name) else BUILT_IN
    choices = [*builtin, *sorted(folder for folder in folders if is_imagenet(folder) == is_imagenet(name))]
    close = difflib.get_close_matches(name, choices, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    places = " and ".join(f"{root / name}/{part}/<class>/" for part in parts)
    return f"dataset {name!r}: choose {', '.join(choices)}{hint}, or put images into {places}"


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
    classes, files = _listing(root / name, ("train", "test"))
    key = hashlib.sha256(f"{VERSION} {classes}".encode())
    for part, members in files.items():
        for path, _, size, changed in members:
            key.update(os.fsencode(f"{name}/{part}/{path} {size} {changed}\n"))
    cache = root / ".cache" / f"{name}.npz"
    arrays = _read_cache(cache, key.hexdigest())
    if arrays is None:
        arrays = {}
        total = sum(map(len, files.values()))
        with progress_bar(total, f"decoding {name}", "images", disable=not progress) as bar:
            for part, members in files.items():
                arrays[f"{part}_pixels"] = _decode([root / name / part / path for path, *_ in members], bar)
                arrays[f"{part}_labels"] = np.array([label for _, label, *_ in members], dtype=np.int64)
        if arrays["train_pixels"].shape[1:] != arrays["test_pixels"].shape[1:]:
            sizes = [tuple(arrays[f"{part}_pixels"].shape[2:0:-1]) for part in files]
            raise ValueError(
                f"{root / name}: train has images of {_size(sizes[0])}, test of {_size(sizes[1])}: resize one"
            )
        try:
            _write_cache(cache, key.hexdigest(), arrays)
        except OSError as error:
            print(f"{cache} cannot be written ({error}): the images will be decoded anew each time")
    parts = [Images(arrays[f"{part}_pixels"], arrays[f"{part}_labels"]) for part in files]
    return Dataset(name, classes, *parts)


def _listing(folder, parts):
    """The classes of a folder of images, and the files of each part: (path below it, label, size, time of change)."""
    found = {}
    for part in parts:
        if not (folder / part).is_dir():
            raise ValueError(f"{folder} has no folder {part}/: put its images into {folder / part}/<class>/")
        found[part] = {name: _visible(folder / part / name) for name, *_ in _visible(folder / part, folders=True)}
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


def _visible(folder, folders=False):
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


def _imagenet(name, root, progress):
    folder = root / name
    # Whoever only tests nets of others needs no training images.
    parts = ("train", "val") if (folder / "train").is_dir() else ("val",)
    if (folder / "val").is_dir() and not _visible(folder / "val", folders=True):
        raise ValueError(
            f"{folder / 'val'} has no folders <wnid>/: sort its images into them, as torchvision.datasets.ImageNet does"
        )
    classes, listed = _listing(folder, parts)
    digest = hashlib.sha256(repr(classes).encode())
    files = {"train": Files(np.array([], dtype="S1"), np.array([], dtype=np.int64))}
    for part in parts:
        for path, _, size, _ in listed[part]:
            digest.update(os.fsencode(f"{part}/{path} {size}\n"))
        paths = np.array([os.fsencode(f"{part}/{path}") for path, *_ in listed[part]])
        files[part] = Files(paths, np.array([label for _, label, *_ in listed[part]], dtype=np.int64))
    return ImageNet(name, root, classes, files["train"], files["val"], digest.hexdigest(), progress)


def _statistics(dataset):
    """Mean of every pixel, covariance of colours, and unreadable files: in integers, so in whatever order, exact."""
    count = len(dataset.train.labels)
    if not count:
        raise ValueError(f"{dataset.folder} has no folder train/: the mean of its images is needed")
    cache = dataset.root / ".cache" / f"{dataset.name}-{count}.npz"
    key = f"{VERSION} {dataset.fingerprint} {count}"
    arrays = _read_cache(cache, key)
    if arrays is not None and not any(_readable(dataset.folder / name) for name in _failures(arrays)):
        return arrays
    try:
        _write_cache(cache.with_suffix(".test"), key, {})
        cache.with_suffix(".test").unlink()
    except OSError as error:
        raise ValueError(
            f"{cache} cannot be written ({error}), and to read {count:,} images again each time would take too long: "
            f"let {dataset.root} be a folder that can be written to, with a symbolic link to the images in it"
        ) from error
    total, products, seen, unreadable = np.zeros((CROP, CROP, 3), np.int64), np.zeros((3, 3), np.int64), 0, {}
    with progress_bar(count, f"mean of {dataset.name}", "images", disable=not dataset.progress) as bar:
        for pixels, colours, number, failed in _batches(dataset, dataset.train, central_crop, _summed):
            total += pixels.numpy()
            products += colours
            seen += number
            unreadable |= failed
            bar.update(number + len(failed))
    if not seen:
        name, error = unreadable.popitem()
        raise ValueError(f"none of the {count:,} training files of {dataset.folder} can be read, {name}: {error}")
    mean = total / seen
    colour = mean.mean((0, 1))
    covariance = (products / (seen * CROP * CROP) - np.outer(colour, colour)) / 255**2
    lines = np.array([f"{name}\t{error}" for name, error in unreadable.items()], dtype=str)
    arrays = {"mean": mean.astype(np.float32), "covariance": covariance, "unreadable": lines}
    _write_cache(cache, key, arrays)
    return arrays


def _summed(samples):
    """Of a batch of central crops: sums of pixels, sums of products of colours, their number."""
    total, products, seen = torch.zeros(CROP, CROP, 3, dtype=torch.int64), np.zeros((3, 3), np.int64), 0
    for views, _, _ in samples:
        if views is not None:
            total += views[0][0]
            colours = views[0].numpy().reshape(-1, 3).astype(np.float64)  # whole numbers and their sums are exact in it
            products += (colours.T @ colours).astype(np.int64)
            seen += 1
    return total, products, seen, [found for *_, found in samples]


def _failures(arrays):
    return dict(line.split("\t", 1) for line in arrays["unreadable"].tolist())


def _readable(path):
    try:
        opened(path, TEST_SIDE)
    except READING_ERRORS:
        return False
    return True


REHEARSAL = {"classes": 6, "train": 12, "val": 1}  # the last two: photographs a class


def _make_rehearsal(folder):
    """A small folder in ImageNet's layout: drawn photographs of varied sizes, a sixth of them grey and a sixth CMYK."""
    generator = np.random.default_rng(0)
    part = folder.with_name(f"{folder.name}.{os.getpid()}.part")
    for place in range(REHEARSAL["classes"]):
        for name in ("train", "val"):
            target = part / name / f"n{place + 1:08}"
            target.mkdir(parents=True)
            for number in range(REHEARSAL[name]):
                width, height = generator.integers(240, 520, 2)
                across, down = np.meshgrid(np.arange(width), np.arange(height))
                angle = np.pi * place / REHEARSAL["classes"] + generator.normal(0, 0.1)
                phase = (across * np.cos(angle) + down * np.sin(angle)) / generator.uniform(8, 14)
                colour = generator.uniform(60, 180, 3)
                pixels = colour + 60 * np.sin(phase)[..., None] + generator.normal(0, 12, (height, width, 3))
                image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
                mode = {0: "L", 1: "CMYK"}.get((number + place) % 6, "RGB")
                image.convert(mode).save(target / f"{target.name}_{number}.JPEG")
    part.rename(folder)


def _decode(paths, bar):
    pixels = None
    for number, path in enumerate(paths):
        try:
            with Image.open(path) as image:
                decoded = np.asarray(image.convert("RGB"))
        except READING_ERRORS as error:
            raise ValueError(f"{path} cannot be read as an image ({error}): replace or remove it") from error
        if pixels is None:
            pixels = np.empty((len(paths), *decoded.shape), dtype=np.uint8)
        if decoded.shape != pixels.shape[1:]:
            size, first = _size(decoded.shape[1::-1]), _size(pixels.shape[2:0:-1])
            raise ValueError(f"{path} is {size}, {paths[0]} is {first}: resize them, all images must be of one size")
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
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
    try:
        path.parent.mkdir(exist_ok=True)
        with part.open("wb") as file:
            np.savez(file, key=np.array(key), **arrays)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
