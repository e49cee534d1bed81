"""A plan of what to keep of videos that share material, and a script that moves the rest.

A plan only says what could be done. A file is to drop if it has the content of another one of its
group, or shows the same pictures from end to end, by a certain match, as the one that is kept,
which has its sound and subtitles too (`videoindex.whole_copies`). Everything else is left to a
person. Nothing is ever deleted: the script, which its user runs, moves files into a folder.
"""

import csv
import io
import os
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from files import atomic
from utils import InputError
from videoindex.facts import MediaFacts, media_facts
from videoindex.results import Group
from videoindex.store import KnownFile
from videoindex.text import facts_columns
from videoindex.whole_copies import missing_in

KEEP, DROP, LOOK = "keep", "drop", "look"
# What makes a file the better one: {rule: its value}; the highest is kept.
RULES: dict[str, Callable[[MediaFacts], float | None]] = {
    "resolution": lambda facts: facts.width and facts.height and facts.width * facts.height,
    "bit_rate": lambda facts: facts.bit_rate,
    "size": lambda facts: facts.size,
    "longest": lambda facts: facts.seconds,
    "newest": lambda facts: facts.modified,
    "oldest": lambda facts: facts.modified and -facts.modified,
    "sound": lambda facts: facts.sound,
}
DEFAULT_RULES = ["resolution", "bit_rate", "oldest"]
SLACK = 1.5  # seconds by which lengths of one film may differ


class PlanRow(NamedTuple):
    """What to do with a file.

    group: its number, from 1
    action: KEEP, DROP or LOOK
    path: the file
    reason: why, in words
    kept: the file that stays and shows the same; "" without one
    facts: of the file
    """

    group: int
    action: str
    path: str
    reason: str
    kept: str
    facts: MediaFacts


def parse_rules(rules: Iterable[str]) -> list[str]:
    """The rules of --keep, the first first: names of RULES, and folder=FOLDER.

    Raises:
        InputError: for one that does not exist
    """
    parsed = []
    for rule in rules:
        if rule.startswith("folder="):
            parsed.append(rule)
            continue
        for name in rule.split(","):
            if name not in RULES:
                raise InputError(
                    f"--keep {name!r} is no rule; give {', '.join(RULES)} or folder=FOLDER"
                )
            parsed.append(name)
    return parsed


def make_plan(
    groups: Iterable[Group],
    rules: Sequence[str],
    known: dict[str, KnownFile],
    is_same_film: Callable[[int, int], bool],
) -> list[PlanRow]:
    """What to keep of groups of duplicates.

    The best file of a group is kept: whole files before those that end before their container says,
    the longest film before a part of it, then by the rules. Each other is to drop if the one that
    is kept lacks nothing of it, and else to look at.

    Args:
        rules: of `parse_rules`.
        known: what the index knows of its files. One that has changed since is left to a person.
        is_same_film: of two contents, see `VideoIndex.is_same_film`.
    """
    rows = []
    for number, group in enumerate(groups, 1):
        rows += _plan_group(number, group, rules, known, is_same_film)
    return rows


def _plan_group(number, group, rules, known, is_same_film):
    files = {}  # {path: (content, facts)}
    for content, paths in group.files.items():
        for path in paths:
            files[path] = content, media_facts(path)
    longest = max(group.seconds[content] for content, _ in files.values())

    def rank(path):
        """The higher, the better."""
        content, facts = files[path]
        seconds = group.seconds[content]
        is_whole = (facts.seconds or 0) <= seconds + SLACK
        return is_whole, seconds >= longest - SLACK, *_rule_values(path, facts, rules)

    rows, kept = [], None  # (content, path) of the file that is kept
    staying = {}  # {content: a file that shows the same and stays}
    for path in sorted(files, key=rank, reverse=True):
        content, facts = files[path]
        action, reason, other = KEEP, "the best of the group", ""
        if not _is_as_indexed(path, known):
            action, reason = LOOK, "it has changed since it was indexed"
        elif content in staying:
            action, reason, other = DROP, "same content", staying[content]
        elif kept:
            action, reason, other = _compare(group, path, content, *kept, is_same_film)
            staying[content] = other if action == DROP else path
        else:
            kept, staying[content] = (content, path), path
        rows.append(PlanRow(number, action, path, reason, other, facts))
    return rows


def _rule_values(path, facts, rules):
    """The higher, the better; an unknown value is the worst."""
    values = []
    for rule in rules:
        if rule.startswith("folder="):
            folder = os.path.join(os.path.abspath(rule.removeprefix("folder=")), "")
            values.append(float(path.startswith(folder)))
        else:
            value = RULES[rule](facts)
            values.append(float("-inf") if value is None else float(value))
    return values


def _is_as_indexed(path, known):
    try:
        facts = os.stat(path)
    except OSError:
        return False
    return path in known and known[path].unchanged(facts.st_size, facts.st_mtime_ns)


def _compare(group, path, content, kept_content, kept, is_same_film):
    """(action, reason, file) for a file, given the one that is kept."""
    if is_same_film(content, kept_content):
        if missing := missing_in(kept, path):
            return LOOK, f"the same film, but it has {missing}", kept
        return DROP, "the same film, frame by frame", kept
    for link in group.links:
        if {link.a, link.b} == {content, kept_content}:
            word = link.verdict or "a match"
            return LOOK, f"{word}, but not the same film from end to end", kept
    return LOOK, "not the same film from end to end", ""


# --- files --------------------------------------------------------------------------------------

COLUMNS = ["group", "action", "path", "reason", "kept", *MediaFacts._fields]


def write_plan(path: str | os.PathLike, rows: Iterable[PlanRow]) -> None:
    """Write a plan as CSV. Names that are not UTF-8 keep their bytes."""
    text = io.StringIO()
    table = csv.writer(text)
    table.writerow(COLUMNS)
    for row in rows:
        table.writerow([*row[:-1], *facts_columns(row.facts).values()])
    with atomic(path) as temporary:
        temporary.write_bytes(text.getvalue().encode("utf-8", "surrogateescape"))


def plan_summary(rows: Sequence[PlanRow]) -> str:
    """How many files are to keep, to drop and to look at, and the bytes of those to drop."""
    counts = Counter(row.action for row in rows)
    size = sum(row.facts.size or 0 for row in rows if row.action == DROP)
    return (
        f"{counts[KEEP]} to keep, {counts[DROP]} to drop ({size / 1e6:.1f} MB),"
        f" {counts[LOOK]} to look at"
    )


SCRIPT = """#!/bin/sh
# Moves the files that a plan of search.py drops; nothing is deleted, and nothing overwritten.
# A file stays where it is if the file that is kept in its place has gone, or has another size.
set -eu
moved=0

# move FILE FOLDER NAME [KEPT SIZE]
move() {
    if [ $# -gt 3 ] && [ ! -f "$4" ]; then
        printf 'stays, for what would be kept has gone: %s\\n' "$1" >&2
    elif [ $# -gt 3 ] && ! [ "$(wc -c < "$4")" -eq "$5" ]; then
        printf 'stays, for what would be kept has changed: %s\\n' "$1" >&2
    elif [ ! -f "$1" ]; then
        printf 'has gone: %s\\n' "$1" >&2
    elif [ -e "$2/$3" ]; then
        printf 'stays, for there is one of its name: %s\\n' "$2/$3" >&2
    else
        mkdir -p -- "$2"
        mv -n -- "$1" "$2/$3"
        moved=$((moved + 1))
    fi
}

"""


def write_script(path: str | os.PathLike, rows: Iterable[PlanRow], folder: str) -> int:
    """Write a shell script that moves the files to drop into `folder`; the number of files.

    There they keep their whole path, so that names do not clash and they can be moved back.
    """
    rows, lines = list(rows), []
    sizes = {row.path: row.facts.size for row in rows}
    for row in rows:
        if row.action == DROP:
            target, name = os.path.split(os.path.abspath(row.path).lstrip("/"))
            words = [row.path, os.path.join(os.path.abspath(folder), target), name]
            if row.kept:
                words += [row.kept, str(sizes[row.kept])]
            lines.append(" ".join(["move", *map(shlex.quote, words)]))
    lines.append(f'echo "$moved of {len(lines)} files moved"')
    text = SCRIPT + "".join(f"{line}\n" for line in lines)
    with atomic(path) as temporary:
        temporary.write_bytes(text.encode("utf-8", "surrogateescape"))
    return len(lines) - 1
