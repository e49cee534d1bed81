"""Training pairs: what an item draws, false negatives, augmentations, and refusals."""

import json
import multiprocessing
import os
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.feature_files import write_packed, write_pickle
from torch.utils.data import DataLoader

from batches import PairLoader, batch_indices, collate_pairs
from data import (
    AUGMENTATIONS,
    AugmentedPairDataset,
    VCDBPairDataset,
    nearest_negatives,
)
from features.on_device import FramesOnDevice
from features.store import FeatureStore
from train import own_negative_notes
from utils import InputError, seeded_rng


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Videos whose frame t holds (video number, t), so that a crop tells where it was cut."""
    names = [f"a{i}" for i in range(6)] + [f"n{i}" for i in range(30)]
    rng = np.random.default_rng(0)
    features = {}
    for i, name in enumerate(names):
        T = int(rng.integers(1, 40))
        features[name] = np.stack([np.full(T, i), np.arange(T)], 1).astype(np.float16)
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


def as_lists(item):
    index, anchor, positive, negative_ids, negatives = item
    frames = [np.asarray(x).tolist() for x in (anchor, positive, *negatives)]
    return index, negative_ids.tolist(), frames


# --- what an item draws ---


def test_item_depends_on_seed_epoch_and_pair_alone(tmp_path, store):
    options = dict(padding_size=5, neg_num=8)
    first, second = dataset(tmp_path, store, **options), dataset(tmp_path, store, **options)
    second[3], second[0]  # what was drawn before does not matter
    for i in range(len(first)):
        assert as_lists(first[i]) == as_lists(second[i]) == as_lists(first[i])
    ids = {"seed 0": first[0][3], "pair 1": first[1][3]}
    ids["seed 1"] = dataset(tmp_path, store, seed=1, **options)[0][3]
    ids["epoch 1"] = first[first.key(0, epoch=1)][3]
    assert len({tuple(values) for values in ids.values()}) == 4, ids
    assert as_lists(first[0]) == as_lists(second[0])


def test_item_is_the_same_from_workers_and_threads(tmp_path, store):
    options = dict(padding_size=5, neg_num=8, seed=3)
    plain = dataset(tmp_path, store, **options)
    expected = [as_lists(plain[i]) for i in range(len(plain))]
    threaded = dataset(tmp_path, store, readers=4, **options)
    assert [as_lists(item) for item in threaded.__getitems__(list(range(len(plain))))] == expected
    loader = DataLoader(threaded, batch_size=2, collate_fn=list, num_workers=2)
    assert [as_lists(item) for items in loader for item in items] == expected


def test_item_has_distinct_negatives_and_their_videos(tmp_path, store):
    pairs = dataset(tmp_path, store, neg_num=30)
    for i in range(len(pairs)):
        _, anchor, positive, negative_ids, negatives = pairs[i]
        assert sorted(negative_ids.tolist()) == list(range(30))
        for negative, frames in zip(negative_ids, negatives, strict=True):
            np.testing.assert_array_equal(frames, store[pairs.negatives[negative]])
        np.testing.assert_array_equal(anchor, store[pairs.pairs[i][0]])
        np.testing.assert_array_equal(positive, store[pairs.pairs[i][1]])


def test_item_draws_every_negative_in_time(tmp_path, store):
    pairs, drawn = dataset(tmp_path, store, neg_num=5), set()
    for epoch in range(30):
        drawn |= set(pairs[pairs.key(0, epoch)][3].tolist())
    assert drawn == set(range(30))


def test_pairs_without_features_are_left_out_and_counted(tmp_path, store):
    pairs = dataset(tmp_path, store)
    assert pairs.pairs == [("a0", "a1"), ("a2", "a3"), ("a4", "a5"), ("a1", "a2")]
    assert pairs.negatives == [f"n{i}" for i in range(30)]
    assert pairs.missing == {"pairs": 2, "negatives": 3}


def test_min_overlap_is_of_the_smaller_overlap(tmp_path, store):
    for bound, kept in ((0.0, 4), (0.1, 3), (0.11, 2), (0.2, 2), (0.5, 1)):
        assert len(dataset(tmp_path, store, min_overlap=bound)) == kept


@pytest.mark.parametrize("random_sampling", [False, True])
def test_padding_size_crops_longer_videos_at_random(random_sampling, tmp_path, store):
    pairs = dataset(tmp_path, store, padding_size=7, neg_num=20, random_sampling=random_sampling)
    crops = set()
    for epoch in range(20):
        for i in range(len(pairs)):
            _, anchor, positive, negative_ids, negatives = pairs[pairs.key(i, epoch)]
            names = [*pairs.pairs[i], *(pairs.negatives[n] for n in negative_ids)]
            for name, frames in zip(names, (anchor, positive, *negatives), strict=True):
                assert len(frames) == min(len(store[name]), 7)
                assert set(frames[:, 0].tolist()) == {float(store[name][0, 0])}
                times = frames[:, 1].astype(int)
                steps = np.diff(times)
                assert (steps > 0).all() and 0 <= times[0] and times[-1] < len(store[name])
                assert random_sampling or (steps == 1).all()
                crops.add((name, *times.tolist()))
    longest = max(pairs.negatives, key=lambda name: store.lengths[name])
    starts = {crop[1] for crop in crops if crop[0] == longest}
    assert len(starts) > 5  # it is cut at many crops
    if not random_sampling:
        assert max(starts) <= store.lengths[longest] - 7


def test_padding_size_0_takes_all_frames(tmp_path, store):
    _, anchor, *_ = dataset(tmp_path, store, padding_size=0)[0]
    np.testing.assert_array_equal(anchor, store["a0"])


def test_collate_keeps_every_video_with_its_id(tmp_path, store):
    pairs = dataset(tmp_path, store, neg_num=4, padding_size=9)
    items = [pairs[i] for i in (2, 0, 3)]
    indices, anchors, positives, negatives, negative_ids = collate_pairs(items)
    assert list(indices) == [2, 0, 3]
    assert negative_ids.tolist() == [n for item in items for n in item[3].tolist()]
    sides = {
        "anchors": (anchors, [item[1] for item in items]),
        "positives": (positives, [item[2] for item in items]),
        "negatives": (negatives, [video for item in items for video in item[4]]),
    }
    for (x, num_frames), videos in sides.values():
        assert x.dtype == torch.float16  # as stored
        assert num_frames.tolist() == [len(video) for video in videos]
        np.testing.assert_array_equal(x.numpy(), np.concatenate(videos))


def test_batch_indices_divide_the_shuffle_over_processes_and_leave_its_tail(tmp_path, store):
    """36 pairs, 2 processes of 5: 3 steps, 6 pairs are left."""
    pairs = AugmentedPairDataset(store, neg_num=2, seed=3)
    ranks = [SimpleNamespace(world_size=2, rank=rank) for rank in (0, 1)]
    first, second = (batch_indices(pairs, 5, dist, epoch=4) for dist in ranks)
    order = [i for own, other in zip(first, second, strict=True) for i in own + other]
    assert order == seeded_rng(3, 4).permutation(36)[:30].tolist()
    assert [len(batch) for batch in first + second] == [5] * 6
    one = SimpleNamespace(world_size=1, rank=0)
    (batch,) = batch_indices(pairs, 10, one, epoch=4, seen=20)  # resumed by one process of 10
    assert batch == order[20:30]


ONE = SimpleNamespace(world_size=1, rank=0)


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_loader_reads_the_rest_of_a_run_by_the_same_workers(tmp_path, store, num_workers, hard):
    """From the third pair of epoch 1 on, with other hard negatives in each epoch."""
    pairs = dataset(tmp_path, store, neg_num=5, padding_size=7)
    workers = set()
    with PairLoader(pairs, 1, ONE, 4, num_workers) as loader:
        for epoch, seen in ((1, 2), (2, 0), (3, 0)):
            if hard:
                pairs.hard_negatives = torch.full((4, 6), -1).index_fill_(1, torch.arange(2), epoch)
            order = seeded_rng(0, epoch).permutation(len(pairs)).tolist()[seen:]
            batches = list(loader.epoch(epoch, seen))
            assert [batch[0] for batch in batches] == [[i] for i in order]
            for i, batch in zip(order, batches, strict=True):
                assert_same_batch(batch, collate_pairs([pairs[pairs.key(i, epoch)]]))
                assert not hard or epoch in batch[4]
            workers |= {process.pid for process in multiprocessing.active_children()}
    assert len(workers) == num_workers and not multiprocessing.active_children()


def assert_same_batch(batch, expected):
    assert batch[0] == expected[0] and torch.equal(batch[4], expected[4])
    for side, other in zip(batch[1:4], expected[1:4], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(side, other, strict=True))


@pytest.mark.parametrize("random_sampling", [False, True])
def test_frames_on_a_device_are_those_of_the_host_to_the_bit(tmp_path, store, random_sampling):
    options = dict(neg_num=8, padding_size=7, random_sampling=random_sampling)
    host, device = dataset(tmp_path, store, **options), dataset(tmp_path, store, **options)
    frames = FramesOnDevice(store, [*device.negatives, *(f"a{i}" for i in range(6))], "cpu")
    device.frames = frames.numbers
    for epoch in range(3):
        keys = [host.key(i, epoch) for i in range(4)]
        indices, *sides, negative_ids = collate_pairs(device.__getitems__(keys))
        sides = [(frames.gather(x), num_frames) for x, num_frames in sides]
        expected = collate_pairs(host.__getitems__(keys))
        assert expected[1][0].dtype == sides[0][0].dtype == torch.float16
        assert_same_batch((indices, *sides, negative_ids), expected)


def test_features_larger_than_a_gpus_free_memory_are_refused(store, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 10**9))
    with pytest.raises(InputError, match="on cuda:1; give --features_on host"):
        FramesOnDevice(store, list(store), "cuda:1")


def test_hard_negatives_are_up_to_half_of_an_items(tmp_path, store):
    """Anchors a0, a2, a4, a1 have 6, 1, 0 and 2 hard negatives."""
    pairs = dataset(tmp_path, store, neg_num=5)
    known = [[3, 9, 4, 28, 11, 17], [8], [], [0, 29]]
    pairs.hard_negatives = torch.tensor([ids + [-1] * (6 - len(ids)) for ids in known])
    drawn = [set() for _ in known]
    for epoch in range(40):
        for i, ids in enumerate(known):
            negative_ids = pairs[pairs.key(i, epoch)][3].tolist()
            count = min(3, len(ids))
            assert len(set(negative_ids)) == 5 and set(negative_ids[:count]) <= set(ids)
            drawn[i] |= set(negative_ids[:count])
    assert drawn == [set(ids) for ids in known]


@pytest.mark.parametrize("count", [1, 4, 9])
def test_nearest_negatives_against_a_loop(count):
    rng = np.random.default_rng(0)
    anchors, negatives = rng.normal(size=(300, 4)), rng.normal(size=(7, 4))
    excluded = rng.random((300, 7)) < 0.4
    found = nearest_negatives(
        torch.from_numpy(anchors),
        torch.from_numpy(negatives),
        count,
        lambda rows: torch.from_numpy(excluded[rows]),
    )
    for ids, anchor, mask in zip(found.tolist(), anchors, excluded, strict=True):
        order = [i for i in np.argsort(-(negatives @ anchor)).tolist() if not mask[i]]
        assert ids == (order + [-1] * count)[:count]


# --- false negatives ---


def test_false_negatives_are_overlaps_of_one_source(tmp_path, store):
    rng = np.random.default_rng(0)
    names = [f"a{i}" for i in range(6)] + [f"n{i}" for i in range(30)]
    segments = {}
    for name in names[:-2]:  # two videos have no segments at all
        starts = rng.integers(0, 60, rng.integers(0, 4)).tolist()
        segments[name] = []
        for start in starts:
            source = f"film{rng.integers(3)}"
            segments[name].append([source, start, start + int(rng.integers(1, 15))])
    segments["n0"], segments["a0"] = [["film0", 10, 20]], [["film0", 20, 30]]  # they only touch
    annotation = ANNOTATION | {"segments": segments}
    pairs = dataset(tmp_path, store, annotation, mask_shared=True)
    indices, bank_ids = [3, 0, 1, 1], torch.tensor([5, -1, 0, 29, 28, 5, *range(30), -1])
    found = pairs.false_negative_mask(indices)(bank_ids).tolist()
    for i, row in zip(indices, found, strict=True):
        anchor = pairs.pairs[i][0]
        for negative, masked in zip(bank_ids.tolist(), row, strict=True):
            others = segments.get(pairs.negatives[negative], []) if negative >= 0 else []
            expected = any(
                source == other and max(start, a) < min(end, b)
                for source, start, end in segments.get(anchor, [])
                for other, a, b in others
            )
            assert masked == expected
    assert 0 < np.sum(found) < np.size(found)
    assert dataset(tmp_path, store, annotation).false_negative_mask(indices) is None


OWN = ANNOTATION | {"negs": ["n0", "a0", "n1", "a1", "a3", "n2", "a4", "a2", "n3"]}


def test_own_videos_of_an_anchor_are_no_negatives_of_it(tmp_path, store):
    """The anchor itself, and what it is paired with, on either side of a pair."""
    pairs = dataset(tmp_path, store, OWN, neg_num=9)
    bank_ids = torch.tensor([-1, *range(9), 4, -1])
    found = pairs.false_negative_mask(range(4))(bank_ids).tolist()
    for (anchor, _), row in zip(pairs.pairs, found, strict=True):
        copies = {anchor}
        for pair in pairs.pairs:
            copies.update(pair if anchor in pair else ())
        expected = [i >= 0 and OWN["negs"][i] in copies for i in bank_ids.tolist()]
        assert row == expected and any(row)
    assert set(pairs.own_negatives) == {"a0", "a1", "a2", "a4"}
    found = pairs.false_negatives_of_anchors(slice(0, 1)).tolist()  # for hard negatives
    assert found == [[video in ("a0", "a1") for video in OWN["negs"]]]


def test_own_negatives_are_masked_beside_shared_material(tmp_path, store):
    """A film that n1 shares with a0; a0 has no segment in common with its copy a1."""
    segments = {"a0": [["film", 0, 5]], "n1": [["film", 4, 9]], "a1": [["film", 20, 30]]}
    pairs = dataset(tmp_path, store, OWN | {"segments": segments}, neg_num=4, mask_shared=True)
    masked = pairs.false_negatives("a0").nonzero().flatten().tolist()
    assert [OWN["negs"][i] for i in masked] == ["a0", "n1", "a1"]


def test_pairs_of_a_video_with_itself_are_left_out_and_counted(tmp_path, store):
    twice = [{"videos": ["a1", "a1"]}, *ANNOTATION["video_pairs"], {"videos": ["a0", "a0"]}]
    pairs = dataset(tmp_path, store, ANNOTATION | {"video_pairs": twice})
    plain = dataset(tmp_path, store)
    assert pairs.pairs == plain.pairs and pairs.digest == plain.digest
    assert (pairs.self_pairs, plain.self_pairs) == (2, 0)
    assert as_lists(pairs[2]) == as_lists(plain[2])


def test_run_summary_counts_own_negatives_and_self_pairs(tmp_path, store):
    args = SimpleNamespace(pairs="vcdb")
    assert own_negative_notes(args, dataset(tmp_path, store)) == []
    twice = OWN["video_pairs"] + [{"videos": ["a1", "a1"]}]
    pairs = dataset(tmp_path, store, OWN | {"video_pairs": twice}, neg_num=4)
    first, second = own_negative_notes(args, pairs)
    assert "1 pairs of a video with itself" in first
    assert "4 anchors (a0, a2, a4, ...)" in second
    augmented = AugmentedPairDataset(store, neg_num=4)
    assert own_negative_notes(SimpleNamespace(pairs="augment"), augmented) == []
    assert augmented.false_negatives("a1").nonzero().tolist() == [[1]]


def test_mask_shared_without_segments_is_refused(tmp_path, store):
    with pytest.raises(InputError, match="segments.*--mask_shared"):
        dataset(tmp_path, store, mask_shared=True)


def test_mask_shared_refuses_broken_segments_of_an_anchor_too(tmp_path, store):
    annotation = ANNOTATION | {"segments": {"n0": [["film", 0, 1]], "a4": [["film", "soon", 1]]}}
    with pytest.raises(InputError, match="segments are not.*; see those of 'a4'$"):
        dataset(tmp_path, store, annotation, neg_num=4, mask_shared=True)


# --- annotations ---


def test_annotation_with_too_few_videos_is_refused_with_the_counts(tmp_path, store):
    with pytest.raises(InputError, match="vcdb.pickle.*ids"):
        dataset(
            tmp_path, store, {"video_pairs": [{"videos": ["x", "y"]}], "negs": ["n0"]}, neg_num=1
        )
    with pytest.raises(
        InputError, match="30 of 33 negatives.*31.*see to the ids, or lower --neg_n"
    ):
        dataset(tmp_path, store, neg_num=31)
    agreeing = {"video_pairs": [{"videos": ["a0", "a1"], "overlap": [0.2, 0.9]}], "negs": ["n0"]}
    with pytest.raises(InputError, match="; lower --neg_num, or give more videos$"):
        dataset(tmp_path, store, agreeing, neg_num=2)
    with pytest.raises(InputError, match="; lower --min_overlap, or give more videos$"):
        dataset(tmp_path, store, agreeing, neg_num=1, min_overlap=0.5)
    with pytest.raises(InputError, match="; lower --neg_num, or give more videos$"):
        AugmentedPairDataset(store, neg_num=len(store))


WRONG_FORMS = {
    "a list": [1, 2],
    "no pairs": {"negs": ["n0"]},
    "no negatives": {"video_pairs": ANNOTATION["video_pairs"]},
    "pairs by name": ANNOTATION | {"video_pairs": {"a0": "a1"}},
    "negatives a number": ANNOTATION | {"negs": 5},
    "a text": "vcdb",
}
WRONG_PAIRS = {
    "three videos": {"videos": ["a0", "a1", "a2"], "overlap": [1, 1]},
    "one video": {"videos": ["a0"], "overlap": [1, 1]},
    "no videos": {"overlap": [1, 1]},
    "overlap a word": {"videos": ["a0", "a1"], "overlap": ["much", "all"]},
}
for name, pair in WRONG_PAIRS.items():
    WRONG_FORMS[name] = ANNOTATION | {"video_pairs": [pair]}


@pytest.mark.parametrize("kind", WRONG_FORMS)
def test_annotation_of_another_form_is_refused_by_name(kind, tmp_path, store):
    with pytest.raises(InputError) as error:
        dataset(tmp_path, store, WRONG_FORMS[kind])
    assert "vcdb.pickle" in str(error.value) and "\n" not in str(error.value)
    assert "Error" not in str(error.value)  # Python's name of what went wrong tells users nothing


@pytest.mark.parametrize("kind", WRONG_PAIRS)
def test_pair_of_another_form_is_named(kind, tmp_path, store):
    pairs = [ANNOTATION["video_pairs"][0], WRONG_PAIRS[kind]]
    with pytest.raises(InputError, match=r"its video_pairs\[1\] is missing or not as in"):
        dataset(tmp_path, store, ANNOTATION | {"video_pairs": pairs})


class Malicious:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch '{self.target}'",)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickle_with_code_is_refused_and_not_run(protocol, tmp_path, store):
    target = tmp_path / "owned"
    path = tmp_path / "vcdb.pickle"
    path.write_bytes(pickle.dumps(ANNOTATION | {"x": Malicious(target)}, protocol))
    with pytest.raises(InputError, match="vcdb.pickle"):
        VCDBPairDataset(path, store)
    assert not target.exists()
    pickle.loads(path.read_bytes())
    assert target.exists(), "the pickle is harmless, so the refusal above proves nothing"


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickle_with_sets_is_read(protocol, tmp_path, store):
    annotation = {
        "video_pairs": ANNOTATION["video_pairs"],
        "negs": frozenset(ANNOTATION["negs"]),
        "x": {1, 2},
    }
    path = tmp_path / "vcdb.pickle"
    path.write_bytes(pickle.dumps(annotation, protocol))
    assert set(VCDBPairDataset(path, store).negatives) == {f"n{i}" for i in range(30)}


def test_pickle_broken_or_absent_is_refused_by_name(tmp_path, store):
    path = tmp_path / "vcdb.pickle"
    whole = pickle.dumps(ANNOTATION)
    for content in (
        b"",
        whole[:-3],
        whole[: len(whole) // 2],
        b"plain text",
        b"-",  # an unknown code: Python's KeyError holds its number alone
        json.dumps(ANNOTATION).encode(),
    ):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"vcdb.pickle.* \(\D"):
            VCDBPairDataset(path, store)
    path.unlink()
    with pytest.raises(InputError, match="vcdb.pickle"):
        VCDBPairDataset(path, store)


def test_official_vcdb_annotation_has_its_published_counts(annotations, tmp_path):
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


def test_negatives_given_as_a_set_have_one_order_for_every_hash_seed(tmp_path, store):
    annotation = ANNOTATION | {"negs": set(ANNOTATION["negs"])}
    negatives = dataset(tmp_path, store, annotation, neg_num=4).negatives
    assert negatives == sorted(f"n{i}" for i in range(30))


# --- positives from a video's own frames ---


def check_crop(frames, out, times):
    assert times == list(range(times[0], times[0] + len(times)))
    assert len(times) >= max(1, int(0.3 * len(frames)))


def check_shuffle(frames, out, times):
    assert sorted(times) == list(range(len(frames)))
    assert sum(b != a + 1 for a, b in zip(times, times[1:], strict=False)) <= 3


def check_drop(frames, out, times):
    assert times == sorted(set(times))


def check_speed(frames, out, times):
    T = len(frames)
    assert times == sorted(times) and T / 2 - 1 <= len(times) <= 2 * T + 1


def check_noise(frames, out, times):
    assert out.shape == frames.shape


def check_mask(frames, out, times):
    zero = (out == 0).all(0)
    assert (out[:, ~zero] == frames[:, ~zero]).all() and zero.sum() <= 40


CHECKS = {
    "crop": check_crop,
    "shuffle": check_shuffle,
    "drop": check_drop,
    "speed": check_speed,
    "noise": check_noise,
    "mask": check_mask,
}


@pytest.mark.parametrize("T", [1, 2, 9, 300])
@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_augmentation_makes_its_own_kind_of_change(name, T):
    """Channel 0 holds the frame's time."""
    frames = np.stack([np.arange(T), np.full(T, 7), *np.ones((62, T))], 1).astype(np.float16)
    before, results = frames.copy(), set()
    for seed in range(40):
        out = AUGMENTATIONS[name](frames, seeded_rng(seed))
        assert out.shape[1] == 64 and len(out) >= 1 and np.isfinite(out).all()
        times = out[:, 0].astype(int).tolist()
        if name not in ("noise", "mask"):  # the video's own frames
            assert all((row == frames[t]).all() for row, t in zip(out, times, strict=True))
        CHECKS[name](frames, out, times)
        results.add(out.tobytes())
    np.testing.assert_array_equal(frames, before)
    assert T < 3 or len(results) > 5


def test_augmented_pairs_need_no_annotation_and_no_video_is_its_own_negative(store):
    pairs = AugmentedPairDataset(store, neg_num=35, padding_size=7)
    assert len(pairs) == 36 and pairs.missing == {"pairs": 0, "negatives": 0}
    for i in (0, 17, 35):
        _, anchor, positive, negative_ids, negatives = pairs[i]
        assert sorted(negative_ids.tolist()) == [n for n in range(36) if n != i]
        assert len(anchor) <= 7 and len(positive) <= 7
        assert (anchor[:, 0] == store[pairs.pairs[i][0]][0, 0]).all()
        for n, frames in zip(negative_ids, negatives, strict=True):
            assert frames[0, 0] == store[pairs.negatives[n]][0, 0]
    mask = pairs.false_negative_mask([5, 0])(torch.tensor([5, -1, 0, 5, 7]))
    assert mask.tolist() == [
        [True, False, False, True, False],
        [False, False, True, False, False],
    ]
    with pytest.raises(InputError, match="36 of 36.*36 others.*--neg_num"):
        AugmentedPairDataset(store, neg_num=36)


def test_augmented_pairs_of_a_list_of_ids(tmp_path, store):
    path = tmp_path / "ids.txt"
    path.write_text("n3\na1\n\nn3\ngone\nn4\n")
    pairs = AugmentedPairDataset(store, path, neg_num=2)
    assert pairs.negatives == ["n3", "a1", "n4"] and pairs.missing["pairs"] == 1
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="ids.txt"):
        AugmentedPairDataset(store, path)
    with pytest.raises(InputError, match="absent.txt"):
        AugmentedPairDataset(store, tmp_path / "absent.txt")


def test_augmented_pairs_of_an_annotation_may_mask_shared_material(tmp_path, store):
    segments = {"a0": [["film", 0, 10]], "n0": [["film", 5, 9]], "n1": [["film", 10, 12]]}
    annotation = {"video_pairs": [], "negs": ["a0", "n0", "n1"], "segments": segments}
    path = write_pickle(tmp_path / "own.pickle", annotation)
    bank_ids = torch.tensor([0, 1, 2, -1])
    masked = AugmentedPairDataset(store, path, neg_num=1, mask_shared=True)
    plain = AugmentedPairDataset(store, path, neg_num=1)
    assert masked.false_negative_mask([0])(bank_ids).tolist() == [[True, True, False, False]]
    assert plain.false_negative_mask([0])(bank_ids).tolist() == [[True, False, False, False]]


def test_augmented_item_depends_on_seed_epoch_and_pair_alone(store):
    first, second = (AugmentedPairDataset(store, neg_num=3, seed=4) for _ in range(2))
    second[9]  # what was drawn before does not matter
    assert all(as_lists(first[i]) == as_lists(second[i]) for i in range(36))
    positives = {tuple(first[0][2].ravel().tolist())}
    for epoch in range(1, 6):
        positives.add(tuple(first[first.key(0, epoch)][2].ravel().tolist()))
    assert len(positives) > 3
