"""How answers are shown: names and times as text, and the page of `--report`, one HTML file that needs nothing else."""

import base64
import io
import os
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader
from PIL import Image

import utils

TEMPLATES = Path(__file__).resolve().parent
SHOTS = 6  # thumbnails of a row
MEMBERS, LINKS = 24, 10  # videos and links of a group that are drawn; the others are counted
PIXELS = 240  # most cells of a matrix's picture, a side
PALETTE = [
    round(255 + (end - 255) * i / 255) for i in range(256) for end in (8, 48, 107)
]  # white to dark blue


def printable(path):
    """A file name on one line, whatever it holds: control characters and bytes that are no UTF-8 as escapes."""
    path, here = os.fspath(path), os.path.join(os.getcwd(), "")
    text = os.fsencode(path.removeprefix(here)).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def clock(seconds):
    """Seconds as 0:04.5 or 1:02:03.0."""
    minutes, tenths = divmod(round(seconds * 10), 600)
    hours, minutes = divmod(minutes, 60)
    return (
        f"{hours}:{minutes:02}" if hours else f"{minutes}"
    ) + f":{tenths // 10:02}.{tenths % 10}"


def span(start, end):
    return f"{clock(start)}–{clock(end)}"


# --- the page --------------------------------------------------------------------------------------------------------


def write_query(path, index, results):
    """The page of a query. results: [(EncodedVideo, [Match])]."""
    clips = [
        {
            "name": printable(described.path),
            "length": clock(described.seconds),
            "matches": [_match(index, described, match) for match in matches],
        }
        for described, matches in results
    ]
    _write(path, index, index.calibration.get("threshold"), title="Matches", clips=clips)


def write_duplicates(path, index, groups):
    """The page of `duplicates`. groups: [Group]."""
    drawn = [_group(index, group) for group in groups]
    _write(
        path,
        index,
        index.calibration.get("copies_threshold"),
        title="Videos that share material",
        groups=drawn,
    )


def _write(path, index, threshold, **page):
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    facts = {"index": printable(index.folder), "videos": len(index), "threshold": threshold}
    with utils.atomic(path) as temporary:
        temporary.write_text(
            environment.get_template("report.html").render(**facts, **page), encoding="utf-8"
        )


def _match(index, described, match):
    row = index.store.content(match.content)
    clip = _side(
        "clip",
        described.path,
        described.seconds,
        lambda wanted: [described.thumbnails[i] for i in wanted],
    )
    return _pair(
        index,
        match.score,
        described.frames,
        clip,
        row,
        _stored("found", index, row),
        match.stretches,
        match.also,
    )


def _group(index, group):
    members = []
    for number, paths in list(group.files.items())[:MEMBERS]:
        row = index.store.content(number)
        shots = index.store.thumbnails(
            row, np.linspace(0, row["frames"] - 1, min(SHOTS, row["frames"])).round().astype(int)
        )
        names = [printable(path) for path in paths]
        members.append(
            {
                "names": names,
                "length": clock(row["seconds"]),
                "shots": [_uri(jpeg) for jpeg in shots],
            }
        )
    pairs = []
    for link in group.links[:LINKS]:
        a, b = index.store.content(link.a), index.store.content(link.b)
        sides = _stored("first", index, a), _stored("second", index, b)
        pairs.append(
            _pair(index, link.score, index.store.frames(a), sides[0], b, sides[1], link.stretches)
        )
    return {
        "count": len(group.paths),
        "members": members,
        "more_members": max(0, len(group.files) - MEMBERS),
        "pairs": pairs,
        "more": max(0, len(group.links) - LINKS),
    }


def _stored(role, index, row):
    path = index.store.paths(row["id"])[0]
    return _side(role, path, row["seconds"], lambda wanted: index.store.thumbnails(row, wanted))


def _side(role, path, seconds, shots):
    """One of two videos: shots(frame numbers) gives their JPEGs."""
    return {
        "role": role,
        "name": printable(path),
        "seconds": seconds,
        "length": clock(seconds),
        "fetch": shots,
    }


def _pair(index, score, frames, query, row, video, places, also=()):
    """Two videos that match: what the template draws."""
    matrix = index.matrix(frames, row)  # (Tq, Tt)
    fps = float(index.fps)
    sides = []
    for side, length, ends in (
        (query, len(frames), slice(0, 2)),
        (video, row["frames"], slice(2, 4)),
    ):
        first, last = places[0][ends] if places else (0.0, side["seconds"])
        times = np.linspace(first, last, SHOTS + 1)[:-1] + (last - first) / (2 * SHOTS)
        wanted = np.unique((times * fps).astype(int).clip(0, length - 1))
        shots = [
            {"uri": _uri(jpeg), "time": clock(i / fps)}
            for i, jpeg in zip(wanted, side["fetch"](wanted), strict=True)
        ]
        total = max(side["seconds"], 1e-6)
        marks = [
            {"left": 100 * p[ends][0] / total, "width": 100 * (p[ends][1] - p[ends][0]) / total}
            for p in places
        ]
        sides.append({**side, "shots": shots, "marks": marks})
    return {
        "score": f"{score:.3f}",
        "sides": sides,
        "name": video["name"] if query["role"] == "clip" else "",
        "also": [printable(path) for path in also],
        "places": [f"{span(*place[:2])} = {span(*place[2:4])}" for place in places],
        "matrix": _picture(matrix),
        "height": matrix.shape[0] / fps,
        "width": matrix.shape[1] / fps,
        "lines": [
            {"x1": p.start, "y1": p.query_start, "x2": p.end, "y2": p.query_end} for p in places
        ],
    }


def _uri(data, kind="jpeg"):
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _picture(matrix):
    """Frame similarities (Tq, Tt) as a PNG: the darker, the more alike; of long videos the most alike in each cell."""
    for axis in (0, 1):
        starts = np.unique(np.linspace(0, matrix.shape[axis], PIXELS, endpoint=False).astype(int))
        matrix = np.maximum.reduceat(matrix, starts, axis)
    image = Image.fromarray((matrix.clip(0, 1) * 255).astype(np.uint8)).convert("P")
    image.putpalette(PALETTE)
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return _uri(file.getvalue(), "png")
