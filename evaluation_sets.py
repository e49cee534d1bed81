"""Evaluation sets: queries, a database, and the protocol that turns similarities into the set's figures.

A set knows nothing of models: it scores `{query: {video: similarity}}` from wherever it comes. `EVALUATION_SETS` names the
sets; `EvaluationSet` holds what they share (what is ranked, ties, what is missing, the mean over queries), each subclass says
in its docstring what is its own. From a table (Q, N), or from a dict by the methods in brackets:

    rankings   (rankings_of)   a query at a time: which of the ranked videos are relevant, and how many there are to find
    per_query                  {task: {query: AP}}; `average_precisions` makes it of any rankings
    evaluate_table (evaluate)  the figures of the field's tables, which `figures` reduces from {task: {query: AP}}
"""

import contextlib
import copy
import json
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from utils import InputError, digest, existing, load_pickle

ANNOTATION_DIR = os.environ.get("TCA_ANNOTATIONS", str(Path(__file__).resolve().parent / "datasets" / "annotations"))

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
    best = np.maximum.accumulate((np.arange(1, len(ranks) + 1) / ranks)[::-1])[::-1]  # from the k-th hit on
    curve = np.zeros(points)
    for i in range(points):
        k = max(-(-i * relevant // (points - 1)), 1)  # the hit that reaches recall i / (points - 1), in whole numbers
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
        self._query = _places(queries, f"{self.source}: query")
        self._place = _places(database, f"{self.source}: video")

    def fingerprint(self):
        """A digest of queries, database and judgements, to tell one annotation from another of the same name."""
        judged = [
            {task: [sorted(one.relevant.tolist()), one.counted] for task, one in tasks.items()} for tasks in self._judgements
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
            raise InputError(f"none of the {len(self.queries)} queries can be scored; do the table's ids fit {self.source}?")
        return found

    def figures(self, found):
        """{name: value}: what the field prints of `per_query`'s {task: {query: AP}}."""
        return {task: _mean(values.values()) for task, values in found.items()}

    # rankings

    def rankings(self, queries, videos, table):
        """Yield (query, {task: Ranking}), a query at a time; a task with nothing to find is left out.

        queries (Q,), videos (N,): ids; table (Q, N): anything of that shape that gives a row at a time. An id twice, a table
        of another shape and a similarity that is not finite raise InputError.
        """
        queries, videos = list(queries), list(videos)
        if np.shape(table) != (len(queries), len(videos)):
            raise InputError(f"a table {np.shape(table)} is not one of {len(queries)} queries by {len(videos)} videos")
        _places(queries, "table: query")
        return self._rankings(((query, videos, table[i]) for i, query in enumerate(queries)), {*queries, *videos})

    def rankings_of(self, similarities, available=None):
        """The same from {query: {video: similarity}}; arguments as `evaluate`."""
        if available is None:
            available = set(similarities).union(*similarities.values())
        rows = ((query, list(row), np.fromiter(row.values(), float, len(row))) for query, row in similarities.items())
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
                    ranked = order if judged.ranked is None else order[self._mask(judged.ranked)[order]]
                    tasks[task] = Ranking(self._mask(judged.relevant)[ranked], relevant, ranked)
            yield query, tasks

    def _columns(self, ids, usable):
        """The columns of a table over `ids` that are ranked, in database order, and the places of their videos there."""
        _places(ids, "table: video")
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
        return np.fromiter((video in available for video in self.database), bool, len(self.database))

    def _judgement(self, relevant, **more):
        """A Judgement from ids; those that are not in the database are dropped."""
        return Judgement(np.array([self._place[video] for video in set(relevant) if video in self._place], int), **more)

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
                task: sum(not _to_find(self._judgements[i][task], usable) for i in present) for task in self.TASKS
            },
        }

    def unknown(self, queries, videos):
        """How many of a table's ids the set does not know and leaves aside: {"queries": number, "videos": number}."""
        return {
            "queries": sum(query not in self._query for query in queries),
            "videos": sum(video not in self._place and video not in self._query for video in videos),
        }


def missing_note(coverage):
    """The line that stands beside the figures when more than MISSING_SHARE of a set is missing; "" otherwise."""
    parts = []
    for side in ("queries", "videos"):
        here, missing = coverage[side], coverage[f"{side}_missing"]
        if missing > MISSING_SHARE * (here + missing):
            parts.append(f"{missing / (here + missing):.1%} of the {side} ({missing} of {here + missing})")
    return f"missing: {' and '.join(parts)}; figures of the whole set will differ" if parts else ""


def _places(ids, what):
    """{id: its place}; InputError when one stands twice."""
    places = {name: place for place, name in enumerate(ids)}
    if len(places) < len(ids):
        twice = next(name for place, name in enumerate(ids) if places[name] != place)
        raise InputError(f"{what} {twice!r} stands twice; its similarities would be ambiguous, so give each id once")
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


def _mean(values):
    values = list(values)
    return float(np.mean(values)) if values else float("nan")


# --- the protocols ---------------------------------------------------------------------------------------------------


class FIVR(EvaluationSet):
    """FIVR (Kordopatis-Zilos et al., 2019), scored as its official evaluator does; annotation {query: {label: [ids]}}.

    Figures DSVR (the labels ND and DS are relevant), CSVR (also CS), ISVR (also IS): the mean AP. A query that stands in its
    own label list and in the database is not ranked but stays in that list's count, as in the official code, so a perfect
    ranking of FIVR-5K scores ISVR .99971. (The official script ranks a query for itself where a result file lists it; the
    evaluators of ViSiL, DnS and TCA never do, nor does this one.)
    """

    TASKS = {"DSVR": ("ND", "DS"), "CSVR": ("ND", "DS", "CS"), "ISVR": ("ND", "DS", "CS", "IS")}

    def __init__(self, queries, database, annotation, source):
        super().__init__(queries, database, source)
        with _form(source, "FIVR's form {query: {label: [ids]}}"):
            self._judgements = [
                {
                    task: self._judgement(set().union(*(annotation[query].get(label, ()) for label in labels)))
                    for task, labels in self.TASKS.items()
                }
                for query in self.queries
            ]


class CCWebVideo(EvaluationSet):
    """CC_WEB_VIDEO (Wu et al., 2007), scored as the evaluators of ViSiL, DnS and TCA do: 24 queries, each with its own set.

    The labels E S L M V are positive, X and others negative. Figures, each the mean AP:
    cc_web      ranks the videos labelled in the query's set
    cc_web*     ranks the whole database
    cc_web_c, cc_web*_c     the same by the cleaned annotation: without the set's `excluded` videos, ranked or counted
    The query is not left out: it is in the database, is labelled, and counts as found. To find are all the positives of the
    annotation, with features or not, as in those evaluators; one of set 4 has no id, so a perfect ranking scores .99974.

    index {id: number}, queries [id of each set], ground_truth [{number: label} of each set], excluded [{numbers} of each set].
    The ids are public in two forms, `1/1_1_Y` (DnS) and `1_1_Y` (TCA); `spelled_as` changes between them.
    """

    TASKS = {"cc_web": (False, False), "cc_web*": (True, False), "cc_web_c": (False, True), "cc_web*_c": (True, True)}
    RANKS_ITSELF = True
    POSITIVE = frozenset("ESLMV")

    def __init__(self, index, queries, ground_truth, excluded, source):
        super().__init__(queries, index, source)
        place = _places(index.values(), f"{source}: number")
        self._judgements = [
            {task: self._judge(place, labels, out if clean else set(), whole) for task, (whole, clean) in self.TASKS.items()}
            for _, labels, out in zip(queries, ground_truth, excluded, strict=True)
        ]

    def _judge(self, place, labels, excluded, whole):
        positives = [n for n, label in labels.items() if label in self.POSITIVE and n not in excluded]
        candidates = place if whole else labels
        relevant, ranked = (
            np.array([place[n] for n in numbers if n in place and n not in excluded], int)
            for numbers in (positives, candidates)
        )
        return Judgement(relevant, ranked, counted=len(positives))

    def spelled_as(self, known):
        other = [self._other_spelling(video) for video in self.database]
        if sum(video in known for video in other) <= sum(video in known for video in self.database):
            return self
        renamed = copy.copy(self)
        renamed._name([self._other_spelling(query) for query in self.queries], other)
        return renamed

    @staticmethod
    def _other_spelling(video):
        """`1/1_1_Y` for `1_1_Y` and the other way round: the folder is the number of the set that the video was found for."""
        return video.rpartition("/")[2] if "/" in video else f"{video.partition('_')[0]}/{video}"


class EVVE(EvaluationSet):
    """EVVE (Revaud et al., 2013), scored as ViSiL, DnS and TCA do; annotation {event: (queries, positives, nulls)}, of ids.

    A video is relevant when it shows the query's event. AP is trapezoidal (`trapezoidal_average_precision`), over the positives
    that have features. An event's nulls (undecided) are neither ranked nor counted; the public file has none, and the
    three evaluators ignore the field. Queries are not in the database, so a query is not ranked for itself.
    Figures: `mAP`, the mean over all queries, which papers print; `mAP_events`, the mean of the events' means, which is another
    number; and one an event, the mean over its queries (NaN, and not in `mAP_events`, where no query of it can be scored).
    A query none of whose positives has features is skipped; the three give it an AP of 0.
    """

    average_precision = staticmethod(trapezoidal_average_precision)

    def __init__(self, queries, database, annotation, source):
        super().__init__(queries, database, source)
        self._event = {query: event for event, (asked, _, _) in annotation.items() for query in asked}
        self.events = sorted(annotation)
        judged = {}
        for event, (_, positives, nulls) in annotation.items():
            ranked = np.array([place for video, place in self._place.items() if video not in nulls], int) if nulls else None
            judged[event] = {"mAP": self._judgement(set(positives) - set(nulls), ranked=ranked)}
        self._judgements = [judged[self._event[query]] for query in self.queries]

    def figures(self, found):
        by_event = {event: [] for event in self.events}
        for query, value in found["mAP"].items():
            by_event[self._event[query]].append(value)
        events = {event: _mean(values) for event, values in by_event.items()}
        over_events = _mean(value for value in events.values() if not np.isnan(value))
        return {"mAP": _mean(found["mAP"].values()), "mAP_events": over_events} | events


class VCDB(EvaluationSet):
    """VCDB (Jiang et al., 2014) as the TCA authors retrieve in it; video_pairs [{"videos": [a, b]}], index: every id.

    Queries: the videos of the pair list (the 528 core videos, the first of the index); database: the whole index, core and
    background. A query's relevant videos are those it is paired with. Figure: the mean AP. The query is neither ranked nor
    counted; the released evaluator counts it without ranking it, so that a perfect ranking scores .9305 there and 1 here.
    """

    def __init__(self, video_pairs, index, source):
        partners = {}
        for one, other in (pair["videos"] for pair in video_pairs):
            partners.setdefault(one, set()).add(other)
            partners.setdefault(other, set()).add(one)
        database = list(dict.fromkeys(index))  # the public index names four background videos twice
        super().__init__([video for video in database if video in partners], database, source)
        self._judgements = [{"mAP": self._judgement(partners[query] - {query})} for query in self.queries]


# --- files -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _form(what, form):
    """Turns the errors of code that takes an annotation apart into one that names the file."""
    try:
        yield
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise InputError(f"{what} is not of {form} ({type(error).__name__}: {error}); fetch it again") from None


def _read_json(path):
    try:
        value = json.loads(existing(path, "annotation file").read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError(f"a {type(value).__name__}, not an object")
        return value
    except ValueError as error:
        raise InputError(f"annotation file {str(path)!r} is not of FIVR's form ({error}); fetch it again") from None


def _listed_set(directory, name, ids):
    """A set of two files: NAME, the labels by query, and IDS, the database's ids, one a line."""
    path = Path(directory) / name
    annotation = _read_json(path)
    try:
        database = existing(Path(directory) / ids, "id list").read_text(encoding="utf-8").split()
    except UnicodeDecodeError as error:
        raise InputError(f"id list {str(Path(directory) / ids)!r} is not UTF-8 text ({error}); fetch it again") from None
    return FIVR(annotation, database, annotation, f"annotation {path.name!r}")


def _fivr_5k(directory):
    """FIVR-5K: ids from the ViSiL/DnS pickle; labels from the official JSON where it is there, else from the pickle."""
    path, official = Path(directory) / "fivr.pickle", Path(directory) / "fivr_annotation.json"
    pickled = load_pickle(path)
    with _form(f"annotation file {str(path)!r}", "the form of the ViSiL/DnS fivr.pickle"):
        ids, annotation = pickled["5k"], pickled["annotation"]
        queries, database = list(ids["queries"]), sorted(ids["database"])  # a set there: sort for a stable tie order
    if official.exists():
        return FIVR(queries, database, _read_json(official), f"annotation {official.name!r} (official)")
    return FIVR(queries, database, annotation, f"annotation inside {path.name!r}, official JSON not there")


def _cc_web_video(directory):
    """CC_WEB_VIDEO by DnS's file or TCA's, which differ in the form of the ids alone; either may have either name."""
    paths = [Path(directory) / name for name in ("cc_web_video.pickle", "cc_web_video_tca.pickle")]
    path = next((path for path in paths if path.exists()), paths[0])
    pickled = load_pickle(path)
    with _form(f"annotation file {str(path)!r}", "CC_WEB_VIDEO's form"):
        index = pickled["vid2index"] if "vid2index" in pickled else pickled["index"]
        parts = (pickled[key] for key in ("queries", "ground_truth", "excluded"))
        return CCWebVideo(index, *parts, f"annotation {path.name!r}")


def _pickled_set(kind, name, *keys):
    """A reader of a set that one pickle holds: `kind` is called with what stands there under `keys`."""

    def read(directory):
        path = Path(directory) / name
        pickled = load_pickle(path)
        with _form(f"annotation file {str(path)!r}", f"{kind.__name__}'s form"):
            return kind(*(pickled[key] for key in keys), f"annotation {path.name!r}")

    return read


EVALUATION_SETS = {
    "FIVR-5K": _fivr_5k,
    "FIVR-200K": lambda directory: _listed_set(directory, "fivr_annotation.json", "fivr_youtube_ids.txt"),
    "CC_WEB_VIDEO": _cc_web_video,
    "EVVE": _pickled_set(EVVE, "evve.pickle", "queries", "database", "annotation"),
    "VCDB": _pickled_set(VCDB, "vcdb.pickle", "video_pairs", "index"),
    "DEMO": lambda directory: _listed_set(directory, "demo.json", "demo_ids.txt"),
    "DEMO-VAL": lambda directory: _listed_set(directory, "demo_val.json", "demo_val_ids.txt"),
}


def evaluation_set(name, directory=ANNOTATION_DIR, known=()):
    """The evaluation set `name` from the annotation files in `directory`.

    known: the ids that have features; a set that is public under two forms of id takes the form that is found there.
    """
    if name not in EVALUATION_SETS:
        raise InputError(f"dataset {name!r} is not known; choose from {', '.join(EVALUATION_SETS)}")
    return EVALUATION_SETS[name](existing(directory, "annotation folder")).spelled_as(known)


def read_similarities(path):
    """{query: {video: similarity}} from a JSON file of that form, as any system may write it.

    Raises InputError that names the file, and the query where one is at fault: an id twice, a row that is no object, a
    similarity that is no number, no query at all. Ids that a set does not know are for `EvaluationSet.unknown` to count.
    """
    path = existing(path, "similarity file")

    def once(pairs):
        row = dict(pairs)
        if len(row) < len(pairs):
            _places([name for name, _ in pairs], "id")
        return row

    try:
        table = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=once, parse_int=float)
        if not isinstance(table, dict):
            raise InputError(f"a {type(table).__name__} where {{query: {{video: similarity}}}} was expected")
        if not table:
            raise InputError("there is no query in it; nothing can be scored")
        for query, row in table.items():
            if not isinstance(row, dict):
                raise InputError(f"query {query!r} has a {type(row).__name__} where {{video: similarity}} was expected")
            if strange := set(map(type, row.values())) - {float}:
                video = next(video for video, value in row.items() if type(value) in strange)
                raise InputError(f"query {query!r}, video {video!r}: {json.dumps(row[video])[:40]} is not a number")
    except (ValueError, RecursionError) as error:  # of the JSON, or not UTF-8
        raise InputError(f"similarity file {str(path)!r} is not JSON ({error}); is it complete?") from None
    except InputError as error:
        raise InputError(f"similarity file {str(path)!r}: {error}") from None
    return table
