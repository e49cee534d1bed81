"""Extraction keeps its promises: which videos, which features, what happens to a broken video and to a broken run."""

import itertools
import json
import os
import queue
import re
import time
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from helpers.clips import index_of, numbered, textured, write_video
from helpers.commands import cli, one_error, start

ROOT = Path(__file__).resolve().parent.parent
import extract_features
from test_backbones import l3_imac_by_loops

from features import backbones, decoding, extraction, listing
from features.store import FeatureStore
from utils import InputError


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Twelve clips of one to four seconds in a folder and a folder below it."""
    folder = tmp_path_factory.mktemp("clips")
    (folder / "sub").mkdir()
    for i in range(12):
        write_video(
            folder / ("sub" if i % 2 else ".") / f"clip{i}.mkv", textured(i, 10 * (1 + i % 4))
        )
    return folder


def extract(*arguments):
    """The script's main in this process, on random weights; its exit status."""
    return extract_features.main([*map(str, arguments), "--weights", "random"])


def all_rows(path):
    store = FeatureStore(path)
    return {video: np.asarray(store[video], np.float32) for video in store}


# --- which videos ----------------------------------------------------------------------------------------------------


def test_folder_list_and_pattern_find_the_same_videos(tmp_path):
    (tmp_path / "v" / "sub").mkdir(parents=True)
    for name in ("a.mp4", "sub/b.c.MKV", "notes.txt", ".hidden.mp4"):
        (tmp_path / "v" / name).touch()
    (tmp_path / "list.tsv").write_text(
        "a\tv/a.mp4\n\nsub/b.c\tv/sub/b.c.MKV\n", encoding="utf-8-sig"
    )  # as Windows writes
    folder = listing.find_videos(str(tmp_path / "v"))
    assert folder == {"a": tmp_path / "v/a.mp4", "sub/b.c": tmp_path / "v/sub/b.c.MKV"}
    assert listing.find_videos(str(tmp_path / "list.tsv")) == folder
    assert listing.find_videos(f"{tmp_path}/v/{{id}}.mp4") == {"a": tmp_path / "v/a.mp4"}
    (tmp_path / "v/a.avi").touch()
    with pytest.raises(InputError, match="share the id 'a'"):
        listing.find_videos(str(tmp_path / "v"))
    (tmp_path / "bad.tsv").write_text("a\tv/a.mp4\nno tab here\n")
    with pytest.raises(InputError, match="line 2"):
        listing.find_videos(str(tmp_path / "bad.tsv"))


def test_linked_folders_are_searched_and_loops_end(tmp_path):
    (tmp_path / "v" / "sub").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    for name in ("v/a.mp4", "v/sub/b.mp4", "elsewhere/c.mp4"):
        (tmp_path / name).touch()
    for link, target in (
        ("v/up", "v"),
        ("v/sub/top", "v"),
        ("v/far", "elsewhere"),
        ("elsewhere/back", "v"),
    ):
        (tmp_path / link).symlink_to(tmp_path / target)
    found = itertools.islice(listing._from_folder(tmp_path / "v"), 9)  # should they not end
    assert [video for video, _ in found] == ["a", "far/c", "sub/b"]


def test_a_name_that_is_not_utf8_is_refused_at_once(tmp_path):
    (tmp_path / "v").mkdir()
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/v/caf\xe9.mp4")).touch()
    assert "not UTF-8" in one_error(
        cli(
            "pre-processing/extract_features.py",
            tmp_path / "v",
            "--output",
            tmp_path / "f.hdf5",
            "--weights",
            "random",
        )
    )
    assert [path.name for path in tmp_path.iterdir()] == ["v"]


# --- extraction ------------------------------------------------------------------------------------------------------


def test_when_every_video_fails_no_store_is_written(tmp_path):
    (tmp_path / "list.tsv").write_text("a\tnowhere.mp4\nb\tlist.tsv\n")
    assert extract(tmp_path / "list.tsv", "--output", tmp_path / "f.hdf5") == 3
    assert {path.name for path in tmp_path.iterdir()} == {"list.tsv", "f.json"}
    report = json.loads((tmp_path / "f.json").read_text())["videos"]
    assert "No such file" in report["a"]["reason"] and report["b"]["status"] == "failed"


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("float16", 1e-3)])
def test_batches_across_videos_give_what_one_video_at_a_time_gives(
    tmp_path, clips, dtype, tolerance
):
    together, apart = tmp_path / "together.hdf5", tmp_path / "apart.hdf5"
    assert extract(clips, "--output", together, "--dtype", dtype, "--batch_sz", 64) == 0
    assert extract(clips, "--output", apart, "--dtype", dtype, "--batch_sz", 1, "--workers", 1) == 0
    together, apart = all_rows(together), all_rows(apart)
    assert {video: len(rows) for video, rows in together.items()} == {
        f"{'sub/' if i % 2 else ''}clip{i}": 1 + i % 4 for i in range(12)
    }
    assert all(np.abs(together[video] - apart[video]).max() <= tolerance for video in apart)
    assert (
        np.abs(apart["sub/clip3"][0] - apart["sub/clip3"][1]).max() > 10 * tolerance
    )  # the rows do differ


def test_rows_are_the_pooled_stages_of_the_frames(tmp_path):
    images = textured(3, 25)
    write_video(tmp_path / "v.mkv", images)
    (tmp_path / "list.tsv").write_text("v\tv.mkv\n")
    extract(
        tmp_path / "list.tsv",
        "--output",
        tmp_path / "f.hdf5",
        "--dtype",
        "float32",
        "--pooling",
        "l3_imac",
    )
    backbone = backbones.build_backbone("efficientnet_lite0", "random")
    for k, row in enumerate(all_rows(tmp_path / "f.hdf5")["v"]):
        image = decoding.FrameTransform()(av.VideoFrame.from_ndarray(images[10 * k], "rgb24"))
        stages = backbone(torch.from_numpy(image).permute(2, 0, 1)[None].float())
        parts = [l3_imac_by_loops(m[0].double().numpy(), int(m.shape[2] * 2 / 7)) for m in stages]
        assert np.allclose(row, np.concatenate(parts), atol=1e-4)


def journal_lines(path):
    return path.read_text().count("\n") if path.exists() else 0


def kill_when(process, reached):
    """kill -9, once `reached()`."""
    deadline = time.monotonic() + 60
    while not reached() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.kill()
    process.communicate()


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Sixteen clips of four seconds and one broken file."""
    folder = tmp_path_factory.mktemp("many")
    for i in range(16):
        write_video(folder / f"clip{i:02}.mkv", textured(i, 40))
    (folder / "broken.mp4").write_bytes(b"no video")
    return folder


def shards_of(folder, shard):
    fast = ["--weights", "random", "--stages", "_blocks.2", "--batch_sz", "3", "--workers", "2"]
    return ["--output", folder / "f.hdf5", *fast, "--shard", shard]


def test_killed_shards_go_on_and_end_as_unbroken_ones_byte_for_byte(tmp_path, many):
    unbroken = tmp_path / "unbroken"
    for shard in ("0/2", "1/2"):
        extract(many, *shards_of(unbroken, shard))
    store, part, after = tmp_path / "f.1of2.hdf5", tmp_path / "f.1of2.hdf5.part.jsonl", 0
    for more in (1, 2):  # killed twice
        after = journal_lines(part) + more
        process = start("pre-processing/extract_features.py", many, *shards_of(tmp_path, "1/2"))
        kill_when(process, lambda after=after: journal_lines(part) > after)
        assert not store.exists()
    with open(part, "ab") as journal:  # as if killed in the middle of a line
        journal.write(b'{"id": "1')
    with open(tmp_path / "f.1of2.json.part", "ab") as log:
        log.write(b'\n["1')
    done = cli("pre-processing/extract_features.py", many, *shards_of(tmp_path, "1/2"))
    assert "resuming: " in done.stderr and "Traceback" not in done.stderr
    extract(many, *shards_of(tmp_path, "0/2"))
    names = {"f.0of2.hdf5", "f.0of2.json", "f.1of2.hdf5", "f.1of2.json"}
    assert {path.name for path in tmp_path.iterdir()} == {*names, "unbroken"} and {
        p.name for p in unbroken.iterdir()
    } == names
    for i in (0, 1):
        assert (tmp_path / f"f.{i}of2.hdf5").read_bytes() == (
            unbroken / f"f.{i}of2.hdf5"
        ).read_bytes()
        reports = [
            json.loads((folder / f"f.{i}of2.json").read_text()) for folder in (tmp_path, unbroken)
        ]
        assert list(reports[0]["videos"]) == list(reports[1]["videos"])
        assert all(
            row["frames"] == (4 if name != "broken" else 0)
            for name, row in reports[0]["videos"].items()
        )
    parts = [list(FeatureStore(tmp_path / f"f.{i}of2.hdf5")) for i in (0, 1)]
    assert (
        sorted(parts[0] + parts[1]) == [f"clip{i:02}" for i in range(16)]
        and min(map(len, parts)) > 1
    )


def test_under_a_launcher_every_process_does_its_shard_and_none_is_ended_by_anothers_failure(
    tmp_path, many
):
    """One of two processes has a broken file only, and is through at once; launchers end the rest when one ends in failure."""
    ids = {
        part: [name for name in map(str, range(30)) if listing.shard_of(name, 2) == part]
        for part in (0, 1)
    }
    lines = [f"{name}\t{many}/clip{int(name) % 16:02}.mkv" for name in ids[0]] + [
        f"{ids[1][0]}\t{many}/broken.mp4"
    ]
    (tmp_path / "list.tsv").write_text("\n".join(lines))
    script = [
        "pre-processing/extract_features.py",
        tmp_path / "list.tsv",
        *shards_of(tmp_path, "0/1"),
        "--workers",
        "1",
    ]
    done = cli("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *script)
    assert done.returncode and "exitcode" in done.stderr
    rows = [json.loads((tmp_path / f"f.{i}of2.json").read_text())["videos"] for i in (0, 1)]
    assert sorted(rows[0]) == sorted(ids[0]) == sorted(FeatureStore(tmp_path / "f.0of2.hdf5"))
    assert [row["status"] for row in rows[1].values()] == ["failed"] and not (
        tmp_path / "f.1of2.hdf5"
    ).exists()


@pytest.fixture
def decoded(monkeypatch):
    """The ids of the videos that are given to decoders, as they come; an id put into `interrupt` is Ctrl-C there."""
    ids, interrupt = [], set()

    def frames_of(decoder, video, original=decoding.Decoder.frames):
        if video.id in interrupt:
            raise KeyboardInterrupt
        ids.append(video.id)
        return original(decoder, video)

    monkeypatch.setattr(decoding.Decoder, "frames", frames_of)
    return SimpleNamespace(ids=ids, interrupt=interrupt)


def test_a_finished_extraction_does_what_is_new_and_nothing_else(tmp_path, decoded):
    folder, seen = tmp_path / "videos", decoded.ids
    folder.mkdir()

    def again(*more):
        """Run; returns its status and the videos that were decoded."""
        seen.clear()
        status = extract(folder, "--output", tmp_path / "f.hdf5", "--stages", "_blocks.0", *more)
        return status, sorted(seen)

    for i in range(3):
        write_video(folder / f"{i}.mkv", textured(i, 10))
    (folder / "broken.mkv").write_bytes(b"no video")
    assert again() == (3, ["0", "1", "2", "broken"])
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.glob("f.*")}
    rows = all_rows(tmp_path / "f.hdf5")
    assert again() == (3, [])
    assert {
        path: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.glob("f.*")
    } == before
    assert again("--retry_failed") == (3, ["broken"])
    assert {**all_rows(tmp_path / "f.hdf5")}.keys() == rows.keys()

    write_video(
        folder / "broken.mkv", textured(7, 10)
    )  # mended: another file, so no flag is needed
    write_video(folder / "new.mkv", textured(8, 10))
    write_video(folder / "1.mkv", textured(9, 20))  # changed
    (folder / "2.mkv").unlink()  # gone, but its features stay
    assert again() == (0, ["1", "broken", "new"])
    extended = all_rows(tmp_path / "f.hdf5")
    assert list(extended) == ["0", "1", "2", "broken", "new"] and len(extended["1"]) == 2
    assert np.array_equal(extended["0"], rows["0"]) and np.array_equal(extended["2"], rows["2"])
    assert list(json.loads((tmp_path / "f.json").read_text())["videos"]) == list(extended)
    with pytest.raises(InputError, match="pooling imac, not mac"):
        again("--pooling", "mac")


def listed(folder, names):
    (folder / "list.tsv").write_text("".join(f"{name}\t{name}.mkv\n" for name in names))
    return (
        folder / "list.tsv",
        "--output",
        folder / "f.hdf5",
        "--stages",
        "_blocks.0",
        "--workers",
        1,
        "--batch_sz",
        1,
    )


def test_features_of_listed_files_that_are_gone_stay(tmp_path, decoded):
    for name in "abcd":
        write_video(tmp_path / f"{name}.mkv", textured(ord(name), 10))
    assert extract(*listed(tmp_path, "abc")) == 0
    rows = all_rows(tmp_path / "f.hdf5")
    for name in "ab":
        (tmp_path / f"{name}.mkv").unlink()
    for _ in range(2):
        assert extract(*listed(tmp_path, "abcd")) == 0
    assert decoded.ids == list("abcd")
    extended = all_rows(tmp_path / "f.hdf5")
    assert list(extended) == list("abcd") and all(
        np.array_equal(extended[name], rows[name]) for name in rows
    )
    report = json.loads((tmp_path / "f.json").read_text())["videos"]
    assert [row["status"] for row in report.values()] == ["ok"] * 4


@pytest.mark.parametrize("still_listed", [True, False])
def test_a_stopped_run_goes_on_when_finished_videos_are_gone_or_changed(
    tmp_path, decoded, still_listed
):
    names = "abcdefgh"
    for name in names:
        write_video(tmp_path / f"{name}.mkv", textured(ord(name), 10))
    decoded.interrupt.add("h")
    with pytest.raises(KeyboardInterrupt):
        extract(*listed(tmp_path, names))
    spooled = journal_lines(tmp_path / "f.hdf5.part.jsonl") - 1
    assert spooled >= 2  # a and b, and some of the others
    (tmp_path / "a.mkv").unlink()
    write_video(tmp_path / "b.mkv", textured(0, 20))
    decoded.ids.clear()
    decoded.interrupt.clear()
    assert extract(*listed(tmp_path, names if still_listed else names[1:])) == 0
    assert sorted(decoded.ids) == ["b", *names[spooled:]]
    assert FeatureStore(tmp_path / "f.hdf5").lengths == {name: 1 + (name == "b") for name in names}


def test_a_video_that_is_broken_now_leaves_the_store_also_when_the_run_was_stopped(
    tmp_path, decoded
):
    for name in "abcdefgh":
        write_video(tmp_path / f"{name}.mkv", textured(ord(name), 10))
    assert extract(*listed(tmp_path, "ab")) == 0
    (tmp_path / "b.mkv").write_bytes(b"no video")
    decoded.interrupt.add("h")
    with pytest.raises(KeyboardInterrupt):
        extract(*listed(tmp_path, "bcdefgh"))
    assert '["b"' in (tmp_path / "f.json.part").read_text()
    (tmp_path / "f.hdf5.part.jsonl").unlink()  # to start anew
    decoded.interrupt.clear()
    for names in ("b", "bcdefgh"):
        assert extract(*listed(tmp_path, names)) == 3
        assert list(FeatureStore(tmp_path / "f.hdf5")) == ["a", *names[1:]]


@pytest.mark.parametrize("theirs", ['{"mine": 1}', "[1]", "text"])
def test_a_json_file_of_somebody_else_is_left_alone(tmp_path, theirs):
    write_video(tmp_path / "a.mkv", numbered(10))
    (tmp_path / "f.json").write_text(theirs)
    with pytest.raises(InputError, match="f.json', where the report goes, is not a report"):
        extract(*listed(tmp_path, "a"))
    assert {path.name for path in tmp_path.iterdir()} == {"a.mkv", "list.tsv", "f.json"}
    assert (tmp_path / "f.json").read_text() == theirs


def test_a_killed_extension_leaves_the_finished_store_and_goes_on(tmp_path, many):
    folder = tmp_path / "videos"
    folder.mkdir()
    for path in sorted(many.glob("*.mkv"))[:2]:
        (folder / path.name).symlink_to(path)
    arguments = [folder, *shards_of(tmp_path, "0/1")]
    assert extract(*arguments) == 0
    small = (tmp_path / "f.hdf5").read_bytes()
    for path in sorted(many.glob("*.mkv"))[2:]:
        (folder / path.name).symlink_to(path)
    part = tmp_path / "f.hdf5.part.jsonl"
    kill_when(
        start("pre-processing/extract_features.py", *arguments), lambda: journal_lines(part) > 4
    )
    assert (tmp_path / "f.hdf5").read_bytes() == small and journal_lines(part) > 4
    assert extract(*arguments) == 0 and not part.exists()
    assert extract(folder, *shards_of(tmp_path / "whole", "0/1")) == 0
    assert (tmp_path / "f.hdf5").read_bytes() == (tmp_path / "whole" / "f.hdf5").read_bytes()


def test_the_papers_features_have_3840_channels_with_random_weights_and_with_a_files(
    tmp_path, clips
):
    (tmp_path / "list.tsv").write_text(f"v\t{clips}/sub/clip1.mkv\n")
    paper = [
        tmp_path / "list.tsv",
        "--backbone",
        "resnet50",
        "--pooling",
        "l3_imac",
        "--dtype",
        "float32",
    ]
    assert extract(*paper, "--output", tmp_path / "random.hdf5") == 0
    model = backbones.import_torchvision().models.resnet50()
    torch.save(model.state_dict(), tmp_path / "w.pth")
    assert (
        extract_features.main(
            [
                *map(str, paper),
                "--output",
                str(tmp_path / "file.hdf5"),
                "--weights",
                str(tmp_path / "w.pth"),
            ]
        )
        == 0
    )
    random, given = (FeatureStore(tmp_path / f"{name}.hdf5") for name in ("random", "file"))
    assert random.meta["weights"] == "random" and re.fullmatch(
        r"w\.pth sha256 [0-9a-f]{16}", given.meta["weights"]
    )
    for store in (random, given):
        assert store["v"].shape == (2, 3840)
        parts = np.split(store["v"], np.cumsum([256, 512, 1024]), axis=1)
        assert all(np.allclose(np.linalg.norm(part, axis=1), 1, atol=1e-4) for part in parts)
    assert np.abs(random["v"] - given["v"]).max() > 0.01


# --- decoders that die -----------------------------------------------------------------------------------------------

SABOTAGE = """
import os, signal, sys, time
sys.path.insert(0, {folder!r})
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
    if name.startswith("torn"):
        os.write(int(sys.argv[1]), decoding.FRAME_BYTES.to_bytes(4, "big") + bytes(1000))  # the beginning of a message
        os.kill(os.getpid(), signal.SIGKILL)
    if name.startswith("ends"):
        os._exit(5)

decoding.read_frames = read_frames
decoding.serve(decoding.Connection(int(sys.argv[1])))
"""


@pytest.fixture
def saboteur(tmp_path, monkeypatch):
    """Decoder processes that come to grief after the frames of some videos."""
    path = tmp_path / "saboteur.py"
    path.write_text(SABOTAGE.format(folder=str(ROOT)))
    monkeypatch.setattr(decoding, "__file__", str(path))


def first_channel(images):
    return images[:, 112, 112, :1].astype(np.float32)


def test_a_video_that_hangs_or_crashes_its_decoder_is_named_and_the_others_go_on(
    tmp_path, saboteur
):
    names = ["hangs", "crashes", "a", "greedy", "odd", "torn", "b", "crashes too", "c"]
    for name in names:
        write_video(tmp_path / f"{name}.mkv", numbered(25))
    videos = [decoding.Video(name, tmp_path / f"{name}.mkv") for name in names]
    done = {
        video.id: video
        for video in extraction.extract(videos, first_channel, time_limit=1, workers=1)
    }
    reasons = {name: video.reason for name, video in done.items()}
    assert reasons["hangs"] == "no frame in 1 seconds of decoding (--time_limit)"
    assert reasons["crashes"] == reasons["crashes too"] == "decoding it crashes FFmpeg (SIGSEGV)"
    assert (
        reasons["torn"] == "decoding it crashes FFmpeg (SIGKILL)"
    )  # the kernel's, where memory is short
    assert reasons["greedy"] == "MemoryError" and "not an error" in reasons["odd"]
    assert all(
        not reasons[name] and np.concatenate(done[name].rows).tolist() == [0, 10, 20]
        for name in "abc"
    )


def test_waiting_for_the_backbone_is_no_hanging(tmp_path):
    write_video(tmp_path / "v.mkv", numbered(80))

    def slow(images):
        time.sleep(0.5)
        return first_channel(images)

    (video,) = extraction.extract(
        [decoding.Video("v", tmp_path / "v.mkv")], slow, time_limit=0.4, batch_sz=1, streams=1
    )
    assert len(video.rows) == 8 and not video.reason


def test_broken_videos_are_told_before_a_batch_of_frames_is_full():
    waiting = queue.Queue()
    for name in range(16):
        waiting.put((name, None))
    assert len(next(extraction.cut_batches(SimpleNamespace(get=waiting.get_nowait), 1, 4))) == 16


def test_a_decoder_that_cannot_work_at_all_stops_the_run(tmp_path, saboteur):
    write_video(tmp_path / "ends.mkv", numbered(3))
    with pytest.raises(RuntimeError, match="status 5"):
        list(extraction.extract([decoding.Video("v", tmp_path / "ends.mkv")], first_channel))


def test_breaking_off_ends_the_decoders(tmp_path, monkeypatch):
    made = []

    class Noted(decoding.Decoder):
        def _start(self):
            super()._start()
            made.append(self.process)

    monkeypatch.setattr(extraction, "Decoder", Noted)
    for i in range(6):
        write_video(tmp_path / f"{i}.mkv", numbered(200))
    videos = [decoding.Video(str(i), tmp_path / f"{i}.mkv") for i in range(6)]
    for _ in extraction.extract(videos, first_channel, fps=Fraction(10), workers=2):
        break
    assert made and all(process.poll() is not None for process in made)


# --- the benchmark ---------------------------------------------------------------------------------------------------


def test_the_benchmarks_clips_are_as_long_as_asked_also_of_a_short_film(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from extract import make_clips

    write_video(tmp_path / "film.mkv", numbered(30))
    clips = make_clips(tmp_path / "clips", tmp_path / "film.mkv", 2, 2, (64, 48))
    assert [
        len(list(decoding.read_frames(decoding.Video("v", clip), Fraction(25)))) for clip in clips
    ] == [50, 50]


# --- memory ----------------------------------------------------------------------------------------------------------


def test_frames_in_memory_follow_the_batch_not_the_video(tmp_path, monkeypatch):
    write_video(tmp_path / "long.mkv", numbered(300))
    decoded = taken = most = 0

    def counted(decoder, video, original=decoding.Decoder.frames):
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

    monkeypatch.setattr(decoding.Decoder, "frames", counted)
    shown = []
    options = dict(
        fps=Fraction(10),
        batch_sz=2,
        streams=2,
        watch=lambda video, image: shown.append(index_of(image)),
    )
    (video,) = extraction.extract([decoding.Video("v", tmp_path / "long.mkv")], features, **options)
    assert np.concatenate(video.rows).tolist() == shown == list(range(300))
    assert (
        most <= 2 * 2 + 2 * (2 + 2) + 1
    )  # the queue, batches under way and being cut, one in a decoder's hand


BAD = [
    (["nowhere"], "'nowhere' does not exist"),
    (["hollow"], "holds no video"),
    (["videos", "--backbone", "resnet51"], "unknown backbone 'resnet51'"),
    (["videos", "--pca", "narrow.npz"], "width 1752.*width 4"),
    (["videos", "--shard", "2/2"], "--shard 2/2 must be I/N"),
    (["videos", "--time_limit", "0"], "--time_limit must be positive"),
    (["videos", "--fps", "1/0"], "--fps 1/0 must be a number"),
    (["videos", "--output", "f.txt"], "suffix .hdf5"),
]


def test_bad_input_is_one_line_and_status_2_and_leaves_nothing(tmp_path, monkeypatch):
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
    before = set(tmp_path.iterdir())
    monkeypatch.chdir(tmp_path)
    for arguments, message in BAD:
        with pytest.raises(InputError, match=message):
            extract("--output", "f.hdf5", *arguments)
    words = [tmp_path / "videos", "--output", tmp_path / "f.hdf5", "--shard", "2/2"]
    assert "--shard 2/2" in one_error(cli("pre-processing/extract_features.py", *words))
    assert set(tmp_path.iterdir()) == before
