"""What is measured inside a net: its size, its layers, and the signals that pass through them."""

import copy

import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from replication.engine.machine import autocast

SIGNALS = ("response_std", "signal_variance", "gradient_norm", "weight_norm", "residual_ratio")


def parameters(net):
    """Number of trainable parameters."""
    return sum(parameter.numel() for parameter in net.parameters())


def multiply_adds(net, size):
    """Multiply-adds of convolutions and classifier for one image (Table 1); ``size``: its side, or (height, width)."""
    net = copy.deepcopy(net).to("meta").eval()  # shapes only: nothing is computed
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(_image(size))
    return counter.get_total_flops() // 2  # the counter takes a multiply-add for two operations


def _image(size):
    height, width = (size, size) if isinstance(size, int) else size
    return torch.empty(1, 3, height, width, device="meta")


def layers(net, size):
    """The weighted layers of a net, in the order in which an image passes them: a DataFrame with one row per layer.

    ``size``: as in ``multiply_adds``. Columns: name; kind, "3x3 conv" or "fc"; channels and map, the side, of its
    output; stride; multiply_adds; around, the number of layers that the shortcut ending behind this layer bypasses (0:
    none ends here); grows, whether that shortcut changes dimensions. Projections on shortcuts have no row.
    """
    net = copy.deepcopy(net).to("meta").eval()
    rows, rows_of_block = [], {}

    def add_row(name, layer, output):
        rows_of_block.setdefault(name.rpartition(".")[0], []).append(len(rows))
        height, width = (1, 1) if isinstance(layer, nn.Linear) else output.shape[2:]
        row = {"name": name, "kind": _kind(layer), "channels": output.shape[1]}
        row |= {"stride": 1 if isinstance(layer, nn.Linear) else layer.stride[0], "map": width}
        rows.append(row | {"multiply_adds": layer.weight.numel() * height * width, "around": 0, "grows": False})

    for name, layer in _weighted_layers(net):
        layer.register_forward_hook(lambda layer, _, output, name=name: add_row(name, layer, output))
    with torch.no_grad():
        net(_image(size))
    for name, indices in rows_of_block.items():
        block = net.get_submodule(name)
        if getattr(block, "residual", False):
            rows[indices[-1]] |= {"around": len(indices), "grows": block.downsample is not None}
    return pd.DataFrame(rows)


def _weighted_layers(net):
    """Names and modules of the weighted layers that an image passes one after the other: no projections."""
    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear) and "downsample" not in name:
            yield name, module


def _kind(layer):
    return "fc" if isinstance(layer, nn.Linear) else f"{layer.kernel_size[0]}x{layer.kernel_size[1]} conv"


def signals(net, images, labels, precision="float32"):
    """The signals of one forward and backward pass: a list of dicts, one for each weighted layer.

    ``images`` (N, 3, H, W) and ``labels`` (N,) pass through the net as in training, batch norm using their own
    statistics; the net is left as it was. Projections on shortcuts have no row. Each row has
    layer, name, kind: its number from 1, the others as in ``layers``;
    response_std: standard deviation of the layer's responses over images, positions and channels, after batch norm and
        before ReLU or addition (Fig. 7); None for the classifier;
    signal_variance: variance of each channel of the layer's input over images and positions, averaged over channels
        (section 4.1: "forward propagated signals have non-zero variances");
    gradient_norm, weight_norm: Euclidean norms of the gradient of the loss with respect to the weights, and of these;
    residual_ratio: root mean square of a residual function F(x), relative to that of what the shortcut adds to it, on
        its last layer; None on all others, and in a block that does not really add the two.
    """
    weighted = list(_weighted_layers(net))
    statistics, hooks = {}, []  # {(name of the layer, column): a scalar tensor}
    buffers, training = [buffer.clone() for buffer in net.buffers()], net.training

    # A hook sees a tensor before the next module changes it in place.
    def on_input(module, function):
        hooks.append(module.register_forward_pre_hook(lambda _, inputs: function(inputs[0].detach())))

    def on_output(module, function):
        hooks.append(module.register_forward_hook(lambda _, inputs, output: function(output.detach())))

    def store(name, column, statistic):
        return lambda x: statistics.update({(name, column): statistic(x.float())})

    def watch_addition(block, last_layer):
        terms = {}  # the two that the block adds; copies, since it adds in place

        def store_ratio(output):
            if "shortcut" in terms and torch.equal(output, terms["residual"].clone().add_(terms["shortcut"]).relu_()):
                residual, shortcut = (terms[name].float().square().mean().sqrt() for name in ("residual", "shortcut"))
                statistics[last_layer, "residual_ratio"] = residual / shortcut
            terms.clear()

        on_output(_norm_after(net, last_layer), lambda x: terms.update(residual=x.clone()))
        if block.downsample is None:
            on_input(block, lambda x: terms.update(shortcut=x.clone()))
        else:
            on_output(block.downsample, lambda x: terms.update(shortcut=x.clone()))
        on_output(block, store_ratio)

    for name, layer in weighted:
        on_input(layer, store(name, "signal_variance", _variance_of_channels))
        if isinstance(layer, nn.Conv2d):
            on_output(_norm_after(net, name), store(name, "response_std", torch.std))
    last_layers = {name.rpartition(".")[0]: name for name, _ in weighted if name.startswith("layer")}
    for name, last_layer in last_layers.items():
        if net.get_submodule(name).residual:
            watch_addition(net.get_submodule(name), last_layer)
    try:
        with autocast(images.device, precision):
            logits = net.train()(images)
        loss = F.cross_entropy(logits.float(), labels)
        gradients = torch.autograd.grad(loss, [layer.weight for _, layer in weighted])
    finally:
        for hook in hooks:
            hook.remove()
        net.train(training)
        for buffer, before in zip(net.buffers(), buffers, strict=True):
            buffer.copy_(before)
    for (name, layer), gradient in zip(weighted, gradients, strict=True):
        statistics[name, "gradient_norm"] = gradient.float().norm()
        statistics[name, "weight_norm"] = layer.weight.detach().norm()
    values = torch.stack(list(statistics.values())).tolist()  # read back from the device once
    by_layer = dict(zip(statistics, values, strict=True))
    return [
        {"layer": number, "name": name, "kind": _kind(layer)}
        | {column: by_layer.get((name, column)) for column in SIGNALS}
        for number, (name, layer) in enumerate(weighted, start=1)
    ]


def _norm_after(net, name):
    """The batch norm that follows a convolution of that name."""
    return net.get_submodule(name.replace("conv", "bn"))


def _variance_of_channels(x):
    """Variance of each channel of (N, C, ...), averaged over channels."""
    return x.var([axis for axis in range(x.ndim) if axis != 1]).mean()
