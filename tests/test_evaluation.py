"""evaluation.py as users run it: figures against loops from the features on, several dist, the memory bound, refusals."""

import json
import subprocess
import sys

import h5py
import numpy as np
import pytest
import torch
from helpers.commands import ROOT, cli, clis, environment, error_after_progress, one_error, refused
from helpers.encoders import encode_one_by_one, untrained_tca
from helpers.files import folder_contents, write_packed, write_released
from helpers.oracles import TASKS, by_loop
from helpers.worlds import C, make_set, write_set

from datasets.registry import load_evaluation_set
from evaluation import main
from features.store import FeatureStore
from model import TCA, Mean, NetVLAD
from retrieval.comparator import VideoComparator
from retrieval.encode import crop
from retrieval.report import table_lines
from retrieval.similarity import similarity_table

METRICS = ["cosine", "euclidean", "chamfer", "sym_chamfer"]  # those that the loops below know

# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(world, tmp_path_factory):
    """Three encoders' bare state dicts."""
    folder = tmp_path_factory.mktemp("models")
    for seed in range(3):
        torch.save(untrained_tca(seed).state_dict(), folder / f"{seed}.pth")
    torch.save(TCA(64, 4, 1, 64).state_dict(), folder / "wide.pth")
    torch.save({"encoder": "netvlad", "arguments": (small := dict(feature_size=C, num_clusters=4, output_dim=16)),
                "state_dict": NetVLAD(**small).state_dict()}, folder / "netvlad.pth")  # fmt: skip
    torch.save(VideoComparator().state_dict(), folder / "comparator.pth")
    return folder


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def brute_figures(encoder, part, metric, padding_size=300):
    """{task: mAP} of one encoder on a world's set, by own loops from the features on."""
    frames, whole = {}, {}
    for video, rows in part.features.items():
        x = torch.from_numpy(crop(rows, padding_size))[None]
        with torch.no_grad():
            out = encoder.frame_outputs(x, torch.tensor([x.shape[1]]))[0].double().numpy()
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
    """{row: {column: text}} of the first table on the terminal."""
    lines = stdout.splitlines()
    head = next(i for i, line in enumerate(lines) if line.split() == list(TASKS))
    rows = {}
    for line in lines[head + 1 :]:
        if not line:
            break
        name, *cells = line.split("  ")
        cells = [cell.strip() for cell in cells if cell.strip()]
        if len(cells) == 3:
            rows[name] = dict(zip(TASKS, cells, strict=True))
    return rows


ROWS = {
    "cosine": "TCA_c",
    "chamfer": "TCA_f",
    "sym_chamfer": "TCA_sym",
    "euclidean": "tca, euclidean",
}
EVERY = [*METRICS, "dp", "tn", "comparator"]
NAMES = {"cosine": "mean, untrained"} | {
    m: f"{m}, untrained" for m in ("chamfer", "sym_chamfer", "euclidean")
}


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
        "one": [
            *one,
            "--metric",
            *METRICS,
            "--baseline",
            "cosine",
            "chamfer",
            "--output",
            out / "one.json",
        ],
        "saved": [*one, "--padding_size", 5, "--save_similarities", out / "saved.json"],
        "every": [
            *one,
            "--metric",
            *EVERY,
            "--comparator",
            models / "comparator.pth",
            "--output",
            out / "every.json",
        ],
        "rerank": [
            *one,
            "--rerank",
            4,
            20,
            1000,
            "--metric",
            "sym_chamfer",
            "--plot",
            out / "curve.png",
            "--output",
            out / "rerank.json",
        ],
        "rerank one": [
            *one,
            "--rerank",
            20,
            "--metric",
            "sym_chamfer",
            "--output",
            out / "rerank one.json",
        ],
        "rerank mean": ["--encoder", "mean", "--rerank", 20, "--output", out / "rerank mean.json"],
        "netvlad": ["--model_path", models / "netvlad.pth", "--metric", "euclidean", "cosine"],
        "bfloat16": [
            *one,
            "--metric",
            "cosine",
            "chamfer",
            "--amp",
            "bfloat16",
            "--output",
            out / "bfloat16.json",
        ],
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
        expected = brute_figures(untrained_tca(0), world.test, metric)
        assert figures[row] == [pytest.approx(expected, abs=1e-6)]
        assert table[row] == {task: f"{value:.4f}" for task, value in expected.items()}


def test_baselines_are_the_untrained_features_own_figures(results, world):
    out, _ = results
    figures = json.loads((out / "one.json").read_text())["figures"]
    for metric in ("cosine", "chamfer"):
        assert figures[NAMES[metric]] == [
            pytest.approx(brute_figures(Mean(C), world.test, metric), abs=1e-6)
        ]


def test_the_mean_needs_no_model(results, world):
    out, found = results
    figures = json.loads((out / "deep" / "mean.json").read_text())["figures"]
    for metric in METRICS:
        assert figures[NAMES[metric]] == [
            pytest.approx(brute_figures(Mean(C), world.test, metric), abs=1e-6)
        ]
    assert set(printed(found["mean"].stdout)) == set(NAMES.values())


def test_several_models_give_the_mean_and_the_sample_standard_deviation(results, world):
    out, found = results
    expected = [brute_figures(untrained_tca(seed), world.test, "cosine") for seed in range(3)]
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
    assert (
        found["dataset"] == "DEMO"
        and "demo.json" in found["annotation"]
        and found["padding_size"] == 300
    )
    assert (
        found["command"].startswith("evaluation.py --dataset DEMO")
        and "--baseline cosine chamfer" in found["command"]
    )
    assert (
        found["revision"] and found["versions"]["torch"] == torch.__version__ and found["machine"]
    )
    assert len(found["models"]) == 1 and found["features"]["path"].endswith("test.hdf5")
    assert found["coverage"] == {
        "queries": 10, "queries_missing": 0, "videos": 80, "videos_missing": 0,
        "queries_without_relevant": {"DSVR": 0, "CSVR": 0, "ISVR": 0},
    }  # fmt: skip


def test_saved_similarities_scored_again_give_the_printed_figures(results, world):
    out, found = results
    saved = json.loads((out / "saved.json").read_text())
    assert list(saved) == list(world.test.labels) and all(
        set(row) == set(world.test.database) for row in saved.values()
    )
    again = load_evaluation_set("DEMO", world.annotations).evaluate(saved)
    assert printed(found["saved"].stdout)["TCA_c"] == {
        task: f"{value:.4f}" for task, value in again.items()
    }
    expected = brute_figures(untrained_tca(0), world.test, "cosine", padding_size=5)
    assert again == pytest.approx(expected, abs=1e-6)


def torchrun(count, *arguments):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        count,
        *arguments,
    ]
    return subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_processes_give_the_figures_of_one_to_the_last_bit(results, models, base, tmp_path):
    out, found = results
    flags = [
        "--model_path",
        models / "0.pth",
        "--nhead",
        4,
        "--metric",
        *EVERY,
        "--comparator",
        models / "comparator.pth",
    ]
    result = torchrun(
        2, *base, *flags, "--cache", tmp_path / "cache", "--output", tmp_path / "two.json"
    )
    assert result.returncode == 0, result.stderr
    one, two = (
        json.loads(path.read_text()) for path in (out / "every.json", tmp_path / "two.json")
    )
    assert two["figures"] == one["figures"] and len(one["figures"]) == len(EVERY)
    assert (one["processes"], two["processes"]) == (1, 2) and result.stdout == found["every"].stdout
    again = cli(*base, *flags, "--cache", tmp_path / "cache", "--output", tmp_path / "cached.json")
    assert (
        again.returncode == 0
        and json.loads((tmp_path / "cached.json").read_text())["figures"] == one["figures"]
    )
    assert len(folder_contents(tmp_path / "cache")) == 2


def test_an_error_of_one_process_is_told_once(world, models, base, tmp_path):
    features = {
        video: rows * (np.nan if video == world.test.database[40] else 1)
        for video, rows in world.test.features.items()
    }
    path = write_packed(tmp_path / "nan.hdf5", features)
    result = torchrun(
        2, *base, "--feature_path", path, "--model_path", models / "0.pth", "--nhead", 4
    )
    errors = [
        line for line in result.stderr.splitlines() if "error: " in line and "holds NaN" in line
    ]
    assert result.returncode and len(errors) == 1 and world.test.database[40] in errors[0]


def test_two_stage_figures_equal_own_rankings(results, world):
    out, found = results
    part, encoder = world.test, untrained_tca(0)
    store = FeatureStore(world.test_features)
    described = encode_one_by_one(encoder, store, part.database, "video")
    frames = encode_one_by_one(encoder, store, part.database, "frame")
    figures = json.loads((out / "rerank.json").read_text())["figures"]
    for R in (4, 20, 1000):
        ranks = {}
        for query in part.labels:
            order = sorted(part.database, key=lambda v: -float(described[query] @ described[v]))
            head = order[:R]
            frame = similarity_table([frames[query]], [frames[v] for v in head], "sym_chamfer")[0]
            head = [v for _, v in sorted(zip(-frame, head, strict=True))]
            ranks[query] = {v: -i for i, v in enumerate([*head, *order[R:]])}
        expected = by_loop(ranks, part.labels, part.database, set(part.features))
        assert figures[f"TCA_c, first {R} by TCA_sym"] == [pytest.approx(expected, abs=1e-9)]
    assert figures["TCA_c, first 1000 by TCA_sym"] == figures["TCA_sym"]
    single = json.loads((out / "rerank one.json").read_text())["figures"]
    assert list(single) == ["TCA_c", "TCA_c, first 20 by TCA_sym"]
    assert all(single[row] == figures[row] for row in single)
    assert list(json.loads((out / "rerank mean.json").read_text())["figures"]) == [
        "mean, untrained", "mean, untrained, first 20 by chamfer, untrained"
    ]  # fmt: skip


def test_the_trade_off_goes_from_no_frames_to_all(results, world):
    out, found = results
    (curve,) = json.loads((out / "rerank.json").read_text())["trade_off"].values()
    figures = json.loads((out / "rerank.json").read_text())["figures"]
    assert [line["R"] for line in curve] == [0, 4, 20, 80, 1000]
    costs = [line["cost"] for line in curve]
    assert (
        costs[0] == 0 and costs[3:] == [1, 1] and costs == sorted(costs) and 0.02 < costs[1] < 0.1
    )
    for line in curve:
        assert line["figures"] == figures[line["row"]][0]
        assert line["share"] == pytest.approx(
            line["figures"]["DSVR"] / figures["TCA_sym"][0]["DSVR"]
        )
    saved = brute_recall(untrained_tca(0), world.test, 20)
    (line,) = [line for line in curve if line["R"] == 20]
    assert line["recall"] == pytest.approx(saved) and f"{saved:.1%}" in found["rerank"].stdout
    assert (out / "curve.png").read_bytes().startswith(b"\x89PNG")


def brute_recall(encoder, part, R):
    """The share of DSVR's relevant videos among the first R by cosine, the query itself among them."""
    whole = {}
    for video, rows in part.features.items():
        with torch.no_grad():
            whole[video] = encoder(torch.from_numpy(rows)[None], torch.tensor([len(rows)]))[
                0
            ].numpy()
    shares = []
    for query, labels in part.labels.items():
        relevant = {*labels["ND"], *labels["DS"]}
        order = sorted(part.database, key=lambda v: -float(whole[query] @ whole[v]))
        shares.append(len(relevant & set(order[:R])) / len(relevant))
    return sum(shares) / len(shares)


def test_rows_are_named_for_their_encoder_and_measure(results):
    _, found = results
    assert set(printed(found["every"].stdout)) == {
        *ROWS.values(),
        "tca, dp",
        "tca, tn",
        "tca, comparator",
    }
    assert set(printed(found["netvlad"].stdout)) == {"netvlad, euclidean", "netvlad, cosine"}


def test_bfloat16_moves_figures_little(results):
    out, found = results
    figures, exact = (
        json.loads((out / name).read_text()) for name in ("bfloat16.json", "one.json")
    )
    assert figures["amp"] == "bfloat16" and exact["amp"] is None
    assert figures["figures"]["TCA_f"] != exact["figures"]["TCA_f"]
    for row in ("TCA_c", "TCA_f"):
        assert figures["figures"][row] == [pytest.approx(exact["figures"][row][0], abs=0.02)]


def test_a_table_of_any_system_is_scored_without_a_model(results, world, base, tmp_path):
    out, found = results
    annotation = ["--dataset", "DEMO", "--annotation_dir", world.annotations]
    result = cli(
        "evaluation.py",
        *annotation,
        "--similarities",
        out / "saved.json",
        "--output",
        tmp_path / "again.json",
    )
    assert result.returncode == 0, result.stderr
    assert list(printed(result.stdout).values()) == list(printed(found["saved"].stdout).values())
    table = json.loads((out / "saved.json").read_text())
    table["stranger"] = {}
    next(iter(table.values()))["unknown video"] = 0.5
    (tmp_path / "more.json").write_text(json.dumps(table))
    more = cli("evaluation.py", *annotation, "--similarities", tmp_path / "more.json")
    assert "left aside: 1 queries and 1 videos that the set does not know" in more.stdout
    assert list(printed(more.stdout).values()) == list(printed(result.stdout).values())


def test_region_features_of_other_groups_are_averaged_with_a_notice(world, base, tmp_path):
    regions = {
        v: np.stack([2 * rows, np.zeros_like(rows), rows], 1)
        for v, rows in world.test.features.items()
    }
    flags = ["--features", write_released(tmp_path / "regions.hdf5", regions), "--encoder", "mean"]
    result = cli(*base, *flags)
    assert result.returncode == 0 and "averaged over their regions" in result.stderr
    table = brute_figures(Mean(C), world.test, "cosine")  # the mean of the three is the row itself
    assert printed(result.stdout)["mean, untrained"] == {
        task: f"{value:.4f}" for task, value in table.items()
    }


def test_many_figures_are_printed_one_a_line():
    names = ["mAP", "mAP_events", *(f"event {i}" for i in range(13))]
    lines = table_lines(
        {"TCA_c": [dict.fromkeys(names, 0.25)], "TCA_f": [dict.fromkeys(names, 0.5)] * 2}
    )
    assert lines[0].split() == ["TCA_c", "TCA_f"] and len(lines) == 16 and max(map(len, lines)) < 80
    assert lines[2].split() == ["mAP_events", "0.2500", "0.5000", "±", "0.0000"]
    assert len(table_lines({"TCA_c": [dict.fromkeys(names[:8], 0.25)]})) == 2


def test_memory_stays_under_the_bound_that_is_given(tmp_path):
    """0.6 GiB for 900 videos whose descriptors alone take 0.36, beside some 0.4 of Python and PyTorch."""
    frames, width, names = 210, 512, [f"v{i:04}" for i in range(900)]
    block = np.random.default_rng(0).normal(size=(frames, width)).astype(np.float16)
    path = tmp_path / "large.hdf5"
    with h5py.File(path, "w") as file:
        rows = file.create_dataset("frames", (len(names) * frames, width), "float16")
        for i in range(len(names)):
            rows[i * frames : (i + 1) * frames] = np.roll(block, i, 0)
        file["offsets"], file["ids"] = (
            np.arange(len(names) + 1) * frames,
            np.array(names, h5py.string_dtype()),
        )
    write_set(tmp_path, "demo", {names[0]: {"ND": names[1:3]}, names[5]: {"ND": names[6:9]}}, names)
    flags = [
        "--dataset",
        "DEMO",
        "--annotation_dir",
        tmp_path,
        "--feature_path",
        path,
        "--encoder",
        "mean",
        "--metric",
        "chamfer",
    ]
    # By a process between: a child's peak begins with its parent's, and pytest's own may be larger.
    between = "import resource, subprocess, sys; status = subprocess.call(sys.argv[1:])\n"
    between += (
        "print('peak', resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss); sys.exit(status)"
    )
    done = cli("-c", between, sys.executable, "evaluation.py", *flags, "--memory", "0.6")
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) / 2**20 < 0.6
    line = one_error(cli("evaluation.py", *flags, "--memory", "0.2"))
    assert "--memory 0.2" in line and "or more" in line


def test_every_set_prints_its_table_on_features_of_its_real_ids(annotations, tmp_path):
    draw, commands = np.random.default_rng(0), []
    columns = {"FIVR-5K": 3, "CC_WEB_VIDEO": 4, "EVVE": 15, "VCDB": 1}
    for name in columns:
        chosen = load_evaluation_set(name, annotations)
        videos = list(dict.fromkeys([*chosen.queries, *chosen.database]))
        videos = videos[:5000] if name == "VCDB" else videos
        features = {
            video: draw.normal(size=(1 + i % 2, 8)).astype(np.float16)
            for i, video in enumerate(videos)
        }
        path = write_packed(tmp_path / f"{name}.hdf5", features)
        commands.append(["evaluation.py", "--dataset", name, "--feature_path", path, "--annotation_dir", annotations,
                         "--encoder", "mean", "--output", tmp_path / f"{name}.json"])  # fmt: skip
    for name, result in zip(columns, clis(*commands), strict=True):
        assert result.returncode == 0, result.stderr
        figures = json.loads((tmp_path / f"{name}.json").read_text())["figures"]["mean, untrained"][
            0
        ]
        assert len(figures) == columns[name] and all(
            f"{value:.4f}" in result.stdout for value in figures.values()
        )
        assert ("missing: " in result.stdout and "% of the videos" in result.stdout) == (
            name == "VCDB"
        )


def test_the_released_commands_flags_change_nothing(results):
    _, found = results
    assert printed(found["released"].stdout)["TCA_c"] == printed(found["one"].stdout)["TCA_c"]


def test_missing_videos_are_counted_and_left_out(world, base, tmp_path):
    part = world.test
    gone = [
        *list(part.labels)[:2],
        *[v for v in part.database if v not in part.labels][::5],
        "q5-1",
        "q5-2",
    ]
    features = {video: rows for video, rows in part.features.items() if video not in gone}
    path = write_released(tmp_path / "some.hdf5", features)
    flags = ["--feature_path", path, "--encoder", "mean", "--output", tmp_path / "x.json"]
    result = cli(*base, *flags)
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "x.json").read_text())
    missing = len(set(part.database) - set(features))
    assert (
        "8 queries (2 missing)" in result.stdout
        and f"{80 - missing} videos ({missing} missing)" in result.stdout
    )
    assert (
        found["coverage"]["queries_missing"] == 2 and found["coverage"]["videos_missing"] == missing
    )
    skipped = found["coverage"]["queries_without_relevant"]
    truth = {
        task: sum(
            not any(v in features for label in labels for v in part.labels[q][label])
            for q in part.labels
            if q in features
        )
        for task, labels in TASKS.items()
    }
    assert skipped == truth and truth["DSVR"] >= 1 and "queries skipped" in result.stdout
    rows = {v: unit(x.astype(float).mean(0)) for v, x in features.items()}
    table = {
        q: {v: rows[q] @ rows[v] for v in part.database if v in features}
        for q in part.labels
        if q in features
    }
    expected = by_loop(table, part.labels, part.database, set(features))
    assert found["figures"]["mean, untrained"] == [pytest.approx(expected, abs=1e-6)]


def test_bad_input_ends_with_status_2_one_line_and_no_output(world, models, base, tmp_path):
    other_ids, _, _ = make_set(np.random.default_rng(0), 3, 3, 5, 0.1)
    strange = write_released(
        tmp_path / "strange.hdf5", {f"not {video}": rows for video, rows in other_ids.items()}
    )
    with h5py.File(tmp_path / "nan.hdf5", "w") as file:
        for i, (video, rows) in enumerate(world.test.features.items()):
            file[video] = rows if i != 7 else rows * np.nan
    (tmp_path / "text.pth").write_text("no model")
    ours, output = (
        ["--model_path", models / "0.pth", "--nhead", 4],
        ["--output", tmp_path / "out.json"],
    )
    cases = {
        "unknown dataset": (["--dataset", "FIVR-6K", *ours], "FIVR-6K"),
        "no annotation folder": (["--annotation_dir", tmp_path / "absent", *ours], "absent"),
        "no features": (["--feature_path", tmp_path / "absent.hdf5", *ours], "absent.hdf5"),
        "features of other ids": (["--feature_path", strange, *ours], "strange.hdf5"),
        "features that are NaN": (
            ["--feature_path", tmp_path / "nan.hdf5", *ours],
            list(world.test.features)[7],
        ),
        "width asked for": (["--pca_components", 1024, *ours], "1024"),
        "a model of another width": (["--model_path", models / "wide.pth"], "64 channels"),
        "an absent model": (["--model_path", tmp_path / "absent.pth"], "absent.pth"),
        "a folder without a model": (["--model_path", tmp_path], "model.pth"),
        "a model that is none": (["--model_path", tmp_path / "text.pth"], "text.pth"),
        "heads that do not divide": (["--model_path", models / "0.pth", "--nhead", 5], "--nhead"),
        "the mean with a model": (["--encoder", "mean", *ours], "--encoder"),
        "frame descriptors of an encoder without": (
            ["--model_path", models / "netvlad.pth", "--metric", "chamfer"],
            "NetVLAD",
        ),
        "two stages of an encoder without": (
            ["--model_path", models / "netvlad.pth", "--rerank", 5],
            "NetVLAD",
        ),
        "a comparator that is none": (
            ["--metric", "comparator", "--comparator", models / "0.pth", *ours],
            "0.pth",
        ),
        "too little memory": (["--memory", 0.15, *ours], "--memory"),
        "a word for a number": (["--padding_size", "many", *ours], "--padding_size"),
    }
    found = clis(*([*base, *flags, *output] for flags, _ in cases.values()))
    for (name, (_, mention)), result in zip(cases.items(), found, strict=True):
        line = (
            error_after_progress(result) if name == "features that are NaN" else one_error(result)
        )
        assert mention in line, f"{name}: {line}"
    assert not (tmp_path / "out.json").exists()
    assert sorted(item.name for item in tmp_path.iterdir()) == [
        "nan.hdf5",
        "strange.hdf5",
        "text.pth",
    ]


@pytest.mark.parametrize("flag", ["--padding_size", "--nhead", "--memory"])
def test_a_number_out_of_range_is_refused_by_its_flag(flag):
    assert flag in refused(
        main, "--dataset", "DEMO", "--feature_path", "x", "--encoder", "mean", flag, "-1"
    )


@pytest.mark.parametrize(
    "flags, mention",
    [
        ("--metric dice", "dice"),
        ("--colour red --encoder mean", "--colour"),
        ("", "--model_path"),
        ("--metric comparator --encoder mean", "--comparator"),
        ("--rerank 0 --encoder mean", "--rerank"),
        ("--rerank 5 --plot x.png --encoder mean", "--plot"),
        ("--rerank 5 --save_similarities x.json --encoder mean", "--save_similarities"),
        (
            "--metric cosine chamfer --save_similarities x.json --encoder mean",
            "--save_similarities",
        ),
        ("--similarities x.json --metric cosine", "--similarities"),
        ("--output . --encoder mean", "folder"),
    ],
)
def test_flags_that_do_not_fit_together_are_refused(flags, mention):
    assert mention in refused(main, "--dataset", "DEMO", "--feature_path", "x", *flags.split())


def test_a_bad_table_is_refused(world, tmp_path):
    queries, videos = list(world.test.labels), world.test.database
    good = json.dumps({query: dict.fromkeys(videos, 0.5) for query in queries})
    cases = {
        "{}": "no query",
        '{"a": {"b": 1}}': "can be scored",
        good.replace("0.5", "NaN", 1): queries[0],
        good.replace("0.5", "-Infinity", 1): queries[0],
        good.replace(f'"{videos[1]}"', f'"{videos[0]}"', 1): "twice",
        good[:-20]: "JSON",
        json.dumps({queries[0]: [1, 2]}): queries[0],
    }
    flags = [
        "evaluation.py",
        "--dataset",
        "DEMO",
        "--annotation_dir",
        world.annotations,
        "--output",
        tmp_path / "out.json",
    ]
    for number, text in enumerate(cases):
        (tmp_path / f"{number}.json").write_text(text)
    found = clis(
        *([*flags, "--similarities", tmp_path / f"{number}.json"] for number in range(len(cases)))
    )
    for mention, result in zip(cases.values(), found, strict=True):
        assert mention in one_error(result)
    assert not (tmp_path / "out.json").exists()


def test_help_names_every_flag_and_exits_0():
    result = cli("evaluation.py", "--help")
    assert result.returncode == 0 and not result.stderr
    for flag in (
        "--dataset", "--feature_path", "--features", "--model_path", "--encoder", "--metric", "--baseline", "--padding_size",
        "--comparator", "--rerank", "--memory", "--cache", "--amp", "--device", "--similarities", "--report", "--plot",
        "--annotation_dir", "--output", "--save_similarities", "--pca_components", "--num_clusters", "--num_layers", "--nhead",
    ):  # fmt: skip
        assert flag in result.stdout
