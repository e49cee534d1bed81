"""The videos of an input: a folder, a list file or a pattern."""

import glob
import os
from pathlib import Path

import utils
from utils import InputError

NON_VIDEO_SUFFIXES = frozenset(
    ".txt .md .json .jsonl .csv .tsv .srt .vtt .ass .nfo .xml .html .jpg .jpeg .png .webp .part .hdf5 .h5 .npy .npz .py".split()
)


# --- which videos ----------------------------------------------------------------------------------------------------


def find_videos(source):
    """{id: path} of a folder, a list file or a pattern holding `{id}`.

    Raises InputError when there is none, when two share an id, and for an id that is not UTF-8.
    """
    if "{id}" in source:
        pairs = _from_pattern(source)
    elif Path(source).is_dir():
        pairs = _from_folder(Path(source))
    else:
        pairs = _from_list(utils.require_path(source, "input"))
    videos = {}
    for video, path in pairs:
        if video != video.encode(errors="replace").decode():
            raise InputError(
                f"the id {video!r} of {str(path)!r} is not UTF-8, so it cannot be an id; rename the file"
            )
        if video in videos:
            raise InputError(
                f"{str(videos[video])!r} and {str(path)!r} share the id {video!r}; rename one, or give a list file"
            )
        videos[video] = path
    if not videos:
        raise InputError(
            f"input {source!r} holds no video; give a folder of videos, a list file or a pattern with {{id}}"
        )
    return videos


def _from_folder(folder):
    """Every file but hidden ones and those that are surely no video; the id is the relative path without suffix.

    Links are followed, but not into a folder that they lie in.
    """
    for top, folders, files in os.walk(folder, followlinks=True):
        top = Path(top)
        above = [parent for parent in top.parents if parent.is_relative_to(folder)]
        if any(top.samefile(parent) for parent in above):
            folders.clear()
            continue
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for path in sorted(top / name for name in files if not name.startswith(".")):
            if path.is_file() and path.suffix.lower() not in NON_VIDEO_SUFFIXES:
                yield path.relative_to(folder).with_suffix("").as_posix(), path


def _from_list(path):
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()  # a BOM belongs to no id
    except UnicodeDecodeError:
        raise InputError(
            f"input {str(path)!r} is no list of `id <tab> path`; for one video give its folder"
        ) from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            video, tab, file = line.partition("\t")
            if not (tab and video.strip() and file.strip()):
                raise InputError(
                    f"{str(path)!r} line {number}: expected `id <tab> path`, found {line[:80]!r}"
                )
            yield video.strip(), path.parent / file.strip()


def _from_pattern(pattern):
    before, after = pattern.split("{id}", 1)
    if "{id}" in after:
        raise InputError(f"pattern {pattern!r} holds {{id}} more than once; once is enough")
    for path in sorted(glob.glob(glob.escape(before) + "*" + glob.escape(after))):
        yield path[len(before) : len(path) - len(after)], Path(path)
