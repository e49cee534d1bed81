"""Pipeline: descriptors of short and long videos, and the files that are shipped."""

import numpy as np
import pytest
import torch
from helpers.library import CLIPS

from model import build_encoder
from untrusted import load_torch
from utils import InputError, file_sha256
from videoindex.pipeline import SHIPPED, Pipeline, options_of


@pytest.mark.parametrize(
    ("num_frames", "windows"),
    [(60, [(0, 60)]), (130, [(0, 44), (44, 87), (87, 130)])],
)
def test_encode_features_encodes_windows_apart(num_frames, windows):
    """One window of a short video, several of a long one: each as the encoder alone encodes it."""
    pipeline = Pipeline(device="cpu", encoder="tca")
    features = np.abs(np.random.default_rng(3).normal(size=(num_frames, 1752))).astype(np.float16)
    encoder = build_encoder(load_torch(SHIPPED / "model.pth"), "")
    x = torch.from_numpy(pipeline.projection(features).astype(np.float16)).float()  # (T, D)
    frame_descriptors, window_descriptors = pipeline.encode_features(features)
    assert len(window_descriptors) == len(windows) and len(frame_descriptors) == num_frames
    for window_descriptor, (start, end) in zip(window_descriptors, windows, strict=True):
        length = torch.tensor([end - start])
        with torch.inference_mode():
            video = encoder(x[None, start:end], length)[0].numpy()
            frames = encoder.encode(x[None, start:end], length)[0].numpy()
        assert window_descriptor == pytest.approx(video, abs=1e-5)
        assert frame_descriptors[start:end] == pytest.approx(frames, abs=1e-3)


def test_encode_features_refuses_what_is_not_finite(pipeline):
    features = np.zeros((3, 1752), np.float32)
    features[1, 5] = np.nan
    with pytest.raises(InputError, match="NaN or infinity"):
        pipeline.encode_features(features)


def test_pipeline_identity_keeps_its_form(pipeline):
    """Indexes compare it: another value for the same model would close all earlier ones."""
    pca, model = (file_sha256(SHIPPED / name)[:16] for name in ("pca.npz", "model.pth"))
    assert pipeline.identity == {
        "backbone": "efficientnet_lite0",
        "weights": "579344248a93e230",
        "stages": "default",
        "pooling": "imac",
        "pca": f"{pca} first 512",
        "encoder": "mean",
        "size": 512,
        "fps": "1",
        "window": 10,
        "bars": "cut",
    }
    # What an index of an earlier version holds; its options are empty, as its defaults were others.
    earlier = pipeline.identity | {"encoder": f"tca sha256 {model}", "window": 60}
    del earlier["bars"]
    assert Pipeline(device="cpu", **options_of(earlier)).identity == earlier


def test_pipeline_refuses_parts_that_do_not_fit(tmp_path):
    with pytest.raises(InputError, match="takes features of size 512, not 1752"):
        Pipeline(device="cpu", model_path=SHIPPED / "model.pth")
    with pytest.raises(InputError, match="holds a 'tca' encoder, not 'lstm'"):
        Pipeline(device="cpu", model_path=SHIPPED, pca=SHIPPED / "pca.npz", encoder="lstm")
    with pytest.raises(InputError, match="--encoder lstm needs --model_path"):
        Pipeline(device="cpu", pooling="l3_imac", encoder="lstm")
    with pytest.raises(InputError, match="--pca '.*' does not exist"):
        Pipeline(device="cpu", pca=tmp_path / "none.npz")


def test_shipped_files_are_small_and_calibrated(pipeline):
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) < 10e6
    levels = [pipeline.calibration[name] for name in ("threshold", "likely", "certain")]
    assert 0 < levels[0] <= levels[1] <= levels[2]


def test_shipped_threshold_tells_copies_from_strangers(library):
    """On the library: each clip answers with all clips that share film, and with no other."""
    index = library.open()

    def film(name):
        return {second for start, end in CLIPS[name][0] for second in range(start, end)}

    for name in ("a.mp4", "b.mp4", "c.mp4", "folder/d.mp4"):
        matches = index.query(library.clip(name), top=len(CLIPS))
        expected = {library.path(other) for other in CLIPS if film(name) & film(other)}
        assert {match.path for match in matches} == expected
