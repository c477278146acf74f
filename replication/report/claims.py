"""The criteria of the paper's claims, fixed here as a table of comparisons, and applied to the records alone."""

import itertools
import textwrap

import pandas as pd

from replication.paper import CLAIMS, MULTIPLY_ADDS, TABLE_8, WARMED_UP
from replication.recipes import SMOKE_TESTS
from replication.report import metrics
from replication.report.comparisons import (
    EQUAL,
    LOWER,
    NOT_HIGHER,
    PAPER,
    ROLES,
    WEIGHTS,
    Comparison,
    Condition,
    Finding,
    verdict,
)
from replication.report.tables import spelled
from replication.runs.records import by_conditions

THEIRS = "the paper's conditions"
NOTEBOOKS = {
    "1_architectures": (11,),
    "2_plain_vs_residual": (1, 3),
    "3_cifar_depths": (2, 8, 9),
    "4_shortcuts": (6,),
    "5_layer_responses": (5, 10),
    "6_imagenet": (4, 7, 12),
    "9_detection": (13,),
}
# By claim and family, the depths that N and "the deepest" may be: N is the depth with most of its nets run, of several
# the greatest; claims 1 and 2 compare the shallowest with the deepest net that was run, and each two neighbours.
ALL = {"cifar": (20, 32, 44, 56), "imagenet": (18, 34)}
DEEP = {"cifar": (32, 44, 56), "imagenet": (34,)}
SHALLOW = {"cifar": (20,), "imagenet": (18,)}
DEPTHS = {1: ALL, 2: ALL | {"cifar": (20, 32, 44, 56, 110)}, 3: DEEP, 4: SHALLOW, 5: DEEP, 6: ALL, 11: ALL}
VGG_16, RESNET_101 = (TABLE_8.errors[f"faster-rcnn-{net}"][1] for net in ("vgg-16", "resnet-101"))
BASE = "resnet-34 (with shortcut B, if that was run)"
CRITERIA = (
    Comparison(1, metrics.TRAINING, "the shallowest plain net", LOWER, "the deepest plain net"),
    Comparison(1, metrics.TRAINING, "the shallower plain net", NOT_HIGHER, "the deeper plain net"),
    Comparison(2, metrics.TEST, "the deepest residual net", LOWER, "the shallowest residual net"),
    Comparison(2, metrics.TEST, "the deeper residual net", NOT_HIGHER, "the shallower residual net"),
    Comparison(2, metrics.TRAINING, "the deepest residual net", LOWER, "the shallowest residual net"),
    Comparison(2, metrics.TRAINING, "the deeper residual net", NOT_HIGHER, "the shallower residual net"),
    Comparison(3, metrics.TEST, "resnet-N", LOWER, "plain-N"),
    Comparison(3, metrics.PARAMETERS, "resnet-N", EQUAL, "plain-N", supporting=True),
    Comparison(4, metrics.EARLY, "resnet-N", LOWER, "plain-N"),
    Comparison(4, metrics.TEST, "resnet-N", EQUAL, "plain-N", within=1, supporting=True),
    Comparison(5, metrics.LOWEST_GAIN, "plain-N", "at least", 0.01),
    Comparison(5, metrics.HIGHEST_GAIN, "plain-N", "at most", 100, supporting=True),
    # Behind batch norm, as it is initialized, what leaves a ReLU has a variance of 0.34.
    Comparison(5, metrics.LEAST_VARIANCE, "plain-N", "at least", 0.01, supporting=True),
    Comparison(6, metrics.TEST, "resnet-N-C", EQUAL, "resnet-N", baseline="plain-N"),
    Comparison(6, metrics.TEST, "resnet-N", LOWER, "plain-N", supporting=True),
    Comparison(6, metrics.TEST, "resnet-N-B", LOWER, "plain-N", supporting=True),
    Comparison(6, metrics.TEST, "resnet-N-C", LOWER, "plain-N", supporting=True),
    Comparison(6, metrics.TEST, "resnet-N-B", NOT_HIGHER, "resnet-N"),
    Comparison(6, metrics.TEST, "resnet-N-C", NOT_HIGHER, "resnet-N-B"),
    Comparison(7, metrics.TEST, "resnet-50", LOWER, BASE),
    Comparison(7, metrics.TEST, "resnet-101", LOWER, BASE),
    Comparison(7, metrics.TEST, "resnet-152", LOWER, BASE),
    Comparison(7, metrics.TEST, "resnet-101", NOT_HIGHER, "resnet-50"),
    Comparison(7, metrics.TEST, "resnet-152", NOT_HIGHER, "resnet-101"),
    Comparison(7, metrics.MULTIPLY_ADDS, "resnet-152", "below", MULTIPLY_ADDS["VGG-16"], supporting=True),
    Comparison(8, metrics.START, "resnet-110", LOWER, "resnet-110 without warm-up"),
    Comparison(8, metrics.TEST, "resnet-110", EQUAL, "resnet-110 without warm-up", within=1),
    Comparison(8, metrics.WARMUP, "resnet-110", "at most", 1000, supporting=True),
    Comparison(8, metrics.TEST, "resnet-110", EQUAL, WARMED_UP[0], within=0.5, supporting=True),
    Comparison(9, metrics.TEST, "resnet-110", LOWER, "resnet-1202"),
    Comparison(9, metrics.TRAINING, "resnet-1202", "below", 0.1, supporting=True),
    Comparison(10, metrics.RESPONSE, "resnet-20", LOWER, "plain-20"),
    Comparison(10, metrics.RESPONSE, "resnet-56", LOWER, "plain-56"),
    Comparison(10, metrics.RESPONSE, "resnet-56", LOWER, "resnet-20"),
    Comparison(10, metrics.RESPONSE, "resnet-110", LOWER, "resnet-56"),
    Comparison(10, metrics.RESIDUAL_SIZE, "resnet-56", NOT_HIGHER, "resnet-20"),
    Comparison(10, metrics.RESIDUAL_SIZE, "resnet-110", NOT_HIGHER, "resnet-56"),
    Comparison(11, metrics.PARAMETERS, "resnet-N", EQUAL, "plain-N"),
    Comparison(11, metrics.MULTIPLY_ADDS, "resnet-N", EQUAL, "plain-N"),
    Comparison(11, metrics.OPEN_SHORTCUTS, "resnet-N", "at least", 100, supporting=True),
    Comparison(13, metrics.PRECISION, "faster-rcnn-vgg-16", LOWER, "faster-rcnn-resnet-101"),
    Comparison(13, metrics.PRECISION, "faster-rcnn-vgg-16", EQUAL, VGG_16, within=2, supporting=True),
    Comparison(13, metrics.PRECISION, "faster-rcnn-resnet-101", EQUAL, RESNET_101, within=2, supporting=True),
)


NO_ROWS = {
    12: "Required: top-5 error, at five scales, of an ensemble of several depths lower than of each of its members.",
}


def criterion(number):
    """The criterion of a claim in words."""
    rows = [row for row in CRITERIA if row.claim == number]
    neighbours = {NOT_HIGHER: f"{ROLES[NOT_HIGHER]}, for any two neighbours"} if number in (1, 2) else {}
    roles = ROLES | neighbours
    parts = [(words, [row.in_words() for row in rows if row.role == role]) for role, words in roles.items()]
    text = NO_ROWS.get(number) or " ".join(f"{name}: {'; '.join(words)}." for name, words in parts if words)
    if "-N" in text:
        depths = " or ".join(f"{', '.join(map(str, each))} ({family})" for family, each in DEPTHS[number].items())
        text += f" N is the greatest depth that was run of {depths}."
    return spelled(text)


def comparisons(number, condition):
    """The rows of a claim with their nets filled in."""
    if (number == 13) != (condition.family == "detection"):
        return []
    rows = [row for row in CRITERIA if row.claim == number and (condition.as_paper or not row.papers_only)]
    if number not in DEPTHS:
        return [row.at(BASE, "resnet-34-B" if condition.has("resnet-34-B") else "resnet-34") for row in rows]
    depths = DEPTHS[number][condition.family]
    if number in (1, 2):
        return [filled for row in rows for filled in _trend(row, depths, condition)]
    filled = {depth: [row.at("-N", f"-{depth}") for row in rows] for depth in depths}
    nets_run = {depth: {net for row in filled[depth] for net in row.nets if condition.has(net)} for depth in depths}
    return filled[max(depths, key=lambda depth: (len(nets_run[depth]), depth))]


def _trend(row, depths, condition):
    """A row of claim 1 or 2 for both ends of its depths, or for all neighbours among those that were run.

    The net with the lower error is first: of plain nets the shallower, of residual nets the deeper.
    """
    kind = "plain" if row.claim == 1 else "resnet"
    run = [depth for depth in depths if condition.has(f"{kind}-{depth}")]
    pairs = dict.fromkeys([(run[0], run[-1]), (depths[0], depths[-1])]) if run else ()
    if row.kind == NOT_HIGHER:
        pairs = itertools.pairwise(run) if len(run) > 2 else ()
    nets = [[f"{kind}-{depth}" for depth in pair] for pair in pairs if pair[0] != pair[1]]
    return [row._replace(net=net, other=other) for net, other in (nets if row.claim == 1 else map(reversed, nets))]


def ensemble_findings(condition):
    """The finding of claim 12, whose errors are no run's: a list, empty where no such ensemble was tested."""
    tested = condition.evaluations.get("ensemble", {})
    names = tested.get("members") or ()
    members = [record for records in condition.records.values() for record in records if record.run.id in names]
    evaluations = [tested, *(member.evaluation for member in members)]
    error, *errors = (each.get("multi-scale", {}).get("top5") for each in evaluations)
    depths = {member.run.name.depth for member in members}
    if len(members) < len(names) or None in (error, *errors) or len(depths) < 2:
        return []
    best = f"its best member {min(errors):.2f} %"
    text = f"the ensemble of {len(members)} nets has a top-5 error of {error:.2f} %, {best}"
    outcome = "holds" if error < min(errors) else "fails"
    short = f"top-5 error: ensemble {error:.2f} %, {best} (n = 1)"
    return [Finding(outcome, f"{text} (one run each)", 1, tuple(member.net for member in members), short=short)]


def scorecard(records, evaluations=None):
    """Judge every claim of ``paper.CLAIMS``: a DataFrame with a row for each claim and set of conditions.

    records: finished runs of whatever conditions; smoke tests are left out. evaluations: as of
    ``evaluate.evaluations``, for the ensemble. Runs under different conditions are judged separately: first those under
    the paper's own (``as_paper``), for which every claim has a row, attempted or not, then others that say something.
    Columns: claim (number); of ``paper.Claim``: name, section, statement, printed, comparison; criterion, notebook,
    as_paper, conditions (in words), place (in short), verdict (one of ``comparisons.VERDICTS``), found (sentences),
    ours (its numbers in short), nets (name: number of runs), records (their ids).
    """
    groups = by_conditions([record for record in records if record.run.recipe not in SMOKE_TESTS])
    conditions = [(place, words, Condition(members, evaluations or {})) for place, words, members in groups]
    notebooks = {number: name for name, numbers in NOTEBOOKS.items() for number in numbers}
    rows = []
    for number, claim in CLAIMS.items():
        shared = {"claim": number} | claim._asdict()
        del shared["families"]
        shared |= {"criterion": criterion(number), "notebook": notebooks.get(number, "")}
        judged = [_judged(number, *each) for each in conditions]
        judged = [row for row in judged if row["verdict"] != "not attempted"]
        if not any(row["as_paper"] for row in judged):
            judged.append(_not_attempted(claim))
        rows += [shared | row for row in sorted(judged, key=lambda row: not row["as_paper"])]
    return pd.DataFrame(rows)


def findings(records, claims=tuple(CLAIMS)):
    """What records say about claims (their numbers): sentences, each claim's verdict first, what counts how last."""
    card, lines = scorecard(records), []
    for row in card[card["claim"].isin(claims) & (card["verdict"] != "not attempted")].itertuples():
        lines += [f"{row.name}: {row.verdict} ({row.conditions}).", *(f"  {sentence}" for sentence in row.found)]
    return (
        [*lines, *textwrap.wrap(WEIGHTS, 100)]
        if lines
        else ["These nets decide none of these claims: see the criteria in 7_scorecard."]
    )


def _judged(number, place, words, condition):
    """What a scorecard says of a claim under one set of conditions."""
    findings = [condition.judge(row) for row in comparisons(number, condition)]
    findings += ensemble_findings(condition) if number == 12 else []
    as_paper = condition.as_paper and condition.family in CLAIMS[number].families
    nets = {net: len(condition.records[net]) for each in findings for net in each.nets if net in condition.records}
    ids = [record.run.id for net in nets for record in condition.records[net]]
    row = {"as_paper": as_paper, "conditions": words, "place": place, "verdict": verdict(findings, as_paper)}
    return row | {"found": _sentences(findings), "ours": _in_short(findings), "nets": nets, "records": ids}


def _in_short(findings):
    """The numbers that decide: of the comparisons with each outcome the first, those of neighbours left out."""
    first = {}
    for each in findings:
        if each.short and each.role != NOT_HIGHER:
            first.setdefault(each.outcome, each.short)
    return "; ".join(first.values() if len(first) == 1 else [f"{text}: {outcome}" for outcome, text in first.items()])


def _sentences(findings):
    """What was found, a sentence for each comparison with its role, and one for all nets that were not run."""
    missing = [each for each in findings if each.outcome == "missing"]
    absent = dict.fromkeys(net for each in missing for net in each.nets)
    texts = [(each.role, each.sentence) for each in findings if each.outcome != "missing"]
    texts += [(each.role, each.text) for each in missing if each.text]
    texts = [f"{ROLES[role]}: {text[0].upper()}{text[1:]}" for role, text in dict.fromkeys(texts)]
    texts += [f"Not run: {', '.join(absent)}"] if absent else []
    return [f"{spelled(text)}." for text in texts]


def _not_attempted(claim):
    names = ["{dataset}, {iterations:,} iterations".format(**PAPER[family]) for family in claim.families]
    sentence = f"No run under the paper's conditions: {' or '.join(names)}."
    row = {"as_paper": True, "conditions": THEIRS, "place": THEIRS, "verdict": "not attempted", "found": [sentence]}
    return row | {"ours": "", "nets": {}, "records": []}
