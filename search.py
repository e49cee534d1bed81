"""Find copies and excerpts among your own videos.

    python search.py index VIDEOS film.mp4 --index my.index    # add new files, replace changed ones
    python search.py query clip.mp4 --index my.index           # which videos show it, and where
    python search.py duplicates --index my.index               # groups that share material
    python search.py info --index my.index
    python search.py verify --index my.index
    python search.py remove PATH... --index my.index

`query` and `duplicates` take --json (printed) and --report page.html (a page to look at). By
default the model in models/demo is used; --model_path, --pca and --backbone name others. An index
remembers its model and refuses another one. Every video is stored as soon as it is encoded, so
`index` can be stopped and started at any time.

Exit status: 0; 2 for a bad command; 3 if some files could not be read (each is named), some PATH
was not in the index, or `verify` found damage.

As a library: `from videoindex.index import VideoIndex`.
"""

import json
import math
import os
import sys
from pathlib import Path

from tqdm import tqdm

import utils
from distributed import run_main
from features.frame_rules import FRAME_RULES
from model import ENCODERS
from retrieval.compare import MEMORY
from utils import InputError, available_cores
from videoindex.index import METRIC, METRICS, SHORTLIST, VideoIndex
from videoindex.moves import Drives
from videoindex.pipeline import DEFAULT_OPTIONS, WINDOW, names_file
from videoindex.report import write_duplicates, write_query
from videoindex.text import format_segment, format_time, printable

PARTIAL = 3  # exit status: the command was carried out, but not for all files


def main(argv=None):
    args = parse_args(argv)
    utils.tune_malloc()
    return args.run(args)


# --- the commands -------------------------------------------------------------------------------


def run_index(args):
    index = VideoIndex(
        args.index, args.index_type, args.device, args.workers, **model_options(args)
    )
    with tqdm(unit="video", disable=None) as bar:

        def on_file(path, reason):
            bar.update()
            if reason:
                bar.write(f"skipped {printable(path)}: {utils.one_line(reason)}", file=sys.stderr)

        update = index.add(args.videos, args.prune, on_file, args.retry_failed)
    if index.store.settings["index_type"] != "Flat" and len(index):
        index.nearest.save()
    print(
        f"{args.index}: {len(index)} videos; {update.added} added, {update.replaced} replaced,"
        f" {update.moved} moved, {update.same_content} of known content,"
        f" {update.unchanged} unchanged, {update.removed} removed, {len(update.failed)} failed"
    )
    return PARTIAL if update.failed else 0


def run_query(args):
    index = VideoIndex.load(
        args.index,
        index_type=args.index_type,
        device=args.device,
        memory=args.memory,
        **model_options(args),
    )
    if args.threshold is None and "threshold" not in index.calibration:
        print(
            "note: this model is not calibrated, so no threshold is applied; judge the scores"
            " yourself, or give --threshold",
            file=sys.stderr,
        )
    results = {}  # {clip: (EncodedVideo, [Match])}
    videos = index.encode_clips(args.clips)
    for video in tqdm(videos, total=len(args.clips), unit="clip", disable=None, leave=False):
        matches = []
        if not video.reason:
            matches = index.query(video, args.top, args.threshold, args.shortlist, args.metric)
        results[str(video.path)] = video, matches
    # Clips are finished in any order, and are shown in the order in which they were named.
    results = [results[str(Path(clip))] for clip in args.clips]
    for video, _ in results:
        if video.reason:
            reason = utils.one_line(video.reason)
            print(f"skipped {printable(video.path)}: {reason}", file=sys.stderr)
    encoded = [(video, matches) for video, matches in results if not video.reason]
    if args.report:
        write_query(args.report, index, encoded)
    if args.json:
        print_json([query_json(video, matches) for video, matches in results])
    else:
        for video, matches in encoded:
            print_matches(video, matches)
    return PARTIAL if len(encoded) < len(results) else 0


def run_duplicates(args):
    index = VideoIndex.load(args.index, index_type=args.index_type, memory=args.memory)
    groups = index.duplicates(args.threshold, args.radius, args.metric)
    if args.report:
        write_duplicates(args.report, index, groups)
    if args.json:
        print_json([group_json(group) for group in groups])
    else:
        print_groups(groups)


def run_info(args):
    index = VideoIndex.load(args.index)
    store, settings = index.store, index.store.settings
    contents, frames, seconds = store.totals()
    facts = {
        "videos": len(index),
        "contents": contents,
        "hours": round(seconds / 3600, 2),
        "frames": frames,
        "bytes": store.disk_bytes(),
        "holes": round(store.hole_share(), 3),
        "index_type": settings["index_type"],
        "model": settings["identity"],
        "frame_rule": store.frame_rule,
        "threshold": index.calibration.get("threshold"),
        "versions": settings["versions"],
    }
    if args.json:
        print_json(facts)
        return
    for name, value in facts.items():
        if isinstance(value, dict):
            value = ", ".join(f"{part} {what}" for part, what in value.items())
        print(f"{name:12}{utils.one_line(str(value))}")


def run_verify(args):
    index = VideoIndex.load(args.index)
    damage = list(index.store.find_damage())
    for line in damage:
        print(line)
    drives = Drives(index.store.settings["mounts"])
    for path, known in index.store.known_files().items():
        try:
            facts = os.stat(path)
        except OSError as error:
            drive = drives.absent_drive(path)
            advice = "to forget it, use `remove` with it or its folder"
            if drive:
                advice = f"no drive is mounted at {printable(drive)}"
            print(f"note: {printable(path)}: {error.strerror}; {advice}")
            continue
        if not known.unchanged(facts.st_size, facts.st_mtime_ns):
            print(f"note: {printable(path)} has changed since; index it again")
    verdict = f"{len(damage)} damaged" if damage else "sound"
    print(f"{args.index}: {len(index)} videos, {verdict}")
    return PARTIAL if damage else 0


def run_remove(args):
    index = VideoIndex.load(args.index)
    count, unknown_paths = index.remove(args.paths)
    for path in unknown_paths:
        print(f"not in the index: {printable(path)}", file=sys.stderr)
    print(f"{args.index}: {count} removed, {len(index)} videos left")
    return PARTIAL if unknown_paths else 0


# --- what is printed ----------------------------------------------------------------------------


def print_matches(video, matches):
    print(f"{printable(video.path)} ({format_time(video.seconds)})")
    if not matches:
        print("  nothing found")
    indent = " " * 9
    for match in matches:
        segments = [format_segment(segment) for segment in match.segments]
        first, *others = segments or ["no single stretch"]
        length = format_time(match.seconds)
        missing = "  missing" if match.missing else ""
        print(f"  {match.score:.3f}  {printable(match.path)} ({length}){missing}  {first}")
        for segment in others:
            print(f"{indent}and {segment}")
        for path in match.same_content_paths:
            print(f"{indent}same content: {printable(path)}")


def print_groups(groups):
    for i, group in enumerate(groups, 1):
        print(f"group {i}: {len(group.paths)} videos")
        for number, paths in group.files.items():
            length = format_time(group.seconds[number])
            note = " same content" if len(paths) > 1 else ""
            for path in paths:
                print(f"  {printable(path)} ({length}){note}")
        for link in group.links:
            a = printable(os.path.basename(group.files[link.a][0]))
            b = printable(os.path.basename(group.files[link.b][0]))
            segments = ", ".join(map(format_segment, link.segments))
            print(f"    {link.score:.3f}  {a} ~ {b}  {segments}")
    total = sum(len(group.paths) for group in groups)
    print(f"{len(groups)} groups, {total} videos")


def print_json(value):
    print(json.dumps(value, indent=1))


def segments_json(segments):
    rows = []
    for segment in segments:
        row = {
            "query": [round(segment.query_start, 3), round(segment.query_end, 3)],
            "video": [round(segment.target_start, 3), round(segment.target_end, 3)],
            "similarity": round(segment.similarity, 4),
        }
        rows.append(row)
    return rows


def query_json(video, matches):
    rows = []
    for match in matches:
        row = {
            "score": round(match.score, 4),
            "path": match.path,
            "seconds": round(match.seconds, 3),
            "similarity": round(match.similarity, 4),
            "same_content": match.same_content_paths,
            "missing": match.missing,
            "stretches": segments_json(match.segments),
        }
        rows.append(row)
    result = {"clip": str(video.path), "seconds": round(video.seconds, 3), "matches": rows}
    if video.reason:
        result["error"] = video.reason
    return result


def group_json(group):
    videos, links = [], []
    for number, paths in group.files.items():
        videos.append({"paths": paths, "seconds": round(group.seconds[number], 3)})
    for link in group.links:
        row = {
            "a": group.files[link.a][0],
            "b": group.files[link.b][0],
            "score": round(link.score, 4),
            "stretches": segments_json(link.segments),
        }
        links.append(row)
    return {"videos": videos, "links": links}


# --- arguments ----------------------------------------------------------------------------------


def parse_args(argv=None):
    parser = utils.Parser(__doc__)
    commands = parser.add_subparsers(
        required=True, metavar="index | query | duplicates | info | verify | remove"
    )

    def add_command(name, run, help):
        command = commands.add_parser(name, help=help, description=help)
        command.set_defaults(run=run)
        command.add_argument("--index", required=True, metavar="DIR", help="the index's folder")
        return command

    command = add_command("index", run_index, "add new files, replace changed ones, skip the rest")
    add_index_arguments(command)
    command = add_command("query", run_query, "which videos show a clip, and where")
    add_query_arguments(command)
    command = add_command("duplicates", run_duplicates, "groups of videos that share material")
    add_duplicates_arguments(command)
    command = add_command("info", run_info, "what the index holds and what made it")
    command.add_argument("--json", action="store_true", help="print JSON")
    add_command(
        "verify",
        run_verify,
        "read everything and compare checksums; name files that have vanished or changed",
    )
    command = add_command("remove", run_remove, "forget files, or all files in a folder")
    command.add_argument("paths", nargs="+", help="files or folders; they need not exist any more")

    args = parser.parse_args(argv)
    validate_args(args)
    return args


def add_index_arguments(command):
    command.add_argument("videos", nargs="+", help="files and folders")
    command.add_argument(
        "--prune", action="store_true", help="forget files of these folders that no longer exist"
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
    add_index_type(command)
    add_model_options(command, "default: the model in models/demo")


def add_query_arguments(command):
    command.add_argument("clips", nargs="+", help="video files; they need not be in the index")
    command.add_argument(
        "--top",
        type=int,
        default=10,
        help="the most videos to show for a clip (default %(default)s)",
    )
    command.add_argument(
        "--shortlist",
        type=int,
        default=SHORTLIST,
        help="videos compared frame by frame (default %(default)s)",
    )
    add_index_type(command)
    add_result_options(command)
    add_model_options(command, "default: the index's own; others are refused")


def add_duplicates_arguments(command):
    command.add_argument(
        "--radius",
        type=float,
        help="compare two videos frame by frame if their descriptors are at least this similar"
        " (default: calibrated)",
    )
    add_index_type(command)
    add_result_options(command)


def add_index_type(command):
    command.add_argument(
        "--index_type",
        help="FAISS factory string for the descriptors: Flat (exact, default), HNSW32,"
        " IVF4096,PQ64, ...; useful from about a million videos on",
    )


def add_result_options(command):
    command.add_argument(
        "--threshold",
        type=float,
        help="lowest score to show (default: the calibrated one, 99 %% precision on the demo)",
    )
    command.add_argument(
        "--metric",
        choices=METRICS,
        help=f"frame-level score (default: the calibrated one, else {METRIC})",
    )
    command.add_argument(
        "--memory",
        type=float,
        default=MEMORY,
        help="GiB that the comparison of frames may take, with what the process holds then"
        " (default %(default)s)",
    )
    command.add_argument("--json", action="store_true", help="print JSON instead of the table")
    command.add_argument(
        "--report",
        metavar="FILE.html",
        help="also write a page to look at: both videos of a match play side by side; what to keep"
        " and to drop is ticked and saved as a file",
    )


def add_model_options(command, description):
    """The options of the Pipeline, see DEFAULT_OPTIONS."""
    group = command.add_argument_group("the model", description)
    add = group.add_argument
    add("--model_path", help="the encoder: a run's folder, its model.pth, or a released state dict")
    add("--encoder", choices=ENCODERS, help="`mean` needs no --model_path: the untrained features")
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
        "--window",
        type=int,
        help=f"frames encoded together, into one descriptor each (default {WINDOW})",
    )
    add(
        "--nhead",
        type=int,
        help="attention heads of a released state dict, which does not say (default 8)",
    )
    add("--device", help="cpu, cuda, ... (default: a GPU if there is one)")


def model_options(args):
    """The options of the Pipeline, files by their absolute path."""
    options = {name: getattr(args, name) for name in DEFAULT_OPTIONS}
    for name, value in options.items():
        if value and names_file(name, value):
            options[name] = os.path.abspath(value)
    return options


def validate_args(args):
    for name in ("top", "shortlist", "workers", "window", "components", "nhead"):
        if getattr(args, name, None) is not None:
            utils.check_ranges(args, {name: (1, math.inf)})
    report = getattr(args, "report", None)
    if report and os.path.isdir(report):
        raise InputError(f"--report {report!r} is a folder; name a file to write")


if __name__ == "__main__":
    run_main(main)
