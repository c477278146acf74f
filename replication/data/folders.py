"""Folders of images, ``<part>/<class>/*``: listing them, reading them into memory, and caching what was decoded."""

import hashlib
import io
import os

import numpy as np
from PIL import Image, TiffImagePlugin

from replication.data.batches import Dataset, Images
from replication.engine import files
from replication.engine.progress import progress_bar

CACHE_VERSION = 2  # part of every cache key: to be raised when images are decoded differently
READING_ERRORS = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)


def load_folder(name, root, progress):
    """The data set of small images in ``<root>/<name>/{train,test}/<class>/*``, decoded once and then cached.

    Raises ValueError naming what is wrong with the folder or its images.
    """
    folder, cache = root / name, root / ".cache" / f"{name}.npz"
    classes, listed = list_images(folder, ("train", "test"))
    key = hashlib.sha256(f"{CACHE_VERSION} {classes}".encode())
    for part, members in listed.items():
        for path, _, size, changed in members:
            key.update(os.fsencode(f"{name}/{part}/{path} {size} {changed}\n"))
    arrays = read_cache(cache, key.hexdigest())
    if arrays is None:
        arrays = {}
        with progress_bar(sum(map(len, listed.values())), f"decoding {name}", "images", disable=not progress) as bar:
            for part, members in listed.items():
                arrays[f"{part}_pixels"] = _decode([folder / part / path for path, *_ in members], bar)
                arrays[f"{part}_labels"] = np.array([label for _, label, *_ in members], dtype=np.int64)
        train, test = (_size(arrays[f"{part}_pixels"][0]) for part in listed)
        if train != test:
            raise ValueError(f"{folder}: train has images of {train}, test of {test}: resize one")
        try:
            write_cache(cache, key.hexdigest(), arrays)
        except OSError as error:
            print(f"{cache} cannot be written ({error.__cause__ or error}): the images will be decoded anew each time")
    return Dataset(name, classes, *(Images(arrays[f"{part}_pixels"], arrays[f"{part}_labels"]) for part in listed))


def _decode(paths, bar):
    """The pixels (N, H, W, 3) of files that must be of one size."""
    pixels = None
    for number, path in enumerate(paths):
        try:
            with Image.open(path) as image:
                decoded = np.asarray(to_rgb(image))
        except READING_ERRORS as error:
            raise ValueError(f"{path} cannot be read as an image ({error}): replace or remove it") from error
        if pixels is None:
            pixels = np.empty((len(paths), *decoded.shape), dtype=np.uint8)
        if decoded.shape != pixels.shape[1:]:
            sizes = f"{path} is {_size(decoded)}, {paths[0]} is {_size(pixels[0])}"
            raise ValueError(f"{sizes}: resize them, all images must be of one size")
        pixels[number] = decoded
        bar.update()
    return pixels


def printable(text):
    """A text as one line that can be printed and written as UTF-8: other characters are escaped."""
    return repr(text)[1:-1]


def _size(image):
    """Width and height of pixels (H, W, 3), for error messages."""
    return f"{image.shape[1]}x{image.shape[0]}"


def to_rgb(image):
    """An open image in RGB with 8 bits a channel, without its transparency; 16 bits of grey are scaled and rounded.

    Raises ValueError for values whose range is not known: signed, of 32 bits, or floating-point.
    """
    mode, tags = image.mode, image.tag_v2 if image.format == "TIFF" else {}
    deep = (mode, image.format) == ("I", "PPM") or (mode[:4] == "I;16" and image.format in ("JPEG2000", "PNG", "TIFF"))
    if (mode[0] in "IF" and not deep) or set(tags.get(TiffImagePlugin.SAMPLEFORMAT, (1,))) != {1}:
        raise ValueError(
            f"mode {mode} of {image.format} has no known range of values: save it in 8 or 16 unsigned bits"
        )
    if deep:
        values = np.asarray(image) / (2 ** tags.get(TiffImagePlugin.BITSPERSAMPLE, (16,))[0] - 1)
        if tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0:  # white is zero
            values = 1 - values
        image = Image.fromarray(np.rint(255 * values).astype(np.uint8))
    image.load()
    image.info.pop("transparency", None)  # Pillow would warn that RGB has none
    return image.convert("RGB")


def list_images(folder, parts):
    """The classes of a folder of images, and for each part its files as (path below the part, label, size, mtime).

    Classes are sorted by name, and by number if all names are numbers: weights of others are right by number.
    Raises ValueError for a part that is missing, an empty class, fewer than two classes, or parts that differ in these.
    """
    names = {}  # {part: {class: [(file, size, mtime), ...]}}
    for part in parts:
        if not (folder / part).is_dir():
            raise ValueError(f"{folder} has no folder {part}/: put its images into {folder / part}/<class>/")
        names[part] = {name: visible(folder / part / name) for name, *_ in visible(folder / part, folders=True)}
        if all(map(str.isdecimal, names[part])):
            names[part] = dict(sorted(names[part].items(), key=lambda item: int(item[0])))
        for name, members in names[part].items():
            if not members:
                raise ValueError(f"class {folder / part / name} is empty: put images into it or remove it")
    first, last = parts[0], parts[-1]
    classes, others = tuple(names[first]), tuple(names[last])
    if classes != others:
        raise ValueError(
            f"{folder}: {first} and {last} must have the same classes, but only {first} has "
            f"{[name for name in classes if name not in others]} and only {last} has "
            f"{[name for name in others if name not in classes]}: add or remove these folders"
        )
    if len(classes) < 2:
        raise ValueError(f"{folder / first} holds {len(classes)} class folders: at least 2 are needed")
    listed = {part: [] for part in parts}
    for part in parts:
        for label, name in enumerate(classes):
            listed[part] += [(f"{name}/{file}", label, size, changed) for file, size, changed in names[part][name]]
    return classes, listed


def visible(folder, folders=False):
    """(name, size, mtime) of the files, or only of the folders, that are not hidden, sorted by name."""
    rows = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(".") or (folders and not entry.is_dir()):
                continue
            try:
                status = entry.stat()
                rows.append((entry.name, status.st_size, status.st_mtime_ns))
            except OSError:  # a dangling link: listed all the same, so that reading it reports it
                rows.append((entry.name, -1, 0))
    return sorted(rows)


def read_cache(path, key):
    """The arrays cached under that key; None if there are none, or if the files have changed since."""
    try:
        with np.load(io.BytesIO(files.read_sealed(path)), allow_pickle=False) as stored:
            if str(stored["key"]) == key:
                return {name: stored[name] for name in stored.files if name != "key"}
    except FileNotFoundError:
        return None
    except Exception as error:  # numpy raises many kinds for a file that holds something else
        print(f"{error if isinstance(error, files.DamagedError) else f'{path}: {error}'}: decoding the images again")
    return None


def write_cache(path, key, arrays):
    """Cache arrays, {name: array}, under a key. Raises OSError if the file cannot be written."""
    path.parent.mkdir(exist_ok=True)
    files.remove_parts(path.parent, path.name, files.ABANDONED)
    content = io.BytesIO()
    np.savez(content, key=np.array(key), **arrays)
    files.write_sealed(path, content.getvalue())
