"""Evaluation sets: queries, a database, and the protocol that turns similarities into the set's figures.

A set knows nothing of models: it scores `{query: {video: similarity}}` from wherever it comes.
"""

import json
import os
from pathlib import Path

import numpy as np

from utils import InputError, existing, load_pickle

ANNOTATION_DIR = os.environ.get("TCA_ANNOTATIONS", str(Path(__file__).resolve().parent / "datasets" / "annotations"))


def average_precision(hits, relevant):
    """AP of one ranking: hits (N,) bool from the first rank on; relevant: how many videos should have been found.

    AP = sum over hits of (hits up to here / rank) / relevant; a relevant video that is not ranked counts as never found.
    """
    ranks = np.flatnonzero(hits) + 1
    return float((np.arange(1, len(ranks) + 1) / ranks).sum() / relevant)


class FIVR:
    """An evaluation set in FIVR's form (Kordopatis-Zilos et al., 2019), scored as its official evaluator does.

    DSVR counts the labels ND and DS as relevant, CSVR also CS, ISVR also IS. The query is left out of its own ranking; only
    videos that have features are ranked and counted; a query with nothing relevant left is skipped (see `coverage`); the
    figure is the mean AP of the rest. Ties rank by similarity descending, then in database order. A query that stands in its
    own label list stays in that list's count, as in the official code.

    queries, database: lists of ids. annotation: {query: {label: [ids]}}. source: which annotation this is, for the record.
    """

    TASKS = {"DSVR": ("ND", "DS"), "CSVR": ("ND", "DS", "CS"), "ISVR": ("ND", "DS", "CS", "IS")}

    def __init__(self, queries, database, annotation, source):
        self.queries, self.database, self.source = list(queries), list(database), source
        self._place = {video: place for place, video in enumerate(self.database)}
        try:
            self._relevant = {
                query: {
                    task: set().union(*(annotation[query].get(label, ()) for label in labels))
                    for task, labels in self.TASKS.items()
                }
                for query in self.queries
            }
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{source} is not of FIVR's form {{query: {{label: [ids]}}}}: {error!r}") from None

    def evaluate(self, similarities, available=None):
        """similarities: {query: {video: similarity}}; available: the ids that have features, by default every id in the table.

        Returns {"DSVR": mAP, "CSVR": mAP, "ISVR": mAP}. InputError when no query can be scored or a similarity is not finite.
        """
        if available is None:
            available = set(similarities).union(*similarities.values())
        rows = ((query, list(row), np.fromiter(row.values(), float, len(row))) for query, row in similarities.items())
        return self._figures(rows, set(available))

    def evaluate_table(self, queries, videos, table):
        """The same for a table (Q, N) of similarities between the ids `queries` and `videos`, all of which have features."""
        return self._figures(((query, videos, row) for query, row in zip(queries, table, strict=True)), {*queries, *videos})

    def _figures(self, rows, available):
        found = {task: [] for task in self.TASKS}
        for query, videos, similarities in rows:
            if query not in self._relevant:
                continue
            if not np.isfinite(similarities).all():
                raise InputError(f"query {query!r}: similarities hold NaN or infinity; no figure can come of them")
            ranked = self._rank(query, videos, similarities, available)
            for task, relevant in self._relevant[query].items():
                relevant = relevant & available
                if relevant:
                    hits = np.fromiter((video in relevant for video in ranked), bool, len(ranked))
                    found[task].append(average_precision(hits, len(relevant)))
        if not found["ISVR"]:
            raise InputError(f"none of the {len(self.queries)} queries can be scored; do the table's ids fit {self.source}?")
        return {task: float(np.mean(values)) if values else float("nan") for task, values in found.items()}

    def _rank(self, query, videos, similarities, available):
        """The ids that count, best first."""
        usable = [i for i, video in enumerate(videos) if video != query and video in self._place and video in available]
        place = np.fromiter((self._place[videos[i]] for i in usable), int, len(usable))
        return [videos[usable[i]] for i in np.lexsort((place, -similarities[usable]))]

    def coverage(self, available):
        """How much of the set has features: queries and videos present and missing, queries with nothing relevant a task."""
        available = set(available) & {*self.queries, *self.database}
        queries = [query for query in self.queries if query in available]
        videos = sum(video in available for video in self.database)
        empty = {task: sum(not self._relevant[query][task] & available for query in queries) for task in self.TASKS}
        return {
            "queries": len(queries),
            "queries_missing": len(self.queries) - len(queries),
            "videos": videos,
            "videos_missing": len(self.database) - videos,
            "queries_without_relevant": empty,
        }


def _read_json(path):
    try:
        value = json.loads(existing(path, "annotation file").read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError(f"a {type(value).__name__}, not an object")
        return value
    except ValueError as error:
        raise InputError(f"annotation file {str(path)!r} is not of FIVR's form ({error}); fetch it again") from None


def _listed_set(directory, name, ids):
    """A set of two files: NAME, the labels by query, and IDS, the database's ids, one a line."""
    path = Path(directory) / name
    annotation = _read_json(path)
    try:
        database = existing(Path(directory) / ids, "id list").read_text(encoding="utf-8").split()
    except UnicodeDecodeError as error:
        raise InputError(f"id list {str(Path(directory) / ids)!r} is not UTF-8 text ({error}); fetch it again") from None
    return FIVR(annotation, database, annotation, f"annotation {path.name!r}")


def _fivr_5k(directory):
    """FIVR-5K: ids from the ViSiL/DnS pickle; labels from the official JSON where it is there, else from the pickle."""
    path, official = Path(directory) / "fivr.pickle", Path(directory) / "fivr_annotation.json"
    pickled = load_pickle(path)
    try:
        ids, annotation = pickled["5k"], pickled["annotation"]
        queries, database = list(ids["queries"]), sorted(ids["database"])  # a set there: sort for a stable tie order
    except (KeyError, TypeError) as error:
        raise InputError(
            f"annotation file {str(path)!r} is not the ViSiL/DnS fivr.pickle (no {error}); fetch it again"
        ) from None
    if official.exists():
        return FIVR(queries, database, _read_json(official), f"annotation {official.name!r} (official)")
    return FIVR(queries, database, annotation, f"annotation inside {path.name!r}, official JSON not there")


EVALUATION_SETS = {
    "FIVR-5K": _fivr_5k,
    "FIVR-200K": lambda directory: _listed_set(directory, "fivr_annotation.json", "fivr_youtube_ids.txt"),
    "DEMO": lambda directory: _listed_set(directory, "demo.json", "demo_ids.txt"),
    "DEMO-VAL": lambda directory: _listed_set(directory, "demo_val.json", "demo_val_ids.txt"),
}


def evaluation_set(name, directory=ANNOTATION_DIR):
    """The evaluation set `name` from the annotation files in `directory`."""
    if name not in EVALUATION_SETS:
        raise InputError(f"dataset {name!r} is not known; choose from {', '.join(EVALUATION_SETS)}")
    return EVALUATION_SETS[name](existing(directory, "annotation folder"))
