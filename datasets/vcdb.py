"""VCDB as a retrieval set."""

from pathlib import Path

from datasets.evaluation_set import EvaluationSet, Judgement, annotation_errors
from untrusted import load_pickle


class VCDB(EvaluationSet):
    """VCDB (Jiang et al., 2014), scored as the TCA authors retrieve in it.

    The queries are the videos of the pair list (the 528 core videos, the first of the index), the
    database is the whole index, core and background. The relevant videos of a query are those it
    is paired with. Metric: the mean AP. The query is neither ranked nor counted. The released
    evaluator counts it without ranking it, so a perfect ranking scores .9305 there and 1 here.

    Args:
        video_pairs: [{"videos": [id, id]}, ...]
        index: every id, core and background
    """

    def __init__(self, video_pairs, index, source):
        partners = {}  # {query: ids it is paired with}
        for pair in video_pairs:
            first, second = pair["videos"]
            partners.setdefault(first, set()).add(second)
            partners.setdefault(second, set()).add(first)
        database = list(dict.fromkeys(index))  # the public index has four background videos twice
        super().__init__([video for video in database if video in partners], database, source)
        for query in self.queries:
            relevant = self.positions_of(partners[query] - {query})
            self.judgements.append({"mAP": Judgement(relevant)})


def load_vcdb(directory: str | Path) -> VCDB:
    """VCDB from `vcdb.pickle`, as TCA publishes it."""
    path = Path(directory) / "vcdb.pickle"
    data = load_pickle(path)
    with annotation_errors(path, "VCDB's form"):
        return VCDB(data["video_pairs"], data["index"], f"annotation {path.name!r}")
