"""Pictures: the curves of training runs, attention over a video, two videos' frame similarities.

    python visualize.py curves runs/a runs/b --output curves.png

    # two videos frame by frame, before and after the encoder
    python visualize.py similarity QUERY MATCH --model_path runs/tca \\
        --feature_path features.hdf5 --videos FOLDER --output similarity.png

    # which frames each frame of a video attends to
    python visualize.py attention VIDEO --model_path runs/tca \\
        --feature_path features.hdf5 --videos FOLDER --output attention.png

QUERY, MATCH and VIDEO are ids of the feature file. --videos is what its features were extracted
from: a folder, a list or a pattern, as extract_features.py takes it. With it the margins show
frames, without it seconds.
"""

import contextlib
import re
import warnings
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure  # without pyplot: no display, no global state
from torch import nn
from torch.nn import functional as F

from distributed import run_main
from features.decoding import Decoder, Video
from features.frame_rules import stated_rule
from features.listing import find_videos
from features.store import FeatureStore, warn_if_features_differ
from features.views import View
from files import atomic
from model import load_encoder
from padding import pad
from retrieval.encode import check_feature_size
from training_log import draw_curves, read_log, series
from utils import InputError, Parser

DPI = 120
SIDE = 3.6  # inches, of a matrix
MARGIN_FRAMES = 8  # so many frames of a longer video are shown, evenly spaced
LARGEST_FRAME = 0.8  # inches
LONGEST_ID = 40  # characters


def main(argv=None):
    args = parse_args(argv)
    figure = args.draw(args)
    with atomic(args.output) as temporary, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # an id in a script that the font lacks: boxes
        figure.savefig(temporary, dpi=DPI, format="png")
    print(f"{args.output} is written")


# --- what is computed ---------------------------------------------------------------------------


@torch.inference_mode()
def attention(encoder: nn.Module, frames: np.ndarray) -> torch.Tensor:
    """The attention weights of a TCA, mean over heads.

    Args:
        frames: (T, C) features of a video
    Returns:
        (layers, T, T); row t is what frame t takes from each frame, and sums to 1
    """
    if not hasattr(encoder, "transformer_encoder"):
        raise InputError(
            f"{type(encoder).__name__} has no attention to draw; give a model of --encoder tca"
        )
    x, _ = pad([frames])  # (1, T, C)
    x, weights = x[0], []
    for layer in encoder.transformer_encoder.layers:
        _, of_layer = layer.self_attn(x[None], x[None], x[None], need_weights=True)
        weights.append(of_layer[0])  # (T, T)
        x = layer(x[None])[0]
    return torch.stack(weights)


@torch.inference_mode()
def similarities(
    encoder: nn.Module, query: np.ndarray, match: np.ndarray
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine similarities between the frames of two videos, before and after the encoder.

    Args:
        query, match: (Tq, C) and (Tm, C) features
    Returns:
        (Tq, Tm) of the features, (Tq, Tm) of the frame descriptors
    """
    features, descriptors = [], []
    for frames in (query, match):
        x, num_frames = pad([frames])
        features.append(F.normalize(x[0], dim=1))
        descriptors.append(encoder.encode(x, num_frames)[0])
    return features[0] @ features[1].T, descriptors[0] @ descriptors[1].T


# --- what is drawn ------------------------------------------------------------------------------


class Side(NamedTuple):
    """A video beside a matrix."""

    name: str  # its id, the end of a long one
    T: int  # rows of its features
    fps: Fraction  # rows a second
    frames: list[np.ndarray] | None = None  # (size, size, 3) uint8 each


def draw_run_curves(args):
    return draw_curves({run: series(read_log(run)) for run in dict.fromkeys(args.runs)})


def draw_attention(args):
    encoder, store = load(args)
    weights = attention(encoder, store[args.video])  # (layers, T, T)
    side = load_side(args, store, args.video)
    panels = []
    for number, of_layer in enumerate(weights, 1):
        layer = f", layer {number}" if len(weights) > 1 else ""
        panels.append((f"attention{layer}", of_layer * side.T))
    every = torch.stack([matrix for _, matrix in panels])
    return draw_panels(
        panels,
        rows=side,
        columns=side,
        title=f"{side.name}: what each frame (row) takes from each (column)",
        scale="attention weight times the number of frames",  # 1: as much as from all others
        limits=(float(every.min()), float(every.max())),
    )


def draw_similarity(args):
    encoder, store = load(args)
    before, after = similarities(encoder, store[args.video], store[args.match])
    both = torch.stack([before, after])
    query, match = load_side(args, store, args.video), load_side(args, store, args.match)
    return draw_panels(
        [("before the encoder: frame features", before), ("after: frame descriptors", after)],
        rows=query,
        columns=match,
        title=f"{query.name} (rows) and {match.name} (columns), frame by frame",
        scale="cosine similarity",
        # One scale for both, so that their colours can be compared.
        limits=(min(0.0, float(both.min())), float(both.max())),
    )


def load(args):
    """The encoder of --model_path and the store of --feature_path."""
    store = FeatureStore(args.feature_path)
    _, encoder, features = load_encoder(args.model_path, args.nhead)
    check_feature_size(encoder, store)
    warn_if_features_differ(features, store, args.model_path)
    return encoder, store


def load_side(args, store, video) -> Side:
    """A video's length, and its frames if --videos is given: one for each row of its features."""
    T, (fps, rule) = store.lengths[video], stated_rule(store.meta, store.path)
    name = video if len(video) <= LONGEST_ID else f"...{video[-LONGEST_ID:]}"
    if not args.videos:
        return Side(name, T, fps)
    videos = find_videos(args.videos, "--videos")
    if video not in videos:
        raise InputError(
            f"--videos has no {video!r}; give what the features were extracted from, or leave it"
            " out"
        )
    clip = Video(video, videos[video])
    with contextlib.closing(Decoder(fps, rule, view=stated_view(store))) as decoder:
        frames = list(decoder.frames(clip))
    if clip.reason:
        raise InputError(f"{str(clip.path)!r} cannot be shown: {clip.reason}; leave --videos out")
    return Side(name, T, fps, frames)


def stated_view(store) -> View:
    """The picture of a frame that features were made of, as their file states it."""
    try:
        return View.parse(str(store.meta.get("view", View())))
    except ValueError as error:
        raise InputError(f"features {str(store.path)!r}: {error}") from None


def draw_panels(panels, rows, columns, title, scale, limits) -> Figure:
    """Matrices (rows.T, columns.T) side by side, with frames on their margins and one colour bar.

    Args:
        panels: [(title, matrix), ...]
        rows, columns: the Side of each axis of all the matrices
        scale: what the colours mean
        limits: lowest and highest value of the colours
    """
    left, bottom, gap, top = 0.65, 0.65, 0.25, 0.75  # inches
    if columns.frames is not None:
        bottom = 0.15 + _frame_size(columns)
    if rows.frames is not None:
        left = 0.15 + _frame_size(rows)
    matrices = len(panels) * (SIDE + gap)
    width, height = left + matrices + 1.1, bottom + SIDE + top
    figure = Figure(figsize=(width, height))

    def add_axes(x, y, w, h):  # inches, from the lower left corner
        return figure.add_axes((x / width, y / height, w / width, h / height))

    for i, (name, matrix) in enumerate(panels):
        x = left + i * (SIDE + gap)
        axes = add_axes(x, bottom, SIDE, SIDE)
        image = axes.imshow(
            matrix.numpy(), aspect="auto", interpolation="nearest", vmin=limits[0], vmax=limits[1]
        )
        axes.set_title(name, fontsize=11)
        _label_axis(axes.xaxis, columns)
        _label_axis(axes.yaxis, rows, visible=i == 0)  # the others share the rows of the first
        _draw_frames(add_axes, columns, lambda start, size, x=x: (x + start, bottom - 0.05 - size))
    _draw_frames(
        add_axes, rows, lambda start, size: (left - 0.05 - size, bottom + SIDE - start - size)
    )
    bar = add_axes(left + matrices, bottom, 0.15, SIDE)
    figure.colorbar(image, cax=bar, label=scale, format=lambda value, _: f"{value:g}")
    figure.text(
        0.5,
        1 - 0.15 / height,
        title,
        ha="center",
        va="top",
        weight="bold",
        wrap=True,
        parse_math=False,  # ids may contain $
    )
    return figure


def _slots(side):
    """How many of a video's frames are shown."""
    return min(MARGIN_FRAMES, side.T)


def _frame_size(side):
    """The side of a frame on the margin, in inches: its part of the axis, less a thin gap."""
    return min(0.95 * SIDE / _slots(side), LARGEST_FRAME)


def _draw_frames(add_axes, side, place):
    """Draw frames along one axis, each in the middle of its part of the axis.

    place: (start along the axis, size), in inches -> lower left corner (x, y), in inches
    """
    if side.frames is None:
        return
    n, size = _slots(side), _frame_size(side)
    for k in range(n):
        row = int((k + 0.5) * side.T / n)  # the middle row of the part
        start = (k + 0.5) * SIDE / n - size / 2
        axes = add_axes(*place(start, size), size, size)
        axes.imshow(side.frames[min(row, len(side.frames) - 1)])
        axes.axis("off")


def _label_axis(axis, side, visible=True):
    """Seconds along an axis; nothing if it has frames."""
    if side.frames is not None or not visible:
        axis.set_ticks([])
        return
    rows = sorted({round(row) for row in np.linspace(0, side.T - 1, _slots(side))})
    axis.set_ticks(rows, labels=[f"{float(row / side.fps):g}" for row in rows])
    axis.set_label_text(f"{side.name}, seconds", parse_math=False)


# --- arguments ----------------------------------------------------------------------------------


def parse_args(argv=None):
    parser = Parser(__doc__)
    commands = parser.add_subparsers(required=True, metavar="curves | similarity | attention")

    curves = commands.add_parser("curves", help="the logs of training runs")
    curves.set_defaults(draw=draw_run_curves)
    curves.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="a run's folder (--model_path of train.py), or its log.jsonl",
    )
    curves.add_argument("--output", required=True, help="the picture to write, NAME.png")

    similarity = commands.add_parser(
        "similarity", help="two videos, frame by frame", add_help=False
    )
    similarity.set_defaults(draw=draw_similarity)
    similarity.add_argument("video", metavar="QUERY", help="id of the query: the rows")
    similarity.add_argument("match", metavar="MATCH", help="id of the other video: the columns")
    add_model_arguments(similarity)

    attention = commands.add_parser(
        "attention", help="the attention over a video's frames", add_help=False
    )
    attention.set_defaults(draw=draw_attention)
    attention.add_argument("video", metavar="VIDEO", help="id of a video")
    add_model_arguments(attention)

    for command in (similarity, attention):
        # Ids of YouTube may begin with -. argparse takes for a positional argument what is not an
        # option and looks like a negative number; here, whatever is not an option.
        command._negative_number_matcher = re.compile("-")
        command.add_argument("--help", action="help", help="show this and exit")  # -h begins ids
    args = parser.parse_args(argv)
    if Path(args.output).suffix.lower() != ".png":
        raise InputError(f"--output {args.output!r} must name a file with suffix .png")
    return args


def add_model_arguments(parser):
    add = parser.add_argument
    add("-mp", "--model_path", required=True, help="a run's folder or a model file")
    add("-fp", "--feature_path", required=True, help="HDF5 file with the features of the videos")
    add("--videos", help="the videos themselves, for the frames on the margins")
    add("--nhead", type=int, default=8, help="attention heads of a bare state dict (default 8)")
    add("--output", required=True, help="the picture to write, NAME.png")


if __name__ == "__main__":
    run_main(main)
