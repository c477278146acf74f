"""The nets of the paper: plain and residual, for CIFAR (section 4.2) and for ImageNet (Table 1).

Modules are named as in torchvision's ResNet (``conv1``, ``bn1``, ``layer1.0.conv1``, ..., ``layer2.0.downsample.0``,
``fc``), so torchvision's checkpoints load with ``strict=True`` into nets with its shortcuts.
"""

import re
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from replication.engine.checks import choice, nearest, whole

SHORTCUTS = ("A", "B", "C")
CIFAR_DEPTHS = (20, 32, 44, 56, 110, 1202)  # the paper's; any 6n+2 up to MAX_CIFAR_DEPTH can be built
MAX_CIFAR_DEPTH = 9998
MAX_CLASSES = 100_000
STRIDES = ("1x1", "3x3")  # the layer of a bottleneck that subsamples
IMAGENET_STAGES = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


def conv(in_channels, out_channels, size, stride=1):
    """A convolution whose padding keeps the map's size at stride 1. Batch norm follows, so it has no bias."""
    return nn.Conv2d(in_channels, out_channels, size, stride, padding=size // 2, bias=False)


class BatchNorm(nn.BatchNorm2d):
    """Torch's batch norm without updating ``num_batches_tracked``, which saves one small kernel per layer.

    When compiled for a CPU, it is written out with sums taken in one pass. With torch's own version a compiled
    bfloat16 step takes about a fifth longer, and keeps mean and deviation for the backward pass in bfloat16; here they
    stay in float32.
    """

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        if torch.compiler.is_compiling() and x.device.type == "cpu":
            return self._written_out(x)
        mean, variance = self.running_mean, self.running_var
        return F.batch_norm(x, mean, variance, self.weight, self.bias, True, self.momentum, self.eps)

    def _written_out(self, x):
        count, values = x.numel() // x.shape[1], x.float()
        mean = values.mean((0, 2, 3))
        variance = ((values * values).mean((0, 2, 3)) - mean * mean).clamp_min(0)
        factor = self.weight * (variance + self.eps).rsqrt()
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
        shift = self.bias - mean * factor
        return (values * factor[:, None, None] + shift[:, None, None]).to(x.dtype)


class ZeroPadding(nn.Module):
    """Shortcut A: every ``stride``-th pixel of ``(N, C, H, W)``, with ``extra`` zero channels after the others."""

    def __init__(self, extra, stride):
        super().__init__()
        self.extra, self.stride = extra, stride

    def forward(self, x):
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.extra))


def shortcut_path(shortcut, in_channels, out_channels, stride):
    """The module on a block's shortcut (sections 3.3 and 4.1); None is the identity.

    A: zero-padded identity; B: a projection, 1x1 convolution and batch norm, where dimensions grow; C: always one.
    """
    same_shape = stride == 1 and in_channels == out_channels
    if shortcut == "C" or (shortcut == "B" and not same_shape):
        return nn.Sequential(conv(in_channels, out_channels, 1, stride), BatchNorm(out_channels))
    return None if same_shape else ZeroPadding(out_channels - in_channels, stride)


class BasicBlock(nn.Module):
    """Two 3x3 layers and their shortcut (Fig. 5 left); ``shortcut=None`` gives the two layers of a plain net."""

    expansion = 1

    def __init__(self, in_channels, width, stride, shortcut):
        super().__init__()
        self.residual = shortcut is not None
        self.conv1, self.bn1 = conv(in_channels, width, 3, stride), BatchNorm(width)
        self.conv2, self.bn2 = conv(width, width, 3), BatchNorm(width)
        self.downsample = shortcut_path(shortcut, in_channels, width, stride) if self.residual else None

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y))
        if self.residual:
            y += x if self.downsample is None else self.downsample(x)
        return F.relu(y, inplace=True)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 layers and their shortcut (Fig. 5 right).

    ``stride_on``: the layer with the stride, "1x1" (the first) as in the authors' released nets, or "3x3" as in
    torchvision's.
    """

    expansion = 4

    def __init__(self, in_channels, width, stride, shortcut, stride_on):
        super().__init__()
        out_channels = self.expansion * width
        self.residual = True
        first, second = (stride, 1) if stride_on == "1x1" else (1, stride)
        self.conv1, self.bn1 = conv(in_channels, width, 1, first), BatchNorm(width)
        self.conv2, self.bn2 = conv(width, width, 3, second), BatchNorm(width)
        self.conv3, self.bn3 = conv(width, out_channels, 1), BatchNorm(out_channels)
        self.downsample = shortcut_path(shortcut, in_channels, out_channels, stride)

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = F.relu(self.bn2(self.conv2(y)), inplace=True)
        y = self.bn3(self.conv3(y))
        y += x if self.downsample is None else self.downsample(x)
        return F.relu(y, inplace=True)


class Net(nn.Module):
    """A stem, stages of blocks, global average pooling and a classifier; each stage after the first halves the map.

    Input ``(N, 3, H, W)``, output logits ``(N, classes)``. ``variant``: what ``block`` takes besides its dimensions.
    """

    def __init__(self, stem, block, widths, blocks, classes, **variant):
        super().__init__()
        self.conv1, self.bn1 = stem, BatchNorm(stem.out_channels)
        # Table 1: the 7x7 stem of stride 2 is followed by a max pool. The 3x3 stem of CIFAR nets is not (section 4.2).
        self.maxpool = nn.MaxPool2d(3, 2, padding=1) if stem.stride == (2, 2) else None
        self.stages = len(widths)
        channels = stem.out_channels
        for stage, (width, count) in enumerate(zip(widths, blocks, strict=True), start=1):
            layers = []
            for position in range(count):
                stride = 2 if stage > 1 and position == 0 else 1
                layers.append(block(channels, width, stride, **variant))
                channels = width * block.expansion
            self.add_module(f"layer{stage}", nn.Sequential(*layers))
        self.fc = nn.Linear(channels, classes)
        initialize(self)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        if self.maxpool is not None:
            x = self.maxpool(x)
        for stage in range(1, self.stages + 1):
            x = self.get_submodule(f"layer{stage}")(x)
        return self.fc(x.mean((2, 3)))


def initialize(net):
    """He et al. 2015 (the paper's [12]): weights are normal with variance 2 / fan-in, biases are zero.

    Batch norm keeps torch's initialization, the identity: weights 1, biases 0.
    """
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def cifar_net(depth, residual=True, shortcut="A", classes=10):
    """The net of section 4.2 with ``depth`` = 6n+2 weighted layers, for ``(N, 3, 32, 32)`` (any size divisible by 4).

    A plain net (``residual=False``) has no shortcuts, and ignores ``shortcut``.
    Raises TypeError or ValueError for a depth that is not 6n+2, an unknown shortcut or an invalid number of classes.
    """
    _check(False, depth, residual, shortcut, classes)
    n = (depth - 2) // 6
    stem = conv(3, 16, 3)
    return Net(stem, BasicBlock, (16, 32, 64), (n, n, n), classes, shortcut=shortcut if residual else None)


def imagenet_net(depth, residual=True, shortcut="B", classes=1000, stride_on="1x1", width=64):
    """The net of Table 1 with 18, 34, 50, 101 or 152 layers, for ``(N, 3, 224, 224)`` (any size from 32 up).

    ``stride_on``: as in ``Bottleneck``; the shallower nets ignore it. ``width``: channels of the first 3x3 layers.
    Raises TypeError or ValueError for an unknown depth, shortcut or stride_on, and for a plain net of bottlenecks.
    """
    _check(True, depth, residual, shortcut, classes)
    choice("stride_on", stride_on, STRIDES)
    stem = nn.Conv2d(3, width, 7, 2, padding=3, bias=False)
    widths, blocks = (width, 2 * width, 4 * width, 8 * width), IMAGENET_STAGES[depth]
    if depth < 50:
        return Net(stem, BasicBlock, widths, blocks, classes, shortcut=shortcut if residual else None)
    return Net(stem, Bottleneck, widths, blocks, classes, shortcut=shortcut, stride_on=stride_on)


class NetName(NamedTuple):
    """A net's name, "plain-20", "resnet-110" or "resnet-34-C", in its parts."""

    residual: bool
    depth: int
    shortcut: str
    imagenet: bool = False

    @classmethod
    def parse(cls, name, imagenet=False, others=""):
        """Parse a name; without a letter, the shortcut is the paper's default: B for bottlenecks, otherwise A.

        ``imagenet`` selects the family, since 50 and 152 are depths of both. ``others``: choices besides these names.
        Raises TypeError or ValueError naming the value, the choices and the nearest match.
        """
        if not isinstance(name, str):
            raise TypeError(f"net {name!r}: give a name such as 'resnet-56'")
        match = re.fullmatch(r"(plain|resnet)-([1-9]\d{0,5})(?:-([A-Z]))?", name, flags=re.ASCII)
        if match is None:
            known = [f"{kind}-{depth}" for kind in ("plain", "resnet") for depth in (*CIFAR_DEPTHS, *IMAGENET_STAGES)]
            raise ValueError(
                f"net {name!r}: choose {others}plain-<depth>, resnet-<depth> or resnet-<depth>-<shortcut>, "
                f"with shortcut A, B or C{nearest(name, known)}"
            )
        residual, depth = match[1] == "resnet", int(match[2])
        shortcut = match[3] or cls.default_shortcut(depth, imagenet)
        _check(imagenet, depth, residual, shortcut)
        if match[3] and not residual:
            raise ValueError(f"net {name!r}: a plain net has no shortcuts, choose plain-{depth}")
        return cls(residual, depth, shortcut, imagenet)

    @staticmethod
    def default_shortcut(depth, imagenet):
        """The paper's choice: option B for bottlenecks, otherwise A."""
        return "B" if imagenet and depth >= 50 else "A"

    def __str__(self):
        """The shortest name that parses to the same net."""
        default = self.shortcut == self.default_shortcut(self.depth, self.imagenet)
        return f"{'resnet' if self.residual else 'plain'}-{self.depth}{'' if default else f'-{self.shortcut}'}"

    @property
    def label(self):
        """Its name in tables, figures and run ids."""
        return str(self)

    def build(self, classes, **variant):
        """The net itself, initialized from torch's global generator; ``variant``: ``stride_on``, ``width``."""
        family = imagenet_net if self.imagenet else cifar_net
        return family(self.depth, self.residual, self.shortcut, classes, **variant)


def _check(imagenet, depth, residual, shortcut, classes=2):
    """Raise TypeError or ValueError for a net that none of the family is."""
    if not isinstance(residual, bool):
        raise TypeError(f"residual {residual!r}: choose True or False")
    whole("depth", depth)
    if imagenet and depth not in IMAGENET_STAGES:
        raise ValueError(
            f"depth {depth}: an ImageNet net has {', '.join(map(str, IMAGENET_STAGES))} layers, choose one"
        )
    if imagenet and not residual and depth >= 50:
        raise ValueError(f"depth {depth}: plain ImageNet nets have 18 or 34 layers, choose one")
    if not imagenet and (depth % 6 != 2 or not 8 <= depth <= MAX_CIFAR_DEPTH):
        near, paper = min(max(8, (depth + 1) // 6 * 6 + 2), MAX_CIFAR_DEPTH), ", ".join(map(str, CIFAR_DEPTHS))
        raise ValueError(
            f"depth {depth}: a CIFAR net has 6n+2 layers, up to {MAX_CIFAR_DEPTH:,}; the paper's are {paper}; "
            f"the nearest to yours is {near}"
        )
    choice("shortcut", shortcut, SHORTCUTS)
    whole("classes", classes, 2, MAX_CLASSES)
