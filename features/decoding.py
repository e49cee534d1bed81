"""The frames of a video: which ones, upright and cropped, decoded in a process of their own.

FFmpeg reads files of unknown origin, which may crash it, hang it, or make it take all memory. So a
`Decoder` is a process that decodes one video after another. If a video ends the process, that video
gets a reason and the next one gets a new process. Run as a script, this file is that process; it
imports no torch, so it starts in 0.2 s and takes 60 MB.
"""

import contextlib
import json
import math
import os
import resource
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from av.stream import Disposition
from av.video.reformatter import VideoReformatter

from processes import child_environment, end_with_starter

ROOT = Path(__file__).resolve().parent.parent
SHORT_SIDE, CROP = 256, 224  # pixels
FRAME_BYTES = CROP * CROP * 3
# A longer frame is cropped to its middle before it is resized: 4096 x 1 would become a gigabyte.
MAX_ASPECT = 8

MAX_GAP = 600  # seconds: a longer pause between two frames is a break in the clock, not a still
REORDER_WINDOW = 16  # packets: how far a frame's neighbours in time may lie from it in the file

TIME_LIMIT = 120  # seconds of decoding without a frame: 4K in software may need ten for a second
MEMORY = 4 << 30  # bytes a decoder may take: a frame of 8K is 50 MB, a codec holds up to 20


@dataclass(eq=False)
class Video:
    """A video of an extraction: its rows so far, and what the report will say about it."""

    id: str
    path: Path
    rows: list = field(default_factory=list)  # (C,) each
    seconds: float | None = None
    corrupt_packets: int = 0
    reason: str = ""  # why it failed; empty if it did not


# --- which frames --------------------------------------------------------------------------------


class Clock:
    """Seconds since the first frame, from timestamps that may be missing, jump, or run backwards.

    Args:
        time_base: seconds of a timestamp's unit.
        rate: frames per second, for frames without a usable timestamp.
    """

    def __init__(self, time_base: Fraction, rate: Fraction) -> None:
        self.time_base, self.step = time_base, 1 / rate
        self.last, self.now = None, None  # timestamp and time of the latest frame

    def __call__(self, pts: int | None) -> Fraction:
        """The time of the next frame, which has this timestamp."""
        if self.now is None:
            self.now = Fraction(0)
        else:
            passed = self._since_last(pts)
            in_order = passed is not None and 0 <= passed <= MAX_GAP
            self.now += passed if in_order else self.step
        self.last = pts
        return self.now

    def expected(self, pts: int | None) -> Fraction | None:
        """The time of a later frame of this timestamp; None where the clock cannot tell."""
        passed = self._since_last(pts)
        if passed is None or not 0 < passed <= MAX_GAP:
            return None
        return self.now + passed

    def _since_last(self, pts):
        if pts is None or self.last is None:
            return None
        return (pts - self.last) * self.time_base


def at_timestamps(frames: Iterable[tuple], fps: Fraction, rate: Fraction) -> Iterator:
    """For k = 0, 1, ...: the first frame at or after k/fps seconds.

    At 1 frame per second row k shows second k, for any frame rate. A frame after a pause of
    several seconds is kept once for each of them.
    """
    k = 0
    for now, frame in frames:
        while now >= k / fps:
            yield frame
            k += 1


def as_released(frames: Iterable[tuple], fps: Fraction, rate: Fraction) -> Iterator:
    """The released code's rule: frame 0, every i with (i + 1) % round(rate) == 0, the last twice.

    Row k > 0 is thus the end of second k - 1. The rate is rounded, so at 29.97 the rows drift from
    the seconds; above 144 it is taken for 25.
    """
    every = max(1, round((rate if rate <= 144 else 25) / fps))
    last = None
    for i, (_, frame) in enumerate(frames):
        if i == 0 or (i + 1) % every == 0:
            last = frame
            yield frame
    if last is not None:
        yield last


def row_is_due(since: Fraction, until: Fraction, fps: Fraction) -> bool:
    """Whether `at_timestamps` keeps a frame at time `until` whose predecessor is at `since`."""
    return math.floor(since * fps) < math.floor(until * fps)


def always(since: Fraction, until: Fraction, fps: Fraction) -> bool:
    """For rules that cannot tell before decoding which frames they keep."""
    return True


class FrameRule(NamedTuple):
    """Which frames of a video are kept."""

    choose: Callable  # ((seconds, frame) pairs, fps, the video's rate) -> the frames that are kept
    may_keep: Callable = always  # (since, until, fps): whether a frame may be kept, by its time


FRAME_RULES = {
    "timestamp": FrameRule(at_timestamps, row_is_due),
    "released": FrameRule(as_released),
}


# --- decoding ------------------------------------------------------------------------------------


def read_frames(
    video: Video, fps: Fraction = Fraction(1), rule: str = "timestamp"
) -> Iterator[np.ndarray]:
    """Decode a video and yield the frames of the rule, upright, (224, 224, 3) uint8 RGB.

    Packets that do not decode are counted in `video` and skipped, as players do.

    Raises:
        av.FFmpegError, OSError, ValueError: if there is nothing to read.
    """
    video.seconds = 0.0
    kept, transform = 0, FrameTransform()
    with av.open(
        # Absolute, so that 12:30.mp4 is not taken for a URL of the protocol "12".
        os.path.abspath(video.path),
        metadata_errors="ignore",
        # A playlist that calls itself a video must not make us fetch what it names.
        options={"protocol_whitelist": "file"},
    ) as container:
        stream = _first_film(container)
        stream.thread_count = 1  # with more, what a damaged file gives depends on timing
        rate = stream.average_rate or stream.guessed_rate or Fraction(25)
        choose, may_keep = FRAME_RULES[rule]

        def may_keep_at(since, until):
            return may_keep(since, until, fps)

        decoded = _decode(container, stream, rate, video, may_keep_at)
        for frame in choose(decoded, fps, rate):
            kept += 1
            yield transform(frame)
    if not kept:
        raise ValueError("none of its frames can be decoded")


def _first_film(container):
    """The first video stream that is not a cover picture."""
    for stream in container.streams.video:
        if not stream.disposition & Disposition.attached_pic:
            return stream
    raise ValueError("it has no video stream")


def _decode(container, stream, rate, video, may_keep) -> Iterator[tuple[Fraction, av.VideoFrame]]:
    """(seconds since the first frame, frame) in display order; counts in `video`.

    In H.264, frames that no other frame refers to and that `may_keep(since, until)` rules out are
    not decoded: with the usual encoders a fifth of the work. In an intact file this changes none of
    the other frames.
    """
    clock, context, skipping = Clock(stream.time_base, rate), stream.codec_context, False
    # field_order 0 unknown, 1 progressive. The two fields of a frame may be packets of their own.
    may_skip = context.name == "h264" and context.field_order <= 1
    for packet, nearby in _packets(container, stream, video):
        until = _skippable_time(packet, nearby, clock, may_keep) if may_skip else None
        if skipping != (until is not None):
            skipping = not skipping
            context.skip_frame = "NONREF" if skipping else "DEFAULT"
        if skipping:  # the frame may not come, but its time counts
            video.seconds = max(video.seconds, float(until + clock.step))
        try:
            frames = packet.decode()
        except MemoryError:
            raise
        except av.FFmpegError:
            video.corrupt_packets += 1
            continue
        for frame in frames:
            now = clock(frame.pts)
            may_skip = may_skip and not frame.interlaced_frame
            video.seconds = max(video.seconds, float(now + clock.step))
            yield now, frame


def _packets(container, stream, video) -> Iterator[tuple[av.Packet, deque]]:
    """(packet, nearby timestamps) in the file's order, up to where the file is cut short, if it is.

    Nearby are the timestamps of the packet and of REORDER_WINDOW packets on either side. The
    timestamp is None for a packet without one, and for a packet whose frame is not shown (before
    the start of an edited MP4, say).
    """
    nearby, waiting = deque(maxlen=2 * REORDER_WINDOW + 1), deque()
    try:
        for packet in container.demux(stream):
            if packet.size:  # the last one is empty: it flushes the decoder
                nearby.append(None if packet.is_discard else packet.pts)
            waiting.append(packet)
            if len(waiting) > REORDER_WINDOW:
                yield waiting.popleft(), nearby
    except av.FFmpegError:
        video.corrupt_packets += 1
    for packet in waiting:
        yield packet, nearby


def _skippable_time(packet, nearby, clock, may_keep) -> Fraction | None:
    """The time of a packet's frame if the frame is certainly not kept, else None.

    Certainly: the rule keeps no frame that is shown after its predecessor and up to it. (If the
    predecessor is not nearby, an earlier frame takes its place, which is the safe side.) And the
    clock runs the same without the frame: timestamps are complete, and the next is not a break.
    """
    until = clock.expected(packet.pts)
    if until is None or None in nearby:
        return None
    earlier = [pts for pts in nearby if clock.last < pts < packet.pts]
    later = [pts for pts in nearby if pts > packet.pts]
    if not later or clock.expected(min(later)) is None:
        return None
    since = clock.expected(max(earlier)) if earlier else clock.now
    return None if may_keep(since, until) else until


class FrameTransform:
    """Resize a frame to a short side of 256, turn it upright, crop the centre 224 x 224."""

    def __init__(self) -> None:
        self.scaler = VideoReformatter()  # kept: it caches its set-up for the next frame

    def __call__(self, frame: av.VideoFrame) -> np.ndarray:  # (224, 224, 3) uint8 RGB
        quarter_turns = round(frame.rotation / 90)  # counterclockwise, by the container's metadata
        if max(frame.width, frame.height) > MAX_ASPECT * min(frame.width, frame.height):
            frame = _crop_middle(frame)
        short = min(frame.width, frame.height)
        width, height = SHORT_SIDE * frame.width // short, SHORT_SIDE * frame.height // short
        image = self.scaler.reformat(
            frame, width, height, "rgb24", interpolation="BICUBIC", threads=1
        ).to_ndarray()
        image = np.rot90(image, quarter_turns)
        top, left = (image.shape[0] - CROP) // 2, (image.shape[1] - CROP) // 2
        return np.ascontiguousarray(image[top : top + CROP, left : left + CROP])


def _crop_middle(frame):
    """The middle of a very long or very high frame, as long as MAX_ASPECT allows."""
    image = frame.to_ndarray(format="rgb24")
    longest = MAX_ASPECT * min(image.shape[:2])
    top, left = (max(0, (side - longest) // 2) for side in image.shape[:2])
    middle = np.ascontiguousarray(image[top : top + longest, left : left + longest])
    return av.VideoFrame.from_ndarray(middle, "rgb24")


# --- the process ---------------------------------------------------------------------------------


class Decoder:
    """A process that decodes videos, one at a time, and is replaced after a video that ends it.

    Args:
        fps, rule: which frames, see `read_frames`.
        time_limit: seconds of decoding without a new frame after which a video is given up. The
            time that a frame waits to be taken does not count.
        memory: bytes the process may take; a video that needs more fails.
    """

    def __init__(
        self,
        fps: Fraction = Fraction(1),
        rule: str = "timestamp",
        time_limit: float = TIME_LIMIT,
        memory: int = MEMORY,
    ) -> None:
        self.task = {"fps": str(fps), "rule": rule, "time_limit": time_limit, "memory": memory}
        self.process = None

    def frames(self, video: Video) -> Iterator[np.ndarray]:
        """Yield the frames of `video` as `read_frames` does; errors go into `video.reason`."""
        if not self.process:
            self._start()
        task = {"path": str(video.path), **self.task}
        try:
            self.connection.send_bytes(json.dumps(task).encode())
            while len(message := self.connection.recv_bytes()) == FRAME_BYTES:
                yield np.frombuffer(message, np.uint8).reshape(CROP, CROP, 3)
            vars(video).update(json.loads(message))  # seconds, corrupt_packets, reason
        except (EOFError, OSError):  # OSError: it died in the middle of a frame
            video.reason = self._exit_reason()

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

    It ends with EOFError when the parent closes the connection. The time limit is a kernel timer
    (SIGALRM), which also ends a process that hangs inside FFmpeg.
    """
    end_with_starter()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    os.nice(10)  # where cores are short, the backbone goes before frames that wait in the queue
    while True:
        task = json.loads(connection.recv_bytes())
        with contextlib.suppress(ValueError):  # no such limit on this system, or a lower one
            resource.setrlimit(resource.RLIMIT_AS, (task["memory"], resource.RLIM_INFINITY))
        video, time_limit = Video("", task["path"]), task["time_limit"]
        try:
            signal.setitimer(signal.ITIMER_REAL, time_limit)
            for frame in read_frames(video, Fraction(task["fps"]), task["rule"]):
                signal.setitimer(signal.ITIMER_REAL, 0)  # sending may wait for the backbone
                connection.send_bytes(frame.reshape(-1))
                signal.setitimer(signal.ITIMER_REAL, time_limit)
        except Exception as error:  # a damaged video can raise nearly anything
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            video.reason = " ".join(reason.split())[:200]
        signal.setitimer(signal.ITIMER_REAL, 0)
        report = {name: getattr(video, name) for name in ("seconds", "corrupt_packets", "reason")}
        connection.send_bytes(json.dumps(report).encode())


if __name__ == "__main__":
    with contextlib.suppress(EOFError, ConnectionError):
        serve(Connection(int(sys.argv[1])))
