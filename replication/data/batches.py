"""Small images in memory, and the batches made from them (section 4.2).

A batch is a pure function of (seed, iteration). Training can therefore resume at any iteration without restoring the
state of a generator, and any number of processes or workers produces the same batches.
"""

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F


class EpochSampler:
    """The images of each batch: every epoch is a new permutation of all images, and a batch may span two epochs."""

    def __init__(self, count, batch, seed):
        self.count, self.batch, self.seed = count, batch, seed
        self._last = (None, None)  # the permutation used last and its epoch

    def __call__(self, iteration):
        """Indices of the images of a batch: integers ``(batch,)``."""
        positions = np.arange(iteration * self.batch, (iteration + 1) * self.batch)
        epochs, offsets = np.divmod(positions, self.count)
        return np.concatenate([self._permutation(epoch)[offsets[epochs == epoch]] for epoch in np.unique(epochs)])

    def _permutation(self, epoch):
        if self._last[0] != epoch:
            self._last = epoch, np.random.default_rng([self.seed, 0, epoch]).permutation(self.count)
        return self._last[1]


def rank_slice(batch, share):
    """The slice of a batch that process ``rank`` of ``world_size`` trains on; ``share``: these two numbers."""
    rank, world_size = share
    return slice(rank * batch // world_size, (rank + 1) * batch // world_size)


def normalize(pixels, mean, std=None):
    """Turn pixels ``(N, H, W, 3)`` in uint8 into a net's input ``(N, 3, H, W)`` in float32: (pixels - mean) / 255.

    ``mean``: ``(3,)`` or ``(h, w, 3)``, in units of 0 to 255; a mean image is interpolated to the size of the pixels.
    ``std``: ``(3,)``, in units of 0 to 1; the result is divided by it, as nets trained by others expect.
    """
    if mean.ndim == 3 and mean.shape[:2] != pixels.shape[1:3]:
        resized = F.interpolate(mean.permute(2, 0, 1)[None], pixels.shape[1:3], mode="bilinear", align_corners=False)
        mean = resized[0].permute(1, 2, 0)
    inputs = pixels.float().sub_(mean).div_(255)
    return (inputs if std is None else inputs.div_(std)).permute(0, 3, 1, 2)


class HoldsOut:
    """What data sets in memory and on the disk have in common."""

    def hold_out(self, count):
        """This data set with ``count`` training images, drawn at random but always the same, as ``validation``.

        Raises ValueError unless at least one image is left for training.
        """
        if count == 0:
            return self
        total = len(self.train.labels)
        if count >= total:
            raise ValueError(f"holdout {count}: {self.name} has {total} training images, choose fewer")
        order = np.random.default_rng([45_000, 5_000]).permutation(total)

        def subset(indices):
            return type(self.train)(*(column[np.sort(indices)] for column in self.train))

        return replace(self, train=subset(order[count:]), validation=subset(order[:count]))


class Images(NamedTuple):
    """A part of a data set: ``pixels`` (N, H, W, 3) in uint8, ``labels`` (N,) in int64."""

    pixels: np.ndarray
    labels: np.ndarray


def original_views(images, mean, std=None):
    """The single, original view of each of ``images``, on the device of ``mean``, as ``eval_batches`` yields them.

    mean, std: as ``normalize`` takes them.
    """
    pixels, labels = map(torch.from_numpy, images)
    for start in range(0, len(labels), 500):
        views, classes = (column[start : start + 500].to(mean.device) for column in (pixels, labels))
        yield normalize(views, mean, std), classes, {}


@dataclass(frozen=True, eq=False)
class Dataset(HoldsOut):
    """A data set of small images in memory; ``validation`` is None unless some training images are held out.

    ``ImageNet`` has the same interface, for images that are too many and too large for memory.
    """

    name: str
    classes: tuple[str, ...]
    train: Images
    test: Images
    validation: Images | None = None

    @cached_property
    def fingerprint(self):
        """SHA-256 over classes, and pixels and labels of training and test part, as 64 hexadecimal digits."""
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
        """Width of the zero border added before the random crop: 4 for the paper's 32x32 images, else in proportion."""
        return min(self.size) // 8

    @property
    def flips(self):
        """Whether images are mirrored at random: all but ``digits``, since a mirrored digit is no digit."""
        return self.name != "digits"

    def unreadable(self):
        """{path: error} of training files that cannot be read: none, since all images are in memory."""
        return {}

    def batches(self, batch, seed, device="cpu", share=(0, 1), iterations=None, workers=None):
        """The training batches, as ``Batches``. Images are in memory: ``iterations`` and ``workers`` are not needed."""
        return Batches(self, batch, seed, device, share)

    def eval_batches(self, images, device="cpu", share=(0, 1), workers=None):
        """A part's images for evaluation: the single, original view of each (section 4.2).

        Yields inputs ``(N, 3, H, W)``, labels ``(N,)`` and {path: error} of unreadable files, which is always empty
        here. ``share``: rank and world size; each process gets every ``world_size``-th image, from its rank on.
        ``workers`` is ignored.
        """
        rank, world_size = share
        return original_views(
            Images(*(column[rank::world_size] for column in images)), torch.from_numpy(self.mean).to(device)
        )


class Batches:
    """Training batches in memory: padded with zeros, cropped and mirrored at random, then minus the mean (section 4.2).

    ``batches(iteration)`` gives images ``(batch, 3, H, W)`` in float32, channels last, and labels ``(batch,)``, both on
    ``device``; in distributed training each process gets its ``share``, (rank, world size), of that batch.
    """

    def __init__(self, dataset, batch, seed, device="cpu", share=(0, 1)):
        pixels, labels = dataset.train
        self.batch, self.seed, self.share = batch, seed, share
        self.padding, self.flips = dataset.padding, dataset.flips
        self.indices = EpochSampler(len(labels), batch, seed)
        self.unreadable = {}
        border = (self.padding, self.padding)
        padded = torch.from_numpy(np.pad(pixels, ((0, 0), border, border, (0, 0)))).to(device)
        n, h, w, c = padded.stride()
        offsets = 2 * self.padding + 1
        # A view that holds every crop of every image: crops[image, row, column]. Indexing it cuts out a whole batch.
        self.crops = padded.as_strided((len(labels), offsets, offsets, *pixels.shape[1:]), (n, h, w, h, w, c))
        self.labels = torch.from_numpy(labels).to(device)
        self.mean = torch.from_numpy(dataset.mean).to(device)

    def augmentation(self, iteration):
        """For each image of a batch: the row and column of its crop in the padded image, and whether it is mirrored."""
        generator = np.random.default_rng([self.seed, 1, iteration])
        rows, columns = generator.integers(0, 2 * self.padding + 1, (2, self.batch))
        return rows, columns, generator.integers(0, 2, self.batch).astype(bool) & self.flips

    def __call__(self, iteration):
        draws = np.stack([self.indices(iteration), *self.augmentation(iteration)])
        draws = torch.from_numpy(np.ascontiguousarray(draws[:, rank_slice(self.batch, self.share)]))
        if self.crops.is_cuda:
            draws = draws.pin_memory()  # otherwise the copy would wait for the device
        indices, rows, columns, mirrored = draws.to(self.crops.device, non_blocking=True)
        pixels = self.crops[indices, rows, columns]
        if self.flips:
            pixels = torch.where(mirrored.bool()[:, None, None, None], pixels.flip(2), pixels)
        return normalize(pixels, self.mean), self.labels[indices]
