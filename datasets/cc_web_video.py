"""CC_WEB_VIDEO."""

import copy
from pathlib import Path

import numpy as np

from datasets.evaluation_set import EvaluationSet, Judgement, annotation_form, positions_by_id
from utils import load_pickle


class CCWebVideo(EvaluationSet):
    """CC_WEB_VIDEO (Wu et al., 2007), scored as the evaluators of ViSiL, DnS and TCA do: 24 queries, each with its own set.

    The labels E S L M V are positive, X and others negative. Figures, each the mean AP:
    cc_web      ranks the videos labelled in the query's set
    cc_web*     ranks the whole database
    cc_web_c, cc_web*_c     the same by the cleaned annotation: without the set's `excluded` videos, ranked or counted
    The query is not left out: it is in the database, is labelled, and counts as found. To find are all the positives of the
    annotation, with features or not, as in those evaluators; one of set 4 has no id, so a perfect ranking scores .99974.

    index {id: number}, queries [id of each set], ground_truth [{number: label} of each set], excluded [{numbers} of each set].
    The ids are public in two forms, `1/1_1_Y` (DnS) and `1_1_Y` (TCA); `spelled_as` changes between them.
    """

    TASKS = {
        "cc_web": (False, False),
        "cc_web*": (True, False),
        "cc_web_c": (False, True),
        "cc_web*_c": (True, True),
    }
    RANKS_ITSELF = True
    POSITIVE = frozenset("ESLMV")

    def __init__(self, index, queries, ground_truth, excluded, source):
        super().__init__(queries, index, source)
        place = positions_by_id(index.values(), f"{source}: number")
        self._judgements = [
            {
                task: self._judge(place, labels, out if clean else set(), whole)
                for task, (whole, clean) in self.TASKS.items()
            }
            for _, labels, out in zip(queries, ground_truth, excluded, strict=True)
        ]

    def _judge(self, place, labels, excluded, whole):
        positives = [
            n for n, label in labels.items() if label in self.POSITIVE and n not in excluded
        ]
        candidates = place if whole else labels
        relevant, ranked = (
            np.array([place[n] for n in numbers if n in place and n not in excluded], int)
            for numbers in (positives, candidates)
        )
        return Judgement(relevant, ranked, counted=len(positives))

    def spelled_as(self, known):
        other = [self._other_spelling(video) for video in self.database]
        if sum(video in known for video in other) <= sum(video in known for video in self.database):
            return self
        renamed = copy.copy(self)
        renamed._name([self._other_spelling(query) for query in self.queries], other)
        return renamed

    @staticmethod
    def _other_spelling(video):
        """`1/1_1_Y` for `1_1_Y` and the other way round: the folder is the number of the set that the video was found for."""
        return video.rpartition("/")[2] if "/" in video else f"{video.partition('_')[0]}/{video}"


def load_cc_web_video(directory):
    """CC_WEB_VIDEO by DnS's file or TCA's, which differ in the form of the ids alone; either may have either name."""
    paths = [Path(directory) / name for name in ("cc_web_video.pickle", "cc_web_video_tca.pickle")]
    path = next((path for path in paths if path.exists()), paths[0])
    pickled = load_pickle(path)
    with annotation_form(f"annotation file {str(path)!r}", "CC_WEB_VIDEO's form"):
        index = pickled["vid2index"] if "vid2index" in pickled else pickled["index"]
        parts = (pickled[key] for key in ("queries", "ground_truth", "excluded"))
        return CCWebVideo(index, *parts, f"annotation {path.name!r}")
