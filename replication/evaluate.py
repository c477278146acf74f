"""Test errors of nets, by each of the paper's protocols: a single view, 10-crop, several scales (sections 3.4, 4.2).

And what detectors find in the test images (section 4.3).
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F

from replication.data import imagenet
from replication.data.batches import normalize
from replication.detection.precision import Detections
from replication.engine.machine import autocast
from replication.engine.progress import progress_bar


class SingleView(NamedTuple):
    """Top-1 error in percent, mean cross-entropy, labels and predicted classes ``(2, N)``, and {path: error}."""

    error: float
    loss: float
    predictions: torch.Tensor
    unreadable: dict


def single_view(net, batches, device="cpu", precision="float32"):
    """Test a net on one view of each image (section 4.2): a ``SingleView``.

    ``batches``: inputs ``(N, 3, H, W)`` and labels ``(N,)`` on ``device``, and unreadable files, as
    ``dataset.eval_batches`` yields them. In distributed training each process passes its own share; error and loss are
    over all images, predictions and unreadable files its own. The net is left in the mode it was in.
    Raises ValueError if there are no images.
    """
    training, predictions, unreadable = net.training, [torch.empty(2, 0, dtype=torch.int64)], {}
    net.eval()
    sums = torch.zeros(3, dtype=torch.float64, device=device)  # errors, loss, images
    with torch.inference_mode(), autocast(device, precision):
        for inputs, labels, failures in batches:
            unreadable |= failures
            if not len(labels):
                continue
            logits = net(inputs).float()
            predicted = logits.argmax(1)
            sums[0] += (predicted != labels).sum()
            sums[1] += F.cross_entropy(logits, labels, reduction="sum")
            sums[2] += len(labels)
            predictions.append(torch.stack([labels, predicted]).cpu())
    net.train(training)
    if dist.is_initialized():
        dist.all_reduce(sums)
    errors, loss, count = sums.tolist()
    if not count:
        raise ValueError("there is no image to measure an error on")
    return SingleView(100 * errors / count, loss / count, torch.cat(predictions, dim=1), unreadable)


def detections(net, dataset, paths, device="cpu", precision="float32", progress=False):
    """What a detector finds in images of a ``DetectionSet``, by their paths: ``Detections`` of each.

    ``progress``: show a bar. The net is left in the mode it was in.
    """
    training, found = net.training, []
    net.eval()
    with (
        torch.inference_mode(),
        autocast(device, precision),
        progress_bar(len(paths), "detecting", "images", not progress) as bar,
    ):
        for path in paths:
            (each,) = net([dataset.read(path).to(device)])
            boxes, labels, confidences = (each[name].float().cpu().numpy() for name in ("boxes", "labels", "scores"))
            found.append(Detections(boxes, labels.astype("int64") - 1, confidences))
            bar.update()
    net.train(training)
    return found


def ten_crop(image):
    """Corners and centre of the central 256x256 of an image whose shorter side is 256, and their mirror images.

    The standard 10-crop of Krizhevsky et al. 2012 (the paper's [21]): one tensor (10, 224, 224, 3) in uint8.
    """
    square = imagenet.pixels_of(imagenet.centre(imagenet.resize(image, imagenet.TEST_SIDE), imagenet.TEST_SIDE))
    corners = ((0, 0), (0, 32), (32, 0), (32, 32), (16, 16))  # top and left of each crop
    crops = torch.stack([square[y : y + imagenet.CROP, x : x + imagenet.CROP] for y, x in corners])
    return [torch.cat([crops, crops.flip(2)])]


def multi_scale(image):
    """The whole image with its shorter side resized to 224, 256, 384, 480 and 640: five views (1, H, W, 3) in uint8.

    Nets are applied fully convolutionally: their global average pooling takes a map of any size (section 3.4).
    """
    return [imagenet.pixels_of(imagenet.resize(image, side))[None] for side in imagenet.TEST_SIDES]


# Each takes an image in RGB and returns a list of tensors of views, (k, H, W, 3) in uint8.
EVAL_PROTOCOLS = {"centre crop": imagenet.central_crop, "10-crop": ten_crop, "multi-scale": multi_scale}


def deterministic():
    """A context in which convolutions are repeatable, and those in float32 do not use TF32.

    On a GPU the fastest of the repeatable ones are found by measuring, which may choose others in another process.
    """
    measure = torch.cuda.is_available()
    return torch.backends.cudnn.flags(
        enabled=True, benchmark=measure, benchmark_limit=0, deterministic=True, allow_tf32=False
    )


class NormalizedNet(NamedTuple):
    """A net and the normalization of its inputs: ``mean`` and ``std`` as ``normalize`` takes them, on its device."""

    net: torch.nn.Module
    mean: torch.Tensor
    std: torch.Tensor | None = None


def scores(model, images, precision="float32"):
    """Softmax scores ``(N, classes)`` of N images by a ``NormalizedNet``, averaged over the views of each image.

    ``images``: for each image a list of tensors of views, as ``EVAL_PROTOCOLS`` make them. Views of the same size are
    evaluated together.
    """
    device, by_shape = model.mean.device, {}
    for number, tensors in enumerate(images):
        for views in tensors:
            by_shape.setdefault(views.shape, []).append((number, views))
    total, views_per_image = None, sum(len(views) for views in images[0])
    for shape, members in by_shape.items():
        numbers, views = zip(*members, strict=True)
        inputs = normalize(torch.cat(views).to(device), model.mean, model.std)
        with torch.inference_mode(), autocast(device, precision):
            logits = model.net(inputs)
        sums = logits.float().softmax(1).unflatten(0, (len(views), shape[0])).sum(1)
        total = sums.new_zeros(len(images), sums.shape[1]) if total is None else total
        total.index_add_(0, torch.tensor(numbers, device=device), sums)
    return total / views_per_image


def errors(ensembles, dataset, protocol, precision="float32", batch=8, workers=None):
    """Top-1 and top-5 errors in percent on the test part of an ``ImageNet``, by one of ``EVAL_PROTOCOLS``.

    ``ensembles``: {name: [NormalizedNet, ...]}; scores are averaged over the nets of a list. A net may be in several,
    and is evaluated once. The images are read once for all nets, ``batch`` at a time.
    Returns {name: {"top1": ..., "top5": ...}}, and {path: error} of the files that could not be read and are left out.
    With fewer than six classes "top5" is None.
    Raises ValueError if no image can be read.
    """
    models = {id(model.net): model for members in ensembles.values() for model in members}
    for model in models.values():
        model.net.eval().to(model.mean.device, memory_format=torch.channels_last)
    counts = {name: torch.zeros(2, dtype=torch.int64) for name in ensembles}  # top-1 and top-5 errors
    unreadable, total = {}, len(dataset.test.labels)
    title = f"{protocol}, {len(models)} net{'s' if len(models) > 1 else ''}"
    with deterministic(), progress_bar(total, title, "images") as bar:
        for images, labels, failures in imagenet.read(dataset, dataset.test, EVAL_PROTOCOLS[protocol], batch, workers):
            unreadable |= failures
            bar.update(len(labels) + len(failures))
            if not images:
                continue
            by_net = {key: scores(model, images, precision) for key, model in models.items()}
            for name, members in ensembles.items():
                mean = torch.stack([by_net[id(model.net)] for model in members]).mean(0)
                correct = mean.topk(min(5, mean.shape[1])).indices.cpu() == labels[:, None]
                counts[name] += torch.stack([~correct[:, 0], ~correct.any(1)]).sum(1)
    evaluated = total - len(unreadable)
    if not evaluated:
        raise ValueError(f"none of the test images of {dataset.folder} can be read")
    rates = {}
    for name, wrong in counts.items():
        top1, top5 = (100 * wrong / evaluated).tolist()
        rates[name] = {"top1": top1, "top5": top5 if len(dataset.classes) >= 6 else None}
    return rates, unreadable
