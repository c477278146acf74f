import copy
import json
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from replication import Run, __main__, data, finished, hub, load_net, models, trainers
from replication.engine.machine import autocast
from replication.runs import records

PUBLISHED = ROOT / "results" / "published"
WEIGHTS = sorted((PUBLISHED / "runs").glob("*/weights.safetensors"))


@pytest.fixture
def published(monkeypatch):
    """The records that come with this repository."""
    monkeypatch.setattr(records, "PUBLISHED", PUBLISHED)


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A folder of published records with none in it."""
    monkeypatch.setattr(records, "PUBLISHED", tmp_path / "published")
    (tmp_path / "published" / "runs").mkdir(parents=True)
    return tmp_path / "published"


@pytest.fixture
def trained(make, tmp_path):
    """Writes the record of a run on digits with random weights."""

    def write(net="resnet-8", **fields):
        record = make(1, 2, net=net, fingerprint=data.load("digits").fingerprint, **fields)
        torch.save(record.run.name.build(10).state_dict(), record.folder / "weights.pt")
        records.write_summary(record.folder, record.summary)
        return finished(record.run, tmp_path)

    return write


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("path", WEIGHTS, ids=lambda path: path.parent.name)
def test_published_nets_find_the_predictions_of_their_records(published, path):
    run = Run.from_dict(json.loads((path.parent / "run.json").read_text()))
    net = load_net(run.net, run.dataset, run.seed)
    assert net.record.folder == path.parent  # there is one for each name, data set and seed
    if not data.present(run.dataset):
        pytest.skip(f"{run.dataset} is not here")
    test = data.load(run.dataset).test
    expected = net.record.predictions
    assert [net.classes[label] for label in expected["label"]] == [net.classes[label] for label in test.labels]
    with autocast("cpu", run.precision):
        found = net.predict(test.pixels)
    other = np.mean(np.array(found) != np.array(net.classes)[expected["predicted"]])
    assert other <= (0.001 if run.precision == "float32" else 0.01)  # processors round differently
    wrong = np.mean(np.array(found) != np.array(net.classes)[test.labels])
    rounding = 1e-9  # 100 * 0.0773 is not 7.73
    assert 100 * wrong == pytest.approx(net.record.summary["test_error"], abs=100 * other + rounding)


def test_there_are_published_nets():
    assert {path.parent.name for path in WEIGHTS} >= {
        f"{net}__digits__seed-0" for net in ("plain-20", "resnet-20", "resnet-56")
    }


@pytest.mark.parametrize("path", WEIGHTS, ids=lambda path: path.parent.name)
def test_files_of_weights_are_whole_and_in_float32(path):
    records.check_sums(path.parent, [path.name])
    weights = load_file(path)
    counters = {name for name in weights if name.endswith("num_batches_tracked")}
    assert {weights[name].dtype for name in weights.keys() - counters} == {torch.float32}
    with safe_open(path, "pt") as file:
        assert len(json.loads(file.metadata()["classes"])) == len(weights["fc.bias"])


def test_logits_are_those_of_the_net_on_centred_pixels(published):
    """As section 4.2 has it: the mean over the training images is subtracted from every pixel."""
    train, test = data.load("digits").train.pixels, data.load("digits").test.pixels[:50]
    weights = load_file(PUBLISHED / "runs" / "resnet-20__digits__seed-0" / "weights.safetensors")
    assert weights.pop("mean_image").numpy() == pytest.approx(train.mean(0), rel=1e-6)
    inner = models.cifar_net(20).eval()
    inner.load_state_dict(weights)
    inputs = torch.from_numpy(((test - train.mean(0)) / 255).transpose(0, 3, 1, 2)).float()
    net = load_net("resnet-20")
    assert not net.training
    with torch.no_grad():
        assert torch.allclose(net.normalize(test), inputs, atol=1e-6)
        assert torch.allclose(net(test), inner(inputs), atol=1e-4)
        assert torch.equal(net.net(net.normalize(test)), net(test))


def test_images_in_all_forms_give_the_same_logits(published):
    net, pixels = load_net("plain-20").requires_grad_(False), data.load("digits").test.pixels[:4]
    expected = net(pixels)
    frozen = pixels.copy()
    frozen.flags.writeable = False
    pictures = [Image.fromarray(each) for each in pixels]
    grey = [picture.convert("L") for picture in pictures]  # digits have three equal channels
    transparent = [picture.convert("RGBA") for picture in pictures]
    same = [torch.from_numpy(pixels), frozen, np.asfortranarray(pixels), pictures, tuple(grey), transparent]
    for images in (*same, pixels[..., ::-1], np.ascontiguousarray(pixels[::-1])[::-1]):
        assert torch.equal(net(images), expected)
    assert torch.allclose(net(pictures[1]), expected[1:2], atol=1e-4)
    assert net.predict(pictures[1]) == net.predict(pixels)[1:2]
    assert net(pixels[:0]).shape == (0, 10)
    assert net.predict(pixels[:0]) == []
    assert torch.equal(copy.deepcopy(net)(pixels), expected)
    assert torch.allclose(net.double()(pixels).float(), expected, atol=1e-3)
    assert net.bfloat16()(pixels).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((2, 8, 8, 3), np.float32), r"pixels in float32: give uint8 \(N, 8, 8, 3\) in RGB, from 0 to 255"),
        (np.zeros((2, 8, 8, 3), np.int64), "pixels in int64"),
        (np.zeros((2, 8, 8, 3), bool), "pixels in bool"),
        (torch.zeros(2, 8, 8, 3), "pixels in torch.float32"),
        (torch.zeros(2, 8, 8, 3, dtype=torch.int8), "pixels in torch.int8"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), r"shape \(2, 3, 8, 8\): .*pixels.permute\(0, 2, 3, 1\) puts"),
        (np.zeros((2, 3, 8, 8), np.uint8), r"pixels.transpose\(0, 2, 3, 1\) puts channels last"),
        (np.zeros((8, 8, 3), np.uint8), r"shape \(8, 8, 3\): .*pixels\[None\] makes one image a batch"),
        (np.zeros((2, 32, 32, 3), np.uint8), r"Image.fromarray\(pixels\).resize\(\(8, 8\)\)"),
        (np.zeros((2, 8, 8), np.uint8), r"shape \(2, 8, 8\): give uint8 \(N, 8, 8, 3\)"),
        (np.zeros((2, 8, 8, 1), np.uint8), r"shape \(2, 8, 8, 1\): give"),
        (np.zeros((2, 8, 8, 4), np.uint8), r"shape \(2, 8, 8, 4\): give"),
        (np.uint8(3), r"images of type uint8: give"),
        (np.array(3, np.uint8), r"shape \(\): give"),
        (Image.new("RGB", (32, 16)), r"an image of 32x16: .* 8x8, give image.resize\(\(8, 8\)\)"),
        ([Image.new("L", (8, 8)), Image.new("L", (8, 9))], "an image of 8x9"),
        (Image.new("F", (8, 8)), "no known range of values"),
        ([Image.new("RGB", (8, 8)), np.zeros((8, 8, 3), np.uint8)], "images of type list"),
        ([], "images of type list: give .*, in numpy or torch, or PIL images"),
        ("digit.png", "images of type str"),
        (None, "images of type NoneType"),
    ],
)
def test_what_is_no_pixels_of_image_files_is_refused(published, images, message):
    net = load_net("resnet-20")
    expected = TypeError if re.match("pixels in|images of", message) else ValueError
    for call in (net, net.predict, net.normalize):
        with pytest.raises(expected, match=message):
            call(images)


def test_a_loaded_net_can_be_trained_further(published):
    net, images = load_net("resnet-20"), data.load("digits").train
    before = {name: value.clone() for name, value in net.state_dict().items()}
    net.train()
    net.predict(images.pixels[:300])
    assert net.training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    labels = torch.from_numpy(images.labels[:64])
    torch.nn.functional.cross_entropy(net.net(net.normalize(images.pixels[:64])), labels).backward()
    optimizer.step()
    changed = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == before.keys() - {name for name in before if name.endswith("tracked")} - {"mean"}


def test_a_net_is_in_float32_whatever_the_default(published):
    torch.set_default_dtype(torch.float64)
    try:
        assert load_net("resnet-20")(np.zeros((1, 8, 8, 3), np.uint8)).dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_loading_leaves_the_random_numbers_of_the_caller_alone(published):
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    load_net("resnet-20")
    assert torch.equal(torch.rand(2), expected)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"net": "resnet-14"}, r"net 'resnet-14': no weights are published, choose plain-8, resnet-8, resnet-8-B"),
        ({"net": "resnet_8"}, r"net 'resnet_8': .*, resnet-8-B \(did you mean 'resnet-8'\?\)"),
        ({"net": "vgg-16"}, "net 'vgg-16': no weights are published, choose plain-8"),
        ({"dataset": "cifar10"}, "dataset 'cifar10': no weights of resnet-8 are published, choose digits$"),
        ({"net": "resnet-50", "dataset": "imagenet"}, "net 'resnet-50': no weights are published"),
        ({"dataset": "no name"}, "dataset 'no name': no weights"),
        ({"seed": 2}, "seed 2: no weights of resnet-8 are published, choose 0, 1$"),
        ({"net": "plain-8", "seed": 1}, "seed 1: no weights of plain-8 are published, choose 0$"),
        ({"seed": -1}, "seed -1"),
        ({"net": 8}, "net 8: give a name"),
        ({"dataset": None}, "dataset None: give a name"),
        ({"seed": "0"}, "seed '0': give a whole number"),
        ({"seed": True}, "seed True: give a whole number"),
    ],
)
def test_what_has_no_weights_is_refused_with_the_choices(trained, elsewhere, wanted, message):
    for fields in ({}, {"seed": 1}, {"net": "resnet-8-B"}, {"net": "plain-8"}):
        hub.publish(trained(**fields))
    trained(net="resnet-14")  # not published
    assert load_net("resnet-8-A", "digits", np.int64(1)).record.run == Run("resnet-8", seed=1)
    given = {"net": "resnet-8", "dataset": "digits", "seed": 0} | wanted
    kind = TypeError if "give a" in message else ValueError
    with pytest.raises(kind, match=message):
        load_net(**given)


def test_without_the_repository_there_are_no_nets(trained):
    record = trained()
    for call in (hub.nets, lambda: load_net("resnet-8"), lambda: hub.publish(record)):
        with pytest.raises(ValueError, match="installed without its repository, which holds the weights: clone that"):
            call()


def test_a_trained_run_is_published_and_loaded_without_its_images(pets, tmp_path, elsewhere):
    record = trainers.train(Run("resnet-8", "pets", schedule=0.0002, holdout=5, seed=3), tmp_path / "own", pets)
    published, loaded = hub.publish(record, pets), data.load("pets", pets)
    pixels, expected = loaded.test.pixels, loaded.hold_out(5).train.pixels.mean(0)
    assert contents(record.folder).keys() - contents(published.folder).keys() == {"weights.pt"}
    done = subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=published.folder, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert b"weights.safetensors: OK" in done.stdout
    shutil.rmtree(pets)
    net = load_net("resnet-8", "pets", seed=3)
    assert net.classes == ("cat", "dog")
    assert net.mean.numpy() == pytest.approx(expected, rel=1e-6)
    assert net.record.history.equals(record.history)
    assert net.predict(pixels) == [net.classes[number] for number in record.predictions["predicted"]]


def test_publishing_again_changes_nothing_and_adds_weights_to_a_record_without(trained, elsewhere):
    record = trained(predicted=[0, 1])
    published = hub.publish(record)
    before = contents(published.folder)
    assert contents(hub.publish(record).folder) == contents(hub.publish(published).folder) == before
    (published.folder / "weights.safetensors").unlink()
    assert finished(record.run, elsewhere).run == record.run  # still valid
    with pytest.raises(ValueError, match="no weights are published"):
        load_net("resnet-8")
    assert contents(hub.publish(record).folder) == before
    shutil.rmtree(published.folder)
    shutil.copytree(record.folder, published.folder, ignore=shutil.ignore_patterns("*.pt"))
    (record.folder / "evaluation.json").write_text('{"10-crop": {}}')  # measured later, and not among the checksums
    assert contents(hub.publish(record).folder) == before | {"evaluation.json": b'{"10-crop": {}}'}
    assert load_net("resnet-8").record.predictions["predicted"].tolist() == [0, 1]


def other_record(record):
    (record.folder / "history.csv").write_text(records.rows_text([{"iteration": 1}]))
    records.write_summary(record.folder, record.summary)


def fewer_files(record):
    (record.folder / "predictions.csv").unlink()
    records.write_summary(record.folder, record.summary)


def other_weights(record):
    (record.folder / "weights.pt").write_bytes(b"other")


def altered(record):
    (record.folder / "history.csv").write_text("iteration\n")


def other_images(record):
    stored = json.loads((record.folder / "run.json").read_text())
    (record.folder / "run.json").write_text(json.dumps(stored | {"fingerprint": "0"}))
    records.write_summary(record.folder, record.summary)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_record, "seed-1 holds another record of this run: remove it first"),
        (fewer_files, "seed-1 holds another record of this run"),
        (other_weights, "own/.* holds no weights.pt: train the run again"),
        (lambda record: (record.folder / "weights.pt").unlink(), "holds no weights.pt"),
        (altered, "history.csv is not what SHA256SUMS says"),
        (other_images, "'digits' in data holds other images than .*seed-1 was trained on: bring these back"),
    ],
)
def test_a_record_that_cannot_be_published_changes_nothing(trained, elsewhere, tmp_path, change, message):
    record = trained(seed=1, predicted=[3])
    own = shutil.copytree(tmp_path / "runs", tmp_path / "own" / "runs").parent
    published = hub.publish(record)
    before = contents(published.folder)
    mine = finished(record.run, own)
    change(mine)
    with pytest.raises(ValueError, match=message):
        hub.publish(records.Record(mine.run, mine.folder, fingerprint_of(mine), mine.summary))
    assert contents(published.folder) == before


def fingerprint_of(record):
    return json.loads((record.folder / "run.json").read_text())["fingerprint"]


@pytest.mark.parametrize("value", [None, Run("resnet-8"), "resnet-8__digits__seed-0"])
def test_only_records_are_published(elsewhere, value):
    with pytest.raises(TypeError, match=r"^record .*: give that of a finished run"):
        hub.publish(value)


def test_diverged_runs_and_a_second_net_of_that_name_are_not_published(trained, make, elsewhere):
    with pytest.raises(ValueError, match="plain-8__digits__seed-0 diverged after 7 iterations: there is no net"):
        hub.publish(make(1, 2, net="plain-8", diverged=7))
    hub.publish(trained())
    for fields in ({"schedule": 0.5}, {"precision": "bfloat16"}, {"recipe": "note"}):
        with pytest.raises(ValueError, match=r"resnet-8__digits__seed-0 holds weights of that net, data set and seed"):
            hub.publish(trained(**fields))
    assert [path.name for path in (elsewhere / "runs").iterdir()] == ["resnet-8__digits__seed-0"]


@pytest.mark.parametrize("damage", [lambda content: content[:-4] + b"\0\0\0\0", lambda content: content[:100]])
def test_altered_weights_are_not_loaded_and_do_not_harm_the_record(trained, elsewhere, damage):
    path = hub.publish(trained()).folder / "weights.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    message = f"weights.safetensors is not what SHA256SUMS says. Restore it: git restore {path}"
    with pytest.raises(records.DamagedError, match=message):
        load_net("resnet-8")
    assert finished(Run("resnet-8"), elsewhere).summary["test_error"] == 2
    assert len(hub.nets()) == 1


RUNS = [
    Run("resnet-20-B", "cifar10-small", schedule=0.005333, precision="bfloat16", seed=2),
    Run("resnet-110", "cifar10", warmup=False, holdout=5000),
    Run("plain-20", "cifar100", recipe="note", bn_batch=50),
    Run("resnet-50", "imagenet-mine", bn_batch=16),
    Run("resnet-20", seed=4),
]


def test_the_table_of_nets_gives_the_command_of_each(make, elsewhere, tmp_path, monkeypatch, capsys):
    """Given the folder of the records, the command finds that of its run, and so does not train."""
    for run in RUNS:
        fields = {spelled: value for spelled, value in vars(run).items() if spelled != "recipe" or value == "note"}
        record = make(1.5, 2.5, fingerprint=data.load("digits").fingerprint, **fields)
        (record.folder / "weights.safetensors").touch()
    make(1, 2, net="plain-20")  # without weights
    monkeypatch.setattr(records, "PUBLISHED", tmp_path)
    table = hub.nets()
    assert table["net"].tolist() == ["resnet-110", "resnet-20-B", "plain-20", "resnet-20", "resnet-50"]
    first = table[table["net"] == "resnet-20"].iloc[0].to_dict()
    assert first == first | {"dataset": "digits", "seed": 4, "parameters": 269_722, "iterations": 1_100}
    assert first == first | {"test_error": 2.5, "seconds": 60.0, "hardware": "a processor, 1 thread"}
    for command in table["command"]:
        python, *words = shlex.split(command)
        assert (python, words[:2]) == (".venv/bin/python", ["-m", "replication"])
        folders = ["--results", str(tmp_path), "--data", str(tmp_path / "none")]
        monkeypatch.setattr(sys, "argv", ["replication", *words[2:], *folders])
        __main__.main()
    shown = re.findall(r"/runs/(\S+): test error 2.50 %", capsys.readouterr().out)
    assert sorted(shown) == sorted(run.id for run in RUNS)


def test_the_page_of_nets_is_up_to_date(committed, monkeypatch):
    monkeypatch.setattr(records, "PUBLISHED", committed / "results" / "published")
    page = ROOT / "docs" / "nets.md"
    shutil.copy(page, committed)
    hub.update_page(committed / "nets.md")
    assert (committed / "nets.md").read_text() == page.read_text()
    scorecard = (committed / "results" / "published" / "7_scorecard" / "index.html").read_text()
    captions = re.findall(r"Training error \(dashed\) and test error \(bold\): ([^<]+)\.", scorecard)
    lines = [line for line in page.read_text().splitlines() if "errors_" in line]
    rows = [[cell.strip() for cell in line.split("|")[1:]] for line in lines]
    assert len(rows) == len(WEIGHTS)
    for net, dataset, seed, _, error, *_, curves, _, _ in rows:
        record = load_net(net, dataset, int(seed)).record
        assert error == f"{record.summary['test_error']:.2f}"
        number = int(re.search(r"7_scorecard/errors_(\d+)\.png", curves)[1])
        assert captions[number - 1] == records.in_words(record.conditions)


def test_a_page_without_a_place_for_the_nets_is_left_alone(published, tmp_path):
    page = tmp_path / "nets.md"
    page.write_text("<!-- /nets --><!-- nets -->\n")
    with pytest.raises(ValueError, match="has no place for the nets: mark one by <!-- nets --> and <!-- /nets -->"):
        hub.update_page(page)
    assert page.read_text() == "<!-- /nets --><!-- nets -->\n"


def test_torch_hub_loads_the_nets_from_a_checkout(tmp_path):
    """As a user does, from another folder; only what ``dependencies`` names is imported beside the standard library."""
    code = f"""
import ast, sys, torch
from pathlib import Path
repo = {str(ROOT)!r}
net = torch.hub.load(repo, "resnet_20", source="local", dataset="digits", seed=0)
print(net(torch.zeros(2, 8, 8, 3, dtype=torch.uint8)).shape, net.record.run.id, len(net.classes))
print(torch.hub.load(repo, "net", "plain-20", source="local").record.run.id)
for arguments in (["resnet_1202"], ["net", "resnet-21"]):
    try:
        torch.hub.load(repo, *arguments, source="local")
    except ValueError as error:
        print(error)
ours = [module.__file__ for name, module in sys.modules.items() if name.split(".")[0] == "replication"]
used = set()
for path in ours:
    for node in ast.parse(Path(path).read_text()).body:
        if isinstance(node, ast.Import):
            used |= {{name.name.split(".")[0] for name in node.names}}
        elif isinstance(node, ast.ImportFrom):
            used.add(node.module.split(".")[0])
sys.path.insert(0, repo)
import hubconf
print([name for name in dir(hubconf) if callable(getattr(hubconf, name)) and not name.startswith("_")])  # hub.list
print(hubconf.plain_56.__doc__)
print(used - set(sys.stdlib_module_names) - {{"replication"}} == set(hubconf.dependencies))
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, other, refused, unknown, listed, described, complete = done.stdout.splitlines()
    assert first == "torch.Size([2, 10]) resnet-20__digits__seed-0 10"
    names = [f"plain_{depth}" for depth in (20, 32, 44, 56)]
    assert other == "plain-20__digits__seed-0"
    assert unknown.startswith("net 'resnet-21': no weights are published, choose plain-20")
    assert listed == str(sorted(["net", *names, *(f"resnet_{depth}" for depth in (20, 32, 44, 56, 110, 1202))]))
    assert described.startswith("plain-56 trained on a data set")
    assert refused.startswith("net 'resnet-1202': no weights are published, choose plain-20")
    assert complete == "True"
