"""The video comparator: its tiles, its smallest matrices, and the files it is loaded from."""

import numpy as np
import pytest
import torch
from torch import nn

from retrieval.comparator import VideoComparator, load_comparator
from retrieval.similarity import similarity
from utils import InputError


def network(tile_bytes=64 << 20):
    torch.manual_seed(0)
    return VideoComparator(tile_bytes)


@pytest.mark.parametrize(
    "shape", [(4, 4), (31, 9), (32, 5), (33, 40), (64, 6), (100, 17), (203, 11), (7, 300)]
)
def test_tiles_change_nothing(shape):
    matrix = torch.rand(shape, generator=torch.Generator().manual_seed(1))
    whole = network()(matrix)  # with gradient: never in tiles
    calls, tiled = [], network(tile_bytes=1)
    tiled.conv1.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        result = tiled(matrix)
    assert result.shape == (shape[0] // 4, shape[1] // 4)
    torch.testing.assert_close(result, whole.detach(), atol=1e-6, rtol=1e-5)
    assert len(calls) > 1 or shape[0] <= 32


def test_it_is_the_released_network():
    """The layers as ViSiL's paper lists them, edges repeated, on a batch of one."""
    own, matrix = network(), torch.rand(21, 30)
    pad, pool = nn.ReplicationPad2d(1), nn.MaxPool2d(2, 2)
    layers = nn.Sequential(
        pad,
        own.conv1,
        nn.ReLU(),
        pool,
        pad,
        own.conv2,
        nn.ReLU(),
        pool,
        pad,
        own.conv3,
        nn.ReLU(),
        own.fconv,
    )
    torch.testing.assert_close(own(matrix), layers(matrix[None, None])[0, 0], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (3, 3), (2, 30), (30, 1)])
def test_a_video_under_4_frames_counts_as_if_it_stood_still(shape):
    matrix = torch.rand(shape)
    index = [torch.arange(max(n, 4)).clamp(max=n - 1) for n in shape]
    expected = network()(matrix[index[0]][:, index[1]])
    torch.testing.assert_close(network()(matrix), expected)


@pytest.mark.parametrize(
    "prefix", ["", "video_comparator.", "visil_head.video_comperator.", "module."]
)
def test_weights_load_alone_and_from_among_others(prefix, tmp_path):
    state = {prefix + key: value for key, value in network().state_dict().items()}
    if prefix:
        state["attention.context_vector.weight"] = torch.zeros(1, 3840)
    torch.save(state, tmp_path / "comparator.pth")
    loaded = load_comparator(tmp_path / "comparator.pth")
    frames = nn.functional.normalize(torch.randn(9, 16), dim=1).numpy()
    expected = network()(torch.from_numpy(frames @ frames.T)).clamp(-1, 1).amax(1).mean()
    assert similarity(frames, frames, "comparator", loaded) == pytest.approx(
        float(expected), abs=1e-6
    )
    assert not loaded.training


def test_shapes_and_names_are_the_released_ones():
    shapes = {key: tuple(value.shape) for key, value in network().state_dict().items()}
    assert shapes == {
        "conv1.weight": (32, 1, 3, 3),
        "conv1.bias": (32,),
        "conv2.weight": (64, 32, 3, 3),
        "conv2.bias": (64,),
        "conv3.weight": (128, 64, 3, 3),
        "conv3.bias": (128,),
        "fconv.weight": (1, 128, 1, 1),
        "fconv.bias": (1,),
    }


def test_files_that_do_not_fit_are_refused_by_what_does_not(tmp_path):
    path = tmp_path / "comparator.pth"
    state = {"video_comparator." + key: value for key, value in network().state_dict().items()}
    for change, names in (
        (
            {"video_comparator.conv2.weight": torch.zeros(64, 16, 3, 3)},
            r"video_comparator\.conv2\.weight;",
        ),
        (
            {"video_comparator.conv3.bias": None, "video_comparator.conv1.bias": None},
            r"conv1\.bias, video.*conv3\.bias;",
        ),
    ):
        torch.save({**state, **change}, path)
        with pytest.raises(InputError, match="comparator.pth.*" + names):
            load_comparator(path)
    for other in (
        {"transformer_encoder.layers.0.linear1.weight": torch.zeros(2, 2)},
        torch.zeros(3),
    ):
        torch.save(other, path)
        with pytest.raises(InputError, match="is it a video comparator's"):
            load_comparator(path)
    path.write_bytes(np.arange(100).tobytes())
    with pytest.raises(InputError, match="comparator file .* cannot be read"):
        load_comparator(path)
    with pytest.raises(InputError, match="does not exist"):
        load_comparator(tmp_path / "none.pth")
