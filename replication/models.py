"""The nets of the paper: plain and residual, for CIFAR (section 4.2) and for ImageNet (Table 1).

Parameters are named as in torchvision's ResNet (``conv1``, ``bn1``, ``layer1.0.conv1``, ...,
``layer2.0.downsample.0``, ``fc``), so its checkpoints load with ``strict=True``.
"""

import difflib
import re
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from replication.engine import files

SHORTCUTS = ("A", "B", "C")
CIFAR_DEPTHS = (20, 32, 44, 56, 110, 1202)  # those of the paper; any 6n+2 can be built
DEEPEST = 9998  # of these
MOST_CLASSES = 100_000
IMAGENET_STAGES = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


def conv(in_channels, out_channels, size, stride=1):
    """A convolution that keeps the map's size up to its stride; batch norm follows, hence no bias."""
    return nn.Conv2d(in_channels, out_channels, size, stride, padding=size // 2, bias=False)


class BatchNorm(nn.BatchNorm2d):
    """Torch's batch norm, which does not count its batches: a small operation less for every layer (section 3.4).

    Where it is compiled for a CPU it is written out, in sums that are taken in one pass: what torch.compile makes of
    torch's own takes about a fifth more of a step's time in bfloat16, and keeps mean and deviation for the backward
    pass in bfloat16, too. Here both stay in float32.
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
    """Shortcut A: every ``stride``-th pixel of ``(N, C, H, W)``, then ``extra`` zero channels behind it."""

    def __init__(self, extra, stride):
        super().__init__()
        self.extra, self.stride = extra, stride

    def forward(self, x):
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.extra))


def projection(in_channels, out_channels, stride):
    """Shortcuts B and C: a 1x1 convolution and its batch norm."""
    return nn.Sequential(conv(in_channels, out_channels, 1, stride), BatchNorm(out_channels))


def shortcut_path(shortcut, in_channels, out_channels, stride):
    """What an input passes on its way around a block; None is the identity (section 3.3)."""
    same = stride == 1 and in_channels == out_channels
    if shortcut == "C" or (shortcut == "B" and not same):
        return projection(in_channels, out_channels, stride)
    return None if same else ZeroPadding(out_channels - in_channels, stride)


class BasicBlock(nn.Module):
    """Two 3x3 layers (Fig. 5 left); with ``shortcut=None`` the same two layers of a plain net."""

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
    """1x1, 3x3, 1x1 layers (Fig. 5 right). The released nets subsample in the first 1x1, torchvision's in the 3x3."""

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
    """A stem, stages of blocks that each but the first halve the map, global average pooling, a classifier.

    Input ``(N, 3, H, W)``, output logits ``(N, classes)``.
    """

    def __init__(self, stem, block, widths, blocks, classes, **variant):
        super().__init__()
        self.conv1, self.bn1 = stem, BatchNorm(stem.out_channels)
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
    """He et al. 2015 (the paper's [12]): normal, of variance 2 / fan-in; biases zero, batch norm the identity."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def cifar_net(depth, residual=True, shortcut="A", classes=10):
    """The net of section 4.2 with ``depth`` = 6n+2 weighted layers, for ``(N, 3, 32, 32)`` (any size divisible by 4).

    A plain net (``residual=False``) has no shortcuts; ``shortcut`` is then left unused.
    Raises TypeError or ValueError for a depth that is not 6n+2, an unknown shortcut or no number of classes.
    """
    check_cifar_depth(depth)
    check_residual(residual)
    check_shortcut(shortcut)
    check_classes(classes)
    n = (depth - 2) // 6
    stem = conv(3, 16, 3)
    return Net(stem, BasicBlock, (16, 32, 64), (n, n, n), classes, shortcut=shortcut if residual else None)


def imagenet_net(depth, residual=True, shortcut="B", classes=1000, stride_on="1x1"):
    """The net of Table 1 with 18, 34, 50, 101 or 152 layers, for ``(N, 3, 224, 224)`` (any size from 32 on).

    ``stride_on``: the layer of a bottleneck that subsamples, "1x1" as in the released nets or "3x3" as in torchvision.
    Raises TypeError or ValueError for an unknown depth, shortcut or stride_on, and for a plain net of bottlenecks.
    """
    check_residual(residual)
    check_imagenet_depth(depth, residual)
    check_shortcut(shortcut)
    check_classes(classes)
    if stride_on not in ("1x1", "3x3"):
        raise ValueError(f"stride_on {stride_on!r}: choose '1x1' (the released nets) or '3x3' (torchvision's)")
    stem = nn.Conv2d(3, 64, 7, 2, padding=3, bias=False)
    widths, blocks = (64, 128, 256, 512), IMAGENET_STAGES[depth]
    if depth < 50:
        return Net(stem, BasicBlock, widths, blocks, classes, shortcut=shortcut if residual else None)
    return Net(stem, Bottleneck, widths, blocks, classes, shortcut=shortcut, stride_on=stride_on)


def load_weights(net, path, zeros="behind"):
    """Load a checkpoint of somebody else's into ``net``, which is returned.

    The file may hold the weights alone or under ``state_dict`` or ``model``, with names that begin with ``module.``,
    and may call the classifier ``linear``. ``zeros`` says where the net that it was made with puts the zero channels of
    shortcut A: "behind" the identity, as here, or "around" it, half on either side, as widely used CIFAR nets do. Such
    weights would load as they are and be garbage: their channels are put into our order.
    Raises ValueError for a file that holds no weights, or not those of this net.
    """
    if zeros not in ("behind", "around"):
        raise ValueError(f"zeros {zeros!r}: choose 'behind' or 'around', where the file's net has shortcut A's zeros")
    try:
        stored = files.load(path)
    except ValueError as error:
        raise ValueError(
            f"{path} is no file of weights alone, as torch.save(net.state_dict()) makes it: {error}"
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(stored, dict) and isinstance(stored.get(key), dict):
            stored = stored[key]
    if not isinstance(stored, dict) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in stored.items()
    ):
        raise ValueError(f"{path} holds no weights: expected tensors by name, alone or under 'state_dict' or 'model'")
    named = {re.sub(r"^linear\.", "fc.", name.removeprefix("module.")): value for name, value in stored.items()}
    # What torch added to batch norm after some checkpoints were made; it plays no part in their errors.
    expected = net.state_dict()
    named = {name: expected[name] for name in expected if name.endswith("num_batches_tracked")} | named
    wrong = [f"{name} is missing" for name in expected if name not in named]
    wrong += [f"{name} is unknown" for name in named if name not in expected]
    wrong += [
        f"{name} is {tuple(named[name].shape)}, not {tuple(value.shape)}"
        for name, value in expected.items()
        if name in named and named[name].shape != value.shape
    ]
    if wrong:
        listing = "; ".join(wrong[:5]) + (f"; and {len(wrong) - 5} more" if len(wrong) > 5 else "")
        raise ValueError(f"{path} holds the weights of another net: {listing}")
    net.load_state_dict(_zeros_behind(net, named) if zeros == "around" else named)
    return net


def _zeros_behind(net, weights):
    """Weights made with shortcut A's zeros around the identity, in the order of channels that puts them behind it."""
    weights = dict(weights)
    order = list(range(net.conv1.out_channels))  # in our order, which channel of theirs each is
    for name, block in net.named_modules():
        if not isinstance(block, BasicBlock):
            continue
        weights[f"{name}.conv1.weight"] = weights[f"{name}.conv1.weight"][:, order]
        if isinstance(block.downsample, ZeroPadding):
            before = block.downsample.extra // 2
            shown = [before + channel for channel in order]
            order = shown + sorted(set(range(block.conv2.out_channels)) - set(shown))
        weights[f"{name}.conv2.weight"] = weights[f"{name}.conv2.weight"][order]
        for part in ("weight", "bias", "running_mean", "running_var"):
            weights[f"{name}.bn2.{part}"] = weights[f"{name}.bn2.{part}"][order]
    weights["fc.weight"] = weights["fc.weight"][:, order]
    return weights


class NetName(NamedTuple):
    """What a net's name says: "plain-20", "resnet-110", "resnet-34-C"."""

    residual: bool
    depth: int
    shortcut: str
    imagenet: bool = False

    @classmethod
    def parse(cls, name, imagenet=False):
        """Read a name of the paper's; without a letter the shortcut is the paper's own choice: A, for bottlenecks B.

        ``imagenet`` says which family is meant, since 50 and 152 are depths of both.
        Raises TypeError or ValueError naming the value, the choices and the nearest match.
        """
        if not isinstance(name, str):
            raise TypeError(f"net {name!r}: give a name such as 'resnet-56'")
        match = re.fullmatch(r"(plain|resnet)-([1-9]\d{0,5})(?:-([A-Z]))?", name, flags=re.ASCII)
        if match is None:
            known = [f"{kind}-{depth}" for kind in ("plain", "resnet") for depth in (*CIFAR_DEPTHS, *IMAGENET_STAGES)]
            raise ValueError(
                f"net {name!r}: choose plain-<depth>, resnet-<depth> or resnet-<depth>-<shortcut>, "
                f"with shortcut A, B or C{nearest(name, known)}"
            )
        kind, depth, letter = match[1], int(match[2]), match[3]
        if imagenet:
            check_imagenet_depth(depth, kind == "resnet")
        else:
            check_cifar_depth(depth)
        if letter is not None:
            if kind == "plain":
                raise ValueError(f"net {name!r}: a plain net has no shortcuts, choose plain-{depth}")
            check_shortcut(letter)
        return cls(kind == "resnet", depth, letter or cls.usual_shortcut(depth, imagenet), imagenet)

    @staticmethod
    def usual_shortcut(depth, imagenet):
        """The paper's choice: option B for bottlenecks, else A."""
        return "B" if imagenet and depth >= 50 else "A"

    def __str__(self):
        """The shortest name that says the same."""
        usual = self.shortcut == self.usual_shortcut(self.depth, self.imagenet)
        return f"{'resnet' if self.residual else 'plain'}-{self.depth}{'' if usual else f'-{self.shortcut}'}"

    def build(self, classes, **variant):
        """The net itself, freshly initialized from torch's generator; ``variant``: its ``stride_on``."""
        family = imagenet_net if self.imagenet else cifar_net
        return family(self.depth, self.residual, self.shortcut, classes, **variant)


def check_cifar_depth(depth):
    if not isinstance(depth, int) or isinstance(depth, bool):
        raise TypeError(f"depth {depth!r}: give a whole number such as 20")
    if not 8 <= depth <= DEEPEST or depth % 6 != 2:
        near, paper = min(max(8, (depth + 1) // 6 * 6 + 2), DEEPEST), ", ".join(map(str, CIFAR_DEPTHS))
        raise ValueError(
            f"depth {depth}: a CIFAR net has 6n+2 layers, up to {DEEPEST:,}; the paper's are {paper}; "
            f"the nearest to yours is {near}"
        )


def check_imagenet_depth(depth, residual):
    if not isinstance(depth, int) or isinstance(depth, bool):
        raise TypeError(f"depth {depth!r}: give a whole number such as 34")
    if depth not in IMAGENET_STAGES:
        raise ValueError(f"depth {depth!r}: an ImageNet net has {', '.join(map(str, IMAGENET_STAGES))} layers")
    if not residual and depth >= 50:
        raise ValueError(f"depth {depth}: plain ImageNet nets have 18 or 34 layers")


def check_shortcut(shortcut):
    if not isinstance(shortcut, str) or shortcut not in SHORTCUTS:
        raise ValueError(
            f"shortcut {shortcut!r}: choose A (identity, zero-padded), B (projection where dimensions grow) "
            "or C (every shortcut a projection)"
        )


def check_classes(classes):
    if not isinstance(classes, int) or isinstance(classes, bool) or not 2 <= classes <= MOST_CLASSES:
        raise ValueError(f"classes {classes!r}: give a whole number from 2 to {MOST_CLASSES:,}")


def check_residual(residual):
    if not isinstance(residual, bool):
        raise TypeError(f"residual {residual!r}: choose True or False")


def nearest(value, choices):
    """For error messages: ' (did you mean ...?)' where a choice is close to the value, else ''."""
    close = difflib.get_close_matches(str(value), choices, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
