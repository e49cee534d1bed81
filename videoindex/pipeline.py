"""From video files to the descriptors that `search.py` keeps: decoding, backbone, PCA and encoder in one object.

The parts are those of the other scripts (pre-processing/, evaluation.py); this file only puts them in a row, and says in
`Model.identity` what decides the numbers that come out.
"""

import io
import json
import os
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import utils
from distributed import check_device, default_device
from model import ENCODERS, load_encoder, model_file
from padding import pad
from utils import InputError

SHIPPED = (
    Path(__file__).resolve().parent.parent / "models" / "demo"
)  # pca.npz, model.pth, calibration.json
CALIBRATION = "calibration.json"  # beside an encoder's file: {name: {identity, threshold, ...}}, of datasets/demo/calibrate.py
THUMBNAIL, QUALITY = 112, 70  # pixels a side, JPEG quality: about 3 KB a second of video
WINDOW = 60  # frames that are encoded together, and that one video descriptor stands for


@dataclass
class EncodedVideo:
    """A video in numbers, or the `reason` why there are none.

    frames (T, D) float16 and pieces (P, D) float32, both L2-normalised: one descriptor a sampled frame, one a window;
    thumbnails: T JPEGs; seconds: how long it plays.
    """

    path: Path
    reason: str = ""
    seconds: float = 0.0
    frames: np.ndarray | None = None
    pieces: np.ndarray | None = None
    thumbnails: list | None = None


DEFAULTS = {  # the options of a model; an index keeps them, so that a query need not name them again
    "model_path": None,
    "encoder": None,
    "pca": None,
    "components": None,
    "backbone": "efficientnet_lite0",
    "weights": None,
    "stages": None,
    "pooling": "imac",
    "fps": "1",
    "window": WINDOW,
    "nhead": 8,
}


FILE_OPTIONS = {"model_path", "pca", "weights"}


class Model:
    """Decoder, backbone, pooling, PCA and encoder. Options as `DEFAULTS`, by name; without any, the model that is shipped.

    identity: {part: what it is}; two models of equal identity give descriptors that can be compared.
    calibration: what was measured of this identity, from calibration.json beside the encoder's file, or {}.
    Raises InputError for a part that is missing, unreadable or does not fit the others.
    """

    def __init__(self, device=None, workers=None, **options):
        from features import (  # here: `search.py info` and the like need neither torchvision nor FFmpeg
            backbones,
            pca,
        )

        unknown = set(options) - set(DEFAULTS)
        if unknown:
            raise InputError(
                f"model option {sorted(unknown)[0]!r} is not known; choose from {', '.join(DEFAULTS)}"
            )
        self.given = {name: value for name, value in options.items() if value is not None}
        for name in FILE_OPTIONS & set(self.given):
            if self.given[name] != "random":
                self.given[name] = os.path.abspath(
                    utils.require_path(self.given[name], f"--{name}")
                )
        options = self.options = completed(self.given)
        check(options)
        self.device = check_device(device or default_device())
        self.workers = workers or os.cpu_count()
        self.backbone = backbones.build_backbone(
            options["backbone"], options["weights"], options["stages"], self.device
        )
        self.projection = (
            pca.load_projection(options["pca"], options["components"]) if options["pca"] else None
        )
        channels = sum(self.backbone.channels)
        if self.projection:
            self.projection.check(channels, f"{options['backbone']} with {options['pooling']}")
            channels = self.projection.matrix.shape[1]
        self.encoder, label = self._load_encoder(channels)
        self.identity = {
            "backbone": options["backbone"],
            "weights": self.backbone.weights.rpartition(" sha256 ")[
                2
            ],  # a digest: the file's name and place do not matter
            "stages": ",".join(options["stages"] or ["default"]),
            "pooling": options["pooling"],
            "pca": self.projection.label.rpartition(" sha256 ")[2] if self.projection else "none",
            "encoder": label,
            "size": self.encoder.descriptor_size,
            "fps": str(options["fps"]),
            "window": options["window"],
        }
        self.calibration = read_calibration(calibration_folder(self.given), self.identity)

    def _load_encoder(self, channels):
        """(encoder, what tells it from others)"""
        path, wanted = self.options["model_path"], self.options["encoder"]
        if path is None:
            return ENCODERS["mean"](channels), "mean"
        name, encoder, _ = load_encoder(path, self.options["nhead"])
        if wanted and wanted != name:
            raise InputError(
                f"{str(path)!r} holds a {name!r} encoder, not {wanted!r}; leave --encoder out"
            )
        if encoder.feature_size != channels:
            raise InputError(
                f"the encoder of {str(path)!r} takes {encoder.feature_size} channels, the features have {channels};"
                " give the --pca, --components and --backbone that it was trained with"
            )
        return encoder.to(
            self.device
        ).eval(), f"{name} sha256 {utils.file_sha256(model_file(path))[:16]}"

    def describe(self, paths):
        """Yield a `EncodedVideo` for each of `paths`, as they are finished (not in order)."""
        from features.decoding import Video
        from features.extraction import default_parallelism, extract, feature_function

        rows_of = feature_function(self.backbone, self.options["pooling"], None, np.float16)
        thumbnails = {}

        def watch(video, frame):
            thumbnails.setdefault(video, []).append(thumbnail(frame))

        videos = [Video(str(path), Path(path)) for path in paths]
        for video in extract(
            *(videos, rows_of),
            fps=Fraction(self.options["fps"]),
            workers=self.workers,
            watch=watch,
            **default_parallelism(self.device, self.workers),
        ):
            jpegs = thumbnails.pop(video, [])
            if video.reason:
                yield EncodedVideo(video.path, video.reason)
                continue
            rows = np.stack(video.rows)
            video.rows.clear()
            yield EncodedVideo(video.path, "", video.seconds, *self.encode(rows), jpegs)

    @torch.inference_mode()
    def encode(self, rows):
        """Backbone rows (T, C) -> frame descriptors (T, D) float16 and descriptors of its windows (P, D) float32.

        A longer video is cut into equal windows of at most `window` frames, so that memory stays linear in its length and a
        short excerpt is not lost in the mean of a long film. One of a single window gets what evaluation.py gives it.
        """
        if self.projection:
            rows = self.projection(rows)
        rows = rows.astype(
            np.float16
        )  # as feature files hold them, so that figures agree with evaluation.py's
        if not np.isfinite(rows).all():
            raise InputError(
                "features hold NaN or infinity, or overflow float16; are the weights sound?"
            )
        windows = np.array_split(rows, -(-len(rows) // self.options["window"]))
        frames, pieces = [], []
        for window in windows:
            x, num_frames = (part.to(self.device) for part in pad([window]))
            frames.append(self.encoder.encode(x, num_frames)[0].cpu().numpy())
            pieces.append(self.encoder(x, num_frames)[0].cpu().numpy())
        return np.concatenate(frames).astype(np.float16), np.stack(pieces).astype(np.float32)


def completed(given):
    """All of DEFAULTS with the options `given` put in. Where no part is named, the shipped ones."""
    options = {**DEFAULTS, **given}
    options["stages"] = list(options["stages"]) if options["stages"] else None
    own = any(
        options[name] != DEFAULTS[name]
        for name in ("model_path", "pca", "backbone", "weights", "stages", "pooling")
    )
    if not own:
        options["pca"] = SHIPPED / "pca.npz"
        if options["encoder"] in (None, "tca"):
            options["model_path"] = SHIPPED / "model.pth"
    elif not options["model_path"] and options["encoder"] != "mean":
        raise InputError(
            "--model_path is missing: another --pca, --backbone or --pooling needs its encoder, or --encoder mean"
        )
    return options


def check(options):
    """InputError for values that no part of a model takes."""
    from features.pooling import POOLINGS

    if options["pooling"] not in POOLINGS:
        raise InputError(
            f"--pooling {options['pooling']!r} is not known; choose from {', '.join(POOLINGS)}"
        )
    try:
        options["fps"] = str(Fraction(options["fps"]))  # 1.0 is 1
    except (ValueError, ZeroDivisionError):
        raise InputError(
            f"--fps {options['fps']!r} is no number of frames a second; give 1, 0.5, 24000/1001, ..."
        ) from None
    if Fraction(options["fps"]) <= 0 or options["window"] < 1:
        raise InputError("--fps and --window must be positive")


def calibration_folder(given):
    """Where the calibration of the model of these options would be: beside its encoder, or its PCA where it has none."""
    options = completed(given)
    path = options["model_path"] or options["pca"]
    return path and (Path(path) if Path(path).is_dir() else Path(path).parent)


def read_calibration(folder, identity):
    """The entry of FOLDER/calibration.json that was measured with a model of this identity; {} where there is none."""
    path = Path(folder, CALIBRATION) if folder else None
    if path is None or not path.exists():
        return {}
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        return next((entry for entry in entries.values() if entry["identity"] == identity), {})
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise InputError(
            f"{str(path)!r} is not a calibration ({error!r}); make it again or remove it"
        ) from None


def thumbnail(frame):
    """A (224, 224, 3) uint8 frame as a small JPEG."""
    file = io.BytesIO()
    Image.fromarray(frame).resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BILINEAR).save(
        file, "JPEG", quality=QUALITY
    )
    return file.getvalue()
