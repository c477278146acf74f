"""How well objects are detected: average precision by the rules of PASCAL VOC and of MS COCO."""

import contextlib
import importlib.util
import io
from typing import NamedTuple

import numpy as np

POINTS = 11  # recalls at which VOC looked up to 2009, 0, 0.1, ..., 1; since then, the area under the curve


class Detections(NamedTuple):
    """What was detected in an image: boxes (n, 4) as of ``Objects``, labels (n,) from 0, scores (n,)."""

    boxes: np.ndarray
    labels: np.ndarray
    scores: np.ndarray


def overlaps(boxes, others):
    """Intersection over union of boxes (n, 4) with others (m, 4): (n, m). Where both have no area, 0."""
    corners = np.maximum(boxes[:, None, :2], others[None, :, :2]), np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    shared = np.clip(corners[1] - corners[0], 0, None).prod(2)
    areas = [(each[:, 2] - each[:, 0]) * (each[:, 3] - each[:, 1]) for each in (boxes, others)]
    union = areas[0][:, None] + areas[1][None] - shared
    return np.divide(shared, union, out=np.zeros_like(union), where=union > 0)


def recall_and_precision(detections, objects, label, overlap=0.5):
    """Of one class, by falling score: the recall and the precision of all detections up to each (VOC's devkit).

    detections, objects: a ``Detections`` and an ``Objects`` for each image. A detection is right if the object that it
    overlaps most is not taken by one before it and the overlap suffices. One that falls to an ignored object does not
    count, nor does such an object as missed. Both are empty where there is no object.
    """
    rows, count = [], 0
    for found, there in zip(detections, objects, strict=True):
        mine, theirs = found.labels == label, there.labels == label
        ignored, taken = there.ignored[theirs], set()
        count += int((~ignored).sum())
        scores = found.scores[mine]
        shares = overlaps(found.boxes[mine].astype(float), there.boxes[theirs].astype(float))
        for number in np.argsort(-scores, kind="stable"):
            best = int(shares[number].argmax()) if shares.shape[1] else None
            if best is None or shares[number, best] < overlap:
                rows.append((scores[number], False))
            elif not ignored[best]:
                rows.append((scores[number], best not in taken))
                taken.add(best)
    if not count:
        return np.empty(0), np.empty(0)
    scores, right = np.array(rows, dtype=float).reshape(-1, 2).T
    right = right[np.argsort(-scores, kind="stable")].cumsum()
    return right / count, right / np.arange(1, len(right) + 1)


def average_precision(recall, precision, points=None):
    """The mean, over so many equidistant recalls from 0 to 1, of the best precision at that recall or more.

    Without ``points``, the area under that curve.
    """
    best = np.maximum.accumulate(precision[::-1])[::-1]  # at each recall or more
    if points is None:
        return float((np.diff(recall, prepend=0) * best).sum())
    places = np.searchsorted(recall, np.arange(points) / (points - 1))
    return float(np.append(best, 0)[places].mean())


def curves(detections, objects, classes, overlap=0.5):
    """``recall_and_precision`` of each class, {class: curve}; classes without objects that count are left out."""
    return {
        name: recall_and_precision(detections, objects, label, overlap)
        for label, name in enumerate(classes)
        if any((~each.ignored & (each.labels == label)).any() for each in objects)
    }


def voc(detections, objects, classes, points=POINTS, overlap=0.5):
    """Average precision of each class in percent, {class: AP}, by VOC's rules; classes without objects are left out."""
    found = curves(detections, objects, classes, overlap)
    return {name: 100 * average_precision(*curve, points) for name, curve in found.items()}


def has_coco():
    """Whether pycocotools is there, which measures by COCO's rules."""
    return importlib.util.find_spec("pycocotools") is not None


def coco(detections, objects, classes):
    """mAP@.5 and mAP@[.5, .95] in percent, by COCO's own pycocotools; ignored objects are its crowds.

    Both are None where no object counts.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth, rows = COCO(), []
    truth.dataset = {"info": {}, "images": [{"id": image} for image in range(1, len(objects) + 1)], "annotations": []}
    truth.dataset["categories"] = [{"id": label, "name": name} for label, name in enumerate(classes, start=1)]
    for image, (found, there) in enumerate(zip(detections, objects, strict=True), start=1):
        for box, label, ignored, area in zip(*there, strict=True):
            values = {"image_id": image, "category_id": int(label) + 1, "iscrowd": int(ignored), "area": float(area)}
            number = len(truth.dataset["annotations"]) + 1
            truth.dataset["annotations"].append({"id": number, "bbox": _sides(box)} | values)
        for box, label, score in zip(*found, strict=True):
            rows.append([image, *_sides(box), float(score), int(label) + 1])
    if all(there.ignored.all() for there in objects):
        return None, None
    if not rows:
        return 0.0, 0.0
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(np.array(rows)), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return 100 * float(evaluation.stats[1]), 100 * float(evaluation.stats[0])


def _sides(box):
    """Left, top, width and height of a box."""
    left, top, right, bottom = map(float, box)
    return [left, top, right - left, bottom - top]


def summary(detections, objects, classes):
    """The numbers of Tables 7 and 8 in percent, by the names of a run's summary.

    ``map_voc07``: mean of the 11-point APs; ``map_voc``: of the areas; ``map_50`` and ``map_50_95``: COCO's, None where
    pycocotools is missing.
    """
    means, found = {}, curves(detections, objects, classes).values()
    for name, points in (("map_voc07", POINTS), ("map_voc", None)):
        precisions = [100 * average_precision(*curve, points) for curve in found]
        means[name] = float(np.mean(precisions)) if precisions else None
    theirs = coco(detections, objects, classes) if has_coco() else (None, None)
    return means | dict(zip(("map_50", "map_50_95"), theirs, strict=True))
