"""The processes of a run: one, those of torchrun, or those of horovodrun; and how a script ends."""

import atexit
import contextlib
import os
import signal
import sys
from datetime import timedelta

import torch
import torch.distributed

from utils import InputError


def run_main(main):
    """Call a script's `main` and exit: status 2 and one line on bad input, 130 on Ctrl-C, 141 when nobody reads its output any
    more, `main`'s own status otherwise.

    Of several processes, all but the first say which they are; one that lost the others says only that, status 1.
    """
    try:
        status = main()
        sys.stdout.flush()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    except SystemExit as stop:  # argparse's --help; `Distributed.together`
        status = stop.code
    except BrokenPipeError:  # who read our output, `head` say, has enough
        status = 128 + signal.SIGPIPE
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # what is still to be flushed
    except (
        InputError,
        OSError,
    ) as error:  # OSError: no permission, a folder where a file should be, a full disk
        status = 2
        _print_error(error)
    except KeyboardInterrupt:
        status = 130
        _print_error("interrupted")
    except RuntimeError as error:
        if not _is_lost_peer(error):
            raise
        status = 1
        _print_error(
            InputError(
                "another process of this run has ended; its own line says why, or the system killed it"
            )
        )
    if TorchDistributed.started:
        # gloo's threads may still want the interpreter, to let go of a tensor; ended by its shutdown they abort the process.
        atexit._run_exitfuncs()
        sys.stdout.flush()
        os._exit(status or 0)
    sys.exit(status)


def _print_error(error):
    """An error, or another word at the end, as one line on stderr: in one piece, as launchers cut where output is written."""
    message = str(error).rpartition("InputError: ")[
        2
    ]  # a data-loading worker's comes at the end of its traceback
    _, rank, size = detect_launcher()
    who = ("error: " if isinstance(error, Exception) else "") + (
        f"process {rank} of {size}: " if rank else ""
    )
    sys.stderr.write(f"{who}{' '.join(message.strip().splitlines())}\n")
    sys.stderr.flush()


def check_device(name):
    """`name` if tensors can be put there, else InputError."""
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name}: {str(error).splitlines()[0]}") from None
    return name


def default_device():
    """A GPU where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


# --- processes -------------------------------------------------------------------------------------------------------


def detect_launcher():
    """(engine, rank, size) by what a launcher left in the environment; (None, 0, 1) without one.

    `horovodrun` sets HOROVOD_RANK with Gloo, while with MPI its mpirun sets OMPI_COMM_WORLD_RANK; torchrun sets RANK.
    """
    names = {
        "HOROVOD_RANK": "HOROVOD_SIZE",
        "OMPI_COMM_WORLD_RANK": "OMPI_COMM_WORLD_SIZE",
        "RANK": "WORLD_SIZE",
    }
    for rank, size in names.items():
        if rank in os.environ and size in os.environ:
            return (
                "torch" if rank == "RANK" else "horovod",
                int(os.environ[rank]),
                int(os.environ[size]),
            )
    return None, 0, 1


def _is_lost_peer(error):
    """Whether a RuntimeError is an engine's word that another process has gone."""
    return (
        isinstance(error, torch.distributed.DistError)
        or type(error).__name__ == "HorovodInternalError"
        or "/gloo/" in str(error)
    )


class Distributed:
    """The processes that share a run, and what they do together. This class: a single process.

    rank, size: which process this is, of how many; local_rank, local_size: the same on its machine. `init_distributed` picks
    the engine; nothing outside this section asks which it is.
    """

    backend = "one process"
    rank, world_size, local_rank, local_world_size = 0, 1, 0, 1

    @property
    def is_main(self):
        return self.rank == 0

    def all_gather(self, tensor):
        """tensor (n, ...) of each process, where n may differ -> (sum n, ...) on all of them, by rank.

        Without gradient: Horovod's would be averaged over the processes, torch.distributed's summed.
        """
        return tensor

    def broadcast(self, value):
        """Rank 0's `value`, any object that can be pickled, on every process."""
        return value

    def all_gather_objects(self, value):
        """The `value`s of all processes, any objects that can be pickled, as a list by rank, on every process."""
        return [value]

    def wrap(self, optimizer, named_parameters, adasum=False, fp16=False):
        """The optimiser whose `step` first joins the gradients of all processes.

        By averaging, or by Adasum (Maleki et al., MLSys 2021) where the engine has it, InputError where not. fp16: what is
        joined travels in half precision. Use the optimiser that comes back, its `zero_grad()` without arguments; it keeps the
        state and the parameter groups of the one given, so learning rates are set and checkpoints loaded before or after.
        Under Adasum every parameter steps by itself as soon as its gradient is there, in `backward`, and the steps are joined:
        set the learning rate before `backward`; and each process's optimiser has moments of its own: save them all (`collect`).
        """
        if adasum and self.world_size > 1:
            raise InputError(
                f"{self.backend} has no Adasum; start with horovodrun, or leave --use-adasum out"
            )
        return optimizer

    def lr_scale(self, adasum=False, device="cpu"):
        """What the released recipe multiplies the learning rate by: the processes whose gradients are averaged."""
        return self.world_size

    def broadcast_model(self, module):
        """Give every process rank 0's weights and buffers."""
        module.load_state_dict(self.broadcast(module.state_dict()))

    def broadcast_optimizer(self, optimizer):
        """Give every process rank 0's optimiser state."""
        optimizer.load_state_dict(self.broadcast(optimizer.state_dict()))

    def barrier(self):
        """Wait until every process is here."""
        self.all_gather(torch.zeros(1))

    @contextlib.contextmanager
    def exit_together_on_error(self):
        """A block that every process runs, with no exchange inside: an InputError in one of them ends all, told once."""
        error = None
        try:
            yield
        except InputError as caught:
            error = caught
            if self.world_size == 1:
                raise
        failed = self.all_gather(torch.tensor([int(error is not None)]))
        if failed.any():
            if self.rank == int(failed.argmax()):
                _print_error(error)
            self.barrier()  # told before the first process ends, at which a launcher ends the others
            raise SystemExit(2)

    def any(self, flag):
        """Whether `flag` is true on any process."""
        return bool(self.all_gather(torch.tensor([int(flag)])).any())

    def mean(self, value):
        """The mean over processes of a tensor (...)."""
        return self.all_gather(value[None]).mean(0)

    def local_device(self, name):
        """`name`, or this process's own of the machine's GPUs."""
        return f"cuda:{self.local_rank}" if name == "cuda" and self.local_world_size > 1 else name


class TorchDistributed(Distributed):
    """torch.distributed: what `torchrun` starts. gloo between CPUs, NCCL between GPUs."""

    backend = "torch.distributed"
    started = False

    def __init__(self):
        try:
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            torch.distributed.init_process_group(
                backend, timeout=timedelta(days=7)
            )  # shards of an extraction wait for the slowest
            self.local_rank, self.local_world_size = (
                int(os.environ[name]) for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE")
            )
        except (ValueError, KeyError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(
                f"torch.distributed cannot start ({reason}); start the processes with torchrun"
            ) from None
        TorchDistributed.started = True
        self.rank, self.world_size = (
            torch.distributed.get_rank(),
            torch.distributed.get_world_size(),
        )

    def all_gather(self, tensor):
        tensor = tensor.detach().contiguous()
        counts = [
            torch.zeros(1, dtype=torch.long, device=tensor.device) for _ in range(self.world_size)
        ]
        torch.distributed.all_gather(counts, torch.tensor([len(tensor)], device=tensor.device))
        longest = int(max(counts))
        padded = torch.cat(
            [tensor, tensor.new_zeros(longest - len(tensor), *tensor.shape[1:])]
        )  # gloo wants equal sizes
        parts = [torch.empty_like(padded) for _ in range(self.world_size)]
        torch.distributed.all_gather(parts, padded)
        return torch.cat([part[: int(count)] for part, count in zip(parts, counts, strict=True)])

    def broadcast(self, value):
        held = [value if self.is_main else None]
        torch.distributed.broadcast_object_list(held)
        return held[0]

    def all_gather_objects(self, value):
        values = [None] * self.world_size
        torch.distributed.all_gather_object(values, value)
        return values

    def wrap(self, optimizer, named_parameters, adasum=False, fp16=False):
        optimizer = super().wrap(optimizer, named_parameters, adasum, fp16)
        parameters = [parameter for _, parameter in named_parameters if parameter.requires_grad]

        def average(*_):
            """One all-reduce a step over all gradients laid end to end."""
            for parameter in parameters:
                if parameter.grad is None:  # another process may have one
                    parameter.grad = torch.zeros_like(parameter)
            gradients = [parameter.grad for parameter in parameters]
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            flat = (
                flat.half() if fp16 else flat
            ) / self.world_size  # before the sum: it must not overflow
            torch.distributed.all_reduce(flat)
            for gradient, part in zip(
                gradients, flat.split([g.numel() for g in gradients]), strict=True
            ):
                gradient.copy_(part.view_as(gradient))

        optimizer.register_step_pre_hook(average)
        return optimizer


class HorovodDistributed(Distributed):
    """Horovod: what `horovodrun` starts."""

    backend = "Horovod"
    CARRIED = {
        torch.bool: torch.uint8,
        torch.bfloat16: torch.half,
    }  # types it does not know, as one of the same width

    def __init__(self):
        try:
            import horovod.torch as hvd

            hvd.init()
        except (
            ImportError,
            AttributeError,
        ) as error:  # pip "installs" it without native code where torch is hidden from it
            raise InputError(
                f"Horovod cannot be used ({error}); build it with `make horovod`, or start with torchrun"
            ) from None
        self._hvd = hvd
        self.rank, self.world_size, self.local_rank, self.local_world_size = (
            hvd.rank(),
            hvd.size(),
            hvd.local_rank(),
            hvd.local_size(),
        )

    def all_gather(self, tensor):
        carried = self.CARRIED.get(tensor.dtype, tensor.dtype)
        return self._hvd.allgather(tensor.detach().contiguous().view(carried)).view(tensor.dtype)

    def broadcast(self, value):
        return self._hvd.broadcast_object(value, root_rank=0)

    def all_gather_objects(self, value):
        return self._hvd.allgather_object(value)

    def wrap(self, optimizer, named_parameters, adasum=False, fp16=False):
        hvd = self._hvd
        if adasum and self.world_size > 1 and not hvd.mpi_enabled():
            raise InputError(
                "Adasum needs MPI; start with horovodrun without --gloo, or leave --use-adasum out"
            )
        if adasum and self.world_size & (self.world_size - 1):
            raise InputError(
                f"Adasum needs 2, 4, 8, ... processes, not {self.world_size}; change -np, or leave --use-adasum out"
            )
        wrapped = hvd.DistributedOptimizer(
            optimizer,
            named_parameters=named_parameters,
            compression=hvd.Compression.fp16 if fp16 else hvd.Compression.none,
            op=hvd.Adasum if adasum else hvd.Average,
        )
        wrapped.state.update(
            optimizer.state
        )  # it is a new object, of the same groups but without the state
        return wrapped

    def lr_scale(self, adasum=False, device="cpu"):
        """Adasum needs no scaling, but for the plain average that NCCL forms on each machine first."""
        if not adasum:
            return self.world_size
        return self.local_world_size if device.startswith("cuda") and self._hvd.nccl_built() else 1


def init_distributed():
    """The engine that started this process (`detect_launcher`); one process without a launcher."""
    engines = {"horovod": HorovodDistributed, "torch": TorchDistributed, None: Distributed}
    dist = engines[detect_launcher()[0]]()
    if dist.local_world_size > 1 and "OMP_NUM_THREADS" not in os.environ:  # torchrun sets it, to 1
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // dist.local_world_size))
    return dist
