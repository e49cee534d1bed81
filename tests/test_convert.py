"""convert.py: values survive every conversion to the bit, and what is broken is named."""

import itertools
import json
import os
import shutil
import signal
import time

import convert
import h5py
import numpy as np
import pytest
from helpers.commands import cli, one_error, refused, start
from helpers.feature_files import some_features, write_ours, write_packed, write_released

from features.layouts import open_source
from features.store import FeatureStore

SCRIPT = "pre-processing/convert.py"
IDS = [
    "plain",
    "with space",
    "a/b/c",
    "a/b",
    "ünï/çødé 视频",
    "-dash",
    ".hidden",
    "dot.mp4",
    "x" * 200,
]
META = {"backbone": "lite0", "fps": "1", "number": 7}
NAMES = {"packed": "x.hdf5", "datasets": "theirs.h5", "npy": "folder"}


def run(*words):
    return convert.main([str(word) for word in words])


def refuse(*words):
    return refused(convert.main, *words)


def write_npy(path, features):
    for video, rows in features.items():
        (path / f"{video}.npy").parent.mkdir(parents=True, exist_ok=True)
        np.save(path / f"{video}.npy", rows)
    return path


def bits(path):
    """{id: (dtype, shape, bytes)} of any layout, read without our code."""
    arrays = {}

    def visit(name, item):
        if isinstance(item, h5py.Dataset):
            arrays[name] = item[:]

    if path.is_dir():
        for file in path.rglob("*.npy"):
            arrays[str(file.relative_to(path))[:-4]] = np.load(file)
    else:
        with h5py.File(path) as file:
            if "frames" in file:
                parts = np.split(file["frames"][:], file["offsets"][1:-1])
                arrays = dict(zip(file["ids"].asstr()[:], parts, strict=True))
            else:
                file.visititems(visit)
    return {video: (rows.dtype, rows.shape, rows.tobytes()) for video, rows in arrays.items()}


def tree(folder):
    """{path: content} of everything in a folder."""
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


# --- to ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_to_keeps_bits_meta_and_checksum_in_every_order_of_layouts(dtype, tmp_path):
    # HDF5 and file systems differ about a video that is also a folder: see below.
    features = some_features([video for video in IDS if video != "a/b"], dtype=dtype)
    expected = {}
    for video, rows in features.items():
        expected[video] = np.dtype(dtype), rows.shape, rows.tobytes()
    origin = write_ours(tmp_path / "origin.hdf5", features, dtype, **META)
    checksum = FeatureStore(origin).checksum
    for number, order in enumerate(itertools.permutations(NAMES)):
        folder, source = tmp_path / str(number), origin
        folder.mkdir()
        for layout in order:
            target = folder / NAMES[layout]
            run("to", source, target, "--layout", layout)
            assert bits(target) == expected
            store = open_source(target)
            assert (store.meta, store.checksum, store.dtype) == (META, checksum, dtype)
            assert run("verify", target) == 0
            source = target
        assert not list(folder.glob(".*"))
    assert (tmp_path / "0" / NAMES["packed"]).read_bytes() == origin.read_bytes()


def test_to_takes_the_layout_from_the_name(tmp_path):
    packed = tmp_path / "x.hdf5"
    run("to", write_npy(tmp_path / "folder", some_features(["a", "b/c"])), packed)
    run("to", packed, tmp_path / "back")
    with h5py.File(packed) as file:
        assert "frames" in file
    assert bits(tmp_path / "back") == bits(tmp_path / "folder") == bits(packed)
    assert "suffix" in refuse("to", packed, tmp_path / "y.hdf5", "--layout", "npy")
    assert "suffix" in refuse("to", packed, tmp_path / "y", "--layout", "packed")


def test_to_averages_region_features_of_either_source(tmp_path, capsys):
    rng = np.random.default_rng(0)
    features = {video: rng.normal(size=(4, 9, 8)).astype(np.float32) for video in ("a", "b/c")}
    folder = write_npy(tmp_path / "folder", features)
    for source in (folder, write_released(tmp_path / "theirs.hdf5", features)):
        run("to", source, tmp_path / "x.hdf5")
        store = FeatureStore(tmp_path / "x.hdf5")
        for video, rows in features.items():
            assert np.allclose(store[video], rows.mean(1), atol=1e-6)
        assert "averaged" in capsys.readouterr().err


def test_to_dtype_converts_and_names_an_overflow(tmp_path):
    features = {
        "small": np.full((2, 4), 0.1, np.float32),
        "large": np.full((2, 4), 1e6, np.float32),
    }
    source, target = write_released(tmp_path / "x.hdf5", features), tmp_path / "y.hdf5"
    words = "to", source, target, "--dtype", "float16"
    line = refuse(*words)
    assert "'large'" in line and "float16" in line
    assert not target.exists()
    (tmp_path / "list").write_text("large\tis too large\n")
    run(*words, "--without", tmp_path / "list")
    store = FeatureStore(target)
    assert list(store) == ["small"] and store["small"].dtype == np.float16
    assert (store["small"] == np.float16(0.1)).all()


def test_to_refuses_a_file_name_that_is_not_text(tmp_path):
    folder = write_npy(tmp_path / "folder", some_features(["a"]))
    shutil.copy(folder / "a.npy", os.path.join(os.fsencode(folder), b"\xff.npy"))
    assert "not UTF-8" in refuse("to", folder, tmp_path / "x.hdf5")


def test_to_without_leaves_out_listed_videos_and_refuses_other_bad_ones(tmp_path, capsys):
    features = some_features(["a", "b"]) | {
        "wide": np.ones((2, 9), np.float16),
        "flat": np.ones(8, np.float16),
    }
    listed, target = tmp_path / "list", tmp_path / "y.hdf5"
    words = "to", write_released(tmp_path / "x.hdf5", features), target, "--without", listed
    listed.write_text("wide\nnot there\n")
    assert "'flat'" in refuse(*words)
    listed.write_text("wide\nnot there\nflat\nb\n")
    capsys.readouterr()
    run(*words)
    assert list(FeatureStore(target)) == ["a"]
    notice = capsys.readouterr().err
    assert "1 of the 4 ids" in notice and "not there" in notice
    listed.write_text("wide\nflat\na\nb\n")
    assert "nothing would be left" in refuse(*words)


def test_to_keeps_the_values_of_big_endian_arrays(tmp_path):
    features = some_features(["a", "b"], dtype=">f4")
    run("to", write_npy(tmp_path / "folder", features), tmp_path / "x.hdf5")
    store = FeatureStore(tmp_path / "x.hdf5")
    assert store.dtype == "<f4"
    for video, rows in features.items():
        np.testing.assert_array_equal(store[video], rows)
    assert run("verify", tmp_path / "x.hdf5") == 0


@pytest.mark.parametrize("source", NAMES)
@pytest.mark.parametrize("target", ["y.hdf5", "elsewhere"])
def test_to_refuses_rows_that_changed_since_they_were_written(source, target, tmp_path):
    features, path = some_features(["a", "b", "c"]), tmp_path / NAMES[source]
    origin, target = write_ours(tmp_path / "origin.hdf5", features), tmp_path / target
    run("to", origin, path, "--layout", source)
    if source == "npy":
        np.save(path / "b.npy", features["b"] + 1)
    else:
        with h5py.File(path, "r+") as file:
            if source == "datasets":
                file["b"][0, 0] += 1
            else:
                file["frames"][len(features["a"]), 0] += 1
    for more in ([], ["--dtype", "float32"]):
        assert "'b' has other rows than were written" in refuse("to", path, target, *more)
    assert not target.exists()
    (tmp_path / "bad").write_text("b")
    run("to", path, target, "--without", tmp_path / "bad")
    expected = bits(origin)
    del expected["b"]
    assert bits(target) == expected


FOREIGN_ATTRIBUTES = {
    "bytes": (np.array([b"caf\xe9", b"b"]), ["caf\ufffd", "b"]),
    "text": (np.array(["a", "b"], dtype=object), ["a", "b"]),
    "empty": (h5py.Empty("f4"), ""),
    "table": (np.array([(1, b"x")], dtype=[("n", "i4"), ("s", "S1")]), ["(1, b'x')"]),
    "numbers": (np.eye(2, dtype=np.float32), [[1, 0], [0, 1]]),
    "flag": (np.bool_(True), True),
}


def test_to_keeps_attributes_of_other_programs_in_every_layout(tmp_path, capsys):
    source = write_packed(tmp_path / "theirs.hdf5", some_features(["a", "b"]))
    expected = {}
    with h5py.File(source, "r+") as file:
        for name, (value, plain) in FOREIGN_ATTRIBUTES.items():
            file.attrs[name], expected[name] = value, plain
    for name in ("x.hdf5", "folder", "y.hdf5"):
        run("to", source, tmp_path / name)
        source = tmp_path / name
        capsys.readouterr()
        run("info", source, "--json")
        assert json.loads(capsys.readouterr().out)["meta"] == expected


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["npy", "packed"])
def test_killed_conversion_leaves_no_half_and_can_be_repeated(layout, tmp_path, kill_rng):
    features = {f"v{i}": np.ones((50, 256), np.float16) for i in range(2000)}
    source, target = write_packed(tmp_path / "source.hdf5", features), tmp_path / NAMES[layout]
    before, deadline = set(tmp_path.iterdir()), time.monotonic() + 60
    process = start(SCRIPT, "to", source, target, "--layout", layout)
    while set(tmp_path.iterdir()) == before and time.monotonic() < deadline:
        time.sleep(0.002)
    time.sleep(kill_rng.uniform(0, 0.1))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    left = set(tmp_path.iterdir()) - before
    assert left
    if process.returncode != 0:  # killed before its end
        assert all(path.name.startswith(".") for path in left)
        for folder in left:
            if folder.is_dir():
                (folder / "of another run.npy").touch()  # must not get into the next one
    else:
        shutil.rmtree(target) if target.is_dir() else target.unlink()
    run("to", source, target, "--layout", layout)
    assert set(tmp_path.iterdir()) - before == {target}
    assert run("verify", target) == 0
    assert set(bits(target)) == set(features)


# --- refusals ------------------------------------------------------------------------------------


def test_ids_that_a_layout_cannot_hold_are_refused(tmp_path):
    """Above all, nothing is written outside the target folder."""
    inside = tmp_path / "in"
    inside.mkdir()
    for video in ("../escaped", "/absolute", "a//b", "a/./b", "", "a/"):
        features = {"good": np.ones((1, 2)), video: np.ones((1, 2))}
        source = write_ours(inside / "x.hdf5", features)
        before = tree(tmp_path)
        for layout in ("npy", "datasets"):
            line = refuse("to", source, inside / NAMES[layout], "--layout", layout)
            assert repr(video) in line
        assert tree(tmp_path) == before
    source = write_ours(inside / "x.hdf5", some_features(["a/b", "a/b/c"]))
    assert "'a/b'" in refuse("to", source, tmp_path / "y.hdf5", "--layout", "datasets")
    run("to", source, tmp_path / "folder")  # a.npy and a/ can lie side by side
    assert bits(tmp_path / "folder") == bits(source)


BROKEN_NPY = {"empty": b"", "text": b"no array", "cut": None, "objects": None}


@pytest.mark.parametrize("kind", BROKEN_NPY)
def test_broken_npy_is_named(kind, tmp_path):
    folder, target = write_npy(tmp_path / "folder", some_features(["a", "b"])), tmp_path / "y.hdf5"
    (folder / "sub").mkdir()
    broken = folder / "sub" / "sick.npy"
    if kind == "objects":
        np.save(broken, np.array([{}]), allow_pickle=True)
    elif kind == "cut":
        broken.write_bytes((folder / "a.npy").read_bytes()[:-1])
    else:
        broken.write_bytes(BROKEN_NPY[kind])
    before = tree(tmp_path)
    assert "sick.npy" in refuse("to", folder, target)
    assert tree(tmp_path) == before


def test_bad_sources_and_targets_are_refused_and_left_as_they_are(tmp_path):
    features = some_features(["a", "b"])
    good = write_ours(tmp_path / "good.hdf5", features)
    nan = write_released(tmp_path / "nan.hdf5", features | {"sick": np.full((2, 8), np.nan)})
    wide = write_npy(tmp_path / "wide", features | {"broad": np.ones((2, 9), np.float16)})
    latin, target = tmp_path / "latin", tmp_path / "y.hdf5"
    latin.write_bytes("ein Häuschen".encode("latin1"))
    (tmp_path / "hollow").mkdir()
    before = tree(tmp_path)
    assert "'sick'" in refuse("to", nan, target)
    assert "'broad'" in refuse("to", wide, target)
    assert "no video" in refuse("to", tmp_path / "hollow", target)
    assert "nowhere" in refuse("to", tmp_path / "nowhere", target)
    assert "UTF-8" in refuse("to", good, target, "--without", latin)
    assert "is the input" in refuse("to", good, good)
    assert "already exists" in refuse("to", good, wide)
    assert "target" in refuse("to", nan)
    assert tree(tmp_path) == before


def test_refusal_of_the_command_is_one_line_with_status_2(tmp_path):
    features = {"good": np.ones((2, 8)), "sick": np.full((2, 8), np.nan)}
    nan = write_released(tmp_path / "nan.hdf5", features)
    before = tree(tmp_path)
    assert "'sick'" in one_error(cli(SCRIPT, "to", nan, tmp_path / "y.hdf5"))
    assert tree(tmp_path) == before


# --- merge and split -----------------------------------------------------------------------------


def test_merge_of_shards_is_what_was_never_split(tmp_path):
    features = some_features(IDS)
    whole = write_ours(tmp_path / "whole.hdf5", features, **META)
    shards = []
    for i in range(3):
        shard = {video: features[video] for video in IDS[i::3]}
        shards.append(write_ours(tmp_path / f"x.{i}of3.hdf5", shard, **META))
    merged, some = tmp_path / "merged.hdf5", tmp_path / "some.hdf5"
    run("merge", *shards, "--output", merged)
    assert merged.read_bytes() == whole.read_bytes()
    line = refuse("merge", *shards[1:], "--output", some)
    assert "2 of 3 shards" in line and "had no video wrote no file" in line
    run("merge", *shards[1:], "--some", "--output", some)
    assert set(FeatureStore(some)) == set(IDS) - set(IDS[::3])


OTHER_KINDS = {  # what makes the second file: features, dtype, meta; and what the message names
    "twice": (some_features(["b", "c"]), "float16", META, ["'b'"]),
    "wide": (some_features(["c"], feature_size=9), "float16", META, ["width 8", "9"]),
    "type": (some_features(["c"]), "float32", META, ["float16", "float32"]),
    "meta": (
        some_features(["c"]),
        "float16",
        META | {"backbone": "resnet50"},
        ["backbone", "'lite0'", "'resnet50'"],
    ),
    "more": (some_features(["c"]), "float16", META | {"pca": "p"}, ["pca", "'p'"]),
}


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_merge_refuses_files_of_two_kinds(kind, tmp_path):
    features, dtype, meta, mentions = OTHER_KINDS[kind]
    one = write_ours(tmp_path / "one.hdf5", some_features(["a", "b"]), **META)
    other = write_ours(tmp_path / "other.hdf5", features, dtype, **meta)
    line = refuse("merge", one, other, "--output", tmp_path / "y.hdf5")
    assert all(mention in line for mention in [*mentions, "one.hdf5", "other.hdf5"]), line
    assert "is the input" in refuse("merge", one, "--output", one)
    assert not (tmp_path / "y.hdf5").exists()


def test_split_then_merge_gives_the_file_back(tmp_path, capsys):
    source = write_ours(tmp_path / "x.hdf5", some_features(IDS), **META)
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_text(f"{IDS[0]}\n\n{IDS[2]}\tthis is ignored\nnot there\n{IDS[0]}\n")
    two.write_text(f"{IDS[4]}\n")
    parts = [tmp_path / f"{name}.hdf5" for name in ("first", "second", "rest")]
    first, second, rest = parts
    run("split", source, "--ids", one, first, "--ids", two, second, "--rest", rest)
    notice = capsys.readouterr().err
    assert "1 of the 3 ids" in notice and "not there" in notice
    assert set(FeatureStore(first)) == {IDS[0], IDS[2]}
    assert set(FeatureStore(second)) == {IDS[4]}
    run("merge", *parts, "--output", tmp_path / "y.hdf5")
    assert (tmp_path / "y.hdf5").read_bytes() == source.read_bytes()


def test_split_that_would_lose_or_mix_videos_writes_nothing(tmp_path):
    source = write_ours(tmp_path / "x.hdf5", some_features(IDS))
    one, none, new = tmp_path / "one", tmp_path / "none", tmp_path / "new.hdf5"
    one.write_text(IDS[0])
    none.write_text("not there")
    before = tree(tmp_path)
    words = "split", source, "--ids"
    assert "would be in" in refuse(*words, one, new, "--ids", none, tmp_path / "y")
    assert "same output" in refuse(*words, one, new, "--rest", new)
    assert "list of ids" in refuse(*words, tmp_path / "absent", new)
    assert tree(tmp_path) == before


# --- info and verify -----------------------------------------------------------------------------


def test_info_describes_a_store(tmp_path, capsys):
    features = {f"v{T}": np.ones((T, 8), np.float16) for T in range(1, 12)}
    path = write_ours(tmp_path / "x.hdf5", features, **META)
    run("info", path, "--json")
    facts = json.loads(capsys.readouterr().out)
    assert (facts["videos"], facts["frames"]) == (11, 66)
    assert (facts["channels"], facts["dtype"]) == (8, "float16")
    percentiles = {"shortest": 1, "10 %": 2, "median": 6, "90 %": 10, "longest": 11}
    assert facts["lengths"] == {"mean": 6} | percentiles
    assert facts["meta"] == META and facts["bytes"] == os.path.getsize(path)
    assert facts["checksum"] == FeatureStore(path).checksum
    run("info", path)
    table = capsys.readouterr().out
    assert facts["checksum"] in table
    for name, value in META.items():
        assert f"{name} " in table and str(value) in table


def verify(path, capsys):
    """Exit status, {id: reason} and the summary of `verify`."""
    capsys.readouterr()
    status = run("verify", path)
    printed = capsys.readouterr()
    return status, dict(line.split("\t") for line in printed.out.splitlines()), printed.err


def write_list(path, reasons):
    """What `verify` prints, as a file for --without."""
    path.write_text("".join(f"{video}\t{reason}\n" for video, reason in reasons.items()))
    return path


@pytest.mark.parametrize("layout", NAMES)
def test_verify_names_every_bad_video(layout, tmp_path, capsys):
    """What is left without them is good."""
    features = some_features(["a", "b/c", "d", "e", "f"], dtype=np.float32)
    features = {video: np.tile(rows, (3, 1)) for video, rows in features.items()}
    features["b/c"][1, 2], features["b/c"][2, 0], features["d"][:2] = np.nan, np.inf, 0
    bad = {"b/c", "d"}
    if layout != "packed":  # there every video has the one width
        features["wide"] = np.ones((3, 9), np.float32)
        bad.add("wide")
    write = {"packed": write_packed, "datasets": write_released, "npy": write_npy}[layout]
    path, good = write(tmp_path / NAMES[layout], features), tmp_path / "good.hdf5"
    status, reasons, summary = verify(path, capsys)
    assert status == 3 and set(reasons) == bad
    assert f"{len(bad)} of {len(features)} videos" in summary
    assert f"2 of its {features['b/c'].size} values are NaN or infinite" in reasons["b/c"]
    assert f"2 of its {len(features['d'])} rows are zero" in reasons["d"]
    run("to", path, good, "--without", write_list(tmp_path / "bad.txt", reasons))
    assert verify(good, capsys)[:2] == (0, {})
    assert set(FeatureStore(good)) == set(features) - bad


def test_verify_continues_after_an_npy_cut_short(tmp_path, capsys):
    path = write_npy(tmp_path / "folder", some_features(["a", "b/c", "d", "e"]))
    os.truncate(path / "a.npy", 130)  # its header is whole
    (path / "b/c.npy").write_bytes(b"")
    status, reasons, summary = verify(path, capsys)
    assert status == 3 and set(reasons) == {"a", "b/c"} and "2 of 4 videos are bad" in summary
    assert all("cut short" in reason for reason in reasons.values())
    target = tmp_path / "x.hdf5"
    assert "'a' lies in a.npy, which was cut short" in refuse("to", path, target)
    run("to", path, target, "--without", write_list(tmp_path / "bad", reasons))
    assert set(bits(target)) == {"d", "e"}


@pytest.mark.parametrize("layout", NAMES)
def test_verify_finds_a_single_changed_bit(layout, tmp_path, capsys):
    path = tmp_path / NAMES[layout]
    features = some_features([f"v{i}" for i in range(20)])
    run("to", write_ours(tmp_path / "origin.hdf5", features), path, "--layout", layout)
    assert verify(path, capsys)[0] == 0
    file, needle = (path / "v7.npy" if path.is_dir() else path), features["v7"].tobytes()
    data = bytearray(file.read_bytes())
    assert data.count(needle) == 1
    data[data.index(needle)] ^= 1  # the lowest bit of a value
    file.write_bytes(data)
    status, reasons, summary = verify(path, capsys)
    assert (status, reasons) == (3, {"v7": "its rows are not those that were written"})
    assert "does not agree" in summary


def lose(path, video):
    if path.is_dir():
        (path / f"{video}.npy").unlink()
    else:
        with h5py.File(path, "r+") as file:
            del file[video]


def rename(path, video):
    if path.is_dir():
        (path / f"{video}.npy").rename(path / "other.npy")
    else:
        with h5py.File(path, "r+") as file:
            file.move(video, "other")


@pytest.mark.parametrize("layout", ["datasets", "npy"])
@pytest.mark.parametrize("change", [lose, rename])
def test_verify_finds_a_lost_or_renamed_video_though_every_row_is_good(
    layout, change, tmp_path, capsys
):
    source, path = tmp_path / "source.hdf5", tmp_path / NAMES[layout]
    write_ours(source, some_features(["a", "b", "c"]))
    run("to", source, path, "--layout", layout)
    change(path, "b")
    status, reasons, summary = verify(path, capsys)
    assert (status, reasons) == (3, {}) and "does not agree" in summary


def test_verify_of_a_foreign_file(tmp_path, capsys):
    """It has no checksum. One cut short is bad input, not a list of bad videos."""
    path = write_released(tmp_path / "x.hdf5", some_features(IDS[:3]))
    status, reasons, summary = verify(path, capsys)
    assert (status, reasons) == (0, {}) and "no checksum" in summary
    path.write_bytes(path.read_bytes()[:-100])
    assert "x.hdf5" in refuse("verify", path)
