"""Scripts run as users run them: in a process of their own, from the repository's root."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from utils import InputError

ROOT = Path(__file__).resolve().parents[2]


def environment(**changes):
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": "", **changes}


def cli(script, *arguments, **changes):
    """Run `python script arguments` from the repository's root; gives returncode, stdout, stderr."""
    command = [sys.executable, script, *map(str, arguments)]
    return subprocess.run(
        command, cwd=ROOT, env=environment(**changes), capture_output=True, text=True, timeout=300
    )


def clis(*commands):
    """Several `cli` calls, two at a time (most of a short call is imports)."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda command: cli(*command), commands))


def start(script, *arguments, **options):
    """The same, not waited for; options of Popen."""
    command = [sys.executable, script, *map(str, arguments)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, cwd=ROOT, env=environment(), **pipes, **options)


def one_error(result):
    """The line of a call that failed on bad input: exit status 2, one line on stderr and nothing else there."""
    assert result.returncode == 2, (
        f"exit status {result.returncode}\n{result.stdout}\n{result.stderr}"
    )
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    return lines[0]


def error_after_progress(result):
    """The same for a failure in the middle of work, when a progress bar has been drawn: the error is the last line."""
    assert result.returncode == 2, (
        f"exit status {result.returncode}\n{result.stdout}\n{result.stderr}"
    )
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    others = [
        line for line in lines[:-1] if "%|" not in line and "it/s" not in line and "/s]" not in line
    ]
    assert lines[-1].startswith("error: ") and not others, result.stderr
    return lines[-1]


def refused(main, *arguments):
    """The one-line message of the InputError that a script's `main` raises on these arguments, in this process."""
    with pytest.raises(InputError) as caught:
        main([str(argument) for argument in arguments])
    message = str(caught.value)
    assert message and len(message.splitlines()) == 1, message
    return message
