"""The choices that a person made on the page of `--report`, saved by it as choices.json.

{"keep": [path], "drop": [path], "not_a_match": [[path, path]]}
"""

import os
from collections.abc import Mapping
from typing import NamedTuple, NoReturn

from untrusted import is_object, read_json
from utils import InputError
from videoindex.facts import media_facts
from videoindex.moves import distinct_files
from videoindex.plan import DROP, KEEP, LOOK, PlanRow
from videoindex.store import KnownFile

FIELDS = ("keep", "drop", "not_a_match")


class Choices(NamedTuple):
    """keep, drop: absolute paths; not_a_match: pairs of them."""

    keep: list[str]
    drop: list[str]
    not_a_match: list[tuple[str, str]]


def read_choices(path: str | os.PathLike) -> Choices:
    """The choices in a file that anybody may have written.

    Raises:
        InputError: it is not as above, or a file is both to keep and to drop
    """
    advice = "save it again with `Save choices` on the page of --report"

    def refuse(reason) -> NoReturn:
        raise InputError(f"choices {str(path)!r}: {reason}; {advice}")

    value = read_json(path, "choices", advice)
    if not is_object(value, list) or not set(value) <= set(FIELDS):
        refuse(f"it must be an object with the lists {', '.join(FIELDS)}")
    keep, drop, pairs = (value.get(name, []) for name in FIELDS)
    if not all(map(_is_path, keep + drop)):
        refuse("keep and drop must be lists of absolute paths")
    for pair in pairs:
        if not isinstance(pair, list) or len(pair) != 2 or not all(map(_is_path, pair)):
            refuse("not_a_match must be a list of pairs of absolute paths")
    both = sorted(set(keep) & set(drop))
    if both:
        refuse(f"{both[0]!r} is both to keep and to drop")
    keep, drop = list(dict.fromkeys(keep)), list(dict.fromkeys(drop))
    return Choices(keep, drop, list(map(tuple, pairs)))


def _is_path(value):
    if not isinstance(value, str) or not os.path.isabs(value) or "\0" in value:
        return False
    try:
        os.fsencode(value)
    except UnicodeError:
        return False
    return True


def chosen_plan(choices: Choices, known: Mapping[str, KnownFile]) -> list[PlanRow]:
    """The plan that a person chose.

    Files that the index does not know are not to be moved, and of a content that several files have
    one stays.
    """
    rows, files = [], {}  # {content: its files that exist}
    chosen = {known[path].content for path in choices.drop if path in known}
    for path, file in known.items():
        if file.content in chosen:
            files.setdefault(file.content, []).append(path)
    files = {content: distinct_files(paths) for content, paths in files.items()}
    staying = {content: set(paths) - set(choices.drop) for content, paths in files.items()}
    for action, paths in ((KEEP, choices.keep), (DROP, choices.drop)):
        for path in paths:
            facts = media_facts(path)
            content = known[path].content if path in known else None
            if action == DROP and len(files.get(content, ())) > 1 and not staying[content]:
                staying[content] = {path}
                reason = "chosen to drop, as were all files of its content"
                rows.append(PlanRow(1, LOOK, path, reason, "", facts))
            elif path in known:
                rows.append(PlanRow(1, action, path, "chosen", "", facts))
            else:
                reason = f"chosen to {action}, but it is not in the index"
                rows.append(PlanRow(1, LOOK, path, reason, "", facts))
    return rows
