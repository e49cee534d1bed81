"""A long film whose indexing was killed goes on where it was, and ends as an unbroken run."""

import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from helpers.clips import textured, write_video
from helpers.commands import python
from helpers.library import largest_file, stored_data

from utils import InputError
from videoindex.index import VideoIndex
from videoindex.results import AddProgress

SECONDS, PART = 75, 20

# index.add of FILM, killed when so many of its SECONDS are done.
KILLED = """
import os, signal, sys
from utils import InputError
from videoindex.index import VideoIndex
from videoindex.results import AddProgress

class Killer(AddProgress):
    def on_seconds(self, path, seconds):
        if seconds >= float(sys.argv[3]):
            os.kill(os.getpid(), signal.SIGKILL)

index = VideoIndex(sys.argv[1], device="cpu", workers=1)
index.add([sys.argv[2]], progress=Killer(), part_seconds=float(sys.argv[4]))
"""


def kill_at(seconds, index, film, part=PART):
    assert python(KILLED, index, film, seconds, part).returncode == -9


class Resumed(AddProgress):
    def __init__(self):
        self.seconds = {}

    def on_resume(self, path, seconds):
        self.seconds[path] = seconds


@pytest.fixture
def film(tmp_path):
    path = tmp_path / "film.mkv"
    write_video(path, textured(3, 2 * SECONDS), rate=2)
    return path


@pytest.fixture
def computed(pipeline):
    """The number of frames that the backbone was given, as a list that grows."""
    counts = []

    def count(module, arguments):
        frames = arguments[0].flatten(1)  # those that fill up a batch are zero
        counts.append(int((frames.amax(1) > 0).sum()))

    assert isinstance(pipeline.backbone, torch.nn.Module)
    hook = pipeline.backbone.register_forward_pre_hook(count)
    yield counts
    hook.remove()


def parts_of(folder):
    return sorted(path.name[-5] for path in folder.glob("part-*"))


def go_on(folder, pipeline, *paths, part=PART):
    """Index the paths; gives what is stored, and {path: seconds} that were resumed."""
    index, resumed = VideoIndex(folder, pipeline=pipeline), Resumed()
    update = index.add(paths, progress=resumed, part_seconds=part)
    assert not update.failed
    return stored_data(index), resumed.seconds


def test_killed_film_goes_on_and_ends_as_an_unbroken_run(film, tmp_path, pipeline, computed):
    kill_at(50, tmp_path / "index", film)
    assert parts_of(tmp_path / "index") == ["0", "1"]
    kill_at(65, tmp_path / "index", film)
    assert parts_of(tmp_path / "index") == ["0", "1", "2"]
    stored, resumed = go_on(tmp_path / "index", pipeline, film)
    assert resumed == {str(film): 60} and sum(computed) == SECONDS - 60
    assert parts_of(tmp_path / "index") == []
    unbroken, _ = go_on(tmp_path / "unbroken", pipeline, film)
    assert sum(computed) == SECONDS - 60 + SECONDS
    assert stored == unbroken and len(stored[str(film)][0]) == SECONDS * 512 * 2


def test_parts_follow_a_renamed_film(film, tmp_path, pipeline, computed):
    kill_at(50, tmp_path / "index", film)
    renamed = film.rename(tmp_path / "renamed.mkv")
    _, resumed = go_on(tmp_path / "index", pipeline, renamed)
    assert resumed == {str(renamed): 40} and sum(computed) == SECONDS - 40


def test_film_of_one_part_has_none(film, tmp_path):
    kill_at(SECONDS, tmp_path / "index", film, part=SECONDS)
    assert parts_of(tmp_path / "index") == []


def test_parts_of_another_length_are_not_taken(film, tmp_path, pipeline, computed):
    kill_at(50, tmp_path / "index", film)
    _, resumed = go_on(tmp_path / "index", pipeline, film, part=30)
    assert not resumed and sum(computed) == SECONDS and parts_of(tmp_path / "index") == []


def test_damaged_part_is_computed_again(film, tmp_path, pipeline, computed):
    kill_at(50, tmp_path / "index", film)
    (path,) = (tmp_path / "index").glob("part-*-1.npz")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(data)
    stored, resumed = go_on(tmp_path / "index", pipeline, film)
    assert resumed == {str(film): 20} and sum(computed) == SECONDS - 20
    assert stored == go_on(tmp_path / "unbroken", pipeline, film)[0]


def test_parts_are_removed_when_their_film_is_gone_or_changed(film, tmp_path, pipeline, library):
    kill_at(50, tmp_path / "index", film)
    shutil.copytree(tmp_path / "index", tmp_path / "changed")
    short = library.videos / "a.mp4"
    go_on(tmp_path / "index", pipeline, short)
    assert parts_of(tmp_path / "index") == ["0", "1"]  # another film's run leaves them
    with open(film, "ab") as file:
        file.write(b"more")
    go_on(tmp_path / "changed", pipeline, short)
    assert parts_of(tmp_path / "changed") == []
    film.unlink()
    go_on(tmp_path / "index", pipeline, short)
    assert parts_of(tmp_path / "index") == []


class DecoderKiller(AddProgress):
    """Kills the decoder, this process's child, as FFmpeg's crash would."""

    def on_seconds(self, path, seconds):
        if seconds == PART + 1:  # one part is stored
            tasks = Path("/proc/self/task").glob("*/children")
            children = {pid for task in tasks for pid in task.read_text().split()}
            for pid in map(int, children):
                if b"decoding.py" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    os.kill(pid, signal.SIGKILL)


def test_parts_of_a_film_that_crashes_its_decoder_are_removed(film, tmp_path, pipeline):
    index = VideoIndex(tmp_path / "index", pipeline=pipeline)
    update = index.add([film], progress=DecoderKiller(), part_seconds=PART)
    assert update.failed == [(str(film), "decoding it crashes FFmpeg (SIGKILL)")]
    assert parts_of(tmp_path / "index") == []


def test_disk_that_is_full_when_a_part_is_written(film, tmp_path, pipeline):
    index = VideoIndex(tmp_path / "index", pipeline=pipeline)
    with largest_file(100_000), pytest.raises(InputError, match="make room and repeat"):
        index.add([film], part_seconds=60)  # 60 rows of 3.5 KB
    assert [path.name for path in index.folder.iterdir()] == ["index.db"]
    stored, _ = go_on(tmp_path / "index", pipeline, film)
    assert stored == go_on(tmp_path / "unbroken", pipeline, film)[0]
