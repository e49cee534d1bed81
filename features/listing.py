"""The videos of an input: a folder, a list file or a pattern; and which shard does which."""

import glob
import os
from collections.abc import Iterator
from pathlib import Path

from utils import InputError, digest, require_path

NON_VIDEO_SUFFIXES = frozenset(
    ".txt .md .json .jsonl .csv .tsv .srt .vtt .ass .nfo .xml .html .jpg .jpeg .png .webp "
    ".part .hdf5 .h5 .npy .npz .py".split()
)


def find_videos(source: str) -> dict[str, Path]:
    """{id: path} of the videos of a folder, a list file, or a pattern that holds `{id}`.

    Raises:
        InputError: if there is none, if two share an id, and for an id that is not UTF-8.
    """
    if "{id}" in source:
        pairs = _from_pattern(source)
    elif Path(source).is_dir():
        pairs = _from_folder(Path(source))
    else:
        pairs = _from_list(require_path(source, "input"))
    videos = {}
    for video, path in pairs:
        if video != video.encode(errors="replace").decode():
            raise InputError(
                f"the id {video!r} of {str(path)!r} is not UTF-8, so it cannot be an id; "
                "rename the file"
            )
        if video in videos:
            raise InputError(
                f"{str(videos[video])!r} and {str(path)!r} share the id {video!r}; "
                "rename one, or give a list file"
            )
        videos[video] = path
    if not videos:
        raise InputError(
            f"input {source!r} holds no video; give a folder of videos, a list file "
            "or a pattern with {id}"
        )
    return videos


def _from_folder(folder) -> Iterator[tuple[str, Path]]:
    """All files but hidden ones and NON_VIDEO_SUFFIXES; an id is the path without suffix.

    Links are followed, but not into a folder that they lie in.
    """
    for top, folders, files in os.walk(folder, followlinks=True):
        top = Path(top)
        above = [parent for parent in top.parents if parent.is_relative_to(folder)]
        if any(top.samefile(parent) for parent in above):
            folders.clear()  # a link back up: os.walk would never end
            continue
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for path in sorted(top / name for name in files if not name.startswith(".")):
            if path.is_file() and path.suffix.lower() not in NON_VIDEO_SUFFIXES:
                yield path.relative_to(folder).with_suffix("").as_posix(), path


def _from_list(path) -> Iterator[tuple[str, Path]]:
    """Lines `id <tab> path`; paths are relative to the list."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()  # without Windows' BOM
    except UnicodeDecodeError:
        raise InputError(
            f"input {str(path)!r} is not a list of `id <tab> path`; for one video give its folder"
        ) from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        video, tab, file = line.partition("\t")
        if not (tab and video.strip() and file.strip()):
            raise InputError(
                f"{str(path)!r} line {number}: expected `id <tab> path`, found {line[:80]!r}"
            )
        yield video.strip(), path.parent / file.strip()


def _from_pattern(pattern) -> Iterator[tuple[str, Path]]:
    """What a pattern such as VIDEOS/{id}/video.mp4 matches."""
    before, after = pattern.split("{id}", 1)
    if "{id}" in after:
        raise InputError(f"pattern {pattern!r} holds {{id}} more than once; once is enough")
    for path in sorted(glob.glob(glob.escape(before) + "*" + glob.escape(after))):
        yield path[len(before) : len(path) - len(after)], Path(path)


def shard_of(video: str, n: int) -> int:
    """Which of n shards a video belongs to: by its id alone, so it stays when others come or go."""
    return int(digest(video), 16) % n
