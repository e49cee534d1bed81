"""How fast extraction is: against the backbone alone, and against decoding everything first.

    python benchmarks/extract.py --output extract.json    # about four minutes on two cores
    python benchmarks/extract.py --backbone_cores 1       # is decoding hidden if it has a core?
    python benchmarks/extract.py --backbones resnet50 --size 1280x720

The clips are cut from the demo's film: 25 frames a second, H.264 with libx264's defaults. One frame
a second is kept. For each backbone and type the table compares, in kept frames a second:

- alone: backbone and pooling on ready frames, in the batches and streams that extraction uses;
- extract: what `extract_features.py` does from the files to the finished store, decoding included,
  start-up (imports, weights) excluded;
- two steps: every clip decoded to a raw array on disk, with as many decoders as extraction has,
  then one clip at a time through the backbone on all cores.

The three take turns; the best of `--rounds` counts. At last the rate of one decoder process is
measured: a device that takes R frames a second needs R / rate decoders.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from clips import RATE, make_clips, seconds_of_backbone

from distributed import default_device, init_distributed, run_main
from features.backbones import BACKBONES, build_backbone
from features.decoding import Decoder, Video, read_frames
from features.extraction import (
    FeatureFunction,
    default_parallelism,
    extract,
    feature_function,
    resolve_resources,
    write_video,
)
from features.store import StoreWriter
from features.views import View
from files import write_json
from utils import Parser, check_ranges, provenance, require_path

POOLING = {"resnet50": "l3_imac"}  # the paper's; imac for others
TYPES = {"float32": None, "bfloat16": "bfloat16"}  # {name: amp}
PARALLELISM = ("batch_sz", "streams", "threads")
SETTINGS = ("workers", *PARALLELISM)  # options of `extract`


# --- what is compared ----------------------------------------------------------------------------


class Contest:
    """The ways from `files` to rows; the method of each returns the seconds it took.

    kept: how many frames are kept of all files.
    """

    def __init__(
        self,
        files: Sequence[Path],
        kept: int,
        features: FeatureFunction,
        view: View,
        options: argparse.Namespace,
        folder: Path,
    ) -> None:
        self.files, self.kept, self.features, self.view = files, kept, features, view
        self.options, self.folder = options, folder

    def videos(self) -> list[Video]:
        return [Video(str(i), path) for i, path in enumerate(self.files)]

    def alone(self) -> float:
        settings = {name: getattr(self.options, name) for name in PARALLELISM}
        return seconds_of_backbone(self.features, self.kept, self.view, **settings)

    def extract(self) -> float:
        settings = {name: getattr(self.options, name) for name in SETTINGS} | {"view": self.view}
        start = time.perf_counter()
        with StoreWriter(self.folder / "f.hdf5") as writer:
            for video in extract(self.videos(), self.features, **settings):
                write_video(writer, video)
                if video.reason:
                    raise RuntimeError(f"{video.path}: {video.reason}")
        return time.perf_counter() - start

    def two_steps(self) -> float:
        def decode(video):
            frames = np.stack(list(read_frames(video, view=self.view)))
            np.save(self.folder / f"{video.id}.npy", frames)

        start = time.perf_counter()
        with ThreadPoolExecutor(self.options.workers) as pool:
            list(pool.map(decode, self.videos()))
        with StoreWriter(self.folder / "f.hdf5") as writer:
            for video in self.videos():
                writer.add(video.id, self.features(np.load(self.folder / f"{video.id}.npy")))
        return time.perf_counter() - start


def compare(
    name: str, kind: str, files: Sequence[Path], args: argparse.Namespace, folder: Path
) -> dict:
    """One row of the table: rates, ratios of extraction to the others, seconds, settings."""
    options = argparse.Namespace(**vars(args), amp=TYPES[kind])
    resolve_resources(options, init_distributed())
    if args.backbone_cores:
        parallelism = default_parallelism(options.device, args.backbone_cores, options.amp)
        options.streams, options.threads = parallelism["streams"], parallelism["threads"]
    backbone = build_backbone(name, "random", None, options.device, options.amp)
    features = feature_function(backbone, POOLING.get(name, "imac"), None, "float16")
    size = backbone.view.size
    features(np.zeros((options.batch_sz, size, size, 3), np.uint8))  # the first call prepares

    kept = len(files) * args.seconds
    contest = Contest(files, kept, features, backbone.view, options, folder)
    seconds = {"alone": [], "extract": [], "two_steps": []}
    for _ in range(args.rounds):
        for way, times in seconds.items():
            times.append(getattr(contest, way)())
    row = {way: kept / min(times) for way, times in seconds.items()}
    for way in ("alone", "two_steps"):
        row[f"extract / {way}"] = row["extract"] / row[way]
    row["seconds"] = seconds
    return row | {name: getattr(options, name) for name in SETTINGS}


def decoder_rate(files: Sequence[Path]) -> float:
    """Frames that one decoder process keeps a second, without the first video, which starts it."""
    decoder = Decoder()
    kept, start = 0, None
    for i, path in enumerate(files):
        if i == 1:
            kept, start = 0, time.perf_counter()
        kept += sum(1 for _ in decoder.frames(Video(str(i), path)))
    seconds = time.perf_counter() - start
    decoder.close()
    return kept / seconds


# --- the script ----------------------------------------------------------------------------------


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--film", default=ROOT / "datasets/demo/film.mp4", help="default: the demo's")
    names = ["efficientnet_lite0", "resnet50"]
    add("--backbones", nargs="+", choices=BACKBONES, default=names)
    add("--types", nargs="+", choices=TYPES, default=list(TYPES))
    add("--size", type=parse_size, default=(640, 360), help="of the clips, default 640x360")
    add("--clips", type=int, default=100, help="default 100; ten files, each read ten times")
    add("--seconds", type=int, default=5, help="of a clip, default 5")
    add("--rounds", type=int, default=2, help="default 2")
    add("--device", default=default_device())
    add("--workers", type=int, help="decoder processes; see extract_features.py")
    add("--batch_sz", type=int, help="see extract_features.py")
    cores = "of a CPU (default: all); the others are left to decoding"
    add("--backbone_cores", type=int, default=0, help=cores)
    add("--output", help="also write the figures as JSON, into this file")
    args = parser.parse_args(argv)
    ranges = {
        "clips": (2, 10**6),
        "seconds": (1, 40),
        "rounds": (1, 100),
        "backbone_cores": (0, 10**4),
    }
    check_ranges(args, ranges)
    return args


def parse_size(text: str) -> tuple[int, int]:
    """(width, height) of the text WIDTHxHEIGHT."""
    width, height = text.split("x")
    return int(width), int(height)


def main(argv: Sequence[str] | None = None) -> None:
    args, rows = parse_args(argv), {}
    film = require_path(args.film, "film")
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        clips = make_clips(folder / "clips", film, min(10, args.clips), args.seconds, args.size)
        files = [clips[i % len(clips)] for i in range(args.clips)]
        print(
            f"{'frames/s':28}{'alone':>12}{'extract':>12}{'two steps':>12}"
            f"{'extract/alone':>18}{'extract/two steps':>20}"
        )
        for name in args.backbones:
            for kind in args.types:
                title = f"{name} {kind}"
                row = rows[title] = compare(name, kind, files, args, folder)
                rates = "".join(f"{row[way]:12.1f}" for way in row["seconds"])
                alone, two_steps = row["extract / alone"], row["extract / two_steps"]
                print(f"{title:28}{rates}{alone:18.2f}{two_steps:20.2f}", flush=True)
        kept = statistics.median(decoder_rate(files) for _ in range(3))
    print(f"one decoder process: {kept:.0f} frames/s kept, of {kept * RATE:.0f} decoded")
    print(
        f"so a device that takes 1000 frames/s needs {1000 / kept:.1f} decoders, "
        "each with a core of its own"
    )
    if args.output:
        settings = {"rate": RATE}
        for name in ("size", "clips", "seconds", "device", "backbone_cores"):
            settings[name] = getattr(args, name)
        decoder = {"kept": kept, "decoded": kept * RATE}
        report = {"settings": settings, "ways": rows, "decoder": decoder}
        write_json(args.output, provenance() | report)


if __name__ == "__main__":
    run_main(main)
