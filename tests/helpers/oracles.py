"""The same results by another route: plain loops over the definitions."""

# Which labels of a FIVR annotation count as relevant in which task.
TASKS = {"DSVR": ["ND", "DS"], "CSVR": ["ND", "DS", "CS"], "ISVR": ["ND", "DS", "CS", "IS"]}


def by_loop(similarities, annotation, database, available):
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
                candidates = [video for video in database if video in available and video != query]
                values.append(average_precision(row, relevant, candidates))
        metrics[task] = sum(values) / len(values) if values else float("nan")
    return metrics


def average_precision(row, relevant, candidates):
    """The mean, over the relevant videos, of the precision at the rank where each is found."""
    ranked = [video for video in candidates if video in row]
    ranked.sort(key=lambda video: -row[video])  # stable: ties keep the order of the database
    hits, total = 0, 0.0
    for rank, video in enumerate(ranked, 1):
        if video in relevant:
            hits += 1
            total += hits / rank
    return total / len(relevant)
