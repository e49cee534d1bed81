"""Scripts under torchrun and horovodrun, by default on 2 processes."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.commands import ROOT, environment

BIN = Path(sys.executable).parent


def why_no_horovod(bin=BIN):
    """Why Horovod cannot be used, or an empty string; a failed `make horovod` leaves its reason."""
    failed = bin.parent / "horovod" / "failed"
    if failed.exists():
        return f"Horovod was not built: {failed.read_text().strip()}"
    if not (bin / "horovodrun").exists():
        return "Horovod is not built; `make horovod` builds it"
    return ""


NO_HOROVOD = why_no_horovod()
needs_horovod = pytest.mark.skipif(bool(NO_HOROVOD), reason=NO_HOROVOD)
LAUNCHERS = {
    "torchrun": ["torchrun", "--standalone", "--nproc_per_node", "2"],
    "horovodrun": ["horovodrun", "-np", "2", "-H", "localhost:2", "python"],  # with MPI
    "horovodrun --gloo": ["horovodrun", "--gloo", "-np", "2", "python"],
    "horovodrun, 4 processes": ["horovodrun", "-np", "4", "python"],
    "python": ["python"],
}
ENGINES = ["torchrun", pytest.param("horovodrun", marks=needs_horovod)]


def launch_environment(**changes):
    """The environment of a launcher; PATH is that of an activated environment."""
    return environment(
        PATH=f"{BIN}{os.pathsep}{os.environ['PATH']}",
        # MPI waits in a busy loop by default: slow with more processes than cores.
        OMPI_MCA_mpi_yield_when_idle="1",
        **changes,
    )


def launch(launcher, *arguments, **changes):
    """Start a script under a launcher, in a process group of its own; `changes` the environment."""
    command = [*map(str, LAUNCHERS[launcher]), *map(str, arguments)]
    env = launch_environment(**changes)
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, cwd=ROOT, env=env, start_new_session=True, **pipes)


def finish(process, timeout=300):  # on a busy machine a run takes minutes
    """Wait for a launched process and give its result. If it hangs, its group is killed."""
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def run_two(launcher, *arguments, **changes):
    """Run a script on 2 processes; it must end well."""
    result = finish(launch(launcher, *arguments, **changes))
    assert result.returncode == 0, result.stderr[:3000]
    return result
