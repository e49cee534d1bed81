"""Descriptors, their cache, and tables by one or two stages: what one video at a time would give."""

import numpy as np
import pytest
import torch
from helpers.encoders import untrained_tca
from helpers.files import folder_contents, write_released
from helpers.worlds import C

from features.store import FeatureStore
from model import LSTM, TCA, Mean
from retrieval.compare import Comparison, compare_collections, shortlist, two_stage
from retrieval.encode import VideoEncoder, cache_descriptors, crop, describe

METRICS = ["cosine", "euclidean", "chamfer", "sym_chamfer"]

# --- describing ------------------------------------------------------------------------------------------------------


def test_crop_takes_the_middle_and_0_takes_all():
    frames = np.arange(10)
    assert crop(frames, 4).tolist() == [3, 4, 5, 6] and crop(frames, 5).tolist() == [2, 3, 4, 5, 6]
    assert (
        crop(frames, 10).tolist()
        == crop(frames, 0).tolist()
        == crop(frames, 300).tolist()
        == frames.tolist()
    )


@pytest.mark.parametrize("padding_size", [0, 5, 300])
def test_describing_in_batches_equals_one_video_at_a_time_in_the_order_asked_for(
    world, padding_size
):
    store, encoder = FeatureStore(world.test_features), untrained_tca(3)
    videos = sorted(store, key=lambda video: video[::-1])
    for video_level in (True, False):
        found = describe(encoder, store, videos, video_level, padding_size)
        for video, ours in zip(videos, found, strict=True):
            x = torch.from_numpy(crop(store[video], padding_size))[None]
            with torch.no_grad():
                alone = (encoder if video_level else encoder.encode)(x, torch.tensor([x.shape[1]]))[
                    0
                ]
            np.testing.assert_allclose(ours, alone.numpy(), atol=1e-5)


class Refusing(VideoEncoder):
    """Describes `allowed` batches, then stops as a killed run does."""

    def __init__(self, *arguments, allowed=0, **options):
        super().__init__(*arguments, **options)
        self.allowed = allowed

    def __call__(self, videos, levels):
        if not self.allowed:
            raise KeyboardInterrupt
        self.allowed -= 1
        return super().__call__(videos, levels)


@pytest.mark.parametrize("encoder", [TCA(C, 4, 2, 64), LSTM(C, 16)], ids=["tca", "lstm"])
def test_all_metrics_of_both_levels_take_one_encoding_pass(world, encoder):
    store, frames = FeatureStore(world.test_features), 0

    def count(module, inputs):
        nonlocal frames
        frames += inputs[0].shape[0] * inputs[0].shape[1] if inputs[0].ndim == 3 else len(inputs[0])

    (
        encoder.transformer_encoder.layers[0].linear1 if isinstance(encoder, TCA) else encoder.bn1
    ).register_forward_pre_hook(count)
    torch.backends.mha.set_fastpath_enabled(False)  # it passes the hooks by
    queries = list(world.test.labels)
    both = compare_collections(encoder, store, queries, world.test.database, METRICS)
    torch.backends.mha.set_fastpath_enabled(True)
    given = sum(store.lengths[video] for video in [*queries, *world.test.database])
    assert (
        given <= frames <= 1.25 * given + 1
    )  # the padding of batches of like length, and the frame that asks for the level
    for level in ("cosine", "euclidean"), ("chamfer", "sym_chamfer"):
        for metric, table in compare_collections(
            encoder, store, queries, world.test.database, level
        ).items():
            np.testing.assert_allclose(both[metric], table, atol=2e-6)


def test_batches_hold_every_video_once_whatever_their_size(world):
    store = FeatureStore(world.test_features)
    for frames in (1, 40, 8192):
        batches = list(
            VideoEncoder(Mean(C), store, frames=frames).batches(world.test.database[::-1])
        )
        assert sorted(video for batch in batches for video in batch) == world.test.database
        padded = [len(batch) * max(store.lengths[video] for video in batch) for batch in batches]
        assert all(
            size <= frames or len(batch) == 1 for size, batch in zip(padded, batches, strict=True)
        )


# --- the cache -------------------------------------------------------------------------------------------------------


def test_cached_descriptors_are_those_of_the_encoder_and_cost_no_encoding(world, tmp_path):
    store, encoder, videos = (
        FeatureStore(world.test_features),
        untrained_tca(3),
        world.test.database,
    )
    levels = ["video", "frame"]
    cache_descriptors(VideoEncoder(encoder, store), videos, levels, tmp_path)
    again = cache_descriptors(Refusing(encoder, store), videos, levels, tmp_path)
    for batch in again.batches(videos):
        fresh, kept = VideoEncoder(encoder, store)(batch, levels), again(batch, levels)
        for level in levels:
            assert kept[level].lengths == fresh[level].lengths and kept[level].data.equal(
                fresh[level].data
            )


def test_a_cache_is_not_used_for_other_weights_settings_features_or_videos(world, tmp_path):
    store, videos = FeatureStore(world.test_features), world.test.database
    other = FeatureStore(
        write_released(tmp_path / "x.hdf5", {v: -rows for v, rows in world.test.features.items()})
    )
    shuffled = {
        v: np.concatenate([rows[:1], rows[-2:0:-1], rows[-1:]])[: len(rows)]
        for v, rows in world.test.features.items()
    }
    shuffled = FeatureStore(
        write_released(tmp_path / "y.hdf5", shuffled)
    )  # alike at both ends of every video
    heads = TCA(C, 8, 1, 64)
    heads.load_state_dict(untrained_tca(3).state_dict())
    given = [
        (VideoEncoder(untrained_tca(3), store), videos),
        (VideoEncoder(untrained_tca(4), store), videos),
        (VideoEncoder(heads.eval(), store), videos),
        (VideoEncoder(untrained_tca(3), other), videos),
        (VideoEncoder(untrained_tca(3), shuffled), videos),
        (VideoEncoder(untrained_tca(3), store, padding_size=5), videos),
        (VideoEncoder(untrained_tca(3), store, amp=torch.bfloat16), videos),
        (VideoEncoder(untrained_tca(3), store), videos[1:]),
    ]
    for number, (video_encoder, some) in enumerate(given, 1):
        cache_descriptors(video_encoder, some, ["video"], tmp_path / "cache")
        assert len(folder_contents(tmp_path / "cache")) == number


def test_a_killed_run_leaves_what_the_next_one_needs(world, tmp_path):
    store, encoder, videos = (
        FeatureStore(world.test_features),
        untrained_tca(3),
        world.test.database,
    )
    total = len(list(VideoEncoder(encoder, store, frames=100).batches(videos)))
    assert total > 4
    with pytest.raises(KeyboardInterrupt):
        cache_descriptors(
            Refusing(encoder, store, frames=100, allowed=3),
            videos,
            ["video", "frame"],
            tmp_path / "killed",
        )
    cache_descriptors(
        Refusing(encoder, store, frames=100, allowed=total - 3),
        videos,
        ["video", "frame"],
        tmp_path / "killed",
    )
    cache_descriptors(
        VideoEncoder(encoder, store, frames=100), videos, ["video", "frame"], tmp_path / "whole"
    )
    assert folder_contents(tmp_path / "killed") == folder_contents(tmp_path / "whole")


# --- two stages ------------------------------------------------------------------------------------------------------


def test_two_stages_rank_the_shortlist_by_frames_and_the_rest_by_videos():
    first = np.array([[0.9, 0.1, 0.8, 0.8, 0.2]])
    second = np.array([[0.3, np.nan, 0.7, 0.7, np.nan]])
    short = shortlist(first, 3)
    assert short.tolist() == [[True, False, True, True, False]]
    assert np.argsort(-two_stage(first, second, short)[0]).tolist() == [2, 3, 0, 4, 1]
    assert shortlist(first, 2).tolist() == [
        [True, False, True, False, False]
    ]  # the tie in column order
    assert shortlist(first, 99).all()


def test_only_the_pairs_asked_for_are_compared_and_cost_their_frames(world):
    store, encoder, queries = (
        FeatureStore(world.test_features),
        untrained_tca(1),
        list(world.test.labels),
    )
    sides = queries, world.test.database
    whole = Comparison(VideoEncoder(encoder, store), *sides, ["chamfer", "sym_chamfer"])
    pairs = np.random.default_rng(0).random((len(queries), len(world.test.database))) < 0.2
    some, all_ = (
        whole.tables(["chamfer", "sym_chamfer"], pairs),
        whole.tables(["chamfer", "sym_chamfer"]),
    )
    for metric, table in some.items():
        assert np.isnan(table[~pairs]).all()
        np.testing.assert_allclose(table[pairs], all_[metric][pairs], atol=1e-6)
    T, total, spent = store.lengths, 0, 0
    for i, query in enumerate(queries):
        for j, video in enumerate(world.test.database):
            total += T[query] * T[video]
            spent += T[query] * T[video] * pairs[i, j]
    assert whole.cost(pairs) == pytest.approx(spent / total)


def test_cosine_by_the_index_equals_the_products(world):
    store, encoder, queries = (
        FeatureStore(world.test_features),
        untrained_tca(1),
        list(world.test.labels),
    )
    comparison = Comparison(
        VideoEncoder(encoder, store), queries, world.test.database, ["cosine"], use_faiss=True
    )
    described = describe(encoder, store, [*queries, *world.test.database], True)
    expected = np.array(described[: len(queries)]) @ np.array(described[len(queries) :]).T
    np.testing.assert_allclose(comparison.tables(["cosine"])["cosine"], expected, atol=1e-6)
