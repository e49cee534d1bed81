"""train.py: the same weights again, also after being killed; weights that are better than none; clean refusals."""

import io
import itertools
import json
import math
import os
import random
import shutil
import signal
import time

import h5py
import numpy as np
import pytest
import torch
from helpers.commands import cli, clis, error_after_progress, one_error, start
from helpers.files import read_log, write_packed, write_pickle
from helpers.worlds import C

import checkpoint
from datasets.registry import load_evaluation_set
from distributed import Distributed
from features.store import FeatureStore
from losses import LOSSES
from model import ENCODERS, Mean, load_encoder
from retrieval.compare import compare_collections
from train import OPTIMIZERS, Trainer, parse, settle
from utils import InputError

SMALL = [
    "--nhead",
    4,
    "--dim_feedforward",
    64,
    "--batch_sz",
    8,
    "--neg_num",
    4,
    "--moco_k",
    64,
    "--print-freq",
    1,
]


@pytest.fixture(autouse=True)
def handlers():
    """Training in this process takes SIGTERM over; hand it back."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def flags(world, folder, *more):
    return [*world.train_flags, "--model_path", folder, *SMALL, *more]


def command(world, folder, *more):
    return ["train.py", *flags(world, folder, *more)]


def held_out(world):
    return [
        "--val_set",
        "DEMO-VAL",
        "--val_feature_path",
        world.val_features,
        "--annotation_dir",
        world.annotations,
    ]


def trainer(world, folder, *more):
    """A run in this process."""
    made = Trainer(arguments(world, folder, *more))
    made.folder.mkdir(parents=True, exist_ok=True)
    return made


def arguments(world, folder, *more):
    args = parse("", [str(flag) for flag in flags(world, folder, *more)])
    settle(args, Distributed())
    return args


def weights(folder):
    return torch.load(folder / "model.pth", weights_only=True)["state_dict"]


def model_at_end(folder):
    """Both encoders and the bank after the last step; model.pth may be of an epoch long before."""
    return torch.load(folder / "checkpoint.pth", weights_only=True)["moco"]


def same(one, other):
    return one.keys() == other.keys() and all(
        torch.equal(value, other[name]) for name, value in one.items()
    )


def steps_of(folder):
    """The log without what depends on the clock."""
    return [
        {key: value for key, value in line.items() if key not in ("videos_per_s", "data_wait")}
        for line in read_log(folder)
    ]


def wait_for_step(process, folder, step):
    """Until the log that this run (just started) has taken up shows `step`; the run must still be going on then."""
    started, log = time.time_ns(), folder / "log.jsonl"
    while not (
        log.exists()
        and log.stat().st_mtime_ns > started
        and any(line["step"] >= step for line in read_log(folder))
    ):
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    assert process.poll() is None, "the run ended before it could be killed; make it longer"


# --- one seed, one result --------------------------------------------------------------------------------------------


def test_a_seed_gives_the_same_weights_bit_for_bit_however_the_data_are_loaded_and_another_seed_others(
    world, tmp_path
):
    runs = {
        "first": [], "again": [], "loaded": ["--num_workers", 2, "--num_readers", 3], "other": ["--seed", 1],
    }  # fmt: skip
    for result in clis(
        *(command(world, tmp_path / name, "--epochs", 2, *more) for name, more in runs.items())
    ):
        assert result.returncode == 0, result.stderr
    found = {name: weights(tmp_path / name) for name in runs}
    assert same(found["first"], found["again"]) and same(found["first"], found["loaded"])
    assert not same(found["first"], found["other"])
    assert steps_of(tmp_path / "first") == steps_of(tmp_path / "again")


# --- killed and resumed ----------------------------------------------------------------------------------------------

LONG = [
    "--epochs",
    60,
    "--patience",
    14,
    "--dropout",
    0.2,
    "--learning_rate",
    1e-3,
    "--init",
    "near_identity",
]


@pytest.fixture(scope="module")
def unbroken(world, tmp_path_factory):
    """A run with dropout that its held-out videos stop early."""
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    result = cli(*command(world, folder, *LONG, *held_out(world)))
    assert result.returncode == 0, result.stderr
    return folder, result


def test_a_run_killed_again_and_again_ends_with_the_unbroken_runs_weights(
    world, unbroken, tmp_path
):
    folder, whole = tmp_path / "run", unbroken[0]
    last = max(line["step"] for line in read_log(whole))
    draw = random.Random(time.time_ns())
    save_every = draw.randint(1, 5)
    call = command(world, folder, *LONG, *held_out(world), "--save_every", save_every)
    targets = sorted(draw.sample(range(12, last * 2 // 3), 3))
    print(f"killed at {targets}, saved every {save_every} steps")  # shown if it fails
    for end, target in zip((signal.SIGKILL, signal.SIGTERM, signal.SIGKILL), targets, strict=True):
        process = start(*call)
        wait_for_step(process, folder, target)
        process.send_signal(end)
        _, stderr = process.communicate(timeout=60)
        assert not (folder / "model.pth").exists()
        if end == signal.SIGTERM:
            assert process.returncode == 128 + signal.SIGTERM, stderr
            step = torch.load(folder / "checkpoint.pth", weights_only=True)["step"]
            assert step >= target and step == read_log(folder)[-1]["step"]  # nothing done was lost
        else:
            assert process.returncode == -signal.SIGKILL
            assert last > torch.load(folder / "checkpoint.pth", weights_only=True)["step"] > 0
    result = cli(*call)
    assert result.returncode == 0 and "going on from" in result.stdout, result.stderr
    assert same(weights(folder), weights(whole)) and same(model_at_end(folder), model_at_end(whole))
    assert steps_of(folder) == steps_of(whole)
    left = sorted(name for name in os.listdir(folder) if not name.startswith("events."))
    assert left == ["args.json", "checkpoint.prev.pth", "checkpoint.pth", "log.jsonl", "model.pth"]


def test_a_run_without_held_out_videos_resumes_to_the_same_weights_too(world, tmp_path):
    more = [
        "--epochs",
        12,
        "--dropout",
        0.5,
        "--loss",
        "infonce",
        "--moco_m",
        0.9,
        "--optimizer",
        "sgd",
    ]
    more += ["--learning_rate", 0.1, "--save_every", 4]
    process = start(*command(world, tmp_path / "killed", *more))
    wait_for_step(process, tmp_path / "killed", 30)
    process.kill()
    process.communicate()
    for result in clis(
        command(world, tmp_path / "killed", *more), command(world, tmp_path / "whole", *more)
    ):
        assert result.returncode == 0, result.stderr
    assert same(weights(tmp_path / "killed"), weights(tmp_path / "whole"))
    assert steps_of(tmp_path / "killed") == steps_of(tmp_path / "whole")


def test_a_finished_run_is_left_alone_and_another_command_is_refused_its_folder(world, unbroken):
    folder, _ = unbroken
    names = ("model.pth", "checkpoint.pth", "log.jsonl", "args.json")
    before = {name: (folder / name).read_bytes() for name in names}
    base = [*LONG, *held_out(world)]
    changes = {"--seed": 1, "--loss": "infonce", "--epochs": 61}
    same_call, *others = clis(
        command(world, folder, *base),
        *(command(world, folder, *base, flag, value) for flag, value in changes.items()),
    )
    assert (
        same_call.returncode == 0
        and "finished already" in same_call.stdout
        and not same_call.stderr
    )
    for (flag, value), result in zip(changes.items(), others, strict=True):
        line = one_error(result)
        assert flag in line and repr(value) in line and str(folder) in line
    assert {name: (folder / name).read_bytes() for name in names} == before


def test_early_stopping_keeps_the_best_epoch(world, unbroken):
    folder, result = unbroken
    scores = [line["held_out"]["DSVR"] for line in read_log(folder) if "held_out" in line]
    best = int(np.argmax(scores))  # the first of equals
    assert len(scores) == best + 1 + 14 < 60, "it should stop 14 epochs after the best"
    assert f"{max(scores):.4f}" in result.stdout and f"after epoch {best + 1}\n" in result.stdout
    encoder = load_encoder(folder)[1]
    store, chosen = (
        FeatureStore(world.val_features),
        load_evaluation_set("DEMO-VAL", world.annotations),
    )
    table = compare_collections(encoder, store, chosen.queries, chosen.database, ["cosine"])[
        "cosine"
    ]
    found = chosen.evaluate_table(chosen.queries, chosen.database, table)
    assert found["DSVR"] == pytest.approx(max(scores), abs=1e-9)
    last = {name.removeprefix("encoder_q."): value for name, value in model_at_end(folder).items()}
    assert not same(weights(folder), {name: last[name] for name in weights(folder)})


def test_equal_figures_count_as_no_better(world, tmp_path):
    made = trainer(
        world, tmp_path, *held_out(world), "--learning_rate", 0, "--patience", 3, "--epochs", 20
    )
    assert made.fit() == 0
    assert made.best_epoch == 0 and sum("held_out" in line for line in read_log(tmp_path)) == 1 + 3


# --- learning --------------------------------------------------------------------------------------------------------


def figures_of(world, encoder):
    store, chosen = (
        FeatureStore(world.test_features),
        load_evaluation_set("DEMO", world.annotations),
    )
    table = compare_collections(encoder, store, chosen.queries, chosen.database, ["cosine"])[
        "cosine"
    ]
    return chosen.evaluate_table(chosen.queries, chosen.database, table)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_training_lowers_the_loss_and_finds_the_signal_that_the_untrained_mean_misses(
    world, tmp_path, seed
):
    made = trainer(
        world, tmp_path, "--epochs", 40, "--learning_rate", 1e-3, "--init", "near_identity", "--seed", seed,
        "--loss", "infonce", "--moco_t", 0.1, "--moco_k", 0,  # at this rate a bank's old keys would teach the drift
    )  # fmt: skip
    assert made.fit() == 0
    losses = [line["loss"] for line in read_log(tmp_path) if "loss" in line]
    assert np.mean(losses[-10:]) < 0.7 * np.mean(losses[:10])
    untrained, trained = figures_of(world, Mean(C)), figures_of(world, load_encoder(tmp_path)[1])
    assert untrained["CSVR"] < 0.8 and trained["CSVR"] > untrained["CSVR"] + 0.1, (
        untrained,
        trained,
    )


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_learns_on_data_that_can_be_told_apart(world, loss, tmp_path):
    made = trainer(
        world, tmp_path, "--loss", loss, "--epochs", 10, "--learning_rate", 1e-3, "--init", "near_identity",
        "--moco_t", 0.1 if loss == "infonce" else 1.0,
    )  # fmt: skip
    assert made.fit() == 0
    log = [line for line in read_log(tmp_path) if "loss" in line]
    gap = [line["positive"] - line["hardest_negative"] for line in log]
    assert np.mean(gap[-8:]) > np.mean(gap[2:10]), (
        "positives should move away from the hardest negatives"
    )


@pytest.mark.parametrize("init", ["paper", "near_identity"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_start_and_optimiser_runs_an_epoch(world, loss, init, optimizer, tmp_path):
    made = trainer(
        world, tmp_path, "--loss", loss, "--init", init, "--optimizer", optimizer, "--epochs", 1
    )
    before = {name: value.clone() for name, value in made.model.encoder_q.state_dict().items()}
    assert made.fit() == 0
    after = weights(tmp_path)
    assert all(torch.isfinite(value).all() for value in after.values()) and not same(before, after)
    assert made.step == made.steps_per_epoch == len(made.data) // 8


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
    made = trainer(world, tmp_path, "--epochs", 1, *more)
    assert made.fit() == 0
    assert all(math.isfinite(line["loss"]) for line in read_log(tmp_path) if "loss" in line)


def test_an_epoch_takes_every_pair_once_in_another_order_each_time(world, tmp_path):
    made = trainer(world, tmp_path, "--batch_sz", 9)
    assert len(made.data) == 72
    orders = []
    for _ in range(2):
        order = [i for batch in made.batches() for i in batch[0]]
        assert sorted(order) == list(range(72))
        orders.append(order)
        made.epoch += 1
    assert orders[0] != orders[1]


def test_the_learning_rate_falls_as_a_cosine_over_the_epochs(world, tmp_path):
    made = trainer(world, tmp_path, "--epochs", 4, "--learning_rate", 1e-3)
    made.fit()
    rates = {line["epoch"]: line["lr"] for line in read_log(tmp_path)}
    expected = {epoch: 1e-3 * (1 + math.cos(math.pi * epoch / 4)) / 2 for epoch in range(4)}
    assert rates == pytest.approx(expected)


def test_mask_shared_leaves_out_bank_entries_of_the_anchors_film_and_no_others(world, tmp_path):
    made, plain = (
        trainer(world, tmp_path / name, *more)
        for name, more in (("a", ["--mask_shared"]), ("b", []))
    )
    segments, negatives, seen = world.annotation["segments"], made.data.negatives, 0
    for batch in itertools.islice(made.batches(), 5):
        numbers = made.model.queue_ids.tolist()
        _, similarities, _ = made.train_step(batch)
        _, unmasked, _ = plain.train_step(batch)
        for row, i in zip(similarities, batch[0], strict=True):
            ((film, start_, end),) = segments[made.data.pairs[i][0]]
            expected = [False]
            for number in numbers:
                other, a, b = segments[negatives[number]][0] if number >= 0 else (None, 0, 0)
                expected.append(other == film and max(start_, a) < min(end, b))
            assert (row == -math.inf).tolist() == expected
            seen += sum(expected)
        assert torch.isfinite(unmasked).all()
    assert seen > 20


# --- the released command --------------------------------------------------------------------------------------------


def test_the_released_readmes_flags_are_accepted_with_a_note_for_those_that_change_nothing(
    world, tmp_path
):
    released = [
        *world.train_flags, "--model_path", tmp_path / "run", "--num_clusters", 256, "--num_layers", 1, "--output_dim", 1024,
        "--normalize_input", "--neg_num", 4, "--epochs", 1, "--batch_sz", 16, "--learning_rate", 1e-5, "--momentum", 0.9,
        "--weight_decay", 1e-4, "--pca_components", C, "--padding_size", 300, "--num_readers", 2, "--num_workers", 1,
        "--moco_k", 32, "--moco_m", "0.", "--moco_t", 1.0, "--print-freq", 1, "--use-adasum", "--fp16-allreduce",
    ]  # fmt: skip
    plain = [
        *world.train_flags,
        "--model_path",
        tmp_path / "plain",
        "--neg_num",
        4,
        "--epochs",
        1,
        "--batch_sz",
        16,
    ]
    results = clis(["train.py", *released], ["train.py", *plain, "--moco_k", 32, "--print-freq", 1])
    for result in results:
        assert result.returncode == 0, result.stderr
    notes = [line for line in results[0].stdout.splitlines() if line.startswith("note: ")]
    for flag in (
        "--num_clusters",
        "--output_dim",
        "--normalize_input",
        "--use-adasum",
        "--fp16-allreduce",
    ):
        assert sum(f"{flag} changes nothing" in note for note in notes) == 1
    assert "note:" not in results[1].stdout
    assert same(weights(tmp_path / "run"), weights(tmp_path / "plain"))
    saved = json.loads((tmp_path / "run" / "args.json").read_text())
    assert saved["command"].startswith("train.py --annotation_path") and saved["revision"]
    assert saved["arguments"]["neg_num"] == 4 and list(saved["arguments"]) == sorted(
        saved["arguments"]
    )


def test_a_run_states_its_steps_and_what_has_no_features(world, tmp_path):
    annotation = world.annotation | {"negs": [*world.annotation["negs"], "lost", "gone"]}
    annotation["video_pairs"] = [
        *annotation["video_pairs"],
        {"videos": ["film0/copy 0", "lost"], "overlap": [1, 1]},
    ]
    path = write_pickle(tmp_path / "more.pickle", annotation)
    result = cli(*command(world, tmp_path / "run", "--annotation_path", path, "--epochs", 2))
    assert result.returncode == 0, result.stderr
    assert "72 pairs, 80 negatives" in result.stdout and "1 pairs, 2 negatives" in result.stdout
    assert "18 optimiser steps of 8 pairs" in result.stdout


# --- refusals --------------------------------------------------------------------------------------------------------


def test_bad_input_ends_with_status_2_one_line_and_no_folder(world, tmp_path):
    wrong = write_pickle(tmp_path / "wrong.pickle", {"pairs": []})
    (tmp_path / "text.hdf5").write_text("no features")
    few = write_pickle(
        tmp_path / "few.pickle",
        {"video_pairs": [{"videos": ["x", "y"], "overlap": [1, 1]}], "negs": ["z"]},
    )
    run = tmp_path / "run"
    cases = {
        "no annotation": (["--annotation_path", tmp_path / "absent.pickle"], "absent.pickle"),
        "no features": (["--feature_path", tmp_path / "absent.hdf5"], "absent.hdf5"),
        "no feature file": (["--feature_path", tmp_path / "text.hdf5"], "text.hdf5"),
        "another width": (["--pca_components", 1024], "1024"),
        "an annotation of another form": (["--annotation_path", wrong], "wrong.pickle"),
        "an annotation of other ids": (["--annotation_path", few], "few.pickle"),
        "heads that do not divide": (["--nhead", 5], "--nhead"),
        "a batch too large": (["--batch_sz", 1000], "--batch_sz"),
        "half of the held-out flags": (["--val_set", "DEMO-VAL"], "--val_feature_path"),
        "no held-out features": (
            [*held_out(world), "--val_feature_path", tmp_path / "absent.hdf5"],
            "absent.hdf5",
        ),
        "held-out features of other ids": (
            [
                "--val_set",
                "DEMO-VAL",
                "--val_feature_path",
                world.train_features,
                "--annotation_dir",
                world.annotations,
            ],
            "train.hdf5",
        ),
        "patience for nothing": (["--patience", 2], "--val_set"),
        "no value": (["--epochs"], "--epochs"),
        "an unknown loss": (["--loss", "hinge"], "hinge"),
    }
    for (name, (_, mention)), result in zip(
        cases.items(),
        clis(*(command(world, run, *more) for more, _ in cases.values())),
        strict=True,
    ):
        line = one_error(result)
        assert mention in line, f"{name}: {line}"
    assert sorted(item.name for item in tmp_path.iterdir()) == [
        "few.pickle",
        "text.hdf5",
        "wrong.pickle",
    ]
    assert not run.exists()


@pytest.mark.parametrize(
    "flag, value",
    [("--batch_sz", 0), ("--neg_num", 0), ("--print-freq", 0), ("--save_every", 0), ("--learning_rate", -1), ("--epochs", -1),
     ("--moco_t", 0), ("--moco_k", -1), ("--dropout", 2), ("--padding_size", -1), ("--num_layers", 0), ("--nhead", 0)],
)  # fmt: skip
def test_a_number_out_of_range_is_refused_by_its_flag(world, flag, value, tmp_path):
    with pytest.raises(InputError, match=flag):
        trainer(world, tmp_path, flag, value)


def test_features_that_are_not_finite_stop_the_run_with_the_videos_name(world, tmp_path):
    features = {video: rows.astype(np.float32) for video, rows in world.pairs.items()}
    features["film3/copy 2"] = features["film3/copy 2"] * np.nan
    path = write_packed(tmp_path / "nan.hdf5", features)
    for result in clis(
        command(world, tmp_path / "run", "--feature_path", path),
        command(world, tmp_path / "loaded", "--feature_path", path, "--num_workers", 1),
    ):
        line = error_after_progress(result)
        assert "film3/copy 2" in line and "nan.hdf5" in line and "Traceback" not in result.stderr
    for name in ("run", "loaded"):
        assert not (tmp_path / name / "model.pth").exists() and not list(
            (tmp_path / name).glob(".*")
        )


def test_a_loss_that_is_not_finite_stops_the_run_with_the_step(world, tmp_path):
    result = cli(
        *command(
            world, tmp_path / "run", "--loss", "infonce", "--learning_rate", 1e30, "--epochs", 40
        )
    )
    line = error_after_progress(result)
    step = max((line["step"] for line in read_log(tmp_path / "run")), default=0)
    assert f"at step {step}" in line and "film" in line and "--learning_rate" in line
    assert not (tmp_path / "run" / "model.pth").exists()


def test_help_names_every_flag_and_exits_0():
    result = cli("train.py", "--help")
    assert result.returncode == 0 and not result.stderr
    for flag in (
        "--annotation_path", "--feature_path", "--model_path", "--pca_components", "--padding_size", "--random_sampling",
        "--min_overlap", "--mask_shared", "--num_workers", "--num_readers", "--encoder", "--num_layers", "--nhead",
        "--dim_feedforward", "--dropout", "--init", "--loss", "--neg_num", "--moco_k", "--moco_m", "--moco_t", "--epochs",
        "--batch_sz", "--learning_rate", "--optimizer", "--momentum", "--weight_decay", "--seed", "--val_set",
        "--val_feature_path", "--annotation_dir", "--val_metric", "--patience", "--device", "--print-freq", "--save_every",
        "--num_clusters", "--output_dim", "--normalize_input", "--use-adasum", "--fp16-allreduce", "--pairs", "--augment",
        "--hard_negatives", "--amp",
    ):  # fmt: skip
        assert flag in result.stdout


def test_features_of_other_content_under_the_same_path_are_no_resumed_run(world, tmp_path):
    features = tmp_path / "features.hdf5"
    shutil.copy(world.train_flags[world.train_flags.index("--feature_path") + 1], features)
    run = command(world, tmp_path / "run", "--epochs", 1, "--feature_path", features)
    assert cli(*run).returncode == 0
    again = cli(*run)
    assert again.returncode == 0 and "finished already" in again.stdout
    with h5py.File(features, "r+") as file:
        file["frames"][...] = -file["frames"][...]
    assert "made from other features files" in one_error(cli(*run))


def test_a_model_scored_on_features_made_otherwise_is_named(world, tmp_path):
    made = trainer(world, tmp_path, "--epochs", 1)
    made.features = {"backbone": "one"}
    assert made.fit() == 0
    features = tmp_path / "features.hdf5"
    shutil.copy(world.test_features, features)
    with h5py.File(features, "r+") as file:
        file.attrs["backbone"] = "another"
    evaluate = [
        "evaluation.py",
        "--dataset",
        "DEMO",
        "--annotation_dir",
        world.annotations,
        "--model_path",
        tmp_path,
    ]
    told, silent = clis(
        [*evaluate, "--feature_path", features], [*evaluate, "--feature_path", world.test_features]
    )
    assert told.returncode == silent.returncode == 0
    assert "backbone 'one', here 'another'" in told.stderr and "warning" not in silent.stderr


# --- checkpoints that cannot be used ---------------------------------------------------------------------------------


def test_a_broken_or_foreign_checkpoint_is_named_and_the_one_before_it_is_used(world, tmp_path):
    call = command(world, tmp_path / "run", "--epochs", 2, "--save_every", 4, "--dropout", 0.3)
    assert cli(*call).returncode == 0
    whole, log = weights(tmp_path / "run"), steps_of(tmp_path / "run")
    newest, before = tmp_path / "run" / "checkpoint.pth", tmp_path / "run" / "checkpoint.prev.pth"
    good = newest.read_bytes()
    for content in (good[: len(good) // 2], b"no checkpoint", pickled({"model": 1})):
        newest.write_bytes(content)
        (tmp_path / "run" / "model.pth").unlink()
        result = cli(*call)
        assert result.returncode == 0, result.stderr
        told = [line for line in result.stderr.splitlines() if "warning: " in line]
        assert (
            len(told) == 1
            and "checkpoint.pth" in told[0]
            and "checkpoint.prev.pth, step" in told[0]
        )
        assert same(weights(tmp_path / "run"), whole) and steps_of(tmp_path / "run") == log
    newest.write_bytes(good[:-100])
    before.write_bytes(b"")
    (tmp_path / "run" / "model.pth").unlink()
    line = one_error(cli(*call))
    assert "checkpoint.pth" in line and "checkpoint.prev.pth" in line and "--model_path" in line


def pickled(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def test_the_newest_checkpoint_and_the_one_before_are_kept(tmp_path):
    for step in range(1, 5):
        checkpoint.save(tmp_path, {"step": step})
        assert checkpoint.load(tmp_path, ["step"]) == {"step": step}
    (tmp_path / "checkpoint.pth").unlink()  # killed between the two renames
    assert checkpoint.load(tmp_path, ["step"]) == {"step": 3}
    assert checkpoint.load(tmp_path / "empty", ["step"]) is None
    assert sorted(os.listdir(tmp_path)) == ["checkpoint.prev.pth"]


def test_another_batch_size_goes_on_after_the_pairs_that_the_epoch_has_seen(world, tmp_path):
    made = trainer(world, tmp_path, "--batch_sz", 8, "--epochs", 2)
    order = [i for batch in made.batches() for i in batch[0]]
    for batch in itertools.islice(made.batches(), 4):
        made.train_step(batch)
    made.save()
    other = trainer(world, tmp_path, "--batch_sz", 9, "--epochs", 2)
    other.restore()
    assert (other.step, other.epoch, other.seen) == (4, 0, 32)
    left = [i for batch in other.batches() for i in batch[0]]
    assert left == order[32 : 32 + 36]  # 40 are left, 4 fill no batch
    result = cli(*command(world, tmp_path, "--batch_sz", 9, "--epochs", 2))
    assert result.returncode == 0 and "after the 32 of 72 pairs" in result.stdout, result.stderr
    assert read_log(tmp_path)[-1]["step"] == 4 + 4 + 8


# --- hard negatives --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [[], ["--mask_shared"], ["--pairs", "augment"]], ids=" ".join)
def test_mined_negatives_are_the_nearest_by_a_loop_and_never_the_anchors_own(world, more, tmp_path):
    made = trainer(world, tmp_path, "--hard_negatives", 7, *more)
    made.mine()
    encoder, data = made.model.encoder_q.eval(), made.data
    with torch.inference_mode():
        described = {
            video: encoder(
                torch.from_numpy(data.store[video].astype(np.float32))[None],
                torch.tensor([data.store.lengths[video]]),
            )[0]
            for video in {*data.anchors, *data.negatives}
        }
    for anchor, row in data.anchors.items():
        allowed = [
            n
            for n, video in enumerate(data.negatives)
            if not ("augment" in more and video == anchor)
            and not (
                "--mask_shared" in more and overlap(world.annotation["segments"], anchor, video)
            )
        ]
        scores = {n: float(described[anchor] @ described[data.negatives[n]]) for n in allowed}
        found = [n for n in data.mined[row].tolist() if n >= 0]
        assert len(found) == min(7, len(allowed)) == len(set(found)) and set(found) <= set(allowed)
        best = sorted(scores.values(), reverse=True)[: len(found)]
        assert [scores[n] for n in found] == pytest.approx(best, abs=1e-5)


def overlap(segments, one, other):
    return any(
        a[0] == b[0] and max(a[1], b[1]) < min(a[2], b[2])
        for a in segments[one]
        for b in segments[other]
    )


def test_half_of_the_negatives_are_drawn_from_the_mined_ones_and_a_killed_run_draws_the_same(
    world, tmp_path
):
    more = [
        "--hard_negatives",
        6,
        "--epochs",
        3,
        "--save_every",
        5,
        "--learning_rate",
        1e-3,
        "--mask_shared",
        "--dropout",
        0.2,
    ]
    made = trainer(world, tmp_path / "whole", *more)
    made.mine()
    for i in range(len(made.data)):
        near = set(made.data.mined[made.data.anchors[made.data.pairs[i][0]]].tolist()) - {-1}
        numbers = made.data[i][3].tolist()
        assert len(set(numbers)) == 4 and len(near & set(numbers)) >= min(2, len(near))
        assert set(numbers[:2]) <= near or len(near) < 2
    assert made.fit() == 0
    killed = trainer(world, tmp_path / "killed", *more)
    for _ in range(2):  # stopped in the middle of an epoch, after its mining
        killed.restore()
        stop_after(killed, killed.step + 7)
    killed = trainer(world, tmp_path / "killed", *more)
    killed.restore()
    assert killed.fit() == 0
    assert same(weights(tmp_path / "killed"), weights(tmp_path / "whole"))
    assert steps_of(tmp_path / "killed") == steps_of(tmp_path / "whole")


def stop_after(made, step):
    """Train until SIGTERM comes in step `step`."""
    plain = made.train_step

    def train_step(batch):
        if made.step + 1 == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(batch)

    made.train_step = train_step
    assert made.fit() == 128 + signal.SIGTERM and made.step == step
    made.train_step = plain


# --- bfloat16, encoders ----------------------------------------------------------------------------------------------


def test_bfloat16_learns_as_float32_does_and_its_similarities_are_float32(world, tmp_path):
    flags_ = ["--dropout", 0, "--epochs", 1, "--learning_rate", 1e-4]
    half, full = (
        trainer(world, tmp_path / name, *flags_, *more)
        for name, more in (("h", ["--amp", "bfloat16"]), ("f", []))
    )
    for one, other in zip(half.batches(), full.batches(), strict=True):
        loss, logits, _ = half.train_step(one)
        expected, others, _ = full.train_step(other)
        assert logits.dtype == loss.dtype == torch.float32
        assert (
            0 < (logits - others).abs().max() < 0.02
        )  # bfloat16 has 8 bits: 0.4 % a value, less in their sum
        assert loss.item() == pytest.approx(expected.item(), rel=0.02)
    assert all(
        value.dtype == torch.float32
        for value in half.model.encoder_q.state_dict().values()
        if value.is_floating_point()
    )
    half.save_encoder()
    evaluate = [
        "evaluation.py",
        "--dataset",
        "DEMO",
        "--annotation_dir",
        world.annotations,
        "--model_path",
        tmp_path / "h",
    ]
    assert cli(*evaluate, "--feature_path", world.test_features).returncode == 0


@pytest.mark.parametrize("encoder", [name for name in ENCODERS if name not in ("tca", "mean")])
def test_every_encoder_trains_resumes_and_is_evaluated(world, encoder, tmp_path):
    more = [
        "--encoder",
        encoder,
        "--output_dim",
        16,
        "--epochs",
        2,
        "--num_clusters",
        4,
        "--normalize_input",
        "--num_layers",
        1,
    ]
    args = parse("", [str(flag) for flag in flags(world, tmp_path / "run", *more)])
    notes = " ".join(settle(args, Distributed()))
    uses = set(ENCODERS[encoder].flags.values())
    for flag in ("num_clusters", "normalize_input", "num_layers", "nhead", "dim_feedforward"):
        assert (f"--{flag} changes nothing" in notes) == (flag not in uses), flag
    made = trainer(world, tmp_path / "whole", *more)
    assert made.model.encoder_q.descriptor_size == 16 and made.fit() == 0
    killed = trainer(world, tmp_path / "killed", *more)
    stop_after(killed, 5)
    killed = trainer(world, tmp_path / "killed", *more)
    killed.restore()
    assert killed.fit() == 0 and same(weights(tmp_path / "killed"), weights(tmp_path / "whole"))
    figures = figures_of(world, load_encoder(tmp_path / "whole")[1])
    assert all(0 < value <= 1 for value in figures.values())


def test_weights_that_are_not_finite_are_not_saved(world, tmp_path):
    """The loss of the one step is finite; what it leaves is not."""
    flags = [
        "--epochs",
        1,
        "--batch_sz",
        len(world.annotation["video_pairs"]),
        "--optimizer",
        "sgd",
        "--learning_rate",
        1e38,
    ]
    line = error_after_progress(cli(*command(world, tmp_path / "run", *flags)))
    assert "weights are not finite" in line and "another --model_path" in line
    assert (
        not (tmp_path / "run" / "model.pth").exists()
        and not (tmp_path / "run" / "checkpoint.pth").exists()
    )


def test_another_held_out_annotation_under_the_same_name_is_no_resumed_run(world, tmp_path):
    first = trainer(world, tmp_path / "run", *held_out(world), "--epochs", 2)
    first.save()
    shutil.copytree(world.annotations, tmp_path / "annotations")
    labels = json.loads((tmp_path / "annotations" / "demo_val.json").read_text())
    labels.pop(next(iter(labels)))
    (tmp_path / "annotations" / "demo_val.json").write_text(json.dumps(labels))
    again = [*held_out(world), "--annotation_dir", tmp_path / "annotations", "--epochs", 2]
    with pytest.raises(InputError, match="held_out"):
        trainer(world, tmp_path / "run", *again).restore()


def test_a_measure_that_the_encoder_cannot_give_is_refused_before_training(world, tmp_path):
    flags = [
        *held_out(world),
        "--encoder",
        "netvlad",
        "--num_clusters",
        4,
        "--output_dim",
        16,
        "--val_metric",
        "chamfer",
    ]
    with pytest.raises(InputError, match="whole videos only"):
        trainer(world, tmp_path / "run", *flags)


def test_sigterm_to_the_loading_processes_too_still_leaves_a_checkpoint(world, tmp_path):
    """As launchers and terminals send it: to the whole group."""
    flags = command(
        world, tmp_path / "run", "--num_workers", 1, "--epochs", 500, "--save_every", 100000
    )
    process = start(*flags, start_new_session=True)
    while not read_log(tmp_path / "run"):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(timeout=60) == 128 + signal.SIGTERM, process.stderr.read()
    assert (tmp_path / "run" / "checkpoint.pth").exists()
