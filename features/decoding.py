"""The frames of a video, as a player shows them, decoded in a process of their own.

FFmpeg reads files of unknown origin, which may crash it, hang it, or make it take all memory. So a
`Decoder` is a process that decodes one video after another. If a video ends the process, that video
gets a reason and the next one gets a new process. The process imports no torch, so it starts in
0.2 s and takes 60 MB.
"""

import contextlib
import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path

import av
import numpy as np
from av.codec.context import Flags as CodecFlags
from av.format import Flags

from features.frame_rules import (
    DEFAULT_RULE,
    FRAME_RULES,
    MAX_GAP,
    BestTimestamp,
    Clock,
    Film,
    FrameRule,
    own_timestamp,
)
from features.presentation import (
    FrameTransform,
    choose_film,
    container_margins,
    open_video,
    pixel_aspect_function,
    sound_of,
    start_timestamp,
    stated_end,
    stated_length,
)
from features.views import View
from processes import child_environment, end_with_starter

ROOT = Path(__file__).resolve().parent.parent
REORDER_WINDOW = 16  # packets: how far a frame's neighbours in time may lie from it in the file

TIME_LIMIT = 120  # seconds of decoding without a frame: 4K in software may need ten for a second
MAX_HOURS = 24  # of a video; a broken clock can state billions
MAX_DECODE_HOURS = 24  # that a decoder may spend on one video
MEMORY = 4 << 30  # bytes a decoder may take: a frame of 8K is 50 MB, a codec holds up to 20


@dataclass(eq=False)
class Video:
    """A video of an extraction: its rows so far, and what the report will say about it."""

    id: str
    path: Path
    rows: list = field(default_factory=list)  # (C,) each
    known_rows: Sequence = ()  # of its first frames, by an earlier run: these are not computed
    thumbnails: list[bytes] = field(default_factory=list)  # JPEGs, if asked for, one for each row
    seconds: float | None = None
    corrupt_packets: int = 0
    reason: str = ""  # why it failed; empty if it did not


# --- decoding ------------------------------------------------------------------------------------


def read_frames(
    video: Video,
    fps: Fraction = Fraction(1),
    rule: str = DEFAULT_RULE,
    max_hours: float = MAX_HOURS,
    view: View | None = None,
    thumbnail_size: int = 0,
) -> Iterator[np.ndarray]:
    """Decode a video and yield the frames of the rule as they are shown, (size, size, 3) uint8 RGB.

    By default the view is the centre, 224 pixels a side. With a `thumbnail_size`, its long side in
    pixels, a JPEG of the whole picture is put into `video.thumbnails` for each frame.

    Packets that do not decode are counted in `video` and skipped, as players do.

    Raises:
        av.FFmpegError, OSError, ValueError: if there is nothing to read, or if the video lasts
            longer than `max_hours`, or gives more frames than so many hours have.
    """
    video.seconds = 0.0
    rows, max_rows = 0, math.ceil(Fraction(max_hours) * 3600 * fps)
    latest = image = None
    with open_video(video.path) as container:
        reader = FilmReader(container, video, FRAME_RULES[rule], fps, max_hours)
        margins = container_margins(container, reader.stream)
        transform = FrameTransform(margins, view, thumbnail_size)
        film = Film(reader.frames(), reader.rate, reader.end)
        for shown in FRAME_RULES[rule].choose(film, fps):
            rows += 1
            if rows > max_rows:  # of rules that count frames, where no time passes
                raise ValueError(f"it has more frames than {max_hours:g} hours have (--max_hours)")
            if shown is not latest:  # a still is kept once for each second
                latest, image = shown, transform(*shown)
            if thumbnail_size:
                video.thumbnails.append(transform.thumbnail)
            yield image
    if not rows:
        raise ValueError("none of its frames can be decoded")


class FilmReader:
    """Decodes the film of an open container; counts its seconds and bad packets in `video`.

    Attributes:
        stream: that of the film.
        rate: frames per second, as the container states it; 25 if it states none, or nonsense.

    Raises:
        ValueError: by `frames` and `end`, if the film lasts longer than `max_hours`.
    """

    def __init__(
        self,
        container: av.container.InputContainer,
        video: Video,
        rule: FrameRule,
        fps: Fraction,
        max_hours: float,
    ) -> None:
        self.container, self.video, self.rule, self.fps = container, video, rule, fps
        self.max_hours = max_hours
        self.stream = choose_film(container)
        self.stream.thread_count = 1  # with more, what a damaged file gives depends on timing
        # Else a codec's crop at the left is rounded to what suits this machine's vectors.
        self.stream.codec_context.flags |= CodecFlags.unaligned.value
        rate = self.stream.average_rate or self.stream.guessed_rate
        self.rate = rate if rate and rate * MAX_GAP >= 1 else Fraction(25)
        self.sound = sound_of(container, self.stream) if rule.as_played else None
        self._sound_seconds = self._end = Fraction(0)
        self._clock = self._make_clock()

    def _make_clock(self):
        start, max_gap = None, MAX_GAP
        if self.rule.as_played:
            start = start_timestamp(self.stream, self.sound)
            # A longer still is believed where the container states a duration that holds it.
            stated = Fraction(self.container.duration or 0, av.time_base)
            jumps = self.container.format.flags & Flags.ts_discont.value  # the clock may restart
            if not jumps and stated <= self.max_hours * 3600:
                max_gap = max(max_gap, stated)
        return Clock(self.stream.time_base, self.rate, max_gap, start)

    def frames(self) -> Iterator[tuple[Fraction, tuple[av.VideoFrame, Fraction]]]:
        """(seconds since the start, (frame, width / height of its pixels)) in display order.

        In H.264, frames that no other frame refers to and that the rule does not keep are not
        decoded: with the usual encoders a fifth of the work. In an intact file this changes none
        of the other frames.
        """
        clock, context, skipping = self._clock, self.stream.codec_context, False
        pixel_aspect = pixel_aspect_function(self.stream)
        best_timestamp = BestTimestamp() if self.rule.as_played else own_timestamp
        # field_order 0 unknown, 1 progressive. The two fields of a frame may be packets of their
        # own. AVI has no display times.
        may_skip = context.name == "h264" and context.field_order <= 1
        may_skip = may_skip and self.container.format.name != "avi"
        for packet, nearby in self._packets():
            now = self._skippable_time(packet, nearby) if may_skip else None
            if skipping != (now is not None):
                skipping = not skipping
                context.skip_frame = "NONREF" if skipping else "DEFAULT"
            if skipping:  # the frame may not come, but its time counts
                self._extend(now + clock.step)
            try:
                frames = packet.decode()
            except MemoryError:
                raise
            except av.FFmpegError:
                self.video.corrupt_packets += 1
                continue
            for frame in frames:
                now = clock(best_timestamp(frame))
                may_skip = may_skip and not frame.interlaced_frame
                self._extend(now + self._duration(frame))
                yield now, (frame, pixel_aspect())

    def _packets(self):
        """(packet, nearby timestamps) in the file's order, up to where the file is cut short.

        Nearby are the timestamps of the packet and of REORDER_WINDOW packets on either side. The
        timestamp is None for a packet without one, and for a packet whose frame is not shown
        (before the start of an edited MP4, say).
        """
        nearby, waiting = deque(maxlen=2 * REORDER_WINDOW + 1), deque()
        streams = [self.stream, self.sound] if self.sound else [self.stream]
        try:
            for packet in self.container.demux(streams):
                if packet.stream.index != self.stream.index:  # packet.stream_index is 0 at the end
                    self._sound_seconds += (packet.duration or 0) * self.sound.time_base
                    continue
                if packet.size:
                    nearby.append(None if packet.is_discard else packet.pts)
                elif packet.dts is not None:
                    continue  # the last picture stays; the decoder would take it for the end
                waiting.append(packet)
                if len(waiting) > REORDER_WINDOW:
                    yield waiting.popleft(), nearby
        except av.FFmpegError:
            self.video.corrupt_packets += 1
        for packet in waiting:
            yield packet, nearby

    def _skippable_time(self, packet, nearby):
        """The time of a packet's frame if the frame is certainly not kept, else None.

        Certainly: the rule keeps no frame that is shown after its predecessor, at its time, or
        before its successor. (If these are not nearby, an earlier and a later frame take their
        place, which is the safe side.) And the clock runs the same without the frame: timestamps
        are complete, and the next is not a break.
        """
        clock = self._clock
        now = clock.expected(packet.pts)
        if now is None or None in nearby:
            return None
        earlier = [pts for pts in nearby if clock.last < pts < packet.pts]
        later = [pts for pts in nearby if pts > packet.pts]
        after = clock.expected(min(later)) if later else None
        if after is None:
            return None
        before = clock.expected(max(earlier)) if earlier else clock.now
        return None if self.rule.may_keep(before, now, after, self.fps) else now

    def _duration(self, frame):
        """How long a frame is shown if none follows it."""
        seconds = (frame.duration or 0) * self.stream.time_base
        return seconds if 0 < seconds <= self._clock.max_gap else self._clock.step

    def _extend(self, end):
        """Note that the film lasts until `end`, or longer."""
        if end > self._end:
            if end > self.max_hours * 3600:
                raise ValueError(f"it lasts longer than {self.max_hours:g} hours (--max_hours)")
            self._end = end
            self.video.seconds = float(end)

    def end(self) -> Fraction:
        """When the last frame leaves the screen, once all frames are read.

        It stays for its own duration, to the end that the container states, and while there is
        sound. A tail of sound of up to a second adds nothing: nearly every file has one.
        """
        clock, limit = self._clock, self.max_hours * 3600
        start = (clock.origin or 0) * self.stream.time_base
        stated = stated_end(self.container, self.stream, self.sound is not None)
        if stated is not None and stated - start <= limit:
            self._extend(stated - start)
        if self.sound and self.sound.start_time is not None:
            sound_end = self.sound.start_time * self.sound.time_base - start + self._sound_seconds
            if self._end + 1 < sound_end <= limit:
                self._extend(sound_end)
        return self._end


def stated_seconds(path: str | os.PathLike) -> float | None:
    """How long a video plays, as its container states it; None if it states nothing.

    Raises:
        av.FFmpegError, OSError, ValueError: if there is nothing to read
    """
    with open_video(path) as container:
        return stated_length(container, choose_film(container))


# --- the process ---------------------------------------------------------------------------------


class Decoder:
    """A process that decodes videos, one at a time, and is replaced after a video that ends it.

    Args:
        fps, rule, max_hours: which frames, see `read_frames`.
        time_limit: seconds of decoding without a new frame after which a video is given up. The
            time that a frame waits to be taken does not count.
        max_decode_hours: of decoding in all after which a video is given up.
        memory: bytes the process may take; a video that needs more fails.
        view, thumbnail_size: see `read_frames`.
    """

    def __init__(
        self,
        fps: Fraction = Fraction(1),
        rule: str = DEFAULT_RULE,
        time_limit: float = TIME_LIMIT,
        max_hours: float = MAX_HOURS,
        max_decode_hours: float = MAX_DECODE_HOURS,
        memory: int = MEMORY,
        view: View | None = None,
        thumbnail_size: int = 0,
    ) -> None:
        self.view = view or View()
        self.task = {
            "fps": str(fps),
            "rule": rule,
            "time_limit": time_limit,
            "max_hours": max_hours,
            "max_decode_hours": max_decode_hours,
            "memory": memory,
            "view": str(self.view),
            "thumbnail_size": thumbnail_size,
        }
        self.process = None

    def frames(self, video: Video) -> Iterator[np.ndarray]:
        """Yield the frames of `video` as `read_frames` does; errors go into `video.reason`."""
        if not self.process:
            self._start()
        task, size = {"path": str(video.path), **self.task}, self.view.size
        try:
            self.connection.send_bytes(json.dumps(task).encode())
            while len(message := self.connection.recv_bytes()) >= self.view.num_bytes:
                frame = np.frombuffer(message, np.uint8, self.view.num_bytes)
                if self.task["thumbnail_size"]:
                    video.thumbnails.append(message[self.view.num_bytes :])
                yield frame.reshape(size, size, 3)
            vars(video).update(json.loads(message))  # seconds, corrupt_packets, reason
        except (EOFError, OSError):  # OSError: it died in the middle of a frame
            video.reason = self._exit_reason()

    def stated_seconds(self, path: str | os.PathLike) -> float | None:
        """`stated_seconds` of a video; None also for one that cannot be read."""
        if not self.process:
            self._start()
        task = {"path": str(path), "stated": True, **self.task}
        try:
            self.connection.send_bytes(json.dumps(task).encode())
            return json.loads(self.connection.recv_bytes())
        except (EOFError, OSError):
            self._exit_reason()  # the next video gets a new process
            return None

    def _start(self):
        self.connection, end = Pipe()
        # Every thread of these libraries would reserve memory, which counts against the limit.
        threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        with end:
            self.process = subprocess.Popen(
                [sys.executable, __file__, str(end.fileno())],
                pass_fds=[end.fileno()],
                # It imports `processes`, and ends with this process even while FFmpeg hangs.
                env=child_environment() | threads | {"PYTHONPATH": str(ROOT)},
            )

    def _exit_reason(self):
        status = self.process.wait()
        self.close()
        if status >= 0:  # not by a signal, so not by the video
            raise RuntimeError(f"a decoder process ended by itself, with status {status}")
        if status == -signal.SIGALRM:
            return f"no frame in {self.task['time_limit']:g} seconds of decoding (--time_limit)"
        return f"decoding it crashes FFmpeg ({signal.Signals(-status).name})"

    def kill(self) -> None:
        """Kill the process; may be called while another thread waits for its frames."""
        process = self.process
        if process:
            process.kill()

    def close(self) -> None:
        """Kill the process and release what belongs to it."""
        if self.process:
            self.process.kill()
            self.process.wait()
            self.connection.close()
            self.process = None


def serve(connection: Connection) -> None:
    """The process's loop: read a task, send its frames, then {seconds, corrupt_packets, reason}.

    A task that asks for what is `stated` is answered by the seconds, or null. A frame's message is
    its pixels, and its thumbnail if thumbnails are asked for.

    It ends when the parent closes the connection. The time limit is a kernel timer (SIGALRM), which
    also ends a process that hangs inside FFmpeg.
    """
    end_with_starter()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    os.nice(10)  # where cores are short, the backbone goes before frames that wait in the queue
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            task = json.loads(connection.recv_bytes())
            with contextlib.suppress(ValueError):  # no such limit on this system, or a lower one
                resource.setrlimit(resource.RLIMIT_AS, (task["memory"], resource.RLIM_INFINITY))
            if task.get("stated"):
                _send_stated(task, connection)
            else:
                _send_frames(task, connection)


def _send_stated(task, connection):
    """Send how long a video plays, as its container states it."""
    signal.setitimer(signal.ITIMER_REAL, task["time_limit"])
    seconds = None
    with contextlib.suppress(Exception):  # a damaged video can raise nearly anything
        seconds = stated_seconds(task["path"])
    signal.setitimer(signal.ITIMER_REAL, 0)
    connection.send_bytes(json.dumps(seconds).encode())


def _send_frames(task, connection):
    """Send the frames of a video, then what became of it."""
    video, time_limit, hours = Video("", task["path"]), task["time_limit"], task["max_decode_hours"]
    seconds_left, fps, view = hours * 3600, Fraction(task["fps"]), View.parse(task["view"])
    options = fps, task["rule"], task["max_hours"], view, task["thumbnail_size"]
    try:
        signal.setitimer(signal.ITIMER_REAL, time_limit)
        started = time.monotonic()
        for frame in read_frames(video, *options):
            signal.setitimer(signal.ITIMER_REAL, 0)  # sending may wait for the backbone
            seconds_left -= time.monotonic() - started
            if seconds_left < 0:
                raise ValueError(f"decoding it takes over {hours:g} hours (--max_decode_hours)")
            message = frame.reshape(-1)
            if video.thumbnails:
                message = message.tobytes() + video.thumbnails.pop()
            connection.send_bytes(message)
            signal.setitimer(signal.ITIMER_REAL, time_limit)
            started = time.monotonic()
    except Exception as error:  # a damaged video can raise nearly anything
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        video.reason = " ".join(reason.split())[:200]
    signal.setitimer(signal.ITIMER_REAL, 0)
    report = {name: getattr(video, name) for name in ("seconds", "corrupt_packets", "reason")}
    connection.send_bytes(json.dumps(report).encode())


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))
