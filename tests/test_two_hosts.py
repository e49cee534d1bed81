"""Training on two hosts, by both launchers: the weights are those of two processes on one host."""

import subprocess

import pytest
from helpers.commands import ROOT
from helpers.hosts import two_hosts, why_no_hosts
from helpers.launchers import BIN, finish, launch_environment, needs_horovod, run_two
from helpers.training import command, equal, weights

NO_HOSTS = why_no_hosts()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.distributed,
    pytest.mark.skipif(bool(NO_HOSTS), reason=NO_HOSTS),
]

MORE = ["--init", "near_identity", "--epochs", 2, "--learning_rate", 1e-3, "--hard_negatives", 5]


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    with two_hosts(tmp_path_factory.mktemp("hosts")) as hosts:
        yield hosts


@pytest.fixture(scope="module")
def one_host(world, tmp_path_factory):
    """The weights of two processes on one host."""
    folder = tmp_path_factory.mktemp("one")
    run_two("torchrun", *command(world, folder, *MORE))
    return weights(folder)


def start_on(host, *arguments):
    """Start a command on a host, in the folder that both share."""
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(
        [*host, *map(str, arguments)],
        cwd=ROOT,
        env=launch_environment(),
        start_new_session=True,
        **pipes,
    )


def assert_trained(process, folder, expected):
    result = finish(process)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "2 x 8 pairs" in result.stdout
    assert equal(weights(folder), expected)


def test_torchrun_on_two_hosts_trains_as_on_one(world, hosts, one_host, tmp_path):
    torchrun = ["torchrun", "--nnodes", 2, "--nproc_per_node", 1]
    torchrun += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "hosta:29500"]
    train = [*torchrun, *command(world, tmp_path, *MORE)]
    first, second = (start_on(host, *train) for host in hosts.values())
    assert_trained(first, tmp_path, one_host)
    assert finish(second).returncode == 0


@needs_horovod
@pytest.mark.parametrize("controller", ["mpi", "gloo"])
def test_horovodrun_on_two_hosts_trains_as_on_one(world, hosts, one_host, controller, tmp_path):
    horovodrun = ["horovodrun", f"--{controller}", "-np", 2, "-H", "hosta:1,hostb:1"]
    if controller == "mpi":  # by ssh, where .venv is not on the PATH
        horovodrun += ["--mpi-args", f"--prefix {BIN.parent}"]
    train = [*horovodrun, "python", *command(world, tmp_path, *MORE)]
    assert_trained(start_on(hosts["hosta"], *train), tmp_path, one_host)
