"""What a search costs at scale: FAISS indexes over synthetic descriptors, then frame-level scores.

    python benchmarks/search.py                   # 1,000,000 videos: 8 minutes on two cores, 7 GB
    python benchmarks/search.py --videos 20000    # to see that it runs

The descriptors are synthetic, but not random in all directions: no approximate index could work on
those. They have 512 channels whose variances fall as 1/i, as those of PCA do. Every thousand videos
or so have a theme, a theme has works, and a work has 1 to 7 copies (4 on average) at a cosine of
about .8 from one another. Queries are further copies of random works.

Printed for each index type:

build_s        seconds to train and fill it. Filling stops after --seconds: a slower index (HNSW on
               few cores) holds fewer videos, and is measured on those
ms_per_query   of one query alone
recall@100     of the 100 videos that exact search finds, the share that this index finds
copies         of a query's own copies, the share among the first 100 videos. This is what counts
               if frames are compared afterwards
"""

import os
import sys
import tempfile
import time
from fractions import Fraction
from pathlib import Path

import faiss
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from clips import make_clips, seconds_of_backbone

import utils
from distributed import run_main
from features.decoding import Video
from features.extraction import default_parallelism, extract, feature_function
from files import write_json
from retrieval.compare import MEMORY
from videoindex.comparison import Comparer, l2_normalise
from videoindex.index import VideoIndex
from videoindex.nearest import trained_index
from videoindex.pipeline import EncodedVideo, Pipeline
from videoindex.store import FileEntry, IndexStore

SIZE = 512  # of a descriptor
TOP = 100  # results of a query
BLOCK = 16384  # rows handled at a time
QUERIES, TIMED_QUERIES = 500, 50  # for recall, all at once; for the time of one
# The length of the noise that a copy adds to its work's unit descriptor. The cosine of two copies
# is 1 / (1 + .25).
COPY_NOISE = 0.5
JPEG = bytes(2700)  # a thumbnail
FILM = Path(__file__).resolve().parents[1] / "datasets" / "demo" / "film.mp4"
CLIP_SECONDS, CLIP_SIZE = 5, (640, 360)  # of the clips that are indexed
CALIBRATION = {"min_similarity": 0.15, "threshold": 0.3}


def main(argv=None):
    args = parse_args(argv)
    utils.tune_malloc()  # as search.py does
    threads = int(os.environ.get("OMP_NUM_THREADS", utils.available_cores()))
    faiss.omp_set_num_threads(threads)
    torch.set_num_threads(threads)
    indexes = measure_indexes(args, threads)
    rerank_times = measure_reranking(args)
    growth = measure_growth()
    indexing = measure_indexing(args)
    if args.output:
        results = {
            "indexing": indexing,
            "growth": growth,
            "indexes": indexes,
            "rerank_ms": rerank_times,
            "frames": args.frames,
            "threads": threads,
        }
        write_json(args.output, results | utils.provenance())


def parse_args(argv=None):
    parser = utils.Parser(__doc__)
    add = parser.add_argument
    add("--videos", type=int, default=1_000_000, help="how many (default %(default)s)")
    types = ["Flat", "HNSW32", "IVF1024,PQ64", "IVF1024,SQ8"]
    add("--types", nargs="+", default=types, help="FAISS factory strings")
    add(
        "--seconds",
        type=float,
        default=90,
        help="the longest time to fill an index (default %(default)s)",
    )
    add(
        "--frames",
        type=int,
        default=60,
        help="frames of a video in the re-ranking (default %(default)s)",
    )
    add("--clips", type=int, default=60, help="that are indexed (default %(default)s)")
    add("--output", help="write the results to this JSON file")
    args = parser.parse_args(argv)
    utils.check_ranges(args, {"videos": (1000, 10**9), "frames": (1, 10**5), "clips": (2, 10**5)})
    return args


# --- data ---------------------------------------------------------------------------------------


def directions(rng, n):
    """(n, SIZE) float32 of about unit length, with the spectrum of PCA's outputs."""
    scale = 1 / np.sqrt(np.arange(1, SIZE + 1))
    scale = (scale / np.linalg.norm(scale)).astype(np.float32)
    return rng.standard_normal((n, SIZE), np.float32) * scale


def make_data(videos, seed=0):
    """Descriptors (videos, SIZE) and the work of each; queries (QUERIES, SIZE) and theirs."""
    rng = np.random.default_rng(seed)
    num_works = max(1, videos // 4)
    themes = directions(rng, max(1, videos // 1000))
    theme_of = rng.integers(len(themes), size=num_works)
    sizes = rng.integers(1, 8, num_works).astype(float)
    work_of = np.sort(rng.choice(num_works, videos, p=sizes / sizes.sum()))
    works = l2_normalise(0.7 * themes[theme_of] + directions(rng, num_works))
    data = np.empty((videos, SIZE), np.float32)
    for start in range(0, videos, BLOCK):
        block = work_of[start : start + BLOCK]
        noise = COPY_NOISE * directions(rng, len(block))
        data[start : start + BLOCK] = l2_normalise(works[block] + noise)
    order = rng.permutation(videos)  # copies do not lie side by side
    query_work = work_of[rng.integers(videos, size=QUERIES)]
    queries = l2_normalise(works[query_work] + COPY_NOISE * directions(rng, QUERIES))
    return data[order], work_of[order], queries, query_work


# --- indexes ------------------------------------------------------------------------------------


def measure_indexes(args, threads):
    """Measure every type, and print a row for each."""
    data, work_of, queries, query_work = make_data(args.videos)
    print(
        f"{args.videos} made-up videos of {SIZE} channels, {len(queries)} queries,"
        f" {threads} threads"
    )
    rows = []
    for index_type in args.types:
        row = measure_index(index_type, data, work_of, queries, query_work, args.seconds)
        if not rows:
            print("".join(f"{name:>16}" for name in row))
        print("".join(f"{value:>16}" for value in row.values()), flush=True)
        rows.append(row)
    return rows


def measure_index(index_type, data, work_of, queries, query_work, seconds):
    index, build_time = fill_index(index_type, data, seconds)
    n = index.ntotal
    exact = exact_search(data[:n], queries)  # (Q, TOP)
    rows = index.search(queries, TOP)[1]  # (Q, TOP)
    num_found, copies_found = [], []
    for query_rows, exact_rows, work in zip(rows, exact, query_work, strict=True):
        num_found.append(len(np.intersect1d(query_rows, exact_rows)))
        copies = np.flatnonzero(work_of[:n] == work)
        if len(copies):
            copies_found.append(np.isin(copies, query_rows).mean())

    begin = time.perf_counter()
    for query in queries[:TIMED_QUERIES]:
        index.search(query[None], TOP)
    query_time = (time.perf_counter() - begin) / TIMED_QUERIES
    return {
        "index": index_type,
        "videos": n,
        "build_s": round(build_time, 1),
        "ms_per_query": round(1000 * query_time, 2),
        "recall@100": round(float(np.mean(num_found) / min(TOP, n)), 4),
        "copies": round(float(np.mean(copies_found)), 4),
        "bytes_per_video": round(stored_bytes(index) / n, 1),
    }


def fill_index(index_type, data, seconds):
    """Train an index and add rows until `seconds` have passed; returns it and the time in all."""
    begin = time.perf_counter()
    index = trained_index(index_type, data)
    trained = time.perf_counter()
    for start in range(0, len(data), BLOCK):
        index.add(data[start : start + BLOCK])
        if time.perf_counter() - trained > seconds:
            break
    return index, time.perf_counter() - begin


def exact_search(data, queries):
    """The rows (Q, TOP) of `data` most similar to each query, by products in blocks."""
    heap = faiss.ResultHeap(len(queries), TOP, keep_max=True)
    for start in range(0, len(data), BLOCK):
        similarities = queries @ data[start : start + BLOCK].T  # (Q, block)
        k = min(TOP, similarities.shape[1])
        best = np.argpartition(-similarities, k - 1)[:, :TOP]
        heap.add_result(np.take_along_axis(similarities, best, 1), best.astype(np.int64) + start)
    heap.finalize()
    return heap.I


def stored_bytes(index):
    """The size of the file that an index is written to."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "index"
        faiss.write_index(index, str(path))
        return path.stat().st_size


# --- re-ranking ---------------------------------------------------------------------------------


def measure_reranking(args):
    """{candidates: milliseconds} to compare a clip's frames with so many videos of a store."""
    times = {}
    for candidates in (100, 1000):
        times[candidates] = round(1000 * rerank_time(candidates, args.frames), 1)
        print(f"comparing {candidates} videos of {args.frames} frames: {times[candidates]} ms")
    return times


def rerank_time(candidates, num_frames, rounds=5):
    """The median seconds of a comparison; ten of the videos are copies."""
    rng = np.random.default_rng(1)
    with tempfile.TemporaryDirectory() as folder:
        store = IndexStore.create(Path(folder) / "index", SIZE, {})
        query = l2_normalise(directions(rng, num_frames))
        with store.writing():
            for i in range(candidates):
                rows = l2_normalise(directions(rng, num_frames))
                if i < 10:
                    rows = l2_normalise(query + COPY_NOISE * rows)
                store.add_content(f"{i:064}", synthetic_video(rows), [FileEntry(f"/{i}", 1, 1)])
        comparer = Comparer(store, Fraction(1), CALIBRATION, MEMORY * 2**30)
        frames = comparer.frames_of_clip(synthetic_video(query))
        contents = list(store.contents())
        times = []
        for _ in range(rounds):
            begin = time.perf_counter()
            found = comparer.compare(frames, contents, CALIBRATION["threshold"], count=10)
            times.append(time.perf_counter() - begin)
        assert len(found) >= 10
    return float(np.median(times))


def synthetic_video(rows):
    return EncodedVideo(
        path=Path(),
        seconds=len(rows),
        frame_descriptors=rows.astype(np.float16),
        window_descriptors=rows[:1],
        thumbnails=[JPEG] * len(rows),
    )


# --- growth -------------------------------------------------------------------------------------


def measure_growth(videos=2000, frames=20):
    """The time to add one video to an index, in the first and the last quarter; bytes a frame."""
    rng, times = np.random.default_rng(2), []
    with tempfile.TemporaryDirectory() as folder:
        store = IndexStore.create(Path(folder) / "index", SIZE, {})
        with store.writing():
            for i in range(videos):
                video = synthetic_video(l2_normalise(directions(rng, frames)))
                begin = time.perf_counter()
                store.add_content(f"{i:064}", video, [FileEntry(f"/videos/{i}.mp4", 1, 1)])
                times.append(1000 * (time.perf_counter() - begin))
        frame_bytes = store.disk_bytes() / (videos * frames)
    quarter = videos // 4
    growth = {
        "videos": videos,
        "first_quarter_ms": round(float(np.mean(times[:quarter])), 2),
        "last_quarter_ms": round(float(np.mean(times[-quarter:])), 2),
        "bytes_a_frame": round(frame_bytes),
    }
    print(
        f"adding {videos} videos: {growth['first_quarter_ms']} ms each in the first quarter,"
        f" {growth['last_quarter_ms']} ms in the last; {growth['bytes_a_frame']} bytes a frame,"
        f" thumbnails of {len(JPEG):,} included"
    )
    return growth


# --- indexing -----------------------------------------------------------------------------------


def measure_indexing(args, rounds=3):
    """Frames a second of the backbone alone, of extraction, and of an index that is filled."""
    pipeline = Pipeline()
    features = feature_function(pipeline.backbone, pipeline.options["pooling"], None, np.float16)
    parallelism = default_parallelism(pipeline.device, pipeline.workers)
    view, kept = pipeline.backbone.view, args.clips * CLIP_SECONDS
    seconds = {"backbone": [], "extraction": [], "index": []}
    with tempfile.TemporaryDirectory() as folder:
        clips = make_clips(Path(folder) / "clips", FILM, args.clips, CLIP_SECONDS, CLIP_SIZE)
        videos = [Video(str(path), path) for path in clips]
        settings = parallelism | {"workers": pipeline.workers, "view": view}
        for i in range(rounds + 1):
            seconds["backbone"].append(seconds_of_backbone(features, kept, view, **parallelism))
            begin = time.perf_counter()
            assert all(not video.reason for video in extract(videos, features, **settings))
            seconds["extraction"].append(time.perf_counter() - begin)
            begin = time.perf_counter()
            VideoIndex(Path(folder) / f"{i}.index", pipeline=pipeline).add([clips[0].parent])
            seconds["index"].append(time.perf_counter() - begin)
    rates = {way: round(kept / min(times[1:]), 1) for way, times in seconds.items()}
    print(f"frames a second, {args.clips} clips: {rates}")
    return rates


if __name__ == "__main__":
    run_main(main)
