"""Sets of segments: VCSL's metric against cells of a grid, files, aligners, the command."""

import json
import math
import re

import numpy as np
import pytest
from helpers.commands import call, refused
from helpers.feature_files import write_ours
from helpers.threads import run_in_threads

import reproduce
from datasets.demo_segments import load_demo_segments, shared_film
from datasets.evaluation_set import missing_note
from datasets.fivr import FIVR
from datasets.registry import SEGMENT_SETS, load_segment_set
from datasets.segments import SegmentSet, covered_share, read_segments
from evaluation import main
from features.store import FeatureStore
from model import Mean
from retrieval.encode import VideoEncoder
from retrieval.segments import FrameCache, locate_segments
from utils import InputError

# --- the metric by another route ----------------------------------------------------------------


def share_by_cells(segments, others):
    """Count whole seconds: on each axis, those of a segment in which some other overlaps it."""
    product = 1.0
    for axis in (0, 1):
        covered = total = 0
        for segment in segments:
            for second in range(segment[axis], segment[axis + 2]):
                total += 1
                for other in others:
                    across = 1 - axis
                    start = max(segment[across], other[across])
                    meets = start < min(segment[across + 2], other[across + 2])
                    if meets and other[axis] <= second < other[axis + 2]:
                        covered += 1
                        break
        product *= covered / total if total else 0
    return product


def published_metrics(pairs, labels, predictions):
    """Recall, precision, FRR, FAR of VCSL's paper, from the shares of cells of every pair."""
    recalls, precisions, missed, alarms = [], [], 0, 0
    for pair in pairs:
        truth, found = labels.get(pair, []), predictions.get(pair, [])
        if truth:
            recalls.append(share_by_cells(truth, found))
            missed += not found
        if found:
            precisions.append(share_by_cells(found, truth))
            alarms += not truth
    positive = len(recalls)
    return {
        "recall": np.mean(recalls),
        "precision": np.mean(precisions),
        "FRR": missed / positive,
        "FAR": alarms / (len(pairs) - positive),
    }


def random_segments(rng, count, longest=30):
    segments = []
    for _ in range(count):
        start = rng.integers(0, 40, 2)
        end = start + rng.integers(1, longest, 2)
        segments.append([*start.tolist(), *end.tolist()])
    return segments


@pytest.mark.parametrize("seed", range(20))
def test_covered_share_equals_cells_of_a_grid(seed):
    rng = np.random.default_rng(seed)
    first = random_segments(rng, rng.integers(1, 6))
    second = random_segments(rng, rng.integers(0, 6))
    assert covered_share(first, second) == pytest.approx(share_by_cells(first, second))


def test_covered_share_worked_by_hand():
    label = [[0, 100, 10, 110]]
    assert covered_share(label, label) == 1
    assert covered_share(label, []) == 0
    assert covered_share(label, [[5, 100, 10, 110]]) == pytest.approx(0.5)  # 5 of 10, and all
    assert covered_share(label, [[5, 105, 10, 110]]) == pytest.approx(0.25)
    assert covered_share(label, [[0, 110, 10, 120]]) == 0  # on one axis only
    halves = [[0, 100, 6, 106], [4, 104, 10, 110]]  # overlapping predictions count once
    assert covered_share(label, halves) == 1 and covered_share(halves, label) == 1
    apart = [[0, 0, 4, 4], [6, 6, 10, 10]]  # one prediction over two labelled segments
    assert covered_share(apart, [[0, 0, 10, 10]]) == 1
    assert covered_share([[0, 0, 10, 10]], apart) == pytest.approx(0.8 * 0.8)


def test_covered_share_of_a_segment_without_extent():
    label = [[0, 0, 10, 10]]
    assert covered_share([[3, 3, 3, 3]], label) == 0
    assert covered_share([[3, 3, 3, 8]], label) == 0
    # Beside another it counts on the axis on which it has an extent, as in VCSL's evaluator.
    assert covered_share([[0, 0, 10, 10], [3, 0, 3, 10]], label) == pytest.approx(0.5)


# --- a set --------------------------------------------------------------------------------------

PAIRS = [("a", "b"), ("b", "a"), ("a", "a"), ("c", "d"), ("c", "e"), ("d", "e")]
LABELS = {
    ("a", "b"): [[0, 10, 10, 20], [30, 40, 35, 45]],
    ("b", "a"): [[10, 0, 20, 10]],  # the reversed pair, labelled otherwise
    ("a", "a"): [[0, 0, 60, 60]],
    ("c", "d"): [[5, 5, 9, 12]],
}


@pytest.fixture
def small():
    return SegmentSet(PAIRS, LABELS, "made up")


def test_perfect_prediction_scores_one(small):
    metrics = small.evaluate(LABELS)
    assert metrics == {"recall": 1, "precision": 1, "F1": 1, "FRR": 0, "FAR": 0}


def test_empty_prediction_has_no_precision(small):
    metrics = small.evaluate({})
    assert math.isnan(metrics.pop("precision"))
    assert metrics == {"recall": 0, "F1": 0, "FRR": 1, "FAR": 0}


def test_swapped_axes_score_nothing(small):
    swapped = {}
    for pair, segments in LABELS.items():
        swapped[pair] = [[s[1], s[0], s[3], s[2]] for s in segments]
    metrics = small.evaluate({("a", "b"): swapped["a", "b"], ("b", "a"): swapped["b", "a"]})
    assert metrics["recall"] == metrics["precision"] == metrics["F1"] == 0
    assert metrics["FRR"] == 0.5


def test_pairs_count_once_and_in_their_direction(small):
    twice = SegmentSet([*PAIRS, ("a", "b"), ("a", "a")], LABELS, "made up")
    predictions = {("a", "b"): LABELS["a", "b"], ("a", "a"): [[0, 0, 30, 30]]}
    assert twice.pairs == PAIRS and twice.evaluate(predictions) == small.evaluate(predictions)
    # (b, a) and (c, d) are missed, although (a, b) is found.
    assert small.evaluate(predictions)["recall"] == pytest.approx((1 + 0 + 0.25 + 0) / 4)
    assert small.evaluate(predictions)["FRR"] == 0.5


def test_prediction_in_an_unrelated_pair_is_a_false_alarm(small):
    metrics = small.evaluate(LABELS | {("c", "e"): [[0, 0, 5, 5]], ("x", "y"): [[0, 0, 5, 5]]})
    assert metrics["FAR"] == 0.5 and metrics["precision"] == pytest.approx(4 / 5)
    assert metrics["recall"] == 1


def test_pairs_of_missing_videos_do_not_count(small):
    metrics = small.evaluate({("c", "d"): LABELS["c", "d"]}, available={"c", "d", "e"})
    assert metrics == {"recall": 1, "precision": 1, "F1": 1, "FRR": 0, "FAR": 0}
    coverage = small.coverage({"c", "d", "e"})
    assert (coverage["pairs"], coverage["pairs_missing"]) == (3, 3)
    assert (coverage["videos"], coverage["videos_missing"]) == (3, 2)
    with pytest.raises(InputError, match="no pair"):
        small.evaluate({}, available={"d", "e"})


def test_set_without_unrelated_pairs_has_no_false_alarm_rate():
    positive = SegmentSet(list(LABELS), LABELS, "made up")
    assert list(positive.evaluate(LABELS)) == ["recall", "precision", "F1", "FRR"]


def test_labels_without_extent_are_left_out_and_named():
    labels = {("a", "b"): [[0, 0, 5, 5], [3, 3, 3, 9], [7, 9, 9, 7]], ("c", "d"): [[1, 1, 1, 1]]}
    segment_set = SegmentSet([("a", "b"), ("c", "d")], labels, "made up")
    assert segment_set.labels == {("a", "b"): [[0, 0, 5, 5]]}
    assert "3 segments without extent" in segment_set.source
    assert segment_set.evaluate(segment_set.labels)["F1"] == 1


@pytest.mark.parametrize("seed", range(5))
def test_metrics_equal_the_published_protocol(seed):
    rng = np.random.default_rng(seed)
    pairs, labels, predictions = [], {}, {}
    for i in range(30):
        pairs.append((f"q{i % 7}", f"r{i}"))
        if rng.random() < 0.6:
            labels[pairs[-1]] = random_segments(rng, rng.integers(1, 4))
        if rng.random() < 0.6:
            predictions[pairs[-1]] = random_segments(rng, rng.integers(1, 4))
    metrics = SegmentSet(pairs, labels, "made up").evaluate(predictions)
    expected = published_metrics(pairs, labels, predictions)
    recall, precision = expected["recall"], expected["precision"]
    assert metrics.pop("F1") == pytest.approx(2 * recall * precision / (recall + precision))
    assert metrics == pytest.approx(expected)


# --- files --------------------------------------------------------------------------------------


def write_vcsl(folder, pairs=PAIRS, labels=LABELS):
    lines = ["query_id,reference_id", *(",".join(pair) for pair in pairs)]
    (folder / "vcsl_pairs_test.csv").write_text("\n".join(lines) + "\n")
    table = {"-".join(pair): segments for pair, segments in labels.items()}
    (folder / "vcsl_labels_test.json").write_text(json.dumps(table))


def test_files_of_vcsl_are_read(tmp_path):
    dashed = ("a-b", "c"), ("a", "b-c")  # one key, two pairs
    write_vcsl(tmp_path, [*PAIRS, PAIRS[0], dashed[0]])
    segment_set = load_segment_set("VCSL", tmp_path)
    assert segment_set.pairs == [*PAIRS, dashed[0]]
    assert segment_set.evaluate(LABELS)["F1"] == 1
    assert "vcsl_labels_test.json" in segment_set.source


@pytest.mark.parametrize(
    "labels",
    ["[]", '{"a-b": 5}', '{"a-b": [[1, 2, 3]]}', '{"a-b": [["1", 2, 3, 4]]}', '{"a-b": [5]}', "{"],
)
def test_broken_labels_are_refused(tmp_path, labels):
    write_vcsl(tmp_path)
    (tmp_path / "vcsl_labels_test.json").write_text(labels)
    with pytest.raises(InputError, match="vcsl_labels_test.json"):
        load_segment_set("VCSL", tmp_path)


@pytest.mark.parametrize("pairs", ["", "a,b\n", "query_id,reference_id\nalone\n", "query_id\n"])
def test_broken_pair_list_is_refused(tmp_path, pairs):
    write_vcsl(tmp_path)
    (tmp_path / "vcsl_pairs_test.csv").write_text(pairs)
    with pytest.raises(InputError, match="vcsl_pairs_test.csv"):
        load_segment_set("VCSL", tmp_path)


@pytest.mark.parametrize("name", SEGMENT_SETS)
def test_missing_file_of_a_segment_set_is_named(tmp_path, name):
    with pytest.raises(InputError, match=r"\.(csv|json)"):
        load_segment_set(name, tmp_path)


def test_official_sets_have_their_counts_and_a_ceiling_of_one(annotations):
    vcsl = load_segment_set("VCSL", annotations)
    assert (len(vcsl.pairs), len(vcsl.labels), len(vcsl.videos)) == (55_530, 27_765, 1099)
    assert "46 segments without extent" in vcsl.source
    assert vcsl.evaluate(vcsl.labels) == {
        "recall": 1,
        "precision": 1,
        "F1": 1,
        "FRR": 0,
        "FAR": 0,
    }
    vcdb = load_segment_set("VCDB-SEGMENTS", annotations)
    assert len(vcdb.pairs) == len(vcdb.labels) == 6140
    assert set(vcdb.evaluate(vcdb.labels).values()) == {1, 0}


def test_predicted_segments_are_read(tmp_path, small):
    table = {"a-b": [[0, 1.5, 2, 3]], "c-d": [], "x-y": [[0, 0, 1, 1]], "b-a": [[1, 1, 2, 2]]}
    (tmp_path / "s.json").write_text(json.dumps(table))
    predictions, unknown = read_segments(tmp_path / "s.json", small)
    assert predictions == {
        ("a", "b"): [(0, 1.5, 2, 3)],
        ("b", "a"): [(1, 1, 2, 2)],
        ("c", "d"): [],
    }
    assert unknown == 1


def test_predicted_segments_below_a_score_are_left_out(tmp_path, small):
    table = {"a-b": [[0, 1, 2, 3, 0.5], [4, 5, 6, 7, 0.1]], "c-d": [[0, 0, 1, 1, 0.05]]}
    (tmp_path / "s.json").write_text(json.dumps(table))
    predictions, _ = read_segments(tmp_path / "s.json", small, min_score=0.1)
    assert predictions == {("a", "b"): [(0, 1, 2, 3)], ("c", "d"): []}
    predictions, _ = read_segments(tmp_path / "s.json", small)
    assert len(predictions["a", "b"]) == 2
    (tmp_path / "s.json").write_text('{"a-b": [[0, 1, 2, 3]]}')
    with pytest.raises(InputError, match="'a-b'.*no score"):
        read_segments(tmp_path / "s.json", small, min_score=0.1)


@pytest.mark.parametrize(
    "text, mention",
    [
        ("[]", "VCSL's form"),
        ('{"a-b": [[0, 0, 1, 1]]', "complete"),
        ('{"a-b": {}}', "'a-b'"),
        ('{"a-b": [5]}', "'a-b'"),
        ('{"a-b": [[0, 0, 1]]}', "'a-b'"),
        ('{"a-b": [[0, 0, 1, 1, 1, 1]]}', "'a-b'"),
        ('{"a-b": [["0", 0, 1, 1]]}', "'a-b'"),
        ('{"a-b": [[0, 0, NaN, 1]]}', "'a-b'"),
        ('{"a-b": [[0, 0, 1e999, 1]]}', "'a-b'"),
        ('{"a-b": [[0, 0, 1' + "0" * 400 + ", 1]]}", "'a-b'"),
        ('{"a-b": [[true, 0, 1, 1]]}', "'a-b'"),
        ('{"a-b": [[5, 0, 1, 1]]}', "'a-b'.*before it starts"),
        ('{"a-b": [], "a-b": []}', "twice"),
    ],
)
def test_predicted_segments_of_another_form_are_refused(tmp_path, small, text, mention):
    (tmp_path / "s.json").write_text(text)
    with pytest.raises(InputError, match=f"s.json.*({mention})"):
        read_segments(tmp_path / "s.json", small)


# --- the demo -----------------------------------------------------------------------------------


def facts(*segments):
    """An entry of demo_segments.json from (film start, film end, video start, video end)."""
    entry = []
    for film_start, film_end, start, end in segments:
        entry.append({"film": [film_start, film_end], "video": [start, end], "edits": []})
    return {"segments": entry}


def test_shared_film_at_another_speed_and_in_another_order():
    query = facts((100, 110, 0, 10))
    double = facts((50, 60, 0, 10), (104, 108, 10, 12))  # the excerpt plays at double speed
    assert shared_film(query, double) == ([(4, 10, 8, 12)], 4)
    jumping = facts((106, 108, 0, 2), (101, 103, 2, 4))
    assert shared_film(query, jumping) == ([(6, 0, 8, 2), (1, 2, 3, 4)], 4)
    assert shared_film(query, facts((110, 120, 0, 10))) == ([], 0)


def test_demo_pairs_are_balanced(tmp_path):
    videos = {"q": facts((0, 10, 0, 10)), "copy": facts((0, 10, 0, 8)), "bit": facts((9, 19, 0, 9))}
    videos |= {f"other{i}": facts((50 + i, 60 + i, 0, 10)) for i in range(3)}
    (tmp_path / "demo_segments.json").write_text(json.dumps(videos))
    fivr = FIVR(["q"], list(videos), {"q": {}}, "made up")
    segment_set = load_demo_segments(tmp_path, fivr)
    assert segment_set.pairs == [("q", "copy"), ("q", "other0")]
    assert segment_set.labels == {("q", "copy"): [(0, 0, 10, 8)]}


# --- locating -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """A folder with VCSL's files and features: seconds 5 to 25 of `a` are 30 to 50 of `b`."""
    folder = tmp_path_factory.mktemp("planted")
    rng = np.random.default_rng(0)
    features = {name: rng.normal(size=(60, 1024)).astype(np.float32) for name in "abcd"}
    features["b"][30:50] = features["a"][5:25]
    write_ours(folder / "f.hdf5", features, "float32")
    labels = {("a", "b"): [[5, 30, 25, 50]], ("b", "a"): [[30, 5, 50, 25]]}
    write_vcsl(folder, [("a", "b"), ("b", "a"), ("a", "c"), ("c", "d"), ("a", "gone")], labels)
    return folder


def command(folder, *flags):
    return ["--dataset", "VCSL", "--annotation_dir", folder, *flags]


@pytest.mark.parametrize("aligner", ["align", "tn", "dp"])
def test_command_finds_a_planted_segment(planted, tmp_path, aligner):
    flags = ["--feature_path", planted / "f.hdf5", "--encoder", "mean", "--metric", aligner]
    flags += ["--output", tmp_path / "r.json", "--save_segments", tmp_path / "s.json"]
    result = call(main, *command(planted, *flags))
    assert result.returncode == 0, result.stderr
    record = json.loads((tmp_path / "r.json").read_text())
    assert record["figures"] == {
        f"{aligner}, untrained": [{"recall": 1, "precision": 1, "F1": 1, "FRR": 0, "FAR": 0}]
    }
    assert "4 pairs (1 missing), 2 of them share something" in result.stdout
    saved = json.loads((tmp_path / "s.json").read_text())
    assert saved == {"a-b": [[5, 30, 25, 50]], "b-a": [[30, 5, 50, 25]]}
    # The file that was saved scores the same.
    again = call(main, *command(planted, "--segments", tmp_path / "s.json"))
    assert again.stdout.splitlines()[-1].split()[1:] == ["1.0000"] * 3 + ["0.0000"] * 2


def test_reproduce_reads_and_estimates_rows_of_segments(planted, tmp_path):
    flags = ["--feature_path", planted / "f.hdf5", "--encoder", "mean", "--metric", "align"]
    call(main, *command(planted, *flags, "--output", tmp_path / "r.json"))
    record = json.loads((tmp_path / "r.json").read_text())
    assert reproduce.metrics_and_speed(record) == record["figures"]["align, untrained"]
    assert "20.0% of the pairs (1 of 5)" in missing_note(record["coverage"])
    flags = [str(flag) for flag in command(planted, *flags, "--device", "cpu")]
    arguments = reproduce.evaluation_flags(["evaluation.py", *flags])
    store = FeatureStore(planted / "f.hdf5")
    assert reproduce.alignment_seconds(arguments, Mean(1024), store) > 0


def test_command_scores_a_segment_file_and_counts_what_is_unknown(planted, tmp_path):
    table = {"a-b": [[5, 30, 25, 50, 0.9], [0, 0, 9, 9, 0.1]], "x-y": []}
    (tmp_path / "theirs.json").write_text(json.dumps(table))
    flags = ["--segments", tmp_path / "theirs.json", "--min_score", "0.5"]
    result = call(main, *command(planted, *flags, "--output", tmp_path / "r.json"))
    assert "ignored: 1 pairs" in result.stdout
    figures = json.loads((tmp_path / "r.json").read_text())["figures"]["theirs"][0]
    assert (figures["recall"], figures["precision"]) == (0.5, 1)


def test_features_of_another_rate_are_read_in_seconds(tmp_path):
    rng = np.random.default_rng(1)
    features = {name: rng.normal(size=(80, 64)).astype(np.float32) for name in "ab"}
    features["b"][40:70] = features["a"][10:40]
    write_ours(tmp_path / "f.hdf5", features, "float32", fps="2")
    encoder = VideoEncoder(Mean(64), FeatureStore(tmp_path / "f.hdf5"), padding_size=0)
    located = locate_segments(encoder, [("a", "b")], ["align"])
    assert located == {"align": {("a", "b"): [[5, 20, 20, 35]]}}


def test_cropped_videos_keep_their_seconds(planted):
    encoder = VideoEncoder(Mean(1024), FeatureStore(planted / "f.hdf5"), padding_size=50)
    located = locate_segments(encoder, [("a", "b")], ["align"])  # seconds 5 to 55 of each
    assert located == {"align": {("a", "b"): [[5, 30, 25, 50]]}}


def test_several_processes_locate_what_one_does(planted):
    pairs = [("a", "b"), ("b", "a"), ("a", "c"), ("c", "d")]

    def locate(dist=None):
        encoder = VideoEncoder(Mean(1024), FeatureStore(planted / "f.hdf5"), padding_size=0)
        return locate_segments(encoder, pairs, ["align", "tn"], dist)

    expected = locate()
    assert expected["align"].keys() == {("a", "b"), ("b", "a")}
    assert run_in_threads(3, locate) == [expected] * 3


def test_frame_cache_keeps_those_used_last(planted):
    store = FeatureStore(planted / "f.hdf5")
    cache = FrameCache(VideoEncoder(Mean(1024), store, padding_size=0), 3 * 60 * 1024 * 4)
    for video in "abacad":
        data, start = cache[video]
        assert (len(data), start) == (60, 0)
    assert list(cache.kept) == ["c", "a", "d"]
    tiny = FrameCache(VideoEncoder(Mean(1024), store, padding_size=0), 0)
    assert tiny["a"][0].shape == tiny["b"][0].shape == tiny["c"][0].shape
    assert len(tiny.kept) == 2  # a pair


@pytest.mark.parametrize(
    "flags, mention",
    [
        (["--encoder", "mean"], "--feature_path"),
        (["--metric", "cosine", "--encoder", "mean"], "cosine.*align"),
        (["--rerank", "5", "--encoder", "mean"], "--rerank"),
        (["--similarities", "x"], "--similarities"),
        (["--task", "detection"], "--task"),
        (["--segments", "x", "--metric", "tn"], "--metric"),
        (["--min_score", "1"], "--min_score belongs"),
        (["--searched", "x"], "--searched"),
        (["--encoder", "mean", "--metric", "tn", "dp", "--save_segments", "x"], "one row"),
    ],
)
def test_flags_that_do_not_fit_are_refused(planted, flags, mention):
    if "--encoder" in flags and "--feature_path" not in mention:
        flags = [*flags, "--feature_path", planted / "f.hdf5"]
    assert re.search(mention, refused(main, *command(planted, *flags)))


def test_flags_of_segments_are_refused_for_retrieval(tmp_path):
    for flags in (["--segments", "x"], ["--save_segments", "x"], ["--metric", "align"]):
        message = refused(main, "--dataset", "EVVE", *flags, "--feature_path", "x")
        assert flags[0] in message and "EVVE" in message


def test_features_of_other_videos_are_refused(planted, tmp_path):
    write_ours(tmp_path / "f.hdf5", {"other": np.ones((3, 1024), np.float32)}, "float32")
    flags = ["--feature_path", tmp_path / "f.hdf5", "--encoder", "mean"]
    assert "found 'other'" in refused(main, *command(planted, *flags))


@pytest.mark.parametrize("fps", ["abc", "0", "1/0", "-1", "nan", "9" * 5000])
def test_features_of_a_rate_that_cannot_be_are_refused(tmp_path, fps):
    write_ours(tmp_path / "f.hdf5", {"a": np.ones((2, 8)), "b": np.ones((2, 8))}, fps=fps)
    encoder = VideoEncoder(Mean(8), FeatureStore(tmp_path / "f.hdf5"), padding_size=0)
    with pytest.raises(InputError, match="fps"):
        locate_segments(encoder, [("a", "b")], ["align"])


def test_a_pair_list_splits_at_line_ends_only(tmp_path):
    write_vcsl(tmp_path, [("a\u2028b", "c\x85d")], {("a\u2028b", "c\x85d"): [[0, 0, 1, 1]]})
    assert load_segment_set("VCSL", tmp_path).pairs == [("a\u2028b", "c\x85d")]


def test_segments_of_other_pairs_are_refused(tmp_path, small):
    (tmp_path / "s.json").write_text('{"A-B": [[0, 0, 1, 1]]}')
    with pytest.raises(InputError, match="'a-b'.*'A-B'.*case"):
        read_segments(tmp_path / "s.json", small)


def test_searched_videos_agree_with_the_segments(planted, tmp_path):
    (tmp_path / "s.json").write_text('{"a-b": [[0, 0, 1, 1]], "a-c": [[0, 0, 1, 1]]}')
    flags = command(planted, "--segments", tmp_path / "s.json", "--searched", tmp_path / "ids.txt")
    (tmp_path / "ids.txt").write_text("a\nb\n")
    assert "does not name 'c'" in refused(main, *flags)
    (tmp_path / "ids.txt").write_text("A\nB\n")
    message = refused(main, *flags)
    assert "no pair that shares something has both its videos in" in message
    assert "case, 2 more" in message
    (tmp_path / "ids.txt").write_text("a\nb\nc\n")
    assert "min_score nan" in refused(main, *flags, "--min_score", "nan")
    assert "3 pairs" in call(main, *flags).stdout
