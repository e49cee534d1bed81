"""What the scores of search mean for a model: thresholds, and figures, from graded copies.

`videoindex/calibrate.py` is the command. Thresholds are those of one half of the recordings, the
figures those of the other. An entry of calibration.json has

identity        of the model
min_similarity  how similar two frames must be to match
threshold       the least score that `query` shows: 99 % of the answers share film or a place, and
                one in 2,000 unrelated pairs reaches it, whichever is stricter
certain         the least score, with two seconds of different film and more, at which 99 % share
                film
likely          the least score, with 1.5 s, at which 90 % share film; for `duplicates`
radius          the similarity of window descriptors that 99 % of the copies found have
measured        the figures of the other half, with their counts
"""

import itertools
import os
import random
import tempfile
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

import utils
from datasets.evaluation_set import average_precision
from videoindex import evidence
from videoindex.comparison import Comparer
from videoindex.evidence import CERTAIN_SECONDS, LIKELY_SECONDS, Stretch
from videoindex.graded_copies import (
    HALVES,
    Piece,
    Recording,
    label_of,
    make_copies,
    read_truth,
    shared_segments,
)
from videoindex.index import VideoIndex
from videoindex.pipeline import Pipeline

PRECISION, CERTAIN_PRECISION, LIKELY_PRECISION = 0.99, 0.99, 0.9
UNRELATED_SHARE = 1 / 2000  # of unrelated pairs, that may reach the threshold
MIN_SIMILARITY = 0.15
FILM = ("film", "a moment")  # labels of pairs that share film
# `search.py calibrate`: what two videos of unknown relation share if their frames weigh so much on
# average; and the precision that the thresholds must have on the other half.
RELATED_WEIGHT, OWN_PRECISION = 0.3, 0.9


class Pairs(NamedTuple):
    """All pairs of videos of a half.

    names: [(video, video)]
    labels: (n,) of `graded_copies.label_of`
    evidence, distinct, matched: (n,), of the first stretch, in seconds; 0 without one
    stretches: the first stretch, or None
    near: (n,), the highest similarity of two window descriptors
    """

    names: list[tuple[str, str]]
    labels: np.ndarray
    evidence: np.ndarray
    distinct: np.ndarray
    matched: np.ndarray
    stretches: list[Stretch | None]
    near: np.ndarray


def calibrate(
    copies: Path,
    pipeline: Pipeline,
    work: Path,
    min_similarity: float = MIN_SIMILARITY,
    related: bool = False,
    before: dict[str, float] | None = None,
) -> dict[str, Any]:
    """The calibration of a model, an entry of calibration.json.

    Args:
        copies: of `make_copies`.
        work: folder for the indexes.
        related: whether recordings may share film that the truth does not know of.
        before: other thresholds, whose figures are to be told too, in `before`.
    """
    truth = read_truth(copies)
    stamp = utils.digest(pipeline.identity)  # another model gets other indexes
    indexes = {}
    for half in HALVES:
        indexes[half] = VideoIndex(work / f"{half}-{stamp}.index", pipeline=pipeline)
        update = indexes[half].add([copies / half])
        if update.failed:
            raise utils.InputError(f"{update.failed[0][0]!r}: {update.failed[0][1]}")
    settings = {"min_similarity": min_similarity}
    tuned = compare_all(indexes["calibration"], truth["calibration"], settings)
    left_out = []
    if related:
        tuned, left_out = without_related(tuned, truth["calibration"])
    settings |= choose_thresholds(tuned)
    settings = {name: round(float(value), 4) for name, value in settings.items()}
    seen = compare_all(indexes["test"], truth["test"], settings)
    if related:
        seen, others = without_related(seen, truth["test"])
        left_out += others
    figures = figures_of(seen, settings) | {
        "groups": figures_of_groups(indexes["test"], seen, settings),
        "ends": figures_of_ends(seen, truth["test"], settings, pipeline.options["fps"]),
        "mAP": round(mean_average_precision(seen), 4),
    }
    entry = {"identity": dict(pipeline.identity), **settings, "measured": figures}
    if before:
        entry["before"] = {"threshold": before["threshold"], **figures_of(seen, before)}
    return entry | {"related": left_out} if related else entry


def compare_all(
    index: VideoIndex, truth: dict[str, list[Piece]], settings: dict[str, float]
) -> Pairs:
    """Compare every pair of an index's videos."""
    numbers = {Path(path).stem: file.content for path, file in index.store.known_files().items()}
    names = sorted(truth)
    contents = [index.store.content(numbers[name]) for name in names]
    comparer = Comparer(index.store, index.fps, settings, index.memory)
    fps = float(index.fps)
    windows = [index.store.window_descriptors(content) for content in contents]
    pairs, labels, found, near = [], [], [], []
    for i in tqdm(range(len(names)), unit="video", disable=None, leave=False):
        others = contents[i + 1 :]
        first = comparer.compare(comparer.frames_of(contents[i]), others, 0.0) if others else {}
        for j in range(i + 1, len(names)):
            pairs.append((names[i], names[j]))
            labels.append(label_of(truth[names[i]], truth[names[j]]))
            found.append(first.get(contents[j].id))
            near.append(float((windows[i] @ windows[j].T).max()))

    def values(part):
        return np.array([getattr(s, part) / fps if s else 0.0 for s in found])

    parts = values("evidence"), values("distinct"), values("matched")
    return Pairs(pairs, np.array(labels), *parts, found, np.array(near))


def choose_thresholds(pairs: Pairs) -> dict[str, float]:
    """threshold, certain, likely and radius; see the module."""
    is_film = np.isin(pairs.labels, FILM)
    unrelated = np.sort(pairs.evidence[pairs.labels == ""])[::-1]
    threshold = max(
        lowest_threshold(pairs.evidence, pairs.labels != "", PRECISION),
        unrelated[int(UNRELATED_SHARE * len(unrelated))] if len(unrelated) else 0.0,
    )
    levels = {}
    for name, seconds, precision in (
        ("certain", CERTAIN_SECONDS, CERTAIN_PRECISION),
        ("likely", LIKELY_SECONDS, LIKELY_PRECISION),
    ):
        among = pairs.distinct >= seconds
        lowest = lowest_threshold(pairs.evidence[among], is_film[among], precision)
        levels[name] = max(threshold, lowest)
    is_found = (pairs.labels == "film") & (pairs.evidence >= threshold)
    if not is_found.any():
        raise utils.InputError("no copy can be told from other videos; take others, or more")
    return {
        "threshold": threshold,
        "certain": max(levels.values()),
        "likely": levels["likely"],
        "radius": np.quantile(pairs.near[is_found], 0.01),
    }


def lowest_threshold(scores: np.ndarray, is_right: np.ndarray, precision: float) -> float:
    """The lowest score s such that of the pairs with score >= s, this share is right.

    If there is none, the highest score of all.

    Args:
        scores, is_right: (n,), of n pairs.
    """
    order = np.argsort(-scores, kind="stable")
    num_right = np.cumsum(is_right[order])
    num_answers = np.arange(1, len(order) + 1)
    # Of equal scores all are answers.
    is_last = np.append(np.diff(scores[order]) != 0, True)[: len(order)]
    good = np.flatnonzero((num_right >= precision * num_answers) & is_last)
    if not len(good):
        return float(scores.max(initial=0.0))
    return float(scores[order[good[-1]]])


# --- an index's own videos ----------------------------------------------------------------------


def calibrate_index(
    index: VideoIndex,
    count: int = 20,
    seed: int = 0,
    on_video: Callable[[str, str], None] = lambda name, reason: None,
) -> dict[str, Any]:
    """The calibration of an index's model by copies of a sample of its own videos.

    Half of the sample gives the thresholds, the other half the figures. Videos of the sample that
    seem to share film are left apart: `related` names these pairs.

    Args:
        count: how many videos; at least four.
        on_video: as for `make_copies`.

    Raises:
        InputError: with fewer than four videos that exist, or if copies of them cannot be told
            from other videos.
    """
    paths = [path for path in index.store.known_files() if os.path.exists(path)]
    if len(paths) < 4:
        raise utils.InputError("calibration takes four videos and more; index some first")
    recordings = sample_of(paths, count, seed)
    with tempfile.TemporaryDirectory() as folder:
        make_copies(recordings, Path(folder), on_video, max_originals=1)
        truth = read_truth(Path(folder))
        if min(map(len, truth.values())) < 2:
            raise utils.InputError("too few videos of the sample last long enough; raise --count")
        before = index.calibration if "threshold" in index.calibration else None
        entry = calibrate(Path(folder), index.pipeline, Path(folder), related=True, before=before)
    measured = entry["measured"]
    for what, (good, of) in (
        ("answers that are right", measured["right"]),
        ("pairs of a group that share film", measured["groups"]["pure"]),
    ):
        if good < OWN_PRECISION * of or not measured["recall"][0]:
            raise utils.InputError(
                f"copies of these videos cannot be told from others ({what}: {good} of {of});"
                " nothing is stored; raise --count, or index other videos"
            )
    files = {recording.film: str(recording.file) for recording in recordings}
    related = [sorted(files[film] for film in pair) for pair in entry["related"]]
    return entry | {"related": related, "own": True}


def sample_of(paths: Sequence[str], count: int, seed: int = 0) -> list[Recording]:
    """`count` of the files, in two halves, each named from the folder that all of them lie in.

    Copies are drawn by these names, so they do not depend on where that folder lies.
    """
    above, chosen = os.path.commonpath(paths), sorted(paths)
    random.Random(seed).shuffle(chosen)
    names = [(Path(path), os.path.relpath(path, above)) for path in chosen[:count]]
    return [Recording(path, name, name, HALVES[i % 2]) for i, (path, name) in enumerate(names)]


def without_related(pairs: Pairs, truth: dict[str, list[Piece]]) -> tuple[Pairs, list[list[str]]]:
    """The pairs, less those of recordings that seem to share film, and these recordings' names.

    Two recordings seem to if two of their videos match in CERTAIN_SECONDS of different film, whose
    frames weigh RELATED_WEIGHT in the mean.
    """
    films = [
        tuple(frozenset(piece.film for piece in truth[name]) for name in pair)
        for pair in pairs.names
    ]
    related = set()
    is_match = pairs.distinct >= CERTAIN_SECONDS
    is_match &= pairs.evidence >= RELATED_WEIGHT * pairs.distinct
    for (a, b), label, matches in zip(films, pairs.labels, is_match, strict=True):
        if not label and matches:
            related |= {frozenset((x, y)) for x in a for y in b}
    kept = []
    for (a, b), label in zip(films, pairs.labels, strict=True):
        kept.append(bool(label) or not any(frozenset((x, y)) in related for x in a for y in b))
    parts = []
    for part in pairs:
        if isinstance(part, np.ndarray):
            parts.append(part[kept])
        else:
            parts.append(list(itertools.compress(part, kept)))
    return Pairs(*parts), sorted(sorted(pair) for pair in related)


# --- figures ------------------------------------------------------------------------------------


def figures_of(pairs: Pairs, settings: dict[str, float]) -> dict[str, Any]:
    """Precision and recall of the answers, and of each verdict, as [right, of]."""
    found = pairs.evidence >= settings["threshold"]
    is_film = np.isin(pairs.labels, FILM)
    is_copy = pairs.labels == "film"
    words = np.array(
        [
            evidence.verdict(settings, *parts)
            for parts in zip(pairs.evidence, pairs.distinct, pairs.matched, strict=True)
        ]
    )
    figures = {
        "videos": len({name for pair in pairs.names for name in pair}),
        "pairs": len(pairs.labels),
        "right": counts(pairs.labels[found] != ""),
        "share_film": counts(is_film[found]),
        "recall": counts(found[is_copy]),
        "unrelated": counts(found[pairs.labels == ""]),
    }
    for word in np.unique(words[found]):
        figures[str(word)] = counts(is_film[found & (words == word)])
    return figures


def counts(flags):
    """[how many are true, of how many]."""
    return [int(flags.sum()), len(flags)]


def figures_of_groups(
    index: VideoIndex, pairs: Pairs, settings: dict[str, float]
) -> dict[str, Any]:
    """How pure the groups of `duplicates` are.

    pure: [pairs of one group that share film, pairs of one group], of those in `pairs`
    grouped: [videos that have a copy and are in a group or a part of one, videos that have a copy]
    """
    label_of_pair = dict(zip(map(frozenset, pairs.names), pairs.labels.tolist(), strict=True))
    copied = set().union(*(pair for pair, label in label_of_pair.items() if label == "film"))
    groups = index.duplicates(calibration=settings)
    pure, grouped = [], set()
    for group in groups:
        members = [Path(paths[0]).stem for paths in group.files.values()]
        for pair in map(frozenset, itertools.combinations(members, 2)):
            if pair in label_of_pair:
                pure.append(label_of_pair[pair] in FILM)
        grouped |= set(members) | {Path(paths[0]).stem for paths in group.part_files.values()}
    return {
        "groups": len(groups),
        "largest": max((len(group.files) for group in groups), default=0),
        "pure": counts(np.array(pure, bool)),
        "grouped": [len(copied & grouped), len(copied)],
    }


def figures_of_ends(
    pairs: Pairs, truth: dict[str, list[Piece]], settings: dict[str, float], fps: str
) -> dict[str, list[int]]:
    """[ends of stretches within 1 s of the truth, ends], of copies and of film inside others."""
    rate = float(Fraction(fps))
    rows = {"copies": [], "inside others": []}
    for (a, b), label, score, stretch in zip(
        pairs.names, pairs.labels, pairs.evidence, pairs.stretches, strict=True
    ):
        true = list(shared_segments(truth[a], truth[b]))
        if label != "film" or score < settings["threshold"] or len(true) != 1:
            continue
        segment = stretch.segment
        ends = segment.query_start, segment.query_end, segment.target_start, segment.target_end
        errors = np.abs(np.array(ends) / rate - true[0])
        is_inside = len(truth[a]) > 1 or len(truth[b]) > 1
        rows["inside others" if is_inside else "copies"].extend(errors <= 1)
    return {name: counts(np.array(flags, bool)) for name, flags in rows.items()}


def mean_average_precision(pairs: Pairs) -> float:
    """mAP by evidence: each video that has a copy asks for its copies among all others.

    Of equal evidence, what is no copy comes first.
    """
    scores: dict[str, list] = {}
    for (a, b), label, score in zip(pairs.names, pairs.labels, pairs.evidence, strict=True):
        if label != "a moment":  # neither right nor wrong
            for name in (a, b):
                scores.setdefault(name, []).append((label == "film", score))
    values = []
    for rows in scores.values():
        rows.sort(key=lambda row: (-row[1], row[0]))
        hits = np.array([is_copy for is_copy, _ in rows])
        if hits.any():
            values.append(average_precision(hits, int(hits.sum())))
    return float(np.mean(values))


# --- what is printed ----------------------------------------------------------------------------


def print_entry(name: str, entry: dict[str, Any]) -> None:
    measured = entry["measured"]
    levels = ", ".join(
        f"{level} {entry[level]:.3f}" for level in ("threshold", "certain", "likely", "radius")
    )
    print(f"{name}: {levels}; mAP {measured['mAP']:.4f}")
    rows = {key: value for key, value in measured.items() if isinstance(value, list)}
    rows |= {
        f"groups, {key}": value
        for key, value in measured["groups"].items()
        if key in ("pure", "grouped")
    }
    rows |= {f"ends, {key}": value for key, value in measured["ends"].items()}
    for key, (part, whole) in rows.items():
        print(f"  {key:20} {part:5} of {whole:5}  {part / max(whole, 1):.1%}")
