"""NearestVideos: the same answers as a loop over all videos."""

import numpy as np
import pytest
from helpers.library import add_made_up, made_up_video

from videoindex.nearest import NearestVideos
from videoindex.store import IndexStore


@pytest.fixture(scope="module")
def videos():
    """60 made-up videos of one to four windows: {content: window descriptors (P, D)}."""
    rng, videos = np.random.default_rng(5), {}
    for number in range(1, 61):
        videos[number] = made_up_video(rng, rng.integers(1, 5))
    return videos


@pytest.fixture
def store(videos, tmp_path):
    """A store of the videos, from which every third was removed."""
    store = IndexStore.create(tmp_path / "index", 16, {"identity": {"fps": "1"}})
    with store.writing():
        for number, video in videos.items():
            add_made_up(store, number, video)
        store.remove([f"/v{number}" for number in range(1, 61, 3)])
    return store


@pytest.fixture
def windows(videos):
    """{content: window descriptors} of the videos that are left."""
    left = {}
    for number, video in videos.items():
        if (number - 1) % 3:
            left[number] = video.window_descriptors
    return left


def test_nearest_search_equals_a_loop(store, windows):
    """With holes in the index, and several windows of a video."""
    query = made_up_video(np.random.default_rng(6), 2).window_descriptors
    best = {number: float((query @ rows.T).max()) for number, rows in windows.items()}
    expected = sorted(best, key=lambda number: -best[number])[:25]
    nearest = NearestVideos(store)
    found = nearest.search(query, 25)
    assert [number for number, _ in found] == expected
    assert [value for _, value in found] == pytest.approx(
        [best[number] for number in expected], abs=1e-5
    )
    assert len(nearest.search(query, 1000)) == len(windows)


def near_pairs(nearest, numbers, radius=0.5):
    """{(content, one added before it)}, as grouping asks for them."""
    centres, pairs = nearest.centres(radius), set()
    for number in numbers:
        pairs |= {(number, other) for other in centres.near(number)}
        centres.add(number)
    return pairs


def pairs_by_loop(windows, numbers, radius=0.5):
    return {
        (a, b)
        for i, a in enumerate(numbers)
        for b in numbers[:i]
        if (windows[a] @ windows[b].T).max() >= radius
    }


def test_centres_near_a_content_are_those_of_a_loop(store, windows):
    """In any order of adding."""
    numbers = np.random.default_rng(8).permutation(list(windows)).tolist()
    expected = pairs_by_loop(windows, numbers)
    assert expected and near_pairs(NearestVideos(store), numbers) == expected
    few = numbers[:7]  # only what was added is found
    assert near_pairs(NearestVideos(store), few) == pairs_by_loop(windows, few)


def test_centres_without_a_range_search_in_faiss(store, windows):
    """HNSW has none: the nearest of each window are compared."""
    found = near_pairs(NearestVideos(store, "HNSW16"), list(windows))
    assert found == pairs_by_loop(windows, list(windows))
