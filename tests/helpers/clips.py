"""Videos made for a test: lossless and numbered, textured, rotated, or sound only."""

import struct
from fractions import Fraction

import av
import numpy as np
from av.stream import Disposition


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
    """Write a video of `images`, each (h, w, 3) uint8. By default it is lossless.

    Args:
        rate: frames a second
        times: time of each frame in milliseconds; without it the rate is constant
        source: pixel format of `images`
        options, container: options of the codec and of the container
        size: (w, h), needed if `images` is an iterator
    """
    time_base = Fraction(1, 1000) if times else 1 / Fraction(rate)
    with av.open(str(path), "w", options=container or {}) as out:
        stream = out.add_stream(codec, rate=rate, options=options or {})
        stream.width, stream.height = size or _size(images, source)
        stream.pix_fmt = pix_fmt
        if times:
            stream.codec_context.time_base = time_base
        out.start_encoding()  # writes the header, which a video without frames needs as well
        for i, image in enumerate(images):
            frame = av.VideoFrame.from_ndarray(image, source)
            frame.time_base = time_base
            frame.pts = times[i] if times else i
            out.mux(stream.encode(frame.reformat(format=pix_fmt)))
        out.mux(stream.encode(None))  # flush


def _size(images, source):
    """(w, h) of the first image."""
    if not images:
        return 64, 48
    shape = images[0].shape
    height, width = shape[:2] if source == "rgb24" else shape[-2:]
    return width, height


def turn(path, matrix):
    """Set the display matrix of an MP4 file's first track, in the track header (ISO 14496-12).

    With the matrix (a, b, c, d), the pixel (x, y) is shown at (a x + c y, b x + d y), y downwards.
    """
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 44
    assert struct.unpack_from(">9i", data, at)[0] == 1 << 16  # 1.0 in 16.16 fixed point
    a, b, c, d = (int(value * (1 << 16)) for value in matrix)
    struct.pack_into(">9i", data, at, a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)


def numbered(n):
    """n small frames whose colour encodes their index."""
    return [np.full((32, 48, 3), (i % 256, i // 256, 77), np.uint8) for i in range(n)]


def index_of(image):
    """The index of a `numbered` frame, from its (224, 224, 3) crop."""
    return int(image[112, 112, 0]) + 256 * int(image[112, 112, 1])


def textured(seed, n):
    """n frames of smooth noise that drifts, so that features differ from frame to frame."""
    base = np.random.default_rng(seed).integers(0, 256, (8, 12, 3), np.uint8)
    return [np.roll(base, i, 1).repeat(8, 0).repeat(8, 1) for i in range(n)]


def write_audio(path, cover=False):
    """Half a second of silence; with a `cover` picture, which players list as a video stream."""
    silence = np.zeros((2, 1024), np.float32)
    with av.open(str(path), "w") as out:
        sound = out.add_stream("aac", rate=44100)
        if cover:
            picture = out.add_stream("mjpeg", rate=1)
            picture.width, picture.height, picture.pix_fmt = 64, 64, "yuvj420p"
            picture.disposition = Disposition.attached_pic
            out.mux(picture.encode(av.VideoFrame(64, 64, "yuvj420p")))
            out.mux(picture.encode(None))
        for i in range(20):
            frame = av.AudioFrame.from_ndarray(silence, format="fltp", layout="stereo")
            frame.rate, frame.pts = 44100, i * 1024
            out.mux(sound.encode(frame))
        out.mux(sound.encode(None))
