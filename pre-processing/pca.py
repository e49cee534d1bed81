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
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import utils
from distributed import run_main
from features.pca import fit_pca, load_projection
from features.store import FeatureStore, StoreWriter
from utils import InputError


def run_fit(options):
    stores = [FeatureStore(path) for path in options.features]
    for store in stores[1:]:
        if store.feature_size != stores[0].feature_size:
            raise InputError(
                f"{str(store.path)!r} has width {store.feature_size}, {str(stores[0].path)!r} has {stores[0].feature_size}; "
                "fit on features of one kind"
            )
    found = fit_pca(stores, options.components, options.frames_per_video, options.seed)
    with utils.atomic(options.output) as temporary, open(temporary, "wb") as file:
        arrays = {"mean": found.mean, "components": found.components, "variance": found.variance}
        np.savez(file, **arrays, whiten=options.whiten)
    curve = Path(options.output).with_suffix(".png")
    plot(curve, found, options.components)
    kind, kept = (
        "whitened" if options.whiten else "not whitened",
        found.explained()[options.components - 1],
    )
    print(
        f"{options.output}: {stores[0].feature_size} -> {options.components}, {kind}, fitted on {found.frames} frames; "
        f"{kept:.1%} of the variance kept, curve in {curve}"
    )


def plot(path, found, components):
    """Draw the share of the variance that the first components explain, with the number kept marked, into a PNG."""
    from matplotlib.figure import (
        Figure,  # here: it is slow to import, and extraction imports this file
    )

    explained = found.explained()
    axes = (figure := Figure(figsize=(6, 4), layout="constrained")).add_subplot()
    axes.plot(np.arange(1, len(explained) + 1), 100 * explained)
    axes.axvline(components, color="gray", linestyle="--")
    axes.annotate(
        f"{components} kept: {explained[components - 1]:.1%}",
        (components, 5),
        (5, 0),
        textcoords="offset points",
    )
    axes.set(
        xlabel="components", ylabel="variance explained, %", xlim=(1, len(explained)), ylim=(0, 101)
    )
    with utils.atomic(path) as temporary:
        figure.savefig(temporary, dpi=150)


def run_apply(options):
    store = FeatureStore(options.features)
    projection = load_projection(options.pca, options.components)
    projection.check(store.feature_size, repr(options.features))
    if Path(options.output).resolve() == Path(options.features).resolve():
        raise InputError(f"--output {options.output!r} is the input; name another file")
    sources = dict.fromkeys(store, store.fingerprint())
    with StoreWriter(
        options.output, options.dtype, {**store.meta, "pca": projection.label}, sources
    ) as writer:
        for video in tqdm(store, unit="video", disable=len(store) < 1000):
            if video not in writer.done:
                writer.add(video, projection(store.read_verified(video)))
    print(
        f"{options.output}: {len(store)} videos, {store.feature_size} -> {projection.matrix.shape[1]}"
    )


def main(argv=None):
    parser = utils.Parser(__doc__)
    commands = parser.add_subparsers(required=True, metavar="fit | apply")

    one = commands.add_parser(
        "fit", help="fit on feature files", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    one.add_argument("features", nargs="+", help="feature files of one width")
    one.add_argument(
        "--output", required=True, help="the file to write, NAME.npz; with it NAME.png"
    )
    one.add_argument(
        "--components", type=int, default=512, help="how many to keep; the paper: 1024 of 3840"
    )
    one.add_argument(
        "--no_whiten",
        dest="whiten",
        action="store_false",
        help="centre and rotate only, keeping the variances; try both",
    )
    one.add_argument(
        "--frames_per_video", type=int, default=10, help="random frames to draw from each video"
    )
    one.add_argument("--seed", type=int, default=0, help="of that draw")
    one.set_defaults(command=run_fit)

    one = commands.add_parser(
        "apply", help="project a file", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    one.add_argument("features", help="a feature file")
    one.add_argument("--pca", required=True, help="a file of `fit`, or a released .npz")
    one.add_argument("--output", required=True, help="the feature file to write, NAME.hdf5")
    one.add_argument("--components", type=int, help="keep only the first so many")
    one.add_argument(
        "--dtype", choices=("float16", "float32"), default="float16", help="of the stored rows"
    )
    one.set_defaults(command=run_apply)

    options = parser.parse_args(argv)
    if options.command is run_fit and Path(options.output).suffix != ".npz":
        raise InputError(
            f"--output {options.output!r} must name a file with suffix .npz; the curve lies beside it as .png"
        )
    counts = {name: getattr(options, name, None) for name in ("components", "frames_per_video")}
    utils.check_ranges(
        options, {name: (1, 10**9) for name, count in counts.items() if count is not None}
    )
    options.command(options)


if __name__ == "__main__":
    run_main(main)
