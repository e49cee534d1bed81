"""FIVR-5K and FIVR-200K, and any set in FIVR's form (the demo's)."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path

from datasets.evaluation_set import EvaluationSet, Judgement, annotation_errors
from untrusted import is_object, load_pickle, read_ids, read_json

FORM = "FIVR's form {query: {label: [ids]}}"
EASY_DUPLICATES = "fivr_easy_duplicates.txt"


class FIVR(EvaluationSet):
    """FIVR (Kordopatis-Zilos et al., 2019), scored as its official evaluator does.

    Metrics: the mean AP of three tasks, which differ in the labels that count as relevant.

        DSVR   duplicate scenes        ND, DS
        CSVR   complementary scenes    ND, DS, CS
        ISVR   incident scenes         ND, DS, CS, IS

    A query that is in its own label list and in the database is not ranked, but it stays in the
    count of that list, as in the official code. So a perfect ranking of FIVR-5K has ISVR .99971.
    (The official script does rank a query for itself if a result file lists it. The evaluators of
    ViSiL, DnS and TCA never do, and neither does this one.)

    Detection: DSVD, CSVD and ISVD are the micro-AP of the same labels, as in S2VS. There a query in
    its own list is not counted, so a perfect ranking has an ISVD of 1.

    Hard split (S2VS): the same without the easy duplicates, which are neither ranked nor counted.
    A query in its own list is not counted there, in retrieval neither.

    Args:
        annotation: {query: {label: [ids]}}
        easy_duplicates: ids that the hard split leaves out; without any there is no hard split
    """

    TASKS: Mapping[str, Sequence[str]] = {
        "DSVR": ("ND", "DS"),
        "CSVR": ("ND", "DS", "CS"),
        "ISVR": ("ND", "DS", "CS", "IS"),
    }
    DETECTION: Mapping[str, str] = {"DSVR": "DSVD", "CSVR": "CSVD", "ISVR": "ISVD"}

    def __init__(
        self,
        queries: Iterable[str],
        database: Iterable[str],
        annotation: Mapping[str, Mapping[str, Sequence[str]]],
        source: str,
        easy_duplicates: Collection[str] = (),
    ):
        super().__init__(queries, database, source)
        self.annotation = annotation
        self.easy_duplicates = easy_duplicates
        for query in self.queries:
            tasks = {}
            for task, labels in self.TASKS.items():
                relevant = set()
                for label in labels:
                    videos = annotation[query].get(label, ())
                    if isinstance(videos, str):
                        raise ValueError(f"label {label} of {query!r} is a text, not a list")
                    relevant.update(videos)
                tasks[task] = Judgement(self.positions_of(relevant))
            self.judgements.append(tasks)

    @cached_property
    def hard(self) -> "FIVR | None":
        if not self.easy_duplicates:
            return None
        annotation = {}
        for query in self.queries:
            annotation[query] = {}
            for label, videos in self.annotation[query].items():
                annotation[query][label] = [video for video in videos if video != query]
        database = [video for video in self.database if video not in self.easy_duplicates]
        return type(self)(self.queries, database, annotation, f"{self.source}, hard split")


class FIVRAudio(FIVR):
    """FIVR's audio task: duplicate audio (DA), of the queries that have that label.

    DAVR is the mean AP, DAVD the micro-AP, by the rules of `FIVR`. The labels are in the official
    annotation.
    """

    TASKS = {"DAVR": ("DA",)}
    DETECTION = {"DAVR": "DAVD"}

    def __init__(self, queries, database, annotation, source, easy_duplicates=()):
        queries = [query for query in queries if "DA" in annotation[query]]
        super().__init__(queries, database, annotation, source)  # S2VS has no hard split of it


def load_fivr(
    directory: str | Path,
    labels: str,
    ids: str,
    easy_duplicates: str | None = None,
    form: type[FIVR] = FIVR,
) -> FIVR:
    """A set of two files: the labels of each query as JSON, and the database, one id per line.

    easy_duplicates: the file of the hard split, which may be absent
    """
    labels, ids = Path(directory) / labels, Path(directory) / ids
    annotation = _read_labels(labels)
    database = read_ids(ids)
    easy = _read_easy_duplicates(Path(directory) / easy_duplicates) if easy_duplicates else ()
    with annotation_errors(labels, FORM):
        return form(annotation, database, annotation, f"annotation {labels.name!r}", easy)


def load_fivr_5k(directory: str | Path, form: type[FIVR] = FIVR) -> FIVR:
    """FIVR-5K: the ids are in the pickle of ViSiL and DnS, the labels in the official JSON.

    Without the official JSON, the labels of the pickle are used, and `source` names it.
    """
    path = Path(directory) / "fivr.pickle"
    data = load_pickle(path)
    with annotation_errors(path, "the form of fivr.pickle (ViSiL, DnS)"):
        queries = list(data["5k"]["queries"])
        database = sorted(data["5k"]["database"])  # a set there; sorted, so that ties have an order
        annotation = data["annotation"]

    easy = _read_easy_duplicates(Path(directory) / EASY_DUPLICATES)
    official = Path(directory) / "fivr_annotation.json"
    if official.exists():
        with annotation_errors(official, FORM):
            source = f"annotation {official.name!r} (official)"
            return form(queries, database, _read_labels(official), source, easy)
    with annotation_errors(path, FORM):
        source = f"annotation inside {path.name!r}, official JSON not there"
        return form(queries, database, annotation, source, easy)


def _read_easy_duplicates(path):
    return frozenset(read_ids(path)) if path.exists() else frozenset()


def _read_labels(path):
    annotation = read_json(path, "annotation file", "fetch it again")
    with annotation_errors(path, FORM):
        if not is_object(annotation):
            raise ValueError(f"a {type(annotation).__name__}, not an object")
        return annotation
