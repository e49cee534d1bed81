"""What every script shares: input errors, arguments, files, seeds, provenance.

The bottom of the imports: this module imports none of ours.
"""

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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

# --- errors and arguments -----------------------------------------------------------------------


class InputError(Exception):
    """Something the user gave is wrong. The message is one line: what, where, and what to do."""


class Parser(argparse.ArgumentParser):
    """An argument parser that keeps the lines of its description and raises InputError."""

    def __init__(
        self,
        description: str | None = None,
        formatter_class: type = argparse.RawDescriptionHelpFormatter,
        **options: Any,
    ):
        super().__init__(description=description, formatter_class=formatter_class, **options)

    def error(self, message):
        raise InputError(f"{message}; see {self.prog} --help")


def check_ranges(args: argparse.Namespace, ranges: dict[str, tuple[float, float]]) -> None:
    """Raise InputError if an argument is outside its range, given as {flag: (lowest, highest)}."""
    for flag, (lowest, highest) in ranges.items():
        value = getattr(args, flag.replace("-", "_"))
        if not lowest <= value <= highest:
            raise InputError(f"--{flag} {value} is out of range; it must be {lowest} to {highest}")


def require_path(path: str | os.PathLike, what: str) -> Path:
    """Return `path` as a Path if it exists, else raise an InputError that names it as `what`."""
    path = Path(path).expanduser()
    if not path.exists():
        raise InputError(f"{what} {str(path)!r} does not exist; check the path")
    return path


# --- writing files ------------------------------------------------------------------------------


@contextlib.contextmanager
def atomic(path: str | os.PathLike) -> Iterator[Path]:
    """Write a file whole or not at all.

    Gives a temporary path in the same folder. It replaces `path` if the block succeeds, and is
    removed if the block raises. Missing parent folders are created.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    try:
        yield Path(name)
        os.chmod(name, 0o666 & ~_umask())  # mkstemp creates private files
        os.replace(name, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)


def remove_leftovers(path: str | os.PathLike) -> None:
    """Remove the temporary files that `atomic(path)` left behind in killed runs."""
    path = Path(path)
    random_part = "?" * 8  # as mkstemp names its files
    pattern = f".{glob.escape(path.name)}.{random_part}{glob.escape(path.suffix)}"
    for leftover in path.parent.glob(pattern):
        leftover.unlink()


def _umask():
    mask = os.umask(0)  # it can only be read by setting it
    os.umask(mask)
    return mask


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write a JSON-like value atomically, with NaN as null (JSON has no NaN)."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(nan_to_none(value), indent=1) + "\n", encoding="utf-8")


def nan_to_none(value: Any) -> Any:
    """A copy of a JSON-like value, with None in place of NaN and lists in place of tuples."""
    if isinstance(value, dict):
        return {key: nan_to_none(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [nan_to_none(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def save_torch(path: str | os.PathLike, value: Any) -> None:
    """`torch.save`, atomically: a killed run leaves the old file or the new one."""
    with atomic(path) as temporary:
        torch.save(value, temporary)


# --- reading files that others wrote ------------------------------------------------------------


class _BuiltinUnpickler(pickle.Unpickler):
    """Unpickles the containers of public annotation files, and nothing that could run code."""

    ALLOWED = {"set": set, "frozenset": frozenset}

    def find_class(self, module, name):
        if module in ("builtins", "__builtin__") and name in self.ALLOWED:
            return self.ALLOWED[name]
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed in it")


def load_pickle(path: str | os.PathLike, what: str = "annotation file") -> Any:
    """Load a pickle of builtin containers, strings and numbers.

    Raises:
        InputError: the file is not a pickle, or holds any other type, which is never executed
    """
    path = require_path(path, what)
    try:
        with open(path, "rb") as file:
            return _BuiltinUnpickler(file, encoding="latin1").load()
    except Exception as error:  # a broken pickle can raise nearly anything
        raise InputError(
            f"{what} {str(path)!r} is not a pickle of plain containers ({error}); fetch it again"
        ) from None


def load_torch(path: str | os.PathLike, what: str = "model file") -> Any:
    """Load a PyTorch file onto the CPU: tensors and plain containers only.

    Raises:
        InputError: the file cannot be read, or holds any other type, which is never executed
    """
    path = require_path(path, what)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # errors of zip, of pickle, of a storage
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"{what} {str(path)!r} cannot be read ({reason}); is it complete, and a PyTorch file?"
        ) from None


# --- hashes -------------------------------------------------------------------------------------


def digest(value: Any) -> str:
    """A short SHA-256 of a JSON-like value. Equal values have equal digests."""
    text = json.dumps(value, sort_keys=True, default=list)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def file_sha256(path: str | os.PathLike) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- seeds and provenance -----------------------------------------------------------------------


def seeded_rng(*keys: int) -> np.random.Generator:
    """A NumPy generator that depends on these non-negative integers alone (seed, epoch, ...)."""
    # The number of keys is a key too: NumPy ignores zeros at the end of a seed.
    return np.random.default_rng([len(keys), *keys])


def seed_torch(*keys: int) -> None:
    """Seed all torch generators from these integers.

    Called before every step, so that a resumed run draws the same numbers as an unbroken one.
    """
    torch.manual_seed(int(np.random.SeedSequence(keys).generate_state(1)[0]))


def provenance() -> dict:
    """What is stored beside every result: command, git revision, versions, machine."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return {
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "revision": _git_revision(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {gpu}",
    }


def _git_revision():
    """The revision of this checkout, and whether it was changed; "unknown" without git."""
    git = ["git", "-C", str(Path(__file__).resolve().parent)]
    try:
        revision = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        changes = subprocess.run(
            [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{revision} with uncommitted changes" if changes else revision


# --- memory -------------------------------------------------------------------------------------


def tune_malloc() -> None:
    """Make glibc keep up to 1 GiB of freed memory for the next batch. Elsewhere, do nothing.

    By default glibc returns large blocks to the kernel at once, which then has to clear every page
    again: up to a third of the time of a CPU that computes feature maps of many MB. Call this
    before threads are started.
    """
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # from malloc.h
    with contextlib.suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        if mallopt(M_MMAP_THRESHOLD, 1 << 30):  # old versions of glibc refuse this size
            mallopt(M_TRIM_THRESHOLD, 1 << 30)
            mallopt(M_ARENA_MAX, 1)  # the other arenas, one a thread, cannot grow beyond 64 MB
