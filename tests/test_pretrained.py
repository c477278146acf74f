"""Weights trained by others, and stored evaluations."""

import argparse
import datetime
import io
import re
import shutil
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torchvision
from torch import nn

from replication import Run, data, evaluate, models, pretrained
from replication.runs import records as kept


class ZerosAround(nn.Module):
    """Shortcut A as widely used CIFAR nets have it: half of the zero channels before the identity, half behind it."""

    def __init__(self, extra):
        super().__init__()
        self.half = extra // 2

    def forward(self, x):
        return nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.half, self.half))


def of_others(zeros, depth=14):
    """A net as others build it, with weights and statistics that are nowhere trivial."""
    torch.manual_seed(3)
    net = models.cifar_net(depth)
    if zeros == "around":
        net.layer2[0].downsample, net.layer3[0].downsample = ZerosAround(16), ZerosAround(32)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    net(torch.randn(16, 3, 32, 32))
    return net.eval()


@pytest.mark.parametrize("zeros", ["behind", "around"])
def test_weights_of_either_kind_of_shortcut_a_give_their_own_logits(tmp_path, zeros):
    theirs = of_others(zeros)
    names = {name.replace("fc.", "linear."): value for name, value in theirs.state_dict().items()}
    old = {f"module.{name}": value for name, value in names.items() if "num_batches" not in name}
    torch.save({"state_dict": old, "epoch": 200, "best_prec1": 91.7}, tmp_path / "checkpoint.th")
    images = torch.randn(4, 3, 32, 32)
    ours = pretrained.load_weights(models.cifar_net(14), tmp_path / "checkpoint.th", zeros=zeros).eval()
    other = "around" if zeros == "behind" else "behind"
    garbage = pretrained.load_weights(models.cifar_net(14), tmp_path / "checkpoint.th", zeros=other).eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images))
        assert not torch.allclose(garbage(images), theirs(images), atol=0.1)


@pytest.fixture(scope="module")
def resnet18():
    """Torchvision's, with statistics that are nowhere trivial."""
    torch.manual_seed(4)
    net = torchvision.models.resnet18(num_classes=10)
    net(torch.randn(8, 3, 64, 64))
    return net.eval()


def empty18():
    """Our net for the weights of ``resnet18``, without any of its own."""
    with torch.device("meta"):
        net = models.imagenet_net(18, shortcut="B", classes=10)
    return net.to_empty(device="cpu")


def same_logits(ours, theirs):
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(images), theirs(images))


def renamed(net, prefix):
    return {prefix + name: value for name, value in net.state_dict().items()}


class Wrapped(nn.Module):
    """A net as a part of another module, as Lightning has them."""

    def __init__(self, net):
        super().__init__()
        self.model = net


BESIDE = {
    "epoch": 90,
    "best_acc1": np.float64(69.8),
    "classes": np.arange(3),
    "args": argparse.Namespace(lr=0.1, arch="resnet18", scores=[np.float32(1)]),
    "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]},
    "model_ema": None,
}
WRAPPINGS = {
    "alone": lambda net: net.state_dict(),
    "with others in the same dict": lambda net: net.state_dict() | BESIDE,
    "without counters": lambda net: {n: v for n, v in net.state_dict().items() if "num_batches" not in n},
    "parameters": lambda net: net.state_dict() | dict(net.named_parameters()),
    "net": lambda net: {"net": net.state_dict(), "acc": 93.0},
    "model_state_dict": lambda net: {"model_state_dict": net.state_dict()} | BESIDE,
    "state_dict beside a model's name": lambda net: {"model": "resnet18", "state_dict": net.state_dict()},
    "state_dict beside a configuration": lambda net: {"model": {"depth": 18}, "state_dict": net.state_dict()},
    "keys within keys": lambda net: {"state": 1, "ema": {"module": net.state_dict(), "updates": 7}},
    "data parallel": lambda net: {"state_dict": nn.DataParallel(net).state_dict()},
    "data parallel twice": lambda net: {"model": renamed(net, "module.module.")},
    "compiled": lambda net: {"model": torch.compile(nn.DataParallel(net)).state_dict()} | BESIDE,
    "a part of another": lambda net: {"state_dict": Wrapped(Wrapped(net)).state_dict()} | BESIDE,
    "backbone": lambda net: {"params": renamed(net, "backbone.")},
    "averaged": lambda net: {"model_ema": torch.optim.swa_utils.AveragedModel(net).state_dict()},
    "averaged in a key of its own": lambda net: {"averaged": 1, "state_dict_ema": renamed(net, "_orig_mod.module.")},
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_torchvisions_weights_give_its_logits_however_they_are_wrapped(tmp_path, resnet18, wrapping, capsys):
    torch.save(WRAPPINGS[wrapping](resnet18), tmp_path / "resnet18.pth")
    same_logits(pretrained.load_weights(empty18(), tmp_path / "resnet18.pth"), resnet18)
    assert ("holds state_dict and model" in capsys.readouterr().out) == ("configuration" in wrapping)


def test_older_files_and_safetensors_load(tmp_path, resnet18):
    torch.save({"net": resnet18.state_dict()} | BESIDE, tmp_path / "a.pth", _use_new_zipfile_serialization=False)
    safetensors.torch.save_file(renamed(resnet18, "module."), tmp_path / "a.safetensors", {"format": "pt"})
    for name in ("a.pth", "a.safetensors"):
        same_logits(pretrained.load_weights(empty18(), tmp_path / name), resnet18)


@pytest.mark.parametrize("precision", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("zeros", ["behind", "around"])
def test_weights_of_other_precisions_become_float32(tmp_path, precision, zeros):
    theirs = of_others(zeros).to(precision)
    torch.save(theirs.state_dict(), tmp_path / "a.pth")
    net = pretrained.load_weights(models.cifar_net(14), tmp_path / "a.pth", zeros=zeros)
    assert {value.dtype for value in net.parameters()} == {torch.float32}
    same_logits(net, theirs.float())


def test_averaged_weights_go_before_plain_ones(tmp_path, capsys):
    plain, averaged = models.cifar_net(8), models.cifar_net(8)
    torch.save({"model": plain.state_dict(), "model_ema": averaged.state_dict()}, tmp_path / "a.pth")
    same_logits(pretrained.load_weights(models.cifar_net(8), tmp_path / "a.pth"), averaged.eval())
    assert (
        capsys.readouterr().out
        == f"{tmp_path}/a.pth holds model_ema and model: the weights under model_ema are taken\n"
    )


def test_projections_may_be_called_shortcuts(tmp_path):
    theirs = models.cifar_net(14, shortcut="B")
    weights = {name.replace("downsample", "shortcut"): value for name, value in theirs.state_dict().items()}
    torch.save(weights, tmp_path / "a.pth")
    same_logits(pretrained.load_weights(models.cifar_net(14, shortcut="B"), tmp_path / "a.pth"), theirs.eval())


class Hostile:
    def __reduce__(self):
        return print, ("executed",)


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        (Hostile(), "is not a file of weights alone"),
        ([1, 2], "holds no weights"),
        ({"state_dict": {"conv1.weight": 1}}, "holds no weights"),
        ({"epoch": 3}, "holds no weights"),
        ({"model_ema": {"decay": 0.9}}, "holds no weights"),
        # A block has two layers, each with five tensors beside the counter.
        (
            models.cifar_net(20).state_dict(),
            r"another net \(they fit resnet-20\): unknown: layer1.2.conv1.weight,.* and 27 more$",
        ),
        (
            models.cifar_net(8).state_dict(),
            r"another net \(they fit resnet-8\): missing: layer1.1.conv1.weight,.* and 27 more$",
        ),
        (
            models.cifar_net(14, classes=100).state_dict(),
            r"\(they fit resnet-14 with 100 classes\): wrong: fc.weight is \(100, 64\), not \(10, 64\), fc.bias",
        ),
        (
            {name.replace("conv", "convolution"): value for name, value in models.cifar_net(14).state_dict().items()},
            r"another net: missing: conv1.weight,.*; unknown: convolution1.weight,",
        ),
        (models.cifar_net(14).state_dict() | {"model.conv1.weight": torch.ones(1)}, "unknown: model.conv1.weight$"),
        (renamed(models.cifar_net(14), "a.") | renamed(models.cifar_net(14), ""), "holds conv1.weight twice"),
        (models.cifar_net(14).state_dict() | {"fc.weight": torch.ones(10, 64).char()}, "fc.weight is .* of torch.int8"),
        (models.cifar_net(14).state_dict() | {"fc.weight": torch.ones(10, 64).cfloat()}, "is .* of torch.complex64"),
        (models.cifar_net(14).state_dict() | {"fc.weight": torch.eye(10, 64).to_sparse()}, "is .*, torch.sparse_coo"),
        (models.cifar_net(14).state_dict() | {"fc.bias": torch.ones(10, device="meta")}, "missing: fc.bias$"),
    ],
)
def test_other_files_are_refused_and_leave_the_net_as_it_was(tmp_path, stored, message, capsys):
    torch.save(stored, tmp_path / "file.pt")
    net = models.cifar_net(14)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        pretrained.load_weights(net, tmp_path / "file.pt")
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert "executed" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("theirs", "classes", "net", "said"),
    [
        ("resnet-18-B", 1000, "resnet-18", r" \(they fit resnet-18-B\): unknown: layer2.0.downsample.0.weight"),
        ("resnet-34-C", 1000, "resnet-34-B", r" \(they fit resnet-34-C\): unknown: layer1.0.downsample.0.weight"),
        ("resnet-18", 1000, "resnet-18-B", r" \(they fit resnet-18\): missing: layer2.0.downsample.0.weight"),
        ("resnet-18-B", 1000, "plain-34", r" \(they fit resnet-18-B\): missing: layer1.2.conv1.weight"),
        ("plain-34", 1000, "plain-18", r" \(they fit plain-34\): unknown: layer1.2.conv1.weight"),
        (
            "resnet-50",
            10,
            "resnet-34",
            r" \(they fit resnet-50 with 10 classes\): unknown: layer1.0.conv3.*; wrong: layer1.0.conv1",
        ),
        ("resnet-101", 1000, "resnet-50", r" \(they fit resnet-101\): unknown: layer3.6.conv1.weight"),
    ],
)
def test_the_net_that_the_weights_fit_is_named(tmp_path, theirs, classes, net, said):
    with torch.device("meta"):
        theirs = models.NetName.parse(theirs, imagenet=True).build(classes).state_dict()
        net = models.NetName.parse(net, imagenet=True).build(1000)
    torch.save({name: torch.zeros(()).expand(value.shape) for name, value in theirs.items()}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=f"holds the weights of another net{said}"):
        pretrained.load_weights(net, tmp_path / "a.pth")


def archive(kind, name):
    """A zip or tar archive of one file, as bytes."""
    content = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(content, "w") as file:
            file.writestr(name, b"weights")
    else:
        with tarfile.open(fileobj=content, mode=kind) as file:
            file.addfile(tarfile.TarInfo(name))
    return content.getvalue()


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f3\n"


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "an empty file"),
        (LFS, "a Git LFS pointer: `git lfs pull`"),
        (b"<!DOCTYPE html><html><body>Sign in", "a web page"),
        (b"\xef\xbb\xbf\n <?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "a web page"),
        (b"404: Not Found", "a text that begins '404: Not Found'"),
        (b'{"message": "Bad credentials"}\n', "a text that begins '{.*Bad credentials"),
        (archive("zip", "resnet20.th"), "a zip archive of resnet20.th: unpack it"),
        (archive("w", "resnet20.th"), "a tar archive: unpack it"),
        (archive("w:gz", "resnet20.th"), "a gzip archive: unpack it"),
        ("<!doctype html><title>\u767b\u5f55</title>\t".encode(), "a web page"),
    ],
    ids=["empty", "lfs", "html", "xml", "text", "json", "zip", "tar", "gzip", "chinese"],
)
def test_what_lies_in_place_of_the_weights_is_said(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} is not a file of weights but {said}"):
        pretrained.load_weights(models.cifar_net(8), tmp_path / name)


@pytest.mark.parametrize(
    "content",
    [b"\x89HDF\r\n\x1a\n" + bytes(90), b"PK\x03\x04" + bytes(90), bytes(9), b"\x80\x02."],
    ids=["hdf", "zip", "zeros", "pickle"],
)
def test_what_is_unknown_is_refused(tmp_path, content):
    (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises(ValueError, match=r"a.pth is not a file of weights alone \(.*\): get it again, or write it by"):
        pretrained.load_weights(models.cifar_net(8), tmp_path / "a.pth")


def test_safetensors_are_told_by_their_name(tmp_path):
    weights = models.cifar_net(8).state_dict()
    safetensors.torch.save_file(weights, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"in the format of safetensors: give it a name that ends in \.safetensors"):
        pretrained.load_weights(models.cifar_net(8), tmp_path / "a.pth")
    torch.save(weights, tmp_path / "a.safetensors")  # is not unpickled
    with pytest.raises(ValueError, match=r"a\.safetensors is not a file of weights alone \(SafetensorError"):
        pretrained.load_weights(models.cifar_net(8), tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("stored", "holds"),
    [
        (lambda net: {"state_dict": net.state_dict(), "args": argparse.Namespace(data=Path("here"))}, "pathlib.*Path"),
        (lambda net: net.state_dict() | {"when": datetime.date(2016, 6, 27)}, "datetime.date"),
        (lambda net: {"net": net, "acc": 93.0}, "replication.models.Net"),
        (lambda net: net, "replication.models.Net"),
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_the_line_that_resaves_other_files_is_given(tmp_path, stored, holds, zipped):
    theirs = of_others("behind")
    torch.save(stored(theirs), tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        ValueError, match=f"it holds {holds} beside tensors, .*executes any code in it: import"
    ) as raised:
        pretrained.load_weights(models.cifar_net(14), tmp_path / "a.pth")
    exec(re.search("import torch; .*$", str(raised.value))[0], {})
    same_logits(pretrained.load_weights(models.cifar_net(14), tmp_path / "a.weights.pt"), theirs)


def test_a_damaged_file_is_refused(tmp_path):
    torch.save(models.cifar_net(14).state_dict(), tmp_path / "file.pt")
    (tmp_path / "file.pt").write_bytes((tmp_path / "file.pt").read_bytes()[:5000])
    with pytest.raises(ValueError, match="is not a file of weights alone"):
        pretrained.load_weights(models.cifar_net(14), tmp_path / "file.pt")
    with pytest.raises(ValueError, match="zeros 'front': choose behind, around"):
        pretrained.load_weights(models.cifar_net(14), tmp_path / "file.pt", zeros="front")


HALVES = [0.5, 0.5, 0.5]


@pytest.mark.parametrize(
    ("inputs", "mean", "std"),
    [
        ("torchvision", [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ("cifar", [0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]),
        ({"mean": HALVES, "std": HALVES}, HALVES, HALVES),
        ({"std": (1, 1, 1), "mean": (0, 0.0, 0.25)}, [0, 0, 0.25], [1, 1, 1]),
    ],
)
def test_weights_of_others_are_a_row_of_their_own(tmp_path, inputs, mean, std):
    torch.manual_seed(9)  # an untrained net for which each normalization gives another error
    net, digits = models.cifar_net(8).eval(), data.load("digits")
    torch.save({"state_dict": {f"module.{name}": value for name, value in net.state_dict().items()}}, tmp_path / "a.th")
    options = {"net": "resnet-8", "path": str(tmp_path / "a.th"), "zeros": "behind"}
    weights = {"theirs": options | {"inputs": inputs}, "ours": options | {"inputs": "ours"}}
    theirs, ours = pretrained.errors_of_others(weights, "digits")
    assert ours["test_error"] == evaluate.single_view(net, digits.eval_batches(digits.test))[0]
    normalized = torchvision.transforms.functional.normalize(
        torch.from_numpy(digits.test.pixels).permute(0, 3, 1, 2) / 255, mean, std
    )
    with torch.no_grad():
        wrong = net(normalized).argmax(1).numpy() != digits.test.labels
    assert theirs["test_error"] == pytest.approx(100 * wrong.mean(), abs=0.3)
    assert theirs["test_error"] != ours["test_error"]
    loaded = pretrained.load_others("theirs", weights["theirs"], digits)
    assert loaded.mean.tolist() == pytest.approx([255 * value for value in mean])
    assert loaded.std.tolist() == pytest.approx(std)
    assert theirs["parameters"] == sum(value.numel() for value in net.parameters())


@pytest.mark.parametrize("label", ["resnet-50", "plain-20", "ensemble", 3])
def test_a_label_that_a_net_of_ours_may_have_is_refused(label):
    with pytest.raises(ValueError, match=f"weights {label!r}: choose a label"):
        pretrained.errors_of_others({label: {}}, "digits")


KNOWN = {"net": "resnet-8", "zeros": "behind", "inputs": "torchvision"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "net None"),
        ({"net": "resnet-8"}, "zeros None: choose behind, around"),
        (
            {"net": "resnet-8", "zeros": "behind"},
            "inputs None: choose torchvision, cifar, ours or {'mean': .*units of 0",
        ),
        (KNOWN, "path None: there is no such file"),
        (KNOWN | {"path": "nowhere.pth"}, "path 'nowhere.pth': there is no such file"),
        ({"net": "resnet-9", "zeros": "behind"}, "depth 9"),
        ({"nett": "resnet-8"}, "option 'nett': choose net.*did you mean 'net'"),
        (KNOWN | {"inputs": "theirs"}, "inputs 'theirs': choose torchvision, cifar, ours or"),
        (KNOWN | {"inputs": "cifar10"}, "inputs 'cifar10': .*did you mean 'cifar'"),
        (KNOWN | {"inputs": HALVES}, "inputs .*: choose torchvision, cifar, ours or"),
        (KNOWN | {"inputs": {"mean": HALVES}}, "inputs {'mean': .*}: choose .* or {'mean': "),
        (KNOWN | {"inputs": {"mean": HALVES, "std": HALVES, "scale": 255}}, "inputs .*: choose .* or {'mean': "),
        (KNOWN | {"inputs": {"mean": [123.7, 116.3, 103.5], "std": HALVES}}, "inputs mean .*from 0 to 1, .*divide"),
        (KNOWN | {"inputs": {"mean": [-0.5, 0, 0], "std": HALVES}}, "inputs mean .*from 0 to 1"),
        (KNOWN | {"inputs": {"mean": [float("nan"), 0, 0], "std": HALVES}}, "inputs mean .*from 0 to 1"),
        (KNOWN | {"inputs": {"mean": [0.5], "std": [0.5]}}, "inputs mean .*three numbers"),
        (KNOWN | {"inputs": {"mean": 0.5, "std": 0.5}}, "inputs mean 0.5: give three numbers"),
        (KNOWN | {"inputs": {"mean": ["0.5", "0.5", "0.5"], "std": HALVES}}, "inputs mean .*three numbers"),
        (KNOWN | {"inputs": {"mean": HALVES, "std": [0.2, 0, 0.2]}}, "inputs std .*from 0.001 to 1, .*divide"),
        (KNOWN | {"inputs": {"mean": HALVES, "std": [58.4, 57.1, 57.4]}}, "inputs std .*from 0.001 to 1, .*divide"),
        (KNOWN | {"inputs": {"mean": HALVES, "std": [True] * 3}}, "inputs std .*three numbers"),
        ("file.pth", "give its options"),
    ],
)
def test_what_is_missing_of_weights_of_others_is_said(options, message):
    with pytest.raises((TypeError, ValueError), match=f"weights 'x': .*{message}"):
        pretrained.errors_of_others({"x": options}, "digits")


def test_the_place_of_a_bottlenecks_stride_must_be_said(tmp_path):
    (tmp_path / "a.pth").write_bytes(b"")
    options = {"net": "resnet-50", "path": str(tmp_path / "a.pth"), "inputs": "torchvision"}
    with pytest.raises(ValueError, match="weights 'x': stride_on None: choose 1x1, 3x3"):
        pretrained.check(["resnet-50"], weights={"x": options})
    pretrained.check(["resnet-50"], weights={"x": options | {"stride_on": "3x3"}})


def test_unknown_ways_and_members_are_refused():
    with pytest.raises(ValueError, match=r"way '12-crop': choose .*, multi-scale \(did you mean '10-crop'"):
        pretrained.check(["resnet-18"], ways=["12-crop"])
    with pytest.raises(ValueError, match="net of the ensemble 'resnet-34': choose resnet-18"):
        pretrained.check(["resnet-18"], ensemble=["resnet-34"])


def made_record(net, dataset, results, seed=0):
    """A record as a run leaves it, of a net that was not trained."""
    run = Run(net, dataset.name, schedule=1e-5, seed=seed)
    folder = run.folder(results)
    folder.mkdir(parents=True)
    torch.manual_seed(seed)
    torch.save(run.name.build(len(dataset.classes)).state_dict(), folder / "weights.pt")
    (folder / "run.json").write_text(kept.run_text(run, dataset.fingerprint))
    for name in ("environment.json", "history.csv"):
        (folder / name).write_text("")
    kept.write_summary(folder, {"iterations": 6, "test_error": 50.0})
    return kept.finished(run, results)


def test_evaluations_are_kept_beside_their_records(photographs, tmp_path, monkeypatch, capsys):
    dataset = data.load("imagenet-small", photographs)
    records = [made_record("resnet-18", dataset, tmp_path, seed) for seed in (0, 1)]
    first, second = (record.run.id for record in records)
    weights = {"theirs": {"net": "resnet-18", "path": str(records[1].folder / "weights.pt"), "inputs": "ours"}}
    arguments = {"data": photographs, "weights": weights, "ensemble": ["resnet-18"], "ways": ["centre crop"]}

    def evaluations(**changed):
        return pretrained.evaluations(records, dataset.name, folder=tmp_path / "notebook", **(arguments | changed))

    found = evaluations()
    assert set(found) == {"theirs", "ensemble", first, second}
    assert found["theirs"]["centre crop"] == found[second]["centre crop"]
    assert found["ensemble"]["centre crop"] == found[first]["centre crop"]
    assert (found["ensemble"]["members"], found[first]["images"], found[first]["unreadable"]) == ([first], 6, 0)
    assert records[0].evaluation == found[first]

    # Another way is added to what is there, and nothing is measured twice.
    measure, asked = evaluate.errors, []
    monkeypatch.setattr(evaluate, "errors", lambda *of, **how: asked.append(of[0].keys()) or measure(*of, **how))
    (records[0].folder / "evaluation.json").unlink()
    both = evaluations(ways=["centre crop", "10-crop"])
    assert asked == [{first}, {"theirs", "ensemble", first, second}]
    assert all(set(found[name]) < set(both[name]) for name in found)

    # Later neither images nor weights are needed; what was never measured is said to be missing.
    shutil.rmtree(photographs)
    assert evaluations() == both
    for record in records:
        (record.folder / "weights.pt").unlink()
    capsys.readouterr()
    assert evaluations(weights={}) == {name: both[name] for name in ("ensemble", first, second)}
    assert capsys.readouterr().out == ""
    assert evaluations(weights={}, precision="bfloat16") == {}
    assert f"{first}: not tested by centre crop, since its images are not here" in capsys.readouterr().out


def test_other_weights_and_other_images_are_measured_anew(photographs, tmp_path, capsys):
    dataset = data.load("imagenet-small", photographs)
    record = made_record("resnet-18", dataset, tmp_path)
    arguments = {"data": photographs, "ways": ["centre crop"], "folder": tmp_path}
    first = pretrained.evaluations([record], dataset.name, **arguments)[record.run.id]
    torch.manual_seed(5)
    torch.save(record.run.name.build(3).state_dict(), record.folder / "weights.pt")
    assert pretrained.evaluations([record], dataset.name, **arguments)[record.run.id] == first
    assert "weights.pt is not what SHA256SUMS says: these weights are left out." in capsys.readouterr().out
    kept.write_summary(record.folder, record.summary)
    second = pretrained.evaluations([record], dataset.name, **arguments)[record.run.id]
    assert first["weights"] != second["weights"]
    assert record.evaluation == second
    path = photographs / "imagenet-small" / "val" / "n00000002" / "0.JPEG"
    path.write_bytes(b"no photograph")
    third = pretrained.evaluations([record], dataset.name, **arguments)[record.run.id]
    assert (third["images"], third["unreadable"]) == (5, 1)


def test_a_stored_error_outlives_its_weights_and_another_protocol_is_said_to_be_missing(photographs, tmp_path, capsys):
    dataset = data.load("imagenet-small", photographs)
    record = made_record("resnet-18", dataset, tmp_path)
    arguments = {"data": photographs, "folder": tmp_path}
    first = pretrained.evaluations([record], dataset.name, ways=["centre crop"], **arguments)
    record.weights.unlink()
    assert pretrained.evaluations([record], dataset.name, ways=["centre crop", "10-crop"], **arguments) == first
    assert f"{record.run.id}: not tested by 10-crop, since its weights are not here" in capsys.readouterr().out


def test_an_error_with_statistics_in_tuples_is_measured_once(photographs, tmp_path, capsys):
    path = tmp_path / "a.pth"
    torch.save(models.imagenet_net(18, shortcut="A", classes=3).state_dict(), path)
    inputs = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    weights = {"theirs": {"net": "resnet-18", "path": str(path), "inputs": inputs}}
    arguments = {"data": photographs, "folder": tmp_path, "ways": ["centre crop"], "weights": weights}
    first = pretrained.evaluations([], "imagenet-small", **arguments)
    shutil.rmtree(photographs)
    assert pretrained.evaluations([], "imagenet-small", **arguments) == first
    assert "theirs" in first
    assert "not tested" not in capsys.readouterr().out


@pytest.mark.parametrize("path", ["~/a.th", "$PLACE/a.th", "${PLACE}/a.th"])
def test_home_and_variables_in_the_path_of_weights_are_replaced(path, photographs, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PLACE", str(tmp_path))
    torch.save(models.cifar_net(8).state_dict(), tmp_path / "a.th")
    options = {"net": "resnet-8", "zeros": "behind", "inputs": "ours"}
    (found,) = pretrained.errors_of_others({"theirs": options | {"path": path}}, "digits")
    (expected,) = pretrained.errors_of_others({"theirs": options | {"path": str(tmp_path / "a.th")}}, "digits")
    assert found == expected
    torch.save(models.imagenet_net(18, classes=3, shortcut="A").state_dict(), tmp_path / "a.th")
    weights = {"theirs": {"net": "resnet-18", "path": path, "inputs": "ours"}}
    arguments = {"data": photographs, "weights": weights, "ways": ["centre crop"], "folder": tmp_path}
    assert "centre crop" in pretrained.evaluations([], "imagenet-small", **arguments)["theirs"]


def test_an_undefined_variable_in_the_path_of_weights_is_refused():
    with pytest.raises(ValueError, match=r"weights 'x': path '.NOT_SET/a.th': the environment has no variable NOT_SET"):
        pretrained.check([], weights={"x": {"net": "resnet-18", "path": "$NOT_SET/a.th", "inputs": "ours"}})
