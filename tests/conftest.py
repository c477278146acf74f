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
