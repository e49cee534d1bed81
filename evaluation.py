"""Encode, compare, score: the mAP tables (TCA section 4), detection, and segments.

    # the encoder of a training run, by video descriptors (TCA_c)
    python evaluation.py --dataset FIVR-5K --feature_path fivr.hdf5 --model_path runs/tca

    # TCA_c, TCA_sym and TCA_f of three seeds, beside untrained rows of the same features
    python evaluation.py --dataset FIVR-5K --feature_path fivr.hdf5 \\
        --model_path runs/seed0 runs/seed1 runs/seed2 \\
        --metric cosine sym_chamfer chamfer --baseline cosine chamfer --output results.json

    # no training at all: the mean of the frame features
    python evaluation.py --dataset FIVR-5K --feature_path fivr.hdf5 --encoder mean

    # search in two stages: rank by video descriptors, re-rank the first R by frame descriptors
    python evaluation.py --dataset FIVR-200K --feature_path fivr.hdf5 --model_path runs/tca \\
        --metric chamfer --rerank 500
    # several R give the trade-off between time and mAP
    python evaluation.py --dataset FIVR-5K --feature_path fivr.hdf5 --model_path runs/tca \\
        --rerank 100 500 2000 --plot curve.png

    # several processes; descriptors stored, so the next metric needs no encoding; an HTML page
    torchrun --nproc_per_node 4 evaluation.py --dataset FIVR-200K --feature_path fivr.hdf5 \\
        --model_path runs/tca --metric cosine chamfer --cache descriptors --report report

    # a table {query: {video: similarity}} of any other system, which searched the whole set
    python evaluation.py --dataset FIVR-5K --similarities theirs.json
    # ... which searched only these ids
    python evaluation.py --dataset FIVR-5K --similarities theirs.json --searched ids.txt

    # sets of segments: find what pairs of videos share; or score the segments of any system
    python evaluation.py --dataset VCSL --feature_path vcsl.hdf5 --model_path runs/tca \\
        --metric tn dp align
    python evaluation.py --dataset VCSL --segments theirs.json

Annotations are read from datasets/annotations, from --annotation_dir, or from the folder that the
environment variable TCA_ANNOTATIONS names. The queries are kept in memory and the database is read
in batches: --memory bounds what a process takes, for a set of any size.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from datasets.evaluation_set import missing_note, videos_with_features
from datasets.registry import SEGMENT_SETS, load_evaluation_set, load_segment_set
from datasets.segments import read_segments
from datasets.similarity_files import read_similarities
from distributed import SHARE_TIMEOUT, init_distributed, run_main
from features.row_checks import name_some, zero_row_notes
from features.store import FeatureStore, warn_if_features_differ
from files import write_json
from model import ENCODERS, load_encoder
from retrieval.charts import draw_trade_off
from retrieval.comparator import load_comparator
from retrieval.compare import Comparison, shortlist, two_stage
from retrieval.encode import VideoEncoder, check_feature_size, require_frame_descriptors
from retrieval.evaluation_arguments import AMP, parse_args, validate_args
from retrieval.report import (
    RerankStage,
    RowScore,
    coverage_line,
    coverage_notes,
    coverage_of,
    save_similarities,
    summarise_tasks,
    table_lines,
    trade_off,
    trade_off_lines,
    unlisted_notes,
    write_report,
)
from retrieval.segments import (
    locate_segments,
    require_pairs,
    save_segments,
    segment_coverage_line,
)
from retrieval.settings import TrainedModel, label_settings, read_setting, repeated_seeds
from retrieval.similarity import FRAME_METRICS, VIDEO_METRICS
from untrusted import read_ids
from utils import InputError, describe_ids, id_hint, provenance

TCA_ROWS = {"cosine": "TCA_c", "chamfer": "TCA_f", "sym_chamfer": "TCA_sym"}  # the paper's names


def main(argv=None):
    dist = init_distributed(SHARE_TIMEOUT)
    with dist.exit_together_on_error():  # bad input on any process ends all of them
        args = parse_args(__doc__, argv)
        notes = validate_args(args, dist)
    if dist.is_main:
        for note in notes:
            print(f"note: {note}", file=sys.stderr)
    if args.similarities:  # nothing to encode or compare
        return score_similarity_file(args) if dist.is_main else 0
    if args.segments:
        return score_segment_file(args) if dist.is_main else 0
    if args.dataset in SEGMENT_SETS:
        return evaluate_segments(args, dist)

    with dist.exit_together_on_error():
        comparator = load_comparator(args.comparator) if args.comparator else None
        # A video without usable features is named, and counts as missing.
        store = FeatureStore(args.feature_path, args.pca_components, skip_bad=True)
        evaluation_set = load_evaluation_set(args.dataset, args.annotation_dir, store)
        queries, database = videos_with_features(evaluation_set, store)  # Q ids, N ids

    # Videos vanish from the web: say how much of the set is scored.
    coverage = coverage_of(evaluation_set, store, args.task)
    with dist.exit_together_on_error():
        models = check_models(args, store)  # all of them, before the first row is computed
    if dist.is_main:
        for note in [
            *skipped_notes(store),
            *id_notes(evaluation_set, store, coverage),
            *repeated_seeds(*models),
        ]:
            print(f"note: {note}", file=sys.stderr)
        line = coverage_line(args.dataset, evaluation_set, coverage)
        print(f"{line}; {store.feature_size} channels")

    results = {}  # {row: [RowScore, one for each model]}
    last_table = None  # similarities (Q, N) of the newest row
    for model in load_models(args, *models, store, dist):
        # Encode the queries. The database is encoded in batches by `compare`; with --cache, here.
        comparison = encode_queries(model, store, queries, database, comparator, args, dist)
        for row in compare(comparison, model):  # similarities (Q, N) of each metric
            with dist.exit_together_on_error():
                if dist.is_main:  # the others have encoded and compared their share
                    row_score = score(row, model, evaluation_set, queries, database, args.task)
                    results.setdefault(model.label_row(row.name), []).append(row_score)
            last_table = row.similarities
        del comparison  # frees its descriptors before those of the next model come

    zero_rows = dist.gather_to_main(store.videos_with_zero_rows())  # each read its share
    if dist.is_main:
        zero_rows = sorted(set().union(*zero_rows))
        run_info = {
            "models": args.model_path,
            "models_of_rows": models_of_rows(results),
            "features": {
                "path": str(store.path),
                "meta": store.meta,
                "skipped": store.bad,
                "with_zero_rows": zero_rows,
            },
            "padding_size": args.padding_size,
            "amp": args.amp,
            "processes": dist.world_size,
            "compare_seconds": compare_seconds(results),
        }
        notes = zero_row_notes(zero_rows, store.path)
        report(args, evaluation_set, coverage, results, run_info, notes)
        if args.save_similarities:
            # `validate_args` made sure that there was one row, so the last one is the only one.
            save_similarities(args.save_similarities, queries, database, last_table)
            if coverage["queries_missing"] or coverage["videos_missing"]:
                note = "has the ids with features only; to score it, name them by --searched"
                print(f"note: {args.save_similarities!r} {note}", file=sys.stderr)
    return 0


# --- the models ---------------------------------------------------------------------------------


class EvaluatedModel(NamedTuple):
    """An encoder, and how it is scored.

    video_metrics, frame_metrics: what is computed; with several --rerank values, both are
        computed for all pairs
    rerank: the sizes R of the shortlists; empty if there is one stage only
    rows: the metrics that have a row of their own, in the order in which they are printed
    path: of its file, None for the untrained features
    setting: what tells its setting from others of this encoder, "" if there is one setting
    """

    name: str
    encoder: torch.nn.Module
    video_metrics: list[str]
    frame_metrics: list[str]
    rerank: list[int]
    rows: list[str]
    path: str | None = None
    setting: str = ""

    def label_row(self, row):
        """The name of a row; models with the same name are seeds of one setting."""
        return f"{row} ({self.setting})" if self.setting else row


def check_models(args, store) -> tuple[list[TrainedModel], list[str]]:
    """Read every --model_path once. Returns the models, and a label for the setting of each.

    Raises:
        InputError: one of them cannot be read or evaluated, or is given twice
    """
    models = []
    for path in args.model_path:
        name, encoder, _ = load_encoder(path, args.nhead)
        if args.encoder and args.encoder != name:
            raise InputError(
                f"{path!r} holds a {name!r} encoder, not {args.encoder!r}; leave --encoder out"
            )
        if plan_model(name, encoder, store, args.metric, args.rerank).frame_metrics:
            require_frame_descriptors(encoder)
        models.append(TrainedModel(path, name, read_setting(path)))
    return models, label_settings(models)


def load_models(args, models, settings, store, dist) -> Iterator[EvaluatedModel]:
    """Yield the untrained features if they are scored, then each --model_path."""
    if args.baseline or not args.model_path:
        # The mean of the frame features: no weights, and frame descriptors are the features.
        mean = ENCODERS["mean"](store.feature_size)
        rerank = [] if args.model_path else args.rerank  # --rerank is for the models, if any
        yield plan_model("mean", mean, store, args.baseline, rerank)
    for (path, _, _), setting in zip(models, settings, strict=True):
        name, encoder, features = load_encoder(path, args.nhead)
        if dist.is_main:
            warn_if_features_differ(features, store, path)  # another backbone, pooling or PCA
        plan = plan_model(name, encoder, store, args.metric, args.rerank)
        yield plan._replace(path=path, setting=setting)


def plan_model(name, encoder, store, metrics, rerank) -> EvaluatedModel:
    """Which metrics to compute for an encoder, and which of them have rows."""
    check_feature_size(encoder, store)
    video = [metric for metric in metrics if metric in VIDEO_METRICS]
    frame = [metric for metric in metrics if metric in FRAME_METRICS]
    if rerank:
        video = list(dict.fromkeys(["cosine", *video]))  # cosine makes the shortlists
        frame = frame or ["chamfer"]
    # With one R only the shortlists are compared by frames. With several, all pairs are, and that
    # table is printed too.
    exhaustive_metrics = video if len(rerank) == 1 else [*video, *frame]
    rows = []  # in the order of --metric
    for metric in dict.fromkeys([*metrics, *exhaustive_metrics]):
        if metric in exhaustive_metrics:
            rows.append(metric)
    return EvaluatedModel(name, encoder, video, frame, rerank, rows)


# --- encode, compare, score ---------------------------------------------------------------------


def encode_queries(model, store, queries, database, comparator, args, dist) -> Comparison:
    """Encode the queries, which stay in memory, for a comparison with the database.

    The database is encoded later, in batches, by `compare`. With --cache, queries and database are
    encoded and stored here, unless their descriptors are stored already.

    A video has one descriptor (D,) at video level and T of them (T, D) at frame level. One pass
    of the encoder gives both.
    """
    amp = AMP[args.amp]  # a type to encode and multiply frames in, or None for float32
    has_weights = next(model.encoder.parameters(), None) is not None
    return Comparison(
        # Takes the middle frames of a longer video: the same frames on every run.
        VideoEncoder(model.encoder, store, args.padding_size, args.device, amp),
        queries,
        database,
        [*model.video_metrics, *model.frame_metrics],
        dist,
        memory=args.memory,  # GiB; the batches are made to fit
        cache=args.cache if has_weights else None,  # untrained features are stored already
        use_faiss=bool(model.rerank),  # the first stage is a nearest-neighbour search
        progress=True,
        comparator=comparator,
        dtype=amp or torch.float32,
    )


class TableRow(NamedTuple):
    """A line of the printed table.

    similarities: (Q, N)
    seconds: cumulative comparison time of this model on this process, encoding excluded
    stage: the row's point on the trade-off curve of two-stage search; None without --rerank
    in_shortlist: (Q, N) bool, the shortlists of two-stage search; None for an exhaustive row
    """

    name: str
    similarities: np.ndarray
    seconds: float
    stage: RerankStage | None = None
    in_shortlist: np.ndarray | None = None


def compare(comparison, model) -> Iterator[TableRow]:
    """Yield a row for each metric, then one for each R of two-stage search."""
    tables = comparison.tables(model.rows)  # {metric: (Q, N)}, from one pass over the database
    for metric in model.rows:
        stage = None
        if model.rerank and metric == "cosine":
            # No re-ranking: the first point of the trade-off curve.
            stage = RerankStage(metric=None, R=0, cost=0.0)
        elif model.rerank and metric in model.frame_metrics:
            # All pairs by frames: the last point.
            stage = RerankStage(metric, R=len(comparison.database), cost=1.0)
        yield TableRow(row_name(model.name, metric), tables[metric], comparison.seconds, stage)

    for R in model.rerank:
        in_shortlist = shortlist(tables["cosine"], R)  # (Q, N) bool, R true in each row
        if len(model.rerank) == 1:
            by_frames = comparison.tables(model.frame_metrics, in_shortlist)  # only those pairs
        else:
            by_frames = tables  # all pairs are compared already
        for metric in model.frame_metrics:
            first, second = row_name(model.name, "cosine"), row_name(model.name, metric)
            yield TableRow(
                f"{first}, first {R} by {second}",
                # Ranks, in the place of similarities.
                two_stage(tables["cosine"], by_frames[metric], in_shortlist),
                comparison.seconds,
                # Cost: the share of all pairs of frames
                RerankStage(metric, R, comparison.cost(in_shortlist)),
                in_shortlist,
            )


def score(row, model, evaluation_set, queries, database, tasks) -> RowScore:
    """The metrics, curves and first ranks of a row; the recall of its shortlists."""

    def rank(evaluation_set):
        return evaluation_set.rankings(queries, database, row.similarities)  # query by query

    summary = summarise_tasks(evaluation_set, rank, tasks)
    stage = row.stage
    if row.in_shortlist is not None:
        # Re-ranking cannot find what is not in the shortlists.
        stage = stage._replace(recall=summary.recall(queries, database, row.in_shortlist))
    return RowScore(summary, row.seconds, stage, model.path, model.setting or model.name)


def row_name(encoder, metric):
    """The paper's name of a row, if it has one."""
    if encoder == "mean":
        return f"{'mean' if metric == 'cosine' else metric}, untrained"
    if encoder == "tca" and metric in TCA_ROWS:
        return TCA_ROWS[metric]
    return f"{encoder}, {metric}"


# --- sets of segments ---------------------------------------------------------------------------


def evaluate_segments(args, dist):
    """Find what the pairs of a set share, by each aligner of --metric, and score it."""
    with dist.exit_together_on_error():
        segment_set = load_segment_set(args.dataset, args.annotation_dir)
        store = FeatureStore(args.feature_path, args.pca_components, skip_bad=True)
        pairs = require_pairs(segment_set, store, args.feature_path)
        models = check_models(args, store)
    coverage = segment_set.coverage(store)
    if dist.is_main:
        for note in [*skipped_notes(store), *repeated_seeds(*models)]:
            print(f"note: {note}", file=sys.stderr)
        line = segment_coverage_line(args.dataset, segment_set, coverage)
        print(f"{line}; {store.feature_size} channels")

    metrics = {}  # {row: [{name: value}, one for each model]}
    for model in load_models(args, *models, store, dist):
        video_encoder = VideoEncoder(
            model.encoder, store, args.padding_size, args.device, AMP[args.amp]
        )
        aligners = args.metric if model.path else args.baseline
        located = locate_segments(video_encoder, pairs, aligners, dist, args.memory, dist.is_main)
        for aligner in aligners:  # {pair: segments}
            row = model.label_row(row_name(model.name, aligner))
            figures = segment_set.evaluate(located[aligner], store)
            metrics.setdefault(row, []).append(figures)
            if args.save_segments and dist.is_main:  # `validate_args`: there is one row
                save_segments(args.save_segments, located[aligner])
    zero_rows = dist.gather_to_main(store.videos_with_zero_rows())  # each read its share
    if dist.is_main:
        zero_rows = sorted(set().union(*zero_rows))
        run_info = {
            "models": args.model_path,
            "features": {
                "path": str(store.path),
                "meta": store.meta,
                "with_zero_rows": zero_rows,
            },
            "padding_size": args.padding_size,
            "amp": args.amp,
            "processes": dist.world_size,
        }
        notes = zero_row_notes(zero_rows, store.path)
        report_segments(args, segment_set, coverage, metrics, run_info, notes)
    return 0


def score_segment_file(args):
    """Score --segments: what any system found, in the whole set or in --searched."""
    segment_set = load_segment_set(args.dataset, args.annotation_dir)
    located, unknown = read_segments(args.segments, segment_set, args.min_score)
    searched = segment_set.videos
    if args.searched:
        searched = set(read_ids(args.searched, "--searched list"))
        require_pairs(segment_set, searched, args.searched)
        for video in (video for pair in located for video in pair if video not in searched):
            raise InputError(
                f"--searched {args.searched!r} does not name {video!r}, which is in"
                f" {args.segments!r}; name every video that was searched"
            )
    coverage = segment_set.coverage(searched)
    print(segment_coverage_line(args.dataset, segment_set, coverage))
    if unknown:
        print(f"ignored: {unknown} pairs that the set does not contain")
    metrics = {Path(args.segments).stem: [segment_set.evaluate(located, searched)]}
    run_info = {
        "segments": args.segments,
        "min_score": args.min_score,
        "searched": args.searched or "the whole set",
        "unknown": unknown,
    }
    report_segments(args, segment_set, coverage, metrics, run_info)
    return 0


def report_segments(args, segment_set, coverage, metrics, run_info, notes=()):
    """Print the table; write --output."""
    print("\n".join(table_lines(metrics)))
    for note in filter(None, [missing_note(coverage), *notes]):
        print(note)
    if args.output:
        write_json(args.output, make_record(args, segment_set, metrics, coverage, run_info))


# --- print and write ----------------------------------------------------------------------------


def score_similarity_file(args):
    """Score --similarities: what any system found, in the whole set or in --searched."""
    similarities = read_similarities(args.similarities)
    ids = set(similarities).union(*similarities.values())  # in the spelling of the system
    if args.searched:
        ids.update(read_ids(args.searched, "--searched list"))
    evaluation_set = load_evaluation_set(args.dataset, args.annotation_dir, ids)
    searched = searched_ids(evaluation_set, similarities, args.searched)
    coverage = coverage_of(evaluation_set, searched, args.task)
    print(coverage_line(args.dataset, evaluation_set, coverage))
    unknown = evaluation_set.count_unknown_ids(similarities, ids - set(similarities))
    known = {*evaluation_set.queries, *evaluation_set.database}
    if unknown["queries"] == len(similarities):
        raise InputError(
            f"similarity file {args.similarities!r} has no query of the {evaluation_set.source}:"
            f" {describe_ids(evaluation_set.queries, similarities)}"
        )
    if any(unknown.values()):
        hint = id_hint(known, ids)
        print(
            f"ignored: {unknown['queries']} queries and {unknown['videos']} videos that the set"
            f" does not contain{'; ' if hint else ''}{hint}"
        )

    def rank(evaluation_set):
        return evaluation_set.rankings_of(similarities, searched)

    summary = summarise_tasks(evaluation_set, rank, args.task)
    results = {Path(args.similarities).stem: [RowScore(summary)]}
    unlisted = evaluation_set.count_unlisted_ids(similarities, searched)
    run_info = {
        "similarities": args.similarities,
        "searched": args.searched or "the whole set",
        "unknown": unknown,
        "unlisted": unlisted,
    }
    report(args, evaluation_set, coverage, results, run_info, unlisted_notes(unlisted))
    return 0


def searched_ids(evaluation_set, similarities, path):
    """The ids that a system searched: all of the set, or those of the file --searched.

    The file names queries and videos. One that has similarities must be in it.
    """
    if not path:
        return {*evaluation_set.queries, *evaluation_set.database}
    searched = set(read_ids(path, "--searched list"))
    known = {*evaluation_set.queries, *evaluation_set.database}
    if not searched & known:
        raise InputError(
            f"--searched {path!r} has no id of the {evaluation_set.source}:"
            f" {describe_ids(known, searched)}"
        )
    for query in evaluation_set.queries:
        row = similarities.get(query, {})
        named = [query, *evaluation_set.database_ids(row)] if query in similarities else []
        for name in named:
            if name not in searched:
                raise InputError(
                    f"--searched {path!r} does not name {name!r}, which is in the row of query"
                    f" {query!r}; name every query and video that was searched"
                )
    return searched


def compare_seconds(results):
    """{row: [seconds, one for each model]}"""
    seconds = {}
    for name, per_model in results.items():
        seconds[name] = [round(result.seconds, 6) for result in per_model]
    return seconds


def id_notes(evaluation_set, store, coverage):
    """A line if many ids of the set are missing that the feature file has in another spelling."""
    if not missing_note(coverage):
        return []
    hint = id_hint([*evaluation_set.queries, *evaluation_set.database], [*store, *store.bad])
    return [f"ids of the set and of {str(store.path)!r}: {hint}"] if hint else []


def skipped_notes(store):
    """A line on the videos of the feature file that cannot be used."""
    if not store.bad:
        return []
    first = next(iter(store.bad))
    return [
        f"{str(store.path)!r}: {len(store.bad)} videos cannot be used and count as missing:"
        f" {name_some(store.bad)}; {first!r} {store.bad[first]}"
    ]


def models_of_rows(results):
    """{row: [path of each model]}, without the rows of the untrained features."""
    paths = {}
    for name, per_model in results.items():
        if per_model[0].model:
            paths[name] = [result.model for result in per_model]
    return paths


def report(args, evaluation_set, coverage, results, run_info, further_notes=()):
    """Print the tables; write the files that the flags name. `run_info`: further facts for JSON."""
    metrics = {}  # {row: [{name: value}, one for each model]}
    for name, per_model in results.items():
        metrics[name] = [result.summary.metrics for result in per_model]
    curves = trade_off(results)
    notes = [*coverage_notes(coverage), *further_notes]

    # Text, for the terminal.
    print("\n".join(table_lines(metrics)))
    for curve in curves.values():
        print("\n".join(["", *trade_off_lines(curve)]))
    for note in notes:
        print(note)

    # Files.
    drawn = {"trade_off": curves} if curves else {}
    record = make_record(args, evaluation_set, metrics, coverage, run_info | drawn)
    if args.output:
        write_json(args.output, record)
    if args.plot:
        draw_trade_off(args.plot, args.dataset, curves)
    if args.report:
        write_report(args.report, record, results, notes)


def make_record(args, scored_set, metrics, coverage, run_info):
    """The figures, and what they were measured on and by: without it they are worth little."""
    return {
        "dataset": args.dataset,
        "annotation": scored_set.source,
        "figures": metrics,
        "coverage": coverage,
        **run_info,
        **provenance(),
    }


if __name__ == "__main__":
    run_main(main)
