"""How a player shows a video: which stream, from when to when, which part, which way up.

The rules are FFmpeg's, of which `av_find_best_stream`, `av_guess_sample_aspect_ratio`, and the
automatic cropping and rotation of its command line are the models.
"""

import io
import math
import os
import struct
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from av.sidedata.sidedata import Type
from av.stream import Disposition
from av.video.reformatter import VideoReformatter

from features.views import View

# A longer frame is cropped to its middle before it is resized: 4096 x 1 would become a gigabyte.
MAX_ASPECT = 8
JPEG_QUALITY = 70  # of thumbnails: about 3 KB for one of 160 x 90
# Black bars are looked for in this many rows and columns of a frame; black, of 0 to 255.
BAR_CELLS, MAX_BLACK = 128, 24

NOT_A_FILM = Disposition.attached_pic | Disposition.timed_thumbnails
PICTURE_CODECS = ("mjpeg", "png", "bmp", "gif", "tiff", "webp")
IMPAIRED = Disposition.hearing_impaired | Disposition.visual_impaired


def _unknown_side_data(cls, value):
    """A member for side data that FFmpeg knows and PyAV does not, such as EXIF.

    Without it a frame that has such data does not let us read its other side data.
    """
    member = object.__new__(cls)
    member._name_, member._value_ = f"TYPE_{value}", value
    return member


Type._missing_ = classmethod(_unknown_side_data)


# --- which stream --------------------------------------------------------------------------------


def choose_film(container: av.container.InputContainer) -> av.VideoStream:
    """The video stream that is shown: as `av_find_best_stream`, by size instead of bit rate.

    Covers, posters and thumbnails are not film. The stream with the default flag comes first, then
    those of more than a few frames, then the largest, then the first.
    """
    films = []
    for stream in container.streams.video:
        if not stream.disposition & NOT_A_FILM and stream.codec_context is not None:
            films.append(stream)
    if not films:
        raise ValueError("it has no video stream")
    # Muxers do not always say what is a poster or a thumbnail: those of MP4 give the default flag
    # to the first track, whatever it is.
    films = [stream for stream in films if stream.frames != 1] or films
    largest = max(map(_area, films))
    for stream in films:
        if stream.codec_context.name in PICTURE_CODECS and _area(stream) < largest:
            films = [other for other in films if other is not stream]
    return max(films, key=_preference)  # the first of equals


def _area(stream):
    return stream.codec_context.width * stream.codec_context.height


def _preference(stream):
    flags = stream.disposition
    by_flags = bool(flags & Disposition.default) + (not flags & IMPAIRED)
    frames = min(5, stream.frames or 5)  # 0: the container does not say
    return by_flags, frames, _area(stream)


def open_video(path: str | os.PathLike) -> av.container.InputContainer:
    """Open a video that anybody may have made.

    Raises:
        av.FFmpegError, OSError: if there is nothing to read.
    """
    return av.open(
        # Absolute, so that 12:30.mp4 is not taken for a URL of the protocol "12".
        os.path.abspath(path),
        metadata_errors="ignore",
        # A playlist that calls itself a video must not make us fetch what it names.
        options={"protocol_whitelist": "file"},
    )


# --- which part, and its shape -------------------------------------------------------------------


class Margins(NamedTuple):
    """Pixels that are cut off a frame."""

    top: int = 0
    bottom: int = 0
    left: int = 0
    right: int = 0


def container_margins(container: av.container.InputContainer, stream: av.VideoStream) -> Margins:
    """What the container cuts off (Matroska's PixelCrop, MP4's clap); decoders do their own."""
    for line in _stated_lines(container, stream):
        if line.lower().startswith("frame cropping:"):
            left, right, top, bottom = map(int, line.split(":")[1].split("/"))
            return Margins(top, bottom, left, right)
    return Margins()


def container_rotation(container: av.container.InputContainer, stream: av.VideoStream) -> float:
    """By how many degrees the container says that the frames are turned."""
    for line in _stated_lines(container, stream):
        if line.lower().startswith("display matrix: rotation of"):
            return float(line.split()[4])
    return 0.0


def _stated_lines(container, stream):
    """The lines of FFmpeg's description of a stream; PyAV shows its side data nowhere else."""
    level = av.logging.get_level()
    av.logging.set_level(av.logging.INFO)
    try:
        lines = container.dumps_format().splitlines()
    finally:
        av.logging.set_level(level)
    current = None
    for line in map(str.strip, lines):
        if line.startswith("Stream #0:"):
            current = int(line[len("Stream #0:") :].split(":")[0].split("[")[0].split("(")[0])
        if current == stream.index:
            yield line


def pixel_aspect_function(stream: av.VideoStream) -> Callable[[], Fraction]:
    """A function that gives width / height of a pixel of the latest frame.

    What the container states comes first, then the codec, whose statement may change on the way.
    """
    context, stated = stream.codec_context, stream.sample_aspect_ratio
    by_codec = not stated or stated == context.sample_aspect_ratio

    def pixel_aspect():
        return (context.sample_aspect_ratio if by_codec else stated) or Fraction(1)

    return pixel_aspect


def display_matrix(frame: av.VideoFrame) -> tuple[int, ...] | None:
    """The nine numbers (a b u, c d v, x y w) that say how the frame is turned, if it has them."""
    for data in frame.side_data:
        if data.type is Type.DISPLAYMATRIX and len(bytes(data)) == 36:
            return struct.unpack("9i", bytes(data))
    return None


def turn_upright(image: np.ndarray, matrix: tuple[int, ...]) -> np.ndarray:
    """An image as it is shown: its point (x, y) is shown at (a x + c y, b x + d y), y downward.

    Quarter turns and mirrors are exact. Other angles keep the size, and the corners become black.
    """
    a, b, _, c, d = matrix[:5]
    angle = math.degrees(math.atan2(b, a))  # clockwise
    if min(abs(a) + abs(d), abs(b) + abs(c)) > 0.035 * (abs(a) + abs(b)):  # over a degree off
        from PIL import Image

        turned = Image.fromarray(image).rotate(-angle, Image.Resampling.BICUBIC)
        return np.asarray(turned)
    if on_side(matrix):
        image, a, d = image.swapaxes(0, 1), c, b
    return image[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]


def on_side(matrix: tuple[int, ...] | None) -> bool:
    """Whether a display matrix turns a frame by about a quarter, so that width becomes height."""
    if not matrix:
        return False
    a, b, _, c, d = matrix[:5]
    return abs(b) + abs(c) > abs(a) + abs(d)


class FrameTransform:
    """Cut off margins, resize, turn upright, and crop if the view is of the frame's centre.

    The centre is that of the frame on screen, where its pixels are square. A whole frame becomes
    square whatever its shape. Transparent parts are black.

    Args:
        thumbnail_size: pixels of the long side of a thumbnail; 0 makes none.

    Attributes:
        thumbnail: the latest frame as a JPEG: the whole picture in the shape it is shown in.
    """

    def __init__(
        self,
        margins: Margins | None = None,
        view: View | None = None,
        thumbnail_size: int = 0,
    ) -> None:
        self.margins, self.view = margins or Margins(), view or View()
        self.thumbnail_size, self.thumbnail = thumbnail_size, b""
        # Kept: they cache their set-up for the next frame.
        self.scaler, self.bar_scaler = VideoReformatter(), VideoReformatter()

    def __call__(
        self, frame: av.VideoFrame, pixel_aspect: Fraction = Fraction(1)
    ) -> np.ndarray:  # (size, size, 3) uint8 RGB
        matrix = display_matrix(frame)
        colours = "rgba" if _has_alpha(frame.format) else "rgb24"
        frame = _cut(frame, colours, self.margins)
        if self.view.cut_bars:
            frame = _cut(frame, colours, black_bars(frame, self.bar_scaler))
        if self.view.whole:
            width = height = self.view.size
        else:
            if excess := _excess(frame, pixel_aspect):
                frame = _cut(frame, colours, excess)
            width, height = self._size_before_crop(frame, pixel_aspect)
        image = self.scaler.reformat(
            frame, width, height, colours, interpolation="BICUBIC", threads=1
        ).to_ndarray()
        if colours == "rgba":
            opacity = image[..., 3:].astype(np.uint16)
            image = ((image[..., :3] * opacity + 127) // 255).astype(np.uint8)
        if matrix:
            image = turn_upright(image, matrix)
        if self.thumbnail_size:
            aspect = frame.width * pixel_aspect / frame.height
            self.thumbnail = self._make_thumbnail(image, 1 / aspect if on_side(matrix) else aspect)
        size = self.view.size
        top, left = (image.shape[0] - size) // 2, (image.shape[1] - size) // 2
        return np.ascontiguousarray(image[top : top + size, left : left + size])

    def _size_before_crop(self, frame, pixel_aspect):
        """(width, height) of the frame as shown, with the short side of the view."""
        width, height = frame.width * pixel_aspect, frame.height
        short, short_side = min(width, height), self.view.short_side
        return int(short_side * width / short), int(short_side * height / short)

    def _make_thumbnail(self, image, aspect):
        """The upright image of any shape as a JPEG whose width / height is `aspect`."""
        from PIL import Image

        size, aspect = self.thumbnail_size, min(max(aspect, Fraction(1, MAX_ASPECT)), MAX_ASPECT)
        shape = round(size * min(1, aspect)), round(size * min(1, 1 / aspect))
        file = io.BytesIO()
        small = Image.fromarray(np.ascontiguousarray(image)).resize(
            shape, Image.Resampling.BILINEAR
        )
        small.save(file, "JPEG", quality=JPEG_QUALITY)
        return file.getvalue()


def _has_alpha(pixels):
    """Whether a pixel format has alpha: grey or three colours and one more, or a palette."""
    return pixels.has_palette or len(pixels.components) in (2, 4)


def _excess(frame, pixel_aspect):
    """What is cut off both ends of a very long or very high frame; None of others."""
    width, height = frame.width * pixel_aspect, frame.height
    if max(width, height) <= MAX_ASPECT * min(width, height):
        return None
    if width > height:
        excess = (frame.width - max(1, int(MAX_ASPECT * height / pixel_aspect))) // 2
        return Margins(left=excess, right=excess)
    excess = (frame.height - max(1, int(MAX_ASPECT * width))) // 2
    return Margins(top=excess, bottom=excess)


def _cut(frame, colours, margins):
    """The frame without its margins; the whole frame if they leave nothing."""
    top, bottom, left, right = margins
    height, width = frame.height - top - bottom, frame.width - left - right
    if not any(margins) or min(height, width) < 1 or min(margins) < 0:
        return frame
    image = frame.to_ndarray(format=colours)[top : top + height, left : left + width]
    return av.VideoFrame.from_ndarray(np.ascontiguousarray(image), colours)


def black_bars(frame: av.VideoFrame, scaler: VideoReformatter) -> Margins:
    """The black rows and columns at the edges of a frame; none of a frame that is black.

    Looked for in a grey picture of BAR_CELLS a side. A frame of which they would leave less than a
    quarter each way is taken to be dark, not barred.
    """
    width, height = min(BAR_CELLS, frame.width), min(BAR_CELLS, frame.height)
    grey = scaler.reformat(frame, width, height, "gray", interpolation="AREA", threads=1)
    bright = grey.to_ndarray() > MAX_BLACK  # (height, width)
    rows, columns = np.flatnonzero(bright.any(1)), np.flatnonzero(bright.any(0))
    if len(rows) < height / 4 or len(columns) < width / 4:
        return Margins()
    # A cell that is partly black is cut too, so that no rest of a bar stays.
    above, below = rows[0], height - 1 - rows[-1]  # black cells
    before, after = columns[0], width - 1 - columns[-1]
    return Margins(
        top=_bar(above, height, frame.height),
        bottom=_bar(below, height, frame.height),
        left=_bar(before, width, frame.width),
        right=_bar(after, width, frame.width),
    )


def _bar(black_cells, cells, pixels):
    """The pixels that are cut for so many black cells at an edge; a bar of one cell is none."""
    return int(-(-(black_cells + 1) * pixels // cells)) if black_cells > 1 else 0


# --- from when to when ---------------------------------------------------------------------------


def sound_of(container: av.container.InputContainer, film: av.VideoStream) -> av.AudioStream | None:
    """The sound that is played with the film, if there is one."""
    return container.streams.best("audio", related=film)


def start_timestamp(film: av.VideoStream, sound: av.AudioStream | None) -> Fraction | None:
    """When the sound starts, in the film's unit; None if there is none, or if it starts later."""
    if sound is None or None in (sound.start_time, film.start_time):
        return None
    start = sound.start_time * sound.time_base / film.time_base
    return start if start < film.start_time else None


def stated_length(container: av.container.InputContainer, film: av.VideoStream) -> float | None:
    """How many seconds a video plays, as its container states it; None if it states nothing."""
    seconds = (container.duration or 0) / av.time_base
    if not seconds and film.duration:
        seconds = float(film.duration * film.time_base)
    return seconds if seconds > 0 else None


def stated_end(
    container: av.container.InputContainer, film: av.VideoStream, has_sound: bool
) -> Fraction | None:
    """The timestamp, in seconds, up to which the container says that the film is shown.

    Only of formats that store no duration of a single frame, and only if the file is whole: one
    that is cut short plays up to where it is cut. None where it cannot be told.
    """
    formats = container.format.name.split(",")
    checks = [check for name, check in WHOLE.items() if name in formats]
    if not checks:
        return None
    # Matroska's muxers state the end of each track in a tag; DURATION-eng and the like also occur.
    tags = {name.upper().split("-")[0]: value for name, value in film.metadata.items()}
    end = _parse_time(tags.get("DURATION", ""))
    if end is None and container.duration and not has_sound:
        end = Fraction(container.duration, av.time_base)
    if end is None or not checks[0](Path(container.name)):
        return None
    return end


def _parse_time(text):
    """Seconds of a text such as 00:01:23.450000000, or None."""
    try:
        hours, minutes, seconds = text.split(":")
        return int(hours) * 3600 + int(minutes) * 60 + Fraction(seconds)
    except (ValueError, ZeroDivisionError):
        return None


def _whole_matroska(path):
    """Whether the file holds all of its segment, as the segment's header states its size."""
    with open(path, "rb") as file:
        size, _ = _read_element_size(file)
        file.seek(size, os.SEEK_CUR)  # past the EBML header
        size, is_known = _read_element_size(file)
        return is_known and file.tell() + size <= path.stat().st_size


def _read_element_size(file):
    """The size of the Matroska element that begins here, and whether it is known."""
    _read_number(file)  # its id
    size, width = _read_number(file)
    return size, size != (1 << 7 * width) - 1


def _read_number(file):
    """A number in Matroska's variable width, without its marker, and its width in bytes."""
    first = file.read(1)
    width = 9 - first[0].bit_length() if first else 9
    digits = first + file.read(width - 1)
    if width > 8 or len(digits) < width:
        raise ValueError("its Matroska header is damaged")
    return int.from_bytes(digits, "big") - (1 << 7 * width), width


def _whole_flv(path):
    """Whether the file ends in a tag and its length."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        file.seek(max(0, size - 4))
        length = int.from_bytes(file.read(4), "big")
        if not 11 <= length <= size - 4:
            return False
        file.seek(size - 4 - length + 1)
        return int.from_bytes(file.read(3), "big") == length - 11


ASF_FILE_PROPERTIES = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")


def _whole_asf(path):
    """Whether the file is as long as its header states."""
    with open(path, "rb") as file:
        head = file.read(1 << 16)
    at = head.find(ASF_FILE_PROPERTIES)
    stated = int.from_bytes(head[at + 40 : at + 48], "little")  # after GUID, size and file id
    return at >= 0 and 0 < stated <= path.stat().st_size


WHOLE = {"matroska": _whole_matroska, "flv": _whole_flv, "asf": _whole_asf}
