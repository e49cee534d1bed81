"""The frames of a video: which ones, upright and cropped, and decoded in a process of their own.

FFmpeg reads what strangers made: such a file may crash it, hang it or ask for all memory. So a `Decoder` is a process that
decodes one video after another and may die of one: that video gets a reason, and the next one a new process. As a script
this file is that process. It imports no torch, so it starts in a fifth of a second and takes 60 MB.
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
from collections.abc import Callable
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

SHORT_SIDE, CROP = 256, 224
FRAME_BYTES = CROP * CROP * 3
MAX_GAP = 600  # seconds: a longer pause between two frames is a break in the clock, not a still
TIME_LIMIT = (
    120  # seconds of decoding without a frame, by default: 4K in software may take ten for a second
)
MAX_ASPECT = 8  # of a frame longer than this only the middle is resized: a line of 4096 x 1 would become a gigabyte
REORDER_WINDOW = (
    16  # packets on either side in which the frames shown just before and after one are looked for
)
MEMORY = (
    4 << 30
)  # bytes that one decoder may take: a frame of 8K is 50 MB, and a codec holds up to 20 of them


@dataclass(eq=False)
class Video:
    """A video under way: its rows so far, and what the report will say of it."""

    id: str
    path: Path
    rows: list = field(default_factory=list)
    seconds: float | None = None
    corrupt_packets: int = 0
    reason: str = ""


# --- which frames ----------------------------------------------------------------------------------------------------


class Clock:
    """Seconds since the first frame, as a Fraction, from timestamps that may be missing, jump, or run backwards."""

    def __init__(self, time_base, rate):
        self.time_base, self.step = time_base, 1 / rate
        self.last, self.now = None, None

    def __call__(self, pts):
        if self.now is None:
            self.now = Fraction(0)
        else:
            passed = (
                (pts - self.last) * self.time_base if None not in (pts, self.last) else self.step
            )
            self.now += passed if 0 <= passed <= MAX_GAP else self.step
        self.last = pts
        return self.now

    def expected(self, pts):
        """When a frame of this timestamp will come, or None where the clock cannot tell."""
        passed = (pts - self.last) * self.time_base if None not in (pts, self.last) else 0
        return self.now + passed if 0 < passed <= MAX_GAP else None


def at_timestamps(frames, fps, rate):
    """For k = 0, 1, ...: the first frame at or after k/fps seconds.

    So at 1 frame a second row k is second k, whatever the video's own rate. A frame after a pause of several seconds stands
    for each of them.
    """
    k = 0
    for now, frame in frames:
        while now >= k / fps:
            yield frame
            k += 1


def as_released(frames, fps, rate):
    """The released code's rule: the first frame, frame i where (i + 1) % round(rate) == 0, and the last of these once more.

    The rate is rounded, so at 29.97 the rows drift from the seconds; above 144 it is taken for 25. So row k, but for the
    first, is the end of second k - 1.
    """
    every, last = max(1, round((rate if rate <= 144 else 25) / fps)), None
    for i, (_, frame) in enumerate(frames):
        if i == 0 or (i + 1) % every == 0:
            last = frame
            yield frame
    if last is not None:
        yield last


def a_row_is_due(since, until, fps):
    """Whether `at_timestamps` keeps a frame of time `until` that comes after one of time `since`."""
    return math.floor(since * fps) < math.floor(until * fps)


class FrameRule(NamedTuple):
    """Which frames are kept: `choose` of (seconds, frame) pairs; of which times, where that can be told before decoding."""

    choose: Callable
    keeps: Callable = lambda since, until, fps: True


FRAME_RULES = {
    "timestamp": FrameRule(at_timestamps, a_row_is_due),
    "released": FrameRule(as_released),
}


# --- decoding --------------------------------------------------------------------------------------------------------


def read_frames(video, fps=Fraction(1), rule="timestamp"):
    """Decode `video` (a Video) and yield the frames of the rule, upright, (224, 224, 3) uint8 RGB.

    Packets that do not decode are counted and passed over, as players do; frames that are neither kept nor referred to are not
    looked at. Raises av.FFmpegError, OSError or ValueError when there is nothing to read.
    """
    video.seconds = 0.0
    # Only files: a playlist that calls itself a video must not make us fetch what it names, nor 12:30.mp4 be a protocol's.
    with av.open(
        os.path.abspath(video.path),
        metadata_errors="ignore",
        options={"protocol_whitelist": "file"},
    ) as container:
        film = [
            s for s in container.streams.video if not s.disposition & Disposition.attached_pic
        ]  # a cover is no video
        if not film:
            raise ValueError("it has no video stream")
        stream = film[0]
        stream.thread_count = 1  # with more, what a damaged file gives is a matter of luck
        rate = stream.average_rate or stream.guessed_rate or Fraction(25)
        choose, keeps = FRAME_RULES[rule]
        frames = choose(
            _decode(container, stream, rate, video, lambda *times: keeps(*times, fps)), fps, rate
        )
        kept, prepare = 0, FrameTransform()
        for kept, frame in enumerate(frames, 1):  # noqa: B007
            yield prepare(frame)
    if not kept:
        raise ValueError("none of its frames can be decoded")


def _decode(container, stream, rate, video, keeps):
    """(seconds since the first frame, av.VideoFrame) of frames in the order shown; keeps count in `video`.

    Left out are, in H.264, frames that no other refers to and that `keeps(since, until)`, of two times, does not want. With
    the usual encoders that is a fifth of the work. Of an intact file the others are what they would be without.
    """
    clock, context, skips = Clock(stream.time_base, rate), stream.codec_context, False
    may_skip = (
        context.name == "h264" and context.field_order <= 1
    )  # 1: progressive; fields may come in packets of their own
    for packet, near in _packets(container, stream, video):
        spare = _skippable_time(packet, near, clock, keeps) if may_skip else None
        if skips != (spare is not None):
            skips = not skips
            context.skip_frame = "NONREF" if skips else "DEFAULT"
        if skips:
            video.seconds = max(video.seconds, float(spare + clock.step))
        try:
            frames = packet.decode()
        except MemoryError:
            raise
        except av.FFmpegError:
            video.corrupt_packets += 1
            continue
        for frame in frames:
            now, may_skip = clock(frame.pts), may_skip and not frame.interlaced_frame
            video.seconds = max(video.seconds, float(now + clock.step))
            yield now, frame


def _packets(container, stream, video):
    """(packet, timestamps of REORDER_WINDOW packets on either side and its own), in the file's order, to where it is cut, if it is.

    The timestamp is None of a packet that has none, or whose frame is not shown (before the start of an edited MP4, say).
    """
    near, waiting = deque(maxlen=2 * REORDER_WINDOW + 1), deque()
    try:
        for packet in container.demux(stream):
            if packet.size:  # the last has none: it asks for what the decoder still holds
                near.append(None if packet.is_discard else packet.pts)
            waiting.append(packet)
            if len(waiting) > REORDER_WINDOW:
                yield waiting.popleft(), near
    except av.FFmpegError:
        video.corrupt_packets += 1
    for packet in waiting:
        yield packet, near


def _skippable_time(packet, near, clock, keeps):
    """When the frame of a packet would be shown, if it is surely not kept; else None.

    Surely: nothing is kept of what is shown after the frame before it (or, where `near` lacks that one, after an earlier one)
    up to it. And the clock goes the same way without it: timestamps are complete, and the next is no break.
    """
    until = clock.expected(packet.pts)
    if until is None or None in near:
        return None
    before = max((pts for pts in near if clock.last < pts < packet.pts), default=None)
    after = min((pts for pts in near if pts > packet.pts), default=None)
    since = clock.now if before is None else clock.expected(before)
    return None if clock.expected(after) is None or keeps(since, until) else until


class FrameTransform:
    """An av.VideoFrame to (224, 224, 3) uint8 RGB: resized, turned upright, cropped. Keeps the scaler for the next frame."""

    def __init__(self):
        self.scaler = VideoReformatter()

    def __call__(self, frame):
        turns = round(
            frame.rotation / 90
        )  # rotation: how far counterclockwise the container asks for
        if max(frame.width, frame.height) > MAX_ASPECT * min(frame.width, frame.height):
            frame = _middle(frame)
        short = min(frame.width, frame.height)
        width, height = SHORT_SIDE * frame.width // short, SHORT_SIDE * frame.height // short
        image = self.scaler.reformat(
            frame, width, height, "rgb24", interpolation="BICUBIC", threads=1
        ).to_ndarray()
        image = np.rot90(image, turns)
        top, left = (image.shape[0] - CROP) // 2, (image.shape[1] - CROP) // 2
        return np.ascontiguousarray(image[top : top + CROP, left : left + CROP])


def _middle(frame):
    """The middle of a very long or very high frame, as long as MAX_ASPECT allows."""
    image = frame.to_ndarray(format="rgb24")
    longest = MAX_ASPECT * min(image.shape[:2])
    top, left = (max(0, (side - longest) // 2) for side in image.shape[:2])
    middle = np.ascontiguousarray(image[top : top + longest, left : left + longest])
    return av.VideoFrame.from_ndarray(middle, "rgb24")


# --- the process -----------------------------------------------------------------------------------------------------


class Decoder:
    """A process that decodes videos, one at a time; a new one after a video that crashed it or took too long.

    time_limit: seconds of work without a new frame after which a video is given up. Waiting for whoever takes the frames does
    not count.
    """

    def __init__(self, fps=Fraction(1), rule="timestamp", time_limit=TIME_LIMIT, memory=MEMORY):
        self.task = {"fps": str(fps), "rule": rule, "time_limit": time_limit, "memory": memory}
        self.process = None

    def frames(self, video):
        """Yield the frames of `video` as `read_frames` does, but for trouble: that is told in `video.reason`."""
        if not self.process:
            self._start()
        try:
            self.connection.send_bytes(json.dumps({"path": str(video.path), **self.task}).encode())
            while len(message := self.connection.recv_bytes()) == FRAME_BYTES:
                yield np.frombuffer(message, np.uint8).reshape(CROP, CROP, 3)
            vars(video).update(json.loads(message))
        except (EOFError, OSError):  # OSError: it died in the middle of a frame
            video.reason = self._exit_reason()

    def _start(self):
        self.connection, end = Pipe()
        with end:
            command = [sys.executable, __file__, str(end.fileno())]
            threads = {
                "OMP_NUM_THREADS": "1",
                "OPENBLAS_NUM_THREADS": "1",
            }  # each would reserve memory that counts
            self.process = subprocess.Popen(
                command, pass_fds=[end.fileno()], env={**os.environ, **threads}
            )

    def _exit_reason(self):
        status = self.process.wait()
        self.close()
        if status >= 0:  # not by a video: Python itself came to its end
            raise RuntimeError(f"a decoder process ended by itself, with status {status}")
        if status == -signal.SIGALRM:
            return f"no frame in {self.task['time_limit']:g} seconds of decoding (--time_limit)"
        return f"decoding it crashes FFmpeg ({signal.Signals(-status).name})"

    def kill(self):
        """End the process, whatever it is doing; may be called while another thread waits for its frames."""
        process = self.process
        if process:
            process.kill()

    def close(self):
        if self.process:
            self.process.kill()
            self.process.wait()
            self.connection.close()
            self.process = None


def serve(connection):
    """The process's life: read a task, send its frames, then {seconds, corrupt_packets, reason}; until nobody listens.

    The kernel ends it by SIGALRM: no code here need be alive for that, and it holds when the parent is gone.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to deal with
    os.nice(
        10
    )  # where cores are short, frames that nobody waits for yet must not hold up the backbone
    while True:
        task = json.loads(connection.recv_bytes())
        with contextlib.suppress(ValueError):  # a system that knows no such limit, or a lower one
            resource.setrlimit(resource.RLIMIT_AS, (task["memory"], resource.RLIM_INFINITY))
        video, limit = Video("", task["path"]), task["time_limit"]
        try:
            signal.setitimer(signal.ITIMER_REAL, limit)
            for frame in read_frames(video, Fraction(task["fps"]), task["rule"]):
                signal.setitimer(signal.ITIMER_REAL, 0)
                connection.send_bytes(frame.reshape(-1))
                signal.setitimer(signal.ITIMER_REAL, limit)
        except Exception as error:  # a video may bring forth any; none is worth the other videos
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            video.reason = " ".join(reason.split())[:200]
        signal.setitimer(signal.ITIMER_REAL, 0)
        report = {
            "seconds": video.seconds,
            "corrupt_packets": video.corrupt_packets,
            "reason": video.reason,
        }
        connection.send_bytes(json.dumps(report).encode())


if __name__ == "__main__":
    with contextlib.suppress(EOFError, ConnectionError):
        serve(Connection(int(sys.argv[1])))
