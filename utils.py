"""What every script shares: bad-input errors, atomic and untrusted files, seeds, provenance, processes. No import of ours."""

import argparse
import atexit
import contextlib
import ctypes
import glob
import hashlib
import json
import math
import os
import pickle
import platform
import signal
import subprocess
import sys
import tempfile
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist


class InputError(Exception):
    """Something the user gave is wrong. The message is one line: what, where, and what to do about it."""


def run(main):
    """Call a script's `main` and exit: status 2 and one line on bad input, 130 on Ctrl-C, 141 when nobody reads its output any
    more, `main`'s own status otherwise.

    Of several processes, all but the first say which they are; one that lost the others says only that, status 1.
    """
    try:
        status = main()
        sys.stdout.flush()
        if dist.is_initialized():
            dist.destroy_process_group()
    except SystemExit as stop:  # argparse's --help; `Processes.together`
        status = stop.code
    except BrokenPipeError:  # who read our output, `head` say, has enough
        status = 128 + signal.SIGPIPE
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still to be flushed
    except (InputError, OSError) as error:  # OSError: no permission, a folder where a file should be, a full disk
        status = 2
        _tell(error)
    except KeyboardInterrupt:
        status = 130
        _tell("interrupted")
    except RuntimeError as error:
        if not _lost_another(error):
            raise
        status = 1
        _tell(InputError("another process of this run has ended; its own line says why, or the system killed it"))
    if TorchProcesses.started:
        # gloo's threads may still want the interpreter, to let go of a tensor; ended by its shutdown they abort the process.
        atexit._run_exitfuncs()
        sys.stdout.flush()
        os._exit(status or 0)
    sys.exit(status)


def _tell(error):
    """An error, or another word at the end, as one line on stderr: in one piece, as launchers cut where output is written."""
    message = str(error).rpartition("InputError: ")[2]  # a data-loading worker's comes at the end of its traceback
    _, rank, size = launched()
    who = ("error: " if isinstance(error, Exception) else "") + (f"process {rank} of {size}: " if rank else "")
    sys.stderr.write(f"{who}{' '.join(message.strip().splitlines())}\n")
    sys.stderr.flush()


class Parser(argparse.ArgumentParser):
    """An argument parser whose description keeps its lines and whose errors are one line, as all our errors are."""

    def __init__(self, description=None, formatter_class=argparse.RawDescriptionHelpFormatter, **options):
        super().__init__(description=description, formatter_class=formatter_class, **options)

    def error(self, message):
        raise InputError(f"{message}; see {self.prog} --help")


def check_ranges(args, ranges):
    """InputError when a number of `args` lies outside its `ranges`: {flag: (lowest, highest)}."""
    for flag, (lowest, highest) in ranges.items():
        value = getattr(args, flag.replace("-", "_"))
        if not lowest <= value <= highest:
            raise InputError(f"--{flag} {value} is out of range; it must be {lowest} to {highest}")


@contextlib.contextmanager
def atomic(path):
    """A temporary path beside `path`, renamed onto it when the block ends well and removed when it does not."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    try:
        yield Path(name)
        os.chmod(name, 0o666 & ~_umask())  # mkstemp makes it private; a result is not
        os.replace(name, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)


def remove_leftovers(path):
    """Remove what `atomic(path)` left in runs that were killed."""
    path = Path(path)
    for left in path.parent.glob(f".{glob.escape(path.name)}.????????{glob.escape(path.suffix)}"):
        left.unlink()


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def existing(path, what):
    """`path` as a Path, or an InputError that says which `what` is not there."""
    path = Path(path).expanduser()
    if not path.exists():
        raise InputError(f"{what} {str(path)!r} is not there; check the path")
    return path


def write_json(path, value):
    """Write a JSON-like value; NaN, which JSON does not know, becomes null."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(without_nan(value), indent=1) + "\n", encoding="utf-8")


def without_nan(value):
    """A JSON-like value with None where it has NaN."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


# --- untrusted files -------------------------------------------------------------------------------------------------


class _BuiltinUnpickler(pickle.Unpickler):
    """Allows the containers that public annotation files hold, and nothing that could run code."""

    ALLOWED = {"set": set, "frozenset": frozenset}

    def find_class(self, module, name):
        if module in ("builtins", "__builtin__") and name in self.ALLOWED:
            return self.ALLOWED[name]
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def load_pickle(path, what="annotation file"):
    """A pickle of builtin containers, strings and numbers; anything else in it is refused, not executed."""
    path = existing(path, what)
    try:
        with open(path, "rb") as file:
            return _BuiltinUnpickler(file, encoding="latin1").load()
    except Exception as error:  # a broken pickle can raise nearly anything
        raise InputError(f"{what} {str(path)!r} is not a pickle of plain containers ({error}); fetch it again") from None


def load_torch(path, what="model file"):
    """`torch.load` on the CPU, tensors and plain containers only."""
    path = existing(path, what)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and storage errors, by file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{what} {str(path)!r} cannot be read ({reason}); is it complete, and a PyTorch file?") from None


def save_torch(path, value):
    """`torch.save`, written aside and renamed: a killed run leaves the old file or the new one, never half of one."""
    with atomic(path) as temporary:
        torch.save(value, temporary)


def digest(value):
    """A short SHA-256 of a JSON-like value: the same for equal values, whatever file they came from."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=list).encode()).hexdigest()[:16]


# --- seeds and provenance --------------------------------------------------------------------------------------------


def rng(*keys):
    """A NumPy generator that depends on nothing but the non-negative integers `keys` (seed, epoch, index, ...)."""
    return np.random.default_rng([len(keys), *keys])  # their number too: trailing zeros alone change nothing


def seed_torch(*keys):
    """Seed every torch generator from the integers `keys`; done anew each step, a resumed run draws as an unbroken one."""
    torch.manual_seed(int(np.random.SeedSequence(keys).generate_state(1)[0]))


def provenance():
    """What a figure needs beside it: command, git revision, versions, machine."""
    here = Path(__file__).resolve().parent
    try:
        git = ["git", "-C", str(here)]
        revision = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True).stdout.strip()
        revision += " with uncommitted changes" if changed else ""
    except (OSError, subprocess.CalledProcessError):
        revision = "unknown"
    return {
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "revision": revision,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, "
        + (torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"),
    }


def checked_device(name):
    """`name` if tensors can be put there, else InputError."""
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name}: {str(error).splitlines()[0]}") from None
    return name


def default_device():
    """A GPU where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def keep_freed_memory():
    """Have the C library (glibc, elsewhere nothing happens) keep up to 1 GiB that was freed, for the next batch.

    By default it gives large blocks back at once, and the kernel clears every page anew: up to a third of the time of a CPU
    that computes maps of many MB, and now more, now less of it. To be called before threads are started.
    """
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # of malloc.h
    with contextlib.suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        if mallopt(M_MMAP_THRESHOLD, 1 << 30):  # refused by an old one
            mallopt(M_TRIM_THRESHOLD, 1 << 30)
            mallopt(M_ARENA_MAX, 1)  # the heap of another thread ends at 64 MB


# --- processes -------------------------------------------------------------------------------------------------------


def launched():
    """(engine, rank, size) by what a launcher left in the environment; (None, 0, 1) without one.

    `horovodrun` sets HOROVOD_RANK with Gloo, while with MPI its mpirun sets OMPI_COMM_WORLD_RANK; torchrun sets RANK.
    """
    names = {"HOROVOD_RANK": "HOROVOD_SIZE", "OMPI_COMM_WORLD_RANK": "OMPI_COMM_WORLD_SIZE", "RANK": "WORLD_SIZE"}
    for rank, size in names.items():
        if rank in os.environ and size in os.environ:
            return "torch" if rank == "RANK" else "horovod", int(os.environ[rank]), int(os.environ[size])
    return None, 0, 1


def _lost_another(error):
    """Whether a RuntimeError is an engine's word that another process has gone."""
    return isinstance(error, dist.DistError) or type(error).__name__ == "HorovodInternalError" or "/gloo/" in str(error)


class Processes:
    """The processes that share a run, and what they do together. This class: a single process.

    rank, size: which process this is, of how many; local_rank, local_size: the same on its machine. `start_processes` picks
    the engine; nothing outside this section asks which it is.
    """

    engine = "one process"
    rank, size, local_rank, local_size = 0, 1, 0, 1

    def allgather(self, tensor):
        """tensor (n, ...) of each process, where n may differ -> (sum n, ...) on all of them, by rank.

        Without gradient: Horovod's would be averaged over the processes, torch.distributed's summed.
        """
        return tensor

    def broadcast(self, value):
        """Rank 0's `value`, any object that can be pickled, on every process."""
        return value

    def collect(self, value):
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
        if adasum and self.size > 1:
            raise InputError(f"{self.engine} has no Adasum; start with horovodrun, or leave --use-adasum out")
        return optimizer

    def learning_rate_scale(self, adasum=False, device="cpu"):
        """What the released recipe multiplies the learning rate by: the processes whose gradients are averaged."""
        return self.size

    def broadcast_model(self, module):
        """Give every process rank 0's weights and buffers."""
        module.load_state_dict(self.broadcast(module.state_dict()))

    def broadcast_optimizer(self, optimizer):
        """Give every process rank 0's optimiser state."""
        optimizer.load_state_dict(self.broadcast(optimizer.state_dict()))

    def barrier(self):
        """Wait until every process is here."""
        self.allgather(torch.zeros(1))

    @contextlib.contextmanager
    def together(self):
        """A block that every process runs, with no exchange inside: an InputError in one of them ends all, told once."""
        error = None
        try:
            yield
        except InputError as caught:
            error = caught
            if self.size == 1:
                raise
        failed = self.allgather(torch.tensor([int(error is not None)]))
        if failed.any():
            if self.rank == int(failed.argmax()):
                _tell(error)
            self.barrier()  # told before the first process ends, at which a launcher ends the others
            raise SystemExit(2)

    def any(self, flag):
        """Whether `flag` is true on any process."""
        return bool(self.allgather(torch.tensor([int(flag)])).any())

    def mean(self, value):
        """The mean over processes of a tensor (...)."""
        return self.allgather(value[None]).mean(0)

    def device(self, name):
        """`name`, or this process's own of the machine's GPUs."""
        return f"cuda:{self.local_rank}" if name == "cuda" and self.local_size > 1 else name


class TorchProcesses(Processes):
    """torch.distributed: what `torchrun` starts. gloo between CPUs, NCCL between GPUs."""

    engine = "torch.distributed"
    started = False

    def __init__(self):
        try:
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            dist.init_process_group(backend, timeout=timedelta(days=7))  # shards of an extraction wait for the slowest
            self.local_rank, self.local_size = (int(os.environ[name]) for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
        except (ValueError, KeyError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"torch.distributed cannot start ({reason}); start the processes with torchrun") from None
        TorchProcesses.started = True
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def allgather(self, tensor):
        tensor = tensor.detach().contiguous()
        counts = [torch.zeros(1, dtype=torch.long, device=tensor.device) for _ in range(self.size)]
        dist.all_gather(counts, torch.tensor([len(tensor)], device=tensor.device))
        longest = int(max(counts))
        padded = torch.cat([tensor, tensor.new_zeros(longest - len(tensor), *tensor.shape[1:])])  # gloo wants equal sizes
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(parts, padded)
        return torch.cat([part[: int(count)] for part, count in zip(parts, counts, strict=True)])

    def broadcast(self, value):
        held = [value if not self.rank else None]
        dist.broadcast_object_list(held)
        return held[0]

    def collect(self, value):
        values = [None] * self.size
        dist.all_gather_object(values, value)
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
            flat = (flat.half() if fp16 else flat) / self.size  # before the sum: it must not overflow
            dist.all_reduce(flat)
            for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(part.view_as(gradient))

        optimizer.register_step_pre_hook(average)
        return optimizer


class HorovodProcesses(Processes):
    """Horovod: what `horovodrun` starts."""

    engine = "Horovod"
    CARRIED = {torch.bool: torch.uint8, torch.bfloat16: torch.half}  # types it does not know, as one of the same width

    def __init__(self):
        try:
            import horovod.torch as hvd

            hvd.init()
        except (ImportError, AttributeError) as error:  # pip "installs" it without native code where torch is hidden from it
            raise InputError(
                f"Horovod cannot be used ({error}); build it with `make horovod`, or start with torchrun"
            ) from None
        self._hvd = hvd
        self.rank, self.size, self.local_rank, self.local_size = hvd.rank(), hvd.size(), hvd.local_rank(), hvd.local_size()

    def allgather(self, tensor):
        carried = self.CARRIED.get(tensor.dtype, tensor.dtype)
        return self._hvd.allgather(tensor.detach().contiguous().view(carried)).view(tensor.dtype)

    def broadcast(self, value):
        return self._hvd.broadcast_object(value, root_rank=0)

    def collect(self, value):
        return self._hvd.allgather_object(value)

    def wrap(self, optimizer, named_parameters, adasum=False, fp16=False):
        hvd = self._hvd
        if adasum and self.size > 1 and not hvd.mpi_enabled():
            raise InputError("Adasum needs MPI; start with horovodrun without --gloo, or leave --use-adasum out")
        if adasum and self.size & (self.size - 1):
            raise InputError(f"Adasum needs 2, 4, 8, ... processes, not {self.size}; change -np, or leave --use-adasum out")
        wrapped = hvd.DistributedOptimizer(
            optimizer,
            named_parameters=named_parameters,
            compression=hvd.Compression.fp16 if fp16 else hvd.Compression.none,
            op=hvd.Adasum if adasum else hvd.Average,
        )
        wrapped.state.update(optimizer.state)  # it is a new object, of the same groups but without the state
        return wrapped

    def learning_rate_scale(self, adasum=False, device="cpu"):
        """Adasum needs no scaling, but for the plain average that NCCL forms on each machine first."""
        if not adasum:
            return self.size
        return self.local_size if device.startswith("cuda") and self._hvd.nccl_built() else 1


def start_processes():
    """The engine that started this process (`launched`); one process without a launcher."""
    engines = {"horovod": HorovodProcesses, "torch": TorchProcesses, None: Processes}
    processes = engines[launched()[0]]()
    if processes.local_size > 1 and "OMP_NUM_THREADS" not in os.environ:  # torchrun sets it, to 1
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes.local_size))
    return processes
