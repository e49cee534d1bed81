"""Feature files in other layouts: a folder of .npy, one HDF5 dataset a video."""

import json
import shutil
from pathlib import Path

import h5py
import numpy as np

import utils
from features.store import FeatureStore, rows_checksum, store_checksum, write_store
from utils import InputError

DESCRIPTION = "store.json"  # in a folder of .npy: what HDF5 files hold as attributes


# --- layouts ---------------------------------------------------------------------------------------------------------


class NpyFolder(FeatureStore):
    """A folder of .npy as a FeatureStore: a video's id is its path in the folder, without suffix."""

    def _scan(self):
        found = {}
        for file in sorted(self.path.rglob("*.npy")):
            video = file.relative_to(self.path).as_posix()[:-4]
            if video != video.encode(errors="replace").decode():
                raise InputError(
                    f"{str(file)!r}: its name is not UTF-8, so it cannot be an id; rename it"
                )
            try:
                rows = np.load(file, mmap_mode="r", allow_pickle=False)
                found[video] = rows.shape, rows.dtype
            except (ValueError, EOFError) as error:
                reason = str(error).splitlines()[0]
                found[video] = (
                    (),
                    f"lies in {file.name}, which was cut short or is no array of numbers ({reason})",
                )
        description = self._description()
        return found, {**description["meta"], "checksum": description["checksum"]}

    def _description(self):
        file = self.path / DESCRIPTION
        try:
            description = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
            return {"meta": {}, "checksum": None, "checksums": {}, **description}
        except (ValueError, TypeError) as error:
            raise InputError(
                f"{str(file)!r} is not what convert.py writes ({error}); remove it"
            ) from None

    def _read(self, video):
        return np.load(self.path / f"{video}.npy", mmap_mode="r", allow_pickle=False)

    def checksums(self):
        return self._description()["checksums"]


def open_source(path, **options):
    """The FeatureStore of an HDF5 file or a folder of .npy."""
    return (NpyFolder if Path(path).expanduser().is_dir() else FeatureStore)(path, **options)


def write_datasets(path, lengths, read, dtype, feature_size, meta):
    """One dataset a video, as the released code reads; arguments as those of `write_store`."""
    folders = {video[:i] for video in lengths for i, letter in enumerate(video) if letter == "/"}
    if clash := sorted(folders & set(lengths)):
        raise InputError(
            f"id {clash[0]!r} is a video and, by its slash, a folder of others: HDF5 allows one of them"
        )
    sums = {}
    with utils.atomic(path) as temporary, h5py.File(temporary, "w") as file:
        for video in sorted(lengths):
            rows = read(video)
            sums[video] = rows_checksum(rows)
            file.create_dataset(video, data=rows).attrs["checksum"] = sums[video]
        file.attrs.update({**meta, "checksum": store_checksum(dtype, feature_size, lengths, sums)})


def write_folder(path, lengths, read, dtype, feature_size, meta):
    """A folder of ID.npy and a description, written aside and renamed; arguments as those of `write_store`."""
    path = Path(path).resolve()
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise InputError(f"{str(path)!r} is there already; name a new folder, or remove it")
    aside, sums = path.with_name(f".{path.name}.part"), {}
    shutil.rmtree(aside, ignore_errors=True)  # left by a run that was killed
    try:
        for video in sorted(lengths):
            rows, file = read(video), aside / f"{video}.npy"
            sums[video] = rows_checksum(rows)
            file.parent.mkdir(parents=True, exist_ok=True)
            np.save(file, rows)
        description = {
            "meta": meta,
            "checksum": store_checksum(dtype, feature_size, lengths, sums),
            "checksums": sums,
        }
        utils.write_json(aside / DESCRIPTION, description)
        aside.rename(path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


LAYOUTS = {"packed": write_store, "datasets": write_datasets, "npy": write_folder}
