"""Encoders and momentum contrast: padding, the released model's names and figures, the ring, the logits."""

import contextlib
import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.worlds import C
from torch import nn

from model import (
    ENCODERS,
    GRU,
    LSTM,
    TCA,
    Mean,
    MoCo,
    NetVLAD,
    NeXtVLAD,
    build_encoder,
    encoder_arguments,
)
from padding import bucket_by_length, encode_by_length
from utils import InputError, load_torch

LENGTHS = [1, 3, 7, 20]
RELEASED_KEYS = {
    f"transformer_encoder.layers.0.{name}"
    for name in (
        "self_attn.in_proj_weight", "self_attn.in_proj_bias", "self_attn.out_proj.weight", "self_attn.out_proj.bias",
        "linear1.weight", "linear1.bias", "linear2.weight", "linear2.bias",
        "norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias",
    )
}  # fmt: skip


def tca(nlayers=1, dropout=0.0, seed=0, **options):
    """A TCA all of whose parameters are away from their special values (zeros, ones)."""
    torch.manual_seed(seed)
    return stirred(TCA(C, 4, nlayers, 64, dropout, **options))


def stirred(encoder):
    """`encoder` with all parameters and batch statistics away from their special values."""
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for name, buffer in encoder.named_buffers():
            if "running" in name:
                buffer.add_(0.3 * torch.rand_like(buffer))
    return encoder


D = 24  # descriptor size of the encoders that have one of their own
MAKE = {
    "netvlad": lambda dropout=0.0: NetVLAD(C, 5, D, False, dropout),
    "netvlad, normalised": lambda dropout=0.0: NetVLAD(C, 5, D, True, dropout),
    "nextvlad": lambda dropout=0.0: NeXtVLAD(C, 5, D, False, dropout, groups=4),
    "nextvlad, normalised": lambda dropout=0.0: NeXtVLAD(C, 5, D, True, dropout, groups=4),
    "lstm": lambda dropout=0.0: LSTM(C, D, 2, dropout),
    "gru": lambda dropout=0.0: GRU(C, D, 1, dropout),
}
NORMED = list(MAKE)  # encoders with batch norm
RECURRENT = ["lstm", "gru"]


def make(kind, seed=0, **options):
    torch.manual_seed(seed)
    return stirred(MAKE[kind](**options))


def batch(lengths=LENGTHS, T=None, seed=1):
    """x (N, T, C), zero at padding, and num_frames (N,)."""
    torch.manual_seed(seed)
    num_frames = torch.tensor(lengths)
    x = torch.randn(len(lengths), T or max(lengths), C)
    return x.masked_fill(padding_of(x, num_frames), 0.0), num_frames


def padding_of(x, num_frames):
    return (torch.arange(x.shape[1]) >= num_frames[:, None])[..., None].expand_as(x)


WAYS = {"inference": (False, torch.inference_mode), "no_grad": (False, torch.no_grad)} | {
    "eval with gradients": (False, contextlib.nullcontext),
    "train": (True, contextlib.nullcontext),
}


@pytest.fixture(
    params=[(kind, way) for kind in ("tca", "tca of 2 layers", "mean") for way in WAYS],
    ids="-".join,
)
def run(request):
    """(encoder, how to call it): every encoder in each way PyTorch computes it (its fast path, autograd, training)."""
    kind, way = request.param
    encoder = {"tca": lambda: tca(1), "tca of 2 layers": lambda: tca(2), "mean": lambda: Mean(C)}[
        kind
    ]()
    training, context = WAYS[way]
    encoder.train(training)

    def call(method, *arguments):
        with context():
            return getattr(encoder, method)(*arguments).detach()

    return call


# --- padding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["forward", "encode"])
def test_a_video_is_described_alike_alone_in_a_batch_and_padded_to_300(run, method):
    x, num_frames = batch()
    together = run(method, x, num_frames)
    far = run(method, F.pad(x, (0, 0, 0, 300 - x.shape[1])), num_frames)
    for i, T in enumerate(LENGTHS):
        alone = run(method, x[i : i + 1, :T], num_frames[i : i + 1])[0]
        padded_alone = run(
            method, F.pad(x[i : i + 1], (0, 0, 0, 300 - x.shape[1])), num_frames[i : i + 1]
        )[0]
        part = slice(None) if method == "forward" else slice(T)
        for other in (together[i], far[i], padded_alone):
            torch.testing.assert_close(other[part], alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), -float("inf"), 1e30, 3.4e38])
def test_what_stands_in_the_padding_changes_nothing(run, garbage):
    x, num_frames = batch(T=25)
    dirty = x.masked_fill(padding_of(x, num_frames), garbage)
    for method in ("forward", "encode"):
        torch.testing.assert_close(
            run(method, dirty, num_frames), run(method, x, num_frames), atol=1e-6, rtol=0
        )


def test_garbage_in_the_padding_changes_no_gradient():
    x, num_frames = batch(T=25)
    gradients = []
    for fill in (0.0, float("nan")):
        encoder = tca().train()
        encoder(x.masked_fill(padding_of(x, num_frames), fill), num_frames).pow(3).sum().backward()
        gradients.append([parameter.grad for parameter in encoder.parameters()])
    for clean, dirty in zip(*gradients, strict=True):
        torch.testing.assert_close(dirty, clean, atol=1e-6, rtol=1e-4)


def test_encode_is_zero_past_num_frames_and_of_unit_norm_before(run):
    x, num_frames = batch(T=25)
    out = run("encode", x, num_frames)
    assert out.shape == (len(LENGTHS), 25, C)
    for row, T in zip(out, LENGTHS, strict=True):
        torch.testing.assert_close(row[:T].norm(dim=1), torch.ones(T), atol=1e-5, rtol=0)
        assert not row[T:].any()


def test_forward_is_of_unit_norm(run):
    out = run("forward", *batch())
    assert out.shape == (len(LENGTHS), C)
    torch.testing.assert_close(out.norm(dim=1), torch.ones(len(LENGTHS)), atol=1e-5, rtol=0)


def test_a_video_of_one_frame_has_its_frame_as_its_descriptor(run):
    x, num_frames = batch([1, 1])
    torch.testing.assert_close(
        run("forward", x, num_frames), run("encode", x, num_frames)[:, 0], atol=1e-5, rtol=0
    )


def test_the_order_of_a_batch_does_not_matter(run):
    x, num_frames = batch([5, 1, 20, 7, 7])
    order = torch.tensor([3, 0, 4, 2, 1])
    for method in ("forward", "encode"):
        expected = run(method, x, num_frames)[order]
        torch.testing.assert_close(
            run(method, x[order], num_frames[order]), expected, atol=1e-5, rtol=0
        )


def test_the_order_of_frames_does_not_matter_to_the_video_descriptor(run):
    x, num_frames = batch([20])
    order = torch.randperm(20)
    shuffled = run("forward", x[:, order], num_frames)
    torch.testing.assert_close(shuffled, run("forward", x, num_frames), atol=1e-5, rtol=0)
    frames = run("encode", x, num_frames)[:, order]
    torch.testing.assert_close(run("encode", x[:, order], num_frames), frames, atol=1e-5, rtol=0)


# --- what the encoders are -------------------------------------------------------------------------------------------


def test_tca_parameters_are_named_as_in_the_released_model():
    assert len(RELEASED_KEYS) == 12
    assert set(TCA(C, 4, 1, 64).state_dict()) == RELEASED_KEYS
    assert {
        name: tuple(value.shape) for name, value in TCA().state_dict().items() if "weight" in name
    } == {
        "transformer_encoder.layers.0.self_attn.in_proj_weight": (3072, 1024),
        "transformer_encoder.layers.0.self_attn.out_proj.weight": (1024, 1024),
        "transformer_encoder.layers.0.linear1.weight": (2048, 1024),
        "transformer_encoder.layers.0.linear2.weight": (1024, 2048),
        "transformer_encoder.layers.0.norm1.weight": (1024,),
        "transformer_encoder.layers.0.norm2.weight": (1024,),
    }


class Released(nn.Module):
    """The released model, written anew: frames first, a mask of -inf semantics by a bool, the mean over real frames."""

    def __init__(self, nlayers=1, nhead=4):
        super().__init__()
        layer = nn.TransformerEncoderLayer(C, nhead, dim_feedforward=64, dropout=0.2)
        self.transformer_encoder = nn.TransformerEncoder(layer, nlayers, enable_nested_tensor=False)

    def frames(self, x, num_frames):
        out = self.transformer_encoder(
            x.permute(1, 0, 2), src_key_padding_mask=padding_of(x, num_frames)[..., 0]
        )
        return out.permute(1, 0, 2)

    def forward(self, x, num_frames):
        real = ~padding_of(x, num_frames)
        return F.normalize((self.frames(x, num_frames) * real).sum(1) / num_frames[:, None], dim=1)


@pytest.mark.parametrize("nlayers", [1, 2])
def test_the_released_models_state_dict_loads_strictly_and_gives_its_descriptors(nlayers):
    torch.manual_seed(3)
    released = Released(nlayers).train(False)
    with torch.no_grad():
        for parameter in released.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    encoder = TCA(C, 4, nlayers, 64)
    encoder.load_state_dict(released.state_dict(), strict=True)
    x, num_frames = batch()
    with torch.no_grad():
        torch.testing.assert_close(
            encoder.eval()(x, num_frames), released(x, num_frames), atol=1e-5, rtol=0
        )
        frames = F.normalize(released.frames(x, num_frames), dim=2)
        for ours, theirs, T in zip(encoder.encode(x, num_frames), frames, LENGTHS, strict=True):
            torch.testing.assert_close(ours[:T], theirs[:T], atol=1e-5, rtol=0)


@pytest.mark.parametrize("nlayers", [1, 2])
def test_near_identity_starts_as_two_layer_norms_a_layer_of_the_input(nlayers):
    encoder = TCA(C, 4, nlayers, 64, init="near_identity").eval()
    x, num_frames = batch()
    expected = x.double().numpy()
    for _ in range(2 * nlayers):
        centred = expected - expected.mean(2, keepdims=True)
        expected = centred / np.sqrt((centred**2).mean(2, keepdims=True) + 1e-5)
    with torch.no_grad():
        found = encoder.encode(x, num_frames)
    for i, T in enumerate(LENGTHS):
        unit = expected[i, :T] / np.linalg.norm(expected[i, :T], axis=1, keepdims=True)
        np.testing.assert_allclose(found[i, :T].numpy(), unit, atol=1e-5)


def test_near_identity_still_learns_in_both_branches():
    encoder = TCA(C, 4, 1, 64, init="near_identity").train()
    encoder(*batch()).pow(3).sum().backward()
    layer = encoder.transformer_encoder.layers[0]
    assert (
        layer.self_attn.out_proj.weight.grad.abs().sum() > 0
        and layer.linear2.weight.grad.abs().sum() > 0
    )


def test_mean_is_numpys_mean_of_the_frames():
    x, num_frames = batch()
    found = Mean(C)(x, num_frames).numpy()
    for row, frames, T in zip(found, x.numpy(), LENGTHS, strict=True):
        mean = frames[:T].mean(0)
        np.testing.assert_allclose(row, mean / np.linalg.norm(mean), atol=1e-5)


def test_heads_that_do_not_divide_the_channels_are_refused_by_name():
    with pytest.raises(InputError, match="30 channels.*8 attention heads.*--nhead"):
        TCA(30, 8)


# --- the encoders of the paper's comparison --------------------------------------------------------------------------


def call(encoder, method, *arguments):
    with torch.no_grad():
        return getattr(encoder, method)(*arguments)


@pytest.mark.parametrize("kind", NORMED)
def test_batch_normed_encoders_describe_a_video_alike_alone_in_a_batch_padded_and_with_garbage(
    kind,
):
    encoder = make(kind).eval()
    x, num_frames = batch()
    longer = F.pad(x, (0, 0, 0, 40))
    dirty = longer.masked_fill(padding_of(longer, num_frames), float("nan"))
    for method in ["forward", "encode"][: 1 + (kind in RECURRENT)]:
        together = call(encoder, method, x, num_frames)
        same = call(encoder, method, dirty, num_frames)
        assert torch.isfinite(same).all()
        torch.testing.assert_close(same[:, : together.shape[1]], together, atol=1e-6, rtol=0)
        for i, T in enumerate(LENGTHS):
            alone = call(encoder, method, x[i : i + 1, :T], num_frames[i : i + 1])[0]
            found = together[i] if method == "forward" else together[i, :T]
            torch.testing.assert_close(found, alone, atol=1e-6, rtol=0)
            torch.testing.assert_close(
                found.norm(dim=-1), torch.ones(found.shape[:-1]), atol=1e-6, rtol=0
            )
            assert method == "forward" or not together[i, T:].any()
    assert (
        call(encoder, "forward", x, num_frames).shape == (len(LENGTHS), D)
        and encoder.descriptor_size == D
    )


@pytest.mark.parametrize("kind", NORMED)
def test_padding_changes_no_batch_statistics_and_no_gradient(kind):
    x, num_frames = batch()
    found = []
    for fill, width in ((0.0, 0), (float("nan"), 30)):
        encoder = make(kind).train()
        padded = F.pad(x, (0, 0, 0, width))
        encoder(padded.masked_fill(padding_of(padded, num_frames), fill), num_frames).pow(
            3
        ).sum().backward()
        gradients = {name: parameter.grad for name, parameter in encoder.named_parameters()}
        assert all(gradient is not None for gradient in gradients.values())
        found.append(gradients | dict(encoder.named_buffers()))
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", RECURRENT + ["netvlad"])
def test_the_batch_norm_of_frames_sees_the_real_frames_of_all_videos(kind):
    encoder = MAKE[kind]().train()
    x, num_frames = batch(T=25)
    encoder(x, num_frames)
    frames = np.concatenate([row[:T].numpy() for row, T in zip(x, LENGTHS, strict=True)])
    np.testing.assert_allclose(encoder.bn1.running_mean.numpy(), 0.1 * frames.mean(0), atol=1e-6)
    np.testing.assert_allclose(
        encoder.bn1.running_var.numpy(), 0.9 + 0.1 * frames.var(0, ddof=1), atol=1e-6
    )


def normed(norm, x):
    """Batch norm by its running statistics, (..., C)."""
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    return (x - norm.running_mean) * scale + norm.bias


def head(encoder, vlad):
    """Cluster sums (K, D') of one video -> its descriptor, as the released code computes it."""
    flat = torch.cat([row / row.norm() for row in vlad])
    out = normed(encoder.bn3, encoder.fc1.weight @ normed(encoder.bn2, flat) + encoder.fc1.bias)
    gates = normed(encoder.bn4, encoder.fc2.weight @ out + encoder.fc2.bias).clamp(min=0)
    out = out / (1 + (-(encoder.fc3.weight @ gates + encoder.fc3.bias)).exp())
    return out / out.norm()


@pytest.mark.parametrize("normalise", [False, True])
def test_netvlad_is_its_equation_by_loops(normalise):
    encoder = make("netvlad, normalised" if normalise else "netvlad").eval()
    x, num_frames = batch([1, 4, 9])
    with torch.no_grad():
        found = encoder(x, num_frames)
        for row, frames, T in zip(found, x, num_frames.tolist(), strict=True):
            vlad = torch.zeros(5, C)
            for frame in normed(encoder.bn1, frames[:T]):
                frame = frame / frame.norm() if normalise else frame
                scores = [
                    float(encoder.conv.weight[k, :, 0] @ frame + encoder.conv.bias[k])
                    for k in range(5)
                ]
                for k in range(5):
                    weight = np.exp(scores[k]) / sum(np.exp(scores))
                    vlad[k] += weight * (frame - encoder.centroids[k])
            torch.testing.assert_close(row, head(encoder, vlad), atol=1e-5, rtol=0)


@pytest.mark.parametrize("normalise", [False, True])
def test_nextvlad_is_its_equations_by_loops(normalise):
    encoder = make("nextvlad, normalised" if normalise else "nextvlad").eval()
    x, num_frames = batch([1, 4, 9])
    K, G = 5, 4
    with torch.no_grad():
        found = encoder(x, num_frames)
        for row, frames, T in zip(found, x, num_frames.tolist(), strict=True):
            vlad = torch.zeros(K, 2 * C // G)
            for frame in frames[:T]:
                frame = frame / frame.norm() if normalise else frame
                wide = encoder.conv1.weight[..., 0] @ frame + encoder.conv1.bias
                attention = 1 / (
                    1 + (-(encoder.conv2.weight[..., 0] @ wide + encoder.conv2.bias)).exp()
                )
                scores = normed(encoder.bn1, encoder.conv3.weight[..., 0] @ wide).reshape(K, G)
                for g in range(G):
                    weights = scores[:, g].exp() / scores[:, g].exp().sum()
                    for k in range(K):
                        vlad[k] += attention[g] * weights[k] * (wide[g::G] - encoder.centroids[k])
            torch.testing.assert_close(row, head(encoder, vlad), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", RECURRENT)
def test_recurrent_encoders_are_torchs_networks_run_one_video_at_a_time(kind):
    encoder = make(kind).eval()
    network = {"lstm": nn.LSTM(C, D, 2), "gru": nn.GRU(C, D, 1)}[kind].eval()
    prefix = f"{kind.upper()}."
    weights = {
        name: value for name, value in encoder.state_dict().items() if name.startswith(prefix)
    }
    network.load_state_dict({name.removeprefix(prefix): value for name, value in weights.items()})
    x, num_frames = batch()
    with torch.no_grad():
        for i, T in enumerate(LENGTHS):
            out = network(normed(encoder.bn1, x[i, :T]))[0]  # (T, D)
            torch.testing.assert_close(
                encoder.encode(x, num_frames)[i, :T], F.normalize(out, dim=1), atol=1e-5, rtol=0
            )
            torch.testing.assert_close(
                encoder(x, num_frames)[i], F.normalize(out.mean(0), dim=0), atol=1e-5, rtol=0
            )


RELEASED_SHAPES = {  # of the released code's classes at feature_size 6, output_dim 8, 3 clusters, 2 groups, hidden size 8
    "netvlad": {
        "bn1.weight": (6,), "conv.weight": (3, 6, 1), "conv.bias": (3,), "centroids": (3, 6), "bn2.weight": (18,),
        "fc1.weight": (8, 18), "bn3.weight": (8,), "fc2.weight": (1, 8), "bn4.weight": (1,), "fc3.weight": (8, 1),
    },
    "nextvlad": {
        "conv1.weight": (12, 6, 1), "conv2.weight": (2, 12, 1), "conv3.weight": (6, 12, 1), "bn1.weight": (6,),
        "centroids": (3, 6), "bn2.weight": (18,), "fc1.weight": (8, 18), "bn3.weight": (8,), "fc2.weight": (1, 8),
        "bn4.weight": (1,), "fc3.weight": (8, 1), "conv1.bias": (12,), "conv2.bias": (2,),
    },
    "lstm": {"LSTM.weight_ih_l0": (32, 6), "LSTM.weight_hh_l1": (32, 8), "bn1.weight": (6,)},
    "gru": {"GRU.weight_ih_l0": (24, 6), "GRU.weight_hh_l1": (24, 8), "bn1.weight": (6,)},
}  # fmt: skip


@pytest.mark.parametrize("name", RELEASED_SHAPES)
def test_parameters_are_named_and_shaped_as_in_the_released_code(name):
    options = {"netvlad": {"num_clusters": 3}, "nextvlad": {"num_clusters": 3, "groups": 2}}.get(
        name, {}
    )
    state = ENCODERS[name](6, output_dim=8, **options).state_dict()
    assert {key: tuple(state[key].shape) for key in RELEASED_SHAPES[name]} == RELEASED_SHAPES[name]
    biases = {
        key.replace("weight", "bias")
        for key in RELEASED_SHAPES[name]
        if key.startswith(("bn", "fc"))
    }
    rest = set(state) - set(RELEASED_SHAPES[name]) - biases
    assert all(
        "running" in key or "num_batches" in key or "_l0" in key or "_l1" in key for key in rest
    )


@pytest.mark.parametrize("kind", ["netvlad", "nextvlad"])
def test_vlads_have_no_frame_descriptors_and_say_so(kind):
    with pytest.raises(
        InputError, match="VLAD gives no frame descriptors; use a video-level metric"
    ):
        make(kind).encode(*batch())


@pytest.mark.parametrize("kind", NORMED)
def test_one_video_a_step_cannot_train_batch_norm_and_the_error_names_the_flag(kind):
    with pytest.raises(InputError, match="--batch_sz"):
        make(kind).train()(*batch([1]))


def test_sizes_that_no_encoder_can_have_are_refused():
    with pytest.raises(InputError, match="--output_dim 4 .* 8 or more"):
        NetVLAD(C, output_dim=4)
    with pytest.raises(InputError, match="30 channels.* 8 groups"):
        NeXtVLAD(30)


@pytest.mark.parametrize("name", ENCODERS)
def test_every_encoder_is_built_from_flags_and_rebuilt_from_its_file(name, tmp_path):
    args = SimpleNamespace(
        num_layers=1, output_dim=16, num_clusters=4, normalize_input=None, dropout=0.1, nhead=2
    )
    arguments = encoder_arguments(name, C, args)
    encoder = stirred(ENCODERS[name](**arguments)).eval()
    assert encoder.feature_size == C
    assert encoder.descriptor_size == (C if name in ("tca", "mean") else 16)
    for argument, flag in ENCODERS[
        name
    ].flags.items():  # those given, and the constructor's own for the rest
        given = getattr(args, flag, None)
        assert given is None or arguments[argument] == given
    torch.save(
        {"encoder": name, "arguments": arguments, "state_dict": encoder.state_dict()},
        tmp_path / "model.pth",
    )
    built = build_encoder(load_torch(tmp_path / "model.pth"), "model.pth")
    x, num_frames = batch()
    torch.testing.assert_close(
        call(built, "forward", x, num_frames),
        call(encoder, "forward", x, num_frames),
        atol=0,
        rtol=0,
    )


def test_flags_left_out_leave_each_encoders_own_defaults():
    arguments = {
        name: encoder_arguments(name, C, SimpleNamespace(dropout=None)) for name in ENCODERS
    }
    assert arguments["mean"] == {"feature_size": C}
    assert [arguments[name]["dropout"] for name in ("tca", "netvlad", "nextvlad", "lstm")] == [
        0.2,
        0.5,
        0.5,
        0.2,
    ]
    assert [arguments[name]["num_clusters"] for name in ("netvlad", "nextvlad")] == [256, 64]


@pytest.mark.parametrize("kind", NORMED)
@pytest.mark.parametrize("m", [0.0, 0.9])
def test_momentum_covers_the_batch_statistics(kind, m):
    moco = MoCo(make(kind), D, 8, m=m)
    stirred(moco.encoder_q)
    moco.encoder_q.train()(*batch())
    query, before = (
        copy.deepcopy(moco.encoder_q.state_dict()),
        copy.deepcopy(moco.encoder_k.state_dict()),
    )
    moco.update_key_encoder()
    for name, value in moco.encoder_k.state_dict().items():
        expected = (
            m * before[name] + (1 - m) * query[name] if value.is_floating_point() else query[name]
        )
        torch.testing.assert_close(value, expected)
    assert int(moco.encoder_k.bn1.num_batches_tracked) == 1


@pytest.mark.parametrize("kind", NORMED)
def test_keys_of_batch_normed_encoders_do_not_depend_on_how_a_batch_is_split_by_length(kind):
    encoder = make(kind).train()
    x, num_frames = batch([3, 300, 5, 40])
    assert len(list(bucket_by_length(num_frames.tolist()))) > 1
    torch.testing.assert_close(call(copy.deepcopy(encoder), "forward", x, num_frames),
        encode_by_length(encoder, x, num_frames).detach(), atol=0, rtol=0)  # fmt: skip


# --- model files -----------------------------------------------------------------------------------------------------


def forms(encoder):
    """Every form in which an encoder's file comes."""
    state = encoder.state_dict()
    moco = MoCo(copy.deepcopy(encoder), C, K=8)
    with torch.no_grad():
        for parameter in moco.encoder_k.parameters():
            parameter.zero_()  # only encoder_q is to be taken
    arguments = dict(
        feature_size=C, nhead=4, nlayers=2, dim_feedforward=64, dropout=0.0, init="paper"
    )
    return {
        "bare state dict": state,
        "module. prefix": {f"module.{name}": value for name, value in state.items()},
        "MoCo state dict": moco.state_dict(),
        "MoCo with module. prefix": {
            f"module.{name}": value for name, value in moco.state_dict().items()
        },
        "model.pth": {
            "encoder": "tca",
            "arguments": arguments,
            "features": {},
            "state_dict": state,
        },
        "checkpoint.pth": {
            "encoder": "tca",
            "arguments": arguments,
            "moco": moco.state_dict(),
            "step": 3,
        },
    }


@pytest.mark.parametrize("form", forms(tca(2)))
def test_build_encoder_takes_every_form_of_a_models_file(form, tmp_path):
    encoder = tca(2).eval()
    torch.save(forms(encoder)[form], tmp_path / "x.pth")
    built = build_encoder(load_torch(tmp_path / "x.pth"), "x.pth", nhead=4)
    assert not built.training
    x, num_frames = batch()
    with torch.no_grad():
        torch.testing.assert_close(built(x, num_frames), encoder(x, num_frames), atol=1e-6, rtol=0)


def test_build_encoder_rebuilds_the_mean():
    state = {"encoder": "mean", "arguments": {"feature_size": C}, "state_dict": {}}
    assert isinstance(build_encoder(state, "x.pth"), Mean)


def wrong_states():
    good = tca().state_dict()
    first = "transformer_encoder.layers.0."
    arguments = dict(feature_size=C, nhead=4, nlayers=1, dim_feedforward=64)
    return {
        "a wrong shape": good | {f"{first}linear2.weight": torch.zeros(3, 3)},
        "a missing tensor": {name: value for name, value in good.items() if "norm2" not in name},
        "a tensor too many": good | {"classifier.weight": torch.zeros(2, 2)},
        "another model": {"fc.weight": torch.zeros(2, 2)},
        "a number": 5,
        "nothing": {},
        "a list": [1, 2],
        "no tensors": {f"{first}self_attn.in_proj_weight": 3},
        "own form, wrong shape": {
            "encoder": "tca",
            "arguments": arguments | {"feature_size": 64},
            "state_dict": good,
        },
        "own form, wrong arguments": {
            "encoder": "tca",
            "arguments": {"width": 64},
            "state_dict": good,
        },
        "own form, nothing in it": {"encoder": "tca"},
        "keys that are no names": {1: torch.zeros(2), 2: torch.zeros(2)},
    }


@pytest.mark.parametrize("kind", wrong_states())
def test_a_file_that_holds_no_such_model_is_refused_by_name_in_one_line(kind):
    with pytest.raises(InputError) as error:
        build_encoder(wrong_states()[kind], "model file 'runs/x/model.pth'", nhead=4)
    assert "runs/x/model.pth" in str(error.value) and "\n" not in str(error.value)
