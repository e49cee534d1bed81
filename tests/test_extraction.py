"""extract_features.py: which videos, which features, broken videos, broken runs, later runs."""

import itertools
import json
import multiprocessing
import os
import queue
import re
import signal
import time
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import extract_features
import h5py
import numpy as np
import pytest
import torch
from helpers.clips import index_of, numbered, textured, write_video
from helpers.commands import ROOT, cli, one_error, refused, start
from helpers.extraction import EXTRACT
from helpers.pooling_loops import l3_imac_by_loop
from helpers.systems import has_ended

from features import decoding, extraction, listing
from features.backbones import build_backbone, import_torchvision
from features.decoding import Decoder, Video, read_frames
from features.extraction import cut_batches, extract
from features.listing import find_videos, shard_of
from features.presentation import FrameTransform
from features.store import FeatureStore
from utils import InputError

SCRIPT = "pre-processing/extract_features.py"


def run(*words):
    """The script's main in this process, on random weights; its exit status."""
    return extract_features.main([*map(str, words), "--weights", "random"])


def all_rows(path):
    """{id: rows} of a feature file, as float32 copies."""
    store = FeatureStore(path)
    return {video: np.array(store[video], np.float32) for video in store}


def report_rows(path):
    return json.loads(path.read_text())["videos"]


def names_in(folder):
    return {path.name for path in folder.iterdir()}


# --- which videos --------------------------------------------------------------------------------


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def test_folder_list_and_pattern_find_the_same_videos(tmp_path):
    folder, listed = tmp_path / "v", tmp_path / "list.tsv"
    for name in ("a.mp4", "sub/b.c.MKV", "notes.txt", ".hidden.mp4"):
        touch(folder / name)
    listed.write_text("a\tv/a.mp4\n\nsub/b.c\tv/sub/b.c.MKV\n", encoding="utf-8-sig")  # Windows'
    expected = {"a": folder / "a.mp4", "sub/b.c": folder / "sub/b.c.MKV"}
    assert find_videos(str(folder)) == expected
    assert find_videos(str(listed)) == expected
    assert find_videos(f"{folder}/{{id}}.mp4") == {"a": folder / "a.mp4"}


def test_videos_that_share_an_id_are_refused(tmp_path):
    touch(tmp_path / "a.mp4")
    touch(tmp_path / "a.avi")
    with pytest.raises(InputError, match="share the id 'a'"):
        find_videos(str(tmp_path))


def test_video_beside_other_files_of_its_name_is_taken(tmp_path):
    beside = [
        "description",
        "info.json",
        "webp",
        "en.vtt",
        "HEIC",
        "aae",
        "jpg",
        "mp3",
        "zip",
        "dat",
    ]
    for name in (
        "ID.mp4",
        "IMG.MOV",
        *(f"{stem}.{suffix}" for stem in ("ID", "IMG") for suffix in beside),
    ):
        touch(tmp_path / name)
    assert find_videos(str(tmp_path)) == {"ID": tmp_path / "ID.mp4", "IMG": tmp_path / "IMG.MOV"}


NOT_VIDEO = {  # by how they begin, under a suffix that says nothing
    "text": b"The quick brown fox jumps over the lazy dog, again and again.\n" * 9,
    "umlauts": "Übergrößenträger äußern sich über ihre Füße, schön für Öl.\n".encode() * 40,
    "zip": b"PK\3\4" + bytes(99),
    "pdf": b"%PDF-1.7" + bytes(99),
    "heic": b"\0\0\0\x18ftypheic" + bytes(99),
    "png": b"\x89PNG\r\n" + bytes(99),
    "tar": bytes(257) + b"ustar" + bytes(99),
    "vorbis": b"OggS" + bytes(24) + b"\1vorbis" + bytes(99),
}


def test_files_of_a_folder_that_are_certainly_not_videos_are_passed_over(tmp_path):
    for name in (
        "a.bmp",
        "b.tiff",
        "c.avif",
        "d.ico",
        "e.nfo",
        "f.pdf",
        "g.zip",
        "h.docx",
        "i.svg",
    ):
        touch(tmp_path / name)
    for name, data in NOT_VIDEO.items():
        (tmp_path / name).write_bytes(data)
        (tmp_path / f"{name}.xyz").write_bytes(data)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "code.ts").write_bytes(NOT_VIDEO["text"])
    write_video(tmp_path / "stream.ts", textured(0, 10), codec="mpeg4", pix_fmt="yuv420p")
    write_video(tmp_path / "film.mkv", textured(0, 10))
    (tmp_path / "film.mkv").rename(tmp_path / "film")
    (tmp_path / "few").write_bytes(b"letters")  # too little to tell
    assert sorted(find_videos(str(tmp_path))) == ["few", "film", "stream"]
    (tmp_path / "list.tsv").write_text("a\ta.bmp\n")  # what is named is tried
    assert find_videos(str(tmp_path / "list.tsv")) == {"a": tmp_path / "a.bmp"}


def test_list_lines_end_at_line_ends_only(tmp_path):
    names = ["a\x0bb", "c\x85d", "e\u2028f", "g\x1ch", "i\u2029", "j\rk", "l m"]
    (tmp_path / "list.tsv").write_bytes("\r\n".join(f"{n}\t{n}.mp4" for n in names).encode())
    assert find_videos(str(tmp_path / "list.tsv")) == {n: tmp_path / f"{n}.mp4" for n in names}


def test_list_line_without_a_tab_is_refused(tmp_path):
    (tmp_path / "bad.tsv").write_text("a\tv/a.mp4\nno tab here\n")
    with pytest.raises(InputError, match="line 2"):
        find_videos(str(tmp_path / "bad.tsv"))


def test_linked_folders_are_searched_and_loops_end(tmp_path):
    for name in ("v/a.mp4", "v/sub/b.mp4", "elsewhere/c.mp4"):
        touch(tmp_path / name)
    for link, target in (
        ("v/up", "v"),
        ("v/sub/top", "v"),
        ("v/far", "elsewhere"),
        ("elsewhere/back", "v"),
    ):
        (tmp_path / link).symlink_to(tmp_path / target)
    found = itertools.islice(listing._from_folder(tmp_path / "v"), 9)  # in case they do not end
    assert [video for video, _ in found] == ["a", "far/c", "sub/b"]


def test_file_name_that_is_not_utf8_is_refused_at_once(tmp_path):
    folder = tmp_path / "v"
    folder.mkdir()
    Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.mp4")).touch()
    words = folder, "--output", tmp_path / "f.hdf5", "--weights", "random"
    message = refused(extract_features.main, *words)
    assert "not UTF-8" in message
    message.encode()  # so it can be printed
    assert names_in(tmp_path) == {"v"}


# --- features ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Twelve clips of one to four seconds in a folder and a folder below it."""
    folder = tmp_path_factory.mktemp("clips")
    (folder / "sub").mkdir()
    for i in range(12):
        path = folder / ("sub" if i % 2 else ".") / f"clip{i}.mkv"
        write_video(path, textured(i, 10 * (1 + i % 4)))
    return folder


@pytest.mark.usefixtures("one_thread_per_batch")
@pytest.mark.slow
@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("float16", 1e-3)])
def test_batches_across_videos_equal_one_frame_at_a_time(tmp_path, clips, dtype, tolerance):
    together, apart = tmp_path / "together.hdf5", tmp_path / "apart.hdf5"
    common = clips, "--dtype", dtype
    assert run(*common, "--output", together, "--batch_sz", 16) == 0
    assert run(*common, "--output", apart, "--batch_sz", 1, "--workers", 1) == 0
    together, apart = all_rows(together), all_rows(apart)
    lengths = {f"{'sub/' if i % 2 else ''}clip{i}": 1 + i % 4 for i in range(12)}
    assert {video: len(rows) for video, rows in together.items()} == lengths
    for video, rows in apart.items():
        assert np.abs(together[video] - rows).max() <= tolerance
    rows = apart["sub/clip3"]
    assert np.abs(rows[0] - rows[1]).max() > 10 * tolerance  # other frames have other rows


@pytest.mark.usefixtures("one_thread_per_batch")
def test_rows_are_the_pooled_stages_of_the_frames(tmp_path):
    images = textured(3, 25)
    write_video(tmp_path / "v.mkv", images)
    (tmp_path / "list.tsv").write_text("v\tv.mkv\n")
    output = tmp_path / "f.hdf5"
    words = tmp_path / "list.tsv", "--output", output, "--dtype", "float32", "--batch_sz", 2
    assert run(*words, "--pooling", "l3_imac") == 0
    backbone = build_backbone("efficientnet_lite0", "random")
    rows = all_rows(output)["v"]
    assert len(rows) == 3
    for k, row in enumerate(rows):
        frame = FrameTransform()(av.VideoFrame.from_ndarray(images[10 * k], "rgb24"))
        maps = backbone(torch.from_numpy(frame).permute(2, 0, 1)[None].float())
        expected = []
        for x in maps:
            stride = int(x.shape[2] * 2 / 7)
            expected.append(l3_imac_by_loop(x[0].double().numpy(), stride))
        assert np.allclose(row, np.concatenate(expected), atol=1e-4)


@pytest.mark.usefixtures("one_thread_per_batch")
@pytest.mark.slow
def test_papers_features_with_random_weights_and_with_a_file(tmp_path, clips):
    (tmp_path / "list.tsv").write_text(f"v\t{clips}/sub/clip1.mkv\n")
    paper = [tmp_path / "list.tsv", "--backbone", "resnet50", "--pooling", "l3_imac"]
    paper += ["--dtype", "float32", "--batch_sz", 2]
    model = import_torchvision().models.resnet50()
    torch.save(model.state_dict(), tmp_path / "w.pth")
    stores = {}
    for weights in ("random", tmp_path / "w.pth"):
        output = tmp_path / "f.hdf5"
        words = [*paper, "--output", output, "--weights", weights]
        assert extract_features.main([str(word) for word in words]) == 0
        store = FeatureStore(output.rename(tmp_path / f"{len(stores)}.hdf5"))
        output.with_suffix(".json").unlink()
        assert store["v"].shape == (2, 3840)
        for stage in np.split(store["v"], np.cumsum([256, 512, 1024]), axis=1):
            assert np.allclose(np.linalg.norm(stage, axis=1), 1, atol=1e-4)
        stores[weights] = store
    random, given = stores.values()
    assert random.meta["weights"] == "random"
    assert re.fullmatch(r"w\.pth sha256 [0-9a-f]{16}", given.meta["weights"])
    assert np.abs(random["v"] - given["v"]).max() > 0.01


# --- runs that are killed, shards ----------------------------------------------------------------


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Sixteen clips of two seconds and one broken file."""
    folder = tmp_path_factory.mktemp("many")
    for i in range(16):
        write_video(folder / f"clip{i:02}.mkv", textured(i, 20))
    (folder / "broken.mp4").write_bytes(b"no video")
    return folder


def fast_options(folder, shard):
    """Words of a command on a cheap stage, whose batches lie across videos."""
    words = ["--output", folder / "f.hdf5", "--shard", shard, "--weights", "random"]
    return [*words, "--stages", "_blocks.2", "--batch_sz", "3", "--workers", "2"]


def count_lines(path):
    return path.read_text().count("\n") if path.exists() else 0


def kill_when(process, reached):
    """Send SIGKILL as soon as `reached()`."""
    deadline = time.monotonic() + 60
    while not reached() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.kill()
    process.communicate()


@pytest.mark.usefixtures("one_thread_per_batch")
@pytest.mark.slow
def test_killed_shards_resume_to_the_bytes_of_unbroken_ones(tmp_path, many, capsys):
    unbroken = tmp_path / "unbroken"
    for shard in ("0/2", "1/2"):
        run(many, *fast_options(unbroken, shard))
    store, journal = tmp_path / "f.1of2.hdf5", tmp_path / "f.1of2.hdf5.part.jsonl"
    for more in (1, 2):  # killed twice
        lines = count_lines(journal) + more
        process = start("-c", EXTRACT, many, *fast_options(tmp_path, "1/2"))
        kill_when(process, lambda lines=lines: count_lines(journal) > lines)
        assert not store.exists() and count_lines(journal) > lines
    with open(journal, "ab") as file:  # as if killed in the middle of a line
        file.write(b'{"id": "1')
    with open(tmp_path / "f.1of2.json.part", "ab") as file:
        file.write(b'\n["1')
    capsys.readouterr()
    run(many, *fast_options(tmp_path, "1/2"))
    assert "resuming: " in capsys.readouterr().err
    run(many, *fast_options(tmp_path, "0/2"))

    names = {"f.0of2.hdf5", "f.0of2.json", "f.1of2.hdf5", "f.1of2.json"}
    assert names_in(unbroken) == names and names_in(tmp_path) == {*names, "unbroken"}
    videos = []
    for i in (0, 1):
        path, expected = (folder / f"f.{i}of2.hdf5" for folder in (tmp_path, unbroken))
        assert path.read_bytes() == expected.read_bytes()
        rows = report_rows(path.with_suffix(".json"))
        assert list(rows) == list(report_rows(expected.with_suffix(".json")))
        for name, row in rows.items():
            assert row["frames"] == (0 if name == "broken" else 2)
        shard = list(FeatureStore(path))
        assert len(shard) > 1
        videos += shard
    assert sorted(videos) == [f"clip{i:02}" for i in range(16)]


@pytest.mark.usefixtures("one_thread_per_batch")
@pytest.mark.slow
def test_killed_extension_leaves_the_finished_store_and_resumes(tmp_path, many):
    folder, output = tmp_path / "videos", tmp_path / "f.hdf5"
    folder.mkdir()
    paths = sorted(many.glob("*.mkv"))
    for path in paths[:2]:
        (folder / path.name).symlink_to(path)
    words = [folder, *fast_options(tmp_path, "0/1")]
    assert run(*words) == 0
    small = output.read_bytes()
    for path in paths[2:]:
        (folder / path.name).symlink_to(path)
    journal = tmp_path / "f.hdf5.part.jsonl"
    kill_when(start("-c", EXTRACT, *words), lambda: count_lines(journal) > 4)
    assert output.read_bytes() == small and count_lines(journal) > 4
    assert run(*words) == 0 and not journal.exists()
    assert run(folder, *fast_options(tmp_path / "whole", "0/1")) == 0
    assert output.read_bytes() == (tmp_path / "whole" / "f.hdf5").read_bytes()


@pytest.mark.distributed
@pytest.mark.slow
def test_launcher_gives_every_process_a_shard_and_failures_wait_for_the_others(tmp_path, many):
    """Launchers end all processes when one ends in failure; here one has a broken file only."""
    ids = {0: [], 1: []}
    for name in map(str, range(30)):
        ids[shard_of(name, 2)].append(name)
    broken = ids[1][0]
    lines = [f"{name}\t{many}/clip{int(name) % 16:02}.mkv" for name in ids[0]]
    lines.append(f"{broken}\t{many}/broken.mp4")
    (tmp_path / "list.tsv").write_text("\n".join(lines))
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    script = [SCRIPT, tmp_path / "list.tsv", *fast_options(tmp_path, "0/1"), "--workers", "1"]
    done = cli("-m", *launcher, *script)
    assert done.returncode and "exitcode" in done.stderr
    first, second = (report_rows(tmp_path / f"f.{i}of2.json") for i in (0, 1))
    assert sorted(first) == sorted(ids[0]) == sorted(FeatureStore(tmp_path / "f.0of2.hdf5"))
    assert {name: row["status"] for name, row in second.items()} == {broken: "failed"}
    assert not (tmp_path / "f.1of2.hdf5").exists()


# --- later runs ----------------------------------------------------------------------------------


@pytest.fixture
def decoded(monkeypatch, one_thread_per_batch):
    """Which videos are decoded: `ids` as they come. An id in `interrupt` raises Ctrl-C instead."""
    ids, interrupt = [], set()

    def frames(decoder, video, original=Decoder.frames):
        if video.id in interrupt:
            raise KeyboardInterrupt
        ids.append(video.id)
        return original(decoder, video)

    monkeypatch.setattr(Decoder, "frames", frames)
    return SimpleNamespace(ids=ids, interrupt=interrupt)


def test_finished_extraction_adds_what_is_new_and_nothing_else(tmp_path, decoded):
    folder, output = tmp_path / "videos", tmp_path / "f.hdf5"
    folder.mkdir()

    def run_again(*more):
        """Exit status, and the videos that were decoded."""
        decoded.ids.clear()
        status = run(folder, "--output", output, "--stages", "_blocks.0", *more)
        return status, sorted(decoded.ids)

    def files():
        return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.glob("f.*")}

    for i in range(3):
        write_video(folder / f"{i}.mkv", textured(i, 10))
    (folder / "broken.mkv").write_bytes(b"no video")
    assert run_again() == (3, ["0", "1", "2", "broken"])
    before, rows = files(), all_rows(output)
    assert run_again() == (3, [])
    assert files() == before
    assert run_again("--retry_failed") == (3, ["broken"])
    assert all_rows(output).keys() == rows.keys()

    write_video(folder / "broken.mkv", textured(7, 10))  # another file now: it needs no flag
    write_video(folder / "new.mkv", textured(8, 10))
    write_video(folder / "1.mkv", textured(9, 20))  # changed
    (folder / "2.mkv").unlink()  # gone, but its features stay
    assert run_again() == (0, ["1", "broken", "new"])
    extended = all_rows(output)
    assert list(extended) == ["0", "1", "2", "broken", "new"] and len(extended["1"]) == 2
    for video in ("0", "2"):
        np.testing.assert_array_equal(extended[video], rows[video])
    assert list(report_rows(tmp_path / "f.json")) == list(extended)
    with pytest.raises(InputError, match="pooling imac, not mac"):
        run_again("--pooling", "mac")


def write_clips(folder, names):
    for name in names:
        write_video(folder / f"{name}.mkv", textured(ord(name), 10))


def run_listed(folder, names):
    """Extract NAME.mkv of each of `names`, one after another, into f.hdf5; the exit status."""
    listed = folder / "list.tsv"
    listed.write_text("".join(f"{name}\t{name}.mkv\n" for name in names))
    words = listed, "--output", folder / "f.hdf5", "--stages", "_blocks.0"
    return run(*words, "--workers", 1, "--batch_sz", 1)


def test_features_of_listed_files_that_are_gone_stay(tmp_path, decoded):
    write_clips(tmp_path, "abcd")
    assert run_listed(tmp_path, "abc") == 0
    rows = all_rows(tmp_path / "f.hdf5")
    for name in "ab":
        (tmp_path / f"{name}.mkv").unlink()
    for _ in range(2):
        assert run_listed(tmp_path, "abcd") == 0
    assert decoded.ids == list("abcd")
    extended = all_rows(tmp_path / "f.hdf5")
    assert list(extended) == list("abcd")
    for name in rows:
        np.testing.assert_array_equal(extended[name], rows[name])
    report = report_rows(tmp_path / "f.json")
    assert [row["status"] for row in report.values()] == ["ok"] * 4


def test_store_of_one_frame_rule_refuses_another_and_says_how_to_continue(tmp_path, decoded):
    output = tmp_path / "f.hdf5"
    write_clips(tmp_path, "a")

    def run_by(rule):
        listed = tmp_path / "list.tsv"
        listed.write_text("".join(f"{path.stem}\t{path}\n" for path in tmp_path.glob("*.mkv")))
        words = [listed, "--output", output, "--stages", "_blocks.0"]
        return run(*words, *(["--frames", rule] if rule else []))

    assert run_by("timestamp") == 0  # the earlier name
    assert FeatureStore(output).meta["frames"] == "first_after"
    for stated in ("timestamp", None):  # as earlier versions wrote it, or did not
        with h5py.File(output, "r+") as file:
            del file.attrs["frames"]
            if stated:
                file.attrs["frames"] = stated
        report = json.loads((tmp_path / "f.json").read_text())
        report["settings"]["frames"] = "timestamp"
        (tmp_path / "f.json").write_text(json.dumps(report))
        before = output.read_bytes()
        with pytest.raises(InputError, match="first_after, not on_screen; continue it with"):
            run_by(None)
        assert output.read_bytes() == before
        write_clips(tmp_path, "b" if stated else "c")
        decoded.ids.clear()
        assert run_by("first_after") == 0 and decoded.ids == ["b" if stated else "c"]
    output.unlink()
    assert run_by(None) == 0 and FeatureStore(output).meta["frames"] == "on_screen"


@pytest.mark.parametrize("still_listed", [True, False])
def test_stopped_run_resumes_when_stored_videos_are_gone_or_changed(
    tmp_path, decoded, still_listed
):
    names = "abcdefgh"
    write_clips(tmp_path, names)
    decoded.interrupt.add("h")
    with pytest.raises(KeyboardInterrupt):
        run_listed(tmp_path, names)
    spooled = count_lines(tmp_path / "f.hdf5.part.jsonl") - 1
    assert spooled >= 2  # a and b, and some of the others
    (tmp_path / "a.mkv").unlink()
    write_video(tmp_path / "b.mkv", textured(0, 20))
    decoded.ids.clear()
    decoded.interrupt.clear()
    assert run_listed(tmp_path, names if still_listed else names[1:]) == 0
    assert sorted(decoded.ids) == ["b", *names[spooled:]]
    assert FeatureStore(tmp_path / "f.hdf5").lengths == {name: 1 + (name == "b") for name in names}


def test_stored_video_that_breaks_leaves_the_store_also_after_a_stopped_run(tmp_path, decoded):
    write_clips(tmp_path, "abcdefgh")
    assert run_listed(tmp_path, "ab") == 0
    (tmp_path / "b.mkv").write_bytes(b"no video")
    decoded.interrupt.add("h")
    with pytest.raises(KeyboardInterrupt):
        run_listed(tmp_path, "bcdefgh")
    assert '["b"' in (tmp_path / "f.json.part").read_text()
    (tmp_path / "f.hdf5.part.jsonl").unlink()  # to start again
    decoded.interrupt.clear()
    for names in ("b", "bcdefgh"):
        assert run_listed(tmp_path, names) == 3
        assert list(FeatureStore(tmp_path / "f.hdf5")) == ["a", *names[1:]]


# --- the report ----------------------------------------------------------------------------------


def test_no_store_is_written_if_every_video_fails(tmp_path):
    (tmp_path / "list.tsv").write_text("a\tnowhere.mp4\nb\tlist.tsv\n")
    assert run(tmp_path / "list.tsv", "--output", tmp_path / "f.hdf5") == 3
    assert names_in(tmp_path) == {"list.tsv", "f.json"}
    report = report_rows(tmp_path / "f.json")
    assert "No such file" in report["a"]["reason"] and report["b"]["status"] == "failed"


@pytest.mark.parametrize("theirs", ['{"mine": 1}', "[1]", "text"])
def test_json_file_that_is_not_a_report_is_left_alone(tmp_path, theirs):
    write_clips(tmp_path, "a")
    (tmp_path / "f.json").write_text(theirs)
    with pytest.raises(InputError, match=r"f\.json' is not .*where the report goes"):
        run_listed(tmp_path, "a")
    assert names_in(tmp_path) == {"a.mkv", "list.tsv", "f.json"}
    assert (tmp_path / "f.json").read_text() == theirs


# --- decoders that die ---------------------------------------------------------------------------

# Run in place of decoding.py, as a decoder process.
SABOTAGE = """
import os, signal, sys, time
sys.path.insert(0, {root!r})
from features import decoding
original = decoding.read_frames

def read_frames(video, *options):
    yield from original(video, *options)
    name = os.path.basename(video.path)
    if name.startswith("hangs"):
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGINT])
        while True:
            time.sleep(1)
    if name.startswith("crashes"):
        os.kill(os.getpid(), signal.SIGSEGV)
    if name.startswith("greedy"):
        bytearray(decoding.MEMORY)
    if name.startswith("odd"):
        raise KeyError("not an error one would expect")
    if name.startswith("torn"):  # the beginning of a message
        os.write(int(sys.argv[1]), decoding.View().num_bytes.to_bytes(4, "big") + bytes(1000))
        os.kill(os.getpid(), signal.SIGKILL)
    if name.startswith("ends"):
        os._exit(5)

decoding.read_frames = read_frames
decoding.serve(decoding.Connection(int(sys.argv[1])))
"""


@pytest.fixture
def sabotage(tmp_path, monkeypatch):
    """Decoder processes that come to grief after the frames of some videos, by their names."""
    path = tmp_path / "sabotage.py"
    path.write_text(SABOTAGE.format(root=str(ROOT)))
    monkeypatch.setattr(decoding, "__file__", str(path))


def test_decoder_that_hangs_ends_with_its_parent(tmp_path, sabotage):
    write_video(tmp_path / "hangs.mkv", numbered(25))
    receiver, sender = multiprocessing.Pipe(duplex=False)

    def work():
        decoder = Decoder()
        frames = decoder.frames(Video("hangs", tmp_path / "hangs.mkv"))
        for _ in range(3):
            next(frames)
        time.sleep(0.3)  # now it hangs
        sender.send(decoder.process.pid)
        os.kill(os.getpid(), signal.SIGKILL)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    decoder = receiver.recv()
    process.join()
    assert has_ended(decoder, 1)


def first_channel(images):
    """Features (B, 1): for `numbered` frames their index."""
    return images[:, 112, 112, :1].astype(np.float32)


def test_video_that_hangs_or_crashes_its_decoder_is_named_and_the_others_continue(
    tmp_path, sabotage
):
    names = ["hangs", "crashes", "a", "greedy", "odd", "torn", "b", "crashes too", "c"]
    for name in names:
        write_video(tmp_path / f"{name}.mkv", numbered(25))
    videos = [Video(name, tmp_path / f"{name}.mkv") for name in names]
    done = {video.id: video for video in extract(videos, first_channel, time_limit=1, workers=1)}
    reasons = {name: video.reason for name, video in done.items()}
    assert reasons["hangs"] == "no frame in 1 seconds of decoding (--time_limit)"
    assert reasons["crashes"] == reasons["crashes too"] == "decoding it crashes FFmpeg (SIGSEGV)"
    # SIGKILL is the kernel's way where memory is short.
    assert reasons["torn"] == "decoding it crashes FFmpeg (SIGKILL)"
    assert reasons["greedy"] == "MemoryError"
    assert "not an error" in reasons["odd"]
    for name in "abc":
        assert not reasons[name]
        assert np.concatenate(done[name].rows).tolist() == [0, 10, 20]


def test_decoder_that_ends_by_itself_stops_the_run(tmp_path, sabotage):
    write_video(tmp_path / "ends.mkv", numbered(3))
    with pytest.raises(RuntimeError, match="status 5"):
        list(extract([Video("v", tmp_path / "ends.mkv")], first_channel))


def test_waiting_for_the_backbone_does_not_count_as_hanging(tmp_path):
    write_video(tmp_path / "v.mkv", numbered(80))

    def slow(images):
        time.sleep(0.5)
        return first_channel(images)

    videos = [Video("v", tmp_path / "v.mkv")]
    (video,) = extract(videos, slow, time_limit=0.4, batch_sz=1, streams=1)
    assert len(video.rows) == 8 and not video.reason


def test_broken_videos_are_reported_before_a_batch_is_full():
    waiting = queue.Queue()
    for name in range(16):
        waiting.put((name, None))  # the end of a video without frames
    # `get_nowait` fails where `get` would wait for ever.
    batches = cut_batches(SimpleNamespace(get=waiting.get_nowait), decoders=1, size=4)
    assert len(next(batches)) == 16


def test_breaking_off_ends_the_decoders(tmp_path, monkeypatch):
    processes = []

    class NotedDecoder(Decoder):
        def _start(self):
            super()._start()
            processes.append(self.process)

    monkeypatch.setattr(extraction, "Decoder", NotedDecoder)
    videos = []
    for i in range(6):
        write_video(tmp_path / f"{i}.mkv", numbered(200))
        videos.append(Video(str(i), tmp_path / f"{i}.mkv"))
    for _ in extract(videos, first_channel, fps=Fraction(10), workers=2):
        break
    assert processes and all(process.poll() is not None for process in processes)


def test_known_rows_are_taken_and_not_computed(tmp_path):
    """Of one video the first 13 rows are known, of another all, of the third none."""
    computed, seen = [], []

    def features(images):
        computed.extend(index_of(image) for image in images)
        return np.array([[index_of(image)] for image in images], np.float32)

    known = {"a": 13, "b": 40, "c": 0}
    videos = []
    for name, count in known.items():
        write_video(tmp_path / f"{name}.mkv", numbered(30))
        rows = 100 + np.arange(count, dtype=np.float32)[:, None]
        videos.append(Video(name, tmp_path / f"{name}.mkv", known_rows=rows))
    options = {"fps": Fraction(10), "batch_sz": 3, "streams": 2, "thumbnail_size": 32}
    options["on_row"] = lambda video: seen.append((video.id, len(video.rows)))
    for video in extract(videos, features, workers=2, **options):
        count = min(30, known[video.id])
        expected = [*range(100, 100 + count), *range(count, 30)]
        assert np.concatenate(video.rows).tolist() == expected
        assert len(video.thumbnails) == 30
    frames = [*range(13, 30), *range(30)]
    assert sorted(i for i in computed if i) == sorted(i for i in frames if i)  # 0 fills a batch up
    assert sorted(seen) == [(name, i) for name in known for i in range(1, 31)]


def test_frames_in_memory_follow_the_batch_and_not_the_video(tmp_path, monkeypatch):
    path = tmp_path / "long.mkv"
    write_video(path, numbered(300))
    decoded = taken = most = 0

    def counted(decoder, video, original=Decoder.frames):
        nonlocal decoded, most
        for image in original(decoder, video):
            decoded += 1
            most = max(most, decoded - taken)
            yield image

    def features(images):
        nonlocal taken
        time.sleep(0.01)
        taken += len(images)
        return np.array([[index_of(image)] for image in images])

    monkeypatch.setattr(Decoder, "frames", counted)
    size, streams = 2, 2
    options = {"fps": Fraction(10), "batch_sz": size, "streams": streams}
    (video,) = extract([Video("v", path)], features, **options)
    assert np.concatenate(video.rows).tolist() == list(range(300))
    queued, in_work, being_cut, at_the_decoder = 2 * size, streams * size, 2 * size, 1
    assert most <= queued + in_work + being_cut + at_the_decoder


# --- the machine's resources ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "device, cores, amp, expected",
    [
        ("cpu", 1, None, (8, 1, 1)),
        ("cpu", 2, None, (8, 1, 2)),
        ("cpu", 5, None, (8, 2, 2)),  # the odd core decodes
        ("cpu", 5, "bfloat16", (8, 5, 1)),
        ("cuda:1", 16, None, (64, 2, 1)),
    ],
)
def test_default_parallelism(device, cores, amp, expected):
    names = "batch_sz", "streams", "threads"
    assert extraction.default_parallelism(device, cores, amp) == dict(
        zip(names, expected, strict=True)
    )


# --- the benchmark -------------------------------------------------------------------------------


def test_benchmark_clips_of_a_short_film_are_as_long_as_asked(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from clips import make_clips

    write_video(tmp_path / "film.mkv", numbered(30))
    clips = make_clips(tmp_path / "clips", tmp_path / "film.mkv", 2, 2, (64, 48))
    assert len(clips) == 2
    for clip in clips:
        assert len(list(read_frames(Video("v", clip), Fraction(25)))) == 50


# --- refusals ------------------------------------------------------------------------------------

REFUSALS = [
    (["nowhere"], "'nowhere'"),
    (["hollow"], "holds no video"),
    (["videos", "--backbone", "resnet51"], "unknown backbone 'resnet51'"),
    (["videos", "--pca", "narrow.npz"], "width 1752.*width 4"),
    (["videos", "--components", "2"], "--components.*--pca"),
    (["videos", "--shard", "2/2"], "--shard 2/2 must be I/N"),
    (["videos", "--time_limit", "0"], "--time_limit must be positive"),
    (["videos", "--workers", "-1"], "--workers must be positive"),
    (["videos", "--fps", "1/0"], "--fps 1/0 must be a number"),
    (["videos", "--output", "f.txt"], "suffix .hdf5"),
]


@pytest.fixture
def refusal_folder(tmp_path):
    (tmp_path / "hollow").mkdir()
    (tmp_path / "videos").mkdir()
    write_video(tmp_path / "videos" / "v.mkv", numbered(3))
    np.savez(
        tmp_path / "narrow.npz",
        mean=np.zeros(4),
        components=np.eye(4)[:2],
        variance=np.ones(2),
        whiten=True,
    )
    return tmp_path


@pytest.mark.parametrize("words, message", REFUSALS)
def test_bad_input_is_refused_and_leaves_nothing(refusal_folder, monkeypatch, words, message):
    before = names_in(refusal_folder)
    monkeypatch.chdir(refusal_folder)
    common = "--output", "f.hdf5", "--weights", "random"
    assert re.search(message, refused(extract_features.main, *common, *words))
    assert names_in(refusal_folder) == before


def test_refusal_of_the_command_is_one_line_with_status_2(refusal_folder):
    before = names_in(refusal_folder)
    words = refusal_folder / "videos", "--output", refusal_folder / "f.hdf5", "--shard", "2/2"
    assert "--shard 2/2 must be I/N" in one_error(cli(SCRIPT, *words))
    assert names_in(refusal_folder) == before
