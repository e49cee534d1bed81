"""IndexStore: writes that fail, damage, files that are not an index; with made-up descriptors."""

import numpy as np
import pytest
from helpers.library import add_made_up, made_up_video

from utils import InputError
from videoindex.store import FileEntry, IndexStore

SIZE = 16


@pytest.fixture
def store(tmp_path):
    """A store of five videos, with 1 to 5 windows."""
    rng = np.random.default_rng(3)
    store = IndexStore.create(tmp_path / "index", SIZE, {"identity": {"fps": "1"}})
    with store.writing():
        for number in range(1, 6):
            add_made_up(store, number, made_up_video(rng, number, SIZE, num_frames=2 + number))
    return store


def data_of(store):
    return {content.id: store.stored_bytes(content) for content in store.contents()}


def sizes(store):
    paths = [store.data_path(kind) for kind in ("frames", "videos", "thumbnails")]
    return [path.stat().st_size for path in paths]


def test_store_gives_back_what_was_added(store):
    rng = np.random.default_rng(3)
    for number, content in enumerate(store.contents(), 1):
        video = made_up_video(rng, number, SIZE, num_frames=2 + number)
        assert np.array_equal(store.frame_descriptors(content), video.frame_descriptors)
        assert np.array_equal(store.window_descriptors(content), video.window_descriptors)
        assert store.thumbnails(content, range(2 + number)) == video.thumbnails
        assert store.thumbnails(content, [1]) == [b"jpeg 1"]
        assert content.seconds == video.seconds and store.paths(content.id) == [f"/v{number}"]
    owners = [number for number in range(1, 6) for _ in range(number)]
    assert store.window_table().owners.tolist() == owners


@pytest.mark.parametrize("step", ["_append_data", "_write_settings", "_set_content"])
def test_store_failed_write_takes_nothing_back(store, step, monkeypatch):
    before, sizes_before = data_of(store), sizes(store)

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    video = made_up_video(np.random.default_rng(9), 2, SIZE)
    with monkeypatch.context() as patch:
        patch.setattr(store, step, fail)
        with store.writing(), pytest.raises(InputError, match="No space left"):
            store.add_content("0" * 64, video, [FileEntry("/x.mp4", 1, 1)])
    assert data_of(store) == before and not list(store.find_damage())
    assert sizes(store) == sizes_before
    frames, windows, _ = store.settings["ends"]
    assert sizes_before[:2] == [frames * SIZE * 2, windows * SIZE * 4]


@pytest.mark.parametrize("step", ["_append_data", "_write_settings"])
def test_store_failed_compaction_takes_nothing_back(store, step, monkeypatch):
    with store.writing():
        store.remove(["/v1", "/v4"])
    before, files_before = data_of(store), sorted(store.folder.iterdir())

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(store, step, fail)
        with store.writing(), pytest.raises(InputError, match="No space left"):
            store.compact()
    assert data_of(store) == before and not list(store.find_damage())
    assert sorted(store.folder.iterdir()) == files_before
    with store.writing():
        store.compact()
    assert data_of(store) == before and not list(store.find_damage())
    assert store.hole_share() == 0


@pytest.mark.parametrize("kind", ["frames", "videos", "thumbnails"])
def test_store_names_the_damaged_video(store, kind):
    assert not list(store.find_damage())
    content = store.content(3)
    offsets = {
        "frames": content.first_frame * SIZE * 2 + 5,
        "videos": content.first_window * SIZE * 4 + 5,
        "thumbnails": content.first_byte + 5,
    }
    data = bytearray(store.data_path(kind).read_bytes())
    data[offsets[kind]] ^= 1
    store.data_path(kind).write_bytes(data)
    (line,) = store.find_damage()
    assert line.startswith("'/v3': its data is damaged")


def test_lost_frames_are_reported_when_they_are_read(store):
    """Blocks that a file system lost read as zeros."""
    content = store.content(1)
    data = bytearray(store.data_path("frames").read_bytes())
    size = store.frame_descriptors(content).nbytes
    start = content.first_frame * size // content.num_frames
    data[start : start + size] = bytes(size)
    store.data_path("frames").write_bytes(data)
    with pytest.raises(InputError, match="its data is damaged; remove it and index it again"):
        IndexStore(store.folder).frame_descriptors(content)


def test_store_reports_a_file_cut_short(store):
    path = store.data_path("frames")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match=f"{path.name} is missing or cut short"):
        store.frame_descriptors(store.content(1))


def test_store_refuses_what_is_not_an_index(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        IndexStore(tmp_path / "none")
    with pytest.raises(InputError, match="no index.db"):
        IndexStore(tmp_path)
    (tmp_path / "index.db").write_bytes(b"SQLite it is not" * 100)
    with pytest.raises(InputError, match="not a database"):
        IndexStore(tmp_path)


def test_store_refuses_another_version(store):
    with store.writing():
        store.update_settings(version=99)
    with pytest.raises(InputError, match="version 99 of the format"):
        IndexStore(store.folder)
