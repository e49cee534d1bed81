"""MoCo: the bank, the key encoder, and keys encoded in batches of like length."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.worlds import C
from test_model import batch, tca
from torch import nn

from model import Mean, MoCo
from padding import bucket_by_length, encode_by_length

# --- the bank --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("K", [1, 7, 8, 64])
def test_the_ring_keeps_what_writing_keys_one_by_one_would_keep(K):
    torch.manual_seed(0)
    moco = MoCo(Mean(C), C, K)
    slots, ids, place, number = [column.clone() for column in moco.queue.T], [-1] * K, 0, 0
    assert torch.equal(moco.queue_ids, torch.full((K,), -1))
    for size in [1, 3, 8, 5, K, K + 1, 3 * K + 2, 1, 2, 7 * K, 4]:
        keys = torch.randn(size, C)
        numbers = torch.arange(number, number + size)
        moco.enqueue(keys, numbers)
        number += size
        for key, i in zip(keys, numbers.tolist(), strict=True):
            slots[place], ids[place] = key, i
            place = (place + 1) % K
        assert torch.equal(moco.queue, torch.stack(slots, 1))
        assert moco.queue_ids.tolist() == ids and int(moco.queue_ptr) == place
        newest = set(range(max(0, number - K), number))
        assert set(moco.queue_ids.tolist()) - {-1} == newest


def test_the_bank_and_its_pointer_are_saved_with_the_model():
    moco = MoCo(tca(), C, 8)
    moco.enqueue(torch.randn(5, C), torch.arange(5))
    other = MoCo(tca(seed=9), C, 8)
    other.load_state_dict(moco.state_dict())
    assert torch.equal(other.queue, moco.queue) and torch.equal(other.queue_ids, moco.queue_ids)
    assert int(other.queue_ptr) == 5


def sides(seed=0, N=3, M=8):
    """Anchors, positives, negatives, each of its own padded length."""
    draw = np.random.default_rng(seed)
    lengths = ([int(T) for T in draw.integers(1, top, n)] for n, top in ((N, 9), (N, 14), (M, 30)))
    return [batch(side, seed=seed + i) for i, side in enumerate(lengths)]


def describe_one_by_one(encoder, x, num_frames):
    with torch.no_grad():
        return torch.cat(
            [encoder(v[None, :T], T[None]) for v, T in zip(x, num_frames, strict=True)]
        )


@pytest.mark.parametrize("T", [1.0, 0.07])
def test_logits_are_the_products_with_positives_and_the_bank_before_this_steps_negatives_enter(T):
    moco, K = MoCo(tca(), C, 20, m=0.0, T=T), 20
    for step in range(5):
        anchors, positives, negatives = sides(step)
        bank = moco.queue.clone()
        pointer = int(moco.queue_ptr)
        logits, labels = moco(anchors, positives, negatives, torch.arange(8) + 8 * step)
        q, p, n = (
            describe_one_by_one(moco.encoder_q, *side) for side in (anchors, positives, negatives)
        )
        expected = torch.tensor(
            [[float(a @ b)] + [float(a @ k) for k in bank.T] for a, b in zip(q, p, strict=True)]
        )
        torch.testing.assert_close(logits.detach(), expected / T, atol=1e-5 / T, rtol=0)
        assert logits.shape == (3, 1 + K) and labels.tolist() == [0, 0, 0]
        for i, key in enumerate(n):  # they have entered by now, with their numbers
            slot = (pointer + i) % K
            torch.testing.assert_close(moco.queue[:, slot], key, atol=1e-5, rtol=0)
            assert int(moco.queue_ids[slot]) == i + 8 * step


def test_a_bank_smaller_than_a_steps_negatives_works():
    moco = MoCo(tca(), C, 5)
    anchors, positives, negatives = sides()
    for _ in range(2):
        logits, _ = moco(anchors, positives, negatives, torch.arange(8))
    assert logits.shape == (3, 6) and sorted(moco.queue_ids.tolist()) == [3, 4, 5, 6, 7]


def test_without_a_bank_the_steps_own_negatives_are_the_columns():
    moco = MoCo(tca(), C, 0)
    anchors, positives, negatives = sides()
    logits, _ = moco(anchors, positives, negatives)
    q, p, n = (
        describe_one_by_one(moco.encoder_q, *side) for side in (anchors, positives, negatives)
    )
    torch.testing.assert_close(
        logits.detach(), torch.cat([(q * p).sum(1)[:, None], q @ n.T], 1), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("K", [0, 20])
def test_shares_masks_to_minus_infinity_where_it_says_so_and_nowhere_else(K):
    moco = MoCo(tca(), C, K)
    torch.manual_seed(0)
    told = torch.rand(3, 40) < 0.4  # by bank number

    def shares(numbers):
        return told[:, numbers] & (numbers >= 0)

    for step in range(4):
        before = moco.queue_ids.clone() if K else torch.arange(8) + 8 * step
        logits, _ = moco(*sides(step), torch.arange(8) + 8 * step, shares)
        expected = [
            [False] + [bool(told[i, n]) and n >= 0 for n in before.tolist()] for i in range(3)
        ]
        assert (logits == -torch.inf).tolist() == expected
        assert torch.isfinite(logits[~torch.tensor(expected)]).all()


# --- the key encoder -------------------------------------------------------------------------------------------------


class Normed(nn.Module):
    """An encoder with batch statistics, a momentum method's usual trap."""

    def __init__(self):
        super().__init__()
        self.norm, self.linear = nn.BatchNorm1d(C), nn.Linear(C, C)

    def forward(self, x, num_frames):
        return F.normalize(self.linear(self.norm(x.sum(1))), dim=1)


@pytest.mark.parametrize("m", [0.0, 0.9, 0.999])
def test_the_key_encoder_follows_by_momentum_with_its_batch_statistics(m):
    torch.manual_seed(0)
    moco = MoCo(Normed(), C, 8, m=m)
    with torch.no_grad():
        for value in moco.encoder_q.state_dict().values():
            value.add_(1 if value.dtype == torch.long else torch.randn_like(value))
    query = {name: value.clone() for name, value in moco.encoder_q.state_dict().items()}
    key = {name: value.clone() for name, value in moco.encoder_k.state_dict().items()}
    moco.update_key_encoder()
    for name, value in moco.encoder_k.state_dict().items():
        if value.dtype == torch.long:  # num_batches_tracked: a count
            assert torch.equal(value, query[name])
        else:
            torch.testing.assert_close(
                value, m * key[name] + (1 - m) * query[name], atol=1e-6, rtol=1e-5
            )
        if m == 0:
            assert torch.equal(value, query[name])
        assert torch.equal(moco.encoder_q.state_dict()[name], query[name])


def test_keys_are_computed_after_the_key_encoder_has_moved():
    moco = MoCo(tca(), C, 8, m=0.5)
    with torch.no_grad():
        for parameter in moco.encoder_q.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    expected = copy.deepcopy(moco.encoder_k)
    with torch.no_grad():
        for k, q in zip(expected.parameters(), moco.encoder_q.parameters(), strict=True):
            k.copy_(0.5 * k + 0.5 * q)
    anchors, positives, negatives = sides()
    logits, _ = moco(anchors, positives, negatives)
    q, p = describe_one_by_one(moco.encoder_q, *anchors), describe_one_by_one(expected, *positives)
    torch.testing.assert_close(logits[:, 0].detach(), (q * p).sum(1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("K", [0, 8])
def test_gradients_reach_the_query_encoder_and_no_key(K):
    moco = MoCo(tca(), C, K, m=0.5)
    logits, _ = moco(*sides())
    logits.pow(2).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in moco.encoder_q.parameters())
    assert all(p.grad is None and not p.requires_grad for p in moco.encoder_k.parameters())
    assert not moco.queue.requires_grad and moco.queue.grad_fn is None


def test_a_second_step_can_be_made_before_the_firsts_backward():
    moco = MoCo(tca(), C, 8)
    first, _ = moco(*sides(0))
    moco(*sides(1))
    first.sum().backward()  # the bank that `first` used has been overwritten since; autograd must not mind


# --- batches of like length ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frames", [1, 50, 400, 8192])
def test_length_batches_cover_every_video_once_within_their_bounds(frames):
    lengths = np.random.default_rng(0).integers(1, 300, 200).tolist()
    batches = list(bucket_by_length(lengths, frames, 1.25))
    assert sorted(i for group in batches for i in group) == list(range(200))
    for group in batches:
        longest, shortest = max(lengths[i] for i in group), min(lengths[i] for i in group)
        assert len(group) == 1 or len(group) * longest <= frames
        assert longest <= 1.25 * shortest
    assert list(bucket_by_length([])) == []


def test_encode_by_length_equals_one_plain_call():
    encoder = tca().eval()
    lengths = np.random.default_rng(0).integers(1, 60, 40).tolist()
    x, num_frames = batch(lengths)
    with torch.no_grad():
        torch.testing.assert_close(
            encode_by_length(encoder, x, num_frames), encoder(x, num_frames), atol=1e-5, rtol=0
        )
