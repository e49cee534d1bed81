"""Find copies and excerpts among your own videos: index, query, duplicates.

    python search.py index VIDEOS film.mp4 --index my.index    # add what is new, replace what has changed, pass over the rest
    python search.py query clip.mp4 --index my.index           # which videos show it, and where
    python search.py duplicates --index my.index               # groups of videos that share material
    python search.py info | verify | remove PATH... --index my.index

`query` and `duplicates` take --json (to the terminal's output) and --report page.html, a page to look at. Without more, the
model that is shipped in models/demo is used; --model_path, --pca, --backbone name others. An index remembers what made it and
refuses another. A video is in the index as soon as it is through: stop and start as you like.

Exit status: 0; 3 when some of the files could not be read (each is named), or `verify` found damage; 2 for a bad command.
As a library: see search_index.py.
"""

import json
import math
import os
import sys
from pathlib import Path

from tqdm import tqdm

import utils
from distributed import run_main
from model import ENCODERS
from utils import InputError
from videoindex.index import METRIC, METRICS, SHORTLIST, Match, VideoIndex
from videoindex.pipeline import DEFAULTS, WINDOW
from videoindex.report import clock, printable, span, write_duplicates, write_query

__all__ = ["Match", "VideoIndex"]


# --- the commands ----------------------------------------------------------------------------------------------------


def run_index(args):
    index = VideoIndex(
        args.index, args.index_type, args.device, args.workers, **model_options(args)
    )
    with tqdm(unit="video", disable=None) as bar:

        def done(path, reason):
            bar.update()
            if reason:
                bar.write(f"skipped {printable(path)}: {reason}", file=sys.stderr)

        changes = index.add(args.videos, args.prune, done)
    if index.store.settings["index_type"] != "Flat" and len(index):
        index.nearest.save()
    print(
        f"{args.index}: {len(index)} videos; {changes.added} added, {changes.replaced} replaced, {changes.same_content} of"
        f" known content, {changes.unchanged} unchanged, {changes.removed} removed, {len(changes.failed)} failed"
    )
    return 3 if changes.failed else 0


def run_query(args):
    index = VideoIndex.load(
        args.index, index_type=args.index_type, device=args.device, **model_options(args)
    )
    if args.threshold is None and "threshold" not in index.calibration:
        print(
            "note: this model is not calibrated; no --threshold is applied, judge the scores yourself",
            file=sys.stderr,
        )
    found = {}
    for described in tqdm(
        index.describe(args.clips), total=len(args.clips), unit="clip", disable=None, leave=False
    ):
        matches = []
        if not described.reason:
            matches = index.query(described, args.top, args.threshold, args.shortlist, args.metric)
        found[str(described.path)] = described, matches
    results = [found[str(Path(clip))] for clip in args.clips]
    for described, _ in results:
        if described.reason:
            print(f"skipped {printable(described.path)}: {described.reason}", file=sys.stderr)
    good = [(described, matches) for described, matches in results if not described.reason]
    if args.report:
        write_query(args.report, index, good)
    if args.json:
        print(json.dumps([query_json(*result) for result in results], indent=1))
    else:
        for result in good:
            print_matches(*result)
    return 3 if len(good) < len(results) else 0


def run_duplicates(args):
    index = VideoIndex.load(args.index, index_type=args.index_type)
    groups = index.duplicates(args.threshold, args.radius, args.metric)
    if args.report:
        write_duplicates(args.report, index, groups)
    if args.json:
        print(json.dumps([group_json(group) for group in groups], indent=1))
    else:
        print_groups(groups)


def run_info(args):
    index = VideoIndex.load(args.index)
    store, settings = index.store, index.store.settings
    totals = "SELECT count(*), coalesce(sum(frames), 0), coalesce(sum(seconds), 0) FROM contents"
    contents, frames, seconds = store.db.execute(totals).fetchone()
    facts = {
        "videos": len(index),
        "contents": contents,
        "hours": round(seconds / 3600, 2),
        "frames": frames,
        "bytes": store.size(),
        "holes": round(store.holes(), 3),
        "index_type": settings["index_type"],
        "model": settings["identity"],
        "threshold": index.calibration.get("threshold"),
        "versions": settings["versions"],
    }
    if args.json:
        print(json.dumps(facts, indent=1))
    else:
        for name, value in facts.items():
            value = (
                ", ".join(f"{k} {v}" for k, v in value.items())
                if isinstance(value, dict)
                else value
            )
            print(f"{name:12}{value}")


def run_verify(args):
    index = VideoIndex.load(args.index)
    damage = list(index.store.damage())
    for line in damage:
        print(line)
    for path, (size, mtime, _) in index.store.known().items():
        try:
            facts = os.stat(path)
            if (facts.st_size, facts.st_mtime_ns) != (size, mtime):
                print(f"note: {printable(path)} has changed since; index it again")
        except OSError as error:
            print(
                f"note: {printable(path)}: {error.strerror}; `index --prune` of its folder, or `remove`, forgets it"
            )
    print(
        f"{args.index}: {len(index)} videos, " + (f"{len(damage)} damaged" if damage else "sound")
    )
    return 3 if damage else 0


def run_remove(args):
    index = VideoIndex.load(args.index)
    count, strange = index.remove(args.paths)
    for path in strange:
        print(f"not in the index: {printable(path)}", file=sys.stderr)
    print(f"{args.index}: {count} removed, {len(index)} videos left")
    return 3 if strange else 0


# --- what is printed -------------------------------------------------------------------------------------------------


def print_matches(described, matches):
    print(f"{printable(described.path)} ({clock(described.seconds)})")
    if not matches:
        print("  nothing found")
    for match in matches:
        places = [f"{span(*place[:2])} = {span(*place[2:4])}" for place in match.stretches] or [
            "no single stretch"
        ]
        print(f"  {match.score:.3f}  {printable(match.path)} ({clock(match.seconds)})  {places[0]}")
        for place in places[1:]:
            print(f"{'':9}and {place}")
        for path in match.also:
            print(f"{'':9}same content: {printable(path)}")


def print_groups(groups):
    for i, group in enumerate(groups, 1):
        print(f"group {i}: {len(group.paths)} videos")
        for number, paths in group.files.items():
            for path in paths:
                print(
                    f"  {printable(path)} ({clock(group.seconds[number])})"
                    + (" same content" if len(paths) > 1 else "")
                )
        for link in group.links:
            a, b = (
                printable(os.path.basename(group.files[number][0])) for number in (link.a, link.b)
            )
            places = ", ".join(
                f"{span(*place[:2])} = {span(*place[2:4])}" for place in link.stretches
            )
            print(f"    {link.score:.3f}  {a} ~ {b}  {places}")
    print(f"{len(groups)} groups, {sum(len(group.paths) for group in groups)} videos")


def places_json(places):
    return [
        {
            "query": [round(place.query_start, 3), round(place.query_end, 3)],
            "video": [round(place.start, 3), round(place.end, 3)],
            "similarity": round(place.similarity, 4),
        }
        for place in places
    ]


def query_json(described, matches):
    rows = [
        {
            "score": round(match.score, 4),
            "path": match.path,
            "seconds": round(match.seconds, 3),
            "similarity": round(match.similarity, 4),
            "same_content": match.also,
            "stretches": places_json(match.stretches),
        }
        for match in matches
    ]
    result = {"clip": str(described.path), "seconds": round(described.seconds, 3), "matches": rows}
    return {**result, "error": described.reason} if described.reason else result


def group_json(group):
    videos = [
        {"paths": paths, "seconds": round(group.seconds[number], 3)}
        for number, paths in group.files.items()
    ]
    links = [
        {
            "a": group.files[link.a][0],
            "b": group.files[link.b][0],
            "score": round(link.score, 4),
            "stretches": places_json(link.stretches),
        }
        for link in group.links
    ]
    return {"videos": videos, "links": links}


# --- the command line ------------------------------------------------------------------------------------------------


def model_options(args):
    options = {name: getattr(args, name) for name in DEFAULTS}
    for name in ("model_path", "pca", "weights"):
        if options[name] and options[name] != "random":
            options[name] = os.path.abspath(options[name])
    return options


def add_model(command, making):
    """The options that choose a model; `making`: they decide, otherwise they must agree with the index."""
    group = command.add_argument_group(
        "the model", "default: the one in models/demo" if making else "default: the index's own"
    )
    add = group.add_argument
    add("--model_path", help="the encoder: a run's folder, its model.pth, or a released state dict")
    add("--encoder", choices=ENCODERS, help="`mean` needs no --model_path: the untrained features")
    add("--pca", help="the projection the encoder was trained with, a file of pca.py")
    add("--components", type=int, help="keep only the first so many components of --pca")
    add(
        "--backbone",
        help="efficientnet_lite0 (default), resnet50, or a torchvision classifier with --stages",
    )
    add(
        "--weights",
        help="the backbone's state dict instead of the usual weights, or `random` for tests",
    )
    add(
        "--stages",
        type=lambda names: names.split(","),
        help="modules of the backbone whose outputs to pool",
    )
    add("--pooling", help="imac (default), l3_imac, ...: see extract_features.py")
    add(
        "--fps",
        help="frames a second (default 1, the paper's; 2 places stretches more finely, at twice the work and bytes)",
    )
    add(
        "--window",
        type=int,
        help=f"frames encoded together, one video descriptor each (default {WINDOW})",
    )
    add(
        "--nhead",
        type=int,
        help="attention heads of a bare state dict, which does not tell (default 8)",
    )
    add("--device", help="cpu, cuda, ... (default: a GPU where there is one)")


def add_answer(command):
    add = command.add_argument
    add(
        "--threshold",
        type=float,
        help="least score to show (default: the calibrated one, 99 %% precision on the demo)",
    )
    add(
        "--metric",
        choices=METRICS,
        help=f"frame-level score (default: the calibrated one, else {METRIC})",
    )
    add("--json", action="store_true", help="print JSON instead of the table")
    add(
        "--report",
        metavar="FILE.html",
        help="also write a page to look at: thumbnails, timelines, similarity matrices",
    )


def parse(argv=None):
    parser = utils.Parser(__doc__)
    commands = parser.add_subparsers(
        required=True, metavar="index | query | duplicates | info | verify | remove"
    )

    def command(name, run, help):
        one = commands.add_parser(name, help=help, description=help)
        one.set_defaults(run=run)
        one.add_argument("--index", required=True, metavar="DIR", help="the index's folder")
        if name in ("index", "query", "duplicates"):
            one.add_argument("--index_type", help="FAISS factory string for the descriptors: Flat (exact, default), HNSW32,"
                " IVF4096,PQ64, ...; worth it from about a million videos on")  # fmt: skip
        return one

    one = command("index", run_index, "add new files, replace changed ones, pass over the rest")
    one.add_argument("videos", nargs="+", help="files and folders")
    one.add_argument(
        "--prune",
        action="store_true",
        help="forget files in these folders that are no longer there",
    )
    one.add_argument(
        "--workers",
        type=int,
        default=os.cpu_count(),
        help="decoder threads (default: the cores, %(default)s)",
    )
    add_model(one, making=True)
    one = command("query", run_query, "which videos show a clip, and where")
    one.add_argument("clips", nargs="+", help="video files; they need not be in the index")
    one.add_argument(
        "--top", type=int, default=10, help="most videos to show for a clip (default %(default)s)"
    )
    one.add_argument(
        "--shortlist",
        type=int,
        default=SHORTLIST,
        help="videos compared frame by frame (default %(default)s)",
    )
    add_answer(one)
    add_model(one, making=False)
    one = command("duplicates", run_duplicates, "groups of videos that share material")
    one.add_argument(
        "--radius",
        type=float,
        help="least similarity of video descriptors to go on (default: calibrated)",
    )
    add_answer(one)
    one = command("info", run_info, "what the index holds and what made it")
    one.add_argument("--json", action="store_true", help="print JSON")
    command(
        "verify",
        run_verify,
        "read everything and compare checksums; name files that are gone or have changed",
    )
    one = command("remove", run_remove, "forget files, or all files in a folder")
    one.add_argument("paths", nargs="+", help="files or folders; they need not exist any more")
    args = parser.parse_args(argv)
    for name in ("top", "shortlist", "workers", "window", "components", "nhead"):
        if getattr(args, name, None) is not None:
            utils.check_ranges(args, {name: (1, math.inf)})
    if getattr(args, "report", None) and os.path.isdir(args.report):
        raise InputError(f"--report {args.report!r} is a folder; name a file to write")
    return args


def main():
    sys.stdout.reconfigure(errors="backslashreplace")
    sys.stderr.reconfigure(errors="backslashreplace")
    args = parse()
    utils.tune_malloc()
    return args.run(args)


if __name__ == "__main__":
    run_main(main)
