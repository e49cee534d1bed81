"""Make the model files that `search.py` ships, and measure on the demo what its scores mean.

    python -m videoindex.calibrate pack --pca runs/demo/search/pca.npz \\
        --model_path runs/demo/search/tca --output models/demo
    python -m videoindex.calibrate measure --demo runs/demo --model models/demo

`pack` writes pca.npz and model.pth in half precision.

`measure` indexes the demo's val and test videos with them, and writes calibration.json beside them.
It has an entry for the encoder and one for `mean` (the same features, untrained), with these keys:

threshold                   the lowest score at which 99 % of the answers are right, over all
                            (query, video) pairs of the test part. Right: the two share film, or
                            show the same place (ND, DS, CS)
precision, share_film       of the answers at that threshold, those that are right, and those that
                            share film (and not just a place)
recall                      of all ND and DS pairs, those that reach the threshold
copies_threshold            as threshold, but only shared film is right; for `duplicates`
recall_at_copies_threshold  of all ND and DS pairs, those that reach copies_threshold
recall_by_kind              {kind of edit: [found, of]} among the benchmark's copies, most of which
                            carry four or five edits
recall_of_single_edits      the same among copies made here, with that edit alone
align                       how similar two frames must be to match (`retrieval.alignment.align`),
                            chosen on the val part by the error of the segments' ends
localisation                that error on the test part
radius, radius_share        the similarity of window descriptors that 99 % of the copies found
                            have, and the share of all pairs that have it; for `duplicates`
mAP                         of the test part, over the whole table and as `search.py` ranks
"""

import argparse
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

import untrusted
import utils
from distributed import run_main
from files import atomic, save_torch, write_json
from model import model_file
from retrieval.alignment import align
from retrieval.similarity import similarity_table
from videoindex.calibration_data import EDIT_KINDS, DemoPart, SingleEditCopies
from videoindex.index import METRIC, SHORTLIST, VideoIndex
from videoindex.pipeline import CALIBRATION, Pipeline

PRECISION = 0.99
MISSING_ERROR = 5  # seconds that count for a copy in which no segment is found


def main(argv=None):
    args = parse_args(argv)
    args.run(args)


def parse_args(argv=None):
    parser = utils.Parser(__doc__)
    commands = parser.add_subparsers(required=True, metavar="pack | measure")

    def add_command(name, run, help):
        command = commands.add_parser(
            name, help=help, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        command.set_defaults(run=run)
        return command

    command = add_command("pack", pack, "write the model's files in half precision")
    command.add_argument("--pca", required=True, help="a file of pca.py")
    command.add_argument("--model_path", required=True, help="a run's folder, or its model.pth")
    command.add_argument("--output", required=True, help="folder to write to")

    command = add_command("measure", measure, "write calibration.json")
    command.add_argument("--demo", required=True, help="a build of make_demo.py")
    command.add_argument("--model", required=True, help="folder of pca.npz and model.pth")
    command.add_argument("--work", help="folder for the indexes (default: the demo's)")
    return parser.parse_args(argv)


# --- pack ---------------------------------------------------------------------------------------


def pack(args):
    """Write pca.npz and model.pth with the large arrays in half precision."""
    output = Path(args.output)
    pca_path = utils.require_path(args.pca, "pca")
    arrays = untrusted.load_npz(pca_path, "pca", "is it a .npz of pca.py?")
    for name, array in arrays.items():
        if array.ndim:
            # Mean and variances span orders of magnitude, so they stay in float32.
            dtype = np.float16 if name == "components" else np.float32
            arrays[name] = array.astype(dtype)
    with atomic(output / "pca.npz") as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, **arrays)

    path = model_file(args.model_path)
    saved = untrusted.load_torch(path)
    if not isinstance(saved, dict) or not isinstance(saved.get("state_dict"), dict):
        raise utils.InputError(f"{str(path)!r} is not a model.pth of train.py; give a run's folder")
    halves = {}
    for name, value in saved["state_dict"].items():
        halves[name] = value.half() if value.is_floating_point() else value
    save_torch(output / "model.pth", {**saved, "state_dict": halves})

    for name in ("pca.npz", "model.pth"):
        megabytes = (output / name).stat().st_size / 1e6
        print(f"{output / name}: {megabytes:.1f} MB")


# --- measure ------------------------------------------------------------------------------------


def measure(args):
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", utils.available_cores())))
    demo = utils.require_path(args.demo, "demo")
    model = utils.require_path(args.model, "model folder")
    work = Path(args.work or demo)
    pca = str(model / "pca.npz")
    encoders = {
        "tca": {"pca": pca, "model_path": str(model / "model.pth")},
        "mean": {"pca": pca, "encoder": "mean"},
    }
    entries = {}
    for name, options in encoders.items():
        entries[name] = calibrate(demo, name, Pipeline(**options), work)
    write_json(model / CALIBRATION, entries)
    for name, entry in entries.items():
        print_entry(name, entry)


def calibrate(demo: Path, name: str, pipeline: Pipeline, work: Path) -> dict[str, Any]:
    """The calibration of one encoder, an entry of calibration.json."""
    stamp = utils.digest(pipeline.identity)  # another model gets other indexes

    def open_index(what):
        return VideoIndex(work / f"search-{name}-{what}-{stamp}.index", pipeline=pipeline)

    val = DemoPart(demo, "val", open_index("val"))
    test = DemoPart(demo, "test", open_index("test"))
    copies = SingleEditCopies(test, work / "single", open_index("single"))
    queries, database = test.set.queries, test.set.database

    table = test.score_table()  # (Q, N)
    scores, labels = test.labelled_scores(table)  # (n,) each, n pairs
    is_copy = np.isin(labels, ("ND", "DS"))
    shares_film = np.isin(labels, ("ND", "DS", "film"))
    is_right = np.isin(labels, ("ND", "DS", "CS", "film"))
    threshold = lowest_threshold(scores, is_right)
    copies_threshold = lowest_threshold(scores, shares_film)
    found = scores >= threshold

    align_options = choose_align_options(val, val.score_table(), threshold)
    radius, radius_share = choose_radius(test, is_copy & found)
    shortlisted = test.search_rankings(SHORTLIST)
    return {
        "identity": pipeline.identity,
        "metric": METRIC,
        "threshold": round(threshold, 4),
        "copies_threshold": round(copies_threshold, 4),
        "radius": round(radius, 4),
        "align": align_options,
        "measured on": f"the demo's test part: {len(queries)} queries, {len(database)} videos",
        "precision": share(is_right[found]),
        "share_film": share(shares_film[found]),
        "recall": share(found[is_copy]),
        "recall_at_copies_threshold": share(scores[is_copy] >= copies_threshold),
        "recall_by_kind": recall_by_kind(test, table, threshold),
        "recall_of_single_edits": recall_of_single_edits(copies, threshold, align_options),
        "radius_share": round(radius_share, 4),
        "mAP": rounded(test.set.evaluate_table(queries, database, table)),
        f"mAP, shortlist {SHORTLIST}": rounded(test.set.evaluate(shortlisted)),
        "localisation": localisation(test, table, threshold, align_options),
    }


def share(flags):
    """The share of true ones, to four digits."""
    return round(float(flags.mean()), 4)


def rounded(metrics):
    return {task: round(value, 4) for task, value in metrics.items()}


# --- what is measured ---------------------------------------------------------------------------


def lowest_threshold(
    scores: np.ndarray, is_right: np.ndarray, precision: float = PRECISION
) -> float:
    """The lowest score s such that of the pairs with score >= s, this share is right; else inf.

    Args:
        scores, is_right: (n,), of n pairs.
    """
    order = np.argsort(-scores, kind="stable")
    num_right = np.cumsum(is_right[order])
    num_answers = np.arange(1, len(order) + 1)
    good = np.flatnonzero(num_right >= precision * num_answers)
    return float(scores[order[good[-1]]]) if len(good) else float("inf")


def recall_by_kind(part: DemoPart, table: np.ndarray, threshold: float) -> dict[str, list[int]]:
    """{kind: [found, of]} over the copies and excerpts made of each query.

    A video with several edits counts in several rows.
    """
    rows = {kind: [0, 0] for kind in ("copies", "excerpts", *EDIT_KINDS, "trimmed")}
    for query, video, found in part.copies_and_excerpts(table, threshold):
        for kind in part.edit_kinds(query, video):
            rows[kind][0] += found
            rows[kind][1] += 1
    return rows


def recall_of_single_edits(
    copies: SingleEditCopies, threshold: float, align_options: dict[str, float]
) -> dict[str, dict[str, float]]:
    """{kind: {found, of, median_seconds}}, the last over all four ends of the best segments."""
    test = copies.test
    fps = float(test.index.fps)
    found = {kind: 0 for kind, _, _ in copies.copies}
    of, errors = dict(found), {kind: [] for kind in found}
    for kind, query, clip in copies.copies:
        query_frames, frames = test.frames[query], copies.frames[clip.id]
        of[kind] += 1
        if similarity_table([query_frames], [frames], METRIC)[0, 0] < threshold:
            continue
        found[kind] += 1
        for segment in align(query_frames @ frames.T, **align_options)[:1]:
            ends = ends_in_seconds(segment, fps)
            errors[kind].extend(np.abs(ends - copies.true_segment(query, clip)))
    rows = {}
    for kind in found:
        median = round(float(np.median(errors[kind])), 3)
        rows[kind] = {"found": found[kind], "of": of[kind], "median_seconds": median}
    return rows


def localisation_errors(
    part: DemoPart, table: np.ndarray, threshold: float, align_options: dict[str, float]
) -> tuple[np.ndarray, int]:
    """How far the ends of the best segment are off, over the copies and excerpts found.

    A jump cut within a copy counts as inside the segment.

    Returns:
        errors (n, 4) in seconds: query start and end, video start and end;
        the number of videos in which no segment was found.
    """
    fps = float(part.index.fps)
    errors, missing = [], 0
    for query, video, found in part.copies_and_excerpts(table, threshold):
        if not found:
            continue
        segments = align(part.frames[query] @ part.frames[video].T, **align_options)
        if not segments:
            missing += 1
            continue
        true = np.array(part.true_segments(query, video))  # (segments, 4)
        starts, ends = true.min(0), true.max(0)
        true_ends = [starts[0], ends[1], starts[2], ends[3]]
        errors.append(np.abs(ends_in_seconds(segments[0], fps) - true_ends))
    return np.array(errors).reshape(-1, 4), missing


def ends_in_seconds(segment, fps):
    """[query start, query end, target start, target end] of an `alignment.Segment`."""
    frames = [
        segment.query_start,
        segment.query_end,
        segment.target_start,
        segment.target_end,
    ]
    return np.array(frames) / fps


def choose_align_options(part: DemoPart, table: np.ndarray, threshold: float) -> dict[str, float]:
    """The frame similarity with the lowest mean error of a segment's ends on this part."""

    def mean_error(min_similarity):
        options = {"min_similarity": min_similarity}
        errors, missing = localisation_errors(part, table, threshold, options)
        total = np.minimum(errors.mean(1), MISSING_ERROR).sum() + MISSING_ERROR * missing
        return total / max(len(errors) + missing, 1)

    best = min(np.arange(0.1, 0.75, 0.05), key=mean_error)
    return {"min_similarity": round(float(best), 2)}


def localisation(
    part: DemoPart, table: np.ndarray, threshold: float, align_options: dict[str, float]
) -> dict[str, Any]:
    """The medians of `localisation_errors`."""
    errors, missing = localisation_errors(part, table, threshold, align_options)
    names = ("query start", "query end", "video start", "video end")
    medians = np.median(errors, 0).round(3).tolist()
    return {
        "videos": len(errors),
        "without_stretch": missing,
        "median_seconds": dict(zip(names, medians, strict=True)),
        "median_seconds_all_ends": round(float(np.median(errors)), 3),
        "within_1_second": round(float((errors <= 1).mean()), 3),
    }


def choose_radius(part: DemoPart, is_found_copy: np.ndarray) -> tuple[float, float]:
    """The window similarity that all but 1 % of the copies found have, for `duplicates`.

    Args:
        is_found_copy: (n,), of the pairs in the order of `labelled_scores`.

    Returns:
        the radius, and the share of all pairs that have it.
    """
    windows = {}
    for video, content in part.contents.items():
        windows[video] = part.index.store.window_descriptors(content)  # (P, D)
    nearest = []
    for query in part.set.queries:
        for video in part.set.database:
            if query != video:
                nearest.append(float((windows[query] @ windows[video].T).max()))
    nearest = np.array(nearest)  # (n,)
    radius = float(np.quantile(nearest[is_found_copy], 0.01))
    return radius, float((nearest >= radius).mean())


# --- what is printed ----------------------------------------------------------------------------


def print_entry(name: str, entry: dict[str, Any]) -> None:
    for key, metrics in entry.items():
        if key.startswith("mAP"):
            values = ", ".join(f"{task} {value:.4f}" for task, value in metrics.items())
            print(f"{name}, {entry['metric']}, {key}: {values}")
    print(
        f"  threshold {entry['threshold']:.3f}: {entry['precision']:.1%} right"
        f" ({entry['share_film']:.1%} share film), recall {entry['recall']:.1%};"
        f" for copies alone {entry['copies_threshold']:.3f},"
        f" recall {entry['recall_at_copies_threshold']:.1%};"
        f" radius {entry['radius']:.3f} ({entry['radius_share']:.1%} of all pairs)"
    )
    for kind, (found, of) in entry["recall_by_kind"].items():
        print(f"  {kind:20} {found:4} of {of:4}  {found / of:.1%}")
    for kind, row in entry["recall_of_single_edits"].items():
        found, of = row["found"], row["of"]
        print(
            f"  {kind + ' only':20} {found:4} of {of:4}  {found / of:.1%}"
            f"  ends off by {row['median_seconds']:.2f} s"
        )
    errors = entry["localisation"]
    ends = ", ".join(f"{end} {value:.2f}" for end, value in errors["median_seconds"].items())
    print(
        f"  places: median error {errors['median_seconds_all_ends']:.2f} s ({ends}),"
        f" {errors['videos']} videos,"
    )
    print(
        f"    {errors['within_1_second']:.1%} of the ends within 1 s,"
        f" {errors['without_stretch']} without a stretch"
    )


if __name__ == "__main__":
    run_main(main)
