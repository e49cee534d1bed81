"""Extraction against the backbone's own rate, and against decoding everything first.

    python benchmarks/extract.py --output extract.json                # about four minutes on two cores
    python benchmarks/extract.py --backbone_cores 1                   # is decoding hidden where it has a core?
    python benchmarks/extract.py --backbones resnet50 --size 1280x720

The clips are cut from the demo's film: 25 frames a second, H.264 as libx264 makes it by default, of which one frame a second is
kept. Compared, in frames kept a second, for each backbone and type:

- alone: the backbone and the pooling on ready frames, in the same batches and streams as extraction uses;
- extract: `extract_features.py` from the files to the finished store, decoding included, start-up (imports, weights) excluded;
- two steps: every clip decoded to a raw array on disk, as many at once as extraction has decoders, then one clip at a time
  through the same backbone on all cores.

The best of `--rounds` is told, the three ways taking turns. Then, what one decoder process keeps up with: a device that takes
R frames a second wants R divided by that many decoders.
"""

import argparse
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import utils
from distributed import default_device, init_distributed, run_main
from features import backbones, extraction
from features import decoding as fr
from features.store import StoreWriter

RATE = 25
POOLING = {"resnet50": "l3_imac"}  # the paper's; imac for others
TYPES = {"float32": None, "bfloat16": "bfloat16"}
SETTINGS = ("workers", "batch_sz", "streams", "threads")  # of `extraction.extract`


def endless(film):
    """The film's frames, over and over."""
    while True:
        with av.open(str(film)) as source:
            yield from source.decode(video=0)


def make_clips(folder, film, count, seconds, size):
    """`count` clips of the film's frames, one after another, at RATE frames a second."""
    folder.mkdir()
    images = endless(film)
    for i in range(count):
        with av.open(str(folder / f"{i:03}.mp4"), "w") as out:
            stream = out.add_stream("libx264", rate=RATE)
            stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
            for k, image in zip(range(RATE * seconds), images, strict=False):
                image = image.reformat(*size, "yuv420p")
                image.pts, image.time_base = k, Fraction(1, RATE)
                out.mux(stream.encode(image))
            out.mux(stream.encode(None))
    return sorted(folder.iterdir())


class Ways:
    """The ways to go from `files` to rows; each call returns the seconds it took."""

    def __init__(self, files, kept, features, options, folder):
        self.files, self.kept, self.features, self.options, self.folder = (
            files,
            kept,
            features,
            options,
            folder,
        )

    def videos(self):
        return [fr.Video(str(i), path) for i, path in enumerate(self.files)]

    def alone(self):
        batch = np.random.default_rng(0).integers(
            0, 256, (self.options.batch_sz, fr.CROP, fr.CROP, 3), np.uint8
        )
        start = time.perf_counter()
        threads = self.options.threads
        with ThreadPoolExecutor(
            self.options.streams, initializer=torch.set_num_threads, initargs=(threads,)
        ) as pool:
            rows = sum(
                pool.map(lambda _: len(self.features(batch)), range(-(-self.kept // len(batch))))
            )
        return (time.perf_counter() - start) * self.kept / rows

    def extract(self):
        settings, start = (
            {name: getattr(self.options, name) for name in SETTINGS},
            time.perf_counter(),
        )
        with StoreWriter(self.folder / "f.hdf5") as writer:
            for video in extraction.extract(self.videos(), self.features, **settings):
                extraction.write_video(writer, video)
                if video.reason:
                    raise RuntimeError(f"{video.path}: {video.reason}")
        return time.perf_counter() - start

    def two_steps(self):
        def decode(video):
            np.save(self.folder / f"{video.id}.npy", np.stack(list(fr.read_frames(video))))

        start = time.perf_counter()
        with ThreadPoolExecutor(self.options.workers) as pool:
            list(pool.map(decode, self.videos()))
        with StoreWriter(self.folder / "f.hdf5") as writer:
            for video in self.videos():
                writer.add(video.id, self.features(np.load(self.folder / f"{video.id}.npy")))
        return time.perf_counter() - start


def decoder_rate(files):
    """Frames that one decoder process keeps a second, from its second video on: the first one starts it."""
    decoder = fr.Decoder()
    kept, start = 0, None
    for i, path in enumerate(files):
        if i == 1:
            kept, start = 0, time.perf_counter()
        kept += sum(1 for _ in decoder.frames(fr.Video(str(i), path)))
    seconds = time.perf_counter() - start
    decoder.close()
    return kept / seconds


def parse(argv):
    parser = utils.Parser(__doc__)
    add = parser.add_argument
    add("--film", default=ROOT / "datasets/demo/film.mp4", help="default: the demo's")
    add(
        "--backbones",
        nargs="+",
        choices=backbones.BACKBONES,
        default=["efficientnet_lite0", "resnet50"],
    )
    add("--types", nargs="+", choices=TYPES, default=list(TYPES))
    add(
        "--size",
        type=lambda text: tuple(map(int, text.split("x"))),
        default=(640, 360),
        help="of the clips, default 640x360",
    )
    add(
        "--clips",
        type=int,
        default=100,
        help="default 100; ten are made, and each is read so often",
    )
    add("--seconds", type=int, default=5, help="of a clip, default 5")
    add("--rounds", type=int, default=2, help="default 2")
    add("--device", default=default_device())
    add("--workers", type=int, help="decoder processes; see extract_features.py")
    add("--batch_sz", type=int, help="see extract_features.py")
    add(
        "--backbone_cores",
        type=int,
        default=0,
        help="of a CPU; the others are left to decoding: is it hidden? (default: all)",
    )
    add("--output", help="also as JSON, into this file")
    args = parser.parse_args(argv)
    utils.check_ranges(
        args,
        {"clips": (2, 10**6), "seconds": (1, 40), "rounds": (1, 100), "backbone_cores": (0, 10**4)},
    )
    return args


def compare(name, kind, files, args, folder):
    """{way: frames kept a second} of a backbone in a type, extraction's ratios to the two others, the seconds and settings."""
    options = argparse.Namespace(**vars(args), amp=TYPES[kind])
    extraction.resolve_resources(options, init_distributed())
    if args.backbone_cores:
        at_once = extraction.default_parallelism(options.device, args.backbone_cores, options.amp)
        options.streams, options.threads = at_once["streams"], at_once["threads"]
    backbone = backbones.build_backbone(name, "random", None, options.device, options.amp)
    features = extraction.feature_function(backbone, POOLING.get(name, "imac"), None, "float16")
    features(np.zeros((options.batch_sz, fr.CROP, fr.CROP, 3), np.uint8))  # the first call prepares
    kept = len(files) * args.seconds
    ways = Ways(files, kept, features, options, folder)
    seconds = {way: [] for way in ("alone", "extract", "two_steps")}
    for _ in range(args.rounds):
        for way, times in seconds.items():
            times.append(getattr(ways, way)())
    rate = {way: kept / min(times) for way, times in seconds.items()}
    of = {f"extract / {way}": rate["extract"] / rate[way] for way in ("alone", "two_steps")}
    return {**rate, **of, "seconds": seconds, **{name: getattr(options, name) for name in SETTINGS}}


def main(argv=None):
    args, rows = parse(argv), {}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        clips = make_clips(
            folder / "clips",
            utils.require_path(args.film, "film"),
            min(10, args.clips),
            args.seconds,
            args.size,
        )
        files = [clips[i % len(clips)] for i in range(args.clips)]
        print(
            f"{'frames/s':28}{'alone':>12}{'extract':>12}{'two steps':>12}{'extract/alone':>18}{'extract/two steps':>20}"
        )
        for name in args.backbones:
            for kind in args.types:
                row = rows[f"{name} {kind}"] = compare(name, kind, files, args, folder)
                rates = "".join(f"{row[way]:12.1f}" for way in row["seconds"])
                alone, two = row["extract / alone"], row["extract / two_steps"]
                print(f"{name + ' ' + kind:28}{rates}{alone:18.2f}{two:20.2f}", flush=True)
        kept = statistics.median(decoder_rate(files) for _ in range(3))
    print(f"one decoder process: {kept:.0f} frames/s kept, of {kept * RATE:.0f} decoded")
    print(
        f"so a device that takes 1000 frames/s wants {1000 / kept:.1f} decoders, each with a core of its own"
    )
    if args.output:
        names = ("size", "clips", "seconds", "device", "backbone_cores")
        settings = {"rate": RATE, **{name: getattr(args, name) for name in names}}
        decoder = {"kept": kept, "decoded": kept * RATE}
        utils.write_json(
            args.output,
            {**utils.provenance(), "settings": settings, "ways": rows, "decoder": decoder},
        )


if __name__ == "__main__":
    run_main(main)
