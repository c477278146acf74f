"""Testing as in the paper, against a slow statement of it, one photograph and one view at a time."""

import os
import shutil

import numpy as np
import pytest
import torch
from conftest import write_photographs
from PIL import Image

from replication import Run, data, evaluate, models
from replication.data import imagenet as reading
from replication.data.batches import normalize
from replication.runs import records as kept


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
    tested = evaluate.Tested(small_net(0), torch.from_numpy(dataset.mean))
    paths = [dataset.folder / os.fsdecode(path) for path in dataset.test.paths]
    views = [evaluate.EVAL_PROTOCOLS[way](reading.opened(path, 640)[0]) for path in paths]
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
    torch.testing.assert_close(evaluate.scores(evaluate.Tested(net, mean), [[first]]), expected)


def test_errors_and_ensembles_are_counted_as_by_hand(tmp_path):
    write_photographs(tmp_path / "imagenet-seven", classes=7, train=2, val=2, sizes=((260, 300), (300, 270)))
    dataset = data.load("imagenet-seven", tmp_path)
    mean = torch.from_numpy(dataset.mean)
    nets = {name: evaluate.Tested(small_net(seed, classes=7), mean) for seed, name in enumerate("ab")}
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
    tested = evaluate.Tested(small_net(0), torch.from_numpy(dataset.mean))
    found, failed = evaluate.errors({"net": [tested]}, dataset, "centre crop", workers=0)
    others = [name for name in map(os.fsdecode, dataset.test.paths) if name != "val/n00000002/0.JPEG"]
    best = [slow_scores(tested.net, dataset.folder / name, "centre crop", dataset.mean).argmax() for name in others]
    wrong = [dataset.classes[label] != name.split("/")[1] for label, name in zip(best, others, strict=True)]
    assert found["net"] == {"top1": pytest.approx(100 * np.mean(wrong)), "top5": None}  # of three classes
    assert list(failed) == ["val/n00000002/0.JPEG"]


def test_weights_of_others_are_a_row_of_their_own(tmp_path):
    net, digits = models.cifar_net(8).eval(), data.load("digits")
    torch.save({"state_dict": {f"module.{name}": value for name, value in net.state_dict().items()}}, tmp_path / "a.th")
    options = {"net": "resnet-8", "path": str(tmp_path / "a.th"), "zeros": "behind"}
    weights = {"theirs": options, "ours": options | {"inputs": "ours"}}
    theirs, ours = evaluate.errors_of_others(weights, "digits")
    assert ours["test_error"] == evaluate.single_view(net, digits.eval_batches(digits.test))[0]
    pixels, labels = digits.test
    mean, deviations = (np.array(v, dtype=np.float32) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        logits = net(torch.from_numpy((pixels / np.float32(255) - mean) / deviations).permute(0, 3, 1, 2))
    wrong = logits.argmax(1).numpy() != labels
    assert theirs["test_error"] == pytest.approx(100 * wrong.mean(), abs=0.3)
    assert theirs["test_error"] != ours["test_error"]
    assert theirs["parameters"] == sum(value.numel() for value in net.parameters())


@pytest.mark.parametrize("label", ["resnet-50", "plain-20", "ensemble", 3])
def test_a_label_that_a_net_of_ours_may_have_is_refused(label):
    with pytest.raises(ValueError, match=f"weights {label!r}: choose a label"):
        evaluate.errors_of_others({label: {}}, "digits")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "net None"),
        ({"net": "resnet-8"}, "zeros None: choose behind, around"),
        ({"net": "resnet-8", "zeros": "behind"}, "path None: there is no such file"),
        ({"net": "resnet-8", "zeros": "behind", "path": "nowhere.pth"}, "path 'nowhere.pth': there is no such file"),
        ({"net": "resnet-9", "zeros": "behind"}, "depth 9"),
        ({"nett": "resnet-8"}, "option 'nett': choose net.*did you mean 'net'"),
        ({"net": "resnet-8", "zeros": "behind", "inputs": "theirs"}, "inputs 'theirs': choose torchvision, ours"),
        ("file.pth", "give its options"),
    ],
)
def test_what_is_missing_of_weights_of_others_is_said(options, message):
    with pytest.raises((TypeError, ValueError), match=f"weights 'x': .*{message}"):
        evaluate.errors_of_others({"x": options}, "digits")


def test_the_place_of_a_bottlenecks_stride_must_be_said(tmp_path):
    (tmp_path / "a.pth").write_bytes(b"")
    options = {"net": "resnet-50", "path": str(tmp_path / "a.pth")}
    with pytest.raises(ValueError, match="weights 'x': stride_on None: choose 1x1, 3x3"):
        evaluate.check(["resnet-50"], weights={"x": options})
    evaluate.check(["resnet-50"], weights={"x": options | {"stride_on": "3x3"}})


def test_unknown_ways_and_members_are_refused():
    with pytest.raises(ValueError, match=r"way '12-crop': choose .*, multi-scale \(did you mean '10-crop'"):
        evaluate.check(["resnet-18"], ways=["12-crop"])
    with pytest.raises(ValueError, match="net of the ensemble 'resnet-34': choose resnet-18"):
        evaluate.check(["resnet-18"], ensemble=["resnet-34"])


def made_record(net, dataset, results, seed=0):
    """A record as a run leaves it, of a net that was not trained."""
    run = Run(net, dataset.name, schedule=1e-5, seed=seed)
    folder = run.folder(results)
    folder.mkdir(parents=True)
    torch.manual_seed(seed)
    torch.save(run.name.build(len(dataset.classes)).state_dict(), folder / "weights.pt")
    (folder / "run.json").write_text(kept.run_text(run, dataset.fingerprint))
    for name in ("environment.json", "history.csv"):
        (folder / name).write_text("")
    kept.write_summary(folder, {"iterations": 6, "test_error": 50.0})
    return kept.finished(run, results)


def test_evaluations_are_kept_beside_their_records(photographs, tmp_path, monkeypatch, capsys):
    dataset = data.load("imagenet-small", photographs)
    records = [made_record("resnet-18", dataset, tmp_path, seed) for seed in (0, 1)]
    first, second = (record.run.id for record in records)
    weights = {"theirs": {"net": "resnet-18", "path": str(records[1].folder / "weights.pt"), "inputs": "ours"}}
    arguments = {"data": photographs, "weights": weights, "ensemble": ["resnet-18"], "ways": ["centre crop"]}

    def evaluations(**changed):
        return evaluate.evaluations(records, dataset.name, folder=tmp_path / "notebook", **(arguments | changed))

    found = evaluations()
    assert set(found) == {"theirs", "ensemble", first, second}
    assert found["theirs"]["centre crop"] == found[second]["centre crop"]
    assert found["ensemble"]["centre crop"] == found[first]["centre crop"]
    assert (found["ensemble"]["members"], found[first]["images"], found[first]["unreadable"]) == ([first], 6, 0)
    assert records[0].evaluation == found[first]

    # Another way is added to what is there, and nothing is measured twice.
    measure, asked = evaluate.errors, []
    monkeypatch.setattr(evaluate, "errors", lambda *of, **how: asked.append(of[0].keys()) or measure(*of, **how))
    (records[0].folder / "evaluation.json").unlink()
    both = evaluations(ways=["centre crop", "10-crop"])
    assert asked == [{first}, {"theirs", "ensemble", first, second}]
    assert all(set(found[name]) < set(both[name]) for name in found)

    # Later neither images nor weights are needed; what was never measured is said to be missing.
    shutil.rmtree(photographs)
    assert evaluations() == both
    for record in records:
        (record.folder / "weights.pt").unlink()
    capsys.readouterr()
    assert evaluations(weights={}) == {name: both[name] for name in ("ensemble", first, second)}
    assert capsys.readouterr().out == ""
    assert evaluations(weights={}, precision="bfloat16") == {}
    assert f"{first}: not tested by centre crop, since its images are not here" in capsys.readouterr().out


def test_other_weights_and_other_images_are_measured_anew(photographs, tmp_path, capsys):
    dataset = data.load("imagenet-small", photographs)
    record = made_record("resnet-18", dataset, tmp_path)
    arguments = {"data": photographs, "ways": ["centre crop"], "folder": tmp_path}
    first = evaluate.evaluations([record], dataset.name, **arguments)[record.run.id]
    torch.manual_seed(5)
    torch.save(record.run.name.build(3).state_dict(), record.folder / "weights.pt")
    assert evaluate.evaluations([record], dataset.name, **arguments)[record.run.id] == first
    assert "weights.pt is not what SHA256SUMS says: these weights are left out." in capsys.readouterr().out
    kept.write_summary(record.folder, record.summary)
    second = evaluate.evaluations([record], dataset.name, **arguments)[record.run.id]
    assert first["weights"] != second["weights"]
    assert record.evaluation == second
    path = photographs / "imagenet-small" / "val" / "n00000002" / "0.JPEG"
    path.write_bytes(b"no photograph")
    third = evaluate.evaluations([record], dataset.name, **arguments)[record.run.id]
    assert (third["images"], third["unreadable"]) == (5, 1)
