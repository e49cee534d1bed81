"""PCA of frame features: fit it on feature files, apply it to any file of the same width.

    python pre-processing/pca.py fit features.hdf5 --components 512 --output pca.npz
    python pre-processing/pca.py apply features.hdf5 --pca pca.npz --output features_512.hdf5

`fit` draws 10 frames of every video, as the paper did (997,090 of VCDB's), keeps the leading
components, and plots the variance they explain beside its output, NAME.png. `apply` gives rows of
unit length: whitened, or after `fit --no_whiten` only centred and rotated. Whitening that is fitted
on little film amplifies noise, but can gain far more than that costs: try both. The rows of `apply`
do not depend on the number of threads.

A parameter file holds arrays: mean (C,), components (D, C), variance (D,), whiten. The released
code's files (U, lams, mu, Utmu) are read too.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from distributed import run_main
from features.pca import PCAFit, fit_pca, load_projection, project_videos
from features.store import FeatureStore, StoreWriter
from files import Lock, atomic
from utils import InputError, Parser, check_ranges


def run_fit(options: argparse.Namespace) -> None:
    stores = [FeatureStore(path) for path in options.features]
    first = stores[0]
    for store in stores[1:]:
        if store.feature_size != first.feature_size:
            raise InputError(
                f"{str(store.path)!r} has width {store.feature_size}, {str(first.path)!r} has "
                f"{first.feature_size}; fit on features of one kind"
            )
    with Lock(options.output):
        fit = fit_pca(stores, options.components, options.frames_per_video, options.seed)
        with atomic(options.output) as temporary, open(temporary, "wb") as file:
            np.savez(  # into an open file: to a path it might append a suffix
                file,
                mean=fit.mean,
                components=fit.components,
                variance=fit.variance,
                whiten=options.whiten,
            )
    curve = Path(options.output).with_suffix(".png")
    plot_variance(curve, fit, options.components)
    kind = "whitened" if options.whiten else "not whitened"
    kept = fit.explained()[options.components - 1]
    print(
        f"{options.output}: {first.feature_size} -> {options.components}, {kind}, "
        f"fitted on {fit.frames} frames; {kept:.1%} of the variance kept, curve in {curve}"
    )


def plot_variance(path: Path, fit: PCAFit, components: int) -> None:
    """Plot the share of the variance that so many components explain, and how many are kept."""
    from matplotlib.figure import Figure  # slow to import, and not needed by `apply`

    explained = fit.explained()
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(np.arange(1, len(explained) + 1), 100 * explained)
    axes.axvline(components, color="gray", linestyle="--")
    label = f"{components} kept: {explained[components - 1]:.1%}"
    axes.annotate(label, (components, 5), (5, 0), textcoords="offset points")
    axes.set(xlabel="components", xlim=(1, len(explained)))
    axes.set(ylabel="variance explained, %", ylim=(0, 101))
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=150)


def run_apply(options: argparse.Namespace) -> None:
    store = FeatureStore(options.features)
    projection = load_projection(options.pca, options.components)
    projection.check(store.feature_size, repr(options.features))
    if Path(options.output).resolve() == Path(options.features).resolve():
        raise InputError(f"--output {options.output!r} is the input; name another file")
    meta = {**store.meta, "pca": projection.label}
    sources = dict.fromkeys(store, store.fingerprint())  # a resumed run needs the same features
    with StoreWriter(options.output, options.dtype, meta, sources) as writer:
        left = [video for video in store if video not in writer.done]  # by a run that was stopped
        projected = project_videos(store, projection, left)
        for video, rows in tqdm(projected, total=len(left), unit="video", disable=len(left) < 1000):
            writer.add(video, rows)
    size = projection.matrix.shape[1]
    print(f"{options.output}: {len(store)} videos, {store.feature_size} -> {size}")


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__)
    commands = parser.add_subparsers(required=True, metavar="fit | apply")
    with_defaults = {"formatter_class": argparse.ArgumentDefaultsHelpFormatter}

    fit = commands.add_parser("fit", help="fit on feature files", **with_defaults)
    fit.set_defaults(command=run_fit)
    add = fit.add_argument
    add("features", nargs="+", help="feature files of one width")
    add("--output", required=True, help="the file to write, NAME.npz; with it NAME.png")
    add("--components", type=int, default=512, help="how many to keep; the paper: 1024 of 3840")
    add(
        "--no_whiten",
        dest="whiten",
        action="store_false",
        help="centre and rotate only, keeping the variances; try both",
    )
    add("--frames_per_video", type=int, default=10, help="random frames to draw of each video")
    add("--seed", type=int, default=0, help="of that draw")

    apply = commands.add_parser("apply", help="project a feature file", **with_defaults)
    apply.set_defaults(command=run_apply)
    add = apply.add_argument
    add("features", help="a feature file")
    add("--pca", required=True, help="a file of `fit`, or a .npz of the released code")
    add("--output", required=True, help="the feature file to write, NAME.hdf5")
    add("--components", type=int, help="keep only the first so many")
    add("--dtype", choices=("float16", "float32"), default="float16", help="of the stored rows")
    return parser


def validate(options: argparse.Namespace) -> None:
    if options.command is run_fit and Path(options.output).suffix != ".npz":
        raise InputError(
            f"--output {options.output!r} must name a file with suffix .npz; "
            "the curve is written beside it as .png"
        )
    ranges = {}
    for name in ("components", "frames_per_video"):
        if getattr(options, name, None) is not None:
            ranges[name] = (1, 10**9)
    check_ranges(options, ranges)


def main(argv: Sequence[str] | None = None) -> None:
    options = make_parser().parse_args(argv)
    validate(options)
    options.command(options)


if __name__ == "__main__":
    run_main(main)
