"""PCA: equal to scikit-learn's and to the released formula, in bounded memory for any size."""

import threading
import time

import extract_features
import h5py
import numpy as np
import pca as pca_script
import pytest
from helpers.clips import textured, write_video
from helpers.commands import cli, one_error, python, refused
from helpers.feature_files import write_ours
from PIL import Image
from sklearn.decomposition import PCA
from threadpoolctl import threadpool_info, threadpool_limits

from features import pca
from features.pca import fit_pca, load_projection, one_blas_thread
from features.store import FeatureStore, StoreWriter
from retrieval.encode import resident_bytes
from utils import InputError

SCRIPT = "pre-processing/pca.py"


def run(*words):
    pca_script.main([str(word) for word in words])


def write_rows(path, *videos):
    """A store of videos v0, v1, ..."""
    with StoreWriter(path, "float32", {"kind": "test"}) as writer:
        for i, rows in enumerate(videos):
            writer.add(f"v{i}", rows)
    return path


def rows_of(path):
    """The rows of all videos of a store, one after another."""
    store = FeatureStore(path)
    return np.concatenate([store[video] for video in store])


@pytest.fixture
def x():
    """300 rows of 12 correlated channels."""
    rng = np.random.default_rng(5)
    return (rng.normal(size=(300, 12)) @ rng.normal(size=(12, 12)) + 3).astype(np.float32)


@pytest.fixture
def path(tmp_path, x):
    """A store of three videos that holds the rows `x`."""
    return write_rows(tmp_path / "x.hdf5", x[:100], x[100:130], x[130:])


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


# --- fit -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("whiten", [True, False])
def test_fit_and_apply_equal_scikit_learn(tmp_path, path, x, whiten):
    parameters, output = tmp_path / "p.npz", tmp_path / "y.hdf5"
    more = [] if whiten else ["--no_whiten"]
    fit = ["fit", path, "--components", 5, "--frames_per_video", 1000, "--output", parameters]
    run(*fit, *more)
    run("apply", path, "--pca", parameters, "--output", output, "--dtype", "float32")
    exact = PCA(5, whiten=whiten, svd_solver="full")
    expected = unit(exact.fit_transform(x.astype(np.float64)))
    assert np.abs(rows_of(output) - expected).max() < 1e-4
    meta = FeatureStore(output).meta
    assert meta["kind"] == "test" and meta["pca"].startswith("p.npz")


@pytest.mark.parametrize("size", [1, 7, 299, 300])
def test_fit_in_chunks_equals_scikit_learn_on_the_whole(x, monkeypatch, size):
    # Far from zero, where sums of squares cancel.
    x = x.astype(np.float64) * 0.9 ** np.arange(12) + 100

    def chunks(*_):
        for i in range(0, 300, size):
            yield x[i : i + size].copy()

    monkeypatch.setattr(pca, "_sample_frames", chunks)
    fit = fit_pca([], 6)
    exact = PCA(6, svd_solver="full").fit(x)
    assert fit.frames == 300 and np.allclose(fit.mean, exact.mean_)
    assert np.allclose(fit.variance, exact.explained_variance_)
    assert np.allclose(fit.components, exact.components_, atol=1e-6)
    assert np.allclose(fit.explained()[:6], np.cumsum(exact.explained_variance_ratio_))


def test_fit_far_from_zero_loses_nothing_to_cancellation():
    """Variance 1e-4 around a mean of 1000.

    Squares summed from zero in float64 would leave 4 of the 1e-16 / 1e-10 digits.
    """
    deviations = [1, 0.9, 0.8, 0.7, 0.6, 0.5]
    x = 1000 + 0.01 * np.random.default_rng(0).normal(size=(5000, 6)) * deviations
    fit = fit_pca([{i: x[i : i + 10] for i in range(0, 5000, 10)}], 6)
    exact = PCA(6, svd_solver="full").fit(x)
    assert np.allclose(fit.variance, exact.explained_variance_, rtol=1e-9)
    assert np.allclose(fit.components, exact.components_, atol=1e-6)


# The growth of peak memory, in KiB, while chunks of 8 MiB are fitted.
FIT_CHUNKS = """
import resource, sys
import numpy as np
from features import pca

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

def chunks(*_):
    for _ in range(int(sys.argv[1])):
        yield pool.copy()

pool = np.random.default_rng(0).normal(size=(4096, 256))
pca._sample_frames = chunks
before = peak()
pca.fit_pca([], 64)
print(peak() - before)
"""


def test_fit_memory_does_not_follow_the_number_of_frames():
    """60 chunks hold 503 MB; the fit may take one chunk and a few matrices of 256 x 256."""
    done = python(FIT_CHUNKS, 60)
    assert int(done.stdout) * 1024 < 60e6, done.stderr


def test_fit_memory_does_not_follow_the_size_of_the_file(tmp_path):
    """64 MiB of features, memory-mapped, of which a few chunks at a time may be resident."""
    videos = [np.ones((1024, 1024), np.float32) for _ in range(16)]
    store = FeatureStore(write_rows(tmp_path / "x.hdf5", *videos))
    before = resident_bytes()
    growth = []
    for _ in pca._sample_frames([store], 10, np.random.default_rng(0), chunk=20):
        growth.append(resident_bytes() - before)
    assert len(growth) == 8 and max(growth) < 24 * 2**20


def test_fit_draws_frames_of_each_video_by_the_seed(path):
    store = FeatureStore(path)
    first, again, other = (fit_pca([store], 3, 10, seed) for seed in (0, 0, 1))
    assert first.frames == 30
    np.testing.assert_array_equal(first.components, again.components)
    assert not np.array_equal(first.components, other.components)


def test_drawn_frames_are_each_videos_own_without_repetition():
    store = {"a": np.arange(50.0)[:, None], "b": 100 + np.arange(7.0)[:, None]}
    drawn = np.concatenate(list(pca._sample_frames([store], 10, np.random.default_rng(0))))[:, 0]
    assert len(drawn) == len(set(drawn)) == 17
    assert (drawn < 50).sum() == 10  # of a
    assert sorted(drawn[10:]) == list(store["b"][:, 0])  # all of b


def test_fit_on_two_files_equals_fit_on_one_of_all(tmp_path, path, x, capsys):
    """And it says how much of the variance is kept, and draws the curve."""
    one, two = tmp_path / "one.npz", tmp_path / "two.npz"
    halves = []
    for i, half in enumerate((x[:150], x[150:])):
        halves.append(write_rows(tmp_path / f"{i}.hdf5", half))
    options = ["--components", 4, "--frames_per_video", 1000, "--output"]
    run("fit", *halves, *options, two)
    exact = PCA(4, svd_solver="full").fit(x.astype(np.float64))
    kept = f"{exact.explained_variance_ratio_.sum():.1%} of the variance kept"
    assert f"fitted on 300 frames; {kept}" in capsys.readouterr().out
    run("fit", path, *options, one)
    one, two = np.load(one), np.load(two)
    assert all(np.allclose(one[name], two[name]) for name in one.files)
    with Image.open(tmp_path / "two.png") as curve:
        assert min(curve.size) > 300 and len(curve.convert("L").getcolors()) > 2


@pytest.mark.usefixtures("one_thread_per_batch")
def test_extraction_with_a_pca_equals_extraction_then_pca(tmp_path):
    clips = tmp_path / "clips"
    clips.mkdir()
    for i in range(4):
        write_video(clips / f"{i}.mkv", textured(i, 10 * (1 + i)))

    def extract(name, *options):
        words = [clips, "--output", tmp_path / name, "--stages", "_blocks.4", *options]
        words += ["--weights", "random"]
        assert extract_features.main([str(word) for word in words]) == 0
        return tmp_path / name

    parameters = tmp_path / "p.npz"
    plain = extract("plain.hdf5", "--dtype", "float32")
    run("fit", plain, "--components", 8, "--output", parameters, "--no_whiten")
    projected = ["--pca", parameters, "--components", 4]
    run("apply", plain, *projected, "--output", tmp_path / "after.hdf5")
    within = FeatureStore(extract("within.hdf5", *projected))
    after = FeatureStore(tmp_path / "after.hdf5")
    assert within.feature_size == 4 and within.lengths == after.lengths
    for video, rows in after.items():
        assert np.abs(np.float32(rows) - np.float32(within[video])).max() < 2e-3


# --- parameter files -----------------------------------------------------------------------------


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("ascending", [False, True])
@pytest.mark.parametrize("width", [12, 8])
def test_released_parameters_load_either_way_round(tmp_path, x, transposed, ascending, width):
    mu = x.mean(0).astype(np.float64)
    lams, vectors = np.linalg.eigh(np.cov(x.astype(np.float64).T))
    lams, u = lams[::-1][:width], vectors.T[::-1][:width]
    expected = unit(((x @ u.T - u @ mu) / np.sqrt(lams))[:, :6])
    if ascending:
        lams, u = lams[::-1], u[::-1]
    U = u.T if transposed else u
    np.savez(tmp_path / "r.npz", U=U, lams=lams, mu=mu, Utmu=u @ mu)
    assert np.abs(load_projection(tmp_path / "r.npz", 6)(x) - expected).max() < 1e-4


def test_our_parameters_in_the_released_formula_give_the_same_rows(tmp_path, path, x):
    parameters = tmp_path / "p.npz"
    run("fit", path, "--components", 5, "--output", parameters)
    ours = np.load(parameters)
    U, mu, lams = ours["components"], ours["mean"], ours["variance"]
    expected = unit((x @ U.T - U @ mu) / np.sqrt(lams))
    assert np.abs(load_projection(parameters)(x) - expected).max() < 1e-4


# --- refusals ------------------------------------------------------------------------------------


def apply_to(features, parameters, output="f.hdf5"):
    return ["apply", features, "--pca", parameters, "--output", output]


def fit_to(components, output="f.npz", *features):
    features = features or ["small.hdf5"]
    return ["fit", *features, "--components", components, "--output", output]


REFUSALS = [
    (apply_to("small.hdf5", "narrow.npz"), "width 6", "width 4"),
    (apply_to("small.hdf5", "small.hdf5"), "not a .npz"),
    ([*apply_to("small.hdf5", "wide.npz"), "--components", 3], "holds 2 components, not 3"),
    (apply_to("small.hdf5", "wide.npz", "small.hdf5"), "is the input"),
    (fit_to(7), "in 6 directions only"),
    (fit_to(0), "--components"),
    (fit_to(2, "f.png"), "suffix .npz"),
    (fit_to(2, "f.npz", "small.hdf5", "narrow.hdf5"), "narrow.hdf5", "width 4"),
]


@pytest.fixture
def refusal_folder(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    write_rows(tmp_path / "small.hdf5", rng.normal(size=(40, 6)))
    write_rows(tmp_path / "narrow.hdf5", rng.normal(size=(40, 4)))
    for name, width in (("narrow", 4), ("wide", 6)):
        mean, components = np.zeros(width), np.eye(width)[:2]
        arrays = {"mean": mean, "components": components, "variance": np.ones(2), "whiten": True}
        np.savez(tmp_path / f"{name}.npz", **arrays)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def contents(folder):
    return {path: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("words, mentions", [(words, mentions) for words, *mentions in REFUSALS])
def test_bad_input_is_refused_and_leaves_nothing(refusal_folder, words, mentions):
    before = contents(refusal_folder)
    message = refused(pca_script.main, *words)
    assert all(mention in message for mention in mentions), message
    assert contents(refusal_folder) == before


def test_refusal_of_the_command_is_one_line_with_status_2(refusal_folder):
    before = contents(refusal_folder)
    features, output = refusal_folder / "small.hdf5", refusal_folder / "f.npz"
    line = one_error(cli(SCRIPT, "fit", features, "--components", 7, "--output", output))
    assert "in 6 directions only" in line
    assert contents(refusal_folder) == before


# --- apply, stopped and resumed ------------------------------------------------------------------


def stop_after_one(output, meta, store, rows):
    """Leave the spool of an `apply` that was stopped after video v0."""
    sources = {"v0": store.fingerprint()}
    with (
        pytest.raises(ZeroDivisionError),
        StoreWriter(output, "float16", meta, sources) as writer,
    ):
        writer.add("v0", rows)
        raise ZeroDivisionError


def test_stopped_apply_resumes_only_with_the_same_features(tmp_path, path, x):
    parameters, output = tmp_path / "p.npz", tmp_path / "y.hdf5"
    run("fit", path, "--components", 5, "--output", parameters)
    store, projection = FeatureStore(path), load_projection(parameters)
    meta = {**store.meta, "pca": projection.label}
    stop_after_one(output, meta, store, projection(store["v0"]))
    write_rows(path, x[:100] + 1, x[100:130], x[130:])
    with pytest.raises(InputError, match="the input has changed"):
        run(*apply_to(path, parameters, output))
    write_rows(path, x[:100], x[100:130], x[130:])
    run(*apply_to(path, parameters, output))
    np.testing.assert_array_equal(rows_of(output), projection(x).astype(np.float16))


def test_stopped_apply_of_another_pca_is_refused_and_stays(tmp_path, path):
    for components in (5, 4):
        run("fit", path, "--components", components, "--output", tmp_path / f"{components}.npz")
    store, output = FeatureStore(path), tmp_path / "y.hdf5"
    meta = {**store.meta, "pca": load_projection(tmp_path / "5.npz").label}
    stop_after_one(output, meta, store, np.ones((3, 5)))
    before = (tmp_path / "y.hdf5.part").read_bytes()
    message = "1 videos of pca 5.npz.*not 4.npz.*remove '.*y.hdf5.part.jsonl'"
    with pytest.raises(InputError, match=message):
        run(*apply_to(path, tmp_path / "4.npz", output))
    assert before and (tmp_path / "y.hdf5.part").read_bytes() == before


def test_apply_refuses_rows_that_changed_since_they_were_written(tmp_path, path):
    parameters, output = tmp_path / "p.npz", tmp_path / "y.hdf5"
    run("fit", path, "--components", 5, "--output", parameters)
    with h5py.File(path, "r+") as file:
        file["frames"][110, 3] += 1
    with pytest.raises(InputError, match="'v1' has other rows than were written"):
        run(*apply_to(path, parameters, output))
    assert not output.exists()


def test_apply_does_not_depend_on_the_number_of_threads(tmp_path):
    """BLAS sums in another order on two threads: some values of half precision then differ."""
    rng = np.random.default_rng(0)
    C, D = 1752, 512  # the demo's widths
    videos = {f"v{i:02}": rng.normal(size=(20 + i, C)).astype(np.float16) for i in range(24)}
    path = write_ours(tmp_path / "x.hdf5", videos)
    components = np.linalg.qr(rng.normal(size=(C, D)))[0].T
    parts = dict(mean=rng.normal(size=C), variance=np.ones(D), whiten=False)
    np.savez(tmp_path / "p.npz", components=components, **parts)
    checksums = set()
    for threads in (1, 2, 3):
        with threadpool_limits(threads, "blas"):
            run(*apply_to(path, tmp_path / "p.npz", tmp_path / f"{threads}.hdf5"))
        checksums.add(FeatureStore(tmp_path / f"{threads}.hdf5").checksum)
    assert len(checksums) == 1


def test_one_blas_thread_limits_the_process_and_ends():
    def threads():
        return [
            library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"
        ]

    before = threads()
    with one_blas_thread():
        assert before and set(threads()) == {1}
    assert threads() == before


def test_one_blas_thread_is_taken_by_one_thread_at_a_time():
    """Of two that overlap, the later could end with the limit that the first has set."""
    events, has_begun = [], threading.Event()

    def second():
        has_begun.set()
        with one_blas_thread():
            events.append("second in")

    with one_blas_thread():
        thread = threading.Thread(target=second)
        thread.start()
        has_begun.wait()
        time.sleep(0.1)
        events.append("first out")
    thread.join()
    assert events == ["first out", "second in"]
