"""What every script shares: errors, arguments, texts of messages, digests, seeds, provenance.

The bottom of the imports: this module imports none of ours.
"""

import argparse
import contextlib
import ctypes
import hashlib
import json
import math
import os
import platform
import re
import subprocess
import sys
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

VERSION = "1.0.0"  # of this code; pyproject.toml reads it here

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
            bounds = f"{lowest} or more" if highest == math.inf else f"{lowest} to {highest}"
            raise InputError(f"--{flag} {value} is out of range; it must be {bounds}")


def require_path(path: str | os.PathLike, what: str) -> Path:
    """Return `path` as a Path if it exists, else raise an InputError that names it as `what`.

    The error's cause is a FileNotFoundError, by which a caller can add where to get the file.
    """
    path = Path(path).expanduser()
    if not path.exists():
        missing = InputError(f"{what} {str(path)!r} does not exist; check the path")
        raise missing from FileNotFoundError(path)
    return path


def one_line(text: str) -> str:
    """Text with escapes for what a terminal would act on.

    Control characters, line ends, marks of direction, and bytes that are not UTF-8.
    """
    if text.isprintable():
        return text
    shown = [c if c.isprintable() else c.encode("unicode_escape").decode() for c in text]
    return "".join(shown)


def printable(text: str) -> str:
    """An id as `one_line`; a backslash and a space at either end are escaped too.

    So different ids stay different, and a list of them can be read again.
    """
    shown = one_line(text.replace("\\", "\\\\"))
    if shown.startswith(" "):
        shown = "\\x20" + shown[1:]
    return shown[:-1] + "\\x20" if shown.endswith(" ") else shown


# --- ids that should agree ----------------------------------------------------------------------

# What tells the ids of one program from those of another: {what to do without: how}.
ID_CHANGES = {
    "suffix": lambda name: re.sub(r"\.[A-Za-z]\w{1,4}$", "", name),
    "folder": lambda name: name.rpartition("/")[2],
    "case": lambda name: name.casefold(),
    "surrounding space": lambda name: name.strip(),
    "form of Unicode": lambda name: unicodedata.normalize("NFC", name),
}


def describe_ids(expected: Iterable[str], found: Iterable[str]) -> str:
    """Three ids of either side, and in what they differ if that is plain: the end of a message."""
    expected, found = list(dict.fromkeys(expected)), list(dict.fromkeys(found))
    text = f"expected ids such as {_three(expected)}, found {_three(found)}"
    hint = id_hint(expected, found)
    return f"{text}; {hint}" if hint else text


def id_hint(expected: Iterable[str], found: Iterable[str]) -> str:
    """Ignoring what more of the `expected` ids would be among the `found` ones; "" if unknown."""
    expected, found = set(expected), set(found)
    others, strangers = expected - found, found - expected
    changes = list(ID_CHANGES)
    agreeing = _count_agreeing(others, strangers, changes)
    if not agreeing:
        return ""
    for name in ID_CHANGES:  # keep the changes that matter
        fewer = [change for change in changes if change != name]
        if _count_agreeing(others, strangers, fewer) == agreeing:
            changes = fewer
    return f"ignoring {' and '.join(changes)}, {agreeing} more of {len(expected)} would agree"


def _count_agreeing(expected, found, changes):
    """How many expected ids are among the found ones after these changes of both."""
    changed = {_change(name, changes) for name in found}
    return sum(_change(name, changes) in changed for name in expected)


def _change(name, changes):
    for change in changes:
        name = ID_CHANGES[change](name)
    return name


def _three(ids):
    return ", ".join(map(repr, ids[:3])) + (", ..." if len(ids) > 3 else "") or "none"


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
    import torch  # here: a decoder's process must not load it

    torch.manual_seed(int(np.random.SeedSequence(keys).generate_state(1)[0]))


def provenance() -> dict:
    """What is stored beside every result: command, version, git revision, versions, machine."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return {
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "version": VERSION,
        "revision": _git_revision(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
        "machine": f"{_processor()}, {available_cores()} cores, {gpu}",
    }


def _git_revision():
    """The revision of this checkout, and whether it was changed; "unknown" without git.

    Files in results/ do not count: they are what commands that measure write.
    """
    git = ["git", "-C", str(Path(__file__).resolve().parent)]
    try:
        revision = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        changes = subprocess.run(
            [*git, "status", "--porcelain", "-uno", "--", ".", ":(exclude)results"],
            capture_output=True,
            text=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{revision} with uncommitted changes" if changes else revision


# --- the machine --------------------------------------------------------------------------------


def _processor():
    """Its name, and whether it multiplies bfloat16: without, --amp bfloat16 is slow on a CPU."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.machine()
    name = re.search(r"^model name\s*: (.+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*: (.+)$", text, re.MULTILINE)
    has_bfloat16 = flags and re.search(r"\b(avx512_bf16|amx_bf16|bf16)\b", flags.group(1))
    known = [name.group(1)] if name else []
    known += ["bfloat16" if has_bfloat16 else "no bfloat16"] if flags else []
    return ", ".join([platform.machine(), *known])


def available_cores() -> int:
    """Processor cores that this process may use, which a scheduler may have limited."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


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
