"""FIVR."""

import json
from pathlib import Path

from datasets.evaluation_set import EvaluationSet, annotation_form
from utils import InputError, load_pickle, require_path


class FIVR(EvaluationSet):
    """FIVR (Kordopatis-Zilos et al., 2019), scored as its official evaluator does; annotation {query: {label: [ids]}}.

    Figures DSVR (the labels ND and DS are relevant), CSVR (also CS), ISVR (also IS): the mean AP. A query that stands in its
    own label list and in the database is not ranked but stays in that list's count, as in the official code, so a perfect
    ranking of FIVR-5K scores ISVR .99971. (The official script ranks a query for itself where a result file lists it; the
    evaluators of ViSiL, DnS and TCA never do, nor does this one.)
    """

    TASKS = {"DSVR": ("ND", "DS"), "CSVR": ("ND", "DS", "CS"), "ISVR": ("ND", "DS", "CS", "IS")}

    def __init__(self, queries, database, annotation, source):
        super().__init__(queries, database, source)
        with annotation_form(source, "FIVR's form {query: {label: [ids]}}"):
            self._judgements = [
                {
                    task: self._judgement(
                        set().union(*(annotation[query].get(label, ()) for label in labels))
                    )
                    for task, labels in self.TASKS.items()
                }
                for query in self.queries
            ]


def _read_json(path):
    try:
        value = json.loads(require_path(path, "annotation file").read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError(f"a {type(value).__name__}, not an object")
        return value
    except ValueError as error:
        raise InputError(
            f"annotation file {str(path)!r} is not of FIVR's form ({error}); fetch it again"
        ) from None


def load_listed_set(directory, name, ids):
    """A set of two files: NAME, the labels by query, and IDS, the database's ids, one a line."""
    path = Path(directory) / name
    annotation = _read_json(path)
    try:
        database = (
            require_path(Path(directory) / ids, "id list").read_text(encoding="utf-8").split()
        )
    except UnicodeDecodeError as error:
        raise InputError(
            f"id list {str(Path(directory) / ids)!r} is not UTF-8 text ({error}); fetch it again"
        ) from None
    return FIVR(annotation, database, annotation, f"annotation {path.name!r}")


def load_fivr_5k(directory):
    """FIVR-5K: ids from the ViSiL/DnS pickle; labels from the official JSON where it is there, else from the pickle."""
    path, official = Path(directory) / "fivr.pickle", Path(directory) / "fivr_annotation.json"
    pickled = load_pickle(path)
    with annotation_form(f"annotation file {str(path)!r}", "the form of the ViSiL/DnS fivr.pickle"):
        ids, annotation = pickled["5k"], pickled["annotation"]
        queries, database = (
            list(ids["queries"]),
            sorted(ids["database"]),
        )  # a set there: sort for a stable tie order
    if official.exists():
        return FIVR(
            queries, database, _read_json(official), f"annotation {official.name!r} (official)"
        )
    return FIVR(
        queries, database, annotation, f"annotation inside {path.name!r}, official JSON not there"
    )
