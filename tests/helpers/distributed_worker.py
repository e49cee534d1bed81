"""What every process of test_distributed_engines.py does.

python tests/helpers/distributed_worker.py FOLDER
    uses every method of the Distributed object and saves the results in FOLDER/<rank>.pt
python tests/helpers/distributed_worker.py FOLDER fail RANK
    process RANK raises an InputError while the others go on
"""

import copy
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from distributed import init_distributed, run_main
from utils import InputError

OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, 0.1, momentum=0.9, weight_decay=0.01),
    "adam": lambda parameters: torch.optim.Adam(parameters, 0.1, weight_decay=0.01),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, 0.1, weight_decay=0.01),
}
LEARNING_RATES = [0.1, 0.1, 0.02, 0.02]  # one for each step
SHAPES = {"weight": (4, 3), "bias": (4,)}
DTYPES = [
    torch.int64,
    torch.float32,
    torch.float64,
    torch.half,
    torch.bfloat16,
    torch.bool,
    torch.uint8,
]
alive_at_exit = []  # gathered tensors that live until the interpreter ends, as a script's may


# --- what the test computes as well -------------------------------------------------------------


def start_values(seed=7):
    rng = torch.Generator().manual_seed(seed)
    return torch.nn.ParameterDict(
        {name: torch.randn(shape, generator=rng) for name, shape in SHAPES.items()}
    )


def gradients(rank, step):
    """The gradients of process `rank` at `step`, of a magnitude that differs between ranks."""
    rng = torch.Generator().manual_seed(100 * rank + step)
    scale = rank + 1
    return {name: scale * torch.randn(shape, generator=rng) for name, shape in SHAPES.items()}


def rows(rank, dtype):
    """The tensor that process `rank` gathers: (rank + 1, 2), but (0, 2) on rank 1."""
    n = 0 if rank == 1 else rank + 1
    values = torch.arange(2 * n).view(n, 2) % 2
    if dtype != torch.bool:
        values = values + 10 * rank
    return values.to(dtype)


# --- what the processes do ----------------------------------------------------------------------


def set_gradients(optimizer, parameters, values):
    """Set gradients by a backward pass, because Horovod's hooks run there."""
    optimizer.zero_grad()
    sum((parameters[name] * values[name]).sum() for name in parameters).backward()


def train(dist, make, resume, **how):
    """Four steps, with another learning rate from the third on; returns the parameters.

    resume: "before wrap" or "after wrap" says when the new optimiser gets the state of the old, if
    the run stops after the second step and new objects continue it
    """
    parameters = start_values()
    optimizer = dist.wrap(make(parameters.values()), list(parameters.items()), **how)
    for step, lr in enumerate(LEARNING_RATES):
        if resume and step == 2:
            values = parameters.state_dict()
            states = dist.gather_to_main(optimizer.state_dict())
            state = dist.scatter_from_main(states)  # this process's own again
            parameters = start_values(seed=8)
            parameters.load_state_dict(values)
            optimizer = make(parameters.values())
            if resume == "before wrap":
                optimizer.load_state_dict(state)
            optimizer = dist.wrap(optimizer, list(parameters.items()), **how)
            if resume == "after wrap":
                optimizer.load_state_dict(state)
        for group in optimizer.param_groups:
            group["lr"] = lr
        set_gradients(optimizer, parameters, gradients(dist.rank, step))
        optimizer.step()
    return {name: value.detach().clone() for name, value in parameters.items()}


def train_every_way(dist, adasum):
    """{(optimiser, how, resume): parameters after `train`}."""
    ways = ["average", "fp16"]
    if adasum or dist.world_size == 1:
        ways.append("adasum")
    trained = {}
    for name, make in OPTIMIZERS.items():
        for how in ways:
            for resume in (False, "before wrap", "after wrap"):
                flags = {"adasum": how == "adasum", "fp16": how == "fp16"}
                trained[name, how, resume] = train(dist, make, resume, **flags)
    return trained


def combine(dist, values, adasum):
    """`values` (n,) of all processes, combined as gradients are: one SGD step of rate 1 from 0."""
    parameter = torch.nn.Parameter(torch.zeros_like(values))
    optimizer = dist.wrap(torch.optim.SGD([parameter], 1.0), [("x", parameter)], adasum=adasum)
    set_gradients(optimizer, {"x": parameter}, {"x": values})
    optimizer.step()
    return -parameter.detach()


def refusal(call, *arguments, **options):
    """The message of the InputError that a call raises, or None."""
    try:
        call(*arguments, **options)
    except InputError as error:
        return str(error)


def broadcasts(dist):
    """States of a model and of an optimiser, each before and after rank 0's was broadcast."""
    torch.manual_seed(dist.rank)
    module = torch.nn.BatchNorm1d(3)
    torch.nn.init.normal_(module.weight)
    module(torch.randn(5, 3))  # running statistics, and their counter
    if not dist.is_main:
        module(torch.randn(5, 3))
    model_before = copy.deepcopy(module.state_dict())
    dist.broadcast_model(module)
    model_after = copy.deepcopy(module.state_dict())

    optimizer = torch.optim.Adam(module.parameters(), 0.1 * (dist.rank + 1))
    module(torch.randn(5, 3)).pow(3).sum().backward()
    optimizer.step()
    optimizer_before = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(dist.broadcast(optimizer.state_dict()))
    return {
        "model": (model_before, model_after),
        "optimizer": (optimizer_before, optimizer.state_dict()),
    }


def barrier_count(dist, folder):
    """How many processes had reached the barrier when it opened."""
    time.sleep(0.2 * dist.rank)
    (folder / f"{dist.rank} came").touch()
    dist.barrier()
    return len(list(folder.glob("* came")))


def fail(dist, failing):
    """Raise an InputError on rank `failing`, or on every rank if it is "all"."""
    dist.barrier()
    if failing in (str(dist.rank), "all"):
        raise InputError("the file of process\nx is broken")
    if not dist.is_main:
        time.sleep(120)  # busy with something else
    dist.barrier()


def main(argv=None):
    folder, *failing = sys.argv[1:] if argv is None else argv
    folder = Path(folder)
    threads = torch.get_num_threads()
    dist = init_distributed()
    rank, size = dist.rank, dist.world_size
    if failing:
        fail(dist, failing[1])
    alive_at_exit.append(dist.all_gather(torch.ones(3)))
    adasum = dist.backend == "Horovod" and dist._hvd.mpi_enabled()
    result = {
        "ranks": (rank, size, dist.local_rank, dist.local_world_size),
        "backend": dist.backend,
        "threads": (threads, torch.get_num_threads()),
        "barrier": barrier_count(dist, folder),
        "all_gather": {str(dtype): dist.all_gather(rows(rank, dtype)) for dtype in DTYPES},
        "gradient": dist.all_gather(torch.ones(1, requires_grad=True)).requires_grad,
        "broadcast": dist.broadcast({"rank": rank, "array": torch.full((2,), rank), "none": None}),
        "only rank 0 has it": dist.broadcast({"of": "rank 0"} if dist.is_main else None),
        "gathered": dist.gather_to_main({"rank": rank, "rows": [rows(rank, torch.bfloat16)]}),
        "any": [dist.any(rank == one) for one in (0, size - 1, size)],
        "mean": [dist.mean(torch.tensor(2.0 * rank)), dist.mean(torch.tensor([[1.0, rank]]))],
        "device": dist.device("cpu"),
        "agree": dist.agree(None, 10 if rank == size - 1 else 0),
        "nccl": dist.backend == "Horovod" and dist._hvd.nccl_built(),
        "lr_scale": [dist.lr_scale(adasum) for adasum in (False, True)],
        "broadcasts": broadcasts(dist),
        "adasum_refusal": refusal(combine, dist, torch.ones(2), adasum=True),
        "cuda_refusal": refusal(dist.device, "cuda"),
        "trained": train_every_way(dist, adasum),
    }
    if adasum and size == 2:
        orthogonal = torch.eye(3)[rank] * (rank + 2)
        equal = torch.tensor([1.0, 2.0, -3.0])
        result["adasum"] = {
            "orthogonal": combine(dist, orthogonal, adasum=True),
            "equal": combine(dist, equal, adasum=True),
        }
    torch.save(result, folder / f"{rank}.pt")
    return 0


if __name__ == "__main__":
    run_main(main)
