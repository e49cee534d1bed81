"""Reading features: the packed layout against one dataset a video.

    python benchmarks/store.py --output store.json                # 8,000 videos: 4 GB on disk
    python benchmarks/store.py --videos 500 --folder /tmp/store   # smaller, elsewhere

Both files hold the same made-up videos, 1024 channels in float16, whose lengths are log-normal
around a median of 90 s (5 to 1,200 s). Every video is read once, in random order: 300 frames from
a random place, as training does, or all of a shorter one, copied. Two comparisons:

    slices               the 300 frames alone, unchecked: h5py's dataset[a:b] against the memory map
    through the store    FeatureStore[video][a:b], checked for NaN, as training and evaluation read

Cold: the file's pages are dropped from the page cache first (posix_fadvise); how many bytes then
came from the disk is printed. Warm: the median of three passes after an untimed one. One process,
one thread.
"""

import gc
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import h5py
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from distributed import run_main
from features.layouts import LAYOUTS
from features.store import FeatureStore
from files import write_json
from utils import Parser, check_ranges, provenance, seeded_rng

FRAMES, SEED = 300, 0

Reader = Callable[[str, int, int], np.ndarray]  # (video, a, b) -> its rows a:b


def make_stores(
    folder: Path, videos: int, feature_size: int
) -> tuple[dict[str, Path], dict[str, int]]:
    """Write the two files; returns {layout: path} and the lengths {id: T}."""
    rng = seeded_rng(SEED)
    seconds = np.exp(rng.normal(np.log(90), 0.8, videos)).clip(5, 1200).astype(int)
    lengths = {f"video{i:06}": int(T) for i, T in enumerate(seconds)}
    # All videos are cut from one pool of rows: their values do not matter here.
    pool = rng.normal(size=(2000, feature_size)).astype(np.float16)

    def read(video):
        return pool[: lengths[video]]

    paths = {}
    for layout in ("datasets", "packed"):
        paths[layout] = folder / f"{layout}.hdf5"
        LAYOUTS[layout](paths[layout], lengths, read, np.dtype("float16"), feature_size, {})
    return paths, lengths


# --- the readers ---------------------------------------------------------------------------------


def h5py_slices(path: Path) -> Reader:
    file = h5py.File(path, "r")
    return lambda video, a, b: file[video][a:b]


def store_slices(path: Path) -> Reader:
    store = FeatureStore(path)
    return lambda video, a, b: np.array(store.read(video)[a:b])


def through_store(path: Path) -> Reader:
    store = FeatureStore(path)
    return lambda video, a, b: np.array(store[video][a:b])


READERS = {
    "slices": {"datasets": h5py_slices, "packed": store_slices},
    "through the store": {"datasets": through_store, "packed": through_store},
}


# --- measuring -----------------------------------------------------------------------------------


def measure(open_reader: Callable[[Path], Reader], path: Path, reads: Sequence[tuple]) -> dict:
    """Seconds to open and to read, cold and warm; bytes that the cold pass took from the disk."""
    drop_from_cache(path)
    blocks = resource.getrusage(resource.RUSAGE_SELF).ru_inblock  # of 512 bytes
    start = time.perf_counter()
    read = open_reader(path)
    opened = time.perf_counter() - start
    cold = time_pass(read, reads)
    blocks = resource.getrusage(resource.RUSAGE_SELF).ru_inblock - blocks
    time_pass(read, reads)  # warms the cache
    return {
        "open cold": opened,
        "read cold": cold,
        "read warm": statistics.median(time_pass(read, reads) for _ in range(3)),
        "bytes from disk, cold": 512 * blocks,
    }


def drop_from_cache(path: Path) -> None:
    """Drop the file's pages from the page cache (the clean ones that no process maps)."""
    gc.collect()  # closes the maps of readers before
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def time_pass(read: Reader, reads: Sequence[tuple]) -> float:
    start = time.perf_counter()
    for video, a, b in reads:
        read(video, a, b)
    return time.perf_counter() - start


def print_table(seconds: dict, file_sizes: dict, reads: int, read_bytes: int) -> dict[str, float]:
    """Print the table; returns {comparison: ratio}."""
    total = file_sizes["datasets"] / 1e9
    print(f"{reads} reads, {read_bytes / 1e9:.2f} GB, of files of {total:.2f} GB (seconds)")
    print(f"{'':20}{'':>12}{'one a video':>14}{'packed':>10}{'ratio':>8}")
    ratios = {}
    for name, by_layout in seconds.items():
        for kind in ("open cold", "read cold", "read warm"):
            datasets, packed = (by_layout[layout][kind] for layout in ("datasets", "packed"))
            ratio = ratios[f"{name}, {kind}"] = datasets / packed
            print(f"{name:20}{kind:>12}{datasets:14.3f}{packed:10.3f}{ratio:8.1f}")
        disk = []
        for layout, measured in by_layout.items():
            disk.append(f"{layout} {measured['bytes from disk, cold'] / 1e9:.2f}")
        print(f"{'':20}from disk in the cold pass, GB: {', '.join(disk)}")
    return ratios


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--videos", type=int, default=8000, help="how many (default 8000: 2 GB a layout)")
    add("--channels", type=int, default=1024, help="default 1024")
    place = "where to put the files while it runs (default runs)"
    add("--folder", type=Path, default=ROOT / "runs", help=place)
    add("--output", help="also write the figures as JSON, into this file")
    args = parser.parse_args(argv)
    check_ranges(args, {"videos": (1, 10**6), "channels": (1, 10**5)})

    args.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="benchmark-store-", dir=args.folder) as folder:
        paths, lengths = make_stores(Path(folder), args.videos, args.channels)
        rng = seeded_rng(SEED, 1)
        reads = []  # (video, a, b)
        for video in rng.permutation(list(lengths)):
            a = int(rng.integers(max(1, lengths[video] - FRAMES + 1)))
            reads.append((str(video), a, min(a + FRAMES, lengths[video])))
        seconds = {}
        for name, readers in READERS.items():
            seconds[name] = {}
            for layout, open_reader in readers.items():
                seconds[name][layout] = measure(open_reader, paths[layout], reads)
        file_sizes = {layout: path.stat().st_size for layout, path in paths.items()}

    read_bytes = sum(b - a for _, a, b in reads) * args.channels * 2
    ratios = print_table(seconds, file_sizes, len(reads), read_bytes)
    if args.output:
        report = {
            "videos": args.videos,
            "channels": args.channels,
            "bytes read": read_bytes,
            "file sizes": file_sizes,
            "seconds": seconds,
            "ratios": ratios,
        }
        write_json(args.output, provenance() | report)


if __name__ == "__main__":
    run_main(main)
