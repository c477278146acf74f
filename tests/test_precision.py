"""Average precision, against cases computed by hand and against pycocotools."""

import numpy as np
import pytest

from replication.data.detection import Objects
from replication.detection import precision
from replication.detection.precision import Detections


def objects(*rows):
    """Of one image: (box, label) or (box, label, ignored)."""
    boxes = np.array([row[0] for row in rows], np.float32).reshape(-1, 4)
    ignored = np.array([len(row) > 2 and row[2] for row in rows], bool)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    return Objects(boxes, np.array([row[1] for row in rows], np.int64), ignored, areas)


def found(*rows):
    """Of one image: (box, label, score)."""
    boxes, labels, scores = ([row[place] for row in rows] for place in range(3))
    return Detections(np.array(boxes, np.float32).reshape(-1, 4), np.array(labels, np.int64), np.array(scores, float))


A, B, C, D = (0, 0, 10, 10), (20, 0, 30, 10), (40, 0, 50, 10), (60, 0, 70, 10)
ELSEWHERE = (100, 100, 110, 110)
CLASSES = ("cat", "dog")


def random_scenes(seed, images=12):
    """Objects in the squares of a grid, so that none overlaps another by half, and noisy detections of some of them.

    pycocotools rounds recalls that are multiples of 1/100 up or down. Here none is, but for 1: the numbers of objects
    of each class have no divisor in common with 100.
    """
    generator, there, detected = np.random.default_rng(seed), [], []
    every = generator.permutation(np.repeat([0, 1, 2], [13, 17, 21]))
    for labels in np.array_split(every, images):
        corners = 50.0 * generator.permutation(36)[: len(labels), None]
        corners = np.concatenate([corners // 300 * 50, corners % 300], 1)
        boxes = np.concatenate([corners, corners + generator.uniform(15, 45, corners.shape)], 1)
        there.append(objects(*zip(boxes, labels, generator.random(len(boxes)) < 0.2, strict=True)))
        rows = [
            (box + generator.normal(0, 2, 4), label if generator.random() < 0.8 else 0, generator.random())
            for box, label in zip(boxes, labels, strict=True)
            for _ in range(generator.integers(0, 3))
        ]
        rows += [((200, 200, 230, 230), int(generator.integers(3)), generator.random())]
        detected.append(found(*rows))
    return there, detected


def as_found(there, scores=None):
    return [
        Detections(each.boxes, each.labels, np.linspace(0.9, 0.1, len(each.labels)) if scores is None else scores)
        for each in there
    ]


def test_three_of_four_found_and_two_false_by_hand():
    """By score: right, wrong, right, wrong, right. Recall 1/4, 1/4, 2/4, 2/4, 3/4; precision 1, 1/2, 2/3, 1/2, 3/5.

    At recalls of 0, 0.1, 0.2: 1; 0.3, 0.4, 0.5: 2/3; 0.6, 0.7: 3/5; from 0.8 on: 0. The area: (1 + 2/3 + 3/5) / 4.
    """
    there = [objects((A, 0), (B, 0)), objects((A, 0), (B, 0))]
    one = found((A, 0, 0.9), (ELSEWHERE, 0, 0.8), (B, 0, 0.5))
    other = found((A, 0, 0.7), (ELSEWHERE, 0, 0.6))
    recall, accuracy = precision.recall_and_precision([one, other], there, 0)
    assert recall.tolist() == [0.25, 0.25, 0.5, 0.5, 0.75]
    assert accuracy == pytest.approx([1, 1 / 2, 2 / 3, 1 / 2, 3 / 5])
    assert precision.voc([one, other], there, CLASSES)["cat"] == pytest.approx(100 * (3 + 3 * 2 / 3 + 2 * 3 / 5) / 11)
    assert precision.voc([one, other], there, CLASSES, None)["cat"] == pytest.approx(100 * (1 + 2 / 3 + 3 / 5) / 4)


def test_classes_without_objects_are_left_out():
    there = [objects((A, 0), (B, 1, True))]
    assert precision.voc([found((A, 0, 0.9), (B, 1, 0.9))], there, CLASSES) == {"cat": 100}


def test_an_object_is_found_once():
    """Two of the same object: the second is wrong, also where another object overlaps it less."""
    there = [objects((A, 0), ((4, 0, 14, 10), 0))]
    recall, accuracy = precision.recall_and_precision([found((A, 0, 0.9), ((1, 0, 11, 10), 0, 0.8))], there, 0)
    assert recall.tolist() == [0.5, 0.5]
    assert accuracy.tolist() == [1, 0.5]


@pytest.mark.parametrize(("right", "holds"), [(20, True), (20.1, False)])
def test_an_overlap_of_exactly_a_half_suffices(right, holds):
    precisions = precision.voc([found(((0, 0, right, 10), 0, 0.9))], [objects((A, 0))], CLASSES)
    assert precisions == {"cat": 100 if holds else 0}


def test_difficult_objects_cost_nothing_whether_found_or_missed():
    there = [objects((A, 0), (B, 0, True), (C, 0))]
    for extra in ([], [(B, 0, 0.99)], [(B, 0, 0.99), (B, 0, 0.98)]):
        assert precision.voc([found((A, 0, 0.9), *extra, (C, 0, 0.5))], there, CLASSES) == {"cat": 100}


def test_only_objects_of_the_class_and_of_the_image_count():
    there = [objects((A, 0)), objects((A, 1))]
    assert precision.voc([found((A, 1, 0.9)), found((A, 0, 0.9))], there, CLASSES) == {"cat": 0, "dog": 0}


@pytest.mark.parametrize("points", [precision.POINTS, None])
def test_the_objects_themselves_are_perfect_detections(points):
    there, _ = random_scenes(0)
    assert set(precision.voc(as_found(there), there, "abc", points).values()) == {100}
    crowded = [each._replace(ignored=np.zeros_like(each.ignored)) for each in there]
    assert precision.coco(as_found(there), crowded, "abc") == pytest.approx((100, 100))


def test_nothing_detected_is_zero():
    there, nothing = [objects((A, 0)), objects()], [found(), found()]
    assert precision.summary(nothing, there, CLASSES) == {"map_voc07": 0, "map_voc": 0, "map_50": 0, "map_50_95": 0}


@pytest.mark.parametrize("seed", range(5))
def test_at_101_points_voc_agrees_with_pycocotools(seed):
    """COCO takes 101 recalls. Its rule for crowds is another one than VOC's for difficult objects: there are none."""
    there, detected = random_scenes(seed)
    there = [each._replace(ignored=np.zeros_like(each.ignored)) for each in there]
    ours = precision.voc(detected, there, "abc", points=101)
    assert np.mean(list(ours.values())) == pytest.approx(precision.coco(detected, there, "abc")[0], abs=1e-6)
    assert 20 < np.mean(list(ours.values())) < 99
    shuffled = [each._replace(labels=each.labels[::-1].copy()) for each in detected]
    theirs = precision.coco(shuffled, there, "abc")[0]
    assert np.mean(list(precision.voc(shuffled, there, "abc", points=101).values())) == pytest.approx(theirs, abs=1e-6)


def test_by_cocos_rules_a_looser_box_is_worth_less():
    """It overlaps its object by 8/10, so it counts at overlaps of 0.5 to 0.8: 7 of 10."""
    there = [objects((A, 0))]
    assert precision.coco([found(((0, 0, 8, 10), 0, 0.9))], there, CLASSES) == pytest.approx((100, 70))


def test_overlaps_of_boxes_without_an_area_are_zero():
    point = np.zeros((1, 4))
    assert precision.overlaps(point, point).tolist() == [[0]]


def test_without_an_object_that_counts_there_is_no_precision():
    there = [objects((A, 0, True)), objects()]
    detected = [found((A, 0, 0.9)), found((B, 0, 0.8))]
    assert precision.summary(detected, there, CLASSES) == dict.fromkeys(("map_voc07", "map_voc", "map_50", "map_50_95"))
