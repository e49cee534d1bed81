"""The training log: metrics against loops, the lines of a run, events and curves."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.commands import refused
from helpers.feature_files import read_log
from helpers.training import logged, recorded_steps, run, val_flags
from PIL import Image

import training_log
import visualize
from distributed import Distributed
from losses import LOSSES

# --- metrics ---


@pytest.mark.parametrize("loss", LOSSES)
def test_step_metrics_against_a_loop_over_the_logits(loss):
    torch.manual_seed(0)
    logits = (torch.rand(3, 1 + 250) * 2 - 1).requires_grad_()
    with torch.no_grad():
        logits[1, 5:20] = -torch.inf
    value = LOSSES[loss](logits, torch.zeros(3, dtype=torch.long))
    value.backward()
    metrics = training_log.step_metrics(value, logits.detach(), logits.grad)
    shares, hardest, rows = [], [], logits.tolist()
    for row, gradient in zip(rows, logits.grad.tolist(), strict=True):
        order = sorted(range(1, 251), key=lambda j, row=row: -row[j])
        total = sum(abs(gradient[j]) for j in order)
        if total:
            top = order[:3]  # 1 % of 250, rounded up
            shares.append(sum(abs(gradient[j]) for j in top) / total)
        hardest.append(row[order[0]])
    used = [value for row in rows for value in row[1:] if value > -math.inf]
    assert metrics["loss"] == pytest.approx(value.item())
    assert metrics["hardest_share"] == pytest.approx(np.mean(shares), rel=1e-5)
    assert 0 < metrics["hardest_share"] <= 1
    assert metrics["hardest_negative"] == pytest.approx(np.mean(hardest))
    assert metrics["positive"] == pytest.approx(np.mean([row[0] for row in rows]))
    assert metrics["negative"] == pytest.approx(np.mean(used), rel=1e-5)
    assert metrics["left_out"] == pytest.approx(15 / 750)


def test_step_metrics_without_any_negative_are_nan():
    logits = torch.tensor([[0.5, -torch.inf, -torch.inf]])
    metrics = training_log.step_metrics(torch.tensor(0.0), logits, torch.zeros(1, 3))
    undefined = {name for name, value in metrics.items() if math.isnan(value)}
    assert undefined == {"negative", "hardest_negative", "hardest_share"}
    assert metrics["positive"] == 0.5 and metrics["left_out"] == 1


def test_hardest_share_of_infonce_is_its_softmax():
    """100 negatives, so the hardest 1 % is one."""
    logits = torch.tensor([[0.0, 3.0, 1.0, *[0.0] * 98]], requires_grad=True)
    LOSSES["infonce"](logits, torch.tensor([0])).backward()
    share = training_log.hardest_share(logits.detach()[:, 1:], logits.grad[:, 1:])
    assert share == pytest.approx(math.exp(3) / (math.exp(3) + math.exp(1) + 98), rel=1e-5)


def test_queue_age_counts_steps_apart_from_the_random_start(world, tmp_path):
    """A bank of 100, to which each step adds 32."""
    run(world, tmp_path, "--moco_k", 100, "--epochs", 1)
    ages = [
        None,
        np.mean([0] * 32),
        np.mean([0] * 32 + [1] * 32),
        np.mean([0] * 32 + [1] * 32 + [2] * 32),
        *[np.mean([0] * 32 + [1] * 32 + [2] * 32 + [3] * 4)] * 2,
    ]
    assert logged(tmp_path, "queue_age")[:6] == pytest.approx(ages)
    expected = [1, 0.68, 0.36, 0.04, 0, 0]
    assert logged(tmp_path, "queue_random")[:6] == pytest.approx(expected, abs=1e-6)


def test_similarities_are_logits_times_the_temperature(world, tmp_path):
    with recorded_steps() as steps:
        run(world, tmp_path, "--loss", "infonce", "--moco_t", 0.1, "--epochs", 1)
    expected = [float(step.logits[:, 0].mean()) * 0.1 for step in steps]
    assert logged(tmp_path, "positive") == pytest.approx(expected, rel=1e-5)


# --- files ---


def make_run(folder, step=0):
    return SimpleNamespace(folder=folder, step=step, total_steps=10, dist=Distributed())


def test_log_writes_null_for_nan(tmp_path):
    with training_log.TrainingLog(make_run(tmp_path, 1)) as log:
        log.write(0, held_out={"mAP": 0.5, "event": math.nan})
    assert read_log(tmp_path) == [{"step": 1, "epoch": 0, "held_out": {"mAP": 0.5, "event": None}}]


def test_log_of_a_resumed_run_drops_later_lines_and_broken_ones(tmp_path):
    lines = [json.dumps({"step": step, "epoch": 0}) for step in range(1, 6)]
    (tmp_path / "log.jsonl").write_text("\n".join([*lines, "[]", '{"step": 2, "ep']))
    with training_log.TrainingLog(make_run(tmp_path, 3)):
        pass
    assert [line["step"] for line in read_log(tmp_path)] == [1, 2, 3]


def test_log_of_other_processes_writes_nothing(tmp_path):
    other = SimpleNamespace(is_main=False)
    with training_log.TrainingLog(
        SimpleNamespace(**vars(make_run(tmp_path)) | {"dist": other})
    ) as log:
        log.write(0, loss=1.0)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("log") / "run"
    run(world, folder, "--epochs", 2, *val_flags(world))
    return folder


def test_tensorboard_events_equal_the_log(trained):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(trained))
    events.Reload()
    lines = read_log(trained)
    for name in ("loss", "positive", "hardest_share", "lr"):
        expected = {line["step"]: line[name] for line in lines if line.get(name) is not None}
        assert len(expected) > 10
        assert {item.step: item.value for item in events.Scalars(name)} == pytest.approx(expected)
    scores = {line["step"]: line["held_out"]["DSVR"] for line in lines if "held_out" in line}
    found = {item.step: item.value for item in events.Scalars("held_out/DSVR")}
    assert len(scores) == 2 and found == pytest.approx(scores)


def test_series_are_the_logs_values(trained):
    panels = training_log.series(training_log.read_log(trained))
    steps, values = panels["similarity"]["positive"]
    assert steps == list(range(1, 19)) and values == logged(trained, "positive")
    assert sorted(panels["validation mAP"]) == ["CSVR", "DSVR", "ISVR"]
    assert panels["validation mAP"]["DSVR"][0] == [9, 18]


def test_curves_of_runs_and_logs_are_drawn(trained, tmp_path):
    picture = tmp_path / "curves.png"
    runs = [str(trained), str(trained / "log.jsonl")]
    visualize.main(["curves", *runs, "--output", str(picture)])
    with Image.open(picture) as image:
        assert image.format == "PNG" and image.size[0] > 4 * 400  # four panels
        assert len(np.unique(np.asarray(image.convert("L")))) > 10


def test_curves_of_what_is_not_a_log_are_refused(tmp_path):
    (tmp_path / "text").write_text("no log\n")
    (tmp_path / "empty.jsonl").write_text("")
    for name in ("text", "absent", "empty.jsonl"):
        picture = tmp_path / "none.png"
        assert name in refused(visualize.main, "curves", tmp_path / name, "--output", picture)
        assert not picture.exists()
