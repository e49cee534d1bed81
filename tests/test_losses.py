"""Contrastive losses: other implementations, formulas by hand, the limits of float arithmetic."""

import math

import numpy as np
import pytest
import torch

from losses import LOSSES, circle, circle_released, infonce, triplet

INF = torch.inf
NAMES = list(LOSSES)
ROW_BY_ROW = ["circle", "infonce", "triplet"]  # the losses that treat every row alike


def similarities(N=6, K=20, seed=0):
    """Logits in [-1, 1] and labels 0."""
    torch.manual_seed(seed)
    return torch.rand(N, 1 + K) * 2 - 1, torch.zeros(N, dtype=torch.long)


def value_and_gradient(loss, logits, labels, **options):
    logits = logits.clone().requires_grad_()
    value = loss(logits, labels, **options)
    value.backward()
    return value.detach(), logits.grad


def softplus(z):
    return max(z, 0) + math.log1p(math.exp(-abs(z)))


def log_sum_exp(values):
    top = max(values)
    return top + math.log(sum(math.exp(value - top) for value in values))


# --- circle ---


def circle_by_loop(logits, labels, m, gamma):
    """Circle loss eq. 6, one anchor at a time in double precision: its value and its gradient.

    With Z the argument of the softplus,
    dL/ds_n = sigmoid(Z) softmax_n gamma alpha_n,  dL/ds_p = -sigmoid(Z) gamma alpha_p.
    """
    rows, gradient = [], np.zeros(logits.shape)
    for i, (row, label) in enumerate(zip(logits.double().tolist(), labels.tolist(), strict=True)):
        s_p = row[label]
        columns = [j for j in range(len(row)) if j != label and row[j] > -math.inf]
        alpha_p = max(0.0, 1 + m - s_p)
        alpha_n = [max(0.0, row[j] + m) for j in columns]
        terms = [gamma * alpha * (row[j] - m) for alpha, j in zip(alpha_n, columns, strict=True)]
        push = log_sum_exp(terms)
        Z = push + gamma * alpha_p * (1 - m - s_p)
        rows.append(softplus(Z))
        sigmoid = 1 / (1 + math.exp(-Z)) if Z > -700 else 0.0
        gradient[i, label] = -sigmoid * gamma * alpha_p
        for j, alpha, term in zip(columns, alpha_n, terms, strict=True):
            gradient[i, j] = sigmoid * math.exp(term - push) * gamma * alpha
    return sum(rows) / len(rows), gradient / len(rows)


def test_circle_case_by_hand():
    # m = 1/4, gamma = 4. s_p = 1/2: alpha_p = 3/4, pull = 4 * 3/4 * (3/4 - 1/2) = 3/4.
    # s_n = 1/4, -1/4: alpha_n = 1/2, 0, terms = 0, 0, push = log 2.
    # L = log(1 + 2 e^(3/4)) = 1.65518
    value = circle(torch.tensor([[0.5, 0.25, -0.25]]), torch.tensor([0]), margin=0.25, gamma=4)
    assert float(value) == pytest.approx(math.log(1 + 2 * math.exp(0.75)), rel=1e-6)
    assert float(value) == pytest.approx(1.65518, abs=1e-5)


@pytest.mark.parametrize("gamma", [1, 16, 80, 256])
@pytest.mark.parametrize("margin", [0.25, 0.4])
def test_circle_equation_6_in_double_precision(gamma, margin):
    for seed in range(5):
        logits, _ = similarities(seed=seed)
        labels = torch.randint(0, logits.shape[1], (len(logits),))
        expected, gradient = circle_by_loop(logits, labels, margin, gamma)
        value, found = value_and_gradient(circle, logits, labels, margin=margin, gamma=gamma)
        assert float(value) == pytest.approx(expected, rel=1e-5)
        np.testing.assert_allclose(
            found.numpy(), gradient, rtol=1e-3, atol=1e-3 * gamma / len(logits) * 0.01
        )


@pytest.mark.parametrize("gamma", [1, 32, 256])
def test_circle_pytorch_metric_learning(gamma):
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    torch.manual_seed(0)
    N, K, D = 5, 30, 16
    q, p, bank = (torch.nn.functional.normalize(torch.randn(n, D), dim=1) for n in (N, N, K))
    theirs = losses.CircleLoss(m=0.25, gamma=gamma)
    by_anchor = []
    for i in range(N):  # the anchor and its positive are of class 0, the bank of class 1
        references = torch.cat([p[i : i + 1], bank])
        classes = torch.tensor([0] + [1] * K)
        loss = theirs(q[i : i + 1], torch.tensor([0]), ref_emb=references, ref_labels=classes)
        by_anchor.append(float(loss))
    logits = torch.cat([(q * p).sum(1, keepdim=True), q @ bank.T], 1)
    ours = circle(logits, torch.zeros(N, dtype=torch.long), gamma=gamma)
    assert float(ours) == pytest.approx(np.mean(by_anchor), rel=1e-4)


def test_circle_weights_alpha_carry_no_gradient():
    """One anchor, one negative. With alpha in it, dL/ds_p would be sigmoid(Z) gamma (2 s_p - 2)."""
    m, gamma, s_p, s_n = 0.25, 2.0, 0.6, 0.3
    Z = gamma * (s_n + m) * (s_n - m) + gamma * (1 + m - s_p) * (1 - m - s_p)
    sigmoid = 1 / (1 + math.exp(-Z))
    _, gradient = value_and_gradient(
        circle, torch.tensor([[s_p, s_n]]), torch.tensor([0]), margin=m, gamma=gamma
    )
    assert gradient[0].tolist() == pytest.approx(
        [-sigmoid * gamma * (1 + m - s_p), sigmoid * gamma * (s_n + m)], rel=1e-5
    )
    assert gradient[0, 0] != pytest.approx(sigmoid * gamma * (2 * s_p - 2), rel=1e-2)


# --- circle-released ---


def released_by_loop(logits, m, gamma):
    """The released code's formula with labels 0.

    The first row's scores take the positive form, the others' the negative form
    gamma (s^2 - m^2), where s > -m; then cross-entropy of column 0.
    """
    total = 0.0
    for i, row in enumerate(logits.double().tolist()):
        if i == 0:
            forms = [gamma * max(0.0, 1 + m - s) * (s - (1 - m)) for s in row]
        else:
            forms = [gamma * (s**2 - m**2) if s > -m else 0.0 for s in row]
        total += log_sum_exp(forms) - forms[0]
    return total / len(logits)


@pytest.mark.parametrize("gamma", [1, 32, 256])
def test_circle_released_formula_of_the_released_code(gamma):
    for seed in range(5):
        logits, labels = similarities(seed=seed)
        found = circle_released(logits, labels, gamma=gamma)
        assert float(found) == pytest.approx(released_by_loop(logits, 0.25, gamma), rel=1e-4)


def test_circle_and_circle_released_differ():
    for N in (1, 2, 8):
        for seed in range(5):
            value, gradient = value_and_gradient(circle, *similarities(N, seed=seed))
            other, other_gradient = value_and_gradient(circle_released, *similarities(N, seed=seed))
            assert abs(value - other) > 1e-2 * abs(value)
            assert not torch.allclose(gradient, other_gradient, rtol=1e-2)


# --- infonce and triplet ---


def test_infonce_softmax_by_hand_and_torch_cross_entropy():
    logits, _ = similarities()
    labels = torch.randint(0, logits.shape[1], (len(logits),))
    for T in (1.0, 0.07):
        rows = []
        for row, label in zip((logits.double() / T).tolist(), labels.tolist(), strict=True):
            rows.append(-math.log(math.exp(row[label]) / sum(map(math.exp, row))))
        assert float(infonce(logits / T, labels)) == pytest.approx(np.mean(rows), rel=1e-5)
        theirs = torch.nn.functional.cross_entropy(logits / T, labels)
        assert float(infonce(logits / T, labels)) == pytest.approx(float(theirs), rel=1e-6)


def test_circle_defaults_are_the_papers_margin_and_gamma():
    logits, labels = similarities()
    assert float(circle(logits, labels)) == pytest.approx(
        circle_by_loop(logits, labels, 0.25, 256)[0], rel=1e-5
    )
    assert float(circle_released(logits, labels)) == pytest.approx(
        released_by_loop(logits, 0.25, 256), rel=1e-4
    )


def test_triplet_case_by_hand():
    # margin .2; rows: .7 - .5 + .2 = .4 (hardest of .1, .7); .1 - .9 + .2 < 0; .3 - .4 + .2 = .1
    logits = torch.tensor([[0.5, 0.1, 0.7], [0.9, 0.1, 0.05], [0.4, 0.3, -1.0]])
    labels = torch.zeros(3, dtype=torch.long)
    value, gradient = value_and_gradient(triplet, logits, labels)
    assert float(value) == pytest.approx(0.5 / 3, rel=1e-6)
    expected = torch.tensor([[-1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [-1.0, 1.0, 0.0]]) / 3
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("name", ROW_BY_ROW)
def test_loss_positive_in_any_column(name):
    logits, labels = similarities()
    columns = torch.tensor([0, 3, 20, 7, 1, 11])
    moved = logits.clone()
    for i, column in enumerate(columns):
        moved[i, 0], moved[i, column] = logits[i, column], logits[i, 0]
    value, gradient = value_and_gradient(LOSSES[name], logits, labels)
    other, other_gradient = value_and_gradient(LOSSES[name], moved, columns)
    torch.testing.assert_close(other, value)
    for i, column in enumerate(columns):
        torch.testing.assert_close(other_gradient[i, column], gradient[i, 0])


# --- every loss is finite ---

EXTREMES = {
    "all 1": torch.ones(4, 30),
    "all -1": -torch.ones(4, 30),
    "the worst order": torch.cat([-torch.ones(4, 1), torch.ones(4, 29)], 1),
    "the best order": torch.cat([torch.ones(4, 1), -torch.ones(4, 29)], 1),
    "random": similarities(4, 29)[0],
    "over a temperature of .01": similarities(4, 29)[0] / 0.01,
    "huge": 1e30 * (similarities(4, 29)[0]),
    "the largest floats": torch.finfo(torch.float32).max * similarities(4, 29)[0].sign(),
    "one column": similarities(4, 0)[0],
}


@pytest.mark.parametrize("extreme", EXTREMES)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("precision", ["float32", "autocast", "bfloat16", "float64"])
def test_loss_and_gradient_finite_for_finite_input(name, extreme, precision):
    logits, labels = EXTREMES[extreme], torch.zeros(4, dtype=torch.long)
    if precision in ("bfloat16", "float64"):
        dtype = getattr(torch, precision)
        largest = torch.finfo(dtype).max
        logits = logits.double().clamp(-largest, largest).to(dtype).clamp(-largest, largest)
        assert torch.isfinite(logits).all()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        value, gradient = value_and_gradient(LOSSES[name], logits, labels)
    assert torch.isfinite(value) and torch.isfinite(gradient).all() and float(value) >= 0


@pytest.mark.parametrize("name", NAMES)
def test_loss_unchanged_under_autocast(name):
    logits, labels = similarities()
    with torch.autocast("cpu", torch.bfloat16):
        value, gradient = value_and_gradient(LOSSES[name], logits, labels)
    expected, expected_gradient = value_and_gradient(LOSSES[name], logits, labels)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient, expected_gradient)


# --- columns left out ---


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scale", [1, 1 / 0.07])
def test_loss_column_at_minus_infinity_counts_as_dropped(name, scale):
    logits, labels = similarities(K=20)
    logits = logits * scale
    out = [2, 5, 6, 20]
    kept = [j for j in range(21) if j not in out]
    masked = logits.clone()
    masked[:, out] = -INF
    value, gradient = value_and_gradient(LOSSES[name], masked, labels)
    expected, expected_gradient = value_and_gradient(LOSSES[name], logits[:, kept], labels)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient[:, kept], expected_gradient)
    assert not gradient[:, out].any() and torch.isfinite(gradient).all()


@pytest.mark.parametrize("name", NAMES)
def test_loss_rows_leave_out_different_columns(name):
    logits, labels = similarities(N=4, K=10)
    torch.manual_seed(1)
    out = torch.rand(4, 11) < 0.4
    out[:, 0] = False
    value, gradient = value_and_gradient(LOSSES[name], logits.masked_fill(out, -INF), labels)
    assert torch.isfinite(gradient).all() and not gradient[out].any()
    if name in ROW_BY_ROW:
        alone = []
        for row, mask in zip(logits, out, strict=True):
            alone.append(LOSSES[name](row[~mask][None], labels[:1]))
        torch.testing.assert_close(value, torch.stack(alone).mean())


@pytest.mark.parametrize("name", ROW_BY_ROW)
def test_loss_row_without_negative_contributes_nothing(name):
    logits, labels = similarities(N=4, K=10)
    logits[:, 0] = -0.9  # so that every row has something to learn
    emptied = logits.clone()
    emptied[1, 1:] = emptied[3, 1:] = -INF
    value, gradient = value_and_gradient(LOSSES[name], emptied, labels)
    expected, expected_gradient = value_and_gradient(LOSSES[name], logits[[0, 2]], labels[:2])
    assert not gradient[[1, 3]].any()
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient[[0, 2]], expected_gradient)


@pytest.mark.parametrize("name", NAMES)
def test_loss_and_gradient_0_without_any_negative(name):
    logits, labels = similarities(N=4, K=10)
    logits[:, 1:] = -INF
    value, gradient = value_and_gradient(LOSSES[name], logits, labels)
    assert float(value) == 0 and not gradient.any()


@pytest.mark.parametrize("name", NAMES)
def test_loss_is_a_scalar_and_keeps_its_input(name):
    logits, labels = similarities()
    before = logits.clone()
    assert LOSSES[name](logits, labels).shape == ()
    assert torch.equal(logits, before)


@pytest.mark.parametrize("name", NAMES)
def test_loss_shows_nan(name):
    """A broken encoder must stop the run, not train on nothing in silence."""
    logits, labels = similarities()
    logits[0, 3] = float("nan")
    assert torch.isnan(LOSSES[name](logits, labels))
