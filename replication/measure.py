"""What is measured inside a net."""

import copy

import torch
from torch.utils.flop_counter import FlopCounterMode


def parameters(net):
    """Number of trained parameters."""
    return sum(parameter.numel() for parameter in net.parameters())


def multiply_adds(net, side):
    """Multiply-adds of convolutions and classifier for one image of ``side`` x ``side`` pixels, as in Table 1."""
    net = copy.deepcopy(net).to("meta").eval()  # shapes only: nothing is computed
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(torch.empty(1, 3, side, side, device="meta"))
    return counter.get_total_flops() // 2  # the counter takes a multiply-add for two operations
