"""Every metric's table against a one-by-one NumPy loop, whatever the cut."""

import numpy as np
import pytest

from similarity import FRAME_METRICS, METRICS, VIDEO_METRICS, similarity, similarity_table
from utils import InputError

D = 16


def unit(draw, *shape):
    x = draw.normal(size=shape)
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def videos(seed, lengths):
    draw = np.random.default_rng(seed)
    return [unit(draw, T, D) for T in lengths]


def descriptors(seed, n):
    return list(unit(np.random.default_rng(seed), n, D))


def chamfer(q, t):
    return np.mean([max(float(a @ b) for b in t) for a in q])


BY_LOOP = {
    "cosine": lambda q, t: sum(float(a) * float(b) for a, b in zip(q, t, strict=True)),
    "euclidean": lambda q, t: 1 - np.sqrt(((q.astype(float) - t) ** 2).sum()) / 2,
    "chamfer": chamfer,
    "sym_chamfer": lambda q, t: (chamfer(q, t) + chamfer(t, q)) / 2,
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


def test_every_metric_has_an_oracle():
    assert set(BY_LOOP) == set(METRICS)


@pytest.mark.parametrize("lengths", SIDES.values(), ids=SIDES)
@pytest.mark.parametrize("chunk_bytes", [1, 16, 100, 400, 2000, 256 << 20])
@pytest.mark.parametrize("metric", METRICS)
def test_a_table_equals_the_loop_over_pairs_whatever_the_chunk(metric, chunk_bytes, lengths):
    queries, targets = sides(metric, lengths)
    table = similarity_table(queries, targets, metric, chunk_bytes=chunk_bytes)
    assert table.shape == (len(queries), len(targets)) and table.dtype == np.float32
    np.testing.assert_allclose(table, by_loop(metric, queries, targets), atol=1e-5)


@pytest.mark.parametrize("metric", METRICS)
def test_a_table_equals_the_function_of_one_pair(metric):
    queries, targets = sides(metric, SIDES["ragged"])
    table = similarity_table(queries, targets, metric, chunk_bytes=200)
    single = [[similarity(q, t, metric) for t in targets] for q in queries]
    np.testing.assert_allclose(table, single, atol=1e-5)


@pytest.mark.parametrize("metric", METRICS)
def test_many_random_shapes_and_cuts_agree_with_the_loop(metric):
    draw = np.random.default_rng(0)
    for _ in range(25):
        lengths = [draw.integers(1, 12, draw.integers(1, 9)).tolist() for _ in range(2)]
        queries, targets = sides(metric, lengths)
        table = similarity_table(queries, targets, metric, chunk_bytes=int(draw.integers(1, 3000)))
        np.testing.assert_allclose(table, by_loop(metric, queries, targets), atol=1e-5)


def test_chamfer_is_what_a_case_worked_by_hand_gives_and_is_not_symmetric():
    a, b, diagonal = np.array([1.0, 0.0]), np.array([0.0, 1.0]), np.array([0.6, 0.8])
    query, target = np.stack([a, b]), np.stack([a, diagonal])
    # query -> target: a finds a (1), b finds the diagonal (.8): .9; back: a finds a (1), the diagonal finds b (.8)
    assert similarity(query, target, "chamfer") == pytest.approx(0.9)
    one = np.stack([a])
    assert similarity(one, target, "chamfer") == pytest.approx(1.0)
    assert similarity(target, one, "chamfer") == pytest.approx((1 + 0.6) / 2)
    assert similarity(one, target, "sym_chamfer") == pytest.approx((1.0 + 0.8) / 2)


@pytest.mark.parametrize("metric", ["sym_chamfer", "cosine", "euclidean"])
def test_symmetric_metrics_are_symmetric(metric):
    queries, targets = sides(metric, SIDES["ragged"])
    table, back = similarity_table(queries, targets, metric), similarity_table(targets, queries, metric)
    np.testing.assert_allclose(table, back.T, atol=1e-6)


@pytest.mark.parametrize("metric", METRICS)
def test_a_video_is_1_to_itself_and_nothing_is_more(metric):
    queries, _ = sides(metric, SIDES["ragged"])
    table = similarity_table(queries, queries, metric)
    np.testing.assert_allclose(np.diag(table), 1, atol=1e-5)
    assert table.max() <= 1 + 1e-5 and table.min() >= -1 - 1e-5


def test_euclidean_ranks_as_distance_does_down_to_near_duplicates():
    query = descriptors(0, 1)
    targets = descriptors(1, 40) + [query[0] + 1e-4 * i * d for i, d in enumerate(descriptors(2, 10))]
    targets = [(t / np.linalg.norm(t)).astype(np.float32) for t in targets]
    distance = [np.linalg.norm(query[0].astype(float) - t) for t in targets]
    table = similarity_table(query, targets, "euclidean")[0]
    assert np.argsort(-table).tolist() == np.argsort(distance).tolist()


@pytest.mark.parametrize("metric", METRICS)
def test_float16_descriptors_are_compared_in_float32(metric):
    queries, targets = ([x.astype(np.float16) for x in side] for side in sides(metric, SIDES["ragged"]))
    expected = by_loop(metric, [q.astype(np.float32) for q in queries], [t.astype(np.float32) for t in targets])
    np.testing.assert_allclose(similarity_table(queries, targets, metric), expected, atol=1e-5)


@pytest.mark.parametrize("metric", METRICS)
def test_the_inputs_stay_as_they_are(metric):
    queries, targets = sides(metric, SIDES["ragged"])
    before = [x.copy() for x in (*queries, *targets)]
    similarity_table(queries, targets, metric)
    assert all(np.array_equal(x, y) for x, y in zip(before, (*queries, *targets), strict=True))


def test_an_unknown_metric_is_refused_with_the_known_ones():
    with pytest.raises(InputError, match="'dice'.*cosine.*sym_chamfer"):
        similarity_table(descriptors(0, 1), descriptors(1, 1), "dice")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("metric", METRICS)
def test_a_descriptor_that_is_not_finite_is_refused(metric, side, bad):
    """Also where the odd frame is not the best match, which a maximum would hide."""
    both = sides(metric, SIDES["ragged"])
    if metric in FRAME_METRICS:
        both[side][2][-1, 3] = bad
    else:
        both[side][2][3] = bad
    with pytest.raises(InputError, match="NaN"):
        similarity_table(*both, metric)
