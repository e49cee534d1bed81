"""Evaluation sets: every protocol against a second implementation, scikit-learn and scenarios."""

import json
import pickle

import numpy as np
import pytest
from conftest import TASKS, by_loop, write_pickle, write_set
from sklearn.metrics import average_precision_score

from evaluation_sets import EVALUATION_SETS, FIVR, average_precision, evaluation_set
from utils import InputError

# --- scoring ---------------------------------------------------------------------------------------------------------


def random_set(seed=0, Q=8, N=60):
    """A set with every oddity: labels missing, a query in its own list, a query in the database, strangers in the lists."""
    draw = np.random.default_rng(seed)
    database = [f"v{i}" for i in draw.permutation(N)] + ["q0", "q1"]
    annotation = {}
    for q in range(Q):
        chosen = draw.permutation(N)[: draw.integers(1, 30)].tolist()
        labels = ["ND", "DS", "CS", "IS", "DA"][: draw.integers(3, 6)]
        annotation[f"q{q}"] = {label: [f"v{i}" for i in chosen[k :: len(labels)]] for k, label in enumerate(labels)}
    annotation["q0"].setdefault("IS", []).append("q0")
    annotation["q2"]["ND"].append("never crawled")
    return list(annotation), database, annotation, draw


def table_of(draw, queries, videos, ties=False):
    values = draw.normal(size=(len(queries), len(videos))).astype(np.float32)
    return np.round(values) if ties else values


def as_dict(queries, videos, table):
    return {q: dict(zip(videos, map(float, row), strict=True)) for q, row in zip(queries, table, strict=True)}


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_figures_equal_the_protocol_worked_by_a_loop(seed, ties):
    queries, database, annotation, draw = random_set(seed)
    chosen = FIVR(queries, database, annotation, "x")
    here = [v for v in database if draw.random() < 0.7 or v in ("q0", "q1")]
    queries = queries[:-1]  # one query has no features
    table = table_of(draw, queries, here, ties)
    similarities = as_dict(queries, here, table)
    expected = by_loop(similarities, annotation, database, {*queries, *here})
    assert chosen.evaluate_table(queries, here, table) == pytest.approx(expected, abs=1e-9)
    assert chosen.evaluate(similarities) == pytest.approx(expected, abs=1e-9)
    assert chosen.evaluate(similarities, {*queries, *here}) == pytest.approx(expected, abs=1e-9)


def test_figures_equal_scikit_learns_where_the_two_definitions_meet():
    """No ties, every relevant video ranked, the query in no list."""
    draw = np.random.default_rng(0)
    database = [f"v{i}" for i in range(80)]
    annotation = {f"q{i}": {"ND": database[i : i + 9], "DS": database[40 : 40 + i], "IS": ["v79"]} for i in range(6)}
    table = table_of(draw, annotation, database)
    found = FIVR(annotation, database, annotation, "x").evaluate_table(list(annotation), database, table)
    for task, labels in TASKS.items():
        truth = [[v in sum((annotation[q].get(label, []) for label in labels), []) for v in database] for q in annotation]
        expected = [average_precision_score(y, row) for y, row in zip(truth, table, strict=True)]
        assert found[task] == pytest.approx(np.mean(expected), abs=1e-9)


def test_average_precision_of_cases_worked_by_hand():
    assert average_precision(np.array([1, 0, 1, 0], bool), 2) == pytest.approx((1 + 2 / 3) / 2)
    assert average_precision(np.array([0, 0, 1], bool), 1) == pytest.approx(1 / 3)
    assert average_precision(np.array([1, 1], bool), 4) == pytest.approx(0.5)  # two were never ranked
    assert average_precision(np.array([0, 0], bool), 1) == 0


def test_a_perfect_ranking_scores_1_and_a_reversed_one_what_hand_gives():
    database = ["a", "b", "c", "d", "e"]
    annotation = {"q": {"ND": ["a"], "DS": ["b"], "CS": ["c"], "IS": ["d"]}}
    chosen = FIVR(["q"], database, annotation, "x")
    assert chosen.evaluate({"q": dict(zip(database, [5, 4, 3, 2, 1], strict=True))}) == dict.fromkeys(TASKS, 1)
    found = chosen.evaluate({"q": dict(zip(database, [1, 2, 3, 4, 5], strict=True))})
    # ranking e d c b a: DSVR finds b at 4 and a at 5; CSVR c, b, a at 3, 4, 5; ISVR d, c, b, a at 2, 3, 4, 5
    assert found["DSVR"] == pytest.approx((1 / 4 + 2 / 5) / 2)
    assert found["CSVR"] == pytest.approx((1 / 3 + 2 / 4 + 3 / 5) / 3)
    assert found["ISVR"] == pytest.approx((1 / 2 + 2 / 3 + 3 / 4 + 4 / 5) / 4)


def test_ties_rank_in_the_databases_order_whatever_the_tables_order():
    database = ["a", "b", "c", "d"]
    chosen = FIVR(["q"], database, {"q": {"ND": ["b", "d"]}}, "x")
    expected = (1 / 2 + 2 / 4) / 2
    for order in (database, database[::-1], ["c", "a", "d", "b"]):
        assert chosen.evaluate({"q": dict.fromkeys(order, 0.5)})["DSVR"] == pytest.approx(expected)
        assert chosen.evaluate_table(["q"], order, np.full((1, 4), 0.5, np.float32))["DSVR"] == pytest.approx(expected)


def test_the_order_of_queries_and_videos_in_the_table_does_not_matter():
    queries, database, annotation, draw = random_set()
    chosen = FIVR(queries, database, annotation, "x")
    table = table_of(draw, queries, database, ties=True)
    expected = chosen.evaluate_table(queries, database, table)
    rows, columns = draw.permutation(len(queries)), draw.permutation(len(database))
    shuffled = [queries[i] for i in rows], [database[j] for j in columns], table[rows][:, columns]
    assert chosen.evaluate_table(*shuffled) == pytest.approx(expected, abs=1e-12)
    assert chosen.evaluate(as_dict(*shuffled)) == pytest.approx(expected, abs=1e-12)


def test_videos_without_features_are_neither_ranked_nor_counted():
    database = ["a", "b", "c"]
    chosen = FIVR(["q"], database, {"q": {"ND": ["a", "c"]}}, "x")
    assert chosen.evaluate({"q": {"b": 0.9, "c": 0.5}})["DSVR"] == pytest.approx(1 / 2)  # a is gone: c is all there is
    whole = {"q": {"a": 1.0, "b": 0.9, "c": 0.5}}
    assert chosen.evaluate(whole, available={"q", "b", "c"})["DSVR"] == pytest.approx(1 / 2)


def test_queries_that_are_missing_or_have_nothing_relevant_left_do_not_enter_the_mean():
    database = ["a", "b"]
    annotation = {"q1": {"ND": ["a"]}, "q2": {"ND": ["gone"]}, "q3": {"IS": ["b"]}, "q4": {"ND": ["b"]}}
    chosen = FIVR(annotation, database, annotation, "x")
    row = {"a": 0.1, "b": 0.9}
    found = chosen.evaluate({"q1": row, "q2": row, "q3": row})
    assert found["DSVR"] == pytest.approx(1 / 2)  # q1 alone
    assert found["ISVR"] == pytest.approx((1 / 2 + 1) / 2)  # and q3


def test_ids_the_set_does_not_know_change_nothing():
    queries, database, annotation, draw = random_set()
    chosen = FIVR(queries, database, annotation, "x")
    similarities = as_dict(queries, database, table_of(draw, queries, database))
    expected = chosen.evaluate(similarities)
    more = {q: row | {f"stranger{i}": 9.0 for i in range(5)} for q, row in similarities.items()}
    more["unasked query"] = dict.fromkeys(database, 1.0)
    assert chosen.evaluate(more) == expected


def test_a_query_is_not_ranked_for_itself_and_stays_in_its_own_lists_count():
    database = ["q", "a", "b"]
    chosen = FIVR(["q"], database, {"q": {"ND": ["a"], "IS": ["q"]}}, "x")
    found = chosen.evaluate({"q": {"q": 1.0, "a": 0.9, "b": 0.1}})
    assert found == {"DSVR": 1.0, "CSVR": 1.0, "ISVR": 0.5}  # as the official code: of two relevant, one is ranked


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_similarity_that_is_not_finite_is_refused_by_query(bad):
    queries, database, annotation, draw = random_set()
    chosen = FIVR(queries, database, annotation, "x")
    table = table_of(draw, queries, database)
    table[3, 5] = bad
    for score in (
        lambda: chosen.evaluate_table(queries, database, table),
        lambda: chosen.evaluate(as_dict(queries, database, table)),
    ):
        with pytest.raises(InputError, match="'q3'.*NaN"):
            score()


def test_a_table_of_other_ids_is_refused():
    queries, database, annotation, _ = random_set()
    with pytest.raises(InputError, match="none of the 8 queries"):
        FIVR(queries, database, annotation, "x").evaluate({"someone": {"else": 1.0}})


def test_coverage_counts_what_has_features():
    database = ["a", "b", "c", "q1"]
    annotation = {"q1": {"ND": ["a"]}, "q2": {"ND": ["b"], "CS": ["c"]}, "q3": {"IS": ["a"]}}
    assert FIVR(annotation, database, annotation, "x").coverage(["q1", "q2", "a", "c", "unknown"]) == {
        "queries": 2, "queries_missing": 1, "videos": 3, "videos_missing": 1,
        "queries_without_relevant": {"DSVR": 1, "CSVR": 0, "ISVR": 0},
    }  # fmt: skip


# --- annotation files ------------------------------------------------------------------------------------------------


def test_every_set_is_read_from_its_files(tmp_path):
    queries, database, annotation, _ = random_set()
    for stem in ("demo", "demo_val"):
        write_set(tmp_path, stem, annotation, database)
    (tmp_path / "fivr_annotation.json").write_text(json.dumps(annotation))
    (tmp_path / "fivr_youtube_ids.txt").write_text("\n".join(database))
    for name in ("DEMO", "DEMO-VAL", "FIVR-200K"):
        chosen = evaluation_set(name, tmp_path)
        assert (chosen.queries, chosen.database) == (queries, database)


def test_fivr_5k_prefers_the_official_labels_and_says_which_it_took(tmp_path):
    pickled = {"5k": {"queries": ["q"], "database": {"b", "a", "c"}}, "annotation": {"q": {"ND": ["a"]}}}
    write_pickle(tmp_path / "fivr.pickle", pickled)
    old = evaluation_set("FIVR-5K", tmp_path)
    (tmp_path / "fivr_annotation.json").write_text(json.dumps({"q": {"ND": ["b"]}, "other": {"ND": ["a"]}}))
    new = evaluation_set("FIVR-5K", tmp_path)
    assert old.queries == new.queries == ["q"] and old.database == new.database == ["a", "b", "c"]
    table = {"q": {"a": 0.9, "b": 0.5, "c": 0.1}}
    assert (old.evaluate(table)["DSVR"], new.evaluate(table)["DSVR"]) == (1.0, 0.5)
    assert "fivr.pickle" in old.source and "official" in new.source and "fivr_annotation.json" in new.source


def test_broken_annotation_files_are_refused_by_name(tmp_path):
    with pytest.raises(InputError, match="'FIVR-6K'.*FIVR-5K"):
        evaluation_set("FIVR-6K", tmp_path)
    with pytest.raises(InputError, match="absent"):
        evaluation_set("FIVR-5K", tmp_path / "absent")
    for name in EVALUATION_SETS:
        with pytest.raises(InputError, match=r"\.(pickle|json|txt)"):
            evaluation_set(name, tmp_path)  # an empty folder
    (tmp_path / "demo_ids.txt").write_text("a\nb\n")
    for content in ("", "{", '{"q": 5}', '{"q": ["a"]}', "[1]", "5", "null"):
        (tmp_path / "demo.json").write_text(content)
        with pytest.raises(InputError, match="demo.json"):
            evaluation_set("DEMO", tmp_path)
    for value in ([], {"5k": {}}, {"annotation": {}}, {"5k": {"queries": ["q"], "database": ["a"]}, "annotation": {}}):
        write_pickle(tmp_path / "fivr.pickle", value)
        with pytest.raises(InputError, match="fivr.pickle"):
            evaluation_set("FIVR-5K", tmp_path)


def perfect(queries, videos, annotation):
    """The table that ranks by label: ND and DS, then CS, then IS, then the rest."""
    place = {video: j for j, video in enumerate(videos)}
    table = np.zeros((len(queries), len(videos)), np.float32)
    for row, query in zip(table, queries, strict=True):
        for value, label in ((1, "IS"), (2, "CS"), (3, "DS"), (3, "ND")):
            row[[place[v] for v in annotation[query].get(label, []) if v in place]] = value
    return table


def test_the_official_fivr_sets_have_their_published_counts_and_ceilings(annotations):
    small, large = (evaluation_set(name, annotations) for name in ("FIVR-5K", "FIVR-200K"))
    assert (len(small.queries), len(small.database)) == (50, 5000)
    assert (len(large.queries), len(large.database)) == (100, 225_960)
    assert "official" in small.source
    official = json.loads((annotations / "fivr_annotation.json").read_text())
    table = perfect(small.queries, small.database, official)
    found = small.evaluate_table(small.queries, small.database, table)
    assert found["DSVR"] == found["CSVR"] == 1 and found["ISVR"] == pytest.approx(0.99971, abs=5e-6)
    with open(annotations / "fivr.pickle", "rb") as file:
        assert set(small.queries) == set(pickle.load(file)["5k"]["queries"])
