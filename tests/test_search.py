"""Search one's own videos: what `search.py` finds and keeps, on a dozen short clips cut from the demo's film."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import extract_features
import faiss
import numpy as np
import pca as pca_script
import pytest
import torch
from helpers.commands import ROOT, cli, environment, one_error, start
from helpers.oracles import by_loop

from datasets.demo import edits, plan
from model import TCA, build_encoder
from retrieval.similarity import similarity
from search import VideoIndex, print_matches
from utils import InputError, load_torch
from videoindex import calibrate
from videoindex.index import METRIC, missing, unit
from videoindex.nearest import Nearest
from videoindex.pipeline import SHIPPED, Model
from videoindex.store import Store

FILM = ROOT / "datasets" / "demo" / "film.mp4"
ODD = 'new\nline, <b>&"Кино" 映画.mp4'
CLIPS = {  # name: pieces of the film in seconds, edits
    "a.mp4": ([(100, 108)], []),
    "a mirrored.mp4": ([(100, 108)], [["mirror", {}]]),
    "a bordered.mp4": ([(100, 108)], [["letterbox", {"keep": 0.8, "colour": "black"}]]),
    "b.mp4": ([(200, 208)], []),
    "b faster.mp4": ([(200, 208)], [["faster", {"factor": 1.25}]]),
    "c.mp4": ([(300, 308)], []),
    "c inside.mp4": ([(40, 44), (301, 306), (450, 453)], []),
    ODD: ([(150, 154)], []),
    "folder/d.mp4": ([(250, 254)], []),
    "folder/e.mp4": ([(350, 354)], []),
}


def cut(path, pieces, changes=()):
    """Write a clip of the film."""
    encoding = {"codec": "h264", "height": 160, "rate": 12, "bits": 0.2}
    path.parent.mkdir(parents=True, exist_ok=True)
    edits.render(
        plan.Clip(
            "", "", "", "", 0, tuple(plan.Piece(*p) for p in pieces), tuple(changes), encoding
        ),
        FILM,
        path,
    )
    return path


@pytest.fixture(scope="session")
def model():
    return Model(workers=1)


@pytest.fixture(scope="session")
def library(tmp_path_factory, model):
    """The clips, and an index of them made by the command line. Not to be changed: `copy` is."""
    folder = tmp_path_factory.mktemp("library")
    videos, index = folder / "videos", folder / "index"
    for name, clip in CLIPS.items():
        cut(videos / name, *clip)
    made = cli("search.py", "index", videos, "--index", index, "--workers", 1)
    assert made.returncode == 0, made.stderr
    return SimpleNamespace(folder=folder, videos=videos, index=index, made=made, model=model)


@pytest.fixture
def copy(library, tmp_path):
    """The library again, in a folder of its own: the index knows the files by their place, so it is told of the new one."""
    shutil.copytree(library.index, tmp_path / "index")
    return VideoIndex(tmp_path / "index", model=library.model)


def contents(index):
    """{path: (frames, pieces, thumbnails)} as stored, for comparison."""
    found = {}
    for path, (_, _, number) in index.store.known().items():
        data = index.store.data(index.store.content(number))
        found[path] = tuple(data.values())
    return found


class about:  # noqa: N801 - reads as pytest.approx does
    """Equal to stored frame descriptors that differ in the last bits: those depend on what else was described with them."""

    def __init__(self, data):
        self.values = np.frombuffer(data, np.float16).astype(float)

    def __eq__(self, data):
        return np.frombuffer(data, np.float16).astype(float) == pytest.approx(self.values, abs=2e-3)


# --- what is found ---------------------------------------------------------------------------------------------------


def test_a_video_against_itself_scores_one_and_matches_from_end_to_end(library):
    result = cli(
        "search.py",
        "query",
        library.videos / "a.mp4",
        library.videos / ODD,
        "--index",
        library.index,
        "--json",
    )
    assert result.returncode == 0, result.stderr
    answer, odd = json.loads(result.stdout)
    assert odd["clip"] == odd["matches"][0]["path"] == str(library.videos / ODD)
    first = answer["matches"][0]
    assert first["path"] == str(library.videos / "a.mp4")
    assert first["score"] == pytest.approx(1, abs=1e-4)
    assert (
        first["stretches"][0]["query"]
        == first["stretches"][0]["video"]
        == pytest.approx([0, 8], abs=0.1)
    )


def test_copies_stand_above_strangers(library):
    index = VideoIndex(library.index, model=library.model)
    for clip, copies in (
        ("a.mp4", {"a mirrored.mp4", "a bordered.mp4"}),
        ("b.mp4", {"b faster.mp4"}),
        ("c.mp4", {"c inside.mp4"}),
    ):
        matches = index.query(library.videos / clip, top=20, threshold=-1)
        names = [os.path.relpath(match.path, library.videos) for match in matches]
        assert len(matches) == len(CLIPS)
        assert names[0] == clip and set(names[1 : 1 + len(copies)]) == copies


def test_stretches_lie_where_the_copies_were_cut(library):
    index = VideoIndex(library.index, model=library.model)

    def place(clip, found):
        matches = {
            os.path.basename(match.path): match
            for match in index.query(library.videos / clip, top=20, threshold=-1)
        }
        return matches[found].stretches[0][:4]

    assert place("c.mp4", "c inside.mp4") == pytest.approx((1, 6, 4, 9), abs=1)
    assert place("b.mp4", "b faster.mp4") == pytest.approx((0, 8, 0, 6.4), abs=1)
    assert place("a mirrored.mp4", "a bordered.mp4") == pytest.approx((0, 8, 0, 8), abs=1)


def test_the_score_is_the_metric_of_the_stored_descriptors_and_the_shortlist_is_by_video_descriptors(
    library,
):
    index = VideoIndex(library.index, model=library.model)
    (clip,) = index.describe([library.videos / "c.mp4"])
    near = [
        float((index.store.videos()[row["piece"]] * clip.pieces[0]).sum())
        for row in index.store.rows()
    ]
    shortlist = np.argsort([-value for value in near], kind="stable")[:4]
    rows = list(index.store.rows())
    for metric in ("sym_chamfer", "chamfer"):
        expected = {}
        for i in shortlist:
            s = unit(clip.frames) @ unit(index.store.frames(rows[i])).T
            forth, back = s.max(1).mean(), s.max(0).mean()
            expected[rows[i]["id"]] = (forth + back) / 2 if metric == "sym_chamfer" else forth
        matches = index.query(clip, top=4, threshold=-1, shortlist=4, metric=metric)
        assert [match.content for match in matches] == sorted(
            expected, key=lambda number: -expected[number]
        )
        for match in matches:
            assert match.score == pytest.approx(min(expected[match.content], 1), abs=1e-5)
            assert match.score == pytest.approx(
                similarity(
                    unit(clip.frames),
                    unit(index.store.frames(index.store.content(match.content))),
                    metric,
                ),
                abs=1e-5,
            )


def test_threshold_and_top_cut_the_list(library):
    index = VideoIndex(library.index, model=library.model)
    (clip,) = index.describe([library.videos / "a.mp4"])
    everything = index.query(clip, top=20, threshold=-1)
    limit = everything[2].score
    assert [m.path for m in index.query(clip, threshold=limit)] == [m.path for m in everything[:3]]
    assert [m.path for m in index.query(clip, top=2, threshold=-1)] == [
        m.path for m in everything[:2]
    ]


def test_duplicates_are_the_components_of_all_pairs_that_reach_the_threshold(library):
    index = VideoIndex(library.index, model=library.model)
    rows, threshold, radius = list(index.store.rows()), 0.35, 0.3
    parent = {row["id"]: row["id"] for row in rows}

    def root(number):
        return number if parent[number] == number else root(parent[number])

    for a in rows:
        for b in rows:
            near = index.store.videos()[a["piece"]] @ index.store.videos()[b["piece"]] >= radius
            if (
                near
                and similarity(
                    unit(index.store.frames(a)), unit(index.store.frames(b)), "sym_chamfer"
                )
                >= threshold
            ):
                parent[root(a["id"])] = root(b["id"])
    expected = {}
    for row in rows:
        expected.setdefault(root(row["id"]), set()).add(row["id"])
    groups = index.duplicates(threshold, radius)
    assert {frozenset(group.files) for group in groups} == {
        frozenset(ids) for ids in expected.values() if len(ids) > 1
    }
    assert len(groups) >= 2, "a test of one group would not tell components"
    names = [{os.path.basename(path) for path in group.paths} for group in groups]
    assert any({"a.mp4", "a mirrored.mp4", "a bordered.mp4"} <= group for group in names)


# --- what is kept ----------------------------------------------------------------------------------------------------


def test_the_index_holds_every_video_and_says_so(library):
    assert f"{len(CLIPS)} videos; {len(CLIPS)} added, 0 replaced" in library.made.stdout
    index = VideoIndex.load(library.index)
    assert set(index.store.known()) == {str(library.videos / name) for name in CLIPS}
    seconds = {
        os.path.relpath(path, library.videos): index.store.content(facts[2])["seconds"]
        for path, facts in index.store.known().items()
    }
    assert seconds["b.mp4"] == pytest.approx(8, abs=0.1) and seconds[
        "b faster.mp4"
    ] == pytest.approx(6.4, abs=0.1)


def test_the_index_grows_by_what_is_added_and_no_more(library):
    store = Store(library.index)
    frames = sum(row["frames"] for row in store.rows())
    assert store.path("frames").stat().st_size == frames * 512 * 2
    assert (
        store.path("videos").stat().st_size == sum(row["pieces"] for row in store.rows()) * 512 * 4
    )
    images = [store.thumbnails(row, range(row["frames"])) for row in store.rows()]
    assert store.path("thumbnails").stat().st_size == sum(
        len(jpeg) for shots in images for jpeg in shots
    )
    assert all(
        jpeg[:2] == b"\xff\xd8" and jpeg[-2:] == b"\xff\xd9" for shots in images for jpeg in shots
    )


def test_running_again_changes_nothing(library):
    before = {
        path.name: (path.read_bytes(), path.stat().st_mtime_ns)
        for path in library.index.iterdir()
        if path.name != "lock"
    }
    changes = VideoIndex(library.index, model=library.model).add([library.videos])
    assert (changes.unchanged, changes.added, changes.replaced) == (len(CLIPS), 0, 0)
    assert before == {
        p.name: (p.read_bytes(), p.stat().st_mtime_ns)
        for p in library.index.iterdir()
        if p.name != "lock"
    }


def test_a_changed_file_replaces_its_entry_and_no_other(copy, library, tmp_path):
    target = tmp_path / "one.mp4"
    shutil.copy(library.videos / "a.mp4", target)
    copy.add([target])
    before = contents(copy)
    shutil.copy(library.videos / "folder" / "d.mp4", target)
    os.truncate(target, target.stat().st_size)
    with open(target, "ab") as file:
        file.write(b"\0" * 8)  # other content than d.mp4's, the same picture
    changes = copy.add([target])
    assert (changes.added, changes.replaced) == (0, 1)
    after = contents(copy)
    assert after.pop(str(target))[0] == about(before[str(library.videos / "folder" / "d.mp4")][0])
    before.pop(str(target))
    assert after == before and not list(copy.store.damage())


def test_removal_leaves_the_others_and_is_compacted(copy, library):
    before = contents(copy)
    count, strange = copy.remove([library.videos / "folder", "/nowhere.mp4"])
    assert (count, strange) == (2, ["/nowhere.mp4"])
    kept = [name for name in CLIPS if name in ("b.mp4", ODD)]
    copy.remove([library.videos / name for name in CLIPS if name not in kept])
    assert copy.store.settings["generation"] > 0 and copy.store.holes() == 0
    assert contents(copy) == {
        path: data
        for path, data in before.items()
        if path in {str(library.videos / k) for k in kept}
    }
    assert not list(copy.store.damage()) and len(copy) == 2
    assert len(list(copy.folder.glob("frames-*"))) == 1
    assert [m.path for m in copy.query(library.videos / "b.mp4", threshold=-1)][0] == str(
        library.videos / "b.mp4"
    )
    copy.remove([library.videos / name for name in kept])
    assert len(copy) == 0 and copy.query(library.videos / "b.mp4") == []


def test_files_that_are_gone_are_forgotten_only_when_asked(copy, library, tmp_path):
    folder = tmp_path / "more"
    folder.mkdir()
    shutil.copy(library.videos / "a.mp4", folder / "x.mp4")
    copy.add([folder])
    (folder / "x.mp4").unlink()
    assert copy.add([folder]).removed == 0 and str(folder / "x.mp4") in copy.store.known()
    assert copy.add([folder], prune=True).removed == 1
    assert str(folder / "x.mp4") not in copy.store.known() and len(copy) == len(CLIPS)


def test_a_killed_run_leaves_a_good_index_and_the_next_ends_as_an_unbroken_one(library, tmp_path):
    index = tmp_path / "index"
    process = start("search.py", "index", library.videos, "--index", index, "--workers", 1)
    done, deadline = 0, time.monotonic() + 240
    while done < 2 and process.poll() is None and time.monotonic() < deadline:
        if (index / "index.db").exists():
            done = len(VideoIndex(index))
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    stopped = VideoIndex(index, model=library.model)
    held = len(stopped)
    assert 2 <= held < len(CLIPS) and not list(stopped.store.damage())
    changes = stopped.add([library.videos])
    assert changes.unchanged == held and changes.added == len(CLIPS) - held
    whole, again = contents(VideoIndex(library.index)), contents(stopped)
    assert whole.keys() == again.keys() and not list(stopped.store.damage())
    for path, (frames, *_) in whole.items():
        assert again[path][0] == about(frames)


def test_bytes_that_no_transaction_vouches_for_are_overwritten(copy, library, tmp_path):
    """What a kill between the data and the commit leaves; and a compaction that was not turned to."""
    before = contents(copy)
    for kind in ("frames", "videos", "thumbnails"):
        with open(copy.store.path(kind), "ab") as file:
            file.write(b"half a video")
    (copy.folder / "frames-7.f16").write_bytes(b"half a generation")
    assert (
        not list(VideoIndex(copy.folder).store.damage())
        and contents(VideoIndex(copy.folder)) == before
    )
    target = cut(tmp_path / "new.mp4", [(120, 123)])
    copy.add([target])
    after = contents(copy)
    assert after.pop(str(target)) and after == before and not list(copy.store.damage())
    assert not (copy.folder / "frames-7.f16").exists()


def test_a_failed_write_takes_nothing_back(copy, monkeypatch, tmp_path):
    """Whichever step fails, the index is as it was: oracle, the stored bytes."""
    before = contents(copy)
    row = next(iter(copy.store.rows()))
    described = SimpleNamespace(
        frames=np.array(copy.store.frames(row)),
        pieces=np.array(copy.store.videos()[:1]),
        thumbnails=[b"jpeg"] * row["frames"],
        seconds=1.0,
    )
    for step in ("_append", "_set", "_link"):
        with monkeypatch.context() as patch:
            patch.setattr(
                copy.store,
                step,
                lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left on device")),
            )
            with copy.store.writing(), pytest.raises(InputError, match="No space left"):
                copy.store.put("0" * 64, described, [("/x.mp4", 1, 1)])
        assert contents(copy) == before and not list(copy.store.damage())
        sizes = [copy.store.path(kind).stat().st_size for kind in ("frames", "videos")]
        assert sizes == [
            copy.store.settings["ends"][0] * 1024,
            copy.store.settings["ends"][1] * 2048,
        ]


def test_verify_names_the_damaged_video(library, tmp_path):
    index = tmp_path / "index"
    shutil.copytree(library.index, index)
    store = Store(index)
    assert not list(store.damage())
    row = store.content(store.known()[str(library.videos / "b.mp4")][2])
    with open(store.path("frames"), "r+b") as file:
        file.seek(row["frame"] * 1024 + 5)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))
    result = cli("search.py", "verify", "--index", index)
    lines = [line for line in result.stdout.splitlines() if "its data is damaged" in line]
    assert result.returncode == 3 and len(lines) == 1 and "b.mp4" in lines[0], result.stdout


# --- FAISS -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["HNSW16", "PCA8,IVF2,Flat"])
def test_other_index_types_agree_with_the_exact_one_are_kept_and_take_more(
    copy, library, kind, tmp_path
):
    exact = VideoIndex(copy.folder, model=library.model)
    (clip,) = exact.describe([library.videos / "c.mp4"])
    index = VideoIndex(copy.folder, index_type=kind, model=library.model)
    asked = [(match.path, match.score) for match in index.query(clip, top=20, threshold=-1)]
    assert asked == [
        (match.path, match.score) for match in exact.query(clip, top=20, threshold=-1)
    ], "all are shortlisted, so all agree"
    index.save()
    (saved,) = copy.folder.glob("ann-*.faiss")
    assert faiss.read_index(str(saved)).ntotal == len(index.store.videos())
    shutil.copy(library.videos / "a.mp4", tmp_path / "same.mp4")
    with open(tmp_path / "same.mp4", "ab") as file:
        file.write(b"\0" * 8)
    index.add([tmp_path / "same.mp4"])
    again = VideoIndex(copy.folder, index_type=kind, model=library.model)
    assert again.nearest.index.ntotal == len(index.store.videos()) == len(CLIPS) + 1
    assert str(tmp_path / "same.mp4") in [
        match.path for match in again.query(library.videos / "a.mp4", top=20, threshold=-1)
    ]
    assert again.duplicates(0.5, 0.3)


def test_index_types_that_cannot_be_are_one_line(library, tmp_path):
    index = tmp_path / "index"
    shutil.copytree(library.index, index)
    assert "FAISS factory string" in one_error(
        cli("search.py", "duplicates", "--index", index, "--index_type", "Nonsense3")
    )
    with pytest.raises(InputError, match="cannot be trained on 10 descriptors"):
        VideoIndex(index, index_type="IVF4096,Flat", model=library.model).query(
            library.videos / "a.mp4"
        )


def test_the_nearest_are_those_of_a_loop_holes_and_windows_included(tmp_path):
    """A made-up store: videos of one to four windows, a third of them removed."""
    draw, size = np.random.default_rng(5), 16
    store = Store.create(tmp_path / "index", size, {"identity": {"fps": "1"}})
    kept = {}
    with store.writing():
        for i in range(60):
            pieces = unit(draw.normal(size=(draw.integers(1, 5), size)))
            frames = unit(draw.normal(size=(3, size))).astype(np.float16)
            described = SimpleNamespace(
                frames=frames, pieces=pieces, thumbnails=[b"x"] * 3, seconds=3.0
            )
            store.put(f"{i:064}", described, [(f"/v{i}", 1, 1)])
            kept[i + 1] = pieces
        gone = [i for i in range(60) if i % 3 == 0]
        store.remove([f"/v{i}" for i in gone])
    for i in gone:
        kept.pop(i + 1)
    query = unit(draw.normal(size=(2, size)))
    best = {number: float((query @ pieces.T).max()) for number, pieces in kept.items()}
    expected = sorted(best, key=lambda number: -best[number])[:25]
    nearest = Nearest(store)
    assert [number for number, _ in nearest.search(query, 25)] == expected
    assert [value for _, value in nearest.search(query, 25)] == pytest.approx(
        [best[number] for number in expected], abs=1e-5
    )
    assert len(nearest.search(query, 1000)) == len(kept)
    pairs = {(a, b) for a in kept for b in kept if a < b and (kept[a] @ kept[b].T).max() >= 0.5}
    assert pairs and set(nearest.range_search(0.5, batch=7)) == pairs


# --- the evaluation ---------------------------------------------------------------------------------------------------


def test_the_ranking_has_the_map_of_evaluation_py_on_features_extracted_apart(library, tmp_path):
    """extract_features.py, pca.py and evaluation.py --rerank beside `VideoIndex.query`: two roads from files to DSVR."""
    ids = {path: f"v{i}" for i, path in enumerate(VideoIndex(library.index).store.known())}
    listed = tmp_path / "list.tsv"
    for path, video in ids.items():  # a list file has no place for a name with a line break
        os.symlink(path, tmp_path / f"{video}.mp4")
    listed.write_text("".join(f"{video}\t{tmp_path / video}.mp4\n" for video in ids.values()))
    extract_features.main([str(listed), "--output", str(tmp_path / "raw.hdf5"), "--workers", "1"])
    pca_script.main(
        [
            "apply",
            str(tmp_path / "raw.hdf5"),
            "--pca",
            str(SHIPPED / "pca.npz"),
            "--output",
            str(tmp_path / "x.hdf5"),
        ]
    )
    copies = {
        "a.mp4": ["a mirrored.mp4", "folder/d.mp4"],
        "c.mp4": ["c inside.mp4", ODD],
        "b.mp4": ["folder/e.mp4"],
    }
    annotation = {
        ids[str(library.videos / query)]: {
            "ND": [ids[str(library.videos / name)] for name in names],
            "DS": [],
            "CS": [],
            "IS": [],
        }
        for query, names in copies.items()
    }  # strangers among them, so that the figure is not 1
    (tmp_path / "demo.json").write_text(json.dumps(annotation))
    (tmp_path / "demo_ids.txt").write_text("\n".join(ids.values()) + "\n")
    R = 5
    result = cli(
        *(
            "evaluation.py",
            "--dataset",
            "DEMO",
            "--annotation_dir",
            tmp_path,
            "--feature_path",
            tmp_path / "x.hdf5",
        ),
        *(
            "--model_path",
            SHIPPED,
            "--metric",
            METRIC,
            "--rerank",
            R,
            "--output",
            tmp_path / "results.json",
        ),
    )
    assert result.returncode == 0, result.stderr
    figures = json.loads((tmp_path / "results.json").read_text())["figures"]
    (expected,) = {
        round(row["DSVR"], 6) for name, rows in figures.items() for row in rows if str(R) in name
    }
    index, similarities = VideoIndex(library.index, model=library.model), {}
    for query in copies:
        (clip,) = index.describe([library.videos / query])
        first = [match.path for match in index.query(clip, top=R, shortlist=R, threshold=-2)]
        rest = [
            index.store.paths(number)[0]
            for number, _ in index.nearest.search(clip.pieces, len(index))
        ]
        order = [ids[path] for path in dict.fromkeys(first + rest)]
        similarities[ids[str(library.videos / query)]] = {
            video: -rank for rank, video in enumerate(order)
        }
    found = by_loop(similarities, annotation, list(ids.values()), set(ids.values()))["DSVR"]
    assert 0.2 < found < 1 and found == pytest.approx(expected, abs=1e-6)


# --- models ----------------------------------------------------------------------------------------------------------


def test_another_model_is_refused_in_one_line(library):
    query = ("search.py", "query", library.videos / "a.mp4", "--index", library.index)
    assert "made with encoder 'tca sha256" in one_error(cli(*query, "--encoder", "mean"))
    with pytest.raises(InputError, match="made with fps '1', this model has '2'"):
        VideoIndex(library.index, fps="2")
    with pytest.raises(InputError, match="made with pca"):
        VideoIndex(library.index, encoder="mean", pca=SHIPPED / "pca.npz", components=256)


def test_a_short_video_gets_the_encoders_own_descriptors_and_a_long_one_those_of_its_windows(model):
    rows = np.abs(np.random.default_rng(3).normal(size=(130, 1752))).astype(np.float16)
    encoder = build_encoder(load_torch(SHIPPED / "model.pth"), "")
    x = torch.from_numpy(model.projection(rows).astype(np.float16)).float()
    with torch.inference_mode():
        for T, cuts in ((60, [(0, 60)]), (130, [(0, 44), (44, 87), (87, 130)])):
            frames, pieces = model.encode(rows[:T])
            for piece, (a, b) in zip(pieces, cuts, strict=True):
                length = torch.tensor([b - a])
                assert piece == pytest.approx(encoder(x[None, a:b], length)[0].numpy(), abs=1e-5)
                assert frames[a:b] == pytest.approx(
                    encoder.encode(x[None, a:b], length)[0].numpy(), abs=1e-3
                )


def test_the_shipped_files_are_small_and_calibrated_for_what_they_are(model):
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) < 10e6
    assert 0 < model.calibration["threshold"] <= model.calibration["copies_threshold"] < 1
    assert model.calibration["precision"] >= 0.99
    assert set(model.calibration["recall_by_kind"]) >= {
        "mirrored",
        "bordered",
        "captioned",
        "re-coloured",
        "speed-changed",
        "trimmed",
    }


def test_torch_hub_gives_the_encoder(tmp_path):
    x, num_frames = torch.randn(2, 5, 512), torch.tensor([5, 3])
    shipped = torch.hub.load(str(ROOT), "tca", source="local", trust_repo=True)
    with torch.inference_mode():
        expected = build_encoder(load_torch(SHIPPED / "model.pth"), "")(x, num_frames)
        assert torch.equal(shipped(x, num_frames), expected)
        torch.save(TCA(64, nhead=4, dim_feedforward=32).state_dict(), tmp_path / "bare.pth")
        bare = torch.hub.load(
            str(ROOT),
            "tca",
            source="local",
            trust_repo=True,
            pretrained=str(tmp_path / "bare.pth"),
            nhead=4,
        )
        assert bare(x[..., :64], num_frames).shape == (2, 64)
        new = torch.hub.load(
            str(ROOT),
            "tca",
            source="local",
            trust_repo=True,
            pretrained=False,
            feature_size=32,
            nhead=2,
        )
        assert new.encode(x[..., :32], num_frames).shape == (2, 5, 32)


# --- bad input -------------------------------------------------------------------------------------------------------


def test_odd_names_stay_on_one_line_and_come_back_whole(library):
    table = cli("search.py", "query", library.videos / ODD, "--index", library.index)
    assert table.returncode == 0, table.stderr
    named = [line for line in table.stdout.splitlines() if "Кино" in line]
    assert named and all("new\\nline" in line and "映画" in line for line in named)


def test_a_name_that_is_not_utf8_is_indexed_and_printed(copy, library, tmp_path, capsys):
    path = os.fsencode(tmp_path) + b"/caf\xe9.mp4"
    shutil.copy(os.fsencode(library.videos / "folder" / "e.mp4"), path)
    copy.add([tmp_path])
    assert os.fsdecode(path) in copy.store.known()
    (clip,) = copy.describe([os.fsdecode(path)])
    print_matches(clip, copy.query(clip))
    assert "caf\\xe9.mp4" in capsys.readouterr().out


def test_bad_files_are_named_and_the_rest_goes_on(library, tmp_path):
    folder, index = tmp_path / "videos", tmp_path / "index"
    cut(folder / "good.mp4", [(400, 403)])
    shutil.copy(folder / "good.mp4", folder / "same content.mp4")
    (folder / "broken.mp4").write_bytes(b"no video" * 100)
    (folder / "empty.mp4").touch()
    (folder / "inner").mkdir()
    (folder / "inner" / "up").symlink_to(folder)  # a loop of folders
    (folder / "round.mp4").symlink_to(folder / "about.mp4")  # a loop of files
    (folder / "about.mp4").symlink_to(folder / "round.mp4")
    os.mkfifo(folder / "pipe.mp4")
    (folder / "notes.txt").write_text("no video, and not tried")
    result = cli(
        "search.py", "index", folder, tmp_path / "nowhere.mp4", "--index", index, "--workers", 1
    )
    skipped = {
        line.removeprefix("skipped ").split(": ")[0].rpartition("/")[2]
        for line in result.stderr.splitlines()
        if "skipped" in line
    }
    assert result.returncode == 3, result.stderr
    assert skipped == {
        "broken.mp4",
        "empty.mp4",
        "round.mp4",
        "about.mp4",
        "pipe.mp4",
        "nowhere.mp4",
    }
    assert (
        "2 videos; 1 added, 0 replaced, 1 of known content" in result.stdout
        and "6 failed" in result.stdout
    )
    made = VideoIndex(index, model=library.model)
    (group,) = made.duplicates()
    assert {os.path.basename(path) for path in group.paths} == {"good.mp4", "same content.mp4"}
    made.remove([folder / "good.mp4"])
    (match,) = made.query(folder / "good.mp4")
    assert match.path == str(folder / "same content.mp4") and match.score == pytest.approx(
        1, abs=1e-4
    )


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_files_and_folders_are_named(copy, library, tmp_path):
    (tmp_path / "shut.mp4").write_bytes(b"x")
    (tmp_path / "shut.mp4").chmod(0)
    assert [reason for _, reason in copy.add([tmp_path / "shut.mp4"]).failed] == [
        "Permission denied"
    ]


def test_bad_clips_are_one_line_each(library, tmp_path):
    (tmp_path / "broken.mp4").write_bytes(b"no video" * 100)
    clips = [
        library.videos,
        tmp_path / "broken.mp4",
        tmp_path / "nowhere.mp4",
        library.videos / "a.mp4",
    ]
    result = cli("search.py", "query", *clips, "--index", library.index)
    lines = result.stderr.splitlines()
    assert result.returncode == 3 and len(lines) == 3, result.stderr
    assert "folder" in lines[0] and "broken.mp4" in lines[1] and "not there" in lines[2]
    assert "1.000" in result.stdout


def test_what_is_no_index_is_one_line(library, tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        VideoIndex.load(tmp_path / "none")
    with pytest.raises(InputError, match="no index.db"):
        VideoIndex.load(library.videos)
    (tmp_path / "index.db").write_bytes(b"SQLite it is not" * 100)
    assert "not a database" in one_error(cli("search.py", "info", "--index", tmp_path))


def test_options_and_sources_that_cannot_be_make_no_index(tmp_path):
    for options in (
        {"fps": "abc"},
        {"fps": "0"},
        {"pooling": "none", "encoder": "mean"},
        {"window": 0},
        {"colour": "red"},
    ):
        with pytest.raises(InputError):
            VideoIndex(tmp_path / "index", **options).add([FILM])
    with pytest.raises(InputError, match="nothing to index"):
        VideoIndex(tmp_path / "index").add([tmp_path / "nowhere"])
    assert not (tmp_path / "index").exists()


def test_a_folder_that_could_not_be_looked_into_is_not_taken_for_empty():
    known, failed = (
        ["/v/a.mp4", "/v/shut/b.mp4", "/v/gone.mp4", "/w/c.mp4"],
        [("/v/shut", "Permission denied")],
    )
    assert missing(known, ["/"], [("/v/a.mp4", 1, 1), ("/w/c.mp4", 1, 1)], failed) == [
        "/v/gone.mp4"
    ]


def test_two_writers_do_not_meet(copy, library):
    other = VideoIndex(copy.folder, model=library.model)
    with copy.store.writing(), pytest.raises(InputError, match="written by another process"):
        other.add([library.videos])


def test_a_disk_that_fills_is_one_line_and_loses_nothing(library, tmp_path):
    """No file may grow beyond 40 KiB (RLIMIT_FSIZE): what a full disk does to a write, without a disk of its own."""
    index = tmp_path / "index"
    command = 'ulimit -f 40; exec "$0" search.py index "$1" --index "$2" --workers 1'
    result = subprocess.run(
        ["bash", "-c", command, sys.executable, library.videos, index],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode == 2 and len(lines) == 1 and "Traceback" not in result.stderr, (
        result.stderr
    )
    stopped = VideoIndex(index, model=library.model)
    held = len(stopped)
    assert 0 < held < len(CLIPS) and not list(stopped.store.damage())
    assert stopped.add([library.videos]).added == len(CLIPS) - held and not list(
        stopped.store.damage()
    )


# --- calibration -----------------------------------------------------------------------------------------------------


def test_the_threshold_is_the_least_that_keeps_the_precision():
    draw = np.random.default_rng(11)
    scores = draw.uniform(size=400)
    right = draw.uniform(size=400) < scores**0.2
    threshold = calibrate.threshold_of(scores, right, 0.95)
    allowed = [s for s in scores if right[scores >= s].mean() >= 0.95]
    assert threshold == min(allowed) and (scores >= threshold).sum() > 10
    assert calibrate.threshold_of(scores, np.zeros(400, bool)) == float("inf")


def test_true_places_follow_from_how_a_copy_was_made():
    part = calibrate.Part.__new__(calibrate.Part)
    part.facts = {
        "q": {"segments": [{"film": [100.0, 110.0], "video": [0.0, 10.0]}]},
        "v": {
            "segments": [
                {"film": [0.0, 4.0], "video": [0.0, 2.0]},
                {"film": [104.0, 120.0], "video": [2.0, 10.0]},
            ]
        },  # twice as fast
    }
    assert part.true_places("q", "v") == [(4.0, 10.0, 2.0, 5.0)]
