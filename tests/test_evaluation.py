"""Evaluation sets against loops and scikit-learn, and evaluation.py as users run it."""

import json

import h5py
import numpy as np
import pytest
import torch
from conftest import C, by_loop, cli, clis, error_after_progress, make_set, one_error, write_released

from data import FeatureStore
from evaluation import crop, describe, parse
from evaluation_sets import evaluation_set
from model import TCA, Mean
from similarity import METRICS
from utils import InputError

TASKS = {"DSVR": ["ND", "DS"], "CSVR": ["ND", "DS", "CS"], "ISVR": ["ND", "DS", "CS", "IS"]}


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
