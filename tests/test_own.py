"""Nets and recipes of one's own: named by their source and fields, trained and reported as the paper's."""

import importlib
import json
import math
import pickle
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, Here
from test_trainers import assert_same, without_time

from replication import (
    Run,
    all_finished,
    benchmark,
    finished,
    grid,
    measure,
    models,
    pretrained,
    report,
    run_all,
    trainers,
)
from replication.__main__ import main
from replication.engine import checkpoint, steps
from replication.parameters import start_notebook
from replication.recipes import RECIPES, Plateau, Recipe, Warmup
from replication.report import layers, page
from replication.runs import NAMED, recorder, records

SHORT = 0.01  # 11 iterations on digits
NETS = """
import torch
from torch import nn


def pooled(width, classes, *between):
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes)
    return nn.Sequential(nn.Conv2d(3, width, 3, 2), *between, *head)

def tiny(classes):
    return pooled(4, classes, nn.BatchNorm2d(4), nn.Dropout(0.5))

def without_norm(classes):
    return pooled(4, classes, nn.ReLU())

class Values(nn.Module):
    "A net whose path depends on values, and whose weights are no layers."
    def __init__(self, classes):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, classes))
    def forward(self, x):
        return (x.abs() if x.mean().item() > 0 else x).mean((2, 3)) @ self.weight

class Unused(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.conv1, self.frozen, self.body = nn.Conv2d(3, 3, 3), nn.Linear(2, 2), tiny(classes)
        self.frozen.requires_grad_(False)
    def forward(self, x):
        return self.body(x)

def three(classes): return 3
def bare(classes): return nn.Flatten()
def five(classes): return pooled(4, 5)
def flat(classes): return nn.Sequential(nn.Conv2d(3, classes, 1))
def pair(classes): return Pair()
def ten_by_ten(classes): return nn.Sequential(nn.Conv2d(3, 4, 10), nn.Flatten(), nn.Linear(4, classes))
def nothing(): return tiny(10)
def broken(classes): return [][classes]
def single(classes): return nn.Sequential(nn.Conv2d(3, 4, 8), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, classes))
class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = tiny(10)
    def forward(self, x):
        return (self.net(x), 0) if self.training else self.net(x)
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes a module into a folder on Python's path."""
    folder = tmp_path / "code"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    written = []

    def write(text=NETS, name="nets"):
        (folder / f"{name}.py").write_text(text)
        written.append(name)
        return folder / f"{name}.py"

    yield write
    for name in written:
        sys.modules.pop(name, None)


@pytest.fixture
def results(tmp_path):
    return tmp_path / "results"


def test_a_net_is_named_by_its_function_and_a_digest_of_its_file(write):
    path = write()
    run, nets = Run("nets:tiny"), importlib.import_module("nets")
    assert re.fullmatch(r"nets\.tiny-[0-9a-f]{8}__digits__seed-0", run.id)
    assert run.name.depth == 2
    assert Run(nets.tiny) == Run("nets:tiny") == Run(run.net) == replace(run) == pickle.loads(pickle.dumps(run))
    assert Run("nets:Values").name.depth == 0
    assert len({Run(net).id for net in ("nets:tiny", "nets:without_norm", nets.Unused)}) == 3
    changed = [NETS + "\n", NETS.replace("Dropout(0.5)", "Dropout(0.6)"), "# ä\n" + NETS]
    for text in changed:  # also within a second, and as long as before
        path.write_text(text, "utf-8")
        assert Run("nets:tiny").id != run.id
    path.write_bytes(NETS.replace("\n", "\r\n").encode())  # as git may check it out
    assert Run("nets:tiny") == run
    write(NETS, "others")
    assert Run("others:tiny").id.split("-")[1] != run.id.split("-")[1]


def test_the_net_that_is_built_is_that_of_the_file_even_where_an_older_one_is_imported(write):
    path = write()
    importlib.import_module("nets")
    path.write_text(
        NETS.replace("pooled(4, classes, nn.B", "pooled(8, classes, nn.B").replace("Norm2d(4)", "Norm2d(8)")
    )
    assert Run("nets:tiny").name.build(10)[0].out_channels == 8


@pytest.mark.parametrize(
    ("text", "depth"),
    [
        ("from replication.models import cifar_net\ndef net(classes): return cifar_net(20, True, 'B', classes)", 20),
        ("from replication.models import imagenet_net\ndef net(classes): return imagenet_net(50, classes=classes)", 50),
        ("from torch.nn import *\ndef net(c): return Sequential(Flatten(), LazyLinear(9), Linear(9, c))", 2),
        ("from torch import nn, linspace\ndef net(c): return nn.Linear(*linspace(3, c, 2).int().tolist())", 1),
        (
            "from __future__ import annotations\nfrom dataclasses import dataclass\nfrom torch import nn\n"
            "@dataclass\nclass Sizes:\n  width: int = 3\ndef net(c): return nn.Conv2d(Sizes().width, c, 1)",
            1,
        ),
    ],
    ids=["projections", "bottlenecks", "lazy", "of values", "dataclass"],
)
def test_the_depth_leaves_out_shortcuts_and_decides_about_the_warm_up(write, text, depth):
    write(text)
    assert Run("nets:net").name.depth == depth
    for least in (depth, depth + 1):
        recipe = Recipe(10, 16, warmup=Warmup(0.01, 80, least))
        run, cold = (Run("nets:net", recipe=recipe, warmup=warmup) for warmup in (True, False))
        assert run.settings.learning_rate(0) == (0.01 if least == depth else 0.1)
        assert (run == cold) == (least > depth)


@pytest.mark.parametrize(
    ("net", "error", "message"),
    [
        ("wide-20", ValueError, "choose <module>:<function> for a net of your own, plain-<depth>"),
        ("nets:missing", ValueError, r"nets.py has no function 'missing'"),
        ("no_such:net", ValueError, "there is no module 'no_such' with a source file, neither in"),
        ("no.such:net", ValueError, "no module 'no.such'"),
        ("nets.py:tiny", ValueError, "no module 'nets.py'"),
        ("math:sqrt", ValueError, "no module 'math' with a source file"),
        ("folder/nets.py:tiny", ValueError, "give '<module>:<function>', as 'nets:preact' for preact in nets.py"),
        (":", ValueError, "give '<module>:<function>'"),
        ("nets:Pair.forward", ValueError, "give '<module>:<function>'"),
        ("nets:été", ValueError, "give '<module>:<function>'"),
        ("__main__:net", ValueError, "no module '__main__'.*put it into a file of its own beside the notebook"),
        ("nets:three", TypeError, r"three\(10\) gives int, not a torch.nn.Module"),
        ("nets:bare", ValueError, "it has no parameters to train"),
        ("nets:nothing", ValueError, r"nothing\(10\), for 10 classes, fails: TypeError: nothing\(\) takes 0"),
        ("nets:broken", ValueError, r"fails: IndexError: list index out of range \(.*nets.py, line \d+\)"),
        ("syntax:net", ValueError, r"'syntax' cannot be imported: SyntaxError: .*\(syntax.py, line 2\)"),
        ("raising:net", ValueError, r"'raising' cannot be imported: KeyError: 'x' \(.*raising.py, line 1\)"),
        (
            "itself:net",
            ValueError,
            "'itself' cannot be imported: ValueError: .* makes this run while it is imported: put",
        ),
        (lambda classes: None, ValueError, "'<lambda>' of test_own|<lambda>' of .*put it into a file of its own"),
        (torch.nn.Linear(3, 3), TypeError, "net of type Linear: give the function that builds it"),
        (torch.nn.Linear(3, 3).forward, ValueError, "workers cannot import this function: put it into a file"),
        (print, ValueError, "no module 'builtins' with a source file"),
    ],
)
def test_what_is_no_net_is_refused_by_name_at_once(write, net, error, message):
    write()
    write("def net(classes):\n    return (", "syntax")
    write("{}['x']", "raising")
    write("from replication import Run\nRun('itself:net')", "itself")
    with pytest.raises(error, match=message) as caught:
        Run(net)
    assert str(caught.value).startswith("net ")
    assert not {"syntax", "raising", "itself"} & set(sys.modules)


def test_functions_that_workers_cannot_import_are_refused(write):
    def within(classes):
        return None

    there = type(within)(within.__code__, {"__name__": "__main__"}, "there")
    there.__module__, there.__qualname__ = "__main__", "there"
    for function in (within, there):
        with pytest.raises(ValueError, match="workers cannot import this function: put it into a file of its own"):
            Run(function)


@pytest.mark.parametrize(
    ("net", "options", "message"),
    [
        ("nets:five", {}, r"for 2 images of 8x8 it gives \(2, 5\), not \(2, 10\), a number for each of 10 classes"),
        ("nets:flat", {}, r"it gives \(2, 10, 8, 8\), not \(2, 10\)"),
        ("nets:pair", {}, "it gives tuple, not"),
        ("nets:ten_by_ten", {}, "2 images of 8x8 do not pass through it: RuntimeError"),
        (
            "nets:single",
            {"bn_batch": 1},
            "1 images of 8x8 do not pass through it: ValueError: Expected more than 1 value",
        ),
    ],
)
def test_a_net_that_does_not_fit_the_images_is_refused_before_anything_is_written(
    write, results, net, options, message
):
    write()
    run = Run(net, **options)
    for train in (lambda: run_all([run], results), lambda: trainers.train(run, results)):
        with pytest.raises(ValueError, match=f"^net '{net}': .*{message}"):
            train()
    assert not results.exists()


@pytest.mark.parametrize("net", ["tiny", "without_norm", "Values", "Unused"])
@pytest.mark.parametrize("options", [{}, {"bn_batch": 64, "precision": "bfloat16", "holdout": 100}], ids=["", "parts"])
def test_nets_of_any_kind_train_and_leave_records(write, results, net, options):
    write()
    state = torch.get_rng_state()
    run = Run(f"nets:{net}", schedule=SHORT, **options)
    record = trainers.train(run, results)
    assert torch.equal(torch.get_rng_state(), state)
    built = run.name.build(10)
    assert record.summary["parameters"] == sum(parameter.numel() for parameter in built.parameters())
    assert len(record.predictions) == 360
    assert all_finished(results)[0].run == run
    if net == "Values":
        assert record.layers.empty
        assert not (record.folder / "layers.csv").exists()
        assert any(note.startswith("no layers.csv: the net has no convolutions") for note in record.summary["notes"])
        with pytest.raises(ValueError, match=r"or a net without 3x3 layers; remove its folder .* or leave it out"):
            layers.table([record])
        return
    start = record.layers[record.layers["iteration"] == 0]
    assert len(start) == run.name.depth - (net == "Unused")  # a frozen layer has no row
    assert start["gradient_norm"].count() == 2
    assert start["response_std"].count() == 0
    assert layers.table([record])["n"].tolist() == [1]
    for draw in (layers.figure_7, layers.gradients, layers.signals):
        draw([record])
    assert layers.residuals([record]) is None
    # 3x3 maps of 4 channels from 3x3 kernels over 3 channels, and the classifier.
    assert record.summary["multiply_adds"] == 9 * 4 * 27 + 40


def test_multiply_adds_are_counted_where_the_path_depends_on_values(write):
    write()
    assert measure.multiply_adds(Run("nets:Values").name.build(10), 8) == 30  # 3 channels, 10 classes


def test_the_papers_net_in_a_file_of_ones_own_trains_as_the_papers(write, results):
    write("from replication.models import cifar_net\ndef net(classes): return cifar_net(8, classes=classes)")
    ours, theirs = (trainers.train(Run(net, schedule=SHORT), results) for net in ("nets:net", "resnet-8"))
    assert_same(ours, theirs)  # layers.csv too


def test_a_net_that_normalizes_first_has_no_responses(write):
    write((ROOT / "docs" / "own_nets.md").read_text().split("```python\n")[1].split("```")[0], "preact")
    net = Run("preact:preact_20").name.build(10)
    rows = measure.signals(net, torch.randn(8, 3, 8, 8), torch.arange(8))
    assert len(rows) == 20
    assert all(row["response_std"] is None is row["residual_ratio"] for row in rows)
    assert all(row["gradient_norm"] > 0 < row["weight_norm"] for row in rows)


def test_running_statistics_of_all_kinds_of_batch_norm_are_averaged():
    net = torch.nn.Sequential(
        torch.nn.BatchNorm1d(3), torch.nn.BatchNorm2d(3, track_running_stats=False), torch.nn.BatchNorm2d(5)
    )
    assert steps.flatten_running_stats(net).numel() == 2 * (3 + 5)
    assert steps.flatten_running_stats(torch.nn.Linear(2, 2)).numel() == 0


class StopError(Exception):
    pass


def test_what_draws_at_random_resumes_to_the_last_bit(write, results, tmp_path, monkeypatch):
    write()
    run = Run("nets:tiny", schedule=SHORT, seed=3)
    whole = trainers.train(run, results)
    add_row = recorder.Recorder.add_row

    def stop(self, *arguments):
        add_row(self, *arguments)
        if self.state.iteration == 6:
            self.save_checkpoint()
            raise StopError

    with monkeypatch.context() as patch:
        patch.setattr(recorder.Recorder, "add_row", stop)
        with pytest.raises(StopError):
            trainers.train(run, tmp_path / "resumed")
    torch.manual_seed(99)
    torch.rand(7)
    assert_same(trainers.train(run, tmp_path / "resumed"), whole)


def test_a_checkpoint_of_another_source_is_refused(write, results, monkeypatch):
    path = write()
    run = Run("nets:tiny", schedule=SHORT)
    path.write_text(NETS + "# changed\n")
    changed = Run("nets:tiny", schedule=SHORT)
    run.folder(results).mkdir(parents=True)
    checkpoint.save(run.folder(results), records.origin(run, "f"), {"iteration": 3})
    checkpoint.load(run.folder(results), records.origin(run, "f"))
    with pytest.raises(ValueError, match="was made for another run"):
        checkpoint.load(run.folder(results), records.origin(changed, "f"))


@pytest.mark.long
def test_a_record_loads_without_its_source_and_a_changed_one_is_another_run(write, results, capsys):
    path = write()
    run = Run("nets:tiny", schedule=SHORT, recipe=Recipe(1_100, 64, warmup=Warmup(0.01, 80, 2)))
    (before,) = run_all([run], results)
    path.write_text(NETS.replace("Dropout(0.5)", "Dropout(0.6)"))
    again = replace(Run("nets:tiny"), schedule=SHORT, recipe=run.recipe)
    (after,) = run_all([again], results, executor=Here())
    assert (before.run.id, before.net) != (after.run.id, after.net)
    assert run_all([run], results)[0].summary == before.summary
    path.unlink()
    sys.modules.pop("nets")
    both = all_finished(results)
    assert {record.run for record in both} == {run, again}
    assert set(report.errors(both)["net"]) == {before.net, after.net}
    assert finished(run, results).run.settings.warmup == run.recipe.warmup
    with pytest.raises(ValueError, match="there is no module 'nets' with a source file"):
        run_all([replace(run, seed=1)], results)
    write(NETS + "# changed")
    with pytest.raises(
        ValueError, match="is not as it was when this run was made: bring that back, or make the run again"
    ):
        run_all([replace(run, seed=1)], results)
    assert len(list((results / "runs").iterdir())) == 2
    assert capsys.readouterr().err.count("Traceback") == 0


@pytest.mark.long
def test_several_processes_and_workers_import_the_module(write, results, tmp_path):
    write()
    run = Run("nets:without_norm", schedule=SHORT, bn_batch=64, recipe=Recipe(1_000, 128, milestones=(500,)))
    together = trainers.train(run, results, processes=2)
    (alone,) = run_all([run], tmp_path / "alone")
    assert together.environment["processes"] == 2
    assert without_time(together)["train_loss"].to_numpy() == pytest.approx(without_time(alone)["train_loss"], rel=1e-4)


ELSEWHERE = """
import pickle, sys
from replication import clusters
try:
    clusters.train_elsewhere(pickle.loads(sys.stdin.buffer.read()), "data")
except ValueError as error:
    print(error)
"""


@pytest.mark.long
def test_a_worker_without_the_module_says_so(write, tmp_path):
    write()
    run = Run("nets:tiny", schedule=SHORT)
    command = [sys.executable, "-c", ELSEWHERE]
    done = subprocess.run(command, input=pickle.dumps(run), cwd=tmp_path, capture_output=True, check=True)
    assert b"there is no module 'nets' with a source file, neither in" in done.stdout
    assert b"workers on other machines need it too" in done.stdout
    (tmp_path / "nets.py").write_text("another")
    done = subprocess.run(command, input=pickle.dumps(run), cwd=tmp_path, capture_output=True, check=True)
    assert b"is not as it was when this run was made" in done.stdout


def test_the_command_line_takes_a_net_of_ones_own(write, results, monkeypatch, capsys):
    write()
    monkeypatch.setattr(sys, "argv", ["replication", "nets:tiny", f"--schedule={SHORT}", f"--results={results}"])
    main()
    assert finished(Run("nets:tiny", schedule=SHORT), results).summary["iterations"] == 11
    monkeypatch.setattr(sys, "argv", ["replication", "nets:three", f"--results={results}"])
    with pytest.raises(SystemExit):
        main()
    assert "error: net 'nets:three': three(10) gives int" in capsys.readouterr().err


def test_a_notebook_imports_files_beside_it_after_it_has_moved_to_the_root(tmp_path, monkeypatch):
    (tmp_path / "beside_it.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    start_notebook({})
    assert Run("beside_it:tiny").name.depth == 2
    del sys.modules["beside_it"]


def test_own_nets_and_recipes_are_reported_but_take_part_in_no_claim(make, write):
    write("from replication.models import cifar_net\ndef plain(classes): return cifar_net(20, False, classes=classes)")
    mine = Recipe(1_000, 64)
    members = [make(3, 4, net=net, seed=seed, recipe=mine) for net in ("nets:plain", "plain-20") for seed in (0, 1)]
    table = report.errors(members)
    label, recipe = Run("nets:plain").name.label, Run("plain-20", recipe=mine).recipe_name
    assert table["net"].tolist() == [label, "plain-20"]
    assert table["n"].tolist() == [2, 2]
    assert table["paper_error"].isna().all()
    words = f"digits, recipe {recipe}, 1,000 iterations, float32, batch norm over 64"
    assert [full for _, full, _ in records.by_conditions(members)] == [words]
    assert words in report.caution(table)
    card = report.scorecard(members)
    assert set(card["verdict"]) == {"not attempted"}
    assert page.runs_table(card, members)["runs"].tolist() == [4]
    assert f"| {label} |" in page.errors_by_conditions(members)
    panel = report.figure_6(members, {"all": [label, "plain-20"]}).axes[0]
    assert {text.get_text() for text in panel.texts} == {label, "plain-20"}


def test_ids_are_file_names_that_differ(write):
    write(f"from replication.models import cifar_net\ndef {'n' * 300}(classes): return cifar_net(8, classes=classes)")
    options = {"dataset": "d" * 64, "recipe": Recipe(2**31, 2**20, warmup=Warmup(1, 0, 1)), "precision": "bfloat16"}
    options |= {"schedule": 0.12345678901234567, "holdout": 2**32 - 1, "bn_batch": 2**19, "warmup": False}
    runs = grid([f"nets:{'n' * 300}", "resnet-9998"], seeds=[2**32 - 1, 2**32 - 2], **options)
    assert len({run.id for run in runs}) == 4
    assert all(re.fullmatch(r"[\w.+-]{1,200}", run.id, re.ASCII) for run in runs)


def test_a_recipe_is_a_run_of_its_own_with_all_its_fields(results):
    mine = Recipe(1_000, 64, lr=1, milestones=[500], plateau=Plateau("train_error", 10), warmup=Warmup(0.01, 80.0, 8))
    run = Run("resnet-8", recipe=mine, schedule=SHORT)
    assert re.fullmatch(r"resnet-8__digits__recipe-own-[0-9a-f]{8}__schedule-0.01__seed-0", run.id)
    stored = json.loads(records.run_text(run, "f"))
    assert stored["recipe"]["plateau"] == {"watch": "train_error", "patience": 10, "threshold": 0.01, "divisions": 3}
    assert Run.from_dict(stored) == run
    same = [replace(mine, lr=1.0), replace(mine, milestones=(500,)), replace(mine, warmup=Warmup(0.01, 80, 8))]
    assert {Run("resnet-8", recipe=each, schedule=SHORT).id for each in same} == {run.id}
    others = [{"lr": 0.5}, {"batch": 32}, {"milestones": ()}, {"plateau": None}, {"warmup": None}, {"bn_batch": 32}]
    others += [{"iterations": 999}, {"momentum": 0}, {"weight_decay": 0}, {"plateau": Plateau("train_error", 11)}]
    assert len({Run("resnet-8", recipe=replace(mine, **each)).id for each in others}) == len(others)
    (record,) = run_all([run], results)
    assert all_finished(results)[0].run == run
    assert record.history["lr"].tolist() == [0.01 / 10]  # one row, after the end: warming up, behind the milestone
    assert record.conditions["recipe"] == mine.name


@pytest.mark.parametrize("name", NAMED)
def test_a_named_recipe_has_one_name(name):
    assert Run("resnet-8", recipe=replace(RECIPES[name])) == Run("resnet-8", recipe=name)
    assert Run("resnet-8", recipe=RECIPES["digits"]).id == "resnet-8__digits__seed-0"


@pytest.mark.long
def test_a_recipe_that_was_added_by_name_goes_to_the_workers_in_full(monkeypatch, results):
    monkeypatch.setitem(RECIPES, "mine", Recipe(11, batch=64))
    run = Run("resnet-8", recipe="mine")
    assert run.recipe == Recipe(11, batch=64)
    assert run_all([run], results)[0].summary["iterations"] == 11


@pytest.mark.parametrize(
    ("make_one", "error", "message"),
    [
        (
            lambda: Recipe(100, 64, milestones=(50, 200)),
            ValueError,
            "milestones 200: choose a whole number from 0 to 100",
        ),
        (lambda: Recipe(100, 64, milestones=(50, 20)), ValueError, r"milestones \(50, 20\): give them in ascending"),
        (lambda: Recipe(100, 64, milestones=50), TypeError, "milestones 50: give a list"),
        (lambda: Recipe(100, 64, milestones=(0.5,)), TypeError, "milestones 0.5: give a whole number"),
        (lambda: Recipe(0, 64), ValueError, "iterations 0"),
        (lambda: Recipe(1e3, 64), TypeError, "iterations 1000.0: give a whole number"),
        (lambda: Recipe(100, 0), ValueError, "batch 0"),
        (lambda: Recipe(100, "64"), TypeError, "batch '64'"),
        (lambda: Recipe(100, 64, lr=-0.1), ValueError, "lr -0.1: choose a number above 0"),
        (lambda: Recipe(100, 64, lr=0), ValueError, "lr 0"),
        (lambda: Recipe(100, 64, lr=math.nan), ValueError, "lr nan"),
        (lambda: Recipe(100, 64, lr=10**400), ValueError, "lr 1000"),
        (lambda: Recipe(100, 64, lr="0.1"), TypeError, "lr '0.1': give a number"),
        (lambda: Recipe(100, 64, lr=True), TypeError, "lr True"),
        (lambda: Recipe(100, 64, momentum=1), ValueError, "momentum 1: choose a number from 0 to below 1"),
        (lambda: Recipe(100, 64, momentum=-0.9), ValueError, "momentum -0.9"),
        (lambda: Recipe(100, 64, weight_decay=-1e-4), ValueError, "weight_decay -0.0001"),
        (lambda: Recipe(100, 64, weight_decay=math.inf), ValueError, "weight_decay inf"),
        (lambda: Recipe(100, 64, bn_batch=48), ValueError, "bn_batch 48: choose a divisor of the batch of 64: 1, 2, 4"),
        (lambda: Recipe(100, 64, bn_batch=0), ValueError, "bn_batch 0: choose a divisor"),
        (lambda: Recipe(100, 64, plateau="train_error"), TypeError, "plateau 'train_error': give a Plateau"),
        (lambda: Recipe(100, 64, warmup=0.01), TypeError, "warmup 0.01: give a Warmup"),
        (lambda: Plateau("val_error", 10), ValueError, "watch 'val_error': choose train_error, test_error"),
        (lambda: Plateau("test_error", 0), ValueError, "patience 0"),
        (lambda: Plateau("test_error", 5, threshold=-0.1), ValueError, "threshold -0.1"),
        (lambda: Plateau("test_error", 5, divisions=-1), ValueError, "divisions -1"),
        (lambda: Warmup(-0.1, 80, 110), ValueError, "lr -0.1"),
        (lambda: Warmup(0.1, 180, 110), ValueError, "until 180: choose a number from 0 to 100"),
        (lambda: Warmup(0.1, 80, 1.5), TypeError, "depth 1.5"),
        (lambda: Run("resnet-8", recipe=Recipe(100, 64), bn_batch=128), ValueError, "bn_batch 128: choose a divisor"),
        (lambda: Run("resnet-8", recipe={"batch": 64}), ValueError, "recipe {'batch': 64}: choose cifar"),
    ],
)
def test_impossible_recipes_are_refused_by_the_name_of_the_field(make_one, error, message):
    with pytest.raises(error, match=f"^{message}"):
        make_one()


def test_a_stored_recipe_that_cannot_be_is_refused_with_its_record(make, tmp_path):
    record = make(1, 2, net="plain-20", recipe=Recipe(1_000, 64))
    path = record.folder / "run.json"
    for old, new in (('"batch": 64', '"batch": -64'), ('"momentum"', '"adam"')):
        text = path.read_text()
        path.write_text(text.replace(old, new))
        records.write_summary(record.folder, record.summary)
        with pytest.raises(ValueError, match=r"does not understand .*(batch -64|adam)"):
            finished(record.run, tmp_path)
        path.write_text(text)


def test_speed_is_measured_of_a_net_of_ones_own(write):
    write()
    run = Run("nets:tiny")
    assert benchmark.cost(run, (8, 8)) == 128 * (9 * 4 * 27 + 40)


def test_the_example_of_the_docs_runs_as_it_stands(tmp_path, results):
    file, *script = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "own_nets.md").read_text(), re.DOTALL)
    (tmp_path / "preact.py").write_text(file)
    text = "".join(script)
    setting = 'results, schedule = "results", 1.0'
    assert text.count(setting) == 1
    (tmp_path / "script.py").write_text(text.replace(setting, f"results, schedule = {str(results)!r}, {SHORT}"))
    command = [sys.executable, "-W", "error", "script.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = {record.net: record.summary["parameters"] for record in all_finished(results)}
    # As many as ResNet-20: the same layers, and batch norm of as many channels in sum.
    assert set(found.values()) == {sum(parameter.numel() for parameter in models.cifar_net(20).parameters())}
    assert len(all_finished(results)) == 3
    assert re.search(r"preact\.preact_20-[0-9a-f]{8} +269,722", done.stdout)
    assert re.search("ResNet-20 .* own-", done.stdout.splitlines()[-1])
    assert (results / "preact" / "curves.png").exists()


NAMES_OF_OTHERS = """
from torch import nn
class Net(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.shortcut, self.linear = nn.Conv2d(3, 4, 7, 7), nn.Linear(4, classes)
    def forward(self, x):
        return self.linear(self.shortcut(x).relu().mean((2, 3)))
"""


def test_a_net_of_ones_own_is_trained_and_tested_on_photographs(write, photographs, results):
    """Also one whose weights are named as those that are renamed in other people's checkpoints."""
    write(NAMES_OF_OTHERS, "photos")
    run = Run("photos:Net", "imagenet-small", recipe=Recipe(2, 4, bn_batch=2))
    assert run.name.depth == 1
    record = trainers.train(run, results, photographs)
    arguments = {"data": photographs, "ways": ["centre crop"], "folder": results}
    found = pretrained.evaluations([record], "imagenet-small", **arguments)[run.id]["centre crop"]
    assert found["top1"] == pytest.approx(record.summary["test_error"])
