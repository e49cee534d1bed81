"""Train a video encoder by supervised contrastive learning on VCDB's pairs (TCA section 3.3).

One step: encode N anchors (query encoder), their positives and 16 background videos per anchor
(momentum encoder); compare with the bank of K earlier background videos; circle loss.

    # the paper's recipe, in one process
    python train.py --annotation_path datasets/annotations/vcdb.pickle \\
        --feature_path vcdb.hdf5 --model_path runs/tca

    # 8 processes on one machine, by either launcher; --batch_sz counts the pairs of each process
    torchrun --standalone --nproc_per_node 8 train.py ...
    horovodrun -np 8 -H localhost:8 python train.py ... --use-adasum --fp16-allreduce
    # the released command; its half precision loses the steps at the end of the decay
    # (docs/training.md)

    # 2 machines of 4 processes
    torchrun --nnodes 2 --nproc_per_node 4 --rdzv_backend c10d --rdzv_endpoint FIRST:29500 \\
        train.py ...
    horovodrun -np 8 -H FIRST:4,SECOND:4 --mpi-args="--prefix $PWD/.venv" python train.py ...

    # few videos of your own: start near the identity, learn faster, stop early by a validation set
    python train.py --annotation_path pairs.pickle --feature_path mine.hdf5 \\
        --model_path runs/mine --init near_identity --learning_rate 3e-4 \\
        --val_set DEMO-VAL --val_feature_path val.hdf5 --patience 5

    # videos without annotation: positives are made from a video's own frames
    python train.py --pairs augment --feature_path mine.hdf5 --model_path runs/mine \\
        --init near_identity

The folder --model_path gets model.pth (the encoder, for evaluation.py), checkpoint.pth (the whole
state) and the one before it, log.jsonl (training_log.py defines its metrics), TensorBoard events
and args.json. The same command resumes an interrupted run, after any step. The resumed run ends
with the same weights, bit for bit in one process, to float tolerance in several. The number of
processes may change in between. A complete run is left alone.

In several processes each takes --batch_sz pairs per step, together one slice of the epoch's
shuffle. So 1 process of 2B pairs and 2 processes of B see the same pairs, negatives and bank.
Without dropout they also learn the same. Exceptions: encoders with batch norm, and --loss
circle-released; both use only the pairs of their own process. An epoch takes every pair once,
without the shuffle's tail that does not fill a step, as in the released code. The learning rate is
scaled as in the released recipe, and printed.
"""

import math
import os
from functools import partial
from typing import NamedTuple

import torch

from batches import PairLoader
from checkpoint import Run
from data import (
    AUGMENTATIONS,
    DEFAULT_MIX,
    AugmentedPairDataset,
    VCDBPairDataset,
    nearest_negatives,
)
from datasets.evaluation_set import EvaluationSet, missing_note, videos_with_features
from datasets.registry import ANNOTATION_DIR, EVALUATION_SETS, load_evaluation_set
from distributed import default_device, init_distributed, run_main
from features.on_device import FramesOnDevice
from features.row_checks import zero_row_notes
from features.store import FeatureStore, warn_if_features_differ
from losses import LOSSES
from model import ENCODERS, MoCo, encoder_arguments
from retrieval.compare import compare_collections
from retrieval.encode import check_feature_size, encode_distributed, level_of, levels_of
from retrieval.similarity import METRICS
from training_log import TrainingLog
from utils import InputError, Parser, check_ranges, digest, seed_torch


def main(argv=None):
    dist = init_distributed()
    with dist.exit_together_on_error():  # bad input on any process ends all of them
        args = parse_args(argv)
        notes = validate_args(args, dist)
        set_arithmetic(args)

        # Data: a pair is an anchor, its positive and M negatives: background videos. Frames (T, C).
        store = FeatureStore(args.feature_path, args.pca_components)
        data = load_pairs(args, store, dist)
        frames = load_frames(data, args)  # on the device, with --features_on device

        # Model: the encoder, its momentum copy, and the bank (MoCo's queue) of K negatives.
        seed_torch(args.seed)
        encoder_settings = encoder_arguments(args.encoder, store.feature_size, args)
        encoder = ENCODERS[args.encoder](**encoder_settings)  # (N, T, C) -> (N, D)
        model = MoCo(
            encoder,
            dim=encoder.descriptor_size,  # D
            K=args.moco_k,
            m=args.moco_m,
            T=args.moco_t,
            gather=partial(dist.all_gather, same_length=True),  # all processes share one bank
            amp=torch.bfloat16 if args.amp else None,
        ).to(args.device)

        # Loss and optimiser. optimizer.step() first averages the gradients of all processes (or
        # combines them by Adasum).
        criterion = LOSSES[args.loss]
        learning_rate = args.learning_rate * dist.lr_scale(args.use_adasum, args.device)
        optimizer = build_optimizer(args, encoder, learning_rate, dist)

        # Validation set, or None, and the run's folder.
        val = load_val_set(args, encoder, store)
        encoder_info = dict(encoder=args.encoder, arguments=encoder_settings, features=store.meta)
        inputs = input_digests(store, data, val)  # a resumed run must have the same
        run = Run(args, dist, data, model, optimizer, encoder_info, inputs)

    with run:  # its folder is locked
        return train(run, frames, criterion, learning_rate, val, notes)


def train(run, frames, criterion, learning_rate, val, notes):
    """Take the remaining epochs of a run. Returns the exit status."""
    args, dist, data = run.args, run.dist, run.data
    model, optimizer, encoder = run.model, run.optimizer, run.model.encoder_q
    run.require_same_command()  # in all processes
    run.resume()  # from checkpoint.pth, if there is one
    dist.broadcast_model(model)  # all processes start from the same weights
    if run.is_written:
        print0(dist, f"{run.folder} is complete, at step {run.step}; nothing to do")
        return 0
    run.save_arguments()
    print0(dist, run_summary(args, run, val, learning_rate, notes))

    # A signal, such as Ctrl-C, ends the run after the current step, with a checkpoint.
    with run.stop_on_signals(), load_batches(data, args, dist) as loader:
        with TrainingLog(run, args.print_freq) as log:
            for epoch in run.remaining_epochs():
                adjust_learning_rate(optimizer, learning_rate, epoch, args.epochs)
                # A resumed epoch already has its own hard negatives, from the checkpoint.
                if args.hard_negatives and run.at_epoch_start:
                    data.hard_negatives = find_hard_negatives(encoder, data, args, dist)
                batches = loader.epoch(run.epoch, run.seen)  # those that are left
                train_one_epoch(model, criterion, optimizer, batches, frames, run, log)
                if run.epoch_complete:  # else a signal came in the middle of it
                    if val:
                        metrics = validate(encoder, val, args, dist)
                        log.write(epoch, held_out=metrics)
                        run.keep_best(next(iter(metrics.values())))  # by the first metric
                    run.next_epoch()
                    run.save()  # after validation: no resumed run skips a score
        if not run.interrupted:
            print_zero_rows(dist, data.store, val)
        return write_result(run, val)


def train_one_epoch(model, criterion, optimizer, batches, frames, run, log):
    """Take the remaining steps of an epoch. After a signal, save a checkpoint and return.

    No line waits for a GPU, except where a log line is written: work is queued there ahead of what
    it computes. So shapes come from num_frames, which stay on the CPU.
    """
    args, dist = run.args, run.dist
    model.train()
    for batch in log.timed(run.keep_in_step(batches)):
        # N anchors and positives, N*M negatives, each as packed frames and num_frames.
        batch = batch_to_device(batch, args.device, frames)
        indices, anchors, positives, negatives, negative_ids = batch
        # A function, ids of the bank's entries (K,) -> (N, K) bool; None if all are negatives.
        is_false_negative = run.data.false_negative_mask(indices)
        seed_torch(args.seed, run.step, dist.rank)  # dropout; the same in a resumed run

        # One call updates the key encoder (momentum m), scores against the bank, and then enqueues
        # the negatives. Logits (N, 1+K) are similarities divided by the temperature: the positive
        # in column 0, then the bank's K entries. So labels (N,) are 0.
        logits, labels = model(anchors, positives, negatives, negative_ids, is_false_negative)
        logits.retain_grad()  # for the log: on which negatives the gradient falls
        loss = criterion(logits, labels)

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

        run.note_loss(loss, indices, negative_ids)  # if it is not finite, all processes end
        run.next_step()
        lr = optimizer.param_groups[0]["lr"]
        log.write_step(loss, logits, lr)  # before saving: no saved step lacks its line
        run.save_if_due()


def validate(encoder, val, args, dist):
    """Metrics of the validation set by --val_metric: {name: value}. The first one decides."""
    dist.broadcast_model(encoder)  # the processes' batch statistics differ
    similarities = compare_collections(
        encoder,
        val.store,
        val.queries,
        val.database,
        [args.val_metric],
        padding_size=args.padding_size,
        device=args.device,
        dist=dist,
    )[args.val_metric]  # (Q, N)
    return val.annotation.evaluate_table(val.queries, val.database, similarities)


def find_hard_negatives(encoder, data, args, dist):
    """The --hard_negatives nearest background videos of each anchor, by the current encoder.

    Returns negative ids (anchors, H), -1 where there are fewer.
    """
    dist.broadcast_model(encoder)  # as in validate
    anchors = list(data.anchors)
    videos = list(dict.fromkeys([*anchors, *data.negatives]))
    descriptors = encode_distributed(
        encoder, data.store, videos, args.padding_size, args.device, dist
    )  # (videos, D)
    row = {video: i for i, video in enumerate(videos)}  # a negative may be an anchor too
    queries = descriptors[[row[video] for video in anchors]]
    negatives = descriptors[[row[video] for video in data.negatives]]
    excluded = data.false_negatives_of_anchors if data.masks_false_negatives else None
    return nearest_negatives(queries, negatives, args.hard_negatives, excluded)


def adjust_learning_rate(optimizer, learning_rate, epoch, epochs):
    """Cosine decay to 0, changed once per epoch."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * (1 + math.cos(math.pi * epoch / epochs)) / 2


def batch_to_device(batch, device, frames=None):
    """The batch with frames and ids on the device; num_frames stay on the CPU.

    frames: the FramesOnDevice that the batch holds row numbers of, or None if it holds rows.
    """
    indices, *sides, negative_ids = batch
    moved = []
    for x, num_frames in sides:
        x = x.to(device, non_blocking=True)  # pinned by the loader
        moved.append((frames.gather(x) if frames else x, num_frames))
    return indices, *moved, negative_ids.to(device, non_blocking=True)


# --- building the data, the optimiser and the validation set ---


def load_pairs(args, store, dist):
    """The training pairs. InputError when they do not fill a step."""
    options = dict(
        padding_size=args.padding_size,
        random_sampling=args.random_sampling,
        neg_num=args.neg_num,
        mask_shared=args.mask_shared,
        seed=args.seed,
        readers=args.num_readers,
    )
    if args.pairs == "augment":
        data = AugmentedPairDataset(store, args.annotation_path, args.augment, **options)
    else:
        data = VCDBPairDataset(args.annotation_path, store, args.min_overlap, **options)
    pairs_per_step = args.batch_sz * dist.world_size
    if len(data) < pairs_per_step:
        raise InputError(
            f"{len(data)} pairs do not fill one step of {pairs_per_step}; lower --batch_sz"
        )
    return data


def load_frames(data, args):
    """The pairs' and negatives' frames on the device with --features_on device, else None."""
    if args.features_on == "host":
        return None
    videos = dict.fromkeys(video for pair in data.pairs for video in pair)
    videos = list(videos | dict.fromkeys(data.negatives))
    frames = FramesOnDevice(data.store, videos, args.device)
    data.frames = frames.numbers
    return frames


def load_batches(data, args, dist):
    """The PairLoader of the run."""
    pin_memory = args.device.startswith("cuda")
    return PairLoader(data, args.batch_sz, dist, args.epochs, args.num_workers, pin_memory)


OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}


def build_optimizer(args, encoder, learning_rate, dist):
    options = dict(lr=learning_rate, weight_decay=args.weight_decay)
    options["fused"] = True  # one pass over the weights, where plain Adam takes ten
    if args.optimizer == "sgd":
        options["momentum"] = args.momentum
    optimizer = OPTIMIZERS[args.optimizer](encoder.parameters(), **options)
    parameters = list(encoder.named_parameters())
    return dist.wrap(optimizer, parameters, args.use_adasum, args.fp16_allreduce)


class ValidationSet(NamedTuple):
    annotation: EvaluationSet
    store: FeatureStore
    queries: list[str]  # with features
    database: list[str]


def load_val_set(args, encoder, train_store):
    """The validation set --val_set, or None. InputError when `encoder` cannot be scored."""
    if not args.val_set:
        return None
    store = FeatureStore(args.val_feature_path)
    annotation = load_evaluation_set(args.val_set, args.annotation_dir, store)
    val = ValidationSet(annotation, store, *videos_with_features(annotation, store))
    coverage = annotation.coverage(store)
    task, empty = next(iter(coverage["queries_without_relevant"].items()))
    if empty == len(val.queries):
        raise InputError(
            f"no query of {args.val_set} has a video to find ({task}) in {str(store.path)!r};"
            " add features of more videos"
        )
    check_feature_size(encoder, store)
    if level_of(args.val_metric) not in levels_of(encoder):
        raise InputError(
            f"--val_metric {args.val_metric} compares frames, and {args.encoder} describes"
            " whole videos only"
        )
    warn_if_features_differ(train_store.meta, store, "this run")
    return val


def input_digests(store, data, val):
    """Content hashes of the files that the result depends on: {what the files are: hash}."""
    digests = {"features": store.fingerprint(), "annotation": data.digest}
    if val:
        digests["held_out"] = digest([val.store.fingerprint(), val.annotation.fingerprint()])
    return digests


# --- the result and what is printed ---


def write_result(run, val):
    """Write model.pth, unless a signal interrupted the run, and report. Returns the exit status."""
    if run.interrupted:
        print0(run.dist, f"stopped at step {run.step}; the same command resumes from here")
        run.dist.barrier()  # a launcher ends the others when the first exits
        return 128 + run.interrupted
    run.save_encoder()
    best = ""
    if val:
        best = f", best validation metric {run.best:.4f} after epoch {run.best_epoch + 1}"
    print0(run.dist, f"{run.folder}: model.pth after {run.step} steps{best}")
    return 0


def run_summary(args, run, val, learning_rate, notes):
    """What the run is, as lines of text."""
    dist, data = run.dist, run.data
    missing = f"{data.missing['pairs']} pairs, {data.missing['negatives']} negatives"
    processes = f"{dist.world_size} x " if dist.world_size > 1 else ""
    scale = dist.lr_scale(args.use_adasum, args.device)
    resumed = f"; resuming at step {run.step}" if run.step else ""
    lines = [f"note: {note}" for note in notes]
    if val and (val_missing := missing_note(val.annotation.coverage(val.store))):
        lines.append(f"note: {args.val_set}: {val_missing}")
    lines += own_negative_notes(args, data)
    lines.append(
        f"{len(data)} pairs, {len(data.negatives)} negatives (without features: {missing});"
        f" {args.epochs * run.steps_per_epoch} optimiser steps of {processes}{args.batch_sz} pairs,"
        f" learning rate {args.learning_rate:g} x {scale} = {learning_rate:g}, by {dist.backend}"
        + resumed
    )
    if dist.world_size > 1:
        lines.append(
            "the number of processes is a hidden hyper-parameter:"
            " more of them take fewer steps of more pairs"
        )
    return "\n".join(lines)


def print_zero_rows(dist, store, val):
    """Name the videos with rows of zeros that any process has read."""
    for one in [store, *([val.store] if val else [])]:
        videos = dist.gather_to_main(one.videos_with_zero_rows())  # each process read its share
        if dist.is_main:
            for note in zero_row_notes(set().union(*videos), one.path):
                print(f"note: {note}")


def own_negative_notes(args, data):
    """Notes on annotations in which a video is its own positive, or an anchor's own a negative."""
    notes = []
    if data.self_pairs:
        notes.append(f"note: {data.self_pairs} pairs of a video with itself are left out")
    if data.own_negatives and args.pairs == "vcdb":  # by --pairs augment every video is a negative
        anchors = ", ".join(list(data.own_negatives)[:3])
        notes.append(
            f"note: of {len(data.own_negatives)} anchors ({anchors}, ...) the video itself or one"
            " paired with it is among the negatives; for these anchors it does not count as one"
        )
    return notes


def print0(dist, text):
    if dist.is_main:
        print(text)


# --- arguments ---


def parse_args(argv=None):
    parser = Parser(__doc__)
    add_data_arguments(parser.add_argument_group("data"))
    add_encoder_arguments(parser.add_argument_group("encoder (defaults in brackets, per encoder)"))
    add_contrast_arguments(parser.add_argument_group("contrastive learning"))
    add_optimisation_arguments(parser.add_argument_group("optimisation"))
    add_validation_arguments(
        parser.add_argument_group("validation set: keep the best epoch, early stopping")
    )
    add_run_arguments(parser.add_argument_group("the run"))
    return parser.parse_args(argv)


def add_flag(group, *flags, default=None, help="", **options):
    """Add a flag. If it has a default, that sets its type, and the help names it."""
    if default is not None:
        options |= dict(default=default, type=type(default))
        help = f"{help} (default %(default)s)".lstrip()
    group.add_argument(*flags, help=help, **options)


def add_data_arguments(group):
    add = partial(add_flag, group)
    add(
        *("-ap", "--annotation_path"),
        help="pickle of VCDB's form: pairs, and background videos as negatives;"
        " with --pairs augment also a text file with one id per line, or nothing",
    )
    add("-fp", "--feature_path", required=True, help="HDF5 file with the videos' features")
    add("-mp", "--model_path", required=True, help="folder of this run, made or resumed")
    add(
        "--pairs",
        choices=["vcdb", "augment"],
        default="vcdb",
        help="positives: the annotation's pairs, or each video's own frames with all others as"
        " negatives",
    )
    add(
        "--augment",
        nargs="+",
        choices=AUGMENTATIONS,
        help="what --pairs augment does to a video, each half the time, in this order"
        f" (default {' '.join(DEFAULT_MIX)}; shuffle is for recurrent encoders)",
    )
    add("-pc", "--pca_components", type=int, help="size the features must have (default: any)")
    add(
        *("-ps", "--padding_size"),
        default=300,
        help="frames of a longer video, cropped at random; the paper's text says 64, 0 takes all",
    )
    add(
        *("-rs", "--random_sampling"),
        action="store_true",
        help="thin a longer video to random frames instead of cropping it",
    )
    add(
        "--min_overlap",
        default=0.0,
        help="leave out pairs that share less of either video; 29 %% of VCDB's share less than .1",
    )
    add(
        "--mask_shared",
        action="store_true",
        help="mask bank entries that show the anchor's own material; needs 'segments' in the"
        " annotation, and matters where all videos come from few films",
    )
    add(
        *("-nw", "--num_workers"),
        default=0,
        help="processes that load data; raise it when the log's data_wait is not small",
    )
    add(
        "-nr", "--num_readers", default=1, help="reader threads per loading process; for slow disks"
    )


def add_encoder_arguments(group):
    add = partial(add_flag, group)
    names = [name for name in ENCODERS if name != "mean"]  # mean has nothing to train
    add("--encoder", choices=names, default="tca")
    add("-nl", "--num_layers", type=int, help="(tca 1, the paper's; lstm, gru 2)")
    add("--nhead", type=int, help="attention heads; must divide the feature size (tca 8)")
    add("--dim_feedforward", type=int, help="size of the layer's inner part (tca 2048)")
    add(
        "--dropout",
        type=float,
        help="(tca, lstm, gru .2, the released code's; the paper reports .5; netvlad, nextvlad .5)",
    )
    add(
        "--init",
        choices=["paper", "near_identity"],
        help="near_identity starts from the features as they are;"
        " try both when videos or steps are few (tca paper)",
    )
    add("-nc", "--num_clusters", type=int, help="centroids (netvlad 256, nextvlad 64)")
    add(
        *("-od", "--output_dim"),
        type=int,
        help="descriptor size (netvlad, nextvlad, lstm, gru 1024; tca's is that of its features)",
    )
    add(
        *("-ni", "--normalize_input"),
        action="store_const",
        const=True,
        help="L2-normalise every frame (netvlad, nextvlad)",
    )


def add_contrast_arguments(group):
    add = partial(add_flag, group)
    add("--loss", choices=LOSSES, default="circle", help="circle-released: the released code's")
    add("-nn", "--neg_num", default=16, help="background videos per pair, added to the bank")
    add(
        "--hard_negatives",
        default=0,
        metavar="N",
        help="before each epoch find every anchor's N nearest background videos by the current"
        " encoder, and draw half of --neg_num from them; encodes all videos once per epoch, and"
        " needs a background without unknown copies; 0: random ones, as the paper",
    )
    add("--moco_k", default=4096, help="bank size; 0: the step's own negatives instead of a bank")
    add("--moco_m", default=0.0, help="momentum of the key encoder; 0 copies the query encoder")
    add("--moco_t", default=1.0, help="temperature; keep 1 for circle, try .07 to 1 for infonce")


def add_optimisation_arguments(group):
    add = partial(add_flag, group)
    add("-e", "--epochs", default=40, help="passes over the pairs")
    add("-bs", "--batch_sz", default=64, help="pairs per step and process; lower it to save memory")
    add(
        *("-lr", "--learning_rate"),
        default=1e-5,
        help="start of a cosine decay over the epochs, for one process; raise it to 1e-4 or 3e-4"
        " for only hundreds of steps, lower it if the loss rises",
    )
    add("--optimizer", choices=OPTIMIZERS, default="adam")
    add("--momentum", type=float, help="of --optimizer sgd (default .9)")
    add("-wd", "--weight_decay", default=1e-4)
    add(
        "--amp",
        choices=["bfloat16"],
        help="run the encoder in bfloat16 where that is safe: faster on processors that have it;"
        " similarities and losses stay float32 (default: float32 throughout)",
    )
    add(
        "--tf32",
        action="store_true",
        help="round the factors of a GPU's float32 products to 11 bits, for up to 7 times as many a"
        " second; three bits more than bfloat16, all else stays float32",
    )
    add(
        "--deterministic",
        action="store_true",
        help="let a GPU use deterministic algorithms only, which are slower; a CPU always does",
    )
    add(
        "--use-adasum",
        action="store_true",
        help="combine the processes' gradients by Adasum instead of their mean;"
        " needs horovodrun and 2, 4, 8, ... processes",
    )
    add(
        "--fp16-allreduce",
        action="store_true",
        help="send gradients between processes in half precision; for slow networks; with"
        " --use-adasum it sends optimiser steps, and those of 1e-6 and below vanish",
    )
    add(
        "--seed",
        default=0,
        help="same seed, same weights, bit for bit, on one machine; on a GPU with --deterministic",
    )


def add_validation_arguments(group):
    add = partial(add_flag, group)
    add(
        "--val_set",
        choices=EVALUATION_SETS,
        help="evaluation set scored after every epoch (default: none, keep the last epoch)",
    )
    add("--val_feature_path", help="its features; never those you report on")
    add("--annotation_dir", default=ANNOTATION_DIR, help="folder of its annotation")
    add(
        "--val_metric",
        choices=[name for name in METRICS if name != "comparator"],
        default="cosine",
        metavar="METRIC",
        help="its first figure by this measure, one of evaluation.py's, decides",
    )
    add("--patience", default=0, help="epochs without a better one before early stopping; 0: never")


def add_run_arguments(group):
    add = partial(add_flag, group)
    add(
        "--device",
        default=default_device(),
        help="cpu, cuda, cuda:1, ...; cuda gives each process of a machine its own GPU",
    )
    add(
        "--features_on",
        choices=["host", "device"],
        default="host",
        help="device: copy the features of all pairs and negatives to the GPU at the start, and"
        " read frames there; host: copy each step's",
    )
    add("-p", "--print-freq", default=10, help="steps between lines of log.jsonl")
    add(
        "--save_every",
        default=200,
        help="steps between checkpoints; one is also written after each epoch and at"
        " Ctrl-C, SIGTERM or SIGUSR1",
    )


COUNTS = ("batch_sz", "neg_num", "num_layers", "nhead", "dim_feedforward", "num_clusters")
COUNTS += ("output_dim", "num_readers", "print-freq", "save_every")
COUNTS_OR_0 = ("seed", "epochs", "patience", "padding_size", "moco_k", "num_workers")
COUNTS_OR_0 += ("hard_negatives",)
RANGES = {
    **dict.fromkeys(COUNTS, (1, math.inf)),
    **dict.fromkeys(COUNTS_OR_0, (0, math.inf)),
    **dict.fromkeys(("learning_rate", "weight_decay", "momentum"), (0, math.inf)),
    **dict.fromkeys(("dropout", "moco_m", "min_overlap"), (0, 1)),
    "moco_t": (1e-3, math.inf),
}


def validate_args(args, dist):
    """Check the arguments and fill in defaults. Returns notes on flags that change nothing."""
    notes = [f"{flag} changes nothing: {reason}" for flag, reason in unused_flags(args, dist)]
    if dist.world_size > 1 and args.use_adasum and args.fp16_allreduce:
        notes.append(
            "warning: --use-adasum --fp16-allreduce sends the optimiser's steps in half precision,"
            " where steps of 1e-6 and below vanish: at the paper's learning rate a quarter of them"
            " by epoch 37 of 40, in the last epoch all; leave --fp16-allreduce out"
        )
    if args.momentum is None:
        args.momentum = 0.9
    if args.augment is None:
        args.augment = list(DEFAULT_MIX)
    given = {
        flag: bounds
        for flag, bounds in RANGES.items()
        if getattr(args, flag.replace("-", "_")) is not None
    }
    check_ranges(args, given)
    if args.annotation_path is None and args.pairs == "vcdb":
        raise InputError(
            "--annotation_path is missing; give VCDB's pairs, or use --pairs augment without it"
        )
    if bool(args.val_set) != bool(args.val_feature_path):
        raise InputError("--val_set and --val_feature_path belong together; give both or neither")
    if args.patience and not args.val_set:
        raise InputError(
            "--patience counts epochs by the validation metric; give --val_set and"
            " --val_feature_path too"
        )
    if args.features_on == "device" and args.pairs == "augment":
        raise InputError(
            "--pairs augment changes frames on the CPU; leave --features_on device out"
        )
    args.device = dist.device(args.device)
    return notes


def set_arithmetic(args):
    """Set how a GPU computes: --tf32 and --deterministic."""
    if not args.device.startswith("cuda"):
        return
    torch.backends.cuda.matmul.allow_tf32 = args.tf32
    torch.backends.cudnn.allow_tf32 = args.tf32  # LSTM and GRU; PyTorch's default is True
    if args.deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # cuBLAS reads it at its first product
        torch.use_deterministic_algorithms(True)


def unused_flags(args, dist):
    """[(flag, why)] for the flags that are given and change nothing here."""
    encoder_flags = {flag for encoder in ENCODERS.values() for flag in encoder.flags.values()}
    others = encoder_flags - set(ENCODERS[args.encoder].flags.values())
    unused = [
        (f"--{flag}", f"--encoder {args.encoder} does not use it")
        for flag in sorted(others)
        if getattr(args, flag) is not None
    ]
    if args.momentum is not None and args.optimizer != "sgd":
        unused.append(("--momentum", "only --optimizer sgd uses it"))
    if args.min_overlap and args.pairs == "augment":
        unused.append(("--min_overlap", "only --pairs vcdb uses it"))
    if args.augment and args.pairs != "augment":
        unused.append(("--augment", "only --pairs augment uses it"))
    if args.random_sampling and not args.padding_size:
        unused.append(("--random_sampling", "--padding_size 0 takes whole videos"))
    if not args.device.startswith("cuda"):
        if args.tf32:
            unused.append(("--tf32", "only GPUs have it"))
        if args.deterministic:
            unused.append(("--deterministic", "the CPU always is"))
    if dist.world_size == 1 and args.use_adasum:
        unused.append(("--use-adasum", "one process has no gradients to join"))
    if dist.world_size == 1 and args.fp16_allreduce:
        unused.append(("--fp16-allreduce", "one process has no gradients to join"))
    return unused


if __name__ == "__main__":
    run_main(main)
