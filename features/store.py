"""Feature files: `FeatureStore` reads them, `StoreWriter` and `write_store` write them.

A file holds N videos, each an array (T, C): T sampled frames (by default one per second), C
channels.
"""

import contextlib
import json
import mmap
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from features.frame_rules import with_current_rule
from features.hdf5 import (
    find_datasets,
    hdf5_errors,
    new_hdf5,
    open_hdf5,
    own_dataset,
    read_attributes,
    read_offsets,
    read_texts,
)
from features.row_checks import (
    RowChecks,
    all_finite,
    fault_of_rows,
    name_some,
    rows_checksum,
)
from files import Lock, disk_errors, write_all
from utils import InputError, digest, one_line, require_path

SCAN_SECONDS = 20  # for counting the bad videos of a file after the first was met
PACKED = {"frames", "offsets", "ids"}  # the datasets of the packed layout, beside the checksums

# --- reading -------------------------------------------------------------------------------------


class FeatureStore(Mapping):
    """Mapping from a video's id to its (T, C) rows, read from an HDF5 file.

    The layout is recognised by what the file holds:

    - one dataset (T, C) per video, named by its id, in which slashes are groups: the layout of the
      released code. Region features (T, R, C), as other groups publish them, are averaged over R,
      with a notice on stderr;
    - packed, by `write_store`: `frames` (sum of T, C), `offsets` (N+1,), `ids` (N,) and
      `checksums` (N,). Contiguous frames are memory-mapped: a slice copies nothing, and
      data-loading workers share the pages.

    The attributes of the file are the settings that made the features (`meta`), each under its own
    name, and `checksum`. Checksums are optional: each dataset of the first layout may have its own
    in an attribute `checksum`.

    Args:
        path: the HDF5 file.
        feature_size: the C that is required; by default that of most videos.
        skip_bad: skip videos of another width, without rows or of a type that is not numeric,
            instead of raising InputError; `bad` then gives the reason for each.

    Attributes:
        path: as given, a Path.
        lengths: {id: T}.
        feature_size: C.
        dtype: of the stored rows, in which they are returned.
        meta: the file's attributes, without the checksum: what made the features.
        checksum: of all rows (see `store_checksum`), or None if the file has none.
        bad: {id: reason} of the skipped videos.

    Raises:
        InputError: naming the file and the id, for a missing id, a bad video, NaN or infinity in a
            video's rows, rows that are all zero, or that contradict their checksum.
    """

    def __init__(
        self, path: str | Path, feature_size: int | None = None, skip_bad: bool = False
    ) -> None:
        self.path = require_path(path, "feature file")
        self._handle = (None, None)  # id of the process that opened it, the open HDF5 file
        self._frames = None  # of the packed layout: all rows, memory-mapped where contiguous
        self._sums = None  # {id: checksum}, read on first use
        shapes, self.meta = self._scan()
        self.checksum = self.meta.pop("checksum", None)
        if not shapes:
            raise InputError(
                f"feature file {str(path)!r} holds no video; extract features into it first"
            )
        widths = Counter(shape[-1] for shape, _ in shapes.values() if len(shape) in (2, 3))
        self.feature_size = feature_size or max(widths, key=widths.get, default=0)
        if not feature_size and 2 * widths[self.feature_size] < widths.total():
            raise InputError(
                f"feature file {str(path)!r}: its {len(shapes)} videos have {len(widths)} widths,"
                f" such as {', '.join(map(str, list(widths)[:3]))}, and none is that of most; a"
                " video is (T, C), with one C in all: are the axes swapped?"
            )
        self.lengths, self.bad = {}, {}
        dtypes, regions = set(), set()
        for video, (shape, dtype) in shapes.items():
            if reason := self._reason_to_skip(shape, dtype):
                self.bad[video] = reason
                continue
            self.lengths[video] = shape[0]
            dtypes.add(dtype)
            if len(shape) == 3:
                regions.add(shape[1])
        if not self.lengths or (self.bad and not skip_bad):
            video = next(iter(self.bad))
            shape, _ = shapes[video]
            advice = "extract it again, or leave it out (`convert.py verify`, then `to --without`)"
            if len(shape) in (2, 3) and shape[-1] != self.feature_size:
                advice = f"pass the width the features have (--pca_components), or {advice}"
            raise InputError(
                f"feature file {str(path)!r}: video {video!r} {self.bad[video]}; {advice}"
            )
        self.dtype = np.result_type(*dtypes)
        self._checks = RowChecks(self.lengths)
        self._faults = None  # {id: reason}, once a bad video was met
        if regions:
            counts = " or ".join(map(str, sorted(regions)))
            print(
                f"notice: {str(path)!r}: region features (T, {counts}, C) are averaged "
                "over their regions",
                file=sys.stderr,
            )

    def _reason_to_skip(self, shape, dtype):
        """Why an array cannot be a video's rows; empty if it can."""
        if isinstance(dtype, str):  # `_scan` could not read it
            return dtype
        good = len(shape) in (2, 3) and shape[-1] == self.feature_size
        if good and 0 not in shape and dtype.kind in "fiu":
            return ""
        wanted = f"(T, {self.feature_size})"
        return f"has shape {shape} of {dtype}, expected numbers {wanted} with T >= 1"

    def _scan(self):
        """({id: (shape, dtype)}, attributes); ((), reason) for a video that cannot be read."""
        with hdf5_errors(self.path):
            file, shapes = self._file(), {}
            for name, shape, dtype in find_datasets(file):
                shapes[name] = shape or (), dtype  # h5py.Empty has no shape
            if PACKED <= shapes.keys():
                shapes = self._scan_packed(file, shapes)
            return shapes, with_current_rule(read_attributes(file))

    def _file(self):
        """The HDF5 file, opened once in each process: its handles do not survive a fork."""
        owner, file = self._handle
        if owner != os.getpid():
            file = open_hdf5(self.path)
            self._handle = os.getpid(), file
        return file

    def _scan_packed(self, file, shapes):
        for name in PACKED:
            if isinstance(shapes[name][1], str):  # the reason why it must not be read
                raise InputError(f"feature file {str(self.path)!r}: {name} {shapes[name][1]}")
        frames = file["frames"]
        if frames.ndim != 2 or frames.dtype.kind not in "fiu":
            raise InputError(
                f"feature file {str(self.path)!r}: frames are {frames.dtype} {frames.shape}, "
                "expected numbers (sum of T, C); write it again"
            )
        try:
            ids = read_texts(file["ids"], self.path.stat().st_size)
            offsets = read_offsets(file["offsets"], len(ids), len(frames))
        except ValueError as error:
            raise InputError(
                f"feature file {str(self.path)!r}: offsets, ids and frames do not fit together "
                f"({error}); write it again"
            ) from None
        if frames.chunks is None and (start := frames.id.get_offset()) is not None:  # contiguous
            frames = np.memmap(self.path, frames.dtype, "r", start, frames.shape)
        self._frames = frames
        self._bounds, shapes = {}, {}
        for video, begin, end in zip(ids, offsets[:-1], offsets[1:], strict=True):
            self._bounds[video] = begin, end
            shapes[video] = (end - begin, frames.shape[1]), frames.dtype
        if len(shapes) < len(ids):
            raise InputError(f"feature file {str(self.path)!r} names a video twice; write it again")
        return shapes

    def _read(self, video):
        """The array of `video` as it is stored: (T, C) or (T, R, C)."""
        if isinstance(self._frames, np.memmap):
            return self._frames[slice(*self._bounds[video])]
        with hdf5_errors(self.path):
            if self._frames is None:
                return self._file()[video][:]
            return self._frames[slice(*self._bounds[video])]

    def read(self, video: str) -> np.ndarray:
        """The (T, C) rows of `video`, averaged over regions, unchecked."""
        rows = self._read(video)
        if rows.ndim == 3:  # (T, R, C): averaged in float32 or better
            rows = rows.mean(1, dtype=np.result_type(rows, np.float32)).astype(rows.dtype)
        return rows

    def __getitem__(self, video: str) -> np.ndarray:
        """The (T, C) rows of `video`, checked when a run first reads it (`fault_of_rows`)."""
        if video in self.bad:
            raise InputError(f"feature file {str(self.path)!r}: video {video!r} {self.bad[video]}")
        if video not in self.lengths:
            raise InputError(f"feature file {str(self.path)!r}: it has no video {video!r}")
        rows = self.read(video)
        if not self._checks.is_checked(video):
            if reason := fault_of_rows(rows, self._stored_checksum(video)):
                raise InputError(self._fault_message(video, reason))
            self._checks.mark(video, rows)
        return rows

    def _fault_message(self, video, reason):
        """What to say of a video that must not be used, and of the others of the file."""
        if self._faults is None:
            self._faults = self._find_faults()
        faults = {video: reason, **self._faults}
        message = f"feature file {str(self.path)!r}: video {video!r} {reason}; "
        if len(faults) == 1:
            return message + "extract it again"
        return (
            message + f"{len(faults)} of its {len(self)} videos are bad ({name_some(faults)}); "
            "`convert.py verify` lists them, to extract again or to leave out"
        )

    def _find_faults(self):
        """{id: reason} of the unchecked videos that must not be used, as far as time allows."""
        faults, end = {}, time.monotonic() + SCAN_SECONDS
        for video in self:
            if not self._checks.is_checked(video):
                if reason := fault_of_rows(self.read(video), self._stored_checksum(video)):
                    faults[video] = reason
            if time.monotonic() > end:
                break
        return faults

    def videos_with_zero_rows(self) -> list[str]:
        """The videos read so far that have rows of zeros, and others."""
        return self._checks.videos_with_zero_rows()

    def release_pages(self) -> None:
        """Release mapped pages (MADV_DONTNEED) so they no longer count as resident memory."""
        if isinstance(self._frames, np.memmap):
            self._frames._mmap.madvise(mmap.MADV_DONTNEED)

    def checksums(self) -> dict[str, str]:
        """{id: checksum of its rows} as stored in the file; empty if it stores none."""
        with hdf5_errors(self.path):
            return self._read_checksums(self._file())

    def _stored_checksum(self, video):
        """The checksum of a video's rows that the file has, or None."""
        if self._frames is None:  # one attribute: nobody needs those of all videos
            with hdf5_errors(self.path):
                dataset = self._file()[video]
                has_checksum = "checksum" in dataset.attrs
                return str(read_attributes(dataset)["checksum"]) if has_checksum else None
        if self._sums is None:
            self._sums = self.checksums()
        return self._sums.get(video)

    def _read_checksums(self, file):
        if self._frames is not None:
            if "checksums" not in file:
                return {}
            sums = read_texts(own_dataset(file, "checksums"), self.path.stat().st_size)
            return dict(zip(self._bounds, sums, strict=True))
        sums = {}
        for video in self.lengths:
            if "checksum" in file[video].attrs:
                sums[video] = str(read_attributes(file[video])["checksum"])
        return sums

    def fingerprint(self) -> str:
        """A digest of the content, the same for a copy of the file.

        It covers the stored checksum, and so every value. The lengths and a sample of the values
        are added for files without a checksum.
        """
        videos = list(self.lengths)
        sample = []
        for video in videos[:: len(videos) // 1000 + 1]:
            ends = self[video][[0, -1]]  # its first and its last row
            sample.append(np.asarray(ends, np.float32).tobytes().hex())
        return digest([self.checksum, self.feature_size, self.lengths, sample])

    def __contains__(self, video: object) -> bool:
        return video in self.lengths

    def __iter__(self) -> Iterator[str]:
        return iter(self.lengths)

    def __len__(self) -> int:
        return len(self.lengths)


# --- checksums -----------------------------------------------------------------------------------


def store_checksum(
    dtype: np.dtype, feature_size: int, lengths: Mapping[str, int], sums: Mapping[str, str]
) -> str:
    """The checksum of a whole store, independent of its layout and the order of its videos.

    Args:
        lengths: {id: T}.
        sums: {id: `rows_checksum` of its rows}.
    """
    videos = {video: [int(T), sums[video]] for video, T in lengths.items()}
    return digest([np.dtype(dtype).name, feature_size, videos])


def cast_rows(video: str, rows: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """`rows` (T, C) as a contiguous array of `dtype`; InputError if a value is not finite in it."""
    with np.errstate(over="ignore"):
        rows = np.ascontiguousarray(rows, dtype)
    if not all_finite(rows):
        raise InputError(
            f"video {video!r}: features hold NaN or infinity (or overflow {rows.dtype})"
        )
    return rows


# --- writing -------------------------------------------------------------------------------------


def write_store(
    path: str | Path,
    lengths: Mapping[str, int],
    read: Callable[[str], np.ndarray],
    dtype: np.dtype | str,
    feature_size: int,
    meta: Mapping[str, Any],
) -> None:
    """Write the packed layout; a failed or killed call leaves no file, or the old one.

    Args:
        lengths: {id: T}.
        read: id -> the (T, C) rows; called once for each video.
        meta: attributes of the file.
    """
    ids = sorted(lengths)  # the file does not depend on the order in which videos were added
    offsets = np.cumsum([0, *(lengths[video] for video in ids)])  # (N+1,)
    sums = {}
    with new_hdf5(path) as (file, disk):
        frames = file.create_dataset("frames", (offsets[-1], feature_size), dtype)
        for video, begin, end in zip(ids, offsets[:-1], offsets[1:], strict=True):
            rows = np.ascontiguousarray(read(video))
            frames[begin:end] = rows
            disk.check()
            sums[video] = rows_checksum(rows)
        file["ids"] = np.array(ids, dtype=h5py.string_dtype())
        file["offsets"] = offsets
        file["checksums"] = np.array([sums[video] for video in ids], "S16")
        checksum = store_checksum(dtype, feature_size, lengths, sums)
        file.attrs.update({**meta, "checksum": checksum})


def _is_header(line):
    """Whether a line of a journal may be its first: {"dtype", "meta"}."""
    if not isinstance(line, dict) or line.keys() != {"dtype", "meta"}:
        return False
    return isinstance(line["meta"], dict) and line["dtype"] in ("float16", "float32", "float64")


def _is_entry(line, width):
    """Whether a line of a journal may be a video's: {"id", "T", "C", "source"}, C as `width`."""
    if not isinstance(line, dict) or line.keys() != {"id", "T", "C", "source"}:
        return False
    T, C = line["T"], line["C"]
    is_sized = type(T) is int and type(C) is int and T > 0 and C > 0 and C == (width or C)
    return is_sized and _is_id(line["id"]) and isinstance(line["source"], str | None)


def _is_id(video):
    """Whether HDF5 can hold a text: UTF-8, without zero bytes."""
    return isinstance(video, str) and "\0" not in video and not re.search("[\ud800-\udfff]", video)


class StoreWriter:
    """Writes a feature file of the packed layout, and resumes after a kill without losing a video.

        with StoreWriter("features.hdf5", meta={"backbone": "resnet50"}) as writer:
            writer.add("video id", rows)  # (T, C)

    Rows are appended to PATH.part, the spool, and one line per video to PATH.part.jsonl, the
    journal. When the `with` block ends without an error they are packed into PATH, atomically. A
    later writer of the same path, dtype and meta resumes.

    Args:
        dtype: of the stored rows.
        meta: the file's attributes: what makes the features.
        sources: {id: text} that describes what each video's rows are made from, such as the size
            and time of its file, to detect changes between two runs.
        renew: If a video's source has changed since it was spooled, drop its rows so it can be
            added again. Spooled videos missing from `sources` stay.
        lock: the lock of `path`, if the caller has it.

    Attributes:
        done: the ids whose rows are stored.

    Raises:
        InputError: if the spool has another dtype or meta, if another process is writing it, and,
            without `renew`, if it holds a video whose source has changed or is not in `sources`.
    """

    def __init__(
        self,
        path: str | Path,
        dtype: np.dtype | str = "float16",
        meta: Mapping[str, Any] | None = None,
        sources: Mapping[str, str] | None = None,
        renew: bool = False,
        lock: Lock | None = None,
    ) -> None:
        self.path, self.dtype, self.meta = Path(path), np.dtype(dtype), dict(meta or {})
        self._sources = sources
        self._spool, self._journal = Path(f"{path}.part"), Path(f"{path}.part.jsonl")
        self._lock = contextlib.nullcontext() if lock else Lock(path)
        with contextlib.ExitStack() as unless_opened:
            unless_opened.enter_context(self._lock)
            with disk_errors(path):
                self._entries = self._read_journal()  # [{"id", "T", "C", "source"}] as spooled
            self.done = self._up_to_date(sources, renew)
            self._open_spool()
            unless_opened.pop_all()

    def _open_spool(self):
        """Open both files at their ends, without what a killed run had written in part."""
        size = sum(entry["T"] * entry["C"] for entry in self._entries) * self.dtype.itemsize
        # Unbuffered: on a full disk nothing is left to be written by `close`.
        self._data = open(self._spool, "r+b", buffering=0)
        self._data.truncate(size)
        self._data.seek(size)
        self._log = open(self._journal, "ab", buffering=0)

    def _read_journal(self):
        """The entries whose rows the spool holds in full; both files restart if there are none."""
        header = {"dtype": self.dtype.name, "meta": self.meta}
        spool_bytes_left = self._spool.stat().st_size if self._spool.exists() else 0
        lines, size = [], 0
        journal = self._journal.read_bytes() if self._journal.exists() else b""
        for raw in journal.splitlines(keepends=True):
            try:
                line = json.loads(raw) if raw.endswith(b"\n") else None
            except (ValueError, RecursionError):
                line = None
            if line is None:
                break  # the run was killed while it wrote this line
            width = lines[1]["C"] if len(lines) > 1 else None
            if not (_is_entry(line, width) if lines else _is_header(line)):
                raise InputError(
                    f"{str(self._journal)!r} is not the journal of an extraction; remove it"
                )
            if not lines:
                line["meta"] = with_current_rule(line["meta"])
            else:
                # Row size comes from the journal's own dtype: if that is refused below, the spool
                # must stay complete.
                itemsize = np.dtype(lines[0]["dtype"]).itemsize
                spool_bytes_left -= line["T"] * line["C"] * itemsize
            if spool_bytes_left < 0:
                break  # after a power cut the journal can be ahead of the spool
            lines.append(line)
            size += len(raw)
        if len(lines) < 2:  # no video: begin again
            self._journal.write_text(json.dumps(header) + "\n", encoding="utf-8")
            self._spool.write_bytes(b"")
        elif lines[0] != header:
            self._refuse_other_settings(lines, header)
        else:
            os.truncate(self._journal, size)
        return lines[1:]

    def _refuse_other_settings(self, lines, header):
        found = {"dtype": lines[0]["dtype"], **lines[0]["meta"]}
        given = {"dtype": header["dtype"], **header["meta"]}
        name = next(name for name in found | given if found.get(name) != given.get(name))
        there = one_line(f"{name} {found.get(name)}")[:200]
        raise InputError(
            f"{str(self._spool)!r}, left by a stopped run, holds {len(lines) - 1} videos of "
            f"{there}, not {given.get(name)}; resume with that setting, name another "
            f"output, or remove {str(self._journal)!r} to start again"
        )

    def _up_to_date(self, sources, renew):
        """The ids whose spooled rows are made from their current source."""
        # A re-added video has several entries; the last one counts.
        spooled = {entry["id"]: entry["source"] for entry in self._entries}
        if sources is None:
            current = spooled
        elif renew:
            current = spooled | sources
        else:
            current = sources
        changed = {video for video, source in spooled.items() if current.get(video) != source}
        if changed and not renew:
            raise InputError(
                f"{str(self._spool)!r}, left by a stopped run, holds video {min(changed)!r} as it "
                f"was then, and the input has changed; remove {str(self._journal)!r} to start again"
            )
        return spooled.keys() - changed

    def add(self, video: str, rows: np.ndarray) -> None:
        """Append a video's rows (T, C).

        Raises:
            InputError: if there are none, if they have another width than the rows before, if a
                value is not finite in the stored type, if all are zero, and if the id is already
                stored.
        """
        rows = np.asarray(rows)
        width = self._entries[0]["C"] if self._entries else rows.shape[-1]
        if rows.ndim != 2 or not len(rows) or rows.shape[1] != width:
            raise InputError(
                f"video {video!r}: features of shape {rows.shape}, "
                f"expected (T, {width}) with T >= 1"
            )
        if video in self.done:
            raise InputError(f"video {video!r} is given twice")
        if not _is_id(video):
            raise InputError(f"video {video!r}: an id is UTF-8 without zero bytes; rename it")
        rows = cast_rows(video, rows, self.dtype)
        if not rows.any():  # no reader takes them
            raise InputError(f"video {video!r}: its features are nothing but zeros")
        source = (self._sources or {}).get(video)
        entry = {"id": video, "T": len(rows), "C": width, "source": source}
        try:
            with disk_errors(self.path):
                write_all(self._data, rows)  # the rows before the journal line that promises them
                write_all(self._log, (json.dumps(entry) + "\n").encode())
        except BaseException:
            self._close()  # nothing may follow what was written in part
            raise
        self._entries.append(entry)
        self.done.add(video)

    def __enter__(self) -> "StoreWriter":
        return self

    def __exit__(self, kind, *_) -> None:
        with self._lock:  # released last
            self._close()
            if kind is not None:
                return  # the spool stays for a later writer
            if self.done:
                self._pack()
            self._spool.unlink()
            self._journal.unlink()
        if not self.done:
            raise InputError(f"no video was written, so there is no {str(self.path)!r}")

    def _close(self):
        self._data.close()
        self._log.close()

    def _pack(self):
        """Write PATH from the spool."""
        width, start = self._entries[0]["C"], 0
        parts = {}  # {id: its slice of the spool}; the last one of a re-added video
        for entry in self._entries:
            end = start + entry["T"]
            if entry["id"] in self.done:
                parts[entry["id"]] = slice(start, end)
            start = end
        lengths = {video: part.stop - part.start for video, part in parts.items()}
        pages = np.memmap(self._spool, self.dtype, "r")
        spool = pages.reshape(-1, width)  # (sum of T, C)

        def read(video):
            pages._mmap.madvise(mmap.MADV_DONTNEED)  # those of the videos before are no longer held
            return spool[parts[video]]

        write_store(self.path, lengths, read, self.dtype, width, self.meta)


# --- features and the models trained on them -----------------------------------------------------


def warn_if_features_differ(
    expected: Mapping[str, Any], store: FeatureStore, model: str | Path
) -> None:
    """Warn on stderr if a store's features were made otherwise than those a model was trained on.

    Args:
        expected: the description of the features in the model's checkpoint; only settings that
            the store states too are compared.
        model: the model's name in the message.
    """
    differences = []
    for key, value in with_current_rule(expected).items():
        here = store.meta.get(key, value)
        if here != value:
            differences.append(f"{key} {value!r}, here {here!r}")
    if differences:
        print(
            f"warning: {model}: not trained on such features as {str(store.path)!r} holds: "
            + "; ".join(differences),
            file=sys.stderr,
        )
