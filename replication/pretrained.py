"""Weights from files: those that others trained, and the ImageNet errors of nets, measured once and then kept."""

import contextlib
import hashlib
import itertools
import json
import re
import zipfile
from pathlib import Path

import torch

from replication import data as datasets
from replication import evaluate, measure
from replication.data.batches import original_views
from replication.engine import files
from replication.engine.checks import channels, choice
from replication.engine.vision import MEAN_IMAGE, TORCHVISION
from replication.evaluate import EVAL_PROTOCOLS, NormalizedNet
from replication.models import SHORTCUTS, STRIDES, BasicBlock, Net, NetName, ZeroPadding
from replication.runs import a_list
from replication.runs.records import ended, json_text, read_json

# The mean and standard deviation of each channel that others normalize inputs by, in units of 0 to 1. CIFAR-10's
# deviations are over all training pixels; many use 0.2023, 0.1994, 0.2010 instead, the mean of those within each image.
INPUTS = {
    "torchvision": dict(zip(("mean", "std"), TORCHVISION, strict=True)),
    "cifar": {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2470, 0.2435, 0.2616)},
    "ours": None,
}
CHOICES = {"zeros": ("behind", "around"), "stride_on": STRIDES}
KEYS = (  # under which weights lie; averaged ones come first, since their authors test and publish those
    *("state_dict_ema", "model_ema", "ema_state_dict", "ema_model", "ema", "params_ema"),
    *("state_dict", "model_state_dict", "model_state", "model", "net", "network", "module", "weights", "params"),
)
RESAVE = (  # what keeps the weights of a file that torch reads only by executing code
    "import torch; kept = torch.load({path!r}, 'cpu', weights_only=False); "
    "kept = kept if isinstance(kept, dict) else {{'model': kept}}; "
    "torch.save({{name: part.state_dict() if hasattr(part, 'state_dict') else part for name, part in kept.items() "
    "if hasattr(part, 'state_dict') or torch.is_tensor(part) or name in {keys}}}, {new!r})"
)
COUNTER = "num_batches_tracked"  # of batch norm; errors do not depend on it


def load_weights(net, path, zeros="behind"):
    """Load a checkpoint trained by others into ``net``, one of ``models``, and return the net.

    The file is one of ``torch.save`` or ends in ``.safetensors``. It may hold the weights alone or under one of
    ``KEYS``, and whatever else; if under several, the first is taken and a line says so. All names may have a prefix,
    as ``module.``; the classifier may be called ``linear`` and the projections ``shortcut``. ``zeros``: where the
    checkpoint's net has the zero channels of shortcut A, "behind" the identity, as here, or "around" it, half on either
    side, as many CIFAR nets do. Such weights would load unchanged but compute something else, so their channels are
    reordered.
    Raises ValueError if the file holds no weights, or those of a different net.
    """
    choice("zeros", zeros, CHOICES["zeros"])
    weights = _fitting_weights(net, path, _read_weights(path))
    net.load_state_dict(_move_zeros_behind(net, weights) if zeros == "around" else weights)
    return net


def _fitting_weights(net, path, weights):
    """The weights of a net, read from that path, with batch norm's counters; raises ValueError for another net's."""
    expected = net.state_dict()
    # Torch added the counter after some checkpoints were made.
    weights |= {name: value for name, value in expected.items() if name.endswith(COUNTER)}
    problems = {
        "missing": [name for name in expected if name not in weights],
        "unknown": [name for name in weights if name not in expected],
        "wrong": [
            f"{name} is {_described(weights[name])}, not {_described(expected[name])}"
            for name in expected
            if name in weights and _described(weights[name]) != _described(expected[name])
        ],
    }
    if any(problems.values()):
        listed = "; ".join(f"{kind}: {_first(names)}" for kind, names in problems.items() if names)
        raise ValueError(f"{path} holds the weights of another net{_fitting(net, weights)}: {listed}")
    return weights


def load_detector(run, classes):
    """The detector of a run, for so many classes, which starts from the ImageNet weights of ``run.weights``.

    Raises ValueError if the file is not as it was when the run was made, or holds the weights of a different net.
    """
    weights, stored = run.weights, _stored_weights(run)
    net = _classifier(run, stored)
    net.load_state_dict(_fitting_weights(net, weights.path, stored))
    return run.name.build(classes, net, (weights.mean, weights.std))


def check_detectors(runs):
    """Raise ValueError for the first of these runs that ``load_detector`` refuses; each file is read once."""
    for run in {(run.net, run.weights.path, run.weights): run for run in runs if run.weights is not None}.values():
        stored = _stored_weights(run)
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            net = _classifier(run, stored)
        _fitting_weights(net, run.weights.path, stored)


def _stored_weights(run):
    """The tensors that a detector's run starts from, by name; raises as ``load_detector`` does."""
    path = Path(files.expanded("path", run.weights.path))
    content = path.read_bytes() if path.is_file() else b""
    if files.digest(content) != run.weights.digest:
        raise ValueError(
            f"weights of {run.name}: {path} is not as it was when this run was made: bring that back, or make the run "
            "again"
        )
    return _read_weights(path, content)


def _classifier(run, stored):
    """The ImageNet net of a run's detector, with as many classes as the weights have."""
    outputs = [stored[last].numel() for last in ("fc.bias", "classifier.6.bias") if last in stored]
    stride_on = run.weights.stride_on
    return run.name.classifier(*outputs[:1], **({"stride_on": stride_on} if stride_on else {}))


def _described(tensor):
    """Its shape, and the type and layout where values cannot be copied from it to a floating-point one."""
    plain = tensor.is_floating_point() and tensor.layout is torch.strided
    return str(tuple(tensor.shape)) + ("" if plain else f" of {tensor.dtype}, {tensor.layout}")


def _first(names):
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _fitting(net, weights):
    """For an error message: which net of the same family has weights of these names and shapes."""
    if not isinstance(net, Net):  # VGG, of a detector
        return ""
    theirs = {name: value.shape for name, value in weights.items() if not name.endswith(COUNTER)}
    blocks = {match[0] for match in map(re.compile(r"layer\d+\.\d+\.").match, theirs) if match}
    depth = 2 + len(blocks) * (3 if "layer1.0.conv3.weight" in theirs else 2)
    classes = theirs["fc.bias"].numel() if "fc.bias" in theirs else 0
    kinds = [f"resnet-{depth}-{shortcut}" for shortcut in SHORTCUTS]
    for kind in kinds if net.layer1[0].residual else [f"plain-{depth}", *kinds]:
        try:
            with torch.device("meta"):
                name = NetName.parse(kind, imagenet=net.stages == 4)
                fitting = name.build(classes).state_dict()
        except ValueError:  # there is no such net
            continue
        if theirs == {name: value.shape for name, value in fitting.items() if not name.endswith(COUNTER)}:
            return f" (they fit {name}{f' with {classes} classes' if classes != net.fc.out_features else ''})"
    return ""


def _read_weights(path, content=None):
    """The tensors of a checkpoint by name, named as in ``replication.models``, without the counters of batch norm.

    content: of the file, where it was read already.
    """
    path = files.expanded("path", path)
    try:
        stored = files.load(path, content)
    except ValueError as error:
        if found := _found_instead(Path(path)):
            raise ValueError(f"{path} is not a file of weights but {found}") from error
        remedy = "get it again, or write it by torch.save(net.state_dict(), path)"
        if re.search("GLOBAL|TorchScript", str(error.__cause__)):
            line = RESAVE.format(path=str(path), keys=KEYS, new=str(Path(path).with_suffix(".weights.pt")))
            remedy = (
                f"if you trust it, this line of Python saves its weights alone, but executes any code in it: {line}"
            )
        raise ValueError(f"{path} is not a file of weights alone ({error}): {remedy}") from error
    tensors = _tensors(stored, path)
    if not tensors:
        raise ValueError(f"{path} holds no weights: expected tensors by name, alone or under one of {', '.join(KEYS)}")
    stem = "layer1.0.conv1.weight"  # what stands before it stands before all names
    prefix = next((name.removesuffix(stem) for name in tensors if name.endswith(stem)), "")
    weights = {}
    for name, value in tensors.items():
        ours = re.sub(r"^linear\.", "fc.", name.removeprefix(prefix)).replace(".shortcut.", ".downsample.")
        if ours in weights:
            raise ValueError(f"{path} holds {ours} twice, once as {name}: leave one of them in it")
        if not ours.endswith(COUNTER) and name not in ("n_averaged", MEAN_IMAGE):  # of torch's AveragedModel, and ours
            weights[ours] = value
    return weights


def _tensors(stored, path, within=()):
    """The tensors by name in what a checkpoint holds, which may lie under keys within keys."""
    if not isinstance(stored, dict) or len(within) > 3:
        return {}
    parts = [key for key in KEYS if isinstance(stored.get(key), dict)]
    for key in parts:
        if tensors := _tensors(stored[key], path, (*within, key)):
            if len(parts) > 1:
                print(f"{path} holds {' and '.join(parts)}: the weights under {key} are taken")
            return tensors
    return {str(name): value for name, value in stored.items() if isinstance(value, torch.Tensor) and not value.is_meta}


def _found_instead(path):
    """For an error message: what lies there in place of a file of weights, and the remedy; None if it may be one."""
    if path.is_dir():
        return "a folder: give the path of a file"
    with path.open("rb") as file:
        start = file.read(512)
    text = start.decode("utf-8-sig", errors="replace").strip()
    if not text:
        return "an empty file: get it again"
    first = text.splitlines()[0][:60].expandtabs()
    if first.isprintable() and "\ufffd" not in first:
        if first.startswith("version https://git-lfs"):
            return "a Git LFS pointer: `git lfs pull` fetches the file that it stands for"
        return "a web page: get the file itself" if first[0] == "<" else f"a text that begins {first!r}: get the file"
    for place, magic, kind in ((0, b"\x1f\x8b", "gzip"), (257, b"ustar", "tar")):
        if start[place:].startswith(magic):
            return f"a {kind} archive: unpack it"
    with contextlib.suppress(zipfile.BadZipFile, ValueError, NotImplementedError), zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        if not any(name.endswith("data.pkl") for name in names):  # torch's own have one
            return f"a zip archive of {_first(names)}: unpack it"
    if start[8:9] == b"{" and path.suffix.lower() != ".safetensors":
        return "in the format of safetensors: give it a name that ends in .safetensors"
    return None


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
    """The options of ``load_others``, the defaults filled in, the net as a ``NetName``; raises as it does."""
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
        channels(options.get("inputs"), INPUTS)
        if not isinstance(path, str) or not Path(files.expanded("path", path)).is_file():
            raise ValueError(f"path {path!r}: there is no such file")
    except (TypeError, ValueError) as error:
        raise type(error)(f"weights {label!r}: {error}") from error
    return chosen | {"net": net, "path": path, "inputs": options["inputs"]}


def load_others(label, options, dataset):
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

    weights: {label: options of ``load_others``}. Returns [{"net": label, "parameters": ..., "test_error": ...}].
    """
    check((), weights=weights, imagenet=False)
    if not weights:
        return []
    loaded, rows = datasets.load(dataset, data), []
    for label, options in weights.items():
        net, mean, std = load_others(label, options, loaded)
        batches = original_views(loaded.test, mean, std)
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
    are run ids, the labels of ``weights`` ({label: options of ``load_others``}) and "ensemble". ``ways``: keys of
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
        path = None if path is None else Path(files.expanded("path", path))
        if path is None or not path.is_file():
            return None
        digest.update(hashlib.sha256(path.read_bytes()).digest())
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
    """The net of a record, or that of the options of ``load_others``."""
    if isinstance(source, dict):
        return load_others(name, source, images)
    net = source.run.name.build(len(images.classes))
    if isinstance(source.run.name, NetName):
        load_weights(net, source.weights)
    else:  # one's own, whose names mean what they say
        net.load_state_dict(files.load(source.weights))
    mean = torch.from_numpy(images.hold_out(source.run.holdout).mean)
    return NormalizedNet(net.to(_device()), mean.to(_device()))


def _device():
    return "cuda" if torch.cuda.is_available() else "cpu"
