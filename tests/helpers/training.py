"""Runs of train.py on the synthetic world, in this process or another, and what they leave."""

import contextlib
import io
import os
import signal
import time
from types import SimpleNamespace
from unittest import mock

import torch

import train
from helpers.feature_files import read_log
from helpers.worlds import C
from model import MoCo

SMALL = ["--nhead", 4, "--dim_feedforward", 64, "--batch_sz", 8, "--neg_num", 4, "--moco_k", 64]
SMALL += ["--print-freq", 1, "--device", "cpu"]

# The flags of the released README's command, but for a small bank, few negatives and few channels.
RELEASED = ["--num_clusters", 256, "--num_layers", 1, "--output_dim", 1024, "--normalize_input"]
RELEASED += ["--learning_rate", 1e-5, "--momentum", 0.9, "--weight_decay", 1e-4, "--neg_num", 4]
RELEASED += ["--pca_components", C, "--padding_size", 300, "--num_readers", 2, "--num_workers", 1]
RELEASED += ["--moco_k", 32, "--moco_m", "0.", "--moco_t", 1.0, "--print-freq", 1]
RELEASED += ["--use-adasum", "--fp16-allreduce"]


def train_flags(world, folder, *more):
    return [*world.train_flags, "--model_path", folder, *SMALL, *more]


def command(world, folder, *more):
    """For helpers.commands, in another process."""
    return ["train.py", *train_flags(world, folder, *more)]


def val_flags(world):
    features = ["--val_feature_path", world.val_features]
    return ["--val_set", "DEMO-VAL", *features, "--annotation_dir", world.annotations]


def main(argv):
    return train.main([str(word) for word in argv])


def run(world, folder, *more):
    """Train in this process to the end; gives what is printed."""
    with contextlib.redirect_stdout(io.StringIO()) as stdout:
        status = main(train_flags(world, folder, *more))
    assert status == 0
    return stdout.getvalue()


def run_until(step, world, folder, *more, by=signal.SIGTERM):
    """The same, stopped by a signal that arrives in the middle of `step` (counted from 1)."""
    seed_torch = train.seed_torch

    def seed_and_signal(*keys):  # called before each step by (seed, steps done, rank)
        if keys[1:] == (step - 1, 0):
            os.kill(os.getpid(), by)
        seed_torch(*keys)

    with mock.patch.object(train, "seed_torch", seed_and_signal):
        with contextlib.redirect_stdout(io.StringIO()) as stdout:
            status = main(train_flags(world, folder, *more))
    assert status == 128 + by
    assert f"stopped at step {step};" in stdout.getvalue()
    assert checkpoint_of(folder)["step"] == step


@contextlib.contextmanager
def recorded_steps():
    """Yields a list, to which each training step of this process adds a record.

    indices, negative_ids: of the batch
    seed: torch's, of the step's dropout
    bank_ids, bank_ids_after: ids in the bank before and after the step
    logits: (N, 1+K)
    model: the MoCo
    """
    steps, batch_to_device, forward = [], train.batch_to_device, MoCo.forward

    def record_batch(batch, device, frames):
        steps.append(SimpleNamespace(indices=batch[0], negative_ids=batch[4].tolist()))
        return batch_to_device(batch, device, frames)

    def record_forward(model, *inputs):
        step = steps[-1]
        step.model, step.seed = model, torch.initial_seed()
        step.bank_ids = model.queue_ids.tolist()
        logits, labels = forward(model, *inputs)
        step.logits, step.bank_ids_after = logits.detach(), model.queue_ids.tolist()
        return logits, labels

    with (
        mock.patch.object(train, "batch_to_device", record_batch),
        mock.patch.object(MoCo, "forward", record_forward),
    ):
        yield steps


def wait_for_step(process, folder, step):
    """Until the log shows `step`, written by this run (just started), which must still go on."""
    started, log = time.time_ns(), folder / "log.jsonl"
    while not (
        log.exists()
        and log.stat().st_mtime_ns > started
        and any(line["step"] >= step for line in read_log(folder))
    ):
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    assert process.poll() is None, "the run ended before it could be stopped; make it longer"


# --- what a run leaves ---


def weights(folder):
    return torch.load(folder / "model.pth", weights_only=True)["state_dict"]


def checkpoint_of(folder):
    return torch.load(folder / "checkpoint.pth", map_location="cpu", weights_only=True)


def logged(folder, name):
    """The values of a metric, line by line, where a line has it."""
    return [line[name] for line in read_log(folder) if name in line]


def log_without_times(folder):
    clock = {"videos_per_s", "data_wait"}
    return [
        {name: value for name, value in line.items() if name not in clock}
        for line in read_log(folder)
    ]


def equal(state, other):
    """Whether two state dicts are the same, to the last bit."""
    same_names = state.keys() == other.keys()
    return same_names and all(torch.equal(value, other[name]) for name, value in state.items())


def assert_same_run(folder, other):
    """The same model.pth, both encoders, bank and log; model.pth may be of an earlier epoch."""
    assert equal(weights(folder), weights(other))
    assert equal(checkpoint_of(folder)["moco"], checkpoint_of(other)["moco"])
    assert log_without_times(folder) == log_without_times(other)
