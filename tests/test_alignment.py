"""Matching stretches: planted copies are found where they were planted, noise is not, and the paths are the heaviest."""

import networkx
import numpy as np
import pytest
import torch

from retrieval.alignment import Segment, align, dp, longest_paths, tn

D = 256


def frames(draw, T):
    x = draw.normal(size=(T, D))
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def played(source, speed):
    """source (T, D) at another speed: frame k shows what the source shows at k * speed (linearly between its frames)."""
    at = np.arange(0, len(source) - 1 + 1e-9, speed)
    low = np.minimum(at.astype(int), len(source) - 2)
    x = source[low] + (at - low)[:, None] * (source[low + 1] - source[low])
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def scene(draw, T, change=0.35):
    """Frames that change gradually, as film does: neighbours are alike (about .65), far ones are not."""
    x = [draw.normal(size=D)]
    for _ in range(T - 1):
        x.append((1 - change) * x[-1] + np.sqrt(1 - (1 - change) ** 2) * draw.normal(size=D))
    x = np.array(x)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def noisy(draw, x, share=0.5):
    """Each frame with noise of `share` its length: cosine with the original about 1 / sqrt(1 + share^2)."""
    x = x + share * frames(draw, len(x))
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def place(found):
    return [(s.query_start, s.query_end, s.target_start, s.target_end) for s in found]


def near(found, planted, within):
    assert len(found) == len(planted)
    for stretch, expected in zip(sorted(place(found)), sorted(planted), strict=True):
        assert np.abs(np.subtract(stretch, expected)).max() <= within, (stretch, expected)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("speed", [0.5, 0.75, 1, 1.5, 2])
def test_an_excerpt_at_any_speed_is_found_where_it_is(speed, seed):
    draw = np.random.default_rng(seed)
    query = scene(draw, 100)
    copy = noisy(draw, played(query[30:71], speed))
    target = np.concatenate([scene(draw, 25), copy, scene(draw, 40)])
    near(align(query @ target.T), [(30, 71, 25, 25 + len(copy))], within=3)


def test_unlike_frames_at_speed_1_are_found_to_the_frame():
    draw = np.random.default_rng(0)
    query, target = frames(draw, 50), frames(draw, 80)
    target[33:53] = query[10:30]
    (stretch,) = align(query @ target.T)
    assert place([stretch]) == [(10, 30, 33, 53)]
    assert stretch.similarity == pytest.approx(1) and stretch.score == pytest.approx(
        20 * 0.6, rel=1e-5
    )


def test_two_stretches_are_found_best_first_also_out_of_order():
    draw = np.random.default_rng(1)
    query, target = frames(draw, 90), frames(draw, 100)
    target[70:95], target[5:15] = query[10:35], query[60:70]
    found = align(query @ target.T)
    assert place(found) == [(10, 35, 70, 95), (60, 70, 5, 15)]
    assert found[0].score > found[1].score
    assert place(align(query @ target.T, limit=1)) == [(10, 35, 70, 95)]


def test_what_recurs_in_the_target_is_found_twice():
    draw = np.random.default_rng(2)
    query, target = frames(draw, 40), frames(draw, 100)
    target[10:30] = target[60:80] = query[5:25]
    assert sorted(place(align(query @ target.T))) == [(5, 25, 10, 30), (5, 25, 60, 80)]


def test_a_gap_of_a_few_frames_is_bridged_and_a_long_one_parts():
    draw = np.random.default_rng(3)
    query = frames(draw, 40)
    target = query.copy()
    target[15:18] = frames(draw, 3)
    assert place(align(query @ target.T)) == [(0, 40, 0, 40)]
    target[15:25] = frames(draw, 10)
    assert sorted(place(align(query @ target.T))) == [(0, 15, 0, 15), (25, 40, 25, 40)]


@pytest.mark.parametrize("lengths", [(30, 30), (60, 30), (30, 60)])
def test_a_static_scene_is_one_stretch_inside_a_copy(lengths):
    """Every frame of the scene matches every other; the path goes through it along the diagonal all the same."""
    draw = np.random.default_rng(4)
    before, still, after = frames(draw, 12), np.repeat(frames(draw, 1), 20, 0), frames(draw, 12)
    copy = np.concatenate([before, still, after])
    query, target = (np.concatenate([frames(draw, n), copy, frames(draw, 9)]) for n in lengths)
    a, b = lengths
    assert place(align(query @ target.T)) == [(a, a + 44, b, b + 44)]


@pytest.mark.parametrize("seed", range(20))
def test_videos_that_share_nothing_give_nothing(seed):
    draw = np.random.default_rng(seed)
    assert align(scene(draw, 120) @ scene(draw, 90).T) == []
    assert align(frames(draw, 120) @ frames(draw, 90).T) == []


def test_a_still_against_film_or_a_run_too_fast_is_no_stretch():
    matrix = np.zeros((30, 30))
    matrix[7] = 1
    assert align(matrix) == []
    matrix = np.zeros((10, 40))
    matrix[np.arange(10), 4 * np.arange(10)] = 1
    assert align(matrix) == [] and len(align(matrix, max_speed=4)) == 1


def test_videos_of_one_frame():
    assert place(align([[0.9]], min_score=0.2)) == [(0, 1, 0, 1)]
    assert align([[0.5]]) == [] and align([[0.3]], min_score=0) == []
    assert place(align([[0.1, 0.95, 0.2]], min_score=0.3)) == [(0, 1, 1, 2)]
    assert place(align([[0.1], [0.95], [0.2]], min_score=0.3)) == [(1, 2, 0, 1)]


def test_each_threshold_does_what_it_says():
    draw = np.random.default_rng(5)
    query, target = frames(draw, 40), frames(draw, 40)
    target[10:16] = noisy(draw, query[20:26], 0.6)
    matrix = query @ target.T
    (stretch,) = align(matrix)
    assert place([stretch]) == [(20, 26, 10, 16)]
    assert stretch.similarity == pytest.approx(np.diag(matrix[20:26, 10:16]).mean(), rel=1e-5)
    assert align(matrix, min_similarity=0.99) == []
    assert align(matrix, min_length=7) == [] and align(matrix, min_length=6) == [stretch]
    assert align(matrix, min_score=stretch.score + 1e-4) == [] and align(
        matrix, min_score=stretch.score - 1e-4
    ) == [stretch]


def test_no_two_stretches_overlap_in_both_videos():
    draw = np.random.default_rng(6)
    found = align(
        draw.uniform(0, 1, (60, 60)), min_similarity=0.9, min_score=0.05, min_length=1, limit=50
    )
    assert len(found) > 10 and all(isinstance(stretch, Segment) for stretch in found)
    covered = np.zeros((60, 60), int)
    for _, _, q0, q1, t0, t1 in found:
        covered[q0:q1, t0:t1] += 1
    assert covered.max() == 1
    assert [s.score for s in found] == sorted((s.score for s in found), reverse=True)


def heaviest(weights, step, gap):
    """Every edge of the graph, by networkx."""
    graph = networkx.DiGraph()
    nodes = [tuple(map(int, node)) for node in np.argwhere(weights > -np.inf)]
    for i, j in nodes:
        graph.add_edge("start", (i, j), weight=weights[i, j])
        for a, b in nodes:
            if 0 < i - a <= step and 0 < j - b <= step:
                cost = gap * (max(i - a - 2, 0) + max(j - b - 2, 0))
                graph.add_edge((a, b), (i, j), weight=weights[i, j] - cost)
    path = networkx.dag_longest_path(graph)
    return networkx.dag_longest_path_length(graph), path[1:]


@pytest.mark.parametrize("gap", [0, 0.1, 0.7])
@pytest.mark.parametrize("step", [1, 2, 4, 10])
def test_paths_and_stretches_are_the_heaviest_of_the_graph(step, gap):
    for seed in range(6):
        draw = np.random.default_rng(seed)
        matrix = draw.uniform(0, 1, draw.integers(1, 15, 2)).astype(np.float32)
        matrix[0, 0] = 0.9  # a node, whatever else there is
        weights = np.where(matrix >= 0.5, matrix - np.float32(0.5), -np.inf)
        score, path = heaviest(weights, step, gap)
        L = torch.stack(list(longest_paths(torch.from_numpy(weights), step, gap)))
        assert float(L.max()) == pytest.approx(score, abs=1e-5)
        best = align(
            matrix,
            min_similarity=0.5,
            min_score=0,
            min_length=1,
            step=step,
            gap=gap,
            max_speed=99,
            limit=1,
        )[0]
        assert best.score == pytest.approx(score, abs=1e-5)
        (q0, t0), (q1, t1) = path[0], path[-1]
        assert place([best]) == [(q0, q1 + 1, t0, t1 + 1)]
        assert best.similarity == pytest.approx(np.mean([matrix[node] for node in path]), rel=1e-5)


def test_dp_worked_by_hand():
    """2 x 2: the diagonal gives .9 + .8; two steps round the corner would give .9 + .1 / 2 + .8 / 2."""
    matrix = torch.tensor([[0.9, 0.1], [0.2, 0.8]])
    assert dp(matrix, [2]).tolist() == pytest.approx([1.7 / 2])
    assert dp(matrix, [1, 1]).tolist() == pytest.approx(
        [0.9 / 2, 0.8 / 2]
    )  # a first column starts anew in each cell
    still = torch.full(
        (4, 2), 0.5
    )  # from a start in the corner: down the diagonal once, then two steps down
    assert dp(still, [2]).tolist() == pytest.approx([(0.5 + 0.5 + 2 * 0.5 / 2) / 4])
    assert dp(still, [2], phi=1).tolist() == pytest.approx([(0.5 + 0.5 + 0.5 / 2) / 4])


def test_tn_worked_by_hand():
    """Steps go forwards in both videos: (0, 0), (1, 2), (2, 3); (1, 1) is below the threshold."""
    matrix = torch.tensor([[0.9, 0.0, 0.0, 0.0], [0.0, 0.1, 0.7, 0.0], [0.0, 0.0, 0.0, 0.5]])
    assert tn(matrix, [4]).tolist() == pytest.approx([2.1 / 3])
    assert tn(matrix, [4], step=1).tolist() == pytest.approx([1.2 / 3])
    assert tn(matrix, [4], min_similarity=0.6).tolist() == pytest.approx([1.6 / 3])
    assert tn(matrix, [2, 2]).tolist() == pytest.approx(
        [0.9 / 3, 1.2 / 3]
    )  # no path runs on into the next video


def test_the_same_frames_backwards_are_no_copy_to_tn_and_dp():
    """The same frames backwards: chamfer would call it a copy."""
    x = frames(np.random.default_rng(7), 20)
    matrix = torch.from_numpy(x @ x[::-1].T).float()
    assert float(tn(matrix, [20])) < 0.2 and float(dp(matrix, [20])) < 0.6
