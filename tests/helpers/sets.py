"""A small evaluation set of every protocol, with its loops, and tables of similarities."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np

from datasets.cc_web_video import CCWebVideo
from datasets.evaluation_set import EvaluationSet
from datasets.evve import EVVE
from datasets.fivr import FIVR
from datasets.vcdb import VCDB
from helpers.oracles import cc_web_by_loop, evve_by_loop, fivr_by_loop, vcdb_by_loop
from helpers.worlds import make_cc_web, make_evve, make_vcdb


class Case(NamedTuple):
    """A set under test.

    by_loop: (similarities, ids with features) -> {name: value}
    worth: (query, video) -> number, highest for the videos to find first
    """

    set: EvaluationSet
    by_loop: Callable
    worth: Callable


def make_fivr(seed=0, Q=8, N=60):
    """Queries, database and annotation in FIVR's form, with its oddities.

    Labels are missing, a label has no meaning, a query is in its own list, two queries are in the
    database, and a relevant video is not in it.
    """
    rng = np.random.default_rng(seed)
    database = [f"v{i}" for i in rng.permutation(N)] + ["q0", "q1"]
    annotation = {}
    for q in range(Q):
        videos = rng.permutation(N)[: rng.integers(1, 30)].tolist()
        labels = ["ND", "DS", "CS", "IS", "DA"][: rng.integers(3, 6)]
        annotation[f"q{q}"] = {}
        for k, label in enumerate(labels):
            annotation[f"q{q}"][label] = [f"v{i}" for i in videos[k :: len(labels)]]
    annotation["q0"].setdefault("IS", []).append("q0")
    annotation["q2"]["ND"].append("never crawled")
    return list(annotation), database, annotation


def fivr_case(rng):
    queries, database, annotation = make_fivr(int(rng.integers(1000)))
    ranks = {"ND": 4, "DS": 4, "CS": 3, "IS": 2}

    def loop(similarities, available):
        return fivr_by_loop(similarities, annotation, database, available)

    def worth(query, video):
        labels = [label for label in ranks if video in annotation[query].get(label, [])]
        return ranks[labels[-1]] if labels else 0

    return Case(FIVR(queries, database, annotation, "made up"), loop, worth)


def cc_web_case(rng=None, data=None):
    data = data or make_cc_web(rng)
    index = data.get("vid2index") or data["index"]
    parts = [data[key] for key in ("queries", "ground_truth", "excluded")]
    labels = dict(zip(data["queries"], data["ground_truth"], strict=True))

    def worth(query, video):
        return labels[query].get(index[video], "X") in "ESLMV"

    return Case(CCWebVideo(index, *parts, "made up"), partial(cc_web_by_loop, data), worth)


def evve_case(rng=None, data=None):
    data = data or make_evve(rng)
    positives = {}
    for queries, of_event, _ in data["annotation"].values():
        positives.update(dict.fromkeys(queries, of_event))

    def worth(query, video):
        return video in positives[query]

    evve = EVVE(data["queries"], data["database"], data["annotation"], "made up")
    return Case(evve, partial(evve_by_loop, data), worth)


def vcdb_case(rng=None, data=None):
    data = data or make_vcdb(rng)
    pairs = {frozenset(pair["videos"]) for pair in data["video_pairs"]}

    def worth(query, video):
        return frozenset((query, video)) in pairs

    vcdb = VCDB(data["video_pairs"], data["index"], "made up")
    return Case(vcdb, partial(vcdb_by_loop, data), worth)


CASES = {"FIVR": fivr_case, "CC_WEB_VIDEO": cc_web_case, "EVVE": evve_case, "VCDB": vcdb_case}


# --- tables of similarities ---------------------------------------------------------------------


def random_table(rng, queries, videos, ties=False):
    """(Q, N) float32."""
    values = rng.normal(size=(len(queries), len(videos))).astype(np.float32)
    return np.round(values) if ties else values


def table_by_worth(case, sign=1):
    """The table (Q, N) that ranks the database of a case perfectly, or in reverse for sign -1."""
    table = [
        [sign * case.worth(query, video) for video in case.set.database]
        for query in case.set.queries
    ]
    return np.array(table, np.float32)


def as_dict(queries, videos, table):
    """{query: {video: similarity}}"""
    similarities = {}
    for query, row in zip(queries, table, strict=True):
        similarities[query] = dict(zip(videos, map(float, row), strict=True))
    return similarities
