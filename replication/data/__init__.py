"""The data sets by name: where each is found, and how it is loaded."""

import difflib
import re
from pathlib import Path

import numpy as np

from replication.data import cifar, imagenet
from replication.data.batches import Batches as Batches
from replication.data.batches import Dataset, Images, load_folder
from replication.engine import files

BUILT_IN = ("digits", "cifar10", "cifar100")
NAME = re.compile(r"[A-Za-z0-9](?:[._-]?[A-Za-z0-9])*")  # of a folder of images: no path, no two separators in a row


def is_imagenet(name):
    """Whether a data set of that name is made of photographs in ImageNet's layout, for the nets of Table 1."""
    return name.startswith("imagenet")


def load(name, root="data", progress=True):
    """The data set of that name: ``digits``, ``cifar10``, ``cifar100`` or a folder of images.

    A folder is laid out as ``<root>/<name>/{train,test}/<class>/*``, all images of one size.
    CIFAR is read in any of its official forms (``cifar.FORMS``), and downloaded into ``root`` if there is none; a
    folder is decoded once and cached in ``<root>/.cache``.
    A name that begins with ``imagenet`` is that of a folder ``{train,val}/<wnid>/*`` of photographs, in torchvision's
    layout of ImageNet; they stay in their files. ``imagenet-smoke`` is a small one, made on first use.
    Raises TypeError or ValueError naming what is wrong with the name or the files and what to do.
    """
    root = files.folder("data", root)
    check_name(name)
    if name == "digits":
        return _digits()
    if name in cifar.FORMS:
        classes, *parts = cifar.load(name, root)
        return Dataset(name, classes, *(Images(*part) for part in parts))
    if name == "imagenet-smoke" and not (root / name).is_dir():
        imagenet.make_smoke_test(root / name)
    if not (root / name).is_dir():
        raise ValueError(unknown(name, root))
    return imagenet.load(name, root, progress) if is_imagenet(name) else load_folder(name, root, progress)


def present(name, root="data"):
    """Whether a data set is here, so that ``load`` would download and make nothing."""
    root = Path(root)
    if name in cifar.FORMS:
        return cifar.find(name, root) is not None
    return name == "digits" or (root / name).is_dir()


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
    builtin = ("imagenet-smoke",) if is_imagenet(name) else BUILT_IN
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
