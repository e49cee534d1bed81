"""The command line of evaluation.py: its flags, their ranges, and which of them go together."""

import math
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import torch

from datasets.registry import ANNOTATION_DIR, EVALUATION_SETS, SEGMENT_SETS
from distributed import Distributed, default_device
from model import ENCODERS
from retrieval.alignment import ALIGNERS
from retrieval.compare import MEMORY
from retrieval.similarity import METRICS
from utils import InputError, Parser, check_ranges

TASKS = ("retrieval", "detection")
AMP = {None: None, "bfloat16": torch.bfloat16}
PADDING_SIZE = 300  # the released code's


def parse_args(manual: str, argv: Sequence[str] | None = None) -> Namespace:
    """manual: the script's docstring"""
    parser = Parser(manual)
    add_input_arguments(parser.add_argument_group("what is scored"))
    add_metric_arguments(parser.add_argument_group("by what"))
    add_run_arguments(parser.add_argument_group("how"))
    add_output_arguments(parser.add_argument_group("what is written"))
    return parser.parse_args(argv)


def add_input_arguments(group):
    add = group.add_argument
    sets = [*EVALUATION_SETS, *SEGMENT_SETS]
    add(
        *("-d", "--dataset"),
        required=True,
        choices=sets,
        metavar="SET",
        help=f"{', '.join(EVALUATION_SETS)}; sets of segments: {', '.join(SEGMENT_SETS)}",
    )
    add(
        *("-fp", "--feature_path", "--features"),
        help="HDF5 file with the features of the set's videos: ours, or with one dataset per video"
        " as other groups have them, region features (T, R, C) too",
    )
    add(
        *("-mp", "--model_path"),
        nargs="+",
        default=[],
        help="a run's folder, a model file, or a released state dict; seeds of one setting give"
        " mean ± sample standard deviation, other models have rows of their own",
    )
    add(
        "--encoder",
        choices=ENCODERS,
        help="check that the model is of this kind; only `mean` needs no model",
    )
    add(
        *("-ps", "--padding_size"),
        type=int,
        help="frames of a longer video that are used, from its middle; 0 takes all (default"
        f" {PADDING_SIZE}, the released code's; 0 for sets of segments)",
    )
    add(
        "--similarities",
        metavar="FILE",
        help="score this JSON table {query: {video: similarity}} of any system, without model and"
        " features. What a row does not list counts as missed, and so does a query without a row",
    )
    add(
        "--searched",
        metavar="FILE",
        help="the queries and videos that --similarities searched, an id a line; the others of the"
        " set are left out and counted as missing (default: the whole set)",
    )
    add(
        "--segments",
        metavar="FILE",
        help="for sets of segments: score those of any system, JSON in VCSL's form"
        " {QUERY-REFERENCE: [[query start, reference start, query end, reference end], ...]}",
    )
    add(
        "--min_score",
        type=float,
        metavar="SCORE",
        help="leave out --segments whose fifth number is not above this",
    )
    add(
        "--annotation_dir",
        default=ANNOTATION_DIR,
        help="folder of the annotation files (default %(default)s)",
    )


def add_metric_arguments(group):
    add = group.add_argument
    add(
        "--task",
        nargs="+",
        choices=TASKS,
        default=["retrieval"],
        help="retrieval: mAP; detection: micro-AP, one threshold for the pairs of all queries, and"
        " FIVR's hard split (names end in _hard) if its file is there; default retrieval",
    )
    add(
        *("-m", "--metric"),
        nargs="+",
        choices=[*METRICS, *(name for name in ALIGNERS if name not in METRICS)],
        metavar="METRIC",
        help=f"one or more of {', '.join(METRICS)} (default cosine, the paper's TCA_c; chamfer is"
        f" TCA_f, far slower and better); for sets of segments {', '.join(ALIGNERS)} (default"
        " align)",
    )
    add(
        "--baseline",
        nargs="+",
        choices=[*METRICS, *(name for name in ALIGNERS if name not in METRICS)],
        default=[],
        metavar="METRIC",
        help="score the untrained features too, by these",
    )
    add(
        "--comparator",
        metavar="FILE",
        help="weights of ViSiL's video comparator, for --metric comparator",
    )
    add(
        "--rerank",
        nargs="+",
        type=int,
        default=[],
        metavar="R",
        help="rank by video descriptors, re-rank the first R by the frame-level --metric (default"
        " chamfer); several R give the trade-off against the exhaustive measure",
    )


def add_run_arguments(group):
    add = group.add_argument
    add(
        "--memory",
        type=float,
        default=MEMORY,
        metavar="GIB",
        help="what a process may take of the machine's memory; on a GPU, what is free there bounds"
        " the rest (default %(default)s)",
    )
    add(
        "--cache",
        metavar="DIR",
        help="store descriptors here, and read those of the same weights and features; takes 4"
        " bytes per value of every frame; all processes must see the folder",
    )
    add(
        "--amp",
        choices=[name for name in AMP if name],
        help="encode and compare in bfloat16: faster if the processor has it; changes the third"
        " or fourth digit (default: float32)",
    )
    add("--device", default=default_device(), help="cpu, cuda, cuda:1, ... (default %(default)s)")
    add(
        "-pc",
        "--pca_components",
        type=int,
        help="size that the features must have (default: any)",
    )
    add(
        "--nhead",
        type=int,
        default=8,
        help="attention heads of a bare state dict, which does not store them (default 8)",
    )
    for short, name in (("-nc", "num_clusters"), ("-nl", "num_layers"), ("-od", "output_dim")):
        text = "accepted because the released command has it; read from the model file"
        add(short, f"--{name}", type=int, help=text)


def add_output_arguments(group):
    add = group.add_argument
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
    add(
        "--save_segments",
        metavar="FILE",
        help="the segments of the one row, as JSON in VCSL's form; for sets of segments",
    )


RANGES = {"padding_size": (0, math.inf), "nhead": (1, math.inf), "memory": (0.1, math.inf)}

# Flags that have no meaning beside --similarities or --segments, beside --segments, and for one of
# the two kinds of sets.
OF_MODELS = (
    *("feature_path", "model_path", "encoder", "metric", "baseline", "rerank", "cache"),
    *("comparator", "amp", "save_similarities", "save_segments"),
)
OF_RETRIEVAL = (
    *("similarities", "comparator", "rerank", "cache", "plot", "report", "save_similarities"),
)
OF_SEGMENTS = ("segments", "min_score", "save_segments")


def validate_args(args: Namespace, dist: Distributed) -> list[str]:
    """Check the arguments and fill in defaults. Returns notes on flags that change nothing."""
    has_segments = args.dataset in SEGMENT_SETS
    if args.padding_size is None:
        args.padding_size = 0 if has_segments else PADDING_SIZE
    check_ranges(args, RANGES)
    if args.min_score is not None:
        check_ranges(args, {"min_score": (-math.inf, math.inf)})  # NaN would leave out all
    if any(R < 1 for R in args.rerank):
        raise InputError(f"--rerank {min(args.rerank)} is out of range; it must be 1 or more")
    for path in (args.output, args.save_similarities, args.save_segments, args.plot):
        if path and Path(path).is_dir():
            raise InputError(f"{path!r} is a folder; name a file to write")
    for path in (args.report, args.cache):
        if path and Path(path).is_file():
            raise InputError(f"{path!r} is a file; name a folder")
    args.rerank = sorted(set(args.rerank))  # the trade-off goes from few to many
    if args.plot and len(args.rerank) < 2:
        raise InputError("--plot draws the trade-off of several --rerank values; give two or more")
    args.device = dist.device(args.device)
    # By default cuDNN rounds float32 to TF32 in LSTM, GRU and the comparator.
    torch.backends.cudnn.allow_tf32 = False

    validate_kind(args, has_segments)
    finished = "segments" if args.segments else "similarities"
    if getattr(args, finished):
        given = [flag for flag in OF_MODELS if getattr(args, flag)]
        if given:
            raise InputError(
                f"--{finished} scores a finished table; leave out --{', --'.join(given)}"
            )
    elif args.searched:
        raise InputError(
            "--searched belongs to --similarities or --segments; a feature file has its own ids"
        )
    elif args.min_score is not None:
        raise InputError("--min_score belongs to --segments")
    else:
        validate_model_args(args, has_segments)

    # The released command describes the encoder by these; a model file describes itself.
    released = ("num_clusters", "num_layers", "output_dim")
    unused = [f"--{name}" for name in released if getattr(args, name) is not None]
    if not unused:
        return []
    reason = "the model file has its own" if args.model_path else "no model is evaluated"
    return [f"{', '.join(unused)} changes nothing: {reason}"]


def validate_kind(args, has_segments):
    """Refuse the flags and metrics of the other kind of set."""
    refused = OF_RETRIEVAL if has_segments else OF_SEGMENTS
    given = [flag for flag in refused if getattr(args, flag) not in (None, [])]
    if has_segments and args.task != ["retrieval"]:
        given.append("task")
    if given:
        kind = "pairs of videos and their segments" if has_segments else "queries and a database"
        raise InputError(f"{args.dataset} has {kind}; leave out --{', --'.join(given)}")
    known = ALIGNERS if has_segments else METRICS
    unknown = [name for name in [*(args.metric or []), *args.baseline] if name not in known]
    if unknown:
        raise InputError(
            f"--metric {unknown[0]} does not apply to {args.dataset}; choose from"
            f" {', '.join(known)}"
        )


def validate_model_args(args, has_segments):
    """What `validate_args` checks where features are scored, and not a finished table."""
    if not args.feature_path:
        finished = "--segments" if has_segments else "--similarities"
        raise InputError(f"--feature_path is missing; give the set's features, or {finished} FILE")
    if args.metric is None and has_segments:
        args.metric = ["align"]
    elif args.metric is None:
        args.metric = [] if args.rerank else ["cosine"]
    args.metric = list(dict.fromkeys(args.metric))  # each once, in the order given
    args.baseline = list(dict.fromkeys(args.baseline))
    if not args.model_path:
        if args.encoder != "mean":
            raise InputError(
                "--model_path is missing; give a trained model, or --encoder mean for the"
                " untrained features"
            )
        # Only the untrained features are scored, by all the given metrics.
        args.baseline = list(dict.fromkeys([*args.metric, *args.baseline]))
        args.metric = []
    tables = len(args.model_path) * len(args.metric) + len(args.baseline)
    if args.save_segments and tables > 1:
        raise InputError("--save_segments writes one row; give one model and one --metric with it")
    if args.save_similarities and (args.rerank or tables > 1):
        raise InputError(
            "--save_similarities writes one table; give one model and one --metric with it, and"
            " no --rerank"
        )
    if "comparator" in (*args.metric, *args.baseline) and not args.comparator:
        raise InputError("--metric comparator needs its weights; give --comparator FILE")
