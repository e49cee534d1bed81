"""What is wrong with the rows of a video, and which videos of a file a run has looked at.

Every video is checked when a run first reads it. That costs a SHA-256 of its rows, about 1 s for
1 GB, once: later reads, those of the next epochs, are not checked.
"""

import hashlib
import mmap
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

CHECKED, HAS_ZERO_ROWS = 1, 2  # marks of a video


def fault_of_rows(rows: np.ndarray, stored: str | None) -> str:
    """Why the rows (T, C) of a video must not be used, or "".

    stored: their checksum in the file, if it has one
    """
    if not all_finite(rows):
        return "holds NaN or infinity"
    if not rows[0, 0] and not rows.any():
        return "holds nothing but zeros"
    if stored is not None and stored != rows_checksum(np.ascontiguousarray(rows)):
        return "has other rows than were written"
    return ""


def all_finite(rows: np.ndarray) -> bool:
    """Whether no value is NaN or infinite."""
    if rows.dtype == np.float16:
        # By the exponent's bits: 20 times as fast as NumPy's isfinite, which casts float16.
        return not (rows.view(np.uint16) & 0x7C00 == 0x7C00).any()
    return bool(np.isfinite(rows).all())


def rows_checksum(rows: np.ndarray) -> str:
    """SHA-256 of a video's contiguous rows, cut to 64 bits: against accidents, not forgery."""
    return hashlib.sha256(rows).hexdigest()[:16]


class RowChecks:
    """Which videos of a file were checked, and which of them have rows of zeros.

    The marks are in memory that forked processes share, so that data-loading workers check a video
    once in all, not once each.
    """

    def __init__(self, videos: Sequence[str]) -> None:
        self._number = {video: i for i, video in enumerate(videos)}
        self._marks = mmap.mmap(-1, max(len(videos), 1))  # a byte each, 0 at first

    def is_checked(self, video: str) -> bool:
        return bool(self._marks[self._number[video]])

    def mark(self, video: str, rows: np.ndarray) -> None:
        """Mark a video as checked, whose rows are good."""
        # Only rows that begin with a zero are looked at whole.
        suspects = rows[rows[:, 0] == 0]
        has_zero_rows = len(suspects) and not suspects.any(1).all()
        self._marks[self._number[video]] = CHECKED | (HAS_ZERO_ROWS if has_zero_rows else 0)

    def videos_with_zero_rows(self) -> list[str]:
        """Of those checked so far."""
        marks = self._marks[:]
        if not any(mark & HAS_ZERO_ROWS for mark in set(marks)):
            return []
        return [video for video, i in self._number.items() if marks[i] & HAS_ZERO_ROWS]


def name_some(videos: Iterable[str], count: int = 3) -> str:
    """The first of these ids, for a message, and how many more there are."""
    videos = list(videos)
    named = ", ".join(map(repr, videos[:count]))
    return f"{named} and {len(videos) - count} more" if len(videos) > count else named


def zero_row_notes(videos: Iterable[str], path: str | Path) -> list[str]:
    """A line on the videos of a file that have rows of zeros."""
    videos = sorted(set(videos))
    if not videos:
        return []
    return [
        f"{str(path)!r}: {len(videos)} videos have rows of zeros, which resemble nothing:"
        f" {name_some(videos)}; were they extracted completely?"
    ]
