"""Names, times and facts of videos as text, in tables and pages."""

import os
import time
from typing import Any

from utils import one_line
from videoindex.facts import MediaFacts
from videoindex.results import Group, TimeSegment

UNKNOWN = "–"
FACTS = ("size", "picture", "codec", "bit rate", "length", "date", "sound")


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


def format_span(start: float, end: float) -> str:
    """A stretch of time as 0:12–0:31; with tenths if it would be empty without."""
    first, last = format_time(round(start)), format_time(round(end))
    if first == last:
        return f"{format_time(start)}–{format_time(end)}"
    return f"{first.partition('.')[0]}–{last.partition('.')[0]}"


def format_segment(segment: TimeSegment) -> str:
    """A segment as 0:01.0–0:06.0 = 0:04.0–0:09.0, the query's time first."""
    query = f"{format_time(segment.query_start)}–{format_time(segment.query_end)}"
    target = f"{format_time(segment.target_start)}–{format_time(segment.target_end)}"
    return f"{query} = {target}"


def facts_columns(facts: MediaFacts) -> dict[str, Any]:
    """The facts of a file by name, its date as ISO 8601 in UTC; None for what is unknown."""
    columns = facts._asdict()
    if facts.modified is not None:
        columns["modified"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(facts.modified))
    return columns


def format_facts(facts: MediaFacts) -> dict[str, str]:
    """{name: text} of a file's facts; those that are unknown are a dash."""
    texts = dict.fromkeys(FACTS, UNKNOWN)
    if facts.size is not None:
        texts["size"] = _with_unit(facts.size, "B")
    if facts.width and facts.height:
        texts["picture"] = f"{facts.width} × {facts.height}"
    if facts.codec:
        texts["codec"] = one_line(facts.codec)
    if facts.bit_rate:
        texts["bit rate"] = _with_unit(facts.bit_rate, "bit/s")
    if facts.seconds:
        texts["length"] = format_time(facts.seconds)
    if facts.sound is not None:
        texts["sound"] = "no sound" if not facts.sound else "sound"
        if facts.sound > 1:
            texts["sound"] = f"{facts.sound} sound tracks"
    if facts.modified is not None:
        texts["date"] = time.strftime("%Y-%m-%d %H:%M", time.localtime(facts.modified))
    return texts


def format_count(group: Group) -> str:
    """How many videos a group has, and parts of them."""
    count, parts = len(group.paths), len(group.parts)
    words = f"{count} video{'s' if count > 1 else ''}"
    if not parts:
        return words
    return f"{words}, {parts} part{'s' if parts > 1 else ''} of {'them' if count > 1 else 'it'}"


def _with_unit(value, unit):
    """A number to three digits, as 12.3 MB."""
    prefixes = ["", "k", "M", "G", "T"]
    while value >= 999.5 and len(prefixes) > 1:
        value /= 1000
        prefixes.pop(0)
    digits = 0 if value >= 99.95 or not prefixes[0] else 1 if value >= 9.995 else 2
    return f"{value:.{digits}f} {prefixes[0]}{unit}"
