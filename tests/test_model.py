"""TCA and Mean: padding changes nothing, and TCA is the released model."""

import contextlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.encoders import LENGTHS, make_batch, make_tca, padding_of
from helpers.worlds import C
from torch import nn

from model import TCA, Mean
from utils import InputError

ENCODERS = {"tca": make_tca, "tca of 2 layers": lambda: make_tca(2), "mean": lambda: Mean(C)}

# {way: (training, context)}: PyTorch's fast path, autograd and training compute differently.
WAYS = {
    "inference": (False, torch.inference_mode),
    "no_grad": (False, torch.no_grad),
    "eval with gradients": (False, contextlib.nullcontext),
    "train": (True, contextlib.nullcontext),
}


@pytest.fixture(params=[(name, way) for name in ENCODERS for way in WAYS], ids="-".join)
def run(request):
    """run(method, x, num_frames): a method of an encoder, in one of the ways of computing it."""
    name, way = request.param
    training, context = WAYS[way]
    encoder = ENCODERS[name]().train(training)

    def call(method, *arguments):
        with context():
            return getattr(encoder, method)(*arguments).detach()

    return call


# --- padding ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["forward", "encode"])
def test_descriptors_are_the_same_alone_in_a_batch_and_padded_to_300(run, method):
    x, num_frames = make_batch()
    longer = F.pad(x, (0, 0, 0, 300 - x.shape[1]))
    in_batch, in_longer = run(method, x, num_frames), run(method, longer, num_frames)
    for i, T in enumerate(LENGTHS):
        one = slice(i, i + 1)
        alone = run(method, x[one, :T], num_frames[one])[0]
        padded = run(method, longer[one], num_frames[one])[0]
        frames = slice(None) if method == "forward" else slice(T)
        for other in (in_batch[i], in_longer[i], padded):
            torch.testing.assert_close(other[frames], alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), -float("inf"), 1e30, 3.4e38])
def test_descriptors_do_not_depend_on_what_the_padding_holds(run, garbage):
    x, num_frames = make_batch(T=25)
    dirty = x.masked_fill(padding_of(x, num_frames), garbage)
    for method in ("forward", "encode"):
        clean = run(method, x, num_frames)
        torch.testing.assert_close(run(method, dirty, num_frames), clean, atol=1e-6, rtol=0)


def test_gradients_do_not_depend_on_what_the_padding_holds():
    x, num_frames = make_batch(T=25)
    gradients = []
    for fill in (0.0, float("nan")):
        encoder = make_tca().train()
        filled = x.masked_fill(padding_of(x, num_frames), fill)
        encoder(filled, num_frames).pow(3).sum().backward()
        gradients.append([parameter.grad for parameter in encoder.parameters()])
    for clean, dirty in zip(*gradients, strict=True):
        torch.testing.assert_close(dirty, clean, atol=1e-6, rtol=1e-4)


def test_encode_is_of_unit_norm_and_zero_past_num_frames(run):
    x, num_frames = make_batch(T=25)
    out = run("encode", x, num_frames)
    assert out.shape == (len(LENGTHS), 25, C)
    for row, T in zip(out, LENGTHS, strict=True):
        torch.testing.assert_close(row[:T].norm(dim=1), torch.ones(T), atol=1e-5, rtol=0)
        assert not row[T:].any()


def test_forward_is_of_unit_norm(run):
    out = run("forward", *make_batch())
    assert out.shape == (len(LENGTHS), C)
    torch.testing.assert_close(out.norm(dim=1), torch.ones(len(LENGTHS)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ENCODERS)
def test_encode_video_and_frames_equals_forward_and_encode(name):
    encoder = ENCODERS[name]().eval()
    x, num_frames = make_batch(T=25)
    with torch.no_grad():
        video, frames = encoder.encode_video_and_frames(x, num_frames)
        assert torch.equal(video, encoder(x, num_frames))
        assert torch.equal(frames, encoder.encode(x, num_frames))


def test_video_of_one_frame_has_that_frame_as_its_descriptor(run):
    x, num_frames = make_batch([1, 1])
    frames = run("encode", x, num_frames)[:, 0]
    torch.testing.assert_close(run("forward", x, num_frames), frames, atol=1e-5, rtol=0)


def test_order_of_a_batch_does_not_matter(run):
    x, num_frames = make_batch([5, 1, 20, 7, 7])
    order = torch.tensor([3, 0, 4, 2, 1])
    for method in ("forward", "encode"):
        expected = run(method, x, num_frames)[order]
        found = run(method, x[order], num_frames[order])
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_order_of_frames_does_not_matter_to_the_video_descriptor(run):
    x, num_frames = make_batch([20])
    order = torch.randperm(20)
    shuffled = x[:, order]
    video, frames = run("forward", x, num_frames), run("encode", x, num_frames)
    torch.testing.assert_close(run("forward", shuffled, num_frames), video, atol=1e-5, rtol=0)
    found = run("encode", shuffled, num_frames)
    torch.testing.assert_close(found, frames[:, order], atol=1e-5, rtol=0)


# --- TCA ----------------------------------------------------------------------------------------


def test_tca_parameters_are_named_and_shaped_as_released():
    layer = "transformer_encoder.layers.0."
    assert {name: tuple(value.shape) for name, value in TCA().state_dict().items()} == {
        f"{layer}self_attn.in_proj_weight": (3072, 1024),
        f"{layer}self_attn.in_proj_bias": (3072,),
        f"{layer}self_attn.out_proj.weight": (1024, 1024),
        f"{layer}self_attn.out_proj.bias": (1024,),
        f"{layer}linear1.weight": (2048, 1024),
        f"{layer}linear1.bias": (2048,),
        f"{layer}linear2.weight": (1024, 2048),
        f"{layer}linear2.bias": (1024,),
        f"{layer}norm1.weight": (1024,),
        f"{layer}norm1.bias": (1024,),
        f"{layer}norm2.weight": (1024,),
        f"{layer}norm2.bias": (1024,),
    }


class ReleasedTCA(nn.Module):
    """The released model, written by its own route: frames first, the mean over a mask."""

    def __init__(self, nlayers=1, nhead=4):
        super().__init__()
        layer = nn.TransformerEncoderLayer(C, nhead, dim_feedforward=64, dropout=0.2)
        self.transformer_encoder = nn.TransformerEncoder(layer, nlayers, enable_nested_tensor=False)

    def frames(self, x, num_frames):
        padding = padding_of(x, num_frames)[..., 0]
        out = self.transformer_encoder(x.permute(1, 0, 2), src_key_padding_mask=padding)
        return out.permute(1, 0, 2)

    def forward(self, x, num_frames):
        mask = ~padding_of(x, num_frames)
        mean = (self.frames(x, num_frames) * mask).sum(1) / num_frames[:, None]
        return F.normalize(mean, dim=1)


@pytest.mark.parametrize("nlayers", [1, 2])
def test_tca_loads_the_released_state_dict_and_gives_its_descriptors(nlayers):
    torch.manual_seed(3)
    released = ReleasedTCA(nlayers).eval()
    with torch.no_grad():
        for parameter in released.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    encoder = TCA(C, 4, nlayers, 64).eval()
    encoder.load_state_dict(released.state_dict(), strict=True)
    x, num_frames = make_batch()
    with torch.no_grad():
        expected = released(x, num_frames)
        torch.testing.assert_close(encoder(x, num_frames), expected, atol=1e-5, rtol=0)
        frames = F.normalize(released.frames(x, num_frames), dim=2)
        for ours, theirs, T in zip(encoder.encode(x, num_frames), frames, LENGTHS, strict=True):
            torch.testing.assert_close(ours[:T], theirs[:T], atol=1e-5, rtol=0)


@pytest.mark.parametrize("nlayers", [1, 2])
def test_near_identity_starts_from_layer_normalised_features(nlayers):
    """Two layer norms in each layer, and nothing else."""
    encoder = TCA(C, 4, nlayers, 64, init="near_identity").eval()
    x, num_frames = make_batch()
    expected = x.double().numpy()
    for _ in range(2 * nlayers):
        centred = expected - expected.mean(2, keepdims=True)
        expected = centred / np.sqrt((centred**2).mean(2, keepdims=True) + 1e-5)
    with torch.no_grad():
        found = encoder.encode(x, num_frames).numpy()
    for i, T in enumerate(LENGTHS):
        unit = expected[i, :T] / np.linalg.norm(expected[i, :T], axis=1, keepdims=True)
        np.testing.assert_allclose(found[i, :T], unit, atol=1e-5)


def test_near_identity_learns_in_both_branches():
    encoder = TCA(C, 4, 1, 64, init="near_identity").train()
    encoder(*make_batch()).pow(3).sum().backward()
    layer = encoder.transformer_encoder.layers[0]
    for end in (layer.self_attn.out_proj, layer.linear2):
        assert end.weight.grad.abs().sum() > 0


def test_tca_refuses_heads_that_do_not_divide_the_channels():
    with pytest.raises(InputError, match="30 channels.*8 attention heads.*--nhead"):
        TCA(30, 8)


# --- Mean ---------------------------------------------------------------------------------------


def test_mean_is_numpys_mean_of_the_frames():
    x, num_frames = make_batch()
    found = Mean(C)(x, num_frames).numpy()
    for row, frames, T in zip(found, x.numpy(), LENGTHS, strict=True):
        mean = frames[:T].mean(0)
        np.testing.assert_allclose(row, mean / np.linalg.norm(mean), atol=1e-5)


# --- bfloat16 -----------------------------------------------------------------------------------


def test_bfloat16_is_the_same_with_and_without_gradients():
    """PyTorch's fast path, taken without gradients, is five times less exact on a CPU."""
    encoder = TCA(256, dropout=0.0).eval()
    x, num_frames = torch.randn(6, 50, 256), torch.tensor([50, 40, 30, 20, 9, 1])
    exact = encoder(x, num_frames)
    with torch.autocast("cpu", torch.bfloat16):
        with_gradients = encoder(x, num_frames)
        with torch.inference_mode():
            without = encoder(x, num_frames)
    torch.testing.assert_close(without, with_gradients, rtol=0, atol=0)
    assert without.dtype == torch.float32 and (without - exact).abs().max() < 6e-4


def test_attention_does_not_ask_cudnn_which_plans_for_every_shape(monkeypatch):
    """On a GPU a step in bfloat16 took seconds; elsewhere in the process cuDNN stays allowed."""
    attention, allowed = F.scaled_dot_product_attention, []

    def attend(*arguments):
        allowed.append(torch.backends.cuda.cudnn_sdp_enabled())
        return attention(*arguments)

    before = torch.backends.cuda.cudnn_sdp_enabled()
    monkeypatch.setattr(F, "scaled_dot_product_attention", attend)
    x, num_frames = make_batch()
    with torch.autocast("cpu", torch.bfloat16):
        make_tca(2)(x, num_frames)
    assert allowed == [False, False] and torch.backends.cuda.cudnn_sdp_enabled() == before
