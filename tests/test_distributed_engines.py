"""The Distributed object in real runs: python, torchrun, horovodrun with MPI and with Gloo."""

import re
from types import SimpleNamespace

import pytest
import torch
from helpers.commands import ROOT
from helpers.distributed_worker import (
    DTYPES,
    LEARNING_RATES,
    OPTIMIZERS,
    gradients,
    rows,
    start_values,
)
from helpers.launchers import NO_HOROVOD, finish, launch
from helpers.threads import run_in_threads

import distributed
from utils import InputError

PROCESSES = {  # launcher -> how many it starts
    "python": 1,
    "torchrun": 2,
    "horovodrun": 2,
    "horovodrun --gloo": 2,
    "horovodrun, 4 processes": 4,
}
WORKER = ROOT / "tests" / "helpers" / "distributed_worker.py"

pytestmark = pytest.mark.distributed


def run_worker(launcher, *arguments):
    """Run the worker under a launcher and give its result."""
    if launcher.startswith("horovodrun") and NO_HOROVOD:
        pytest.skip(NO_HOROVOD)
    return finish(launch(launcher, WORKER, *arguments), timeout=300)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A function: launcher -> what its processes saved, by rank. Each launcher runs once."""
    saved = {}

    def of(launcher):
        if launcher not in saved:
            folder = tmp_path_factory.mktemp("processes")
            finished = run_worker(launcher, folder)
            assert finished.returncode == 0, finished.stdout + finished.stderr
            ranks = range(PROCESSES[launcher])
            saved[launcher] = [torch.load(folder / f"{rank}.pt") for rank in ranks]
        return saved[launcher]

    return of


@pytest.fixture(params=PROCESSES)
def run(request, results):
    """What the processes of a launcher saved, by rank."""
    return results(request.param)


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, atol=0, rtol=0)


# --- exchange -----------------------------------------------------------------------------------


def test_ranks_and_world_sizes(run):
    size = len(run)
    assert [result["ranks"] for result in run] == [(rank, size, rank, size) for rank in range(size)]


@pytest.mark.parametrize(
    "launcher, backend",
    [
        ("python", "one process"),
        ("torchrun", "torch.distributed"),
        ("horovodrun", "Horovod"),
        ("horovodrun --gloo", "Horovod"),
    ],
)
def test_backend_is_that_of_the_launcher(results, launcher, backend):
    assert {result["backend"] for result in results(launcher)} == {backend}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_gather_unequal_lengths_keeps_rank_order_and_type(run, dtype):
    expected = torch.cat([rows(rank, dtype) for rank in range(len(run))])
    for result in run:
        assert_same(result["all_gather"][str(dtype)], expected)


def test_all_gather_carries_no_gradient(run):
    if len(run) == 1:
        pytest.skip("one process returns its own tensor")
    assert not any(result["gradient"] for result in run)


def test_objects_broadcast_from_rank_0_and_gathered_by_rank(run):
    expected = {"rank": 0, "array": torch.zeros(2, dtype=torch.long), "none": None}
    for result in run:
        assert_same(result["broadcast"], expected)
        assert result["only rank 0 has it"] == {"of": "rank 0"}  # Horovod hung on such a pair


def test_values_with_tensors_are_gathered_on_rank_0(run):
    expected = [{"rank": rank, "rows": [rows(rank, torch.bfloat16)]} for rank in range(len(run))]
    assert_same(run[0]["gathered"], expected)
    assert all(result["gathered"] is None for result in run[1:])


def test_weights_and_moments_travel_tensor_by_tensor_never_pickled():
    """The threads' exchange refuses to pickle a tensor."""

    def moments(rank):
        own = torch.full((2, 3), float(rank), dtype=torch.bfloat16)
        return {"state": {0: {"exp_avg": own.T, "step": torch.tensor(rank)}}, "lr": [0.1 * rank]}

    def exchange(dist):
        module = torch.nn.BatchNorm1d(3)
        torch.nn.init.constant_(module.weight, dist.rank + 5)
        storage = module.weight.data_ptr()
        dist.broadcast_model(module)
        assert module.weight.data_ptr() == storage  # the optimiser holds these tensors
        gathered = dist.gather_to_main(moments(dist.rank))
        assert (gathered is None) == (dist.rank > 0)  # nobody else needs memory for all
        return module.weight.detach(), gathered, dist.scatter_from_main(gathered)

    results = run_in_threads(3, exchange)
    assert_same(results[0][1], [moments(rank) for rank in range(3)])
    for rank, (weight, _, own) in enumerate(results):
        assert_same(weight, torch.full((3,), 5.0))
        assert_same(own, moments(rank))


def test_agree_gives_every_process_the_largest_number(run):
    assert all(result["agree"] == 10 for result in run)


def test_broadcast_model_and_optimizer_are_those_of_rank_0(run):
    first_model, _ = run[0]["broadcasts"]["model"]
    first_optimizer, _ = run[0]["broadcasts"]["optimizer"]
    for result in run:
        assert_same(result["broadcasts"]["model"][1], first_model)  # running statistics as well
        assert_same(result["broadcasts"]["optimizer"][1], first_optimizer)  # moments, step, lr
    if len(run) > 1:  # they differed before
        model, _ = run[1]["broadcasts"]["model"]
        optimizer, _ = run[1]["broadcasts"]["optimizer"]
        assert not torch.equal(model["running_mean"], first_model["running_mean"])
        assert optimizer["param_groups"][0]["lr"] == 0.2


def test_any_mean_barrier(run):
    size = len(run)
    for result in run:
        assert result["any"] == [True, True, False]
        assert_same(result["mean"][0], torch.tensor(size - 1.0))
        assert_same(result["mean"][1], torch.tensor([[1.0, (size - 1) / 2]]))
        assert result["barrier"] == size


@pytest.mark.parametrize("rank, gpus, device", [(0, 2, 0), (1, 2, 1), (1, 1, 0), (5, 4, 1)])
def test_device_is_a_gpu_of_its_own_and_the_current_one(monkeypatch, rank, gpus, device):
    current = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(distributed, "check_device", lambda name: name)
    dist = distributed.Distributed()
    dist.local_rank, dist.local_world_size = rank, 8
    assert dist.device("cuda") == f"cuda:{device}" and current == [device]
    assert dist.device("cuda:3") == "cuda:3" and current == [device, 3]
    assert dist.device("cpu") == "cpu" and current == [device, 3]


def test_processes_that_name_one_gpu_do_not_exchange_by_nccl(monkeypatch):
    """NCCL refuses two processes on one GPU: their tensors go through the CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    monkeypatch.setattr(distributed, "check_device", lambda name: name)
    # Two processes on this machine; one here and two on another, which decides alike.
    for processes in (2, 1):
        for name, by_nccl in (("cuda", True), ("cuda:0", False), ("cpu", False)):
            dist = distributed.TorchDistributed.__new__(distributed.TorchDistributed)
            dist.local_rank, dist.local_world_size, dist._nccl = 0, processes, True
            dist._share_machines = True
            dist.device(name)
            assert dist._nccl == by_nccl, name


def test_processes_of_horovod_that_would_share_a_gpu_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    monkeypatch.setattr(distributed, "check_device", lambda name: name)
    dist = distributed.HorovodDistributed.__new__(distributed.HorovodDistributed)
    dist._hvd = SimpleNamespace(nccl_built=lambda: True)
    dist.local_rank, dist.local_world_size = 1, 2
    assert dist.device("cuda") == "cuda:1" and dist.device("cpu") == "cpu"
    with pytest.raises(InputError, match="2 processes of this machine would share 1 GPU,"):
        dist.device("cuda:1")
    dist.local_world_size = 3
    with pytest.raises(InputError, match="3 processes .* 2 GPUs, .* start with torchrun"):
        dist.device("cuda")


def test_one_process_of_horovod_for_cpus_is_refused_a_gpu():
    """Horovod gathers no tensor of a GPU then, not even of one process."""
    dist = distributed.HorovodDistributed.__new__(distributed.HorovodDistributed)
    dist._hvd = SimpleNamespace(nccl_built=lambda: False)
    with pytest.raises(InputError, match="built for CPUs alone"):
        dist.device("cuda")


@pytest.mark.parametrize("launcher", ["horovodrun", "horovodrun --gloo"])
def test_cuda_under_horovod_without_nccl_is_refused_with_what_to_do(results, launcher):
    for result in results(launcher):
        if result["nccl"]:
            pytest.skip("this Horovod was built with NCCL")
        assert "Horovod was built for CPUs alone" in result["cuda_refusal"]
        for advice in ("make -B horovod", "torchrun", "--device cpu"):
            assert advice in result["cuda_refusal"]


@pytest.mark.parametrize("launcher", PROCESSES)
def test_lr_scale_is_the_number_of_averaged_gradients(results, launcher):
    for result in results(launcher):
        average, adasum = result["lr_scale"]
        assert average == PROCESSES[launcher]
        if launcher.startswith("horovodrun"):
            assert adasum == 1


def test_threads_are_those_of_the_environment(run):
    assert all(result["threads"] == (1, 1) for result in run)


# --- optimisers ---------------------------------------------------------------------------------


def mean_of(values):
    return sum(values) / len(values)


def adasum_of(values):
    """Maleki et al., MLSys 2021: combine neighbours in pairs, then the results in pairs."""
    if len(values) == 1:
        return values[0]
    half = len(values) // 2
    a, b = adasum_of(values[:half]), adasum_of(values[half:])
    dot = (a * b).sum().double()
    return (1 - dot / (2 * (a * a).sum())) * a + (1 - dot / (2 * (b * b).sum())) * b


def train_by_mean(name, size):
    """The worker's four steps in one process, on the mean of all gradients."""
    parameters = start_values()
    optimizer = OPTIMIZERS[name](parameters.values())
    for step, lr in enumerate(LEARNING_RATES):
        optimizer.param_groups[0]["lr"] = lr
        for key, value in parameters.items():
            value.grad = mean_of([gradients(rank, step)[key] for rank in range(size)])
        optimizer.step()
    return dict(parameters)


def train_by_adasum(name, size):
    """The worker's four steps in one process: every rank steps, then the steps are combined."""
    replicas = [start_values() for _ in range(size)]
    optimizers = [OPTIMIZERS[name](replica.values()) for replica in replicas]
    for step, lr in enumerate(LEARNING_RATES):
        before = {key: value.detach().clone() for key, value in replicas[0].items()}
        for rank, optimizer in enumerate(optimizers):
            optimizer.param_groups[0]["lr"] = lr
            for key, value in replicas[rank].items():
                value.grad = gradients(rank, step)[key]
            optimizer.step()
        with torch.no_grad():
            for key, start in before.items():
                combined = start + adasum_of([replica[key] - start for replica in replicas])
                for replica in replicas:
                    replica[key].copy_(combined)
    return dict(replicas[0])


@pytest.mark.parametrize("resume", [False, "before wrap", "after wrap"])
@pytest.mark.parametrize("how", ["average", "fp16", "adasum"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_wrapped_optimizer_steps_as_one_process_would(run, name, how, resume):
    """Also if new objects resume the run, with the state loaded before or after `wrap`."""
    way = (name, how, resume)
    if way not in run[0]["trained"]:
        pytest.skip("this engine has no Adasum")
    expected = (train_by_adasum if how == "adasum" else train_by_mean)(name, len(run))
    half_precision = how == "fp16" and len(run) > 1
    atol = 5e-3 if half_precision else 2e-6
    for result in run:
        for key, value in result["trained"][way].items():
            torch.testing.assert_close(value, expected[key].detach(), atol=atol, rtol=0)
            assert_same(value, run[0]["trained"][way][key])  # the same on all ranks, to the bit
    if half_precision and name == "sgd":  # fp16 is really used
        assert not torch.equal(run[0]["trained"][way]["weight"], expected["weight"])


def test_adasum_adds_orthogonal_and_averages_equal_gradients(results):
    for result in results("horovodrun"):
        torch.testing.assert_close(result["adasum"]["orthogonal"], torch.tensor([2.0, 3.0, 0.0]))
        torch.testing.assert_close(result["adasum"]["equal"], torch.tensor([1.0, 2.0, -3.0]))


@pytest.mark.parametrize(
    "launcher, message",
    [
        ("torchrun", "torch.distributed has no Adasum; start with horovodrun"),
        ("horovodrun --gloo", "Adasum needs MPI.*--gloo"),
    ],
)
def test_adasum_missing_is_refused_with_what_to_do(results, launcher, message):
    for result in results(launcher):
        assert re.search(message, result["adasum_refusal"])
        assert "--use-adasum" in result["adasum_refusal"]


def test_adasum_in_one_process_is_accepted(results):
    assert results("python")[0]["adasum_refusal"] is None


# --- the end of a run ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "launcher, rank",
    [
        ("torchrun", 0),
        ("torchrun", 1),
        ("horovodrun", 0),
        ("horovodrun", 1),
        ("horovodrun --gloo", 1),
    ],
)
def test_run_main_failing_process_ends_all_with_one_line(launcher, rank, tmp_path):
    finished = run_worker(launcher, tmp_path, "fail", rank)  # times out if the others go on
    assert finished.returncode != 0
    output = finished.stdout + finished.stderr
    process = "process 1 of 2: " if rank else ""
    message = f"error: {process}the file of process x is broken"
    assert any(line.endswith(message) for line in output.splitlines()), output
    assert "InputError" not in output  # no traceback of ours
    assert not list(tmp_path.iterdir())
