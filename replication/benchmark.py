"""How fast this machine trains, next to the common loop and its own limit, and how long the paper's protocol takes."""

import statistics
import time

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from PIL import Image

from replication import data as datasets
from replication import paper, sweeps, trainers
from replication.engine import steps
from replication.engine.machine import cores
from replication.engine.progress import in_words
from replication.engine.workers import Workers
from replication.report.comparisons import interval_of_mean
from replication.report.tables import spelled
from replication.runs import PRECISIONS, Run, grid, net_names, whole
from replication.runs.environment import compiles, cost, environment, reproducible, threads_for
from replication.runs.records import ended

SIZE = (32, 32)  # of CIFAR's images
SIZES = {"cifar10": SIZE, "imagenet": (224, 224)}  # of what the paper's protocols train on
TIMED = {"cifar10": ("resnet-20", "resnet-110"), "imagenet": ("resnet-18", "resnet-50")}  # the others follow from these
BATCH = 128  # of the paper, and of the common loop
WARM_UP = 3  # iterations that do not count
COMPARED = ["net", "dataset", "iterations", "error", "seeds", *PRECISIONS, "difference", "low", "high"]
RATIOS = ("ratio", "over_float32")
WORDS = {
    "common": "common loop, images/s",
    "ours": "ours, images/s",
    "ratio": "ours / common loop",
    "over_float32": "ours / ours in float32",
    "limit": "limit of the matrix product, images/s",
    "of_limit": "ours / limit",
    "apart": "a thread each, images/s",
    "together": "one run on all cores, images/s",
    "threads": "threads chosen",
    "speed": "images/s",
    "difference": "bfloat16 less float32, points",
}
SQUARE = 2048  # rows and columns of the matrices whose product sets the limit


def random_images(size, count=512):
    """A data set of random pixels; ``size``: height and width. Training on it is as fast as on a real one."""
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (count, *size, 3), dtype=np.uint8)
    images = datasets.Images(pixels, np.arange(count) % 10)
    return datasets.Dataset("random", tuple("0123456789"), images, images)


def iteration_seconds(run, size, iterations=4, threads=None):
    """Mean seconds of one iteration of a run on random images, batches and update included; nothing is written.

    size: height and width. Of a batch that batch norm sees in parts, one part is timed. ``threads``: as many as the run
    is trained with, if left out.
    """
    part, batch = run.settings.bn_batch, run.settings.batch
    images = random_images(size, max(2 * part, 512) if max(size) <= 64 else part)
    with reproducible(run, size, threads=threads):
        step = trainers.new_step(run, len(images.classes))
        step.begin(size, compiles(run, size))
        batches = images.batches(part, run.seed, step.device)
        untimed = WARM_UP + (steps.EAGER_STEPS if step.capturing else 0)  # a GPU replays a graph from then on
        for iteration in range(untimed + iterations):
            if iteration == untimed:
                step.totals.tolist()  # waits for the device
                started = time.perf_counter()
            step(*batches(iteration), run.settings.lr / 100)
        step.totals.tolist()
        return (time.perf_counter() - started) / iterations * (batch / part)


def common_loop(net, iterations, workers=None):
    """Images per second of the loop that most public replications share, on the same net (a name), 32x32 images.

    float32, channels first, torchvision's PIL transforms in a DataLoader with ``workers`` processes (None: one for each
    core), the loss read back in every iteration.
    """
    from torchvision import transforms

    changes = [transforms.RandomCrop(SIZE, 4), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
    normalize = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    images = random_images(SIZE, BATCH * (WARM_UP + iterations)).train
    loader = torch.utils.data.DataLoader(
        _Pictures(images, transforms.Compose([*changes, normalize])),
        batch_size=BATCH,
        shuffle=True,
        num_workers=cores() if workers is None else workers,
    )
    device = steps.device_of()
    net = Run(net, "cifar10").name.build(classes=10).to(device).train()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.001, momentum=0.9, weight_decay=1e-4)
    for iteration, (inputs, labels) in enumerate(loader):
        inputs, labels = inputs.to(device), labels.to(device)
        loss = F.cross_entropy(net(inputs), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()
        if iteration == WARM_UP - 1:
            started = time.perf_counter()
        ended = time.perf_counter()
    return BATCH * iterations / (ended - started)


class _Pictures(torch.utils.data.Dataset):
    def __init__(self, images, transform):
        self.images, self.transform = images, transform

    def __len__(self):
        return len(self.images.labels)

    def __getitem__(self, index):
        return self.transform(Image.fromarray(self.images.pixels[index])), self.images.labels[index]


def matrix_product(precision, repeats=10):
    """Floating-point operations per second of a product of square matrices: the most that this machine computes."""
    device, kind = steps.device_of(), getattr(torch, precision)
    one, other = (torch.randn(SQUARE, SQUARE, device=device).to(kind) for _ in range(2))
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        (one @ other)[0, 0].item()
        seconds.append(time.perf_counter() - started)
    return 2 * SQUARE**3 / statistics.median(seconds)


def compare(nets, rounds=5, iterations=20, precisions=("float32", "bfloat16"), workers=None):
    """Our training against the common loop, alternating: a row for each net, precision and round.

    Columns: net, precision, round; common, ours: images per second; ratio; over_float32: ours over ours in float32,
    well below 1 where bfloat16 is emulated; limit: the images per second that the matrix product of this precision
    would allow if it were all there is to a step.
    Each side runs in a process of its own, ours as a run is trained, the other as a user would start it; one waits
    while the other is timed. Compiling is not timed.
    Raises ValueError for no round or no iteration.
    """
    for name, value in (("rounds", rounds), ("iterations", iterations)):
        if whole(name, value) < 1:
            raise ValueError(f"{name} {value}: give at least 1")
    rows = []
    limits = {precision: matrix_product(precision) for precision in precisions}
    with Workers(1) as theirs, Workers(1) as ours:
        for net in nets:
            runs = {precision: Run(net, "cifar10", precision=precision) for precision in precisions}
            for run in runs.values():
                ours.submit(iteration_seconds, run, SIZE, 1).result()  # compiles
            operations = 6 * cost(run, SIZE) / BATCH  # two per multiply-add, backward twice as many as forward
            for number in range(rounds):
                common = theirs.submit(common_loop, net, iterations, workers).result()
                speeds = {
                    precision: BATCH / ours.submit(iteration_seconds, run, SIZE, iterations).result()
                    for precision, run in runs.items()
                }
                for precision, speed in speeds.items():
                    row = {"net": net, "precision": precision, "round": number, "common": common, "ours": speed}
                    row |= {"ratio": speed / common, "over_float32": speed / speeds.get("float32", float("nan"))}
                    rows.append(row | {"limit": limits[precision] / operations})
    return pd.DataFrame(rows)


def summarized(rounds):
    """The rounds of ``compare`` as a table of medians, each with the smallest and the largest value."""
    rows = []
    for (net, precision), group in rounds.groupby(["net", "precision"], sort=False):
        row = {"net": net, "precision": precision, "rounds": len(group)}
        for name in ("common", "ours", *RATIOS):
            row |= {name: group[name].median(), f"{name}_min": group[name].min(), f"{name}_max": group[name].max()}
        limit = group["limit"].iloc[0]
        rows.append(row | {"limit": limit, "of_limit": row["ours"] / limit})
    return pd.DataFrame(rows)


def side_by_side(sizes, rounds=3, iterations=10):
    """The speed of all cores together: one single-threaded run per core, or one run on all. A row for each run.

    sizes: height and width of the images, by run. Columns: net, size, precision; apart, together: images per second
    in sum, the median of the rounds; threads: the number that such a run is trained with.
    """
    rows = []
    with Workers(cores()) as pool:
        for run, size in sizes.items():
            found = {"apart": [], "together": []}
            for number in range(rounds + 1):  # the first compiles
                for name, count, threads in (("apart", cores(), 1), ("together", 1, cores())):
                    futures = [
                        pool.submit(iteration_seconds, run, size, iterations if number else 1, threads=threads)
                        for _ in range(count)
                    ]
                    found[name] += [sum(run.settings.batch / future.result() for future in futures)] * (number > 0)
            row = {"net": run.net, "size": f"{size[0]}x{size[1]}", "precision": run.precision}
            row |= {name: statistics.median(values) for name, values in found.items()}
            rows.append(row | {"threads": threads_for(run, size)})
    return pd.DataFrame(rows)


def protocols(precision="float32"):
    """What each notebook trains in the paper's protocol: {notebook: runs}."""
    depths = [20, 32, 44, 56]
    plain, residual = (net_names(kind, depths) for kind in ("plain", "resnet"))
    nets = {
        "0_quickstart": ["plain-20", "plain-44", "resnet-20", "resnet-44"],
        "2_plain_vs_residual": plain + residual,
        "3_cifar_depths": [*residual, "resnet-110", "resnet-1202"],
        "4_shortcuts": ["plain-56", "resnet-56-A", "resnet-56-B", "resnet-56-C"],
        "5_layer_responses": list(paper.FIGURE_7),
        "6_imagenet": list(paper.IMAGENET_NETS),
    }
    seeds = {"4_shortcuts": [0, 1, 2]}
    sets = {"6_imagenet": "imagenet"}
    return {
        name: grid(members, sets.get(name, "cifar10"), seeds.get(name, [0]), precision=precision)
        for name, members in nets.items()
    }


def planned(notebooks, precision="float32"):
    """The ``protocols`` of the notebooks of these numbers, as [0, 2].

    Raises TypeError or ValueError for no list, for one that trains nothing and for an unknown precision.
    """
    numbered = {int(name[0]): (name, runs) for name, runs in protocols(precision).items()}
    if not isinstance(notebooks, list | tuple):
        raise TypeError(f"notebooks {notebooks!r}: give a list of numbers, such as [0, 2]")
    for number in notebooks:
        if isinstance(number, bool) or not isinstance(number, int) or number not in numbered:
            raise ValueError(f"notebook {number!r}: choose {', '.join(map(str, numbered))}")
    return dict(numbered[number] for number in notebooks)


def measure(planned):
    """Seconds of an iteration of the nets in ``TIMED`` whose data set is planned, on random images: {run: seconds}."""
    every = _every(planned)
    names = dict.fromkeys((run.dataset, run.precision) for run in every)
    runs = [Run(net, dataset, precision=precision) for dataset, precision in names for net in TIMED[dataset]]
    with Workers(1) as pool:
        return {run: pool.submit(iteration_seconds, run, SIZES[run.dataset]).result() for run in runs}


def _every(planned):
    return list(dict.fromkeys(run for runs in planned.values() for run in runs))


def _predicted(run, measured):
    """Seconds of an iteration: on the line through those measured on the same images, over their multiply-adds."""
    timed = {cost(each, SIZES[each.dataset]): measured[each] for each in measured if each.dataset == run.dataset}
    (low, fast), (high, slow) = sorted(timed.items())
    slope = max((slow - fast) / (high - low), 0.5 * fast / low)  # despite noise, more layers take longer
    return measured.get(run, fast + slope * (cost(run, SIZES[run.dataset]) - low))


def net_times(planned, measured):
    """A row for each net and data set: images per second, and the seconds of one run by the paper's protocol.

    ``how``: whether it was "measured", or "computed" from what was, by the multiply-adds. Tests on the way are not
    counted, and photographs are neither read nor decoded: where that takes longer than training on them, so will the
    training.
    """
    rows = {}
    for run in _every(planned):
        each = _predicted(run, measured)
        row = {"net": run.net, "dataset": run.dataset, "speed": run.settings.batch / each}
        row |= {"how": "measured" if run in measured else "computed", "seconds": each * run.settings.iterations}
        rows.setdefault((run.net, run.dataset), row)
    return pd.DataFrame(rows.values(), columns=["net", "dataset", "speed", "how", "seconds"])


def protocol_times(planned, measured):
    """What the protocols take on this machine, one after the other: a table of notebook, runs, iterations, seconds."""
    rows = []
    for name, runs in planned.items():
        iterations = sum(run.settings.iterations for run in runs)
        seconds = sum(_predicted(run, measured) * run.settings.iterations for run in runs)
        lanes = sweeps.lanes_for(runs, SIZES)
        rows.append({"notebook": name, "runs": len(runs), "iterations": iterations, "seconds": seconds / lanes})
    return pd.DataFrame(rows, columns=["notebook", "runs", "iterations", "seconds"])


def machine():
    """This machine in words: its processor or GPU, its cores, and the version of torch."""
    found = environment(steps.device_of())
    device = found["processor"] if found["device"] == "cpu" else found["device"]
    return f"{device}, {found['cores']} cores, torch {found['torch']}"


def precisions(records):
    """Errors in bfloat16 against float32, seed by seed: a row for each net and error with runs of equal seeds in both.

    Columns: net, dataset, iterations, error ("train" or "test"), seeds; float32, bfloat16: means in percent;
    difference: the mean of bfloat16's less float32's, in points, with its 95 % confidence interval from low to high.
    """
    found = {}
    for record in ended(records)[0]:
        run = record.run
        alike = tuple(value for name, value in record.conditions.items() if name != "precision")
        key = (record.net, run.dataset, record.summary["iterations"], alike)
        found.setdefault(key, {}).setdefault(run.seed, {})[run.precision] = record.summary
    rows = []
    for (net, dataset, iterations, _), by_seed in found.items():
        pairs = [each for each in by_seed.values() if len(each) == 2]
        for error in ("train", "test") if pairs else ():
            values = pd.DataFrame([{name: each[name][f"{error}_error"] for name in each} for each in pairs])
            low, high = interval_of_mean(values["bfloat16"] - values["float32"])
            row = {"net": net, "dataset": dataset, "iterations": iterations, "error": error, "seeds": len(pairs)}
            row |= {"float32": values["float32"].mean(), "bfloat16": values["bfloat16"].mean()}
            rows.append(row | {"difference": row["bfloat16"] - row["float32"], "low": low, "high": high})
    return pd.DataFrame(rows, columns=COMPARED)


def readable(table):
    """Any table of this module as text; medians with their smallest and largest value."""
    shown = {}
    for name in table:
        if name.endswith(("_min", "_max")) or name in ("low", "high"):
            continue
        values = table[name]
        if f"{name}_min" in table:
            digits = 2 if name in RATIOS else 0
            ends = zip(values, table[f"{name}_min"], table[f"{name}_max"], strict=True)
            shown[WORDS[name]] = [f"{a:,.{digits}f} ({b:,.{digits}f} to {c:,.{digits}f})" for a, b, c in ends]
        elif name == "difference":
            ends = zip(values, table["low"], table["high"], strict=True)
            shown[WORDS[name]] = [f"{a:+.2f} ({b:+.2f} to {c:+.2f})" for a, b, c in ends]
        elif name == "seconds":
            shown["time"] = [in_words(value) for value in values]
        elif name == "of_limit":
            shown[WORDS[name]] = [f"{100 * value:.0f} %" for value in values]
        elif name in PRECISIONS:
            shown[f"{name}: error %"] = [f"{value:.2f}" for value in values]
        elif pd.api.types.is_numeric_dtype(values):
            shown[WORDS.get(name, name)] = [f"{value:,.0f}" for value in values]
        else:
            shown[WORDS.get(name, name)] = list(map(spelled, values))
    return pd.DataFrame(shown)
