"""A set's queries against its database, under a memory bound: queries are held, the database passes by batch by batch.

`compare_collections` gives whole tables of similarities (Q, N); `Comparison` also compares chosen pairs only, which two-stage search needs:
rank by video descriptors, `shortlist` the first R, compare those by frames, order by `two_stage`.
"""

import math
import time

import numpy as np
import torch
from tqdm import tqdm

from distributed import Distributed
from retrieval.encode import (
    LEVELS,
    VideoEncoder,
    cache_descriptors,
    check_feature_size,
    level_of,
    levels_of,
    resident_bytes,
)
from retrieval.similarity import CHUNK_BYTES, PackedDescriptors, similarity_tables
from utils import InputError

MEMORY = 4.0  # GiB, where a command line does not say
LEAST_FRAMES, LEAST_CHUNK = 512, 16 << 20  # below these, little work is done a call


class Comparison:
    """Compares `queries` with `database` (lists of ids) by `metrics`; each video of the database is described once a call.

    video_encoder: a `VideoEncoder`; its batches are made smaller where the bound asks for it. memory: GiB that this process may hold,
    what it holds already included; InputError when the queries, the tables and one batch do not fit. use_faiss: cosine is
    computed by FAISS, over all video descriptors of this process at once, which are then held. cache: the folder that
    descriptors are kept in (`cached`). dtype: what frame descriptors are multiplied in.

    `seconds`: how long this process has compared so far, descriptors at hand.

    Distributed take turns at the batches, so that tables are the same, to the last bit, for any number of them; but for the last
    bits of cosine by FAISS, which groups what it multiplies.
    """

    def __init__(
        self, video_encoder, queries, database, metrics, dist=None, memory=math.inf, cache=None, use_faiss=False, progress=False,
        comparator=None, dtype=torch.float32,
    ):  # fmt: skip
        self.video_encoder, self.queries, self.database = (
            video_encoder,
            list(queries),
            list(database),
        )
        self.dist, self.use_faiss = dist or Distributed(), use_faiss
        self.progress = progress and self.dist.is_main
        self.levels = [level for level in LEVELS if level in map(level_of, metrics)]
        self.frames = {
            video: video_encoder.length(video) for video in {*self.queries, *self.database}
        }
        self.place = {video: i for i, video in enumerate(self.database)}
        self.seconds = 0.0
        with self.dist.exit_together_on_error():
            if (
                "frame" in self.levels
            ):  # an encoder that has none says so before anything is encoded
                x = torch.zeros(1, 1, video_encoder.store.feature_size, device=video_encoder.device)
                video_encoder.encoder.encode(x, torch.ones(1, dtype=int, device=x.device))
            plan = self._plan(memory * 2**30, metrics, dtype)
        video_encoder.frames, chunk_bytes = self.dist.broadcast(
            plan
        )  # one plan: all must form the same batches
        self.options = dict(
            device=video_encoder.device, chunk_bytes=chunk_bytes, comparator=comparator, dtype=dtype
        )
        if cache:
            videos = list(dict.fromkeys([*self.queries, *self.database]))
            self.video_encoder = cache_descriptors(
                video_encoder,
                videos,
                levels_of(video_encoder.encoder),
                cache,
                self.dist,
                self.progress,
            )
        with self.dist.exit_together_on_error():
            self.query_descriptors = self._describe_queries(dtype)

    def _plan(self, memory, metrics, dtype):
        """Frames a batch and bytes a chunk of similarities may take, so that all together stays under `memory` bytes."""
        Q, N, D = len(self.queries), len(self.database), self.video_encoder.encoder.descriptor_size
        size = self.dist.world_size
        held = 4 * Q * D + ("frame" in self.levels) * dtype.itemsize * D * sum(
            self.frames[query] for query in self.queries
        )
        held += (
            4 * Q * N * (2 * len(metrics) + 1)
        )  # tables: this process's columns, and all of them in order
        held += self.use_faiss * (4 * N * D + 12 * Q * N) // size
        left = memory - resident_bytes() - held
        longest, frames = max(self.frames.values()), self.video_encoder.frames
        while (
            frames > LEAST_FRAMES
            and self.video_encoder.batch_bytes(longest, frames) > left - CHUNK_BYTES
        ):
            frames //= 2
        left -= self.video_encoder.batch_bytes(longest, frames)
        if left < LEAST_CHUNK:
            raise InputError(
                f"--memory {memory / 2**30:.3g} GiB does not hold the queries, the tables and a batch of {max(frames, longest)}"
                f" frames; give {(memory + LEAST_CHUNK - left) / 2**30 + 0.005:.2f} or more, or a smaller --padding_size"
            )
        return frames, CHUNK_BYTES if left >= CHUNK_BYTES else 1 << int(left).bit_length() - 1

    def _describe_queries(self, dtype):
        """{level: PackedDescriptors} of all queries, in their order."""
        D, held = self.video_encoder.encoder.descriptor_size, {}
        for level in self.levels:
            lengths = [1 if level == "video" else self.frames[query] for query in self.queries]
            kind = torch.float32 if level == "video" else dtype
            held[level] = PackedDescriptors(
                torch.empty(sum(lengths), D, dtype=kind, device=self.video_encoder.device), lengths
            )
        parts = {
            level: dict(zip(self.queries, data.split(lengths), strict=True))
            for level, (data, lengths) in held.items()
        }
        for batch in self.video_encoder.batches(self.queries):
            for level, (data, lengths) in self.video_encoder(batch, self.levels).items():
                for video, part in zip(batch, data.split(lengths), strict=True):
                    parts[level][video].copy_(part)
        return held

    def tables(self, metrics, pair_mask=None):
        """{metric: similarities (Q, N) float32}. pair_mask (Q, N) bool: the pairs to compare; the others are NaN."""
        videos = (
            self.database
            if pair_mask is None
            else [self.database[i] for i in np.flatnonzero(pair_mask.any(0))]
        )
        batches = list(self.video_encoder.batches(videos))
        with self.dist.exit_together_on_error():
            mine = self._compare(
                batches[self.dist.rank :: self.dist.world_size], metrics, pair_mask
            )
        order = [
            video
            for rank in range(self.dist.world_size)
            for batch in batches[rank :: self.dist.world_size]
            for video in batch
        ]
        columns = [self.place[video] for video in order]
        found = {}
        for metric in metrics:
            found[metric] = np.full((len(self.queries), len(self.database)), np.nan, np.float32)
            found[metric][:, columns] = (
                self.dist.all_gather(torch.from_numpy(mine.pop(metric))).numpy().T
            )
        return found

    def _compare(self, batches, metrics, pair_mask):
        """{metric: (n, Q)} of the n videos of `batches`, in their order."""
        levels = [level for level in self.levels if level in map(level_of, metrics)]
        n, end = sum(map(len, batches)), 0
        out = {metric: np.empty((n, len(self.queries)), np.float32) for metric in metrics}
        use_faiss = self.use_faiss and "cosine" in metrics
        vectors = (
            np.empty((n, self.video_encoder.encoder.descriptor_size), np.float32)
            if use_faiss
            else None
        )
        with tqdm(
            total=n, desc="compare", unit="video", disable=not self.progress, leave=False
        ) as bar:
            for batch in batches:
                start, end = end, end + len(batch)
                described, began = self.video_encoder(batch, levels), time.perf_counter()
                if use_faiss:
                    vectors[start:end] = described["video"].data.cpu()
                for level in levels:
                    wanted = [
                        metric
                        for metric in metrics
                        if level_of(metric) == level and not (use_faiss and metric == "cosine")
                    ]
                    pairs = (
                        None
                        if pair_mask is None
                        else pair_mask[:, [self.place[video] for video in batch]]
                    )
                    for metric, block in self._similar(
                        level, described[level], wanted, pairs
                    ).items():
                        out[metric][start:end] = block.T
                self.seconds += time.perf_counter() - began
                bar.update(len(batch))
        if use_faiss:
            began = time.perf_counter()
            out["cosine"] = _by_faiss(self.query_descriptors["video"].data.cpu().numpy(), vectors)
            self.seconds += time.perf_counter() - began
        return out

    def _similar(self, level, targets, metrics, pairs):
        """{metric: (Q, n)} of the queries and a batch; pairs (Q, n) bool or None, as `tables`."""
        queries = self.query_descriptors[level]
        if not metrics or pairs is None:
            return similarity_tables(queries, targets, metrics, **self.options) if metrics else {}
        found = {metric: np.full(pairs.shape, np.nan, np.float32) for metric in metrics}
        rows, columns = queries.data.split(queries.lengths), targets.data.split(targets.lengths)
        for i in np.flatnonzero(pairs.any(1)):
            hit = np.flatnonzero(pairs[i])
            some = PackedDescriptors(
                torch.cat([columns[j] for j in hit]), [targets.lengths[j] for j in hit]
            )
            for metric, row in similarity_tables(
                PackedDescriptors(rows[i], [len(rows[i])]), some, metrics, **self.options
            ).items():
                found[metric][i, hit] = row[0]
        return found

    def cost(self, pairs):
        """The share of the exhaustive frame-level work, counted in pairs of frames, that the pairs (Q, N) bool need."""
        query, video = (
            np.array([self.frames[name] for name in side], float)
            for side in (self.queries, self.database)
        )
        compared = [video[row].sum() for row in pairs]  # frames of the database, a query
        return float(query @ compared / (query.sum() * video.sum()))


def _by_faiss(queries, vectors):
    """Inner products (n, Q) of queries (Q, D) with vectors (n, D): an exact search for the n nearest."""
    import faiss  # here: only two-stage search needs it

    out = np.empty((len(vectors), len(queries)), np.float32)
    if len(vectors):
        # What IndexFlatIP computes, over the vectors where they are: an index would copy them, and again as it grows.
        values, places = faiss.knn(
            queries, vectors, len(vectors), metric=faiss.METRIC_INNER_PRODUCT
        )
        out[places, np.arange(len(queries))[:, None]] = values
    return out


def compare_collections(
    encoder, store, queries, database, metrics, padding_size=300, device="cpu", progress=False, dist=None, memory=math.inf,
    amp=None, cache=None, comparator=None,
):  # fmt: skip
    """{metric: similarities (Q, N) float32} between the ids `queries` and `database`, all metrics from one encoding pass.

    amp: torch.bfloat16 to encode and to multiply frames in; the rest as `VideoEncoder` and `Comparison`.
    """
    check_feature_size(encoder, store)
    if not metrics:
        return {}
    video_encoder = VideoEncoder(encoder, store, padding_size, device, amp)
    options = dict(
        cache=cache, progress=progress, comparator=comparator, dtype=amp or torch.float32
    )
    return Comparison(video_encoder, queries, database, metrics, dist, memory, **options).tables(
        list(dict.fromkeys(metrics))
    )


# --- two stages --------------------------------------------------------------------------------------------------------


def shortlist(table, R):
    """(Q, N) bool: the R videos of highest similarity in each row of a table (Q, N), ties in column order."""
    short = np.zeros(np.shape(table), bool)
    for row, values in zip(short, table, strict=True):
        row[np.argsort(-values, kind="stable")[:R]] = True
    return short


def two_stage(first, second, short):
    """A table (Q, N) that ranks the shortlisted videos first, by `second`, and the others after them, by `first`.

    first, second (Q, N): similarities; second may be NaN where `short` (Q, N) is false. Values are ranks counted from the end,
    because similarities of two measures have no common scale. Ties in either stay in column order.
    """
    ranked, N = np.empty(np.shape(first), np.float32), len(first[0])
    for row, video, frame, listed in zip(ranked, first, second, short, strict=True):
        row[np.lexsort((-np.where(listed, frame, video), ~listed))] = np.arange(N, 0, -1)
    return ranked
