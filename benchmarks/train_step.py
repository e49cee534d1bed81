"""One training step, data included: the plain recipe of the released code against train.py.

    python benchmarks/train_step.py --output train_step.json

Plain: one HDF5 dataset per video in float32, every video padded to 300 frames, all negatives of all
anchors in one batch, the bank copied, Adam as it comes. Ours: train.py run as users run it, on a
packed half-precision store, in float32 and with --amp bfloat16.

The lengths of the made-up videos are log-normal (median 60 s, 5 % above 300 s). Every side runs in
a process of its own, on the same draws, with one process that loads data; the first step is not
timed. Memory is the peak of each of the two processes as Linux counts it: what they share, such as
the libraries, is in both. With dropout 0 the losses must be equal (exit status 1 if they are not).
"""

import argparse
import json
import math
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.made_up import LONG, make_videos
from benchmarks.released import PlainStore, PlainTraining, pad_all
from data import VCDBPairDataset
from distributed import run_main
from files import write_json
from training_log import read_log
from utils import InputError, Parser, check_ranges, provenance, seed_torch, seeded_rng

SIDES = {"plain": None, "ours": [], "ours, bfloat16": ["--amp", "bfloat16"]}  # flags of train.py
NEGATIVES = 16  # of an anchor


# --- the plain recipe ---------------------------------------------------------------------------


def run_plain(args):
    """Train by the plain recipe in this process, and print what `measure` returns as JSON."""
    training = PlainTraining(args.channels, args.dropout, args.bank)
    store = PlainStore(args.folder / "plain.hdf5")
    data = VCDBPairDataset(
        args.folder / "pairs.pickle", store, padding_size=LONG, neg_num=NEGATIVES
    )
    order = seeded_rng(0, 0).permutation(len(data)).tolist()  # of train.py's first epoch
    batches = [order[i : i + args.anchors] for i in range(0, len(order), args.anchors)]
    loader = iter(DataLoader(data, batch_sampler=batches, collate_fn=pad_all, num_workers=1))
    losses, seconds, waits = [], [], []
    for number in range(args.steps + 1):
        start = time.perf_counter()
        batch = next(loader)
        waits.append(time.perf_counter() - start)
        seed_torch(0, number)
        losses.append(training.step(*training.to_device(batch)))
        seconds.append(time.perf_counter() - start)
    (worker,) = multiprocessing.active_children()
    print(json.dumps(summary(losses, seconds, waits, os.getpid(), worker.pid)))


# --- measuring ----------------------------------------------------------------------------------


def measure(args, side, dropout):
    """Losses, seconds of each step after the first, share of them spent waiting, peak memory."""
    if SIDES[side] is None:
        return measure_plain(args, dropout)
    return measure_ours(args, dropout, SIDES[side])


def measure_plain(args, dropout):
    command = [sys.executable, __file__, "--folder", args.folder, "--dropout", dropout]
    for name in ("channels", "videos", "anchors", "bank", "steps"):
        command += [f"--{name}", getattr(args, name)]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if result.returncode:
        raise InputError(f"the plain side failed: {last_line(result.stderr)}")
    return json.loads(result.stdout.splitlines()[-1])


def measure_ours(args, dropout, flags):
    """Run train.py until its log has the steps, read its memory, and stop it."""
    with tempfile.TemporaryDirectory(dir=args.folder) as run:
        command = [sys.executable, ROOT / "train.py", "--model_path", run, *flags]
        command += ["--annotation_path", args.folder / "pairs.pickle"]
        command += ["--feature_path", args.folder / "packed.hdf5"]
        command += ["--batch_sz", args.anchors, "--neg_num", NEGATIVES, "--moco_k", args.bank]
        command += ["--dropout", dropout, "--num_workers", 1, "--device", "cpu"]
        command += ["--print-freq", 1, "--epochs", 1]
        with open(Path(run) / "stderr", "w+", encoding="utf-8") as stderr:
            process = subprocess.Popen(
                list(map(str, command)), stdout=subprocess.DEVNULL, stderr=stderr
            )
            try:
                lines = wait_for_lines(process, run, args.steps + 1)
                if lines is None:
                    stderr.seek(0)
                    raise InputError(f"train.py failed: {last_line(stderr.read())}")
                children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
                (worker,) = children.read_text().split()
                videos = args.anchors * (2 + NEGATIVES)
                seconds = [videos / line["videos_per_s"] for line in lines]
                waits = [line["data_wait"] * s for line, s in zip(lines, seconds, strict=True)]
                losses = [line["loss"] for line in lines]
                return summary(losses, seconds, waits, process.pid, worker)
            finally:
                process.terminate()
                process.wait()


def wait_for_lines(process, run, count):
    """The first `count` lines of a run's log, or None when the process ends before."""
    while process.poll() is None:
        try:
            lines = read_log(run)
        except InputError:  # nothing is logged yet
            lines = []
        if len(lines) >= count:
            return lines[:count]
        time.sleep(0.05)
    return None


def summary(losses, seconds, waits, pid, worker):
    return {
        "losses": losses,
        "seconds": seconds[1:],
        "waiting": sum(waits[1:]) / sum(seconds[1:]),
        "memory_mb": peak_mb(pid),
        "loader_memory_mb": peak_mb(worker),
    }


def peak_mb(pid):
    """Peak memory of a running process. (A child's `ru_maxrss` would start at its parent's.)"""
    status = Path(f"/proc/{pid}/status").read_text()
    return round(int(status.partition("VmHWM:")[2].split()[0]) / 1024)


def last_line(text):
    return (text.strip().splitlines() or ["it printed nothing"])[-1]


def compare(sides):
    """Add median, ratio to plain and, with equal draws, the relative difference of the losses."""
    plain = sides["plain"]
    for measured in sides.values():
        measured["seconds_median"] = float(np.median(measured["seconds"]))
        plain_median = float(np.median(plain["seconds"]))
        measured["ratio"] = plain_median / measured["seconds_median"]
        pairs = zip(measured["losses"], plain["losses"], strict=True)
        measured["loss_difference"] = max(abs(a - b) / abs(b) for a, b in pairs)


def print_table(by_dropout):
    print(
        f"{'dropout':>7}  {'side':14}  {'s a step':>8}  {'ratio':>5}  {'memory MB':>9}"
        f"  {'loader MB':>9}  {'waiting':>7}  loss differs by"
    )
    for dropout, sides in by_dropout.items():
        for side, row in sides.items():
            difference = row["loss_difference"]
            differs = "(other draws)" if difference is None else f"{difference:.1e}"
            print(
                f"{dropout:7}  {side:14}  {row['seconds_median']:8.2f}  {row['ratio']:5.1f}"
                f"  {row['memory_mb']:9}  {row['loader_memory_mb']:9}  {row['waiting']:7.1%}"
                f"  {differs}"
            )


def parse_args(argv):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--channels", type=int, default=1024, help="of a frame feature (default 1024)")
    add("--videos", type=int, default=600, help="in the files (default 600)")
    add("--anchors", type=int, default=4, help="of a step (default 4)")
    add("--bank", type=int, default=4096, help="entries (default 4096)")
    add("--steps", type=int, default=3, help="timed, after one that is not (default 3)")
    add("--dropout", type=float, nargs="+", default=[0.0, 0.2], help="(default 0 and .2)")
    add("--output", help="JSON file for the measurements")
    add("--folder", type=Path, help=argparse.SUPPRESS)  # given to the process of the plain side
    args = parser.parse_args(argv)
    least = {"channels": 8, "videos": 2, "anchors": 1, "bank": 1, "steps": 1}
    check_ranges(args, {name: (low, math.inf) for name, low in least.items()})
    needed = 2 * (args.steps + 4) * args.anchors + NEGATIVES
    if args.videos < needed:
        raise InputError(f"--videos {args.videos} is too few for the pairs; give {needed} or more")
    return args


def main(argv=None):
    args = parse_args(argv)
    if args.folder:
        args.dropout = args.dropout[0]
        return run_plain(args)
    by_dropout = {}
    with tempfile.TemporaryDirectory() as folder:
        args.folder = Path(folder)
        make_videos(args.folder, args)
        for dropout in args.dropout:
            sides = {side: measure(args, side, dropout) for side in SIDES}
            compare(sides)
            if dropout:  # the sides draw differently
                for measured in sides.values():
                    measured["loss_difference"] = None
            by_dropout[dropout] = sides
    print_table(by_dropout)
    if args.output:
        names = ("channels", "videos", "anchors", "bank", "steps")
        settings = {name: getattr(args, name) for name in names}
        settings["threads"] = torch.get_num_threads()
        record = {"settings": settings, "by_dropout": by_dropout, **provenance()}
        write_json(args.output, record)
    if 0.0 in by_dropout:
        return int(by_dropout[0.0]["ours"]["loss_difference"] > 1e-4)


if __name__ == "__main__":
    run_main(main)
