"""Files of other systems: a table of similarities, and a list of ids."""

import json
from pathlib import Path

from datasets.evaluation_set import positions_by_id
from utils import InputError, require_path


def read_similarities(path: str | Path) -> dict[str, dict[str, float]]:
    """Read {query: {video: similarity}} from a JSON file, as any system may write it.

    Ids that are not in a set are allowed (`EvaluationSet.count_unknown_ids` counts them).

    Raises:
        InputError: an id is given twice, a row is not an object, a similarity is not a number, or
            there is no query; the message names the file and the query
    """
    path = require_path(path, "similarity file")
    try:
        text = path.read_text(encoding="utf-8")
        table = json.loads(text, object_pairs_hook=_without_repeated_ids, parse_int=float)
        _check_similarities(table)
    except (ValueError, RecursionError) as error:  # not JSON, or not UTF-8
        raise InputError(
            f"similarity file {str(path)!r} is not JSON ({error}); is it complete?"
        ) from None
    except InputError as error:
        raise InputError(f"similarity file {str(path)!r}: {error}") from None
    return table


def _without_repeated_ids(pairs):
    row = dict(pairs)
    if len(row) < len(pairs):
        positions_by_id([name for name, _ in pairs], "id")  # raises, with the id
    return row


def _check_similarities(table):
    if not isinstance(table, dict):
        raise InputError(
            f"a {type(table).__name__} where {{query: {{video: similarity}}}} was expected"
        )
    if not table:
        raise InputError("it has no query, so nothing can be scored")
    for query, row in table.items():
        if not isinstance(row, dict):
            raise InputError(
                f"query {query!r} has a {type(row).__name__}"
                " where {video: similarity} was expected"
            )
        for video, value in row.items():
            if type(value) is not float:
                shown = json.dumps(value)[:40]
                raise InputError(f"query {query!r}, video {video!r}: {shown} is not a number")


def read_ids(path: str | Path, what: str = "id list") -> list[str]:
    """The ids of a text file, one a line. Empty lines are skipped.

    Raises:
        InputError: the file is absent, is not UTF-8 text, or has no id
    """
    path = require_path(path, what)
    try:
        # Not str.splitlines, which also splits at separators that an id may hold.
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{what} {str(path)!r} is not UTF-8 text ({error}); it must have an id a line"
        ) from None
    ids = [line.strip(" \t\r") for line in lines if line.strip(" \t\r")]
    if not ids:
        raise InputError(f"{what} {str(path)!r} is empty; it must have an id a line")
    return ids
