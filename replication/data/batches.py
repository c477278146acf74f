"""Small images in memory, and the batches made of them (section 4.2).

A batch is a pure function of (seed, iteration): nothing has to be restored to go on from any point, and it is the same
for any number of processes that share it or workers that read it.
"""

import hashlib
import os
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from replication.data.folders import READING_ERRORS, VERSION, listing, read_cache, write_cache
from replication.engine.progress import progress_bar


class EpochSampler:
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


def rank_slice(batch, share):
    """The slice of a batch that one of several processes trains on."""
    process, processes = share
    return slice(process * batch // processes, (process + 1) * batch // processes)


def normalize(pixels, mean, std=None):
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

    def unreadable(self):
        """Training images known to be unreadable: none, since all were read."""
        return {}

    def eval_batches(self, images, device="cpu", share=(0, 1), mean=None, std=None, **_):
        """What a net sees of a part in a test: the single, unaltered view of every image (section 4.2).

        Gives inputs ``(N, 3, H, W)`` and labels ``(N,)`` of ``share`` = (this process, processes) of the part: of
        every so many images, as many as there are processes, this one's.
        ``mean`` and ``std``: as ``normalize`` takes them, for nets of others; left out, the data set's own mean.
        """
        mean = torch.from_numpy(self.mean).to(device) if mean is None else mean
        mine = Images(*(part[share[0] :: share[1]] for part in images))
        for start in range(0, len(mine.labels), 500):
            pixels, labels = (torch.from_numpy(part[start : start + 500]).to(device) for part in mine)
            yield normalize(pixels, mean, std), labels

    def hold_out(self, count):
        """The same data set with ``count`` random training images kept for validation: the same ones for every seed.

        Raises ValueError unless at least one image is left for training.
        """
        return hold_out(self, count)


class Batches:
    """The training batches of a data set in memory: shifted, mirrored, the mean subtracted.

    ``batches(iteration)`` gives images ``(batch, 3, H, W)`` in float32, channels last, and labels ``(batch,)``, both on
    ``device``; of several processes each gets its ``share`` = (which, of how many) of that batch.
    """

    def __init__(self, dataset, batch, seed, device="cpu", share=(0, 1)):
        pixels, labels = dataset.train
        self.batch, self.seed, self.share = batch, seed, share
        self.padding, self.flips = dataset.padding, dataset.flips
        self.indices = EpochSampler(len(labels), batch, seed)
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
        drawn = torch.from_numpy(np.ascontiguousarray(drawn[:, rank_slice(self.batch, self.share)]))
        if self.crops.is_cuda:
            drawn = drawn.pin_memory()  # else the copy would wait for the device
        indices, rows, columns, mirrored = drawn.to(self.crops.device, non_blocking=True)
        pixels = self.crops[indices, rows, columns]
        if self.flips:
            pixels = torch.where(mirrored.bool()[:, None, None, None], pixels.flip(2), pixels)
        return normalize(pixels, self.mean), self.labels[indices]


def load_folder(name, root, progress):
    classes, listed = listing(root / name, ("train", "test"))
    key = hashlib.sha256(f"{VERSION} {classes}".encode())
    for part, members in listed.items():
        for path, _, size, changed in members:
            key.update(os.fsencode(f"{name}/{part}/{path} {size} {changed}\n"))
    cache = root / ".cache" / f"{name}.npz"
    arrays = read_cache(cache, key.hexdigest())
    if arrays is None:
        arrays = {}
        total = sum(map(len, listed.values()))
        with progress_bar(total, f"decoding {name}", "images", disable=not progress) as bar:
            for part, members in listed.items():
                arrays[f"{part}_pixels"] = _decode([root / name / part / path for path, *_ in members], bar)
                arrays[f"{part}_labels"] = np.array([label for _, label, *_ in members], dtype=np.int64)
        if arrays["train_pixels"].shape[1:] != arrays["test_pixels"].shape[1:]:
            sizes = [tuple(arrays[f"{part}_pixels"].shape[2:0:-1]) for part in listed]
            raise ValueError(
                f"{root / name}: train has images of {_size(sizes[0])}, test of {_size(sizes[1])}: resize one"
            )
        try:
            write_cache(cache, key.hexdigest(), arrays)
        except OSError as error:
            print(f"{cache} cannot be written ({error.__cause__ or error}): the images will be decoded anew each time")
    parts = [Images(arrays[f"{part}_pixels"], arrays[f"{part}_labels"]) for part in listed]
    return Dataset(name, classes, *parts)


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
