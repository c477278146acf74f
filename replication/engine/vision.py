"""torchvision beside a torch that its compiled ops do not load with: what of them is needed, in torch operations."""

import importlib.machinery
import importlib.util
import os

import numpy as np
import torch

TORCHVISION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and standard deviation of its nets' inputs
MEAN_IMAGE = "mean_image"  # in a file of weights, what our nets' inputs are centred by: (H, W, 3), from 0 to 255
AT_ONCE = 200  # boxes that ``nms`` compares with all others together
_KEPT = []  # a collected library takes its declarations along


def declare_missing_ops():
    """Let ``import torchvision`` work beside a CPU-only torch.

    The wheel on the package index is built for CUDA torch: beside a CPU-only one its compiled ops do not load, and the
    import fails where it first refers to them (pytorch/vision issues 9077 and 9085). Data sets, transforms and models
    need none of these ops; declaring the two that the import refers to is enough. Detectors need ``nms``, which is
    given here, and ``roi_align``, which torchvision has in torch operations too (see ``pool_regions``).
    """
    torchvision = importlib.util.find_spec("torchvision")
    if torchvision is None or torch.version.cuda is not None:
        return
    ops = importlib.machinery.PathFinder.find_spec("_C", [os.path.dirname(torchvision.origin)])
    try:
        if ops is None:
            raise OSError("no compiled ops")
        torch.ops.load_library(ops.origin)
    except OSError:
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.impl("nms", nms, "CPU")
        _KEPT.append(library)


def use_declared_nms():
    """Have torchvision call the ``nms`` declared above where its own is missing, instead of refusing to.

    Not done with the declaration, since it imports torchvision, which takes seconds.
    """
    from torchvision import extension
    from torchvision.ops import boxes

    if not extension._has_ops():
        boxes._assert_has_ops = lambda: None


def nms(boxes, scores, iou_threshold):
    """Non-maximum suppression as torchvision's compiled op does it, value for value: indices of the boxes that stay.

    boxes (N, 4), scores (N,). By falling score, equal ones in their order, each box that is still there removes those
    behind it whose overlap with it, intersection over union, is above the threshold.
    """
    from torchvision.ops import box_iou

    def overlapping(one, other):  # in float64, like the threshold that the compiled op compares with
        return box_iou(boxes[one], boxes[other]).double() > iou_threshold

    kept, left = [], scores.argsort(descending=True, stable=True)
    while len(left):
        block, left = left[:AT_ONCE], left[AT_ONCE:]
        among, stay = overlapping(block, block).numpy(), np.ones(len(block), dtype=bool)
        for place in range(len(block)):
            if stay[place]:
                stay[place + 1 :] &= ~among[place, place + 1 :]
        kept.append(block[torch.from_numpy(stay)])
        left = left[~overlapping(kept[-1], left).any(0)]
    return torch.cat(kept) if kept else left


def pool_regions(features, boxes, size, stride):
    """RoI pooling by torchvision's ``roi_align``, two by two points a bin: (regions, C, size, size).

    features: (N, C, H, W), of a net with that ``stride``. boxes: of each of the N images (n, 4), in its pixels.

    Where the compiled op is missing, torchvision's own fallback takes seconds for a batch, most of them to add up
    gradients value by value. Interpolation is linear in the features, and rows and columns are independent: pooling
    unit rows and unit columns by that fallback gives two small matrices, and their products with the features the same
    values.
    """
    from torchvision import extension
    from torchvision.ops import roi_align

    if extension._has_ops():
        return roi_align(features, boxes, (size, size), 1 / stride, sampling_ratio=2)

    def weights(ends, length):
        """The share of each of so many features in each bin, (n, length, size), for regions (n, 2) along one side."""
        units = torch.eye(length, device=ends.device).reshape(1, length, length, 1)
        zeros = torch.zeros(len(ends), 2, device=ends.device)  # the image, and the start along the other side
        regions = torch.cat([zeros, ends[:, :1], zeros[:, :1] + stride, ends[:, 1:]], 1)
        with torch.compiler.set_stance("force_eager"):  # compiling takes longer than it saves
            return roi_align(units, regions, (size, 1), 1 / stride, sampling_ratio=2)[..., 0]

    pooled, (channels, height, width) = [], features.shape[1:]
    for each, ends in zip(features.float(), boxes, strict=True):
        rows, columns = weights(ends[:, 1::2], height), weights(ends[:, ::2], width)
        across = rows.transpose(1, 2).reshape(-1, height) @ each.transpose(0, 1).reshape(height, -1)
        bins = across.reshape(len(ends), size * channels, width) @ columns
        pooled.append(bins.reshape(-1, size, channels, size).transpose(1, 2))
    return torch.cat(pooled).to(features.dtype)
