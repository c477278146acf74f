import matplotlib
import numpy as np
import pytest
from PIL import Image

import replication  # noqa: F401 (before torchvision, whose missing ops it declares)

matplotlib.use("agg")


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
