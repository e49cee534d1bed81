"""PCA: equal to scikit-learn's and to the released formula, in bounded memory for any size."""

import subprocess
import sys

import extract_features
import h5py
import numpy as np
import pca as pca_script
import pytest
from helpers.clips import textured, write_video
from helpers.commands import ROOT, cli, environment, one_error
from PIL import Image
from sklearn.decomposition import PCA

from features import pca
from features.store import FeatureStore, StoreWriter
from retrieval.encode import resident_bytes
from utils import InputError

SCRIPT = "pre-processing/pca.py"


def write_store(path, *videos):
    with StoreWriter(path, "float32", {"kind": "test"}) as writer:
        for i, rows in enumerate(videos):
            writer.add(f"v{i}", rows)
    return path


@pytest.fixture
def features(tmp_path):
    """300 rows of 12 correlated channels in a store of three videos: its path, and the rows."""
    generator = np.random.default_rng(5)
    x = (generator.normal(size=(300, 12)) @ generator.normal(size=(12, 12)) + 3).astype(np.float32)
    return write_store(tmp_path / "x.hdf5", x[:100], x[100:130], x[130:]), x


def rows_of(path):
    store = FeatureStore(path)
    return np.concatenate([store[video] for video in store])


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


# --- fit ---


@pytest.mark.parametrize("whiten", [True, False])
def test_fit_and_apply_equal_scikit_learn(tmp_path, features, whiten):
    path, x = features
    fit = [
        "fit",
        str(path),
        "--components",
        "5",
        "--frames_per_video",
        "1000",
        "--output",
        str(tmp_path / "p.npz"),
    ]
    pca_script.main(fit if whiten else [*fit, "--no_whiten"])
    pca_script.main(
        [
            "apply",
            str(path),
            "--pca",
            str(tmp_path / "p.npz"),
            "--output",
            str(tmp_path / "y.hdf5"),
            "--dtype",
            "float32",
        ]
    )
    expected = unit(PCA(5, whiten=whiten, svd_solver="full").fit_transform(x.astype(np.float64)))
    assert np.abs(rows_of(tmp_path / "y.hdf5") - expected).max() < 1e-4
    meta = FeatureStore(tmp_path / "y.hdf5").meta
    assert meta["kind"] == "test" and meta["pca"].startswith("p.npz")


@pytest.mark.parametrize("size", [1, 7, 299, 300])
def test_fit_in_chunks_equals_scikit_learn(features, monkeypatch, size):
    _, x = features
    x = (
        x.astype(np.float64) * 0.9 ** np.arange(12) + 100
    )  # far from zero, where sums of squares cancel
    monkeypatch.setattr(
        pca, "_sample_frames", lambda *_: (x[i : i + size].copy() for i in range(0, 300, size))
    )
    found = pca.fit_pca([], 6)
    exact = PCA(6, svd_solver="full").fit(x)
    assert found.frames == 300 and np.allclose(found.mean, exact.mean_)
    assert np.allclose(found.variance, exact.explained_variance_)
    assert np.allclose(found.components, exact.components_, atol=1e-6)
    assert np.allclose(found.explained()[:6], np.cumsum(exact.explained_variance_ratio_))


def test_fit_of_frames_far_from_zero_keeps_its_digits(tmp_path):
    """Variance 1e-4 around a mean of 1000: squares summed from zero would lose most digits."""
    x = 1000 + 0.01 * np.random.default_rng(0).normal(size=(5000, 6)) * [1, 0.9, 0.8, 0.7, 0.6, 0.5]
    found = pca.fit_pca([{i: x[i : i + 10] for i in range(0, 5000, 10)}], 6)
    exact = PCA(6, svd_solver="full").fit(x)
    assert np.allclose(found.variance, exact.explained_variance_, rtol=1e-9)
    assert np.allclose(found.components, exact.components_, atol=1e-6)


MEMORY = """
import resource, sys
import numpy as np
sys.path.insert(0, {root!r})
from features import pca
pool = np.random.default_rng(0).normal(size=(4096, 256))
def draw(*_):
    for _ in range({chunks}):
        yield pool.copy()
pca._sample_frames = draw
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
pca.fit_pca([], 64)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_fit_memory_does_not_grow_with_frames():
    """60 chunks hold 503 MB; the fit may take the chunk at hand and a few matrices of 256 x 256."""
    code = MEMORY.format(root=str(ROOT), chunks=60)
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True
    )
    assert int(done.stdout) * 1024 < 60e6


def test_fit_memory_does_not_grow_with_the_file(tmp_path):
    """64 MiB of features, read through a memory map: fitting holds a few chunks at a time."""
    store = FeatureStore(
        write_store(tmp_path / "x.hdf5", *(np.ones((1024, 1024), np.float32) for _ in range(16)))
    )
    before = resident_bytes()
    held = [
        resident_bytes() - before
        for _ in pca._sample_frames([store], 10, np.random.default_rng(0), chunk=20)
    ]
    assert len(held) == 8 and max(held) < 24 * 2**20


def test_frames_per_video_are_drawn_by_the_seed(features):
    store = FeatureStore(features[0])
    first, again, other = (pca.fit_pca([store], 3, 10, seed) for seed in (0, 0, 1))
    assert first.frames == 30
    assert np.array_equal(first.components, again.components) and not np.array_equal(
        first.components, other.components
    )


def test_drawn_frames_are_the_videos_own_without_repetition():
    store = {"a": np.arange(50.0)[:, None], "b": 100 + np.arange(7.0)[:, None]}
    drawn = np.concatenate(list(pca._sample_frames([store], 10, np.random.default_rng(0))))[:, 0]
    assert len(drawn) == len(set(drawn)) == 17 and (drawn < 50).sum() == 10
    assert sorted(drawn[10:]) == list(store["b"][:, 0])


def test_fit_on_several_files_equals_fit_on_one_and_draws_the_curve(tmp_path, features):
    path, x = features
    halves = [
        write_store(tmp_path / f"{i}.hdf5", half) for i, half in enumerate((x[:150], x[150:]))
    ]
    common = ["--components", 4, "--frames_per_video", 1000, "--output"]
    call = cli(SCRIPT, "fit", *halves, *common, tmp_path / "two.npz")
    kept = PCA(4, svd_solver="full").fit(x.astype(np.float64)).explained_variance_ratio_.sum()
    assert (
        call.returncode == 0
        and f"fitted on 300 frames; {kept:.1%} of the variance kept" in call.stdout
    )
    pca_script.main(["fit", str(path), *map(str, common), str(tmp_path / "one.npz")])
    one, two = np.load(tmp_path / "one.npz"), np.load(tmp_path / "two.npz")
    assert all(np.allclose(one[name], two[name]) for name in one.files)
    with Image.open(tmp_path / "one.png") as curve:
        assert min(curve.size) > 300 and len(curve.convert("L").getcolors()) > 2


def test_extraction_with_a_pca_equals_extraction_then_pca(tmp_path):
    for i in range(4):
        (tmp_path / "clips").mkdir(exist_ok=True)
        write_video(tmp_path / "clips" / f"{i}.mkv", textured(i, 10 * (1 + i)))

    def extract(name, *options):
        words = [
            tmp_path / "clips",
            "--output",
            tmp_path / name,
            "--stages",
            "_blocks.4",
            "--weights",
            "random",
            *options,
        ]
        assert extract_features.main([str(word) for word in words]) == 0
        return tmp_path / name

    plain = extract("plain.hdf5", "--dtype", "float32")
    pca_script.main(
        ["fit", str(plain), "--components", "8", "--output", str(tmp_path / "p.npz"), "--no_whiten"]
    )
    words = ["--pca", str(tmp_path / "p.npz"), "--components", "4"]
    pca_script.main(["apply", str(plain), *words, "--output", str(tmp_path / "after.hdf5")])
    within = FeatureStore(extract("within.hdf5", *words))
    after = FeatureStore(tmp_path / "after.hdf5")
    assert within.feature_size == 4 and within.lengths == after.lengths
    assert all(
        np.abs(np.float32(after[video]) - np.float32(within[video])).max() < 2e-3 for video in after
    )


# --- load ---


@pytest.mark.parametrize(
    "transposed, ascending", [(False, False), (True, False), (False, True), (True, True)]
)
@pytest.mark.parametrize("width", [12, 8])
def test_released_parameters_load_either_way_round(
    tmp_path, features, transposed, ascending, width
):
    _, x = features
    mu = x.mean(0).astype(np.float64)
    lams, vectors = np.linalg.eigh(np.cov(x.astype(np.float64).T))
    lams, u = lams[::-1][:width], vectors.T[::-1][:width]
    expected = unit(((x @ u.T - u @ mu) / np.sqrt(lams))[:, :6])
    order = slice(None, None, -1) if ascending else slice(None)
    lams, u = lams[order], u[order]
    np.savez(tmp_path / "r.npz", U=u.T if transposed else u, lams=lams, mu=mu, Utmu=u @ mu)
    assert np.abs(pca.load_projection(tmp_path / "r.npz", 6)(x) - expected).max() < 1e-4


def test_our_file_gives_the_same_rows_by_the_released_formula(tmp_path, features):
    path, x = features
    pca_script.main(["fit", str(path), "--components", "5", "--output", str(tmp_path / "p.npz")])
    ours = np.load(tmp_path / "p.npz")
    expected = unit(
        (x @ ours["components"].T - ours["components"] @ ours["mean"]) / np.sqrt(ours["variance"])
    )
    assert np.abs(pca.load_projection(tmp_path / "p.npz")(x) - expected).max() < 1e-4


# --- bad input ---

BAD = [
    (["apply", "small.hdf5", "--pca", "narrow.npz", "--output", "f.hdf5"], "width 6", "width 4"),
    (["apply", "small.hdf5", "--pca", "small.hdf5", "--output", "f.hdf5"], "not a .npz"),
    (
        ["apply", "small.hdf5", "--pca", "wide.npz", "--components", "3", "--output", "f.hdf5"],
        "holds 2 components, not 3",
    ),
    (["apply", "small.hdf5", "--pca", "wide.npz", "--output", "small.hdf5"], "is the input"),
    (["fit", "small.hdf5", "--components", "7", "--output", "f.npz"], "in 6 directions only"),
    (["fit", "small.hdf5", "--components", "0", "--output", "f.npz"], "--components"),
    (["fit", "small.hdf5", "--components", "2", "--output", "f.png"], "suffix .npz"),
    (
        ["fit", "small.hdf5", "narrow.hdf5", "--components", "2", "--output", "f.npz"],
        "narrow.hdf5",
        "width 4",
    ),
]


def test_bad_input_is_refused_in_one_line_and_leaves_nothing(tmp_path):
    draw = np.random.default_rng(0)
    write_store(tmp_path / "small.hdf5", draw.normal(size=(40, 6)))
    write_store(tmp_path / "narrow.hdf5", draw.normal(size=(40, 4)))
    for name, width in (("narrow", 4), ("wide", 6)):
        arrays = dict(
            mean=np.zeros(width), components=np.eye(width)[:2], variance=np.ones(2), whiten=True
        )
        np.savez(tmp_path / f"{name}.npz", **arrays)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for words, *mentions in BAD:
        with pytest.raises(InputError) as error:
            pca_script.main([str(tmp_path / word) if "." in word else word for word in words])
        assert all(mention in str(error.value) for mention in mentions), error.value
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    one_error(
        cli(
            SCRIPT,
            "fit",
            tmp_path / "small.hdf5",
            "--components",
            7,
            "--output",
            tmp_path / "f.npz",
        )
    )
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_apply_resumes_after_a_kill_with_the_same_features_only(tmp_path, features):
    path, x = features
    pca_script.main(["fit", str(path), "--components", "5", "--output", str(tmp_path / "p.npz")])
    store, projection = FeatureStore(path), pca.load_projection(tmp_path / "p.npz")
    meta = {**store.meta, "pca": projection.label}
    with (
        pytest.raises(ZeroDivisionError),
        StoreWriter(tmp_path / "y.hdf5", "float16", meta, {"v0": store.fingerprint()}) as part,
    ):
        part.add("v0", projection(store["v0"]))
        raise ZeroDivisionError
    apply = [
        "apply",
        str(path),
        "--pca",
        str(tmp_path / "p.npz"),
        "--output",
        str(tmp_path / "y.hdf5"),
    ]
    write_store(path, x[:100] + 1, x[100:130], x[130:])
    with pytest.raises(InputError, match="the input has changed"):
        pca_script.main(apply)
    write_store(path, x[:100], x[100:130], x[130:])
    pca_script.main(apply)
    assert np.array_equal(rows_of(tmp_path / "y.hdf5"), projection(x).astype(np.float16))


def test_apply_refuses_rows_that_changed_since_they_were_written(tmp_path, features):
    path, _ = features
    pca_script.main(["fit", str(path), "--components", "5", "--output", str(tmp_path / "p.npz")])
    with h5py.File(path, "r+") as file:
        file["frames"][110, 3] += 1
    with pytest.raises(InputError, match="'v1' are not those that were written"):
        pca_script.main(
            [
                "apply",
                str(path),
                "--pca",
                str(tmp_path / "p.npz"),
                "--output",
                str(tmp_path / "y.hdf5"),
            ]
        )
    assert not (tmp_path / "y.hdf5").exists()


def test_apply_refuses_and_keeps_an_unfinished_one_of_another_pca(tmp_path, features):
    path, _ = features
    for components in (5, 4):
        pca_script.main(
            [
                "fit",
                str(path),
                "--components",
                str(components),
                "--output",
                str(tmp_path / f"{components}.npz"),
            ]
        )
    meta = {**FeatureStore(path).meta, "pca": pca.load_projection(tmp_path / "5.npz").label}
    sources = {"v0": FeatureStore(path).fingerprint()}
    with (
        pytest.raises(ZeroDivisionError),
        StoreWriter(tmp_path / "y.hdf5", "float16", meta, sources) as part,
    ):
        part.add("v0", np.ones((3, 5)))
        raise ZeroDivisionError
    before = (tmp_path / "y.hdf5.part").read_bytes()
    with pytest.raises(
        InputError, match="1 videos of pca 5.npz.*not 4.npz.*remove '.*y.hdf5.part.jsonl'"
    ):
        pca_script.main(
            [
                "apply",
                str(path),
                "--pca",
                str(tmp_path / "4.npz"),
                "--output",
                str(tmp_path / "y.hdf5"),
            ]
        )
    assert before and (tmp_path / "y.hdf5.part").read_bytes() == before
