"""Photographs in ImageNet's layout, left in their files: how they are read, and made into batches (section 3.4)."""

import hashlib
import itertools
import math
import multiprocessing
import os
import shutil
import signal
import warnings
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from replication.data.batches import EpochSampler, hold_out, normalize, rank_slice
from replication.data.folders import CACHE_VERSION, READING_ERRORS, list_images, read_cache, visible, write_cache
from replication.engine.machine import cores
from replication.engine.progress import progress_bar

CROP = 224  # the side of what an ImageNet net is trained on, in pixels
TEST_SIDE = 256  # the shorter side that a photograph is resized to for crops at test time
TEST_SIDES = (224, 256, 384, 480, 640)  # ... for whole photographs
TRAIN_SIDES = (256, 480)  # ... and at random, both included, in training
IN_A_ROW = 100  # files that cannot be read one after the other: no longer a few bad ones


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
        return hold_out(self, count)

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

    def unreadable(self):
        """Training files that could not be read when the mean was computed, as {path: error}."""
        return _failures(self._statistics)

    def batches(self, batch, seed, device="cpu", share=(0, 1), **options):
        """The training batches, as ``ImageNetBatches``."""
        return ImageNetBatches(self, batch, seed, device, share, **options)

    def eval_batches(self, files, device="cpu", share=(0, 1), workers=None, failed=None):
        """What a net sees of a part in tests during training: the central crop of every photograph.

        Gives inputs ``(N, 3, 224, 224)`` and labels ``(N,)``, as ``Dataset.eval_batches`` does. What cannot be read is
        left out and goes to ``failed``, {path: error}.
        """
        mean = torch.from_numpy(self.mean).to(device)
        mine = Files(*(part[share[0] :: share[1]] for part in files))
        for images, labels, errors in read(self, mine, central_crop, workers=workers):
            if failed is not None:
                failed |= errors
            if images:
                yield normalize(torch.cat([crop for (crop,) in images]).to(device), mean), labels.to(device)


class ImageNetBatches:
    """The training batches of an ``ImageNet``: scaled, cropped, mirrored, less the mean, shifted in colour.

    As ``Batches``; files are read and decoded ahead, in ``workers`` processes (None: one for each core; 0: in this one)
    and up to ``iterations``. A file that cannot be read is replaced by the next one in their order and goes to
    ``unreadable``, {path: error}.
    """

    def __init__(self, dataset, batch, seed, device="cpu", share=(0, 1), iterations=None, workers=None):
        self.batch, self.share, self.iterations, self.workers = batch, share, iterations, workers
        self.indices = EpochSampler(len(dataset.train.labels), batch, seed)
        self.reader = _TrainingCrops(dataset.folder, dataset.train, seed)
        self.mean = torch.from_numpy(dataset.mean).to(device)
        self.components = torch.from_numpy(dataset.components).to(device)
        self.unreadable = {}
        self._next, self._iterator = None, None

    def __call__(self, iteration):
        if iteration != self._next:
            self._iterator = _loader(self.reader, _collated, self._places(iteration), self.workers, self.mean.is_cuda)
        pixels, labels, shifts, failed = next(self._iterator)
        self._next = iteration + 1
        self.unreadable |= failed
        device = self.mean.device
        pixels, labels, shifts = (part.to(device, non_blocking=True) for part in (pixels, labels, shifts))
        return normalize(pixels, self.mean).add_((shifts @ self.components)[:, :, None, None]), labels

    def _places(self, start):
        """Of every batch to come, the images of this process and their places in the whole training."""
        mine = rank_slice(self.batch, self.share)
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
                failed |= [_failure(name, error)]
                continue
            return pixels, self.files.labels[number % count], shift, failed
        raise OSError(_too_many(*failed.popitem()))


def _failure(name, error):
    """What is kept of a file that cannot be read: its name below the data set's folder, and why."""
    return name, f"{type(error).__name__}: {error}".replace("\n", " ").replace("\t", " ")


def _too_many(path, error):
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


def read(dataset, files, view, batch=32, workers=None):
    """Read the files of a part in their order: lists of the views of up to ``batch`` photographs, labels, failures.

    ``view(image)``: the tensors of views (k, H, W, 3) in uint8 to be seen of a photograph in RGB, made in ``workers``
    processes (None: one for each core; 0: in this one). Labels are a tensor (N,), failures {path: error} of the files
    that cannot be read and are left out.
    Raises OSError when so many files fail one after the other that these are no longer a few bad ones.
    """
    for pixels, shapes, labels, failed in _batches(dataset, files, view, _packed, batch, workers):
        parts = iter(pixels.split([math.prod(shape) for views in shapes for shape in views]))
        yield [[next(parts).view(shape) for shape in views] for views in shapes], torch.tensor(labels), failed


def _batches(dataset, files, view, collated, batch=32, workers=None):
    """What ``collated`` makes of each batch of samples, and its failures; stops a run of failures."""
    import torchvision.transforms.v2  # noqa: F401 (here, once, and not in every worker anew)

    indices = range(len(files.labels))
    places = (list(indices[start : start + batch]) for start in indices[::batch])
    reader, in_a_row = _Views(dataset.folder, files, view), 0
    for *content, failures in _loader(reader, collated, places, workers):
        failed = dict(found for found in failures if found is not None)
        for found in failures:
            in_a_row = 0 if found is None else in_a_row + 1
            if in_a_row == IN_A_ROW:
                raise OSError(_too_many(*found))
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
            return None, self.files.labels[index], _failure(path, error)


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


def _ignore_interrupts(_):
    """The process that trains ends its readers: before, it may have an iteration to finish with what they read."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _loader(reader, collated, places, workers=None, pinned=False):
    if multiprocessing.current_process().daemon:
        workers = 0  # as the processes of a Dask worker are: they may start no others
    loader = torch.utils.data.DataLoader(
        reader,
        batch_sampler=_Places(places),
        collate_fn=collated,
        num_workers=cores() if workers is None else workers,
        pin_memory=pinned,
        worker_init_fn=_ignore_interrupts,
    )
    with warnings.catch_warnings():
        # Python 3.12 and later warn of every fork in a process with threads; these children only read files.
        warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
        return iter(loader)


def load(name, root, progress=True):
    """The data set in the folder of that name; raises ValueError naming what is wrong with its parts and classes."""
    folder = root / name
    # Whoever only tests nets of others needs no training images.
    parts = ("train", "val") if (folder / "train").is_dir() else ("val",)
    if (folder / "val").is_dir() and not visible(folder / "val", folders=True):
        raise ValueError(
            f"{folder / 'val'} has no folders <wnid>/: sort its images into them, as torchvision.datasets.ImageNet does"
        )
    classes, listed = list_images(folder, parts)
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
    key = f"{CACHE_VERSION} {dataset.fingerprint} {count}"
    arrays = read_cache(cache, key)
    if arrays is not None and not any(_readable(dataset.folder / name) for name in _failures(arrays)):
        return arrays
    try:
        write_cache(cache.with_suffix(".test"), key, {})
        cache.with_suffix(".test").unlink()
    except OSError as error:
        raise ValueError(
            f"{cache} cannot be written ({error.__cause__ or error}), and to read {count:,} images again each time "
            f"would take too long: let {dataset.root} be a folder that can be written to, with a symbolic link to the "
            "images in it"
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
    write_cache(cache, key, arrays)
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


SMOKE_TEST = {"classes": 6, "train": 12, "val": 1}  # the last two: photographs a class


def make_smoke_test(folder):
    """A small folder in ImageNet's layout: drawn photographs of varied sizes, a sixth of them grey and a sixth CMYK."""
    generator = np.random.default_rng(0)
    part = folder.with_name(f"{folder.name}.{os.getpid()}.part")
    for place in range(SMOKE_TEST["classes"]):
        for name in ("train", "val"):
            target = part / name / f"n{place + 1:08}"
            target.mkdir(parents=True)
            for number in range(SMOKE_TEST[name]):
                width, height = generator.integers(240, 520, 2)
                across, down = np.meshgrid(np.arange(width), np.arange(height))
                angle = np.pi * place / SMOKE_TEST["classes"] + generator.normal(0, 0.1)
                phase = (across * np.cos(angle) + down * np.sin(angle)) / generator.uniform(8, 14)
                colour = generator.uniform(60, 180, 3)
                pixels = colour + 60 * np.sin(phase)[..., None] + generator.normal(0, 12, (height, width, 3))
                image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
                mode = {0: "L", 1: "CMYK"}.get((number + place) % 6, "RGB")
                image.convert(mode).save(target / f"{target.name}_{number}.JPEG")
    try:
        part.rename(folder)
    except OSError:
        shutil.rmtree(part)
        if not folder.is_dir():  # else another process was quicker
            raise
