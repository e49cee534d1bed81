"""Backbones of .onnx files: what they take is read from the file; hostile ones end in one line."""

import os
import sys

import extract_features
import numpy as np
import pytest
import torch
from helpers.clips import numbered, write_video
from helpers.commands import refused
from helpers.onnx_files import (
    FLOAT,
    FLOAT16,
    UINT8,
    mean_colour_network,
    network,
    node,
    tensor,
    value_info,
)

import search
from features.backbones import build_backbone
from features.onnx_backbone import OnnxBackbone
from features.store import FeatureStore
from features.views import View
from utils import InputError
from videoindex.index import VideoIndex

onnxruntime = pytest.importorskip("onnxruntime", reason="needs ONNX Runtime")
WEIGHT = np.random.default_rng(1).normal(size=(3, 5)).astype(np.float32)


@pytest.mark.parametrize(
    "kind, shape, size, tolerance",
    [
        (UINT8, ("n", "h", "w", 3), 288, 1e-3),
        (UINT8, ("n", 3, 96, 96), 96, 1e-3),
        (FLOAT, ("n", 3, "h", 64), 64, 1e-4),
        (FLOAT, (4, 64, 64, 3), 64, 1e-4),  # four frames at a time, whatever is given
        (FLOAT16, (1, 3, 64, 64), 64, 1e-2),
    ],
)
def test_onnx_input_is_read_from_the_file(tmp_path, kind, shape, size, tolerance):
    (tmp_path / "net.onnx").write_bytes(mean_colour_network(kind, shape, WEIGHT))
    backbone = build_backbone(str(tmp_path / "net.onnx"))
    assert backbone.view == View(size, whole=True)
    assert (backbone.channels, backbone.gives_vectors) == ([5], True)
    frames = np.random.default_rng(2).integers(0, 256, (6, 3, size, size), np.uint8)
    frames[:, 1] //= 2  # so that the colours differ
    colours = frames.astype(float).mean((2, 3))  # (6, 3)
    if kind != UINT8:
        colours = (colours / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    (maps,) = backbone(torch.from_numpy(frames))
    assert maps.dtype == torch.float32 and maps.shape == (6, 5, 1, 1)
    assert np.allclose(maps[:, :, 0, 0], colours @ WEIGHT, atol=tolerance * 255, rtol=tolerance)


def test_onnx_outputs_are_stages(tmp_path):
    """Maps and vectors, chosen by name."""
    nodes = [
        node("Cast", ["image"], ["x"], to=FLOAT),
        node("MaxPool", ["x"], ["map"], kernel_shape=[16, 16], strides=[16, 16]),
        node("GlobalMaxPool", ["x"], ["top"]),
        node("Flatten", ["top"], ["vector"]),
    ]
    outputs = [value_info("map", FLOAT, ["n", 3, 4, 4]), value_info("vector", FLOAT, ["n", 3])]
    data = network([value_info("image", UINT8, ["n", 3, 64, 64])], nodes, outputs)
    path = tmp_path / "net.onnx"
    path.write_bytes(data)
    frames = np.random.default_rng(2).integers(0, 256, (2, 3, 64, 64), np.uint8)
    maps, vectors = build_backbone(str(path))(torch.from_numpy(frames))
    assert np.array_equal(maps, frames.reshape(2, 3, 4, 16, 4, 16).max((3, 5)))
    assert np.array_equal(vectors[:, :, 0, 0], frames.max((2, 3)))
    assert not build_backbone(str(path)).gives_vectors
    assert build_backbone(str(path), stages=["vector"]).gives_vectors
    with pytest.raises(InputError, match="no such output; choose from map, vector"):
        build_backbone(str(path), stages=["top"])
    for given in ({"weights": "w.pt"}, {"amp": "bfloat16"}):
        with pytest.raises(InputError, match=f"--{next(iter(given))} does not go with"):
            build_backbone(str(path), **given)


CAST = node("Cast", ["image"], ["x"], to=FLOAT)
MEAN = node("ReduceMean", ["x"], ["mean"], axes=[1, 2], keepdims=0)
INPUT = value_info("image", UINT8, ["n", "h", "w", 3])
OUTPUT = value_info("vector", FLOAT, ["n", 3])
EYE = np.eye(3, dtype=np.float32)


def external():
    """The weights are said to be in another file, which is there."""
    nodes = [CAST, MEAN, node("MatMul", ["mean", "w"], ["vector"])]
    return network([INPUT], nodes, [OUTPUT], [tensor("w", EYE, external="w.bin")])


def huge(*shape):
    """Values that it makes of one number."""
    nodes = [
        CAST,
        node("ReduceMean", ["x"], ["mean"], axes=[1, 2, 3], keepdims=1),
        node("Expand", ["mean", "shape"], ["vector"]),
    ]
    return network([INPUT], nodes, [OUTPUT], [tensor("shape", np.array(shape, np.int64))])


def constant():
    """A constant of 16 TB, which is made while the file is loaded."""
    nodes = [CAST, MEAN, node("ConstantOfShape", ["shape"], ["big"])]
    nodes.append(node("ReduceMean", ["big"], ["one"], axes=[0, 1], keepdims=1))
    nodes.append(node("Add", ["mean", "one"], ["vector"]))
    shape = np.array([1 << 21, 1 << 21], np.int64)
    return network([INPUT], nodes, [OUTPUT], [tensor("shape", shape)])


def three_axes():
    rows = node("ReduceMean", ["x"], ["vector"], axes=[1], keepdims=0)
    return network([INPUT], [CAST, rows], [OUTPUT])


def grey():
    inputs = [value_info("image", UINT8, ["n", 1, 64, 64])]
    return network(inputs, [CAST, node("Flatten", ["x"], ["vector"])], [OUTPUT])


def unknown():
    return network([INPUT], [node("Nope", ["image"], ["vector"])], [OUTPUT])


def one_row():
    """It gives one vector for any number of frames."""
    nodes = [CAST, MEAN, node("ReduceMean", ["mean"], ["vector"], axes=[0], keepdims=1)]
    return network([INPUT], nodes, [OUTPUT])


HOSTILE = {
    "no file": (b"", "is not a network"),
    "other file": (b"PK\x03\x04" + bytes(range(256)), "is not a network"),
    "cut short": (mean_colour_network()[:150], "is not a network"),
    "external": (external(), "is not a network in one file"),
    "unknown operation": (
        network([INPUT], [node("Nope", ["image"], ["vector"])], [OUTPUT]),
        "Nope",
    ),
    "huge constant": (constant(), "cannot be computed|is not a network"),
    "huge output": (huge(1, 1 << 16, 1, 1 << 16), "cannot be computed"),
    "wide output": (huge(1, 1 << 17, 1, 1), "gives 131072 values a frame"),
    "small frames": (mean_colour_network(shape=("n", 8, 8, 3)), "of 8 pixels, not square ones"),
    "huge frames": (mean_colour_network(shape=("n", 3, 10**6, "w")), "of 1000000 pixels"),
    "oblong frames": (mean_colour_network(shape=("n", 3, 64, 32)), "of 32 x 64 pixels"),
    "huge batches": (mean_colour_network(shape=(10**9, 3, 64, 64)), "1000000000 frames at a time"),
    "grey frames": (grey(), r"\['n', 1, 64, 64\], not frames"),
    "three axes": (three_axes(), r"is \(1, 288, 3\), not one vector"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_onnx_file_ends_in_one_line(tmp_path, monkeypatch, name):
    data, message = HOSTILE[name]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.onnx").write_bytes(data)
    EYE.tofile(tmp_path / "w.bin")
    with pytest.raises(InputError, match=message) as caught:
        OnnxBackbone("net.onnx")
    assert "\n" not in str(caught.value) and "net.onnx" in str(caught.value)


def test_onnx_network_that_mixes_frames_is_refused(tmp_path):
    (tmp_path / "net.onnx").write_bytes(one_row())
    backbone = OnnxBackbone(tmp_path / "net.onnx")
    with pytest.raises(InputError, match="for each of 2 frames"):
        backbone(torch.zeros(2, 3, 64, 64, dtype=torch.uint8))


def test_onnx_without_onnxruntime_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(InputError, match="pip install onnxruntime"):
        build_backbone("net.onnx")


@pytest.mark.skipif(
    "CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="has it"
)
def test_onnx_without_cuda_says_what_to_install(tmp_path):
    (tmp_path / "net.onnx").write_bytes(mean_colour_network())
    with pytest.raises(InputError, match="pip install onnxruntime-gpu, or --device cpu"):
        build_backbone(str(tmp_path / "net.onnx"), device="cuda")


# --- from files to features and an index ---------------------------------------------------------


def test_onnx_features_and_index_from_files(tmp_path, monkeypatch):
    """The mean colour of whole frames: a bright stripe at the side counts, which a crop loses."""
    image = np.zeros((64, 128, 3), np.uint8)
    image[:, :16, 0] = image[:, 112:, 1] = 240
    videos = tmp_path / "videos"
    videos.mkdir()
    write_video(videos / "a.mkv", [image] * 30)
    write_video(videos / "b.mkv", numbered(30))
    (tmp_path / "net.onnx").write_bytes(mean_colour_network(UINT8, ("n", 3, 64, 64), EYE))
    monkeypatch.chdir(tmp_path)

    flags = ["--backbone", "net.onnx", "--device", "cpu"]
    assert extract_features.main(["videos", "--output", "f.hdf5", *flags]) == 0
    store = FeatureStore("f.hdf5")
    assert store.meta["backbone"] == "onnx" and store.meta["weights"].startswith("net.onnx sha256 ")
    assert (store.meta["pooling"], store.meta["view"]) == ("none", "64 whole")
    expected = np.array([1, 1, 0]) / np.sqrt(2)  # red at the left, as much green at the right
    assert np.allclose(store["a"], expected, atol=0.02)
    words = ["videos", "--output", "g.hdf5", "--pooling", "mac"]
    assert "gives vectors" in refused(extract_features.main, *words, *flags)

    flags += ["--encoder", "mean"]
    assert not search.main(["index", "videos", "--index", "my.index", *flags, "--workers", "1"])
    os.mkdir("elsewhere")
    monkeypatch.chdir("elsewhere")  # an index remembers where its backbone is
    index = VideoIndex("../my.index", device="cpu")
    (best, *_) = index.query("../videos/a.mkv", threshold=0)
    assert best.path == str(videos / "a.mkv") and best.similarity == pytest.approx(1, abs=1e-3)
    identity = index.store.settings["identity"]
    assert (identity["backbone"], identity["view"]) == ("onnx", "64 whole")
    assert len(identity["weights"]) == 16  # its digest: its name and place do not count

    (tmp_path / "net.onnx").write_bytes(mean_colour_network(UINT8, ("n", 3, 64, 64), -EYE))
    with pytest.raises(InputError, match="was made with weights"):
        VideoIndex("../my.index", device="cpu").query("../videos/a.mkv")
