"""A training step of VCDB's size: 64 anchors and positives, 16 negatives of each, C = 1024.

The released recipe (benchmarks/released.py) against train.py, which runs here as users run it until
enough steps are timed.
"""

import shutil
import time
from argparse import Namespace
from pathlib import Path

import torch

import model
from benchmarks.gpu_parts.measuring import (
    EnoughSteps,
    StepClock,
    after_each_step,
    arithmetic,
    busy,
    load_script,
    measure,
    synchronize,
)
from benchmarks.made_up import LONG, make_videos
from benchmarks.released import PlainStore, PlainTraining, pad_all
from data import VCDBPairDataset

NEGATIVES = 16  # of an anchor
WARM_UP, STEPS = 4, 10
LOADERS = 4  # processes that load data

# Flags of train.py for each way. The features are on the device, except where the name says host.
WAYS = {
    "host": [],
    "device": ["--features_on", "device"],
    "tf32": ["--features_on", "device", "--tf32"],
    "bfloat16": ["--features_on", "device", "--amp", "bfloat16"],
    "compile": ["--features_on", "device", "--amp", "bfloat16"],
}


def size_of(options: Namespace) -> Namespace:
    """What `make_videos` needs: anchors of a step, steps, channels, videos, entries of the bank."""
    steps = WARM_UP + STEPS + StepClock.PROFILED
    if options.small:
        return Namespace(anchors=1, steps=steps, channels=16, videos=60, bank=64)
    anchors = 64
    return Namespace(
        anchors=anchors,
        steps=steps,
        channels=1024,
        videos=2 * (steps + 4) * anchors + 400,
        bank=4096,
    )


def files(options: Namespace) -> dict:
    """Write the made-up videos that the other parts read."""
    size = size_of(options)
    make_videos(options.shared, size)
    return {"notes": [f"{size.videos} made-up videos of {size.channels} channels, read from cache"]}


def released(options: Namespace) -> dict:
    """The released recipe: 300 frames of float32 a video, loaded by one process, then trained."""
    size = size_of(options)
    training = PlainTraining(size.channels, 0.2, size.bank, options.device)
    store = PlainStore(options.shared / "plain.hdf5")
    pairs = options.shared / "pairs.pickle"
    data = VCDBPairDataset(pairs, store, padding_size=LONG, neg_num=NEGATIVES)
    with arithmetic("float32"):
        start = time.perf_counter()
        batch = pad_all([data[i] for i in range(size.anchors)])
        loading = time.perf_counter() - start
        batch = training.to_device(batch)
        repeats = 1 if options.small else 3
        ready = measure(lambda: training.step(*batch), options.device, repeats)
        start = time.perf_counter()
        batch = pad_all([data[i] for i in range(size.anchors, 2 * size.anchors)])
        training.step(*training.to_device(batch))
        synchronize(options.device)
        seconds = time.perf_counter() - start
    whole = {"seconds": seconds, "peak_gib": ready["peak_gib"]}
    return {
        "rows": [
            {"way": "released, loading included", **whole},
            {"way": "released, batch ready on the device", **ready},
        ],
        "notes": [f"the released recipe loads a batch in {loading:.2f} s, in one process"],
    }


def step(options: Namespace, way: str) -> dict:
    """train.py's step by one of WAYS."""
    if way == "compile":
        model.Layer.forward = torch.compile(model.Layer.forward, dynamic=True)
    script, size = load_script("train.py"), size_of(options)
    loaders = 0
    if way == "host" and shared_memory_gib() > 4:
        loaders = 1 if options.small else LOADERS
    flags = ["--annotation_path", options.shared / "pairs.pickle"]
    flags += ["--feature_path", options.shared / "packed.hdf5", "--device", options.device]
    flags += ["--model_path", options.folder / f"run-{way}", "--batch_sz", size.anchors]
    flags += ["--neg_num", NEGATIVES, "--moco_k", size.bank, "--num_workers", loaders]
    clock = StepClock(options.device, WARM_UP, STEPS)
    try:
        with after_each_step(clock):
            script.main(list(map(str, [*flags, *WAYS[way]])))
    except EnoughSteps:
        pass
    row = {
        "way": f"ours, {way}",
        "seconds": clock.seconds,
        "busy": busy(clock.kernel_seconds, clock.seconds),
        "peak_gib": clock.peak_gib,
    }
    return {"rows": [row], "notes": [f"ours, {way}: {loaders} loading processes"]}


def shared_memory_gib() -> float:
    """Free GiB of /dev/shm, through which loading processes hand over their batches."""
    folder = Path("/dev/shm")
    return shutil.disk_usage(folder).free / 2**30 if folder.exists() else 0.0


def host(options: Namespace) -> dict:
    """Features on the host, float32."""
    return step(options, "host")


def device(options: Namespace) -> dict:
    """Features on the device, float32."""
    return step(options, "device")


def tf32(options: Namespace) -> dict:
    """Features on the device, products in TF32."""
    return step(options, "tf32")


def bfloat16(options: Namespace) -> dict:
    """Features on the device, autocast to bfloat16."""
    return step(options, "bfloat16")


def compiled(options: Namespace) -> dict:
    """As bfloat16, the encoder's layer by torch.compile."""
    return step(options, "compile")
