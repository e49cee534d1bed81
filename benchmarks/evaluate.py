"""Evaluation: the released code's way against ours, and a run at FIVR-200K's size.

    python benchmarks/evaluate.py --output evaluate.json  # 50 queries x 1,000 videos, some minutes
    python benchmarks/evaluate.py --fivr200k --minutes 10 --output fivr200k.json

Features are random, in half precision, with C = 1024. The videos' lengths are log-normal: median 60
frames, at most 300.

The plain way is the released recipe: each video is encoded alone, padded to 300 frames, then one
einsum compares each pair by its valid frames. It is linear in videos and pairs, so it is measured
on a few and scaled to all. Ours is `compare_collections` on the whole, reading a packed file
included. The machine's rates are measured in the same run, by products of the encoder's shapes.

--fivr200k computes features as they are read, in place of 35 GB of file, so its times are without
reading. The mean of the frames is evaluated whole, at video level. TCA is evaluated at both levels,
on as many videos as --minutes allow, and scaled to all by frames.
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

from benchmarks.made_up import RandomStore, random_lengths
from benchmarks.released import compare_plain, encode_plain
from datasets.fivr import FIVR
from distributed import run_main
from features.store import FeatureStore, write_store
from files import write_json
from model import TCA, Mean
from retrieval.compare import MEMORY, compare_collections
from retrieval.encode import VideoEncoder
from retrieval.similarity import pack_descriptors, similarity_tables
from utils import Parser, check_ranges, provenance

C = 1024
PADDING_SIZE = 300
TYPES = {"float32": None, "bfloat16": torch.bfloat16}
ROWS = {"TCA_c": "cosine", "TCA_f": "chamfer"}


def parse_args(argv=None):
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--fivr200k", action="store_true", help="run at FIVR-200K's size instead")
    add("--queries", type=int, help="(default 50; 100 with --fivr200k)")
    add("--videos", type=int, help="(default 1000; 225960 with --fivr200k)")
    add("--sample", type=int, default=40, help="videos to measure the plain way on (default 40)")
    add("--minutes", type=float, default=10.0, help="for each row of TCA at FIVR-200K's size")
    add("--memory", type=float, default=MEMORY, help="GiB (default %(default)s)")
    add(
        "--amp",
        nargs="+",
        choices=TYPES,
        default=["float32"],
        help="types of TCA's rows at FIVR-200K's size (default float32)",
    )
    add("--folder", help="where features are written (default: the system's temporary folder)")
    add("--output", help="JSON file of the results")
    args = parser.parse_args(argv)
    args.queries = args.queries or (100 if args.fivr200k else 50)
    args.videos = args.videos or (225960 if args.fivr200k else 1000)
    limits = {
        "queries": (10, args.videos),
        "videos": (20, 10**7),
        "sample": (1, 10**6),
        "minutes": (0.01, 1e6),
    }
    check_ranges(args, limits)
    return args


def main(argv=None):
    args = parse_args(argv)
    results = run_fivr200k(args) if args.fivr200k else compare_ways(args)
    if args.output:
        settings = {
            "queries": args.queries,
            "videos": args.videos,
            "threads": torch.get_num_threads(),
        }
        write_json(args.output, settings | results | provenance())


# --- timing -------------------------------------------------------------------------------------


def timed(function, *arguments, **options):
    """(seconds, result) of a call."""
    start = time.perf_counter()
    result = function(*arguments, **options)
    return time.perf_counter() - start, result


def measure_rate(dtype, seconds=3.0):
    """This machine's best rate, in operations per second, of products of the encoder's shapes."""
    a, b = torch.randn(4096, C).to(dtype), torch.randn(C, 2 * C).to(dtype)
    best, end = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        took, _ = timed(torch.matmul, a, b)
        best = max(best, 2 * a.shape[0] * a.shape[1] * b.shape[1] / took)
    return best


# --- the plain way ------------------------------------------------------------------------------


def measure_plain(encoder, store, queries, database, sample):
    """{row: seconds} of the whole, scaled from `sample` videos and ten queries with each."""
    rng = np.random.default_rng(1)
    videos = rng.choice(database, sample, replace=False)
    encode_plain(encoder, store[videos[0]])  # warm up
    encoding, encoded = timed(lambda: [encode_plain(encoder, store[video]) for video in videos])
    some_queries = rng.choice(queries, 10, replace=False)
    query_frames = [encode_plain(encoder, store[query])[0] for query in some_queries]
    first_video = encoded[0][1]

    def by_frames():
        for query in query_frames:
            for frames, _ in encoded:
                compare_plain(query, frames)

    def by_videos():
        for _ in query_frames:
            for _, video in encoded:
                float(first_video @ video)

    with torch.inference_mode():
        seconds = {"TCA_c": timed(by_videos)[0], "TCA_f": timed(by_frames)[0]}
    encode = encoding / sample * (len(queries) + len(database))
    pairs = len(queries) * len(database)
    return {row: encode + spent / (10 * sample) * pairs for row, spent in seconds.items()}


# --- ours ---------------------------------------------------------------------------------------


def normalised_frames(store, videos):
    frames = []
    for video in videos:
        rows = torch.from_numpy(store[video].astype(np.float32))
        frames.append(F.normalize(rows, dim=1).numpy())
    return frames


def measure_efficiency(encoder, store, queries, database, amp, peak):
    """The shares of the rate `peak` that encoding and chamfer reach, counting valid frames only."""
    video_encoder = VideoEncoder(encoder, store, PADDING_SIZE, amp=amp)
    batches = list(video_encoder.batches(database))[:: max(len(database) // 200, 1)]
    video_encoder(batches[0], ["video"])  # warm up
    seconds, _ = timed(lambda: [video_encoder(batch, ["video"]) for batch in batches])
    T = np.array([store.lengths[video] for batch in batches for video in batch], float)
    hidden = encoder.transformer_encoder.layers[0].linear1.out_features
    # Projections and feed-forward layers, then the products of frames with frames.
    operations = (T * 2 * (4 * C * C + 2 * C * hidden) + 4 * T * T * C).sum()
    encode = operations / seconds / peak

    dtype = amp or torch.float32
    query = pack_descriptors(normalised_frames(store, queries), "chamfer", dtype=dtype)
    target = pack_descriptors(normalised_frames(store, database[:200]), "chamfer", dtype=dtype)
    similarity_tables(query, target, ["chamfer"])  # warm up
    seconds, _ = timed(similarity_tables, query, target, ["chamfer"])
    chamfer = 2 * C * len(query.data) * len(target.data) / seconds / peak
    return {"encode": encode, "chamfer": chamfer}


def compare_ways(args):
    """Measure the plain way and ours; print and return the results."""
    rng, encoder = np.random.default_rng(0), TCA(C).eval()
    source = RandomStore(random_lengths(args.queries + args.videos, rng), rng, C)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        path = Path(folder) / "features.hdf5"
        write_store(path, source.lengths, source.__getitem__, np.float16, C, {})
        store = FeatureStore(path)
        queries, database = list(store)[: args.queries], list(store)[args.queries :]
        peaks = {name: measure_rate(amp or torch.float32) for name, amp in TYPES.items()}
        sample = min(args.sample, len(database))
        plain = measure_plain(encoder, store, queries, database, sample)
        sides = encoder, store, queries, database
        rows = []
        for name, amp in TYPES.items():
            efficiency = measure_efficiency(*sides, amp, peaks[name])
            for row, metric in ROWS.items():
                seconds, _ = timed(compare_collections, *sides, [metric], PADDING_SIZE, amp=amp)
                ratio = plain[row] / seconds
                rows.append({"row": row, "type": name, "seconds": seconds, "ratio": ratio})
                rows[-1] |= efficiency
    results = {
        "rate_gflops": {name: peak / 1e9 for name, peak in peaks.items()},
        "plain_seconds": plain,
        "rows": rows,
        "frames": sum(source.lengths.values()),
    }
    print(
        f"{args.queries} queries x {args.videos} videos, {results['frames']} frames,"
        f" {torch.get_num_threads()} threads; plain way scaled from {sample} videos"
    )
    print("row    type      plain s  ours s  ratio  products GFLOP/s  encoding  chamfer kernel")
    for row in rows:
        print(
            f"{row['row']}  {row['type']:8}  {plain[row['row']]:7.1f}  {row['seconds']:6.1f}"
            f"  {row['ratio']:4.1f}x  {results['rate_gflops'][row['type']]:16.0f}"
            f"  {row['encode']:8.0%}  {row['chamfer']:14.0%}"
        )
    return results


# --- FIVR-200K's size ---------------------------------------------------------------------------


def peak_gib():
    """Peak resident memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def measure_scaled(minutes, encoder, store, queries, database, metric, options):
    """(seconds for the whole database, videos measured): as many as `minutes` allow."""
    amount = 64
    while True:
        some = database[:amount]
        took, _ = timed(
            compare_collections, encoder, store, queries, some, [metric], PADDING_SIZE, **options
        )
        if took > 0.2 * 60 * minutes or amount == len(database):
            break
        growth = max(1.5, min(8, 0.7 * 60 * minutes / took))
        amount = min(int(amount * growth), len(database))
    measured = sum(store.lengths[video] for video in some)
    whole = sum(store.lengths[video] for video in database)
    return took / measured * whole, amount


def run_fivr200k(args):
    """Evaluate at FIVR-200K's size; print and return the results."""
    rng = np.random.default_rng(0)
    store = RandomStore(random_lengths(args.videos, rng), rng, C)
    database = list(store)
    queries = database[:: args.videos // args.queries][: args.queries]
    options = {"memory": args.memory}
    labels, others = {}, np.array(database)
    for query in queries:
        labels[query] = {
            label: rng.choice(others, 30).tolist() for label in ("ND", "DS", "CS", "IS")
        }
    evaluation_set = FIVR(queries, database, labels, "random")
    seconds, tables = timed(
        compare_collections, Mean(C), store, queries, database, ["cosine"], PADDING_SIZE, **options
    )
    scoring, _ = timed(evaluation_set.evaluate_table, queries, database, tables["cosine"])

    def row(name, seconds, videos):
        return {"row": name, "seconds": seconds, "videos": videos, "peak_gib": peak_gib()}

    rows = [row("mean, video level", seconds, len(database))]
    for name in args.amp:
        for tca, metric in ROWS.items():
            encoder = TCA(C).eval()
            amp = {"amp": TYPES[name]}
            seconds, amount = measure_scaled(
                args.minutes, encoder, store, queries, database, metric, options | amp
            )
            rows.append(row(f"{tca}, {name}", seconds, amount))
    results = {
        "frames": sum(store.lengths.values()),
        "memory_bound_gib": args.memory,
        "scoring_seconds": scoring,
        "rows": rows,
    }
    print(
        f"{len(queries)} queries x {len(database)} videos, {results['frames']} frames;"
        f" --memory {args.memory:g}; scoring the table: {scoring:.1f} s"
    )
    print("row                  measured videos  seconds of the whole  peak GiB so far")
    for line in rows:
        scaled = "" if line["videos"] == len(database) else " (scaled)"
        print(
            f"{line['row']:20}  {line['videos']:14}  {line['seconds']:11.0f}{scaled:9}"
            f"  {line['peak_gib']:15.2f}"
        )
    return results


if __name__ == "__main__":
    run_main(main)
