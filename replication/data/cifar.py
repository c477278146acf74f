"""CIFAR-10 and CIFAR-100 (section 4.2) in their official forms: python or binary version, unpacked or archived."""

import hashlib
import pickle
import tarfile
import zlib
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np

from replication.engine import files

CLASSES = {
    "cifar10": "airplane automobile bird cat deer dog frog horse ship truck",
    "cifar100": """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can
    castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin
    elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster
    man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck
    pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk
    skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger
    tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm
    """,
}
VALUES = 3 * 32 * 32  # per image: 1,024 red, then 1,024 green, then 1,024 blue values, each row by row


def _pickled(content):
    """Pixels ``(N, 3072)`` and labels of a file of the python version. Unpickling is safe once its checksum matches."""
    values = pickle.loads(content, encoding="latin1")
    return values["data"], values["labels" if "labels" in values else "fine_labels"]


def _rows(content, labels):
    """Pixels ``(N, 3072)`` and labels of a file of the binary version: each row has one or two labels, then the pixels.

    CIFAR-100 has a coarse and a fine label; nets are trained on the fine one, which comes last.
    """
    rows = np.frombuffer(content, np.uint8).reshape(-1, labels + VALUES)
    return rows[:, labels:], rows[:, labels - 1]


class Form(NamedTuple):
    """One version of a data set: its folder and archive, the checksum of each file, and the function that decodes it.

    Files are in order: those of the training part first, that of the test part last.
    """

    folder: str
    archive: str
    algorithm: str
    checksums: dict
    decode: Callable


FORMS = {
    "cifar10": (
        Form(
            "cifar-10-batches-py",
            "cifar-10-python.tar.gz",
            "md5",
            {
                "data_batch_1": "c99cafc152244af753f735de768cd75f",
                "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
                "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
                "data_batch_4": "634d18415352ddfa80567beed471001a",
                "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
                "test_batch": "40351d587109b95175f43aff81a1287e",
            },
            _pickled,
        ),
        Form(
            "cifar-10-batches-bin",
            "cifar-10-binary.tar.gz",
            "sha1",
            {
                "data_batch_1.bin": "aadd24acce27caa71bf4b10992e9e7b2d74c2540",
                "data_batch_2.bin": "c0ba65cce70568cd57b4e03e9ac8d2a5367c1795",
                "data_batch_3.bin": "1dd00a74ab1d17a6e7d73e185b69dbf31242f295",
                "data_batch_4.bin": "aab85764eb3584312d3c7f65fd2fd016e36a258e",
                "data_batch_5.bin": "26e2849e66a845b7f1e4614ae70f4889ae604628",
                "test_batch.bin": "67eb016db431130d61cd03c7ad570b013799c88c",
            },
            partial(_rows, labels=1),
        ),
    ),
    "cifar100": (
        Form(
            "cifar-100-python",
            "cifar-100-python.tar.gz",
            "md5",
            {"train": "16019d7e3df5f24257cddd939b257f8d", "test": "f0ef6b0ae62326f3e7ffdfab6717acfc"},
            _pickled,
        ),
        Form(
            "cifar-100-binary",
            "cifar-100-binary.tar.gz",
            "sha1",
            {
                "train.bin": "e207cd2e05b73b1393c74c7f5e7bea451d63e08e",
                "test.bin": "8fb6623e830365ff53cf14adec797474f5478006",
            },
            partial(_rows, labels=2),
        ),
    ),
}


def find(name, root):
    """The form in which a data set lies in ``root``, and its path; unpacked forms first. None if there is none."""
    for kind in ("folder", "archive"):
        for form in FORMS[name]:
            path = root / getattr(form, kind)
            if path.exists():
                return form, path
    return None


def load(name, root):
    """The classes of ``cifar10`` or ``cifar100``, then training and test part: pixels (N, 32, 32, 3) and labels (N,).

    All forms give the same arrays. If there is none in ``root``, the python version's archive is downloaded.
    Raises ValueError naming a file that is missing or not as published, or, if the download fails, where to put files.
    """
    if find(name, root) is None:
        _download(name, root)
    form, path = find(name, root)
    try:
        contents = _read(path, form)
    except (tarfile.TarError, zlib.error, EOFError, OSError) as error:
        raise _wrong(path, f"{path} is damaged or not complete ({error})") from error
    for file, expected in form.checksums.items():
        content, place = contents.get(file), path / file if path.is_dir() else f"{form.folder}/{file} in {path}"
        if content is None:
            raise _wrong(path, f"{place} is missing")
        actual = hashlib.new(form.algorithm, content, usedforsecurity=False).hexdigest()
        if actual != expected:
            what = f"its {len(content):,} bytes have the {form.algorithm} sum {actual}, not {expected}"
            raise _wrong(path, f"{place} is not as published: {what}")
    *train, test = (form.decode(contents[file]) for file in form.checksums)
    return tuple(CLASSES[name].split()), _joined(train), _joined([test])


def _joined(decoded):
    """The content of several files as pixels (N, 32, 32, 3) and labels (N,)."""
    pixels, labels = (np.concatenate(part) for part in zip(*decoded, strict=True))
    pixels = np.ascontiguousarray(pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    return pixels, labels.astype(np.int64)


def _wrong(path, words):
    what = "the published file" if path.is_dir() else "the published archive"
    return ValueError(
        f"{words}. Put {what} there, or remove {path}: then another official form is read, or one is downloaded"
    )


def _read(path, form):
    """The files that are there of a form, by name; an archive is read without unpacking it to the disk."""
    if path.is_dir():
        return {file: (path / file).read_bytes() for file in form.checksums if (path / file).is_file()}
    wanted, contents = {f"{form.folder}/{file}": file for file in form.checksums}, {}
    with tarfile.open(path, "r:gz") as archive:
        for member in archive:
            file = wanted.get(member.name.removeprefix("./"))
            if file is not None and member.isfile():
                contents[file] = archive.extractfile(member).read()
    return contents


def _download(name, root):
    from torchvision import datasets  # takes a second to import

    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    cache = root / ".cache"
    try:
        with files.locked(cache / f"{name}.lock", f"{name} is being downloaded"):
            if find(name, root) is None:  # otherwise another process was faster
                datasets.utils.download_url(kind.url, cache, kind.filename, kind.tgz_md5)
                (cache / kind.filename).replace(root / kind.filename)
    except (OSError, RuntimeError) as error:
        folders = " or ".join(f"{form.folder}/" for form in FORMS[name])
        archives = " or ".join(form.archive for form in FORMS[name])
        raise ValueError(
            f"dataset {name!r} is not in {root} and could not be downloaded ({error}): put one of its official forms "
            f"into {root}, unpacked ({folders}) or as the archive ({archives}, from {kind.url.rpartition('/')[0]}/), "
            "or choose 'digits' or a folder of images"
        ) from error
