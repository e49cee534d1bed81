"""Videos whose container or codec says how they are shown: made by PyAV, or by changed bytes."""

import struct

import av
import numpy as np

from helpers.clips import size_of


def change_h264(path, target, changes):
    """Copy H.264 of an MP4 to an MPEG-TS, with changes that the filter h264_metadata makes.

    MPEG-TS states nothing of its own about presentation but time.
    """
    changes = f"h264_mp4toannexb,h264_metadata={changes}"
    with av.open(str(path)) as source, av.open(str(target), "w") as out:
        stream = out.add_stream_from_template(source.streams.video[0])
        chain = av.bitstream.BitStreamFilterContext(changes, source.streams.video[0])
        packets = []
        for packet in source.demux(video=0):
            if packet.size:
                packets += chain.filter(packet)
        for packet in packets + chain.filter(None):
            packet.stream = stream
            out.mux_one(packet)


def write_tracks(path, tracks, sound=None):
    """Write several video tracks, and sound if asked for.

    tracks: [(images, start in seconds, codec, pix_fmt, flags or None), ...], 10 frames per second
    sound: (start, seconds) of silence
    """
    with av.open(str(path), "w") as out:
        streams = []
        for images, _, codec, pix_fmt, flags in tracks:
            stream = out.add_stream(codec, rate=10)
            stream.width, stream.height = size_of(images, "rgb24")
            stream.pix_fmt = pix_fmt
            if flags is not None:
                stream.disposition = flags
            streams.append(stream)
        silence = out.add_stream("aac", rate=44100) if sound else None
        packets = []
        for stream, (images, start, _, pix_fmt, _) in zip(streams, tracks, strict=True):
            for i, image in enumerate(images):
                frame = av.VideoFrame.from_ndarray(image, "rgb24").reformat(format=pix_fmt)
                frame.pts = i + round(10 * start)
                packets += stream.encode(frame)
            packets += stream.encode(None)
        if sound:
            packets += _silence(silence, *sound)
        packets.sort(key=lambda packet: packet.dts * packet.time_base)
        for packet in packets:
            out.mux(packet)


def _silence(stream, start, seconds):
    packets = []
    for i in range(round(seconds * 44100 / 1024)):
        samples = np.zeros((2, 1024), np.float32)
        frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="stereo")
        frame.rate, frame.pts = 44100, round(start * 44100) + i * 1024
        packets += stream.encode(frame)
    return packets + stream.encode(None)


# --- Matroska ------------------------------------------------------------------------------------


def insert_in_video_element(path, new):
    """Insert bytes into the Video element of a Matroska file's first track."""
    data = path.read_bytes()
    at, end, sizes = 0, len(data), []
    for element in ("18538067", "1654ae6b", "ae", "e0"):  # Segment, Tracks, TrackEntry, Video
        at, width, size = _find_element(data, at, end, bytes.fromhex(element))
        sizes.append((at, width, size))
        at += width
        end = at + size
    data = bytearray(data)
    data[at:at] = new
    for start, width, size in sizes:
        longer = (size + len(new)) | 1 << 7 * width
        data[start : start + width] = longer.to_bytes(width, "big")
    path.write_bytes(data)


def _find_element(data, at, end, element):
    """(start, width, value) of the size of an element among its siblings."""
    while at < end:
        width = 9 - data[at].bit_length()
        name, at = data[at : at + width], at + width
        width = 9 - data[at].bit_length()
        size = int.from_bytes(data[at : at + width], "big") - (1 << 7 * width)
        if name == element:
            return at, width, size
        at += width + size
    raise AssertionError(f"no element {element.hex()}")


def crop_matroska(path, top, bottom, left, right):
    """Let a Matroska file cut off so many pixels."""
    values = {"54bb": top, "54aa": bottom, "54cc": left, "54dd": right}
    parts = [bytes.fromhex(name) + b"\x81" + bytes([value]) for name, value in values.items()]
    insert_in_video_element(path, b"".join(parts))


# --- MP4 -----------------------------------------------------------------------------------------


def edit_mp4(path, start, seconds):
    """Let the edit list of an MP4 file begin `start` seconds into the film."""
    data = bytearray(path.read_bytes())
    at = data.index(b"mdhd") + 16
    (per_second,) = struct.unpack_from(">I", data, at)
    at = data.index(b"elst") + 12
    struct.pack_into(">Ii", data, at, round(1000 * seconds), round(per_second * start))
    path.write_bytes(data)
