"""Detection: one threshold for the pairs of all queries, as micro average precision.

Retrieval (mAP) ranks the videos of each query by themselves. Detection asks whether a similarity
means the same for every query: all pairs of a query and a video are ranked together, and micro-AP
is the average precision of that one ranking (S2VS, Kordopatis-Zilos et al., CVPRW 2023; the Video
Similarity Challenge 2022).
"""

from collections.abc import Mapping, Sequence

import numpy as np

from datasets.evaluation_set import EvaluationSet, Ranking


def micro_average_precision(
    similarities: Sequence[np.ndarray], hits: Sequence[np.ndarray], num_relevant: int
) -> float:
    """AP of the pairs of all queries in one ranking; NaN if none is relevant.

    A relevant pair adds the precision among all pairs that are at least as similar. So tied pairs
    share the precision at the end of their tie, as in scikit-learn's `average_precision_score`,
    and the order of queries and videos does not matter.

    Args:
        similarities: for each query its pairs (n,), in descending order
        hits: for each query which of these pairs are relevant, (n,) bool
        num_relevant: how many pairs should be found; those without a similarity are never found
    """
    if not num_relevant:
        return float("nan")
    # Only the thresholds at which a relevant pair is found change the sum.
    found = [values[relevant] for values, relevant in zip(similarities, hits, strict=True)]
    thresholds = np.sort(np.concatenate(found))
    passed = np.zeros(len(thresholds), int)  # pairs that are at least as similar
    for values in similarities:
        passed += len(values) - np.searchsorted(values[::-1], thresholds, side="left")
    relevant = len(thresholds) - np.searchsorted(thresholds, thresholds, side="left")
    return float((relevant / passed).sum() / num_relevant)


class Detection:
    """Gathers the pairs of every query of a set, task by task, and scores them together.

    Which pairs: a query with each video of its ranking (`EvaluationSet`), but never with itself,
    also where retrieval ranks the query for itself (CC_WEB_VIDEO). A video without a label is not
    relevant. Relevant are the videos with features. A query with nothing to find has no AP, but
    its pairs are pairs like others here.

    The pairs are kept until `metrics`: 5 bytes each from a table of float32.
    """

    def __init__(self, evaluation_set: EvaluationSet):
        self.evaluation_set = evaluation_set
        self.similarities = {task: [] for task in evaluation_set.TASKS}
        self.hits = {task: [] for task in evaluation_set.TASKS}
        self.num_relevant = dict.fromkeys(evaluation_set.TASKS, 0)

    def add(self, query: str, rankings: Mapping[str, Ranking]) -> None:
        """Add the pairs of a query, from its {task: Ranking}."""
        own = self.evaluation_set.position_of(query)
        for task, ranking in rankings.items():
            similarities, hits = ranking.similarities, ranking.hits
            if self.evaluation_set.RANKS_QUERY:
                others = ranking.positions != own
                similarities, hits = similarities[others], hits[others]
            self.similarities[task].append(similarities)
            self.hits[task].append(hits)
            self.num_relevant[task] += ranking.num_others

    def metrics(self) -> dict[str, float]:
        """{name: micro-AP}, by the names of the set's DETECTION."""
        metrics = {}
        for task, name in self.evaluation_set.DETECTION.items():
            metrics[name] = micro_average_precision(
                self.similarities[task], self.hits[task], self.num_relevant[task]
            )
        return metrics
