"""Images with objects in them: PASCAL VOC, MS COCO, and folders in their layouts (section 4.3)."""

import contextlib
import hashlib
import importlib.util
import io
import os
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw

from replication.data.batches import EpochSampler, rank_slice
from replication.data.folders import READING_ERRORS, refuse, to_rgb
from replication.engine.files import new_folder
from replication.engine.machine import cores

VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog"),
    *("horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
# Year and image set of the parts: Table 7, "07+12", with the test images of 2007.
VOC_PARTS = {"train": (("2007", "trainval"), ("2012", "trainval")), "test": (("2007", "test"),)}
AHEAD = 3  # batches that are read in advance
DRAWN = ("disc", "ring", "square", "triangle")
DRAWN_COUNTS = {"trainval": 160, "test": 60}


class Objects(NamedTuple):
    """The objects of an image, n of them.

    boxes: (n, 4) in float32, left, top, right and bottom in pixels, from the image's corner: right - left is the width.
    labels: (n,) in int64, numbers of classes from 0.
    ignored: (n,), what neither trains nor counts as missed: of VOC difficult objects, of COCO crowds.
    areas: (n,) in float32, of what COCO calls small and large: pixels of the object itself, else of its box.
    """

    boxes: np.ndarray
    labels: np.ndarray
    ignored: np.ndarray
    areas: np.ndarray

    def to_learn(self):
        """Those that train: neither ignored nor without width or height."""
        return Objects(*(column[~self.ignored & (self.boxes[:, 2:] > self.boxes[:, :2]).all(1)] for column in self))


class Scenes(NamedTuple):
    """A part of a data set: ``paths`` (N,) relative to its folder, and as ``labels`` (N,) the ``Objects`` of each."""

    paths: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True, eq=False)
class DetectionSet:
    """A data set for detectors, with the interface of ``Dataset``; its images are read from their files when needed.

    classes: their names, without the background.
    """

    name: str
    folder: Path
    classes: tuple[str, ...]
    train: Scenes
    test: Scenes
    fingerprint: str  # SHA-256 over classes, names and sizes of all files, and objects
    size = (600, 800)  # typical height and width, as detectors resize them

    def hold_out(self, count):
        """This data set; raises ValueError for a ``count`` above 0: nothing is held out for detectors."""
        if count:
            raise ValueError(f"holdout {count}: detectors hold nothing out, choose 0")
        return self

    def unreadable(self):
        """{path: error} of files that cannot be read: none, since training ends with an error at the first."""
        return {}

    def batches(self, batch, seed, device="cpu", share=(0, 1), iterations=None, workers=None):
        """The training batches, as ``SceneBatches``."""
        return SceneBatches(self, batch, seed, device, share, iterations, workers)

    def examples(self, count):
        """The first ``count`` training images: a list of tensors (3, H, W) from 0 to 1."""
        return [self.read(path) for path in self.train.paths[:count]]

    def read(self, path):
        """An image of a part: (3, H, W) in float32, from 0 to 1. Raises ValueError if its file cannot be read."""
        try:
            with Image.open(self.folder / path) as image:
                pixels = np.array(to_rgb(image))
        except READING_ERRORS as error:
            raise ValueError(f"{self.folder / path} cannot be read as an image ({error}): get it again") from error
        return torch.from_numpy(pixels).permute(2, 0, 1).float().div_(255)


class SceneBatches:
    """Training batches: whole images, mirrored at random, and what there is to learn in them.

    ``batches(iteration)`` gives a list of images (3, H, W) from 0 to 1, and one of targets as torchvision's detectors
    take them, {"boxes": (n, 4), "labels": (n,)} with labels from 1, on ``device``; in distributed training each process
    gets its ``share`` of the batch. Images are read in advance by threads. A batch depends on seed and iteration alone.
    """

    def __init__(self, dataset, batch, seed, device="cpu", share=(0, 1), iterations=None, workers=None):
        self.dataset, self.batch, self.seed, self.device = dataset, batch, seed, device
        self.part, self.last = rank_slice(batch, share), iterations
        self.indices = EpochSampler(len(dataset.train.labels), batch, seed)
        self.unreadable, self._ahead = {}, {}
        self._threads = ThreadPoolExecutor(workers or cores())

    def __call__(self, iteration):
        for number in range(iteration, iteration + AHEAD):
            if number not in self._ahead and (self.last is None or number < self.last):
                self._ahead[number] = [self._threads.submit(self._scene, *key) for key in self._keys(number)]
        scenes = [future.result() for future in self._ahead.pop(iteration)]
        images = [image.to(self.device) for image, _ in scenes]
        return images, [{name: value.to(self.device) for name, value in target.items()} for _, target in scenes]

    def _keys(self, iteration):
        mirrored = np.random.default_rng([self.seed, 1, iteration]).integers(0, 2, self.batch).astype(bool)
        return list(zip(self.indices(iteration)[self.part].tolist(), mirrored[self.part].tolist(), strict=True))

    def _scene(self, index, mirrored):
        image, objects = self.dataset.read(self.dataset.train.paths[index]), self.dataset.train.labels[index].to_learn()
        boxes = torch.from_numpy(objects.boxes.copy())
        if mirrored:
            image = image.flip(2)
            boxes[:, [0, 2]] = image.shape[2] - boxes[:, [2, 0]]
        return image, {"boxes": boxes, "labels": torch.from_numpy(objects.labels + 1)}


def load(name, root):
    """The data set of that name; ``voc-smoke`` is drawn where it is missing.

    "voc" is in ``<root>/VOCdevkit/{VOC2007,VOC2012}``, "voc-<name>" in ``<root>/voc-<name>/VOCdevkit/VOC2007``, whose
    classes are those of its training images; "coco" and "coco-<name>" are in ``<root>/<name>``, with
    ``annotations/instances_{train,val}<year>.json`` and images in ``{train,val}<year>/``.
    Raises ValueError naming what is missing, or files and objects in them that are wrong; and for a part without
    objects that train or count.
    """
    folder = place(name, root)
    if name == "voc-smoke" and not folder.is_dir():
        make_smoke_test(folder)
    classes, parts, faults = (_load_coco if name.startswith("coco") else _load_voc)(name, folder)
    digest = hashlib.sha256(repr(classes).encode())
    parts["train"] = _to_learn(parts["train"])
    for part, rows in parts.items():
        for path, each in rows:
            try:
                size = (folder / path).stat().st_size
            except OSError:
                faults.append(f"{path} is missing: get it again")
                continue
            digest.update(f"{part} {path} {size}\n".encode())
            for column in each:
                digest.update(np.ascontiguousarray(column))
    refuse(folder, faults)
    if not parts["train"]:
        raise ValueError(f"dataset {name!r}: no training image in {folder} has an object to learn, add some")
    if all(each.ignored.all() for _, each in parts["test"]):
        raise ValueError(
            f"dataset {name!r}: no test image in {folder} has an object that counts, neither difficult nor a crowd: "
            "add some, there is no precision without"
        )
    return DetectionSet(name, folder, classes, _scenes(parts["train"]), _scenes(parts["test"]), digest.hexdigest())


def place(name, root):
    """The folder of a data set."""
    return root if name == "voc" else root / name


def _scenes(rows):
    objects = np.empty(len(rows), dtype=object)
    objects[:] = [each for _, each in rows]
    return Scenes(np.array([path for path, _ in rows]), objects)


def _load_voc(name, folder):
    """Classes, {part: [(path, objects)]} and faults."""
    from torchvision.datasets import VOCDetection  # takes a second to import

    parts = VOC_PARTS if name == "voc" else {"train": (("2007", "trainval"),), "test": (("2007", "test"),)}
    trees, faults = {part: [] for part in parts}, []
    for part, sets in parts.items():
        for year, image_set in sets:
            try:
                listed = VOCDetection(folder, year, image_set)
            except (RuntimeError, OSError) as error:
                wanted = folder / "VOCdevkit" / f"VOC{year}"
                raise ValueError(
                    f"dataset {name!r}: {wanted} with ImageSets/Main/{image_set}.txt is needed, as in the archives of "
                    "PASCAL VOC: unpack them there"
                ) from error
            for path, annotation in zip(listed.images, listed.annotations, strict=True):
                try:
                    tree = VOCDetection.parse_voc_xml(ElementTree.parse(annotation).getroot())["annotation"]
                    trees[part].append((os.path.relpath(path, folder), annotation, tree.get("object") or []))
                except (OSError, ElementTree.ParseError, LookupError, AttributeError) as error:
                    faults.append(f"{os.path.relpath(annotation, folder)} is no annotation ({error}): get it again")
    named = {each.get("name") for _, _, listed in trees["train"] for each in listed if isinstance(each, dict)}
    classes = VOC_CLASSES if name == "voc" else tuple(sorted(filter(lambda each: isinstance(each, str), named)))
    loaded = {}
    for part, scenes in trees.items():
        rows = []
        for path, annotation, listed in scenes:
            objects, size = [], _size(folder / path)
            for number, each in enumerate(listed, start=1):
                try:
                    objects.append(_voc_object(each, classes))
                    _check_inside(objects[-1][0], size)
                except (ValueError, LookupError, TypeError, AttributeError) as error:
                    faults.append(f"{os.path.relpath(annotation, folder)}, object {number}: {_reason(error)}")
            rows.append((path, _objects(objects)))
        loaded[part] = rows
    return classes, loaded, faults


def _reason(error):
    return f"{error} is missing" if isinstance(error, LookupError) else str(error)


def _voc_object(values, classes):
    """Box, label, whether it is difficult, and area. Corners are pixels, counted from 1, both in the box."""
    if values["name"] not in classes:
        raise ValueError(f"name {values['name']!r} is none of {', '.join(classes)}")
    left, top, right, bottom = (float(values["bndbox"][name]) for name in ("xmin", "ymin", "xmax", "ymax"))
    if min(left, top) < 1:
        raise ValueError(f"box {left:g}, {top:g} to {right:g}, {bottom:g}: corners are counted from 1")
    if not (1 <= left <= right < np.inf and 1 <= top <= bottom < np.inf):
        raise ValueError(f"box {left:g}, {top:g} to {right:g}, {bottom:g}: the first corner must be the upper left")
    box = (left - 1, top - 1, right, bottom)
    return box, classes.index(values["name"]), values.get("difficult") == "1", (box[2] - box[0]) * (box[3] - box[1])


def _size(path):
    """Width and height of an image; of what is missing or cannot be read, which is said elsewhere, no limit."""
    try:
        with Image.open(path) as image:
            return image.size
    except READING_ERRORS:
        return np.inf, np.inf


def _check_inside(box, size, tolerance=0):
    """Raise ValueError for a box that crosses the edges of an image (width, height) by more pixels than tolerated."""
    left, top, right, bottom = box
    if min(left, top) < -tolerance or right > size[0] + tolerance or bottom > size[1] + tolerance:
        raise ValueError(
            f"left {left:g}, top {top:g}, right {right:g}, bottom {bottom:g}, from 0, is not within the image of "
            f"{size[0]}x{size[1]} pixels"
        )


def _objects(rows):
    boxes, labels, ignored, areas = zip(*rows, strict=True) if rows else ((), (), (), ())
    boxes = np.array(boxes, dtype=np.float32).reshape(-1, 4)
    return Objects(boxes, np.array(labels, np.int64), np.array(ignored, bool), np.array(areas, np.float32))


def _to_learn(rows):
    """Without images that have nothing to learn, as the authors of Faster R-CNN train."""
    return [(path, objects) for path, objects in rows if len(objects.to_learn().labels)]


def _load_coco(name, folder):
    """As ``_load_voc``; classes in the order of their numbers."""
    from torchvision.datasets import CocoDetection

    if importlib.util.find_spec("pycocotools") is None:
        raise ValueError(f"dataset {name!r} needs pycocotools: pip install -e '.[detection]'")
    faults, loaded, classes = [], {}, None
    for part, word in (("train", "train"), ("test", "val")):
        found = sorted((folder / "annotations").glob(f"instances_{word}*.json"))
        if len(found) != 1:
            raise ValueError(
                f"dataset {name!r}: {folder / 'annotations'} must hold one instances_{word}<year>.json, and has "
                f"{len(found)}: put it there, and its images into {folder}/{word}<year>"
            )
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                index = CocoDetection(folder, str(found[0])).coco
            numbers = sorted(index.getCatIds())
            names = tuple(index.cats[number]["name"] for number in numbers)
            images = [(str(index.imgs[key]["file_name"]), key) for key in sorted(index.getImgIds())]
        except (ValueError, LookupError, TypeError, AssertionError) as error:
            raise ValueError(f"{found[0]} is not in COCO's format ({error!r}): get it again") from error
        if classes not in (None, names):
            faults.append(f"{found[0].name} has other categories than that of the training images")
        classes, labels, rows = names, {number: label for label, number in enumerate(numbers)}, []
        for file, key in images:
            path, objects = f"{found[0].stem.removeprefix('instances_')}/{file}", []
            size = _size(folder / path) if index.imgToAnns[key] else None
            for each in index.imgToAnns[key]:
                try:
                    left, top, width, height = map(float, each["bbox"])
                    box = (left, top, left + width, top + height)
                    if not np.isfinite(box).all() or width < 0 or height < 0:
                        raise ValueError(f"bbox {each['bbox']}: width and height must be 0 or more")
                    _check_inside(box, size, tolerance=1)
                    area = float(each.get("area", width * height))
                    objects.append((box, labels[each["category_id"]], bool(each.get("iscrowd", 0)), area))
                except (ValueError, LookupError, TypeError) as error:
                    faults.append(f"{found[0].name}, annotation {each.get('id')} of {file}: {_reason(error)}")
            rows.append((path, _objects(objects)))
        loaded[part] = rows
    return classes, loaded, faults


def make_smoke_test(folder):
    """Draw a small data set in VOC's layout: shapes on textured grounds, some of them difficult, grey or CMYK."""
    generator = np.random.default_rng(0)
    with new_folder(folder) as temporary:
        target = temporary / "VOCdevkit" / "VOC2007"
        for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
            (target / name).mkdir(parents=True)
        first = 1
        for image_set, count in DRAWN_COUNTS.items():
            names = [f"{number:06}" for number in range(first, first + count)]
            first += count
            for number, name in enumerate(names):
                image, objects = _draw(generator, 0 if number == 3 else int(generator.integers(1, 4)))
                image.convert({0: "L", 1: "CMYK"}.get(number, "RGB")).save(
                    target / "JPEGImages" / f"{name}.jpg", quality=90
                )
                (target / "Annotations" / f"{name}.xml").write_text(_annotation(name, image, objects))
            (target / "ImageSets" / "Main" / f"{image_set}.txt").write_text("".join(f"{name}\n" for name in names))


def _draw(generator, count):
    """An image with so many shapes, and (class, corners, whether it is difficult) of each.

    Shapes of which less than half can be seen, behind an edge, are difficult. No two boxes overlap.
    """
    width, height = (int(side) for side in generator.integers(150, 220, 2))
    across, down = np.meshgrid(np.arange(width), np.arange(height))
    angle, ground = generator.uniform(0, np.pi), generator.uniform(70, 180, 3)
    wave = np.sin((across * np.cos(angle) + down * np.sin(angle)) / generator.uniform(3, 9))
    pixels = ground + 20 * wave[..., None] + generator.normal(0, 5, (height, width, 3))
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    brush, objects = ImageDraw.Draw(image), []
    while len(objects) < count:
        side = int(generator.integers(50, 110))
        left, top = (int(generator.integers(-side // 2, length - side // 2)) for length in (width, height))
        box = (max(left, 0), max(top, 0), min(left + side, width - 1), min(top + side, height - 1))
        if any(box[0] < x2 and x1 < box[2] and box[1] < y2 and y1 < box[3] for _, (x1, y1, x2, y2), _ in objects):
            continue
        seen = (box[2] - box[0]) * (box[3] - box[1]) / side**2
        if seen < 0.3 or (seen < 0.9 and generator.random() < 0.8):
            continue
        colour = tuple(int(value) for value in (ground + generator.choice([-1, 1], 3) * 80).clip(0, 255))
        name = DRAWN[int(generator.integers(len(DRAWN)))]
        square = (left, top, left + side, top + side)
        if name == "disc":
            brush.ellipse(square, fill=colour)
        elif name == "ring":
            brush.ellipse(square, outline=colour, width=max(5, side // 6))
        elif name == "square":
            brush.rectangle(square, fill=colour)
        else:
            brush.polygon([(left, top + side), (left + side, top + side), (left + side // 2, top)], fill=colour)
        objects.append((name, box, seen < 0.5))
    return image, objects


def _annotation(name, image, objects):
    lines = [f"<annotation><filename>{name}.jpg</filename>"]
    lines.append(f"<size><width>{image.width}</width><height>{image.height}</height><depth>3</depth></size>")
    for kind, box, difficult in objects:
        corners = "".join(
            f"<{tag}>{value + 1}</{tag}>" for tag, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
        )
        lines.append(
            f"<object><name>{kind}</name><difficult>{int(difficult)}</difficult><bndbox>{corners}</bndbox></object>"
        )
    return "\n".join([*lines, "</annotation>\n"])
