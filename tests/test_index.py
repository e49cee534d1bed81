"""VideoIndex: what it finds, and what it keeps, on ten clips of the demo's film."""

import os
import shutil
import signal
import time

import faiss
import numpy as np
import pytest
from helpers.commands import start
from helpers.library import (
    CLIPS,
    ODD,
    AlmostEqual,
    cut_clip,
    damage,
    stored_data,
)

import search
from datasets.demo import edits
from utils import InputError
from videoindex.comparison import l2_normalise
from videoindex.evidence import find_stretches
from videoindex.index import VideoIndex
from videoindex.output import print_matches
from videoindex.pipeline import SHIPPED


def test_search_still_gives_video_index():
    """Programs that were written for revision 5aa4c1c have `from search import VideoIndex`."""
    assert search.VideoIndex is VideoIndex


# --- queries ------------------------------------------------------------------------------------


def test_query_ranks_copies_above_strangers(library):
    index = library.open()
    for clip, copies in (
        ("a.mp4", {"a mirrored.mp4", "a bordered.mp4"}),
        ("b.mp4", {"b faster.mp4"}),
        ("c.mp4", {"c inside.mp4"}),
    ):
        matches = index.query(library.clip(clip), top=20, threshold=0)
        names = [os.path.relpath(match.path, library.videos) for match in matches]
        assert names[0] == clip and set(names[1 : 1 + len(copies)]) == copies
        assert len(matches) > 1 + len(copies), "of strangers too: nothing is cut off"


def test_query_segments_lie_where_the_copies_were_cut(library):
    index = library.open()

    def best_segment(clip, found):
        for match in index.query(library.clip(clip), top=20, threshold=0):
            if os.path.basename(match.path) == found:
                return match.segments[0][:4]

    assert best_segment("c.mp4", "c inside.mp4") == pytest.approx((1, 6, 4, 9), abs=1)
    assert best_segment("b.mp4", "b faster.mp4") == pytest.approx((0, 8, 0, 6.4), abs=1)
    assert best_segment("a mirrored.mp4", "a bordered.mp4") == pytest.approx((0, 8, 0, 8), abs=1)


def test_query_score_is_the_evidence_of_the_stored_descriptors(library):
    """And the shortlist is by window descriptors."""
    index, clip = library.open(), library.clip("a.mp4")
    store, contents = index.store, list(index.store.contents())
    frames = l2_normalise(clip.frame_descriptors)
    nearness = []
    for content in contents:
        windows = store.window_descriptors(content)
        nearness.append(float((windows @ clip.window_descriptors.T).max()))
    shortlist = np.argsort(-np.array(nearness), kind="stable")[:4]
    expected = {}
    for i in shortlist:
        matrix = frames @ l2_normalise(store.frame_descriptors(contents[i])).T
        found = find_stretches(matrix, index.calibration["min_similarity"])
        if found:
            expected[contents[i].id] = found[0].evidence
    matches = index.query(clip, top=4, threshold=0, shortlist=4)
    assert [match.content for match in matches] == sorted(expected, key=lambda n: -expected[n])
    for match in matches:
        assert match.score == pytest.approx(expected[match.content], abs=1e-3)
    assert matches[0].verdict == "certain" and len(matches) > 1


def test_query_threshold_and_top_cut_the_list(library):
    index, clip = library.open(), library.clip("a.mp4")
    everything = [(match.path, match.score) for match in index.query(clip, top=20, threshold=0)]

    def paths(**options):
        return [match.path for match in index.query(clip, **options)]

    third_score = everything[2][1]
    assert paths(threshold=third_score) == [path for path, _ in everything[:3]]
    assert paths(top=2, threshold=0) == [path for path, _ in everything[:2]]


def names_of(files):
    return {os.path.basename(path) for paths in files.values() for path in paths}


def test_duplicates_are_copies_of_a_centre_and_its_parts(library):
    groups = library.open().duplicates()
    found = {
        os.path.basename(next(iter(group.files.values()))[0]): (
            names_of(group.files),
            names_of(group.part_files),
        )
        for group in groups
    }
    a = {"a.mp4", "a mirrored.mp4", "a bordered.mp4"}
    assert [copies for copies, _ in found.values() if "a.mp4" in copies] == [a]
    assert found["b.mp4"] == ({"b.mp4", "b faster.mp4"}, set())
    assert found["c inside.mp4"] == ({"c inside.mp4"}, {"c.mp4"})
    assert len(groups) == 3
    for group in groups:
        assert all(link.verdict in ("certain", "likely") for link in group.links + group.parts)


@pytest.mark.parametrize("index_type", ["HNSW16", "PCA8,IVF2,Flat"])
def test_index_type_agrees_with_flat_is_stored_and_grows(index_copy, library, index_type, tmp_path):
    def ranking(index):
        matches = index.query(library.clip("c.mp4"), top=20, threshold=0)
        return [(match.path, match.score) for match in matches]

    index = VideoIndex(index_copy.folder, index_type=index_type, pipeline=library.pipeline)
    assert ranking(index) == ranking(index_copy), "all are shortlisted, so all agree"
    index.save()
    (saved,) = index_copy.folder.glob("ann-*.faiss")
    assert faiss.read_index(str(saved)).ntotal == len(index.store.window_table().descriptors)

    new = tmp_path / "same.mp4"
    shutil.copy(library.path("a.mp4"), new)
    with open(new, "ab") as file:
        file.write(b"\0" * 8)  # the same pictures, another content
    index.add([new])
    again = VideoIndex(index_copy.folder, index_type=index_type, pipeline=library.pipeline)
    num_windows = len(again.store.window_table().descriptors)
    assert again.nearest.index.ntotal == num_windows > len(CLIPS)
    matches = again.query(library.clip("a.mp4"), top=20, threshold=0)
    assert str(new) in [match.path for match in matches]
    assert again.duplicates(0.5, 0.3)


def test_index_type_untrainable(library):
    index = VideoIndex(library.index, index_type="IVF4096,Flat", pipeline=library.pipeline)
    with pytest.raises(InputError, match="cannot be trained on 11 descriptors"):
        index.query(library.clip("a.mp4"))


# --- models -------------------------------------------------------------------------------------


def test_index_refuses_another_model(library):
    with pytest.raises(InputError, match="made with fps '1', this model has '2'"):
        VideoIndex(library.index, fps="2", device="cpu")
    with pytest.raises(InputError, match="made with pca"):
        VideoIndex(
            library.index, encoder="mean", pca=SHIPPED / "pca.npz", components=256, device="cpu"
        )


def test_index_not_created_with_bad_options(tmp_path):
    for options in (
        {"fps": "abc"},
        {"fps": "0"},
        {"pooling": "none", "encoder": "mean"},
        {"window": 0},
        {"colour": "red"},
    ):
        with pytest.raises(InputError):
            VideoIndex(tmp_path / "index", device="cpu", **options).add([edits.FILM])
    with pytest.raises(InputError, match="nothing to index"):
        VideoIndex(tmp_path / "index").add([tmp_path / "nowhere"])
    assert not (tmp_path / "index").exists()


# --- adding and removing ------------------------------------------------------------------------


def test_add_stores_every_video(library):
    index = VideoIndex.load(library.index)
    known = index.store.known_files()
    assert set(known) == {library.path(name) for name in CLIPS}
    seconds = {
        name: index.store.content(known[library.path(name)].content).seconds for name in CLIPS
    }
    assert seconds["b.mp4"] == pytest.approx(8, abs=0.1)
    assert seconds["b faster.mp4"] == pytest.approx(6.4, abs=0.1)


def test_add_writes_what_the_videos_need_and_no_more(library):
    store = VideoIndex.load(library.index).store
    contents = list(store.contents())

    def size(kind):
        return store.data_path(kind).stat().st_size

    assert size("frames") == sum(content.num_frames for content in contents) * 512 * 2
    assert size("videos") == sum(content.num_windows for content in contents) * 512 * 4
    jpegs = []
    for content in contents:
        jpegs += store.thumbnails(content, range(content.num_frames))
    assert size("thumbnails") == sum(map(len, jpegs))
    assert all(jpeg[:2] == b"\xff\xd8" and jpeg[-2:] == b"\xff\xd9" for jpeg in jpegs)


def test_add_again_changes_nothing(library):
    def files():
        paths = [path for path in library.index.iterdir() if path.name != "lock"]
        return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in paths}

    before = files()
    update = library.open().add([library.videos])
    assert (update.unchanged, update.added, update.replaced) == (len(CLIPS), 0, 0)
    assert files() == before


def test_add_changed_file_replaces_its_entry_alone(index_copy, library, tmp_path):
    target = tmp_path / "one.mp4"
    shutil.copy(library.path("a.mp4"), target)
    index_copy.add([target])
    before = stored_data(index_copy)
    shutil.copy(library.path("folder/d.mp4"), target)
    with open(target, "ab") as file:
        file.write(b"\0" * 8)  # other content than d.mp4's, the same pictures
    update = index_copy.add([target])
    assert (update.added, update.replaced) == (0, 1)
    after = stored_data(index_copy)
    frames = after.pop(str(target))[0]
    assert frames == AlmostEqual(before[library.path("folder/d.mp4")][0])
    before.pop(str(target))
    assert after == before and not damage(index_copy)


def test_remove_leaves_the_others_and_compacts(index_copy, library):
    before = stored_data(index_copy)
    count, unknown_paths = index_copy.remove([library.videos / "folder", "/nowhere.mp4"])
    assert (count, unknown_paths) == (2, ["/nowhere.mp4"])
    kept = ["b.mp4", ODD]
    index_copy.remove([library.path(name) for name in CLIPS if name not in kept])
    assert index_copy.store.settings["generation"] > 0 and index_copy.store.hole_share() == 0
    kept_data = {library.path(name): before[library.path(name)] for name in kept}
    assert stored_data(index_copy) == kept_data
    assert not damage(index_copy) and len(index_copy) == 2
    assert len(list(index_copy.folder.glob("frames-*"))) == 1
    clip = library.clip("b.mp4")
    assert index_copy.query(clip, threshold=0)[0].path == library.path("b.mp4")
    index_copy.remove([library.path(name) for name in kept])
    assert len(index_copy) == 0 and index_copy.query(clip) == []


def test_add_prune_forgets_vanished_files(index_copy, library, tmp_path):
    """And without it they stay. A folder below that has gone too is forgotten."""
    folder = tmp_path / "more"
    (folder / "inner").mkdir(parents=True)
    path = folder / "inner" / "x.mp4"
    shutil.copy(library.path("b.mp4"), folder / "stays.mp4")
    shutil.copy(library.path("a.mp4"), path)
    index_copy.add([folder])
    shutil.rmtree(folder / "inner")
    assert index_copy.add([folder]).removed == 0
    assert str(path) in index_copy.store.known_files()
    assert index_copy.add([folder], prune=True).removed == 1
    assert str(path) not in index_copy.store.known_files()
    assert len(index_copy) == len(CLIPS) + 1


def test_add_name_that_is_not_utf8(index_copy, library, tmp_path, capsys):
    path = os.fsencode(tmp_path) + b"/caf\xe9.mp4"
    shutil.copy(os.fsencode(library.path("folder/e.mp4")), path)
    index_copy.add([tmp_path])
    assert os.fsdecode(path) in index_copy.store.known_files()
    (clip,) = index_copy.encode_clips([os.fsdecode(path)])
    print_matches(clip, index_copy.query(clip))
    assert "caf\\xe9.mp4" in capsys.readouterr().out


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_add_unreadable_file(index_copy, tmp_path):
    path = tmp_path / "shut.mp4"
    path.write_bytes(b"x")
    path.chmod(0)
    assert [reason for _, reason in index_copy.add([path]).failed] == ["Permission denied"]


def test_add_while_another_process_writes(index_copy, library):
    other = VideoIndex(index_copy.folder, pipeline=library.pipeline)
    with index_copy.store.writing(), pytest.raises(InputError, match="is being written by"):
        other.add([library.videos])


def test_index_that_two_processes_create_holds_the_videos_of_both(library, tmp_path):
    """Each found no index, so each would create it."""
    folder = tmp_path / "index"
    one, other = (VideoIndex(folder, pipeline=library.pipeline) for _ in range(2))
    one.add([library.path("a.mp4")])
    other.add([library.path("b.mp4")])
    assert len(VideoIndex(folder)) == 2 and not damage(VideoIndex(folder))


def test_file_that_failed_is_remembered_by_size_and_time(index_copy, library, tmp_path):
    path = tmp_path / "v.mp4"
    good = (library.videos / "a.mp4").read_bytes()
    path.write_bytes(bytes(len(good)))
    os.utime(path, ns=(1, 1))
    ((_, reason),) = index_copy.add([path]).failed
    path.write_bytes(good)
    os.utime(path, ns=(1, 1))
    ((_, known),) = index_copy.add([path]).failed  # without reading it, or it would have succeeded
    assert known == f"{reason} (known; --retry_failed tries it again)"
    assert not index_copy.add([path], retry_failed=True).failed
    assert index_copy.add([path]).unchanged == 1
    path.write_bytes(bytes(10))
    ((_, changed),) = index_copy.add([path]).failed
    assert "known" not in changed


def test_index_of_an_earlier_version_keeps_its_frame_rule(index_copy, library):
    assert index_copy.store.frame_rule == "on_screen"
    with index_copy.store.writing():
        index_copy.store.db.execute("DELETE FROM settings WHERE name = 'frame_rule'")
    assert VideoIndex(index_copy.folder).pipeline.frame_rule == "first_after"
    with pytest.raises(InputError, match="frames 'first_after', this model has 'on_screen'"):
        VideoIndex(index_copy.folder, pipeline=library.pipeline)


@pytest.mark.slow
def test_add_after_kill_ends_as_an_unbroken_run(library, tmp_path, kill_rng):
    folder = tmp_path / "index"
    arguments = ("index", library.videos, "--index", folder, "--workers", 1, "--device", "cpu")
    num_done, delay = kill_rng.randint(1, 5), kill_rng.uniform(0, 0.2)
    process = start("search.py", *arguments)
    deadline = time.monotonic() + 240
    done = 0
    while done < num_done and process.poll() is None and time.monotonic() < deadline:
        if (folder / "index.db").exists():
            done = len(VideoIndex(folder))
        time.sleep(0.01)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.communicate()

    stopped = VideoIndex(folder, pipeline=library.pipeline)
    stored = len(stopped)
    assert num_done <= stored < len(CLIPS) and not damage(stopped)
    update = stopped.add([library.videos])
    assert update.unchanged == stored and update.added == len(CLIPS) - stored
    whole, resumed = stored_data(library.open()), stored_data(stopped)
    assert whole.keys() == resumed.keys() and not damage(stopped)
    for path, (frames, *_) in whole.items():
        assert resumed[path][0] == AlmostEqual(frames)


def test_add_to_an_index_with_leftovers(index_copy, tmp_path):
    """Of a writer killed before its commit, and of a compaction that did not switch over."""
    before = stored_data(index_copy)
    for kind in ("frames", "videos", "thumbnails"):
        with open(index_copy.store.data_path(kind), "ab") as file:
            file.write(b"half a video")
    half_generation = index_copy.folder / "frames-7.f16"
    half_generation.write_bytes(b"half a generation")
    reopened = VideoIndex(index_copy.folder)
    assert not damage(reopened) and stored_data(reopened) == before
    new = cut_clip(tmp_path / "new.mp4", [(120, 123)])
    index_copy.add([new])
    after = stored_data(index_copy)
    assert after.pop(str(new)) and after == before and not damage(index_copy)
    assert not half_generation.exists()


def test_query_refuses_to_show_a_video_whose_data_changed(index_copy, library):
    """One value of its rows, of hundreds: the score would be nearly right."""
    clip, path = library.clip("b.mp4"), library.path("b faster.mp4")
    expected = index_copy.query(clip, top=2, threshold=0)
    assert {match.path for match in expected} == {library.path("b.mp4"), path}
    content = index_copy.store.content(index_copy.store.known_files()[path].content)
    place = index_copy.store.data_path("frames")
    rows = np.memmap(place, np.float16, "r+").reshape(-1, index_copy.store.settings["size"])
    rows[content.first_frame + 1, 7] += 0.01
    rows.flush()
    with pytest.raises(InputError, match="b faster.mp4.*its data is damaged; remove it"):
        index_copy.query(clip, top=2, threshold=0)
    assert index_copy.query(clip, top=1, threshold=0) == expected[:1]
