"""EVVE: its two means by hand, and the official annotation."""

import pickle

import numpy as np
import pytest
from helpers.sets import as_dict, evve_case, table_by_worth

from datasets.evve import EVVE
from datasets.registry import load_evaluation_set


def test_means_over_queries_and_over_events_differ():
    annotation = {"a": ({"q1", "q2", "q3"}, {"x"}, set()), "b": ({"q4"}, {"y"}, {"z"})}
    evve = EVVE(["q1", "q2", "q3", "q4"], ["x", "y", "z"], annotation, "x")
    good = {"x": 0.9, "y": 0.2, "z": 0.1}
    bad = {"x": 0.5, "y": 0.2, "z": 0.9}  # z is null for event b: y is second of two
    metrics = evve.evaluate({"q1": good, "q2": good, "q3": good, "q4": bad})
    expected = {"mAP": (3 + 0.25) / 4, "mAP_events": (1 + 0.25) / 2, "a": 1, "b": 0.25}
    assert metrics == pytest.approx(expected)


def test_event_without_scored_queries_is_nan_and_not_in_the_mean():
    annotation = {"a": ({"q1"}, {"x"}, set()), "b": ({"q2"}, {"y"}, set())}
    evve = EVVE(["q1", "q2"], ["x", "y"], annotation, "x")
    metrics = evve.evaluate({"q1": {"x": 0.9, "y": 0.1}}, available=["q1", "x", "y"])
    assert (metrics["mAP"], metrics["mAP_events"], metrics["a"]) == (1, 1, 1)
    assert np.isnan(metrics["b"])


def test_official_evve(annotations):
    evve = load_evaluation_set("EVVE", annotations)
    assert (len(evve.queries), len(evve.database), len(evve.events)) == (620, 2373, 13)
    with open(annotations / "evve.pickle", "rb") as file:
        case = evve_case(data=pickle.load(file, encoding="latin1"))
    perfect = table_by_worth(case)
    metrics = evve.evaluate_table(evve.queries, evve.database, perfect)
    assert set(metrics.values()) == {1.0}
    rng = np.random.default_rng(0)
    table = np.round(perfect + rng.normal(size=perfect.shape), 1).astype(np.float32)  # with ties
    similarities = as_dict(evve.queries, evve.database, table)
    expected = case.by_loop(similarities, {*evve.queries, *evve.database})
    metrics = evve.evaluate_table(evve.queries, evve.database, table)
    assert list(metrics)[:2] == ["mAP", "mAP_events"] and len(metrics) == 15
    assert metrics == pytest.approx(expected, abs=1e-12)
