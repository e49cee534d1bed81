"""Pictures of what the encoder does: attention over a video's frames, and two videos' frame similarities before and after it.

    python visualize.py attention VIDEO --model_path runs/tca --feature_path features.hdf5 --videos FOLDER --output attention.png
    python visualize.py similarity QUERY MATCH --model_path runs/tca --feature_path features.hdf5 --videos FOLDER --output pair.png

VIDEO, QUERY and MATCH are ids of the feature file. --videos is what its features were extracted from (a folder, a list or a
pattern, as extract_features.py takes it); the frames then stand on the margins. Without it, seconds do.
"""

from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure  # without pyplot: no display, no state
from torch.nn import functional as F

from distributed import run_main
from features.decoding import Video, read_frames
from features.listing import find_videos
from features.store import FeatureStore, warn_if_features_differ
from model import load_encoder
from padding import pad
from retrieval.encode import check_feature_size
from training_log import draw_curves, read_log, series
from utils import InputError, Parser, atomic

MARGIN_FRAMES = 8  # so many of a longer video's frames are shown


@torch.inference_mode()
def attention(encoder, frames):
    """frames (T, C) -> (layers, T, T): the weight that row t gives to column s, mean over heads, of each layer of a TCA."""
    if not hasattr(encoder, "transformer_encoder"):
        raise InputError(
            f"{type(encoder).__name__} has no attention to draw; give a model of --encoder tca"
        )
    x, maps = pad([frames])[0], []
    for layer in encoder.transformer_encoder.layers:
        maps.append(layer.self_attn(x, x, x, need_weights=True)[1][0])
        x = layer(x)
    return torch.stack(maps)


@torch.inference_mode()
def similarities(encoder, query, match):
    """Two (T, C) arrays -> cosine similarities (Tq, Tt) of their features, and of their frame descriptors."""
    described = [encoder.encode(*pad([frames]))[0] for frames in (query, match)]
    features = [F.normalize(pad([frames])[0][0], dim=1) for frames in (query, match)]
    return features[0] @ features[1].T, described[0] @ described[1].T


def show(axes, matrix, rows, columns, **limits):
    """A matrix with the frames of `rows` at its left and of `columns` below it; each (frames or None, T)."""
    drawn = axes.imshow(matrix, aspect="auto", interpolation="nearest", **limits)
    for axis, (frames, T), horizontal in ((axes.xaxis, columns, True), (axes.yaxis, rows, False)):
        places = sorted({round(place) for place in np.linspace(0, T - 1, min(MARGIN_FRAMES, T))})
        axis.set_ticks(places, labels=[""] * len(places) if frames else None)
        for number, place in enumerate(places if frames else ()):
            _thumbnail(
                axes,
                frames[min(place, len(frames) - 1)],
                number / len(places),
                1 / len(places),
                horizontal,
            )
    return drawn


def _thumbnail(axes, frame, start, size, horizontal):
    """A small picture beside the axes, from `start` on, `size` wide (shares of the axis)."""
    size = min(size, 0.2)
    inset = axes.inset_axes(
        [start, -0.03 - size, size, size]
        if horizontal
        else [-0.03 - size, 1 - start - size, size, size]
    )
    inset.imshow(frame)
    inset.axis("off")


def margin(store, videos, video):
    """(the frames (T, 224, 224, 3) of a video, or None, and its T)."""
    frames = None
    if videos is not None:
        if video not in videos:
            raise InputError(
                f"--videos holds no {video!r}; give what the features were extracted from, or leave it out"
            )
        frames = list(read_frames(Video(video, videos[video])))
    return frames, store.lengths[video]


def draw_attention(args, encoder, store, videos):
    maps = attention(encoder, store[args.video])
    side = margin(store, videos, args.video)
    figure = Figure(figsize=(5.6 * len(maps), 5))
    panels = figure.subplots(1, len(maps), squeeze=False)[0]
    for number, (axes, weights) in enumerate(zip(panels, maps, strict=True), 1):
        figure.colorbar(show(axes, weights * len(weights), side, side), ax=axes, shrink=0.8)
        axes.set_title(f"attention, layer {number}, in shares of an even one", fontsize=9)
    return figure


def draw_similarity(args, encoder, store, videos):
    pair = similarities(encoder, store[args.video], store[args.match])
    sides = [margin(store, videos, video) for video in (args.video, args.match)]
    figure = Figure(figsize=(11, 5))
    for axes, matrix, title in zip(
        figure.subplots(1, 2), pair, ("features", "after the encoder"), strict=True
    ):
        figure.colorbar(
            show(axes, matrix, *sides, vmin=min(0, matrix.min()), vmax=1), ax=axes, shrink=0.8
        )
        axes.set_title(f"{title}: rows {args.video}, columns {args.match}", fontsize=9)
    return figure


def parse(argv=None):
    parser = Parser(__doc__)
    commands = parser.add_subparsers(required=True, metavar="attention | similarity | curves")
    for name, draw in (("attention", draw_attention), ("similarity", draw_similarity)):
        one = commands.add_parser(name)
        one.set_defaults(draw=draw)
        one.add_argument(
            "video", help="id of a video" if name == "attention" else "id of the query: the rows"
        )
        if name == "similarity":
            one.add_argument("match", help="id of the other video: the columns")
        one.add_argument(
            "-mp", "--model_path", required=True, help="a run's folder or a model file"
        )
        one.add_argument(
            "-fp", "--feature_path", required=True, help="HDF5 file with the features of the videos"
        )
        one.add_argument("--videos", help="the videos themselves, for the frames on the margins")
        one.add_argument(
            "--nhead", type=int, default=8, help="attention heads of a bare state dict (default 8)"
        )
        one.add_argument("--output", required=True, help="the picture to write, NAME.png")
    one = commands.add_parser("curves")
    one.set_defaults(draw=None)
    one.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="a run's folder (--model_path of train.py), or its log.jsonl",
    )
    one.add_argument("--output", required=True, help="the picture to write, NAME.png")
    args = parser.parse_args(argv)
    if Path(args.output).suffix.lower() != ".png":
        raise InputError(f"--output {args.output!r} must name a file with suffix .png")
    return args


def main(argv=None):
    args = parse(argv)
    if args.draw is None:
        figure = draw_curves({name: series(read_log(name)) for name in dict.fromkeys(args.runs)})
        with atomic(args.output) as temporary:
            figure.savefig(temporary, dpi=120)
        print(f"{args.output}: {len(args.runs)} run{'s' if len(args.runs) > 1 else ''}")
        return
    store = FeatureStore(args.feature_path)
    _, encoder, features = load_encoder(args.model_path, args.nhead)
    check_feature_size(encoder, store)
    warn_if_features_differ(features, store, args.model_path)
    videos = find_videos(args.videos) if args.videos else None
    figure = args.draw(args, encoder, store, videos)
    with atomic(args.output) as temporary:
        figure.savefig(temporary, dpi=120, bbox_inches="tight")


if __name__ == "__main__":
    run_main(main)
