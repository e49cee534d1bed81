"""Videos to rows of frame features, and feature files that grow with their collection.

`extract` is the pipeline: decoder processes -> one queue of frames -> batches -> rows. Batches are
cut across videos. `update_store` runs it for the videos that a feature file lacks.
"""

import argparse
import collections
import contextlib
import queue
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from distributed import Distributed
from features.backbones import Backbone, backbone_settings
from features.decoding import MAX_DECODE_HOURS, MAX_HOURS, TIME_LIMIT, Decoder, Video
from features.extraction_report import ExtractionReport, file_stamp
from features.frame_rules import DEFAULT_RULE, EARLIER_RULE
from features.onnx_backbone import OnnxBackbone
from features.pca import Projection
from features.pooling import POOLINGS
from features.store import FeatureStore, StoreWriter
from features.views import View
from files import DiskError, Lock
from utils import InputError, available_cores, one_line, printable, tune_malloc

# Frames (B, size, size, 3) uint8 -> rows (B, C).
FeatureFunction = Callable[[np.ndarray], np.ndarray]


# --- the pipeline --------------------------------------------------------------------------------


def extract(
    videos: Sequence[Video],
    compute_features: FeatureFunction,
    *,
    fps: Fraction = Fraction(1),
    frame_rule: str = DEFAULT_RULE,
    view: View | None = None,
    workers: int | None = None,
    time_limit: float = TIME_LIMIT,
    max_hours: float = MAX_HOURS,
    max_decode_hours: float = MAX_DECODE_HOURS,
    batch_sz: int = 8,
    streams: int = 1,
    threads: int = 1,
    thumbnail_size: int = 0,
    on_row: Callable[[Video], None] | None = None,
) -> Iterator[Video]:
    """Yield each video when it is finished: rows (C,) in `video.rows`, or `video.reason`.

    Videos come in the order in which they finish. Memory follows batch_sz, workers and the rows and
    thumbnails of the unfinished videos, not the length of a video. Frames of which a video has
    `known_rows` are decoded, but not computed.

    Args:
        compute_features: called on batches of exactly batch_sz frames, from `streams` threads.
        fps: frames per second to keep.
        frame_rule: which ones, an entry of FRAME_RULES.
        view: the backbone's; by default the centre, 224 pixels a side.
        workers: decoder processes; by default as many as cores.
        time_limit, max_hours, max_decode_hours: when a video is given up; see `decoding.Decoder`.
        streams, threads: batches at a time, and threads of PyTorch for each; see
            `default_parallelism`.
        thumbnail_size: pixels of the long side of the JPEGs in `video.thumbnails`; 0 makes none.
        on_row: called as on_row(video), in this thread, when a row has been added.
    """
    workers = min(workers or available_cores(), len(videos))
    limits = time_limit, max_hours, max_decode_hours
    options = {"view": view, "thumbnail_size": thumbnail_size}
    decoders = [Decoder(fps, frame_rule, *limits, **options) for _ in range(workers)]
    frame_queue = queue.Queue(2 * batch_sz)  # two batches: one in the making, one to come
    pool = ThreadPoolExecutor(streams, initializer=torch.set_num_threads, initargs=(threads,))
    pending = collections.deque()  # batches in work, oldest first: a video's rows come in order
    with pool, decoding_threads(videos, decoders, frame_queue):
        for batch in cut_batches(frame_queue, workers, batch_sz):
            images = []
            for i, (video, item) in enumerate(batch):
                if is_frame(item):
                    images.append(item)
                    batch[i] = video, COMPUTED  # releases the pixels
            future = None
            if images:  # else only known rows and videos' ends
                future = pool.submit(_full_batch, compute_features, images, batch_sz)
            pending.append((batch, future))
            if len(pending) > streams:  # the pool has enough to do
                yield from _finish_batch(*pending.popleft(), on_row)
        while pending:
            yield from _finish_batch(*pending.popleft(), on_row)


COMPUTED = object()  # in a batch, in place of a frame whose row is being computed


def is_frame(item: np.ndarray | None) -> bool:
    """Whether an item of the queue is a frame (size, size, 3): not a known row (C,), nor None."""
    return item is not None and item.ndim == 3


def _finish_batch(batch, future, on_row):
    """Hand the rows of a batch to their videos; yield videos that end.

    The batch is [(video, COMPUTED, a known row, or None at the video's end)].
    """
    rows = iter(future.result() if future else ())  # waits
    for video, item in batch:
        if item is None:
            yield video
            continue
        video.rows.append(next(rows) if item is COMPUTED else item)
        if on_row:
            on_row(video)


@contextlib.contextmanager
def decoding_threads(
    videos: Sequence[Video], decoders: Sequence[Decoder], frame_queue: queue.Queue
) -> Iterator[None]:
    """While the block runs, a thread for each decoder puts the videos' frames into the queue."""
    todo = iter(videos)  # shared by the threads: a list's iterator is thread-safe
    stop = threading.Event()
    feeders = []
    for decoder in decoders:
        arguments = frame_queue, todo, decoder, stop
        feeders.append(threading.Thread(target=feed_queue, args=arguments, daemon=True))
    try:
        for feeder in feeders:
            feeder.start()
        yield
    finally:  # also if the block breaks off
        stop.set()
        for decoder in decoders:
            decoder.kill()
        while any(feeder.is_alive() for feeder in feeders):
            with contextlib.suppress(queue.Empty):  # a feeder may wait for room in the queue
                frame_queue.get(timeout=0.05)


def feed_queue(
    frame_queue: queue.Queue, todo: Iterator[Video], decoder: Decoder, stop: threading.Event
) -> None:
    """A decoder's thread: put its frames into the queue until no video is left.

    It puts (video, frame) for each frame, or its row where that is known, (video, None) at the end
    of each video, and at last None.
    If something raises, it puts the exception, for the main thread to raise.
    """
    try:
        for video in todo:
            for i, frame in enumerate(decoder.frames(video)):
                is_known = i < len(video.known_rows)
                frame_queue.put((video, video.known_rows[i] if is_known else frame))
                if stop.is_set():
                    break
            if stop.is_set():
                return
            frame_queue.put((video, None))
        frame_queue.put(None)
    except BaseException as error:
        frame_queue.put(error)
    finally:
        decoder.close()


def cut_batches(frame_queue: queue.Queue, decoders: int, size: int) -> Iterator[list]:
    """Lists of (video, frame, known row or None) from the queue, until all decoders have ended.

    A batch has `size` frames. A batch is emitted early if it contains mostly known rows and end
    markers, so that failures are reported soon. The last batch is what is left.
    """
    batch, count = [], 0
    while decoders:
        item = frame_queue.get()
        if isinstance(item, BaseException):
            raise item
        if item is None:
            decoders -= 1
            continue
        batch.append(item)
        count += is_frame(item[1])
        if count == size or len(batch) >= 4 * size:
            yield batch
            batch, count = [], 0
    yield batch


def _full_batch(compute_features, images, size):
    """Rows of `images`, computed in a batch of `size`: its size may change a row's last bits."""
    batch = np.zeros((size, *images[0].shape), np.uint8)
    np.stack(images, out=batch[: len(images)])
    return compute_features(batch)[: len(images)]


def feature_function(
    backbone: Backbone | OnnxBackbone,
    pooling: str,
    projection: Projection | None,
    dtype: np.dtype | str,
) -> FeatureFunction:
    """The FeatureFunction of a backbone's stages, pooled, projected if given, in `dtype`.

    Frames travel to a GPU as uint8, from page-locked memory; the backbone normalises them there.
    """
    device = backbone.device

    def compute_features(frames):  # (B, size, size, 3) uint8
        x = torch.from_numpy(frames)
        if device.type == "cuda":
            with torch.cuda.device(device):  # each thread starts on GPU 0, whose memory it would be
                x = x.pin_memory()
        x = x.permute(0, 3, 1, 2)  # (B, 3, size, size), channels-last memory
        with torch.inference_mode():
            pooled = [POOLINGS[pooling](stage) for stage in backbone(x)]  # (B, c) each
            rows = torch.cat(pooled, 1)  # (B, C)
        rows = rows.cpu().numpy()
        if projection:
            rows = projection(rows)
        return rows.astype(dtype)

    return compute_features


# --- the machine's resources ---------------------------------------------------------------------


def default_parallelism(
    device: str | torch.device, cores: int, amp: str | None = None
) -> dict[str, int]:
    """Defaults of `extract` for a device: batch_sz, streams, threads per stream.

    On a CPU, float32 uses 2 threads per batch, bfloat16 1 thread per batch: 1.3 and 1.1 times
    faster than the opposite choice (ResNet-50, 2 cores). An odd core is left to decoding.

    A GPU computes one batch while the other thread fetches rows, projects them, and sends the next.
    """
    if torch.device(device).type != "cpu":
        return {"batch_sz": 64, "streams": 2, "threads": 1}
    threads = 1 if amp else min(2, cores)
    return {"batch_sz": 8, "streams": cores // threads, "threads": threads}


def resolve_resources(options: argparse.Namespace, dist: Distributed) -> None:
    """Fill in what the machine decides: device, workers, batch_sz, streams and threads."""
    tune_malloc()
    cores = max(1, available_cores() // dist.local_world_size)
    options.device = dist.device(options.device)
    options.workers = options.workers or cores
    for name, value in default_parallelism(options.device, cores, options.amp).items():
        setattr(options, name, getattr(options, name, None) or value)


# --- feature files -------------------------------------------------------------------------------


def extraction_settings(
    options: argparse.Namespace,
    backbone: Backbone | OnnxBackbone,
    projection: Projection | None,
) -> dict[str, str]:
    """What makes the features: the file's `meta`, which must agree when a run resumes."""
    return backbone_settings(backbone, options.stages, options.pooling) | {
        "pca": projection.label if projection else "none",
        "fps": str(options.fps),
        "frames": options.frames,
        "amp": options.amp or "none",
    }


def update_store(
    output: Path,
    videos: Sequence[Video],
    settings: Mapping[str, str],
    compute_features: FeatureFunction,
    *,
    dtype: str = "float16",
    retry_failed: bool = False,
    lock: Lock | None = None,
    **options,
) -> dict[str, dict]:
    """Extract the videos that the feature file `output` lacks, and write the report beside it.

    Videos whose files have changed are extracted again. Rows of files that are gone stay.

    Args:
        settings: as by `extraction_settings`.
        retry_failed: try again unchanged files that failed in an earlier run.
        lock: the lock of `output`, if the caller has it.
        options: of `extract`.

    Returns:
        {id: row of the report} of `videos`.

    Raises:
        InputError: if the file, or the spool of a stopped run, was made by other settings.
    """
    sources = {video.id: file_stamp(video.path) for video in videos}
    report = ExtractionReport(output.with_suffix(".json"), settings)
    old = _open_finished(output, settings, dtype)
    unchanged = set()  # ids whose rows stay as they are
    for name in old:
        source = sources.get(name)
        # Without a source the file is gone: its rows stay. If the report has no entry, assume the
        # stored rows are up to date.
        if not source or report.stored_source(name) in (None, source):
            unchanged.add(name)
    failed = {name for name in sources if report.failed(name, sources[name])} - unchanged
    skipped = set() if retry_failed else failed
    if skipped:
        print(
            f"skipped: {len(skipped)} videos that failed before; --retry_failed tries them again",
            file=sys.stderr,
        )

    todo = [video for video in videos if video.id not in unchanged | skipped]
    stored = set(old)
    if todo or unchanged < stored:
        present = {name: source for name, source in sources.items() if source}
        writer = StoreWriter(output, dtype, settings, present, renew=True, lock=lock)
        # Unchanged rows are copied into the spool: the finished file stays until it is replaced.
        for name in sorted(unchanged - writer.done):
            writer.add(name, old[name])
        before = len(writer.done.intersection(sources))
        if before:
            print(f"resuming: {before} of {len(videos)} videos are stored", file=sys.stderr)
        todo = [video for video in todo if video.id not in writer.done]
        stored = _extract_into(writer, todo, report, sources, compute_features, options)

    # Stored, but not reported: by a run that was killed in between, or before reports were written.
    unreported = {name for name in stored if name not in report.rows or report.failed(name)}
    lengths = FeatureStore(output).lengths if unreported else {}
    for video in videos:
        if video.id in unreported:
            report.add(video, sources[video.id], lengths[video.id])
    report.write(stored.union(sources))
    return {name: report.rows[name] for name in sources}


def _open_finished(output, settings, dtype):
    """The finished store that will be extended, or {}; InputError if it has other settings."""
    if not output.is_file():  # absent, or a pipe to write to
        return {}
    store = FeatureStore(output)
    found = {"frames": EARLIER_RULE, **store.meta, "dtype": str(store.dtype)}
    for name, value in {**settings, "dtype": dtype}.items():
        if found.get(name) != value:
            there = one_line(f"{name} {found.get(name)}")
            same = f"continue it with --frames {found[name]}, or " if name == "frames" else ""
            raise InputError(
                f"{str(output)!r} holds features of {there}, not {value}; "
                f"{same}name another --output, or remove that file"
            )
    return store


def _extract_into(writer, videos, report, sources, compute_features, options):
    """Extract `videos` into the store and the report; returns the ids that are then stored."""
    try:
        with writer, tqdm(total=len(videos), unit="video") as bar:
            for video in extract(videos, compute_features, **options):
                frames = write_video(writer, video)
                report.add(video, sources[video.id], frames)
                if video.reason:
                    reason = one_line(video.reason)
                    bar.write(f"skipped {printable(video.id)}: {reason}", file=sys.stderr)
                bar.update()
    except InputError as error:
        if writer.done or isinstance(error, DiskError):
            raise
        # All videos failed, so the writer had nothing to write: the report has the reasons.
    return writer.done


def write_video(writer: StoreWriter, video: Video) -> int:
    """Write a finished video's rows and release them; returns how many are stored.

    Rows that cannot be stored, such as a value that overflows float16, set `video.reason`.
    """
    try:
        if not video.reason:
            writer.add(video.id, np.stack(video.rows))
    except DiskError:
        raise
    except InputError as error:
        video.reason = str(error)
    frames = 0 if video.reason else len(video.rows)
    video.rows.clear()
    return frames
