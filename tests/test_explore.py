import nbformat
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT

from replication import data, explore, load_net, models, report
from replication.hub import TrainedNet


@pytest.fixture
def net():
    torch.manual_seed(0)
    net = models.cifar_net(14)
    net(torch.randn(64, 3, 8, 8))  # running statistics that are not those of the start
    return net.eval()


def test_a_net_without_a_block_passes_on_what_enters_it(net):
    """The blocks written out one after the other, the second of the second stage left out."""
    assert explore.removable(net) == ["layer1.0", "layer1.1", "layer2.1", "layer3.1"]
    x = torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        y = F.relu(net.bn1(net.conv1(x)))
        for block in (*net.layer1, net.layer2[0], *net.layer3):
            y = block(y)
        expected, before = net.fc(y.mean((2, 3))), net(x)
        torch.testing.assert_close(explore.without(net, "layer2.1")(x), expected)
        assert torch.equal(net(x), before)  # the net itself is whole
    with pytest.raises(ValueError, match=r"block 'layer2.0': choose layer1.0, .*did you mean 'layer"):
        explore.without(net, "layer2.0")


def test_blocks_of_one_width_are_exchanged(net):
    x = torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        y = net.layer1[0](net.layer1[1](F.relu(net.bn1(net.conv1(x)))))
        expected = net.fc(net.layer3(net.layer2(y)).mean((2, 3)))
        torch.testing.assert_close(explore.swapped(net, "layer1.0", "layer1.1")(x), expected)
    with pytest.raises(ValueError, match="have 16 and 32 channels"):
        explore.swapped(net, "layer1.0", "layer2.1")


def test_projections_and_bottlenecks_can_be_left_out_where_dimensions_stay():
    with torch.device("meta"):
        assert explore.removable(models.imagenet_net(50))[:3] == ["layer1.1", "layer1.2", "layer2.1"]
        assert explore.removable(models.cifar_net(8, shortcut="C")) == ["layer1.0"]
        assert explore.removable(models.cifar_net(8, residual=False)) == ["layer1.0"]


def test_errors_with_blocks_left_out_are_those_of_these_nets(net):
    digits = data.load("digits")
    trained = TrainedNet(net, torch.from_numpy(digits.mean), digits.classes, None)
    table = explore.lesions(trained, digits.test)
    assert table["block"].tolist() == ["none", *explore.removable(net)]
    inputs = (torch.from_numpy(digits.test.pixels) - torch.from_numpy(digits.mean)).permute(0, 3, 1, 2) / 255
    for row in table.to_dict("records"):
        shown = net if row["block"] == "none" else explore.without(net, row["block"])
        with torch.no_grad():
            wrong = shown(inputs).argmax(1).numpy() != digits.test.labels
        assert row["error"] == pytest.approx(100 * wrong.mean())
    assert len(explore.lesion_figure({"some net": table}).axes) == 1


@pytest.mark.long
def test_residual_nets_barely_notice_what_plain_nets_do(monkeypatch):
    """The published nets: of the shape of Veit et al. 2016, whatever the numbers."""
    monkeypatch.undo()  # published nets are wanted here
    images, means = data.load("digits").test, {}
    for name in ("plain-20", "resnet-20"):
        whole, *without = explore.lesions(load_net(name), images)["error"]
        means[name] = np.mean(without) - whole
    assert means["plain-20"] > 3 * means["resnet-20"]


def test_disagreements_are_listed_by_image(make, tmp_path):
    one = make(1, 2, net="plain-20", predicted=[0, 1, 2, 3])
    other = make(1, 2, net="resnet-20", predicted=[0, 1, 3, 0])
    table = explore.disagreements(one, other)
    expected = {"image": [2, 3], "label": [0, 0], "plain-20": [2, 3], "resnet-20": [3, 0]}
    assert table.to_dict("list") == expected
    assert len(explore.pictures(data.load("digits"), table).axes) == 6
    with pytest.raises(ValueError, match="records of the same images"):
        explore.disagreements(one, make(1, 2, net="resnet-8", dataset="cifar10", predicted=[0]))


def test_the_drop_of_the_learning_rate_is_told_from_the_history(make):
    """The fixture's errors fall from 9 above the last by a point a row; the rate drops after the fifth of ten."""
    record = make(1, 2, net="plain-20", rates=(0.1,) * 5 + (0.01,) * 5)
    sentence = explore.at_the_first_drop(record)
    assert sentence == (
        "plain-20: training error 8.0 % at iteration 330, 6.0 % at iteration 550, then divided: 4.0 % at iteration 770."
    )
    assert "never divided" in explore.at_the_first_drop(make(1, 2, net="plain-32"))


def test_a_run_is_shown_until_a_percentage(make):
    layers = [
        {"iteration": iteration, "layer": layer, "kind": "3x3 conv", "response_std": 1.0, "gradient_norm": 0.1}
        for iteration in (0, 550, 1100)
        for layer in (1, 2)
    ]
    record = make(1, 2, net="plain-20", layers=layers)
    for percent, rows, measured in ((0, 0, "0"), (70, 7, "550"), (100, 10, "1,100")):
        errors, responses, _ = explore.run_until(record, percent).axes
        assert len(errors.lines[0].get_xdata()) == rows
        assert responses.get_title().endswith(f"iteration {measured}")
        assert errors.get_xlim() == (0, 1100)


def test_where_a_choice_was_not_run_the_nearest_is_shown(make):
    choices = [("plain", 20, 0), ("plain", 56, 3), ("plain", 56, 1), ("resnet-C", 32, 0)]
    assert explore.nearest(choices, "plain", 56, 3) == ("plain", 56, 3)
    assert explore.nearest(choices, "plain", 110, 0) == ("plain", 56, 1)
    assert explore.nearest(choices, "resnet-C", 20, 4) == ("resnet-C", 32, 0)
    row = {"iteration": 0, "kind": "3x3 conv", "response_std": 1.0, "gradient_norm": 0.1}
    layers = [row | {"layer": layer} for layer in (1, 2)]
    records = [make(1, 2, layers=layers, net=net) for net in ("plain-20", "plain-56", "resnet-32-C")]
    *chosen, _ = explore.depth_dial(records, records[1]).children
    assert [widget.value for widget in chosen] == ["plain", 56, 0, 100]
    assert chosen[0].options == (("plain", "plain"), ("ResNet-C", "resnet-C"))


def test_runs_under_one_set_of_conditions_are_chosen(make):
    long, short = make(1, 2, net="plain-20"), make(1, 2, net="plain-20", schedule=0.5)
    other = make(1, 2, net="plain-20", recipe="note", schedule=0.01)
    every = [short, other, long]
    assert explore.alike(every, "digits") == [long]
    assert explore.alike(every, "digits", "note") == [other]
    with pytest.raises(
        ValueError, match="there are no finished runs, choose digits, recipe digits; digits, recipe note"
    ):
        explore.alike(every, "cifar10")


def test_of_each_net_the_first_run_is_shown_and_a_missing_one_is_named(make):
    runs = [make(1, 2, net=net, seed=seed) for net, seed in (("plain-20", 0), ("plain-20", 1), ("resnet-20", 1))]
    assert explore.by_net(runs, ["resnet-20"]) == {"plain-20": runs[0], "resnet-20": runs[2]}
    message = "net 'plain-56': there is no finished run of it on 'digits', recipe 'digits'; there are some of plain-20"
    with pytest.raises(ValueError, match=message):
        explore.by_net(runs, ["plain-20", "plain-56"])


def test_the_exercise_with_a_net_of_ones_own_runs_as_it_stands(tmp_path, monkeypatch):
    """With the net of the docs, but for fewer iterations and seeds."""
    cells = nbformat.read(ROOT / "notebooks" / "10_explore.ipynb", 4).cells
    (cell,) = [cell.source for cell in cells if "preact.py" in cell.source]
    code = cell.split("```python\n")[1].split("```")[0]
    assert "seeds=[0, 1, 2], recipe=recipe" in code
    (tmp_path / "preact.py").write_text(
        (ROOT / "docs" / "own_nets.md").read_text().split("```python\n")[1].split("```")[0]
    )
    monkeypatch.syspath_prepend(tmp_path)
    given = {"dataset": "digits", "recipe": None, "results": str(tmp_path), "data": "data", "report": report}
    exec(code.replace("seeds=[0, 1, 2]", "schedule=0.005"), given)
    assert [record.net.partition("-")[0] for record in given["compared"]] == ["resnet", "preact.preact_20"]
    assert all(record.summary["iterations"] == 6 for record in given["compared"])
