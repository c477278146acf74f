"""One run: what is trained, validated and named, and the record it leaves in ``results/runs/<run id>/``."""

import ast
import io
import json
import numbers
import os
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path

import pandas as pd

from replication.data import check_name, is_imagenet
from replication.models import NetName, nearest
from replication.photographs import UNREADABLE
from replication.recipes import RECIPES, own_recipe

PRECISIONS = ("float32", "bfloat16")
# What must be equal for errors to be compared: among them the images themselves, by their fingerprint.
CONDITIONS = ("dataset", "fingerprint", "recipe", "iterations", "precision", "holdout", "group")
SIGNALS = ("response_std", "signal_variance", "gradient_norm", "weight_norm", "residual_ratio")
COLUMNS = ("iteration", "lr", "train_error", "train_loss", "test_error", "test_loss", "seconds")


@dataclass(frozen=True)
class Run:
    """What determines a result. Equal runs have equal ``id``; fields at their default stay out of it.

    net: a name of the paper's, such as "plain-20" or "resnet-32-C"; without a letter, the paper's choice of shortcut.
    dataset: "digits", "cifar10", "cifar100" or the name of a folder of images; one that begins with "imagenet" is in
        ImageNet's layout and trains the nets of Table 1.
    recipe: "cifar", "imagenet", "digits", "note" or "rehearsal"; left out, the data set's own.
    seed: of the initial weights, the order of images and their augmentation.
    schedule: the fraction of the recipe's iterations, above 0 up to 1.
    precision: "float32", or "bfloat16" for automatic mixed precision.
    holdout: training images held out for validation (the paper sets its CIFAR schedule with 5,000).
    group: images that batch norm sees at once, in training: they divide the recipe's batch, the smaller they are, the
        less memory is needed and the more processes can share a batch; left out, the recipe's own.
    unreadable: a photograph that cannot be read in training is replaced by another ("skip") or ends the run ("error").
    warmup: whether a net that the recipe warms up is; without, it starts at the full rate (section 4.2, footnote).

    Raises TypeError or ValueError naming the value, the choices and, where there is one, the nearest match.
    """

    net: str
    dataset: str = "digits"
    recipe: str | None = None
    seed: int = 0
    schedule: float = 1.0
    precision: str = "float32"
    holdout: int = 0
    group: int | None = None
    unreadable: str = "skip"
    warmup: bool = True

    def __post_init__(self):
        check_name(self.dataset)
        name = NetName.parse(self.net, is_imagenet(self.dataset))
        own = own_recipe(self.dataset)
        values = {
            "net": str(name),
            "recipe": own if self.recipe is None else choice("recipe", self.recipe, RECIPES),
            "seed": whole("seed", self.seed),
            "schedule": self._fraction(),
            "precision": choice("precision", self.precision, PRECISIONS),
            "holdout": whole("holdout", self.holdout),
            "unreadable": choice("unreadable", self.unreadable, UNREADABLE),
        }
        for field, value in values.items():
            object.__setattr__(self, field, value)
        object.__setattr__(self, "group", self._own_group())
        object.__setattr__(self, "warmup", self._own_warmup(name.depth))

    def _own_group(self):
        """The group, or None where it is the recipe's: the same run has one name."""
        recipe = RECIPES[self.recipe]
        if self.group is None:
            return None
        group = whole("group", self.group)
        if not group or recipe.batch % group:
            raise ValueError(
                f"group {group}: choose a number that divides the batch of {recipe.batch}: {divisors(recipe.batch)}"
            )
        return None if group == (recipe.group or recipe.batch) else group

    def _own_warmup(self, depth):
        """False only where it makes a difference: the same run has one name."""
        if not isinstance(self.warmup, bool):
            raise TypeError(f"warmup {self.warmup!r}: choose True or False")
        return self.warmup or RECIPES[self.recipe].for_depth(depth).warmup is None

    def _fraction(self):
        value = self.schedule
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(f"schedule {value!r}: give a number above 0 and up to 1")
        if not 0 < value <= 1:  # false for NaN too
            raise ValueError(f"schedule {value!r}: choose a fraction of the recipe's iterations, above 0 and up to 1")
        return float(value)

    @property
    def id(self):
        """The run's name and its folder's: net, data set, whatever differs from its default, seed."""
        changed = []
        if self.recipe != own_recipe(self.dataset):
            changed.append(f"recipe-{self.recipe}")
        for field in fields(self)[4:]:
            value = getattr(self, field.name)
            if value != field.default:
                changed.append(f"{field.name}-{value}")
        return "__".join([self.net, self.dataset, *changed, f"seed-{self.seed}"])

    @property
    def name(self):
        """What the net's name says."""
        return NetName.parse(self.net, is_imagenet(self.dataset))

    @property
    def settings(self):
        """The recipe at this schedule, for a net of this depth, with this run's groups and warm-up."""
        recipe = RECIPES[self.recipe].scaled(self.schedule).for_depth(self.name.depth)
        warmup = recipe.warmup if self.warmup else None
        return replace(recipe, group=self.group or recipe.group or recipe.batch, warmup=warmup)

    def folder(self, results="results"):
        """Where the run's record lies."""
        return Path(results) / "runs" / self.id

    @classmethod
    def from_dict(cls, values):
        """The run of a ``run.json``; a field that it is older than has its default."""
        return cls(**{field.name: values[field.name] for field in fields(cls) if field.name in values})


@dataclass(frozen=True, eq=False)
class Record:
    """What a finished run left; read from its folder when first asked for.

    summary: final errors (percent), sizes and times (seconds) as a dict.
    history: a DataFrame of ``COLUMNS``, one row a recording.
    layers: a DataFrame of ``measure.signals`` at some iterations, from 0 to the last, one row for each weighted layer.
    predictions: a DataFrame of the labels and the predicted classes of all test images, by the weights left at the end;
        empty where some images could not be read.
    environment: versions, device, threads and commit as a dict.
    fingerprint: of the data set.
    """

    run: Run
    folder: Path

    @property
    def net(self):
        """The net's name in tables and figures: one that was not warmed up is a row of its own."""
        return self.run.net if self.run.warmup else f"{self.run.net} without warm-up"

    @cached_property
    def summary(self):
        return json.loads((self.folder / "summary.json").read_text())

    @cached_property
    def environment(self):
        return json.loads((self.folder / "environment.json").read_text())

    @cached_property
    def history(self):
        return pd.read_csv(self.folder / "history.csv")

    @cached_property
    def layers(self):
        return self._read("layers.csv", ("iteration", "layer", "name", "kind", *SIGNALS))

    @cached_property
    def predictions(self):
        return self._read("predictions.csv", ("label", "predicted"))

    def _read(self, name, columns):
        """A file that not all records have."""
        path = self.folder / name
        return pd.read_csv(path) if path.exists() else pd.DataFrame(columns=columns)

    @property
    def evaluation(self):
        """Errors in all ways that ImageNet nets are tested in, by ``evaluate.evaluations``; empty before that."""
        path = self.folder / "evaluation.json"
        return json.loads(path.read_text()) if path.exists() else {}

    @cached_property
    def fingerprint(self):
        return json.loads((self.folder / "run.json").read_text())["fingerprint"]

    @property
    def conditions(self):
        """``CONDITIONS`` of the run, by name."""
        values = {name: getattr(self.run, name) for name in ("dataset", "recipe", "precision", "holdout")}
        values |= {"fingerprint": self.fingerprint[:12], "iterations": self.summary["iterations"]}
        values["group"] = self.run.settings.group
        return {name: values[name] for name in CONDITIONS}


def in_words(conditions):
    """The conditions of a run for the eye: "digits, recipe digits, 1,100 iterations, float32"."""
    words = "{dataset}, recipe {recipe}, {iterations:,} iterations, {precision}".format(**conditions)
    recipe, group = RECIPES.get(conditions["recipe"]), conditions["group"]
    if conditions["holdout"]:
        words += f", {conditions['holdout']:,} images held out"
    if recipe is not None and not pd.isna(group) and group != (recipe.group or recipe.batch):
        words += f", groups of {group}"
    return words


def by_conditions(records):
    """Records of equal conditions together: tuples of a short name and a full one, both unique, and the records."""
    groups = {}
    for record in records:
        groups.setdefault(tuple(record.conditions.items()), []).append(record)
    all_conditions = [members[0].conditions for members in groups.values()]
    full = _unique(map(in_words, all_conditions), [f"images {each['fingerprint']}" for each in all_conditions])
    short = _unique(
        ["{dataset}, {iterations:,} iterations".format(**each) for each in all_conditions], full, instead=True
    )
    return list(zip(short, full, groups.values(), strict=True))


def _unique(names, marks, instead=False):
    """The names, those that are not unique with their marks, or ``instead`` of them the marks alone."""
    names = list(names)
    told = zip(names, marks, strict=True)
    return [name if names.count(name) == 1 else mark if instead else f"{name}, {mark}" for name, mark in told]


def finished(run, results="results"):
    """The run's record, or None while it has none: a run is finished once its ``summary.json`` is there.

    Raises ValueError when the record in the run's folder is that of another run.
    """
    folder = run.folder(results)
    if not (folder / "summary.json").exists():
        return None
    stored = Run.from_dict(json.loads((folder / "run.json").read_text()))
    if stored != run:
        raise ValueError(f"{folder} holds the record of {stored}, not of {run}: remove or rename this folder")
    return Record(run, folder)


def all_finished(results="results"):
    """The records of all finished runs, in the order of their ids."""
    folders = sorted(path.parent for path in (Path(results) / "runs").glob("*/summary.json"))
    return [Record(Run.from_dict(json.loads((folder / "run.json").read_text())), folder) for folder in folders]


def rows_text(rows, columns=COLUMNS, digits=None):
    """Rows (dicts; None where not measured) as the text of a csv file: first these columns, then what rows have more.

    digits: significant ones of every number that is not whole; left out, all.
    """
    columns = list(columns) + [name for name in (rows[0] if rows else ()) if name not in columns]
    text = io.StringIO()
    shown = None if digits is None else f"%.{digits}g"
    pd.DataFrame(rows, columns=columns).to_csv(text, index=False, lineterminator="\n", float_format=shown)
    return text.getvalue()


def run_text(run, fingerprint):
    """The text of ``run.json``."""
    return json_text({**asdict(run), "id": run.id, "fingerprint": fingerprint})


def json_text(values):
    return json.dumps(values, indent=2, allow_nan=False) + "\n"


def write(path, content):
    """Write text, or what ``content(file)`` writes to a binary file: ``path`` is old or new, but never in between."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content.encode())
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def keep(run, files, results="results"):
    """Write the files of a run's record, {name: bytes}, that was made elsewhere: the summary last."""
    folder = run.folder(results)
    folder.mkdir(parents=True, exist_ok=True)
    for name in sorted(files, key=lambda name: name == "summary.json"):
        write(folder / name, lambda file, content=files[name]: file.write(content))
    (folder / "checkpoint.pt").unlink(missing_ok=True)


def choice(field, value, choices):
    """``value`` if it is one of the choices, else a ValueError that names them and the nearest."""
    if isinstance(value, str) and value in choices:
        return value
    raise ValueError(f"{field} {value!r}: choose {', '.join(choices)}{nearest(value, choices)}")


def whole(field, value):
    """``value`` as an int if it is a whole number from 0 to 2**32 - 1, else a TypeError or ValueError."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{field} {value!r}: give a whole number, 0 or more")
    if not 0 <= value < 2**32:
        raise ValueError(f"{field} {value!r}: choose a whole number from 0 to {2**32 - 1}")
    return int(value)


def divisors(count):
    """For error messages: the numbers that a whole number can be divided by, as "1, 2, 4"."""
    return ", ".join(str(number) for number in range(1, count + 1) if count % number == 0)


def net_names(kind, depths, shortcuts=None):
    """The names of nets of a kind, "plain" or "resnet", with every depth: ["resnet-20", "resnet-56"].

    With ``shortcuts``, such as ["A", "C"], those of every shortcut: ["resnet-20-A", "resnet-20-C", "resnet-56-A", ...].
    Raises TypeError or ValueError for a list that is none, is empty or names something twice, and for bad entries.
    """
    endings = [""] if shortcuts is None else [f"-{shortcut}" for shortcut in a_list("shortcuts", shortcuts)]
    depths = [whole("depth", depth) for depth in a_list("depths", depths)]
    names = [f"{kind}-{depth}{ending}" for depth in depths for ending in endings]
    for name in names:
        NetName.parse(name)
    return names


def grid(nets, dataset="digits", seeds=(0,), **fields):
    """The runs of a notebook: every net with every seed, the other fields the same for all.

    Raises TypeError or ValueError as ``Run`` does, and for an empty list or an entry that stands there twice.
    """
    nets, seeds = a_list("nets", nets), a_list("seeds", seeds)
    return [Run(net, dataset, seed=seed, **fields) for net in nets for seed in seeds]


def a_list(field, values):
    """``values`` if it is a list with at least one entry and none twice, else a ValueError."""
    if not isinstance(values, list | tuple) or not values:
        raise ValueError(f"{field} {values!r}: give a list such as [0, 1]; to papermill by -y '{field}: [0, 1]'")
    if len(set(map(str, values))) < len(values):
        raise ValueError(f"{field} {values!r}: an entry stands there twice, name it once")
    return values


def start_notebook(namespace):
    """The first call of every notebook, with its ``globals()``: check parameters' names, go to the repository's root.

    papermill puts the parameters it is given into a cell of their own and only warns of unknown ones; a misspelt name
    would leave the default in force. JupyterLab starts a notebook in its own folder, papermill in the caller's:
    relative paths are the root's in both.
    Raises ValueError for a name that the notebook's own parameter cell does not have.
    """
    cells = namespace.get("In", [])
    given = [number for number, cell in enumerate(cells) if cell.startswith("# Parameters\n")]
    for number in given:
        for name in _assigned(cells[number]):
            choice("parameter", name, _assigned(cells[given[0] - 1]))
    if Path.cwd().name == "notebooks" and (Path.cwd().parent / "replication" / "runs.py").exists():
        os.chdir("..")


def _assigned(cell):
    return [target.id for line in ast.parse(cell).body if isinstance(line, ast.Assign) for target in line.targets]
