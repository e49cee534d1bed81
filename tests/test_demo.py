"""The demo benchmark: what the labels say, what the plan promises, what a rendered video shows."""

import json
import random

import av
import numpy as np
import pytest
from helpers.commands import ROOT

DEMO = ROOT / "datasets" / "demo"

import utils
from datasets.demo import edits, make_demo, plan

FPS = edits.FPS
BEST = {"codec": "h264", "height": 256, "rate": FPS, "bits": 0.5}  # an encoding that hides nothing


def clip(*spans, edits=(), part="test", encoding=BEST, name="clip"):
    return plan.Clip(
        name,
        part,
        "copy",
        "",
        1,
        tuple(plan.Piece(*span) for span in spans),
        tuple(edits),
        encoding,
    )


def pictures(frames, size=(114, 64)):
    """Frames as (T, 64, 114) grey levels."""
    return np.stack(
        [frame.reformat(*size, format="gray").to_ndarray().astype(np.float32) for frame in frames]
    )


def decoded(path):
    with av.open(str(path)) as container:
        rate = float(container.streams.video[0].average_rate)
        return pictures(container.decode(video=0)), rate


def film_at(seconds):
    start = plan.to_frame(seconds)
    return pictures(edits.film_frames(make_demo.FILM, start, start + 1 / FPS))[0]


def correlation(a, b):
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1])


@pytest.fixture(scope="module")
def shots():
    return plan.read_shots()


@pytest.fixture(scope="module")
def clips(shots):
    return plan.plan(0, shots)


# --- the film and its shot list --------------------------------------------------------------------------------------


def test_the_demo_stays_small_enough_for_git():
    assert sum(path.stat().st_size for path in DEMO.iterdir() if path.is_file()) <= 15 * 2**20


def test_shots_are_in_order_on_the_frame_grid_and_hold_no_black_frames(shots):
    assert all(a.end <= b.start + 1e-9 for a, b in zip(shots, shots[1:], strict=False))
    inside = {n for shot in shots for n in range(round(shot.start * FPS), round(shot.end * FPS))}
    for first, last in [(0, 1), (299, 301), (460.5, 462.5), (488, 490)]:  # the film's fades
        for frame in edits.film_frames(make_demo.FILM, first, last):
            number = round(first * FPS) + frame.pts * FPS // edits.TICKS
            assert number not in inside or frame.to_ndarray()[: edits.SIZE[1]].mean() > 20, (
                number / FPS
            )


def test_a_sequence_is_one_run_of_shots_within_one_part(shots):
    sequences = [shot.sequence for shot in shots]
    changes = sum(a != b for a, b in zip(sequences, sequences[1:], strict=False))
    assert len(set(sequences)) == 1 + changes, "a sequence comes back"
    assert sorted(set(sequences)) == sorted(
        name for part in plan.PARTS.values() for name in part
    ), "each in one part"


# --- labels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("query", "video", "expected"),
    [
        ([(250, 260)], [(250, 260)], "ND"),
        ([(250, 260)], [(254, 264)], "ND"),  # 6 s of 10 each
        ([(250, 260)], [(254.5, 264.5)], "DS"),
        ([(250, 260)], [(250, 260), (400, 410)], "DS"),  # all of the query, half of the video
        ([(250, 260)], [(258, 264)], "DS"),  # 2 s
        ([(250, 260)], [(258, 259), (400, 406), (250, 251)], "DS"),  # 2 s in two places
        (
            [(250, 260)],
            [(258, 259), (258, 259), (400, 406)],
            "IS",
        ),  # the same second twice is one second
        ([(340, 346)], [(347, 351)], "CS"),  # the trap clearing in two shots
        ([(424.5, 426)], [(433.9, 435.5)], "CS"),  # the same set-up again, other shots between
        ([(244, 250)], [(263, 268)], "IS"),
        ([(244, 250)], [(405, 410)], None),
    ],
)
def test_label_follows_the_stated_rule(shots, query, video, expected):
    assert plan.label(clip(*query), clip(*video), lambda side: plan.scenes(side, shots)) == expected


def brute_force(query, video, place, sequence):
    """The rule again, frame by frame: place and sequence are lists over the frames of the film."""
    a, b = (
        {n for p in c.pieces for n in range(round(p.start * FPS), round(p.end * FPS))}
        for c in (query, video)
    )
    common = len(a & b)
    if 10 * common >= 6 * len(a) and 10 * common >= 6 * len(b):
        return "ND"
    if common >= 2 * FPS:
        return "DS"
    for names, kind in ((place, "CS"), (sequence, "IS")):
        one, other = ([names[n] for n in side if names[n]] for side in (a, b))
        if any(one.count(name) >= FPS and other.count(name) >= FPS for name in set(one)):
            return kind
    return None


def test_annotation_equals_a_count_frame_by_frame(clips, shots):
    place, sequence = [None] * 6000, [None] * 6000
    for shot in shots:
        for n in range(round(shot.start * FPS), round(shot.end * FPS)):
            place[n], sequence[n] = shot.place, shot.sequence
    test = [c for c in clips if c.part == "test"]
    chosen = [c for c in test if c.role == "query"][::6]
    table = plan.annotation([*chosen, *(c for c in test if c.role != "query")], shots)
    for query in chosen:
        kinds = {name: kind for kind, names in table[query.id].items() for name in names}
        assert len(kinds) == sum(map(len, table[query.id].values())), "an id in two lists"
        assert query.id not in kinds
        for video in test:
            if video.role != "query":
                assert kinds.get(video.id) == brute_force(query, video, place, sequence), (
                    query.id,
                    video.id,
                )


# --- the plan --------------------------------------------------------------------------------------------------------


def test_the_parts_show_disjoint_film(clips):
    frames = {part: set() for part in plan.PARTS}
    for c in clips:
        for piece in c.pieces:
            frames[c.part] |= set(range(round(piece.start * FPS), round(piece.end * FPS)))
    assert (
        not frames["train"] & frames["val"]
        and not frames["val"] & frames["test"]
        and not frames["train"] & frames["test"]
    )


def test_the_plan_keeps_its_size_and_its_mixture(clips):
    test = [c for c in clips if c.part == "test"]
    assert sum(c.role == "query" for c in test) >= 40 and len(test) >= 440
    assert sum(c.duration for c in clips) <= 11_000, "feature extraction would take too long"
    copies = [c for c in test if c.role == "copy"]
    assert sum(c.grade >= 3 for c in copies) >= 0.7 * len(copies)
    assert {name for c in clips for name, _ in c.edits} == set(edits.EDITS), (
        "an edit that is never used"
    )
    assert {c.encoding["codec"] for c in test} == set(edits.CODECS)
    assert len({c.id for c in clips}) == len(clips)


def test_each_query_finds_what_was_made_for_it(clips, shots):
    test = [c for c in clips if c.part == "test"]
    table = plan.annotation(test, shots)
    for c in test:
        if c.source:
            assert c.id in table[c.source][{"copy": "ND", "excerpt": "DS"}[c.role]]


def test_a_seed_is_a_plan(clips, shots):
    assert plan.plan(0, shots) == clips
    other = plan.plan(1, shots)
    assert [c.pieces for c in other] != [c.pieces for c in clips] and [c.edits for c in other] != [
        c.edits for c in clips
    ]


def test_training_pairs_share_the_film_they_claim(clips):
    train = {c.id: c for c in clips if c.part == "train"}
    pairs = plan.training_pairs(list(train.values()))
    assert len(pairs) == 1500
    assert len({name for pair in pairs for name in pair["videos"]}) >= 0.95 * len(train), (
        "drawn evenly over the videos"
    )
    for pair in pairs[::25]:
        sets = [
            {n for p in train[v].pieces for n in range(round(p.start * FPS), round(p.end * FPS))}
            for v in pair["videos"]
        ]
        shares = [len(sets[0] & sets[1]) / len(side) for side in sets]
        assert pair["overlap"] == pytest.approx(shares, abs=1e-3) and min(shares) >= 0.299


# --- rendering -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", edits.EDITS)
def test_every_edit_runs_on_odd_pictures_at_both_ends_of_its_range(name):
    before = [["crop", {"keep": 0.707, "x": 0.3, "y": 0.7}], ["stretch", {"factor": 0.613}]]
    for strength in (0.0, 1.0):
        parameters = {
            key: edits.between(span, strength) for key, span in edits.EDITS[name].grows.items()
        }
        for key, span in edits.EDITS[name].free.items():
            parameters[key] = span[-1] if isinstance(span, list) else span[0]
        after = [["letterbox", {"keep": 0.808, "colour": "white"}]]
        frames = list(
            edits.clip_frames(
                clip((250, 250.5), edits=[*before, [name, parameters], *after]), make_demo.FILM
            )
        )
        assert len(frames) == 6 or name == "stutter"


@pytest.mark.parametrize("codec", edits.CODECS)
def test_every_codec_writes_the_promised_seconds(tmp_path, codec):
    rate = 25 if codec == "mpeg2" else 10
    made = clip(
        (250, 252),
        (300.5, 302),
        edits=[["faster", {"factor": 1.4}]],
        encoding={**BEST, "codec": codec, "rate": rate},
    )
    edits.render(made, make_demo.FILM, tmp_path / "video")
    frames, measured = decoded(tmp_path / "video")
    assert measured == pytest.approx(rate, rel=0.01)
    assert len(frames) / rate == pytest.approx(3.5 / 1.4, abs=0.2)


@pytest.mark.parametrize("codec", ["h264", "vp8"])
def test_the_same_clip_gives_the_same_pixels_again(tmp_path, clips, codec):
    chosen = next(
        c for c in clips if c.grade >= 3 and c.encoding["codec"] == codec and c.duration < 7
    )
    for name in "ab":
        edits.render(chosen, make_demo.FILM, tmp_path / name)
    assert np.array_equal(decoded(tmp_path / "a")[0], decoded(tmp_path / "b")[0])


def test_a_mirrored_copy_unmirrored_is_the_film(tmp_path):
    edits.render(clip((268, 270), edits=[["mirror", {}]]), make_demo.FILM, tmp_path / "video")
    frames, _ = decoded(tmp_path / "video")
    film = pictures(edits.film_frames(make_demo.FILM, 268, 270))
    assert len(frames) == len(film) == 24
    for frame, original in zip(frames, film, strict=True):
        assert correlation(frame[:, ::-1], original) > 0.99 > 0.9 > correlation(frame, original)


def test_segments_tell_where_the_film_is_in_the_video(tmp_path):
    noise = (["noise", {"amount": 10}],)
    made = clip((406, 408), (287, 290, noise), (470, 471), edits=[["slower", {"factor": 0.8}]])
    edits.render(made, make_demo.FILM, tmp_path / "video")
    frames, rate = decoded(tmp_path / "video")
    spans = plan.segments(made)["segments"]
    assert spans[-1]["video"][1] == pytest.approx(made.duration) == pytest.approx(7.5)
    for span in spans:
        (low, high), (start, end) = span["film"], span["video"]
        for share in (0.1, 0.5, 0.9):
            shown = frames[int((start + share * (end - start)) * rate)]
            assert correlation(shown, film_at(low + share * (high - low))) > 0.95


def test_a_small_build_is_complete_resumes_and_gives_way_to_another(tmp_path, capsys):
    made = make_demo.build(tmp_path, seed=0, workers=2, limit=3)
    assert len(made) == 9
    for c in made:
        frames, rate = decoded(tmp_path / c.file)
        assert len(frames) / rate == pytest.approx(c.duration, abs=0.35), c.id
    training = utils.load_pickle(tmp_path / "annotations" / "demo_train.pickle")
    assert (
        sorted(training) == ["index", "negs", "segments", "video_pairs"]
        and len(training["index"]) == 3
    )
    table = json.loads((tmp_path / "annotations" / "demo.json").read_text())
    assert table == {
        "test_q00": {"ND": ["test_q00_copy0", "test_q00_copy1"], "DS": [], "CS": [], "IS": []}
    }
    assert (tmp_path / "annotations" / "demo_ids.txt").read_text().split() == [
        c.id for c in made if c.part == "test"
    ]

    assert all((tmp_path / "annotations" / name).exists() for name in make_demo.ANNOTATIONS)
    files = [tmp_path / c.file for c in made]
    before = [path.stat().st_mtime_ns for path in files]
    files[0].unlink()
    make_demo.build(tmp_path, seed=0, limit=3)
    assert [path.stat().st_mtime_ns == time for path, time in zip(files, before, strict=True)] == [
        False
    ] + [True] * 8
    make_demo.build(tmp_path, seed=0, limit=3)
    assert "already" in capsys.readouterr().out

    other = make_demo.build(tmp_path, seed=1, limit=1)
    left = sorted(str(path.relative_to(tmp_path)) for path in (tmp_path / "videos").rglob("*.*"))
    assert left == sorted(c.file for c in other)


def test_bad_input_is_one_line(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(utils.InputError, match="is a file"):
        make_demo.build(tmp_path / "file", limit=1)
    for text in ("{", "[]", '{"files": ["../precious"]}', '{"files": ["precious"]}'):
        (tmp_path / "build.json").write_text(text)
        with pytest.raises(utils.InputError, match="record"):
            make_demo.build(tmp_path, limit=1)
    with pytest.raises(utils.InputError, match="re-encoded"):
        make_demo.make_film(tmp_path / "file", tmp_path / "film.mp4")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["build.json", "file"]


def test_draw_gives_the_number_of_edits_of_a_grade():
    rng = random.Random(0)
    for grade, ((least, most), _) in edits.GRADES.items():
        drawn = [edits.draw(rng, grade) for _ in range(50)]
        assert all(least <= len(chosen) <= most + (grade == 4) for chosen in drawn)
        for chosen in drawn:
            families = [edits.EDITS[name].family for name, _ in chosen]
            assert len(families) - len(set(families)) <= (grade == 4)
    assert edits.speed([["faster", {"factor": 1.5}], ["hue", {}]]) == 1.5
