"""Which frames of a video are kept, and how they look: by time, upright, cropped, and those of a full decode."""

from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from helpers.clips import index_of, numbered, textured, turn, write_video
from sklearn.datasets import load_sample_image
from torch.nn import functional as F

from features import decoding


def indices(path, **options):
    return [index_of(image) for image in decoding.read_frames(decoding.Video("v", path), **options)]


@pytest.mark.parametrize(
    "rate", [Fraction(10), Fraction(25), Fraction(30000, 1001), Fraction(2, 3)]
)
def test_row_k_is_the_first_frame_at_or_after_second_k_at_any_constant_rate(tmp_path, rate):
    n = int(7 * rate) + 3
    times = [round(1000 * i / rate) for i in range(n)]  # Matroska counts in milliseconds
    write_video(tmp_path / "v.mkv", numbered(n), rate)
    expected = [
        next(i for i, t in enumerate(times) if t >= 1000 * k) for k in range(times[-1] // 1000 + 1)
    ]
    assert indices(tmp_path / "v.mkv") == expected


@pytest.mark.parametrize("fps", [Fraction(1), Fraction(2), Fraction(1, 2)])
def test_row_k_is_the_first_frame_at_or_after_its_time_at_a_variable_rate(tmp_path, fps):
    times = [
        0,
        100,
        900,
        1001,
        1300,
        1400,
        2900,
        3000,
        3050,
        7200,
        7300,
        8000,
    ]  # 3050..7200: a still of four seconds
    write_video(tmp_path / "v.mkv", numbered(len(times)), 10, times)
    expected = []
    for k in range(100):
        late = [i for i, t in enumerate(times) if t >= k * 1000 / fps]
        expected += late[:1]
    assert indices(tmp_path / "v.mkv", fps=fps) == expected


STEADY = [40 * i for i in range(250)]
UNSTEADY = [t + 400 * (t > 1500) + 3000 * (t > 4000) + 13 * (i % 3) for i, t in enumerate(STEADY)]


@pytest.mark.parametrize("fps", [Fraction(1), Fraction(7, 2), Fraction(1, 3)])
@pytest.mark.parametrize("times", [STEADY, UNSTEADY], ids=["steady", "unsteady"])
@pytest.mark.parametrize("pyramid", ["none", "normal"])
@pytest.mark.parametrize(
    "suffix, more", [("mp4", "open-gop=1:keyint=40"), ("ts", "keyint=250"), ("flv", "ref=1")]
)
def test_h264_frames_are_those_of_a_full_decode_though_not_all_are_decoded(
    tmp_path, monkeypatch, suffix, more, pyramid, times, fps
):
    path = tmp_path / f"v.{suffix}"
    options = {"bf": "3", "b-pyramid": pyramid, "preset": "veryfast", "x264-params": more}
    write_video(path, textured(0, len(times)), 25, times, "libx264", "yuv420p", options=options)

    with av.open(str(path)) as file:
        every = sorted(file.decode(video=0), key=lambda frame: frame.pts)
    seconds = [(frame.pts - every[0].pts) * frame.time_base for frame in every]
    late = [next((i for i, t in enumerate(seconds) if t >= k / fps), None) for k in range(100)]
    expected = [decoding.FrameTransform()(every[i]) for i in late if i is not None]

    shown = noted_frames(monkeypatch)
    video = decoding.Video("v", path)
    np.testing.assert_array_equal(list(decoding.read_frames(video, fps)), expected)
    assert (
        0 < video.seconds - seconds[-1] < 0.1 and not video.corrupt_packets
    )  # < 0.1: a frame's own time
    assert len(shown) < 0.8 * len(every)


def noted_frames(monkeypatch):
    """The timestamps of the frames that are decoded from now on, as they come."""
    timestamps = []

    class Noted(decoding.Clock):
        def __call__(self, pts):
            timestamps.append(pts)
            return super().__call__(pts)

    monkeypatch.setattr(decoding, "Clock", Noted)
    return timestamps


def trimmed(path, milliseconds):
    """Let an MP4's edit list end so early: the packets after it stay in the file, and are not shown."""
    data = bytearray(path.read_bytes())
    at = data.index(b"elst") + 12  # of its first entry, the duration
    data[at : at + 4] = milliseconds.to_bytes(4, "big")
    path.write_bytes(data)


def three_in_a_packet(path):
    """An MPEG-TS whose packets hold three frames each, so that only every third has a timestamp."""
    whole = path.with_suffix(".mp4.ts")
    with av.open(str(path)) as source, av.open(str(whole), "w") as out:
        stream = out.add_stream_from_template(source.streams.video[0])
        packets = [packet for packet in source.demux(video=0) if packet.size]
        for i in range(0, len(packets), 3):
            joined = av.Packet(b"".join(map(bytes, packets[i : i + 3])))
            joined.pts, joined.dts, joined.time_base = (
                packets[i].pts,
                packets[i].dts,
                packets[i].time_base,
            )
            joined.stream, joined.is_keyframe = stream, packets[i].is_keyframe
            out.mux_one(joined)
    whole.replace(path)


@pytest.mark.parametrize("kind", ["trimmed", "three in a packet", "interlaced", "a slide show"])
def test_h264_of_odd_timing_gives_the_frames_of_a_full_decode(tmp_path, monkeypatch, kind):
    path, times, params = (
        tmp_path / ("v.ts" if kind == "three in a packet" else "v.mp4"),
        STEADY,
        "b-adapt=0:scenecut=0",
    )
    if kind == "a slide show":
        times = [400_000 * i for i in range(24)]
    if kind == "interlaced":
        params += ":interlaced=1"
    write_video(
        path,
        textured(0, len(times)),
        25,
        times,
        "libx264",
        "yuv420p",
        options={"bf": "3", "x264-params": params},
    )
    if kind == "trimmed":
        trimmed(path, 3080)
    if kind == "three in a packet":
        three_in_a_packet(path)
    shown = noted_frames(monkeypatch)
    for fps in (
        (Fraction(1, 700), Fraction(1, 90))
        if kind == "a slide show"
        else (Fraction(1), Fraction(25, 4))
    ):
        ours, full = decoding.Video("ours", path), decoding.Video("full", path)
        shown.clear()
        rows = list(decoding.read_frames(ours, fps))
        assert kind != "interlaced" or len(shown) == len(
            times
        )  # fields may be packets of their own: none is left out
        with monkeypatch.context() as patch:
            patch.setitem(
                decoding.FRAME_RULES, "timestamp", decoding.FrameRule(decoding.at_timestamps)
            )  # knows nothing beforehand
            np.testing.assert_array_equal(rows, list(decoding.read_frames(full, fps)))
        assert ours.seconds == full.seconds > 1


def test_times_count_from_the_first_frame_and_survive_breaks_in_the_clock():
    clock = decoding.Clock(Fraction(1, 1000), Fraction(10))
    # starts late, goes on, no timestamp, jumps by an hour, goes on, falls back, goes on
    now = [float(clock(pts)) for pts in (5000, 5500, None, 3_600_000, 3_600_200, 100, 300)]
    assert now == pytest.approx([0, 0.5, 0.6, 0.7, 0.9, 1.0, 1.2])


@pytest.mark.parametrize(
    "n, rate, expected",
    [
        (120, 25, [0, 24, 49, 74, 99, 99]),
        (100, Fraction(30000, 1001), [0, 29, 59, 89, 89]),
        (20, 25, [0, 0]),
        (60, 150, [0, 24, 49, 49]),  # more than 144 is not believed
    ],
)
def test_released_rule_is_that_of_the_released_load_video(tmp_path, n, rate, expected):
    """Worked by hand through `load_video` of extract_frames.py in xwen99/temporal_context_aggregation."""
    write_video(tmp_path / "v.mkv", numbered(n), rate)
    assert indices(tmp_path / "v.mkv", rule="released") == expected


@pytest.mark.parametrize(
    "matrix, turns",
    [((0, 1, -1, 0), -1), ((-1, 0, 0, -1), 2), ((0, -1, 1, 0), 1), ((1, 0, 0, 1), 0)],
)
def test_a_clip_rotated_by_metadata_equals_the_upright_one(tmp_path, matrix, turns):
    small = np.random.default_rng(0).uniform(0, 1, (1, 1, 5, 7)).astype(np.float32)
    luma = (
        F.interpolate(torch.from_numpy(small), (256, 384), mode="bicubic")[0, 0].numpy() * 200 + 20
    ).astype(np.uint8)

    def write(path, luma):
        frames = [np.stack([luma, np.full_like(luma, 100), np.full_like(luma, 150)])] * 3
        write_video(path, frames, 10, None, "libx264", "yuv444p", "yuv444p", {"qp": "0"})

    write(tmp_path / "lying.mp4", luma)
    write(tmp_path / "upright.mp4", np.ascontiguousarray(np.rot90(luma, turns)))
    turn(tmp_path / "lying.mp4", matrix)
    lying, upright = (
        next(decoding.read_frames(decoding.Video("v", tmp_path / f"{name}.mp4")))
        for name in ("lying", "upright")
    )
    assert np.abs(lying.astype(int) - upright).max() <= 1


def test_frames_are_the_centre_of_a_bicubic_resize_to_256(tmp_path):
    from PIL import Image

    image = load_sample_image("china.jpg")  # 427 x 640
    write_video(tmp_path / "v.mkv", [image])
    ours = next(decoding.read_frames(decoding.Video("v", tmp_path / "v.mkv")))
    pillow = np.asarray(Image.fromarray(image).resize((383, 256), Image.BICUBIC))[16:240, 79:303]
    assert (
        np.abs(ours.astype(int) - pillow).mean() < 1
    )  # two programs' bicubic; a shift by one pixel gives 9


def test_a_file_cut_short_gives_the_frames_it_still_has(tmp_path):
    write_video(
        tmp_path / "whole.mkv",
        [np.random.default_rng(i).integers(0, 256, (64, 64, 3), np.uint8) for i in range(80)],
    )
    data = (tmp_path / "whole.mkv").read_bytes()
    (tmp_path / "cut.mkv").write_bytes(data[: len(data) // 2])
    video = decoding.Video("v", tmp_path / "cut.mkv")
    assert 3 <= len(list(decoding.read_frames(video))) <= 5 and 3.5 < video.seconds < 4.5


def test_a_relative_path_with_a_colon_is_no_protocol(tmp_path, monkeypatch):
    write_video(tmp_path / "12:30.mkv", numbered(3))
    monkeypatch.chdir(tmp_path)
    assert indices("12:30.mkv") == [0]
