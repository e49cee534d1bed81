"""FIVR-5K and FIVR-200K, and any set in FIVR's form (the demo's)."""

import json
from pathlib import Path

from datasets.evaluation_set import EvaluationSet, Judgement, annotation_errors
from datasets.similarity_files import read_ids
from untrusted import load_pickle
from utils import require_path

FORM = "FIVR's form {query: {label: [ids]}}"


class FIVR(EvaluationSet):
    """FIVR (Kordopatis-Zilos et al., 2019), scored as its official evaluator does.

    Metrics: the mean AP of three tasks, which differ in the labels that count as relevant.

        DSVR   duplicate scenes        ND, DS
        CSVR   complementary scenes    ND, DS, CS
        ISVR   incident scenes         ND, DS, CS, IS

    A query that is in its own label list and in the database is not ranked, but it stays in the
    count of that list, as in the official code. So a perfect ranking of FIVR-5K has ISVR .99971.
    (The official script does rank a query for itself if a result file lists it. The evaluators of
    ViSiL, DnS and TCA never do, and neither does this one.)

    Args:
        annotation: {query: {label: [ids]}}
    """

    TASKS = {"DSVR": ("ND", "DS"), "CSVR": ("ND", "DS", "CS"), "ISVR": ("ND", "DS", "CS", "IS")}

    def __init__(self, queries, database, annotation, source):
        super().__init__(queries, database, source)
        for query in self.queries:
            tasks = {}
            for task, labels in self.TASKS.items():
                relevant = set()
                for label in labels:
                    relevant.update(annotation[query].get(label, ()))
                tasks[task] = Judgement(self.positions_of(relevant))
            self.judgements.append(tasks)


def load_fivr(directory: str | Path, labels: str, ids: str) -> FIVR:
    """A set of two files: the labels of each query as JSON, and the database, one id per line."""
    labels, ids = Path(directory) / labels, Path(directory) / ids
    annotation = _read_labels(labels)
    database = read_ids(ids)
    with annotation_errors(labels, FORM):
        return FIVR(annotation, database, annotation, f"annotation {labels.name!r}")


def load_fivr_5k(directory: str | Path) -> FIVR:
    """FIVR-5K: the ids are in the pickle of ViSiL and DnS, the labels in the official JSON.

    Without the official JSON, the labels of the pickle are used, and `source` names it.
    """
    path = Path(directory) / "fivr.pickle"
    data = load_pickle(path)
    with annotation_errors(path, "the form of fivr.pickle (ViSiL, DnS)"):
        queries = list(data["5k"]["queries"])
        database = sorted(data["5k"]["database"])  # a set there; sorted, so that ties have an order
        annotation = data["annotation"]

    official = Path(directory) / "fivr_annotation.json"
    if official.exists():
        with annotation_errors(official, FORM):
            source = f"annotation {official.name!r} (official)"
            return FIVR(queries, database, _read_labels(official), source)
    with annotation_errors(path, FORM):
        source = f"annotation inside {path.name!r}, official JSON not there"
        return FIVR(queries, database, annotation, source)


def _read_labels(path):
    text = require_path(path, "annotation file").read_bytes()
    with annotation_errors(path, FORM):
        annotation = json.loads(text.decode("utf-8"))
        if not isinstance(annotation, dict):
            raise ValueError(f"a {type(annotation).__name__}, not an object")
        return annotation
