"""Descriptors of a collection, and their cache: what encoding one video at a time gives."""

import numpy as np
import pytest
import torch
from helpers.encoders import encode_one_by_one, untrained_tca
from helpers.feature_files import folder_contents, write_ours, write_released
from helpers.threads import run_in_threads
from helpers.worlds import C

from distributed import Distributed
from features.store import FeatureStore
from model import TCA, Mean, NetVLAD
from retrieval.encode import (
    VideoEncoder,
    cache_descriptors,
    crop,
    encode_collection,
    encode_distributed,
    level_of,
    levels_of,
)

LEVELS = ["video", "frame"]


@pytest.fixture
def store(world):
    return FeatureStore(world.test_features)


# --- encoding -----------------------------------------------------------------------------------


def test_crop_takes_the_middle():
    frames = np.arange(10)
    assert crop(frames, 4).tolist() == [3, 4, 5, 6]
    assert crop(frames, 5).tolist() == [2, 3, 4, 5, 6]


@pytest.mark.parametrize("padding_size", [0, 10, 300])
def test_crop_keeps_short_videos_whole(padding_size):
    assert crop(np.arange(10), padding_size).tolist() == list(range(10))


def test_levels_of_metrics_and_encoders():
    assert [level_of(metric) for metric in ("euclidean", "tn")] == ["video", "frame"]
    assert list(levels_of(TCA(C, 4))) == LEVELS
    assert list(levels_of(NetVLAD(C, 4, 16))) == ["video"]


@pytest.mark.parametrize("padding_size", [0, 5, 300])
@pytest.mark.parametrize("level", LEVELS)
def test_video_encoder_equals_one_video_at_a_time(store, level, padding_size):
    encoder = untrained_tca(3)
    video_encoder = VideoEncoder(encoder, store, padding_size, batch_frames=100)
    expected = encode_one_by_one(encoder, store, list(store), level, padding_size)
    seen = set()
    for batch in video_encoder.batches(store):
        data, lengths = video_encoder(batch, [level])[level]
        assert data.dtype == torch.float32
        for video, rows in zip(batch, data.split(lengths), strict=True):
            alone = expected[video] if level == "frame" else expected[video][None]
            np.testing.assert_allclose(rows.numpy(), alone, atol=1e-5)
            seen.add(video)
    assert seen == set(store)


def test_video_encoder_gives_both_levels_from_one_pass(store):
    video_encoder = VideoEncoder(untrained_tca(3), store)
    batch = next(video_encoder.batches(store))
    both = video_encoder(batch, LEVELS)
    for level in LEVELS:
        data, lengths = video_encoder(batch, [level])[level]
        assert lengths == both[level].lengths
        torch.testing.assert_close(both[level].data, data, atol=1e-6, rtol=0)


@pytest.mark.parametrize("batch_frames", [1, 40, 8192])
def test_batches_hold_every_video_once_within_their_size(world, store, batch_frames):
    video_encoder = VideoEncoder(Mean(C), store, batch_frames=batch_frames)
    videos = world.test.database[::-1]
    batches = list(video_encoder.batches([*videos, *videos[:3]]))
    assert sorted(video for batch in batches for video in batch) == world.test.database
    for batch in batches:
        padded = len(batch) * max(store.lengths[video] for video in batch)
        assert padded <= batch_frames or len(batch) == 1


def test_encode_distributed_follows_the_order_of_the_videos(store):
    encoder = untrained_tca(3)
    videos = sorted(store, key=lambda video: video[::-1])
    rows = encode_distributed(encoder, store, videos, 300, "cpu", Distributed())
    expected = encode_one_by_one(encoder, store, videos, "video")
    assert rows.shape == (len(videos), C)
    for video, row in zip(videos, rows, strict=True):
        np.testing.assert_allclose(row.numpy(), expected[video], atol=1e-5)


@pytest.mark.parametrize("world_size", [2, 3])
def test_encode_distributed_is_the_same_to_the_bit_for_any_number_of_processes(store, world_size):
    encoder, videos = untrained_tca(3), list(store)

    def encode(dist):
        return encode_distributed(encoder, store, videos, 300, "cpu", dist)

    expected = encode(Distributed())
    for rows in run_in_threads(world_size, encode):
        assert torch.equal(rows, expected)


def test_encode_collection_yields_every_round_on_every_process(store):
    encoder, levels = untrained_tca(3), ["video", "frame"]

    def encode(dist):
        video_encoder = VideoEncoder(encoder, store, batch_frames=100)
        batches = list(video_encoder.batches(store))
        rounds = list(encode_collection(video_encoder, batches, levels, dist))
        assert len(rounds) == -(-len(batches) // dist.world_size) > 2
        found = {}
        for videos, descriptors in rounds:
            for level in levels:
                data, lengths = descriptors[level]
                for video, rows in zip(videos, data.split(lengths), strict=True):
                    found[video, level] = rows
        return found

    expected = encode(Distributed())
    assert {video for video, _ in expected} == set(store)
    for found in run_in_threads(3, encode):
        assert found.keys() == expected.keys()
        for key, rows in found.items():
            assert torch.equal(rows, expected[key])


def test_encode_collection_ends_all_processes_on_an_error_of_one(world, tmp_path, capsys):
    features = dict(world.test.features)
    broken = list(features)[-1]
    features[broken] = np.full_like(features[broken], np.nan)
    store = FeatureStore(write_released(tmp_path / "nan.hdf5", features))

    def encode(dist):
        video_encoder = VideoEncoder(Mean(C), store, batch_frames=100)
        batches = list(video_encoder.batches(store))
        with pytest.raises(SystemExit):
            list(encode_collection(video_encoder, batches, ["video"], dist))

    run_in_threads(2, encode)
    (line,) = capsys.readouterr().err.splitlines()
    assert broken in line


# --- the cache ----------------------------------------------------------------------------------


class StoppingEncoder(VideoEncoder):
    """Encodes `allowed` batches, then stops as a killed run does."""

    def __init__(self, *arguments, allowed=0, **options):
        super().__init__(*arguments, **options)
        self.allowed = allowed

    def encode(self, features, levels):
        if not self.allowed:
            raise KeyboardInterrupt
        self.allowed -= 1
        return super().encode(features, levels)


def test_cached_descriptors_equal_fresh_ones_without_encoding(world, store, tmp_path):
    encoder, videos = untrained_tca(3), world.test.database
    video_encoder = VideoEncoder(encoder, store)
    cache_descriptors(video_encoder, videos, LEVELS, tmp_path)
    cached = cache_descriptors(StoppingEncoder(encoder, store), videos, LEVELS, tmp_path)
    for batch in cached.batches(videos):
        fresh, stored = video_encoder(batch, LEVELS), cached(batch, LEVELS)
        for level in LEVELS:
            assert stored[level].lengths == fresh[level].lengths
            assert stored[level].data.equal(fresh[level].data)


def test_cache_of_several_processes_equals_that_of_one(world, store, tmp_path):
    encoder = untrained_tca(3)

    def cache(dist, folder="many"):
        video_encoder = VideoEncoder(encoder, store, batch_frames=100)
        cache_descriptors(video_encoder, world.test.database, LEVELS, tmp_path / folder, dist)

    run_in_threads(3, cache)
    cache(Distributed(), "one")
    assert folder_contents(tmp_path / "many") == folder_contents(tmp_path / "one")


def test_cache_is_not_used_for_other_weights_settings_features_or_videos(world, store, tmp_path):
    features, videos = world.test.features, world.test.database
    negated = {video: -rows for video, rows in features.items()}
    reordered = {}  # alike at both ends of every video
    for video, rows in features.items():
        rows = np.concatenate([rows[:1], rows[-2:0:-1], rows[-1:]])
        reordered[video] = rows[: len(features[video])]
    negated = FeatureStore(write_released(tmp_path / "negated.hdf5", negated))
    reordered = FeatureStore(write_released(tmp_path / "reordered.hdf5", reordered))
    more_heads = TCA(C, 8, 1, 64)
    more_heads.load_state_dict(untrained_tca(3).state_dict())
    cases = [
        (VideoEncoder(untrained_tca(3), store), videos),
        (VideoEncoder(untrained_tca(4), store), videos),
        (VideoEncoder(more_heads, store), videos),
        (VideoEncoder(untrained_tca(3), negated), videos),
        (VideoEncoder(untrained_tca(3), reordered), videos),
        (VideoEncoder(untrained_tca(3), store, padding_size=5), videos),
        (VideoEncoder(untrained_tca(3), store, amp=torch.bfloat16), videos),
        (VideoEncoder(untrained_tca(3), store), videos[1:]),
    ]
    for number, (video_encoder, some) in enumerate(cases, 1):
        cache_descriptors(video_encoder, some, ["video"], tmp_path / "cache")
        assert len(folder_contents(tmp_path / "cache")) == number


def test_cache_resumes_after_a_kill(world, store, tmp_path):
    encoder, videos = untrained_tca(3), world.test.database

    def cache(folder, **options):
        video_encoder = StoppingEncoder(encoder, store, batch_frames=100, **options)
        cache_descriptors(video_encoder, videos, LEVELS, tmp_path / folder)

    total = len(list(VideoEncoder(encoder, store, batch_frames=100).batches(videos)))
    assert total > 4
    with pytest.raises(KeyboardInterrupt):
        cache("killed", allowed=3)
    cache("killed", allowed=total - 3)
    cache("whole", allowed=total)
    assert folder_contents(tmp_path / "killed") == folder_contents(tmp_path / "whole")


def test_caches_of_earlier_revisions_are_found_again(tmp_path):
    """A cache is named by this digest, which was taken at the revision that first wrote caches.

    It changes with names of module classes, and with their attributes.
    """
    rows = np.arange(3 * 32, dtype=np.float16).reshape(3, 32)
    path = write_ours(tmp_path / "features.hdf5", {"one": rows, "two": rows[:2] + 1})
    encoder = TCA(32, 4, 1, 64)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.fill_(0.5)
    assert VideoEncoder(encoder, FeatureStore(path)).identity() == "debe0196b716aa7e"
