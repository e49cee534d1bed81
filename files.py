"""Writing: every file whole or not at all, and every place by one process at a time.

`atomic` is under every file that this program writes. `Lock` is around the work that leads to it:
a second process is told who holds the place before it has done anything.
"""

import contextlib
import errno
import fcntl
import functools
import glob
import hashlib
import io
import json
import math
import os
import re
import shutil
import socket
import stat
import sys
import tempfile
import time
import weakref
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from processes import Owner
from utils import InputError

# --- locks ---------------------------------------------------------------------------------------

WAIT = 1.0  # seconds a second writer waits: a process that was killed may need a moment to end
UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)

# {place: Lock} of this process. Weak: a lock that nobody has any more is released.
_held: weakref.WeakValueDictionary = weakref.WeakValueDictionary()


class Lock:
    """The right of this process to write a place: a file, or a folder with all that lies in it.

        with Lock("features.hdf5"):
            ...

    The lock file names the holder; it is removed on release. The lock itself is the kernel's
    (flock): it ends with the process, also by a kill, and is not inherited by a fork. Over NFS it
    holds between machines. Where the file system has no locks, a notice says so, and only a second
    writer that this machine can see is refused.

    Args:
        folder: the place is a folder, which is made if it does not exist. Its lock file is
            FOLDER/.lock; by default it is .NAME.lock, beside the place.
        wait: seconds to wait for another process, by default WAIT.

    Raises:
        InputError: naming the process that holds the place.
    """

    def __init__(
        self, place: str | os.PathLike, folder: bool = False, wait: float | None = None
    ) -> None:
        self.name, self.place = str(place), _final_target(place)
        self.path = self.place / ".lock" if folder else _hidden(self.place, "lock")
        if folder and self.place.is_file():
            raise InputError(f"{self.name!r} is a file; name a folder")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.is_kernels = True  # False where the file system has no locks
        deadline = time.monotonic() + (WAIT if wait is None else wait)
        while not self._acquire():
            if time.monotonic() >= deadline:
                raise InputError(self._refusal())
            time.sleep(0.05)
        _held[self.place] = self
        _close_in_children()
        with contextlib.suppress(OSError):  # a full disk: the lock holds, without a name
            self._file.truncate(0)
            self._file.write(json.dumps(_this_process()).encode())

    def _acquire(self):
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        self._file = io.FileIO(os.open(self.path, flags, 0o666), "r+")
        try:
            fcntl.flock(self._file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            return False
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                self._file.close()
                raise
            return self._acquire_without_kernel(error)
        try:  # the process before may have removed the file between our open and our lock
            same = os.path.samestat(os.fstat(self._file.fileno()), os.stat(self.path))
        except FileNotFoundError:
            same = False
        if not same:
            self._file.close()
        return same

    def _acquire_without_kernel(self, error):
        """On a file system without locks: refuse a place that a living process has signed."""
        holder = self._holder()
        self.is_kernels = False
        with contextlib.suppress(ValueError, KeyError):
            owner = Owner.parse(holder["owner"])
            if owner.is_here and not owner.is_dead:
                self._file.close()
                return False
        print(
            f"notice: {self.name!r} is on a file system without locks ({error.strerror}):"
            " let no other machine write there",
            file=sys.stderr,
        )
        return True

    def _holder(self):
        """What the process that holds the lock wrote into it; {} if that cannot be read."""
        try:
            holder = json.loads(self.path.read_bytes()[:10_000])
        except (OSError, ValueError):
            return {}
        return holder if isinstance(holder, dict) else {}

    def _refusal(self):
        holder = self._holder()
        if not {"command", "pid", "host", "since"} <= holder.keys():
            who = "by another process"
        else:
            who = "by `{command}` (process {pid} on {host}, since {since})".format(**holder)
        return f"{self.name!r} is being written {who}; wait for its end, or name another place"

    def release(self) -> None:
        """Give the place back; it is given back once."""
        if _held.get(self.place) is self:
            del _held[self.place]
            with contextlib.suppress(OSError):
                os.unlink(self.path)  # before the unlock: else a new holder's file would go
            self._file.close()

    def __enter__(self) -> "Lock":
        return self

    def __exit__(self, *_) -> None:
        self.release()


def _this_process():
    command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
    return {
        "command": command if len(command) <= 200 else f"{command[:200]}...",
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": datetime.now().isoformat(" ", "seconds"),
        "owner": str(Owner.current()),
    }


@functools.cache
def _close_in_children():
    """A forked child closes its copies of the locks' files: they would outlive this process."""

    def close():
        for lock in _held.values():
            lock._file.close()
        _held.clear()

    os.register_at_fork(after_in_child=close)


def _lock_that_covers(target):
    """The lock by which this process holds a file, or a folder above it; None without one."""
    for place in (target, *target.parents):
        if place in _held:
            return _held[place]
    return None


# --- writing -------------------------------------------------------------------------------------


@contextlib.contextmanager
def atomic(path: str | os.PathLike) -> Iterator[Path]:
    """Write a file whole or not at all.

    Gives a temporary path in the same folder. It replaces `path` if the block succeeds, and is
    removed if the block raises. Missing parent folders are created. The place is locked meanwhile,
    unless this process has locked it, or a folder above it. Temporary files that killed processes
    left there are removed.

    A link's target is written, not the link. The permissions of a file that is replaced stay. What
    exists and is neither a file nor a folder (a pipe, a device) is written to at the end.

    Raises:
        InputError: another process writes the file, it is a folder, or the disk is full.
    """
    target = _final_target(path)
    if _is_stream(target):
        with disk_errors(path), _streamed(target) as temporary:
            yield temporary
        return
    if target.is_dir():
        raise InputError(f"{str(path)!r} is a folder; name a file to write")
    if target.exists() and not os.access(target, os.W_OK):
        raise InputError(f"{str(path)!r} is write-protected; name another file")
    target.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        lock = _lock_that_covers(target) or stack.enter_context(Lock(target))
        remove_leftovers(target, lock)
        stack.enter_context(disk_errors(path))
        temporary = temporary_file(target)
        stack.callback(_unlink, temporary)
        yield temporary
        _take_permissions(temporary, target)
        _sync(temporary)
        os.replace(temporary, target)


def temporary_file(target: Path) -> Path:
    """A new, empty file beside `target`, whose name tells its owner and what it is for."""
    suffix = target.suffix if len(target.suffix) < 10 else ""
    handle, name = tempfile.mkstemp(suffix, _temporary_prefix(target), target.parent)
    os.close(handle)
    return Path(name)


def temporary_folder(target: Path) -> Path:
    """The same, a folder."""
    return Path(tempfile.mkdtemp("", _temporary_prefix(target), target.parent))


def _temporary_prefix(target):
    return f"{_hidden(target, str(Owner.current())).name}."


def remove_leftovers(path: str | os.PathLike, lock: Lock | None = None) -> None:
    """Remove the temporary files of `path` that killed processes left behind.

    The name of each tells its owner. One of another machine may live, unless we hold the kernel's
    `lock` of the place, which every writer of it takes.
    """
    path = Path(path)
    owner = r"([0-9a-f]{8}-\d+-\d+)"
    pattern = re.compile(re.escape(_hidden(path, "OWNER").name).replace("OWNER", owner) + r"\..*")
    for leftover in path.parent.glob(glob.escape(_hidden(path, "").name) + "*"):
        match = pattern.fullmatch(leftover.name)
        if not match:
            continue
        writer = Owner.parse(match[1])
        if writer.is_dead or (not writer.is_here and lock and lock.is_kernels):
            if leftover.is_dir() and not leftover.is_symlink():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                _unlink(leftover)


def _hidden(path, end):
    """The path .NAME.END beside `path`; a long NAME is cut, for names have 255 bytes."""
    name = path.name
    if len(os.fsencode(name)) > 150:
        name = f"{name[:30]}-{hashlib.sha256(os.fsencode(name)).hexdigest()[:16]}"
    return path.with_name(f".{name}.{end}")


def _unlink(path):
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


class DiskError(InputError):
    """There is no room to write. Not the fault of the video or the value that was to be written."""


@contextlib.contextmanager
def disk_errors(path: str | os.PathLike) -> Iterator[None]:
    """Raise DiskError for a full disk, a quota, or a limit on the size of files."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        reason = os.strerror(error.errno)
        raise DiskError(
            f"{str(path)!r} cannot be written ({reason}); what was there is unchanged;"
            " make room and repeat the command"
        ) from None


def _take_permissions(temporary, target):
    """Give a new file the owner and permissions of the one that it replaces, or the usual ones."""
    try:
        before = os.stat(target)
    except FileNotFoundError:
        os.chmod(temporary, 0o666 & ~umask())  # mkstemp creates private files
        return
    with contextlib.suppress(PermissionError):  # only root may give files away
        os.chown(temporary, before.st_uid, before.st_gid)
    os.chmod(temporary, stat.S_IMODE(before.st_mode))


def umask() -> int:
    """The permissions that new files of this process do not get."""
    mask = os.umask(0)  # it can only be read by setting it
    os.umask(mask)
    return mask


def _sync(path):
    """Bring a file to the disk: after a power cut, a rename may be older than the content."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- links, pipes, devices -----------------------------------------------------------------------

DESCRIPTORS = ("/dev/fd", "/proc/self/fd")  # /dev/stdout is a link into the second


def _final_target(path):
    """The absolute path that a link, or a chain of links, leads to."""
    path = os.path.abspath(path)
    for _ in range(40):  # as many as the kernel follows
        if os.path.dirname(path) in DESCRIPTORS or not os.path.islink(path):
            break
        path = os.path.abspath(os.path.join(os.path.dirname(path), os.readlink(path)))
    if os.path.dirname(path) in DESCRIPTORS:
        return Path(path)
    return Path(os.path.realpath(path))


def _is_stream(target):
    """Whether it exists and is neither a file nor a folder, or is one of our own descriptors."""
    if str(target.parent) in DESCRIPTORS:
        return True
    return target.exists() and not (target.is_file() or target.is_dir())


@contextlib.contextmanager
def _streamed(target):
    """A temporary file elsewhere; what the block wrote into it is then written to `target`."""
    with tempfile.TemporaryDirectory() as folder:
        temporary = Path(folder) / target.name
        temporary.touch()
        yield temporary
        if str(target.parent) in DESCRIPTORS and target.name.isdecimal():
            sys.stdout.flush()  # what was printed before comes first
            target = os.dup(int(target.name))
        with open(temporary, "rb") as source, open(target, "wb") as stream:
            shutil.copyfileobj(source, stream)


class DeferredFile(io.FileIO):
    """A file for libraries that crash when a write fails: it keeps the first error for `check`.

    HDF5 and PyTorch cannot close a file that they could not write. After an error this one accepts
    everything and stores nothing.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        super().__init__(path, "w+")
        self.error: BaseException | None = None

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        size = len(view)
        try:
            while len(view) and self.error is None:
                view = view[super().write(view) :]
        except BaseException as error:  # KeyboardInterrupt too, which C code would drop
            self.error = error
        return size

    def truncate(self, size: int | None = None) -> int:
        try:
            return super().truncate(size)
        except OSError as error:
            self.error = self.error or error
            return size

    def check(self) -> None:
        """Raise the error of a write that failed, if one did."""
        if self.error is not None:
            raise self.error


def write_all(file: io.FileIO, data: Any) -> None:
    """Write all of `data` to an unbuffered file, which may take it in parts."""
    view = memoryview(data).cast("B")
    while len(view):
        view = view[file.write(view) :]


# --- values --------------------------------------------------------------------------------------


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write a JSON-like value atomically, with NaN as null (JSON has no NaN)."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(nan_to_none(value), indent=1) + "\n", encoding="utf-8")


def nan_to_none(value: Any) -> Any:
    """A copy of a JSON-like value, with None in place of NaN and lists in place of tuples."""
    if isinstance(value, dict):
        return {key: nan_to_none(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [nan_to_none(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def save_torch(path: str | os.PathLike, value: Any) -> None:
    """`torch.save`, atomically: a killed run leaves the old file or the new one."""
    import torch  # here: most of what writes needs no PyTorch

    with atomic(path) as temporary, DeferredFile(temporary) as file:
        torch.save(value, file)
        file.check()
