from dataclasses import FrozenInstanceError, fields

import pytest

from replication.recipes import RECIPES, Plateau, Recipe, own_recipe


def rows(*errors, every=100, column="train_error"):
    """A history with one recording every so many iterations."""
    return [{"iteration": every * (number + 1), column: error} for number, error in enumerate(errors)]


@pytest.mark.parametrize(
    ("name", "iterations", "batch", "momentum", "milestones"),
    [
        ("cifar", 64_000, 128, 0.9, (32_000, 48_000)),  # section 4.2
        ("imagenet", 600_000, 256, 0.9, ()),  # section 3.4
        ("note", 600_000, 100, 0.8, ()),
        ("digits", 1_100, 128, 0.9, (550, 825)),
        ("quick", 1_100, 64, 0.9, (550, 825)),
    ],
)
def test_recipes_are_those_published(name, iterations, batch, momentum, milestones):
    recipe = RECIPES[name]
    assert (recipe.iterations, recipe.batch, recipe.momentum, recipe.milestones) == (
        iterations,
        batch,
        momentum,
        milestones,
    )
    assert (recipe.lr, recipe.weight_decay) == (0.1, 1e-4)
    assert (recipe.plateau is None) == bool(milestones)


def test_recipes_are_frozen():
    with pytest.raises(FrozenInstanceError):
        RECIPES["cifar"].lr = 1.0


def test_every_data_set_has_its_own_recipe():
    names = ("digits", "imagenet", "imagenet-100", "imagenet-smoke", "cifar10", "cifar100", "pets")
    recipes = ["digits", "imagenet", "imagenet", "smoke", "cifar", "cifar", "cifar"]
    assert [own_recipe(name) for name in names] == recipes


@pytest.mark.parametrize("schedule", [1.0, 0.5, 0.1, 0.05, 0.03, 0.0317, 1e-3, 1e-4, 1e-9])
def test_milestones_scale_with_the_schedule(schedule):
    recipe = RECIPES["cifar"].scaled(schedule).for_depth(20)
    assert recipe.iterations == max(1, round(64_000 * schedule))
    for iteration in {*range(0, recipe.iterations, max(1, recipe.iterations // 997)), recipe.iterations - 1}:
        done = iteration / schedule  # where the paper's schedule would be
        if min(abs(done - 32_000), abs(done - 48_000)) * schedule < 1:
            continue  # rounded to whole iterations
        expected = 0.1 if done < 32_000 else 0.01 if done < 48_000 else 0.001
        assert recipe.learning_rate(iteration) == pytest.approx(expected)


def test_the_milestones_fall_exactly_where_the_paper_has_them():
    rate = RECIPES["cifar"].for_depth(56).learning_rate
    assert [rate(iteration) for iteration in (0, 31_999, 32_000, 47_999, 48_000, 63_999)] == [
        0.1,
        0.1,
        0.01,
        0.01,
        0.001,
        0.001,
    ]


def test_scaling_by_one_changes_nothing():
    assert all(recipe.scaled(1.0) == recipe for recipe in RECIPES.values())


def test_the_warm_up_lasts_until_the_error_of_an_epoch_is_below_80():
    recipe = RECIPES["cifar"].for_depth(110)
    assert recipe.learning_rate(0) == 0.01
    assert recipe.learning_rate(1173, rows(90.0, 85.0, 80.0, every=391)) == 0.01
    assert recipe.learning_rate(1564, rows(90.0, 85.0, 80.0, 79.9, every=391)) == 0.1
    # Once over it is over, whatever the error does at the high rate.
    assert recipe.learning_rate(1955, rows(90.0, 85.0, 80.0, 79.9, 88.0, every=391)) == 0.1
    assert recipe.learning_rate(32_000, rows(90.0, 79.0, every=391)) == 0.01
    assert recipe.learning_rate(48_000, rows(90.0, 79.0, every=391)) == 0.001


@pytest.mark.parametrize(("depth", "rate"), [(20, 0.1), (56, 0.1), (110, 0.01), (1202, 0.01)])
def test_only_nets_of_110_layers_and_more_are_warmed_up(depth, rate):
    assert RECIPES["cifar"].for_depth(depth).learning_rate(0) == rate


def test_the_warm_up_does_not_scale():
    warmup = RECIPES["cifar"].scaled(0.01).warmup
    assert [getattr(warmup, field.name) for field in fields(warmup)] == [0.01, 80, 110]


@pytest.mark.parametrize(
    ("errors", "places"),  # the error every 100 iterations; after which of them the rate is divided, patience 300
    [
        ([50, 40, 30, 30, 30, 30, 30, 30, 30], [5, 8]),
        ([50, 40, 30, 20, 10, 5, 4, 3, 2], []),
        ([50, 49.9, 49.8, 49.7, 49.6, 49.5], [3]),  # each less than a hundredth better than the best
        ([50, 49.8, 49.4, 49.2, 49.1, 49.0], [5]),  # 49.4 is
        ([50, 60, 70, 60, 40, 60, 60, 60], [3, 7]),
        ([0] * 16, [3, 6, 9]),  # three times at the most
    ],
)
@pytest.mark.parametrize("column", ["train_error", "test_error"])
def test_the_rate_is_divided_on_a_plateau(errors, places, column):
    recipe = Recipe(10_000, 100, 0.1, 0.8, 1e-4, plateau=Plateau(column, patience=300))
    for number in range(len(errors)):
        expected = 0.1 / 10 ** sum(number >= place for place in places)
        history = rows(*errors[: number + 1], column=column)
        assert recipe.learning_rate(100 * (number + 1), history) == pytest.approx(expected)


def test_a_plateau_skips_what_was_not_measured():
    recipe = Recipe(10_000, 100, 0.1, 0.8, 1e-4, plateau=Plateau("test_error", patience=300))
    assert recipe.learning_rate(400, rows(50, None, None, None, column="test_error")) == 0.1
    assert recipe.learning_rate(500, rows(50, None, None, None, 50, column="test_error")) == pytest.approx(0.01)


def test_the_patience_of_a_plateau_scales_with_the_schedule():
    assert RECIPES["note"].scaled(0.01).plateau.patience == RECIPES["note"].plateau.patience // 100
