"""Facts of files: as they were written, as a player shows them, and None for what is unknown."""

import os

import av
import pytest
from helpers.clips import turn

from videoindex.facts import MediaFacts, media_facts


def write_film(path, pixel_aspect=1):
    """Two seconds of 64 x 48 pixels in MPEG-4."""
    with av.open(str(path), "w") as out:
        stream = out.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.sample_aspect_ratio = pixel_aspect
        for i in range(20):
            frame = av.VideoFrame(64, 48, "yuv420p")
            frame.pts = i
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))


def test_facts_are_those_that_were_written(tmp_path):
    path = tmp_path / "v.mp4"
    write_film(path)
    os.utime(path, (1_000_000, 1_000_000.5))
    facts = media_facts(path)
    size = path.stat().st_size
    assert facts[:4] == (size, 64, 48, "mpeg4")
    assert facts.seconds == pytest.approx(2, abs=0.01)
    assert facts.bit_rate == pytest.approx(8 * size / 2, rel=0.02)
    assert facts.modified == 1_000_000.5


def test_size_is_that_on_the_screen(tmp_path):
    """A quarter turn, and pixels that are twice as wide as high."""
    path = tmp_path / "v.mp4"
    write_film(path, pixel_aspect=2)
    assert media_facts(path)[1:3] == (128, 48)
    turn(path, (0, 1, -1, 0))
    assert media_facts(path)[1:3] == (48, 128)


def test_broken_and_missing_files_have_the_facts_that_remain(tmp_path):
    assert media_facts(tmp_path / "none.mp4") == MediaFacts()
    assert media_facts("a\0b") == MediaFacts()
    for content in (b"", b"no video" * 100):
        path = tmp_path / "broken.mp4"
        path.write_bytes(content)
        facts = media_facts(path)
        assert facts.size == len(content) and facts.modified == path.stat().st_mtime
        assert facts.codec is facts.width is facts.seconds is None
    os.mkfifo(tmp_path / "pipe.mp4")  # opening it would wait for a writer
    assert media_facts(tmp_path / "pipe.mp4").codec is None
    assert media_facts(tmp_path).codec is None
