"""Videos of different lengths in one batch: padded, packed, masked, grouped by length.

N videos of at most T frames, C channels per frame. A padded batch is `x (N, T, C)`, a packed one
`x (sum T, C)`, the videos' frames end to end; `num_frames (N,) int64` comes with both.
"""

from collections.abc import Iterator, Sequence

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


def pack(videos: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
    """A list of (T, C) arrays -> x (sum T, C) in their type, end to end; num_frames (N,) int64."""
    num_frames = torch.tensor([len(video) for video in videos])
    return torch.from_numpy(np.concatenate(videos)), num_frames


def frame_mask(num_frames: Tensor, T: int) -> Tensor:
    """(N, T) bool: true for the frames of a video, false for its padding."""
    return torch.arange(T, device=num_frames.device) < num_frames[:, None]


def trim_padding(x: Tensor, num_frames: Tensor) -> tuple[Tensor, Tensor]:
    """x (N, T', C) cut to the longest video's T' frames, zero at padding, and its mask (N, T')."""
    longest = int(num_frames.max())
    mask = frame_mask(num_frames, longest)
    # Padding may hold anything: masked sums would turn NaN * 0 into NaN.
    return x[:, :longest].masked_fill(~mask[..., None], 0.0), mask


def bucket_by_length(
    lengths: Sequence[int], max_frames: int = 8192, slack: float = 1.25
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
    lengths = num_frames.tolist()
    if encoder.training and any(map(_is_batch_norm, encoder.modules())):
        batches = [list(range(len(lengths)))]  # parts of a batch would have other statistics
    else:
        batches = list(bucket_by_length(lengths))

    is_packed = x.ndim == 2
    videos = x.split(lengths) if is_packed else x
    parts, order = [], []
    for batch in batches:
        if is_packed:
            rows = [videos[i].float() for i in batch]
            padded = nn.utils.rnn.pad_sequence(rows, batch_first=True)  # (n, T, C)
        else:
            padded = videos[batch]
        parts.append(encoder(padded, num_frames[batch]))
        order += batch
    back = torch.tensor(order, device=x.device).argsort()  # to the order of the videos
    return torch.cat(parts)[back]


def _is_batch_norm(module):
    return isinstance(module, nn.modules.batchnorm._BatchNorm)
