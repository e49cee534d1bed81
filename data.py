"""Features; the door to the training pairs (pairs.py) and the evaluation sets (evaluation_sets.py).

N videos, T frames, C channels. A feature file holds one (T, C) array a video, one frame a second.
"""

import hashlib
import json
import mmap
import os
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import h5py
import numpy as np

from evaluation_sets import EVALUATION_SETS, evaluation_set
from pairs import VCDBPairDataset, collate_pairs, pad
from utils import InputError, atomic, digest, existing, remove_leftovers

__all__ = ["EVALUATION_SETS", "FeatureStore", "StoreWriter", "VCDBPairDataset", "collate_pairs", "evaluation_set", "pad"]


# --- features --------------------------------------------------------------------------------------------------------


class FeatureStore(Mapping):
    """Video id -> (T, C) array of numbers, from an HDF5 file of either layout, found by looking.

    - the released layout: one dataset (T, C) a video, named by its id (ids may hold slashes). Other groups' region features
      (T, R, C) are averaged over their regions, and a notice says so;
    - the packed layout of `write_store`: `frames (sum T, C)` contiguous, `offsets (N+1,)`, `ids (N,)`. It is read through a
      memory map, so a slice costs no copy and data-loading workers share its pages.

    channels: the width that is asked for; by default that of most videos. skip_bad: leave out a video of another width, an
    empty one and one that holds no numbers, instead of raising; `bad` has their reasons.
    Attributes: `path`, `lengths` (id -> T), `channels` (C), `dtype`, `meta` (the file's attributes), `checksum` (that of
    `write_store`, or None), `bad` (id -> reason). Rows come in the stored type.
    Raises InputError, naming file and id, for a missing id, a bad video, or a NaN or infinite value.
    """

    def __init__(self, path, channels=None, skip_bad=False):
        self.path = existing(path, "feature file")
        self._handle, self._frames = (None, None), None
        found, self.meta = self._scan()
        self.checksum = self.meta.pop("checksum", None)
        if not found:
            raise InputError(f"feature file {str(path)!r} holds no video; extract features into it first")
        widths = Counter(shape[-1] for shape, _ in found.values() if shape)
        self.channels = channels or max(widths, key=widths.get, default=0)
        good = {video for video, (shape, dtype) in found.items() if self._fits(shape, dtype)}
        self.bad = {
            video: f"has shape {shape} of {dtype}, expected numbers (T, {self.channels}) with T >= 1"
            for video, (shape, dtype) in found.items()
            if video not in good
        }
        if not good or (self.bad and not skip_bad):
            video = next(iter(self.bad))
            raise InputError(
                f"feature file {str(path)!r}: video {video!r} {self.bad[video]}; pass the width the features have"
                " (--pca_components), or extract that video again"
            )
        self.lengths = {video: shape[0] for video, (shape, _) in found.items() if video in good}
        self.dtype = np.result_type(*{found[video][1] for video in good})
        regions = sorted({found[video][0][1] for video in good if len(found[video][0]) == 3})
        if regions:
            many = " or ".join(map(str, regions))
            print(f"notice: {str(path)!r}: region features (T, {many}, C) are averaged over their regions", file=sys.stderr)

    def _fits(self, shape, dtype):
        return len(shape) in (2, 3) and shape[-1] == self.channels and 0 not in shape and dtype.kind in "fiu"

    def _scan(self):
        """{id: (shape, dtype)} of what the file holds, and its attributes."""
        file = self._open()
        packed, found = [file.get(name) for name in ("frames", "offsets", "ids")], {}
        if all(isinstance(item, h5py.Dataset) for item in packed):
            found = self._open_packed(*packed)
        else:
            file.visititems(lambda name, item: found.update(_described(name, item)))
        return found, {name: _plain(value) for name, value in file.attrs.items()}

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
        return {video: ((b - a, frames.shape[1]), frames.dtype) for video, (a, b) in self._bounds.items()}

    def _read(self, video):
        return self._open()[video][:] if self._frames is None else self._frames[slice(*self._bounds[video])]

    def read(self, video):
        """The (T, C) rows of `video` as they are stored, not checked for NaN; regions averaged."""
        rows = self._read(video)
        return rows if rows.ndim == 2 else rows.mean(1, dtype=np.result_type(rows, np.float32)).astype(rows.dtype)

    def __getitem__(self, video):
        """The (T, C) rows of `video`."""
        if video not in self.lengths:
            reason = f"video {video!r} {self.bad[video]}" if video in self.bad else f"it has no video {video!r}"
            raise InputError(f"feature file {str(self.path)!r}: {reason}")
        rows = self.read(video)
        if not _finite(rows):
            raise InputError(f"feature file {str(self.path)!r}: video {video!r} holds NaN or infinity; extract it again")
        return rows

    def release(self):
        """Let go of the mapped pages read so far, which count as this process's memory until the kernel wants them back."""
        if isinstance(self._frames, np.memmap):
            self._frames._mmap.madvise(mmap.MADV_DONTNEED)

    def checksums(self):
        """{id: checksum of its rows} as stored by `write_store` (or, one dataset a video, by convert.py); else empty."""
        file = self._open()
        if self._frames is None:
            return {video: file[video].attrs["checksum"] for video in self.lengths if "checksum" in file[video].attrs}
        return dict(zip(self._bounds, file["checksums"].asstr()[:], strict=True)) if "checksums" in file else {}

    def fingerprint(self):
        """A digest that tells one file's content from another's: the stored checksum, which covers every value, beside the
        lengths and a sample of the values, which also tell a file that has no checksum or was edited under it."""
        some = list(self.lengths)[:: len(self.lengths) // 1000 + 1]
        sample = [np.asarray(self[video][0], np.float32).tobytes().hex() for video in some]
        return digest([self.checksum, self.channels, self.lengths, sample])

    def __contains__(self, video):
        return video in self.lengths

    def __iter__(self):
        return iter(self.lengths)

    def __len__(self):
        return len(self.lengths)


def _described(name, item):
    return {name: (item.shape, item.dtype)} if isinstance(item, h5py.Dataset) else {}


def _finite(rows):
    """Whether no value is NaN or infinite. In float16 NumPy's isfinite takes 20 times as long as looking at the exponents."""
    if rows.dtype == np.float16:
        return not (rows.view(np.uint16) & 0x7C00 == 0x7C00).any()
    return bool(np.isfinite(rows).all())


def _plain(value):
    """An HDF5 attribute as a value that JSON can hold."""
    value = value.tolist() if isinstance(value, np.generic | np.ndarray) else value
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def checked(video, rows, dtype):
    """`rows` (T, C) of `video` as a contiguous array of `dtype`; InputError for a value that is not finite in it."""
    with np.errstate(over="ignore"):
        rows = np.ascontiguousarray(rows, dtype)
    if not _finite(rows):
        raise InputError(f"video {video!r}: features hold NaN or infinity (or overflow {rows.dtype})")
    return rows


def rows_checksum(rows):
    """The SHA-256 of a video's contiguous rows, cut to 64 bits: against accidents, not against forgery."""
    return hashlib.sha256(rows).hexdigest()[:16]


def store_checksum(dtype, channels, lengths, sums):
    """The checksum of a whole store from those of its rows: the same whatever its layout and the order of its videos.

    lengths {id: T}, sums {id: rows_checksum}.
    """
    return digest([np.dtype(dtype).name, channels, {video: [int(T), sums[video]] for video, T in lengths.items()}])


def write_store(path, lengths, read, dtype, channels, meta):
    """Write the packed layout, whole or not at all: lengths {id: T}; read(id) -> the (T, C) rows, asked for once each.

    Videos lie in the order of their ids. `checksums` holds one of each video's rows, the attribute `checksum` one of all.
    """
    ids = sorted(lengths)  # the same file whatever order videos came in
    offsets, sums = np.cumsum([0] + [lengths[video] for video in ids]), {}
    with atomic(path) as temporary, h5py.File(temporary, "w") as file:
        frames = file.create_dataset("frames", (offsets[-1], channels), dtype)
        for video, start, end in zip(ids, offsets, offsets[1:], strict=False):
            rows = np.ascontiguousarray(read(video))
            frames[start:end] = rows
            sums[video] = rows_checksum(rows)
        file["ids"] = np.array(ids, dtype=h5py.string_dtype())
        file["offsets"] = offsets
        file["checksums"] = np.array([sums[video] for video in ids], "S16")
        file.attrs.update({**meta, "checksum": store_checksum(dtype, channels, lengths, sums)})


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
        frames = np.asarray(frames)
        width = self._rows[0]["C"] if self._rows else frames.shape[-1]
        if frames.ndim != 2 or not len(frames) or frames.shape[1] != width:
            raise InputError(f"video {video!r}: features of shape {frames.shape}, expected (T, {width}) with T >= 1")
        if video in self.done:
            raise InputError(f"video {video!r} is given twice")
        frames = checked(video, frames, self.dtype)
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
        lengths, width = {row["id"]: row["T"] for row in self._rows}, self._rows[0]["C"]
        start = dict(zip(lengths, np.cumsum([0, *lengths.values()]), strict=False))
        spool = np.memmap(self._spool, self.dtype, "r").reshape(-1, width)
        write_store(self.path, lengths, lambda v: spool[start[v] : start[v] + lengths[v]], self.dtype, width, self.meta)

    def _remove_spool(self):
        self._spool.unlink()
        self._journal.unlink()
