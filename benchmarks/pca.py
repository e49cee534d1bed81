"""Ways to fit a whitening PCA to more frames than memory holds: accuracy and time against the exact one.

    python benchmarks/pca.py --output pca.json

30,000 made-up frames of 960 channels, whose variances fall as k^-0.8, a long tail as frame features have; 256 components are
kept. (VCDB's: 997,090 frames of 3,840, 1024 kept.) The reference is scikit-learn's PCA by a full singular value decomposition
in float64. Compared: our `pca.fit`; scikit-learn's PCA by its covariance in float32, which needs all rows in memory; and its
IncrementalPCA, which does not. Told of each: seconds; the share of the right subspace that it found; the mean cosine of
whitened rows to the exact ones, which is what the features become; the largest relative error of a variance.
"""

import sys
import time
from pathlib import Path

import numpy as np
from sklearn.decomposition import PCA, IncrementalPCA

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import utils
from distributed import run_main
from features import pca


def make(frames, channels):
    """(frames, channels) float32 rows."""
    draw = utils.rng(0)
    basis = np.linalg.qr(draw.normal(size=(channels, channels)))[0]
    deviations = np.arange(1, channels + 1) ** -0.4
    return ((draw.normal(size=(frames, channels)) * deviations) @ basis.T + 0.5).astype(np.float32)


def ours(x, components):
    store = {
        i: x[i : i + 100] for i in range(0, len(x), 100)
    }  # all that `fit` asks of a store: a mapping to rows
    return pca.fit_pca([store], components, frames_per_video=100)[:3]


def scikit_learn(model, x):
    model.fit(x)
    return model.mean_, model.components_, model.explained_variance_


WAYS = {
    "pca.py": ours,
    "PCA, covariance": lambda x, components: scikit_learn(
        PCA(components, svd_solver="covariance_eigh", copy=False), x
    ),
    "IncrementalPCA": lambda x, components: scikit_learn(IncrementalPCA(components), x),
}


def whitened(x, mean, components, variance):
    return (x.astype(np.float64) - mean) @ components.T / np.sqrt(variance)


def compare(found, exact, x):
    """How far a fit is from the exact one: the columns that the docstring tells of."""
    a, b = whitened(x, *found), whitened(x, *exact)
    cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    overlap = np.linalg.norm(found[1] @ exact[1].T) ** 2 / len(
        exact[1]
    )  # the mean squared cosine of the principal angles
    return {
        "subspace": float(overlap),
        "cosine": float(cosines.mean()),
        "variance error": float(np.abs(found[2] / exact[2] - 1).max()),
    }


def main(argv=None):
    parser = utils.Parser(__doc__)
    parser.add_argument("--frames", type=int, default=30000, help="default 30000")
    parser.add_argument("--channels", type=int, default=960, help="default 960")
    parser.add_argument("--components", type=int, default=256, help="default 256")
    parser.add_argument("--output", help="also as JSON, into this file")
    args = parser.parse_args(argv)
    utils.check_ranges(args, {"components": (1, args.channels), "frames": (args.channels, 10**7)})

    x = make(args.frames, args.channels)
    exact = scikit_learn(PCA(args.components, svd_solver="full"), x.astype(np.float64))
    rows = {}
    for name, way in WAYS.items():
        start = time.perf_counter()
        found = way(x, args.components)
        rows[name] = {"seconds": time.perf_counter() - start, **compare(found, exact, x[:2000])}
        print(
            f"{name:18}" + "".join(f"{what:>16} {value:9.3g}" for what, value in rows[name].items())
        )
    if args.output:
        sizes = {"frames": args.frames, "channels": args.channels, "components": args.components}
        utils.write_json(args.output, {**utils.provenance(), **sizes, "ways": rows})


if __name__ == "__main__":
    run_main(main)
