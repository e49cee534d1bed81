"""The evaluation sets by name. To add one, write its protocol in a file here and enter its reader.

A reader takes the folder of the annotation files and returns an `EvaluationSet`, or a `SegmentSet`
of pairs of videos and the segments that they share.
"""

import os
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path

from datasets.cc_web_video import load_cc_web_video
from datasets.demo_segments import load_demo_segments
from datasets.evaluation_set import EvaluationSet
from datasets.evve import load_evve
from datasets.fivr import EASY_DUPLICATES, FIVRAudio, load_fivr, load_fivr_5k
from datasets.segments import SegmentSet, load_segment_files
from datasets.vcdb import load_vcdb
from utils import InputError, require_path

ANNOTATION_DIR = os.environ.get(
    "TCA_ANNOTATIONS", str(Path(__file__).resolve().parent / "annotations")
)

FIVR_200K = {"labels": "fivr_annotation.json", "ids": "fivr_youtube_ids.txt"}

EVALUATION_SETS: dict[str, Callable[[str | Path], EvaluationSet]] = {
    "FIVR-5K": load_fivr_5k,
    "FIVR-200K": partial(load_fivr, **FIVR_200K, easy_duplicates=EASY_DUPLICATES),
    "FIVR-5K-AUDIO": partial(load_fivr_5k, form=FIVRAudio),
    "FIVR-200K-AUDIO": partial(load_fivr, **FIVR_200K, form=FIVRAudio),
    "CC_WEB_VIDEO": load_cc_web_video,
    "EVVE": load_evve,
    "VCDB": load_vcdb,
    "DEMO": partial(load_fivr, labels="demo.json", ids="demo_ids.txt"),
    "DEMO-VAL": partial(load_fivr, labels="demo_val.json", ids="demo_val_ids.txt"),
}


def _demo_segments(directory, name):
    return load_demo_segments(directory, EVALUATION_SETS[name](directory))


SEGMENT_SETS: dict[str, Callable[[str | Path], SegmentSet]] = {
    "VCSL": partial(
        load_segment_files, pairs="vcsl_pairs_test.csv", labels="vcsl_labels_test.json"
    ),
    "VCDB-SEGMENTS": partial(
        load_segment_files, pairs="vcdb_pairs.csv", labels="vcdb_segments.json"
    ),
    "DEMO-SEGMENTS": partial(_demo_segments, name="DEMO"),
    "DEMO-VAL-SEGMENTS": partial(_demo_segments, name="DEMO-VAL"),
}


def load_evaluation_set(
    name: str, directory: str | Path = ANNOTATION_DIR, available_ids: Collection[str] = ()
) -> EvaluationSet:
    """Read the set `name` from the annotation files in `directory`.

    Args:
        available_ids: the ids that have features; a set with two public spellings of its ids uses
            their spelling
    """
    return _load(name, EVALUATION_SETS, directory).with_ids_as_in(available_ids)


def load_segment_set(name: str, directory: str | Path = ANNOTATION_DIR) -> SegmentSet:
    """Read the set of pairs `name` from the annotation files in `directory`."""
    return _load(name, SEGMENT_SETS, directory)


def _load(name, sets, directory):
    """Read the set `name` of a registry; a missing file is reported with the command to get it."""
    if name not in sets:
        raise InputError(f"dataset {name!r} is not known; choose from {', '.join(sets)}")
    try:
        return sets[name](require_path(directory, "annotation folder"))
    except InputError as error:
        if not isinstance(error.__cause__, FileNotFoundError):
            raise
        command = "make demo" if name.startswith("DEMO") else "python datasets/download.py"
        raise InputError(f"{error}, or get the annotation by `{command}`") from None
