"""The rows of long films that are being indexed: a stopped `search.py index` goes on from them.

    part-SHA256-KEY-N.npz    in the index's folder: rows N * length ... of a film's features

The backbone is nearly all of the work, so its rows are kept, and nothing else. Whoever goes on
decodes the film from its start, and leaves out the backbone where there are rows. A row does not
depend on the frames that are computed with it (`extraction._full_batch`), so the result is that of
an unbroken run.

A part is written whole, aside, and renamed. The parts of a film are removed when it is stored, when
it cannot be read to its end, and when its file is gone or has changed.
"""

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from files import atomic
from untrusted import load_npz
from utils import InputError, digest
from videoindex.pipeline import Pipeline, package_versions
from videoindex.store import FileEntry

PART_SECONDS = 600  # of film: what a kill costs at most, half a minute of work with Lite0
NAME = re.compile(r"part-([0-9a-f]{64})-[0-9a-f]{16}-\d+\.npz")


class FilmParts:
    """The parts in an index's folder that one model made. Use it inside `IndexStore.writing`.

    Args:
        folder: the index's.
        pipeline: decides the rows; parts that another one made are not taken.
        length: rows of a part; of a film that has no more there are none.
    """

    def __init__(self, folder: Path, pipeline: Pipeline, length: int):
        self.folder, self.row_size, self.length = folder, pipeline.row_size, length
        self.key = digest([rows_made_by(pipeline), length])
        self._stored: dict[str, int] = {}  # parts of each film, by its SHA-256

    def _path(self, sha256, number):
        return self.folder / f"part-{sha256}-{self.key}-{number}.npz"

    def load(self, sha256: str) -> np.ndarray:
        """The first rows (T, C) float16 of a film, as far as there are parts. T may be 0."""
        parts = []
        while (path := self._path(sha256, len(parts))).exists():
            try:
                rows = load_npz(path, "part of a film", "remove it").get("rows")
            except InputError:
                break  # computed again, and written over
            if rows is None or rows.dtype != np.float16:
                break
            if rows.shape != (self.length, self.row_size) or not np.isfinite(rows).all():
                break
            parts.append(rows)
        self._stored[sha256] = len(parts)
        return np.concatenate([np.empty((0, self.row_size), np.float16), *parts])

    def save(self, sha256: str, file: FileEntry, rows: Sequence[np.ndarray]) -> None:
        """Store what is whole and not stored yet of a film's rows so far."""
        start = self._stored.get(sha256, 0) * self.length
        if len(rows) <= start + self.length:
            return
        path = self._path(sha256, self._stored.get(sha256, 0))
        with atomic(path) as temporary, open(temporary, "wb") as out:
            np.savez(
                out,
                rows=np.stack(rows[start : start + self.length]),
                path=np.frombuffer(os.fsencode(file.path), np.uint8),
                size_and_mtime=np.array([file.size, file.mtime], np.int64),
            )
        self._stored[sha256] = self._stored.get(sha256, 0) + 1


def rows_made_by(pipeline: Pipeline) -> dict[str, Any]:
    """What decides the last bit of every row of a pipeline's backbone."""
    versions = package_versions()
    return {
        "identity": pipeline.identity,
        "frames": pipeline.frame_rule,
        "device": str(pipeline.device),
        "versions": [versions["torch"], versions["av"]],
    }


def remove_parts(folder: Path, sha256: str) -> None:
    """Remove the parts of a film, whichever model made them."""
    for path in folder.glob(f"part-{sha256}-*.npz"):
        if NAME.fullmatch(path.name):
            path.unlink(missing_ok=True)


def remove_orphans(folder: Path, is_stored: Callable[[str], bool]) -> None:
    """Remove the parts of films that are stored, by SHA-256, or whose file is gone or changed."""
    for path in folder.glob("part-*.npz"):
        match = NAME.fullmatch(path.name)
        if match and (is_stored(match[1]) or not _has_its_file(path)):
            path.unlink(missing_ok=True)


def _has_its_file(path):
    """Whether the file that a part was made of is there, and is unchanged."""
    try:
        part = load_npz(path, "part of a film", "remove it")
        facts = os.stat(os.fsdecode(part["path"].tobytes()))
        return [facts.st_size, facts.st_mtime_ns] == part["size_and_mtime"].tolist()
    except (InputError, OSError, KeyError, ValueError):
        return False
