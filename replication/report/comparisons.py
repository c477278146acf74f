"""How nets are compared, by rows such as "test error of resnet-56 lower than that of plain-56"; what rows add up to.

All rows are judged by the same rule. Between nets of several runs each, a 95 % confidence interval of the difference of
their means decides (Welch: variances not assumed equal). Where a net has only one run, the difference must exceed the
fixed threshold of its metric.
"""

import operator
import warnings
from statistics import fmean
from typing import NamedTuple

import pandas as pd
from scipy import stats

from replication.paper import TABLE_2, TABLE_6, TABLE_8
from replication.report.metrics import Metric
from replication.runs.records import ended

CONFIDENCE = 0.95
PAPER = {"cifar": TABLE_6.conditions, "imagenet": TABLE_2.conditions, "detection": TABLE_8.conditions}
LOWER, NOT_HIGHER, EQUAL = "lower than", "not higher than", "equal to"
BOUNDS = {"at least": operator.ge, "at most": operator.le, "below": operator.lt}


class Comparison(NamedTuple):
    """A row of the criterion of a claim (its number): ``metric`` of ``net`` is ``kind`` that of ``other``.

    kind: ``LOWER``; ``NOT_HIGHER``, which counts only where the net is clearly higher; ``EQUAL`` but for ``within``; or
        one of ``BOUNDS``, which every run of the net must satisfy.
    other: the name of a net, or a number: of ``BOUNDS``, or printed in the paper.
    baseline: a net; if given, ``within`` is half of what ``other`` gains over it.
    supporting: without it the claim is only partly reproduced, but it does not decide by itself.
    """

    claim: int
    metric: Metric
    net: str
    kind: str
    other: str | float
    within: float = 0
    baseline: str = ""
    supporting: bool = False

    @property
    def role(self):
        return NOT_HIGHER if self.kind == NOT_HIGHER else "supporting" if self.supporting else "required"

    @property
    def papers_only(self):
        """Whether it compares with a number that the paper prints, which is left out under all other conditions."""
        return self.kind == EQUAL and not isinstance(self.other, str)

    @property
    def nets(self):
        return tuple(net for net in (self.net, self.other, self.baseline) if net and isinstance(net, str))

    def at(self, old, new):
        """The same row, with ``new`` in place of ``old`` in the names of its nets."""
        texts = {name: text for name, text in self._asdict().items() if isinstance(text, str)}
        return self._replace(**{name: text.replace(old, new) for name, text in texts.items()})

    def in_words(self):
        text = f"{self.metric.name} of {self.net} {self.kind} "
        text += f"that of {self.other}" if isinstance(self.other, str) else self.metric.shown(self.other)
        if self.baseline:
            text += f" within half of what {self.other} gains over {self.baseline}"
        elif self.within:
            text += f" within {self.within} point{'s' if self.within != 1 else ''}"
        return text + (" (under the paper's conditions)" if self.papers_only else "")


class Finding(NamedTuple):
    """The outcome of a comparison: "holds", "fails", "unclear" or "missing"; in words; of which nets.

    runs: the smallest number of runs of a net; None where the seed does not matter.
    nets: those compared; of what is missing, those that were not run.
    role: "required", "supporting" or ``NOT_HIGHER``.
    short: the numbers alone, and over how many runs.
    """

    outcome: str
    text: str
    runs: int | None = None
    nets: tuple[str, ...] = ()
    role: str = "required"
    short: str = ""

    @property
    def sentence(self):
        """The text with its outcome; what need not hold, but counts if clearly violated, is not said to hold."""
        outcome = self.outcome
        if self.role == NOT_HIGHER:
            outcome = {"holds": "not clearly violated", "fails": "clearly violated"}.get(outcome, outcome)
        return f"{self.text}: {outcome}"


class Condition:
    """The records of runs under the same conditions, by net; ``evaluations`` as of ``evaluate.evaluations``.

    Runs that diverged have no errors and are counted in ``diverged``, by net.
    """

    def __init__(self, records, evaluations):
        self.records, self.evaluations = {}, evaluations
        finite, self.diverged = ended(records)
        for record in finite:
            self.records.setdefault(record.net, []).append(record)
        run = records[0].run
        self.family = "detection" if run.detects else "imagenet" if run.name.imagenet else "cifar"
        self.as_paper = PAPER[self.family].items() <= records[0].conditions.items()

    def has(self, net):
        """Whether a net was run, diverged or not."""
        return net in self.records or net in self.diverged

    def judge(self, row):
        """The ``Finding`` of a ``Comparison``. Where a run of one of its nets diverged, it is unclear: the others are
        the lucky ones.
        """
        metric, nets = row.metric, row.nets
        if absent := tuple(net for net in nets if not self.has(net)):
            return Finding("missing", "", nets=absent, role=row.role)
        measured = {net: map(metric.of, self.records.get(net, ())) for net in nets}
        values = {net: [float(value) for value in each if not pd.isna(value)] for net, each in measured.items()}
        counts = [(net, self.diverged[net]) for net in nets if net in self.diverged]
        diverged = [f"{count} run{'s' if count > 1 else ''} of {net} diverged" for net, count in counts]
        if not all(values.values()):
            if not diverged:
                return Finding("missing", f"{metric.name} not measured: {' or '.join(nets)}", role=row.role)
            text = f"{' and '.join(diverged)}, so there is no {metric.name} to compare"
            return Finding("unclear", text, nets=nets, role=row.role)
        outcome, text, notes = _bounded(row, values) if row.kind in BOUNDS else _compared(row, values)
        notes = [_counts(values)] * metric.seeded + notes + diverged
        text += f" ({'; '.join(notes)})" if notes else ""
        runs = min(map(len, values.values())) if metric.seeded else None
        return Finding("unclear" if diverged else outcome, text, runs, nets, row.role, _in_short(row, values))


def _in_short(row, values):
    """The numbers of a row alone: means, or of a bound the worst run."""
    of = fmean if row.kind not in BOUNDS else _worst(row)
    numbers = ", ".join(f"{net} {row.metric.shown(of(each))}" for net, each in values.items())
    counts = ", ".join(dict.fromkeys(str(len(each)) for each in values.values()))
    return f"{row.metric.name}: {numbers}" + (f" (n = {counts})" if row.metric.seeded else "")


def _worst(row):
    return min if row.kind == "at least" else max


def _bounded(row, values):
    """Outcome, text and notes of a row whose bound every run must satisfy; the text gives the worst of them."""
    worst = _worst(row)(values[row.net])
    text = f"the {row.metric.name} of {row.net} is {row.metric.shown(worst)}"
    outcome = "holds" if BOUNDS[row.kind](worst, row.other) else "fails"
    return outcome, text, [f"{row.kind} {row.metric.shown(row.other)} required"]


def _compared(row, values):
    """Outcome, text and notes of a row that compares a net with another one, or with a number of the paper's."""
    metric, ours, theirs = row.metric, values[row.net], values.get(row.other, [row.other])
    difference, within, gain, notes = fmean(ours) - fmean(theirs), row.within, "", []
    low, high = difference - metric.one_run, difference + metric.one_run
    if several := metric.seeded and min(map(len, values.values())) > 1:
        low, high = _interval(ours, theirs)
        ends = [metric.shown(end, "") for end in ((low, high) if difference > 0 else (-high, -low))]
        notes.append(f"95 % interval {' to '.join(ends)}")
    if row.baseline:
        within = max(0, fmean(values[row.baseline]) - fmean(theirs)) / 2
        gain = f", half of the gain over {row.baseline},"
    if row.kind == EQUAL and metric.seeded:
        notes.append(f"at most {metric.shown(within, metric.points)}{gain} required")
    apart = f"{metric.shown(abs(difference), metric.points)} {'lower' if difference < 0 else 'higher'} than"
    if metric.shown(abs(difference)) == metric.shown(0):
        apart = "the same as"
    text = f"the {metric.name} of {row.net} is {metric.shown(fmean(ours))}, {apart} the {metric.shown(fmean(theirs))}"
    text += f" of {row.other if isinstance(row.other, str) else 'the paper'}"
    return _outcome(row, low, high, within, several), text, notes


def _outcome(row, low, high, within, several):
    """What the interval of a difference says; single runs can refute that two nets are equal, but never show it."""
    if row.kind == EQUAL:
        if low > within or high < -within:
            return "fails"
        return "holds" if (several or not row.metric.seeded) and -within <= low and high <= within else "unclear"
    if low == high:  # no spread at all: small counts of errors may agree by chance
        low, high = low - row.metric.one_run, high + row.metric.one_run
    if row.kind == NOT_HIGHER:
        return "fails" if low > 0 else "holds"
    return "holds" if high < 0 else "fails" if low > 0 else "unclear"


def _counts(values):
    """The numbers of runs in words."""
    *numbers, last = map(len, values.values())
    words = "one run" if last == 1 else f"{last} runs"
    if set(numbers) <= {last}:
        return f"{words} each" if numbers else words
    return f"{', '.join(map(str, numbers))} and {words}"


def _interval(ours, theirs):
    """The 95 % confidence interval of the difference of two means, or of a mean from the only value of ``theirs``."""
    if len(theirs) == 1:
        return tuple(end - theirs[0] for end in interval_of_mean(ours))
    if len(set(ours)) == len(set(theirs)) == 1:
        return (ours[0] - theirs[0],) * 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # scipy's, where all values of one side are equal
        return tuple(map(float, stats.ttest_ind(ours, theirs, equal_var=False).confidence_interval(CONFIDENCE)))


def interval_of_mean(values):
    """The 95 % confidence interval of a mean."""
    if len(set(values)) == 1:
        return values[0], values[0]
    return tuple(map(float, stats.ttest_1samp(values, 0).confidence_interval(CONFIDENCE)))


# Under the paper's conditions; under all others nothing can be reproduced, only be consistent with the paper or not.
AS_PAPER = ("reproduced", "partly", "not reproduced")
ELSEWHERE = ("consistent", "mixed", "inconsistent")
VERDICTS = (*AS_PAPER, *ELSEWHERE, "inconclusive", "not attempted")
ROLES = {"required": "Required", "supporting": "Supporting", NOT_HIGHER: "Counts only if clearly violated"}
WEIGHTS = (
    "Required comparisons decide: where none of them holds or fails, a claim is inconclusive. It is at most partly "
    "reproduced, or mixed, where runs are single, a net is missing, a supporting comparison does not hold, or one that "
    "counts only if clearly violated is. Unclear: the runs are too few or differ too much to tell, or one diverged."
)
RULES = (
    "Reproduced: all required and supporting comparisons of a criterion hold, each over at least two runs per net. "
    "Partly: some required ones hold, but with single runs, or with others missing, unclear or failed. Not reproduced: "
    f"some required ones fail and none hold. {WEIGHTS} These words are for the paper's own conditions. Runs under "
    "other conditions (fewer iterations, other images, other nets) are judged by the same criteria, but separately: as "
    "consistent with the claim, mixed, or inconsistent with it."
)


def verdict(findings, as_paper):
    """What the findings of a claim add up to, one of ``VERDICTS``; see ``RULES``."""
    required = {each.outcome for each in findings if each.role == "required"}
    yes, partly, no = AS_PAPER if as_paper else ELSEWHERE
    if required <= {"missing"}:
        return "not attempted"
    if "holds" not in required:
        return no if "fails" in required else "inconclusive"
    counted = [each for each in findings if each.role != NOT_HIGHER or each.outcome == "fails"]
    certain = all(each.outcome == "holds" and (each.runs is None or each.runs > 1) for each in counted)
    return yes if certain else partly
