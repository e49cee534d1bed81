"""Rows of zeros, and rows that changed since they were written: refused or counted, by name."""

import json
import multiprocessing
import re

import convert
import h5py
import numpy as np
import pca
import pytest
from helpers.commands import call, refused
from helpers.feature_files import some_features, write_ours, write_released
from helpers.training import main as train
from helpers.training import run, train_flags

from evaluation import main as evaluate
from features.store import FeatureStore, StoreWriter
from utils import InputError

IDS = [f"v{i}" for i in range(9)]
FAULTS = {"zeros": "holds nothing but zeros", "changed": "has other rows than were written"}


def damage(path, videos, fault):
    """Zero the rows of these videos of a file by StoreWriter, or change a value of each."""
    with h5py.File(path, "r") as file:
        frames, offsets, ids = file["frames"], file["offsets"][:], file["ids"].asstr()[:]
        place = frames.dtype, "r+", frames.id.get_offset(), frames.shape
    rows = np.memmap(path, *place)  # HDF5 would refuse a file that is open elsewhere
    for video, begin, end in zip(ids, offsets[:-1], offsets[1:], strict=True):
        if video in videos and fault == "zeros":
            rows[begin:end] = 0
        elif video in videos:
            rows[end - 1, -1] += 0.25
    rows.flush()
    return path


def evaluation_flags(world, path):
    flags = ["--dataset", "DEMO", "--annotation_dir", world.annotations, "--device", "cpu"]
    return [*flags, "--feature_path", path, "--encoder", "mean"]


@pytest.mark.parametrize("fault", FAULTS)
def test_evaluation_refuses_bad_rows_and_names_the_videos(world, tmp_path, fault):
    path = write_ours(tmp_path / "x.hdf5", world.test.features)
    output = ["--output", tmp_path / "out.json"]
    assert call(evaluate, *evaluation_flags(world, path), *output).returncode == 0
    bad = sorted(world.test.features)[::2]  # half of them, as they lie in the file
    (tmp_path / "out.json").unlink()
    message = refused(evaluate, *evaluation_flags(world, damage(path, bad, fault)), *output)
    assert FAULTS[fault] in message and f"{len(bad)} of its 80 videos are bad" in message
    assert len(re.findall("|".join(map(re.escape, map(repr, bad))), message)) >= 3
    assert f"and {len(bad) - 3} more" in message and "convert.py verify" in message
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize("fault", FAULTS)
def test_one_bad_video_is_refused_by_every_reader(world, tmp_path, fault):
    pairs = {video: rows.astype(np.float16) for video, rows in world.pairs.items()}
    path = damage(write_ours(tmp_path / "x.hdf5", pairs), ["bg007"], fault)
    mention = f"video 'bg007' {FAULTS[fault]}; extract it again"
    model = tmp_path / "model"
    flags = train_flags(world, model, "--feature_path", path, "--epochs", 1, "--neg_num", 32)
    assert mention in refused(train, *flags)
    fit = ["fit", path, "--components", 4, "--output", tmp_path / "p.npz"]
    assert mention in refused(pca.main, *fit)
    good = write_ours(tmp_path / "good.hdf5", pairs)
    call(pca.main, "fit", good, "--components", 4, "--output", tmp_path / "p.npz")
    apply = ["apply", path, "--pca", tmp_path / "p.npz", "--output", tmp_path / "y.hdf5"]
    assert mention in refused(pca.main, *apply)
    assert mention in refused(convert.main, "to", path, tmp_path / "z.hdf5")
    assert not {"y.hdf5", "z.hdf5"} & {file.name for file in tmp_path.iterdir()}


def test_layouts_without_our_checksums_are_checked_for_zeros(tmp_path):
    features = some_features(IDS) | {"v3": np.zeros((4, 8), np.float16)}
    path = write_released(tmp_path / "x.hdf5", features)
    with pytest.raises(InputError, match="'v3' holds nothing but zeros"):
        FeatureStore(path)["v3"]
    regions = {"a": np.ones((2, 3, 8), np.float16), "b": np.zeros((2, 3, 8), np.float16)}
    with pytest.raises(InputError, match="'b' holds nothing but zeros"):
        FeatureStore(write_released(tmp_path / "y.hdf5", regions))["b"]


def test_writer_refuses_a_video_of_nothing_but_zeros(tmp_path):
    """Also one whose values are too small for half precision."""
    with StoreWriter(tmp_path / "x.hdf5") as writer:
        for rows in (np.zeros((3, 8)), np.full((3, 8), 1e-9)):
            with pytest.raises(InputError, match="'a': its features are nothing but zeros"):
                writer.add("a", rows)
        writer.add("a", np.eye(3, 8))
    assert FeatureStore(tmp_path / "x.hdf5")["a"].sum() == 3


def test_good_rows_are_returned_as_they_are(tmp_path):
    """Zeros in a row, in a column and as the first value are nothing to complain of."""
    features = some_features(IDS)
    features["v1"][:, 0] = 0
    features["v2"][0, :7] = 0
    store = FeatureStore(write_ours(tmp_path / "x.hdf5", features))
    for video, rows in features.items():
        np.testing.assert_array_equal(store[video], rows)
    assert store.videos_with_zero_rows() == []


def test_single_rows_of_zeros_are_counted(world, tmp_path):
    features = {video: rows.copy() for video, rows in world.test.features.items()}
    for video in ("d003", "q2-1", "q5-0", "d017"):
        features[video][len(features[video]) // 2] = 0
    path = write_ours(tmp_path / "x.hdf5", features)
    result = call(evaluate, *evaluation_flags(world, path), "--output", tmp_path / "out.json")
    assert "4 videos have rows of zeros" in result.stdout
    assert "'d003', 'd017', 'q2-1' and 1 more" in result.stdout
    record = json.loads((tmp_path / "out.json").read_text())
    assert record["features"]["with_zero_rows"] == ["d003", "d017", "q2-1", "q5-0"]


def test_training_names_videos_with_rows_of_zeros(world, tmp_path):
    pairs = {video: rows.astype(np.float16) for video, rows in world.pairs.items()}
    pairs["film0/copy 1"][0] = 0
    path = write_ours(tmp_path / "x.hdf5", pairs)
    flags = ["--feature_path", path, "--epochs", 1, "--num_workers", 1]
    printed = run(world, tmp_path / "model", *flags)
    assert "1 videos have rows of zeros, which resemble nothing: 'film0/copy 1'" in printed


def test_video_is_checked_once_by_all_processes_of_a_run(tmp_path):
    """So a file that changes under a run is not seen; a worker's checks are not done again."""
    path = write_ours(tmp_path / "x.hdf5", some_features(IDS))
    store = FeatureStore(path)
    store["v0"]
    worker = multiprocessing.get_context("fork").Process(target=store.__getitem__, args=("v1",))
    worker.start()
    worker.join()
    assert worker.exitcode == 0
    damage(path, ["v0", "v1", "v2"], "changed")
    store["v0"], store["v1"]
    with pytest.raises(InputError, match="'v2' has other rows than were written; extract it"):
        store["v2"]
    with pytest.raises(InputError, match="3 of its 9 videos are bad"):
        FeatureStore(path)["v0"]


def test_empty_video_does_not_stop_an_evaluation(world, tmp_path):
    """It is named, and counts as missing: the figures are those of a file without it."""
    features, gone = dict(world.test.features), "q5-1"
    del features[gone]
    path = write_released(tmp_path / "without.hdf5", features)
    output = ["--output", tmp_path / "out.json"]
    call(evaluate, *evaluation_flags(world, path), *output)
    expected = json.loads((tmp_path / "out.json").read_text())
    features[gone] = np.zeros((0, world.test.features[gone].shape[1]), np.float32)
    path = write_released(tmp_path / "empty.hdf5", features)
    result = call(evaluate, *evaluation_flags(world, path), *output)
    assert "1 videos cannot be used and count as missing: 'q5-1'" in result.stderr
    assert "79 videos (1 missing)" in result.stdout
    record = json.loads((tmp_path / "out.json").read_text())
    assert record["figures"] == expected["figures"]
    assert list(record["features"]["skipped"]) == [gone]
