"""The record that a run leaves in ``results/runs/<run id>/``: training writes it, reports read it."""

import collections
import io
import itertools
import json
import tempfile
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path

import pandas as pd

from replication.engine import checkpoint, files
from replication.engine.checks import nearest
from replication.engine.files import DamagedError
from replication.measure import SIGNALS
from replication.recipes import RECIPES, own_recipe
from replication.runs import RETIRED, SPELLED, Run

# Of the code that results depend on: raised with every change to nets, recipes, batches or training that changes
# results by more than rounding. Records and checkpoints of another version are not results of this code.
VERSION = 1
# The records that come with this repository; None for a package installed without it.
PUBLISHED = files.SOURCE / "results" / "published" if (files.SOURCE / "results" / "published").is_dir() else None
NEEDED = ("run.json", "environment.json", "history.csv", "summary.json")
SUMS = "SHA256SUMS"  # checksums of a record's files, as ``sha256sum --check`` reads them
WEIGHTS = "weights.safetensors"  # of a published record, as ``hub.publish`` writes them
SHOWN = 100  # test images whose detections are in the record of a detector, to look at
# What must be equal for errors to be comparable; the images themselves by their fingerprint.
CONDITIONS = ("dataset", "fingerprint", "recipe", "iterations", "precision", "holdout", "bn_batch", "weights")
COLUMNS = ("iteration", "lr", "train_error", "train_loss", "test_error", "test_loss", "seconds")


@dataclass(frozen=True, eq=False)
class Record:
    """What a finished run left; its tables are read when first used.

    summary: final errors (percent), sizes and times (seconds) as a dict; errors of a diverged run are None.
    history: a DataFrame with ``COLUMNS``, one row a recording.
    layers: a DataFrame of ``measure.signals`` at some iterations, from 0 to the last, one row for each weighted layer.
    predictions: a DataFrame of the labels and predicted classes of all test images at the end; empty where some
        images could not be read.
    detections: a DataFrame of what a detector finds in the first test images, boxes in pixels; of other nets empty.
    environment: versions, device, threads and commit as a dict.
    fingerprint: of the data set.
    """

    run: Run
    folder: Path
    fingerprint: str
    summary: dict

    @property
    def net(self):
        """The net's name in tables and figures: one that was not warmed up, or not trained on ImageNet, is a row."""
        name = self.run.name.label
        if self.run.detects and self.run.weights is None:
            return f"{name} from scratch"
        return name if self.run.warmup else f"{name} without warm-up"

    @cached_property
    def environment(self):
        return json.loads((self.folder / "environment.json").read_bytes())

    @property
    def begun(self):
        """The environment in which its first iterations were computed, before it was perhaps resumed in another."""
        return self.environment | self.environment.get("begun", {})

    @property
    def hardware(self):
        """What it was trained on: the GPU, or the processor and its threads; both parts of a run that changed these."""
        parts = [_hardware(environment) for environment in (self.begun, self.environment)]
        return ", then ".join(dict.fromkeys(parts))

    @cached_property
    def history(self):
        return pd.read_csv(self.folder / "history.csv")

    @cached_property
    def layers(self):
        return self._read("layers.csv", ("iteration", "layer", "name", "kind", *SIGNALS))

    @cached_property
    def predictions(self):
        return self._read("predictions.csv", ("label", "predicted"))

    @cached_property
    def detections(self):
        return self._read("detections.csv", ("image", "label", "score", "left", "top", "right", "bottom"))

    def _read(self, name, columns):
        """The table in a file that not all records have."""
        path = self.folder / name
        return pd.read_csv(path, dtype={"name": str}) if path.exists() else pd.DataFrame(columns=columns)

    @property
    def diverged(self):
        """The iteration after which the loss was no longer finite; None for a run that reached its end."""
        return self.summary.get("diverged")

    @property
    def evaluation(self):
        """Errors of an ImageNet net by all protocols, from ``pretrained.evaluations``; empty before that."""
        return read_json(self.folder / "evaluation.json")

    @property
    def weights(self):
        """The file of the final weights; None if it is missing, or altered, which a line says."""
        path = self.folder / "weights.pt"
        try:
            if path.exists():
                check_sums(self.folder, [path.name])
                return path
        except DamagedError as error:
            print(f"{error}: these weights are left out.")
        return None

    @property
    def conditions(self):
        """``CONDITIONS`` of the run, by name."""
        values = {name: getattr(self.run, name) for name in ("dataset", "precision", "holdout")}
        values |= {"fingerprint": self.fingerprint[:12], "iterations": self.summary["iterations"]}
        values |= {"recipe": self.run.recipe_name, "bn_batch": self.run.settings.bn_batch}
        values["weights"] = None if self.run.weights is None else self.run.weights.name
        return {name: values[name] for name in CONDITIONS}


def ended(records):
    """The records whose runs reached their end, and for each net how many others diverged."""
    diverged = collections.Counter(record.net for record in records if record.diverged is not None)
    return [record for record in records if record.diverged is None], diverged


def in_words(conditions):
    """The conditions of a run as text: "digits, recipe digits, 1,100 iterations, float32"."""
    words = "{dataset}, recipe {recipe}, {iterations:,} iterations, {precision}".format(**conditions)
    recipe, bn_batch = RECIPES.get(conditions["recipe"]), conditions["bn_batch"]
    if conditions["holdout"]:
        words += f", {conditions['holdout']:,} images held out"
    if not pd.isna(bn_batch) and (recipe is None or bn_batch != (recipe.bn_batch or recipe.batch)):
        words += f", batch norm over {bn_batch}"
    if not pd.isna(conditions["weights"]):
        words += f", weights {conditions['weights']}"
    return words


def by_conditions(records):
    """Records grouped by conditions: tuples of a short name, a full one, both unique, and the records.

    Sorted by data set, its own recipe first, the most iterations first. Different nets of a group may start from
    different weights; where runs of one net do, there is a group for each choice of weights for every net.
    """
    groups = {}
    for record in records:
        groups.setdefault(tuple((record.conditions | {"weights": None}).items()), []).append(record)
    groups = [part for key, group in sorted(groups.items(), key=_place) for part in _by_weights(dict(key), group)]
    all_conditions = [conditions for conditions, _ in groups]
    full = _unique(map(in_words, all_conditions), [f"images {each['fingerprint']}" for each in all_conditions])
    short = full
    for always in (True, False):  # whether a data set's own recipe is named, too
        short = _unique([_in_short(each, always) for each in all_conditions], short, instead=True)
    return list(zip(short, full, [members for _, members in groups], strict=True))


def _by_weights(conditions, records):
    """Lists of records, in each of which all runs of a net start from the same weights, with their conditions."""
    weights = {}
    for record in records:
        weights.setdefault(record.net, {})[record.conditions["weights"]] = None
    choices = [dict(zip(weights, each, strict=True)) for each in itertools.product(*weights.values())]
    parts = []
    for choice in choices:
        words = " and ".join(dict.fromkeys(filter(None, choice.values()))) if len(choices) > 1 else None
        members = [record for record in records if record.conditions["weights"] == choice[record.net]]
        parts.append((conditions | {"weights": words}, members))
    return parts


def _in_short(conditions, always):
    own = conditions["recipe"] == own_recipe(conditions["dataset"])
    recipe = "" if own and not always else ", recipe {recipe}"
    return f"{{dataset}}{recipe}, {{iterations:,}} iterations".format(**conditions)


def _place(group):
    dataset, recipe, iterations = (dict(group[0])[name] for name in ("dataset", "recipe", "iterations"))
    return dataset, recipe != own_recipe(dataset), recipe, -iterations


def _unique(names, marks, instead=False):
    """The names; to those that are not unique their marks are added, or take their place (``instead``)."""
    names = list(names)
    pairs = zip(names, marks, strict=True)
    return [name if names.count(name) == 1 else mark if instead else f"{name}, {mark}" for name, mark in pairs]


def finished(run, results="results"):
    """The run's record, or None while it is unfinished: ``summary.json`` is written last.

    Raises DamagedError when a file of the record is not as it was written; ValueError when the record is that of
    another run, was made by another version of this code, or holds what this version does not know; TypeError or
    ValueError when ``results`` cannot be a folder.
    """
    folder = run.folder(results)
    if not (folder / "summary.json").exists():
        return None
    try:
        record = _opened(folder)
    except DamagedError as error:
        published = PUBLISHED is not None and folder.is_relative_to(PUBLISHED)
        remedy = f"Restore it: git restore {folder}" if published else f"Remove {folder} to train this run again"
        raise DamagedError(f"{error}. {remedy}") from None
    if record.run != run:
        raise ValueError(f"{folder} holds the record of {record.run}, not of {run}: remove or rename this folder")
    return record


def finished_or_published(run, results="results"):
    """The run's record in ``results`` or, where it has none there, the one published with this repository, or None."""
    record = finished(run, results)
    return record if record is not None or PUBLISHED is None else finished(run, PUBLISHED)


def by_id(name, results="results"):
    """The record of a finished run by its id, from ``results`` or those published with this repository.

    Raises ValueError where there is none, naming the nearest id, and as ``finished`` does.
    """
    folders = [files.folder("results", results), *([] if PUBLISHED is None else [PUBLISHED])]
    known = {path.parent.name: path.parent for folder in folders[::-1] for path in folder.glob("runs/*/summary.json")}
    if name not in known:
        where = " or ".join(str(folder / "runs") for folder in folders)
        raise ValueError(f"run {name!r}: there is no such finished run in {where}{nearest(name, known)}")
    return _opened(known[name])


def is_published(record):
    """Whether a record is one of those published with this repository."""
    return PUBLISHED is not None and record.folder.is_relative_to(PUBLISHED)


def all_finished(results="results", having="summary.json"):
    """The records of all finished runs in a folder, or of those that have a certain file, in the order of their ids.

    A record that is damaged, or was made by another version of this code, is left out, with a line that says so.
    Raises ValueError when there is no such folder, when none of its records can be read, and when one that is published
    with this repository cannot: a report without them would be another one.
    """
    records, folder, left_out = [], files.folder("results", results), []
    if not folder.is_dir():
        raise ValueError(f"results {str(results)!r}: there is no folder {folder}, choose one that holds records")
    for place in sorted(path.parent for path in (folder / "runs").glob("*/summary.json")):
        if not (place / having).exists():
            continue
        try:
            record = _opened(place)
            if record.run.id != place.name:
                raise ValueError(f"{place} holds the record of {record.run.id}: rename or remove this folder")
        except (ValueError, OSError) as error:
            print(f"Left out: {error}")
            left_out.append(error)
            continue
        records.append(record)
    if left_out and (not records or folder == PUBLISHED):
        remedy = f"restore them (git restore {folder})" if folder == PUBLISHED else "restore or remove them"
        raise ValueError(
            f"{len(left_out)} of {len(left_out) + len(records)} records in {folder} cannot be used: {remedy}. "
            f"The first: {left_out[0]}"
        )
    return records


def locked(run, results="results"):
    """The context in which no other process trains this run into that folder; waits for one that does."""
    return files.locked(lock(run, results), f"{run.id} is being trained")


def lock(run, results="results"):
    """The file of the run's lock."""
    return files.folder("results", results) / ".locks" / f"{run.id}.lock"


def _opened(folder):
    """The record in a folder, checked."""
    if (folder / SUMS).exists() or _version(folder) == VERSION:  # records of older versions may have none
        check_sums(folder)
    try:
        stored, summary = (json.loads((folder / name).read_bytes()) for name in ("run.json", "summary.json"))
        version = stored.get("version")
        if version == VERSION:
            known = {SPELLED.get(field.name, field.name) for field in fields(Run)}
            unknown = set(stored) - {*known, *RETIRED, "id", "fingerprint", "version"}
            if unknown:
                raise ValueError(f"it has fields that are unknown here: {', '.join(sorted(unknown))}")
            return Record(Run.from_dict(stored), folder, stored["fingerprint"], {**summary})
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{folder} holds a record that this version of the code does not understand ({error}): use the code that "
            "made it, or remove or rename this folder"
        ) from error
    raise ValueError(
        f"{folder} holds a record of version {version} of the training code, this is version {VERSION}, whose results "
        "differ: use the code that made it, or remove or rename this folder"
    )


def write_summary(folder, summary):
    """Write ``SHA256SUMS`` of the files in the folder, then ``summary.json``, which marks the record as complete."""
    text = json_text(summary)
    names = {path.name for path in folder.iterdir() if path.suffix in (".json", ".csv", ".txt")}
    paths = [folder / name for name in {*names, "weights.pt", WEIGHTS} - {"evaluation.json", "summary.json"}]
    contents = {path.name: path.read_bytes() for path in paths if path.exists()} | {"summary.json": text.encode()}
    files.write(folder / SUMS, "".join(f"{files.digest(contents[name])}  {name}\n" for name in sorted(contents)))
    files.write(folder / "summary.json", text)


def _version(folder):
    """The version in a record's run.json; this code's where that cannot be read."""
    try:
        return json.loads((folder / "run.json").read_bytes()).get("version")
    except (OSError, ValueError, AttributeError):
        return VERSION


def check_sums(folder, names=None):
    """Raise DamagedError unless the files of a record, or those with these names, are as they were written.

    Weights are checked only by name: they are large, and may have stayed where they were trained.
    """
    try:
        *lines, rest = (folder / SUMS).read_text("utf-8").split("\n")
        known = {name: digest for digest, name in (line.split("  ") for line in lines)}
        if rest:
            raise ValueError(f"the end of a line is missing: {rest}")
    except (FileNotFoundError, ValueError) as error:
        raise DamagedError(f"{folder} is damaged: {SUMS} is missing or altered") from error
    for name in names or {name for name in {*known, *NEEDED} if not name.endswith((".pt", ".safetensors"))}:
        try:
            content = files.read(folder / name)
        except FileNotFoundError as error:
            raise DamagedError(f"{folder} is damaged: {name} is missing") from error
        if files.digest(content) != known.get(name):
            converted = files.digest(content.replace(b"\r\n", b"\n")) == known.get(name)
            how = " (its line endings were changed, as git does with core.autocrlf)" if converted else ""
            raise DamagedError(f"{folder} is damaged: {name} is not what {SUMS} says{how}")


def rows_text(rows, columns=COLUMNS, digits=None):
    """Rows (dicts; None where not measured) as the text of a csv file: these columns first, then any others.

    digits: significant digits of numbers that are not integers; left out, all.
    """
    columns = list(columns) + [name for name in (rows[0] if rows else ()) if name not in columns]
    text = io.StringIO()
    shown = None if digits is None else f"%.{digits}g"
    pd.DataFrame(rows, columns=columns).to_csv(text, index=False, lineterminator="\n", float_format=shown)
    return text.getvalue()


def _hardware(environment):
    device, threads = environment["device"], environment.get("threads", 1)
    return device if device != "cpu" else f"{environment['processor']}, {threads} thread{'s' * (threads > 1)}"


def origin(run, fingerprint):
    """The origin of a run's checkpoints, as ``engine.checkpoint`` takes it."""
    return {"fingerprint": fingerprint, "run": run.to_dict(), "recipe": repr(run.settings), "version": VERSION}


def run_text(run, fingerprint):
    """The text of ``run.json``."""
    return json_text({**run.to_dict(), "id": run.id, "fingerprint": fingerprint, "version": VERSION})


def read_json(path):
    """The dict in a JSON file; empty where there is none, or a damaged one, which a line says."""
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError:
        values = None
    if isinstance(values, dict):
        return values
    print(f"{path} is damaged: it is left out.")
    return {}


def json_text(values):
    return json.dumps(values, indent=2, allow_nan=False) + "\n"


def keep(run, contents, results="results"):
    """Write the files of a record that was made elsewhere, {name: bytes}, the summary last.

    If another process has finished the run meanwhile, its record stays. Raises ValueError as ``finished`` does for a
    record of other code, or one that was altered in transit.
    """
    with tempfile.TemporaryDirectory() as arrived:
        for name, content in contents.items():
            (Path(arrived) / name).write_bytes(content)
        _opened(Path(arrived))
    folder = run.folder(results)
    with locked(run, results):
        if finished(run, results) is not None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        for name in sorted(contents, key=lambda name: name == "summary.json"):
            files.write(folder / name, contents[name])
        checkpoint.remove(folder)
