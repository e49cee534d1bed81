"""train.py: one seed gives one result, also after kills; training learns; bad input is refused."""

import io
import json
import math
import os
import shutil
import signal
import time
from argparse import Namespace
from unittest import mock

import h5py
import numpy as np
import pytest
import torch
from helpers import training
from helpers.commands import cli, clis, error_after_progress, is_progress, one_error, refused, start
from helpers.feature_files import read_log, write_packed, write_pickle
from helpers.threads import run_in_threads
from helpers.training import (
    RELEASED,
    assert_same_run,
    checkpoint_of,
    command,
    equal,
    log_without_times,
    logged,
    recorded_steps,
    run,
    run_until,
    train_flags,
    val_flags,
    wait_for_step,
    weights,
)
from helpers.worlds import C

import checkpoint
import train
from datasets.registry import load_evaluation_set
from features.store import FeatureStore
from losses import LOSSES
from model import ENCODERS, Mean, load_encoder
from processes import STOP_SIGNALS
from retrieval.compare import compare_collections
from train import OPTIMIZERS, set_arithmetic


def metrics_of(encoder, features, evaluation_set, annotations):
    """The set's metrics by cosine similarity."""
    store = FeatureStore(features)
    chosen = load_evaluation_set(evaluation_set, annotations)
    tables = compare_collections(encoder, store, chosen.queries, chosen.database, ["cosine"])
    return chosen.evaluate_table(chosen.queries, chosen.database, tables["cosine"])


# --- one seed, one result ---


@pytest.mark.slow
def test_same_seed_same_weights_however_data_are_loaded(world, tmp_path):
    """In processes of different hash seeds, by workers, by row numbers, and by neither."""
    epochs = ["--epochs", 2]
    run(world, tmp_path / "first", *epochs)
    run(world, tmp_path / "other", *epochs, "--seed", 1)
    workers = ["--num_workers", 2, "--num_readers", 3]
    on_device = ["--features_on", "device", *workers]
    results = clis(
        command(world, tmp_path / "again", *epochs, *on_device),
        command(world, tmp_path / "workers", *epochs, *workers),
    )
    assert [result.returncode for result in results] == [0, 0], results
    assert_same_run(tmp_path / "first", tmp_path / "again")
    assert_same_run(tmp_path / "first", tmp_path / "workers")
    assert not equal(weights(tmp_path / "first"), weights(tmp_path / "other"))


def test_epoch_takes_every_pair_once_in_a_new_order(world, tmp_path):
    with recorded_steps() as steps:
        run(world, tmp_path, "--batch_sz", 9, "--epochs", 2)
    order = [i for step in steps for i in step.indices]
    assert sorted(order[:72]) == sorted(order[72:]) == list(range(72))
    assert order[:72] != order[72:]


def test_learning_rate_falls_as_a_cosine_over_the_epochs(world, tmp_path):
    run(world, tmp_path, "--epochs", 4, "--learning_rate", 1e-3)
    rates = {line["epoch"]: line["lr"] for line in read_log(tmp_path)}
    expected = {epoch: 1e-3 * (1 + math.cos(math.pi * epoch / 4)) / 2 for epoch in range(4)}
    assert rates == pytest.approx(expected)


# --- stopped and resumed ---

LONG = ["--epochs", 60, "--patience", 14, "--dropout", 0.2, "--learning_rate", 1e-3]
LONG += ["--init", "near_identity"]


@pytest.fixture(scope="module")
def unbroken(world, tmp_path_factory):
    """(folder, what was printed) of a run with dropout that its validation set stops early."""
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    return folder, run(world, folder, *LONG, *val_flags(world))


@pytest.mark.slow
def test_run_killed_again_and_again_ends_like_the_unbroken_run(world, unbroken, kill_rng, tmp_path):
    folder, whole = tmp_path / "run", unbroken[0]
    last = read_log(whole)[-1]["step"]
    more = [*LONG, *val_flags(world), "--save_every", kill_rng.randint(1, 5)]
    kills = sorted(kill_rng.sample(range(12, last * 2 // 3), 3))
    print(f"killed at {kills}, {more[-2:]}")  # shown if the test fails
    stop = kill_rng.choice(STOP_SIGNALS)
    signals = (signal.SIGKILL, stop, signal.SIGKILL)
    for number, step in zip(signals, kills, strict=True):
        process = start(*command(world, folder, *more))
        wait_for_step(process, folder, step)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=60)
        assert not (folder / "model.pth").exists()
        saved = checkpoint_of(folder)["step"]
        if number == stop:
            assert process.returncode == 128 + stop, stderr
            assert read_log(folder)[-1]["step"] == saved >= step  # no step was lost
        else:
            assert process.returncode == -signal.SIGKILL
            assert 0 < saved < last
    assert "resuming at step" in run(world, folder, *more)
    assert_same_run(folder, whole)
    left = sorted(name for name in os.listdir(folder) if not name.startswith("events."))
    assert left == ["args.json", "checkpoint.prev.pth", "checkpoint.pth", "log.jsonl", "model.pth"]


@pytest.mark.slow
def test_run_killed_without_validation_set_ends_like_the_unbroken_run(world, tmp_path):
    more = ["--epochs", 12, "--dropout", 0.5, "--loss", "infonce", "--moco_m", 0.9]
    more += ["--optimizer", "sgd", "--learning_rate", 0.1, "--save_every", 4]
    process = start(*command(world, tmp_path / "killed", *more))
    wait_for_step(process, tmp_path / "killed", 30)
    process.kill()
    process.communicate()
    run(world, tmp_path / "killed", *more)
    run(world, tmp_path / "whole", *more)
    assert_same_run(tmp_path / "killed", tmp_path / "whole")


def test_signal_in_the_last_step_leaves_the_encoder_to_the_next_start(world, tmp_path):
    more = ["--epochs", 2, *val_flags(world)]
    run(world, tmp_path / "whole", *more)
    run_until(18, world, tmp_path / "stopped", *more, by=signal.SIGINT)
    assert not (tmp_path / "stopped" / "model.pth").exists()
    run(world, tmp_path / "stopped", *more)
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_to_the_workers_too_still_saves(world, tmp_path, number):
    """As launchers and terminals send it: to the whole group. `timeout` sends it twice."""
    more = ["--num_workers", 1, "--epochs", 500, "--save_every", 100000]
    process = start(*command(world, tmp_path, *more), start_new_session=True)
    wait_for_step(process, tmp_path, 1)
    os.killpg(process.pid, number)
    os.kill(process.pid, number)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + number, stderr
    lines = [line for line in stderr.splitlines() if line and not is_progress(line)]
    notice = "stopping after this step; Ctrl-C again ends at once, without a checkpoint"
    assert lines == ([notice] if number == signal.SIGINT else [])
    step = checkpoint_of(tmp_path)["step"]
    assert f"stopped at step {step};" in stdout and step == read_log(tmp_path)[-1]["step"]


def test_second_interrupt_ends_the_run_at_once(world, tmp_path, monkeypatch):
    """The first one arrives while a step takes long; the run has no checkpoint yet."""
    monkeypatch.setattr(checkpoint, "REPEAT", 0)

    def interrupt_twice(*_):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(train, "adjust_learning_rate", interrupt_twice)
    with pytest.raises(KeyboardInterrupt):
        training.main(train_flags(world, tmp_path, "--epochs", 2))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert not (tmp_path / "checkpoint.pth").exists()


def test_interrupt_that_is_ignored_stays_ignored(world, tmp_path):
    """A shell ignores Ctrl-C for the background jobs of a script."""
    with mock.patch.object(train, "adjust_learning_rate") as adjust:
        adjust.side_effect = lambda *_: os.kill(os.getpid(), signal.SIGINT)
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            run(world, tmp_path, "--epochs", 1)  # to its end
        finally:
            signal.signal(signal.SIGINT, before)


def test_finished_run_is_left_alone_and_other_settings_are_refused(world, unbroken):
    folder, _ = unbroken
    names = ("model.pth", "checkpoint.pth", "log.jsonl", "args.json")
    before = {name: (folder / name).read_bytes() for name in names}
    same = train_flags(world, folder, *LONG, *val_flags(world))
    assert "is complete" in run(world, folder, *LONG, *val_flags(world))
    for flag, value in (("--seed", 1), ("--loss", "infonce"), ("--epochs", 61)):
        message = refused(training.main, *same, flag, value)
        assert flag in message and repr(value) in message and str(folder) in message
    assert {name: (folder / name).read_bytes() for name in names} == before


def test_resume_refuses_features_of_other_content(world, tmp_path):
    features = tmp_path / "features.hdf5"
    shutil.copy(world.train_features, features)
    more = ["--epochs", 1, "--feature_path", features]
    run(world, tmp_path / "run", *more)
    assert "is complete" in run(world, tmp_path / "run", *more)
    with h5py.File(features, "r+") as file:
        file["frames"][...] = -file["frames"][...]
    message = refused(training.main, *train_flags(world, tmp_path / "run", *more))
    assert "made from other features files" in message


def test_resume_refuses_a_validation_set_of_other_content(world, tmp_path):
    more = [*val_flags(world), "--epochs", 2]
    run_until(1, world, tmp_path / "run", *more)
    shutil.copytree(world.annotations, tmp_path / "annotations")
    labels_file = tmp_path / "annotations" / "demo_val.json"
    labels = json.loads(labels_file.read_text())
    labels.pop(next(iter(labels)))
    labels_file.write_text(json.dumps(labels))
    more += ["--annotation_dir", tmp_path / "annotations"]
    message = refused(training.main, *train_flags(world, tmp_path / "run", *more))
    assert "made from other held_out files" in message


def test_resume_with_another_batch_size_goes_on_after_the_pairs_seen(world, tmp_path):
    with recorded_steps() as whole:
        run(world, tmp_path / "whole", "--batch_sz", 8, "--epochs", 1)
    run_until(4, world, tmp_path / "run", "--batch_sz", 8, "--epochs", 2)
    state = checkpoint_of(tmp_path / "run")
    assert (state["step"], state["epoch"], state["seen"]) == (4, 0, 32)
    with recorded_steps() as steps:
        printed = run(world, tmp_path / "run", "--batch_sz", 9, "--epochs", 2)
    assert "after the 32 of 72 pairs" in printed
    order = [i for step in whole for i in step.indices]
    rest = [i for step in steps[:4] for i in step.indices]
    assert rest == order[32 : 32 + 36]  # 40 are left, 4 do not fill a step
    assert read_log(tmp_path / "run")[-1]["step"] == 4 + 4 + 8


# --- checkpoints that cannot be used ---


def test_checkpoint_broken_or_foreign_is_reported_and_the_previous_one_used(
    world, tmp_path, capsys
):
    more = ["--epochs", 2, "--save_every", 4, "--dropout", 0.3]
    folder = tmp_path / "run"
    run(world, folder, *more)
    whole, log = weights(folder), log_without_times(folder)
    newest, previous = folder / "checkpoint.pth", folder / "checkpoint.prev.pth"
    good = newest.read_bytes()
    for content in (good[: len(good) // 2], b"no checkpoint", torch_bytes({"model": 1})):
        newest.write_bytes(content)
        (folder / "model.pth").unlink()
        capsys.readouterr()
        run(world, folder, *more)
        lines = capsys.readouterr().err.splitlines()
        (warning,) = [line for line in lines if "warning: " in line]
        assert "checkpoint.pth" in warning and "checkpoint.prev.pth, step" in warning
        assert equal(weights(folder), whole) and log_without_times(folder) == log
    newest.write_bytes(good[:-100])
    previous.write_bytes(b"")
    (folder / "model.pth").unlink()
    message = refused(training.main, *train_flags(world, folder, *more))
    assert all(word in message for word in (newest.name, previous.name, "--model_path"))


def torch_bytes(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def test_checkpoint_keeps_the_newest_and_the_previous_one(tmp_path):
    for step in range(1, 5):
        checkpoint.write_checkpoint(tmp_path, {"step": step})
        assert checkpoint.newest_readable_checkpoint(tmp_path, ["step"]) == {"step": step}
    (tmp_path / "checkpoint.pth").unlink()  # killed between the two renames
    assert checkpoint.newest_readable_checkpoint(tmp_path, ["step"]) == {"step": 3}
    assert checkpoint.newest_readable_checkpoint(tmp_path / "empty", ["step"]) is None
    assert sorted(os.listdir(tmp_path)) == ["checkpoint.prev.pth"]


# --- the validation set ---


def test_validation_stops_early_and_keeps_the_best_epoch(world, unbroken):
    folder, printed = unbroken
    scores = [metrics["DSVR"] for metrics in logged(folder, "held_out")]
    best = int(np.argmax(scores))  # the first of equals
    assert len(scores) == best + 1 + 14 < 60, "it should stop 14 epochs after the best"
    assert f"{max(scores):.4f} after epoch {best + 1}\n" in printed
    encoder = load_encoder(folder)[1]
    found = metrics_of(encoder, world.val_features, "DEMO-VAL", world.annotations)
    assert found["DSVR"] == pytest.approx(max(scores), abs=1e-9)
    moco = checkpoint_of(folder)["moco"]
    last = {name: moco[f"encoder_q.{name}"] for name in weights(folder)}
    assert not equal(weights(folder), last)


def test_validation_equal_score_is_not_better(world, tmp_path):
    more = ["--learning_rate", 0, "--patience", 3, "--epochs", 20]
    run(world, tmp_path, *val_flags(world), *more)
    assert checkpoint_of(tmp_path)["best_epoch"] == 0
    assert len(logged(tmp_path, "held_out")) == 1 + 3


# --- learning ---


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_training_lowers_the_loss_and_finds_what_the_mean_misses(world, tmp_path, seed):
    more = ["--epochs", 40, "--learning_rate", 1e-3, "--init", "near_identity", "--seed", seed]
    # Without a bank: at this rate its old keys would teach the drift.
    more += ["--loss", "infonce", "--moco_t", 0.1, "--moco_k", 0]
    run(world, tmp_path, *more)
    losses = logged(tmp_path, "loss")
    assert np.mean(losses[-10:]) < 0.7 * np.mean(losses[:10])
    untrained = metrics_of(Mean(C), world.test_features, "DEMO", world.annotations)["CSVR"]
    encoder = load_encoder(tmp_path)[1]
    trained = metrics_of(encoder, world.test_features, "DEMO", world.annotations)["CSVR"]
    assert untrained < 0.8 and trained > untrained + 0.1, (untrained, trained)


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_moves_positives_away_from_the_hardest_negatives(world, loss, tmp_path):
    more = ["--epochs", 10, "--learning_rate", 1e-3, "--init", "near_identity"]
    run(world, tmp_path, "--loss", loss, "--moco_t", 0.1 if loss == "infonce" else 1.0, *more)
    positive = np.array(logged(tmp_path, "positive"))
    gap = positive - logged(tmp_path, "hardest_negative")
    assert gap[-8:].mean() > gap[2:10].mean()


@pytest.mark.parametrize("init", ["paper", "near_identity"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_optimiser_and_start_runs_an_epoch(world, loss, init, optimizer, tmp_path):
    choice = ["--loss", loss, "--init", init, "--optimizer", optimizer]
    run(world, tmp_path / "untrained", *choice, "--epochs", 0)
    run(world, tmp_path / "trained", *choice, "--epochs", 1)
    before, after = weights(tmp_path / "untrained"), weights(tmp_path / "trained")
    assert all(torch.isfinite(value).all() for value in after.values())
    assert not equal(before, after)
    assert checkpoint_of(tmp_path / "trained")["step"] == 72 // 8


@pytest.mark.parametrize(
    "more",
    [
        ["--moco_k", 0],
        ["--moco_k", 10],  # fewer than a step's 32 negatives
        ["--moco_k", 33],
        ["--num_layers", 2],
        ["--random_sampling", "--padding_size", 4],
        ["--padding_size", 0],
        ["--min_overlap", 0.3],
        ["--moco_m", 0.999],
        ["--batch_sz", 72],
    ],
    ids=lambda more: " ".join(map(str, more)),
)
def test_every_choice_runs_an_epoch(world, more, tmp_path):
    run(world, tmp_path, "--epochs", 1, *more)
    losses = logged(tmp_path, "loss")
    assert losses and np.isfinite(losses).all()


@pytest.mark.parametrize("encoder", [name for name in ENCODERS if name not in ("tca", "mean")])
def test_every_encoder_trains_resumes_and_is_evaluated(world, encoder, tmp_path):
    more = ["--encoder", encoder, "--output_dim", 16, "--epochs", 2, "--num_clusters", 4]
    more += ["--normalize_input", "--num_layers", 1]
    printed = run(world, tmp_path / "whole", *more)
    used = set(ENCODERS[encoder].flags.values())
    for flag in ("num_clusters", "normalize_input", "num_layers", "nhead", "dim_feedforward"):
        assert (f"--{flag} changes nothing" in printed) == (flag not in used), flag
    run_until(5, world, tmp_path / "stopped", *more)
    run(world, tmp_path / "stopped", *more)
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")
    trained = load_encoder(tmp_path / "whole")[1]
    assert trained.descriptor_size == (16 if "output_dim" in used else C)
    metrics = metrics_of(trained, world.test_features, "DEMO", world.annotations)
    assert all(0 < value <= 1 for value in metrics.values())


def test_bfloat16_learns_like_float32_with_float32_similarities(world, tmp_path):
    more = ["--dropout", 0, "--epochs", 1, "--learning_rate", 1e-4]
    with recorded_steps() as half:
        run(world, tmp_path / "half", *more, "--amp", "bfloat16")
    with recorded_steps() as full:
        run(world, tmp_path / "full", *more)
    for step, expected in zip(half, full, strict=True):
        assert step.logits.dtype == torch.float32
        # bfloat16 has 8 bits: 0.4 % a value, less in their sum
        assert 0 < (step.logits - expected.logits).abs().max() < 0.02
    losses = logged(tmp_path / "half", "loss")
    assert losses == pytest.approx(logged(tmp_path / "full", "loss"), rel=0.02)
    floats = [value for value in weights(tmp_path / "half").values() if value.is_floating_point()]
    assert floats and all(value.dtype == torch.float32 for value in floats)
    metrics = metrics_of(
        load_encoder(tmp_path / "half")[1], world.test_features, "DEMO", world.annotations
    )
    assert all(0 < value <= 1 for value in metrics.values())


# --- false and hard negatives ---


def show_same_material(segments, one, other):
    return any(
        a[0] == b[0] and max(a[1], b[1]) < min(a[2], b[2])
        for a in segments[one]
        for b in segments[other]
    )


def test_mask_shared_masks_entries_of_the_anchors_film_and_no_others(world, tmp_path):
    with recorded_steps() as masked:
        run(world, tmp_path / "masked", "--mask_shared", "--epochs", 1)
    with recorded_steps() as unmasked:
        run(world, tmp_path / "unmasked", "--epochs", 1)
    annotation = world.annotation
    anchors = [pair["videos"][0] for pair in annotation["video_pairs"]]
    count = 0
    for step in masked[:5]:
        for row, i in zip(step.logits, step.indices, strict=True):
            expected = [False]  # the positive
            for negative in step.bank_ids:
                other = annotation["negs"][negative]
                shared = show_same_material(annotation["segments"], anchors[i], other)
                expected.append(negative >= 0 and shared)
            assert (row == -math.inf).tolist() == expected
            count += sum(expected)
    assert count > 20
    assert all(torch.isfinite(step.logits).all() for step in unmasked)


@pytest.mark.parametrize("more", [[], ["--mask_shared"], ["--pairs", "augment"]], ids=" ".join)
def test_hard_negatives_are_the_nearest_and_never_the_anchors_own(world, more, tmp_path):
    """With a learning rate of 0, the encoder at the end is the one at the start of the epoch."""
    run(world, tmp_path, "--hard_negatives", 7, "--epochs", 1, "--learning_rate", 0, *more)
    encoder = load_encoder(tmp_path)[1]
    annotation, augment = world.annotation, "augment" in more
    pairs = [pair["videos"] for pair in annotation["video_pairs"]]
    anchors = list(dict.fromkeys(anchor for anchor, _ in pairs))
    negatives = annotation["negs"]
    if augment:
        videos = [video for pair in pairs for video in pair]
        anchors = negatives = list(dict.fromkeys([*videos, *negatives]))
    descriptors = {}
    for video, frames in world.pairs.items():
        x = torch.from_numpy(frames.astype(np.float16).astype(np.float32))[None]
        with torch.inference_mode():
            descriptors[video] = encoder(x, torch.tensor([len(frames)]))[0]
    hard_negatives = checkpoint_of(tmp_path)["mined"].tolist()
    assert len(hard_negatives) == len(anchors)
    for anchor, ids in zip(anchors, hard_negatives, strict=True):
        scores = {}
        for i, video in enumerate(negatives):
            masked = "--mask_shared" in more
            if augment and video == anchor:
                continue
            if masked and show_same_material(annotation["segments"], anchor, video):
                continue
            scores[i] = float(descriptors[anchor] @ descriptors[video])
        ids = [i for i in ids if i >= 0]
        assert len(ids) == min(7, len(scores)) == len(set(ids)) and set(ids) <= set(scores)
        best = sorted(scores.values(), reverse=True)[: len(ids)]
        assert [scores[i] for i in ids] == pytest.approx(best, abs=1e-5)


def test_hard_negatives_are_half_of_a_pairs_and_the_same_after_a_stop(world, tmp_path):
    more = ["--hard_negatives", 6, "--epochs", 3, "--save_every", 5, "--learning_rate", 1e-3]
    more += ["--mask_shared", "--dropout", 0.2]
    with recorded_steps() as steps:
        run_until(7, world, tmp_path / "stopped", *more)
    hard_negatives = checkpoint_of(tmp_path / "stopped")["mined"]
    pairs = [pair["videos"] for pair in world.annotation["video_pairs"]]
    anchors = list(dict.fromkeys(anchor for anchor, _ in pairs))
    for step in steps:
        for i, ids in zip(step.indices, np.reshape(step.negative_ids, (8, 4)), strict=True):
            hard = set(hard_negatives[anchors.index(pairs[i][0])].tolist()) - {-1}
            assert len(set(ids)) == 4 and len(hard & set(ids)) >= min(2, len(hard))
            assert set(ids[:2]) <= hard or len(hard) < 2
    run_until(14, world, tmp_path / "stopped", *more)  # both times after the epoch's mining
    run(world, tmp_path / "stopped", *more)
    run(world, tmp_path / "whole", *more)
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")


# --- the command line ---


@pytest.mark.parametrize(
    "changes, inputs, reason",
    [
        ({"batch_sz": 8}, {}, "(--batch_sz 4 -> 8); give the same command"),
        ({"device": "cpu"}, {}, "(--device 'cuda' -> 'cpu')"),
        ({}, {"features": "b"}, "the features files differ from those of process 0"),
        ({"device": "cuda:0", "feature_path": "elsewhere", "num_workers": 9}, {}, None),
    ],
)
def test_processes_have_the_same_settings_and_files(changes, inputs, reason, capsys):
    """Else they would wait for each other in vain. By torchrun each machine has its own command."""

    def start(dist):
        args = dict(batch_sz=4, device=f"cuda:{dist.rank}", feature_path="f", num_workers=0)
        found = {"features": "a"}
        if dist.rank:
            args, found = args | changes, found | inputs
        run = Namespace(dist=dist, args=Namespace(**args), inputs=found)
        checkpoint.Run.require_same_command(run)

    if reason is None:
        run_in_threads(2, start)
        return
    with pytest.raises(SystemExit, match="2"):
        run_in_threads(2, start)
    error = capsys.readouterr().err
    assert reason in error and error.count("error: ") == 1


def test_float32_on_a_gpu_is_exact_unless_tf32_is_asked_for():
    """Also in cuDNN's LSTM and GRU, where PyTorch rounds to TF32 by default."""
    for tf32 in (True, False):
        set_arithmetic(Namespace(device="cuda:1", tf32=tf32, deterministic=False))
        assert torch.backends.cuda.matmul.allow_tf32 == torch.backends.cudnn.allow_tf32 == tf32


@pytest.mark.slow
def test_released_command_runs_with_notes_on_flags_that_change_nothing(world, tmp_path):
    released = ["train.py", *world.train_flags, "--model_path", tmp_path / "released"]
    released += [*RELEASED, "--epochs", 1, "--batch_sz", 16, "--tf32", "--deterministic"]
    plain = ["train.py", *world.train_flags, "--model_path", tmp_path / "plain"]
    plain += ["--neg_num", 4, "--epochs", 1, "--batch_sz", 16, "--moco_k", 32, "--print-freq", 1]
    device = ["--device", "cpu"]
    results = clis([*released, *device], [*plain, *device])
    assert [result.returncode for result in results] == [0, 0], results
    notes = [line for line in results[0].stdout.splitlines() if line.startswith("note: ")]
    unused = ["num_clusters", "output_dim", "normalize_input", "use-adasum", "fp16-allreduce"]
    unused += ["tf32", "deterministic"]
    for flag in unused:
        assert sum(f"--{flag} changes nothing" in note for note in notes) == 1
    assert "note:" not in results[1].stdout
    assert_same_run(tmp_path / "released", tmp_path / "plain")
    saved = json.loads((tmp_path / "released" / "args.json").read_text())
    assert saved["command"].startswith("train.py --annotation_path") and saved["revision"]
    assert saved["arguments"]["neg_num"] == 4 and saved["steps"] == 72 // 16
    assert list(saved["arguments"]) == sorted(saved["arguments"])


def test_run_prints_its_steps_and_what_has_no_features(world, tmp_path):
    annotation = world.annotation | {"negs": [*world.annotation["negs"], "lost", "gone"]}
    lost = {"videos": ["film0/copy 0", "lost"], "overlap": [1, 1]}
    annotation["video_pairs"] = [*annotation["video_pairs"], lost]
    path = write_pickle(tmp_path / "more.pickle", annotation)
    printed = run(world, tmp_path / "run", "--annotation_path", path, "--epochs", 2)
    assert "72 pairs, 80 negatives" in printed and "1 pairs, 2 negatives" in printed
    assert "18 optimiser steps of 8 pairs" in printed


def test_help_names_every_flag(capsys):
    with pytest.raises(SystemExit) as stop:
        training.main(["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    documented = """
        --annotation_path --feature_path --model_path --pca_components --padding_size
        --random_sampling --min_overlap --mask_shared --num_workers --num_readers --encoder
        --num_layers --nhead --dim_feedforward --dropout --init --loss --neg_num --moco_k --moco_m
        --moco_t --epochs --batch_sz --learning_rate --optimizer --momentum --weight_decay --seed
        --val_set --val_feature_path --annotation_dir --val_metric --patience --device --print-freq
        --save_every --num_clusters --output_dim --normalize_input --use-adasum --fp16-allreduce
        --pairs --augment --hard_negatives --amp --tf32 --deterministic --features_on
    """
    assert [flag for flag in documented.split() if flag not in shown] == []


# --- refusals ---


def test_bad_input_is_refused_before_the_folder_is_made(world, tmp_path):
    wrong = write_pickle(tmp_path / "wrong.pickle", {"pairs": []})
    text = tmp_path / "text.hdf5"
    text.write_text("no features")
    pair = {"videos": ["x", "y"], "overlap": [1, 1]}
    few = write_pickle(tmp_path / "few.pickle", {"video_pairs": [pair], "negs": ["z"]})
    held_out, absent = val_flags(world), tmp_path / "absent.hdf5"
    frames_needed = [*held_out, "--val_metric", "chamfer", "--encoder", "netvlad"]
    cases = [  # the arguments, and what the message mentions
        (["--annotation_path", tmp_path / "absent.pickle"], "absent.pickle"),
        (["--annotation_path", wrong], "wrong.pickle"),
        (["--annotation_path", few], "few.pickle"),
        (["--feature_path", absent], "absent.hdf5"),
        (["--feature_path", text], "text.hdf5"),
        (["--pca_components", 1024], "1024"),
        (["--nhead", 5], "--nhead"),
        (["--batch_sz", 1000], "--batch_sz"),
        (["--val_set", "DEMO-VAL"], "--val_feature_path"),
        (["--patience", 2], "--val_set"),
        ([*held_out, "--val_feature_path", absent], "absent.hdf5"),
        ([*held_out, "--val_feature_path", world.train_features], "train.hdf5"),
        ([*frames_needed, "--num_clusters", 4, "--output_dim", 16], "whole videos only"),
        (["--pairs", "augment", "--features_on", "device"], "leave --features_on device out"),
        (["--model_path", text], "text.hdf5' is a file; name a folder"),
        (["--epochs"], "--epochs"),
        (["--loss", "hinge"], "hinge"),
    ]
    for more, mention in cases:
        message = refused(training.main, *train_flags(world, tmp_path / "run", *more))
        assert mention in message, message
    line = one_error(cli(*command(world, tmp_path / "run", "--feature_path", absent)))
    assert "absent.hdf5" in line
    left = sorted(item.name for item in tmp_path.iterdir())
    assert left == ["few.pickle", "text.hdf5", "wrong.pickle"]


def test_missing_annotation_is_refused_with_what_does_without(world, tmp_path):
    features = ["--feature_path", world.train_features, "--model_path", tmp_path / "run"]
    message = refused(training.main, *features, "--device", "cpu")
    assert "--annotation_path" in message and "--pairs augment" in message


@pytest.mark.parametrize(
    "flag, value",
    [
        ("--batch_sz", 0),
        ("--neg_num", 0),
        ("--print-freq", 0),
        ("--save_every", 0),
        ("--learning_rate", -1),
        ("--epochs", -1),
        ("--moco_t", 0),
        ("--moco_k", -1),
        ("--dropout", 2),
        ("--padding_size", -1),
        ("--num_layers", 0),
        ("--nhead", 0),
    ],
)
def test_number_out_of_range_is_refused_with_its_flag(world, flag, value, tmp_path):
    message = refused(training.main, *train_flags(world, tmp_path / "run", flag, value))
    assert f"{flag} {value}" in message and "out of range" in message


@pytest.mark.slow
def test_features_not_finite_end_the_run_with_the_videos_name(world, tmp_path):
    features = {video: frames.astype(np.float32) for video, frames in world.pairs.items()}
    features["film3/copy 2"] = features["film3/copy 2"] * np.nan
    path = write_packed(tmp_path / "nan.hdf5", features)
    read_here = train_flags(world, tmp_path / "here", "--feature_path", path)
    read_by_worker = command(world, tmp_path / "worker", "--feature_path", path, "--num_workers", 1)
    result = cli(*read_by_worker)
    assert "Traceback" not in result.stderr
    for message in (refused(training.main, *read_here), error_after_progress(result)):
        assert "film3/copy 2" in message and "nan.hdf5" in message
    for folder in (tmp_path / "here", tmp_path / "worker"):
        assert not (folder / "model.pth").exists() and not list(folder.glob(".*"))


def test_loss_not_finite_ends_the_run_with_the_step(world, tmp_path):
    more = ["--loss", "infonce", "--learning_rate", 1e30, "--epochs", 40]
    message = refused(training.main, *train_flags(world, tmp_path, *more))
    step = max((line["step"] for line in read_log(tmp_path)), default=0)
    assert f"at step {step}" in message and "film" in message and "--learning_rate" in message
    assert not (tmp_path / "model.pth").exists()


def test_weights_not_finite_are_not_saved(world, tmp_path):
    """The loss of the one step is finite, the weights after it are not."""
    more = ["--epochs", 1, "--batch_sz", 72, "--optimizer", "sgd", "--learning_rate", 1e38]
    message = refused(training.main, *train_flags(world, tmp_path, *more))
    assert "weights are not finite" in message and "another --model_path" in message
    assert not (tmp_path / "model.pth").exists()
    assert not (tmp_path / "checkpoint.pth").exists()


@pytest.mark.slow
def test_evaluation_warns_of_features_unlike_the_models(world, tmp_path):
    def copy_features(source, name, backbone):
        shutil.copy(source, tmp_path / name)
        with h5py.File(tmp_path / name, "r+") as file:
            file.attrs["backbone"] = backbone
        return tmp_path / name

    trained_on = copy_features(world.train_features, "train.hdf5", "one")
    run(world, tmp_path / "run", "--epochs", 1, "--feature_path", trained_on)
    evaluate = ["evaluation.py", "--dataset", "DEMO", "--annotation_dir", world.annotations]
    evaluate += ["--model_path", tmp_path / "run", "--device", "cpu", "--feature_path"]
    warned, silent = clis(
        [*evaluate, copy_features(world.test_features, "other.hdf5", "another")],
        [*evaluate, copy_features(world.test_features, "same.hdf5", "one")],
    )
    assert warned.returncode == silent.returncode == 0, warned.stderr
    assert "backbone 'one', here 'another'" in warned.stderr and "warning" not in silent.stderr
