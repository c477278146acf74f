"""How nets are trained: the paper's recipes (sections 3.4 and 4.2), that of the note this project began from, digits'.

A recipe is frozen, and its learning rate is a pure function of the iteration and of the errors recorded so far.
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Warmup:
    """A low rate at the start, for nets of ``depth`` layers or more, until the training error falls (section 4.2).

    The error is the mean over an epoch, since the paper's warm-up ends after "about 400 iterations", and an epoch of
    CIFAR-10 has 391.
    """

    lr: float
    until: float  # percent: it ends with the first epoch whose mean training error is below
    depth: int


@dataclass(frozen=True)
class Plateau:
    """Divide the rate when the best error has not improved for a while (section 3.4 says no more than "plateaus")."""

    watch: str  # the column of the history: "train_error" or "test_error"
    patience: int  # iterations without an improvement
    threshold: float = 0.01  # an improvement is at least this part of the best error
    divisions: int = 3  # at the most


@dataclass(frozen=True)
class Recipe:
    """Stochastic gradient descent with momentum; the rate is divided by 10 at the milestones or on a plateau."""

    iterations: int
    batch: int  # images an iteration
    lr: float
    momentum: float
    weight_decay: float
    bn_batch: int | None = None  # images that batch norm normalizes together, a part of the batch; None: all of it
    milestones: tuple[int, ...] = ()  # iterations
    plateau: Plateau | None = None
    warmup: Warmup | None = None

    def scaled(self, schedule):
        """The same recipe at ``schedule`` times its length: milestones and patience scale, the warm-up does not."""
        return replace(
            self,
            iterations=max(1, round(self.iterations * schedule)),
            milestones=tuple(round(milestone * schedule) for milestone in self.milestones),
            plateau=self.plateau and replace(self.plateau, patience=max(1, round(self.plateau.patience * schedule))),
        )

    def for_depth(self, depth):
        """The same recipe for a net of ``depth`` layers: only the deep ones are warmed up."""
        return self if self.warmup is None or depth >= self.warmup.depth else replace(self, warmup=None)

    def warming(self, history):
        """Whether the warm-up goes on after what is recorded so far (rows with ``iteration`` and ``train_error``)."""
        return self.warmup is not None and all(row["train_error"] >= self.warmup.until for row in history)

    def learning_rate(self, iteration, history=()):
        """The rate of an iteration, counted from 0, given the rows of the history recorded before it."""
        divisions = sum(iteration >= milestone for milestone in self.milestones)
        if self.plateau is not None:
            divisions += self._plateaus(history)
        return (self.warmup.lr if self.warming(history) else self.lr) / 10**divisions

    def _plateaus(self, history):
        best, since, divisions = float("inf"), 0, 0
        for row in history:
            error = row[self.plateau.watch]
            if error is None:
                continue
            if error < best * (1 - self.plateau.threshold):
                best, since = error, row["iteration"]
            elif row["iteration"] - since >= self.plateau.patience:
                divisions, since = divisions + 1, row["iteration"]
        return min(divisions, self.plateau.divisions)


RECIPES = {
    "cifar": Recipe(
        iterations=64_000,
        batch=128,
        lr=0.1,
        momentum=0.9,
        weight_decay=1e-4,
        milestones=(32_000, 48_000),
        warmup=Warmup(lr=0.01, until=80, depth=110),
    ),
    "imagenet": Recipe(
        iterations=600_000,
        batch=256,
        lr=0.1,
        momentum=0.9,
        weight_decay=1e-4,
        plateau=Plateau("test_error", patience=30_000),
        bn_batch=32,  # 256 on eight processors; the paper gives no number for ImageNet
    ),
    # A reader's note on the paper, in which batch and momentum differ. It names no set to watch for the plateau:
    # the training error keeps the test part out of every choice.
    "note": Recipe(
        iterations=600_000,
        batch=100,
        lr=0.1,
        momentum=0.8,
        weight_decay=1e-4,
        plateau=Plateau("train_error", patience=60_000),
    ),
    # 1,437 images of 8x8 pixels; the same proportions as the CIFAR recipe.
    "digits": Recipe(
        iterations=1_100,
        batch=128,
        lr=0.1,
        momentum=0.9,
        weight_decay=1e-4,
        milestones=(550, 825),
        warmup=Warmup(lr=0.01, until=80, depth=110),
    ),
    # A smoke test of the ImageNet experiments on a few dozen pictures. It teaches a net nothing.
    "smoke": Recipe(
        iterations=4,
        batch=16,
        lr=0.01,
        momentum=0.9,
        weight_decay=1e-4,
        plateau=Plateau("test_error", patience=2),
        bn_batch=8,
    ),
}


def own_recipe(dataset):
    """The name of the recipe that a data set is trained by when none is asked for."""
    own = {"digits": "digits", "imagenet-smoke": "smoke"}
    return own.get(dataset, "imagenet" if dataset.startswith("imagenet") else "cifar")
