"""Compares a video with contents of an index, frame by frame, in bounded memory."""

from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import torch

from retrieval.alignment import ALIGN_BYTES, STEP, is_apart
from retrieval.encode import resident_bytes
from retrieval.similarity import CHUNK_BYTES
from utils import InputError
from videoindex import evidence
from videoindex.evidence import Stretch, find_stretches, first_stretches, shows_something
from videoindex.pipeline import EncodedVideo
from videoindex.results import TimeSegment
from videoindex.store import Content, IndexStore

RECURRING = 10  # videos that share a stretch of a video with it, from where on it is an intro
# Copies of the same film, frame by frame: how alike they are, and what may be missing at most, in
# seconds and as a share.
SAME_FRAME, SAME_SECONDS, SAME_SHARE = 0.7, 1.0, 0.05
EQUAL = 0.9995  # the similarity of two frames that differ in their rounding alone
MAX_STRETCHES = 10  # of a pair, that are shown
# Of two films of hours, whose paths take seconds each: so many, and of this share of the first.
LONG_CELLS, LONG_STRETCHES, LONG_SHARE = 1 << 24, 3, 0.1


class Frames(NamedTuple):
    """The frames of a video, as they are compared.

    descriptors: (T, D) float32, L2-normalised
    is_evidence: (T,) bool; others match nothing
    seconds: how long the video plays
    """

    descriptors: np.ndarray
    is_evidence: np.ndarray
    seconds: float


class Comparer:
    """Finds what a video shares with contents of a store.

    Args:
        calibration: of the model, see `videoindex.calibration`; or {}.
        memory: bytes that the process may hold.
        skip_start: seconds at the start of every video that are no evidence.
        min_match: the least seconds of a stretch.
    """

    def __init__(
        self,
        store: IndexStore,
        fps: Fraction,
        calibration: dict[str, Any],
        memory: float,
        skip_start: float = 0.0,
        min_match: float = 0.0,
    ):
        self.store, self.fps, self.calibration, self.memory = store, float(fps), calibration, memory
        self.min_similarity = calibration.get("min_similarity", evidence.MIN_SIMILARITY)
        self.skip_start, self.min_match = skip_start, min_match

    def frames_of(self, content: Content) -> Frames:
        """The frames of a content."""
        sizes = np.frombuffer(content.jpeg_sizes, np.int32)
        is_evidence = shows_something(sizes, self.store.thumbnails(content, [0])[0])
        return self._frames(self.store.frame_descriptors(content), is_evidence, content.seconds)

    def frames_of_clip(self, video: EncodedVideo) -> Frames:
        """The frames of a video that need not be in the index."""
        is_evidence = np.ones(len(video.frame_descriptors), bool)
        if video.thumbnails:
            sizes = [len(jpeg) for jpeg in video.thumbnails]
            is_evidence = shows_something(sizes, video.thumbnails[0])
        return self._frames(video.frame_descriptors, is_evidence, video.seconds)

    def _frames(self, descriptors, is_evidence, seconds):
        is_evidence = is_evidence & (np.arange(len(is_evidence)) >= self.skip_start * self.fps)
        return Frames(l2_normalise(descriptors), is_evidence, seconds)

    def compare(
        self, query: Frames, contents: Sequence[Content], least: float, count: int | None = None
    ) -> dict[int, Stretch]:
        """The first stretch that `query` shares with each content: {content number: Stretch}.

        Contents whose evidence is below `least`, in frames, are left out; and if `count` is given,
        those that cannot be among the `count` with the most.
        """
        found: dict[int, Stretch] = {}
        best: list[float] = []  # the `count` most evidence, ascending
        least = max(least, 1e-6)
        for group in self._groups(query, contents):
            matrix = torch.from_numpy(self._similarities(query, group))
            lengths = [content.num_frames for content in group]
            for k, stretch in first_stretches(matrix, lengths, self.min_similarity, least):
                if count and len(best) == count:
                    if stretch and stretch.segment.score < best[0]:  # its weight; evidence is less
                        break
                target = self.frames_of(group[k])
                if stretch is None or not target.is_evidence.all() or self.min_match:
                    limit = MAX_STRETCHES if self.min_match else 1
                    stretch = next(iter(self.stretches(query, target, least, limit)), None)
                if stretch and stretch.evidence >= least:
                    found[group[k].id] = stretch
                    best = sorted([*best, stretch.evidence])[-count:] if count else best
            self.store.release_pages()
        return found

    def compare_without_recurring(
        self, query: Frames, contents: Sequence[Content], least: float, count: int
    ) -> tuple[dict[int, Stretch], Frames]:
        """`compare`, after what many of the videos have in common, such as an intro, is left out.

        Returns:
            the first stretches, and the query's frames in which others are to be looked for.
        """
        found = self.compare(query, contents, least, max(count, 3 * RECURRING))  # so many notice it
        num_frames = len(query.descriptors)
        inside = [
            content
            for content in contents
            if content.id in found
            and is_inside_both(found[content.id], num_frames, content.num_frames)
        ]
        segments = [found[content.id].segment for content in inside]
        spans = [(segment.query_start, segment.query_end) for segment in segments]
        recurring = recurring_frames(spans, num_frames)
        if not recurring.any():
            return found, query
        for content in inside:
            del found[content.id]
        query = query._replace(is_evidence=query.is_evidence & ~recurring)
        others = [content for content in contents if content.id not in found]
        return found | self.compare(query, others, least, count), query

    def _similarities(self, query, contents):
        """Frame similarities (Tq, sum (Tt + STEP)), targets side by side, zeros after each."""
        shape = sum(content.num_frames + STEP for content in contents), query.descriptors.shape[1]
        targets, end = np.zeros(shape, np.float16), 0
        for content in contents:
            targets[end : end + content.num_frames] = self.store.frame_descriptors(content)
            end += content.num_frames + STEP
        # The same values as by NumPy, whose conversion takes longer than all the rest.
        targets = torch.from_numpy(targets).float().numpy()
        matrix = query.descriptors @ targets.T
        matrix /= np.sqrt(np.einsum("ij,ij->i", targets, targets)).clip(1e-12)
        matrix[~query.is_evidence] = evidence.NO_MATCH
        return matrix

    def stretches(
        self, query: Frames, target: Frames, least: float, limit: int = MAX_STRETCHES
    ) -> list[Stretch]:
        """The stretches that two videos share, most evidence first."""
        matrix = query.descriptors @ target.descriptors.T  # (Tq, Tt)
        matrix[~query.is_evidence] = evidence.NO_MATCH
        matrix[:, ~target.is_evidence] = evidence.NO_MATCH
        found = find_stretches(matrix, self.min_similarity, least, limit)
        least_frames = self.min_match * self.fps
        found = [stretch for stretch in found if min(stretch.segment.lengths) >= least_frames]
        return sorted(found, key=lambda stretch: -stretch.evidence)

    def all_stretches(
        self, first: Stretch, query: Frames, target: Frames, least: float
    ) -> list[Stretch]:
        """The stretches of a pair whose `first` is known.

        Others must be good evidence by themselves: in a scene before a fixed camera, any two
        moments resemble each other.
        """
        limit = MAX_STRETCHES
        least = max(least, self.calibration.get("likely", 0.0) * self.fps)
        if len(query.descriptors) * len(target.descriptors) > LONG_CELLS:
            limit, least = LONG_STRETCHES, max(least, LONG_SHARE * first.evidence)
        others = [
            stretch
            for stretch in self.stretches(query, target, least, limit)
            if is_apart(stretch.segment, [first.segment])
            and self.verdict(stretch) in ("certain", "likely", "")
        ]
        return [first, *others]

    def require_memory(self, query: Frames, content: Content) -> None:
        """Raise InputError if the comparison of two videos needs more than `memory`."""
        num_frames, size = query.descriptors.shape
        left = self.memory - resident_bytes()
        pair = content.num_frames * (ALIGN_BYTES * num_frames + 12 * size)
        if pair > left:
            required = (self.memory + pair - left) / 2**30 + 0.005  # to round up
            raise InputError(
                f"--memory {self.memory / 2**30:.3g} GiB does not hold the comparison of videos of"
                f" {num_frames} and {content.num_frames} frames; give {required:.2f} or more"
            )

    def _groups(self, query, contents):
        """Yield contents that are read and compared together."""
        num_frames, size = query.descriptors.shape
        self.require_memory(query, max(contents, key=lambda content: content.num_frames))
        budget = min(CHUNK_BYTES, (self.memory - resident_bytes()) / 2)
        group, used = [], 0
        for content in contents:
            bytes_ = (content.num_frames + STEP) * (12 * num_frames + 8 * size)
            if group and used + bytes_ > budget:
                yield group
                group, used = [], 0
            group.append(content)
            used += bytes_
        yield group

    # --- what is reported -----------------------------------------------------------------------

    def findings(
        self, stretches: Sequence[Stretch], query: Frames, target: Frames
    ) -> dict[str, Any]:
        """What a Match or a Link says of two videos, by their stretches, the first one first."""
        first = stretches[0]
        return {
            "score": first.evidence / self.fps,
            "segments": [self._time_segment(stretch, query, target) for stretch in stretches],
            "verdict": self.verdict_on(first, query, target),
            "matched_seconds": first.distinct / self.fps,
        }

    def _time_segment(self, stretch, query, target):
        """Where a stretch is, in seconds."""
        segment = stretch.segment
        return TimeSegment(
            query_start=segment.query_start / self.fps,
            query_end=min(segment.query_end / self.fps, query.seconds),
            target_start=segment.target_start / self.fps,
            target_end=min(segment.target_end / self.fps, target.seconds),
            similarity=segment.similarity,
        )

    def verdict(self, stretch: Stretch) -> str:
        """What a stretch means, in words."""
        parts = stretch.evidence, stretch.distinct, stretch.matched
        return evidence.verdict(self.calibration, *(part / self.fps for part in parts))

    def verdict_on(self, stretch: Stretch, query: Frames, target: Frames) -> str:
        """`verdict`; but two videos of the same pictures are certain copies, be they stills."""
        word = self.verdict(stretch)
        if word and len(query.descriptors) == len(target.descriptors):
            if (query.descriptors * target.descriptors).sum(1).min() >= EQUAL:
                return "certain"
        return word

    def is_same_film(self, stretch: Stretch, query: Frames, target: Frames) -> bool:
        """Whether two videos show the same film from end to end.

        Every frame of both matches, none of them weakly: so neither has a scene of its own, be it
        black. Of twenty seconds and more, one second may be missing.
        """
        most = max(query.is_evidence.sum(), target.is_evidence.sum())
        missing = min(SAME_SECONDS * self.fps, SAME_SHARE * most)
        is_as_long = abs(len(query.is_evidence) - len(target.is_evidence)) <= missing
        is_matched = stretch.matched >= most - missing and stretch.least >= SAME_FRAME
        return bool(is_as_long and is_matched)


def is_inside_both(stretch: Stretch, num_query: int, num_target: int) -> bool:
    """Whether a stretch is less than half of either video: an intro, or an excerpt in another."""
    in_query, in_target = stretch.segment.lengths
    return in_query < num_query / 2 and in_target < num_target / 2


def recurring_frames(spans: Iterable[tuple[int, int]], num_frames: int) -> np.ndarray:
    """The frames that many videos share with this one, such as an intro: (T,) bool.

    Args:
        spans: for each video that shares a stretch inside both, where it is in this video.
    """
    counts = np.zeros(num_frames, int)
    for start, end in spans:
        counts[start:end] += 1
    return counts >= RECURRING


def l2_normalise(x: np.ndarray) -> np.ndarray:
    """The rows of x as float32 of unit length, which half precision has rounded."""
    x = np.asarray(x, np.float32)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
