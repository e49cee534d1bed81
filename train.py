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
before it, log.jsonl (one JSON object a line; training_log.py says what the figures mean), TensorBoard events and args.json. The same
command goes on from the checkpoint of a run that was stopped, at whatever step, and ends with the same weights (bit for bit in
one process, to float tolerance in several); a finished run is left alone. On another number of processes it goes on too.

Distributed: a step takes --batch_sz pairs of each, one slice of the epoch's shuffle in all, so 1 process of 2B pairs and 2 of B
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
import training_log
from data import (
    AUGMENTATIONS,
    DEFAULT_MIX,
    AugmentedPairDataset,
    VCDBPairDataset,
    collate_pairs,
    nearest_negatives,
)
from datasets.evaluation_set import missing_note, videos_with_features
from datasets.registry import ANNOTATION_DIR, EVALUATION_SETS, load_evaluation_set
from distributed import Distributed, check_device, default_device, init_distributed, run_main
from features.store import FeatureStore, warn_if_features_differ
from losses import LOSSES
from model import ENCODERS, MoCo, encoder_arguments
from retrieval.compare import compare_collections
from retrieval.encode import check_feature_size, encode_distributed, level_of, levels_of
from retrieval.similarity import METRICS
from utils import (
    InputError,
    Parser,
    check_ranges,
    digest,
    provenance,
    save_torch,
    seed_torch,
    seeded_rng,
    write_json,
)


def parse(description, argv=None):
    """The command line as it was given; `settle` makes of it what a run needs."""
    parser = Parser(description)
    for group in (_data, _encoder, _contrast, _optimisation, _held_out, _run):
        group(parser)
    return parser.parse_args(argv)


def _data(parser):
    add = parser.add_argument_group("data").add_argument
    add("-ap", "--annotation_path", help="pickle in VCDB's form: pairs, and background videos as negatives; with --pairs"
        " augment it may be a text file with an id a line, or left out")  # fmt: skip
    add("-fp", "--feature_path", required=True, help="HDF5 file with the features of those videos")
    add(
        "-mp",
        "--model_path",
        required=True,
        help="folder of this run; made when it is not there, resumed when it is",
    )
    add("--pairs", default="vcdb", choices=["vcdb", "augment"], help="where positives come from: the annotation's pairs, or"
        " each video's own frames, with all other videos as negatives (default vcdb)")  # fmt: skip
    add("--augment", nargs="+", choices=AUGMENTATIONS, help="what --pairs augment does to a video, each with a chance of one"
        f" half, in this order (default {' '.join(DEFAULT_MIX)}; shuffle is for recurrent encoders)")  # fmt: skip
    add(
        "-pc",
        "--pca_components",
        type=int,
        help="width the features must have (default: whatever the file has)",
    )
    add("-ps", "--padding_size", type=int, default=300, help="frames of a longer video that a step sees, cropped at random"
        " (default 300; the paper's text says 64; 0 takes all)")  # fmt: skip
    add(
        "-rs",
        "--random_sampling",
        action="store_true",
        help="thin a longer video to random frames instead of cropping it",
    )
    add("--min_overlap", type=float, default=0.0, help="leave out pairs that share less than this part of either video;"
        " 29 %% of VCDB's share less than .1 (default 0: use all, as released)")  # fmt: skip
    add("--mask_shared", action="store_true", help="leave bank entries that show the anchor's own material out of its"
        " negatives; needs 'segments' in the annotation, and matters where all videos come from few films")  # fmt: skip
    add("-nw", "--num_workers", type=int, default=0, help="processes that load data beside the training (default 0: none;"
        " raise it when the log's data_wait is not small)")  # fmt: skip
    add(
        "-nr",
        "--num_readers",
        type=int,
        default=1,
        help="threads of each loader that read files; for slow file systems",
    )


def _encoder(parser):
    add = parser.add_argument_group(
        "encoder (a default in brackets is of the encoders named)"
    ).add_argument
    add(
        "--encoder",
        default="tca",
        choices=[name for name in ENCODERS if name != "mean"],
        help="(default tca)",
    )
    add("-nl", "--num_layers", type=int, help="(tca 1, the paper's; lstm, gru 2)")
    add("--nhead", type=int, help="attention heads; must divide the feature width (tca 8)")
    add("--dim_feedforward", type=int, help="width of the layer's inner part (tca 2048)")
    add(
        "--dropout",
        type=float,
        help="(tca, lstm, gru .2, the released code's; the paper reports .5; netvlad, nextvlad .5)",
    )
    add("--init", choices=["paper", "near_identity"], help="near_identity starts from the features as they are; with few"
        " videos or few steps try both (tca paper)")  # fmt: skip
    add("-nc", "--num_clusters", type=int, help="centroids (netvlad 256, nextvlad 64)")
    add(
        "-od",
        "--output_dim",
        type=int,
        help="descriptor size (netvlad, nextvlad, lstm, gru 1024); tca's is its features'",
    )
    add(
        "-ni",
        "--normalize_input",
        action="store_true",
        default=None,
        help="L2-normalise every frame (netvlad, nextvlad)",
    )


def _contrast(parser):
    add = parser.add_argument_group("contrastive learning").add_argument
    add(
        "--loss",
        default="circle",
        choices=LOSSES,
        help="circle-released is the released code's form of it (default circle)",
    )
    add(
        "-nn",
        "--neg_num",
        type=int,
        default=16,
        help="new background videos a pair brings to the bank (default 16)",
    )
    add("--hard_negatives", type=int, default=0, metavar="N", help="before each epoch find every anchor's N nearest background"
        " videos by the encoder so far, and draw half of --neg_num from them; encodes all videos once an epoch, and wants"
        " background without unknown copies (default 0: random draws, as the paper)")  # fmt: skip
    add(
        "--moco_k",
        type=int,
        default=4096,
        help="bank size; 0 for none: the step's negatives alone (default 4096)",
    )
    add(
        "--moco_m",
        type=float,
        default=0.0,
        help="momentum of the key encoder; 0 copies the query encoder (default 0)",
    )
    add(
        "--moco_t",
        type=float,
        default=1.0,
        help="temperature; keep 1 for circle, try .07 to 1 for infonce (default 1)",
    )


def _optimisation(parser):
    add = parser.add_argument_group("optimisation").add_argument
    add("-e", "--epochs", type=int, default=40, help="passes over the pairs (default 40)")
    add("-bs", "--batch_sz", type=int, default=64, help="pairs a step of each process; lower it if memory runs out"
        " (default 64)")  # fmt: skip
    add("-lr", "--learning_rate", type=float, default=1e-5, help="start of a cosine decay over the epochs, for one process;"
        " raise it, to 1e-4 or 3e-4, for only hundreds of steps; lower it if the loss rises (default 1e-5)")  # fmt: skip
    add("--optimizer", default="adam", choices=OPTIMIZERS, help="(default adam)")
    add("--momentum", type=float, help="of --optimizer sgd (default .9)")
    add("-wd", "--weight_decay", type=float, default=1e-4, help="(default 1e-4)")
    add("--amp", choices=["bfloat16"], help="run the encoder in bfloat16 where that is safe; similarities and losses stay"
        " float32 (default: float32 throughout)")  # fmt: skip
    add("--use-adasum", action="store_true", help="join the processes' gradients by Adasum instead of their mean; needs"
        " horovodrun and a power of two of processes")  # fmt: skip
    add(
        "--fp16-allreduce",
        action="store_true",
        help="gradients travel between processes in half precision; for networks",
    )
    add(
        "--seed",
        type=int,
        default=0,
        help="the same seed gives the same weights, bit for bit, on one machine (default 0)",
    )


def _held_out(parser):
    add = parser.add_argument_group(
        "held-out videos: keep the best epoch, stop when it is past"
    ).add_argument
    add(
        "--val_set",
        choices=EVALUATION_SETS,
        help="evaluation set scored after every epoch (default: none, keep the last)",
    )
    add("--val_feature_path", help="its features; never those you report on")
    add(
        "--annotation_dir",
        default=ANNOTATION_DIR,
        help="folder of its annotation (default %(default)s)",
    )
    add("--val_metric", default="cosine", choices=[name for name in METRICS if name != "comparator"], metavar="METRIC",
        help="its first figure by this measure, one of evaluation.py's but comparator, decides (default cosine)")  # fmt: skip
    add(
        "--patience",
        type=int,
        default=0,
        help="stop after so many epochs without a better figure (default 0: never)",
    )


def _run(parser):
    add = parser.add_argument_group("the run").add_argument
    add("--device", default=default_device(), help="cpu, cuda, cuda:1, ... (default %(default)s; each process of a machine"
        " takes its own GPU)")  # fmt: skip
    add(
        "-p",
        "--print-freq",
        type=int,
        default=10,
        help="steps between lines of log.jsonl (default 10)",
    )
    add("--save_every", type=int, default=200, help="steps between checkpoints; one is also written at the end of every epoch"
        " and at SIGTERM (default 200)")  # fmt: skip


RANGES = {
    **dict.fromkeys(
        ("seed", "epochs", "patience", "padding_size", "moco_k", "num_workers", "hard_negatives"),
        (0, math.inf),
    ),
    **dict.fromkeys(
        ("batch_sz", "neg_num", "num_layers", "nhead", "dim_feedforward"), (1, math.inf)
    ),
    **dict.fromkeys(
        ("num_clusters", "output_dim", "num_readers", "print-freq", "save_every"), (1, math.inf)
    ),
    **dict.fromkeys(("learning_rate", "weight_decay", "momentum"), (0, math.inf)),
    **dict.fromkeys(("dropout", "moco_m", "min_overlap"), (0, 1)),
    "moco_t": (1e-3, math.inf),
}

OPTIMIZERS = {  # fused: one pass over the weights, where plain Adam takes ten
    "adam": lambda parameters, args: torch.optim.Adam(
        parameters, args.learning_rate, weight_decay=args.weight_decay, fused=True
    ),
    "adamw": lambda parameters, args: torch.optim.AdamW(
        parameters, args.learning_rate, weight_decay=args.weight_decay, fused=True
    ),
    "sgd": lambda parameters, args: torch.optim.SGD(
        parameters,
        args.learning_rate,
        momentum=args.momentum,
        weight_decay=args.weight_decay,
        fused=True,
    ),
}


def settle(args, dist):
    """Check `args`, fill what depends on others in, and return a line for each flag that changes nothing here."""
    encoder_flags = {name: set(encoder.flags.values()) for name, encoder in ENCODERS.items()}
    idle = {
        f"--{flag}": f"--encoder {args.encoder} has no use for it"
        for flag in sorted(set().union(*encoder_flags.values()) - encoder_flags[args.encoder])
        if getattr(args, flag) is not None
    }
    if args.momentum is not None and args.optimizer != "sgd":
        idle["--momentum"] = "it is of --optimizer sgd"
    if args.min_overlap and args.pairs == "augment":
        idle["--min_overlap"] = "it is of --pairs vcdb"
    if args.random_sampling and not args.padding_size:
        idle["--random_sampling"] = "--padding_size 0 takes whole videos"
    if args.augment and args.pairs != "augment":
        idle["--augment"] = "it is of --pairs augment"
    if dist.world_size == 1:
        flags = {"--use-adasum": args.use_adasum, "--fp16-allreduce": args.fp16_allreduce}
        idle |= {flag: "one process has nothing to join" for flag, given in flags.items() if given}
    args.momentum = 0.9 if args.momentum is None else args.momentum
    args.augment = args.augment or list(DEFAULT_MIX)
    if args.annotation_path is None and args.pairs == "vcdb":
        raise InputError(
            "--annotation_path is missing; give VCDB's pairs, or --pairs augment to do without"
        )
    check_ranges(
        args,
        {
            flag: bounds
            for flag, bounds in RANGES.items()
            if getattr(args, flag.replace("-", "_")) is not None
        },
    )
    args.device = check_device(dist.local_device(args.device))
    return [f"note: {flag} changes nothing: {reason}" for flag, reason in idle.items()]


def training_pairs(args, store):
    """The data set that the flags describe."""
    options = dict(padding_size=args.padding_size, neg_num=args.neg_num, seed=args.seed)
    options |= dict(random_sampling=args.random_sampling, readers=args.num_readers)
    if args.pairs == "augment":
        pairs = AugmentedPairDataset(
            store, args.annotation_path, args.augment, args.mask_shared, **options
        )
    else:
        pairs = VCDBPairDataset(
            args.annotation_path, store, min_overlap=args.min_overlap, **options
        )
    if args.mask_shared:
        pairs.shares([0])  # refuses an annotation without segments, before anything is written
    return pairs


class Trainer:
    """One run: model, optimiser, data and the place in it. `state()` and `restore()` hold all that a resumed run needs:
    every random draw depends on (seed, step) or (seed, epoch, pair), so no generator has to be saved."""

    def __init__(self, args, dist=None):
        self.args, self.folder, self.dist = args, Path(args.model_path), dist or Distributed()
        store = FeatureStore(args.feature_path, args.pca_components)
        self.features = store.meta
        self.data = training_pairs(args, store)
        self.per_step = args.batch_sz * self.dist.world_size  # pairs of all processes
        self.steps_per_epoch = len(self.data) // self.per_step
        if not self.steps_per_epoch:
            raise InputError(
                f"{len(self.data)} pairs do not fill one step of {self.per_step}; lower --batch_sz"
            )
        self.held_out = self._held_out()
        self.inputs = {"features": store.fingerprint(), "annotation": self.data.digest}
        if self.held_out:
            self.inputs["held_out"] = digest(
                [self.held_out[1].fingerprint(), self.held_out[0].fingerprint()]
            )
            warn_if_features_differ(self.features, self.held_out[1], "this run")
        seed_torch(args.seed)
        self.arguments = encoder_arguments(args.encoder, store.feature_size, args)
        encoder = ENCODERS[args.encoder](**self.arguments)
        if self.held_out:
            check_feature_size(encoder, self.held_out[1])
            if level_of(args.val_metric) not in levels_of(encoder):
                raise InputError(
                    f"--val_metric {args.val_metric} compares frames, and {args.encoder} describes whole videos only"
                )
        self.model = MoCo(
            encoder, encoder.descriptor_size, args.moco_k, args.moco_m, args.moco_t, self.dist.all_gather,
            torch.bfloat16 if args.amp else None,
        ).to(args.device)  # fmt: skip
        optimizer = OPTIMIZERS[args.optimizer](encoder.parameters(), args)
        named = list(encoder.named_parameters())
        self.optimizer = self.dist.wrap(optimizer, named, args.use_adasum, args.fp16_allreduce)
        self.learning_rate = args.learning_rate * self.dist.lr_scale(args.use_adasum, args.device)
        self.step = self.epoch = self.seen = (
            0  # steps and epochs done; pairs of the current epoch that steps have seen
        )
        self.best, self.best_epoch, self.best_weights = -math.inf, -1, None

    def _held_out(self):
        args = self.args
        if bool(args.val_set) != bool(args.val_feature_path):
            raise InputError(
                "--val_set and --val_feature_path belong together; give both or neither"
            )
        if args.patience and not args.val_set:
            raise InputError(
                "--patience counts epochs by the held-out figure; give --val_set and --val_feature_path too"
            )
        if not args.val_set:
            return None
        store = FeatureStore(args.val_feature_path)
        chosen = load_evaluation_set(args.val_set, args.annotation_dir, store)
        sides = videos_with_features(chosen, store)
        task, skipped = next(iter(chosen.coverage(store)["queries_without_relevant"].items()))
        if skipped == len(sides[0]):
            raise InputError(
                f"no query of {args.val_set} has a video to find ({task}) in {str(store.path)!r}; give more"
            )
        return chosen, store, *sides

    # --- state ---

    PLACE = ("step", "epoch", "seen", "best", "best_epoch", "best_weights")

    def state(self):
        """Plain containers and tensors; every process calls it. Distributed have the same, but for batch statistics, of which the
        first's are saved, and Adasum's moments, which are saved of all."""
        own = self.optimizer.state_dict()
        return {
            "encoder": self.args.encoder,
            "arguments": self.arguments,
            "features": self.features,
            "moco": self.model.state_dict(),
            "optimizers": self.dist.all_gather_objects(own) if self.args.use_adasum else [own],
            "mined": self.data.mined,
            "inputs": self.inputs,
            "args": vars(self.args),
            "processes": self.dist.world_size,
            **{name: getattr(self, name) for name in self.PLACE},
        }

    def save(self):
        with self.dist.exit_together_on_error():
            if not all(
                value.isfinite().all() for value in self.model.encoder_q.state_dict().values()
            ):
                raise InputError(f"the weights are not finite at step {self.step}; {self._last()}; start again with a lower"
                    " --learning_rate, in another --model_path")  # fmt: skip
        state = self.state()
        if self.dist.is_main:
            checkpoint.save(self.folder, state)
        self.dist.barrier()

    def restore(self):
        """Go on from the folder's checkpoint, if it has one; InputError when another command made it."""
        keys, state = self.state(), None
        with self.dist.exit_together_on_error():
            if self.dist.is_main:  # the folder may be on the first machine only
                state = checkpoint.load(self.folder, keys)
                if state:
                    checkpoint.check(state, self.args, self.inputs, self.folder)
        state = self.dist.broadcast(state)
        if state is None:
            return
        self.model.load_state_dict(state["moco"])
        optimizers = state["optimizers"]
        self.optimizer.load_state_dict(
            optimizers[self.dist.rank if len(optimizers) == self.dist.world_size else 0]
        )
        self.data.mined = state["mined"]
        for name in self.PLACE:
            setattr(self, name, state[name])
        if self.dist.is_main:
            for line in checkpoint.told_changes(
                state, self.args.batch_sz, self.dist.world_size, len(self.data)
            ):
                print(line)

    def save_encoder(self):
        """model.pth: the encoder to share, the best epoch's where held-out videos were given."""
        weights = self.best_weights or {
            name: value.cpu() for name, value in self.model.encoder_q.state_dict().items()
        }
        save_torch(
            self.folder / "model.pth",
            {
                "encoder": self.args.encoder,
                "arguments": self.arguments,
                "features": self.features,
                "state_dict": weights,
            },
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
        order = seeded_rng(self.args.seed, self.epoch).permutation(len(self.data)).tolist()
        own, size = self.dist.rank * self.args.batch_sz, self.args.batch_sz
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
        self.dist.broadcast_model(self.model.encoder_q)  # batch statistics differ by process
        names = list(self.data.anchors)
        videos = list(dict.fromkeys([*names, *self.data.negatives]))
        descriptors = encode_distributed(
            self.model.encoder_q, self.data.store, videos, args.padding_size, args.device, self.dist
        )
        row = {video: i for i, video in enumerate(videos)}
        anchors = descriptors[[row[video] for video in names]]
        negatives = descriptors[[row[video] for video in self.data.negatives]]
        excluded = None
        if args.mask_shared or args.pairs == "augment":

            def excluded(rows):
                return torch.stack([self.data.shared(name)[:-1] for name in names[rows]])

        self.data.mined = nearest_negatives(anchors, negatives, args.hard_negatives, excluded)

    def train_step(self, batch):
        """One optimiser step -> loss, logits (N, 1+K) and d loss / d logits. A loss that is not finite stops all dist."""
        indices, *videos, numbers = batch
        anchors, positives, negatives = (
            [part.to(self.args.device, non_blocking=True) for part in side] for side in videos
        )
        seed_torch(self.args.seed, self.step, self.dist.rank)  # dropout
        self.model.train()
        shares = (
            self.data.shares(indices)
            if self.args.mask_shared or self.args.pairs == "augment"
            else None
        )
        logits, labels = self.model(
            anchors, positives, negatives, numbers.to(self.args.device), shares
        )
        logits.retain_grad()
        loss = LOSSES[self.args.loss](logits, labels)
        with self.dist.exit_together_on_error():
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
        return (
            f"the last good checkpoint is {str(path)!r}"
            if path.exists()
            else "there is no checkpoint yet"
        )

    def set_learning_rate(self):
        """Cosine decay to 0, a step an epoch."""
        for group in self.optimizer.param_groups:
            group["lr"] = (
                self.learning_rate * (1 + math.cos(math.pi * self.epoch / self.args.epochs)) / 2
            )
        return group["lr"]

    def score_held_out(self):
        """The held-out set's first figure (DSVR mAP) by --val_metric; a better one than before keeps the weights."""
        chosen, store, queries, database = self.held_out
        encoder = self.model.encoder_q
        self.dist.broadcast_model(encoder)  # batch statistics differ by process
        metric, padding_size, device = (
            self.args.val_metric,
            self.args.padding_size,
            self.args.device,
        )
        table = compare_collections(
            encoder, store, queries, database, [metric], padding_size, device, dist=self.dist
        )
        figures = chosen.evaluate_table(queries, database, table[metric])
        figure = next(iter(figures.values()))
        if figure > self.best:
            self.best, self.best_epoch = figure, self.epoch - 1
            self.best_weights = {
                name: value.cpu().clone() for name, value in encoder.state_dict().items()
            }
        return figures

    def fit(self):
        """Train to the end, or until SIGTERM on any process, which leaves a checkpoint. Returns the exit status."""
        signalled = []
        signal.signal(signal.SIGTERM, lambda *_: signalled.append(True))
        log = training_log.TrainingLog(self.folder, self.step, first=self.dist.is_main)
        total = (
            self.step
            + (self.args.epochs - self.epoch) * self.steps_per_epoch
            - self.seen // self.per_step
        )
        stopped = False
        with tqdm(
            total=total, initial=self.step, unit="step", disable=not self.dist.is_main
        ) as bar:
            while not (self.finished or stopped):
                stopped = self._epoch(log, bar, signalled)
        log.close()
        if stopped:
            if self.dist.is_main:
                tqdm.write(f"stopped at step {self.step}; the same command goes on from here")
            return 128 + signal.SIGTERM
        if self.dist.is_main:
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
            with self.dist.exit_together_on_error():
                batch = next(batches)
            waited = time.perf_counter() - start
            asked = (self.step + 1) % self.args.print_freq == 0
            queue = training_log.queue_metrics(self.model) if asked else {}
            loss, logits, weights = self.train_step(batch)
            bar.update()
            if asked:
                figures = (
                    training_log.step_metrics(loss, logits * self.args.moco_t, weights) | queue
                )
                seconds = time.perf_counter() - start
                figures |= {
                    "data_wait": waited / seconds,
                    "videos_per_s": videos(batch) * self.dist.world_size / seconds,
                }
                figures = training_log.mean_over(self.dist, figures)
                log.write(self.step, self.epoch, lr=rate, **figures)
                bar.set_postfix(
                    loss=f"{figures['loss']:.3f}", videos_per_s=f"{figures['videos_per_s']:.1f}"
                )
            stop = self.dist.any(bool(signalled))
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
    args, dist, data = trainer.args, trainer.dist, trainer.data
    by = f"{dist.world_size} x " if dist.world_size > 1 else ""
    scale = dist.lr_scale(args.use_adasum, args.device)
    if trainer.held_out and (
        note := missing_note(trainer.held_out[0].coverage(trainer.held_out[1]))
    ):
        notes = [*notes, f"note: {args.val_set}: {note}"]
    print(*notes, sep="\n", end="\n" if notes else "")
    print(
        f"{len(data)} pairs, {len(data.negatives)} negatives (without features: {data.missing['pairs']} pairs,"
        f" {data.missing['negatives']} negatives); {args.epochs * trainer.steps_per_epoch} optimiser steps of"
        f" {by}{args.batch_sz} pairs, learning rate {args.learning_rate:g} x {scale} = {trainer.learning_rate:g},"
        f" by {dist.backend}" + (f"; going on from step {trainer.step}" if trainer.step else "")
    )
    if dist.world_size > 1:
        print(
            "the number of processes is a hidden hyper-parameter: more of them make fewer steps of more pairs"
        )


def main():
    dist = init_distributed()
    with dist.exit_together_on_error():
        args = parse(__doc__)
        notes = settle(args, dist)
        trainer = Trainer(args, dist)
        trainer.folder.mkdir(parents=True, exist_ok=True)
    trainer.restore()
    dist.broadcast_model(trainer.model)
    model = trainer.folder / "model.pth"
    if trainer.finished and dist.any(dist.is_main and model.exists()):
        if dist.is_main:
            print(f"{args.model_path}: finished already, at step {trainer.step}; nothing to do")
        return 0
    if dist.is_main:
        settings = {
            "arguments": dict(sorted(vars(args).items())),
            "processes": dist.world_size,
            "engine": dist.backend,
        }
        write_json(trainer.folder / "args.json", settings | provenance())
        announce(trainer, notes)
    status = trainer.fit()
    if status == 0 and dist.is_main:
        best = (
            f", best held-out figure {trainer.best:.4f} after epoch {trainer.best_epoch + 1}"
            if trainer.held_out
            else ""
        )
        print(f"{args.model_path}: model.pth after {trainer.step} steps{best}")
    return status


if __name__ == "__main__":
    run_main(main)
