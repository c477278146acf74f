"""The data sets, by name: digits, CIFAR, folders of small images, ImageNet, and those of detectors."""

import functools
import re

import numpy as np

from replication.data import cifar, detection, imagenet
from replication.data.batches import Batches as Batches
from replication.data.batches import Dataset, Images
from replication.data.folders import load_folder
from replication.engine import files
from replication.engine.checks import nearest

BUILT_IN = ("digits", "cifar10", "cifar100")
NAME = re.compile(r"[A-Za-z0-9](?:[._-]?[A-Za-z0-9])*")  # of a folder of images, not a path


def is_imagenet(name):
    """Whether a data set of that name has ImageNet's layout, and trains the nets of Table 1."""
    return name.startswith("imagenet")


def is_detection(name):
    """Whether a data set of that name is in the layout of PASCAL VOC or MS COCO, and trains detectors."""
    return name.partition("-")[0] in ("voc", "coco")


def load(name, root="data", progress=True):
    """Load a data set by name: a ``Dataset``; an ``ImageNet`` or a ``DetectionSet`` where ``is_imagenet`` or
    ``is_detection`` says so.

    ``digits``: scikit-learn's, no files needed. ``cifar10`` and ``cifar100``: in any of the official forms
    (``cifar.FORMS``), downloaded into ``root`` if none is there. Other names are those of folders:
    ``<root>/<name>/{train,test}/<class>/*`` with images of one size, decoded once and cached in ``<root>/.cache``; or,
    if the name begins with ``imagenet``, torchvision's layout ``{train,val}/<wnid>/*``, whose images are read from
    their files in every epoch. ``imagenet-smoke`` is a small folder of that kind, created on first use. ``voc``,
    ``coco``, and names that begin with ``voc-`` or ``coco-``: as ``detection.load`` has them.
    Classes are sorted by name, or by number if all names are numbers.
    ``progress``: show a bar while images are decoded, and say where sorting by number makes a difference.
    Raises TypeError or ValueError naming what is wrong with the name or the files, and the remedy.
    """
    root = files.folder("data", root)
    check_name(name)
    if name in BUILT_IN and (root / name).is_dir():
        forms = " or ".join(f"{form.folder}/" for form in cifar.FORMS.get(name, ()))
        raise ValueError(
            f"{root / name}: {name!r} is the built-in data set, rename or remove this folder. Your own images need "
            f"another name, such as 'my-{name}'" + (f"; the official files go to {root}, as {forms}" if forms else "")
        )
    if name == "digits":
        return _digits()
    if name in cifar.FORMS:
        classes, *parts = cifar.load(name, root)
        return Dataset(name, classes, *(Images(*part) for part in parts))
    if is_detection(name):
        return detection.load(name, root)
    if name == "imagenet-smoke" and not (root / name).is_dir():
        imagenet.make_smoke_test(root / name)
    if not (root / name).is_dir():
        raise ValueError(_unknown(name, root))
    dataset = imagenet.load(name, root, progress) if is_imagenet(name) else load_folder(name, root, progress)
    if progress and list(dataset.classes) != sorted(dataset.classes):
        _say(f"{root / name}: the classes are numbers and sorted as such: {', '.join(dataset.classes[:3])}, ...")
    return dataset


@functools.cache
def _say(line):
    """Print a line, once in a process however often the data set is loaded."""
    print(line, flush=True)


def present(name, root="data"):
    """Whether a data set is on this machine, so that ``load`` would neither download nor create it."""
    root = files.folder("data", root)
    if name == "voc":  # the only one without a folder of its own
        return (root / "VOCdevkit").is_dir()
    return name == "digits" or (root / name).is_dir() or (name in cifar.FORMS and cifar.find(name, root) is not None)


def check_name(name):
    """Raise TypeError or ValueError unless ``name`` can be the name of a data set."""
    text = isinstance(name, str)
    if not text or len(name) > 64 or NAME.fullmatch(name) is None:
        raise (ValueError if text else TypeError)(
            f"dataset {name!r}: choose {', '.join(BUILT_IN)} or the name of a folder of images, "
            "made of letters, digits and single '.', '_' or '-' between them, at most 64 characters"
        )


def _unknown(name, root):
    """The error message for a name without a folder: the choices, and where to put images."""
    parts = ("train", "val") if is_imagenet(name) else ("train", "test")
    folders = sorted(path.parent.name for path in root.glob("*/train") if NAME.fullmatch(path.parent.name))
    known = dict.fromkeys([*BUILT_IN, "imagenet-smoke", *folders])
    choices = [choice for choice in known if is_imagenet(choice) == is_imagenet(name)]
    places = " and ".join(f"{root / name}/{part}/<class>/" for part in parts)
    return f"dataset {name!r}: choose {', '.join(choices)}{nearest(name, choices)}, or put images into {places}"


def _digits():
    """scikit-learn's handwritten digits, 8x8: 1,437 for training and 360 for testing, stratified by class."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    grey = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # the original values run from 0 to 16
    pixels = np.repeat(grey[..., None], 3, axis=3)  # three equal channels, as the paper's nets expect
    train, test = train_test_split(np.arange(len(pixels)), test_size=360, stratify=digits.target, random_state=0)
    labels = digits.target.astype(np.int64)
    parts = (Images(pixels[part], labels[part]) for part in (train, test))
    return Dataset("digits", tuple(map(str, digits.target_names)), *parts)
