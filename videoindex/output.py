"""What `search.py` prints: as a table for people, as JSON, or as CSV with a row a file."""

import csv
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import utils
from videoindex.facts import MediaFacts, media_facts
from videoindex.results import Group, Link, Match, TimeSegment
from videoindex.text import (
    UNKNOWN,
    facts_columns,
    format_count,
    format_facts,
    format_segment,
    format_time,
    printable,
)

FORMATS = ("table", "json", "csv")
INDENT = " " * 9


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=1))


def print_csv(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> None:
    """Print rows {column: value} below a line of the columns' names."""
    table = csv.DictWriter(sys.stdout, columns, restval="", lineterminator="\n")
    table.writeheader()
    table.writerows(rows)


def file_facts(path: str | os.PathLike) -> dict[str, Any]:
    """The facts of a file by name; None for what is unknown."""
    return facts_columns(media_facts(path))


def _files_json(paths: Iterable[str]) -> list[dict[str, Any]]:
    return [{"path": path, **file_facts(path)} for path in paths]


# --- matches ------------------------------------------------------------------------------------


def print_matches(video: Any, matches: Sequence[Match]) -> None:
    """Print the matches of a clip; `video` has its path and seconds."""
    print(f"{printable(video.path)} ({format_time(video.seconds)})")
    if not matches:
        print("  nothing found")
    for match in matches:
        print(f"  {_match_line(match)}")
        for segment in match.segments[1:]:
            print(f"{INDENT}and {format_segment(segment)}")
        for path in match.same_content_paths:
            print(f"{INDENT}same content: {printable(path)}")


def _match_line(match):
    """Score, verdict, file, and the best segment of a match."""
    words = [f"{match.score:.3f}"]
    if match.verdict:
        words.append(match.verdict)
    words.append(f"{printable(match.path)} ({format_time(match.seconds)})")
    if match.missing:
        words.append("missing")
    words.append(format_segment(match.segments[0]))
    return "  ".join(words)


def _findings(match: Match | Link) -> dict[str, Any]:
    """What a Match or a Link says in a number and a word."""
    return {
        "score": round(match.score, 4),
        "verdict": match.verdict,
        "matched_seconds": round(match.matched_seconds, 3),
    }


def segments_json(segments: Iterable[TimeSegment]) -> list[dict[str, Any]]:
    rows = []
    for segment in segments:
        row = {
            "query": [round(segment.query_start, 3), round(segment.query_end, 3)],
            "video": [round(segment.target_start, 3), round(segment.target_end, 3)],
            "similarity": round(segment.similarity, 4),
        }
        rows.append(row)
    return rows


def matches_json(matches: Iterable[Match]) -> list[dict[str, Any]]:
    rows = []
    for match in matches:
        row = {
            **_findings(match),
            "path": match.path,
            "seconds": round(match.seconds, 3),
            "similarity": round(match.similarity, 4),
            "same_content": match.same_content_paths,
            "missing": match.missing,
            "stretches": segments_json(match.segments),
            "files": _files_json([match.path, *match.same_content_paths]),
        }
        rows.append(row)
    return rows


def query_json(video: Any, matches: Iterable[Match]) -> dict[str, Any]:
    """A clip with its matches; `video` has path, seconds and reason."""
    result = {"clip": str(video.path), "seconds": round(video.seconds, 3)}
    result["matches"] = matches_json(matches)
    if video.reason:
        result["error"] = video.reason
    return result


MATCH_COLUMNS = [
    *("clip", "rank", "score", "verdict", "matched_seconds", "path", "missing"),
    *("query_start", "query_end", "video_start", "video_end", "stretches"),
    *MediaFacts._fields,
]


def match_rows(video: Any, matches: Iterable[Match]) -> list[dict[str, Any]]:
    """Rows of CSV: one for each file of each match, with the best of its segments."""
    rows = []
    for rank, match in enumerate(matches, 1):
        row = {
            "clip": os.path.abspath(video.path),
            "rank": rank,
            **_findings(match),
            "missing": "yes" if match.missing else "no",
            "stretches": len(match.segments),
        }
        for best in match.segments[:1]:
            row["query_start"] = round(best.query_start, 3)
            row["query_end"] = round(best.query_end, 3)
            row["video_start"] = round(best.target_start, 3)
            row["video_end"] = round(best.target_end, 3)
        for path in [match.path, *match.same_content_paths]:
            rows.append({**row, "path": path, **file_facts(path)})
    return rows


# --- new files that are known -------------------------------------------------------------------


def print_known(videos: Sequence[Any]) -> None:
    """Print which files are known: KnownVideo of several.py."""
    for video in videos:
        name = f"{printable(video.path)} ({format_time(video.seconds)})"
        print(f"{video.state:7}{name}{'  same content' if video.same_content else ''}")
        for match in video.matches:
            print(f"{INDENT}{_match_line(match)}")
    counts = Counter(video.state for video in videos)
    print(
        f"{counts['known']} known, {counts['part']} known in part, {counts['look']} to look at,"
        f" {counts['new']} new"
    )


def known_json(video: Any) -> dict[str, Any]:
    return {
        "path": video.path,
        "state": video.state,
        "shares": [round(video.share(match), 3) for match in video.matches],
        "same_content": video.same_content,
        "seconds": round(video.seconds, 3),
        "file": file_facts(video.path),
        "matches": matches_json(video.matches),
        **({"error": video.reason} if video.reason else {}),
    }


KNOWN_COLUMNS = [
    *("path", "state", "same_content", "score", "verdict", "matched_seconds", "share", "match"),
    "missing",
    *MediaFacts._fields,
]


def known_row(video: Any) -> dict[str, Any]:
    """A row of CSV: a file, and the best of its matches."""
    row = {
        "path": video.path,
        "state": video.state,
        "same_content": "yes" if video.same_content else "no",
        **file_facts(video.path),
    }
    for match in video.matches[:1]:
        row |= {**_findings(match), "share": round(video.share(match), 3), "match": match.path}
        row["missing"] = "yes" if match.missing else "no"
    return row


# --- groups -------------------------------------------------------------------------------------


def print_groups(groups: Sequence[Group]) -> None:
    for i, group in enumerate(groups, 1):
        print(f"group {i}: {format_count(group)}")
        for number, paths in group.files.items():
            length = format_time(group.seconds[number])
            note = " same content" if len(paths) > 1 else ""
            for path in paths:
                print(f"  {printable(path)} ({length}){note}  {_facts_line(path)}")
        for link in group.links:
            print(f"    {_link_line(group, link)}")
        for link in group.parts:
            print(f"    part: {_link_line(group, link)}")
        if group.is_doubtful:
            print("    most of these match the first video, but not each other: look at them")
    total = sum(len(group.paths) for group in groups)
    print(f"{len(groups)} groups, {total} videos, {sum(len(g.parts) for g in groups)} parts")


def _facts_line(path):
    texts = format_facts(media_facts(path))
    names = ("picture", "codec", "bit rate", "size", "date")
    return ", ".join(texts[name] for name in names if texts[name] != UNKNOWN)


def _link_line(group, link):
    files = group.files | group.part_files
    a, b = (printable(os.path.basename(files[number][0])) for number in (link.a, link.b))
    segments = ", ".join(map(format_segment, link.segments))
    verdict = f"  {link.verdict}" if link.verdict else ""
    return f"{link.score:.3f}{verdict}  {a} ~ {b}  {segments}"


def group_json(group: Group) -> dict[str, Any]:
    videos = []
    for number, paths in group.files.items():
        seconds = round(group.seconds[number], 3)
        videos.append({"paths": paths, "seconds": seconds, "files": _files_json(paths)})
    return {
        "videos": videos,
        "links": [_link_json(group, link) for link in group.links],
        "parts": [_link_json(group, link) for link in group.parts],
        "doubtful": group.is_doubtful,
    }


def _link_json(group, link):
    files = group.files | group.part_files
    return {
        "a": files[link.a][0],
        "b": files[link.b][0],
        **_findings(link),
        "stretches": segments_json(link.segments),
    }


GROUP_COLUMNS = [
    *("group", "path", "part", "same_content", "score", "verdict", "matched_seconds", "linked_to"),
    *MediaFacts._fields,
]


def group_rows(number: int, group: Group) -> list[dict[str, Any]]:
    """Rows of CSV: one for each file of a group, with the best link of its content."""
    best: dict[int, tuple[Link, int]] = {}  # {content: (link, the other content)}
    for link in group.links + group.parts:
        best.setdefault(link.a, (link, link.b))
        best.setdefault(link.b, (link, link.a))
    rows, files = [], group.files | group.part_files
    for content, paths in files.items():
        row = {"group": number, "same_content": "yes" if len(paths) > 1 else "no"}
        row["part"] = "yes" if content in group.part_files else "no"
        if content in best:
            link, other = best[content]
            row |= {**_findings(link), "linked_to": files[other][0]}
        for path in paths:
            rows.append({**row, "path": path, **file_facts(path)})
    return rows


def print_rejected(pairs: Sequence[tuple[list[str], list[str]]], format: str) -> None:
    """Print pairs of videos that are no match, each side by its files."""
    if format == "json":
        print_json([{"a": a, "b": b} for a, b in pairs])
    elif format == "csv":
        print_csv([{"a": a[0], "b": b[0]} for a, b in pairs], ["a", "b"])
    else:
        for a, b in pairs:
            print(f"{printable(a[0])} ~ {printable(b[0])}")


# --- facts of an index --------------------------------------------------------------------------


def print_facts(facts: dict[str, Any], format: str) -> None:
    """Print {name: value}; a value may be {part: what it is}."""
    if format == "json":
        print_json(facts)
        return
    rows = []
    for name, value in facts.items():
        if isinstance(value, dict):
            value = ", ".join(f"{part} {what}" for part, what in value.items())
        rows.append({"name": name, "value": value})
    if format == "csv":
        print_csv(rows, ["name", "value"])
        return
    for row in rows:
        print(f"{row['name']:12}{utils.one_line(str(row['value']))}")
