"""Evaluation sets against loops and scikit-learn, and evaluation.py as users run it."""

import json
import pickle

import h5py
import numpy as np
import pytest
import torch
from conftest import C, cli, clis, error_after_progress, make_set, one_error, write_pickle, write_released, write_set
from sklearn.metrics import average_precision_score

from data import EVALUATION_SETS, FIVR, FeatureStore, average_precision, evaluation_set
from evaluation import crop, describe, parse
from model import TCA, Mean
from similarity import METRICS
from utils import InputError

TASKS = {"DSVR": ["ND", "DS"], "CSVR": ["ND", "DS", "CS"], "ISVR": ["ND", "DS", "CS", "IS"]}


# --- scoring ---------------------------------------------------------------------------------------------------------


def by_loop(similarities, annotation, database, available):
    """The protocol of FIELD, one video after another: {task: mAP}."""
    figures = {}
    for task, labels in TASKS.items():
        values = []
        for query, row in similarities.items():
            if query not in annotation:
                continue
            relevant = {v for label in labels for v in annotation[query].get(label, []) if v in available}
            if not relevant:
                continue
            ranked = [v for v in database if v in row and v in available and v != query]
            ranked.sort(key=lambda v: -row[v])  # Python's sort is stable: ties stay in database order
            hits, total = 0, 0.0
            for rank, video in enumerate(ranked, 1):
                if video in relevant:
                    hits += 1
                    total += hits / rank
            values.append(total / len(relevant))
        figures[task] = sum(values) / len(values) if values else float("nan")
    return figures


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


# --- describing ------------------------------------------------------------------------------------------------------


def test_crop_takes_the_middle_and_0_takes_all():
    frames = np.arange(10)
    assert crop(frames, 4).tolist() == [3, 4, 5, 6] and crop(frames, 5).tolist() == [2, 3, 4, 5, 6]
    assert crop(frames, 10).tolist() == crop(frames, 0).tolist() == crop(frames, 300).tolist() == frames.tolist()


@pytest.mark.parametrize("padding_size", [0, 5, 300])
def test_describing_in_batches_equals_one_video_at_a_time_in_the_order_asked_for(world, padding_size):
    store, encoder = FeatureStore(world.test_features), saved_encoder(3)
    videos = sorted(store, key=lambda video: video[::-1])
    for video_level in (True, False):
        found = describe(encoder, store, videos, video_level, padding_size)
        for video, ours in zip(videos, found, strict=True):
            x = torch.from_numpy(crop(store[video], padding_size))[None]
            with torch.no_grad():
                alone = (encoder if video_level else encoder.encode)(x, torch.tensor([x.shape[1]]))[0]
            np.testing.assert_allclose(ours, alone.numpy(), atol=1e-5)


# --- the command -----------------------------------------------------------------------------------------------------


def saved_encoder(seed):
    torch.manual_seed(seed)
    return TCA(C, 4, 1, 64).eval()


@pytest.fixture(scope="module")
def models(world, tmp_path_factory):
    """Three encoders' bare state dicts."""
    folder = tmp_path_factory.mktemp("models")
    for seed in range(3):
        torch.save(saved_encoder(seed).state_dict(), folder / f"{seed}.pth")
    torch.save(TCA(64, 4, 1, 64).state_dict(), folder / "wide.pth")
    return folder


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def brute_figures(encoder, part, metric, padding_size=300):
    """{task: mAP} of one encoder on a world's set, by own loops from the features on."""
    frames, whole = {}, {}
    for video, rows in part.features.items():
        x = torch.from_numpy(crop(rows, padding_size))[None]
        with torch.no_grad():
            out = encoder.frames(x, torch.ones(1, x.shape[1], dtype=torch.bool))[0].double().numpy()
        frames[video], whole[video] = unit(out), unit(out.mean(0))

    def similarity(q, t):
        forth, back = (np.mean((frames[a] @ frames[b].T).max(1)) for a, b in ((q, t), (t, q)))
        return {
            "cosine": whole[q] @ whole[t], "euclidean": -np.linalg.norm(whole[q] - whole[t]),
            "chamfer": forth, "sym_chamfer": (forth + back) / 2,
        }[metric]  # fmt: skip

    table = {q: {v: similarity(q, v) for v in part.database} for q in part.labels}
    return by_loop(table, part.labels, part.database, set(part.features))


def printed(stdout):
    """{row: {column: text}} of the table on the terminal."""
    lines = stdout.splitlines()
    head = next(i for i, line in enumerate(lines) if line.split() == list(TASKS))
    rows = {}
    for line in lines[head + 1 :]:
        name, *cells = line.split("  ")
        cells = [cell.strip() for cell in cells if cell.strip()]
        if len(cells) == 3:
            rows[name] = dict(zip(TASKS, cells, strict=True))
    return rows


ROWS = {"cosine": "TCA_c", "chamfer": "TCA_f", "sym_chamfer": "TCA_sym", "euclidean": "tca, euclidean"}
NAMES = {"cosine": "mean, untrained"} | {m: f"{m}, untrained" for m in ("chamfer", "sym_chamfer", "euclidean")}


@pytest.fixture(scope="module")
def base(world):
    return [
        "evaluation.py",
        "--dataset",
        "DEMO",
        "--feature_path",
        world.test_features,
        "--annotation_dir",
        world.annotations,
    ]


@pytest.fixture(scope="module")
def results(world, models, base, tmp_path_factory):
    """The commands that should work, run once."""
    out = tmp_path_factory.mktemp("results")
    one = ["--model_path", models / "0.pth", "--nhead", 4]
    mean = ["--encoder", "mean", "--metric", *METRICS]
    runs = {
        "one": [*one, "--metric", *METRICS, "--baseline", "cosine", "chamfer", "--output", out / "one.json"],
        "saved": [*one, "--padding_size", 5, "--save_similarities", out / "saved.json"],
        "three": [
            "--model_path",
            *(models / f"{i}.pth" for i in range(3)),
            "--nhead",
            4,
            "--output",
            out / "three.json",
        ],
        "mean": [*mean, "--output", out / "deep" / "mean.json"],
        # the released command's flags, with a width that fits
        "released": [
            *one,
            "-pc",
            C,
            "--num_clusters",
            256,
            "--num_layers",
            1,
            "--output_dim",
            1024,
            "--padding_size",
            300,
        ],
    }
    found = dict(zip(runs, clis(*([*base, *flags] for flags in runs.values())), strict=True))
    for name, result in found.items():
        assert result.returncode == 0, f"{name}: {result.stderr}"
    return out, found


def test_every_metrics_figures_equal_own_loops_from_the_features_on(results, world):
    out, found = results
    figures = json.loads((out / "one.json").read_text())["figures"]
    table = printed(found["one"].stdout)
    assert set(figures) == set(table) == {*ROWS.values(), NAMES["cosine"], NAMES["chamfer"]}
    for metric, row in ROWS.items():
        expected = brute_figures(saved_encoder(0), world.test, metric)
        assert figures[row] == [pytest.approx(expected, abs=1e-6)]
        assert table[row] == {task: f"{value:.4f}" for task, value in expected.items()}


def test_baselines_are_the_untrained_features_own_figures(results, world):
    out, _ = results
    figures = json.loads((out / "one.json").read_text())["figures"]
    for metric in ("cosine", "chamfer"):
        assert figures[NAMES[metric]] == [pytest.approx(brute_figures(Mean(C), world.test, metric), abs=1e-6)]


def test_the_mean_needs_no_model(results, world):
    out, found = results
    figures = json.loads((out / "deep" / "mean.json").read_text())["figures"]
    for metric in METRICS:
        assert figures[NAMES[metric]] == [pytest.approx(brute_figures(Mean(C), world.test, metric), abs=1e-6)]
    assert set(printed(found["mean"].stdout)) == set(NAMES.values())


def test_several_models_give_the_mean_and_the_sample_standard_deviation(results, world):
    out, found = results
    expected = [brute_figures(saved_encoder(seed), world.test, "cosine") for seed in range(3)]
    figures = json.loads((out / "three.json").read_text())["figures"]
    assert figures == {"TCA_c": [pytest.approx(one, abs=1e-6) for one in expected]}
    cells = printed(found["three"].stdout)["TCA_c"]
    for task in TASKS:
        values = [one[task] for one in expected]
        mean = sum(values) / 3
        deviation = (sum((value - mean) ** 2 for value in values) / 2) ** 0.5
        assert cells[task] == f"{mean:.4f} ± {deviation:.4f}"


def test_the_output_holds_what_a_figure_needs_beside_it(results):
    out, _ = results
    found = json.loads((out / "one.json").read_text())
    assert found["dataset"] == "DEMO" and "demo.json" in found["annotation"] and found["padding_size"] == 300
    assert found["command"].startswith("evaluation.py --dataset DEMO") and "--baseline cosine chamfer" in found["command"]
    assert found["revision"] and found["versions"]["torch"] == torch.__version__ and found["machine"]
    assert len(found["models"]) == 1 and found["features"]["path"].endswith("test.hdf5")
    assert found["coverage"] == {
        "queries": 10, "queries_missing": 0, "videos": 80, "videos_missing": 0,
        "queries_without_relevant": {"DSVR": 0, "CSVR": 0, "ISVR": 0},
    }  # fmt: skip


def test_saved_similarities_scored_again_give_the_printed_figures(results, world):
    out, found = results
    saved = json.loads((out / "saved.json").read_text())
    assert list(saved) == list(world.test.labels) and all(set(row) == set(world.test.database) for row in saved.values())
    again = evaluation_set("DEMO", world.annotations).evaluate(saved)
    assert printed(found["saved"].stdout)["TCA_c"] == {task: f"{value:.4f}" for task, value in again.items()}
    expected = brute_figures(saved_encoder(0), world.test, "cosine", padding_size=5)
    assert again == pytest.approx(expected, abs=1e-6)


def test_the_released_commands_flags_change_nothing(results):
    _, found = results
    assert printed(found["released"].stdout)["TCA_c"] == printed(found["one"].stdout)["TCA_c"]


def test_missing_videos_are_counted_and_left_out(world, base, tmp_path):
    part = world.test
    gone = [*list(part.labels)[:2], *[v for v in part.database if v not in part.labels][::5], "q5-1", "q5-2"]
    features = {video: rows for video, rows in part.features.items() if video not in gone}
    path = write_released(tmp_path / "some.hdf5", features)
    flags = ["--feature_path", path, "--encoder", "mean", "--output", tmp_path / "x.json"]
    result = cli(*base, *flags)
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "x.json").read_text())
    missing = len(set(part.database) - set(features))
    assert "8 queries (2 missing)" in result.stdout and f"{80 - missing} videos ({missing} missing)" in result.stdout
    assert found["coverage"]["queries_missing"] == 2 and found["coverage"]["videos_missing"] == missing
    skipped = found["coverage"]["queries_without_relevant"]
    truth = {
        task: sum(
            not any(v in features for label in labels for v in part.labels[q][label]) for q in part.labels if q in features
        )
        for task, labels in TASKS.items()
    }
    assert skipped == truth and truth["DSVR"] >= 1 and "queries skipped" in result.stdout
    rows = {v: unit(x.astype(float).mean(0)) for v, x in features.items()}
    table = {q: {v: rows[q] @ rows[v] for v in part.database if v in features} for q in part.labels if q in features}
    expected = by_loop(table, part.labels, part.database, set(features))
    assert found["figures"]["mean, untrained"] == [pytest.approx(expected, abs=1e-6)]


def test_bad_input_ends_with_status_2_one_line_and_no_output(world, models, base, tmp_path):
    other_ids, _, _ = make_set(np.random.default_rng(0), 3, 3, 5, 0.1)
    strange = write_released(tmp_path / "strange.hdf5", {f"not {video}": rows for video, rows in other_ids.items()})
    with h5py.File(tmp_path / "nan.hdf5", "w") as file:
        for i, (video, rows) in enumerate(world.test.features.items()):
            file[video] = rows if i != 7 else rows * np.nan
    (tmp_path / "text.pth").write_text("no model")
    ours, output = ["--model_path", models / "0.pth", "--nhead", 4], ["--output", tmp_path / "out.json"]
    cases = {
        "unknown dataset": (["--dataset", "FIVR-6K", *ours], "FIVR-6K"),
        "unknown metric": (["--metric", "dice", *ours], "dice"),
        "no annotation folder": (["--annotation_dir", tmp_path / "absent", *ours], "absent"),
        "no features": (["--feature_path", tmp_path / "absent.hdf5", *ours], "absent.hdf5"),
        "features of other ids": (["--feature_path", strange, *ours], "strange.hdf5"),
        "features that are NaN": (["--feature_path", tmp_path / "nan.hdf5", *ours], list(world.test.features)[7]),
        "width asked for": (["--pca_components", 1024, *ours], "1024"),
        "a model of another width": (["--model_path", models / "wide.pth"], "64 channels"),
        "no model": ([], "--model_path"),
        "an absent model": (["--model_path", tmp_path / "absent.pth"], "absent.pth"),
        "a folder without a model": (["--model_path", tmp_path], "model.pth"),
        "a model that is none": (["--model_path", tmp_path / "text.pth"], "text.pth"),
        "heads that do not divide": (["--model_path", models / "0.pth", "--nhead", 5], "--nhead"),
        "the mean with a model": (["--encoder", "mean", *ours], "--encoder"),
        "an unknown flag": (["--colour", "red", *ours], "--colour"),
        "a word for a number": (["--padding_size", "many", *ours], "--padding_size"),
    }
    found = clis(*([*base, *flags, *output] for flags, _ in cases.values()))
    for (name, (_, mention)), result in zip(cases.items(), found, strict=True):
        line = error_after_progress(result) if name == "features that are NaN" else one_error(result)
        assert mention in line, f"{name}: {line}"
    assert not (tmp_path / "out.json").exists()
    assert sorted(item.name for item in tmp_path.iterdir()) == ["nan.hdf5", "strange.hdf5", "text.pth"]


@pytest.mark.parametrize("flag", ["--padding_size", "--nhead"])
def test_a_number_out_of_range_is_refused_by_its_flag(flag):
    with pytest.raises(InputError, match=flag):
        parse(["--dataset", "DEMO", "--feature_path", "x", "--encoder", "mean", flag, "-1"])


def test_help_names_every_flag_and_exits_0():
    result = cli("evaluation.py", "--help")
    assert result.returncode == 0 and not result.stderr
    for flag in (
        "--dataset", "--feature_path", "--model_path", "--encoder", "--metric", "--baseline", "--padding_size", "--device",
        "--annotation_dir", "--output", "--save_similarities", "--pca_components", "--num_clusters", "--num_layers", "--nhead",
    ):  # fmt: skip
        assert flag in result.stdout
