"""Videos made for a test: frames that tell their index, textures, sound only."""

import struct
from fractions import Fraction

import av
import numpy as np
from av.stream import Disposition


def numbered(n):
    """n small frames whose colour tells their index."""
    return [np.full((32, 48, 3), (i % 256, i // 256, 77), np.uint8) for i in range(n)]


def index_of(image):
    """Which of `numbered` frames it is, from its (224, 224, 3) crop."""
    return int(image[112, 112, 0]) + 256 * int(image[112, 112, 1])


def textured(seed, n):
    """n frames of smooth noise that drifts, so that their features differ."""
    base = np.random.default_rng(seed).integers(0, 256, (8, 12, 3), np.uint8)
    return [np.roll(base, i, 1).repeat(8, 0).repeat(8, 1) for i in range(n)]


def write_video(
    path,
    images,
    rate=10,
    times=None,
    codec="ffv1",
    pix_fmt="bgr0",
    source="rgb24",
    options=None,
    container=None,
    size=None,
):
    """Write a video, by default lossless.

    images: frames (h, w, 3) uint8; with another `source`, its format, as PyAV takes them
    rate: frames a second
    times: of each frame, in milliseconds, instead of a constant rate
    options, container: of the encoder and of the file format
    size: (width, height), needed if `images` is an iterator
    """
    time_base = Fraction(1, 1000) if times else 1 / Fraction(rate)
    with av.open(str(path), "w", options=container or {}) as out:
        stream = out.add_stream(codec, rate=rate, options=options or {})
        stream.width, stream.height = size or size_of(images, source)
        stream.pix_fmt = pix_fmt
        if times:
            stream.codec_context.time_base = time_base
        out.start_encoding()  # the header, also of a video without frames
        for i, image in enumerate(images):
            frame = av.VideoFrame.from_ndarray(image, source)
            frame.time_base = time_base
            frame.pts = times[i] if times else i
            out.mux(stream.encode(frame.reformat(format=pix_fmt)))
        out.mux(stream.encode(None))


def size_of(images, source):
    """(width, height) of the first image; planes come before rows in formats but rgb24."""
    if not images:
        return 64, 48
    height, width = images[0].shape[:2] if source == "rgb24" else images[0].shape[-2:]
    return width, height


def turn(path, matrix):
    """Give an MP4 file's first track the display matrix (a, b, c, d).

    (x, y) is shown at (a x + c y, b x + d y), y downward: the track header of ISO 14496-12.
    """
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 44
    assert struct.unpack_from(">9i", data, at)[0] == 1 << 16
    a, b, c, d = (int(value * (1 << 16)) for value in matrix)
    struct.pack_into(">9i", data, at, a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)


def write_audio(path, cover=False):
    """A file without film: half a second of silence, with a cover picture if asked for."""
    with av.open(str(path), "w") as out:
        sound = out.add_stream("aac", rate=44100)
        if cover:
            picture = out.add_stream("mjpeg", rate=1)
            picture.width, picture.height, picture.pix_fmt = 64, 64, "yuvj420p"
            picture.disposition = Disposition.attached_pic
            out.mux(picture.encode(av.VideoFrame(64, 64, "yuvj420p")))
            out.mux(picture.encode(None))
        silence = np.zeros((2, 1024), np.float32)
        for i in range(20):
            frame = av.AudioFrame.from_ndarray(silence, format="fltp", layout="stereo")
            frame.rate, frame.pts = 44100, i * 1024
            out.mux(sound.encode(frame))
        out.mux(sound.encode(None))
