"""Which files are indexed, and which have vanished."""

import os

from videoindex.sources import find_files, vanished_files
from videoindex.store import FileEntry


def test_find_files_in_a_folder(tmp_path):
    """Sorted, each folder once, without hidden files, other suffixes, or the index itself."""
    index = tmp_path / "my.index"
    index.mkdir()
    (index / "frames-0.f16").write_bytes(b"x")
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "up").symlink_to(tmp_path)  # a loop of folders
    (tmp_path / ".hidden").mkdir()
    for name in ("b.mp4", "a.mkv", "notes.txt", ".c.mp4", "inner/d", ".hidden/e.mp4"):
        (tmp_path / name).write_bytes(b"video")
    found, failed = find_files([tmp_path, tmp_path / "b.mp4"], index)
    names = [os.path.relpath(file.path, tmp_path) for file in found]
    assert names == ["a.mkv", "b.mp4", "inner/d"] and failed == []
    assert found[0].size == 5 and found[0].mtime == (tmp_path / "a.mkv").stat().st_mtime_ns


def test_find_files_passes_over_what_is_not_video(tmp_path):
    for name in ("a.mp4", "a.description", "b.heic", "c.zip", "d.nfo"):
        (tmp_path / name).write_bytes(b"x")
    os.mkfifo(tmp_path / "pipe")
    found, failed = find_files([tmp_path], tmp_path / "index")
    assert [file.path for file in found] == [str(tmp_path / "a.mp4")]
    assert failed == [(str(tmp_path / "pipe"), "it is not a regular file")]


def test_find_files_takes_a_named_file_with_any_suffix(tmp_path):
    path = tmp_path / "video.txt"
    path.write_bytes(b"x")
    (file,), failed = find_files([path], tmp_path / "index")
    assert file.path == str(path) and not failed


def test_find_files_says_why_not(tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "round.mp4").symlink_to(tmp_path / "round.mp4")
    found, failed = find_files([tmp_path, tmp_path / "nowhere.mp4"], tmp_path / "index")
    reasons = {os.path.basename(path): reason for path, reason in failed}
    assert not found and reasons == {
        "pipe.mp4": "it is not a regular file",
        "round.mp4": "Too many levels of symbolic links",
        "nowhere.mp4": "No such file or directory",
    }


def test_vanished_files_not_those_in_an_unreadable_folder():
    known = ["/v/a.mp4", "/v/shut/b.mp4", "/v/gone.mp4", "/w/c.mp4"]
    found = [FileEntry("/v/a.mp4", 1, 1), FileEntry("/w/c.mp4", 1, 1)]
    failed = [("/v/shut", "Permission denied")]
    assert vanished_files(known, ["/"], found, failed) == ["/v/gone.mp4"]


def test_vanished_files_only_in_the_folders_given(tmp_path):
    known = [str(tmp_path / "gone.mp4"), str(tmp_path) + " other/gone.mp4"]
    assert vanished_files(known, [tmp_path], [], []) == [str(tmp_path / "gone.mp4")]
