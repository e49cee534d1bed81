"""Pooling of a backbone's map (B, c, h, w) to one unit vector (B, c) a frame."""

from collections.abc import Callable

import torch
from torch.nn import functional as F


def imac(x: torch.Tensor) -> torch.Tensor:
    """iMAC: L2 over channels at each position, maximum over positions, L2.

    Kordopatis-Zilos et al., Near-Duplicate Video Retrieval by Aggregating Intermediate CNN Layers,
    2017.
    """
    x = F.normalize(x, dim=1)
    return F.normalize(x.amax((2, 3)), dim=1)


def l3_imac(x: torch.Tensor) -> torch.Tensor:
    """L3-iMAC, the paper's: iMAC of overlapping regions, each L2, summed, L2.

    With stride p = int(min(h, w) * 2 / 7) and regions of int(1.5 p), as released, maps of 7, 14, 28
    and 56 have 3 x 3 regions. Maps of less than 4 get p = 1: every position is a region.
    """
    p = max(1, int(min(x.shape[2:]) * 2 / 7))
    x = F.normalize(x, dim=1)
    regions = F.max_pool2d(x, int(1.5 * p), p)  # (B, c, 3, 3)
    return F.normalize(F.normalize(regions, dim=1).sum((2, 3)), dim=1)


def mac(x: torch.Tensor) -> torch.Tensor:
    """Maximum over positions, L2."""
    return F.normalize(x.amax((2, 3)), dim=1)


def spoc(x: torch.Tensor) -> torch.Tensor:
    """Mean over positions, L2."""
    return F.normalize(x.mean((2, 3)), dim=1)


def gem(x: torch.Tensor, p: float = 3.0) -> torch.Tensor:
    """Generalised mean over positions, L2 (Radenovic et al. 2018), at its usual exponent."""
    powers = x.clamp_min(1e-6).pow(p)
    return F.normalize(powers.mean((2, 3)).pow(1 / p), dim=1)


POOLINGS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "imac": imac,
    "l3_imac": l3_imac,
    "mac": mac,
    "spoc": spoc,
    "gem": gem,
}
DEFAULT_POOLING = "imac"
