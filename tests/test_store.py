"""Feature files, training pairs and annotations: what is read is what was written, what is broken is named."""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys

import h5py
import numpy as np
import pytest
import torch
from helpers.commands import ROOT, environment
from helpers.files import IDS, some_features, write_ours, write_packed, write_released
from torch.utils.data import DataLoader

from features.store import FeatureStore, StoreWriter
from padding import pad
from utils import InputError

LAYOUTS = {"released": write_released, "packed": write_packed, "ours": write_ours}


# --- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_a_store_gives_back_what_was_written_under_any_id_in_either_layout(layout, dtype, tmp_path):
    features = some_features(dtype=dtype)
    options = {"dtype": np.dtype(dtype).name} if layout == "ours" else {}
    store = FeatureStore(LAYOUTS[layout](tmp_path / "x.hdf5", features, **options))
    assert set(store) == set(features) == set(store.keys()) and len(store) == len(features)
    assert (
        store.lengths == {video: len(frames) for video, frames in features.items()}
        and store.feature_size == 8
    )
    for video, frames in features.items():
        assert video in store and store[video].dtype == dtype
        np.testing.assert_array_equal(store[video], frames)
    assert "a" not in store and "a/b" not in store and "frames" not in store


def test_a_compressed_packed_file_reads_the_same(tmp_path):
    features = some_features()
    store = FeatureStore(
        write_packed(tmp_path / "x.hdf5", features, chunks=True, compression="gzip")
    )
    for video, frames in features.items():
        np.testing.assert_array_equal(store[video], frames)


def test_meta_is_what_was_given(tmp_path):
    meta = {"backbone": "lite0", "pca": 64}
    store = FeatureStore(write_ours(tmp_path / "x.hdf5", some_features(), **meta))
    assert {key: store.meta[key] for key in meta} == meta


def test_packed_rows_come_through_a_memory_map_without_a_copy(tmp_path):
    store = FeatureStore(write_ours(tmp_path / "x.hdf5", some_features()))
    for video in IDS:
        rows, owner = store[video], store[video]
        while isinstance(owner.base, np.ndarray):
            owner = owner.base
        assert isinstance(owner, np.memmap) and not rows.flags.owndata
    with pytest.raises(ValueError):
        store["plain"][0] = 0  # and nobody can write through it


class Everything(torch.utils.data.Dataset):
    def __init__(self, store):
        self.store, self.videos = store, sorted(store)

    def __len__(self):
        return len(self.videos)

    def __getitem__(self, i):
        return os.getpid(), self.videos[i], torch.from_numpy(np.array(self.store[self.videos[i]]))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_forked_loading_workers_read_the_same(layout, tmp_path):
    features = some_features([f"v{i}/x" for i in range(60)])
    store = FeatureStore(LAYOUTS[layout](tmp_path / "x.hdf5", features))
    store["v0/x"]  # opened in the parent already
    loader = DataLoader(
        Everything(store), batch_size=None, num_workers=2, multiprocessing_context="fork"
    )
    seen, workers = {}, set()
    for worker, video, rows in loader:
        seen[video] = rows.numpy()
        workers.add(worker)
        np.testing.assert_array_equal(
            store[video], features[video]
        )  # the parent goes on reading meanwhile
    assert os.getpid() not in workers and len(workers) == 2 and set(seen) == set(features)
    for video, frames in features.items():
        np.testing.assert_array_equal(seen[video], frames)


def test_pad_gives_float32_frames_true_lengths_and_zeros_after_them_in_silence(tmp_path, recwarn):
    features = some_features(dtype=np.float32)
    store = FeatureStore(write_ours(tmp_path / "x.hdf5", features, dtype="float32"))
    x, num_frames = pad([store[video] for video in IDS])
    assert x.dtype == torch.float32 and num_frames.tolist() == [
        len(features[video]) for video in IDS
    ]
    for row, video in zip(x.numpy(), IDS, strict=True):
        np.testing.assert_array_equal(row[: len(features[video])], features[video])
        assert not row[len(features[video]) :].any()
    assert not list(recwarn), "reading prints warnings on the user's terminal"


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_region_features_are_averaged_over_their_regions_with_one_notice(dtype, tmp_path, capsys):
    draw = np.random.default_rng(0)
    regions = {
        video: draw.normal(size=(draw.integers(1, 9), 9, 8)).astype(dtype) for video in IDS[:4]
    }
    features = regions | some_features(IDS[4:], dtype=dtype)
    path = write_released(tmp_path / "x.hdf5", features)
    store = FeatureStore(path)
    assert store.feature_size == 8 and store.lengths == {
        video: len(frames) for video, frames in features.items()
    }
    for video in IDS:
        rows = features[video]
        means = (
            [[sum(map(float, row[:, c])) / 9 for c in range(8)] for row in rows]
            if video in regions
            else rows
        )
        assert store[video].dtype == dtype and store[video].shape == (len(rows), 8)
        np.testing.assert_allclose(store[video], means, atol=2e-3 if dtype == np.float16 else 1e-6)
    notices = capsys.readouterr().err.splitlines()
    assert (
        len(notices) == 1
        and str(path) in notices[0]
        and "(T, 9, C)" in notices[0]
        and "averaged" in notices[0]
    )
    FeatureStore(write_released(tmp_path / "y.hdf5", some_features()))
    assert not capsys.readouterr().err


def test_a_value_that_is_not_finite_in_one_region_is_named(tmp_path):
    features = {"good": np.ones((2, 3, 4), np.float16), "bad": np.ones((2, 3, 4), np.float16)}
    features["bad"][1, 2, 3] = np.inf
    refusal(write_released(tmp_path / "x.hdf5", features), "bad", "NaN", read="bad")


@pytest.mark.parametrize("dtype", ["<f2", "<f4", "<f8", ">f2", ">f4"])
def test_every_value_that_is_not_finite_is_seen_and_no_other(dtype, tmp_path):
    """Patterns of 16 bits, one a video; NumPy's isfinite is the oracle."""
    patterns = np.unique(
        [*range(0, 2**16, 31), 0x7BFF, 0x7C00, 0x7C01, 0x7FFF, 0xFBFF, 0xFC00, 0xFFFF]
    ).astype(np.uint16)
    values = patterns.view(np.float16).astype(dtype)
    path = write_packed(
        tmp_path / "x.hdf5", {str(i): value.reshape(1, 1) for i, value in enumerate(values)}
    )
    store, refused = FeatureStore(path), set()
    for video in store:
        try:
            assert store[video] == values[int(video)]
        except InputError:
            refused.add(int(video))
    assert refused == set(np.flatnonzero(~np.isfinite(values)))


# --- broken files ----------------------------------------------------------------------------------------------------


def refusal(path, *mentions, read=None, **options):
    """The one line with which opening (or reading `read` of) a file is refused; it names the file."""
    with pytest.raises(InputError) as error:
        store = FeatureStore(path, **options)
        if read is not None:
            store[read]
    line = str(error.value)
    assert str(path) in line and "\n" not in line, line
    for mention in mentions:
        assert mention in line, line


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_missing_video_is_named_with_its_file(layout, tmp_path):
    refusal(LAYOUTS[layout](tmp_path / "x.hdf5", some_features()), "no/such", read="no/such")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_another_width_than_asked_for_is_refused(layout, tmp_path):
    path = LAYOUTS[layout](tmp_path / "x.hdf5", some_features(feature_size=8))
    refusal(path, "8", "1024", feature_size=1024)
    assert FeatureStore(path, feature_size=8).feature_size == 8


@pytest.mark.parametrize("layout", ["released", "packed"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_named_by_video(layout, bad, tmp_path):
    features = some_features()
    features["a/b/c"][-1, 2] = bad
    path = LAYOUTS[layout](tmp_path / "x.hdf5", features)
    refusal(path, "a/b/c", "NaN", read="a/b/c")
    FeatureStore(path)["plain"]  # the others can be read


@pytest.mark.parametrize("layout", ["released", "packed"])
def test_an_empty_video_is_named(layout, tmp_path):
    features = some_features() | {"a/b/c": np.zeros((0, 8), np.float16)}
    refusal(LAYOUTS[layout](tmp_path / "x.hdf5", features), "a/b/c")


def test_a_video_of_another_width_among_the_rest_is_named(tmp_path):
    features = some_features() | {"wide": np.zeros((3, 9), np.float16)}
    refusal(write_released(tmp_path / "x.hdf5", features), "wide", "(3, 9)")


@pytest.mark.parametrize("shape", [(), (5,), (2, 0, 4), (2, 3, 4, 5)])
def test_a_file_of_other_arrays_is_refused(shape, tmp_path):
    refusal(write_released(tmp_path / "x.hdf5", {"weights": np.zeros(shape)}), "weights")


def test_bad_videos_are_left_out_and_told_where_the_caller_asks_for_it(tmp_path):
    features = some_features() | {
        "wide": np.zeros((3, 9), np.float16),
        "empty": np.zeros((0, 8), np.float16),
        "flat": np.zeros(8, np.float16),
        "words": np.full((2, 8), b"x"),
    }
    path = write_released(tmp_path / "x.hdf5", features)
    with h5py.File(path, "r+") as file:
        file["nothing"] = h5py.Empty("f2")
    store = FeatureStore(path, skip_bad=True)
    bad = {"wide", "empty", "flat", "words", "nothing"}
    assert set(store) == set(IDS) and set(store.bad) == bad and "(3, 9)" in store.bad["wide"]
    with pytest.raises(InputError, match="'wide' has shape"):
        store["wide"]
    refusal(
        write_released(tmp_path / "y.hdf5", {"words": features["words"]}), "words", skip_bad=True
    )


def test_a_file_that_is_not_hdf5_is_refused(tmp_path):
    for content in (b"", b"not hdf5 at all" * 100):
        (tmp_path / "x.hdf5").write_bytes(content)
        refusal(tmp_path / "x.hdf5")
    refusal(tmp_path / "absent.hdf5")
    (tmp_path / "folder").mkdir()
    refusal(tmp_path / "folder")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_file_cut_short_is_refused(layout, tmp_path):
    whole = LAYOUTS[layout](tmp_path / "x.hdf5", some_features(feature_size=512)).read_bytes()
    for part in (0.1, 0.5, 0.9, 0.99):
        (tmp_path / "cut.hdf5").write_bytes(whole[: int(len(whole) * part)])
        refusal(tmp_path / "cut.hdf5")


def test_a_file_without_a_video_is_refused(tmp_path):
    refusal(write_released(tmp_path / "x.hdf5", {}), "no video")
    refusal(write_packed(tmp_path / "y.hdf5", {"x": np.zeros((0, 8))}, offsets=[0], ids=[]))


def test_an_id_that_stands_twice_is_refused(tmp_path):
    refusal(
        write_packed(tmp_path / "x.hdf5", some_features(), ids=["same", "same", *IDS[2:]]), "twice"
    )


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
    features = {name: np.ones((2, 4), np.float16) for name in "abc"}
    refusal(write_packed(tmp_path / "x.hdf5", features, offsets=offsets))


# --- writing ---------------------------------------------------------------------------------------------------------


def content(path):
    with h5py.File(path) as file:
        return {
            name: (file[name].dtype, file[name][()].tobytes())
            for name in ("frames", "offsets", "checksums")
        } | {
            "ids": list(file["ids"].asstr()[()]),
            "meta": dict(file.attrs),
        }


def parts(path):
    return [path.with_name(path.name + end) for end in (".part", ".part.jsonl")]


ADD = """
import os, signal, sys
import numpy as np
sys.path.insert(0, sys.argv[1])
from features.store import StoreWriter
path, first, last, end = sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
with StoreWriter(path, meta={"backbone": "x"}) as writer:
    print(sorted(writer.done))
    for i in range(first, last):
        if f"v/{i}" not in writer.done:
            writer.add(f"v/{i}", np.random.default_rng(i).normal(size=(i % 5 + 1, 8)))
    if end == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if end == "_exit":
        os._exit(7)
"""


def add_in_a_process(path, first, last, end):
    command = [sys.executable, "-c", ADD, str(ROOT), str(path), str(first), str(last), end]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("end, status", [("kill", -signal.SIGKILL), ("_exit", 7)])
def test_a_writer_killed_at_any_moment_goes_on_to_the_same_file(end, status, tmp_path):
    killed, whole = tmp_path / "killed.hdf5", tmp_path / "whole.hdf5"
    assert add_in_a_process(killed, 0, 6, end).returncode == status
    assert not killed.exists() and all(part.exists() for part in parts(killed))
    spool, journal = parts(killed)
    for where, garbage in (
        (spool, b"half a video"),
        (journal, b'{"id": "v/6", "T": 2'),
    ):  # killed while writing
        with open(where, "ab") as file:
            file.write(garbage)
    with StoreWriter(killed, meta={"backbone": "x"}) as writer:
        assert writer.done == {f"v/{i}" for i in range(6)}
        for i in range(6, 12):
            writer.add(f"v/{i}", np.random.default_rng(i).normal(size=(i % 5 + 1, 8)))
    with StoreWriter(whole, meta={"backbone": "x"}) as writer:
        for i in range(12):
            writer.add(f"v/{i}", np.random.default_rng(i).normal(size=(i % 5 + 1, 8)))
    assert content(killed) == content(whole)
    assert not any(part.exists() for part in parts(killed))


def test_a_journal_that_promises_more_than_the_spool_holds_is_believed_only_as_far_as_it_holds(
    tmp_path,
):
    """After a power cut the journal can be ahead of the frames."""
    path, features = tmp_path / "x.hdf5", some_features()
    interrupted(path, features)
    spool, _ = parts(path)
    os.truncate(spool, spool.stat().st_size - 1)
    with StoreWriter(path) as writer:
        assert writer.done == set(IDS[:-1])
        writer.add(IDS[-1], features[IDS[-1]])
    assert content(path) == content(write_ours(tmp_path / "y.hdf5", features))


def test_half_a_video_at_the_spools_end_is_cut_off_even_if_nothing_follows(tmp_path):
    path, features = tmp_path / "x.hdf5", some_features()
    interrupted(path, features)
    with open(parts(path)[0], "ab") as file:
        file.write(b"half a video")
    with StoreWriter(path) as writer:
        assert writer.done == set(IDS)
    assert content(path) == content(write_ours(tmp_path / "y.hdf5", features))


def interrupted(path, features, **options):
    """A spool left by a run that stopped on an exception."""
    with pytest.raises(ZeroDivisionError), StoreWriter(path, **options) as writer:
        for video, frames in features.items():
            writer.add(video, frames)
        raise ZeroDivisionError


def test_a_spool_of_a_video_that_has_changed_since_is_refused_and_stays(tmp_path):
    path, features = tmp_path / "x.hdf5", some_features()
    interrupted(path, features, sources=dict.fromkeys(IDS, "made on Monday"))
    for sources in (
        {**dict.fromkeys(IDS, "made on Monday"), IDS[0]: "made on Tuesday"},
        {IDS[0]: "made on Monday"},
    ):
        with pytest.raises(InputError, match="the input has changed"):
            StoreWriter(path, sources=sources)
    assert StoreWriter(path, sources=dict.fromkeys(IDS, "made on Monday")).done == set(IDS)


def test_the_order_of_adding_does_not_matter(tmp_path):
    features = some_features()
    backwards = dict(reversed(features.items()))
    assert content(write_ours(tmp_path / "x.hdf5", features)) == content(
        write_ours(tmp_path / "y.hdf5", backwards)
    )


def by_hand(features, dtype):
    """The checksum of a store as the docstrings say: SHA-256 of each video's bytes, then of all."""
    sums = {
        video: hashlib.sha256(rows.astype(dtype).tobytes()).hexdigest()[:16]
        for video, rows in features.items()
    }
    width = next(iter(features.values())).shape[1]
    listed = [dtype, width, {video: [len(features[video]), sums[video]] for video in features}]
    return sums, hashlib.sha256(json.dumps(listed, sort_keys=True).encode()).hexdigest()[:16]


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_store_carries_the_checksums_of_what_was_written(dtype, tmp_path):
    features = some_features(dtype=np.float32)
    store = FeatureStore(write_ours(tmp_path / "x.hdf5", features, dtype, backbone="lite0"))
    assert (store.checksums(), store.checksum) == by_hand(features, dtype)
    assert store.meta == {"backbone": "lite0"}, (
        "what made the features is compared, and does not change with the content"
    )
    foreign = FeatureStore(write_packed(tmp_path / "y.hdf5", features))
    assert foreign.checksum is None and foreign.checksums() == {}


def test_the_fingerprint_is_that_of_the_content(tmp_path):
    """In a store with checksums a single bit anywhere counts; without, what is sampled: the lengths and each first row."""
    features = some_features([f"v{i}" for i in range(40)])
    changed = {video: rows.copy() for video, rows in features.items()}
    changed["v7"][-1, -1] += 1
    first = {video: rows.copy() for video, rows in features.items()}
    first["v7"][0, 0] += 1
    prints = {
        name: FeatureStore(write_ours(tmp_path / name, content, **meta)).fingerprint()
        for name, content, meta in (
            ("a", features, {}),
            ("b", features, {"made": "otherwise"}),
            ("c", changed, {}),
        )
    }
    assert prints["a"] == prints["b"] != prints["c"]
    shutil.copy(tmp_path / "a", tmp_path / "d")
    assert FeatureStore(tmp_path / "d").fingerprint() == prints["a"]
    with h5py.File(tmp_path / "d", "r+") as file:
        file["frames"][0, 0] += 1  # edited in place under the old checksum
    assert FeatureStore(tmp_path / "d").fingerprint() != prints["a"]
    plain = [
        FeatureStore(write_packed(tmp_path / "p", content)).fingerprint()
        for content in (features, features, first)
    ]
    assert plain[0] == plain[1] != plain[2]


def test_an_exception_leaves_no_file_and_a_spool_to_go_on_from(tmp_path):
    path = tmp_path / "x.hdf5"
    interrupted(path, some_features())
    assert sorted(item.name for item in tmp_path.iterdir()) == ["x.hdf5.part", "x.hdf5.part.jsonl"]
    assert StoreWriter(path).done == set(IDS)


def test_an_older_file_stands_until_the_new_one_is_whole(tmp_path):
    path = write_ours(tmp_path / "x.hdf5", some_features(seed=1))
    before = content(path)
    interrupted(path, some_features(seed=2))
    assert content(path) == before
    with StoreWriter(path):  # everything is spooled: nothing to add
        pass
    assert content(path) == content(write_ours(tmp_path / "y.hdf5", some_features(seed=2)))


@pytest.mark.parametrize(
    "features", [some_features(), {"only": np.ones((1, 8))}], ids=["many", "one"]
)
@pytest.mark.parametrize(
    "other, mention",
    [({"meta": {"fps": "2"}}, "fps 1, not 2"), ({"dtype": "float32"}, "float16, not")],
)
def test_a_spool_of_another_command_is_refused_and_the_command_it_is_of_goes_on(
    other, mention, features, tmp_path
):
    path, options = tmp_path / "x.hdf5", {"meta": {"fps": "1"}}
    interrupted(path, features, **options)
    before = [part.read_bytes() for part in parts(path)]
    with pytest.raises(InputError) as error:
        StoreWriter(path, **options | other)
    assert all(words in str(error.value) for words in (mention, str(parts(path)[1]))), error.value
    assert [part.read_bytes() for part in parts(path)] == before
    assert StoreWriter(path, **options).done == set(features)
    parts(path)[1].unlink()  # as the line says
    assert StoreWriter(path, **options | other).done == set()


def test_a_spool_of_another_command_that_holds_no_video_is_begun_anew(tmp_path):
    path = tmp_path / "x.hdf5"
    interrupted(path, {}, meta={"backbone": "lite0"})
    with StoreWriter(path, meta={"backbone": "resnet50"}) as writer:
        writer.add("new", np.ones((2, 3)))
    assert FeatureStore(path).meta == {"backbone": "resnet50"}


def test_two_at_once_do_not_write_one_file(tmp_path):
    path = tmp_path / "x.hdf5"
    with StoreWriter(path, meta={"backbone": "x"}) as writer:
        writer.add("v", np.ones((2, 8)))
        before = [part.read_bytes() for part in parts(path)]
        second = add_in_a_process(path, 0, 3, "end")
        assert second.returncode and "another run is writing" in second.stderr.splitlines()[-1]
        assert [part.read_bytes() for part in parts(path)] == before
        writer.add("w", np.ones((2, 8)))
    assert set(FeatureStore(path)) == {"v", "w"}
    assert not add_in_a_process(path, 0, 3, "end").returncode, (
        "and when it is free the next one may"
    )


def test_a_writer_that_waited_for_the_other_ones_last_moment_is_refused_too(tmp_path, monkeypatch):
    """Between its opening of the journal and its lock the other one ended: what it has locked is there no more."""
    path, flock = tmp_path / "x.hdf5", fcntl.flock

    def late(*args):
        parts(path)[1].unlink()
        flock(*args)

    with monkeypatch.context() as patch, pytest.raises(InputError, match="another run is writing"):
        patch.setattr(fcntl, "flock", late)
        StoreWriter(path)
    assert write_ours(path, some_features()).exists()


def test_a_file_system_without_locks_is_written_to(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert set(FeatureStore(write_ours(tmp_path / "x.hdf5", some_features()))) == set(IDS)


def test_a_refused_writer_locks_nobody_out(tmp_path):
    path = tmp_path / "x.hdf5"
    interrupted(path, some_features(), meta={"backbone": "x"})
    refused = pytest.raises(
        InputError, StoreWriter, path, meta={"backbone": "y"}
    )  # its traceback holds the writer
    assert StoreWriter(path, meta={"backbone": "x"}).done == set(IDS)
    assert refused.match("backbone x, not y")


def test_a_writer_that_renews_forgets_what_has_changed_and_keeps_what_is_gone(tmp_path):
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
        raise ZeroDivisionError  # killed once more
    with StoreWriter(path, sources=today, renew=True) as writer:
        assert writer.done == set(IDS) - {failing}
    expected = {
        video: rows for video, rows in {**old, changed: new[changed]}.items() if video != failing
    }
    assert content(path) == content(write_ours(tmp_path / "y.hdf5", expected))


def test_a_writer_that_forgets_everything_and_is_given_nothing_writes_no_file(tmp_path):
    path = tmp_path / "x.hdf5"
    interrupted(path, some_features(), sources=dict.fromkeys(IDS, "Monday"))
    with (
        pytest.raises(InputError, match="no video"),
        StoreWriter(path, sources=dict.fromkeys(IDS, "Tuesday"), renew=True),
    ):
        pass
    assert not list(tmp_path.iterdir())


BAD_FRAMES = {
    "NaN": (np.full((2, 8), np.nan), "NaN"),
    "overflow of float16": (np.full((2, 8), 1e6), "float16"),
    "another width": (np.ones((2, 9)), "(2, 9)"),
    "no frame": (np.ones((0, 8)), "(0, 8)"),
    "one dimension": (np.ones(8), "(8,)"),
}


@pytest.mark.parametrize("kind", BAD_FRAMES)
@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
def test_frames_that_could_not_be_read_back_are_refused_and_leave_the_rest_whole(kind, tmp_path):
    frames, mention = BAD_FRAMES[kind]
    with StoreWriter(tmp_path / "x.hdf5") as writer:
        writer.add("good", np.ones((2, 8)))
        with pytest.raises(InputError) as error:
            writer.add("bad", frames)
        assert "bad" in str(error.value) and mention in str(error.value)
        with pytest.raises(InputError, match="'good'.*twice"):
            writer.add("good", np.ones((2, 8)))
        writer.add("more", 2 * np.ones((1, 8)))
    store = FeatureStore(tmp_path / "x.hdf5")
    assert (
        sorted(store) == ["good", "more"]
        and store["good"].shape == (2, 8)
        and (store["more"] == 2).all()
    )


def test_nothing_added_is_no_file(tmp_path):
    with pytest.raises(InputError, match="no video"), StoreWriter(tmp_path / "x.hdf5"):
        pass
    assert not list(tmp_path.iterdir())
