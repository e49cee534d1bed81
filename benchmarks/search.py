"""What a search costs at scale: FAISS indexes over made-up video descriptors, and the frame-level re-ranking after them.

    python benchmarks/search.py                       # 1,000,000 videos, about 8 minutes on two cores, 7 GB of memory
    python benchmarks/search.py --videos 20000        # to see that it runs

The descriptors are made up, but not at random in all directions, where no approximate index could work: 512 channels whose
variances fall as 1/i, as those of PCA do; a theme a thousand videos or so; in it works, each with copies (1 to 7, 4 on
average) at a cosine of about .8 from one another. Queries are further copies of random works.

recall@100: of the 100 that Flat finds, how many an index finds; copies: of a query's own copies, how many are in the first
100, which is what counts where frames are compared afterwards. An index is filled for at most --seconds: one that is slower
(HNSW, on few cores) holds fewer videos, its row says how many, and its recall is measured among those.
"""

import os
import sys
import tempfile
import time
from pathlib import Path

import faiss
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import utils
from distributed import run_main
from retrieval.similarity import similarity_table
from videoindex.index import METRIC, unit
from videoindex.nearest import trained
from videoindex.pipeline import EncodedVideo
from videoindex.store import Store

SIZE, FOUND, BLOCK = 512, 100, 16384
QUERIES, ALONE = 500, 50  # for recall, all at once; for the time of one
COPY = 0.5  # length of the noise that a copy adds to a work's unit descriptor: cosine of two copies 1 / (1 + .25)


def directions(draw, n):
    """(n, SIZE) float32 of about unit length, with the spectrum of PCA's outputs."""
    scale = 1 / np.sqrt(np.arange(1, SIZE + 1))
    return draw.standard_normal((n, SIZE), np.float32) * (scale / np.linalg.norm(scale)).astype(
        np.float32
    )


def make(videos, seed=0):
    """Descriptors (videos, SIZE), the work of each, and queries (QUERIES, SIZE) with theirs."""
    draw = np.random.default_rng(seed)
    works = max(1, videos // 4)
    themes = directions(draw, max(1, videos // 1000))
    theme = draw.integers(len(themes), size=works)
    sizes = draw.integers(1, 8, works).astype(float)
    work = np.sort(draw.choice(works, videos, p=sizes / sizes.sum()))
    centres = unit(0.7 * themes[theme] + directions(draw, works))
    data = np.empty((videos, SIZE), np.float32)
    for start in range(0, videos, BLOCK):
        some = work[start : start + BLOCK]
        data[start : start + BLOCK] = unit(centres[some] + COPY * directions(draw, len(some)))
    order = draw.permutation(videos)  # copies do not lie side by side
    asked = work[draw.integers(videos, size=QUERIES)]
    return data[order], work[order], unit(centres[asked] + COPY * directions(draw, QUERIES)), asked


def fill(kind, data, seconds):
    """An index of `kind` over as many of `data` as are in within `seconds`, training aside; (index, seconds it took)."""
    begin = time.perf_counter()
    index = trained(kind, data)
    filling = time.perf_counter()
    for start in range(0, len(data), BLOCK):
        index.add(data[start : start + BLOCK])
        if time.perf_counter() - filling > seconds:
            break
    return index, time.perf_counter() - begin


def nearest(data, queries):
    """The truth: row numbers (Q, FOUND) of the most similar, by exact search over `data` in blocks."""
    heap = faiss.ResultHeap(len(queries), FOUND, keep_max=True)
    for start in range(0, len(data), BLOCK):
        similarities = queries @ data[start : start + BLOCK].T
        best = np.argpartition(-similarities, min(FOUND, similarities.shape[1]) - 1)[:, :FOUND]
        heap.add_result(np.take_along_axis(similarities, best, 1), best.astype(np.int64) + start)
    heap.finalize()
    return heap.I


def bytes_of(index):
    """Bytes that an index takes when written."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "index"
        faiss.write_index(index, str(path))
        return path.stat().st_size


def measure(kind, data, work, queries, asked, seconds):
    index, built = fill(kind, data, seconds)
    n = index.ntotal
    truth = nearest(data[:n], queries)
    rows = index.search(queries, FOUND)[1]
    recall = np.mean([len(np.intersect1d(a, b)) for a, b in zip(rows, truth, strict=True)]) / min(
        FOUND, n
    )
    copies = [np.flatnonzero(work[:n] == one) for one in asked]
    found = [np.isin(own, row).mean() for own, row in zip(copies, rows, strict=True) if len(own)]
    begin = time.perf_counter()
    for query in queries[:ALONE]:
        index.search(query[None], FOUND)
    alone = (time.perf_counter() - begin) / ALONE
    return {
        "index": kind,
        "videos": n,
        "build_s": round(built, 1),
        "ms_per_query": round(1000 * alone, 2),
        "recall@100": round(float(recall), 4),
        "copies": round(float(np.mean(found)), 4),
        "bytes_per_video": round(bytes_of(index) / n, 1),
    }


def rerank(candidates, frames, metric, rounds=5):
    """Median seconds to compare one query with `candidates` videos of `frames` frames each, read from half precision."""
    draw = np.random.default_rng(1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "frames"
        stored = np.memmap(path, np.float16, "w+", shape=(candidates, frames, SIZE))
        for video in stored:
            video[:] = unit(directions(draw, frames))
        query, times = unit(directions(draw, frames)), []
        for _ in range(rounds):
            begin = time.perf_counter()
            similarity_table([query], [unit(video) for video in stored], metric)
            times.append(time.perf_counter() - begin)
    return float(np.median(times))


def growth(videos=2000, frames=20):
    """Milliseconds to add one video to an index, in the first and in the last quarter of `videos`, and bytes a frame."""
    draw, times = np.random.default_rng(2), []
    with tempfile.TemporaryDirectory() as folder:
        store = Store.create(Path(folder) / "index", SIZE, {})
        with store.writing():
            for i in range(videos):
                rows = unit(directions(draw, frames)).astype(np.float16)
                made = EncodedVideo(
                    Path(), "", frames, rows, rows[:1].astype(np.float32), [bytes(2700)] * frames
                )
                begin = time.perf_counter()
                store.put(f"{i:064}", made, [(f"/videos/{i}.mp4", 1, 1)])
                times.append(time.perf_counter() - begin)
        size = store.size() / (videos * frames)
    quarter = videos // 4
    first, last = (1000 * float(np.mean(part)) for part in (times[:quarter], times[-quarter:]))
    return {
        "videos": videos,
        "first_quarter_ms": round(first, 2),
        "last_quarter_ms": round(last, 2),
        "bytes_a_frame": round(size),
    }


def main():
    parser = utils.Parser(__doc__)
    add = parser.add_argument
    add("--videos", type=int, default=1_000_000, help="how many (default %(default)s)")
    add(
        "--types",
        nargs="+",
        default=["Flat", "HNSW32", "IVF1024,PQ64", "IVF1024,SQ8"],
        help="FAISS factory strings",
    )
    add(
        "--seconds",
        type=float,
        default=90,
        help="longest time to fill an index (default %(default)s)",
    )
    add(
        "--frames",
        type=int,
        default=60,
        help="frames of a video in the re-ranking (default %(default)s)",
    )
    add(
        "--metrics",
        nargs="+",
        default=list(dict.fromkeys(["chamfer", METRIC])),
        help="of the re-ranking",
    )
    add("--output", help="write the figures to this JSON file")
    args = parser.parse_args()
    utils.check_ranges(args, {"videos": (1000, 10**9), "frames": (1, 10**5)})
    threads = int(os.environ.get("OMP_NUM_THREADS", os.cpu_count()))
    faiss.omp_set_num_threads(threads)
    torch.set_num_threads(threads)
    data, work, queries, asked = make(args.videos)
    print(
        f"{args.videos} made-up videos of {SIZE} channels, {len(queries)} queries, {threads} threads"
    )
    rows = []
    for kind in args.types:
        rows.append(measure(kind, data, work, queries, asked, args.seconds))
        if len(rows) == 1:
            print("".join(f"{name:>16}" for name in rows[0]))
        print("".join(f"{value:>16}" for value in rows[-1].values()), flush=True)
    del data
    timings = {}
    for metric in args.metrics:
        for candidates in (100, 1000):
            timings[f"{metric}, {candidates}"] = round(
                1000 * rerank(candidates, args.frames, metric), 1
            )
            print(
                f"re-ranking {candidates} videos of {args.frames} frames by {metric}: {timings[f'{metric}, {candidates}']} ms"
            )
    grown = growth()
    print(
        f"adding {grown['videos']} videos: {grown['first_quarter_ms']} ms each in the first quarter,"
        f" {grown['last_quarter_ms']} ms in the last; {grown['bytes_a_frame']} bytes a frame, thumbnails of 2,700 included"
    )
    if args.output:
        figures = {
            "growth": grown,
            "indexes": rows,
            "rerank_ms": timings,
            "frames": args.frames,
            "threads": threads,
        }
        utils.write_json(args.output, figures | utils.provenance())


if __name__ == "__main__":
    run_main(main)
