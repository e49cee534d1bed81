"""A run's batches of training pairs: which pairs each process reads, and the processes that read.

A step takes one slice of the epoch's shuffle, and each process its part of the slice.
"""

import gc
import signal
from collections.abc import Iterator
from itertools import islice

import numpy as np
import torch
from torch.utils.data import DataLoader

from data import PairDataset, PairKey
from distributed import Distributed
from padding import pack
from processes import STOP_SIGNALS, end_with_parent
from utils import seeded_rng


def batch_indices(
    data: PairDataset, batch_size: int, dist: Distributed, epoch: int, seen: int = 0
) -> list[list[int]]:
    """This process's batches of an epoch's shuffle: lists of pair indices.

    A step takes one slice of the shuffle, and each process its part of the slice. The shuffle's
    tail that does not fill a step is left out. seen: pairs that all processes have seen before.
    """
    order = seeded_rng(data.seed, epoch).permutation(len(data)).tolist()
    step_size = batch_size * dist.world_size
    batches = []
    for start in range(seen, len(order) - step_size + 1, step_size):
        own = start + dist.rank * batch_size  # this process's part of the slice
        batches.append(order[own : own + batch_size])
    return batches


class KeySampler:
    """Batches of this process's keys, epoch by epoch: the batch sampler of `PairLoader`.

    Each iteration goes through `epochs`, of the first of which `seen` pairs are left out.
    """

    def __init__(self, data: PairDataset, batch_size: int, dist: Distributed):
        self.data, self.batch_size, self.dist = data, batch_size, dist
        self.epochs, self.seen = range(0), 0

    def indices(self, epoch: int, seen: int) -> list[list[int]]:
        return batch_indices(self.data, self.batch_size, self.dist, epoch, seen)

    def __iter__(self) -> Iterator[list[PairKey]]:
        seen = self.seen
        for epoch in self.epochs:
            for batch in self.indices(epoch, seen):
                yield [self.data.key(i, epoch) for i in batch]
            seen = 0


class PairLoader:
    """This process's batches, epoch by epoch, as `collate_pairs` gives them.

    The worker processes live as long as the loader. They read ahead into the next epoch, unless its
    hard negatives are not known yet. Use it in a `with` statement, which ends them.

    Args:
        epochs: of the whole run.
    """

    def __init__(
        self,
        data: PairDataset,
        batch_size: int,
        dist: Distributed,
        epochs: int,
        num_workers: int = 0,
        pin_memory: bool = False,
    ):
        self.data, self.epochs = data, epochs
        self.sampler = KeySampler(data, batch_size, dist)
        self.loader = DataLoader(
            data,
            batch_sampler=self.sampler,
            collate_fn=collate_pairs,
            num_workers=num_workers,
            pin_memory=pin_memory,
            worker_init_fn=start_worker,
            persistent_workers=num_workers > 0,
        )
        self.batches = None

    def epoch(self, epoch: int, seen: int = 0) -> Iterator[tuple]:
        """The batches of an epoch, of which all processes have seen `seen` pairs before.

        Call it for one epoch after another, and read all batches of each.
        """
        reads_ahead = self.data.hard_negatives is None
        if self.batches is None or not reads_ahead:
            last = self.epochs if reads_ahead else epoch + 1
            self.sampler.epochs, self.sampler.seen = range(epoch, last), seen
            if self.loader.num_workers:
                gc.collect()  # or a forked worker frees what has threads in this process, and hangs
            self.batches = iter(self.loader)
        return islice(self.batches, len(self.sampler.indices(epoch, seen)))

    def __enter__(self) -> "PairLoader":
        return self

    def __exit__(self, *_):
        # Workers ignore the SIGTERM by which Python would end them.
        if self.loader.num_workers and self.batches is not None:
            self.batches._shutdown_workers()


def collate_pairs(items: list[tuple]) -> tuple:
    """Join a batch's N items.

    Returns (indices, anchors, positives, negatives, negative_ids (N*M,)). Anchors, positives and
    the N*M negatives are packed: frames (sum T, C) and num_frames.
    """
    indices, anchors, positives, negative_ids, negatives = zip(*items, strict=True)
    negatives = [video for group in negatives for video in group]
    negative_ids = torch.from_numpy(np.concatenate(negative_ids))
    return list(indices), pack(anchors), pack(positives), pack(negatives), negative_ids


def start_worker(_):
    """A worker ends with its parent, and ignores what stops a run (terminals signal all)."""
    end_with_parent()
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
