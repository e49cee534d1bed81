"""Frame features of a collection of videos, one row a second, into one HDF5 file.

    python pre-processing/extract_features.py VIDEOS --output features.hdf5                   # a folder, searched through
    python pre-processing/extract_features.py list.tsv --output features.hdf5                 # lines `id <tab> path`
    python pre-processing/extract_features.py 'VIDEOS/{id}/video.mp4' --output features.hdf5  # a pattern
    python pre-processing/extract_features.py VIDEOS --output features.hdf5 --backbone resnet50 --pooling l3_imac

The last is the paper's. Without `--backbone`, EfficientNet-Lite0 keeps pace with a CPU.

Decoder threads fill one queue of frames; batches are cut from it across videos, go through the backbone and the pooling,
and a video is written as soon as its last frame is through. Memory follows the batch and the queue (and the finished rows
of the videos under way), not the length of a video. A killed run goes on where it was when the same command is given again.

A video that cannot be read is named, counted and skipped. OUTPUT's neighbour with suffix .json lists every video with its
frames, seconds, status and reason. Exit status: 0, or 3 when some videos failed, or 2 for a bad command.
"""

import collections
import glob
import os
import queue
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from av.stream import Disposition
from torch.nn import functional as F
from tqdm import tqdm

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
import backbones  # noqa: E402
import pca  # noqa: E402

import utils  # noqa: E402
from data import FeatureStore, StoreWriter  # noqa: E402
from utils import InputError  # noqa: E402

SHORT_SIDE, CROP = 256, 224
MAX_GAP = 600  # seconds: a longer pause between two frames is a break in the clock, not a still
NOT_VIDEOS = frozenset(
    ".txt .md .json .jsonl .csv .tsv .srt .vtt .ass .nfo .xml .html .jpg .jpeg .png .webp .part .hdf5 .h5 .npy .npz .py".split()
)


# --- which videos ----------------------------------------------------------------------------------------------------


def find_videos(source):
    """{id: path} of a folder, a list file or a pattern holding `{id}`; InputError when there is none or two share an id."""
    if "{id}" in source:
        pairs = _from_pattern(source)
    elif Path(source).is_dir():
        pairs = _from_folder(Path(source))
    else:
        pairs = _from_list(utils.existing(source, "input"))
    videos = {}
    for video, path in pairs:
        if video in videos:
            raise InputError(
                f"{str(videos[video])!r} and {str(path)!r} share the id {video!r}; rename one, or give a list file"
            )
        videos[video] = path
    if not videos:
        raise InputError(f"input {source!r} holds no video; give a folder of videos, a list file or a pattern with {{id}}")
    return videos


def _from_folder(folder):
    """Every file but hidden ones and those that are surely no video; the id is the relative path without suffix."""
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in relative.parts)
        if path.is_file() and not hidden and path.suffix.lower() not in NOT_VIDEOS:
            yield relative.with_suffix("").as_posix(), path


def _from_list(path):
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise InputError(f"input {str(path)!r} is no list of `id <tab> path`; for one video give its folder") from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            video, tab, file = line.partition("\t")
            if not (tab and video.strip() and file.strip()):
                raise InputError(f"{str(path)!r} line {number}: expected `id <tab> path`, found {line[:80]!r}")
            yield video.strip(), path.parent / file.strip()


def _from_pattern(pattern):
    before, after = pattern.split("{id}", 1)
    if "{id}" in after:
        raise InputError(f"pattern {pattern!r} holds {{id}} more than once; once is enough")
    for path in sorted(glob.glob(glob.escape(before) + "*" + glob.escape(after))):
        yield path[len(before) : len(path) - len(after)], Path(path)


# --- frames ----------------------------------------------------------------------------------------------------------


class Clock:
    """Seconds since the first frame, as a Fraction, from timestamps that may be missing, jump, or run backwards."""

    def __init__(self, time_base, rate):
        self.time_base, self.step = time_base, 1 / rate
        self.last, self.now = None, None

    def __call__(self, pts):
        if self.now is None:
            self.now = Fraction(0)
        else:
            passed = (pts - self.last) * self.time_base if None not in (pts, self.last) else self.step
            self.now += passed if 0 <= passed <= MAX_GAP else self.step
        self.last = pts
        return self.now


def at_timestamps(frames, fps, rate):
    """For k = 0, 1, ...: the first frame at or after k/fps seconds.

    So at 1 frame a second row k is second k, whatever the video's own rate. A frame after a pause of several seconds stands
    for each of them.
    """
    k = 0
    for now, frame in frames:
        while now >= k / fps:
            yield frame
            k += 1


def as_released(frames, fps, rate):
    """The released code's rule: frame i where (i + 1) % round(rate) == 0.

    The rate is rounded, so at 29.97 the rows drift from the seconds, and row k is the end of second k.
    """
    every = max(1, round(rate / fps))
    return (frame for i, (_, frame) in enumerate(frames) if (i + 1) % every == 0)


FRAME_RULES = {"timestamp": at_timestamps, "released": as_released}


@dataclass(eq=False)
class Video:
    """A video under way: its rows so far, and what the report will say of it."""

    id: str
    path: Path
    rows: list = field(default_factory=list)
    seconds: float | None = None
    corrupt_packets: int = 0
    reason: str = ""


def read_frames(video, fps=Fraction(1), rule="timestamp", threads=1):
    """Decode `video` (a Video) and yield the frames of the rule, upright, (224, 224, 3) uint8 RGB.

    Packets that do not decode are counted and passed over, as players do. Raises av.FFmpegError, OSError or ValueError when
    there is nothing to read.
    """
    video.seconds = 0.0
    with av.open(str(video.path), metadata_errors="ignore") as container:
        film = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]  # a cover is no video
        if not film:
            raise ValueError("it has no video stream")
        stream = film[0]
        stream.thread_count, stream.thread_type = threads, "AUTO"
        rate = stream.average_rate or stream.guessed_rate or Fraction(25)
        frames = FRAME_RULES[rule](_decode(container, stream, rate, video), fps, rate)
        kept = 0
        for kept, frame in enumerate(frames, 1):  # noqa: B007
            yield prepare(frame)
    if not kept:
        raise ValueError(f"too short for --frames {rule}" if video.seconds else "none of its frames can be decoded")


def _decode(container, stream, rate, video):
    """(seconds since the first frame, av.VideoFrame) of each frame; keeps count in `video`."""
    clock, packets = Clock(stream.time_base, rate), container.demux(stream)
    while True:
        try:
            packet = next(packets, None)
        except av.FFmpegError:  # the container is cut short: what came before is good
            video.corrupt_packets += 1
            return
        if packet is None:
            return
        try:
            frames = packet.decode()
        except av.FFmpegError:
            video.corrupt_packets += 1
            continue
        for frame in frames:
            now = clock(frame.pts)
            video.seconds = float(now + clock.step)
            yield now, frame


def prepare(frame):
    """An av.VideoFrame as (224, 224, 3) uint8 RGB: resized, turned upright, cropped."""
    short = min(frame.width, frame.height)
    width, height = SHORT_SIDE * frame.width // short, SHORT_SIDE * frame.height // short
    image = frame.reformat(width, height, "rgb24", interpolation="BICUBIC").to_ndarray()
    image = np.rot90(image, round(frame.rotation / 90))  # rotation: how far counterclockwise the container asks for
    top, left = (image.shape[0] - CROP) // 2, (image.shape[1] - CROP) // 2
    return np.ascontiguousarray(image[top : top + CROP, left : left + CROP])


# --- pooling ---------------------------------------------------------------------------------------------------------


def imac(x):
    """iMAC of a stage, (B, c, h, w) -> (B, c): L2 over channels at each position, global max, L2 (Kordopatis-Zilos 2017)."""
    return F.normalize(F.normalize(x, dim=1).amax((2, 3)), dim=1)


def l3_imac(x):
    """L3-iMAC of a stage: as iMAC, over regions (3 x 3 of them at 7, 14, 28 and 56), each L2, summed, L2.

    Regions are kernel int(1.5 p), stride p = int(min(h, w) * 2 / 7), as released. Maps of less than 4 get p = 1: every
    position is a region.
    """
    p = max(1, int(min(x.shape[2:]) * 2 / 7))
    regions = F.max_pool2d(F.normalize(x, dim=1), int(1.5 * p), p)  # (B, c, 3, 3)
    return F.normalize(F.normalize(regions, dim=1).sum((2, 3)), dim=1)


def mac(x):
    return F.normalize(x.amax((2, 3)), dim=1)


def spoc(x):
    return F.normalize(x.mean((2, 3)), dim=1)


def gem(x, p=3.0):
    """Generalised mean (Radenovic 2018) at its usual exponent."""
    return F.normalize(x.clamp_min(1e-6).pow(p).mean((2, 3)).pow(1 / p), dim=1)


POOLINGS = {"imac": imac, "l3_imac": l3_imac, "mac": mac, "spoc": spoc, "gem": gem}


# --- the stream ------------------------------------------------------------------------------------------------------


def decode_into(frames, todo, options, threads):
    """A decoder thread: take videos from the iterator `todo`, put (video, frame) and at each end (video, None) into the
    queue `frames`, and None when no video is left. An unexpected error is put there itself, for the main thread to raise.
    """
    try:
        for video in todo:
            try:
                for frame in read_frames(video, options.fps, options.frames, threads):
                    frames.put((video, frame))
            except (av.FFmpegError, OSError, ValueError, MemoryError) as error:
                reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
                video.reason = " ".join(reason.split())
            frames.put((video, None))
        frames.put(None)
    except BaseException as error:
        frames.put(error)


def cut_batches(frames, decoders, size):
    """Lists of (video, frame or None) out of the queue, `size` frames in each, until all decoders have ended."""
    batch, count = [], 0
    while decoders:
        item = frames.get()
        if isinstance(item, BaseException):
            raise item
        if item is None:
            decoders -= 1
            continue
        batch.append(item)
        count += item[1] is not None
        if count == size:
            yield batch
            batch, count = [], 0
    yield batch


def extract(videos, features, options):
    """Yield each Video of `videos` when it is through, its rows in `video.rows` or its trouble in `video.reason`.

    features: frames (B, 224, 224, 3) uint8 array -> rows (B, C) array; called from `options.streams` threads.
    """
    workers = min(options.workers, len(videos))
    threads = max(1, options.workers // max(1, len(videos)))  # within a decoder, where videos are few
    frames, todo = queue.Queue(2 * options.batch_sz), iter(videos)  # a list's iterator may be shared by threads
    for _ in range(workers):
        threading.Thread(target=decode_into, args=(frames, todo, options, threads), daemon=True).start()
    pending = collections.deque()  # batches under way, oldest first, so a video's rows come in order

    def finished():
        batch, future = pending.popleft()
        rows = iter(future.result() if future else ())
        for video, frame in batch:
            if frame is None:
                yield video
            else:
                video.rows.append(next(rows))

    # On a CPU one batch a core, of one thread each, beats one batch on all cores: the decoders disturb it less.
    with ThreadPoolExecutor(options.streams, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for batch in cut_batches(frames, workers, options.batch_sz):
            images = [frame for _, frame in batch if frame is not None]
            batch = [(video, None if frame is None else True) for video, frame in batch]  # lets the pixels go
            pending.append((batch, pool.submit(lambda x: features(np.stack(x)), images) if images else None))
            if len(pending) > options.streams:
                yield from finished()
        while pending:
            yield from finished()


def feature_function(backbone, pooling, projection, dtype):
    """frames (B, 224, 224, 3) uint8 -> rows (B, C) of `dtype`."""

    def features(frames):
        x = torch.from_numpy(frames).permute(0, 3, 1, 2)  # (B, 3, 224, 224), channels last as it lies
        with torch.inference_mode():
            rows = torch.cat([POOLINGS[pooling](stage) for stage in backbone(x)], 1)  # (B, C)
        rows = rows.cpu().numpy()
        return (projection(rows) if projection else rows).astype(dtype)

    return features


# --- the script ------------------------------------------------------------------------------------------------------


def parse(argv=None):
    parser = utils.Parser(__doc__)
    add = parser.add_argument
    add("input", help="folder, list file of `id <tab> path`, or pattern with {id}")
    add("--output", required=True, help="the feature file to write, NAME.hdf5")
    add("--fps", type=Fraction, default=Fraction(1), help="frames a second to keep (default 1, the paper's)")
    add(
        "--frames",
        choices=FRAME_RULES,
        default="timestamp",
        help="which: by time (default), or the released code's rule",
    )
    add(
        "--backbone",
        default="efficientnet_lite0",
        help=f"{', '.join(backbones.BACKBONES)} (the paper's: resnet50), or a torchvision classifier with --stages",
    )
    add(
        "--stages",
        type=lambda names: names.split(","),
        help="modules of the backbone whose outputs to pool, e.g. layer2,layer3",
    )
    add("--weights", help="a state dict's file instead of the usual weights, or `random` for tests")
    add("--pooling", choices=POOLINGS, default="imac", help="default imac; the paper's final rows use l3_imac")
    add("--pca", help="project by this file of pca.py (or a released .npz)")
    add("--components", type=int, help="keep only the first so many components of --pca")
    add("--dtype", choices=("float16", "float32"), default="float16", help="of the stored rows (default float16)")
    add("--device", default=utils.default_device(), help="default: a GPU where there is one (here %(default)s)")
    add("--amp", choices=("bfloat16",), help="run the backbone in this type; faster on GPUs and on CPUs that have it")
    add("--workers", type=int, default=os.cpu_count(), help="decoder threads (default: the cores, %(default)s)")
    add("--batch_sz", type=int, help="frames in a batch (default: 4 on a CPU, where more is slower; 64 on a GPU)")
    options = parser.parse_args(argv)
    on_cpu = torch.device(utils.checked_device(options.device)).type == "cpu"
    if options.components is not None and (options.components < 1 or not options.pca):
        raise InputError("--components takes a number from 1 up, and belongs to --pca; correct it or leave it out")
    options.streams = os.cpu_count() if on_cpu else 1
    options.batch_sz = options.batch_sz if options.batch_sz is not None else 4 if on_cpu else 64
    if options.fps <= 0 or options.workers < 1 or options.batch_sz < 1:
        raise InputError("--fps, --workers and --batch_sz must be positive")
    if Path(options.output).suffix not in (".hdf5", ".h5") or Path(options.output).is_dir():
        raise InputError(f"--output {options.output!r} must name a file with suffix .hdf5")
    return options


def describe(options, backbone, projection):
    """What made the features: kept in the file, and compared when a killed run goes on."""
    return {
        "backbone": options.backbone,
        "weights": backbone.weights,
        "stages": ",".join(options.stages or ["default"]),
        "pooling": options.pooling,
        "pca": projection.label if projection else "none",
        "fps": str(options.fps),
        "frames": options.frames,
        "amp": options.amp or "none",
    }


def write_report(options, settings, videos):
    """OUTPUT's neighbour with suffix .json: what became of every video."""
    done = any(not video.reason for video in videos)
    lengths = FeatureStore(options.output).lengths if done else {}
    rows = {
        video.id: {
            "path": str(video.path),
            "status": "failed" if video.reason else "ok",
            "frames": lengths.get(video.id, 0),
            "seconds": None if video.seconds is None else round(video.seconds, 3),  # None: done by an earlier run
            "corrupt_packets": video.corrupt_packets,
            "reason": video.reason,
        }
        for video in videos
    }
    utils.write_json(Path(options.output).with_suffix(".json"), {**utils.provenance(), "settings": settings, "videos": rows})


def identity(path):
    """What tells a changed file: size and time of change; empty for one that cannot be looked at, which fails later by name."""
    try:
        facts = Path(path).stat()
    except OSError:
        return ""
    return f"{facts.st_size} bytes, {facts.st_mtime_ns}"


def store(writer, video):
    """Write a finished video, or note why it cannot be."""
    try:
        if not video.reason:
            writer.add(video.id, np.stack(video.rows))
    except InputError as error:  # such as a value that overflows float16
        video.reason = str(error)
    video.rows.clear()


def main(argv=None):
    options = parse(argv)
    videos = [Video(name, path) for name, path in find_videos(options.input).items()]
    projection = pca.load(options.pca, options.components) if options.pca else None
    backbone = backbones.build(options.backbone, options.weights, options.stages, options.device, options.amp)
    if projection:
        projection.check(sum(backbone.channels), f"{options.backbone} with {options.pooling}")
    settings = describe(options, backbone, projection)

    writer = StoreWriter(options.output, options.dtype, settings, {video.id: identity(video.path) for video in videos})
    todo = [video for video in videos if video.id not in writer.done]
    if len(todo) < len(videos):
        print(f"going on: {len(videos) - len(todo)} of {len(videos)} videos were done before", file=sys.stderr)
    try:
        with writer, tqdm(total=len(todo), unit="video") as bar:
            features = feature_function(backbone, options.pooling, projection, options.dtype)
            for video in extract(todo, features, options):
                store(writer, video)
                if video.reason:
                    bar.write(f"skipped {video.id}: {video.reason}", file=sys.stderr)
                bar.update()
    except InputError:  # the writer's, when it was given nothing: told below
        if writer.done:
            raise
    write_report(options, settings, videos)
    failed = sum(bool(video.reason) for video in videos)
    written = f"{len(videos) - failed} in {options.output}" if failed < len(videos) else f"no {options.output} written"
    print(f"{len(videos)} videos: {written}, {failed} failed", file=sys.stderr)
    return 3 if failed else 0


if __name__ == "__main__":
    utils.run(main)
