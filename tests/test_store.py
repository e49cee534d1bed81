"""Feature files: what is read is what was written, what is broken is named, kills lose nothing."""

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from helpers.feature_files import IDS, some_features, write_ours, write_packed, write_released
from helpers.systems import in_a_fork, small_disk, without_locks
from torch.utils.data import DataLoader

from features.store import FeatureStore, StoreWriter
from files import DiskError
from padding import pad
from utils import InputError

LAYOUTS = {"released": write_released, "packed": write_packed, "ours": write_ours}


# --- reading -------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_store_reads_what_was_written(layout, dtype, tmp_path):
    features = some_features(dtype=dtype)
    options = {"dtype": np.dtype(dtype).name} if layout == "ours" else {}
    store = FeatureStore(LAYOUTS[layout](tmp_path / "x.hdf5", features, **options))
    assert set(store) == set(features) == set(store.keys())
    assert len(store) == len(features) and store.feature_size == 8
    assert store.lengths == {video: len(rows) for video, rows in features.items()}
    for video, rows in features.items():
        assert video in store and store[video].dtype == dtype
        np.testing.assert_array_equal(store[video], rows)
    for name in ("a", "a/b", "frames"):  # groups and datasets of the file, not videos
        assert name not in store


def test_compressed_packed_file_reads_the_same(tmp_path):
    features = some_features()
    path = write_packed(tmp_path / "x.hdf5", features, chunks=True, compression="gzip")
    store = FeatureStore(path)
    for video, rows in features.items():
        np.testing.assert_array_equal(store[video], rows)


def test_meta_is_stored(tmp_path):
    meta = {"backbone": "lite0", "pca": 64}
    store = FeatureStore(write_ours(tmp_path / "x.hdf5", some_features(), **meta))
    assert store.meta == meta


def test_packed_rows_are_a_memory_map_without_a_copy(tmp_path):
    store = FeatureStore(write_ours(tmp_path / "x.hdf5", some_features()))
    for video in IDS:
        rows = owner = store[video]
        while isinstance(owner.base, np.ndarray):
            owner = owner.base
        assert isinstance(owner, np.memmap) and not rows.flags.owndata
    with pytest.raises(ValueError):
        store["plain"][0] = 0  # and it is read-only


class AllVideos(torch.utils.data.Dataset):
    """(process id, video, rows) of each video."""

    def __init__(self, store):
        self.store, self.videos = store, sorted(store)

    def __len__(self):
        return len(self.videos)

    def __getitem__(self, i):
        video = self.videos[i]
        return os.getpid(), video, torch.from_numpy(np.array(self.store[video]))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_forked_workers_read_the_same(layout, tmp_path):
    features = some_features([f"v{i}/x" for i in range(60)])
    store = FeatureStore(LAYOUTS[layout](tmp_path / "x.hdf5", features))
    store["v0/x"]  # the parent opens the file before it forks
    loader = DataLoader(
        AllVideos(store), batch_size=None, num_workers=2, multiprocessing_context="fork"
    )
    seen, workers = {}, set()
    for worker, video, rows in loader:
        seen[video] = rows.numpy()
        workers.add(worker)
        np.testing.assert_array_equal(store[video], features[video])  # the parent reads on
    assert os.getpid() not in workers and len(workers) == 2
    assert set(seen) == set(features)
    for video, rows in features.items():
        np.testing.assert_array_equal(seen[video], rows)


def test_pad_pads_stored_rows_without_warnings(tmp_path, recwarn):
    features = some_features(dtype=np.float32)
    store = FeatureStore(write_ours(tmp_path / "x.hdf5", features, dtype="float32"))
    x, num_frames = pad([store[video] for video in IDS])
    assert x.dtype == torch.float32
    assert num_frames.tolist() == [len(features[video]) for video in IDS]
    for row, video in zip(x.numpy(), IDS, strict=True):
        T = len(features[video])
        np.testing.assert_array_equal(row[:T], features[video])
        assert not row[T:].any()
    assert not list(recwarn), "PyTorch warns of read-only arrays, for one"


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_region_features_are_averaged_with_one_notice(dtype, tmp_path, capsys):
    rng = np.random.default_rng(0)
    features = some_features(dtype=dtype)
    regions = IDS[:4]
    for video in regions:  # (T, R, C)
        features[video] = rng.normal(size=(rng.integers(1, 9), 9, 8)).astype(dtype)
    path = write_released(tmp_path / "x.hdf5", features)
    store = FeatureStore(path)
    assert store.feature_size == 8
    assert store.lengths == {video: len(rows) for video, rows in features.items()}
    for video, rows in features.items():
        means = rows
        if video in regions:
            means = [[sum(map(float, row[:, c])) / 9 for c in range(8)] for row in rows]
        assert store[video].dtype == dtype and store[video].shape == (len(rows), 8)
        np.testing.assert_allclose(store[video], means, atol=2e-3 if dtype == np.float16 else 1e-6)
    (notice,) = capsys.readouterr().err.splitlines()
    assert all(words in notice for words in (str(path), "(T, 9, C)", "averaged"))
    FeatureStore(write_released(tmp_path / "y.hdf5", some_features()))
    assert not capsys.readouterr().err


def test_non_finite_value_in_a_region_is_named(tmp_path):
    features = {"good": np.ones((2, 3, 4), np.float16), "bad": np.ones((2, 3, 4), np.float16)}
    features["bad"][1, 2, 3] = np.inf
    path = write_released(tmp_path / "x.hdf5", features)
    assert_refused(path, "bad", "NaN", read="bad")


@pytest.mark.parametrize("dtype", ["<f2", "<f4", "<f8", ">f2", ">f4"])
def test_non_finite_values_are_found_as_by_isfinite(dtype, tmp_path):
    """Bit patterns of float16, one a video, 0 aside; NumPy's isfinite is the oracle."""
    edges = [0x7BFF, 0x7C00, 0x7C01, 0x7FFF, 0xFBFF, 0xFC00, 0xFFFF]
    patterns = np.unique([*range(2, 2**16, 31), *edges]).astype(np.uint16)
    values = patterns.view(np.float16).astype(dtype)
    videos = {str(i): value.reshape(1, 1) for i, value in enumerate(values)}
    store = FeatureStore(write_packed(tmp_path / "x.hdf5", videos))
    refused = set()
    for video in store:
        try:
            assert store[video] == values[int(video)]
        except InputError:
            refused.add(int(video))
    assert refused == set(np.flatnonzero(~np.isfinite(values)))


# --- broken files --------------------------------------------------------------------------------


def assert_refused(path, *mentions, read=None, **options):
    """Opening a file, or reading the video `read`, raises one line that names the file."""
    with pytest.raises(InputError) as error:
        store = FeatureStore(path, **options)
        if read is not None:
            store[read]
    line = str(error.value)
    assert str(path) in line and "\n" not in line, line
    for mention in mentions:
        assert mention in line, line
    return line


@pytest.mark.parametrize("layout", LAYOUTS)
def test_missing_video_is_named(layout, tmp_path):
    path = LAYOUTS[layout](tmp_path / "x.hdf5", some_features())
    assert_refused(path, "no/such", read="no/such")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_wrong_feature_size_is_refused(layout, tmp_path):
    path = LAYOUTS[layout](tmp_path / "x.hdf5", some_features(feature_size=8))
    assert_refused(path, "8", "1024", feature_size=1024)
    assert FeatureStore(path, feature_size=8).feature_size == 8


@pytest.mark.parametrize("layout", ["released", "packed"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_value_is_named_by_video(layout, bad, tmp_path):
    features = some_features()
    features["a/b/c"][-1, 2] = bad
    path = LAYOUTS[layout](tmp_path / "x.hdf5", features)
    assert_refused(path, "a/b/c", "NaN", read="a/b/c")
    FeatureStore(path)["plain"]  # the others can be read


@pytest.mark.parametrize("layout", ["released", "packed"])
def test_empty_video_is_named(layout, tmp_path):
    features = some_features() | {"a/b/c": np.zeros((0, 8), np.float16)}
    line = assert_refused(LAYOUTS[layout](tmp_path / "x.hdf5", features), "a/b/c", "--without")
    assert "--pca_components" not in line  # its width is not what is wrong


def test_video_of_another_width_is_named(tmp_path):
    features = some_features() | {"wide": np.zeros((3, 9), np.float16)}
    path = write_released(tmp_path / "x.hdf5", features)
    assert_refused(path, "wide", "(3, 9)", "--pca_components")


def test_features_whose_axes_are_swapped_are_refused(tmp_path):
    """(C, T): the width that most videos have is that of few. skip_bad cannot mean all others."""
    lengths = [3, 3, 4, 5, 6]
    features = {f"v{i}": np.ones((8, T), np.float16) for i, T in enumerate(lengths)}
    path = write_released(tmp_path / "x.hdf5", features)
    for skip_bad in (True, False):
        line = assert_refused(path, "4 widths", "3, 4, 5", skip_bad=skip_bad)
        assert line.endswith("are the axes swapped?")


@pytest.mark.parametrize("shape", [(), (5,), (2, 0, 4), (2, 3, 4, 5)])
def test_file_of_other_arrays_is_refused(shape, tmp_path):
    path = write_released(tmp_path / "x.hdf5", {"weights": np.zeros(shape)})
    assert_refused(path, "weights")


def test_skip_bad_leaves_out_bad_videos_with_a_reason(tmp_path):
    words = np.full((2, 8), b"x")
    features = some_features() | {
        "wide": np.zeros((3, 9), np.float16),
        "empty": np.zeros((0, 8), np.float16),
        "flat": np.zeros(8, np.float16),
        "words": words,
    }
    path = write_released(tmp_path / "x.hdf5", features)
    with h5py.File(path, "r+") as file:
        file["nothing"] = h5py.Empty("f2")
    store = FeatureStore(path, skip_bad=True)
    assert set(store) == set(IDS)
    assert set(store.bad) == {"wide", "empty", "flat", "words", "nothing"}
    assert "(3, 9)" in store.bad["wide"]
    with pytest.raises(InputError, match="'wide' has shape"):
        store["wide"]
    path = write_released(tmp_path / "y.hdf5", {"words": words})
    assert_refused(path, "words", skip_bad=True)  # nothing would be left


def test_file_that_is_not_hdf5_is_refused(tmp_path):
    path = tmp_path / "x.hdf5"
    for content in (b"", b"not hdf5 at all" * 100):
        path.write_bytes(content)
        assert_refused(path)
    assert_refused(tmp_path / "absent.hdf5")
    (tmp_path / "folder").mkdir()
    assert_refused(tmp_path / "folder", "is a folder", "convert.py to")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_file_cut_short_is_refused(layout, tmp_path):
    whole = LAYOUTS[layout](tmp_path / "x.hdf5", some_features(feature_size=512)).read_bytes()
    path = tmp_path / "cut.hdf5"
    for part in (0.1, 0.5, 0.9, 0.99):
        path.write_bytes(whole[: int(len(whole) * part)])
        assert " = " not in assert_refused(path)  # as in HDF5's "truncated file: eof = 512, ..."


def test_file_without_a_video_is_refused(tmp_path):
    assert_refused(write_released(tmp_path / "x.hdf5", {}), "no video")
    path = write_packed(tmp_path / "y.hdf5", {"x": np.zeros((0, 8))}, offsets=[0], ids=[])
    assert_refused(path)


def test_repeated_id_is_refused(tmp_path):
    ids = ["same", "same", *IDS[2:]]
    assert_refused(write_packed(tmp_path / "x.hdf5", some_features(), ids=ids), "twice")


@pytest.mark.parametrize(
    "offsets",
    [
        [0, 2, 6],
        [0, 4, 2, 6],
        [0, 2, 4, 7],
        [0, 2, 4, 5],
        [1, 2, 4, 6],
        [-2, 2, 4, 6],
        [0, 7, 7, 6],
    ],
    ids=str,
)
def test_offsets_that_do_not_fit_are_refused(offsets, tmp_path):
    features = {name: np.ones((2, 4), np.float16) for name in "abc"}  # they are [0, 2, 4, 6]
    assert_refused(write_packed(tmp_path / "x.hdf5", features, offsets=offsets))


# --- writing -------------------------------------------------------------------------------------


def content(path):
    """What a packed file holds, to the bit."""
    with h5py.File(path) as file:
        found = {"ids": list(file["ids"].asstr()[()]), "meta": dict(file.attrs)}
        for name in ("frames", "offsets", "checksums"):
            found[name] = file[name].dtype, file[name][()].tobytes()
    return found


def parts(path):
    """The spool and the journal of a file that is being written."""
    return [path.with_name(path.name + end) for end in (".part", ".part.jsonl")]


def interrupted(path, features, **options):
    """Leave the spool of a run that stopped on an exception."""
    with pytest.raises(ZeroDivisionError), StoreWriter(path, **options) as writer:
        for video, rows in features.items():
            writer.add(video, rows)
        raise ZeroDivisionError


META = {"backbone": "x"}


def add_range(path, first, last, ending="normal"):
    """Write videos v/first to v/(last - 1), unless they are stored; how this process may end."""
    with StoreWriter(path, meta=META) as writer:
        for i in range(first, last):
            if f"v/{i}" not in writer.done:
                writer.add(f"v/{i}", np.random.default_rng(i).normal(size=(i % 5 + 1, 8)))
        if ending == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if ending == "_exit":
            os._exit(7)


@pytest.mark.parametrize("ending, status", [("kill", -signal.SIGKILL), ("_exit", 7)])
def test_writer_resumes_after_a_kill_to_the_same_file(ending, status, tmp_path):
    killed, whole = tmp_path / "killed.hdf5", tmp_path / "whole.hdf5"
    assert in_a_fork(add_range, killed, 0, 6, ending)[0] == status
    assert not killed.exists() and all(part.exists() for part in parts(killed))
    spool, journal = parts(killed)
    with open(spool, "ab") as file:
        file.write(b"half a video")
    with open(journal, "ab") as file:
        file.write(b'{"id": "v/6", "T": 2')  # and half a line
    with StoreWriter(killed, meta=META) as writer:
        assert writer.done == {f"v/{i}" for i in range(6)}
        for i in range(6, 12):
            writer.add(f"v/{i}", np.random.default_rng(i).normal(size=(i % 5 + 1, 8)))
    add_range(whole, 0, 12)
    assert content(killed) == content(whole)
    assert not any(part.exists() for part in parts(killed))


def test_writer_drops_a_video_whose_rows_are_not_all_in_the_spool(tmp_path):
    """After a power cut the journal can be ahead of the spool."""
    path, features = tmp_path / "x.hdf5", some_features()
    interrupted(path, features)
    spool, _ = parts(path)
    os.truncate(spool, spool.stat().st_size - 1)
    with StoreWriter(path) as writer:
        assert writer.done == set(IDS[:-1])
        writer.add(IDS[-1], features[IDS[-1]])
    assert content(path) == content(write_ours(tmp_path / "y.hdf5", features))


def test_writer_cuts_off_half_a_video_even_if_nothing_is_added(tmp_path):
    path, features = tmp_path / "x.hdf5", some_features()
    interrupted(path, features)
    with open(parts(path)[0], "ab") as file:
        file.write(b"half a video")
    with StoreWriter(path) as writer:
        assert writer.done == set(IDS)
    assert content(path) == content(write_ours(tmp_path / "y.hdf5", features))


def test_spool_with_a_changed_source_is_refused_and_stays(tmp_path):
    path, features = tmp_path / "x.hdf5", some_features()
    monday = dict.fromkeys(IDS, "made on Monday")
    interrupted(path, features, sources=monday)
    for sources in (monday | {IDS[0]: "made on Tuesday"}, {IDS[0]: "made on Monday"}):
        with pytest.raises(InputError, match="the input has changed"):
            StoreWriter(path, sources=sources)
    assert StoreWriter(path, sources=monday).done == set(IDS)


def test_order_of_adding_does_not_matter(tmp_path):
    features = some_features()
    backwards = dict(reversed(features.items()))
    first = write_ours(tmp_path / "x.hdf5", features)
    assert content(first) == content(write_ours(tmp_path / "y.hdf5", backwards))


def checksums_by_hand(features, dtype):
    """As documented: SHA-256 of each video's bytes, and of the list of those; 16 digits of each."""
    sums, videos = {}, {}
    for video, rows in features.items():
        sums[video] = hashlib.sha256(rows.astype(dtype).tobytes()).hexdigest()[:16]
        videos[video] = [len(rows), sums[video]]
    width = next(iter(features.values())).shape[1]
    listed = json.dumps([dtype, width, videos], sort_keys=True)
    return sums, hashlib.sha256(listed.encode()).hexdigest()[:16]


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_store_has_the_checksums_of_its_rows(dtype, tmp_path):
    features = some_features(dtype=np.float32)
    store = FeatureStore(write_ours(tmp_path / "x.hdf5", features, dtype, backbone="lite0"))
    assert (store.checksums(), store.checksum) == checksums_by_hand(features, dtype)
    # What made the features is compared between stores, so the checksum must not be part of it.
    assert store.meta == {"backbone": "lite0"}
    foreign = FeatureStore(write_packed(tmp_path / "y.hdf5", features))
    assert foreign.checksum is None and foreign.checksums() == {}


def test_fingerprint_is_of_the_content(tmp_path):
    """With checksums any bit counts; without, the lengths and the first and last rows do."""

    def changed_at(*position):
        changed = {video: rows.copy() for video, rows in features.items()}
        changed["v7"][position] += 1
        return changed

    def fingerprint(write, content, **meta):
        return FeatureStore(write(tmp_path / "x.hdf5", content, **meta)).fingerprint()

    features = some_features([f"v{i}" for i in range(40)])
    ours = fingerprint(write_ours, features)
    assert ours == fingerprint(write_ours, features, made="otherwise")
    assert ours != fingerprint(write_ours, changed_at(-1, -1))

    write_ours(tmp_path / "a.hdf5", features)
    copy = shutil.copy(tmp_path / "a.hdf5", tmp_path / "copy.hdf5")
    assert FeatureStore(copy).fingerprint() == ours
    with h5py.File(copy, "r+") as file:
        file["frames"][0, 0] += 1  # edited in place, under the old checksum
    with pytest.raises(InputError, match="'v0' has other rows than were written"):
        FeatureStore(copy).fingerprint()

    foreign = fingerprint(write_packed, features)
    assert foreign == fingerprint(write_packed, features)
    assert foreign != fingerprint(write_packed, changed_at(0, 0))


def test_exception_leaves_a_spool_and_no_file(tmp_path):
    path = tmp_path / "x.hdf5"
    interrupted(path, some_features())
    assert sorted(item.name for item in tmp_path.iterdir()) == ["x.hdf5.part", "x.hdf5.part.jsonl"]
    assert StoreWriter(path).done == set(IDS)


def test_older_file_stays_until_the_new_one_is_whole(tmp_path):
    path = write_ours(tmp_path / "x.hdf5", some_features(seed=1))
    before = content(path)
    interrupted(path, some_features(seed=2))
    assert content(path) == before
    with StoreWriter(path):  # everything is spooled
        pass
    assert content(path) == content(write_ours(tmp_path / "y.hdf5", some_features(seed=2)))


@pytest.mark.parametrize(
    "features", [some_features(), {"only": np.ones((1, 8))}], ids=["many", "one"]
)
@pytest.mark.parametrize(
    "other, mention",
    [({"meta": {"fps": "2"}}, "fps 1, not 2"), ({"dtype": "float32"}, "float16, not")],
)
def test_spool_of_other_settings_is_refused_and_stays(other, mention, features, tmp_path):
    path, options = tmp_path / "x.hdf5", {"meta": {"fps": "1"}}
    interrupted(path, features, **options)
    before = [part.read_bytes() for part in parts(path)]
    with pytest.raises(InputError) as error:
        StoreWriter(path, **options | other)
    assert all(words in str(error.value) for words in (mention, str(parts(path)[1]))), error.value
    assert [part.read_bytes() for part in parts(path)] == before
    assert StoreWriter(path, **options).done == set(features)  # its own settings resume it
    parts(path)[1].unlink()  # as the message says
    assert StoreWriter(path, **options | other).done == set()


def test_spool_of_other_settings_without_a_video_is_replaced(tmp_path):
    path = tmp_path / "x.hdf5"
    interrupted(path, {}, meta={"backbone": "lite0"})
    with StoreWriter(path, meta={"backbone": "resnet50"}) as writer:
        writer.add("new", np.ones((2, 3)))
    assert FeatureStore(path).meta == {"backbone": "resnet50"}


def test_writer_locks_out_other_processes(tmp_path):
    path = tmp_path / "x.hdf5"
    with StoreWriter(path, meta=META) as writer:
        writer.add("v", np.ones((2, 8)))
        before = [part.read_bytes() for part in parts(path)]
        _, message = in_a_fork(add_range, path, 0, 3)
        assert f"is being written by `{Path(sys.argv[0]).name}" in message
        assert f"process {os.getpid()} on" in message
        assert [part.read_bytes() for part in parts(path)] == before
        writer.add("w", np.ones((2, 8)))
    assert set(FeatureStore(path)) == {"v", "w"}
    assert in_a_fork(add_range, path, 0, 3) == (0, None)  # it is free again
    assert set(FeatureStore(path)) == {"v/0", "v/1", "v/2"}


def test_store_on_a_file_system_without_locks_is_written_and_read(tmp_path):
    """HDF5 has locks of its own, in C."""

    def work():
        without_locks()
        path = write_released(tmp_path / "theirs.hdf5", {})
        return str(path)

    def write_and_read():
        without_locks()
        store = FeatureStore(write_ours(tmp_path / "x.hdf5", some_features()))
        return sorted(store), store["plain"].tolist()

    assert "unable to lock file" in in_a_fork(work)[1]  # so the system is as we think
    code, found = in_a_fork(write_and_read)
    assert code == 0 and found == (sorted(IDS), some_features()["plain"].tolist())


def test_store_that_another_program_writes_is_told_from_damage(tmp_path):
    """By HDF5's own lock."""
    path = write_released(tmp_path / "x.hdf5", some_features())
    opened, end = multiprocessing.Event(), multiprocessing.Event()

    def write():
        with h5py.File(path, "r+"):
            opened.set()
            end.wait()

    process = multiprocessing.get_context("fork").Process(target=write)
    process.start()
    assert opened.wait(10)
    with pytest.raises(InputError, match="is open for writing in another program") as error:
        FeatureStore(path)
    end.set()
    process.join()
    assert "cut short" not in str(error.value)
    assert set(FeatureStore(path)) == set(IDS)


@pytest.mark.parametrize("kilobytes", [16, 300, 450])  # while videos are added; while it is packed
def test_writer_on_a_full_disk_says_so_and_goes_on_when_there_is_room(kilobytes, tmp_path):
    features = {f"v{i}": np.full((100, 128), i + 1, np.float16) for i in range(10)}  # 256 kB
    with small_disk(tmp_path / "disk", kilobytes << 10) as disk:
        path = disk / "x.hdf5"
        with pytest.raises(DiskError, match="No space left"), StoreWriter(path) as writer:
            for video, rows in features.items():
                writer.add(video, rows)
        stored = len(writer.done)
        assert not path.exists() and (stored == 10) == (kilobytes > 16)
        subprocess.run(["mount", "-o", "remount,size=2m", str(disk)], check=True)
        with StoreWriter(path) as writer:
            assert len(writer.done) == stored
            for video in features.keys() - writer.done:
                writer.add(video, features[video])
        assert content(path) == content(write_ours(tmp_path / "y.hdf5", features))
        assert os.listdir(disk) == ["x.hdf5"]


def test_refused_writer_releases_its_lock(tmp_path):
    path = tmp_path / "x.hdf5"
    interrupted(path, some_features(), meta={"backbone": "x"})
    # The traceback in `refused` keeps the writer alive, so only its own clean-up can unlock.
    refused = pytest.raises(InputError, StoreWriter, path, meta={"backbone": "y"})
    assert StoreWriter(path, meta={"backbone": "x"}).done == set(IDS)
    assert refused.match("backbone x, not y")


def test_renewing_writer_drops_what_changed_and_keeps_what_is_gone(tmp_path):
    path, old, new = tmp_path / "x.hdf5", some_features(seed=1), some_features(seed=2)
    interrupted(path, old, sources=dict.fromkeys(IDS, "Monday"))
    changed, gone, failing = IDS[2], IDS[3], IDS[4]
    today = dict.fromkeys(IDS, "Monday") | {changed: "Tuesday", failing: "Tuesday"}
    del today[gone]
    with pytest.raises(InputError, match="the input has changed"):
        StoreWriter(path, sources=today)
    with pytest.raises(ZeroDivisionError), StoreWriter(path, sources=today, renew=True) as writer:
        assert writer.done == set(IDS) - {changed, failing}
        writer.add(changed, new[changed])
        raise ZeroDivisionError  # stopped once more
    with StoreWriter(path, sources=today, renew=True) as writer:
        assert writer.done == set(IDS) - {failing}
    expected = old | {changed: new[changed]}
    del expected[failing]
    assert content(path) == content(write_ours(tmp_path / "y.hdf5", expected))


def test_renewing_writer_that_drops_everything_writes_no_file(tmp_path):
    path = tmp_path / "x.hdf5"
    interrupted(path, some_features(), sources=dict.fromkeys(IDS, "Monday"))
    tuesday = dict.fromkeys(IDS, "Tuesday")
    with (
        pytest.raises(InputError, match="no video"),
        StoreWriter(path, sources=tuesday, renew=True),
    ):
        pass
    assert not list(tmp_path.iterdir())


BAD_ROWS = {
    "NaN": (np.full((2, 8), np.nan), "NaN"),
    "overflow of float16": (np.full((2, 8), 1e6), "float16"),
    "another width": (np.ones((2, 9)), "(2, 9)"),
    "no frame": (np.ones((0, 8)), "(0, 8)"),
    "one dimension": (np.ones(8), "(8,)"),
}


@pytest.mark.parametrize("kind", BAD_ROWS)
@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
def test_bad_rows_are_refused_and_the_rest_is_written(kind, tmp_path):
    rows, mention = BAD_ROWS[kind]
    with StoreWriter(tmp_path / "x.hdf5") as writer:
        writer.add("good", np.ones((2, 8)))
        with pytest.raises(InputError) as error:
            writer.add("bad", rows)
        assert "bad" in str(error.value) and mention in str(error.value)
        with pytest.raises(InputError, match="'good'.*twice"):
            writer.add("good", np.ones((2, 8)))
        writer.add("more", 2 * np.ones((1, 8)))
    store = FeatureStore(tmp_path / "x.hdf5")
    assert sorted(store) == ["good", "more"]
    np.testing.assert_array_equal(store["good"], np.ones((2, 8)))
    np.testing.assert_array_equal(store["more"], np.full((1, 8), 2))


def test_nothing_added_writes_no_file(tmp_path):
    with pytest.raises(InputError, match="no video"), StoreWriter(tmp_path / "x.hdf5"):
        pass
    assert not list(tmp_path.iterdir())
