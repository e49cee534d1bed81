"""What to keep of duplicates, and the script that moves the rest."""

import csv
import os
import shutil
import subprocess

import pytest
from helpers.clips import numbered, write_video
from helpers.presentation import write_tracks

from utils import InputError
from videoindex.plan import (
    DROP,
    KEEP,
    LOOK,
    make_plan,
    parse_rules,
    plan_summary,
    write_plan,
    write_script,
)
from videoindex.results import Group, Link, TimeSegment
from videoindex.store import KnownFile

ODD = "it's $(touch hacked) `touch hacked`\n-rf \udce9.mkv"


@pytest.fixture
def folder(tmp_path):
    """Videos: large.mkv of 96 x 64 pixels; small.mkv, of 48 x 32; and one with an odd name."""
    folder = tmp_path / "videos"
    folder.mkdir()
    write_video(folder / "large.mkv", [image.repeat(2, 0).repeat(2, 1) for image in numbered(10)])
    write_video(folder / "small.mkv", numbered(10))
    write_video(folder / "v.mkv", numbered(10))
    os.rename(folder / "v.mkv", folder / ODD)
    for day, name in enumerate(("small.mkv", ODD, "large.mkv")):  # small is the oldest
        os.utime(folder / name, (86400 * day, 86400 * day))
    return folder


def known_of(paths):
    known = {}
    for path in paths:
        facts = os.stat(path)
        known[path] = KnownFile(facts.st_size, facts.st_mtime_ns, 0)
    return known


def group_of(folder, names, seconds, *links):
    """A group of contents 0, the centre, 1, ...; links are (content, verdict, same film)."""
    group = Group()
    for i, name in enumerate(names):
        group.files[i] = [str(folder / name)]
        group.seconds[i] = seconds[i]
    for a, verdict, _ in links:
        segments = [TimeSegment(0.0, 60.0, 0.0, 60.0, 0.9)]
        group.links.append(Link(a, 0, 3.9, segments, verdict, 3.0))
    return group


def plan_of(folder, names, seconds, *links, rules=("resolution", "bit_rate", "oldest")):
    group = group_of(folder, names, seconds, *links)
    same = {0} | {a for a, verdict, is_same in links if is_same and verdict == "certain"}
    rows = make_plan(
        [group], parse_rules(rules), known_of(group.paths), lambda a, b: {a, b} <= same
    )
    return {os.path.basename(row.path): row for row in rows}


SAME = (1, "certain", True)


@pytest.mark.parametrize(
    "rules, kept",
    [
        (["resolution"], "large.mkv"),
        (["oldest"], "small.mkv"),
        (["newest"], "large.mkv"),
        (["size"], "large.mkv"),
        (["folder=elsewhere", "oldest,resolution"], "small.mkv"),
    ],
)
def test_rules_choose_what_is_kept(folder, rules, kept):
    plan = plan_of(folder, ["large.mkv", "small.mkv"], [60, 60], SAME, rules=rules)
    (other,) = {"large.mkv", "small.mkv"} - {kept}
    assert (plan[kept].action, plan[kept].kept) == (KEEP, "")
    assert (plan[other].action, plan[other].kept) == (DROP, str(folder / kept))


def test_folders_come_in_the_order_of_the_rules(folder):
    (folder / "archive").mkdir()
    os.rename(folder / "small.mkv", folder / "archive/small.mkv")
    names = ["large.mkv", "archive/small.mkv"]
    rules = [f"folder={folder}/archive", "resolution"]
    plan = plan_of(folder, names, [60, 60], SAME, rules=rules)
    assert plan["small.mkv"].action == KEEP and plan["large.mkv"].action == DROP


def test_unknown_rule():
    with pytest.raises(InputError, match="'beauty' is no rule; give resolution, "):
        parse_rules(["resolution,beauty"])


@pytest.mark.parametrize("keep", ["resolution", "oldest"])
def test_only_the_same_film_is_dropped(folder, keep):
    """Not what shares most of it: an episode with the same opening, a film with a scene more."""
    plan = plan_of(
        folder, ["large.mkv", "small.mkv"], [60, 60], (1, "certain", False), rules=[keep]
    )
    assert sorted(row.action for row in plan.values()) == [KEEP, LOOK]
    (look,) = [row for row in plan.values() if row.action == LOOK]
    assert look.reason == "certain, but not the same film from end to end"


def test_copies_of_one_centre_are_copies_of_each_other(folder):
    """The best of three is no centre."""
    names = ["small.mkv", "large.mkv", ODD]
    plan = plan_of(folder, names, [60, 60, 60], SAME, (2, "certain", True))
    assert [plan[name].action for name in names] == [DROP, KEEP, DROP]
    plan = plan_of(folder, names, [60, 60, 60], SAME, (2, "certain", False))
    assert [plan[name].action for name in names] == [DROP, KEEP, LOOK]


def test_sound_is_not_dropped_for_silence(folder):
    write_tracks(folder / "small.mkv", [(numbered(10), 0, "ffv1", "bgr0", None)], (0, 1))
    os.utime(folder / "small.mkv", (0, 0))
    plan = plan_of(folder, ["large.mkv", "small.mkv"], [60, 60], SAME)
    assert plan["small.mkv"].action == LOOK and "sound" in plan["small.mkv"].reason
    plan = plan_of(folder, ["large.mkv", "small.mkv"], [60, 60], SAME, rules=["oldest"])
    assert plan["large.mkv"].action == DROP


def test_whole_film_is_kept_before_a_part_and_a_cut_file(folder):
    """Whatever the rules say: a part lacks film, and a file that ends too early does."""
    plan = plan_of(folder, ["small.mkv", "large.mkv"], [60, 30], (1, "certain", False))
    assert plan["small.mkv"].action == KEEP and plan["large.mkv"].action == LOOK
    # Both state 5 s; of large.mkv only 3 could be decoded, of small.mkv 4.
    write_video(folder / "large.mkv", [image.repeat(2, 0).repeat(2, 1) for image in numbered(50)])
    write_video(folder / "small.mkv", numbered(50))
    plan = plan_of(folder, ["small.mkv", "large.mkv"], [4, 3], (1, "certain", True))
    assert plan["small.mkv"].action == KEEP


def test_same_content_is_dropped_though_it_is_not_the_kept_film(folder):
    """large.mkv is kept; of two files of another film in the group one can go."""
    shutil.copy(folder / "small.mkv", folder / "twin.mkv")
    group = group_of(folder, ["large.mkv", "small.mkv"], [60, 60], (1, "likely", False))
    group.files[1].append(str(folder / "twin.mkv"))
    known = known_of(group.paths)
    rows = make_plan([group], ["resolution", "oldest"], known, lambda a, b: False)
    assert [(row.action, row.reason) for row in rows] == [
        (KEEP, "the best of the group"),
        (LOOK, "likely, but not the same film from end to end"),
        (DROP, "same content"),
    ]
    assert rows[2].kept == rows[1].path


def test_twin_of_a_dropped_file_is_dropped_for_the_one_that_stays(folder, tmp_path):
    shutil.copy(folder / "small.mkv", folder / "twin.mkv")
    group = group_of(folder, ["large.mkv", "small.mkv"], [60, 60], SAME)
    group.files[1].append(str(folder / "twin.mkv"))
    rows = make_plan([group], ["resolution"], known_of(group.paths), lambda a, b: True)
    assert [row.action for row in rows] == [KEEP, DROP, DROP]
    assert {row.kept for row in rows[1:]} == {str(folder / "large.mkv")}
    assert write_script(tmp_path / "moves.sh", rows, str(tmp_path / "dropped")) == 2
    assert run_script(tmp_path / "moves.sh", tmp_path).stdout == "2 of 2 files moved\n"
    assert os.path.exists(folder / "large.mkv") and not os.path.exists(folder / "twin.mkv")


@pytest.mark.parametrize("verdict", ["", "likely", "look yourself", "same place"])
def test_what_is_not_certain_is_to_be_looked_at(folder, verdict):
    plan = plan_of(folder, ["large.mkv", "small.mkv"], [60, 60], (1, verdict, True))
    assert plan["small.mkv"].action == LOOK and verdict in plan["small.mkv"].reason


def test_file_that_changed_since_it_was_indexed_is_to_be_looked_at(folder):
    """The index does not say what it holds now; so nothing is dropped for it either."""
    group = group_of(folder, ["large.mkv", "small.mkv"], [60, 60], SAME)
    known = known_of(group.paths)
    os.truncate(folder / "large.mkv", 100)
    rows = make_plan([group], ["newest"], known, lambda a, b: True)
    assert [(os.path.basename(row.path), row.action) for row in rows] == [
        ("large.mkv", LOOK),
        ("small.mkv", KEEP),
    ]


def test_plan_file_has_the_facts(folder, tmp_path):
    names = ["large.mkv", "small.mkv", ODD]
    links = [SAME, (2, "certain", True)]
    rows = list(plan_of(folder, names, [60] * 3, *links).values())
    write_plan(tmp_path / "plan.csv", rows)
    with open(tmp_path / "plan.csv", newline="", errors="surrogateescape") as file:
        table = {row["path"]: row for row in csv.DictReader(file)}
    assert set(table) == {str(folder / name) for name in names}
    large = table[str(folder / "large.mkv")]
    assert large["action"] == "keep" and large["codec"] == "ffv1"
    assert (large["width"], large["height"]) == ("96", "64")
    assert table[str(folder / ODD)]["kept"] == str(folder / "large.mkv")
    size = os.path.getsize(folder / "small.mkv") + os.path.getsize(folder / ODD)
    assert plan_summary(rows) == f"1 to keep, 2 to drop ({size / 1e6:.1f} MB), 0 to look at"


def run_script(path, folder):
    command = ["sh", path]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace")


def test_script_moves_what_is_to_drop_and_nothing_else(folder, tmp_path):
    names = ["large.mkv", "small.mkv", ODD]
    links = [SAME, (2, "certain", True)]
    rows = list(plan_of(folder, names, [60] * 3, *links).values())
    content = (folder / ODD).read_bytes()
    target = tmp_path / "dropped here"
    assert write_script(tmp_path / "moves.sh", rows, str(target)) == 2
    assert sorted(os.listdir(folder)) == sorted(names), "writing it moves nothing"
    assert run_script(tmp_path / "moves.sh", tmp_path).returncode == 0
    assert os.listdir(folder) == ["large.mkv"]
    moved = target / str(folder).lstrip("/")
    assert sorted(os.listdir(moved)) == sorted(names[1:])
    assert (moved / ODD).read_bytes() == content
    assert "hacked" not in os.listdir(tmp_path)
    again = run_script(tmp_path / "moves.sh", tmp_path)
    assert again.returncode == 0 and again.stderr.count("has gone") == 2


def test_script_leaves_a_file_whose_better_copy_has_gone(folder, tmp_path):
    plan = plan_of(folder, ["large.mkv", "small.mkv"], [60, 60], SAME)
    write_script(tmp_path / "moves.sh", plan.values(), str(tmp_path / "dropped"))
    (folder / "large.mkv").unlink()
    result = run_script(tmp_path / "moves.sh", tmp_path)
    assert "stays, for what would be kept has gone" in result.stderr
    assert (folder / "small.mkv").exists()


def test_script_leaves_a_file_whose_better_copy_has_changed(folder, tmp_path):
    plan = plan_of(folder, ["large.mkv", "small.mkv"], [60, 60], SAME)
    write_script(tmp_path / "moves.sh", plan.values(), str(tmp_path / "dropped"))
    os.truncate(folder / "large.mkv", 100)
    result = run_script(tmp_path / "moves.sh", tmp_path)
    assert "stays, for what would be kept has changed" in result.stderr
    assert (folder / "small.mkv").exists() and result.stdout == "0 of 1 files moved\n"


def test_script_overwrites_nothing(folder, tmp_path):
    plan = plan_of(folder, ["large.mkv", "small.mkv"], [60, 60], SAME)
    write_script(tmp_path / "moves.sh", plan.values(), str(tmp_path / "dropped"))
    there = tmp_path / "dropped" / str(folder).lstrip("/") / "small.mkv"
    there.parent.mkdir(parents=True)
    there.write_text("another")
    run_script(tmp_path / "moves.sh", tmp_path)
    assert there.read_text() == "another" and (folder / "small.mkv").exists()
