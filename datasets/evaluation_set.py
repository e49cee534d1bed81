"""Evaluation sets: queries, a database, and the protocol that turns similarities into the set's figures.

A set knows nothing of models: it scores `{query: {video: similarity}}` from wherever it comes. `EVALUATION_SETS` names the
sets; `EvaluationSet` holds what they share (what is ranked, ties, what is missing, the mean over queries), each subclass says
in its docstring what is its own. From a table (Q, N), or from a dict by the methods in brackets:

    rankings   (rankings_of)   a query at a time: which of the ranked videos are relevant, and how many there are to find
    per_query                  {task: {query: AP}}; `average_precisions` makes it of any rankings
    evaluate_table (evaluate)  the figures of the field's tables, which `figures` reduces from {task: {query: AP}}
"""

import contextlib
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from utils import InputError, digest, load_pickle, require_path

# A figure of a set of which more than this share of the queries or videos is missing is not printed without that share beside
# it. Videos vanish from the web, so hardly anybody has whole sets, and what is gone moves the third digit of a mAP.
MISSING_SHARE = 0.01


# --- one ranking -----------------------------------------------------------------------------------------------------


def average_precision(hits, relevant):
    """AP of one ranking: hits (N,) bool from the first rank on; relevant: how many videos should have been found.

    AP = sum over hits of (hits up to here / rank) / relevant; a relevant video that is not ranked counts as never found.
    """
    ranks = np.flatnonzero(hits) + 1
    return float((np.arange(1, len(ranks) + 1) / ranks).sum() / relevant)


def trapezoidal_average_precision(hits, relevant):
    """AP as the area under the precision-recall polygon (Holidays, EVVE); arguments as `average_precision`.

    The k-th hit (k = 1, 2, ...) at rank r adds a trapezoid of width 1 / relevant between the precision just before it,
    (k - 1) / (r - 1), taken as 1 at rank 1, and the precision with it, k / r.
    """
    ranks = np.flatnonzero(hits) + 1
    k = np.arange(1, len(ranks) + 1)
    before = np.where(ranks == 1, 1, (k - 1) / np.maximum(ranks - 1, 1))
    return float(((before + k / ranks) / 2).sum() / relevant)


def precision_recall(hits, relevant, points=21):
    """The interpolated precision-recall curve of FIVR (its Eq. 5): precision (points,) at recall 0, .05, ..., 1.

    Arguments as `average_precision`. Precision at recall r is the highest precision at any rank whose recall is r or more, 0
    where the ranking never comes so far. (The official script's curve starts at 1 whatever the ranking, because its library
    appends a point of precision 1 at recall 0.)
    """
    ranks = np.flatnonzero(hits) + 1
    best = np.maximum.accumulate((np.arange(1, len(ranks) + 1) / ranks)[::-1])[
        ::-1
    ]  # from the k-th hit on
    curve = np.zeros(points)
    for i in range(points):
        k = max(
            -(-i * relevant // (points - 1)), 1
        )  # the hit that reaches recall i / (points - 1), in whole numbers
        if k <= len(best):
            curve[i] = best[k - 1]
    return curve


class Ranking(NamedTuple):
    """One query's ranking for one task: hits (N,) bool by rank, best first; relevant: how many there are to find; places (N,):
    the ranked videos' places in the database.
    """

    hits: np.ndarray
    relevant: int
    places: np.ndarray


class Judgement(NamedTuple):
    """What an annotation says of one query for one task; videos by their places in the database.

    relevant: the places of the videos to find. ranked: the places that enter the ranking, None for all. counted: the number to
    find, where it does not depend on what has features; None for the relevant videos that have some.
    """

    relevant: np.ndarray
    ranked: np.ndarray | None = None
    counted: int | None = None


# --- what all sets share ---------------------------------------------------------------------------------------------


class EvaluationSet:
    """What every set shares; a subclass fills `_judgements` and says what is its own.

    Ranking: similarity descending, ties in database order, whatever the table's order. Only videos of the database that have
    features (`available`) are ranked; ids the set does not know change nothing. The query is left out of its own ranking
    unless the set says otherwise. To find: the relevant videos that are in the database and have features; one of them that
    has no similarity to the query counts as never found. A query without features is left out; so is, task by task, a query
    with nothing to find (`coverage` counts both). The figure is the mean AP of the queries that remain, NaN when none does.

    queries, database: lists of ids, each id once. source: which annotation this is, for the record. TASKS: the tasks' names.
    """

    TASKS = ("mAP",)
    RANKS_ITSELF = False
    average_precision = staticmethod(average_precision)

    def __init__(self, queries, database, source):
        self.source = source
        self._judgements = []  # {task: Judgement} of each query, in order
        self._name(list(queries), list(database))

    def _name(self, queries, database):
        """Give queries and videos these ids."""
        self.queries, self.database = queries, database
        self._query = positions_by_id(queries, f"{self.source}: query")
        self._place = positions_by_id(database, f"{self.source}: video")

    def fingerprint(self):
        """A digest of queries, database and judgements, to tell one annotation from another of the same name."""
        judged = [
            {task: [sorted(one.relevant.tolist()), one.counted] for task, one in tasks.items()}
            for tasks in self._judgements
        ]
        return digest([self.queries, self.database, judged])

    def spelled_as(self, known):
        """This set with its ids in the form found in `known` (ids that have features), where it is public in two."""
        return self

    # figures

    def evaluate(self, similarities, available=None):
        """The set's figures, {name: value}, from similarities {query: {video: similarity}}.

        available: the ids that have features, by default every id in `similarities`. A system that returns only its best few
        gives what it searched (`set.queries + set.database` for all), or what it never returned would not count as missed.
        Raises InputError when no query can be scored or a similarity is NaN or infinite; minus infinity too, because it
        hides pairs that were never compared: leave those out.
        """
        return self.figures(self.average_precisions(self.rankings_of(similarities, available)))

    def evaluate_table(self, queries, videos, table):
        """The same for a table (Q, N) of similarities between the ids `queries` and `videos`, all of which have features."""
        return self.figures(self.per_query(queries, videos, table))

    def per_query(self, queries, videos, table):
        """{task: {query: AP}} of the queries that can be scored; arguments as `evaluate_table`."""
        return self.average_precisions(self.rankings(queries, videos, table))

    def average_precisions(self, rankings):
        """{task: {query: AP}} from what `rankings` or `rankings_of` yields."""
        found, something_ranked = {task: {} for task in self.TASKS}, False
        for query, tasks in rankings:
            for task, ranking in tasks.items():
                found[task][query] = self.average_precision(ranking.hits, ranking.relevant)
                something_ranked |= len(ranking.hits) > 0
        if not something_ranked:
            raise InputError(
                f"none of the {len(self.queries)} queries can be scored; do the table's ids fit {self.source}?"
            )
        return found

    def figures(self, found):
        """{name: value}: what the field prints of `per_query`'s {task: {query: AP}}."""
        return {task: nan_mean(values.values()) for task, values in found.items()}

    # rankings

    def rankings(self, queries, videos, table):
        """Yield (query, {task: Ranking}), a query at a time; a task with nothing to find is left out.

        queries (Q,), videos (N,): ids; table (Q, N): anything of that shape that gives a row at a time. An id twice, a table
        of another shape and a similarity that is not finite raise InputError.
        """
        queries, videos = list(queries), list(videos)
        if np.shape(table) != (len(queries), len(videos)):
            raise InputError(
                f"a table {np.shape(table)} is not one of {len(queries)} queries by {len(videos)} videos"
            )
        positions_by_id(queries, "table: query")
        return self._rankings(
            ((query, videos, table[i]) for i, query in enumerate(queries)), {*queries, *videos}
        )

    def rankings_of(self, similarities, available=None):
        """The same from {query: {video: similarity}}; arguments as `evaluate`."""
        if available is None:
            available = set(similarities).union(*similarities.values())
        rows = (
            (query, list(row), np.fromiter(row.values(), float, len(row)))
            for query, row in similarities.items()
        )
        return self._rankings(rows, available)

    def _rankings(self, rows, available):
        available, videos = set(available), None
        usable = self._usable(available)
        for query, ids, row in rows:
            if query not in self._query or query not in available:
                continue
            if ids != videos:  # rows mostly share theirs
                videos, (columns, places) = ids, self._columns(ids, usable)
            order = places[np.argsort(-_finite(query, ids, row)[columns], kind="stable")]
            if not self.RANKS_ITSELF:
                order = order[order != self._place.get(query)]
            tasks = {}
            for task, judged in self._judgements[self._query[query]].items():
                if relevant := _to_find(judged, usable):
                    ranked = (
                        order if judged.ranked is None else order[self._mask(judged.ranked)[order]]
                    )
                    tasks[task] = Ranking(self._mask(judged.relevant)[ranked], relevant, ranked)
            yield query, tasks

    def _columns(self, ids, usable):
        """The columns of a table over `ids` that are ranked, in database order, and the places of their videos there."""
        positions_by_id(ids, "table: video")
        places = np.fromiter((self._place.get(video, -1) for video in ids), int, len(ids))
        columns = np.argsort(places)
        columns = columns[places[columns] >= 0]
        columns = columns[usable[places[columns]]]
        return columns, places[columns]

    def _mask(self, places):
        mask = np.zeros(len(self.database), bool)
        mask[places] = True
        return mask

    def _usable(self, available):
        return np.fromiter(
            (video in available for video in self.database), bool, len(self.database)
        )

    def _judgement(self, relevant, **more):
        """A Judgement from ids; those that are not in the database are dropped."""
        return Judgement(
            np.array([self._place[video] for video in set(relevant) if video in self._place], int),
            **more,
        )

    # what is missing, what is too much

    def coverage(self, available):
        """How much of the set has features: queries and videos present and missing, queries with nothing to find a task."""
        available = set(available)
        usable = self._usable(available)
        present = [i for i, query in enumerate(self.queries) if query in available]
        return {
            "queries": len(present),
            "queries_missing": len(self.queries) - len(present),
            "videos": int(usable.sum()),
            "videos_missing": int((~usable).sum()),
            "queries_without_relevant": {
                task: sum(not _to_find(self._judgements[i][task], usable) for i in present)
                for task in self.TASKS
            },
        }

    def unknown(self, queries, videos):
        """How many of a table's ids the set does not know and leaves aside: {"queries": number, "videos": number}."""
        return {
            "queries": sum(query not in self._query for query in queries),
            "videos": sum(
                video not in self._place and video not in self._query for video in videos
            ),
        }


def missing_note(coverage):
    """The line that stands beside the figures when more than MISSING_SHARE of a set is missing; "" otherwise."""
    parts = []
    for side in ("queries", "videos"):
        here, missing = coverage[side], coverage[f"{side}_missing"]
        if missing > MISSING_SHARE * (here + missing):
            parts.append(
                f"{missing / (here + missing):.1%} of the {side} ({missing} of {here + missing})"
            )
    return f"missing: {' and '.join(parts)}; figures of the whole set will differ" if parts else ""


def positions_by_id(ids, what):
    """{id: its place}; InputError when one stands twice."""
    places = {name: place for place, name in enumerate(ids)}
    if len(places) < len(ids):
        twice = next(name for place, name in enumerate(ids) if places[name] != place)
        raise InputError(
            f"{what} {twice!r} stands twice; its similarities would be ambiguous, so give each id once"
        )
    return places


def _finite(query, videos, row):
    """The row as (N,) float64; InputError by query and video when a similarity is not finite."""
    row = np.asarray(row, float)
    bad = np.flatnonzero(~np.isfinite(row))
    if len(bad):
        raise InputError(
            f"query {query!r}, video {videos[bad[0]]!r}: similarity {row[bad[0]]} ({len(bad)} such in the row); NaN and"
            " infinity have no rank, so leave out the pairs that were not compared"
        )
    return row


def _to_find(judged, usable):
    return int(usable[judged.relevant].sum()) if judged.counted is None else judged.counted


def nan_mean(values):
    values = list(values)
    return float(np.mean(values)) if values else float("nan")


# --- what has features


def videos_with_features(chosen, store):
    """The queries and the database videos of an evaluation set that have features: two lists of ids."""
    sides = [
        [video for video in side if video in store] for side in (chosen.queries, chosen.database)
    ]
    if not all(sides):
        raise InputError(
            f"{str(store.path)!r} has features of no query or no video of the {chosen.source}; wrong file?"
        )
    return sides


# --- files


@contextlib.contextmanager
def annotation_form(what, form):
    """Turns the errors of code that takes an annotation apart into one that names the file."""
    try:
        yield
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise InputError(
            f"{what} is not of {form} ({type(error).__name__}: {error}); fetch it again"
        ) from None


def pickled_set(kind, name, *keys):
    """A reader of a set that one pickle holds: `kind` is called with what stands there under `keys`."""

    def read(directory):
        path = Path(directory) / name
        pickled = load_pickle(path)
        with annotation_form(f"annotation file {str(path)!r}", f"{kind.__name__}'s form"):
            return kind(*(pickled[key] for key in keys), f"annotation {path.name!r}")

    return read


def read_similarities(path):
    """{query: {video: similarity}} from a JSON file of that form, as any system may write it.

    Raises InputError that names the file, and the query where one is at fault: an id twice, a row that is no object, a
    similarity that is no number, no query at all. Ids that a set does not know are for `EvaluationSet.unknown` to count.
    """
    path = require_path(path, "similarity file")

    def once(pairs):
        row = dict(pairs)
        if len(row) < len(pairs):
            positions_by_id([name for name, _ in pairs], "id")
        return row

    try:
        table = json.loads(
            path.read_text(encoding="utf-8"), object_pairs_hook=once, parse_int=float
        )
        if not isinstance(table, dict):
            raise InputError(
                f"a {type(table).__name__} where {{query: {{video: similarity}}}} was expected"
            )
        if not table:
            raise InputError("there is no query in it; nothing can be scored")
        for query, row in table.items():
            if not isinstance(row, dict):
                raise InputError(
                    f"query {query!r} has a {type(row).__name__} where {{video: similarity}} was expected"
                )
            if strange := set(map(type, row.values())) - {float}:
                video = next(video for video, value in row.items() if type(value) in strange)
                raise InputError(
                    f"query {query!r}, video {video!r}: {json.dumps(row[video])[:40]} is not a number"
                )
    except (ValueError, RecursionError) as error:  # of the JSON, or not UTF-8
        raise InputError(
            f"similarity file {str(path)!r} is not JSON ({error}); is it complete?"
        ) from None
    except InputError as error:
        raise InputError(f"similarity file {str(path)!r}: {error}") from None
    return table
