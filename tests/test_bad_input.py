"""Whatever is given to the public functions: a TypeError or ValueError that names it, and nothing is written."""

import os
import re

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from replication import (
    Run,
    all_finished,
    benchmark,
    data,
    finished,
    grid,
    models,
    net_names,
    pretrained,
    run_all,
    trainers,
)
from replication.runs import PRECISIONS, environment

RUN = Run("resnet-8", schedule=0.02)
BAD = (TypeError, ValueError)
NAMES = [
    "../x",
    "",
    " ",
    ".",
    "..",
    "/",
    "a/b",
    "a\\b",
    "a\0b",
    "a\nb",
    "x" * 300,
    "été",
    "\u202ea",
    "con:",
    "~",
    "$HOME",
    "-x",
]
TEXT = st.sampled_from(NAMES) | st.text()
NUMBERS = st.integers() | st.floats() | st.sampled_from([10**30, -1, 0, float("nan"), float("inf"), 1 + 1e-9])
SIMPLE = st.none() | st.booleans() | NUMBERS | TEXT | st.binary() | st.just(object())
ANYTHING = SIMPLE | st.lists(SIMPLE, max_size=3) | st.tuples(SIMPLE) | st.dictionaries(st.text(), SIMPLE, max_size=2)
settings.register_profile("here", deadline=None, derandomize=True, max_examples=80)
settings.load_profile("here")


@pytest.fixture(scope="module", autouse=True)
def nothing_is_written(tmp_path_factory):
    """The tests of this file run in a folder that is empty before and after."""
    before, place = os.getcwd(), tmp_path_factory.mktemp("empty")
    os.chdir(place)
    yield
    os.chdir(before)
    assert list(place.iterdir()) == []


def outcome(call, *arguments, **options):
    """What a call returns, and the message of the error that it raises instead."""
    try:
        return call(*arguments, **options), None
    except BAD as error:
        return None, str(error)


FIELDS = ("net", "dataset", "recipe", "seed", "schedule", "precision", "holdout", "bn_batch", "warmup", "weights")


@given(st.sampled_from(FIELDS), ANYTHING)
@example("seed", 2**32)
@example("seed", True)
@example("schedule", float("nan"))
@example("schedule", 5e-324)
@example("dataset", "../x")
@example("dataset", "x" * 65)
@example("net", "resnet-999998")
@example("net", "resnet-٢٠")
def test_a_run_is_made_or_refused_by_the_name_of_its_field(field, value):
    run, refused = outcome(Run, **({"net": "resnet-20"} | {field: value}))
    if refused is None:
        assert re.fullmatch(r"[\w.+-]{1,200}", run.id, flags=re.ASCII)
        assert run.settings.iterations >= 1
    else:
        named = {"net": "net|depth|shortcut"}.get(field, field)
        assert re.match(f"(?:{named}) ", refused), refused
        assert re.search("give|choose|nearest", refused)


@given(ANYTHING, ANYTHING)
def test_lists_of_runs_are_made_or_refused(nets, seeds):
    runs, refused = outcome(grid, nets, seeds=seeds)
    assert refused or all(isinstance(run, Run) for run in runs)


@given(st.sampled_from(["plain", "resnet"]), ANYTHING, ANYTHING)
def test_names_of_nets_are_made_or_refused(kind, depths, shortcuts):
    names, refused = outcome(net_names, kind, depths, shortcuts)
    assert refused or all(models.NetName.parse(name) for name in names)


@given(st.sampled_from(["depth", "residual", "shortcut", "classes", "stride_on"]), ANYTHING)
@example("depth", 6 * 10**9 + 2)
@example("depth", [20])
@example("classes", 10**12)
@example("shortcut", ["A"])
def test_nets_are_built_or_refused(argument, value):
    with torch.device("meta"):
        for build, depth in ((models.cifar_net, 8), (models.imagenet_net, 18)):
            if argument == "stride_on" and build is models.cifar_net:
                continue
            net, refused = outcome(build, **({"depth": depth} | {argument: value}))
            assert isinstance(net, torch.nn.Module) or refused.startswith((argument, "depth"))


@given(ANYTHING)
@example("imagenet-../x")
@example("digit")
def test_data_sets_that_are_not_there_are_refused(name):
    with pytest.raises(BAD, match=r"^dataset "):
        data.load(name, "data")


@given(
    ANYTHING.filter(lambda value: not isinstance(value, str))
    | st.sampled_from([name for name in NAMES if len(name) > 250])
)
@example("")
@example("a\0b")
def test_folders_that_cannot_be_are_refused_everywhere(folder):
    calls = {
        "results": [
            lambda: run_all([RUN], folder),
            lambda: trainers.train(RUN, folder),
            lambda: finished(RUN, folder),
            lambda: all_finished(folder),
        ],
        "data": [
            lambda: run_all([RUN], data=folder),
            lambda: trainers.train(RUN, data=folder),
            lambda: data.load("digits", folder),
        ],
    }
    for name, each in calls.items():
        for call in each:
            with pytest.raises(BAD, match=f"^{name} "):
                call()


@given(st.sampled_from(["runs", "executor", "processes", "fresh"]), ANYTHING)
@example("runs", [RUN, "resnet-20"])
@example("executor", "localhost")
@example("processes", 3)
def test_a_sweep_refuses_what_it_cannot_do(argument, value):
    if argument == "executor" and isinstance(value, str) and ":" in value:
        return  # an address, of which only the network can tell
    harmless = {"runs": (), "executor": (None,), "processes": (1,), "fresh": (True, False)}[argument]
    if value in ([], ()) and argument == "runs":
        assert run_all(value) == []
        return
    if any(value is each or (type(value) is int and value == each) for each in harmless):
        return
    with pytest.raises(BAD):
        run_all(**({"runs": [RUN]} | {argument: value}))


@given(ANYTHING)
def test_what_is_no_number_of_processes_is_refused(value):
    _, refused = outcome(environment.check_processes, RUN, value)
    assert value == 1 if refused is None else refused.startswith("processes ")


@given(st.sampled_from(["ways", "ensemble", "weights"]), ANYTHING)
@example("weights", {"ensemble": {}})
@example("weights", {"<script>": {"net": "resnet-18", "path": 3}})
def test_ways_of_testing_are_refused_before_anything_is_trained(argument, value):
    if value in {"ways": (), "ensemble": ([], ()), "weights": ({}, None)}[argument]:
        return
    with pytest.raises(BAD):
        pretrained.check(["resnet-18"], **{argument: value})


@given(st.sampled_from(["rounds", "iterations", "notebooks", "precision"]), ANYTHING)
def test_measurements_of_speed_are_refused(argument, value):
    if argument in ("rounds", "iterations"):
        if type(value) is int and 1 <= value < 2**32:
            return
        with pytest.raises(BAD, match=f"^{argument} "):
            benchmark.compare(["resnet-8"], **{argument: value})
    elif value not in ([], (), *PRECISIONS):
        with pytest.raises(BAD):
            benchmark.planned(*((value,) if argument == "notebooks" else ([0], value)))
