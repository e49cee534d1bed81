"""Frame features of a collection of videos, one row per second, into one HDF5 file.

    P=pre-processing/extract_features.py
    python $P VIDEOS --output features.hdf5                    # a folder and those below it
    python $P list.tsv --output features.hdf5                  # lines `id <tab> path`
    python $P 'VIDEOS/{id}/video.mp4' --output features.hdf5   # a pattern
    python $P VIDEOS --output features.hdf5 --backbone resnet50 --pooling l3_imac

The last makes the paper's features. The default, EfficientNet-Lite0, is fast enough for a CPU.

Decoder processes fill one queue of frames. Batches are cut from it across videos and go through the
backbone and the pooling. A video is written as soon as its last frame is through, so memory follows
the batch, the queue and the rows of unfinished videos, not the length of a video.

The same command resumes a killed run; after a finished one it extracts new and changed videos only.

Several machines or GPUs: give each one of `--shard 0/4` to `--shard 3/4`, or start with torchrun or
horovodrun. Each process extracts the videos of its shard into NAME.0of4.hdf5 and so on;
`convert.py merge` joins them.

Videos that cannot be read are skipped and counted; `--retry_failed` tries them again. NAME.json,
beside NAME.hdf5, lists every video with its frames, seconds, status and reason.

Exit status: 0; 3 if some videos failed; 2 for bad input.
"""

import argparse
import sys
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from distributed import SHARE_TIMEOUT, default_device, init_distributed, run_main
from features.backbones import BACKBONES, WEIGHTS_HELP, build_backbone
from features.decoding import MAX_DECODE_HOURS, MAX_HOURS, TIME_LIMIT, Video
from features.extraction import (
    extraction_settings,
    feature_function,
    resolve_resources,
    update_store,
)
from features.frame_rules import DEFAULT_RULE, EARLIER_NAMES, FRAME_RULES
from features.listing import find_videos, shard_of
from features.pca import load_projection, one_blas_thread
from features.pooling import DEFAULT_POOLING, POOLINGS
from files import Lock
from utils import InputError, Parser

# Options that go to `features.extraction.extract` and `update_store` as they are.
EXTRACT_OPTIONS = (
    "fps",
    "workers",
    "time_limit",
    "max_hours",
    "max_decode_hours",
    "batch_sz",
    "streams",
    "threads",
)
STORE_OPTIONS = ("dtype", "retry_failed")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("input", help="folder, list file of `id <tab> path`, or pattern with {id}")
    add("--output", required=True, help="the feature file to write, NAME.hdf5")
    shard = "extract part I of N (0 to N-1), into NAME.IofN.hdf5"
    add("--shard", type=parse_shard, default=(0, 1), metavar="I/N", help=shard)
    add("--retry_failed", action="store_true", help="try again what failed in an earlier run")
    add_frame_arguments(parser.add_argument_group("frames").add_argument)
    add_feature_arguments(parser.add_argument_group("features").add_argument)
    add_machine_arguments(parser.add_argument_group("machine").add_argument)
    options = parser.parse_args(argv)
    validate(options)
    return options


def add_frame_arguments(add) -> None:
    fps = "frames per second (default 1, the paper's)"
    add("--fps", type=parse_fps, default=Fraction(1), help=fps)
    rule = (
        "which ones: on_screen, what a player shows at each second (default); first_after, the "
        "first frame from there on, which earlier versions took; or the released code's rule"
    )
    add("--frames", choices=FRAME_RULES, type=rule_name, default=DEFAULT_RULE, help=rule)
    limit = "give a video up after so many seconds without a new frame (default %(default)s)"
    add("--time_limit", type=float, default=TIME_LIMIT, help=limit)
    limit = "give a video up that lasts longer, or gives as many frames (default %(default)s)"
    add("--max_hours", type=float, default=MAX_HOURS, help=limit)
    limit = "give a video up that takes longer to decode (default %(default)s)"
    add("--max_decode_hours", type=float, default=MAX_DECODE_HOURS, help=limit)


def add_feature_arguments(add) -> None:
    names = ", ".join(BACKBONES)
    backbone = (
        f"{names} (the paper's: resnet50), FILE.onnx, or a torchvision classifier with --stages"
    )
    add("--backbone", default="efficientnet_lite0", help=backbone)
    stages = "modules of the backbone, or outputs of FILE.onnx, to pool, e.g. layer2,layer3"
    add("--stages", type=lambda text: text.split(","), help=stages)
    add("--weights", help=WEIGHTS_HELP)
    pooling = "default imac; the paper's final rows use l3_imac; not for sscd, which gives vectors"
    add("--pooling", choices=POOLINGS, default=DEFAULT_POOLING, help=pooling)
    add("--pca", help="project by this file of pca.py, or a .npz of the released code")
    add("--components", type=int, help="keep only so many of --pca's components")
    add("--dtype", choices=("float16", "float32"), default="float16", help="default float16")


def add_machine_arguments(add) -> None:
    add("--device", default=default_device(), help="default: a GPU if there is one (%(default)s)")
    amp = "type of the backbone; faster on GPUs, and on CPUs that have it"
    add("--amp", choices=("bfloat16",), help=amp)
    add("--workers", type=int, help="decoder processes (default: this process's share of cores)")
    size = "frames per batch (default: 8 on a CPU, where more is not faster; 64 on a GPU)"
    add("--batch_sz", type=int, help=size)


def rule_name(text: str) -> str:
    """The name of a rule, also by its earlier name."""
    return EARLIER_NAMES.get(text, text)


def parse_fps(text: str) -> Fraction:
    """A number such as 1, 0.5 or 30000/1001."""
    try:
        return Fraction(text)
    except (ValueError, ZeroDivisionError):
        raise InputError(f"--fps {text} must be a number, such as 1, 0.5 or 30000/1001") from None


def parse_shard(text: str) -> tuple[int, int]:
    """(i, n) of the text i/n."""
    i, _, n = text.partition("/")
    if not (i.isdecimal() and n.isdecimal() and int(i) < int(n)):
        raise InputError(
            f"--shard {text} must be I/N with 0 <= I < N, such as 0/4, 1/4, 2/4 and 3/4"
        )
    return int(i), int(n)


def validate(options: argparse.Namespace) -> None:
    if options.components is not None and (options.components < 1 or not options.pca):
        raise InputError(
            "--components must be at least 1, and needs --pca; correct it or leave it out"
        )
    limits = ("time_limit", "max_hours", "max_decode_hours")
    for name in ("fps", "workers", "batch_sz", *limits):
        value = getattr(options, name)
        if value is not None and not 0 < value < float("inf"):
            raise InputError(f"--{name} must be positive, and not {value}")
    output = Path(options.output)
    if output.suffix not in (".hdf5", ".h5") or output.is_dir():
        raise InputError(f"--output {options.output!r} must name a file with suffix .hdf5")


def main(argv: Sequence[str] | None = None) -> int:
    dist = init_distributed(SHARE_TIMEOUT)
    with dist.exit_together_on_error():
        options = parse_args(argv)
        resolve_resources(options, dist)

        # The shard of this process: --shard cut further among the processes of a launcher.
        shard, shards = options.shard
        shard, shards = shard * dist.world_size + dist.rank, shards * dist.world_size
        output = Path(options.output)
        if shards > 1:
            output = output.with_name(f"{output.stem}.{shard}of{shards}{output.suffix}")
        videos = []
        for name, path in find_videos(options.input).items():
            if shard_of(name, shards) == shard:
                videos.append(Video(name, path))

        projection = load_projection(options.pca, options.components) if options.pca else None
        backbone = build_backbone(
            options.backbone, options.weights, options.stages, options.device, options.amp
        )
        if projection:
            what = f"{options.backbone} with {options.pooling}"
            projection.check(sum(backbone.channels), what)
        settings = extraction_settings(options, backbone, projection)
        lock = Lock(output)

    compute_features = feature_function(backbone, options.pooling, projection, options.dtype)
    passed_on = {name: getattr(options, name) for name in STORE_OPTIONS + EXTRACT_OPTIONS}
    passed_on |= {"frame_rule": options.frames, "view": backbone.view}
    with lock, one_blas_thread():
        rows = update_store(output, videos, settings, compute_features, lock=lock, **passed_on)

    failed = sum(row["status"] == "failed" for row in rows.values())
    written = f"{len(rows) - failed} in {output}" if failed < len(rows) else f"no {output} written"
    print(f"{len(rows)} videos: {written}, {failed} failed", file=sys.stderr)
    # All processes end together: a launcher kills the others when one ends with a failure.
    return 3 if dist.any(failed) else 0


if __name__ == "__main__":
    run_main(main)
