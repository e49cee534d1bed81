"""Tables of similarities between collections, whole or of chosen pairs, by one or two stages."""

import numpy as np
import pytest
import torch
from helpers.encoders import encode_one_by_one, untrained_tca
from helpers.threads import run_in_threads
from helpers.worlds import C

from features.store import FeatureStore
from model import LSTM, TCA, NetVLAD
from retrieval.compare import Comparison, compare_collections, shortlist, two_stage
from retrieval.encode import VideoEncoder
from utils import InputError

METRICS = ["cosine", "euclidean", "chamfer", "sym_chamfer"]


@pytest.fixture
def store(world):
    return FeatureStore(world.test_features)


def encoded_frames(encoder, monkeypatch):
    """A list that collects how many frames, padding included, each pass of the encoder takes."""
    counts = []
    if isinstance(encoder, TCA):
        # PyTorch's fast path passes hooks by.
        monkeypatch.setattr(torch.backends.mha, "get_fastpath_enabled", lambda: False)
        module = encoder.transformer_encoder.layers[0].linear1
    else:
        module = encoder.bn1

    def count(module, inputs):
        counts.append(inputs[0].shape[:-1].numel())

    module.register_forward_pre_hook(count)
    return counts


@pytest.mark.parametrize(
    "make", [lambda: TCA(C, 4, 2, 64), lambda: LSTM(C, 16)], ids=["tca", "lstm"]
)
def test_all_metrics_take_one_encoding_pass(world, store, make, monkeypatch):
    encoder, queries, database = make(), list(world.test.labels), world.test.database
    counts = encoded_frames(encoder, monkeypatch)
    tables = compare_collections(encoder, store, queries, database, METRICS)
    frames = sum(store.lengths[video] for video in [*queries, *database])
    # At most the padding of batches of like length, and one frame that checks the encoder's levels.
    assert frames <= sum(counts) <= 1.25 * frames + 1
    for level in ("cosine", "euclidean"), ("chamfer", "sym_chamfer"):
        alone = compare_collections(encoder, store, queries, database, level)
        for metric, table in alone.items():
            np.testing.assert_allclose(tables[metric], table, atol=2e-6)


def test_tables_are_the_same_to_the_bit_for_any_number_of_processes(world, store):
    encoder, queries, database = untrained_tca(1), list(world.test.labels), world.test.database

    def compare(dist):
        torch.set_num_threads(1)  # a new thread has as many as an extraction has left behind
        video_encoder = VideoEncoder(encoder, store, batch_frames=100)
        return Comparison(video_encoder, queries, database, METRICS, dist).tables(METRICS)

    expected = compare(None)
    for tables in run_in_threads(3, compare):
        for metric in METRICS:
            assert np.array_equal(tables[metric], expected[metric])


def test_compare_collections_refuses_frames_of_an_encoder_without_them(world, store):
    encoder = NetVLAD(C, 4, 16)
    with pytest.raises(InputError, match="NetVLAD gives no frame descriptors"):
        compare_collections(encoder, store, world.test.database, world.test.database, ["chamfer"])


def test_compare_collections_refuses_another_feature_size(world, store):
    with pytest.raises(InputError, match="takes features of 64 channels.* has 32"):
        compare_collections(TCA(64, 4), store, world.test.database, world.test.database, METRICS)


def test_pair_mask_compares_those_pairs_only(world, store):
    encoder, queries, database = untrained_tca(1), list(world.test.labels), world.test.database
    metrics = ["chamfer", "sym_chamfer"]
    comparison = Comparison(VideoEncoder(encoder, store), queries, database, metrics)
    pair_mask = np.random.default_rng(0).random((len(queries), len(database))) < 0.2
    some, whole = comparison.tables(metrics, pair_mask), comparison.tables(metrics)
    for metric in metrics:
        assert np.isnan(some[metric][~pair_mask]).all()
        np.testing.assert_allclose(some[metric][pair_mask], whole[metric][pair_mask], atol=1e-6)


def test_cost_is_the_share_of_frame_pairs(world, store):
    encoder, queries, database = untrained_tca(1), list(world.test.labels), world.test.database
    comparison = Comparison(VideoEncoder(encoder, store), queries, database, ["chamfer"])
    pair_mask = np.random.default_rng(0).random((len(queries), len(database))) < 0.2
    T, total, spent = store.lengths, 0, 0
    for i, query in enumerate(queries):
        for j, video in enumerate(database):
            total += T[query] * T[video]
            spent += T[query] * T[video] * pair_mask[i, j]
    assert comparison.cost(pair_mask) == pytest.approx(spent / total)


def test_cosine_by_faiss_equals_products(world, store):
    encoder, queries, database = untrained_tca(1), list(world.test.labels), world.test.database
    comparison = Comparison(
        VideoEncoder(encoder, store), queries, database, ["cosine"], use_faiss=True
    )
    rows = encode_one_by_one(encoder, store, [*queries, *database], "video")
    expected = [[rows[query] @ rows[video] for video in database] for query in queries]
    table = comparison.tables(["cosine"])["cosine"]
    np.testing.assert_allclose(table, expected, atol=1e-6)


# --- two stages ---------------------------------------------------------------------------------


def test_shortlist_takes_the_first_of_each_row():
    table = np.array([[0.9, 0.1, 0.8, 0.8, 0.2]])
    assert shortlist(table, 3).tolist() == [[True, False, True, True, False]]
    # Of a tie, the first column.
    assert shortlist(table, 2).tolist() == [[True, False, True, False, False]]
    assert shortlist(table, 99).all()


def test_two_stage_ranks_the_shortlist_by_frames_and_the_rest_by_videos():
    first = np.array([[0.9, 0.1, 0.8, 0.8, 0.2]])
    second = np.array([[0.3, np.nan, 0.7, 0.7, np.nan]])
    short = np.array([[True, False, True, True, False]])
    assert np.argsort(-two_stage(first, second, short)[0]).tolist() == [2, 3, 0, 4, 1]
