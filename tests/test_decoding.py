"""Which frames of a video are kept, and how they look: by time, upright, cropped."""

import itertools
import subprocess
import sys
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from helpers.clips import index_of, numbered, textured, turn, write_video
from helpers.commands import ROOT
from PIL import Image
from sklearn.datasets import load_sample_image
from torch.nn import functional as F

from features import decoding
from features.decoding import Video, read_frames
from features.frame_rules import FRAME_RULES, Clock, always
from features.presentation import FrameTransform


def kept_indices(path, **options):
    return [index_of(image) for image in read_frames(Video("v", path), **options)]


# --- which frames --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rate", [Fraction(10), Fraction(25), Fraction(30000, 1001), Fraction(2, 3)]
)
def test_row_k_is_the_frame_at_second_k_at_a_constant_rate(tmp_path, rate):
    n = int(7 * rate) + 3
    times = [round(1000 * i / rate) for i in range(n)]  # Matroska counts milliseconds
    end = times[-1] + round(1000 / rate)
    write_video(tmp_path / "v.mkv", numbered(n), rate)
    shown, after = [], []
    for k in range(0, end, 1000):
        shown.append(max(i for i, t in enumerate(times) if t <= k))
        after += [i for i, t in enumerate(times) if t >= k][:1]
    assert kept_indices(tmp_path / "v.mkv") == shown
    assert kept_indices(tmp_path / "v.mkv", rule="first_after") == after
    if rate.denominator == 1:  # so a frame comes at each second, and the rules agree
        assert shown == after


@pytest.mark.parametrize("fps", [Fraction(1), Fraction(2), Fraction(1, 2)])
def test_row_k_is_the_frame_at_its_time_at_a_variable_rate(tmp_path, fps):
    times = [0, 100, 900, 1001, 1300, 1400, 2900, 3000]
    times += [3050, 7200, 7300, 8000]  # 3050 is a still of four seconds
    write_video(tmp_path / "v.mkv", numbered(len(times)), 10, times)
    shown, after = [], []
    for k in range(100):
        time = k * 1000 / fps
        if time < 8100:
            shown.append(max(i for i, t in enumerate(times) if t <= time))
        after += [i for i, t in enumerate(times) if t >= time][:1]
    assert kept_indices(tmp_path / "v.mkv", fps=fps) == shown
    assert kept_indices(tmp_path / "v.mkv", fps=fps, rule="first_after") == after


def test_clock_starts_at_the_first_frame_and_survives_breaks():
    clock = Clock(Fraction(1, 1000), Fraction(10))
    seconds = {
        "starts late": (5000, 0),
        "continues": (5500, 0.5),
        "no timestamp": (None, 0.6),
        "jumps by an hour": (3_600_000, 0.7),
        "continues there": (3_600_200, 0.9),
        "falls back": (100, 1.0),
        "continues again": (300, 1.2),
    }
    for what, (pts, expected) in seconds.items():
        assert float(clock(pts)) == pytest.approx(expected), what


@pytest.mark.parametrize(
    "n, rate, expected",
    [
        (120, 25, [0, 24, 49, 74, 99, 99]),
        (100, Fraction(30000, 1001), [0, 29, 59, 89, 89]),
        (20, 25, [0, 0]),
        (60, 150, [0, 24, 49, 49]),  # above 144 a rate is not believed
    ],
)
def test_released_rule_is_that_of_the_released_load_video(tmp_path, n, rate, expected):
    """By hand through `load_video` of xwen99/temporal_context_aggregation's extract_frames.py."""
    write_video(tmp_path / "v.mkv", numbered(n), rate)
    assert kept_indices(tmp_path / "v.mkv", rule="released") == expected


# --- skipping frames that are not kept -----------------------------------------------------------

STEADY = [40 * i for i in range(250)]  # milliseconds
UNSTEADY = [t + 400 * (t > 1500) + 3000 * (t > 4000) + 13 * (i % 3) for i, t in enumerate(STEADY)]


@pytest.fixture
def decoded_pts(monkeypatch):
    """The timestamps of the frames that are decoded, as they come."""
    timestamps = []

    class NotedClock(Clock):
        def __call__(self, pts):
            timestamps.append(pts)
            return super().__call__(pts)

    monkeypatch.setattr(decoding, "Clock", NotedClock)
    return timestamps


RATES = [Fraction(1), Fraction(7, 2), Fraction(1, 3)]


def rows_by_rule(rule, seconds, fps):
    """The index of each row's frame, from the frames' times; the last one stays for 1/25 s."""
    expected = []
    for k in range(100):
        if rule == "first_after":
            expected += [i for i, t in enumerate(seconds) if t >= k / fps][:1]
        elif k / fps < seconds[-1] + Fraction(1, 25):
            expected.append(max(i for i, t in enumerate(seconds) if t <= k / fps))
    return expected


def write_h264(path, times, params, **options):
    options = {"bf": "3", "x264-params": params, **options}
    images = textured(0, len(times))
    write_video(path, images, 25, times, "libx264", "yuv420p", options=options)


@pytest.mark.parametrize("times", [STEADY, UNSTEADY], ids=["steady", "unsteady"])
@pytest.mark.parametrize("pyramid", ["none", "normal"])
@pytest.mark.parametrize(
    "suffix, params", [("mp4", "open-gop=1:keyint=40"), ("ts", "keyint=250"), ("flv", "ref=1")]
)
def test_h264_rows_are_those_of_a_full_decode(
    tmp_path, decoded_pts, suffix, params, pyramid, times
):
    path = tmp_path / f"v.{suffix}"
    write_h264(path, times, params, **{"b-pyramid": pyramid, "preset": "veryfast"})

    with av.open(str(path)) as file:
        frames = sorted(file.decode(video=0), key=lambda frame: frame.pts)
    seconds = [(frame.pts - frames[0].pts) * frame.time_base for frame in frames]
    transform, images = FrameTransform(), {}
    for fps, rule in itertools.product(RATES, ("on_screen", "first_after")):
        expected = []
        for i in rows_by_rule(rule, seconds, fps):
            if i not in images:
                images[i] = transform(frames[i])
            expected.append(images[i])
        decoded_pts.clear()
        video = Video("v", path)
        np.testing.assert_array_equal(list(read_frames(video, fps, rule)), expected)
        assert 0 < video.seconds - seconds[-1] < 0.1  # a frame's own duration
        assert not video.corrupt_packets
        assert len(decoded_pts) < 0.8 * len(frames)  # and not all were decoded


def end_edit_list(path, milliseconds):
    """Let an MP4's edit list end so early: later packets stay in the file, but are not shown."""
    data = bytearray(path.read_bytes())
    at = data.index(b"elst") + 12  # the duration of its first entry
    data[at : at + 4] = milliseconds.to_bytes(4, "big")
    path.write_bytes(data)


def join_packets(path):
    """An MPEG-TS whose packets hold three frames each, so only every third has a timestamp."""
    joined_path = path.with_suffix(".joined.ts")
    with av.open(str(path)) as source, av.open(str(joined_path), "w") as out:
        stream = out.add_stream_from_template(source.streams.video[0])
        packets = [packet for packet in source.demux(video=0) if packet.size]
        for i in range(0, len(packets), 3):
            first = packets[i]
            joined = av.Packet(b"".join(map(bytes, packets[i : i + 3])))
            joined.pts, joined.dts, joined.time_base = first.pts, first.dts, first.time_base
            joined.stream, joined.is_keyframe = stream, first.is_keyframe
            out.mux_one(joined)
    joined_path.replace(path)


ONE_A_SECOND = (Fraction(1), Fraction(25, 4))
ODD_TIMING = {  # how it is made, and at which fps it is read
    "trimmed": ("v.mp4", STEADY, "", ONE_A_SECOND),
    "three in a packet": ("v.ts", STEADY, "", ONE_A_SECOND),
    "interlaced": ("v.mp4", STEADY, ":interlaced=1", ONE_A_SECOND),
    "a slide show": (
        "v.mp4",
        [400_000 * i for i in range(24)],
        "",
        (Fraction(1, 700), Fraction(1, 90)),
    ),
}


@pytest.mark.parametrize("kind", ODD_TIMING)
def test_h264_rows_of_odd_timing_are_those_of_a_full_decode(
    tmp_path, monkeypatch, decoded_pts, kind
):
    name, times, params, rates = ODD_TIMING[kind]
    path = tmp_path / name
    write_h264(path, times, f"b-adapt=0:scenecut=0{params}")
    if kind == "trimmed":
        end_edit_list(path, 3080)
    if kind == "three in a packet":
        join_packets(path)
    for fps, rule in itertools.product(rates, ("on_screen", "first_after")):
        ours, full = Video("ours", path), Video("full", path)
        decoded_pts.clear()
        rows = list(read_frames(ours, fps, rule))
        if kind == "interlaced":  # fields may be packets of their own: none may be skipped
            assert len(decoded_pts) == len(times)
        with monkeypatch.context() as patch:
            # A rule that cannot tell beforehand what it keeps, so that every frame is decoded.
            patch.setitem(FRAME_RULES, rule, FRAME_RULES[rule]._replace(may_keep=always))
            np.testing.assert_array_equal(rows, list(read_frames(full, fps, rule)))
        assert ours.seconds == full.seconds > 1


# --- how they look -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "matrix, turns",
    [((0, 1, -1, 0), -1), ((-1, 0, 0, -1), 2), ((0, -1, 1, 0), 1), ((1, 0, 0, 1), 0)],
)
def test_clip_rotated_by_metadata_equals_the_upright_one(tmp_path, matrix, turns):
    small = np.random.default_rng(0).uniform(0, 1, (1, 1, 5, 7)).astype(np.float32)
    luma = F.interpolate(torch.from_numpy(small), (256, 384), mode="bicubic")[0, 0].numpy()
    luma = (luma * 200 + 20).astype(np.uint8)

    def first_frame(name, luma, matrix=None):
        path = tmp_path / name
        planes = np.stack([luma, np.full_like(luma, 100), np.full_like(luma, 150)])
        write_video(
            path,
            [planes] * 3,
            codec="libx264",
            pix_fmt="yuv444p",
            source="yuv444p",
            options={"qp": "0"},
        )
        if matrix:
            turn(path, matrix)
        return next(read_frames(Video("v", path)))

    lying = first_frame("lying.mp4", luma, matrix)
    upright = first_frame("upright.mp4", np.ascontiguousarray(np.rot90(luma, turns)))
    assert np.abs(lying.astype(int) - upright).max() <= 1


def test_frames_are_the_centre_of_a_bicubic_resize_to_256(tmp_path):
    image = load_sample_image("china.jpg")  # 427 x 640
    write_video(tmp_path / "v.mkv", [image])
    ours = next(read_frames(Video("v", tmp_path / "v.mkv")))
    pillow = np.asarray(Image.fromarray(image).resize((383, 256), Image.BICUBIC))[16:240, 79:303]
    # Two programs' bicubic; a shift by one pixel gives 9.
    assert np.abs(ours.astype(int) - pillow).mean() < 1


# --- files ---------------------------------------------------------------------------------------


def test_file_cut_short_gives_the_frames_it_still_has(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (80, 64, 64, 3), np.uint8)
    write_video(tmp_path / "whole.mkv", list(noise))
    data = (tmp_path / "whole.mkv").read_bytes()
    (tmp_path / "cut.mkv").write_bytes(data[: len(data) // 2])
    video = Video("v", tmp_path / "cut.mkv")
    assert 3 <= len(list(read_frames(video))) <= 5
    assert 3.5 < video.seconds < 4.5


def test_relative_path_with_a_colon_is_not_a_protocol(tmp_path, monkeypatch):
    write_video(tmp_path / "12:30.mkv", numbered(3))
    monkeypatch.chdir(tmp_path)
    assert kept_indices("12:30.mkv") == [0]


def test_decoder_process_loads_no_torch():
    code = "import sys, features.decoding; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
