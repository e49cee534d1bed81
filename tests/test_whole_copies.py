"""What a file must have of another one before it may be dropped for it: pictures and sound."""

import io
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image, ImageDraw

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


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_colours_that_are_gone_are_seen(share):
    faded = [Image.blend(image.convert("L").convert("RGB"), image, share) for image in scenes()]
    assert not pictures_agree(jpegs(scenes()), jpegs(faded))


def test_a_damaged_picture_and_none_agree_with_nothing():
    good = jpegs(scenes())
    assert not pictures_agree(good, [*good[:-1], b"no JPEG"])
    assert not pictures_agree([], [])


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


def noise(seed, seconds=12):
    """Wind, or the sea: brown noise, (n,) float32."""
    steps = np.random.default_rng(seed).normal(size=int(seconds * RATE))
    x = np.cumsum(steps - steps.mean())
    x -= np.convolve(x, np.ones(RATE // 20) / (RATE // 20), "same")
    return (0.5 * x / np.abs(x).max()).astype(np.float32)


def write_sound(path, *tracks, codec="aac", bit_rate=64000, languages=()):
    """A video of ten frames with sound tracks."""
    with av.open(str(path), "w") as out:
        video = out.add_stream("mpeg4", rate=10)
        video.width, video.height, video.pix_fmt = 48, 32, "yuv420p"
        options = {"rate": RATE, "bit_rate": bit_rate, "layout": "mono"}
        streams = [out.add_stream(codec, **options) for _ in tracks]
        for stream, language in zip(streams, languages, strict=False):
            stream.metadata["language"] = language
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
    again = write_sound(tmp_path / "again.mkv", samples, **change)
    assert same_sound((original, 0), (again, 0)) and same_sound((again, 0), (original, 0))


def test_noise_is_the_same_only_as_itself(tmp_path):
    one, again, other = (
        write_sound(tmp_path / f"{name}.mkv", noise(seed), codec=codec)
        for name, seed, codec in (("one", 1, "aac"), ("again", 1, "mp2"), ("other", 2, "aac"))
    )
    assert same_sound((one, 0), (again, 0)) and not same_sound((one, 0), (other, 0))


OTHERS = ["another language", "silence", "a part", "no sound", "a gap", "other words in the middle"]


@pytest.mark.parametrize("other", OTHERS)
def test_other_sound_is_told(original, tmp_path, other):
    tracks = {
        "another language": [speech(2)],
        "silence": [np.zeros(12 * RATE, np.float32)],
        "a part": [speech(1)[: 5 * RATE]],
        "no sound": [],
    }
    longer = {"a gap": 0 * speech(3, 6), "other words in the middle": speech(3, 6)}
    if other in longer:  # six seconds of a minute
        whole = speech(1, 60)
        original = write_sound(tmp_path / "minute.mkv", whole)
        middle = slice(25 * RATE, 31 * RATE)
        whole[middle] = longer[other]
        tracks[other] = [whole]
    path = write_sound(tmp_path / "other.mkv", *tracks[other])
    assert not same_sound((original, 0), (path, 0)) and not same_sound((path, 0), (original, 0))


def test_silence_is_the_same_as_silence(tmp_path):
    silence = np.zeros(4 * RATE, np.float32)
    one, other = (write_sound(tmp_path / name, silence) for name in ("a.mkv", "b.mkv"))
    assert same_sound((one, 0), (other, 0))


@pytest.mark.parametrize(
    "tracks, missing",
    [([1], ""), ([], ""), ([1, 2], "more tracks of sound"), ([2], "other sound")],
)
def test_missing_in_names_what_would_be_lost(original, tmp_path, tracks, missing):
    path = write_sound(tmp_path / "file.mkv", *map(speech, tracks))
    assert missing_in(original, path) == missing


def test_missing_in_finds_a_track_among_several(original, tmp_path):
    both = write_sound(tmp_path / "both.mkv", speech(2), speech(1))
    assert missing_in(both, original) == ""


def test_missing_in_compares_languages(tmp_path):
    """One that is not told may be any."""
    german, english, untold = (
        write_sound(tmp_path / f"{name}.mkv", speech(1), languages=[name])
        for name in ("ger", "eng", "und")
    )
    assert missing_in(german, english) == "sound in another language"
    assert missing_in(german, untold) == missing_in(untold, german) == ""


def test_missing_in_names_sound_for_silence_and_a_broken_file(original, tmp_path):
    mute = write_sound(tmp_path / "mute.mkv")
    assert missing_in(mute, original) == "sound" and missing_in(original, mute) == ""
    (tmp_path / "broken.mkv").write_bytes(b"no video")
    assert missing_in(original, tmp_path / "broken.mkv") == "tracks that cannot be read"


def test_missing_in_counts_subtitles(original, tmp_path):
    with_words = tmp_path / "words.mkv"
    with av.open(str(original)) as source, av.open(str(with_words), "w") as out:
        streams = {s: out.add_stream_from_template(s) for s in source.streams}
        words = out.add_mux_stream("subrip")
        for packet in source.demux():
            if packet.size:
                packet.stream = streams[packet.stream]
                out.mux_one(packet)
        packet = av.Packet(b"Hello")
        packet.stream, packet.pts, packet.dts, packet.duration = words, 0, 0, 1000
        packet.time_base = Fraction(1, 1000)
        out.mux_one(packet)
    assert missing_in(original, with_words) == "subtitles"
    assert missing_in(with_words, original) == ""
