"""Features and training pairs; the door to the evaluation sets (evaluation_sets.py).

N videos, T frames, C channels. A feature file holds one (T, C) array a video, one frame a second.
"""

import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h5py
import numpy as np
import torch
from torch.utils.data import Dataset

from evaluation_sets import EVALUATION_SETS, evaluation_set
from utils import InputError, atomic, digest, existing, load_pickle, remove_leftovers, rng

__all__ = ["EVALUATION_SETS", "FeatureStore", "StoreWriter", "VCDBPairDataset", "collate_pairs", "evaluation_set", "pad"]


# --- features --------------------------------------------------------------------------------------------------------


class FeatureStore(Mapping):
    """Video id -> (T, C) float array, from an HDF5 file of either layout, found by looking.

    - the released layout: one dataset (T, C) a video, named by its id (ids may hold slashes);
    - the packed layout of `StoreWriter`: `frames (sum T, C)` contiguous, `offsets (N+1,)`, `ids (N,)`. It is read through a
      memory map, so a slice costs no copy and data-loading workers share its pages.

    Attributes: `path`, `lengths` (id -> T), `channels` (C), `meta` (the file's attributes). Rows come in the
    stored type.
    Raises InputError, naming file and id, for a missing id, an empty video, another width, or a NaN or infinite value.
    """

    def __init__(self, path, channels=None):
        self.path = existing(path, "feature file")
        self._handle = None, None
        file = self._open()
        self.meta = {name: _plain(value) for name, value in file.attrs.items()}
        self._frames = None
        packed = [file.get(name) for name in ("frames", "offsets", "ids")]
        if all(isinstance(item, h5py.Dataset) for item in packed):
            shapes = self._open_packed(*packed)
        else:
            shapes = {}
            file.visititems(lambda name, item: shapes.update({name: item.shape}) if isinstance(item, h5py.Dataset) else None)
        if not shapes:
            raise InputError(f"feature file {str(path)!r} holds no video; extract features into it first")
        self.channels = channels or next((shape[-1] for shape in shapes.values() if shape), 0)
        for video, shape in shapes.items():
            if len(shape) != 2 or shape[1] != self.channels or not shape[0]:
                raise InputError(
                    f"feature file {str(path)!r}: video {video!r} has shape {tuple(shape)}, expected (T, {self.channels})"
                    " with T >= 1; pass the width the features have (--pca_components), or extract that video again"
                )
        self.lengths = {video: shape[0] for video, shape in shapes.items()}

    def _open(self):
        """The HDF5 file, opened once in each process: handles do not survive a fork."""
        owner, file = self._handle
        if owner != os.getpid():
            try:
                file = h5py.File(self.path, "r")
            except OSError as error:
                reason = str(error).splitlines()[0]
                raise InputError(f"feature file {str(self.path)!r} is not HDF5 or was cut short ({reason})") from None
            self._handle = os.getpid(), file
        return file

    def _open_packed(self, frames, offsets, ids):
        offsets, ids = offsets[:], ids.asstr()[:]
        ends = [*offsets[:1], *offsets[-1:]]
        if len(offsets) != len(ids) + 1 or frames.ndim != 2 or ends != [0, len(frames)] or (np.diff(offsets) < 0).any():
            raise InputError(f"feature file {str(self.path)!r}: offsets, ids and frames do not fit together; write it again")
        if frames.chunks is None and frames.id.get_offset() is not None:  # contiguous: map it
            start = frames.id.get_offset()
            frames = np.memmap(self.path, frames.dtype, "r", start, frames.shape)
        self._frames = frames
        self._bounds = {video: (int(a), int(b)) for video, a, b in zip(ids, offsets, offsets[1:], strict=False)}
        if len(self._bounds) < len(ids):
            raise InputError(f"feature file {str(self.path)!r} names a video twice; write it again")
        return {video: (b - a, frames.shape[1]) for video, (a, b) in self._bounds.items()}

    def __getitem__(self, video):
        """The (T, C) rows of `video`."""
        if video not in self.lengths:
            raise InputError(f"feature file {str(self.path)!r} has no video {video!r}")
        rows = self._open()[video][:] if self._frames is None else self._frames[slice(*self._bounds[video])]
        if not np.isfinite(rows).all():
            raise InputError(f"feature file {str(self.path)!r}: video {video!r} holds NaN or infinity; extract it again")
        return rows

    def fingerprint(self):
        """A digest of what the features are and of a sample of their values, to tell one file's content from another's."""
        some = list(self.lengths)[:: len(self.lengths) // 1000 + 1]
        sample = [np.asarray(self[video][0], np.float32).tobytes().hex() for video in some]
        return digest([self.channels, self.lengths, sample])

    def __contains__(self, video):
        return video in self.lengths

    def __iter__(self):
        return iter(self.lengths)

    def __len__(self):
        return len(self.lengths)


def _plain(value):
    """An HDF5 attribute as a value that JSON can hold."""
    value = value.tolist() if isinstance(value, np.generic | np.ndarray) else value
    return value.decode(errors="replace") if isinstance(value, bytes) else value


class StoreWriter:
    """Writes the packed layout, so that a run killed at any moment loses nothing that was added.

    Frames go to `PATH.part`, one journal line a video to `PATH.part.jsonl`; a clean end of the `with` block packs them into
    contiguous HDF5 at PATH by rename. A later writer of the same path and `meta` goes on: `done` holds the ids already there.
    `sources` {id: text} says what each video's features are made from (its file's size and time, say): a spool that holds a
    video of other origin is refused, InputError.

        with StoreWriter("features.hdf5", meta={"backbone": "resnet50"}) as store:
            store.add("video id", frames)  # (T, C)
    """

    def __init__(self, path, dtype="float16", meta=None, sources=None):
        self._sources = sources
        self.path, self.dtype, self.meta = Path(path), np.dtype(dtype), dict(meta or {})
        self.path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path)
        self._spool, self._journal = Path(f"{path}.part"), Path(f"{path}.part.jsonl")
        header = {"dtype": self.dtype.name, "meta": self.meta}
        lines = self._read_journal()
        if not lines or lines[0] != header:  # nothing there, or made by another command
            lines = [header]
            self._journal.write_text(json.dumps(header) + "\n", encoding="utf-8")
            self._spool.write_bytes(b"")
        self._rows = lines[1:]  # [{"id", "T", "C"}]
        self.done = {row["id"] for row in self._rows}
        for row in self._rows:
            if sources is not None and sources.get(row["id"]) != row["source"]:
                raise InputError(
                    f"{str(self._spool)!r}, left by a stopped run, holds video {row['id']!r} as it was then, and the input has"
                    f" changed; remove {str(self._journal)!r} to start anew"
                )
        size = sum(row["T"] * row["C"] for row in self._rows) * self.dtype.itemsize
        self._data, self._log = open(self._spool, "r+b"), open(self._journal, "a", encoding="utf-8")
        self._data.truncate(size)  # a video that was being written when the run was killed
        self._data.seek(size)

    def _read_journal(self):
        """The journal's complete lines whose frames are all in the spool; the rest is cut off."""
        if not (self._journal.exists() and self._spool.exists()):
            return []
        lines, kept, left = [], 0, self._spool.stat().st_size
        for raw in self._journal.read_bytes().splitlines(keepends=True):
            try:
                line = json.loads(raw) if raw.endswith(b"\n") else None
            except ValueError:
                line = None
            left -= line.get("T", 0) * line.get("C", 0) * self.dtype.itemsize if line else 0
            if line is None or left < 0:
                break
            lines.append(line)
            kept += len(raw)
        os.truncate(self._journal, kept)
        return lines

    def add(self, video, frames):
        """Append a video's `frames` (T, C); InputError when it is empty, of another width, not finite, or there already."""
        frames = np.ascontiguousarray(frames, self.dtype)
        width = self._rows[0]["C"] if self._rows else frames.shape[-1]
        if frames.ndim != 2 or not len(frames) or frames.shape[1] != width:
            raise InputError(f"video {video!r}: features of shape {frames.shape}, expected (T, {width}) with T >= 1")
        if not np.isfinite(frames).all():
            raise InputError(f"video {video!r}: features hold NaN or infinity (or overflow {self.dtype})")
        if video in self.done:
            raise InputError(f"video {video!r} is given twice")
        self._data.write(frames.tobytes())
        self._data.flush()  # frames before the journal line that vouches for them
        row = {"id": video, "T": len(frames), "C": width, "source": (self._sources or {}).get(video)}
        self._log.write(json.dumps(row) + "\n")
        self._log.flush()
        self._rows.append(row)
        self.done.add(video)

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        self._data.close()
        self._log.close()
        if kind is None:
            if not self._rows:
                self._remove_spool()
                raise InputError(f"no video was written, so there is no {str(self.path)!r}")
            self._pack()
            self._remove_spool()

    def _pack(self):
        rows = sorted(self._rows, key=lambda row: row["id"])  # the same file whatever order videos finished in
        offset = dict(zip((row["id"] for row in self._rows), np.cumsum([0] + [row["T"] for row in self._rows]), strict=False))
        spool = np.memmap(self._spool, self.dtype, "r").reshape(-1, rows[0]["C"])
        with atomic(self.path) as temporary, h5py.File(temporary, "w") as file:
            file.attrs.update(self.meta)
            file["ids"] = np.array([row["id"] for row in rows], dtype=h5py.string_dtype())
            file["offsets"] = np.cumsum([0] + [row["T"] for row in rows])
            frames = file.create_dataset("frames", spool.shape, self.dtype)
            for row, start in zip(rows, file["offsets"][:], strict=False):
                frames[start : start + row["T"]] = spool[offset[row["id"]] : offset[row["id"]] + row["T"]]

    def _remove_spool(self):
        self._spool.unlink()
        self._journal.unlink()


# --- training --------------------------------------------------------------------------------------------------------


class VCDBPairDataset(Dataset):
    """Anchor, positive and `neg_num` random background videos: one item a pair of VCDB copies.

    annotation_path: a pickle of VCDB's form, {"video_pairs": [{"videos": [a, b], "overlap": [x, y]}], "negs": [ids]}; with
    "segments": {id: [[source, start, end], ...]} it also tells which videos share material (see `shares`).
    store: the FeatureStore; pairs and negatives without features are left out and counted in `missing`.
    padding_size: a longer video is cropped to so many frames at a random place, or thinned to so many random frames with
    `random_sampling`; 0 takes all. min_overlap: pairs whose smaller overlap is below it are left out.

    What an item draws depends on (seed, epoch, pair) alone: it is the same on any number of processes and on a resumed run,
    and another in every epoch (`set_epoch`).
    """

    def __init__(
        self,
        annotation_path,
        store,
        padding_size=300,
        neg_num=16,
        seed=0,
        random_sampling=False,
        min_overlap=0.0,
        readers=1,
    ):
        annotation = load_pickle(annotation_path)
        try:
            pairs = [
                (a, b, float(min(pair.get("overlap", [1.0]))))
                for pair in annotation["video_pairs"]
                for a, b in [pair["videos"]]
            ]
            negatives = list(dict.fromkeys(annotation["negs"]))
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise InputError(
                f"annotation file {str(annotation_path)!r} is not of VCDB's form (video_pairs, negs): {error!r}"
            ) from None
        self.pairs = [(a, b) for a, b, overlap in pairs if a in store and b in store and overlap >= min_overlap]
        self.negatives = [video for video in negatives if video in store]
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
        self.store, self.padding_size, self.neg_num, self.readers = store, padding_size, neg_num, readers
        self.seed, self.random_sampling, self.epoch = seed, random_sampling, 0
        self.segments = annotation.get("segments")
        self.digest = digest([self.pairs, self.negatives, self.segments])
        self._shared = None

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, index):
        """index -> (pair index, anchor (T, C), positive (T, C), negative numbers (M,), [negatives (T, C)])."""
        draw = rng(self.seed, self.epoch, index)
        numbers = draw.choice(len(self.negatives), self.neg_num, replace=False)
        anchor, positive, *negatives = (
            self._crop(self.store[video], draw) for video in (*self.pairs[index], *(self.negatives[n] for n in numbers))
        )
        return index, anchor, positive, numbers, negatives

    def __getitems__(self, indices):
        """A batch's items, read by `readers` threads (worth it where the file system answers slowly)."""
        if self.readers <= 1:
            return [self[i] for i in indices]
        with ThreadPoolExecutor(self.readers) as pool:
            return list(pool.map(self.__getitem__, indices))

    def _crop(self, frames, draw):
        T, size = len(frames), self.padding_size
        if not size or T <= size:
            return frames
        if self.random_sampling:
            return frames[np.sort(draw.choice(T, size, replace=False))]
        start = draw.integers(T - size + 1)
        return frames[start : start + size]

    def shares(self, indices):
        """For the pairs `indices` (N,): a function bank numbers (K,) -> (N, K) bool, true where that negative shows material
        of the anchor's film, by the annotation's segments. Number -1 (the bank's random start) shares nothing."""
        if self._shared is None:
            self._shared = self._shared_material()
        rows = torch.stack([self._shared[self.pairs[i][0]] for i in indices])  # (N, negatives + 1)
        return lambda numbers: rows.to(numbers.device)[:, numbers]

    def _shared_material(self):
        """Anchor id -> (negatives + 1,) bool; the last column, which number -1 reads, is false."""
        if not self.segments:
            raise InputError("the annotation has no 'segments', so shared material is not known; leave --mask_shared out")
        owner, source, start, end = [], [], [], []
        try:
            for number, video in enumerate(self.negatives):
                for name, a, b in self.segments.get(video, ()):
                    owner.append(number), source.append(name), start.append(float(a)), end.append(float(b))
        except (TypeError, ValueError, AttributeError) as error:
            raise InputError(f"the annotation's segments are not {{id: [[source, start, end], ...]}}: {error!r}") from None
        owner, source, start, end = np.array(owner, int), np.array(source), np.array(start), np.array(end)
        shared = {}
        for anchor in {a for a, _ in self.pairs}:
            row = np.zeros(len(self.negatives) + 1, bool)
            for name, a, b in self.segments.get(anchor, ()):
                row[owner[(source == name) & (start < b) & (a < end)]] = True
            shared[anchor] = torch.from_numpy(row)
        return shared


def pad(videos):
    """A list of (T, C) arrays -> x (N, longest T, C) float32, num_frames (N,) int64."""
    num_frames = torch.tensor([len(video) for video in videos])
    x = np.zeros((len(videos), int(num_frames.max()), videos[0].shape[1]), np.float32)
    for row, video in zip(x, videos, strict=True):
        row[: len(video)] = video
    return torch.from_numpy(x), num_frames


def collate_pairs(items):
    """Items of VCDBPairDataset -> (indices (N,), anchors, positives, negatives, numbers (N*M,)); videos as `pad` gives them."""
    indices, anchors, positives, numbers, negatives = zip(*items, strict=True)
    flat = [video for group in negatives for video in group]
    return list(indices), pad(anchors), pad(positives), pad(flat), torch.from_numpy(np.concatenate(numbers))
