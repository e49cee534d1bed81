"""Owners are told from later processes of their number; children end with their parent."""

import os
import signal
import subprocess
import sys
import time

import pytest
from helpers.commands import ROOT, start
from helpers.systems import has_ended

from processes import Owner


def test_owner_reads_back_from_its_text():
    owner = Owner.current()
    assert Owner.parse(str(owner)) == owner and owner.pid == os.getpid()
    with pytest.raises(ValueError):
        Owner.parse("12345678")


def test_owner_is_dead_once_its_process_ended_or_another_has_its_number():
    process = start(
        "-c",
        "from processes import Owner; print(Owner.current(), flush=True); input()",
        stdin=subprocess.PIPE,
    )
    owner = Owner.parse(process.stdout.readline().strip())
    assert owner.pid == process.pid and not owner.is_dead
    assert owner._replace(start=owner.start - 1).is_dead  # an earlier process of this number
    assert not owner._replace(machine="0" * 8, start=1).is_dead  # nobody here can tell
    process.kill()
    time.sleep(0.1)
    assert owner.is_dead  # a zombie
    process.communicate()
    assert owner.is_dead


PARENT = """
import subprocess, sys, time
from processes import child_environment
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], env=child_environment())
time.sleep(60)
"""
CHILD = """
import os, time
from processes import end_with_starter
end_with_starter()
assert "TCA_PARENT" not in os.environ
print(os.getpid(), flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_child_ends_with_a_parent_that_is_killed(number):
    parent = start("-c", PARENT, CHILD)
    child = int(parent.stdout.readline())
    parent.send_signal(number)
    assert has_ended(child, 1)
    parent.communicate()


def test_child_ends_at_once_if_its_parent_has_ended_before():
    code = "from processes import end_with_starter; end_with_starter(); print('goes on')"
    process = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "TCA_PARENT": "1"},
        capture_output=True,
    )
    assert process.returncode == 1 and not process.stdout
