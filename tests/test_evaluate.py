"""Testing as in the paper, against a slow statement of it, one photograph and one view at a time."""

import os

import numpy as np
import pytest
import torch
from conftest import write_photographs
from PIL import Image

from replication import data, evaluate, models
from replication.data import imagenet
from replication.data.batches import normalize


def small_net(seed, classes=3):
    """A net for inputs of any size that takes little time."""
    torch.manual_seed(seed)
    layers = [torch.nn.Conv2d(3, 8, 7, stride=8), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()]
    return torch.nn.Sequential(*layers, torch.nn.Linear(8, classes, bias=False)).eval()


def resized(image, side):
    width, height = image.size
    size = (side, int(side * height / width)) if width < height else (int(side * width / height), side)
    return np.asarray(image.resize(size, Image.Resampling.BILINEAR))


def softmax_of(net, pixels, mean):
    """Scores of one view (H, W, 3)."""
    inputs = ((pixels - mean) / 255).astype(np.float32).transpose(2, 0, 1)
    with torch.no_grad():
        logits = net(torch.from_numpy(inputs)[None])[0].double().numpy()
    return np.exp(logits) / np.exp(logits).sum()


def centre_views(image):
    pixels = resized(image, 256)
    top, left = (round((length - 224) / 2) for length in pixels.shape[:2])
    return [pixels[top : top + 224, left : left + 224]]


def ten_views(image):
    pixels = resized(image, 256)
    top, left = (round((length - 256) / 2) for length in pixels.shape[:2])
    square, views = pixels[top : top + 256, left : left + 256], []
    for top, left in ((0, 0), (0, 32), (32, 0), (32, 32), (16, 16)):
        crop = square[top : top + 224, left : left + 224]
        views += [crop, crop[:, ::-1]]
    return views


def scaled_views(image):
    return [resized(image, side) for side in (224, 256, 384, 480, 640)]


VIEWS = {"centre crop": centre_views, "10-crop": ten_views, "multi-scale": scaled_views}


def stretched(mean, shape):
    """A mean image, (224, 224, 3), stretched to another size by two linear interpolations."""
    for axis in (0, 1):
        places = (np.arange(shape[axis]) + 0.5) * mean.shape[axis] / shape[axis] - 0.5
        places = places.clip(0, mean.shape[axis] - 1)
        low = np.floor(places).astype(int)
        high = np.minimum(low + 1, mean.shape[axis] - 1)
        weight = np.expand_dims(places - low, tuple(other for other in range(3) if other != axis))
        mean = mean.take(low, axis) * (1 - weight) + mean.take(high, axis) * weight
    return mean


def slow_scores(net, path, way, mean):
    with Image.open(path) as image:
        views = VIEWS[way](image.convert("RGB"))
    return np.mean([softmax_of(net, view, stretched(mean, view.shape)) for view in views], 0)


@pytest.mark.parametrize("way", VIEWS)
def test_scores_are_those_of_a_slow_statement_of_the_paper(photographs, way):
    dataset = data.load("imagenet-small", photographs)
    tested = evaluate.NormalizedNet(small_net(0), torch.from_numpy(dataset.mean))
    paths = [dataset.folder / os.fsdecode(path) for path in dataset.test.paths]
    views = [evaluate.EVAL_PROTOCOLS[way](imagenet.open_image(path, 640)[0]) for path in paths]
    found = evaluate.scores(tested, views)
    for path, scores in zip(paths, found.numpy(), strict=True):
        np.testing.assert_allclose(scores, slow_scores(tested.net, path, way, dataset.mean), atol=2e-5)


def test_a_net_is_fully_convolutional():
    """The classifier at every place of the last map, then the mean: the plain forward pass, at 224 and other sizes."""
    net = models.imagenet_net(18, classes=5).eval()
    inside = torch.nn.Sequential(*[net.get_submodule(f"layer{stage}") for stage in range(1, 5)])
    classifier = torch.nn.Conv2d(512, 5, 1)
    classifier.weight.data, classifier.bias.data = net.fc.weight.data[:, :, None, None], net.fc.bias.data
    for size in ((224, 224), (256, 330)):
        inputs = torch.randn(1, 3, *size)
        with torch.no_grad():
            stem = net.maxpool(torch.relu(net.bn1(net.conv1(inputs))))
            logits = classifier(inside(stem)).mean((2, 3))
            torch.testing.assert_close(net(inputs), logits, rtol=1e-4, atol=1e-4)
    square = Image.fromarray(np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8))
    first, mean = evaluate.multi_scale(square)[0], torch.full((224, 224, 3), 110.0)
    assert np.array_equal(first[0].numpy(), np.asarray(square))
    with torch.no_grad():
        expected = net(normalize(first, mean)).softmax(1)
    torch.testing.assert_close(evaluate.scores(evaluate.NormalizedNet(net, mean), [[first]]), expected)


def test_errors_and_ensembles_are_counted_as_by_hand(tmp_path):
    write_photographs(tmp_path / "imagenet-seven", classes=7, train=2, val=2, sizes=((260, 300), (300, 270)))
    dataset = data.load("imagenet-seven", tmp_path)
    mean = torch.from_numpy(dataset.mean)
    nets = {name: evaluate.NormalizedNet(small_net(seed, classes=7), mean) for seed, name in enumerate("ab")}
    entries = {name: [tested] for name, tested in nets.items()} | {"both": list(nets.values())}
    paths = [dataset.folder / os.fsdecode(path) for path in dataset.test.paths]
    for way in ("centre crop", "10-crop"):
        found, failed = evaluate.errors(entries, dataset, way, batch=4, workers=1)
        scores = {
            name: np.stack([slow_scores(nets[name].net, path, way, dataset.mean) for path in paths]) for name in nets
        }
        scores["both"] = (scores["a"] + scores["b"]) / 2
        for name, of_name in scores.items():
            ranks = (-of_name).argsort(1)
            wrong = [label not in row[:1] for row, label in zip(ranks, dataset.test.labels, strict=True)]
            far = [label not in row[:5] for row, label in zip(ranks, dataset.test.labels, strict=True)]
            expected = {"top1": 100 * np.mean(wrong), "top5": 100 * np.mean(far)}
            assert found[name] == pytest.approx(expected)
        assert not failed


def test_photographs_that_cannot_be_read_are_left_out_and_named(photographs):
    path = photographs / "imagenet-small" / "val" / "n00000002" / "0.JPEG"
    path.write_bytes(b"no photograph")
    dataset = data.load("imagenet-small", photographs)
    tested = evaluate.NormalizedNet(small_net(0), torch.from_numpy(dataset.mean))
    found, failed = evaluate.errors({"net": [tested]}, dataset, "centre crop", workers=0)
    others = [name for name in map(os.fsdecode, dataset.test.paths) if name != "val/n00000002/0.JPEG"]
    best = [slow_scores(tested.net, dataset.folder / name, "centre crop", dataset.mean).argmax() for name in others]
    wrong = [dataset.classes[label] != name.split("/")[1] for label, name in zip(best, others, strict=True)]
    assert found["net"] == {"top1": pytest.approx(100 * np.mean(wrong)), "top5": None}  # of three classes
    assert list(failed) == ["val/n00000002/0.JPEG"]
