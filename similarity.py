"""How alike two videos are: `METRICS`, one pair at a time or as a table in chunks.

cosine and euclidean compare video descriptors (D,), chamfer and sym_chamfer frame descriptors (T, D), all L2-normalised.
"""

import numpy as np
import torch
from tqdm import tqdm

from utils import InputError

CHUNK_BYTES = 256 << 20  # bound of one chunk's similarity matrix


def cosine(queries, targets):
    """queries (Q, D), targets (N, D) -> (Q, N): the inner product of unit vectors."""
    return queries @ targets.T


def euclidean(queries, targets):
    """queries (Q, D), targets (N, D) -> (Q, N): 1 - d / 2, d the distance of unit vectors (0 to 2), so it ranks as d does.

    The released code divides by each pair's largest distance instead, which makes every similarity 0.
    """
    return 1 - torch.cdist(queries, targets, compute_mode="donot_use_mm_for_euclid_dist") / 2


def chamfer(matrix, rows, columns):
    """Mean over a query's frames of the best match among a target's frames (TCA section 3.2). Not symmetric.

    matrix (sum Tt, sum Tq): inner products of the targets' frames with the queries'; rows (N,), columns (Q,): the frames each
    has -> (Q, N).
    """
    best = torch.segment_reduce(matrix, "max", lengths=rows, axis=0)  # (N, sum Tq)
    return torch.segment_reduce(best.T.contiguous(), "mean", lengths=columns, axis=0)  # (Q, N)


def sym_chamfer(matrix, rows, columns):
    """The mean of chamfer(q, t) and chamfer(t, q); arguments and result as `chamfer`."""
    back = chamfer(matrix.T.contiguous(), columns, rows)  # (N, Q)
    return (chamfer(matrix, rows, columns) + back.T) / 2


VIDEO_METRICS = {"cosine": cosine, "euclidean": euclidean}
FRAME_METRICS = {"chamfer": chamfer, "sym_chamfer": sym_chamfer}
METRICS = VIDEO_METRICS | FRAME_METRICS


def similarity(query, target, metric):
    """The similarity of two videos, a float: (D,) descriptors for a video-level metric, (Tq, D), (Tt, D) otherwise."""
    return float(similarity_table([query], [target], metric)[0, 0])


def similarity_table(queries, targets, metric, device="cpu", chunk_bytes=CHUNK_BYTES, progress=False):
    """Similarities (Q, N) float32 of every query with every target.

    queries, targets: sequences of (D,) arrays for a video-level metric, of (T, D) arrays for a frame-level one. The work is
    cut so that no matrix of frame similarities exceeds `chunk_bytes` (unless one pair alone does); the cut changes nothing
    but the last bits. Raises InputError on an unknown metric or descriptors that are not finite.
    """
    if metric not in METRICS:
        raise InputError(f"metric {metric!r} is not known; choose from {', '.join(METRICS)}")
    video_level = metric in VIDEO_METRICS
    rows = [1 if video_level else len(target) for target in targets]
    columns = [1 if video_level else len(query) for query in queries]
    table = np.empty((len(queries), len(targets)), np.float32)
    # Queries stay whole where they fit beside at least a few targets; targets fill the rest of the bound.
    for q in _spans(columns, chunk_bytes // 4 // max(rows, default=1)):
        query = _stack(queries[q], video_level, device)
        budget = chunk_bytes // 4 // len(query)
        for t in tqdm(list(_spans(rows, budget)), metric, unit="chunk", disable=not progress, leave=False):
            target = _stack(targets[t], video_level, device)
            if video_level:
                block = METRICS[metric](query, target)
            else:
                lengths = (torch.tensor(part, device=device) for part in (rows[t], columns[q]))
                block = METRICS[metric](target @ query.T, *lengths)
            table[q, t] = block.cpu()
    if not np.isfinite(table).all():
        raise InputError(f"{metric}: descriptors hold NaN or infinity; is the model file sound?")
    return table


def _spans(lengths, budget):
    """Slices over consecutive items whose lengths sum to at most `budget` (or a single item)."""
    start, total = 0, 0
    for i, length in enumerate(lengths):
        if i > start and total + length > budget:
            yield slice(start, i)
            start, total = i, 0
        total += length
    if lengths:
        yield slice(start, len(lengths))


def _stack(items, video_level, device):
    """(n, D) float32 on `device`: descriptors stacked, or frames of all items one after another."""
    join = np.stack if video_level else np.concatenate
    return torch.as_tensor(join([np.asarray(item) for item in items]), dtype=torch.float32, device=device)
