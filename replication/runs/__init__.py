"""A run: what to train, validated and named."""

import numbers
from dataclasses import asdict, dataclass, fields, replace

from replication.data import check_name, is_imagenet
from replication.data import is_detection as is_detection
from replication.detection import PREFIX, DetectorName, Pretrained
from replication.engine import files
from replication.engine.checks import choice as choice
from replication.engine.checks import divisor
from replication.engine.checks import divisors as divisors
from replication.engine.checks import whole as whole
from replication.models import NetName
from replication.recipes import RECIPES, Recipe, own_recipe
from replication.runs.own import named

NAMED = tuple(RECIPES)  # in this package: workers know these
PRECISIONS = ("float32", "bfloat16")
SPELLED = {"bn_batch": "group"}  # fields that records and run ids know by an older name
RETIRED = ("unreadable",)  # fields that only older records have
LONGEST = 200  # characters of an id, which is the name of files


@dataclass(frozen=True)
class Run:
    """What determines a result. Equal runs have equal ``id``s, which leave out fields at their default.

    net: a name of the paper's, such as "plain-20" or "resnet-32-C"; without a letter, the paper's choice of shortcut.
        Or a net of one's own: "module:function", or the function, which is called with the number of classes.
    dataset: "digits", "cifar10", "cifar100" or the name of a folder of images; one that begins with "imagenet" is in
        ImageNet's layout and trains the nets of Table 1. "voc", "coco", and what begins with "voc-" or "coco-", trains
        detectors, such as "faster-rcnn-resnet-101".
    recipe: a name of ``RECIPES``, such as "cifar" or "imagenet", or a ``Recipe``; left out, the data set's own.
    seed: of the initial weights, the order of images and their augmentation.
    schedule: the fraction of the recipe's iterations, above 0 up to 1.
    precision: "float32", or "bfloat16" for automatic mixed precision.
    holdout: training images held out for validation (the paper sets its CIFAR schedule with 5,000).
    bn_batch: images that batch norm normalizes together in training (ghost batch norm), a divisor of the recipe's
        batch. Smaller ones need less memory and let more processes share a batch; left out, the recipe's own.
    warmup: False has a net that the recipe warms up start at the full rate (section 4.2, footnote).
    weights: what a detector starts from, ImageNet weights as options of ``Pretrained.of``: {"path": "resnet101.pth",
        "inputs": "torchvision", "stride_on": "3x3"}. Left out, from scratch.

    Raises TypeError or ValueError naming the value, the choices and, where there is one, the nearest match.
    """

    net: str
    dataset: str = "digits"
    recipe: str | Recipe | None = None
    seed: int = 0
    schedule: float = 1.0
    precision: str = "float32"
    holdout: int = 0
    bn_batch: int | None = None
    warmup: bool = True
    weights: Pretrained | dict | None = None

    def __post_init__(self):
        check_name(self.dataset)
        name = self._parsed()
        values = {
            "net": str(name),
            "recipe": self._own_recipe(),
            "seed": whole("seed", self.seed),
            "schedule": self._fraction(),
            "precision": choice("precision", self.precision, PRECISIONS),
            "holdout": whole("holdout", self.holdout),
            "weights": self._own_weights(name),
        }
        for field, value in values.items():
            object.__setattr__(self, field, value)
        object.__setattr__(self, "bn_batch", self._own_bn_batch())
        object.__setattr__(self, "warmup", self._own_warmup(name.depth))

    def _parsed(self):
        if is_detection(self.dataset):
            return DetectorName.parse(self.net)
        if isinstance(self.net, str) and self.net.startswith(PREFIX):
            raise ValueError(f"net {self.net!r}: detectors train on voc, coco or voc-smoke, not on {self.dataset}")
        return named(self.net, is_imagenet(self.dataset))

    def _own_weights(self, name):
        if self.weights is None:
            return None
        if not isinstance(name, DetectorName):
            raise ValueError(f"weights {self.weights!r}: {name} starts from its seed, give them to detectors")
        return Pretrained.of(self.weights, name)

    def _own_recipe(self):
        """By name where it is one of this package, so that a run has one name; in full where no worker may know it."""
        recipe = own_recipe(self.dataset) if self.recipe is None else self.recipe
        if not isinstance(recipe, Recipe) and choice("recipe", recipe, RECIPES) not in NAMED:
            recipe = RECIPES[recipe]
        return next((name for name in NAMED if RECIPES[name] == recipe), recipe)

    @property
    def _recipe(self):
        return RECIPES.get(self.recipe, self.recipe)

    def _own_bn_batch(self):
        """None where it is the recipe's, so that a run has one name."""
        recipe = self._recipe
        if self.bn_batch is None:
            return None
        bn_batch = divisor("bn_batch", self.bn_batch, recipe.batch, "the batch")
        return None if bn_batch == (recipe.bn_batch or recipe.batch) else bn_batch

    def _own_warmup(self, depth):
        """False only where that makes a difference, so that a run has one name."""
        if not isinstance(self.warmup, bool):
            raise TypeError(f"warmup {self.warmup!r}: choose True or False")
        if is_detection(self.dataset) and self._recipe.for_depth(depth).warmup is not None:
            raise ValueError(f"recipe {self.recipe_name!r}: its warm-up watches an error that detectors do not have")
        return self.warmup or self._recipe.for_depth(depth).warmup is None

    def _fraction(self):
        value = self.schedule
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            text = "; YAML takes 0.01 and 1.0e-2 for numbers, 1e-2 for text" if isinstance(value, str) else ""
            raise TypeError(f"schedule {value!r}: give a number above 0 and up to 1{text}")
        if not 0 < value <= 1:  # false for NaN too
            raise ValueError(f"schedule {value!r}: choose a fraction of the recipe's iterations, above 0 and up to 1")
        return float(value)

    @property
    def id(self):
        """The name of the run and its folder: net, data set, fields that differ from their default, seed."""
        changed = []
        if self.recipe != own_recipe(self.dataset):
            changed.append(f"recipe-{self.recipe_name}")
        values = {name: getattr(self, name) for name in ("schedule", "precision", "holdout", "bn_batch", "warmup")}
        for field in fields(self):
            if field.name in values and values[field.name] != field.default:
                changed.append(f"{SPELLED.get(field.name, field.name)}-{values[field.name]}")
        if self.weights is not None:
            changed.append(f"weights-{self.weights.name}")
        name = "__".join([self.name.label, self.dataset, *changed, f"seed-{self.seed}"])
        if len(name) <= LONGEST or not (":" in self.net or isinstance(self.recipe, Recipe)):
            return name
        return f"{name[: LONGEST - 9]}-{files.digest(name.encode())[:8]}"

    @property
    def name(self):
        """The net's name in its parts: a ``NetName``, a ``DetectorName`` or an ``OwnNet``."""
        return self._parsed()

    @property
    def detects(self):
        """Whether its net is a detector."""
        return is_detection(self.dataset)

    @property
    def recipe_name(self):
        """The recipe's name in tables and run ids."""
        return self.recipe.name if isinstance(self.recipe, Recipe) else self.recipe

    @property
    def settings(self):
        """The recipe at this schedule, for a net of this depth, with this run's bn_batch and warm-up."""
        recipe = self._recipe.scaled(self.schedule).for_depth(self.name.depth)
        warmup = recipe.warmup if self.warmup else None
        return replace(recipe, bn_batch=self.bn_batch or recipe.bn_batch or recipe.batch, warmup=warmup)

    def folder(self, results="results"):
        """The folder of the run's record; a relative ``results`` starts from the repository."""
        return files.folder("results", results) / "runs" / self.id

    @classmethod
    def from_dict(cls, values):
        """The run of a ``run.json``; a field that it is older than has its default."""
        names = {field.name: SPELLED.get(field.name, field.name) for field in fields(cls)}
        values = {name: values[spelled] for name, spelled in names.items() if spelled in values}
        if isinstance(values.get("recipe"), dict):
            values["recipe"] = Recipe.from_dict(values["recipe"])
        if isinstance(values.get("weights"), dict):
            values["weights"] = Pretrained.from_dict(values["weights"])
        return cls(**values)

    def to_dict(self):
        """Every field, as ``run.json`` has it: a recipe of one's own is a dict of its fields, and so are weights."""
        values = asdict(self)
        if self.weights is None:  # as in older records
            del values["weights"]
        return {SPELLED.get(name, name): value for name, value in values.items()}


def net_names(kind, depths, shortcuts=None):
    """The names of nets of a kind, "plain" or "resnet", with every depth: ["resnet-20", "resnet-56"].

    With ``shortcuts``, such as ["A", "C"], those of every shortcut: ["resnet-20-A", "resnet-20-C", "resnet-56-A", ...].
    Raises TypeError or ValueError for anything but a list, an empty list, a repeated or a bad entry.
    """
    endings = [""] if shortcuts is None else [f"-{shortcut}" for shortcut in a_list("shortcuts", shortcuts)]
    depths = [whole("depth", depth) for depth in a_list("depths", depths)]
    names = [f"{kind}-{depth}{ending}" for depth in depths for ending in endings]
    for name in names:
        NetName.parse(name)
    return names


def grid(nets, dataset="digits", seeds=(0,), weights=None, **fields):
    """The runs of a notebook: every net with every seed, the other fields the same for all.

    weights: what detectors start from, {net: the ``weights`` of its runs}.
    Raises TypeError or ValueError as ``Run`` does, and for an empty list or a repeated entry.
    """
    nets, seeds = a_list("nets", nets), a_list("seeds", seeds)
    if not isinstance(weights, dict | None):
        raise TypeError(f"weights {weights!r}: give them by net, as {{{str(nets[0])!r}: {{'path': 'file.pth', ...}}}}")
    for net in weights or ():
        choice("weights", net, nets)
    starts = weights or {}
    return [Run(net, dataset, seed=seed, weights=starts.get(net), **fields) for net in nets for seed in seeds]


def a_list(field, values):
    """``values`` if it is a list with at least one entry and none repeated, else a ValueError."""
    if not isinstance(values, list | tuple) or not values:
        entries = str(values).strip("[] ") if isinstance(values, str | int) else ""
        example = f"[{entries or '0, 1'}]"
        raise ValueError(f"{field} {values!r}: give a list such as {example}; to papermill by -y '{field}: {example}'")
    if len(set(map(str, values))) < len(values):
        raise ValueError(f"{field} {values!r}: an entry is repeated, name each once")
    return values
