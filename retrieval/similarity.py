"""How alike two videos are: `METRICS`, for one pair or for a table of pairs computed in chunks.

cosine and euclidean compare video descriptors (D,), the others frame descriptors (T, D), all
L2-normalised. Frame-level metrics reduce one matrix of frame similarities, so several share it:

    tables = similarity_tables(queries, targets, ["chamfer", "sym_chamfer"])  # {metric: (Q, N)}

    packed = pack_descriptors(queries, "chamfer")  # once, for many batches of targets
    for batch in batches:
        table = similarity_table(packed, batch, "chamfer")
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from retrieval import alignment
from retrieval.comparator import VideoComparator
from utils import InputError

CHUNK_BYTES = 256 << 20  # what one chunk may allocate

# --- the metrics --------------------------------------------------------------------------------


def cosine(queries: Tensor, targets: Tensor) -> Tensor:
    """The inner product of unit vectors: queries (Q, D), targets (N, D) -> (Q, N)."""
    return queries @ targets.T


def euclidean(queries: Tensor, targets: Tensor) -> Tensor:
    """1 - d / 2 for unit vectors at distance d (0 to 2), which ranks as d does: (Q, N).

    The released code divides by each pair's largest distance, which makes every similarity 0.
    """
    distance = torch.cdist(queries, targets, compute_mode="donot_use_mm_for_euclid_dist")
    return 1 - distance / 2


def chamfer(matrix: Tensor, rows: list[int], columns: list[int]) -> Tensor:
    """Mean over the query's frames of the best match among the target's (TCA section 3.2).

    Not symmetric.

    Args:
        matrix: (sum Tt, sum Tq), inner products of the targets' frames with the queries'.
        rows, columns: the frames that each of N targets and each of Q queries has.

    Returns:
        Similarities (Q, N).
    """
    best = _best_matches(matrix, rows)
    means = [part.mean(1, dtype=torch.float32) for part in best.split(columns, 1)]
    return torch.stack(means)


def half_chamfer(matrix: Tensor, rows: list[int], columns: list[int]) -> Tensor:
    """Chamfer over the better half of the query's frames, rounded up; arguments as `chamfer`.

    A target that shows an excerpt of the query has no match for its other frames, which say nothing
    then.
    """
    best = _best_matches(matrix, rows)
    means = []
    for part in best.split(columns, 1):  # (N, Tq)
        half = part.topk((part.shape[1] + 1) // 2, 1).values
        means.append(half.mean(1, dtype=torch.float32))
    return torch.stack(means)


def _best_matches(matrix, rows):
    """The best match of each query frame in each target: (N, sum Tq); arguments as `chamfer`."""
    # One `amax` for all neighbours of one length; batches are sorted by length. It runs over whole
    # rows. One `segment_reduce` for all takes ten times longer on a CPU.
    best, start = [], 0
    for T, group in groupby(rows):
        n = len(list(group))
        part = matrix[start : start + n * T].unflatten(0, (n, T))  # (n, T, sum Tq)
        best.append(part.amax(1))
        start += n * T
    return torch.cat(best)


def sym_chamfer(matrix: Tensor, rows: list[int], columns: list[int]) -> Tensor:
    """The mean of chamfer(q, t) and chamfer(t, q); arguments and result as `chamfer`."""
    # Maxima along rows cost 3 % of the product in float32, but half of it in bfloat16, where a
    # transposed copy is cheaper.
    is_bfloat16 = matrix.dtype == torch.bfloat16
    transposed = matrix.T.contiguous() if is_bfloat16 else matrix.T
    return (chamfer(matrix, rows, columns) + chamfer(transposed, columns, rows).T) / 2


def comparator(
    matrix: Tensor, rows: list[int], columns: list[int], network: VideoComparator
) -> Tensor:
    """Chamfer similarity of each pair's matrix after ViSiL's video comparator.

    The network's output is clamped to -1..1 (Kordopatis-Zilos et al., ICCV 2019, section 3.4).
    Arguments and result as `chamfer`.
    """

    def compare(query):  # (Tq, sum Tt) -> (N,)
        similarities = []
        for pair in query.split(rows, 1):
            reduced = network(pair).clamp(-1, 1)  # (Tq / 4, Tt / 4)
            similarities.append(reduced.amax(1).mean())
        return torch.stack(similarities)

    return _for_each_query(compare, matrix, columns)


def dp(matrix: Tensor, rows: list[int], columns: list[int]) -> Tensor:
    """Dynamic programming (`alignment.dp`); arguments and result as `chamfer`."""
    return _for_each_query(lambda query: alignment.dp(query, rows), matrix, columns)


def tn(matrix: Tensor, rows: list[int], columns: list[int]) -> Tensor:
    """Temporal network (`alignment.tn`); arguments and result as `chamfer`."""
    return _for_each_query(lambda query: alignment.tn(query, rows), matrix, columns)


def _for_each_query(compare, matrix, columns):
    """Apply `compare`, (Tq, sum Tt) -> (N,), to each query: (Q, N). The rest as `chamfer`."""
    parts = matrix.split(columns, 1)  # (sum Tt, Tq) each
    return torch.stack([compare(part.T.float().contiguous()) for part in parts])


VIDEO_METRICS = {"cosine": cosine, "euclidean": euclidean}
FRAME_METRICS = {
    "chamfer": chamfer,
    "sym_chamfer": sym_chamfer,
    "half_chamfer": half_chamfer,
    "comparator": comparator,
    "dp": dp,
    "tn": tn,
}
METRICS = VIDEO_METRICS | FRAME_METRICS

# Bytes that a metric allocates for each cell of the matrix, beside the matrix itself.
WORKING_BYTES = {"comparator": 8, "dp": 8, "tn": 8}


# --- descriptors --------------------------------------------------------------------------------


class PackedDescriptors(NamedTuple):
    """Descriptors of several videos, one below another.

    data: (sum T, D), on its device.
    lengths: the rows that each video has; 1 for video descriptors.
    """

    data: Tensor
    lengths: list[int]


Descriptors = PackedDescriptors | Sequence[np.ndarray]


def pack_descriptors(
    items: Descriptors, metric: str, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> PackedDescriptors:
    """Pack (D,) arrays for a video-level metric, or (T, D) arrays for a frame-level one.

    The result serves every metric of the level. dtype: type in which frame descriptors are
    multiplied; video descriptors stay float32. Raises InputError for arrays of other shapes, of
    several sizes D, or with NaN or infinity.
    """
    if isinstance(items, PackedDescriptors):
        return items
    is_video_level = _known(metric) in VIDEO_METRICS
    arrays = [np.asarray(item) for item in items]
    if is_video_level:
        arrays = [array[None] for array in arrays]  # (1, D)
    if any(array.ndim != 2 or not len(array) for array in arrays):
        wanted = "(D,)" if is_video_level else "(T, D)"
        shapes = sorted({str(np.shape(item)) for item in items})
        raise InputError(f"{metric} takes {wanted} descriptors; these are {', '.join(shapes[:3])}")
    try:
        data = torch.from_numpy(np.concatenate(arrays)) if arrays else torch.empty(0, 0)
    except ValueError:
        sizes = sorted({array.shape[1] for array in arrays})
        raise InputError(
            f"{metric}: descriptors of {' and '.join(map(str, sizes))} values;"
            " were all made by one model?"
        ) from None
    # Checked here, because a maximum hides NaN and infinity in frames that match nothing.
    if not data.sum(dtype=torch.float32).isfinite():
        raise InputError(f"{metric}: descriptors hold NaN or infinity; is the model file sound?")
    data = data.to(device, torch.float32 if is_video_level else dtype)
    return PackedDescriptors(data, [len(array) for array in arrays])


def _known(metric):
    if metric not in METRICS:
        raise InputError(f"metric {metric!r} is not known; choose from {', '.join(METRICS)}")
    return metric


# --- tables -------------------------------------------------------------------------------------


def similarity(
    query: np.ndarray, target: np.ndarray, metric: str, comparator: VideoComparator | None = None
) -> float:
    """The similarity of two videos by their (D,) or (Tq, D) and (Tt, D) descriptors."""
    return float(similarity_table([query], [target], metric, comparator=comparator)[0, 0])


def similarity_table(
    queries: Descriptors,
    targets: Descriptors,
    metric: str,
    device: str = "cpu",
    chunk_bytes: int = CHUNK_BYTES,
    progress: bool = False,
    **options,
) -> np.ndarray:
    """Similarities (Q, N) by one metric; arguments as `similarity_tables`."""
    tables = similarity_tables(queries, targets, [metric], device, chunk_bytes, progress, **options)
    return tables[metric]


def similarity_tables(
    queries: Descriptors,
    targets: Descriptors,
    metrics: Sequence[str],
    device: str = "cpu",
    chunk_bytes: int = CHUNK_BYTES,
    progress: bool = False,
    comparator: VideoComparator | None = None,
    dtype: torch.dtype = torch.float32,
) -> dict[str, np.ndarray]:
    """{metric: similarities (Q, N) float32} of every query with every target.

    The work is cut into chunks. A chunk allocates at most `chunk_bytes` beside the tables and the
    packed queries: its targets' packed descriptors, the matrix of similarities, the reductions.
    A pair is never cut. It takes 4 Tq Tt bytes (467 MB for two videos of 3 hours), 3 times that for
    dp and comparator, twice for tn; the comparator's network takes 64 MiB more, or what 32 query
    frames need. The cut changes nothing but the last bits.

    Args:
        queries, targets: (D,) arrays for video-level metrics, (T, D) arrays for frame-level ones,
            or what `pack_descriptors` made of them.
        metrics: all of one level.
        comparator: the network of the metric of that name.
        dtype: type in which frame descriptors are multiplied. bfloat16 rounds descriptors and
            similarities to 8 bits (about .002). Sums, means, DP, TN, comparator stay in float32.

    Raises:
        InputError: a metric is not known, the metrics are of both levels, or descriptors do not fit
            or are not finite.
    """
    tables = similarity_tensors(
        queries, targets, metrics, device, chunk_bytes, progress, comparator, dtype
    )
    return {metric: table.cpu().numpy() for metric, table in tables.items()}


@torch.inference_mode()
def similarity_tensors(
    queries: Descriptors,
    targets: Descriptors,
    metrics: Sequence[str],
    device: str = "cpu",
    chunk_bytes: int = CHUNK_BYTES,
    progress: bool = False,
    comparator: VideoComparator | None = None,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """What `similarity_tables` gives, on the device: a GPU is waited for once per metric."""
    functions = _functions(metrics, comparator, device)
    queries = pack_descriptors(queries, metrics[0], device, dtype)
    dtype = queries.data.dtype  # float32 for video descriptors; packed queries keep theirs
    shape = len(queries.lengths), len(_lengths(targets, metrics[0]))
    tables = {metric: torch.empty(shape, device=device) for metric in metrics}
    # Of the blocks, as of the table it would take as much memory again; on the device, unread.
    are_finite = {metric: torch.ones((), dtype=torch.bool, device=device) for metric in metrics}
    bar = metrics[0] if progress else None
    for q, t in _chunks(queries, targets, metrics, chunk_bytes, bar):
        blocks = _compare(
            _part(queries, q, metrics[0], device, dtype),
            _part(targets, t, metrics[0], device, dtype),
            functions,
        )
        for metric, block in blocks.items():
            tables[metric][q, t] = block
            are_finite[metric] &= block.isfinite().all()
    for metric, is_finite in are_finite.items():
        if metric in FRAME_METRICS and not is_finite:
            raise InputError(
                f"{metric}: similarities are NaN or infinity; are the comparator's weights sound?"
            )
    return tables


def _functions(metrics, network, device) -> dict[str, Callable]:
    """{metric: its function}; the comparator's comes with its network."""
    levels = {_known(metric) in VIDEO_METRICS for metric in metrics}
    if len(levels) != 1:
        raise InputError(
            f"{', '.join(metrics) or 'no metric'}: give metrics of one level, video or frame"
        )
    functions = {metric: METRICS[metric] for metric in metrics}
    if "comparator" in functions:
        if network is None:
            raise InputError("comparator needs weights: give --comparator FILE")
        network = network.to(device).eval()
        functions["comparator"] = lambda *arguments: comparator(*arguments, network)
    return functions


def _compare(query, target, functions):
    """{metric: similarities (Q, N)} of two `PackedDescriptors`.

    The matrix is freed on return, before the next chunk's is made.
    """
    names = ", ".join(functions)
    sizes = query.data.shape[1], target.data.shape[1]
    if sizes[0] != sizes[1]:
        raise InputError(
            f"{names}: descriptors of {sizes[0]} and {sizes[1]} values;"
            " were both made by one model?"
        )
    if functions.keys() <= VIDEO_METRICS.keys():
        return {metric: function(query.data, target.data) for metric, function in functions.items()}
    matrix = target.data @ query.data.T  # (sum Tt, sum Tq)
    blocks = {}
    for metric, function in functions.items():
        blocks[metric] = function(matrix, target.lengths, query.lengths)
    return blocks


def _lengths(items, metric):
    """The rows that each of the items, packed or not, has."""
    if isinstance(items, PackedDescriptors):
        return items.lengths
    return [1 if metric in VIDEO_METRICS else len(item) for item in items]


def _part(items, span, metric, device, dtype):
    """The items of a slice, packed; a view where they were packed already."""
    if not isinstance(items, PackedDescriptors):
        return pack_descriptors(items[span], metric, device, dtype)
    start, lengths = sum(items.lengths[: span.start]), items.lengths[span]
    return PackedDescriptors(items.data[start : start + sum(lengths)].to(device, dtype), lengths)


def _chunks(queries, targets, metrics, chunk_bytes, bar) -> Iterator[tuple[slice, slice]]:
    """Pairs of slices, of queries and targets: each takes at most `chunk_bytes`, or is one pair."""
    rows, columns = _lengths(targets, metrics[0]), queries.lengths
    D = queries.data.shape[-1]
    cell = 4  # bytes: float32, or bfloat16 and its transposed copy
    # Metrics that work on one query at a time allocate this for each row of a target.
    working = max(WORKING_BYTES.get(metric, 0) for metric in metrics)
    working *= max(columns, default=0) + 32  # tn: 256 bytes, for a few rows at a time

    def target_bytes(length):
        """What a target takes for any queries: descriptors as given and packed, working memory."""
        return 8 * D * length + working * (length + 16)

    # Queries stay whole where they fit beside the longest target; targets fill the rest.
    longest = max(rows, default=0)
    query_costs = [cell * length * (longest + 2) + 4 * longest + 24 for length in columns]
    spans = list(_spans(query_costs, chunk_bytes - target_bytes(longest)))
    with tqdm(
        total=len(spans) * len(rows), desc=bar, unit="video", disable=not bar, leave=False
    ) as progress:
        for q in spans:
            cells = cell * sum(columns[q])
            results = len(columns[q])  # several blocks (Q, n) live while the last is summed
            target_costs = []
            for length in rows:
                block = (4 * length + 24) * results
                target_costs.append(cells * (length + 2) + block + target_bytes(length))
            for t in _spans(target_costs, chunk_bytes):
                yield q, t
                progress.update(t.stop - t.start)


def _spans(costs, budget):
    """Slices of consecutive items whose costs sum to at most `budget`, or of a single item."""
    start, total = 0, 0
    for i, cost in enumerate(costs):
        if i > start and total + cost > budget:
            yield slice(start, i)
            start, total = i, 0
        total += cost
    if costs:
        yield slice(start, len(costs))
