"""Training pairs: an anchor, a positive, and background videos as negatives; the same on any number of dist.

N videos, T frames, C channels, M negatives an item. What an item draws depends on (seed, epoch, pair) alone: it is the same
on any number of processes and on a resumed run, and another in every epoch (`set_epoch`).
"""

from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from padding import pack
from utils import InputError, digest, load_pickle, require_path, seeded_rng

# --- augmentations


def crop(frames, draw):
    """An excerpt: three tenths of the video or more, in one piece."""
    T = len(frames)
    size = max(1, round(T * draw.uniform(0.3, 1)))
    start = draw.integers(T - size + 1)
    return frames[start : start + size]


def shuffle(frames, draw):
    """Two to four pieces in another order."""
    pieces = min(int(draw.integers(2, 5)), len(frames))
    cuts = np.sort(draw.choice(np.arange(1, len(frames)), pieces - 1, replace=False))
    parts = np.split(frames, cuts)
    return np.concatenate([parts[i] for i in draw.permutation(len(parts))])


def drop(frames, draw):
    """Up to half of the frames left out, here and there."""
    keep = draw.random(len(frames)) >= draw.uniform(0, 0.5)
    keep[draw.integers(len(frames))] = True
    return frames[keep]


def speed(frames, draw):
    """Played at half to double speed: frames repeated or skipped evenly."""
    T = max(1, round(len(frames) / 2 ** draw.uniform(-1, 1)))
    return frames[np.minimum((np.arange(T) + 0.5) * len(frames) / T, len(frames) - 1).astype(int)]


def noise(frames, draw):
    """Another rendering: one offset for the whole video and a smaller one a frame, up to six tenths of the features' size."""
    frames = np.asarray(frames, np.float32)
    size = draw.uniform(0, 0.6) * np.sqrt(np.mean(frames**2))
    offset = draw.standard_normal((1, frames.shape[1]), np.float32)
    return frames + np.float32(size) * (
        offset + 0.5 * draw.standard_normal(frames.shape, np.float32)
    )


def mask(frames, draw):
    """Up to three tenths of the channels at zero, the same in every frame."""
    return np.where(draw.random(frames.shape[1]) < draw.uniform(0, 0.3), 0, frames).astype(
        frames.dtype
    )


AUGMENTATIONS = {
    "crop": crop,
    "shuffle": shuffle,
    "drop": drop,
    "speed": speed,
    "noise": noise,
    "mask": mask,
}
DEFAULT_MIX = ("crop", "drop", "speed", "noise", "mask")


def augment(frames, mix, draw):
    """frames (T, C) through each augmentation of `mix` in its order, each with a chance of one half."""
    for name in mix:
        if draw.random() < 0.5:
            frames = AUGMENTATIONS[name](frames, draw)
    return frames


# --- pairs


class PairDataset(Dataset):
    """Anchor, positive and `neg_num` negatives: one item a pair. A subclass says what the pairs are and what they show.

    pairs: [(anchor id, positive id)]; negatives: the ids that negatives are drawn from, numbered by their place.
    store: the FeatureStore. padding_size: a longer video is cropped to so many frames at a random place, or thinned to so
    many random frames with `random_sampling`; 0 takes all. segments: {id: [[source, start, end], ...]}, what videos show.
    """

    def __init__(
        self, store, pairs, negatives, padding_size=300, neg_num=16, seed=0, random_sampling=False, readers=1, segments=None
    ):  # fmt: skip
        self.store, self.pairs, self.negatives, self.segments = store, pairs, negatives, segments
        self.padding_size, self.neg_num, self.readers = padding_size, neg_num, readers
        self.seed, self.random_sampling, self.epoch = seed, random_sampling, 0
        self.anchors = {
            anchor: row for row, anchor in enumerate(dict.fromkeys(anchor for anchor, _ in pairs))
        }
        self.mined = None  # (anchors, H) int: each anchor's nearest negatives by number, -1 where there are fewer

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, index):
        """index -> (pair index, anchor (T, C), positive (T, C), negative numbers (M,), [negatives (T, C)])."""
        draw = seeded_rng(self.seed, self.epoch, index)
        numbers = self._numbers(index, draw)
        anchor, positive = self.views(index, draw)
        return (
            index,
            anchor,
            positive,
            numbers,
            [self._crop(self.store[self.negatives[n]], draw) for n in numbers],
        )

    def __getitems__(self, indices):
        """A batch's items, read by `readers` threads (worth it where the file system answers slowly)."""
        if self.readers <= 1:
            return [self[i] for i in indices]
        with ThreadPoolExecutor(self.readers) as pool:
            return list(pool.map(self.__getitem__, indices))

    def views(self, index, draw):
        """The anchor's and the positive's frames (T, C) of pair `index`."""
        anchor, positive = (self._crop(self.store[video], draw) for video in self.pairs[index])
        return anchor, positive

    def _numbers(self, index, draw):
        """Numbers (M,) of distinct negatives: at random, but up to half of them among the anchor's mined ones, if there are."""
        numbers = self._random(index, draw)
        if self.mined is None:
            return numbers
        near = self.mined[self.anchors[self.pairs[index][0]]]
        near = near[near >= 0]
        near = draw.choice(near, min((self.neg_num + 1) // 2, len(near)), replace=False)
        return np.concatenate([near, numbers[~np.isin(numbers, near)][: self.neg_num - len(near)]])

    def _random(self, index, draw):
        return draw.choice(len(self.negatives), self.neg_num, replace=False)

    def _crop(self, frames, draw):
        T, size = len(frames), self.padding_size
        if not size or T <= size:
            return frames
        if self.random_sampling:
            return frames[np.sort(draw.choice(T, size, replace=False))]
        start = draw.integers(T - size + 1)
        return frames[start : start + size]

    # --- what is no negative ---

    def shares(self, indices):
        """For the pairs `indices` (N,): a function bank numbers (K,) -> (N, K) bool, true where that negative shows material
        of the anchor's film, by the annotation's segments. Number -1 (the bank's random start) shares nothing."""
        rows = torch.stack([self.shared(self.pairs[i][0]) for i in indices])  # (N, negatives + 1)
        return lambda numbers: rows.to(numbers.device)[:, numbers]

    @lru_cache(maxsize=1024)  # noqa: B019 - a run has one data set
    def shared(self, anchor):
        """(negatives + 1,) bool, by number; the last entry, which number -1 reads, is false."""
        names, owner, source, start, end = self._material()
        row = np.zeros(len(self.negatives) + 1, bool)
        for name, a, b in self.segments.get(anchor, ()):
            row[owner[(source == names.get(name, -1)) & (start < b) & (a < end)]] = True
        return torch.from_numpy(row)

    @lru_cache(maxsize=1)  # noqa: B019
    def _material(self):
        """The negatives' segments as arrays: numbers of their sources, and a negative, source, start and end a segment."""
        if not self.segments:
            raise InputError(
                "the annotation has no 'segments', so shared material is not known; leave --mask_shared out"
            )
        names, rows, number = {}, [], {video: i for i, video in enumerate(self.negatives)}
        try:
            for (
                video,
                parts,
            ) in self.segments.items():  # anchors' too: they must be sound before training starts
                for name, a, b in parts:
                    rows.append(
                        (
                            number.get(video, -1),
                            names.setdefault(name, len(names)),
                            float(a),
                            float(b),
                        )
                    )
        except (TypeError, ValueError, AttributeError) as error:
            raise InputError(
                f"the annotation's segments are not {{id: [[source, start, end], ...]}}: {error!r}"
            ) from None
        rows = np.array([row for row in rows if row[0] >= 0] or np.zeros((0, 4)))
        owner, source, start, end = rows.T
        return names, owner.astype(int), source, start, end


class VCDBPairDataset(PairDataset):
    """Pairs of VCDB's copies, with its background videos as negatives.

    annotation_path: a pickle of VCDB's form, {"video_pairs": [{"videos": [a, b], "overlap": [x, y]}], "negs": [ids]}; with
    "segments" it also tells which videos share material (see `shares`). Pairs and negatives without features are left out
    and counted in `missing`. min_overlap: pairs whose smaller overlap is below it are left out. Raises InputError on a file
    of another form, or when fewer than a pair and `neg_num` negatives are left.
    """

    def __init__(
        self, annotation_path, store, padding_size=300, neg_num=16, seed=0, random_sampling=False, min_overlap=0.0, readers=1
    ):  # fmt: skip
        annotation = load_pickle(annotation_path)
        pairs, negatives = _vcdb(annotation, annotation_path)
        super().__init__(
            store,
            [(a, b) for a, b, overlap in pairs if a in store and b in store and overlap >= min_overlap],
            [video for video in negatives if video in store],
            padding_size, neg_num, seed, random_sampling, readers, annotation.get("segments"),
        )  # fmt: skip
        self.missing = {
            "pairs": sum(a not in store or b not in store for a, b, _ in pairs),
            "negatives": len(negatives) - len(self.negatives),
        }
        if not self.pairs or len(self.negatives) < neg_num:
            raise InputError(
                f"{len(self.pairs)} of {len(pairs)} pairs and {len(self.negatives)} of {len(negatives)} negatives of"
                f" {str(annotation_path)!r} can be used with {str(store.path)!r}; a pair and {neg_num} negatives are needed:"
                " do the ids of the two files agree?"
            )
        self.digest = digest([self.pairs, self.negatives, self.segments])


def _vcdb(annotation, path):
    """([(anchor, positive, smaller overlap)], [negatives]) of an annotation of VCDB's form."""
    try:
        pairs = [
            (a, b, float(min(pair.get("overlap", [1.0]))))
            for pair in annotation["video_pairs"]
            for a, b in [pair["videos"]]
        ]
        negatives = annotation["negs"]
        return pairs, list(
            dict.fromkeys(
                sorted(negatives) if isinstance(negatives, set | frozenset) else negatives
            )
        )
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise InputError(
            f"annotation file {str(path)!r} is not of VCDB's form (video_pairs, negs): {error!r}"
        ) from None


class AugmentedPairDataset(PairDataset):
    """Every video is an anchor, its positive is made from its own frames (`augment.py`), and all others are negatives.

    For those who hold videos and no annotation. annotation_path: a text file with an id a line, or a pickle of VCDB's form,
    whose pairs are not read, only its ids and segments; by default all videos of the store. mix: names of augmentations.
    mask_shared: segments, too, tell what is no negative. A video is never its own negative.
    """

    def __init__(
        self, store, annotation_path=None, mix=DEFAULT_MIX, mask_shared=False, padding_size=300, neg_num=16, seed=0,
        random_sampling=False, readers=1,
    ):  # fmt: skip
        videos, segments = _own_videos(store, annotation_path)
        here = [video for video in videos if video in store]
        super().__init__(
            store,
            [(video, video) for video in here],
            here,
            padding_size,
            neg_num,
            seed,
            random_sampling,
            readers,
            segments,
        )
        self.mix, self.mask_shared = list(mix), mask_shared
        self.missing = {"pairs": len(videos) - len(here), "negatives": len(videos) - len(here)}
        if len(here) <= neg_num:
            raise InputError(
                f"{len(here)} of {len(videos)} videos have features in {str(store.path)!r}; a video and {neg_num} others are"
                " needed: do the ids agree? Or lower --neg_num"
            )
        self.digest = digest([here, segments])

    def views(self, index, draw):
        frames = self.store[self.pairs[index][0]]
        return self._crop(frames, draw), self._crop(augment(frames, self.mix, draw), draw)

    def _random(self, index, draw):
        numbers = draw.choice(len(self.negatives) - 1, self.neg_num, replace=False)
        return numbers + (numbers >= index)  # any but itself

    def shares(self, indices):
        own = torch.tensor(indices)[:, None]
        material = super().shares(indices) if self.mask_shared else None

        def function(numbers):
            same = own.to(numbers.device) == numbers  # (N, K)
            return same | material(numbers) if material else same

        return function

    @lru_cache(maxsize=1024)  # noqa: B019
    def shared(self, anchor):
        row = (
            super().shared(anchor).clone()
            if self.mask_shared
            else torch.zeros(len(self.negatives) + 1, dtype=torch.bool)
        )
        row[self.anchors[anchor]] = True
        return row


def _own_videos(store, path):
    """(ids, segments) that an annotation of either form names; all ids of the store without one."""
    if path is None:
        return sorted(store), None
    if Path(path).suffix in (".pickle", ".pkl"):
        annotation = load_pickle(path)
        pairs, negatives = _vcdb(annotation, path)
        return list(
            dict.fromkeys([video for a, b, _ in pairs for video in (a, b)] + negatives)
        ), annotation.get("segments")
    try:
        lines = require_path(path, "list of ids").read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise InputError(
            f"list of ids {str(path)!r} is no text; give an id a line, or a .pickle of VCDB's form"
        ) from None
    return list(dict.fromkeys(line.strip() for line in lines if line.strip())), None


# --- batches


def collate_pairs(items):
    """Items of a PairDataset -> (indices, anchors, positives, negatives, numbers (N*M,)); videos as `pack` gives them."""
    indices, anchors, positives, numbers, negatives = zip(*items, strict=True)
    flat = [video for group in negatives for video in group]
    return (
        list(indices),
        pack(anchors),
        pack(positives),
        pack(flat),
        torch.from_numpy(np.concatenate(numbers)),
    )


# --- hard negatives


def nearest_negatives(anchors, negatives, count, excluded=None):
    """(A, count) int64 numbers of each anchor's nearest negatives, nearest first, -1 where fewer are left.

    anchors (A, D), negatives (B, D): descriptors. excluded: a function rows (slice of A) -> (n, B) bool, true where a
    negative is none for that anchor.
    """
    out = torch.full((len(anchors), count), -1)
    for start in range(0, len(anchors), 256):
        rows = slice(start, start + 256)
        similarities = anchors[rows] @ negatives.T  # (256, B)
        if excluded is not None:
            similarities.masked_fill_(excluded(rows), -torch.inf)
        values, numbers = similarities.topk(min(count, len(negatives)), dim=1)
        out[rows, : numbers.shape[1]] = numbers.masked_fill(values == -torch.inf, -1)
    return out
