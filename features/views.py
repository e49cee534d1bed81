"""The picture that a backbone is shown of a frame: its size, its part, its normalisation.

It imports no torch, so that a decoder's process starts quickly.
"""

import re
from typing import NamedTuple

IMAGENET_MEAN, IMAGENET_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
# Pixels a side. The decoder's messages tell a frame from a report by its length; a report has at
# most 1.5 KB, a frame of 32 x 32 has 3 KB. A thumbnail follows its frame in one message.
MIN_SIZE, MAX_SIZE = 32, 1024


class View(NamedTuple):
    """A square picture of a frame.

    size: pixels a side
    whole: the whole frame, squeezed into the square. Else its centre, as classifiers are shown it:
        of the frame resized to a short side of 8 / 7 of `size`.
    cut_bars: black bars at the sides are no part of the frame (`presentation.black_bars`).
    """

    size: int = 224
    whole: bool = False
    cut_bars: bool = False

    @property
    def short_side(self) -> int:
        """That of the frame of which the centre is taken."""
        return self.size * 8 // 7  # 256 for 224

    @property
    def num_bytes(self) -> int:
        """Of a frame (size, size, 3) uint8."""
        return self.size * self.size * 3

    def __str__(self) -> str:
        part = "whole" if self.whole else "centre"
        return f"{self.size} {part}{' without bars' if self.cut_bars else ''}"

    @classmethod
    def parse(cls, text: str) -> "View":
        """The View of a text such as "288 whole", as feature files store it; or ValueError."""
        match = re.fullmatch(r"(\d{1,4}) (whole|centre)( without bars)?", text)
        if not match or not MIN_SIZE <= int(match[1]) <= MAX_SIZE:
            raise ValueError(f"{text[:40]!r} is not a view such as '288 whole'")
        return cls(int(match[1]), match[2] == "whole", bool(match[3]))
