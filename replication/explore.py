"""What ``10_explore`` plays with: records by hand, nets with blocks taken out, images that nets disagree on."""

import copy
import io

import pandas as pd
from torch import nn

from replication import evaluate
from replication.data import check_name
from replication.data.batches import original_views
from replication.engine.checks import choice
from replication.models import BasicBlock, Bottleneck, NetName
from replication.recipes import RECIPES
from replication.report.by_hand import lesion_figure as lesion_figure
from replication.report.by_hand import pictures as pictures
from replication.report.by_hand import run_until
from replication.report.tables import spelled
from replication.runs import a_list
from replication.runs.records import by_conditions, ended

PERCENTS = tuple(range(0, 101, 5))  # of the iterations, where the dial stops


def check(recipe=None, **nets):
    """Raise TypeError or ValueError for an unknown recipe, and for lists of anything but names of CIFAR nets."""
    if recipe is not None:
        choice("recipe", recipe, RECIPES)
    for field, names in nets.items():
        for name in a_list(field, names):
            NetName.parse(name)


def alike(records, dataset, recipe=None):
    """The records on a data set under one set of conditions: its own recipe or the one given, the most iterations.

    Raises ValueError where there are none, naming the data sets that have records.
    """
    check_name(dataset)
    for _, _, members in by_conditions(records):
        run = members[0].run
        if run.dataset == dataset and recipe in (None, run.recipe):
            return ended(members)[0]
    known = sorted({f"{record.run.dataset}, recipe {record.run.recipe}" for record in records})
    raise ValueError(f"dataset {dataset!r}, recipe {recipe!r}: there are no finished runs, choose {'; '.join(known)}")


def by_net(records, needed=()):
    """The first run of each net, by its name.

    Raises ValueError where one of the ``needed`` nets has none, naming those that have.
    """
    runs = {record.net: record for record in reversed(records)}
    for net in needed:
        if net not in runs:
            raise ValueError(
                f"net {net!r}: there is no finished run of it on {records[0].run.dataset!r}, recipe "
                f"{records[0].run.recipe!r}; there are some of {', '.join(sorted(runs))}"
            )
    return runs


def depth_dial(records, first):
    """Kind, and sliders for depth, seed and progress, with the figure of ``run_until`` below: an ipywidgets box.

    Starts with the record ``first``. Where a kind was not run with some depth and seed, shows the nearest. It needs a
    notebook with a front end; elsewhere, show ``run_until`` of some record.
    """
    import ipywidgets as widgets
    from IPython.display import Image, display

    by_choice = {(_kind(record), record.run.name.depth, record.run.seed): record for record in records}
    kinds, depths, seeds = (sorted(set(values)) for values in zip(*by_choice, strict=True))
    wide = {"layout": widgets.Layout(width="32rem"), "style": {"description_width": "5rem"}}
    labels = [(each.replace("resnet", "ResNet"), each) for each in kinds]
    kind = widgets.Dropdown(options=labels, value=_kind(first), description="kind", **wide)
    depth = widgets.SelectionSlider(options=depths, value=first.run.name.depth, description="layers", **wide)
    seed = widgets.SelectionSlider(options=seeds, value=first.run.seed, description="seed", **wide)
    percent = widgets.SelectionSlider(options=PERCENTS, value=100, description="progress %", **wide)

    def show(percent, **wanted):
        found = nearest(by_choice, **wanted)
        if found != tuple(wanted.values()):
            print(f"Not run. The nearest is: {found[1]} layers, seed {found[2]}.")
        file = io.BytesIO()
        run_until(by_choice[found], percent).savefig(file, format="png", dpi=72)  # in half of the notebook's own time
        display(Image(file.getvalue()))

    output = widgets.interactive_output(show, {"kind": kind, "depth": depth, "seed": seed, "percent": percent})
    return widgets.VBox([kind, depth, seed, percent, output])


def nearest(choices, kind, depth, seed):
    """Of choices (kind, depth, seed), that of this kind with the nearest depth, of several with the nearest seed."""
    return min(
        (choice for choice in choices if choice[0] == kind),
        key=lambda choice: (abs(choice[1] - depth), abs(choice[2] - seed)),
    )


def _kind(record):
    return record.net.replace(f"-{record.run.name.depth}", "")


def at_the_first_drop(record):
    """In a sentence, what the first division of the learning rate does to the training error; from the history."""
    history = record.history
    drops = history.index[history["lr"].diff() < 0]
    if drops.empty:
        return f"{spelled(record.net)}: the learning rate is never divided."
    before, after = history.loc[drops[0] - 1], history.loc[min(drops[0] + 1, history.index[-1])]
    earlier = history[history["iteration"] <= 0.75 * before["iteration"]].iloc[-1]
    errors = [f"{row['train_error']:.1f} % at iteration {row['iteration']:,.0f}" for row in (earlier, before, after)]
    return f"{spelled(record.net)}: training error {errors[0]}, {errors[1]}, then divided: {errors[2]}."


def removable(net):
    """The names of a net's blocks whose input and output have the same shape, so that they can be left out."""
    blocks = {name: block for name, block in net.named_modules() if isinstance(block, BasicBlock | Bottleneck)}
    return [
        name
        for name, block in blocks.items()
        if block.conv1.stride == block.conv2.stride == (1, 1) and block.conv1.in_channels == _width(block)
    ]


def _width(block):
    return block.conv1.out_channels * block.expansion


def without(net, block):
    """A copy of a net with one of its ``removable`` blocks replaced by the identity; ValueError for another name."""
    net = copy.deepcopy(net)
    net.set_submodule(choice("block", block, removable(net)), nn.Identity())
    return net


def swapped(net, one, other):
    """A copy of a net with two of its ``removable`` blocks exchanged; ValueError where their widths differ."""
    net, names = copy.deepcopy(net), removable(net)
    first, second = (net.get_submodule(choice("block", name, names)) for name in (one, other))
    if _width(first) != _width(second):
        widths = f"{_width(first)} and {_width(second)} channels"
        raise ValueError(f"blocks {one!r} and {other!r} have {widths}: exchange blocks of one width")
    net.set_submodule(one, second)
    net.set_submodule(other, first)
    return net


def error_of(net, images, mean):
    """The error in percent of a net on images (``Images``), minus a mean image (H, W, 3)."""
    return evaluate.single_view(net, original_views(images, mean)).error


def lesions(trained, images):
    """The error of a net when each of its blocks is left out, in the order of the blocks: a DataFrame.

    trained: a ``TrainedNet``; images: ``Images`` to test on, such as ``dataset.test``. Columns: block, and error in
    percent; the first row, with block "none", is the whole net.
    """
    rows = [{"block": "none", "error": error_of(trained.net, images, trained.mean)}]
    for name in removable(trained.net):
        rows.append({"block": name, "error": error_of(without(trained.net, name), images, trained.mean)})
    return pd.DataFrame(rows)


def disagreements(one, other):
    """Where two records, tested on the same images, disagree: a DataFrame of image, label and both predictions.

    Raises ValueError for records of different images, or without predictions.
    """
    if one.fingerprint != other.fingerprint or one.predictions.empty or other.predictions.empty:
        raise ValueError(f"{one.run.id} and {other.run.id}: give records of the same images, with their predictions")
    table = one.predictions.rename(columns={"predicted": one.net}).assign(**{other.net: other.predictions["predicted"]})
    table = table[table[one.net] != table[other.net]]
    return table.rename_axis("image").reset_index()
