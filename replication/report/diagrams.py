"""Figs. 2, 3 and 5, drawn from the nets."""

import itertools
import math

import matplotlib.pyplot as plt
import seaborn as sns
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from matplotlib.path import Path

STAGE_COLOURS = sns.color_palette("pastel", 5).as_hex()


def figure_2():
    """Fig. 2: residual learning, a building block."""
    figure, axes = plt.subplots(figsize=(4.6, 3.8))
    bottom = _block(axes, ["weight layer", "weight layer"], "x")
    axes.text(-0.2, bottom + 0.7, "F(x)", ha="right", va="center")
    axes.text(-0.35, bottom, "F(x) + x", ha="right", va="center")
    axes.text(1.75, bottom / 2 + 0.3, "x\nidentity", ha="left", va="center")
    return _bare(figure)


def figure_5(nets):
    """Fig. 5: the second block of nets, such as the basic block of ResNet-34 and the bottleneck of ResNet-50.

    ``nets``: titles, each with a table of ``measure.layers``.
    """
    figure, row = plt.subplots(1, len(nets), figsize=(4 * len(nets), 4.8), sharey=True, squeeze=False)
    for axes, (title, layers) in zip(row[0], nets.items(), strict=True):
        block = layers[layers["name"].str.startswith("layer1.1.")]
        labels = [f"{layer.kind.split()[0]}, {layer.channels}" for layer in block.itertuples()]
        _block(axes, labels, f"{block['channels'].iloc[-1]}-d")
        axes.set_title(title, fontsize=11)
    return _bare(figure)


def _block(axes, layers, above):
    """Draw a residual block from the top (0, 0.9) down; returns the height of its addition."""
    step, bottom, right, corner = 1.5, -1.5 * len(layers), 1.6, 0.3
    _arrow(axes, (0, 0.9), (0, 0.25))
    axes.text(-0.2, 0.7, above, ha="right", va="center")
    for number, layer in enumerate(layers):
        top, last = -step * number, number + 1 == len(layers)
        _box(axes, 0, top, layer, 2.4, 0.5, STAGE_COLOURS[0])
        _arrow(axes, (0, top - 0.25), (0, top - step + (0.2 if last else 0.25)))
        if not last:
            axes.text(0.15, top - step / 2, "relu", va="center", style="italic")
    axes.text(0, bottom, "+", ha="center", va="center", fontsize=15, bbox={"boxstyle": "circle,pad=0.1", "fc": "white"})
    _arrow(axes, (0, bottom - 0.2), (0, bottom - 0.85))
    axes.text(0.15, bottom - 0.55, "relu", va="center", style="italic")
    turns = [(0, 0.6), (right - corner, 0.6), (right, 0.6), (right, 0.6 - corner)]
    turns += [(right, bottom + corner), (right, bottom), (right - corner, bottom), (0.22, bottom)]
    corner = [Path.LINETO, Path.CURVE3, Path.CURVE3]
    _arrow(axes, path=Path(turns, [Path.MOVETO, *corner, *corner, Path.LINETO]))
    axes.set(xlim=(-1.9, 2.9), ylim=(min(bottom - 1, axes.get_ylim()[0]), 1))
    return bottom


def figure_3(nets):
    """Fig. 3: nets as columns of their weighted layers and poolings, with their shortcuts.

    ``nets``: titles, each with a table of ``measure.layers``. One colour is one size of map, written beside its first
    layer; pooling and fully connected layers are white. A shortcut is drawn solid where it is an identity, dotted where
    dimensions grow.
    """
    pools = {title: _pools(layers) for title, layers in nets.items()}
    height = max(len(layers) + len(pools[title]) for title, layers in nets.items())
    figure, row = plt.subplots(1, len(nets), figsize=(2.9 * len(nets), 0.27 * height + 1), sharey=True, squeeze=False)
    for axes, (title, layers) in zip(row[0], nets.items(), strict=True):
        sizes = list(layers["map"].unique())
        place = 0
        for layer in layers.itertuples():
            if layer.Index in pools[title]:
                _box(axes, 0, -place, pools[title][layer.Index], 2.2, 0.7, "white", fontsize=8)
                _arrow(axes, (0, 0.65 - place), (0, 0.35 - place), size=6)
                place += 1
            halving = "" if layer.stride == 1 else f", /{layer.stride}"
            colour = "white" if layer.kind == "fc" else STAGE_COLOURS[sizes.index(layer.map) % len(STAGE_COLOURS)]
            _box(axes, 0, -place, f"{layer.kind}, {layer.channels}{halving}", 2.2, 0.7, colour, fontsize=8)
            if layer.kind != "fc" and layer.map not in layers["map"][: layer.Index].values:
                axes.text(-1.2, -place, f"{layer.map}", ha="right", va="center", fontsize=8, color="0.35")
            if place:
                _arrow(axes, (0, 0.65 - place), (0, 0.35 - place), size=6)
            if layer.around:
                start, style = layer.around - place - 0.5, ":" if layer.grows else "-"
                bow = {"connectionstyle": "arc3,rad=-0.55", "linestyle": style}
                _arrow(axes, (1.1, start), (1.1, -place - 0.45), size=7, **bow)
            place += 1
        axes.set(xlim=(-1.7, 1.7), ylim=(-height, 0.6))
        axes.set_title(title, fontsize=11)
    return _bare(figure)


def _pools(layers):
    """Where a net pools, told by layers that take in smaller maps than those above give out: {layer below: text}.

    The maps that an fc layer takes in, one value for each, follow from the number of its weights.
    """
    pools = {}
    for above, below in itertools.pairwise(layers.itertuples()):
        size = below.map * below.stride
        if below.kind == "fc":
            size = math.isqrt(below.multiply_adds // below.channels // above.channels)
        if size < above.map:
            pools[below.Index] = "avg pool" if size == 1 else f"pool, /{above.map // size}"
    return pools


def _box(axes, x, y, text, width, height, colour, fontsize=11):
    corner = (x - width / 2, y - height / 2)
    style = {"boxstyle": "round,pad=0,rounding_size=0.08", "facecolor": colour, "edgecolor": "0.25"}
    axes.add_patch(FancyBboxPatch(corner, width, height, **style))
    axes.text(x, y, text, ha="center", va="center", fontsize=fontsize)


def _arrow(axes, *ends, size=12, **style):
    style |= {"arrowstyle": "-|>", "mutation_scale": size, "color": "0.25", "shrinkA": 0, "shrinkB": 0}
    axes.add_patch(FancyArrowPatch(*ends, **style))


def _bare(figure):
    for axes in figure.axes:
        axes.axis("off")
    figure.tight_layout()
    plt.close(figure)
    return figure
