"""Training pairs: an anchor video, a positive, and background videos as negatives.

A video has T frames of C channels, a pair has M negatives. The random draws of a pair depend only
on (seed, epoch, pair) and on its hard negatives: they are the same on any number of processes and
in a resumed run, and differ from epoch to epoch. A negative's id is its index in `negatives`.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from untrusted import load_pickle, read_text
from utils import InputError, describe_ids, digest, seeded_rng

# --- augmentations: frames (T, C) and a NumPy generator -> frames (T', C) ---


def crop(frames, rng):
    """One piece of the video, three tenths of it or more."""
    T = len(frames)
    size = max(1, round(T * rng.uniform(0.3, 1)))
    start = rng.integers(T - size + 1)
    return frames[start : start + size]


def shuffle(frames, rng):
    """Two to four pieces in another order."""
    pieces = min(int(rng.integers(2, 5)), len(frames))
    cuts = np.sort(rng.choice(np.arange(1, len(frames)), pieces - 1, replace=False))
    parts = np.split(frames, cuts)
    return np.concatenate([parts[i] for i in rng.permutation(len(parts))])


def drop(frames, rng):
    """The video without up to half of its frames, chosen at random."""
    keep = rng.random(len(frames)) >= rng.uniform(0, 0.5)
    keep[rng.integers(len(frames))] = True  # never an empty video
    return frames[keep]


def speed(frames, rng):
    """Half to double speed: frames are repeated or skipped evenly."""
    T = max(1, round(len(frames) / 2 ** rng.uniform(-1, 1)))
    times = (np.arange(T) + 0.5) * len(frames) / T
    return frames[np.minimum(times, len(frames) - 1).astype(int)]


def noise(frames, rng):
    """Noise of up to .6 of the features' size: one offset per video, a smaller one per frame."""
    frames = np.asarray(frames, np.float32)
    size = np.float32(rng.uniform(0, 0.6) * np.sqrt(np.mean(frames**2)))
    video_offset = rng.standard_normal((1, frames.shape[1]), np.float32)
    frame_offsets = rng.standard_normal(frames.shape, np.float32)
    return frames + size * (video_offset + 0.5 * frame_offsets)


def mask(frames, rng):
    """Up to three tenths of the channels set to zero, the same ones in every frame."""
    zero = rng.random(frames.shape[1]) < rng.uniform(0, 0.3)
    return np.where(zero, 0, frames).astype(frames.dtype)


AUGMENTATIONS = {
    "crop": crop,
    "shuffle": shuffle,
    "drop": drop,
    "speed": speed,
    "noise": noise,
    "mask": mask,
}
DEFAULT_MIX = ("crop", "drop", "speed", "noise", "mask")


def augment(frames: np.ndarray, mix: Sequence[str], rng: np.random.Generator) -> np.ndarray:
    """Frames (T, C) after the augmentations of `mix`, in order, each applied half the time."""
    for name in mix:
        if rng.random() < 0.5:
            frames = AUGMENTATIONS[name](frames, rng)
    return frames


# --- pair datasets ---


class PairKey(NamedTuple):
    """All that an item's draws depend on, besides the seed."""

    index: int  # of the pair
    epoch: int
    hard_ids: np.ndarray | None  # negative ids (H,), the anchor's hard negatives if they are known


class PairDataset(Dataset):
    """One item per pair: anchor, positive and `neg_num` negatives. Subclasses define the pairs.

    Args:
        store: a FeatureStore, video id -> frames (T, C).
        pairs: [(anchor id, positive id)].
        negatives: the video ids that negatives are drawn from.
        segments: {video id: [[source, start, end], ...]}, what each video shows.
        mask_shared: whether a negative that shows the anchor's material is a false negative.
        padding_size: the number of frames that a longer video is cropped to; 0 takes all.
        random_sampling: thin a longer video to random frames instead of cropping it.
        readers: threads that read a batch's videos.

    Attributes:
        frames: video id -> what an item is drawn from: the frames (T, C) of the store, or in their
            place the numbers (T,) of the video's rows on a GPU (features/on_device.py).
        hard_negatives: each anchor's nearest negatives, ids (anchors, H), -1 where there are fewer
            than H; None if they are not known.
    """

    def __init__(
        self,
        store: Mapping[str, np.ndarray],
        pairs: list[tuple[str, str]],
        negatives: list[str],
        segments: dict | None = None,
        mask_shared: bool = False,
        padding_size: int = 300,
        neg_num: int = 16,
        seed: int = 0,
        random_sampling: bool = False,
        readers: int = 1,
    ):
        self.store, self.pairs, self.negatives = store, pairs, negatives
        self.frames = store
        self.segments, self.mask_shared = segments, mask_shared
        self.padding_size, self.random_sampling = padding_size, random_sampling
        self.neg_num, self.seed, self.readers = neg_num, seed, readers
        anchors = dict.fromkeys(anchor for anchor, _ in pairs)  # each once, in order
        self.anchors = {anchor: row for row, anchor in enumerate(anchors)}
        self.own_negatives = self._find_own_negatives()
        self.hard_negatives = None
        if mask_shared:
            self.segment_table()  # bad segments are an error now, not in the middle of a run

    def _find_own_negatives(self):
        """{anchor: ids of the negatives that are the anchor itself or a video paired with it}."""
        ids = {video: i for i, video in enumerate(self.negatives)}
        own = {}
        for anchor, other in [*self.pairs, *(pair[::-1] for pair in self.pairs)]:
            if anchor in self.anchors:
                numbers = {ids[video] for video in (anchor, other) if video in ids}
                own.setdefault(anchor, set()).update(numbers)
        return {anchor: sorted(numbers) for anchor, numbers in own.items() if numbers}

    def __len__(self):
        return len(self.pairs)

    def key(self, index: int, epoch: int = 0) -> PairKey:
        """The key of a pair's item in an epoch, with the hard negatives known now."""
        hard_ids = None
        if self.hard_negatives is not None:
            hard_ids = self.hard_negatives[self.anchors[self.pairs[index][0]]].numpy()
            hard_ids = hard_ids[hard_ids >= 0]
        return PairKey(index, epoch, hard_ids)

    def __getitem__(self, key: PairKey | int):
        """(index, anchor (T, C), positive (T, C), negative ids (M,), [M negatives (T, C)]).

        A key that is an index alone is `self.key(index)`.
        """
        index, epoch, hard_ids = key if isinstance(key, PairKey) else self.key(key)
        rng = seeded_rng(self.seed, epoch, index)
        negative_ids = self.sample_negatives(index, hard_ids, rng)
        anchor, positive = self.sample_views(index, rng)
        negatives = [self.sample_frames(self.frames[self.negatives[i]], rng) for i in negative_ids]
        return index, anchor, positive, negative_ids, negatives

    def __getitems__(self, keys):
        """A batch's items. Threads pay where the file system answers slowly."""
        if self.readers <= 1:
            return [self[key] for key in keys]
        with ThreadPoolExecutor(self.readers) as pool:
            return list(pool.map(self.__getitem__, keys))

    def sample_views(self, index, rng):
        """The frames (T, C) of a pair's anchor and of its positive."""
        anchor, positive = self.pairs[index]
        return (
            self.sample_frames(self.frames[anchor], rng),
            self.sample_frames(self.frames[positive], rng),
        )

    def sample_negatives(self, index, hard_ids, rng):
        """Distinct negative ids (M,): random ones, up to half of them hard if they are known."""
        random_ids = self.sample_random_negatives(index, rng)
        if hard_ids is None:
            return random_ids
        half = (self.neg_num + 1) // 2
        hard_ids = rng.choice(hard_ids, min(half, len(hard_ids)), replace=False)
        # the rest: random ones that were not drawn as hard ones
        others = random_ids[~np.isin(random_ids, hard_ids)]
        return np.concatenate([hard_ids, others[: self.neg_num - len(hard_ids)]])

    def sample_random_negatives(self, index, rng):
        return rng.choice(len(self.negatives), self.neg_num, replace=False)

    def sample_frames(self, frames, rng):
        """At most `padding_size` frames: a random crop, or random frames in their order."""
        T, size = len(frames), self.padding_size
        if not size or T <= size:
            return frames  # the whole video
        if self.random_sampling:
            return frames[np.sort(rng.choice(T, size, replace=False))]
        start = rng.integers(T - size + 1)
        return frames[start : start + size]

    # --- false negatives ---

    @property
    def masks_false_negatives(self):
        return self.mask_shared or bool(self.own_negatives)

    def false_negative_mask(self, indices: Sequence[int]) -> Callable | None:
        """Which bank entries are false negatives of the pairs `indices` (N,).

        Returns a function negative_ids (K,) -> (N, K) bool, or None when every entry is a negative.
        Id -1 (the bank's random initial entries) is never a false negative.
        """
        if not self.masks_false_negatives:
            return None
        rows = [self.false_negatives(self.pairs[i][0]) for i in indices]
        rows = torch.stack(rows)  # (N, negatives + 1)
        return lambda negative_ids: rows.to(negative_ids.device, non_blocking=True)[:, negative_ids]

    def false_negatives_of_anchors(self, rows: slice) -> torch.Tensor:
        """(n, negatives) bool: the false negatives of the n anchors `rows`, by negative id."""
        anchors = list(self.anchors)[rows]
        return torch.stack([self.false_negatives(anchor)[:-1] for anchor in anchors])

    def false_negatives(self, anchor: str) -> torch.Tensor:
        """(negatives + 1,) bool, by negative id. The last entry is false: id -1 reads it."""
        if self.mask_shared:
            row = self.shared_material(anchor).clone()
        else:
            row = torch.zeros(len(self.negatives) + 1, dtype=torch.bool)
        row[self.own_negatives.get(anchor, [])] = True
        return row

    @lru_cache(maxsize=1024)  # noqa: B019 - a run has one data set
    def shared_material(self, anchor):
        """(negatives + 1,) bool: true for negatives that share material with the anchor.

        They have overlapping segments of the same source.
        """
        sources, owner, source, start, end = self.segment_table()
        row = np.zeros(len(self.negatives) + 1, bool)  # the last entry stays false
        for name, a, b in self.segments.get(anchor, ()):
            overlaps = (source == sources.get(name, -1)) & (start < b) & (a < end)
            row[owner[overlaps]] = True
        return torch.from_numpy(row)

    @lru_cache(maxsize=1)  # noqa: B019
    def segment_table(self):
        """The negatives' segments: {source name: number}, then arrays with one entry per segment.

        The arrays are the negative's id, the number of its source, start and end.
        """
        if not self.segments:
            raise InputError(
                "the annotation has no 'segments', so shared material is not known;"
                " leave --mask_shared out"
            )
        ids = {video: i for i, video in enumerate(self.negatives)}
        sources, rows, video = {}, [], None
        try:
            for video, segments in self.segments.items():  # anchors' segments are checked too
                for name, start, end in segments:
                    source = sources.setdefault(name, len(sources))
                    row = ids.get(video, -1), source, float(start), float(end)
                    if video in ids:  # others may be anchors, which need no row
                        rows.append(row)
        except (TypeError, ValueError, AttributeError, ArithmeticError):
            where = "" if video is None else f"; see those of {video!r}"
            raise InputError(
                f"the annotation's segments are not {{id: [[source, start, end], ...]}}{where}"
            ) from None
        if not (rows and self.anchors.keys() & self.segments.keys()):
            raise InputError(
                "the annotation's segments are of no negative or of no anchor, so nothing would be"
                f" masked: {describe_ids([*self.anchors, *self.negatives], self.segments)}"
            )
        owner, source, start, end = np.array(rows).T
        return sources, owner.astype(int), source, start, end


class VCDBPairDataset(PairDataset):
    """Pairs of VCDB's copies, with its background videos as negatives.

    Pairs and negatives without features are left out, and counted in `missing`; so are pairs of a
    video with itself, counted in `self_pairs`. A negative that is the anchor, or is
    paired with it, is masked for this anchor (`own_negatives`).

    Args:
        annotation_path: a pickle {"video_pairs": [{"videos": [a, b], "overlap": [x, y]}],
            "negs": [ids], "segments": optional}.
        min_overlap: pairs whose smaller overlap is below it are left out.

    Raises InputError on a file of another form, or when no pair or fewer than `neg_num` negatives
    are left.
    """

    def __init__(
        self,
        annotation_path: str | Path,
        store: Mapping[str, np.ndarray],
        min_overlap: float = 0.0,
        neg_num: int = 16,
        **options,
    ):
        listed, listed_negatives, segments = read_vcdb_annotation(annotation_path)
        with_features = [pair for pair in listed if pair[0] in store and pair[1] in store]
        pairs = [(a, b) for a, b, overlap in with_features if overlap >= min_overlap and a != b]
        negatives = [video for video in listed_negatives if video in store]
        if not pairs or len(negatives) < neg_num:
            flag = "--neg_num" if pairs else "--min_overlap"
            raise InputError(
                f"{len(pairs)} of {len(listed)} pairs and {len(negatives)} of"
                f" {len(listed_negatives)} negatives of {str(annotation_path)!r} can be used with"
                f" {str(store.path)!r}; a pair and {neg_num} negatives are needed;"
                f" {_remedy(flag, [*_ids_of(listed), *listed_negatives], store)}"
            )
        super().__init__(store, pairs, negatives, segments, neg_num=neg_num, **options)
        self.self_pairs = sum(a == b for a, b, _ in listed)
        self.missing = {
            "pairs": len(listed) - len(with_features),
            "negatives": len(listed_negatives) - len(negatives),
        }
        self.digest = digest([self.pairs, self.negatives, self.segments])


class AugmentedPairDataset(PairDataset):
    """Pairs without annotation: each video is an anchor, its positive is made from its own frames.

    All other videos are negatives; a video is never its own negative.

    Args:
        annotation_path: a text file with one id per line, or a pickle of VCDB's form, of which the
            ids and segments are read; without it, all videos of the store.
        mix: names of augmentations.
    """

    def __init__(
        self,
        store: Mapping[str, np.ndarray],
        annotation_path: str | Path | None = None,
        mix: Sequence[str] = DEFAULT_MIX,
        neg_num: int = 16,
        **options,
    ):
        listed, segments = read_video_list(annotation_path, store)
        videos = [video for video in listed if video in store]
        if len(videos) <= neg_num:
            raise InputError(
                f"{len(videos)} of {len(listed)} videos have features in {str(store.path)!r};"
                f" a video and {neg_num} others are needed; {_remedy('--neg_num', listed, store)}"
            )
        pairs = [(video, video) for video in videos]
        super().__init__(store, pairs, videos, segments, neg_num=neg_num, **options)
        self.mix, self.self_pairs = list(mix), 0  # the pairs are meant
        missing = len(listed) - len(videos)
        self.missing = {"pairs": missing, "negatives": missing}
        self.digest = digest([videos, segments])

    def sample_views(self, index, rng):
        frames = self.frames[self.pairs[index][0]]
        anchor = self.sample_frames(frames, rng)
        return anchor, self.sample_frames(augment(frames, self.mix, rng), rng)

    def sample_random_negatives(self, index, rng):
        ids = rng.choice(len(self.negatives) - 1, self.neg_num, replace=False)
        return ids + (ids >= index)  # skips the anchor itself


def _remedy(flag, expected, store):
    """What to do where too few videos have features: the end of a message."""
    if all(video in store for video in expected):
        return f"lower {flag}, or give more videos"
    return f"see to the ids, or lower {flag}: {describe_ids(expected, store)}"


def _ids_of(pairs):
    """The videos of (anchor, positive, ...) tuples, each once."""
    return dict.fromkeys(video for pair in pairs for video in pair[:2])


VCDB_FORM = '{"video_pairs": [{"videos": [id, id], "overlap": [.8, .5]}, ...], "negs": [id, ...]}'


def read_vcdb_annotation(path):
    """([(anchor, positive, smaller overlap)], [negatives], segments or None) of VCDB's pickle."""
    annotation = load_pickle(path)
    pairs, part = [], "video_pairs"
    try:
        for number, pair in enumerate(annotation["video_pairs"]):
            part = f"video_pairs[{number}]"
            anchor, positive = _texts(pair["videos"])
            pairs.append((anchor, positive, float(min(pair.get("overlap", [1.0])))))
        part = "negs"
        negatives = _texts(annotation["negs"])
        if isinstance(annotation["negs"], set | frozenset):
            negatives.sort()  # a set's order depends on the hash seed
        part = "segments"
        segments = annotation.get("segments")
        digest(segments)  # raises what it cannot hold, now
        return pairs, list(dict.fromkeys(negatives)), segments
    except (TypeError, LookupError, AttributeError, ValueError, ArithmeticError):
        raise InputError(
            f"annotation file {str(path)!r} is not of VCDB's form: its {part} is missing or not as"
            f" in {VCDB_FORM}"
        ) from None


def _texts(ids):
    """The ids as a list; TypeError unless they are a collection of texts."""
    if isinstance(ids, str | bytes) or not all(isinstance(video, str) for video in ids):
        raise TypeError(f"{str(ids)[:40]} are not ids")
    return list(ids)


def read_video_list(path, store):
    """([video ids], segments or None) of a list or an annotation; of the store without either."""
    if path is None:
        return sorted(store), None
    if Path(path).suffix in (".pickle", ".pkl"):
        pairs, negatives, segments = read_vcdb_annotation(path)
        videos = list(_ids_of(pairs))
        return list(dict.fromkeys(videos + negatives)), segments
    lines = read_text(path, "list of ids", "or give a .pickle of VCDB's form").split("\n")
    return list(dict.fromkeys(line.strip() for line in lines if line.strip())), None


# --- hard negatives ---


def nearest_negatives(
    anchors: torch.Tensor,
    negatives: torch.Tensor,
    count: int,
    excluded: Callable | None = None,
) -> torch.Tensor:
    """The `count` nearest negatives of each anchor by cosine similarity.

    Args:
        anchors: descriptors (A, D).
        negatives: descriptors (B, D).
        excluded: a function slice of A -> (n, B) bool, true for an anchor's false negatives.

    Returns int64 (A, count) negative ids, nearest first, -1 where fewer are left.
    """
    nearest = torch.full((len(anchors), count), -1)
    for start in range(0, len(anchors), 256):  # bounds the memory
        rows = slice(start, start + 256)
        similarities = anchors[rows] @ negatives.T  # (256, B)
        if excluded is not None:
            similarities.masked_fill_(excluded(rows).to(similarities.device), -torch.inf)
        values, ids = similarities.topk(min(count, len(negatives)), dim=1)
        nearest[rows, : ids.shape[1]] = ids.masked_fill(values == -torch.inf, -1)
    return nearest
