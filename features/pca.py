"""PCA of frame features: exact fit, files, projection."""

import zipfile
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

import utils
from features.store import FeatureStore
from utils import InputError


class Projection:
    """x (T, C) -> (x @ components.T - offset) / scale, L2: (T, D) float32.

    components (D, C); offset (D,), the projected mean; scale (D,), the standard deviations for whitening, else ones.
    """

    def __init__(self, components, offset, scale, label=""):
        self.matrix = np.ascontiguousarray((components / scale[:, None]).T, np.float32)  # (C, D)
        self.offset = (offset / scale).astype(np.float32)
        self.label = label

    def __call__(self, x):
        y = np.asarray(x, np.float32) @ self.matrix - self.offset  # (T, D)
        return y / np.maximum(np.linalg.norm(y, axis=1, keepdims=True), 1e-12)

    def check(self, channels, what):
        """InputError unless features of this many channels can be projected."""
        if channels != len(self.matrix):
            raise InputError(
                f"{what} has width {channels}, but pca {self.label.split()[0]!r} was fitted on width {len(self.matrix)}; "
                "fit one on features of the same backbone, stages and pooling"
            )


def load_projection(path, components=None):
    """The Projection of a file of ours or of the released code's, cut to the first `components` of it.

    Raises InputError for a file that is neither, holds shapes that do not fit together, or has too few components.
    """
    path = utils.require_path(path, "pca")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: np.asarray(file[name], np.float64) for name in file.files}
        matrix, offset, scale = _released(arrays) if "U" in arrays else _ours(arrays)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile):
        raise InputError(
            f"pca {str(path)!r} is not a .npz of pca.py or of the released code (U, lams, mu, Utmu)"
        ) from None
    keep = components or len(matrix)
    if keep > len(matrix):
        raise InputError(
            f"pca {str(path)!r} holds {len(matrix)} components, not {keep}; ask for fewer or fit it anew"
        )
    return Projection(
        matrix[:keep],
        offset[:keep],
        scale[:keep],
        f"{path.name} sha256 {utils.file_sha256(path)[:16]} first {keep}",
    )


def _ours(arrays):
    mean, components, variance = arrays["mean"], arrays["components"], arrays["variance"]
    if components.shape != variance.shape + mean.shape:
        raise InputError(
            f"pca: components {components.shape}, variance {variance.shape} and mean {mean.shape} do not fit"
        )
    return (
        components,
        components @ mean,
        np.sqrt(variance) if arrays["whiten"] else np.ones_like(variance),
    )


def _released(arrays):
    """The released code's whitening: y = (x @ U' - Utmu) / sqrt(lams).

    U may lie either way round, so it is taken the way in which it carries mu to Utmu; components are ordered by variance.
    """
    lams, mu, utmu = (arrays[name].ravel() for name in ("lams", "mu", "Utmu"))
    ways = [
        u
        for u in (arrays["U"], arrays["U"].T)
        if u.shape == utmu.shape + mu.shape and lams.shape == utmu.shape
    ]
    if not ways:
        raise InputError(
            f"pca: U {arrays['U'].shape}, lams {lams.shape}, mu {mu.shape} and Utmu {utmu.shape} do not fit"
        )
    u = min(ways, key=lambda u: np.abs(u @ mu - utmu).max())
    order = np.argsort(-lams, kind="stable")
    if lams.min() <= 0:
        raise InputError(
            "pca: lams holds a variance that is not positive; keep the directions that vary"
        )
    return u[order], utmu[order], np.sqrt(lams[order])


class PCAFit(NamedTuple):
    """What `fit_pca` found: mean (C,), components (D, C), their variance (D,), spectrum (C,) of all variances, number of frames."""

    mean: np.ndarray
    components: np.ndarray
    variance: np.ndarray
    spectrum: np.ndarray
    frames: int

    def explained(self):
        """The share of the variance that the first 1, 2, ... C components explain, (C,)."""
        return np.cumsum(self.spectrum) / self.spectrum.sum()


def fit_pca(stores, components, frames_per_video=10, seed=0):
    """The PCAFit to up to `frames_per_video` random frames of each video.

    One pass adds up the covariance in float64, LAPACK's eigh takes it apart: memory is some C * C float64 however many frames
    there are (1 GB in all for VCDB's 997,090 x 3,840), and the result is scikit-learn's exact PCA, its choice of signs
    included. Its own ways for such sizes were measured and left (benchmarks/pca.py): the PCA by covariance holds all rows,
    15.3 GB of float32, in which neighbouring components mix (whitened rows at a cosine of .96 to the exact ones), and
    IncrementalPCA, which forgets what earlier batches did not keep, found 94 % of the right subspace in several times the time.
    Raises InputError where fewer than `components` directions vary.
    """
    generator, n, shift = np.random.default_rng(seed), 0, None
    for rows in _draw(stores, frames_per_video, generator):
        if shift is None:
            shift = rows.mean(0)  # near the mean, so that the difference below cancels little
            total, products = np.zeros_like(shift), np.zeros((len(shift), len(shift)))
        rows -= shift
        n += len(rows)
        total += rows.sum(0)
        products += rows.T @ rows
    if n < 2:
        raise InputError("a PCA needs at least 2 frames; give features of more videos")
    covariance = (products - np.outer(total, total) / n) / (n - 1)
    spectrum, vectors = np.linalg.eigh(covariance)
    spectrum, vectors = spectrum[::-1].clip(0), vectors.T[::-1][:components]  # the largest first
    rank = min(n - 1, int((spectrum > 1e-10 * spectrum[0]).sum()))
    if rank < components:
        raise InputError(
            f"{n} frames of width {len(shift)} vary in {rank} directions only; lower --components, or give more"
        )
    signs = np.sign(vectors[np.arange(components), np.abs(vectors).argmax(1)])
    return PCAFit(shift + total / n, vectors * signs[:, None], spectrum[:components], spectrum, n)


def _draw(stores, frames_per_video, generator, chunk=4096):
    """Random frames of every video, float64, about `chunk` rows at a time."""
    held, count = [], 0
    for store in stores:
        for video in tqdm(store, unit="video", disable=len(store) < 1000):
            frames = store[video]
            rows = np.sort(generator.permutation(len(frames))[:frames_per_video])
            held.append(np.asarray(frames[rows], np.float64))
            count += len(rows)
            if count >= chunk:
                if isinstance(store, FeatureStore):  # any mapping will do
                    store.release_pages()
                yield np.concatenate(held)
                held, count = [], 0
    if held:
        yield np.concatenate(held)
