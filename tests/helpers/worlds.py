"""Synthetic benchmarks: video features, and small annotations in the forms of the public sets."""

import json
from itertools import combinations

import numpy as np

from helpers.feature_files import write_pickle

C = 32  # channels of every synthetic feature

# --- features that an encoder can learn from ----------------------------------------------------


def make_videos(rng, names, signals, noise, T=(3, 12)):
    """{name: (T, C) float32 of unit length}.

    The first quarter of the channels carries the film's signal. The others are noise that is
    constant in a video, so that the mean over frames does not remove it: an encoder has to learn
    which channels count.
    """
    signal_size = C // 4
    videos = {}
    for name, own in zip(names, signals, strict=True):
        frames = rng.normal(0, 0.1, (rng.integers(*T), C))
        frames[:, :signal_size] += own
        frames[:, signal_size:] += noise * rng.normal(size=C - signal_size)
        videos[name] = (frames / np.linalg.norm(frames, axis=1, keepdims=True)).astype(np.float32)
    return videos


def make_pairs(rng, films, copies, background, noise):
    """Training features and an annotation in VCDB's form, with the film segment of every video."""
    names = [f"film{f}/copy {c}" for f in range(films) for c in range(copies)]
    signals = np.repeat(rng.normal(size=(films, C // 4)), copies, axis=0)
    negatives = [f"bg{i:03}" for i in range(background)]
    features = make_videos(rng, names, signals, noise)
    features |= make_videos(rng, negatives, rng.normal(size=(background, C // 4)), noise)

    pairs = []
    for f in range(films):
        for a, b in combinations(range(copies), 2):
            videos = [f"film{f}/copy {a}", f"film{f}/copy {b}"]
            pairs.append({"videos": videos, "overlap": [float(rng.uniform(0, 1)), 1.0]})

    segments = {}
    for name in features:
        film, start = int(rng.integers(films)), int(rng.integers(50))
        segments[name] = [[f"film{film}", start, start + 20]]
    return features, {"video_pairs": pairs, "negs": negatives, "segments": segments}


def make_set(rng, films, copies, distractors, noise):
    """Features, a FIVR-like annotation, and the database of an evaluation set.

    The first copy of a film is a query; the others are its ND, DS and CS; a distractor is its IS.
    """
    names = [f"q{f}-{c}" for f in range(films) for c in range(copies)]
    signals = np.repeat(rng.normal(size=(films, C // 4)), copies, axis=0)
    others = [f"d{i:03}" for i in range(distractors)]
    features = make_videos(rng, names, signals, noise)
    features |= make_videos(rng, others, rng.normal(size=(distractors, C // 4)), noise)

    labels = ("ND", "DS", "CS")
    annotation = {}
    for f in range(films):
        lists = {label: [] for label in (*labels, "IS")}
        for c in range(1, copies):
            lists[labels[(c - 1) % 3]].append(f"q{f}-{c}")
        lists["IS"] = [others[f]]
        annotation[f"q{f}-0"] = lists
    return features, annotation, sorted(features)


def write_set(folder, stem, annotation, database):
    """Write an evaluation set's two annotation files, in FIVR's form."""
    (folder / f"{stem}.json").write_text(json.dumps(annotation))
    (folder / f"{stem}_ids.txt").write_text("\n".join(database) + "\n")


# --- small annotations in the forms of the public sets ------------------------------------------


def make_cc_web(rng, sets=4, per_set=12):
    """CC_WEB_VIDEO in the form of DnS, with the oddities of the real file.

    A label in lower case, a positive without an id, a video judged in a set that is not its own,
    excluded videos, gaps between the numbers.
    """
    labels = ["E", "S", "L", "V", "M", "X", "X", "X", "x"]
    index, truth, excluded, number = {}, [], [], 1
    for s in range(1, sets + 1):
        judged = {}  # number of a video -> its label
        for i in range(per_set):
            judged[number + i] = "E" if i == 0 else str(rng.choice(labels))
            index[f"{s}/{s}_{i + 1}_Y"] = number + i
        number += per_set + 1  # a gap
        excluded.append({int(n) for n in rng.permutation(list(judged)[1:])[:2]})
        truth.append(judged)
    truth[0][9999] = "S"  # no video has this number
    of_another_set = next(n for n, label in truth[2].items() if label == "X")
    truth[1][of_another_set] = "X"
    return {
        "index": index,
        "queries": [f"{s}/{s}_1_Y" for s in range(1, sets + 1)],
        "ground_truth": truth,
        "excluded": excluded,
    }


def as_tca(cc_web):
    """The same annotation in the form of TCA's repository: other ids, under another key."""
    index = {video.split("/")[1]: number for video, number in cc_web["index"].items()}
    names = [""] * (max(index.values()) + 1)
    queries = [query.split("/")[1] for query in cc_web["queries"]]
    return cc_web | {"vid2index": index, "index": names, "queries": queries}


def make_evve(rng, events=3, distractors=15):
    """EVVE's form, with null videos (the public file has none); a null is a positive as well."""
    annotation, database = {}, [f"strange{i}" for i in range(distractors)]
    for e in range(events):
        queries = {f"q{e}-{i}" for i in range(e + 2)}
        positives = [f"p{e}-{i}" for i in range(rng.integers(3, 8))]
        nulls = {f"null{e}", positives[0]} if e == 0 else set()
        annotation[f"event+{events - e}"] = (queries, set(positives), nulls)
        database += [*positives, *(nulls - set(positives))]
    return {
        "annotation": annotation,
        "queries": sorted(set().union(*(queries for queries, _, _ in annotation.values()))),
        "database": [str(video) for video in rng.permutation(database)],
    }


def make_vcdb(rng, films=3, copies=4, background=20):
    """VCDB's form with its index, in which some background videos are listed twice."""
    pairs = []
    for f in range(films):
        pairs += combinations([f"core{f}-{c}" for c in range(copies)], 2)
    chosen = [pairs[i] for i in rng.permutation(len(pairs))[: len(pairs) * 2 // 3]]
    core = sorted({video for pair in chosen for video in pair})
    negatives = [f"bg{i}" for i in range(background)]
    return {
        "video_pairs": [{"videos": list(pair), "overlap": [0.5, 0.9]} for pair in chosen],
        "index": [*core, *negatives, *negatives[:2]],
        "negs": [*negatives, negatives[0]],
    }


def write_public_sets(folder, seed=0):
    """Write small files with the name and form of every public set; returns the folder."""
    rng = np.random.default_rng(seed)
    _, annotation, database = make_set(rng, films=4, copies=4, distractors=12, noise=0.6)
    (folder / "fivr_annotation.json").write_text(json.dumps(annotation))
    (folder / "fivr_youtube_ids.txt").write_text("\n".join(database) + "\n")
    ids = {"queries": list(annotation), "database": set(database)}
    write_pickle(folder / "fivr.pickle", {"5k": ids, "200k": ids, "annotation": annotation})
    write_pickle(folder / "cc_web_video.pickle", make_cc_web(rng))
    write_pickle(folder / "evve.pickle", make_evve(rng))
    write_pickle(folder / "vcdb.pickle", make_vcdb(rng))
    return folder
