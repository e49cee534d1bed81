"""Small encoders, batches for them, and descriptors computed one video at a time."""

import torch

from helpers.worlds import C
from model import TCA

LENGTHS = [1, 3, 7, 20]


def randomised(encoder):
    """`encoder` with every parameter and batch statistic away from its special value (0 or 1)."""
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for name, buffer in encoder.named_buffers():
            if "running" in name:
                buffer.add_(0.3 * torch.rand_like(buffer))
    return encoder


def make_tca(nlayers=1, dropout=0.0, seed=0, **options):
    """A small TCA with randomised parameters."""
    torch.manual_seed(seed)
    return randomised(TCA(C, 4, nlayers, 64, dropout, **options))


def untrained_tca(seed):
    """A small TCA as it is initialised, in eval mode."""
    torch.manual_seed(seed)
    return TCA(C, 4, 1, 64).eval()


def padding_of(x, num_frames):
    """(N, T, C) bool, true where x is padding."""
    padding = torch.arange(x.shape[1]) >= num_frames[:, None]
    return padding[..., None].expand_as(x)


def make_batch(lengths=LENGTHS, T=None, seed=1):
    """x (N, T, C), zero at padding, and num_frames (N,)."""
    torch.manual_seed(seed)
    num_frames = torch.tensor(lengths)
    x = torch.randn(len(lengths), T or max(lengths), C)
    return x.masked_fill(padding_of(x, num_frames), 0.0), num_frames


def encode_one_by_one(encoder, store, videos, level, padding_size=300):
    """{video: (D,) or (T, D) array} of the videos' middle frames, each video encoded alone."""
    method = encoder if level == "video" else encoder.encode
    descriptors = {}
    for video in videos:
        frames = store[video]
        if padding_size:
            start = max(len(frames) - padding_size, 0) // 2
            frames = frames[start : start + padding_size]
        x = torch.from_numpy(frames).float()[None]  # (1, T, C)
        with torch.no_grad():
            descriptors[video] = method(x, torch.tensor([x.shape[1]]))[0].numpy()
    return descriptors
