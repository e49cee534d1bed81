"""The processes of a run: one process, torchrun, or horovodrun; and how a script ends.

This is the only file that knows Horovod and torch.distributed. Everything else uses the object
that `init_distributed()` returns:

    dist = init_distributed()
    dist.broadcast_model(encoder)
    optimizer = dist.wrap(optimizer, list(encoder.named_parameters()))
    keys = dist.all_gather(keys)  # (N, D) -> (world_size * N, D)
"""

import atexit
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed
from torch import Tensor

from utils import InputError

# --- the interface ------------------------------------------------------------------------------


class Distributed:
    """The processes of a run. This base class is a run of one process.

    rank, world_size: index of this process, and number of processes
    local_rank, local_world_size: the same, counted on this machine only
    backend: name of the engine, for logs and messages
    """

    backend = "one process"
    rank = 0
    world_size = 1
    local_rank = 0
    local_world_size = 1

    @property
    def is_main(self) -> bool:
        """Whether this is the process that prints and writes files."""
        return self.rank == 0

    # Exchange. Every process must make these calls, in the same order.

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Concatenate a tensor of every process: (n, ...) -> (sum of n, ...), ordered by rank.

        n may differ between processes and may be 0. The result carries no gradient: Horovod would
        average it over the processes, torch.distributed would sum it.
        """
        return tensor

    def all_gather_objects(self, value: Any) -> list:
        """The `value` of every process, as a list by rank. Any object that can be pickled."""
        return [value]

    def broadcast(self, value: Any) -> Any:
        """Rank 0's `value` on every process. Any object that can be pickled."""
        return value

    def broadcast_model(self, module: torch.nn.Module) -> None:
        """Copy rank 0's weights and buffers to every process."""
        module.load_state_dict(self.broadcast(module.state_dict()))

    def broadcast_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Copy rank 0's optimiser state to every process."""
        optimizer.load_state_dict(self.broadcast(optimizer.state_dict()))

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true on at least one process."""
        return bool(self.all_gather(torch.tensor([int(flag)])).any())

    def mean(self, value: Tensor) -> Tensor:
        """Mean over the processes of a tensor whose shape is the same on all of them."""
        return self.all_gather(value[None]).mean(0)

    def barrier(self) -> None:
        """Wait until every process has reached this call."""
        self.all_gather(torch.zeros(1))

    @contextlib.contextmanager
    def exit_together_on_error(self) -> Iterator[None]:
        """If any process raises InputError in this block, all exit and the message is printed once.

        No collectives inside the block: a process that failed does not take part in them.
        """
        error = None
        try:
            yield
        except InputError as caught:
            if self.world_size == 1:
                raise
            error = caught
        failed = self.all_gather(torch.tensor([int(error is not None)]))  # (world_size,)
        if failed.any():
            if self.rank == int(failed.argmax()):  # the first that failed speaks for all
                _print_error(error)
            self.barrier()  # a launcher kills the others when the first exits: print before that
            raise SystemExit(2)

    # Training.

    def wrap(
        self,
        optimizer: torch.optim.Optimizer,
        named_parameters: list[tuple[str, torch.nn.Parameter]],
        adasum: bool = False,
        fp16: bool = False,
    ) -> torch.optim.Optimizer:
        """An optimiser whose `step` first combines the gradients of all processes.

        It keeps the state and the parameter groups of `optimizer`, so learning rates may be set and
        checkpoints loaded before or after. Call its `zero_grad()` without arguments.

        Under Adasum each parameter steps inside `backward`, as soon as its gradient is ready, and
        the steps are combined. Set the learning rate before `backward`. The moments differ between
        processes: save those of every process (`all_gather_objects`).

        Args:
            adasum: combine by Adasum (Maleki et al., MLSys 2021) instead of the mean
            fp16: exchange gradients in half precision
        Raises:
            InputError: the engine has no Adasum
        """
        if adasum and self.world_size > 1:
            raise InputError(
                f"{self.backend} has no Adasum; start with horovodrun, or leave --use-adasum out"
            )
        return optimizer

    def lr_scale(self, adasum: bool = False, device: str = "cpu") -> int:
        """The learning rate's factor in the released recipe: how many gradients are averaged."""
        return self.world_size

    def local_device(self, name: str) -> str:
        """The device of this process: `name`, or for "cuda" its own GPU of this machine."""
        if name == "cuda" and self.local_world_size > 1:
            return f"cuda:{self.local_rank}"
        return name


# --- the two engines ----------------------------------------------------------------------------


class TorchDistributed(Distributed):
    """Started by `torchrun`: gloo for CPU tensors, NCCL for GPU tensors."""

    backend = "torch.distributed"
    started = False  # set once a process group exists, see run_main

    def __init__(self):
        collectives = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        # A long timeout: the shards of an extraction wait for the slowest.
        timeout = timedelta(days=7)
        try:
            torch.distributed.init_process_group(collectives, timeout=timeout)
            self.local_rank = int(os.environ["LOCAL_RANK"])
            self.local_world_size = int(os.environ["LOCAL_WORLD_SIZE"])
        except (ValueError, KeyError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(
                f"torch.distributed cannot start ({reason}); start the processes with torchrun"
            ) from None
        TorchDistributed.started = True
        self.rank = torch.distributed.get_rank()
        self.world_size = torch.distributed.get_world_size()

    def all_gather(self, tensor: Tensor) -> Tensor:
        tensor = tensor.detach().contiguous()
        length = torch.tensor([len(tensor)], device=tensor.device)
        lengths = [torch.zeros_like(length) for _ in range(self.world_size)]
        torch.distributed.all_gather(lengths, length)

        # gloo gathers tensors of one shape only: pad to the longest, then cut.
        missing = int(max(lengths)) - len(tensor)
        padded = torch.cat([tensor, tensor.new_zeros(missing, *tensor.shape[1:])])
        parts = [torch.empty_like(padded) for _ in range(self.world_size)]
        torch.distributed.all_gather(parts, padded)
        return torch.cat([part[: int(n)] for part, n in zip(parts, lengths, strict=True)])

    def all_gather_objects(self, value: Any) -> list:
        values = [None] * self.world_size
        torch.distributed.all_gather_object(values, value)
        return values

    def broadcast(self, value: Any) -> Any:
        values = [value if self.is_main else None]
        torch.distributed.broadcast_object_list(values)
        return values[0]

    def wrap(self, optimizer, named_parameters, adasum=False, fp16=False):
        optimizer = super().wrap(optimizer, named_parameters, adasum, fp16)  # refuses Adasum
        parameters = [parameter for _, parameter in named_parameters if parameter.requires_grad]

        def average_gradients(*_):
            """Average all gradients by one all-reduce of their concatenation."""
            for parameter in parameters:
                if parameter.grad is None:  # another process may have a gradient for it
                    parameter.grad = torch.zeros_like(parameter)
            gradients = [parameter.grad for parameter in parameters]
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            if fp16:
                flat = flat.half()
            flat = flat / self.world_size  # before the sum, which could overflow in half precision
            torch.distributed.all_reduce(flat)
            parts = flat.split([gradient.numel() for gradient in gradients])
            for gradient, part in zip(gradients, parts, strict=True):
                gradient.copy_(part.view_as(gradient))

        optimizer.register_step_pre_hook(average_gradients)
        return optimizer


class HorovodDistributed(Distributed):
    """Started by `horovodrun`, over MPI or Gloo."""

    backend = "Horovod"

    # Types that Horovod does not know are sent as one of the same width.
    SENT_AS = {torch.bool: torch.uint8, torch.bfloat16: torch.half}

    def __init__(self):
        try:
            import horovod.torch as hvd

            hvd.init()
        except (ImportError, AttributeError) as error:
            # AttributeError: pip installs Horovod without native code if the build found no torch.
            raise InputError(
                f"Horovod cannot be used ({error}); build it with `make horovod`, "
                "or start with torchrun"
            ) from None
        self._hvd = hvd
        self.rank = hvd.rank()
        self.world_size = hvd.size()
        self.local_rank = hvd.local_rank()
        self.local_world_size = hvd.local_size()

    def all_gather(self, tensor: Tensor) -> Tensor:
        sent_as = self.SENT_AS.get(tensor.dtype, tensor.dtype)
        gathered = self._hvd.allgather(tensor.detach().contiguous().view(sent_as))
        return gathered.view(tensor.dtype)

    # Horovod pairs the calls of processes by name. Its default name of an object is the type, which
    # differs between rank 0, which has a checkpoint, and the others, which wait for it with None.

    def all_gather_objects(self, value: Any) -> list:
        return self._hvd.allgather_object(value, name="objects")

    def broadcast(self, value: Any) -> Any:
        return self._hvd.broadcast_object(value, root_rank=0, name="object")

    def wrap(self, optimizer, named_parameters, adasum=False, fp16=False):
        hvd = self._hvd
        if adasum and self.world_size > 1 and not hvd.mpi_enabled():
            raise InputError(
                "Adasum needs MPI; start with horovodrun without --gloo, or leave --use-adasum out"
            )
        if adasum and self.world_size & (self.world_size - 1):  # not a power of two
            raise InputError(
                f"Adasum needs 2, 4, 8, ... processes, not {self.world_size}; "
                "change -np, or leave --use-adasum out"
            )
        wrapped = hvd.DistributedOptimizer(
            optimizer,
            named_parameters=named_parameters,
            compression=hvd.Compression.fp16 if fp16 else hvd.Compression.none,
            op=hvd.Adasum if adasum else hvd.Average,
        )
        wrapped.state.update(optimizer.state)  # Horovod keeps the groups but drops the state
        return wrapped

    def lr_scale(self, adasum: bool = False, device: str = "cpu") -> int:
        if not adasum:
            return self.world_size
        # Adasum needs no scaling, but NCCL first takes a plain average on each machine.
        nccl = device.startswith("cuda") and self._hvd.nccl_built()
        return self.local_world_size if nccl else 1


# --- starting -----------------------------------------------------------------------------------


def init_distributed() -> Distributed:
    """Join the processes of this run, by the engine whose launcher started it."""
    launcher, _, _ = detect_launcher()
    engines = {"horovod": HorovodDistributed, "torch": TorchDistributed, None: Distributed}
    dist = engines[launcher]()
    # Share the cores. torchrun sets OMP_NUM_THREADS (to 1) by itself, horovodrun does not.
    if dist.local_world_size > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // dist.local_world_size))
    return dist


def detect_launcher() -> tuple[str | None, int, int]:
    """(engine, rank, world size) from the environment; (None, 0, 1) without a launcher."""
    variables = [
        ("horovod", "HOROVOD_RANK", "HOROVOD_SIZE"),  # horovodrun with Gloo
        ("horovod", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),  # with MPI: set by mpirun
        ("torch", "RANK", "WORLD_SIZE"),
    ]
    for engine, rank, size in variables:
        if rank in os.environ and size in os.environ:
            return engine, int(os.environ[rank]), int(os.environ[size])
    return None, 0, 1


def default_device() -> str:
    """ "cuda" if there is a GPU, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_device(name: str) -> str:
    """Return `name` if tensors can be created on that device, else raise InputError."""
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name}: {str(error).splitlines()[0]}") from None
    return name


# --- how a script ends --------------------------------------------------------------------------


def run_main(main: Callable[[], int | None]) -> NoReturn:
    """Call a script's `main` and exit with its status.

    Errors of the user are one line on stderr, without a traceback. In a run of several processes
    the line names the process, except for the first. The exit status is

        main's own, if it returns
        2    InputError or OSError
        130  Ctrl-C
        141  nobody reads our output any more, as in `script | head -1`
        1    another process of the run ended
    """
    status = _call_main(main)
    if TorchDistributed.started:
        # gloo's threads may still need the interpreter to free a tensor. If the interpreter shuts
        # down first, they abort the process: run the exit handlers, then leave without a shutdown.
        atexit._run_exitfuncs()
        sys.stdout.flush()
        os._exit(status or 0)
    sys.exit(status)


def _call_main(main):
    """Call `main` and return the exit status."""
    try:
        status = main()
        sys.stdout.flush()  # may raise BrokenPipeError
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        return status
    except SystemExit as stop:  # argparse's --help, exit_together_on_error
        return stop.code
    except BrokenPipeError:
        # What is still buffered goes nowhere, or the flush at exit would raise again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except (InputError, OSError) as error:  # OSError: no permission, a full disk, ...
        _print_error(error)
        return 2
    except KeyboardInterrupt:
        _print_error("interrupted")
        return 130
    except RuntimeError as error:
        if not _is_lost_peer(error):
            raise
        lost = "another process of this run ended; see its own message, or the system killed it"
        _print_error(InputError(lost))
        return 1


def _print_error(error: Exception | str) -> None:
    """Print an error, or a notice, as one line on stderr."""
    # The message of a data-loading worker comes at the end of that worker's traceback.
    message = str(error).rpartition("InputError: ")[2]
    line = " ".join(message.strip().splitlines())
    _, rank, size = detect_launcher()
    if rank:
        line = f"process {rank} of {size}: {line}"
    if isinstance(error, Exception):
        line = f"error: {line}"
    sys.stderr.write(f"{line}\n")  # one write: launchers may cut the output between two
    sys.stderr.flush()


def _is_lost_peer(error: RuntimeError) -> bool:
    """Whether an engine raised this error because another process is gone."""
    return (
        isinstance(error, torch.distributed.DistError)
        or type(error).__name__ == "HorovodInternalError"
        or "/gloo/" in str(error)
    )
