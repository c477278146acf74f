"""ImageNet, and folders in its layout: reading images from their files, and making batches from them (section 3.4)."""

import errno
import hashlib
import itertools
import math
import multiprocessing.queues
import os
import signal
import stat
import sys
import warnings
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from replication.data.batches import EpochSampler, HoldsOut, normalize, rank_slice
from replication.data.folders import (
    CACHE_VERSION,
    READING_ERRORS,
    list_images,
    printable,
    read_cache,
    refuse,
    to_rgb,
    visible,
    write_cache,
)
from replication.engine.files import new_folder
from replication.engine.machine import cores, end_with_parent
from replication.engine.progress import progress_bar

CROP = 224  # side of a net's input, in pixels
TRAIN_SIDES = (256, 480)  # range of the shorter side in training, both included
TEST_SIDE = 256  # shorter side for crops at test time
TEST_SIDES = (224, 256, 384, 480, 640)  # shorter sides for multi-scale testing
MAX_RATIO = 20  # of the sides of an image: at five scales, longer ones would take gigabytes
TYPICAL = (640, 480)  # width and height of a photograph, to estimate the size of its views
AHEAD = 2  # batches that each reader reads in advance
MORE = "In a container, give it more shared memory: docker run --shm-size 16g"
MAX_FAILURES = 100  # consecutive unreadable files: more than a few bad files, the disk may be gone


class Files(NamedTuple):
    """A part of a data set: ``paths`` (N,) as bytes, relative to the data set's folder; ``labels`` (N,) in int64."""

    paths: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True, eq=False)
class ImageNet(HoldsOut):
    """A data set in torchvision's ImageNet layout, ``{train,val}/<wnid>/*``, read from its files when needed.

    Classes are sorted by wnid. ``test`` is the part ``val``. The interface is that of ``Dataset``.
    """

    name: str
    root: Path
    classes: tuple[str, ...]
    train: Files
    test: Files
    fingerprint: str  # SHA-256 over classes, names and sizes of all files: reading 140 GB every time would be too slow
    progress: bool = True
    validation: Files | None = None
    size = (CROP, CROP)

    @property
    def folder(self):
        """The folder of the files."""
        return self.root / self.name

    @property
    def mean(self):
        """Mean of every pixel over the central crops of the training images, (224, 224, 3) in float32, from 0 to 255.

        Computed once, with a progress bar, and cached in ``<root>/.cache``. Raises ValueError if the cache cannot be
        written, and for a folder without readable training images.
        """
        return self._statistics["mean"]

    @property
    def components(self):
        """Principal components of the colours of all training pixels, (3, 3) in float32, in units of 0 to 1.

        Each row is a unit vector times its eigenvalue; Krizhevsky et al. 2012 shift colours along them.
        """
        values, vectors = np.linalg.eigh(self._statistics["covariance"])
        # Make the largest entry of each vector positive: its sign would otherwise depend on the library.
        vectors = vectors * np.sign(vectors[np.abs(vectors).argmax(0), range(3)])
        return (vectors * values).T[::-1].astype(np.float32)

    def unreadable(self):
        """{path: error} of training files that could not be read when the mean was computed."""
        return _failures(self._statistics)

    def batches(self, batch, seed, device="cpu", share=(0, 1), iterations=None, workers=None):
        """The training batches, as ``ImageNetBatches``."""
        return ImageNetBatches(self, batch, seed, device, share, iterations, workers)

    def eval_batches(self, files, device="cpu", share=(0, 1), workers=None):
        """A part's images for evaluation during training: the central crop of each.

        Yields inputs ``(N, 3, 224, 224)``, labels ``(N,)``, those of a process's ``share`` as in ``Dataset``, and
        {path: error} of unreadable files, which are left out.
        """
        mean = torch.from_numpy(self.mean).to(device)
        rank, world_size = share
        part = Files(*(column[rank::world_size] for column in files))
        for images, labels, failures in read(self, part, central_crop, workers=workers):
            crops = [crop for (crop,) in images] or [torch.empty(0, CROP, CROP, 3, dtype=torch.uint8)]
            yield normalize(torch.cat(crops).to(device), mean), labels.to(device), failures

    @cached_property
    def _statistics(self):
        """Mean of every pixel, covariance of colours, and unreadable files, from the cache if possible.

        Sums are integers, so the result does not depend on their order.
        """
        count = len(self.train.labels)
        if not count:
            raise ValueError(f"{self.folder} has no folder train/: the mean of its images is needed")
        cache = self.root / ".cache" / f"{self.name}-{count}.npz"
        key = f"{CACHE_VERSION} {self.fingerprint} {count}"
        arrays = read_cache(cache, key)
        if arrays is not None and not self._repaired(_failures(arrays)):
            return arrays
        try:
            write_cache(cache.with_suffix(".test"), key, {})
            cache.with_suffix(".test").unlink()
        except OSError as error:
            raise ValueError(
                f"{cache} cannot be written ({error.__cause__ or error}), and reading {count:,} images again each time "
                f"would take too long: make {self.root} a writable folder, with a symbolic link to the images in it"
            ) from error
        total, products, unreadable = np.zeros((CROP, CROP, 3), np.int64), np.zeros((3, 3), np.int64), {}
        with progress_bar(count, f"mean of {self.name}", "images", disable=not self.progress) as bar:
            for views, labels, failures in read(self, self.train, central_crop):
                for (crop,) in views:
                    total += crop[0].numpy()
                    colours = crop.view(-1, 3).double()  # holds integers of this size exactly
                    products += (colours.T @ colours).long().numpy()
                unreadable |= failures
                bar.update(len(labels) + len(failures))
        images = count - len(unreadable)
        if not images:
            name, error = unreadable.popitem()
            raise ValueError(f"none of the {count:,} training files of {self.folder} can be read, {name}: {error}")
        mean = total / images
        colour = mean.mean((0, 1))
        covariance = (products / (images * CROP * CROP) - np.outer(colour, colour)) / 255**2
        lines = np.array([f"{name}\t{error}" for name, error in unreadable.items()], dtype=str)
        arrays = {"mean": mean.astype(np.float32), "covariance": covariance, "unreadable": lines}
        write_cache(cache, key, arrays)
        return arrays

    def _repaired(self, failures):
        """Whether one of the training files that could not be read can be read now."""
        names = map(os.fsdecode, self.train.paths.tolist() if failures else ())
        return any(printable(name) in failures and _readable(self.folder / name) for name in names)


def _failures(arrays):
    """{path: error} from the lines in which unreadable files are cached."""
    return dict(line.split("\t", 1) for line in arrays["unreadable"].tolist())


def _readable(path):
    try:
        return open_image(path, TEST_SIDE) is not None
    except READING_ERRORS:
        return False


class ImageNetBatches:
    """Training batches of an ``ImageNet``: scaled, cropped and mirrored at random, minus the mean, colours shifted.

    Called as ``Batches``. Files are decoded in advance, for ``iterations`` in all (None: without end), in ``workers``
    processes (None: one per core; 0: in this process). A file that cannot be read is replaced by the next readable one
    and added to ``unreadable``, {path: error}.
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
            keys, pin = self._keys(iteration), self.mean.is_cuda
            size = self.batch // self.share[1] * CROP**2 * 3
            count = None if self.iterations is None else self.iterations - iteration
            self._iterator = _loader(self.reader, _collate_crops, keys, size, count, self.workers, pin)
        pixels, labels, shifts, failures = next(self._iterator)
        self._next = iteration + 1
        self.unreadable |= failures
        device = self.mean.device
        pixels, labels, shifts = (part.to(device, non_blocking=True) for part in (pixels, labels, shifts))
        return normalize(pixels, self.mean).add_((shifts @ self.components)[:, :, None, None]), labels

    def _keys(self, start):
        """For each batch from ``start`` on, this process's part: pairs of position in the whole training and image."""
        part = rank_slice(self.batch, self.share)
        for iteration in itertools.count(start) if self.iterations is None else range(start, self.iterations):
            positions = range(iteration * self.batch, (iteration + 1) * self.batch)
            yield list(zip(positions[part], self.indices(iteration)[part].tolist(), strict=True))


class _TrainingCrops(torch.utils.data.Dataset):
    """Random crops of training images by (position, index); augmentation depends on seed and position alone."""

    def __init__(self, folder, files, seed):
        self.folder, self.files, self.seed = folder, files, seed

    def __getitem__(self, key):
        position, index = key
        generator = np.random.default_rng([self.seed, 1, position])
        side = int(generator.integers(TRAIN_SIDES[0], TRAIN_SIDES[1] + 1))
        corner, mirrored = generator.random(2), bool(generator.integers(2))
        shift = generator.normal(0, 0.1, 3).astype(np.float32)  # of colours, along each principal component
        failures, count = {}, len(self.files.paths)
        for number in range(index, index + MAX_FAILURES):
            name = os.fsdecode(self.files.paths[number % count])
            try:
                pixels = random_crop(self.folder / name, side, corner, mirrored)
            except READING_ERRORS as error:
                failures |= [_failure(name, error)]
                continue
            return pixels, self.files.labels[number % count], shift, failures
        raise OSError(_too_many(*failures.popitem()))


def _failure(name, error):
    """An unreadable file as it is listed: its path below the data set's folder and the error, both printable."""
    return printable(name), printable(f"{type(error).__name__}: {error}")


def _too_many(path, error):
    return f"{MAX_FAILURES} files in a row cannot be read, the last is {path} ({error}): is the disk still there?"


def random_crop(path, side, corner, mirrored):
    """A 224 crop of an image whose shorter side is resized to ``side``: (224, 224, 3) in uint8 (section 3.4).

    ``corner``: position of the crop from the top and from the left, 0 to 1. Only the pixels inside it are resampled.
    """
    image, (width, height) = open_image(path, side)
    top, left = (int(part * (length - CROP + 1)) for part, length in zip(corner, (height, width), strict=True))
    x, y = image.width / width, image.height / height  # pixels of the file per pixel of the resized image
    box = (left * x, top * y, (left + CROP) * x, (top + CROP) * y)
    pixels = pixels_of(image.resize((CROP, CROP), Image.Resampling.BILINEAR, box=box))
    return pixels.flip(1) if mirrored else pixels


def open_image(path, side):
    """An image in RGB, and the (width, height) at which its shorter side is ``side``.

    JPEG is decoded at a half, a quarter or an eighth of its size if that is still large enough, which is much faster.
    Raises ValueError for sides of a ratio above ``MAX_RATIO``, and what ``to_rgb`` raises.
    """
    with Image.open(path) as image:
        if max(image.size) > MAX_RATIO * min(image.size):
            raise ValueError(
                f"{image.width}x{image.height} pixels: one side is more than {MAX_RATIO} times the other, crop it"
            )
        size = _size(image, side)
        image.draft(None, size)
        return to_rgb(image), size


def _size(image, side):
    width, height = image.size
    return (side, int(side * height / width)) if width < height else (int(side * width / height), side)


def resize(image, side):
    """An image with its shorter side resized to ``side``."""
    return image.resize(_size(image, side), Image.Resampling.BILINEAR)


def centre(image, side):
    """The central square of an image."""
    left, top = (round((length - side) / 2) for length in image.size)
    return image.crop((left, top, left + side, top + side))


def pixels_of(image):
    """The pixels of an image: (H, W, 3) in uint8."""
    return torch.from_numpy(np.array(image))


def central_crop(image):
    """The central 224 crop of an image whose shorter side is resized to 256: one view (1, 224, 224, 3) in uint8."""
    return [pixels_of(centre(resize(image, TEST_SIDE), CROP))[None]]


def read(dataset, files, view, batch=32, workers=None):
    """Read the files of a part in order; yields views of up to ``batch`` images, labels and failures.

    ``view(image)``: a list of tensors of views, (k, H, W, 3) in uint8, of an image in RGB; called in ``workers``
    processes (None: one per core; 0: in this process). Views are a list with that list for each image, labels a tensor
    (N,), failures {path: error} of unreadable files, which are left out.
    Raises OSError after ``MAX_FAILURES`` unreadable files in a row.
    """
    indices, in_a_row = range(len(files.labels)), 0
    batches = (indices[start : start + batch] for start in indices[::batch])
    reader = _Views(dataset.folder, files, view)
    size = min(batch, len(indices)) * sum(pixels.nbytes for pixels in view(Image.new("RGB", TYPICAL)))
    count = math.ceil(len(indices) / batch)
    for pixels, shapes, labels, failures in _loader(reader, _collate_views, batches, size, count, workers):
        for failure in failures:  # None for each image that was read
            in_a_row = 0 if failure is None else in_a_row + 1
            if in_a_row == MAX_FAILURES:
                raise OSError(_too_many(*failure))
        parts = iter(pixels.split([math.prod(shape) for views in shapes for shape in views]))
        images = [[next(parts).view(shape) for shape in views] for views in shapes]
        yield images, torch.tensor(labels), dict(filter(None, failures))


class _Views(torch.utils.data.Dataset):
    """The views of images, their labels, and failures."""

    def __init__(self, folder, files, view):
        self.folder, self.files, self.view = folder, files, view

    def __getitem__(self, index):
        path = os.fsdecode(self.files.paths[index])
        try:
            image, _ = open_image(self.folder / path, max(TEST_SIDES))
            return self.view(image), int(self.files.labels[index]), None
        except READING_ERRORS as error:
            return None, None, _failure(path, error)


def _collate_views(samples):
    """All views of a batch in one tensor: each tensor that a worker sends takes a file descriptor."""
    readable = [(views, label) for views, label, failure in samples if failure is None]
    pixels = [view.flatten() for views, _ in readable for view in views]
    shapes = [[view.shape for view in views] for views, _ in readable]
    failures = [failure for *_, failure in samples]
    return torch.cat(pixels) if pixels else torch.empty(0), shapes, [label for _, label in readable], failures


def _collate_crops(samples):
    pixels, labels, shifts, failures = zip(*samples, strict=True)
    failures = {path: error for each in failures for path, error in each.items()}
    return torch.stack(pixels), torch.tensor(np.array(labels)), torch.from_numpy(np.stack(shifts)), failures


def _prepare_reader(_):
    """End with the training process; it finishes its iteration on an interrupt, and needs its readers for that."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()
    # Python would print why a batch could not be sent, and go on without it: it would be waited for without end.
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(_end_reader)


def _end_reader(error, _):
    print(f"A reader of photographs could not send a batch: {error}", file=sys.stderr, flush=True)
    os._exit(1)


def _loader(reader, collate, batches, size, count=None, workers=None, pin_memory=False):
    """Yields what ``collate`` makes of the samples of ``reader``, for each list of keys in ``batches``.

    size: bytes of the largest batch. count: of all batches (None: without end).
    Raises OSError when shared memory is too small for the batches that are read in advance, and when a reader dies.
    """
    workers = cores() if workers is None else workers
    if multiprocessing.current_process().daemon:
        workers = 0  # daemonic processes, such as Dask's workers, may not start others
    if workers:
        ahead = AHEAD * workers + 1  # and the batch in use
        check_shared_memory(size * (ahead if count is None else min(ahead, count)))
    loader = torch.utils.data.DataLoader(
        reader,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=workers,
        prefetch_factor=AHEAD if workers else None,
        pin_memory=pin_memory,
        worker_init_fn=_prepare_reader,
        # Children that die with this process; any other start method puts a server in between, which does not.
        multiprocessing_context="fork" if workers and sys.platform.startswith("linux") else None,
    )
    try:
        with warnings.catch_warnings():
            # Python 3.12 and later warn about a fork in a process with threads; these children only read files.
            warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
            iterator = iter(loader)
        yield from iterator
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker (pid"):
            raise
        raise OSError(f"a process that reads photographs died ({error}): is there enough memory? {MORE}") from error


def check_shared_memory(needed, folder="/dev/shm"):
    """Raise OSError when ``folder``, the machine's shared memory, has less than the ``needed`` bytes left."""
    try:
        space = os.statvfs(folder)
    except OSError:  # not Linux: shared memory is no folder there
        return
    left = space.f_bavail * space.f_frsize
    if left < needed:
        raise OSError(
            errno.ENOSPC,
            f"{folder} has {left / 2**20:,.0f} MiB left, but photographs that are read in advance need "
            f"{needed / 2**20:,.0f} MiB. {MORE}",
        )


def load(name, root, progress=True):
    """The data set ``<root>/<name>``. Raises ValueError naming what is wrong with its parts and classes."""
    folder = root / name
    # Testing weights of others needs no training images.
    parts = ("train", "val") if (folder / "train").is_dir() else ("val",)
    if (folder / "val").is_dir() and not any(stat.S_ISDIR(mode) for _, mode, *_ in visible(folder / "val")):
        raise ValueError(
            f"{folder / 'val'} has no folders <wnid>/: sort its images into them, as torchvision.datasets.ImageNet does"
        )
    classes, listed, faults = list_images(folder, parts)
    refuse(folder, faults)
    digest = hashlib.sha256(repr(classes).encode())
    files = {"train": Files(np.array([], dtype="S1"), np.array([], dtype=np.int64))}
    for part in parts:
        for path, _, size, _ in listed[part]:
            digest.update(os.fsencode(f"{part}/{path} {size}\n"))
        paths = np.array([os.fsencode(f"{part}/{path}") for path, *_ in listed[part]])
        files[part] = Files(paths, np.array([label for _, label, *_ in listed[part]], dtype=np.int64))
    return ImageNet(name, root, classes, files["train"], files["val"], digest.hexdigest(), progress)


def make_smoke_test(folder):
    """Create a small folder in ImageNet's layout: stripes of varied sizes, a sixth of them grey and a sixth CMYK."""
    generator = np.random.default_rng(0)
    with new_folder(folder) as temporary:
        for label in range(6):
            for name, count in (("train", 12), ("val", 1)):
                target = temporary / name / f"n{label + 1:08}"
                target.mkdir(parents=True)
                for number in range(count):
                    width, height = generator.integers(240, 520, 2)
                    across, down = np.meshgrid(np.arange(width), np.arange(height))
                    angle = np.pi * label / 6 + generator.normal(0, 0.1)
                    phase = (across * np.cos(angle) + down * np.sin(angle)) / generator.uniform(8, 14)
                    colour = generator.uniform(60, 180, 3)
                    pixels = colour + 60 * np.sin(phase)[..., None] + generator.normal(0, 12, (height, width, 3))
                    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
                    mode = {0: "L", 1: "CMYK"}.get((number + label) % 6, "RGB")
                    image.convert(mode).save(target / f"{target.name}_{number}.JPEG")
