import ast
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import papermill
import pytest
import yaml
from jupyter_client.manager import start_new_kernel

from replication import finished, grid, trainers

ROOT = Path(__file__).parent.parent
NOTEBOOKS = {path.stem: path for path in sorted((ROOT / "notebooks").glob("*.ipynb"))}
TINY = {
    "0_quickstart": "schedule: 0.01",
    "1_architectures": "",
    "2_plain_vs_residual": "schedule: 0.01, depths: [8, 14], precision: bfloat16",
    "3_cifar_depths": "schedule: 0.01, depths: [8, 14], precision: bfloat16",
    "4_shortcuts": "schedule: 0.0002, depth: 8, recipe: cifar",
    "5_layer_responses": "schedule: 0.01, nets: [plain-8, resnet-8], precision: bfloat16",
    "6_imagenet": "schedule: 0.1, nets: [resnet-18], ways: [10-crop, centre crop], precision: bfloat16",
    "7_scorecard": "",
    "8_speed": "nets: [resnet-8], rounds: 1, iterations: 1, notebooks: [], seeds: [0], schedule: 0.01",
    "9_detection": "schedule: 0.01, nets: [faster-rcnn-resnet-18-quarter, faster-rcnn-vgg-11-quarter]",
    "10_explore": "lesions: [plain-20, resnet-20]",
}
FIGURES = {
    "0_quickstart": ["figure_6"],
    "1_architectures": ["figure_2", "figure_3", "figure_5"],
    "2_plain_vs_residual": ["figure_1", "figure_6"],
    "3_cifar_depths": ["figure_6", "figure_depths"],
    "4_shortcuts": ["figure_6"],
    "5_layer_responses": ["figure_7", "residuals", "gradients", "signals"],
    "6_imagenet": ["figure_4"],
    "7_scorecard": [],
    "8_speed": ["speeds"],
    "9_detection": ["losses", "pictures"],
    "10_explore": ["dial", "lesions", "disagreements"],
}


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch):
    """No run here is long enough, but those that 8_speed plans are."""
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")


def by_command(name, output, parameters, cwd=ROOT):
    """Run a notebook by papermill's command, as a user does; the completed process with its text."""
    notebook = os.path.relpath(ROOT / "notebooks" / f"{name}.ipynb", cwd)
    command = [sys.executable, "-m", "papermill", "--no-progress-bar", notebook, str(output), "-y", f"{{{parameters}}}"]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, check=False)


def outputs(path):
    return [output for cell in nbformat.read(path, 4).cells if cell.cell_type == "code" for output in cell.outputs]


TOGETHER = ["2_plain_vs_residual", "3_cifar_depths", "5_layer_responses"]  # what the first trains, the others load
ALONE = [[name] for name in TINY if name not in TOGETHER and name != "4_shortcuts"]  # which runs below
LONG = [pytest.param([name], marks=pytest.mark.long) for name in ("4_shortcuts", *TOGETHER[1:])]


@pytest.fixture
def one_core():
    """A notebook starts a worker for each core, and that costs more than what these tests train."""
    before = os.sched_getaffinity(0)
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])
    os.sched_setaffinity(0, {sorted(before)[worker % len(before)]})
    yield
    os.sched_setaffinity(0, before)


@pytest.mark.parametrize("names", [TOGETHER, *ALONE, *LONG], ids=" ".join)
def test_notebooks_run_by_papermill_and_leave_tables_and_figures(names, tmp_path, one_core):
    for name in names:
        parameters = yaml.safe_load(f"{{{TINY[name]}}}") | {"results": str(tmp_path / "results")}
        if name in ("6_imagenet", "9_detection"):  # draws its pictures
            parameters |= {"data": str(tmp_path / "data")}
        notebook, output = ROOT / "notebooks" / f"{name}.ipynb", tmp_path / f"{name}.ipynb"
        papermill.execute_notebook(notebook, output, parameters, cwd=ROOT, progress_bar=False)
        assert_complete(name, output, tmp_path / "results")


def assert_complete(name, notebook, results):
    """All tables and figures are there, and shown in the executed notebook."""
    folder = results / name
    expected = {"table.csv", "table.md"} | {f"{figure}.{end}" for figure in FIGURES[name] for end in ("png", "svg")}
    assert expected <= {path.name for path in folder.iterdir()}
    shown = outputs(notebook)
    assert not [output for output in shown if output.get("name") == "stderr"]
    pictures = sum("image/png" in output.get("data", {}) for output in shown)
    # A figure in place of the sliders, or the images before the training, which 6_imagenet has yet to draw.
    assert pictures == len(FIGURES[name]) + (name == "10_explore" or name[0] in "02345")
    if name in ("0_quickstart", "6_imagenet"):
        shown = str([output.get("data", {}).get("text/html", "") + output.get("text", "") for output in shown])
        assert all(words in shown for words in ("weight decay", "layer3, ", "trained on"))
        assert ("After 11 iterations: loss " in shown) == (name == "0_quickstart")


@pytest.mark.parametrize("names", [["3_cifar_depths", "7_scorecard"], pytest.param([], marks=pytest.mark.long)])
def test_one_command_makes_tables_and_readme_again_from_the_committed_records_alone(committed, names):
    """Nothing can be trained here: there are no images. Figures depend on the version of matplotlib."""
    for name in ("notebooks", "replication"):
        shutil.copytree(ROOT / name, committed / name, ignore=shutil.ignore_patterns("__pycache__"))
    kept = [path for path in (committed / "results").rglob("*") if path.suffix in (".csv", ".md", ".json", ".txt")]
    pages = [committed / "README.md", *(committed / "docs").iterdir()]
    before = {path: path.read_bytes() for path in [*kept, *pages]}
    before = {path: content for path, content in before.items() if path.parent.parent.name != "runs"}
    script, listed = (committed / "results" / "regenerate.sh").read_text(), (ROOT / "docs" / "results.md").read_text()
    command, with_python = ["bash", "results/regenerate.sh", *names], os.environ | {"PYTHON": sys.executable}
    done = subprocess.run(command, cwd=committed, env=with_python, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Training" not in done.stderr
    given = re.findall(r"^ *notebook .*?\"({.*?})\"", script, flags=re.M)
    assert [each for each in given if f"`{each}`" not in listed] == []
    places = {path.relative_to(committed).parts[2] for path in before if path not in pages}
    assert places == {*re.findall(r"^ *notebook (\w+)", script, flags=re.M), "8_speed"}  # that measures a machine
    assert [str(path) for path, content in before.items() if path.read_bytes() != content] == []


def test_a_notebook_runs_in_its_own_folder_and_a_second_time_from_its_records(tmp_path, one_core):
    """As JupyterLab starts it. Relative paths are the root's: nothing appears beside the notebook."""
    relative = os.path.relpath(tmp_path / "results", ROOT)
    parameters = f"{TINY['4_shortcuts']}, results: {relative}"
    first = by_command("4_shortcuts", tmp_path / "first.ipynb", parameters, cwd=ROOT / "notebooks")
    assert first.returncode == 0, first.stderr
    files = {path: path.read_bytes() for path in (tmp_path / "results").rglob("*") if path.is_file()}
    assert len(list((tmp_path / "results" / "runs").iterdir())) == 4
    second = by_command("4_shortcuts", tmp_path / "second.ipynb", parameters)
    assert second.returncode == 0, second.stderr
    said = [output.get("text", "") for output in outputs(tmp_path / "second.ipynb")]
    assert "4 runs loaded. Nothing had to be trained; fresh=True trains again.\n" in said
    assert {path: path.read_bytes() for path in (tmp_path / "results").rglob("*") if path.is_file()} == files


@pytest.mark.parametrize(
    ("name", "parameters", "message", "number"),
    [
        ("2_plain_vs_residual", "depths: [20, 21]", "depth 21: a CIFAR net has 6n+2 layers", 3),
        pytest.param("2_plain_vs_residual", "shedule: 0.1", "parameter 'shedule': choose", 3, marks=pytest.mark.long),
        ("3_cifar_depths", "cluster: nowhere", "executor 'nowhere': no Dask scheduler answers there", 7),
    ],
)
def test_bad_parameters_fail_before_anything_is_written(name, parameters, message, number, tmp_path):
    done = by_command(name, tmp_path / "notebook.ipynb", f"{parameters}, results: {tmp_path / 'results'}")
    assert done.returncode != 0
    assert message in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["notebook.ipynb"]
    (error,) = [output for output in outputs(tmp_path / "notebook.ipynb") if output.output_type == "error"]
    assert error.traceback == [f"{error.ename}: {error.evalue}"]
    assert done.stderr.rstrip().endswith(f'"In [{number}]":\n{error.traceback[0]}')


@pytest.mark.parametrize("path", NOTEBOOKS.values(), ids=lambda path: path.stem)
def test_notebooks_in_git_are_well_formed_and_carry_no_outputs(path):
    notebook = nbformat.read(path, 4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)
    assert notebook.cells[0].source.startswith("# ")
    assert code[0].metadata.get("tags") == ["parameters"]
    assert all("parameters" not in cell.metadata.get("tags", []) for cell in code[1:])
    assert not any(isinstance(node, ast.FunctionDef) for cell in code for node in ast.walk(ast.parse(cell.source)))
    for line in code[0].source.splitlines():
        assert "  # " in line, "each parameter is one literal with its meaning"
        ast.literal_eval(ast.parse(line).body[0].value)
    names = {target.id for line in ast.parse(code[0].source).body for target in line.targets}
    assert "results" in names
    if "run_all" in "".join(cell.source for cell in code):
        assert names >= {"dataset", "seeds", "schedule", "precision", "recipe", "results", "data", "fresh"}


def test_papermill_may_add_its_paths_beside_a_cell_of_the_users(tmp_path, monkeypatch):
    monkeypatch.setenv("PLACE", str(tmp_path / "there"))
    notebook = nbformat.read(ROOT / "notebooks" / "1_architectures.ipynb", 4)
    notebook.cells[5:] = [nbformat.v4.new_code_cell("# Parameters\nmine, yours = 1, 2\nstart_notebook(globals())")]
    (tmp_path / "course").mkdir()
    nbformat.write(notebook, tmp_path / "course" / "copy.ipynb")
    command = [
        sys.executable,
        "-m",
        "papermill",
        "--inject-paths",
        "copy.ipynb",
        "done.ipynb",
        "-p",
        "results",
        "$PLACE/r",
    ]
    done = subprocess.run(command, cwd=tmp_path / "course", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "there" / "r" / "1_architectures" / "figure_2.svg").exists()
    assert "PAPERMILL_OUTPUT_PATH" in nbformat.read(tmp_path / "course" / "done.ipynb", 4).cells[2].source


def test_errors_in_a_cell_are_one_message_and_bugs_keep_their_traceback(tmp_path):
    results = tmp_path / "results"
    (tmp_path / "file").touch()
    broken = grid(["plain-20"])[0].folder(results)
    broken.mkdir(parents=True)
    (broken / "run.json").write_text("{")
    (broken / "summary.json").write_text("{}")
    cells = [
        cell.source for cell in nbformat.read(NOTEBOOKS["2_plain_vs_residual"], 4).cells if cell.cell_type == "code"
    ]
    manager, client = start_new_kernel(cwd=ROOT / "notebooks")
    try:
        for cell in (cells[0], f"results, depths = {str(results)!r}, [20]", cells[1]):
            assert client.execute_interactive(cell, timeout=60)["content"]["status"] == "ok"

        def shown(cell):
            content = client.execute_interactive(cell, timeout=60, output_hook=lambda message: None)["content"]
            return re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(content["traceback"]))

        assert shown("1\nrun_all([1])") == "TypeError: 1 is no Run: make one with Run(net, dataset, ...)"
        assert shown(f"run_all(runs, {str(tmp_path / 'file')!r})").startswith("ValueError: results ")
        assert shown(f"report.save_table(None, {str(tmp_path / 'file')!r})").startswith("FileExistsError: ")
        first, *others = shown("run_all(runs[:1], results)").splitlines()
        assert first.startswith("RunsFailedError: 1 of 1 runs failed")
        assert [line.split(": ")[:2] for line in others] == [["  plain-20__digits__seed-0", "DamagedError"]]
        for cell, last in {
            "1 / 0": "ZeroDivisionError: division by zero",
            "int('x')": "ValueError: invalid literal for int() with base 10: 'x'",
            "raise ValueError('of a user')": "ValueError: of a user",
            "report.errors(3)": "TypeError: 'int' object is not iterable",  # which no message of ours explains
        }.items():
            text = shown(cell)
            assert "Traceback (most recent call last)" in text
            assert f"----> 1 {cell}" in text
            assert text.endswith(last)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def test_every_notebook_is_run_by_these_tests():
    assert list(NOTEBOOKS) == sorted(TINY) == sorted(FIGURES)


SHARED = 'dataset = "digits"\nnets = ["resnet-14", "plain-14"]\nseeds = [3]\nschedule = 0.2\n'


def left(run, results):
    """What a run left, but for times."""
    record = finished(run, results)
    summary = {name: value for name, value in record.summary.items() if "second" not in name}
    weights = (record.folder / "weights.pt").read_bytes()
    return summary, record.history.drop(columns="seconds").to_csv(), record.layers.to_csv(), weights


def wait_for(condition):
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def begun(runs, results):
    return all((run.folder(results) / "history.csv").exists() for run in runs)


def checkpoints(runs, results):
    return [(run.folder(results) / "checkpoint.pt").exists() for run in runs]


@pytest.mark.long  # test_kills does it without notebooks
def test_runs_go_on_from_an_interrupted_notebook_to_a_killed_one_to_another(tmp_path):
    """In JupyterLab's way and by papermill, in different notebooks; the end is that of an undisturbed run."""
    results = tmp_path / "results"
    runs = grid(["resnet-14", "plain-14"], seeds=[3], schedule=0.2)

    # A kernel as JupyterLab starts it, in the notebook's folder, and its button for an interrupt.
    cells = [cell.source for cell in nbformat.read(NOTEBOOKS["5_layer_responses"], 4).cells if cell.cell_type == "code"]
    manager, client = start_new_kernel(cwd=ROOT / "notebooks")
    try:
        for cell in (cells[0], f"{SHARED}results = {str(results)!r}", cells[1]):
            assert client.execute_interactive(cell, timeout=60)["content"]["status"] == "ok"
        said = []
        client.execute(next(cell for cell in cells if "run_all(runs" in cell))
        wait_for(lambda: begun(runs, results))
        manager.interrupt_kernel()
        while (reply := client.get_iopub_msg(timeout=60))["content"].get("execution_state") != "idle":
            said.append(str(reply["content"]))
        assert checkpoints(runs, results) == [True, True]
        assert any("KeyboardInterrupt" in text for text in said)
        assert any(
            "Interrupted: 0 of 2 runs were finished. The same call, or running this cell" in text for text in said
        )
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)

    # By papermill in another notebook, whose kernel is killed: its workers, left alone, write checkpoints.
    reached = {run: run.folder(results).joinpath("history.csv").stat().st_mtime_ns for run in runs}
    notebook, options = (
        ROOT / "notebooks" / "2_plain_vs_residual.ipynb",
        f"seeds: [3], schedule: 0.2, results: {results}",
    )
    command = [sys.executable, "-m", "papermill", "--no-progress-bar", str(notebook), str(tmp_path / "killed.ipynb")]
    command += ["-y", f"{{depths: [14], {options}}}"]
    killed = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    wait_for(lambda: all(run.folder(results).joinpath("history.csv").stat().st_mtime_ns > reached[run] for run in runs))
    (kernel,) = Path(f"/proc/{killed.pid}/task/{killed.pid}/children").read_text().split()
    os.kill(int(kernel), signal.SIGKILL)
    assert killed.wait(timeout=60) != 0
    assert all(done is None for done in (finished(run, results) for run in runs))

    # And to the end by papermill in the first one.
    done = by_command("5_layer_responses", tmp_path / "done.ipynb", f"nets: [resnet-14, plain-14], {options}")
    assert done.returncode == 0, done.stderr
    for run in runs:
        trainers.train(run, tmp_path / "undisturbed")
        assert left(run, results) == left(run, tmp_path / "undisturbed")
