"""VCDB as a retrieval set: by hand, and the official annotation."""

import pickle

import numpy as np
import pytest
from helpers.oracles import ap_of_hits, mean

from datasets.registry import load_evaluation_set
from datasets.vcdb import VCDB


def test_query_is_neither_ranked_nor_counted():
    pairs = [{"videos": ["a", "b"]}, {"videos": ["a", "c"]}, {"videos": ["a", "a"]}]
    vcdb = VCDB(pairs, ["a", "b", "c", "d", "d"], "x")
    assert (vcdb.queries, vcdb.database) == (["a", "b", "c"], ["a", "b", "c", "d"])
    similarities = np.array([[1.0, 0.9, 0.7, 0.8]])
    metrics = vcdb.evaluate_table(["a"], vcdb.database, similarities)  # ranks b, d, c
    assert metrics == {"mAP": pytest.approx((1 + 2 / 3) / 2)}


def test_official_vcdb(annotations):
    vcdb = load_evaluation_set("VCDB", annotations)
    with open(annotations / "vcdb.pickle", "rb") as file:
        data = pickle.load(file, encoding="latin1")
    assert vcdb.queries == data["index"][:528] and len(vcdb.database) == 100_306
    partners = {query: set() for query in vcdb.queries}
    for pair in data["video_pairs"]:
        first, second = pair["videos"]
        partners[first].add(second)
        partners[second].add(first)

    # The released evaluator's ceiling, as published: it counts the query and does not rank it.
    ceiling = mean([len(of_query) / (len(of_query) + 1) for of_query in partners.values()])
    assert ceiling == pytest.approx(0.9305, abs=5e-5)

    videos = vcdb.database[:2000]
    table = [[video in partners[query] for video in videos] for query in vcdb.queries]
    table = np.array(table, np.float32)
    table += 2 * np.eye(*table.shape, dtype=np.float32)  # each query is most similar to itself
    assert vcdb.evaluate_table(vcdb.queries, videos, table) == {"mAP": 1.0}

    rng = np.random.default_rng(0)
    table = np.round(table + rng.normal(size=table.shape), 1).astype(np.float32)[::16]
    queries, values = vcdb.queries[::16], []
    for query, row in zip(queries, table, strict=True):
        ranked = [videos[j] for j in sorted(range(len(videos)), key=lambda j, row=row: -row[j])]
        hits = [video in partners[query] for video in ranked if video != query]
        values.append(ap_of_hits(hits, len(partners[query])))
    metrics = vcdb.evaluate_table(queries, videos, table)
    assert metrics["mAP"] == pytest.approx(mean(values), abs=1e-12)
