"""The object that knows the engine, in real dist: what horovodrun (MPI and Gloo), torchrun and plain python start."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.commands import ROOT, environment
from helpers.distributed_worker import DTYPES, OPTIMIZERS, RATES, gradients, rows, start_values

BIN = Path(sys.executable).parent
HOROVOD = (BIN / "horovodrun").exists()
LAUNCHERS = {
    "python": (1, ["python"]),
    "torchrun": (2, ["torchrun", "--standalone", "--nproc_per_node", "2"]),
    "horovodrun --mpi": (2, ["horovodrun", "-np", "2", "python"]),
    "horovodrun --gloo": (2, ["horovodrun", "--gloo", "-np", "2", "python"]),
    "horovodrun --mpi, 4": (4, ["horovodrun", "-np", "4", "python"]),
}
SEVERAL = [name for name in LAUNCHERS if name != "python"]
WORKER = str(ROOT / "tests" / "helpers" / "distributed_worker.py")


def launch(launcher, *arguments):
    """The worker under a launcher, with PATH as an activated environment has it; gives the completed process."""
    if launcher.startswith("horovodrun") and not HOROVOD:
        pytest.skip("Horovod is not built; `make horovod` does it")
    command = [*LAUNCHERS[launcher][1], WORKER, *map(str, arguments)]
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    # MPI waits by spinning unless told to yield, at which more processes than cores would crawl.
    env = environment(PATH=path, OMPI_MCA_mpi_yield_when_idle="1")
    return subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """launcher -> what its processes saved, by rank; each launcher runs once."""
    done = {}

    def of(launcher):
        if launcher not in done:
            folder = tmp_path_factory.mktemp("processes")
            finished = launch(launcher, folder)
            assert finished.returncode == 0, finished.stdout + finished.stderr
            done[launcher] = [
                torch.load(folder / f"{rank}.pt") for rank in range(LAUNCHERS[launcher][0])
            ]
        return done[launcher]

    return of


@pytest.fixture(params=LAUNCHERS)
def run(request, results):
    """What each process saved, by rank."""
    return results(request.param)


def same(found, expected):
    torch.testing.assert_close(found, expected, atol=0, rtol=0)


# --- exchange --------------------------------------------------------------------------------------------------------


def test_every_process_knows_its_place(run):
    size = len(run)
    assert [result["place"] for result in run] == [(rank, size, rank, size) for rank in range(size)]


def test_the_engine_is_the_launchers(results):
    engines = [results(launcher)[0]["engine"] for launcher in LAUNCHERS]
    assert engines == ["one process", "torch.distributed", "Horovod", "Horovod", "Horovod"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_allgather_joins_unlike_numbers_of_rows_by_rank_and_keeps_their_type(run, dtype):
    expected = torch.cat([rows(rank, dtype) for rank in range(len(run))])
    for result in run:
        same(result["allgather"][str(dtype)], expected)


def test_nothing_exchanged_carries_a_gradient(run):
    assert len(run) == 1 or not any(result["gradient"] for result in run)


def test_objects_are_broadcast_from_the_first_process_and_collected_by_rank(run):
    for result in run:
        same(result["broadcast"].pop("array"), torch.zeros(2, dtype=torch.long))
        assert result["broadcast"] == {"rank": 0, "none": None}
        assert result["collect"] == [{"rank": rank} for rank in range(len(run))]


def test_models_and_optimisers_are_the_first_processs_after_a_broadcast(run):
    own, _, own_optimizer, _ = run[0]["broadcasts"]
    for result in run:
        same(result["broadcasts"][1], own)  # weights, running statistics, their counter
        same(result["broadcasts"][3], own_optimizer)  # moments, step count, learning rate
    if len(run) > 1:
        assert not torch.equal(run[1]["broadcasts"][0]["running_mean"], own["running_mean"])
        assert run[1]["broadcasts"][2]["param_groups"][0]["lr"] == 0.2


def test_any_mean_and_barrier(run):
    size = len(run)
    for result in run:
        assert result["any"] == [True, True, False]
        same(result["mean"], [torch.tensor(size - 1.0), torch.tensor([[1.0, (size - 1) / 2]])])
        assert result["came before the barrier let go"] == size


def test_each_process_of_a_machine_takes_a_gpu_of_its_own(run):
    for rank, result in enumerate(run):
        assert result["device"] == ["cpu", f"cuda:{rank}" if len(run) > 1 else "cuda", "cuda:3"]


def test_the_learning_rate_scales_with_the_processes_that_are_averaged_and_not_under_adasum(
    results,
):
    assert results("python")[0]["scale"][0] == 1 and results("torchrun")[0]["scale"][0] == 2
    for launcher in SEVERAL[1:]:
        size = LAUNCHERS[launcher][0]
        assert all(result["scale"] == [size, 1] for result in results(launcher))


def test_threads_are_as_the_environment_says(run):
    assert all(result["threads"] == (1, 1) for result in run)


# --- optimisers ------------------------------------------------------------------------------------------------------


def average(values):
    return sum(values) / len(values)


def adasum(values):
    """Maleki et al., MLSys 2021: pairs of neighbours, then pairs of the results."""
    if len(values) == 1:
        return values[0]
    a, b = adasum(values[: len(values) // 2]), adasum(values[len(values) // 2 :])
    dot = (a * b).sum().double()
    return (1 - dot / (2 * (a * a).sum())) * a + (1 - dot / (2 * (b * b).sum())) * b


def steps_by_hand(name, size, how):
    """The four steps in one process: of the mean gradient, or by Adasum of the processes' own steps."""
    if how != "adasum":
        joined = start_values()
        optimizer = OPTIMIZERS[name](joined.values())
        for step, rate in enumerate(RATES):
            optimizer.param_groups[0]["lr"] = rate
            for key, value in joined.items():
                value.grad = average([gradients(rank, step)[key] for rank in range(size)])
            optimizer.step()
        return dict(joined)
    each = [start_values() for _ in range(size)]
    optimizers = [OPTIMIZERS[name](own.values()) for own in each]
    for step, rate in enumerate(RATES):
        before = {key: value.detach().clone() for key, value in each[0].items()}
        for rank, optimizer in enumerate(optimizers):
            optimizer.param_groups[0]["lr"] = rate
            for key, value in each[rank].items():
                value.grad = gradients(rank, step)[key]
            optimizer.step()
        with torch.no_grad():
            for key, start in before.items():
                joined = start + adasum([own[key] - start for own in each])
                for own in each:
                    own[key].copy_(joined)
    return dict(each[0])


@pytest.mark.parametrize("resume", [False, "before wrap", "after wrap"])
@pytest.mark.parametrize("how", ["average", "fp16", "adasum"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_are_those_worked_out_by_hand_and_a_resumed_optimiser_goes_on_alike(
    run, name, how, resume
):
    if (name, how, resume) not in run[0]["steps"]:
        pytest.skip("this engine has no Adasum")
    expected = steps_by_hand(name, len(run), how)
    for result in run:
        for key, value in result["steps"][name, how, resume].items():
            half = how == "fp16" and len(run) > 1
            torch.testing.assert_close(
                value, expected[key].detach(), atol=5e-3 if half else 2e-6, rtol=0
            )
            same(value, run[0]["steps"][name, how, resume][key])  # all processes alike, to the bit
    if how == "fp16" and len(run) > 1 and name == "sgd":
        assert any(
            not torch.equal(result["steps"][name, how, resume]["weight"], expected["weight"])
            for result in run
        )


def test_adasum_adds_what_is_orthogonal_and_averages_what_is_equal(results):
    for result in results("horovodrun --mpi"):
        torch.testing.assert_close(result["adasum"]["orthogonal"], torch.tensor([2.0, 3.0, 0.0]))
        torch.testing.assert_close(result["adasum"]["equal"], torch.tensor([1.0, 2.0, -3.0]))


@pytest.mark.parametrize(
    "launcher, words",
    [
        ("torchrun", "torch.distributed has no Adasum; start with horovodrun"),
        ("horovodrun --gloo", "Adasum needs MPI.*--gloo"),
    ],
)
def test_adasum_is_refused_where_it_is_not_with_what_to_do(results, launcher, words):
    for result in results(launcher):
        assert re.search(words, result["refusal"]) and "--use-adasum" in result["refusal"]
    assert results("python")[0]["refusal"] is None


# --- the end of a run ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "launcher, rank",
    [
        ("torchrun", 0),
        ("torchrun", 1),
        ("horovodrun --mpi", 0),
        ("horovodrun --mpi", 1),
        ("horovodrun --gloo", 1),
    ],
)
def test_a_process_that_fails_ends_all_with_its_error_in_one_line(launcher, rank, tmp_path):
    finished = launch(launcher, tmp_path, "fail", rank)  # times out if the others go on
    assert finished.returncode != 0
    lines = [line for line in (finished.stdout + finished.stderr).splitlines() if "error: " in line]
    who = "process 1 of 2: " if rank else ""
    assert [line for line in lines if line.endswith(f"error: {who}the file of process x is broken")]
    assert "InputError" not in finished.stderr + finished.stdout  # no traceback of ours
    assert not list(tmp_path.iterdir())
