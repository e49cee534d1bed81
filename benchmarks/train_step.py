"""One training step, data included: the plain recipe of the released code against train.py's.

    python benchmarks/train_step.py --output train_step.json

Plain: one HDF5 dataset a video in float32, every video padded to 300 frames, all 16 negatives of all anchors in one batch, the
bank copied, Adam as it comes. Ours: train.py itself, on a packed half-precision store; and the same with --amp bfloat16.
Videos of C channels have log-normal lengths (median 60 s, 5 % above 300). Every side runs in a process of its own, on the same
draws, with a process that loads data beside it; the first step is not timed. Memory is the most that each of the two processes
held at once, as Linux counts: what they share, such as the libraries, is in both. With dropout off the losses must be equal.
"""

import argparse
import json
import math
import multiprocessing
import os
import pickle
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import h5py
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data import VCDBPairDataset
from distributed import Distributed
from features.store import StoreWriter
from losses import circle
from train import Trainer, parse, settle
from utils import provenance, seed_torch, seeded_rng, write_json

SIDES = {"plain": [], "ours": [], "ours, bfloat16": ["--amp", "bfloat16"]}
MEDIAN, LONG, PART = 60, 300, 0.05  # seconds; 5 % of the videos are longer than 300


def make_videos(folder, channels, videos, pairs):
    """The same random videos in both layouts, and an annotation of VCDB's form."""
    draw = np.random.default_rng(0)
    sigma = math.log(LONG / MEDIAN) / 1.6449  # the normal distribution's 95th percentile
    lengths = np.clip(draw.lognormal(math.log(MEDIAN), sigma, videos).round(), 2, 1500).astype(int)
    names = [f"v{i:05}" for i in range(videos)]
    with (
        StoreWriter(folder / "packed.hdf5") as packed,
        h5py.File(folder / "plain.hdf5", "w") as plain,
    ):
        for name, T in zip(names, lengths, strict=True):
            frames = draw.standard_normal((T, channels), np.float32) + draw.standard_normal(
                (1, channels), np.float32
            )
            frames = (frames / np.linalg.norm(frames, axis=1, keepdims=True)).astype(np.float16)
            packed.add(name, frames)
            plain[name] = frames.astype(np.float32)
    annotation = {
        "video_pairs": [{"videos": [names[2 * i], names[2 * i + 1]]} for i in range(pairs)],
        "negs": names[2 * pairs :],
    }
    (folder / "pairs.pickle").write_bytes(pickle.dumps(annotation))


# --- the plain recipe ------------------------------------------------------------------------------------------------


class PlainStore(dict):
    """Video id -> (T, C), read from one HDF5 dataset a video; opened by the process that reads."""

    file = None

    def __init__(self, path):
        self.path = path
        with h5py.File(path) as file:
            super().__init__(dict.fromkeys(file))

    def __getitem__(self, video):
        self.file = self.file or h5py.File(self.path)
        return self.file[video][:]


def pad_all(items):
    """Every video padded to 300 frames: (indices, and for anchors, positives, negatives x (N, 300, C) and a padding mask)."""
    indices, anchors, positives, _, negatives = zip(*items, strict=True)
    out = [list(indices)]
    for side in (anchors, positives, [video for group in negatives for video in group]):
        x, mask = (
            torch.zeros(len(side), LONG, side[0].shape[1]),
            torch.ones(len(side), LONG, dtype=torch.bool),
        )
        for i, video in enumerate(side):
            x[i, : len(video)] = torch.from_numpy(video)
            mask[i, : len(video)] = False
        out.append((x, mask))
    return out


class PlainModel(nn.Module):
    """An encoder layer, a masked mean, L2."""

    def __init__(self, channels, dropout):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(channels, 8, 2048, dropout, batch_first=True)

    def forward(self, x, mask):
        out = self.layer(x, src_key_padding_mask=mask).masked_fill(mask[..., None], 0)
        return F.normalize(out.sum(1) / (~mask).sum(1, keepdim=True), dim=1)


def plain_steps(args):
    """The batches of our first epoch, and the function that takes a step on one; from our weights and bank."""
    query, key = PlainModel(args.channels, args.dropout), PlainModel(args.channels, args.dropout)
    weights, queue = torch.load(args.folder / "start.pt")
    query.layer.load_state_dict(
        {name.removeprefix("transformer_encoder.layers.0."): w for name, w in weights.items()}
    )
    pointer = 0
    optimizer = torch.optim.Adam(query.parameters(), 1e-5, weight_decay=1e-4)
    data = VCDBPairDataset(
        args.folder / "pairs.pickle", PlainStore(args.folder / "plain.hdf5"), LONG, 16
    )
    order = seeded_rng(0, 0).permutation(len(data)).tolist()
    batches = [order[i : i + args.anchors] for i in range(0, len(order), args.anchors)]

    def step(batch, number):
        nonlocal pointer
        _, anchors, positives, negatives = batch
        seed_torch(0, number)
        q = query(*anchors)
        with torch.no_grad():
            for one, other in zip(key.parameters(), query.parameters(), strict=True):
                one.data = one.data * 0.0 + other.data * 1.0
            p, n = key(*positives), key(*negatives)
        logits = torch.cat([(q * p).sum(1, keepdim=True), q @ queue.clone()], 1)
        loss = circle(logits, torch.zeros(len(q), dtype=torch.long))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        queue[:, pointer : pointer + len(n)] = n.T
        pointer = (pointer + len(n)) % queue.shape[1]
        return loss.item()

    return DataLoader(data, batch_sampler=batches, collate_fn=pad_all, num_workers=1), step


# --- one side, in its own process ------------------------------------------------------------------------------------


def trainer(args, dropout, *more):
    flags = [
        "--annotation_path", args.folder / "pairs.pickle", "--feature_path", args.folder / "packed.hdf5",
        "--model_path", "none",
        "--batch_sz", args.anchors, "--moco_k", args.bank, "--dropout", dropout, "--num_workers", 1, "--device", "cpu",
    ]  # fmt: skip
    parsed = parse("", list(map(str, [*flags, *more])))
    settle(parsed, Distributed())
    return Trainer(parsed)


def peak_mb(pid):
    """The most memory that a process held; its children's `ru_maxrss` would begin at that of the process they come from."""
    status = Path(f"/proc/{pid}/status").read_text()
    return round(int(status.partition("VmHWM:")[2].split()[0]) / 1024)


def run_side(args):
    """Losses, seconds of each step, the part of them spent waiting for data, and peak memory; printed as JSON."""
    if args.side == "plain":
        batches, step = plain_steps(args)
    else:
        ours = trainer(args, args.dropout, *SIDES[args.side])
        batches = ours.batches()

        def step(batch, number):
            return ours.train_step(batch)[0].item()

    losses, seconds, waited, start = [], [], [], time.perf_counter()
    batches = iter(batches)  # held, so that its process is there to be asked at the end
    for number, batch in zip(range(args.steps + 1), batches, strict=False):
        waited.append(time.perf_counter() - start)
        losses.append(step(batch, number))
        seconds.append(time.perf_counter() - start)
        start = time.perf_counter()
    (loader,) = multiprocessing.active_children()
    print(json.dumps({
        "losses": losses, "seconds": seconds[1:], "waiting": sum(waited[1:]) / sum(seconds[1:]),
        "memory_mb": peak_mb(os.getpid()), "loader_memory_mb": peak_mb(loader.pid),
    }))  # fmt: skip


def measure(args, side, dropout):
    command = [
        sys.executable,
        __file__,
        "--side",
        side,
        "--dropout",
        dropout,
        "--folder",
        args.folder,
    ]
    for name in ("channels", "videos", "anchors", "bank", "steps"):
        command += [f"--{name}", getattr(args, name)]
    result = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if result.returncode:
        sys.exit(result.stderr)
    return json.loads(result.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default, note in (
        ("channels", 1024, "of a frame feature"), ("videos", 600, "in the files"), ("anchors", 4, "of a step"),
        ("bank", 4096, "entries"), ("steps", 3, "timed, after one that is not"),
    ):  # fmt: skip
        parser.add_argument(
            f"--{name}", type=int, default=default, help=f"{note} (default %(default)s)"
        )
    parser.add_argument(
        "--dropout", type=float, nargs="+", default=[0.0, 0.2], help="(default 0 and .2)"
    )
    parser.add_argument("--output", help="JSON file for the figures")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        args.dropout = args.dropout[0]
        return run_side(args)
    with tempfile.TemporaryDirectory() as folder:
        args.folder = Path(folder)
        make_videos(
            args.folder,
            args.channels,
            args.videos,
            max(2 * args.anchors, (args.steps + 4) * args.anchors),
        )
        model = trainer(args, 0).model
        torch.save((model.encoder_q.state_dict(), model.queue), args.folder / "start.pt")
        rows = {
            dropout: {side: measure(args, side, dropout) for side in SIDES}
            for dropout in args.dropout
        }
    print(
        f"{'dropout':>7}  {'side':14}  {'s a step':>8}  {'ratio':>5}  {'memory MB':>9}  {'loader MB':>9}  {'waiting':>7}"
        "  loss differs by"
    )
    for dropout, sides in rows.items():
        plain = sides["plain"]
        for side, found in sides.items():
            found["seconds_median"] = float(np.median(found["seconds"]))
            found["ratio"] = plain["seconds_median"] / found["seconds_median"]
            pairs = zip(found["losses"], plain["losses"], strict=True)
            found["loss_difference"] = (
                max(abs(a - b) / abs(b) for a, b in pairs) if not dropout else None
            )
            differs = f"{found['loss_difference']:.1e}" if not dropout else "(other draws)"
            print(
                f"{dropout:7}  {side:14}  {found['seconds_median']:8.2f}  {found['ratio']:5.1f}  {found['memory_mb']:9}"
                f"  {found['loader_memory_mb']:9}  {found['waiting']:7.1%}  {differs}"
            )
    if args.output:
        settings = {
            name: getattr(args, name) for name in ("channels", "videos", "anchors", "bank", "steps")
        }
        threads = {"threads": torch.get_num_threads()}
        write_json(
            args.output, {"settings": settings | threads, "by_dropout": rows, **provenance()}
        )
    equal = rows.get(0.0, {}).get("ours", {}).get("loss_difference", 0.0)
    return int(equal > 1e-4)


if __name__ == "__main__":
    sys.exit(main())
