"""What runs on a GPU: does it give what the CPU gives, and how fast is it? `make gpu` runs this.

    python benchmarks/gpu.py --output runs/gpu/gpu.json      # about ten minutes on one GPU
    python benchmarks/gpu.py --device cpu --small            # proves the script; no figures

It needs a source tree, PyTorch, and no network: features are made up, the film is the demo's. A
part whose packages are missing is skipped and named. Each part is a process of its own with a time
limit: if one fails, its error is recorded and the rest go on.

Checks compare the device with the CPU, to a tolerance that the table states. Measures compare our
way with the released code's, in one run: "busy" is the share of the time in which the GPU ran
kernels or copies (of the same work, profiled apart), "peak" what PyTorch's tensors took of its
memory. "computed" times are of a part, scaled to the whole.

Beside the JSON file a table is written, FILE.md, for benchmarks/README.md. Exit status: 0, or 1 if
a part failed or a check did not pass.
"""

import argparse
import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from distributed import default_device, run_main
from files import write_json
from utils import InputError, Parser, check_ranges, provenance


class Part(NamedTuple):
    """function: of a module of benchmarks/gpu_parts; seconds: its time limit."""

    title: str
    function: str
    seconds: int


# In this order: what must be right first, then what users wait for most.
PARTS = {
    "step": Part("checks", "checks.step", 60),
    "evaluation": Part("checks", "checks.evaluation", 60),
    "extraction": Part("checks", "checks.extraction", 60),
    "resume": Part("checks", "checks.resume", 90),
    "two_processes": Part("checks", "checks.two_processes", 90),
    "nccl": Part("checks", "checks.nccl", 90),
    "horovod": Part("checks", "checks.horovod", 90),
    "training_files": Part("training step", "training.files", 120),
    "training_released": Part("training step", "training.released", 90),
    "training_device": Part("training step", "training.device", 90),
    "training_tf32": Part("training step", "training.tf32", 90),
    "training_bfloat16": Part("training step", "training.bfloat16", 90),
    "training_host": Part("training step", "training.host", 90),
    "evaluation_released": Part("evaluation", "evaluation.released", 60),
    "evaluation_float32": Part("evaluation", "evaluation.float32", 90),
    "evaluation_tf32": Part("evaluation", "evaluation.tf32", 60),
    "evaluation_bfloat16": Part("evaluation", "evaluation.bfloat16", 60),
    "extraction_alone": Part("extraction", "extraction.alone", 60),
    "extraction_whole": Part("extraction", "extraction.whole", 90),
    "buckets": Part("buckets", "evaluation.buckets", 60),
    "training_compile": Part("training step", "training.compiled", 120),
}


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    device = "default: a GPU if there is one (%(default)s)"
    add("--device", choices=("cpu", "cuda"), default=default_device(), help=device)
    add("--small", action="store_true", help="tiny sizes, to prove the script on a CPU")
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="(default all)")
    add("--minutes", type=float, default=12.0, help="no part starts later (default %(default)s)")
    add("--output", default="runs/gpu/gpu.json", help="default %(default)s; the table beside it")
    add("--run", choices=PARTS, help=argparse.SUPPRESS)  # given to the process of a part
    add("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    check_ranges(args, {"minutes": (0.1, 1e4)})
    if args.device == "cpu" and not args.small:
        raise InputError(
            "there is no GPU to measure; --device cpu --small proves the script without one"
        )
    if Path(args.output).suffix != ".json":
        raise InputError(f"--output {args.output} must name a file with suffix .json")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    if args.run:
        run_part(args)
        return 0
    start, results = time.monotonic(), {}
    record = {"measured": args.device != "cpu", "small": args.small, **machine(args.device)}
    with tempfile.TemporaryDirectory() as folder:
        for name in args.parts:
            left = 60 * args.minutes - (time.monotonic() - start)
            began = time.monotonic()
            results[name] = start_part(name, args, Path(folder), left)
            print(
                f"{time.monotonic() - began:6.1f} s  {name}: {status_of(results[name])}", flush=True
            )
            # After each part: the time on such a machine may end before this script does.
            lines = table_lines(record, results)
            write_json(args.output, {**record, "parts": results, **provenance()})
            Path(args.output).with_suffix(".md").write_text("\n".join([*lines, ""]), "utf-8")
    print("\n".join(["", *lines]))
    return int(any(not passed(result) for result in results.values()))


# --- a part ---------------------------------------------------------------------------------------


def start_part(name: str, args: argparse.Namespace, folder: Path, left: float) -> dict:
    """Run a part in a process of its own; returns its result, or {"error" or "skipped": why}."""
    if left <= 0:
        return {"skipped": f"out of time (--minutes {args.minutes:g})"}
    result = folder / f"{name}.json"
    command = [sys.executable, __file__, "--run", name, "--device", args.device]
    command += ["--folder", str(folder), "--output", str(result)]
    command += ["--small"] if args.small else []
    # One GPU, which the launched processes of a part share.
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": first}
    seconds = min(PARTS[name].seconds * (5 if args.device == "cpu" else 1), left)
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=env, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"error": f"not done in {seconds:.0f} s"}
    finally:  # also at Ctrl-C
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # with the processes that it launched
        process.communicate()
    if result.exists():
        return json.loads(result.read_text(encoding="utf-8"))
    lines = output.decode(errors="replace").strip().splitlines()
    last = lines[-1] if lines else "it printed nothing"
    return {"error": f"its process ended with status {process.returncode}: {last[:300]}"}


def run_part(args: argparse.Namespace) -> None:
    """Call a part's function in this process, and write what it returns."""
    module, _, function = PARTS[args.run].function.partition(".")
    folder = args.folder / args.run
    folder.mkdir()
    args.shared, args.folder = args.folder, folder
    try:
        part = getattr(importlib.import_module(f"benchmarks.gpu_parts.{module}"), function)
        result = part(args)
    except ModuleNotFoundError as error:
        result = {"skipped": f"needs {error.name}, which is not installed"}
    except SystemExit as error:
        result = {"error": f"it ended with status {error.code}"}
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        result = {"error": f"{type(error).__name__}: {reason}"[:300]}
    write_json(args.output, result)


# --- what is printed ------------------------------------------------------------------------------


def passed(result: dict) -> bool:
    return "error" not in result and all(row["passes"] for row in result.get("checks", ()))


def status_of(result: dict) -> str:
    """A part's result in a few words."""
    if "error" in result:
        return f"FAILED: {result['error']}"
    if "skipped" in result:
        return f"skipped: {result['skipped']}"
    failed = [row["check"] for row in result.get("checks", ()) if not row["passes"]]
    return f"NOT EQUAL: {', '.join(failed)}" if failed else "done"


def machine(device: str) -> dict:
    """The GPU's name, its driver, and PyTorch's versions."""
    import torch

    versions = {"torch": torch.__version__, "cuda": torch.version.cuda or "none"}
    if device == "cpu":
        return {"gpu": "none", "driver": "none", **versions}
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, timeout=30).stdout
        driver = (driver.splitlines() or ["unknown"])[0].strip()
    except (OSError, subprocess.TimeoutExpired):
        driver = "unknown"
    return {"gpu": torch.cuda.get_device_name(device), "driver": driver, **versions}


def table_lines(record: dict, results: dict[str, dict]) -> list[str]:
    """The results as Markdown."""
    lines = []
    if record["measured"]:
        lines.append(
            f"On {record['gpu']}, driver {record['driver']}, PyTorch {record['torch']} with CUDA"
            f" {record['cuda']}."
        )
    else:
        lines.append("On a CPU, to prove the script. **No GPU was measured.**")
    lines += check_lines(results)
    for title in dict.fromkeys(part.title for part in PARTS.values()):
        lines += measure_lines(title, results)
    notes = []
    for name, result in results.items():
        notes += [f"- {name}: {note}" for note in result.get("notes", ())]
        if "error" in result or "skipped" in result:
            notes.append(f"- {name}: {status_of(result)}")
    return [*lines, "", *notes]


def check_lines(results: dict[str, dict]) -> list[str]:
    checks = [row for result in results.values() for row in result.get("checks", ())]
    if not checks:
        return []
    lines = ["", "| check | difference | tolerance | |", "|---|---|---|---|"]
    for row in checks:
        verdict = "equal" if row["passes"] else "**not equal**"
        difference = "NaN" if row["difference"] is None else f"{row['difference']:.1e}"
        lines.append(f"| {row['check']} | {difference} | {row['tolerance']:.0e} | {verdict} |")
    return lines


def measure_lines(title: str, results: dict[str, dict]) -> list[str]:
    """The rows of the parts of one title; each row's ratio is to the first row of its kind."""
    rows = []
    for name, result in results.items():
        if PARTS[name].title == title:
            rows += result.get("rows", ())
    if not rows:
        return []
    lines = ["", f"| {title} | seconds | ratio | busy | peak GiB |", "|---|---|---|---|---|"]
    first = {}
    for row in rows:
        what = row.get("what", "")
        seconds = row["seconds"]
        base = first.setdefault(what.partition(",")[0], seconds)
        shown = f"{seconds:.3g}{' (computed)' if row.get('computed') else ''}"
        busy = "" if row.get("busy") is None else f"{row['busy']:.0%}"
        peak = "" if row.get("peak_gib") is None else f"{row['peak_gib']:.2f}"
        label = f"{what}: {row['way']}" if what else row["way"]
        lines.append(f"| {label} | {shown} | {base / seconds:.1f} | {busy} | {peak} |")
    return lines


if __name__ == "__main__":
    run_main(main)
