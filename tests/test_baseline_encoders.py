"""NetVLAD, NeXtVLAD, LSTM and GRU: padding, batch statistics, the released names and equations."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.encoders import LENGTHS, make_batch, padding_of, randomised
from helpers.worlds import C
from torch import nn

from model import ENCODERS, GRU, LSTM, MoCo, NetVLAD, NeXtVLAD
from padding import bucket_by_length, encode_by_length
from utils import InputError

D = 24  # descriptor size
BASELINES = {
    "netvlad": lambda: NetVLAD(C, 5, D, False, dropout=0.0),
    "netvlad, normalised": lambda: NetVLAD(C, 5, D, True, dropout=0.0),
    "nextvlad": lambda: NeXtVLAD(C, 5, D, False, dropout=0.0, groups=4),
    "nextvlad, normalised": lambda: NeXtVLAD(C, 5, D, True, dropout=0.0, groups=4),
    "lstm": lambda: LSTM(C, D, 2, dropout=0.0),
    "gru": lambda: GRU(C, D, 1, dropout=0.0),
}
RECURRENT = ["lstm", "gru"]
WITH_BATCH_NORM = [kind for kind, make in BASELINES.items() if hasattr(make(), "bn1")]


def make(kind, seed=0):
    torch.manual_seed(seed)
    return randomised(BASELINES[kind]())


def call(encoder, method, *arguments):
    with torch.no_grad():
        return getattr(encoder, method)(*arguments)


# --- padding and batch statistics ---------------------------------------------------------------


@pytest.mark.parametrize("kind", BASELINES)
def test_descriptors_are_the_same_alone_in_a_batch_and_with_garbage_padding(kind):
    encoder = make(kind).eval()
    x, num_frames = make_batch()
    longer = F.pad(x, (0, 0, 0, 40))
    dirty = longer.masked_fill(padding_of(longer, num_frames), float("nan"))
    assert call(encoder, "forward", x, num_frames).shape == (len(LENGTHS), encoder.descriptor_size)
    for method in ("forward", "encode") if encoder.has_frame_descriptors else ("forward",):
        in_batch = call(encoder, method, x, num_frames)
        with_garbage = call(encoder, method, dirty, num_frames)
        assert torch.isfinite(with_garbage).all()
        found = with_garbage[:, : in_batch.shape[1]]
        torch.testing.assert_close(found, in_batch, atol=1e-6, rtol=0)
        for i, T in enumerate(LENGTHS):
            alone = call(encoder, method, x[i : i + 1, :T], num_frames[i : i + 1])[0]
            found = in_batch[i] if method == "forward" else in_batch[i, :T]
            torch.testing.assert_close(found, alone, atol=1e-6, rtol=0)
            ones = torch.ones(found.shape[:-1])
            torch.testing.assert_close(found.norm(dim=-1), ones, atol=1e-6, rtol=0)
            if method == "encode":
                assert not in_batch[i, T:].any()


@pytest.mark.parametrize("kind", BASELINES)
def test_padding_changes_no_batch_statistics_and_no_gradient(kind):
    x, num_frames = make_batch()
    found = []
    for fill, more in ((0.0, 0), (float("nan"), 30)):
        encoder = make(kind).train()
        padded = F.pad(x, (0, 0, 0, more))
        padded = padded.masked_fill(padding_of(padded, num_frames), fill)
        encoder(padded, num_frames).pow(3).sum().backward()
        gradients = {name: parameter.grad for name, parameter in encoder.named_parameters()}
        assert all(gradient is not None for gradient in gradients.values())
        found.append(gradients | dict(encoder.named_buffers()))
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", [*RECURRENT, "netvlad"])
def test_batch_norm_of_frames_sees_the_valid_frames_of_all_videos(kind):
    encoder = BASELINES[kind]().train()
    x, num_frames = make_batch(T=25)
    encoder(x, num_frames)
    frames = np.concatenate([row[:T].numpy() for row, T in zip(x, LENGTHS, strict=True)])
    mean, variance = 0.1 * frames.mean(0), 0.9 + 0.1 * frames.var(0, ddof=1)
    np.testing.assert_allclose(encoder.bn1.running_mean.numpy(), mean, atol=1e-6)
    np.testing.assert_allclose(encoder.bn1.running_var.numpy(), variance, atol=1e-6)


@pytest.mark.parametrize("kind", WITH_BATCH_NORM)
def test_batch_norm_refuses_to_train_on_one_video_a_step(kind):
    with pytest.raises(InputError, match="--batch_sz"):
        make(kind).train()(*make_batch([1]))


@pytest.mark.parametrize("kind", WITH_BATCH_NORM)
def test_encode_by_length_keeps_a_batch_whole_for_batch_statistics(kind):
    encoder = make(kind).train()
    x, num_frames = make_batch([3, 300, 5, 40])
    assert len(list(bucket_by_length(num_frames.tolist()))) > 1
    expected = call(copy.deepcopy(encoder), "forward", x, num_frames)
    found = encode_by_length(encoder, x, num_frames).detach()
    torch.testing.assert_close(found, expected, atol=0, rtol=0)


@pytest.mark.parametrize("kind", WITH_BATCH_NORM)
@pytest.mark.parametrize("m", [0.0, 0.9])
def test_momentum_covers_the_batch_statistics(kind, m):
    moco = MoCo(make(kind), D, 8, m=m)
    randomised(moco.encoder_q)
    moco.encoder_q.train()(*make_batch())
    query = copy.deepcopy(moco.encoder_q.state_dict())
    before = copy.deepcopy(moco.encoder_k.state_dict())
    moco.update_key_encoder()
    for name, value in moco.encoder_k.state_dict().items():
        expected = query[name]
        if value.is_floating_point():
            expected = m * before[name] + (1 - m) * query[name]
        torch.testing.assert_close(value, expected)
    assert int(moco.encoder_k.bn1.num_batches_tracked) == 1


# --- equations ----------------------------------------------------------------------------------


def normed(norm, x):
    """Batch norm by its running statistics: (..., C)."""
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    return (x - norm.running_mean) * scale + norm.bias


def gated(encoder, vlad):
    """Cluster sums (K, D') of one video -> its descriptor, as the released code computes it."""
    flat = torch.cat([row / row.norm() for row in vlad])
    out = normed(encoder.bn3, encoder.fc1.weight @ normed(encoder.bn2, flat) + encoder.fc1.bias)
    gates = normed(encoder.bn4, encoder.fc2.weight @ out + encoder.fc2.bias).clamp(min=0)
    out = out / (1 + (-(encoder.fc3.weight @ gates + encoder.fc3.bias)).exp())
    return out / out.norm()


def affine(layer, x):
    """A convolution of width 1 on one frame (C,)."""
    out = layer.weight[..., 0] @ x
    return out if layer.bias is None else out + layer.bias


@pytest.mark.parametrize("is_normalised", [False, True])
def test_netvlad_is_its_equation_by_loops(is_normalised):
    encoder = make("netvlad, normalised" if is_normalised else "netvlad").eval()
    x, num_frames = make_batch([1, 4, 9])
    with torch.no_grad():
        found = encoder(x, num_frames)
        for row, frames, T in zip(found, x, num_frames.tolist(), strict=True):
            vlad = torch.zeros(5, C)
            for frame in normed(encoder.bn1, frames[:T]):
                frame = frame / frame.norm() if is_normalised else frame
                scores = affine(encoder.conv, frame).exp()
                for k in range(5):
                    vlad[k] += scores[k] / scores.sum() * (frame - encoder.centroids[k])
            torch.testing.assert_close(row, gated(encoder, vlad), atol=1e-5, rtol=0)


@pytest.mark.parametrize("is_normalised", [False, True])
def test_nextvlad_is_its_equations_by_loops(is_normalised):
    encoder = make("nextvlad, normalised" if is_normalised else "nextvlad").eval()
    x, num_frames = make_batch([1, 4, 9])
    K, G = 5, 4
    with torch.no_grad():
        found = encoder(x, num_frames)
        for row, frames, T in zip(found, x, num_frames.tolist(), strict=True):
            vlad = torch.zeros(K, 2 * C // G)
            for frame in frames[:T]:
                frame = frame / frame.norm() if is_normalised else frame
                wide = affine(encoder.conv1, frame)
                attention = 1 / (1 + (-affine(encoder.conv2, wide)).exp())
                scores = normed(encoder.bn1, affine(encoder.conv3, wide)).reshape(K, G).exp()
                for g in range(G):
                    for k in range(K):
                        weight = attention[g] * scores[k, g] / scores[:, g].sum()
                        vlad[k] += weight * (wide[g::G] - encoder.centroids[k])
            torch.testing.assert_close(row, gated(encoder, vlad), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", RECURRENT)
def test_recurrent_encoders_are_torchs_networks_one_video_at_a_time(kind):
    encoder = make(kind).eval()
    network = {"lstm": nn.LSTM(C, D, 2), "gru": nn.GRU(C, D, 1)}[kind].eval()
    network.load_state_dict(getattr(encoder, kind.upper()).state_dict())
    x, num_frames = make_batch()
    with torch.no_grad():
        videos, frames = encoder(x, num_frames), encoder.encode(x, num_frames)
        for i, T in enumerate(LENGTHS):
            out, _ = network(normed(encoder.bn1, x[i, :T]))  # (T, D)
            torch.testing.assert_close(frames[i, :T], F.normalize(out, dim=1), atol=1e-5, rtol=0)
            mean = F.normalize(out.mean(0), dim=0)
            torch.testing.assert_close(videos[i], mean, atol=1e-5, rtol=0)


# --- names, shapes, sizes -----------------------------------------------------------------------

VLAD_SHAPES = {
    "centroids": (3, 6),
    "bn2.weight": (18,),
    "fc1.weight": (8, 18),
    "bn3.weight": (8,),
    "fc2.weight": (1, 8),
    "bn4.weight": (1,),
    "fc3.weight": (8, 1),
}
# Of the released classes at feature_size 6, output_dim 8, 3 clusters, 2 groups, hidden size 8.
RELEASED_SHAPES = {
    "netvlad": VLAD_SHAPES | {"bn1.weight": (6,), "conv.weight": (3, 6, 1), "conv.bias": (3,)},
    "nextvlad": VLAD_SHAPES
    | {
        "bn1.weight": (6,),
        "conv1.weight": (12, 6, 1),
        "conv1.bias": (12,),
        "conv2.weight": (2, 12, 1),
        "conv2.bias": (2,),
        "conv3.weight": (6, 12, 1),
    },
    "lstm": {"LSTM.weight_ih_l0": (32, 6), "LSTM.weight_hh_l1": (32, 8), "bn1.weight": (6,)},
    "gru": {"GRU.weight_ih_l0": (24, 6), "GRU.weight_hh_l1": (24, 8), "bn1.weight": (6,)},
}


@pytest.mark.parametrize("name", RELEASED_SHAPES)
def test_parameters_are_named_and_shaped_as_released(name):
    options = {"netvlad": {"num_clusters": 3}, "nextvlad": {"num_clusters": 3, "groups": 2}}
    state = ENCODERS[name](6, output_dim=8, **options.get(name, {})).state_dict()
    shapes = RELEASED_SHAPES[name]
    assert {key: tuple(state[key].shape) for key in shapes} == shapes
    # The rest: biases of norms and linear layers, batch statistics, other recurrent weights.
    for key in set(state) - set(shapes):
        is_bias = key.startswith(("bn", "fc")) and key.endswith(".bias")
        is_statistic = "running" in key or "num_batches" in key
        assert is_bias or is_statistic or "_l0" in key or "_l1" in key, key


@pytest.mark.parametrize("method", ["encode", "encode_video_and_frames"])
@pytest.mark.parametrize("kind", ["netvlad", "nextvlad"])
def test_vlads_refuse_to_give_frame_descriptors(kind, method):
    message = "VLAD gives no frame descriptors; use a video-level metric"
    with pytest.raises(InputError, match=message):
        call(make(kind), method, *make_batch())


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match="--output_dim 4 .* 8 or more"):
        NetVLAD(C, output_dim=4)
    with pytest.raises(InputError, match="30 channels.* 8 groups"):
        NeXtVLAD(30)
