"""Which frames of a video become rows: its clock, and the rules of `--frames`."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from fractions import Fraction
from typing import Any, NamedTuple

from utils import InputError

MAX_GAP = 600  # seconds: a longer pause between two frames is a break in the clock, not a still


# --- time ----------------------------------------------------------------------------------------


class Clock:
    """Seconds of a film, from timestamps that may be missing, jump, or run backwards.

    Args:
        time_base: seconds of a timestamp's unit.
        rate: frames per second, for frames without a usable timestamp.
        max_gap: seconds; a longer pause counts as one frame.
        start: the timestamp of second 0; by default that of the first frame.
    """

    def __init__(
        self,
        time_base: Fraction,
        rate: Fraction,
        max_gap: Fraction | int = MAX_GAP,
        start: Fraction | None = None,
    ) -> None:
        self.time_base, self.step = time_base, 1 / rate
        self.max_gap, self.start = max_gap, start
        self.last, self.now = None, None  # timestamp and time of the latest frame
        self.origin = None  # the timestamp of second 0, once known

    def __call__(self, pts: int | None) -> Fraction:
        """The time of the next frame, which has this timestamp."""
        if self.now is None:
            self.now = self._first(pts)
        else:
            passed = self._since_last(pts)
            in_order = passed is not None and 0 <= passed <= self.max_gap
            self.now += passed if in_order else self.step
        self.last = pts
        return self.now

    def expected(self, pts: int | None) -> Fraction | None:
        """The time of a later frame of this timestamp; None where the clock cannot tell."""
        passed = self._since_last(pts)
        if passed is None or not 0 < passed <= self.max_gap:
            return None
        return self.now + passed

    def _first(self, pts):
        self.origin = pts
        if pts is None or self.start is None:
            return Fraction(0)
        late = (pts - self.start) * self.time_base
        if not 0 < late <= self.max_gap:
            return Fraction(0)
        self.origin = self.start
        return Fraction(late)

    def _since_last(self, pts):
        if pts is None or self.last is None:
            return None
        return (pts - self.last) * self.time_base


class BestTimestamp:
    """A frame's timestamp, or its packet's place in the file where timestamps run backwards.

    AVI, for one, has no display times, so B-frames get wrong ones. This is `guess_correct_pts` of
    FFmpeg (libavcodec/decode.c), which players use as `best_effort_timestamp`.
    """

    def __init__(self) -> None:
        self.last_pts = self.last_dts = -math.inf
        self.faulty_pts = self.faulty_dts = 0

    def __call__(self, frame: Any) -> int | None:  # a VideoFrame of PyAV
        pts, dts = frame.pts, frame.dts
        if dts is not None:
            self.faulty_dts += dts <= self.last_dts
            self.last_dts = dts
        elif pts is not None:
            self.last_dts = pts
        if pts is not None:
            self.faulty_pts += pts <= self.last_pts
            self.last_pts = pts
        elif dts is not None:
            self.last_pts = dts
        if pts is not None and (dts is None or self.faulty_pts <= self.faulty_dts):
            return pts
        return dts


def own_timestamp(frame: Any) -> int | None:
    """A frame's own timestamp."""
    return frame.pts


# --- rules ---------------------------------------------------------------------------------------


class Film(NamedTuple):
    """What a rule chooses from."""

    frames: Iterable[tuple]  # (seconds, frame), in display order
    rate: Fraction  # frames per second, as the container states it
    end: Callable[[], Fraction]  # when the last frame leaves the screen, once all are read


def on_screen(film: Film, fps: Fraction) -> Iterator:
    """For k = 0, 1, ...: the frame on screen at k/fps seconds, until the film ends.

    That is the last one whose time has come; before the first one, the first one.
    """
    k, shown = 0, None
    for now, frame in film.frames:
        while now > k / fps:
            yield frame if shown is None else shown
            k += 1
        shown = frame
    while shown is not None and k / fps < film.end():
        yield shown
        k += 1


def first_after(film: Film, fps: Fraction) -> Iterator:
    """For k = 0, 1, ...: the first frame at or after k/fps seconds.

    The rule of earlier versions. A frame after a pause of several seconds is kept once for each.
    """
    k = 0
    for now, frame in film.frames:
        while now >= k / fps:
            yield frame
            k += 1


def as_released(film: Film, fps: Fraction) -> Iterator:
    """The released code's rule: frame 0, every i with (i + 1) % round(rate) == 0, the last twice.

    Row k > 0 is thus the end of second k - 1. The rate is rounded, so at 29.97 the rows drift from
    the seconds; above 144 it is taken for 25.
    """
    every = max(1, round((film.rate if film.rate <= 144 else 25) / fps))
    last = None
    for i, (_, frame) in enumerate(film.frames):
        if i == 0 or (i + 1) % every == 0:
            last = frame
            yield frame
    if last is not None:
        yield last


# Whether a frame may be kept, by the times of its predecessor, itself and its successor.


def row_starts_before(before: Fraction, now: Fraction, after: Fraction, fps: Fraction) -> bool:
    """Whether `on_screen` keeps the frame: a k/fps is in [now, after)."""
    return math.ceil(now * fps) < after * fps


def row_starts_since(before: Fraction, now: Fraction, after: Fraction, fps: Fraction) -> bool:
    """Whether `first_after` keeps the frame: a k/fps is in (before, now]."""
    return math.floor(before * fps) < math.floor(now * fps)


def always(before: Fraction, now: Fraction, after: Fraction, fps: Fraction) -> bool:
    """For rules that cannot tell before decoding which frames they keep."""
    return True


class FrameRule(NamedTuple):
    """Which frames of a video are kept."""

    choose: Callable[[Film, Fraction], Iterator]
    may_keep: Callable[[Fraction, Fraction, Fraction, Fraction], bool] = always
    # Time as players take it: from the start of sound or film, by the best timestamp. Else from
    # the first frame, by its own timestamps, as all rules did in earlier versions.
    as_played: bool = False


FRAME_RULES = {
    "on_screen": FrameRule(on_screen, row_starts_before, as_played=True),
    "first_after": FrameRule(first_after, row_starts_since),
    "released": FrameRule(as_released),
}
DEFAULT_RULE = "on_screen"
EARLIER_RULE = "first_after"  # of features and indexes that do not state their rule
EARLIER_NAMES = {"timestamp": "first_after"}
MIN_RATE = Fraction(1, 100_000)  # rows a second


def with_current_rule(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of features, with `frames` as in FRAME_RULES even if an earlier name was used."""
    settings = dict(settings)
    if "frames" in settings:
        settings["frames"] = EARLIER_NAMES.get(settings["frames"], settings["frames"])
    return settings


def stated_rule(settings: Mapping[str, Any], path: Any) -> tuple[Fraction, str]:
    """Rows per second, and the name of the rule, of features with these settings.

    Features of others do not say: one row a second is usual.

    Raises:
        InputError: `path` states a rate or a rule that no features can have
    """
    rate, rule = str(settings.get("fps", 1))[:20], settings.get("frames", EARLIER_RULE)
    try:
        fps = Fraction(rate)
        if not MIN_RATE <= fps <= 1 / MIN_RATE:
            raise ValueError(rate)
    except (ValueError, ArithmeticError):
        raise InputError(
            f"feature file {str(path)!r} states fps {rate!r}, which is not a rate of rows;"
            " correct its attribute"
        ) from None
    if rule not in FRAME_RULES:
        raise InputError(
            f"feature file {str(path)!r} states frames {str(rule)[:40]!r}, which is not one of"
            f" {', '.join(FRAME_RULES)}; correct its attribute"
        )
    return fps, rule
