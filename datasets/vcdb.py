"""VCDB."""

from datasets.evaluation_set import EvaluationSet


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
        self._judgements = [
            {"mAP": self._judgement(partners[query] - {query})} for query in self.queries
        ]
