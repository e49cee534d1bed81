"""Where two videos match in time: dynamic programming and the temporal network as measures, and `align` for the places.

All work on frame similarities: a query of Tq frames against targets whose frames stand side by side, (Tq, sum Tt). A path runs
forwards in both videos. What the papers' compared methods leave open (how a path becomes one number) is said where it is set.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

NONE = -torch.inf


def dp(matrix, lengths, phi=10):
    """Dynamic programming (the DP of the papers' tables: Chou et al., TMM 2015) of one query with n targets -> (n,).

    matrix (Tq, sum Tt): frame similarities s; lengths: the targets' frames. For each pair,
        D(i, j) = max(D(i-1, j-1) + s, D(i-1, j) + s/2, D(i, j-1) + s/2),   s = s(i, j); D = s in the first row and column.
    A step that is not diagonal is a mismatch; the one after `phi` mismatches ends the path, and a new one starts with D = s.
    Among equal predecessors the diagonal goes first, then (i-1, j). Recurrence and phi = 10 as the `dp` of the TCA release
    would be, were it not left before it starts; mismatches are counted along each path, not over the whole matrix.
    The similarity is the largest D / max(Tq, W) over all cells, W the weights (1 or 1/2) that D has summed: 1 for a copy.

    Cells of one anti-diagonal need only the two before it, so all of them, in all targets, are computed together.
    """
    Tq, total = matrix.shape
    lengths = torch.as_tensor(lengths, device=matrix.device)
    lengths, order = lengths.sort(descending=True)  # targets that are through drop off the end
    starts = (
        lengths.new_zeros(len(lengths)).index_copy(0, order, lengths).cumsum(0)[order] - lengths
    )[:, None]  # (n, 1)
    i = torch.arange(Tq, device=matrix.device)
    flat, best = matrix.reshape(-1), matrix.new_full((len(lengths),), NONE)
    # One anti-diagonal (n, 1 + Tq), its column 0 outside the matrix: score D, mismatches m, weights W.
    D = matrix.new_full((len(lengths), 1 + Tq), NONE)
    m, W = torch.zeros_like(D), torch.zeros_like(D)
    last = (D, m, W)  # the diagonal before D's
    ends = (lengths + Tq - 1).tolist()
    active = len(ends)
    for diagonal in range(ends[0] if ends else 0):
        while ends[active - 1] <= diagonal:
            active -= 1
        j = diagonal - i  # (Tq,)
        inside = (j >= 0) & (j < lengths[:active, None])  # (n, Tq)
        s = flat[(i * total + j + starts[:active]).clamp_(0, flat.numel() - 1)]
        (D1, m1, W1), (D2, m2, W2) = (
            [part[:active] for part in state] for state in ((D, m, W), last)
        )
        D_step = torch.stack(
            [D2[:, :-1] + s, D1[:, :-1] + s / 2, D1[:, 1:] + s / 2]
        )  # diagonal, from above, from the left
        D_new, step = D_step.max(0)
        slanted = step > 0
        m_new = torch.where(slanted, torch.where(step == 1, m1[:, :-1], m1[:, 1:]) + 1, m2[:, :-1])
        W_new = torch.where(
            slanted, torch.where(step == 1, W1[:, :-1], W1[:, 1:]) + 0.5, W2[:, :-1] + 1
        )
        fresh = (m_new > phi) | (j == 0) | (i == 0)
        D_new = torch.where(fresh, s, D_new).masked_fill_(~inside, NONE)
        m_new, W_new = m_new.masked_fill_(fresh, 0), W_new.masked_fill_(fresh, 1)
        best[:active] = torch.maximum(best[:active], (D_new / W_new.clamp(min=Tq)).amax(1))
        last, (D, m, W) = (
            (D1, m1, W1),
            (F.pad(part, (1, 0), value=v) for part, v in ((D_new, NONE), (m_new, 0), (W_new, 0))),
        )
    return torch.empty_like(best).index_copy_(0, order, best)


def longest_paths(weights, step, gap=0.0):
    """The heaviest path that ends in each node, row by row: yields (columns,) tensors, -inf where there is no node.

    weights (rows, columns): a node's weight, -inf for none. An edge goes from (i-a, j-b) to (i, j) for 1 <= a, b <= step, and
    costs gap * ((a - 2 if a > 2) + (b - 2 if b > 2)): steps of 1 and 2 are free, so both halves and doubles of speed are.
        L(i, j) = w(i, j) + max(0, max over a, b of L(i-a, j-b) - cost(a, b))
    """
    columns = weights.shape[1]
    cost = [gap * max(b - 2, 0) for b in range(1, step + 1)]
    costs = weights.new_tensor(cost)[:, None]
    reach = weights.new_full(
        (step, columns), NONE
    )  # what the last rows' best paths are worth to a node in column j
    for row in weights:
        L = row + (reach - costs).amax(0).clamp_(min=0)
        yield L
        reach = reach.roll(1, 0)
        reach[0] = NONE
        for b, price in enumerate(cost, 1):
            if b < columns:
                torch.maximum(reach[0, b:], L[:-b] - price, out=reach[0, b:])


def tn(matrix, lengths, top=5, min_similarity=0.2, step=10):
    """Temporal network (Tan et al., ACM MM 2009) of one query with n targets -> (n,).

    matrix (Tq, sum Tt), lengths as `dp`. Nodes are the pairs of a query frame and one of its `top` most similar frames of the
    target (and any equal to the last of them), if their similarity is at least `min_similarity`. Edges go forwards by 1 to
    `step` frames in both videos. The heaviest path, by the sum of its nodes' similarities, over Tq is the similarity (our
    choice; the paper's was not at hand): 1 for a copy, 0 without a node. The paper's rule against edges that pass over a
    node can be left out: a heaviest path of positive weights takes the node. top 5 and step 10 as in VCSL (He et al., CVPR
    2022) and the TCA release; min_similarity as in VCSL (the release has .8, above what copies reach in features that are
    whitened).
    """
    parts = []
    for part in matrix.split(list(lengths), 1):
        least = part.topk(min(top, part.shape[1]), 1).values[:, -1:].clamp(min=min_similarity)
        parts.append(
            F.pad(part.masked_fill(part < least, NONE), (0, step), value=NONE)
        )  # no edge reaches the next target
    best = matrix.new_full((sum(lengths) + step * len(parts),), NONE)
    for L in longest_paths(torch.cat(parts, 1), step):
        torch.maximum(best, L, out=best)
    return torch.stack(
        [part.amax() for part in best.split([length + step for length in lengths])]
    ).clamp(min=0) / len(matrix)


class Segment(NamedTuple):
    """A matching stretch: query frames query_start to query_end (half-open) show what the target's do.

    score: the evidence, summed over matched frames of how far they lie above `min_similarity`, less the gaps; similarity: the
    mean of the matched frames' similarities.
    """

    score: float
    similarity: float
    query_start: int
    query_end: int
    target_start: int
    target_end: int


@torch.inference_mode()
def align(
    matrix,
    min_similarity=0.4,
    min_score=0.5,
    min_length=3,
    step=5,
    gap=0.1,
    max_speed=2.0,
    limit=10,
):
    """The stretches that two videos share, best first: list of `Segment`; empty where they share none.

    matrix (Tq, Tt): frame similarities (array or tensor). The heaviest path through the temporal network (`longest_paths`)
    whose nodes are all frame pairs of at least `min_similarity`, weighing what they have above it, is a stretch; its rectangle
    is then closed and the next is sought, so no two stretches overlap in both videos (a query's part may recur in the target).
    min_score: the least score. min_length: the least frames in both videos (or all, of a shorter video). step: the farthest
    that two neighbouring matches lie apart: `step - 1` frames may be missing; gap: what each frame missing beyond the first
    costs. max_speed: the most that one video may run faster than the other, give or take a frame at either end.
    limit: the most stretches to return; 5 times as many paths are looked at, of which some are none.

    At the defaults, chosen among 12 on these very pairs, 1 in 100 unrelated pairs of the demo gives a stretch under its TCA
    (1 in 200 untrained), and 70 % of the graded copies of 3 s and more do (54 %), their ends off by .4 s in the median at 1
    frame a second. A higher min_similarity (.6: no false stretch, 20 %) suits features that are not whitened.
    """
    matrix = torch.as_tensor(matrix, dtype=torch.float32)
    weights = torch.where(matrix >= min_similarity, matrix - min_similarity, NONE)
    least, found = min(min_length, *matrix.shape), []
    closed = torch.zeros_like(matrix, dtype=torch.bool)  # the rectangles of what is found
    for _ in range(5 * limit):
        L = torch.stack(list(longest_paths(weights, step, gap)))
        path = _best_path(L, weights, step, gap)
        score = float(L[path[-1]]) if path else NONE
        if score < min_score or len(found) == limit:
            break
        (q0, t0), (q1, t1) = path[0], path[-1]
        rectangle = slice(q0, q1 + 1), slice(t0, t1 + 1)
        frames = q1 + 1 - q0, t1 + 1 - t0
        if (
            min(frames) >= least
            and max(frames) - 2 <= max_speed * min(frames)
            and not closed[rectangle].any()
        ):
            closed[rectangle] = True
            similarity = float(matrix[tuple(zip(*path, strict=True))].mean())
            found.append(Segment(score, similarity, q0, q1 + 1, t0, t1 + 1))
        weights[rectangle] = NONE
    return found


def _best_path(L, weights, step, gap):
    """The nodes (i, j) of the heaviest path, first to last, found backwards from its end; [] without a node."""
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
