"""Made-up features of the true sizes, for the real ids of VCDB and FIVR-5K: what a run will cost.

    python benchmarks/true_size.py --data features        # 14 GB
    python reproduce.py --table all --data features --set FIVR-5K --estimate
    python train.py --feature_path features/l3_imac/train.hdf5 ...

The files are features/l3_imac/train.hdf5 (99,704 videos of VCDB, 6.4 million seconds) and
FIVR-5K.hdf5 (5,050 videos, .47 million seconds): packed, float16, 1024 values a second. Lengths are
log-normal around the sets' means (docs/disk-and-time.md). The values are noise, so scores mean
nothing: times, memory and disk do.
"""

import argparse
import math
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data import read_vcdb_annotation
from datasets.registry import ANNOTATION_DIR, load_evaluation_set
from distributed import run_main
from features.store import StoreWriter
from utils import Parser, check_ranges, seeded_rng

CHANNELS = 1024
SECONDS = {"train": 6.4e6 / 99_704, "FIVR-5K": 0.47e6 / 5_050}  # of a video, on average
SPREAD, SHORTEST, LONGEST = 0.8, 3, 1500  # of the logarithm; seconds
NOISE = 1 << 15  # different rows


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    pairs, negatives, _ = read_vcdb_annotation(args.annotation_dir / "vcdb.pickle")
    copies = [video for anchor, positive, _ in pairs for video in (anchor, positive)]
    fivr = load_evaluation_set("FIVR-5K", args.annotation_dir)
    folder = args.data / "l3_imac"
    folder.mkdir(parents=True, exist_ok=True)
    for name, always, others in (
        ("train", copies, negatives),
        ("FIVR-5K", fivr.queries, fivr.database),
    ):
        videos = dict.fromkeys([*always, *others[: math.ceil(args.share * len(others))]])
        write_features(folder / f"{name}.hdf5", videos, name)


def write_features(path: Path, videos: Iterable[str], name: str) -> None:
    """Write noise for each of the videos, of unit rows."""
    rng, begin, total = seeded_rng(0), time.perf_counter(), 0
    noise = rng.standard_normal((NOISE, CHANNELS), np.float32)
    noise = (noise / np.linalg.norm(noise, axis=1, keepdims=True)).astype(np.float16)
    centre = math.log(SECONDS[name]) - SPREAD**2 / 2  # of the logarithm, for this mean
    with StoreWriter(path) as writer:
        for video in videos:
            length = int(np.clip(rng.lognormal(centre, SPREAD), SHORTEST, LONGEST))
            start = rng.integers(NOISE - length)
            writer.add(video, noise[start : start + length])
            total += length
    size, seconds = path.stat().st_size / 1e9, time.perf_counter() - begin
    print(f"{path}: {total:,} seconds of film, {size:.1f} GB, written in {seconds:.0f} s")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add(
        "--data", type=Path, required=True, help="folder for the features, as reproduce.py takes it"
    )
    add("--annotation_dir", type=Path, default=ANNOTATION_DIR, help="default %(default)s")
    add(
        "--share",
        type=float,
        default=1.0,
        help="of VCDB's background and FIVR's database (default all)",
    )
    args = parser.parse_args(argv)
    check_ranges(args, {"share": (1e-4, 1)})
    return args


if __name__ == "__main__":
    run_main(main)
