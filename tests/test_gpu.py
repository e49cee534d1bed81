"""What runs on a GPU gives what the CPU gives, to float tolerance. Skipped where there is none."""

import json
import os

import pytest
import torch
from helpers.commands import cli, python
from helpers.feature_files import read_log
from helpers.launchers import finish, launch, needs_horovod
from helpers.training import checkpoint_of, equal, train_flags, weights

pytestmark = [pytest.mark.gpu, pytest.mark.distributed]

ENGINES = ["torchrun", pytest.param("horovodrun", marks=needs_horovod)]
MORE = ["--dropout", 0, "--epochs", 2, "--learning_rate", 1e-4, "--num_workers", 1]


@pytest.fixture(scope="module")
def gpu():
    """Changes to a process's environment, by which it sees the GPUs that conftest.py hides."""
    visible = {"CUDA_VISIBLE_DEVICES": os.environ["TEST_GPUS"]}
    count = python("import torch; print(torch.cuda.device_count())", **visible).stdout
    if not int(count or 0):
        pytest.skip("there is no GPU")
    return visible


@pytest.fixture(scope="module")
def on_cpu(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cpu") / "run"
    result = cli("train.py", *train_flags(world, folder, *MORE))
    assert result.returncode == 0, result.stderr
    return folder


def train(gpu, world, folder, *more):
    flags = train_flags(world, folder, *MORE, "--device", "cuda", *more)
    result = cli("train.py", *flags, **gpu)
    assert result.returncode == 0, result.stderr
    return result


def assert_alike(folder, other, tolerance):
    """The same losses, weights and bank."""
    losses, expected = ([line["loss"] for line in read_log(f)] for f in (folder, other))
    assert losses == pytest.approx(expected, rel=tolerance, abs=tolerance) and len(losses) > 4
    found, expected = checkpoint_of(folder)["moco"], checkpoint_of(other)["moco"]
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "more, tolerance",
    [
        ([], 1e-3),
        (["--features_on", "device"], 1e-3),
        (["--deterministic"], 1e-3),
        (["--tf32"], 3e-2),
        (["--amp", "bfloat16"], 1e-1),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_training_on_a_gpu_equals_the_cpus(gpu, world, on_cpu, more, tolerance, tmp_path):
    train(gpu, world, tmp_path / "run", *more)
    assert_alike(tmp_path / "run", on_cpu, tolerance)


def test_deterministic_runs_are_equal_to_the_bit_also_when_resumed(gpu, world, tmp_path):
    more = ["--deterministic", "--dropout", 0.2, "--hard_negatives", 5, "--mask_shared"]
    train(gpu, world, tmp_path / "whole", *more)
    train(gpu, world, tmp_path / "stopped", *more, "--save_every", 4)
    for name in ("model.pth", "checkpoint.pth"):  # as if it had been killed after step 12
        (tmp_path / "stopped" / name).unlink()
    result = train(gpu, world, tmp_path / "stopped", *more, "--save_every", 4)
    assert "resuming at step" in result.stdout + result.stderr
    assert equal(weights(tmp_path / "stopped"), weights(tmp_path / "whole"))


@pytest.mark.parametrize("launcher", ENGINES)
def test_two_processes_share_the_gpus_of_this_machine(gpu, world, launcher, tmp_path):
    """Two on one GPU exchange through the CPU; on two GPUs, by NCCL. Both learn as on the CPU.

    Horovod cannot do the first.
    """
    half = [*MORE, "--batch_sz", 4, "--num_workers", 0]
    for device, changes in (("cpu", {}), ("cuda", gpu)):
        flags = train_flags(world, tmp_path / device, *half, "--device", device)
        result = finish(launch(launcher, "train.py", *flags, **changes))
        if "was built for CPUs alone" in result.stderr:
            pytest.skip("Horovod was built for CPUs alone")
        if launcher == "horovodrun" and "would share 1 GPU," in result.stderr:
            pytest.skip("there is one GPU, which Horovod's processes cannot share")
        assert result.returncode == 0, result.stderr[:3000]
    assert_alike(tmp_path / "cuda", tmp_path / "cpu", 1e-3)
    saved = json.loads((tmp_path / "cuda" / "args.json").read_text())
    assert saved["processes"] == 2 and saved["arguments"]["device"].startswith("cuda")
