"""How long runs will take: a few iterations of some of them are measured, the rest follows from their multiply-adds."""

import time

import numpy as np
import torch

from replication import data as datasets
from replication import trainers
from replication.engine import steps

WARM_UP = 2  # iterations before the measured ones; on a GPU as many more as are not yet replayed
MEASURED = 4  # iterations
DEAREST = 1.5e11  # multiply-adds of a forward pass: what costs more is not measured but computed from what costs less


def random_images(size, count=512):
    """A data set of random pixels, height and width in ``size``: as fast or slow as a real one."""
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (count, *size, 3), dtype=np.uint8)
    images = datasets.Images(pixels, np.arange(count) % 10)
    return datasets.Dataset("random", tuple("0123456789"), images, images)


def iteration_seconds(run, size, iterations=MEASURED, processes=1, threads=None):
    """Mean seconds of one iteration of a run on random images, batches and update included, nothing written.

    size: height and width. Of a batch that is trained in groups one group is measured. ``processes`` that would share
    the batch are counted as so many times faster. ``threads``: as many as the run is trained with, if left out.
    """
    group, batch = run.settings.bn_batch, run.settings.batch
    images = random_images(size, max(2 * group, 512) if max(size) <= 64 else group)
    with trainers.computing(run, size, processes, threads):
        step = trainers.new_step(run, len(images.classes))
        step.begin(size, trainers.compiles(run, size, processes))
        batches = images.batches(group, run.seed, step.device)
        warm_up = WARM_UP + (steps.EAGER_STEPS if step.capturing else 0)
        for iteration in range(warm_up + iterations):
            if iteration == warm_up:
                step.totals.tolist()  # waits for the device
                started = time.perf_counter()
            step(*batches(iteration), run.settings.lr / 100)
        step.totals.tolist()
        each = (time.perf_counter() - started) / iterations
        del step, batches
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # for the processes that train
    return each * (batch / group) / processes


def seconds(executor, runs, sizes, test_images, lanes=1, processes=1, begun=None):
    """Seconds that runs will take on ``lanes`` workers of an executor, measured on it.

    sizes, test_images: height and width of the images and the number of those to be tested, by data set.
    begun: the iterations that are done already, by run.
    """
    return total(runs, runs, sizes, test_images, measure(executor, runs, sizes, processes), lanes, begun)


def measure(executor, runs, sizes, processes=1):
    """Seconds of an iteration of those of the runs that are measured, by run."""
    futures = {
        run: executor.submit(iteration_seconds, run, sizes[run.dataset], processes=processes)
        for run in chosen(runs, sizes)
    }
    return {run: future.result() for run, future in futures.items()}


def total(runs, every, sizes, test_images, measured, lanes=1, begun=None):
    """Seconds that ``runs`` take on so many workers, after what was measured of ``every`` run, these among them."""
    each, needed = predicted(every, sizes, measured), []
    for run in runs:
        images = test_images[run.dataset]
        _, tests, _ = trainers.recording_points(run.settings, images)
        # A test passes forward alone, a third of the work of training.
        iterations = run.settings.iterations + len(tests) * images / run.settings.batch / 3
        left = 1 - (begun or {}).get(run, 0) / run.settings.iterations
        needed.append(each[run] * iterations * left)
    return longest_lane(needed, lanes)


def _costs(runs, sizes):
    """Multiply-adds of a forward pass, by run."""
    return {run: trainers.cost(run, sizes[run.dataset]) for run in runs}


def _kinds(runs):
    """Runs whose times grow alike with their multiply-adds: those on the same images in the same way."""
    kinds = {}
    for run in runs:
        kinds.setdefault((run.dataset, run.precision, run.settings.bn_batch, run.settings.batch), []).append(run)
    return list(kinds.values())


def chosen(runs, sizes):
    """The runs that are measured: of each kind the one whose iterations cost least, and the one where they cost most.

    What costs more than ``DEAREST`` is not measured, and of very short runs only one: they are over before another is.
    """
    costs, found = _costs(runs, sizes), []
    for members in _kinds(runs):
        in_order = sorted(members, key=costs.get)
        affordable = [run for run in in_order if _measured_at_once(run, costs) <= DEAREST] or in_order[:1]
        first, last = affordable[0], affordable[-1]
        one = costs[first] == costs[last] or last.settings.iterations < 10 * MEASURED
        found += [first] if one else [first, last]
    return found


def _measured_at_once(run, costs):
    return costs[run] * run.settings.bn_batch / run.settings.batch


def predicted(runs, sizes, measured):
    """Seconds of an iteration, by run: on the line through what was measured of its kind, over the multiply-adds."""
    costs, found = _costs(runs, sizes), {}
    for members in _kinds(runs):  # a net that is not compiled, of 1202 layers, takes longer than this says
        known = sorted((costs[run], measured[run]) for run in members if run in measured)
        (low, fast), (high, slow) = known[0], known[-1]
        slope = (slow - fast) / (high - low) if high > low else fast / low
        slope = max(slope, 0.5 * fast / low)  # whatever noise made of it: more layers take longer
        for run in members:
            found[run] = measured.get(run, fast + slope * (costs[run] - low))
    return found


def longest_lane(needed, lanes):
    """When the last of several workers is through, if each takes the longest task that is left: in the tasks' unit."""
    busy = [0.0] * lanes
    for each in sorted(needed, reverse=True):
        busy[busy.index(min(busy))] += each
    return max(busy)


def in_words(seconds):
    """A time for the eye: "40 s", "12 min", "3.5 hours", "2.1 days", "1.4 years"."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    for unit, length, limit in (("min", 60, 100), ("hours", 3600, 48), ("days", 86_400, 500)):
        if seconds < limit * length:
            return f"{seconds / length:.{0 if seconds >= 10 * length else 1}f} {unit}"
    return f"{seconds / 31_557_600:.1f} years"
