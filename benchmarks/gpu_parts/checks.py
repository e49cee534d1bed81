"""What must be equal on the device and on the CPU, to a stated tolerance."""

import copy
import os
import pickle
import signal
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch

from benchmarks.gpu_parts.measuring import (
    ROOT,
    after_each_step,
    arithmetic,
    is_cuda,
    load_script,
)
from features.backbones import build_backbone
from features.pooling import POOLINGS
from features.store import FeatureStore, StoreWriter
from losses import circle
from model import TCA, MoCo, load_encoder
from padding import pack
from retrieval.compare import compare_collections
from utils import seed_torch

C = 64  # channels
STEPS = 6
WEIGHTS = 2e-2  # tolerance of `share_of_change`
CHANGE = "weights, share of their change"


def check(name: str, difference: float, tolerance: float) -> dict:
    """A result: passes where the difference is a number within the tolerance."""
    passes = bool(difference <= tolerance)  # NaN is not
    return {"check": name, "difference": difference, "tolerance": tolerance, "passes": passes}


def share_of_change(found: dict, expected: dict, start: dict) -> float:
    """How far apart two trainings end, as a share of how far the expected one has moved.

    Of state dicts: |found - expected| / |expected - start|, over all values. Adam takes steps of
    one size, so the weights alone would be alike, to the learning rate, whatever the gradients are.
    """

    def distance(one, other):
        return sum(float((one[name].cpu() - other[name].cpu()).square().sum()) for name in start)

    return (distance(found, expected) / distance(expected, start)) ** 0.5


def random_videos(count: int, seed: int = 0) -> list[np.ndarray]:
    """Frames (T, C) in half precision, each video around a direction of its own."""
    rng = np.random.default_rng(seed)
    videos = []
    for T in rng.integers(3, 120, count):
        frames = rng.normal(size=(1, C)) + 0.5 * rng.normal(size=(T, C))
        videos.append((frames / np.linalg.norm(frames, axis=1, keepdims=True)).astype(np.float16))
    return videos


# --- a training step ----------------------------------------------------------------------------


def step(options: Namespace) -> dict:
    """Losses and weights of some steps of MoCo, in float32 and in bfloat16."""
    checks = []
    for kind, tolerance in (("float32", 1e-3), ("bfloat16", 1e-1)):
        with arithmetic(kind) as amp:
            losses, weights, start = train_moco("cpu", amp)
            found_losses, found_weights, _ = train_moco(options.device, amp)
        relative = max(abs(a - b) / abs(b) for a, b in zip(found_losses, losses, strict=True))
        checks.append(check(f"training, {kind}: losses, relative", relative, tolerance))
        if kind == "float32":  # in bfloat16 the sign of a small gradient is noise
            change = share_of_change(found_weights, weights, start)
            checks.append(check(f"training, {kind}: {CHANGE}", change, WEIGHTS))
    return {"checks": checks}


def train_moco(device: str, amp: torch.dtype | None) -> tuple[list[float], dict, dict]:
    """(losses, the query encoder's weights, those of the start) of STEPS steps without dropout."""
    seed_torch(0)
    model = MoCo(TCA(C, 4, dropout=0.0), C, K=256, m=0.5, amp=amp)
    start = copy.deepcopy(model.encoder_q.state_dict())
    model.to(device)
    optimizer = torch.optim.Adam(model.encoder_q.parameters(), 1e-5, weight_decay=1e-4, fused=True)
    losses = []
    for number in range(STEPS):
        sides = []
        for side, count in enumerate((4, 4, 16)):  # anchors, positives, negatives
            x, num_frames = pack(random_videos(count, seed=10 * number + side))
            sides.append((x.to(device), num_frames))
        logits, labels = model(*sides)
        loss = circle(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    return losses, model.encoder_q.state_dict(), start


# --- evaluation ---------------------------------------------------------------------------------


def evaluation(options: Namespace) -> dict:
    """Similarities by every metric but the comparator's, and by bfloat16."""
    path = options.folder / "evaluation.hdf5"
    with StoreWriter(path) as writer:
        for i, rows in enumerate(random_videos(60, seed=1)):
            writer.add(f"v{i:02}", rows)
    store = FeatureStore(path)
    names, seen = list(store), {}
    seed_torch(0)
    encoder = TCA(C, 4, dropout=0.0).eval()
    exact = ["cosine", "euclidean", "chamfer", "sym_chamfer", "dp", "tn"]
    rows = [(metric, "float32", 1e-3) for metric in exact]
    rows += [("cosine", "bfloat16", 2e-2), ("chamfer", "bfloat16", 2e-2)]
    checks = []
    for kind, metrics in (("float32", exact), ("bfloat16", ["cosine", "chamfer"])):
        for device in ("cpu", options.device):
            with arithmetic(kind) as amp:
                seen[device] = compare_collections(
                    copy.deepcopy(encoder),
                    store,
                    names[:10],
                    names,
                    metrics,
                    device=device,
                    amp=amp,
                )
            if device == "cpu":
                expected = seen[device]
        for metric, row_kind, tolerance in rows:
            if row_kind == kind:
                difference = float(np.abs(seen[options.device][metric] - expected[metric]).max())
                checks.append(check(f"similarities, {kind}: {metric}", difference, tolerance))
    return {"checks": checks}


# --- extraction ---------------------------------------------------------------------------------


def extraction(options: Namespace) -> dict:
    """Rows of EfficientNet-Lite0 with made-up weights; of the demo's film where av is installed."""
    frames, source = film_frames(8)
    x = torch.from_numpy(frames).permute(0, 3, 1, 2)
    rows = {}
    for device in ("cpu", options.device):
        with arithmetic("float32"):
            backbone = build_backbone("efficientnet_lite0", "random", device=device)
            stages = backbone(x)
            rows[device] = torch.cat([POOLINGS["imac"](stage) for stage in stages], 1).cpu()
            if device == "cpu":
                expected = rows[device]
    difference = float((rows[options.device] - expected).abs().max())
    with arithmetic("tf32"):
        stages = backbone(x)
        rounded = torch.cat([POOLINGS["imac"](stage) for stage in stages], 1).cpu()
    note = f"{source}; with TF32, PyTorch's default in convolutions, rows differ by"
    note += f" {float((rounded - expected).abs().max()):.1e}"
    return {"checks": [check("extraction: rows", difference, 1e-3)], "notes": [note]}


def film_frames(count: int) -> tuple[np.ndarray, str]:
    """(count, 224, 224, 3) uint8, and where they are from."""
    try:
        from features.decoding import Video, read_frames
    except ModuleNotFoundError:
        rng = np.random.default_rng(0)
        blocks = rng.integers(0, 256, (count, 14, 14, 3), np.uint8)
        return blocks.repeat(16, 1).repeat(16, 2), "made-up frames, because av is not installed"
    video = Video("film", ROOT / "datasets/demo/film.mp4")
    frames = [frame for frame, _ in zip(read_frames(video), range(count), strict=False)]
    return np.stack(frames), "frames of the demo's film"


# --- runs of train.py ---------------------------------------------------------------------------


def make_run_files(folder: Path) -> list:
    """Features and pairs of a small run; returns the flags that name them."""
    with StoreWriter(folder / "train.hdf5") as writer:
        for i, rows in enumerate(random_videos(80, seed=2)):
            writer.add(f"v{i:02}", rows)
    pairs = [{"videos": [f"v{2 * i:02}", f"v{2 * i + 1:02}"]} for i in range(16)]
    annotation = {"video_pairs": pairs, "negs": [f"v{i:02}" for i in range(32, 80)]}
    (folder / "pairs.pickle").write_bytes(pickle.dumps(annotation))
    flags = ["--annotation_path", folder / "pairs.pickle", "--feature_path", folder / "train.hdf5"]
    flags += ["--neg_num", 4, "--moco_k", 64, "--moco_m", 0.5, "--dropout", 0, "--epochs", 3]
    return [*flags, "--learning_rate", 1e-5]


def start_weights() -> dict:
    """What train.py --seed 0 starts with."""
    seed_torch(0)
    return TCA(C).state_dict()


def trained_weights(folder: Path) -> dict:
    _, encoder, _ = load_encoder(folder)
    return encoder.state_dict()


def resume(options: Namespace) -> dict:
    """A run that SIGTERM stops in its second epoch, and its unbroken like on both devices."""
    main = load_script("train.py").main
    flags = make_run_files(options.folder) + ["--batch_sz", 4]

    def train(name, device):
        run = options.folder / name
        status = main(list(map(str, [*flags, "--model_path", run, "--device", device])))
        return status, run

    _, on_cpu = train("cpu", "cpu")
    _, whole = train("whole", options.device)
    count = 0

    def stop_after_six_steps(*_):
        nonlocal count
        count += 1
        if count == 6:
            os.kill(os.getpid(), signal.SIGTERM)

    with after_each_step(stop_after_six_steps):
        status, stopped = train("stopped", options.device)
    if status != 128 + signal.SIGTERM:
        raise RuntimeError(f"the run that SIGTERM should stop ended with status {status}")
    train("stopped", options.device)
    resumed, unbroken = trained_weights(stopped), trained_weights(whole)
    same = all(resumed[name].equal(unbroken[name]) for name in unbroken)
    start = start_weights()
    difference = share_of_change(unbroken, trained_weights(on_cpu), start)
    resumed_difference = share_of_change(resumed, unbroken, start)
    return {
        "checks": [
            check(f"a run that is stopped and resumed: {CHANGE}", resumed_difference, WEIGHTS),
            check(f"train.py against its run on a CPU: {CHANGE}", difference, WEIGHTS),
        ],
        "notes": [f"the resumed run's weights are {'' if same else 'not '}equal bit for bit"],
    }


def two_processes(options: Namespace) -> dict:
    """Two processes on one device against one process that takes the pairs of both."""
    flags = make_run_files(options.folder) + ["--device", options.device]
    one, two = options.folder / "one", options.folder / "two"
    # Each of two processes steps with twice the learning rate of one: the released rule.
    run_train([], [*flags, "--batch_sz", 8, "--learning_rate", 2e-5, "--model_path", one])
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2]
    run_train(launcher, [*flags, "--batch_sz", 4, "--model_path", two])
    difference = share_of_change(trained_weights(two), trained_weights(one), start_weights())
    return {"checks": [check(f"two processes on one device: {CHANGE}", difference, WEIGHTS)]}


def nccl(options: Namespace) -> dict:
    """torchrun with one process: NCCL on a GPU, gloo on a CPU."""
    engine = "NCCL" if is_cuda(options.device) else "gloo"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 1]
    return one_launched_process(options, f"torchrun, one process, {engine}", launcher)


def horovod(options: Namespace) -> dict:
    """horovodrun with one process, and a sum in it: by NCCL on a GPU."""
    import horovod  # noqa: F401  if it is missing, this part is skipped

    launcher = ["-m", "horovod.runner.launch", "--gloo", "-np", 1, sys.executable]
    result = one_launched_process(options, "horovodrun, one process", launcher)
    engine = "NCCL" if is_cuda(options.device) else "gloo"
    output = options.folder / "difference"
    run([*launcher, "-c", SUM, options.device, output])
    difference = float(output.read_text(encoding="utf-8"))
    result["checks"].append(check(f"a sum of one process by Horovod, {engine}", difference, 0.0))
    return result


SUM = """
import sys, horovod.torch as hvd, torch
hvd.init()
ours = torch.arange(1e6)
found = hvd.allreduce(ours.to(sys.argv[1]), name="sum", op=hvd.Sum)
open(sys.argv[2], "w").write(str(float((found.cpu() - ours).abs().max())))
"""


def one_launched_process(options: Namespace, name: str, launcher: list) -> dict:
    """train.py as one process of a launcher against train.py alone."""
    flags = make_run_files(options.folder) + ["--batch_sz", 4, "--device", options.device]
    plain, launched = options.folder / "plain", options.folder / "launched"
    run_train([], [*flags, "--model_path", plain])
    run_train(launcher, [*flags, "--model_path", launched])
    difference = share_of_change(trained_weights(launched), trained_weights(plain), start_weights())
    return {"checks": [check(f"{name}: {CHANGE}", difference, WEIGHTS)]}


def run_train(launcher: list, flags: list) -> None:
    """Run train.py to its end."""
    run([*launcher, ROOT / "train.py", *flags])


def run(arguments: list) -> None:
    """Run this Python to its end; RuntimeError with the line that says why it failed."""
    command = [sys.executable, *arguments]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=ROOT)
    if result.returncode:
        raise RuntimeError(error_line(result.stderr))


def error_line(text: str) -> str:
    """The line of a process's output that says what went wrong."""
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["it printed nothing"]
    for line in lines:
        if line.startswith(("error:", "process ")) or "Error: " in line:
            return line[:300]
    return lines[-1][:300]
