"""Alignment: planted copies are found where they are, noise is not, and paths are the heaviest."""

import networkx
import numpy as np
import pytest
import torch

from retrieval.alignment import Segment, align, dp, longest_paths, tn

D = 256


def frames(rng, T):
    x = rng.normal(size=(T, D))
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def played(source, speed):
    """source (T, D) at another speed: frame k is the source at k * speed, linearly interpolated."""
    at = np.arange(0, len(source) - 1 + 1e-9, speed)
    low = np.minimum(at.astype(int), len(source) - 2)
    x = source[low] + (at - low)[:, None] * (source[low + 1] - source[low])
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def scene(rng, T, change=0.35):
    """Frames that change gradually, as film does: neighbours have a cosine of about .65."""
    x = [rng.normal(size=D)]
    for _ in range(T - 1):
        x.append((1 - change) * x[-1] + np.sqrt(1 - (1 - change) ** 2) * rng.normal(size=D))
    x = np.array(x)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def noisy(rng, x, share=0.5):
    """x plus noise of `share` its length: the cosine with x is about 1 / sqrt(1 + share^2)."""
    x = x + share * frames(rng, len(x))
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def spans(segments):
    """(query_start, query_end, target_start, target_end) of each segment."""
    return [segment[2:] for segment in segments]


def assert_near(segments, planted, frames):
    """Each segment has the ends of a planted one, give or take `frames`."""
    assert len(segments) == len(planted)
    for span, expected in zip(sorted(spans(segments)), sorted(planted), strict=True):
        assert np.abs(np.subtract(span, expected)).max() <= frames, (span, expected)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("speed", [0.5, 0.75, 1, 1.5, 2])
def test_align_excerpt_at_any_speed(speed, seed):
    rng = np.random.default_rng(seed)
    query = scene(rng, 100)
    copy = noisy(rng, played(query[30:71], speed))
    target = np.concatenate([scene(rng, 25), copy, scene(rng, 40)])
    assert_near(align(query @ target.T), [(30, 71, 25, 25 + len(copy))], frames=3)


def test_align_unlike_frames_to_the_frame():
    rng = np.random.default_rng(0)
    query, target = frames(rng, 50), frames(rng, 80)
    target[33:53] = query[10:30]
    (segment,) = align(query @ target.T)
    assert spans([segment]) == [(10, 30, 33, 53)]
    assert segment.similarity == pytest.approx(1) and segment.score == pytest.approx(
        20 * 0.6, rel=1e-5
    )


def test_align_two_segments_best_first_and_out_of_order():
    rng = np.random.default_rng(1)
    query, target = frames(rng, 90), frames(rng, 100)
    target[70:95], target[5:15] = query[10:35], query[60:70]
    found = align(query @ target.T)
    assert spans(found) == [(10, 35, 70, 95), (60, 70, 5, 15)]
    assert found[0].score > found[1].score
    assert spans(align(query @ target.T, limit=1)) == [(10, 35, 70, 95)]


def test_align_repeated_segment():
    rng = np.random.default_rng(2)
    query, target = frames(rng, 40), frames(rng, 100)
    target[10:30] = target[60:80] = query[5:25]
    assert sorted(spans(align(query @ target.T))) == [(5, 25, 10, 30), (5, 25, 60, 80)]


def test_align_bridges_short_gaps_and_splits_at_long_ones():
    rng = np.random.default_rng(3)
    query = frames(rng, 40)
    target = query.copy()
    target[15:18] = frames(rng, 3)
    assert spans(align(query @ target.T)) == [(0, 40, 0, 40)]
    target[15:25] = frames(rng, 10)
    assert sorted(spans(align(query @ target.T))) == [(0, 15, 0, 15), (25, 40, 25, 40)]


@pytest.mark.parametrize("lengths", [(30, 30), (60, 30), (30, 60)])
def test_align_static_scene_inside_a_copy(lengths):
    """Every frame of the scene matches every other; the path still follows the diagonal."""
    rng = np.random.default_rng(4)
    before, still, after = frames(rng, 12), np.repeat(frames(rng, 1), 20, 0), frames(rng, 12)
    copy = np.concatenate([before, still, after])
    query, target = (np.concatenate([frames(rng, n), copy, frames(rng, 9)]) for n in lengths)
    a, b = lengths
    assert spans(align(query @ target.T)) == [(a, a + 44, b, b + 44)]


@pytest.mark.parametrize("seed", range(20))
def test_align_unrelated_videos_gives_nothing(seed):
    rng = np.random.default_rng(seed)
    assert align(scene(rng, 120) @ scene(rng, 90).T) == []
    assert align(frames(rng, 120) @ frames(rng, 90).T) == []


def test_align_refuses_a_still_and_too_fast_a_run():
    matrix = np.zeros((30, 30))
    matrix[7] = 1
    assert align(matrix) == []
    matrix = np.zeros((10, 40))
    matrix[np.arange(10), 4 * np.arange(10)] = 1
    assert align(matrix) == [] and len(align(matrix, max_speed=4)) == 1


def test_align_videos_of_one_frame():
    assert spans(align([[0.9]], min_score=0.2)) == [(0, 1, 0, 1)]
    assert align([[0.5]]) == [] and align([[0.3]], min_score=0) == []
    assert spans(align([[0.1, 0.95, 0.2]], min_score=0.3)) == [(0, 1, 1, 2)]
    assert spans(align([[0.1], [0.95], [0.2]], min_score=0.3)) == [(1, 2, 0, 1)]


def test_align_thresholds():
    rng = np.random.default_rng(5)
    query, target = frames(rng, 40), frames(rng, 40)
    target[10:16] = noisy(rng, query[20:26], 0.6)
    matrix = query @ target.T
    (segment,) = align(matrix)
    assert spans([segment]) == [(20, 26, 10, 16)]
    assert segment.similarity == pytest.approx(np.diag(matrix[20:26, 10:16]).mean(), rel=1e-5)
    assert align(matrix, min_similarity=0.99) == []
    assert align(matrix, min_length=7) == [] and align(matrix, min_length=6) == [segment]
    assert align(matrix, min_score=segment.score + 1e-4) == [] and align(
        matrix, min_score=segment.score - 1e-4
    ) == [segment]


def test_align_segments_do_not_overlap_in_both_videos():
    rng = np.random.default_rng(6)
    found = align(
        rng.uniform(0, 1, (60, 60)), min_similarity=0.9, min_score=0.05, min_length=1, limit=50
    )
    assert len(found) > 10 and all(isinstance(segment, Segment) for segment in found)
    covered = np.zeros((60, 60), int)
    for _, _, q0, q1, t0, t1 in found:
        covered[q0:q1, t0:t1] += 1
    assert covered.max() == 1
    assert [s.score for s in found] == sorted((s.score for s in found), reverse=True)


def heaviest(weights, step, gap, skew):
    """Every edge of the graph, by networkx."""
    graph = networkx.DiGraph()
    nodes = [tuple(map(int, node)) for node in np.argwhere(weights > -np.inf)]
    for i, j in nodes:
        graph.add_edge("start", (i, j), weight=weights[i, j])
        for a, b in nodes:
            if 0 < i - a <= step and 0 < j - b <= step:
                cost = gap * (max(i - a - 2, 0) + max(j - b - 2, 0))
                cost += skew * abs((i - a) - (j - b))
                graph.add_edge((a, b), (i, j), weight=weights[i, j] - cost)
    path = networkx.dag_longest_path(graph)
    return networkx.dag_longest_path_length(graph), path[1:]


@pytest.mark.parametrize("gap, skew", [(0, 0), (0.1, 0.03), (0.7, 0), (0, 0.2)])
@pytest.mark.parametrize("step", [1, 2, 4, 10])
def test_align_finds_the_heaviest_path_of_the_graph(step, gap, skew):
    for seed in range(6):
        rng = np.random.default_rng(seed)
        matrix = rng.uniform(0, 1, rng.integers(1, 15, 2)).astype(np.float32)
        matrix[0, 0] = 0.9  # a node, whatever else there is
        weights = np.where(matrix >= 0.5, matrix - np.float32(0.5), -np.inf)
        score, path = heaviest(weights, step, gap, skew)
        L = torch.stack(list(longest_paths(torch.from_numpy(weights), step, gap, skew)))
        assert float(L.max()) == pytest.approx(score, abs=1e-5)
        best = align(
            matrix,
            min_similarity=0.5,
            min_score=0,
            min_length=1,
            step=step,
            gap=gap,
            skew=skew,
            max_speed=99,
            limit=1,
        )[0]
        assert best.score == pytest.approx(score, abs=1e-5)
        (q0, t0), (q1, t1) = path[0], path[-1]
        assert spans([best]) == [(q0, q1 + 1, t0, t1 + 1)]
        assert best.similarity == pytest.approx(np.mean([matrix[node] for node in path]), rel=1e-5)


def test_dp_worked_by_hand():
    """2 x 2: the diagonal gives .9 + .8, two steps round the corner .9 + .1 / 2 + .8 / 2."""
    matrix = torch.tensor([[0.9, 0.1], [0.2, 0.8]])
    assert dp(matrix, [2]).tolist() == pytest.approx([1.7 / 2])
    # In a first column every cell starts a path.
    assert dp(matrix, [1, 1]).tolist() == pytest.approx([0.9 / 2, 0.8 / 2])
    # From the corner once down the diagonal, then two steps down.
    still = torch.full((4, 2), 0.5)
    assert dp(still, [2]).tolist() == pytest.approx([(0.5 + 0.5 + 2 * 0.5 / 2) / 4])
    assert dp(still, [2], phi=1).tolist() == pytest.approx([(0.5 + 0.5 + 0.5 / 2) / 4])


def test_tn_worked_by_hand():
    """Steps go forwards in both videos: (0, 0), (1, 2), (2, 3); (1, 1) is below the threshold."""
    matrix = torch.tensor([[0.9, 0.0, 0.0, 0.0], [0.0, 0.1, 0.7, 0.0], [0.0, 0.0, 0.0, 0.5]])
    assert tn(matrix, [4]).tolist() == pytest.approx([2.1 / 3])
    assert tn(matrix, [4], step=1).tolist() == pytest.approx([1.2 / 3])
    assert tn(matrix, [4], min_similarity=0.6).tolist() == pytest.approx([1.6 / 3])
    # No path continues into the next video.
    assert tn(matrix, [2, 2]).tolist() == pytest.approx([0.9 / 3, 1.2 / 3])


def test_dp_and_tn_refuse_a_copy_played_backwards():
    """Chamfer would call it a copy."""
    x = frames(np.random.default_rng(7), 20)
    matrix = torch.from_numpy(x @ x[::-1].T).float()
    assert float(tn(matrix, [20])) < 0.2 and float(dp(matrix, [20])) < 0.6
