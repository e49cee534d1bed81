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
START = -1  # of a path of dynamic programming
STEP, GAP, SKEW = 5, 0.1, 0.03  # of `align`


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


def longest_paths(
    weights: Iterable[Tensor], step: int, gap: float = 0.0, skew: float = 0.0
) -> Iterator[Tensor]:
    """Yield, row by row, the weight of the heaviest path that ends in each node: (columns,).

    weights: (rows, columns), or its rows one by one. A node is a cell above -inf. Edges go from
    (i-a, j-b) to (i, j) for 1 <= a, b <= step, at a cost (`edge_costs`).

        L(i, j) = w(i, j) + max(0, max over a, b of L(i-a, j-b) - cost(a, b))
    """
    costs = edge_costs(step, gap, skew)
    if not costs.any():
        costs = costs[:1]  # the same for every a
    reach = None
    for row in weights:
        if reach is None:
            costs = costs.to(row)
            # reach[a - 1, j]: the heaviest path from the rows so far to column j, a rows ahead.
            reach = row.new_full((step, len(row)), NONE)
        L = row + reach[0].clamp(min=0)
        yield L
        reach = reach.roll(-1, 0)
        reach[-1] = NONE
        for b in range(1, min(step, len(row) - 1) + 1):
            torch.maximum(reach[:, b:], L[:-b] - costs[:, b - 1, None], out=reach[:, b:])


def edge_costs(step: int, gap: float, skew: float) -> Tensor:
    """cost(a, b) of an edge over a rows and b columns: (step, step), for 1 <= a, b <= step.

    gap for each missing frame after the first, in both videos, and skew for each frame by which a
    and b differ. Without skew, steps of 1 and 2 are free, so half and double speed are.
    """
    length = torch.arange(1, step + 1)
    missing = (length - 2).clamp(min=0)
    return gap * (missing[:, None] + missing) + skew * (length[:, None] - length).abs()


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
                part = _top_nodes(part, top, min_similarity)
                parts.append(F.pad(part, (0, step), value=NONE))  # no edge reaches the next target
            yield from torch.cat(parts, 1)

    best = matrix.new_full((sum(lengths) + step * len(lengths),), NONE)
    for L in longest_paths(nodes(), step):
        torch.maximum(best, L, out=best)
    best = best.split([length + step for length in lengths])
    return torch.stack([part.amax() for part in best]).clamp(min=0) / len(matrix)


def align_paths(matrix: Tensor, min_similarity: float) -> Tensor:
    """The weight of the heaviest path of `align` that ends in each cell; -inf below min_similarity.

    matrix, and what is returned: (Tq, columns). Targets may lie side by side, with STEP columns
    below min_similarity after each, which no edge crosses.
    """
    L = torch.empty_like(matrix)
    weights = (torch.where(row >= min_similarity, row - min_similarity, NONE) for row in matrix)
    for i, row in enumerate(longest_paths(weights, STEP, GAP, SKEW)):
        L[i] = row
    return L


def first_path(L: Tensor, matrix: Tensor, min_similarity: float) -> list[tuple[int, int]]:
    """The nodes of the heaviest path of `align`, by `align_paths`; [] if there is none."""
    return _best_path(L, matrix, STEP, GAP, SKEW, min_similarity)


def _top_nodes(matrix, top, min_similarity):
    """The similarities of each row's `top` cells, and of cells equal to the last; else -inf."""
    least = matrix.topk(min(top, matrix.shape[1]), 1).values[:, -1:].clamp(min=min_similarity)
    return matrix.masked_fill(matrix < least, NONE)


ALIGN_BYTES = 14  # that `align` takes for each cell, the matrix included


class Segment(NamedTuple):
    """A matching segment: frames of the query that show what frames of the target show.

    score: what the function that found it orders by, best first.
    similarity: the mean of the matched frames' similarities.
    query_start, query_end, target_start, target_end: frames, the ends not included.
    """

    score: float
    similarity: float
    query_start: int
    query_end: int
    target_start: int
    target_end: int

    @property
    def lengths(self) -> tuple[int, int]:
        """The frames in the query, and in the target."""
        return self.query_end - self.query_start, self.target_end - self.target_start

    def runs_within(self, max_speed: float) -> bool:
        """Whether neither video runs faster than that, give or take a frame at either end."""
        shorter, longer = sorted(self.lengths)
        return longer - 2 <= max_speed * shorter


@torch.inference_mode()
def align(
    matrix: np.ndarray | Tensor,
    min_similarity: float = 0.4,
    min_score: float = 0.5,
    min_length: int = 3,
    step: int = STEP,
    gap: float = GAP,
    skew: float = SKEW,
    max_speed: float = 2.0,
    limit: int = 10,
) -> list[Segment]:
    """The segments that two videos share, best first; none where they share nothing.

    matrix (Tq, Tt): frame similarities. Nodes are the pairs of frames with at least
    `min_similarity`; they weigh what they have above it. The heaviest path (`longest_paths`) is a
    segment. Its rectangle is then closed and the next path is found. So no two segments overlap in
    both videos, while a part of the query may recur in the target. A segment's score is the weight
    of its path.

    At the defaults 1 in 100 unrelated pairs of the demo had a segment under its TCA (1 in 200
    untrained), and 70 % of the edited copies of 3 s and more (54 %), when `skew` was 0; with it
    slightly fewer of both do. The defaults but `skew` were chosen among 12 on these very pairs.
    `skew` was chosen on the held-out part, by excerpts inside other videos: on the test part it
    brings 85 % of their ends within 1 s, where 81 % were (whitened features, docs/results.md).
    Features that are not whitened need a higher min_similarity (.6: no false segment, 20 %).

    Args:
        min_score: the least score of a segment.
        min_length: the least frames in both videos, or all frames of a shorter video.
        step: the farthest that neighbouring matches are apart: `step - 1` frames may be missing.
        gap: cost of each missing frame after the first.
        skew: cost of each frame by which two neighbouring matches are farther apart in one video
            than in the other. It keeps a path from running on beyond a copy, through frames that
            merely resemble it.
        max_speed: how much faster one video may run, give or take a frame at either end.
        limit: the most segments. 5 times as many paths are examined, as some are not accepted.
    """
    matrix = torch.as_tensor(matrix, dtype=torch.float32)
    weights = torch.where(matrix >= min_similarity, matrix - min_similarity, NONE)
    least = min(min_length, *matrix.shape)
    segments = []
    for score, path in heaviest_paths(weights, step, gap, skew, 5 * limit):
        if score < min_score or len(segments) == limit:
            break
        segment = segment_of(score, path, matrix)
        is_long = min(segment.lengths) >= least
        if is_long and segment.runs_within(max_speed) and is_apart(segment, segments):
            segments.append(segment)
    return segments


@torch.inference_mode()
def tn_segments(
    matrix: np.ndarray | Tensor,
    min_similarity: float = 0.2,
    top: int = 5,
    min_length: int = 5,
    step: int = 10,
    limit: int = 10,
) -> list[Segment]:
    """The segments of the temporal network: the paths of `tn`, heaviest first.

    As in VCSL's benchmark (He et al., CVPR 2022), whose defaults these are: a path is a segment if
    it has at least `min_length` frames in both videos (or all frames of a shorter one), and its
    similarities, summed, are more than `min_similarity` of its mean extent. `limit` paths are
    examined. Here the rectangle of a path is closed before the next is found, so segments do not
    overlap in both videos; there they may overlap by an IoU of .3.
    """
    matrix = torch.as_tensor(matrix, dtype=torch.float32)
    weights = _top_nodes(matrix, top, min_similarity)
    least = min(min_length, *matrix.shape)
    segments = []
    for score, path in heaviest_paths(weights, step, 0.0, 0.0, limit):
        segment = segment_of(score, path, matrix)
        is_dense = score > min_similarity * sum(segment.lengths) / 2
        if min(segment.lengths) >= least and is_dense and is_apart(segment, segments):
            segments.append(segment)
    return segments


@torch.inference_mode()
def dp_segments(
    matrix: np.ndarray | Tensor,
    min_similarity: float = 0.3,
    min_length: int = 5,
    phi: int = 10,
    limit: int = 10,
) -> list[Segment]:
    """The segments of dynamic programming: the paths of `dp`, best first.

    The recurrence is that of `dp` on the similarities less `min_similarity`, so that a path loses
    by running on through unlike frames, and ends where its score is highest. A path is a segment if
    it has at least `min_length` frames in both videos (or all frames of a shorter one). Its
    rectangle is closed before the next is found. VCSL's DP asks for the same mean similarity, .3
    (He et al., CVPR 2022); it splits paths at long mismatches, which end them here.
    """
    matrix = torch.as_tensor(matrix, dtype=torch.float32).cpu()
    weights = (matrix - min_similarity).numpy()
    least = min(min_length, *matrix.shape)
    segments = []
    for _ in range(limit):
        score, path = _best_dp_path(weights, phi)
        if not path:
            break
        segment = segment_of(score, path, matrix)
        if min(segment.lengths) >= least and is_apart(segment, segments):
            segments.append(segment)
        weights[_rectangle(path)] = NONE
    return segments


# What `evaluation.py` offers for sets of segments.
ALIGNERS = {"align": align, "tn": tn_segments, "dp": dp_segments}


# --- paths --------------------------------------------------------------------------------------


def heaviest_paths(
    weights: Tensor, step: int, gap: float, skew: float, count: int
) -> Iterator[tuple[float, list[tuple[int, int]]]]:
    """Yield (weight, nodes) of up to `count` paths, heaviest first; see `longest_paths`.

    The rectangle of each is closed in `weights` before the next is found.
    """
    L = torch.empty_like(weights)
    for _ in range(count):
        for i, row in enumerate(longest_paths(weights, step, gap, skew)):
            L[i] = row
        path = _best_path(L, weights, step, gap, skew)
        if not path:
            return
        yield float(L[path[-1]]), path
        weights[_rectangle(path)] = NONE


def _best_path(L, weights, step, gap, skew, offset=0.0):
    """The nodes (i, j) of the heaviest path, from first to last; [] without a node.

    L: the paths' weights (`longest_paths`). The path is traced backwards from its end. A node
    weighs weights[i, j] - offset.
    """
    i, j = divmod(int(L.argmax()), L.shape[1])
    if L[i, j] == NONE:
        return []
    path = [(i, j)]
    costs = edge_costs(step, gap, skew).to(L).flip(0, 1)  # the farthest first
    while L[i, j] > weights[i, j] - offset and i and j:
        before = L[max(i - step, 0) : i, max(j - step, 0) : j]
        before = before - costs[-before.shape[0] :, -before.shape[1] :]
        a, b = divmod(int(before.argmax()), before.shape[1])
        i, j = max(i - step, 0) + a, max(j - step, 0) + b
        path.append((i, j))
    return path[::-1]


def _best_dp_path(weights, phi):
    """The score and the cells of `dp`'s best path over weights (Tq, Tt), by anti-diagonals.

    No cells if no path has a positive score.
    """
    Tq, Tt = weights.shape
    # Outside the matrix is row and column 0.
    D = np.full((Tq + 1, Tt + 1), NONE, np.float32)
    m = np.zeros((Tq + 1, Tt + 1), int)  # mismatches since the start of the path
    steps = np.full((Tq + 1, Tt + 1), START, np.int8)
    for diagonal in range(Tq + Tt - 1):
        i = np.arange(max(diagonal - Tt + 1, 0), min(diagonal, Tq - 1) + 1)
        j = diagonal - i
        s = weights[i, j]
        candidates = np.stack([D[i, j] + s, D[i, j + 1] + s / 2, D[i + 1, j] + s / 2])
        step = candidates.argmax(0)  # 0 diagonal, 1 from (i - 1, j), 2 from (i, j - 1)
        mismatches = np.choose(step, [m[i, j], m[i, j + 1] + 1, m[i + 1, j] + 1])
        best = candidates.max(0)
        is_start = (mismatches > phi) | (best < s) | (i == 0) | (j == 0)
        D[i + 1, j + 1] = np.where(is_start, s, best)
        m[i + 1, j + 1] = np.where(is_start, 0, mismatches)
        steps[i + 1, j + 1] = np.where(is_start, START, step)
    D, steps = D[1:, 1:], steps[1:, 1:]
    i, j = np.unravel_index(D.argmax(), D.shape)
    score, path = float(D[i, j]), [(int(i), int(j))]
    if score <= 0:
        return 0.0, []
    while steps[i, j] != START:
        i, j = i - (steps[i, j] != 2), j - (steps[i, j] != 1)
        path.append((int(i), int(j)))
    return score, path[::-1]


def _rectangle(path):
    (q0, t0), (q1, t1) = path[0], path[-1]
    return slice(q0, q1 + 1), slice(t0, t1 + 1)


def segment_of(score: float, path: list[tuple[int, int]], matrix: Tensor) -> Segment:
    """The Segment of a path's nodes; its similarity is their mean in the matrix (Tq, Tt)."""
    query, target = _rectangle(path)
    similarity = float(matrix[tuple(zip(*path, strict=True))].mean())
    return Segment(score, similarity, query.start, query.stop, target.start, target.stop)


def is_apart(segment: Segment, others: Iterable[Segment]) -> bool:
    """Whether a segment overlaps none of the others in both videos."""
    for other in others:
        query = segment.query_start < other.query_end and other.query_start < segment.query_end
        target = segment.target_start < other.target_end and other.target_start < segment.target_end
        if query and target:
            return False
    return True
