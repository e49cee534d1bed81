"""How results are shown: names and times as text, and the HTML page of `--report`.

The page is one file: styles and pictures are inside it, and it has no scripts.
"""

import base64
import io
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader
from PIL import Image

from files import atomic
from utils import one_line
from videoindex.index import VideoIndex
from videoindex.pipeline import EncodedVideo
from videoindex.results import Group, Match, TimeSegment
from videoindex.store import Content

TEMPLATES = Path(__file__).resolve().parent
THUMBNAILS = 6  # in a row
MAX_MEMBERS, MAX_LINKS = 24, 10  # of a group that are shown; the others are counted
MAX_CELLS = 240  # of a matrix's picture, a side
# From white to dark blue, as 256 times R, G, B.
PALETTE = [round(255 + (end - 255) * i / 255) for i in range(256) for end in (8, 48, 107)]


def printable(path: str | os.PathLike) -> str:
    """A file name on one line, relative to the working directory if it lies in it.

    Control characters, and bytes that are not UTF-8, are shown as escapes.
    """
    here = os.path.join(os.getcwd(), "")
    name = os.fsencode(os.fspath(path).removeprefix(here)).decode("utf-8", "backslashreplace")
    return one_line(name)


def format_time(seconds: float) -> str:
    """Seconds as 0:04.5 or 1:02:03.0."""
    minutes, tenths = divmod(round(seconds * 10), 600)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02}:{tenths // 10:02}.{tenths % 10}"
    return f"{minutes}:{tenths // 10:02}.{tenths % 10}"


def format_segment(segment: TimeSegment) -> str:
    """A segment as 0:01.0–0:06.0 = 0:04.0–0:09.0, the query's time first."""
    query = f"{format_time(segment.query_start)}–{format_time(segment.query_end)}"
    target = f"{format_time(segment.target_start)}–{format_time(segment.target_end)}"
    return f"{query} = {target}"


# --- the page -----------------------------------------------------------------------------------


def write_query(
    path: str | os.PathLike,
    index: VideoIndex,
    results: Iterable[tuple[EncodedVideo, list[Match]]],
) -> None:
    """Write the page of a query's results."""
    clips = []
    for video, matches in results:
        clip = {
            "name": printable(video.path),
            "length": format_time(video.seconds),
            "matches": [_match(index, video, match) for match in matches],
        }
        clips.append(clip)
    threshold = index.calibration.get("threshold")
    _write_page(path, index, threshold, title="Matches", clips=clips)


def write_duplicates(path: str | os.PathLike, index: VideoIndex, groups: Iterable[Group]) -> None:
    """Write the page of groups of duplicates."""
    shown = [_group(index, group) for group in groups]
    threshold = index.calibration.get("copies_threshold")
    _write_page(path, index, threshold, title="Videos that share material", groups=shown)


def _write_page(path, index, threshold, **values):
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.get_template("report.html").render(
        index=printable(index.folder), videos=len(index), threshold=threshold, **values
    )
    with atomic(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _match(index, video, match):
    """What the template shows of a match."""

    def clip_thumbnails(frame_numbers):
        return [video.thumbnails[i] for i in frame_numbers]

    content = index.store.content(match.content)
    clip = _side("clip", video.path, video.seconds, clip_thumbnails)
    found = _stored_side("found", index, content)
    pair = _pair(index, match.score, video.frame_descriptors, clip, content, found, match.segments)
    same_content = [printable(path) for path in match.same_content_paths]
    return {**pair, "name": found["name"], "same_content": same_content}


def _group(index, group):
    """What the template shows of a group."""
    members = []
    for number, paths in list(group.files.items())[:MAX_MEMBERS]:
        content = index.store.content(number)
        count = min(THUMBNAILS, content.num_frames)
        frame_numbers = np.linspace(0, content.num_frames - 1, count).round().astype(int)
        jpegs = index.store.thumbnails(content, frame_numbers)
        member = {
            "names": [printable(path) for path in paths],
            "length": format_time(content.seconds),
            "thumbnails": [_data_uri(jpeg) for jpeg in jpegs],
        }
        members.append(member)
    pairs = []
    for link in group.links[:MAX_LINKS]:
        a, b = index.store.content(link.a), index.store.content(link.b)
        first, second = _stored_side("first", index, a), _stored_side("second", index, b)
        frames = index.store.frame_descriptors(a)
        pairs.append(_pair(index, link.score, frames, first, b, second, link.segments))
    return {
        "count": len(group.paths),
        "members": members,
        "more_members": max(0, len(group.files) - MAX_MEMBERS),
        "pairs": pairs,
        "more_pairs": max(0, len(group.links) - MAX_LINKS),
    }


def _side(role: str, path: str | os.PathLike, seconds: float, thumbnails: Callable) -> dict:
    """One of two videos; `thumbnails(frame_numbers)` gives its JPEGs."""
    return {
        "role": role,
        "name": printable(path),
        "seconds": seconds,
        "length": format_time(seconds),
        "fetch": thumbnails,
    }


def _stored_side(role, index, content):
    path = index.store.paths(content.id)[0]

    def stored_thumbnails(frame_numbers):
        return index.store.thumbnails(content, frame_numbers)

    return _side(role, path, content.seconds, stored_thumbnails)


def _pair(
    index: VideoIndex,
    score: float,
    frames: np.ndarray,
    query: dict,
    content: Content,
    target: dict,
    segments: list[TimeSegment],
) -> dict[str, Any]:
    """What the template shows of two videos that match.

    Args:
        frames: the query's frame descriptors (Tq, D).
        query, target: of `_side`.
        content: the target's.
    """
    fps = float(index.fps)
    matrix = index.frame_similarities(frames, content)  # (Tq, Tt)
    query_spans = [(segment.query_start, segment.query_end) for segment in segments]
    target_spans = [(segment.target_start, segment.target_end) for segment in segments]
    lines = []
    for (y1, y2), (x1, x2) in zip(query_spans, target_spans, strict=True):
        lines.append({"x1": x1, "y1": y1, "x2": x2, "y2": y2})
    return {
        "score": f"{score:.3f}",
        "name": "",
        "same_content": [],
        "sides": [
            _shown_side(query, query_spans, len(frames), fps),
            _shown_side(target, target_spans, content.num_frames, fps),
        ],
        "segments": [format_segment(segment) for segment in segments],
        "matrix": _matrix_picture(matrix),
        "height": matrix.shape[0] / fps,
        "width": matrix.shape[1] / fps,
        "lines": lines,
    }


def _shown_side(side, spans, num_frames, fps):
    """A side with its marked spans, and with thumbnails of the first of them (or of all of it)."""
    start, end = spans[0] if spans else (0.0, side["seconds"])
    # The middles of equal parts of the span.
    times = np.linspace(start, end, THUMBNAILS + 1)[:-1] + (end - start) / (2 * THUMBNAILS)
    frame_numbers = np.unique((times * fps).astype(int).clip(0, num_frames - 1))
    thumbnails = []
    for i, jpeg in zip(frame_numbers, side["fetch"](frame_numbers), strict=True):
        thumbnails.append({"uri": _data_uri(jpeg), "time": format_time(i / fps)})
    total = max(side["seconds"], 1e-6)
    marks = []  # in percent
    for start, end in spans:
        marks.append({"left": 100 * start / total, "width": 100 * (end - start) / total})
    return {**side, "thumbnails": thumbnails, "marks": marks}


def _data_uri(data, kind="jpeg"):
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _matrix_picture(matrix):
    """Frame similarities (Tq, Tt) as a PNG: the more similar, the darker.

    For a long video, each cell of the picture shows the highest of several similarities.
    """
    for axis in (0, 1):
        starts = np.linspace(0, matrix.shape[axis], MAX_CELLS, endpoint=False).astype(int)
        matrix = np.maximum.reduceat(matrix, np.unique(starts), axis)
    image = Image.fromarray((matrix.clip(0, 1) * 255).astype(np.uint8)).convert("P")
    image.putpalette(PALETTE)
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return _data_uri(file.getvalue(), "png")
