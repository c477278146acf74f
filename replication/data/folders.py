"""Folders of images, one below it for each class: what is listed in them, and what of them is cached."""

import io
import os

import numpy as np
from PIL import Image

from replication.engine import files

VERSION = 1  # of the decoding: part of the key of what is cached
READING_ERRORS = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)


def listing(folder, parts):
    """The classes of a folder of images, and the files of each part: (path below it, label, size, time of change)."""
    found = {}
    for part in parts:
        if not (folder / part).is_dir():
            raise ValueError(f"{folder} has no folder {part}/: put its images into {folder / part}/<class>/")
        found[part] = {name: visible(folder / part / name) for name, *_ in visible(folder / part, folders=True)}
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


def visible(folder, folders=False):
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


def read_cache(path, key):
    """The arrays cached under that key; None when there are none or the files have changed since."""
    try:
        with np.load(io.BytesIO(files.read_sealed(path)), allow_pickle=False) as stored:
            if str(stored["key"]) == key:
                return {name: stored[name] for name in stored.files if name != "key"}
    except FileNotFoundError:
        return None
    except Exception as error:  # whatever numpy makes of a file that holds something else
        print(f"{error if isinstance(error, files.DamagedError) else f'{path}: {error}'}: decoding the images again")
    return None


def write_cache(path, key, arrays):
    path.parent.mkdir(exist_ok=True)
    files.remove_parts(path.parent, path.name, files.ABANDONED)
    content = io.BytesIO()
    np.savez(content, key=np.array(key), **arrays)
    files.write_sealed(path, content.getvalue())
