"""Files are written whole or not at all.

`atomic` is under every file that this program writes; `write_json` and `save_torch` use it.
"""

import contextlib
import glob
import json
import math
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch


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
