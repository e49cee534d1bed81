"""MoCo: the queue, the key encoder, the logits; and batches of like length."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.encoders import make_batch, make_tca
from helpers.worlds import C
from torch import nn

import padding
from model import Mean, MoCo
from padding import bucket_by_length, encode_by_length, pack


def make_sides(seed=0, N=3, M=8):
    """Anchors, positives and negatives (x, num_frames), each padded to its own longest video."""
    rng = np.random.default_rng(seed)
    sides = []
    for i, (count, longest) in enumerate([(N, 9), (N, 14), (M, 30)]):
        lengths = [int(T) for T in rng.integers(1, longest, count)]
        sides.append(make_batch(lengths, seed=seed + i))
    return sides


def encode_one_by_one(encoder, x, num_frames):
    with torch.no_grad():
        rows = [encoder(v[None, :T], T[None]) for v, T in zip(x, num_frames, strict=True)]
    return torch.cat(rows)


# --- the queue ----------------------------------------------------------------------------------


@pytest.mark.parametrize("K", [1, 7, 8, 64])
def test_queue_equals_writing_keys_one_by_one(K):
    torch.manual_seed(0)
    moco = MoCo(Mean(C), C, K)
    slots, ids = [column.clone() for column in moco.queue.T], [-1] * K
    slot, written = 0, 0
    assert moco.queue_ids.tolist() == ids
    for size in [1, 3, 8, 5, K, K + 1, 3 * K + 2, 1, 2, 7 * K, 4]:
        keys = torch.randn(size, C)
        moco.enqueue(keys, torch.arange(written, written + size))
        for key in keys:
            slots[slot], ids[slot] = key, written
            slot = (slot + 1) % K
            written += 1
        assert torch.equal(moco.queue, torch.stack(slots, 1))
        assert moco.queue_ids.tolist() == ids and int(moco.queue_ptr) == slot
        newest = set(range(max(0, written - K), written))
        assert set(ids) - {-1} == newest


def test_queue_age_counts_steps_since_a_key_was_written():
    moco = MoCo(Mean(C), C, 5)
    for first in (0, 2, 4):
        moco.enqueue(torch.randn(2, C), torch.arange(first, first + 2))
    assert moco.queue_ids.tolist() == [5, 1, 2, 3, 4]
    assert moco.queue_age.tolist() == [0, 2, 1, 1, 0]


def test_queue_and_pointer_are_saved_with_the_model():
    moco = MoCo(make_tca(), C, 8)
    moco.enqueue(torch.randn(5, C), torch.arange(5))
    other = MoCo(make_tca(seed=9), C, 8)
    other.load_state_dict(moco.state_dict())
    assert torch.equal(other.queue, moco.queue)
    assert torch.equal(other.queue_ids, moco.queue_ids)
    assert int(other.queue_ptr) == 5


# --- logits -------------------------------------------------------------------------------------


@pytest.mark.parametrize("T", [1.0, 0.07])
def test_logits_are_products_with_positives_and_the_queue_of_the_steps_before(T):
    K = 20
    moco = MoCo(make_tca(), C, K, m=0.0, T=T)
    for step in range(5):
        anchors, positives, negatives = make_sides(step)
        queue, pointer = moco.queue.clone(), int(moco.queue_ptr)
        logits, labels = moco(anchors, positives, negatives, torch.arange(8) + 8 * step)
        q = encode_one_by_one(moco.encoder_q, *anchors)
        p = encode_one_by_one(moco.encoder_q, *positives)
        n = encode_one_by_one(moco.encoder_q, *negatives)
        expected = []
        for a, b in zip(q, p, strict=True):
            expected.append([float(a @ b)] + [float(a @ key) for key in queue.T])
        assert logits.shape == (3, 1 + K) and labels.tolist() == [0, 0, 0]
        torch.testing.assert_close(logits, torch.tensor(expected) / T, atol=1e-5 / T, rtol=0)
        # The negatives are in the queue now, with their numbers.
        for i, key in enumerate(n):
            slot = (pointer + i) % K
            torch.testing.assert_close(moco.queue[:, slot], key, atol=1e-5, rtol=0)
            assert int(moco.queue_ids[slot]) == i + 8 * step


def test_logits_with_a_queue_smaller_than_the_negatives():
    moco = MoCo(make_tca(), C, 5)
    anchors, positives, negatives = make_sides()
    for _ in range(2):
        logits, _ = moco(anchors, positives, negatives, torch.arange(8))
    assert logits.shape == (3, 6)
    assert sorted(moco.queue_ids.tolist()) == [3, 4, 5, 6, 7]


def test_logits_without_a_queue_are_of_the_steps_own_negatives():
    moco = MoCo(make_tca(), C, 0)
    sides = make_sides()
    logits, _ = moco(*sides)
    q, p, n = (encode_one_by_one(moco.encoder_q, *side) for side in sides)
    expected = torch.cat([(q * p).sum(1)[:, None], q @ n.T], 1)
    torch.testing.assert_close(logits.detach(), expected, atol=1e-5, rtol=0)


def test_logits_of_packed_videos_equal_those_of_padded_ones():
    padded, packed = make_sides(), []
    for x, num_frames in padded:
        packed.append(pack([row[:T].numpy() for row, T in zip(x, num_frames, strict=True)]))
    torch.manual_seed(0)
    moco = MoCo(make_tca(), C, 8)
    other = copy.deepcopy(moco)
    torch.testing.assert_close(moco(*padded)[0], other(*packed)[0], atol=1e-6, rtol=0)


@pytest.mark.parametrize("K", [0, 20])
def test_false_negative_mask_puts_minus_infinity_there_and_nowhere_else(K):
    moco = MoCo(make_tca(), C, K)
    torch.manual_seed(0)
    is_false_negative = torch.rand(3, 40) < 0.4  # (N, numbers of negatives)

    def mask(numbers):
        return is_false_negative[:, numbers] & (numbers >= 0)

    for step in range(4):
        own_ids = torch.arange(8) + 8 * step
        ids = moco.queue_ids.clone() if K else own_ids
        logits, _ = moco(*make_sides(step), own_ids, mask)
        expected = torch.zeros(3, 1 + len(ids), dtype=torch.bool)
        for i in range(3):
            for column, number in enumerate(ids.tolist(), 1):
                expected[i, column] = number >= 0 and is_false_negative[i, number]
        assert torch.equal(logits == -torch.inf, expected)
        assert torch.isfinite(logits[~expected]).all()


# --- the key encoder ----------------------------------------------------------------------------


class NormedEncoder(nn.Module):
    """An encoder with batch statistics, which momentum easily leaves out."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(C)
        self.linear = nn.Linear(C, C)

    def forward(self, x, num_frames):
        return F.normalize(self.linear(self.norm(x.sum(1))), dim=1)


@pytest.mark.parametrize("m", [0.0, 0.9, 0.999])
def test_key_encoder_follows_by_momentum_with_its_batch_statistics(m):
    torch.manual_seed(0)
    moco = MoCo(NormedEncoder(), C, 8, m=m)
    with torch.no_grad():
        for value in moco.encoder_q.state_dict().values():
            value.add_(1 if value.dtype == torch.long else torch.randn_like(value))
    query = copy.deepcopy(moco.encoder_q.state_dict())
    before = copy.deepcopy(moco.encoder_k.state_dict())
    moco.update_key_encoder()
    for name, value in moco.encoder_k.state_dict().items():
        if value.dtype == torch.long or m == 0:  # num_batches_tracked is a count
            assert torch.equal(value, query[name])
        else:
            expected = m * before[name] + (1 - m) * query[name]
            torch.testing.assert_close(value, expected, atol=1e-6, rtol=1e-5)
        assert torch.equal(moco.encoder_q.state_dict()[name], query[name])


def test_keys_are_computed_after_the_key_encoder_has_moved():
    moco = MoCo(make_tca(), C, 8, m=0.5)
    with torch.no_grad():
        for parameter in moco.encoder_q.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    expected = copy.deepcopy(moco.encoder_k)
    with torch.no_grad():
        for k, q in zip(expected.parameters(), moco.encoder_q.parameters(), strict=True):
            k.copy_(0.5 * k + 0.5 * q)
    anchors, positives, negatives = make_sides()
    logits, _ = moco(anchors, positives, negatives)
    q = encode_one_by_one(moco.encoder_q, *anchors)
    p = encode_one_by_one(expected, *positives)
    torch.testing.assert_close(logits[:, 0].detach(), (q * p).sum(1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("K", [0, 8])
def test_gradients_reach_the_query_encoder_and_no_key(K):
    moco = MoCo(make_tca(), C, K, m=0.5)
    logits, _ = moco(*make_sides())
    logits.pow(2).sum().backward()
    for parameter in moco.encoder_q.parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0
    for parameter in moco.encoder_k.parameters():
        assert parameter.grad is None and not parameter.requires_grad
    assert not moco.queue.requires_grad and moco.queue.grad_fn is None


def test_backward_works_after_a_second_step_has_overwritten_the_queue():
    moco = MoCo(make_tca(), C, 8)
    first, _ = moco(*make_sides(0))
    moco(*make_sides(1))
    first.sum().backward()


# --- batches of like length ---------------------------------------------------------------------


@pytest.mark.parametrize("max_frames", [1, 50, 400, 8192])
def test_bucket_by_length_covers_every_video_once_within_its_bounds(max_frames):
    lengths = np.random.default_rng(0).integers(1, 300, 200).tolist()
    batches = list(bucket_by_length(lengths, max_frames, 1.25))
    assert sorted(i for batch in batches for i in batch) == list(range(200))
    for batch in batches:
        longest, shortest = max(lengths[i] for i in batch), min(lengths[i] for i in batch)
        assert len(batch) == 1 or len(batch) * longest <= max_frames
        assert longest <= 1.25 * shortest


def test_bucket_by_length_of_nothing():
    assert list(bucket_by_length([])) == []


@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("rule", [padding.CPU_BUCKETS, padding.GPU_BUCKETS])
def test_encode_by_length_equals_one_plain_call(is_packed, rule, monkeypatch):
    monkeypatch.setattr(padding, "CPU_BUCKETS", rule)
    encoder = make_tca().eval()
    lengths = np.random.default_rng(0).integers(1, 60, 40).tolist()
    x, num_frames = make_batch(lengths)
    videos = x
    if is_packed:
        videos = torch.cat([row[:T] for row, T in zip(x, lengths, strict=True)])
    with torch.no_grad():
        found, expected = encode_by_length(encoder, videos, num_frames), encoder(x, num_frames)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
