"""How runs are compared: checks on the records of one set of conditions, and what checks amount to."""

import itertools
import warnings
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from replication.runs.records import ended

VERDICTS = ("reproduced", "partly", "not reproduced", "inconclusive", "not attempted")
CONFIDENCE = 0.95
# Points between two single runs that say nothing: six runs of one ResNet-56, by one user of a public replication, gave
# test errors of 6.89 to 8.42 %.
ONE_RUN = 1.5
ABOUT_EQUAL = 1.0  # points


class Check(NamedTuple):
    """One comparison: "holds", "fails", "unclear" or "missing"; in words; by how many runs a net; of which nets.

    nets: if it is missing, those that were not run.
    runs: the smallest number on a side; None for what is counted and depends on no seed.
    role: what it counts for. It "decides"; or is "needed", so that the claim is no more than partly reproduced where it
        does not hold; or is a "veto", which counts only where it fails.
    """

    outcome: str
    text: str
    runs: int | None = None
    nets: tuple[str, ...] = ()
    role: str = "decides"


class Measured(NamedTuple):
    """What is compared: how it is said of a net, how a record gives it, its unit and that of a difference.

    one_run: a difference of two single runs that says nothing. digits: behind the point.
    words: for a difference below and above.
    """

    says: str
    of: Callable
    unit: str = " %"
    points: str = " points"
    one_run: float = ONE_RUN
    digits: int = 2
    words: tuple[str, str] = ("lower", "higher")

    def compared(self, net, ours, other, theirs, notes):
        """In words, how the mean of a net's values compares to that of another's."""
        difference = mean_of(theirs) - mean_of(ours)
        apart = f"{abs(difference):,.{self.digits}f}{self.points} {self.words[difference < 0]} than"
        if round(abs(difference), self.digits) == 0:
            apart = "the same as"
        values = [f"{mean_of(values):,.{self.digits}f}{self.unit}" for values in (ours, theirs)]
        return f"{net} {self.says} {values[0]}, {apart} {other} with {values[1]} ({'; '.join(notes)})"


def _early(record):
    rows = record.history[record.history["iteration"] <= record.summary["iterations"] / 3]
    return rows["train_error"].mean()


def mean_response(layers):
    """The mean over all 3x3 layers of the standard deviation of their responses, at the end of training (Fig. 7)."""
    layers = layers[layers["kind"] == "3x3 conv"]
    return layers.loc[layers["iteration"] == layers["iteration"].max(), "response_std"].mean()


def mean_residual(layers):
    """The mean over all residual functions of their size relative to what the shortcut passes on, at the end."""
    return layers.loc[layers["iteration"] == layers["iteration"].max(), "residual_ratio"].mean()


def gradient_gain(layers):
    """By iteration, how many times larger the gradients of the first five 3x3 layers are than those of the last five.

    The ratio of geometric means of their norms; ``layers`` as of a record.
    """
    rows = layers[layers["kind"] == "3x3 conv"]
    logs = np.log(rows["gradient_norm"].clip(lower=1e-30)).groupby(rows["iteration"])
    return np.exp(logs.apply(lambda norms: norms.iloc[:5].mean(skipna=False) - norms.iloc[-5:].mean(skipna=False)))


def _beginning(record):
    """Iterations until the training error is below 80 %, where the paper ends a warm-up; all of them if it never is."""
    rows = record.history[record.history["train_error"] < 80]
    return rows["iteration"].min() if len(rows) else record.summary["iterations"]


def _warmup(record):
    """Iterations at the low rate; infinity if it never ended."""
    warm = record.history["lr"].cummax() < record.run.settings.lr
    return record.history.loc[warm, "iteration"].max() if not warm.all() else float("inf")


TRAINING = Measured("has a training error of", lambda record: record.summary["train_error"])
# On ImageNet that of the centre crop: what every run measures, while the paper's tables have that of ten crops.
TEST = Measured("has a test error of", lambda record: record.summary["test_error"])
EARLY = Measured("has in the first third of training a mean training error of", _early)
RESPONSE = Measured("has a mean response of", lambda record: mean_response(record.layers), "", "", 0.3)
RESIDUAL_SIZE = Measured(
    "has residual functions of a mean size, relative to the shortcuts, of",
    lambda record: mean_residual(record.layers),
    unit="",
    points="",
    one_run=0.05,
)
BEGINNING = Measured(
    "is below a training error of 80 % after",
    _beginning,
    unit=" iterations",
    points=" iterations",
    one_run=100,
    digits=0,
    words=("earlier", "later"),
)
WARMUP = Measured("is warmed up for", _warmup)


class Group:
    """The records of one set of conditions, by net; ``evaluations`` as of ``evaluate.evaluations``.

    A run that diverged has no errors, and a comparison with a net of which one did is unclear: what is left is a choice
    of the lucky ones.
    """

    def __init__(self, records, evaluations):
        self.records, self.evaluations = {}, evaluations
        kept, self.diverged = ended(records)
        for record in kept:
            self.records.setdefault(record.net, []).append(record)
        self.conditions = records[0].conditions
        self.family = "imagenet" if records[0].run.name.imagenet else "cifar"

    def depths(self, kind, wanted):
        return [depth for depth in wanted if self.run(f"{kind}-{depth}")]

    def run(self, net):
        """Whether a net was run, to whatever end."""
        return net in self.records or net in self.diverged

    def values(self, net, measured):
        """Of every run of a net, as far as it was measured."""
        values = [measured.of(record) for record in self.records.get(net, ())]
        return [float(value) for value in values if not pd.isna(value)]

    def lower(self, net, other, measured=TEST, role="decides"):
        """Check that the mean of a net is lower than that of another: "unclear" unless one of them clearly is."""

        def judged(ours, theirs, paired):
            difference = mean_of(theirs) - mean_of(ours)
            if min(len(ours), len(theirs)) > 1:
                low, high = shown = _interval(theirs, ours) if difference > 0 else _interval(ours, theirs)
                # Without any spread there is no interval: small counts of errors may well agree by chance.
                clear = low > 0 and (low < high or low > measured.one_run)
            else:
                # Two trained nets may well differ on these images, and yet by no more than two seeds of a net do.
                clear, shown = abs(difference) > measured.one_run and (paired is None or paired.all_differ), None
            return ("holds" if difference > 0 else "fails") if clear else "unclear", shown

        return self._compared(net, other, measured, role, judged)

    def alike(self, net, other, measured=TEST, within=ABOUT_EQUAL, role="decides"):
        """Check that the means of two nets differ by no more than ``within``, which single runs can only refute."""

        def judged(ours, theirs, paired):
            difference, several = mean_of(theirs) - mean_of(ours), min(len(ours), len(theirs)) > 1
            low, high = difference - measured.one_run, difference + measured.one_run
            if several:
                low, high = _interval(theirs, ours)
            outcome = "holds" if several and -within <= low and high <= within else "unclear"
            outcome = "fails" if low > within or high < -within else outcome
            return outcome, ((low, high) if difference > 0 else (-high, -low)) if several else None

        return self._compared(net, other, measured, role, judged)

    def _compared(self, net, other, measured, role, judged):
        """The check of two nets, whose outcome and interval, if there is one, ``judged`` gives."""
        ours, theirs = self.values(net, measured), self.values(other, measured)
        if not ours or not theirs:
            return self.missing(net, other)._replace(role=role)
        paired = self._paired(net, other) if measured is TEST else None
        outcome, interval = judged(ours, theirs, paired)
        notes = [counts(ours, theirs)]
        if interval is not None:
            notes.append("95 % interval {:,.{digits}f} to {:,.{digits}f}".format(*interval, digits=measured.digits))
        notes += [paired.text] if paired is not None else []
        lost = self.lost(net, other)
        text = measured.compared(net, ours, other, theirs, notes + lost)
        return Check("unclear" if lost else outcome, text, min(len(ours), len(theirs)), (net, other), role)

    def equal(self, net, other, name, role="decides"):
        """Check that two nets have the same count of something in their summaries."""
        words = name.replace("_", "-")
        if net not in self.records or other not in self.records:
            return self.missing(net, other)._replace(role=role)
        ours, theirs = (self.records[each][0].summary[name] for each in (net, other))
        text = f"{net} has {ours:,} {words}, {other} {'as many' if ours == theirs else f'{theirs:,}'}"
        return Check("holds" if ours == theirs else "fails", text, None, (net, other), role)

    def by_depth(self, kind, wanted, measured, falling):
        """Check the deepest net against the shallowest, and every net against the next one, which may only veto."""
        nets = [f"{kind}-{depth}" for depth in self.depths(kind, wanted)]
        ends = [f"{kind}-{wanted[0]}", f"{kind}-{wanted[-1]}"]
        absent = [net for net in ends if net not in nets]
        pairs = [(nets[0], nets[-1])] if len(nets) > 1 else []
        checks = [self.lower(*(pair[::-1] if falling else pair), measured) for pair in pairs]
        if absent:
            checks.append(self.missing(*absent))
        pairs = itertools.pairwise(nets) if len(nets) > 2 else ()
        return checks + [self.lower(*(pair[::-1] if falling else pair), measured, role="veto") for pair in pairs]

    def pair(self, depths):
        """The plain and the residual net of the deepest of these depths at which both were run, or else one of them."""
        names = [(f"plain-{depth}", f"resnet-{depth}") for depth in depths]
        return max(names, key=lambda pair: (sum(map(self.run, pair)), names.index(pair)))

    def mean(self, net, measured):
        return mean_of(self.values(net, measured))

    def layers(self, net):
        """Of every run of a net, the table of its layers, if these were measured."""
        return [record.layers for record in self.records.get(net, ()) if len(record.layers)]

    def lost(self, *nets):
        """In words, of which of these nets runs diverged."""
        counted = [(net, self.diverged[net]) for net in nets if net in self.diverged]
        return [f"{count} run{'s' if count > 1 else ''} of {net} diverged" for net, count in counted]

    def every(self, good, text, net, runs):
        """The check that something holds in every run of a net, as long as none diverged."""
        lost = self.lost(net)
        outcome = "unclear" if lost else "holds" if good else "fails"
        return Check(outcome, f"{text} ({'; '.join([counts(range(runs)), *lost])})", runs, (net,), "needed")

    def missing(self, *nets):
        """The check that has no values of one of these nets: unclear if that is because its runs diverged."""
        lost = [net for net in nets if net not in self.records and net in self.diverged]
        if lost and all(map(self.run, nets)):
            return Check("unclear", f"{' and '.join(self.lost(*lost))}, no other is there to compare", nets=tuple(nets))
        absent = tuple(net for net in nets if not self.run(net))
        text = f"not run: {', '.join(absent)}" if absent else f"not measured: {' or '.join(nets)}"
        return Check("missing", text, nets=absent)

    def _paired(self, net, other):
        """McNemar's exact test of every pair of runs with equal seeds, whose predictions are of the same images."""
        found, images = [], 0
        for one in self.records[net]:
            for two in self.records[other]:
                first, second = one.predictions, two.predictions
                if one.run.seed == two.run.seed and len(first) and first["label"].equals(second["label"]):
                    right, too = (table["predicted"] == table["label"] for table in (first, second))
                    only = int((right & ~too).sum()), int((~right & too).sum())
                    found.append(stats.binomtest(only[0], sum(only)).pvalue if sum(only) else 1.0)
                    images = len(first)
        if not found:
            return None
        differ = sum(value < 1 - CONFIDENCE for value in found)
        if len(found) == 1:
            value = f"= {found[0]:.2g}" if found[0] >= 1e-300 else "< 1e-300"  # as small as a float holds
            return Paired(differ, 1, f"paired test on the same {images:,} images: p {value}")
        text = f"paired tests on the same {images:,} images: p < 0.05 for {differ} of {len(found)} seeds"
        return Paired(differ, len(found), text)


class Paired(NamedTuple):
    """How many pairs of runs differ, of how many, in words."""

    differ: int
    pairs: int
    text: str

    @property
    def all_differ(self):
        return self.differ == self.pairs


def mean_of(values):
    return sum(values) / len(values)


def _interval(one, other):
    """The 95 % confidence interval of the difference of two means, variances not assumed equal (Welch)."""
    if len(set(one)) == len(set(other)) == 1:
        return (one[0] - other[0],) * 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # scipy's, where all values of one side are equal
        return tuple(map(float, stats.ttest_ind(one, other, equal_var=False).confidence_interval(CONFIDENCE)))


def interval_of_mean(values):
    """The 95 % confidence interval of a mean."""
    if len(set(values)) == 1:
        return values[0], values[0]
    return tuple(map(float, stats.ttest_1samp(values, 0).confidence_interval(CONFIDENCE)))


def counts(ours, theirs=None):
    """The numbers of runs in words."""
    if theirs is None:
        return "one run" if len(ours) == 1 else f"{len(ours)} runs"
    if len(ours) == len(theirs):
        return f"{counts(ours)} each"
    return f"{len(ours)} and {len(theirs)} runs"


def verdict(checks):
    """What checks amount to.

    Reproduced: all that decide or are needed hold, each by two runs a net or more, and there is no veto. Partly: some
    that decide hold, but by single runs, or with others missing, unclear or failed. Not reproduced: of those that
    decide some fail, none hold. Inconclusive: none hold or fail. Not attempted: none could be made.
    """
    deciding = {check.outcome for check in checks if check.role == "decides"}
    counted = [check for check in checks if check.role != "veto" or check.outcome == "fails"]
    if not deciding - {"missing"}:
        return "not attempted"
    if "holds" not in deciding:
        return "not reproduced" if "fails" in deciding else "inconclusive"
    sure = all(check.runs is None or check.runs > 1 for check in counted)
    return "reproduced" if {check.outcome for check in counted} == {"holds"} and sure else "partly"
