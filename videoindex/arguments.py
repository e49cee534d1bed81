"""The arguments of `search.py`. Nothing heavy is imported here, so that --help is there at once."""

import argparse
import math
import os
from collections.abc import Callable
from typing import Any

import utils
from features.frame_rules import FRAME_RULES
from utils import InputError, available_cores
from videoindex.output import FORMATS
from videoindex.pipeline import BARS
from videoindex.plan import DEFAULT_RULES, RULES, parse_rules


def parse_args(
    description: str, commands: dict[str, Callable], argv: list[str] | None
) -> argparse.Namespace:
    """The arguments of a command, checked; `run` is the function of `commands` that carries it out.

    Raises:
        InputError: for bad arguments
    """
    parser = utils.Parser(description)
    parsers = parser.add_subparsers(required=True, metavar=" | ".join(commands))

    def add_command(name, help, several=False):
        command = parsers.add_parser(name, help=help, description=help)
        command.set_defaults(run=commands[name], command=name)
        if several:
            command.add_argument(
                *("--index", "--indexes"),
                required=True,
                nargs="+",
                action="extend",
                metavar="DIR",
                help="the index's folder; several indexes of one model answer as one",
            )
        else:
            command.add_argument("--index", required=True, metavar="DIR", help="the index's folder")
        return command

    add_index(
        add_command(
            "index", "add new and changed files, skip the rest; goes on where it was stopped"
        )
    )
    add_query(add_command("query", "which videos show a clip or a picture, and where", True))
    add_duplicates(add_command("duplicates", "groups of videos that share material"))
    add_against(add_command("against", "which new files are known already; nothing is added", True))
    add_reject(add_command("reject", "remember that two videos are no match"))
    add_choices(add_command("choices", "carry out what was chosen on a page of --report"))
    add_calibrate(
        add_command("calibrate", "choose thresholds by edited copies of the index's own videos")
    )
    add_format(add_command("info", "what the index holds and what made it"))
    add_command(
        "verify",
        "read everything and compare checksums; name files that have vanished or changed",
    )
    command = add_command("remove", "forget files, or all files in a folder")
    command.add_argument("paths", nargs="+", help="files or folders; they need not exist any more")

    args = parser.parse_args(argv)
    _split_indexes(args)
    _validate(args)
    return args


def _split_indexes(args):
    """`--index DIR clip.mp4` names one index and a clip: only the first need be a folder's name."""
    if not isinstance(args.index, list):
        return
    first, *others = args.index
    rest = [path for path in others if not os.path.exists(os.path.join(path, "index.db"))]
    args.index = [first, *(path for path in others if path not in rest)]
    args.paths += rest
    if not args.paths:
        raise InputError(f"`{args.command}` needs files; see search.py {args.command} --help")


# --- the commands -------------------------------------------------------------------------------


def add_index(command: argparse.ArgumentParser) -> None:
    command.add_argument("videos", nargs="+", help="files and folders")
    command.add_argument(
        "--prune",
        action="store_true",
        help="forget files of these folders that no longer exist; refused for a folder that is"
        " absent or without videos, as its drive may not be mounted",
    )
    command.add_argument(
        "--retry_failed", action="store_true", help="try again what failed in an earlier run"
    )
    command.add_argument(
        "--workers",
        type=int,
        default=available_cores(),
        help="decoder processes (default: the cores, %(default)s)",
    )
    _add_index_type(command)
    _add_model(command, "default: EfficientNet-Lite0 and the PCA in models/demo")


def add_query(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "paths", nargs="*", metavar="clip", help="videos or pictures; they need not be in the index"
    )
    _add_ranking(command, top=10)
    _add_results(command)
    _add_report(command)
    _add_model(command, "default: the index's own; others are refused")


def add_against(command: argparse.ArgumentParser) -> None:
    command.add_argument("paths", nargs="*", metavar="video", help="files and folders")
    _add_ranking(command, top=1)
    _add_results(command)
    _add_model(command, "default: the index's own; others are refused")


def add_duplicates(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--radius",
        type=float,
        help="compare two videos frame by frame if their descriptors are at least this similar"
        " (default: calibrated)",
    )
    _add_index_type(command)
    _add_results(command)
    _add_report(command)
    _add_plan(command)
    command.add_argument(
        "--keep",
        nargs="+",
        metavar="RULE",
        help=f"what to keep, the first rule first: {', '.join(RULES)}, folder=FOLDER (files in it"
        f" before others; default {' '.join(DEFAULT_RULES)})",
    )


def add_reject(command: argparse.ArgumentParser) -> None:
    command.add_argument("paths", nargs="*", metavar="FILE", help="two files that are no match")
    command.add_argument("--undo", action="store_true", help="let them be a match again")
    command.add_argument("--list", action="store_true", help="print the pairs that were rejected")
    add_format(command)


def add_choices(command: argparse.ArgumentParser) -> None:
    command.add_argument("choices", metavar="choices.json", help="saved on a page of --report")
    _add_plan(command)


def add_calibrate(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--count", type=int, default=20, help="videos of the sample (default %(default)s)"
    )
    command.add_argument("--undo", action="store_true", help="go back to the model's calibration")
    command.add_argument("--device", help="cpu, cuda, ... (default: a GPU if there is one)")


# --- options of several commands ----------------------------------------------------------------


def add_format(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--format",
        choices=FORMATS,
        default="table",
        help="table (default), json, or csv with a row a file; json and csv have the facts of every"
        " file: size, resolution, codec, bit rate, length, date",
    )
    command.add_argument(
        "--json",
        action="store_const",
        const="json",
        dest="format",
        help="the same as --format json",
    )


def _add_index_type(command):
    command.add_argument(
        "--index_type",
        help="FAISS factory string for the descriptors: Flat (exact, default), HNSW32,"
        " IVF4096,PQ64, ...; useful from about a million videos on",
    )


def _add_ranking(command, top):
    command.add_argument(
        "--top",
        type=int,
        default=top,
        help="the most videos to show for each (default %(default)s)",
    )
    command.add_argument(
        "--shortlist", type=int, help="videos compared frame by frame (default 500)"
    )
    _add_index_type(command)


def _add_results(command):
    command.add_argument(
        "--threshold", type=float, help="lowest score to show (default: the calibrated one)"
    )
    command.add_argument(
        "--skip_start",
        type=float,
        metavar="S",
        help="seconds at the start of every video that count for nothing, such as an intro",
    )
    command.add_argument(
        "--min_match", type=float, metavar="S", help="the least seconds of a stretch that matches"
    )
    command.add_argument(
        "--memory",
        type=float,
        help="GiB that the comparison of frames may take, with what the process holds then"
        " (default 4)",
    )
    add_format(command)


def _add_report(command):
    command.add_argument(
        "--report",
        metavar="FILE.html",
        help="also write a page to look at: both videos side by side, and what to keep",
    )


def _add_plan(command):
    group = command.add_argument_group("a plan", "of what to keep; nothing is deleted or moved")
    group.add_argument(
        "--plan", metavar="FILE.csv", help="write what to keep, to drop and to look at, with facts"
    )
    group.add_argument(
        "--script",
        metavar="FILE.sh",
        help="also write a script that moves what is to drop; run it by `sh FILE.sh`",
    )
    group.add_argument("--into", metavar="FOLDER", help="where the script moves files")


def _add_model(command, description):
    """The options of the Pipeline, see DEFAULT_OPTIONS."""
    group = command.add_argument_group("the model", description)
    add = group.add_argument
    add("--model_path", help="the encoder: a run's folder, its model.pth, or a released state dict")
    add(
        "--encoder",
        type=_encoder,
        help="`mean` needs no --model_path: the untrained features; tca, ...",
    )
    add("--pca", help="the projection the encoder was trained with, a file of pca.py")
    add("--components", type=int, help="use only the first components of --pca, this many")
    add(
        "--backbone",
        help="efficientnet_lite0 (default), sscd, resnet50, FILE.onnx, or a torchvision classifier"
        " with --stages",
    )
    add(
        "--weights",
        help="the backbone's state dict instead of the usual weights, or `random` for tests; for"
        " sscd also its TorchScript file, a program that is run: only one that you trust",
    )
    add(
        "--stages",
        type=lambda names: names.split(","),
        help="modules of the backbone, or outputs of FILE.onnx, that are pooled, separated by"
        " commas",
    )
    add(
        "--pooling",
        help="imac (default), l3_imac, ...: see extract_features.py; not for sscd, which gives"
        " vectors",
    )
    add(
        "--fps",
        help="frames a second (default 1, as in the paper; 2 locates matches more finely,"
        " at twice the work and bytes)",
    )
    add(
        "--frames",
        choices=FRAME_RULES,
        help="which ones: see extract_features.py (default on_screen; first_after in indexes of"
        " earlier versions)",
    )
    add(
        "--bars",
        choices=BARS,
        help="black bars at the sides of the picture (default cut; keep in indexes of earlier"
        " versions)",
    )
    add(
        "--window",
        type=int,
        help="frames encoded together, into one descriptor each, by which videos are shortlisted"
        " (default 10; 60 with --model_path)",
    )
    add(
        "--nhead",
        type=int,
        help="attention heads of a released state dict, which does not say (default 8)",
    )
    add("--device", help="cpu, cuda, ... (default: a GPU if there is one)")


# --- values -------------------------------------------------------------------------------------


def _encoder(name):
    from model import ENCODERS

    return _choose(name, ENCODERS)


def _choose(name, choices):
    if name not in choices:
        raise argparse.ArgumentTypeError(
            f"invalid choice: {name!r} (choose from {', '.join(map(repr, choices))})"
        )
    return name


def _validate(args):
    for name in ("top", "shortlist", "workers", "window", "components", "nhead"):
        if getattr(args, name, None) is not None:
            utils.check_ranges(args, {name: (1, math.inf)})
    for name, limits in {"count": (4, 10**6), "threshold": (-1e6, 1e6), "radius": (-2, 2)}.items():
        if getattr(args, name, None) is not None:
            utils.check_ranges(args, {name: limits})
    if getattr(args, "memory", None) is not None:
        utils.check_ranges(args, {"memory": (0.01, 10**6)})
    for name in ("skip_start", "min_match"):
        if getattr(args, name, None) is not None:
            utils.check_ranges(args, {name: (0, math.inf)})
    for name in ("report", "plan", "script"):
        path = getattr(args, name, None)
        if path and os.path.isdir(path):
            raise InputError(f"--{name} {path!r} is a folder; name a file to write")
    if getattr(args, "report", None) and isinstance(args.index, list) and len(args.index) > 1:
        raise InputError("--report shows one index; query them one at a time, or leave it out")
    if hasattr(args, "plan"):
        _validate_plan(args)
    if args.command == "reject" and len(args.paths) != (0 if args.list else 2):
        raise InputError("reject takes two files, or --list and none")


def _validate_plan(args):
    keep = getattr(args, "keep", None)
    for name, value in (("keep", keep), ("script", args.script)):
        if value and not args.plan:
            raise InputError(f"--{name} belongs to a plan; give --plan FILE.csv too")
    if bool(args.script) != bool(args.into):
        raise InputError("--script FILE.sh and --into FOLDER belong together; give both")
    args.keep = parse_rules(keep or DEFAULT_RULES)


def given(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Those of the arguments that were given: {name: value}."""
    values = {name: getattr(args, name, None) for name in names}
    return {name: value for name, value in values.items() if value is not None}
