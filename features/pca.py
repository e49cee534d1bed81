"""PCA of frame features: exact fit in bounded memory, parameter files, projection."""

import contextlib
import functools
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from threadpoolctl import ThreadpoolController
from tqdm import tqdm

from features.store import FeatureStore
from untrusted import load_npz, reading
from utils import InputError, file_sha256, require_path


class Projection:
    """Project rows: x (T, C) -> (x @ components.T - offset) / scale, L2-normalised, (T, D) float32.

    Args:
        components: (D, C).
        offset: (D,), the projected mean.
        scale: (D,), the standard deviations for whitening; ones without it.
        label: tells this projection from others, in a store's `meta`.
    """

    def __init__(
        self, components: np.ndarray, offset: np.ndarray, scale: np.ndarray, label: str = ""
    ) -> None:
        self.matrix = np.ascontiguousarray((components / scale[:, None]).T, np.float32)  # (C, D)
        self.offset = (offset / scale).astype(np.float32)
        self.label = label

    def __call__(self, x: np.ndarray) -> np.ndarray:
        y = np.asarray(x, np.float32) @ self.matrix - self.offset  # (T, D)
        return y / np.maximum(np.linalg.norm(y, axis=1, keepdims=True), 1e-12)

    def check(self, feature_size: int, what: str) -> None:
        """Raise InputError unless features of this size, those of `what`, can be projected."""
        if feature_size != len(self.matrix):
            raise InputError(
                f"{what} has width {feature_size}, but pca {self.label.split()[0]!r} was fitted "
                f"on width {len(self.matrix)}; "
                "fit one on features of the same backbone, stages and pooling"
            )


@functools.cache
def _blas():
    """The libraries that multiply NumPy's matrices; to look for them takes 10 ms."""
    return ThreadpoolController().select(user_api="blas")


_one_blas_thread = threading.RLock()  # or one would restore what another has limited


@contextlib.contextmanager
def one_blas_thread() -> Iterator[None]:
    """Within it, a product of the process takes one thread: the same bits with any number of cores.

    BLAS splits a product by its number of threads, and its sums with it. And while PyTorch's
    threads hold the cores, its threads wait for one: a small product takes 15 ms instead of 1.
    """
    with _one_blas_thread, _blas().limit(limits=1):
        yield


def project_videos(
    store: Mapping[str, np.ndarray], projection: Projection, videos: Sequence[str]
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (video, its projected rows), the same to the bit with any number of threads.

    Each product takes one thread, and several videos are projected at a time: as many as BLAS
    would take threads.
    """
    threads = max([library["num_threads"] for library in _blas().info()], default=1)
    step = 16 * threads  # so many videos are in memory at a time

    def project(video):
        return projection(store[video])

    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(videos), step):
            block = videos[start : start + step]
            with one_blas_thread():
                rows = list(pool.map(project, block))
            yield from zip(block, rows, strict=True)


def load_projection(path: str | Path, components: int | None = None) -> Projection:
    """The Projection of a parameter file, ours or the released code's, to its first `components`.

    Raises:
        InputError: for a file that is neither, whose shapes do not fit together, or that has too
            few components.
    """
    path = require_path(path, "pca")
    advice = "it is not a .npz of pca.py or of the released code (U, lams, mu, Utmu)"
    stored = load_npz(path, "pca", advice)
    with reading(path, "pca", advice), np.errstate(all="ignore"):
        arrays = {name: array.astype(np.float64) for name, array in stored.items()}
        read = _read_released if "U" in arrays else _read_ours
        matrix, offset, scale = read(arrays)
        if not all(np.isfinite(part).all() for part in (matrix / scale[:, None], offset / scale)):
            raise ValueError("it holds NaN or infinity, or a direction that does not vary")
    keep = components or len(matrix)
    if keep > len(matrix):
        raise InputError(
            f"pca {str(path)!r} holds {len(matrix)} components, not {keep}; "
            "take fewer, or fit it again"
        )
    label = f"{path.name} sha256 {file_sha256(path)[:16]} first {keep}"
    return Projection(matrix[:keep], offset[:keep], scale[:keep], label)


def _read_ours(arrays):
    """(components, offset, scale) of a file of pca.py."""
    mean, components, variance = arrays["mean"], arrays["components"], arrays["variance"]
    if components.shape != variance.shape + mean.shape:  # (D, C), (D,), (C,)
        raise InputError(
            f"pca: components {components.shape}, variance {variance.shape} and "
            f"mean {mean.shape} do not fit"
        )
    scale = np.sqrt(variance) if arrays["whiten"] else np.ones_like(variance)
    return components, components @ mean, scale


def _read_released(arrays):
    """(components, offset, scale) of the released code's file: y = (x @ U' - Utmu) / sqrt(lams)."""
    lams, mu, utmu = (arrays[name].ravel() for name in ("lams", "mu", "Utmu"))
    U, shape = arrays["U"], utmu.shape + mu.shape  # (D, C)
    candidates = [u for u in (U, U.T) if u.shape == shape]
    if not candidates or lams.shape != utmu.shape:
        raise InputError(
            f"pca: U {U.shape}, lams {lams.shape}, mu {mu.shape} and Utmu {utmu.shape} do not fit"
        )
    # A square U may be stored either way round: the right one carries mu to Utmu.
    components = min(candidates, key=lambda u: np.abs(u @ mu - utmu).max())
    order = np.argsort(-lams, kind="stable")  # the largest variance first
    if lams.min() <= 0:
        raise InputError(
            "pca: lams holds a variance that is not positive; keep the directions that vary"
        )
    return components[order], utmu[order], np.sqrt(lams[order])


class PCAFit(NamedTuple):
    """The result of `fit_pca`, in float64."""

    mean: np.ndarray  # (C,)
    components: np.ndarray  # (D, C)
    variance: np.ndarray  # (D,), of the components
    spectrum: np.ndarray  # (C,), all variances
    frames: int  # how many it was fitted on

    def explained(self) -> np.ndarray:
        """The share of the variance that the first 1, 2, ... C components explain, (C,)."""
        return np.cumsum(self.spectrum) / self.spectrum.sum()


def fit_pca(
    stores: Iterable[Mapping[str, np.ndarray]],
    components: int,
    frames_per_video: int = 10,
    seed: int = 0,
) -> PCAFit:
    """Fit a PCA to up to `frames_per_video` random frames of each video.

    The result is scikit-learn's exact PCA, its choice of signs included. One pass sums the
    covariance in float64 and LAPACK's eigh decomposes it, so memory is a few C x C matrices,
    however many frames there are: 1 GB for VCDB's 997,090 x 3,840.

    scikit-learn's own solvers for such sizes were measured (benchmarks/pca.py) and not taken. Its
    PCA by covariance holds all rows, 15.3 GB of float32, in which neighbouring components mix
    (cosine of whitened rows to the exact ones: .96). IncrementalPCA forgets what earlier batches
    did not keep: it found 94 % of the right subspace, in several times the time.

    Raises:
        InputError: if fewer than `components` directions vary.
    """
    rng = np.random.default_rng(seed)
    n, shift = 0, None
    for rows in _sample_frames(stores, frames_per_video, rng):
        if shift is None:
            # Close to the mean, so that the subtraction of outer products below cancels little.
            shift = rows.mean(0)
            total = np.zeros_like(shift)
            products = np.zeros((len(shift), len(shift)))
        rows -= shift
        n += len(rows)
        total += rows.sum(0)
        products += rows.T @ rows
    if n < 2:
        raise InputError("a PCA needs at least 2 frames; give features of more videos")
    covariance = (products - np.outer(total, total) / n) / (n - 1)
    spectrum, vectors = np.linalg.eigh(covariance)  # in ascending order
    spectrum = spectrum[::-1].clip(0)
    vectors = vectors.T[::-1][:components]  # (D, C), the largest variance first
    rank = min(n - 1, int((spectrum > 1e-10 * spectrum[0]).sum()))
    if rank < components:
        raise InputError(
            f"{n} frames of width {len(shift)} vary in {rank} directions only; "
            "lower --components, or give more"
        )
    # scikit-learn's signs: the largest entry of each component is positive.
    signs = np.sign(vectors[np.arange(components), np.abs(vectors).argmax(1)])
    vectors = vectors * signs[:, None]
    return PCAFit(shift + total / n, vectors, spectrum[:components], spectrum, n)


def _sample_frames(stores, frames_per_video, rng, chunk=4096) -> Iterator[np.ndarray]:
    """Random frames of every video, (about `chunk`, C) float64 at a time."""
    rows, count = [], 0
    for store in stores:
        for video in tqdm(store, unit="video", disable=len(store) < 1000):
            frames = store[video]
            drawn = np.sort(rng.permutation(len(frames))[:frames_per_video])
            rows.append(np.asarray(frames[drawn], np.float64))
            count += len(drawn)
            if count >= chunk:
                if isinstance(store, FeatureStore):  # any other mapping will do
                    store.release_pages()
                yield np.concatenate(rows)
                rows, count = [], 0
    if rows:
        yield np.concatenate(rows)
