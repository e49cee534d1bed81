"""Made-up features for the benchmarks: files in both layouts, or rows computed as they are read."""

import argparse
import math
import pickle
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np

from features.store import StoreWriter

# --- training: VCDB's form ----------------------------------------------------------------------

MEDIAN, LONG, LONG_SHARE = 60, 300, 0.05  # seconds, seconds, share of videos longer than that


def make_videos(folder: Path, args: argparse.Namespace) -> None:
    """The same random videos in both layouts, and an annotation of VCDB's form.

    Args:
        folder: gets packed.hdf5, plain.hdf5 (one float32 dataset per video) and pairs.pickle.
        args: `videos` of `channels`, with pairs for `steps` steps of `anchors` and some more.
    """
    rng = np.random.default_rng(0)
    normal_quantile = 1.6449  # of 1 - LONG_SHARE
    sigma = math.log(LONG / MEDIAN) / normal_quantile
    lengths = rng.lognormal(math.log(MEDIAN), sigma, args.videos).round().clip(2, 1500).astype(int)
    names = [f"v{i:05}" for i in range(args.videos)]
    with (
        StoreWriter(folder / "packed.hdf5") as packed,
        h5py.File(folder / "plain.hdf5", "w") as plain,
    ):
        for name, T in zip(names, lengths, strict=True):
            frames = rng.standard_normal((T, args.channels), np.float32)
            frames += rng.standard_normal((1, args.channels), np.float32)
            frames /= np.linalg.norm(frames, axis=1, keepdims=True)
            frames = frames.astype(np.float16)
            packed.add(name, frames)
            plain[name] = frames.astype(np.float32)
    count = (args.steps + 4) * args.anchors  # more steps than are measured
    pairs = [{"videos": [names[2 * i], names[2 * i + 1]]} for i in range(count)]
    annotation = {"video_pairs": pairs, "negs": names[2 * count :]}
    (folder / "pairs.pickle").write_bytes(pickle.dumps(annotation))


# --- evaluation: FIVR-200K's form ----------------------------------------------------------------

LONGEST = 300


def random_lengths(count: int, rng: np.random.Generator) -> np.ndarray:
    """Frames of `count` videos: log-normal, median 60, 3 to LONGEST."""
    lengths = np.exp(rng.normal(np.log(60), 0.8, count))
    return np.clip(lengths, 3, LONGEST).astype(int)


class RandomStore:
    """A feature store whose rows are computed as they are read.

    Each video is another excerpt from one block of noise.
    """

    path, meta, dtype = "random features", {}, np.dtype(np.float16)

    def __init__(self, lengths: np.ndarray, rng: np.random.Generator, channels: int) -> None:
        self.feature_size = channels
        self.lengths = {f"v{i:06}": int(T) for i, T in enumerate(lengths)}
        self._block = rng.normal(size=(8192, channels)).astype(np.float16)

    def __getitem__(self, video: str) -> np.ndarray:
        start = int(video[1:]) * 7919 % (len(self._block) - LONGEST)
        return self._block[start : start + self.lengths[video]]

    def __iter__(self) -> Iterator[str]:
        return iter(self.lengths)

    def __len__(self) -> int:
        return len(self.lengths)

    def release_pages(self) -> None:
        pass
