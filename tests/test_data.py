"""Feature files, training pairs and annotations: what is read is what was written, what is broken is named."""

import json
import os
import pickle
import signal
import subprocess
import sys

import h5py
import numpy as np
import pytest
import torch
from conftest import ROOT, environment, write_packed, write_pickle, write_released
from torch.utils.data import DataLoader

from data import FeatureStore, StoreWriter, VCDBPairDataset, collate_pairs, pad
from utils import InputError

IDS = ["plain", "with space", "a/b/c", "ünï/çødé 视频", "-dash", "dot.mp4", "x" * 200]


def some_features(ids=IDS, width=8, dtype=np.float16, seed=0):
    draw = np.random.default_rng(seed)
    return {video: draw.normal(size=(draw.integers(1, 9), width)).astype(dtype) for video in ids}


def write_ours(path, features, dtype="float16", **meta):
    with StoreWriter(path, dtype, meta) as writer:
        for video, frames in features.items():
            writer.add(video, frames)
    return path


LAYOUTS = {"released": write_released, "packed": write_packed, "ours": write_ours}


# --- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_a_store_gives_back_what_was_written_under_any_id_in_either_layout(layout, dtype, tmp_path):
    features = some_features(dtype=dtype)
    options = {"dtype": np.dtype(dtype).name} if layout == "ours" else {}
    store = FeatureStore(LAYOUTS[layout](tmp_path / "x.hdf5", features, **options))
    assert set(store) == set(features) == set(store.keys()) and len(store) == len(features)
    assert store.lengths == {video: len(frames) for video, frames in features.items()} and store.channels == 8
    for video, frames in features.items():
        assert video in store and store[video].dtype == dtype
        np.testing.assert_array_equal(store[video], frames)
    assert "a" not in store and "a/b" not in store and "frames" not in store


def test_a_compressed_packed_file_reads_the_same(tmp_path):
    features = some_features()
    store = FeatureStore(write_packed(tmp_path / "x.hdf5", features, chunks=True, compression="gzip"))
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
    loader = DataLoader(Everything(store), batch_size=None, num_workers=2, multiprocessing_context="fork")
    seen, workers = {}, set()
    for worker, video, rows in loader:
        seen[video] = rows.numpy()
        workers.add(worker)
        np.testing.assert_array_equal(store[video], features[video])  # the parent goes on reading meanwhile
    assert os.getpid() not in workers and len(workers) == 2 and set(seen) == set(features)
    for video, frames in features.items():
        np.testing.assert_array_equal(seen[video], frames)


def test_pad_gives_float32_frames_true_lengths_and_zeros_after_them_in_silence(tmp_path, recwarn):
    features = some_features(dtype=np.float32)
    store = FeatureStore(write_ours(tmp_path / "x.hdf5", features, dtype="float32"))
    x, num_frames = pad([store[video] for video in IDS])
    assert x.dtype == torch.float32 and num_frames.tolist() == [len(features[video]) for video in IDS]
    for row, video in zip(x.numpy(), IDS, strict=True):
        np.testing.assert_array_equal(row[: len(features[video])], features[video])
        assert not row[len(features[video]) :].any()
    assert not list(recwarn), "reading prints warnings on the user's terminal"


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
    path = LAYOUTS[layout](tmp_path / "x.hdf5", some_features(width=8))
    refusal(path, "8", "1024", channels=1024)
    assert FeatureStore(path, channels=8).channels == 8


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


@pytest.mark.parametrize("shape", [(), (5,), (2, 3, 4)])
def test_a_file_of_other_arrays_is_refused(shape, tmp_path):
    refusal(write_released(tmp_path / "x.hdf5", {"weights": np.zeros(shape)}), "weights")


def test_a_file_that_is_not_hdf5_is_refused(tmp_path):
    for content in (b"", b"not hdf5 at all" * 100):
        (tmp_path / "x.hdf5").write_bytes(content)
        refusal(tmp_path / "x.hdf5")
    refusal(tmp_path / "absent.hdf5")
    (tmp_path / "folder").mkdir()
    refusal(tmp_path / "folder")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_file_cut_short_is_refused(layout, tmp_path):
    whole = LAYOUTS[layout](tmp_path / "x.hdf5", some_features(width=512)).read_bytes()
    for part in (0.1, 0.5, 0.9, 0.99):
        (tmp_path / "cut.hdf5").write_bytes(whole[: int(len(whole) * part)])
        refusal(tmp_path / "cut.hdf5")


def test_a_file_without_a_video_is_refused(tmp_path):
    refusal(write_released(tmp_path / "x.hdf5", {}), "no video")
    refusal(write_packed(tmp_path / "y.hdf5", {"x": np.zeros((0, 8))}, offsets=[0], ids=[]))


def test_an_id_that_stands_twice_is_refused(tmp_path):
    refusal(write_packed(tmp_path / "x.hdf5", some_features(), ids=["same", "same", *IDS[2:]]), "twice")


@pytest.mark.parametrize(
    "offsets", [[0, 2, 6], [0, 4, 2, 6], [0, 2, 4, 7], [0, 2, 4, 5], [1, 2, 4, 6], [-2, 2, 4, 6], [0, 7, 7, 6]], ids=str
)
def test_offsets_that_do_not_fit_are_refused(offsets, tmp_path):
    features = {name: np.ones((2, 4), np.float16) for name in "abc"}
    refusal(write_packed(tmp_path / "x.hdf5", features, offsets=offsets))


# --- writing ---------------------------------------------------------------------------------------------------------


def content(path):
    with h5py.File(path) as file:
        return {name: (file[name].dtype, file[name][()].tobytes()) for name in ("frames", "offsets")} | {
            "ids": list(file["ids"].asstr()[()]),
            "meta": dict(file.attrs),
        }


def parts(path):
    return [path.with_name(path.name + end) for end in (".part", ".part.jsonl")]


ADD = """
import os, signal, sys
import numpy as np
sys.path.insert(0, sys.argv[1])
from data import StoreWriter
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
    for where, garbage in ((spool, b"half a video"), (journal, b'{"id": "v/6", "T": 2')):  # killed while writing
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


def test_a_journal_that_promises_more_than_the_spool_holds_is_believed_only_as_far_as_it_holds(tmp_path):
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
    for sources in ({**dict.fromkeys(IDS, "made on Monday"), IDS[0]: "made on Tuesday"}, {IDS[0]: "made on Monday"}):
        with pytest.raises(InputError, match="the input has changed"):
            StoreWriter(path, sources=sources)
    assert StoreWriter(path, sources=dict.fromkeys(IDS, "made on Monday")).done == set(IDS)


def test_the_order_of_adding_does_not_matter(tmp_path):
    features = some_features()
    backwards = dict(reversed(features.items()))
    assert content(write_ours(tmp_path / "x.hdf5", features)) == content(write_ours(tmp_path / "y.hdf5", backwards))


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


@pytest.mark.parametrize("other", [{"meta": {"backbone": "resnet50"}}, {"dtype": "float32"}])
def test_a_spool_of_another_command_is_not_mixed_in(other, tmp_path):
    path = tmp_path / "x.hdf5"
    interrupted(path, some_features(), meta={"backbone": "lite0"})
    options = {"meta": {"backbone": "lite0"}} | other
    with StoreWriter(path, **options) as writer:
        assert writer.done == set()
        writer.add("new", np.ones((2, 3)))
    assert list(FeatureStore(path)) == ["new"] and FeatureStore(path).channels == 3


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
    assert sorted(store) == ["good", "more"] and store["good"].shape == (2, 8) and (store["more"] == 2).all()


def test_nothing_added_is_no_file(tmp_path):
    with pytest.raises(InputError, match="no video"), StoreWriter(tmp_path / "x.hdf5"):
        pass
    assert not list(tmp_path.iterdir())


# --- training pairs --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Videos whose frame t holds (video number, t), so that a crop tells where it was cut."""
    names = [f"a{i}" for i in range(6)] + [f"n{i}" for i in range(30)]
    draw = np.random.default_rng(0)
    features = {
        name: np.stack([np.full(T := int(draw.integers(1, 40)), i), np.arange(T)], 1).astype(np.float16)
        for i, name in enumerate(names)
    }
    return FeatureStore(write_packed(tmp_path_factory.mktemp("pairs") / "x.hdf5", features))


ANNOTATION = {
    "video_pairs": [
        {"videos": ["a0", "a1"], "overlap": [0.5, 0.9]},
        {"videos": ["a2", "a3"], "overlap": [0.05, 1.0]},
        {"videos": ["a4", "a5"], "overlap": [1.0, 0.2]},
        {"videos": ["a0", "gone"], "overlap": [1.0, 1.0]},
        {"videos": ["away", "gone"], "overlap": [1.0, 1.0]},
        {"videos": ["a1", "a2"], "overlap": [0.1, 0.1]},
    ],
    "negs": [f"n{i}" for i in range(30)] + ["n0", "n7", "lost0", "lost1", "lost2"],
}


def dataset(tmp_path, store, annotation=ANNOTATION, **options):
    return VCDBPairDataset(write_pickle(tmp_path / "vcdb.pickle", annotation), store, **options)


def flat(item):
    index, anchor, positive, numbers, negatives = item
    return index, numbers.tolist(), [np.asarray(x).tolist() for x in (anchor, positive, *negatives)]


def test_an_item_is_the_same_for_the_same_seed_epoch_and_pair_and_another_otherwise(tmp_path, store):
    options = dict(padding_size=5, neg_num=8)
    first, second = dataset(tmp_path, store, **options), dataset(tmp_path, store, **options)
    second[3], second[0]  # what was drawn before does not matter
    for i in range(len(first)):
        assert flat(first[i]) == flat(second[i]) == flat(first[i])
    numbers = {"seed 0": flat(first[0])[1], "pair 1": flat(first[1])[1]}
    numbers["seed 1"] = flat(dataset(tmp_path, store, seed=1, **options)[0])[1]
    first.set_epoch(1)
    numbers["epoch 1"] = flat(first[0])[1]
    assert len({tuple(values) for values in numbers.values()}) == 4, numbers
    first.set_epoch(0)
    assert flat(first[0]) == flat(second[0])


def test_workers_and_reading_threads_draw_the_same_items(tmp_path, store):
    options = dict(padding_size=5, neg_num=8, seed=3)
    plain = dataset(tmp_path, store, **options)
    expected = [flat(plain[i]) for i in range(len(plain))]
    threaded = dataset(tmp_path, store, readers=4, **options)
    assert [flat(item) for item in threaded.__getitems__(list(range(len(plain))))] == expected
    loader = DataLoader(threaded, batch_size=2, collate_fn=list, num_workers=2)
    assert [flat(item) for items in loader for item in items] == expected


def test_an_items_negatives_are_distinct_and_are_the_numbered_videos(tmp_path, store):
    pairs = dataset(tmp_path, store, neg_num=30)
    for i in range(len(pairs)):
        _, anchor, positive, numbers, negatives = pairs[i]
        assert sorted(numbers.tolist()) == list(range(30))
        for number, frames in zip(numbers, negatives, strict=True):
            np.testing.assert_array_equal(frames, store[pairs.negatives[number]])
        np.testing.assert_array_equal(anchor, store[pairs.pairs[i][0]])
        np.testing.assert_array_equal(positive, store[pairs.pairs[i][1]])


def test_every_negative_is_drawn_in_time(tmp_path, store):
    pairs, drawn = dataset(tmp_path, store, neg_num=5), set()
    for epoch in range(30):
        pairs.set_epoch(epoch)
        drawn |= set(pairs[0][3].tolist())
    assert drawn == set(range(30))


def test_what_has_no_features_is_left_out_and_counted(tmp_path, store):
    pairs = dataset(tmp_path, store)
    assert pairs.pairs == [("a0", "a1"), ("a2", "a3"), ("a4", "a5"), ("a1", "a2")]
    assert pairs.negatives == [f"n{i}" for i in range(30)]
    assert pairs.missing == {"pairs": 2, "negatives": 3}


def test_min_overlap_leaves_out_pairs_by_their_smaller_overlap(tmp_path, store):
    for bound, kept in ((0.0, 4), (0.1, 3), (0.11, 2), (0.2, 2), (0.5, 1)):
        assert len(dataset(tmp_path, store, min_overlap=bound)) == kept


@pytest.mark.parametrize("random_sampling", [False, True])
def test_a_long_video_is_cropped_within_padding_size(random_sampling, tmp_path, store):
    pairs = dataset(tmp_path, store, padding_size=7, neg_num=20, random_sampling=random_sampling)
    places = set()
    for epoch in range(20):
        pairs.set_epoch(epoch)
        for i in range(len(pairs)):
            _, anchor, positive, numbers, negatives = pairs[i]
            names = [*pairs.pairs[i], *(pairs.negatives[n] for n in numbers)]
            for name, frames in zip(names, (anchor, positive, *negatives), strict=True):
                assert len(frames) == min(len(store[name]), 7)
                assert set(frames[:, 0].tolist()) == {float(store[name][0, 0])}
                times = frames[:, 1].astype(int)
                steps = np.diff(times)
                assert (steps > 0).all() and 0 <= times[0] and times[-1] < len(store[name])
                assert random_sampling or (steps == 1).all()
                places.add((name, *times.tolist()))
    longest = max(pairs.negatives, key=lambda name: store.lengths[name])
    starts = {place[1] for place in places if place[0] == longest}
    assert len(starts) > 5  # it is cut at many places
    if not random_sampling:
        assert max(starts) <= store.lengths[longest] - 7


def test_padding_size_0_takes_all_frames(tmp_path, store):
    _, anchor, *_ = dataset(tmp_path, store, padding_size=0)[0]
    np.testing.assert_array_equal(anchor, store["a0"])


def test_collate_keeps_every_video_with_its_number(tmp_path, store):
    pairs = dataset(tmp_path, store, neg_num=4, padding_size=9)
    items = [pairs[i] for i in (2, 0, 3)]
    indices, anchors, positives, negatives, numbers = collate_pairs(items)
    assert list(indices) == [2, 0, 3]
    assert numbers.tolist() == [n for item in items for n in item[3].tolist()]
    for (x, num_frames), videos in (
        (anchors, [item[1] for item in items]),
        (positives, [item[2] for item in items]),
        (negatives, [video for item in items for video in item[4]]),
    ):
        assert x.shape[:2] == (len(videos), max(map(len, videos))) and x.dtype == torch.float32
        for row, T, video in zip(x.numpy(), num_frames.tolist(), videos, strict=True):
            assert T == len(video)
            np.testing.assert_array_equal(row[:T], video)


def test_shares_is_true_where_intervals_of_one_source_overlap_and_nowhere_else(tmp_path, store):
    draw = np.random.default_rng(0)
    names = [f"a{i}" for i in range(6)] + [f"n{i}" for i in range(30)]
    segments = {}
    for name in names[:-2]:  # two videos have no segments at all
        starts = draw.integers(0, 60, draw.integers(0, 4)).tolist()
        segments[name] = [[f"film{draw.integers(3)}", start, start + int(draw.integers(1, 15))] for start in starts]
    segments["n0"], segments["a0"] = [["film0", 10, 20]], [["film0", 20, 30]]  # touching is not sharing
    pairs = dataset(tmp_path, store, ANNOTATION | {"segments": segments})
    indices, numbers = [3, 0, 1, 1], torch.tensor([5, -1, 0, 29, 28, 5, *range(30), -1])
    found = pairs.shares(indices)(numbers)
    expected = [
        [
            number >= 0
            and any(
                source == other and max(start, a) < min(end, b)
                for source, start, end in segments.get(pairs.pairs[i][0], [])
                for other, a, b in segments.get(pairs.negatives[number], [])
            )
            for number in numbers.tolist()
        ]
        for i in indices
    ]
    assert found.tolist() == expected and 0 < np.sum(expected) < np.size(expected)


def test_shares_without_segments_is_refused_with_the_flag_to_leave_out(tmp_path, store):
    with pytest.raises(InputError, match="segments.*--mask_shared"):
        dataset(tmp_path, store).shares([0])


def test_a_file_with_too_few_videos_is_refused_with_the_counts(tmp_path, store):
    with pytest.raises(InputError, match="vcdb.pickle.*ids"):
        dataset(tmp_path, store, {"video_pairs": [{"videos": ["x", "y"]}], "negs": ["n0"]}, neg_num=1)
    with pytest.raises(InputError, match="30 of 33 negatives.*31"):
        dataset(tmp_path, store, neg_num=31)


WRONG_FORMS = {
    "a list": [1, 2],
    "no pairs": {"negs": ["n0"]},
    "no negatives": {"video_pairs": ANNOTATION["video_pairs"]},
    "pairs by name": ANNOTATION | {"video_pairs": {"a0": "a1"}},
    "three videos": ANNOTATION | {"video_pairs": [{"videos": ["a0", "a1", "a2"], "overlap": [1, 1]}]},
    "one video": ANNOTATION | {"video_pairs": [{"videos": ["a0"], "overlap": [1, 1]}]},
    "no videos": ANNOTATION | {"video_pairs": [{"overlap": [1, 1]}]},
    "overlap a word": ANNOTATION | {"video_pairs": [{"videos": ["a0", "a1"], "overlap": ["much", "all"]}]},
    "negatives a number": ANNOTATION | {"negs": 5},
    "a text": "vcdb",
}


@pytest.mark.parametrize("kind", WRONG_FORMS)
def test_an_annotation_of_another_form_is_refused_by_name(kind, tmp_path, store):
    with pytest.raises(InputError) as error:
        dataset(tmp_path, store, WRONG_FORMS[kind])
    assert "vcdb.pickle" in str(error.value) and "\n" not in str(error.value)


class Malicious:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch '{self.target}'",)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_code_in_a_pickle_is_refused_and_not_run(protocol, tmp_path, store):
    target = tmp_path / "owned"
    path = tmp_path / "vcdb.pickle"
    path.write_bytes(pickle.dumps(ANNOTATION | {"x": Malicious(target)}, protocol))
    with pytest.raises(InputError, match="vcdb.pickle"):
        VCDBPairDataset(path, store)
    assert not target.exists()
    pickle.loads(path.read_bytes())
    assert target.exists(), "the pickle was harmless, so the test above says nothing"


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_sets_in_a_pickle_are_read(protocol, tmp_path, store):
    annotation = {"video_pairs": ANNOTATION["video_pairs"], "negs": frozenset(ANNOTATION["negs"]), "x": {1, 2}}
    path = tmp_path / "vcdb.pickle"
    path.write_bytes(pickle.dumps(annotation, protocol))
    assert set(VCDBPairDataset(path, store).negatives) == {f"n{i}" for i in range(30)}


def test_a_broken_or_absent_pickle_is_refused_by_name(tmp_path, store):
    path = tmp_path / "vcdb.pickle"
    whole = pickle.dumps(ANNOTATION)
    for content in (b"", whole[:-3], whole[: len(whole) // 2], b"plain text", json.dumps(ANNOTATION).encode()):
        path.write_bytes(content)
        with pytest.raises(InputError, match="vcdb.pickle"):
            VCDBPairDataset(path, store)
    path.unlink()
    with pytest.raises(InputError, match="vcdb.pickle"):
        VCDBPairDataset(path, store)


def test_the_official_vcdb_annotation_has_its_published_counts(annotations, tmp_path):
    with open(annotations / "vcdb.pickle", "rb") as file:
        raw = pickle.load(file)
    videos = {video for pair in raw["video_pairs"] for video in pair["videos"]} | set(raw["negs"])
    frames = np.zeros((len(videos), 1), np.float16)
    path = write_packed(tmp_path / "x.hdf5", dict(zip(sorted(videos), frames[:, None], strict=True)))
    pairs = VCDBPairDataset(annotations / "vcdb.pickle", FeatureStore(path))
    assert len(pairs) == 5612 and len(pairs.negatives) == 99_176
    assert len({video for pair in pairs.pairs for video in pair}) == 528
    assert pairs.missing == {"pairs": 0, "negatives": 0}
