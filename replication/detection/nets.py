"""The detectors themselves, on torchvision's parts: anchors, region proposals, losses and the resizing of images."""

import contextlib
from collections import OrderedDict

import torch
from torch import nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.vgg import VGG, cfgs, make_layers
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign
from torchvision.transforms.functional import center_crop

from replication import measure
from replication.detection import VGG_DEPTHS
from replication.engine.machine import autocast
from replication.engine.vision import TORCHVISION, pool_regions, use_declared_nms
from replication.models import NetName

STRIDE = 16  # pixels, of the features that all regions share: conv4_x of ResNets, conv5_3 of VGG (appendix A)
SIDES = (600, 1000)  # of an image: the shorter, unless the longer would exceed the second (Faster R-CNN, [32])
ANCHORS = (64, 128, 256, 512)  # pixels; [32] has no 64 on VOC
RATIOS = (0.5, 1.0, 2.0)
REGIONS = 64  # of each image that train the detector: 128 of two images in Fast R-CNN
PROPOSALS = 300  # of each image that are looked at in tests, [32]
WIDTH = 64  # channels of the first stage
TYPICAL = (4, 3)  # width to height of a photograph

use_declared_nms()


class RegionPool(MultiScaleRoIAlign):
    """RoI pooling of the one map of features: (regions, C, size, size)."""

    def __init__(self, size):
        super().__init__(["0"], size, sampling_ratio=2)

    def forward(self, features, boxes, image_shapes):
        (feature,) = features.values()
        return pool_regions(feature, boxes, self.output_size[0], STRIDE)


class Features(nn.Sequential):
    """Layers that compute features, in bfloat16 where ``Detector`` says so; what comes out is float32."""

    in_bfloat16 = False

    def forward(self, inputs):
        with autocast(inputs.device, "bfloat16") if self.in_bfloat16 else contextlib.nullcontext():
            return super().forward(inputs).float()


class Detector(FasterRCNN):
    """Faster R-CNN whose ``Features`` alone follow autocast: in bfloat16 coordinates from 512 are multiples of 4."""

    def forward(self, images, targets=None):
        device = images[0].device.type
        for part in (self.backbone, self.roi_heads.box_head):
            part.in_bfloat16 = torch.is_autocast_enabled(device)
        with torch.autocast(device, enabled=False):
            return super().forward(images, targets)


def classifier(name, classes=1000, stride_on="1x1"):
    """The ImageNet net of a ``DetectorName``, its weights drawn from torch's global generator."""
    width = WIDTH // 4 if name.quarter else WIDTH
    if not name.net.startswith("vgg"):
        return NetName.parse(name.net, imagenet=True).build(classes, stride_on=stride_on, width=width)
    layers = cfgs["ABDE"[VGG_DEPTHS.index(name.depth)]]
    scale = WIDTH // width
    net = VGG(make_layers([layer if layer == "M" else layer // scale for layer in layers]), classes)
    if name.quarter:
        inputs, hidden = 8 * width * 7 * 7, 4096 // scale
        net.classifier[0], net.classifier[3] = nn.Linear(inputs, hidden), nn.Linear(hidden, hidden)
        net.classifier[6] = nn.Linear(hidden, classes)
        for layer in net.modules():  # without batch norm, smaller weights than these would not train from the start
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)
    return net


def detector(name, classes, pretrained=None, inputs=TORCHVISION):
    """Faster R-CNN for images (3, H, W) from 0 to 1, of so many ``classes`` besides the background.

    name: a ``DetectorName``. pretrained: the ImageNet net that it starts from; its first two stages are then fixed, as
    in [32]. inputs: mean and standard deviation of each channel that the net was trained with.

    All regions of an image share conv1 to conv4_x of a ResNet, or all convolutions of VGG. RoI pooling follows, to
    14x14 before conv5_1, which subsamples, or to 7x7 before fc6. conv5_x and global pooling, or fc6 and fc7, act on
    each region; two sibling layers give classes and boxes. Batch norm is fixed: constant scales and offsets.
    """
    net = classifier(name) if pretrained is None else pretrained
    if isinstance(net, VGG):
        stages = list(net.features[:-1])  # without the last pooling: RoI pooling is in its place
        second = [place for place, layer in enumerate(stages) if isinstance(layer, nn.MaxPool2d)][1]
        backbone, first, size = Features(*stages), stages[: second + 1], 7
        head = Features(nn.Flatten(), *net.classifier[:-1])
        features, outputs = net.classifier[0].in_features // size**2, net.classifier[6].in_features
    else:
        fix_batch_norm(net)
        first, size = [net.conv1, net.layer1], 14
        parts = {"conv1": net.conv1, "bn1": net.bn1, "relu": nn.ReLU(inplace=True), "maxpool": net.maxpool}
        parts |= {f"layer{stage}": net.get_submodule(f"layer{stage}") for stage in (1, 2, 3)}
        backbone = Features(OrderedDict(parts))
        head = Features(OrderedDict(layer4=net.layer4, pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten()))
        features, outputs = net.fc.in_features // 2, net.fc.in_features
    if pretrained is not None:
        for layer in first:
            layer.requires_grad_(False)
    backbone.out_channels = features
    predictor = FastRCNNPredictor(outputs, classes + 1)
    for layer, deviation in ((predictor.cls_score, 0.01), (predictor.bbox_pred, 0.001)):  # as in Fast R-CNN
        nn.init.normal_(layer.weight, std=deviation)
        nn.init.zeros_(layer.bias)
    scale = 4 if name.quarter else 1
    return Detector(
        backbone,
        rpn_anchor_generator=AnchorGenerator((tuple(anchor // scale for anchor in ANCHORS),), (RATIOS,)),
        box_roi_pool=RegionPool(size),
        box_head=head,
        box_predictor=predictor,
        min_size=SIDES[0] // scale,
        max_size=SIDES[1] // scale,
        image_mean=inputs[0],
        image_std=inputs[1],
        size_divisible=STRIDE,
        # Of [32] and Fast R-CNN; other details are torchvision's, docs/deviations.md lists those that differ.
        rpn_pre_nms_top_n_train=12_000 // scale**2,
        rpn_pre_nms_top_n_test=6_000 // scale**2,
        rpn_post_nms_top_n_test=PROPOSALS // scale,
        box_batch_size_per_image=regions(name),
        box_nms_thresh=0.3,
    )


def regions(name):
    """How many regions of each image train the detector."""
    return REGIONS // 2 if name.quarter else REGIONS


def fix_batch_norm(net):
    """Replace batch norm by the constant scales and offsets that its statistics and its weights amount to (appendix A).

    The parts of the net keep the names of their values.
    """
    for parent in list(net.modules()):
        for name, layer in parent.named_children():
            if isinstance(layer, nn.BatchNorm2d):
                fixed = FrozenBatchNorm2d(layer.num_features, layer.eps).to(layer.weight.device)
                fixed.load_state_dict(layer.state_dict())
                setattr(parent, name, fixed)


@torch.no_grad()
def measure_statistics(net, images):
    """Set the means and variances of a detector's fixed batch norm to those of these images, a list of (3, H, W).

    For a net that was not trained: one that was has its own. The paper computes them on training images too. Of the
    images, resized, only a centre as large as fits into all of them is used, so that none is padded.
    """
    norms = [layer for layer in net.modules() if isinstance(layer, FrozenBatchNorm2d)]
    if not norms:
        return

    def measured(norm, inputs):
        norm.running_var, norm.running_mean = torch.var_mean(inputs[0], (0, 2, 3))

    hooks = [norm.register_forward_pre_hook(measured) for norm in norms]
    images = [net.transform.normalize(image.to(norms[0].weight.device)) for image in images]
    images = [net.transform.resize(image)[0] for image in images]
    size = [max(1, min(image.shape[side] for image in images) // STRIDE) * STRIDE for side in (1, 2)]
    net.roi_heads.box_head(net.backbone(torch.stack([center_crop(image, size) for image in images])))
    for hook in hooks:
        hook.remove()


class _Counted(nn.Module):
    """What an image passes in training, without what depends on its content."""

    def __init__(self, net, regions):
        super().__init__()
        self.net, self.regions = net, regions

    def forward(self, image):
        features, heads = self.net.backbone(image), self.net.roi_heads
        self.net.rpn.head([features])
        size = heads.box_roi_pool.output_size
        return heads.box_predictor(heads.box_head(features.new_zeros(self.regions, features.shape[1], *size)))


def multiply_adds(name):
    """Multiply-adds of a detector for an image of ``TYPICAL`` sides, padded as in training, with its ``regions``."""
    shorter = SIDES[0] // (4 if name.quarter else 1)
    sides = shorter, shorter * TYPICAL[0] // TYPICAL[1]
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        net = detector(name, 20)
    return measure.multiply_adds(_Counted(net, regions(name)), [-(-side // STRIDE) * STRIDE for side in sides])
