"""Synthetic worlds of video features, and small annotations of the public sets' forms."""

import json
from itertools import combinations

import numpy as np

from helpers.files import write_pickle

C = 32  # channels of every synthetic feature


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
        {
            "videos": [f"film{f}/copy {a}", f"film{f}/copy {b}"],
            "overlap": [float(draw.uniform(0, 1)), 1.0],
        }
        for f in range(films)
        for a, b in combinations(range(copies), 2)
    ]
    segments = {
        name: [[f"film{draw.integers(films)}", int(t := draw.integers(50)), int(t) + 20]]
        for name in features
    }
    return features, {"video_pairs": pairs, "negs": negatives, "segments": segments}


def make_set(draw, films, copies, distractors, noise):
    """Features and an annotation of FIVR's form: a film's copies are its ND, DS and CS, a few strangers its IS."""
    names = [f"q{f}-{c}" for f in range(films) for c in range(copies)]
    others = [f"d{i:03}" for i in range(distractors)]
    features = make_videos(
        draw, names, np.repeat(draw.normal(size=(films, C // 4)), copies, axis=0), noise
    )
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
    truth[1][next(n for n, label in truth[2].items() if label == "X")] = (
        "X"  # a video of another set, judged in this one
    )
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
    return cc_web | {
        "vid2index": index,
        "index": names,
        "queries": [query.split("/")[1] for query in cc_web["queries"]],
    }


def make_evve(draw, events=3, distractors=15):
    """EVVE's form; with nulls, of which the public file has none, one of them listed as a positive too."""
    annotation, database = {}, [f"strange{i}" for i in range(distractors)]
    for e in range(events):
        positives = [f"p{e}-{i}" for i in range(draw.integers(3, 8))]
        nulls = {f"null{e}", positives[0]} if not e else set()
        annotation[f"event+{events - e}"] = (
            {f"q{e}-{i}" for i in range(e + 2)},
            set(positives),
            nulls,
        )
        database += [*positives, *(nulls - set(positives))]
    queries = sorted(query for asked, _, _ in annotation.values() for query in asked)
    return {
        "annotation": annotation,
        "queries": queries,
        "database": [str(video) for video in draw.permutation(database)],
    }


def make_vcdb(draw, films=3, copies=4, background=20):
    """VCDB's form with its index, in which background videos stand twice."""
    core = [f"core{f}-{c}" for f in range(films) for c in range(copies)]
    pairs = [
        pair for f in range(films) for pair in combinations(core[f * copies : (f + 1) * copies], 2)
    ]
    chosen = [pairs[i] for i in draw.permutation(len(pairs))[: len(pairs) * 2 // 3]]
    core = [video for video in core if any(video in pair for pair in chosen)]
    negatives = [f"bg{i}" for i in range(background)]
    listed = [{"videos": list(pair), "overlap": [0.5, 0.9]} for pair in chosen]
    return {
        "video_pairs": listed,
        "index": [*core, *negatives, *negatives[:2]],
        "negs": [*negatives, negatives[0]],
    }


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
