"""Photographs in ImageNet's layout: what is read of them, and the batches made of them."""

import itertools
import os
import resource
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import write_photographs
from PIL import Image
from torchvision.transforms import v2

from replication import Run, data, evaluate, recipes, trainers
from replication.data import imagenet


def photograph(path):
    with Image.open(path) as image:
        return image.convert("RGB")


def paths_of(dataset, files):
    return [dataset.folder / os.fsdecode(path) for path in files.paths]


def batches(dataset, **options):
    return dataset.batches(4, seed=3, **({"workers": 0} | options))


def test_classes_are_in_the_order_of_their_synsets(photographs):
    dataset = data.load("imagenet-small", photographs)
    assert dataset.classes == ("n00000001", "n00000002", "n00000003")
    assert (len(dataset.train.labels), len(dataset.test.labels)) == (15, 6)
    for files, part in ((dataset.train, "train"), (dataset.test, "val")):
        for path, label in zip(paths_of(dataset, files), files.labels, strict=True):
            assert path.is_file()
            assert path.parts[-3:-1] == (part, dataset.classes[label])


def test_classes_that_are_numbers_are_in_their_order_in_both_parts(photographs, capsys):
    folder = photographs / "imagenet-small"
    for path in folder.glob("*/n*"):
        path.rename(path.with_name({"1": "10", "2": "9", "3": "0"}[path.name[-1]]))
    for kept in (("train", "val"), ("val",)):  # weights of others are tested on val/ alone
        if len(kept) == 1:
            (folder / "train").rename(folder.parent / "elsewhere")
        dataset = data.load("imagenet-small", photographs)
        assert dataset.classes == ("0", "9", "10")
        for path, label in zip(paths_of(dataset, dataset.test), dataset.test.labels, strict=True):
            assert path.is_file()
            assert path.parent.name == dataset.classes[label]
    assert (
        capsys.readouterr().out.count("imagenet-small: the classes are numbers and sorted as such: 0, 9, 10, ...") == 1
    )


def test_the_fingerprint_is_that_of_names_and_sizes(photographs):
    first = data.load("imagenet-small", photographs)
    assert data.load("imagenet-small", photographs).fingerprint == first.fingerprint
    path = paths_of(first, first.train)[0]
    path.write_bytes(path.read_bytes() + b" ")
    assert data.load("imagenet-small", photographs).fingerprint != first.fingerprint


def test_mean_and_components_are_those_of_the_central_crops(photographs):
    dataset = data.load("imagenet-small", photographs)
    crop = v2.Compose([v2.Resize(256), v2.CenterCrop(224)])
    images = [np.asarray(crop(photograph(path))) for path in paths_of(dataset, dataset.train)]
    pixels = np.stack(images).astype(np.float64)
    np.testing.assert_allclose(dataset.mean, pixels.mean(0), rtol=1e-6)
    covariance = np.cov(pixels.reshape(-1, 3).T / 255, bias=True)
    values, vectors = np.linalg.eig(covariance)
    for component, place in zip(dataset.components, np.argsort(values)[::-1], strict=True):
        assert np.linalg.norm(component) == pytest.approx(values[place], rel=1e-4)
        assert abs(component @ vectors[:, place]) == pytest.approx(values[place], rel=1e-4)


def test_the_mean_is_computed_once(photographs, monkeypatch):
    first = data.load("imagenet-small", photographs).mean
    monkeypatch.setattr(imagenet, "read", lambda *_: pytest.fail("read again"))
    assert np.array_equal(data.load("imagenet-small", photographs).mean, first)


def test_a_mean_that_cannot_be_kept_is_refused_before_the_images_are_read(photographs, monkeypatch):
    (photographs / ".cache").write_text("a file where the folder should be")
    monkeypatch.setattr(imagenet, "read", lambda *_: pytest.fail("read"))
    with pytest.raises(ValueError, match=r"cannot be written .*symbolic link"):
        data.load("imagenet-small", photographs).unreadable()


def test_held_out_files_have_a_mean_of_their_own(photographs):
    dataset = data.load("imagenet-small", photographs)
    part = dataset.hold_out(5)
    assert (len(part.train.labels), len(part.validation.labels)) == (10, 5)
    assert set(part.train.paths) | set(part.validation.paths) == set(dataset.train.paths)
    assert not np.array_equal(part.mean, dataset.mean)
    assert len(list((photographs / ".cache").iterdir())) == 2


@pytest.mark.parametrize("size", [(300, 260), (375, 500), (260, 255), (120, 90)])
@pytest.mark.parametrize("side", [256, 333, 480])
def test_a_crop_is_that_of_the_resized_photograph(tmp_path, size, side):
    """Only the outermost pixels may differ: there, the whole photograph has neighbours that the crop has not."""
    rough = np.random.default_rng(0).integers(0, 256, (9, 8, 3), dtype=np.uint8)
    Image.fromarray(rough).resize(size, Image.Resampling.BICUBIC).save(tmp_path / "a.png")
    resized = v2.functional.resize(photograph(tmp_path / "a.png"), [side])
    for corner, mirrored in (((0, 0), False), ((0.3, 0.999), True), ((0.999, 0.5), False)):
        top, left = (int(part * (length - 223)) for part, length in zip(corner, resized.size[::-1], strict=True))
        expected = np.asarray(resized)[top : top + 224, left : left + 224]
        if mirrored:
            expected = expected[:, ::-1]
        seen = imagenet.random_crop(tmp_path / "a.png", side, corner, mirrored).numpy()
        assert seen.shape == (224, 224, 3)
        difference = np.abs(seen[2:-2, 2:-2].astype(int) - expected[2:-2, 2:-2])
        assert difference.max() <= 2  # resampled in two passes, each rounded
        assert difference.mean() < 0.05


def test_decoding_at_a_fraction_changes_nothing_but_resampling(tmp_path):
    rough = np.random.default_rng(0).integers(0, 256, (9, 8, 3), dtype=np.uint8)
    Image.fromarray(rough).resize((1600, 1200), Image.Resampling.BICUBIC).save(tmp_path / "a.JPEG", quality=95)
    reduced, size = imagenet.open_image(tmp_path / "a.JPEG", 256)
    assert size == (341, 256)
    assert reduced.size == (400, 300)  # a quarter, still more than is needed
    expected = v2.functional.center_crop(v2.functional.resize(photograph(tmp_path / "a.JPEG"), [256]), [224])
    seen = imagenet.random_crop(tmp_path / "a.JPEG", 256, (16 / 32.5, 58 / 117.5), False).numpy()
    assert np.abs(seen.astype(int) - np.asarray(expected)).mean() < 1


def test_crops_and_sides_are_spread_as_in_section_3_4(photographs, monkeypatch):
    dataset, drawn = data.load("imagenet-small", photographs), []
    monkeypatch.setattr(imagenet, "random_crop", lambda path, *how: drawn.append(how) or torch.zeros(1))
    reader = dataset.batches(4, seed=0).reader
    for place in range(4000):
        reader[place, 0]
    sides, corners, mirrored = zip(*drawn, strict=True)
    assert (min(sides), max(sides)) == (256, 480)
    assert np.mean(sides) == pytest.approx(368, abs=4)
    assert np.mean(mirrored) == pytest.approx(0.5, abs=0.03)
    np.testing.assert_allclose(np.mean(corners, 0), 0.5, atol=0.02)
    assert 0 <= np.min(corners) < 0.01
    assert 0.99 < np.max(corners) < 1


def test_colours_are_shifted_along_their_principal_components(photographs):
    """Krizhevsky et al. 2012: every image by sum of alpha times eigenvalue times vector, alpha of deviation 0.1."""
    for path in (photographs / "imagenet-small" / "train").glob("*/*"):
        image = photograph(path)  # colours that go together, as in nature
        Image.blend(image.convert("L").convert("RGB"), image, 0.3).save(path)
    dataset = data.load("imagenet-small", photographs)
    stream = dataset.batches(8, seed=0, workers=0)
    shifts = []
    for iteration in range(3):
        images, _ = stream(iteration)
        for place, index, image in zip(itertools.count(8 * iteration), stream.indices(iteration), images, strict=False):
            pixels, *_ = stream.reader[place, index]
            difference = image.permute(1, 2, 0) - (pixels - torch.from_numpy(dataset.mean)) / 255
            assert difference.std((0, 1)).max() < 1e-6  # one colour for the whole image
            shifts.append(difference.mean((0, 1)))
    assert len({tuple(shift.tolist()) for shift in shifts}) == 24
    drawn = np.stack([stream.reader[place, 0][2] for place in range(1000)]) @ dataset.components
    covariance = np.cov(np.concatenate([part.reshape(-1, 3) for part in pixels_of(dataset)]).T / 255, bias=True)
    np.testing.assert_allclose(np.cov(drawn.T), 0.01 * covariance @ covariance, rtol=0.15)


def pixels_of(dataset):
    crop = v2.Compose([v2.Resize(256), v2.CenterCrop(224)])
    return [np.asarray(crop(photograph(path))) for path in paths_of(dataset, dataset.train)]


def test_batches_are_the_same_for_any_number_of_workers_and_processes_and_any_start(photographs):
    dataset = data.load("imagenet-small", photographs)
    alone = batches(dataset)
    expected = [alone(iteration) for iteration in range(5)]
    assert sorted(np.concatenate([alone.indices(iteration) for iteration in range(4)])[:15]) == list(range(15))
    for workers in (1, 2):
        stream = batches(dataset, workers=workers, iterations=5)
        for iteration in (0, 1, 2, 3, 4, 2, 3):  # also a jump back, as after a resume
            assert_equal(stream(iteration), expected[iteration])
    shares = [batches(dataset, share=(process, 2)) for process in range(2)]
    for iteration in (3, 4):
        images, labels = zip(*[stream(iteration) for stream in shares], strict=True)
        assert_equal((torch.cat(images), torch.cat(labels)), expected[iteration])


def assert_equal(one, other):
    assert all(torch.equal(first, second) for first, second in zip(one, other, strict=True))


def test_batches_of_another_seed_differ(photographs):
    dataset = data.load("imagenet-small", photographs)
    assert not torch.equal(dataset.batches(4, seed=0, workers=0)(0)[0], dataset.batches(4, seed=1, workers=0)(0)[0])


@pytest.fixture
def damaged(photographs):
    """The same data set, where one training and one validation file end too soon."""
    paths = [photographs / "imagenet-small" / part / "n00000002" / "1.JPEG" for part in ("train", "val")]
    for path in paths:
        path.write_bytes(path.read_bytes()[:2000])
    return photographs, *paths


def test_an_unreadable_file_is_replaced_and_reported(damaged):
    root, *_ = damaged
    dataset = data.load("imagenet-small", root)
    assert list(dataset.unreadable()) == ["train/n00000002/1.JPEG"]
    stream, images = dataset.batches(5, seed=0, workers=1, iterations=3), []
    for iteration in range(3):
        images += stream(iteration)[0]
    assert len(images) == 15
    assert list(stream.unreadable) == ["train/n00000002/1.JPEG"]
    assert "truncated" in stream.unreadable["train/n00000002/1.JPEG"]
    batches = list(dataset.eval_batches(dataset.test))
    labels = torch.cat([labels for _, labels, _ in batches])
    failed = {path: error for *_, failures in batches for path, error in failures.items()}
    assert labels.tolist() == [0, 0, 1, 2, 2]
    assert list(failed) == ["val/n00000002/1.JPEG"]


NAMES = {  # of files, and as they are listed
    b"\xff\xfe": r"\udcff\udcfe",
    b"caf\xe9": r"caf\udce9",
    b"a\tb": r"a\tb",
    rb"a\tb": r"a\\tb",
    b"\na: b\r": r"\na: b\r",
    b"\x1b[31m": r"\x1b[31m",
    "\u202e'\"".encode(): r"\u202e\'" + '"',
    "Bär 熊".encode(): "Bär 熊",
}


def test_an_unreadable_file_is_listed_once_whatever_its_name(tmp_path, monkeypatch):
    write_photographs(tmp_path / "imagenet", classes=2, train=len(NAMES) + 1, val=len(NAMES) + 1, sizes=((40, 30),))
    expected = {part: {f"{part}/n00000001/{name}" for name in NAMES.values()} for part in ("train", "val")}
    for part, (number, name) in itertools.product(expected, enumerate(NAMES)):
        path = tmp_path / "imagenet" / part / "n00000001" / f"{number}.JPEG"
        path.write_bytes(path.read_bytes()[:300])
        try:
            path.rename(path.with_name(os.fsdecode(name)))
        except OSError:
            pytest.skip("this file system has no such names")
    for _ in range(2):  # the second time from the cache
        assert set(data.load("imagenet", tmp_path).unreadable()) == expected["train"]
    monkeypatch.setitem(recipes.RECIPES, "smoke", replace(recipes.RECIPES["smoke"], iterations=1, batch=2, bn_batch=2))
    record = trainers.train(Run("resnet-18", "imagenet", recipe="smoke"), tmp_path, tmp_path)
    assert record.summary["unreadable"] == 2 * len(NAMES)
    lines = (record.folder / "unreadable.txt").read_bytes().decode("utf-8").split("\n")
    listed = [f"{tmp_path}/imagenet/{path}" for path in sorted(set.union(*expected.values()))]
    assert [line.partition(": OSError: ")[0] for line in lines] == [*listed, ""]
    dataset = data.load("imagenet", tmp_path)
    stream = dataset.batches(18, seed=0, workers=0)
    stream(0)
    assert set(stream.unreadable) == expected["train"]
    for view in evaluate.EVAL_PROTOCOLS.values():
        failed = {}
        for *_, failures in imagenet.read(dataset, dataset.test, view, workers=0):
            failed |= failures
        assert set(failed) == expected["val"]
    path = tmp_path / "imagenet" / "train" / "n00000001" / os.fsdecode(b"caf\xe9")
    size = path.stat().st_size
    Image.new("RGB", (1, 1)).save(path, "GIF")
    path.write_bytes(path.read_bytes().ljust(size, b"\0"))  # repaired, and names and sizes tell no difference
    assert len(data.load("imagenet", tmp_path).unreadable()) == len(NAMES) - 1


def test_values_without_a_known_range_are_unreadable_by_name(photographs):
    path = photographs / "imagenet-small" / "train" / "n00000002" / "1.JPEG"
    Image.fromarray(np.zeros((300, 300), np.float32)).save(path, "TIFF")
    words = "ValueError: mode F of TIFF has no known range of values: save it in 8 or 16 unsigned bits"
    assert data.load("imagenet-small", photographs).unreadable() == {"train/n00000002/1.JPEG": words}


@pytest.mark.parametrize(
    ("size", "refused"),
    [
        ((600, 1), True),
        ((1, 600), True),
        ((2001, 100), True),
        ((9, 181), True),
        ((2000, 100), False),
        ((9, 180), False),
    ],
)
def test_a_strip_is_unreadable_in_training_mean_and_every_test(photographs, size, refused):
    for part in ("train", "val"):
        Image.new("RGB", size).save(photographs / "imagenet-small" / part / "n00000002" / "1.JPEG")
    dataset = data.load("imagenet-small", photographs)
    stream = dataset.batches(15, seed=0, workers=0)
    stream(0)
    words = f"ValueError: {size[0]}x{size[1]} pixels: one side is more than 20 times the other, crop it"
    expected = {"train/n00000002/1.JPEG": words} if refused else {}
    assert dataset.unreadable() == stream.unreadable == expected
    expected = {"val/n00000002/1.JPEG": words} if refused else {}
    for view in evaluate.EVAL_PROTOCOLS.values():
        failed = {}
        for *_, failures in imagenet.read(dataset, dataset.test, view, workers=0):
            failed |= failures
        assert failed == expected


def test_a_repaired_file_is_read_again(damaged):
    root, train, _ = damaged
    assert data.load("imagenet-small", root).unreadable()
    before = data.load("imagenet-small", root).mean
    Image.new("RGB", (64, 64), "white").save(train)
    train.write_bytes(train.read_bytes().ljust(2000, b" "))  # of the same size: names and sizes tell no difference
    repaired = data.load("imagenet-small", root)
    assert repaired.unreadable() == {}
    assert not np.array_equal(repaired.mean, before)


def test_a_disk_that_is_gone_is_no_matter_of_a_few_files(tmp_path):
    write_photographs(tmp_path / "imagenet-many", classes=2, train=60, val=60, sizes=((40, 30),))
    dataset = data.load("imagenet-many", tmp_path)
    stream = batches(dataset)
    dataset.folder.rename(tmp_path / "elsewhere")
    message = r"100 files in a row cannot be read, the last is .*disk"
    with pytest.raises(OSError, match=message):
        stream(0)
    with pytest.raises(OSError, match=message):
        list(dataset.eval_batches(dataset.test, workers=0))
    (tmp_path / ".cache" / "imagenet-many-120.npz").unlink()
    with pytest.raises(OSError, match=message):
        imagenet.ImageNet(*[getattr(dataset, name) for name in dataset.__dataclass_fields__]).unreadable()
    assert not list((tmp_path / ".cache").iterdir())


def remove_train(folder):
    (folder / "train").rename(folder.parent / "elsewhere")


def flatten_val(folder):
    for path in list((folder / "val").glob("*/*")):
        path.rename(folder / "val" / f"{path.parent.name}_{path.name}")
    for path in (folder / "val").glob("n*[0-9]"):
        path.rmdir()


def nest_classes(folder):
    for path in list(folder.glob("*/*/*")):  # as Tiny ImageNet does
        path.parent.joinpath("images").mkdir(exist_ok=True)
        path.rename(path.parent / "images" / path.name)
    for name in "abcde":
        (folder / "val" / "n00000001" / name).mkdir()


def remove_class(folder):
    (folder / "val" / "n00000001").rename(folder.parent / "elsewhere")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (remove_train, "has no folder train/: the mean of its images is needed"),
        (flatten_val, "has no folders <wnid>/: sort its images into them"),
        (nest_classes, r"cannot be used:\n  train/n00000001/images is no file: move .*(\n.*){9}\n  and 1 more$"),
        (remove_class, r"only train has \['n00000001'\]"),
    ],
)
def test_what_is_wrong_with_a_folder_is_said(photographs, spoil, message):
    spoil(photographs / "imagenet-small")
    with pytest.raises(ValueError, match=message):
        data.load("imagenet-small", photographs).unreadable()


def test_an_unknown_name_is_answered_with_folders_of_this_layout(photographs):
    with pytest.raises(ValueError, match=r"choose imagenet-smoke, imagenet-small \(did.*imagenet-smal/val/<class>/"):
        data.load("imagenet-smal", photographs)


def test_the_smoke_test_is_made_on_first_use(tmp_path):
    assert not data.present("imagenet-smoke", tmp_path)
    dataset = data.load("imagenet-smoke", tmp_path)
    assert len(dataset.classes) == 6
    modes = set()
    for path in paths_of(dataset, dataset.train):
        with Image.open(path) as image:
            modes.add(image.mode)
    assert modes == {"L", "CMYK", "RGB"}
    assert {path.name for path in tmp_path.iterdir()} == {"imagenet-smoke"}
    assert data.load("imagenet-smoke", tmp_path).fingerprint == dataset.fingerprint


def test_many_photographs_of_a_class_are_listed_in_the_order_of_their_names(tmp_path):
    write_photographs(tmp_path / "imagenet", classes=2, train=11, val=1, sizes=((40, 30),))
    dataset = data.load("imagenet", tmp_path)
    names = [path.name for path in paths_of(dataset, dataset.train)][:11]
    assert names == sorted(names)


def kill(_):
    os.kill(os.getpid(), signal.SIGKILL)


def leave(_):
    os._exit(0)


def share_no_memory(_):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))


def open_no_file(_):
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))


@pytest.mark.parametrize(
    "fail", [kill, share_no_memory, *(pytest.param(each, marks=pytest.mark.long) for each in (leave, open_no_file))]
)
def test_a_reader_that_dies_or_cannot_send_is_an_error(photographs, fail):
    """And no batch is waited for without end."""
    dataset = data.load("imagenet-small", photographs)

    def view(image):
        if torch.utils.data.get_worker_info() is not None:
            fail(image)
        return imagenet.central_crop(image)

    with pytest.raises(OSError, match=r"a process that reads photographs died .*: docker run --shm-size 16g"):
        list(imagenet.read(dataset, dataset.train, view, batch=4, workers=2))


def test_a_reader_that_dies_ends_training(photographs, tmp_path, monkeypatch):
    run = Run("resnet-18", "imagenet-small", recipe="smoke")
    monkeypatch.setattr(imagenet, "random_crop", lambda *_: os._exit(1))
    with pytest.raises(OSError, match="a process that reads photographs died"):
        trainers.train(run, tmp_path / "results", photographs)


def test_too_little_shared_memory_is_refused(tmp_path):
    """The folder is one of the disk's, with some free space."""
    space = os.statvfs(tmp_path)
    left = space.f_bavail * space.f_frsize
    imagenet.check_shared_memory(left // 2, tmp_path)
    imagenet.check_shared_memory(2**60, tmp_path / "not there")  # as on macOS
    with pytest.raises(OSError, match=r"has [\d,]+ MiB left, but .* need 1,099,511,627,776 MiB\. .* --shm-size 16g"):
        imagenet.check_shared_memory(2**60, tmp_path)


@pytest.mark.parametrize(
    ("view", "pixels"),
    [
        (imagenet.central_crop, 224**2),
        (evaluate.ten_crop, 10 * 224**2),
        (evaluate.multi_scale, sum(side * (side * 4 // 3) for side in (224, 256, 384, 480, 640))),
    ],
)
def test_shared_memory_is_asked_for_the_batches_in_flight(photographs, monkeypatch, view, pixels):
    """Two that each reader reads in advance and the one in use, or all there are; a pixel has three bytes."""
    dataset, asked = data.load("imagenet-small", photographs), []
    monkeypatch.setattr(imagenet, "check_shared_memory", asked.append)
    for batch, workers in ((2, 1), (2, 2), (8, 2), (99, 1), (2, 0)):
        next(imagenet.read(dataset, dataset.train, view, batch, workers))
    assert asked == [3 * pixels * images for images in (3 * 2, 5 * 2, 2 * 8, 1 * 15)]


def test_shared_memory_is_asked_for_the_training_batches_in_flight(photographs, monkeypatch):
    dataset, asked = data.load("imagenet-small", photographs), []
    assert dataset.unreadable() == {}  # the mean is cached
    monkeypatch.setattr(imagenet, "check_shared_memory", asked.append)
    for options in ({"iterations": None}, {"iterations": 9}, {"iterations": 2}, {"share": (1, 2)}):
        batches(dataset, workers=2, **options)(1)
    assert asked == [3 * 224**2 * images for images in (5 * 4, 5 * 4, 1 * 4, 5 * 2)]
