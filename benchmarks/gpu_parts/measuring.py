"""How the parts measure: seconds, the share of them that the GPU computes, and its peak memory.

All that benchmarks/gpu.py asks of CUDA is in this file. On a CPU the two latter are None.
"""

import contextlib
import runpy
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.autograd import DeviceType
from torch.optim.optimizer import register_optimizer_step_post_hook

ROOT = Path(__file__).resolve().parent.parent.parent

# Kernels of the profile that are no kernels: ranges that PyTorch draws on the GPU's time line.
RANGES = ("Optimizer.", "ProfilerStep", "## Call", "Torch-Compiled")


def is_cuda(device: str) -> bool:
    return torch.device(device).type == "cuda"


def synchronize(device: str) -> None:
    """Wait until the GPU has done all that it was given."""
    if is_cuda(device):
        torch.cuda.synchronize()


def reset_peak(device: str) -> None:
    if is_cuda(device):
        torch.cuda.reset_peak_memory_stats()


def peak_gib(device: str) -> float | None:
    """GiB that PyTorch's tensors took at most on the GPU since `reset_peak`."""
    return torch.cuda.max_memory_allocated() / 2**30 if is_cuda(device) else None


def covered(intervals: Iterable[tuple[float, float]]) -> float:
    """The length that intervals (start, end) cover together."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


class KernelTime:
    """Profiles what is started between `start` and `stop`; `seconds` is None without a GPU."""

    def __init__(self, device: str) -> None:
        self.device, self.seconds, self.profile = device, None, None

    def start(self) -> None:
        if is_cuda(self.device):
            synchronize(self.device)
            # With the CPU's events, without which some versions record no kernels.
            activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
            self.profile = torch.profiler.profile(activities=activities)
            self.profile.start()

    def stop(self) -> None:
        if not self.profile:
            return
        synchronize(self.device)
        self.profile.stop()
        intervals = []
        for event in self.profile.events():
            on_gpu = event.device_type == DeviceType.CUDA
            is_range = getattr(event, "is_user_annotation", False)
            if on_gpu and not is_range and not event.name.startswith(RANGES):
                intervals.append((event.time_range.start, event.time_range.end))
        self.profile = None
        if intervals:
            self.seconds = covered(intervals) / 1e6  # from microseconds


def measure(function: Callable[[], object], device: str, repeats: int = 3) -> dict:
    """{seconds, busy, peak_gib} of one call of `function`; it is called `repeats` + 2 times."""
    function()  # the first call prepares
    synchronize(device)
    reset_peak(device)
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    synchronize(device)
    seconds, peak = (time.perf_counter() - start) / repeats, peak_gib(device)
    kernels = KernelTime(device)
    kernels.start()
    function()
    kernels.stop()
    return {"seconds": seconds, "busy": busy(kernels.seconds, seconds), "peak_gib": peak}


def busy(kernel_seconds: float | None, seconds: float) -> float | None:
    """The share of a time, measured without the profiler, in which kernels or copies ran."""
    return None if kernel_seconds is None else min(1.0, kernel_seconds / seconds)


# --- arithmetic ---------------------------------------------------------------------------------


@contextlib.contextmanager
def arithmetic(kind: str) -> Iterator[torch.dtype | None]:
    """How float32 is multiplied in this block: "float32" exactly, "tf32" rounded to 11 bits.

    Yields the type for autocast: torch.bfloat16 for "bfloat16", else None.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer versions announce another way to say it
        before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = kind == "tf32"
        torch.backends.cudnn.allow_tf32 = kind == "tf32"
        try:
            yield torch.bfloat16 if kind == "bfloat16" else None
        finally:
            torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


# --- train.py -----------------------------------------------------------------------------------


def load_script(name: str) -> SimpleNamespace:
    """The functions of a script, such as its `main`."""
    return SimpleNamespace(**runpy.run_path(str(ROOT / name), run_name=Path(name).stem))


class EnoughSteps(Exception):
    """Ends a training run whose steps have been measured."""


class StepClock:
    """Called after every step of every optimiser: times some steps, profiles two more, and stops.

    Attributes: seconds of a step, kernel_seconds of a step, peak_gib.
    """

    PROFILED = 2

    def __init__(self, device: str, warm_up: int, steps: int) -> None:
        self.device, self.warm_up, self.steps, self.count = device, warm_up, steps, 0
        self.kernels = KernelTime(device)
        self.seconds = self.peak_gib = None

    @property
    def kernel_seconds(self) -> float | None:
        return self.kernels.seconds and self.kernels.seconds / self.PROFILED

    def __call__(self, *_) -> None:
        self.count += 1
        if self.count == self.warm_up:
            synchronize(self.device)
            reset_peak(self.device)
            self.began = time.perf_counter()
        elif self.count == self.warm_up + self.steps:
            synchronize(self.device)
            self.seconds = (time.perf_counter() - self.began) / self.steps
            self.peak_gib = peak_gib(self.device)
            self.kernels.start()
        elif self.count == self.warm_up + self.steps + self.PROFILED:
            self.kernels.stop()
            raise EnoughSteps


@contextlib.contextmanager
def after_each_step(hook: Callable) -> Iterator[None]:
    """Call `hook(optimizer, args, kwargs)` after each step of any optimiser in this block."""
    handle = register_optimizer_step_post_hook(hook)
    try:
        yield
    finally:
        handle.remove()
