"""Feature files, annotations and logs, written without the code under test where a test needs that."""

import json
import pickle
from pathlib import Path

import h5py
import numpy as np

from features.store import StoreWriter


def write_released(path, features):
    """One dataset a video: the released layout."""
    with h5py.File(path, "w") as file:
        for video, frames in features.items():
            file[video] = frames
    return path


def write_packed(path, features, offsets=None, ids=None, **options):
    """frames, offsets, ids: the packed layout, written without our writer."""
    with h5py.File(path, "w") as file:
        lengths = [len(frames) for frames in features.values()]
        file.create_dataset("frames", data=np.concatenate(list(features.values())), **options)
        file["offsets"] = np.cumsum([0] + lengths) if offsets is None else np.asarray(offsets)
        file["ids"] = np.array(list(features) if ids is None else ids, dtype=h5py.string_dtype())
    return path


IDS = ["plain", "with space", "a/b/c", "ünï/çødé 视频", "-dash", "dot.mp4", "x" * 200]


def some_features(ids=IDS, width=8, dtype=np.float16, seed=0):
    draw = np.random.default_rng(seed)
    return {video: draw.normal(size=(draw.integers(1, 9), width)).astype(dtype) for video in ids}


def write_ours(path, features, dtype="float16", **meta):
    """The packed layout, by our writer."""
    with StoreWriter(path, dtype, meta) as writer:
        for video, frames in features.items():
            writer.add(video, frames)
    return path


def write_pickle(path, value):
    path.write_bytes(pickle.dumps(value))
    return path


def read_log(folder):
    path = Path(folder) / "log.jsonl"
    if not path.exists():
        return []
    return [
        json.loads(line)
        for line in path.read_text().splitlines(keepends=True)
        if line.endswith("\n")
    ]
