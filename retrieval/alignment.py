"""Where two videos match in time: the metrics `dp` and `tn`, and `align`, which finds segments.

All work on frame similarities: one query of Tq frames against targets side by side,
(Tq, sum Tt). A path runs forwards in both videos. Where the papers of the compared methods leave
something open, such as how a path becomes one number, the docstring says what is done here.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

NONE = -torch.inf
BLOCK_ROWS = 8  # of a matrix, that `tn` looks at together


def dp(matrix: Tensor, lengths: Sequence[int], phi: int = 10) -> Tensor:
    """Dynamic programming (the DP of the papers' tables: Chou et al., TMM 2015) -> (n,).

    For each pair of the query with one of n targets, s = s(i, j) in matrix (Tq, sum Tt):

        D(i, j) = max(D(i-1, j-1) + s, D(i-1, j) + s/2, D(i, j-1) + s/2)

    and D = s in the first row and column. A step that is not diagonal is a mismatch. The step after
    `phi` mismatches ends the path, and a new one starts with D = s. Among equal predecessors the
    diagonal comes first, then (i-1, j).

    The similarity is the largest D / max(Tq, W) over all cells, where W sums the weights (1 or 1/2)
    in D. It is 1 for a copy. Recurrence and phi = 10 are those of the `dp` in the TCA release,
    which returns before it starts. Mismatches are counted along each path, not over the matrix.

    Cells of one anti-diagonal depend only on the two before it, so they are computed together, in
    all targets at once.
    """
    Tq, total = matrix.shape
    lengths = torch.as_tensor(lengths)
    offsets = lengths.cumsum(0) - lengths  # the first column of each target
    lengths, order = lengths.sort(descending=True)  # finished targets are dropped from the end
    ends = (lengths + Tq - 1).tolist()
    on_device = torch.stack([lengths, order, offsets[order]])
    lengths, order, offsets = on_device.to(matrix.device, non_blocking=True)
    offsets = offsets[:, None]  # (n, 1)
    i = torch.arange(Tq, device=matrix.device)
    flat = matrix.reshape(-1)
    best = matrix.new_full((len(lengths),), NONE)
    # One anti-diagonal: score D, mismatches m and weights W (n, 1 + Tq); column 0 is outside.
    D = matrix.new_full((len(lengths), 1 + Tq), NONE)
    m, W = torch.zeros_like(D), torch.zeros_like(D)
    previous = (D, m, W)
    active = len(ends)
    for diagonal in range(ends[0] if ends else 0):
        while ends[active - 1] <= diagonal:
            active -= 1
        j = diagonal - i  # (Tq,)
        inside = (j >= 0) & (j < lengths[:active, None])  # (n, Tq)
        s = flat[(i * total + j + offsets[:active]).clamp_(0, flat.numel() - 1)]
        D1, m1, W1 = D[:active], m[:active], W[:active]  # one diagonal back
        D2, m2, W2 = (part[:active] for part in previous)  # two
        from_diagonal, from_above, from_left = D2[:, :-1] + s, D1[:, :-1] + s / 2, D1[:, 1:] + s / 2
        D_new, step = torch.stack([from_diagonal, from_above, from_left]).max(0)
        is_above, is_mismatch = step == 1, step > 0
        m_mismatch = torch.where(is_above, m1[:, :-1], m1[:, 1:]) + 1
        m_new = torch.where(is_mismatch, m_mismatch, m2[:, :-1])
        W_mismatch = torch.where(is_above, W1[:, :-1], W1[:, 1:]) + 0.5
        W_new = torch.where(is_mismatch, W_mismatch, W2[:, :-1] + 1)
        is_start = (m_new > phi) | (j == 0) | (i == 0)
        D_new = torch.where(is_start, s, D_new).masked_fill_(~inside, NONE)
        m_new, W_new = m_new.masked_fill_(is_start, 0), W_new.masked_fill_(is_start, 1)
        normalised = (D_new / W_new.clamp(min=Tq)).amax(1)
        best[:active] = torch.maximum(best[:active], normalised)
        previous = (D1, m1, W1)
        D = F.pad(D_new, (1, 0), value=NONE)
        m, W = F.pad(m_new, (1, 0)), F.pad(W_new, (1, 0))
    return torch.empty_like(best).index_copy_(0, order, best)


def longest_paths(weights: Iterable[Tensor], step: int, gap: float = 0.0) -> Iterator[Tensor]:
    """Yield, row by row, the weight of the heaviest path that ends in each node: (columns,).

    weights: (rows, columns), or its rows one by one. A node is a cell above -inf. Edges go from
    (i-a, j-b) to (i, j) for 1 <= a, b <= step, at a cost of gap * (max(a-2, 0) + max(b-2, 0)).
    Steps of 1 and 2 are free, so half and double speed are.

        L(i, j) = w(i, j) + max(0, max over a, b of L(i-a, j-b) - cost(a, b))
    """
    cost = [gap * max(b - 2, 0) for b in range(1, step + 1)]
    reach = None
    for row in weights:
        if reach is None:
            columns, costs = len(row), row.new_tensor(cost)[:, None]
            # reach[a - 1, j]: the heaviest path that ends a rows back, for a node in column j.
            reach = row.new_full((step, columns), NONE)
        L = row + (reach - costs).amax(0).clamp_(min=0)
        yield L
        reach = reach.roll(1, 0)
        reach[0] = NONE
        for b, price in enumerate(cost, 1):
            if b < columns:
                torch.maximum(reach[0, b:], L[:-b] - price, out=reach[0, b:])


def tn(
    matrix: Tensor,
    lengths: Sequence[int],
    top: int = 5,
    min_similarity: float = 0.2,
    step: int = 10,
) -> Tensor:
    """Temporal network (Tan et al., ACM MM 2009) of one query with n targets -> (n,).

    A node is a query frame with one of its `top` most similar frames of the target (or any frame
    equal to the last of them), if their similarity is at least `min_similarity`. Edges go forwards
    by 1 to `step` frames in both videos. The similarity is the weight of the heaviest path, the sum
    of its nodes' similarities, divided by Tq: 1 for a copy, 0 without a node. The division is our
    choice; the paper was not available. Its rule against edges that pass over a node is not needed:
    a heaviest path of positive weights takes that node.

    top and step are those of VCSL (He et al., CVPR 2022) and of the TCA release, min_similarity
    that of VCSL. The release has .8, which copies do not reach in whitened features.
    """

    def nodes() -> Iterator[Tensor]:
        for rows in matrix.split(BLOCK_ROWS):  # a few at a time: the matrix may be large
            parts = []
            for part in rows.split(list(lengths), 1):
                least = part.topk(min(top, part.shape[1]), 1).values[:, -1:]
                part = part.masked_fill(part < least.clamp(min=min_similarity), NONE)
                parts.append(F.pad(part, (0, step), value=NONE))  # no edge reaches the next target
            yield from torch.cat(parts, 1)

    best = matrix.new_full((sum(lengths) + step * len(lengths),), NONE)
    for L in longest_paths(nodes(), step):
        torch.maximum(best, L, out=best)
    best = best.split([length + step for length in lengths])
    return torch.stack([part.amax() for part in best]).clamp(min=0) / len(matrix)


ALIGN_BYTES = 14  # that `align` takes for each cell, the matrix included


class Segment(NamedTuple):
    """A matching segment: frames of the query that show what frames of the target show.

    score: the matched frames' similarities above `min_similarity`, summed, less the gaps' costs.
    similarity: the mean of the matched frames' similarities.
    query_start, query_end, target_start, target_end: frames, the ends not included.
    """

    score: float
    similarity: float
    query_start: int
    query_end: int
    target_start: int
    target_end: int


@torch.inference_mode()
def align(
    matrix: np.ndarray | Tensor,
    min_similarity: float = 0.4,
    min_score: float = 0.5,
    min_length: int = 3,
    step: int = 5,
    gap: float = 0.1,
    max_speed: float = 2.0,
    limit: int = 10,
) -> list[Segment]:
    """The segments that two videos share, best first; none where they share nothing.

    matrix (Tq, Tt): frame similarities. Nodes are the pairs of frames with at least
    `min_similarity`; they weigh what they have above it. The heaviest path (`longest_paths`) is a
    segment. Its rectangle is then closed and the next path is found. So no two segments overlap in
    both videos, while a part of the query may recur in the target.

    At the defaults 1 in 100 unrelated pairs of the demo has a segment under its TCA (1 in 200
    untrained), and 70 % of the edited copies of 3 s and more (54 %). Their ends are off by .4 s in
    the median, at 1 frame per second. The defaults were chosen among 12 on these very pairs.
    Features that are not whitened need a higher min_similarity (.6: no false segment, 20 %).

    Args:
        min_score: the least score of a segment.
        min_length: the least frames in both videos, or all frames of a shorter video.
        step: the farthest that neighbouring matches are apart: `step - 1` frames may be missing.
        gap: cost of each missing frame after the first.
        max_speed: how much faster one video may run, give or take a frame at either end.
        limit: the most segments. 5 times as many paths are examined, as some are not accepted.
    """
    matrix = torch.as_tensor(matrix, dtype=torch.float32)
    weights = torch.where(matrix >= min_similarity, matrix - min_similarity, NONE)
    least = min(min_length, *matrix.shape)
    segments = []
    closed = torch.zeros_like(matrix, dtype=torch.bool)  # the rectangles of the segments
    L = torch.empty_like(weights)
    for _ in range(5 * limit):
        for i, row in enumerate(longest_paths(weights, step, gap)):
            L[i] = row
        path = _best_path(L, weights, step, gap)
        score = float(L[path[-1]]) if path else NONE
        if score < min_score or len(segments) == limit:
            break
        (q0, t0), (q1, t1) = path[0], path[-1]
        rectangle = slice(q0, q1 + 1), slice(t0, t1 + 1)
        shorter, longer = sorted([q1 + 1 - q0, t1 + 1 - t0])
        is_speed_allowed = longer - 2 <= max_speed * shorter
        if shorter >= least and is_speed_allowed and not closed[rectangle].any():
            closed[rectangle] = True
            similarity = float(matrix[tuple(zip(*path, strict=True))].mean())
            segments.append(Segment(score, similarity, q0, q1 + 1, t0, t1 + 1))
        weights[rectangle] = NONE
    return segments


def _best_path(L, weights, step, gap):
    """The nodes (i, j) of the heaviest path, from first to last; [] without a node.

    L: the paths' weights (`longest_paths`). The path is traced backwards from its end.
    """
    i, j = divmod(int(L.argmax()), L.shape[1])
    if L[i, j] == NONE:
        return []
    path = [(i, j)]
    cost = gap * (torch.arange(step, 0, -1, device=L.device) - 2).clamp(min=0)
    while L[i, j] > weights[i, j] and i and j:
        before = L[max(i - step, 0) : i, max(j - step, 0) : j]
        before = before - cost[-before.shape[0] :, None] - cost[-before.shape[1] :]
        a, b = divmod(int(before.argmax()), before.shape[1])
        i, j = max(i - step, 0) + a, max(j - step, 0) + b
        path.append((i, j))
    return path[::-1]
