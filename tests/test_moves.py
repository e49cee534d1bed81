"""An index tells the truth about files: moved, gone, linked, or on a drive that is not mounted."""

import os
import shutil
import subprocess
import sys

import pytest
from helpers.commands import ROOT, environment, refused
from helpers.library import CLIPS, run_search

import search
from videoindex.moves import distinct_files, is_gone


@pytest.fixture
def mine(index_copy, library, tmp_path):
    """The library's index, and a folder with two more videos in it: x.mp4 and inner/y.mp4."""
    folder = tmp_path / "mine"
    (folder / "inner").mkdir(parents=True)
    for name, source in (("x.mp4", "folder/d.mp4"), ("inner/y.mp4", "folder/e.mp4")):
        shutil.copy(library.path(source), folder / name)
        with open(folder / name, "ab") as file:
            file.write(b"\0" * 8)  # the same pictures, another content
    index_copy.add([folder])
    return folder


def known(index):
    return set(index.store.known_files())


def groups_of(index):
    return [set(group.paths) for group in index.duplicates(threshold=0.6, radius=0.5)]


# --- moves --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "before, after",
    [
        ("x.mp4", "renamed.mp4"),
        ("x.mp4", "inner/x.mp4"),
        ("inner/y.mp4", "y.mp4"),  # inner is empty then
        ("inner", "other"),  # the folder has another name
    ],
)
def test_moved_file_is_no_duplicate(index_copy, mine, before, after):
    paths, count = known(index_copy), len(index_copy.store.digests())
    os.rename(mine / before, mine / after)
    update = index_copy.add([mine])
    assert (update.moved, update.added, update.same_content, update.removed) == (1, 0, 0, 0)
    if before == "inner":
        before, after = "inner/y.mp4", "other/y.mp4"
    assert known(index_copy) == paths - {str(mine / before)} | {str(mine / after)}
    assert len(index_copy.store.digests()) == count


def test_moved_file_to_another_source(index_copy, mine, tmp_path):
    target = tmp_path / "elsewhere.mp4"
    os.rename(mine / "x.mp4", target)
    assert index_copy.add([target]).moved == 1
    assert str(target) in known(index_copy) and str(mine / "x.mp4") not in known(index_copy)


def test_copy_is_no_move(index_copy, mine):
    shutil.copy(mine / "x.mp4", mine / "copy.mp4")
    update = index_copy.add([mine])
    assert (update.moved, update.same_content) == (0, 1)
    assert {str(mine / "x.mp4"), str(mine / "copy.mp4")} in [
        group & {str(mine / "x.mp4"), str(mine / "copy.mp4")} for group in groups_of(index_copy)
    ]


def test_copy_of_a_file_on_a_drive_that_is_away_is_no_move(index_copy, mine, tmp_path):
    """The drive's folder is empty, or has gone, and nothing else was found there."""
    target = tmp_path / "copy.mp4"
    shutil.copy(mine / "x.mp4", target)
    os.rename(mine, tmp_path / "away")
    for folder_is_left in (False, True):
        if folder_is_left:
            mine.mkdir()
        index_copy.remove([target])
        assert index_copy.add([target]).moved == 0
        assert {str(mine / "x.mp4"), str(target)} <= known(index_copy)


def test_search_index_counts_moves(index_copy, mine):
    os.rename(mine / "x.mp4", mine / "z.mp4")
    result = run_search("index", mine, "--index", index_copy.folder, "--workers", 1)
    assert "0 added, 0 replaced, 1 moved, 0 of known content, 1 unchanged" in result.stdout


# --- missing files ------------------------------------------------------------------------------


def test_missing_file_is_in_no_group(index_copy, library, mine):
    copy = mine / "copy.mp4"
    shutil.copy(mine / "x.mp4", copy)
    index_copy.add([mine])
    whole = {library.path("folder/d.mp4"), str(mine / "x.mp4"), str(copy)}
    assert whole in groups_of(index_copy)
    copy.unlink()
    assert whole - {str(copy)} in groups_of(index_copy)
    (mine / "x.mp4").unlink()
    assert not any(group & whole for group in groups_of(index_copy))
    table = run_search("duplicates", "--index", index_copy.folder)
    assert "copy.mp4" not in table.stdout and "x.mp4" not in table.stdout


def test_missing_file_is_marked_in_a_query(index_copy, library, mine):
    clip = library.clip("folder/d.mp4")
    matches = {match.path: match for match in index_copy.query(clip, threshold=0.5)}
    assert set(matches) == {library.path("folder/d.mp4"), str(mine / "x.mp4")}
    (mine / "x.mp4").unlink()
    matches = {match.path: match for match in index_copy.query(clip, threshold=0.5)}
    assert matches[str(mine / "x.mp4")].missing
    assert not matches[library.path("folder/d.mp4")].missing
    query = ("query", library.path("folder/d.mp4"), "--index", index_copy.folder)
    (line,) = [line for line in run_search(*query).stdout.splitlines() if "x.mp4" in line]
    assert "missing" in line


def test_query_names_a_file_that_exists_before_one_that_does_not(index_copy, library, mine):
    gone, there = mine / "a-gone.mp4", mine / "x.mp4"
    shutil.copy(there, gone)
    index_copy.add([mine])
    gone.unlink()
    found = {match.path: match for match in index_copy.query(library.clip("folder/d.mp4"))}
    assert not found[str(there)].missing and found[str(there)].same_content_paths == []


# --- links --------------------------------------------------------------------------------------


def test_links_to_one_file_are_one_file(index_copy, mine):
    (mine / "a-symlink.mp4").symlink_to(mine / "x.mp4")
    os.link(mine / "x.mp4", mine / "z-hard.mp4")
    update = index_copy.add([mine])
    assert (update.unchanged, update.added, update.same_content) == (2, 0, 0)
    assert len(index_copy) == len(CLIPS) + 2


def test_links_in_an_index_that_knows_both_are_no_duplicates(index_copy, mine, tmp_path):
    """Each was named by itself."""
    os.link(mine / "x.mp4", tmp_path / "hard.mp4")
    (tmp_path / "soft.mp4").symlink_to(mine / "x.mp4")
    for name in ("hard.mp4", "soft.mp4"):
        index_copy.add([tmp_path / name])
    assert {str(tmp_path / "hard.mp4"), str(tmp_path / "soft.mp4")} <= known(index_copy)
    names = [name for group in groups_of(index_copy) for name in group]
    assert not {str(tmp_path / "soft.mp4"), str(mine / "x.mp4")} & set(names)


def test_distinct_files_prefers_what_is_no_link(tmp_path):
    real, link, other = (str(tmp_path / name) for name in ("real", "a-link", "other"))
    for path in (real, other):
        with open(path, "w") as file:
            file.write("x")
    os.symlink(real, link)
    gone = str(tmp_path / "gone")
    assert distinct_files([link, gone, other, real]) == [other, real]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may look everywhere")
def test_what_cannot_be_looked_at_is_not_gone(tmp_path):
    (tmp_path / "shut").mkdir(mode=0)
    assert not is_gone(tmp_path / "shut" / "x")
    assert is_gone(tmp_path / "open")


# --- drives -------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["empty", "absent", "without videos"])
def test_prune_refuses_a_folder_whose_drive_may_be_away(index_copy, mine, tmp_path, state):
    before = known(index_copy)
    os.rename(mine, tmp_path / "away")
    if state != "absent":
        mine.mkdir()
    if state == "without videos":
        (mine / "NOT MOUNTED.txt").write_text("plug it in")
    arguments = ("index", mine, "--prune", "--index", index_copy.folder, "--device", "cpu")
    message = refused(search.main, *arguments)
    assert "the index knows 2 files there; is its drive mounted? To forget them" in message
    assert known(index_copy) == before
    command = message.partition("truly: search.py ")[2]
    assert command == f"remove {str(mine)!r} --index {str(index_copy.folder)!r}"
    assert run_search("remove", mine, "--index", index_copy.folder).returncode == 0
    assert not any(path.startswith(str(mine)) for path in known(index_copy))


def test_verify_advises_what_works(index_copy, mine):
    shutil.rmtree(mine)
    result = run_search("verify", "--index", index_copy.folder)
    notes = [line for line in result.stdout.splitlines() if line.startswith("note: ")]
    assert len(notes) == 2
    assert all("to forget it, use `remove` with it or its folder" in note for note in notes)
    assert run_search("remove", mine, "--index", index_copy.folder).returncode == 0
    result = run_search("verify", "--index", index_copy.folder)
    assert result.returncode == 0 and "note: " not in result.stdout


# In a namespace where this process may mount: a drive at VIDEOS/drive, that is away later.
MOUNTED = """
import os, subprocess, sys
sys.path.insert(0, "tests")
from helpers.library import made_up_video
import numpy as np
from videoindex.index import VideoIndex
from videoindex.moves import Drives, current_mounts
from videoindex.sources import find_files
from videoindex.store import IndexStore

folder, index = sys.argv[1:]
drive = os.path.join(folder, "drive")
subprocess.run(["mount", "-t", "tmpfs", "none", drive], check=True)
for path in (f"{folder}/here.mp4", f"{drive}/there.mp4"):
    with open(path, "w") as file:
        file.write(path)
store = IndexStore.create(index, 16, {"identity": {"fps": "1"}})
found, _ = find_files([folder], index)
with store.writing():
    for i, file in enumerate(found):
        store.add_content(f"{i:064}", made_up_video(np.random.default_rng(i)), [file])
library = VideoIndex(index)
assert library.add([folder]).unchanged == 2
assert drive in library.store.settings["mounts"]
subprocess.run(["umount", drive], check=True)
update = library.add([folder], prune=True)
assert (update.removed, update.unchanged) == (0, 1), update
assert update.failed == [(drive, "no drive is mounted there now; its 1 files stay in the index")]
assert len(library) == 2

with open(f"{drive}/there.mp4", "w") as file:  # the folder takes the drive's place
    file.write("x")
found, _ = find_files([folder], index)
assert drive not in current_mounts(library.store.settings["mounts"], found)
assert Drives([drive]).absent_drive(f"{drive}/x.mp4") == drive
assert Drives([drive]).absent_drive(f"{folder}/x.mp4") == ""
"""


def can_mount():
    command = ["unshare", "-rm", "mount", "-t", "tmpfs", "none", "/mnt"]
    return shutil.which("unshare") and not subprocess.run(command, capture_output=True).returncode


@pytest.mark.skipif(not can_mount(), reason="this system lets no user mount (unshare -rm)")
def test_prune_keeps_what_is_on_a_drive_that_is_not_mounted(tmp_path):
    """The drive is mounted below a folder that is there."""
    (tmp_path / "videos/drive").mkdir(parents=True)
    arguments = [str(tmp_path / "videos"), str(tmp_path / "index")]
    result = subprocess.run(
        ["unshare", "-rm", sys.executable, "-c", MOUNTED, *arguments],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
