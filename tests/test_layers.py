import numpy as np
import pandas as pd
import pytest

from replication import report
from replication.report import layers as responses

TIMES = (0, 550, 1100)


def layers(depth, scale=1.0):
    """Rows of layers.csv whose every number is told by net, layer and iteration."""
    return [
        {"iteration": time, "layer": layer, "kind": "fc" if layer == depth else "3x3 conv"}
        | {
            "name": "fc"
            if layer == depth
            else "conv1"
            if layer == 1
            else f"layer1.{layer // 2 - 1}.conv{layer % 2 + 1}"
        }
        | {"response_std": None if layer == depth else scale * (layer + time), "signal_variance": layer}
        | {"gradient_norm": 2.0**-layer, "weight_norm": 1 + layer * time}
        | {"residual_ratio": 1 / layer if scale < 1 and layer % 2 and layer > 1 else None}
        for time in TIMES
        for layer in range(1, depth + 1)
    ]


@pytest.fixture
def records(make):
    return [make(9, 9, layers=layers(8, 2.0 + seed), net="plain-8", seed=seed) for seed in (0, 1)] + [
        make(9, 9, layers=layers(14, 0.5), net="resnet-14", seed=seed) for seed in (0, 1)
    ]


def test_the_table_has_what_the_layers_say(records):
    table = responses.table(records).set_index("net")
    assert list(table.index) == ["plain-8", "resnet-14"]
    assert table["n"].tolist() == [2, 2]
    # Seven 3x3 layers at iteration 1100: 1104 on the average, times two and times three.
    assert table.loc["plain-8", "response"] == pytest.approx(2.5 * 1104)
    assert table.loc["plain-8", "response_std"] == pytest.approx(1104 / 2**0.5)
    # Of seven layers the first five begin two before the last five, of thirteen eight; each halves the gradient.
    assert table["gain_start"].tolist() == pytest.approx([4, 256], rel=1e-4)
    assert table["gain_least"].tolist() == pytest.approx([4, 256], rel=1e-4)
    assert table["weights"].tolist() == [1 + 7 * 1100, 1 + 13 * 1100]
    assert table["variance"].tolist() == [1, 1]
    assert table.loc["resnet-14", "residual"] == pytest.approx(
        np.mean([1 / layer for layer in range(3, 14, 2)]), rel=1e-4
    )
    text = responses.readable(table.reset_index()).set_index("net")
    assert list(text.index) == ["plain-8", "ResNet-14"]
    assert text.loc["plain-8", "mean response"] == "2,208, 3,312"
    assert text.loc["plain-8", "residual functions relative to shortcuts"] == "–"


def test_figure_7_shows_all_3x3_layers_in_order_and_by_size(records):
    above, below = responses.figure_7(records).axes
    lines = {line.get_label(): line for line in above.lines}
    assert list(lines) == ["plain-8", "ResNet-14"]
    assert list(lines["plain-8"].get_xdata()) == list(range(1, 8))
    assert list(lines["plain-8"].get_ydata()) == [2.5 * (layer + 1100) for layer in range(1, 8)]
    assert list(below.lines[0].get_ydata()) == sorted(lines["plain-8"].get_ydata(), reverse=True)
    assert [line.get_linestyle() for line in above.lines] == ["--", "-"]
    assert above.lines[0].get_color() == below.lines[0].get_color() != above.lines[1].get_color()
    assert [text.get_text() for text in above.figure.legends[0].get_texts()] == ["plain-8", "ResNet-14"]


@pytest.mark.parametrize(
    ("stds", "top", "said"),
    [
        ([1.0] * 6 + [2.5], 2.625, ""),  # all fits, with a twentieth above
        ([1.0] * 6 + [9.0], 3, "not shown: 1 layer of plain-8 above 3.0, up to 9"),
        ([40.0, 20.0, 10.0, 1.0, 1.0, 1.0, 1.0], 3, "not shown: 3 layers of plain-8 above 3.0, up to 40"),
    ],
)
def test_figure_7_is_linear_and_says_what_lies_above(make, stds, top, said):
    rows = layers(8)
    for row in rows[:-1]:
        row["response_std"] = stds[row["layer"] - 1] if row["layer"] < 8 else None
    above, below = responses.figure_7([make(9, 9, layers=rows, net="plain-8")]).axes
    assert (above.get_yscale(), below.get_yscale()) == ("linear", "linear")
    assert above.get_ylim() == below.get_ylim() == (0, pytest.approx(top))
    assert [text.get_text() for text in below.texts] == [said]


def test_gradients_are_shown_at_the_start_at_the_end_and_along(records):
    start, end, along = responses.gradients(records).axes
    assert (start.get_title(), end.get_title(), along.get_title()) == ("at the start", "at the end", "along training")
    assert list(start.lines[1].get_ydata()) == pytest.approx([2.0**-layer for layer in range(1, 14)], rel=1e-4)
    assert start.get_ylim() == end.get_ylim()
    assert list(along.lines[0].get_xdata()) == list(TIMES)
    assert list(along.lines[1].get_ydata()) == pytest.approx([256] * 3, rel=1e-4)


def test_signals_are_those_that_enter_blocks(records):
    axes = responses.signals(records).axes
    assert list(axes[0].lines[0].get_ydata()) == [2, 4, 6]  # of seven layers those that begin a block
    assert list(axes[3].lines[0].get_ydata()) == [1 + layer * 1100 for layer in range(1, 8)]


def test_plain_nets_have_no_residual_functions(records):
    assert responses.residuals(records[:2]) is None
    axes = responses.residuals(records).axes
    assert [line.get_label() for line in axes[1].lines] == ["ResNet-14"]
    assert list(axes[1].lines[0].get_ydata()) == pytest.approx([1 / layer for layer in range(3, 14, 2)], rel=1e-4)


def test_tables_and_figures_are_written_twice_with_the_same_bytes(records, tmp_path):
    for folder in ("one", "two"):
        table = responses.table(records)
        report.save_table(table, tmp_path / folder, shown=responses.readable(table))
        report.save_figure(responses.gradients(records), tmp_path / folder, "gradients")
    names = {path.name for path in (tmp_path / "one").iterdir()}
    assert names == {"table.csv", "table.md", "gradients.png", "gradients.svg"}
    assert all((tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes() for name in names)
    assert len(pd.read_csv(tmp_path / "one" / "table.csv")) == 2


def test_what_cannot_be_shown_is_said(make, records):
    without = make(9, 9, net="resnet-8")
    for show in (responses.table, responses.figure_7, responses.gradients, responses.signals, responses.residuals):
        with pytest.raises(ValueError, match="resnet-8__digits__seed-0: recorded before layers were measured"):
            show([*records, without])
        with pytest.raises(ValueError, match="at least one finished run"):
            show([])
    short = make(9, 9, layers=layers(8), net="plain-8", schedule=0.5)
    with pytest.raises(ValueError, match="not made under the same conditions"):
        responses.figure_7([*records, short])


def test_findings_name_claims_and_verdicts(make, records):
    assert report.findings(records, [5, 10]) == [
        "These nets decide none of these claims: see the criteria in 7_scorecard."
    ]
    lines = report.findings([make(9, 9, layers=layers(56), net="plain-56")], [5, 10])
    assert lines[0] == "Gradients do not vanish: mixed (digits, recipe digits, 1,100 iterations, float32)."
    text = "The least variance entering a 3x3 layer of plain-56 is 1 (one run; at least 0.01 required): holds."
    assert lines[3] == f"  Supporting: {text}"
