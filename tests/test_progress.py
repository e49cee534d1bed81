"""What `search.py index` says while it works."""

import fcntl
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import termios

import pytest
from helpers.clips import textured, write_video
from helpers.commands import ROOT, environment

from features.decoding import Decoder
from videoindex.progress import StatedLengths, Tally, format_duration


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def tally(paths, stated):
    clock = Clock()
    return Tally(paths, stated, clock), clock


def test_tally_of_files_hours_speed_and_time_left():
    """Three films of two hours each; a fourth states nothing and counts as their mean."""
    hours = 3600
    stated = {"/v/a.mkv": 2 * hours, "/v/b.mkv": 2 * hours, "/v/c.mkv": 2 * hours, "/v/d.mkv": None}
    done, clock = tally(list(stated), stated)
    assert done.text() == "0/4 files, 0.0/8.0 h" and done.share() == 0
    for second in range(51):  # 40 seconds of film in each
        clock.now = 100 + second
        done.advance("/v/a.mkv", 40.0 * second)
    assert done.text() == (  # (8 h - 2000 s) / 40 is 11 min
        "0/4 files, 0.6/8.0 h, 40 × real time, 11 min left; 33:20/2:00:00 a.mkv"
    )
    done.finish("/v/a.mkv")
    done.finish("/v/d.mkv")  # failed at once
    assert done.text().startswith("2/4 files, 0.6/4.6 h, 40 × real time, 6 min left")
    assert done.share() == pytest.approx(2000 / (2000 + 4 * hours))


def test_tally_takes_the_speed_of_the_last_minute():
    done, clock = tally(["a"], {"a": 1e6})
    for second in range(1, 601):
        clock.now = 100 + second
        done.advance("a", 100.0 * second if second <= 300 else 30000 + 10.0 * (second - 300))
    assert done.speed == pytest.approx(10)


def test_tally_without_any_length_counts_files():
    done, clock = tally(["a", "b"], {})
    done.advance("a", 1.0)
    clock.now += 10
    done.advance("a", 51.0)
    done.finish("a")
    assert done.text() == "1/2 files, 5 × real time" and done.share() == 0.5


def test_tally_of_a_file_that_is_only_looked_up():
    """Of known content: it is done at once, and says nothing about the speed."""
    done, clock = tally(["a", "b"], {"a": 3600.0, "b": 3600.0})
    clock.now += 10
    done.advance("a", 0.0)
    assert done.text() == "0/2 files, 0.0/2.0 h; a"
    done.finish("a")
    assert done.text() == "1/2 files, 1.0/2.0 h"


def test_tally_of_a_resumed_film_takes_the_speed_of_the_rest():
    done, clock = tally(["a"], {"a": 3600.0})
    done.resume("a", 1200.0)
    for second in range(21):  # decoding alone, 60 seconds of film in each; then all the work
        clock.now = 100 + second
        done.advance("a", 60.0 * second)
    assert done.text() == "0/1 files, 0.3/1.0 h; 20:00/1:00:00 a"
    for second in range(21):
        clock.now = 120 + second
        done.advance("a", 1201.0 + 5 * second)
    assert done.speed == pytest.approx(5)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0 s"), (59, "59 s"), (90, "2 min"), (3599, "1 h 00 min"), (7500, "2 h 05 min")],
)
def test_format_duration(seconds, text):
    assert format_duration(seconds) == text


@pytest.fixture
def films(tmp_path):
    """A film of 12.5 s, one without any length, and one that is none."""
    folder = tmp_path / "films"
    folder.mkdir()
    write_video(folder / "a.mkv", textured(3, 25), rate=2)
    write_video(folder / "b.h264", textured(4, 25), rate=2, codec="libx264", pix_fmt="yuv420p")
    (folder / "c.mp4").write_bytes(b"no film" * 100)
    return folder


def test_stated_lengths(films):
    paths = [str(films / name) for name in ("a.mkv", "b.h264", "c.mp4", "absent.mp4", "a.mkv")]
    lengths = StatedLengths(paths)
    lengths._thread.join()
    a, b, c, absent, _ = paths
    assert lengths.seconds == {a: pytest.approx(12.5), b: None, c: None, absent: None}


def test_stated_seconds_of_a_file_that_hangs(films):
    """The process is killed, and the next file gets a new one."""
    os.mkfifo(films / "hangs.mp4")
    decoder = Decoder(time_limit=0.3)
    try:
        assert decoder.stated_seconds(films / "hangs.mp4") is None
        assert decoder.stated_seconds(films / "a.mkv") == pytest.approx(12.5)
    finally:
        decoder.close()


def on_terminal(*command, columns=150):
    """(exit status, what it prints on a terminal of so many columns)."""
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("4H", 40, columns, 0, 0))
    process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=its, stderr=its)
    os.close(its)
    output = b""
    try:
        while data := os.read(ours, 1 << 16):
            output += data
    except OSError:  # the other end is closed
        pass
    os.close(ours)
    return process.wait(), output.decode()


@pytest.mark.slow
def test_index_shows_progress_on_a_terminal(films, library, tmp_path):
    shutil.copy(library.videos / "a.mp4", films)
    # Every second of film is shown, on a fast machine too.
    code = "import sys, search; from videoindex import progress; progress.REFRESH = 0;"
    code += " sys.exit(search.main(sys.argv[1:]))"
    index = ["index", films, "--index", tmp_path / "index", "--device", "cpu"]
    status, output = on_terminal(sys.executable, "-c", code, *index)
    assert status == 3 and "skipped" in output
    lines = re.split(r"[\r\n]+", output)
    shown = [line for line in lines if re.match(r" *\d+%\|", line)]
    assert shown and all(len(line) <= 150 for line in shown)
    assert any(re.search(r"/4 files, .* \d+:\d\d(/0:\d\d)? \w\.\w+", line) for line in shown)
    assert re.match(r"100%\|.*4/4 files", shown[-1])
