import json
from dataclasses import FrozenInstanceError, asdict

import numpy as np
import pytest

from replication import Run, grid, net_names
from replication.runs import records


def test_a_run_takes_its_data_sets_own_recipe():
    assert Run("plain-20").recipe == "digits"
    assert Run("plain-20", "cifar10").recipe == Run("plain-20", "pets").recipe == "cifar"
    assert Run("plain-20", "cifar10", recipe="note").recipe == "note"


@pytest.mark.parametrize(
    ("run", "name"),
    [
        (Run("plain-20"), "plain-20__digits__seed-0"),
        (Run("resnet-20-A", recipe="digits", schedule=1), "resnet-20__digits__seed-0"),
        (
            Run("resnet-56-B", "cifar10-small", "note", seed=3, schedule=0.03, precision="bfloat16", holdout=5000),
            "resnet-56-B__cifar10-small__recipe-note__schedule-0.03__precision-bfloat16__holdout-5000__seed-3",
        ),
        (Run("resnet-50-B", "imagenet", bn_batch=32), "resnet-50__imagenet__seed-0"),
        (
            Run("resnet-34-B", "imagenet", bn_batch=16),
            "resnet-34-B__imagenet__group-16__seed-0",
        ),
        (Run("resnet-110", warmup=False), "resnet-110__digits__warmup-False__seed-0"),
        (Run("resnet-56", warmup=False), "resnet-56__digits__seed-0"),  # which the recipe does not warm up
    ],
)
def test_the_id_names_what_differs_from_the_defaults(run, name):
    assert run.id == name


def test_equal_runs_have_equal_ids_and_different_ones_different_ids():
    same = [
        Run("resnet-20"),
        Run("resnet-20-A", recipe="digits"),
        Run("resnet-20", seed=np.int64(0), schedule=np.float32(1)),
    ]
    assert len(set(same)) == len({run.id for run in same}) == 1
    different = [
        Run("resnet-20"),
        Run("resnet-20-B"),
        Run("plain-20"),
        Run("resnet-20", "a"),
        Run("resnet-20", "a_recipe-note"),
        Run("resnet-20", "a", "note"),
        Run("resnet-20", "a", seed=1),
        Run("resnet-20", "a", schedule=0.5),
        Run("resnet-20", "a", precision="bfloat16"),
        Run("resnet-20", "a", holdout=1),
        Run("resnet-20", "a", bn_batch=64),
        Run("resnet-50", "imagenet-a"),
    ]
    assert len(set(different)) == len({run.id for run in different}) == len(different)


def test_a_run_is_frozen_and_survives_json():
    run = Run("resnet-56-C", "pets", schedule=0.1, seed=2)
    with pytest.raises(FrozenInstanceError):
        run.seed = 1
    assert Run.from_dict(json.loads(records.run_text(run, "f"))) == run
    assert Run(**asdict(run)) == run
    older = {name: value for name, value in asdict(run).items() if name != "holdout"}
    assert Run.from_dict(older) == run


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"net": "plain-21"}, ValueError, "nearest to yours is 20"),
        ({"net": "resnet-20-D"}, ValueError, "shortcut 'D'"),
        ({"net": 20}, TypeError, "net 20: give a name"),
        ({"dataset": "../x"}, ValueError, "dataset '../x': choose digits, cifar10, cifar100"),
        ({"dataset": None}, TypeError, "dataset None"),
        (
            {"recipe": "cifer"},
            ValueError,
            "choose cifar, imagenet, note, digits, quick, smoke, .* .did you mean 'cifar'",
        ),
        ({"recipe": 1}, ValueError, "recipe 1: choose"),
        ({"warmup": 0}, TypeError, "warmup 0: choose True or False"),
        ({"seed": -1}, ValueError, "seed -1"),
        ({"seed": 2**32}, ValueError, "seed 4294967296"),
        ({"seed": 0.5}, TypeError, "seed 0.5"),
        ({"seed": True}, TypeError, "seed True"),
        ({"schedule": 0}, ValueError, "schedule 0: choose a fraction .* above 0 and up to 1"),
        ({"schedule": 1.01}, ValueError, "schedule 1.01"),
        ({"schedule": float("nan")}, ValueError, "schedule nan"),
        ({"schedule": "0.1"}, TypeError, "schedule '0.1'"),
        ({"schedule": "1e-2"}, TypeError, "schedule '1e-2': give a number .*; YAML takes 0.01 and 1.0e-2 for numbers"),
        ({"precision": "bf16"}, ValueError, "choose float32, bfloat16"),
        ({"precision": "floet32"}, ValueError, "did you mean 'float32'"),
        ({"holdout": -1}, ValueError, "holdout -1"),
        ({"bn_batch": 1.5}, TypeError, "bn_batch 1.5"),
        ({"dataset": "imagenet", "net": "plain-50"}, ValueError, "plain ImageNet nets have 18 or 34 layers"),
        ({"dataset": "imagenet", "net": "resnet-20"}, ValueError, "an ImageNet net has 18, 34, 50, 101, 152"),
    ],
)
def test_bad_fields_are_refused_with_the_choices(fields, error, message):
    with pytest.raises(error, match=message):
        Run(**{"net": "resnet-20"} | fields)


def test_a_grid_has_every_net_with_every_seed():
    made = grid(["plain-20", "resnet-20"], "pets", [0, 1], schedule=0.5)
    assert [(run.net, run.seed) for run in made] == [
        ("plain-20", 0),
        ("plain-20", 1),
        ("resnet-20", 0),
        ("resnet-20", 1),
    ]
    assert {(run.dataset, run.schedule) for run in made} == {("pets", 0.5)}


def test_names_of_nets_by_depth_and_shortcut():
    assert net_names("plain", [20, 56]) == ["plain-20", "plain-56"]
    assert net_names("resnet", [20], ["A", "C"]) == ["resnet-20-A", "resnet-20-C"]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: grid(["plain-20"], seeds=0), ValueError, "seeds 0: give a list"),
        (lambda: grid([]), ValueError, r"nets \[\]: give a list"),
        (lambda: grid("plain-20"), ValueError, "nets 'plain-20': give a list"),
        (lambda: grid(["plain-20"], seeds=[0, 0]), ValueError, "an entry is repeated"),
        (lambda: net_names("plain", 20), ValueError, "depths 20: give a list"),
        (lambda: net_names("plain", "[20]"), ValueError, r"to papermill by -y 'depths: \[20\]'"),
        (lambda: grid("[plain-20, plain-56]"), ValueError, r"to papermill by -y 'nets: \[plain-20, plain-56\]'"),
        (lambda: grid(["plain-20"], seeds="0, 3"), ValueError, r"to papermill by -y 'seeds: \[0, 3\]'"),
        (lambda: grid(["plain-20"], seeds=7), ValueError, r"a list such as \[7\]; to papermill by -y 'seeds: \[7\]'"),
        (lambda: grid(["plain-20"], seeds=""), ValueError, r"seeds '': give a list such as \[0, 1\]"),
        (lambda: net_names("resnet", [20], "A"), ValueError, r"to papermill by -y 'shortcuts: \[A\]'"),
        (lambda: net_names("plain", ["20"]), TypeError, "depth '20'"),
        (lambda: net_names("plain", [21]), ValueError, "nearest to yours is 20"),
        (lambda: net_names("resnet", [20], ["D"]), ValueError, "shortcut 'D'"),
    ],
)
def test_bad_lists_are_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_without_a_warm_up_a_deep_net_starts_at_the_full_rate():
    for recipe in ("cifar", "digits"):
        assert Run("resnet-110", recipe=recipe).settings.learning_rate(0) == pytest.approx(0.01)
        assert Run("resnet-110", recipe=recipe, warmup=False).settings.learning_rate(0) == pytest.approx(0.1)
