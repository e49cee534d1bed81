"""Encode, compare, score: the mAP tables.

    # the encoder of a training run, by video descriptors (TCA_c)
    python evaluation.py --dataset FIVR-5K --feature_path fivr.hdf5 --model_path runs/tca --metric cosine

    # TCA_c, TCA_sym and TCA_f of three seeds, with the untrained rows of the same features, and a file of the figures
    python evaluation.py --dataset FIVR-5K --feature_path fivr.hdf5 --model_path runs/seed0 runs/seed1 runs/seed2 \\
        --metric cosine sym_chamfer chamfer --baseline cosine chamfer --output results.json

    # no training at all: the mean of the frame features
    python evaluation.py --dataset FIVR-5K --feature_path fivr.hdf5 --encoder mean --metric cosine

    # search in two stages: by video descriptors, then the first R by frame descriptors; several R draw the trade-off
    python evaluation.py --dataset FIVR-200K --feature_path fivr.hdf5 --model_path runs/tca --metric chamfer --rerank 500
    python evaluation.py --dataset FIVR-5K --feature_path fivr.hdf5 --model_path runs/tca --rerank 100 500 2000 --plot curve.png

    # descriptors kept, so that the next metric costs no encoding; a page of figures and curves; several processes
    torchrun --nproc_per_node 4 evaluation.py --dataset FIVR-200K --feature_path fivr.hdf5 --model_path runs/tca \\
        --metric cosine chamfer --cache descriptors --report report

    # a table {query: {video: similarity}} of any other system
    python evaluation.py --dataset FIVR-5K --similarities theirs.json

Annotations are looked for in datasets/annotations (or --annotation_dir, or the environment's TCA_ANNOTATIONS). Queries are held
in memory, the database passes through it: --memory bounds what a process takes, whatever the size of the set.
"""

import json
import math
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from datasets.evaluation_set import missing_note, read_similarities, videos_with_features
from datasets.registry import ANNOTATION_DIR, EVALUATION_SETS, load_evaluation_set
from distributed import check_device, default_device, init_distributed, run_main
from features.store import FeatureStore, warn_if_features_differ
from model import ENCODERS, load_encoder
from retrieval.comparator import load_comparator
from retrieval.compare import MEMORY, Comparison, check_feature_size, shortlist, two_stage
from retrieval.encode import VideoEncoder
from retrieval.report import (
    draw_trade_off,
    summarise,
    table_lines,
    trade_off,
    trade_off_lines,
    write_report,
)
from retrieval.similarity import FRAME_METRICS, METRICS, VIDEO_METRICS
from utils import InputError, Parser, atomic, check_ranges, provenance, write_json

TCA_ROWS = {"cosine": "TCA_c", "chamfer": "TCA_f", "sym_chamfer": "TCA_sym"}  # the paper's names
AMP = {None: None, "bfloat16": torch.bfloat16}


class Stage(NamedTuple):
    """What a row of two-stage search compared by frames: the R first of each query, a share `cost` of all pairs of frames.

    metric: the frame-level one, None where none is used (R = 0). recall: the share of a query's relevant videos among the R,
    mean over queries, which bounds what re-ranking can reach; None where all or none are compared.
    """

    metric: str | None
    R: int
    cost: float
    recall: float | None = None


class Result(NamedTuple):
    """A row's name, its table of similarities (Q, N), and how long it and the rows before it of this encoder took to compare
    once described, in seconds of this process; its stage where two-stage search was asked for, and its shortlist (Q, N)."""

    row: str
    table: np.ndarray
    seconds: float
    stage: Stage | None = None
    short: np.ndarray | None = None


# --- read ------------------------------------------------------------------------------------------------------------------


# --- compare -----------------------------------------------------------------------------------------------------------


def row_name(encoder, metric):
    """The name of a row: the paper's where it has one."""
    if encoder == "mean":
        return f"{'mean' if metric == 'cosine' else metric}, untrained"
    return TCA_ROWS.get(metric, f"tca, {metric}") if encoder == "tca" else f"{encoder}, {metric}"


def results(args, store, queries, database, dist):
    """Yield a Result for every encoder and measure asked for."""
    sides = store, queries, database
    if args.baseline or not args.model_path:
        rerank = [] if args.model_path else args.rerank
        yield from of_encoder(
            "mean", ENCODERS["mean"](store.feature_size), *sides, args.baseline, rerank, args, dist
        )
    for path in args.model_path:
        name, encoder, features = load_encoder(path, args.nhead)
        if dist.is_main:
            warn_if_features_differ(features, store, path)
        if args.encoder and args.encoder != name:
            raise InputError(
                f"{path!r} holds a {name!r} encoder, not {args.encoder!r}; leave --encoder out"
            )
        yield from of_encoder(name, encoder, *sides, args.metric, args.rerank, args, dist)


def of_encoder(name, encoder, store, queries, database, metrics, rerank, args, dist):
    """Yield a Result for each of the metrics of one encoder, from one encoding pass.

    With `rerank`, cosine ranks and the frame-level metrics (by default chamfer) re-rank its first R videos, for each R. One R
    compares no more than its shortlists by frames; several need the exhaustive table too, which then has its row.
    """
    check_feature_size(encoder, store)
    amp = AMP[args.amp]
    kept = (
        args.cache if next(encoder.parameters(), None) is not None else None
    )  # features themselves need no cache
    frame = [metric for metric in metrics if metric in FRAME_METRICS] or ["chamfer"] * bool(rerank)
    video = list(
        dict.fromkeys(
            [*["cosine"] * bool(rerank), *(metric for metric in metrics if metric in VIDEO_METRICS)]
        )
    )
    comparison = Comparison(
        VideoEncoder(encoder, store, args.padding_size, args.device, amp), queries, database, [*video, *frame], dist,
        args.memory, kept, use_faiss=bool(rerank), progress=True, comparator=args.comparator, dtype=amp or torch.float32,
    )  # fmt: skip
    whole = [*video, *(frame if len(rerank) != 1 else [])]
    found = comparison.tables(whole)
    for metric in [metric for metric in dict.fromkeys([*metrics, *whole]) if metric in whole]:
        stage = None
        if rerank and (metric == "cosine" or metric in frame):
            stage = Stage(metric, len(database), 1.0) if metric in frame else Stage(None, 0, 0.0)
        yield Result(row_name(name, metric), found[metric], comparison.seconds, stage)
    for R in rerank:
        short = shortlist(found["cosine"], R)
        second = found if len(rerank) > 1 else comparison.tables(frame, short)
        for metric in frame:
            row = f"{row_name(name, 'cosine')}, first {R} by {row_name(name, metric)}"
            stage = Stage(metric, R, comparison.cost(short))
            yield Result(
                row,
                two_stage(found["cosine"], second[metric], short),
                comparison.seconds,
                stage,
                short,
            )


# --- score and print ---------------------------------------------------------------------------------------------------


# --- the command -------------------------------------------------------------------------------------------------------


def parse(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument_group("what is scored").add_argument
    add(
        "-d",
        "--dataset",
        required=True,
        choices=EVALUATION_SETS,
        metavar="SET",
        help=", ".join(EVALUATION_SETS),
    )
    add("-fp", "--feature_path", "--features", help="HDF5 file with the features of the set's videos: ours, or one dataset a"
        " video as other groups have them, region features (T, R, C) too")  # fmt: skip
    add("-mp", "--model_path", nargs="+", default=[], help="a run's folder, a model file, or a released state dict; several"
        " (the seeds of one setting) give mean ± spread")  # fmt: skip
    add(
        "--encoder",
        choices=ENCODERS,
        help="check that the model is of this kind; `mean` alone needs no model",
    )
    add("-m", "--metric", nargs="+", choices=METRICS, metavar="METRIC", help=f"one or more of {', '.join(METRICS)} (default"
        " cosine, which the paper calls TCA_c; chamfer is TCA_f, far slower and better)")  # fmt: skip
    add(
        "--baseline",
        nargs="+",
        choices=METRICS,
        default=[],
        metavar="METRIC",
        help="score the untrained features by these too",
    )
    add("--similarities", metavar="FILE", help="score this JSON table {query: {video: similarity}} of any system; no model or"
        " features are needed")  # fmt: skip
    add(
        "--annotation_dir",
        default=ANNOTATION_DIR,
        help="folder of the annotation files (default %(default)s)",
    )
    add(
        "--comparator",
        metavar="FILE",
        help="weights of ViSiL's video comparator, for --metric comparator",
    )
    add("--rerank", nargs="+", type=int, default=[], metavar="R", help="rank by video descriptors, re-rank the first R by the"
        " frame-level --metric (default chamfer); several R give the trade-off against the exhaustive measure")  # fmt: skip
    add("-ps", "--padding_size", type=int, default=300, help="frames of a video that count, from its middle; 0 takes all"
        " (default 300, the paper's)")  # fmt: skip

    add = parser.add_argument_group("how").add_argument
    add("--memory", type=float, default=MEMORY, metavar="GIB", help="what a process may hold; lower it on a small machine"
        " (default %(default)s)")  # fmt: skip
    add("--cache", metavar="DIR", help="keep descriptors here, and use those of the same weights and features; costs 4 bytes a"
        " value of every frame; a folder that all processes see")  # fmt: skip
    add("--amp", choices=[name for name in AMP if name], help="encode and compare in bfloat16: faster where the processor has"
        " it; figures change in the third or fourth digit (default: float32)")  # fmt: skip
    add("--device", default=default_device(), help="cpu, cuda, cuda:1, ... (default %(default)s)")
    add(
        "-pc",
        "--pca_components",
        type=int,
        help="width the features must have (default: whatever the file has)",
    )
    add(
        "--nhead",
        type=int,
        default=8,
        help="attention heads of a bare state dict, which does not tell (default 8)",
    )
    for short, name in (("-nc", "num_clusters"), ("-nl", "num_layers"), ("-od", "output_dim")):
        add(
            short,
            f"--{name}",
            type=int,
            help="read from the model file; accepted for the released command's sake",
        )

    add = parser.add_argument_group("what is written").add_argument
    add(
        "--output",
        metavar="FILE",
        help="figures, command, revision, versions and counts of what was missing, as JSON",
    )
    add(
        "--report",
        metavar="DIR",
        help="a page with tables, curves, and the best and worst queries: DIR/index.html",
    )
    add("--plot", metavar="FILE.png", help="the trade-off of several --rerank as a picture")
    add(
        "--save_similarities",
        metavar="FILE",
        help="{query: {video: similarity}} of the one row, as JSON",
    )
    args = parser.parse_args(argv)
    check(args)
    return args


def check(args):
    """Raise InputError where flags do not fit together; settle the defaults that depend on others."""
    check_ranges(
        args, {"padding_size": (0, math.inf), "nhead": (1, math.inf), "memory": (0.1, math.inf)}
    )
    if any(R < 1 for R in args.rerank):
        raise InputError(f"--rerank {min(args.rerank)} is out of range; it must be 1 or more")
    for path in (args.output, args.save_similarities, args.plot):
        if path and Path(path).is_dir():
            raise InputError(f"{path!r} is a folder; name a file to write")
    for path in (args.report, args.cache):
        if path and Path(path).is_file():
            raise InputError(f"{path!r} is a file; name a folder")
    args.rerank, args.device = sorted(set(args.rerank)), check_device(args.device)
    if args.plot and len(args.rerank) < 2:
        raise InputError("--plot draws the trade-off of several --rerank values; give two or more")
    if args.similarities:
        idle = (
            "feature_path",
            "model_path",
            "encoder",
            "metric",
            "baseline",
            "rerank",
            "cache",
            "comparator",
            "amp",
        )
        given = [flag for flag in (*idle, "save_similarities") if getattr(args, flag)]
        if given:
            raise InputError(
                f"--similarities scores a finished table; leave out --{', --'.join(given)}"
            )
        return
    if not args.feature_path:
        raise InputError(
            "--feature_path is missing; give the set's features, or --similarities FILE"
        )
    args.metric = list(dict.fromkeys(args.metric or ([] if args.rerank else ["cosine"])))
    args.baseline = list(dict.fromkeys(args.baseline))
    if not args.model_path and args.encoder != "mean":
        raise InputError(
            "--model_path is missing; give a trained model, or --encoder mean for the untrained features"
        )
    if not args.model_path:  # the untrained features are all there is to score
        args.metric, args.baseline = [], list(dict.fromkeys([*args.metric, *args.baseline]))
    if args.save_similarities and (
        args.rerank or len(args.model_path) * len(args.metric) + len(args.baseline) > 1
    ):
        raise InputError(
            "--save_similarities writes one table; give one model and one --metric with it, and no --rerank"
        )
    if "comparator" in (*args.metric, *args.baseline) and not args.comparator:
        raise InputError("--metric comparator needs its weights; give --comparator FILE")


def main():
    args = parse()
    dist = init_distributed()
    args.device = dist.local_device(args.device)
    given = [
        f"--{name}"
        for name in ("num_clusters", "num_layers", "output_dim")
        if getattr(args, name) is not None
    ]
    if given and dist.is_main:
        print(
            f"note: {', '.join(given)} changes nothing: the model file says what it holds",
            file=sys.stderr,
        )
    if args.similarities:
        return score_file(args) if dist.is_main else 0
    with dist.exit_together_on_error():
        args.comparator = args.comparator and load_comparator(args.comparator)
        store = FeatureStore(args.feature_path, args.pca_components)
        chosen = load_evaluation_set(args.dataset, args.annotation_dir, store)
        queries, database = videos_with_features(chosen, store)
    if dist.is_main:
        print(f"{heading(args.dataset, chosen, store)}; {store.feature_size} channels")
    summaries, stages, seconds = {}, {}, {}
    for row, table, spent, stage, short in results(args, store, queries, database, dist):
        with dist.exit_together_on_error():
            if dist.is_main:
                seconds.setdefault(row, []).append(round(spent, 6))
                summary = summarise(chosen, chosen.rankings(queries, database, table))
                summaries.setdefault(row, []).append(summary)
                if stage:
                    recall = None if short is None else summary.recall(queries, database, short)
                    stages.setdefault(row, []).append(stage._replace(recall=recall))
    if dist.is_main:
        features = {"path": str(store.path), "meta": store.meta}
        how = {
            "models": args.model_path,
            "features": features,
            "padding_size": args.padding_size,
            "amp": args.amp,
        }
        how |= {"processes": dist.world_size, "compare_seconds": seconds}
        write(args, chosen, chosen.coverage(store), summaries, stages, how)
        if args.save_similarities:
            save_similarities(args.save_similarities, queries, database, table)


def score_file(args):
    """Score --similarities: a table of any system, of the ids it holds."""
    similarities = read_similarities(args.similarities)
    available = set(similarities).union(*similarities.values())
    chosen = load_evaluation_set(args.dataset, args.annotation_dir, available)
    print(heading(args.dataset, chosen, available))
    unknown = chosen.unknown(similarities, available - set(similarities))
    if any(unknown.values()):
        print(
            f"left aside: {unknown['queries']} queries and {unknown['videos']} videos that the set does not know"
        )
    summary = summarise(chosen, chosen.rankings_of(similarities))
    how = {"similarities": args.similarities, "unknown": unknown}
    write(
        args, chosen, chosen.coverage(available), {Path(args.similarities).stem: [summary]}, {}, how
    )


def heading(dataset, chosen, available):
    found = chosen.coverage(available)
    return (
        f"{dataset}: {found['queries']} queries ({found['queries_missing']} missing), {found['videos']} videos"
        f" ({found['videos_missing']} missing); {chosen.source}"
    )


def write(args, chosen, coverage, summaries, stages, how):
    """Print the tables; write what was asked for."""
    figures = {row: [summary.figures for summary in of] for row, of in summaries.items()}
    curves = trade_off(summaries, stages)
    print("\n".join(table_lines(figures)))
    for curve in curves.values():
        print("\n".join(["", *trade_off_lines(curve)]))
    notes = [missing_note(coverage)]
    skipped = {task: count for task, count in coverage["queries_without_relevant"].items() if count}
    if skipped:
        notes.append(f"queries skipped because no relevant video has features: {skipped}")
    notes = list(filter(None, notes))
    print("".join(f"{note}\n" for note in notes), end="")
    found = {
        "dataset": args.dataset,
        "annotation": chosen.source,
        "figures": figures,
        "coverage": coverage,
    }
    found |= how | ({"trade_off": curves} if curves else {}) | provenance()
    if args.output:
        write_json(args.output, found)
    if args.plot:
        draw_trade_off(args.plot, args.dataset, curves)
    if args.report:
        write_report(args.report, found, summaries, notes)


def save_similarities(path, queries, database, table):
    """The field's form {query: {video: similarity}}, written a query at a time."""
    with atomic(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for i, (query, row) in enumerate(zip(queries, table, strict=True)):
            line = json.dumps(
                dict(zip(database, (float(f"{value:.6g}") for value in row), strict=True))
            )
            file.write(("{" if not i else ",\n") + f"{json.dumps(query)}: {line}")
        file.write("}\n")


if __name__ == "__main__":
    run_main(main)
