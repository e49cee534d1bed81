"""Descriptors of a collection of videos, encoded in batches of similar length or read from a cache.

A video has one descriptor at level "video" and T at level "frame", all L2-normalised. Those of
several videos come as one `PackedDescriptors` per level.
"""

import hashlib
import mmap
import resource
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from distributed import Distributed
from features.store import FeatureStore, StoreWriter
from padding import bucket_by_length, bucket_rule, pack, pad, pad_packed, unpad
from retrieval.similarity import VIDEO_METRICS, PackedDescriptors
from retrieval.transfer import AHEAD, is_cuda, read_ahead
from utils import InputError, digest

LEVELS = ("video", "frame")

# Sort by length only within windows of 16 batches of consecutive videos, so that reading stays
# sequential.
WINDOW_BATCHES = 16


def level_of(metric: str) -> str:
    """The level of the descriptors that a metric compares."""
    return "video" if metric in VIDEO_METRICS else "frame"


def levels_of(encoder: nn.Module) -> Sequence[str]:
    """The levels at which an encoder has descriptors."""
    return LEVELS if encoder.has_frame_descriptors else LEVELS[:1]


def check_feature_size(encoder: nn.Module, store: FeatureStore) -> None:
    if encoder.feature_size != store.feature_size:
        raise InputError(
            f"the encoder takes features of {encoder.feature_size} channels,"
            f" {str(store.path)!r} has {store.feature_size};"
            " use the features (and PCA) it was trained on"
        )


def require_frame_descriptors(encoder: nn.Module, device: str = "cpu") -> None:
    """Raise the encoder's own InputError, before work begins, if it has no frame descriptors."""
    x = torch.zeros(1, 1, encoder.feature_size, device=device)
    encoder.encode(x, torch.ones(1, dtype=torch.long))


def crop(rows: np.ndarray, padding_size: int) -> np.ndarray:
    """The middle `padding_size` frames of rows (T, C), or all where there are fewer; 0 keeps all.

    The released code crops at random; this crop is the same on every run.
    """
    if not padding_size:
        return rows
    start = max(len(rows) - padding_size, 0) // 2
    return rows[start : start + padding_size]


class VideoEncoder:
    """Encodes the videos of a feature store.

    To a GPU features travel as they are stored, packed, from page-locked memory, and are padded
    there. Reading the next batches goes on meanwhile (`stream`).

    Args:
        padding_size: frames of a video that count (`crop`); 0 for all.
        amp: type to encode in under autocast (torch.bfloat16). Descriptors are float32.
        batch_frames: frames of a batch, padding included; by default what suits the device.
    """

    def __init__(
        self,
        encoder: nn.Module,
        store: FeatureStore,
        padding_size: int = 300,
        device: str = "cpu",
        amp: torch.dtype | None = None,
        batch_frames: int | None = None,
    ):
        self.encoder = encoder.to(device).eval()
        self.store = store
        self.padding_size = padding_size
        self.device = device
        self.amp = amp
        self.packs = torch.device(device).type != "cpu"  # batches travel packed
        max_frames, self.slack = bucket_rule(device)
        self.batch_frames = batch_frames or max_frames

    def length(self, video: str) -> int:
        """How many frames of a video count."""
        length = self.store.lengths[video]
        return min(length, self.padding_size or length)

    def batches(self, videos: Iterable[str]) -> Iterator[list[str]]:
        """Split videos into batches: neighbours in the file, of similar length, each video once.

        The batches depend on the videos alone. Any number of processes can share them without
        changing a bit of a descriptor.
        """
        videos = set(videos)
        window, frames = [], 0
        for video in self.store:  # in the file's order
            if video not in videos:
                continue
            window.append(video)
            frames += self.length(video)
            if frames >= WINDOW_BATCHES * self.batch_frames:
                yield from self._bucket(window)
                window, frames = [], 0
        if window:
            yield from self._bucket(window)

    def _bucket(self, window):
        lengths = [self.length(video) for video in window]
        for batch in bucket_by_length(lengths, self.batch_frames, self.slack):
            yield [window[i] for i in batch]

    def __call__(
        self, videos: Sequence[str], levels: Iterable[str]
    ) -> dict[str, PackedDescriptors]:
        """{level: descriptors} of a batch of videos, in their order, from one pass."""
        return self.encode(self.read(videos), levels)

    def stream(
        self, batches: Iterable[Sequence[str]], levels: Iterable[str]
    ) -> Iterator[dict[str, PackedDescriptors]]:
        """Yield {level: descriptors} of each batch; batches to come are read meanwhile."""
        for features in read_ahead(self.read, batches, self.device):
            yield self.encode(features, levels)

    def read(self, videos: Sequence[str]) -> tuple[Tensor, Tensor]:
        """The features of a batch on the host, padded or packed, and num_frames (n,)."""
        rows = [crop(self.store[video], self.padding_size) for video in videos]
        features = pack(rows, pin=is_cuda(self.device)) if self.packs else pad(rows)
        self.store.release_pages()  # mapped pages count as memory of this process
        return features

    @torch.inference_mode()
    def encode(
        self, features: tuple[Tensor, Tensor], levels: Iterable[str]
    ) -> dict[str, PackedDescriptors]:
        """{level: descriptors} of what `read` gave."""
        x, num_frames = features
        if self.packs:
            x = pad_packed(x.to(self.device, non_blocking=True), num_frames)  # (n, T, C)
        frames = None
        with torch.autocast(x.device.type, self.amp, enabled=self.amp is not None):
            if "frame" in levels:
                video, frames = self.encoder.encode_video_and_frames(x, num_frames)
            else:
                video = self.encoder(x, num_frames)  # (n, D)

        descriptors = {}
        if "video" in levels:
            descriptors["video"] = self._pack("video", video, [1] * len(num_frames))
        if frames is not None:  # (n, T, D)
            rows = unpad(frames, num_frames)  # (sum T, D)
            descriptors["frame"] = self._pack("frame", rows, num_frames.tolist())
        return descriptors

    def _pack(self, level, rows, lengths):
        rows = rows.float()
        if not rows.sum().isfinite():  # one NaN or infinity makes the sum so
            raise InputError(
                f"{level} descriptors hold NaN or infinity;"
                f" is the model sound, and are {str(self.store.path)!r} its features?"
            )
        return PackedDescriptors(rows, lengths)

    def host_bytes(self, longest: int, frames: int) -> int:
        """Bytes of the host that batches take while a GPU encodes: those read ahead."""
        row = self.store.dtype.itemsize * self.store.feature_size
        return (AHEAD + 2) * max(frames, longest) * row

    def batch_bytes(self, longest: int, frames: int) -> int:
        """Bytes that encoding a batch and its descriptors may take, on the encoder's device.

        Measured on one TCA layer: 50 bytes for each channel of a frame, and in attention 4 bytes
        for each pair of frames and each of 8 heads.

        Args:
            longest: frames of the longest video.
            frames: frames of the batch.
        """
        width = max(self.store.feature_size, self.encoder.descriptor_size)
        return max(frames, longest) * (58 * width + 36 * longest)

    def identity(self) -> str:
        """A digest of all that decides the descriptors: weights, settings, features, crop, type.

        Settings are the plain attributes of each module, such as the number of heads, which no
        weight shows. They come with the name of the module's class.
        """
        weights = hashlib.sha256()
        for name, value in self.encoder.state_dict().items():
            value = value.cpu().contiguous().reshape(-1).view(torch.uint8)
            weights.update(name.encode() + value.numpy().tobytes())
        settings = []
        for module in self.encoder.modules():
            attributes = vars(module).items()
            plain = {name: value for name, value in attributes if type(value) in (int, float, bool)}
            settings.append([type(module).__name__, plain])
        file = []
        if not self.store.checksum:  # the fingerprint then covers a sample of the rows
            stat = self.store.path.stat()
            file = [stat.st_size, stat.st_mtime_ns]
        features = [self.store.fingerprint(), file]
        # This digest names the cache files: changing the list invalidates existing caches.
        return digest([weights.hexdigest(), settings, *features, self.padding_size, str(self.amp)])


# --- all processes together ---------------------------------------------------------------------


def encode_collection(
    video_encoder: VideoEncoder,
    batches: Sequence[Sequence[str]],
    levels: Iterable[str],
    dist: Distributed,
    progress: bool = False,
) -> Iterator[tuple[list[str], dict[str, PackedDescriptors]]]:
    """Encode batches of videos on all processes, in rounds of one batch per process.

    Yields, on every process alike, the videos of a round and {level: their descriptors} on the CPU.
    Every process must consume all rounds.
    """
    device, D = video_encoder.device, video_encoder.encoder.descriptor_size
    total = sum(map(len, batches))
    own_descriptors = video_encoder.stream(batches[dist.rank :: dist.world_size], levels)
    with tqdm(total=total, desc="encode", unit="video", disable=not progress, leave=False) as bar:
        for start in range(0, len(batches), dist.world_size):
            shared = batches[start : start + dist.world_size]  # fewer in the last round
            own = {}
            with dist.exit_together_on_error():
                if dist.rank < len(shared):
                    own = next(own_descriptors)
            videos = [video for batch in shared for video in batch]
            descriptors = {}
            for level in levels:
                rows = own[level].data if own else torch.zeros(0, D, device=device)
                rows = dist.all_gather(rows).cpu()  # (n, D) of all processes, by rank
                lengths = [1] * len(videos)
                if level == "frame":
                    lengths = [video_encoder.length(video) for video in videos]
                descriptors[level] = PackedDescriptors(rows, lengths)
            yield videos, descriptors
            bar.update(len(videos))


def encode_distributed(
    encoder: nn.Module,
    store: FeatureStore,
    videos: Sequence[str],
    padding_size: int,
    device: str,
    dist: Distributed,
) -> Tensor:
    """Video descriptors (N, D) of `videos`, in their order, on every process.

    They are the same, to the bit, for any number of processes.
    """
    video_encoder = VideoEncoder(encoder, store, padding_size, device)
    batches = list(video_encoder.batches(videos))
    order, parts = [], []
    for names, descriptors in encode_collection(video_encoder, batches, ["video"], dist):
        order += names
        parts.append(descriptors["video"].data)
    # Batches come in the file's order.
    row = {video: i for i, video in enumerate(order)}
    return torch.cat(parts)[[row[video] for video in videos]]


# --- the cache ----------------------------------------------------------------------------------


class CachedDescriptors:
    """Descriptors read from a cache: called like the VideoEncoder that they were made by."""

    def __init__(self, video_encoder: VideoEncoder, stores: dict[str, FeatureStore]):
        self.stores = stores  # {level: store}
        self.encoder = video_encoder.encoder
        self.device = video_encoder.device
        self.length = video_encoder.length
        self.batches = video_encoder.batches

    def __call__(
        self, videos: Sequence[str], levels: Iterable[str]
    ) -> dict[str, PackedDescriptors]:
        return self._to_device(self._read(videos, levels))

    def stream(
        self, batches: Iterable[Sequence[str]], levels: Iterable[str]
    ) -> Iterator[dict[str, PackedDescriptors]]:
        for descriptors in read_ahead(
            lambda batch: self._read(batch, levels), batches, self.device
        ):
            yield self._to_device(descriptors)

    def _read(self, videos, levels):
        """{level: (rows, lengths)} on the host."""
        descriptors = {}
        for level in levels:
            rows = [self.stores[level][video] for video in videos]
            descriptors[level] = pack(rows, pin=is_cuda(self.device))
            self.stores[level].release_pages()
        return descriptors

    def _to_device(self, descriptors):
        packed = {}
        for level, (data, lengths) in descriptors.items():
            data = data.to(self.device, non_blocking=True)
            packed[level] = PackedDescriptors(data, lengths.tolist())
        return packed


def cache_descriptors(
    video_encoder: VideoEncoder,
    videos: Sequence[str],
    levels: Iterable[str],
    folder: str | Path,
    dist: Distributed | None = None,
    progress: bool = False,
) -> CachedDescriptors:
    """The descriptors of `videos` in `folder`; those that are missing are encoded first.

    Each level is one packed store: KEY-video.hdf5 with (1, D) per video, and KEY-frame.hdf5
    with (T, D).
    KEY is a digest of weights, settings, features and videos, so nothing stale is read. Values are
    float32: results are those of a run without a cache. A run that was killed resumes. All
    processes must see the folder; the main process writes.
    """
    dist = dist or Distributed()
    key = digest([video_encoder.identity(), sorted(videos)])
    files = {level: Path(folder) / f"{key}-{level}.hdf5" for level in levels}
    # Decided by the main process, so that all processes take the same branch.
    absent = dist.broadcast([level for level, file in files.items() if not file.exists()])
    if absent:
        absent = {level: files[level] for level in absent}
        _write_cache(absent, video_encoder, videos, dist, progress)
    stores = {level: FeatureStore(file) for level, file in files.items()}
    return CachedDescriptors(video_encoder, stores)


def _write_cache(files, video_encoder, videos, dist, progress):
    """Encode `videos` on all processes; the main process writes {level: file}."""
    writers, done = {}, set()
    with dist.exit_together_on_error():  # another run may be writing this cache
        if dist.is_main:
            for level, file in files.items():
                writers[level] = StoreWriter(file, "float32", {"level": level})
            done = set.intersection(*(set(writer.done) for writer in writers.values()))
    done = dist.broadcast(done)
    batches = []  # without those that a killed run has stored
    for batch in video_encoder.batches(videos):
        if not done.issuperset(batch):
            batches.append(batch)
    for names, descriptors in encode_collection(video_encoder, batches, files, dist, progress):
        for level, writer in writers.items():
            rows, lengths = descriptors[level]
            for video, part in zip(names, rows.split(lengths), strict=True):
                if video not in writer.done:
                    writer.add(video, part.numpy())
    for writer in writers.values():
        with writer:
            pass  # the end of the block packs the rows into the file
    dist.barrier()


# --- memory -------------------------------------------------------------------------------------


def resident_bytes(libraries: bool = True) -> int:
    """Bytes of this process's resident memory, or its peak where the system lacks /proc.

    libraries: count pages of files too. CUDA maps libraries by the gigabyte, which the system
    drops and reads again as it needs.
    """
    try:
        _, resident, shared, *_ = map(int, Path("/proc/self/statm").read_text().split())
        return (resident if libraries else resident - shared) * mmap.PAGESIZE
    except (OSError, ValueError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
