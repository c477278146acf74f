"""Weights from files: those that others trained, and the ImageNet errors of nets, measured once and then kept."""

import hashlib
import itertools
import json
import re
from pathlib import Path

import torch

from replication import data as datasets
from replication import evaluate, measure
from replication.data.batches import normalize
from replication.engine import files
from replication.engine.checks import choice, nearest
from replication.evaluate import EVAL_PROTOCOLS, NormalizedNet
from replication.models import STRIDES, BasicBlock, NetName, ZeroPadding
from replication.runs import a_list
from replication.runs.records import ended, json_text, read_json

# The mean and standard deviation of each channel that others normalize inputs by, in units of 0 to 1. CIFAR-10's
# deviations are over all training pixels; many use 0.2023, 0.1994, 0.2010 instead, the mean of those within each image.
INPUTS = {
    "torchvision": {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)},
    "cifar": {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2470, 0.2435, 0.2616)},
    "ours": None,
}
CHOICES = {"zeros": ("behind", "around"), "stride_on": STRIDES}


def load_weights(net, path, zeros="behind"):
    """Load a checkpoint trained by others into ``net``, and return the net.

    The file may hold the weights alone, or under ``state_dict`` or ``model``; their names may begin with ``module.``,
    and the classifier may be called ``linear``. ``zeros``: where the checkpoint's net has the zero channels of shortcut
    A, "behind" the identity, as here, or "around" it, half on either side, as many CIFAR nets do. Such weights would
    load unchanged but compute something else, so their channels are reordered.
    Raises ValueError if the file holds no weights, or those of a different net.
    """
    choice("zeros", zeros, CHOICES["zeros"])
    weights, expected = _read_weights(path), net.state_dict()
    # Torch added this counter to batch norm after some checkpoints were made; errors do not depend on it.
    counters = {name: value for name, value in expected.items() if name.endswith("num_batches_tracked")}
    weights = counters | weights
    here, there = ({name: tuple(value.shape) for name, value in each.items()} for each in (expected, weights))
    problems = [f"{name} is missing" for name in here if name not in there]
    problems += [f"{name} is unknown" for name in there if name not in here]
    problems += [
        f"{name} is {there[name]}, not {here[name]}" for name in here if there.get(name, here[name]) != here[name]
    ]
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"{path} holds the weights of another net: {'; '.join(problems[:5])}{more}")
    net.load_state_dict(_move_zeros_behind(net, weights) if zeros == "around" else weights)
    return net


def _read_weights(path):
    """The tensors of a checkpoint by name, named as in ``replication.models``."""
    try:
        stored = files.load(path)
    except ValueError as error:
        remedy = "write it by torch.save(net.state_dict(), path)"
        raise ValueError(f"{path} is not a file of weights alone ({error}): {remedy}") from error
    for key in ("state_dict", "model"):
        if isinstance(stored, dict) and isinstance(stored.get(key), dict):
            stored = stored[key]
    if not isinstance(stored, dict) or not all(isinstance(value, torch.Tensor) for value in stored.values()):
        raise ValueError(f"{path} holds no weights: expected tensors by name, alone or under 'state_dict' or 'model'")
    return {re.sub(r"^linear\.", "fc.", str(name).removeprefix("module.")): value for name, value in stored.items()}


def _move_zeros_behind(net, weights):
    """Reorder the channels of weights trained with shortcut A's zeros around the identity, to have them behind it."""
    weights = dict(weights)
    order = list(range(net.conv1.out_channels))  # for each of our channels, its index in the checkpoint
    for name, block in net.named_modules():
        if not isinstance(block, BasicBlock):
            continue
        weights[f"{name}.conv1.weight"] = weights[f"{name}.conv1.weight"][:, order]
        if isinstance(block.downsample, ZeroPadding):
            zeros_before = block.downsample.extra // 2
            identity = [zeros_before + channel for channel in order]
            order = identity + sorted(set(range(block.conv2.out_channels)) - set(identity))
        weights[f"{name}.conv2.weight"] = weights[f"{name}.conv2.weight"][order]
        for part in ("weight", "bias", "running_mean", "running_var"):
            weights[f"{name}.bn2.{part}"] = weights[f"{name}.bn2.{part}"][order]
    weights["fc.weight"] = weights["fc.weight"][:, order]
    return weights


def check_options(label, options, imagenet):
    """The options of ``load_net`` with defaults filled in, the net as a ``NetName``; raises as ``load_net`` does."""
    if not isinstance(options, dict):
        raise TypeError(f"weights {label!r}: give its options, such as {{'net': 'resnet-20', 'path': 'file.pth'}}")
    try:
        for option in options:
            choice("option", option, ("net", "path", "inputs", *CHOICES))
        net, path = NetName.parse(options.get("net"), imagenet), options.get("path")
        values = {"zeros": "behind", "stride_on": "1x1"}
        if imagenet and net.depth >= 50:
            del values["stride_on"]  # weights load either way, and must come with the right one
        elif not imagenet and net.residual and net.shortcut == "A":
            del values["zeros"]
        values |= options
        chosen = {option: choice(option, values.get(option), choices) for option, choices in CHOICES.items()}
        _check_inputs(options.get("inputs"))
        if not isinstance(path, str) or not Path(path).is_file():
            raise ValueError(f"path {path!r}: there is no such file")
    except (TypeError, ValueError) as error:
        raise type(error)(f"weights {label!r}: {error}") from error
    return chosen | {"net": net, "path": path, "inputs": options["inputs"]}


def _check_inputs(value):
    """Raise ValueError for what is neither one of ``INPUTS`` nor a mean and a standard deviation of each channel."""
    if isinstance(value, dict) and set(value) == {"mean", "std"}:
        for part, least in (("mean", 0), ("std", 0.001)):
            numbers = value[part] if isinstance(value[part], list | tuple) else ()
            plain = [n for n in numbers if isinstance(n, int | float) and not isinstance(n, bool) and least <= n <= 1]
            if not len(plain) == len(numbers) == 3:
                raise ValueError(
                    f"inputs {part} {value[part]!r}: give three numbers from {least} to 1, for red, green and blue; "
                    "divide those in units of 0 to 255 by 255"
                )
    elif not isinstance(value, str) or value not in INPUTS:
        own = "{'mean': [r, g, b], 'std': [r, g, b]} in units of 0 to 1"
        raise ValueError(f"inputs {value!r}: choose {', '.join(INPUTS)} or {own}{nearest(value, INPUTS)}")


def load_net(label, options, dataset):
    """A net with weights trained by others, to be tested on ``dataset``: a ``NormalizedNet`` on this machine's device.

    options: ``net``, a name of the paper's; ``path`` of the checkpoint; ``inputs``, how it was trained to see pixels:
    each channel minus a mean and divided by a standard deviation, {"mean": [r, g, b], "std": [r, g, b]} in units of 0
    to 1, or the name of such numbers, "torchvision" (0.485, 0.456, 0.406; 0.229, 0.224, 0.225) or "cifar" (CIFAR-10's:
    0.4914, 0.4822, 0.4465; 0.2470, 0.2435, 0.2616), or as nets are trained here, "ours"; for CIFAR nets with shortcut A
    ``zeros``, "behind" or "around", as in ``load_weights``; for bottlenecks ``stride_on``, "1x1" or "3x3", as in
    ``models.Bottleneck``. All are required where they apply: weights load either way, but give garbage with the wrong
    one.
    Raises ValueError or TypeError naming the label and what is wrong.
    """
    options = check_options(label, options, datasets.is_imagenet(dataset.name))
    variant = {"stride_on": options["stride_on"]} if options["net"].imagenet else {}
    device = _device()
    net = options["net"].build(len(dataset.classes), **variant).to(device)
    try:
        load_weights(net, options["path"], options["zeros"])
    except ValueError as error:
        raise ValueError(f"weights {label!r}: {error}") from error
    if options["inputs"] == "ours":
        return NormalizedNet(net, torch.from_numpy(dataset.mean).to(device))
    numbers = options["inputs"] if isinstance(options["inputs"], dict) else INPUTS[options["inputs"]]
    mean, std = (torch.tensor(numbers[part], dtype=torch.float32, device=device) for part in ("mean", "std"))
    return NormalizedNet(net, 255 * mean, std)


def errors_of_others(weights, dataset, data="data", precision="float32"):
    """Single-view test errors in percent of weights trained by others, on a data set of small images.

    weights: {label: options of ``load_net``}. Returns [{"net": label, "parameters": ..., "test_error": ...}].
    """
    check((), weights=weights, imagenet=False)
    if not weights:
        return []
    loaded, rows = datasets.load(dataset, data), []
    pixels, labels = (torch.from_numpy(part).split(500) for part in loaded.test)
    for label, options in weights.items():
        net, mean, std = load_net(label, options, loaded)
        inputs = (normalize(part.to(mean.device), mean, std) for part in pixels)
        batches = ((views, classes.to(mean.device), {}) for views, classes in zip(inputs, labels, strict=True))
        with evaluate.deterministic():
            error = evaluate.single_view(net, batches, mean.device, precision).error
        rows.append({"net": label, "parameters": measure.parameters(net), "test_error": error})
    return rows


def check(nets, ways=tuple(EVAL_PROTOCOLS), ensemble=(), weights=None, imagenet=True):
    """Raise ValueError or TypeError for arguments that ``evaluations`` would refuse, before the nets are trained."""
    for way in a_list("ways", ways):
        choice("way", way, EVAL_PROTOCOLS)
    if not isinstance(ensemble, list | tuple):
        raise TypeError(f"ensemble {ensemble!r}: give a list of nets, such as ['resnet-34', 'resnet-50']")
    if not isinstance(weights, dict | None):
        raise TypeError(f"weights {weights!r}: give options by label, as {{'theirs': {{'net': ..., 'path': ...}}}}")
    for net in ensemble:
        choice("net of the ensemble", net, nets)
    for label, options in (weights or {}).items():
        if not isinstance(label, str) or label == "ensemble" or label.startswith(("plain-", "resnet-")):
            raise ValueError(f"weights {label!r}: choose a label that no net of ours has, such as 'theirs'")
        check_options(label, options, imagenet)


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
    """Errors on an ``ImageNet`` of runs, of weights trained by others and of an ensemble of runs (Tables 2 to 5).

    Returns {name: {way: {"top1": ..., "top5": ...}, "images": ..., "unreadable": ..., ...}}, errors in percent. Names
    are run ids, the labels of ``weights`` ({label: options of ``load_net``}) and "ensemble". ``ways``: keys of
    ``EVAL_PROTOCOLS``. ``ensemble``: names of nets; the first run of each is a member.

    Each error is measured once. A run's are kept in ``evaluation.json`` beside its record, all others in
    ``<folder>/evaluations.json``; they are measured again when weights, images or precision change. A line is printed
    for what can be neither read nor measured, because its weights or the images are not on this machine.
    Raises ValueError or TypeError for unknown ways, invalid options, and members of the ensemble without a run.
    """
    check([record.run.net for record in records], ways, ensemble, weights)
    records, diverged = ended(records)
    for net in diverged:
        print(f"{net}: a run that diverged is not tested")
    own = {record.run.id: record for record in records}
    sources = own | (weights or {})
    members = {name: [name] for name in sources}  # whose scores are averaged
    first = {record.run.net: record.run.id for record in reversed(records)}
    if averaged := [first[net] for net in ensemble if net in first]:
        members["ensemble"] = averaged
    images = datasets.load(dataset, data) if datasets.present(dataset, data) else None

    path = Path(folder) / "evaluations.json"
    stored = read_json(path) | {name: record.evaluation for name, record in own.items()}
    results, missing = {}, {}
    for name, keys in members.items():
        conditions = _conditions(name, [sources[key] for key in keys], images, precision)
        kept = stored.get(name, {})
        known = all(kept.get(key) == value for key, value in conditions.items() if value is not None)
        results[name] = kept if known else conditions
        if images is None or conditions["weights"] is None:
            missing[name] = "images are" if images is None else "weights are"
    for way in ways:
        pending = {name: members[name] for name in members if way not in results[name]}
        for name in [name for name in pending if name in missing]:
            print(f"{name}: not tested by {way}, since its {missing[name]} not here")
            del pending[name]
        for name, measured in _measure(pending, sources, images, way, precision).items():
            results[name] = results[name] | measured
            if name in own:
                files.write(own[name].folder / "evaluation.json", json_text(results[name]))
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
                files.write(path, json_text(read_json(path) | {name: results[name]}))
    return {name: result for name, result in results.items() if set(ways) & set(result)}


def _conditions(name, sources, images, precision):
    """What an evaluation depends on; None for what is not on this machine, or does not apply."""
    return {
        "precision": precision,
        "weights": _digest(source["path"] if isinstance(source, dict) else source.weights for source in sources),
        "options": json.loads(json_text(sources[0])) if isinstance(sources[0], dict) else None,
        "fingerprint": images.fingerprint if images else None,
        "members": [source.run.id for source in sources] if name == "ensemble" else None,
    }


def _digest(paths):
    """SHA-256 over files of weights; None if one is missing."""
    digest = hashlib.sha256()
    for path in paths:
        if path is None or not Path(path).is_file():
            return None
        digest.update(hashlib.sha256(Path(path).read_bytes()).digest())
    return digest.hexdigest()


def _measure(pending, sources, images, way, precision):
    """Measure {name: [keys of ``sources``]} by one protocol: what to add to the evaluation of each name."""
    if not pending:
        return {}
    nets = {key: _load_source(key, sources[key], images) for key in dict.fromkeys(itertools.chain(*pending.values()))}
    ensembles = {name: [nets[key] for key in keys] for name, keys in pending.items()}
    errors, unreadable = evaluate.errors(ensembles, images, way, precision)
    for path, error in unreadable.items():
        print(f"{images.folder / path} cannot be read and is left out: {error}")
    counts = {"images": len(images.test.labels) - len(unreadable), "unreadable": len(unreadable)}
    return {name: {way: errors[name]} | counts for name in pending}


def _load_source(name, source, images):
    """The net of a record, or that of the options of ``load_net``."""
    if isinstance(source, dict):
        return load_net(name, source, images)
    net = load_weights(source.run.name.build(len(images.classes)), source.weights)
    mean = torch.from_numpy(images.hold_out(source.run.holdout).mean)
    return NormalizedNet(net.to(_device()), mean.to(_device()))


def _device():
    return "cuda" if torch.cuda.is_available() else "cpu"
