import contextlib
import getpass
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import Here
from test_trainers import assert_same, without_time

from replication import Run, evaluate, finished, models, recipes, run_all, trainers
from replication.engine import machine, steps
from replication.runs import environment, recorder

SCHEDULE = 0.02  # 22 iterations on digits
needs_compiler = pytest.mark.skipif(not machine.can_compile(), reason="torch.compile needs g++ and Python's headers")


def written_out(norm, x):
    """The net's batch norm as torch.compile sees it, without compiling what it sees."""
    return torch.compile(norm, backend="eager", dynamic=False)(x)


@pytest.mark.parametrize("offset", [0, 30])
def test_batch_norm_written_out_is_batch_norm(offset):
    """Outputs, gradients and running statistics against torch's own in float64, far from zero, too."""
    torch.manual_seed(0)
    x = (torch.randn(16, 5, 7, 6) * torch.arange(1, 6)[:, None, None] + offset).requires_grad_()
    ours = models.BatchNorm(5)
    exact = torch.nn.BatchNorm2d(5).double()
    for norm in (ours, exact):
        with torch.no_grad():
            norm.weight.copy_(torch.linspace(0.5, 2, 5))
            norm.bias.copy_(torch.linspace(-1, 1, 5))
    exact_x = x.detach().double().requires_grad_()
    upstream = torch.randn_like(x)
    for output, inputs, norm in ((written_out(ours, x), x, ours), (exact(exact_x), exact_x, exact)):
        (output * upstream).sum().backward()
        inputs.output = output
        assert norm.training
    tolerance = {"rtol": 1e-4, "atol": 1e-4 if offset else 1e-5, "check_dtype": False}
    torch.testing.assert_close(x.output, exact_x.output, **tolerance)
    torch.testing.assert_close(x.grad, exact_x.grad, **tolerance)
    for name in ("weight", "bias"):
        torch.testing.assert_close(getattr(ours, name).grad, getattr(exact, name).grad, **tolerance)
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(ours, name), getattr(exact, name), **tolerance)


def test_batch_norm_of_a_constant_channel_stays_finite():
    x = torch.full((8, 3, 4, 4), 1000.1, requires_grad=True)
    output = written_out(models.BatchNorm(3), x)
    output.sum().backward()
    assert output.isfinite().all()
    assert x.grad.isfinite().all()


def test_batch_norm_is_torchs_own_in_tests_and_where_it_is_not_compiled():
    x, ours, theirs = torch.randn(8, 3, 4, 4), models.BatchNorm(3), torch.nn.BatchNorm2d(3)
    assert torch.equal(ours(x), theirs(x))
    assert torch.equal(written_out(ours.eval(), x), theirs.eval()(x))


@needs_compiler
@pytest.mark.parametrize(("net", "precision"), [("resnet-8", "float32"), ("plain-8", "bfloat16")])
def test_a_compiled_step_is_a_step(net, precision):
    """The same batches, in groups of batch norm, from the same weights: moved to the same place but for rounding."""
    recipe = replace(recipes.RECIPES["digits"], bn_batch=64)
    torch.manual_seed(0)
    images, labels = torch.randn(2, 128, 3, 8, 8), torch.randint(0, 10, (2, 128))
    initial, found = Run(net).name.build(10).state_dict(), {}
    for compile in (False, True):
        with environment.reproducible(Run(net), (8, 8)):
            step = steps.Step(Run(net).name.build(10), recipe, precision)
            step.net.load_state_dict(initial)
            step.begin((8, 8), compile)
            assert isinstance(step.forward, torch._dynamo.OptimizedModule) == compile
            for number in range(2):
                step(images[number].to(memory_format=torch.channels_last), labels[number], 0.01)
        names = [name for name in initial if not name.endswith("num_batches_tracked")]
        found[compile] = step.totals, torch.cat([(step.net.state_dict()[n] - initial[n]).flatten() for n in names])
    (totals, moved), (compiled_totals, compiled_moved) = found[False], found[True]
    tolerance = {"float32": 1e-4, "bfloat16": 5e-2}[precision]  # bfloat16 rounds to 0.4 %
    assert compiled_totals[0] == pytest.approx(totals[0].item(), rel=tolerance / 10)
    assert moved.norm() > 0
    assert (compiled_moved - moved).norm() < tolerance * moved.norm()


@needs_compiler
def test_a_compiled_run_that_is_interrupted_goes_on_to_the_same_result(tmp_path, monkeypatch):
    run = Run("resnet-8", schedule=SCHEDULE, precision="bfloat16")
    monkeypatch.setattr(environment, "COMPILED_FROM", 0)
    undisturbed = trainers.train(run, tmp_path / "undisturbed")
    assert undisturbed.environment["compiled"]
    monkeypatch.setattr(recorder, "CHECKPOINT_SECONDS", 0)
    step = steps.Step.__call__

    def power_cut(self, images, labels, rate):
        power_cut.steps += 1
        if power_cut.steps == 12:
            raise KeyboardInterrupt
        step(self, images, labels, rate)

    power_cut.steps = 0
    with monkeypatch.context() as context:
        context.setattr(steps.Step, "__call__", power_cut)
        with pytest.raises(KeyboardInterrupt):
            trainers.train(run, tmp_path / "resumed")
    monkeypatch.setattr(environment, "COMPILED_FROM", 1e30)  # a run goes on as it began
    resumed = trainers.train(run, tmp_path / "resumed")
    assert resumed.environment["compiled"]
    assert_same(resumed, undisturbed)


@needs_compiler
def test_more_nets_are_compiled_than_torch_keeps_variants_of(tmp_path, monkeypatch):
    """Without a word, torch would train the ninth as it is."""
    monkeypatch.setattr(environment, "COMPILED_FROM", 0)
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 1)
    runs = [Run(net, schedule=0.002, bn_batch=64) for net in ("plain-8", "resnet-8")]
    frames = torch._dynamo.utils.counters["frames"]
    frames.clear()
    run_all(runs, tmp_path, executor=Here())
    assert frames["ok"] == frames["total"] >= 2


TRAINED = """
import sys
from replication import Run, trainers
from replication.runs import environment
environment.COMPILED_FROM = 0
trainers.train(Run("resnet-8", schedule=0.02), sys.argv[1])
"""


def trained_elsewhere(folder, **variables):
    command = [sys.executable, "-c", TRAINED, folder / "results"]
    return subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("place", ["file/cache", pytest.param("/proc/1", marks=pytest.mark.long)])
def test_without_a_cache_folder_torch_has_a_temporary_one(place, tmp_path):
    """Torch could not even be imported in full, and no net be built; the temporary folder is gone afterwards."""
    (tmp_path / "file").write_text("in the place of a folder")
    (tmp_path / "temporary").mkdir()
    variables = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / place), "TMPDIR": str(tmp_path / "temporary")}
    done = trained_elsewhere(tmp_path, TORCH_COMPILE_DISABLE="1", **variables)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"torch cannot keep compiled code in {tmp_path / place} (")
    assert finished(Run("resnet-8", schedule=0.02), tmp_path / "results")
    left = [path.name for path in (tmp_path / "temporary").iterdir()]
    assert left in ([], [f"torchinductor_{getpass.getuser()}"])  # torch makes its own, too


@needs_compiler
@pytest.mark.parametrize("broken", ["compiler", pytest.param("linker", marks=pytest.mark.long)])
def test_where_compiling_fails_training_goes_on_without(broken, tmp_path):
    """One line says so, the record too, and the result is that of a net that was never compiled."""
    script = tmp_path / "broken"
    script.write_text("#!/bin/sh\n" + {"linker": "exec true\n"}.get(broken, "echo out of order >&2; exit 1\n"))
    script.chmod(0o755)
    done = trained_elsewhere(tmp_path, CXX=str(script), TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("the net could not be compiled, training goes on without: ") == 1
    record = finished(Run("resnet-8", schedule=0.02), tmp_path / "results")
    assert record.environment["compiled"] is False
    assert_same(record, trainers.train(record.run, tmp_path / "eager"))


def trained(run, compile=False, prepare=lambda step: None):
    """Ten steps of a run, the rate divided after six: the step, and what it moved the weights to."""
    step = trainers.new_step(run, 10)
    prepare(step)
    step.begin((8, 8), compile)
    generator = torch.Generator().manual_seed(0)
    for iteration in range(10):
        images = torch.randn(128, 3, 8, 8, generator=generator).to(step.device, memory_format=torch.channels_last)
        labels = torch.randint(0, 10, (128,), generator=generator).to(step.device)
        step(images, labels, 0.1 if iteration < 6 else 0.01)
    return step, step.net.state_dict()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=needs_compiler)])
@pytest.mark.parametrize("bn_batch", [128, 32])
def test_a_replayed_step_is_a_step(bn_batch, compile):
    run = Run("resnet-8", bn_batch=bn_batch)
    with evaluate.deterministic():  # else the steps differ by TF32, and by sums in any order
        step, replayed = trained(run, compile)
        _, eager = trained(run, compile, lambda step: setattr(step, "capturing", False))
    assert step.graph is not None
    for name, value in eager.items():
        torch.testing.assert_close(replayed[name], value, rtol=1e-4, atol=1e-5, msg=name)


class Recorded:
    """In place of a CUDA graph, where there is no GPU: what is computed while it is captured is done when replayed."""

    captured = None

    def replay(self):
        self.compute(*self.inputs)


class Stream:
    """Stands in for a CUDA stream: there is nothing to wait for."""

    def __init__(self, device=None):
        pass

    def wait_stream(self, other):
        assert isinstance(other, Stream)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
@pytest.mark.parametrize("fails", [False, True])
def test_a_step_gives_its_graph_every_batch_and_rate(fails, monkeypatch, capsys):
    """The way through a step on a GPU, but for the GPU: eager steps, capture or its failure, replays."""
    compute, replays = steps.Step._compute, []

    @contextlib.contextmanager
    def capture(graph, capture_error_mode):
        if fails:
            raise RuntimeError("operation not permitted when stream is capturing")
        Recorded.captured = graph
        yield
        Recorded.captured = None

    def record(self, *inputs):
        if Recorded.captured is None:
            compute(self, *inputs)
        else:
            Recorded.captured.inputs = inputs
            Recorded.captured.compute = lambda *inputs: replays.append(1) or compute(self, *inputs)

    def as_on_a_gpu(step):
        step.on_gpu = step.capturing = True
        step.rate = torch.tensor(0.0)
        step.optimizer.param_groups[0]["fused"] = False  # on a CPU it takes no tensor for a rate

    monkeypatch.setattr(steps.Step, "_compute", record)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recorded)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: None)
    _, weights = trained(Run("resnet-8", bn_batch=64), prepare=as_on_a_gpu)
    monkeypatch.undo()
    _, expected = trained(Run("resnet-8", bn_batch=64))
    assert len(replays) == (0 if fails else 10 - steps.EAGER_STEPS)
    assert ("could not be captured" in capsys.readouterr().out) == fails
    for name, value in expected.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-3, atol=1e-4, msg=name)


def test_long_runs_are_compiled_where_that_is_possible(monkeypatch):
    monkeypatch.setattr(machine, "can_compile", lambda: True)
    long = Run("resnet-20", "cifar10")
    assert environment.compiles(long, (32, 32))
    assert environment.compiles(replace(long, net="resnet-110", seed=3, precision="bfloat16"), (32, 32))
    assert not environment.compiles(Run("resnet-56"), (8, 8))
    assert not environment.compiles(replace(long, schedule=0.01), (32, 32))
    assert not environment.compiles(long, (32, 32), processes=2)
    assert not environment.compiles(replace(long, net="resnet-1202"), (32, 32))
    monkeypatch.setattr(machine, "can_compile", lambda: False)
    assert not environment.compiles(long, (32, 32))


def test_compiling_can_be_switched_off_and_needs_a_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert not machine.can_compile()
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")
    assert not machine.can_compile()


@pytest.mark.parametrize(
    ("text", "emulated"),
    [
        ("processor : 0\nflags\t\t: fpu avx2 avx512f avx512_vnni\n", True),
        ("processor : 0\nflags\t\t: fpu avx512f avx512_bf16 fsrm\n", False),
        ("processor : 0\nflags\t\t: fpu amx_bf16 amx_tile\n", False),
        ("processor : 0\nFeatures\t: fp asimd bf16\n", False),  # ARM
        ("", False),
        (None, False),  # no Linux
    ],
)
def test_a_processor_without_bfloat16_is_known_by_its_flags(text, emulated, tmp_path, monkeypatch):
    cpuinfo = tmp_path / "cpuinfo"
    if text is not None:
        cpuinfo.write_text(text)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert machine.emulates_bfloat16(cpuinfo) == emulated
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert not machine.emulates_bfloat16(cpuinfo)


def test_short_runs_say_that_they_were_not_compiled(tmp_path):
    record = trainers.train(Run("resnet-8", schedule=SCHEDULE), tmp_path)
    assert record.environment["compiled"] is False
    assert len(without_time(record)) == 22
