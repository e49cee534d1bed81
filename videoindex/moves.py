"""Where the files of an index are now: moved, gone, or on a drive that is not mounted.

A path without a file may mean that the file was renamed, that it was deleted, or that its drive is
not there today. Only what is certainly gone is forgotten.
"""

import os
from collections.abc import Iterable, Sequence

from utils import InputError
from videoindex.sources import as_prefixes
from videoindex.store import FileEntry


def is_gone(path: str | os.PathLike) -> bool:
    """Whether nothing is at this path. What cannot be looked at is not gone."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return True
    except (OSError, ValueError):
        return False
    return False


def distinct_files(paths: Sequence[str]) -> list[str]:
    """Those of the paths at which there is a file, each file once: links to it are no copies.

    A path that is not a link itself is preferred.
    """
    chosen: dict[tuple[int, int], str] = {}  # {(device, inode): path}
    for path in sorted(paths, key=os.path.islink):
        try:
            facts = os.stat(path)
        except (OSError, ValueError):
            continue
        chosen.setdefault((facts.st_dev, facts.st_ino), path)
    kept = set(chosen.values())
    return [path for path in paths if path in kept]


# --- drives -------------------------------------------------------------------------------------


class Drives:
    """The places where drives were mounted when the files of an index were read.

    Args:
        mounts: absolute paths of mount points, as `mount_points` gives them.
    """

    def __init__(self, mounts: Iterable[str]):
        self.absent = [mount for mount in mounts if not os.path.ismount(mount)]
        self._prefixes = as_prefixes(self.absent)

    def absent_drive(self, path: str) -> str:
        """The mount point of the drive that a file lies on, if it is not mounted now; else ""."""
        if self.absent:
            path = os.path.realpath(path)
            for mount, prefix in zip(self.absent, self._prefixes, strict=True):
                if path.startswith(prefix):
                    return mount
        return ""

    def absent_below(
        self, folders: Iterable[str | os.PathLike], known: Iterable[str]
    ) -> list[tuple[str, str]]:
        """(mount point, why files below it are kept) of the `known` files in the folders."""
        prefixes, counts = as_prefixes(folders), {}
        for path in known if self.absent else ():
            drive = self.absent_drive(path) if path.startswith(prefixes) else ""
            if drive:
                counts[drive] = counts.get(drive, 0) + 1
        failed = []
        for drive, count in counts.items():
            reason = f"no drive is mounted there now; its {count} files stay in the index"
            failed.append((drive, reason))
        return failed


def mount_points(files: Iterable[FileEntry]) -> set[str]:
    """The mount points that the files lie under, but the root, which is always there."""
    by_folder: dict[str, str] = {}
    for file in files:
        folder = os.path.dirname(os.path.realpath(file.path))
        if folder not in by_folder:
            by_folder[folder] = _mount_point(folder)
    return set(by_folder.values()) - {os.path.sep}


def _mount_point(folder):
    while not os.path.ismount(folder):
        folder = os.path.dirname(folder)
    return folder


def current_mounts(mounts: Iterable[str], found: Sequence[FileEntry]) -> list[str]:
    """The mount points to remember: `mounts`, and those of the files that were found now.

    One that is not mounted is forgotten if files are found there: its folder took its place.
    """
    now = mount_points(found)
    drives = Drives(mounts)
    replaced = {drives.absent_drive(file.path) for file in found} if drives.absent else set()
    return sorted((set(mounts) - replaced) | now)


# --- moves and vanished folders -----------------------------------------------------------------


def moved_from(
    paths: Sequence[str], new_path: str, searched: Iterable[str | os.PathLike], drives: Drives
) -> str | None:
    """The path that a file had before it was moved to `new_path`, or None.

    It has gone although the folder that it was in is there: the folder holds something, or lies in
    one of the folders `searched`, in which videos were found.

    Args:
        paths: of the files with its content.
    """
    prefixes = as_prefixes(searched)
    gone = []
    for path in paths:
        if path != new_path and is_gone(path) and not drives.absent_drive(path):
            if path.startswith(prefixes) or _holds_something(os.path.dirname(path)):
                gone.append(path)
    name = os.path.basename(new_path)
    gone.sort(key=lambda path: os.path.basename(path) != name)  # rather moved than renamed
    return gone[0] if gone else None


def _holds_something(folder):
    try:
        with os.scandir(folder) as entries:
            return any(True for _ in entries)
    except OSError:
        return False


def require_sources(
    sources: Iterable[str | os.PathLike],
    known: Iterable[str],
    found: Iterable[FileEntry],
    index_folder: str | os.PathLike,
) -> None:
    """Raise InputError for a folder that seems to be on a drive that is not mounted.

    It is absent, or no video was found in it, although the index knows files there.
    """
    known, present = list(known), [file.path for file in found]
    for source in map(os.path.abspath, sources):
        prefix = os.path.join(source, "")
        count = sum(path.startswith(prefix) for path in known)
        if count and not any(path.startswith(prefix) for path in present):
            state = "holds no video" if os.path.isdir(source) else "does not exist"
            raise InputError(
                f"--prune: {source!r} {state}, but the index knows {count} files there; is its"
                " drive mounted? To forget them truly:"
                f" search.py remove {source!r} --index {str(index_folder)!r}"
            )
