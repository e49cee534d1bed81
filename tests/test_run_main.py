"""How a script ends: exit statuses, one-line errors; which launcher started it; its device."""

import signal
import subprocess
import sys

import pytest
import torch
from helpers.commands import ROOT, environment, python
from helpers.launchers import finish, launch

import distributed
from distributed import run_main
from utils import InputError

# --- how a script ends --------------------------------------------------------------------------


def raises(error):
    """A `main` that raises this error."""

    def main():
        raise error

    return main


class HorovodInternalError(RuntimeError):
    """Horovod's exception of this name, which is known by its name alone."""


ENGINE_FAILED = (
    "error: the exchange between processes failed: {}; if another process printed an error, that"
    " is the cause; else it was killed, or the network failed\n"
)
NCCL_ERROR = (
    "NCCL error in a.cpp:1\nLast error:\nno shared memory\n"
    "Exception raised from create at NCCLUtils.cpp:94 (most recent call first):\nframe #0: x"
)


@pytest.mark.parametrize(
    "main, status, stderr",
    [
        (lambda: None, None, ""),
        (lambda: 0, 0, ""),
        (lambda: 143, 143, ""),
        (raises(InputError("no\nsuch file")), 2, "error: no such file\n"),
        (raises(PermissionError("not allowed")), 2, "error: not allowed\n"),
        (raises(KeyboardInterrupt()), 130, "interrupted\n"),
        (raises(SystemExit(3)), 3, ""),
        (raises(SystemExit("a text")), 1, "a text\n"),
        (
            raises(RuntimeError("[/build/gloo/transport/tcp/pair.cc:1] closed")),
            1,
            ENGINE_FAILED.format("[/build/gloo/transport/tcp/pair.cc:1] closed"),
        ),
        (
            raises(torch.distributed.DistBackendError(NCCL_ERROR)),
            1,
            ENGINE_FAILED.format("NCCL error in a.cpp:1 Last error: no shared memory"),
        ),
        (raises(HorovodInternalError("shutdown")), 1, ENGINE_FAILED.format("shutdown")),
    ],
    ids=[
        "None",
        "0",
        "143",
        "InputError",
        "OSError",
        "Ctrl-C",
        "SystemExit",
        "SystemExit of a text",
        "lost peer, gloo",
        "lost peer, NCCL",
        "lost peer, Horovod",
    ],
)
def test_run_main_exit_status(main, status, stderr, capsys):
    with pytest.raises(SystemExit) as end:
        run_main(main)
    assert end.value.code == status
    assert capsys.readouterr() == ("", stderr)


@pytest.mark.parametrize("error", [ZeroDivisionError, RuntimeError("shapes differ")])
def test_run_main_does_not_hide_a_bug(error):
    with pytest.raises((ZeroDivisionError, RuntimeError)):
        run_main(raises(error))


def test_run_main_names_the_process_except_the_first(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "4")
    for rank, process in ((0, ""), (3, "process 3 of 4: ")):
        monkeypatch.setenv("RANK", str(rank))
        with pytest.raises(SystemExit):
            run_main(raises(InputError("no such file")))
        assert capsys.readouterr().err == f"error: {process}no such file\n"


def test_run_main_prints_the_message_of_a_data_loading_worker_alone(capsys):
    """torch.utils.data raises the worker's exception again, with its traceback as the message."""
    with pytest.raises(SystemExit):
        run_main(lambda: list(torch.utils.data.DataLoader(Broken(), num_workers=1)))
    assert capsys.readouterr().err == "error: video 'x' is empty\n"


class Broken(torch.utils.data.Dataset):
    """A data set whose only item is bad input."""

    def __len__(self):
        return 1

    def __getitem__(self, index):
        raise InputError("video 'x' is empty")


def test_run_main_prints_bad_input_as_one_line():
    result = python(
        "from distributed import run_main\n"
        "from utils import InputError\n"
        "def main():\n"
        "    raise InputError('no\\nway')\n"
        "run_main(main)"
    )
    assert (result.returncode, result.stdout, result.stderr) == (2, "", "error: no way\n")


def test_run_main_broken_pipe_is_silent():
    """As in `script | head -1`, with more output than a pipe holds, and some still buffered."""
    code = (
        "from distributed import run_main\n"
        "run_main(lambda: [print('x' * 100) for _ in range(10000)])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment(PYTHONUNBUFFERED=""),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline().strip() == "x" * 100
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 128 + signal.SIGPIPE
    process.stderr.close()


# --- launcher and device ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "variables, expected",
    [
        ({}, (None, 0, 1)),
        ({"RANK": "1", "WORLD_SIZE": "2"}, ("torch", 1, 2)),
        ({"RANK": "1"}, (None, 0, 1)),
        ({"HOROVOD_RANK": "3", "HOROVOD_SIZE": "4"}, ("horovod", 3, 4)),
        ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "8"}, ("horovod", 0, 8)),
    ],
    ids=["none", "torchrun", "RANK alone", "horovodrun --gloo", "horovodrun --mpi"],
)
def test_detect_launcher(variables, expected, monkeypatch):
    for launcher in ("", "HOROVOD_", "OMPI_COMM_WORLD_"):
        for name in ("RANK", "SIZE", "WORLD_SIZE"):
            monkeypatch.delenv(launcher + name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert distributed.detect_launcher() == expected


@pytest.mark.parametrize(
    "variables, reason",
    [
        ({}, "LOCAL_RANK is not set"),
        ({"RANK": "first"}, "RANK is 'first', not a number"),
        ({"LOCAL_RANK": "0"}, "LOCAL_WORLD_SIZE is not set"),
        ({"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}, "MASTER_ADDR"),
    ],
)
def test_init_distributed_outside_torchrun_says_what_to_do(variables, reason):
    """RANK and WORLD_SIZE alone, as some job managers set them, do not make a process group."""
    result = python(
        "from distributed import init_distributed, run_main\nrun_main(init_distributed)",
        **{"RANK": "0", "WORLD_SIZE": "2", **variables},
    )
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert reason in result.stderr and "with torchrun" in result.stderr


@pytest.mark.distributed
def test_text_of_an_exit_is_printed_under_torchrun(tmp_path):
    """There the interpreter is left without its own end, which would print it."""
    script = tmp_path / "script.py"
    script.write_text(
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from distributed import init_distributed, run_main\n"
        "run_main(lambda: sys.exit(f'rank {init_distributed().rank} gives up'))\n"
    )
    result = finish(launch("torchrun", script, ROOT))
    assert "gives up" in result.stderr and "exitcode  : 1" in result.stderr
    assert "TypeError" not in result.stderr


def test_check_device():
    assert distributed.check_device("cpu") == "cpu"
    for name in ("nonsense", "cuda:99"):
        with pytest.raises(InputError, match=f"--device {name}: "):
            distributed.check_device(name)
