"""Two hosts on this machine: namespaces with names, links and process ids of their own.

Host a and host b see one another by name and by ssh, through a virtual link, and share the file
system, as machines with a network folder do. Needs root, iproute2, util-linux and openssh.
"""

import contextlib
import shutil
import subprocess
from pathlib import Path

from helpers.commands import ROOT

ADDRESSES = {"hosta": "10.99.0.1", "hostb": "10.99.0.2"}
NAMESPACES = ["--net", "--uts", "--mount", "--pid"]
SSHD = "/usr/sbin/sshd"

CLIENT = """
IdentityFile {folder}/key
StrictHostKeyChecking no
UserKnownHostsFile /dev/null
LogLevel ERROR
"""
SERVER = """
HostKey {folder}/key
AuthorizedKeysFile {folder}/key.pub
PermitRootLogin yes
StrictModes no
UsePAM no
"""
# What a host does first. Everything is seen by this host alone: its mounts are private.
BOOT = """
hostname {name}
mount --bind {folder}/hosts /etc/hosts
mount --bind {folder}/ssh_config /etc/ssh/ssh_config
mount -t tmpfs shm /dev/shm
mount -t tmpfs run /run && mkdir /run/sshd
ip link set lo up
echo up
read line # the link is there
ip address add {address}/24 dev eth0
ip link set eth0 up
/usr/sbin/sshd -f {folder}/sshd_config -E {folder}/{name}.log
echo up
exec sleep infinity
"""


def why_no_hosts():
    """Why this machine cannot have such hosts, or an empty string."""
    for tool in ("ip", "unshare", "nsenter", "setpriv", "ssh", "ssh-keygen", SSHD):
        if not shutil.which(tool):
            return f"there is no {tool}; two hosts need iproute2, util-linux and openssh"
    attempt = subprocess.run(
        ["unshare", *NAMESPACES, "--fork", "ip", "link", "add", "probe", "type", "veth"],
        capture_output=True,
        text=True,
    )
    return f"namespaces are not allowed: {attempt.stderr.strip()}" if attempt.returncode else ""


@contextlib.contextmanager
def two_hosts(folder):
    """Yields {name: what to write before a command to run it there}; at the end all is gone.

    The kernel ends all processes of a host when its first one ends, and removes the link.
    """
    hosts = "".join(f"{address} {name}\n" for name, address in ADDRESSES.items())
    (folder / "hosts").write_text(f"127.0.0.1 localhost\n{hosts}")
    (folder / "ssh_config").write_text(CLIENT.format(folder=folder))
    (folder / "sshd_config").write_text(SERVER.format(folder=folder))
    subprocess.run(["ssh-keygen", "-q", "-N", "", "-f", folder / "key"], check=True)

    with contextlib.ExitStack() as stack:
        processes = {name: stack.enter_context(_boot(name, folder)) for name in ADDRESSES}
        pids = {name: _child(process.pid) for name, process in processes.items()}
        enter = {name: [*_enter(pid), "env", "--chdir", ROOT] for name, pid in pids.items()}
        link = ["ip", "link", "add", "eth0", "type", "veth"]
        peer = ["peer", "name", "eth0", "netns", pids["hostb"]]
        # In the network of host a, but with the process ids of this machine.
        subprocess.run([*_enter(pids["hosta"], ["--net"]), *link, *peer], check=True)
        for process in processes.values():
            process.stdin.write("linked\n")
            process.stdin.flush()
            assert process.stdout.readline() == "up\n", process.stderr.read()
        yield enter


@contextlib.contextmanager
def _boot(name, folder):
    """Start a host; it dies with this process."""
    script = BOOT.format(name=name, folder=folder, address=ADDRESSES[name])
    unshare = [
        "unshare",
        *NAMESPACES,
        "--fork",
        "--kill-child",
        "--mount-proc",
        "sh",
        "-ec",
        script,
    ]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen(["setpriv", "--pdeathsig", "KILL", *unshare], **pipes) as process:
        try:
            assert process.stdout.readline() == "up\n", process.stderr.read()
            yield process
        finally:
            process.kill()


def _enter(pid, namespaces=NAMESPACES):
    return ["nsenter", "--target", pid, *namespaces]


def _child(pid):
    """The process id of the only child of a process, as a string."""
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0]
