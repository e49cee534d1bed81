"""CC_WEB_VIDEO: its four metrics by hand, both spellings of its ids, the official annotation."""

import pickle

import numpy as np
import pytest
from helpers.feature_files import write_pickle
from helpers.oracles import cc_web_by_loop
from helpers.sets import as_dict, cc_web_case, random_table, table_by_worth
from helpers.worlds import as_tca, make_cc_web
from sklearn.metrics import average_precision_score

from datasets.cc_web_video import CCWebVideo
from datasets.registry import load_evaluation_set

INDEX = {"1/1_1_Y": 1, "1/1_2_Y": 2, "1/1_3_Y": 3, "2/2_1_Y": 4}


def test_metrics_worked_by_hand():
    """The query is ranked; the cleaned metrics exclude the second video."""
    cc_web = CCWebVideo(INDEX, ["1/1_1_Y"], [{1: "E", 2: "X", 3: "V"}], [{2}], "x")
    ranked = {"1/1_1_Y": 0.9, "2/2_1_Y": 0.8, "1/1_2_Y": 0.7, "1/1_3_Y": 0.6}
    assert cc_web.evaluate({"1/1_1_Y": ranked}) == pytest.approx(
        {
            "cc_web": (1 + 2 / 3) / 2,
            "cc_web*": (1 + 2 / 4) / 2,
            "cc_web_c": (1 + 2 / 2) / 2,
            "cc_web*_c": (1 + 2 / 3) / 2,
        }
    )


def test_positives_without_features_count_as_in_the_official_evaluators():
    cc_web = CCWebVideo(INDEX, ["1/1_1_Y"], [{1: "E", 2: "X", 3: "V"}], [{2}], "x")
    metrics = cc_web.evaluate({"1/1_1_Y": {"1/1_1_Y": 0.9, "1/1_2_Y": 0.7}})
    assert metrics["cc_web"] == 0.5


def test_perfect_ranking_misses_the_positive_without_an_id():
    """Of 4 queries the first has a positive that no video can be: n - 1 of n are found."""
    data = make_cc_web(np.random.default_rng(1))
    case = cc_web_case(data=data)
    table = table_by_worth(case)
    metrics = case.set.evaluate_table(case.set.queries, case.set.database, table)
    for suffix, excluded in (("", set()), ("_c", data["excluded"][0])):
        n = 0
        for number, label in data["ground_truth"][0].items():
            n += label in "ESLMV" and number not in excluded
        for name in ("cc_web", "cc_web*"):
            assert metrics[name + suffix] == pytest.approx((3 + (n - 1) / n) / 4)


@pytest.mark.parametrize("form", ["DnS", "TCA"])
def test_ids_in_either_spelling_are_scored_alike(tmp_path, form):
    dns = make_cc_web(np.random.default_rng(0))
    data = dns if form == "DnS" else as_tca(dns)
    name = "cc_web_video.pickle" if form == "DnS" else "cc_web_video_tca.pickle"
    write_pickle(tmp_path / name, data)
    cc_web = load_evaluation_set("CC_WEB_VIDEO", tmp_path)
    assert ("/" in cc_web.database[0]) == (form == "DnS")
    table = random_table(np.random.default_rng(1), cc_web.queries, cc_web.database, ties=True)
    similarities = as_dict(cc_web.queries, cc_web.database, table)
    expected = cc_web_by_loop(data, similarities, cc_web.database)
    for ids in (list(dns["index"]), list(as_tca(dns)["vid2index"])):
        respelled = load_evaluation_set("CC_WEB_VIDEO", tmp_path, available_ids=ids[3:])
        assert respelled.database == ids and set(respelled.queries) < set(ids)
        metrics = respelled.evaluate_table(respelled.queries, ids, table)
        assert metrics == pytest.approx(expected, abs=1e-12)
        assert respelled.coverage(ids[3:])["videos_missing"] == 3


# --- the official annotation --------------------------------------------------------------------


def official(annotations, file):
    with open(annotations / file, "rb") as stream:
        return pickle.load(stream, encoding="latin1")


@pytest.mark.parametrize("file", ["cc_web_video.pickle", "cc_web_video_tca.pickle"])
def test_official_cc_web_video(annotations, tmp_path, file):
    (tmp_path / file).symlink_to(annotations / file)
    cc_web = load_evaluation_set("CC_WEB_VIDEO", tmp_path)
    assert (len(cc_web.queries), len(cc_web.database)) == (24, 13_115)
    case = cc_web_case(data=official(annotations, file))
    perfect = table_by_worth(case)
    metrics = cc_web.evaluate_table(cc_web.queries, cc_web.database, perfect)
    assert metrics["cc_web"] == metrics["cc_web*"] == pytest.approx(0.99974, abs=5e-6)
    rng = np.random.default_rng(0)
    videos = [v for v in cc_web.database if rng.random() < 0.9 or v in cc_web.queries]
    table = random_table(rng, cc_web.queries, videos)
    expected = case.by_loop(as_dict(cc_web.queries, videos, table), set(videos))
    metrics = cc_web.evaluate_table(cc_web.queries, videos, table)
    assert metrics == pytest.approx(expected, abs=1e-12)


def test_official_cc_web_video_equals_scikit_learn(annotations):
    """But for the query that has a positive without a video."""
    cc_web = load_evaluation_set("CC_WEB_VIDEO", annotations)
    data = official(annotations, "cc_web_video.pickle")
    table = random_table(np.random.default_rng(1), cc_web.queries, cc_web.database).astype(float)
    aps = cc_web.per_query(cc_web.queries, cc_web.database, table)
    for i, query in enumerate(cc_web.queries):
        if i == 3:
            continue
        labels = data["ground_truth"][i]
        truth = np.array([labels.get(n, "X") in "ESLMV" for n in data["index"].values()])
        labelled = np.array([n in labels for n in data["index"].values()])
        whole = average_precision_score(truth, table[i])
        own = average_precision_score(truth[labelled], table[i][labelled])
        assert aps["cc_web*"][query] == pytest.approx(whole, abs=1e-12)
        assert aps["cc_web"][query] == pytest.approx(own, abs=1e-12)
