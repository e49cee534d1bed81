"""Other layouts of feature files: a folder of .npy, and one HDF5 dataset per video."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from features.frame_rules import with_current_rule
from features.hdf5 import new_hdf5
from features.row_checks import rows_checksum
from features.store import FeatureStore, store_checksum, write_store
from files import Lock, disk_errors, remove_leftovers, temporary_folder, umask, write_json
from untrusted import is_object, read_json
from utils import InputError

DESCRIPTION = "store.json"  # of a folder of .npy: what an HDF5 file holds as attributes


class NpyFolder(FeatureStore):
    """A folder of .npy as a FeatureStore; an id is a file's path in the folder, without suffix."""

    def _scan(self):
        found = {}
        for file in sorted(self.path.rglob("*.npy")):
            video = file.relative_to(self.path).as_posix()[:-4]
            if video != video.encode(errors="replace").decode():
                raise InputError(
                    f"{str(file)!r}: its name is not UTF-8, so it cannot be an id; rename it"
                )
            if not file.is_file():  # to open a pipe would wait for ever
                found[video] = (), f"lies in {file.name}, which is not a file"
                continue
            try:
                rows = self._map(video)
                found[video] = rows.shape, rows.dtype
            except Exception as error:  # a damaged header can raise nearly anything
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                found[video] = (
                    (),
                    f"lies in {file.name}, which was cut short or is not an array of numbers "
                    f"({reason})",
                )
        description = self._description()
        meta = with_current_rule(description["meta"])
        return found, {**meta, "checksum": description["checksum"]}

    def _description(self):
        """The content of DESCRIPTION; without that file, an empty description."""
        file = self.path / DESCRIPTION
        expected = {"meta": {}, "checksum": None, "checksums": {}}
        if not file.exists():
            return expected
        description = read_json(file, "description", "remove it")
        if isinstance(description, dict):
            description = {**expected, **description}
            sums_are_texts = is_object(description["checksums"], str)
            if sums_are_texts and is_object(description["meta"], str, int, float, list):
                if isinstance(description["checksum"], str | None):
                    return description
        raise InputError(f"{str(file)!r} is not what convert.py writes; remove it")

    def _map(self, video):
        # Not np.load, which takes zip files too.
        return np.lib.format.open_memmap(self.path / f"{video}.npy", mode="r")

    _read = _map

    def checksums(self) -> dict[str, str]:
        return self._description()["checksums"]

    def _stored_checksum(self, video):
        if self._sums is None:
            self._sums = self.checksums()
        return self._sums.get(video)


def open_source(path: str | Path, **options) -> FeatureStore:
    """The FeatureStore of an HDF5 file or of a folder of .npy; options of FeatureStore."""
    layout = NpyFolder if Path(path).expanduser().is_dir() else FeatureStore
    return layout(path, **options)


def write_datasets(
    path: str | Path,
    lengths: Mapping[str, int],
    read: Callable[[str], np.ndarray],
    dtype: np.dtype | str,
    feature_size: int,
    meta: Mapping[str, Any],
) -> None:
    """Write one HDF5 dataset per video, as the released code reads; arguments of `write_store`."""
    groups = set()  # the HDF5 groups that ids with slashes make: a/b/c lies in a and in a/b
    for video in lengths:
        parts = video.split("/")
        groups |= {"/".join(parts[:i]) for i in range(1, len(parts))}
    if clash := sorted(groups & set(lengths)):
        raise InputError(
            f"id {clash[0]!r} is a video and, by its slash, a folder of others: "
            "HDF5 allows one of them"
        )
    sums = {}
    with new_hdf5(path) as (file, disk):
        for video in sorted(lengths):
            rows = read(video)
            sums[video] = rows_checksum(rows)
            file.create_dataset(video, data=rows).attrs["checksum"] = sums[video]
            disk.check()
        file.attrs.update({**meta, "checksum": store_checksum(dtype, feature_size, lengths, sums)})


def write_folder(
    path: str | Path,
    lengths: Mapping[str, int],
    read: Callable[[str], np.ndarray],
    dtype: np.dtype | str,
    feature_size: int,
    meta: Mapping[str, Any],
) -> None:
    """Write a new folder of ID.npy and DESCRIPTION, atomically; arguments of `write_store`."""
    path = Path(path).resolve()
    with Lock(path) as lock:
        if path.exists() and not (path.is_dir() and not any(path.iterdir())):
            raise InputError(f"{str(path)!r} already exists; name a new folder, or remove it")
        remove_leftovers(path, lock)
        temporary = temporary_folder(path)
        try:
            with disk_errors(path):
                _write_rows(temporary, lengths, read, dtype, feature_size, meta)
                temporary.chmod(0o777 & ~umask())
                temporary.rename(path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _write_rows(folder, lengths, read, dtype, feature_size, meta):
    sums = {}
    for video in sorted(lengths):
        rows = read(video)
        sums[video] = rows_checksum(rows)
        file = folder / f"{video}.npy"
        file.parent.mkdir(parents=True, exist_ok=True)
        np.save(file, rows)
    checksum = store_checksum(dtype, feature_size, lengths, sums)
    write_json(folder / DESCRIPTION, {"meta": meta, "checksum": checksum, "checksums": sums})


# {name on the command line: function that writes it}
LAYOUTS = {"packed": write_store, "datasets": write_datasets, "npy": write_folder}
