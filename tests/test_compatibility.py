"""Files written by revision 5aa4c1c are still read, and give the same results.

They lie in tests/data/5aa4c1c, whose README.md says how each was made. Every test works on a copy.
"""

import json
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from helpers.commands import ROOT, cli, clis

from features.store import FeatureStore, StoreWriter

pytestmark = pytest.mark.slow

DATA = Path(__file__).resolve().parent / "data" / "5aa4c1c"
MADE_WITH = json.loads((DATA / "made_with.json").read_text())
TIMING = ("videos_per_s", "data_wait")
CONVERT, PCA = "pre-processing/convert.py", "pre-processing/pca.py"


@pytest.fixture
def data(tmp_path):
    """A copy of the folder, times of change included."""
    return shutil.copytree(DATA, tmp_path / "data")


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read_model(path):
    return torch.load(path, weights_only=True)


def filled(command, **places):
    """A command of commands.json with paths for {folder} and {run}."""
    return [part.format(**places) for part in command]


def succeeded(result):
    """The standard output of a call that must have ended well."""
    assert result.returncode == 0, f"exit status {result.returncode}\n{result.stderr}"
    return result.stdout


def assert_contains(found, expected, **tolerance):
    """`found` has all that `expected` has, numbers within a tolerance; it may have more keys."""
    if isinstance(expected, dict):
        assert expected.keys() <= found.keys()
        for key, value in expected.items():
            assert_contains(found[key], value, **tolerance)
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_contains(one, other, **tolerance)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, **tolerance)
    else:
        assert found == expected


# --- training --------------------------------------------------------------------------------


def cpu_vendor():
    """Who made the processor, "" if the system does not tell.

    MKL takes other code on processors of another maker, even if PyTorch's capability is the same.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.split(":")[1].strip() for line in lines if line.startswith("vendor_id")), "")


def computes_alike():
    """Whether the last bits must be those of the machine that wrote the files."""
    here = torch.__version__, torch.backends.cpu.get_cpu_capability(), cpu_vendor()
    return here == (MADE_WITH["torch"], MADE_WITH["cpu"], MADE_WITH["vendor"])


def assert_same_weights(found, expected):
    """Bit for bit on a machine that computes alike, else within 1e-5.

    The attention's key bias is left out of the second comparison: it changes no output, so its
    gradient is nothing but rounding, which Adam scales up to whole steps.
    """
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and found[name].shape == value.shape, name
        if computes_alike():
            assert torch.equal(found[name], value), name
            continue
        close = torch.isclose(found[name], value, rtol=1e-5, atol=1e-5)
        if name.endswith("in_proj_bias"):
            queries, _, values = close.chunk(3)
            close = torch.cat([queries, values])
        assert close.all(), name


@pytest.mark.slow
@pytest.mark.parametrize(
    "folder, checkpoint",
    [
        ("train", "checkpoint.pth"),
        ("train", "checkpoint.prev.pth"),
        ("train/gru", "checkpoint.pth"),
    ],
)
def test_checkpoint_of_5aa4c1c_resumes_bit_for_bit(data, folder, checkpoint):
    run = data / folder / "stopped"
    step = read_model(run / checkpoint)["step"]
    if checkpoint != "checkpoint.pth":
        (run / "checkpoint.pth").unlink()
    before = [line for line in read_lines(run / "log.jsonl") if line["step"] <= step]
    expected_log = read_lines(data / folder / "finished" / "log.jsonl")
    assert before and expected_log[-1]["step"] >= 2 * step

    command = read_json(data / folder / "command.json")
    succeeded(cli(*filled(command, folder=data / "train", run=run)))

    log = read_lines(run / "log.jsonl")
    assert log[: len(before)] == before, "the run began anew: its first lines have other timings"
    timeless = [
        {name: value for name, value in line.items() if name not in TIMING} for line in expected_log
    ]
    exact = dict(rel=0, abs=0)
    assert_contains(log, timeless, **(exact if computes_alike() else dict(rel=1e-4, abs=1e-5)))

    found, expected = (read_model(path / "model.pth") for path in (run, data / folder / "finished"))
    assert_same_weights(found.pop("state_dict"), expected.pop("state_dict"))
    assert_contains(found, expected)


# --- models and evaluation -------------------------------------------------------------------


@pytest.mark.parametrize("form", ["bare", "MoCo"])
@pytest.mark.parametrize("nhead", [4, 6])
def test_released_state_dict_gives_the_descriptors_of_5aa4c1c(data, form, nhead):
    path = data / "released" / "released.pth"
    if form == "MoCo":
        state = read_model(path)
        both = {f"module.encoder_q.{name}": value for name, value in state.items()}
        both |= {f"module.encoder_k.{name}": value + 1 for name, value in state.items()}
        path = data / "moco.pth"
        torch.save(both | {"module.queue": torch.ones(12, 8)}, path)
    expected = np.load(data / "released" / "expected.npz")
    x, num_frames = (torch.from_numpy(expected[name]) for name in ("x", "num_frames"))

    options = dict(source="local", trust_repo=True, pretrained=str(path), nhead=nhead)
    encoder = torch.hub.load(str(ROOT), "tca", **options)
    with torch.inference_mode():
        video, frames = encoder(x, num_frames), encoder.encode(x, num_frames)

    np.testing.assert_allclose(video, expected[f"video_{nhead}"], rtol=0, atol=1e-6)
    np.testing.assert_allclose(frames, expected[f"frames_{nhead}"], rtol=0, atol=1e-6)


@pytest.mark.slow
def test_models_of_5aa4c1c_have_its_figures(data):
    """A finished run, a checkpoint, another encoder, a released file, and the features."""
    command = filled(read_json(data / "cache" / "commands.json")["models"], folder=data)
    succeeded(cli(*command, "--output", data / "found.json"))
    found, expected = read_json(data / "found.json"), read_json(data / "cache" / "models.json")
    # 5aa4c1c took the three TCAs for seeds. Now each has a row of its own: "TCA_c (...)".
    by_metric = {}
    for row, per_model in found["figures"].items():
        by_metric.setdefault(row.partition(" (")[0], []).extend(per_model)
    assert_contains(by_metric, expected["figures"], rel=0, abs=1e-6)
    for part in ("dataset", "coverage"):
        assert_contains(found[part], expected[part], rel=0, abs=1e-6)


@pytest.mark.slow
def test_cached_descriptors_of_5aa4c1c_are_used(data):
    """The figures are those of the cache, and nothing is encoded; a changed cache is refused."""
    changed = shutil.copytree(data, data / "changed")
    for file in (changed / "cache" / "descriptors").glob("*.hdf5"):
        with h5py.File(file, "r+") as store:
            store["frames"][...] = store["frames"][:][::-1]
    before = contents(data / "cache" / "descriptors")
    assert len(before) == 2

    commands = read_json(data / "cache" / "commands.json")
    similarities = data / "similarities.json"
    *results, refused = clis(
        [*filled(commands["evaluation"], folder=data), "--output", data / "found.json"],
        [*filled(commands["similarities"], folder=data), "--save_similarities", similarities],
        [*filled(commands["evaluation"], folder=changed), "--output", changed / "found.json"],
    )
    for result in results:
        succeeded(result)

    found = read_json(data / "found.json")
    expected = read_json(data / "cache" / "evaluation.json")
    for part in ("dataset", "figures", "coverage"):
        assert_contains(found[part], expected[part], rel=0, abs=1e-6)
    table = read_json(data / "cache" / "similarities.json")
    assert_contains(read_json(similarities), table, rel=0, abs=1e-5)

    if torch.__version__ != MADE_WITH["torch"]:
        pytest.skip("a cache is of one version of PyTorch, whose layers' settings its names cover")
    assert contents(data / "cache" / "descriptors") == before
    assert refused.returncode == 2 and "has other rows than were written" in refused.stderr


def contents(folder):
    """{name: (bytes, time of change)} of the files in a folder."""
    return {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in folder.iterdir()}


# --- features --------------------------------------------------------------------------------


def expected_rows(data):
    """{id: (T, C) float16} of the videos in store/, in the order in which they were written."""
    ids = read_json(data / "store" / "expected.json")["ids"]
    arrays = np.load(data / "store" / "expected.npz")
    ends = np.cumsum(arrays["lengths"])
    return dict(zip(ids, np.split(arrays["rows"], ends[:-1]), strict=True))


def assert_same_rows(path, expected):
    """The store at `path`, which holds these videos and no others, bit for bit."""
    store = FeatureStore(path)
    assert set(store) == set(expected)
    for video, rows in expected.items():
        found = store[video]
        assert found.dtype == rows.dtype and found.shape == rows.shape, video
        assert found.tobytes() == rows.tobytes(), video
    return store


def change_one_value(path):
    """Change a value of the video "plain" in a store of any layout."""
    if path.is_dir():
        rows = np.load(path / "plain.npy")
        rows[0, 0] += 1
        np.save(path / "plain.npy", rows)
        return
    with h5py.File(path, "r+") as file:
        packed = "frames" in file
        row = file["offsets"][list(file["ids"].asstr()[:]).index("plain")] if packed else 0
        file["frames" if packed else "plain"][row, 0] += 1


@pytest.mark.parametrize("name", ["packed.hdf5", "datasets.hdf5", "npy"])
def test_store_of_5aa4c1c_is_read_and_verified(data, name):
    path, expected = data / "store" / name, read_json(data / "store" / "expected.json")
    changed = data / "changed" / name
    shutil.copytree(data / "store", data / "changed")
    change_one_value(changed)

    commands = [[CONVERT, "verify", path], [CONVERT, "verify", changed]]
    stores = [path]
    if path.is_dir():
        stores = [data / "copy.hdf5"]
        commands.append([CONVERT, "to", path, *stores])
    verified, found_out, *copied = clis(*commands)

    assert succeeded(verified) == "", "there is a line for every bad video"
    assert expected["checksum"] in verified.stderr
    assert found_out.returncode == 3
    assert [line.split("\t")[0] for line in found_out.stdout.splitlines()] == ["plain"]
    for result in copied:
        succeeded(result)
    for store in stores:
        store = assert_same_rows(store, expected_rows(data))
        assert store.checksum == expected["checksum"] and store.meta == expected["meta"]


def test_spool_of_a_killed_writer_of_5aa4c1c_is_resumed(data):
    rows, expected = expected_rows(data), read_json(data / "store" / "expected.json")
    spool = expected["spool"]
    path = data / "store" / spool["path"]
    writer = StoreWriter(path, spool["dtype"], spool["meta"], spool["sources"])
    assert writer.done == set(spool["done"]) < set(rows)
    with writer:
        for video in rows.keys() - writer.done:
            writer.add(video, rows[video])
    store = assert_same_rows(path, rows)
    assert store.checksum == expected["checksum"] and store.meta == spool["meta"]
    assert not list(path.parent.glob("*.part*"))


def test_pca_of_5aa4c1c_projects_as_it_did_and_goes_on_where_it_was_killed(data):
    folder = data / "pca"
    spooled = (folder / "stopped.hdf5.part").read_bytes()
    apply = [PCA, "apply", folder / "features.hdf5", "--pca", folder / "pca.npz", "--output"]
    for result in clis([*apply, folder / "fresh.hdf5"], [*apply, folder / "stopped.hdf5"]):
        succeeded(result)
    expected = FeatureStore(folder / "projected.hdf5")
    for name in ("fresh.hdf5", "stopped.hdf5"):
        found = FeatureStore(folder / name)
        assert found.meta == expected.meta and set(found) == set(expected)
        for video in expected:
            np.testing.assert_allclose(found[video], expected[video], rtol=0, atol=2e-3)
    stopped = FeatureStore(folder / "stopped.hdf5")
    rows = b"".join(stopped[video].tobytes() for video in sorted(stopped))
    assert spooled and rows.startswith(spooled) and len(rows) > len(spooled)
    assert not list(folder.glob("*.part*"))


# --- search ----------------------------------------------------------------------------------


def command_of_today(data, name, what):
    """A command of 5aa4c1c, without the choice of a score, which is no longer there."""
    words = filled(read_json(data / "index" / "commands.json")[name][what], folder=data)
    if "--metric" in words:
        place = words.index("--metric")
        del words[place : place + 2]
    return words


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tca", "mean"])
def test_index_of_5aa4c1c_answers(data, name):
    """The same videos by the same descriptors, in the same order; scores mean another thing now."""
    verify = ["search.py", "verify", "--index", data / "index" / name]
    commands = [command_of_today(data, name, what) for what in ("query", "info", "duplicates")]
    query, info, duplicates, verified = clis(*commands, verify)
    succeeded(verified)
    (found,) = json.loads(succeeded(query))
    (expected,) = read_json(data / "index" / f"{name}_query.json")
    matches = zip(found["matches"], expected["matches"], strict=False)
    for match, before in matches:
        assert match["path"] == before["path"] and match["missing"]
        assert match["similarity"] == pytest.approx(before["similarity"], abs=2e-3)
        assert match["same_content"] == [] and match["stretches"]  # no file is there to compare
    assert found["seconds"] == expected["seconds"] and found["matches"]
    facts, before = json.loads(succeeded(info)), read_json(data / "index" / f"{name}_info.json")
    assert facts.pop("bytes") == pytest.approx(before.pop("bytes"), rel=0.05)
    assert_contains(facts, before)
    assert json.loads(succeeded(duplicates)) == [], "groups hold files that exist"


@pytest.mark.slow
def test_index_of_5aa4c1c_is_added_to_and_removed_from(data):
    index, clip = data / "index" / "mean", data / "index" / "clip.mkv"
    succeeded(cli("search.py", "index", clip, "--index", index, "--device", "cpu"))
    succeeded(cli("search.py", "remove", "/videos/c.mkv", "--index", index))
    query = command_of_today(data, "mean", "query")
    result, verified = clis(query, ["search.py", "verify", "--index", index])
    succeeded(verified)
    (answer,) = json.loads(succeeded(result))
    first, second = answer["matches"]
    assert first["path"] == str(clip) and first["similarity"] == pytest.approx(1, abs=1e-3)
    assert second["path"] == "/videos/c again.mkv" and second["same_content"] == []
