"""How much film two videos share: what their similar frames are worth as evidence.

Two frames match if their similarity is at least `min_similarity`; what they have above it is their
weight. Matching frames that follow each other in both videos are a path
(`retrieval.alignment.longest_paths`), and the heaviest one is the first stretch that the two share.
The evidence of a stretch is the weight of its frames, each counted by its novelty: how much it
differs from the matched frames before it; at most the weight of the path, gaps and all. So a still
that lasts, or a camera that never moves, is the evidence of one frame, and ten different seconds
are that of ten. It does not depend on how long the videos are: an excerpt, a compilation and a
whole film score by what they share.

Frames that show nothing, black or of any other plain colour, are no evidence.
"""

import functools
import io
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from retrieval.alignment import (
    GAP,
    NONE,
    SKEW,
    STEP,
    Segment,
    align_paths,
    first_path,
    heaviest_paths,
    segment_of,
)

MIN_SIMILARITY = 0.4  # of features that are not calibrated
BLOCK = 512  # pairs of frames that are looked at together
MAX_SPEED = 2.0  # how much faster one video may run
NO_MATCH = -1.0  # the similarity of a frame that is no evidence
# A thumbnail that takes at most this many times the bytes of a plain colour shows nothing.
PLAIN = 1.08
CERTAIN_SECONDS, LIKELY_SECONDS, STILL_SECONDS = 2.0, 1.5, 3.0


class Stretch(NamedTuple):
    """Frames of two videos that match, in order; see the module.

    segment: where, in frames; its score is the weight of the path
    evidence: the sum over the path of weight times novelty, at most the path's weight
    distinct: the sum of the novelties: how many different frames match
    matched: how many frames match
    least: the similarity of the frames that are least alike
    """

    segment: Segment
    evidence: float
    distinct: float
    matched: int
    least: float = 0.0


@torch.inference_mode()
def find_stretches(
    matrix: np.ndarray | Tensor,
    min_similarity: float = MIN_SIMILARITY,
    least: float = 0.0,
    limit: int = 1,
) -> list[Stretch]:
    """The stretches that two videos share, heaviest path first; [] if they share nothing.

    Args:
        matrix: frame similarities (Tq, Tt).
        least: the least evidence of a stretch.
        limit: the most stretches. No two overlap in both videos.
    """
    matrix = torch.as_tensor(matrix, dtype=torch.float32)
    weights = matrix - min_similarity
    weights.masked_fill_(weights < 0, NONE)
    stretches = []
    for weight, path in heaviest_paths(weights, STEP, GAP, SKEW, 2 * limit):
        if weight < least:  # evidence is at most the weight
            break
        stretch = stretch_of(matrix, path, weight, min_similarity)
        if stretch and stretch.evidence >= least:
            stretches.append(stretch)
        if len(stretches) == limit:
            break
    return stretches


@torch.inference_mode()
def first_stretches(
    matrix: Tensor, lengths: Sequence[int], min_similarity: float, least: float
) -> Iterator[tuple[int, Stretch | None]]:
    """Yield (number of a target, the first stretch that the query shares with it), heaviest first.

    Targets whose path weighs less than `least` are left out. None: `find_stretches` must look, as
    the heaviest path runs too fast.

    Args:
        matrix: frame similarities (Tq, sum (Tt + STEP)), see `align_paths`.
    """
    L = align_paths(matrix, min_similarity)
    starts = np.cumsum([0, *(length + STEP for length in lengths)])
    weights = np.maximum.reduceat(L.amax(0).numpy(), starts[:-1])
    for k in np.argsort(-weights, kind="stable"):
        if weights[k] < least or weights[k] == NONE:
            return
        columns = slice(starts[k], starts[k] + lengths[k])
        path = first_path(L[:, columns], matrix[:, columns], min_similarity)
        yield k, stretch_of(matrix[:, columns], path, float(weights[k]), min_similarity)


def stretch_of(
    matrix: Tensor, path: list[tuple[int, int]], weight: float, min_similarity: float
) -> Stretch | None:
    """The Stretch of a path; None if one video would run too fast."""
    segment = segment_of(weight, path, matrix)
    if not segment.runs_within(MAX_SPEED):
        return None
    weight_of, novelty = _weights_and_novelty(matrix, path, min_similarity)
    evidence = min(float((weight_of * novelty).sum()), weight)
    least = float(weight_of.min()) + min_similarity
    return Stretch(segment, evidence, float(novelty.sum()), len(path), least)


def _weights_and_novelty(matrix, path, min_similarity):
    """What each pair of frames on a path weighs, and how new it is, 0 to 1: (n,) each.

    A pair is as known as an earlier pair's frames are like its own, measured across the videos:
    the square of the similarity of its one frame with the earlier other frame, or the reverse,
    relative to the similarity of the pair.
    """
    i, j = torch.tensor(path).T
    own = matrix[i, j]
    known = torch.zeros(len(path))
    for start in range(0, len(path), BLOCK):
        block = slice(start, start + BLOCK)
        before = slice(0, start + BLOCK)
        # (block, before): each pair's frames against the other frames of the pairs before it.
        across = torch.maximum(matrix[i[block]][:, j[before]], matrix[:, j[block]][i[before]].T)
        known[block] = across.tril(start - 1).amax(1)
    known = (known / own.clamp(min=1e-6)).clamp(0, 1)
    return own - min_similarity, 1 - known.square()


# --- frames that are no evidence ----------------------------------------------------------------


def shows_something(jpeg_sizes: Sequence[int], jpeg: bytes) -> np.ndarray:
    """Which frames of a video are more than a plain colour, by their thumbnails' bytes: (T,) bool.

    Args:
        jpeg: one of the thumbnails; all have its width and height.
    """
    try:
        size = Image.open(io.BytesIO(jpeg)).size
    except OSError:  # damaged: `verify` names it
        return np.ones(len(jpeg_sizes), bool)
    return np.asarray(jpeg_sizes) > PLAIN * _plain_bytes(*size)


@functools.lru_cache(64)
def _plain_bytes(width, height):
    from features.presentation import JPEG_QUALITY

    file = io.BytesIO()
    Image.new("RGB", (width, height)).save(file, "JPEG", quality=JPEG_QUALITY)
    return len(file.getvalue())


# --- what it means ------------------------------------------------------------------------------


def verdict(calibration: dict[str, Any], evidence: float, distinct: float, matched: float) -> str:
    """One of `results.VERDICTS`; "" if the model is not calibrated.

    Args:
        evidence, distinct, matched: of a Stretch, in seconds (frames / fps).
    """
    if "certain" not in calibration:
        return ""
    if distinct >= CERTAIN_SECONDS and evidence >= calibration["certain"]:
        return "certain"
    if distinct >= LIKELY_SECONDS and evidence >= calibration["likely"]:
        return "likely"
    if distinct < LIKELY_SECONDS and matched >= STILL_SECONDS:
        return "same place"  # nothing changes for three seconds and more
    return "look yourself"
