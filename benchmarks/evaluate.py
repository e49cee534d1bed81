"""Evaluation, the released code's way against ours, and a run at FIVR-200K's size.

    python benchmarks/evaluate.py --output evaluate.json                      # 50 queries x 1,000 videos, some minutes
    python benchmarks/evaluate.py --fivr200k --minutes 10 --output fivr200k.json

Features are made up, of realistic lengths (log-normal, median 60 frames, cut at 300), C = 1024, in half precision. The plain
way is the released recipe: every video encoded alone, padded to 300 frames; then one einsum a pair, of the real frames.
It is measured on a few videos and pairs and scaled to all, because it is linear in both. Ours is `compare_collections` on the
whole, reading included, from a packed file. Rates of this machine are measured in the same run, by products of the encoder's
shapes.

--fivr200k takes features from a store that computes them as they are read, in place of 35 GB of file; so reading is not in its
times. The video level runs whole by the mean of the frames. TCA runs, at both levels, on as many videos as --minutes allow
each, and is scaled to all by frames.
"""

import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from datasets.fivr import FIVR
from distributed import run_main
from features.store import FeatureStore, write_store
from model import TCA, Mean
from retrieval.compare import MEMORY, compare_collections
from retrieval.encode import VideoEncoder, crop
from retrieval.similarity import pack_descriptors, similarity_tables
from utils import Parser, check_ranges, provenance, write_json

C, PADDING, LONGEST = 1024, 300, 300
TYPES = {"float32": None, "bfloat16": torch.bfloat16}
ROWS = {"TCA_c": "cosine", "TCA_f": "chamfer"}


def lengths_of(count, draw):
    return np.clip(np.exp(draw.normal(np.log(60), 0.8, count)), 3, LONGEST).astype(int)


class MadeUp:
    """A feature store whose rows are computed as they are read: a stretch of one block of noise, another for each video."""

    path, feature_size, meta = "features made up as they are read", C, {}

    def __init__(self, lengths, draw):
        self.lengths = {f"v{i:06}": int(T) for i, T in enumerate(lengths)}
        self._block = draw.normal(size=(8192, C)).astype(np.float16)

    def __getitem__(self, video):
        start = int(video[1:]) * 7919 % (len(self._block) - LONGEST)
        return self._block[start : start + self.lengths[video]]

    def __iter__(self):
        return iter(self.lengths)

    def __len__(self):
        return len(self.lengths)

    def release_pages(self):
        pass


def timed(function, *arguments, **options):
    start = time.perf_counter()
    result = function(*arguments, **options)
    return time.perf_counter() - start, result


def rate(dtype, seconds=3.0):
    """Operations a second of this machine's matrix products of the encoder's shapes; the best of several."""
    a, b = torch.randn(4096, C).to(dtype), torch.randn(C, 2 * C).to(dtype)
    best, end = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        took, _ = timed(torch.matmul, a, b)
        best = max(best, 2 * a.shape[0] * a.shape[1] * b.shape[1] / took)
    return best


# --- the plain way ---------------------------------------------------------------------------------------------------


@torch.inference_mode()
def plain_encode(encoder, rows):
    """One video, padded to 300 frames: frame descriptors (T, D), video descriptor (D,)."""
    rows = torch.from_numpy(crop(rows, PADDING).astype(np.float32))
    x = F.pad(rows, (0, 0, 0, PADDING - len(rows)))[None]  # (1, 300, C)
    padding = (torch.arange(PADDING) >= len(rows))[None]
    out = encoder.transformer_encoder(x, src_key_padding_mask=padding)[0, : len(rows)]
    return F.normalize(out, dim=1), F.normalize(out.mean(0), dim=0)


def plain_pair(query, target):
    return torch.einsum("ik,jk->ij", query, target).max(1)[0].mean()


def plain_seconds(encoder, store, queries, database, sample):
    """{row: seconds} of the whole by the plain way, scaled from `sample` videos and ten pairs for each."""
    draw = np.random.default_rng(1)
    some = draw.choice(database, sample, replace=False)
    plain_encode(encoder, store[some[0]])
    encoding, described = timed(lambda: [plain_encode(encoder, store[video]) for video in some])
    asked = [
        plain_encode(encoder, store[query])[0] for query in draw.choice(queries, 10, replace=False)
    ]
    with torch.inference_mode():
        pairing, _ = timed(
            lambda: [plain_pair(query, frames) for query in asked for frames, _ in described]
        )
        dotting, _ = timed(
            lambda: [float(described[0][1] @ video) for _ in asked for _, video in described]
        )
    pairs, videos = len(queries) * len(database), len(queries) + len(database)
    encode = encoding / sample * videos
    return {
        "TCA_c": encode + dotting / (10 * sample) * pairs,
        "TCA_f": encode + pairing / (10 * sample) * pairs,
    }


# --- ours ------------------------------------------------------------------------------------------------------------


def efficiency(encoder, store, queries, database, amp, peak):
    """The shares of the machine's rate that encoding and the chamfer kernel reach, counting real frames only."""
    video_encoder = VideoEncoder(encoder, store, PADDING, amp=amp)
    batches = list(video_encoder.batches(database))[:: max(len(database) // 200, 1)]
    video_encoder(batches[0], ["video"])
    seconds, _ = timed(lambda: [video_encoder(batch, ["video"]) for batch in batches])
    T = np.array([store.lengths[video] for batch in batches for video in batch], float)
    width = encoder.transformer_encoder.layers[0].linear1.out_features
    encode = (T * 2 * (4 * C * C + 2 * C * width) + 4 * T * T * C).sum() / seconds / peak
    dtype = amp or torch.float32
    held = pack_descriptors(
        [
            F.normalize(torch.from_numpy(store[q].astype(np.float32)), dim=1).numpy()
            for q in queries
        ],
        "chamfer",
        dtype=dtype,
    )
    targets = [
        F.normalize(torch.from_numpy(store[v].astype(np.float32)), dim=1).numpy()
        for v in database[:200]
    ]
    targets = pack_descriptors(targets, "chamfer", dtype=dtype)
    similarity_tables(held, targets, ["chamfer"])
    seconds, _ = timed(similarity_tables, held, targets, ["chamfer"])
    return {
        "encode": encode,
        "chamfer": 2 * C * len(held.data) * len(targets.data) / seconds / peak,
    }


def ratios(args):
    draw, encoder = np.random.default_rng(0), TCA(C).eval()
    made = MadeUp(lengths_of(args.queries + args.videos, draw), draw)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        path = Path(folder) / "features.hdf5"
        write_store(path, made.lengths, made.__getitem__, np.float16, C, {})
        store = FeatureStore(path)
        queries, database = list(store)[: args.queries], list(store)[args.queries :]
        peaks = {name: rate(amp or torch.float32) for name, amp in TYPES.items()}
        plain = plain_seconds(encoder, store, queries, database, min(args.sample, len(database)))
        found = {
            "rate_gflops": {name: peak / 1e9 for name, peak in peaks.items()},
            "plain_seconds": plain,
            "rows": [],
        }
        for name, amp in TYPES.items():
            shares = efficiency(encoder, store, queries, database, amp, peaks[name])
            for row, metric in ROWS.items():
                seconds, _ = timed(
                    compare_collections,
                    encoder,
                    store,
                    queries,
                    database,
                    [metric],
                    PADDING,
                    amp=amp,
                )
                found["rows"].append(
                    {"row": row, "type": name, "seconds": seconds, "ratio": plain[row] / seconds}
                    | shares
                )
    found["frames"] = sum(made.lengths.values())
    print(f"{args.queries} queries x {args.videos} videos, {found['frames']} frames, {torch.get_num_threads()} threads;"
          f" plain way scaled from {min(args.sample, args.videos)} videos")  # fmt: skip
    print("row    type      plain s  ours s  ratio  products GFLOP/s  encoding  chamfer kernel")
    for line in found["rows"]:
        print(f"{line['row']}  {line['type']:8}  {plain[line['row']]:7.1f}  {line['seconds']:6.1f}  {line['ratio']:4.1f}x"
              f"  {found['rate_gflops'][line['type']]:16.0f}  {line['encode']:8.0%}  {line['chamfer']:14.0%}")  # fmt: skip
    return found


# --- FIVR-200K's size ------------------------------------------------------------------------------------------------


def peak_gib():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def within(minutes, encoder, store, queries, database, metric, options):
    """Seconds for the database, scaled by frames from as many of its videos as `minutes` allow; and how many those are."""
    amount, took = 64, 0.0
    while True:
        some = database[:amount]
        took, _ = timed(
            compare_collections, encoder, store, queries, some, [metric], PADDING, **options
        )
        if took > 0.2 * 60 * minutes or amount == len(database):
            break
        amount = min(int(amount * max(1.5, min(8, 0.7 * 60 * minutes / took))), len(database))
    frames = [sum(store.lengths[video] for video in part) for part in (some, database)]
    return took / frames[0] * frames[1], amount


def fivr200k(args):
    draw = np.random.default_rng(0)
    store = MadeUp(lengths_of(args.videos, draw), draw)
    database = list(store)
    queries, options = (
        database[:: args.videos // args.queries][: args.queries],
        {"memory": args.memory},
    )
    others = np.array(database)
    labels = {
        query: {label: draw.choice(others, 30).tolist() for label in ("ND", "DS", "CS", "IS")}
        for query in queries
    }
    chosen = FIVR(queries, database, labels, "made up")
    seconds, whole = timed(
        compare_collections, Mean(C), store, queries, database, ["cosine"], PADDING, **options
    )
    scoring, _ = timed(chosen.evaluate_table, queries, database, whole["cosine"])
    found = {
        "frames": sum(store.lengths.values()),
        "memory_bound_gib": args.memory,
        "scoring_seconds": scoring,
    }
    found["rows"] = [
        {
            "row": "mean, video level",
            "seconds": seconds,
            "videos": len(database),
            "peak_gib": peak_gib(),
        }
    ]
    for name in args.amp:
        for row, metric in ROWS.items():
            seconds, amount = within(
                args.minutes,
                TCA(C).eval(),
                store,
                queries,
                database,
                metric,
                options | {"amp": TYPES[name]},
            )
            line = {
                "row": f"{row}, {name}",
                "seconds": seconds,
                "videos": amount,
                "peak_gib": peak_gib(),
            }
            found["rows"].append(line)
    print(f"{len(queries)} queries x {len(database)} videos, {found['frames']} frames; --memory {args.memory:g};"
          f" scoring the table: {scoring:.1f} s")  # fmt: skip
    print("row                  measured videos  seconds of the whole  peak GiB so far")
    for line in found["rows"]:
        scaled = "" if line["videos"] == len(database) else " (scaled)"
        print(
            f"{line['row']:20}  {line['videos']:14}  {line['seconds']:11.0f}{scaled:9}  {line['peak_gib']:15.2f}"
        )
    return found


def parse():
    parser = Parser(__doc__)
    add = parser.add_argument
    add(
        "--fivr200k", action="store_true", help="the run at FIVR-200K's size in place of the ratios"
    )
    add("--queries", type=int, help="(default 50; 100 with --fivr200k)")
    add("--videos", type=int, help="(default 1000; 225960 with --fivr200k)")
    add(
        "--sample",
        type=int,
        default=40,
        help="videos that the plain way is measured on (default 40)",
    )
    add(
        "--minutes",
        type=float,
        default=10.0,
        help="time for each row of TCA at FIVR-200K's size (default 10)",
    )
    add("--memory", type=float, default=MEMORY, help="GiB (default %(default)s)")
    add(
        "--amp",
        nargs="+",
        choices=TYPES,
        default=["float32"],
        help="types of TCA's rows at FIVR-200K's size (default float32)",
    )
    add("--folder", help="where the features are written (default: the system's temporary folder)")
    add("--output", help="JSON file of the figures")
    args = parser.parse_args()
    args.queries = args.queries or (100 if args.fivr200k else 50)
    args.videos = args.videos or (225960 if args.fivr200k else 1000)
    check_ranges(
        args,
        {
            "queries": (10, args.videos),
            "videos": (20, 10**7),
            "sample": (1, 10**6),
            "minutes": (0.01, 1e6),
        },
    )
    return args


def main():
    args = parse()
    found = fivr200k(args) if args.fivr200k else ratios(args)
    if args.output:
        write_json(
            args.output,
            {"queries": args.queries, "videos": args.videos, "threads": torch.get_num_threads()}
            | found
            | provenance(),
        )


if __name__ == "__main__":
    run_main(main)
