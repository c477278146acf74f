"""Which of the paper's claims were reproduced: criteria that are fixed here, applied to the records alone.

Each criterion is a function with its words as docstring; it gives the checks of a claim for the runs of one set of
conditions. ``comparisons.verdict`` says what checks amount to.
"""

from collections.abc import Callable
from typing import NamedTuple

import pandas as pd

from replication.paper import CLAIMS, MULTIPLY_ADDS, TABLE_2, TABLE_6, WARMED_UP
from replication.report.comparisons import (
    BEGINNING,
    EARLY,
    ONE_RUN,
    RESIDUAL_SIZE,
    RESPONSE,
    TEST,
    TRAINING,
    WARMUP,
    Check,
    Group,
    counts,
    gradient_gain,
    interval_of_mean,
    mean_of,
    verdict,
)
from replication.runs.records import by_conditions

LEAST_VARIANCE = 0.01  # of what enters a layer; what leaves a ReLU has 0.34 behind batch norm as it is initialized
EXTREME = 100  # times smaller than in the last layers gradients of the first ones vanish, that much larger they explode
PLAIN = {"cifar": (20, 32, 44, 56), "imagenet": (18, 34)}
RESIDUAL = {"cifar": (20, 32, 44, 56, 110), "imagenet": (18, 34)}
THEIRS = "the paper's conditions"
FULL = {"cifar": TABLE_6.conditions, "imagenet": TABLE_2.conditions}


def degradation(group):
    """The deepest plain net has a higher training error than the shallowest; no deeper net has a clearly lower one."""
    return group.by_depth("plain", PLAIN[group.family], TRAINING, falling=False)


def deeper_is_better(group):
    """The deepest residual net has lower test and training errors than the shallowest; no deeper one has clearly higher
    ones.
    """
    depths = RESIDUAL[group.family]
    return [check for error in (TEST, TRAINING) for check in group.by_depth("resnet", depths, error, falling=True)]


def residual_beats_plain(group):
    """The residual net has a lower test error than the plain net, at the greatest depth run; parameters are equal."""
    plain, residual = group.pair(PLAIN[group.family][1:])
    return [group.lower(residual, plain), group.equal(residual, plain, "parameters", role="veto")]


def shallow_converges_faster(group):
    """The residual net has a lower training error in the first third; needed: test errors differ by a point at most."""
    plain, residual = group.pair(PLAIN[group.family][:1])
    return [group.lower(residual, plain, EARLY), group.alike(residual, plain, role="needed")]


def nothing_vanishes(group):
    """At every measurement of every run of the deepest plain net, gradients of the first five 3x3 layers are a
    hundredth of those of the last five or more; needed: they are a hundred times as large or less, and what
    enters the layers has variances of 0.01 or more.
    """
    depths = PLAIN[group.family][1:]
    net = f"plain-{max(group.depths('plain', depths), default=depths[-1])}"
    tables = group.layers(net)
    if not tables:
        return [group.missing(net)]
    least = pd.concat([table.loc[table["kind"] == "3x3 conv", "signal_variance"] for table in tables]).min(skipna=False)
    gains = pd.concat([gradient_gain(table) for table in tables])
    low, high, n = gains.min(skipna=False), gains.max(skipna=False), len(tables)
    first = f"gradients of the first five 3x3 layers of {net}"
    found = [
        ("decides", low >= 1 / EXTREME, f"{first} are at least {_times(low)} times as large as of the last five"),
        ("needed", high <= EXTREME, f"{first} are at most {_times(high)} times as large as of the last five"),
        ("needed", least >= LEAST_VARIANCE, f"what enters a 3x3 layer of {net} has a variance of {least:.2g} at least"),
    ]
    return [group.every(good, text, net, n)._replace(role=role) for role, good, text in found]


def _times(ratio):
    return f"{ratio:,.0f}" if ratio >= 10 else f"{ratio:.2g}"


def shortcuts_alike(group):
    """A and C differ in test error by half of what A gains over the plain net or less; needed: A, B and C each have a
    lower one than the plain net; B has no clearly higher one than A, nor C than B.
    """
    nets = max(
        (
            (f"plain-{depth}", f"resnet-{depth}", f"resnet-{depth}-B", f"resnet-{depth}-C")
            for depth in PLAIN[group.family]
        ),
        key=lambda nets: sum(map(group.run, nets)),
    )
    plain, a, b, c = nets
    gain = max(0, group.mean(plain, TEST) - group.mean(a, TEST)) if {plain, a} <= set(group.records) else 0
    return [
        group.alike(c, a, within=gain / 2),
        *(group.lower(net, plain, role="needed") for net in (a, b, c)),
        group.lower(b, a, role="veto"),
        group.lower(c, b, role="veto"),
    ]


def deeper_than_34(group):
    """50, 101 and 152 layers each have a lower test error than 34 (with shortcut B, if it was run); 101 than 50 and 152
    than 101 no clearly higher one; 152 layers have fewer multiply-adds than VGG-16.
    """
    if group.family != "imagenet":
        return []
    base = "resnet-34-B" if group.run("resnet-34-B") else "resnet-34"
    checks = [group.lower(f"resnet-{depth}", base) for depth in (50, 101, 152)]
    checks += [group.lower(f"resnet-{deep}", f"resnet-{less}", role="veto") for less, deep in ((50, 101), (101, 152))]
    for record in group.records.get("resnet-152", ())[:1]:
        cost, vgg = record.summary["multiply_adds"], MULTIPLY_ADDS["VGG-16"]
        text = f"resnet-152 has {cost:,} multiply-adds, VGG-16 {vgg:,.0f}"
        checks.append(Check("holds" if cost < vgg else "fails", text, None, ("resnet-152",), role="veto"))
    return checks


def warmed_up(group):
    """Without its warm-up, ResNet-110 takes longer to a training error below 80 %, and its test error differs by a
    point at most; needed: the warm-up ends within 1,000 iterations, and in the paper's conditions the mean test
    error is within half a point of 6.61 %.
    """
    if group.family != "cifar":
        return []
    net, cold = "resnet-110", "resnet-110 without warm-up"
    checks = [group.lower(net, cold, BEGINNING), group.alike(net, cold)]
    lengths = group.values(net, WARMUP)
    if lengths:
        good, longest = max(lengths) <= 1000, f"{max(lengths):,.0f} iterations at most"
        text = f"the warm-up of {net} took {longest if max(lengths) < float('inf') else 'all of the training'}"
        checks.append(group.every(good, text, net, len(lengths)))
    if lengths and _as_paper(group):
        errors, (paper, deviation) = group.values(net, TEST), WARMED_UP
        wider = 0 if len(errors) > 1 else ONE_RUN
        low, high = interval_of_mean(errors)
        low, high = low - paper - wider, high - paper + wider
        inside, outside = max(abs(low), abs(high)) <= 0.5, low > 0.5 or high < -0.5
        text = f"{net} has a test error of {mean_of(errors):.2f} %, the paper's {paper} ± {deviation}"
        outcome = "unclear" if group.lost(net) else "holds" if inside else "fails" if outside else "unclear"
        checks.append(Check(outcome, f"{text} ({counts(errors)})", len(errors), (net,), "needed"))
    return checks


def overfitting(group):
    """ResNet-1202 has a higher test error than ResNet-110; needed: its training error is below 0.1 % in every run."""
    if group.family != "cifar":
        return []
    net, errors = "resnet-1202", group.values("resnet-1202", TRAINING)
    checks = [group.lower("resnet-110", net)]
    if errors:
        text = f"{net} has a training error of {max(errors):.2f} % at most"
        checks.append(group.every(max(errors) < 0.1, text, net, len(errors)))
    return checks


def responses_are_smaller(group):
    """The mean response of ResNet-20 is lower than plain-20's, ResNet-56's than plain-56's; of ResNet-56 than of
    ResNet-20, and of ResNet-110 than of ResNet-56. Relative to the shortcuts, residual functions are not clearly larger
    in the deeper net.
    """
    if group.family != "cifar":
        return []
    pairs = [
        ("resnet-20", "plain-20"),
        ("resnet-56", "plain-56"),
        ("resnet-56", "resnet-20"),
        ("resnet-110", "resnet-56"),
    ]
    checks = [group.lower(*pair, RESPONSE) for pair in pairs]
    return checks + [group.lower(*pair, RESIDUAL_SIZE, role="veto") for pair in pairs[2:]]


def shortcuts_are_free(group):
    """A plain and a residual net of equal depth have as many parameters and multiply-adds; needed: every block of the
    residual net adds its shortcut.
    """
    plain, residual = group.pair(PLAIN[group.family])
    checks = [group.equal(residual, plain, name) for name in ("parameters", "multiply_adds")]
    tables = group.layers(residual)
    if not tables:
        return [*checks, group.missing(residual)._replace(role="needed")]
    start = tables[0][tables[0]["iteration"] == 0]
    blocks, open_ones = start["name"].str.extract(r"(layer\d+\.\d+)")[0].nunique(), int(start["residual_ratio"].count())
    text = f"{open_ones} of {blocks} blocks of {residual} add their shortcut"
    return [*checks, Check("holds" if open_ones == blocks else "fails", text, None, (residual,), "needed")]


def ensemble_wins(group):
    """An ensemble of several depths has a lower top-5 error, at five scales, than each of its members."""
    found = group.evaluations.get("ensemble", {})
    own = {record.run.id: record for records in group.records.values() for record in records}
    members = [own.get(name) for name in found.get("members") or ()]
    scores = [member.evaluation.get("multi-scale", {}).get("top5") for member in members if member is not None]
    together = found.get("multi-scale", {}).get("top5")
    if None in (*members, *scores, together) or len({member.run.name.depth for member in members}) < 2:
        return []
    text = (
        f"the ensemble of {len(members)} nets has a top-5 error of {together:.2f} %, "
        f"its best member {min(scores):.2f} % (one run each)"
    )
    nets = tuple(member.net for member in members)
    return [Check("holds" if together < min(scores) else "fails", text, 1, nets)]


def detection(group):
    """None: detectors are not trained here."""
    return []


class Judge(NamedTuple):
    """What gives the checks of a claim for a ``Group``, its docstring being the criterion; the notebook of its runs."""

    checks: Callable
    notebook: str  # "" for none

    @property
    def criterion(self):
        return " ".join(self.checks.__doc__.split())


JUDGES = {
    1: Judge(degradation, "2_plain_vs_residual"),
    2: Judge(deeper_is_better, "3_cifar_depths"),
    3: Judge(residual_beats_plain, "2_plain_vs_residual"),
    4: Judge(shallow_converges_faster, "6_imagenet"),
    5: Judge(nothing_vanishes, "5_layer_responses"),
    6: Judge(shortcuts_alike, "4_shortcuts"),
    7: Judge(deeper_than_34, "6_imagenet"),
    8: Judge(warmed_up, "3_cifar_depths"),
    9: Judge(overfitting, "3_cifar_depths"),
    10: Judge(responses_are_smaller, "5_layer_responses"),
    11: Judge(shortcuts_are_free, "1_architectures"),
    12: Judge(ensemble_wins, "6_imagenet"),
    13: Judge(detection, ""),
}


def scorecard(records, evaluations=None):
    """Judge every claim of ``paper.CLAIMS``: a DataFrame with a row for each claim and set of conditions.

    records: finished runs of whatever conditions; smoke tests are left out. evaluations: as of
    ``evaluate.evaluations``, for the ensemble. Runs under different conditions are judged separately: first those under
    the paper's own (``as_paper``), which every claim has a row of, attempted or not, then others that say something.
    Columns: claim (number), name, section, statement, printed, comparison, criterion, notebook, as_paper, conditions
    (in words), place (the same in short), verdict (one of ``VERDICTS``), found (sentences), nets (name: number of
    runs), records (their ids).
    """
    groups = [
        (place, words, Group(members, evaluations or {}))
        for place, words, members in by_conditions([each for each in records if each.run.recipe != "smoke"])
    ]
    rows = []
    for number, claim in CLAIMS.items():
        judge = JUDGES[number]
        given = {"claim": number, "name": claim.name, "section": claim.section, "statement": claim.statement}
        given |= {"printed": claim.printed, "comparison": claim.comparison}
        given |= {"criterion": judge.criterion, "notebook": judge.notebook}
        judged = []
        for place, words, group in groups:
            checks = judge.checks(group)
            if verdict(checks) != "not attempted":
                as_paper = _as_paper(group) and group.family in claim.families
                nets = {net: len(group.records[net]) for check in checks for net in check.nets if net in group.records}
                ids = [record.run.id for net in nets for record in group.records[net]]
                row = {"as_paper": as_paper, "conditions": words, "place": place, "verdict": verdict(checks)}
                judged.append(given | row | {"found": _sentences(checks), "nets": nets, "records": ids})
        if not any(row["as_paper"] for row in judged):
            rows.append(given | _not_attempted(claim))
        rows += sorted(judged, key=lambda row: not row["as_paper"])
    return pd.DataFrame(rows)


def _sentences(checks):
    """What checks say and how they end, one sentence each, and one for all nets that were not run."""
    absent = dict.fromkeys(net for check in checks if check.outcome == "missing" for net in check.nets)
    texts = [f"{check.text}: {check.outcome}" for check in checks if check.outcome != "missing"]
    texts += [check.text for check in checks if check.outcome == "missing" and not check.nets]
    texts += [f"not run: {', '.join(absent)}"] if absent else []
    texts = [text.replace("resnet-", "ResNet-") for text in dict.fromkeys(texts)]
    return [f"{text[0].upper()}{text[1:]}." for text in texts]


def _as_paper(group):
    return FULL[group.family].items() <= group.conditions.items()


def _not_attempted(claim):
    names = ["{dataset}, {iterations:,} iterations".format(**FULL[family]) for family in claim.families]
    found = [f"No run under the paper's conditions: {' or '.join(names)}."] if names else ["Not trained here."]
    row = {"as_paper": True, "conditions": THEIRS, "place": THEIRS, "verdict": "not attempted", "found": found}
    return row | {"nets": {}, "records": []}
