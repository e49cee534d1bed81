"""Contrastive losses over MoCo's logits.

Each entry of LOSSES maps logits (N, 1+K) and labels (N,) to a scalar. A row's label is the column
of its positive. Logits are cosine similarities divided by the temperature T (1 for circle losses).

A logit of -inf is left out: MoCo marks false negatives this way. A row without any negative
contributes nothing. Sums run in float32, also under autocast, and finite input gives a finite loss.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

MARGIN, GAMMA = 0.25, 256.0  # the paper's
LOWEST = torch.finfo(torch.float32).min  # instead of -inf, which would turn gradients into NaN
LARGEST = 1e6  # Logits are clamped to this, so that gamma * logit**2 does not overflow.


def circle(logits: Tensor, labels: Tensor, margin: float = MARGIN, gamma: float = GAMMA) -> Tensor:
    """Circle loss (Sun et al., CVPR 2020, eq. 6), as in TCA: the weights alpha carry no gradient.

    L = softplus( logsumexp_n gamma alpha_n (s_n - margin) + gamma alpha_p (1 - margin - s_p) ),
    alpha_p = [1 + margin - s_p]+, alpha_n = [s_n + margin]+.
    """
    positive, scores, is_negative = split_positive(logits, labels)
    alpha_p = (1 + margin - positive.detach()).clamp(min=0)  # (N,)
    alpha_n = (scores.detach() + margin).clamp(min=0)  # (N, 1+K)
    pull = gamma * alpha_p * (1 - margin - positive)  # (N,)
    push = gamma * alpha_n * (scores - margin)  # (N, 1+K)
    push = push.masked_fill(~is_negative, LOWEST).logsumexp(1)  # (N,)
    return mean_of_rows(F.softplus(push + pull), is_negative)


def circle_released(
    logits: Tensor, labels: Tensor, margin: float = MARGIN, gamma: float = GAMMA
) -> Tensor:
    """The released code's circle loss, which indexes rows by `labels` instead of columns.

    All labels are 0, so the whole first row takes the positive form, and every other row takes the
    negative form, its positive included. Cross-entropy follows. Kept because a published
    reproduction of TCA_c was trained with it.
    """
    scores, left_out = finite_scores(logits)
    as_negative = (scores.detach() + margin).clamp(min=0) * (scores - margin)
    as_positive = (1 + margin - scores.detach()).clamp(min=0) * (scores - (1 - margin))
    rows = torch.zeros(len(scores), 1, dtype=torch.bool, device=scores.device)
    rows[labels] = True  # the released indexing
    scores = gamma * torch.where(rows, as_positive, as_negative)  # (N, 1+K)
    return F.cross_entropy(scores.masked_fill(left_out, LOWEST), labels)


def infonce(logits: Tensor, labels: Tensor) -> Tensor:
    """InfoNCE (van den Oord et al., 2018; MoCo eq. 1): cross-entropy of the positive's column."""
    scores, left_out = finite_scores(logits)
    scores = scores.masked_fill(left_out, LOWEST)
    loss_per_anchor = F.cross_entropy(scores, labels, reduction="none")  # (N,)
    is_negative = (~left_out).scatter(1, labels[:, None], False)
    return mean_of_rows(loss_per_anchor, is_negative)


def triplet(logits: Tensor, labels: Tensor, margin: float = 0.2) -> Tensor:
    """Triplet loss with each anchor's hardest negative: the mean of [s_n - s_p + margin]+.

    The paper's row "triplet, no bank" takes the step's own negatives: train with `--moco_k 0`.
    """
    positive, scores, is_negative = split_positive(logits, labels)
    hardest = scores.masked_fill(~is_negative, LOWEST).amax(1)  # (N,)
    return mean_of_rows(F.relu(hardest - positive + margin), is_negative)


LOSSES = {
    "circle": circle,
    "circle-released": circle_released,
    "infonce": infonce,
    "triplet": triplet,
}


def finite_scores(logits):
    """Float32 scores (N, 1+K), and a mask (N, 1+K) of those left out, whose score becomes 0."""
    left_out = logits == -torch.inf
    return logits.float().masked_fill(left_out, 0.0).clamp(-LARGEST, LARGEST), left_out


def split_positive(logits, labels):
    """Positive scores (N,), all scores (N, 1+K), and a mask (N, 1+K) that is true at negatives."""
    scores, left_out = finite_scores(logits)
    positive = scores.gather(1, labels[:, None]).squeeze(1)
    return positive, scores, (~left_out).scatter(1, labels[:, None], False)


def mean_of_rows(loss_per_anchor, is_negative):
    """Mean over the anchors that have a negative; 0, with a gradient of 0, if none has."""
    useful = is_negative.any(1)  # (N,)
    return torch.where(useful, loss_per_anchor, 0.0).sum() / useful.sum().clamp(min=1)
