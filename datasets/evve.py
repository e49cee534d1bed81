"""EVVE."""

import numpy as np

from datasets.evaluation_set import EvaluationSet, nan_mean, trapezoidal_average_precision


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
        self._event = {
            query: event for event, (asked, _, _) in annotation.items() for query in asked
        }
        self.events = sorted(annotation)
        judged = {}
        for event, (_, positives, nulls) in annotation.items():
            ranked = (
                np.array([place for video, place in self._place.items() if video not in nulls], int)
                if nulls
                else None
            )
            judged[event] = {"mAP": self._judgement(set(positives) - set(nulls), ranked=ranked)}
        self._judgements = [judged[self._event[query]] for query in self.queries]

    def figures(self, found):
        by_event = {event: [] for event in self.events}
        for query, value in found["mAP"].items():
            by_event[self._event[query]].append(value)
        events = {event: nan_mean(values) for event, values in by_event.items()}
        over_events = nan_mean(value for value in events.values() if not np.isnan(value))
        return {"mAP": nan_mean(found["mAP"].values()), "mAP_events": over_events} | events
