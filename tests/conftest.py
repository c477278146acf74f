import functools
import json
import os
import shutil
import subprocess
from concurrent.futures import Executor, Future
from pathlib import Path

# Before torch is loaded: tests run side by side, and threads that spin while they wait take half of the others' time.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

from replication import Run, finished, measure  # first: it declares ops that torchvision may miss
from replication.detection import DetectorName
from replication.runs import records

matplotlib.use("agg")
ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def nothing_is_published(monkeypatch):
    """Tests train what they ask for; the published records have tests of their own."""
    monkeypatch.setattr(records, "PUBLISHED", None)


class Here(Executor):
    """Calls in this process, at once: no time is lost in starting another."""

    def submit(self, function, /, *arguments, **options):
        future = Future()
        try:
            future.set_result(function(*arguments, **options))
        except Exception as error:
            future.set_exception(error)
        return future


def processes_of(session):
    """The processes that are left of a session, by number."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, theirs = path.read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue  # it has ended meanwhile
        if int(theirs) == session and state != "Z":
            found.append(int(path.parent.name))
    return found


@pytest.fixture
def committed(tmp_path):
    """A folder with README.md, docs/ and results/ as they are in git, without what was run here; all without git."""
    if (ROOT / ".git").exists():
        listed = subprocess.run(
            ["git", "ls-files", "-z", "results", "docs", "README.md"], cwd=ROOT, capture_output=True, check=True
        )
        command = ["git", "checkout-index", f"--prefix={tmp_path}/", "-z", "--stdin"]
        subprocess.run(command, cwd=ROOT, input=listed.stdout, check=True)
    else:
        shutil.copytree(ROOT / "results", tmp_path / "results", ignore=shutil.ignore_patterns("*.pt", "damaged"))
        shutil.copytree(ROOT / "docs", tmp_path / "docs")
        shutil.copy(ROOT / "README.md", tmp_path)
    return tmp_path


def write_images(folder, classes=("cat", "dog"), train=6, test=3, side=8, seed=0):
    """A folder of small random PNG images in the layout of a data set; returns its pixels by part and file."""
    generator = np.random.default_rng(seed)
    pixels = {}
    for part, count in (("train", train), ("test", test)):
        for name in classes:
            (folder / part / name).mkdir(parents=True)
            for number in range(count):
                path = folder / part / name / f"{number}.png"
                pixels[path] = generator.integers(0, 256, (side, side, 3), dtype=np.uint8)
                Image.fromarray(pixels[path]).save(path)
    return pixels


@pytest.fixture
def pets(tmp_path):
    """A data folder with the data set "pets": two classes of 8x8 images."""
    write_images(tmp_path / "data" / "pets")
    return tmp_path / "data"


def write_photographs(
    folder, classes=3, train=5, val=2, seed=0, sizes=((300, 260), (240, 330), (500, 375), (700, 620))
):
    """A folder of JPEG files in ImageNet's layout, of several sizes; in each class one is grey and one CMYK."""
    generator = np.random.default_rng(seed)
    for part, count in (("train", train), ("val", val)):
        for place in range(classes):
            target = folder / part / f"n{classes - place:08}"
            target.mkdir(parents=True)
            for number in range(count):
                width, height = sizes[(number + place) % len(sizes)]
                rough = generator.integers(0, 256, (6, 7, 3), dtype=np.uint8)  # smooth, so that JPEG keeps it
                image = Image.fromarray(rough).resize((width, height), Image.Resampling.BICUBIC)
                image.convert({0: "L", 1: "CMYK"}.get(number, "RGB")).save(target / f"{number}.JPEG", quality=95)


@pytest.fixture
def photographs(tmp_path):
    """A data folder with the data set "imagenet-small": three classes of photographs."""
    write_photographs(tmp_path / "data" / "imagenet-small")
    return tmp_path / "data"


@functools.cache
def counted(name):
    """Parameters and multiply-adds of a net."""
    with torch.device("meta"):
        net = name.build(10)
    if isinstance(name, DetectorName):
        return {"parameters": measure.parameters(net), "multiply_adds": name.multiply_adds()}
    size = 224 if name.imagenet else 32
    return {"parameters": measure.parameters(net), "multiply_adds": measure.multiply_adds(net, size)}


@pytest.fixture
def make(tmp_path):
    """Writes the record of a run whose errors are given, and ``more`` for its summary, without training it."""

    def write(
        train_error,
        test_error,
        layers=None,
        predicted=None,
        rates=(0.1,) * 10,
        diverged=None,
        fingerprint=None,
        more=None,
        **fields,
    ):
        run = Run(**fields)
        # CIFAR-10's is that of the published files, over classes, pixels and labels.
        original = "f68bb3dbbcc03c71a1f0ab9956e7fca99aa0acbc9a8f25c2a756622e984c9759"
        fingerprint = fingerprint or (original if run.dataset == "cifar10" else "f")
        folder = run.folder(tmp_path)
        folder.mkdir(parents=True)
        (folder / "run.json").write_text(records.run_text(run, fingerprint))
        last = run.settings.iterations
        history = [
            {"iteration": round(part * last / 10), "lr": rates[part - 1], "seconds": float(part)}
            | {"train_error": train_error + 10 - part, "train_loss": 0.5}
            | {"test_error": test_error + 10 - part if part % 2 == 0 else None, "test_loss": 0.5}
            for part in range(1, 11)
        ]
        (folder / "history.csv").write_text(records.rows_text(history))
        if layers is not None:
            (folder / "layers.csv").write_text(records.rows_text(layers, (), digits=6))
        if predicted is not None:
            rows = [{"label": 0, "predicted": guess} for guess in predicted]
            (folder / "predictions.csv").write_text(records.rows_text(rows, ()))
        environment = {"device": "cpu", "processor": "a processor", "cores": 2, "threads": 1}
        (folder / "environment.json").write_text(json.dumps(environment))
        summary = {"train_error": train_error, "test_error": test_error, "iterations": last, "seconds": 60.0}
        summary |= counted(run.name) | (more or {})
        if diverged is not None:
            summary |= {"train_error": None, "test_error": None, "diverged": diverged}
        records.write_summary(folder, summary)
        return finished(run, tmp_path)

    return write


def pytest_addoption(parser):
    parser.addoption("--kills", type=int, default=4, help="how often test_kills.py kills training")
    parser.addoption("--long", action="store_true", help="run what is left out for its time, too")


SLOW = ("test_notebooks", "test_kills", "test_clusters", "test_processes", "test_sweeps", "test_steps", "test_trainers")


def pytest_collection_modifyitems(config, items):
    """Leave out long tests unless asked for; begin each half with slow ones, so that no process waits for another."""
    if not config.getoption("--long"):
        long = [item for item in items if item.get_closest_marker("long")]
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if item not in long]
    slow = [item for item in items if item.path.stem in SLOW]
    fast = [item for item in items if item.path.stem not in SLOW]
    items[:] = slow[::2] + fast[::2] + slow[1::2] + fast[1::2]
