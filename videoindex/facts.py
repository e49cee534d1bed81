"""What is known about a video file without decoding it: size, resolution, codec, bit rate, date.

For people who choose which of several copies to keep, so it is read from the file as it is now.
"""

import contextlib
import os
import stat
from fractions import Fraction
from typing import NamedTuple


class MediaFacts(NamedTuple):
    """The facts of a video file; None for what is unknown.

    size: bytes
    width, height: pixels as displayed: turned upright, cropped, with square pixels
    codec: FFmpeg's name of the film's codec, as "h264"
    bit_rate: bits a second of the whole file
    seconds: how long it plays, as the container states it
    modified: when the file was changed last, in seconds since 1970
    sound: how many tracks of it there are
    """

    size: int | None = None
    width: int | None = None
    height: int | None = None
    codec: str | None = None
    bit_rate: int | None = None
    seconds: float | None = None
    modified: float | None = None
    sound: int | None = None


def media_facts(path: str | os.PathLike) -> MediaFacts:
    """The facts of a file, without raising: a broken one has size and date, a missing one none."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return MediaFacts()
    facts = MediaFacts(size=status.st_size, modified=status.st_mtime)
    if not stat.S_ISREG(status.st_mode) or not status.st_size:
        return facts
    with contextlib.suppress(Exception):  # a damaged file can raise nearly anything
        facts = facts._replace(**_container_facts(path))
    if facts.bit_rate is None and facts.seconds:
        facts = facts._replace(bit_rate=round(8 * facts.size / facts.seconds))
    return facts


def _container_facts(path):
    """What the container states about its film, as fields of MediaFacts."""
    # Here: most commands open no video.
    from features.presentation import choose_film, open_video, stated_length

    with open_video(path) as container:
        stream = choose_film(container)
        width, height = _displayed_size(container, stream)
        return {
            "width": width or None,
            "height": height or None,
            "codec": stream.codec_context.name,
            "bit_rate": container.bit_rate or None,
            "seconds": stated_length(container, stream),
            "sound": len(container.streams.audio),
        }


def _displayed_size(container, stream):
    """(width, height) in square pixels, as a player shows the film."""
    from features.presentation import container_margins, container_rotation

    margins = container_margins(container, stream)
    width = stream.codec_context.width - margins.left - margins.right
    height = stream.codec_context.height - margins.top - margins.bottom
    aspect = stream.sample_aspect_ratio or stream.codec_context.sample_aspect_ratio
    width = round(width * (aspect or Fraction(1)))
    if round(container_rotation(container, stream) / 90) % 2:
        width, height = height, width
    return width, height
