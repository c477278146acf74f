import copy

import pytest
import torch
import torch.nn.functional as F

from replication import measure, models


def batch(side, count=6):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, side, side, generator=generator), torch.arange(count) % 4


def moved(net):
    """The net with batch norms that are no longer the identity, as after some training."""
    generator = torch.Generator().manual_seed(2)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.weight.data = 0.5 + torch.rand(module.num_features, generator=generator)
            module.bias.data = torch.randn(module.num_features, generator=generator)
    return net


def slowly(net, images, labels, kind):
    """The same measurements in float64, layer after layer as the paper describes the nets."""
    net, rows = copy.deepcopy(net).double(), []

    def layer(x, conv, bn):
        channels = x.transpose(0, 1).flatten(1)
        rows.append({"conv": conv, "signal_variance": channels.var(1).mean().item()})
        y = F.conv2d(x, conv.weight, stride=conv.stride, padding=conv.padding)
        y = F.batch_norm(y, None, None, bn.weight, bn.bias, training=True, eps=bn.eps)
        rows[-1]["response_std"] = y.std().item()
        return y

    x = F.relu(layer(images.double(), net.conv1, net.bn1))
    if net.maxpool is not None:
        x = F.max_pool2d(x, 3, 2, 1)
    for block in net.modules():
        if not hasattr(block, "residual"):
            continue
        y = F.relu(layer(x, block.conv1, block.bn1))
        y = layer(y, block.conv2, block.bn2)
        if hasattr(block, "conv3"):
            y = layer(F.relu(y), block.conv3, block.bn3)
        if kind == "resnet":
            around = x if block.downsample is None else block.train().downsample(x)
            rows[-1]["residual_ratio"] = (y.pow(2).mean() / around.pow(2).mean()).sqrt().item()
            y = y + around
        x = F.relu(y)
    features = x.mean((2, 3))
    rows.append({"conv": net.fc, "signal_variance": features.var(0).mean().item(), "response_std": None})
    F.cross_entropy(net.fc(features), labels).backward()
    for row in rows:
        weight = row.pop("conv").weight
        row |= {"gradient_norm": weight.grad.norm().item(), "weight_norm": weight.norm().item()}
    return rows


@pytest.mark.parametrize("name", ["plain-14", "resnet-14", "resnet-14-C", "resnet-18", "resnet-50"])
def test_signals_are_those_of_a_slow_pass_in_double_precision(name):
    torch.manual_seed(0)
    parsed = models.NetName.parse(name, imagenet=name in ("resnet-18", "resnet-50"))
    net = moved(parsed.build(classes=4))
    images, labels = batch(64 if parsed.imagenet else 16)
    rows = measure.signals(net, images, labels)
    expected = slowly(net, images, labels, name.split("-")[0])
    assert [row["layer"] for row in rows] == list(range(1, parsed.depth + 1))
    layers = measure.layers(net, images.shape[-1])
    assert [(row["name"], row["kind"]) for row in rows] == list(zip(layers["name"], layers["kind"], strict=True))
    for row, wanted in zip(rows, expected, strict=True):
        for column in measure.SIGNALS:
            value = wanted.get(column)
            assert row[column] == (value and pytest.approx(value, rel=2e-3)), (row["name"], column)


def test_at_the_start_every_response_has_a_deviation_of_one():
    """By batch norm; later it follows from its weights and biases alone."""
    torch.manual_seed(0)
    net = models.cifar_net(20, residual=False)
    images, labels = batch(32)
    for row in measure.signals(net, images, labels)[:-1]:
        assert row["response_std"] == pytest.approx(1, abs=1e-3)
    net.bn1.weight.data = torch.tensor([3.0, 1.0]).repeat(8)
    net.bn1.bias.data = torch.tensor([2.0, 0.0]).repeat(8)
    # variance of the channels about their means, 5, and of these means, 1
    assert measure.signals(net, images, labels)[0]["response_std"] == pytest.approx(6**0.5, rel=1e-3)


@pytest.mark.parametrize("training", [True, False])
def test_measuring_leaves_a_net_as_it_was(training):
    net = models.cifar_net(8, shortcut="B").train(training)
    before = copy.deepcopy(net.state_dict())
    measure.signals(net, *batch(16), precision="bfloat16")
    assert net.training == training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
