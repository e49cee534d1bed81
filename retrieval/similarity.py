"""How alike two videos are: `METRICS`, one pair at a time or as a table in chunks.

cosine and euclidean compare video descriptors (D,), the others frame descriptors (T, D), all L2-normalised. Frame-level
measures reduce one matrix of frame similarities, so several share it:

    tables = similarity_tables(queries, targets, ["chamfer", "sym_chamfer"])        # {metric: (Q, N)}
    stacked = pack_descriptors(queries, "chamfer")  # once, for many batches of targets
    for batch in batches: similarity_table(stacked, batch, "chamfer")
"""

from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from retrieval import alignment
from utils import InputError

CHUNK_BYTES = 256 << 20  # what one chunk may allocate


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

    matrix (sum Tt, sum Tq): inner products of the targets' frames with the queries'; rows, columns: the frames that each
    target, each query has (lists of N, of Q) -> (Q, N).
    """
    # One `amax` a target, not one `segment_reduce`: it runs over whole rows, ten times as fast.
    best = torch.stack([part.amax(0) for part in matrix.split(rows)])  # (N, sum Tq)
    return torch.stack([part.mean(1, dtype=torch.float32) for part in best.split(columns, 1)])


def sym_chamfer(matrix, rows, columns):
    """The mean of chamfer(q, t) and chamfer(t, q); arguments and result as `chamfer`."""
    # float32 takes maxima along rows at 3 % of the product's cost, bfloat16 at half of it: there a transposed copy is cheaper.
    turned = matrix.T.contiguous() if matrix.dtype == torch.bfloat16 else matrix.T
    return (chamfer(matrix, rows, columns) + chamfer(turned, columns, rows).T) / 2


def comparator(matrix, rows, columns, network):
    """Chamfer similarity of what ViSiL's video comparator `network` (model.VideoComparator) makes of each pair's matrix.

    Its output is clamped to -1..1 (Kordopatis-Zilos et al., ICCV 2019, section 3.4). Arguments and result as `chamfer`.
    """

    def compare(query):  # (Tq, sum Tt)
        reduced = [
            network(part).clamp(-1, 1) for part in query.split(rows, 1)
        ]  # (Tq / 4, Tt / 4) each
        return torch.stack([part.amax(1).mean() for part in reduced])

    return _each_query(compare, matrix, columns)


def dp(matrix, rows, columns):
    """Dynamic programming: `alignment.dp`; arguments and result as `chamfer`."""
    return _each_query(lambda query: alignment.dp(query, rows), matrix, columns)


def tn(matrix, rows, columns):
    """Temporal network: `alignment.tn`; arguments and result as `chamfer`."""
    return _each_query(lambda query: alignment.tn(query, rows), matrix, columns)


def _each_query(compare, matrix, columns):
    """compare: (Tq, sum Tt) -> (N,); matrix and columns as `chamfer` -> (Q, N)."""
    return torch.stack([compare(part.T.float().contiguous()) for part in matrix.split(columns, 1)])


VIDEO_METRICS = {"cosine": cosine, "euclidean": euclidean}
FRAME_METRICS = {
    "chamfer": chamfer,
    "sym_chamfer": sym_chamfer,
    "comparator": comparator,
    "dp": dp,
    "tn": tn,
}
METRICS = VIDEO_METRICS | FRAME_METRICS
WORKING_BYTES = {
    "comparator": 8,
    "dp": 8,
    "tn": 32,
}  # what a metric allocates a cell of the matrix, beside it


class PackedDescriptors(NamedTuple):
    """Descriptors of several videos one below another: `data (sum T, D)` on its device, `lengths` the rows each video has."""

    data: torch.Tensor
    lengths: list


def pack_descriptors(items, metric, device="cpu", dtype=torch.float32):
    """The `PackedDescriptors` of a sequence of (D,) arrays for a video-level `metric`, of (T, D) arrays for a frame-level one.

    It serves every metric of its level. dtype is what frame descriptors are multiplied in; video descriptors stay float32.
    """
    if isinstance(items, PackedDescriptors):
        return items
    video_level = _known(metric) in VIDEO_METRICS
    arrays = [np.asarray(item)[None] if video_level else np.asarray(item) for item in items]
    if any(array.ndim != 2 or not len(array) for array in arrays):
        shapes = sorted({str(np.shape(item)) for item in items})
        raise InputError(
            f"{metric} takes {'(D,)' if video_level else '(T, D)'} descriptors; these are {', '.join(shapes[:3])}"
        )
    try:
        data = torch.from_numpy(np.concatenate(arrays)) if arrays else torch.empty(0, 0)
    except ValueError:
        sizes = " and ".join(map(str, sorted({array.shape[1] for array in arrays})))
        raise InputError(
            f"{metric}: descriptors of {sizes} values; were all made by one model?"
        ) from None
    if not data.sum(
        dtype=torch.float32
    ).isfinite():  # not the table: a maximum hides what is no best match
        raise InputError(f"{metric}: descriptors hold NaN or infinity; is the model file sound?")
    return PackedDescriptors(
        data.to(device, torch.float32 if video_level else dtype), [len(array) for array in arrays]
    )


def similarity(query, target, metric, comparator=None):
    """The similarity of two videos, a float: (D,) descriptors for a video-level metric, (Tq, D), (Tt, D) otherwise."""
    return float(similarity_table([query], [target], metric, comparator=comparator)[0, 0])


def similarity_table(
    queries, targets, metric, device="cpu", chunk_bytes=CHUNK_BYTES, progress=False, **options
):
    """Similarities (Q, N) float32 of every query with every target by one metric; arguments as `similarity_tables`."""
    return similarity_tables(queries, targets, [metric], device, chunk_bytes, progress, **options)[
        metric
    ]


@torch.inference_mode()
def similarity_tables(
    queries,
    targets,
    metrics,
    device="cpu",
    chunk_bytes=CHUNK_BYTES,
    progress=False,
    comparator=None,
    dtype=torch.float32,
):
    """{metric: similarities (Q, N) float32} of every query with every target, by metrics of one level.

    queries, targets: sequences of (D,) arrays for video-level metrics, of (T, D) arrays for frame-level ones, or a `stack` of
    them. comparator: a model.VideoComparator, for that metric. dtype: what frame descriptors are multiplied in. bfloat16
    rounds descriptors and similarities to 8 bits (about .002); sums, means, DP, TN and the comparator stay float32.

    The work is cut so that what a chunk allocates stays under `chunk_bytes`, beside the table and the stacked queries: its
    targets' stacked descriptors, their matrix of similarities, the reductions. One pair is not cut: it takes 4 Tq Tt bytes
    (467 MB for two videos of 3 hours), 3 times that for dp and comparator, 9 times for tn; the comparator's network takes 64
    MiB beside, or what 32 query frames need. The cut changes nothing but the last bits. Raises InputError on an unknown
    metric, metrics of both levels, descriptors of two sizes or not finite.
    """
    video_level = {_known(metric) in VIDEO_METRICS for metric in metrics}
    if len(video_level) != 1:
        raise InputError(
            f"{', '.join(metrics) or 'no metric'}: give metrics of one level, video or frame"
        )
    functions = {metric: METRICS[metric] for metric in metrics}
    if "comparator" in functions:
        if comparator is None:
            raise InputError("comparator needs weights: give --comparator FILE")
        network = comparator.to(device).eval()
        functions["comparator"] = lambda *arguments: METRICS["comparator"](*arguments, network)
    queries = pack_descriptors(queries, metrics[0], device, dtype)
    dtype = queries.data.dtype  # of video descriptors, or of queries that came stacked
    tables = {
        metric: np.empty((len(queries.lengths), len(_lengths(targets, metrics[0]))), np.float32)
        for metric in metrics
    }
    for q, t in _chunks(queries, targets, metrics, chunk_bytes, metrics[0] if progress else None):
        parts = (
            _part(side, part, metrics[0], device, dtype)
            for side, part in ((queries, q), (targets, t))
        )
        for metric, block in _compare(*parts, functions).items():
            tables[metric][q, t] = block.cpu()
    return tables


def _compare(query, target, functions):
    """{metric: similarities (Q, N)} of two `PackedDescriptors`s. Its matrix is gone before the next chunk's is made."""
    sizes = [side.data.shape[1] for side in (query, target)]
    if sizes[0] != sizes[1]:
        metrics = ", ".join(functions)
        raise InputError(
            f"{metrics}: descriptors of {sizes[0]} and {sizes[1]} values; were both made by one model?"
        )
    if functions.keys() <= VIDEO_METRICS.keys():
        return {metric: function(query.data, target.data) for metric, function in functions.items()}
    matrix = target.data @ query.data.T  # (sum Tt, sum Tq)
    blocks = {
        metric: function(matrix, target.lengths, query.lengths)
        for metric, function in functions.items()
    }
    for metric, block in blocks.items():
        if not block.isfinite().all():
            raise InputError(
                f"{metric}: similarities are NaN or infinity; are the comparator's weights sound?"
            )
    return blocks


def _known(metric):
    if metric not in METRICS:
        raise InputError(f"metric {metric!r} is not known; choose from {', '.join(METRICS)}")
    return metric


def _lengths(items, metric):
    """The rows that each of the items, stacked or not, has."""
    if isinstance(items, PackedDescriptors):
        return items.lengths
    return [1 if metric in VIDEO_METRICS else len(item) for item in items]


def _part(items, span, metric, device, dtype):
    """The `PackedDescriptors` of the items, stacked or not, that the slice `span` names; a view where they are stacked."""
    if not isinstance(items, PackedDescriptors):
        return pack_descriptors(items[span], metric, device, dtype)
    start, lengths = sum(items.lengths[: span.start]), items.lengths[span]
    return PackedDescriptors(items.data[start : start + sum(lengths)].to(device, dtype), lengths)


def _chunks(queries, targets, metrics, chunk_bytes, bar):
    """Pairs of slices (of queries, of targets) that each take at most `chunk_bytes`, or are one pair."""
    rows, columns = _lengths(targets, metrics[0]), queries.lengths
    size, D = (
        4,
        queries.data.shape[-1],
    )  # bytes a cell: float32, or bfloat16 and its transposed copy
    working = max(WORKING_BYTES.get(metric, 0) for metric in metrics) * (
        max(columns, default=0) + 8
    )  # of one query at a time

    def alone(length):
        """What one target takes whatever the queries: its descriptors as given and as stacked, the metrics' own memory."""
        return 8 * D * length + working * (length + 16)

    # Queries stay whole where they fit beside the longest target; targets fill the rest of the bound.
    longest = max(rows, default=0)
    query_costs = [size * length * (longest + 2) + 4 * longest + 24 for length in columns]
    spans = list(_spans(query_costs, chunk_bytes - alone(longest)))
    with tqdm(
        total=len(spans) * len(rows), desc=bar, unit="video", disable=not bar, leave=False
    ) as progress:
        for q in spans:
            cells = size * sum(columns[q])
            results = len(columns[q])  # a target; several such blocks live while the last is summed
            costs = [
                cells * (length + 2) + (4 * length + 24) * results + alone(length)
                for length in rows
            ]
            for t in _spans(costs, chunk_bytes):
                yield q, t
                progress.update(t.stop - t.start)


def _spans(costs, budget):
    """Slices over consecutive items whose costs sum to at most `budget` (or a single item)."""
    start, total = 0, 0
    for i, cost in enumerate(costs):
        if i > start and total + cost > budget:
            yield slice(start, i)
            start, total = i, 0
        total += cost
    if costs:
        yield slice(start, len(costs))
