"""What every evaluation set shares: ranking, average precision, coverage.

A set has queries, a database and a protocol. It does not use models: it scores similarities
of any source, either a table (Q, N) with the ids of its rows and columns, or a dictionary
{query: {video: similarity}}. Each level of detail has methods for a table and for a
dictionary:

    evaluate_table, evaluate   {name: value}, the metrics that papers print
    per_query                  {task: {query: AP}}; only for a table
    rankings, rankings_of      query by query, which ranks hold a relevant video
"""

import contextlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from utils import InputError, describe_ids, digest

# Videos vanish from the web, so few people have whole sets, and what is missing moves the third
# digit of a mAP. Above this share of queries or videos, the metrics are printed with a note.
MISSING_SHARE = 0.01


# --- the metrics of one ranking -----------------------------------------------------------------


def average_precision(hits: np.ndarray, num_relevant: int) -> float:
    """AP of one ranking: the sum of precision@rank over the hits, divided by `num_relevant`.

    Args:
        hits: (N,) bool, whether the video at each rank is relevant, best rank first
        num_relevant: how many videos should be found; those not ranked count as never found
    """
    ranks = np.flatnonzero(hits) + 1
    found = np.arange(1, len(ranks) + 1)
    return float((found / ranks).sum() / num_relevant)


def trapezoidal_average_precision(hits: np.ndarray, num_relevant: int) -> float:
    """AP as the area under the precision-recall polygon (Holidays, EVVE).

    The k-th hit, at rank r, adds a trapezoid of width 1 / num_relevant between the precision just
    before it, (k - 1) / (r - 1), and the precision with it, k / r. At rank 1 the precision before
    is taken as 1. Arguments are those of `average_precision`.
    """
    ranks = np.flatnonzero(hits) + 1
    found = np.arange(1, len(ranks) + 1)
    before = np.where(ranks == 1, 1, (found - 1) / np.maximum(ranks - 1, 1))
    return float(((before + found / ranks) / 2).sum() / num_relevant)


def precision_recall(hits: np.ndarray, num_relevant: int, points: int = 21) -> np.ndarray:
    """The interpolated precision-recall curve of FIVR (its Eq. 5).

    Precision at recall r is the highest precision at any rank whose recall is at least r, and 0
    where the ranking never reaches r. The official script starts each curve at precision 1,
    because its library appends that point at recall 0; this function does not.

    Returns:
        (points,) precision at recall 0, ..., 1 in equal steps
    """
    ranks = np.flatnonzero(hits) + 1
    precision = np.arange(1, len(ranks) + 1) / ranks  # at each hit
    best = np.maximum.accumulate(precision[::-1])[::-1]  # at that hit or later
    curve = np.zeros(points)
    for i in range(points):
        # The first hit whose recall is at least i / (points - 1); -(-a // b) rounds a / b up.
        k = max(-(-i * num_relevant // (points - 1)), 1)
        if k <= len(best):
            curve[i] = best[k - 1]
    return curve


class Ranking(NamedTuple):
    """The ranking of one query for one task.

    hits: (N,) bool by rank, best rank first
    num_relevant: how many videos should be found; 0 if the query is skipped
    positions: (N,) the ranked videos, as positions in the database
    similarities: (N,) of these videos, descending
    num_others: the relevant videos with features, without the query itself (for detection)
    """

    hits: np.ndarray
    num_relevant: int
    positions: np.ndarray
    similarities: np.ndarray
    num_others: int


class Judgement(NamedTuple):
    """What the annotation says of one query for one task. Videos are positions in the database.

    relevant: the videos to find
    candidates: the videos that enter the ranking; None for the whole database
    num_relevant: how many should be found, if the set counts videos without features too;
        None counts the relevant videos with features
    """

    relevant: np.ndarray
    candidates: np.ndarray | None = None
    num_relevant: int | None = None


# --- a set --------------------------------------------------------------------------------------


class EvaluationSet:
    """The base of all sets. A subclass names its TASKS and fills `judgements`.

    DETECTION names the micro-AP of each task (datasets/detection.py).

    Ranking. Videos are ranked by descending similarity; ties keep the order of the database.
    Videos without features are not ranked, and ids unknown to the set are ignored. The query is
    removed from its own ranking, unless RANKS_QUERY.

    Counting. A query should find its relevant videos that are in the database and have features
    (for a dictionary of similarities: that were searched). One of them without a similarity counts
    as never found. Queries without features are left out, and so are, task by task, queries with
    nothing to find; `coverage` counts both.

    Metric. The mean AP over the queries that remain; NaN if none does.

    Attributes:
        queries, database: lists of ids, each id once
        source: the annotation this set was read from, for the record
        judgements: for each query, in order, {task: Judgement}
        hard: the set's hard split, or None
    """

    TASKS: Collection[str] = ("mAP",)
    DETECTION: Mapping[str, str] = {"mAP": "uAP"}
    RANKS_QUERY = False
    average_precision = staticmethod(average_precision)
    hard: "EvaluationSet | None" = None

    def __init__(self, queries: Iterable[str], database: Iterable[str], source: str):
        self.source = source
        self.judgements = []
        self._set_ids(list(queries), list(database))

    def _set_ids(self, queries, database):
        for name in (*queries, *database):
            if not isinstance(name, str):
                raise ValueError(f"id {name!r} is not a text")
        self.queries, self.database = queries, database
        self._query_index = positions_by_id(queries, f"{self.source}: query")
        self._position = positions_by_id(database, f"{self.source}: video")

    def fingerprint(self) -> str:
        """A digest of queries, database and judgements: tells two annotations of one name apart."""
        judged = []
        for tasks in self.judgements:
            judged.append(
                {
                    task: [sorted(judgement.relevant.tolist()), judgement.num_relevant]
                    for task, judgement in tasks.items()
                }
            )
        return digest([self.queries, self.database, judged])

    def with_ids_as_in(self, available: Collection[str]) -> "EvaluationSet":
        """The set with its ids spelled as in `available`, if they are public in two spellings."""
        return self

    # --- metrics ---

    def evaluate(
        self,
        similarities: Mapping[str, Mapping[str, float]],
        available: Iterable[str] | None = None,
    ) -> dict[str, float]:
        """The metrics of the set, from a dictionary of similarities.

        Args:
            similarities: {query: {video: similarity}}, what the system found; a query without a
                row found nothing
            available: the ids, of queries and videos, that the system searched; by default all of
                the set. The others are neither ranked nor counted.
        Returns:
            {name: value}
        Raises:
            InputError: no query can be scored, or a similarity is NaN or infinite. That includes
                minus infinity: leave out pairs that were not compared.
        """
        return self.metrics(self.average_precisions(self.rankings_of(similarities, available)))

    def evaluate_table(
        self, queries: Sequence[str], videos: Sequence[str], table: np.ndarray
    ) -> dict[str, float]:
        """The same from a table (Q, N) between `queries` and `videos`, which all have features."""
        return self.metrics(self.per_query(queries, videos, table))

    def per_query(
        self, queries: Sequence[str], videos: Sequence[str], table: np.ndarray
    ) -> dict[str, dict[str, float]]:
        """{task: {query: AP}} of the queries that can be scored; arguments of `evaluate_table`."""
        return self.average_precisions(self.rankings(queries, videos, table))

    def average_precisions(
        self, rankings: Iterable[tuple[str, dict[str, Ranking]]]
    ) -> dict[str, dict[str, float]]:
        """{task: {query: AP}} from what `rankings` or `rankings_of` yields."""
        aps = {task: {} for task in self.TASKS}
        any_ranked = False
        for query, tasks in rankings:
            for task, ranking in tasks.items():
                if ranking.num_relevant:
                    aps[task][query] = self.average_precision(ranking.hits, ranking.num_relevant)
                    any_ranked |= len(ranking.hits) > 0
        if not any_ranked:
            raise InputError(
                f"none of the {len(self.queries)} queries can be scored; do the ids of the"
                f" similarities belong to {self.source}?"
            )
        return aps

    def metrics(self, aps: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
        """The metrics {name: value} that papers print, from {task: {query: AP}}."""
        return {task: mean_or_nan(by_query.values()) for task, by_query in aps.items()}

    # --- rankings ---

    def rankings(
        self, queries: Sequence[str], videos: Sequence[str], table: np.ndarray
    ) -> Iterator[tuple[str, dict[str, Ranking]]]:
        """Yield (query, {task: Ranking}). A task in which it has nothing to find has no AP.

        Args:
            queries, videos: Q and N ids
            table: (Q, N) similarities; any object with that shape that gives a row at a time
        Raises:
            InputError: an id is given twice, the shape differs, or a similarity is not finite
        """
        queries, videos = list(queries), list(videos)
        if np.shape(table) != (len(queries), len(videos)):
            raise InputError(
                f"the table has shape {np.shape(table)}, which does not fit"
                f" {len(queries)} queries and {len(videos)} videos"
            )
        positions_by_id(queries, "table: query")  # refuses an id given twice
        rows = ((query, videos, table[i]) for i, query in enumerate(queries))
        return self._rank({*queries, *videos}, rows)

    def rankings_of(
        self,
        similarities: Mapping[str, Mapping[str, float]],
        available: Iterable[str] | None = None,
    ) -> Iterator[tuple[str, dict[str, Ranking]]]:
        """The same from a dictionary; arguments of `evaluate`."""
        if available is None:
            available = {*self.queries, *self.database}
        without_row = [query for query in self.queries if query not in similarities]
        rows = (
            (query, list(row), np.fromiter(row.values(), float, len(row)))
            for query, row in [*similarities.items(), *((query, {}) for query in without_row)]
        )
        return self._rank(set(available), rows)

    def _rank(self, available, rows):
        """Yield what `rankings` does, from rows (query, ids of the videos, similarities)."""
        has_features = self._has_features(available)
        previous_ids = None
        for query, ids, row in rows:
            if query not in self._query_index or query not in available:
                continue
            if ids != previous_ids:  # the rows of a table share theirs
                columns, positions = self._columns_in_database_order(ids, has_features)
                previous_ids = ids
            row = _require_finite(query, ids, row)[columns]
            order = np.argsort(-row, kind="stable")  # stable: ties keep this order
            own = self.position_of(query)
            if not self.RANKS_QUERY:
                order = order[positions[order] != own]
            ranked, similarities = positions[order], row[order]

            tasks = {}
            for task, judgement in self.judgements[self._query_index[query]].items():
                task_ranked, task_similarities = ranked, similarities
                if judgement.candidates is not None:
                    is_candidate = self._mask(judgement.candidates)[ranked]
                    task_ranked = ranked[is_candidate]
                    task_similarities = similarities[is_candidate]
                others = judgement.relevant[judgement.relevant != own]
                tasks[task] = Ranking(
                    self._mask(judgement.relevant)[task_ranked],
                    _count_relevant(judgement, has_features),
                    task_ranked,
                    task_similarities,
                    int(has_features[others].sum()),
                )
            yield query, tasks

    def _columns_in_database_order(self, ids, has_features):
        """The columns of a row over `ids` that are ranked, and their positions in the database."""
        positions_by_id(ids, "table: video")  # refuses an id given twice
        positions = np.fromiter((self._position.get(video, -1) for video in ids), int, len(ids))
        columns = np.argsort(positions)
        columns = columns[positions[columns] >= 0]  # known to the set
        columns = columns[has_features[positions[columns]]]
        return columns, positions[columns]

    def _mask(self, positions):
        """(N,) bool over the database: true at `positions`."""
        mask = np.zeros(len(self.database), bool)
        mask[positions] = True
        return mask

    def _has_features(self, available):
        """(N,) bool over the database."""
        present = (video in available for video in self.database)
        return np.fromiter(present, bool, len(self.database))

    def positions_of(self, videos: Iterable[str]) -> np.ndarray:
        """The positions in the database of those `videos` that are in it, each once."""
        known = [self._position[video] for video in set(videos) if video in self._position]
        return np.array(known, int)

    def position_of(self, video: str) -> int:
        """The position of a video in the database, or -1."""
        return self._position.get(video, -1)

    def database_ids(self, videos: Iterable[str]) -> list[str]:
        """Those of `videos` that are in the database."""
        return [video for video in videos if video in self._position]

    # --- what is missing, what is unknown ---

    def coverage(self, available: Iterable[str]) -> dict:
        """How much of the set has features, as numbers of queries and videos."""
        available = set(available)
        has_features = self._has_features(available)
        present = [i for i, query in enumerate(self.queries) if query in available]
        nothing_to_find = dict.fromkeys(self.TASKS, 0)
        for i in present:
            for task, judgement in self.judgements[i].items():
                nothing_to_find[task] += not _count_relevant(judgement, has_features)
        return {
            "queries": len(present),
            "queries_missing": len(self.queries) - len(present),
            "videos": int(has_features.sum()),
            "videos_missing": int((~has_features).sum()),
            "queries_without_relevant": nothing_to_find,
        }

    def count_unknown_ids(self, queries: Iterable[str], videos: Iterable[str]) -> dict[str, int]:
        """How many of these ids are not in the set: {"queries": count, "videos": count}."""
        known_videos = self._position.keys() | self._query_index.keys()
        return {
            "queries": sum(query not in self._query_index for query in queries),
            "videos": sum(video not in known_videos for video in videos),
        }

    def count_unlisted_ids(
        self, similarities: Mapping[str, Mapping[str, float]], available: Collection[str]
    ) -> dict[str, int]:
        """How many searched ids have no row and are in no row: {"queries": n, "videos": n}."""
        listed = set().union(*similarities.values())
        queries = (query in available and query not in similarities for query in self.queries)
        videos = (video in available and video not in listed for video in self.database)
        return {"queries": sum(queries), "videos": sum(videos)}


def missing_note(coverage: Mapping) -> str:
    """A line to print with the metrics if more than MISSING_SHARE of a set is missing, else ""."""
    parts = []
    for side in ("queries", "videos", "pairs"):
        if side not in coverage:  # a set has queries or pairs
            continue
        missing = coverage[f"{side}_missing"]
        total = coverage[side] + missing
        if missing > MISSING_SHARE * total:
            parts.append(f"{missing / total:.1%} of the {side} ({missing} of {total})")
    if not parts:
        return ""
    return f"missing: {' and '.join(parts)}; figures of the whole set will differ"


def videos_with_features(
    evaluation_set: EvaluationSet, store: Collection[str]
) -> tuple[list[str], list[str]]:
    """The ids of a set's queries and of its database that a feature store has.

    Raises:
        InputError: the store has no query or no video of the set
    """
    queries = [query for query in evaluation_set.queries if query in store]
    database = [video for video in evaluation_set.database if video in store]
    if not queries or not database:
        side = "video" if queries else "query"
        expected = evaluation_set.database if queries else evaluation_set.queries
        raise InputError(
            f"{str(store.path)!r} has features of no {side} of the {evaluation_set.source}:"
            f" {describe_ids(expected, store)}"
        )
    return queries, database


# --- helpers of the sets ------------------------------------------------------------------------


def positions_by_id(ids: Collection[str], what: str) -> dict[str, int]:
    """{id: its position}; raises InputError if an id is given twice."""
    positions = {name: position for position, name in enumerate(ids)}
    if len(positions) < len(ids):
        twice = next(name for position, name in enumerate(ids) if positions[name] != position)
        raise InputError(
            f"{what} {twice!r} is given twice; its similarities would be ambiguous, so give each"
            " id once"
        )
    return positions


def mean_or_nan(values: Iterable[float]) -> float:
    """The mean, or NaN of no values."""
    values = list(values)
    return float(np.mean(values)) if values else float("nan")


def _count_relevant(judgement, has_features):
    """How many videos a query should find."""
    if judgement.num_relevant is not None:
        return judgement.num_relevant
    return int(has_features[judgement.relevant].sum())


def _require_finite(query, videos, row):
    """The row as (N,) floats; raises InputError that names a pair that is not finite."""
    row = np.asarray(row)
    if row.dtype.kind != "f":
        row = row.astype(float)
    bad = np.flatnonzero(~np.isfinite(row))
    if len(bad):
        raise InputError(
            f"query {query!r}, video {videos[bad[0]]!r}: similarity {row[bad[0]]} ({len(bad)} such"
            " in the row); NaN and infinity have no rank, so leave out pairs that were not compared"
        )
    return row


# --- files --------------------------------------------------------------------------------------


@contextlib.contextmanager
def annotation_errors(path: str | Path, form: str) -> Iterator[None]:
    """In this block, an annotation that is not of the `form` raises an InputError that names it."""
    try:
        yield
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        raise InputError(
            f"annotation file {str(path)!r} is not of {form}"
            f" ({type(error).__name__}: {error}); fetch it again"
        ) from None
