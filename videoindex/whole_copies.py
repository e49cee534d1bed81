"""Whether one file has all that another has: what a plan asks before it drops the other.

Frame descriptors do not tell it. They bear what an edited copy bears: a title that is burnt in, a
picture in the corner, other words that roll by, colours that are gone. So the whole pictures are
compared, coarsely, and the sound.
"""

import functools
import io
import itertools
import os
from collections.abc import Sequence

import numpy as np
from PIL import Image

GRID = 16  # of the squares in which two pictures are compared
# The most that a square's mean may differ, of 255, in any colour. Of 15 pairs of real clips that
# were encoded or resized again it was 13; with a title, a picture or bars in one, 32 and more.
SAME_PICTURE = 20.0

# Sound is compared by its loudness in bands, every tenth of a second, at lags of a second and less.
SOUND_RATE, SOUND_STEP, MAX_LAG = 8000, 800, 10
BANDS = (1, 3, 6, 10, 17, 28, 46, 75, 122, 200)  # first row of each, of a spectrum of 10 Hz a row
QUIET = 1e-3  # power, that is not heard
BLOCK = 100  # rows that are computed at a time
# The correlation over the whole, and in every three seconds; and the mean difference, in powers of
# ten, of three seconds that need not correlate, as they are silent or steady. Encoded again, at 16
# kbit/s and more, speech and noise had .98 and .93; with a gap or other words of 3 s, .49 and less.
SAME_SOUND, PART, SAME_PART, SAME_LEVEL = 0.85, 30, 0.7, 0.15


def pictures_agree(first: Sequence[bytes], second: Sequence[bytes]) -> bool:
    """Whether two videos show the same pictures all along, a frame earlier or later.

    Args:
        first, second: the thumbnails of their frames, as JPEGs.
    """
    try:
        first, second = (np.stack(list(map(_squares, jpegs))) for jpegs in (first, second))
    except (OSError, ValueError, Image.DecompressionBombError):  # damaged: `verify` names it
        return False
    for one, other in ((first, second), (second, first)):
        least = np.full(len(one), np.inf)
        for shift in (-1, 0, 1):
            rows = np.arange(len(one)) + shift
            inside = (rows >= 0) & (rows < len(other))
            worst = np.abs(one[inside] - other[rows[inside]]).max((1, 2, 3))
            least[inside] = np.minimum(least[inside], worst)
        if not (least <= SAME_PICTURE).all():
            return False
    return True


def _squares(jpeg):
    """The mean colours (GRID, GRID, 3) of a picture."""
    image = Image.open(io.BytesIO(jpeg)).convert("RGB").resize((GRID, GRID), Image.Resampling.BOX)
    return np.asarray(image, np.float32)


# --- tracks -------------------------------------------------------------------------------------


def missing_in(kept: str | os.PathLike, path: str | os.PathLike) -> str:
    """What the file `path` has and `kept`, which shows the same film, has not; "" if nothing.

    A track without a language may be of any.
    """
    # Here, and where sound is read: a damaged file can raise nearly anything.
    try:
        here, there = _languages(path), _languages(kept)
    except Exception:
        return "tracks that cannot be read"
    for kind, what in (("audio", "sound"), ("subtitle", "subtitles")):
        if len(here[kind]) > len(there[kind]):
            return f"more tracks of {what}" if there[kind] else what
        if "" not in there[kind] and set(here[kind]) - {"", *there[kind]}:
            return f"{what} in another language"
    kept_tracks = range(len(there["audio"]))
    for track in range(len(here["audio"])):
        if not any(same_sound((kept, other), (path, track)) for other in kept_tracks):
            return "other sound"
    return ""


def _languages(path):
    """{kind: the languages of its tracks, "" if they are not told}."""
    # Here: most commands open no video.
    from features.presentation import open_video

    found = {"audio": [], "subtitle": []}
    with open_video(path) as container:
        for stream in container.streams:
            if stream.type in found:
                language = stream.metadata.get("language", "")
                found[stream.type].append("" if language == "und" else language)
    return found


# --- sound --------------------------------------------------------------------------------------

Track = tuple[str | os.PathLike, int]  # a file, and the number of one of its sound tracks


def same_sound(one: Track, other: Track) -> bool:
    """Whether two sound tracks are one from end to end, maybe encoded again.

    A track that cannot be decoded is not the same.
    """
    try:
        first, second = (_loudness(path, track, _stamp(path)) for path, track in (one, other))
    except Exception:
        return False
    if abs(len(first) - len(second)) > MAX_LAG:
        return False
    if not len(first) or not len(second):
        return len(first) == len(second)
    if np.ptp(first) < 1e-6 and np.ptp(second) < 1e-6:  # both silent
        return bool(abs(first[0, 0] - second[0, 0]) < SAME_LEVEL)

    def correlation_at(lag):
        return _correlation(*_align(first, second, lag))

    lag = max(range(-MAX_LAG, MAX_LAG + 1), key=correlation_at)
    if correlation_at(lag) < SAME_SOUND:
        return False
    aligned = _align(first, second, lag)
    for start in range(0, len(aligned[0]), PART):
        a, b = (rows[start : start + PART] for rows in aligned)
        if _correlation(a, b) < SAME_PART and np.abs(a - b).mean() > SAME_LEVEL:
            return False
    return True


def _align(one, other, lag):
    """The rows that both have, each band less its mean, by which one may be louder."""
    one, other = one[max(lag, 0) :], other[max(-lag, 0) :]
    length = min(len(one), len(other))
    return one[:length] - one[:length].mean(0), other[:length] - other[:length].mean(0)


def _correlation(one, other):
    norm = np.sqrt((one**2).sum() * (other**2).sum())
    return float((one * other).sum() / norm) if norm > 1e-6 else 0.0


def _stamp(path):
    facts = os.stat(path)
    return facts.st_size, facts.st_mtime_ns


@functools.lru_cache(
    8
)  # tracks: the file that is kept is compared with every other one of its group
def _loudness(path, track, stamp):
    """The logarithm of the power of a sound track, by time and band: (T, bands) float32."""
    # Here: most commands open no video.
    import av

    from features.presentation import open_video

    rows, pieces, count = [np.zeros((0, len(BANDS)), np.float32)], [], 0
    resampler = av.AudioResampler("fltp", "mono", SOUND_RATE)
    with open_video(path) as container:
        for frame in itertools.chain(container.decode(audio=track), [None]):
            new = [piece.to_ndarray()[0] for piece in resampler.resample(frame)]
            pieces, count = pieces + new, count + sum(map(len, new))
            if count >= BLOCK * SOUND_STEP or frame is None:
                samples = np.concatenate([np.zeros(0, np.float32), *pieces])
                whole = len(samples) // SOUND_STEP * SOUND_STEP
                pieces, count = [samples[whole:]], len(samples) - whole
                windows = samples[:whole].reshape(-1, SOUND_STEP)
                power = np.abs(np.fft.rfft(windows * np.hanning(SOUND_STEP))) ** 2
                bands = np.add.reduceat(power, BANDS, axis=1)
                rows.append(np.log10(bands + QUIET).astype(np.float32))
    return np.concatenate(rows)
