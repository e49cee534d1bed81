"""The whole chain on a small cut of the demo: film, videos, features, PCA, training, table, by the commands that users type."""

import json

import numpy as np
import pytest
import torch
from helpers.commands import cli
from sklearn.metrics import average_precision_score
from test_distributed import ENGINES, two


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """Folder of a finished chain, and the evaluation's output."""
    folder = tmp_path_factory.mktemp("chain")
    features, annotations = folder / "{}.hdf5", folder / "annotations"

    def do(script, *arguments):
        result = cli(script, *arguments)
        assert result.returncode == 0, result.stderr
        return result.stdout

    do(
        "datasets/demo/make_demo.py", "build", "--output", folder, "--limit", 17
    )  # two queries with their copies, and a third
    for part in ("train", "val", "test"):
        raw = str(features).format(f"raw-{part}")
        do("pre-processing/extract_features.py", folder / "videos" / part, "--output", raw)
        if part == "train":
            do(
                "pre-processing/pca.py",
                "fit",
                raw,
                "--components",
                64,
                "--output",
                folder / "pca.npz",
            )
        do(
            "pre-processing/pca.py",
            "apply",
            raw,
            "--pca",
            folder / "pca.npz",
            "--output",
            str(features).format(part),
        )
    do(
        *(
            "train.py",
            "--annotation_path",
            annotations / "demo_train.pickle",
            "--feature_path",
            str(features).format("train"),
        ),
        *(
            "--model_path",
            folder / "run",
            "--init",
            "near_identity",
            "--batch_sz",
            4,
            "--neg_num",
            2,
            "--moco_k",
            16,
        ),
        *(
            "--epochs",
            2,
            "--val_set",
            "DEMO-VAL",
            "--val_feature_path",
            str(features).format("val"),
        ),
        *("--annotation_dir", annotations),
    )
    evaluate = ("evaluation.py", "--dataset", "DEMO", "--annotation_dir", annotations)
    evaluate += ("--feature_path", str(features).format("test"))
    table = do(
        *(
            *evaluate,
            "--model_path",
            folder / "run",
            "--metric",
            "cosine",
            "sym_chamfer",
            "chamfer",
        ),
        *("--baseline", "cosine", "chamfer", "--output", folder / "results.json"),
    )
    do(
        *evaluate,
        "--model_path",
        folder / "run",
        "--save_similarities",
        folder / "similarities.json",
    )
    return folder, table


def test_the_chain_ends_with_the_five_rows_of_its_results_file(chain):
    folder, table = chain
    figures = json.loads((folder / "results.json").read_text())["figures"]
    rows = ["mean, untrained", "chamfer, untrained", "TCA_c", "TCA_sym", "TCA_f"]
    assert list(figures) == rows
    printed = [line for line in table.splitlines() if line.startswith(tuple(rows))]
    for row, line in zip(rows, printed, strict=True):
        (result,) = figures[row]
        assert line.removeprefix(row).split() == [
            f"{result[task]:.4f}" for task in ("DSVR", "CSVR", "ISVR")
        ]


def test_the_figure_of_real_video_is_scikit_learns(chain):
    folder, _ = chain
    annotation = json.loads((folder / "annotations" / "demo.json").read_text())
    similarities = json.loads((folder / "similarities.json").read_text())
    scores = []
    for query, labels in annotation.items():
        row = {video: value for video, value in similarities[query].items() if video != query}
        relevant = {*labels["ND"], *labels["DS"]}
        if relevant & set(row):
            scores.append(
                average_precision_score([video in relevant for video in row], list(row.values()))
            )
    assert min(scores) < 1, "a perfect ranking would test nothing"
    (result,) = json.loads((folder / "results.json").read_text())["figures"]["TCA_c"]
    assert result["DSVR"] == pytest.approx(np.mean(scores), abs=1e-6)


@pytest.mark.parametrize("launcher", ENGINES)
def test_by_either_launcher_the_demo_is_learned_as_by_one_process(chain, tmp_path, launcher):
    folder, _ = chain
    flags = [
        "train.py",
        "--annotation_path",
        folder / "annotations" / "demo_train.pickle",
        "--feature_path",
        folder / "train.hdf5",
    ]
    flags += ["--neg_num", 2, "--moco_k", 16, "--epochs", 1, "--dropout", 0, "--optimizer", "sgd"]
    assert (
        cli(
            *flags, "--model_path", tmp_path / "one", "--batch_sz", 4, "--learning_rate", 0.01
        ).returncode
        == 0
    )
    two(
        launcher,
        *flags,
        "--model_path",
        tmp_path / "two",
        "--batch_sz",
        2,
        "--learning_rate",
        0.005,
    )  # times the processes
    one, other = (
        torch.load(tmp_path / run / "model.pth", weights_only=True)["state_dict"]
        for run in ("one", "two")
    )
    assert all(torch.allclose(one[name], other[name], atol=1e-5) for name in one)
