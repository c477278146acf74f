"""Trained nets that come with this repository: which there are, loading one, and publishing another."""

import contextlib
import json
import shutil
import tempfile
from dataclasses import fields
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from replication import data as datasets
from replication.data.batches import normalize
from replication.data.folders import to_rgb
from replication.engine import files
from replication.engine.checks import nearest, whole
from replication.engine.files import DamagedError
from replication.engine.vision import MEAN_IMAGE
from replication.models import NetName
from replication.runs import Run, records
from replication.runs.records import SUMS, WEIGHTS, all_finished, by_conditions

AT_ONCE = 100  # images that ``predict`` passes through a net together
COLUMNS = ["net", "dataset", "seed", "parameters", "test_error", "seconds", "hardware", "iterations", "command"]


class TrainedNet(nn.Module):
    """A trained net for pixels as image files hold them; gives logits ``(N, classes)``. It is in eval mode.

    Images are uint8 ``(N, H, W, 3)`` in RGB, as a numpy array or a tensor, or a PIL image or a list of these, and have
    the size that the net was trained on. Anything else is a TypeError or ValueError, since it might be normalized
    twice, or not at all.

    net: the net without normalization, one of ``models``.
    mean: what inputs are centred by, ``(H, W, 3)``, from 0 to 255.
    classes: their names, in the order of the logits.
    record: the ``Record`` of the run that trained it.
    """

    def __init__(self, net, mean, classes, record):
        super().__init__()
        self.net, self.classes, self.record = net, tuple(classes), record
        self.register_buffer("mean", mean)
        self.eval()

    def forward(self, images):
        return self.net(self.normalize(images))

    def normalize(self, images):
        """What ``net`` takes, ``(N, 3, H, W)`` on its device: pixels minus the mean image, divided by 255."""
        return normalize(self._pixels(images).to(self.mean.device), self.mean).to(self.mean.dtype)

    def predict(self, images):
        """The class of each image, a list of names. The mode of the net does not matter, and is left as it was."""
        training, parts = self.training, self._pixels(images).split(AT_ONCE)
        self.eval()
        with torch.inference_mode():
            predicted = torch.cat([self(part).argmax(1) for part in parts])
        self.train(training)
        return [self.classes[number] for number in predicted.tolist()]

    def _pixels(self, images):
        height, width = self.mean.shape[:2]
        wanted = f"give uint8 (N, {height}, {width}, 3) in RGB"
        resize = f"resize(({width}, {height}))"
        if isinstance(images, Image.Image):
            images = [images]
        if isinstance(images, list | tuple) and images and all(isinstance(image, Image.Image) for image in images):
            for image in images:
                if image.size != (width, height):
                    raise ValueError(
                        f"an image of {image.width}x{image.height}: this net was trained on {width}x{height}, give "
                        f"image.{resize}"
                    )
            images = np.stack([np.asarray(to_rgb(image)) for image in images])
        if not isinstance(images, np.ndarray | torch.Tensor):
            raise TypeError(f"images of type {type(images).__name__}: {wanted}, in numpy or torch, or PIL images")
        if images.dtype != (torch.uint8 if torch.is_tensor(images) else np.uint8):
            raise TypeError(f"pixels in {images.dtype}: {wanted}, from 0 to 255 as in image files, not normalized")
        shape = tuple(images.shape)
        if len(shape) != 4 or shape[1:] != (height, width, 3):
            remedy = f"resize those of another size, as by Image.fromarray(pixels).{resize}"
            if shape[1:] == (3, height, width):
                permute = "permute" if torch.is_tensor(images) else "transpose"
                remedy = f"pixels.{permute}(0, 2, 3, 1) puts channels last"
            elif shape == (height, width, 3):
                remedy = "pixels[None] makes one image a batch"
            raise ValueError(f"pixels of shape {shape}: {wanted}; {remedy}")
        # Torch takes no array whose memory runs backwards, and warns of one that is read-only.
        return images if torch.is_tensor(images) else torch.from_numpy(np.array(images, order="C"))


def load_net(net, dataset="digits", seed=0):
    """A net published with this repository, as ``load_net("resnet-56", "cifar10")``: a ``TrainedNet`` on the CPU.

    Needs no images. ``nets`` lists what there is.
    Raises ValueError for a net, data set or seed without weights, naming those with, TypeError for anything else, and
    DamagedError for weights that are not as they were published.
    """
    if not isinstance(dataset, str):
        raise TypeError(f"dataset {dataset!r}: give a name such as 'cifar10'")
    with contextlib.suppress(ValueError):  # any name of a net: "resnet-20-A" is "resnet-20"
        net = str(NetName.parse(net, datasets.is_imagenet(dataset)))
    found, whose = _published(), ""
    for field, value in {"net": net, "dataset": dataset, "seed": whole("seed", seed)}.items():
        choices = list(dict.fromkeys(getattr(record.run, field) for record in found))
        if value not in choices:
            listed = list(map(str, choices))
            raise ValueError(
                f"{field} {value!r}: no weights{whose} are published, choose {', '.join(listed)}"
                f"{nearest(value, listed)}"
            )
        found = [record for record in found if getattr(record.run, field) == value]
        whose = f" of {net}"
    record = found[0]
    path = record.folder / WEIGHTS
    try:
        records.check_sums(record.folder, [WEIGHTS])
    except DamagedError as error:
        raise DamagedError(f"{error}. Restore it: git restore {path}") from None
    weights = {name: value.clone() for name, value in load_file(path).items()}  # which are views of the file
    mean = weights.pop(MEAN_IMAGE)
    with safe_open(path, "pt") as file:
        classes = json.loads(file.metadata()["classes"])
    with torch.device("meta"):  # without drawing initial weights
        inner = record.run.name.build(len(classes))
    inner.load_state_dict(weights, assign=True)
    return TrainedNet(inner, mean, classes, record)


def nets():
    """The nets that ``load_net`` loads: a DataFrame with ``COLUMNS``.

    test_error: in percent, at the end of training. seconds: that training took on ``hardware``. command: that trains
    the net again.
    """
    return pd.DataFrame([_row(record) for record in _published()], columns=COLUMNS)


def _published():
    """The published records that come with weights, in the order of their data sets, nets and seeds."""
    if records.PUBLISHED is None:
        raise ValueError("this package was installed without its repository, which holds the weights: clone that")
    found = all_finished(records.PUBLISHED, having=WEIGHTS)
    return sorted(found, key=lambda record: (record.run.dataset, record.run.name, record.run.seed))


def _row(record):
    run, summary = record.run, record.summary
    values = [run.net, run.dataset, run.seed, summary["parameters"], summary["test_error"], summary["seconds"]]
    return dict(zip(COLUMNS, [*values, record.hardware, summary["iterations"], _command(run)], strict=True))


def _command(run):
    plain = Run(run.net, run.dataset)
    words = [f".venv/bin/python -m replication {run.net} --dataset {run.dataset} --seed {run.seed}"]
    for field in fields(Run):
        value = getattr(run, field.name)
        if field.name != "seed" and value != getattr(plain, field.name):
            option = field.name.replace("_", "-")
            words.append("--no-warmup" if field.name == "warmup" else f"--{option} {value}")
    return " ".join(words)


def publish(record, data="data"):
    """Copy a finished run's record to those published with this repository, with its weights; returns the copy.

    The weights are in float32; the mean image and the names of the classes, which come from the images in ``data``, lie
    in the same file. The copy of a record that is published already gets weights if it had none.
    Raises ValueError for a run that diverged or whose weights are not here, for a record that is damaged, for other
    images than it was trained on, and where another record of that run is published, or other weights of that net, data
    set and seed; TypeError for anything but a record.
    """
    if not isinstance(record, records.Record):
        raise TypeError(f"record {record!r}: give that of a finished run, such as run_all([...])[0]")
    run = record.run
    if record.diverged is not None:
        raise ValueError(f"{run.id} diverged after {record.diverged:,} iterations: there is no net to publish")
    if records.is_published(record) and (record.folder / WEIGHTS).exists():
        return record
    records.check_sums(record.folder)
    if record.weights is None:
        raise ValueError(f"{record.folder} holds no weights.pt: train the run again, by run_all([...], fresh=True)")
    for other in _published():
        same = all(getattr(other.run, field) == getattr(run, field) for field in ("net", "dataset", "seed"))
        if same and other.run != run:
            raise ValueError(f"{other.folder} holds weights of that net, data set and seed: remove its {WEIGHTS} first")
    dataset = datasets.load(run.dataset, data)
    if dataset.fingerprint != record.fingerprint:
        raise ValueError(f"{run.dataset!r} in {data} holds other images than {run.id} was trained on: bring these back")
    weights = {name: value.contiguous() for name, value in files.load(record.weights).items()}
    weights[MEAN_IMAGE] = torch.from_numpy(dataset.hold_out(run.holdout).mean)
    with tempfile.TemporaryDirectory() as made:
        for path in record.folder.iterdir():
            if path.suffix in (".json", ".csv", ".txt"):
                shutil.copy(path, made)
        save_file(weights, Path(made) / WEIGHTS, {"classes": json.dumps(dataset.classes)})
        records.write_summary(Path(made), record.summary)
        contents = {path.name: path.read_bytes() for path in Path(made).iterdir()}
    records.keep(run, contents, records.PUBLISHED)  # or leave the record that is published already
    copy, added = records.finished(run, records.PUBLISHED), ("evaluation.json", SUMS, WEIGHTS)
    there = {path.name: path.read_bytes() for path in copy.folder.iterdir()}
    if any(there.get(name) != contents.get(name) for name in {*there, *contents}.difference(added)):
        raise ValueError(f"{copy.folder} holds another record of this run: remove it first to replace it")
    for name in added:  # sums first: without its weights, a record is valid
        if name in contents:
            files.write(copy.folder / name, contents[name])
    return copy


def update_page(path=files.SOURCE / "docs" / "nets.md"):
    """Put the table of ``nets`` into docs/nets.md, between its marks. Raises ValueError where these are missing."""
    files.fill(path, {"nets": _table()})


def _table():
    """The table of ``nets`` in Markdown; links are those from docs/."""
    judged = [record for record in all_finished(records.PUBLISHED) if record.run.recipe != "smoke"]
    curves = {  # the scorecard numbers its figures by the conditions of the runs
        _command(record.run): f"[curves](../results/published/7_scorecard/errors_{number}.png)"
        for number, (_, _, members) in enumerate(by_conditions(judged), start=1)
        for record in members
    }
    table = nets()
    shown = {
        "net": table["net"],
        "data set": table["dataset"],
        "seed": table["seed"],
        "parameters": table["parameters"].map("{:,}".format),
        "test error %": table["test_error"].map("{:.2f}".format),
        "iterations": table["iterations"].map("{:,}".format),
        "trained in": (table["seconds"] / 60).map("{:,.1f} min".format) + " on " + table["hardware"],
        "errors": table["command"].map(curves).fillna("–"),
        "command": "`" + table["command"] + "`",
    }
    return pd.DataFrame(shown).to_markdown(index=False, disable_numparse=True)
