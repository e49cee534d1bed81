"""The metrics of a training run: how they are defined, written and read back.

A line of log.jsonl contains step, epoch (from 0), and these values averaged over processes:

    loss, lr            of the step
    positive            mean similarity of the anchors to their positives
    negative            mean similarity of the anchors to the bank's entries
    hardest_negative    mean over anchors of the similarity to the most similar entry
    hardest_share       fraction of |d loss / d logit| over the bank that falls on the 1 % of
                        entries most similar to the anchor; mean over the anchors with a non-zero
                        gradient on the bank (null if none)
    left_out            share of (anchor, entry) masked as false negatives
    queue_age           mean number of steps since an entry of the bank was written; measured
                        before the step, random initial entries excluded
    queue_random        share of the bank that is still random initial entries
    data_wait           share of the steps' time spent waiting for data, since the last line or the
                        epoch's start
    videos_per_s        videos encoded per second since then, by all processes

After an epoch with a validation set, a line has `held_out` instead: the set's metrics.
Similarities are the logits times the temperature. TensorBoard shows the same values.
"""

import json
import math
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import NoneType

import torch
from torch import nn
from tqdm import tqdm

from distributed import Distributed
from files import atomic, disk_errors, nan_to_none
from untrusted import is_object, read_text
from utils import InputError, require_path

# --- definitions ---

HARDEST = 0.01  # fraction of the bank whose gradient hardest_share measures


def step_metrics(
    loss: torch.Tensor, similarities: torch.Tensor, grad_logits: torch.Tensor
) -> dict[str, float]:
    """Metrics of one step on this process; NaN where a metric is not defined.

    Args:
        loss: scalar.
        similarities: (N, 1+K), the positive first, -inf where a negative was masked.
        grad_logits: (N, 1+K), d loss / d logits.
    """
    negatives = similarities[:, 1:]
    used = negatives > -torch.inf
    rows = used.any(1)  # anchors that have a negative
    metrics = {
        "loss": loss.item(),
        "positive": similarities[:, 0].mean().item(),
        "negative": math.nan,
        "hardest_negative": math.nan,
        "hardest_share": hardest_share(negatives, grad_logits[:, 1:]),
        "left_out": 1 - used.float().mean().item(),
    }
    if rows.any():
        metrics["negative"] = negatives[used].mean().item()
        metrics["hardest_negative"] = negatives[rows].amax(1).mean().item()
    return metrics


def hardest_share(negatives: torch.Tensor, grad_logits: torch.Tensor) -> float:
    """Mean over anchors of the share of |grad_logits| (N, K) on the hardest `negatives` (N, K)."""
    weights = grad_logits.abs().float()
    count = math.ceil(HARDEST * negatives.shape[1])
    hardest = negatives.topk(count, dim=1).indices  # (N, K/100)
    total = weights.sum(1)
    shares = weights.gather(1, hardest).sum(1)[total > 0] / total[total > 0]
    return shares.mean().item() if len(shares) else math.nan


def queue_metrics(model: nn.Module) -> dict[str, float]:
    """Mean age of the bank's entries, and the share of them that is still random."""
    from_training = model.queue_ids >= 0  # (K,); random initial entries have id -1
    age = model.queue_age[from_training].float().mean()
    return {
        "queue_age": age.item(),
        "queue_random": 1 - from_training.float().mean().item() if model.K else math.nan,
    }


def mean_over_processes(metrics: dict[str, float], dist: Distributed) -> dict[str, float | None]:
    """The mean of each metric over the processes that have it; None where none has."""
    own = torch.tensor([list(metrics.values())], dtype=torch.float64)
    means = dist.all_gather(own).nanmean(0).tolist()
    return nan_to_none(dict(zip(metrics, means, strict=True)))


# --- writing ---


class TrainingLog:
    """log.jsonl, TensorBoard events and the progress bar of a run. Only the main process writes.

    A resumed run first drops the lines past its step.

    Args:
        run: the checkpoint.Run, which knows step, epoch, folder, model and processes.
        print_freq: steps between lines.
    """

    def __init__(self, run, print_freq: int = 1):
        self.run, self.print_freq = run, print_freq
        self.path = Path(run.folder) / "log.jsonl"
        self.should_log = False  # whether the current step gets a line
        self.events, is_main = None, run.dist.is_main
        if is_main:
            from torch.utils.tensorboard import SummaryWriter  # takes a second to import

            drop_lines_past(self.path, run.step)
            purge_step = run.step + 1 if run.step else None
            self._excepthook, threading.excepthook = threading.excepthook, self._hide_disk_errors
            with disk_errors(self.path):
                self.events = SummaryWriter(str(run.folder), purge_step=purge_step)
        self.bar = tqdm(total=run.total_steps, initial=run.step, unit="step", disable=not is_main)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.bar.close()
        if self.events:
            with disk_errors(self.path):
                self.events.close()
            threading.excepthook = self._excepthook

    def _hide_disk_errors(self, failed):
        """TensorBoard's thread meets a full disk first; `write` then raises the same error."""
        if not isinstance(failed.exc_value, OSError):
            self._excepthook(failed)

    def timed(self, batches: Iterable) -> Iterator:
        """Yield the batches; measure the time of the steps, and the bank before them."""
        self._start_measuring()
        self.start = time.perf_counter()
        for batch in batches:
            self.data_seconds += time.perf_counter() - self.start
            _, anchors, positives, negatives, _ = batch
            self.videos += sum(len(side[1]) for side in (anchors, positives, negatives))
            self.should_log = (self.run.step + 1) % self.print_freq == 0
            self.queue = queue_metrics(self.run.model) if self.should_log else {}
            yield batch
            self.start = time.perf_counter()

    def _start_measuring(self):
        self.seconds = self.data_seconds = 0.0
        self.videos = 0

    def write_step(self, loss: torch.Tensor, logits: torch.Tensor, lr: float):
        """Write the metrics of the completed step, every `print_freq` steps.

        Args:
            loss: scalar.
            logits: (N, 1+K), with their gradient.
        """
        self.bar.update()
        metrics = {}
        if self.should_log:
            similarities = logits.detach() * self.run.model.T
            metrics = step_metrics(loss, similarities, logits.grad) | self.queue  # waits for a GPU
        self.seconds += time.perf_counter() - self.start
        if not self.should_log:
            return
        metrics["data_wait"] = self.data_seconds / self.seconds
        metrics["videos_per_s"] = self.videos * self.run.dist.world_size / self.seconds
        self._start_measuring()
        if not math.isfinite(metrics["loss"]):
            metrics["loss"] = math.inf  # a mean over processes would leave NaN out
        metrics = mean_over_processes(metrics, self.run.dist)
        if metrics["loss"] == math.inf:
            return  # `Run.keep_in_step` ends the run, and says why
        self.write(self.run.epoch, lr=lr, **metrics)
        self.bar.set_postfix(
            loss=f"{metrics['loss']:.3f}", videos_per_s=f"{metrics['videos_per_s']:.1f}"
        )

    def write(self, epoch: int, **metrics):
        """Write a line; a metric is a number, or a dict of them. TensorBoard skips NaN."""
        if not self.run.dist.is_main:
            return
        line = nan_to_none({"step": self.run.step, "epoch": epoch, **metrics})
        with disk_errors(self.path):
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line, allow_nan=False) + "\n")
            self._write_events(line, metrics)

    def _write_events(self, line, names):
        for name in names:
            values = line[name] if isinstance(line[name], dict) else {"": line[name]}
            for key, value in values.items():
                if value is not None:
                    tag = f"{name}/{key}" if key else name
                    self.events.add_scalar(tag, value, self.run.step)


def drop_lines_past(path: Path, step: int):
    """Drop the lines of a log.jsonl past `step`, and those cut short by a kill."""
    kept = []
    for line in read_text(path, "log").split("\n") if path.exists() else ():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, TypeError, LookupError, RecursionError):
            continue
    with atomic(path) as temporary:
        temporary.write_text("".join(kept), encoding="utf-8")


# --- reading ---

PANELS = {  # title: {metric: line style}
    "loss": {"loss": "-"},
    "similarity": {"positive": "-", "hardest_negative": "--", "negative": ":"},
    "gradient weight on the hardest 1 %": {"hardest_share": "-"},
    "validation mAP": None,  # the metrics of the validation set, by their own names
}


def read_log(path: str | Path) -> list[dict]:
    """The lines of a run's log.jsonl, without a last one cut short by a kill.

    path: the run's folder, or the file.
    """
    path = require_path(path, "run")
    path = require_path(path / "log.jsonl", "log") if path.is_dir() else path
    lines = []
    try:
        for text in read_text(path, "log").split("\n")[:-1]:
            line = json.loads(text)
            if not _is_line(line):
                raise ValueError(f"it has the line {text[:60]!r}")
            lines.append(line)
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{str(path)!r} is not a log of train.py ({error}); give a run's folder"
        ) from None
    if not lines:
        raise InputError(
            f"{str(path)!r} has no line yet; wait for the run's first --print-freq steps"
        )
    return lines


def _is_line(line):
    """Whether a value is {"step", metric: number, "held_out": {metric: number}}."""
    if not is_object(line) or type(line.get("step")) is not int:
        return False
    metrics = {name: value for name, value in line.items() if name != "held_out"}
    val = line.get("held_out", {})
    return is_object(metrics, int, float, NoneType) and is_object(val, int, float, NoneType)


def series(lines: list[dict]) -> dict[str, dict[str, tuple[list, list]]]:
    """{panel: {metric: (steps, values)}} of a log's lines, without null values."""
    panels = {title: {} for title in PANELS}
    for line in lines:
        for title, styles in PANELS.items():
            metrics = line.get("held_out", {}) if styles is None else line
            for name in metrics if styles is None else styles:
                value = metrics.get(name)
                if value is not None:
                    steps, values = panels[title].setdefault(name, ([], []))
                    steps.append(line["step"])
                    values.append(value)
    return panels


def draw_curves(runs: dict[str, dict]):
    """A matplotlib figure of {run name: its `series`}, one panel beside another."""
    from matplotlib.figure import Figure  # without pyplot: no display, no state

    titles = [title for title in PANELS if any(panels[title] for panels in runs.values())]
    figure = Figure(figsize=(5 * len(titles), 4), layout="constrained")
    all_axes = figure.subplots(1, len(titles), squeeze=False)[0]
    for axes, title in zip(all_axes, titles, strict=True):
        styles = PANELS[title] or {}
        for number, (run, panels) in enumerate(runs.items()):
            curves = panels[title]
            for i, (name, (steps, values)) in enumerate(curves.items()):
                style = styles.get(name, ("-", "--", ":", "-.")[i % 4])
                label = f"{run}: {name}" if len(curves) > 1 else run
                color = f"C{number}"
                axes.plot(steps, values, style, color=color, label=label, linewidth=1.2)
        axes.set(title=title, xlabel="optimiser step")
        axes.legend(fontsize="x-small")
    return figure
