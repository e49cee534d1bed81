"""Locate the segments that pairs of videos share, from their frame descriptors."""

from collections.abc import Collection, Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from datasets.segments import Pair, Segments, SegmentSet, pair_key
from distributed import Distributed
from features.frame_rules import stated_rule
from files import write_json
from retrieval.alignment import ALIGNERS
from retrieval.encode import VideoEncoder, require_frame_descriptors
from utils import InputError, describe_ids


def locate_segments(
    video_encoder: VideoEncoder,
    pairs: Sequence[Pair],
    aligners: Sequence[str],
    dist: Distributed | None = None,
    memory: float = 4.0,
    progress: bool = False,
) -> dict[str, dict[Pair, Segments]]:
    """{aligner: {pair: segments in seconds}} of pairs of videos.

    Frame k of a video stands for the time from k / fps to (k + 1) / fps, where fps is that of the
    features (1 if their file does not say). Frame descriptors are kept while they fit into half of
    `memory` (GiB). The processes share the queries; all get the whole result.
    """
    dist = dist or Distributed()
    with dist.exit_together_on_error():
        require_frame_descriptors(video_encoder.encoder, video_encoder.device)
        fps = float(stated_rule(video_encoder.store.meta, video_encoder.store.path)[0])
    queries = list(dict.fromkeys(query for query, _ in pairs))
    own = set(queries[dist.rank :: dist.world_size])
    rows = {aligner: [] for aligner in aligners}  # [pair's number, four ends]
    with dist.exit_together_on_error():
        frames = FrameCache(video_encoder, memory * 2**30 / 2)
        mine = [i for i, (query, _) in enumerate(pairs) if query in own]
        mine.sort(key=lambda i: queries.index(pairs[i][0]))  # a query's pairs follow each other
        bar = tqdm(mine, desc="align", unit="pair", disable=not progress, leave=False)
        for i in bar:
            query, reference = pairs[i]
            (first, query_start), (second, reference_start) = frames[query], frames[reference]
            matrix = (first @ second.T).float().cpu()  # (Tq, Tr)
            starts = query_start, reference_start, query_start, reference_start
            for aligner in aligners:
                for found in ALIGNERS[aligner](matrix):
                    ends = found.query_start, found.target_start, found.query_end, found.target_end
                    rows[aligner].append([i, *map(sum, zip(ends, starts, strict=True))])
    located = {}
    for aligner in aligners:
        table = torch.tensor(rows[aligner], dtype=torch.int64).reshape(-1, 5)
        located[aligner] = {}
        for i, *ends in dist.all_gather(table).tolist():
            seconds = [end / fps if fps != 1 else end for end in ends]
            located[aligner].setdefault(pairs[i], []).append(seconds)
    return located


class FrameCache:
    """Frame descriptors of videos, encoded when asked for; those used last are kept.

    num_bytes: what they may take
    """

    def __init__(self, video_encoder: VideoEncoder, num_bytes: float):
        self.video_encoder = video_encoder
        self.num_bytes = num_bytes
        self.kept = {}  # {video: its value}, the one used last at the end
        self.taken = 0

    def __getitem__(self, video: str) -> tuple[Tensor, int]:
        """The descriptors (T, D), and the second of the video at which they start."""
        if video not in self.kept:
            data = self.video_encoder([video], ["frame"])["frame"].data
            cropped = self.video_encoder.store.lengths[video] - len(data)
            self.kept[video] = data, max(cropped, 0) // 2  # the middle frames count
            self.taken += data.nbytes
        else:
            self.kept[video] = self.kept.pop(video)
        while self.taken > self.num_bytes and len(self.kept) > 2:
            oldest = next(iter(self.kept))
            self.taken -= self.kept.pop(oldest)[0].nbytes
        return self.kept[video]


def save_segments(path: str | Path, located: dict[Pair, Segments]) -> None:
    """Write segments as JSON in VCSL's form."""
    write_json(path, {pair_key(*pair): segments for pair, segments in located.items()})


# --- text ---------------------------------------------------------------------------------------


def segment_coverage_line(dataset: str, segment_set: SegmentSet, coverage: dict[str, int]) -> str:
    """How many pairs are scored, how many are missing, and by which annotation."""
    return (
        f"{dataset}: {coverage['pairs']} pairs ({coverage['pairs_missing']} missing),"
        f" {coverage['pairs_that_share']} of them share something; {coverage['videos']} videos"
        f" ({coverage['videos_missing']} missing); {segment_set.source}"
    )


def require_pairs(segment_set: SegmentSet, available: Collection[str], path: str) -> list[Pair]:
    """The pairs of which both videos have features.

    Raises:
        InputError: there is none that shares something
    """
    pairs = segment_set.pairs_of(available)
    if not any(pair in segment_set.labels for pair in pairs):
        raise InputError(
            f"no pair that shares something has both its videos in {path!r}"
            f" ({segment_set.source}): {describe_ids(segment_set.videos, available)}"
        )
    return pairs
