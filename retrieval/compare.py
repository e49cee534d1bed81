"""Compare queries with a database in bounded memory.

Query descriptors stay in memory, database videos are encoded in batches.

`compare_collections` gives whole tables of similarities (Q, N). `Comparison` also compares chosen
pairs only. Two-stage search needs that: rank by video descriptors, take the first R of each query
(`shortlist`), compare those by frames, and rank them first (`two_stage`).
"""

import math
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from distributed import Distributed
from features.store import FeatureStore
from retrieval.comparator import VideoComparator
from retrieval.encode import (
    LEVELS,
    VideoEncoder,
    cache_descriptors,
    check_feature_size,
    level_of,
    levels_of,
    require_frame_descriptors,
    resident_bytes,
)
from retrieval.similarity import (
    CHUNK_BYTES,
    PackedDescriptors,
    similarity_tables,
    similarity_tensors,
)
from retrieval.transfer import free_memory
from utils import InputError

MEMORY = 4.0  # GiB, the default of command lines

# Smaller batches and chunks do too little work in one call.
MIN_BATCH_FRAMES = 512
MIN_CHUNK_BYTES = 16 << 20

# On a GPU: the largest chunk, and the share of the free memory that evaluation takes.
GPU_CHUNK_BYTES = 4 << 30
GPU_SHARE = 0.9


class Comparison:
    """Compares queries with a database, both lists of ids, by several metrics.

    Each call of `tables` encodes every video of the database once. Batches are assigned
    round-robin and do not depend on the number of processes, so the tables are bit-identical.
    The exception is cosine by FAISS, which multiplies in groups: there the last bits may differ.

    Args:
        video_encoder: its batches are made smaller where the memory bound requires it.
        memory: GiB of the host that this process may hold, including what it has allocated
            already. Descriptors and similarities on a GPU count against its free memory instead.
        cache: folder in which descriptors are stored (`cache_descriptors`).
        use_faiss: compute cosine by FAISS over all of this process's video descriptors at once,
            which then stay in memory.
        comparator: the network of the metric of that name.
        dtype: type in which frame descriptors are multiplied.

    Attributes:
        seconds: time this process has compared so far, without encoding.

    Raises:
        InputError: the queries, the tables and one batch do not fit into `memory`, or the GPU.
    """

    def __init__(
        self,
        video_encoder: VideoEncoder,
        queries: Sequence[str],
        database: Sequence[str],
        metrics: Sequence[str],
        dist: Distributed | None = None,
        memory: float = math.inf,
        cache: str | Path | None = None,
        use_faiss: bool = False,
        progress: bool = False,
        comparator: VideoComparator | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        self.video_encoder = video_encoder
        self.queries = list(queries)
        self.database = list(database)
        self.dist = dist or Distributed()
        self.use_faiss = use_faiss
        self.progress = progress and self.dist.is_main
        self.levels = self._levels_of(metrics)
        self.lengths = {}  # {id: frames}
        for video in [*self.queries, *self.database]:
            self.lengths[video] = video_encoder.length(video)
        self.column = {video: i for i, video in enumerate(self.database)}
        self.seconds = 0.0

        with self.dist.exit_together_on_error():
            if "frame" in self.levels:
                require_frame_descriptors(video_encoder.encoder, video_encoder.device)
            plan = self._plan(memory * 2**30, metrics, dtype)
        # The main process's plan, because all processes must form the same batches.
        video_encoder.batch_frames, chunk_bytes = self.dist.broadcast(plan)
        self.options = {
            "device": video_encoder.device,
            "chunk_bytes": chunk_bytes,
            "comparator": comparator,
            "dtype": dtype,
        }
        if cache:
            videos = list(self.lengths)
            levels = levels_of(video_encoder.encoder)
            self.video_encoder = cache_descriptors(
                video_encoder, videos, levels, cache, self.dist, self.progress
            )
        with self.dist.exit_together_on_error():
            self.query_descriptors = self._encode_queries(dtype)

    def _levels_of(self, metrics):
        levels = {level_of(metric) for metric in metrics}
        return [level for level in LEVELS if level in levels]

    def _plan(self, memory, metrics, dtype):
        """(frames of a batch, bytes of a chunk of similarities) for a total of `memory` bytes."""
        Q, N, D = len(self.queries), len(self.database), self.video_encoder.encoder.descriptor_size
        query_bytes = 4 * Q * D  # the queries' video descriptors
        if "frame" in self.levels:
            query_bytes += dtype.itemsize * D * sum(self.lengths[query] for query in self.queries)
        # Tables: this process's columns, then all columns in order.
        table_bytes = 4 * Q * N * (2 * len(metrics) + 1)
        if self.use_faiss:  # vectors, values and their positions
            table_bytes += (4 * N * D + 12 * Q * N) // self.dist.world_size

        frames, free = self.video_encoder.batch_frames, free_memory(self.video_encoder.device)
        if free is None:
            left = memory - resident_bytes() - table_bytes - query_bytes
            return self._fit_batch(frames, left, CHUNK_BYTES, memory)
        # With a GPU, the host holds the tables and the batches that are read ahead.
        longest, host_bytes = max(self.lengths.values()), self.video_encoder.host_bytes
        left = memory - resident_bytes(libraries=False) - table_bytes
        while frames > MIN_BATCH_FRAMES and host_bytes(longest, frames) > left:
            frames //= 2
        if host_bytes(longest, frames) > left:
            required = (memory + host_bytes(longest, frames) - left) / 2**30 + 0.005  # to round up
            raise InputError(
                f"--memory {memory / 2**30:.3g} GiB does not hold the tables and a batch of"
                f" {max(frames, longest)} frames; give {required:.2f} or more,"
                " or a smaller --padding_size"
            )
        return self._fit_batch(frames, GPU_SHARE * free - query_bytes, GPU_CHUNK_BYTES, None)

    def _fit_batch(self, frames, left, chunk_bytes, memory):
        """(frames of a batch, bytes of a chunk) of at most these values, in `left` bytes.

        memory: what --memory allows in all; None where `left` is of a GPU.
        """
        longest, batch_bytes = max(self.lengths.values()), self.video_encoder.batch_bytes
        # First smaller batches, then smaller chunks.
        while frames > MIN_BATCH_FRAMES and batch_bytes(longest, frames) > left - chunk_bytes:
            frames //= 2
        left -= batch_bytes(longest, frames)
        if left >= chunk_bytes:
            return frames, chunk_bytes
        if left >= MIN_CHUNK_BYTES:
            return frames, 1 << int(left).bit_length() - 1  # the power of 2 below
        batch = f"a batch of {max(frames, longest)} frames"
        missing = MIN_CHUNK_BYTES - left
        if memory is None:
            raise InputError(
                f"{self.video_encoder.device} does not hold the queries and {batch}: it lacks"
                f" {missing / 2**30:.2f} GiB; free it, give a smaller --padding_size, or"
                " --device cpu"
            )
        required = (memory + missing) / 2**30 + 0.005  # to round up
        raise InputError(
            f"--memory {memory / 2**30:.3g} GiB does not hold the queries, the tables and"
            f" {batch}; give {required:.2f} or more, or a smaller --padding_size"
        )

    def _encode_queries(self, dtype):
        """{level: PackedDescriptors} of all queries, in their order."""
        D = self.video_encoder.encoder.descriptor_size
        packed, views = {}, {}  # views: {level: {query: its rows}}
        for level in self.levels:
            if level == "video":
                kind, lengths = torch.float32, [1] * len(self.queries)
            else:
                kind, lengths = dtype, [self.lengths[query] for query in self.queries]
            data = torch.empty(sum(lengths), D, dtype=kind, device=self.video_encoder.device)
            packed[level] = PackedDescriptors(data, lengths)
            views[level] = dict(zip(self.queries, data.split(lengths), strict=True))
        batches = list(self.video_encoder.batches(self.queries))
        encoded = self.video_encoder.stream(batches, self.levels)
        for batch, descriptors in zip(batches, encoded, strict=True):
            for level, (data, lengths) in descriptors.items():
                for video, rows in zip(batch, data.split(lengths), strict=True):
                    views[level][video].copy_(rows)
        return packed

    def tables(
        self, metrics: Sequence[str], pair_mask: np.ndarray | None = None
    ) -> dict[str, np.ndarray]:
        """{metric: similarities (Q, N) float32}.

        pair_mask (Q, N) bool: compare these pairs only; the others are NaN.
        """
        videos = self.database
        if pair_mask is not None:
            videos = [self.database[i] for i in np.flatnonzero(pair_mask.any(0))]
        batches = list(self.video_encoder.batches(videos))
        shares = [batches[rank :: self.dist.world_size] for rank in range(self.dist.world_size)]
        with self.dist.exit_together_on_error():
            own = self._compare(shares[self.dist.rank], metrics, pair_mask)
        # The order in which `all_gather` joins the processes' columns.
        columns = []
        for share in shares:
            for batch in share:
                columns += [self.column[video] for video in batch]
        tables = {}
        for metric in metrics:
            joined = self.dist.all_gather(torch.from_numpy(own.pop(metric)))  # (n, Q)
            # Videos without any pair to compare keep NaN.
            tables[metric] = np.full((len(self.queries), len(self.database)), np.nan, np.float32)
            tables[metric][:, columns] = joined.numpy().T
        return tables

    def _compare(self, batches, metrics, pair_mask):
        """{metric: (n, Q)} of the n videos of `batches`, in their order."""
        n, levels = sum(map(len, batches)), self._levels_of(metrics)
        out = {metric: np.empty((n, len(self.queries)), np.float32) for metric in metrics}
        vectors = None
        if self.use_faiss and "cosine" in metrics:
            metrics = [metric for metric in metrics if metric != "cosine"]
            vectors = np.empty((n, self.video_encoder.encoder.descriptor_size), np.float32)
        end = 0
        with tqdm(
            total=n, desc="compare", unit="video", disable=not self.progress, leave=False
        ) as bar:
            encoded = self.video_encoder.stream(batches, levels)
            for batch, targets in zip(batches, encoded, strict=True):  # {level: PackedDescriptors}
                start, end = end, end + len(batch)
                began = time.perf_counter()
                if vectors is not None:  # FAISS compares them when all are there
                    vectors[start:end] = targets["video"].data.cpu()
                pairs = None
                if pair_mask is not None:
                    pairs = pair_mask[:, [self.column[video] for video in batch]]
                for level in levels:
                    level_metrics = [metric for metric in metrics if level_of(metric) == level]
                    blocks = self._similarities(level, targets[level], level_metrics, pairs)
                    for metric, block in blocks.items():
                        out[metric][start:end] = block.T
                self.seconds += time.perf_counter() - began
                bar.update(len(batch))
        if vectors is not None:
            began = time.perf_counter()
            queries = self.query_descriptors["video"].data.cpu().numpy()
            out["cosine"] = _inner_products_by_faiss(queries, vectors)
            self.seconds += time.perf_counter() - began
        return out

    def _similarities(self, level, targets, metrics, pairs):
        """{metric: (Q, n)} of the queries and a batch; pairs (Q, n) bool, or None for all."""
        queries = self.query_descriptors[level]
        if not metrics:
            return {}
        if pairs is None:
            return similarity_tables(queries, targets, metrics, **self.options)
        blocks = {metric: np.full(pairs.shape, np.nan, np.float32) for metric in metrics}
        query_rows = queries.data.split(queries.lengths)
        target_rows = targets.data.split(targets.lengths)
        chosen, parts = [], {metric: [] for metric in metrics}
        for i in np.flatnonzero(pairs.any(1)):
            # One query with its own targets of this batch.
            query = PackedDescriptors(query_rows[i], [len(query_rows[i])])
            columns = np.flatnonzero(pairs[i])
            rows = [target_rows[j] for j in columns]
            chosen_targets = PackedDescriptors(torch.cat(rows), [len(part) for part in rows])
            tables = similarity_tensors(query, chosen_targets, metrics, **self.options)
            chosen.append((i, columns))
            for metric, table in tables.items():  # (1, len(columns))
                parts[metric].append(table[0])
        for metric in metrics if chosen else ():
            values = torch.cat(parts[metric]).cpu().numpy()  # one copy from a GPU for all queries
            ends = np.cumsum([len(columns) for _, columns in chosen])
            for (i, columns), part in zip(chosen, np.split(values, ends[:-1]), strict=True):
                blocks[metric][i, columns] = part
        return blocks

    def cost(self, pair_mask: np.ndarray) -> float:
        """The share of all pairs of frames that the pairs (Q, N) of videos have."""
        queries = np.array([self.lengths[video] for video in self.queries], float)
        database = np.array([self.lengths[video] for video in self.database], float)
        compared = [database[row].sum() for row in pair_mask]  # frames, for each query
        return float(queries @ compared / (queries.sum() * database.sum()))


def _inner_products_by_faiss(queries, vectors):
    """queries (Q, D), vectors (n, D) -> (n, Q), by an exact search for the n nearest."""
    import faiss  # only two-stage search needs it

    out = np.empty((len(vectors), len(queries)), np.float32)
    if len(vectors):
        # As IndexFlatIP computes it, but without the index's copy of the vectors.
        values, nearest = faiss.knn(
            queries, vectors, len(vectors), metric=faiss.METRIC_INNER_PRODUCT
        )
        out[nearest, np.arange(len(queries))[:, None]] = values
    return out


def compare_collections(
    encoder: nn.Module,
    store: FeatureStore,
    queries: Sequence[str],
    database: Sequence[str],
    metrics: Sequence[str],
    padding_size: int = 300,
    device: str = "cpu",
    dist: Distributed | None = None,
    memory: float = math.inf,
    amp: torch.dtype | None = None,
) -> dict[str, np.ndarray]:
    """{metric: similarities (Q, N) float32} of two lists of ids, all metrics from one pass.

    amp: torch.bfloat16 to encode and to multiply frames in. The rest as `VideoEncoder` and
    `Comparison`.
    """
    check_feature_size(encoder, store)
    metrics = list(dict.fromkeys(metrics))
    if not metrics:
        return {}
    comparison = Comparison(
        VideoEncoder(encoder, store, padding_size, device, amp),
        queries,
        database,
        metrics,
        dist,
        memory,
        dtype=amp or torch.float32,
    )
    return comparison.tables(metrics)


# --- two stages ---------------------------------------------------------------------------------


def shortlist(table: np.ndarray, R: int) -> np.ndarray:
    """(Q, N) bool: the R most similar videos in each row of a table (Q, N).

    Ties are in column order.
    """
    in_shortlist = np.zeros(np.shape(table), bool)
    for row, values in zip(in_shortlist, table, strict=True):
        row[np.argsort(-values, kind="stable")[:R]] = True
    return in_shortlist


def two_stage(first: np.ndarray, second: np.ndarray, in_shortlist: np.ndarray) -> np.ndarray:
    """Rank the shortlisted videos first, by `second`, then the others, by `first`.

    The values are ranks counted from the end, because similarities of two metrics have no common
    scale. Ties are in column order.

    Args:
        first, second: similarities (Q, N); `second` may be NaN where `in_shortlist` is false.
        in_shortlist: (Q, N) bool, the shortlists.
    """
    ranks, N = np.empty(np.shape(first), np.float32), len(first[0])
    for row, by_first, by_second, listed in zip(ranks, first, second, in_shortlist, strict=True):
        values = np.where(listed, by_second, by_first)
        order = np.lexsort((-values, ~listed))  # by ~listed, then by -values
        row[order] = np.arange(N, 0, -1)
    return ranks
