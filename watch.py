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
Each figure is the mean over processes.
"""

import json
import math

import torch

from utils import atomic, without_nan

HARDEST = 0.01  # the part of the bank that hardest_share is about


def describe_step(loss, similarities, weights):
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


def describe_queue(model):
    """Age of the bank's entries, before a step."""
    known = model.queue_ids >= 0
    return {
        "queue_age": model.queue_age[known].float().mean().item() if known.any() else math.nan,
        "queue_random": 1 - known.float().mean().item() if model.K else math.nan,
    }


def mean_over(processes, figures):
    """The mean of each figure over the processes that have one; None where none has."""
    values = processes.allgather(torch.tensor([list(figures.values())], dtype=torch.float64)).nanmean(0).tolist()
    return {name: None if math.isnan(value) else value for name, value in zip(figures, values, strict=True)}


class Log:
    """Figures of a run: JSON objects in FOLDER/log.jsonl, one a line, and TensorBoard events beside it.

    A resumed run first drops the lines past its step. `first` is false on all processes but one, which then write nothing.
    """

    def __init__(self, folder, step, first=True):
        self.path, self.events = folder / "log.jsonl" if first else None, None
        if not first:
            return
        from torch.utils.tensorboard import SummaryWriter  # takes a second to import

        kept = [line for line in self.path.read_text().splitlines() if _step(line) <= step] if self.path.exists() else []
        with atomic(self.path) as temporary:
            temporary.write_text("".join(line + "\n" for line in kept))
        self.events = SummaryWriter(str(folder), purge_step=step + 1 if step else None)

    def write(self, step, epoch, **figures):
        """One line; TensorBoard leaves out what is None."""
        if self.path is None:
            return
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(without_nan({"step": step, "epoch": epoch, **figures}), allow_nan=False) + "\n")
        for name, value in figures.items():
            for tag, number in (
                {f"{name}/{k}": v for k, v in value.items()}.items() if isinstance(value, dict) else [(name, value)]
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
