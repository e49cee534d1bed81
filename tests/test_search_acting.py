"""search.py: against, reject, choices, plans, formats, pictures, several indexes."""

import csv
import io
import json
import os
import shutil

import av
import pytest
from helpers.commands import refused
from helpers.library import cut_clip, run_search

import search
from utils import InputError
from videoindex.choices import read_choices
from videoindex.index import VideoIndex
from videoindex.store import IndexStore


@pytest.fixture
def index(library, tmp_path):
    """The folder of an index that a test may change."""
    return shutil.copytree(library.index, tmp_path / "index")


def rows_of(result):
    return list(csv.DictReader(io.StringIO(result.stdout)))


def matched(result):
    """The paths of the matches of the first clip in JSON."""
    return [match["path"] for match in json.loads(result.stdout)[0]["matches"]]


def grouped(index):
    """The paths of every group."""
    groups = json.loads(run_search("duplicates", "--index", index, "--json").stdout)
    return [{path for video in group["videos"] for path in video["paths"]} for group in groups]


# --- formats ------------------------------------------------------------------------------------


def test_json_has_the_facts_of_every_file(library, index):
    query = ("query", library.path("a.mp4"), "--index", index, "--format", "json")
    (answer,) = json.loads(run_search(*query).stdout)
    for match in answer["matches"]:
        (file,) = match["files"]
        assert file["path"] == match["path"] and file["size"] == os.path.getsize(match["path"])
        assert file["codec"] == "h264" and file["height"] == 160 and file["bit_rate"] > 1000
        assert file["modified"].endswith("Z") and file["seconds"] == pytest.approx(8, abs=0.2)
    (group, *_) = json.loads(run_search("duplicates", "--index", index, "--json").stdout)
    assert all(file["height"] == 160 for video in group["videos"] for file in video["files"])


def test_csv_has_a_row_for_each_file(library, index):
    clip = library.path("a.mp4")
    query = ("query", clip, "--index", index, "--format", "csv")
    result = run_search(*query)
    paths = matched(run_search(*query[:-1], "json"))
    rows = rows_of(result)
    assert [row["path"] for row in rows] == paths
    assert rows[0]["clip"] == clip and rows[0]["verdict"] == "certain"
    assert {row["height"] for row in rows} == {"160"} and rows[0]["missing"] == "no"
    assert float(rows[0]["query_end"]) == pytest.approx(8, abs=0.1)

    rows = rows_of(run_search("duplicates", "--index", index, "--format", "csv"))
    groups = {}
    assert [row["path"] for row in rows if row["part"] == "yes"] == [library.path("c.mp4")]
    for row in rows:
        if row["part"] == "yes":
            continue
        groups.setdefault(row["group"], set()).add(row["path"])
        assert row["linked_to"] and row["codec"] == "h264"
    assert list(groups.values()) == grouped(index)

    facts = {
        row["name"]: row["value"]
        for row in rows_of(run_search("info", "--index", index, "--format", "csv"))
    }
    assert facts["videos"] == "10"


# --- against ------------------------------------------------------------------------------------


@pytest.fixture
def downloads(library, tmp_path):
    """A byte copy of b.mp4, an excerpt of c.mp4, one with more, a new video, and a broken one."""
    folder = tmp_path / "downloads"
    cut_clip(folder / "excerpt.mp4", [(301, 306)], [["mirror", {}]])
    cut_clip(folder / "longer.mp4", [(301, 307), (420, 430)])
    cut_clip(folder / "new.mp4", [(400, 406)])
    shutil.copy(library.path("b.mp4"), folder / "copy of b.mp4")
    (folder / "broken.mp4").write_bytes(b"no video" * 100)
    return folder


def test_against_says_which_files_are_known(library, index, downloads):
    before = IndexStore(index).known_files()
    result = run_search("against", downloads, "--index", index)
    assert result.returncode == 3 and "broken.mp4" in result.stderr
    lines = result.stdout.splitlines()
    known = [line for line in lines if line.startswith("known  ")]
    assert len(known) == 2 and "copy of b.mp4" in known[0] and "same content" in known[0]
    assert "excerpt.mp4" in known[1] and "same content" not in known[1]
    assert library.path("b.mp4") in lines[1] and "c" in lines[3]
    (longer,) = [line for line in lines if line.startswith("part   ")]
    assert "longer.mp4" in longer, "six seconds of it are in c.mp4, ten are new"
    assert [line for line in lines if line.startswith("new  ")][0].count("new.mp4") == 1
    assert lines[-1] == "2 known, 1 known in part, 0 to look at, 1 new"
    assert IndexStore(index).known_files() == before, "nothing is added"

    videos = json.loads(run_search("against", downloads, "--index", index, "--json").stdout)
    by_name = {os.path.basename(video["path"]): video for video in videos}
    assert by_name["copy of b.mp4"]["same_content"] and by_name["broken.mp4"]["error"]
    assert by_name["new.mp4"]["state"] == "new" and by_name["excerpt.mp4"]["state"] == "known"
    assert by_name["longer.mp4"]["shares"] == [pytest.approx(6 / 16, abs=0.07)]
    source = os.path.basename(by_name["excerpt.mp4"]["matches"][0]["path"])
    assert source in ("c.mp4", "c inside.mp4")
    assert by_name["new.mp4"]["file"]["size"] == os.path.getsize(downloads / "new.mp4")

    rows = rows_of(run_search("against", downloads, "--index", index, "--format", "csv"))
    assert {os.path.basename(row["path"]): row["state"] for row in rows} == {
        "copy of b.mp4": "known",
        "excerpt.mp4": "known",
        "longer.mp4": "part",
        "new.mp4": "new",
    }


# --- notes --------------------------------------------------------------------------------------


def test_missing_files_are_counted(library, index, tmp_path):
    copy = tmp_path / "copy.mp4"
    shutil.copy(library.path("a.mp4"), copy)
    command = ("index", copy, "--index", index, "--workers", 1, "--device", "cpu")
    assert "not there now" not in run_search(*command).stderr
    copy.unlink()
    note = "note: of the index's files, 1 are not there now"
    assert note in run_search("duplicates", "--index", index).stderr
    assert note in run_search("index", library.videos, *command[2:]).stderr


@pytest.mark.parametrize("inside", [True, False])
def test_script_that_moves_among_the_videos_is_noted(library, index, tmp_path, inside):
    into = os.path.join(library.videos, "dropped") if inside else tmp_path / "dropped"
    plan = ("--plan", tmp_path / "plan.csv", "--script", tmp_path / "moves.sh", "--into", into)
    result = run_search("duplicates", "--index", index, *plan)
    assert ("lies among the videos" in result.stderr) == inside and not os.path.exists(into)


def test_no_page_is_written_for_clips_that_cannot_be_read(index, tmp_path):
    (tmp_path / "broken.mp4").write_bytes(b"no video" * 100)
    page = tmp_path / "page.html"
    result = run_search("query", tmp_path / "broken.mp4", "--index", index, "--report", page)
    assert result.returncode == 3 and "is not written" in result.stderr and not page.exists()


# --- rejected pairs -----------------------------------------------------------------------------


def test_rejected_pair_is_not_shown_until_it_is_undone(library, index, tmp_path):
    a, b = library.path("b.mp4"), library.path("b faster.mp4")
    query = ("query", a, "--index", index, "--json")
    assert matched(run_search(*query))[:2] == [a, b] and {a, b} in grouped(index)
    assert run_search("reject", a, b, "--index", index).stdout.endswith("1 rejected, 1 in all\n")
    assert run_search("reject", b, a, "--index", index).stdout.endswith("0 rejected, 1 in all\n")
    assert matched(run_search(*query))[0] == a and b not in matched(run_search(*query))
    assert a not in matched(run_search("query", b, *query[2:]))
    assert not any({a, b} & group for group in grouped(index))
    listed = run_search("reject", "--list", "--index", index)
    assert {a, b} == set(listed.stdout.strip().split(" ~ "))

    copy = tmp_path / "copy.mp4"  # the content counts, not the name
    shutil.copy(a, copy)
    assert b not in matched(run_search("query", copy, *query[2:]))

    assert run_search("reject", "--undo", a, b, "--index", index).returncode == 0
    assert matched(run_search(*query))[:2] == [a, b] and {a, b} in grouped(index)
    assert run_search("reject", "--list", "--index", index).stdout == ""
    assert "was not rejected" in refused(search.main, "reject", "--undo", a, b, "--index", index)


def test_rejected_pair_outlives_a_move(library, index, tmp_path):
    moved = tmp_path / "mine.mp4"
    shutil.copy(library.path("b faster.mp4"), moved)
    opened = VideoIndex(index, pipeline=library.pipeline)
    opened.remove([library.path("b faster.mp4")])
    opened.add([moved])
    a = library.path("b.mp4")
    run_search("reject", a, moved, "--index", index)
    os.rename(moved, tmp_path / "elsewhere.mp4")
    assert opened.add([tmp_path / "elsewhere.mp4"]).moved == 1
    assert str(tmp_path / "elsewhere.mp4") not in matched(
        run_search("query", a, "--index", index, "--json")
    )


def test_reject_refuses_what_it_cannot_remember(library, index, tmp_path):
    a = library.path("a.mp4")
    copy = tmp_path / "copy.mp4"
    shutil.copy(a, copy)
    reject = ("reject", "--index", index)
    assert "byte for byte" in refused(search.main, *reject, a, copy)
    assert "neither in the index nor a file" in refused(search.main, *reject, a, "/nowhere.mp4")
    assert "two files" in refused(search.main, *reject, a)
    assert "two files" in refused(search.main, *reject, "--list", a)


# --- choices and plans --------------------------------------------------------------------------


def test_choices_are_carried_out(library, index, tmp_path):
    a, b, c = (library.path(name) for name in ("b.mp4", "b faster.mp4", "c.mp4"))
    file = tmp_path / "choices.json"
    file.write_text(json.dumps({"keep": [c], "drop": [a, "/etc/passwd"], "not_a_match": [[a, b]]}))
    plan, script = tmp_path / "plan.csv", tmp_path / "moves.sh"
    result = run_search(
        *("choices", file, "--index", index, "--plan", plan),
        *("--script", script, "--into", tmp_path / "dropped"),
    )
    assert result.returncode == 3 and "not in the index: /etc/passwd" in result.stderr
    assert result.stdout.endswith("1 pairs rejected, 1 in all\n")
    with open(plan, newline="") as rows:
        actions = {row["path"]: row["action"] for row in csv.DictReader(rows)}
    assert actions == {c: "keep", a: "drop", "/etc/passwd": "look"}
    assert "/etc/passwd" not in script.read_text() and a in script.read_text()
    assert not any({a, b} <= group for group in grouped(index))


def test_choices_leave_a_file_of_each_content(library, index, tmp_path):
    """Three files of one content, all chosen to drop; the only file of another is moved."""
    a, copies = library.path("a.mp4"), [tmp_path / f"copy {i}.mp4" for i in range(2)]
    for path in copies:
        shutil.copy(a, path)
    run_search("index", *copies, "--index", index, "--workers", 1, "--device", "cpu")
    chosen = {"drop": [a, *map(str, copies), library.path("b.mp4")]}
    (tmp_path / "choices.json").write_text(json.dumps(chosen))
    plan = tmp_path / "plan.csv"
    result = run_search("choices", tmp_path / "choices.json", "--index", index, "--plan", plan)
    assert result.returncode == 0
    with open(plan, newline="") as rows:
        actions = {row["path"]: row["action"] for row in csv.DictReader(rows)}
    assert sorted(actions[path] for path in (a, *map(str, copies))) == ["drop", "drop", "look"]
    assert actions[library.path("b.mp4")] == "drop"


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "is not JSON"),
        ("[]", "must be an object with the lists"),
        ('{"keep": "/a"}', "must be an object with the lists"),
        ('{"remove": ["/a"]}', "must be an object with the lists"),
        ('{"keep": ["a.mp4"]}', "absolute paths"),
        ('{"drop": [1]}', "absolute paths"),
        ('{"drop": ["/a\\u0000"]}', "absolute paths"),
        ('{"drop": ["/a\\ud800"]}', "absolute paths"),
        ('{"not_a_match": [["/a"]]}', "pairs of absolute paths"),
        ('{"not_a_match": [["/a", "/b", "/c"]]}', "pairs of absolute paths"),
        ('{"not_a_match": ["ab"]}', "pairs of absolute paths"),
        ('{"keep": ["/a"], "drop": ["/a"]}', "'/a' is both to keep and to drop"),
    ],
)
def test_choices_of_other_form_are_refused(tmp_path, text, message):
    (tmp_path / "choices.json").write_text(text)
    with pytest.raises(InputError, match=message):
        read_choices(tmp_path / "choices.json")


def test_duplicates_writes_a_plan_and_touches_nothing(library, index, tmp_path):
    plan, script = tmp_path / "plan.csv", tmp_path / "moves.sh"
    before = sorted(os.listdir(library.videos))
    result = run_search(
        *("duplicates", "--index", index, "--plan", plan, "--keep", "longest", "resolution"),
        *("--script", script, "--into", tmp_path / "dropped"),
    )
    assert result.returncode == 0 and "to keep" in result.stderr, result.stderr
    with open(plan, newline="") as rows:
        actions = {row["path"]: row for row in csv.DictReader(rows)}
    assert set(actions) == set().union(*grouped(index))
    assert actions[library.path("b.mp4")]["action"] == "keep"
    assert actions[library.path("c inside.mp4")]["action"] == "keep"
    assert sorted(os.listdir(library.videos)) == before and not (tmp_path / "dropped").exists()


def test_plan_options_that_belong_together(library):
    duplicates = ("duplicates", "--index", library.index)
    assert "--keep belongs to a plan" in refused(search.main, *duplicates, "--keep", "size")
    assert "--script belongs to a plan" in refused(
        search.main, *duplicates, "--script", "x.sh", "--into", "x"
    )
    plan = (*duplicates, "--plan", "x.csv")
    assert "--script FILE.sh and --into" in refused(search.main, *plan, "--script", "x.sh")
    assert "'best' is no rule" in refused(search.main, *plan, "--keep", "best")


# --- pictures -----------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_picture_as_query(library, tmp_path, suffix):
    """A frame of c.mp4 is found where it was."""
    with av.open(library.path("c.mp4")) as container:
        frames = list(container.decode(video=0))
    picture = tmp_path / f"frame.{suffix}"
    frames[len(frames) // 2].to_image().save(picture, quality=90)
    query = ("query", picture, "--index", library.index, "--threshold", "0.1", "--json")
    (answer,) = json.loads(run_search(*query).stdout)
    names = [os.path.basename(match["path"]) for match in answer["matches"]]
    assert names[0] in ("c.mp4", "c inside.mp4"), answer


# --- several indexes ----------------------------------------------------------------------------


@pytest.fixture
def halves(library, tmp_path):
    """The library's index in two: without the files of b, and with these alone."""
    folders = [shutil.copytree(library.index, tmp_path / name) for name in ("one", "two")]
    b = [library.path("b.mp4"), library.path("b faster.mp4")]
    one, two = (VideoIndex(folder, pipeline=library.pipeline) for folder in folders)
    one.remove(b)
    two.remove(set(two.store.known_files()) - set(b))
    return folders


def test_several_indexes_answer_as_one(library, index, halves):
    for name in ("a.mp4", "b.mp4"):
        clip = library.path(name)
        whole = ("query", clip, "--threshold", 0, "--top", 20, "--json", "--index")
        expected = json.loads(run_search(*whole, index).stdout)
        found = json.loads(run_search(*whole, *halves).stdout)
        assert [match["path"] for match in found[0]["matches"]] == [
            match["path"] for match in expected[0]["matches"]
        ]
        # The clip may follow the indexes, too.
        result = run_search("query", "--json", "--index", *halves, clip)
        assert json.loads(result.stdout)[0]["clip"] == clip
    # A file that two indexes hold is shown once.
    paths = matched(run_search(*whole, index, *halves))
    assert len(paths) == len(set(paths)) == len(expected[0]["matches"]) > 3


def test_match_that_one_of_several_indexes_rejects_is_not_shown(library, index, halves):
    """Though another one holds it, too."""
    clip, copy = library.path("b.mp4"), library.path("b faster.mp4")
    assert copy in matched(run_search("query", clip, "--json", "--index", halves[1], index))
    assert run_search("reject", clip, copy, "--index", halves[1]).returncode == 0
    assert copy not in matched(run_search("query", clip, "--json", "--index", halves[1], index))


def test_indexes_of_other_models_are_refused(library, halves, tmp_path):
    with (store := IndexStore(halves[1])).writing():
        store.update_settings(identity=store.settings["identity"] | {"fps": "2"})
    query = ("query", library.path("a.mp4"), "--index", *halves)
    message = refused(search.main, *query)
    assert "were made with fps '1' and '2', so their scores cannot be compared" in message
    message = refused(search.main, *query, "--report", tmp_path / "x.html")
    assert "--report shows one index" in message


def test_query_needs_a_clip(library):
    assert "`query` needs files" in refused(search.main, "query", "--index", library.index)


def test_calibrate_by_copies_of_the_own_videos(library, index):
    """The thresholds are the index's own then; --undo goes back to the model's."""

    def calibration():
        return VideoIndex(index, pipeline=library.pipeline).calibration

    shipped = calibration()
    result = run_search("calibrate", "--index", index, "--count", 4, "--device", "cpu")
    assert result.returncode == 0, result.stderr
    own = calibration()
    assert own["own"] and own["measured"]["pairs"] > 20 and own["threshold"] > 0
    assert f"threshold {own['threshold']:.3f}" in result.stdout
    assert f"with the threshold until now, {shipped['threshold']:.3f}: right " in result.stdout
    assert "before" not in own
    names = matched(run_search("query", library.path("b.mp4"), "--index", index, "--json"))
    assert set(names) >= {library.path("b.mp4"), library.path("b faster.mp4")}

    run_search("calibrate", "--index", index, "--undo", "--device", "cpu")
    assert calibration() == shipped


def test_calibrate_names_what_it_leaves_out(library, index, tmp_path):
    """A file that was cut since it was indexed, and a picture."""
    folder = tmp_path / "new"
    folder.mkdir()
    for name in ("a.mp4", "c.mp4"):
        shutil.copy(library.path(name), folder / f"broken {name}")
    run_search("index", folder, "--index", index, "--workers", 1, "--device", "cpu")
    for path in folder.iterdir():
        os.truncate(path, 200)
    result = run_search("calibrate", "--index", index, "--count", 20, "--device", "cpu")
    for path in folder.iterdir():
        assert f"left out {path}: broken" in result.stderr
    assert result.returncode == 0 and "Traceback" not in result.stderr


def test_calibrate_takes_four_videos(library, index):
    VideoIndex(index, pipeline=library.pipeline).remove([library.videos])
    message = refused(search.main, "calibrate", "--index", index, "--device", "cpu")
    assert "four videos and more" in message
