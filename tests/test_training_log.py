"""What a run tells of itself: figures against loops, the log of a resumed run, curves."""

import itertools
import math

import numpy as np
import pytest
import torch
from helpers.commands import clis, one_error
from helpers.files import read_log
from PIL import Image
from test_train import handlers, held_out, trainer  # noqa: F401 - handlers is for every test here

import training_log
from losses import LOSSES


@pytest.mark.parametrize("loss", LOSSES)
def test_log_figures_are_those_of_a_loop_over_the_logits(loss):
    torch.manual_seed(0)
    logits = (torch.rand(3, 1 + 250) * 2 - 1).requires_grad_()
    with torch.no_grad():
        logits[1, 5:20] = -torch.inf
    value = LOSSES[loss](logits, torch.zeros(3, dtype=torch.long))
    value.backward()
    found = training_log.step_metrics(value, logits.detach(), logits.grad)
    shares, hardest, rows = [], [], logits.tolist()
    for row, weights_ in zip(rows, logits.grad.tolist(), strict=True):
        order = sorted(range(1, 251), key=lambda j, row=row: -row[j])
        total = sum(abs(weights_[j]) for j in order)
        shares += (
            [sum(abs(weights_[j]) for j in order[:3]) / total] if total else []
        )  # 1 % of 250, rounded up
        hardest.append(row[order[0]])
    assert (
        found["hardest_share"] == pytest.approx(np.mean(shares), rel=1e-5)
        and 0 < found["hardest_share"] <= 1
    )
    assert found["hardest_negative"] == pytest.approx(np.mean(hardest))
    assert found["positive"] == pytest.approx(np.mean([row[0] for row in rows]))
    used = [s for row in rows for s in row[1:] if s > -math.inf]
    assert found["negative"] == pytest.approx(np.mean(used), rel=1e-5) and found[
        "left_out"
    ] == pytest.approx(15 / 750)


def test_the_gradient_weight_of_infonce_is_its_softmax():
    logits = torch.tensor(
        [[0.0, 3.0, 1.0, *[0.0] * 98]], requires_grad=True
    )  # 100 negatives: the hardest 1 % is one
    loss = LOSSES["infonce"](logits, torch.tensor([0]))
    loss.backward()
    found = training_log.step_metrics(loss, logits.detach(), logits.grad)["hardest_share"]
    assert found == pytest.approx(math.exp(3) / (math.exp(3) + math.exp(1) + 98), rel=1e-5)


def test_queue_age_counts_steps_since_an_entry_came_and_the_random_start_apart(world, tmp_path):
    made = trainer(world, tmp_path, "--moco_k", 100)  # 32 keys a step
    found = []
    for batch in itertools.islice(made.batches(), 6):
        found.append(training_log.queue_metrics(made.model))
        made.train_step(batch)
    ages = [
        np.mean([0] * 32),
        np.mean([0] * 32 + [1] * 32),
        np.mean([0] * 32 + [1] * 32 + [2] * 32),
    ]
    ages += [np.mean([0] * 32 + [1] * 32 + [2] * 32 + [3] * 4)] * 2
    assert math.isnan(found[0]["queue_age"]) and [
        line["queue_age"] for line in found[1:]
    ] == pytest.approx(ages)
    assert [line["queue_random"] for line in found] == pytest.approx(
        [1, 0.68, 0.36, 0.04, 0, 0], abs=1e-6
    )


def test_tensorboard_events_say_what_the_log_says_and_curves_are_drawn_without_a_server(
    world, tmp_path
):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert trainer(world, tmp_path / "run", "--epochs", 2, *held_out(world)).fit() == 0
    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    lines = read_log(tmp_path / "run")
    for name in ("loss", "positive", "hardest_share", "lr"):
        expected = {line["step"]: line[name] for line in lines if line.get(name) is not None}
        assert {item.step: item.value for item in events.Scalars(name)} == pytest.approx(
            expected
        ) and len(expected) > 10
    scores = {line["step"]: line["held_out"]["DSVR"] for line in lines if "held_out" in line}
    assert {item.step: item.value for item in events.Scalars("held_out/DSVR")} == pytest.approx(
        scores
    )
    (tmp_path / "text").write_text("no log\n")
    drawn, refused, absent = clis(
        [
            "training_log.py",
            tmp_path / "run",
            tmp_path / "run" / "log.jsonl",
            "--output",
            tmp_path / "curves.png",
        ],
        ["training_log.py", tmp_path / "text", "--output", tmp_path / "none.png"],
        ["training_log.py", tmp_path / "absent", "--output", tmp_path / "none.png"],
    )
    assert drawn.returncode == 0, drawn.stderr
    with Image.open(tmp_path / "curves.png") as image:
        assert (
            image.format == "PNG"
            and image.size[0] > 4 * 400
            and len(np.unique(np.asarray(image.convert("L")))) > 10
        )
    assert (
        "text" in one_error(refused)
        and "absent" in one_error(absent)
        and not (tmp_path / "none.png").exists()
    )
    found = training_log.series(lines)
    assert found["similarity"]["positive"][1] == [
        line["positive"] for line in lines if "positive" in line
    ]
    assert sorted(found["held-out mAP"]) == ["CSVR", "DSVR", "ISVR"]


def test_a_figure_that_is_no_number_is_null_in_the_log(tmp_path):
    log = training_log.TrainingLog(tmp_path, 0)
    log.write(1, 0, held_out={"mAP": 0.5, "event": math.nan})
    log.close()
    assert read_log(tmp_path) == [{"step": 1, "epoch": 0, "held_out": {"mAP": 0.5, "event": None}}]
