import itertools
import math

import pytest
import torch
import torchvision
from torch import nn

from replication import measure, models, paper

TORCHVISION_PARAMETERS = {18: 11_689_512, 34: 21_797_672, 50: 25_557_032, 101: 44_549_160, 152: 60_192_808}


@pytest.mark.parametrize(
    ("depth", "count"),
    [(20, 269_722), (32, 464_154), (44, 658_586), (56, 853_018), (110, 1_727_962), (1202, 19_421_274)],
)
def test_cifar_nets_have_the_parameters_of_section_4_2(depth, count):
    with torch.device("meta"):
        net = models.cifar_net(depth)
    assert measure.parameters(net) == count
    printed = str(paper.CIFAR_PARAMETERS[f"resnet-{depth}"] / 1e6)
    assert str(round(count / 1e6, len(printed.partition(".")[2]))) == printed


@pytest.mark.parametrize("depth", models.IMAGENET_STAGES)
def test_torchvision_weights_load_and_give_the_same_logits(depth):
    torch.manual_seed(depth)
    theirs = torchvision.models.get_model(f"resnet{depth}").eval()
    ours = models.imagenet_net(depth, stride_on="3x3").eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    images = torch.randn(2, 3, 96, 64)
    assert measure.parameters(ours) == TORCHVISION_PARAMETERS[depth]
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images))


@pytest.mark.parametrize("depth", [50, 101, 152])
def test_stride_on_the_1x1_layer_is_the_default_and_another_net(depth):
    with torch.device("meta"):
        ours = models.imagenet_net(depth)
    blocks = [ours.layer2[0], ours.layer3[0], ours.layer4[0]]
    assert all(block.conv1.stride == (2, 2) and block.conv2.stride == (1, 1) for block in blocks)


@pytest.mark.parametrize(
    ("name", "billions"),
    [("resnet-18", 1.8), ("resnet-34", 3.6), ("resnet-50", 3.8), ("resnet-101", 7.6), ("resnet-152", 11.3)],
)
def test_multiply_adds_are_those_of_table_1(name, billions):
    with torch.device("meta"):
        net = models.NetName.parse(name, imagenet=True).build(1000)
    assert measure.multiply_adds(net, 224) == pytest.approx(billions * 1e9, rel=0.02)  # printed with two digits


@pytest.mark.parametrize("n", [1, 3, 9])
def test_multiply_adds_of_cifar_nets_by_arithmetic(n):
    expected = 3 * 16 * 9 * 32 * 32 + 2 * n * 16 * 16 * 9 * 32 * 32 + 64 * 10
    for narrow, wide, side in ((16, 32, 16), (32, 64, 8)):
        expected += (narrow * wide + (2 * n - 1) * wide * wide) * 9 * side * side
    net = models.cifar_net(6 * n + 2)
    assert measure.multiply_adds(net, 32) == expected
    layers = measure.layers(net, 32)
    assert layers["multiply_adds"].sum() == expected
    assert len(layers) == 6 * n + 2
    assert (layers["around"] == 2).sum() == 3 * n  # "totally 3n shortcuts"
    assert layers["grows"].sum() == 2


def test_plain_34_costs_18_percent_of_vgg_19():
    with torch.device("meta"):
        plain, vgg = models.imagenet_net(34, residual=False), torchvision.models.vgg19()
    assert round(100 * measure.multiply_adds(plain, 224) / measure.multiply_adds(vgg, 224)) in (18, 19)
    assert measure.multiply_adds(vgg, 224) == pytest.approx(19.6e9, rel=0.01)


def test_counting_leaves_the_net_as_it_was():
    net = models.cifar_net(8)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    measure.multiply_adds(net, 32)
    measure.layers(net, 32)
    assert net.training
    assert not net.conv1._forward_hooks
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def padded_shortcut(image, out_channels, stride):
    """Option A of section 3.3 in plain Python: lists [channel][row][column]."""
    height, width = len(image[0]), len(image[0][0])
    kept = [[[plane[y][x] for x in range(0, width, stride)] for y in range(0, height, stride)] for plane in image]
    zeros = [[0.0] * len(kept[0][0]) for _ in kept[0]]
    return kept + [zeros] * (out_channels - len(image))


@pytest.mark.parametrize(("channels", "stride"), [(4, 2), (7, 2), (3, 2), (6, 1)])
def test_option_a_is_the_identity_padded_with_zeros(channels, stride):
    images = torch.randn(2, 3, 6, 4)
    shortcut = models.shortcut_path("A", 3, channels, stride)
    assert list(shortcut.parameters()) == []
    expected = [padded_shortcut(image, channels, stride) for image in images.tolist()]
    assert torch.equal(shortcut(images), torch.tensor(expected))


def test_options_b_and_c_project_where_the_paper_says():
    projections = {
        letter: [
            name
            for name, module in models.cifar_net(20, shortcut=letter).named_modules()
            if name.endswith("downsample.0")
        ]
        for letter in "ABC"
    }
    growing = ["layer2.0.downsample.0", "layer3.0.downsample.0"]
    everywhere = [f"layer{stage}.{block}.downsample.0" for stage in (1, 2, 3) for block in range(3)]
    assert projections == {"A": [], "B": growing, "C": everywhere}


def test_plain_and_residual_nets_hold_the_same_parameters_by_name():
    plain, residual = models.cifar_net(20, residual=False), models.cifar_net(20)
    shapes = [{name: value.shape for name, value in net.state_dict().items()} for net in (plain, residual)]
    assert shapes[0] == shapes[1]
    plain.load_state_dict(residual.state_dict())
    images = torch.randn(2, 3, 32, 32)
    assert not torch.allclose(plain(images), residual(images))


def reference(net, images, n, residual):
    """The forward pass of section 4.2 written out in float64, for evaluation mode."""
    weights = {name: value.double() for name, value in net.state_dict().items()}

    def layer(x, conv, norm, stride=1):
        x = nn.functional.conv2d(x, weights[f"{conv}.weight"], stride=stride, padding=1)
        shape = (1, -1, 1, 1)
        mean, variance = weights[f"{norm}.running_mean"].view(shape), weights[f"{norm}.running_var"].view(shape)
        normal = (x - mean) / (variance + 1e-5).sqrt()
        return normal * weights[f"{norm}.weight"].view(shape) + weights[f"{norm}.bias"].view(shape)

    x = layer(images.double(), "conv1", "bn1").relu()
    for stage, block in itertools.product((1, 2, 3), range(n)):
        place, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
        y = layer(x, f"{place}.conv1", f"{place}.bn1", stride).relu()
        y = layer(y, f"{place}.conv2", f"{place}.bn2")
        if residual:
            around = x[:, :, ::stride, ::stride]
            y[:, : around.shape[1]] += around
        x = y.relu()
    return x.mean((2, 3)) @ weights["fc.weight"].T + weights["fc.bias"]


@pytest.mark.parametrize("residual", [True, False])
def test_cifar_net_against_a_float64_reference(residual):
    torch.manual_seed(1)
    net = models.cifar_net(14, residual=residual)
    images = torch.randn(8, 3, 32, 32)
    net(images)  # moves the running statistics off their start
    with torch.no_grad():
        torch.testing.assert_close(
            net.eval()(images).double(), reference(net, images, 2, residual), rtol=1e-3, atol=1e-4
        )


def test_initialization_is_he_et_al_2015():
    torch.manual_seed(0)
    net = models.cifar_net(56, shortcut="C")
    for module in net.modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 5000:
            fan_in = module.weight[0].numel()
            assert module.weight.std().item() == pytest.approx(math.sqrt(2 / fan_in), rel=0.05)
            assert module.weight.mean().item() == pytest.approx(0, abs=0.05 * math.sqrt(2 / fan_in))
        if isinstance(module, nn.BatchNorm2d):
            assert module.weight.eq(1).all()
            assert module.bias.eq(0).all()
    assert net.fc.bias.eq(0).all()


@pytest.mark.parametrize(
    ("name", "imagenet", "means"),
    [
        ("plain-20", False, (False, 20, "A")),
        ("resnet-110", False, (True, 110, "A")),
        ("resnet-56-B", False, (True, 56, "B")),
        ("resnet-50", False, (True, 50, "A")),  # 6n+2 as well
        ("resnet-50", True, (True, 50, "B")),
        ("resnet-34", True, (True, 34, "A")),
        ("resnet-34-C", True, (True, 34, "C")),
    ],
)
def test_names_of_nets(name, imagenet, means):
    parsed = models.NetName.parse(name, imagenet)
    assert parsed[:3] == means
    assert str(parsed) == name
    assert str(models.NetName.parse("resnet-20-A")) == "resnet-20"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet-21", "6n\\+2.*20, 32, 44, 56, 110, 1202.*nearest to yours is 20"),
        ("resnet-56-D", "shortcut 'D': choose A, B, C"),
        ("resnet56", "did you mean 'resnet-56'"),
        ("plain-20-A", "choose plain-20"),
        ("resnet-056", "choose plain-<depth>"),
        ("resnet-2", "6n\\+2"),
        ("", "choose plain-<depth>"),
        ("resnet-２０", "choose plain-<depth>"),
    ],
)
def test_unknown_nets_are_refused_with_the_choices(name, message):
    with pytest.raises(ValueError, match=message):
        models.NetName.parse(name)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: models.cifar_net(21), ValueError, "nearest to yours is 20"),
        (lambda: models.cifar_net(20.0), TypeError, "whole number"),
        (lambda: models.cifar_net(20, shortcut="D"), ValueError, "shortcut 'D'"),
        (lambda: models.cifar_net(20, classes=1), ValueError, "classes 1"),
        (lambda: models.imagenet_net(20), ValueError, "18, 34, 50, 101, 152"),
        (lambda: models.imagenet_net(50, residual=False), ValueError, "18 or 34"),
        (lambda: models.imagenet_net(50, stride_on="5x5"), ValueError, "stride_on '5x5': choose 1x1, 3x3"),
    ],
)
def test_bad_arguments_are_refused(build, error, message):
    with pytest.raises(error, match=message):
        build()
