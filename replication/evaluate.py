"""Errors of nets on images they are not trained on, in every way that the paper tests them."""

import hashlib
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F

from replication import data as datasets
from replication import measure, models, runs
from replication.data import imagenet as photographs
from replication.data.batches import normalize
from replication.engine import files
from replication.engine.machine import autocast
from replication.engine.progress import progress_bar
from replication.runs.records import ended, json_text, read_json


def single_view(net, views, device="cpu", precision="float32", kept=None):
    """Top-1 error in percent and mean cross-entropy over the views of a part, one an image.

    ``views``: inputs ``(N, 3, H, W)`` and labels ``(N,)`` on ``device``, batch by batch, of ``dataset.eval_batches``.
    Each of several processes gives its share, and all get the errors over everything. The net's mode is put back
    afterwards. ``kept``: a list that gets this process's labels and predicted classes, batch by batch, as (2, N).
    Raises ValueError for no image at all.
    """
    training = net.training
    net.eval()
    sums = torch.zeros(3, dtype=torch.float64, device=device)  # wrong, loss, images
    with torch.inference_mode(), autocast(device, precision):
        for inputs, labels in views:
            logits = net(inputs).float()
            predicted = logits.argmax(1)
            sums[0] += (predicted != labels).sum()
            sums[1] += F.cross_entropy(logits, labels, reduction="sum")
            sums[2] += len(labels)
            if kept is not None:
                kept.append(torch.stack([labels, predicted]).cpu())
    net.train(training)
    if dist.is_initialized():
        dist.all_reduce(sums)
    wrong, loss, count = sums.tolist()
    if not count:
        raise ValueError("there is no image to measure an error on")
    return 100 * wrong / count, loss / count


def ten_crop(image):
    """Centre and corners of the central 256x256 of a photograph with a shorter side of 256, and their mirror images.

    The standard 10-crop of Krizhevsky et al. 2012 (the paper's [21]): one tensor (10, 224, 224, 3) in uint8.
    """
    from torchvision.transforms.v2 import functional as v2

    square = v2.center_crop(photographs.resized(image, photographs.TEST_SIDE), [photographs.TEST_SIDE])
    crops = [v2.pil_to_tensor(crop).permute(1, 2, 0) for crop in v2.ten_crop(square, [photographs.CROP])]
    return [torch.stack(crops)]


def multi_scale(image):
    """The whole photograph, its shorter side resized to 224, 256, 384, 480 and 640: five views (1, H, W, 3) in uint8.

    A net sees them fully convolutionally: its global average pooling takes a map of any size (section 3.4).
    """
    from torchvision.transforms.v2 import functional as v2

    sides = photographs.TEST_SIDES
    return [v2.pil_to_tensor(photographs.resized(image, side)).permute(1, 2, 0)[None] for side in sides]


EVAL_PROTOCOLS = {"centre crop": photographs.central_crop, "10-crop": ten_crop, "multi-scale": multi_scale}


def deterministic():
    """The context in which convolutions are repeatable and, where float32 is asked for, in float32 (no TF32)."""
    return torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)


class Tested(NamedTuple):
    """A net, and what makes its inputs: pixels less ``mean``, divided by 255 and ``std``, as in ``normalize``."""

    net: torch.nn.Module
    mean: torch.Tensor
    std: torch.Tensor | None = None


def scores(tested, seen, precision="float32"):
    """Softmax scores ``(N, classes)`` of N photographs, the mean over their views.

    ``seen``: of each photograph a list of tensors of views, (k, H, W, 3) in uint8. What is of one size is seen at once.
    """
    device, sizes = tested.mean.device, {}
    for number, tensors in enumerate(seen):
        for views in tensors:
            sizes.setdefault(views.shape, []).append((number, views))
    total, count = None, sum(len(views) for views in seen[0])
    for shape, members in sizes.items():
        numbers, views = zip(*members, strict=True)
        inputs = normalize(torch.cat(views).to(device), tested.mean, tested.std)
        with torch.inference_mode(), autocast(device, precision):
            logits = tested.net(inputs)
        found = logits.float().softmax(1).unflatten(0, (len(views), shape[0])).sum(1)
        total = found.new_zeros(len(seen), found.shape[1]) if total is None else total
        total.index_add_(0, torch.tensor(numbers, device=device), found)
    return total / count


def errors(entries, dataset, way, precision="float32", batch=8, workers=None):
    """Top-1 and top-5 errors in percent of each entry on an ``ImageNet``'s test part, by one of ``EVAL_PROTOCOLS``.

    entries: {name: [Tested, ...]}; the scores of several nets are averaged: an ensemble.
    The test images are read once, ``batch`` at a time, for all entries: memory does not grow with their number.
    Returns {name: {"top1": ..., "top5": ...}}, and {path: error} of the files that could not be read and are left out.
    With fewer than six classes there is no top-5 error: it is None.
    Raises ValueError when no image can be read.
    """
    nets = {id(tested.net): tested for members in entries.values() for tested in members}
    for tested in nets.values():
        tested.net.eval().to(tested.mean.device, memory_format=torch.channels_last)
    wrong = {name: torch.zeros(2, dtype=torch.int64) for name in entries}
    images, failed, count = 0, {}, len(dataset.test.labels)
    title = f"{way}, {len(nets)} net{'s' if len(nets) > 1 else ''}"
    with deterministic(), progress_bar(count, title, "images") as bar:
        for seen, labels, failures in photographs.read(dataset, dataset.test, EVAL_PROTOCOLS[way], batch, workers):
            failed |= failures
            images += len(labels)
            bar.update(len(labels) + len(failures))
            if not seen:
                continue
            found = {key: scores(tested, seen, precision) for key, tested in nets.items()}
            for name, members in entries.items():
                mean = torch.stack([found[id(tested.net)] for tested in members]).mean(0)
                best = mean.topk(min(5, mean.shape[1])).indices.cpu() == labels[:, None]
                wrong[name] += torch.stack([~best[:, 0], ~best.any(1)]).sum(1)
    if not images:
        raise ValueError(f"none of the test images of {dataset.folder} can be read")
    few = len(dataset.classes) < 6
    rates = {name: (100 * counts / images).tolist() for name, counts in wrong.items()}
    return {name: {"top1": top1, "top5": None if few else top5} for name, (top1, top5) in rates.items()}, failed


TORCHVISION = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}  # of the inputs of torchvision's nets
OTHERS = ("net", "path", "inputs", "zeros", "stride_on")


def check_other(label, options, imagenet):
    """Check the options of ``load_other``, which are returned complete; raises as it does."""
    if not isinstance(options, dict):
        raise TypeError(f"weights {label!r}: give its options, such as {{'net': 'resnet-20', 'path': 'file.pth'}}")
    try:
        for option in options:
            runs.choice("option", option, OTHERS)
        name = models.NetName.parse(options.get("net"), imagenet)
        inputs = runs.choice("inputs", options.get("inputs", "torchvision"), ("torchvision", "ours"))
        complete = {"name": name, "inputs": inputs, "zeros": "behind", "variant": {}}
        if imagenet and name.depth >= 50:
            stride_on = runs.choice("stride_on", options.get("stride_on"), ("1x1", "3x3"))
            complete["variant"] = {"stride_on": stride_on}
        if name.residual and name.shortcut == "A" and not imagenet:
            complete["zeros"] = runs.choice("zeros", options.get("zeros"), ("behind", "around"))
        if not isinstance(options.get("path"), str) or not Path(options["path"]).is_file():
            raise ValueError(f"path {options.get('path')!r}: there is no such file")
    except (TypeError, ValueError) as error:
        raise type(error)(f"weights {label!r}: {error}") from error
    return complete


def load_other(label, options, dataset):
    """Weights of somebody else's, ready to be tested on a data set: a ``Tested`` on this machine's device.

    options: ``net``, a name of the paper's; ``path`` of the checkpoint; ``inputs``, "torchvision" (left out), where as
    in most of the field each channel is less a mean and divided by a deviation, or "ours"; for CIFAR nets with shortcut
    A ``zeros``, "behind" or "around" (see ``models.load_weights``); for bottlenecks ``stride_on``, "1x1" or "3x3" (see
    ``models.imagenet_net``). The last two must be said: weights load either way, and in the wrong one are garbage.
    Raises ValueError or TypeError naming the label and what is wrong.
    """
    complete = check_other(label, options, datasets.is_imagenet(dataset.name))
    net, device = complete["name"].build(len(dataset.classes), **complete["variant"]), _device()
    try:
        models.load_weights(net, options["path"], complete["zeros"])
    except ValueError as error:
        raise ValueError(f"weights {label!r}: {error}") from error
    if complete["inputs"] == "ours":
        return Tested(net.to(device), torch.from_numpy(dataset.mean).to(device))
    mean, std = (torch.tensor(TORCHVISION[part], device=device) for part in ("mean", "std"))
    return Tested(net.to(device), 255 * mean, std)


def errors_of_others(weights, dataset, data="data", precision="float32"):
    """Test weights of others on a data set of small images: [{"net": label, "parameters": ..., "test_error": ...}].

    weights: {label: options of ``load_other``}. Test errors are in percent, of the single view.
    """
    check((), weights=weights, imagenet=False)
    if not weights:
        return []
    loaded, rows = datasets.load(dataset, data), []
    for label, options in weights.items():
        net, mean, std = load_other(label, options, loaded)
        views = loaded.eval_batches(loaded.test, mean.device, mean=mean, std=std)
        with deterministic():
            error, _ = single_view(net, views, mean.device, precision)
        rows.append({"net": label, "parameters": measure.parameters(net), "test_error": error})
    return rows


def check(nets, ways=tuple(EVAL_PROTOCOLS), ensemble=(), weights=None, imagenet=True):
    """Raise ValueError or TypeError for what ``evaluations`` of these nets would refuse, before they are trained."""
    for way in runs.a_list("ways", ways):
        runs.choice("way", way, EVAL_PROTOCOLS)
    if not isinstance(ensemble, list | tuple):
        raise TypeError(f"ensemble {ensemble!r}: give a list of nets, such as ['resnet-34', 'resnet-50']")
    if not isinstance(weights, dict | None):
        raise TypeError(
            f"weights {weights!r}: give options by label, such as {{'theirs': {{'net': ..., 'path': ...}}}}"
        )
    for net in ensemble:
        runs.choice("net of the ensemble", net, nets)
    for label, options in (weights or {}).items():
        if not isinstance(label, str) or label == "ensemble" or label.startswith(("plain-", "resnet-")):
            raise ValueError(f"weights {label!r}: choose a label that no net of ours has, such as 'theirs'")
        check_other(label, options, imagenet)


def evaluations(
    records,
    dataset,
    data="data",
    weights=None,
    ensemble=(),
    ways=tuple(EVAL_PROTOCOLS),
    precision="float32",
    folder="results",
):
    """Errors in each way of runs on an ``ImageNet``, of weights of others and of an ensemble of runs: {name: errors}.

    Errors are {way: {"top1": ..., "top5": ...}, "images": ..., "unreadable": ..., ...} in percent. A run's are kept in
    ``evaluation.json`` beside its record and loaded from there, the others' and the ensemble's in
    ``<folder>/evaluations.json``; what is missing is measured, way by way in one pass over the test images, and kept.
    Names are run ids, the labels of ``weights`` (their options as in ``load_other``), and "ensemble". Runs without
    weights and without errors from before are left out, with a line that says so.
    ensemble: names of nets, of each the first run.
    Raises ValueError or TypeError for unknown ways, for bad options, and for a net of the ensemble without a run.
    """
    check([record.run.net for record in records], ways, ensemble, weights)
    records, diverged = ended(records)
    weights, own = weights or {}, {record.run.id: record for record in records}
    first = {record.run.net: record for record in reversed(records)}
    for net in diverged:
        print(f"{net}: a run that diverged is not tested")
    together = [first[net] for net in ensemble if net in first]
    loaded = datasets.load(dataset, data) if datasets.present(dataset, data) else None
    known = _known(own, weights, together, loaded, precision, Path(folder))
    for way in ways:
        missing = []
        for name, found in known.items():
            if way in found:
                continue
            if found["weights"] is not None and loaded is not None:
                missing.append(name)
            else:
                print(f"{name}: not tested by {way}, since its {'weights are' if loaded else 'images are'} not here")
        if missing:
            _measure(missing, known, own, weights, together, loaded, way, precision)
            _keep(known, own, Path(folder))
    return {name: found for name, found in known.items() if set(ways) & set(found)}


def _known(own, weights, together, loaded, precision, folder):
    """What was measured before of the same weights and images; where nothing was, only what it depends on."""
    paths = {name: [record.weights] for name, record in own.items()}
    paths |= {label: [Path(options["path"])] for label, options in weights.items()}
    paths |= {"ensemble": [record.weights for record in together]} if together else {}
    stored = read_json(folder / "evaluations.json") | {
        name: record.evaluation for name, record in own.items() if record.evaluation
    }
    known = {}
    for name, members in paths.items():
        depends = {"precision": precision, "weights": _digest(members), "options": weights.get(name)}
        depends["fingerprint"] = loaded.fingerprint if loaded else None
        depends["members"] = [record.run.id for record in together] if name == "ensemble" else None
        before = stored.get(name, {})
        # Where weights or images are not here any more, their old errors stand.
        alike = all(before.get(key) == value for key, value in depends.items() if value is not None)
        known[name] = before if before and alike else depends
    return known


def _measure(missing, known, own, weights, together, loaded, way, precision):
    nets = {name: load_other(name, weights[name], loaded) for name in missing if name in weights}
    for name, record in own.items():
        if name in missing or (record in together and "ensemble" in missing):
            net = models.load_weights(record.run.name.build(len(loaded.classes)), record.weights)
            mean = loaded.hold_out(record.run.holdout).mean
            nets[name] = Tested(net.to(_device()), torch.from_numpy(mean).to(_device()))
    entries = {
        name: [nets[record.run.id] for record in together] if name == "ensemble" else [nets[name]] for name in missing
    }
    found, failed = errors(entries, loaded, way, precision)
    for path, error in failed.items():
        print(f"{loaded.folder / path} cannot be read and is left out: {error}")
    for name in missing:
        counts = {"images": len(loaded.test.labels) - len(failed), "unreadable": len(failed)}
        known[name] = known[name] | {way: found[name]} | counts


def _keep(known, own, folder):
    for name, record in own.items():
        if known[name] != record.evaluation and set(EVAL_PROTOCOLS) & set(known[name]):
            files.write(record.folder / "evaluation.json", json_text(known[name]))
    folder.mkdir(parents=True, exist_ok=True)
    others = {name: found for name, found in known.items() if name not in own}
    path = folder / "evaluations.json"
    files.write(path, json_text(read_json(path) | others))


def _digest(paths):
    """SHA-256 over files of weights; None where one is missing."""
    digest = hashlib.sha256()
    for path in paths:
        if path is None or not path.is_file():
            return None
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _device():
    return "cuda" if torch.cuda.is_available() else "cpu"
