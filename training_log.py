"""What a training run tells of itself: log.jsonl, TensorBoard, and what their figures mean.

loss; lr; data_wait, the share of a step's time spent waiting for data; videos_per_s, of all processes; and of the logits
(similarities times 1/T, which is taken out again):
positive, negative                  mean similarity of anchors with their positives, and with the bank's entries
hardest_negative                    mean over anchors of the most similar bank entry
hardest_share                       an anchor's gradient weight on a negative is |d loss / d logit|; this is the part of it that
                                    lies on the 1 % of bank entries most similar to the anchor, averaged over the anchors that
                                    have any weight on negatives (null when none has)
left_out                            share of (anchor, bank entry) that are no negatives (--mask_shared)
queue_age, queue_random             mean age, in steps, of the bank entries that the step saw, not counting the random start;
                                    the share of the bank that is still the random start
Each figure is the mean over dist.
"""

import json
import math

import torch

from utils import InputError, atomic, nan_to_none, require_path

HARDEST = 0.01  # the part of the bank that hardest_share is about


def step_metrics(loss, similarities, weights):
    """Figures {name: float, nan where there is none} of one step on this process.

    loss: scalar; similarities (N, 1+K), the positive first, -inf where a negative was left out; weights (N, 1+K): d loss / d
    logits.
    """
    negatives, nan = similarities[:, 1:], math.nan
    used = negatives > -torch.inf
    some = used.any(1)  # rows that have a negative at all
    return {
        "loss": loss.item(),
        "positive": similarities[:, 0].mean().item(),
        "negative": negatives[used].mean().item() if some.any() else nan,
        "hardest_negative": negatives[some].amax(1).mean().item() if some.any() else nan,
        "hardest_share": hardest_share(negatives, weights[:, 1:]),
        "left_out": 1 - used.float().mean().item(),
    }


def hardest_share(negatives, weights, part=HARDEST):
    """Mean over anchors of the share of |weights| (N, K) on each row's ceil(part * K) largest `negatives` (N, K)."""
    weights = weights.abs().float()
    hardest = negatives.topk(math.ceil(part * negatives.shape[1]), dim=1).indices  # (N, K/100)
    total = weights.sum(1)
    shares = weights.gather(1, hardest).sum(1)[total > 0] / total[total > 0]
    return shares.mean().item() if len(shares) else math.nan


def queue_metrics(model):
    """Age of the bank's entries, before a step."""
    known = model.queue_ids >= 0
    return {
        "queue_age": model.queue_age[known].float().mean().item() if known.any() else math.nan,
        "queue_random": 1 - known.float().mean().item() if model.K else math.nan,
    }


def mean_over(dist, figures):
    """The mean of each figure over the processes that have one; None where none has."""
    values = (
        dist.all_gather(torch.tensor([list(figures.values())], dtype=torch.float64))
        .nanmean(0)
        .tolist()
    )
    return {
        name: None if math.isnan(value) else value
        for name, value in zip(figures, values, strict=True)
    }


class TrainingLog:
    """Figures of a run: JSON objects in FOLDER/log.jsonl, one a line, and TensorBoard events beside it.

    A resumed run first drops the lines past its step. `first` is false on all processes but one, which then write nothing.
    """

    def __init__(self, folder, step, first=True):
        self.path, self.events = folder / "log.jsonl" if first else None, None
        if not first:
            return
        from torch.utils.tensorboard import SummaryWriter  # takes a second to import

        kept = (
            [line for line in self.path.read_text().splitlines() if _step(line) <= step]
            if self.path.exists()
            else []
        )
        with atomic(self.path) as temporary:
            temporary.write_text("".join(line + "\n" for line in kept))
        self.events = SummaryWriter(str(folder), purge_step=step + 1 if step else None)

    def write(self, step, epoch, **figures):
        """One line; TensorBoard leaves out what is None."""
        if self.path is None:
            return
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(
                json.dumps(nan_to_none({"step": step, "epoch": epoch, **figures}), allow_nan=False)
                + "\n"
            )
        for name, value in figures.items():
            for tag, number in (
                {f"{name}/{k}": v for k, v in value.items()}.items()
                if isinstance(value, dict)
                else [(name, value)]
            ):
                if number is not None and not math.isnan(number):
                    self.events.add_scalar(tag, number, step)

    def close(self):
        if self.events:
            self.events.close()


def _step(line):
    try:
        return json.loads(line)["step"]
    except (ValueError, TypeError, KeyError):  # a line cut short by a kill, or not ours
        return math.inf


PANELS = {  # title: {figure of a log line: line style}
    "loss": {"loss": "-"},
    "similarity": {"positive": "-", "hardest_negative": "--", "negative": ":"},
    "gradient weight on the hardest 1 %": {"hardest_share": "-"},
    "held-out mAP": None,  # whatever the set calls its figures
}


def read_log(path):
    """The objects of a run's log.jsonl; `path` is the run's folder or the file. A last line cut short by a kill is left out."""
    path = require_path(path, "run")
    path = require_path(path / "log.jsonl", "log") if path.is_dir() else path
    lines = []
    try:
        for text in path.read_text(encoding="utf-8").splitlines(keepends=True):
            if text.endswith("\n"):
                line = json.loads(text)
                lines.append({"step": line["step"], **line})
    except (UnicodeDecodeError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{str(path)!r} is no log of train.py ({error}); name a run's folder"
        ) from None
    if not lines:
        raise InputError(
            f"{str(path)!r} has no line yet; wait for the run's first --print-freq steps"
        )
    return lines


def series(lines):
    """{panel: {figure: (steps, values)}} of a log's lines, without what is null everywhere."""
    found = {title: {} for title in PANELS}
    for line in lines:
        values = {
            title: {name: line.get(name) for name in names}
            for title, names in PANELS.items()
            if names
        }
        values["held-out mAP"] = line.get("held_out", {})
        for title, figures in values.items():
            for name, value in figures.items():
                if value is not None:
                    steps, numbers = found[title].setdefault(name, ([], []))
                    steps.append(line["step"])
                    numbers.append(value)
    return found


def draw_curves(runs):
    """runs {name: series} -> a matplotlib figure."""
    from matplotlib.figure import Figure  # without pyplot: no display, no state

    titles = [title for title in PANELS if any(found[title] for found in runs.values())]
    figure = Figure(figsize=(5 * len(titles), 4), layout="constrained")
    for axes, title in zip(figure.subplots(1, len(titles), squeeze=False)[0], titles, strict=True):
        styles = PANELS[title] or {}
        for number, (name, found) in enumerate(runs.items()):
            for place, (label, (steps, values)) in enumerate(found[title].items()):
                style = styles.get(label, ("-", "--", ":", "-.")[place % 4])
                shown = f"{name}: {label}" if len(found[title]) > 1 else name
                axes.plot(steps, values, style, color=f"C{number}", label=shown, linewidth=1.2)
        axes.set(title=title, xlabel="optimiser step")
        axes.legend(fontsize="x-small")
    return figure
