"""The demo benchmark: its labels, its plan, and what a rendered video shows."""

import json
import random
import time
from pathlib import Path

import av
import numpy as np
import pytest
from helpers.commands import ROOT, cli, one_error, refused, start
from helpers.systems import has_ended

import untrusted
from datasets.demo import edits, make_demo, plan

DEMO = ROOT / "datasets" / "demo"
FPS = edits.FPS
# An encoding that loses little.
BEST = {"codec": "h264", "height": 256, "rate": FPS, "bits": 0.5}


def make_clip(*spans, edits=(), encoding=BEST):
    """A clip of the test part; spans are (start, end) of film, or (start, end, edits)."""
    return plan.Clip(
        id="clip",
        part="test",
        role="copy",
        source="",
        grade=1,
        pieces=tuple(plan.Piece(*span) for span in spans),
        edits=tuple(edits),
        encoding=encoding,
    )


def grey(frames, size=(114, 64)):
    """Frames as (T, 64, 114) grey levels."""
    images = [frame.reformat(*size, format="gray").to_ndarray() for frame in frames]
    return np.stack(images).astype(np.float32)


def decode(path):
    """A video as grey levels, and its frame rate."""
    with av.open(str(path)) as container:
        rate = float(container.streams.video[0].average_rate)
        return grey(container.decode(video=0)), rate


def film_at(seconds):
    """The film's frame at a time, as grey levels."""
    start = plan.to_frame(seconds)
    return grey(edits.film_frames(edits.FILM, start, start + 1 / FPS))[0]


def correlation(a, b):
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1])


def film_frame_numbers(pieces):
    """The numbers of the film's frames that pieces, or shots, show."""
    numbers = set()
    for piece in pieces:
        numbers |= set(range(round(piece.start * FPS), round(piece.end * FPS)))
    return numbers


@pytest.fixture(scope="module")
def shots():
    return plan.read_shots()


@pytest.fixture(scope="module")
def clips(shots):
    return plan.plan(0, shots)


@pytest.fixture(scope="module")
def evaluated(clips):
    return [clip for clip in clips if clip.part == "test"]


# --- the film and its shot list -----------------------------------------------------------------


def test_demo_is_small_enough_for_git():
    assert sum(path.stat().st_size for path in DEMO.iterdir() if path.is_file()) <= 15 * 2**20


def test_shots_are_in_order_and_hold_no_black_frames(shots):
    for a, b in zip(shots, shots[1:], strict=False):
        assert a.end <= b.start + 1e-9
    shown = film_frame_numbers(shots)
    for first, last in [(0, 1), (299, 301), (460.5, 462.5), (488, 490)]:  # the film's fades
        for frame in edits.film_frames(edits.FILM, first, last):
            number = round(first * FPS) + frame.pts * FPS // edits.TICKS
            luma = frame.to_ndarray()[: edits.SIZE[1]]
            assert number not in shown or luma.mean() > 20, number / FPS


def test_sequences_are_runs_of_shots_within_one_part(shots):
    names = [shot.sequence for shot in shots]
    changes = sum(a != b for a, b in zip(names, names[1:], strict=False))
    assert len(set(names)) == 1 + changes, "a sequence comes back"
    in_parts = [name for part in plan.PARTS.values() for name in part]
    assert sorted(set(names)) == sorted(in_parts), "each is in one part"


# --- labels -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("query", "video", "expected"),
    [
        ([(250, 260)], [(250, 260)], "ND"),
        ([(250, 260)], [(254, 264)], "ND"),  # 6 s of 10 each
        ([(250, 260)], [(254.5, 264.5)], "DS"),
        ([(250, 260)], [(250, 260), (400, 410)], "DS"),  # all of the query, half of the video
        ([(250, 260)], [(258, 264)], "DS"),  # 2 s
        ([(250, 260)], [(258, 259), (400, 406), (250, 251)], "DS"),  # 2 s in two places
        # The same second twice is one second.
        ([(250, 260)], [(258, 259), (258, 259), (400, 406)], "IS"),
        ([(340, 346)], [(347, 351)], "CS"),  # the trap clearing in two shots
        ([(424.5, 426)], [(433.9, 435.5)], "CS"),  # the same set-up again, other shots between
        ([(244, 250)], [(263, 268)], "IS"),
        ([(244, 250)], [(405, 410)], None),
    ],
)
def test_label_follows_the_rule(shots, query, video, expected):
    def scenes_of(clip):
        return plan.shown_scenes(clip, shots)

    assert plan.label(make_clip(*query), make_clip(*video), scenes_of) == expected


def label_by_frames(query, video, place_of, sequence_of):
    """The rule again, frame by frame; the last two list a name for every frame of the film."""
    a, b = film_frame_numbers(query.pieces), film_frame_numbers(video.pieces)
    common = len(a & b)
    if 10 * common >= 6 * len(a) and 10 * common >= 6 * len(b):
        return "ND"
    if common >= 2 * FPS:
        return "DS"
    for name_of, kind in ((place_of, "CS"), (sequence_of, "IS")):
        one = [name_of[number] for number in a if name_of[number]]
        other = [name_of[number] for number in b if name_of[number]]
        for name in set(one):
            if one.count(name) >= FPS and other.count(name) >= FPS:
                return kind
    return None


def test_annotation_equals_a_count_by_frames(evaluated, shots):
    place_of, sequence_of = [None] * 6000, [None] * 6000
    for shot in shots:
        for number in film_frame_numbers([shot]):
            place_of[number], sequence_of[number] = shot.place, shot.sequence
    queries = [clip for clip in evaluated if clip.role == "query"][::6]
    others = [clip for clip in evaluated if clip.role != "query"]
    table = plan.annotation([*queries, *others], shots)
    for query in queries:
        kinds = {}
        for kind, names in table[query.id].items():
            kinds.update(dict.fromkeys(names, kind))
        assert len(kinds) == sum(map(len, table[query.id].values())), "an id in two lists"
        assert query.id not in kinds
        for video in others:
            expected = label_by_frames(query, video, place_of, sequence_of)
            assert kinds.get(video.id) == expected, (query.id, video.id)


# --- the plan -----------------------------------------------------------------------------------


def test_plan_parts_show_disjoint_film(clips):
    film = {}
    for part in plan.PARTS:
        pieces = [piece for clip in clips if clip.part == part for piece in clip.pieces]
        film[part] = film_frame_numbers(pieces)
    assert not film["train"] & film["val"]
    assert not film["val"] & film["test"]
    assert not film["train"] & film["test"]


def test_plan_size_and_mixture(clips, evaluated):
    assert sum(clip.role == "query" for clip in evaluated) >= 40 and len(evaluated) >= 440
    seconds = sum(clip.duration for clip in clips)
    assert seconds <= 11_000, "feature extraction would take too long"
    copies = [clip for clip in evaluated if clip.role == "copy"]
    assert sum(clip.grade >= 3 for clip in copies) >= 0.7 * len(copies)
    used = {name for clip in clips for name, _ in clip.edits}
    assert used == set(edits.EDITS), "an edit that is never used"
    assert {clip.encoding["codec"] for clip in evaluated} == set(edits.CODECS)
    assert len({clip.id for clip in clips}) == len(clips)


def test_plan_copies_and_excerpts_have_their_labels(evaluated, shots):
    table = plan.annotation(evaluated, shots)
    label_of = {"copy": "ND", "excerpt": "DS"}
    for clip in evaluated:
        if clip.source:
            assert clip.id in table[clip.source][label_of[clip.role]]


def test_plan_follows_from_the_seed(clips, shots):
    assert plan.plan(0, shots) == clips
    other = plan.plan(1, shots)
    assert [clip.pieces for clip in other] != [clip.pieces for clip in clips]
    assert [clip.edits for clip in other] != [clip.edits for clip in clips]


def test_plan_fingerprint_does_not_change_unnoticed(clips):
    """With another one, every demo that was built before is rendered again."""
    expected = "30e76635312dbb37dc884501f23a9e4a78128c3b42ddbea971ed798de6fdf7c2"
    assert make_demo.fingerprint(clips) == expected


def test_training_pairs_share_the_film_they_claim(clips):
    train = {clip.id: clip for clip in clips if clip.part == "train"}
    pairs = plan.training_pairs(list(train.values()))
    assert len(pairs) == 1500
    paired = {name for pair in pairs for name in pair["videos"]}
    assert len(paired) >= 0.95 * len(train), "drawn evenly over the videos"
    for pair in pairs[::25]:
        a, b = (film_frame_numbers(train[name].pieces) for name in pair["videos"])
        overlap = [len(a & b) / len(a), len(a & b) / len(b)]
        assert pair["overlap"] == pytest.approx(overlap, abs=1e-3) and min(overlap) >= 0.299


def test_draw_edits_gives_the_number_of_a_grade():
    rng = random.Random(0)
    for grade, ((fewest, most), _) in edits.GRADES.items():
        for _ in range(50):
            chosen = edits.draw_edits(rng, grade)
            assert fewest <= len(chosen) <= most + (grade == 4)
            families = [edits.EDITS[name].family for name, _ in chosen]
            assert len(families) - len(set(families)) <= (grade == 4)


def test_speed_factor():
    assert edits.speed_factor([["faster", {"factor": 1.5}], ["hue", {}]]) == 1.5


# --- rendering ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", edits.EDITS)
def test_edit_runs_on_odd_pictures_at_both_ends_of_its_range(name):
    before = [["crop", {"keep": 0.707, "x": 0.3, "y": 0.7}], ["stretch", {"factor": 0.613}]]
    after = [["letterbox", {"keep": 0.808, "colour": "white"}]]
    edit = edits.EDITS[name]
    for strength in (0.0, 1.0):
        parameters = {}
        for key, ends in edit.graded.items():
            parameters[key] = edits.interpolate(ends, strength)
        for key, values in edit.free.items():
            parameters[key] = values[-1] if isinstance(values, list) else values[0]
        clip = make_clip((250, 250.5), edits=[*before, [name, parameters], *after])
        frames = list(edits.clip_frames(clip, edits.FILM))
        assert len(frames) == 6 or name == "stutter"


@pytest.mark.parametrize("codec", edits.CODECS)
def test_codec_writes_the_promised_seconds(tmp_path, codec):
    rate = 25 if codec == "mpeg2" else 10
    clip = make_clip(
        (250, 252),
        (300.5, 302),
        edits=[["faster", {"factor": 1.4}]],
        encoding={**BEST, "codec": codec, "rate": rate},
    )
    edits.render(clip, edits.FILM, tmp_path / "video")
    frames, measured = decode(tmp_path / "video")
    assert measured == pytest.approx(rate, rel=0.01)
    assert len(frames) / rate == pytest.approx(3.5 / 1.4, abs=0.2)


@pytest.mark.parametrize("codec", ["h264", "vp8"])
def test_render_gives_the_same_pixels_again(tmp_path, clips, codec):
    clip = next(
        clip
        for clip in clips
        if clip.grade >= 3 and clip.encoding["codec"] == codec and clip.duration < 7
    )
    for name in "ab":
        edits.render(clip, edits.FILM, tmp_path / name)
    assert np.array_equal(decode(tmp_path / "a")[0], decode(tmp_path / "b")[0])


def test_render_mirrored_copy_unmirrored_is_the_film(tmp_path):
    clip = make_clip((268, 270), edits=[["mirror", {}]])
    edits.render(clip, edits.FILM, tmp_path / "video")
    frames, _ = decode(tmp_path / "video")
    film = grey(edits.film_frames(edits.FILM, 268, 270))
    assert len(frames) == len(film) == 24
    for frame, original in zip(frames, film, strict=True):
        assert correlation(frame[:, ::-1], original) > 0.99
        assert correlation(frame, original) < 0.9


def test_ground_truth_says_where_the_film_is(tmp_path):
    noise = (["noise", {"amount": 10}],)
    slower = [["slower", {"factor": 0.8}]]
    clip = make_clip((406, 408), (287, 290, noise), (470, 471), edits=slower)
    edits.render(clip, edits.FILM, tmp_path / "video")
    frames, rate = decode(tmp_path / "video")
    segments = plan.ground_truth(clip)["segments"]
    assert segments[-1]["video"][1] == pytest.approx(clip.duration) == pytest.approx(7.5)
    for segment in segments:
        (film_start, film_end), (start, end) = segment["film"], segment["video"]
        for share in (0.1, 0.5, 0.9):
            shown = frames[int((start + share * (end - start)) * rate)]
            expected = film_at(film_start + share * (film_end - film_start))
            assert correlation(shown, expected) > 0.95


# --- builds -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_workers_end_with_a_build_that_is_killed(tmp_path):
    build = start("datasets/demo/make_demo.py", "build", "--output", tmp_path / "demo")
    workers = []
    while len(workers) < 2:
        assert build.poll() is None, build.communicate()
        text = Path(f"/proc/{build.pid}/task/{build.pid}/children").read_text()
        workers = [int(pid) for pid in text.split()]
        time.sleep(0.05)
    time.sleep(0.5)  # they have begun
    build.kill()
    build.wait()
    assert all(has_ended(pid, 1) for pid in workers)
    build.communicate()


@pytest.mark.slow
def test_build_is_complete_resumes_and_replaces_another(tmp_path, capsys):
    made = make_demo.build(tmp_path, seed=0, workers=2, limit=3)
    assert len(made) == 9
    for clip in made:
        frames, rate = decode(tmp_path / clip.file)
        assert len(frames) / rate == pytest.approx(clip.duration, abs=0.35), clip.id
    annotations = tmp_path / "annotations"
    training = untrusted.load_pickle(annotations / "demo_train.pickle")
    assert sorted(training) == ["index", "negs", "segments", "video_pairs"]
    assert len(training["index"]) == 3
    copies = ["test_q00_copy0", "test_q00_copy1"]
    table = json.loads((annotations / "demo.json").read_text())
    assert table == {"test_q00": {"ND": copies, "DS": [], "CS": [], "IS": []}}
    ids = (annotations / "demo_ids.txt").read_text().split()
    assert ids == [clip.id for clip in made if clip.part == "test"]
    assert all((annotations / name).exists() for name in make_demo.ANNOTATIONS)

    # What is missing is made again, and nothing else.
    files = [tmp_path / clip.file for clip in made]
    before = [path.stat().st_mtime_ns for path in files]
    files[0].unlink()
    make_demo.build(tmp_path, seed=0, limit=3)
    after = [path.stat().st_mtime_ns for path in files]
    assert [a == b for a, b in zip(after, before, strict=True)] == [False] + [True] * 8
    make_demo.build(tmp_path, seed=0, limit=3)
    assert "already" in capsys.readouterr().out

    other = make_demo.build(tmp_path, seed=1, limit=1)
    left = [str(path.relative_to(tmp_path)) for path in (tmp_path / "videos").rglob("*.*")]
    assert sorted(left) == sorted(clip.file for clip in other)


def test_build_bad_input_is_one_line_and_touches_nothing(tmp_path):
    def build(folder):
        return refused(make_demo.main, "build", "--output", folder, "--limit", 1)

    (tmp_path / "file").write_text("x")
    assert "is a file" in build(tmp_path / "file")
    for text in ("{", "[]", '{"files": ["../precious"]}', '{"files": ["precious"]}'):
        (tmp_path / "build.json").write_text(text)
        assert "is not a build's record" in build(tmp_path)
    film = ("film", tmp_path / "file", "--output", tmp_path / "film.mp4")
    assert "cannot be re-encoded" in refused(make_demo.main, *film)
    for option in ("--workers", "--limit"):
        arguments = ("build", "--output", tmp_path / "new", option, 0)
        assert "count from 1" in refused(make_demo.main, *arguments)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["build.json", "file"]


def test_make_demo_process_reports_bad_input_in_one_line(tmp_path):
    (tmp_path / "file").write_text("x")
    result = cli("datasets/demo/make_demo.py", "build", "--output", tmp_path / "file")
    assert "is a file" in one_error(result)


def test_bit_rate_is_rounded_as_in_the_first_build_of_the_demo():
    """.286 * 300 * 170 * 25 = 364650 from left to right; the whole numbers first give 364649."""
    encoding = {"bits": 0.286, "rate": 25}
    assert edits.bit_rate(encoding, 300, 170) == 364650
    assert edits.bit_rate(encoding, 302, 170) == 367081
