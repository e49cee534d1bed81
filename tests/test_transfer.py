"""What feeds a GPU, with CUDA's answers made up: packed batches, reading ahead, memory bounds."""

import threading

import pytest
import torch
from helpers.encoders import untrained_tca
from helpers.threads import run_in_threads

from features.store import FeatureStore
from retrieval import compare
from retrieval.alignment import dp
from retrieval.compare import GPU_CHUNK_BYTES, GPU_SHARE, Comparison
from retrieval.encode import VideoEncoder, encode_collection, resident_bytes
from retrieval.similarity import chamfer, sym_chamfer
from retrieval.transfer import AHEAD, free_memory, read_ahead
from utils import InputError

LEVELS = ["video", "frame"]
GIB = 2**30


@pytest.fixture
def store(world):
    return FeatureStore(world.test_features)


def test_packed_batches_give_the_same_bits_as_padded_ones(store):
    padded, packed = (VideoEncoder(untrained_tca(3), store, 10) for _ in range(2))
    packed.packs = True  # as on a GPU
    batches = list(padded.batches(store))
    for one, other in zip(
        padded.stream(batches, LEVELS), packed.stream(batches, LEVELS), strict=True
    ):
        for level in LEVELS:
            assert other[level].lengths == one[level].lengths
            assert torch.equal(other[level].data, one[level].data)


def test_packed_batches_travel_as_they_are_stored(store):
    packed = VideoEncoder(untrained_tca(3), store)
    packed.packs = True
    batch = next(packed.batches(store))
    x, num_frames = packed.read(batch)
    assert x.shape == (sum(store.lengths[video] for video in batch), store.feature_size)
    assert x.numpy().dtype == store.dtype and num_frames.device.type == "cpu"


@pytest.fixture
def fake_cuda(monkeypatch):
    """torch.cuda's answers on a machine with a GPU; returns the threads' devices."""
    devices = {}
    monkeypatch.setattr(
        torch.cuda, "set_device", lambda index: devices.update({threading.get_ident(): index})
    )
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (6 * GIB, 8 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3 * GIB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 1 * GIB)
    return devices


@pytest.mark.parametrize("device, index", [("cuda", 3), ("cuda:5", 5)])
def test_read_ahead_for_a_gpu_reads_in_a_thread_of_that_gpu(fake_cuda, device, index):
    read, read_when_taken = [], []

    def number(item):
        read.append(item)
        assert fake_cuda[threading.get_ident()] == index
        return -item

    for taken, value in enumerate(read_ahead(number, range(20), device)):
        assert value == -taken
        read_when_taken.append(len(read))
    assert read == list(range(20))
    # Never more than AHEAD batches wait in memory beside the one in use and the one in the making.
    assert all(n <= taken + AHEAD + 1 for taken, n in enumerate(read_when_taken))


def test_read_ahead_for_a_cpu_reads_when_asked():
    read = []
    values = read_ahead(lambda item: read.append(item) or item, range(3), "cpu")
    assert next(values) == 0 and read == [0]


def test_read_ahead_raises_what_reading_raises(fake_cuda):
    def fail(item):
        if item == 2:
            raise InputError("video 'x' is damaged")
        return item

    values = read_ahead(fail, range(9), "cuda:0")
    assert [next(values), next(values)] == [0, 1]
    with pytest.raises(InputError, match="damaged"):
        next(values)


def test_free_memory_counts_what_pytorch_keeps(fake_cuda):
    assert free_memory("cuda:0") == (6 + 3 - 1) * GIB
    assert free_memory("cpu") is None


def plan(world, store, monkeypatch, free, memory=4.0):
    """(frames of a batch, bytes of a chunk) for a GPU with `free` bytes."""
    monkeypatch.setattr(compare, "free_memory", lambda device: free)
    queries = list(world.test.labels)
    comparison = Comparison(
        VideoEncoder(untrained_tca(3), store, batch_frames=32768),
        queries,
        world.test.database,
        ["cosine", "chamfer"],
        memory=memory,
    )
    return comparison.video_encoder, comparison.options["chunk_bytes"]


def test_chunks_and_batches_are_sized_by_the_gpu_and_not_by_the_host(world, store, monkeypatch):
    memory = 1 + resident_bytes(libraries=False) / GIB
    encoder, chunk_bytes = plan(world, store, monkeypatch, 80 * GIB, memory)
    assert chunk_bytes == GPU_CHUNK_BYTES > 1 * GIB and encoder.batch_frames == 32768
    free = GIB // 4
    encoder, chunk_bytes = plan(world, store, monkeypatch, free, memory)
    longest = max(store.lengths.values())
    assert chunk_bytes + encoder.batch_bytes(longest, encoder.batch_frames) <= GPU_SHARE * free
    assert chunk_bytes < GPU_CHUNK_BYTES


def test_host_memory_bounds_the_batches_that_are_read_ahead(world, store, monkeypatch):
    held = resident_bytes(libraries=False)
    assert 0 < held < resident_bytes()
    encoder, _ = plan(world, store, monkeypatch, 80 * GIB, (held + (4 << 20)) / GIB)
    assert 512 <= encoder.batch_frames < 32768
    with pytest.raises(InputError, match="--memory .* does not hold the tables and a batch"):
        plan(world, store, monkeypatch, 80 * GIB, memory=held / GIB)


def test_gpu_without_room_is_refused_in_one_line(world, store, monkeypatch):
    with pytest.raises(InputError, match="cpu does not hold the queries .* lacks .*--device cpu"):
        plan(world, store, monkeypatch, 1 << 20)


@pytest.mark.parametrize("function", [chamfer, sym_chamfer])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frame_metrics_read_nothing_back_from_their_device(function, dtype):
    """As for encoding: a tensor of the device "meta" has no values to read."""
    rows, columns = [9, 9, 4, 1], [3, 5]
    matrix = torch.empty(sum(rows), sum(columns), dtype=dtype, device="meta")
    assert function(matrix, rows, columns).shape == (2, 4)
    assert dp(matrix[:, :3].T.float(), rows).shape == (4,)


def test_encode_collection_streams_each_process_its_own_batches(store):
    encoder = VideoEncoder(untrained_tca(3), store, batch_frames=100)
    batches = list(encoder.batches(store))
    read = {}

    class Counting(VideoEncoder):
        def read(self, videos):
            read.setdefault(threading.get_ident(), []).append(tuple(videos))
            return super().read(videos)

    def encode(dist):
        counting = Counting(untrained_tca(3), store, batch_frames=100)
        return list(encode_collection(counting, batches, ["video"], dist))

    run_in_threads(2, encode)
    shares = sorted(read.values(), key=lambda share: batches.index(list(share[0])))
    assert shares == [[tuple(batch) for batch in batches[rank::2]] for rank in range(2)]
