"""The whole chain on a small cut of the demo: film, videos, features, PCA, training, table."""

import json

import numpy as np
import pytest
from helpers.commands import cli
from helpers.launchers import ENGINES, run_two
from helpers.training import weights
from sklearn.metrics import average_precision_score

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """(folder, the evaluation's output) of a chain run by the commands that users type."""
    folder = tmp_path_factory.mktemp("chain")

    def call(script, *arguments):
        result = cli(script, *arguments)
        assert result.returncode == 0, result.stderr
        return result.stdout

    # 17 videos: two queries with their copies, and a third query
    call("datasets/demo/make_demo.py", "build", "--output", folder, "--limit", 17)
    pca = folder / "pca.npz"
    for part in ("train", "val", "test"):
        raw, features = folder / f"raw-{part}.hdf5", folder / f"{part}.hdf5"
        call("pre-processing/extract_features.py", folder / "videos" / part, "--output", raw)
        if part == "train":
            call("pre-processing/pca.py", "fit", raw, "--components", 64, "--output", pca)
        call("pre-processing/pca.py", "apply", raw, "--pca", pca, "--output", features)

    annotations = folder / "annotations"
    train = ["--annotation_path", annotations / "demo_train.pickle"]
    train += ["--feature_path", folder / "train.hdf5", "--model_path", folder / "run"]
    train += ["--init", "near_identity", "--batch_sz", 4, "--neg_num", 2, "--moco_k", 16]
    train += ["--epochs", 2, "--val_set", "DEMO-VAL", "--annotation_dir", annotations]
    call("train.py", *train, "--val_feature_path", folder / "val.hdf5")

    evaluate = ["--dataset", "DEMO", "--annotation_dir", annotations]
    evaluate += ["--feature_path", folder / "test.hdf5", "--model_path", folder / "run"]
    metrics = ["--metric", "cosine", "sym_chamfer", "chamfer", "--baseline", "cosine", "chamfer"]
    table = call("evaluation.py", *evaluate, *metrics, "--output", folder / "results.json")
    call("evaluation.py", *evaluate, "--save_similarities", folder / "similarities.json")
    return folder, table


def test_chain_prints_the_five_rows_of_its_results_file(chain):
    folder, table = chain
    results = json.loads((folder / "results.json").read_text())["figures"]
    rows = ["mean, untrained", "chamfer, untrained", "TCA_c", "TCA_sym", "TCA_f"]
    assert list(results) == rows
    printed = [line for line in table.splitlines() if line.startswith(tuple(rows))]
    for row, line in zip(rows, printed, strict=True):
        (metrics,) = results[row]
        expected = [f"{metrics[task]:.4f}" for task in ("DSVR", "CSVR", "ISVR")]
        assert line.removeprefix(row).split() == expected


def test_chain_map_of_real_video_is_scikit_learns(chain):
    folder, _ = chain
    annotation = json.loads((folder / "annotations" / "demo.json").read_text())
    similarities = json.loads((folder / "similarities.json").read_text())
    scores = []
    for query, labels in annotation.items():
        row = {video: value for video, value in similarities[query].items() if video != query}
        relevant = {*labels["ND"], *labels["DS"]}
        if relevant & set(row):
            truth = [video in relevant for video in row]
            scores.append(average_precision_score(truth, list(row.values())))
    assert min(scores) < 1, "a perfect ranking would test nothing"
    (metrics,) = json.loads((folder / "results.json").read_text())["figures"]["TCA_c"]
    assert metrics["DSVR"] == pytest.approx(np.mean(scores), abs=1e-6)


@pytest.mark.distributed
@pytest.mark.parametrize("launcher", ENGINES)
def test_chain_two_processes_learn_the_demo_like_one(chain, tmp_path, launcher):
    folder, _ = chain
    train = ["train.py", "--annotation_path", folder / "annotations" / "demo_train.pickle"]
    train += ["--feature_path", folder / "train.hdf5", "--neg_num", 2, "--moco_k", 16]
    train += ["--epochs", 1, "--dropout", 0, "--optimizer", "sgd", "--device", "cpu"]
    one = ["--model_path", tmp_path / "one", "--batch_sz", 4, "--learning_rate", 0.01]
    two = ["--model_path", tmp_path / "two", "--batch_sz", 2, "--learning_rate", 0.005]
    assert cli(*train, *one).returncode == 0
    run_two(launcher, *train, *two)  # its learning rate is scaled by 2
    found, expected = weights(tmp_path / "two"), weights(tmp_path / "one")
    assert all(np.allclose(expected[name], found[name], atol=1e-5) for name in expected)
