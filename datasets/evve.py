"""EVVE."""

from pathlib import Path

import numpy as np

from datasets.evaluation_set import (
    EvaluationSet,
    Judgement,
    annotation_errors,
    mean_or_nan,
    trapezoidal_average_precision,
)
from untrusted import load_pickle


class EVVE(EvaluationSet):
    """EVVE (Revaud et al., 2013), scored as the evaluators of ViSiL, DnS and TCA do.

    A video is relevant if it shows the event of the query. AP is trapezoidal, over the positives
    that have features. Queries are not in the database, so no query is ranked for itself. The
    nulls of an event (undecided videos) are neither ranked nor counted; the public file has none,
    and the three evaluators ignore the field.

    Metrics:

        mAP           the mean over all queries, which papers print
        mAP_events    the mean of the events' means, which is another number
        EVENT         for each event the mean over its queries; NaN, and left out of mAP_events,
                      if none of them can be scored

    A query none of whose positives has features is left out; the three give it an AP of 0.

    Args:
        annotation: {event: (queries, positives, nulls)}, three collections of ids
    """

    average_precision = staticmethod(trapezoidal_average_precision)

    def __init__(self, queries, database, annotation, source):
        super().__init__(queries, database, source)
        self.events = sorted(annotation)
        self._event = {}  # {query: event}
        judgements = {}  # {event: Judgement}
        for event, (event_queries, positives, nulls) in annotation.items():
            self._event |= dict.fromkeys(event_queries, event)
            relevant = self.positions_of(set(positives) - set(nulls))
            candidates = None
            if nulls:
                candidates = self.positions_of(set(self.database) - set(nulls))
            judgements[event] = Judgement(relevant, candidates)
        self.judgements = [{"mAP": judgements[self._event[query]]} for query in self.queries]

    def metrics(self, aps):
        by_event = {event: [] for event in self.events}
        for query, ap in aps["mAP"].items():
            by_event[self._event[query]].append(ap)
        events = {event: mean_or_nan(values) for event, values in by_event.items()}
        over_events = mean_or_nan(mean for mean in events.values() if not np.isnan(mean))
        return {"mAP": mean_or_nan(aps["mAP"].values()), "mAP_events": over_events} | events


def load_evve(directory: str | Path) -> EVVE:
    """EVVE from `evve.pickle`, as TCA publishes it."""
    path = Path(directory) / "evve.pickle"
    data = load_pickle(path)
    with annotation_errors(path, "EVVE's form"):
        return EVVE(
            data["queries"], data["database"], data["annotation"], f"annotation {path.name!r}"
        )
