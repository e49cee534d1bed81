"""The evaluation sets by name."""

import os
from pathlib import Path

from datasets.cc_web_video import load_cc_web_video
from datasets.evaluation_set import pickled_set
from datasets.evve import EVVE
from datasets.fivr import load_fivr_5k, load_listed_set
from datasets.vcdb import VCDB
from utils import InputError, require_path

ANNOTATION_DIR = os.environ.get(
    "TCA_ANNOTATIONS", str(Path(__file__).resolve().parent / "annotations")
)


EVALUATION_SETS = {
    "FIVR-5K": load_fivr_5k,
    "FIVR-200K": lambda directory: load_listed_set(
        directory, "fivr_annotation.json", "fivr_youtube_ids.txt"
    ),
    "CC_WEB_VIDEO": load_cc_web_video,
    "EVVE": pickled_set(EVVE, "evve.pickle", "queries", "database", "annotation"),
    "VCDB": pickled_set(VCDB, "vcdb.pickle", "video_pairs", "index"),
    "DEMO": lambda directory: load_listed_set(directory, "demo.json", "demo_ids.txt"),
    "DEMO-VAL": lambda directory: load_listed_set(directory, "demo_val.json", "demo_val_ids.txt"),
}


def load_evaluation_set(name, directory=ANNOTATION_DIR, known=()):
    """The evaluation set `name` from the annotation files in `directory`.

    known: the ids that have features; a set that is public under two forms of id takes the form that is found there.
    """
    if name not in EVALUATION_SETS:
        raise InputError(f"dataset {name!r} is not known; choose from {', '.join(EVALUATION_SETS)}")
    return EVALUATION_SETS[name](require_path(directory, "annotation folder")).spelled_as(known)
