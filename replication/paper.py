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

# Table 3: top-1 errors of the 34-layer nets that differ in their shortcuts.
TABLE_3_SHORTCUTS = Published(
    {"plain-34": 28.54, "resnet-34": 25.03, "resnet-34-B": 24.52, "resnet-34-C": 24.19},
    "paper: top-1 error % of the 34-layer net, ImageNet, 10-crop",
)
