"""What the claims of the paper are judged by: numbers that a record gives."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from replication.report.tables import number

# Percentage points by which two single runs may differ by chance: six runs of one ResNet-56, by one user of a public
# replication, gave test errors of 6.89 to 8.42 %.
ONE_RUN = 1.5


class Metric(NamedTuple):
    """What is compared: its name, how a ``Record`` gives it (None or NaN: not measured), its unit and format.

    one_run: the largest difference between two single runs that may be chance; 0 for counts, which no seed changes.
    """

    name: str
    of: Callable
    unit: str = " %"
    one_run: float = ONE_RUN
    format: str = ",.2f"

    @property
    def seeded(self):
        return self.one_run > 0

    @property
    def points(self):
        """The unit of a difference."""
        return " points" if self.unit == " %" else self.unit

    def shown(self, value, unit=None):
        return f"{number(float(value), self.format)}{self.unit if unit is None else unit}"


def mean_response(record):
    """The mean over all 3x3 layers of the standard deviation of their responses, at the end of training (Fig. 7)."""
    return _at_end(record)["response_std"].mean()


def mean_residual(record):
    """The mean over all residual functions of their size relative to what the shortcut passes on, at the end."""
    return _at_end(record)["residual_ratio"].mean()


def _at_end(record):
    layers = record.layers[record.layers["kind"] == "3x3 conv"]
    return layers[layers["iteration"] == layers["iteration"].max()]


def gradient_gain(layers):
    """By iteration, the norm of the gradients of the first five 3x3 layers relative to that of the last five.

    The ratio of geometric means; ``layers`` as of a record.
    """
    rows = layers[layers["kind"] == "3x3 conv"]
    logs = np.log(rows["gradient_norm"].clip(lower=1e-30)).groupby(rows["iteration"])
    return np.exp(logs.apply(lambda norms: norms.iloc[:5].mean(skipna=False) - norms.iloc[-5:].mean(skipna=False)))


def least_variance(record):
    layers = record.layers
    return layers.loc[layers["kind"] == "3x3 conv", "signal_variance"].fillna(0).min()


def _open_shortcuts(record):
    """The share of blocks that add their shortcut, in percent."""
    start = record.layers[record.layers["iteration"] == 0]
    blocks = start["name"].str.extract(r"(layer\d+\.\d+)")[0].nunique()
    return 100 * start["residual_ratio"].count() / blocks if blocks else None


def _early_error(record):
    early = record.history["iteration"] <= record.summary["iterations"] / 3
    return record.history.loc[early, "train_error"].mean()


def _start(record):
    """Iterations until the training error is below 80 %, where the paper ends a warm-up; all of them if it never is."""
    rows = record.history[record.history["train_error"] < 80]
    return rows["iteration"].min() if len(rows) else record.summary["iterations"]


def _warmup(record):
    """Iterations at the low rate; infinity if the warm-up never ended."""
    warm = record.history["lr"].cummax() < record.run.settings.lr
    return record.history.loc[warm, "iteration"].max() if not warm.all() else float("inf")


TRAINING = Metric("training error", lambda record: record.summary["train_error"])
# On ImageNet that of the centre crop: what every run measures, while the paper's tables have that of ten crops.
TEST = Metric("test error", lambda record: record.summary["test_error"])
PRECISION = Metric("mAP@[.5, .95]", lambda record: record.summary.get("map_50_95"), one_run=1)
EARLY = Metric("training error (mean over the first third of training)", _early_error)
RESPONSE = Metric("mean response of all 3x3 layers", mean_response, "", 0.3)
RESIDUAL_SIZE = Metric("mean size of the residual functions, relative to the shortcuts,", mean_residual, "", 0.05)
START = Metric("time to a training error below 80 %", _start, " iterations", 100, ",.0f")
WARMUP = Metric("length of the warm-up", _warmup, " iterations", 100, ",.0f")
# A gradient or a variance that is not a number counts as the worst there is.
GAIN = "gradient ratio (first five to last five 3x3 layers)"
LOWEST_GAIN = Metric(f"lowest {GAIN}", lambda record: gradient_gain(record.layers).fillna(0).min(), "", format=".3g")
HIGHEST_GAIN = Metric(
    f"highest {GAIN}", lambda record: gradient_gain(record.layers).fillna(np.inf).max(), "", format=".3g"
)
LEAST_VARIANCE = Metric("least variance entering a 3x3 layer", least_variance, "", format=".3g")
PARAMETERS = Metric("number of parameters", lambda record: record.summary["parameters"], "", 0, ",.0f")
MULTIPLY_ADDS = Metric("number of multiply-adds", lambda record: record.summary["multiply_adds"], "", 0, ",.0f")
OPEN_SHORTCUTS = Metric("share of working shortcuts", _open_shortcuts, one_run=0, format=".0f")
