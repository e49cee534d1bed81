"""Descriptors of an evaluation set's videos: encoded in batches of like length, or read from a cache on disk.

A video has one descriptor at level "video" and T at level "frame", all L2-normalised. A batch of them is a `similarity.PackedDescriptors`
a level: (n, D), or (sum T, D) with the videos' frames end to end.
"""

import hashlib
import mmap
import resource
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from distributed import Distributed
from features.store import FeatureStore, StoreWriter
from padding import bucket_by_length, frame_mask, pad
from retrieval.similarity import VIDEO_METRICS, PackedDescriptors
from utils import InputError, digest

LEVELS = ("video", "frame")
FRAMES = 8192  # frames of a batch, padding included: enough for the full matrix-product rate
WINDOWS = 16  # batches' worth of neighbours in the file among which lengths are matched, so that reading stays sequential


def crop(frames, padding_size):
    """The middle `padding_size` frames of a longer video; 0 takes all. The same on every run, unlike the released crop."""
    start = max(len(frames) - padding_size, 0) // 2 if padding_size else 0
    return frames[start : start + padding_size] if padding_size else frames


def level_of(metric):
    """The level of the descriptors that a metric compares."""
    return "video" if metric in VIDEO_METRICS else "frame"


def levels_of(encoder):
    """The levels that an encoder has descriptors of."""
    return LEVELS if encoder.has_frame_descriptors else LEVELS[:1]


def check_feature_size(encoder, store):
    if encoder.feature_size != store.feature_size:
        raise InputError(
            f"the encoder takes features of {encoder.feature_size} channels, {str(store.path)!r} has {store.feature_size};"
            " use the features (and PCA) it was trained on"
        )


class VideoEncoder:
    """Descriptors of a store's videos by an encoder.

    padding_size: frames of a video that count (`crop`), 0 for all. amp: a type to encode in under autocast (torch.bfloat16).
    frames: how many a batch holds. Descriptors are float32 on `device`.
    """

    def __init__(self, encoder, store, padding_size=300, device="cpu", amp=None, frames=FRAMES):
        self.encoder, self.store = encoder.to(device).eval(), store
        self.padding_size, self.device, self.amp, self.frames = padding_size, device, amp, frames

    def length(self, video):
        """How many frames of a video count."""
        return min(self.store.lengths[video], self.padding_size or self.store.lengths[video])

    def batches(self, videos):
        """Lists of ids to describe together: neighbours in the file, of like length.

        They depend on nothing but the videos, so dealing them out to processes changes no descriptor by a single bit.
        """
        videos, start, total = set(videos), 0, 0
        videos = [video for video in self.store if video in videos]  # in the file's order
        for end, video in enumerate(videos, 1):
            total += self.length(video)
            if total >= WINDOWS * self.frames or end == len(videos):
                window, start, total = videos[start:end], end, 0
                for batch in bucket_by_length(
                    [self.length(video) for video in window], self.frames
                ):
                    yield [window[i] for i in batch]

    @torch.inference_mode()
    def __call__(self, videos, levels):
        """{level: PackedDescriptors} of a batch of videos, in their order, from one pass of the encoder."""
        x, num_frames = pad([crop(self.store[video], self.padding_size) for video in videos])
        self.store.release_pages()
        x, num_frames = x.to(self.device), num_frames.to(self.device)
        with torch.autocast(x.device.type, self.amp, enabled=self.amp is not None):
            if "frame" not in levels:
                return {
                    "video": self._stack("video", self.encoder(x, num_frames), [1] * len(videos))
                }
            video, frames = self.encoder.encode_video_and_frames(x, num_frames)
        frames = frames[frame_mask(num_frames, frames.shape[1])]  # (sum T, D)
        found = (
            {"video": self._stack("video", video, [1] * len(videos))} if "video" in levels else {}
        )
        return found | {"frame": self._stack("frame", frames, num_frames.tolist())}

    def _stack(self, level, data, lengths):
        data = data.float()
        if not data.sum().isfinite():
            raise InputError(
                f"{level} descriptors hold NaN or infinity; is the model sound, and are {str(self.store.path)!r} its features?"
            )
        return PackedDescriptors(data, lengths)

    def batch_bytes(self, longest, frames):
        """What describing and holding a batch of so many frames may allocate; longest: frames of the longest video.

        Measured on one TCA layer: 50 bytes a channel of every frame; attention 4 bytes a pair of frames and head, of 8.
        """
        width = max(self.store.feature_size, self.encoder.descriptor_size)
        return max(frames, longest) * (58 * width + 36 * longest)

    def identity(self):
        """A digest of all that decides the descriptors: weights, settings, features, crop and precision."""
        weights = hashlib.sha256()
        for name, value in self.encoder.state_dict().items():
            weights.update(
                name.encode()
                + value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            )
        settings = [  # such as a number of heads, which no weight tells
            [
                type(module).__name__,
                {
                    name: value
                    for name, value in vars(module).items()
                    if type(value) in (int, float, bool)
                },
            ]
            for module in self.encoder.modules()
        ]
        facts = self.store.path.stat()
        unsealed = (
            [] if self.store.checksum else [facts.st_size, facts.st_mtime_ns]
        )  # rows without a checksum
        return digest(
            [
                weights.hexdigest(),
                settings,
                self.store.fingerprint(),
                unsealed,
                self.padding_size,
                str(self.amp),
            ]
        )


def describe(encoder, store, videos, video_level, padding_size=300, device="cpu", progress=False):
    """Descriptors of `videos`, in their order: (D,) arrays, or (T, D) arrays of frame descriptors; float32, all held."""
    level, found = "video" if video_level else "frame", {}
    video_encoder = VideoEncoder(encoder, store, padding_size, device)
    with tqdm(
        total=len(videos), desc="encode", unit="video", disable=not progress, leave=False
    ) as bar:
        for batch in video_encoder.batches(videos):
            data, lengths = video_encoder(batch, [level])[level]
            parts = (
                data.cpu().numpy()
                if video_level
                else [part.numpy() for part in data.cpu().split(lengths)]
            )
            found |= dict(zip(batch, parts, strict=True))
            bar.update(len(batch))
    return [found[video] for video in videos]


# --- kept on disk ----------------------------------------------------------------------------------------------------


class CachedDescriptors:
    """A video_encoder's descriptors, read from the files that `cached` made: {level: FeatureStore}. Called as the video_encoder is."""

    def __init__(self, video_encoder, stores):
        self.stores, self.device, self.encoder = stores, video_encoder.device, video_encoder.encoder
        self.length, self.batches = video_encoder.length, video_encoder.batches

    def __call__(self, videos, levels):
        found = {}
        for level in levels:
            rows = [self.stores[level][video] for video in videos]
            found[level] = PackedDescriptors(
                torch.from_numpy(np.concatenate(rows)).to(self.device), [len(part) for part in rows]
            )
            self.stores[level].release_pages()
        return found


def cache_descriptors(video_encoder, videos, levels, folder, dist=None, progress=False):
    """The video_encoder's descriptors of `videos`, from `folder`: what is not there is encoded first. Returns a `CachedDescriptors`.

    A level is one packed store, KEY-video.hdf5 (1, D a video) or KEY-frame.hdf5 (T, D), in float32 so that figures are those
    of a run without; KEY: a digest of weights, settings, features and videos, so nothing stale is read. Both levels are kept
    where the encoder has both. A run that was killed goes on where it stopped. All processes must see the folder; the first
    one writes.
    """
    dist = dist or Distributed()
    key = digest([video_encoder.identity(), sorted(videos)])
    files = {level: Path(folder) / f"{key}-{level}.hdf5" for level in levels}
    absent = dist.broadcast([level for level, file in files.items() if not file.exists()])
    if absent:
        _fill({level: files[level] for level in absent}, video_encoder, videos, dist, progress)
    return CachedDescriptors(
        video_encoder, {level: FeatureStore(file) for level, file in files.items()}
    )


def _fill(files, video_encoder, videos, dist, progress):
    """Encode `videos` on all processes; the first one writes {level: file}."""
    writers = {
        level: StoreWriter(file, "float32", {"level": level})
        for level, file in files.items()
        if dist.is_main
    }
    done = dist.broadcast(
        set.intersection(*(writer.done for writer in writers.values())) if writers else set()
    )
    todo = [batch for batch in video_encoder.batches(videos) if not done.issuperset(batch)]
    with tqdm(
        total=sum(map(len, todo)), desc="encode", unit="video", disable=not progress, leave=False
    ) as bar:
        for start in range(0, len(todo), dist.world_size):  # a round: a batch on every process
            here = todo[start : start + dist.world_size]
            with dist.exit_together_on_error():
                mine = here[dist.rank] if dist.rank < len(here) else []
                found = video_encoder(mine, files) if mine else None
            empty = torch.zeros(
                0, video_encoder.encoder.descriptor_size, device=video_encoder.device
            )
            for level in files:
                rows = dist.all_gather(found[level].data if found else empty).cpu().numpy()
                if dist.is_main:
                    _add(writers[level], sum(here, []), rows, video_encoder, level)
            bar.update(sum(map(len, here)))
    for writer in writers.values():
        with writer:  # packs
            pass
    dist.barrier()


def _add(writer, videos, rows, video_encoder, level):
    start = 0
    for video in videos:
        end = start + (video_encoder.length(video) if level == "frame" else 1)
        if video not in writer.done:
            writer.add(video, rows[start:end])
        start = end


# --- memory ----------------------------------------------------------------------------------------------------------


def resident_bytes():
    """Bytes of memory this process holds now; the most it has held where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE
    except (OSError, ValueError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def encode_distributed(encoder, store, videos, padding_size, device, dist):
    """Descriptors (N, D) of `videos` on every process. Each encodes some of the batches that one would: the same to the bit."""
    video_encoder = VideoEncoder(encoder, store, padding_size, device)
    batches = list(video_encoder.batches(videos))
    dealt = [batches[rank :: dist.world_size] for rank in range(dist.world_size)]
    parts = [video_encoder(batch, ["video"])["video"].data for batch in dealt[dist.rank]]
    empty = torch.zeros(0, encoder.descriptor_size, device=device)
    gathered = dist.all_gather(torch.cat([empty, *parts])).cpu()
    place = {
        video: i
        for i, video in enumerate(video for part in dealt for batch in part for video in batch)
    }
    return gathered[[place[video] for video in videos]]
