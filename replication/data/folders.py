"""Folders of images, ``<part>/<class>/*``: listing them, reading them into memory, and caching what was decoded."""

import hashlib
import io
import os
import stat
from collections import Counter

import numpy as np
from PIL import Image, TiffImagePlugin

from replication.data.batches import Dataset, Images
from replication.engine import files
from replication.engine.progress import progress_bar

CACHE_VERSION = 2  # part of every cache key: to be raised when images are decoded differently
JUNK = {  # that operating systems and storage servers leave in folders, in small letters; hidden files are skipped too
    *("thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "__macosx", "@eadir", "#recycle", "@recycle", "lost+found"),
    *("$recycle.bin", "system volume information"),
}
FAULTS_SHOWN = 10
READING_ERRORS = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)


def load_folder(name, root, progress):
    """The data set of small images in ``<root>/<name>/{train,test}/<class>/*``, decoded once and then cached.

    Raises ValueError listing what is wrong with the folder and its images.
    """
    folder, cache = root / name, root / ".cache" / f"{name}.npz"
    classes, listed, faults = list_images(folder, ("train", "test"), beside=False)
    key = hashlib.sha256(f"{CACHE_VERSION} {classes}".encode())
    for part, members in listed.items():
        for path, _, size, changed in members:
            key.update(os.fsencode(f"{name}/{part}/{path} {size} {changed}\n"))
    arrays = None if faults else read_cache(cache, key.hexdigest())
    if arrays is None:
        arrays = {}
        with progress_bar(sum(map(len, listed.values())), f"decoding {name}", "images", disable=not progress) as bar:
            for part, members in listed.items():
                arrays[f"{part}_pixels"], wrong = _decode(folder, [f"{part}/{path}" for path, *_ in members], bar)
                arrays[f"{part}_labels"] = np.array([label for _, label, *_ in members], dtype=np.int64)
                faults += wrong
        refuse(folder, faults)
        train, test = (_size(arrays[f"{part}_pixels"][0]) for part in listed)
        if train != test:
            raise ValueError(f"{folder}: train has images of {train}, test of {test}: resize one")
        try:
            write_cache(cache, key.hexdigest(), arrays)
        except OSError as error:
            print(f"{cache} cannot be written ({error.__cause__ or error}): the images will be decoded anew each time")
    return Dataset(name, classes, *(Images(arrays[f"{part}_pixels"], arrays[f"{part}_labels"]) for part in listed))


def _decode(folder, paths, bar):
    """The pixels (N, H, W, 3) of files, and in words which cannot be read or are of another size than most."""
    pixels, sizes, faults = None, {}, []
    for number, path in enumerate(paths):
        bar.update()
        try:
            with Image.open(folder / path) as image:
                decoded = np.asarray(to_rgb(image))
        except READING_ERRORS as error:
            faults.append(f"{path} cannot be read as an image ({error}): replace or remove it")
            continue
        sizes[path] = _size(decoded)
        if pixels is None:
            pixels = np.empty((len(paths), *decoded.shape), dtype=np.uint8)
        if decoded.shape == pixels.shape[1:]:
            pixels[number] = decoded
    for most, _ in Counter(sizes.values()).most_common(1):  # none where no file can be read
        like = next(path for path, size in sizes.items() if size == most)
        others = [f"{path} is {size}" for path, size in sizes.items() if size != most]
        faults += [f"{other}, {like} is {most}: resize it, all images must be of one size" for other in others]
    return pixels, faults


def refuse(folder, faults):
    """Raise ValueError if anything is wrong in a folder: the first of it by name, and how much more there is."""
    if faults:
        more = [f"and {len(faults) - FAULTS_SHOWN:,} more"] if len(faults) > FAULTS_SHOWN else []
        listed = [printable(fault) for fault in faults[:FAULTS_SHOWN]]
        raise ValueError("\n  ".join([f"{folder} cannot be used:", *listed, *more]))


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


def list_images(folder, parts, beside=True):
    """The classes of a folder of images, for each part its files as (path below the part, label, size, mtime), faults.

    Faults are what is wrong, in words: fewer than two classes, parts that differ in these, classes that are empty or
    hold more than files, and, unless they may be there, files ``beside`` the class folders.
    Classes are sorted by name, and by number if all names are numbers: weights of others are right by number.
    Raises ValueError for a part that is missing.
    """
    names, faults = {}, []  # {part: {class: [(file, size, mtime), ...]}}
    for part in parts:
        if not (folder / part).is_dir():
            raise ValueError(f"{folder} has no folder {part}/: put its images into {folder / part}/<class>/")
        names[part] = {}
        for name, mode, *_ in visible(folder / part):
            if stat.S_ISDIR(mode):
                members = visible(folder / part / name)
                if not members:
                    faults.append(f"class {part}/{name} is empty: put images into it or remove it")
                others = [f"{part}/{name}/{file}" for file, mode, *_ in members if not stat.S_ISREG(mode)]
                faults += [f"{path} is no file: move its images up and remove it" for path in others]
                names[part][name] = [(file, *rest) for file, mode, *rest in members if stat.S_ISREG(mode)]
            elif not beside:
                faults.append(f"{part}/{name} lies beside the class folders: move it into one or remove it")
        if all(map(str.isdecimal, names[part])):
            names[part] = dict(sorted(names[part].items(), key=lambda item: int(item[0])))
    first, last = parts[0], parts[-1]
    classes, others = tuple(names[first]), tuple(names[last])
    if classes != others:
        faults.append(
            f"{first} and {last} must have the same classes, but only {first} has "
            f"{[name for name in classes if name not in others]} and only {last} has "
            f"{[name for name in others if name not in classes]}: add or remove these folders"
        )
    if len(classes) < 2:
        faults.append(f"{first} holds {len(classes)} class folders: at least 2 are needed")
    listed = {part: [] for part in parts}
    for part in parts:
        for label, name in enumerate(classes):
            members = names[part].get(name, ())
            listed[part] += [(f"{name}/{file}", label, size, changed) for file, size, changed in members]
    return classes, listed, faults


def visible(folder):
    """(name, mode, size, mtime) of what is in a folder and neither hidden nor junk, sorted by name."""
    rows = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(".") or entry.name.lower() in JUNK:
                continue
            try:
                status = entry.stat()
                rows.append((entry.name, status.st_mode, status.st_size, status.st_mtime_ns))
            except OSError:  # a dangling link: listed as a file, so that reading it reports it
                rows.append((entry.name, stat.S_IFREG, -1, 0))
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
