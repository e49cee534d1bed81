"""Who a process is, whether it still lives, and how a child ends with its parent.

Imports nothing slow, so that decoder processes can use it.
"""

import ctypes
import hashlib
import os
import signal
import socket
from pathlib import Path
from typing import NamedTuple

PARENT = "TCA_PARENT"  # environment variable: the process that a script ends with
ENDED, UNKNOWN = -1, -2  # start times


class Owner(NamedTuple):
    """A process, told apart from a later one of the same number.

    machine: a hash of host name, boot and PID namespace: a number counts within one namespace only
    start: when it started, in clock ticks since the boot
    """

    machine: str
    pid: int
    start: int

    @classmethod
    def current(cls) -> "Owner":
        """This process."""
        return cls(_machine(), os.getpid(), _start_time(os.getpid()))

    @classmethod
    def parse(cls, text: str) -> "Owner":
        """The reverse of str; raises ValueError for other text."""
        machine, pid, start = text.split("-")
        return cls(machine, int(pid), int(start))

    def __str__(self) -> str:
        return f"{self.machine}-{self.pid}-{self.start}"

    @property
    def is_here(self) -> bool:
        """Whether it runs, or ran, where this process can see it."""
        return self.machine == _machine()

    @property
    def is_dead(self) -> bool:
        """Whether it has certainly ended; False for a process of another machine."""
        return self.is_here and _start_time(self.pid) not in (self.start, UNKNOWN)


def _machine():
    facts = [socket.gethostname()]
    for path in ("/proc/sys/kernel/random/boot_id", "/proc/self/ns/pid"):
        try:
            is_link = os.path.islink(path)  # of the namespace, "pid:[4026531836]"
            facts.append(os.readlink(path) if is_link else Path(path).read_text())
        except OSError:  # not Linux
            facts.append("")
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:8]


def _start_time(pid):
    """Field 22 of /proc/PID/stat; ENDED, or UNKNOWN where /proc does not show the process."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        return ENDED if state in b"ZX" else int(fields[18])  # a zombie has closed its files
    except OSError:
        return UNKNOWN if _exists(pid) else ENDED


def _exists(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # of another user
    return True


# --- children -------------------------------------------------------------------------------------


# What stops a training run in order. Ctrl-C sends SIGINT, SLURM SIGUSR1 before its time limit.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def end_with_parent(parent: int | None = None) -> None:
    """From now on the kernel kills this process when its parent ends, even if that is killed.

    Linux ends it with the parent's *thread* that started it, so that thread must outlive it.
    Elsewhere this does nothing.

    Args:
        parent: the parent's number. If the parent has already ended, this process ends at once.
    """
    PR_SET_PDEATHSIG = 1  # from sys/prctl.h
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    except (AttributeError, OSError, TypeError):
        return
    if parent is not None and os.getppid() != parent:
        os._exit(1)


def child_environment() -> dict[str, str]:
    """The environment of one of our scripts that is to end with this process."""
    return {**os.environ, PARENT: str(os.getpid())}


def end_with_starter() -> None:
    """End with the process that started this script, if it asked for that (`child_environment`)."""
    parent = os.environ.pop(PARENT, None)  # not for the children of this process
    if parent is not None and parent.isdecimal():
        end_with_parent(int(parent))
