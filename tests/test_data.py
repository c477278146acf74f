import hashlib
import http.server
import io
import os
import pickle
import tarfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import write_images
from PIL import Image

from replication import data, files


def test_digits_are_scikit_learns_in_two_disjoint_parts():
    digits = data.load("digits")
    assert digits.train.pixels.shape == (1437, 8, 8, 3)
    assert digits.test.pixels.shape == (360, 8, 8, 3)
    assert np.array_equal(digits.train.pixels[..., 0], digits.train.pixels[..., 2])
    counts = np.bincount(digits.test.labels, minlength=10)
    assert counts.min() >= 34  # every class in the same proportion
    assert counts.max() <= 38
    assert digits.fingerprint == data.load("digits").fingerprint


def test_a_folder_holds_its_files_pixels_and_labels(tmp_path):
    pixels = write_images(tmp_path / "pets", classes=("dog", "cat"), train=4, test=2)
    pets = data.load("pets", tmp_path)
    assert pets.classes == ("cat", "dog")
    for part, images in (("train", pets.train), ("test", pets.test)):
        paths = sorted(path for path in pixels if path.parts[-3] == part)
        assert np.array_equal(images.pixels, np.stack([pixels[path] for path in paths]))
        assert images.labels.tolist() == [pets.classes.index(path.parent.name) for path in paths]


def test_mean_is_that_of_every_pixel_over_the_training_part(pets):
    dataset = data.load("pets", pets)
    total = [[[0.0] * 3 for _ in range(8)] for _ in range(8)]
    for image in dataset.train.pixels.tolist():
        for y in range(8):
            for x in range(8):
                for channel in range(3):
                    total[y][x][channel] += image[y][x][channel] / len(dataset.train.pixels)
    np.testing.assert_allclose(dataset.mean, total, rtol=1e-6)


def test_the_cache_is_used_and_refused_when_a_file_changed(pets, monkeypatch):
    first = data.load("pets", pets)
    monkeypatch.setattr(data, "_decode", lambda *_: pytest.fail("decoded again"))
    assert data.load("pets", pets).fingerprint == first.fingerprint
    monkeypatch.undo()
    path = pets / "pets" / "train" / "cat" / "0.png"
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(path)
    changed = data.load("pets", pets)
    assert not changed.train.pixels[0].any()
    assert changed.fingerprint != first.fingerprint
    path.unlink()
    assert len(data.load("pets", pets).train.labels) == len(first.train.labels) - 1


def test_a_file_of_the_same_size_and_another_time_is_decoded_again(pets):
    path = pets / "pets" / "train" / "cat" / "0.png"
    data.load("pets", pets)
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    key_before = np.load(pets / ".cache" / "pets.npz")["key"]
    data.load("pets", pets)
    assert np.load(pets / ".cache" / "pets.npz")["key"] != key_before


class Hostile:
    """What executes code when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("hostile",)


def test_a_damaged_cache_is_named_and_decoded_again(pets, capsys, monkeypatch):
    monkeypatch.chdir(pets)
    pixels = data.load("pets", pets).train.pixels
    cache = pets / ".cache" / "pets.npz"
    content = cache.read_bytes()
    places = range(0, len(content), len(content) // 40)
    for damaged in [
        content[:200],
        b"",
        *(content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :] for at in places),
    ]:
        cache.write_bytes(damaged)
        assert np.array_equal(data.load("pets", pets).train.pixels, pixels)
        assert f"{cache} is damaged: its checksum is wrong: decoding the images again" in capsys.readouterr().out
        assert cache.read_bytes() == content
    packed = io.BytesIO()
    np.savez(packed, key=np.array([Hostile()], dtype=object))  # pickled, and executed if it were loaded
    files.write_sealed(cache, packed.getvalue())
    assert np.array_equal(data.load("pets", pets).train.pixels, pixels)
    assert "allow_pickle=False" in capsys.readouterr().out
    assert not (pets / "hostile").exists()


def spoil_text(folder):
    (folder / "train" / "cat" / "0.png").write_text("no image")


def spoil_truncated(folder):
    path = folder / "train" / "cat" / "0.png"
    path.write_bytes(path.read_bytes()[:60])


def spoil_size(folder):
    Image.new("RGB", (12, 12)).save(folder / "test" / "dog" / "1.png")


def spoil_test_size(folder):
    for path in (folder / "test").glob("*/*"):
        Image.new("RGB", (12, 12)).save(path)


def spoil_empty_class(folder):
    (folder / "train" / "eel").mkdir()


def spoil_other_classes(folder):
    (folder / "test" / "dog").rename(folder / "test" / "eel")


def spoil_no_test(folder):
    (folder / "test").rename(folder / "val")


def spoil_one_class(folder):
    for part in ("train", "test"):
        for path in (folder / part / "dog").iterdir():
            path.unlink()
        (folder / part / "dog").rmdir()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_text, "train/cat/0.png cannot be read as an image .*replace or remove it"),
        (spoil_truncated, "train/cat/0.png cannot be read as an image .*replace or remove it"),
        (spoil_size, "test/dog/1.png is 12x12, .*test/cat/0.png is 8x8: resize"),
        (spoil_test_size, "train has images of 8x8, test of 12x12: resize one"),
        (spoil_empty_class, "class .*train/eel is empty: put images into it or remove it"),
        (spoil_other_classes, r"only train has \['dog'\] and only test has \['eel'\]"),
        (spoil_no_test, "has no folder test/"),
        (spoil_one_class, "at least 2 are needed"),
    ],
)
def test_what_is_wrong_with_a_folder_is_said(pets, spoil, message):
    spoil(pets / "pets")
    with pytest.raises(ValueError, match=message):
        data.load("pets", pets)
    assert not (pets / ".cache").exists()


def test_an_unknown_data_set_is_answered_with_the_choices(pets):
    with pytest.raises(ValueError, match=r"choose digits, cifar10, cifar100, pets \(did you mean 'digits'\?\)"):
        data.load("digit", pets)


@pytest.mark.parametrize("name", ["../pets", "", "a/b", ".cache", "a" * 65, "a__b", "pets ", "döner", "-pets"])
def test_unsafe_names_are_refused(name, pets):
    with pytest.raises(ValueError, match="dataset"):
        data.load(name, pets)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_is_read_from_torchvisions_files(name, tmp_path, monkeypatch):
    """The real files cannot be had here: small ones in their format, without the check of their MD5 sums."""
    from torchvision import datasets

    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    monkeypatch.setattr(kind, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    folder = tmp_path / kind.base_folder
    folder.mkdir()
    generator, labels, rows = np.random.default_rng(0), "fine_labels" if name == "cifar100" else "labels", []
    for file, _ in kind.train_list + kind.test_list:
        rows.append(generator.integers(0, 256, (2, 3072), dtype=np.uint8))
        (folder / file).write_bytes(pickle.dumps({"data": rows[-1], labels: [1, 0]}))
    names = {"label_names": ["cat", "dog"], "fine_label_names": ["cat", "dog"]}
    (folder / kind.meta["filename"]).write_bytes(pickle.dumps(names))
    dataset = data.load(name, tmp_path)
    assert dataset.classes == ("cat", "dog")
    assert dataset.test.labels.tolist() == [1, 0]
    # A row of the file is 1024 red, 1024 green and 1024 blue values, each row by row.
    assert np.array_equal(dataset.train.pixels[0, :, :, 1].ravel(), rows[0][0, 1024:2048])


def test_cifar_that_cannot_be_downloaded_says_what_to_do(tmp_path, monkeypatch):
    from torchvision import datasets

    monkeypatch.setattr(datasets.CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")
    with pytest.raises(ValueError, match=r"could not be downloaded .*download http://127.0.0.1:9/.* and put it into"):
        data.load("cifar10", tmp_path)


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server that has a small CIFAR-10, all checksums right; the list of the downloads that were asked for."""
    from torchvision import datasets

    source, asked, kind = tmp_path / "source", [], datasets.CIFAR10
    folder = source / kind.base_folder
    folder.mkdir(parents=True)

    def put(name, values):
        (folder / name).write_bytes(pickle.dumps(values))
        return name, hashlib.md5((folder / name).read_bytes()).hexdigest()

    images = {"data": np.zeros((2, 3072), np.uint8), "labels": [1, 0]}
    for part in ("train_list", "test_list"):
        monkeypatch.setattr(kind, part, [put(name, images) for name, _ in getattr(kind, part)])
    _, found = put(kind.meta["filename"], {"label_names": ["cat", "dog"]})
    monkeypatch.setattr(kind, "meta", kind.meta | {"md5": found})
    with tarfile.open(source / kind.filename, "w:gz") as archive:
        archive.add(folder, kind.base_folder)
    monkeypatch.setattr(kind, "tgz_md5", hashlib.md5((source / kind.filename).read_bytes()).hexdigest())

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=source)

        def do_GET(self):
            asked.append(self.path)
            time.sleep(0.3)  # long enough for the other to come
            super().do_GET()

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        monkeypatch.setattr(kind, "url", f"http://127.0.0.1:{running.server_port}/{kind.filename}")
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield asked
        running.shutdown()
        thread.join()


def test_of_two_that_want_cifar_one_downloads_it_and_a_damaged_copy_is_replaced(server, tmp_path, capsys):
    root = tmp_path / "data"
    with ThreadPoolExecutor(2) as executor:
        one, other = executor.map(data.load, ["cifar10"] * 2, [root] * 2)
    assert one.fingerprint == other.fingerprint
    assert len(server) == 2  # torchvision asks for where it is, then for it
    assert "cifar10 is being downloaded by process" in capsys.readouterr().out
    path = root / "cifar-10-batches-py" / "data_batch_2"
    content = path.read_bytes()
    path.write_bytes(content[:-7] + b"x" + content[-6:])
    assert data.load("cifar10", root).fingerprint == one.fingerprint
    assert (
        f"cifar10 in {root} is damaged or not complete: it is unpacked or downloaded again" in capsys.readouterr().out
    )
    assert path.read_bytes() == content
    assert len(server) == 2  # unpacked from the archive that is there


def crop_by_hand(image, padding, row, column, mirrored, mean):
    """One augmented image by loops: pad with zeros, crop, mirror, subtract the mean, divide by 255."""
    side = len(image)
    out = np.zeros((3, side, side))
    for y in range(side):
        for x in range(side):
            from_y, from_x = y + row - padding, (side - 1 - x if mirrored else x) + column - padding
            inside = 0 <= from_y < side and 0 <= from_x < side
            for channel in range(3):
                value = float(image[from_y][from_x][channel]) if inside else 0.0
                out[channel, y, x] = (value - mean[y][x][channel]) / 255
    return out


@pytest.mark.parametrize(("name", "side", "padding", "flips"), [("pets", 32, 4, True), ("digits", 8, 1, False)])
def test_a_batch_is_padded_cropped_flipped_and_centred(tmp_path, name, side, padding, flips):
    if name == "pets":
        write_images(tmp_path / "pets", train=10, side=side)
    dataset = data.load(name, tmp_path)
    batches = data.Batches(dataset, 16, seed=3)
    images, labels = batches(5)
    indices, (rows, columns, mirrored) = batches.indices(5), batches.augmentation(5)
    assert images.shape == (16, 3, side, side)
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert mirrored.any() == flips
    assert set(rows) | set(columns) <= set(range(2 * padding + 1))
    for number, index in enumerate(indices):
        expected = crop_by_hand(
            dataset.train.pixels[index], padding, rows[number], columns[number], mirrored[number], dataset.mean
        )
        np.testing.assert_allclose(images[number], expected, atol=1e-6)
        assert labels[number] == dataset.train.labels[index]


def test_all_shifts_and_both_sides_occur():
    batches = data.Batches(data.load("digits"), 128, seed=0)
    rows, columns, mirrored = (np.concatenate(part) for part in zip(*map(batches.augmentation, range(20)), strict=True))
    assert set(rows) == set(columns) == {0, 1, 2}
    assert not mirrored.any()


def test_an_epoch_shows_every_image_once_and_each_in_another_order():
    batches = data.Batches(data.load("digits"), 100, seed=1)
    stream = np.concatenate([batches.indices(iteration) for iteration in range(30)])
    first, second = stream[:1437], stream[1437:2874]
    assert sorted(first) == sorted(second) == list(range(1437))
    assert not np.array_equal(first, second)


def test_a_batch_is_a_pure_function_of_seed_and_iteration():
    digits = data.load("digits")
    forward, backward = data.Batches(digits, 128, seed=7), data.Batches(digits, 128, seed=7)
    expected = {iteration: forward(iteration) for iteration in range(30)}
    for iteration in reversed(range(30)):
        images, labels = backward(iteration)
        assert torch.equal(images, expected[iteration][0])
        assert torch.equal(labels, expected[iteration][1])
    other = data.Batches(digits, 128, seed=8)
    assert not np.array_equal(other.indices(0), forward.indices(0))
    assert not np.array_equal(other.augmentation(0)[0], forward.augmentation(0)[0])


def test_a_held_out_part_is_disjoint_and_leaves_the_mean_to_the_rest():
    digits = data.load("digits")
    held = digits.hold_out(137)
    assert len(held.validation.labels) == 137
    assert len(held.train.labels) == 1300
    together = np.concatenate([held.train.pixels, held.validation.pixels]).reshape(1437, -1)
    assert sorted(map(bytes, together)) == sorted(map(bytes, digits.train.pixels.reshape(1437, -1)))
    np.testing.assert_allclose(held.mean, held.train.pixels.astype(float).mean(0), rtol=1e-6)
    assert held.fingerprint != digits.fingerprint
    assert digits.hold_out(0) is digits
    with pytest.raises(ValueError, match="holdout 1437: digits has 1437 training images"):
        digits.hold_out(1437)
