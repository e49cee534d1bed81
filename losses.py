"""Contrastive losses over MoCo's logits.

Each entry of `LOSSES` maps logits (N, 1+K) and labels (N,), the column of each row's positive, to a scalar. Logits are cosine
similarities over the temperature T; T = 1 for the circle losses. A negative at -inf is left out (MoCo masks bank entries so);
a row with no negative left teaches nothing. Sums run in float32 whatever the autocast; finite input gives a finite loss.
"""

import torch
import torch.nn.functional as F

MARGIN, GAMMA = 0.25, 256.0  # the paper's
LOWEST = torch.finfo(torch.float32).min  # stands for -inf where -inf would turn gradients into NaN
LARGEST = 1e6  # similarities over T lie far inside; beyond it a square times gamma would overflow


def _read(logits):
    """Float32 scores (N, 1+K) and a mask (N, 1+K), true where a column is left out (its score is then 0)."""
    left_out = logits == -torch.inf
    return logits.float().masked_fill(left_out, 0.0).clamp(-LARGEST, LARGEST), left_out


def _split(logits, labels):
    """Positive scores (N,), all scores (N, 1+K), and a mask (N, 1+K), true where a column is no negative."""
    scores, left_out = _read(logits)
    return (
        scores.gather(1, labels[:, None]).squeeze(1),
        scores,
        left_out.scatter(1, labels[:, None], True),
    )


def _mean(rows, no_negative):
    """Mean over the rows that have a negative; 0, with a gradient of 0, when none has."""
    useful = ~no_negative.all(1)
    return torch.where(useful, rows, 0.0).sum() / useful.sum().clamp(min=1)


def circle(logits, labels, margin=MARGIN, gamma=GAMMA):
    """Circle loss (Sun et al., CVPR 2020, eq. 6), as in TCA: its pair weights alpha carry no gradient.

    L = softplus( logsumexp_n gamma alpha_n (s_n - margin) + gamma alpha_p (1 - margin - s_p) ),
    alpha_p = [1 + margin - s_p]+, alpha_n = [s_n + margin]+.
    """
    positive, scores, no_negative = _split(logits, labels)
    alpha_p = (1 + margin - positive.detach()).clamp(min=0)  # (N,)
    alpha_n = (scores.detach() + margin).clamp(min=0)  # (N, 1+K)
    pull = gamma * alpha_p * (1 - margin - positive)
    push = (gamma * alpha_n * (scores - margin)).masked_fill(no_negative, LOWEST)
    return _mean(F.softplus(push.logsumexp(1) + pull), no_negative)


def circle_released(logits, labels, margin=MARGIN, gamma=GAMMA):
    """The released code's circle loss, which indexes rows by `labels` where it means columns.

    Labels are all 0 there, so the first anchor's whole row takes the positive form and every other row the negative form,
    its positive included; cross-entropy follows. Kept because a published reproduction of TCA_c was trained with it.
    """
    scores, left_out = _read(logits)
    as_negative = (scores.detach() + margin).clamp(min=0) * (scores - margin)
    as_positive = (1 + margin - scores.detach()).clamp(min=0) * (scores - (1 - margin))
    rows = torch.zeros(len(scores), 1, dtype=torch.bool, device=scores.device)
    rows[labels] = True
    forms = gamma * torch.where(rows, as_positive, as_negative)
    return F.cross_entropy(forms.masked_fill(left_out, LOWEST), labels)


def infonce(logits, labels):
    """InfoNCE (van den Oord et al., 2018; MoCo eq. 1): cross-entropy of the positive's column. The logits carry 1/T."""
    scores, left_out = _read(logits)
    rows = F.cross_entropy(scores.masked_fill(left_out, LOWEST), labels, reduction="none")
    return _mean(rows, left_out.scatter(1, labels[:, None], True))


def triplet(logits, labels, margin=0.2):
    """Triplet loss on cosine similarity with each anchor's hardest negative: mean of [s_n - s_p + margin]+.

    For the paper's row "triplet, no bank", whose negatives are the step's own, train with `--moco_k 0`.
    """
    positive, scores, no_negative = _split(logits, labels)
    hardest = scores.masked_fill(no_negative, LOWEST).amax(1)  # (N,)
    return _mean(F.relu(hardest - positive + margin), no_negative)


LOSSES = {
    "circle": circle,
    "circle-released": circle_released,
    "infonce": infonce,
    "triplet": triplet,
}
