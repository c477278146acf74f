"""Training recipes: the paper's (sections 3.4 and 4.2), one from a reader's note, and short ones for small data sets.

Recipes are immutable; the learning rate is a pure function of the iteration and of the errors recorded before it.
Numbers that no training can have raise TypeError or ValueError by the name of their field.
"""

import numbers
from dataclasses import dataclass, fields, replace

from replication.engine import files
from replication.engine.checks import choice, divisor, whole


def _set(owner, **values):
    for field, value in values.items():
        object.__setattr__(owner, field, value)


def _number(field, value, words, fits):
    """``value`` as a float if it ``fits``, else a TypeError or ValueError that says in words what does."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{field} {value!r}: give a number {words}")
    if not fits(value):
        raise ValueError(f"{field} {value!r}: choose a number {words}")
    return float(value)


def _lr(value):
    return _number("lr", value, "above 0 and below 1e30", lambda lr: 0 < lr < 1e30)


@dataclass(frozen=True)
class Warmup:
    """A lower learning rate until the training error falls below a threshold, for deep nets (section 4.2).

    The error is averaged over an epoch: the paper warms up for "about 400 iterations", and CIFAR-10 has 391 per epoch.
    """

    lr: float
    until: float  # percent: the warm-up ends with the first epoch whose mean training error is below this
    depth: int  # layers: shallower nets are not warmed up

    def __post_init__(self):
        until = _number("until", self.until, "from 0 to 100", lambda percent: 0 <= percent <= 100)
        until = int(until) if until.is_integer() else until  # 80 and 80.0 are one recipe
        _set(self, lr=_lr(self.lr), until=until, depth=whole("depth", self.depth))


@dataclass(frozen=True)
class Plateau:
    """Divide the learning rate by 10 when the error stops improving (section 3.4: "when the error plateaus")."""

    watch: str  # column of the history: "train_error" or "test_error"
    patience: int  # iterations without improvement
    threshold: float = 0.01  # smallest improvement that counts, relative to the best error
    divisions: int = 3  # the maximum

    def __post_init__(self):
        choice("watch", self.watch, ("train_error", "test_error"))
        threshold = _number("threshold", self.threshold, "from 0 to below 1", lambda part: 0 <= part < 1)
        patience, divisions = whole("patience", self.patience, 1), whole("divisions", self.divisions)
        _set(self, patience=patience, threshold=threshold, divisions=divisions)


@dataclass(frozen=True)
class Recipe:
    """SGD with momentum; the learning rate is divided by 10 at each milestone, or on a plateau.

    Defaults are what sections 3.4 and 4.2 have in common.
    """

    iterations: int
    batch: int  # images per iteration
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    bn_batch: int | None = None  # images that batch norm normalizes together, a divisor of the batch; None: the batch
    milestones: tuple[int, ...] = ()  # iterations
    plateau: Plateau | None = None
    warmup: Warmup | None = None

    def __post_init__(self):
        iterations, batch = whole("iterations", self.iterations, 1), whole("batch", self.batch, 1)
        if not isinstance(self.milestones, list | tuple):
            raise TypeError(f"milestones {self.milestones!r}: give a list of iterations, such as [32000, 48000]")
        milestones = tuple(whole("milestones", milestone, 0, iterations) for milestone in self.milestones)
        if list(milestones) != sorted(milestones):
            raise ValueError(f"milestones {milestones}: give them in ascending order")
        for field, kind in {"plateau": Plateau, "warmup": Warmup}.items():
            if not isinstance(getattr(self, field), kind | None):
                raise TypeError(f"{field} {getattr(self, field)!r}: give a {kind.__name__}, or None")
        _set(self, iterations=iterations, batch=batch, lr=_lr(self.lr), milestones=milestones)
        momentum = _number("momentum", self.momentum, "from 0 to below 1", lambda value: 0 <= value < 1)
        decay = _number("weight_decay", self.weight_decay, "from 0 to below 1e30", lambda value: 0 <= value < 1e30)
        bn_batch = None if self.bn_batch is None else divisor("bn_batch", self.bn_batch, batch, "the batch")
        _set(self, momentum=momentum, weight_decay=decay, bn_batch=bn_batch)

    @classmethod
    def from_dict(cls, values):
        """The recipe of a ``run.json``, where it is what ``asdict`` gives."""
        parts = {"plateau": Plateau, "warmup": Warmup}
        return cls(**values | {name: kind(**values[name]) for name, kind in parts.items() if values.get(name)})

    @property
    def name(self):
        """Of a recipe that is none of ``RECIPES``: "own-" and 8 digits that change with any of its fields."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        changed = {field.name: values[field.name] for field in fields(self) if values[field.name] != field.default}
        return f"own-{files.digest(repr(changed).encode())[:8]}"

    def scaled(self, schedule):
        """The recipe with its iterations, milestones and patience multiplied by ``schedule``; the warm-up is not."""
        return replace(
            self,
            iterations=max(1, round(self.iterations * schedule)),
            milestones=tuple(round(milestone * schedule) for milestone in self.milestones),
            plateau=self.plateau and replace(self.plateau, patience=max(1, round(self.plateau.patience * schedule))),
        )

    def for_depth(self, depth):
        """The recipe for a net of ``depth`` layers: without warm-up unless the net is deep enough."""
        return self if self.warmup is None or depth >= self.warmup.depth else replace(self, warmup=None)

    def warming(self, history):
        """Whether the warm-up continues after the epochs recorded so far; its end is final, whatever follows."""
        return self.warmup is not None and all(row["train_error"] >= self.warmup.until for row in history)

    def learning_rate(self, iteration, history=()):
        """The learning rate of an iteration, counted from 0, given the history recorded before it.

        ``history``: rows with ``iteration``, the iterations done, and errors in percent (None where not measured);
        during a warm-up, one row per epoch.
        """
        divisions = sum(iteration >= milestone for milestone in self.milestones)
        if self.plateau is not None:
            divisions += self._count_plateaus(history)
        return (self.warmup.lr if self.warming(history) else self.lr) / 10**divisions

    def _count_plateaus(self, history):
        best, since, divisions = float("inf"), 0, 0  # since: iteration of the last improvement or division
        for row in history:
            error = row[self.plateau.watch]
            if error is None:
                continue
            if error < best * (1 - self.plateau.threshold):
                best, since = error, row["iteration"]
            elif row["iteration"] - since >= self.plateau.patience:
                divisions, since = divisions + 1, row["iteration"]
        return min(divisions, self.plateau.divisions)


WARMUP = Warmup(lr=0.01, until=80, depth=110)
RECIPES = {
    # Batch norm sees the whole batch. The paper's two GPUs normalized 64 images each, as ``bn_batch`` 64 does.
    "cifar": Recipe(64_000, batch=128, milestones=(32_000, 48_000), warmup=WARMUP),
    # Batch norm on eight GPUs with a batch of 256; the paper does not state a number for ImageNet.
    "imagenet": Recipe(600_000, batch=256, plateau=Plateau("test_error", patience=30_000), bn_batch=32),
    # From a reader's note on the paper, with another batch and momentum. It does not say which error has to plateau:
    # the training error, so that test images have no influence on training.
    "note": Recipe(600_000, batch=100, momentum=0.8, plateau=Plateau("train_error", patience=60_000)),
    # For 1,437 images of 8x8 pixels, in the proportions of the CIFAR recipe.
    "digits": Recipe(1_100, batch=128, milestones=(550, 825), warmup=WARMUP),
    "quick": Recipe(1_100, batch=64, milestones=(550, 825), warmup=WARMUP),  # of the quickstart: half the work
    # A smoke test of the ImageNet experiments on a few dozen images: too short to learn anything.
    "smoke": Recipe(4, batch=16, lr=0.01, plateau=Plateau("test_error", patience=2), bn_batch=8),
    # Detectors (section 4.3, appendix A). Batch norm is fixed: ``bn_batch`` is how many images pass through together,
    # one on each of the paper's GPUs. All layers train at once, where [32] takes four steps in turn. On VOC, iterations
    # and rate are those of [32], and the two images those of Fast R-CNN; on COCO, the 16 images of its second step.
    "voc": Recipe(80_000, batch=2, lr=0.001, milestones=(60_000,), weight_decay=5e-4, bn_batch=1),
    "coco": Recipe(320_000, batch=16, lr=0.001, milestones=(240_000,), weight_decay=5e-4, bn_batch=1),
    # A detector of a quarter of the size learns to find drawn shapes.
    "detection-smoke": Recipe(320, batch=8, lr=0.015, milestones=(208,), weight_decay=5e-4),
}
SMOKE_TESTS = ("smoke", "detection-smoke")  # whose results say nothing about the paper


def own_recipe(dataset):
    """The name of a data set's default recipe."""
    own = {"digits": "digits", "imagenet-smoke": "smoke", "voc-smoke": "detection-smoke"}
    families = [family for family in ("imagenet", "voc", "coco") if dataset.partition("-")[0] == family]
    return own.get(dataset, "imagenet" if dataset.startswith("imagenet") else [*families, "cifar"][0])
