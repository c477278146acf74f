"""Files that are never half written, never trusted once damaged, and never written by two processes at once."""

import contextlib
import errno
import hashlib
import os
import pickle
import socket
import time
import uuid
from pathlib import Path

import torch
from filelock import FileLock, Timeout

ABANDONED = 3600  # seconds after which a part of a file is taken to be that of a process that was killed
LONGEST = 200  # bytes of one name in a path: the names of what is written below have room within the usual 255
POLL_SECONDS = 0.2


class DamagedError(ValueError):
    """A file is not as it was written: cut off, altered, or missing where it must be."""


def folder(field, value):
    """``value`` as the path of a folder, which need not be there yet.

    Raises TypeError or ValueError, naming the field, for what cannot be one: no path, an empty or too long one, one
    with characters that no name may have, or one that leads to or through a file.
    """
    if not isinstance(value, str | os.PathLike):
        raise TypeError(f"{field} {value!r}: give the path of a folder, such as '{field}'")
    text = os.fspath(value)
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{field} {value!r}: give the path of a folder, such as '{field}'")
    if not text.isprintable():
        raise ValueError(f"{field} {value!r}: choose a path of printable characters")
    path = Path(text)
    try:
        longest = max(len(os.fsencode(name)) for name in ("", *path.parts))
    except UnicodeEncodeError as error:
        raise ValueError(f"{field} {value!r}: this is no path on this machine ({error})") from error
    if longest > LONGEST or len(os.fsencode(text)) > 3000:
        raise ValueError(f"{field} {text[:40]!r}...: choose a shorter path, with names of up to {LONGEST} bytes")
    for place in (path, *path.parents):
        if place.exists() and not place.is_dir():
            raise ValueError(f"{field} {value!r}: {place} is a file, give the path of a folder")
    return path


def write(path, content, before=None):
    """Write text, bytes, or what ``content(file)`` writes to a binary file: ``path`` is old or new, never in between.

    before: where what ``path`` held until now is moved to.
    Raises OSError saying what cannot be written and that the old content is as it was.
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


def _unwritable(path, error):
    return OSError(
        error.errno,
        f"{path} cannot be written ({error.strerror or error}); what was there is untouched. Free some space, or "
        "choose a folder that can be written to, and start again: what is finished is not done anew",
    )


def remove_parts(folder, name="*", age=0):
    """Remove what killed processes left half written there, of files of that name, when it is so many seconds old."""
    for part in folder.glob(f"{name}.*.part"):
        with contextlib.suppress(OSError):  # another process may be as quick
            if time.time() - part.stat().st_mtime >= age:
                part.unlink()


def digest(content):
    """SHA-256 as 64 hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def read(path):
    """The bytes of a file. Raises DamagedError where the disk cannot read them any more, OSError for other causes."""
    try:
        return path.read_bytes()
    except OSError as error:
        if error.errno == errno.EIO:
            raise DamagedError(f"{path} is damaged: {error.strerror}") from error
        raise


def write_sealed(path, content, before=None):
    """Write bytes with their SHA-256 behind them, as ``write`` does."""
    write(path, content + hashlib.sha256(content).digest(), before)


def read_sealed(path):
    """The bytes that ``write_sealed`` wrote. Raises DamagedError for any others, FileNotFoundError for no file."""
    content = memoryview(read(path))
    size = hashlib.sha256().digest_size
    if len(content) < size or hashlib.sha256(content[:-size]).digest() != content[-size:]:
        raise DamagedError(f"{path} is damaged: its checksum is wrong")
    return content[:-size]


def load(file):
    """What ``torch.save`` wrote, tensors on the CPU, numbers, texts, lists and dicts; no code of the file is executed.

    Raises FileNotFoundError, MemoryError or torch's, and ValueError for anything else.
    """
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except (FileNotFoundError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever torch makes of a file that is damaged, hostile or something else
        said = f"{type(error).__name__}: {error}".partition("\n")[0]
        if isinstance(error, pickle.UnpicklingError):  # torch would advise to load it all the same
            said = "it holds more than tensors, numbers and texts"
        raise ValueError(said) from error


def acquire(path):
    """The lock of that name, a file, to be released; None while another process or thread holds it.

    The operating system takes it from a process that dies. The file stays: it says who was the last to hold it.
    """
    lock = FileLock(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        return None
    except OSError as error:
        raise _unwritable(path, error) from error
    with contextlib.suppress(OSError):  # it is for the words of others alone
        path.write_text(f"{os.getpid()} {os.getppid()} {socket.gethostname()}\n")
    return lock


@contextlib.contextmanager
def locked(path, words):
    """Hold the lock of that name; if another process or thread does, say so in ``words`` and wait for it."""
    lock = acquire(path)
    if lock is None:
        time.sleep(POLL_SECONDS)  # somebody may just have looked at it
        lock = acquire(path)
    if lock is None:
        print(waiting(path, words), flush=True)
    while lock is None:
        time.sleep(POLL_SECONDS)
        lock = acquire(path)
    try:
        yield
    finally:
        lock.release()


def waiting(path, words):
    """What is said of a lock that is waited for."""
    return f"{words} by {_read_holder(path)[1]}: waiting for it."


def held_elsewhere(path):
    """Who holds a lock, in words, if it is neither this process nor one that it started; else None."""
    ours, words = _read_holder(path)
    if ours or not path.exists():
        return None
    try:
        with FileLock(path).acquire(timeout=0):
            return None
    except Timeout:
        return words


def _read_holder(path):
    try:
        process, parent, host = path.read_text().split()
    except (OSError, ValueError):
        return False, "another process"
    ours = host == socket.gethostname() and str(os.getpid()) in (process, parent)
    return ours, f"process {process} on {host}"
