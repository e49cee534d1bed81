"""Features; the door to the training pairs (pairs.py) and the evaluation sets (evaluation_sets.py).

N videos, T frames, C channels. A feature file holds one (T, C) array a video, one frame a second.
"""

import fcntl
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

from utils import InputError, atomic, digest, remove_leftovers, require_path

# --- features --------------------------------------------------------------------------------------------------------


class FeatureStore(Mapping):
    """Video id -> (T, C) array of numbers, from an HDF5 file of either layout, found by looking.

    - the released layout: one dataset (T, C) a video, named by its id (ids may hold slashes). Other groups' region features
      (T, R, C) are averaged over their regions, and a notice says so;
    - the packed layout of `write_store`: `frames (sum T, C)` contiguous, `offsets (N+1,)`, `ids (N,)`. It is read through a
      memory map, so a slice costs no copy and data-loading workers share its pages.

    feature_size: the width that is asked for; by default that of most videos. skip_bad: leave out a video of another width, an
    empty one and one that holds no numbers, instead of raising; `bad` has their reasons.
    Attributes: `path`, `lengths` (id -> T), `feature_size` (C), `dtype`, `meta` (the file's attributes), `checksum` (that of
    `write_store`, or None), `bad` (id -> reason). Rows come in the stored type.
    Raises InputError, naming file and id, for a missing id, a bad video, or a NaN or infinite value.
    """

    def __init__(self, path, feature_size=None, skip_bad=False):
        self.path = require_path(path, "feature file")
        self._handle, self._frames, self._sums = (None, None), None, None
        found, self.meta = self._scan()
        self.checksum = self.meta.pop("checksum", None)
        if not found:
            raise InputError(
                f"feature file {str(path)!r} holds no video; extract features into it first"
            )
        widths = Counter(shape[-1] for shape, _ in found.values() if shape)
        self.feature_size = feature_size or max(widths, key=widths.get, default=0)
        good = {video for video, (shape, dtype) in found.items() if self._fits(shape, dtype)}
        wanted = f"(T, {self.feature_size})"
        self.bad = {
            video: dtype
            if isinstance(dtype, str)
            else f"has shape {shape} of {dtype}, expected numbers {wanted} with T >= 1"
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
            print(
                f"notice: {str(path)!r}: region features (T, {many}, C) are averaged over their regions",
                file=sys.stderr,
            )

    def _fits(self, shape, dtype):
        return (
            len(shape) in (2, 3)
            and shape[-1] == self.feature_size
            and 0 not in shape
            and dtype.kind in "fiu"
        )

    def _scan(self):
        """{id: (shape, dtype)} of what the file holds, for a video that cannot be read ((), why), and its attributes."""
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
                raise InputError(
                    f"feature file {str(self.path)!r} is not HDF5 or was cut short ({reason})"
                ) from None
            self._handle = os.getpid(), file
        return file

    def _open_packed(self, frames, offsets, ids):
        offsets, ids = offsets[:], ids.asstr()[:]
        ends = [*offsets[:1], *offsets[-1:]]
        if (
            len(offsets) != len(ids) + 1
            or frames.ndim != 2
            or ends != [0, len(frames)]
            or (np.diff(offsets) < 0).any()
        ):
            raise InputError(
                f"feature file {str(self.path)!r}: offsets, ids and frames do not fit together; write it again"
            )
        if frames.chunks is None and frames.id.get_offset() is not None:  # contiguous: map it
            start = frames.id.get_offset()
            frames = np.memmap(self.path, frames.dtype, "r", start, frames.shape)
        self._frames = frames
        self._bounds = {
            video: (int(a), int(b)) for video, a, b in zip(ids, offsets, offsets[1:], strict=False)
        }
        if len(self._bounds) < len(ids):
            raise InputError(f"feature file {str(self.path)!r} names a video twice; write it again")
        return {
            video: ((b - a, frames.shape[1]), frames.dtype)
            for video, (a, b) in self._bounds.items()
        }

    def _read(self, video):
        return (
            self._open()[video][:]
            if self._frames is None
            else self._frames[slice(*self._bounds[video])]
        )

    def read(self, video):
        """The (T, C) rows of `video` as they are stored, not checked for NaN; regions averaged."""
        rows = self._read(video)
        return (
            rows
            if rows.ndim == 2
            else rows.mean(1, dtype=np.result_type(rows, np.float32)).astype(rows.dtype)
        )

    def __getitem__(self, video):
        """The (T, C) rows of `video`."""
        if video not in self.lengths:
            reason = (
                f"video {video!r} {self.bad[video]}"
                if video in self.bad
                else f"it has no video {video!r}"
            )
            raise InputError(f"feature file {str(self.path)!r}: {reason}")
        rows = self.read(video)
        if not _finite(rows):
            raise InputError(
                f"feature file {str(self.path)!r}: video {video!r} holds NaN or infinity; extract it again"
            )
        return rows

    def read_verified(self, video):
        """The (T, C) rows of `video`; InputError too when they are not those that the stored checksum, if any, was made of."""
        rows = self[video]
        if self._sums is None:
            self._sums = self.checksums()
        if self._sums.get(video) not in (None, rows_checksum(np.ascontiguousarray(rows))):
            raise InputError(
                f"feature file {str(self.path)!r}: rows of video {video!r} are not those that were written; extract it anew"
            )
        return rows

    def release_pages(self):
        """Let go of the mapped pages read so far, which count as this process's memory until the kernel wants them back."""
        if isinstance(self._frames, np.memmap):
            self._frames._mmap.madvise(mmap.MADV_DONTNEED)

    def checksums(self):
        """{id: checksum of its rows} as stored by `write_store` (or, one dataset a video, by convert.py); else empty."""
        file = self._open()
        if self._frames is None:
            return {
                video: file[video].attrs["checksum"]
                for video in self.lengths
                if "checksum" in file[video].attrs
            }
        return (
            dict(zip(self._bounds, file["checksums"].asstr()[:], strict=True))
            if "checksums" in file
            else {}
        )

    def fingerprint(self):
        """A digest that tells one file's content from another's: the stored checksum, which covers every value, beside the
        lengths and a sample of the values, which also tell a file that has no checksum or was edited under it."""
        some = list(self.lengths)[:: len(self.lengths) // 1000 + 1]
        sample = [np.asarray(self[video][[0, -1]], np.float32).tobytes().hex() for video in some]
        return digest([self.checksum, self.feature_size, self.lengths, sample])

    def __contains__(self, video):
        return video in self.lengths

    def __iter__(self):
        return iter(self.lengths)

    def __len__(self):
        return len(self.lengths)


def _described(name, item):
    return {name: (item.shape or (), item.dtype)} if isinstance(item, h5py.Dataset) else {}


def _finite(rows):
    """Whether no value is NaN or infinite. In float16 NumPy's isfinite takes 20 times as long as looking at the exponents."""
    if rows.dtype == np.float16:
        return not (rows.view(np.uint16) & 0x7C00 == 0x7C00).any()
    return bool(np.isfinite(rows).all())


def _plain(value):
    """An HDF5 attribute as a value that JSON, and HDF5 again, can hold."""
    value = value.tolist() if isinstance(value, np.generic | np.ndarray) else value
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if isinstance(value, h5py.Empty):
        return ""
    return value if isinstance(value, str | int | float) else str(value)


def checked(video, rows, dtype):
    """`rows` (T, C) of `video` as a contiguous array of `dtype`; InputError for a value that is not finite in it."""
    with np.errstate(over="ignore"):
        rows = np.ascontiguousarray(rows, dtype)
    if not _finite(rows):
        raise InputError(
            f"video {video!r}: features hold NaN or infinity (or overflow {rows.dtype})"
        )
    return rows


def rows_checksum(rows):
    """The SHA-256 of a video's contiguous rows, cut to 64 bits: against accidents, not against forgery."""
    return hashlib.sha256(rows).hexdigest()[:16]


def store_checksum(dtype, feature_size, lengths, sums):
    """The checksum of a whole store from those of its rows: the same whatever its layout and the order of its videos.

    lengths {id: T}, sums {id: rows_checksum}.
    """
    return digest(
        [
            np.dtype(dtype).name,
            feature_size,
            {video: [int(T), sums[video]] for video, T in lengths.items()},
        ]
    )


def write_store(path, lengths, read, dtype, feature_size, meta):
    """Write the packed layout, whole or not at all: lengths {id: T}; read(id) -> the (T, C) rows, asked for once each.

    Videos lie in the order of their ids. `checksums` holds one of each video's rows, the attribute `checksum` one of all.
    """
    ids = sorted(lengths)  # the same file whatever order videos came in
    offsets, sums = np.cumsum([0] + [lengths[video] for video in ids]), {}
    with atomic(path) as temporary, h5py.File(temporary, "w") as file:
        frames = file.create_dataset("frames", (offsets[-1], feature_size), dtype)
        for video, start, end in zip(ids, offsets, offsets[1:], strict=False):
            rows = np.ascontiguousarray(read(video))
            frames[start:end] = rows
            sums[video] = rows_checksum(rows)
        file["ids"] = np.array(ids, dtype=h5py.string_dtype())
        file["offsets"] = offsets
        file["checksums"] = np.array([sums[video] for video in ids], "S16")
        file.attrs.update({**meta, "checksum": store_checksum(dtype, feature_size, lengths, sums)})


class StoreWriter:
    """Writes the packed layout, so that a run killed at any moment loses nothing that was added.

    Frames go to `PATH.part`, one journal line a video to `PATH.part.jsonl`; a clean end of the `with` block packs them into
    contiguous HDF5 at PATH by rename. A later writer of the same path and `meta` goes on: `done` holds the ids already there.
    `sources` {id: text} says what each video's features are made from (its file's size and time, say). With `renew` a spooled
    video whose source is another is forgotten, so that it can be added again, and one that `sources` does not name is kept.
    Raises InputError for a spool of other `meta` or dtype, for one that another process is writing and, unless `renew`, for
    one that holds a video of another source or none.

        with StoreWriter("features.hdf5", meta={"backbone": "resnet50"}) as store:
            store.add("video id", frames)  # (T, C)
    """

    def __init__(self, path, dtype="float16", meta=None, sources=None, renew=False):
        self.path, self.dtype, self.meta, self._sources = (
            Path(path),
            np.dtype(dtype),
            dict(meta or {}),
            sources,
        )
        self._spool, self._journal = Path(f"{path}.part"), Path(f"{path}.part.jsonl")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._log = self._lock()
        try:
            remove_leftovers(path)
            self._rows = self._read_journal()  # [{"id", "T", "C", "source"}], in the spool's order
            self.done = self._up_to_date(sources, renew)
        except BaseException:
            self._log.close()
            raise
        size = sum(row["T"] * row["C"] for row in self._rows) * self.dtype.itemsize
        self._data = open(self._spool, "r+b")
        self._data.truncate(size)  # a video that was being written when the run was killed
        self._data.seek(size)

    def _lock(self):
        """The journal, open and locked until it is closed or this process ends, however it ends."""
        log = open(self._journal, "a", encoding="utf-8")
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
            taken = not os.fstat(
                log.fileno()
            ).st_nlink  # its writer ended, and removed it, since we opened it
        except BlockingIOError:
            taken = True
        except OSError:
            taken = False  # this file system knows no locks
        if taken:
            log.close()
            raise InputError(
                f"another run is writing {str(self.path)!r}; wait for its end, or name another output"
            )
        return log

    def _read_journal(self):
        """The journal's rows whose frames are all in the spool; the rest is cut off. Without any, both begin anew."""
        header = {"dtype": self.dtype.name, "meta": self.meta}
        lines, kept, left = [], 0, self._spool.stat().st_size if self._spool.exists() else 0
        for raw in self._journal.read_bytes().splitlines(keepends=True):
            try:
                line = json.loads(raw) if raw.endswith(b"\n") else None
            except ValueError:
                line = None
            itemsize = (
                np.dtype(lines[0]["dtype"]).itemsize if lines else 0
            )  # the spool's own, so that it stays if refused
            left -= line.get("T", 0) * line.get("C", 0) * itemsize if line else 0
            if line is None or left < 0:
                break
            lines.append(line)
            kept += len(raw)
        if len(lines) < 2:
            self._journal.write_text(json.dumps(header) + "\n", encoding="utf-8")
            self._spool.write_bytes(b"")
        elif lines[0] != header:
            found, asked = ({"dtype": line["dtype"], **line["meta"]} for line in (lines[0], header))
            name = next(name for name in found | asked if found.get(name) != asked.get(name))
            raise InputError(
                f"{str(self._spool)!r}, left by a stopped run, holds {len(lines) - 1} videos of {name} {found.get(name)}, not"
                f" {asked.get(name)}; go on with that, name another output, or remove {str(self._journal)!r} to start anew"
            )
        else:
            os.truncate(self._journal, kept)
        return lines[1:]

    def _up_to_date(self, sources, renew):
        """The ids whose spooled rows are of their source."""
        spooled = {
            row["id"]: row["source"] for row in self._rows
        }  # of a video that was renewed the last row counts
        wanted = spooled if sources is None else spooled | sources if renew else sources
        changed = {video for video, source in spooled.items() if wanted.get(video) != source}
        if changed and not renew:
            raise InputError(
                f"{str(self._spool)!r}, left by a stopped run, holds video {min(changed)!r} as it was then, and the input has"
                f" changed; remove {str(self._journal)!r} to start anew"
            )
        return spooled.keys() - changed

    def add(self, video, frames):
        """Append a video's `frames` (T, C); InputError when it is empty, of another width, not finite, or there already."""
        frames = np.asarray(frames)
        width = self._rows[0]["C"] if self._rows else frames.shape[-1]
        if frames.ndim != 2 or not len(frames) or frames.shape[1] != width:
            raise InputError(
                f"video {video!r}: features of shape {frames.shape}, expected (T, {width}) with T >= 1"
            )
        if video in self.done:
            raise InputError(f"video {video!r} is given twice")
        frames = checked(video, frames, self.dtype)
        self._data.write(frames.tobytes())
        self._data.flush()  # frames before the journal line that vouches for them
        row = {
            "id": video,
            "T": len(frames),
            "C": width,
            "source": (self._sources or {}).get(video),
        }
        self._log.write(json.dumps(row) + "\n")
        self._log.flush()
        self._rows.append(row)
        self.done.add(video)

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        with self._log:  # closed, and so unlocked, last
            self._data.close()
            if kind is None and self.done:
                self._pack()
            if kind is None:
                self._remove_spool()
        if kind is None and not self.done:
            raise InputError(f"no video was written, so there is no {str(self.path)!r}")

    def _pack(self):
        width, starts = self._rows[0]["C"], np.cumsum([0, *(row["T"] for row in self._rows)])
        rows = {
            row["id"]: slice(a, a + row["T"])
            for row, a in zip(self._rows, starts, strict=False)
            if row["id"] in self.done
        }
        lengths = {video: part.stop - part.start for video, part in rows.items()}
        spool = np.memmap(self._spool, self.dtype, "r").reshape(-1, width)
        write_store(
            self.path, lengths, lambda video: spool[rows[video]], self.dtype, width, self.meta
        )

    def _remove_spool(self):
        self._spool.unlink()
        self._journal.unlink()


def warn_if_features_differ(features, store, model):
    """Say so on stderr when features were made otherwise than those that a model was trained on."""
    here = {key: store.meta.get(key, value) for key, value in features.items()}
    other = [
        f"{key} {value!r}, here {here[key]!r}"
        for key, value in features.items()
        if here[key] != value
    ]
    if other:
        print(
            f"warning: {model}: not trained on such features as {str(store.path)!r} holds: {'; '.join(other)}",
            file=sys.stderr,
        )
