"""The criteria of the paper's claims, fixed here as a table of comparisons, and applied to the records alone."""

import itertools

import pandas as pd

from replication.paper import CLAIMS, MULTIPLY_ADDS, WARMED_UP
from replication.report import metrics
from replication.report.comparisons import EQUAL, LOWER, NOT_HIGHER, PAPER, Comparison, Condition, Finding, verdict
from replication.runs.records import by_conditions

THEIRS = "the paper's conditions"
NOTEBOOKS = {
    "1_architectures": (11,),
    "2_plain_vs_residual": (1, 3),
    "3_cifar_depths": (2, 8, 9),
    "4_shortcuts": (6,),
    "5_layer_responses": (5, 10),
    "6_imagenet": (4, 7, 12),
}
# By claim and family, the depths that its placeholders stand for: "{shallowest}" and "{deepest}" of the nets that were
# run, "{shallower}" and "{deeper}" of each two neighbours, "{depth}" the one with most of its nets run, of several the
# greatest. "{base}" is resnet-34-B, or resnet-34 where that was not run.
DEPTHS = {
    1: {"cifar": (20, 32, 44, 56), "imagenet": (18, 34)},
    2: {"cifar": (20, 32, 44, 56, 110), "imagenet": (18, 34)},
    3: {"cifar": (32, 44, 56), "imagenet": (34,)},
    4: {"cifar": (20,), "imagenet": (18,)},
    5: {"cifar": (32, 44, 56), "imagenet": (34,)},
    6: {"cifar": (20, 32, 44, 56), "imagenet": (18, 34)},
    11: {"cifar": (20, 32, 44, 56), "imagenet": (18, 34)},
}
CRITERIA = (
    Comparison(1, metrics.TRAINING, "plain-{shallowest}", LOWER, "plain-{deepest}"),
    Comparison(1, metrics.TRAINING, "plain-{shallower}", NOT_HIGHER, "plain-{deeper}"),
    Comparison(2, metrics.TEST, "resnet-{deepest}", LOWER, "resnet-{shallowest}"),
    Comparison(2, metrics.TEST, "resnet-{deeper}", NOT_HIGHER, "resnet-{shallower}"),
    Comparison(2, metrics.TRAINING, "resnet-{deepest}", LOWER, "resnet-{shallowest}"),
    Comparison(2, metrics.TRAINING, "resnet-{deeper}", NOT_HIGHER, "resnet-{shallower}"),
    Comparison(3, metrics.TEST, "resnet-{depth}", LOWER, "plain-{depth}"),
    Comparison(3, metrics.PARAMETERS, "resnet-{depth}", EQUAL, "plain-{depth}", supporting=True),
    Comparison(4, metrics.EARLY, "resnet-{depth}", LOWER, "plain-{depth}"),
    Comparison(4, metrics.TEST, "resnet-{depth}", EQUAL, "plain-{depth}", within=1, supporting=True),
    Comparison(5, metrics.LOWEST_GAIN, "plain-{depth}", "at least", 0.01),
    Comparison(5, metrics.HIGHEST_GAIN, "plain-{depth}", "at most", 100, supporting=True),
    # Behind batch norm, as it is initialized, what leaves a ReLU has a variance of 0.34.
    Comparison(5, metrics.LEAST_VARIANCE, "plain-{depth}", "at least", 0.01, supporting=True),
    Comparison(6, metrics.TEST, "resnet-{depth}-C", EQUAL, "resnet-{depth}", baseline="plain-{depth}"),
    Comparison(6, metrics.TEST, "resnet-{depth}", LOWER, "plain-{depth}", supporting=True),
    Comparison(6, metrics.TEST, "resnet-{depth}-B", LOWER, "plain-{depth}", supporting=True),
    Comparison(6, metrics.TEST, "resnet-{depth}-C", LOWER, "plain-{depth}", supporting=True),
    Comparison(6, metrics.TEST, "resnet-{depth}-B", NOT_HIGHER, "resnet-{depth}"),
    Comparison(6, metrics.TEST, "resnet-{depth}-C", NOT_HIGHER, "resnet-{depth}-B"),
    Comparison(7, metrics.TEST, "resnet-50", LOWER, "{base}"),
    Comparison(7, metrics.TEST, "resnet-101", LOWER, "{base}"),
    Comparison(7, metrics.TEST, "resnet-152", LOWER, "{base}"),
    Comparison(7, metrics.TEST, "resnet-101", NOT_HIGHER, "resnet-50"),
    Comparison(7, metrics.TEST, "resnet-152", NOT_HIGHER, "resnet-101"),
    Comparison(7, metrics.MULTIPLY_ADDS, "resnet-152", "below", MULTIPLY_ADDS["VGG-16"], supporting=True),
    Comparison(8, metrics.START, "resnet-110", LOWER, "resnet-110 without warm-up"),
    Comparison(8, metrics.TEST, "resnet-110", EQUAL, "resnet-110 without warm-up", within=1),
    Comparison(8, metrics.WARMUP, "resnet-110", "at most", 1000, supporting=True),
    Comparison(8, metrics.TEST, "resnet-110", EQUAL, WARMED_UP[0], within=0.5, supporting=True, papers_only=True),
    Comparison(9, metrics.TEST, "resnet-110", LOWER, "resnet-1202"),
    Comparison(9, metrics.TRAINING, "resnet-1202", "below", 0.1, supporting=True),
    Comparison(10, metrics.RESPONSE, "resnet-20", LOWER, "plain-20"),
    Comparison(10, metrics.RESPONSE, "resnet-56", LOWER, "plain-56"),
    Comparison(10, metrics.RESPONSE, "resnet-56", LOWER, "resnet-20"),
    Comparison(10, metrics.RESPONSE, "resnet-110", LOWER, "resnet-56"),
    Comparison(10, metrics.RESIDUAL_SIZE, "resnet-56", NOT_HIGHER, "resnet-20"),
    Comparison(10, metrics.RESIDUAL_SIZE, "resnet-110", NOT_HIGHER, "resnet-56"),
    Comparison(11, metrics.PARAMETERS, "resnet-{depth}", EQUAL, "plain-{depth}"),
    Comparison(11, metrics.MULTIPLY_ADDS, "resnet-{depth}", EQUAL, "plain-{depth}"),
    Comparison(11, metrics.OPEN_SHORTCUTS, "resnet-{depth}", "at least", 100, supporting=True),
)


def criterion(number):
    """The criterion of a claim in words."""
    if number == 12:
        return (
            "Required: top-5 error, at five scales, of an ensemble of several depths lower than of each of its members."
        )
    rows = [row for row in CRITERIA if row.claim == number]
    if not rows:
        return "None: detectors are not trained here."
    neighbours = ", for any two neighbours" if number in (1, 2) else ""
    roles = {"required": "Required", "supporting": "Supporting"}
    roles[NOT_HIGHER] = f"Counts only if clearly violated{neighbours}"
    parts = [(words, [row.in_words() for row in rows if row.role == role]) for role, words in roles.items()]
    text = " ".join(f"{name}: {'; '.join(words)}." for name, words in parts if words)
    for placeholder in ("shallowest", "deepest", "shallower", "deeper"):
        for kind, words in (("plain", "plain"), ("resnet", "residual")):
            text = text.replace(f"{kind}-{{{placeholder}}}", f"the {placeholder} {words} net")
    if "{depth}" in text:
        depths = " or ".join(f"{', '.join(map(str, each))} ({family})" for family, each in DEPTHS[number].items())
        text += f" N is the greatest depth that was run of {depths}."
    base = "resnet-34 (with shortcut B, if that was run)"
    return text.replace("{depth}", "N").replace("{base}", base).replace("resnet-", "ResNet-")


def comparisons(number, condition):
    """The rows of a claim with their nets filled in."""
    rows = [row for row in CRITERIA if row.claim == number and (condition.as_paper or not row.papers_only)]
    if number not in DEPTHS:
        base = "resnet-34-B" if condition.has("resnet-34-B") else "resnet-34"
        return [row.at(base=base) for row in rows]
    depths = DEPTHS[number][condition.family]
    if "{depth}" not in rows[0].net:
        return [filled for row in rows for filled in _trend(row, depths, condition)]

    def nets_run(depth):
        return sum(map(condition.has, {net for row in rows for net in row.at(depth=depth).nets}))

    depth = max(depths, key=lambda depth: (nets_run(depth), depth))
    return [row.at(depth=depth) for row in rows]


def _trend(row, depths, condition):
    """A row of claim 1 or 2 for both ends of its depths, or for all neighbours among those that were run."""
    kind = row.net.partition("-")[0]
    run = [depth for depth in depths if condition.has(f"{kind}-{depth}")]
    if "deepest" in f"{row.net} {row.other}":
        ends = dict.fromkeys([(run[0], run[-1]), (depths[0], depths[-1])]) if run else ()
        return [row.at(shallowest=low, deepest=high) for low, high in ends if low != high]
    neighbours = itertools.pairwise(run) if len(run) > 2 else ()
    return [row.at(shallower=low, deeper=high) for low, high in neighbours]


def ensemble_findings(condition):
    """The finding of claim 12, whose errors are no run's: a list, empty where no such ensemble was tested."""
    tested = condition.evaluations.get("ensemble", {})
    own = {record.run.id: record for records in condition.records.values() for record in records}
    members = [own.get(name) for name in tested.get("members") or ()]
    errors = [member.evaluation.get("multi-scale", {}).get("top5") for member in members if member is not None]
    error = tested.get("multi-scale", {}).get("top5")
    if None in (*members, *errors, error) or len({member.run.name.depth for member in members}) < 2:
        return []
    text = (
        f"the ensemble of {len(members)} nets has a top-5 error of {error:.2f} %, its best member {min(errors):.2f} %"
    )
    outcome = "holds" if error < min(errors) else "fails"
    return [Finding(outcome, f"{text} (one run each)", 1, tuple(member.net for member in members))]


def scorecard(records, evaluations=None):
    """Judge every claim of ``paper.CLAIMS``: a DataFrame with a row for each claim and set of conditions.

    records: finished runs of whatever conditions; smoke tests are left out. evaluations: as of
    ``evaluate.evaluations``, for the ensemble. Runs under different conditions are judged separately: first those under
    the paper's own (``as_paper``), for which every claim has a row, attempted or not, then others that say something.
    Columns: claim (number), name, section, statement, printed, comparison, criterion, notebook, as_paper, conditions
    (in words), place (the same in short), verdict (one of ``comparisons.VERDICTS``), found (sentences), nets (name:
    number of runs), records (their ids).
    """
    conditions = [
        (place, words, Condition(members, evaluations or {}))
        for place, words, members in by_conditions([each for each in records if each.run.recipe != "smoke"])
    ]
    rows = []
    for number, claim in CLAIMS.items():
        shared = {"claim": number, "name": claim.name, "section": claim.section, "statement": claim.statement}
        shared |= {"printed": claim.printed, "comparison": claim.comparison}
        shared |= {"criterion": criterion(number), "notebook": _notebook(number)}
        judged = [_judged(number, *each) for each in conditions]
        judged = [row for row in judged if row["verdict"] != "not attempted"]
        if not any(row["as_paper"] for row in judged):
            judged.append(_not_attempted(claim))
        rows += [shared | row for row in sorted(judged, key=lambda row: not row["as_paper"])]
    return pd.DataFrame(rows)


def findings(records, claims=tuple(CLAIMS)):
    """What records say about claims (their numbers): sentences, each claim's verdict first."""
    card, lines = scorecard(records), []
    for row in card[card["claim"].isin(claims) & (card["verdict"] != "not attempted")].itertuples():
        lines += [f"{row.name}: {row.verdict} ({row.conditions}).", *(f"  {sentence}" for sentence in row.found)]
    return lines or ["These nets decide none of these claims: see the criteria in 7_scorecard."]


def _notebook(number):
    return next((name for name, numbers in NOTEBOOKS.items() if number in numbers), "")


def _judged(number, place, words, condition):
    """What a scorecard says of a claim under one set of conditions."""
    findings = [condition.judge(row) for row in comparisons(number, condition)]
    findings += ensemble_findings(condition) if number == 12 else []
    as_paper = condition.as_paper and condition.family in CLAIMS[number].families
    nets = {net: len(condition.records[net]) for each in findings for net in each.nets if net in condition.records}
    ids = [record.run.id for net in nets for record in condition.records[net]]
    row = {"as_paper": as_paper, "conditions": words, "place": place, "verdict": verdict(findings, as_paper)}
    return row | {"found": _sentences(findings), "nets": nets, "records": ids}


def _sentences(findings):
    """What was found, a sentence for each comparison, and one for all nets that were not run."""
    absent = dict.fromkeys(net for each in findings if each.outcome == "missing" for net in each.nets)
    texts = [f"{each.text}: {each.outcome}" for each in findings if each.outcome != "missing"]
    texts += [each.text for each in findings if each.outcome == "missing" and not each.nets]
    texts += [f"not run: {', '.join(absent)}"] if absent else []
    texts = [text.replace("resnet-", "ResNet-") for text in dict.fromkeys(texts)]
    return [f"{text[0].upper()}{text[1:]}." for text in texts]


def _not_attempted(claim):
    names = ["{dataset}, {iterations:,} iterations".format(**PAPER[family]) for family in claim.families]
    sentence = f"No run under the paper's conditions: {' or '.join(names)}." if names else "Not trained here."
    row = {"as_paper": True, "conditions": THEIRS, "place": THEIRS, "verdict": "not attempted", "found": [sentence]}
    return row | {"nets": {}, "records": []}
