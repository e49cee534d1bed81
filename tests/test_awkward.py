"""Files of unknown origin: each gives rows or a named reason, within bounded memory and time.

Theora, DV and H.261 are missing: this FFmpeg has no encoder for them. AV1 is SVT's only.
"""

import json
import os
import socket
import struct
import threading
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from helpers.clips import textured, turn, write_audio, write_video
from helpers.commands import python

from features.decoding import Decoder, Video, read_frames
from features.extraction import extract
from features.presentation import FrameTransform
from features.store import FeatureStore

IMAGES = textured(0, 15)  # a second and a half: rows 0 and 1
LONG = textured(1, 40)  # four seconds

HDR = {"x265-params": "log-level=none:colorprim=bt2020:transfer=smpte2084:colormatrix=bt2020nc"}
CODECS = {  # codec, pixel format, encoder options
    "h264.mp4": ("libx264", "yuv420p", {}),
    "h264 4:2:2.mp4": ("libx264", "yuv422p", {}),
    "h264 10 bit.mp4": ("libx264", "yuv420p10le", {}),
    "h264 grey.mp4": ("libx264", "gray", {}),
    "h265.mp4": ("libx265", "yuv420p", {"x265-params": "log-level=none"}),
    "h265 hdr.mp4": ("libx265", "yuv420p10le", HDR),
    "vp8.webm": ("libvpx", "yuv420p", {}),
    "vp9.webm": ("libvpx-vp9", "yuv420p", {"cpu-used": "8"}),
    "vp9 alpha.webm": ("libvpx-vp9", "yuva420p", {"cpu-used": "8"}),
    "av1.mp4": ("libsvtav1", "yuv420p", {"preset": "12"}),
    "av1 10 bit.mkv": ("libsvtav1", "yuv420p10le", {"preset": "12"}),
    "mpeg4.avi": ("mpeg4", "yuv420p", {}),
    "mpeg2.mpg": ("mpeg2video", "yuv420p", {}),
    "wmv.wmv": ("wmv2", "yuv420p", {}),
    "flv.flv": ("flv", "yuv420p", {}),
    "mjpeg.avi": ("mjpeg", "yuvj420p", {}),
    "gif.gif": ("gif", "rgb8", {}),
    "prores alpha.mov": ("prores_ks", "yuva444p10le", {}),
    "png alpha.mov": ("png", "rgba", {}),
    "grey 16 bit.mkv": ("ffv1", "gray16le", {}),
    "rgb 12 bit.mkv": ("ffv1", "gbrp12le", {}),
}
SIZES = {  # width, height, codec, pixel format
    "1x1.mkv": (1, 1, "ffv1", "bgr0"),
    "1x1.webm": (1, 1, "libvpx-vp9", "yuv420p"),
    "1x4096.avi": (1, 4096, "mjpeg", "yuvj444p"),
    "4096x1.mp4": (4096, 1, "libx264", "yuv444p"),
    "4096x1.webm": (4096, 1, "libvpx-vp9", "yuv420p"),
    "4096x2160.avi": (4096, 2160, "mjpeg", "yuvj420p"),
    "63x47.webm": (63, 47, "libvpx-vp9", "yuv420p"),
}
H264 = {"codec": "libx264", "pix_fmt": "yuv420p"}


# --- the zoo -------------------------------------------------------------------------------------


class Zoo:
    """The files, in `folder`.

    expected: {name: number of rows, range that holds it, or a piece of the reason}
    """

    def __init__(self, folder):
        self.folder, self.expected = folder, {}

    def video(self, name, expected, images, **options):
        write_video(self.folder / name, images, **options)
        self.expected[name] = expected
        return self.folder / name

    def file(self, name, expected, data):
        (self.folder / name).write_bytes(data)
        self.expected[name] = expected


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    zoo = Zoo(tmp_path_factory.mktemp("zoo"))
    for name, (codec, pixels, options) in CODECS.items():
        zoo.video(name, 2, IMAGES, codec=codec, pix_fmt=pixels, options=options)
    for name, (width, height, codec, pixels) in SIZES.items():
        image = np.tile(np.arange(width, dtype=np.uint8)[:, None], (height, 1, 3))
        zoo.video(name, 1, [image, image], codec=codec, pix_fmt=pixels)
    add_odd_timing(zoo)
    add_damaged(zoo)
    add_foreign(zoo)
    return zoo


def add_odd_timing(zoo):
    def video(name, expected, times):
        zoo.video(name, expected, IMAGES[: len(times)], times=times)

    video("variable rate.mkv", 4, [0, 40, 900, 1000, 1010, 3300])
    video("late start.mkv", 2, [10**12 + 100 * i for i in range(15)])
    video("a jump of years.mkv", 2, [100 * i + 10**11 * (i > 7) for i in range(15)])
    zoo.video("one frame.mkv", 1, IMAGES[:1])
    zoo.video("zero frames.mkv", "End of file", [])
    turn(zoo.video("turned.mp4", 2, IMAGES, **H264), (0, 1, -1, 0))


def add_damaged(zoo):
    whole = zoo.video("long.mkv", 4, LONG).read_bytes()
    zoo.file("cut.mkv", 2, first_half(whole))
    # A changed timestamp may pass for a still.
    zoo.file("scrambled.mkv", range(1, 601), scramble(whole, 0, 5))
    faststart = {"movflags": "faststart"}
    fast = zoo.video("fast start.mp4", 4, LONG, container=faststart, **H264)
    zoo.file("cut fast start.mp4", range(1, 4), first_half(fast.read_bytes()))
    slow = zoo.video("index at the end.mp4", 4, LONG, **H264)
    zoo.file("cut index.mp4", "Invalid data", first_half(slow.read_bytes()))
    gif = zoo.video("long.gif", 4, LONG, codec="gif", pix_fmt="rgb8")
    zoo.file("cut.gif", 2, first_half(gif.read_bytes()))


def add_foreign(zoo):
    zoo.file("really mp4.avi", 2, (zoo.folder / "h264.mp4").read_bytes())
    zoo.file("text.mp4", "Invalid data", b"This is not a video.\n" * 1000)
    zoo.file("random.mp4", "Invalid data", np.random.default_rng(0).bytes(100_000))
    zoo.file("zero bytes.mp4", "Invalid data", b"")
    zoo.file("zeros.mp4", "Invalid data", bytes(100_000))
    for name, cover in (("sound.mp4", False), ("cover.mp4", True)):
        write_audio(zoo.folder / name, cover)
        zoo.expected[name] = "no video stream"


def first_half(data):
    return data[: len(data) // 2]


def scramble(data, seed, count):
    """`data` with `count` of its bytes replaced, the first hundred left alone."""
    rng, data = np.random.default_rng(seed), bytearray(data)
    for at in rng.integers(100, len(data), count):
        data[at] = rng.integers(256)
    return bytes(data)


# The script; then its peak memory and that of its largest decoder, in KiB. One thread: with more,
# both memory and time depend on what else the machine does.
MEASURED = """
import json, re, sys
sys.path.insert(0, "pre-processing")
import extract_features
from features import extraction
from features.decoding import Decoder
extraction.default_parallelism = lambda *_: {"batch_sz": 8, "streams": 1, "threads": 1}

def peak(pid):
    return int(re.search(r"VmHWM:\\s+(\\d+)", open(f"/proc/{pid}/status").read())[1])

def measured_close(decoder, close=Decoder.close):
    if decoder.process and decoder.process.poll() is None:
        decoders.append(peak(decoder.process.pid))
    close(decoder)

decoders, Decoder.close = [], measured_close
status = extract_features.main(sys.argv[1:])
print(json.dumps([peak("self"), max(decoders)]))
sys.exit(status)
"""


def run_measured(*words):
    """Run the script; the finished process, and peak memory in GiB: its own and a decoder's."""
    done = python(MEASURED, *words)
    assert "Traceback" not in done.stderr and done.stdout, done.stderr
    return done, [kib / 2**20 for kib in json.loads(done.stdout)]


def is_as_expected(expected, row):
    """Whether a row of the report is what the zoo expects."""
    if isinstance(expected, str):
        return expected in row["reason"]
    if isinstance(expected, range):
        return not row["reason"] and row["frames"] in expected
    return not row["reason"] and row["frames"] == expected


@pytest.mark.slow
def test_every_file_of_the_zoo_gives_rows_or_a_named_reason(zoo, tmp_path):
    listed, output = tmp_path / "list.tsv", tmp_path / "f.hdf5"
    listed.write_text("".join(f"{name}\t{zoo.folder / name}\n" for name in zoo.expected))
    done, memory = run_measured(listed, "--output", output)
    assert done.returncode == 3 and sum(memory) < 2
    report, store = (
        json.loads(output.with_suffix(".json").read_text())["videos"],
        FeatureStore(output),
    )
    assert report.keys() == zoo.expected.keys()
    wrong = {}
    for name, expected in zoo.expected.items():
        if not is_as_expected(expected, report[name]):
            wrong[name] = expected, report[name]
    assert not wrong
    failed = 0
    for name, row in report.items():
        if row["reason"]:
            failed += 1
            assert name not in store
            assert f"skipped {name}: {row['reason']}" in done.stderr
        else:
            assert store[name].shape == (row["frames"], 1752)
    assert f"{len(report)} videos: {len(store)} in" in done.stderr
    assert f"{failed} failed" in done.stderr
    facts = {"status": "ok", "frames": 2, "seconds": 1.5, "corrupt_packets": 0}
    assert report["h264.mp4"].items() >= facts.items()


@pytest.mark.parametrize("name", CODECS)
def test_codec_gives_what_it_was_given(zoo, name):
    """Up to the codecs' own loss, and the colour that grey and HDR lack."""
    ours = np.stack(list(read_frames(Video(name, zoo.folder / name)))).astype(float)
    given = []
    for i in (0, 10):
        given.append(FrameTransform()(av.VideoFrame.from_ndarray(IMAGES[i], "rgb24")))
    given = np.stack(given).astype(float)
    if "grey" in name:
        assert np.ptp(ours, axis=3).max() <= 2  # it is grey
        ours, given = ours.mean(3), given @ [0.299, 0.587, 0.114]
    difference = np.abs(ours - given).mean()  # of 8-bit values
    to_other_frame = np.abs(given[0] - given[1]).mean()
    assert difference < min(20, to_other_frame / 2)


def test_line_is_cropped_before_it_is_resized():
    """4096 x 1 resized to a short side of 256 would be 1,048,576 x 256."""
    line = (np.arange(4096)[None, :, None].repeat(3, 2) // 16).astype(np.uint8)
    for image in (line, np.ascontiguousarray(np.rot90(line))):
        ours = FrameTransform()(av.VideoFrame.from_ndarray(image, "rgb24"))
        assert ours.shape == (224, 224, 3)
        assert np.abs(ours.astype(int) - 128).max() <= 1  # the middle of the line


# --- hostile files -------------------------------------------------------------------------------


@pytest.fixture
def decoder():
    """A decoder of short patience."""
    decoder = Decoder(time_limit=10)
    yield decoder
    decoder.close()


@pytest.mark.parametrize(
    "name",
    ["h264.mp4", "h265 hdr.mp4", "vp9.webm", "av1 10 bit.mkv", "mpeg4.avi", "gif.gif", "mpeg2.mpg"],
)
def test_scrambled_bytes_give_rows_or_a_reason(zoo, tmp_path, name):
    data, decoder = (zoo.folder / name).read_bytes(), Decoder(time_limit=30)
    for seed in range(12):
        path = tmp_path / f"{seed}{Path(name).suffix}"
        path.write_bytes(scramble(data, seed, 1 + len(data) // 200))
        video, rows = Video(name, path), 0
        for image in decoder.frames(video):
            rows += 1
            assert image.shape == (224, 224, 3)
            if rows > 5000:  # a changed timestamp gave a long still
                break
        assert rows or video.reason
        if rows > 5000:
            decoder.close()
    decoder.close()


def test_damaged_video_gives_the_same_rows_alone_and_among_others(tmp_path):
    """So a resumed run ends as an unbroken one.

    With several threads FFmpeg conceals damage by what happens to be decoded already.
    """
    path = tmp_path / "v.mp4"
    # x264's macroblock tree varies from run to run at some sizes, and with it what the damage hits.
    write_video(path, textured(0, 60), options={"x264-params": "threads=1:mbtree=0"}, **H264)
    data = path.read_bytes()
    for seed in range(6):
        damaged = scramble(data, seed, 1 + len(data) // 1500)
        (tmp_path / f"{seed}.mp4").write_bytes(damaged)

    def pixels(*seeds):
        videos = [Video(seed, tmp_path / f"{seed}.mp4") for seed in seeds]
        finished = extract(videos, lambda images: images.astype(np.int64), fps=Fraction(5))
        return {video.id: np.array(video.rows) for video in finished}

    together = pixels(*range(6))
    assert sum(len(rows) > 3 for rows in together.values()) >= 3
    for seed, rows in together.items():
        np.testing.assert_array_equal(pixels(seed)[seed], rows)


def test_source_that_never_answers_is_given_up(tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")
    decoder, video = Decoder(time_limit=1), Video("v", tmp_path / "pipe.mp4")
    assert not list(decoder.frames(video))
    assert "no frame in 1 seconds" in video.reason
    decoder.close()


def test_decoder_continues_after_a_video_that_ended_its_process(tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")
    write_video(tmp_path / "good.mkv", IMAGES)
    decoder, good = Decoder(time_limit=1), Video("good", tmp_path / "good.mkv")
    assert not list(decoder.frames(Video("v", tmp_path / "pipe.mp4")))
    assert len(list(decoder.frames(good))) == 2
    assert good.seconds == 1.5 and not good.reason
    decoder.close()


def test_playlist_is_not_followed_onto_the_network(tmp_path, decoder):
    calls = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(3)

        def answer():
            try:
                calls.append(server.accept())
            except TimeoutError:
                pass

        listener = threading.Thread(target=answer)
        listener.start()
        lines = [
            "#EXTM3U",
            "#EXT-X-TARGETDURATION:10",
            "#EXTINF:10,",
            f"http://127.0.0.1:{server.getsockname()[1]}/a.ts",
            "#EXT-X-ENDLIST",
        ]
        (tmp_path / "list.m3u8").write_text("\n".join(lines) + "\n")
        video = Video("v", tmp_path / "list.m3u8")
        assert not list(decoder.frames(video)) and video.reason
        listener.join()
    assert not calls


# --- broken clocks -------------------------------------------------------------------------------


def write_pictures(path, n, rate):
    images = [np.full((32, 48, 3), i % 256, np.uint8) for i in range(n)]
    write_video(path, images, rate, codec="mjpeg", pix_fmt="yuvj444p")


@pytest.mark.parametrize("rule", ["on_screen", "first_after", "released"])
def test_one_frame_in_a_lifetime_ends(tmp_path, rule):
    """A rate that nobody means is taken for 25: 30 frames are a second and a bit."""
    write_pictures(tmp_path / "v.avi", 30, Fraction(1, 2_000_000_000))
    video = Video("v", tmp_path / "v.avi")
    rows = list(read_frames(video, rule=rule))
    assert len(rows) in (2, 3) and video.seconds == pytest.approx(1.2)


@pytest.mark.parametrize("rule", ["on_screen", "first_after"])
def test_video_over_max_hours_is_given_up_and_named(tmp_path, rule):
    write_pictures(tmp_path / "v.avi", 20, Fraction(1, 500))  # 2.8 hours
    decoder, video = Decoder(rule=rule, max_hours=1), Video("v", tmp_path / "v.avi")
    assert len(list(decoder.frames(video))) <= 3600
    assert video.reason == "it lasts longer than 1 hours (--max_hours)"
    decoder.close()
    assert 9500 < len(list(read_frames(Video("v", tmp_path / "v.avi"), rule=rule))) <= 10_000


def test_video_over_max_decode_hours_is_given_up_and_named(tmp_path):
    write_pictures(tmp_path / "v.avi", 20, 1)
    decoder, video = Decoder(max_decode_hours=1e-9), Video("v", tmp_path / "v.avi")
    assert len(list(decoder.frames(video))) < 20
    assert video.reason == "decoding it takes over 1e-09 hours (--max_decode_hours)"
    decoder.close()


# --- memory --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_hour_of_video_takes_no_more_memory_than_a_minute(tmp_path):
    peaks = {}
    for seconds in (60, 3600):
        path, output = tmp_path / f"{seconds}.avi", tmp_path / f"{seconds}.hdf5"
        images = (np.full((48, 64, 3), i % 251, np.uint8) for i in range(seconds))
        write_video(path, images, 1, codec="mpeg4", pix_fmt="yuv420p", size=(64, 48))
        words = ["--weights", "random", "--stages", "_conv_stem", "--pooling", "mac"]  # cheap
        pattern = f"{tmp_path}/{{id}}.avi"
        _, peaks[seconds] = run_measured(pattern, "--output", output, *words, "--workers", "1")
        assert FeatureStore(output).lengths == {str(seconds): seconds}
        path.unlink()
    assert sum(peaks[3600]) < 2
    # GiB; the hour's frames are 0.5, its rows 0.0002.
    assert sum(peaks[3600]) - sum(peaks[60]) < 0.15


def test_decoder_takes_no_more_than_its_memory_limit(tmp_path):
    path = tmp_path / "big.avi"
    write_video(path, [np.zeros((8192, 8192, 3), np.uint8)], codec="mjpeg", pix_fmt="yuvj444p")
    decoder, video = Decoder(memory=256 << 20), Video("v", path)
    assert not list(decoder.frames(video)) and "memory" in video.reason.lower()
    decoder.close()
    decoder = Decoder()
    assert len(list(decoder.frames(Video("v", path)))) == 1
    decoder.close()


def test_still_over_ten_minutes_needs_a_duration_that_holds_it(tmp_path):
    path = tmp_path / "v.mkv"
    write_video(path, IMAGES[:3], times=[0, 599_000, 1_300_000])
    assert len(list(read_frames(Video("v", path)))) == 1301
    assert len(list(read_frames(Video("v", path), rule="first_after"))) == 600
    data = path.read_bytes().replace(b"DURATION", b"a tag...")
    at = data.index(b"\x44\x89\x88") + 3  # the duration of the file, a double
    assert struct.unpack_from(">d", data, at) == (1_300_100,)
    path.write_bytes(data[:at] + struct.pack(">d", 1000) + data[at + 8 :])
    assert len(list(read_frames(Video("v", path)))) == 600
