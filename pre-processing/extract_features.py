"""Frame features of a collection of videos, one row a second, into one HDF5 file.

    python pre-processing/extract_features.py VIDEOS --output features.hdf5                   # a folder, searched through
    python pre-processing/extract_features.py list.tsv --output features.hdf5                 # lines `id <tab> path`
    python pre-processing/extract_features.py 'VIDEOS/{id}/video.mp4' --output features.hdf5  # a pattern
    python pre-processing/extract_features.py VIDEOS --output features.hdf5 --backbone resnet50 --pooling l3_imac

The last is the paper's. Without `--backbone`, EfficientNet-Lite0 keeps pace with a CPU.

Decoder processes fill one queue of frames; batches are cut from it across videos, go through the backbone and the pooling,
and a video is written as soon as its last frame is through. Memory follows the batch and the queue (and the finished rows
of the videos under way), not the length of a video. A killed run goes on where it was when the same command is given again;
a finished one does what is new in the input, and nothing else.

Many machines or GPUs: `--shard 0/4` to `--shard 3/4`, or start with torchrun or horovodrun. Every process does the videos of
its shard, into OUTPUT's NAME.0of4.hdf5 and so on; `convert.py merge` joins them.

A video that cannot be read is named, counted and skipped, now and by the same command again (but for `--retry_failed`).
OUTPUT's neighbour with suffix .json lists every video with its frames, seconds, status and reason. Exit status: 0, or 3 when
some videos failed, or 2 for a bad command.
"""

import collections
import contextlib
import glob
import os
import queue
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
import backbones  # noqa: E402
import pca  # noqa: E402
from frames import FRAME_RULES, TIME_LIMIT, Decoder, Video  # noqa: E402
from progress import Report  # noqa: E402

import utils  # noqa: E402
from data import FeatureStore, StoreWriter  # noqa: E402
from utils import InputError  # noqa: E402

NOT_VIDEOS = frozenset(
    ".txt .md .json .jsonl .csv .tsv .srt .vtt .ass .nfo .xml .html .jpg .jpeg .png .webp .part .hdf5 .h5 .npy .npz .py".split()
)


# --- which videos ----------------------------------------------------------------------------------------------------


def find_videos(source):
    """{id: path} of a folder, a list file or a pattern holding `{id}`.

    Raises InputError when there is none, when two share an id, and for an id that is not UTF-8.
    """
    if "{id}" in source:
        pairs = _from_pattern(source)
    elif Path(source).is_dir():
        pairs = _from_folder(Path(source))
    else:
        pairs = _from_list(utils.existing(source, "input"))
    videos = {}
    for video, path in pairs:
        if video != video.encode(errors="replace").decode():
            raise InputError(f"the id {video!r} of {str(path)!r} is not UTF-8, so it cannot be an id; rename the file")
        if video in videos:
            raise InputError(
                f"{str(videos[video])!r} and {str(path)!r} share the id {video!r}; rename one, or give a list file"
            )
        videos[video] = path
    if not videos:
        raise InputError(f"input {source!r} holds no video; give a folder of videos, a list file or a pattern with {{id}}")
    return videos


def _from_folder(folder):
    """Every file but hidden ones and those that are surely no video; the id is the relative path without suffix.

    Links are followed, but not into a folder that they lie in.
    """
    for top, folders, files in os.walk(folder, followlinks=True):
        top = Path(top)
        above = [parent for parent in top.parents if parent.is_relative_to(folder)]
        if any(top.samefile(parent) for parent in above):
            folders.clear()
            continue
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for path in sorted(top / name for name in files if not name.startswith(".")):
            if path.is_file() and path.suffix.lower() not in NOT_VIDEOS:
                yield path.relative_to(folder).with_suffix("").as_posix(), path


def _from_list(path):
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()  # a BOM belongs to no id
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


def decode_into(frames, todo, decoder, stop):
    """A thread that feeds from one decoder: take videos from the iterator `todo`, put (video, frame) and at each end
    (video, None) into the queue `frames`, and None when no video is left. An error is put there itself, for the main thread.
    """
    try:
        for video in todo:
            for frame in decoder.frames(video):
                frames.put((video, frame))
                if stop.is_set():
                    break
            if stop.is_set():
                return
            frames.put((video, None))
        frames.put(None)
    except BaseException as error:
        frames.put(error)
    finally:
        decoder.close()


def cut_batches(frames, decoders, size):
    """Lists of (video, frame or None) out of the queue, up to `size` frames in each, until all decoders have ended."""
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
        if count == size or len(batch) >= 4 * size:  # many ends and few frames: broken videos are told soon
            yield batch
            batch, count = [], 0
    yield batch


def extract(
    videos,
    features,
    *,
    fps=Fraction(1),
    frames="timestamp",
    workers=None,
    time_limit=TIME_LIMIT,
    batch_sz=8,
    streams=1,
    threads=1,
    watch=None,
):
    """Yield each of `videos` ([Video]) when it is through, its rows (C,) in `video.rows` or its trouble in `video.reason`.

    features: frames (B, 224, 224, 3) uint8 -> rows (B, C), always B = batch_sz, called from `streams` threads, each of
    which may use `threads` of PyTorch's. `at_once` tells what suits a machine.
    fps, frames: which frames (see FRAME_RULES). workers: decoder processes, by default as many as cores.
    watch: called with (video, frame) of every frame, a video's own in order, before its features are made.
    Videos come as they finish; memory follows batch_sz, workers and the rows of the videos under way.
    """
    workers = min(workers or os.cpu_count(), len(videos))
    waiting, todo, stop = queue.Queue(2 * batch_sz), iter(videos), threading.Event()  # threads may share a list's iterator
    decoders = [Decoder(fps, frames, time_limit) for _ in range(workers)]
    feeders = [threading.Thread(target=decode_into, args=(waiting, todo, d, stop), daemon=True) for d in decoders]
    pending = collections.deque()  # batches under way, oldest first, so a video's rows come in order

    def finished():
        batch, future = pending.popleft()
        rows = iter(future.result() if future else ())
        for video, has_frame in batch:
            if has_frame:
                video.rows.append(next(rows))
            else:
                yield video

    with ThreadPoolExecutor(streams, initializer=torch.set_num_threads, initargs=(threads,)) as pool:
        try:
            for feeder in feeders:
                feeder.start()
            for batch in cut_batches(waiting, workers, batch_sz):
                images = [image for _, image in batch if image is not None]
                for video, image in batch if watch else ():
                    if image is not None:
                        watch(video, image)
                batch = [(video, image is not None) for video, image in batch]  # lets the pixels go
                pending.append((batch, pool.submit(_whole_batch, features, images, batch_sz) if images else None))
                if len(pending) > streams:
                    yield from finished()
            while pending:
                yield from finished()
        finally:  # also where the caller breaks off
            stop.set()
            for decoder in decoders:
                decoder.kill()
            while any(feeder.is_alive() for feeder in feeders):
                with contextlib.suppress(queue.Empty):
                    waiting.get(timeout=0.05)


def _whole_batch(features, images, size):
    """Rows of `images`, computed in a batch of `size`: a row's last bits may depend on that, and the last batch is short."""
    batch = np.zeros((size, *images[0].shape), np.uint8)
    np.stack(images, out=batch[: len(images)])
    return features(batch)[: len(images)]


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
    add("--shard", type=shard, default=(0, 1), metavar="I/N", help="do part I of N (0 to N-1), into NAME.IofN.hdf5")
    add("--retry_failed", action="store_true", help="try again what failed in an earlier run")
    add("--fps", type=rate, default=Fraction(1), help="frames a second to keep (default 1, the paper's)")
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
    add("--workers", type=int, help="decoder processes (default: the cores, shared by this machine's processes)")
    add("--batch_sz", type=int, help="frames in a batch (default: 8 on a CPU, where more is no faster; 64 on a GPU)")
    add(
        "--time_limit",
        type=float,
        default=TIME_LIMIT,
        help="give a video up after so many seconds of decoding without a new frame (default %(default)s)",
    )
    options = parser.parse_args(argv)
    if options.components is not None and (options.components < 1 or not options.pca):
        raise InputError("--components takes a number from 1 up, and belongs to --pca; correct it or leave it out")
    numbers = (options.fps, options.workers, options.batch_sz, options.time_limit)
    if any(number is not None and not 0 < number < float("inf") for number in numbers):
        raise InputError("--fps, --workers, --batch_sz and --time_limit must be positive")
    if Path(options.output).suffix not in (".hdf5", ".h5") or Path(options.output).is_dir():
        raise InputError(f"--output {options.output!r} must name a file with suffix .hdf5")
    return options


def rate(text):
    """The Fraction of a text such as 1, 0.5 or 30000/1001."""
    try:
        return Fraction(text)
    except (ValueError, ZeroDivisionError):
        raise InputError(f"--fps {text} must be a number, such as 1, 0.5 or 30000/1001") from None


def shard(text):
    """(i, n) of the text i/n."""
    i, _, n = text.partition("/")
    if not (i.isdecimal() and n.isdecimal() and int(i) < int(n)):
        raise InputError(f"--shard {text} must be I/N with 0 <= I < N, such as 0/4, 1/4, 2/4 and 3/4")
    return int(i), int(n)


def part_of(video, n):
    """Which of n shards has the video of this id: told by the id alone, so that it stays when others come or go."""
    return int(utils.digest(video), 16) % n


def at_once(device, cores, amp=None):
    """{batch_sz, streams, threads} for a backbone on `device` in `amp`, where this process may use so many cores.

    That is frames in a batch, batches at once, and threads of each. On a CPU two threads share a batch in float32, and one
    has a batch to itself in bfloat16: with ResNet-50 on two cores 1.3 and 1.1 times as fast as the other way round. An odd
    core is left to decoding.
    """
    if torch.device(device).type != "cpu":
        return {"batch_sz": 64, "streams": 1, "threads": 1}
    threads = 1 if amp else min(2, cores)
    return {"batch_sz": 8, "streams": cores // threads, "threads": threads}


def use_machine(options, processes):
    """Fill in what the machine decides: the device, how many decoders, and what is at once."""
    utils.keep_freed_memory()
    cores = max(1, os.cpu_count() // processes.local_size)
    options.device = utils.checked_device(processes.device(options.device))
    options.workers = options.workers or cores
    for name, value in at_once(options.device, cores, options.amp).items():
        setattr(options, name, getattr(options, name, None) or value)


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


def identity(path):
    """What tells a changed file: size and time of change; empty for one that cannot be looked at, which fails later by name."""
    try:
        facts = Path(path).stat()
    except OSError:
        return ""
    return f"{facts.st_size} bytes, {facts.st_mtime_ns}"


def open_finished(output, settings, dtype):
    """The finished store that is to be extended, or {}; InputError when it was made by other settings."""
    if not output.exists():
        return {}
    store = FeatureStore(output)
    for name, value in {**settings, "dtype": dtype}.items():
        found = {**store.meta, "dtype": str(store.dtype)}.get(name)
        if found != value:
            raise InputError(
                f"{str(output)!r} holds features of {name} {found}, not {value}; name another --output, or remove that file"
            )
    return store


def write(writer, video):
    """Write a finished video, or note why it cannot be; returns its number of frames."""
    try:
        if not video.reason:
            writer.add(video.id, np.stack(video.rows))
    except InputError as error:  # such as a value that overflows float16
        video.reason = str(error)
    frames = 0 if video.reason else len(video.rows)
    video.rows.clear()
    return frames


def bring_up_to_date(output, videos, settings, features, options):
    """Add to the store `output` what it lacks of `videos`, and report; returns {id: the report's row} of `videos`.

    What is done is left alone, and so is what the store holds of files that are gone; a file that has changed is done again.
    """
    sources, report = {video.id: identity(video.path) for video in videos}, Report(output.with_suffix(".json"), settings)
    old = open_finished(output, settings, options.dtype)
    kept = {name for name in old if not sources.get(name) or report.stored(name) in (None, sources[name])}
    failed = {name for name in sources if report.failed(name, sources[name])} - kept
    left_out = set() if options.retry_failed else failed
    if left_out:
        print(f"left out: {len(left_out)} videos that failed before; --retry_failed tries them again", file=sys.stderr)
    todo, done = [video for video in videos if video.id not in kept | left_out], set(old)
    if todo or kept < done:
        present = {name: source for name, source in sources.items() if source}
        writer = StoreWriter(output, options.dtype, settings, present, renew=True)
        for name in sorted(kept - writer.done):  # first into the spool: the finished file is replaced whole, or stays
            writer.add(name, old.verified(name))
        before = len(writer.done.intersection(sources))
        if before:
            print(f"going on: {before} of {len(videos)} videos were done before", file=sys.stderr)
        todo = [video for video in todo if video.id not in writer.done]
        done = run_through(todo, writer, report, sources, features, options)
    untold = {name for name in done if name not in report.rows or report.failed(name)}
    lengths = FeatureStore(output).lengths if untold else {}
    for video in videos:
        if video.id in untold:  # done by a run that was killed before it told, or that stood before there were reports
            report.add(video, sources[video.id], lengths[video.id])
    report.write(done.union(sources))
    return {name: report.rows[name] for name in sources}


def run_through(videos, writer, report, sources, features, options):
    """Extract `videos` into `writer` and `report`; returns the ids that the store then holds."""
    names = ("fps", "frames", "workers", "time_limit", "batch_sz", "streams", "threads")
    try:
        with writer, tqdm(total=len(videos), unit="video") as bar:
            for video in extract(videos, features, **{name: getattr(options, name) for name in names}):
                report.add(video, sources[video.id], write(writer, video))
                if video.reason:
                    bar.write(f"skipped {video.id}: {video.reason}", file=sys.stderr)
                bar.update()
    except InputError:  # the writer's, when it was given nothing: the report tells
        if writer.done:
            raise
    return writer.done


def main(argv=None):
    processes = utils.start_processes()
    with processes.together():
        options = parse(argv)
        use_machine(options, processes)
        part, parts = options.shard[0] * processes.size + processes.rank, options.shard[1] * processes.size
        output = Path(options.output)
        if parts > 1:
            output = output.with_name(f"{output.stem}.{part}of{parts}{output.suffix}")
        found = find_videos(options.input)
        videos = [Video(name, path) for name, path in found.items() if part_of(name, parts) == part]
        projection = pca.load(options.pca, options.components) if options.pca else None
        backbone = backbones.build(options.backbone, options.weights, options.stages, options.device, options.amp)
        if projection:
            projection.check(sum(backbone.channels), f"{options.backbone} with {options.pooling}")
    features = feature_function(backbone, options.pooling, projection, options.dtype)

    rows = bring_up_to_date(output, videos, describe(options, backbone, projection), features, options)
    failed = sum(row["status"] == "failed" for row in rows.values())
    written = f"{len(rows) - failed} in {output}" if failed < len(rows) else f"no {output} written"
    print(f"{len(rows)} videos: {written}, {failed} failed", file=sys.stderr)
    return 3 if processes.any(failed) else 0  # waits for the others: a launcher ends them all when one ends in failure


if __name__ == "__main__":
    utils.run(main)
