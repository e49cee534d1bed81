"""Packed and padded batches are the same frames, and no shape is read back from a device."""

import numpy as np
import pytest
import torch

from model import TCA, Mean
from padding import (
    bucket_by_length,
    bucket_rule,
    encode_by_length,
    pack,
    pad,
    pad_by_gather,
    pad_packed,
    unpad,
)

C = 16


def videos(lengths=(3, 1, 7, 5), dtype=np.float16):
    rng = np.random.default_rng(0)
    return [rng.normal(size=(T, C)).astype(dtype) for T in lengths]


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("chosen", [None, [2, 0], [1]])
def test_pad_packed_equals_pad(chosen, dtype):
    made = videos(dtype=dtype)
    x, num_frames = pack(made)
    expected, _ = pad([made[i] for i in chosen] if chosen else made)
    assert torch.equal(pad_packed(x, num_frames, chosen), expected)
    # The way of other devices, here on the CPU.
    starts, lengths = num_frames.cumsum(0) - num_frames, num_frames
    if chosen:
        starts, lengths = starts[chosen], lengths[chosen]
    gathered = pad_by_gather(x, starts, lengths)
    assert gathered.dtype == torch.float32 and torch.equal(gathered, expected)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_pinned_batch_equals_a_plain_one(dtype, monkeypatch):
    """Page-locked memory needs a GPU: the allocation is replaced by a plain one."""
    asked, empty = [], torch.empty

    def plain_empty(*shape, pin_memory=False, **options):
        asked.append(pin_memory)
        return empty(*shape, **options)

    made = videos([3] * 200, dtype)
    expected, _ = pack(made)
    monkeypatch.setattr(torch, "empty", plain_empty)
    x, num_frames = pack(made, pin=True)
    assert asked == [True]
    assert x.dtype == expected.dtype and torch.equal(x, expected) and num_frames.sum() == 600


def test_unpad_gives_the_packed_frames_back():
    x, num_frames = pack(videos(dtype=np.float32))
    padded = pad_packed(x, num_frames)
    padded = torch.nn.functional.pad(padded, (0, 0, 0, 4), value=torch.nan)
    assert torch.equal(unpad(padded, num_frames), x)


def test_bucket_rule_of_a_gpu_makes_fewer_and_larger_batches():
    lengths = np.random.default_rng(0).integers(3, 300, 1000).tolist()
    on_cpu, on_gpu = (
        list(bucket_by_length(lengths, *bucket_rule(device))) for device in ("cpu", "cuda:1")
    )
    assert len(on_gpu) < len(on_cpu) / 2
    padded = sum(len(batch) * lengths[batch[0]] for batch in on_gpu)
    assert padded < 1.5 * sum(lengths)


@pytest.mark.parametrize("encoder", [TCA(C, 4, 2, 32), Mean(C)], ids=["tca", "mean"])
@pytest.mark.parametrize("training", [True, False])
def test_encoding_reads_nothing_back_from_its_device(encoder, training):
    """A tensor of the device "meta" has no values: whatever asks for one raises.

    So a GPU is never waited for between the upload of a batch and its descriptors.
    """
    encoder = encoder.to("meta").train(training)
    lengths = [20, 3, 1, 8, 19]
    x = torch.empty(sum(lengths), C, dtype=torch.float16, device="meta")
    num_frames = torch.tensor(lengths)
    assert encode_by_length(encoder, x, num_frames).shape == (5, C)
    video, frames = encoder.encode_video_and_frames(pad_packed(x, num_frames), num_frames)
    assert video.shape == (5, C) and unpad(frames, num_frames).shape == x.shape
    if training and isinstance(encoder, TCA):
        encode_by_length(encoder, x, num_frames).sum().backward()
