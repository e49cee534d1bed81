"""The HTML page of `--report`.

The page is one file: styles, pictures and the script are inside it, and nothing is fetched but the
videos that are played. It works without the script too, except for what one does with it: playing,
filtering, choosing.
"""

import base64
import hashlib
import io
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup
from PIL import Image

from files import atomic
from videoindex.facts import media_facts
from videoindex.index import VideoIndex
from videoindex.pipeline import EncodedVideo
from videoindex.results import VERDICTS, Group, Match
from videoindex.store import Content
from videoindex.text import (
    UNKNOWN,
    format_count,
    format_facts,
    format_span,
    format_time,
    printable,
)

TEMPLATES = Path(__file__).resolve().parent
# Pictures are nearly all of a page. One of 1,000 matches should stay below 30 MB.
THUMBNAILS, MAX_THUMBNAILS = 6, 5000  # in a row; in the page, more or less
MAX_MEMBERS, MAX_LINKS = 200, 100  # of a group that are shown; the others are counted
MIN_CELLS, MAX_CELLS = 48, 240  # of a matrix's picture, a side
LARGE_MATRICES = 40  # with more matches than this, the pictures have fewer cells
MAX_VALUES = 1 << 22  # of a matrix that are computed together: 16 MB
# From white to dark blue, as 256 times R, G, B.
PALETTE = [round(255 + (end - 255) * i / 255) for i in range(256) for end in (8, 48, 107)]
# What the page may load: the pictures inside it, local videos, and local pictures such as GIFs.
POLICY = (
    "default-src 'none'; img-src data: file:; media-src file:; style-src 'unsafe-inline'; "
    "script-src 'sha256-{}'; base-uri 'none'; form-action 'none'"
)


# --- the page -----------------------------------------------------------------------------------


def write_query(
    path: str | os.PathLike,
    index: VideoIndex,
    results: Iterable[tuple[EncodedVideo, list[Match]]],
) -> None:
    """Write the page of a query's results."""
    results = list(results)
    page = _Page(
        index, num_pairs=sum(len(matches) for _, matches in results), num_rows=len(results)
    )
    clips = [page.clip(video, matches) for video, matches in results]
    page.write(path, title="Matches", clips=clips)


def write_duplicates(path: str | os.PathLike, index: VideoIndex, groups: Iterable[Group]) -> None:
    """Write the page of groups of duplicates."""
    links = [_links_to_show(group) for group in groups]
    num_members = sum(min(len(group.files), MAX_MEMBERS) for group in groups)
    page = _Page(index, num_pairs=sum(map(len, links)), num_rows=num_members)
    shown = [page.group(*pair) for pair in zip(groups, links, strict=True)]
    page.write(path, title="Videos that share material", groups=shown)


def _links_to_show(group):
    """Links of a group: first the best one of each video, so that all can be judged."""
    first, others, seen = [], [], set()
    for link in group.links + group.parts:  # best first each
        (others if {link.a, link.b} <= seen else first).append(link)
        seen |= {link.a, link.b}
    shown = (first + others)[:MAX_LINKS]
    return sorted(shown, key=lambda link: -link.score)


class _Page:
    """Makes what the template shows, and numbers the files that it names.

    Args:
        num_pairs: how many pairs of videos are shown side by side.
        num_rows: how many rows of thumbnails are shown beside those of the pairs.
    """

    def __init__(self, index: VideoIndex, num_pairs: int, num_rows: int):
        self.index, self.fps = index, float(index.fps)
        num_rows = max(1, 2 * num_pairs + num_rows)
        self.thumbnails = min(THUMBNAILS, max(1, MAX_THUMBNAILS // num_rows))
        cells = MAX_CELLS * math.sqrt(LARGE_MATRICES / max(1, num_pairs))
        self.cells = int(min(MAX_CELLS, max(MIN_CELLS, cells)))
        self.files: dict[str, dict[str, Any]] = {}  # {absolute path: what is shown of it}

    def write(self, path: str | os.PathLike, **values: Any) -> None:
        """Render the template with `values` into the file `path`."""
        environment = Environment(
            loader=FileSystemLoader(TEMPLATES),
            autoescape=True,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        script = (TEMPLATES / "report.js").read_text(encoding="utf-8")
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        folder = os.path.abspath(self.index.folder)
        page = environment.get_template("report.html").render(
            index=printable(self.index.folder),
            videos=len(self.index),
            verdicts=VERDICTS,
            policy=POLICY.format(digest),
            style=Markup((TEMPLATES / "report.css").read_text(encoding="utf-8")),
            script=Markup(script),
            # tojson escapes what HTML could take for markup, and all that is not ASCII.
            data={"index": folder, "files": list(self.files)},
            **values,
        )
        with atomic(path) as temporary:
            temporary.write_text(page, encoding="utf-8")

    # --- what is shown ---------------------------------------------------------------------------

    def file(self, path: str | os.PathLike) -> dict[str, Any]:
        """What is shown of a file; its number is its place in `files`."""
        path = os.path.abspath(path)
        if path not in self.files:
            facts = media_facts(path)
            folder, name = os.path.split(path)
            self.files[path] = {
                "number": len(self.files),
                "path": printable(path),
                "folder": printable(os.path.join(folder, "")) or "./",
                "name": printable(name),
                "url": Path(path).as_uri(),  # percent-encoded
                "gone": not os.path.isfile(path),
                "size": facts.size or 0,
                "facts": format_facts(facts),
                "values": facts,
            }
        return self.files[path]

    def clip(self, video: EncodedVideo, matches: list[Match]) -> dict[str, Any]:
        """What the template shows of a query and its matches."""

        def thumbnails(frame_numbers):
            return [video.thumbnails[i] for i in frame_numbers]

        clip = self._side("clip", video.path, video.seconds, thumbnails)
        num_frames = len(video.frame_descriptors)
        clip |= self._row(clip, num_frames)
        pairs = []
        for match in matches:
            content = self.index.store.content(match.content)
            found = self._stored_side("found", content, match.path)
            pair = self._pair(match, video.frame_descriptors, clip, content, found)
            pair["same_content"] = [self.file(path) for path in match.same_content_paths]
            pairs.append(pair)
        return {**clip, "pairs": pairs}

    def group(self, group: Group, links: list) -> dict[str, Any]:
        """What the template shows of a group, with these of its links."""
        members, all_files = [], group.files | group.part_files
        for number, paths in list(group.files.items())[:MAX_MEMBERS]:
            content = self.index.store.content(number)
            side = self._stored_side("", content, paths[0])
            files = [self.file(path) for path in paths]
            members.append({"files": files} | self._row(side, content.num_frames))
        pairs = []
        for link in links:
            a, b = self.index.store.content(link.a), self.index.store.content(link.b)
            role = "part" if link.a in group.part_files else "first"
            first = self._stored_side(role, a, all_files[link.a][0])
            second = self._stored_side("second", b, all_files[link.b][0])
            pair = self._pair(link, self.index.store.frame_descriptors(a), first, b, second)
            pairs.append(pair)
        files = [file for member in members for file in member["files"]]
        return {
            "count": format_count(group),
            "name": " ".join(file["path"] for file in files),
            "size": sum(file["size"] for file in files),
            "members": members,
            "more_members": max(0, len(group.files) - MAX_MEMBERS),
            "pairs": pairs,
            "more_pairs": len(group.links) + len(group.parts) - len(links),
            "is_doubtful": group.is_doubtful,
        }

    def _side(self, role: str, path: str | os.PathLike, seconds: float, thumbnails: Callable):
        """One of two videos; `thumbnails(frame_numbers)` gives its JPEGs."""
        file = self.file(path)
        if file["facts"]["length"] == UNKNOWN:
            file["facts"]["length"] = format_time(seconds)
        return {
            "role": role,
            "file": file,
            "seconds": seconds,
            "length": format_time(seconds),
            "fetch": thumbnails,
        }

    def _stored_side(self, role, content, path):
        def thumbnails(frame_numbers):
            return self.index.store.thumbnails(content, frame_numbers)

        return self._side(role, path, content.seconds, thumbnails)

    def _row(self, side, num_frames):
        """Thumbnails of all of a video."""
        count = min(self.thumbnails, num_frames)
        frame_numbers = np.linspace(0, num_frames - 1, count).round().astype(int)
        return {"thumbnails": self._shots(side, frame_numbers)}

    def _shots(self, side, frame_numbers):
        shots = []
        for i, jpeg in zip(frame_numbers, side["fetch"](frame_numbers), strict=True):
            shots.append({"uri": _data_uri(jpeg), "time": format_time(i / self.fps)})
        return shots

    def _pair(
        self,
        match: Any,  # a Match or a Link
        frames: np.ndarray,
        query: dict[str, Any],
        content: Content,
        target: dict[str, Any],
    ) -> dict[str, Any]:
        """What the template shows of two videos that match.

        Args:
            frames: the query's frame descriptors (Tq, D).
            query, target: of `_side`.
            content: the target's.
        """
        sides, segments, lines = (query, target), [], []
        spans = [[(s.query_start, s.query_end) for s in match.segments]]
        spans.append([(s.target_start, s.target_end) for s in match.segments])
        for (y1, y2), (x1, x2) in zip(*spans, strict=True):
            lines.append({"x1": x1, "y1": y1, "x2": x2, "y2": y2})
            segments.append({"spans": (format_span(y1, y2), format_span(x1, x2)), "at": (y1, x1)})
        lengths = len(frames), content.num_frames
        shots = self._shots_side_by_side(sides, spans, lengths)
        shown = [
            {**side, "thumbnails": shots[i], "marks": _marks(spans[i], side["seconds"])}
            for i, side in enumerate(sides)
        ]
        matrix = _pooled_similarities(self.index, frames, content, self.cells)
        return {
            "score": match.score,
            "verdict": match.verdict,
            "matched_seconds": match.matched_seconds,
            "sides": shown,
            "facts": _compare_facts(query["file"], target["file"]),
            "gone": query["file"]["gone"] or target["file"]["gone"],
            "same_file": query["file"] is target["file"],
            "same_content": [],
            "segments": segments,
            "matrix": _matrix_picture(matrix),
            "height": lengths[0] / self.fps,
            "width": lengths[1] / self.fps,
            "lines": lines,
        }

    def _shots_side_by_side(self, sides, spans, lengths):
        """Thumbnails of the first spans: the k-th of both sides show the same."""
        first = [own[0] for own in spans]
        frames = [round((end - start) * self.fps) for start, end in first]
        count = max(1, min(self.thumbnails, *frames))
        shots = []
        for side, (start, end), length in zip(sides, first, lengths, strict=True):
            times = start + (np.arange(count) + 0.5) * (end - start) / count  # middles of its parts
            frame_numbers = (times * self.fps).astype(int).clip(0, length - 1)
            shots.append(self._shots(side, frame_numbers))
        return shots


def _marks(spans, seconds):
    """Where spans lie in a video, in percent."""
    total = max(seconds, 1e-6)
    return [{"left": 100 * a / total, "width": 100 * (b - a) / total} for a, b in spans]


def _compare_facts(a, b):
    """Rows of (name, text of a, text of b, which has more: 0, 1 or None)."""
    rows = []
    for name in a["facts"]:
        more = None
        if name in ("size", "picture", "bit rate"):
            amounts = [_amount(name, file["values"]) for file in (a, b)]
            if None not in amounts and amounts[0] != amounts[1]:
                more = int(amounts[1] > amounts[0])
        rows.append((name, a["facts"][name], b["facts"][name], more))
    return rows


def _amount(name, facts):
    if name == "picture":
        return facts.width * facts.height if facts.width and facts.height else None
    return facts.size if name == "size" else facts.bit_rate


def _data_uri(data, kind="jpeg"):
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _pooled_similarities(index, frames, content, cells):
    """Frame similarities (Tq, Tt) as a table of at most `cells` a side: the highest of each part.

    For long videos, the whole table would take a gigabyte; so it is made a few rows at a time.
    """
    row_starts = np.unique(np.linspace(0, len(frames), cells, endpoint=False).astype(int))
    column_starts = np.linspace(0, content.num_frames, cells, endpoint=False).astype(int)
    column_starts = np.unique(column_starts)
    num_blocks = math.ceil(len(frames) * content.num_frames / MAX_VALUES)
    blocks = np.array_split(row_starts, min(num_blocks, len(row_starts)))
    ends = [block[0] for block in blocks[1:]] + [len(frames)]
    rows = []
    for block, end in zip(blocks, ends, strict=True):
        similarities = index.frame_similarities(frames[block[0] : end], content)
        similarities = np.maximum.reduceat(similarities, block - block[0], 0)
        rows.append(np.maximum.reduceat(similarities, column_starts, 1))
    return np.concatenate(rows)


def _matrix_picture(matrix):
    """A table of similarities as a PNG: the more similar, the darker."""
    image = Image.fromarray((matrix.clip(0, 1) * 255).astype(np.uint8)).convert("P")
    image.putpalette(PALETTE)
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return _data_uri(file.getvalue(), "png")
