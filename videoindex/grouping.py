"""Groups of copies: each video joins the group of a longer video that it matches as a whole.

Groups are not connected components, in which a chain of weak links joins everything: a member
matches its group's centre. Videos are compared with the centres found so far, so the work grows
with the number of videos and not with that of their pairs: 1,000 copies of one clip are 1,000
comparisons.
"""

from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np

from videoindex.comparison import is_inside_both, recurring_frames
from videoindex.evidence import Stretch

JOINING = ("certain", "likely", "")  # verdicts whose links join; "": the caller's threshold decides
COPY_SHARE = 0.5  # of both videos, that a copy's stretch covers
SAMPLE = 10  # pairs of members that are compared to judge a group


class Cluster:
    """A centre, its members, and what else shares film with it.

    centre: the content that every member matches: the longest
    members: {content: its Stretch with the centre}, in which it is the query
    parts: {content: its Stretch with the centre}: excerpts, and videos that share one
    is_doubtful: whether most of its members match the centre but not each other
    """

    def __init__(self, centre: int):
        self.centre = centre
        self.members: dict[int, Stretch] = {}
        self.parts: dict[int, Stretch] = {}
        self.is_doubtful = False


class Centres(Protocol):
    """Finds the centres that may share film with a content (`nearest.CentreIndex`)."""

    def near(self, number: int) -> list[int]: ...

    def add(self, number: int) -> None: ...


def make_clusters(
    lengths: Mapping[int, int],
    centres: Centres,
    compare: Callable[[int, list[int]], dict[int, Stretch]],
    joins: Callable[[Stretch, int, int], bool],
    may_pair: Callable[[int, int], bool] = lambda a, b: True,
) -> list[Cluster]:
    """Clusters of contents, in the order of their centres; those of one content alone are left out.

    Args:
        lengths: {content: frames}.
        centres: without any yet.
        compare: (content, others) -> {other: Stretch} of those that share film with it.
        joins: whether a stretch is good enough evidence to join these two contents.
        may_pair: whether two contents may be in one cluster.
    """
    clusters: dict[int, Cluster] = {}
    for number in sorted(lengths, key=lambda number: (-lengths[number], number)):
        near = centres.near(number)
        found = compare(number, near) if near else {}
        copies = {
            other: stretch
            for other, stretch in found.items()
            if joins(stretch, number, other)
            and is_copy(stretch, lengths[number], lengths[other])
            and all(may_pair(number, member) for member in clusters[other].members)
        }
        if copies:
            best = max(copies, key=lambda other: copies[other].evidence)
            clusters[best].members[number] = copies[best]
            continue
        clusters[number] = Cluster(number)
        centres.add(number)
        for other, stretch in found.items():
            if joins(stretch, number, other):
                clusters[other].parts[number] = stretch
    _drop_recurring(clusters, lengths)
    return [cluster for cluster in clusters.values() if cluster.members or cluster.parts]


def is_copy(stretch: Stretch, num_query: int, num_target: int) -> bool:
    """Whether a stretch covers half and more of both videos."""
    in_query, in_target = stretch.segment.lengths
    return in_query >= COPY_SHARE * num_query and in_target >= COPY_SHARE * num_target


def _drop_recurring(clusters, lengths):
    """Drop the parts that are an intro, or the like: film that recurs in many videos."""
    spans: dict[int, list[tuple[int, int]]] = {}
    for centre, cluster in clusters.items():
        for number, stretch in cluster.parts.items():
            if is_inside_both(stretch, lengths[number], lengths[centre]):
                segment = stretch.segment
                spans.setdefault(number, []).append((segment.query_start, segment.query_end))
                spans.setdefault(centre, []).append((segment.target_start, segment.target_end))
    recurring = {number: recurring_frames(of, lengths[number]) for number, of in spans.items()}
    for centre, cluster in clusters.items():
        for number, stretch in list(cluster.parts.items()):
            segment = stretch.segment
            if is_inside_both(stretch, lengths[number], lengths[centre]) and (
                recurring[number][segment.query_start : segment.query_end].mean() >= 0.5
                or recurring[centre][segment.target_start : segment.target_end].mean() >= 0.5
            ):
                del cluster.parts[number]


def judge(cluster: Cluster, compare: Callable[[int, list[int]], dict[int, Stretch]]) -> None:
    """Set `is_doubtful`, by a sample of pairs of members."""
    members = list(cluster.members)
    if len(members) < 3:
        return
    rng = np.random.default_rng(cluster.centre)
    pairs = [rng.choice(len(members), 2, replace=False) for _ in range(SAMPLE)]
    hits = sum(bool(compare(members[a], [members[b]])) for a, b in pairs)
    cluster.is_doubtful = hits < len(pairs) / 2
