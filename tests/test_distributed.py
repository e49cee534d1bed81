"""Training on several dist: what one process would learn, alike on all of them, stopped and resumed together."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.commands import ROOT, cli, environment
from helpers.files import read_log, write_packed
from helpers.worlds import C

from data import VCDBPairDataset
from features.store import FeatureStore
from utils import seeded_rng

SMALL = [
    "--nhead",
    4,
    "--dim_feedforward",
    64,
    "--neg_num",
    4,
    "--print-freq",
    1,
    "--init",
    "near_identity",
]
BIN = Path(sys.executable).parent
HOROVOD = (BIN / "horovodrun").exists()
needs_horovod = pytest.mark.skipif(
    not HOROVOD, reason="Horovod is not built here; `make horovod` builds it"
)
LAUNCHERS = {
    "torchrun": ["torchrun", "--standalone", "--nproc_per_node", "2"],
    "horovodrun": ["horovodrun", "-np", "2", "-H", "localhost:2", "python"],
}
ENGINES = ["torchrun", pytest.param("horovodrun", marks=needs_horovod)]


def launch(launcher, *arguments):
    """Start a script on 2 dist, in a process group of its own."""
    command = [*map(str, LAUNCHERS[launcher]), *map(str, arguments)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    # MPI waits by spinning unless told to yield, at which more processes than cores would crawl.
    env = environment(
        PATH=f"{BIN}{os.pathsep}{os.environ['PATH']}", OMPI_MCA_mpi_yield_when_idle="1"
    )
    return subprocess.Popen(command, cwd=ROOT, env=env, start_new_session=True, **pipes)


def finish(process, timeout=120):
    try:
        process.stdout, process.stderr = (
            Text(text) for text in process.communicate(timeout=timeout)
        )
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process


class Text(str):
    """Output that Popen's own clean-up may close."""

    def close(self):
        pass


def two(launcher, *arguments):
    result = finish(launch(launcher, *arguments))
    assert result.returncode == 0, result.stderr[:3000]
    return result


def command(world, folder, *more):
    return ["train.py", *world.train_flags, "--model_path", folder, *SMALL, *more]


def end_of(folder):
    return torch.load(folder / "checkpoint.pth", weights_only=True)


def assert_alike(folder, other, tolerance, but=()):
    """The same figures at the same steps, and the same weights, bank and optimiser, to float tolerance."""
    timing = {"videos_per_s", "data_wait", "lr", *but}
    lines, others = (
        [
            {name: value for name, value in line.items() if name not in timing}
            for line in read_log(path)
        ]
        for path in (folder, other)
    )
    assert [line["step"] for line in lines] == [line["step"] for line in others] and len(lines) > 4
    for line, expected in zip(lines, others, strict=True):
        assert line.keys() == expected.keys()
        for name, value in line.items():
            assert value is expected[name] is None or value == pytest.approx(
                expected[name], rel=tolerance, abs=tolerance
            ), name
    one, two = end_of(folder), end_of(other)
    for name, value in one["moco"].items():
        torch.testing.assert_close(
            value, two["moco"][name], rtol=tolerance, atol=tolerance, msg=name
        )


# --- what one process would learn ------------------------------------------------------------------------------------

LEARNERS = {
    "adam, a bank smaller than a step": ["--learning_rate", 1e-4, "--moco_k", 20],
    "sgd, triplet, no bank": [
        "--optimizer",
        "sgd",
        "--learning_rate",
        0.5,
        "--loss",
        "triplet",
        "--moco_k",
        0,
    ],
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("learner", LEARNERS)
def test_two_processes_learn_what_one_learns_of_twice_the_batch(world, engine, learner, tmp_path):
    flags = [*LEARNERS[learner], "--dropout", 0, "--epochs", 2]
    rate = flags[flags.index("--learning_rate") + 1]
    one = cli(*command(world, tmp_path / "one", *flags, "--batch_sz", 16))
    assert one.returncode == 0, one.stderr
    result = two(
        engine,
        *command(world, tmp_path / "two", *flags, "--batch_sz", 8, "--learning_rate", rate / 2),
    )
    # Triplet gives some anchors no weight on negatives, and a mean over processes counts each process once.
    assert_alike(
        tmp_path / "two",
        tmp_path / "one",
        1e-4,
        but=["hardest_share"] if "triplet" in flags else [],
    )
    assert (
        f"8 optimiser steps of 2 x 8 pairs, learning rate {rate / 2:g} x 2 = {rate:g}"
        in result.stdout
    )
    assert "8 optimiser steps of 16 pairs" in one.stdout
    assert result.stdout.count("optimiser steps") == 1 and "hidden hyper-parameter" in result.stdout
    start = torch.load(tmp_path / "one" / "model.pth", weights_only=True)["state_dict"]
    assert any(
        value.abs().max() > 1e-4 for name, value in start.items() if name.endswith("linear2.weight")
    )  # it moved from 0


@needs_horovod
def test_the_released_readmes_command_runs_under_horovodrun(world, tmp_path):
    released = [
        *(
            "train.py",
            *world.train_flags,
            "--model_path",
            tmp_path,
            "--num_clusters",
            256,
            "--num_layers",
            1,
        ),
        *(
            "--output_dim",
            1024,
            "--normalize_input",
            "--neg_num",
            4,
            "--epochs",
            2,
            "--batch_sz",
            8,
            "--learning_rate",
            1e-5,
        ),
        *(
            "--momentum",
            0.9,
            "--weight_decay",
            1e-4,
            "--pca_components",
            C,
            "--padding_size",
            300,
            "--num_readers",
            2,
        ),
        *(
            "--num_workers",
            1,
            "--moco_k",
            32,
            "--moco_m",
            "0.",
            "--moco_t",
            1.0,
            "--print-freq",
            1,
            "--use-adasum",
        ),
        "--fp16-allreduce",
    ]
    result = two("horovodrun", *released)
    assert "8 optimiser steps of 2 x 8 pairs, learning rate 1e-05 x 1 = 1e-05" in result.stdout
    assert "--use-adasum changes nothing" not in result.stdout
    losses = [line["loss"] for line in read_log(tmp_path) if "loss" in line]
    assert len(losses) == 8 and np.isfinite(losses).all()


def test_adasum_without_horovod_is_refused_once(world, tmp_path):
    result = finish(
        launch("torchrun", *command(world, tmp_path / "run", "--batch_sz", 8, "--use-adasum"))
    )
    assert result.returncode != 0 and not (tmp_path / "run").exists()
    assert result.stderr.count("error: ") == 1 and "horovodrun" in result.stderr


# --- alike on all processes ------------------------------------------------------------------------------------------

PROBE = """
import sys
import torch
from utils import init_distributed
from options import parse, settle
from train import Trainer
dist = init_distributed()
args = parse("", sys.argv[2:])
settle(args, dist)
trainer = Trainer(args, dist)
seen = []
for batch in trainer.batches():
    trainer.train_step(batch)
    seen.append([batch[0], batch[4].tolist(), trainer.model.queue_ids.tolist(), torch.initial_seed()])
trainer.mine()
state = {"seen": seen, "moco": trainer.model.state_dict(), "mined": trainer.data.mined}
torch.save(state, f"{sys.argv[1]}/{dist.world_size}-{dist.rank}.pth")
"""


@pytest.mark.parametrize("engine", ENGINES)
def test_ranks_share_the_bank_and_the_weights_and_divide_each_step(world, engine, tmp_path):
    probe = tmp_path / "probe.py"
    probe.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n" + PROBE)
    flags = [
        *world.train_flags,
        "--model_path",
        tmp_path,
        *SMALL,
        "--moco_k",
        10,
        "--dropout",
        0.3,
        "--hard_negatives",
        5,
    ]
    two(engine, probe, tmp_path, *flags, "--batch_sz", 7, "--mask_shared")
    first, second = (torch.load(tmp_path / f"2-{rank}.pth", weights_only=True) for rank in range(2))
    assert all(torch.equal(value, second["moco"][name]) for name, value in first["moco"].items())
    assert torch.equal(first["mined"], second["mined"])
    order = seeded_rng(0, 0).permutation(72)
    pairs = VCDBPairDataset(world.vcdb, FeatureStore(world.train_features), neg_num=4)
    assert len(first["seen"]) == len(second["seen"]) == 72 // 14
    for step, (one, two_) in enumerate(zip(first["seen"], second["seen"], strict=True)):
        part = order[step * 14 : step * 14 + 14].tolist()
        assert one[0] == part[:7] and two_[0] == part[7:]
        numbers = [n for i in part for n in pairs[i][3].tolist()]
        assert one[1] + two_[1] == numbers
        keys = (
            14 * 4 * (step + 1)
        )  # all so far; a step brings 56 keys, the ring keeps the newest 10
        assert {
            i % 10: n for i, n in zip(range(keys - 10, keys), numbers[-10:], strict=True)
        } == dict(enumerate(one[2]))
        assert one[2] == two_[2] and one[3] != two_[3]  # the bank is one, dropout is each its own


# --- stopped and resumed together ------------------------------------------------------------------------------------

LONG = ["--epochs", 30, "--learning_rate", 1e-3, "--moco_k", 64, "--dropout", 0, "--save_every", 2]


@pytest.fixture(scope="module")
def unbroken(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    result = cli(*command(world, folder, *LONG, "--batch_sz", 18, "--learning_rate", 2e-3))
    assert result.returncode == 0, result.stderr
    return folder


def workers(launcher):
    """Process ids below `launcher` by rank."""
    found, ask = {}, [launcher]
    while ask:
        for task in Path(f"/proc/{ask.pop()}/task").glob("*/children"):
            for child in task.read_text().split():
                ask.append(int(child))
                for entry in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
                    if entry.startswith(b"RANK="):
                        found.setdefault(int(entry[5:]), int(child))
    return found


def wait_for_step(process, folder, step):
    started = time.time_ns()
    while not (
        (folder / "log.jsonl").exists()
        and (folder / "log.jsonl").stat().st_mtime_ns > started
        and any(line["step"] >= step for line in read_log(folder))
    ):
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    assert process.poll() is None, "the run ended before it could be stopped; make it longer"


def test_sigterm_on_one_rank_stops_all_and_one_process_ends_the_run_as_two_would(
    world, unbroken, tmp_path
):
    call = command(world, tmp_path, *LONG, "--batch_sz", 9)
    process = launch("torchrun", *call)
    wait_for_step(process, tmp_path, 5)
    os.kill(workers(process.pid)[1], signal.SIGTERM)
    result = finish(process)
    assert result.returncode != 0 and "stopped at step" in result.stdout + result.stderr
    assert end_of(tmp_path)["step"] == read_log(tmp_path)[-1]["step"] >= 5  # nothing done was lost
    process = launch("torchrun", *call)
    wait_for_step(process, tmp_path, end_of(tmp_path)["step"] + 20)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    result = cli(*command(world, tmp_path, *LONG, "--batch_sz", 18, "--learning_rate", 2e-3))
    assert (
        "--learning_rate" in result.stderr and result.returncode == 2
    )  # another rate is another run
    last = end_of(tmp_path)
    last["args"]["learning_rate"] = 2e-3  # what 2 processes made of 1e-3
    torch.save(last, tmp_path / "checkpoint.pth")
    result = cli(*command(world, tmp_path, *LONG, "--batch_sz", 18, "--learning_rate", 2e-3))
    assert result.returncode == 0, result.stderr
    assert "made by 2 x 9 pairs a step" in result.stdout and "takes 1 x 18" in result.stdout
    assert_alike(tmp_path, unbroken, 1e-3)


def test_a_failure_on_one_rank_is_told_once_and_ends_all(world, tmp_path):
    features = {video: rows.astype(np.float32) for video, rows in world.pairs.items()}
    features["film3/copy 2"] = features["film3/copy 2"] * np.nan
    path = write_packed(tmp_path / "nan.hdf5", features)
    reading = launch(
        "torchrun", *command(world, tmp_path / "nan", "--batch_sz", 8, "--feature_path", path)
    )
    rate = ["--loss", "infonce", "--learning_rate", 1e30, "--epochs", 40, "--batch_sz", 8]
    for process, folder, words in (
        (finish(reading), "nan", ["film3/copy 2", "nan.hdf5"]),
        (
            finish(launch("torchrun", *command(world, tmp_path / "rate", *rate))),
            "rate",
            ["at step", "checkpoint"],
        ),
    ):
        lines = [
            line
            for line in process.stderr.splitlines()
            if "error: " in line and "Error" not in line
        ]
        assert process.returncode != 0 and len(lines) == 1, process.stderr[-2000:]
        assert all(word in lines[0] for word in words)
        assert not (tmp_path / folder / "model.pth").exists()


def test_a_run_of_two_processes_says_so_in_args_json_and_scores_held_out_videos(world, tmp_path):
    held_out = [
        "--val_set",
        "DEMO-VAL",
        "--val_feature_path",
        world.val_features,
        "--annotation_dir",
        world.annotations,
    ]
    flags = [
        *held_out,
        "--epochs",
        1,
        "--batch_sz",
        8,
        "--encoder",
        "gru",
        "--output_dim",
        16,
        "--fp16-allreduce",
        "--num_workers",
        1,
    ]
    two("torchrun", *command(world, tmp_path, *flags))
    saved = json.loads((tmp_path / "args.json").read_text())
    assert saved["processes"] == 2 and saved["engine"] == "torch.distributed"
    assert [sorted(line["held_out"]) for line in read_log(tmp_path) if "held_out" in line] == [
        ["CSVR", "DSVR", "ISVR"]
    ]
    assert sorted(path.name.split(".")[0] for path in tmp_path.iterdir()) == [
        "args",
        "checkpoint",
        "events",
        "log",
        "model",
    ]
