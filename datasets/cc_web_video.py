"""CC_WEB_VIDEO."""

import copy
from collections.abc import Collection
from pathlib import Path

import numpy as np

from datasets.evaluation_set import EvaluationSet, Judgement, annotation_errors, positions_by_id
from untrusted import load_pickle


class CCWebVideo(EvaluationSet):
    """CC_WEB_VIDEO (Wu et al., 2007), scored as the evaluators of ViSiL, DnS and TCA do.

    There are 24 queries, each with its own set of labelled videos. The labels E S L M V are
    positive, X and all others negative. Metrics, each a mean AP:

        cc_web                  ranks the videos labelled in the query's set
        cc_web*                 ranks the whole database
        cc_web_c, cc_web*_c     the same without the videos that the cleaned annotation excludes

    Detection: uAP, uAP*, uAP_c, uAP*_c, each a micro-AP over the same videos. No query is paired
    with itself there, and only positives with features count. S2VS has no such figure for this set.

    The query is ranked: it is in the database, is labelled, and counts as found. All positives of
    the annotation should be found, with or without features, as in those evaluators. One positive
    of set 4 has no id, so a perfect ranking scores .99974.

    The ids are public in two spellings, `1/1_1_Y` (DnS) and `1_1_Y` (TCA).

    Args:
        index: {id: number}
        queries: the id of each set's query
        ground_truth: for each set {number: label}
        excluded: for each set, the numbers that the cleaned annotation excludes
    """

    # task: (ranks the whole database, uses the cleaned annotation)
    TASKS = {
        "cc_web": (False, False),
        "cc_web*": (True, False),
        "cc_web_c": (False, True),
        "cc_web*_c": (True, True),
    }
    DETECTION = {"cc_web": "uAP", "cc_web*": "uAP*", "cc_web_c": "uAP_c", "cc_web*_c": "uAP*_c"}
    RANKS_QUERY = True
    POSITIVE = frozenset("ESLMV")

    def __init__(self, index, queries, ground_truth, excluded, source):
        super().__init__(queries, index, source)
        position = positions_by_id(index.values(), f"{source}: number")  # {number: position}
        for _, labels, out in zip(queries, ground_truth, excluded, strict=True):
            tasks = {}
            for task, (whole, cleaned) in self.TASKS.items():
                tasks[task] = self._judge(position, labels, out if cleaned else set(), whole)
            self.judgements.append(tasks)

    def _judge(self, position, labels, excluded, whole):
        """The Judgement of one query, whose set has `labels` {number: label}."""
        positive = []
        for number, label in labels.items():
            if label in self.POSITIVE and number not in excluded:
                positive.append(number)
        candidates = position if whole else labels
        return Judgement(
            relevant=np.array([position[n] for n in positive if n in position], int),
            candidates=np.array(
                [position[n] for n in candidates if n in position and n not in excluded], int
            ),
            num_relevant=len(positive),
        )

    def with_ids_as_in(self, available: Collection[str]) -> "CCWebVideo":
        other = [self._other_spelling(video) for video in self.database]
        present = sum(video in available for video in self.database)
        if sum(video in available for video in other) <= present:
            return self
        respelled = copy.copy(self)
        respelled._set_ids([self._other_spelling(query) for query in self.queries], other)
        return respelled

    @staticmethod
    def _other_spelling(video):
        """`1/1_1_Y` for `1_1_Y` and the reverse; the folder is the first number of the name."""
        if "/" in video:
            return video.rpartition("/")[2]
        return f"{video.partition('_')[0]}/{video}"


def load_cc_web_video(directory: str | Path) -> CCWebVideo:
    """CC_WEB_VIDEO from the file of DnS or of TCA.

    The two differ in the spelling of the ids and in one key. Either may have either name.
    """
    names = ("cc_web_video.pickle", "cc_web_video_tca.pickle")
    paths = [Path(directory) / name for name in names]
    path = next((path for path in paths if path.exists()), paths[0])
    data = load_pickle(path)
    with annotation_errors(path, "CC_WEB_VIDEO's form"):
        index = data["vid2index"] if "vid2index" in data else data["index"]
        return CCWebVideo(
            index,
            data["queries"],
            data["ground_truth"],
            data["excluded"],
            f"annotation {path.name!r}",
        )
