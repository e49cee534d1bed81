"""The frames of a training set on a GPU, where a step gathers its rows.

    rows = FramesOnDevice(store, videos, "cuda")
    data.frames = rows.numbers        # items hold the numbers of rows in place of the rows
    x = rows.gather(row_numbers)      # (S,) on the device -> (S, C)

VCDB's features, 13 GB in half precision, fit one GPU beside the training.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from features.store import FeatureStore
from padding import pack
from utils import InputError

SHARE = 0.8  # of a GPU's free memory that the features may take
VIDEOS_PER_COPY = 256


class RowNumbers:
    """Mapping from a video's id to the numbers (T,) of its rows: cropped as the rows would be."""

    def __init__(self, bounds: Mapping[str, tuple[int, int]]):
        self._bounds = bounds

    def __getitem__(self, video: str) -> np.ndarray:
        return np.arange(*self._bounds[video])


class FramesOnDevice:
    """The rows of `videos` on a device, in the type that the store has them in.

    Attributes:
        numbers: RowNumbers. It holds no tensor, so that data-loading workers may use it.
    """

    def __init__(self, store: FeatureStore, videos: Sequence[str], device: str):
        bounds, end = {}, 0
        for video in videos:
            bounds[video] = end, end + store.lengths[video]
            end += store.lengths[video]
        dtype = torch.from_numpy(np.empty(0, store.dtype)).dtype
        _require_memory(end * store.feature_size * dtype.itemsize, device)
        self.numbers = RowNumbers(bounds)
        self._rows = torch.empty(end, store.feature_size, dtype=dtype, device=device)
        for start in range(0, len(videos), VIDEOS_PER_COPY):
            part = videos[start : start + VIDEOS_PER_COPY]
            rows, _ = pack([store[video] for video in part])
            self._rows[bounds[part[0]][0] : bounds[part[-1]][1]] = rows
            store.release_pages()

    def gather(self, numbers: Tensor) -> Tensor:
        """Row numbers (S,) on the device -> their rows (S, C)."""
        return self._rows.index_select(0, numbers)


def _require_memory(needed, device):
    if torch.device(device).type != "cuda":
        return
    free, _ = torch.cuda.mem_get_info(device)
    if needed > SHARE * free:
        raise InputError(
            f"the features take {needed / 1e9:.1f} GB of the {free / 1e9:.1f} GB that are free on"
            f" {device}; give --features_on host"
        )
