"""A backbone from an .onnx file: any network that maps frames to vectors or to maps.

    backbone = OnnxBackbone("sscd.onnx")
    maps = backbone(frames)  # (B, 3, H, W) RGB in 0..255, uint8 or float -> [(B, c, 1, 1) float32]

ONNX Runtime computes it; it is not among the requirements (`pip install onnxruntime`).
"""

import contextlib
import hashlib
import resource
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from features.views import IMAGENET_MEAN, IMAGENET_STD, MAX_SIZE, MIN_SIZE, View
from utils import InputError, one_line, require_path

FREE_SIZE = 288  # pixels a side, where the network takes any size: SSCD's
MAX_BATCH = 1024
MAX_CHANNELS = 1 << 16  # of all outputs
MAX_BYTES = (1 << 31) - 1  # of a file: the format allows no more
MEMORY = 8 << 30  # bytes that loading it and a trial with one frame may take on a CPU
EXTERNAL_FOLDER = "session.model_external_initializers_file_folder_path"
NUMPY_TYPES = {
    "tensor(uint8)": np.uint8,
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
}


def is_onnx(name: str) -> bool:
    """Whether the name of a backbone is that of an .onnx file."""
    return name.lower().endswith(".onnx")


class OnnxBackbone:
    """The network of a file, on the CPU or by CUDA. What it takes is read from the file.

    Layout: N x 3 x H x W, or N x H x W x 3. A network of bytes takes 0..255; one of floating point
    numbers takes frames normalised by ImageNet's mean and deviation, as torchvision's models do.

    Args:
        outputs: names of the outputs to take; by default all.

    Attributes:
        name, view, channels, gives_vectors, weights, amp: see `features.backbones.Backbone`.
        device: that of what it returns, always the CPU.

    Raises:
        InputError: without ONNX Runtime, and for a file that is not such a network.
    """

    name, amp, device = "onnx", None, torch.device("cpu")

    def __init__(
        self,
        path: str | Path,
        outputs: Sequence[str] | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        onnxruntime = import_onnxruntime()
        self.path, device = require_path(path, "backbone"), torch.device(device)
        data = read_model(self.path)
        self.weights = f"{self.path.name} sha256 {hashlib.sha256(data).hexdigest()[:16]}"
        with limited_memory(device):
            self.session = self._open_session(onnxruntime, data, device)
            self._read_input()
            self._choose_outputs(outputs)
            size = self.view.size
            maps = self(torch.zeros(1, 3, size, size, dtype=torch.uint8))
        self.channels = [x.shape[1] for x in maps]
        self.gives_vectors = all(x.shape[2:] == (1, 1) for x in maps)
        if not 1 <= sum(self.channels) <= MAX_CHANNELS:
            raise self._refusal(f"gives {sum(self.channels)} values a frame")

    def _refusal(self, reason):
        return InputError(f"backbone {str(self.path)!r} {reason}; give another file")

    def _open_session(self, onnxruntime, data, device):
        """An inference session with as many threads as torch has."""
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # what fails is raised
        options.add_session_config_entry(EXTERNAL_FOLDER, "/dev/null")
        options.intra_op_num_threads = torch.get_num_threads()
        # Threads that wait must leave the cores to the decoders.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        providers: list[Any] = ["CPUExecutionProvider"]
        if device.type == "cuda":
            if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
                raise InputError(
                    "this ONNX Runtime has no CUDA: pip install onnxruntime-gpu, or --device cpu"
                )
            providers.insert(0, ("CUDAExecutionProvider", {"device_id": device.index or 0}))
        try:
            # The bytes, not the path: weights in other files, which a path allows, are refused.
            return onnxruntime.InferenceSession(data, options, providers=providers)
        except Exception as error:  # ONNX Runtime's errors have no common class but this one
            raise self._refusal(f"is not a network in one file ({_short(error)})") from None

    def _read_input(self):
        """Set the layout, type, size and batch size of the input."""
        inputs = self.session.get_inputs()
        shape = list(inputs[0].shape) if len(inputs) == 1 else []
        if len(shape) != 4 or 3 not in (shape[1], shape[3]) or inputs[0].type not in NUMPY_TYPES:
            listed = [f"{x.name} {x.type} {x.shape}" for x in inputs[:3]]
            raise self._refusal(
                f"takes {one_line(', '.join(listed))[:200] or 'nothing'}, not frames N x 3 x H x W"
                " or N x H x W x 3 of bytes or floating point numbers"
            )
        self.channels_last = shape[1] != 3
        sides = shape[1:3] if self.channels_last else shape[2:4]
        sides = {side for side in sides if isinstance(side, int) and side > 0} or {FREE_SIZE}
        size, batch_sz = max(sides), shape[0]
        if len(sides) > 1 or not MIN_SIZE <= size <= MAX_SIZE:
            raise self._refusal(
                f"takes frames of {' x '.join(map(str, sorted(sides)))} pixels, not square ones of"
                f" {MIN_SIZE} to {MAX_SIZE} a side"
            )
        # None: any number of frames at a time.
        self.batch_sz = batch_sz if isinstance(batch_sz, int) and batch_sz > 0 else None
        if self.batch_sz and self.batch_sz > MAX_BATCH:
            raise self._refusal(f"takes {batch_sz} frames at a time, more than {MAX_BATCH}")
        self.view = View(size, whole=True)
        self.input_name, self.dtype = inputs[0].name, NUMPY_TYPES[inputs[0].type]
        self.mean = np.array(IMAGENET_MEAN, np.float32)[:, None, None]
        self.std = np.array(IMAGENET_STD, np.float32)[:, None, None]

    def _choose_outputs(self, names):
        known = [output.name for output in self.session.get_outputs()]
        self.outputs = list(names) if names else known
        for name in self.outputs:
            if name not in known:
                raise InputError(
                    f"--stages {name}: {str(self.path)!r} has no such output; choose from"
                    f" {one_line(', '.join(known))[:200]}"
                )

    def __call__(self, frames: torch.Tensor) -> list[torch.Tensor]:
        x = frames.cpu().numpy()  # (B, 3, H, W)
        if self.dtype != np.uint8:
            x = (x - self.mean) / self.std
        if self.channels_last:
            x = x.transpose(0, 2, 3, 1)
        x = np.ascontiguousarray(x, self.dtype)
        step = self.batch_sz or len(x)
        parts = []
        for start in range(0, len(x), step):
            batch = x[start : start + step]
            missing = step - len(batch)  # of a network whose batch size is fixed
            batch = np.concatenate([batch, np.zeros((missing, *x.shape[1:]), x.dtype)])
            parts.append([y[: step - missing] for y in self._run(batch)])
        maps = []
        for of_output in zip(*parts, strict=True):
            y = torch.from_numpy(np.concatenate(of_output)).float()
            maps.append(y[:, :, None, None] if y.ndim == 2 else y)
        return maps

    def _run(self, batch):
        """The outputs, each (B, c) or (B, c, h, w), of a batch in the network's own form."""
        try:
            arrays = self.session.run(self.outputs, {self.input_name: batch})
        except Exception as error:
            raise self._refusal(f"cannot be computed ({_short(error)})") from None
        for name, array in zip(self.outputs, arrays, strict=True):
            good = isinstance(array, np.ndarray) and array.dtype.kind == "f"
            if not good or array.ndim not in (2, 4) or len(array) != len(batch) or not array.size:
                shape = getattr(array, "shape", "no array")
                raise InputError(
                    f"output {one_line(name)[:100]!r} of {str(self.path)!r} is {shape}, not one"
                    f" vector (c,) or map (c, h, w) for each of {len(batch)} frames; name others"
                    " by --stages"
                )
        return arrays


def import_onnxruntime() -> ModuleType:
    try:
        import onnxruntime
    except ImportError:
        raise InputError(
            "an .onnx backbone needs ONNX Runtime: pip install onnxruntime (or onnxruntime-gpu)"
        ) from None
    return onnxruntime


def read_model(path: Path) -> bytes:
    """The content of an .onnx file."""
    with open(path, "rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise InputError(f"backbone {str(path)!r} has more than 2 GB; is it an .onnx file?")
    return data


@contextlib.contextmanager
def limited_memory(device: torch.device) -> Iterator[None]:
    """In this block the process may take MEMORY more: a small file can ask for any amount.

    Not beside CUDA, which reserves addresses for all memory that there is.
    """
    if device.type == "cuda":
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        limit = int(file.read().split()[0]) * resource.getpagesize() + MEMORY
    limits = [bound for bound in (limit, soft, hard) if bound != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min(limits), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _short(error):
    return one_line(" ".join(str(error).split()))[:200] or type(error).__name__
