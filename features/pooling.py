"""Pooling of a feature map (B, c, h, w) to one vector (B, c) a frame."""

from torch.nn import functional as F


def imac(x):
    """iMAC of a stage, (B, c, h, w) -> (B, c): L2 over channels at each position, global max, L2 (Kordopatis-Zilos 2017)."""
    return F.normalize(F.normalize(x, dim=1).amax((2, 3)), dim=1)


def l3_imac(x):
    """L3-iMAC of a stage: as iMAC, over regions (3 x 3 of them at 7, 14, 28 and 56), each L2, summed, L2.

    Regions are kernel int(1.5 p), stride p = int(min(h, w) * 2 / 7), as released. Maps of less than 4 get p = 1: every
    position is a region.
    """
    p = max(1, int(min(x.shape[2:]) * 2 / 7))
    regions = F.max_pool2d(F.normalize(x, dim=1), int(1.5 * p), p)  # (B, c, 3, 3)
    return F.normalize(F.normalize(regions, dim=1).sum((2, 3)), dim=1)


def mac(x):
    return F.normalize(x.amax((2, 3)), dim=1)


def spoc(x):
    return F.normalize(x.mean((2, 3)), dim=1)


def gem(x, p=3.0):
    """Generalised mean (Radenovic 2018) at its usual exponent."""
    return F.normalize(x.clamp_min(1e-6).pow(p).mean((2, 3)).pow(1 / p), dim=1)


POOLINGS = {"imac": imac, "l3_imac": l3_imac, "mac": mac, "spoc": spoc, "gem": gem}
