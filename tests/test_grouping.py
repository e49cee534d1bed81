"""Groups of copies: members match the centre, chains and intros join nothing."""

import pytest

from retrieval.alignment import Segment
from videoindex.comparison import RECURRING, recurring_frames
from videoindex.evidence import Stretch
from videoindex.grouping import judge, make_clusters


def stretch(query, target, evidence=5.0):
    """Frames `query` (start, end) of one video are `target` of another."""
    return Stretch(Segment(evidence, 0.9, *query, *target), evidence, 5.0, query[1] - query[0])


class Library:
    """Videos {number: frames}, and what pairs of them share: {(shorter, longer): Stretch}."""

    def __init__(self, lengths, shared):
        self.lengths, self.shared, self.compared = lengths, shared, []

    def compare(self, number, others):
        self.compared += [(number, other) for other in others]
        return {
            other: self.shared[number, other] for other in others if (number, other) in self.shared
        }

    def clusters(self, joins=lambda stretch, a, b: True):
        return make_clusters(self.lengths, AllCentres(), self.compare, joins)


class AllCentres(list):
    """Every centre is near."""

    def near(self, number):
        return list(self)

    add = list.append


def test_chain_of_links_is_no_group():
    """1 ~ 2 and 2 ~ 3, but 3 does not match the centre, 1."""
    whole = stretch((0, 9), (0, 9))
    (cluster,) = Library({1: 12, 2: 11, 3: 10}, {(2, 1): whole, (3, 2): whole}).clusters()
    assert (cluster.centre, set(cluster.members), set(cluster.parts)) == (1, {2}, set())


def test_excerpts_and_compilations_are_parts():
    """Of a film of 100 frames: a copy, an excerpt; and a clip that it shows among others."""
    shared = {(2, 1): stretch((0, 95), (0, 95)), (3, 1): stretch((0, 20), (50, 70))}
    (cluster,) = Library({1: 100, 2: 95, 3: 20}, shared).clusters()
    assert set(cluster.members) == {2} and set(cluster.parts) == {3}


def test_copies_of_one_clip_take_one_comparison_each():
    lengths = dict.fromkeys(range(1000), 10)
    shared = {(number, 0): stretch((0, 10), (0, 10)) for number in range(1, 1000)}
    library = Library(lengths, shared)
    (cluster,) = library.clusters()
    assert len(cluster.members) == 999 and len(library.compared) == 999


def test_weak_links_join_nothing():
    shared = {(2, 1): stretch((0, 9), (0, 9), evidence=0.2)}
    assert Library({1: 10, 2: 9}, shared).clusters(lambda found, a, b: found.evidence >= 1) == []


def test_video_joins_the_centre_that_it_shares_most_with():
    shared = {
        (3, 1): stretch((0, 9), (0, 9), evidence=2.0),
        (3, 2): stretch((0, 9), (0, 9), evidence=4.0),
    }
    (cluster,) = Library({1: 11, 2: 10, 3: 9}, shared).clusters()
    assert (cluster.centre, set(cluster.members)) == (2, {3})


@pytest.mark.parametrize("episodes, parts", [(RECURRING // 2, True), (3 * RECURRING, False)])
def test_intro_of_many_videos_is_no_part(episodes, parts):
    """Each episode of 100 frames shares its first 10 with all others."""
    numbers = range(episodes)
    intro = stretch((0, 10), (0, 10))
    shared = {(b, a): intro for a in numbers for b in numbers if a < b}
    clusters = Library(dict.fromkeys(numbers, 100), shared).clusters()
    assert bool(clusters) == parts


def test_recurring_frames_are_counted_per_video():
    spans = [(0, 4)] * RECURRING + [(2, 6)] * 2
    assert recurring_frames(spans, 8).tolist() == [True] * 4 + [False] * 4


def test_judge_doubts_members_that_match_the_centre_alone():
    """A test card that many videos show is their centre."""
    lengths = dict.fromkeys(range(8), 10)
    whole = stretch((0, 10), (0, 10))
    star = Library(lengths, {(number, 0): whole for number in range(1, 8)})
    (cluster,) = star.clusters()
    judge(cluster, star.compare)
    assert cluster.is_doubtful
    copies = Library(lengths, {(a, b): whole for a in lengths for b in lengths if a != b})
    (cluster,) = copies.clusters()
    judge(cluster, copies.compare)
    assert not cluster.is_doubtful
