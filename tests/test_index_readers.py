"""Readers of an index live through a writer's changes: in any thread, in any process."""

import multiprocessing
import pickle
import subprocess
import threading

import numpy as np
import pytest
from helpers.commands import python, start
from helpers.library import add_made_up, made_up_video

from utils import InputError
from videoindex.index import VideoIndex
from videoindex.pipeline import EncodedVideo
from videoindex.store import IndexStore

SIZE = 16
COUNT = 8

# Another process: removes the videos of these numbers and compacts.
REMOVE = """
import sys
from videoindex.store import IndexStore

store = IndexStore(sys.argv[1])
with store.writing():
    store.remove(f"/v{number}" for number in sys.argv[2:])
    store.compact()
"""
# Another process: adds and removes a video and compacts, until its input ends.
CHURN = """
import os, select, sys
sys.path.insert(0, "tests")
import numpy as np
from helpers.library import add_made_up, made_up_video
from videoindex.store import IndexStore

store, number = IndexStore(sys.argv[1]), 1000
while not select.select([sys.stdin], [], [], 0)[0]:
    with store.writing():
        number += 1
        add_made_up(store, number, made_up_video(np.random.default_rng(number), 2, 16))
        store.remove([f"/v{number}"])
        store.compact()
print(store.settings["generation"])
"""


def video_of(number):
    """Videos that all share their film, each with noise of its own, so that every one matches."""
    video = made_up_video(np.random.default_rng(0), number % 3 + 1, SIZE, num_frames=5)
    film = made_up_video(np.random.default_rng(0), 1, SIZE, num_frames=5).frame_descriptors
    noise = np.random.default_rng(number).normal(scale=0.1, size=film.shape)
    frames = film.astype(float) + noise
    frames /= np.linalg.norm(frames, axis=1, keepdims=True)
    video.frame_descriptors = frames.astype(np.float16)
    return video


@pytest.fixture
def folder(tmp_path):
    """An index of COUNT videos."""
    store = IndexStore.create(tmp_path / "index", SIZE, {"identity": {"fps": "1"}})
    with store.writing():
        for number in range(1, COUNT + 1):
            add_made_up(store, number, video_of(number))
    return store.folder


def remove_elsewhere(folder, *numbers):
    result = python(REMOVE, folder, *numbers)
    assert result.returncode == 0, result.stderr


def clip_of(number):
    video = video_of(number)
    return EncodedVideo(
        f"clip {number}", "", video.seconds, video.frame_descriptors, video.window_descriptors
    )


def answers(index, number):
    """The numbers of the videos that a query ranks, the clip itself first."""
    matches = index.query(clip_of(number), top=100, threshold=-2)
    return [int(match.path.removeprefix("/v")) for match in matches]


def test_open_index_follows_a_compaction(folder):
    index = VideoIndex(folder)
    assert sorted(answers(index, 3)) == list(range(1, COUNT + 1))
    before = index.store.settings["generation"]
    remove_elsewhere(folder, 1, 4)
    assert sorted(answers(index, 3)) == [2, 3, 5, 6, 7, 8] and answers(index, 3)[0] == 3
    assert index.store.settings["generation"] == before + 1


def test_rows_read_before_a_compaction_give_their_data(folder):
    """What a reader holds says where the data lay; it has moved."""
    store = IndexStore(folder)
    contents = list(store.contents())
    remove_elsewhere(folder, 1, 2)
    for number in range(3, COUNT + 1):
        content, video = contents[number - 1], video_of(number)
        assert np.array_equal(store.frame_descriptors(content), video.frame_descriptors)
        assert np.array_equal(store.window_descriptors(content), video.window_descriptors)
        assert store.thumbnails(content, [0, 4]) == [b"jpeg 0", b"jpeg 4"]
        store.require_intact(content)
    for content in contents[:2]:
        with pytest.raises(InputError, match="another process has removed a video"):
            store.frame_descriptors(content)
        with pytest.raises(InputError, match="another process has removed a video"):
            store.require_intact(content)
    assert list(store.find_damage()) == []


def test_reading_all_contents_keeps_no_writer_waiting(folder):
    """`verify` may take minutes between two rows."""
    rows = IndexStore(folder).contents()
    first = next(rows)
    remove_elsewhere(folder, 7)
    assert [first.id, *(content.id for content in rows)] == [1, 2, 3, 4, 5, 6, 7, 8]


def test_queries_while_another_process_writes(folder):
    """From four threads; each sees the eight videos, and perhaps the one that comes and goes."""
    index = VideoIndex(folder)
    writer = start("-c", CHURN, folder, stdin=subprocess.PIPE)
    failures = []

    def ask():
        number = 0
        try:
            while index.store.settings["generation"] < 12 and writer.poll() is None:
                number = number % COUNT + 1
                found = answers(index, number)
                assert found[0] == number and set(found) >= set(range(1, COUNT + 1))
                assert len(index) >= COUNT and not list(index.store.find_damage())
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    output, errors = writer.communicate("end\n")
    assert not failures, failures
    assert writer.returncode == 0 and int(output) >= 12, errors


@pytest.fixture
def removed_before(folder, monkeypatch):
    """removed_before(method, *numbers): another process removes videos as the store's is called."""

    def prepare(name, *numbers):
        method, calls = getattr(IndexStore, name), []

        def late(store, *arguments):
            if not calls:
                calls.append(name)
                remove_elsewhere(folder, *numbers)
            return method(store, *arguments)

        monkeypatch.setattr(IndexStore, name, late)

    return prepare


@pytest.mark.parametrize("method", ["frame_descriptors", "require_intact", "paths"])
def test_query_leaves_out_what_another_process_removes_meanwhile(folder, removed_before, method):
    removed_before(method, 1, 4)
    assert sorted(answers(VideoIndex(folder), 1)) == [2, 3, 5, 6, 7, 8]


def test_store_says_that_a_video_is_gone(folder):
    store = IndexStore(folder)
    remove_elsewhere(folder, 3)
    for read in (store.require_content, store.require_paths):
        with pytest.raises(InputError, match="has removed a video meanwhile; repeat the command"):
            read(3)


def _numbers_of(index, queue):
    queue.put(answers(index, 5))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_index_in_another_process(folder, method):
    index = VideoIndex(folder)
    expected = answers(index, 5)
    context = multiprocessing.get_context(method)
    queue = context.SimpleQueue()
    process = context.Process(target=_numbers_of, args=(index, queue))
    process.start()
    found = queue.get()
    process.join()
    assert found == expected == answers(index, 5)


def test_index_can_be_pickled(folder):
    index = VideoIndex(folder)
    assert answers(pickle.loads(pickle.dumps(index)), 2) == answers(index, 2)
