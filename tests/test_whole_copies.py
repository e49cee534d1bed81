"""What a file must have of another one before it may be dropped for it: pictures and sound."""

import io

import av
import numpy as np
import pytest
from PIL import Image, ImageDraw

from videoindex.facts import media_facts
from videoindex.whole_copies import missing_in, pictures_agree, same_sound

RATE = 16000


def jpegs(images, quality=80, size=(160, 90)):
    """Thumbnails, as JPEGs."""
    files = []
    for image in images:
        file = io.BytesIO()
        image.resize(size).save(file, "JPEG", quality=quality)
        files.append(file.getvalue())
    return files


def scenes(count=6, seed=0):
    """Pictures of smooth random colours."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (count, 9, 16, 3), np.uint8)
    return [Image.fromarray(image).resize((640, 360), Image.Resampling.BICUBIC) for image in small]


def with_box(image, box, colour):
    image = image.copy()
    ImageDraw.Draw(image).rectangle(box, colour)
    return image


def test_pictures_that_were_encoded_again_agree():
    first = jpegs(scenes())
    for other in (jpegs(scenes(), 30), jpegs(scenes(), size=(120, 68)), [first[0], *first]):
        assert pictures_agree(first, other) and pictures_agree(other, first)


def test_a_picture_that_is_nowhere_in_the_other_is_seen():
    first = jpegs(scenes())
    assert not pictures_agree(first, first[1:]) and not pictures_agree(first[1:], first)


@pytest.mark.parametrize(
    "box, colour",
    [((20, 300, 400, 350), "white"), ((0, 0, 250, 140), "green"), ((0, 0, 80, 360), "black")],
)
def test_a_title_a_picture_in_the_corner_and_bars_are_seen(box, colour):
    """Be it in one frame of six."""
    images = scenes()
    spoilt = [*images[:3], with_box(images[3], box, colour), *images[4:]]
    assert not pictures_agree(jpegs(images), jpegs(spoilt))
    assert not pictures_agree(jpegs(spoilt), jpegs(images))


def test_a_damaged_picture_agrees_with_none():
    good = jpegs(scenes())
    assert not pictures_agree(good, [*good[:-1], b"no JPEG"])


# --- sound --------------------------------------------------------------------------------------


def speech(seed, seconds=12, loud=0.5):
    """Bursts of tones, as syllables: (n,) float32."""
    rng, parts = np.random.default_rng(seed), []
    while sum(map(len, parts)) < seconds * RATE:
        length = int(rng.uniform(0.08, 0.4) * RATE)
        tone = np.sin(2 * np.pi * rng.uniform(150, 2500) * np.arange(length) / RATE)
        parts += [loud * rng.uniform(0.2, 1) * tone * np.hanning(length)]
        parts += [np.zeros(int(rng.uniform(0, 0.3) * RATE))]
    return np.concatenate(parts)[: int(seconds * RATE)].astype(np.float32)


def write_sound(path, *tracks, codec="aac", bit_rate=64000):
    """A video of ten frames with sound tracks."""
    with av.open(str(path), "w") as out:
        video = out.add_stream("mpeg4", rate=10)
        video.width, video.height, video.pix_fmt = 48, 32, "yuv420p"
        options = {"rate": RATE, "bit_rate": bit_rate, "layout": "mono"}
        streams = [out.add_stream(codec, **options) for _ in tracks]
        for _ in range(10):
            out.mux(video.encode(av.VideoFrame.from_ndarray(np.zeros((32, 48, 3), np.uint8))))
        out.mux(video.encode(None))
        for stream, samples in zip(streams, tracks, strict=True):
            for start in range(0, len(samples), 1024):
                frame = av.AudioFrame.from_ndarray(
                    samples[None, start : start + 1024], "fltp", "mono"
                )
                frame.rate, frame.pts = RATE, start
                out.mux(stream.encode(frame))
            out.mux(stream.encode(None))
    return path


@pytest.fixture
def original(tmp_path):
    return write_sound(tmp_path / "original.mkv", speech(1))


@pytest.mark.parametrize(
    "change", [{"codec": "mp2"}, {"bit_rate": 24000}, {"loud": 0.1}, {"late": 0.5}]
)
def test_sound_that_was_encoded_again_is_the_same(original, tmp_path, change):
    late = np.zeros(int(change.pop("late", 0) * RATE), np.float32)
    samples = np.concatenate([late, speech(1, loud=change.pop("loud", 0.5))])
    assert same_sound(original, write_sound(tmp_path / "again.mkv", samples, **change))


@pytest.mark.parametrize("other", ["another language", "silence", "a part", "no sound"])
def test_other_sound_is_told(original, tmp_path, other):
    tracks = {
        "another language": [speech(2)],
        "silence": [np.zeros(12 * RATE, np.float32)],
        "a part": [speech(1)[: 5 * RATE]],
        "no sound": [],
    }
    path = write_sound(tmp_path / "other.mkv", *tracks[other])
    assert not same_sound(original, path) and not same_sound(path, original)


def test_silence_is_the_same_as_silence(tmp_path):
    silence = np.zeros(4 * RATE, np.float32)
    one, other = (write_sound(tmp_path / name, silence) for name in ("a.mkv", "b.mkv"))
    assert same_sound(one, other)


@pytest.mark.parametrize(
    "tracks, missing",
    [([1], ""), ([], ""), ([1, 2], "more tracks of sound"), ([2], "other sound")],
)
def test_missing_in_names_what_would_be_lost(original, tmp_path, tracks, missing):
    path = write_sound(tmp_path / "file.mkv", *map(speech, tracks))
    assert missing_in(original, media_facts(original), path, media_facts(path)) == missing


def test_missing_in_names_sound_and_subtitles(original, tmp_path):
    mute = write_sound(tmp_path / "mute.mkv")
    facts = media_facts(original)
    assert missing_in(mute, media_facts(mute), original, facts) == "sound"
    with_words = facts._replace(subtitles=1)
    assert missing_in(original, facts, original, with_words) == "subtitles"
