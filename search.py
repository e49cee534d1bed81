"""Find copies and excerpts among your own videos.

    python search.py index VIDEOS film.mp4 --index my.index    # add new files, replace changed ones
    python search.py query clip.mp4 --index my.index           # which videos show it, and where
    python search.py duplicates --index my.index               # groups that share material
    python search.py against DOWNLOADS --index my.index        # which of these are known already
    python search.py reject A.mp4 B.mp4 --index my.index       # no match: never shown again
    python search.py choices choices.json --index my.index     # what was chosen on a page
    python search.py calibrate --index my.index                # thresholds for your own videos
    python search.py info --index my.index
    python search.py verify --index my.index
    python search.py remove PATH... --index my.index

`query`, `duplicates` and `against` print a table, or --format json or csv. `query` and `duplicates`
take --report page.html (a page to look at); `duplicates` takes --plan plan.csv (what to keep).
EfficientNet-Lite0 describes the frames; --backbone, --pca and --model_path name others. An index
remembers its model and refuses another one. Every video is stored as soon as it is encoded, and
of a long film every ten minutes, so `index` can be stopped and started at any time. Nothing here
deletes or moves a video.

Exit status: 0; 2 for a bad command; 3 if some files could not be read (each is named), some PATH
was not in the index, or `verify` found damage.

As a library: `from videoindex.index import VideoIndex`.
"""

import os
import sys
from pathlib import Path

import utils
from entry import run_main
from utils import InputError
from videoindex import output
from videoindex.arguments import given, parse_args
from videoindex.text import printable

PARTIAL = 3  # exit status: the command was carried out, but not for all files


def main(argv=None):
    args = parse_args(__doc__, COMMANDS, argv)
    utils.tune_malloc()
    return args.run(args)


def __getattr__(name):
    """Programs that were written for revision 5aa4c1c have `from search import VideoIndex`."""
    if name == "VideoIndex":
        from videoindex.index import VideoIndex

        return VideoIndex
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def model_options(args):
    """The options of the Pipeline, files by their absolute path."""
    from videoindex.pipeline import DEFAULT_OPTIONS, names_file

    options = {name: getattr(args, name, None) for name in DEFAULT_OPTIONS}
    for name, value in options.items():
        if value and names_file(name, value):
            options[name] = os.path.abspath(value)
    return options


def print_skipped(path, reason):
    print(f"skipped {printable(path)}: {utils.one_line(reason)}", file=sys.stderr)


# --- adding, removing, checking -----------------------------------------------------------------


def run_index(args):
    from videoindex.index import VideoIndex
    from videoindex.progress import ProgressBar

    index = VideoIndex(
        args.index, args.index_type, args.device, args.workers, **model_options(args)
    )
    with ProgressBar() as progress:
        update = index.add(
            args.videos, args.prune, retry_failed=args.retry_failed, progress=progress
        )
    if index.store.settings["index_type"] != "Flat" and len(index):
        index.nearest.save()
    print(
        f"{args.index}: {len(index)} videos; {update.added} added, {update.replaced} replaced,"
        f" {update.moved} moved, {update.same_content} of known content,"
        f" {update.unchanged} unchanged, {update.removed} removed, {len(update.failed)} failed"
    )
    note_missing(index.store)
    return PARTIAL if update.failed else 0


def note_missing(store):
    """Say on stderr how many files of an index do not exist now."""
    missing = sum(not os.path.exists(path) for path in store.known_files())
    if missing:
        print(
            f"note: of the index's files, {missing} are not there now, perhaps on a drive that is"
            " not mounted; `verify` names them, `index --prune` and `remove` forget them",
            file=sys.stderr,
        )


def run_calibrate(args):
    from tqdm import tqdm

    from videoindex.calibration import calibrate_index, print_entry
    from videoindex.index import VideoIndex

    index = VideoIndex.load(args.index, **given(args, "device"))
    if args.undo:
        entry = index.pipeline.calibration
        print(f"{args.index}: the model's own calibration")
    else:
        with tqdm(unit="copy", disable=None) as bar:

            def on_video(name, reason):
                bar.update()
                if reason:
                    bar.write(f"left out {printable(name)}: {reason}", file=sys.stderr)

            entry = calibrate_index(index, args.count, on_video=on_video)
        print_entry(args.index, entry)
        if before := entry.pop("before", None):
            right, recall = (f"{part} of {of}" for part, of in (before["right"], before["recall"]))
            print(
                f"with the threshold until now, {before['threshold']:.3f}: right {right}, recall"
                f" {recall}; --undo goes back to the model's own"
            )
        for a, b in entry.pop("related"):
            print(f"  left out, as they seem to share film: {printable(a)} and {printable(b)}")
    with index.store.writing():
        index.store.update_settings(calibration=entry)


def run_info(args):
    from videoindex.pipeline import calibration_of
    from videoindex.store import IndexStore

    store = IndexStore(args.index)
    settings = store.settings
    contents, frames, seconds = store.totals()
    facts = {
        "videos": store.num_files(),
        "contents": contents,
        "hours": round(seconds / 3600, 2),
        "frames": frames,
        "bytes": store.disk_bytes(),
        "holes": round(store.hole_share(), 3),
        "rejected": len(settings["rejected"]),
        "index_type": settings["index_type"],
        "model": settings["identity"],
        "frame_rule": store.frame_rule,
        "threshold": calibration_of(settings).get("threshold"),
        "versions": settings["versions"],
    }
    output.print_facts(facts, args.format)


def run_verify(args):
    from videoindex.moves import Drives
    from videoindex.store import IndexStore

    store = IndexStore(args.index)
    damage = list(store.find_damage())
    for line in damage:
        print(line)
    drives = Drives(store.settings["mounts"])
    for path, known in store.known_files().items():
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
    print(f"{args.index}: {store.num_files()} videos, {verdict}")
    return PARTIAL if damage else 0


def run_remove(args):
    from videoindex.index import VideoIndex

    index = VideoIndex.load(args.index)
    count, unknown_paths = index.remove(args.paths)
    for path in unknown_paths:
        print(f"not in the index: {printable(path)}", file=sys.stderr)
    print(f"{args.index}: {count} removed, {len(index)} videos left")
    return PARTIAL if unknown_paths else 0


# --- searching ----------------------------------------------------------------------------------


def load_indexes(args):
    """The indexes of a query, and the options of `VideoIndex.query`."""
    from videoindex.index import SHORTLIST
    from videoindex.several import load_indexes

    options = given(args, "index_type", "device", "memory")
    indexes = load_indexes(args.index, **options, **model_options(args))
    if args.threshold is None and "threshold" not in indexes[0].calibration:
        print(
            "note: this model is not calibrated, so no threshold is applied; judge the scores"
            " yourself, or give --threshold",
            file=sys.stderr,
        )
    return indexes, {
        "top": args.top,
        "threshold": args.threshold,
        "shortlist": args.shortlist or SHORTLIST,
        **given(args, "skip_start", "min_match"),
    }


def run_query(args):
    from tqdm import tqdm

    from videoindex.several import query_indexes

    indexes, options = load_indexes(args)
    results = {}  # {clip: (EncodedVideo, [Match])}
    videos = indexes[0].encode_clips(args.paths)
    for video in tqdm(videos, total=len(args.paths), unit="clip", disable=None, leave=False):
        matches = [] if video.reason else query_indexes(indexes, video, **options)
        results[str(video.path)] = video, matches
    # Clips are finished in any order, and are shown in the order in which they were named.
    results = [results[str(Path(clip))] for clip in args.paths]
    for video, _ in results:
        if video.reason:
            print_skipped(video.path, video.reason)
    encoded = [(video, matches) for video, matches in results if not video.reason]
    if args.report and not encoded:
        print(f"{args.report} is not written, as no clip could be read", file=sys.stderr)
    elif args.report:
        from videoindex.report import write_query

        write_query(args.report, indexes[0], encoded)
    if args.format == "json":
        output.print_json([output.query_json(video, matches) for video, matches in results])
    elif args.format == "csv":
        rows = []
        for video, matches in encoded:
            rows += output.match_rows(video, matches)
        output.print_csv(rows, output.MATCH_COLUMNS)
    else:
        for video, matches in encoded:
            output.print_matches(video, matches)
    return PARTIAL if len(encoded) < len(results) else 0


def run_against(args):
    from tqdm import tqdm

    from videoindex.several import look_up

    indexes, options = load_indexes(args)
    looked_up = look_up(indexes, args.paths, **options)
    videos = list(tqdm(looked_up, unit="video", disable=None, leave=False))
    videos.sort(key=lambda video: video.path)
    readable = [video for video in videos if not video.reason]
    for video in videos:
        if video.reason:
            print_skipped(video.path, video.reason)
    if args.format == "json":
        output.print_json(list(map(output.known_json, videos)))
    elif args.format == "csv":
        output.print_csv(list(map(output.known_row, readable)), output.KNOWN_COLUMNS)
    else:
        output.print_known(readable)
    return PARTIAL if len(readable) < len(videos) else 0


def run_duplicates(args):
    from videoindex.index import VideoIndex

    index = VideoIndex.load(args.index, **given(args, "index_type", "memory"))
    note_missing(index.store)
    groups = index.duplicates(args.threshold, args.radius, **given(args, "skip_start", "min_match"))
    if args.report:
        from videoindex.report import write_duplicates

        write_duplicates(args.report, index, groups)
    if args.format == "json":
        output.print_json(list(map(output.group_json, groups)))
    elif args.format == "csv":
        rows = []
        for number, group in enumerate(groups, 1):
            rows += output.group_rows(number, group)
        output.print_csv(rows, output.GROUP_COLUMNS)
    else:
        output.print_groups(groups)
    if args.plan:
        from videoindex.plan import make_plan

        write_plan(
            args, make_plan(groups, args.keep, index.store.known_files(), index.is_same_film)
        )


# --- acting on it -------------------------------------------------------------------------------


def write_plan(args, rows):
    """Write a plan, and a script that carries it out, if asked for; say on stderr what was done."""
    from videoindex import plan

    plan.write_plan(args.plan, rows)
    print(f"{args.plan}: {plan.plan_summary(rows)}", file=sys.stderr)
    if args.script:
        folders = [os.path.realpath(os.path.dirname(row.path)) for row in rows]
        folder = os.path.commonpath(folders or ["/"])
        if folder != "/" and Path(args.into).resolve().is_relative_to(folder):
            print(
                f"note: {args.into!r} lies among the videos; if they are indexed again, so is what"
                " was moved",
                file=sys.stderr,
            )
        count = plan.write_script(args.script, rows, args.into)
        print(
            f"{args.script}: moves {count} files into {args.into!r}; look at it, then run it by"
            f" `sh {args.script}`",
            file=sys.stderr,
        )


def run_reject(args):
    from videoindex import rejects
    from videoindex.store import IndexStore

    store = IndexStore(args.index)
    if args.list:
        output.print_rejected(rejects.rejected_pairs(store), args.format)
        return
    change = rejects.undo_reject if args.undo else rejects.reject
    count = change(store, [tuple(args.paths)])
    if args.undo and not count:
        raise InputError("this pair was not rejected; see reject --list")
    total = len(store.settings["rejected"])
    print(f"{args.index}: {count} {'taken back' if args.undo else 'rejected'}, {total} in all")


def run_choices(args):
    from videoindex.choices import chosen_plan, read_choices
    from videoindex.rejects import reject
    from videoindex.store import IndexStore

    store, choices = IndexStore(args.index), read_choices(args.choices)
    known, problems = store.known_files(), []
    rejected = 0
    if choices.not_a_match:
        rejected = reject(store, choices.not_a_match, problems.append)
    for path in [*choices.keep, *choices.drop]:
        if path not in known:
            problems.append(f"not in the index: {printable(path)}")
    for problem in problems:
        print(f"skipped: {problem}", file=sys.stderr)
    print(f"{args.index}: {rejected} pairs rejected, {len(store.settings['rejected'])} in all")
    if args.plan:
        write_plan(args, chosen_plan(choices, known))
    return PARTIAL if problems else 0


COMMANDS = {
    "index": run_index,
    "query": run_query,
    "duplicates": run_duplicates,
    "against": run_against,
    "reject": run_reject,
    "choices": run_choices,
    "calibrate": run_calibrate,
    "info": run_info,
    "verify": run_verify,
    "remove": run_remove,
}


if __name__ == "__main__":
    run_main(main)
