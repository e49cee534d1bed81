"""Damaged files for every reader, each read under a limit of memory and of time: `make fuzz`.

    export PYTHONPATH=pre-processing
    python tests/fuzz.py --minutes 60 --output runs/fuzz.json
    python tests/fuzz.py --reader index --seed 17      # one input again, with its traceback

An input is a number: it decides the damage. A child process reads one input after another. A
failure is an exception other than InputError and OSError, a crash, or an input that takes longer
than LIMIT seconds; the report lists their numbers. Exit status 1 if there is a failure.
"""

import argparse
import contextlib
import json
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
from helpers.readers import READERS, Damaged

from distributed import run_main
from files import write_json

LIMIT = 20  # seconds an input may take
MEMORY = 4 << 30  # bytes of address space beyond what the child has when it starts
TURN = 200  # inputs of one reader in a row


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--reader", choices=READERS, help="this reader only")
    parser.add_argument("--seed", type=int, help="this input only; needs --reader")
    parser.add_argument("--start", type=int, default=0, help="the first input's number")
    parser.add_argument("--output", type=Path, help="write the counts as JSON")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if args.seed is not None:
        with tempfile.TemporaryDirectory() as folder:
            print(Damaged(args.reader, Path(folder)).try_seed(args.seed) or "read")
        return 0
    names = [args.reader] if args.reader else list(READERS)
    counts = fuzz(names, 60 * args.minutes, args.start)
    print_counts(counts)
    if args.output:
        write_json(args.output, counts)
    return 1 if any(count["failures"] for count in counts.values()) else 0


def fuzz(names, seconds, start):
    """{reader: counts} of so many seconds; readers take turns."""
    counts = {}
    for name in names:
        counts[name] = {"inputs": 0, "refused": 0, "crashes": 0, "hangs": 0, "tracebacks": 0}
        counts[name] |= {"peak_mb": 0, "slowest_s": 0.0, "failures": []}
    end, next_seed = time.monotonic() + seconds, dict.fromkeys(names, start)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        while time.monotonic() < end:
            for name in names:
                last = next_seed[name] + TURN
                stop = min(end, time.monotonic() + seconds / len(names) / 2 + 5)
                while next_seed[name] < last and time.monotonic() < stop:
                    next_seed[name] = run_child(
                        name, next_seed[name], last, stop, Path(folder), counts[name]
                    )
    return counts


def run_child(name, seed, last, stop, folder, count):
    """Let a child read inputs of a reader until it ends; the number of the next one."""
    shutil.rmtree(folder / name, ignore_errors=True)
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        serve(name, range(seed, last), stop, folder / name, os.fdopen(writing, "w"))
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as lines:
        for line in lines:
            result = json.loads(line)
            seed = result["seed"] + 1
            count["inputs"] += 1
            count["refused"] += result["refused"]
            count["peak_mb"] = max(count["peak_mb"], result["mb"])
            count["slowest_s"] = max(count["slowest_s"], result["seconds"])
            if result["traceback"]:
                count["tracebacks"] += 1
                count["failures"].append([result["seed"], result["traceback"]])
    _, status = os.waitpid(child, 0)
    if status:
        kind = "hangs" if os.WTERMSIG(status) == signal.SIGALRM else "crashes"
        count["inputs"] += 1
        count[kind] += 1
        count["failures"].append([seed, f"{kind}: status {status}"])
        seed += 1
    return seed


def serve(name, seeds, stop, folder, out):
    """Read inputs one after another; a line of JSON for each."""
    os.setsid()
    damaged = Damaged(name, folder)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what libraries print
    before = memory_mb("VmRSS")
    for seed in seeds:
        if time.monotonic() > stop:
            break
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        began, trace, refusal = time.monotonic(), "", ""
        signal.setitimer(signal.ITIMER_REAL, LIMIT)
        try:
            refusal = damaged.try_seed(seed)
        except BaseException:
            trace = traceback.format_exc()[-1500:]
        signal.setitimer(signal.ITIMER_REAL, 0)
        result = {"seed": seed, "refused": bool(refusal), "traceback": trace}
        result["mb"] = max(0, memory_mb("VmHWM") - before)
        result["seconds"] = round(time.monotonic() - began, 2)
        out.write(json.dumps(result) + "\n")
        out.flush()
    out.close()
    with contextlib.suppress(OSError):
        shutil.rmtree(folder)


def memory_mb(field):
    return int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) // 1024


def print_counts(counts):
    columns = ["inputs", "refused", "crashes", "hangs", "tracebacks", "peak_mb", "slowest_s"]
    print(f"{'':14}" + "".join(f"{column:>12}" for column in columns))
    for name, count in counts.items():
        print(f"{name:14}" + "".join(f"{count[column]:>12}" for column in columns))
    for name, count in counts.items():
        for seed, reason in count["failures"][:20]:
            print(f"\n{name} --seed {seed}: {reason}")


if __name__ == "__main__":
    run_main(main)
