"""Run scripts as users do, in a process of their own; or call their `main` in this process."""

import contextlib
import io
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import pytest

from utils import InputError

ROOT = Path(__file__).resolve().parents[2]


def environment(**changes):
    """This process's environment, with one thread and no PYTHONPATH, and with `changes`."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": "", **changes}


def cli(script, *arguments, **changes):
    """Run `python script arguments` from the root; gives returncode, stdout, stderr."""
    command = [sys.executable, script, *map(str, arguments)]
    return subprocess.run(
        command, cwd=ROOT, env=environment(**changes), capture_output=True, text=True, timeout=300
    )


def clis(*commands):
    """Several `cli` calls, two at a time."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda command: cli(*command), commands))


def python(code, *arguments, **changes):
    """Run `python -c code arguments` from the root, like `cli`."""
    return cli("-c", code, *arguments, **changes)


def start(script, *arguments, **options):
    """Start a script and return its Popen at once; `options` are those of Popen."""
    command = [sys.executable, script, *map(str, arguments)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, cwd=ROOT, env=environment(), **pipes, **options)


def one_error(result):
    """The message of a call that failed on bad input: status 2, and one line alone on stderr."""
    assert result.returncode == 2, report(result)
    lines = stderr_lines(result)
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    return lines[0]


def error_after_progress(result):
    """The message of a call that failed while it worked: only progress bars stand before it."""
    assert result.returncode == 2, report(result)
    *before, last = stderr_lines(result)
    others = [line for line in before if not is_progress(line)]
    assert last.startswith("error: ") and not others, result.stderr
    return last


def is_progress(line):
    return any(mark in line for mark in ("%|", "it/s", "/s]"))


def stderr_lines(result):
    return [line for line in result.stderr.splitlines() if line.strip()]


def report(result):
    return f"exit status {result.returncode}\n{result.stdout}\n{result.stderr}"


def refused(main, *arguments):
    """The one-line message of the InputError that a script's `main` raises, in this process."""
    with pytest.raises(InputError) as caught:
        main([str(argument) for argument in arguments])
    message = str(caught.value)
    assert message and len(message.splitlines()) == 1, message
    return message


def call(main, *arguments):
    """Call a script's `main` in this process; gives returncode, stdout, stderr, as `cli` does."""
    arguments = [str(argument) for argument in arguments]
    script = Path(main.__code__.co_filename).name
    stdout, stderr = io.StringIO(), io.StringIO()
    with (
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
        mock.patch.object(sys, "argv", [script, *arguments]),  # results record the command
    ):
        status = main(arguments) or 0
    return subprocess.CompletedProcess(arguments, status, stdout.getvalue(), stderr.getvalue())
