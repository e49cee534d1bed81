"""The same results by another route: plain loops over the definitions."""

TASKS = {"DSVR": ["ND", "DS"], "CSVR": ["ND", "DS", "CS"], "ISVR": ["ND", "DS", "CS", "IS"]}


def by_loop(similarities, annotation, database, available):
    """The protocol of FIELD, one video after another: {task: mAP}."""
    figures = {}
    for task, labels in TASKS.items():
        values = []
        for query, row in similarities.items():
            if query not in annotation:
                continue
            relevant = {
                v for label in labels for v in annotation[query].get(label, []) if v in available
            }
            if not relevant:
                continue
            ranked = [v for v in database if v in row and v in available and v != query]
            ranked.sort(
                key=lambda v: -row[v]
            )  # Python's sort is stable: ties stay in database order
            hits, total = 0, 0.0
            for rank, video in enumerate(ranked, 1):
                if video in relevant:
                    hits += 1
                    total += hits / rank
            values.append(total / len(relevant))
        figures[task] = sum(values) / len(values) if values else float("nan")
    return figures
