"""HDF5 files: what others wrote is bounded, locks are told from damage, a full disk from a crash.

HDF5 can keep the values of a dataset in any other file, name datasets of other files, run filters
that it loads from a folder, and declare shapes that nothing was written for. None of that belongs
in a feature file: nothing is followed out of it, or grows beyond what it holds.
"""

import contextlib
import errno
import math
import os
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from files import DeferredFile, atomic
from untrusted import MAX_RATIO, reading, reason_of
from utils import InputError

FILTERS = {1: "deflate", 2: "shuffle", 3: "fletcher32", 6: "scaleoffset", 32000: "lzf"}
MAX_CHUNK = 64 << 20  # bytes that a chunk may have beyond its dataset: one is read at a time
MAX_ATTRIBUTE = 1000  # values
MAX_TEXTS = 50  # in an attribute: each may be as long as the file
HELD = (errno.EAGAIN, errno.EACCES)  # errors of HDF5's lock: another program has it
LINKS = {h5py.h5l.TYPE_SOFT: "a soft link", h5py.h5l.TYPE_EXTERNAL: "a link to another file"}


def hdf5_errors(path: str | Path) -> AbstractContextManager[None]:
    """In this block, what HDF5 raises on a damaged file is an InputError that names the file."""
    return reading(path, "feature file", "it is damaged, or not one; write it again")


def find_datasets(
    file: h5py.File,
) -> Iterator[tuple[str, tuple[int, ...], np.dtype | str]]:
    """(name, shape, dtype) of every dataset; for what must not be read, (name, (), the reason)."""
    file_size = os.path.getsize(file.filename)
    groups = set()  # that were entered: a group may be linked into itself

    def visit(group, prefix):
        number = h5py.h5o.get_info(group).addr
        if number in groups:
            return
        groups.add(number)
        for key in group:
            name = prefix + key.decode("utf-8")
            kind = group.links.get_info(key).type
            if kind != h5py.h5l.TYPE_HARD:
                yield name, (), f"is {LINKS.get(kind, 'a link')}, which is not followed"
                continue
            item = h5py.h5o.open(group, key)
            if isinstance(item, h5py.h5g.GroupID):
                yield from visit(item, f"{name}/")
            elif isinstance(item, h5py.h5d.DatasetID):
                reason = reason_to_refuse(item, file_size)
                yield (name, (), reason) if reason else (name, item.shape, item.dtype)

    yield from visit(file["/"].id, "")


def reason_to_refuse(dataset: h5py.h5d.DatasetID, file_size: int) -> str:
    """Why a dataset must not be read, or ""."""
    properties = dataset.get_create_plist()
    layout = properties.get_layout()
    if layout == h5py.h5d.VIRTUAL or properties.get_external_count():
        return "has its values in other files, which are not read"
    filters = [properties.get_filter(i)[0] for i in range(properties.get_nfilters())]
    if other := set(filters) - FILTERS.keys():
        return f"is compressed by filter {min(other)}, which is not one of HDF5's own"
    if dataset.get_space().get_simple_extent_type() == h5py.h5s.NULL:
        return ""  # it has no shape, which the store reports
    itemsize = dataset.dtype.itemsize
    declared, stored = math.prod(dataset.shape) * itemsize, dataset.get_storage_size()
    if stored > file_size or declared > stored * (MAX_RATIO if filters else 1):
        return f"declares {declared} bytes, and {min(stored, file_size)} are stored for it"
    if layout == h5py.h5d.CHUNKED:
        chunk = math.prod(properties.get_chunk()) * itemsize
        if chunk > declared + MAX_CHUNK:
            return f"is stored in chunks of {chunk} bytes"
    return ""


def own_dataset(file: h5py.File, name: str) -> h5py.Dataset:
    """The dataset of this name at the top of a file; ValueError if it must not be read."""
    for found, _, dtype in find_datasets(file):
        if found == name:
            if isinstance(dtype, str):
                raise ValueError(f"{name} {dtype}")
            return file[name]
    raise ValueError(f"{name} is not a dataset")


def read_texts(dataset: h5py.Dataset, file_size: int) -> list[str]:
    """The values of a dataset (N,) of strings; ValueError if it is another, or outgrows the file.

    Strings of variable length are references into the file, and many may refer to one.
    """
    if h5py.check_string_dtype(dataset.dtype) is None or dataset.ndim != 1:
        raise ValueError(f"{dataset.name} is not a list of texts")
    texts, total, step = [], 0, 1
    while len(texts) < len(dataset):
        block = dataset.asstr()[len(texts) : len(texts) + step].tolist()
        total += sum(map(len, block))
        if total > file_size:
            raise ValueError(f"{dataset.name} repeats its texts")
        texts += block
        # As many at a time as would be the file's size if all were as long as the longest.
        step = min(2 * step, max(1, file_size // (1 + max(map(len, block)))))
    return texts


def read_attributes(item: h5py.File | h5py.Dataset) -> dict[str, Any]:
    """The attributes of a file or dataset, as values that both JSON and HDF5 can hold."""
    values = {}
    for name in item.attrs:
        attribute = item.attrs.get_id(name)
        kind, count = attribute.dtype, math.prod(attribute.shape or ())
        is_text = h5py.check_string_dtype(kind) is not None
        if not is_text and (kind.kind not in "biufV" or kind.hasobject):
            continue  # a reference, a list of any length, ...: no setting of ours
        if count > (MAX_TEXTS if is_text else MAX_ATTRIBUTE):
            raise ValueError(f"attribute {name!r} has {count} values")
        values[name] = _json_like(item.attrs[name])
    return values


def _json_like(value):
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if isinstance(value, list):
        return [_json_like(part) for part in value]
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if isinstance(value, h5py.Empty):
        return ""
    return value if isinstance(value, str | int | float) else str(value)


def read_offsets(dataset: h5py.Dataset, count: int, total: int) -> list[int]:
    """The values of a dataset (count + 1,) that rise from 0 to `total`; else ValueError."""
    if dataset.dtype.kind not in "iu" or dataset.shape != (count + 1,):
        raise ValueError(f"{dataset.name} is not a list of {count + 1} integers")
    offsets = dataset[:]
    if offsets[0] != 0 or offsets[-1] != total or (offsets[1:] < offsets[:-1]).any():
        raise ValueError(f"{dataset.name} does not rise from 0 to {total}")
    return offsets.tolist()


# --- opening and writing -------------------------------------------------------------------------


def open_hdf5(path: str | Path) -> h5py.File:
    """Open a feature file for reading.

    HDF5 locks what it opens. We do not need that, because our writers replace files and never
    change them: on a file system without locks (NFS without lockd) the file is opened without.
    But other programs write in place, so a file that one of them has locked is refused.

    Raises:
        InputError: another program is writing the file, or it is not HDF5.
    """
    if Path(path).is_dir():
        raise InputError(
            f"feature file {str(path)!r} is a folder; give an HDF5 file, which"
            " `pre-processing/convert.py to` makes of a folder of .npy"
        )
    try:
        return h5py.File(path, "r")
    except OSError as error:
        code = _lock_error(error)
        if code is None:
            raise InputError(_not_hdf5(path, error)) from None
        if code in HELD:
            raise InputError(
                f"feature file {str(path)!r} is open for writing in another program;"
                " close it there, or wait for its end"
            ) from None
    try:
        return h5py.File(path, "r", locking=False)
    except OSError as error:
        raise InputError(_not_hdf5(path, error)) from None


def _lock_error(error):
    """The errno with which HDF5 could not lock a file; None if something else failed."""
    match = re.search(r"unable to lock file, errno = (\d+)", str(error))
    return int(match[1]) if match else None


def _not_hdf5(path, error):
    reason = reason_of(error)
    return f"feature file {str(path)!r} is not HDF5 or was cut short ({reason}); write it again"


@contextlib.contextmanager
def new_hdf5(path: str | Path) -> Iterator[tuple[h5py.File, DeferredFile]]:
    """Write an HDF5 file, atomically. The library writes to a DeferredFile: `check` it at times.

    HDF5 crashes the process when it closes a file on a full disk.
    """
    with atomic(path) as temporary, DeferredFile(temporary) as file:
        with h5py.File(file, "w") as hdf5:
            yield hdf5, file
        file.check()
