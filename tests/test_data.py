import hashlib
import http.server
import io
import itertools
import os
import pickle
import shutil
import struct
import tarfile
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import ROOT, write_images
from PIL import Image

from replication import data, paper
from replication.data import cifar, imagenet
from replication.engine import files


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


@pytest.mark.parametrize(
    ("names", "expected", "told"),
    [
        ([str(number) for number in range(12)], [str(number) for number in range(12)], True),
        (["9", "010", "1", "2"], ["1", "2", "9", "010"], True),
        (["9", "10", "1e"], ["10", "1e", "9"], False),
        (["10", "9", "-1"], ["-1", "10", "9"], False),
        (["01", "10", "02"], ["01", "02", "10"], False),
        ([str(number) for number in range(10)], [str(number) for number in range(10)], False),
    ],
)
def test_classes_that_are_numbers_are_sorted_by_number(names, expected, told, tmp_path, capsys):
    pixels = write_images(tmp_path / "pets", classes=names, train=1, test=1)
    for progress in (False, True, True):
        pets = data.load("pets", tmp_path, progress)
        assert pets.classes == tuple(expected)
        for name, image in zip(expected, pets.test.pixels, strict=True):
            assert np.array_equal(image, pixels[tmp_path / "pets" / "test" / name / "0.png"])
        assert pets.test.labels.tolist() == [*range(len(names))]
    said = f"{tmp_path / 'pets'}: the classes are numbers and sorted as such: {', '.join(expected[:3])}, ...\n"
    assert capsys.readouterr().out == (said if told else "")


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
    monkeypatch.setattr(data.folders, "_decode", lambda *_: pytest.fail("decoded again"))
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


def spoil_first_size(folder):
    Image.new("RGB", (12, 12)).save(folder / "train" / "cat" / "0.png")


def spoil_pipe(folder):
    os.mkfifo(folder / "train" / "cat" / "6.png")  # to read it would take for ever


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
        (spoil_first_size, "train/cat/0.png is 12x12, train/cat/1.png is 8x8: resize it, .* of one size$"),
        (spoil_pipe, "train/cat/6.png is no file: move its images up and remove it$"),
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


def test_all_that_is_wrong_with_a_folder_is_said_at_once(pets):
    data.load("pets", pets)  # also where a cache is left
    folder = pets / "pets"
    Image.new("RGB", (8, 8)).save(folder / "test" / "dog" / "3.png")  # most of the part are of this size
    for number in range(3):
        (folder / "train" / "dog" / f"more{number}").mkdir()
        (folder / "test" / f"list{number}.txt").write_text("a list")
        (folder / "train" / "cat" / f"{number}.png").write_text("no image")
        Image.new("RGB", (12, 12)).save(folder / "test" / "cat" / f"{number}.png")
    with pytest.raises(ValueError, match="cannot be used") as raised:
        data.load("pets", pets)
    expected = [f"train/dog/more{number} is no file: move its images up and remove it" for number in range(3)]
    expected += [f"test/list{number}.txt lies beside the class folders: move" for number in range(3)]
    expected += [f"train/cat/{number}.png cannot be read as an image (cannot identify" for number in range(3)]
    expected += ["test/cat/0.png is 12x12, test/dog/0.png is 8x8: resize it, all images must be of one size"]
    for line, words in zip(
        str(raised.value).split("\n  "), [f"{folder} cannot be used:", *expected, "and 2 more"], strict=True
    ):
        assert line.startswith(words)


JUNK = ("Thumbs.db", "desktop.ini", "Desktop.ini", ".DS_Store", "._0.png", "@eaDir", "__MACOSX", "Icon\r", "#recycle")


@pytest.mark.parametrize("name", ["pets", "imagenet-small"])
def test_what_systems_leave_in_folders_is_skipped(name, pets, photographs):
    before = data.load(name, pets)
    for folder in [pets / name, *(pets / name).glob("*/"), *(pets / name).glob("*/*/")]:
        for junk in JUNK:
            if junk in ("@eaDir", "__MACOSX", "#recycle"):
                (folder / junk / "0.png").mkdir(parents=True)
            elif not (folder / junk).exists():  # "desktop.ini" is "Desktop.ini" on some file systems
                (folder / junk).write_text("junk")
    after = data.load(name, pets)
    assert (after.classes, after.fingerprint) == (before.classes, before.fingerprint)
    assert after.unreadable() == {}


def test_an_unknown_data_set_is_answered_with_the_choices(pets):
    with pytest.raises(ValueError, match=r"choose digits, cifar10, cifar100, pets \(did you mean 'digits'\?\)"):
        data.load("digit", pets)


def tiff(order, bits, content, kind=1, photometric=1):
    """An uncompressed TIFF, one row of grey; ``kind``: 1 unsigned, 2 signed, 3 floating-point."""
    count, mark = len(content) * 8 // bits, "<" if order == b"II" else ">"
    tags = {256: count, 257: 1, 258: bits, 259: 1, 262: photometric, 273: 134, 277: 1, 278: 1, 279: len(content)}
    rows = [struct.pack(f"{mark}HHII", tag, 4, 1, value) for tag, value in (tags | {339: kind}).items()]
    return order + struct.pack(f"{mark}HIH", 42, 8, len(rows)) + b"".join(rows) + bytes(4) + content


def png(bits, colour, row, *chunks):
    """A PNG of 4 pixels in one row; ``colour``: 0 grey, 2 RGB, 3 palette, 4 grey and alpha, 6 RGB and alpha."""
    header = (b"IHDR", struct.pack(">IIBBBBB", 4, 1, bits, colour, 0, 0, 0))
    packed = [header, *chunks, (b"IDAT", zlib.compress(b"\0" + row)), (b"IEND", b"")]
    parts = [
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in packed
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def saved(mode, pixels, kind, **options):
    """A file that Pillow writes: four pixels in a row."""
    content = io.BytesIO()
    image = Image.new(mode, (4, 1))
    for place, pixel in enumerate(pixels):
        image.putpixel((place, 0), pixel)
    image.save(content, kind, **options)
    return content.getvalue()


CARDS = ("SIMPLE  = T", "BITPIX  = 16", "NAXIS   = 2", "NAXIS1  = 4", "NAXIS2  = 1", "END")
FITS = "".join(card.ljust(80) for card in CARDS).ljust(2880).encode()  # of signed values
DEEP = (0, 4043, 19955, 65535)
LITTLE, BIG = struct.pack("<4H", *DEEP), struct.pack(">4H", *DEEP)
SCALED = [0, 16, 78, 255]  # divided by 257: 15.73 and 77.65
COLOURS = (0, 257, 514, 4043, 4043, 19955, 65535, 0, 65535, 255, 65280, 32768)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (png(1, 0, b"\x50"), [0, 255, 0, 255]),
        (png(2, 0, b"\x1b"), [0, 85, 170, 255]),
        (png(4, 0, b"\x01\x8f"), [0, 17, 136, 255]),
        (png(8, 0, b"\x00\x01\x80\xff"), [0, 1, 128, 255]),
        (png(16, 0, BIG), SCALED),
        (png(16, 0, BIG, (b"tRNS", b"\x00\x00")), SCALED),
        (png(8, 4, bytes([0, 255, 9, 0, 80, 128, 255, 0])), [0, 9, 80, 255]),
        (png(2, 3, b"\x1b", (b"PLTE", bytes(range(12))), (b"tRNS", b"\x00\x80")), [*range(12)]),
        (png(8, 6, bytes([1, 2, 3, 0, 4, 5, 6, 9, 7, 8, 9, 255, 0, 1, 2, 3])), [1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2]),
        (tiff(b"II", 16, LITTLE), SCALED),
        (tiff(b"MM", 16, BIG), SCALED),
        (tiff(b"II", 16, LITTLE, photometric=0), [255, 239, 177, 0]),
        (tiff(b"II", 12, bytes.fromhex("0000ff800fff")), [0, 16, 128, 255]),  # 15.88 and 127.53
        (tiff(b"MM", 8, b"\x00\x01\x80\xff", photometric=0), [255, 254, 127, 0]),
        (b"P5 4 1 255\n\x00\x01\x80\xff", [0, 1, 128, 255]),
        (b"P5 4 1 65535\n" + BIG, SCALED),
        (b"P5 4 1 1000\n" + struct.pack(">4H", 0, 200, 250, 1000), [0, 51, 64, 255]),  # 63.75
        (b"P2 4 1 1000\n0 200 250 1000\n", [0, 51, 64, 255]),
        (b"P4 4 1\n\xa0", [0, 255, 0, 255]),
        (saved("I;16", DEEP, "JPEG2000"), SCALED),
        (
            saved("CMYK", [(0, 0, 0, 0), (255, 0, 0, 0), (0, 0, 255, 0), (9, 9, 9, 255)], "TIFF"),
            [255] * 3 + [0] + [255] * 4 + [0] * 4,
        ),
    ],
)
def test_every_mode_is_scaled_to_8_bits_by_its_range(content, expected, tmp_path):
    """Both for small images and for photographs."""
    pixels = np.array(expected, np.uint8).reshape(1, 4, -1) * np.ones(3, np.uint8)
    for part, name in itertools.product(("train", "test"), ("a", "b")):
        path = tmp_path / "deep" / part / name / "0"
        path.parent.mkdir(parents=True)
        path.write_bytes(content)
    assert data.load("deep", tmp_path).train.pixels[1].tolist() == pixels.tolist()
    assert np.asarray(imagenet.open_image(path, 256)[0]).tolist() == pixels.tolist()


@pytest.mark.parametrize(
    ("content", "exact"),
    [
        (png(16, 2, struct.pack(">12H", *COLOURS)), [value / 257 for value in COLOURS]),
        (saved("LAB", [(value, 128, 128) for value in (0, 255, 128, 192)], "TIFF"), np.repeat([0, 255, 119, 185], 3)),
    ],
)
def test_colours_are_right_to_the_next_value(content, exact, tmp_path):
    """Of 16 bits Pillow reads the upper 8; L* of 50.2 and 75.3 is 119 and 185.3 in sRGB (CIE 15, IEC 61966-2-1)."""
    (tmp_path / "0").write_bytes(content)
    pixels = np.asarray(imagenet.open_image(tmp_path / "0", 256)[0])
    assert np.abs(pixels.ravel() - np.array(exact)).max() <= 1


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (tiff(b"II", 32, struct.pack("<4f", 0, 0.2, 0.5, 1), kind=3), "mode F of TIFF"),
        (tiff(b"II", 32, struct.pack("<4I", 0, 1, 2, 2**32 - 1)), "mode I of TIFF"),
        (tiff(b"MM", 16, BIG, kind=2), "mode I of TIFF"),
        (tiff(b"II", 8, b"\x00\x01\x80\xff", kind=2), "mode L of TIFF"),
        (b"Pf 4 1 -1.0\n" + struct.pack("<4f", 0, 0.2, 0.5, 1), "mode F of PPM"),
        (FITS + struct.pack(">4h", 0, 4043, 19955, -1), "mode I;16 of FITS"),
    ],
)
def test_values_without_a_known_range_are_refused_by_name(content, named, pets):
    path = pets / "pets" / "train" / "cat" / "0.png"
    path.write_bytes(content)
    message = f"{named} has no known range of values: save it in 8 or 16 unsigned bits"
    with pytest.raises(ValueError, match=f"train/cat/0.png cannot be read as an image .{message}.: replace or remove"):
        data.load("pets", pets)
    with pytest.raises(ValueError, match=message):
        imagenet.open_image(path, 256)


@pytest.mark.parametrize("name", data.BUILT_IN)
def test_a_folder_that_bears_a_built_in_name_is_refused(name, tmp_path, monkeypatch, offline):
    write_images(tmp_path / name)
    for _ in range(2):
        assert data.present(name, tmp_path)
        with pytest.raises(ValueError, match=f"{tmp_path / name}: '{name}' is the built-in data set, rename") as raised:
            data.load(name, tmp_path)
        assert f"another name, such as 'my-{name}'" in str(raised.value)
        folders = [form.folder for form in cifar.FORMS.get(name, ())]
        assert all(f"{folder}/" in str(raised.value) for folder in folders)
        if folders and not (tmp_path / folders[0]).exists():
            write_cifar(name, tmp_path, monkeypatch)  # also where the official files are there
    assert not offline
    (tmp_path / name).rename(tmp_path / f"my-{name}")
    assert data.load(f"my-{name}", tmp_path).classes == ("cat", "dog")
    assert len(data.load(name, tmp_path).classes) in (10, 100)


@pytest.mark.parametrize("name", ["../pets", "", "a/b", ".cache", "a" * 65, "a__b", "pets ", "döner", "-pets"])
def test_unsafe_names_are_refused(name, pets):
    with pytest.raises(ValueError, match="dataset"):
        data.load(name, pets)


def write_cifar(name, root, monkeypatch):
    """Small files of both versions of a CIFAR data set with the same images: their pixels as stored, and their labels.

    The checksums are those of these files; the real ones cannot be had here.
    """
    generator, forms = np.random.default_rng(0), []
    parts = len(cifar.FORMS[name][0].checksums)
    stored = generator.integers(0, 256, (parts, 2, 3072), dtype=np.uint8)
    fine, coarse = generator.integers(0, 10, (2, parts, 2), dtype=np.uint8)
    for form in cifar.FORMS[name]:
        folder, sums = root / form.folder, {}
        folder.mkdir(parents=True)
        for part, file in enumerate(form.checksums):
            if form.algorithm == "md5":
                key = "fine_labels" if name == "cifar100" else "labels"
                content = pickle.dumps({"data": stored[part], key: fine[part].tolist()})
            else:
                before = [coarse[part], fine[part]] if name == "cifar100" else [fine[part]]
                content = np.column_stack([*before, stored[part]]).tobytes()
            (folder / file).write_bytes(content)
            sums[file] = hashlib.new(form.algorithm, content).hexdigest()
        forms.append(form._replace(checksums=sums))
    monkeypatch.setitem(cifar.FORMS, name, tuple(forms))
    return stored, fine


def pack(root, form):
    """Replace the folder of a form by its archive."""
    with tarfile.open(root / form.archive, "w:gz") as archive:
        archive.add(root / form.folder, form.folder)
    shutil.rmtree(root / form.folder)


@pytest.fixture
def offline(monkeypatch):
    """No download succeeds, and the ones that were tried are listed."""
    from torchvision import datasets

    asked = []

    def refuse(*arguments):
        asked.append(arguments)
        raise OSError("no network")

    monkeypatch.setattr(datasets.utils, "download_url", refuse)
    return asked


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_is_the_same_in_every_official_form(name, tmp_path, monkeypatch, offline):
    stored, labels = write_cifar(name, tmp_path / "whole", monkeypatch)
    fingerprints = set()
    for number, archived in itertools.product((0, 1), (False, True)):
        form, root = cifar.FORMS[name][number], tmp_path / f"{number}{archived}"
        shutil.copytree(tmp_path / "whole" / form.folder, root / form.folder)
        if archived:
            pack(root, form)
        assert data.present(name, root)
        before = sorted(root.rglob("*"))
        dataset = data.load(name, root)
        assert sorted(root.rglob("*")) == before  # nothing is unpacked, nothing written
        fingerprints.add(dataset.fingerprint)
        # A row of a file is 1024 red, 1024 green and 1024 blue values, each row by row.
        train = stored[:-1].reshape(-1, 3072)
        for image, row in zip(dataset.train.pixels, train, strict=True):
            for channel in range(3):
                assert np.array_equal(image[..., channel].ravel(), row[1024 * channel : 1024 * (channel + 1)])
        assert dataset.train.labels.tolist() == labels[:-1].ravel().tolist()
        assert dataset.test.labels.tolist() == labels[-1].tolist()
    assert len(fingerprints) == 1
    assert not offline


@pytest.mark.skipif(not data.present("cifar10", ROOT / "data"), reason="CIFAR-10 is not in data/")
def test_cifar10s_original_pixels_have_the_fingerprint_of_the_papers_conditions():
    fingerprint = data.load("cifar10", ROOT / "data").fingerprint
    assert fingerprint == "f68bb3dbbcc03c71a1f0ab9956e7fca99aa0acbc9a8f25c2a756622e984c9759"
    assert fingerprint.startswith(paper.TABLE_6.conditions["fingerprint"])


def test_cifars_classes_are_in_the_order_of_their_labels():
    ten, hundred = (cifar.CLASSES[name].split() for name in ("cifar10", "cifar100"))
    assert ten == ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    assert len(set(hundred)) == 100
    assert hundred == sorted(hundred)


def test_cifars_checksums_are_those_torchvision_knows():
    from torchvision import datasets

    for name, kind in (("cifar10", datasets.CIFAR10), ("cifar100", datasets.CIFAR100)):
        form = cifar.FORMS[name][0]
        assert [*form.checksums.items()] == [tuple(each) for each in kind.train_list + kind.test_list]
        assert (form.folder, form.archive) == (kind.base_folder, kind.filename)


def damage_content(path):
    content = path.read_bytes()
    path.write_bytes(content[:-7] + bytes([content[-7] ^ 1]) + content[-6:])


def damage_length(path):
    path.write_bytes(path.read_bytes()[:1000])


def damage_by_removal(path):
    path.unlink()


def damage_by_a_folder(path):
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("archived", [False, True])
@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (damage_content, "is not as published: its [0-9,]+ bytes have the (md5|sha1) sum [0-9a-f]+, not [0-9a-f]+"),
        (damage_length, "is not as published: its 1,000 bytes have"),
        (damage_by_removal, "is missing"),
        (damage_by_a_folder, "is missing"),
    ],
)
def test_a_cifar_file_that_differs_is_named(name, number, archived, damage, words, tmp_path, monkeypatch, offline):
    write_cifar(name, tmp_path / "whole", monkeypatch)
    form, root = cifar.FORMS[name][number], tmp_path / "data"
    place = root / (form.archive if archived else form.folder)
    shutil.copytree(tmp_path / "whole" / form.folder, root / form.folder)
    file = list(form.checksums)[-2]
    damage(root / form.folder / file)
    if archived:
        pack(root, form)
    before = sorted(root.rglob("*"))
    told = f"{form.folder}/{file} in {place}" if archived else f"{place}/{file}"
    with pytest.raises(ValueError, match=f"{told} {words}") as raised:
        data.load(name, root)
    remedy = (
        f"Put the published {'archive' if archived else 'file'} there, or remove {place}: then another official form"
    )
    assert remedy in str(raised.value)
    assert sorted(root.rglob("*")) == before
    assert not offline


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("spoil", [damage_length, lambda path: path.write_text("<html>not found</html>")])
def test_an_archive_that_is_cut_off_or_something_else_is_named(number, spoil, tmp_path, monkeypatch, offline):
    write_cifar("cifar10", tmp_path, monkeypatch)
    for form in cifar.FORMS["cifar10"]:
        pack(tmp_path, form)
    form = cifar.FORMS["cifar10"][number]
    spoil(tmp_path / form.archive)
    (tmp_path / cifar.FORMS["cifar10"][1 - number].archive).unlink()
    with pytest.raises(
        ValueError, match=f"{tmp_path / form.archive} is damaged or not complete .*published archive there"
    ):
        data.load("cifar10", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [form.archive]
    assert not offline


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_that_cannot_be_downloaded_says_where_to_put_which_forms(name, tmp_path, offline):
    with pytest.raises(ValueError, match=r"could not be downloaded \(no network\): put one of its official") as raised:
        data.load(name, tmp_path)
    forms = cifar.FORMS[name]
    assert all(part in str(raised.value) for form in forms for part in (form.folder, form.archive, str(tmp_path)))
    assert len(offline) == 1
    assert not data.present(name, tmp_path)


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server that has a small CIFAR-10, all checksums right; the list of the downloads that were asked for."""
    from torchvision import datasets

    source, asked, kind = tmp_path / "source", [], datasets.CIFAR10
    write_cifar("cifar10", source, monkeypatch)
    form = cifar.FORMS["cifar10"][0]
    pack(source, form)
    monkeypatch.setattr(kind, "tgz_md5", hashlib.md5((source / form.archive).read_bytes()).hexdigest())

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


def test_of_two_that_want_cifar_one_downloads_it(server, tmp_path, capsys):
    root = tmp_path / "data"
    (root / ".cache").mkdir(parents=True)
    (root / ".cache" / "cifar-10-python.tar.gz").write_bytes(b"half of it")  # left by a download that was killed
    with ThreadPoolExecutor(2) as executor:
        one, other = executor.map(data.load, ["cifar10"] * 2, [root] * 2)
    assert one.fingerprint == other.fingerprint
    assert len(server) == 2  # torchvision asks for where it is, then for it
    assert "cifar10 is being downloaded by process" in capsys.readouterr().out
    assert data.load("cifar10", root).fingerprint == one.fingerprint
    assert len(server) == 2
    assert sorted(path.name for path in root.iterdir()) == [".cache", "cifar-10-python.tar.gz"]


def test_a_download_that_arrives_damaged_is_not_kept(server, tmp_path, monkeypatch):
    from torchvision import datasets

    monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", "0" * 32)
    with pytest.raises(ValueError, match=r"could not be downloaded .*corrupted"):
        data.load("cifar10", tmp_path / "data")
    assert not data.present("cifar10", tmp_path / "data")


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
def test_a_batch_is_padded_cropped_flipped_and_normalized(tmp_path, name, side, padding, flips):
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
