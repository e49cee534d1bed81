"""Files that others wrote: whatever they hold, a reader returns, or says in one line why not."""

import io
import json
import os
import pickle
import resource
import shutil
import sqlite3
import subprocess
import sys
import zipfile
from pathlib import Path

import convert
import h5py
import numpy as np
import pytest
import torch
from helpers.commands import ROOT, call, environment, one_error, python, refused
from helpers.feature_files import some_features, write_ours
from helpers.library import add_made_up, made_up_video
from helpers.readers import READERS, Damaged, make_index
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from features.layouts import open_source
from features.pca import load_projection
from features.store import FeatureStore
from model import load_encoder
from untrusted import load_pickle, require_bounded
from utils import InputError, one_line, printable
from videoindex.index import VideoIndex
from videoindex.pipeline import EncodedVideo
from videoindex.store import IndexStore

# --- every reader --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """{reader: its Damaged files}, made when they are first asked for."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = Damaged(name, tmp_path_factory.mktemp(name))
        return made[name]

    return get


@pytest.mark.parametrize("name", READERS)
def test_good_files_are_read(damaged, name):
    files = damaged(name)
    shutil.rmtree(files.copy, ignore_errors=True)
    shutil.copytree(files.good, files.copy)
    assert files.read() == ""


# Those that take long for an input have fewer.
EXAMPLES = {"video": 5, "annotations": 8, "packed": 10, "datasets": 8, "comparator": 8, "index": 15}


@pytest.mark.parametrize("name", READERS)
def test_damaged_files_are_read_or_refused_in_a_line(damaged, name):
    files = damaged(name)

    @settings(
        max_examples=EXAMPLES.get(name, 20),
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.integers(0, 2**32))
    def read_or_refuse(seed):
        files.try_seed(seed)  # anything but InputError and OSError fails the test

    read_or_refuse()


# --- HDF5 ----------------------------------------------------------------------------------------

SECRET = b"secret" * 100


def external(file, secret):
    file.create_dataset("v", (4, 8), "f2", external=[(str(secret), 0, 64)])


def virtual(file, secret):
    with h5py.File(secret.with_suffix(".hdf5"), "w") as other:
        other["x"] = np.ones((4, 8), "f2")
    layout = h5py.VirtualLayout((4, 8), "f2")
    layout[:] = h5py.VirtualSource(secret.with_suffix(".hdf5"), "x", (4, 8))
    file.create_virtual_dataset("v", layout)


def external_link(file, secret):
    virtual(file, secret)
    del file["v"]
    file["v"] = h5py.ExternalLink(str(secret.with_suffix(".hdf5")), "x")


def soft_link(file, secret):
    file["v"] = h5py.SoftLink("/good")


def huge(file, secret):
    file.create_dataset("v", (2**40, 8), "f2", chunks=(1000, 8))


def huge_chunk(file, secret):
    file.create_dataset("v", data=np.zeros((3, 8), "f2"), maxshape=(None, 8), chunks=(2**26, 8))


def zeros(file, secret):
    file.create_dataset("v", data=np.zeros((2**20, 8), "f2"), compression="gzip")


def foreign_filter(file, secret):
    plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plist.set_chunk((4, 8))
    plist.set_filter(32015, h5py.h5z.FLAG_OPTIONAL, ())  # a plugin that is not there
    space, kind = h5py.h5s.create_simple((4, 8)), h5py.h5t.py_create(np.dtype("f2"))
    h5py.h5d.create(file.id, b"v", kind, space, plist).write(
        h5py.h5s.ALL, h5py.h5s.ALL, np.ones((4, 8), "f2")
    )


HDF5 = [external, virtual, external_link, soft_link, huge, huge_chunk, zeros, foreign_filter]


@pytest.mark.parametrize("make", HDF5, ids=lambda make: make.__name__)
def test_hdf5_is_not_followed_out_of_its_file_or_beyond_its_size(make, tmp_path):
    secret, path = tmp_path / "secret", tmp_path / "x.hdf5"
    secret.write_bytes(SECRET)
    with h5py.File(path, "w") as file:
        file["good"] = np.ones((4, 8), "f2")
        make(file, secret)
    for command in (["to", path, tmp_path / "copy.hdf5"], ["info", path]):
        assert "'v' " in refused(convert.main, *command)
    assert not (tmp_path / "copy.hdf5").exists()
    verified = call(convert.main, "verify", path)
    assert verified.returncode == 3 and verified.stdout.startswith("v\t")
    assert list(open_source(path, skip_bad=True)) == ["good"]

    packed = write_ours(tmp_path / "packed.hdf5", some_features())
    with h5py.File(packed, "r+") as file:
        del file["frames"]
        make(file, secret) if make is not soft_link else file.update({"good": np.ones((4, 8))})
        if "v" not in file or make is soft_link:
            file["v"] = h5py.SoftLink("/good")
        file.move("v", "frames")
    refused(convert.main, "to", packed, tmp_path / "copy.hdf5")


@pytest.mark.parametrize(
    "name, value",
    [
        ("offsets", np.array([0, 5, 3, 2**64 - 1, 9], "u8")),
        ("offsets", np.array([0.0, 1, 2, 3, np.nan])),
        ("offsets", np.array([0, -1, 2, 3, 9])),
        ("offsets", np.zeros((5, 1), int)),
        ("ids", np.arange(4)),
        ("ids", np.zeros((2, 2), "S1")),
        ("ids", np.array([b"\xff"] * 4)),
        ("frames", np.zeros((9, 8), "S2")),
        ("frames", np.zeros((9, 8), "c8")),
        ("frames", np.zeros((9,), "f2")),
    ],
)
def test_packed_arrays_of_other_types_are_refused(name, value, tmp_path):
    features = {f"v{i}": np.ones((i + 1, 8)) for i in range(4)}
    path = write_ours(tmp_path / "x.hdf5", features)
    with h5py.File(path, "r+") as file:
        del file[name]
        file[name] = value
    with pytest.raises(InputError, match="x.hdf5"):
        FeatureStore(path)


def test_frames_that_are_references_are_not_mapped_as_pointers(tmp_path):
    path = write_ours(tmp_path / "x.hdf5", {"v": np.ones((2, 8))})
    with h5py.File(path, "r+") as file:
        del file["frames"]
        file.create_dataset("frames", (2, 8), h5py.string_dtype())[:] = "x"
    with pytest.raises(InputError, match="frames are object"):
        FeatureStore(path)


def test_ids_that_are_one_text_many_times_do_not_fill_the_memory(tmp_path):
    """A reference of 16 bytes for each: 20,000 ids of 100 kB would be 2 GB."""
    path = write_ours(tmp_path / "x.hdf5", {"v": np.ones((2, 8))})
    with h5py.File(path, "r+") as file:
        del file["ids"]
        file.create_dataset("ids", (20_000,), h5py.string_dtype())
        file["ids"][0] = "x" * 100_000
        data = file["ids"].id.get_offset()
    raw = bytearray(path.read_bytes())
    raw[data : data + 16 * 20_000] = raw[data : data + 16] * 20_000
    path.write_bytes(raw)
    with h5py.File(path) as file:
        assert file["ids"][19_999] == b"x" * 100_000
    with pytest.raises(InputError, match="repeats its texts"):
        FeatureStore(path)


ODD_IDS = [
    "\x1b[31mred",
    "a\tb",
    " a",
    "a ",
    "a\\tb",
    "\u202eabc",
    "x\ny",
    "a\x85b",
    "é",
    "\\",
    "a",
]


def test_ids_of_verify_can_be_left_out(tmp_path):
    """Whatever they are, and as one line each that a terminal shows and does not act on."""
    features = {video: np.ones((2, 4)) for video in ODD_IDS}
    path = write_ours(tmp_path / "x.hdf5", {**features, "good": np.ones((2, 4))})
    with h5py.File(path, "r+") as file:
        store = FeatureStore(path)
        for video in ODD_IDS:
            file["frames"][store._bounds[video][0]] = np.nan
    verified = call(convert.main, "verify", path)
    lines = verified.stdout.split("\n")
    assert len(lines) == len(ODD_IDS) + 1 and lines[-1] == ""
    assert all(line.replace("\t", "").isprintable() for line in lines)
    (tmp_path / "bad.txt").write_text(verified.stdout)
    call(convert.main, "to", path, tmp_path / "good.hdf5", "--without", tmp_path / "bad.txt")
    assert list(FeatureStore(tmp_path / "good.hdf5")) == ["good"]


@settings(database=None)
@given(st.lists(st.text(st.characters(codec="utf-8"), min_size=1), unique=True))
def test_printable_is_one_line_and_tells_texts_apart(texts):
    shown = [printable(text) for text in texts]
    assert len(set(shown)) == len(texts)
    for text in shown:
        assert text.isprintable() and text == text.strip() and text.split("\t")[0] == text
    assert one_line("a\\b é") == "a\\b é"


@pytest.mark.parametrize("video", ["a\0b", "\udcff"])
def test_id_that_hdf5_cannot_hold_is_refused_before_it_is_stored(video, tmp_path):
    with pytest.raises(InputError, match="an id is UTF-8 without zero bytes"):
        write_ours(tmp_path / "x.hdf5", {video: np.ones((2, 4))})


# --- bombs ---------------------------------------------------------------------------------------

BIG = 64 << 20  # bytes: what reading a small file may take at most


def peak_growth(function, *arguments, warm_up=None):
    """The bytes by which the peak of resident memory grows, in a child, while it reads a file.

    warm_up: called before, so that the libraries' pages, which a fork leaves behind, are there.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        if warm_up:
            warm_up()
        Path("/proc/self/clear_refs").write_text("5")
        before = resident("VmRSS")
        resource.setrlimit(resource.RLIMIT_CPU, (20, 20))
        try:
            function(*arguments)
            outcome = "read"
        except InputError as error:
            outcome = str(error)
        except BaseException as error:
            outcome = f"raised {error!r}"
        os.write(writing, json.dumps([resident("VmHWM") - before, outcome[:300]]).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as lines:
        text = lines.read()
    assert os.waitpid(child, 0)[1] == 0
    growth, outcome = json.loads(text)
    assert not outcome.startswith("raised"), outcome
    return growth, outcome


def resident(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


def memo_of_any_length():
    return b"\x80\x02]r\xff\xff\xff\x7f."  # LONG_BINPUT 2**31 - 1: an array as long, in C


def lists_in_lists():
    return b"\x80\x02]q\x00" + b"".join(b"](h\x00h\x00eq\x00" for _ in range(40)) + b"."


def hash_of_tuples():
    pairs = b"".join(
        b"h" + bytes([i]) + b"h" + bytes([i]) + b"\x86q" + bytes([i + 1]) for i in range(60)
    )
    return b"\x80\x02K\x01K\x02\x86q\x00" + pairs + b"}h\x3cK\x01s."


def sets_of_one_list():
    members = b"".join(b"J" + i.to_bytes(4, "little") for i in range(30_000))
    make = b"c__builtin__\nset\nq\x01](" + members + b"eq\x00]("
    return b"\x80\x02" + make + b"h\x01h\x00\x85R" * 3000 + b"e."


def array_of_any_length():
    return b"\x80\x05\x96" + (1 << 32).to_bytes(8, "little") + b"."  # BYTEARRAY8


def number_of_any_length():
    return b"\x80\x02\x8b" + (10**6).to_bytes(4, "little") + b"\x7f" * 10**6 + b"."


def numbers_of_one_hash():
    keys = [(i * (2**61 - 1)).to_bytes(10, "little") for i in range(50_000)]
    return b"\x80\x02}(" + b"".join(b"\x8a\x0a" + key + b"N" for key in keys) + b"u."


def itself():
    return b"\x80\x02]q\x00h\x00a."


PICKLES = [memo_of_any_length, lists_in_lists, hash_of_tuples, sets_of_one_list]
PICKLES += [array_of_any_length, number_of_any_length, numbers_of_one_hash, itself]


@pytest.mark.parametrize(
    "data, advice",
    [
        (json.dumps({"video": [1, 2]}).encode(), "looks like JSON"),
        (pickle.dumps({"video": np.arange(3)}), "array.tolist()"),
        (pickle.dumps([np.float32(1)]), "float(x)"),
        (b"\x93NUMPY\1\0", "is it the right file?"),
        (pickle.dumps([1, 2])[:-2], "fetch it again"),
    ],
)
def test_file_in_place_of_a_pickle_gets_advice_that_fits(tmp_path, data, advice):
    (tmp_path / "a.pickle").write_bytes(data)
    with pytest.raises(InputError) as error:
        load_pickle(tmp_path / "a.pickle")
    assert advice in str(error.value)


@pytest.mark.parametrize("make", PICKLES, ids=lambda make: make.__name__)
def test_pickle_does_not_outgrow_its_file(make, tmp_path):
    path = tmp_path / "x.pickle"
    path.write_bytes(make())
    growth, outcome = peak_growth(load_pickle, path)
    assert growth < BIG and ("x.pickle" in outcome or make is memo_of_any_length)  # an empty list


def test_pickle_of_public_annotations_is_read_as_before(tmp_path):
    value = {"a": [("x", 1.5, None, True)], "s": {"x", "y"}, "f": frozenset({1}), b"k": [[]] * 3}
    for protocol in range(6):
        path = tmp_path / "x.pickle"
        path.write_bytes(pickle.dumps(value, protocol))
        if protocol < 2 or protocol == 2:
            value.pop(b"k", None)  # bytes are encoded by a function there
            path.write_bytes(pickle.dumps(value, protocol))
        assert load_pickle(path) == value


def test_value_that_is_shared_may_be_large_but_not_without_end():
    require_bounded([[1.0] * 1000] * 1000)
    for value in ([[[[0] * 1000] * 1000] * 1000], {"a": [{}]}):
        shared = value
        if isinstance(value, dict):
            shared["a"][0]["again"] = shared
        with pytest.raises(ValueError):
            require_bounded(shared)


def declared_layers(path):
    saved = {"encoder": "tca", "arguments": {"feature_size": 8, "nlayers": 10**6}}
    torch.save({**saved, "state_dict": {"x": torch.zeros(1)}}, path)


def declared_sizes(path):
    saved = {"encoder": "netvlad", "arguments": {"feature_size": 10**5, "output_dim": 10**5}}
    torch.save({**saved, "state_dict": {"x": torch.zeros(1)}}, path)


def repeated_values(path):
    torch.save({"x": torch.zeros(1).expand(10**10)}, path)


def missing_values(path):
    """The pickle declares more values than its storage has: the reader would read beyond it."""
    torch.save({"x": torch.zeros(100)}, path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data[:40] if name.endswith("data/0") else data)


def compressed(path):
    torch.save({"x": torch.zeros(100_000_000)}, path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)


def state_dict_of_odd_sizes(path):
    prefix = "transformer_encoder.layers.0."
    torch.save(
        {
            f"{prefix}self_attn.in_proj_weight": torch.zeros(0, 2**20),
            f"{prefix}linear1.weight": torch.zeros(2**20, 0),
        },
        path,
    )


MODELS = [declared_layers, declared_sizes, repeated_values, missing_values, compressed]
MODELS += [state_dict_of_odd_sizes]


@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
def test_model_file_does_not_outgrow_its_size(make, tmp_path):
    path = tmp_path / "model.pth"
    make(path)
    growth, outcome = peak_growth(load_encoder, path)
    assert growth < BIG and "model.pth" in outcome


def test_npz_does_not_outgrow_its_size(tmp_path):
    path = tmp_path / "pca.npz"
    np.savez_compressed(
        path, mean=np.zeros(8), components=np.zeros((10**7, 8)), variance=np.ones(10**7)
    )
    growth, outcome = peak_growth(load_projection, path)
    assert growth < BIG and "unpack to" in outcome

    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "<f8", "fortran_order": False, "shape": (2**40,)}
    )
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("mean.npy", header.getvalue() + b"\0" * 80)
    growth, outcome = peak_growth(load_projection, path)
    assert growth < BIG and "pca.npz" in outcome


# --- an index ------------------------------------------------------------------------------------


@pytest.fixture
def index_folder(tmp_path):
    make_index(tmp_path)
    return tmp_path / "index"


@pytest.mark.parametrize("name", ["index.db", "frames-0.f16", "videos-0.f32", "thumbnails-0.jpg"])
def test_index_with_links_is_refused(index_folder, tmp_path, name):
    (index_folder / name).rename(tmp_path / "elsewhere")
    (index_folder / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=f"{name} is a link"):
        IndexStore(index_folder)


@pytest.mark.parametrize(
    "sql",
    [
        "CREATE TRIGGER t AFTER DELETE ON files BEGIN DELETE FROM contents; END",
        "CREATE TEMP TABLE x (y); CREATE TABLE extra (x)",
        "ALTER TABLE files RENAME TO f; CREATE VIEW files AS SELECT * FROM f",
        "DROP TABLE files; CREATE TABLE files (path, size, mtime, content)",
        "UPDATE contents SET frame = -1",
        "UPDATE contents SET frames = 9000000000000000000",
        "UPDATE contents SET sizes = 'text'",
        "UPDATE contents SET seconds = 'long'",
        "UPDATE contents SET thumbnail = 1e30",
        "UPDATE files SET path = NULL",
        "UPDATE files SET content = 77",
        "DELETE FROM files",
        "UPDATE settings SET value = '\"../../x\"' WHERE name = 'generation'",
        "UPDATE settings SET value = '[1, 2]' WHERE name = 'ends'",
        "UPDATE settings SET value = '{\"fps\": \"1e999999999\"}' WHERE name = 'identity'",
        "UPDATE settings SET value = '{\"certain\": 1e9}' WHERE name = 'calibration'",
        "UPDATE settings SET value = 'nonsense' WHERE name = 'options'",
        "INSERT INTO settings VALUES ('mounts', '\"/\"')",
        "INSERT INTO settings VALUES ('rejected', '[[\"a\"]]')",
    ],
)
def test_index_with_another_database_is_refused(index_folder, sql):
    db = sqlite3.connect(index_folder / "index.db")
    db.executescript(sql)
    db.close()
    with pytest.raises(InputError, match="index "):
        IndexStore(index_folder)


def test_index_is_not_written_outside_of_writing(index_folder):
    store = IndexStore(index_folder)
    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        store.db.execute("DELETE FROM files")
    with store.writing():
        store.remove(list(store.known_files()))
    assert store.num_files() == 0


def test_page_of_the_database_that_is_damaged_later_is_one_line(index_folder):
    index = VideoIndex.load(index_folder)
    with open(index_folder / "index.db", "r+b") as file:
        file.seek(4096)
        file.write(os.urandom(1 << 16))
    index.store.db.execute("PRAGMA shrink_memory")
    with pytest.raises(InputError, match="index "):
        index.store.known_files()
        index.store.paths(1)
        list(index.store.contents())


# --- memory of a search --------------------------------------------------------------------------


def long_index(folder, videos, frames):
    rng = np.random.default_rng(0)
    settings = {"identity": {"fps": "1"}, "options": {"encoder": "mean"}}
    settings["calibration"] = {"min_similarity": 0.9, "threshold": 0.1, "radius": -1.0}
    store = IndexStore.create(folder / "index", 256, settings)
    with store.writing():
        for number in range(videos):
            video = made_up_video(rng, num_windows=2, size=256, num_frames=frames)
            add_made_up(store, number, video, folder)
    store.db.close()
    return folder / "index"


def search_index(folder, room, job):
    """Search with `room` GiB beside what the process holds."""
    index = VideoIndex.load(folder, memory=resident("VmRSS") / 2**30 + room)
    if job == "duplicates":
        index.duplicates(threshold=0.9, radius=-1.0)
        return
    content = index.store.content(1)
    clip = EncodedVideo(Path("clip"), "", 9.0)
    clip.frame_descriptors = np.array(index.store.frame_descriptors(content)[:60])
    clip.window_descriptors = np.array(index.store.window_descriptors(content))
    index.query(clip, top=2, threshold=0.0)


@pytest.mark.slow
def test_memory_bounds_query_and_duplicates(tmp_path):
    """Of 40 videos of two hours: descriptors as float32 are 295 MB, a pair's matrix 207 MB."""
    folder = long_index(tmp_path, 40, 7200)
    small = long_index(tmp_path / "small", 1, 60)

    def growth_of(job):
        def warm_up():
            search_index(small, 1000.0, job)

        return peak_growth(search_index, folder, 0.12, job, warm_up=warm_up)

    growth, outcome = growth_of("query")
    assert outcome == "read" and growth < 150 << 20
    growth, outcome = growth_of("duplicates")
    assert "--memory" in outcome and growth < 150 << 20


# --- streams and locales -------------------------------------------------------------------------


@pytest.fixture
def odd_store(tmp_path):
    return write_ours(tmp_path / "é\x1b[31m.hdf5", {"ü\x1b[31m": np.ones((2, 4))}, note="ü\x1b")


def shell(redirection, path, **changes):
    command = f'"$0" pre-processing/convert.py info "$1" {redirection}'
    return subprocess.run(
        ["sh", "-c", command, sys.executable, path],
        cwd=ROOT,
        env=environment(**changes),
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("redirection", [">&-", "2>&-", "<&-", "<&- >&- 2>&-"])
def test_closed_streams_lead_nowhere(odd_store, redirection):
    before = odd_store.read_bytes()
    result = shell(redirection, odd_store)
    assert result.returncode == 0 and "Traceback" not in result.stderr
    assert odd_store.read_bytes() == before


def test_error_with_closed_streams_has_its_status(tmp_path):
    assert shell(">&- 2>&-", tmp_path / "missing.hdf5").returncode == 2


def test_full_disk_behind_stdout_is_one_line(odd_store):
    result = shell("> /dev/full", odd_store)
    assert "No space left" in one_error(result)


@pytest.mark.parametrize(
    "changes",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"LC_ALL": "POSIX"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_locale_that_lacks_a_letter_gets_an_escape(odd_store, changes):
    result = shell("", odd_store, **changes)
    assert result.returncode == 0, result.stderr
    assert "\\x1b" in result.stdout and "\x1b" not in result.stdout + result.stderr
    missing = shell("", f"{odd_store}.missing", **changes)
    assert "\x1b" not in one_error(missing)


def test_name_that_is_not_utf8_is_one_line(tmp_path):
    path = os.fsencode(tmp_path) + b"/\xff.hdf5"
    result = shell("", path)
    assert result.returncode == 2 and "\\udcff" in one_error(result)


# --- beside a project's own modules --------------------------------------------------------------

BESIDE = """
import sys, torch
sys.path.insert(0, sys.argv[1])
if sys.argv[2] == "before":
    import utils, model, data, padding
tca = torch.hub.load(sys.argv[3], "tca", source="local", trust_repo=True)
frames = tca.encode(torch.ones(1, 3, 512), torch.tensor([3]))
assert frames.shape == (1, 3, 512)
import utils, model, data, padding
for module in (utils, model, data, padding):
    assert module.MINE == module.__name__, module
again = torch.hub.load(sys.argv[3], "tca", source="local", trust_repo=True, pretrained=False,
                       feature_size=16)
assert sys.modules["utils"] is utils and again.feature_size == 16
try:
    torch.hub.load(sys.argv[3], "tca", source="local", trust_repo=True, pretrained="nowhere")
except Exception as error:
    assert type(error).__name__ == "InputError", error
print("fine")
"""


@pytest.fixture
def project(tmp_path):
    """A folder with modules of the names that ours have."""
    for name in ("utils", "model", "data", "padding", "untrusted"):
        (tmp_path / f"{name}.py").write_text(f"MINE = {name!r}\n")
    return tmp_path


@pytest.mark.parametrize("when", ["before", "after"])
def test_hub_works_beside_modules_of_the_same_names(project, when):
    code = project / "use.py"
    code.write_text(BESIDE)
    result = subprocess.run(
        [sys.executable, code, project, when, ROOT],
        cwd=project,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert result.stdout == "fine\n", result.stderr


def test_library_says_which_module_is_in_its_place(project):
    code = f"import sys; sys.path[:0] = [{str(project)!r}, {str(ROOT)!r}]\nimport videoindex"
    result = python(code)
    assert result.stderr.splitlines()[-1].startswith("ImportError: videoindex needs 'utils' of")
    assert str(project) in result.stderr.splitlines()[-1]
