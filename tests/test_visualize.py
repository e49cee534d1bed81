"""draw.py: the matrices it draws are what they say, and the command writes a picture or one line."""

import numpy as np
import pytest
import torch
from helpers.commands import cli, one_error
from helpers.files import write_packed
from helpers.worlds import C

import visualize
from model import TCA, Mean
from utils import InputError, save_torch

ARGUMENTS = dict(feature_size=C, nhead=4, nlayers=2, dim_feedforward=16)


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return TCA(**ARGUMENTS).eval()


@pytest.fixture(scope="module")
def here(encoder, tmp_path_factory):
    folder, generator = tmp_path_factory.mktemp("draw"), np.random.default_rng(0)
    write_packed(
        folder / "x.hdf5",
        {"a/b": generator.normal(size=(5, C)), "one": generator.normal(size=(1, C))},
    )
    weights = {"encoder": "tca", "arguments": ARGUMENTS, "state_dict": encoder.state_dict()}
    save_torch(folder / "model.pth", weights)
    save_torch(
        folder / "mean.pth", {"encoder": "mean", "arguments": {"feature_size": C}, "state_dict": {}}
    )
    return folder


def test_attention_is_softmax_of_query_times_key_averaged_over_heads(encoder):
    frames = np.random.default_rng(1).normal(size=(6, C)).astype(np.float32)
    maps = visualize.attention(encoder, frames).numpy()
    layer = encoder.transformer_encoder.layers[0].self_attn
    weight, bias = layer.in_proj_weight.detach().numpy(), layer.in_proj_bias.detach().numpy()
    query, key, _ = np.split(frames @ weight.T + bias, 3, axis=1)
    expected = np.zeros((6, 6))
    for q, k in zip(np.split(query, 4, axis=1), np.split(key, 4, axis=1), strict=True):
        scores = np.exp(q @ k.T / np.sqrt(C / 4))
        expected += scores / scores.sum(1, keepdims=True) / 4
    assert (
        maps.shape == (2, 6, 6)
        and np.allclose(maps[0], expected, atol=1e-6)
        and np.allclose(maps.sum(2), 1, atol=1e-5)
    )


def test_similarities_are_cosines_before_and_after_the_encoder(encoder):
    query, match = (
        np.random.default_rng(i).normal(size=(T, C)).astype(np.float32)
        for i, T in enumerate((4, 7))
    )
    before, after = visualize.similarities(encoder, query, match)
    assert before.shape == after.shape == (4, 7)
    assert float(before[2, 5]) == pytest.approx(
        query[2] @ match[5] / np.linalg.norm(query[2]) / np.linalg.norm(match[5]), abs=1e-5
    )
    outputs = [
        encoder.transformer_encoder(torch.from_numpy(frames)[None])[0].detach().numpy()
        for frames in (query, match)
    ]
    a, b = outputs[0][2], outputs[1][5]
    assert float(after[2, 5]) == pytest.approx(
        a @ b / np.linalg.norm(a) / np.linalg.norm(b), abs=1e-5
    )


def test_an_encoder_without_attention_is_refused():
    with pytest.raises(InputError, match="no attention"):
        visualize.attention(Mean(C), np.ones((3, C), np.float32))


def test_the_command_writes_pictures_and_refuses_in_one_line(here):
    common = ["--feature_path", here / "x.hdf5", "--output", here / "x.png"]
    assert (
        cli(
            "visualize.py", "similarity", "a/b", "one", "--model_path", here / "model.pth", *common
        ).returncode
        == 0
    )
    assert (here / "x.png").read_bytes().startswith(b"\x89PNG")
    (here / "x.png").unlink()
    assert "no attention" in one_error(
        cli("visualize.py", "attention", "one", "--model_path", here / "mean.pth", *common)
    )
    assert "'gone'" in one_error(
        cli("visualize.py", "attention", "gone", "--model_path", here / "model.pth", *common)
    )
    assert not (here / "x.png").exists()
