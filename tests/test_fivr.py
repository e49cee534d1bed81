"""FIVR: its three tasks by hand, its files, and the official annotation."""

import json
import pickle

import numpy as np
import pytest
from helpers.feature_files import write_pickle
from helpers.oracles import TASKS, fivr_by_loop
from helpers.sets import as_dict, make_fivr
from helpers.worlds import write_set

from datasets.fivr import FIVR
from datasets.registry import load_evaluation_set
from utils import InputError

# --- the protocol -------------------------------------------------------------------------------


def test_perfect_and_reversed_rankings_worked_by_hand():
    annotation = {"q": {"ND": ["a"], "DS": ["b"], "CS": ["c"], "IS": ["d"]}}
    fivr = FIVR(["q"], list("abcde"), annotation, "x")
    perfect = {"q": dict(zip("abcde", [5, 4, 3, 2, 1], strict=True))}
    assert fivr.evaluate(perfect) == dict.fromkeys(TASKS, 1)
    reverse = {"q": dict(zip("abcde", [1, 2, 3, 4, 5], strict=True))}
    metrics = fivr.evaluate(reverse)  # ranks e d c b a
    assert metrics["DSVR"] == pytest.approx((1 / 4 + 2 / 5) / 2)
    assert metrics["CSVR"] == pytest.approx((1 / 3 + 2 / 4 + 3 / 5) / 3)
    assert metrics["ISVR"] == pytest.approx((1 / 2 + 2 / 3 + 3 / 4 + 4 / 5) / 4)


def test_query_is_not_ranked_and_stays_in_the_count_of_its_own_list():
    fivr = FIVR(["q"], ["q", "a", "b"], {"q": {"ND": ["a"], "IS": ["q"]}}, "x")
    metrics = fivr.evaluate({"q": {"q": 1.0, "a": 0.9, "b": 0.1}})
    assert metrics == {"DSVR": 1.0, "CSVR": 1.0, "ISVR": 0.5}  # as the official code


# --- files --------------------------------------------------------------------------------------


def test_labels_and_ids_are_read(tmp_path):
    queries, database, annotation = make_fivr()
    for stem in ("demo", "demo_val"):
        write_set(tmp_path, stem, annotation, database)
    (tmp_path / "fivr_annotation.json").write_text(json.dumps(annotation))
    (tmp_path / "fivr_youtube_ids.txt").write_text("\n".join(database))
    for name in ("DEMO", "DEMO-VAL", "FIVR-200K"):
        fivr = load_evaluation_set(name, tmp_path)
        assert (fivr.queries, fivr.database) == (queries, database)


def test_fivr_5k_prefers_the_official_labels(tmp_path):
    pickled = {
        "5k": {"queries": ["q"], "database": {"b", "a", "c"}},
        "annotation": {"q": {"ND": ["a"]}},
    }
    write_pickle(tmp_path / "fivr.pickle", pickled)
    by_pickle = load_evaluation_set("FIVR-5K", tmp_path)
    official = {"q": {"ND": ["b"]}, "other": {"ND": ["a"]}}
    (tmp_path / "fivr_annotation.json").write_text(json.dumps(official))
    by_json = load_evaluation_set("FIVR-5K", tmp_path)
    for fivr in (by_pickle, by_json):
        assert (fivr.queries, fivr.database) == (["q"], ["a", "b", "c"])
    similarities = {"q": {"a": 0.9, "b": 0.5, "c": 0.1}}
    assert by_pickle.evaluate(similarities)["DSVR"] == 1.0
    assert by_json.evaluate(similarities)["DSVR"] == 0.5
    assert "fivr.pickle" in by_pickle.source
    assert "official" in by_json.source and "fivr_annotation.json" in by_json.source


@pytest.mark.parametrize("content", ["", "{", '{"q": 5}', '{"q": ["a"]}', "[1]", "5", "null"])
def test_broken_labels_are_refused(tmp_path, content):
    (tmp_path / "demo_ids.txt").write_text("a\nb\n")
    (tmp_path / "demo.json").write_text(content)
    with pytest.raises(InputError, match="demo.json"):
        load_evaluation_set("DEMO", tmp_path)
    pickled = {"5k": {"queries": ["q"], "database": ["a"]}, "annotation": {"q": {}}}
    write_pickle(tmp_path / "fivr.pickle", pickled)
    (tmp_path / "fivr_annotation.json").write_text(content)
    with pytest.raises(InputError, match="fivr_annotation.json"):
        load_evaluation_set("FIVR-5K", tmp_path)


def test_broken_id_list_is_refused(tmp_path):
    write_set(tmp_path, "demo", {"q": {"ND": ["a"]}}, ["a"])
    (tmp_path / "demo_ids.txt").write_bytes(b"a\n\xff\n")
    with pytest.raises(InputError, match="demo_ids.txt"):
        load_evaluation_set("DEMO", tmp_path)


BROKEN_PICKLES = [
    [],
    {"5k": {}},
    {"annotation": {}},
    {"5k": {"queries": ["q"], "database": ["a"]}, "annotation": {}},
]


@pytest.mark.parametrize("value", BROKEN_PICKLES)
def test_broken_pickle_is_refused(tmp_path, value):
    write_pickle(tmp_path / "fivr.pickle", value)
    with pytest.raises(InputError, match="fivr.pickle"):
        load_evaluation_set("FIVR-5K", tmp_path)


# --- the official annotation --------------------------------------------------------------------


def perfect_table(queries, videos, annotation):
    """The table that ranks ND and DS first, then CS, then IS, then the rest."""
    column = {video: j for j, video in enumerate(videos)}
    table = np.zeros((len(queries), len(videos)), np.float32)
    for row, query in zip(table, queries, strict=True):
        for value, label in ((1, "IS"), (2, "CS"), (3, "DS"), (3, "ND")):
            row[[column[v] for v in annotation[query].get(label, []) if v in column]] = value
    return table


def test_official_fivr_has_its_published_counts_and_ceilings(annotations):
    small = load_evaluation_set("FIVR-5K", annotations)
    large = load_evaluation_set("FIVR-200K", annotations)
    assert (len(small.queries), len(small.database)) == (50, 5000)
    assert (len(large.queries), len(large.database)) == (100, 225_960)
    assert "official" in small.source
    official = json.loads((annotations / "fivr_annotation.json").read_text())
    table = perfect_table(small.queries, small.database, official)
    metrics = small.evaluate_table(small.queries, small.database, table)
    assert metrics["DSVR"] == metrics["CSVR"] == 1
    assert metrics["ISVR"] == pytest.approx(0.99971, abs=5e-6)
    with open(annotations / "fivr.pickle", "rb") as file:
        assert set(small.queries) == set(pickle.load(file)["5k"]["queries"])


def test_official_fivr_200k_equals_loops_for_two_queries(annotations):
    fivr = load_evaluation_set("FIVR-200K", annotations)
    labels = json.loads((annotations / "fivr_annotation.json").read_text())
    queries, database = fivr.queries[:2], fivr.database
    rng = np.random.default_rng(0)
    table = np.round(rng.normal(size=(2, 225_960)), 2).astype(np.float32)  # with many ties
    similarities = as_dict(queries, database, table)
    expected = fivr_by_loop(similarities, labels, database, {*queries, *database})
    metrics = fivr.evaluate_table(queries, database, table)
    assert metrics == pytest.approx(expected, abs=1e-12)
