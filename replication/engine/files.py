"""Files that are never half written, never trusted when damaged, and never written by two processes at once."""

import contextlib
import errno
import hashlib
import io
import itertools
import json
import os
import pickle
import re
import shutil
import socket
import string
import time
import uuid
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

import torch
from filelock import FileLock, SoftFileLock, Timeout
from safetensors.torch import load as load_bytes
from safetensors.torch import load_file

ABANDONED = 3600  # seconds after which a part of a file must be that of a killed process
POLL_SECONDS = 0.2
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP}  # as on some network file systems


class DamagedError(ValueError):
    """A file is not as it was written: cut off, altered, or missing."""


def _places():
    """Where the repository may be: around this package, above the current folder, where pip installed it from."""
    yield INSTALLED
    above = []
    with contextlib.suppress(FileNotFoundError):  # the current folder may have been removed
        above = [Path.cwd(), *Path.cwd().parents]
    yield from above
    for origin in INSTALLED.glob("replication-*.dist-info/direct_url.json"):
        yield Path(url2pathname(urlsplit(json.loads(origin.read_text())["url"]).path))


def _is_repository(folder):
    return (folder / "notebooks").is_dir() and (folder / "replication" / "models.py").is_file()


INSTALLED = Path(__file__).parents[2]  # the folder of this package
SOURCE = next(filter(_is_repository, _places()), INSTALLED)  # the repository: once, wherever the process goes later


def root():
    """The folder that relative paths start from: the repository, or the current folder where there is none."""
    return SOURCE if (SOURCE / "notebooks").is_dir() else Path.cwd()


def expanded(field, value):
    """A path as text, with ``~`` and environment variables, such as ``$HOME``, replaced.

    An absolute ``Path`` is taken as it is: it may be one of ours, with a "$" in the name of a folder.
    Raises TypeError or ValueError, naming the field, for what is no path or an empty one, and for a user or variable
    that there is not.
    """
    if not isinstance(value, str | os.PathLike) or not isinstance(os.fspath(value), str):
        raise TypeError(f"{field} {value!r}: give a path, such as '{field}'")
    text = os.fspath(value)
    if not text.strip() or not text.isprintable():
        raise ValueError(f"{field} {value!r}: give a path in printable characters, such as '{field}'")
    if isinstance(value, Path) and value.is_absolute():
        return text
    try:  # an empty variable is as good as none: "$EMPTY/results" would be a folder of the root
        text = string.Template(text).substitute({name: value for name, value in os.environ.items() if value})
    except (KeyError, ValueError) as error:
        missing = f"variable {error.args[0]}" if isinstance(error, KeyError) else "name after $"
        raise ValueError(f"{field} {value!r}: the environment has no {missing}, set it or write the path out") from None
    text = os.path.expanduser(text)
    if text.startswith("~"):
        raise ValueError(f"{field} {value!r}: there is no such user, write ~/ for your own folder or ./~ for a name")
    return text


def folder(field, value):
    """The absolute path of a folder, which need not be there yet; a relative one starts from the repository.

    Raises TypeError or ValueError, naming the field, as ``expanded`` does, and for what cannot be a folder: a path that
    the file system refuses, or that leads to or through a file.
    """
    text = expanded(field, value)
    path = root() / text
    try:
        path.lstat()
    except FileNotFoundError:
        return path
    except OSError as error:
        raise ValueError(f"{field} {text[:40]!r}: this cannot be a folder ({error.strerror})") from error
    if not path.is_dir():
        raise ValueError(f"{field} {value!r}: {path} is a file, give the path of a folder")
    return path


def write(path, content, before=None):
    """Write text, bytes, or what ``content(file)`` writes to a binary file; ``path`` is old or new, never in between.

    before: the path that the old file is moved to.
    Raises OSError saying what cannot be written and that the old file is untouched.
    """
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        with part.open("wb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        if before is not None and path.exists():
            path.replace(before)
        part.replace(path)
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def fill(path, blocks):
    """Put texts, {name: text}, between their marks in a Markdown file, ``<!-- name -->`` and ``<!-- /name -->``.

    Raises ValueError, and writes nothing, where one has no marks.
    """
    text = path.read_text("utf-8")
    for name, content in blocks.items():
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        if not 0 <= text.find(begin) < text.find(end):
            raise ValueError(f"{path} has no place for the {name}: mark one by {begin} and {end}")
        before, after = text.partition(begin)[0], text.partition(end)[2]
        text = f"{before}{begin}\n\n{content}\n\n{end}{after}"
    write(path, text)


@contextlib.contextmanager
def new_folder(folder):
    """A folder to fill in the block, which takes its place at the end, unless another process was faster."""
    temporary = folder.with_name(f"{folder.name}.{os.getpid()}.part")
    yield temporary
    try:
        temporary.rename(folder)
    except OSError:
        shutil.rmtree(temporary)
        if not folder.is_dir():
            raise


def _unwritable(path, error):
    remedy = "Free some space, or choose" if error.errno in FULL else "Choose"
    return OSError(
        error.errno,
        f"{path} cannot be written ({error.strerror or error}); what was there is untouched. {remedy} a folder that "
        "can be written to, and start again: what is finished is kept",
    )


def remove_parts(folder, name="*", age=0):
    """Remove half-written files of that name that killed processes left there, once they are ``age`` seconds old."""
    for part in folder.glob(f"{name}.*.part"):
        with contextlib.suppress(OSError):  # another process may be as quick
            if time.time() - part.stat().st_mtime >= age:
                part.unlink()


def digest(content):
    """SHA-256 as 64 hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def read(path):
    """The bytes of a file. Raises DamagedError when the disk can no longer read them, OSError for other causes."""
    try:
        return path.read_bytes()
    except OSError as error:
        if error.errno == errno.EIO:
            raise DamagedError(f"{path} is damaged: {error.strerror}") from error
        raise


def write_sealed(path, content, before=None):
    """Write bytes and their SHA-256, as ``write`` does."""
    write(path, content + hashlib.sha256(content).digest(), before)


def read_sealed(path):
    """The bytes that ``write_sealed`` wrote. Raises DamagedError for any others, FileNotFoundError for no file."""
    content = memoryview(read(path))
    size = hashlib.sha256().digest_size
    if len(content) < size or hashlib.sha256(content[:-size]).digest() != content[-size:]:
        raise DamagedError(f"{path} is damaged: its checksum is wrong")
    return content[:-size]


class Ignored:
    """Stands for what ``load`` does not read: numpy's numbers and arrays, and argparse's options."""

    def __init__(self, *_):
        pass

    def __setstate__(self, _):
        pass


IGNORED = [
    "argparse.Namespace",
    *("numpy.dtype", "numpy.ndarray"),
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
]


def load(file, content=None):
    """What ``torch.save`` wrote: tensors (put on the CPU), numbers, strings, lists and dicts. Executes no code.

    What is of a class in ``IGNORED`` becomes an ``Ignored``, which torch calls in its place. A path that ends in
    ``.safetensors`` is read as such, and never unpickled. content: the file's, where it was read already.
    Raises FileNotFoundError, MemoryError or torch.OutOfMemoryError, and ValueError for any other failure.
    """
    try:
        if str(file).lower().endswith(".safetensors"):
            return load_file(file) if content is None else load_bytes(content)
        with torch.serialization.safe_globals([(Ignored, name) for name in IGNORED]):
            return torch.load(file if content is None else io.BytesIO(content), map_location="cpu", weights_only=True)
    except (FileNotFoundError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever torch makes of a file that is damaged, hostile or something else
        reason = f"{type(error).__name__}: {error}".partition("\n")[0].partition(". ")[0]
        if isinstance(error, pickle.UnpicklingError):  # torch's message advises to load it all the same
            name = re.search(r"GLOBAL (\S+)", str(error))
            reason = f"it holds {name[1]} beside tensors, numbers and texts" if name else "torch cannot read it"
        raise ValueError(reason) from error


def acquire(path):
    """Take the lock of that name, a file; None while another process or thread holds it. The caller releases it.

    The operating system releases the lock of a process that dies. The file stays and names its last holder.
    On a file system without locks a marker file beside it is the lock; that of a dead process of this machine is taken
    over.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock = FileLock(path, fallback_to_soft=False)
            lock.acquire(timeout=0)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            lock = SoftFileLock(_marker(path))  # its text, the owner, is filelock's
            lock.acquire(timeout=0)
    except Timeout:
        return None
    except OSError as error:
        raise _unwritable(path, error) from error
    with contextlib.suppress(OSError):  # only shown to those who wait
        path.write_text(f"process {os.getpid()} on {socket.gethostname()}\n")
    return lock


def _marker(path):
    return path.with_name(f"{path.name}.held")


@contextlib.contextmanager
def locked(path, words):
    """Hold the lock of that name; while another process or thread does, wait, and say so after ``words``."""
    for attempt in itertools.count():
        lock = acquire(path)
        if lock is not None:
            break
        if attempt == 1:  # at first another process may only have tried it
            print(waiting(path, words), flush=True)
        time.sleep(POLL_SECONDS)
    try:
        yield
    finally:
        lock.release()


def waiting(path, words):
    """The line for those who wait for a lock."""
    try:
        holder = path.read_text().strip()
    except OSError:
        holder = ""
    marker = _marker(path)
    remedy = f" If it is gone, remove {marker}." if marker.exists() else ""  # it may have died on another machine
    return f"{words} by {holder or 'another process'}: waiting for it.{remedy}"
