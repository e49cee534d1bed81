"""Train a video encoder by supervised contrastive learning on VCDB pairs, with a memory bank (TCA section 3.3).

    # the paper's recipe, in one process
    python train.py --annotation_path datasets/annotations/vcdb.pickle --feature_path vcdb.hdf5 --model_path runs/tca

    # 8 processes on one machine, by either launcher; --batch_sz is each process's
    torchrun --standalone --nproc_per_node 8 train.py ...
    horovodrun -np 8 -H localhost:8 python train.py ... --use-adasum --fp16-allreduce

    # 2 machines of 4
    torchrun --nnodes 2 --nproc_per_node 4 --rdzv_backend c10d --rdzv_endpoint FIRST:29500 train.py ...
    horovodrun -np 8 -H FIRST:4,SECOND:4 python train.py ...

    # little data of your own: start near the identity, learn faster, stop on held-out videos
    python train.py --annotation_path pairs.pickle --feature_path mine.hdf5 --model_path runs/mine --init near_identity \\
        --learning_rate 3e-4 --val_set DEMO-VAL --val_feature_path val.hdf5 --patience 5

    # videos without any annotation: positives made from a video's own frames
    python train.py --pairs augment --feature_path mine.hdf5 --model_path runs/mine --init near_identity

The run's folder --model_path gets model.pth (the encoder, for evaluation.py), checkpoint.pth (the whole state) and the one
before it, log.jsonl (one JSON object a line; watch.py says what the figures mean), TensorBoard events and args.json. The same
command goes on from the checkpoint of a run that was stopped, at whatever step, and ends with the same weights (bit for bit in
one process, to float tolerance in several); a finished run is left alone. On another number of processes it goes on too.

Processes: a step takes --batch_sz pairs of each, one slice of the epoch's shuffle in all, so 1 process of 2B pairs and 2 of B
see the same pairs, negatives and bank, and without dropout learn the same (but for encoders with batch norm and for
circle-released, which look at each process's pairs alone). An epoch takes every pair once, less the shuffle's tail that fills
no step, as in the released code. The learning rate is scaled as in the released recipe, and printed.
"""

import math
import signal
import time
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

import checkpoint
import watch
from data import FeatureStore
from descriptors import level_of, levels_of
from evaluation import warn_of_other_features, with_features
from evaluation_sets import evaluation_set, missing_note
from losses import LOSSES
from mining import nearest_negatives
from model import ENCODERS, MoCo
from options import OPTIMIZERS, parse, settle
from pairs import AugmentedPairDataset, VCDBPairDataset, collate_pairs
from streaming import check_width, tables
from utils import (
    InputError,
    Processes,
    digest,
    provenance,
    rng,
    run,
    save_torch,
    seed_torch,
    start_processes,
    write_json,
)


def training_pairs(args, store):
    """The data set that the flags describe."""
    options = dict(padding_size=args.padding_size, neg_num=args.neg_num, seed=args.seed)
    options |= dict(random_sampling=args.random_sampling, readers=args.num_readers)
    if args.pairs == "augment":
        pairs = AugmentedPairDataset(store, args.annotation_path, args.augment, args.mask_shared, **options)
    else:
        pairs = VCDBPairDataset(args.annotation_path, store, min_overlap=args.min_overlap, **options)
    if args.mask_shared:
        pairs.shares([0])  # refuses an annotation without segments, before anything is written
    return pairs


class Trainer:
    """One run: model, optimiser, data and the place in it. `state()` and `restore()` hold all that a resumed run needs:
    every random draw depends on (seed, step) or (seed, epoch, pair), so no generator has to be saved."""

    def __init__(self, args, processes=None):
        self.args, self.folder, self.processes = args, Path(args.model_path), processes or Processes()
        store = FeatureStore(args.feature_path, args.pca_components)
        self.features = store.meta
        self.data = training_pairs(args, store)
        self.per_step = args.batch_sz * self.processes.size  # pairs of all processes
        self.steps_per_epoch = len(self.data) // self.per_step
        if not self.steps_per_epoch:
            raise InputError(f"{len(self.data)} pairs do not fill one step of {self.per_step}; lower --batch_sz")
        self.held_out = self._held_out()
        self.inputs = {"features": store.fingerprint(), "annotation": self.data.digest}
        if self.held_out:
            self.inputs["held_out"] = digest([self.held_out[1].fingerprint(), self.held_out[0].fingerprint()])
            warn_of_other_features(self.features, self.held_out[1], "this run")
        seed_torch(args.seed)
        self.arguments = ENCODERS[args.encoder].arguments(store.channels, args)
        encoder = ENCODERS[args.encoder](**self.arguments)
        if self.held_out:
            check_width(encoder, self.held_out[1])
            if level_of(args.val_metric) not in levels_of(encoder):
                raise InputError(
                    f"--val_metric {args.val_metric} compares frames, and {args.encoder} describes whole videos only"
                )
        self.model = MoCo(
            encoder, encoder.descriptor_size, args.moco_k, args.moco_m, args.moco_t, self.processes.allgather,
            torch.bfloat16 if args.amp else None,
        ).to(args.device)  # fmt: skip
        optimizer = OPTIMIZERS[args.optimizer](encoder.parameters(), args)
        named = list(encoder.named_parameters())
        self.optimizer = self.processes.wrap(optimizer, named, args.use_adasum, args.fp16_allreduce)
        self.learning_rate = args.learning_rate * self.processes.learning_rate_scale(args.use_adasum, args.device)
        self.step = self.epoch = self.seen = 0  # steps and epochs done; pairs of the current epoch that steps have seen
        self.best, self.best_epoch, self.best_weights = -math.inf, -1, None

    def _held_out(self):
        args = self.args
        if bool(args.val_set) != bool(args.val_feature_path):
            raise InputError("--val_set and --val_feature_path belong together; give both or neither")
        if args.patience and not args.val_set:
            raise InputError("--patience counts epochs by the held-out figure; give --val_set and --val_feature_path too")
        if not args.val_set:
            return None
        store = FeatureStore(args.val_feature_path)
        chosen = evaluation_set(args.val_set, args.annotation_dir, store)
        sides = with_features(chosen, store)
        task, skipped = next(iter(chosen.coverage(store)["queries_without_relevant"].items()))
        if skipped == len(sides[0]):
            raise InputError(f"no query of {args.val_set} has a video to find ({task}) in {str(store.path)!r}; give more")
        return chosen, store, *sides

    # --- state ---

    PLACE = ("step", "epoch", "seen", "best", "best_epoch", "best_weights")

    def state(self):
        """Plain containers and tensors; every process calls it. Processes have the same, but for batch statistics, of which the
        first's are saved, and Adasum's moments, which are saved of all."""
        own = self.optimizer.state_dict()
        return {
            "encoder": self.args.encoder,
            "arguments": self.arguments,
            "features": self.features,
            "moco": self.model.state_dict(),
            "optimizers": self.processes.collect(own) if self.args.use_adasum else [own],
            "mined": self.data.mined,
            "inputs": self.inputs,
            "args": vars(self.args),
            "processes": self.processes.size,
            **{name: getattr(self, name) for name in self.PLACE},
        }

    def save(self):
        with self.processes.together():
            if not all(value.isfinite().all() for value in self.model.encoder_q.state_dict().values()):
                raise InputError(f"the weights are not finite at step {self.step}; {self._last()}; start again with a lower"
                    " --learning_rate, in another --model_path")  # fmt: skip
        state = self.state()
        if not self.processes.rank:
            checkpoint.save(self.folder, state)
        self.processes.barrier()

    def restore(self):
        """Go on from the folder's checkpoint, if it has one; InputError when another command made it."""
        keys, state = self.state(), None
        with self.processes.together():
            if not self.processes.rank:  # the folder may be on the first machine only
                state = checkpoint.load(self.folder, keys)
                if state:
                    checkpoint.check(state, self.args, self.inputs, self.folder)
        state = self.processes.broadcast(state)
        if state is None:
            return
        self.model.load_state_dict(state["moco"])
        optimizers = state["optimizers"]
        self.optimizer.load_state_dict(optimizers[self.processes.rank if len(optimizers) == self.processes.size else 0])
        self.data.mined = state["mined"]
        for name in self.PLACE:
            setattr(self, name, state[name])
        if not self.processes.rank:
            for line in checkpoint.told_changes(state, self.args.batch_sz, self.processes.size, len(self.data)):
                print(line)

    def save_encoder(self):
        """model.pth: the encoder to share, the best epoch's where held-out videos were given."""
        weights = self.best_weights or {name: value.cpu() for name, value in self.model.encoder_q.state_dict().items()}
        save_torch(
            self.folder / "model.pth",
            {"encoder": self.args.encoder, "arguments": self.arguments, "features": self.features, "state_dict": weights},
        )

    # --- training ---

    @property
    def finished(self):
        past = self.epoch - 1 - self.best_epoch  # epochs scored since the best
        return self.epoch >= self.args.epochs or 0 < self.args.patience <= past

    @property
    def epoch_done(self):
        """Whether too few pairs are left for another step: a shuffle's tail that fills none is left out."""
        return self.seen + self.per_step > len(self.data)

    def batches(self):
        """This process's batches of the current epoch, after the pairs that it has seen."""
        order = rng(self.args.seed, self.epoch).permutation(len(self.data)).tolist()
        own, size = self.processes.rank * self.args.batch_sz, self.args.batch_sz
        starts = range(self.seen, len(order) - self.per_step + 1, self.per_step)
        self.data.set_epoch(self.epoch)
        return DataLoader(
            self.data, batch_sampler=[order[start + own : start + own + size] for start in starts],
            collate_fn=collate_pairs, num_workers=self.args.num_workers, pin_memory=self.args.device.startswith("cuda"),
            worker_init_fn=heedless,
        )  # fmt: skip

    def mine(self):
        """Find the epoch's hard negatives with the encoder as it is at its start."""
        args = self.args
        self.processes.broadcast_model(self.model.encoder_q)  # batch statistics differ by process
        self.data.mined = nearest_negatives(
            self.model.encoder_q, self.data, args.hard_negatives, args.padding_size, args.device, self.processes,
            exclude=args.mask_shared or args.pairs == "augment",
        )  # fmt: skip

    def train_step(self, batch):
        """One optimiser step -> loss, logits (N, 1+K) and d loss / d logits. A loss that is not finite stops all processes."""
        indices, *videos, numbers = batch
        anchors, positives, negatives = ([part.to(self.args.device, non_blocking=True) for part in side] for side in videos)
        seed_torch(self.args.seed, self.step, self.processes.rank)  # dropout
        self.model.train()
        shares = self.data.shares(indices) if self.args.mask_shared or self.args.pairs == "augment" else None
        logits, labels = self.model(anchors, positives, negatives, numbers.to(self.args.device), shares)
        logits.retain_grad()
        loss = LOSSES[self.args.loss](logits, labels)
        with self.processes.together():
            if not torch.isfinite(loss):
                self._not_finite(loss.item(), indices, numbers)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.step += 1
        self.seen += self.per_step
        return loss.detach(), logits.detach(), logits.grad

    def _not_finite(self, value, indices, numbers):
        pairs = ", ".join("/".join(self.data.pairs[i]) for i in indices)
        negatives = ", ".join(dict.fromkeys(self.data.negatives[number] for number in numbers))
        raise InputError(f"loss is {value} at step {self.step}, pairs {pairs}, negatives {negatives}; {self._last()}; look for"
            " odd values in those features, or start again with a lower --learning_rate, in another --model_path")  # fmt: skip

    def _last(self):
        path = self.folder / checkpoint.NEWEST
        return f"the last good checkpoint is {str(path)!r}" if path.exists() else "there is no checkpoint yet"

    def set_learning_rate(self):
        """Cosine decay to 0, a step an epoch."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * (1 + math.cos(math.pi * self.epoch / self.args.epochs)) / 2
        return group["lr"]

    def score_held_out(self):
        """The held-out set's first figure (DSVR mAP) by --val_metric; a better one than before keeps the weights."""
        chosen, store, queries, database = self.held_out
        encoder = self.model.encoder_q
        self.processes.broadcast_model(encoder)  # batch statistics differ by process
        metric, padding_size, device = self.args.val_metric, self.args.padding_size, self.args.device
        table = tables(encoder, store, queries, database, [metric], padding_size, device, processes=self.processes)
        figures = chosen.evaluate_table(queries, database, table[metric])
        figure = next(iter(figures.values()))
        if figure > self.best:
            self.best, self.best_epoch = figure, self.epoch - 1
            self.best_weights = {name: value.cpu().clone() for name, value in encoder.state_dict().items()}
        return figures

    def fit(self):
        """Train to the end, or until SIGTERM on any process, which leaves a checkpoint. Returns the exit status."""
        signalled = []
        signal.signal(signal.SIGTERM, lambda *_: signalled.append(True))
        log = watch.Log(self.folder, self.step, first=not self.processes.rank)
        total = self.step + (self.args.epochs - self.epoch) * self.steps_per_epoch - self.seen // self.per_step
        stopped = False
        with tqdm(total=total, initial=self.step, unit="step", disable=self.processes.rank > 0) as bar:
            while not (self.finished or stopped):
                stopped = self._epoch(log, bar, signalled)
        log.close()
        if stopped:
            if not self.processes.rank:
                tqdm.write(f"stopped at step {self.step}; the same command goes on from here")
            return 128 + signal.SIGTERM
        if not self.processes.rank:
            self.save_encoder()
        return 0

    def _epoch(self, log, bar, signalled):
        """The rest of the current epoch; true when a signal stopped it."""
        rate, stop = self.set_learning_rate(), False
        if self.args.hard_negatives and not self.seen:
            self.mine()
        batches = iter(self.batches())
        while not (self.epoch_done or stop):
            start = time.perf_counter()
            with self.processes.together():
                batch = next(batches)
            waited = time.perf_counter() - start
            asked = (self.step + 1) % self.args.print_freq == 0
            queue = watch.describe_queue(self.model) if asked else {}
            loss, logits, weights = self.train_step(batch)
            bar.update()
            if asked:
                figures = watch.describe_step(loss, logits * self.args.moco_t, weights) | queue
                seconds = time.perf_counter() - start
                figures |= {"data_wait": waited / seconds, "videos_per_s": videos(batch) * self.processes.size / seconds}
                figures = watch.mean_over(self.processes, figures)
                log.write(self.step, self.epoch, lr=rate, **figures)
                bar.set_postfix(loss=f"{figures['loss']:.3f}", videos_per_s=f"{figures['videos_per_s']:.1f}")
            stop = self.processes.any(bool(signalled))
            if not self.epoch_done and (stop or self.step % self.args.save_every == 0):
                self.save()
        if self.epoch_done:  # only now is it scored and saved, so a resumed run never skips a score
            self.epoch, self.seen = self.epoch + 1, 0
            if self.held_out:
                log.write(self.step, self.epoch - 1, held_out=self.score_held_out())
            self.save()
        return stop


def heedless(_):
    """A loading process leaves SIGTERM, which launchers send to all, to the training, which stops in order."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def videos(batch):
    """How many videos a batch encodes."""
    return sum(len(num_frames) for _, num_frames in batch[1:4])


def announce(trainer, notes):
    """What the run is, in a few lines."""
    args, processes, data = trainer.args, trainer.processes, trainer.data
    by = f"{processes.size} x " if processes.size > 1 else ""
    scale = processes.learning_rate_scale(args.use_adasum, args.device)
    if trainer.held_out and (note := missing_note(trainer.held_out[0].coverage(trainer.held_out[1]))):
        notes = [*notes, f"note: {args.val_set}: {note}"]
    print(*notes, sep="\n", end="\n" if notes else "")
    print(
        f"{len(data)} pairs, {len(data.negatives)} negatives (without features: {data.missing['pairs']} pairs,"
        f" {data.missing['negatives']} negatives); {args.epochs * trainer.steps_per_epoch} optimiser steps of"
        f" {by}{args.batch_sz} pairs, learning rate {args.learning_rate:g} x {scale} = {trainer.learning_rate:g},"
        f" by {processes.engine}" + (f"; going on from step {trainer.step}" if trainer.step else "")
    )
    if processes.size > 1:
        print("the number of processes is a hidden hyper-parameter: more of them make fewer steps of more pairs")


def main():
    processes = start_processes()
    with processes.together():
        args = parse(__doc__)
        notes = settle(args, processes)
        trainer = Trainer(args, processes)
        trainer.folder.mkdir(parents=True, exist_ok=True)
    trainer.restore()
    processes.broadcast_model(trainer.model)
    model = trainer.folder / "model.pth"
    if trainer.finished and processes.any(not processes.rank and model.exists()):
        if not processes.rank:
            print(f"{args.model_path}: finished already, at step {trainer.step}; nothing to do")
        return 0
    if not processes.rank:
        settings = {"arguments": dict(sorted(vars(args).items())), "processes": processes.size, "engine": processes.engine}
        write_json(trainer.folder / "args.json", settings | provenance())
        announce(trainer, notes)
    status = trainer.fit()
    if status == 0 and not processes.rank:
        best = f", best held-out figure {trainer.best:.4f} after epoch {trainer.best_epoch + 1}" if trainer.held_out else ""
        print(f"{args.model_path}: model.pth after {trainer.step} steps{best}")
    return status


if __name__ == "__main__":
    run(main)
