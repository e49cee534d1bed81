"""Videos to rows of frame features: decoders, backbone and pooling at once, and what became of every video."""

import collections
import contextlib
import json
import os
import queue
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import utils
from distributed import check_device
from features.decoding import TIME_LIMIT, Decoder
from features.pooling import POOLINGS
from features.store import FeatureStore, StoreWriter
from utils import InputError

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
        if (
            count == size or len(batch) >= 4 * size
        ):  # many ends and few frames: broken videos are told soon
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
    fps, frames: which frames (see FRAME_RULES). workers: decoder dist, by default as many as cores.
    watch: called with (video, frame) of every frame, a video's own in order, before its features are made.
    Videos come as they finish; memory follows batch_sz, workers and the rows of the videos under way.
    """
    workers = min(workers or os.cpu_count(), len(videos))
    waiting, todo, stop = (
        queue.Queue(2 * batch_sz),
        iter(videos),
        threading.Event(),
    )  # threads may share a list's iterator
    decoders = [Decoder(fps, frames, time_limit) for _ in range(workers)]
    feeders = [
        threading.Thread(target=decode_into, args=(waiting, todo, d, stop), daemon=True)
        for d in decoders
    ]
    pending = (
        collections.deque()
    )  # batches under way, oldest first, so a video's rows come in order

    def finished():
        batch, future = pending.popleft()
        rows = iter(future.result() if future else ())
        for video, has_frame in batch:
            if has_frame:
                video.rows.append(next(rows))
            else:
                yield video

    with ThreadPoolExecutor(
        streams, initializer=torch.set_num_threads, initargs=(threads,)
    ) as pool:
        try:
            for feeder in feeders:
                feeder.start()
            for batch in cut_batches(waiting, workers, batch_sz):
                images = [image for _, image in batch if image is not None]
                for video, image in batch if watch else ():
                    if image is not None:
                        watch(video, image)
                batch = [(video, image is not None) for video, image in batch]  # lets the pixels go
                pending.append(
                    (
                        batch,
                        pool.submit(_whole_batch, features, images, batch_sz) if images else None,
                    )
                )
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
        x = torch.from_numpy(frames).permute(
            0, 3, 1, 2
        )  # (B, 3, 224, 224), channels last as it lies
        with torch.inference_mode():
            rows = torch.cat([POOLINGS[pooling](stage) for stage in backbone(x)], 1)  # (B, C)
        rows = rows.cpu().numpy()
        return (projection(rows) if projection else rows).astype(dtype)

    return features


# --- what becomes of a collection ---


def part_of(video, n):
    """Which of n shards has the video of this id: told by the id alone, so that it stays when others come or go."""
    return int(utils.digest(video), 16) % n


def default_parallelism(device, cores, amp=None):
    """{batch_sz, streams, threads} for a backbone on `device` in `amp`, where this process may use so many cores.

    That is frames in a batch, batches at once, and threads of each. On a CPU two threads share a batch in float32, and one
    has a batch to itself in bfloat16: with ResNet-50 on two cores 1.3 and 1.1 times as fast as the other way round. An odd
    core is left to decoding.
    """
    if torch.device(device).type != "cpu":
        return {"batch_sz": 64, "streams": 1, "threads": 1}
    threads = 1 if amp else min(2, cores)
    return {"batch_sz": 8, "streams": cores // threads, "threads": threads}


def resolve_resources(options, dist):
    """Fill in what the machine decides: the device, how many decoders, and what is at once."""
    utils.tune_malloc()
    cores = max(1, os.cpu_count() // dist.local_world_size)
    options.device = check_device(dist.local_device(options.device))
    options.workers = options.workers or cores
    for name, value in default_parallelism(options.device, cores, options.amp).items():
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


def update_store(output, videos, settings, features, options):
    """Add to the store `output` what it lacks of `videos`, and report; returns {id: the report's row} of `videos`.

    What is done is left alone, and so is what the store holds of files that are gone; a file that has changed is done again.
    """
    sources, report = (
        {video.id: identity(video.path) for video in videos},
        ExtractionReport(output.with_suffix(".json"), settings),
    )
    old = open_finished(output, settings, options.dtype)
    kept = {
        name
        for name in old
        if not sources.get(name) or report.stored(name) in (None, sources[name])
    }
    failed = {name for name in sources if report.failed(name, sources[name])} - kept
    left_out = set() if options.retry_failed else failed
    if left_out:
        print(
            f"left out: {len(left_out)} videos that failed before; --retry_failed tries them again",
            file=sys.stderr,
        )
    todo, done = [video for video in videos if video.id not in kept | left_out], set(old)
    if todo or kept < done:
        present = {name: source for name, source in sources.items() if source}
        writer = StoreWriter(output, options.dtype, settings, present, renew=True)
        for name in sorted(
            kept - writer.done
        ):  # first into the spool: the finished file is replaced whole, or stays
            writer.add(name, old.read_verified(name))
        before = len(writer.done.intersection(sources))
        if before:
            print(f"going on: {before} of {len(videos)} videos were done before", file=sys.stderr)
        todo = [video for video in todo if video.id not in writer.done]
        done = run_through(todo, writer, report, sources, features, options)
    untold = {name for name in done if name not in report.rows or report.failed(name)}
    lengths = FeatureStore(output).lengths if untold else {}
    for video in videos:
        if (
            video.id in untold
        ):  # done by a run that was killed before it told, or that stood before there were reports
            report.add(video, sources[video.id], lengths[video.id])
    report.write(done.union(sources))
    return {name: report.rows[name] for name in sources}


def run_through(videos, writer, report, sources, features, options):
    """Extract `videos` into `writer` and `report`; returns the ids that the store then holds."""
    names = ("fps", "frames", "workers", "time_limit", "batch_sz", "streams", "threads")
    try:
        with writer, tqdm(total=len(videos), unit="video") as bar:
            for video in extract(
                videos, features, **{name: getattr(options, name) for name in names}
            ):
                report.add(video, sources[video.id], write(writer, video))
                if video.reason:
                    bar.write(f"skipped {video.id}: {video.reason}", file=sys.stderr)
                bar.update()
    except InputError:  # the writer's, when it was given nothing: the report tells
        if writer.done:
            raise
    return writer.done


class ExtractionReport:
    """What became of every video: NAME.json at the end, NAME.json.part until then. An earlier run's rows are read first.

    rows {id: {"path", "source" (its `identity`), "status" ("ok" or "failed"), "frames", "seconds" (None where only an earlier
    run knew), "corrupt_packets", "reason"}}
    Raises InputError where NAME.json is somebody else's.
    """

    def __init__(self, path, settings):
        self.path, self.settings, self._log = path, settings, Path(f"{path}.part")
        self._finished = self._read()
        self.rows = dict(self._finished)
        for line in (
            self._log.read_text(encoding="utf-8").splitlines() if self._log.exists() else ()
        ):
            with contextlib.suppress(
                ValueError
            ):  # a line that was being written when the run was killed
                name, its_settings, row = json.loads(line)
                if its_settings == utils.digest(settings):
                    self.rows[name] = row

    def _read(self):
        """The rows of NAME.json; of other settings they tell nothing."""
        if not self.path.exists():
            return {}
        try:
            report = json.loads(self.path.read_text(encoding="utf-8"))
            return report["videos"] if report["settings"] == self.settings else {}
        except (ValueError, KeyError, TypeError):
            raise InputError(
                f"{str(self.path)!r}, where the report goes, is no report; move it, or name another --output"
            ) from None

    def stored(self, name):
        """The source of what the finished store holds of a video: a killed run's log speaks of its spool."""
        return self._finished.get(name, {}).get("source")

    def failed(self, name, source=None):
        """Whether the latest try failed (and, if given, was of this `source`)."""
        row = self.rows.get(name, {})
        return row.get("status") == "failed" and source in (None, row["source"])

    def add(self, video, source, frames):
        self.rows[video.id] = {
            "path": str(video.path),
            "source": source,
            "status": "failed" if video.reason else "ok",
            "frames": frames,
            "seconds": None if video.seconds is None else round(video.seconds, 3),
            "corrupt_packets": video.corrupt_packets,
            "reason": video.reason,
        }
        with open(
            self._log, "a", encoding="utf-8"
        ) as log:  # the newline first: it ends a line that was cut short
            log.write(
                "\n" + json.dumps([video.id, utils.digest(self.settings), self.rows[video.id]])
            )

    def write(self, names):
        """The report of the videos `names`, in place of the log, where there is anything new."""
        if not self._log.exists():
            return
        rows = {name: self.rows[name] for name in sorted(names) if name in self.rows}
        utils.write_json(
            self.path, {**utils.provenance(), "settings": self.settings, "videos": rows}
        )
        self._log.unlink()
