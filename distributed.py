"""The processes of a run: one process, torchrun, or horovodrun; and how a script ends.

This is the only file that knows Horovod and torch.distributed. Everything else uses the object
that `init_distributed()` returns:

    dist = init_distributed()
    device = dist.device(args.device)  # this process's own GPU, if it asks for one
    dist.broadcast_model(encoder)
    optimizer = dist.wrap(optimizer, list(encoder.named_parameters()))
    keys = dist.all_gather(keys)  # (N, D) -> (world_size * N, D)
"""

import atexit
import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed
from torch import Tensor

from entry import call_main, open_standard_streams, print_error
from processes import end_with_parent, end_with_starter
from utils import InputError, available_cores

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

    def all_gather(self, tensor: Tensor, same_length: bool = False) -> Tensor:
        """Concatenate a tensor of every process: (n, ...) -> (sum of n, ...), ordered by rank.

        n may differ between processes and may be 0; `same_length` says that it does not, which
        saves an exchange. The result carries no gradient: Horovod would average it over the
        processes, torch.distributed would sum it.
        """
        return tensor

    def broadcast(self, value: Any) -> Any:
        """Rank 0's `value` on every process: nested dicts, lists and tuples of anything.

        Tensors arrive on the CPU, sent one by one. The rest is pickled.
        """
        return value

    def gather_to_main(self, value: Any) -> list | None:
        """On rank 0 the `value` of every process, as a list by rank; None on the others.

        Tensors travel as in `broadcast`. The other processes hold one of them at a time.
        """
        return [value]

    def scatter_from_main(self, values: list | None) -> Any:
        """The reverse: this process's entry of rank 0's list. Tensors travel as in `broadcast`."""
        return values[0]

    def broadcast_model(self, module: torch.nn.Module) -> None:
        """Copy rank 0's weights and buffers to every process, in place and tensor by tensor."""

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true on at least one process."""
        return bool(self.all_gather(torch.tensor([int(flag)]), same_length=True).any())

    def mean(self, value: Tensor) -> Tensor:
        """Mean over the processes of a tensor whose shape is the same on all of them."""
        return self.all_gather(value[None], same_length=True).mean(0)

    def barrier(self) -> None:
        """Wait until every process has reached this call."""
        self.any(False)

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
        failed = torch.tensor([int(error is not None)])
        failed = self.all_gather(failed, same_length=True)  # (world_size,)
        if failed.any():
            self._exit_together(error, failed)

    def agree(self, error: InputError | None, number: int) -> int:
        """Exchange, once a step, whether a process has failed: then all exit, as above.

        Returns the largest `number` (a signal, or 0) of all processes.
        """
        if self.world_size == 1 and error:
            raise error
        states = self.all_gather(
            torch.tensor([[int(error is not None), number]]), same_length=True
        )  # (world_size, 2)
        failed, numbers = states.T
        if failed.any():
            self._exit_together(error, failed)
        return int(numbers.max())

    def _exit_together(self, error, failed):
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
        processes: save those of every process (`gather_to_main`).

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

    def device(self, name: str) -> str:
        """The device of this process: `name`, where "cuda" is its own GPU of this machine.

        Makes that GPU the current one, so that nothing of this process lands on another.

        Raises:
            InputError: there is no such device, or the engine cannot join tensors on it
        """
        if name == "cuda" and self.local_world_size > 1 and torch.cuda.is_available():
            name = f"cuda:{self.local_rank % torch.cuda.device_count()}"
        check_device(name)
        if name.startswith("cuda"):
            torch.cuda.set_device(torch.device(name).index or 0)
        return name


class _Exchange(Distributed):
    """What the two engines share: how nested values and models travel. An engine defines

    _broadcast_object(value, root) -> value   anything that can be pickled, of the process `root`
    _broadcast_tensor(tensor, root)           overwrite a contiguous tensor by that of `root`
    """

    def _send(self, value: Any, root: int, keep: bool) -> Any:
        """`value` of the process `root`, on the processes that keep it; None on the others."""
        tensors = []
        skeleton = _take_tensors(value, tensors) if self.rank == root else None
        skeleton, shapes = self._broadcast_object(
            (skeleton, [(tensor.shape, tensor.dtype) for tensor in tensors]), root
        )
        received = []
        for i, (shape, dtype) in enumerate(shapes):
            if self.rank == root:
                tensor = tensors[i].detach().cpu().contiguous()
            else:
                tensor = torch.empty(shape, dtype=dtype)
            self._broadcast_tensor(tensor, root)
            if keep:
                received.append(tensor)
        return _put_tensors(skeleton, received) if keep else None

    def broadcast(self, value):
        return self._send(value, root=0, keep=True)

    def gather_to_main(self, value):
        values = [self._send(value, rank, keep=self.is_main) for rank in range(self.world_size)]
        return values if self.is_main else None

    def scatter_from_main(self, values):
        own = None
        for rank in range(self.world_size):
            value = self._send(values[rank] if self.is_main else None, 0, keep=rank == self.rank)
            own = value if rank == self.rank else own
        return own

    def broadcast_model(self, module):
        with torch.no_grad():
            for tensor in module.state_dict().values():  # they share the module's memory
                sent = tensor.contiguous()
                self._broadcast_tensor(sent, 0)
                if sent is not tensor:
                    tensor.copy_(sent)


class _Slot:
    """Stands for a tensor in a value that is pickled without its tensors."""


def _take_tensors(value, tensors):
    """`value` with a _Slot for each tensor; the tensors are appended to `tensors`, in order."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return _Slot()
    if type(value) is dict:
        return {key: _take_tensors(item, tensors) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_take_tensors(item, tensors) for item in value)
    return value


def _put_tensors(value, tensors):
    """The reverse of `_take_tensors`; consumes the list `tensors` from its beginning."""
    if isinstance(value, _Slot):
        return tensors.pop(0)
    if type(value) is dict:
        return {key: _put_tensors(item, tensors) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_put_tensors(item, tensors) for item in value)
    return value


# --- the two engines ----------------------------------------------------------------------------


class TorchDistributed(_Exchange):
    """Started by `torchrun`: gloo for CPU tensors, NCCL for GPU tensors.

    NCCL refuses two processes on one GPU. Where they share one, tensors of a GPU are exchanged
    through the CPU.
    """

    backend = "torch.distributed"
    started = False  # set once a process group exists, see run_main
    _nccl = False  # whether tensors of a GPU are exchanged by NCCL

    def __init__(self, timeout: timedelta):
        self.local_rank = _environment_number("LOCAL_RANK")
        self.local_world_size = _environment_number("LOCAL_WORLD_SIZE")
        nccl = 0 < self.local_world_size <= torch.cuda.device_count()
        try:
            engines = "cpu:gloo,cuda:nccl" if nccl else "gloo"
            torch.distributed.init_process_group(engines, timeout=timeout)
        except (ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(
                f"torch.distributed cannot start ({reason}); start the processes with torchrun"
            ) from None
        TorchDistributed.started = True
        self.rank = torch.distributed.get_rank()
        self.world_size = torch.distributed.get_world_size()
        # Every machine must decide alike: they may have different numbers of GPUs and processes.
        self._nccl = not self.any(not nccl)
        self._share_machines = self.any(self.local_world_size > 1)

    def device(self, name: str) -> str:
        if name != "cuda" and self._share_machines:
            self._nccl = False  # all processes of a machine use the GPU that was named
        return super().device(name)

    def _for_exchange(self, tensor: Tensor) -> Tensor:
        """The tensor where the engine can exchange it."""
        return tensor if self._nccl else tensor.cpu()

    def all_gather(self, tensor: Tensor, same_length: bool = False) -> Tensor:
        device = tensor.device
        tensor = self._for_exchange(tensor.detach().contiguous())
        if same_length:
            parts = [torch.empty_like(tensor) for _ in range(self.world_size)]
            torch.distributed.all_gather(parts, tensor)
            return torch.cat(parts).to(device)
        length = torch.tensor([len(tensor)])
        lengths = [torch.zeros_like(length) for _ in range(self.world_size)]
        torch.distributed.all_gather(lengths, length)  # on the CPU: they are read at once

        # gloo gathers tensors of one shape only: pad to the longest, then cut.
        missing = int(max(lengths)) - len(tensor)
        padded = torch.cat([tensor, tensor.new_zeros(missing, *tensor.shape[1:])])
        parts = [torch.empty_like(padded) for _ in range(self.world_size)]
        torch.distributed.all_gather(parts, padded)
        parts = [part[: int(n)] for part, n in zip(parts, lengths, strict=True)]
        return torch.cat(parts).to(device)

    def _broadcast_object(self, value, root):
        values = [value]
        torch.distributed.broadcast_object_list(values, root, device=torch.device("cpu"))
        return values[0]

    def _broadcast_tensor(self, tensor, root):
        sent = self._for_exchange(tensor)
        torch.distributed.broadcast(sent, root)
        if sent is not tensor:
            tensor.copy_(sent)

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
            flat = self._for_exchange(flat)
            torch.distributed.all_reduce(flat)
            parts = flat.split([gradient.numel() for gradient in gradients])
            for gradient, part in zip(gradients, parts, strict=True):
                gradient.copy_(part.view_as(gradient))

        optimizer.register_step_pre_hook(average_gradients)
        return optimizer


class HorovodDistributed(_Exchange):
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

    # Every exchange has a name: Horovod pairs the calls of processes by it. Its default name of an
    # object is the type, which differs between rank 0, which has a checkpoint, and the others,
    # which wait for it with None.

    def all_gather(self, tensor: Tensor, same_length: bool = False) -> Tensor:
        sent_as = self.SENT_AS.get(tensor.dtype, tensor.dtype)
        sent = tensor.detach().contiguous().view(sent_as)
        return self._hvd.allgather(sent, name="all_gather").view(tensor.dtype)

    def _broadcast_object(self, value, root):
        return self._hvd.broadcast_object(value, root, name="object")

    def _broadcast_tensor(self, tensor, root):
        sent_as = self.SENT_AS.get(tensor.dtype, tensor.dtype)
        sent = tensor.view(-1).view(sent_as)  # shares the memory of `tensor`
        if len(sent):
            self._hvd.broadcast_(sent, root, name="tensor")

    def device(self, name: str) -> str:
        if name.startswith("cuda"):
            self._require_nccl(name)
        return super().device(name)

    def _require_nccl(self, name):
        """InputError if this Horovod cannot exchange tensors of the GPU `name`."""
        if not self._hvd.nccl_built():  # it refuses them in one process too
            raise InputError(
                f"--device {name}: this Horovod was built for CPUs alone; install a CUDA toolkit"
                " and run `make -B horovod`, start with torchrun, or give --device cpu"
            )
        gpus = torch.cuda.device_count() if name == "cuda" else 1
        if 0 < gpus < self.local_world_size:
            raise InputError(
                f"--device {name}: {self.local_world_size} processes of this machine would share"
                f" {gpus} GPU{'s' * (gpus > 1)}, which NCCL refuses; start one process for each"
                " GPU, start with torchrun, or give --device cpu"
            )

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

STEP_TIMEOUT = timedelta(minutes=30)  # a process that is so late in a training step hangs
SHARE_TIMEOUT = timedelta(days=7)  # shares of a long task end at very different times


def init_distributed(timeout: timedelta = STEP_TIMEOUT) -> Distributed:
    """Join the processes of this run, by the engine whose launcher started it.

    timeout: how long torch.distributed waits for the other processes in one exchange
    """
    launcher, _, _ = detect_launcher()
    if launcher:  # of which a killed one leaves its processes to work on
        end_with_parent()
    if launcher == "torch":
        dist = TorchDistributed(timeout)
    else:
        dist = HorovodDistributed() if launcher == "horovod" else Distributed()
    # Share the cores. torchrun sets OMP_NUM_THREADS (to 1) by itself, horovodrun does not.
    if dist.local_world_size > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, available_cores() // dist.local_world_size))
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
            return engine, _environment_number(rank), _environment_number(size)
    return None, 0, 1


def _environment_number(name):
    """An environment variable that a launcher sets to a number."""
    value = os.environ.get(name, "")
    if not value.isdecimal():
        state = f"is {value!r}, not a number" if value else "is not set"
        raise InputError(
            f"the environment variable {name} {state}; start several processes with torchrun or"
            " horovodrun, or unset RANK and WORLD_SIZE for one"
        )
    return int(value)


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

    As entry.run_main, for scripts that may run as several processes. A line on stderr names the
    process, except for the first. The exit status is 1 if the exchange between processes failed,
    mostly because another process ended.
    """
    end_with_starter()
    open_standard_streams()
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

    def call():
        status = main()
        sys.stdout.flush()  # may raise BrokenPipeError
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        return status

    try:
        return call_main(call, _print_error)
    except RuntimeError as error:
        if not _is_engine_error(error):
            raise
        # PyTorch may append its C++ stack.
        reason = str(error).partition("Exception raised from")[0].strip() or type(error).__name__
        _print_error(
            InputError(
                f"the exchange between processes failed: {reason}; if another process printed an"
                " error, that is the cause; else it was killed, or the network failed"
            )
        )
        return 1


def _print_error(error: Exception | str) -> None:
    """Print an error, or a notice, as one line on stderr that names the process."""
    prefix = ""
    with contextlib.suppress(InputError):  # the launcher's variables may be the error
        _, rank, size = detect_launcher()
        if rank:
            prefix = f"process {rank} of {size}: "
    print_error(error, prefix)


def _is_engine_error(error: RuntimeError) -> bool:
    """Whether an engine raised this error: a process is gone, or NCCL failed."""
    return (
        isinstance(error, torch.distributed.DistError)
        or type(error).__name__ == "HorovodInternalError"
        or "/gloo/" in str(error)
    )
