"""evaluation.py: its metrics against loops from the features on, processes, memory, refusals."""

import json
import sys
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
from helpers.commands import (
    call,
    cli,
    error_after_progress,
    one_error,
    python,
    refused,
)
from helpers.encoders import encode_one_by_one, untrained_tca
from helpers.feature_files import folder_contents, write_packed, write_released
from helpers.launchers import finish, launch, run_two
from helpers.oracles import TASKS, fivr_by_loop
from helpers.worlds import C, make_set, write_set

from datasets.registry import load_evaluation_set
from evaluation import main
from features.store import FeatureStore
from model import TCA, Mean, NetVLAD
from retrieval.comparator import VideoComparator
from retrieval.encode import crop
from retrieval.report import table_lines
from retrieval.similarity import similarity_table

BY_LOOP = ["cosine", "euclidean", "chamfer", "sym_chamfer"]  # the metrics of `metrics_by_loop`
TCA_SIZES = dict(feature_size=C, nhead=4, nlayers=1, dim_feedforward=64)
EVERY_METRIC = [*BY_LOOP, "dp", "tn", "comparator"]
TCA_ROWS = {
    "cosine": "TCA_c",
    "chamfer": "TCA_f",
    "sym_chamfer": "TCA_sym",
    "euclidean": "tca, euclidean",
}
MEAN_ROWS = {
    "cosine": "mean, untrained",
    "chamfer": "chamfer, untrained",
    "sym_chamfer": "sym_chamfer, untrained",
    "euclidean": "euclidean, untrained",
}


# --- the commands that should work, run once ----------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with three TCAs as bare state dicts, and other models."""
    folder = tmp_path_factory.mktemp("models")
    for seed in range(3):
        state_dict = untrained_tca(seed).state_dict()
        torch.save(state_dict, folder / f"{seed}.pth")
        settings = {"arguments": {"seed": seed, "loss": "circle"}, "processes": 1}
        state = {"encoder": "tca", "arguments": TCA_SIZES, "settings": settings}
        torch.save(state | {"state_dict": state_dict}, folder / f"seed{seed}.pth")
    torch.save(TCA(64, 4, 1, 64).state_dict(), folder / "wide.pth")
    arguments = dict(feature_size=C, num_clusters=4, output_dim=16)
    netvlad = {"encoder": "netvlad", "arguments": arguments}
    netvlad["state_dict"] = NetVLAD(**arguments).state_dict()
    torch.save(netvlad, folder / "netvlad.pth")
    torch.save(VideoComparator().state_dict(), folder / "comparator.pth")
    return folder


@pytest.fixture(scope="module")
def base(world):
    """The flags that all commands share."""
    flags = ["--dataset", "DEMO", "--feature_path", world.test_features]
    return [*flags, "--annotation_dir", world.annotations, "--device", "cpu"]


@pytest.fixture(scope="module")
def one(models):
    """The flags that score the first TCA."""
    return ["--model_path", models / "0.pth", "--nhead", 4]


@pytest.fixture(scope="module")
def results(models, base, one, tmp_path_factory):
    """{name: what a command printed, and the record that it wrote}."""
    out = tmp_path_factory.mktemp("results")
    three = [models / f"seed{seed}.pth" for seed in range(3)]
    comparator = ["--comparator", models / "comparator.pth"]
    commands = {
        "three seeds": ["--model_path", *three],
        "mean": ["--encoder", "mean", "--metric", *BY_LOOP],
        "saved": [*one, "--padding_size", 5, "--save_similarities", out / "similarities.json"],
        "every metric": [*one, "--metric", *EVERY_METRIC, *comparator],
        "netvlad": ["--model_path", models / "netvlad.pth", "--metric", "euclidean", "cosine"],
        "bfloat16": [*one, "--metric", "cosine", "chamfer", "--amp", "bfloat16"],
        "one R": [*one, "--rerank", 20, "--metric", "sym_chamfer"],
        "several R": [*one, "--rerank", 4, 20, 1000, "--metric", "sym_chamfer"],
        "one R of the mean": ["--encoder", "mean", "--rerank", 20, "--num_layers", 3],
        # The released command's flags, with a size that fits.
        "released": [*one, "-pc", C, "--num_clusters", 256, "--num_layers", 1],
    }
    commands["several R"] += ["--plot", out / "curve.png"]
    commands["released"] += ["--output_dim", 1024, "--padding_size", 300]
    baseline = [*one, "--metric", *BY_LOOP, "--baseline", "cosine", "chamfer"]

    results = {}
    for name, flags in commands.items():
        results[name] = call(main, *base, *flags, "--output", out / f"{name}.json")
    # One command as users run it, with a folder that does not exist yet.
    record = out / "new" / "folder" / "baseline.json"
    results["baseline"] = cli("evaluation.py", *base, *baseline, "--output", record)
    for name, result in results.items():
        assert result.returncode == 0, result.stderr
        path = record if name == "baseline" else out / f"{name}.json"
        result.record = json.loads(path.read_text())
    return SimpleNamespace(folder=out, **{key.replace(" ", "_"): r for key, r in results.items()})


def printed_rows(stdout):
    """{row: {task: text}} of the first table on the terminal."""
    lines = stdout.splitlines()
    head = next(i for i, line in enumerate(lines) if line.split() == list(TASKS))
    rows = {}
    for line in lines[head + 1 :]:
        if not line:
            break
        name, *cells = [part.strip() for part in line.split("  ") if part.strip()]
        if len(cells) == 3:
            rows[name] = dict(zip(TASKS, cells, strict=True))
    return rows


# --- the oracle ---------------------------------------------------------------------------------


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def metrics_by_loop(encoder, part, metric, padding_size=300):
    """{task: mAP} of an encoder on a part of the world, by loops from the features on."""
    frames, whole = {}, {}
    for video, rows in part.features.items():
        x = torch.from_numpy(crop(rows, padding_size))[None]  # (1, T, C)
        with torch.no_grad():
            out = encoder.frame_outputs(x, torch.tensor([x.shape[1]]))[0].double().numpy()
        frames[video], whole[video] = unit(out), unit(out.mean(0))

    def similarity(query, video):
        if metric == "cosine":
            return whole[query] @ whole[video]
        if metric == "euclidean":
            return -np.linalg.norm(whole[query] - whole[video])
        forth = np.mean((frames[query] @ frames[video].T).max(1))
        back = np.mean((frames[video] @ frames[query].T).max(1))
        return forth if metric == "chamfer" else (forth + back) / 2

    table = {}
    for query in part.labels:
        table[query] = {video: similarity(query, video) for video in part.database}
    return fivr_by_loop(table, part.labels, part.database, set(part.features))


# --- metrics ------------------------------------------------------------------------------------


def test_metrics_equal_loops_from_the_features_on(results, world):
    figures = results.baseline.record["figures"]
    printed = printed_rows(results.baseline.stdout)
    expected_rows = {*TCA_ROWS.values(), MEAN_ROWS["cosine"], MEAN_ROWS["chamfer"]}
    assert set(figures) == set(printed) == expected_rows
    for metric, row in TCA_ROWS.items():
        expected = metrics_by_loop(untrained_tca(0), world.test, metric)
        assert figures[row] == [pytest.approx(expected, abs=1e-6)]
        assert printed[row] == {task: f"{value:.4f}" for task, value in expected.items()}


@pytest.mark.parametrize("metric", BY_LOOP)
def test_untrained_features_need_no_model(results, world, metric):
    expected = [pytest.approx(metrics_by_loop(Mean(C), world.test, metric), abs=1e-6)]
    assert results.mean.record["figures"][MEAN_ROWS[metric]] == expected
    if metric in ("cosine", "chamfer"):  # the --baseline beside a model
        assert results.baseline.record["figures"][MEAN_ROWS[metric]] == expected
    assert set(printed_rows(results.mean.stdout)) == set(MEAN_ROWS.values())


def test_several_models_print_mean_and_sample_deviation(results, world):
    expected = [metrics_by_loop(untrained_tca(seed), world.test, "cosine") for seed in range(3)]
    figures = results.three_seeds.record["figures"]
    assert figures == {"TCA_c": [pytest.approx(metrics, abs=1e-6) for metrics in expected]}
    cells = printed_rows(results.three_seeds.stdout)["TCA_c"]
    for task in TASKS:
        values = [metrics[task] for metrics in expected]
        mean = sum(values) / 3
        deviation = (sum((value - mean) ** 2 for value in values) / 2) ** 0.5
        assert cells[task] == f"{mean:.4f} ± {deviation:.4f}"


def test_rows_are_named_by_encoder_and_metric(results):
    others = {"tca, dp", "tca, tn", "tca, comparator"}
    assert set(printed_rows(results.every_metric.stdout)) == {*TCA_ROWS.values(), *others}
    assert set(printed_rows(results.netvlad.stdout)) == {"netvlad, euclidean", "netvlad, cosine"}


def test_bfloat16_changes_metrics_little(results):
    fast, exact = results.bfloat16.record, results.baseline.record
    assert fast["amp"] == "bfloat16" and exact["amp"] is None
    rows = ("TCA_c", "TCA_f")  # a small set's figures can stay the same in one of them
    assert any(fast["figures"][row] != exact["figures"][row] for row in rows)
    for row in ("TCA_c", "TCA_f"):
        assert fast["figures"][row] == [pytest.approx(exact["figures"][row][0], abs=0.02)]


def test_flags_of_the_released_command_change_nothing(results):
    assert (
        printed_rows(results.released.stdout)["TCA_c"]
        == (printed_rows(results.baseline.stdout)["TCA_c"])
    )
    assert "note: --num_clusters, --num_layers, --output_dim" in results.released.stderr


def test_note_on_an_unused_flag_names_no_model_file_where_there_is_none(results):
    note = "note: --num_layers changes nothing: no model is evaluated\n"
    assert note in results.one_R_of_the_mean.stderr


def test_region_features_are_averaged_with_a_warning(world, base, tmp_path):
    regions = {}
    for video, rows in world.test.features.items():
        regions[video] = np.stack([2 * rows, np.zeros_like(rows), rows], 1)  # mean: the row itself
    path = write_released(tmp_path / "regions.hdf5", regions)
    result = call(main, *base, "--features", path, "--encoder", "mean")
    assert "averaged over their regions" in result.stderr
    expected = metrics_by_loop(Mean(C), world.test, "cosine")
    assert printed_rows(result.stdout)["mean, untrained"] == {
        task: f"{value:.4f}" for task, value in expected.items()
    }


# --- what is printed and written ----------------------------------------------------------------


def test_record_has_what_a_figure_needs_beside_it(results):
    record = results.baseline.record
    assert record["dataset"] == "DEMO" and "demo.json" in record["annotation"]
    assert record["command"].startswith("evaluation.py --dataset DEMO")
    assert "--baseline cosine chamfer" in record["command"]
    assert record["padding_size"] == 300 and record["processes"] == 1
    assert record["revision"] and record["machine"]
    assert record["versions"]["torch"] == torch.__version__
    assert len(record["models"]) == 1 and record["features"]["path"].endswith("test.hdf5")
    assert all(seconds[0] > 0 for seconds in record["compare_seconds"].values())
    assert record["coverage"] == {
        "queries": 10,
        "queries_missing": 0,
        "videos": 80,
        "videos_missing": 0,
        "queries_without_relevant": {"DSVR": 0, "CSVR": 0, "ISVR": 0},
    }


def test_table_with_many_metrics_is_printed_with_a_line_for_each():
    names = ["mAP", "mAP_events", *(f"event {i}" for i in range(13))]
    lines = table_lines(
        {"TCA_c": [dict.fromkeys(names, 0.25)], "TCA_f": [dict.fromkeys(names, 0.5)] * 2}
    )
    assert lines[0].split() == ["TCA_c", "TCA_f"] and len(lines) == 16
    assert lines[2].split() == ["mAP_events", "0.2500", "0.5000", "±", "0.0000"]
    assert max(map(len, lines)) < 80
    assert len(table_lines({"TCA_c": [dict.fromkeys(names[:8], 0.25)]})) == 2


def test_missing_videos_are_counted_and_left_out(world, base, tmp_path):
    part = world.test
    gone = {"q5-1", "q5-2", *list(part.labels)[:2]}
    gone.update([video for video in part.database if video not in part.labels][::5])
    features = {video: rows for video, rows in part.features.items() if video not in gone}
    path = write_released(tmp_path / "some.hdf5", features)
    flags = ["--feature_path", path, "--encoder", "mean", "--output", tmp_path / "x.json"]
    result = call(main, *base, *flags)
    record = json.loads((tmp_path / "x.json").read_text())
    missing = len(set(part.database) - set(features))
    assert "8 queries (2 missing)" in result.stdout
    assert f"{80 - missing} videos ({missing} missing)" in result.stdout
    assert record["coverage"]["queries_missing"] == 2
    assert record["coverage"]["videos_missing"] == missing

    queries = [query for query in part.labels if query in features]
    skipped = {}
    for task, labels in TASKS.items():
        skipped[task] = 0
        for query in queries:
            relevant = [video for label in labels for video in part.labels[query][label]]
            skipped[task] += not any(video in features for video in relevant)
    assert record["coverage"]["queries_without_relevant"] == skipped
    counts = ", ".join(f"{task} {count}" for task, count in skipped.items() if count)
    assert skipped["DSVR"] >= 1
    assert f"queries skipped because no relevant video has features: {counts}\n" in result.stdout

    whole = {video: unit(rows.astype(float).mean(0)) for video, rows in features.items()}
    table = {query: {v: whole[query] @ whole[v] for v in features} for query in queries}
    expected = fivr_by_loop(table, part.labels, part.database, set(features))
    assert record["figures"]["mean, untrained"] == [pytest.approx(expected, abs=1e-6)]


@pytest.mark.parametrize(
    "name, columns", [("FIVR-5K", 3), ("CC_WEB_VIDEO", 4), ("EVVE", 15), ("VCDB", 1)]
)
def test_official_set_is_scored_on_features_of_its_ids(annotations, tmp_path, name, columns):
    rng = np.random.default_rng(0)
    evaluation_set = load_evaluation_set(name, annotations)
    videos = list(dict.fromkeys([*evaluation_set.queries, *evaluation_set.database]))
    if name == "VCDB":
        videos = videos[:5000]  # of 100,306
    features = {}
    for i, video in enumerate(videos):
        features[video] = rng.normal(size=(1 + i % 2, 8)).astype(np.float16)
    path = write_packed(tmp_path / "x.hdf5", features)
    flags = ["--dataset", name, "--feature_path", path, "--annotation_dir", annotations]
    flags += ["--encoder", "mean", "--device", "cpu", "--output", tmp_path / "x.json"]
    result = call(main, *flags)
    (metrics,) = json.loads((tmp_path / "x.json").read_text())["figures"]["mean, untrained"]
    assert len(metrics) == columns
    assert all(f"{value:.4f}" in result.stdout for value in metrics.values())
    noted = "missing: " in result.stdout and "% of the videos" in result.stdout
    assert noted == (name == "VCDB")


def test_help_names_every_flag(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["--help"])
    assert exit.value.code == 0
    printed = capsys.readouterr()
    assert not printed.err
    flags = ["--dataset", "--feature_path", "--features", "--model_path", "--encoder", "--metric"]
    flags += [
        "--baseline",
        "--similarities",
        "--searched",
        "--annotation_dir",
        "--comparator",
        "--rerank",
    ]
    flags += ["--padding_size", "--memory", "--cache", "--amp", "--device", "--pca_components"]
    flags += ["--nhead", "--num_clusters", "--num_layers", "--output_dim", "--output", "--report"]
    flags += ["--plot", "--save_similarities"]
    assert all(flag in printed.out for flag in flags)


# --- similarities of any system -----------------------------------------------------------------


@pytest.fixture(scope="module")
def annotation(world):
    return ["--dataset", "DEMO", "--annotation_dir", world.annotations]


def test_saved_similarities_give_the_printed_metrics(results, world):
    saved = json.loads((results.folder / "similarities.json").read_text())
    assert list(saved) == list(world.test.labels)
    assert all(set(row) == set(world.test.database) for row in saved.values())
    metrics = load_evaluation_set("DEMO", world.annotations).evaluate(saved)
    expected = metrics_by_loop(untrained_tca(0), world.test, "cosine", padding_size=5)
    assert metrics == pytest.approx(expected, abs=1e-6)
    assert printed_rows(results.saved.stdout)["TCA_c"] == {
        task: f"{value:.4f}" for task, value in metrics.items()
    }


def test_similarity_file_is_scored_without_model_and_features(results, annotation, tmp_path):
    path = results.folder / "similarities.json"
    expected = list(printed_rows(results.saved.stdout).values())
    result = call(main, *annotation, "--similarities", path, "--output", tmp_path / "x.json")
    assert list(printed_rows(result.stdout).values()) == expected
    record = json.loads((tmp_path / "x.json").read_text())
    assert list(record["figures"]) == ["similarities"]

    table = json.loads(path.read_text())
    table["unknown query"] = {}
    next(iter(table.values()))["unknown video"] = 0.5
    (tmp_path / "more.json").write_text(json.dumps(table))
    result = call(main, *annotation, "--similarities", tmp_path / "more.json")
    assert "ignored: 1 queries and 1 videos that the set does not contain" in result.stdout
    assert list(printed_rows(result.stdout).values()) == expected


def test_bad_similarity_file_is_refused(world, annotation, tmp_path):
    queries, videos = list(world.test.labels), world.test.database
    good = json.dumps({query: dict.fromkeys(videos, 0.5) for query in queries})
    cases = {
        "{}": "no query",
        '{"a": {"b": 1}}': "has no query",
        good.replace("0.5", "NaN", 1): queries[0],
        good.replace("0.5", "-Infinity", 1): queries[0],
        good.replace(f'"{videos[1]}"', f'"{videos[0]}"', 1): "twice",
        good[:-20]: "JSON",
        json.dumps({queries[0]: [1, 2]}): queries[0],
    }
    output = ["--output", tmp_path / "out.json"]
    for text, mention in cases.items():
        (tmp_path / "table.json").write_text(text)
        flags = [*annotation, "--similarities", tmp_path / "table.json", *output]
        assert mention in refused(main, *flags)
    assert not (tmp_path / "out.json").exists()


# --- two stages ---------------------------------------------------------------------------------


@pytest.mark.parametrize("R", [4, 20, 1000])
def test_two_stage_metrics_equal_rankings_by_loops(results, world, R):
    part, encoder, store = world.test, untrained_tca(0), FeatureStore(world.test_features)
    whole = encode_one_by_one(encoder, store, part.database, "video")
    frames = encode_one_by_one(encoder, store, part.database, "frame")
    ranks = {}
    for query in part.labels:
        order = sorted(part.database, key=lambda v, q=query: -float(whole[q] @ whole[v]))
        head, tail = order[:R], order[R:]
        by_frames = similarity_table([frames[query]], [frames[v] for v in head], "sym_chamfer")[0]
        head = [video for _, video in sorted(zip(-by_frames, head, strict=True))]
        ranks[query] = {video: -i for i, video in enumerate([*head, *tail])}
    expected = fivr_by_loop(ranks, part.labels, part.database, set(part.features))
    figures = results.several_R.record["figures"]
    assert figures[f"TCA_c, first {R} by TCA_sym"] == [pytest.approx(expected, abs=1e-9)]


def test_two_stage_rows(results):
    several = results.several_R.record["figures"]
    assert several["TCA_c, first 1000 by TCA_sym"] == several["TCA_sym"]  # all 80 videos
    single = results.one_R.record["figures"]
    assert list(single) == ["TCA_c", "TCA_c, first 20 by TCA_sym"]
    assert all(single[row] == several[row] for row in single)
    mean = results.one_R_of_the_mean.record["figures"]
    second = "mean, untrained, first 20 by chamfer, untrained"
    assert list(mean) == ["mean, untrained", second]


def test_trade_off_goes_from_no_frames_to_all(results, world):
    record = results.several_R.record
    (curve,) = record["trade_off"].values()
    assert [line["R"] for line in curve] == [0, 4, 20, 80, 1000]
    costs = [line["cost"] for line in curve]
    assert costs[0] == 0 and costs[3:] == [1, 1] and costs == sorted(costs)
    assert 0.02 < costs[1] < 0.1  # 4 of 80 videos
    exhaustive = record["figures"]["TCA_sym"][0]["DSVR"]
    for line in curve:
        assert line["figures"] == record["figures"][line["row"]][0]
        assert line["share"] == pytest.approx(line["figures"]["DSVR"] / exhaustive)
    recall = recall_by_loop(untrained_tca(0), world.test, 20)
    assert curve[2]["recall"] == pytest.approx(recall)
    assert f"{recall:.1%}" in results.several_R.stdout
    assert (results.folder / "curve.png").read_bytes().startswith(b"\x89PNG")


def recall_by_loop(encoder, part, R):
    """The share of DSVR's relevant videos among the first R by cosine, the query counted."""
    whole = {}
    for video, rows in part.features.items():
        with torch.no_grad():
            whole[video] = encoder(torch.from_numpy(rows)[None], torch.tensor([len(rows)]))[0]
    shares = []
    for query, labels in part.labels.items():
        relevant = {*labels["ND"], *labels["DS"]}
        order = sorted(part.database, key=lambda v, q=query: -float(whole[q] @ whole[v]))
        shares.append(len(relevant & set(order[:R])) / len(relevant))
    return sum(shares) / len(shares)


# --- several processes, memory ------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.distributed
def test_processes_and_cache_give_the_figures_of_one_process(results, models, base, one, tmp_path):
    """To the last bit, by every metric."""
    flags = [*base, *one, "--metric", *EVERY_METRIC, "--comparator", models / "comparator.pth"]
    flags += ["--cache", tmp_path / "cache", "--output"]
    result = run_two("torchrun", "evaluation.py", *flags, tmp_path / "two.json")
    two = json.loads((tmp_path / "two.json").read_text())
    expected = results.every_metric.record
    assert two["figures"] == expected["figures"] and len(two["figures"]) == len(EVERY_METRIC)
    assert (two["processes"], expected["processes"]) == (2, 1)
    assert result.stdout == results.every_metric.stdout

    call(main, *flags, tmp_path / "cached.json")  # reads what the two processes stored
    cached = json.loads((tmp_path / "cached.json").read_text())
    assert cached["figures"] == expected["figures"]
    assert len(folder_contents(tmp_path / "cache")) == 2


@pytest.mark.slow
@pytest.mark.distributed
def test_error_of_one_process_is_printed_once(world, base, one, tmp_path):
    bad = world.test.database[40]
    features = dict(world.test.features)
    features[bad] = features[bad] * np.nan
    path = write_packed(tmp_path / "nan.hdf5", features)
    result = finish(launch("torchrun", "evaluation.py", *base, *one, "--feature_path", path))
    errors = [line for line in result.stderr.splitlines() if "error: " in line]
    errors = [line for line in errors if "holds NaN" in line]
    assert result.returncode and len(errors) == 1 and bad in errors[0]


@pytest.mark.slow
def test_memory_stays_under_the_given_bound(tmp_path):
    """0.37 GiB beside what PyTorch takes, for 900 videos whose descriptors alone take 0.36."""
    T, size, videos = 210, 512, [f"v{i:04}" for i in range(900)]
    block = np.random.default_rng(0).normal(size=(T, size)).astype(np.float16)
    path = tmp_path / "large.hdf5"
    with h5py.File(path, "w") as file:
        rows = file.create_dataset("frames", (len(videos) * T, size), "float16")
        for i in range(len(videos)):
            rows[i * T : (i + 1) * T] = np.roll(block, i, 0)
        file["offsets"] = np.arange(len(videos) + 1) * T
        file["ids"] = np.array(videos, h5py.string_dtype())
    annotation = {videos[0]: {"ND": videos[1:3]}, videos[5]: {"ND": videos[6:9]}}
    write_set(tmp_path, "demo", annotation, videos)
    flags = ["--dataset", "DEMO", "--annotation_dir", tmp_path, "--feature_path", path]
    flags += ["--encoder", "mean", "--metric", "chamfer", "--device", "cpu"]
    own = "import evaluation; from retrieval.encode import resident_bytes; print(resident_bytes())"
    memory = int(python(own).stdout) / 2**30 + 0.37
    # A child's peak begins with its parent's, and pytest's may be larger: a process in between.
    code = "import resource, subprocess, sys; status = subprocess.call(sys.argv[1:])\n"
    code += "peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss\n"
    code += "print('peak', peak); sys.exit(status)"
    result = python(code, sys.executable, "evaluation.py", *flags, "--memory", memory)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout.split()[-1]) / 2**20 < memory
    line = one_error(cli("evaluation.py", *flags, "--memory", "0.2"))
    assert "--memory 0.2" in line and "or more" in line


# --- refusals -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def broken(world, tmp_path_factory):
    """A folder with files that cannot be used."""
    folder = tmp_path_factory.mktemp("broken")
    features, _, _ = make_set(np.random.default_rng(0), 3, 3, 5, 0.1)
    other_ids = {f"not {video}": rows for video, rows in features.items()}
    write_released(folder / "other.hdf5", other_ids)
    features = dict(world.test.features)
    bad = list(features)[7]
    features[bad] = features[bad] * np.nan
    write_released(folder / "nan.hdf5", features)
    (folder / "text.pth").write_text("no model")
    return folder


REFUSALS = {  # name: (flags, what the message names); {} are filled in below
    "unknown dataset": ("{one} --dataset FIVR-6K", "FIVR-6K"),
    "no annotation folder": ("{one} --annotation_dir {broken}/absent", "absent"),
    "no features": ("{one} --feature_path {broken}/absent.hdf5", "absent.hdf5"),
    "features of other ids": ("{one} --feature_path {broken}/other.hdf5", "other.hdf5"),
    "features of another size": ("{one} --pca_components 1024", "1024"),
    "model of another size": ("--model_path {models}/wide.pth", "64 channels"),
    "absent model": ("--model_path {broken}/absent.pth", "absent.pth"),
    "folder without a model": ("--model_path {broken}", "model.pth"),
    "model file without a model": ("--model_path {broken}/text.pth", "text.pth"),
    "heads that do not divide": ("--model_path {models}/0.pth --nhead 5", "--nhead"),
    "model with --encoder mean": ("{one} --encoder mean", "--encoder"),
    "frames of netvlad": ("--model_path {models}/netvlad.pth --metric chamfer", "NetVLAD"),
    "two stages of netvlad": ("--model_path {models}/netvlad.pth --rerank 5", "NetVLAD"),
    "no comparator": ("{one} --metric comparator --comparator {models}/0.pth", "0.pth"),
    "word for a number": ("{one} --padding_size many", "--padding_size"),
    "negative padding": ("{one} --padding_size -1", "--padding_size"),
    "negative heads": ("{one} --nhead -1", "--nhead"),
    "negative memory": ("{one} --memory -1", "--memory"),
    "unknown metric": ("--metric dice", "dice"),
    "unknown flag": ("--colour red --encoder mean", "--colour"),
    "nothing to score": ("", "--model_path"),
    "metric without its weights": ("--metric comparator --encoder mean", "--comparator"),
    "empty shortlists": ("--rerank 0 --encoder mean", "--rerank"),
    "plot of one R": ("--rerank 5 --plot x.png --encoder mean", "--plot"),
    "two tables for one file": (
        "--metric cosine chamfer --save_similarities x.json --encoder mean",
        "--save_similarities",
    ),
    "two stages for one file": (
        "--rerank 5 --save_similarities x.json --encoder mean",
        "--save_similarities",
    ),
    "model beside a table": ("--similarities x.json --metric cosine", "--similarities"),
    "searched ids beside features": ("--searched x.txt --encoder mean", "--similarities"),
    "folder for a file": ("--output . --encoder mean", "folder"),
}


@pytest.mark.parametrize("flags, mention", REFUSALS.values(), ids=REFUSALS)
def test_bad_input_is_refused_and_nothing_written(base, models, broken, tmp_path, flags, mention):
    one = f"--model_path {models}/0.pth --nhead 4"
    flags = flags.format(one=one, models=models, broken=broken).split()
    output = [] if "--output" in flags else ["--output", tmp_path / "out.json"]
    assert mention in refused(main, *base, *output, *flags)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_command_line_reports_an_error_in_one_line(world, base, one, broken):
    assert "--memory" in one_error(cli("evaluation.py", *base, *one, "--memory", 0.15))
    result = cli("evaluation.py", *base, *one, "--feature_path", broken / "nan.hdf5")
    assert list(world.test.features)[7] in error_after_progress(result)
