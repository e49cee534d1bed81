"""What matching frames are worth: worked by hand, and against a search over all paths."""

import io
import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from retrieval.alignment import GAP, SKEW, STEP
from videoindex.evidence import find_stretches, first_stretches, shows_something, verdict


def diagonal(length, value=1.0, other=0.0):
    """Frame similarities of a video with itself, whose frames are all different."""
    return np.full((length, length), other, np.float32) + (value - other) * np.eye(
        length, dtype=np.float32
    )


def test_different_frames_count_each():
    (stretch,) = find_stretches(diagonal(10), min_similarity=0.15)
    assert stretch.evidence == pytest.approx(10 * 0.85)
    assert stretch.distinct == pytest.approx(10) and stretch.matched == 10
    assert stretch.segment[2:] == (0, 10, 0, 10)


def test_still_counts_as_one_frame():
    """A still, or a camera that never moves: every frame of one is like every one of the other."""
    (stretch,) = find_stretches(np.full((30, 30), 0.9, np.float32), min_similarity=0.15)
    assert stretch.matched == 30
    assert stretch.distinct == pytest.approx(1) and stretch.evidence == pytest.approx(0.75)


def test_novelty_is_by_the_square_of_the_likeness_to_earlier_frames():
    matrix = np.array([[0.8, 0.3], [0.2, 0.6]], np.float32)
    (stretch,) = find_stretches(matrix, min_similarity=0.5)
    # The second pair has .6; the first frames are .3 and .2 like it across the videos.
    novelty = 1 - (0.3 / 0.6) ** 2
    assert stretch.distinct == pytest.approx(1 + novelty)
    assert stretch.evidence == pytest.approx(0.3 + 0.1 * novelty)


def test_evidence_does_not_depend_on_the_lengths():
    """Five seconds in an hour of other film weigh what they weigh alone."""
    alone = find_stretches(diagonal(5, 0.9), 0.15)[0]
    matrix = np.full((20, 600), 0.05, np.float32)
    matrix[8:13, 300:305] = diagonal(5, 0.9, 0.05)
    (inside,) = find_stretches(matrix, 0.15)
    assert inside.segment[2:] == (8, 13, 300, 305)
    assert inside.evidence == pytest.approx(alone.evidence, rel=0.01)


def test_stretches_of_a_compilation_are_all_found():
    matrix = np.zeros((12, 60), np.float32)
    for start, at in ((0, 40), (4, 5), (8, 22)):
        matrix[start : start + 4, at : at + 4] = diagonal(4)
    found = find_stretches(matrix, 0.15, least=1.0, limit=10)
    assert {stretch.segment[2:] for stretch in found} == {
        (0, 4, 40, 44),
        (4, 8, 5, 9),
        (8, 12, 22, 26),
    }


def test_nothing_in_common():
    assert find_stretches(np.full((4, 6), 0.1, np.float32), 0.15) == []
    assert find_stretches(diagonal(1, 0.3), 0.15, least=0.2) == []


def heaviest_of_all_paths(matrix, least):
    """By trying every sequence of nodes."""
    nodes = [(i, j) for i, j in np.ndindex(matrix.shape) if matrix[i, j] >= least]
    best = 0.0
    for count in range(1, min(matrix.shape) + 1):
        for path in itertools.combinations(nodes, count):
            weight = sum(matrix[node] - least for node in path)
            for (i, j), (k, m) in itertools.pairwise(path):
                a, b = k - i, m - j
                if not (1 <= a <= STEP and 1 <= b <= STEP):
                    break
                weight -= GAP * (max(a - 2, 0) + max(b - 2, 0)) + SKEW * abs(a - b)
            else:
                best = max(best, weight)
    return best


def test_first_stretches_are_the_best_of_all_paths():
    """Of targets side by side, heaviest first; each as `find_stretches` finds it alone."""
    rng = np.random.default_rng(0)
    lengths = [3, 5, 1]
    for _ in range(20):
        targets = [rng.random((4, n)).astype(np.float32) for n in lengths]
        padded = [np.pad(target, ((0, 0), (0, STEP)), constant_values=-1) for target in targets]
        matrix = torch.from_numpy(np.concatenate(padded, 1))
        expected = [heaviest_of_all_paths(target, np.float32(0.6)) for target in targets]
        found = dict(first_stretches(matrix, lengths, 0.6, 1e-6))
        assert found.keys() == {k for k in range(3) if expected[k]}
        assert list(found) == sorted(found, key=lambda k: -expected[k])
        for k, stretch in found.items():
            if stretch is None:  # too fast a path
                continue
            assert stretch.segment.score == pytest.approx(expected[k], abs=1e-5)
            assert stretch.evidence <= expected[k] + 1e-5
            (alone,) = find_stretches(targets[k], 0.6)
            assert alone.segment[2:] == stretch.segment[2:]
            assert alone.evidence == pytest.approx(stretch.evidence, abs=1e-5)
        assert not dict(first_stretches(matrix, lengths, 0.6, 99.0))


def jpeg(image):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=70)
    return file.getvalue()


def test_plain_frames_show_nothing():
    rng = np.random.default_rng(1)
    height, width = 90, 160
    picture = np.kron(rng.integers(0, 255, (9, 16, 3)), np.ones((10, 10, 1))).astype(np.uint8)
    faint = (128 + rng.normal(0, 1, (height, width, 3))).astype(np.uint8)
    plain = [np.full((height, width, 3), value, np.uint8) for value in (0, 128, 255)]
    jpegs = [jpeg(image) for image in (*plain, faint, picture, picture // 4)]
    sizes = [len(data) for data in jpegs]
    assert shows_something(sizes, jpegs[0]).tolist() == [False] * 4 + [True] * 2
    assert shows_something(sizes, b"no picture").all()


CALIBRATION = {"certain": 1.0, "likely": 0.5}


@pytest.mark.parametrize(
    "evidence, distinct, matched, word",
    [
        (3.0, 5.0, 6, "certain"),
        (3.0, 1.9, 6, "likely"),  # less than two seconds are different
        (0.7, 3.0, 6, "likely"),
        (0.4, 3.0, 6, "look yourself"),
        (0.8, 1.0, 20, "same place"),  # 20 s in which nothing changes
        (0.8, 1.0, 1, "look yourself"),  # a single frame
    ],
)
def test_verdict(evidence, distinct, matched, word):
    assert verdict(CALIBRATION, evidence, distinct, matched) == word
    assert verdict({}, evidence, distinct, matched) == ""
