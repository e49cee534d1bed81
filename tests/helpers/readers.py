"""Every reader of files that others wrote, with a good file and with what may damage it.

A reader that is given a damaged file returns, or raises InputError or OSError: nothing else.
"""

import contextlib
import io
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import convert
import numpy as np
import torch

import checkpoint
import reproduce
from data import AugmentedPairDataset, VCDBPairDataset
from datasets import paper_tables
from datasets.registry import load_evaluation_set
from datasets.similarity_files import read_similarities
from features.decoding import Decoder, Video
from features.extraction_report import ExtractionReport
from features.layouts import open_source
from features.listing import find_videos
from features.pca import load_projection
from features.store import FeatureStore, StoreWriter
from helpers import mutations as m
from helpers.commands import ROOT, call
from helpers.feature_files import some_features, write_ours, write_released
from helpers.library import add_made_up, made_up_video
from helpers.worlds import write_public_sets
from model import load_encoder
from retrieval.comparator import VideoComparator, load_comparator
from training_log import read_log, series
from untrusted import read_ids
from utils import InputError
from videoindex.choices import chosen_plan, read_choices
from videoindex.index import VideoIndex
from videoindex.parts import FilmParts, remove_orphans
from videoindex.pipeline import CALIBRATED, EncodedVideo, read_calibration
from videoindex.plan import write_plan, write_script
from videoindex.report import write_duplicates, write_query
from videoindex.store import FileEntry, IndexStore, KnownFile

OLD = ROOT / "tests/data/5aa4c1c"
MAX_FRAMES = 2000  # taken from a damaged video, whose clock may say years


class Reader(NamedTuple):
    """A reader: make(folder) writes good files, read(folder) reads them.

    files: {pattern of names in the folder: mutations}
    """

    make: Callable[[Path], None]
    read: Callable[[Path], None]
    files: dict[str, list[Callable]]


# --- features ------------------------------------------------------------------------------------


def read_store(folder, name="x.hdf5"):
    store = open_source(folder / name, skip_bad=True)
    for video in store:
        store.read(video)
    store.fingerprint()
    store.checksums()
    call(convert.main, "info", folder / name)
    call(convert.main, "verify", folder / name)


def make_packed(folder):
    write_ours(folder / "x.hdf5", some_features(), fps="1", stages="a,b")


def make_datasets(folder):
    write_released(folder / "x.hdf5", some_features())
    call(convert.main, "to", folder / "x.hdf5", folder / "y.hdf5", "--layout", "datasets")
    (folder / "y.hdf5").replace(folder / "x.hdf5")


def make_folder(folder):
    write_released(folder / "x.hdf5", some_features(["a", "b/c"]))
    call(convert.main, "to", folder / "x.hdf5", folder / "x")


def make_spool(folder):
    for name in ("spool.hdf5.part", "spool.hdf5.part.jsonl"):
        shutil.copy(OLD / "store" / name, folder)


def read_spool(folder):
    header = json.loads((OLD / "store/spool.hdf5.part.jsonl").read_text().splitlines()[0])
    with StoreWriter(folder / "spool.hdf5", header["dtype"], header["meta"]) as writer:
        width = next(iter(writer._entries), {"C": 4})["C"]
        writer.add("another", np.ones((2, width)))


def make_report(folder):
    report = ExtractionReport(folder / "x.json", {"fps": "1"})
    for i in range(3):
        report.add(Video(f"v{i}", Path("x"), reason="bad" * (i == 1)), "1 bytes, 2", 3)
    report.write(["v0", "v1"])
    report.add(Video("v3", Path("x")), "1 bytes, 2", 3)


def read_report(folder):
    report = ExtractionReport(folder / "x.json", {"fps": "1"})
    for name in list(report.rows):
        report.stored_source(name)
        report.failed(name, "1 bytes, 2")
    report.add(Video("v9", Path("x")), "", 1)
    report.write(report.rows)


def make_pca(folder):
    shutil.copy(OLD / "pca/pca.npz", folder / "ours.npz")
    rng = np.random.default_rng(0)
    U = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    mu = rng.normal(size=6)
    np.savez(folder / "theirs.npz", U=U, lams=np.arange(1.0, 7), mu=mu, Utmu=U @ mu)


def read_pca(folder):
    for path in folder.glob("*.npz"):
        projection = load_projection(path)
        projection.check(len(projection.matrix), "features")
        projection(np.ones((3, len(projection.matrix)), np.float16))


# --- models --------------------------------------------------------------------------------------


def make_model(folder):
    shutil.copy(OLD / "train/finished/model.pth", folder / "model.pth")


def make_released(folder):
    shutil.copy(OLD / "released/released.pth", folder / "model.pth")


def read_model(folder):
    _, encoder, features = load_encoder(folder / "model.pth", 4)
    with torch.inference_mode():
        x = torch.ones(1, 2, min(encoder.feature_size, 4096))
        if x.shape[2] == encoder.feature_size:
            encoder.encode_video_and_frames(x, torch.tensor([2]))
    [f"{key}{value}" for key, value in features.items()]


def make_comparator(folder):
    torch.save(VideoComparator().state_dict(), folder / "model.pth")


def read_comparator(folder):
    load_comparator(folder / "model.pth")(torch.ones(5, 5))


def make_run(folder):
    shutil.copytree(OLD / "train/stopped", folder / "run")
    (folder / "run/checkpoint.prev.pth").unlink()  # it would take the place of a damaged one


def read_run(folder):
    expected = torch.load(OLD / "train/stopped/checkpoint.pth", weights_only=True).keys()
    state = checkpoint.newest_readable_checkpoint(folder / "run", expected)
    args = SimpleNamespace(seed=7)
    checkpoint.check_same_run(state, args, {}, folder)
    checkpoint.resume_notes(state, 3, SimpleNamespace(world_size=2), 9)


def make_log(folder):
    shutil.copy(OLD / "train/finished/log.jsonl", folder)


def read_run_log(folder):
    series(read_log(folder))


# --- annotations ---------------------------------------------------------------------------------


def make_annotations(folder):
    write_public_sets(folder)
    for path in (OLD / "train/annotations").iterdir():
        shutil.copy(path, folder)


def read_annotations(folder):
    for name in ("FIVR-5K", "CC_WEB_VIDEO", "EVVE", "VCDB", "DEMO-VAL"):  # others read like these
        evaluation_set = load_evaluation_set(name, folder, ["1/1_1_Y"])
        ids = [*evaluation_set.queries, *evaluation_set.database]
        evaluation_set.coverage(ids)
        evaluation_set.fingerprint()
        videos = evaluation_set.database[:200]
        queries = evaluation_set.queries[:20]
        evaluation_set.evaluate_table(queries, videos, np.zeros((len(queries), len(videos))))


def make_pairs(folder):
    shutil.copy(OLD / "train/vcdb.pickle", folder)
    shutil.copy(OLD / "train/features.hdf5", folder)


def read_pairs(folder):
    store, path = FeatureStore(OLD / "train/features.hdf5"), folder / "vcdb.pickle"
    for make in (
        lambda: VCDBPairDataset(path, store, neg_num=2, mask_shared=True),
        lambda: AugmentedPairDataset(store, path, neg_num=2),
    ):
        data = make()
        data[0]
        data.false_negative_mask([0])


def make_similarities(folder):
    shutil.copy(OLD / "cache/similarities.json", folder)


def read_similarity_file(folder):
    table = read_similarities(folder / "similarities.json")
    evaluation_set = load_evaluation_set("DEMO-VAL", OLD / "train/annotations")
    evaluation_set.evaluate(table)


def make_lists(folder):
    (folder / "list.tsv").write_text("a\tx.mp4\nb b\ty.mp4\n\nc\tz.mp4\n")
    (folder / "ids.txt").write_text("a\nb b\nc\n")


def read_lists(folder):
    find_videos(str(folder / "list.tsv"))
    read_ids(folder / "ids.txt")
    convert.read_ids(folder / "ids.txt", ["a", "b b"])


def make_tables(folder):
    shutil.copy(ROOT / "datasets/paper_tables.toml", folder)


def read_tables(folder):
    tables = paper_tables.read_tables(folder / "paper_tables.toml")
    args = SimpleNamespace(set="DEMO", data=folder, output=folder, seeds=1, device="cpu")
    args.annotation_dir = folder
    for name in paper_tables.select_tables(["all"], tables):
        paper_tables.plan(tables, name, args)


def make_results(folder):
    shutil.copy(OLD / "cache/evaluation.json", folder)


def read_results(folder):
    row = paper_tables.Row("", {}, False, "", "")
    row.results, row.needs = folder / "evaluation.json", [paper_tables.Need(ROOT / "utils.py", "")]
    row.evaluate = json.loads((OLD / "cache/evaluation.json").read_text())["command"].split(" ")
    reproduce.read_results(row)


# --- an index ------------------------------------------------------------------------------------

IDENTITY = {"encoder": "mean", "fps": "1", "size": 16, "window": 60}


def make_index(folder):
    settings = {"identity": IDENTITY, "options": {"encoder": "mean"}, "calibration": {}}
    settings |= {"index_type": "Flat", "versions": {"torch": "2"}}
    settings["calibration"] = {
        "min_similarity": 0.1,
        "threshold": 0.1,
        "certain": 2.0,
        "likely": 1.0,
        "radius": 0.1,
    }
    store = IndexStore.create(folder / "index", 16, settings)
    rng = np.random.default_rng(0)
    with store.writing():
        for number in range(4):
            video = made_up_video(rng, num_windows=2, num_frames=5)
            add_made_up(store, number, video, folder)
    store.db.close()


def read_index(folder):
    index = VideoIndex.load(folder / "index")
    store = index.store
    try:
        list(store.find_damage())
        store.totals(), store.known_files(), store.disk_bytes(), store.hole_share(), index.fps
        made = made_up_video(np.random.default_rng(0), num_windows=2, num_frames=5)
        clip = EncodedVideo(Path("clip"), "", 5.0, made.frame_descriptors, made.window_descriptors)
        clip.thumbnails = made.thumbnails
        matches = index.query(clip, threshold=-2.0)
        groups = index.duplicates(threshold=0.0, radius=0.0)
        write_query(folder / "q.html", index, [(clip, matches)])
        write_duplicates(folder / "d.html", index, groups)
        with store.writing():
            store.remove(list(store.known_files())[:1])
            store.compact()
    finally:
        store.db.close()


def film_parts(folder):
    made_by = {"identity": IDENTITY, "frame_rule": "on_screen", "device": "cpu", "row_size": 8}
    return FilmParts(folder, SimpleNamespace(**made_by), 4)


def make_parts(folder):
    (folder / "film.mp4").write_bytes(b"film")
    facts = (folder / "film.mp4").stat()
    parts, rows = film_parts(folder), list(np.ones((9, 8), np.float16))
    for count in (5, 9):
        parts.save("0" * 64, FileEntry("film.mp4", 4, facts.st_mtime_ns), rows[:count])


def read_parts(folder):
    rows = film_parts(folder).load("0" * 64)
    assert rows.shape in [(0, 8), (4, 8), (8, 8)] and np.isfinite(rows).all()
    remove_orphans(folder, lambda sha256: False)


def make_calibration(folder):
    shutil.copy(ROOT / "models/demo/calibration.json", folder)


def read_calibrations(folder):
    original = json.loads((ROOT / "models/demo/calibration.json").read_text())
    for entry in original.values():
        found = read_calibration(folder, entry["identity"])
        [float(found.get(name, 0)) for name in CALIBRATED]


def make_choices(folder):
    value = {"keep": ["/a"], "drop": ["/b", "/c"], "not_a_match": [["/a", "/b"], ["/a", "/c"]]}
    (folder / "choices.json").write_text(json.dumps(value))


def read_chosen(folder):
    choices = read_choices(folder / "choices.json")
    known = {path: KnownFile(1, 1, content=1) for path in ("/a", "/b")}
    rows = chosen_plan(choices, known)
    write_plan(folder / "plan.csv", rows)
    write_script(folder / "moves.sh", rows, "dropped")


# --- videos --------------------------------------------------------------------------------------


def make_video(folder):
    shutil.copy(OLD / "index/clip.mkv", folder)


def read_video(folder):
    decoder = Decoder(time_limit=10)
    try:
        for path in folder.iterdir():
            for i, _ in enumerate(decoder.frames(Video("v", path))):
                if i > MAX_FRAMES:
                    return
    finally:
        decoder.close()


READERS = {
    "packed": Reader(
        make_packed, read_store, {"*.hdf5": [m.mutate_hdf5, m.mutate_hdf5, m.mutate_bytes]}
    ),
    "datasets": Reader(
        make_datasets, read_store, {"*.hdf5": [m.mutate_hdf5, m.mutate_hdf5, m.mutate_bytes]}
    ),
    "npy": Reader(
        make_folder,
        lambda folder: read_store(folder, "x"),
        {"x/**/*.npy": [m.mutate_bytes], "x/store.json": [m.mutate_json, m.mutate_bytes]},
    ),
    "spool": Reader(
        make_spool,
        read_spool,
        {
            "*.part": [m.mutate_bytes],
            "*.jsonl": [m.mutate_json_line, m.mutate_json_line, m.mutate_bytes],
        },
    ),
    "report": Reader(
        make_report, read_report, {"*.json": [m.mutate_json], "*": [m.mutate_bytes, m.mutate_text]}
    ),
    "pca": Reader(
        make_pca, read_pca, {"*": [m.mutate_npz, m.mutate_npz, m.mutate_zip, m.mutate_bytes]}
    ),
    "model": Reader(make_model, read_model, {"*": [m.mutate_torch, m.mutate_zip, m.mutate_bytes]}),
    "released": Reader(
        make_released, read_model, {"*": [m.mutate_torch, m.mutate_zip, m.mutate_bytes]}
    ),
    "comparator": Reader(
        make_comparator, read_comparator, {"*": [m.mutate_torch, m.mutate_zip, m.mutate_bytes]}
    ),
    "checkpoint": Reader(
        make_run, read_run, {"run/*.pth": [m.mutate_torch, m.mutate_zip, m.mutate_bytes]}
    ),
    "log": Reader(make_log, read_run_log, {"*": [m.mutate_json_line, m.mutate_bytes]}),
    "annotations": Reader(
        make_annotations,
        read_annotations,
        {
            "*.pickle": [m.mutate_pickle, m.mutate_pickle, m.mutate_pickle, m.mutate_bytes],
            "*.json": [m.mutate_json, m.mutate_bytes],
            "*.txt": [m.mutate_text, m.mutate_bytes],
        },
    ),
    "pairs": Reader(
        make_pairs, read_pairs, {"*.pickle": [m.mutate_pickle, m.mutate_pickle, m.mutate_bytes]}
    ),
    "similarities": Reader(
        make_similarities, read_similarity_file, {"*": [m.mutate_json, m.mutate_bytes]}
    ),
    "lists": Reader(make_lists, read_lists, {"*": [m.mutate_text, m.mutate_bytes]}),
    "tables": Reader(make_tables, read_tables, {"*": [m.mutate_text, m.mutate_bytes]}),
    "results": Reader(make_results, read_results, {"*": [m.mutate_json, m.mutate_bytes]}),
    "index": Reader(
        make_index,
        read_index,
        {
            "index/index.db": [m.mutate_sqlite, m.mutate_sqlite, m.mutate_bytes],
            "index/*-0.*": [m.mutate_bytes],
        },
    ),
    "parts": Reader(make_parts, read_parts, {"*.npz": [m.mutate_bytes]}),
    "calibration": Reader(
        make_calibration, read_calibrations, {"*": [m.mutate_json, m.mutate_bytes]}
    ),
    "choices": Reader(
        make_choices, read_chosen, {"*.json": [m.mutate_json, m.mutate_json, m.mutate_bytes]}
    ),
    "video": Reader(make_video, read_video, {"*": [m.mutate_bytes]}),
}


class Damaged:
    """Good files of a reader, made once; `try_seed` damages a copy and reads it."""

    def __init__(self, name: str, folder: Path):
        self.reader, self.good, self.copy = READERS[name], folder / "good", folder / "copy"
        self.good.mkdir(parents=True)
        self.reader.make(self.good)

    def try_seed(self, seed) -> str:
        """Returns the refusal, or "" if the files were read; raises whatever else is raised."""
        rng = random.Random(seed)
        shutil.rmtree(self.copy, ignore_errors=True)
        shutil.copytree(self.good, self.copy)
        for _ in range(rng.choice([1, 1, 1, 2])):
            pattern = rng.choice(list(self.reader.files))
            path = rng.choice(sorted(p for p in self.copy.glob(pattern) if p.is_file()))
            with contextlib.suppress(Exception):  # a file that an earlier mutation broke
                rng.choice(self.reader.files[pattern])(path, rng)
        return self.read()

    def read(self) -> str:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            try:
                self.reader.read(self.copy)
                return ""
            except (InputError, OSError) as error:
                assert "\n" not in str(error), error
                return str(error) or "OSError"
