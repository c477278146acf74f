"""What is measured inside a net."""

import copy

import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from replication.engine.machine import autocast
from replication.runs.records import SIGNALS


def parameters(net):
    """Number of trained parameters."""
    return sum(parameter.numel() for parameter in net.parameters())


def multiply_adds(net, size):
    """Multiply-adds of convolutions and classifier for one image (Table 1); ``size``: its side, or height and width."""
    net = copy.deepcopy(net).to("meta").eval()  # shapes only: nothing is computed
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(_image(size))
    return counter.get_total_flops() // 2  # the counter takes a multiply-add for two operations


def _image(size):
    height, width = (size, size) if isinstance(size, int) else size
    return torch.empty(1, 3, height, width, device="meta")


def layers(net, size):
    """The weighted layers of a net, as a table, in the order an image passes them; ``size`` as in ``multiply_adds``.

    Columns: name; kind ("3x3 conv" or "fc"); channels; stride; map, the side of what leaves it; multiply_adds; around,
    the number of layers bypassed by the shortcut that ends behind it (0: none ends there); grows, whether dimensions
    grow on that shortcut. Projections on shortcuts are no rows.
    """
    net = copy.deepcopy(net).to("meta").eval()
    rows, blocks = [], {}

    def note(name, module, output):
        block = name.rpartition(".")[0]
        kind = _kind(module)
        if isinstance(module, nn.Linear):
            size, channels, stride = 1, output.shape[1], 1
            multiply_adds = module.weight.numel()
        else:
            (size, channels), stride = (output.shape[-1], output.shape[1]), module.stride[0]
            multiply_adds = module.weight.numel() * size * output.shape[-2]
        blocks.setdefault(block, []).append(len(rows))
        row = {"name": name, "kind": kind, "channels": channels, "stride": stride, "map": size}
        rows.append(row | {"multiply_adds": multiply_adds, "around": 0, "grows": False})

    for name, module in _weighted(net):
        module.register_forward_hook(lambda module, _, output, name=name: note(name, module, output))
    with torch.no_grad():
        net(_image(size))
    for name, places in blocks.items():
        block = net.get_submodule(name)
        if getattr(block, "residual", False):
            rows[places[-1]] |= {"around": len(places), "grows": block.downsample is not None}
    return pd.DataFrame(rows)


def _weighted(net):
    """The weighted layers that an image passes one after the other, by name: not the projections on shortcuts."""
    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear) and "downsample" not in name:
            yield name, module


def _kind(module):
    return "fc" if isinstance(module, nn.Linear) else f"{module.kernel_size[0]}x{module.kernel_size[1]} conv"


def signals(net, images, labels, precision="float32"):
    """What runs forward and backward through a net in a step of training: a list of dicts, one for each weighted layer.

    ``images`` (N, 3, H, W) and ``labels`` (N,) are seen as in training, batch norm taking their own statistics; the net
    is left as it was, and is not trained. Projections on shortcuts have no row of their own. Each row has
    layer, name, kind: its number from 1, and as in ``layers``;
    response_std: standard deviation of its responses, behind batch norm and before ReLU or addition (Fig. 7), over
        images, positions and channels; None for the classifier;
    signal_variance: of what enters the layer, how much a channel varies over images and positions, the mean over the
        channels (section 4.1: that "forward propagated signals have non-zero variances");
    gradient_norm, weight_norm: Euclidean norms of the loss's gradient by the layer's weights, and of these;
    residual_ratio: for the last layer of a residual function F(x) its size relative to that of what the shortcut adds,
        as a ratio of root mean squares; None for all others, and where the block does not add it.
    """
    weighted, found, kept, handles = list(_weighted(net)), {}, {}, []
    buffers, training = [buffer.clone() for buffer in net.buffers()], net.training

    def entering(name, x):
        found[name, "signal_variance"] = x.float().var([axis for axis in range(x.ndim) if axis != 1]).mean()

    def responding(name, y):
        found[name, "response_std"] = y.float().std()

    def keep(name, x):
        kept[name] = x.clone()  # it is added to in place

    def added(block, name, y):
        """Note the ratio if the block really adds what its shortcut passes on."""
        if block in kept and torch.equal(y, kept[name].clone().add_(kept[block]).relu_()):
            sizes = [kept[each].float().square().mean().sqrt() for each in (name, block)]
            found[name, "residual_ratio"] = sizes[0] / sizes[1]
        kept.clear()

    def watch(module, note, name, entering=False):
        """Have what enters or leaves a module noted before anything changes it in place."""
        if entering:
            handle = module.register_forward_pre_hook(lambda _, x: note(name, x[0].detach()))
        else:
            handle = module.register_forward_hook(lambda _, x, y: note(name, y.detach()))
        handles.append(handle)

    for name, module in weighted:
        watch(module, entering, name, entering=True)
        if not isinstance(module, nn.Linear):
            watch(net.get_submodule(name.replace("conv", "bn")), responding, name)
    ends = {name.rpartition(".")[0]: name for name, module in weighted if name.startswith("layer")}
    for block, name in ends.items():
        module = net.get_submodule(block)
        if module.residual:
            watch(net.get_submodule(name.replace("conv", "bn")), keep, name)
            shortcut = module if module.downsample is None else module.downsample
            watch(shortcut, keep, block, entering=shortcut is module)
            watch(module, lambda name, y, block=block: added(block, name, y), name)
    try:
        with autocast(images.device, precision):
            logits = net.train()(images)
        loss = F.cross_entropy(logits.float(), labels)
        gradients = torch.autograd.grad(loss, [module.weight for _, module in weighted])
    finally:
        for handle in handles:
            handle.remove()
        net.train(training)
        for buffer, before in zip(net.buffers(), buffers, strict=True):
            buffer.copy_(before)
    for (name, module), gradient in zip(weighted, gradients, strict=True):
        found[name, "gradient_norm"] = gradient.float().norm()
        found[name, "weight_norm"] = module.weight.detach().norm()
    values = dict(zip(found, torch.stack(list(found.values())).tolist(), strict=True))  # read back from the device once
    return [
        {"layer": number, "name": name, "kind": _kind(module)}
        | {column: values.get((name, column)) for column in SIGNALS}
        for number, (name, module) in enumerate(weighted, start=1)
    ]
