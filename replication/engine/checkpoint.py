"""Checkpoints, from which an unfinished run resumes: sealed by a checksum; the last two are kept."""

import io

import torch

from replication.engine import files

NAMES = ("checkpoint.pt", "checkpoint-before.pt")
# What must agree for a run to resume from a checkpoint, and what to do if it does not.
ORIGIN = {
    "fingerprint": "from other images than {dataset!r} now holds: bring these back",
    "run": "for another run: put it back where it was",
    "recipe": "with another recipe: bring this back",
    "version": "by another version of the code, whose results differ: go on with that",
}


def save(folder, origin, state):
    """Write a checkpoint of ``state``, a dict, for a run of that ``origin``, a dict with the keys of ``ORIGIN``.

    Raises OSError when it cannot be written; the existing ones are then untouched.
    """
    content = io.BytesIO()  # torch would hide why a file cannot be written
    torch.save({**origin, **state}, content)
    last, before = (folder / name for name in NAMES)
    files.write_sealed(last, content.getvalue(), before)


def load(folder, origin, names=()):
    """The newest undamaged checkpoint in a folder.

    Returns its state, a dict with at least these names, or None if there is no checkpoint; the paths of damaged ones;
    and sentences that tell the user about them.
    Raises ValueError for a checkpoint of another origin or of another version of the code.
    """
    damaged, notes = [], []
    for path in (folder / name for name in NAMES):
        try:
            state = files.load(io.BytesIO(files.read_sealed(path)))
            theirs, _ = {name: state[name] for name in ORIGIN}, [state[name] for name in names]
        except FileNotFoundError:
            continue
        except files.DamagedError as error:
            damaged.append(path)
            notes.append(str(error))
            continue
        except (ValueError, LookupError, TypeError) as error:
            words = f"is no checkpoint of this version of the code ({error}): remove {folder} to begin again"
            raise ValueError("; ".join([*notes, f"{path} {words}"])) from error
        for name, words in ORIGIN.items():
            if theirs[name] != origin[name]:
                words = words.format(dataset=origin["run"]["dataset"])
                raise ValueError("; ".join([*notes, f"{path} was made {words}, or remove {folder} to begin again"]))
        if damaged:
            notes.append(f"resumed from the previous checkpoint, of {state['iteration']:,} iterations")
        return state, damaged, notes
    if damaged:
        notes.append("no checkpoint was left to resume from: started again")
    return None, damaged, notes


def quarantine(paths):
    """Rename damaged checkpoints, so that they do not replace good ones."""
    for path in paths:
        path.replace(path.with_name(f"{path.stem}-damaged.pt"))


def remove(folder):
    """Remove all checkpoints of a run, which is finished."""
    for path in folder.glob("checkpoint*.pt"):
        path.unlink(missing_ok=True)
