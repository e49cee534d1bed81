"""Train a video encoder by supervised contrastive learning on VCDB pairs, with a memory bank (TCA section 3.3).

    # the paper's recipe, in one process
    python train.py --annotation_path datasets/annotations/vcdb.pickle --feature_path vcdb.hdf5 --model_path runs/tca

    # little data of your own: start near the identity, learn faster, stop on held-out videos
    python train.py --annotation_path pairs.pickle --feature_path mine.hdf5 --model_path runs/mine --init near_identity \\
        --learning_rate 3e-4 --val_set DEMO-VAL --val_feature_path val.hdf5 --patience 5

The run's folder --model_path gets model.pth (the encoder, for evaluation.py), checkpoint.pth (the whole state), log.jsonl
(one JSON object a line) and args.json. The same command goes on from the checkpoint of a run that was stopped, at whatever
step, and ends with the same weights; a finished run is left alone.
"""

import json
import math
import os
import signal
import time
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from data import FeatureStore, VCDBPairDataset, collate_pairs
from evaluation import check_width, tables, warn_of_other_features, with_features
from evaluation_sets import ANNOTATION_DIR, EVALUATION_SETS, evaluation_set
from losses import LOSSES
from model import ENCODERS, MoCo
from similarity import METRICS
from utils import (
    InputError,
    Parser,
    atomic,
    check_ranges,
    checked_device,
    default_device,
    load_torch,
    provenance,
    remove_leftovers,
    rng,
    run,
    save_torch,
    seed_torch,
    write_json,
)

# A resumed run must agree on everything but these: paths, whose content is compared instead, and what does not change the
# result (another device does, in the last bits).
FREE_ON_RESUME = {
    *("model_path", "annotation_path", "feature_path", "val_feature_path", "annotation_dir"),
    *("num_workers", "num_readers", "print_freq", "save_every", "device"),
}


def parse(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument_group("data").add_argument
    add("-ap", "--annotation_path", required=True, help="pickle in VCDB's form: pairs, and background videos as negatives")
    add("-fp", "--feature_path", required=True, help="HDF5 file with the features of those videos")
    add("-mp", "--model_path", required=True, help="folder of this run; made when it is not there, resumed when it is")
    add("-pc", "--pca_components", type=int, help="width the features must have (default: whatever the file has)")
    add("-ps", "--padding_size", type=int, default=300, help="frames of a longer video that a step sees, cropped at random"
        " (default 300; the paper's text says 64; 0 takes all)")  # fmt: skip
    add("-rs", "--random_sampling", action="store_true", help="thin a longer video to random frames instead of cropping it")
    add("--min_overlap", type=float, default=0.0, help="leave out pairs that share less than this part of either video;"
        " 29 %% of VCDB's share less than .1 (default 0: use all, as released)")  # fmt: skip
    add("--mask_shared", action="store_true", help="leave bank entries that show the anchor's own material out of its"
        " negatives; needs 'segments' in the annotation, and matters where all videos come from few films")  # fmt: skip
    add("-nw", "--num_workers", type=int, default=0, help="processes that load data beside the training (default 0: none;"
        " raise it when the device waits for data)")  # fmt: skip
    add("-nr", "--num_readers", type=int, default=1, help="threads of each loader that read files; for slow file systems")

    add = parser.add_argument_group("encoder").add_argument
    add("--encoder", default="tca", choices=[name for name in ENCODERS if name != "mean"], help="(default tca)")
    add("-nl", "--num_layers", type=int, default=1, help="self-attention layers (default 1, the paper's)")
    add("--nhead", type=int, default=8, help="attention heads; must divide the feature width (default 8)")
    add("--dim_feedforward", type=int, default=2048, help="width of the layer's inner part (default 2048)")
    add("--dropout", type=float, default=0.2, help="(default .2, the released code's; the paper reports .5)")
    add("--init", default="paper", choices=["paper", "near_identity"], help="near_identity starts from the features as they"
        " are; with few videos or few steps try both (default paper)")  # fmt: skip

    add = parser.add_argument_group("contrastive learning").add_argument
    add("--loss", default="circle", choices=LOSSES, help="circle-released is the released code's form of it (default circle)")
    add("-nn", "--neg_num", type=int, default=16, help="new background videos a pair brings to the bank (default 16)")
    add("--moco_k", type=int, default=4096, help="bank size; 0 for none: the step's negatives alone (default 4096)")
    add("--moco_m", type=float, default=0.0, help="momentum of the key encoder; 0 copies the query encoder (default 0)")
    add("--moco_t", type=float, default=1.0, help="temperature; keep 1 for circle, try .07 to 1 for infonce (default 1)")

    add = parser.add_argument_group("optimisation").add_argument
    add("-e", "--epochs", type=int, default=40, help="passes over the pairs (default 40)")
    add("-bs", "--batch_sz", type=int, default=64, help="pairs a step; lower it if memory runs out (default 64)")
    add("-lr", "--learning_rate", type=float, default=1e-5, help="start of a cosine decay over the epochs; raise it, to 1e-4"
        " or 3e-4, when there are only hundreds of steps; lower it if the loss rises (default 1e-5)")  # fmt: skip
    add("--optimizer", default="adam", choices=OPTIMIZERS, help="(default adam)")
    add("--momentum", type=float, help="of --optimizer sgd (default .9)")
    add("-wd", "--weight_decay", type=float, default=1e-4, help="(default 1e-4)")
    add("--seed", type=int, default=0, help="the same seed gives the same weights, bit for bit, on one machine (default 0)")

    add = parser.add_argument_group("held-out videos: keep the best epoch, stop when it is past").add_argument
    add("--val_set", choices=EVALUATION_SETS, help="evaluation set scored after every epoch (default: none, keep the last)")
    add("--val_feature_path", help="its features; never those you report on")
    add("--annotation_dir", default=ANNOTATION_DIR, help="folder of its annotation (default %(default)s)")
    add("--val_metric", default="cosine", choices=METRICS, help="the set's first figure by this metric decides"
        " (default cosine)")  # fmt: skip
    add("--patience", type=int, default=0, help="stop after so many epochs without a better figure (default 0: never)")

    add = parser.add_argument_group("the run").add_argument
    add("--device", default=default_device(), help="cpu, cuda, cuda:1, ... (default %(default)s)")
    add("-p", "--print-freq", type=int, default=10, help="steps between lines of log.jsonl (default 10)")
    add("--save_every", type=int, default=200, help="steps between checkpoints; one is also written at the end of every epoch"
        " and at SIGTERM (default 200)")  # fmt: skip
    for flags, note in IGNORED.items():
        add(*flags.split(), action="append", nargs="?", const=True, help=f"accepted from the released command; {note}")
    args = parser.parse_args(argv)
    if args.momentum is not None and args.optimizer != "sgd":
        print("note: --momentum changes nothing: it is of --optimizer sgd")
    args.momentum = 0.9 if args.momentum is None else args.momentum
    check_ranges(args, RANGES)
    args.device = checked_device(args.device)
    return args


RANGES = {
    **dict.fromkeys(("seed", "epochs", "patience", "padding_size", "moco_k", "num_workers"), (0, math.inf)),
    **dict.fromkeys(("batch_sz", "neg_num", "num_layers", "nhead", "dim_feedforward"), (1, math.inf)),
    **dict.fromkeys(("num_readers", "print-freq", "save_every"), (1, math.inf)),
    **dict.fromkeys(("learning_rate", "weight_decay", "momentum"), (0, math.inf)),
    **dict.fromkeys(("dropout", "moco_m", "min_overlap"), (0, 1)),
    "moco_t": (1e-3, math.inf),
}

IGNORED = {
    "-nc --num_clusters": "NetVLAD's, no part of --encoder tca",
    "-od --output_dim": "NetVLAD's; TCA's descriptors are as wide as its features",
    "-ni --normalize_input": "NetVLAD's, no part of --encoder tca",
    "--use-adasum": "one process has nothing to reduce",
    "--fp16-allreduce": "one process has nothing to reduce",
}

OPTIMIZERS = {
    "adam": lambda parameters, args: torch.optim.Adam(parameters, args.learning_rate, weight_decay=args.weight_decay),
    "adamw": lambda parameters, args: torch.optim.AdamW(parameters, args.learning_rate, weight_decay=args.weight_decay),
    "sgd": lambda parameters, args: torch.optim.SGD(
        parameters, args.learning_rate, momentum=args.momentum, weight_decay=args.weight_decay
    ),
}


def build_encoder(args, channels):
    """The untrained encoder that the flags describe, and the arguments that rebuild it."""
    arguments = dict(
        feature_size=channels, nhead=args.nhead, nlayers=args.num_layers, dim_feedforward=args.dim_feedforward,
        dropout=args.dropout, init=args.init,
    )  # fmt: skip
    return ENCODERS[args.encoder](**arguments), arguments


class Trainer:
    """One run: model, optimiser, data and the place in it. `state()` and `restore()` hold all that a resumed run needs:
    every random draw depends on (seed, step) or (seed, epoch, pair), so no generator has to be saved."""

    def __init__(self, args):
        self.args, self.folder = args, Path(args.model_path)
        store = FeatureStore(args.feature_path, args.pca_components)
        self.features = store.meta
        self.data = VCDBPairDataset(
            args.annotation_path, store, args.padding_size, args.neg_num, args.seed, args.random_sampling, args.min_overlap,
            args.num_readers,
        )  # fmt: skip
        self.steps_per_epoch = len(self.data) // args.batch_sz
        if not self.steps_per_epoch:
            raise InputError(f"{len(self.data)} pairs do not fill one batch of {args.batch_sz}; lower --batch_sz")
        if args.mask_shared:
            self.data.shares([0])  # refuses an annotation without segments, before anything is written
        self.held_out = self._held_out()
        self.inputs = {"features": store.fingerprint(), "annotation": self.data.digest}
        if self.held_out:
            self.inputs["held_out"] = self.held_out[1].fingerprint()
            warn_of_other_features(self.features, self.held_out[1], "this run")
        seed_torch(args.seed)
        encoder, self.arguments = build_encoder(args, store.channels)
        if self.held_out:
            check_width(encoder, self.held_out[1])
        self.model = MoCo(encoder, encoder.descriptor_size, args.moco_k, args.moco_m, args.moco_t).to(args.device)
        self.optimizer = OPTIMIZERS[args.optimizer](self.model.encoder_q.parameters(), args)
        self.step = 0  # steps done
        self.best, self.best_epoch, self.best_weights = -math.inf, -1, None

    def _held_out(self):
        args = self.args
        if bool(args.val_set) != bool(args.val_feature_path):
            raise InputError("--val_set and --val_feature_path belong together; give both or neither")
        if args.patience and not args.val_set:
            raise InputError("--patience counts epochs by the held-out figure; give --val_set and --val_feature_path too")
        if not args.val_set:
            return None
        chosen, store = evaluation_set(args.val_set, args.annotation_dir), FeatureStore(args.val_feature_path)
        sides = with_features(chosen, store)
        task, skipped = next(iter(chosen.coverage(store)["queries_without_relevant"].items()))
        if skipped == len(sides[0]):
            raise InputError(f"no query of {args.val_set} has a video to find ({task}) in {str(store.path)!r}; give more")
        return chosen, store, *sides

    # --- state ---

    def state(self):
        return {
            "encoder": self.args.encoder,
            "arguments": self.arguments,
            "features": self.features,
            "moco": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "best": self.best,
            "best_epoch": self.best_epoch,
            "best_weights": self.best_weights,
            "inputs": self.inputs,
            "args": vars(self.args),
        }

    def save(self):
        save_torch(self.folder / "checkpoint.pth", self.state())

    def restore(self):
        """Go on from the folder's checkpoint, if it has one; InputError when another command made it."""
        for name in ("checkpoint.pth", "model.pth", "args.json", "log.jsonl"):
            remove_leftovers(self.folder / name)
        path = self.folder / "checkpoint.pth"
        if not path.exists():
            return
        state = load_torch(path, "checkpoint")
        if not isinstance(state, dict) or "moco" not in state:
            raise InputError(f"checkpoint {str(path)!r} is not of this program; choose another --model_path")
        changed = [
            f"--{name} {old!r} -> {vars(self.args).get(name)!r}"
            for name, old in state["args"].items()
            if name not in FREE_ON_RESUME and vars(self.args).get(name) != old
        ]
        if changed:
            raise InputError(f"{str(path)!r} was made with other settings ({', '.join(changed)}); choose another --model_path")
        made_from = state.get("inputs", {})
        other = [name for name, value in self.inputs.items() if made_from.get(name) != value]
        if other:
            raise InputError(f"{str(path)!r} was made from other {' and '.join(other)} files; choose another --model_path")
        self.model.load_state_dict(state["moco"])
        self.optimizer.load_state_dict(state["optimizer"])
        for name in ("step", "best", "best_epoch", "best_weights"):
            setattr(self, name, state[name])

    def save_encoder(self):
        """model.pth: the encoder to share, the best epoch's where held-out videos were given."""
        weights = self.best_weights or {name: value.cpu() for name, value in self.model.encoder_q.state_dict().items()}
        save_torch(
            self.folder / "model.pth",
            {"encoder": self.args.encoder, "arguments": self.arguments, "features": self.features, "state_dict": weights},
        )

    # --- training ---

    @property
    def epoch(self):
        return self.step // self.steps_per_epoch

    @property
    def finished(self):
        past = self.epoch - 1 - self.best_epoch  # epochs scored since the best
        return self.epoch >= self.args.epochs or 0 < self.args.patience <= past

    def batches(self):
        """The batches of the current epoch from the current step on. A shuffle's tail that fills no batch is left out."""
        order, size = rng(self.args.seed, self.epoch).permutation(len(self.data)).tolist(), self.args.batch_sz
        starts = range(self.step % self.steps_per_epoch * size, self.steps_per_epoch * size, size)
        self.data.set_epoch(self.epoch)
        return DataLoader(
            self.data, batch_sampler=[order[start : start + size] for start in starts], collate_fn=collate_pairs,
            num_workers=self.args.num_workers, pin_memory=self.args.device.startswith("cuda"),
        )  # fmt: skip

    def train_step(self, batch):
        """One optimiser step; returns what the log says of it. Stops the run on a loss that is not finite."""
        indices, *videos, numbers = batch
        anchors, positives, negatives = ([part.to(self.args.device, non_blocking=True) for part in side] for side in videos)
        seed_torch(self.args.seed, self.step)  # dropout
        self.model.train()
        shares = self.data.shares(indices) if self.args.mask_shared else None
        logits, labels = self.model(anchors, positives, negatives, numbers.to(self.args.device), shares)
        loss = LOSSES[self.args.loss](logits, labels)
        if not torch.isfinite(loss):
            pairs = ", ".join("/".join(self.data.pairs[i]) for i in indices)
            raise InputError(f"loss is {loss.item()} at step {self.step}, pairs {pairs}; the last checkpoint stands; lower"
                " --learning_rate, or look for odd values in those features")  # fmt: skip
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.step += 1
        return loss, logits.detach() * self.args.moco_t

    def set_learning_rate(self):
        """Cosine decay to 0, a step an epoch."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.args.learning_rate * (1 + math.cos(math.pi * self.epoch / self.args.epochs)) / 2
        return group["lr"]

    def score_held_out(self):
        """The held-out set's first figure (DSVR mAP) by --val_metric; a better one than before keeps the weights."""
        chosen, store, queries, database = self.held_out
        encoder = self.model.encoder_q
        table = tables(encoder, store, queries, database, [self.args.val_metric], self.args.padding_size, self.args.device)
        figures = chosen.evaluate_table(queries, database, table[self.args.val_metric])
        figure = next(iter(figures.values()))
        if figure > self.best:
            self.best, self.best_epoch = figure, self.epoch - 1
            self.best_weights = {name: value.cpu().clone() for name, value in encoder.state_dict().items()}
        return figures

    def fit(self):
        """Train to the end, or until SIGTERM, which leaves a checkpoint. Returns the exit status."""
        stop = []
        signal.signal(signal.SIGTERM, lambda *_: stop.append(True))
        log = Log(self.folder / "log.jsonl", self.step)
        total = self.args.epochs * self.steps_per_epoch
        with tqdm(total=total, initial=self.step, unit="step") as bar:
            while not self.finished:
                rate, epoch, start = self.set_learning_rate(), self.epoch, time.perf_counter()
                for batch in self.batches():
                    loss, similarities = self.train_step(batch)
                    bar.update()
                    seconds, start = time.perf_counter() - start, time.perf_counter()
                    if self.step % self.args.print_freq == 0:
                        line = describe_step(loss, similarities) | {"videos_per_s": round(videos(batch) / seconds, 1)}
                        log.write({"step": self.step, "epoch": epoch, "lr": rate, **line})
                        bar.set_postfix(loss=f"{line['loss']:.3f}", videos_per_s=line["videos_per_s"])
                    if self.epoch == epoch and (stop or self.step % self.args.save_every == 0):
                        self.save()
                    if stop:
                        break
                if self.epoch > epoch:  # complete; only now is it scored and saved, so a resumed run never skips a score
                    if self.held_out:
                        log.write({"step": self.step, "epoch": epoch, "held_out": self.score_held_out()})
                    self.save()
                if stop:
                    tqdm.write(f"stopped at step {self.step}; the same command goes on from here")
                    return 128 + signal.SIGTERM
        self.save_encoder()
        return 0


class Log:
    """JSON objects, one a line, appended; a resumed run first drops the lines past its step."""

    def __init__(self, path, step):
        kept = [line for line in path.read_text().splitlines() if _step(line) <= step] if path.exists() else []
        with atomic(path) as temporary:
            temporary.write_text("".join(line + "\n" for line in kept))
        self.path = path

    def write(self, line):
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")


def _step(line):
    try:
        return json.loads(line)["step"]
    except ValueError:  # a line cut short by a kill
        return math.inf


def videos(batch):
    """How many videos a batch encodes."""
    return sum(len(side[0]) for side in batch[1:4])


def describe_step(loss, similarities):
    """What a log line says of a step; similarities (N, 1+K), the positive first, -inf where a negative was left out."""
    used = similarities[:, 1:] > -torch.inf
    some = used.any(1)  # rows that have a negative at all
    negatives = similarities[:, 1:]
    return {
        "loss": loss.item(),
        "positive": similarities[:, 0].mean().item(),
        "negative": negatives[used].mean().item() if some.any() else None,
        "hardest_negative": negatives[some].amax(1).mean().item() if some.any() else None,
        "left_out": 1 - used.float().mean().item(),
    }


def main():
    args = parse()
    if max(int(os.environ.get(name) or 1) for name in ("WORLD_SIZE", "HOROVOD_SIZE", "OMPI_COMM_WORLD_SIZE")) > 1:
        raise InputError("this version trains in one process; start it without a launcher")
    for flags, note in IGNORED.items():
        name = flags.split()[-1]
        if getattr(args, name.strip("-").replace("-", "_")) is not None:
            print(f"note: {name} changes nothing: {note}")
        delattr(args, name.strip("-").replace("-", "_"))
    trainer = Trainer(args)
    trainer.folder.mkdir(parents=True, exist_ok=True)
    trainer.restore()
    total = args.epochs * trainer.steps_per_epoch
    if trainer.finished and (trainer.folder / "model.pth").exists():
        print(f"{args.model_path}: finished already, at step {trainer.step}; nothing to do")
        return 0
    write_json(trainer.folder / "args.json", {"arguments": dict(sorted(vars(args).items())), **provenance()})
    missing = trainer.data.missing
    print(
        f"{len(trainer.data)} pairs, {len(trainer.data.negatives)} negatives (without features: {missing['pairs']} pairs,"
        f" {missing['negatives']} negatives); {total} optimiser steps of {args.batch_sz} pairs"
        + (f", going on from {trainer.step}" if trainer.step else "")
    )
    status = trainer.fit()
    if status == 0:
        best = f", best held-out figure {trainer.best:.4f} after epoch {trainer.best_epoch + 1}" if trainer.held_out else ""
        print(f"{args.model_path}: model.pth after {trainer.step} steps{best}")
    return status


if __name__ == "__main__":
    run(main)
