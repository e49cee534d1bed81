"""Encode, compare, score: the mAP tables.

    # the encoder of a training run, by video descriptors (TCA_c)
    python evaluation.py --dataset FIVR-5K --feature_path fivr.hdf5 --model_path runs/tca --metric cosine

    # TCA_c, TCA_sym and TCA_f of three seeds, with the untrained rows of the same features, and a file of the figures
    python evaluation.py --dataset FIVR-5K --feature_path fivr.hdf5 --model_path runs/seed0 runs/seed1 runs/seed2 \\
        --metric cosine sym_chamfer chamfer --baseline cosine chamfer --output results.json

    # no training at all: the mean of the frame features
    python evaluation.py --dataset FIVR-5K --feature_path fivr.hdf5 --encoder mean --metric cosine

Annotations are looked for in datasets/annotations (or --annotation_dir, or the environment's TCA_ANNOTATIONS).
"""

import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data import FeatureStore, pad
from evaluation_sets import ANNOTATION_DIR, EVALUATION_SETS, evaluation_set
from model import ENCODERS, build_encoder, length_batches
from similarity import METRICS, VIDEO_METRICS, similarity_table
from utils import (
    InputError,
    Parser,
    atomic,
    check_ranges,
    checked_device,
    default_device,
    existing,
    load_torch,
    provenance,
    run,
    write_json,
)

TCA_ROWS = {"cosine": "TCA_c", "chamfer": "TCA_f", "sym_chamfer": "TCA_sym"}  # the paper's names


def load_encoder(path, nhead=8):
    """The encoder in `path`: a run's folder (its model.pth), a file in it, or a bare state dict.

    Returns (name, encoder, what the file says of the features it was trained on).
    """
    path = existing(path, "model path")
    file = path / "model.pth" if path.is_dir() else path
    state = load_torch(file)
    encoder = build_encoder(state, f"model file {str(file)!r}", nhead)
    name = next(name for name, kind in ENCODERS.items() if type(encoder) is kind)
    return name, encoder, state.get("features") or {}  # a bare state dict says nothing


def crop(frames, padding_size):
    """The middle `padding_size` frames of a longer video; 0 takes all. The same on every run, unlike the released crop."""
    start = max(len(frames) - padding_size, 0) // 2 if padding_size else 0
    return frames[start : start + padding_size] if padding_size else frames


@torch.inference_mode()
def describe(encoder, store, videos, video_level, padding_size=300, device="cpu", progress=False):
    """Descriptors of `videos`, in their order: (D,) arrays, or (T, D) arrays of frame descriptors; float32.

    Videos are encoded in batches of like length, so that almost nothing is padded. The descriptors are all held: frame
    descriptors take 4 x T x D bytes a video.
    """
    lengths = [min(store.lengths[video], padding_size or store.lengths[video]) for video in videos]
    out, encoder = [None] * len(videos), encoder.to(device).eval()
    with tqdm(total=len(videos), desc="encode", unit="video", disable=not progress, leave=False) as bar:
        for batch in length_batches(lengths):
            x, num_frames = (part.to(device) for part in pad([crop(store[videos[i]], padding_size) for i in batch]))
            described = (encoder if video_level else encoder.encode)(x, num_frames).float().cpu().numpy()
            for row, i in zip(described, batch, strict=True):
                out[i] = row if video_level else row[: lengths[i]].copy()
            bar.update(len(batch))
    return out


def tables(encoder, store, queries, database, metrics, padding_size=300, device="cpu", progress=False):
    """{metric: similarities (Q, N)} between the ids `queries` and `database`; one encoding pass a descriptor level."""
    check_width(encoder, store)
    found = {}
    for video_level in (True, False):
        wanted = [metric for metric in metrics if (metric in VIDEO_METRICS) == video_level]
        if wanted:
            videos = list(dict.fromkeys([*queries, *database]))
            described = describe(encoder, store, videos, video_level, padding_size, device, progress)
            by_id = dict(zip(videos, described, strict=True))
            sides = [[by_id[video] for video in side] for side in (queries, database)]
            found |= {metric: similarity_table(*sides, metric, device, progress=progress) for metric in wanted}
    return {metric: found[metric] for metric in metrics}


def with_features(chosen, store):
    """The queries and the database videos of an evaluation set that have features: two lists of ids."""
    sides = [[video for video in side if video in store] for side in (chosen.queries, chosen.database)]
    if not all(sides):
        raise InputError(f"{str(store.path)!r} has features of no query or no video of the {chosen.source}; wrong file?")
    return sides


def check_width(encoder, store):
    if encoder.feature_size != store.channels:
        raise InputError(
            f"the encoder takes features of {encoder.feature_size} channels, {str(store.path)!r} has {store.channels};"
            " use the features (and PCA) it was trained on"
        )


def warn_of_other_features(features, store, model):
    """Say so on stderr when features were made otherwise than those that a model was trained on."""
    here = {key: store.meta.get(key, value) for key, value in features.items()}
    other = [f"{key} {value!r}, here {here[key]!r}" for key, value in features.items() if here[key] != value]
    if other:
        print(
            f"warning: {model}: not trained on such features as {str(store.path)!r} holds: {'; '.join(other)}", file=sys.stderr
        )


def rows(args, store, queries, database):
    """Yield (row name, table (Q, N)) for every encoder and metric asked for."""
    options = dict(padding_size=args.padding_size, device=args.device, progress=True)
    untrained = ENCODERS["mean"](store.channels)
    baselines = tables(untrained, store, queries, database, args.baseline, **options)
    names = {metric: f"{'mean' if metric == 'cosine' else metric}, untrained" for metric in METRICS}
    yield from ((names[metric], table) for metric, table in baselines.items() if metric in VIDEO_METRICS)
    for path in args.model_path:
        name, encoder, features = load_encoder(path, args.nhead)
        warn_of_other_features(features, store, path)
        if args.encoder and args.encoder != name:
            raise InputError(f"{path!r} holds a {name!r} encoder, not {args.encoder!r}; leave --encoder out")
        for metric, table in tables(encoder, store, queries, database, args.metric, **options).items():
            yield TCA_ROWS.get(metric, f"tca, {metric}") if name == "tca" else f"{name}, {metric}", table
    yield from ((names[metric], table) for metric, table in baselines.items() if metric not in VIDEO_METRICS)


def print_table(figures):
    """figures: {row: [{column: value}, ...]}, one dict a model. Several print as mean ± sample standard deviation."""
    columns = list(next(iter(figures.values()))[0])
    width = max(map(len, figures))
    print(f"{'':{width}}  " + "  ".join(f"{column:>13}" for column in columns))
    for row, results in figures.items():
        cells = []
        for column in columns:
            values = [result[column] for result in results]
            spread = f" ± {np.std(values, ddof=1):.4f}" if len(values) > 1 else ""
            cells.append(f"{np.mean(values):.4f}{spread}")
        print(f"{row:{width}}  " + "  ".join(f"{cell:>13}" for cell in cells))


def parse(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("-d", "--dataset", required=True, help=f"evaluation set: {', '.join(EVALUATION_SETS)}")
    add("-fp", "--feature_path", required=True, help="HDF5 file with the features of the set's videos")
    add("-mp", "--model_path", nargs="+", default=[], help="a run's folder, a model file, or a released state dict; several"
        " (the seeds of one setting) give mean ± spread")  # fmt: skip
    add("--encoder", choices=ENCODERS, help="check that the model is of this kind; `mean` alone needs no model")
    add("-m", "--metric", nargs="+", default=["cosine"], help=f"one or more of {', '.join(METRICS)} (default cosine, which"
        " the paper calls TCA_c; chamfer is TCA_f, far slower and better)")  # fmt: skip
    add("--baseline", nargs="+", default=[], metavar="METRIC", help="also score the untrained features by these metrics")
    add("-ps", "--padding_size", type=int, default=300, help="frames of a video that count, from its middle; 0 takes all"
        " (default 300, the paper's)")  # fmt: skip
    add("--annotation_dir", default=ANNOTATION_DIR, help="folder of the annotation files (default %(default)s)")
    add("--device", default=default_device(), help="cpu, cuda, cuda:1, ... (default %(default)s)")
    add("--output", help="write figures, command, revision, versions and counts of what was missing to this JSON file")
    add("--save_similarities", help="write {query: {video: similarity}} of the one row to this JSON file")
    add("-pc", "--pca_components", type=int, help="width the features must have (default: whatever the file has)")
    add("--nhead", type=int, default=8, help="attention heads of a bare state dict, which does not tell (default 8)")
    for short, name in (("-nc", "num_clusters"), ("-nl", "num_layers"), ("-od", "output_dim")):
        add(short, f"--{name}", type=int, help="read from the model file; accepted for the released command's sake")
    args = parser.parse_args(argv)
    args.device = checked_device(args.device)
    for path in (args.output, args.save_similarities):
        if path and Path(path).is_dir():
            raise InputError(f"{path!r} is a folder; name a file to write")
    given = [f"--{name}" for name in ("num_clusters", "num_layers", "output_dim") if getattr(args, name) is not None]
    if given:
        print(f"note: {', '.join(given)} changes nothing: the model file says what it holds", file=sys.stderr)
    check_ranges(args, {"padding_size": (0, math.inf), "nhead": (1, math.inf)})
    for metric in (*args.metric, *args.baseline):
        if metric not in METRICS:
            raise InputError(f"metric {metric!r} is not known; choose from {', '.join(METRICS)}")
    if not args.model_path and args.encoder != "mean":
        raise InputError("--model_path is missing; give a trained model, or --encoder mean for the untrained features")
    if not args.model_path:  # the untrained features are all there is to score
        args.metric, args.baseline = [], list(dict.fromkeys([*args.metric, *args.baseline]))
    if args.save_similarities and len(args.model_path) * len(args.metric) + len(args.baseline) > 1:
        raise InputError("--save_similarities writes one table; give one model and one --metric with it")
    return args


def main():
    args = parse()
    chosen = evaluation_set(args.dataset, args.annotation_dir)
    store = FeatureStore(args.feature_path, args.pca_components)
    coverage = chosen.coverage(store)
    queries, database = with_features(chosen, store)
    print(
        f"{args.dataset}: {coverage['queries']} queries ({coverage['queries_missing']} missing), {coverage['videos']} videos"
        f" ({coverage['videos_missing']} missing); {chosen.source}; {store.channels} channels"
    )
    figures = {}
    for row, table in rows(args, store, queries, database):
        figures.setdefault(row, []).append(chosen.evaluate_table(queries, database, table))
    print_table(figures)
    skipped = {task: count for task, count in coverage["queries_without_relevant"].items() if count}
    if skipped:
        print(f"queries skipped because no relevant video has features: {skipped}")
    if args.output:
        write_json(
            args.output,
            {"dataset": args.dataset, "annotation": chosen.source, "figures": figures, "models": args.model_path}
            | {
                "padding_size": args.padding_size,
                "coverage": coverage,
                "features": {"path": str(store.path), "meta": store.meta},
            }
            | provenance(),
        )
    if args.save_similarities:
        save_similarities(args.save_similarities, queries, database, table)


def save_similarities(path, queries, database, table):
    """The field's form {query: {video: similarity}}, written a query at a time."""
    with atomic(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for i, (query, row) in enumerate(zip(queries, table, strict=True)):
            line = json.dumps(dict(zip(database, (float(f"{value:.6g}") for value in row), strict=True)))
            file.write(("{" if not i else ",\n") + f"{json.dumps(query)}: {line}")
        file.write("}\n")


if __name__ == "__main__":
    run(main)
