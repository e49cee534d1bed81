"""Encoders from flags and from files: every form of a model file, and what is refused."""

import copy
from types import SimpleNamespace

import pytest
import torch
from helpers.encoders import make_batch, make_tca, randomised
from helpers.worlds import C

from model import ENCODERS, Mean, MoCo, build_encoder, encoder_arguments, load_encoder
from utils import InputError

# --- flags --------------------------------------------------------------------------------------

FLAGS = SimpleNamespace(
    num_layers=1, output_dim=16, num_clusters=4, normalize_input=None, dropout=0.1, nhead=2
)


@pytest.mark.parametrize("name", ENCODERS)
def test_encoder_arguments_take_the_flags_and_rebuild_the_encoder_from_its_file(name, tmp_path):
    arguments = encoder_arguments(name, C, FLAGS)
    encoder = randomised(ENCODERS[name](**arguments)).eval()
    assert encoder.feature_size == C
    assert encoder.descriptor_size == (C if name in ("tca", "mean") else 16)
    for argument, flag in ENCODERS[name].flags.items():
        given = getattr(FLAGS, flag, None)
        assert given is None or arguments[argument] == given
    state = {"encoder": name, "arguments": arguments, "state_dict": encoder.state_dict()}
    torch.save(state, tmp_path / "model.pth")
    found, loaded, features = load_encoder(tmp_path)
    assert found == name and features == {} and not loaded.training
    x, num_frames = make_batch()
    with torch.no_grad():
        assert torch.equal(loaded(x, num_frames), encoder(x, num_frames))


def test_encoder_arguments_without_flags_are_each_encoders_defaults():
    arguments = {}
    for name in ENCODERS:
        arguments[name] = encoder_arguments(name, C, SimpleNamespace(dropout=None))
    assert arguments["mean"] == {"feature_size": C}
    dropout = {"tca": 0.2, "netvlad": 0.5, "nextvlad": 0.5, "lstm": 0.2, "gru": 0.2}
    assert {name: arguments[name]["dropout"] for name in dropout} == dropout
    assert arguments["netvlad"]["num_clusters"] == 256
    assert arguments["nextvlad"]["num_clusters"] == 64


# --- files --------------------------------------------------------------------------------------

ARGUMENTS = {
    "feature_size": C,
    "nhead": 4,
    "nlayers": 2,
    "dim_feedforward": 64,
    "dropout": 0.0,
    "init": "paper",
}


def make_forms(encoder):
    """{form: state}: every form of an encoder's file."""
    state = encoder.state_dict()
    moco = MoCo(copy.deepcopy(encoder), C, K=8)
    with torch.no_grad():
        for parameter in moco.encoder_k.parameters():
            parameter.zero_()  # only encoder_q is to be loaded
    moco = moco.state_dict()
    own = {"encoder": "tca", "arguments": ARGUMENTS}
    return {
        "bare state dict": state,
        "module. prefix": {f"module.{name}": value for name, value in state.items()},
        "MoCo state dict": moco,
        "MoCo with module. prefix": {f"module.{name}": value for name, value in moco.items()},
        "model.pth": own | {"features": {"pca": "x"}, "state_dict": state},
        "checkpoint.pth": own | {"moco": moco, "step": 3, "mined": None},
    }


@pytest.mark.parametrize("form", make_forms(make_tca(2)))
def test_load_encoder_takes_every_form(form, tmp_path):
    encoder = make_tca(2).eval()
    torch.save(make_forms(encoder)[form], tmp_path / "x.pth")
    name, loaded, features = load_encoder(tmp_path / "x.pth", nhead=4)
    assert name == "tca" and not loaded.training
    assert features == ({"pca": "x"} if form == "model.pth" else {})
    x, num_frames = make_batch()
    with torch.no_grad():
        expected = encoder(x, num_frames)
        torch.testing.assert_close(loaded(x, num_frames), expected, atol=1e-6, rtol=0)


def test_build_encoder_rebuilds_the_mean():
    state = {"encoder": "mean", "arguments": {"feature_size": C}, "state_dict": {}}
    assert isinstance(build_encoder(state, "x.pth"), Mean)


def test_encoder_of_other_code_is_named():
    state = {"encoder": "mamba", "arguments": {"feature_size": C}, "state_dict": {}}
    with pytest.raises(InputError, match="x.pth holds a 'mamba' encoder.*; it has tca, "):
        build_encoder(state, "x.pth")


def test_load_encoder_refuses_a_folder_without_a_model(tmp_path):
    with pytest.raises(InputError, match="model.pth.* does not exist"):
        load_encoder(tmp_path)


def make_wrong_states():
    good = make_tca().state_dict()
    layer = "transformer_encoder.layers.0."
    own = {"encoder": "tca", "arguments": ARGUMENTS | {"nlayers": 1}, "state_dict": good}
    return {
        "a wrong shape": good | {f"{layer}linear2.weight": torch.zeros(3, 3)},
        "a missing tensor": {name: value for name, value in good.items() if "norm2" not in name},
        "a tensor too many": good | {"classifier.weight": torch.zeros(2, 2)},
        "another model": {"fc.weight": torch.zeros(2, 2)},
        "a number": 5,
        "nothing": {},
        "a list": [1, 2],
        "no tensors": {f"{layer}self_attn.in_proj_weight": 3},
        "own form, wrong shape": own | {"arguments": own["arguments"] | {"feature_size": 64}},
        "own form, wrong arguments": own | {"arguments": {"width": 64}},
        "own form, nothing in it": {"encoder": "tca"},
        "keys that are not strings": {1: torch.zeros(2), 2: torch.zeros(2)},
    }


@pytest.mark.parametrize("kind", make_wrong_states())
def test_build_encoder_refuses_another_model_by_the_files_name(kind):
    with pytest.raises(InputError) as error:
        build_encoder(make_wrong_states()[kind], "model file 'runs/x/model.pth'", nhead=4)
    assert "runs/x/model.pth" in str(error.value) and "\n" not in str(error.value)
