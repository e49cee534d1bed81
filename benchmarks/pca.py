"""Ways to fit a whitening PCA to more frames than memory holds: accuracy and time.

    python benchmarks/pca.py --output pca.json

The data are 30,000 made-up frames of 960 channels, whose variances fall as k^-0.8, a long tail as
frame features have; 256 components are kept. (VCDB: 997,090 frames of 3,840, 1024 kept.) The
reference is scikit-learn's PCA by a full singular value decomposition in float64. Compared:

- our `fit_pca`;
- scikit-learn's PCA by the covariance in float32, which needs all rows in memory;
- its IncrementalPCA, which does not.

For each the table gives the seconds; the share of the right subspace that it found; the mean cosine
of whitened rows to the exact ones, which is what becomes of the features; and the largest relative
error of a variance.
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from sklearn.decomposition import PCA, IncrementalPCA

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from distributed import run_main
from features.pca import fit_pca
from files import write_json
from utils import Parser, check_ranges, provenance, seeded_rng

Fit = tuple[np.ndarray, np.ndarray, np.ndarray]  # mean (C,), components (D, C), variance (D,)


def make_frames(frames: int, channels: int) -> np.ndarray:
    """(frames, channels) float32 rows."""
    rng = seeded_rng(0)
    basis = np.linalg.qr(rng.normal(size=(channels, channels)))[0]
    deviations = np.arange(1, channels + 1) ** -0.4
    x = rng.normal(size=(frames, channels)) * deviations
    return (x @ basis.T + 0.5).astype(np.float32)


# --- the ways ------------------------------------------------------------------------------------


def fit_ours(x: np.ndarray, components: int) -> Fit:
    store = {i: x[i : i + 100] for i in range(0, len(x), 100)}  # any mapping will do
    fit = fit_pca([store], components, frames_per_video=100)
    return fit.mean, fit.components, fit.variance


def fit_exact(x: np.ndarray, components: int) -> Fit:
    return fit_sklearn(PCA(components, svd_solver="full"), x.astype(np.float64))


def fit_covariance(x: np.ndarray, components: int) -> Fit:
    return fit_sklearn(PCA(components, svd_solver="covariance_eigh", copy=False), x)


def fit_incremental(x: np.ndarray, components: int) -> Fit:
    return fit_sklearn(IncrementalPCA(components), x)


def fit_sklearn(model: PCA | IncrementalPCA, x: np.ndarray) -> Fit:
    model.fit(x)
    return model.mean_, model.components_, model.explained_variance_


WAYS = {
    "pca.py": fit_ours,
    "PCA, covariance": fit_covariance,
    "IncrementalPCA": fit_incremental,
}


def compare(fit: Fit, exact: Fit, x: np.ndarray) -> dict[str, float]:
    """How far a fit is from the exact one: the table's columns."""
    a, b = whiten(x, *fit), whiten(x, *exact)
    cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    # The mean squared cosine of the principal angles between the two subspaces.
    overlap = np.linalg.norm(fit[1] @ exact[1].T) ** 2 / len(exact[1])
    return {
        "subspace": float(overlap),
        "cosine": float(cosines.mean()),
        "variance error": float(np.abs(fit[2] / exact[2] - 1).max()),
    }


def whiten(
    x: np.ndarray, mean: np.ndarray, components: np.ndarray, variance: np.ndarray
) -> np.ndarray:
    return (x.astype(np.float64) - mean) @ components.T / np.sqrt(variance)


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("--frames", type=int, default=30000, help="default 30000")
    parser.add_argument("--channels", type=int, default=960, help="default 960")
    parser.add_argument("--components", type=int, default=256, help="default 256")
    parser.add_argument("--output", help="also write the figures as JSON, into this file")
    args = parser.parse_args(argv)
    check_ranges(args, {"components": (1, args.channels), "frames": (args.channels, 10**7)})

    x = make_frames(args.frames, args.channels)
    exact = fit_exact(x, args.components)
    rows = {}
    for name, way in WAYS.items():
        start = time.perf_counter()
        fit = way(x, args.components)
        seconds = time.perf_counter() - start
        rows[name] = {"seconds": seconds, **compare(fit, exact, x[:2000])}
        columns = "".join(f"{what:>16} {value:9.3g}" for what, value in rows[name].items())
        print(f"{name:18}{columns}")
    if args.output:
        sizes = {"frames": args.frames, "channels": args.channels, "components": args.components}
        write_json(args.output, provenance() | sizes | {"ways": rows})


if __name__ == "__main__":
    run_main(main)
