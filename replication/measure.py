"""What is measured inside a net: its size, its layers, and the signals that pass through them."""

import copy
import re

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
    try:
        return _counted(*_shapes_only(net, size))
    except (RuntimeError, NotImplementedError):  # a net of one's own whose path depends on values
        return _counted(*_shapes_only(net, size, "cpu"))


def _counted(net, image):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(image)
    return counter.get_total_flops() // 2  # the counter takes a multiply-add for two operations


def _shapes_only(net, size, device="meta"):
    """A copy of the net, and an image for it, with which on ``device`` "meta" nothing is computed."""
    height, width = (size, size) if isinstance(size, int) else size
    net = copy.deepcopy(net).to(device).eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):  # keeps shapes and is not counted, but takes most of the time
            module.forward = nn.Identity().forward
    return net, torch.zeros(1, 3, height, width, device=device)


def layers(net, size):
    """The weighted layers of a net, in the order in which an image passes them: a DataFrame with one row per layer.

    ``size``: as in ``multiply_adds``. Columns: name; kind, "3x3 conv" or "fc"; channels, height and map, the width, of
    its output; stride; multiply_adds; around, the number of layers that the shortcut ending behind this layer bypasses
    (0: none ends here); grows, whether that shortcut changes dimensions. Projections on shortcuts have no row.
    """
    net, image = _shapes_only(net, size)
    rows, rows_of_block = [], {}

    def add_row(name, layer, output):
        rows_of_block.setdefault(name.rpartition(".")[0], []).append(len(rows))
        height, width = (1, 1) if isinstance(layer, nn.Linear) else output.shape[2:]
        row = {"name": name, "kind": _kind(layer), "channels": output.shape[1]}
        row |= {"stride": 1 if isinstance(layer, nn.Linear) else layer.stride[0], "height": height, "map": width}
        rows.append(row | {"multiply_adds": layer.weight.numel() * height * width, "around": 0, "grows": False})

    for name, layer in weighted_layers(net):
        layer.register_forward_hook(lambda layer, _, output, name=name: add_row(name, layer, output))
    with torch.no_grad():
        net(image)
    for name, indices in rows_of_block.items():
        block = net.get_submodule(name)
        if getattr(block, "residual", False):
            rows[indices[-1]] |= {"around": len(indices), "grows": block.downsample is not None}
    return pd.DataFrame(rows)


def weighted_layers(net):
    """Names and modules of the weighted layers that an image passes one after the other: no projections.

    Of a net of one's own, its convolutions and linear layers but those with "downsample" or "shortcut" in their names.
    """
    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear) and not re.search("downsample|shortcut", name):
            yield name, module


def _kind(layer):
    return "fc" if isinstance(layer, nn.Linear) else f"{layer.kernel_size[0]}x{layer.kernel_size[1]} conv"


def signals(net, images, labels, precision="float32"):
    """The signals of one forward and backward pass: a list of dicts, one for each weighted layer.

    ``images`` (N, 3, H, W) and ``labels`` (N,) pass through the net as in training, batch norm using their own
    statistics; the net is left as it was. Projections on shortcuts have no row. Each row has
    layer, name, kind: its number from 1, the others as in ``layers``;
    response_std: standard deviation of the layer's responses over images, positions and channels, after batch norm and
        before ReLU or addition (Fig. 7); None for the classifier, and where no batch norm follows that is named after
        the layer, as bn1 after conv1;
    signal_variance: variance of each channel of the layer's input over images and positions, averaged over channels
        (section 4.1: "forward propagated signals have non-zero variances");
    gradient_norm, weight_norm: Euclidean norms of the gradient of the loss with respect to the weights, and of these;
    residual_ratio: root mean square of a residual function F(x), relative to that of what the shortcut adds to it, on
        its last layer; None on all others, and in a block that does not really add the two.
    A net of one's own has rows for what ``weighted_layers`` gives, none if that is nothing.
    """
    weighted = {name: layer for name, layer in weighted_layers(net) if layer.weight.requires_grad}
    if not weighted:
        return []
    buffers, training = [buffer.clone() for buffer in net.buffers()], net.training
    statistics, hooks = _watch(net, weighted)
    try:
        with autocast(images.device, precision):
            logits = net.train()(images)
        loss = F.cross_entropy(logits.float(), labels)
        gradients = torch.autograd.grad(loss, [layer.weight for layer in weighted.values()], allow_unused=True)
    finally:
        for hook in hooks:
            hook.remove()
        net.train(training)
        for buffer, before in zip(net.buffers(), buffers, strict=True):
            buffer.copy_(before)
    for (name, layer), gradient in zip(weighted.items(), gradients, strict=True):
        if gradient is not None:
            statistics[name, "gradient_norm"] = gradient.float().norm()
        statistics[name, "weight_norm"] = layer.weight.detach().norm()
    values = torch.stack(list(statistics.values())).tolist()  # read back from the device once
    by_layer = dict(zip(statistics, values, strict=True))
    return [
        {"layer": number, "name": name, "kind": _kind(layer)}
        | {column: by_layer.get((name, column)) for column in SIGNALS}
        for number, (name, layer) in enumerate(weighted.items(), start=1)
    ]


def _watch(net, weighted):
    """Hooks on a net, and what they fill when an image passes: {(name of a layer, column): a scalar tensor}."""
    statistics, hooks, terms, places = {}, [], {}, {}  # terms: the two that a block adds; places: of outputs in memory
    modules = dict(net.named_modules())

    def call(function, module, *names):
        def hook(_, inputs, output):
            if inputs and isinstance(inputs[0], torch.Tensor) and isinstance(output, torch.Tensor):
                function(*names, inputs[0].detach(), output.detach())

        hooks.append(module.register_forward_hook(hook))

    def layer_passed(name, layer, x, y):
        places[name] = y.data_ptr()
        channels = 1 if isinstance(layer, nn.Conv2d) else x.ndim - 1
        axes = [axis for axis in range(x.ndim) if axis != channels]
        if x.numel() == x.shape[channels]:
            return  # a single value per channel has no variance
        statistics[name, "signal_variance"] = x.float().var(axes).mean()

    def norm_passed(name, x, y):
        if places.get(name) != x.data_ptr():
            return  # it does not follow the layer, as in blocks that normalize first
        statistics[name, "response_std"] = y.float().std()
        terms["residual"] = y.clone()  # the block adds in place

    def shortcut_passed(_, y):
        terms["shortcut"] = y

    def block_passed(block, last_layer, x, y):
        shortcut = x if block.downsample is None else terms.pop("shortcut", None)
        residual = terms.get("residual", y.new_empty(0))
        if (
            shortcut is not None
            and residual.shape == shortcut.shape
            and torch.equal(y, residual.clone().add_(shortcut).relu_())
        ):
            residual, shortcut = (term.float().square().mean().sqrt() for term in (residual, shortcut))
            statistics[last_layer, "residual_ratio"] = residual / shortcut

    for name, layer in weighted.items():
        call(layer_passed, layer, name, layer)
        if norm := modules.get(name.replace("conv", "bn") if isinstance(layer, nn.Conv2d) else None):
            call(norm_passed, norm, name)
    last_layers = {name.rpartition(".")[0]: name for name in weighted if name.startswith("layer")}
    for name, last_layer in last_layers.items():
        block = modules[name]
        if getattr(block, "residual", None) is True and hasattr(block, "downsample"):
            call(block_passed, block, block, last_layer)
            if block.downsample is not None:
                call(shortcut_passed, block.downsample)
    return statistics, hooks
