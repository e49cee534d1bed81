"""Reading features: the packed store against one dataset a video.

    python benchmarks/store.py --output store.json                # 8,000 videos, 1024 channels, float16: 4 GB on disk
    python benchmarks/store.py --videos 500 --folder /tmp/store   # smaller, elsewhere

Both files hold the same made-up videos, of lengths drawn log-normal around a median of 90 s (5 to 1,200 s). Every video is
read once in random order, 300 frames from a random place as training does, or the whole of a shorter one, and copied. Two
comparisons:

    slices           the 300 frames alone, unchecked: h5py's dataset[a:b] against the packed store's memory map
    through the store    FeatureStore[video][a:b], checked for NaN, as training and evaluation read

Cold: the file's pages are dropped from the page cache before (posix_fadvise; how much then came from the disk is told).
Warm: the median of three passes after one that is not timed. One process, one thread.
"""

import gc
import os
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

import h5py
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import utils
from distributed import run_main
from features import layouts
from features.store import FeatureStore

FRAMES, SEED = 300, 0


def make(folder, videos, channels):
    """The two files, {layout: path}, and the videos' lengths {id: T}."""
    draw = utils.rng(SEED)
    lengths = np.exp(draw.normal(np.log(90), 0.8, videos)).clip(5, 1200).astype(int)
    lengths = {f"video{i:06}": int(T) for i, T in enumerate(lengths)}
    pool = draw.normal(size=(2000, channels)).astype(
        np.float16
    )  # videos are cut from it: values do not matter here
    paths = {layout: folder / f"{layout}.hdf5" for layout in ("datasets", "packed")}
    for layout, path in paths.items():
        layouts.LAYOUTS[layout](
            path, lengths, lambda video: pool[: lengths[video]], np.dtype("float16"), channels, {}
        )
    return paths, lengths


def h5py_slices(path):
    file = h5py.File(path, "r")
    return lambda video, a, b: file[video][a:b]


def store_slices(path):
    store = FeatureStore(path)
    return lambda video, a, b: np.array(store.read(video)[a:b])


def through_store(path):
    store = FeatureStore(path)
    return lambda video, a, b: np.array(store[video][a:b])


WAYS = {
    "slices": {"datasets": h5py_slices, "packed": store_slices},
    "through the store": {"datasets": through_store, "packed": through_store},
}


def drop_from_cache(path):
    """Let the kernel forget the file's pages (clean ones that no process maps)."""
    gc.collect()
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def one_pass(read, reads):
    start = time.perf_counter()
    for video, a, b in reads:
        read(video, a, b)
    return time.perf_counter() - start


def measure(way, path, reads):
    """Seconds to open and to read, cold and warm, and the bytes that came from the disk in the cold pass."""
    drop_from_cache(path)
    blocks = resource.getrusage(resource.RUSAGE_SELF).ru_inblock
    start = time.perf_counter()
    read = way(path)
    opened = time.perf_counter() - start
    cold = one_pass(read, reads)
    from_disk = 512 * (resource.getrusage(resource.RUSAGE_SELF).ru_inblock - blocks)
    one_pass(read, reads)
    warm = statistics.median(one_pass(read, reads) for _ in range(3))
    return {
        "open cold": opened,
        "read cold": cold,
        "read warm": warm,
        "bytes from disk, cold": from_disk,
    }


def report(seconds, sizes, reads, size):
    """Print the table; {comparison: ratio}."""
    print(
        f"{reads} reads, {size / 1e9:.2f} GB, of files of {sizes['datasets'] / 1e9:.2f} GB (seconds)"
    )
    print(f"{'':20}{'':>12}{'one a video':>14}{'packed':>10}{'ratio':>8}")
    ratios = {}
    for name, by_layout in seconds.items():
        for kind in ("open cold", "read cold", "read warm"):
            plain, packed = (by_layout[layout][kind] for layout in ("datasets", "packed"))
            ratios[f"{name}, {kind}"] = plain / packed
            print(f"{name:20}{kind:>12}{plain:14.3f}{packed:10.3f}{plain / packed:8.1f}")
        disk = [
            f"{layout} {found['bytes from disk, cold'] / 1e9:.2f}"
            for layout, found in layouts.items()
        ]
        print(f"{'':20}from disk in the cold pass, GB: {', '.join(disk)}")
    return ratios


def main(argv=None):
    parser = utils.Parser(__doc__)
    add = parser.add_argument
    add("--videos", type=int, default=8000, help="how many (default 8000: 2 GB a layout)")
    add("--channels", type=int, default=1024, help="default 1024")
    add(
        "--folder",
        type=Path,
        default=ROOT / "runs",
        help="where to put the files while it runs (default runs)",
    )
    add("--output", help="also as JSON, into this file")
    args = parser.parse_args(argv)
    utils.check_ranges(args, {"videos": (1, 10**6), "channels": (1, 10**5)})

    args.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="benchmark-store-", dir=args.folder) as folder:
        paths, lengths = make(Path(folder), args.videos, args.channels)
        draw, reads = utils.rng(SEED, 1), []
        for video in draw.permutation(list(lengths)):
            a = int(draw.integers(max(1, lengths[video] - FRAMES + 1)))
            reads.append((str(video), a, min(a + FRAMES, lengths[video])))
        seconds = {
            name: {layout: measure(way, paths[layout], reads) for layout, way in ways.items()}
            for name, ways in WAYS.items()
        }
        sizes = {layout: path.stat().st_size for layout, path in paths.items()}

    size = sum(b - a for _, a, b in reads) * args.channels * 2
    ratios = report(seconds, sizes, len(reads), size)
    if args.output:
        facts = {
            "videos": args.videos,
            "channels": args.channels,
            "bytes read": size,
            "file sizes": sizes,
        }
        utils.write_json(
            args.output, {**utils.provenance(), **facts, "seconds": seconds, "ratios": ratios}
        )


if __name__ == "__main__":
    run_main(main)
