"""Trouble from outside: other processes, file systems without locks, small disks."""

import contextlib
import ctypes
import errno
import multiprocessing
import os
import platform
import struct
import subprocess
import time
from pathlib import Path

import pytest

from files import Lock

FLOCK = {"x86_64": (0xC000003E, 73), "aarch64": (0xC00000B7, 32)}  # architecture, system call


def without_locks(code=errno.ENOLCK):
    """From now on flock fails in this process and its children, as on NFS without lockd.

    By a filter in the kernel (seccomp), so that libraries written in C meet it too.
    """
    architecture, flock = FLOCK[platform.machine()]
    LOAD, JUMP_EQUAL, RETURN = 0x20, 0x15, 0x06
    ALLOW, ERRNO = 0x7FFF0000, 0x00050000
    program = [
        (LOAD, 0, 0, 4),  # architecture
        (JUMP_EQUAL, 0, 3, architecture),
        (LOAD, 0, 0, 0),  # number of the system call
        (JUMP_EQUAL, 0, 1, flock),
        (RETURN, 0, 0, ERRNO | code),
        (RETURN, 0, 0, ALLOW),
    ]
    packed = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in program))
    header = struct.pack("HxxxxxxP", len(program), ctypes.addressof(packed))
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    NO_NEW_PRIVS, SET_SECCOMP, FILTER = 38, 22, 2
    assert prctl(NO_NEW_PRIVS, 1, 0, 0, 0) == 0
    assert prctl(SET_SECCOMP, FILTER, header, 0, 0) == 0, os.strerror(ctypes.get_errno())


def in_a_fork(function, *arguments):
    """Call a function in a forked process; returns its exit code and what it returned or raised.

    Quicker than a new interpreter, which imports torch for seconds.
    """
    receiver, sender = multiprocessing.Pipe(duplex=False)

    def work():
        try:
            sender.send(function(*arguments))
        except Exception as error:
            sender.send(f"{type(error).__name__}: {error}")

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join()
    return process.exitcode, receiver.recv() if receiver.poll() else None


@contextlib.contextmanager
def small_disk(folder, size):
    """`folder` as a disk of so many bytes, in memory. Skips the test where we may not mount."""
    folder.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a small disk needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@contextlib.contextmanager
def holder_of(place, folder=False):
    """Another process that holds a place until the block ends; gives its number."""
    locked, end = multiprocessing.Event(), multiprocessing.Event()

    def hold():
        with Lock(place, folder):
            locked.set()
            end.wait()

    process = multiprocessing.get_context("fork").Process(target=hold)
    process.start()
    assert locked.wait(10)
    yield process.pid
    end.set()
    process.join()


def has_ended(pid, seconds):
    """Whether a process ends within so many seconds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] == b"Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.01)
    return False
