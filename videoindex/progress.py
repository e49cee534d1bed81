"""Progress of `search.py index`: how much is done, how fast, how long it will take.

38%|█▉   | 12/349 files, 5.1/13.4 h, 46 × real time, 11 min left; 43:10/1:58:02 film.mkv
"""

import collections
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import TextIO

from tqdm import tqdm

from utils import one_line
from videoindex.results import AddProgress
from videoindex.text import format_time, printable

REFRESH = 0.5  # seconds
FIRST_SPEED = 2  # seconds of work before which no speed is shown
SPEED_WINDOW = 60  # seconds of work that the speed is taken from
OPENING = 10  # seconds that a file may take to state its length


class StatedLengths:
    """Asks files how long they play, beside the work: `seconds` fills as they answer.

    In a process of its own, as any file may crash FFmpeg. It opens a file and decodes nothing.
    """

    def __init__(self, paths: Sequence[str]):
        from features.decoding import Decoder  # here: --help needs no FFmpeg

        self.seconds: dict[str, float | None] = {}  # {path: None where nothing is stated}
        self._decoder = Decoder(time_limit=OPENING)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._ask, args=(paths,), daemon=True)
        self._thread.start()

    def _ask(self, paths):
        try:
            for path in paths:
                if self._stop.is_set():
                    break
                self.seconds[path] = self._decoder.stated_seconds(path)
        except (OSError, RuntimeError):  # no such process can be started: go on without
            pass
        finally:
            self._decoder.close()

    def stop(self) -> None:
        self._stop.set()
        self._decoder.kill()
        self._thread.join(OPENING)


class Tally:
    """What is done of a list of files, and how fast; without any output.

    Args:
        paths: the files to do.
        stated: {path: seconds that it plays}, may fill later; a file that states nothing counts as
            the mean of the others.
        clock: seconds, such as time.monotonic.
    """

    def __init__(
        self,
        paths: Sequence[str],
        stated: dict[str, float | None],
        clock: Callable[[], float] = time.monotonic,
    ):
        self.unfinished = dict.fromkeys(paths, 0.0)  # {path: seconds of it that are done}
        self.count, self.stated, self.clock = len(self.unfinished), stated, clock
        self.current = ""  # the file that was worked on last
        self._worked = 0.0  # seconds of film, of finished and unfinished files
        self._finished = 0.0  # the same that finished files play
        self._resumed: dict[str, float] = {}  # seconds of it that are decoded only
        self._samples: collections.deque[tuple] = collections.deque()  # (time, worked by then)

    def resume(self, path: str, seconds: float) -> None:
        """So much of a file was done before, and says nothing about the speed."""
        self._resumed[path] = seconds

    def advance(self, path: str, seconds: float) -> None:
        """`seconds` of a file are done."""
        self.current = path
        if path not in self.unfinished:
            return
        before = max(self.unfinished[path], self._resumed.get(path, 0.0))
        self.unfinished[path] = seconds
        if seconds > before:
            self._worked += seconds - before
            self._sample()

    def finish(self, path: str) -> None:
        """A file is finished, with or without success."""
        done = self.unfinished.pop(path, None)
        if done is not None:
            self._finished += done or self.stated.get(path) or 0.0
        if path == self.current:
            self.current = ""

    def _sample(self):
        now = self.clock()
        if not self._samples or now - self._samples[-1][0] >= REFRESH:
            self._samples.append((now, self._worked))
        while len(self._samples) > 2 and now - self._samples[1][0] > SPEED_WINDOW:
            self._samples.popleft()

    @property
    def speed(self) -> float:
        """Seconds of film in a second of work, of late; 0 while unknown."""
        if not self._samples:
            return 0.0
        (start, before), (end, after) = self._samples[0], self._samples[-1]
        return (after - before) / (end - start) if end - start >= FIRST_SPEED else 0.0

    def hours(self) -> tuple[float, float] | None:
        """Hours of film that are done, and in all; None while no file has stated its length."""
        known = [seconds for seconds in list(self.stated.values()) if seconds]
        if not known:
            return None
        mean = sum(known) / len(known)
        done = total = self._finished
        for path, seconds in self.unfinished.items():
            done += seconds
            total += max(seconds, self.stated.get(path) or mean)
        return done / 3600, total / 3600

    def share(self) -> float:
        """How much is done, 0 to 1."""
        hours = self.hours()
        if hours and hours[1]:
            return hours[0] / hours[1]
        return 1 - len(self.unfinished) / self.count if self.count else 1.0

    def text(self) -> str:
        """The line that is shown."""
        parts = [f"{self.count - len(self.unfinished)}/{self.count} files"]
        hours, speed = self.hours(), self.speed
        if hours:
            unit, factor = ("h", 1) if hours[1] >= 1 else ("min", 60)
            parts.append(f"{hours[0] * factor:.1f}/{hours[1] * factor:.1f} {unit}")
        if speed:
            parts.append(f"{speed:.3g} × real time")
        if hours and speed:
            parts.append(f"{format_duration(3600 * (hours[1] - hours[0]) / speed)} left")
        line = ", ".join(parts)
        return f"{line}; {self._current_text()}" if self.current else line

    def _current_text(self):
        """Where the work is: 43:10/1:58:02 film.mkv."""
        name = one_line(os.path.basename(self.current))
        done, length = self.unfinished.get(self.current), self.stated.get(self.current)
        if not done:
            return name
        return f"{_clock_time(done)}{'/' + _clock_time(length) if length else ''} {name}"


class ProgressBar(AddProgress):
    """Shows the progress of `VideoIndex.add` on a terminal; elsewhere skipped files alone.

    Args:
        out: by default stderr.
    """

    def __init__(self, out: TextIO | None = None):
        self.out = out or sys.stderr
        self.bar = tqdm(
            total=1.0,
            file=self.out,
            disable=None,  # unless it is a terminal
            dynamic_ncols=True,
            bar_format="{percentage:3.0f}%|{bar:5}| {desc}",
        )
        self.lengths: StatedLengths | None = None
        self.tally: Tally | None = None
        self._shown = 0.0

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(self, *_) -> None:
        if self.lengths:
            self.lengths.stop()
        self._show(now=True)
        self.bar.close()

    def on_start(self, paths: Sequence[str]) -> None:
        if not self.bar.disable and paths:
            self.lengths = StatedLengths(paths)
            self.tally = Tally(paths, self.lengths.seconds)

    def on_resume(self, path: str, seconds: float) -> None:
        line = f"going on with {printable(path)} at {_clock_time(seconds)}"
        self.bar.write(line, file=self.out)
        if self.tally:
            self.tally.resume(path, seconds)

    def on_seconds(self, path: str, seconds: float) -> None:
        if self.tally:
            self.tally.advance(path, seconds)
            self._show()

    def on_file(self, path: str, reason: str) -> None:
        if reason:
            line = f"skipped {printable(path)}: {one_line(reason)}"
            self.bar.write(line, file=self.out)
        if self.tally:
            self.tally.finish(path)
            self._show()

    def _show(self, now=False):
        if self.tally and (now or time.monotonic() - self._shown >= REFRESH):
            self._shown = time.monotonic()
            self.bar.n = self.tally.share()
            self.bar.set_description_str(self.tally.text(), refresh=False)
            self.bar.refresh()


def _clock_time(seconds):
    """Seconds as 1:02:03, without tenths."""
    return format_time(int(seconds)).partition(".")[0]


def format_duration(seconds: float) -> str:
    """How long something will take, as 40 s, 11 min or 2 h 05 min."""
    if seconds < 60:
        return f"{round(seconds)} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60:02} min"
