"""Clips of the demo's film for the benchmarks, and the backbone's own rate."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch

from features.extraction import FeatureFunction
from features.views import View

RATE = 25  # frames a second


def repeat_film(film: Path) -> Iterator[av.VideoFrame]:
    """The film's frames, over and over."""
    while True:
        with av.open(str(film)) as source:
            yield from source.decode(video=0)


def make_clips(
    folder: Path, film: Path, count: int, seconds: int, size: tuple[int, int]
) -> list[Path]:
    """Write `count` clips of the film's frames, one after another, at RATE frames a second."""
    folder.mkdir()
    images = repeat_film(film)
    for i in range(count):
        with av.open(str(folder / f"{i:03}.mp4"), "w") as out:
            stream = out.add_stream("libx264", rate=RATE)
            stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
            for k in range(RATE * seconds):
                image = next(images).reformat(*size, "yuv420p")
                image.pts, image.time_base = k, Fraction(1, RATE)
                out.mux(stream.encode(image))
            out.mux(stream.encode(None))
    return sorted(folder.iterdir())


def seconds_of_backbone(
    features: FeatureFunction, kept: int, view: View, batch_sz: int, streams: int, threads: int
) -> float:
    """The seconds that backbone and pooling take for `kept` frames that lie ready."""
    shape = batch_sz, view.size, view.size, 3
    batch = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    batches = -(-kept // len(batch))  # the last one is full, too

    def run(_):
        return len(features(batch))

    start = time.perf_counter()
    with ThreadPoolExecutor(
        streams, initializer=torch.set_num_threads, initargs=(threads,)
    ) as pool:
        rows = sum(pool.map(run, range(batches)))
    return (time.perf_counter() - start) * kept / rows
