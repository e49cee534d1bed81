"""The video comparator: its tiles, its smallest matrices, and the files it is loaded from."""

import numpy as np
import pytest
import torch
from torch import nn

from retrieval.comparator import VideoComparator, load_comparator
from retrieval.similarity import similarity
from utils import InputError

SHAPES = {
    "conv1.weight": (32, 1, 3, 3),
    "conv1.bias": (32,),
    "conv2.weight": (64, 32, 3, 3),
    "conv2.bias": (64,),
    "conv3.weight": (128, 64, 3, 3),
    "conv3.bias": (128,),
    "fconv.weight": (1, 128, 1, 1),
    "fconv.bias": (1,),
}


def make_comparator(tile_bytes=64 << 20):
    torch.manual_seed(0)
    return VideoComparator(tile_bytes)


@pytest.mark.parametrize(
    "shape", [(4, 4), (31, 9), (32, 5), (33, 40), (64, 6), (100, 17), (203, 11), (7, 300)]
)
def test_tiles_change_nothing(shape):
    matrix = torch.rand(shape, generator=torch.Generator().manual_seed(1))
    whole = make_comparator()(matrix)  # with gradient: never in tiles
    calls, tiled = [], make_comparator(tile_bytes=1)
    tiled.conv1.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        result = tiled(matrix)
    assert result.shape == (shape[0] // 4, shape[1] // 4)
    torch.testing.assert_close(result, whole.detach(), atol=1e-6, rtol=1e-5)
    assert len(calls) > 1 or shape[0] <= 32


def test_comparator_is_the_released_network():
    """The layers as ViSiL's paper lists them, edges repeated, on a batch of one."""
    own, matrix = make_comparator(), torch.rand(21, 30)
    edges, relu, pool = nn.ReplicationPad2d(1), nn.ReLU(), nn.MaxPool2d(2, 2)
    layers = [edges, own.conv1, relu, pool]
    layers += [edges, own.conv2, relu, pool]
    layers += [edges, own.conv3, relu, own.fconv]
    expected = nn.Sequential(*layers)(matrix[None, None])[0, 0]
    torch.testing.assert_close(own(matrix), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (3, 3), (2, 30), (30, 1)])
def test_videos_under_4_frames_repeat_their_last_frame(shape):
    matrix = torch.rand(shape)
    rows, columns = (torch.arange(max(n, 4)).clamp(max=n - 1) for n in shape)
    expected = make_comparator()(matrix[rows][:, columns])
    torch.testing.assert_close(make_comparator()(matrix), expected)


def test_parameters_are_named_and_shaped_as_released():
    state = make_comparator().state_dict()
    assert {key: tuple(value.shape) for key, value in state.items()} == SHAPES


@pytest.mark.parametrize(
    "prefix", ["", "video_comparator.", "visil_head.video_comperator.", "module."]
)
def test_load_comparator_finds_the_tensors_under_a_prefix(prefix, tmp_path):
    state = {prefix + key: value for key, value in make_comparator().state_dict().items()}
    if prefix:
        state["attention.context_vector.weight"] = torch.zeros(1, 3840)
    torch.save(state, tmp_path / "comparator.pth")
    loaded = load_comparator(tmp_path / "comparator.pth")
    assert not loaded.training
    frames = nn.functional.normalize(torch.randn(9, 16), dim=1).numpy()
    with torch.no_grad():
        reduced = make_comparator()(torch.from_numpy(frames @ frames.T)).clamp(-1, 1)
    expected = float(reduced.amax(1).mean())
    assert similarity(frames, frames, "comparator", loaded) == pytest.approx(expected, abs=1e-6)


PREFIX = "video_comparator."


@pytest.mark.parametrize(
    "change, names",
    [
        ({"conv2.weight": torch.zeros(64, 16, 3, 3)}, r"video_comparator\.conv2\.weight;"),
        ({"conv3.bias": None, "conv1.bias": None}, r"conv1\.bias, video.*conv3\.bias;"),
    ],
    ids=["another shape", "missing"],
)
def test_load_comparator_names_tensors_that_do_not_fit(change, names, tmp_path):
    state = make_comparator().state_dict() | change
    state = {PREFIX + key: value for key, value in state.items()}
    torch.save(state, tmp_path / "comparator.pth")
    with pytest.raises(InputError, match="comparator.pth.*" + names):
        load_comparator(tmp_path / "comparator.pth")


@pytest.mark.parametrize(
    "content",
    [{"transformer_encoder.layers.0.linear1.weight": torch.zeros(2, 2)}, torch.zeros(3), {}],
    ids=["another model", "a tensor", "nothing"],
)
def test_load_comparator_refuses_another_model(content, tmp_path):
    torch.save(content, tmp_path / "comparator.pth")
    with pytest.raises(InputError, match="is it a video comparator's"):
        load_comparator(tmp_path / "comparator.pth")


def test_load_comparator_refuses_missing_and_unreadable_files(tmp_path):
    path = tmp_path / "comparator.pth"
    with pytest.raises(InputError, match="does not exist"):
        load_comparator(path)
    path.write_bytes(np.arange(100).tobytes())
    with pytest.raises(InputError, match="comparator file .* cannot be read"):
        load_comparator(path)
