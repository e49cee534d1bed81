"""Every metric's table against a NumPy loop over pairs, for any cut into chunks."""

import subprocess
import sys

import networkx
import numpy as np
import pytest
import torch
from helpers.commands import ROOT

from retrieval import similarity as module
from retrieval.comparator import VideoComparator
from retrieval.similarity import (
    FRAME_METRICS,
    METRICS,
    VIDEO_METRICS,
    pack_descriptors,
    similarity_tables,
)
from utils import InputError

D = 16
torch.manual_seed(0)
NETWORK = VideoComparator()
with torch.no_grad():
    NETWORK.fconv.weight.mul_(60)  # results inside the clamp and beyond it


def similarity_table(queries, targets, metric, **options):
    return module.similarity_table(queries, targets, metric, comparator=NETWORK, **options)


def similarity(query, target, metric):
    return module.similarity(query, target, metric, comparator=NETWORK)


def unit(rng, *shape):
    x = rng.normal(size=shape)
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def videos(seed, lengths):
    rng = np.random.default_rng(seed)
    return [unit(rng, T, D) for T in lengths]


def descriptors(seed, n):
    return list(unit(np.random.default_rng(seed), n, D))


def chamfer(q, t):
    return np.mean([max(float(a @ b) for b in t) for a in q])


def half_chamfer(q, t):
    best = sorted((max(float(a @ b) for b in t) for a in q), reverse=True)
    return np.mean(best[: -(-len(best) // 2)])


def dp(q, t, phi=10):
    """Cell by cell, as the recurrence is written; the similarities have no ties."""
    S = [[float(a.astype(float) @ b) for b in t] for a in q]
    cells, best = {}, -np.inf
    for i in range(len(q)):
        for j in range(len(t)):
            s = S[i][j]
            score, mismatches, weight = s, 0, 1
            if i and j:
                score0, mismatches0, weight0 = cells[i - 1, j - 1]
                steps = [(score0 + s, mismatches0, weight0 + 1)]
                for score1, mismatches1, weight1 in (cells[i - 1, j], cells[i, j - 1]):
                    steps.append((score1 + s / 2, mismatches1 + 1, weight1 + 0.5))
                best_step = max(steps, key=lambda step: step[0])
                if best_step[1] <= phi:
                    score, mismatches, weight = best_step
            cells[i, j] = score, mismatches, weight
            best = max(best, score / max(len(q), weight))
    return best


def tn(q, t, top=5, least=0.2, step=10):
    """The graph as the paper draws it, solved by networkx."""
    S = np.array([[float(a.astype(float) @ b) for b in t] for a in q])
    nodes = [(i, j) for i in range(len(q)) for j in np.argsort(-S[i])[:top] if S[i, j] >= least]
    graph = networkx.DiGraph()
    graph.add_node("start")
    for i, j in nodes:
        graph.add_edge("start", (i, j), weight=S[i, j])
        for a, b in nodes:
            if 0 < i - a <= step and 0 < j - b <= step:
                graph.add_edge((a, b), (i, j), weight=S[i, j])
    return networkx.dag_longest_path_length(graph) / len(q)


def convolve(x, layer):
    """x (C, H, W) by a convolution layer, its edges repeated, as sums over windows."""
    weight, bias = (part.detach().numpy().astype(float) for part in (layer.weight, layer.bias))
    edge = weight.shape[-1] // 2
    x = np.pad(x, ((0, 0), (edge, edge), (edge, edge)), mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(x, weight.shape[2:], axis=(1, 2))
    return np.einsum("chwij,ocij->ohw", windows, weight, optimize=True) + bias[:, None, None]


def halve(x):
    """Maxima of 2 x 2 blocks; an odd last row or column is dropped."""
    H, W = x.shape[1] // 2, x.shape[2] // 2
    return x[:, : 2 * H, : 2 * W].reshape(-1, H, 2, W, 2).max((2, 4))


def comparator_output(x):
    """x (Tq, Tt) -> (Tq // 4, Tt // 4) by NumPy alone."""
    x = np.pad(x, [(0, max(4 - n, 0)) for n in x.shape], mode="edge")[None]
    x = halve(np.maximum(convolve(x, NETWORK.conv1), 0))
    x = halve(np.maximum(convolve(x, NETWORK.conv2), 0))
    return convolve(np.maximum(convolve(x, NETWORK.conv3), 0), NETWORK.fconv)[0]


def comparator(q, t):
    return np.clip(comparator_output(q.astype(float) @ t.astype(float).T), -1, 1).max(1).mean()


BY_LOOP = {
    "dp": dp,
    "tn": tn,
    "comparator": comparator,
    "cosine": lambda q, t: sum(float(a) * float(b) for a, b in zip(q, t, strict=True)),
    "euclidean": lambda q, t: 1 - np.sqrt(((q.astype(float) - t) ** 2).sum()) / 2,
    "chamfer": chamfer,
    "sym_chamfer": lambda q, t: (chamfer(q, t) + chamfer(t, q)) / 2,
    "half_chamfer": half_chamfer,
}

SIDES = {
    "ragged": ([3, 1, 8, 5], [1, 9, 2, 2, 30, 4, 1]),
    "one query": ([6], [2, 7, 1]),
    "one target": ([1, 6, 2], [5]),
    "one of each": ([1], [1]),
    "one frame each": ([1, 1], [1, 1, 1]),
    "queries longer than targets": ([40, 35], [1, 2, 3]),
}


def sides(metric, lengths):
    queries, targets = lengths
    if metric in VIDEO_METRICS:
        return descriptors(1, len(queries)), descriptors(2, len(targets))
    return videos(1, queries), videos(2, targets)


def by_loop(metric, queries, targets):
    return np.array([[BY_LOOP[metric](q, t) for t in targets] for q in queries])


def test_metrics_all_have_an_oracle():
    assert set(BY_LOOP) == set(METRICS)


@pytest.mark.parametrize("lengths", SIDES.values(), ids=SIDES)
@pytest.mark.parametrize("chunk_bytes", [1, 16, 100, 400, 2000, 256 << 20])
@pytest.mark.parametrize("metric", METRICS)
def test_table_equals_the_loop_over_pairs_for_any_chunk(metric, chunk_bytes, lengths):
    queries, targets = sides(metric, lengths)
    table = similarity_table(queries, targets, metric, chunk_bytes=chunk_bytes)
    assert table.shape == (len(queries), len(targets)) and table.dtype == np.float32
    np.testing.assert_allclose(table, by_loop(metric, queries, targets), atol=1e-5)


@pytest.mark.parametrize("metric", METRICS)
def test_table_equals_the_similarity_of_each_pair(metric):
    queries, targets = sides(metric, SIDES["ragged"])
    table = similarity_table(queries, targets, metric, chunk_bytes=200)
    single = [[similarity(q, t, metric) for t in targets] for q in queries]
    np.testing.assert_allclose(table, single, atol=1e-5)


@pytest.mark.parametrize("metric", METRICS)
def test_table_equals_the_loop_for_random_shapes_and_chunks(metric):
    rng = np.random.default_rng(0)
    for _ in range(25):
        lengths = [rng.integers(1, 12, rng.integers(1, 9)).tolist() for _ in range(2)]
        queries, targets = sides(metric, lengths)
        table = similarity_table(queries, targets, metric, chunk_bytes=int(rng.integers(1, 3000)))
        np.testing.assert_allclose(table, by_loop(metric, queries, targets), atol=1e-5)


def test_chamfer_worked_by_hand_is_not_symmetric():
    a, b, diagonal = np.array([1.0, 0.0]), np.array([0.0, 1.0]), np.array([0.6, 0.8])
    query, target = np.stack([a, b]), np.stack([a, diagonal])
    # The best match of a is a (1), that of b is the diagonal (.8).
    assert similarity(query, target, "chamfer") == pytest.approx(0.9)
    one = np.stack([a])
    assert similarity(one, target, "chamfer") == pytest.approx(1.0)
    assert similarity(target, one, "chamfer") == pytest.approx((1 + 0.6) / 2)
    assert similarity(one, target, "sym_chamfer") == pytest.approx((1.0 + 0.8) / 2)


@pytest.mark.parametrize("metric", ["sym_chamfer", "cosine", "euclidean"])
def test_symmetric_metrics_are_symmetric(metric):
    queries, targets = sides(metric, SIDES["ragged"])
    table = similarity_table(queries, targets, metric)
    back = similarity_table(targets, queries, metric)
    np.testing.assert_allclose(table, back.T, atol=1e-6)


NOT_REFLEXIVE = ("comparator",)  # a video and itself have no similarity of 1


@pytest.mark.parametrize("metric", [name for name in METRICS if name not in NOT_REFLEXIVE])
def test_similarity_of_a_video_with_itself_is_1_and_the_highest(metric):
    queries, _ = sides(metric, SIDES["ragged"])
    table = similarity_table(queries, queries, metric)
    np.testing.assert_allclose(np.diag(table), 1, atol=1e-5)
    assert table.max() <= 1 + 1e-5 and table.min() >= -1 - 1e-5


def test_euclidean_ranks_as_distance_does_down_to_near_duplicates():
    query = descriptors(0, 1)
    targets = descriptors(1, 40) + [
        query[0] + 1e-4 * i * d for i, d in enumerate(descriptors(2, 10))
    ]
    targets = [(t / np.linalg.norm(t)).astype(np.float32) for t in targets]
    distance = [np.linalg.norm(query[0].astype(float) - t) for t in targets]
    table = similarity_table(query, targets, "euclidean")[0]
    assert np.argsort(-table).tolist() == np.argsort(distance).tolist()


@pytest.mark.parametrize("metric", METRICS)
def test_float16_descriptors_are_compared_in_float32(metric):
    queries, targets = (
        [x.astype(np.float16) for x in side] for side in sides(metric, SIDES["ragged"])
    )
    expected = by_loop(
        metric, *([x.astype(np.float32) for x in side] for side in (queries, targets))
    )
    np.testing.assert_allclose(similarity_table(queries, targets, metric), expected, atol=1e-5)


@pytest.mark.parametrize("metric", METRICS)
def test_table_leaves_its_inputs_unchanged(metric):
    queries, targets = sides(metric, SIDES["ragged"])
    before = [x.copy() for x in (*queries, *targets)]
    similarity_table(queries, targets, metric)
    assert all(np.array_equal(x, y) for x, y in zip(before, (*queries, *targets), strict=True))


def test_unknown_metric_is_refused_with_the_known_ones():
    with pytest.raises(InputError, match="'dice'.*cosine.*sym_chamfer"):
        similarity_table(descriptors(0, 1), descriptors(1, 1), "dice")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("metric", METRICS)
def test_descriptors_not_finite_are_refused(metric, side, bad):
    """Also in a frame that is nobody's best match, where a maximum would hide it."""
    both = sides(metric, SIDES["ragged"])
    if metric in FRAME_METRICS:
        both[side][2][-1, 3] = bad
    else:
        both[side][2][3] = bad
    with pytest.raises(InputError, match="NaN"):
        similarity_table(*both, metric)


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("metric", FRAME_METRICS)
def test_minus_infinity_is_refused_though_it_matches_nothing(metric, side):
    both = [[np.abs(x) for x in side] for side in sides(metric, SIDES["ragged"])]
    both[side][2][-1, 3] = -np.inf
    with pytest.raises(InputError, match="infinity"):
        similarity_table(*both, metric)


def test_packed_descriptors_serve_all_metrics_and_many_batches():
    queries, targets = sides("chamfer", SIDES["ragged"])
    single = {metric: similarity_table(queries, targets, metric) for metric in FRAME_METRICS}
    packed = pack_descriptors(queries, "chamfer")
    batches = [targets[:3], pack_descriptors(targets[3:], "tn")]
    options = dict(comparator=NETWORK, chunk_bytes=3000)
    parts = [similarity_tables(packed, batch, list(FRAME_METRICS), **options) for batch in batches]
    for metric, table in single.items():
        joined = np.concatenate([part[metric] for part in parts], 1)
        np.testing.assert_allclose(joined, table, atol=1e-5)


@pytest.mark.parametrize("metric", METRICS)
def test_table_without_targets_is_empty(metric):
    queries, _ = sides(metric, SIDES["ragged"])
    assert similarity_table(queries, [], metric).shape == (len(queries), 0)


@pytest.mark.parametrize("metric", FRAME_METRICS)
def test_bfloat16_products_stay_close(metric):
    """8 bits: a similarity below 1 is off by at most 2**-9, and so are the descriptors' values."""
    queries, targets = sides(metric, SIDES["ragged"])
    rounded = similarity_table(queries, targets, metric, dtype=torch.bfloat16)
    exact = similarity_table(queries, targets, metric, dtype=torch.float32)
    assert not np.array_equal(rounded, exact)
    if metric != "tn":  # a node may fall below its threshold
        np.testing.assert_allclose(rounded, exact, atol=0.01)


def test_bfloat16_is_exact_for_values_it_represents():
    rng = np.random.default_rng(0)
    queries, targets = (
        [rng.choice([-0.25, 0.25], (T, D)).astype(np.float32) for T in (3, 9, 1)] for _ in range(2)
    )
    for metric in ("chamfer", "sym_chamfer", "dp"):
        table = similarity_table(queries, targets, metric, dtype=torch.bfloat16)
        np.testing.assert_allclose(table, similarity_table(queries, targets, metric), atol=1e-6)


def test_comparator_without_weights_is_refused():
    queries, targets = sides("comparator", SIDES["ragged"])
    with pytest.raises(InputError, match="^comparator needs weights: give --comparator FILE$"):
        module.similarity_table(queries, targets, "comparator")


def test_descriptors_that_do_not_fit_are_refused():
    frames, video = sides("chamfer", SIDES["ragged"])[0], descriptors(1, 2)
    for queries, targets, metric, message in (
        (frames, video, "chamfer", r"\(T, D\) descriptors; these are \(16,\)"),
        (video, frames, "cosine", r"\(D,\) descriptors"),
        (frames, [x[:, :8] for x in frames], "chamfer", "16 and 8 values"),
        ([frames[0], frames[1][:, :8]], frames, "tn", "8 and 16 values"),
        (frames, [frames[0][:0]], "chamfer", r"these are \(0, 16\)"),
    ):
        with pytest.raises(InputError, match=message):
            similarity_table(queries, targets, metric)
    with pytest.raises(InputError, match="one level"):
        similarity_tables(frames, frames, ["chamfer", "cosine"])


# Prints how many bytes the peak of resident memory grows by.
PEAK = """
import resource, sys
import numpy as np, torch
torch.set_num_threads(1)
from retrieval.comparator import VideoComparator
from retrieval.similarity import pack_descriptors, similarity_tables
metrics, length, videos, bound = sys.argv[1].split(","), *map(int, sys.argv[2:])
network = VideoComparator(tile_bytes=1 << 20)
x = np.full((length, 256), 1 / 16, np.float32)
queries, targets = pack_descriptors([x] * (4000 // length), "chamfer"), [x] * videos
similarity_tables(queries, targets[:1], metrics, comparator=network, chunk_bytes=1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
similarity_tables(queries, targets, metrics, comparator=network, chunk_bytes=bound)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "metrics, length, videos",
    [("chamfer,sym_chamfer", 50, 300), ("sym_chamfer", 1, 3000), ("tn", 40, 60)],
)
def test_chunk_takes_no_more_memory_than_its_bound(metrics, length, videos):
    """Peak resident memory beyond what the process holds before.

    Uncut, the matrices of these cases take 1.5 to 7 times the bound.
    """
    bound, overhead = 32 << 20, 4 << 20  # of the allocator
    command = [sys.executable, "-c", PEAK, metrics, str(length), str(videos), str(bound)]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    tables = len(metrics.split(",")) * 4 * (4000 // length) * videos
    assert int(result.stdout) < bound + tables + overhead
