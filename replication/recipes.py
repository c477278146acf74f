"""Training recipes: the paper's (sections 3.4 and 4.2), one from a reader's note, and short ones for small data sets.

Recipes are immutable; the learning rate is a pure function of the iteration and of the errors recorded before it.
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Warmup:
    """A lower learning rate until the training error falls below a threshold, for deep nets (section 4.2).

    The error is averaged over an epoch: the paper warms up for "about 400 iterations", and CIFAR-10 has 391 per epoch.
    """

    lr: float
    until: float  # percent: the warm-up ends with the first epoch whose mean training error is below this
    depth: int  # layers: shallower nets are not warmed up


@dataclass(frozen=True)
class Plateau:
    """Divide the learning rate by 10 when the error stops improving (section 3.4: "when the error plateaus")."""

    watch: str  # column of the history: "train_error" or "test_error"
    patience: int  # iterations without improvement
    threshold: float = 0.01  # smallest improvement that counts, relative to the best error
    divisions: int = 3  # the maximum


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
    # A smoke test of the ImageNet experiments on a few dozen images: too short to learn anything.
    "smoke": Recipe(4, batch=16, lr=0.01, plateau=Plateau("test_error", patience=2), bn_batch=8),
}


def own_recipe(dataset):
    """The name of a data set's default recipe."""
    own = {"digits": "digits", "imagenet-smoke": "smoke"}
    return own.get(dataset, "imagenet" if dataset.startswith("imagenet") else "cifar")
