"""Make the small model files that `search.py` ships, and measure on the demo's test part what its scores mean.

    python -m videoindex.calibrate pack --pca runs/demo/pca.npz --model_path runs/demo/tca-0 --output models/demo
    python -m videoindex.calibrate measure --demo runs/demo --model models/demo

`pack` writes pca.npz and model.pth in half precision. `measure` indexes the demo's val and test videos with them, and writes
calibration.json beside them: for the encoder and for `mean` (the same features, untrained)

- `threshold`: the least score at which 99 % of the answers are right, over all (query, video) pairs of the test part. Right:
  the two share film, or show the same place (labels ND, DS, CS). `recall`: the share of all ND and DS pairs that reach it;
  `share_film`: the share of the answers that share film, and not just a place;
- `copies_threshold`: the same where only shared film is right, for `duplicates`;
- recall by kind of edit among the benchmark's copies, most of which carry four or five edits (demo_segments.json), and among
  copies of the queries made here with that edit alone; and how far off the ends of the stretches found are;
- `align`: how alike two frames must be to be matched, chosen by that error on the val part;
- `radius`: the similarity of video descriptors that 99 % of the copies found have, for `duplicates`.
"""

import argparse
import json
import os
import random
from pathlib import Path

import numpy as np
import torch

import utils
from datasets.demo import edits, plan
from datasets.registry import load_evaluation_set
from distributed import run_main
from retrieval.alignment import align
from retrieval.similarity import similarity_table
from videoindex.index import METRIC, SHORTLIST, VideoIndex, unit
from videoindex.pipeline import CALIBRATION, EncodedVideo, Model

FILM = Path(__file__).resolve().parent.parent / "datasets" / "demo" / "film.mp4"
PRECISION = 0.99
KINDS = {  # what a row of the table means: the edits of edits.py it stands for
    "mirrored": ("mirror",),
    "bordered": ("letterbox", "pillarbox", "inset"),
    "captioned": ("caption",),
    "re-coloured": ("hue", "saturation", "grey", "sepia", "balance", "negate"),
    "cropped": ("crop", "crop_centre", "crop_tall"),
    "speed-changed": ("faster", "slower"),
}
TRIMMED = 0.1  # a copy is trimmed when at least so much of the query's film is cut from it


# --- pack ------------------------------------------------------------------------------------------------------------


def pack(args):
    """The model's files in half precision; variances and the mean stay float32, they span orders of magnitude."""
    with np.load(utils.require_path(args.pca, "pca"), allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    arrays = {
        k: v.astype(np.float16 if k == "components" else np.float32) if v.ndim else v
        for k, v in arrays.items()
    }
    output = Path(args.output)
    with utils.atomic(output / "pca.npz") as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, **arrays)
    path = utils.require_path(args.model_path, "model path")
    state = utils.load_torch(path / "model.pth" if path.is_dir() else path)
    if "state_dict" not in state:
        raise utils.InputError(f"{str(path)!r} is no model.pth of train.py; give a run's folder")
    halves = {
        name: value.half() if value.is_floating_point() else value
        for name, value in state["state_dict"].items()
    }
    utils.save_torch(output / "model.pth", {**state, "state_dict": halves})
    for name in ("pca.npz", "model.pth"):
        print(f"{output / name}: {(output / name).stat().st_size / 1e6:.1f} MB")


# --- measure ---------------------------------------------------------------------------------------------------------


class Part:
    """A part of the demo in an index: annotation, true places, and scores of every query with every video."""

    def __init__(self, demo, part, index):
        name = {"val": "DEMO-VAL", "test": "DEMO"}[part]
        self.set = load_evaluation_set(name, demo / "annotations")
        self.labels = json.loads(
            (demo / "annotations" / f"demo{'_val' if part == 'val' else ''}.json").read_text()
        )
        self.facts = json.loads((demo / "annotations" / "demo_segments.json").read_text())
        index.add([demo / "videos" / part])
        self.index = index
        content = {Path(path).stem: facts[2] for path, facts in index.store.known().items()}
        self.rows = {video: index.store.content(content[video]) for video in self.set.database}
        self.frames = {video: unit(index.store.frames(row)) for video, row in self.rows.items()}

    def scores(self, metric):
        """(Q, N) of the set's queries and database."""
        queries, videos = (
            [self.frames[video] for video in side] for side in (self.set.queries, self.set.database)
        )
        return similarity_table(queries, videos, metric)

    def searched(self, shortlist):
        """{query: {video: similarity}} as `search.py query` ranks: a shortlist re-ranked, then the others as they were."""
        names, found = {row["id"]: video for video, row in self.rows.items()}, {}
        for query in self.set.queries:
            row = self.rows[query]
            pieces = self.index.store.videos()[row["piece"] : row["piece"] + row["pieces"]]
            clip = EncodedVideo(
                Path(query), "", row["seconds"], self.index.store.frames(row), pieces
            )
            first = self.index.query(
                clip, shortlist, threshold=-2, shortlist=shortlist, metric=METRIC, places=False
            )
            order = [match.content for match in first] + [
                content for content, _ in self.index.nearest.search(pieces, len(names))
            ]
            found[query] = {
                names[content]: -float(rank) for rank, content in enumerate(dict.fromkeys(order))
            }
        return found

    def pairs(self, table):
        """score (n,), label (n,) of every pair but a video with itself: "ND", "DS", "CS", "film" (less than 2 s), "IS", ""."""
        scores, labels = [], []
        for query, row in zip(self.set.queries, table, strict=True):
            named = {
                video: label for label, videos in self.labels[query].items() for video in videos
            }
            for video, score in zip(self.set.database, row, strict=True):
                if video != query:
                    label = named.get(video, "")
                    less = label not in ("ND", "DS") and self.true_places(query, video)
                    scores.append(score), labels.append("film" if less else label)
        return np.array(scores), np.array(labels)

    def true_places(self, query, video):
        """[(query start, query end, start, end)] in seconds: where the two show the same film."""
        found = []
        for a in self.facts[query]["segments"]:
            for b in self.facts[video]["segments"]:
                film = max(a["film"][0], b["film"][0]), min(a["film"][1], b["film"][1])
                if film[0] < film[1]:
                    found.append(tuple(at(second, side) for side in (a, b) for second in film))
        return found

    def made(self, table, threshold):
        """(query, copy or excerpt made from it, whether its score reaches the threshold)"""
        place = {video: i for i, video in enumerate(self.set.database)}
        for query, row in zip(self.set.queries, table, strict=True):
            for video in self.set.database:
                if self.facts[video]["source"] == query:
                    yield query, video, bool(row[place[video]] >= threshold)


class Singles:
    """A copy of every test query for each kind of edit, with that edit alone: rendered to `folder` once, and indexed."""

    def __init__(self, test, folder, index):
        self.test, self.made = test, []
        for query in test.set.queries:
            (whole,) = test.facts[query]["segments"]
            for kind in (*KINDS, "trimmed"):
                clip = single(query, kind, *whole["film"])
                self.made.append((kind, query, clip))
                path = folder / f"{clip.id}.mp4"
                if not path.exists():
                    with utils.atomic(path) as temporary:
                        edits.render(clip, FILM, temporary)
        index.add([folder])
        known = {Path(path).stem: facts[2] for path, facts in index.store.known().items()}
        self.frames = {
            clip.id: unit(index.store.frames(index.store.content(known[clip.id])))
            for _, _, clip in self.made
        }

    def rows(self, threshold, fps, **options):
        """{kind: {found, of, median_seconds}}: recall, and the median error over all four ends of the stretches."""
        rows = {kind: {"found": 0, "of": 0, "errors": []} for kind, _, _ in self.made}
        for kind, query, clip in self.made:
            frames, copy, row = self.test.frames[query], self.frames[clip.id], rows[kind]
            row["of"] += 1
            if similarity_table([frames], [copy], METRIC)[0, 0] >= threshold:
                row["found"] += 1
                ((*film,), rate) = (
                    (clip.pieces[0].start, clip.pieces[0].end),
                    edits.speed(clip.edits),
                )
                (whole,) = self.test.facts[query]["segments"]
                true = [*(at(second, whole) for second in film), 0, (film[1] - film[0]) / rate]
                for stretch in align(frames @ copy.T, **options)[:1]:
                    row["errors"].extend(np.abs(np.array(stretch[2:]) / fps - true))
        return {
            kind: {
                "found": row["found"],
                "of": row["of"],
                "median_seconds": round(float(np.median(row["errors"])), 3),
            }
            for kind, row in rows.items()
        }


def single(query, kind, start, end):
    """The plan.Clip of film `start` to `end` with one edit of this kind, of middling strength; drawn from the query's name."""
    draw = random.Random(f"{kind}/{query}")
    chosen = []
    if kind == "trimmed":
        kept = draw.uniform(0.5, 0.8) * (end - start)
        start = plan.to_frame(start + draw.random() * (end - start - kept))
        end = plan.to_frame(start + kept)
    else:
        name = draw.choice(KINDS[kind])
        grows = {
            key: edits.between(span, draw.uniform(0.2, 0.8))
            for key, span in edits.EDITS[name].grows.items()
        }
        free = {
            key: draw.choice(span) if isinstance(span, list) else round(draw.uniform(*span), 3)
            for key, span in edits.EDITS[name].free.items()
        }
        chosen = [[name, grows | free]]
    encoding = {"codec": "h264", "height": 192, "rate": edits.FPS, "bits": 0.15}
    clip_id = f"{query} {kind}"
    return plan.Clip(
        clip_id, "test", "copy", query, 1, (plan.Piece(start, end),), tuple(chosen), encoding
    )


def at(second, segment):
    """The second of the video that shows this second of the film."""
    (a, b), (c, d) = segment["film"], segment["video"]
    return c + (second - a) / (b - a) * (d - c)


def threshold_of(scores, right, precision=PRECISION):
    """The least score s such that of the pairs with at least s, this share is right; inf when there is none."""
    order = np.argsort(-scores, kind="stable")
    good = np.flatnonzero(np.cumsum(right[order]) >= precision * np.arange(1, len(order) + 1))
    return float(scores[order[good[-1]]]) if len(good) else float("inf")


def edits_of(facts):
    return {
        name
        for name, _ in [
            *facts["edits"],
            *(edit for piece in facts["segments"] for edit in piece["edits"]),
        ]
    }


def recall_rows(part, table, threshold):
    """{kind: [found, of]} over the copies and excerpts made of each query; one with several edits counts in several rows."""
    rows = {kind: [0, 0] for kind in ("copies", "excerpts", *KINDS, "trimmed")}
    for query, video, found in part.made(table, threshold):
        facts = part.facts[video]
        kinds = [kind for kind, names in KINDS.items() if edits_of(facts) & set(names)]
        kinds.append("copies" if facts["role"] == "copy" else "excerpts")
        (whole,) = part.facts[query]["segments"]
        kept = (
            sum(place[1] - place[0] for place in part.true_places(query, video)) / whole["video"][1]
        )
        if facts["role"] == "copy" and kept <= 1 - TRIMMED:
            kinds.append("trimmed")
        for kind in kinds:
            rows[kind][0] += found
            rows[kind][1] += 1
    return rows


def localisation(part, table, threshold, **options):
    """Errors (n, 4) in seconds of the best stretch's ends (query start and end, video start and end) over the copies and
    excerpts found, and how many of them got no stretch at all. A jump cut within a copy counts as inside the stretch."""
    errors, missing, fps = [], 0, float(part.index.fps)
    for query, video, found in part.made(table, threshold):
        if found:
            stretches = align(part.frames[query] @ part.frames[video].T, **options)
            missing += not stretches
            if stretches:
                true = np.array(part.true_places(query, video))
                ends = np.array(stretches[0][2:]) / fps
                errors.append(
                    np.abs(
                        ends
                        - [true[:, 0].min(), true[:, 1].max(), true[:, 2].min(), true[:, 3].max()]
                    )
                )
    return np.array(errors).reshape(-1, 4), missing


def choose_align(part, table, threshold):
    """The frame similarity for `align` with the least mean error on this part; a copy without a stretch counts as 5 s."""

    def loss(least):
        errors, missing = localisation(part, table, threshold, min_similarity=least)
        return (np.minimum(errors.mean(1), 5).sum() + 5 * missing) / max(len(errors) + missing, 1)

    least = min(np.arange(0.1, 0.75, 0.05), key=loss)
    return {"min_similarity": round(float(least), 2)}


def radius_of(part, scores, labels, threshold):
    """The video-descriptor similarity that all but 1 % of the copies found have, and the share of all pairs that have it."""
    videos = part.index.store.videos()
    pieces = {
        video: videos[row["piece"] : row["piece"] + row["pieces"]]
        for video, row in part.rows.items()
    }
    near = np.array(
        [
            float((pieces[a] @ pieces[b].T).max())
            for a in part.set.queries
            for b in part.set.database
            if a != b
        ]
    )
    found = np.isin(labels, ("ND", "DS")) & (scores >= threshold)
    radius = float(np.quantile(near[found], 0.01))
    return radius, float((near >= radius).mean())


def measure_one(demo, options, encoder, work):
    """The calibration of one encoder, a dict for the JSON file."""
    model = Model(**options)
    stamp = utils.digest(model.identity)  # another model gets other indexes

    def index_of(name):
        return VideoIndex(work / f"search-{encoder}-{name}-{stamp}.index", model=model)

    parts = {name: Part(demo, name, index_of(name)) for name in ("val", "test")}
    index, test = parts["test"].index, parts["test"]
    queries, database, table = test.set.queries, test.set.database, test.scores(METRIC)
    scores, labels = test.pairs(table)
    right, film = (
        np.isin(labels, names) for names in (("ND", "DS", "CS", "film"), ("ND", "DS", "film"))
    )
    threshold, copies_threshold = threshold_of(scores, right), threshold_of(scores, film)
    found, copies = scores >= threshold, np.isin(labels, ("ND", "DS"))
    places = choose_align(parts["val"], parts["val"].scores(METRIC), threshold)
    singles = Singles(test, work / "single", index_of("single"))
    radius, share = radius_of(test, scores, labels, threshold)
    return {
        "identity": model.identity,
        "metric": METRIC,
        "threshold": round(threshold, 4),
        "copies_threshold": round(copies_threshold, 4),
        "radius": round(radius, 4),
        "align": places,
        "measured on": f"the demo's test part: {len(queries)} queries, {len(database)} videos",
        "precision": round(float(right[found].mean()), 4),
        "share_film": round(float(film[found].mean()), 4),
        "recall": round(float(found[copies].mean()), 4),
        "recall_at_copies_threshold": round(float((scores >= copies_threshold)[copies].mean()), 4),
        "recall_by_kind": recall_rows(test, table, threshold),
        "recall_of_single_edits": singles.rows(threshold, float(index.fps), **places),
        "radius_share": round(share, 4),
        "mAP": rounded(test.set.evaluate_table(queries, database, table)),
        f"mAP, shortlist {SHORTLIST}": rounded(test.set.evaluate(test.searched(SHORTLIST))),
        "localisation": describe_errors(*localisation(test, table, threshold, **places)),
    }


def rounded(figures):
    return {task: round(value, 4) for task, value in figures.items()}


def describe_errors(errors, missing):
    medians = dict(
        zip(
            ("query start", "query end", "video start", "video end"),
            np.median(errors, 0).round(3),
            strict=True,
        )
    )
    return {
        "videos": len(errors),
        "without_stretch": missing,
        "median_seconds": {end: float(value) for end, value in medians.items()},
        "median_seconds_all_ends": round(float(np.median(errors)), 3),
        "within_1_second": round(float((errors <= 1).mean()), 3),
    }


def measure(args):
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count())))
    demo, model = (
        utils.require_path(args.demo, "demo"),
        utils.require_path(args.model, "model folder"),
    )
    work = Path(args.work or demo)
    files = {"pca": str(model / "pca.npz")}
    encoders = {
        "tca": {**files, "model_path": str(model / "model.pth")},
        "mean": {**files, "encoder": "mean"},
    }
    entries = {name: measure_one(demo, options, name, work) for name, options in encoders.items()}
    utils.write_json(model / CALIBRATION, entries)
    for name, entry in entries.items():
        print_entry(name, entry)


def print_entry(name, entry):
    for row in [row for row in entry if row.startswith("mAP")]:
        print(
            f"{name}, {entry['metric']}, {row}: "
            + ", ".join(f"{task} {value:.4f}" for task, value in entry[row].items())
        )
    print(
        f"  threshold {entry['threshold']:.3f}: {entry['precision']:.1%} right ({entry['share_film']:.1%} share film),"
        f" recall {entry['recall']:.1%}; for copies alone {entry['copies_threshold']:.3f}, recall"
        f" {entry['recall_at_copies_threshold']:.1%}; radius {entry['radius']:.3f} ({entry['radius_share']:.1%} of all pairs)"
    )
    for kind, (found, of) in entry["recall_by_kind"].items():
        print(f"  {kind:20} {found:4} of {of:4}  {found / of:.1%}")
    for kind, row in entry["recall_of_single_edits"].items():
        share = f"{row['found'] / row['of']:.1%}"
        print(
            f"  {kind + ' only':20} {row['found']:4} of {row['of']:4}  {share}  ends off by {row['median_seconds']:.2f} s"
        )
    places = entry["localisation"]
    ends = ", ".join(f"{end} {value:.2f}" for end, value in places["median_seconds"].items())
    print(
        f"  places: median error {places['median_seconds_all_ends']:.2f} s ({ends}), {places['videos']} videos,"
    )
    print(
        f"    {places['within_1_second']:.1%} of the ends within 1 s, {places['without_stretch']} without a stretch"
    )


def main():
    parser = utils.Parser(__doc__)
    commands = parser.add_subparsers(required=True, metavar="pack | measure")
    help = argparse.ArgumentDefaultsHelpFormatter
    one = commands.add_parser(
        "pack", help="write the model's files in half precision", formatter_class=help
    )
    one.add_argument("--pca", required=True, help="a file of pca.py")
    one.add_argument("--model_path", required=True, help="a run's folder, or its model.pth")
    one.add_argument("--output", required=True, help="folder to write to")
    one.set_defaults(run=pack)
    one = commands.add_parser("measure", help="write calibration.json", formatter_class=help)
    one.add_argument("--demo", required=True, help="a build of make_demo.py")
    one.add_argument("--model", required=True, help="folder of pca.npz and model.pth")
    one.add_argument("--work", help="folder for the indexes (default: the demo's)")
    one.set_defaults(run=measure)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    run_main(main)
