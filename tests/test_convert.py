"""Conversions give back what they were given, bit for bit; what is broken is named; what is written is whole or not there."""

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
from helpers.commands import cli, clis, one_error, start
from helpers.files import some_features, write_ours, write_packed, write_released

from features.store import FeatureStore
from utils import InputError

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


def write_npy(path, features):
    for video, frames in features.items():
        (path / f"{video}.npy").parent.mkdir(parents=True, exist_ok=True)
        np.save(path / f"{video}.npy", frames)
    return path


def bits(path):
    """{id: (dtype, shape, bytes)}, read without our code."""
    if path.is_dir():
        rows = {str(file.relative_to(path))[:-4]: np.load(file) for file in path.rglob("*.npy")}
    else:
        with h5py.File(path) as file:
            if "frames" in file:
                ids, offsets, frames = file["ids"].asstr()[:], file["offsets"][:], file["frames"][:]
                rows = {
                    video: frames[a:b]
                    for video, a, b in zip(ids, offsets, offsets[1:], strict=False)
                }
            else:
                rows = {}
                file.visititems(
                    lambda name, item: rows.update(
                        {name: item[:]} if isinstance(item, h5py.Dataset) else {}
                    )
                )
    return {video: (frames.dtype, frames.shape, frames.tobytes()) for video, frames in rows.items()}


def run(*words):
    return convert.main([str(word) for word in words])


def refusal(*words):
    with pytest.raises(InputError) as error:
        run(*words)
    return str(error.value)


def tree(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


# --- to --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_every_way_round_gives_the_same_bits_meta_and_checksum(dtype, tmp_path):
    ids = [
        video for video in IDS if video != "a/b"
    ]  # HDF5 and file systems differ on a video that is also a folder: below
    features = some_features(ids, dtype=dtype)
    expected = {
        video: (np.dtype(dtype), frames.shape, frames.tobytes())
        for video, frames in features.items()
    }
    origin = write_ours(tmp_path / "origin.hdf5", features, dtype, **META)
    checksum = FeatureStore(origin).checksum
    for number, order in enumerate(itertools.permutations(NAMES)):
        path = origin
        for layout in order:
            (folder := tmp_path / str(number)).mkdir(exist_ok=True)
            target = folder / NAMES[layout]
            run("to", path, target, "--layout", layout)
            assert bits(target) == expected
            store = convert.open_source(target)
            assert (store.meta, store.checksum) == (META, checksum) and store.dtype == dtype
            assert run("verify", target) == 0
            path = target
        assert not list(folder.glob(".*"))
    assert (tmp_path / "0" / NAMES["packed"]).read_bytes() == origin.read_bytes()


def test_the_layout_is_read_from_the_name(tmp_path):
    features = some_features(["a", "b/c"])
    run("to", write_npy(tmp_path / "folder", features), tmp_path / "x.hdf5")
    run("to", tmp_path / "x.hdf5", tmp_path / "back")
    with h5py.File(tmp_path / "x.hdf5") as file:
        assert "frames" in file
    assert bits(tmp_path / "back") == bits(tmp_path / "folder") == bits(tmp_path / "x.hdf5")
    assert "suffix" in refusal("to", tmp_path / "x.hdf5", tmp_path / "y.hdf5", "--layout", "npy")
    assert "suffix" in refusal("to", tmp_path / "x.hdf5", tmp_path / "y", "--layout", "packed")


def test_region_features_are_averaged_from_either_source(tmp_path, capsys):
    draw = np.random.default_rng(0)
    features = {video: draw.normal(size=(4, 9, 8)).astype(np.float32) for video in ("a", "b/c")}
    for source in (
        write_npy(tmp_path / "folder", features),
        write_released(tmp_path / "theirs.hdf5", features),
    ):
        run("to", source, tmp_path / "x.hdf5")
        store = FeatureStore(tmp_path / "x.hdf5")
        assert all(
            np.allclose(store[video], features[video].mean(1), atol=1e-6) for video in features
        )
        assert "averaged" in capsys.readouterr().err


def test_dtype_is_changed_only_when_asked_for_and_an_overflow_is_named(tmp_path):
    features = {
        "small": np.full((2, 4), 0.1, np.float32),
        "large": np.full((2, 4), 1e6, np.float32),
    }
    source = write_released(tmp_path / "x.hdf5", features)
    assert (
        "'large'" in (line := refusal("to", source, tmp_path / "y.hdf5", "--dtype", "float16"))
        and "float16" in line
    )
    assert not (tmp_path / "y.hdf5").exists()
    (tmp_path / "list").write_text("large\tis too large\n")
    run("to", source, tmp_path / "y.hdf5", "--dtype", "float16", "--without", tmp_path / "list")
    store = FeatureStore(tmp_path / "y.hdf5")
    assert (
        list(store) == ["small"]
        and store["small"].dtype == np.float16
        and (store["small"] == np.float16(0.1)).all()
    )


def test_a_file_name_that_is_not_text_is_refused(tmp_path):
    name = os.path.join(
        os.fsencode(write_npy(tmp_path / "folder", some_features(["a"]))), b"\xff.npy"
    )
    shutil.copy(tmp_path / "folder" / "a.npy", name)
    assert "not UTF-8" in refusal("to", tmp_path / "folder", tmp_path / "x.hdf5")


def test_only_what_is_bad_and_listed_is_left_out(tmp_path, capsys):
    features = some_features(["a", "b"]) | {
        "wide": np.ones((2, 9), np.float16),
        "flat": np.ones(8, np.float16),
    }
    source = write_released(tmp_path / "x.hdf5", features)
    (tmp_path / "list").write_text("wide\nnot there\n")
    assert "'flat'" in refusal("to", source, tmp_path / "y.hdf5", "--without", tmp_path / "list")
    (tmp_path / "list").write_text("wide\nnot there\nflat\nb\n")
    capsys.readouterr()
    run("to", source, tmp_path / "y.hdf5", "--without", tmp_path / "list")
    assert list(FeatureStore(tmp_path / "y.hdf5")) == ["a"]
    assert "1 of the 4 ids" in (told := capsys.readouterr().err) and "not there" in told
    (tmp_path / "list").write_text("wide\nflat\na\nb\n")
    assert "nothing would be left" in refusal(
        "to", source, tmp_path / "y.hdf5", "--without", tmp_path / "list"
    )


def test_big_endian_arrays_keep_their_values(tmp_path):
    features = some_features(["a", "b"], dtype=">f4")
    run("to", write_npy(tmp_path / "folder", features), tmp_path / "x.hdf5")
    store = FeatureStore(tmp_path / "x.hdf5")
    assert store.dtype == "<f4" and all(
        np.array_equal(store[video], features[video]) for video in features
    )
    assert run("verify", tmp_path / "x.hdf5") == 0


@pytest.mark.parametrize("source, target", [*itertools.product(NAMES, ["y.hdf5", "elsewhere"])])
def test_rows_that_have_changed_since_they_were_written_are_not_given_a_new_checksum(
    source, target, tmp_path
):
    features, path = some_features(["a", "b", "c"]), tmp_path / NAMES[source]
    run("to", write_ours(tmp_path / "origin.hdf5", features), path, "--layout", source)
    if source == "npy":
        np.save(path / "b.npy", features["b"] + 1)
    else:
        with h5py.File(path, "r+") as file:
            rows = file["b"] if source == "datasets" else file["frames"]
            rows[len(features["a"]) if source == "packed" else 0, 0] += 1
    for more in ([], ["--dtype", "float32"]):
        assert "'b' are not those that were written" in refusal(
            "to", path, tmp_path / target, *more
        )
    assert not (tmp_path / target).exists()
    (tmp_path / "bad").write_text("b")
    run("to", path, tmp_path / target, "--without", tmp_path / "bad")
    assert bits(tmp_path / target) == {
        video: row for video, row in bits(tmp_path / "origin.hdf5").items() if video != "b"
    }


FOREIGN = {
    "bytes": (np.array([b"caf\xe9", b"b"]), ["caf\ufffd", "b"]),
    "text": (np.array(["a", "b"], dtype=object), ["a", "b"]),
    "empty": (h5py.Empty("f4"), ""),
    "table": (np.array([(1, b"x")], dtype=[("n", "i4"), ("s", "S1")]), ["(1, b'x')"]),
    "numbers": (np.eye(2, dtype=np.float32), [[1, 0], [0, 1]]),
    "flag": (np.bool_(True), True),
}


def test_attributes_of_another_program_are_told_and_go_along_into_every_layout(tmp_path, capsys):
    path = write_packed(tmp_path / "theirs.hdf5", some_features(["a", "b"]))
    with h5py.File(path, "r+") as file:
        for name, (value, _) in FOREIGN.items():
            file.attrs[name] = value
    expected = {name: told for name, (_, told) in FOREIGN.items()}
    for name in ("x.hdf5", "folder", "y.hdf5"):
        path = run("to", path, tmp_path / name) or tmp_path / name
        capsys.readouterr()
        run("info", path, "--json")
        assert json.loads(capsys.readouterr().out)["meta"] == expected


def test_a_killed_conversion_leaves_no_half_and_the_next_one_is_whole(tmp_path):
    features = {f"v{i}": np.ones((50, 256), np.float16) for i in range(4000)}
    source = write_packed(tmp_path / "x.hdf5", features)
    for layout, name in (("npy", "folder"), ("packed", "y.hdf5")):
        words = "to", source, tmp_path / name, "--layout", layout
        process, before, deadline = (
            start(SCRIPT, *words),
            set(tmp_path.iterdir()),
            time.monotonic() + 60,
        )
        while set(tmp_path.iterdir()) == before and time.monotonic() < deadline:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        left = set(tmp_path.iterdir()) - before
        assert left and (process.returncode == 0 or all(path.name.startswith(".") for path in left))
        for folder in left:
            if folder.is_dir():
                (folder / "of another run.npy").touch()
        run(*words)
        assert (
            set(tmp_path.iterdir()) - before == {tmp_path / name}
            and run("verify", tmp_path / name) == 0
        )


# --- what cannot be ----------------------------------------------------------------------------------------------------


def test_ids_that_a_layout_cannot_hold_are_named_and_nothing_is_written_outside_the_folder(
    tmp_path,
):
    (tmp_path / "in").mkdir()
    for video in ("../escaped", "/absolute", "a//b", "a/./b", "", "a/"):
        source = write_ours(
            tmp_path / "in" / "x.hdf5", {"good": np.ones((1, 2)), video: np.ones((1, 2))}
        )
        before = tree(tmp_path)
        for layout in ("npy", "datasets"):
            assert repr(video) in refusal(
                "to", source, tmp_path / "in" / NAMES[layout], "--layout", layout
            )
        assert tree(tmp_path) == before
    source = write_ours(tmp_path / "in" / "x.hdf5", some_features(["a/b", "a/b/c"]))
    assert "'a/b'" in refusal("to", source, tmp_path / "y.hdf5", "--layout", "datasets")
    run("to", source, tmp_path / "folder")
    assert bits(tmp_path / "folder") == bits(source)


def test_bad_sources_and_targets_are_refused_by_name_and_left_as_they_are(tmp_path):
    features = some_features(["a", "b"])
    good = write_ours(tmp_path / "good.hdf5", features)
    nan = write_released(tmp_path / "nan.hdf5", features | {"sick": np.full((2, 8), np.nan)})
    wide = write_npy(tmp_path / "wide", features | {"broad": np.ones((2, 9), np.float16)})
    folders = {}
    for name, content in {
        "empty": b"",
        "text": b"no array",
        "cut": (wide / "a.npy").read_bytes()[:-1],
    }.items():
        folders[name] = write_npy(tmp_path / name, features)
        (folders[name] / "sub").mkdir()
        (folders[name] / "sub" / "sick.npy").write_bytes(content)
    np.save(
        write_npy(tmp_path / "objects", features) / "sick.npy", np.array([{}]), allow_pickle=True
    )
    (tmp_path / "hollow").mkdir()
    (tmp_path / "latin").write_bytes("ein Häuschen".encode("latin1"))
    before = tree(tmp_path)
    target = tmp_path / "y.hdf5"
    for source in (*folders.values(), tmp_path / "objects"):
        assert "sick.npy" in refusal("to", source, target)
    assert "'sick'" in refusal("to", nan, target) and "'broad'" in refusal("to", wide, target)
    assert "no video" in refusal("to", tmp_path / "hollow", target)
    assert "nowhere" in refusal("to", tmp_path / "nowhere", target)
    assert "UTF-8" in refusal("to", good, target, "--without", tmp_path / "latin")
    assert "is the input" in refusal("to", good, good) and "already exists" in refusal(
        "to", good, wide
    )
    assert tree(tmp_path) == before
    first, second = clis((SCRIPT, "to", nan, target), (SCRIPT, "to", nan))
    assert "'sick'" in one_error(first) and "target" in one_error(second)
    assert tree(tmp_path) == before


# --- merge and split -------------------------------------------------------------------------------------------------


def test_shards_merge_into_what_was_never_split(tmp_path):
    features = some_features(IDS)
    whole = write_ours(tmp_path / "whole.hdf5", features, **META)
    shards = []
    for i in range(3):
        part = {video: features[video] for video in IDS[i::3]}
        shards.append(write_ours(tmp_path / f"x.{i}of3.hdf5", part, **META))
    run("merge", *shards, "--output", tmp_path / "merged.hdf5")
    assert (tmp_path / "merged.hdf5").read_bytes() == whole.read_bytes()
    told = refusal("merge", *shards[1:], "--output", tmp_path / "some.hdf5")
    assert "2 of 3 shards" in told and "had no video wrote no file" in told
    run("merge", *shards[1:], "--some", "--output", tmp_path / "some.hdf5")
    assert set(FeatureStore(tmp_path / "some.hdf5")) == set(IDS) - set(IDS[::3])


def test_what_is_not_of_one_kind_is_not_merged(tmp_path):
    one = write_ours(tmp_path / "one.hdf5", some_features(["a", "b"]), **META)
    others = {
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
    for name, (features, dtype, meta, mentions) in others.items():
        other = write_ours(tmp_path / f"{name}.hdf5", features, dtype, **meta)
        line = refusal("merge", one, other, "--output", tmp_path / "y.hdf5")
        assert all(mention in line for mention in [*mentions, "one.hdf5", f"{name}.hdf5"]), line
    assert "is the input" in refusal("merge", one, "--output", one)
    assert not (tmp_path / "y.hdf5").exists()


def test_split_and_merge_give_the_file_back_and_ids_without_features_are_counted(tmp_path, capsys):
    source = write_ours(tmp_path / "x.hdf5", some_features(IDS), **META)
    (tmp_path / "one").write_text(
        f"{IDS[0]}\n\n{IDS[2]}\tof this one more is said\nnot there\n{IDS[0]}\n"
    )
    (tmp_path / "two").write_text(f"{IDS[4]}\n")
    parts = [tmp_path / f"{name}.hdf5" for name in ("first", "second", "rest")]
    run(
        "split",
        source,
        "--ids",
        tmp_path / "one",
        parts[0],
        "--ids",
        tmp_path / "two",
        parts[1],
        "--rest",
        parts[2],
    )
    assert "1 of the 3 ids" in (told := capsys.readouterr().err) and "not there" in told
    assert [set(FeatureStore(part)) for part in parts[:2]] == [{IDS[0], IDS[2]}, {IDS[4]}]
    run("merge", *parts, "--output", tmp_path / "y.hdf5")
    assert (tmp_path / "y.hdf5").read_bytes() == source.read_bytes()


def test_a_split_that_would_lose_or_mix_is_refused_before_anything_is_written(tmp_path):
    source = write_ours(tmp_path / "x.hdf5", some_features(IDS))
    (tmp_path / "one").write_text(IDS[0])
    (tmp_path / "none").write_text("not there")
    before, new = tree(tmp_path), tmp_path / "new.hdf5"
    assert "would be in" in refusal(
        "split", source, "--ids", tmp_path / "one", new, "--ids", tmp_path / "none", tmp_path / "y"
    )
    assert "same output" in refusal("split", source, "--ids", tmp_path / "one", new, "--rest", new)
    assert "list of ids" in refusal("split", source, "--ids", tmp_path / "absent", new)
    assert tree(tmp_path) == before


# --- info and verify -------------------------------------------------------------------------------------------------


def test_info_tells_what_is_in_a_store(tmp_path, capsys):
    features = {f"v{T}": np.ones((T, 8), np.float16) for T in range(1, 12)}
    path = write_ours(tmp_path / "x.hdf5", features, **META)
    run("info", path, "--json")
    facts = json.loads(capsys.readouterr().out)
    assert (facts["videos"], facts["frames"], facts["channels"], facts["dtype"]) == (
        11,
        66,
        8,
        "float16",
    )
    assert facts["lengths"] == {
        "mean": 6,
        "shortest": 1,
        "10 %": 2,
        "median": 6,
        "90 %": 10,
        "longest": 11,
    }
    assert facts["meta"] == META and facts["bytes"] == os.path.getsize(path)
    assert facts["checksum"] == FeatureStore(path).checksum
    run("info", path)
    table = capsys.readouterr().out
    assert (
        all(f"{name} " in table and str(value) in table for name, value in META.items())
        and facts["checksum"] in table
    )


def verify(path, capsys):
    """Exit status, {id: reason} and the summary of `verify`."""
    capsys.readouterr()
    status, told = run("verify", path), capsys.readouterr()
    return status, dict(line.split("\t") for line in told.out.splitlines()), told.err


@pytest.mark.parametrize("layout", NAMES)
def test_verify_names_every_bad_video_and_what_is_left_without_them_is_good(
    layout, tmp_path, capsys
):
    features = some_features(["a", "b/c", "d", "e", "f"], dtype=np.float32)
    features = {video: np.tile(rows, (3, 1)) for video, rows in features.items()}
    features["b/c"][1, 2], features["b/c"][2, 0], features["d"][:2] = np.nan, np.inf, 0
    write = {"packed": write_packed, "datasets": write_released, "npy": write_npy}[layout]
    bad = {"b/c", "d"}
    if layout != "packed":  # there every video has the one width
        features["wide"], bad = np.ones((3, 9), np.float32), bad | {"wide"}
    path = write(tmp_path / NAMES[layout], features)
    status, reasons, summary = verify(path, capsys)
    assert (
        status == 3 and set(reasons) == bad and f"{len(bad)} of {len(features)} videos" in summary
    )
    assert f"2 of its {features['b/c'].size} values are NaN or infinite" in reasons["b/c"]
    assert f"2 of its {len(features['d'])} rows are zero" in reasons["d"]
    (tmp_path / "bad.txt").write_text(
        "".join(f"{video}\t{reason}\n" for video, reason in reasons.items())
    )
    run("to", path, tmp_path / "good.hdf5", "--without", tmp_path / "bad.txt")
    assert verify(tmp_path / "good.hdf5", capsys)[:2] == (0, {})
    assert set(FeatureStore(tmp_path / "good.hdf5")) == set(features) - bad


def test_verify_goes_on_after_a_file_that_is_cut_short_and_it_can_be_left_out(tmp_path, capsys):
    features = some_features(["a", "b/c", "d", "e"])
    path = write_npy(tmp_path / "folder", features)
    os.truncate(path / "a.npy", 130)  # its header is whole
    (path / "b/c.npy").write_bytes(b"")
    status, reasons, summary = verify(path, capsys)
    assert status == 3 and set(reasons) == {"a", "b/c"} and "2 of 4 videos are bad" in summary
    assert all("cut short" in reason for reason in reasons.values())
    assert "'a' lies in a.npy, which was cut short" in refusal("to", path, tmp_path / "x.hdf5")
    (tmp_path / "bad").write_text(
        "".join(f"{video}\t{reason}\n" for video, reason in reasons.items())
    )
    run("to", path, tmp_path / "x.hdf5", "--without", tmp_path / "bad")
    assert set(bits(tmp_path / "x.hdf5")) == {"d", "e"}


@pytest.mark.parametrize("layout", NAMES)
def test_verify_finds_a_single_bit_that_has_changed(layout, tmp_path, capsys):
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
    assert (
        status == 3
        and reasons == {"v7": "its rows are not those that were written"}
        and "does not agree" in summary
    )


def test_verify_finds_a_video_that_is_lost_or_renamed_though_every_row_is_good(tmp_path, capsys):
    source = write_ours(tmp_path / "x.hdf5", some_features(["a", "b", "c"]))
    for layout in ("datasets", "npy"):
        path = tmp_path / NAMES[layout]
        for change in ("lost", "renamed"):
            run("to", source, path, "--layout", layout)
            if layout == "npy":
                (path / "b.npy").unlink() if change == "lost" else (path / "b.npy").rename(
                    path / "d.npy"
                )
            else:
                with h5py.File(path, "r+") as file:
                    if change == "renamed":
                        file["d"] = file["b"]
                    del file["b"]
            status, reasons, summary = verify(path, capsys)
            assert (status, reasons) == (3, {}) and "does not agree" in summary
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def test_a_foreign_file_is_verified_without_a_checksum_and_one_cut_short_is_bad_input(
    tmp_path, capsys
):
    path = write_released(tmp_path / "x.hdf5", some_features(IDS[:3]))
    status, reasons, summary = verify(path, capsys)
    assert (status, reasons) == (0, {}) and "no checksum" in summary
    path.write_bytes(path.read_bytes()[:-100])
    assert "x.hdf5" in one_error(cli(SCRIPT, "verify", path))
