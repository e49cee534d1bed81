"""Detection: micro-AP against scikit-learn and loops over pairs, FIVR's hard split, its audio."""

import json
import math

import numpy as np
import pytest
from helpers.commands import call
from helpers.sets import CASES, as_dict, make_fivr, random_table, table_by_worth
from helpers.worlds import write_public_sets
from sklearn.metrics import average_precision_score

from datasets.detection import Detection, micro_average_precision
from datasets.fivr import FIVR, FIVRAudio
from datasets.registry import load_evaluation_set
from evaluation import main
from retrieval.report import summarise_tasks

LABELS = {"DSVD": ["ND", "DS"], "CSVD": ["ND", "DS", "CS"], "ISVD": ["ND", "DS", "CS", "IS"]}
every_set = pytest.mark.parametrize("name", CASES)


def detection_metrics(evaluation_set, rankings):
    """{name: micro-AP} from what `EvaluationSet.rankings` or `rankings_of` yields."""
    detection = Detection(evaluation_set)
    for query, tasks in rankings:
        detection.add(query, tasks)
    return detection.metrics()


# --- by another route ---------------------------------------------------------------------------


def micro_ap_by_scikit_learn(pairs, num_relevant):
    """From [(similarity, relevant)] of all queries; relevant pairs that are not listed are lost."""
    if not num_relevant:
        return math.nan
    hits = [hit for _, hit in pairs]
    if not any(hits):
        return 0.0
    ap = average_precision_score(hits, [similarity for similarity, _ in pairs])
    return ap * sum(hits) / num_relevant


def fivr_pairs(similarities, annotation, database, available, labels):
    """S2VS's pairs of FIVR by loops: [(similarity, relevant)], and how many are relevant."""
    pairs, num_relevant = [], 0
    for query, row in similarities.items():
        if query not in annotation or query not in available:
            continue
        relevant = set()
        for label in labels:
            relevant.update(annotation[query].get(label, []))
        relevant = {video for video in relevant if video in database and video in available}
        relevant.discard(query)
        num_relevant += len(relevant)
        for video, similarity in row.items():
            if video in database and video in available and video != query:
                pairs.append((similarity, video in relevant))
    return pairs, num_relevant


def pairs_by_worth(case, similarities, available):
    """The pairs of a set with one task, from the case's own notion of what is to be found."""
    pairs, num_relevant = [], 0
    for query, row in similarities.items():
        if query not in available:
            continue
        for video in case.set.database:
            if video in available and video != query:
                num_relevant += bool(case.worth(query, video))
                if video in row:
                    pairs.append((row[video], bool(case.worth(query, video))))
    return pairs, num_relevant


def drop_some(rng, evaluation_set, similarities):
    """A share of the similarities, and the ids that have features, some without."""
    ids = sorted({*evaluation_set.queries, *evaluation_set.database})
    available = {video for video in ids if rng.random() < 0.8}
    available.add(evaluation_set.queries[-1])
    listed = {}
    for query, row in similarities.items():
        listed[query] = {video: value for video, value in row.items() if rng.random() < 0.7}
    return listed, available


# --- micro-AP -----------------------------------------------------------------------------------


def test_micro_ap_worked_by_hand():
    # Ranked together: .9 hit, .8 miss, .7 hit, .6 miss, .5 hit; one relevant pair is not listed.
    similarities = [np.array([0.9, 0.6, 0.5]), np.array([0.8, 0.7])]
    hits = [np.array([True, False, True]), np.array([False, True])]
    expected = (1 / 1 + 2 / 3 + 3 / 5) / 4
    assert micro_average_precision(similarities, hits, 4) == pytest.approx(expected)


def test_micro_ap_ties_share_the_precision_at_their_end():
    similarities, hits = [np.array([0.5, 0.5]), np.array([0.5])], [np.array([1, 0], bool)] * 2
    hits[1] = np.array([True])
    assert micro_average_precision(similarities, hits, 2) == pytest.approx(2 / 3)


@pytest.mark.parametrize("decimals", [0, 1, 8])  # many ties, some, none
def test_micro_ap_equals_scikit_learn(decimals):
    rng = np.random.default_rng(decimals)
    similarities, hits = [], []
    for n in (0, 1, 40, 300):
        similarities.append(-np.sort(-np.round(rng.normal(size=n), decimals)))
        hits.append(rng.random(n) < 0.3)
    flat = np.concatenate(similarities), np.concatenate(hits)
    expected = average_precision_score(flat[1], flat[0])
    assert micro_average_precision(similarities, hits, flat[1].sum()) == pytest.approx(expected)


def test_micro_ap_of_empty_predictions_and_of_nothing_to_find():
    nothing = [np.array([])], [np.array([], bool)]
    assert micro_average_precision(*nothing, 3) == 0
    assert math.isnan(micro_average_precision(*nothing, 0))
    assert math.isnan(micro_average_precision([np.array([0.5])], [np.array([False])], 0))


# --- the sets -----------------------------------------------------------------------------------


@every_set
def test_perfect_and_reversed_tables(name):
    case = CASES[name](np.random.default_rng(3))
    sets = case.set.queries, case.set.database
    perfect = detection_metrics(case.set, case.set.rankings(*sets, table_by_worth(case) > 0))
    # The task whose relevant videos have worth, among the whole database.
    name = {"FIVR": "ISVD", "CC_WEB_VIDEO": "uAP*"}.get(name, "uAP")
    assert perfect[name] == 1
    reverse = detection_metrics(case.set, case.set.rankings(*sets, table_by_worth(case, -1)))
    assert reverse[name] < 0.5


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("name", ["EVVE", "VCDB"])
def test_micro_ap_of_a_set_equals_scikit_learn_over_its_pairs(name, ties):
    rng = np.random.default_rng(4)
    case = CASES[name](rng)
    table = random_table(rng, case.set.queries, case.set.database, ties)
    similarities = as_dict(case.set.queries, case.set.database, table)
    listed, available = drop_some(rng, case.set, similarities)
    if name == "EVVE":  # its null videos are neither ranked nor relevant
        available -= {"null0", *(v for v in case.set.database if v.startswith("p0"))}
    metrics = detection_metrics(case.set, case.set.rankings_of(listed, available))
    expected = micro_ap_by_scikit_learn(*pairs_by_worth(case, listed, available))
    assert metrics == {"uAP": pytest.approx(expected)}


@pytest.mark.parametrize("ties", [False, True])
def test_fivr_detection_equals_loops_by_s2vs(ties):
    rng = np.random.default_rng(5)
    queries, database, annotation = make_fivr(5)
    fivr = FIVR(queries, database, annotation, "x")
    table = random_table(rng, queries, database, ties)
    listed, available = drop_some(rng, fivr, as_dict(queries, database, table))
    metrics = detection_metrics(fivr, fivr.rankings_of(listed, available))
    for name, labels in LABELS.items():
        pairs = fivr_pairs(listed, annotation, set(database), available, labels)
        assert metrics[name] == pytest.approx(micro_ap_by_scikit_learn(*pairs))


def test_query_without_anything_to_find_brings_its_pairs():
    annotation = {"q": {"ND": ["a"]}, "r": {"CS": ["b"]}}
    fivr = FIVR(["q", "r"], ["a", "b"], annotation, "x")
    similarities = {"q": {"a": 0.5, "b": 0.1}, "r": {"a": 0.9, "b": 0.8}}
    metrics = detection_metrics(fivr, fivr.rankings_of(similarities))
    assert metrics["DSVD"] == pytest.approx(1 / 3)  # both pairs of r come before
    assert metrics["CSVD"] == pytest.approx((1 / 2 + 2 / 3) / 2)


def test_query_is_not_a_pair_with_itself_nor_counted():
    fivr = FIVR(["q"], ["q", "a", "b"], {"q": {"ND": ["a"], "IS": ["q"]}}, "x")
    table = np.array([[1.0, 0.9, 0.1]])
    rankings = fivr.rankings(["q"], ["q", "a", "b"], table)
    assert detection_metrics(fivr, rankings) == dict.fromkeys(LABELS, 1)
    case = CASES["CC_WEB_VIDEO"](np.random.default_rng(6))
    zeros = np.zeros((len(case.set.queries), len(case.set.database)))
    pairs = relevant = 0
    for query in case.set.queries:
        for video in case.set.database:
            pairs += video != query
            relevant += video != query and bool(case.worth(query, video))
    rankings = case.set.rankings(case.set.queries, case.set.database, zeros)
    # All pairs tie, so the micro-AP is the share of relevant pairs.
    assert detection_metrics(case.set, rankings)["uAP*"] == pytest.approx(relevant / pairs)


# --- the hard split, and audio ------------------------------------------------------------------


def test_hard_split_leaves_easy_duplicates_out_of_ranking_and_count():
    rng = np.random.default_rng(7)
    queries, database, annotation = make_fivr(7)
    easy = set(rng.permutation(database)[:20].tolist())
    fivr = FIVR(queries, database, annotation, "x", easy)
    table = random_table(rng, queries, database)
    similarities = as_dict(queries, database, table)
    metrics = summarise_tasks(
        fivr, lambda a_set: a_set.rankings(queries, database, table), ["retrieval", "detection"]
    ).metrics
    kept = set(database) - easy
    for name, labels in LABELS.items():
        pairs = fivr_pairs(similarities, annotation, kept, {*queries, *database}, labels)
        assert metrics[f"{name}_hard"] == pytest.approx(micro_ap_by_scikit_learn(*pairs))
        aps = []
        for query in queries:
            row = {query: similarities[query]}
            pairs = fivr_pairs(row, annotation, kept, {*queries, *database}, labels)
            if pairs[1]:
                aps.append(micro_ap_by_scikit_learn(*pairs))
        assert metrics[f"{name[:3]}R_hard"] == pytest.approx(np.mean(aps))


def test_hard_split_is_scored_only_with_detection_and_only_if_it_is_there():
    def names(fivr, *tasks):
        table = np.array([[0.9, 0.5, 0.1]])
        rank = lambda a_set: a_set.rankings(["q"], list("abc"), table)  # noqa: E731
        return list(summarise_tasks(fivr, rank, tasks).metrics)

    annotation = {"q": {"ND": ["a", "b"]}}
    with_easy = FIVR(["q"], list("abc"), annotation, "x", {"a"})
    without = FIVR(["q"], list("abc"), annotation, "x")
    retrieval, detection = ["DSVR", "CSVR", "ISVR"], ["DSVD", "CSVD", "ISVD"]
    assert names(with_easy, "retrieval") == retrieval
    assert names(without, "detection") == detection
    hard = [f"{name}_hard" for name in detection]
    assert names(with_easy, "detection") == [*detection, *hard]


def test_audio_task_has_its_queries_and_label():
    annotation = {"q": {"ND": ["a"], "DA": ["b"]}, "r": {"ND": ["b"]}}
    audio = FIVRAudio(["q", "r"], list("abc"), annotation, "x")
    assert audio.queries == ["q"]
    similarities = {"q": {"a": 0.9, "b": 0.5}, "r": {"a": 0.95}}
    assert audio.evaluate(similarities) == {"DAVR": 0.5}
    assert detection_metrics(audio, audio.rankings_of(similarities)) == {"DAVD": 0.5}


def test_official_hard_split_and_audio(annotations):
    fivr = load_evaluation_set("FIVR-5K", annotations)
    assert (len(fivr.database), len(fivr.hard.database)) == (5000, 5000 - 595)
    audio = load_evaluation_set("FIVR-200K-AUDIO", annotations)
    assert (len(audio.queries), len(audio.database)) == (76, 225_960)
    relevant = sum(len(tasks["DAVR"].relevant) for tasks in audio.judgements)
    assert relevant == 3397


# --- the command --------------------------------------------------------------------------------


@pytest.fixture
def public(tmp_path):
    write_public_sets(tmp_path)
    fivr = load_evaluation_set("FIVR-5K", tmp_path)
    (tmp_path / "fivr_easy_duplicates.txt").write_text("\n".join(fivr.database[::5]))
    rng = np.random.default_rng(8)
    table = random_table(rng, fivr.queries, fivr.database)
    (tmp_path / "s.json").write_text(json.dumps(as_dict(fivr.queries, fivr.database, table)))
    return tmp_path


def test_task_flag_reaches_table_json_and_page(public):
    flags = ["--dataset", "FIVR-5K", "--annotation_dir", public]
    flags += ["--similarities", public / "s.json", "--task", "retrieval", "detection"]
    result = call(main, *flags, "--output", public / "r.json", "--report", public / "page")
    assert result.returncode == 0, result.stderr
    metrics = json.loads((public / "r.json").read_text())["figures"]["s"][0]
    names = ["DSVR", "CSVR", "ISVR", "DSVD", "CSVD", "ISVD"]
    assert list(metrics) == [*names, *(f"{name}_hard" for name in names)]
    page = (public / "page" / "index.html").read_text()
    for name, value in metrics.items():
        assert f"{name} " in result.stdout and f"{value:.4f}" in result.stdout
        assert f"<td>{name}</td>" in page and f"{value:.4f}" in page


def test_task_flag_detection_alone(public):
    flags = ["--dataset", "FIVR-5K", "--annotation_dir", public]
    result = call(main, *flags, "--similarities", public / "s.json", "--task", "detection")
    assert "DSVD_hard" in result.stdout and "DSVR" not in result.stdout


def test_audio_is_scored_from_a_similarity_file(tmp_path):
    annotation = {"q": {"DA": ["b"]}, "r": {"ND": ["a"]}}
    (tmp_path / "fivr_annotation.json").write_text(json.dumps(annotation))
    (tmp_path / "fivr_youtube_ids.txt").write_text("a\nb\nc\n")
    (tmp_path / "s.json").write_text('{"q": {"a": 0.9, "b": 0.5}}')
    flags = ["--dataset", "FIVR-200K-AUDIO", "--annotation_dir", tmp_path]
    flags += ["--similarities", tmp_path / "s.json", "--task", "retrieval", "detection"]
    result = call(main, *flags, "--output", tmp_path / "r.json")
    record = json.loads((tmp_path / "r.json").read_text())
    assert record["figures"]["s"] == [{"DAVR": 0.5, "DAVD": 0.5}]
    assert "1 queries (0 missing)" in result.stdout
