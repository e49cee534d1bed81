"""The files to index: found in the given files and folders, and those that have vanished."""

import os
import stat
from collections.abc import Iterable

from features.listing import may_be_video
from videoindex.store import FileEntry

Failures = list[tuple[str, str]]  # (path, reason)


def find_files(
    sources: Iterable[str | os.PathLike], index_folder: str | os.PathLike
) -> tuple[list[FileEntry], Failures]:
    """The files to index, and what could not be read, each with the reason.

    A named file is taken with any suffix. Folders are searched as extract_features.py does: no
    hidden files, nothing that is certainly not a video, links followed. Each folder is entered
    once, even if several paths lead to it; the index's own folder is not entered. Several links to
    one file are one file, under the first path that is not a symbolic link.
    """
    found: dict[tuple[int, int], FileEntry] = {}  # by device and inode
    failed: Failures = []
    entered = {inode(index_folder)} if os.path.isdir(index_folder) else set()

    def take_file(path):
        try:
            facts = os.stat(path)
            if not stat.S_ISREG(facts.st_mode):
                raise OSError(0, "it is not a regular file")
            key = facts.st_dev, facts.st_ino
            if key not in found or (os.path.islink(found[key].path) and not os.path.islink(path)):
                found[key] = FileEntry(path, facts.st_size, facts.st_mtime_ns)
        except OSError as error:
            failed.append((path, error.strerror))

    def walk_folder(folder):
        def add_failure(error):
            failed.append((error.filename, error.strerror))

        for top, folders, files in os.walk(folder, followlinks=True, onerror=add_failure):
            if inode(top) in entered:
                folders.clear()  # do not descend
                continue
            entered.add(inode(top))
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in sorted(files):
                path = os.path.join(top, name)
                if not name.startswith(".") and may_be_video(path):
                    take_file(path)

    for source in map(os.path.abspath, sources):
        if os.path.isdir(source):
            walk_folder(source)
        else:
            take_file(source)
    return list(found.values()), failed


def vanished_files(
    known: Iterable[str],
    sources: Iterable[str | os.PathLike],
    found: Iterable[FileEntry],
    failed: Failures,
) -> list[str]:
    """The `known` files in the folders `sources` that `find_files` did not meet.

    Files in a folder that could not be read do not count as vanished.
    """
    searched = as_prefixes(source for source in sources if os.path.isdir(source))
    unreadable = as_prefixes(path for path, _ in failed)
    present = {file.path for file in found} | {path for path, _ in failed}
    vanished = []
    for path in known:
        inside = path.startswith(searched) and not path.startswith(unreadable)
        if inside and path not in present:
            vanished.append(path)
    return vanished


def as_prefixes(folders: Iterable[str | os.PathLike]) -> tuple[str, ...]:
    """Absolute paths that end in a slash, a tuple for `str.startswith`."""
    return tuple(os.path.join(os.path.abspath(folder), "") for folder in folders)


def inode(path: str | os.PathLike) -> tuple[int, int]:
    """What identifies a file or folder under all its names."""
    facts = os.stat(path)
    return facts.st_dev, facts.st_ino
