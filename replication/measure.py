"""What is measured inside a net."""

import copy

import pandas as pd
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


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
        if "downsample" in name:
            return
        block = name.rpartition(".")[0]
        if isinstance(module, nn.Linear):
            size, channels, kind, stride = 1, output.shape[1], "fc", 1
            multiply_adds = module.weight.numel()
        else:
            (size, channels), stride = (output.shape[-1], output.shape[1]), module.stride[0]
            kind = f"{module.kernel_size[0]}x{module.kernel_size[1]} conv"
            multiply_adds = module.weight.numel() * size * output.shape[-2]
        blocks.setdefault(block, []).append(len(rows))
        row = {"name": name, "kind": kind, "channels": channels, "stride": stride, "map": size}
        rows.append(row | {"multiply_adds": multiply_adds, "around": 0, "grows": False})

    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(lambda module, _, output, name=name: note(name, module, output))
    with torch.no_grad():
        net(_image(size))
    for name, places in blocks.items():
        block = net.get_submodule(name)
        if getattr(block, "residual", False):
            rows[places[-1]] |= {"around": len(places), "grows": block.downsample is not None}
    return pd.DataFrame(rows)
