"""ViSiL's video comparator."""

import torch
import torch.nn.functional as F
from torch import nn

from utils import InputError, load_torch


class VideoComparator(nn.Module):
    """ViSiL's video comparator (Kordopatis-Zilos et al., ICCV 2019, section 3.4): learns which patterns of a frame similarity
    matrix show a copy. Parameters are named as in the ViSiL and TCA releases, so their checkpoints load.
    """

    CELL_BYTES = 480  # what the first layers' maps take a cell of the matrix

    def __init__(self, tile_bytes=64 << 20):
        super().__init__()
        self.tile_bytes = tile_bytes
        self.conv1 = nn.Conv2d(1, 32, 3)
        self.conv2 = nn.Conv2d(32, 64, 3)
        self.conv3 = nn.Conv2d(64, 128, 3)
        self.fconv = nn.Conv2d(128, 1, 1)

    def forward(self, matrix):
        """matrix (Tq, Tt) of frame similarities -> (Tq // 4, Tt // 4), at least (1, 1), not yet clamped to -1..1.

        Videos of fewer than 4 frames are lengthened by their last. Without gradient a long query is worked on in tiles of its
        frames that take about `tile_bytes` (or 16 frames); the tiles overlap, which makes the result the same.
        """
        Tq, Tt = matrix.shape
        x = F.pad(
            matrix[None], (0, max(4 - Tt, 0), 0, max(4 - Tq, 0)), mode="replicate"
        )  # (1, Tq, Tt)
        frames = max(self.tile_bytes // (self.CELL_BYTES * x.shape[2]) // 4 * 4 - 16, 16)
        if torch.is_grad_enabled() or x.shape[1] <= frames + 16:
            return self._layers(x)[0]
        # A tile's cut edge reaches 2 rows of its result: it takes 8 frames more on that side, and its result loses 2 rows.
        parts = []
        for start in range(0, x.shape[1] // 4 * 4, frames):
            above = min(start, 8)
            part = self._layers(x[:, start - above : start + frames + 8])[0, above // 4 :]
            parts.append(part[: frames // 4])
        return torch.cat(parts)

    def _layers(self, x):
        """One channel (1, Tq, Tt) -> (1, Tq // 4, Tt // 4)."""
        for conv in (self.conv1, self.conv2):
            x = F.max_pool2d(F.relu(conv(F.pad(x, (1, 1, 1, 1), mode="replicate"))), 2)
        return self.fconv(F.relu(self.conv3(F.pad(x, (1, 1, 1, 1), mode="replicate"))))


def load_comparator(path):
    """The VideoComparator of a saved state dict, in eval mode, whether it lies there alone or under a prefix beside others
    (`video_comperator.` in ViSiL's). Raises InputError when there is none or its tensors do not fit.
    """
    state, comparator = load_torch(path, "comparator file"), VideoComparator()
    state = state if isinstance(state, dict) else {}
    prefix = next(
        (
            key.removesuffix("fconv.weight")
            for key in map(str, state)
            if key.endswith("fconv.weight")
        ),
        "",
    )
    fits = {
        key: getattr(state.get(prefix + key), "shape", None) == own.shape
        for key, own in comparator.state_dict().items()
    }
    if not all(fits.values()):
        wrong = ", ".join(prefix + key for key, fit in fits.items() if not fit)
        raise InputError(
            f"comparator file {str(path)!r} lacks, or has in another shape: {wrong}; is it a video comparator's?"
        )
    comparator.load_state_dict({key: state[prefix + key] for key in fits})
    return comparator.eval()
