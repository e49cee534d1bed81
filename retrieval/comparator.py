"""ViSiL's video comparator: a small network over the frame similarities of two videos."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from untrusted import load_torch
from utils import InputError


class VideoComparator(nn.Module):
    """Learns which patterns in a frame similarity matrix show a copy.

    Kordopatis-Zilos et al., ICCV 2019, section 3.4. Parameters are named as in the ViSiL and TCA
    releases, so their checkpoints load.

    Args:
        tile_bytes: memory for the feature maps of one tile, without gradient.
    """

    CELL_BYTES = 480  # of the first layers' feature maps, for each cell of the matrix

    def __init__(self, tile_bytes: int = 64 << 20):
        super().__init__()
        self.tile_bytes = tile_bytes
        self.conv1 = nn.Conv2d(1, 32, 3)
        self.conv2 = nn.Conv2d(32, 64, 3)
        self.conv3 = nn.Conv2d(64, 128, 3)
        self.fconv = nn.Conv2d(128, 1, 1)

    def forward(self, matrix: Tensor) -> Tensor:
        """Frame similarities (Tq, Tt) -> (Tq // 4, Tt // 4), at least (1, 1), not yet clamped.

        The last frame of a video shorter than 4 frames is repeated. Without gradient, a long query
        is computed in tiles of its frames, which overlap so that the result is the same.
        """
        Tq, Tt = matrix.shape
        missing = (0, max(4 - Tt, 0), 0, max(4 - Tq, 0))
        x = F.pad(matrix[None], missing, mode="replicate")  # (1, Tq, Tt)
        T = x.shape[1]
        rows = self.tile_bytes // (self.CELL_BYTES * x.shape[2])
        rows = max(rows // 4 * 4 - 16, 16)  # of a tile, without its overlaps of 8 at either side
        if torch.is_grad_enabled() or T <= rows + 16:
            return self._layers(x)[0]
        # A cut edge changes the 2 nearest rows of the result, which are of 8 frames.
        parts = []
        for start in range(0, T // 4 * 4, rows):
            above = min(start, 8)
            part = self._layers(x[:, start - above : start + rows + 8])[0, above // 4 :]
            parts.append(part[: rows // 4])
        return torch.cat(parts)

    def _layers(self, x):
        """One channel (1, Tq, Tt) -> (1, Tq // 4, Tt // 4)."""
        edges = (1, 1, 1, 1)
        for conv in (self.conv1, self.conv2):
            x = F.relu(conv(F.pad(x, edges, mode="replicate")))
            x = F.max_pool2d(x, 2)
        x = F.relu(self.conv3(F.pad(x, edges, mode="replicate")))
        return self.fconv(x)


def load_comparator(path: str | Path) -> VideoComparator:
    """Load a comparator's state dict, in eval mode.

    Its tensors may be among others, under a prefix, such as `video_comperator.` in ViSiL's files.
    Raises InputError for a tensor that is missing or has another shape.
    """
    state, comparator = load_torch(path, "comparator file"), VideoComparator()
    state = state if isinstance(state, dict) else {}
    prefix, last = "", "fconv.weight"
    for key in map(str, state):
        if key.endswith(last):
            prefix = key.removesuffix(last)
            break
    tensors, wrong = {}, []
    for key, own in comparator.state_dict().items():
        tensors[key] = state.get(prefix + key)
        tensor = tensors[key]
        if not isinstance(tensor, Tensor) or tensor.shape != own.shape or tensor.is_complex():
            wrong.append(prefix + key)
    if wrong:
        raise InputError(
            f"comparator file {str(path)!r} lacks, or has in another shape: {', '.join(wrong)};"
            " is it a video comparator's?"
        )
    comparator.load_state_dict(tensors)
    return comparator.eval()
