"""What every evaluation set shares: ranking, counting, coverage, refusals, similarity files.

Every set is scored against its protocol worked by loops. The sets' own rules have a file each.
"""

import json
import re

import numpy as np
import pytest
from helpers.oracles import TASKS, ap_of_hits, mean, polygon_ap_of_hits
from helpers.sets import CASES, as_dict, make_fivr, random_table, table_by_worth
from sklearn.metrics import average_precision_score, precision_recall_curve

from datasets.evaluation_set import (
    MISSING_SHARE,
    average_precision,
    missing_note,
    precision_recall,
    trapezoidal_average_precision,
)
from datasets.fivr import FIVR
from datasets.similarity_files import read_similarities
from untrusted import read_ids
from utils import InputError

every_set = pytest.mark.parametrize("name", CASES)


def small_set(annotation, database="abc"):
    """A set in FIVR's form, with a letter for each video."""
    return FIVR(annotation, list(database), annotation, "made up")


# --- the metrics of one ranking -----------------------------------------------------------------


@pytest.mark.parametrize(
    "hits, num_relevant, expected",
    [
        ([1, 0, 1, 0], 2, (1 + 2 / 3) / 2),
        ([0, 0, 1], 1, 1 / 3),
        ([1, 1], 4, 1 / 2),  # two are not ranked
        ([0, 0], 1, 0),
        ([], 1, 0),
    ],
)
def test_average_precision_worked_by_hand(hits, num_relevant, expected):
    assert average_precision(np.array(hits, bool), num_relevant) == pytest.approx(expected)


@pytest.mark.parametrize(
    "hits, num_relevant, expected",
    [
        ([1, 1, 0], 2, 1),
        ([0, 1], 2, (0 + 1 / 2) / 2 / 2),  # from precision 0 to 1/2, over half of the recall
        ([1, 0, 0, 1], 2, 1 / 2 + (1 / 3 + 2 / 4) / 2 / 2),
        ([0, 0], 3, 0),
    ],
)
def test_trapezoidal_average_precision_worked_by_hand(hits, num_relevant, expected):
    ap = trapezoidal_average_precision(np.array(hits, bool), num_relevant)
    assert ap == pytest.approx(expected)


@pytest.mark.parametrize("num_relevant", [1, 3, 7, 40])
def test_precision_recall_equals_scikit_learns_curve(num_relevant):
    hits = np.random.default_rng(num_relevant).permutation(np.arange(60) < num_relevant)
    precision, recall, _ = precision_recall_curve(hits, -np.arange(60.0))
    precision, recall = precision[:-1], recall[:-1]  # without the point that the library appends
    expected = [precision[recall >= i / 20 - 1e-9].max() for i in range(21)]
    assert precision_recall(hits, num_relevant) == pytest.approx(expected)


def test_precision_recall_is_0_where_recall_is_not_reached():
    curve = precision_recall(np.array([1, 0, 1], bool), 4)  # recall ends at 1/2
    assert curve[:6] == pytest.approx(1)
    assert curve[6:11] == pytest.approx(2 / 3)
    assert not curve[11:].any()


# --- every set against loops --------------------------------------------------------------------


def assert_agrees(expected, evaluate, *arguments):
    """`evaluate` gives the expected metrics, or refuses if nothing can be scored."""
    if all(np.isnan(value) for value in expected.values()):
        with pytest.raises(InputError, match="can be scored"):
            evaluate(*arguments)
    else:
        assert evaluate(*arguments) == pytest.approx(expected, abs=1e-12, nan_ok=True)


@every_set
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_metrics_equal_the_protocol_worked_by_loops(name, ties, seed):
    """All videos and a part of them; by table and by dictionary, with `available` and without.

    A dictionary says what was found: a query without a row is as one with an empty row.
    """
    rng = np.random.default_rng(seed)
    case = CASES[name](rng)
    for share in (1, 0.6, 0.2):
        videos = [str(v) for v in rng.permutation(case.set.database) if rng.random() < share]
        queries = [str(query) for query in rng.permutation(case.set.queries)]
        if share < 1:
            del queries[0]
        table = random_table(rng, queries, videos, ties)
        similarities, available = as_dict(queries, videos, table), {*queries, *videos}
        expected = case.by_loop(similarities, available)
        assert_agrees(expected, case.set.evaluate_table, queries, videos, table)
        whole, part = {*case.set.queries, *case.set.database}, {*videos[::2], *queries}
        rows = {query: similarities.get(query, {}) for query in case.set.queries}
        assert_agrees(case.by_loop(rows, whole), case.set.evaluate, similarities)
        for searched in (whole, available, part):
            rows_of_searched = {query: row for query, row in rows.items() if query in searched}
            expected = case.by_loop(rows_of_searched, searched)
            assert_agrees(expected, case.set.evaluate, similarities, searched)


@every_set
@pytest.mark.parametrize("sign", [1, 0, -1])
def test_perfect_constant_and_reversed_rankings(name, sign):
    case = CASES[name](np.random.default_rng(2))
    queries, database = case.set.queries, case.set.database
    table = table_by_worth(case, sign)
    metrics = case.set.evaluate_table(queries, database, table)
    expected = case.by_loop(as_dict(queries, database, table), {*queries, *database})
    assert metrics == pytest.approx(expected, abs=1e-12)
    perfect = case.set.evaluate_table(queries, database, table_by_worth(case))
    assert all(metrics[key] < perfect[key] for key in metrics) == (sign < 1)


@pytest.mark.parametrize("name", ["FIVR", "EVVE", "VCDB"])
def test_perfect_ranking_scores_1(name):
    """CC_WEB_VIDEO has a positive without a video; FIVR's q0 is in its own IS list."""
    case = CASES[name](np.random.default_rng(1))
    table = table_by_worth(case)
    metrics = case.set.evaluate_table(case.set.queries, case.set.database, table)
    if name == "FIVR":
        assert metrics.pop("ISVR") < 1
    assert set(metrics.values()) == {1.0}


@every_set
def test_per_query_and_metrics_are_those_of_the_rankings(name):
    rng = np.random.default_rng(7)
    evaluation_set = CASES[name](rng).set
    queries, database = evaluation_set.queries, evaluation_set.database
    table = random_table(rng, queries, database)
    ap = polygon_ap_of_hits if name == "EVVE" else ap_of_hits
    aps = evaluation_set.per_query(queries, database, table)
    for query, tasks in evaluation_set.rankings(queries, database, table):
        for task, ranking in tasks.items():
            assert ranking.hits.dtype == bool and ranking.hits.sum() <= ranking.num_relevant
            expected = ap(ranking.hits.tolist(), ranking.num_relevant)
            assert aps[task][query] == pytest.approx(expected)
    metrics = evaluation_set.evaluate_table(queries, database, table)
    for task, by_query in aps.items():
        assert metrics[task] == pytest.approx(mean(list(by_query.values())))


def test_metrics_equal_scikit_learns_where_the_definitions_meet():
    """No ties, every relevant video ranked, no query in a list."""
    rng = np.random.default_rng(0)
    database = [f"v{i}" for i in range(80)]
    annotation = {}
    for i in range(6):
        lists = {"ND": database[i : i + 9], "DS": database[40 : 40 + i], "IS": ["v79"]}
        annotation[f"q{i}"] = lists
    table = random_table(rng, annotation, database)
    metrics = small_set(annotation, database).evaluate_table(list(annotation), database, table)
    for task, labels in TASKS.items():
        expected = []
        for lists, row in zip(annotation.values(), table, strict=True):
            relevant = {video for label in labels for video in lists.get(label, [])}
            expected.append(average_precision_score([v in relevant for v in database], row))
        assert metrics[task] == pytest.approx(np.mean(expected), abs=1e-9)


# --- ranking ------------------------------------------------------------------------------------


def test_ties_rank_in_the_order_of_the_database():
    evaluation_set = small_set({"q": {"ND": ["b", "d"]}}, "abcd")
    expected = (1 / 2 + 2 / 4) / 2
    for order in ("abcd", "dcba", "cadb"):
        by_dict = evaluation_set.evaluate({"q": dict.fromkeys(order, 0.5)})
        by_table = evaluation_set.evaluate_table(["q"], order, np.full((1, 4), 0.5, np.float32))
        assert by_dict["DSVR"] == by_table["DSVR"] == pytest.approx(expected)


@every_set
def test_order_and_unknown_ids_change_nothing(name):
    rng = np.random.default_rng(3)
    evaluation_set = CASES[name](rng).set
    table = random_table(rng, evaluation_set.queries, evaluation_set.database, ties=True)
    expected = evaluation_set.evaluate_table(evaluation_set.queries, evaluation_set.database, table)
    rows = rng.permutation(len(evaluation_set.queries))
    columns = rng.permutation(len(evaluation_set.database))
    queries = [evaluation_set.queries[i] for i in rows]
    videos = [evaluation_set.database[j] for j in columns]
    table = table[rows][:, columns]
    assert evaluation_set.evaluate_table(queries, videos, table) == pytest.approx(expected)

    # Two unknown videos with the highest similarity, and an unknown query.
    more = np.concatenate([np.full((len(queries), 2), 9.0), table], axis=1)
    more = np.concatenate([np.zeros((1, more.shape[1])), more])
    more_queries = ["unknown query", *queries]
    more_videos = ["unknown 1", "unknown 2", *videos]
    by_table = evaluation_set.evaluate_table(more_queries, more_videos, more)
    assert by_table == pytest.approx(expected, abs=1e-12)
    by_dict = evaluation_set.evaluate(as_dict(more_queries, more_videos, more))
    assert by_dict == pytest.approx(expected, abs=1e-12)
    unknown = evaluation_set.count_unknown_ids(more_queries, [*more_videos, queries[0]])
    assert unknown == {"queries": 1, "videos": 2}

    similarities = as_dict(queries, videos, table)
    for query, row in similarities.items():  # an order of its own for each row
        order = rng.permutation(list(row))
        similarities[query] = {str(video): row[str(video)] for video in order}
    assert evaluation_set.evaluate(similarities) == pytest.approx(expected, abs=1e-12)


@every_set
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_similarity_that_is_not_finite_is_refused(name, bad):
    rng = np.random.default_rng(5)
    evaluation_set = CASES[name](rng).set
    queries, database = evaluation_set.queries, evaluation_set.database
    table = random_table(rng, queries, database)
    table[2, 5] = bad
    at = re.escape(f"query {queries[2]!r}, video {database[5]!r}") + ".*NaN"
    with pytest.raises(InputError, match=at):
        evaluation_set.evaluate_table(queries, database, table)
    with pytest.raises(InputError, match=at):
        evaluation_set.evaluate(as_dict(queries, database, table))


@every_set
def test_table_of_wrong_ids_or_shape_is_refused(name):
    rng = np.random.default_rng(6)
    evaluation_set = CASES[name](rng).set
    queries, videos = evaluation_set.queries, evaluation_set.database
    table = random_table(rng, queries, videos)
    with pytest.raises(InputError, match=re.escape(f"{videos[3]!r} is given twice")):
        evaluation_set.evaluate_table(queries, [*videos[:-1], videos[3]], table)
    with pytest.raises(InputError, match=re.escape(f"{queries[0]!r} is given twice")):
        evaluation_set.evaluate_table([*queries[:-1], queries[0]], videos, table)
    with pytest.raises(InputError, match="does not fit"):
        evaluation_set.evaluate_table(queries, videos[1:], table)
    with pytest.raises(InputError, match="can be scored"):
        evaluation_set.evaluate_table([], [], np.zeros((0, 0)))
    with pytest.raises(InputError, match="can be scored"):
        evaluation_set.evaluate({})
    with pytest.raises(InputError, match="can be scored"):
        evaluation_set.evaluate({query: {"unknown": 1.0} for query in queries})
    with pytest.raises(InputError, match=f"none of the {len(queries)} queries"):
        evaluation_set.evaluate({"unknown": {"unknown too": 1.0}})


def test_database_with_an_id_twice_is_refused():
    with pytest.raises(InputError, match="'a' is given twice"):
        small_set({"q": {"ND": ["a"]}}, "aba")


# --- counting -----------------------------------------------------------------------------------


def test_videos_without_features_are_neither_ranked_nor_counted():
    evaluation_set = small_set({"q": {"ND": ["a", "c"]}})
    without_a = evaluation_set.evaluate_table(["q"], ["b", "c"], np.array([[0.9, 0.5]]))
    assert without_a["DSVR"] == pytest.approx(1 / 2)  # only c is there to find
    whole = {"q": {"a": 1.0, "b": 0.9, "c": 0.5}}
    without_a = evaluation_set.evaluate(whole, available={"q", "b", "c"})
    assert without_a["DSVR"] == pytest.approx(1 / 2)


def test_what_is_not_listed_counts_as_missed():
    """In a row, in all rows, and a whole row; `available` says what was not searched."""
    annotation = {"q": {"ND": ["a", "c"]}, "r": {"ND": ["c"]}}
    evaluation_set = small_set(annotation)
    best = {"q": {"a": 0.9}}
    assert evaluation_set.evaluate(best)["DSVR"] == (1 / 2 + 0) / 2
    assert evaluation_set.evaluate(best | {"r": {}})["DSVR"] == (1 / 2 + 0) / 2
    assert evaluation_set.evaluate(best | {"r": {"c": 0.5}})["DSVR"] == (1 / 2 + 1) / 2
    assert evaluation_set.evaluate(best, {"q", "a", "b", "c"})["DSVR"] == 1 / 2
    assert evaluation_set.evaluate(best, {"q", "r", "a", "b"})["DSVR"] == 1  # nobody could find c
    unlisted = evaluation_set.count_unlisted_ids(best, {"q", "r", "a", "b"})
    assert unlisted == {"queries": 1, "videos": 1}  # r and b


def test_query_in_the_database_without_a_row_is_missed():
    """It is listed as a video by other rows, which says nothing about its own search."""
    annotation = {"a": {"ND": ["b"]}, "b": {"ND": ["a", "c"]}}
    row = {"a": 1.0, "b": 0.9, "c": 0.1}
    assert small_set(annotation).evaluate({"a": row})["DSVR"] == (1 + 0) / 2


def test_relevant_videos_outside_the_database_are_not_counted():
    """FIVR-5K's labels name thousands of videos that only FIVR-200K has, with features or not."""
    evaluation_set = small_set({"q": {"ND": ["a", "of the large set"]}}, "ab")
    similarities = {"q": {"a": 0.9, "b": 0.1, "of the large set": 0.5}}
    assert evaluation_set.evaluate(similarities)["DSVR"] == 1


def test_queries_without_features_or_relevant_videos_do_not_enter_the_mean():
    annotation = {
        "q1": {"ND": ["a"]},
        "q2": {"ND": ["gone"]},
        "q3": {"IS": ["b"]},
        "q4": {"ND": ["b"]},
    }
    row = {"a": 0.1, "b": 0.9}
    similarities = {"q1": row, "q2": row, "q3": row}
    metrics = small_set(annotation, "ab").evaluate(similarities, {*similarities, *row})
    assert metrics["DSVR"] == pytest.approx(1 / 2)  # q1 alone
    assert metrics["ISVR"] == pytest.approx((1 / 2 + 1) / 2)  # and q3


@every_set
def test_query_without_features_is_left_out_and_counted(name):
    rng = np.random.default_rng(4)
    evaluation_set = CASES[name](rng).set
    queries, database = evaluation_set.queries, evaluation_set.database
    table = random_table(rng, queries, database)
    gone = queries[1]
    available = {*database, *queries} - {gone}
    whole = as_dict(queries, database, table)
    others = {query: row for query, row in whole.items() if query != gone}
    without = evaluation_set.evaluate(whole, available)
    assert without == pytest.approx(evaluation_set.evaluate(others, available), abs=1e-12)
    assert without != evaluation_set.evaluate(whole)
    aps = evaluation_set.per_query(queries, database, table)
    assert all(gone in by_query for by_query in aps.values())
    coverage = evaluation_set.coverage(available)
    assert (coverage["queries"], coverage["queries_missing"]) == (len(queries) - 1, 1)


# --- coverage -----------------------------------------------------------------------------------


def test_coverage_worked_by_hand():
    annotation = {"q1": {"ND": ["a"]}, "q2": {"ND": ["b"], "CS": ["c"]}, "q3": {"IS": ["a"]}}
    evaluation_set = small_set(annotation, ["a", "b", "c", "q1"])
    assert evaluation_set.coverage(["q1", "q2", "a", "c", "unknown"]) == {
        "queries": 2,
        "queries_missing": 1,
        "videos": 3,
        "videos_missing": 1,
        "queries_without_relevant": {"DSVR": 1, "CSVR": 0, "ISVR": 0},
    }


@every_set
def test_coverage_counts_the_queries_that_rankings_leave_out(name):
    rng = np.random.default_rng(8)
    evaluation_set = CASES[name](rng).set
    available = {video for video in evaluation_set.database if rng.random() < 0.1}
    available |= set(evaluation_set.queries) - set(evaluation_set.database)
    coverage = evaluation_set.coverage(available)
    queries = [query for query in evaluation_set.queries if query in available]
    videos = [video for video in evaluation_set.database if video in available]
    assert (coverage["queries"], coverage["videos"]) == (len(queries), len(videos))
    assert coverage["videos_missing"] == len(evaluation_set.database) - len(videos)
    zeros = np.zeros((len(queries), len(videos)))
    tasks = dict(evaluation_set.rankings(queries, videos, zeros))
    for task, skipped in coverage["queries_without_relevant"].items():
        assert skipped == sum(not tasks[query][task].num_relevant for query in queries)


def test_missing_note_names_the_share_above_one_percent():
    def note(queries, queries_missing, videos, videos_missing):
        coverage = {"queries": queries, "queries_missing": queries_missing}
        return missing_note(coverage | {"videos": videos, "videos_missing": videos_missing})

    assert MISSING_SHARE == 0.01
    assert note(100, 0, 5000, 0) == ""
    assert note(100, 0, 4950, 50) == ""
    assert note(99, 1, 5000, 0) == ""
    videos = note(100, 0, 4949, 51)
    assert "1.0% of the videos (51 of 5000)" in videos and "queries" not in videos
    both = note(45, 5, 4000, 1000)
    assert "10.0% of the queries (5 of 50)" in both
    assert "20.0% of the videos (1000 of 5000)" in both


def test_fingerprint_tells_annotations_apart():
    queries, database, annotation = make_fivr()
    same = FIVR(queries, database, annotation, "from another file").fingerprint()
    assert FIVR(queries, database, annotation, "x").fingerprint() == same
    label = annotation["q3"]["ND"]
    changed = annotation | {"q3": annotation["q3"] | {"ND": label[1:]}}
    prints = {
        same,
        FIVR(queries, database, changed, "x").fingerprint(),
        FIVR(queries[1:], database, annotation, "x").fingerprint(),
        FIVR(queries, database[1:], annotation, "x").fingerprint(),
    }
    assert len(prints) == 4


# --- similarity files ---------------------------------------------------------------------------


def test_similarity_file_is_read_as_it_is(tmp_path):
    table = {"q": {"a": 0.25, "b": 1, "c": -3e-2}, "r": {}}
    (tmp_path / "s.json").write_text(json.dumps(table))
    assert read_similarities(tmp_path / "s.json") == table


@pytest.mark.parametrize(
    "text, mention",
    [
        ('{"q": {"a": 1, "b": 2, "a": 3}}', "'a' is given twice"),
        ('{"q": {"a": 1}, "q": {"b": 1}}', "'q' is given twice"),
        ("[1, 2]", "list"),
        ("{}", "no query"),
        ('{"q": [0.5]}', "'q'.*list"),
        ('{"q": 1.0}', "'q'.*float"),
        ('{"q": {"a": "0.5"}}', "'q', video 'a'"),
        ('{"q": {"b": 0.5, "a": true}}', "'q', video 'a'"),
        ('{"q": {"a": null}}', "'q', video 'a'"),
        ('{"q": {"a": [1]}}', "'q', video 'a'"),
        ('{"q": {"a": 0.5', "complete"),
        ("", "complete"),
        ("[" * 100_000, "complete|list"),
    ],
)
def test_similarity_file_of_another_form_is_refused(tmp_path, text, mention):
    (tmp_path / "table.json").write_text(text)
    with pytest.raises(InputError, match=f"table.json.*({mention})"):
        read_similarities(tmp_path / "table.json")


def test_similarity_file_that_is_absent_or_not_text_is_refused(tmp_path):
    with pytest.raises(InputError, match="absent.json"):
        read_similarities(tmp_path / "absent.json")
    (tmp_path / "s.json").write_bytes(b'{"q\xff": {"a": 1}}')
    with pytest.raises(InputError, match="s.json"):
        read_similarities(tmp_path / "s.json")


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "1" * 400])
def test_similarity_file_with_infinite_numbers_is_refused_when_scored(tmp_path, number):
    (tmp_path / "s.json").write_text(f'{{"q": {{"b": 0.5, "a": {number}}}}}')
    evaluation_set = small_set({"q": {"ND": ["a"]}})
    with pytest.raises(InputError, match="query 'q', video 'a'"):
        evaluation_set.evaluate(read_similarities(tmp_path / "s.json"))


def test_id_list_is_split_at_line_ends_only(tmp_path):
    path = tmp_path / "ids.txt"
    path.write_bytes("\ufeffa b\r\n\n x\u2028y \n/1\n".encode())
    assert read_ids(path) == ["a b", "x\u2028y", "/1"]
    for content in (b"", b" \n", b"\xff\n"):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"ids.txt.*an id a line"):
            read_ids(path)
