"""What every process of a detect_launcher run does in test_processes.py: use the engine object, and save what came of it.

python tests/processes_worker.py FOLDER [fail RANK] -> FOLDER/<rank>.pt
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
RATES = [0.1, 0.1, 0.02, 0.02]  # one a step
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
kept = []  # lives until the interpreter ends, as a script's last tensors may


def gradients(rank, step):
    """Of each tensor of SHAPES: what process `rank` has at `step`, of unlike size from rank to rank."""
    draw = torch.Generator().manual_seed(100 * rank + step)
    return {name: (rank + 1) * torch.randn(shape, generator=draw) for name, shape in SHAPES.items()}


def start_values(seed=7):
    draw = torch.Generator().manual_seed(seed)
    return torch.nn.ParameterDict(
        {name: torch.randn(shape, generator=draw) for name, shape in SHAPES.items()}
    )


def set_gradients(optimizer, parameters, values):
    """By a backward pass, in which Horovod's hooks run."""
    optimizer.zero_grad()
    sum((parameters[name] * values[name]).sum() for name in parameters).backward()


def rows(rank, dtype):
    """(rank + 1, 2), none at all on rank 1: what `allgather` is given."""
    count = 0 if rank == 1 else rank + 1
    return (torch.arange(2 * count).view(count, 2) % 2 + 10 * rank * (dtype != torch.bool)).to(
        dtype
    )


def train(dist, make, resume, **how):
    """Four steps, with another rate from the third on; `resume`: stopped and taken up by new objects after the second."""
    parameters = start_values()
    optimizer = dist.wrap(make(parameters.values()), list(parameters.items()), **how)
    for step, rate in enumerate(RATES):
        if resume and step == 2:
            values, states = (
                parameters.state_dict(),
                dist.all_gather_objects(optimizer.state_dict()),
            )
            parameters = start_values(8)
            parameters.load_state_dict(values)
            optimizer = make(parameters.values())
            if resume == "before wrap":
                optimizer.load_state_dict(states[dist.rank])
            optimizer = dist.wrap(optimizer, list(parameters.items()), **how)
            if resume == "after wrap":
                optimizer.load_state_dict(states[dist.rank])
        for group in optimizer.param_groups:
            group["lr"] = rate
        set_gradients(optimizer, parameters, gradients(dist.rank, step))
        optimizer.step()
    return {name: value.detach().clone() for name, value in parameters.items()}


def join(dist, values, adasum):
    """A tensor of each process joined by one SGD step of rate 1 from 0, sign turned."""
    parameter = torch.nn.Parameter(torch.zeros_like(values))
    optimizer = dist.wrap(torch.optim.SGD([parameter], 1.0), [("x", parameter)], adasum=adasum)
    set_gradients(optimizer, {"x": parameter}, {"x": values})
    optimizer.step()
    return -parameter.detach()


def refusal(call):
    try:
        call()
    except InputError as error:
        return str(error)


def broadcasts(dist):
    rank = dist.rank
    torch.manual_seed(rank)
    module = torch.nn.BatchNorm1d(3)
    torch.nn.init.normal_(module.weight)
    module(torch.randn(5, 3))  # statistics and their counter
    if rank:
        module(torch.randn(5, 3))
    own = copy.deepcopy(module.state_dict())
    dist.broadcast_model(module)
    given = copy.deepcopy(module.state_dict())
    optimizer = torch.optim.Adam(module.parameters(), 0.1 * (rank + 1))
    module(torch.randn(5, 3)).pow(3).sum().backward()
    optimizer.step()
    own_optimizer = copy.deepcopy(optimizer.state_dict())
    dist.broadcast_optimizer(optimizer)
    return own, given, own_optimizer, optimizer.state_dict()


def main():
    folder = Path(sys.argv[1])
    threads = torch.get_num_threads()
    dist = init_distributed()
    rank, size = dist.rank, dist.world_size
    if sys.argv[2:]:
        dist.barrier()
        if sys.argv[3] in (str(rank), "all"):
            raise InputError("the file of process\nx is broken")
        if rank:
            time.sleep(120)  # busy with something else
        dist.barrier()
    kept.append(dist.all_gather(torch.ones(3)))
    adasum = dist.backend == "Horovod" and dist._hvd.mpi_enabled()
    time.sleep(0.2 * rank)
    (folder / f"{rank} came").touch()
    dist.barrier()
    here = len(list(folder.glob("* came")))
    result = {
        "place": (rank, size, dist.local_rank, dist.local_world_size),
        "engine": dist.backend,
        "threads": (threads, torch.get_num_threads()),
        "came before the barrier let go": here,
        "allgather": {str(dtype): dist.all_gather(rows(rank, dtype)) for dtype in DTYPES},
        "gradient": dist.all_gather(torch.ones(1, requires_grad=True)).requires_grad,
        "broadcast": dist.broadcast({"rank": rank, "array": torch.full((2,), rank), "none": None}),
        "collect": dist.all_gather_objects({"rank": rank}),
        "any": [dist.any(rank == one) for one in (0, size - 1, size)],
        "mean": [dist.mean(torch.tensor(2.0 * rank)), dist.mean(torch.tensor([[1.0, rank]]))],
        "device": [dist.local_device(name) for name in ("cpu", "cuda", "cuda:3")],
        "scale": [dist.lr_scale(adasum) for adasum in (False, True)],
        "broadcasts": broadcasts(dist),
        "refusal": refusal(lambda: join(dist, torch.ones(2), adasum=True)),
        "steps": {
            (name, how, resume): train(
                dist, make, resume, adasum=how == "adasum", fp16=how == "fp16"
            )
            for name, make in OPTIMIZERS.items()
            for how in (
                ["average", "fp16", "adasum"] if adasum or size == 1 else ["average", "fp16"]
            )
            for resume in (False, "before wrap", "after wrap")
        },
    }
    if adasum and size == 2:
        axis, same = torch.eye(3)[rank] * (rank + 2), torch.tensor([1.0, 2.0, -3.0])
        result["adasum"] = {"orthogonal": join(dist, axis, True), "equal": join(dist, same, True)}
    torch.save(result, folder / f"{rank}.pt")
    return 0


if __name__ == "__main__":
    run_main(main)
