"""Frame features of a collection of videos, one row a second, into one HDF5 file.

    python pre-processing/extract_features.py VIDEOS --output features.hdf5                   # a folder, searched through
    python pre-processing/extract_features.py list.tsv --output features.hdf5                 # lines `id <tab> path`
    python pre-processing/extract_features.py 'VIDEOS/{id}/video.mp4' --output features.hdf5  # a pattern
    python pre-processing/extract_features.py VIDEOS --output features.hdf5 --backbone resnet50 --pooling l3_imac

The last is the paper's. Without `--backbone`, EfficientNet-Lite0 keeps pace with a CPU.

Decoder processes fill one queue of frames; batches are cut from it across videos, go through the backbone and the pooling,
and a video is written as soon as its last frame is through. Memory follows the batch and the queue (and the finished rows
of the videos under way), not the length of a video. A killed run goes on where it was when the same command is given again;
a finished one does what is new in the input, and nothing else.

Many machines or GPUs: `--shard 0/4` to `--shard 3/4`, or start with torchrun or horovodrun. Every process does the videos of
its shard, into OUTPUT's NAME.0of4.hdf5 and so on; `convert.py merge` joins them.

A video that cannot be read is named, counted and skipped, now and by the same command again (but for `--retry_failed`).
OUTPUT's neighbour with suffix .json lists every video with its frames, seconds, status and reason. Exit status: 0, or 3 when
some videos failed, or 2 for a bad command.
"""

import sys
from fractions import Fraction
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import utils
from distributed import default_device, init_distributed, run_main
from features import backbones, pca
from features.decoding import FRAME_RULES, TIME_LIMIT, Video
from features.extraction import (
    describe,
    feature_function,
    part_of,
    resolve_resources,
    update_store,
)
from features.listing import find_videos
from features.pooling import POOLINGS
from utils import InputError

# --- the script ------------------------------------------------------------------------------------------------------


def parse(argv=None):
    parser = utils.Parser(__doc__)
    add = parser.add_argument
    add("input", help="folder, list file of `id <tab> path`, or pattern with {id}")
    add("--output", required=True, help="the feature file to write, NAME.hdf5")
    add(
        "--shard",
        type=shard,
        default=(0, 1),
        metavar="I/N",
        help="do part I of N (0 to N-1), into NAME.IofN.hdf5",
    )
    add("--retry_failed", action="store_true", help="try again what failed in an earlier run")
    add(
        "--fps",
        type=rate,
        default=Fraction(1),
        help="frames a second to keep (default 1, the paper's)",
    )
    add(
        "--frames",
        choices=FRAME_RULES,
        default="timestamp",
        help="which: by time (default), or the released code's rule",
    )
    add(
        "--backbone",
        default="efficientnet_lite0",
        help=f"{', '.join(backbones.BACKBONES)} (the paper's: resnet50), or a torchvision classifier with --stages",
    )
    add(
        "--stages",
        type=lambda names: names.split(","),
        help="modules of the backbone whose outputs to pool, e.g. layer2,layer3",
    )
    add("--weights", help="a state dict's file instead of the usual weights, or `random` for tests")
    add(
        "--pooling",
        choices=POOLINGS,
        default="imac",
        help="default imac; the paper's final rows use l3_imac",
    )
    add("--pca", help="project by this file of pca.py (or a released .npz)")
    add("--components", type=int, help="keep only the first so many components of --pca")
    add(
        "--dtype",
        choices=("float16", "float32"),
        default="float16",
        help="of the stored rows (default float16)",
    )
    add(
        "--device",
        default=default_device(),
        help="default: a GPU where there is one (here %(default)s)",
    )
    add(
        "--amp",
        choices=("bfloat16",),
        help="run the backbone in this type; faster on GPUs and on CPUs that have it",
    )
    add(
        "--workers",
        type=int,
        help="decoder processes (default: the cores, shared by this machine's processes)",
    )
    add(
        "--batch_sz",
        type=int,
        help="frames in a batch (default: 8 on a CPU, where more is no faster; 64 on a GPU)",
    )
    add(
        "--time_limit",
        type=float,
        default=TIME_LIMIT,
        help="give a video up after so many seconds of decoding without a new frame (default %(default)s)",
    )
    options = parser.parse_args(argv)
    if options.components is not None and (options.components < 1 or not options.pca):
        raise InputError(
            "--components takes a number from 1 up, and belongs to --pca; correct it or leave it out"
        )
    numbers = (options.fps, options.workers, options.batch_sz, options.time_limit)
    if any(number is not None and not 0 < number < float("inf") for number in numbers):
        raise InputError("--fps, --workers, --batch_sz and --time_limit must be positive")
    if Path(options.output).suffix not in (".hdf5", ".h5") or Path(options.output).is_dir():
        raise InputError(f"--output {options.output!r} must name a file with suffix .hdf5")
    return options


def rate(text):
    """The Fraction of a text such as 1, 0.5 or 30000/1001."""
    try:
        return Fraction(text)
    except (ValueError, ZeroDivisionError):
        raise InputError(f"--fps {text} must be a number, such as 1, 0.5 or 30000/1001") from None


def shard(text):
    """(i, n) of the text i/n."""
    i, _, n = text.partition("/")
    if not (i.isdecimal() and n.isdecimal() and int(i) < int(n)):
        raise InputError(
            f"--shard {text} must be I/N with 0 <= I < N, such as 0/4, 1/4, 2/4 and 3/4"
        )
    return int(i), int(n)


def main(argv=None):
    dist = init_distributed()
    with dist.exit_together_on_error():
        options = parse(argv)
        resolve_resources(options, dist)
        part, parts = (
            options.shard[0] * dist.world_size + dist.rank,
            options.shard[1] * dist.world_size,
        )
        output = Path(options.output)
        if parts > 1:
            output = output.with_name(f"{output.stem}.{part}of{parts}{output.suffix}")
        found = find_videos(options.input)
        videos = [Video(name, path) for name, path in found.items() if part_of(name, parts) == part]
        projection = pca.load_projection(options.pca, options.components) if options.pca else None
        backbone = backbones.build_backbone(
            options.backbone, options.weights, options.stages, options.device, options.amp
        )
        if projection:
            projection.check(sum(backbone.channels), f"{options.backbone} with {options.pooling}")
    features = feature_function(backbone, options.pooling, projection, options.dtype)

    rows = update_store(output, videos, describe(options, backbone, projection), features, options)
    failed = sum(row["status"] == "failed" for row in rows.values())
    written = f"{len(rows) - failed} in {output}" if failed < len(rows) else f"no {output} written"
    print(f"{len(rows)} videos: {written}, {failed} failed", file=sys.stderr)
    return (
        3 if dist.any(failed) else 0
    )  # waits for the others: a launcher ends them all when one ends in failure


if __name__ == "__main__":
    run_main(main)
