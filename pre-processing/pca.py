"""PCA of frame features: fit it on one or more feature files, apply it to any of the same width.

    python pre-processing/pca.py fit features.hdf5 --components 512 --output pca.npz
    python pre-processing/pca.py apply features.hdf5 --pca pca.npz --output features_512.hdf5

`fit` draws 10 frames of every video (as the paper did: 997,090 of VCDB's) and keeps the leading components; it draws the
curve of the variance that so many components explain beside its output, NAME.png. `apply` gives rows of unit length:
whitened, or with `fit --no_whiten` only centred and rotated. Whitening fitted on little film amplifies noise, but can gain
far more than that costs: try both.

A file holds plain arrays: mean (C,), components (D, C), variance (D,), whiten. The released code's parameter files (U, lams,
mu, Utmu) are read too.
"""

import argparse
import sys
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
from backbones import digest  # noqa: E402

import utils  # noqa: E402
from data import FeatureStore, StoreWriter  # noqa: E402
from utils import InputError  # noqa: E402


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


def load(path, components=None):
    """The Projection of a file of ours or of the released code's, cut to the first `components` of it.

    Raises InputError for a file that is neither, holds shapes that do not fit together, or has too few components.
    """
    path = utils.existing(path, "pca")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: np.asarray(file[name], np.float64) for name in file.files}
        matrix, offset, scale = _released(arrays) if "U" in arrays else _ours(arrays)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile):
        raise InputError(f"pca {str(path)!r} is not a .npz of pca.py or of the released code (U, lams, mu, Utmu)") from None
    keep = components or len(matrix)
    if keep > len(matrix):
        raise InputError(f"pca {str(path)!r} holds {len(matrix)} components, not {keep}; ask for fewer or fit it anew")
    return Projection(matrix[:keep], offset[:keep], scale[:keep], f"{path.name} sha256 {digest(path)} first {keep}")


def _ours(arrays):
    mean, components, variance = arrays["mean"], arrays["components"], arrays["variance"]
    if components.shape != variance.shape + mean.shape:
        raise InputError(f"pca: components {components.shape}, variance {variance.shape} and mean {mean.shape} do not fit")
    return components, components @ mean, np.sqrt(variance) if arrays["whiten"] else np.ones_like(variance)


def _released(arrays):
    """The released code's whitening: y = (x @ U' - Utmu) / sqrt(lams).

    U may lie either way round, so it is taken the way in which it carries mu to Utmu; components are ordered by variance.
    """
    lams, mu, utmu = (arrays[name].ravel() for name in ("lams", "mu", "Utmu"))
    ways = [u for u in (arrays["U"], arrays["U"].T) if u.shape == utmu.shape + mu.shape and lams.shape == utmu.shape]
    if not ways:
        raise InputError(f"pca: U {arrays['U'].shape}, lams {lams.shape}, mu {mu.shape} and Utmu {utmu.shape} do not fit")
    u = min(ways, key=lambda u: np.abs(u @ mu - utmu).max())
    order = np.argsort(-lams, kind="stable")
    if lams.min() <= 0:
        raise InputError("pca: lams holds a variance that is not positive; keep the directions that vary")
    return u[order], utmu[order], np.sqrt(lams[order])


class Fit(NamedTuple):
    """What `fit` found: mean (C,), components (D, C), their variance (D,), spectrum (C,) of all variances, number of frames."""

    mean: np.ndarray
    components: np.ndarray
    variance: np.ndarray
    spectrum: np.ndarray
    frames: int

    def explained(self):
        """The share of the variance that the first 1, 2, ... C components explain, (C,)."""
        return np.cumsum(self.spectrum) / self.spectrum.sum()


def fit(stores, components, frames_per_video=10, seed=0):
    """The Fit to up to `frames_per_video` random frames of each video.

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
        raise InputError(f"{n} frames of width {len(shift)} vary in {rank} directions only; lower --components, or give more")
    signs = np.sign(vectors[np.arange(components), np.abs(vectors).argmax(1)])
    return Fit(shift + total / n, vectors * signs[:, None], spectrum[:components], spectrum, n)


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
                    store.release()
                yield np.concatenate(held)
                held, count = [], 0
    if held:
        yield np.concatenate(held)


def run_fit(options):
    stores = [FeatureStore(path) for path in options.features]
    for store in stores[1:]:
        if store.channels != stores[0].channels:
            raise InputError(
                f"{str(store.path)!r} has width {store.channels}, {str(stores[0].path)!r} has {stores[0].channels}; "
                "fit on features of one kind"
            )
    found = fit(stores, options.components, options.frames_per_video, options.seed)
    with utils.atomic(options.output) as temporary, open(temporary, "wb") as file:
        arrays = {"mean": found.mean, "components": found.components, "variance": found.variance}
        np.savez(file, **arrays, whiten=options.whiten)
    curve = Path(options.output).with_suffix(".png")
    plot(curve, found, options.components)
    kind, kept = "whitened" if options.whiten else "not whitened", found.explained()[options.components - 1]
    print(
        f"{options.output}: {stores[0].channels} -> {options.components}, {kind}, fitted on {found.frames} frames; "
        f"{kept:.1%} of the variance kept, curve in {curve}"
    )


def plot(path, found, components):
    """Draw the share of the variance that the first components explain, with the number kept marked, into a PNG."""
    from matplotlib.figure import Figure  # here: it is slow to import, and extraction imports this file

    explained = found.explained()
    axes = (figure := Figure(figsize=(6, 4), layout="constrained")).add_subplot()
    axes.plot(np.arange(1, len(explained) + 1), 100 * explained)
    axes.axvline(components, color="gray", linestyle="--")
    axes.annotate(f"{components} kept: {explained[components - 1]:.1%}", (components, 5), (5, 0), textcoords="offset points")
    axes.set(xlabel="components", ylabel="variance explained, %", xlim=(1, len(explained)), ylim=(0, 101))
    with utils.atomic(path) as temporary:
        figure.savefig(temporary, dpi=150)


def run_apply(options):
    store = FeatureStore(options.features)
    projection = load(options.pca, options.components)
    projection.check(store.channels, repr(options.features))
    if Path(options.output).resolve() == Path(options.features).resolve():
        raise InputError(f"--output {options.output!r} is the input; name another file")
    sources = dict.fromkeys(store, store.fingerprint())
    with StoreWriter(options.output, options.dtype, {**store.meta, "pca": projection.label}, sources) as writer:
        for video in tqdm(store, unit="video", disable=len(store) < 1000):
            if video not in writer.done:
                writer.add(video, projection(store.verified(video)))
    print(f"{options.output}: {len(store)} videos, {store.channels} -> {projection.matrix.shape[1]}")


def main(argv=None):
    parser = utils.Parser(__doc__)
    commands = parser.add_subparsers(required=True, metavar="fit | apply")

    one = commands.add_parser("fit", help="fit on feature files", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    one.add_argument("features", nargs="+", help="feature files of one width")
    one.add_argument("--output", required=True, help="the file to write, NAME.npz; with it NAME.png")
    one.add_argument("--components", type=int, default=512, help="how many to keep; the paper: 1024 of 3840")
    one.add_argument(
        "--no_whiten", dest="whiten", action="store_false", help="centre and rotate only, keeping the variances; try both"
    )
    one.add_argument("--frames_per_video", type=int, default=10, help="random frames to draw from each video")
    one.add_argument("--seed", type=int, default=0, help="of that draw")
    one.set_defaults(command=run_fit)

    one = commands.add_parser("apply", help="project a file", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    one.add_argument("features", help="a feature file")
    one.add_argument("--pca", required=True, help="a file of `fit`, or a released .npz")
    one.add_argument("--output", required=True, help="the feature file to write, NAME.hdf5")
    one.add_argument("--components", type=int, help="keep only the first so many")
    one.add_argument("--dtype", choices=("float16", "float32"), default="float16", help="of the stored rows")
    one.set_defaults(command=run_apply)

    options = parser.parse_args(argv)
    if options.command is run_fit and Path(options.output).suffix != ".npz":
        raise InputError(f"--output {options.output!r} must name a file with suffix .npz; the curve lies beside it as .png")
    counts = {name: getattr(options, name, None) for name in ("components", "frames_per_video")}
    utils.check_ranges(options, {name: (1, 10**9) for name, count in counts.items() if count is not None})
    options.command(options)


if __name__ == "__main__":
    utils.run(main)
