import json
import shutil
import subprocess
import sys

import pandas as pd
import pytest

from replication import Run, data, measure, trainers, verify
from replication.engine import machine
from replication.runs import records

RUN = Run("resnet-8", schedule=0.05)  # 55 iterations on digits


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return trainers.train(RUN, tmp_path_factory.mktemp("results"))


def altered(record, folder, changes):
    """A copy of the record with some values changed, by (file, row, column), and the checksums made to fit."""
    copy = RUN.folder(folder)
    shutil.copytree(record.folder, copy)
    for (name, row, column), factor in changes.items():
        table = pd.read_csv(copy / name)
        table.loc[row, column] *= factor
        (copy / name).write_text(table.to_csv(index=False))
    records.write_summary(copy, json.loads((copy / "summary.json").read_text()))
    return records.finished(RUN, folder)


def test_a_record_is_confirmed_to_the_last_bit_where_it_was_made(trained):
    found = verify.verify(trained, rows=3)
    assert found.alike
    assert found.differences == ()
    assert str(found).startswith(f"{RUN.id} is confirmed to the last bit: ")
    last = trained.history["iteration"][2]
    assert str(found).endswith(f"3 of {len(trained.history)} rows of the history ({last} iterations).")


@pytest.mark.skipif(machine.cores() < 2, reason="threads need cores")
def test_a_record_is_made_again_with_its_number_of_threads(trained, tmp_path):
    record = trainers.train(RUN, tmp_path, threads=2)
    assert record.environment["threads"] == 2 > trained.environment["threads"]
    found = verify.verify(record)
    assert found.alike
    assert found.differences == ()


def test_an_altered_record_is_told_by_row_and_column(trained, tmp_path, monkeypatch):
    """By anything at all on a like machine; elsewhere by more than rounding, and what it leads to, can explain."""
    small = {("history.csv", 1, "train_error"): 1 + 1e-12, ("layers.csv", 4, "gradient_norm"): 1.0001}
    large = {("history.csv", 0, "train_loss"): 0.5, ("layers.csv", 0, "weight_norm"): 1.01}
    record = altered(trained, tmp_path, small | large)
    for alike, changes in ((True, small | large), (False, large)):
        found = verify.verify(record, rows=2)
        assert found.alike == alike
        assert "is not confirmed" in str(found)
        places = {f"{name}, row {row + 1}, {column}" for name, row, column in changes}
        assert {sentence.partition(":")[0] for sentence in found.differences} == places
        monkeypatch.setitem(record.environment, "processor", "another one")


@pytest.mark.parametrize("net", ["plain-20", "resnet-20"])
def test_bfloat16_stays_within_the_tolerances_of_another_machine(net):
    """As float32 computes them, the signals of bfloat16 would be confirmed; and in float32 they would not."""
    dataset = data.load("digits")
    step = trainers.new_step(Run(net), 10)
    exact, rounded = (
        measure.signals(step.net, *dataset.batches(128, 0)(0), precision) for precision in ("float32", "bfloat16")
    )
    apart = {
        column: max(abs(b[column] / a[column] - 1) for a, b in zip(exact, rounded, strict=True) if a[column])
        for column in measure.SIGNALS[:4]
    }
    assert verify.GRADIENTS["float32"] < apart.pop("gradient_norm") < verify.GRADIENTS["bfloat16"]
    assert max(apart.values()) < verify.SIGNALS["bfloat16"]


def test_what_cannot_be_verified_is_refused(trained, pets, make):
    with pytest.raises(ValueError, match=r"rows 0: the history of .* has \d+, choose"):
        verify.verify(trained, rows=0)
    other = make(1, 2, net="plain-8", dataset="pets")
    with pytest.raises(ValueError, match=r"'pets' in .* holds other images than plain-8__pets__seed-0 was trained on"):
        verify.verify(other, pets)


@pytest.mark.long
def test_the_command_line_verifies_by_id(trained, tmp_path):
    results = trained.folder.parents[1]
    record = altered(trained, tmp_path, {("history.csv", 0, "train_error"): 1.5})
    command = [sys.executable, "-m", "replication", "verify", record.run.id, "--results", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "history.csv, row 1, train_error: " in done.stdout
    assert records.by_id(RUN.id, results).folder == trained.folder
    with pytest.raises(ValueError, match=rf"there is no such finished run in .* \(did you mean '{RUN.id}'\?\)"):
        records.by_id(RUN.id.replace("8", "9"), results)
