"""Pooling of a map (c, h, w) by another route: plain loops over the definitions."""

import numpy as np


def l2(x):
    return x / np.sqrt((x * x).sum())


def imac_by_loop(x):
    return l2(maximum_of_units(x, range(x.shape[1]), range(x.shape[2])))


def l3_imac_by_loop(x, p):
    """Regions of int(1.5 p) positions a side, at a stride of p."""
    c, h, w = x.shape
    k, total = int(1.5 * p), np.zeros(c)
    for top in range(0, h - k + 1, p):
        for left in range(0, w - k + 1, p):
            rows, columns = range(top, top + k), range(left, left + k)
            total += l2(maximum_of_units(x, rows, columns))
    return l2(total)


def maximum_of_units(x, rows, columns):
    """(c,): of each channel the maximum over positions, which are scaled to unit length first."""
    maximum = np.full(len(x), -np.inf)
    for i in rows:
        for j in columns:
            maximum = np.maximum(maximum, l2(x[:, i, j]))
    return maximum
