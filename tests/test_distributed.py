"""Training in several processes: what one would learn, alike in all, stopped and resumed as one."""

import json
import math
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import training
from helpers.commands import ROOT, refused
from helpers.feature_files import read_log, write_packed
from helpers.launchers import ENGINES, finish, launch, needs_horovod, run_two
from helpers.training import (
    RELEASED,
    checkpoint_of,
    logged,
    run,
    train_flags,
    val_flags,
    wait_for_step,
)

from data import VCDBPairDataset
from features.store import FeatureStore
from processes import STOP_SIGNALS
from utils import seeded_rng

pytestmark = pytest.mark.distributed

START = ["--init", "near_identity"]


def command(world, folder, *more):
    return ["train.py", *train_flags(world, folder, *START, *more)]


def assert_alike(folder, other, tolerance, ignored=()):
    """The same metrics at the same steps, weights and bank, to float tolerance."""
    ignored = {"videos_per_s", "data_wait", "lr", *ignored}
    lines, others = read_log(folder), read_log(other)
    assert [line["step"] for line in lines] == [line["step"] for line in others] and len(lines) > 4
    for line, expected in zip(lines, others, strict=True):
        assert line.keys() == expected.keys()
        for name in line.keys() - ignored:
            if line[name] is None or expected[name] is None:
                assert line[name] is expected[name], name
            else:
                near = pytest.approx(expected[name], rel=tolerance, abs=tolerance)
                assert line[name] == near, name
    found, expected = checkpoint_of(folder)["moco"], checkpoint_of(other)["moco"]
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


# --- what one process would learn ---

LEARNERS = {
    "adam, a bank smaller than a step": ["--learning_rate", 1e-4, "--moco_k", 20],
    "sgd, triplet, no bank": [
        *("--optimizer", "sgd", "--learning_rate", 0.5, "--loss", "triplet", "--moco_k", 0),
    ],
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("learner", LEARNERS)
def test_two_processes_learn_what_one_learns_of_twice_the_batch(world, engine, learner, tmp_path):
    more = [*LEARNERS[learner], "--dropout", 0, "--epochs", 2]
    rate = more[more.index("--learning_rate") + 1]
    printed = run(world, tmp_path / "one", *START, *more, "--batch_sz", 16)
    half = ["--batch_sz", 8, "--learning_rate", rate / 2]
    result = run_two(engine, *command(world, tmp_path / "two", *more, *half))
    # Triplet gives some anchors no weight on negatives, and a mean over processes counts each
    # process once.
    ignored = ["hardest_share"] if "triplet" in more else []
    assert_alike(tmp_path / "two", tmp_path / "one", 1e-4, ignored)
    scaled = f"8 optimiser steps of 2 x 8 pairs, learning rate {rate / 2:g} x 2 = {rate:g}"
    assert scaled in result.stdout and "8 optimiser steps of 16 pairs" in printed
    assert result.stdout.count("optimiser steps") == 1 and "hidden hyper-parameter" in result.stdout
    trained = torch.load(tmp_path / "one" / "model.pth", weights_only=True)["state_dict"]
    moved = [trained[name] for name in trained if name.endswith("linear2.weight")]
    assert moved and all(value.abs().max() > 1e-4 for value in moved)  # near_identity starts at 0


@needs_horovod
def test_released_command_runs_under_horovodrun(world, tmp_path):
    released = ["train.py", *world.train_flags, "--model_path", tmp_path, "--device", "cpu"]
    released += [*RELEASED, "--epochs", 2, "--batch_sz", 8]
    result = run_two("horovodrun", *released)
    assert "8 optimiser steps of 2 x 8 pairs, learning rate 1e-05 x 1 = 1e-05" in result.stdout
    assert "--use-adasum changes nothing" not in result.stdout
    assert "half precision, where steps of 1e-6 and below vanish" in result.stdout
    losses = logged(tmp_path, "loss")
    assert len(losses) == 8 and np.isfinite(losses).all()


# --- alike in all processes ---


@pytest.mark.parametrize("engine", ENGINES)
def test_processes_share_the_bank_and_the_weights_and_divide_each_step(world, engine, tmp_path):
    more = ["--moco_k", 10, "--dropout", 0.3, "--hard_negatives", 5, "--mask_shared"]
    arguments = train_flags(world, tmp_path / "run", *START, *more, "--batch_sz", 7, "--epochs", 1)
    worker = ROOT / "tests" / "helpers" / "training_worker.py"
    path = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
    run_two(engine, worker, tmp_path, *arguments, PYTHONPATH=path)
    first, second = (torch.load(tmp_path / f"{rank}.pth", weights_only=True) for rank in range(2))
    torch.testing.assert_close(first["moco"], second["moco"], rtol=0, atol=0)
    torch.testing.assert_close(first["hard_negatives"], second["hard_negatives"], rtol=0, atol=0)
    order = seeded_rng(0, 0).permutation(72)
    pairs = VCDBPairDataset(world.vcdb, FeatureStore(world.train_features), neg_num=4)
    (pairs.hard_negatives,) = first["hard_negatives"]
    assert len(first["steps"]) == len(second["steps"]) == 72 // 14
    for number, (own, other) in enumerate(zip(first["steps"], second["steps"], strict=True)):
        indices, negative_ids, bank_ids, seed = own
        other_indices, other_negative_ids, other_bank_ids, other_seed = other
        step = order[number * 14 : number * 14 + 14].tolist()
        assert indices == step[:7] and other_indices == step[7:]
        expected = [i for index in step for i in pairs[index][3].tolist()]
        assert negative_ids + other_negative_ids == expected
        # A step brings 56 keys, of which the ring of 10 keeps the newest.
        keys = 14 * 4 * (number + 1)
        ring = {key % 10: i for key, i in zip(range(keys - 10, keys), expected[-10:], strict=True)}
        assert ring == dict(enumerate(bank_ids)) == dict(enumerate(other_bank_ids))
        assert seed != other_seed  # of dropout


def test_run_of_two_processes_says_so_and_scores_held_out_videos(world, tmp_path):
    more = ["--epochs", 1, "--batch_sz", 8, "--encoder", "gru", "--output_dim", 16]
    more += ["--fp16-allreduce", "--num_workers", 1]
    run_two("torchrun", *command(world, tmp_path, *val_flags(world), *more))
    saved = json.loads((tmp_path / "args.json").read_text())
    assert saved["processes"] == 2 and saved["engine"] == "torch.distributed"
    assert saved["steps"] == 72 // 16
    (metrics,) = logged(tmp_path, "held_out")
    assert sorted(metrics) == ["CSVR", "DSVR", "ISVR"]
    left = sorted(path.name.split(".")[0] for path in tmp_path.iterdir())
    assert left == ["args", "checkpoint", "events", "log", "model"]


# --- stopped and resumed as one ---

LONG = ["--epochs", 30, "--learning_rate", 1e-3, "--moco_k", 64, "--dropout", 0, "--save_every", 2]
ONE_PROCESS = ["--batch_sz", 18, "--learning_rate", 2e-3]  # what 2 processes make of 9 and 1e-3


def worker_pids(launcher):
    """{rank: process id} of the processes below a launcher."""
    pids, pending = {}, [launcher]
    while pending:
        for task in Path(f"/proc/{pending.pop()}/task").glob("*/children"):
            for child in map(int, task.read_text().split()):
                pending.append(child)
                for entry in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
                    if entry.startswith(b"RANK="):
                        pids.setdefault(int(entry[5:]), child)
    return pids


def training_pids(launcher):
    """Process ids of train.py below a launcher, at any depth."""
    pids, pending = [], [launcher]
    while pending:
        for task in Path(f"/proc/{pending.pop()}/task").glob("*/children"):
            for child in map(int, task.read_text().split()):
                pending.append(child)
                words = Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0")
                if b"python" in words[0] and b"train.py" in words[1:4]:
                    pids.append(child)
    return pids


def kill_launcher(process):
    """Kill the launcher, and what it puts between itself and the training (mpirun)."""
    pids = training_pids(process.pid)
    assert len(pids) == 2
    stats = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in pids]
    for pid in {process.pid, *(int(parent) for _, parent, *_ in stats)}:
        os.kill(pid, signal.SIGKILL)
    process.communicate()
    deadline = time.monotonic() + 60  # they end at once, but a busy machine runs them later
    while any(is_running(pid) for pid in pids):
        assert time.monotonic() < deadline, "the training outlives its launcher"
        time.sleep(0.05)


def is_running(pid):
    """Whether a process exists that is not a zombie."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


@pytest.mark.slow
def test_sigterm_on_one_rank_stops_all_and_one_process_finishes_as_two_would(world, tmp_path):
    folder, whole = tmp_path / "run", tmp_path / "whole"
    two = command(world, folder, *LONG, "--batch_sz", 9)
    process = launch("torchrun", *two)
    wait_for_step(process, folder, 5)
    os.kill(worker_pids(process.pid)[1], signal.SIGTERM)
    result = finish(process)
    assert result.returncode != 0 and "stopped at step" in result.stdout + result.stderr
    step = checkpoint_of(folder)["step"]
    assert step == read_log(folder)[-1]["step"] >= 5  # no step was lost
    process = launch("torchrun", *two)
    wait_for_step(process, folder, step + 20)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    one = [*START, *LONG, *ONE_PROCESS]
    message = refused(training.main, *train_flags(world, folder, *one))
    assert "--learning_rate" in message  # another rate is another run
    state = checkpoint_of(folder)
    state["args"]["learning_rate"] = 2e-3  # as if the rate had been given for one process
    torch.save(state, folder / "checkpoint.pth")
    printed = run(world, folder, *one)
    assert "made by 2 x 9 pairs per step" in printed and "takes 1 x 18" in printed
    run(world, whole, *one)
    assert_alike(folder, whole, 1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ENGINES)
def test_stopped_run_resumes_under_its_own_launcher(world, launcher, tmp_path, kill_rng):
    """Signalled on one process, then killed, at random steps: the end is the unbroken run's."""
    folder, whole = tmp_path / "run", tmp_path / "whole"
    more = [*LONG, "--batch_sz", 9, "--moco_m", 0.5, "--hard_negatives", 5]
    run_two(launcher, *command(world, whole, *more))
    process = launch(launcher, *command(world, folder, *more))
    wait_for_step(process, folder, kill_rng.randrange(3, 40))
    by = kill_rng.choice(STOP_SIGNALS)
    os.kill(kill_rng.choice(training_pids(process.pid)), by)
    result = finish(process)
    assert result.returncode != 0 and "stopped at step" in result.stdout + result.stderr
    step = checkpoint_of(folder)["step"]
    assert step == read_log(folder)[-1]["step"]  # no step was lost
    process = launch(launcher, *command(world, folder, *more))
    wait_for_step(process, folder, step + kill_rng.randrange(1, 40))
    kill_launcher(process)  # its processes end with it
    result = run_two(launcher, *command(world, folder, *more))
    assert "resuming at step" in result.stdout
    assert_alike(folder, whole, 1e-6)


@needs_horovod
@pytest.mark.slow
def test_adasum_run_resumes_with_the_moments_of_every_process(world, tmp_path):
    folder, whole = tmp_path / "run", tmp_path / "whole"
    more = [*LONG, "--batch_sz", 9, "--use-adasum", "--epochs", 4]
    run_two("horovodrun", *command(world, whole, *more))
    process = launch("horovodrun", *command(world, folder, *more))
    wait_for_step(process, folder, 7)
    kill_launcher(process)
    assert len(checkpoint_of(folder)["optimizers"]) == 2
    run_two("horovodrun", *command(world, folder, *more))
    assert_alike(folder, whole, 1e-6)


# --- errors ---


def test_adasum_without_horovod_is_refused_once(world, tmp_path):
    more = ["--batch_sz", 8, "--use-adasum"]
    result = finish(launch("torchrun", *command(world, tmp_path / "run", *more)))
    assert result.returncode != 0 and not (tmp_path / "run").exists()
    assert result.stderr.count("error: ") == 1 and "horovodrun" in result.stderr


def one_error_of_all(result):
    """The line of the process that failed. torchrun's own report says ChildFailedError."""
    assert result.returncode != 0
    lines = [line for line in result.stderr.splitlines() if "error: " in line]
    (line,) = [line for line in lines if "Error" not in line]
    return line


def test_features_not_finite_on_one_rank_end_all_with_one_line(world, tmp_path):
    features = {video: frames.astype(np.float32) for video, frames in world.pairs.items()}
    features["film3/copy 2"] = features["film3/copy 2"] * np.nan
    path = write_packed(tmp_path / "nan.hdf5", features)
    more = ["--batch_sz", 8, "--feature_path", path]
    result = finish(launch("torchrun", *command(world, tmp_path / "run", *more)))
    line = one_error_of_all(result)
    assert "film3/copy 2" in line and "nan.hdf5" in line
    assert not (tmp_path / "run" / "model.pth").exists()


def test_loss_not_finite_on_one_rank_ends_all_with_one_line(world, tmp_path):
    more = ["--loss", "infonce", "--learning_rate", 1e30, "--epochs", 40, "--batch_sz", 8]
    result = finish(launch("torchrun", *command(world, tmp_path, *more)))
    line = one_error_of_all(result)
    assert "at step" in line and "checkpoint" in line
    assert not (tmp_path / "model.pth").exists()
    assert all(math.isfinite(loss) for loss in logged(tmp_path, "loss"))
