"""Feature files, annotations and logs, written without the code under test where a test needs it.

T frames of C channels a video.
"""

import json
import pickle
from pathlib import Path

import h5py
import numpy as np

from features.store import StoreWriter

# Video ids that are hard to store: slashes, spaces, other alphabets, dots, great length.
IDS = ["plain", "with space", "a/b/c", "ünï/çødé 视频", "-dash", "dot.mp4", "x" * 200]


def some_features(ids=IDS, feature_size=8, dtype=np.float16, seed=0):
    """{id: (T, C) array} of random numbers, T from 1 to 8."""
    rng = np.random.default_rng(seed)
    return {
        video: rng.normal(size=(rng.integers(1, 9), feature_size)).astype(dtype) for video in ids
    }


def write_released(path, features):
    """The released layout: one dataset a video."""
    with h5py.File(path, "w") as file:
        for video, frames in features.items():
            file[video] = frames
    return path


def write_packed(path, features, offsets=None, ids=None, **options):
    """The packed layout (frames, offsets, ids), by h5py alone."""
    lengths = [len(frames) for frames in features.values()]
    offsets = np.cumsum([0, *lengths]) if offsets is None else np.asarray(offsets)
    ids = list(features) if ids is None else ids
    with h5py.File(path, "w") as file:
        file.create_dataset("frames", data=np.concatenate(list(features.values())), **options)
        file["offsets"] = offsets
        file["ids"] = np.array(ids, dtype=h5py.string_dtype())
    return path


def write_ours(path, features, dtype="float16", **meta):
    """The packed layout, by StoreWriter."""
    with StoreWriter(path, dtype, meta) as writer:
        for video, frames in features.items():
            writer.add(video, frames)
    return path


def write_pickle(path, value):
    path.write_bytes(pickle.dumps(value))
    return path


def folder_contents(folder):
    """{file name: bytes} of a folder of files."""
    return {file.name: file.read_bytes() for file in Path(folder).iterdir()}


def read_log(folder):
    """The complete lines of a run's log.jsonl, as dicts; [] if there is no log."""
    path = Path(folder) / "log.jsonl"
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]
