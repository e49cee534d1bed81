"""What every script shares: bad-input errors, atomic and untrusted files, seeds, provenance, dist. No import of ours."""

import argparse
import contextlib
import ctypes
import glob
import hashlib
import json
import math
import os
import pickle
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch


class InputError(Exception):
    """Something the user gave is wrong. The message is one line: what, where, and what to do about it."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose description keeps its lines and whose errors are one line, as all our errors are."""

    def __init__(
        self, description=None, formatter_class=argparse.RawDescriptionHelpFormatter, **options
    ):
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


def require_path(path, what):
    """`path` as a Path, or an InputError that says which `what` is not there."""
    path = Path(path).expanduser()
    if not path.exists():
        raise InputError(f"{what} {str(path)!r} is not there; check the path")
    return path


def write_json(path, value):
    """Write a JSON-like value; NaN, which JSON does not know, becomes null."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(nan_to_none(value), indent=1) + "\n", encoding="utf-8")


def nan_to_none(value):
    """A JSON-like value with None where it has NaN."""
    if isinstance(value, dict):
        return {key: nan_to_none(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [nan_to_none(item) for item in value]
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
    path = require_path(path, what)
    try:
        with open(path, "rb") as file:
            return _BuiltinUnpickler(file, encoding="latin1").load()
    except Exception as error:  # a broken pickle can raise nearly anything
        raise InputError(
            f"{what} {str(path)!r} is not a pickle of plain containers ({error}); fetch it again"
        ) from None


def load_torch(path, what="model file"):
    """`torch.load` on the CPU, tensors and plain containers only."""
    path = require_path(path, what)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and storage errors, by file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"{what} {str(path)!r} cannot be read ({reason}); is it complete, and a PyTorch file?"
        ) from None


def save_torch(path, value):
    """`torch.save`, written aside and renamed: a killed run leaves the old file or the new one, never half of one."""
    with atomic(path) as temporary:
        torch.save(value, temporary)


def digest(value):
    """A short SHA-256 of a JSON-like value: the same for equal values, whatever file they came from."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=list).encode()).hexdigest()[:16]


def file_sha256(path):
    """The SHA-256 of a file's content, as hexadecimal text."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- seeds and provenance --------------------------------------------------------------------------------------------


def seeded_rng(*keys):
    """A NumPy generator that depends on nothing but the non-negative integers `keys` (seed, epoch, index, ...)."""
    return np.random.default_rng(
        [len(keys), *keys]
    )  # their number too: trailing zeros alone change nothing


def seed_torch(*keys):
    """Seed every torch generator from the integers `keys`; done anew each step, a resumed run draws as an unbroken one."""
    torch.manual_seed(int(np.random.SeedSequence(keys).generate_state(1)[0]))


def provenance():
    """What a figure needs beside it: command, git revision, versions, machine."""
    here = Path(__file__).resolve().parent
    try:
        git = ["git", "-C", str(here)]
        revision = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True
        ).stdout.strip()
        revision += " with uncommitted changes" if changed else ""
    except (OSError, subprocess.CalledProcessError):
        revision = "unknown"
    return {
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "revision": revision,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, "
        + (torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"),
    }


def tune_malloc():
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
