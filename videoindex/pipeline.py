"""From video files to the descriptors of an index: decoding, backbone, pooling, PCA and encoder.

The parts are those of the other scripts (pre-processing/, evaluation.py); `Pipeline` connects them.
Its `identity` names everything that decides the values of the descriptors.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

import utils
from features.frame_rules import DEFAULT_RULE, FRAME_RULES
from untrusted import is_object, read_json
from utils import InputError, available_cores

# The shipped model: pca.npz, model.pth, calibration.json.
SHIPPED = Path(__file__).resolve().parent.parent / "models" / "demo"
# Beside an encoder's file, written by calibrate.py: {name: {"identity", "threshold", ...}}.
CALIBRATION = "calibration.json"
CALIBRATED = ("min_similarity", "threshold", "certain", "likely", "radius")
THUMBNAIL_SIZE = 160  # pixels of the long side: about 3 KB for a second of video
# Frames that are encoded together, into one window descriptor: of the untrained mean, in which a
# short excerpt of a long film would be lost, and of a trained encoder, which takes them in context.
MEAN_WINDOW, TRAINED_WINDOW = 10, 60

# The options of a pipeline. An index stores them, so that a query need not repeat them.
DEFAULT_OPTIONS = {
    "model_path": None,
    "encoder": None,
    "pca": None,
    "components": None,
    "backbone": "efficientnet_lite0",
    "weights": None,
    "stages": None,
    "pooling": "imac",
    "fps": "1",
    "frames": DEFAULT_RULE,
    "bars": "cut",
    "window": None,
    "nhead": 8,
}
BARS = ("cut", "keep")  # black bars at the sides of the picture
FILE_OPTIONS = ("model_path", "pca", "weights")  # and a backbone FILE.onnx


@dataclass
class EncodedVideo:
    """The descriptors of a video, or the `reason` why there are none.

    path: the file
    reason: why it could not be encoded; "" if it was
    seconds: how long it plays
    frame_descriptors: (T, D) float16, L2-normalised, one for each sampled frame
    window_descriptors: (P, D) float32, L2-normalised, one for each window of frames
    thumbnails: T JPEGs of the whole picture in its own shape (in indexes made before: squares of
        what the backbone saw)
    """

    path: Path
    reason: str = ""
    seconds: float = 0.0
    frame_descriptors: np.ndarray | None = None
    window_descriptors: np.ndarray | None = None
    thumbnails: list[bytes] | None = None


class Pipeline:
    """Decoder, backbone, pooling, PCA and encoder. Without options: the shipped model.

    identity: {part: what it is}. Descriptors of two pipelines can be compared if these are equal.
    frame_rule: which frames it takes; an index holds those of one rule.
    calibration: what calibrate.py measured for this identity, or {}.

    Args:
        device: a PyTorch device; a GPU by default, if there is one.
        workers: decoder processes; as many as cores by default.
        options: see DEFAULT_OPTIONS.

    Raises:
        InputError: if a part is missing, cannot be read, or does not fit the others.
    """

    def __init__(self, device: str | None = None, workers: int | None = None, **options: Any):
        # Imported here: `search.py info` and the like need neither PyTorch nor FFmpeg.
        from distributed import Distributed, default_device
        from features.backbones import backbone_settings, build_backbone

        self.given = _absolute(options)
        self.options = options = complete_options(self.given)
        check_options(options)
        self.frame_rule = options["frames"]
        self.device = Distributed().device(device or default_device())
        self.workers = workers or available_cores()
        self.backbone = build_backbone(
            options["backbone"], options["weights"], options["stages"], self.device
        )
        self.row_size = sum(self.backbone.channels)  # of the backbone's pooled features
        self.projection, feature_size = self._load_projection()
        self.encoder, encoder_label = self._load_encoder(feature_size)
        # Indexes made earlier hold these values: they must not change in form. Files count by
        # their digest, so that their names and places do not matter.
        backbone = backbone_settings(self.backbone, options["stages"], options["pooling"])
        self.identity = backbone | {
            "weights": _digest_in(self.backbone.weights),
            "pca": _digest_in(self.projection.label) if self.projection else "none",
            "encoder": encoder_label,
            "size": self.encoder.descriptor_size,
            "fps": str(options["fps"]),
            "window": options["window"],
        }
        if options["bars"] == "cut":  # of earlier indexes nothing is said
            self.identity["bars"] = "cut"
        self.calibration = read_calibration(calibration_folder(self.given), self.identity)

    def _load_projection(self):
        """The PCA or None, and the size of the features that leave it."""
        from features.pca import load_projection

        feature_size = self.row_size
        path = self.options["pca"]
        if not path:
            return None, feature_size
        projection = load_projection(path, self.options["components"])
        features = f"{self.options['backbone']} with {self.options['pooling']}"
        projection.check(feature_size, features)
        return projection, projection.matrix.shape[1]

    def _load_encoder(self, feature_size):
        """The encoder, and the label that tells it from others."""
        from model import ENCODERS, load_encoder, model_file

        path, wanted = self.options["model_path"], self.options["encoder"]
        if path is None:
            return ENCODERS["mean"](feature_size), "mean"
        name, encoder, _ = load_encoder(path, self.options["nhead"])
        if wanted and wanted != name:
            raise InputError(
                f"{str(path)!r} holds a {name!r} encoder, not {wanted!r}; leave --encoder out"
            )
        if encoder.feature_size != feature_size:
            raise InputError(
                f"the encoder of {str(path)!r} takes features of size {encoder.feature_size}, not"
                f" {feature_size}; give the --pca, --components and --backbone that it was trained"
                " with"
            )
        label = f"{name} sha256 {utils.file_sha256(model_file(path))[:16]}"
        return encoder.to(self.device).eval(), label

    def encode_videos(
        self,
        paths: Iterable[str | os.PathLike],
        known_rows: Mapping[str, np.ndarray] | None = None,
        on_row: Callable[[str, list[np.ndarray]], None] | None = None,
    ) -> Iterator[EncodedVideo]:
        """Yield an EncodedVideo for each of `paths`, as they are finished (not in order).

        Args:
            known_rows: {path: (T, C) float16}, of its first frames, which are not computed again.
            on_row: called as on_row(path, rows so far) after each frame.
        """
        from features.decoding import Video
        from features.extraction import default_parallelism, extract, feature_function

        videos, known_rows = [], known_rows or {}
        for path in map(str, paths):
            videos.append(Video(path, Path(path), known_rows=known_rows.get(path, ())))
        finished = extract(
            videos,
            feature_function(self.backbone, self.options["pooling"], None, np.float16),
            fps=Fraction(self.options["fps"]),
            frame_rule=self.frame_rule,
            view=self.backbone.view._replace(cut_bars=self.options["bars"] == "cut"),
            workers=self.workers,
            thumbnail_size=THUMBNAIL_SIZE,
            on_row=(lambda video: on_row(video.id, video.rows)) if on_row else None,
            **default_parallelism(self.device, self.workers),
        )
        for video in finished:
            jpegs, video.thumbnails = video.thumbnails, []
            if video.reason:
                yield EncodedVideo(video.path, video.reason)
                continue
            features = np.stack(video.rows)  # (T, C)
            video.rows.clear()
            frames, windows = self.encode_features(features)
            yield EncodedVideo(video.path, "", video.seconds, frames, windows, jpegs)

    def encode_features(self, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Encode the backbone's features (T, C) of a video.

        A long video is cut into windows of equal length, at most `window` frames each. So memory
        grows linearly with its length, and a short excerpt is not lost in the mean of a long film.
        A video of a single window gets the descriptors that evaluation.py gives it.

        Returns:
            frame descriptors (T, D) float16, window descriptors (P, D) float32.
        """
        import torch

        from features.pca import one_blas_thread
        from padding import pad

        if self.projection:
            with one_blas_thread():
                features = self.projection(features)
        features = features.astype(np.float16)  # as feature files store them, for equal results
        if not np.isfinite(features).all():
            raise InputError(
                "features hold NaN or infinity, or overflow float16; are the weights intact?"
            )
        num_windows = -(-len(features) // self.options["window"])
        frames, windows = [], []
        for window in np.array_split(features, num_windows):
            x, num_frames = pad([window])  # (1, T / P, C), (1,)
            x, num_frames = x.to(self.device), num_frames.to(self.device)
            with torch.inference_mode():
                frames.append(self.encoder.encode(x, num_frames)[0].cpu().numpy())  # (T / P, D)
                windows.append(self.encoder(x, num_frames)[0].cpu().numpy())  # (D,)
        return np.concatenate(frames).astype(np.float16), np.stack(windows).astype(np.float32)


def _digest_in(label):
    """The digest at the end of "NAME sha256 DIGEST ..."; the whole label if it holds none."""
    return label.rpartition(" sha256 ")[2]


def package_versions() -> dict[str, str]:
    """The versions of the packages that decide the numbers in an index."""
    return {name: version(name) for name in ("torch", "av", "numpy", "faiss-cpu")}


# --- options ------------------------------------------------------------------------------------


def names_file(option: str, value: Any) -> bool:
    """Whether the value of an option is the path of a file."""
    from features.onnx_backbone import is_onnx

    if option == "backbone":
        return is_onnx(value)
    return option in FILE_OPTIONS and value != "random"


def _absolute(options):
    """The options that are not None, files by their absolute path."""
    given = {}
    for name, value in options.items():
        if name not in DEFAULT_OPTIONS:
            raise InputError(
                f"model option {name!r} does not exist; choose from {', '.join(DEFAULT_OPTIONS)}"
            )
        if value is None:
            continue
        if names_file(name, value):
            value = os.path.abspath(utils.require_path(value, f"--{name}"))
        given[name] = value
    return given


def complete_options(given: dict[str, Any]) -> dict[str, Any]:
    """DEFAULT_OPTIONS updated by `given`; if it names no part of a model, the shipped parts."""
    options = {**DEFAULT_OPTIONS, **given}
    if options["stages"]:
        options["stages"] = list(options["stages"])
    else:
        options["stages"] = None
    parts = ("model_path", "pca", "backbone", "weights", "stages", "pooling")
    if all(options[name] == DEFAULT_OPTIONS[name] for name in parts):
        options["pca"] = SHIPPED / "pca.npz"
        if options["encoder"] == "tca":
            options["model_path"] = SHIPPED / "model.pth"
    elif not options["model_path"] and options["encoder"] not in (None, "mean"):
        raise InputError(
            f"--encoder {options['encoder']} needs --model_path; without either, the features are"
            " not encoded"
        )
    if options["window"] is None:
        options["window"] = TRAINED_WINDOW if options["model_path"] else MEAN_WINDOW
    return options


def differing_part(
    one: tuple[dict[str, Any], str], other: tuple[dict[str, Any], str]
) -> tuple[str, Any, Any] | None:
    """The first part in which two models differ, and its two values; None if they are one model.

    Args:
        one, other: an identity and a frame rule.
    """
    # Of bars nothing was said in earlier versions, which kept them.
    here, there = ({"bars": "keep", **identity, "frames": rule} for identity, rule in (one, other))
    for part in [*here, *(name for name in there if name not in here)]:
        if here.get(part) != there.get(part):
            return part, here.get(part), there.get(part)
    return None


def options_of(identity: dict[str, Any]) -> dict[str, Any]:
    """What the identity of an index decides where its stored options say nothing.

    The defaults of an earlier version were other ones: the shipped TCA, windows of 60 frames, bars
    kept.
    """
    options = {"bars": identity.get("bars", "keep"), "window": identity.get("window")}
    if identity.get("encoder", "mean") != "mean":
        options["encoder"] = identity["encoder"].partition(" ")[0]
    return options


def check_options(options: dict[str, Any]) -> None:
    """Raise InputError for a bad option; write the rate in its short form."""
    from features.pooling import POOLINGS

    if options["pooling"] not in POOLINGS:
        raise InputError(
            f"--pooling {options['pooling']!r} is not known; choose from {', '.join(POOLINGS)}"
        )
    if options["frames"] not in FRAME_RULES:
        raise InputError(
            f"--frames {options['frames']!r} is not known; choose from {', '.join(FRAME_RULES)}"
        )
    if options["bars"] not in BARS:
        raise InputError(f"--bars {options['bars']!r} is not known; choose from {', '.join(BARS)}")
    try:
        options["fps"] = str(Fraction(options["fps"]))  # "1.0" becomes "1"
    except (ValueError, ZeroDivisionError):
        raise InputError(
            f"--fps {options['fps']!r} is not a number of frames per second;"
            " give 1, 0.5, 24000/1001, ..."
        ) from None
    if Fraction(options["fps"]) <= 0 or options["window"] < 1:
        raise InputError("--fps and --window must be positive")


# --- calibration --------------------------------------------------------------------------------


def calibration_folder(given: dict[str, Any]) -> Path:
    """Where the calibration of these options is: beside the encoder's file, else the PCA's.

    Networks that need neither are calibrated where the shipped model is.
    """
    options = complete_options(given)
    path = Path(options["model_path"] or options["pca"] or SHIPPED)
    return path if path.is_dir() else path.parent


def read_calibration(folder: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """The entry of FOLDER/calibration.json that was measured with this identity, or {}.

    What an entry's identity does not mention may have any value.
    """
    path = Path(folder, CALIBRATION)
    if not path.exists():
        return {}
    advice = "make it again or remove it"
    entries = read_json(path, "calibration", advice)
    if not is_object(entries, dict):
        raise InputError(f"calibration {str(path)!r} is not one; {advice}")
    for entry in entries.values():
        known = entry.get("identity")
        if isinstance(known, dict) and known and known.items() <= identity.items():
            check_calibration(entry, f"calibration {str(path)!r}")
            return entry
    return {}


def calibration_of(settings: dict[str, Any]) -> dict[str, Any]:
    """What was calibrated for the model of an index with these settings, or {}.

    Read from the model's folder; if it is missing there, the copy stored in the index is used.
    """
    stored = settings["calibration"]
    if stored.get("own"):  # of `search.py calibrate`
        return stored
    current = read_calibration(calibration_folder(settings["options"]), settings["identity"])
    # Before 1.0 it held other scores.
    return current or (stored if "min_similarity" in stored else {})


def check_calibration(entry: dict[str, Any], source: str) -> None:
    """Raise InputError unless what `search.py` takes from a calibration has the right types."""
    if not is_object(entry):
        raise InputError(f"{source} is not one; make it again")
    for name in CALIBRATED:
        value = entry.get(name, 0.0)
        if isinstance(value, bool) or not isinstance(value, float | int) or not -1 <= value <= 1e6:
            raise InputError(f"{source}: {name} is no number of that kind; make it again")
