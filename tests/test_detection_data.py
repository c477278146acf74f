"""Data sets of detectors in the layouts of PASCAL VOC and MS COCO."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from replication import data
from replication.data import detection

OBJECT = "<object><name>{name}</name>{more}<bndbox>{box}</bndbox></object>"


def corners(*values):
    return "".join(
        f"<{tag}>{value}</{tag}>" for tag, value in zip(("xmin", "ymin", "xmax", "ymax"), values, strict=True)
    )


def thing(name, *box, difficult=None):
    more = "" if difficult is None else f"<difficult>{difficult}</difficult>"
    return OBJECT.format(name=name, box=corners(*box), more=more)


CAT = thing("cat", 1, 1, 5, 5)


def write_voc(folder, scenes, year=2007):
    """``scenes``: {image set: {name: objects in XML}}; every image is 40x30, its red channel its place."""
    place = folder / "VOCdevkit" / f"VOC{year}"
    for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (place / name).mkdir(parents=True)
    for image_set, images in scenes.items():
        (place / "ImageSets" / "Main" / f"{image_set}.txt").write_text("".join(f"{name}\n" for name in images))
        for number, (name, things) in enumerate(images.items()):
            Image.new("RGB", (40, 30), (10 * number, 0, 0)).save(place / "JPEGImages" / f"{name}.jpg")
            (place / "Annotations" / f"{name}.xml").write_text(f"<annotation><size/>{things}</annotation>")
    return place


def write_coco(folder, annotations, images=2):
    """The same annotations for both parts, of images of 40x30."""
    (folder / "annotations").mkdir(parents=True)
    for part in ("train2014", "val2014"):
        (folder / part).mkdir()
        listed = [{"id": 7 * number, "file_name": f"{number}.jpg"} for number in range(1, images + 1)]
        for each in listed:
            Image.new("RGB", (40, 30)).save(folder / part / each["file_name"])
        content = {"images": listed, "annotations": annotations}
        content["categories"] = [{"id": 90, "name": "dog"}, {"id": 3, "name": "cat"}]
        (folder / "annotations" / f"instances_{part}.json").write_text(json.dumps(content))


def annotation(number, image, box, category=3, **more):
    return {"id": number, "image_id": image, "bbox": box, "category_id": category, "area": 5, **more}


def test_vocs_corners_are_pixels_counted_from_one_and_both_inside(tmp_path):
    """A box from pixel 1 to pixel 10 is 10 pixels wide; difficult objects are marked, and may lie in parts."""
    things = thing("cat", 1, 2, 10, 20) + thing("dog", 5, 5, 5, 5, difficult=1)
    scenes = {
        "trainval": {"a": things, "b": thing("dog", 2, 2, 9, 9)},
        "test": {"c": thing("cat", 1, 1, 40, 30, difficult=0), "d": ""},
    }
    write_voc(tmp_path / "voc-pets", scenes)
    loaded = data.load("voc-pets", tmp_path)
    assert loaded.classes == ("cat", "dog")
    first = loaded.train.labels[0]
    assert first.boxes.tolist() == [[0, 1, 10, 20], [4, 4, 5, 5]]
    assert (first.labels.tolist(), first.ignored.tolist()) == ([0, 1], [False, True])
    assert first.to_learn().labels.tolist() == [0]
    assert [len(each.labels) for each in loaded.test.labels] == [1, 0]  # an image without objects is tested


def test_training_images_without_anything_to_learn_are_left_out(tmp_path):
    scenes = {"trainval": {"a": "", "b": thing("cat", 1, 1, 5, 5, difficult=1), "c": CAT}}
    write_voc(tmp_path / "voc-pets", scenes | {"test": {"d": CAT}})
    loaded = data.load("voc-pets", tmp_path)
    assert [path.split("/")[-1] for path in loaded.train.paths] == ["c.jpg"]


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        ({"difficult": 1}, {}, "no training image in .* has an object to learn"),
        ({}, {"difficult": 1}, "no test image in .* has an object that counts"),
    ],
)
def test_parts_without_anything_to_learn_or_to_find_are_refused(train, test, message, tmp_path):
    scenes = {"trainval": {"a": thing("cat", 1, 1, 5, 5, **train)}, "test": {"b": thing("cat", 1, 1, 5, 5, **test)}}
    write_voc(tmp_path / "voc-pets", scenes | {"test": scenes["test"] | {"c": ""}})
    with pytest.raises(ValueError, match=f"^dataset 'voc-pets': {message}"):
        data.load("voc-pets", tmp_path)


def test_voc_has_both_years_and_twenty_classes(tmp_path):
    write_voc(tmp_path, {"trainval": {"a": thing("person", 1, 1, 5, 5)}, "test": {"b": thing("cow", 1, 1, 5, 5)}})
    write_voc(tmp_path, {"trainval": {"c": thing("sofa", 1, 1, 5, 5)}}, 2012)
    loaded = data.load("voc", tmp_path)
    assert len(loaded.classes) == 20
    assert [loaded.classes[each.labels[0]] for each in loaded.train.labels] == ["person", "sofa"]
    assert loaded.test.paths.tolist() == ["VOCdevkit/VOC2007/JPEGImages/b.jpg"]
    assert data.present("voc", tmp_path)
    assert not data.present("voc", tmp_path / "elsewhere")


def test_coco_has_crowds_boxes_without_a_side_and_numbers_of_classes_with_gaps(tmp_path):
    listed = [
        annotation(1, 7, [1, 2, 10, 20], 90),
        annotation(2, 7, [0, 0, 40, 30], iscrowd=1),
        annotation(3, 7, [5, 5, 0, 8]),
    ]
    write_coco(tmp_path / "coco-pets", listed)
    loaded = data.load("coco-pets", tmp_path)
    assert loaded.classes == ("cat", "dog")
    (first,) = loaded.train.labels  # the second image has nothing to learn
    assert first.boxes.tolist() == [[1, 2, 11, 22], [0, 0, 40, 30], [5, 5, 5, 13]]
    assert (first.labels.tolist(), first.ignored.tolist()) == ([1, 0, 0], [False, True, False])
    assert first.areas.tolist() == [5, 5, 5]
    assert first.to_learn().labels.tolist() == [1]
    assert [len(each.labels) for each in loaded.test.labels] == [3, 0]


@pytest.mark.parametrize(
    ("things", "message"),
    [
        (thing("cat", 9, 1, 5, 5), r"a\.xml, object 1: box 9, 1 to 5, 5: the first corner must be the upper left"),
        (CAT + thing("cat", 0, 1, 5, 5), r"a\.xml, object 2: box 0, 1 to 5, 5: corners are counted from 1"),
        (CAT + thing("cat", 1, 1, 41, 30), r"a\.xml, object 2: left 0, top 0, right 41, .* the image of 40x30 pixels"),
        (CAT + thing("cat", 30, 2, 39, 31), r"a\.xml, object 2: .* bottom 31, from 0, is not within the image"),
        (thing("cat", 1, 1, "x", 5), r"a\.xml, object 1: could not convert string to float: 'x'"),
        ("<object><name>cat</name></object>", r"a\.xml, object 1: 'bndbox' is missing"),
        ("<object>", r"a\.xml is no annotation \(mismatched tag"),
    ],
)
def test_bad_annotations_of_voc_are_named_with_their_object(things, message, tmp_path):
    write_voc(tmp_path / "voc-pets", {"trainval": {"a": things, "b": CAT}, "test": {"c": ""}})
    with pytest.raises(ValueError, match=message):
        data.load("voc-pets", tmp_path)


def test_a_class_that_only_test_images_have_is_named(tmp_path):
    scenes = {"trainval": {"a": CAT}, "test": {"b": thing("cow", 1, 1, 5, 5)}}
    write_voc(tmp_path / "voc-pets", scenes)
    with pytest.raises(ValueError, match=r"b\.xml, object 1: name 'cow' is none of cat"):
        data.load("voc-pets", tmp_path)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"bbox": [1, 2, -3, 4]}, r"instances_train2014\.json, annotation 5 of 1\.jpg: bbox .* must be 0 or more"),
        ({"bbox": [1, 2, 40.5, 4]}, r"annotation 5 of 1\.jpg: left 1, top 2, right 41\.5, bottom 6, from 0, is not"),
        ({"bbox": [1, -1.5, 3, 4]}, r"annotation 5 of 1\.jpg: left 1, top -1\.5, .* the image of 40x30 pixels"),
        ({"bbox": [1, 2]}, r"annotation 5 of 1\.jpg: not enough values"),
        ({"category_id": 4}, r"annotation 5 of 1\.jpg: 4 is missing"),
    ],
)
def test_bad_annotations_of_coco_are_named_with_their_number(changed, message, tmp_path):
    write_coco(tmp_path / "coco-pets", [annotation(1, 7, [1, 2, 3, 4]), annotation(5, 7, [1, 2, 3, 4]) | changed])
    with pytest.raises(ValueError, match=message):
        data.load("coco-pets", tmp_path)


def test_a_pixel_beyond_the_edge_is_tolerated_in_coco(tmp_path):
    write_coco(tmp_path / "coco-pets", [annotation(1, 7, [-0.5, 0, 41.5, 31])])
    assert data.load("coco-pets", tmp_path).train.labels[0].boxes.tolist() == [[-0.5, 0, 41, 31]]


def test_missing_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"VOC2007 with ImageSets/Main/trainval\.txt is needed"):
        data.load("voc", tmp_path)
    with pytest.raises(ValueError, match=r"annotations must hold one instances_train<year>\.json, and has 0"):
        data.load("coco", tmp_path)
    place = write_voc(tmp_path / "voc-pets", {"trainval": {"a": CAT}, "test": {"b": CAT}})
    (place / "JPEGImages" / "b.jpg").unlink()
    with pytest.raises(ValueError, match=r"JPEGImages/b\.jpg is missing: get it again"):
        data.load("voc-pets", tmp_path)


def test_an_image_that_cannot_be_read_is_an_error_that_names_it(tmp_path):
    place = write_voc(tmp_path / "voc-pets", {"trainval": {"a": CAT}, "test": {"b": CAT}})
    (place / "JPEGImages" / "a.jpg").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"a\.jpg cannot be read as an image"):
        data.load("voc-pets", tmp_path).batches(1, seed=0)(0)


def test_the_drawn_set_is_the_same_wherever_it_is_drawn(tmp_path):
    one, other = (data.load("voc-smoke", tmp_path / name) for name in ("one", "other"))
    assert one.fingerprint == other.fingerprint
    assert one.classes == tuple(sorted(detection.DRAWN))
    drawn = one.folder / "VOCdevkit" / "VOC2007"
    listed = (drawn / "ImageSets" / "Main" / "trainval.txt").read_text().split()
    to_learn = ["<difficult>0" in (drawn / "Annotations" / f"{name}.xml").read_text() for name in listed]
    assert (len(listed), len(one.test.labels)) == (160, 60)
    assert len(one.train.labels) == sum(to_learn) < 160  # the fourth has no object
    modes = set()
    for path in one.train.paths:
        with Image.open(one.folder / path) as image:
            modes.add(image.mode)
    assert modes == {"L", "CMYK", "RGB"}
    objects = [each for part in (one.train, one.test) for each in part.labels]
    assert any(each.ignored.any() for each in objects)
    for path, each in zip(one.test.paths, one.test.labels, strict=True):
        height, width = one.read(path).shape[1:]
        assert (each.boxes >= 0).all()
        assert (each.boxes <= [width, height, width, height]).all()


def test_batches_are_the_same_from_any_iteration_and_in_any_shares(tmp_path):
    drawn = data.load("voc-smoke", tmp_path)
    whole = drawn.batches(4, seed=3, iterations=3)
    expected = [whole(iteration) for iteration in range(3)]
    again, shares = drawn.batches(4, seed=3), [drawn.batches(4, seed=3, share=(rank, 2)) for rank in (0, 1)]
    parts = [share(2) for share in shares]
    for images, targets in (again(2), [parts[0][place] + parts[1][place] for place in (0, 1)]):
        for one, other in zip(images, expected[2][0], strict=True):
            assert torch.equal(one, other)
        for one, other in zip(targets, expected[2][1], strict=True):
            assert all(torch.equal(one[name], other[name]) for name in ("boxes", "labels"))


def test_mirrored_images_have_mirrored_boxes(tmp_path):
    """The left half of each image is red, and so is all that its box holds, mirrored or not."""
    place = write_voc(tmp_path / "voc-pets", {"trainval": {"a": thing("cat", 1, 1, 20, 30)}, "test": {"b": CAT}})
    image = Image.new("RGB", (40, 30))
    image.paste((255, 0, 0), (0, 0, 20, 30))
    image.save(place / "JPEGImages" / "a.jpg", format="PNG")
    batches, lefts = data.load("voc-pets", tmp_path).batches(8, seed=0), set()
    images, targets = batches(0)
    for image, target in zip(images, targets, strict=True):
        left, top, right, bottom = map(int, target["boxes"][0])
        lefts.add(left)
        assert image[0, top:bottom, left:right].mean() == 1
        assert image[0].sum() == 600
        assert target["labels"].tolist() == [1]
    assert lefts == {0, 20}


def test_nothing_is_held_out(tmp_path):
    drawn = data.load("voc-smoke", tmp_path)
    assert drawn.hold_out(0) is drawn
    with pytest.raises(ValueError, match="holdout 5: detectors hold nothing out, choose 0"):
        drawn.hold_out(5)
    assert drawn.unreadable() == {}


def test_an_image_has_values_from_zero_to_one(tmp_path):
    drawn = data.load("voc-smoke", tmp_path)
    image = drawn.read(drawn.train.paths[0])
    assert image.dtype == torch.float32
    assert 0 <= image.min() < 0.3 < 0.6 < image.max() <= 1
    with Image.open(drawn.folder / drawn.train.paths[0]) as file:
        grey = np.array(file)
    assert torch.equal(image, torch.from_numpy(grey).float().div(255).expand(3, -1, -1))
    assert drawn.read(drawn.train.paths[1]).shape[0] == 3  # of four channels
