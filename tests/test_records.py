import json
import re
import shutil
import subprocess

import pytest
from conftest import ROOT

from replication import Run, RunsFailedError, all_finished, finished, run_all
from replication.report import page
from replication.runs import records

LEFT = ("run.json", "environment.json", "history.csv", "layers.csv", "predictions.csv", "summary.json", "SHA256SUMS")


@pytest.fixture
def record(make):
    return make(1.0, 2.0, layers=[{"iteration": 0, "layer": 1}], predicted=[0, 1, 2], net="plain-20")


def test_checksums_are_those_of_sha256sum(record):
    done = subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=record.folder, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == len(LEFT) - 1


@pytest.mark.parametrize("name", LEFT)
@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "remove"])
def test_damage_is_named_and_the_record_refused(record, tmp_path, capsys, name, damage):
    path = record.folder / name
    content = path.read_bytes()
    if damage == "remove":
        if name == "summary.json":
            pytest.skip("a run without one is not finished")
        path.unlink()
    else:
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        path.write_bytes({"flip": flipped, "cut": content[:-1], "empty": b""}[damage])
    with pytest.raises(records.DamagedError, match=f"{record.folder} is damaged: ") as caught:
        finished(record.run, tmp_path)
    assert name in str(caught.value) or name == "SHA256SUMS"
    assert str(caught.value).endswith(f". Remove {record.folder} to train this run again")
    with pytest.raises(ValueError, match=r"1 of 1 records in .* cannot be used: restore or remove them. The first: "):
        all_finished(tmp_path)
    assert f"Left out: {record.folder} is damaged" in capsys.readouterr().out
    assert record.folder.exists()


def test_weights_are_checked_only_by_name_and_may_be_missing(record, tmp_path):
    """They are large, and not all records have them here."""
    names = ["weights.pt", "weights.safetensors"]
    for name in names:
        (record.folder / name).write_bytes(b"weights")
    records.write_summary(record.folder, record.summary)
    records.check_sums(record.folder, names)
    assert [found.run for found in all_finished(tmp_path, having=names[1])] == [record.run]
    (record.folder / names[1]).write_bytes(b"altered")
    with pytest.raises(records.DamagedError, match=r"weights.safetensors is not what SHA256SUMS says"):
        records.check_sums(record.folder, names)
    assert finished(record.run, tmp_path).run == record.run
    (record.folder / names[1]).unlink()
    assert finished(record.run, tmp_path).run == record.run
    assert all_finished(tmp_path, having=names[1]) == []


def seal(record, **changed):
    """Rewrite the record's run.json, checksums and all."""
    path = record.folder / "run.json"
    values = json.loads(path.read_text()) | changed
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not None}))
    records.write_summary(record.folder, record.summary)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"version": 0}, "version 0 of the training code, this is version 1, whose results differ"),
        ({"version": None}, "version None of the training code"),
        ({"optimizer": "adam"}, "does not understand .it has fields that are unknown here: optimizer"),
        ({"net": "vgg-16"}, "does not understand .net 'vgg-16': choose"),
        ({"seed": "0"}, "does not understand .seed '0'"),
        ({"fingerprint": None}, "does not understand"),
    ],
)
def test_stale_records_are_refused_and_left_out(record, tmp_path, capsys, changed, message):
    seal(record, **changed)
    with pytest.raises(ValueError, match=message) as caught:
        finished(record.run, tmp_path)
    assert not isinstance(caught.value, records.DamagedError)
    with pytest.raises(ValueError, match=message):
        all_finished(tmp_path)
    assert capsys.readouterr().out.startswith("Left out: ")
    assert record.folder.exists()


def test_a_field_that_a_record_is_older_than_has_its_default(record, tmp_path):
    seal(record, holdout=None)
    assert finished(record.run, tmp_path).run.holdout == 0


def test_a_record_of_before_checksums_is_of_an_older_version_and_not_damaged(record, tmp_path):
    seal(record, version=None)
    (record.folder / "SHA256SUMS").unlink()
    with pytest.raises(ValueError, match="version None of the training code") as caught:
        finished(record.run, tmp_path)
    assert not isinstance(caught.value, records.DamagedError)


def test_what_was_made_elsewhere_does_not_replace_what_was_finished_here(record, tmp_path):
    contents = {path.name: path.read_bytes() for path in record.folder.iterdir()}
    shutil.rmtree(record.folder)
    for name in ("history.csv", "SHA256SUMS"):
        with pytest.raises(records.DamagedError):
            records.keep(record.run, contents | {name: contents[name][:-1]}, tmp_path)
        assert not record.folder.exists()
    records.keep(record.run, contents, tmp_path)
    assert {path.name: path.read_bytes() for path in record.folder.iterdir()} == contents
    records.keep(record.run, contents | {"unreadable.txt": b"another"}, tmp_path)
    assert {path.name: path.read_bytes() for path in record.folder.iterdir()} == contents


@pytest.mark.parametrize("content", ["[]", "3", '"text"', "{", ""])
def test_files_that_hold_something_else_are_refused(record, tmp_path, content):
    (record.folder / "run.json").write_text(content)
    records.write_summary(record.folder, record.summary)
    with pytest.raises(ValueError, match="does not understand"):
        finished(record.run, tmp_path)


def test_a_record_of_another_run_is_not_taken(record, tmp_path, capsys):
    other = Run("plain-20", seed=1)
    assert finished(other, tmp_path) is None
    shutil.copytree(record.folder, other.folder(tmp_path))
    with pytest.raises(ValueError, match=r"holds the record of .*seed=0.*, not of .*seed=1"):
        finished(other, tmp_path)
    assert [found.run for found in all_finished(tmp_path)] == [record.run]  # not twice
    assert "seed-1 holds the record of plain-20__digits__seed-0" in capsys.readouterr().out


def test_history_text_leaves_cells_empty_that_were_not_measured():
    row = {"iteration": 1, "lr": 0.1, "train_error": 50.0, "train_loss": 0.5, "seconds": 1.0}
    text = records.rows_text([row | {"test_error": None, "test_loss": None}])
    assert text == "iteration,lr,train_error,train_loss,test_error,test_loss,seconds\n1,0.1,50.0,0.5,,,1.0\n"


def test_all_finished_runs_are_found(make, tmp_path):
    made = [Run("plain-20", seed=1), Run("resnet-110", "cifar10", schedule=0.5, warmup=False)]
    make(1, 2, net="plain-20", seed=1)
    make(1, 2, net="resnet-110", dataset="cifar10", schedule=0.5, warmup=False)
    unfinished = Run("resnet-20")
    unfinished.folder(tmp_path).mkdir(parents=True)
    (unfinished.folder(tmp_path) / "run.json").write_text(records.run_text(unfinished, "f"))
    found = all_finished(tmp_path)
    assert [record.run for record in found] == made
    assert [record.net for record in found] == ["plain-20", "resnet-110 without warm-up"]
    assert found[0].layers.empty
    assert found[0].predictions.empty
    with pytest.raises(ValueError, match=r"results '.*/nothing': there is no folder"):
        all_finished(tmp_path / "nothing")


def test_a_report_leaves_out_one_bad_record_of_many_but_never_a_published_one(make, tmp_path, monkeypatch, capsys):
    damaged, whole = (make(1, 2, net="plain-20", seed=seed) for seed in (0, 1))
    (damaged.folder / "history.csv").write_bytes((damaged.folder / "history.csv").read_bytes().replace(b"\n", b"\r\n"))
    assert [record.run for record in all_finished(tmp_path)] == [whole.run]
    reason = r"seed-0 is damaged: history.csv is not what SHA256SUMS says \(its line endings were changed"
    assert re.search(f"Left out: .*{reason}", capsys.readouterr().out)
    monkeypatch.setattr(records, "PUBLISHED", tmp_path)
    with pytest.raises(ValueError, match=rf"1 of 2 records in .*: restore them \(git restore .*{reason}"):
        all_finished(tmp_path)
    with pytest.raises(ValueError, match=reason):
        page.everything(tmp_path / "own", "published")
    with pytest.raises(RunsFailedError, match=rf"{reason}.*Restore it: git restore"):
        run_all([damaged.run], tmp_path / "own")
    assert not (tmp_path / "own" / "runs").exists()  # nothing was trained in its place


@pytest.mark.parametrize("option", ["core.autocrlf=true", pytest.param("core.eol=crlf", marks=pytest.mark.long)])
def test_git_leaves_published_records_as_they_are(committed, tmp_path, option):
    """In a clone of anybody's settings, all checksums are right, and the scripts run."""
    source, clone = tmp_path / "source", tmp_path / "clone"
    source.mkdir()
    shutil.copy(ROOT / ".gitattributes", source)
    shutil.copytree(committed / "results", source / "results")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-c", option, "-C"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "all"]):
        subprocess.run([*git, source, *command], check=True)
    subprocess.run([*git, tmp_path, "clone", "-q", source, clone], check=True)
    assert len(all_finished(clone / "results" / "published")) == len(all_finished(source / "results" / "published")) > 9
    weights = list((clone / "results").rglob("weights.safetensors"))
    assert weights
    for path in weights:
        records.check_sums(path.parent, [path.name])
    assert b"\r" not in (clone / "results" / "regenerate.sh").read_bytes()


def test_conditions_are_told_apart_by_what_differs_and_have_an_order(make):
    """Two of as many iterations: 1,100 of the 64,000 of the recipe for CIFAR are 0.0171875."""
    options = [{"schedule": 0.0171875, "recipe": "cifar"}, {"schedule": 0.5}, {}]
    made = [make(1, 2, net="plain-20", **each) for each in options]
    short = [
        "digits, 1,100 iterations",
        "digits, 550 iterations",
        "digits, recipe cifar, 1,100 iterations",
    ]
    assert [name for name, _, _ in records.by_conditions(made)] == short
    assert [members for _, _, members in records.by_conditions(made)] == [[made[2]], [made[1]], [made[0]]]
    made.append(make(1, 2, net="plain-20", precision="bfloat16"))
    full = [f"digits, recipe digits, 1,100 iterations, {precision}" for precision in ("float32", "bfloat16")]
    assert [name for name, _, _ in records.by_conditions(made)] == [*full, *short[1:]]


@pytest.mark.parametrize("damage", [lambda text: text[:-9], lambda text: "[]", lambda text: ""])
def test_damaged_evaluations_are_left_out(tmp_path, capsys, damage):
    path = tmp_path / "evaluation.json"
    values = {"10-crop": {"top1": 20.0, "top5": 4.5}, "images": 6}
    path.write_text(records.json_text(values))
    assert records.read_json(path) == values
    path.write_text(damage(path.read_text()))
    assert records.read_json(path) == {}
    assert f"{path} is damaged: it is left out." in capsys.readouterr().out
    assert records.read_json(tmp_path / "none.json") == {}
