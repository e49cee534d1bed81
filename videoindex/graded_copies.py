"""Graded copies of real recordings, and which of them share film: what search is calibrated on.

Every recording is cut into originals. Of each, copies are made by the edits of the demo
(`datasets.demo.edits`), one of each grade, and an excerpt inside another recording. The output gets
the videos in its subfolders calibration/ and test/, and truth.json.

A list of recordings has the columns file, place and half; two files that show one place, or one
scene from several sides, have the same `place`. `film` names the recording where several files are
the same one.
"""

import csv
import itertools
import os
import random
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av

from datasets.demo import edits
from features.presentation import open_video, stated_length
from files import atomic, write_json
from untrusted import is_object, read_json
from utils import InputError, one_line, require_path

HALVES = ("calibration", "test")
HEIGHT = 256  # of what is edited
ORIGINAL_SECONDS, MAX_ORIGINALS = 20.0, 4
LEAST_SECONDS = 0.5  # of a recording; shorter ones, pictures and broken ones are left out and named
COPIES_OF = 3  # recordings of a place, in the order of the list, that copies are made of
SHARED_SECONDS = 1.0  # of film that make two videos copies; or half of the shorter video
SEEK_SECONDS = 20.0  # before what is wanted, where decoding starts
TRUTH = "truth.json"


class Recording(NamedTuple):
    """A row of the list: a file, what it shows, and the half that it belongs to."""

    file: Path
    film: str
    place: str
    half: str


class Piece(NamedTuple):
    """`start` to `end` (s) of a recording, shown from `at` on in a video, `speed` times as fast."""

    film: str
    place: str
    start: float
    end: float
    at: float
    speed: float


class GradedVideo(NamedTuple):
    """A video to make: pieces [(Recording, start, end)] joined, then edited and encoded."""

    name: str
    pieces: list
    edits: list
    encoding: dict


def read_recordings(list_file: Path, folder: Path) -> list[Recording]:
    """The recordings of a list; raises InputError for a file that is missing."""
    recordings = []
    with open(require_path(list_file, "list"), newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row.get("half") not in HALVES or not row.get("file") or not row.get("place"):
                raise InputError(
                    f"{str(list_file)!r}: {row} needs a file, a place, and the half"
                    f" {' or '.join(HALVES)}"
                )
            path = require_path(folder / row["file"], "recording")
            film = row.get("film") or row["file"]
            recordings.append(Recording(path, film, row["place"], row["half"]))
    return recordings


# --- planning -----------------------------------------------------------------------------------


def plan_videos(
    lengths: Mapping[Recording, float], seed: int = 0, max_originals: int = MAX_ORIGINALS
) -> list[GradedVideo]:
    """What is made of the recordings of one half, {recording: seconds}: a pure function."""
    recordings, videos = list(lengths), []
    for number, recording in enumerate(recordings):
        rng = random.Random(os.fsencode(f"{seed}/{recording.film}"))  # any file name
        of_place = [other for other in recordings if other.place == recording.place]
        is_copied = recording in of_place[:COPIES_OF]
        hosts = [other for other in recordings if other.place != recording.place]
        for i, (start, end) in enumerate(_originals(lengths[recording], max_originals)):
            name = f"{number:03}-{i}"
            whole = [(recording, start, end)]
            videos.append(GradedVideo(name, whole, [], edits.draw_encoding(rng, 1)))
            if not is_copied:
                continue
            for grade in edits.GRADES:
                chosen = edits.draw_edits(rng, grade)
                encoding = edits.draw_encoding(rng, grade)
                videos.append(GradedVideo(f"{name} copy {grade}", whole, chosen, encoding))
            part = _part(rng, start, end, 0.4, 0.8)
            chosen = edits.draw_edits(rng, 2)
            encoding = edits.draw_encoding(rng, 2)
            videos.append(GradedVideo(f"{name} part", [(recording, *part)], chosen, encoding))
            if hosts:
                host = rng.choice(hosts)
                cut = lengths[host] / 2
                before, after = max(cut - 6, 0.0), min(cut + 6, lengths[host])
                pieces = [
                    (host, before, cut),
                    (recording, *_part(rng, start, end, 0.4, 0.8)),
                    (host, cut, after),
                ]
                chosen = edits.draw_edits(rng, 1, ("time",))
                videos.append(GradedVideo(f"{name} inside", pieces, chosen, encoding))
    return videos


def _originals(seconds, most):
    """[(start, end)] of what is cut from a recording, apart from each other."""
    count = min(most, max(1, int(seconds // ORIGINAL_SECONDS)))
    step = seconds / count
    length = min(step, ORIGINAL_SECONDS)
    return [(i * step, i * step + length) for i in range(count)]


def _part(rng, start, end, least, most):
    """A random part of [start, end] that has between these shares of it."""
    length = rng.uniform(least, most) * (end - start)
    first = start + rng.random() * (end - start - length)
    return first, first + length


def truth_of(video: GradedVideo) -> list[Piece]:
    """Where a video shows which film."""
    speed, at, pieces = edits.speed_factor(video.edits), 0.0, []
    for recording, start, end in video.pieces:
        pieces.append(Piece(recording.film, recording.place, start, end, at, speed))
        at += (end - start) / speed
    return pieces


# --- the truth about two videos -----------------------------------------------------------------


def shared_segments(a: list[Piece], b: list[Piece]) -> Iterator[tuple[float, float, float, float]]:
    """Where two videos show the same film: (start, end) in `a`, (start, end) in `b`, in seconds."""
    for x, y in itertools.product(a, b):
        start, end = max(x.start, y.start), min(x.end, y.end)
        if x.film == y.film and start < end:
            in_a = [x.at + (time - x.start) / x.speed for time in (start, end)]
            in_b = [y.at + (time - y.start) / y.speed for time in (start, end)]
            yield (*in_a, *in_b)


def label_of(a: list[Piece], b: list[Piece]) -> str:
    """What two videos share: "film", "a moment" (too little film), "place", or ""."""
    shared = sum(segment[1] - segment[0] for segment in shared_segments(a, b))
    shorter = min(_length(a), _length(b))
    if shared and shared >= min(SHARED_SECONDS, shorter / 2):
        return "film"
    if shared:
        return "a moment"
    if {piece.place for piece in a} & {piece.place for piece in b}:
        return "place"
    return ""


def _length(pieces):
    return max(piece.at + (piece.end - piece.start) / piece.speed for piece in pieces)


def read_truth(copies: Path) -> dict[str, dict[str, list[Piece]]]:
    """{half: {video: its pieces}}, as `make_copies` wrote it."""
    path = require_path(copies / TRUTH, "truth of the copies")
    truth = read_json(path, "truth", "make the copies again")
    if not is_object(truth, dict):
        raise InputError(f"{str(path)!r} is not one; make the copies again")
    return {
        half: {name: [Piece(*row) for row in rows] for name, rows in videos.items()}
        for half, videos in truth.items()
    }


# --- making -------------------------------------------------------------------------------------


def make_copies(
    recordings: list[Recording],
    output: Path,
    on_video: Callable[[str, str], None] = lambda name, reason: None,
    max_originals: int = MAX_ORIGINALS,
) -> None:
    """Write the videos of both halves below `output`, and the truth. Finished ones are kept.

    Args:
        on_video: called with the name of each video when it is there, and ""; or with the reason
            why it, or a recording, is left out.
        max_originals: the most originals of a recording.
    """
    truth: dict[str, dict[str, list[Piece]]] = {}
    for half in HALVES:
        truth[half] = {}
        lengths = {}
        for recording in recordings:
            if recording.half == half:
                lengths[recording] = _seconds(recording.file)
                if lengths[recording] < LEAST_SECONDS:
                    del lengths[recording]
                    on_video(str(recording.file), f"broken, or shorter than {LEAST_SECONDS} s")
        for video in plan_videos(lengths, max_originals=max_originals):
            container = edits.CODECS[video.encoding["codec"]][0]
            path = output / half / f"{video.name}.{container}"
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                if not path.exists():
                    with atomic(path) as temporary:
                        edits.write_video(edited_frames(video), video.encoding, temporary)
                truth[half][video.name] = truth_of(video)
            except (av.FFmpegError, ValueError) as error:
                on_video(video.name, one_line(str(error)))
            else:
                on_video(video.name, "")
    write_json(output / TRUTH, truth)


def edited_frames(video: GradedVideo) -> Iterator[av.VideoFrame]:
    frames = _joined(video.pieces)
    for edit in video.edits:
        frames = edits.apply_edit(edit, frames)
    return frames


def _joined(pieces):
    """The pieces one after another, in the size of the first, at the demo's frame rate."""
    size, ticks = None, 0
    for recording, start, end in pieces:
        scale = f"scale={size[0]}:{size[1]}" if size else f"scale=-2:{HEIGHT}"
        filters = [scale, f"fps={edits.FPS}:start_time={start}", "setsar=1", "format=yuv420p"]
        count = max(1, round((end - start) * edits.FPS))
        for i, frame in enumerate(edits.filter_frames(filters, _between(recording, start, end))):
            if i == count:
                break
            size = size or (frame.width, frame.height)
            frame.pts = ticks
            frame.time_base = Fraction(1, edits.TICKS)
            yield frame
            ticks += edits.TICKS // edits.FPS


def _between(recording, start, end):
    """The frames of a recording from `start` to `end`; times count from its first frame."""
    with open_video(recording.file) as container:
        stream = container.streams.video[0]
        first = None
        if start > SEEK_SECONDS and stream.start_time is not None:
            first = float(stream.start_time * stream.time_base)
            container.seek(int((first + start - SEEK_SECONDS) / stream.time_base), stream=stream)
        for frame in container.decode(stream):
            first = frame.time if first is None else first
            time = frame.time - first
            if time >= end:
                return
            if time >= start:
                frame.pts = round(time * edits.TICKS)
                frame.time_base = Fraction(1, edits.TICKS)
                yield frame


def _seconds(path):
    """How long a recording plays; counted frame by frame if it is short. 0 if it is broken."""
    try:
        with open_video(path) as container:
            stream = container.streams.video[0]
            stated = stated_length(container, stream)
            if stated and stated > 10 * ORIGINAL_SECONDS:
                return stated
            times = [frame.time for frame in container.decode(stream)]
    except (av.FFmpegError, IndexError):
        return 0.0
    if len(times) < 2 or None in times:
        return 0.0
    return (times[-1] - times[0]) * len(times) / (len(times) - 1)
