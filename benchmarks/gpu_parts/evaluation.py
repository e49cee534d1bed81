"""Evaluation at FIVR-200K's size: 100 queries x 225,960 made-up videos, C = 1024.

Ours is `compare_collections`, on a part of the videos, scaled to all by their frames. The released
way encodes each video alone, padded to 300 frames, and compares pair by pair: measured on a few
videos and scaled. Features are computed as they are read, so the times are without a disk.
"""

import time
from argparse import Namespace

import numpy as np
import torch
from torch import nn

from benchmarks.gpu_parts.measuring import arithmetic, measure, synchronize
from benchmarks.made_up import RandomStore, random_lengths
from benchmarks.released import compare_plain, encode_plain
from model import TCA, Mean
from padding import bucket_by_length, pack, pad_packed
from retrieval.compare import compare_collections

WHOLE = 225_960  # videos
SLACKS = (1.25, 1.5, 2.0, 4.0)


class Made:
    """The made-up collection, and the part of it that is measured."""

    def __init__(self, options: Namespace) -> None:
        rng = np.random.default_rng(0)
        self.channels = 32 if options.small else 1024
        whole = 2000 if options.small else WHOLE
        self.store = RandomStore(random_lengths(whole, rng), rng, self.channels)
        videos = list(self.store)
        self.whole = len(videos)
        queries = 5 if options.small else 100
        self.queries = videos[:: self.whole // queries][:queries]
        self.part = videos[: 50 if options.small else 16384]
        self.scale = sum(self.store.lengths.values()) / self.frames(self.part)

    def frames(self, videos: list[str]) -> int:
        return sum(self.store.lengths[video] for video in videos)


def ours(options: Namespace, kind: str) -> dict:
    """Rows of the mean and of TCA at both levels, in one type."""
    made, rows = Made(options), []
    rows_of = [("TCA_c", TCA(made.channels), "cosine"), ("TCA_f", TCA(made.channels), "chamfer")]
    if kind == "float32":
        rows_of.insert(0, ("mean", Mean(made.channels), "cosine"))
    with arithmetic(kind) as amp:
        for name, encoder, metric in rows_of:

            def compare(encoder=encoder, metric=metric):
                return compare_collections(
                    encoder,
                    made.store,
                    made.queries,
                    made.part,
                    [metric],
                    device=options.device,
                    amp=amp,
                )

            row = measure(compare, options.device, repeats=1)
            row["seconds"] *= made.scale
            rows.append({"way": f"ours, {kind}", "what": name, **row, "computed": True})
    note = f"measured on {len(made.part)} of {made.whole} videos, scaled by frames"
    return {"rows": rows, "notes": [note]}


def float32(options: Namespace) -> dict:
    return ours(options, "float32")


def tf32(options: Namespace) -> dict:
    return ours(options, "tf32")


def bfloat16(options: Namespace) -> dict:
    return ours(options, "bfloat16")


@torch.inference_mode()
def released(options: Namespace) -> dict:
    """The released way, scaled from 100 videos and 10 queries."""
    made = Made(options)
    encoder = TCA(made.channels).to(options.device).eval()
    videos, queries = made.part[: 10 if options.small else 100], made.queries[:10]
    with arithmetic("float32"):
        encode_plain(encoder, made.store[videos[0]], options.device)  # the first call prepares

        def encode(names):
            return [encode_plain(encoder, made.store[name], options.device) for name in names]

        synchronize(options.device)
        start = time.perf_counter()
        encoded = encode(videos)
        synchronize(options.device)
        encoding = (time.perf_counter() - start) / len(videos)
        query_frames = [frames for frames, _ in encode(queries)]
        start = time.perf_counter()
        for query in query_frames:
            for frames, _ in encoded:
                float(compare_plain(query, frames))
        pair = (time.perf_counter() - start) / (len(queries) * len(videos))
    total = encoding * (made.whole + len(made.queries))
    pairs = pair * made.whole * len(made.queries)
    rows = [
        {"way": "released", "what": "TCA_c, encoding alone", "seconds": total, "computed": True},
        {"way": "released", "what": "TCA_f", "seconds": total + pairs, "computed": True},
    ]
    note = f"released: {encoding * 1e3:.2f} ms a video, {pair * 1e6:.0f} us a pair"
    return {"rows": rows, "notes": [note]}


@torch.inference_mode()
def buckets(options: Namespace) -> dict:
    """Encoding by buckets of several slacks: fewer batches against less padding."""
    made = Made(options)
    encoder: nn.Module = TCA(made.channels).to(options.device).eval()
    names = made.part[: 8 if options.small else 2048]
    x, num_frames = pack([made.store[name] for name in names])
    x, rows = x.to(options.device), []
    for kind in ("float32", "bfloat16"):
        for slack in SLACKS:
            batches = list(bucket_by_length(num_frames.tolist(), 32768, slack))
            with arithmetic(kind) as amp:

                def encode(batches=batches, amp=amp):
                    with torch.autocast(x.device.type, amp, enabled=amp is not None):
                        for batch in batches:
                            encoder(pad_packed(x, num_frames, batch), num_frames[batch])

                row = measure(encode, options.device)
            way = f"{kind}, slack {slack:g}, {len(batches)} batches"
            rows.append({"way": way, "what": f"encoding {len(names)} videos", **row})
    return {"rows": rows}
