"""No command loses or damages work: two writers, kills, full disks; see tests/torture.py."""

import os
import subprocess

import pytest
import torture
from helpers.commands import refused
from helpers.systems import holder_of

import checkpoint
import files
from datasets import download

# What a command locks, of its output folder: a file, or with a slash a folder.
PLACES = {
    "extract": "f.hdf5",
    "fit": "pca.npz",
    "apply": "p.hdf5",
    "to": "x.hdf5",
    "datasets": "d.hdf5",
    "npy": "npy",
    "merge": "m.hdf5",
    "split": "b.hdf5",
    "train": "run/",
    "evaluate": "results.json",
    "reproduce": "tables/",
    "demo": "demo/",
    "index": "index/",
    "remove": "index/",
    "query": "q.html",
    "duplicates": "d.html",
    "plan": "plan.csv",
    "reject": "index/",
    "choices": "index/",
    "visualize": "a.png",
    "pack": "packed/model.pth",
}


# These change an index that is there.
CHANGED = ("remove", "reject", "choices")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The inputs of every command."""
    world = torture.World(tmp_path_factory.mktemp("world"))

    def run(main, arguments):
        assert not main([str(argument) for argument in arguments])

    world.prepare(run)
    return world


def test_place_of_every_command_is_known():
    assert PLACES.keys() == torture.COMMANDS.keys()


@pytest.mark.parametrize("name", PLACES)
def test_command_whose_place_another_process_writes_is_told_by_whom(
    name, small, tmp_path, monkeypatch
):
    monkeypatch.setattr(files, "WAIT", 0)
    monkeypatch.setattr(checkpoint, "RESTART", 0)
    main, arguments, prepare = torture.COMMANDS[name]
    if prepare:
        prepare(small, tmp_path)
    place = tmp_path / PLACES[name]
    before = sorted(tmp_path.rglob("*"))
    with holder_of(place, folder=PLACES[name].endswith("/")) as pid:
        message = refused(main, *arguments(small, tmp_path))
        assert str(place) in message and f"(process {pid} on " in message
        assert place.is_dir() or not place.exists()
        if place.is_dir() and name not in CHANGED:
            assert [path.name for path in place.iterdir()] == [".lock"]
    if name in CHANGED:
        assert sorted(tmp_path.rglob("*")) == before


def test_download_of_a_file_that_another_process_fetches_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "WAIT", 0)
    with holder_of(tmp_path / "evve.pickle"):
        folder = tmp_path / "from"
        folder.mkdir()
        message = refused(
            download.main, "--from", folder, "--annotation_dir", tmp_path, "--only", "EVVE"
        )
    assert "evve.pickle' is being written by" in message


@pytest.mark.slow
@pytest.mark.parametrize("trial, count", [("kill", 8), ("pair", 1), ("disk", 2)])
def test_commands_keep_their_promises(trial, count, capsys):
    """The quick ones; `make torture` takes all, and more often."""
    if trial == "disk" and not _may_mount():
        pytest.skip("mounting a small disk needs root")
    quick = ["apply", "datasets", "npy", "train", "evaluate", "remove"]
    status = torture.main([trial, str(count), "--only", *quick, "--seed", os.environ["TEST_SEED"]])
    assert status == 0, capsys.readouterr().out


def _may_mount():
    return subprocess.run(["mount", "-f", "-t", "tmpfs", "x", "/mnt"]).returncode == 0
