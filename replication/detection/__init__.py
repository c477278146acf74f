"""Faster R-CNN on the paper's nets and on VGG (section 4.3, appendix A): names, nets, and how well they detect."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from replication.engine import files
from replication.engine.checks import channels, choice, nearest
from replication.engine.vision import MEAN_IMAGE, TORCHVISION
from replication.models import STRIDES, NetName

PREFIX = "faster-rcnn-"
VGG_DEPTHS = (11, 13, 16, 19)
KNOWN = [f"{PREFIX}{net}" for net in ("resnet-50", "resnet-101", "vgg-16", "resnet-18-quarter", "vgg-16-quarter")]


class DetectorName(NamedTuple):
    """A detector's name, "faster-rcnn-resnet-101" or "faster-rcnn-vgg-16", in its parts.

    It has the interface of ``models.NetName``.

    net: the ImageNet net that it is made of, "resnet-101".
    quarter: a quarter of its width, of the sides of pictures and of anchors, and half of the regions: for smoke tests.
    """

    net: str
    quarter: bool = False
    imagenet = True

    @classmethod
    def parse(cls, name):
        """Parse a name. Raises ValueError for what is no detector's."""
        match = re.fullmatch(rf"{PREFIX}(\w+-\d+(?:-[A-C])?)(-quarter)?", name) if isinstance(name, str) else None
        if match is None:
            raise ValueError(f"net {name!r}: choose a detector, such as {', '.join(KNOWN)}{nearest(name, KNOWN)}")
        net, quarter = match.groups()
        if net.startswith("vgg-"):
            choice("net", net, [f"vgg-{depth}" for depth in VGG_DEPTHS])
        else:
            net = str(NetName.parse(net, imagenet=True, others="vgg-<depth>, "))
        return cls(net, quarter is not None)

    def __str__(self):
        return f"{PREFIX}{self.net}{'-quarter' if self.quarter else ''}"

    label = property(__str__, doc="Its name in tables, figures and run ids.")

    @property
    def depth(self):
        """The layers of its ImageNet net."""
        return int(self.net.split("-")[1])

    @property
    def residual(self):
        return self.net.startswith("resnet")

    @property
    def has_bottlenecks(self):
        return self.residual and self.depth >= 50

    def classifier(self, classes=1000, stride_on="1x1"):
        """The ImageNet net that the detector is made of, with initial weights of torch's global generator."""
        from replication.detection import nets  # torchvision takes a second to import

        return nets.classifier(self, classes, stride_on)

    def build(self, classes, pretrained=None, inputs=TORCHVISION):
        """The detector: of a trained ImageNet net, with the mean and deviation of its inputs, or of a new one.

        Initial weights are those of torch's global generator.
        """
        from replication.detection import nets

        return nets.detector(self, classes, pretrained, inputs)

    def measure_statistics(self, net, images):
        """Set the statistics of the detector's fixed batch norm to those of these images, a list of (3, H, W)."""
        from replication.detection import nets

        nets.measure_statistics(net, images)

    def multiply_adds(self):
        """Those of a detector's convolutions and linear layers for one typical image, with its regions in training."""
        from replication.detection import nets

        return nets.multiply_adds(self)


@dataclass(frozen=True)
class Pretrained:
    """The ImageNet weights that a detector starts from; equal where the same weights are used in the same way.

    path: of a checkpoint that ``pretrained.load_weights`` reads.
    digest: SHA-256 of the file, 64 digits.
    mean, std: of each channel, on a scale of 0 to 1; what the net's inputs were normalized by.
    stride_on: of bottlenecks, "1x1" or "3x3", as in ``models.Bottleneck``; else None.
    """

    path: str = field(compare=False)
    digest: str
    mean: tuple
    std: tuple
    stride_on: str | None = None

    @classmethod
    def of(cls, options, name):
        """From what a user gives for a ``DetectorName``, {"path": ..., "inputs": ..., "stride_on": ...}.

        inputs: "torchvision"; "ours" for weights that ``hub.publish`` wrote, which hold the mean of their images; or
        {"mean": [r, g, b], "std": [r, g, b]}. All are required that apply: weights load either way, but give garbage
        with the wrong ones.
        Raises TypeError or ValueError that says what is wrong with which.
        """
        if isinstance(options, cls):
            return options
        if not isinstance(options, dict):
            raise TypeError(f"weights {options!r}: give a dict such as {{'path': 'file.pth', 'inputs': 'torchvision'}}")
        try:
            for option in options:
                choice("option", option, ("path", "inputs", "stride_on"))
            path = files.expanded("path", options.get("path"))
            if not Path(path).is_file():
                raise ValueError(f"path {path!r}: there is no such file")
            stride_on = options.get("stride_on")
            if name.has_bottlenecks:
                choice("stride_on", stride_on, STRIDES)
            elif stride_on is not None:
                raise ValueError(f"stride_on {stride_on!r}: {name.net} has no bottlenecks, leave it out")
            return cls(path, files.digest(Path(path).read_bytes()), *_inputs(options.get("inputs"), path), stride_on)
        except (TypeError, ValueError) as error:
            raise type(error)(f"weights of {name}: {error}") from error

    @classmethod
    def from_dict(cls, values):
        """The weights of a ``run.json``, where they are what ``asdict`` gives."""
        return cls(**values | {part: tuple(values[part]) for part in ("mean", "std")})

    @property
    def name(self):
        """8 digits that change with anything that matters."""
        return files.digest(repr((self.digest, self.mean, self.std, self.stride_on)).encode())[:8]


def _inputs(value, path):
    """Mean and standard deviation as tuples of three numbers; ``path``: of the weights."""
    channels(value, ("torchvision", "ours"))
    if value == "torchvision":
        return TORCHVISION
    if value == "ours":
        mean = files.load(path).get(MEAN_IMAGE) if path.endswith(".safetensors") else None
        if mean is None:
            raise ValueError(
                f"inputs 'ours': {path} holds no mean of its images; give a weights.safetensors that hub.publish "
                "wrote, or the mean itself, {'mean': [r, g, b], 'std': [1, 1, 1]}"
            )
        return tuple((mean.double().mean((0, 1)) / 255).tolist()), (1.0, 1.0, 1.0)
    return tuple(tuple(map(float, value[part])) for part in ("mean", "std"))
