"""Small worlds of synthetic video, and scripts run as users run them: by a process of their own, from the root."""

import json
import os
import pickle
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from data import StoreWriter  # noqa: E402

signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background of a shell it is ignored, here and in scripts
torch.set_num_threads(1)  # as the scripts below: one thread, so that sums have one order

C = 32  # channels of every synthetic feature


# --- scripts ---------------------------------------------------------------------------------------------------------


def environment(**changes):
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": "", **changes}


def cli(script, *arguments, **changes):
    """Run `python script arguments` from the repository's root; gives returncode, stdout, stderr."""
    command = [sys.executable, script, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment(**changes), capture_output=True, text=True, timeout=300)


def clis(*commands):
    """Several `cli` calls, two at a time (most of a short call is imports)."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda command: cli(*command), commands))


def start(script, *arguments, **options):
    """The same, not waited for; options of Popen."""
    command = [sys.executable, script, *map(str, arguments)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, cwd=ROOT, env=environment(), **pipes, **options)


def one_error(result):
    """The line of a call that failed on bad input: exit status 2, one line on stderr and nothing else there."""
    assert result.returncode == 2, f"exit status {result.returncode}\n{result.stdout}\n{result.stderr}"
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    return lines[0]


def error_after_progress(result):
    """The same for a failure in the middle of work, when a progress bar has been drawn: the error is the last line."""
    assert result.returncode == 2, f"exit status {result.returncode}\n{result.stdout}\n{result.stderr}"
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    others = [line for line in lines[:-1] if "%|" not in line and "it/s" not in line and "/s]" not in line]
    assert lines[-1].startswith("error: ") and not others, result.stderr
    return lines[-1]


# --- files -----------------------------------------------------------------------------------------------------------


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
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


# --- worlds ----------------------------------------------------------------------------------------------------------


def make_videos(draw, names, signals, noise, T=(3, 12)):
    """{name: (T, C) float32}: a quarter of the channels carry the film's signal, the rest what tells copies nothing.

    The mean over frames does not take the noise away: it is constant in a video. An encoder must learn what counts.
    """
    signal_size = C // 4
    videos = {}
    for name, own in zip(names, signals, strict=True):
        frames = draw.normal(0, 0.1, (draw.integers(*T), C))
        frames[:, :signal_size] += own
        frames[:, signal_size:] += noise * draw.normal(size=C - signal_size)
        videos[name] = (frames / np.linalg.norm(frames, axis=1, keepdims=True)).astype(np.float32)
    return videos


def make_pairs(draw, films, copies, background, noise):
    """Features and an annotation of VCDB's form, every video with the film segment it shows."""
    names = [f"film{f}/copy {c}" for f in range(films) for c in range(copies)]
    signals = np.repeat(draw.normal(size=(films, C // 4)), copies, axis=0)
    negatives = [f"bg{i:03}" for i in range(background)]
    features = make_videos(draw, names, signals, noise)
    features |= make_videos(draw, negatives, draw.normal(size=(background, C // 4)), noise)
    pairs = [
        {"videos": [f"film{f}/copy {a}", f"film{f}/copy {b}"], "overlap": [float(draw.uniform(0, 1)), 1.0]}
        for f in range(films)
        for a, b in combinations(range(copies), 2)
    ]
    segments = {name: [[f"film{draw.integers(films)}", int(t := draw.integers(50)), int(t) + 20]] for name in features}
    return features, {"video_pairs": pairs, "negs": negatives, "segments": segments}


def make_set(draw, films, copies, distractors, noise):
    """Features and an annotation of FIVR's form: a film's copies are its ND, DS and CS, a few strangers its IS."""
    names = [f"q{f}-{c}" for f in range(films) for c in range(copies)]
    others = [f"d{i:03}" for i in range(distractors)]
    features = make_videos(draw, names, np.repeat(draw.normal(size=(films, C // 4)), copies, axis=0), noise)
    features |= make_videos(draw, others, draw.normal(size=(distractors, C // 4)), noise)
    labels = ("ND", "DS", "CS")
    annotation = {}
    for f in range(films):
        lists = {label: [] for label in (*labels, "IS")}
        for c in range(1, copies):
            lists[labels[(c - 1) % 3]].append(f"q{f}-{c}")
        lists["IS"] = [others[f]]
        annotation[f"q{f}-0"] = lists
    database = sorted(features)
    return features, annotation, database


def write_set(folder, stem, annotation, database):
    (folder / f"{stem}.json").write_text(json.dumps(annotation))
    (folder / f"{stem}_ids.txt").write_text("\n".join(database) + "\n")


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Training pairs, a held-out set (DEMO-VAL) and a test set (DEMO) of other films, on disk."""
    folder, draw = tmp_path_factory.mktemp("world"), np.random.default_rng(7)
    noise = 0.6
    pairs, annotation = make_pairs(draw, films=12, copies=4, background=80, noise=noise)
    here = SimpleNamespace(folder=folder, annotation=annotation, pairs=pairs, annotations=folder / "annotations")
    here.annotations.mkdir()
    here.train_features = write_packed(folder / "train.hdf5", {k: v.astype(np.float16) for k, v in pairs.items()})
    here.vcdb = write_pickle(folder / "vcdb.pickle", annotation)
    for stem, attribute in (("demo", "test"), ("demo_val", "val")):
        features, labels, database = make_set(draw, films=10, copies=4, distractors=40, noise=noise)
        write_set(here.annotations, stem, labels, database)
        setattr(here, f"{attribute}_features", write_released(folder / f"{attribute}.hdf5", features))
        setattr(here, attribute, SimpleNamespace(features=features, labels=labels, database=database))
    here.train_flags = ["--annotation_path", here.vcdb, "--feature_path", here.train_features]
    return here


# --- small annotations of the public sets' forms ---------------------------------------------------------------------


def make_cc_web(draw, sets=4, per_set=12):
    """CC_WEB_VIDEO's form in DnS's ids, with its oddities: an odd label, a positive without an id, excluded videos."""
    labels = ["E", "S", "L", "V", "M", "X", "X", "X", "x"]
    index, truth, excluded, number = {}, [], [], 1
    for s in range(1, sets + 1):
        of_set = {number + i: "E" if i == 0 else str(draw.choice(labels)) for i in range(per_set)}
        for i, n in enumerate(of_set):
            index[f"{s}/{s}_{i + 1}_Y"] = n
        number += per_set + 1  # numbers have gaps
        excluded.append({int(n) for n in draw.permutation(list(of_set)[1:])[:2]})
        truth.append(of_set)
    truth[0][9999] = "S"  # labelled, but no video has this number
    truth[1][next(n for n, label in truth[2].items() if label == "X")] = "X"  # a video of another set, judged in this one
    return {
        "index": index,
        "queries": [f"{s}/{s}_1_Y" for s in range(1, sets + 1)],
        "ground_truth": truth,
        "excluded": excluded,
    }


def as_tca(cc_web):
    """The same annotation as TCA's repository keeps it: other ids, under another key."""
    index = {video.split("/")[1]: number for video, number in cc_web["index"].items()}
    names = [""] * (max(index.values()) + 1)
    return cc_web | {"vid2index": index, "index": names, "queries": [query.split("/")[1] for query in cc_web["queries"]]}


def make_evve(draw, events=3, distractors=15):
    """EVVE's form; with nulls, of which the public file has none, one of them listed as a positive too."""
    annotation, database = {}, [f"strange{i}" for i in range(distractors)]
    for e in range(events):
        positives = [f"p{e}-{i}" for i in range(draw.integers(3, 8))]
        nulls = {f"null{e}", positives[0]} if not e else set()
        annotation[f"event+{events - e}"] = ({f"q{e}-{i}" for i in range(e + 2)}, set(positives), nulls)
        database += [*positives, *(nulls - set(positives))]
    queries = sorted(query for asked, _, _ in annotation.values() for query in asked)
    return {"annotation": annotation, "queries": queries, "database": [str(video) for video in draw.permutation(database)]}


def make_vcdb(draw, films=3, copies=4, background=20):
    """VCDB's form with its index, in which background videos stand twice."""
    core = [f"core{f}-{c}" for f in range(films) for c in range(copies)]
    pairs = [pair for f in range(films) for pair in combinations(core[f * copies : (f + 1) * copies], 2)]
    chosen = [pairs[i] for i in draw.permutation(len(pairs))[: len(pairs) * 2 // 3]]
    core = [video for video in core if any(video in pair for pair in chosen)]
    negatives = [f"bg{i}" for i in range(background)]
    listed = [{"videos": list(pair), "overlap": [0.5, 0.9]} for pair in chosen]
    return {"video_pairs": listed, "index": [*core, *negatives, *negatives[:2]], "negs": [*negatives, negatives[0]]}


def write_public_sets(folder, seed=0):
    """Small files of every public set's name and form, in `folder`, which is given back."""
    draw = np.random.default_rng(seed)
    _, annotation, database = make_set(draw, films=4, copies=4, distractors=12, noise=0.6)
    (folder / "fivr_annotation.json").write_text(json.dumps(annotation))
    (folder / "fivr_youtube_ids.txt").write_text("\n".join(database) + "\n")
    ids = {"queries": list(annotation), "database": set(database)}
    write_pickle(folder / "fivr.pickle", {"5k": ids, "200k": ids, "annotation": annotation})
    write_pickle(folder / "cc_web_video.pickle", make_cc_web(draw))
    write_pickle(folder / "evve.pickle", make_evve(draw))
    write_pickle(folder / "vcdb.pickle", make_vcdb(draw))
    return folder


# --- oracles ---------------------------------------------------------------------------------------------------------

TASKS = {"DSVR": ["ND", "DS"], "CSVR": ["ND", "DS", "CS"], "ISVR": ["ND", "DS", "CS", "IS"]}


def by_loop(similarities, annotation, database, available):
    """The protocol of FIELD, one video after another: {task: mAP}."""
    figures = {}
    for task, labels in TASKS.items():
        values = []
        for query, row in similarities.items():
            if query not in annotation:
                continue
            relevant = {v for label in labels for v in annotation[query].get(label, []) if v in available}
            if not relevant:
                continue
            ranked = [v for v in database if v in row and v in available and v != query]
            ranked.sort(key=lambda v: -row[v])  # Python's sort is stable: ties stay in database order
            hits, total = 0, 0.0
            for rank, video in enumerate(ranked, 1):
                if video in relevant:
                    hits += 1
                    total += hits / rank
            values.append(total / len(relevant))
        figures[task] = sum(values) / len(values) if values else float("nan")
    return figures


@pytest.fixture(scope="session")
def annotations():
    """The folder of the official annotation files, where the environment names one."""
    if not os.environ.get("TCA_ANNOTATIONS"):
        pytest.skip("TCA_ANNOTATIONS does not name the folder of the official annotation files")
    return Path(os.environ["TCA_ANNOTATIONS"])
