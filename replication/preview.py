"""What a notebook is about to train: its recipe in numbers, its nets by stage, and images as the nets see them."""

import pandas as pd
import torch

from replication import data as datasets
from replication import measure
from replication.data.imagenet import CROP, TRAIN_SIDES
from replication.models import NetName
from replication.report import spelled, what_is
from replication.report.by_hand import tiles

SHOWN = 8  # images in a row


def images(dataset, data="data"):
    """The data set of that name; None, and a line that says so, where it is not on this machine: none is downloaded."""
    if datasets.present(dataset, data):
        return datasets.load(dataset, data)
    print(f"The images of {dataset!r} are not here: none are shown, and sizes are those for {_words(dataset, None)}.")
    return None


def recipe(runs, dataset):
    """The recipe, in numbers, of runs that share it and the data set: a DataFrame. ``dataset``: as of ``images``."""
    rows = {}
    for run in runs[:1]:
        settings, iterations = run.settings, f"{run.settings.iterations:,}"
        if run.schedule < 1:
            iterations += f", {run.schedule:.4g} of the recipe's"
        batch = f"{settings.batch} images"
        if settings.bn_batch != settings.batch:
            batch += f", normalized {settings.bn_batch} at a time"
        rows = {"recipe": f"{run.recipe_name}: {what_is(run.recipe_name)}", "iterations": iterations, "batch": batch}
        rows |= {"learning rate": _rate(settings), "momentum": f"{settings.momentum:g}"}
        rows |= {"weight decay": f"{settings.weight_decay:g}", "augmentation": _augmentation(run.dataset, dataset)}
        rows["warm-up"] = _warmup(runs)
    return pd.DataFrame(rows.items(), columns=["", "value"])


def _rate(settings):
    text, plateau = f"{settings.lr:g}", settings.plateau
    if settings.milestones:
        text += f", divided by 10 after {' and '.join(f'{each:,}' for each in settings.milestones)} iterations"
    if plateau is not None:
        error = {"train_error": "training", "test_error": "test"}[plateau.watch]
        text += f", divided by 10 when the {error} error has not improved by {100 * plateau.threshold:g} % of its "
        text += f"value for {plateau.patience:,} iterations, at most {plateau.divisions} times"
    return text


def _augmentation(name, dataset):
    if datasets.is_imagenet(name):
        low, high = TRAIN_SIDES
        return f"shorter side {low} to {high} pixels, crops of {CROP}x{CROP}, mirrored, colours shifted, all at random"
    (height, width), _ = _shape(name, dataset)
    mirrored = "never mirrored" if name == "digits" else "mirrored at random"
    return f"a black border {min(height, width) // 8} wide, crops of {height}x{width} at random, {mirrored}"


def _warmup(runs):
    warm = {spelled(run.name.label): run.settings.warmup for run in runs if run.settings.warmup}
    words = "{}: {:g} until an epoch's training error is below {} %"
    return "; ".join(words.format(net, each.lr, each.until) for net, each in warm.items()) or "none"


def _shape(name, dataset):
    """Height and width of images, and the number of classes; of CIFAR's or ImageNet's where there is no data set."""
    if dataset is not None:
        return dataset.size, len(dataset.classes)
    return ((CROP, CROP), 1000) if datasets.is_imagenet(name) else ((32, 32), 100 if name == "cifar100" else 10)


def _words(name, dataset):
    (height, width), classes = _shape(name, dataset)
    return f"{height}x{width} pixels and {classes:,} classes"


def nets(runs, dataset):
    """The nets of runs by stage, a row for each: the layers of every stage, and the number of all parameters.

    Columns are named by the stage and the size of the maps that leave it. ``dataset``: as of ``images``. Nets of one's
    own, which need not have such stages, are left out.
    """
    rows = []
    for name in dict.fromkeys(run.name for run in runs if isinstance(run.name, NetName)):
        size, classes = _shape(runs[0].dataset, dataset)
        with torch.device("meta"):  # shapes without values are enough
            net = name.build(classes)
        layers, row = measure.layers(net, size), {"net": spelled(name.label)}
        for stage, members in layers.groupby(layers["name"].str.partition(".")[0], sort=False):
            last = members.iloc[-1]
            row[stage if last["kind"] == "fc" else f"{stage}, {last['height']}x{last['map']}"] = _stage(members)
        rows.append(row | {"parameters": f"{measure.parameters(net):,}"})
    return pd.DataFrame(rows)


def _stage(layers):
    """The layers of a stage as in Table 1: "[3x3, 16; 3x3, 16] × 3"."""
    words = layers["kind"].str.split().str[0] + ", " + layers["channels"].astype(str)
    blocks = words.groupby(layers["name"].str.rpartition(".")[0], sort=False).agg("; ".join)
    return blocks.iloc[0] if len(layers) == 1 else f"[{blocks.iloc[0]}] × {len(blocks)}"


def batch(runs, dataset):
    """A figure of the first images of the first run's first batch, augmented as for its net, with their classes.

    The mean that is subtracted for the net is added again. ``dataset``: as of ``images``; None without training images.
    """
    if not runs or dataset is None or not len(dataset.train.labels):
        return None
    run, part = runs[0], dataset.hold_out(runs[0].holdout)
    share = (0, max(1, run.settings.batch // SHOWN))
    batches = part.batches(run.settings.batch, run.seed, share=share, iterations=1, workers=0)
    inputs, labels = batches(0)
    pixels = inputs.permute(0, 2, 3, 1) * 255 + torch.from_numpy(part.mean)
    names = [part.classes[label] for label in labels.tolist()]
    return tiles(pixels.round().clip(0, 255).byte().numpy()[:SHOWN], names[:SHOWN], SHOWN)
