"""Feature files from one layout to another, merged, split, described and checked.

    C=pre-processing/convert.py
    python $C to features.hdf5 FOLDER                           # the packed layout -> ID.npy
    python $C to FOLDER features.hdf5                           # and back
    python $C to features.hdf5 theirs.hdf5 --layout datasets    # one dataset per video
    python $C merge features.*of4.hdf5 --output features.hdf5   # the shards of an extraction
    python $C split features.hdf5 --ids train.txt train.hdf5 --rest test.hdf5
    python $C info features.hdf5
    python $C verify features.hdf5 > bad.txt                    # `id <tab> reason` of bad videos
    python $C to features.hdf5 good.hdf5 --without bad.txt

A source is an HDF5 file of either layout or a folder of .npy; which one is recognised. Videos are
(T, C), or (T, R, C), of which the regions are averaged. In a folder of .npy an id with slashes is
a path. Videos are read one at a time, for a file of any size.

Values stay the same to the bit unless --dtype changes their type. So does the checksum, which is
of the content, not of the layout. Outputs are written whole or not at all.

Exit status: 0; 3 if `verify` finds a bad video; 2 for bad input.
"""

import argparse
import json
import re
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from distributed import run_main
from features.frame_rules import EARLIER_RULE
from features.layouts import LAYOUTS, open_source
from features.row_checks import rows_checksum
from features.store import FeatureStore, cast_rows, store_checksum
from untrusted import read_text
from utils import InputError, Parser, id_hint, one_line, printable


def layout_of(path: str | Path, layout: str | None = None) -> str:
    """The given layout, or that of the name: packed for .hdf5 and .h5, else a folder of .npy."""
    is_file = Path(path).suffix in (".hdf5", ".h5")
    if layout is not None and is_file == (layout == "npy"):
        raise InputError(
            f"{path!r} with --layout {layout}: a folder has no suffix, a file has .hdf5; "
            "correct one of them"
        )
    return layout or ("packed" if is_file else "npy")


def write(
    path: str | Path,
    videos: Mapping[str, FeatureStore],
    layout: str | None = None,
    dtype: str | None = None,
) -> None:
    """Write `videos`, {id: its store}, into `path`; all stores have one width and one meta."""
    stores = list({id(store): store for store in videos.values()}.values())  # each one once
    layout = layout_of(path, layout)
    dtype = np.dtype(dtype or np.result_type(*(store.dtype for store in stores)))
    if any(Path(path).resolve() == store.path.resolve() for store in stores):
        raise InputError(f"{str(path)!r} is the input; name another output")
    for video in videos:
        if layout != "packed" and not {"", ".", ".."}.isdisjoint(video.split("/")):
            raise InputError(
                f"id {video!r} cannot be the name of a dataset or file; "
                "only the packed layout can store it"
            )
    lengths = {video: store.lengths[video] for video, store in videos.items()}
    feature_size, meta = stores[0].feature_size, stores[0].meta
    with tqdm(total=len(videos), unit="video", disable=len(videos) < 1000) as bar:

        def read(video):
            bar.update()
            store = videos[video]
            store.release_pages()  # of the videos before
            return cast_rows(video, store[video], dtype)

        LAYOUTS[layout](path, lengths, read, dtype, feature_size, meta)
    print(
        f"{path}: {len(videos)} videos, {sum(lengths.values())} frames of {feature_size}, "
        f"{dtype.name}, {layout}"
    )


# --- to, merge, split ----------------------------------------------------------------------------


def run_to(options: argparse.Namespace) -> None:
    store = open_source(options.source, skip_bad=options.without is not None)
    left_out = set()
    if options.without:
        left_out.update(read_ids(options.without, {*store, *store.bad}))
    for video in store.bad.keys() - left_out:
        store[video]  # raises, with the reason
    videos = {video: store for video in store if video not in left_out}
    if not videos:
        raise InputError(
            f"{options.without!r} names every video of {options.source!r}; nothing would be left"
        )
    write(options.target, videos, options.layout, options.dtype)


def read_ids(path: str, known: Collection[str]) -> list[str]:
    """The ids of a list that are `known`; a notice on stderr counts the others.

    The list has an id a line, as it is or as `printable` shows it. What follows a tab is ignored,
    so the output of `verify` is a list.
    """
    lines = read_text(path, "list of ids", "give one id a line").split("\n")
    escaped = {printable(video): video for video in known}
    ids = []
    for line in lines:
        if line.strip():
            video = line.partition("\t")[0].strip()
            ids.append(escaped.get(video, video))
    ids = list(dict.fromkeys(ids))
    missing = [video for video in ids if video not in known]
    if missing:
        examples = ", ".join(map(printable, missing[:3])) + (", ..." if len(missing) > 3 else "")
        print(
            f"notice: {len(missing)} of the {len(ids)} ids of {path} have no features: {examples}"
            + (f"; {hint}" if (hint := id_hint(ids, known)) else ""),
            file=sys.stderr,
        )
    return [video for video in ids if video in known]


def run_merge(options: argparse.Namespace) -> None:
    if not options.some:
        check_shards(options.sources)
    videos, first = {}, None
    for path in options.sources:
        store = open_source(path)
        first = first or store
        check_same_kind(first, store)
        for video in store:
            if video in videos:
                raise InputError(
                    f"video {video!r} is in {str(videos[video].path)!r} and in {path!r}; "
                    "it can be in one only"
                )
            videos[video] = store
    write(options.output, videos)


def check_shards(paths: Sequence[str]) -> None:
    """Raise InputError if of files NAME.{i}of{n}.hdf5 some of the n are missing."""
    shards = {}  # {(NAME, n): the i that are given}
    for path in paths:
        if match := re.search(r"^(.*)\.(\d+)of(\d+)\.[^.]+$", str(path)):
            shards.setdefault((match[1], int(match[3])), set()).add(match[2])
    for (name, n), given in shards.items():
        if len(given) != n:
            raise InputError(
                f"{name}: {len(given)} of {n} shards are given ({', '.join(sorted(given))}); "
                "give all, or say --some (a shard that had no video wrote no file)"
            )


def check_same_kind(first: FeatureStore, store: FeatureStore) -> None:
    """Raise InputError unless two stores agree in width, type and what made the features."""
    kinds = []
    for one in (first, store):
        kinds.append({"width": one.feature_size, "dtype": one.dtype.name, **one.meta})
    for key in kinds[0] | kinds[1]:
        default = EARLIER_RULE if key == "frames" else None
        here, there = (kind.get(key, default) for kind in kinds)
        if here != there:
            raise InputError(
                f"{str(first.path)!r} has {key} {here!r}, {str(store.path)!r} has {there!r}; "
                "merge features of one kind"
            )


def run_split(options: argparse.Namespace) -> None:
    store = open_source(options.source)
    parts = {}  # {output: its videos}
    for ids, target in options.ids:
        parts[target] = dict.fromkeys(read_ids(ids, store), store)
    if options.rest:
        taken = set().union(*parts.values())
        parts[options.rest] = {video: store for video in store if video not in taken}
    if len(parts) < len(options.ids) + bool(options.rest):
        raise InputError("two parts have the same output; give each its own")
    for target, videos in parts.items():  # all are checked before any is written
        layout_of(target)
        if not videos:
            raise InputError(
                f"no video of {options.source!r} would be in {target!r}; "
                "do the ids of the lists agree with it?"
            )
    for target, videos in parts.items():
        write(target, videos)


# --- info, verify --------------------------------------------------------------------------------


def describe(store: FeatureStore) -> dict[str, Any]:
    """What `info` prints about a store; JSON-like."""
    files = [store.path]
    if store.path.is_dir():
        files = [file for file in store.path.rglob("*") if file.is_file()]
    lengths = np.array(list(store.lengths.values()))
    summary = {"mean": float(lengths.mean())}
    percentiles = {"shortest": 0, "10 %": 10, "median": 50, "90 %": 90, "longest": 100}
    for name, q in percentiles.items():
        summary[name] = float(np.percentile(lengths, q))
    return {
        "path": str(store.path),
        "videos": len(store),
        "frames": int(lengths.sum()),
        "channels": int(store.feature_size),
        "dtype": store.dtype.name,
        "bytes": sum(file.stat().st_size for file in files),
        "lengths": summary,
        "meta": store.meta,
        "checksum": store.checksum,
    }


def run_info(options: argparse.Namespace) -> None:
    facts = describe(open_source(options.source))
    if options.json:
        print(json.dumps(facts, indent=1))
        return
    facts["bytes"] = f"{facts['bytes']:,}"
    facts["lengths"] = ", ".join(f"{name} {value:.6g}" for name, value in facts["lengths"].items())
    if not facts["checksum"]:
        facts["checksum"] = "none: made by another program, or by an older version of this one"
    meta = facts.pop("meta")
    for name, value in [*facts.items(), *meta.items()]:
        print(f"{one_line(str(name)):12} {one_line(str(value))}")


def check_rows(rows: np.ndarray, stored: str | None) -> tuple[str, str]:
    """(what is wrong with a video's rows, in one line; their checksum).

    stored: the checksum in the file, if it has one.
    """
    rows = np.ascontiguousarray(rows)
    faults, checksum = [], rows_checksum(rows)
    if count := np.count_nonzero(~np.isfinite(rows)):
        faults.append(f"{count} of its {rows.size} values are NaN or infinite")
    if count := np.count_nonzero(~rows.any(1)):
        faults.append(f"{count} of its {len(rows)} rows are zero")
    if stored and stored != checksum:
        faults.append("its rows are not those that were written")
    return "; ".join(faults), checksum


def run_verify(options: argparse.Namespace) -> int:
    store = open_source(options.source, skip_bad=True)
    stored, sums, bad = store.checksums(), {}, dict(store.bad)
    for video in tqdm(store, unit="video", disable=len(store) < 1000):
        reason, sums[video] = check_rows(store.read(video), stored.get(video))
        if reason:
            bad[video] = reason
    for video, reason in sorted(bad.items()):
        print(f"{printable(video)}\t{one_line(reason)}")  # what --without reads

    # The rows may all be good, and yet a video lost or renamed: the store's own checksum tells.
    checksum = store_checksum(store.dtype, store.feature_size, store.lengths, sums)
    whole = store.checksum in (None, checksum)
    if store.checksum is None:
        verdict = "it has no checksum"
    elif whole:
        verdict = f"its checksum {store.checksum} agrees"
    else:
        verdict = (
            f"its checksum {store.checksum} does not agree: "
            "these are not the videos, lengths and rows that were written"
        )
    count = f"{len(bad)} of {len(store) + len(store.bad)} videos are bad"
    print(f"{store.path}: {count}; {verdict}", file=sys.stderr)
    return 0 if whole and not bad else 3


# --- the script ----------------------------------------------------------------------------------


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__)
    commands = parser.add_subparsers(required=True, metavar="to | merge | split | info | verify")
    source = "a feature file or a folder of .npy"
    new = "NAME.hdf5, or a new folder for .npy"

    to = commands.add_parser("to", help="from one layout to another")
    to.set_defaults(command=run_to)
    to.add_argument("source", help=source)
    to.add_argument("target", help=new)
    layouts = "default: packed for NAME.hdf5, npy for any other name"
    to.add_argument("--layout", choices=LAYOUTS, help=layouts)
    to.add_argument("--dtype", choices=("float16", "float32"), help="default: that of the source")
    without = "leave out the ids of this list, an id a line, such as the output of `verify`"
    to.add_argument("--without", metavar="LIST", help=without)

    merge = commands.add_parser("merge", help="files of one kind into one; no id may occur twice")
    merge.set_defaults(command=run_merge)
    sources = "feature files; of shards NAME.{i}of{n}.hdf5 all n"
    merge.add_argument("sources", nargs="+", help=sources)
    merge.add_argument("--output", required=True, help=new)
    merge.add_argument("--some", action="store_true", help="merge although shards are missing")

    split = commands.add_parser("split", help="parts of a file, by lists of ids")
    split.set_defaults(command=run_split)
    split.add_argument("source", help=source)
    split.add_argument(
        "--ids",
        nargs=2,
        action="append",
        required=True,
        metavar=("LIST", "OUTPUT"),
        help="a list of ids, an id a line, and the file for them; may be given several times",
    )
    split.add_argument("--rest", metavar="OUTPUT", help="a file for videos that are in no list")

    info = commands.add_parser("info", help="videos, frames, lengths, type, size, how it was made")
    info.set_defaults(command=run_info)
    info.add_argument("source", help=source)
    info.add_argument("--json", action="store_true", help="as JSON")

    checks = "check every video: shape, NaN, zero rows, checksum; status 3 if one is bad"
    verify = commands.add_parser("verify", help=checks)
    verify.set_defaults(command=run_verify)
    verify.add_argument("source", help=source)
    return parser


def main(argv: Sequence[str] | None = None) -> int | None:
    options = make_parser().parse_args(argv)
    return options.command(options)


if __name__ == "__main__":
    run_main(main)
