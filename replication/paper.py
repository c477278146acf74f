"""The paper's numbers and claims: He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", CVPR 2016.

Nets are named as in ``replication.models.NetName``. Errors are in percent.
"""

from typing import NamedTuple


class Published(NamedTuple):
    """Errors of a table by net, what they are, and the conditions under which runs are comparable with them.

    On CIFAR one error for each net. On ImageNet (top-1, top-5), None where not printed, and the ``way`` of testing, a
    key of ``evaluate.EVAL_PROTOCOLS``.
    """

    errors: dict
    title: str
    conditions: dict | None = None  # as in ``Record.conditions``; None: no run is comparable
    way: str | None = None

    def at_depth(self, depth):
        """The same errors under the names of nets of another depth, to be shown beside these."""
        renamed = {net.replace(net.split("-")[1], str(depth)): error for net, error in self.errors.items()}
        return self._replace(errors=renamed, conditions=None)


# Multiply-adds of the ImageNet nets from the last row of Table 1, of VGG from sections 3.3 and 4.1.
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

# Parameters of the CIFAR nets as printed in Table 6.
CIFAR_PARAMETERS = {
    "resnet-20": 0.27e6,
    "resnet-32": 0.46e6,
    "resnet-44": 0.66e6,
    "resnet-56": 0.85e6,
    "resnet-110": 1.7e6,
    "resnet-1202": 19.4e6,
}
CIFAR10 = "f68bb3dbbcc0"  # fingerprint of CIFAR-10's original pixels, shortened as in ``Record.conditions``
TABLE_6 = Published(
    {
        "resnet-20": 8.75,
        "resnet-32": 7.51,
        "resnet-44": 7.17,
        "resnet-56": 6.97,
        "resnet-110": 6.43,  # the best of five runs
        "resnet-1202": 7.93,
    },
    "paper: test error %, CIFAR-10, 64,000 iterations",
    {"dataset": "cifar10", "fingerprint": CIFAR10, "recipe": "cifar", "iterations": 64_000, "holdout": 0},
)
WARMED_UP = (6.61, 0.16)  # test error of ResNet-110 over five runs: mean and standard deviation (Table 6)


class Yardstick(NamedTuple):
    """What others measured for these nets: test errors on the original CIFAR-10, neither the paper's nor ours."""

    source: str
    rule: str  # whose error it is: the "last" epoch's, or that of the "best" on the test images, which is the lower
    runs: int  # of each net
    errors: dict  # by net: of one run its error, of several their mean and standard deviation


def _by_depth(kind, *errors):
    return {f"{kind}-{depth}": error for depth, error in zip((20, 32, 44, 56, 110, 1202), errors, strict=False)}


YARDSTICKS = (
    Yardstick(
        "pytorch_warmup, example without warm-up, 186 epochs",
        "not stated, probably best",
        5,
        _by_depth("resnet", (8.11, 0.16), (7.93, 0.62), (7.47, 0.50), (7.53, 1.01), (7.76, 0.69)),
    ),
    Yardstick(
        "pytorch_warmup, example with a warm-up of 1,000 iterations",
        "not stated, probably best",
        5,
        _by_depth("resnet", (8.06, 0.21), (7.27, 0.21), (6.99, 0.19), (6.80, 0.12), (6.28, 0.10)),
    ),
    Yardstick(
        "README of a ResNet from scratch, 64,000 iterations, float16",
        "not stated",
        1,
        _by_depth("resnet", 8.24, 7.36, 7.38, 8.30, 6.96) | _by_depth("plain", 9.63, 9.92, 10.36, 14.22),
    ),
    Yardstick(
        "README, 64,000 iterations on 45,000 images",
        "not stated",
        1,
        _by_depth("resnet", 9.18, 8.68, 8.13, 7.10, 6.95),
    ),
    Yardstick(
        "akamaster/pytorch_resnet_cifar10, 200 epochs",
        "best",
        1,
        _by_depth("resnet", 8.27, 7.37, 6.90, 6.61, 6.32, 6.18),
    ),
    Yardstick(
        "akamaster/pytorch_resnet_cifar10, run again by a user",
        "best",
        6,
        {"resnet-56": (7.56, 0.54)},  # 7.4, 7.29, 7.4, 6.89, 8.42 and 7.95
    ),
    Yardstick(
        "gcr/torch-residual-networks, 200 epochs",
        "not stated",
        1,
        _by_depth("resnet", 8.29, 7.63, 7.14, 6.94, 6.73),
    ),
    Yardstick(
        "a-martyn/resnet",
        "best",
        1,
        _by_depth("resnet", 8.0, 7.51, 7.38, 7.33) | _by_depth("plain", 9.5, 9.92, 11.35, 12.76),
    ),
    Yardstick(
        "junyuseu/pytorch-cifar-models, 160 epochs",
        "best",
        1,
        _by_depth("resnet", 8.33, 7.36, 6.77, 6.73, 6.13),
    ),
    Yardstick("robertkoller/ResNet-Reproduction", "last", 1, _by_depth("plain", 9.52, 10.21, 12.51, 12.88)),
)
# Test errors of the plain nets as a-martyn/resnet reads them off Fig. 6: the paper prints none.
PLAIN_READ = _by_depth("plain", 9.5, 10, 12, 13.5)


IMAGENET = {"dataset": "imagenet", "recipe": "imagenet", "iterations": 600_000, "holdout": 0}
TABLE_2 = Published(
    {"plain-18": (27.94, None), "resnet-18": (27.88, None), "plain-34": (28.54, None), "resnet-34": (25.03, None)},
    "ImageNet validation, 10-crop",
    IMAGENET,
    "10-crop",
)
TABLE_3 = Published(
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
    IMAGENET,
    "10-crop",
)
TABLE_4 = Published(
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
    IMAGENET,
    "multi-scale",
)
TABLE_5 = Published(
    {
        "VGG (ILSVRC'14)": (None, 7.32),
        "GoogLeNet": (None, 6.66),
        "VGG (v5)": (None, 6.8),
        "PReLU-net": (None, 4.94),
        "BN-inception": (None, 4.82),
        "ensemble": (None, 3.57),
    },
    "ImageNet, ensembles: the paper's on the test set, ours on validation, multi-scale",
    way="multi-scale",
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
# Not errors but precisions, in percent. The labels of VOC 2012's test images are not public.
TABLE_7 = Published(
    {"faster-rcnn-vgg-16": (73.2, 70.4), "faster-rcnn-resnet-101": (76.4, 73.8)},
    "mAP@.5 on VOC 2007 test, and on VOC 2012 test",
    {"dataset": "voc", "recipe": "voc", "iterations": 80_000, "holdout": 0},
)
TABLE_8 = Published(
    {"faster-rcnn-vgg-16": (41.5, 21.2), "faster-rcnn-resnet-101": (48.4, 27.2)},
    "mAP@.5 and mAP@[.5, .95] on COCO val",
    {"dataset": "coco", "recipe": "coco", "iterations": 320_000, "holdout": 0},
)
FIGURE_7 = ("plain-20", "plain-56", "resnet-20", "resnet-56", "resnet-110")


class Claim(NamedTuple):
    """A claim of the paper. The criterion by which it is judged is in ``replication.report.claims``."""

    name: str
    section: str  # where the paper makes it
    statement: str
    printed: str  # the paper's numbers
    families: tuple[str, ...]  # of nets for which the paper makes it: "cifar", "imagenet", "detection"
    comparison: str  # what is compared to judge it


BOTH = ("cifar", "imagenet")
CLAIMS = {
    1: Claim(
        "Deeper plain nets train worse",
        "1, 4.1, 4.2",
        "Degradation: a deeper plain net has the higher training error.",
        "plain-34 above plain-18 throughout (test 28.54 % against 27.94 %); on CIFAR plain-20 to plain-56 in order",
        BOTH,
        "training errors of plain nets of different depth",
    ),
    2: Claim(
        "Deeper residual nets are better",
        "4.1, 4.2",
        "Residual nets reverse it: the deeper has the lower training and test error.",
        "ResNet-34 25.03 %, ResNet-18 27.88 %; on CIFAR ResNet-20 8.75 % to ResNet-110 6.43 %",
        BOTH,
        "training and test errors of residual nets of different depth",
    ),
    3: Claim(
        "Residual nets beat plain ones",
        "4.1, 4.2",
        "At equal depth, width and number of parameters the deep residual net beats the plain net.",
        "34 layers: 25.03 % against 28.54 %",
        BOTH,
        "test errors, and numbers of parameters, of the deep plain and the deep residual net",
    ),
    4: Claim(
        "Shallow nets: equal, but faster",
        "4.1",
        "At 18 layers both are about as accurate; the residual net converges faster.",
        "27.88 % against 27.94 %",
        ("imagenet",),
        "test errors, and training errors in the first third of training, of the shallow plain and residual net",
    ),
    5: Claim(
        "Gradients do not vanish",
        "4.1",
        "It is not vanishing gradients: with batch norm, forward signals of plain nets have non-zero variances and "
        "gradients healthy norms.",
        "no numbers",
        ("imagenet",),
        "variances of what enters the layers of the deep plain net, and norms of their gradients, along training",
    ),
    6: Claim(
        "Projections are not essential",
        "4.1",
        "Shortcuts A, B and C are all much better than none; B is slightly better than A, C marginally better than B: "
        "projections are not essential.",
        "34 layers: plain 28.54 %, A 25.03 %, B 24.52 %, C 24.19 %",
        ("imagenet",),
        "test errors of the plain net and of the residual nets with each kind of shortcut",
    ),
    7: Claim(
        "50 to 152 layers on ImageNet",
        "4.1",
        "50, 101 and 152 layers are each more accurate than 34, without degradation; 152 layers cost less than VGG.",
        "24.52 % (34 layers, B), 22.85 %, 21.75 %, 21.43 %; 11.3e9 multiply-adds, VGG-16 15.3e9, VGG-19 19.6e9",
        ("imagenet",),
        "test errors of residual nets of 34 to 152 layers, and multiply-adds",
    ),
    8: Claim(
        "The warm-up of ResNet-110",
        "4.2",
        "ResNet-110 needs the warm-up only to start: without, it begins later and ends about as accurate.",
        "warm-up of about 400 iterations; 6.61 ± 0.16 % over five runs, the best 6.43 %",
        ("cifar",),
        "the rates and errors of ResNet-110 with the warm-up and without",
    ),
    9: Claim(
        "1202 layers overfit",
        "4.2",
        "1202 layers train without difficulty, but test worse than 110: overfitting.",
        "training error below 0.1 %; test error 7.93 % against 6.43 %",
        ("cifar",),
        "training error of ResNet-1202, its test error against that of ResNet-110",
    ),
    10: Claim(
        "Residual functions respond less",
        "4.2",
        "Residual functions respond less than plain layers do, and the deeper the net, the less each layer changes the "
        "signal.",
        "Fig. 7, without numbers",
        ("cifar",),
        "standard deviations of the responses of all 3x3 layers at the end of training, their mean over the layers",
    ),
    11: Claim(
        "Identity shortcuts are free",
        "3.2, 3.3",
        "Identity shortcuts add no parameters, and no computation but the addition.",
        "no numbers",
        BOTH,
        "parameters and multiply-adds of plain and residual nets of equal depth",
    ),
    12: Claim(
        "An ensemble wins",
        "4.1",
        "Averaging nets of several depths wins ILSVRC 2015.",
        "3.57 % top-5 on the test set; the best single net 4.49 % on validation",
        ("imagenet",),
        "top-5 errors, at five scales, of the ensemble and of its best member",
    ),
    13: Claim(
        "Better features for detection",
        "4.3",
        "In detection, ResNet-101 in place of VGG-16 alone adds 6.0 points of COCO mAP@[.5,.95], 28 % more.",
        "27.2 % against 21.2 %",
        ("detection",),
        "mAP@[.5, .95] on COCO val of Faster R-CNN on ResNet-101 and on VGG-16",
    ),
}
