"""Whether one file has all that another has: what a plan asks before it drops the other.

Frame descriptors do not tell it. They bear what an edited copy bears: a title that is burnt in, a
picture in the corner, other words that roll by. So the whole pictures are compared, coarsely, and
the sound.
"""

import io
import itertools
import os
from collections.abc import Sequence

import numpy as np
from PIL import Image

from videoindex.facts import MediaFacts

GRID = 16  # of the squares in which two pictures are compared
# The most that a square's mean may differ, of 255. Of 15 pairs of real clips that were encoded or
# resized again it was 12; of pairs with a title, a picture or black bars in one, 30 and more.
SAME_PICTURE = 20.0
# Sound is compared by its loudness in bands, every tenth of a second, at lags of a second and less.
SOUND_RATE, SOUND_STEP, MAX_LAG = 8000, 800, 10
BANDS = (1, 3, 6, 10, 17, 28, 46, 75, 122, 200)  # first row of each, of a spectrum of 10 Hz a row
QUIET = 1e-3  # power, that is not heard
# The correlation of the same sound encoded again was .90 and more, of other words .16 and less.
SAME_SOUND = 0.8


def pictures_agree(first: Sequence[bytes], second: Sequence[bytes]) -> bool:
    """Whether two videos show the same pictures all along, a frame earlier or later.

    Args:
        first, second: the thumbnails of their frames, as JPEGs.
    """
    try:
        first, second = (np.stack(list(map(_squares, jpegs))) for jpegs in (first, second))
    except OSError:  # damaged: `verify` names it
        return False
    for one, other in ((first, second), (second, first)):
        least = np.full(len(one), np.inf)
        for shift in (-1, 0, 1):
            rows = np.arange(len(one)) + shift
            inside = (rows >= 0) & (rows < len(other))
            worst = np.abs(one[inside] - other[rows[inside]]).max((1, 2))
            least[inside] = np.minimum(least[inside], worst)
        if not (least <= SAME_PICTURE).all():
            return False
    return True


def _squares(jpeg):
    """The mean brightness (GRID, GRID) of a picture."""
    image = Image.open(io.BytesIO(jpeg)).convert("L").resize((GRID, GRID), Image.Resampling.BOX)
    return np.asarray(image, np.float32)


def missing_in(
    kept: str | os.PathLike, kept_facts: MediaFacts, path: str | os.PathLike, facts: MediaFacts
) -> str:
    """What a file lacks that another one has, which shows the same film; "" if nothing."""
    for name, what in (("sound", "sound"), ("subtitles", "subtitles")):
        here, there = getattr(facts, name) or 0, getattr(kept_facts, name) or 0
        if here > there:
            return f"more tracks of {what}" if there else what
    if facts.sound and not same_sound(kept, path):
        return "other sound"
    return ""


def same_sound(one: str | os.PathLike, other: str | os.PathLike) -> bool:
    """Whether the first sound tracks of two files are one, maybe encoded again.

    A track that cannot be decoded is not the same.
    """
    # Its errors may be any; and whatever they are, the answer is that nobody knows.
    try:
        first, second = map(_loudness, (one, other))
    except Exception:
        return False
    lags = range(-MAX_LAG, MAX_LAG + 1)
    found = [_correlation(first[max(lag, 0) :], second[max(-lag, 0) :]) for lag in lags]
    return max(found) >= SAME_SOUND


def _loudness(path):
    """The logarithm of the power of the first sound track, by time and band: (T, bands)."""
    # Here: most commands open no video.
    import av

    from features.presentation import open_video

    rows, rest = [], np.zeros(0, np.float32)
    resampler = av.AudioResampler("fltp", "mono", SOUND_RATE)
    with open_video(path) as container:
        for frame in itertools.chain(container.decode(audio=0), [None]):
            pieces = [piece.to_ndarray()[0] for piece in resampler.resample(frame)]
            samples = np.concatenate([rest, *pieces])
            whole = len(samples) // SOUND_STEP * SOUND_STEP
            windows, rest = samples[:whole].reshape(-1, SOUND_STEP), samples[whole:]
            power = np.abs(np.fft.rfft(windows * np.hanning(SOUND_STEP))) ** 2
            rows.append(np.log10(np.add.reduceat(power, BANDS, axis=1) + QUIET))
    return np.concatenate(rows)


def _correlation(one, other):
    """Of the common length; 1 if both are silent."""
    length = min(len(one), len(other))
    if not length or abs(len(one) - len(other)) > 3 * MAX_LAG:
        return float(len(one) == len(other))
    one, other = one[:length] - one[:length].mean(), other[:length] - other[:length].mean()
    norm = np.sqrt((one**2).sum() * (other**2).sum())
    if norm < 1e-6:
        return float(one.any() == other.any())
    return float((one * other).sum() / norm)
