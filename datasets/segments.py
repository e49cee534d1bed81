"""Sets of video pairs with the segments that they share, scored by VCSL's metric.

A segment is [query start, reference start, query end, reference end] in seconds, the order of
VCSL's files: a rectangle in the plane of the two times.
"""

import csv
import json
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from datasets.evaluation_set import annotation_errors
from untrusted import read_json, read_text
from utils import InputError, describe_ids

Pair = tuple[str, str]  # query, reference
Segments = Sequence[Sequence[float]]  # [[query start, reference start, query end, reference end]]

LABEL_FORM = "VCSL's form {QUERY-REFERENCE: [[start, start, end, end], ...]}"
MAX_SECONDS = 1e9  # sums of larger numbers would lose seconds
PAIR_FORM = "VCSL's list of pairs, query_id,reference_id"


# --- the metric ---------------------------------------------------------------------------------


def covered_share(segments: Segments, others: Segments) -> float:
    """How much of the `segments` lies in the `others`: VCSL's overlap (He et al., CVPR 2022).

    A segment counts with each of the others that it overlaps on both time axes. Its covered length
    on an axis is that of the union of these overlaps. The share of an axis is the covered length
    of all segments over their whole length, and the result is the product of both shares.

    Recall is the share of the labelled segments in the predicted ones, precision the reverse. So a
    segment predicted twice costs no precision, as both are covered, and one long prediction over
    two labelled segments is as good as two, but for what lies between them.
    """
    covered, lengths = [0.0, 0.0], [0.0, 0.0]
    for segment in segments:
        overlaps = _overlaps(segment, others)
        for axis in (0, 1):
            covered[axis] += _union_length(overlaps[axis])
            lengths[axis] += segment[axis + 2] - segment[axis]
    if not all(lengths):
        return 0.0
    return covered[0] / lengths[0] * (covered[1] / lengths[1])


def _overlaps(segment, others):
    """The intervals of a segment, on each axis, that it shares with others on both axes."""
    query, reference = [], []
    for other in others:
        start = max(segment[0], other[0]), max(segment[1], other[1])
        end = min(segment[2], other[2]), min(segment[3], other[3])
        if start[0] < end[0] and start[1] < end[1]:
            query.append((start[0], end[0]))
            reference.append((start[1], end[1]))
    return query, reference


def _union_length(intervals):
    total, reached = 0.0, -math.inf
    for start, end in sorted(intervals):
        total += max(end - max(start, reached), 0)
        reached = max(reached, end)
    return total


class SegmentSet:
    """Pairs of videos, and where they share material; scored as VCSL's evaluator does.

    Metrics:

        recall      mean of the pairs' recall, over the pairs that share something
        precision   mean of the pairs' precision, over the pairs with a prediction. One in a pair
                    that shares nothing has precision 0. NaN if nothing is predicted.
        F1          2 * recall * precision / (recall + precision); 0 if nothing is right
        FRR         false rejections: the share of the pairs that share something for which nothing
                    is predicted
        FAR         false alarms: the share of the pairs that share nothing for which something is
                    predicted; only if the set has such pairs

    Recall and precision of a pair are `covered_share`. Every listed pair counts once, in its
    direction: a pair of a video with itself is one as well, and so are (a, b) and (b, a).

    Source: VCSL, `precision_recall` and `evaluate_micro` in vcsl/metric.py (github.com/
    ant-research/VCSL, revision 6bc4678); TransVCL's metric/eval.py is the same. They add 1e-6 to
    the lengths; a perfect prediction is exactly 1 here. They also keep labelled segments without
    extent on an axis (45 in VCSL's test pairs), which nothing can find; here these are left out,
    and `source` counts them. A pair without an entry in the predictions has none, as in TransVCL.

    Attributes:
        pairs: in the order of the list, each once
        labels: {pair: segments} of the pairs that share something
        source: the annotation this set was read from, for the record
    """

    def __init__(self, pairs: Iterable[Pair], labels: Mapping[Pair, Segments], source: str):
        self.pairs = list(dict.fromkeys(pairs))
        self.labels, without_extent = {}, 0
        for pair in self.pairs:
            found = []
            for segment in labels.get(pair, ()):
                if segment[0] < segment[2] and segment[1] < segment[3]:
                    found.append(segment)
            without_extent += len(labels.get(pair, ())) - len(found)
            if found:
                self.labels[pair] = found
        self.source = source
        if without_extent:
            self.source += f", {without_extent} segments without extent left out"
        if not self.pairs:
            raise InputError(f"{source} lists no pair")

    @property
    def videos(self) -> list[str]:
        return list(dict.fromkeys(video for pair in self.pairs for video in pair))

    def pairs_of(self, available: Collection[str]) -> list[Pair]:
        """The pairs of which both videos are available."""
        return [pair for pair in self.pairs if pair[0] in available and pair[1] in available]

    def coverage(self, available: Collection[str]) -> dict[str, int]:
        pairs = self.pairs_of(available)
        return {
            "pairs": len(pairs),
            "pairs_missing": len(self.pairs) - len(pairs),
            "pairs_that_share": sum(pair in self.labels for pair in pairs),
            "videos": sum(video in available for video in self.videos),
            "videos_missing": sum(video not in available for video in self.videos),
        }

    def evaluate(
        self, predictions: Mapping[Pair, Segments], available: Collection[str] | None = None
    ) -> dict[str, float]:
        """The metrics {name: value}.

        Args:
            predictions: {pair: segments}; pairs that the set does not list are ignored
            available: the videos that were searched; pairs with another video do not count. By
                default all.
        """
        pairs = self.pairs if available is None else self.pairs_of(available)
        recalls, precisions, missed, alarms, unrelated = [], [], 0, 0, 0
        for pair in pairs:
            predicted, labelled = predictions.get(pair, ()), self.labels.get(pair, ())
            if len(labelled):
                recalls.append(covered_share(labelled, predicted))
                missed += not len(predicted)
            else:
                unrelated += 1
                alarms += bool(len(predicted))
            if len(predicted):
                precisions.append(covered_share(predicted, labelled))
        if not recalls:
            raise InputError(f"no pair that shares something is left ({self.source})")

        recall = sum(recalls) / len(recalls)
        precision = sum(precisions) / len(precisions) if precisions else math.nan
        metrics = {
            "recall": recall,
            "precision": precision,
            "F1": 2 * recall * precision / (recall + precision) if recall else 0.0,
            "FRR": missed / len(recalls),
        }
        if unrelated:
            metrics["FAR"] = alarms / unrelated
        return metrics


# --- files --------------------------------------------------------------------------------------


def load_segment_files(directory: str | Path, pairs: str, labels: str) -> SegmentSet:
    """A set of two files in VCSL's form: the pairs as CSV, the labelled segments as JSON."""
    pair_path, label_path = Path(directory) / pairs, Path(directory) / labels
    listed = _read_pairs(pair_path)
    with annotation_errors(label_path, LABEL_FORM):
        table = read_json(label_path, "annotation file")
        labels = {}
        for query, reference in listed:
            segments = table.get(pair_key(query, reference), ())
            labels[query, reference] = [tuple(map(_number, segment)) for segment in segments]
            if any(len(segment) != 4 for segment in segments):
                raise ValueError(f"{query}-{reference}: a segment is not four numbers")
    return SegmentSet(listed, labels, f"annotation {label_path.name!r}")


def pair_key(query: str, reference: str) -> str:
    """A pair's key in VCSL's files. Ids may hold dashes, so a key cannot be split again."""
    return f"{query}-{reference}"


def _read_pairs(path):
    with annotation_errors(path, PAIR_FORM):
        # Not str.splitlines, which also splits at separators that an id may hold.
        header, *rows = csv.reader(read_text(path, "pair list").split("\n"))
        if header[:2] != ["query_id", "reference_id"]:
            raise ValueError(f"its first line is {','.join(header)[:40]!r}")
        return [(row[0], row[1]) for row in rows if row]


def read_segments(
    path: str | Path, segment_set: SegmentSet, min_score: float | None = None
) -> tuple[dict[Pair, Segments], int]:
    """Predicted segments of any system: JSON in VCSL's form, {QUERY-REFERENCE: segments}.

    A segment may have a score as its fifth number (TransVCL's results do).

    Args:
        min_score: leave out segments whose score is not above this
    Returns:
        {pair: segments}, and how many keys are not pairs of the set
    Raises:
        InputError: the file is not of that form, names no pair of the set, a number is not finite,
            or a segment ends before it starts
    """
    table = read_json(path, "segment file", object_pairs_hook=_without_repetition)
    if not isinstance(table, dict):
        raise InputError(f"segment file {str(path)!r} is not of {LABEL_FORM}")
    predictions = {}
    for pair in segment_set.pairs:
        key = pair_key(*pair)
        if key in table:
            where = f"segment file {str(path)!r}, {key!r}"
            predictions[pair] = _check_segments(table[key], min_score, where)
    known = [pair_key(*pair) for pair in segment_set.pairs]
    if table and not predictions:
        raise InputError(
            f"segment file {str(path)!r} has no pair of the set ({segment_set.source}):"
            f" {describe_ids(known, table)}"
        )
    return predictions, len(table.keys() - set(known))


def _without_repetition(pairs):
    table = dict(pairs)
    if len(table) < len(pairs):
        raise ValueError("a pair is given twice")
    return table


def _check_segments(segments, min_score, where):
    if not isinstance(segments, list):
        raise InputError(f"{where}: a {type(segments).__name__} where a list was expected")
    kept = []
    for segment in segments:
        try:
            *ends, score = [*map(_number, segment), None][:5] if len(segment) < 6 else []
            query_start, reference_start, query_end, reference_end = ends
        except (TypeError, ValueError):
            raise InputError(
                f"{where}: {json.dumps(segment)[:60]} is not four finite numbers, or five with a"
                " score"
            ) from None
        if query_end < query_start or reference_end < reference_start:
            raise InputError(
                f"{where}: {json.dumps(segment)[:60]} ends before it starts; the order is query"
                " start, reference start, query end, reference end"
            )
        if min_score is not None and score is None:
            raise InputError(f"{where}: a segment has no score, which --min_score needs")
        if min_score is None or score > min_score:
            kept.append(tuple(ends))
    return kept


def _number(value):
    if type(value) not in (int, float) or not abs(value) <= MAX_SECONDS:
        raise ValueError(f"{value!r} is not a number of seconds")
    return value
