"""Positives from a video's own frame features: copies, excerpts and edits without a copy at hand.

Each entry of `AUGMENTATIONS` maps frames (T, C) and a NumPy generator to frames (T', C), T' >= 1. They act on features, so
what an edit does to pixels is stood for by `noise` and `mask`. `shuffle` teaches recurrent encoders only: self-attention
without positions and a mean over frames see a set.
"""

import numpy as np


def crop(frames, draw):
    """An excerpt: three tenths of the video or more, in one piece."""
    T = len(frames)
    size = max(1, round(T * draw.uniform(0.3, 1)))
    start = draw.integers(T - size + 1)
    return frames[start : start + size]


def shuffle(frames, draw):
    """Two to four pieces in another order."""
    pieces = min(int(draw.integers(2, 5)), len(frames))
    cuts = np.sort(draw.choice(np.arange(1, len(frames)), pieces - 1, replace=False))
    parts = np.split(frames, cuts)
    return np.concatenate([parts[i] for i in draw.permutation(len(parts))])


def drop(frames, draw):
    """Up to half of the frames left out, here and there."""
    keep = draw.random(len(frames)) >= draw.uniform(0, 0.5)
    keep[draw.integers(len(frames))] = True
    return frames[keep]


def speed(frames, draw):
    """Played at half to double speed: frames repeated or skipped evenly."""
    T = max(1, round(len(frames) / 2 ** draw.uniform(-1, 1)))
    return frames[np.minimum((np.arange(T) + 0.5) * len(frames) / T, len(frames) - 1).astype(int)]


def noise(frames, draw):
    """Another rendering: one offset for the whole video and a smaller one a frame, up to six tenths of the features' size."""
    frames = np.asarray(frames, np.float32)
    size = draw.uniform(0, 0.6) * np.sqrt(np.mean(frames**2))
    offset = draw.standard_normal((1, frames.shape[1]), np.float32)
    return frames + np.float32(size) * (offset + 0.5 * draw.standard_normal(frames.shape, np.float32))


def mask(frames, draw):
    """Up to three tenths of the channels at zero, the same in every frame."""
    return np.where(draw.random(frames.shape[1]) < draw.uniform(0, 0.3), 0, frames).astype(frames.dtype)


AUGMENTATIONS = {"crop": crop, "shuffle": shuffle, "drop": drop, "speed": speed, "noise": noise, "mask": mask}
DEFAULT_MIX = ("crop", "drop", "speed", "noise", "mask")


def augment(frames, mix, draw):
    """frames (T, C) through each augmentation of `mix` in its order, each with a chance of one half."""
    for name in mix:
        if draw.random() < 0.5:
            frames = AUGMENTATIONS[name](frames, draw)
    return frames
