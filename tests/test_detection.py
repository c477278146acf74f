"""Detectors: their nets, against slow statements; and their runs, which end alike however they are interrupted."""

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from safetensors.torch import save_file
from test_detection_data import annotation, write_coco
from torchvision.ops import FrozenBatchNorm2d, batched_nms, box_iou

from replication import Run, all_finished, data, finished, models, recipes, run_all, sweeps, trainers
from replication.__main__ import main
from replication.data.batches import normalize
from replication.detection import DetectorName, Pretrained, nets
from replication.engine import machine, vision
from replication.report import detections
from replication.runs import environment
from replication.runs import records as kept

SMALL = "faster-rcnn-resnet-18-quarter"
INPUTS = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}


def build(name, classes=3, seed=0, **options):
    torch.manual_seed(seed)
    return DetectorName.parse(name).build(classes, **options)


def suppressed(boxes, scores, threshold):
    """Non-maximum suppression in plain Python, box by box."""
    kept = []
    for index in sorted(range(len(boxes)), key=lambda index: -scores[index]):  # a stable sort
        if not any(box_iou(boxes[other][None], boxes[index][None]).item() > threshold for other in kept):
            kept.append(index)
    return kept


@pytest.mark.parametrize(("count", "at_once"), [(0, 10), (1, 10), (70, 1000), (70, 10), (300, 64)])
def test_nms_agrees_with_plain_python_where_scores_are_equal_and_boxes_empty(count, at_once, monkeypatch):
    monkeypatch.setattr(vision, "AT_ONCE", at_once)
    generator = torch.Generator().manual_seed(count)
    corners = torch.randint(0, 20, (count, 2), generator=generator).float()
    boxes = torch.cat([corners, corners + torch.randint(0, 12, (count, 2), generator=generator)], 1)
    scores = torch.randint(0, 6, (count,), generator=generator) / 5
    for threshold in (0, 0.3, 0.5, 1):
        expected = suppressed(boxes, scores.tolist(), threshold)
        assert vision.nms(boxes, scores, threshold).tolist() == expected
        assert torchvision.ops.nms(boxes, scores, threshold).tolist() == expected  # whichever this machine has


def test_boxes_of_different_classes_do_not_suppress_each_other():
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 10], [0, 0, 10, 10]])
    assert batched_nms(boxes, torch.tensor([0.5, 0.9, 0.7]), torch.tensor([0, 1, 0]), 0.5).tolist() == [1, 2]


def region(features, box, size):
    """RoI pooling of one box, point by point: each of size x size bins is the mean of four interpolated points."""
    left, top, right, bottom = (float(value) / nets.STRIDE for value in box)
    sides = max(right - left, 1) / size, max(bottom - top, 1) / size
    height, width = features.shape[1:]
    pooled = torch.zeros(features.shape[0], size, size)
    for row in range(size):
        for column in range(size):
            for down in (0.25, 0.75):
                for across in (0.25, 0.75):
                    y, x = max(top + (row + down) * sides[1], 0), max(left + (column + across) * sides[0], 0)
                    y0, x0 = min(int(y), height - 1), min(int(x), width - 1)
                    y1, x1 = min(y0 + 1, height - 1), min(x0 + 1, width - 1)
                    dy, dx = (y - y0 if y0 < height - 1 else 0), (x - x0 if x0 < width - 1 else 0)
                    upper = (1 - dx) * features[:, y0, x0] + dx * features[:, y0, x1]
                    lower = (1 - dx) * features[:, y1, x0] + dx * features[:, y1, x1]
                    pooled[:, row, column] += ((1 - dy) * upper + dy * lower) / 4
    return pooled


def test_regions_are_pooled_as_by_torchvision():
    """Whichever way this machine takes; torchvision's in torch operations is the other one. Gradients, too."""
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(2, 6, 2, generator=generator) * torch.tensor([180.0, 130.0])
    boxes = torch.cat([corners, corners + torch.rand(2, 6, 2, generator=generator) * 90], 2)
    boxes[..., 2].clamp_(max=208)
    boxes[..., 3].clamp_(max=160)
    one, other = (torch.rand(2, 5, 10, 13, generator=generator).requires_grad_() for _ in range(2))
    other.data.copy_(one.data)
    with torch.compiler.set_stance("force_eager"):
        expected = torchvision.ops.roi_align(other, list(boxes), (7, 7), 1 / nets.STRIDE, sampling_ratio=2)
    pooled = vision.pool_regions(one, list(boxes), 7, nets.STRIDE)
    torch.testing.assert_close(pooled, expected)
    target = torch.rand(expected.shape, generator=generator)
    for result in (pooled, expected):
        (result * target).sum().backward()
    torch.testing.assert_close(one.grad, other.grad)
    assert vision.pool_regions(one, [boxes[0], boxes[1, :0]], 7, nets.STRIDE).shape == (6, 5, 7, 7)


def test_conv5_sees_each_region_of_conv4_as_if_it_were_alone():
    """Ten boxes, each cut out and passed through the paper's own net, whose batch norm is torch's in eval mode."""
    torch.manual_seed(0)
    classifier = DetectorName.parse("faster-rcnn-resnet-50-quarter").classifier()
    for layer in classifier.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.running_mean.uniform_(-0.1, 0.1)
            layer.running_var.uniform_(0.5, 2)
            torch.nn.init.uniform_(layer.weight, 0.5, 1)
    slow = models.imagenet_net(50, width=16).eval()
    slow.load_state_dict(classifier.state_dict())
    net = build("faster-rcnn-resnet-50-quarter", pretrained=classifier)
    image, generator = torch.rand(1, 3, 160, 208), torch.Generator().manual_seed(1)
    corners = torch.rand(10, 2, generator=generator) * torch.tensor([150.0, 110.0])
    boxes = torch.cat([corners, corners + 10 + torch.rand(10, 2, generator=generator) * 60], 1)
    with torch.no_grad():
        shared = net.backbone(image)
        fast = net.roi_heads.box_head(net.roi_heads.box_roi_pool({"0": shared}, [boxes], [(160, 208)]))
        x = slow.maxpool(F.relu(slow.bn1(slow.conv1(image))))
        conv4 = slow.layer3(slow.layer2(slow.layer1(x)))
        alone = [slow.layer4(region(conv4[0], box, 14)[None]).mean((2, 3))[0] for box in boxes]
    assert shared.shape == (1, 256, 10, 13)
    assert fast.shape == (10, 512)
    assert torch.stack(alone).std() > 0.01
    torch.testing.assert_close(fast, torch.stack(alone), atol=1e-4, rtol=1e-4)


def test_fc6_and_fc7_see_each_region_of_conv5():
    net = build("faster-rcnn-vgg-16-quarter").eval()
    image, boxes = torch.rand(1, 3, 160, 208), torch.tensor([[5.0, 5, 80, 70], [100, 40, 200, 150]])
    fc6, fc7 = (layer for layer in net.roi_heads.box_head if isinstance(layer, torch.nn.Linear))
    with torch.no_grad():
        shared = net.backbone(image)
        assert shared.shape == (1, 128, 10, 13)
        fast = net.roi_heads.box_head(net.roi_heads.box_roi_pool({"0": shared}, [boxes], [(160, 208)]))
        alone = [F.relu(fc7(F.relu(fc6(region(shared[0], box, 7).flatten())))) for box in boxes]
    torch.testing.assert_close(fast, torch.stack(alone), atol=1e-4, rtol=1e-4)


def test_full_size_detectors_are_made_of_torchvisions_vgg_and_the_papers_resnet():
    """The parameters, counted from the ImageNet nets without classifier, the heads, and the fixed batch norm."""
    classes, anchors = 20, 12
    with torch.device("meta"):
        resnet, vgg = models.imagenet_net(101), torchvision.models.vgg16()
        detectors = {net: DetectorName.parse(f"faster-rcnn-{net}").build(classes) for net in ("resnet-101", "vgg-16")}
    for net, of, channels, outputs in (("resnet-101", resnet, 1024, 2048), ("vgg-16", vgg, 512, 4096)):
        last = ("fc.", "classifier.6")
        inside = sum(value.numel() for name, value in of.named_parameters() if not name.startswith(last))
        norms = sum(2 * layer.num_features for layer in of.modules() if isinstance(layer, torch.nn.BatchNorm2d))
        proposals = 9 * channels**2 + channels + 5 * anchors * (channels + 1)
        siblings = (outputs + 1) * 5 * (classes + 1)
        parameters = sum(value.numel() for value in detectors[net].parameters())
        assert parameters == inside - norms + proposals + siblings
    layers = detectors["resnet-101"].backbone.named_modules()
    shared = [name for name, layer in layers if isinstance(layer, torch.nn.Conv2d)]
    assert len([name for name in shared if "downsample" not in name]) == 91  # appendix A


def test_what_is_trained_on_imagenet_keeps_its_first_stages_and_its_statistics():
    torch.manual_seed(0)
    classifier = DetectorName.parse(SMALL).classifier()
    classifier.layer4[0].bn1.running_mean.fill_(3)
    net = build(SMALL, pretrained=classifier, inputs=((0.1, 0.2, 0.3), (0.4, 0.5, 0.6)))
    fixed = {name.split(".")[1] for name, value in net.named_parameters() if not value.requires_grad}
    assert fixed == {"conv1", "layer1"}
    assert net.roi_heads.box_head.layer4[0].bn1.running_mean.tolist() == [3] * 128
    assert not any(isinstance(layer, torch.nn.BatchNorm2d) for layer in net.modules())
    image = net.transform.normalize(torch.full((3, 1, 1), 0.5))
    assert image.flatten().tolist() == pytest.approx([1, 0.6, 1 / 3])
    vgg = DetectorName.parse("faster-rcnn-vgg-16-quarter")
    net = vgg.build(3, vgg.classifier())
    fixed = {name for name, value in net.named_parameters() if not value.requires_grad}
    assert fixed == {f"backbone.{place}.{part}" for place in (0, 2, 5, 7) for part in ("weight", "bias")}


def test_statistics_of_a_new_net_are_those_of_its_images():
    """Of what all of them have, around their centres: 144x144 pixels. Padding would be the mean colour of no image."""
    net, images = build(SMALL), [torch.rand(3, *size) for size in ((150, 170), (200, 150), (150, 150))]
    nets.measure_statistics(net, images)
    inputs = [net.transform.normalize(image) for image in images]
    inputs = torch.stack([inputs[0][:, 3:147, 13:157], inputs[1][:, 28:172, 3:147], inputs[2][:, 3:147, 3:147]])
    seen, head = [], net.roi_heads.box_head.layer4[0]
    for norm in (net.backbone.bn1, net.backbone.layer3[1].bn2, head.bn1):
        norm.register_forward_hook(lambda _, __, output: seen.append(output.clone()))
    with torch.no_grad():
        head(net.backbone(inputs))
    for output in seen:
        variance, mean = torch.var_mean(output, (0, 2, 3))
        torch.testing.assert_close(mean, torch.zeros_like(mean), atol=1e-4, rtol=0)
        torch.testing.assert_close(variance, torch.ones_like(variance), atol=1e-3, rtol=0)
    assert len(seen) == 3
    assert sum(isinstance(layer, FrozenBatchNorm2d) for layer in net.modules()) == 17  # shortcuts A have none


def test_bfloat16_computes_features_alone():
    """At 600x1000 pixels: eight significant bits would put all coordinates beyond 512 on multiples of 4."""
    net, box = build(SMALL), [700.3, 301.7, 933.9, 341.1]
    net.transform.min_size, net.transform.max_size = (600,), 1000
    types, pooled, proposed = set(), [], []
    for layer in (net.backbone.layer3[0].conv1, net.roi_heads.box_head.layer4[0].conv1):
        layer.register_forward_hook(lambda _, __, output: types.add(output.dtype))
    net.rpn.register_forward_hook(lambda _, __, output: proposed.extend(output[0]))
    net.roi_heads.box_roi_pool.register_forward_pre_hook(lambda _, inputs: pooled.extend(inputs[1]))
    target = {"boxes": torch.tensor([box]), "labels": torch.tensor([1])}
    with machine.autocast("cpu", "bfloat16"):
        losses = net([torch.rand(3, 600, 1000)], [target])
    assert types == {torch.bfloat16}
    assert {loss.dtype for loss in losses.values()} == {proposed[0].dtype} == {torch.float32}
    beyond = proposed[0][proposed[0] > 512]
    assert len(beyond) > 100
    assert (beyond % 4 != 0).float().mean() > 0.5
    assert (pooled[0] == target["boxes"]).all(1).any()  # what is to be found is among the regions that train


def test_multiply_adds_are_those_of_all_layers():
    """A quarter of VGG-11: for an image of 150x200, as the detector takes it, and 32 regions, layer by layer."""
    name = "faster-rcnn-vgg-11-quarter"
    height, width = build(name).transform([torch.rand(3, 150, 200)])[0].tensors.shape[2:]
    widths, sizes = [3, 16, 32, 64, 64, 128, 128, 128, 128], [1, 2, 4, 4, 8, 8, 16, 16]
    shared = sum(9 * a * b * (height // s) * (width // s) for a, b, s in zip(widths, widths[1:], sizes, strict=False))
    proposals = height // 16 * (width // 16) * (9 * 128 * 128 + 128 * 5 * 12)
    regions = 32 * (128 * 49 * 1024 + 1024 * 1024 + 1024 * 5 * 21)
    assert DetectorName.parse(name).multiply_adds() == shared + proposals + regions


@pytest.mark.parametrize(
    "name",
    [
        "faster-rcnn-resnet-101",
        "faster-rcnn-plain-18-quarter",
        "faster-rcnn-vgg-16",
        "faster-rcnn-resnet-34-C",
        "faster-rcnn-resnet-50-quarter",
    ],
)
def test_names_parse_to_what_they_were_made_of(name):
    assert str(DetectorName.parse(name)) == Run(name, "voc").net == name
    assert Run(name, "voc-smoke").id == f"{name}__voc-smoke__seed-0"


def test_a_name_has_one_spelling():
    assert Run("faster-rcnn-resnet-101-B", "coco") == Run("faster-rcnn-resnet-101", "coco")


@pytest.mark.parametrize(
    ("net", "dataset", "options", "message"),
    [
        ("resnet-101", "voc", {}, "net 'resnet-101': choose a detector, such as faster-rcnn-resnet-50"),
        ("faster-rcnn-resnet-101", "imagenet", {}, "detectors train on voc, coco or voc-smoke, not on imagenet"),
        ("faster-rcnn-resnet-102", "voc", {}, "depth 102: an ImageNet net has 18"),
        ("faster-rcnn-vgg-17", "voc", {}, "net 'vgg-17': choose vgg-11, vgg-13"),
        ("faster-rcnn-vgg-16", "coco", {"recipe": "smok"}, "recipe 'smok': choose"),
        ("faster-rcnn-resnet-152", "coco", {"recipe": "cifar"}, "its warm-up watches an error that detectors do not"),
        ("resnet-20", "digits", {"weights": {"path": "x"}}, "starts from its seed, give them to detectors"),
        (SMALL, "voc", {"weights": {"path": "/nowhere", "inputs": "torchvision"}}, "there is no such file"),
        (SMALL, "voc", {"weights": {"path": "x", "digest": "x"}}, "option 'digest': choose path, inputs, stride_on"),
        (SMALL, "voc", {"weights": {"file": "x"}}, "option 'file': choose path, inputs, stride_on"),
    ],
)
def test_impossible_runs_are_refused(net, dataset, options, message):
    with pytest.raises(ValueError, match=message):
        Run(net, dataset, **options)


@pytest.fixture
def weights(tmp_path):
    """ImageNet weights of a quarter of ResNet-50, with 5 classes, as options of a run."""
    torch.manual_seed(5)
    classifier = DetectorName.parse("faster-rcnn-resnet-50-quarter").classifier(5, stride_on="3x3")
    torch.save(classifier.state_dict(), tmp_path / "resnet.pth")
    return {"path": str(tmp_path / "resnet.pth"), "inputs": INPUTS, "stride_on": "3x3"}


def test_a_run_with_weights_is_known_by_them_and_not_by_their_place(weights, tmp_path):
    run = Run("faster-rcnn-resnet-50-quarter", "voc-smoke", weights=weights)
    (tmp_path / "moved.pth").write_bytes((tmp_path / "resnet.pth").read_bytes())
    assert Run(run.net, run.dataset, weights=weights | {"path": str(tmp_path / "moved.pth")}) == run
    others = [{"stride_on": "1x1"}, {"inputs": "torchvision"}]
    ids = {Run(run.net, run.dataset, weights=weights | other).id for other in others}
    assert len({run.id, Run(run.net, run.dataset).id} | ids) == 4
    assert Run.from_dict(json.loads(json.dumps(run.to_dict()))) == run


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"stride_on": None}, "stride_on None: choose 1x1, 3x3"),
        ({"inputs": None}, "inputs None: choose torchvision, ours or"),
        (
            {"inputs": "ours"},
            "resnet.pth holds no mean of its images; give a weights.safetensors",
        ),
        ({"inputs": INPUTS | {"std": [0, 1, 1]}}, "inputs std .*three numbers from 0.001 to 1"),
        ({"inputs": {"mean": [1, 2, 3], "std": [1, 1, 1]}}, "inputs mean .*three numbers from 0 to 1"),
    ],
)
def test_weights_must_say_what_their_file_does_not(changed, message, weights):
    with pytest.raises(ValueError, match=f"^weights of faster-rcnn-resnet-50-quarter: .*{message}"):
        Run("faster-rcnn-resnet-50-quarter", "voc-smoke", weights=weights | changed)


def test_a_run_starts_from_its_weights_and_refuses_others_in_their_place(weights, tmp_path):
    run = Run("faster-rcnn-resnet-50-quarter", "voc-smoke", weights=weights)
    net = trainers.new_step(run, 4).net
    stored = torch.load(weights["path"])
    assert torch.equal(net.backbone.layer3[0].conv2.weight, stored["layer3.0.conv2.weight"])
    assert net.roi_heads.box_head.layer4[0].conv2.stride == (2, 2)  # stride_on 3x3
    assert net.transform.image_mean == (0.1, 0.2, 0.3)
    torch.save({name: value + 1 for name, value in stored.items()}, weights["path"])
    with pytest.raises(ValueError, match="is not as it was when this run was made"):
        trainers.new_step(run, 4)


def test_wrong_weights_are_an_error_before_anything_is_trained(weights, drawn, tmp_path):
    """Those of another net, and a file that was changed, in a sweep and in a run of its own."""
    weights["stride_on"] = None
    run, other = Run(SMALL, "voc-smoke", weights=weights), Run(SMALL, "voc-smoke", schedule=1 / 320)
    message = r"resnet\.pth holds the weights of another net: unknown|is not as it was when this run was made"
    for _ in range(2):
        for call in (lambda: run_all([other, run], tmp_path, drawn), lambda: trainers.train(run, tmp_path, drawn)):
            with pytest.raises(ValueError, match=message):
                call()
        torch.save({}, weights["path"])
    assert not (tmp_path / "runs").exists()


def test_weights_of_our_own_nets_bring_the_mean_that_they_were_trained_with(tmp_path):
    """As ``hub.publish`` writes them, the mean image among them; the detector then sees what the net was trained on."""
    torch.manual_seed(5)
    weights = DetectorName.parse(SMALL).classifier(5).state_dict()
    mean = torch.rand(3) * 255
    path = tmp_path / "weights.safetensors"
    save_file(weights | {"mean_image": mean.expand(224, 224, 3).contiguous()}, path)
    net = trainers.new_step(Run(SMALL, "voc-smoke", weights={"path": str(path), "inputs": "ours"}), 4).net
    assert torch.equal(net.backbone.layer3[0].conv2.weight, weights["layer3.0.conv2.weight"])
    pixels = torch.randint(0, 256, (1, 150, 150, 3), dtype=torch.uint8)
    seen = net.transform.normalize(pixels[0].permute(2, 0, 1) / 255)
    torch.testing.assert_close(seen[None], normalize(pixels, mean), rtol=0, atol=1e-6)


def test_torchvisions_own_vgg_loads(tmp_path):
    with torch.device("meta"):
        net = torchvision.models.vgg11()
    state = {name: torch.zeros(value.shape) for name, value in net.state_dict().items()}
    torch.save(state | {"features.0.bias": torch.full((64,), 2.0)}, tmp_path / "vgg.pth")
    run = Run("faster-rcnn-vgg-11", "voc-smoke", weights={"path": str(tmp_path / "vgg.pth"), "inputs": "torchvision"})
    assert trainers.new_step(run, 4).net.backbone[0].bias.eq(2).all()


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A data folder in which voc-smoke is drawn."""
    folder = tmp_path_factory.mktemp("data")
    data.load("voc-smoke", folder)
    return folder


@pytest.fixture
def short(monkeypatch):
    """The smoke recipe in a few iterations; a process of its own would not know of it."""
    monkeypatch.setitem(recipes.RECIPES, "detection-smoke", recipes.Recipe(4, 4, lr=0.01, bn_batch=2))


def left(record):
    """What a run left, but for times."""
    summary = {name: value for name, value in record.summary.items() if "second" not in name}
    stored = torch.load(record.folder / "weights.pt")
    return summary, record.history.drop(columns="seconds"), record.detections, stored


def assert_alike(one, other):
    for mine, theirs in zip(left(one)[:3], left(other)[:3], strict=True):
        assert mine == theirs if isinstance(mine, dict) else mine.equals(theirs)
    mine, theirs = left(one)[3], left(other)[3]
    assert all(torch.equal(value, theirs[name]) for name, value in mine.items())


def test_a_step_is_sgd_on_the_mean_of_the_losses_of_its_parts(drawn, short):
    """Two parts of two images each, written out on a copy of the net; the samplers draw from torch's generator."""
    run = Run("faster-rcnn-vgg-11-quarter", "voc-smoke")
    step, other = (trainers.new_step(run, 4) for _ in range(2))
    images, targets = data.load("voc-smoke", drawn).batches(4, seed=0)(0)
    torch.manual_seed(7)
    step(images, targets, 0.02)
    torch.manual_seed(7)
    sums = torch.zeros(4)
    for part in (slice(0, 2), slice(2, 4)):
        losses = other.net(images[part], targets[part])
        (sum(losses.values()) / 2).backward()
        sums += 2 * torch.stack([losses[name] for name in step.LOSSES]).detach()
    assert step.pop_totals() == pytest.approx(sums.tolist(), rel=1e-5)
    assert step.pop_totals() == [0] * 4
    for mine, theirs in zip(step.net.parameters(), other.net.parameters(), strict=True):
        expected = theirs - 0.02 * (theirs.grad + 1e-4 * theirs)
        torch.testing.assert_close(mine, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("net", [SMALL, "faster-rcnn-vgg-11-quarter"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_run_leaves_its_losses_and_its_precision(net, precision, drawn, short, tmp_path):
    record = trainers.train(Run(net, "voc-smoke", precision=precision), tmp_path, drawn)
    parts = record.history[list(detections.LOSSES)[1:]].sum(axis=1)
    assert record.history["train_loss"].tolist() == pytest.approx(parts.tolist())
    assert record.history["train_error"].isna().all()
    assert {"map_voc07", "map_voc", "map_50", "map_50_95"} <= record.summary.keys()
    assert record.summary["test_error"] is None
    assert record.summary["multiply_adds"] == DetectorName.parse(net).multiply_adds()
    assert record.net == f"{net} from scratch"
    assert (record.folder / "SHA256SUMS").read_text().count("detections.csv") == 1
    assert finished(record.run, tmp_path).summary == record.summary


def test_a_detector_trains_on_files_in_cocos_layout(tmp_path):
    write_coco(tmp_path / "coco-pets", [annotation(1, 7, [5, 5, 20, 20]), annotation(2, 14, [8, 2, 10, 25], 90)])
    run = Run("faster-rcnn-vgg-11-quarter", "coco-pets", recipe=recipes.Recipe(1, 2, lr=0.01))
    record = trainers.train(run, tmp_path / "results", tmp_path)
    assert record.fingerprint == data.load("coco-pets", tmp_path).fingerprint
    assert 0 <= record.summary["map_50_95"] <= record.summary["map_50"] <= 100


def test_the_command_line_takes_weights_and_tells_the_precision(weights, drawn, tmp_path, monkeypatch, capsys):
    command = ["faster-rcnn-resnet-50-quarter", "--dataset", "voc-smoke", "--schedule", "0.001"]
    command += ["--weights", json.dumps(weights), "--results", str(tmp_path), "--data", str(drawn)]
    monkeypatch.setattr(sys, "argv", ["replication", *command])
    main()
    run = Run(command[0], "voc-smoke", schedule=0.001, weights=weights)
    precision = finished(run, tmp_path).summary["map_voc07"]
    assert capsys.readouterr().out.endswith(f"{run.id}: mAP@.5 {precision:.2f} % by VOC's 11 points\n")


def test_the_command_line_tells_cocos_precision(tmp_path, monkeypatch, capsys):
    write_coco(tmp_path / "coco-pets", [annotation(1, 7, [5, 5, 20, 20])])
    command = ["faster-rcnn-vgg-11-quarter", "--dataset", "coco-pets", "--recipe", "detection-smoke"]
    command += ["--schedule", "0.001", "--results", str(tmp_path / "results"), "--data", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["replication", *command])
    main()
    (record,) = all_finished(tmp_path / "results")
    assert capsys.readouterr().out.endswith(f"mAP@[.5, .95] {record.summary['map_50_95']:.2f} %\n")
    record.summary["map_50_95"] = None  # as older records may have it
    kept.write_summary(record.folder, record.summary)
    main()
    assert capsys.readouterr().out.endswith("mAP@[.5, .95] not measured\n")


def test_a_test_image_that_cannot_be_decoded_costs_no_iteration(short, tmp_path, monkeypatch):
    """Its file is damaged behind the header: the same call goes on with the test once its bytes are back."""
    images, run = data.load("voc-smoke", tmp_path), Run("faster-rcnn-vgg-11-quarter", "voc-smoke")
    path = images.folder / images.test.paths[-1]
    content = path.read_bytes()
    path.write_bytes(content[:300] + bytes(len(content) - 300))
    with pytest.raises(ValueError, match=f"{path.name} cannot be read as an image"):
        trainers.train(run, tmp_path / "results", tmp_path)
    path.write_bytes(content)
    monkeypatch.setattr(trainers.steps.DetectionStep, "__call__", None)  # no iteration is left
    record = trainers.train(run, tmp_path / "results", tmp_path)
    assert record.history["iteration"].tolist() == [1, 2, 3, 4]
    assert 0 <= record.summary["map_voc07"] <= 100


@pytest.mark.long  # a killed one does, too
def test_an_interrupted_run_ends_as_an_undisturbed_one(drawn, short, tmp_path, monkeypatch):
    run, undisturbed = Run(SMALL, "voc-smoke"), tmp_path / "undisturbed"
    trainers.train(run, undisturbed, drawn)
    step = trainers.steps.DetectionStep.__call__

    def interrupted(self, *batch):
        step(self, *batch)
        if len(batches) < 2:
            batches.append(batch)
            if len(batches) == 2:
                signal.raise_signal(signal.SIGINT)

    batches = []
    monkeypatch.setattr(trainers.steps.DetectionStep, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt, match="interrupted after 2 of 4 iterations"):
        trainers.train(run, tmp_path, drawn)
    assert_alike(trainers.train(run, tmp_path, drawn), finished(run, undisturbed))


def test_a_killed_run_ends_as_an_undisturbed_one(drawn, tmp_path):
    """In a process of its own, which writes a checkpoint after every iteration and is killed after some of them."""
    code = (
        "import sys; from replication import Run, trainers; from replication.runs import recorder; "
        "recorder.CHECKPOINT_SECONDS = 0; trainers.train(Run(*sys.argv[1:3], schedule=0.02), *sys.argv[3:])"
    )
    run = Run("faster-rcnn-vgg-11-quarter", "voc-smoke", schedule=0.02)
    command = [sys.executable, "-c", code, run.net, run.dataset, str(tmp_path), str(drawn)]
    killed = subprocess.Popen(command)
    while killed.poll() is None:
        if (path := run.folder(tmp_path) / "history.csv").exists() and path.read_text().count("\n") > 3:
            killed.kill()
            killed.wait()
        time.sleep(0.02)
    assert killed.returncode == -signal.SIGKILL
    assert finished(run, tmp_path) is None
    assert (run.folder(tmp_path) / "checkpoint.pt").exists()
    trainers.train(run, tmp_path / "undisturbed", drawn)
    assert_alike(trainers.train(run, tmp_path, drawn), finished(run, tmp_path / "undisturbed"))


def test_processes_share_the_parts_of_a_batch(drawn, tmp_path):
    """One iteration of two processes of one part each, written out: SGD on the mean of both processes' gradients."""
    run = Run(SMALL, "voc-smoke", schedule=1 / 320, bn_batch=4)
    record = trainers.train(run, tmp_path, drawn, processes=2)
    images, recipe = data.load("voc-smoke", drawn), run.settings
    net = trainers.new_step(run, 4).net
    run.name.measure_statistics(net, images.examples(trainers.STATISTICS))
    losses = []
    for rank in (0, 1):
        torch.manual_seed(int(np.random.SeedSequence([run.seed, 2, 0, rank]).generate_state(1)[0]))
        losses.append(net(*images.batches(8, run.seed, share=(rank, 2))(0)))
        (sum(losses[-1].values()) / 2).backward()
    stored, rate = torch.load(record.folder / "weights.pt"), recipe.learning_rate(0)
    for name, value in net.named_parameters():
        expected = value - rate * (value.grad + recipe.weight_decay * value)
        torch.testing.assert_close(stored[name], expected.detach(), atol=1e-6, rtol=1e-4)
    (row,) = record.history.to_dict("records")
    for name in trainers.steps.DetectionStep.LOSSES:
        assert row[name] == pytest.approx(sum(each[name].item() for each in losses) / 2, rel=1e-4)
    assert record.environment["processes"] == 2


def test_a_sweep_trains_detectors_in_workers_and_shows_their_loss(drawn, tmp_path):
    runs = [Run(net, "voc-smoke", schedule=2 / 320) for net in (SMALL, "faster-rcnn-vgg-11-quarter")]
    records = run_all(runs, tmp_path, drawn)
    assert [record.run for record in records] == runs
    row = records[0].history.iloc[-1]
    assert sweeps._last_row(records[0].folder / "history.csv") == (2, row["train_loss"])


def test_detectors_are_never_compiled_and_cost_what_they_count():
    run = Run("faster-rcnn-resnet-101", "coco")
    assert not environment.compiles(run, (600, 800))
    assert environment.cost(run, (600, 800)) == 16 * run.name.multiply_adds()


def test_the_papers_schedules():
    """Appendix A: on COCO 240k iterations at 0.001, then 80k at 0.0001; on VOC those of Faster R-CNN, 60k and 20k."""
    for dataset, first, last in (("coco", 240_000, 320_000), ("voc", 60_000, 80_000)):
        recipe = Run("faster-rcnn-resnet-101", dataset).settings
        rates = [recipe.learning_rate(iteration) for iteration in (0, first - 1, first, last - 1)]
        assert rates == pytest.approx([0.001, 0.001, 0.0001, 0.0001])
        assert (recipe.iterations, recipe.momentum, recipe.weight_decay) == (last, 0.9, 5e-4)


def test_pretrained_takes_what_it_made():
    kept = Pretrained("x", "d", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    assert Pretrained.of(kept, DetectorName.parse(SMALL)) is kept
