"""What the paper published: He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", CVPR 2016.

Nets are named as in ``replication.models``; errors are in percent.
"""

from typing import NamedTuple


class Published(NamedTuple):
    """Errors of a table: by net, what they are and on what, and the fields of a run that is measured alike."""

    errors: dict
    title: str
    conditions: dict | None = None  # None: no run of ours is

    def at_depth(self, depth):
        """The same errors under the names of nets of another depth, to stand beside these."""
        renamed = {net.replace(net.split("-")[1], str(depth)): error for net, error in self.errors.items()}
        return self._replace(errors=renamed, conditions=None)


# Table 1, last row: multiply-adds of the ImageNet nets; VGG for comparison from sections 3.3 and 4.1.
MULTIPLY_ADDS = {
    "resnet-18": 1.8e9,
    "resnet-34": 3.6e9,
    "plain-34": 3.6e9,
    "resnet-50": 3.8e9,
    "resnet-101": 7.6e9,
    "resnet-152": 11.3e9,
    "VGG-16": 15.3e9,
    "VGG-19": 19.6e9,
}

# Table 6: parameters of the CIFAR nets as printed, and their test errors (of ResNet-110 the best of five runs).
CIFAR_PARAMETERS = {
    "resnet-20": 0.27e6,
    "resnet-32": 0.46e6,
    "resnet-44": 0.66e6,
    "resnet-56": 0.85e6,
    "resnet-110": 1.7e6,
    "resnet-1202": 19.4e6,
}
TABLE_6 = Published(
    {
        "resnet-20": 8.75,
        "resnet-32": 7.51,
        "resnet-44": 7.17,
        "resnet-56": 6.97,
        "resnet-110": 6.43,
        "resnet-1202": 7.93,
    },
    "paper: test error %, CIFAR-10, 64,000 iterations",
    {"dataset": "cifar10", "recipe": "cifar", "iterations": 64_000, "holdout": 0},
)


class Tested(NamedTuple):
    """Errors of a table on ImageNet: by net top-1 and top-5, None where not printed; what they are; how measured."""

    errors: dict
    title: str
    way: str  # as in ``evaluate.WAYS``
    conditions: dict | None = {"dataset": "imagenet", "recipe": "imagenet", "iterations": 600_000, "holdout": 0}  # noqa: RUF012


TABLE_2 = Tested(
    {
        "plain-18": (27.94, None),
        "resnet-18": (27.88, None),
        "plain-34": (28.54, None),
        "resnet-34": (25.03, None),
    },
    "ImageNet validation, 10-crop",
    "10-crop",
)
TABLE_3 = Tested(
    {
        "VGG-16": (28.07, 9.33),
        "GoogLeNet": (None, 9.15),
        "PReLU-net": (24.27, 7.38),
        "plain-34": (28.54, 10.02),
        "resnet-34": (25.03, 7.76),
        "resnet-34-B": (24.52, 7.46),
        "resnet-34-C": (24.19, 7.40),
        "resnet-50": (22.85, 6.71),
        "resnet-101": (21.75, 6.05),
        "resnet-152": (21.43, 5.71),
    },
    "ImageNet validation, 10-crop",
    "10-crop",
)
TABLE_4 = Tested(
    {
        "VGG (ILSVRC'14)": (None, 8.43),  # on the test set
        "GoogLeNet": (None, 7.89),
        "VGG (v5)": (24.4, 7.1),
        "PReLU-net": (21.59, 5.71),
        "BN-inception": (21.99, 5.81),
        "resnet-34-B": (21.84, 5.71),
        "resnet-34-C": (21.53, 5.60),
        "resnet-50": (20.74, 5.25),
        "resnet-101": (19.87, 4.60),
        "resnet-152": (19.38, 4.49),
    },
    "ImageNet validation, single nets, multi-scale",
    "multi-scale",
)
TABLE_5 = Tested(
    {
        "VGG (ILSVRC'14)": (None, 7.32),
        "GoogLeNet": (None, 6.66),
        "VGG (v5)": (None, 6.8),
        "PReLU-net": (None, 4.94),
        "BN-inception": (None, 4.82),
        "ensemble": (None, 3.57),
    },
    "ImageNet, ensembles: the paper's on the test set, ours on validation, multi-scale",
    "multi-scale",
    conditions=None,
)
IMAGENET_NETS = [net for net in TABLE_2.errors | TABLE_3.errors if net.startswith(("plain", "resnet"))]
TOP_1 = Published(
    {net: top1 for net, (top1, _) in (TABLE_2.errors | TABLE_3.errors).items()},
    "paper: top-1 error %, ImageNet, 10-crop",
)
TABLE_3_SHORTCUTS = Published(
    {net: TOP_1.errors[net] for net in ("plain-34", "resnet-34", "resnet-34-B", "resnet-34-C")},
    "paper: top-1 error % of the 34-layer net, ImageNet, 10-crop",
)
