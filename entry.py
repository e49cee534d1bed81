"""How a script starts and ends: its streams, its exit status, its errors as one line.

Nothing heavy is imported here: a script that answers at once need not load PyTorch.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

from processes import end_with_starter
from utils import InputError, one_line


def run_main(main: Callable[[], int | None]) -> NoReturn:
    """Call a script's `main` and exit with its status.

    Errors of the user are one line on stderr, without a traceback. The exit status is

        main's own, if it returns
        2    InputError or OSError
        130  Ctrl-C
        141  nobody reads our output any more, as in `script | head -1`
    """
    end_with_starter()
    open_standard_streams()
    sys.exit(call_main(main))


def open_standard_streams() -> None:
    """Let a process write to its streams, whatever they are.

    Closed ones (`>&-`) lead nowhere. Otherwise the next file that is opened takes their number, and
    what a library prints goes into it. Text that the encoding lacks is shown as escapes.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            nowhere = os.open(os.devnull, os.O_RDWR)  # the lowest number that is free: this one
            if nowhere != number:
                os.dup2(nowhere, number)
                os.close(nowhere)
        if getattr(sys, name) is None:  # Python found it closed
            setattr(sys, name, open(os.devnull, "r+", encoding="utf-8"))
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")


def call_main(
    main: Callable[[], int | None], report: Callable[[Exception | str], None] | None = None
) -> int | None:
    """Call `main` and return the exit status; `report` prints an error, as `print_error` does."""
    report = report or print_error
    try:
        status = main()
        sys.stdout.flush()  # may raise BrokenPipeError
        return status
    except SystemExit as stop:  # argparse's --help, exit_together_on_error
        if stop.code is None or isinstance(stop.code, int):
            return stop.code
        report(str(stop.code))  # sys.exit("a text") means: print it, status 1
        return 1
    except BrokenPipeError:
        _discard_output()
        return 128 + signal.SIGPIPE
    except (InputError, OSError) as error:  # OSError: no permission, a full disk, ...
        report(error)
        with contextlib.suppress(AttributeError):
            try:
                sys.stdout.flush()
            except OSError:  # a full disk: the flush at exit would raise again
                _discard_output()
        return 2
    except KeyboardInterrupt:
        report("interrupted")
        return 130


def _discard_output():
    """Let what is still buffered go nowhere, or the flush at exit would raise again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def print_error(error: Exception | str, prefix: str = "") -> None:
    """Print an error, or a notice, as one line on stderr; `prefix` says whose it is."""
    # The message of a data-loading worker comes at the end of that worker's traceback.
    message = str(error).rpartition("InputError: ")[2]
    line = prefix + " ".join(message.strip().splitlines())
    if isinstance(error, Exception):
        line = f"error: {line}"
    with contextlib.suppress(OSError):  # nobody reads it
        sys.stderr.write(f"{one_line(line)}\n")  # one write: launchers cut between two
        sys.stderr.flush()
