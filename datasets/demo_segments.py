"""The demo's known segments: which seconds of two of its videos show the same film."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets.evaluation_set import annotation_errors
from datasets.fivr import FIVR
from datasets.segments import SegmentSet
from untrusted import read_json

SHARED = 2.0  # seconds of film that two videos share at least, as for the label DS


def load_demo_segments(directory: str | Path, evaluation_set: FIVR) -> SegmentSet:
    """The pairs of a query and a database video of the demo, in VCSL's balance.

    Pairs that share at least 2 s of film are labelled with all that they share. As many pairs that
    share nothing are taken, evenly from all of them. Pairs that share less are left out.
    """
    path = Path(directory) / "demo_segments.json"
    facts = read_json(path, "annotation file")
    labels, unrelated = {}, []
    with annotation_errors(path, "the form of demo_segments.json"):
        for query in evaluation_set.queries:
            for video in evaluation_set.database:
                if video == query:
                    continue
                segments, seconds = shared_film(facts[query], facts[video])
                if seconds >= SHARED:
                    labels[query, video] = segments
                elif not segments:
                    unrelated.append((query, video))
    chosen = [unrelated[i * len(unrelated) // len(labels)] for i in range(len(labels)) if unrelated]
    return SegmentSet([*labels, *chosen], labels, f"annotation {path.name!r}")


def shared_film(
    first: Mapping[str, Any], second: Mapping[str, Any]
) -> tuple[list[tuple[float, float, float, float]], float]:
    """Where two videos show the same film, by their entries in demo_segments.json.

    Returns:
        [(first start, second start, first end, second end)] in seconds of the videos, and the
        seconds of film that they share
    """
    segments, seconds = [], 0.0
    for a in first["segments"]:
        for b in second["segments"]:
            start = max(a["film"][0], b["film"][0])
            end = min(a["film"][1], b["film"][1])
            if start < end:
                starts = video_time(start, a), video_time(start, b)
                segments.append((*starts, video_time(end, a), video_time(end, b)))
                seconds += end - start
    return segments, seconds


def video_time(film_time: float, segment: Mapping[str, Any]) -> float:
    """The second of a video at which a segment of it shows this second of the film."""
    (film_start, film_end), (start, end) = segment["film"], segment["video"]
    return start + (film_time - film_start) / (film_end - film_start) * (end - start)
