"""The flags of train.py: what they are, what they may be, and which mean nothing beside others."""

import math

import torch

from augment import AUGMENTATIONS, DEFAULT_MIX
from evaluation_sets import ANNOTATION_DIR, EVALUATION_SETS
from losses import LOSSES
from model import ENCODERS
from similarity import METRICS
from utils import InputError, Parser, check_ranges, checked_device, default_device


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
    add("-mp", "--model_path", required=True, help="folder of this run; made when it is not there, resumed when it is")
    add("--pairs", default="vcdb", choices=["vcdb", "augment"], help="where positives come from: the annotation's pairs, or"
        " each video's own frames, with all other videos as negatives (default vcdb)")  # fmt: skip
    add("--augment", nargs="+", choices=AUGMENTATIONS, help="what --pairs augment does to a video, each with a chance of one"
        f" half, in this order (default {' '.join(DEFAULT_MIX)}; shuffle is for recurrent encoders)")  # fmt: skip
    add("-pc", "--pca_components", type=int, help="width the features must have (default: whatever the file has)")
    add("-ps", "--padding_size", type=int, default=300, help="frames of a longer video that a step sees, cropped at random"
        " (default 300; the paper's text says 64; 0 takes all)")  # fmt: skip
    add("-rs", "--random_sampling", action="store_true", help="thin a longer video to random frames instead of cropping it")
    add("--min_overlap", type=float, default=0.0, help="leave out pairs that share less than this part of either video;"
        " 29 %% of VCDB's share less than .1 (default 0: use all, as released)")  # fmt: skip
    add("--mask_shared", action="store_true", help="leave bank entries that show the anchor's own material out of its"
        " negatives; needs 'segments' in the annotation, and matters where all videos come from few films")  # fmt: skip
    add("-nw", "--num_workers", type=int, default=0, help="processes that load data beside the training (default 0: none;"
        " raise it when the log's data_wait is not small)")  # fmt: skip
    add("-nr", "--num_readers", type=int, default=1, help="threads of each loader that read files; for slow file systems")


def _encoder(parser):
    add = parser.add_argument_group("encoder (a default in brackets is of the encoders named)").add_argument
    add("--encoder", default="tca", choices=[name for name in ENCODERS if name != "mean"], help="(default tca)")
    add("-nl", "--num_layers", type=int, help="(tca 1, the paper's; lstm, gru 2)")
    add("--nhead", type=int, help="attention heads; must divide the feature width (tca 8)")
    add("--dim_feedforward", type=int, help="width of the layer's inner part (tca 2048)")
    add("--dropout", type=float, help="(tca, lstm, gru .2, the released code's; the paper reports .5; netvlad, nextvlad .5)")
    add("--init", choices=["paper", "near_identity"], help="near_identity starts from the features as they are; with few"
        " videos or few steps try both (tca paper)")  # fmt: skip
    add("-nc", "--num_clusters", type=int, help="centroids (netvlad 256, nextvlad 64)")
    add("-od", "--output_dim", type=int, help="descriptor size (netvlad, nextvlad, lstm, gru 1024); tca's is its features'")
    add("-ni", "--normalize_input", action="store_true", default=None, help="L2-normalise every frame (netvlad, nextvlad)")


def _contrast(parser):
    add = parser.add_argument_group("contrastive learning").add_argument
    add("--loss", default="circle", choices=LOSSES, help="circle-released is the released code's form of it (default circle)")
    add("-nn", "--neg_num", type=int, default=16, help="new background videos a pair brings to the bank (default 16)")
    add("--hard_negatives", type=int, default=0, metavar="N", help="before each epoch find every anchor's N nearest background"
        " videos by the encoder so far, and draw half of --neg_num from them; encodes all videos once an epoch, and wants"
        " background without unknown copies (default 0: random draws, as the paper)")  # fmt: skip
    add("--moco_k", type=int, default=4096, help="bank size; 0 for none: the step's negatives alone (default 4096)")
    add("--moco_m", type=float, default=0.0, help="momentum of the key encoder; 0 copies the query encoder (default 0)")
    add("--moco_t", type=float, default=1.0, help="temperature; keep 1 for circle, try .07 to 1 for infonce (default 1)")


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
    add("--fp16-allreduce", action="store_true", help="gradients travel between processes in half precision; for networks")
    add("--seed", type=int, default=0, help="the same seed gives the same weights, bit for bit, on one machine (default 0)")


def _held_out(parser):
    add = parser.add_argument_group("held-out videos: keep the best epoch, stop when it is past").add_argument
    add("--val_set", choices=EVALUATION_SETS, help="evaluation set scored after every epoch (default: none, keep the last)")
    add("--val_feature_path", help="its features; never those you report on")
    add("--annotation_dir", default=ANNOTATION_DIR, help="folder of its annotation (default %(default)s)")
    add("--val_metric", default="cosine", choices=[name for name in METRICS if name != "comparator"], metavar="METRIC",
        help="its first figure by this measure, one of evaluation.py's but comparator, decides (default cosine)")  # fmt: skip
    add("--patience", type=int, default=0, help="stop after so many epochs without a better figure (default 0: never)")


def _run(parser):
    add = parser.add_argument_group("the run").add_argument
    add("--device", default=default_device(), help="cpu, cuda, cuda:1, ... (default %(default)s; each process of a machine"
        " takes its own GPU)")  # fmt: skip
    add("-p", "--print-freq", type=int, default=10, help="steps between lines of log.jsonl (default 10)")
    add("--save_every", type=int, default=200, help="steps between checkpoints; one is also written at the end of every epoch"
        " and at SIGTERM (default 200)")  # fmt: skip


RANGES = {
    **dict.fromkeys(("seed", "epochs", "patience", "padding_size", "moco_k", "num_workers", "hard_negatives"), (0, math.inf)),
    **dict.fromkeys(("batch_sz", "neg_num", "num_layers", "nhead", "dim_feedforward"), (1, math.inf)),
    **dict.fromkeys(("num_clusters", "output_dim", "num_readers", "print-freq", "save_every"), (1, math.inf)),
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
        parameters, args.learning_rate, momentum=args.momentum, weight_decay=args.weight_decay, fused=True
    ),
}


def settle(args, processes):
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
    if processes.size == 1:
        flags = {"--use-adasum": args.use_adasum, "--fp16-allreduce": args.fp16_allreduce}
        idle |= {flag: "one process has nothing to join" for flag, given in flags.items() if given}
    args.momentum = 0.9 if args.momentum is None else args.momentum
    args.augment = args.augment or list(DEFAULT_MIX)
    if args.annotation_path is None and args.pairs == "vcdb":
        raise InputError("--annotation_path is missing; give VCDB's pairs, or --pairs augment to do without")
    check_ranges(args, {flag: bounds for flag, bounds in RANGES.items() if getattr(args, flag.replace("-", "_")) is not None})
    args.device = checked_device(processes.device(args.device))
    return [f"note: {flag} changes nothing: {reason}" for flag, reason in idle.items()]
