"""Files are written whole or not at all, by one process at a time."""

import fcntl
import json
import multiprocessing
import os
import resource
import signal
import socket
import stat
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from helpers.systems import holder_of, in_a_fork, small_disk, without_locks

from files import DiskError, Lock, atomic, remove_leftovers, save_torch, write_json
from processes import Owner
from utils import InputError


def test_atomic_replaces_the_file_only_if_the_block_succeeds(tmp_path):
    path = tmp_path / "deep" / "er" / "x.txt"
    with atomic(path) as temporary:
        assert temporary.parent == path.parent
        assert not path.exists()
        temporary.write_text("old")
    assert path.read_text() == "old"
    assert os.listdir(path.parent) == ["x.txt"]

    with atomic(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert os.listdir(path.parent) == ["x.txt"]


@pytest.mark.parametrize("error", [ValueError, InputError, KeyboardInterrupt, SystemExit])
def test_atomic_keeps_the_old_file_if_the_block_raises(error, tmp_path):
    path = tmp_path / "x.txt"
    with pytest.raises(error), atomic(path) as temporary:
        temporary.write_text("half")
        raise error
    assert not list(tmp_path.iterdir())

    path.write_text("old")
    with pytest.raises(error), atomic(path) as temporary:
        temporary.write_text("half")
        raise error
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_atomic_file_has_the_mode_of_any_new_file(tmp_path):
    write_json(tmp_path / "ours.json", {})
    (tmp_path / "plain.json").write_text("{}")
    ours, plain = ((tmp_path / name).stat().st_mode for name in ("ours.json", "plain.json"))
    assert stat.S_IMODE(ours) == stat.S_IMODE(plain)


def test_remove_leftovers_of_a_killed_run_and_nothing_else(tmp_path):
    path = tmp_path / "a[1].pth"

    def work():
        with atomic(path) as temporary:
            temporary.write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_a_fork(work) == (-signal.SIGKILL, None)
    lock, leftover = sorted(tmp_path.iterdir(), key=lambda file: file.suffix)
    assert lock.name == ".a[1].pth.lock"  # SIGKILL leaves it no time to clean up
    lock.unlink()
    owner = leftover.name.split(".")[4]  # .a[1].pth.OWNER.random.pth

    others = [
        "a[1].pth",
        ".a[1].pth.short.pth",
        f".a1.pth.{owner}.12345678.pth",  # of another file
        f".a[1].pth.{Owner.current()}.12345678.pth",  # its owner lives
        f".a[1].pth.{Owner('0' * 8, 1, 1)}.12345678.pth",  # on another machine, perhaps
    ]
    for name in others:
        (tmp_path / name).touch()
    remove_leftovers(path)
    assert sorted(os.listdir(tmp_path)) == sorted(others)
    with Lock(path) as lock:  # which a writer on another machine would have
        remove_leftovers(path, lock)
    assert sorted(os.listdir(tmp_path)) == sorted(others[:-1])


@pytest.mark.parametrize("name", ["a" * 255, "ü" * 127, "a" * 245 + ".pth"])
def test_atomic_writes_a_file_of_any_name_that_the_system_allows(name, tmp_path):
    with atomic(tmp_path / name) as temporary:
        temporary.write_text("x")
    assert os.listdir(tmp_path) == [name]


def test_atomic_refuses_a_folder_before_the_work(tmp_path):
    with pytest.raises(InputError, match="is a folder"), atomic(tmp_path):
        raise AssertionError("the work began")


# --- what is there already ----------------------------------------------------------------------


def test_atomic_keeps_the_permissions_of_the_file_that_it_replaces(tmp_path):
    path = tmp_path / "x.json"
    path.touch()
    path.chmod(0o640)
    write_json(path, 1)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


@pytest.mark.skipif(os.getuid() != 0, reason="only root may give files away")
def test_atomic_keeps_the_owner_of_the_file_that_it_replaces(tmp_path):
    path = tmp_path / "x.json"
    path.touch()
    os.chown(path, 1234, 1235)
    write_json(path, 1)
    assert (path.stat().st_uid, path.stat().st_gid) == (1234, 1235)


@pytest.mark.parametrize("exists", [True, False])
def test_atomic_writes_the_target_of_a_chain_of_links(exists, tmp_path):
    target, link, first = tmp_path / "disk" / "x.json", tmp_path / "link", tmp_path / "first"
    target.parent.mkdir()
    if exists:
        target.write_text("old")
    link.symlink_to(os.path.join("disk", "x.json"))
    first.symlink_to(link)
    write_json(first, [1])
    assert first.is_symlink() and link.is_symlink() and not target.is_symlink()
    assert json.loads(target.read_text()) == [1]
    assert os.listdir(target.parent) == ["x.json"]


def test_atomic_writes_through_a_pipe_and_leaves_it(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with ThreadPoolExecutor(1) as pool:
        received = pool.submit(pipe.read_text)
        write_json(pipe, [1])
        assert json.loads(received.result(timeout=10)) == [1]
    assert pipe.is_fifo() and os.listdir(tmp_path) == ["pipe"]


@pytest.mark.parametrize("folder", ["/dev/fd", "/proc/self/fd"])
def test_atomic_writes_to_an_open_file_in_turn(folder, tmp_path):
    """As to /dev/stdout, a link to such a name, where the shell has opened a file for us."""
    with open(tmp_path / "output", "w") as output:
        (tmp_path / "link").symlink_to(f"{folder}/{output.fileno()}")
        output.write("a\n")
        output.flush()
        write_json(tmp_path / "link", 1)
        output.write("b\n")
    assert (tmp_path / "output").read_text() == "a\n1\nb\n"


# --- two writers --------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", [False, True])
def test_lock_names_who_holds_it_and_is_free_again(folder, tmp_path):
    place = tmp_path / "place"
    with holder_of(place, folder) as pid:
        with pytest.raises(InputError) as refused:
            Lock(place, folder, wait=0)
        message = str(refused.value)
        assert f"{str(place)!r} is being written by `{Path(sys.argv[0]).name}" in message
        assert f"process {pid} on {socket.gethostname()}, since 20" in message
    with Lock(place, folder):
        pass
    left = [file for file in tmp_path.rglob("*") if file != place]
    assert not left  # nor the lock file


def test_lock_waits_for_a_short_writer(tmp_path):
    with ThreadPoolExecutor(1) as pool:
        lock = Lock(tmp_path / "x")
        pool.submit(lambda: (time.sleep(0.2), lock.release()))
        with Lock(tmp_path / "x", wait=5):
            pass


def test_lock_ends_with_a_killed_process_though_its_child_lives(tmp_path):
    receiver, sender = multiprocessing.Pipe(duplex=False)

    def work():
        lock = Lock(tmp_path / "x")  # held by the name
        forked, said = multiprocessing.Pipe(duplex=False)
        child = os.fork()
        if child == 0:  # os.fork has returned: what a child does first is done
            said.send(True)
            time.sleep(60)
        forked.recv()
        sender.send((child, str(lock.path)))
        os.kill(os.getpid(), signal.SIGKILL)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join()
    child, path = receiver.recv()
    try:
        assert os.path.exists(path)
        Lock(tmp_path / "x", wait=0).release()
    finally:
        os.kill(child, signal.SIGKILL)


def test_lock_whose_file_the_holder_removes_meanwhile_is_taken_anew(tmp_path, monkeypatch):
    """Between our opening the lock file and locking it, the other writer finishes."""
    path, flock, calls = tmp_path / "x", fcntl.flock, []

    def late(*args):
        if not calls:
            (tmp_path / ".x.lock").unlink()
        calls.append(args)
        flock(*args)

    monkeypatch.setattr(fcntl, "flock", late)
    with Lock(path), pytest.raises(InputError, match="is being written"):
        Lock(path, wait=0)
    assert len(calls) == 3


def test_lock_of_a_folder_covers_the_files_in_it(tmp_path):
    with Lock(tmp_path, folder=True):
        write_json(tmp_path / "deep" / "x.json", 1)
        with pytest.raises(InputError, match="is being written"):
            Lock(tmp_path, folder=True, wait=0)
    with holder_of(tmp_path / "x.json"), pytest.raises(InputError, match="is being written"):
        write_json(tmp_path / "x.json", 1)


def test_lock_without_the_kernels_says_so_and_still_refuses_a_living_holder(tmp_path, capfd):
    place = tmp_path / "place"

    def take():
        without_locks()
        with Lock(place, wait=0):
            pass

    with holder_of(place):
        _, message = in_a_fork(take)
        assert message.startswith("InputError") and "is being written by" in message
    capfd.readouterr()
    assert in_a_fork(take) == (0, None)
    (notice,) = capfd.readouterr().err.splitlines()
    assert notice.startswith("notice: ") and "without locks (No locks available)" in notice
    assert not list(tmp_path.iterdir())


# --- a full disk --------------------------------------------------------------------------------


def test_full_disk_is_one_line_and_leaves_the_old_file(tmp_path):
    with small_disk(tmp_path / "disk", 64 << 10) as disk:
        write_json(disk / "x.json", "old")
        with pytest.raises(DiskError, match="x.json' cannot be written .No space left"):
            write_json(disk / "x.json", "new" * (64 << 10))
        assert json.loads((disk / "x.json").read_text()) == "old"
        assert os.listdir(disk) == ["x.json"]


def test_limit_on_the_size_of_files_is_one_line(tmp_path):
    def work():
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        write_json(tmp_path / "x.json", "x" * 20_000)

    _, message = in_a_fork(work)
    assert message.startswith("DiskError") and "File too large" in message
    assert not list(tmp_path.iterdir())


def test_torch_file_on_a_full_disk_is_one_line_and_leaves_the_old_file(tmp_path):
    with small_disk(tmp_path / "disk", 256 << 10) as disk:
        save_torch(disk / "x.pth", torch.ones(10))
        with pytest.raises(DiskError, match="No space left"):
            save_torch(disk / "x.pth", torch.ones(256 << 10))
        assert torch.load(disk / "x.pth").sum() == 10
        assert os.listdir(disk) == ["x.pth"]


# --- values -------------------------------------------------------------------------------------


def test_write_json_round_trip(tmp_path):
    value = {"b": [1, 2.5, None], "a": {"ü": "x"}}
    write_json(tmp_path / "x.json", value)
    assert json.loads((tmp_path / "x.json").read_text(encoding="utf-8")) == value


def test_write_json_nan_becomes_null(tmp_path):
    write_json(tmp_path / "x.json", {"mAP": [float("nan"), (1.0, float("nan"))]})
    assert json.loads((tmp_path / "x.json").read_text()) == {"mAP": [None, [1.0, None]]}
