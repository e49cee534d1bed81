"""Frame features of the paper's backbone: ResNet-50 with made-up weights, L3-iMAC.

Ours takes uint8 frames in batches cut across videos and normalises them on the device. The released
way takes one video at a time, its frames normalised to float32 on the host.
"""

import time
from argparse import Namespace
from fractions import Fraction

import numpy as np
import torch

from benchmarks.gpu_parts.measuring import ROOT, arithmetic, is_cuda, measure
from features.backbones import build_backbone
from features.pooling import POOLINGS
from utils import available_cores

CLIP = 60  # frames of a video, the median
BATCH = 64  # frames, as extraction on a GPU takes them


def backbone_of(options: Namespace, kind: str) -> tuple[torch.nn.Module, str]:
    """The backbone and the name of its pooling: the paper's, or a quick one with --small."""
    name, pooling = ("efficientnet_lite0", "imac") if options.small else ("resnet50", "l3_imac")
    amp = "bfloat16" if kind == "bfloat16" else None
    return build_backbone(name, "random", device=options.device, amp=amp), pooling


def frames_of(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 224, 224, 3), np.uint8)


def alone(options: Namespace) -> dict:
    """The backbone and pooling on ready frames, by type, and the released way."""
    rows = [released_row(options)]
    frames = frames_of(8 if options.small else BATCH)
    for kind in ("float32", "tf32", "bfloat16"):
        with arithmetic(kind), torch.inference_mode():
            backbone, pooling = backbone_of(options, kind)

            def one_batch(backbone=backbone, pooling=pooling):
                x = torch.from_numpy(frames)
                x = x.pin_memory() if is_cuda(options.device) else x
                maps = backbone(x.permute(0, 3, 1, 2))
                return torch.cat([POOLINGS[pooling](stage) for stage in maps], 1).cpu()

            row = measure(one_batch, options.device)
        row["seconds"] *= 1000 / len(frames)
        rows.append({"way": f"ours, {kind}", "what": "backbone alone, 1,000 frames", **row})
    return {"rows": rows}


def released_row(options: Namespace) -> dict:
    """One video at a time, float32 frames that the host normalises and sends."""
    count = 4 if options.small else CLIP
    frames = frames_of(count)
    with arithmetic("float32"), torch.inference_mode():
        backbone, pooling = backbone_of(options, "float32")
        mean, std = backbone.mean.cpu(), backbone.std.cpu()

        def one_video():
            x = torch.from_numpy(frames).permute(0, 3, 1, 2).float()
            x = ((x - mean) / std).to(options.device)
            maps = backbone.stages(x).values()
            return torch.cat([POOLINGS[pooling](stage) for stage in maps], 1).cpu()

        row = measure(one_video, options.device)
    row["seconds"] *= 1000 / count
    return {"way": "released", "what": "backbone alone, 1,000 frames", **row}


def whole(options: Namespace) -> dict:
    """Extraction from files, decoding included: the demo's film, once for each core."""
    from features.decoding import Video
    from features.extraction import default_parallelism, extract, feature_function

    cores = 1 if options.small else available_cores()
    film = ROOT / "datasets/demo/film.mp4"
    videos = [Video(str(i), film) for i in range(cores)]
    backbone, pooling = backbone_of(options, "bfloat16")
    features = feature_function(backbone, pooling, None, "float16")
    parallelism = default_parallelism(options.device, cores, "bfloat16")
    features(frames_of(parallelism["batch_sz"]))  # the first call prepares
    start, rows = time.perf_counter(), 0
    fps = Fraction(1, 60) if options.small else Fraction(1)
    for video in extract(videos, features, fps=fps, workers=cores, **parallelism):
        if video.reason:
            raise RuntimeError(f"{film.name}: {video.reason}")
        rows += len(video.rows)
    seconds = time.perf_counter() - start
    note = f"{cores} decoders, {rows} rows, {rows / seconds:.0f} a second"
    row = {"way": "ours, bfloat16", "what": "from files, 1,000 frames"}
    return {"rows": [{**row, "seconds": seconds * 1000 / rows}], "notes": [note]}
