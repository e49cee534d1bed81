"""benchmarks/gpu.py on a CPU: its parts run, failures stay apart, and its sums are right."""

import json
from argparse import Namespace

import pytest
import torch
from helpers.commands import ROOT, cli, refused

from benchmarks.gpu_parts import checks
from benchmarks.gpu_parts.checks import check, share_of_change
from benchmarks.gpu_parts.measuring import (
    EnoughSteps,
    StepClock,
    after_each_step,
    covered,
    load_script,
    measure,
)


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import gpu

    return gpu


def run(tmp_path, *parts):
    """(exit status, record, table) of the parts, run small on the CPU."""
    output = tmp_path / "gpu.json"
    flags = ["--device", "cpu", "--small", "--minutes", 15, "--output", output]
    result = cli("benchmarks/gpu.py", *flags, "--parts", *parts)
    assert output.exists(), result.stderr
    return result.returncode, json.loads(output.read_text()), output.with_suffix(".md").read_text()


@pytest.mark.slow
def test_gpu_benchmark_runs_small_on_a_cpu(tmp_path):
    """One part of each kind; two processes are tested with the launchers."""
    parts = ["step", "resume", "training_files", "training_device", "evaluation_float32"]
    status, record, table = run(tmp_path, *parts)
    assert status == 0, table
    assert list(record["parts"]) == parts and not record["measured"]
    assert "No GPU was measured" in table and "| ours, device |" in table
    for name in ("step", "resume"):
        assert all(row["difference"] == 0 for row in record["parts"][name]["checks"])  # CPU to CPU


@pytest.mark.slow
def test_part_that_fails_is_recorded_and_the_rest_go_on(tmp_path):
    # The released recipe finds no files, because the part that writes them is not asked for.
    status, record, table = run(tmp_path, "training_released", "evaluation_released")
    assert status == 1
    assert "plain.hdf5" in record["parts"]["training_released"]["error"]
    assert record["parts"]["evaluation_released"]["rows"]
    assert "training_released: FAILED" in table and "TCA_f: released" in table


def run_function(gpu, monkeypatch, tmp_path, function):
    """What `run_part` writes for a part of that function."""
    monkeypatch.setitem(gpu.PARTS, "step", gpu.Part("checks", "fake.part", 1))
    module = Namespace(part=function)
    monkeypatch.setattr(gpu.importlib, "import_module", lambda name: module)
    output = tmp_path / "result.json"
    gpu.run_part(Namespace(run="step", folder=tmp_path, output=output))
    return json.loads(output.read_text())


def test_missing_package_skips_a_part_and_is_named(gpu, monkeypatch, tmp_path):
    def part(options):
        import a_package_that_is_missing  # noqa: F401

    result = run_function(gpu, monkeypatch, tmp_path, part)
    assert result == {"skipped": "needs a_package_that_is_missing, which is not installed"}
    assert gpu.passed(result)


def test_error_of_a_part_is_one_line(gpu, monkeypatch, tmp_path):
    def part(options):
        raise RuntimeError("CUDA error: out of memory\nmore lines")

    result = run_function(gpu, monkeypatch, tmp_path, part)
    assert result == {"error": "RuntimeError: CUDA error: out of memory"}
    assert not gpu.passed(result)


def test_check_that_is_not_a_number_does_not_pass(gpu):
    assert check("a", 1e-4, 1e-3)["passes"] and not check("a", 1e-2, 1e-3)["passes"]
    nan = check("a", float("nan"), 1e-3)
    assert not nan["passes"] and not gpu.passed({"checks": [nan]})


def test_share_of_change_of_weights():
    start = {"a": torch.zeros(2), "b": torch.zeros(1)}
    expected = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([4.0])}
    found = {"a": torch.tensor([3.0, 0.3]), "b": torch.tensor([4.4])}
    assert share_of_change(found, expected, start) == pytest.approx(0.5 / 5)


def test_start_weights_are_those_of_a_run_without_steps(tmp_path):
    flags = [*checks.make_run_files(tmp_path), "--epochs", 0, "--device", "cpu"]
    flags += ["--batch_sz", 4, "--model_path", tmp_path / "run"]
    assert load_script("train.py").main(list(map(str, flags))) == 0
    written, start = checks.trained_weights(tmp_path / "run"), checks.start_weights()
    assert all(written[name].equal(start[name]) for name in start)


def test_covered_counts_overlapping_kernels_once():
    assert covered([(5, 6), (0, 2), (1, 3), (2.5, 2.7)]) == 4
    assert covered([]) == 0


def test_step_clock_times_the_steps_after_the_warm_up_and_ends_the_run():
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], 0.1)
    weight.grad = torch.ones(1)
    clock = StepClock("cpu", warm_up=2, steps=3)
    with pytest.raises(EnoughSteps), after_each_step(clock):
        for _ in range(100):
            optimizer.step()
    assert clock.count == 2 + 3 + StepClock.PROFILED
    assert 0 < clock.seconds < 1 and clock.kernel_seconds is None and clock.peak_gib is None


def test_measure_on_a_cpu_has_no_figures_of_a_gpu():
    calls = []
    result = measure(lambda: calls.append(1), "cpu", repeats=4)
    assert len(calls) == 6
    assert result["seconds"] >= 0 and result["busy"] is None and result["peak_gib"] is None


def test_cpu_is_refused_without_small(gpu):
    assert "--small" in refused(gpu.main, "--device", "cpu")
