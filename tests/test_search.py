"""search.py: what its commands print, their exit status, bad input."""

import json
import os
import re
import shutil

import extract_features
import numpy as np
import pca as pca_script
import pytest
from helpers.commands import cli, one_error, python, refused
from helpers.library import (
    CLIPS,
    ODD,
    cut_clip,
    damage,
    largest_file,
    run_search,
    stored_data,
)

import search
from features.store import FeatureStore
from videoindex.index import VideoIndex
from videoindex.pipeline import SHIPPED


@pytest.fixture
def index(library, tmp_path):
    """The folder of an index that a test may change."""
    return shutil.copytree(library.index, tmp_path / "index")


# --- the process --------------------------------------------------------------------------------


def test_search_process_reports_bad_input_in_one_line(tmp_path):
    (tmp_path / "index.db").write_bytes(b"SQLite it is not" * 100)
    assert "not a database" in one_error(cli("search.py", "info", "--index", tmp_path))


@pytest.mark.parametrize(
    "arguments", [["--help"], ["query", "--help"], ["duplicates", "--keep", "size"], ["query"]]
)
def test_search_help_and_bad_commands_load_nothing_heavy(arguments):
    """They answer at once."""
    code = f"""
import sys
import search
try:
    search.main({arguments + (["--index", "x"] if "--help" not in arguments else [])!r})
except (SystemExit, search.InputError):
    pass
assert not {{"torch", "faiss", "sklearn", "scipy", "torchvision", "av"}} & set(sys.modules)
"""
    result = python(code)
    assert result.returncode == 0, result.stderr


def test_search_info_and_verify_load_nothing_heavy(library):
    """They answer at once, and work without FFmpeg."""
    code = """
import sys
import search
for command in ("info", "verify"):
    assert not search.main([command, *sys.argv[1:]])
assert not {"torch", "faiss", "scipy", "torchvision", "av"} & set(sys.modules)
"""
    result = python(code, "--index", library.index)
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith(f"\n{library.index}: {len(CLIPS)} videos, sound\n")


# --- index --------------------------------------------------------------------------------------


def test_index_prints_what_it_did(library):
    assert library.made.stdout == (
        f"{library.index}: {len(CLIPS)} videos; {len(CLIPS)} added, 0 replaced,"
        " 0 moved, 0 of known content, 0 unchanged, 0 removed, 0 failed\n"
    )


def test_index_names_bad_files_and_continues(library, tmp_path):
    folder, index = tmp_path / "videos", tmp_path / "index"
    cut_clip(folder / "good.mp4", [(400, 403)])
    shutil.copy(folder / "good.mp4", folder / "same content.mp4")
    (folder / "broken.mp4").write_bytes(b"no video" * 100)
    (folder / "empty.mp4").touch()
    (folder / "inner").mkdir()
    (folder / "inner" / "up").symlink_to(folder)  # a loop of folders
    (folder / "round.mp4").symlink_to(folder / "about.mp4")  # a loop of files
    (folder / "about.mp4").symlink_to(folder / "round.mp4")
    os.mkfifo(folder / "pipe.mp4")
    (folder / "notes.txt").write_text("no video, and not tried")
    result = run_search("index", folder, tmp_path / "nowhere.mp4", "--index", index, "--workers", 1)
    skipped = set()
    for line in result.stderr.splitlines():
        path, _, reason = line.removeprefix("skipped ").partition(": ")
        assert line.startswith("skipped ") and reason
        skipped.add(os.path.basename(path))
    assert result.returncode == 3, result.stderr
    assert skipped == {
        "broken.mp4",
        "empty.mp4",
        "round.mp4",
        "about.mp4",
        "pipe.mp4",
        "nowhere.mp4",
    }
    assert "2 videos; 1 added, 0 replaced, 0 moved, 1 of known content" in result.stdout
    assert "6 failed" in result.stdout

    made = VideoIndex(index, pipeline=library.pipeline)
    (group,) = made.duplicates()
    assert {os.path.basename(path) for path in group.paths} == {"good.mp4", "same content.mp4"}
    made.remove([folder / "good.mp4"])
    (match,) = made.query(folder / "good.mp4")
    assert match.path == str(folder / "same content.mp4")
    assert match.similarity == pytest.approx(1, abs=1e-4)


@pytest.mark.slow
def test_index_on_a_disk_that_fills(library, tmp_path):
    """The error is one line, and what was added before stays."""
    index = tmp_path / "index"
    with largest_file(40 << 10):
        message = refused(
            search.main,
            *("index", library.videos, "--index", index, "--workers", 1, "--device", "cpu"),
        )
    assert "File too large" in message or "disk" in message
    stopped = VideoIndex(index, pipeline=library.pipeline)
    stored = len(stopped)
    assert 0 < stored < len(CLIPS) and not damage(stopped)
    assert stopped.add([library.videos]).added == len(CLIPS) - stored
    assert not damage(stopped) and stored_data(stopped).keys() == stored_data(library.open()).keys()


# --- query --------------------------------------------------------------------------------------


def test_query_of_an_indexed_video(library):
    """It comes first and matches from end to end; an odd name comes back as it is."""
    clips = library.path("a.mp4"), library.path(ODD)
    result = run_search("query", *clips, "--index", library.index, "--json")
    assert result.returncode == 0, result.stderr
    answer, odd = json.loads(result.stdout)
    assert odd["clip"] == odd["matches"][0]["path"] == library.path(ODD)
    first = answer["matches"][0]
    assert first["path"] == library.path("a.mp4")
    assert first["verdict"] == "certain" and 0 < first["score"] <= first["matched_seconds"] <= 8
    (segment, *_) = first["stretches"]
    assert segment["query"] == segment["video"] == pytest.approx([0, 8], abs=0.1)


def test_query_prints_a_table(library, tmp_path):
    """Odd names stay on one line, bad clips are named one a line."""
    broken, nowhere = tmp_path / "broken.mp4", tmp_path / "nowhere.mp4"
    broken.write_bytes(b"no video" * 100)
    clips = [library.videos, broken, nowhere, library.path("a.mp4"), library.path(ODD)]
    result = run_search("query", *clips, "--index", library.index)
    notes = result.stderr.splitlines()
    assert result.returncode == 3 and len(notes) == 3, result.stderr
    assert "folder" in notes[0] and "broken.mp4" in notes[1] and "does not exist" in notes[2]

    first, *rows = result.stdout.splitlines()
    assert first == f"{library.path('a.mp4')} (0:08.0)"
    for row, name in zip(rows, ("a.mp4", "a bordered.mp4", "a mirrored.mp4"), strict=False):
        score, found = row[:7], row[7:]
        assert re.fullmatch(r"  [0-8]\.\d{3}", score)
        times = "0:00.0–0:08.0 = 0:00.0–0:08.0"
        assert found == f"  certain  {library.path(name)} (0:08.0)  {times}"
    odd_lines = [line for line in rows if "Кино" in line]
    assert len(odd_lines) == 2
    assert all("new\\nline" in line and "映画" in line for line in odd_lines)


def test_query_json_holds_the_error_of_a_bad_clip(library):
    result = run_search("query", "/nowhere.mp4", "--index", library.index, "--json")
    assert result.returncode == 3 and json.loads(result.stdout) == [
        {
            "clip": "/nowhere.mp4",
            "seconds": 0.0,
            "matches": [],
            "error": "it does not exist; check the path",
        }
    ]


def test_query_refuses_another_model(library):
    query = ("query", library.path("a.mp4"), "--index", library.index, "--device", "cpu")
    assert "made with encoder 'mean'" in refused(search.main, *query, "--encoder", "tca")


def test_descriptors_are_those_of_the_other_scripts(library, tmp_path):
    """Of extract_features.py and pca.py: the parts are theirs."""
    (tmp_path / "c.mp4").symlink_to(library.path("c.mp4"))
    raw, features = str(tmp_path / "raw.hdf5"), str(tmp_path / "x.hdf5")
    extract_features.main([str(tmp_path), "--output", raw, "--workers", "1", "--device", "cpu"])
    pca_script.main(["apply", raw, "--pca", str(SHIPPED / "pca.npz"), "--output", features])
    rows = FeatureStore(features)["c"].astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    clip = library.clip("c.mp4")
    np.testing.assert_allclose(clip.frame_descriptors.astype(np.float32), rows, atol=2e-3)
    assert len(clip.window_descriptors) == 1  # 8 frames
    mean = rows.mean(0) / np.linalg.norm(rows.mean(0))
    np.testing.assert_allclose(clip.window_descriptors[0], mean, atol=2e-3)


# --- duplicates, info, verify, remove -----------------------------------------------------------


def test_duplicates_prints_groups_and_json(library, tmp_path):
    page = tmp_path / "page.html"
    table = run_search("duplicates", "--index", library.index, "--report", page)
    lines = table.stdout.splitlines()
    assert table.returncode == 0 and lines[0] == "group 1: 3 videos"
    (line,) = [line for line in lines if line.startswith(f"  {library.path('b faster.mp4')} ")]
    assert re.fullmatch(
        r"  .* \(0:06\.4\)  \d+ × 160, h264, [\d.]+ kbit/s, [\d.]+ kB, \d{4}-\d\d-\d\d \d\d:\d\d",
        line,
    )
    assert lines[-1] == "3 groups, 6 videos, 1 parts"
    assert "Videos that share material" in page.read_text()

    result = run_search("duplicates", "--index", library.index, "--json")
    groups = json.loads(result.stdout)
    paths = [{path for video in group["videos"] for path in video["paths"]} for group in groups]
    assert {library.path("b.mp4"), library.path("b faster.mp4")} in paths
    (parts,) = (group["parts"] for group in groups if group["parts"])
    assert [part["a"] for part in parts] == [library.path("c.mp4")]
    for group in groups:
        for link in group["links"] + group["parts"]:
            assert link["verdict"] in ("certain", "likely") and link["stretches"]


def test_duplicates_refuses_an_unknown_index_type(index):
    message = refused(search.main, "duplicates", "--index", index, "--index_type", "Nonsense3")
    assert "FAISS factory string" in message


def test_info_counts(library):
    index = library.open()
    contents = list(index.store.contents())
    facts = json.loads(run_search("info", "--index", library.index, "--json").stdout)
    assert facts["videos"] == facts["contents"] == len(CLIPS)
    assert facts["frames"] == sum(content.num_frames for content in contents)
    assert facts["bytes"] == sum(path.stat().st_size for path in library.index.iterdir())
    assert facts["holes"] == 0 and facts["index_type"] == "Flat"
    assert facts["model"] == library.pipeline.identity
    assert set(facts["versions"]) == {"torch", "av", "numpy", "faiss-cpu"}
    table = run_search("info", "--index", library.index).stdout.splitlines()
    assert table[0].split() == ["videos", str(len(CLIPS))]
    assert [line.split()[0] for line in table] == list(facts)


def test_verify_names_damaged_changed_and_vanished_files(index, library, tmp_path):
    opened = VideoIndex(index, pipeline=library.pipeline)
    changed, vanished = tmp_path / "changed.mp4", tmp_path / "vanished.mp4"
    for path in (changed, vanished):
        shutil.copy(library.path("folder/d.mp4"), path)
    opened.add([changed, vanished])
    changed.touch()
    vanished.unlink()
    store = opened.store
    content = store.content(store.known_files()[library.path("b.mp4")].content)
    with open(store.data_path("frames"), "r+b") as file:
        file.seek(content.first_frame * 1024 + 5)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))
    result = run_search("verify", "--index", index)
    lines = result.stdout.splitlines()
    damaged = [line for line in lines if "its data is damaged" in line]
    assert result.returncode == 3 and len(damaged) == 1 and "b.mp4" in damaged[0], result.stdout
    notes = sorted(line for line in lines if line.startswith("note: "))
    assert len(notes) == 2, notes
    assert "changed.mp4 has changed since" in notes[0]
    assert "vanished.mp4: No such file or directory" in notes[1]
    assert lines[-1] == f"{index}: {len(CLIPS) + 2} videos, 1 damaged"


def test_remove_names_what_it_does_not_know(index, library):
    result = run_search("remove", library.videos / "folder", "/nowhere.mp4", "--index", index)
    assert result.returncode == 3
    assert result.stdout == f"{index}: 2 removed, {len(CLIPS) - 2} videos left\n"
    assert result.stderr == "not in the index: /nowhere.mp4\n"


# --- bad input ----------------------------------------------------------------------------------


def test_search_refuses_what_is_not_an_index(library, tmp_path):
    assert "does not exist" in refused(search.main, "info", "--index", tmp_path / "none")
    assert "no index.db" in refused(search.main, "verify", "--index", library.videos)


def test_search_refuses_bad_options(library, tmp_path):
    query = ("query", "clip.mp4", "--index", library.index)
    assert "--top 0 is out of range" in refused(search.main, *query, "--top", 0)
    assert "--shortlist 0 is out of range" in refused(search.main, *query, "--shortlist", 0)
    assert "is a folder" in refused(search.main, *query, "--report", tmp_path)
    assert "see " in refused(search.main, "query", "--index", library.index)
