"""The protocols of the evaluation sets by another route: plain loops over the definitions.

Each `..._by_loop` takes similarities {query: {video: similarity}} and the ids that have features,
and returns the metrics {name: value}.
"""

import numpy as np
from sklearn.metrics import auc

# Which labels of a FIVR annotation count as relevant in which task.
TASKS = {"DSVR": ["ND", "DS"], "CSVR": ["ND", "DS", "CS"], "ISVR": ["ND", "DS", "CS", "IS"]}


def fivr_by_loop(similarities, annotation, database, available):
    """FIVR's protocol, one video after another.

    Args:
        similarities: {query: {video: similarity}}
        annotation: {query: {label: [videos]}}
        database: the ids of the set, in its order
        available: the ids that have features
    Returns:
        {task: mAP}
    """
    metrics = {}
    for task, labels in TASKS.items():
        values = []
        for query, row in similarities.items():
            if query not in annotation:
                continue
            relevant = set()
            for label in labels:
                relevant.update(annotation[query].get(label, []))
            relevant &= set(available)
            if relevant:
                ranked = rank_by_loop(row, database, available)
                hits = [video in relevant for video in ranked if video != query]
                values.append(ap_of_hits(hits, len(relevant)))
        metrics[task] = mean(values)
    return metrics


def cc_web_by_loop(data, similarities, available):
    """CC_WEB_VIDEO's four metrics, from its annotation in either form."""
    index = data.get("vid2index") or data["index"]
    metrics = {}
    for task, whole, cleaned in (
        ("cc_web", False, False),
        ("cc_web*", True, False),
        ("cc_web_c", False, True),
        ("cc_web*_c", True, True),
    ):
        values = []
        for query, labels, excluded in zip(
            data["queries"], data["ground_truth"], data["excluded"], strict=True
        ):
            if query not in similarities or query not in available:
                continue
            hits = []
            for video in rank_by_loop(similarities[query], index, available):
                number = index[video]
                if (whole or number in labels) and not (cleaned and number in excluded):
                    hits.append(labels.get(number) in ("E", "S", "L", "M", "V"))
            count = 0
            for number, label in labels.items():
                if label in ("E", "S", "L", "M", "V") and not (cleaned and number in excluded):
                    count += 1
            values.append(ap_of_hits(hits, count))
        metrics[task] = mean(values)
    return metrics


def evve_by_loop(data, similarities, available):
    """EVVE's metrics: over queries, over events, and of each event."""
    by_event, every_value = {}, []
    for event, (queries, positives, nulls) in sorted(data["annotation"].items()):
        relevant = [video for video in positives if video in available and video not in nulls]
        values = []
        for query in sorted(queries):
            if query not in similarities or query not in available or not relevant:
                continue
            ranked = rank_by_loop(similarities[query], data["database"], available)
            hits = [video in positives for video in ranked if video not in nulls]
            values.append(polygon_ap_of_hits(hits, len(relevant)))
        by_event[event] = mean(values)
        every_value += values
    over_events = mean([value for value in by_event.values() if not np.isnan(value)])
    return {"mAP": mean(every_value), "mAP_events": over_events} | by_event


def vcdb_by_loop(data, similarities, available):
    """VCDB's mAP among the partners of each query."""
    database = list(dict.fromkeys(data["index"]))
    values = []
    for query, row in similarities.items():
        relevant = set()
        for pair in data["video_pairs"]:
            if query in pair["videos"]:
                relevant.update(pair["videos"])
        relevant = {video for video in relevant if video in available} - {query}
        if query in available and relevant:
            ranked = rank_by_loop(row, database, available)
            hits = [video in relevant for video in ranked if video != query]
            values.append(ap_of_hits(hits, len(relevant)))
    return {"mAP": mean(values)}


def rank_by_loop(row, database, available):
    """The videos of a row, best first; ties in the order of the database."""
    ranked = [video for video in database if video in row and video in available]
    return sorted(ranked, key=lambda video: -row[video])  # a stable sort


def ap_of_hits(hits, num_relevant):
    """AP from whether each rank holds a relevant video."""
    found, total = 0, 0.0
    for rank, hit in enumerate(hits, 1):
        if hit:
            found += 1
            total += found / rank
    return total / num_relevant


def polygon_ap_of_hits(hits, num_relevant):
    """The area under the precision-recall polygon from (0, 1), by scikit-learn's trapezoids."""
    if not hits:
        return 0.0
    found = np.cumsum(hits)
    precision = found / np.arange(1, len(hits) + 1)
    return auc([0, *(found / num_relevant)], [1, *precision])


def mean(values):
    return sum(values) / len(values) if values else float("nan")
