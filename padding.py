"""Videos of different lengths in one batch: padded, packed, masked, grouped by length.

N videos of at most T frames, C channels per frame. A padded batch is `x (N, T, C)`, a packed one
`x (sum T, C)`, the videos' frames end to end; `num_frames (N,) int64` comes with both. Leave
`num_frames` on the CPU, also where x is on a GPU: shapes follow from it, and reading it there would
wait for all work that the GPU still has.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn


def pad(videos: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
    """A list of (T, C) arrays -> x (N, longest T, C) float32, num_frames (N,) int64."""
    num_frames = torch.tensor([len(video) for video in videos])
    x = np.zeros((len(videos), int(num_frames.max()), videos[0].shape[1]), np.float32)
    for row, video in zip(x, videos, strict=True):
        row[: len(video)] = video
    return torch.from_numpy(x), num_frames


def pack(videos: Sequence[np.ndarray], pin: bool = False) -> tuple[Tensor, Tensor]:
    """A list of (T, C) arrays -> x (sum T, C) in their type, end to end; num_frames (N,) int64.

    pin: write x into page-locked memory, from which a GPU copies while the processor goes on.
    """
    num_frames = torch.tensor([len(video) for video in videos])
    if not pin:
        return torch.from_numpy(np.concatenate(videos)), num_frames
    types = {video.dtype for video in videos}  # NumPy joins 64 at most
    dtype = torch.from_numpy(np.empty(0, np.result_type(*types))).dtype
    shape = int(num_frames.sum()), videos[0].shape[1]
    x = torch.empty(shape, dtype=dtype, pin_memory=True)
    np.concatenate(videos, out=x.numpy())
    return x, num_frames


def pad_packed(x: Tensor, num_frames: Tensor, videos: Sequence[int] | None = None) -> Tensor:
    """Packed x (sum T, C) in any type -> padded (n, longest T, C) float32, on its device.

    videos: the indices of the n videos to take, in this order; by default all.
    """
    starts = num_frames.cumsum(0) - num_frames  # (N,)
    if videos is not None:
        starts, num_frames = starts[videos], num_frames[videos]
    pad_on_device = _pad_by_copies if x.device.type == "cpu" else pad_by_gather
    return pad_on_device(x, starts, num_frames)


def _pad_by_copies(x, starts, num_frames):
    """One copy a video, which also converts it: a processor reads and writes each frame once."""
    longest = int(num_frames.max())
    padded = x.new_zeros(len(starts), longest, x.shape[1], dtype=torch.float32)
    for row, start, T in zip(padded, starts.tolist(), num_frames.tolist(), strict=True):
        row[:T] = x[start : start + T]
    return padded


def pad_by_gather(x: Tensor, starts: Tensor, num_frames: Tensor) -> Tensor:
    """`pad_packed` by one gather for all videos, without waiting for the device.

    starts (n,): the videos' first rows in x. num_frames (n,). Both are on the CPU.
    """
    T = int(num_frames.max())
    starts, num_frames = torch.stack([starts, num_frames]).to(x.device, non_blocking=True)
    mask = frame_mask(num_frames, T)  # (n, T)
    rows = starts[:, None] + torch.arange(T, device=x.device)
    rows = rows.where(mask, 0).flatten()  # padding reads row 0, and is cleared below
    padded = x.index_select(0, rows).unflatten(0, (-1, T)).float()  # (n, T, C)
    return padded.masked_fill_(~mask[..., None], 0.0)


def valid_rows(num_frames: Tensor, T: int) -> Tensor:
    """The row numbers (S,), of N * T, of the frames that are not padding; on the CPU."""
    return frame_mask(num_frames.cpu(), T).flatten().nonzero().squeeze(1)


def unpad(x: Tensor, num_frames: Tensor) -> Tensor:
    """Padded x (N, T, C) -> packed (sum T, C), without the padding."""
    rows = valid_rows(num_frames, x.shape[1]).to(x.device, non_blocking=True)
    return x.flatten(0, 1).index_select(0, rows)


def frame_mask(num_frames: Tensor, T: int) -> Tensor:
    """(N, T) bool: true for the frames of a video, false for its padding."""
    return torch.arange(T, device=num_frames.device) < num_frames[:, None]


def trim_padding(x: Tensor, num_frames: Tensor) -> tuple[Tensor, Tensor]:
    """x (N, T', C) cut to the longest video's T' frames, zero at padding, and its mask (N, T')."""
    longest = int(num_frames.max())
    mask = frame_mask(num_frames.to(x.device, non_blocking=True), longest)
    # Padding may hold anything: masked sums would turn NaN * 0 into NaN.
    return x[:, :longest].masked_fill(~mask[..., None], 0.0), mask


class BucketRule(NamedTuple):
    """How large and how even a batch is.

    max_frames: frames of a batch, padding included
    slack: how many times longer the longest video may be than the shortest
    """

    max_frames: int
    slack: float


# A processor reaches its full rate with few frames and pays for each padded one. A GPU also pays
# for each batch: starting its kernels takes as long as some thousand frames. (This is arithmetic:
# other slacks were not measured on a GPU; `benchmarks/gpu.py` does.)
CPU_BUCKETS = BucketRule(max_frames=8192, slack=1.25)
GPU_BUCKETS = BucketRule(max_frames=32768, slack=1.5)


def bucket_rule(device: torch.device | str) -> BucketRule:
    """The rule of the batches that are encoded on this device."""
    return CPU_BUCKETS if torch.device(device).type == "cpu" else GPU_BUCKETS


def bucket_by_length(
    lengths: Sequence[int],
    max_frames: int = CPU_BUCKETS.max_frames,
    slack: float = CPU_BUCKETS.slack,
) -> Iterator[list[int]]:
    """Split videos into batches of similar length: lists of indices, longest first.

    A batch holds at most `max_frames` frames, padding included, or one video. Its longest video is
    at most `slack` times its shortest, so little is padded.
    """
    batch = []
    for i in sorted(range(len(lengths)), key=lambda i: -int(lengths[i])):
        if batch:
            longest = int(lengths[batch[0]])
            is_full = (len(batch) + 1) * longest > max_frames
            if is_full or int(lengths[i]) * slack < longest:
                yield batch
                batch = []
        batch.append(i)
    if batch:
        yield batch


def encode_by_length(encoder: nn.Module, x: Tensor, num_frames: Tensor) -> Tensor:
    """`encoder(x, num_frames)` (N, D), computed in batches of similar length.

    x: padded (N, T, C), or packed (sum T, C), the videos' frames end to end in any floating type.
    """
    num_frames = num_frames.cpu()
    if encoder.training and any(map(_is_batch_norm, encoder.modules())):
        batches = [list(range(len(num_frames)))]  # parts of a batch would have other statistics
    else:
        batches = list(bucket_by_length(num_frames.tolist(), *bucket_rule(x.device)))

    is_packed = x.ndim == 2
    parts, order = [], []
    for batch in batches:
        padded = pad_packed(x, num_frames, batch) if is_packed else x[batch]  # (n, T, C)
        parts.append(encoder(padded, num_frames[batch]))
        order += batch
    back = torch.tensor(order).argsort()  # to the order of the videos
    return torch.cat(parts)[back.to(x.device, non_blocking=True)]


def _is_batch_norm(module):
    return isinstance(module, nn.modules.batchnorm._BatchNorm)
