"""Make the model files that `search.py` ships, and measure what its scores mean.

    python -m videoindex.calibrate pack --pca runs/demo/search/pca.npz \\
        --model_path runs/demo/search/tca --output models/demo
    python -m videoindex.calibrate copies FOLDER --list benchmarks/recordings.csv --output COPIES
    python -m videoindex.calibrate measure COPIES --name lite0
    python -m videoindex.calibrate measure COPIES --name sscd --backbone sscd.onnx --any_weights

`pack` writes pca.npz and model.pth in half precision.

`copies` makes graded copies of real recordings (`videoindex.graded_copies`), in two halves that
share no recording. Its list is a CSV of file (below FOLDER), film, place and half.

`measure` compares all pairs of each half, and writes an entry of models/demo/calibration.json
(`videoindex.calibration`).
"""

import argparse
import os
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import untrusted
import utils
from distributed import run_main
from files import atomic, save_torch, write_json
from model import model_file
from videoindex.calibration import MIN_SIMILARITY, calibrate, print_entry
from videoindex.graded_copies import make_copies, read_recordings
from videoindex.pipeline import SHIPPED, Pipeline

MODEL_OPTIONS = ("backbone", "weights", "encoder", "model_path", "pca", "bars", "window")


def main(argv=None):
    args = parse_args(argv)
    args.run(args)


def parse_args(argv=None):
    parser = utils.Parser(__doc__)
    commands = parser.add_subparsers(required=True, metavar="pack | copies | measure")

    def add_command(name, run, help):
        command = commands.add_parser(
            name, help=help, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        command.set_defaults(run=run)
        return command

    command = add_command("pack", pack, "write the model's files in half precision")
    command.add_argument("--pca", required=True, help="a file of pca.py")
    command.add_argument("--model_path", required=True, help="a run's folder, or its model.pth")
    command.add_argument("--output", required=True, help="folder to write to")

    command = add_command("copies", write_copies, "make graded copies of recordings")
    command.add_argument("recordings", help="folder of the recordings")
    command.add_argument("--list", required=True, help="CSV of file, film, place and half")
    command.add_argument("--output", required=True, help="folder to write to")

    command = add_command("measure", measure, "write an entry of calibration.json")
    command.add_argument("copies", help="folder that `copies` wrote")
    command.add_argument("--name", required=True, help="of the entry")
    command.add_argument(
        "--calibration", default=str(SHIPPED / "calibration.json"), help="file of the entry"
    )
    command.add_argument("--work", help="folder for the indexes (default: the copies')")
    command.add_argument("--min_similarity", type=float, default=MIN_SIMILARITY)
    command.add_argument(
        "--any_weights",
        action="store_true",
        help="let the entry hold for other weights and forms of the network too",
    )
    for name in MODEL_OPTIONS:
        kind = int if name == "window" else str
        command.add_argument(f"--{name}", type=kind, help="as for search.py index")
    return parser.parse_args(argv)


# --- pack ---------------------------------------------------------------------------------------


def pack(args):
    """Write pca.npz and model.pth with the large arrays in half precision."""
    output = Path(args.output)
    pca_path = utils.require_path(args.pca, "pca")
    arrays = untrusted.load_npz(pca_path, "pca", "is it a .npz of pca.py?")
    for name, array in arrays.items():
        if array.ndim:
            # Mean and variances span orders of magnitude, so they stay in float32.
            dtype = np.float16 if name == "components" else np.float32
            arrays[name] = array.astype(dtype)
    with atomic(output / "pca.npz") as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, **arrays)

    path = model_file(args.model_path)
    saved = untrusted.load_torch(path)
    if not isinstance(saved, dict) or not isinstance(saved.get("state_dict"), dict):
        raise utils.InputError(f"{str(path)!r} is not a model.pth of train.py; give a run's folder")
    halves = {}
    for name, value in saved["state_dict"].items():
        halves[name] = value.half() if value.is_floating_point() else value
    save_torch(output / "model.pth", {**saved, "state_dict": halves})

    for name in ("pca.npz", "model.pth"):
        megabytes = (output / name).stat().st_size / 1e6
        print(f"{output / name}: {megabytes:.1f} MB")


# --- copies -------------------------------------------------------------------------------------


def write_copies(args):
    recordings = read_recordings(Path(args.list), utils.require_path(args.recordings, "recordings"))
    with tqdm(unit="video", disable=None) as bar:

        def on_video(name, reason):
            bar.update()
            if reason:
                bar.write(f"left out {name}: {reason}", file=sys.stderr)

        make_copies(recordings, Path(args.output), on_video)


# --- measure ------------------------------------------------------------------------------------


def measure(args):
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", utils.available_cores())))
    copies = utils.require_path(args.copies, "copies")
    options = {
        name: getattr(args, name) for name in MODEL_OPTIONS if getattr(args, name) is not None
    }
    pipeline = Pipeline(**options)
    entry = calibrate(copies, pipeline, Path(args.work or copies), args.min_similarity)
    if args.any_weights:
        for part in ("weights", "backbone", "stages", "pooling"):
            entry["identity"].pop(part)
        entry["identity"]["backbone"] = args.name
    path = Path(args.calibration)
    advice = "make it again or remove it"
    entries = untrusted.read_json(path, "calibration", advice) if path.exists() else {}
    write_json(path, entries | {args.name: entry})
    print_entry(args.name, entry)


if __name__ == "__main__":
    run_main(main)
