"""Training pairs: draws that depend on seed, epoch and pair alone, masks, and refusals."""

import json
import os
import pickle

import numpy as np
import pytest
import torch
from helpers.files import write_packed, write_pickle
from torch.utils.data import DataLoader

from data import AUGMENTATIONS, AugmentedPairDataset, VCDBPairDataset, collate_pairs
from features.store import FeatureStore
from utils import InputError, seeded_rng


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Videos whose frame t holds (video number, t), so that a crop tells where it was cut."""
    names = [f"a{i}" for i in range(6)] + [f"n{i}" for i in range(30)]
    draw = np.random.default_rng(0)
    features = {
        name: np.stack([np.full(T := int(draw.integers(1, 40)), i), np.arange(T)], 1).astype(
            np.float16
        )
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


def test_an_item_is_the_same_for_the_same_seed_epoch_and_pair_and_another_otherwise(
    tmp_path, store
):
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
        assert (
            num_frames.tolist() == list(map(len, videos)) and x.dtype == torch.float16
        )  # as stored, without padding
        np.testing.assert_array_equal(x.numpy(), np.concatenate(videos))


def test_shares_is_true_where_intervals_of_one_source_overlap_and_nowhere_else(tmp_path, store):
    draw = np.random.default_rng(0)
    names = [f"a{i}" for i in range(6)] + [f"n{i}" for i in range(30)]
    segments = {}
    for name in names[:-2]:  # two videos have no segments at all
        starts = draw.integers(0, 60, draw.integers(0, 4)).tolist()
        segments[name] = [
            [f"film{draw.integers(3)}", start, start + int(draw.integers(1, 15))]
            for start in starts
        ]
    segments["n0"], segments["a0"] = (
        [["film0", 10, 20]],
        [["film0", 20, 30]],
    )  # touching is not sharing
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
        dataset(
            tmp_path, store, {"video_pairs": [{"videos": ["x", "y"]}], "negs": ["n0"]}, neg_num=1
        )
    with pytest.raises(InputError, match="30 of 33 negatives.*31"):
        dataset(tmp_path, store, neg_num=31)


WRONG_FORMS = {
    "a list": [1, 2],
    "no pairs": {"negs": ["n0"]},
    "no negatives": {"video_pairs": ANNOTATION["video_pairs"]},
    "pairs by name": ANNOTATION | {"video_pairs": {"a0": "a1"}},
    "three videos": ANNOTATION
    | {"video_pairs": [{"videos": ["a0", "a1", "a2"], "overlap": [1, 1]}]},
    "one video": ANNOTATION | {"video_pairs": [{"videos": ["a0"], "overlap": [1, 1]}]},
    "no videos": ANNOTATION | {"video_pairs": [{"overlap": [1, 1]}]},
    "overlap a word": ANNOTATION
    | {"video_pairs": [{"videos": ["a0", "a1"], "overlap": ["much", "all"]}]},
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
    annotation = {
        "video_pairs": ANNOTATION["video_pairs"],
        "negs": frozenset(ANNOTATION["negs"]),
        "x": {1, 2},
    }
    path = tmp_path / "vcdb.pickle"
    path.write_bytes(pickle.dumps(annotation, protocol))
    assert set(VCDBPairDataset(path, store).negatives) == {f"n{i}" for i in range(30)}


def test_a_broken_or_absent_pickle_is_refused_by_name(tmp_path, store):
    path = tmp_path / "vcdb.pickle"
    whole = pickle.dumps(ANNOTATION)
    for content in (
        b"",
        whole[:-3],
        whole[: len(whole) // 2],
        b"plain text",
        json.dumps(ANNOTATION).encode(),
    ):
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
    path = write_packed(
        tmp_path / "x.hdf5", dict(zip(sorted(videos), frames[:, None], strict=True))
    )
    pairs = VCDBPairDataset(annotations / "vcdb.pickle", FeatureStore(path))
    assert len(pairs) == 5612 and len(pairs.negatives) == 99_176
    assert len({video for pair in pairs.pairs for video in pair}) == 528
    assert pairs.missing == {"pairs": 0, "negatives": 0}


# --- positives from a video's own frames -----------------------------------------------------------------------------


@pytest.mark.parametrize("T", [1, 2, 9, 300])
@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_an_augmentation_gives_frames_of_the_same_width_and_its_own_kind_of_change(name, T):
    frames = np.stack([np.arange(T), np.full(T, 7), *np.ones((62, T))], 1).astype(np.float16)
    before, results = frames.copy(), []
    for seed in range(40):
        out = AUGMENTATIONS[name](frames, seeded_rng(seed))
        assert out.shape[1] == 64 and len(out) >= 1 and np.isfinite(out).all()
        results.append(out)
        times = out[:, 0].astype(int).tolist()
        if name in ("crop", "shuffle", "drop", "speed"):
            assert all(
                (row == frames[t]).all() for row, t in zip(out, times, strict=True)
            )  # the video's own frames
        if name == "crop":
            assert times == list(range(times[0], times[0] + len(times))) and len(times) >= max(
                1, int(0.3 * T)
            )
        if name == "shuffle":
            assert (
                sorted(times) == list(range(T))
                and sum(b != a + 1 for a, b in zip(times, times[1:], strict=False)) <= 3
            )
        if name == "drop":
            assert times == sorted(set(times))
        if name == "speed":
            assert times == sorted(times) and T / 2 - 1 <= len(times) <= 2 * T + 1
        if name == "mask":
            zero = (out == 0).all(0)
            assert (out[:, ~zero] == frames[:, ~zero]).all() and zero.sum() <= 40
        if name == "noise":
            assert out.shape == frames.shape
    np.testing.assert_array_equal(frames, before)
    assert T < 3 or len({out.tobytes() for out in results}) > 5


def own(store, path=None, **options):
    return AugmentedPairDataset(store, path, **options)


def test_augmented_pairs_need_no_annotation_and_a_video_is_never_its_own_negative(tmp_path, store):
    pairs = own(store, neg_num=35, padding_size=7)
    assert len(pairs) == 36 and pairs.missing == {"pairs": 0, "negatives": 0}
    for i in (0, 17, 35):
        index, anchor, positive, numbers, negatives = pairs[i]
        assert (
            sorted(numbers.tolist()) == [n for n in range(36) if n != i]
            and len(anchor) <= 7
            and len(positive) <= 7
        )
        video = pairs.pairs[i][0]
        assert (anchor[:, 0] == store[video][0, 0]).all()
        for n, frames in zip(numbers, negatives, strict=True):
            assert frames[0, 0] == store[pairs.negatives[n]][0, 0]
    numbers = torch.tensor([5, -1, 0, 5, 7])
    assert pairs.shares([5, 0])(numbers).tolist() == [
        [True, False, False, True, False],
        [False, False, True, False, False],
    ]
    with pytest.raises(InputError, match="36 of 36.*36 others.*--neg_num"):
        own(store, neg_num=36)


def test_an_id_list_or_an_annotation_names_the_own_videos(tmp_path, store):
    text = tmp_path / "ids.txt"
    text.write_text("n3\na1\n\nn3\ngone\nn4\n")
    listed = own(store, text, neg_num=2)
    assert listed.negatives == ["n3", "a1", "n4"] and listed.missing["pairs"] == 1
    segments = {"a0": [["film", 0, 10]], "n0": [["film", 5, 9]], "n1": [["film", 10, 12]]}
    path = write_pickle(
        tmp_path / "own.pickle",
        {"video_pairs": [], "negs": ["a0", "n0", "n1"], "segments": segments},
    )
    masked, plain = own(store, path, neg_num=1, mask_shared=True), own(store, path, neg_num=1)
    numbers = torch.tensor([0, 1, 2, -1])
    assert masked.shares([0])(numbers).tolist() == [[True, True, False, False]]
    assert plain.shares([0])(numbers).tolist() == [[True, False, False, False]]
    text.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="ids.txt"):
        own(store, text)
    with pytest.raises(InputError, match="absent.txt"):
        own(store, tmp_path / "absent.txt")


def test_augmented_items_are_the_same_on_a_resumed_run_and_others_in_another_epoch(store):
    first, second = own(store, neg_num=3, seed=4), own(store, neg_num=3, seed=4)
    second[9]
    assert all(flat(first[i]) == flat(second[i]) for i in range(36))
    positives = {tuple(first[0][2].ravel().tolist())}
    for epoch in range(1, 6):
        first.set_epoch(epoch)
        positives.add(tuple(first[0][2].ravel().tolist()))
    assert len(positives) > 3


def test_negatives_given_as_a_set_have_one_order_whatever_the_hash_seed(tmp_path, store):
    annotation = ANNOTATION | {"negs": set(ANNOTATION["negs"])}
    assert dataset(tmp_path, store, annotation, neg_num=4).negatives == sorted(
        {f"n{i}" for i in range(30)}
    )


def test_segments_of_an_anchor_that_are_no_segments_are_refused_at_once(tmp_path, store):
    annotation = ANNOTATION | {"segments": {"n0": [["film", 0, 1]], "a4": [["film", "soon", 1]]}}
    with pytest.raises(InputError, match="segments are not"):
        dataset(tmp_path, store, annotation, neg_num=4).shares([0])
