"""Ids that do not agree: three of either side are shown, and in what they differ."""

import json

import numpy as np
import pytest
from helpers.commands import call, refused
from helpers.feature_files import write_ours, write_pickle
from helpers.training import main as train
from helpers.training import train_flags

from evaluation import main as evaluate
from utils import describe_ids, id_hint

IDS = ["a1", "b2", "Cafe\u0301 3", "d4"]


@pytest.mark.parametrize(
    "spell, expected",
    [
        (lambda name: f"{name}.mp4", "suffix"),
        (lambda name: f"{name}.WebM", "suffix"),
        (lambda name: f"videos/part 1/{name}", "folder"),
        (str.upper, "case"),
        (lambda name: f" {name}\t", "surrounding space"),
        (lambda name: name.replace("e\u0301", "\u00e9"), "form of Unicode"),
        (lambda name: f"x/{name.upper()}.mkv", "suffix and folder and case"),
    ],
)
def test_hint_names_in_what_ids_differ(spell, expected):
    spelled = [spell(name) for name in IDS]
    for sides in ((IDS, spelled), (spelled, IDS)):
        count = 1 if expected == "form of Unicode" else len(IDS)
        assert id_hint(*sides) == f"ignoring {expected}, {count} more of 4 would agree"


def test_hint_is_empty_where_nothing_is_plain():
    assert (
        id_hint(IDS, IDS) == id_hint(IDS, ["x", "y"]) == id_hint(IDS, []) == id_hint([], IDS) == ""
    )
    assert id_hint(["v1.5", "v1.6"], ["v1.7"]) == ""  # no suffixes


def test_description_shows_three_of_either_side():
    text = describe_ids(IDS, ["A1.mp4"])
    assert text.startswith("expected ids such as 'a1', 'b2', 'Cafe\u0301 3', ..., found 'A1.mp4'; ")
    assert text.endswith("ignoring suffix and case, 1 more of 4 would agree")
    assert describe_ids(["a"], []) == "expected ids such as 'a', found none"


def demo_flags(world):
    return ["--dataset", "DEMO", "--annotation_dir", world.annotations, "--device", "cpu"]


@pytest.mark.parametrize("spell", [lambda name: f"{name}.mp4", str.upper])
def test_evaluation_says_in_what_all_ids_differ(world, tmp_path, spell):
    features = {spell(video): rows for video, rows in world.test.features.items()}
    path = write_ours(tmp_path / "x.hdf5", features)
    change = "case" if spell is str.upper else "suffix"
    query = next(iter(world.test.labels))
    message = refused(evaluate, *demo_flags(world), "--feature_path", path, "--encoder", "mean")
    assert f"ignoring {change}, 10 more of 10 would agree" in message
    assert repr(query) in message and repr(sorted(features)[0]) in message

    table = {spell(query): {spell(video): 0.5 for video in world.test.database}}
    (tmp_path / "table.json").write_text(json.dumps(table))
    similarities = [*demo_flags(world), "--similarities", tmp_path / "table.json"]
    message = refused(evaluate, *similarities)
    assert "table.json" in message and f"ignoring {change}, 1 more of 10" in message
    (tmp_path / "table.json").write_text(json.dumps({query: {}}))
    (tmp_path / "ids.txt").write_text("\n".join(map(spell, world.test.database)))
    message = refused(evaluate, *similarities, "--searched", tmp_path / "ids.txt")
    assert "ids.txt" in message and f"ignoring {change}, 80 more of 80" in message


def test_evaluation_says_in_what_some_ids_differ(world, tmp_path):
    videos = [video for video in world.test.features if video not in world.test.labels]
    spelled = {video: f"{video}.mp4" for video in videos[::2]}
    features = {spelled.get(video, video): rows for video, rows in world.test.features.items()}
    path = write_ours(tmp_path / "x.hdf5", features)
    result = call(evaluate, *demo_flags(world), "--feature_path", path, "--encoder", "mean")
    assert f"ignoring suffix, {len(spelled)} more of 80 would agree" in result.stderr

    queries, database = world.test.labels, world.test.database
    table = {query: {spelled.get(video, video): 0.5 for video in database} for query in queries}
    (tmp_path / "table.json").write_text(json.dumps(table))
    result = call(evaluate, *demo_flags(world), "--similarities", tmp_path / "table.json")
    ignored = f"0 queries and {len(spelled)} videos that the set does not contain"
    assert f"{ignored}; ignoring suffix, {len(spelled)} more" in result.stdout


def test_training_says_in_what_ids_differ(world, tmp_path):
    pairs = {f"x/{video}": rows.astype(np.float16) for video, rows in world.pairs.items()}
    path = write_ours(tmp_path / "x.hdf5", pairs)
    flags = train_flags(world, tmp_path / "model", "--feature_path", path)
    message = refused(train, *flags)
    assert "0 of 72 pairs" in message and "'film0/copy 0', 'film0/copy 1'" in message
    assert "ignoring folder" in message
    message = refused(
        train,
        *train_flags(world, tmp_path / "model"),
        "--pairs",
        "augment",
        "--feature_path",
        path,
        "--annotation_path",
        world.vcdb,
    )
    assert "0 of 128 videos" in message and "ignoring folder" in message


def test_segments_of_other_ids_are_refused(world, tmp_path):
    """They would mask nothing."""
    annotation = dict(world.annotation)
    segments = annotation["segments"]
    annotation["segments"] = {f"{video}.mp4": of_video for video, of_video in segments.items()}
    path = write_pickle(tmp_path / "vcdb.pickle", annotation)
    flags = train_flags(world, tmp_path / "model", "--annotation_path", path, "--mask_shared")
    assert "ignoring suffix" in refused(train, *flags)
