"""Feature files from one layout to another, merged, split, described and checked; a video at a time, whatever their size.

    python pre-processing/convert.py to features.hdf5 FOLDER            # the packed store -> FOLDER/ID.npy
    python pre-processing/convert.py to FOLDER features.hdf5            # and back
    python pre-processing/convert.py to features.hdf5 theirs.hdf5 --layout datasets       # one dataset a video
    python pre-processing/convert.py merge features.*of4.hdf5 --output features.hdf5      # the shards of an extraction
    python pre-processing/convert.py split features.hdf5 --ids train.txt train.hdf5 --rest test.hdf5
    python pre-processing/convert.py info features.hdf5
    python pre-processing/convert.py verify features.hdf5 > bad.txt     # `id <tab> reason` of every bad video
    python pre-processing/convert.py to features.hdf5 good.hdf5 --without bad.txt

A source is an HDF5 file of either layout or a folder of .npy, (T, C) or (T, R, C) each (regions are averaged), found by
looking; ids may hold slashes, which are folders there. Values stay bit for bit as they are unless --dtype says otherwise,
and so does the checksum, which is of the content and not of the layout. What is written appears whole or not at all.
`verify` ends with status 3 when a video is bad.
"""

import json
import re
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import utils
from distributed import run_main
from features.layouts import LAYOUTS, open_source
from features.store import cast_rows, rows_checksum, store_checksum
from utils import InputError


def layout_of(path, layout=None):
    """The layout that is asked for, or what the name says: packed for .hdf5 and .h5, else a folder of .npy."""
    named = Path(path).suffix in (".hdf5", ".h5")
    if layout is not None and named == (layout == "npy"):
        raise InputError(
            f"{path!r} with --layout {layout}: a folder has no suffix, a file has .hdf5; correct one of them"
        )
    return layout or ("packed" if named else "npy")


def write(path, videos, layout=None, dtype=None):
    """Write `videos`, {id: its FeatureStore}, into `path` in a layout of LAYOUTS; all stores have one width and one meta."""
    stores = list({id(store): store for store in videos.values()}.values())
    layout = layout_of(path, layout)
    dtype = np.dtype(dtype or np.result_type(*(store.dtype for store in stores)))
    if any(Path(path).resolve() == store.path.resolve() for store in stores):
        raise InputError(f"{str(path)!r} is the input; name another output")
    for video in videos:
        if layout != "packed" and any(part in ("", ".", "..") for part in video.split("/")):
            raise InputError(
                f"id {video!r} cannot be the name of a dataset or file; only the packed layout holds it"
            )
    utils.remove_leftovers(path)
    with tqdm(total=len(videos), unit="video", disable=len(videos) < 1000) as bar:

        def read(video):
            bar.update()
            return cast_rows(video, videos[video].read_verified(video), dtype)

        lengths = {video: store.lengths[video] for video, store in videos.items()}
        LAYOUTS[layout](path, lengths, read, dtype, stores[0].feature_size, stores[0].meta)
    print(
        f"{path}: {len(videos)} videos, {sum(lengths.values())} frames of {stores[0].feature_size}, {dtype.name}, {layout}"
    )


# --- commands --------------------------------------------------------------------------------------------------------


def read_ids(path, known):
    """The ids of a list that are among `known`, with a notice of the others. One a line; what follows a tab is not read."""
    try:
        lines = utils.require_path(path, "list of ids").read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise InputError(
            f"list of ids {str(path)!r} is not text in UTF-8; give one id a line"
        ) from None
    ids = list(dict.fromkeys(line.partition("\t")[0].strip() for line in lines if line.strip()))
    if missing := [video for video in ids if video not in known]:
        some = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        print(
            f"notice: {len(missing)} of the {len(ids)} ids of {path} have no features: {some}",
            file=sys.stderr,
        )
    return [video for video in ids if video in known]


def run_to(options):
    store = open_source(options.source, skip_bad=options.without is not None)
    leave_out = set(read_ids(options.without, {*store, *store.bad})) if options.without else set()
    for video in store.bad.keys() - leave_out:
        store[video]  # raises, naming it
    videos = {video: store for video in store if video not in leave_out}
    if not videos:
        raise InputError(
            f"{options.without!r} names every video of {options.source!r}; nothing would be left"
        )
    write(options.target, videos, options.layout, options.dtype)


def check_shards(paths):
    """InputError when files named NAME.{i}of{n}.hdf5 are not all n of their kind."""
    shards = {}
    for path in paths:
        if match := re.search(r"^(.*)\.(\d+)of(\d+)\.[^.]+$", str(path)):
            shards.setdefault((match[1], int(match[3])), set()).add(match[2])
    for (name, n), numbers in shards.items():
        if len(numbers) != n:
            raise InputError(
                f"{name}: {len(numbers)} of {n} shards are given ({', '.join(sorted(numbers))}); give all, or say --some"
                " (a shard that had no video wrote no file)"
            )


def run_merge(options):
    if not options.some:
        check_shards(options.sources)
    videos, first = {}, None
    for path in options.sources:
        store = open_source(path)
        first = first or store
        kinds = [{"width": s.feature_size, "dtype": s.dtype.name, **s.meta} for s in (first, store)]
        for key in kinds[0] | kinds[1]:
            here, there = (kind.get(key) for kind in kinds)
            if here != there:
                raise InputError(
                    f"{str(first.path)!r} has {key} {here!r}, {path!r} has {there!r}; merge features of one kind"
                )
        for video in store:
            if video in videos:
                raise InputError(
                    f"video {video!r} is in {str(videos[video].path)!r} and in {path!r}; it can be in one only"
                )
            videos[video] = store
    write(options.output, videos)


def run_split(options):
    store = open_source(options.source)
    parts, taken = {}, set()
    for ids, target in options.ids:
        parts[target] = dict.fromkeys(read_ids(ids, store), store)
        taken |= parts[target].keys()
    if options.rest:
        parts[options.rest] = {video: store for video in store if video not in taken}
    if len(parts) < len(options.ids) + bool(options.rest):
        raise InputError("two parts have the same output; give each its own")
    for target, videos in parts.items():
        layout_of(target)
        if not videos:
            raise InputError(
                f"no video of {options.source!r} would be in {target!r}; do the ids of the lists agree with it?"
            )
    for target, videos in parts.items():
        write(target, videos)


def describe(store):
    """What `info` tells of a store, as a JSON-like dict."""
    files = (
        [file for file in store.path.rglob("*") if file.is_file()]
        if store.path.is_dir()
        else [store.path]
    )
    lengths = np.array(list(store.lengths.values()))
    marks = {"shortest": 0, "10 %": 10, "median": 50, "90 %": 90, "longest": 100}
    return {
        "path": str(store.path),
        "videos": len(store),
        "frames": int(lengths.sum()),
        "channels": int(store.feature_size),
        "dtype": store.dtype.name,
        "bytes": sum(file.stat().st_size for file in files),
        "lengths": {"mean": float(lengths.mean())}
        | {name: float(np.percentile(lengths, q)) for name, q in marks.items()},
        "meta": store.meta,
        "checksum": store.checksum,
    }


def run_info(options):
    facts = describe(open_source(options.source))
    if options.json:
        print(json.dumps(facts, indent=1))
        return
    facts["bytes"] = f"{facts['bytes']:,}"
    facts["lengths"] = ", ".join(f"{name} {value:.6g}" for name, value in facts["lengths"].items())
    facts["checksum"] = (
        facts["checksum"] or "none: made by another program, or by an older version of this one"
    )
    meta = facts.pop("meta")
    for name, value in [*facts.items(), *meta.items()]:
        print(f"{name:12} {value}")


def faults(store, video, stored):
    """What is wrong with a video's rows, as one line, and their checksum."""
    rows = np.ascontiguousarray(store.read(video))
    found, checksum = [], rows_checksum(rows)
    if count := np.count_nonzero(~np.isfinite(rows)):
        found.append(f"{count} of its {rows.size} values are NaN or infinite")
    if count := np.count_nonzero(~rows.any(1)):
        found.append(f"{count} of its {len(rows)} rows are zero")
    if stored and stored != checksum:
        found.append("its rows are not those that were written")
    return "; ".join(found), checksum


def run_verify(options):
    store = open_source(options.source, skip_bad=True)
    stored, sums, bad = store.checksums(), {}, dict(store.bad)
    for video in tqdm(store, unit="video", disable=len(store) < 1000):
        reason, sums[video] = faults(store, video, stored.get(video))
        if reason:
            bad[video] = reason
    for video, reason in sorted(bad.items()):
        print(f"{video}\t{reason}")
    whole = store.checksum in (
        None,
        store_checksum(store.dtype, store.feature_size, store.lengths, sums),
    )
    checksum = (
        "it has no checksum"
        if store.checksum is None
        else f"its checksum {store.checksum} "
        + (
            "agrees"
            if whole
            else "does not agree: these are not the videos, lengths and rows that were written"
        )
    )
    count = f"{len(bad)} of {len(store) + len(store.bad)} videos are bad"
    print(f"{store.path}: {count}; {checksum}", file=sys.stderr)
    return 0 if whole and not bad else 3


def main(argv=None):
    parser = utils.Parser(__doc__)
    commands = parser.add_subparsers(required=True, metavar="to | merge | split | info | verify")

    one = commands.add_parser("to", help="from one layout to another")
    one.add_argument("source", help="a feature file or a folder of .npy")
    one.add_argument("target", help="NAME.hdf5, or a new folder for .npy")
    one.add_argument(
        "--layout", choices=LAYOUTS, help="default: packed for NAME.hdf5, npy for any other name"
    )
    one.add_argument("--dtype", choices=("float16", "float32"), help="default: as it is")
    one.add_argument(
        "--without",
        metavar="LIST",
        help="leave out the ids of this list, one a line (that of `verify`, say)",
    )
    one.set_defaults(command=run_to)

    one = commands.add_parser(
        "merge", help="several files of one kind into one; an id twice is refused"
    )
    one.add_argument("sources", nargs="+", help="feature files; of shards NAME.{i}of{n}.hdf5 all n")
    one.add_argument("--output", required=True, help="NAME.hdf5, or a new folder for .npy")
    one.add_argument("--some", action="store_true", help="merge although shards are missing")
    one.set_defaults(command=run_merge)

    one = commands.add_parser("split", help="parts of a file, by lists of ids")
    one.add_argument("source", help="a feature file or a folder of .npy")
    one.add_argument(
        "--ids",
        nargs=2,
        action="append",
        required=True,
        metavar=("LIST", "OUTPUT"),
        help="a list of ids, one a line, and the file for them; may be given several times",
    )
    one.add_argument("--rest", metavar="OUTPUT", help="a file for the videos that are in no list")
    one.set_defaults(command=run_split)

    one = commands.add_parser(
        "info", help="videos, frames, lengths, type, size, how they were made"
    )
    one.add_argument("source", help="a feature file or a folder of .npy")
    one.add_argument("--json", action="store_true", help="as JSON")
    one.set_defaults(command=run_info)

    one = commands.add_parser(
        "verify",
        help="check every video: shape, NaN, zero rows, checksum; status 3 when one is bad",
    )
    one.add_argument("source", help="a feature file or a folder of .npy")
    one.set_defaults(command=run_verify)

    options = parser.parse_args(argv)
    return options.command(options)


if __name__ == "__main__":
    run_main(main)
