"""Files of other systems: tables of similarities."""

import json
from pathlib import Path

from datasets.evaluation_set import positions_by_id
from untrusted import read_json
from utils import InputError


def read_similarities(path: str | Path) -> dict[str, dict[str, float]]:
    """Read {query: {video: similarity}} from a JSON file, as any system may write it.

    Ids that are not in a set are allowed (`EvaluationSet.count_unknown_ids` counts them).

    Raises:
        InputError: an id is given twice, a row is not an object, a similarity is not a number, or
            there is no query; the message names the file and the query
    """
    hook = {"object_pairs_hook": _without_repeated_ids, "parse_int": float}
    try:
        table = read_json(path, "similarity file", **hook)
        _check_similarities(table)
    except InputError as error:
        if str(error).startswith("similarity file"):
            raise
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
