import io
import itertools
import json
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import tqdm.std
from conftest import Here, write_images
from PIL import Image

from replication import Run, data, evaluate, grid, models, recipes, run_all, trainers
from replication.data import imagenet as reading
from replication.engine import files, progress
from replication.models import NetName
from replication.runs import environment, recorder

SCHEDULE = 0.02  # 22 iterations on digits


def without_time(record):
    return record.history.drop(columns="seconds")


def weights(record):
    return torch.load(record.folder / "weights.pt", weights_only=True)


def assert_same(one, other):
    assert without_time(one).equals(without_time(other))
    assert one.layers.equals(other.layers)
    assert one.predictions.equals(other.predictions)
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("iterations", "test_images"), [(64_000, 10_000), (1_920, 10_000), (1_100, 360), (7, 360), (1, 1)]
)
def test_recordings_are_regular_and_include_the_end(iterations, test_images):
    recipe = replace(recipes.RECIPES["cifar"], iterations=iterations, milestones=())
    train, test, layers = recorder.recording_points(recipe, test_images)
    assert layers <= test <= train
    assert max(train) == max(test) == max(layers) == iterations
    assert min(5, iterations) <= len(layers) <= 10
    assert len(train) == min(100, iterations)
    assert min(10, iterations) <= len(test) <= 100
    gaps = [after - before for before, after in itertools.pairwise([0, *sorted(train)])]
    assert max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize("schedule", [1.0, 0.05, 0.001])
def test_a_plateau_of_the_test_error_is_judged_by_three_measurements(schedule):
    recipe = Run("resnet-18", "imagenet", schedule=schedule).settings
    _, test, _ = recorder.recording_points(recipe, 50_000)
    for start in range(0, recipe.iterations - recipe.plateau.patience, 7):
        assert sum(start < point <= start + recipe.plateau.patience for point in test) >= 3


def test_a_run_leaves_its_record(tmp_path):
    run = Run("resnet-8", schedule=SCHEDULE, holdout=100)
    record = trainers.train(run, tmp_path)
    assert {path.name for path in record.folder.iterdir()} == {
        *("run.json", "environment.json", "history.csv", "summary.json", "weights.pt"),
        *("layers.csv", "predictions.csv", "SHA256SUMS"),
    }
    summary, history = record.summary, record.history
    assert summary["iterations"] == 22
    assert summary["parameters"] == sum(parameter.numel() for parameter in models.cifar_net(8).parameters())
    assert summary["seconds"] > 0 < summary["images_per_second"]
    assert list(history)[:6] == ["iteration", "lr", "train_error", "train_loss", "test_error", "test_loss"]
    assert set(history) - {"val_error", "val_loss"} == set(history.columns[:6]) | {"seconds"}
    assert history["iteration"].iloc[-1] == 22
    assert history["seconds"].is_monotonic_increasing
    assert history["train_error"].between(0, 100).all()
    for name in ("train_error", "test_error", "val_error"):
        assert summary[name] == history[name].iloc[-1]
    assert list(record.layers["iteration"].unique()) == [0, *range(1, 23, 3)]  # when the test error was measured
    assert (record.layers.groupby("iteration")["layer"].apply(list).map(lambda layers: layers == [*range(1, 9)])).all()
    assert (record.predictions["label"] == data.load("digits").test.labels).all()
    wrong = record.predictions["label"] != record.predictions["predicted"]
    assert 100 * wrong.mean() == pytest.approx(summary["test_error"])
    assert record.fingerprint == data.load("digits").fingerprint
    assert json.loads((record.folder / "run.json").read_text())["id"] == run.id
    assert record.environment["torch"] == torch.__version__
    assert record.environment["threads"] == 1


def test_training_is_what_the_recipe_says(tmp_path):
    """Three iterations against gradient descent written out here, on weights and batches of its own making."""
    write_images(tmp_path / "data" / "pets", train=80)
    run = Run("resnet-8", "pets", schedule=4 / 64_000, seed=5)  # 4 iterations, divided at 2 and 3
    record = trainers.train(run, tmp_path, tmp_path / "data")
    dataset = data.load("pets", tmp_path / "data")
    batches = data.Batches(dataset, 128, seed=5)
    torch.manual_seed(5)
    net = models.cifar_net(8, classes=2)
    velocity = [torch.zeros_like(parameter) for parameter in net.parameters()]
    for iteration, rate in enumerate([0.1, 0.1, 0.01, 0.001]):
        images, labels = batches(iteration)
        logits = net(images.contiguous())
        loss = F.cross_entropy(logits, labels)
        gradients = torch.autograd.grad(loss, list(net.parameters()))
        error = 100 * (logits.argmax(1) != labels).float().mean().item()
        with torch.no_grad():
            for parameter, gradient, speed in zip(net.parameters(), gradients, velocity, strict=True):
                speed.mul_(0.9).add_(gradient + 1e-4 * parameter)
                parameter -= rate * speed
        row = record.history.iloc[iteration]
        assert row["lr"] == pytest.approx(rate)
        assert row["train_error"] == pytest.approx(error, abs=0.8)  # one image of 128
        assert row["train_loss"] == pytest.approx(loss.item(), rel=1e-3)
    for name, value in weights(record).items():
        counted = name.endswith("num_batches_tracked")  # by the trainer, not by batch norm
        expected = torch.tensor(4) if counted else net.state_dict()[name]
        torch.testing.assert_close(value, expected, rtol=1e-3, atol=1e-4, msg=name)


def test_images_need_not_be_square(tmp_path):
    for part, name in itertools.product(("train", "test"), ("cat", "dog")):
        (tmp_path / "pets" / part / name).mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (21, 10), (80 * number, 0, 0)).save(tmp_path / "pets" / part / name / f"{number}.png")
    dataset = data.load("pets", tmp_path)
    assert dataset.size == (10, 21)
    assert data.Batches(dataset, 4, seed=0)(0)[0].shape == (4, 3, 10, 21)
    assert trainers.train(Run("resnet-8", "pets", schedule=3e-5), tmp_path, tmp_path).summary["iterations"] == 2


def test_the_test_error_is_that_of_the_weights_left(tmp_path):
    record = trainers.train(Run("resnet-8", schedule=SCHEDULE), tmp_path)
    digits = data.load("digits")
    net = NetName.parse("resnet-8").build(10)
    net.load_state_dict(weights(record))
    net.eval()
    images = torch.from_numpy((digits.test.pixels - digits.mean) / 255).permute(0, 3, 1, 2)
    predicted = [int(net(image[None]).argmax()) for image in images]
    wrong = sum(guess != label for guess, label in zip(predicted, digits.test.labels, strict=True))
    assert record.summary["test_error"] == pytest.approx(100 * wrong / 360, abs=0.3)
    assert (record.predictions["predicted"] != predicted).sum() <= 1


def test_evaluation_leaves_the_net_in_its_mode():
    digits, net = data.load("digits"), models.cifar_net(8)
    for training in (True, False):
        evaluate.single_view(net.train(training), digits.eval_batches(digits.test))
        assert net.training == training


def test_evaluating_more_or_less_often_changes_nothing(tmp_path, monkeypatch):
    run = Run("resnet-8", schedule=SCHEDULE)
    often = trainers.train(run, tmp_path / "often")
    monkeypatch.setattr(recorder, "RECORDINGS", 2)
    monkeypatch.setattr(recorder, "MEASUREMENTS", 1)
    monkeypatch.setattr(recorder.Recorder, "measure_layers", lambda *_: None)
    seldom = trainers.train(run, tmp_path / "seldom")
    assert len(seldom.history) == 2
    assert seldom.layers.empty
    first, second = weights(often), weights(seldom)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_same_run_twice_is_bit_identical(tmp_path, precision):
    run = Run("plain-8", schedule=SCHEDULE, precision=precision)
    assert_same(trainers.train(run, tmp_path / "a"), trainers.train(run, tmp_path / "b"))


def test_seeds_differ_and_threads_are_put_back(tmp_path):
    before = torch.get_num_threads()
    state = torch.get_rng_state()
    records = [trainers.train(Run("plain-8", schedule=SCHEDULE, seed=seed), tmp_path) for seed in (0, 1)]
    assert not without_time(records[0]).equals(without_time(records[1]))
    assert torch.get_num_threads() == before
    assert torch.equal(torch.get_rng_state(), state)


def checkpoint(folder):
    """What the last checkpoint holds; None while there is none."""
    path = folder / "checkpoint.pt"
    return torch.load(io.BytesIO(files.read_sealed(path)), weights_only=True) if path.exists() else None


def test_a_run_that_diverges_ends_with_a_record_that_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(recipes.RECIPES, "digits", replace(recipes.RECIPES["digits"], lr=1e20))
    run = Run("plain-8", schedule=SCHEDULE)
    record = trainers.train(run, tmp_path)
    assert 0 < record.diverged < 22
    assert record.history["iteration"].tolist() == list(range(1, record.diverged + 1))
    assert record.history["train_error"].notna().all()
    assert record.history["train_loss"].isna().tolist() == [False] * (record.diverged - 1) + [True]
    assert (record.summary["train_error"], record.summary["test_error"]) == (None, None)
    said = f"diverged: the loss was no longer finite after {record.diverged} iterations, at 1e+20"
    assert record.summary["notes"] == [said]
    assert {path.name for path in record.folder.iterdir()} & {"weights.pt", "checkpoint.pt"} == set()
    capsys.readouterr()
    (again,) = run_all([run], tmp_path)  # it is finished, and not trained again
    assert again.summary == record.summary
    assert f"{run.id}: {said}" in capsys.readouterr().out


def test_threads_of_one_process_do_not_disturb_each_other(tmp_path):
    runs = grid(["plain-8"], seeds=[0, 1, 2], schedule=SCHEDULE)
    with ThreadPoolExecutor(3) as executor:
        together = list(executor.map(trainers.train, runs, [tmp_path / "together"] * 3))
    for record in together:
        assert_same(record, trainers.train(record.run, tmp_path / "alone"))


def test_a_checkpoint_of_other_images_is_refused(tmp_path, monkeypatch):
    write_images(tmp_path / "data" / "pets")
    run = Run("resnet-8", "pets", schedule=SCHEDULE / 60)
    monkeypatch.setattr(recorder, "CHECKPOINT_SECONDS", 0)
    monkeypatch.setattr(trainers.records, "write_summary", interrupt)
    with pytest.raises(KeyboardInterrupt):
        trainers.train(run, tmp_path, tmp_path / "data")
    monkeypatch.undo()
    write_images(tmp_path / "other" / "pets", seed=1)
    with pytest.raises(ValueError, match=r"checkpoint.pt was made from other images than 'pets' now holds: .*remove"):
        trainers.train(run, tmp_path, tmp_path / "other")


def interrupt(*_):
    """In place of writing the summary."""
    raise KeyboardInterrupt


def assert_rates_follow_from_the_rows_before(record):
    """So that the schedule, warm-up and plateau included, can be replayed from the history alone."""
    rows = record.history.astype(object).where(lambda cells: cells.notna(), None).to_dict("records")
    for number, row in enumerate(rows):
        assert row["lr"] == record.run.settings.learning_rate(row["iteration"] - 1, rows[:number])


def test_the_plateau_is_that_of_the_history(tmp_path):
    run = Run("resnet-8", recipe="note", schedule=6e-5)  # 36 iterations, patience 4
    record = trainers.train(run, tmp_path)
    assert record.history["lr"].nunique() > 1
    assert_rates_follow_from_the_rows_before(record)


def test_a_bar_fits_a_terminal_of_80_columns():
    history = [{"train_error": 51.04, "test_error": 36.25}, {"train_error": 49.96, "test_error": None}]
    errors = recorder.State(history=history).current_errors()
    assert errors == "train 50.0 %, test 36.2 %"
    bar = tqdm.std.tqdm.format_meter(
        63_999, 64_000, 45_296, ncols=80, prefix="resnet-1202", bar_format=progress.BAR, postfix=errors, initial=32_000
    )
    assert bar.endswith(", train 50.0 %, test 36.2 %]")  # else tqdm would have cut it
    assert "[12:34:56<" in bar


def test_progress_is_told_in_plain_lines_where_there_is_no_terminal(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(progress, "LINE_SECONDS", 0)  # a line for every iteration
    run = Run("resnet-8", schedule=SCHEDULE)
    record = trainers.train(run, tmp_path, progress=True)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == record.summary["iterations"] + 1
    assert all(re.match(r"resnet-8: \d+ of 22 iterations, \d\d:\d\d gone, .+ left", line) for line in lines)
    before_last = record.history.iloc[:-1]
    training, test = (before_last[name].dropna().iloc[-1] for name in ("train_error", "test_error"))
    assert lines[-2].endswith(f", train {training:.1f} %, test {test:.1f} %")
    trainers.train(replace(run, seed=1), tmp_path)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("holdout", "epoch"),
    [(0, 12), pytest.param(300, 9, marks=pytest.mark.long)],  # 1,437 images, or 1,137 of them, in batches of 128
)
def test_a_warm_up_is_recorded_in_whole_epochs(holdout, epoch, tmp_path):
    """Rows of single batches would end it far too early: one of the first often has an error below 80 % by chance."""
    slow = replace(recipes.RECIPES["digits"], warmup=recipes.Warmup(lr=0.003, until=80, depth=8))
    record = trainers.train(Run("resnet-8", recipe=slow, schedule=0.055, holdout=holdout), tmp_path)  # 60 iterations
    history = record.history
    warm = history[history["lr"].cummax() < 0.01]
    assert warm["iteration"].iloc[0] == epoch
    assert (warm["iteration"] % epoch == 0).all()
    assert (warm["train_error"].iloc[:-1] >= 80).all()
    assert warm["train_error"].iloc[-1] < 80
    assert 2 <= len(warm) < len(history)
    assert history["iteration"].iloc[-1] == 60
    assert history["test_error"].notna().iloc[-1]
    assert_rates_follow_from_the_rows_before(record)


def test_a_warm_up_that_goes_on_is_tested_and_measured_on_the_way(tmp_path, monkeypatch):
    endless = replace(recipes.RECIPES["digits"], warmup=recipes.Warmup(lr=0.01, until=0, depth=8))
    monkeypatch.setitem(recipes.RECIPES, "digits", endless)
    record = trainers.train(Run("resnet-8", schedule=0.2), tmp_path)  # 220 iterations, rows every 12
    history = record.history
    assert history["iteration"].tolist() == [*range(12, 220, 12), 220]
    assert (history["lr"].iloc[:9] == 0.01).all()
    _, tests, layers = recorder.recording_points(record.run.settings, 360)
    tested, measured = ({min(-(-point // 12) * 12, 220) for point in points} for points in (tests, layers))
    assert set(history.loc[history["test_error"].notna(), "iteration"]) == tested
    assert set(record.layers["iteration"]) == {0} | measured
    assert min(len(tested), len(measured)) > 5


def test_threads_depend_on_the_run_and_the_machine_alone(monkeypatch):
    monkeypatch.setattr(environment, "cores", lambda: 16)
    assert environment.threads_for(Run("resnet-20"), 8) == 1
    # 40.6 million multiply-adds an image, 128 images: 5.2e9, two threads' worth.
    assert environment.threads_for(Run("resnet-20", "cifar10"), 32) == 2
    assert environment.threads_for(Run("resnet-56", "cifar10", seed=4), 32) == 6
    monkeypatch.setattr(environment, "cores", lambda: 4)
    assert environment.threads_for(Run("resnet-56", "cifar10"), 32) == 4


@pytest.fixture
def short_smoke(monkeypatch):
    """Shorten the recipe of the smoke test."""
    recipe = replace(recipes.RECIPES["smoke"], iterations=2, batch=4, bn_batch=2)
    monkeypatch.setitem(recipes.RECIPES, "smoke", recipe)


def test_an_imagenet_run_goes_on_to_the_same_result(photographs, tmp_path, monkeypatch, short_smoke):
    run = Run("resnet-18", "imagenet-small", recipe="smoke", holdout=3)
    undisturbed = trainers.train(run, tmp_path / "undisturbed", photographs)
    assert undisturbed.history["val_error"].notna().all()
    monkeypatch.setattr(recorder, "CHECKPOINT_SECONDS", 0)
    batch = reading.ImageNetBatches.__call__

    def power_cut(self, iteration):
        if iteration == 1:
            raise KeyboardInterrupt
        return batch(self, iteration)

    with monkeypatch.context() as context:
        context.setattr(reading.ImageNetBatches, "__call__", power_cut)
        with pytest.raises(KeyboardInterrupt):
            trainers.train(run, tmp_path / "resumed", photographs)
    assert checkpoint(run.folder(tmp_path / "resumed"))["iteration"] == 1
    assert_same(trainers.train(run, tmp_path / "resumed", photographs), undisturbed)


def test_unreadable_photographs_are_counted_and_listed(photographs, tmp_path, capsys, short_smoke):
    spoiled = [photographs / "imagenet-small" / part / "n00000002" / "1.JPEG" for part in ("train", "val")]
    for path in spoiled:
        path.write_bytes(path.read_bytes()[:2000])
    run = Run("resnet-18", "imagenet-small", recipe="smoke")
    (record,) = run_all([run], tmp_path, photographs, executor=Here())
    assert record.summary["unreadable"] == 2
    lines = (record.folder / "unreadable.txt").read_text().splitlines()
    assert [line.partition(": ")[0] for line in lines] == sorted(map(str, spoiled))
    assert f"{run.id}: 2 unreadable files, see {record.folder}/unreadable.txt" in capsys.readouterr().out


@pytest.mark.parametrize(("side", "bn_batch"), [(4, 1), (3, 1), (5, 1), (4, 2)])
def test_batch_norm_of_a_single_value_is_refused_before_anything_is_written(side, bn_batch, tmp_path):
    """The last maps of a net have a quarter of the images' side, rounded up: 1x1 up to sides of 4."""
    write_images(tmp_path / "data" / "pets", side=side)
    run = Run("resnet-8", "pets", bn_batch=bn_batch, schedule=2 / 64_000)
    if side == 5 or bn_batch == 2:
        assert trainers.train(run, tmp_path / "results", tmp_path / "data").diverged is None
        return
    message = rf"bn_batch 1: 'pets' has images of {side}x{side}, whose last maps in resnet-8 are 1x1.*choose"
    for call in (trainers.train, lambda run, *folders: run_all([run], *folders)):
        with pytest.raises(ValueError, match=message):
            call(run, tmp_path / "results", tmp_path / "data")
    assert not (tmp_path / "results").exists()
