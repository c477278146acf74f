import shutil

import numpy as np
import pytest
from conftest import write_photographs

from replication import Run, data, grid, preview
from replication.data.imagenet import random_crop
from replication.recipes import Plateau, Recipe


def values(runs, dataset=None):
    return dict(preview.recipe(runs, dataset).to_numpy())


def test_the_recipe_of_section_4_2_in_numbers():
    table = values(grid(["resnet-56", "resnet-110"], "cifar10"))
    assert table == {
        "recipe": "cifar: section 4.2 of the paper, its recipe for CIFAR-10",
        "iterations": "64,000",
        "batch": "128 images",
        "learning rate": "0.1, divided by 10 after 32,000 and 48,000 iterations",
        "momentum": "0.9",
        "weight decay": "0.0001",
        "augmentation": "a black border 4 wide, crops of 32x32 at random, mirrored at random",
        "warm-up": "ResNet-110: 0.01 until an epoch's training error is below 80 %",
    }


def test_numbers_are_those_at_this_schedule_on_these_images():
    table = values(grid(["resnet-20"], schedule=0.1), data.load("digits"))
    assert table["iterations"] == "110, 0.1 of the recipe's"
    assert table["learning rate"] == "0.1, divided by 10 after 55 and 82 iterations"
    assert table["augmentation"] == "a black border 1 wide, crops of 8x8 at random, never mirrored"
    assert table["warm-up"] == "none"


def test_plateaus_and_recipes_of_ones_own_are_told():
    note = values(grid(["resnet-20"], "cifar10", recipe="note", schedule=0.1))
    rate = "0.1, divided by 10 when the training error has not improved by 1 % of its value for 6,000 iterations"
    assert note["learning rate"] == f"{rate}, at most 3 times"
    assert (note["batch"], note["momentum"]) == ("100 images", "0.8")
    assert note["recipe"] == "note: a Chinese reading note on the paper, with batches of 100 and momentum 0.8"
    own = Recipe(10, batch=64, lr=0.02, bn_batch=16, plateau=Plateau("test_error", 5))
    table = values([Run("resnet-20", recipe=own)])
    assert table["recipe"].startswith("own-")
    assert table["recipe"].endswith(": a recipe of one's own, all of whose fields are in the run.json of its records")
    assert table["batch"] == "64 images, normalized 16 at a time"
    assert table["learning rate"].startswith("0.02, divided by 10 when the test error ")


def test_nets_have_the_stages_of_section_4_2():
    """2n layers of 16, 32 and 64 filters on maps of 32, 16 and 8 pixels, in blocks of two; n = 3 for 20 layers."""
    table = preview.nets(grid(["plain-20", "resnet-20", "resnet-32-B"], "cifar10", [0, 1]), None)
    parts = [3 * 16 * 9, 6 * 16 * 16 * 9, 16 * 32 * 9 + 5 * 32 * 32 * 9, 32 * 64 * 9 + 5 * 64 * 64 * 9, 64 * 10 + 10]
    norms = 2 * (7 * 16 + 6 * 32 + 6 * 64)
    for net, row in zip(("plain-20", "ResNet-20"), table.to_dict("records"), strict=False):
        assert row == {
            "net": net,
            "conv1, 32x32": "3x3, 16",
            "layer1, 32x32": "[3x3, 16; 3x3, 16] × 3",
            "layer2, 16x16": "[3x3, 32; 3x3, 32] × 3",
            "layer3, 8x8": "[3x3, 64; 3x3, 64] × 3",
            "fc": "fc, 10",
            "parameters": f"{sum(parts) + norms:,}",
        }
    assert table["net"].tolist() == ["plain-20", "ResNet-20", "ResNet-32-B"]
    assert table["layer3, 8x8"].iloc[2] == "[3x3, 64; 3x3, 64] × 5"


def test_nets_have_the_stages_of_table_1():
    (row,) = preview.nets(grid(["resnet-50"], "imagenet"), None).to_dict("records")
    assert row == {
        "net": "ResNet-50",
        "conv1, 112x112": "7x7, 64",
        "layer1, 56x56": "[1x1, 64; 3x3, 64; 1x1, 256] × 3",
        "layer2, 28x28": "[1x1, 128; 3x3, 128; 1x1, 512] × 4",
        "layer3, 14x14": "[1x1, 256; 3x3, 256; 1x1, 1024] × 6",
        "layer4, 7x7": "[1x1, 512; 3x3, 512; 1x1, 2048] × 3",
        "fc": "fc, 1000",
        "parameters": "25,557,032",  # torchvision's resnet50
    }


def test_nets_of_ones_own_have_no_row(tmp_path, monkeypatch):
    text = "from torch import nn\ndef tiny(classes):\n    return nn.Sequential(nn.Flatten(), nn.Linear(192, classes))\n"
    (tmp_path / "own_for_preview.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    runs = [Run("own_for_preview:tiny"), Run("plain-8")]
    assert preview.nets(runs, data.load("digits"))["net"].tolist() == ["plain-8"]
    assert preview.nets(runs[:1], data.load("digits")).empty


def test_images_are_those_of_the_first_batch_with_their_classes():
    """Cut out here once more: padded by a black pixel, at the places that were drawn."""
    digits, run = data.load("digits"), Run("resnet-20", seed=3)
    batches = digits.batches(128, 3)
    rows, columns, _ = batches.augmentation(0)
    axes = preview.batch([run], digits).axes
    assert len(axes) == 8
    for place, index in enumerate(batches.indices(0)[:8]):
        padded = np.pad(digits.train.pixels[index], ((1, 1), (1, 1), (0, 0)))
        row, column = rows[place], columns[place]
        (image,) = axes[place].images
        assert np.array_equal(image.get_array(), padded[row : row + 8, column : column + 8])
        assert axes[place].get_title(loc="left") == str(digits.train.labels[index])


def test_photographs_are_shown_as_cropped_for_training(tmp_path):
    """But for colours, which are shifted by the same amount everywhere."""
    write_photographs(tmp_path / "imagenet-small", train=3)
    dataset, run = data.load("imagenet-small", tmp_path, progress=False), Run("resnet-18", "imagenet-small", seed=1)
    axes = preview.batch([run], dataset).axes
    assert [len(each.images) for each in axes] == [1] * 8
    for place, index in enumerate(dataset.batches(256, 1).indices(0)[:8]):
        generator = np.random.default_rng([1, 1, place])
        side, corner, mirrored = generator.integers(256, 481), generator.random(2), bool(generator.integers(2))
        crop = random_crop(dataset.folder / dataset.train.paths[index].decode(), int(side), corner, mirrored).numpy()
        shown = axes[place].images[0].get_array()
        inside = (shown > 0) & (shown < 255)
        shift = np.where(inside, shown.astype(float) - crop, np.nan)
        assert np.nanmax(shift, (0, 1)) - np.nanmin(shift, (0, 1)) == pytest.approx(0, abs=1.01)  # rounded


def test_without_images_a_line_says_so_and_nothing_is_downloaded(tmp_path, capsys):
    for name, words in {
        "cifar10": "32x32 pixels and 10 classes",
        "cifar100": "32x32 pixels and 100 classes",
        "imagenet": "224x224 pixels and 1,000 classes",
    }.items():
        assert preview.images(name, tmp_path / "data") is None
        line = f"The images of {name!r} are not here: none are shown, and sizes are those for {words}.\n"
        assert capsys.readouterr().out == line
    assert not (tmp_path / "data").exists()
    assert preview.batch([Run("resnet-20", "cifar10")], None) is None


def test_where_nothing_is_trained_nothing_is_shown(tmp_path):
    write_photographs(tmp_path / "imagenet-small", train=1)
    shutil.rmtree(tmp_path / "imagenet-small" / "train")
    tests_alone = preview.images("imagenet-small", tmp_path)
    assert preview.batch([Run("resnet-18", "imagenet-small")], tests_alone) is None
    assert preview.batch([], tests_alone) is None
    assert preview.recipe([], tests_alone).empty
    assert preview.nets([], tests_alone).empty
