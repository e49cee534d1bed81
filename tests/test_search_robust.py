"""What people's folders hold: black leads, pillars, stills, compilations, intros, blank clips."""

import os
import shutil
from pathlib import Path

import av
import numpy as np
import pytest
from helpers.library import cut_clip
from PIL import Image, ImageDraw

from datasets.demo import edits
from videoindex.index import VideoIndex
from videoindex.plan import make_plan
from videoindex.several import look_up

FILM = [(100, 110)]


def write_frames(path, images, codec="h264", rate=12):
    """A video of frames (H, W, 3) uint8."""
    with av.open(str(path), "w") as output:
        stream = output.add_stream({"h264": "libx264"}.get(codec, codec), rate=rate)
        height, width, _ = images[0].shape
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.bit_rate = 600_000
        for image in images:
            output.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        output.mux(stream.encode(None))
    return path


def film(start, end):
    """Frames of the demo's film, (H, W, 3) uint8."""
    return [frame.to_ndarray(format="rgb24") for frame in edits.film_frames(edits.FILM, start, end)]


@pytest.fixture
def make_index(tmp_path, pipeline):
    """A function: an index of the videos that were written to the folder."""

    def make(folder):
        index = VideoIndex(tmp_path / "index", pipeline=pipeline)
        assert not index.add([folder]).failed
        return index

    return make


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "videos"
    path.mkdir()
    return path


def found(index, clip):
    """{name: Match} of a query, without the clip itself."""
    matches = {os.path.basename(match.path): match for match in index.query(clip)}
    matches.pop(os.path.basename(clip), None)
    return matches


def test_black_leads_are_no_evidence(folder, make_index, tmp_path):
    """Two films of nothing in common, each after five seconds of black."""
    black = [np.zeros((144, 256, 3), np.uint8)] * 60
    for name, start in (("a", 100), ("b", 300)):
        frames = [frame[::2, ::2][:124, :228] for frame in film(start, start + 8)]
        lead = [image[:124, :228] for image in black]
        write_frames(folder / f"{name}.mp4", lead + frames)
    write_frames(folder / "black.mp4", black)
    cut_clip(folder / "a again.mp4", [(100, 108)])
    index = make_index(folder)
    matches = found(index, folder / "a.mp4")
    assert set(matches) == {"a again.mp4"}
    (first, *_) = matches["a again.mp4"].segments
    assert first.query_start == pytest.approx(5, abs=1) and first.query_end <= 13.1
    assert found(index, folder / "black.mp4") == {}
    assert len(index.duplicates()) == 1
    frames = [image[::2, ::2][:124, :228] for image in film(100, 108)]
    lead = write_frames(tmp_path / "lead.mkv", [np.zeros_like(frames[0])] * 60 + frames)
    (known,) = look_up([index], [lead])
    assert known.state == "known" and known.share(known.matches[0]) >= 0.9
    (known,) = look_up([index], [folder / "black.mp4"])
    assert known.same_content and known.state == "known"


def test_pillars_and_letterbox_are_cut(folder, make_index):
    """A copy with much of its picture black has nearly the score of one without."""
    clip = cut_clip(folder / "a.mp4", FILM)
    cut_clip(folder / "plain copy.mp4", FILM, [["gamma_up", {"gamma": 0.9}]])
    for name, edit in (("pillars", "pillarbox"), ("letterbox", "letterbox")):
        bars = [edit, {"keep": 0.7, "colour": "black"}]
        cut_clip(folder / f"{name}.mp4", FILM, [["gamma_up", {"gamma": 0.9}], bars])
    matches = found(make_index(folder), clip)
    plain = matches["plain copy.mp4"].score
    for name in ("pillars.mp4", "letterbox.mp4"):
        assert matches[name].verdict == "certain" and matches[name].score > 0.75 * plain


def test_long_still_weighs_no_more_than_a_short_one(folder, make_index):
    """A slide of 40 s is not the evidence of 40 s."""
    (slide, *_), (other, *_) = film(250, 250.2), film(420, 420.2)
    noise = np.random.default_rng(0)
    for name, image, seconds in (("short", slide, 4), ("long", slide, 40), ("other", other, 40)):
        frames = [
            np.clip(image + noise.normal(0, 2, image.shape), 0, 255).astype(np.uint8)
            for _ in range(seconds)
        ]
        write_frames(folder / f"{name}.mp4", frames, rate=1)
    shutil.copy(folder / "short.mp4", folder / "again.mp4")
    with open(folder / "again.mp4", "ab") as file:
        file.write(b"\0")  # the same pictures, another content
    index = make_index(folder)
    assert found(index, folder / "short.mp4")["again.mp4"].verdict == "certain"
    match = found(index, folder / "short.mp4")["long.mp4"]
    assert match.verdict == "same place" and match.matched_seconds < 1.2
    assert "other.mp4" not in found(index, folder / "short.mp4")
    (group,) = index.duplicates()
    assert {os.path.basename(path) for path in group.paths} == {"again.mp4", "short.mp4"}


def test_compilation_and_excerpt_are_found_with_their_seconds(folder, make_index):
    """Ten clips of four seconds, joined; each finds its place, as do ten seconds of a long film."""
    starts = [40 + 40 * i for i in range(10)]
    for i, start in enumerate(starts):
        cut_clip(folder / f"clip{i}.mp4", [(start, start + 4)], [["mirror", {}]])
    joined = cut_clip(folder / "joined.mp4", [(start, start + 4) for start in starts])
    index = make_index(folder)
    matches = index.query(joined, top=20)
    by_name = {os.path.basename(match.path): match for match in matches}
    assert by_name.keys() == {"joined.mp4"} | {f"clip{i}.mp4" for i in range(10)}
    for i in range(10):
        (segment, *_) = by_name[f"clip{i}.mp4"].segments
        assert segment.query_start == pytest.approx(4 * i, abs=1)
        assert segment.query_end == pytest.approx(4 * i + 4, abs=1)
    (group,) = index.duplicates()
    assert len(group.files) == 1 and len(group.part_files) >= 8, "parts, not copies"


def test_intro_of_a_series_is_no_match(folder, make_index):
    """Twelve episodes that begin with the same five seconds, and one that is there twice."""
    for i in range(12):
        start = 60 + 36 * i
        cut_clip(folder / f"episode{i:02}.mp4", [(20, 25), (start, start + 12)])
    again = cut_clip(folder / "again.mp4", [(20, 25), (60, 72)], [["crop_centre", {"keep": 0.9}]])
    index = make_index(folder)
    assert set(found(index, again)) == {"episode00.mp4"}
    (group,) = index.duplicates()
    names = {os.path.basename(path) for path in group.paths}
    assert names == {"again.mp4", "episode00.mp4"} and not group.part_files


def test_skip_start_and_min_match_leave_out_a_shared_opening(folder, make_index):
    for name, start in (("a", 100), ("b", 300)):
        cut_clip(folder / f"{name}.mp4", [(20, 26), (start, start + 8)])
    index = make_index(folder)

    def names(**options):
        return {os.path.basename(match.path) for match in index.query(folder / "a.mp4", **options)}

    assert names() == names(min_match=4) == names(skip_start=2) == {"a.mp4", "b.mp4"}
    assert names(min_match=9) == names(skip_start=7) == {"a.mp4"}
    (group,) = index.duplicates()
    assert len(group.parts) == 1
    assert index.duplicates(skip_start=7) == index.duplicates(min_match=9) == []


def test_three_codecs_of_one_film_next_to_a_white_clip(folder, make_index):
    frames = [image[::2, ::2][:124, :228] for image in film(100, 108)]
    for codec, name in (("h264", "a.mp4"), ("mpeg4", "b.avi"), ("mpeg2video", "c.mkv")):
        write_frames(folder / name, frames, codec, rate=25 if codec == "mpeg2video" else 12)
    write_frames(folder / "white.mp4", [np.full((124, 228, 3), 255, np.uint8)] * 96)
    index = make_index(folder)
    matches = found(index, folder / "a.mp4")
    assert set(matches) == {"b.avi", "c.mkv"}
    assert {match.verdict for match in matches.values()} == {"certain"}
    (group,) = index.duplicates()
    assert {os.path.basename(path) for path in group.paths} == {"a.mp4", "b.avi", "c.mkv"}


@pytest.mark.skipif("TCA_VIDEOS" not in os.environ, reason="TCA_VIDEOS names no folder")
def test_signs_before_one_wall_are_never_certain(make_index):
    """Twenty clips of one place, of which no two share film."""
    signs = Path(os.environ["TCA_VIDEOS"], "intel", "asl")
    index = make_index(signs)
    for path in sorted(signs.glob("*.mkv")):
        verdicts = [match.verdict for match in found(index, path).values()]
        assert "certain" not in verdicts, path
    assert index.duplicates() == []


def test_plan_drops_no_film_that_is_in_no_kept_file(folder, make_index):
    """A copy is to drop; an episode, a film with another end, or with a scene changed, is not."""
    cut_clip(folder / "film.mp4", [(100, 130)])
    cut_clip(folder / "again.mp4", [(100, 130)], [["gamma_up", {"gamma": 0.95}]])
    cut_clip(folder / "other end.mp4", [(100, 127), (420, 423)])
    cut_clip(folder / "scene changed.mp4", [(100, 112), (300, 305), (117, 130)])
    index = make_index(folder)
    rows = make_plan(
        index.duplicates(), ["resolution", "oldest"], index.store.known_files(), index.is_same_film
    )
    actions = {os.path.basename(row.path): row.action for row in rows}
    dropped = {name for name, action in actions.items() if action == "drop"}
    assert dropped in ({"again.mp4"}, {"film.mp4"})
    assert actions.keys() >= {"film.mp4", "again.mp4", "other end.mp4"}, "all of one group"


def rolling_words(seed, seconds=20):
    """Credits: random words that roll by, white on black."""
    rng, height = np.random.default_rng(seed), 15 * seconds + 160
    page = Image.new("RGB", (256, height))
    for y in range(0, height, 14):
        word = "".join(rng.choice(list("abcdefghijklmnop"), rng.integers(8, 22)))
        ImageDraw.Draw(page).text((rng.integers(10, 90), y), word, "white")
    pixels = np.asarray(page)
    return [pixels[round(1.25 * i) : round(1.25 * i) + 144] for i in range(12 * seconds)]


def test_plan_drops_nothing_that_only_looks_alike(folder, make_index):
    """Other words that roll by; a film that goes on in black, or has a picture in its corner."""
    for name, seed in (("words", 1), ("other words", 2)):
        write_frames(folder / f"{name}.mp4", rolling_words(seed))
    frames = [image[:144, :256] for image in film(100, 112)]
    corner = [image.copy() for image in frames]
    for image, small in zip(corner, film(300, 312), strict=True):
        image[:54, :96] = small[::4, ::4][:54, :96].repeat(2, 0).repeat(2, 1)[:54, :96]
    write_frames(folder / "film.mp4", frames)
    write_frames(folder / "corner.mp4", corner)
    write_frames(folder / "goes on.mp4", frames + [np.zeros((144, 256, 3), np.uint8)] * 100)
    index = make_index(folder)
    plan = make_plan(
        index.duplicates(), ["resolution", "size"], index.store.known_files(), index.is_same_film
    )
    actions = {os.path.basename(row.path): row.action for row in plan}
    assert {"film.mp4", "corner.mp4", "goes on.mp4"} <= actions.keys()
    assert "drop" not in actions.values()


def test_index_without_videos_has_no_duplicates(folder, make_index):
    cut_clip(folder / "a.mp4", FILM)
    index = make_index(folder)
    index.remove([folder])
    assert index.duplicates() == []
