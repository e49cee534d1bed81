"""Reproduce the paper's tables: published figures beside measured ones.

    # every command of every row, to be run alone if you like
    python reproduce.py --table bank --data features --dry_run

    # run what the features at hand allow
    python reproduce.py --table all --data features --set FIVR-5K

    # how long that takes, by a few measured steps
    python reproduce.py --table all --data features --set FIVR-5K --estimate

    # on the demo's film (`make tables`)
    python reproduce.py --table all --data runs/tables --set DEMO --seeds 3

A row is a train.py command for each seed, and an evaluation.py command. datasets/paper_tables.toml
has the rows, their flags, and what was published.

--data is a folder with one folder for each kind of features (l3_imac, imac, l3_imac_full). In it
are train.hdf5 (VCDB's videos) and SET.hdf5 for each evaluation set. What is missing is printed
first, with the rows that cannot run without it. A finished row is kept. A failed row reports its
error, the others run, and the exit status is 3. Where no row can run, nothing is written and the
exit status is 2.
"""

import contextlib
import json
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from types import NoneType

from tqdm import tqdm

import training_log
from datasets.evaluation_set import missing_note, videos_with_features
from datasets.paper_tables import TABLES, Need, Row, plan, read_tables, select_tables
from datasets.registry import (
    ANNOTATION_DIR,
    EVALUATION_SETS,
    SEGMENT_SETS,
    load_evaluation_set,
    load_segment_set,
)
from distributed import default_device, run_main
from features.store import FeatureStore
from files import Lock, atomic, write_json
from model import ENCODERS, load_encoder
from processes import child_environment
from retrieval.comparator import load_comparator
from retrieval.compare import Comparison
from retrieval.encode import VideoEncoder
from retrieval.report import format_mean_std
from retrieval.segments import locate_segments
from untrusted import is_object, read_json
from utils import InputError, Parser, check_ranges, provenance

ROOT = Path(__file__).resolve().parent
SPEED = "ms_per_query"  # time for comparing, without encoding
DAGGER = (
    "† unverified transcription: believed to stand in the paper, not seen in a stored copy of it."
)

# What --estimate measures.
STEPS = 3  # after the first, which is slower
QUERIES, VIDEOS, PAIRS = 3, 200, 50


def main(argv=None):
    args = parse_args(argv)
    tables = read_tables(args.tables)
    plans = {name: plan(tables, name, args) for name in select_tables(args.table, tables)}
    for problem, ruled_out in find_problems(plans).items():
        print(f"{problem}; rules out {', '.join(ruled_out)}", file=sys.stderr)
    every_row = [row for rows in plans.values() for row in rows]

    if args.dry_run:
        print_commands(plans)
        return 0
    if not any(row.can_run for row in every_row):
        raise InputError(
            f"no row can run; put what is missing into --data {str(args.data)!r} and"
            f" --annotation_dir {str(args.annotation_dir)!r}"
        )
    if args.estimate:
        seconds = estimate(every_row)
        seconds["all, one after another"] = sum(seconds.values())
        for what, value in seconds.items():
            print(f"{timedelta(seconds=round(value))}  {what}")
        return 0

    with Lock(args.output, folder=True):
        execute(every_row, args.jobs)
        for name, rows in plans.items():
            print(write_table(name, tables["tables"][name], rows, args))
    return 3 if any(row.status.startswith("failed") for row in every_row) else 0


def print_commands(plans):
    for name, rows in plans.items():
        for row in rows:
            print(f"# {name}: {row.name}" + ("" if row.evaluate else " (quoted)"))
            for command in row.commands:
                print(f"python {shlex.join(command)}")
            print()


# --- running ------------------------------------------------------------------------------------


def find_problems(plans: Mapping[str, Sequence[Row]]) -> dict[str, list[str]]:
    """What is missing or wrong; sets the status of the rows that it rules out.

    Returns:
        {problem: ["table" or, if it rules out some rows only, "table (row; row)"]}
    """
    problems = {}
    for table, rows in plans.items():
        ruled_out = {}  # {problem: names of this table's rows}
        for row in rows:
            of_row = list(filter(None, map(problem_of, row.needs)))
            for problem in of_row:
                ruled_out.setdefault(problem, []).append(row.name)
            if of_row:
                row.status = f"not run: {'; '.join(of_row)}"
        count = sum(bool(row.evaluate) for row in rows)  # the others are quoted
        for problem, names in ruled_out.items():
            some = f"{table} ({'; '.join(names)})"
            problems.setdefault(problem, []).append(table if len(names) == count else some)
    return problems


def problem_of(need: Need) -> str:
    """What is wrong with a file, or ""."""
    if not need.path.exists():
        return f"{need.what} ({need.path}) missing"
    if need.feature_size is None:
        return ""
    try:
        size = FeatureStore(need.path).feature_size
    except InputError as error:
        return str(error)
    if size != need.feature_size:
        return f"{need.what} ({need.path}) have width {size}, not {need.feature_size}"
    return ""


def execute(rows: Iterable[Row], jobs: int = 1) -> None:
    """Train and evaluate the rows that can run, `jobs` commands at a time; fills the rows in."""
    todo = [row for row in rows if row.can_run and not read_results(row)]
    errors = run_all([command for row in todo for command in row.train], jobs, "train")
    for row in todo:
        failed = [errors[tuple(command)] for command in row.train if errors[tuple(command)]]
        row.status = f"failed: {failed[0]}" if failed else ""
    trained = [row for row in todo if not row.status]
    errors = run_all([row.evaluate for row in trained], jobs, "evaluate")
    for row in trained:
        error = errors[tuple(row.evaluate)]
        if error:
            row.status = f"failed: {error}"
        else:
            read_results(row)


def run_all(commands, jobs, name):
    """Run each different command once. Returns {command as a tuple: its error, or None}."""
    commands = list(dict.fromkeys(map(tuple, commands)))
    with tqdm(total=len(commands), desc=name, unit="run") as bar, ThreadPoolExecutor(jobs) as pool:

        def run(command):
            error = run_script(command)
            bar.update()
            return error

        return dict(zip(commands, pool.map(run, commands), strict=True))


def run_script(command):
    """Run one of our scripts, with its output hidden. Returns its error line, or None."""
    environment = child_environment()  # it ends with this process
    done = subprocess.run(script(command), capture_output=True, text=True, env=environment)
    return error_line(command, done.returncode, done.stderr) if done.returncode else None


def script(command):
    return [sys.executable, str(ROOT / command[0]), *command[1:]]


def error_line(command, status, stderr):
    """The last line of a script that failed, with the script's name."""
    lines = stderr.strip().splitlines() or [f"exit status {status}"]
    return f"{command[0]}: {lines[-1].removeprefix('error: ')}"


def read_results(row: Row) -> bool:
    """Fill a row in from its results file; false if that is absent, older, or not the row's."""
    try:
        record = read_json(row.results, "results file")
    except (OSError, InputError):
        return False
    newest = max(need.path.stat().st_mtime for need in row.needs)
    if not is_object(record) or record.get("command") != " ".join(row.evaluate):
        return False
    if newest > row.results.stat().st_mtime:
        return False
    try:
        models = list(record.get("models_of_rows", {}).values())  # older files lack it
        if models and len(models[-1]) < len(row.runs):
            row.status = (
                f"failed: {row.results} has several rows of models, so its runs were not trained"
                " alike; remove their folders"
            )
            return False
        row.measured = metrics_and_speed(record)
        row.missing = missing_note(record["coverage"])
        row.revision = str(record["revision"])
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError):
        return False  # edited since
    row.status = "finished"
    return True


def metrics_and_speed(record):
    """[{name: value}, one for each model] of the last row in evaluation.py's --output.

    That row is the metric that was given, or its two-stage search.
    """
    row = list(record["figures"])[-1]
    per_model = record["figures"][row]
    if not all(is_object(metrics, int, float, NoneType) for metrics in per_model):
        raise TypeError("a metric is not a number")
    if "queries" not in record["coverage"]:  # a set of segments
        return per_model
    queries = record["coverage"]["queries"]
    with_speed = []
    for metrics, seconds in zip(per_model, record["compare_seconds"][row], strict=True):
        with_speed.append(metrics | {SPEED: 1000 * seconds / queries})
    return with_speed


# --- how long it will take ----------------------------------------------------------------------


def estimate(rows: Iterable[Row]) -> dict[str, float]:
    """{what: seconds} of each training (all seeds) and each row's evaluation, not yet done.

    The trainings run for a few steps on --device, into a temporary folder. The evaluations use the
    encoders that these leave, on a few queries and videos.
    """
    seconds = {}
    with tempfile.TemporaryDirectory(prefix="reproduce-") as folder:
        for row in rows:
            if not row.can_run or read_results(row):
                continue
            run = None
            if row.train:
                run = Path(folder) / row.runs[0].parent.name
                training = f"train {run.name}"
                if training not in seconds:  # rows of equal flags share their runs
                    seconds[training] = len(row.train) * training_seconds(row.train[0], run)
            models = max(len(row.train), 1)
            seconds[f"evaluate {row.name}"] = models * evaluation_seconds(row, run)
    return seconds


def training_seconds(command: Sequence[str], run: Path) -> float:
    """Seconds that a train.py command takes, from its first steps, run in the folder `run`."""
    run.mkdir(parents=True)
    command = [*command, "--model_path", str(run), "--print-freq", "1"]  # the last of a flag wins
    with open(run / "stderr", "w+", encoding="utf-8") as stderr:
        process = subprocess.Popen(
            script(command), stdout=subprocess.DEVNULL, stderr=stderr, env=child_environment()
        )
        try:
            while process.poll() is None and len(videos_per_second(run)) <= STEPS:
                time.sleep(0.1)
        finally:
            process.terminate()  # train.py writes a checkpoint and ends
            status = process.wait()
        if status not in (0, 128 + signal.SIGTERM, -signal.SIGTERM):
            stderr.seek(0)
            raise InputError(error_line(command, status, stderr.read()))

    rates = videos_per_second(run)
    rates = rates[1:] or rates  # the first step is slower
    settings = json.loads((run / "args.json").read_text(encoding="utf-8"))
    # A pair is an anchor, a positive and its negatives.
    videos = settings["arguments"]["batch_sz"] * (2 + settings["arguments"]["neg_num"])
    step_seconds = [videos / rate for rate in rates]
    return settings["steps"] * sum(step_seconds) / len(step_seconds)


def videos_per_second(run):
    """The speed of each step that a run has logged so far."""
    try:
        lines = training_log.read_log(run)
    except InputError:  # nothing is logged yet
        return []
    return [line["videos_per_s"] for line in lines if "videos_per_s" in line]


def evaluation_seconds(row: Row, run: Path | None) -> float:
    """Seconds that encoding and comparing take for one model of a row.

    run: the folder of the row's measured training; None if the features are not trained
    """
    flags = evaluation_flags(row.evaluate)
    store = FeatureStore(flags.feature_path)
    if run is None:
        encoder = ENCODERS["mean"](store.feature_size)
    else:
        finished = (run / "model.pth").exists()  # its run was shorter than what is measured
        _, encoder, _ = load_encoder(run / ("model.pth" if finished else "checkpoint.pth"))
    if flags.dataset in SEGMENT_SETS:
        return alignment_seconds(flags, encoder, store)
    evaluation_set = load_evaluation_set(flags.dataset, flags.annotation_dir, store)
    queries, database = videos_with_features(evaluation_set, store)
    comparator = load_comparator(flags.comparator) if flags.comparator else None
    few = queries[:QUERIES]
    some = database[:: max(len(database) // VIDEOS, 1)]

    start = time.perf_counter()
    video_encoder = VideoEncoder(encoder, store, device=flags.device)
    comparison = Comparison(video_encoder, few, some, flags.metric, comparator=comparator)
    comparison.tables(flags.metric)
    encoding = time.perf_counter() - start - comparison.seconds

    # Scale up to the whole set: encoding by videos, comparing by pairs.
    encoding *= (len(queries) + len(database)) / (len(few) + len(some))
    compared = len(database)  # videos that a query is compared with
    if len(flags.rerank) == 1:
        compared = min(flags.rerank[0], compared)
    comparing = comparison.seconds * len(queries) * compared / (len(few) * len(some))
    return encoding + comparing


def alignment_seconds(flags, encoder, store):
    """Seconds that a set of segments takes, from a few of its pairs."""
    pairs = load_segment_set(flags.dataset, flags.annotation_dir).pairs_of(store)
    some = pairs[:: max(len(pairs) // PAIRS, 1)]
    start = time.perf_counter()
    locate_segments(VideoEncoder(encoder, store, 0, flags.device), some, flags.metric)
    return (time.perf_counter() - start) * len(pairs) / max(len(some), 1)


def evaluation_flags(command):
    """Those flags of a row's evaluation.py command that decide how long it takes."""
    parser = Parser()
    for flag in ("dataset", "annotation_dir", "feature_path", "comparator", "device"):
        parser.add_argument(f"--{flag}")
    parser.add_argument("--metric", nargs="+")
    parser.add_argument("--rerank", nargs="+", type=int, default=[])
    flags, _ = parser.parse_known_args(command[1:])
    return flags


# --- the tables ---------------------------------------------------------------------------------


def write_table(name: str, table: dict, rows: Sequence[Row], args) -> str:
    """Write NAME.md, NAME.json, and NAME.png, the curves of each row's first seed.

    Returns the Markdown.
    """
    measured_on = args.set or table["set"]
    facts = provenance()
    text = markdown_table(table, measured_on, rows)
    revisions = ", ".join(sorted({row.revision for row in rows if row.revision})) or "none"
    seeds = f"{args.seeds} seeds" if args.seeds > 1 else "1 seed"
    text += f"\n{seeds}; measured at revision {revisions}; {facts['machine']}.\n\n"
    for row in rows:
        for command in [*row.train[:1], row.evaluate]:
            if command:
                text += f"    python {shlex.join(command)}\n"
    logs = read_logs(rows)
    if logs:
        text += f"\n![curves]({name}.png)\n"
        with atomic(args.output / f"{name}.png") as temporary:
            training_log.draw_curves(logs).savefig(temporary, dpi=100)
    with atomic(args.output / f"{name}.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    record = {
        "table": name,
        "published_on": table["set"],
        "measured_on": measured_on,
        "seeds": args.seeds,
        "rows": [row_record(row) for row in rows],
        **facts,
    }
    write_json(args.output / f"{name}.json", record)
    return text


def markdown_table(table: dict, measured_on: str, rows: Sequence[Row]) -> str:
    """Published values in one cell, measured ones (mean ± sample deviation) in another."""
    published = list(dict.fromkeys(name for row in rows for name in row.published))
    measured = [table["column"]] if "column" in table else measured_names(rows)
    lines = [
        f"### {table['title']}",
        "",
        f"| | published, {table['set']}: {' / '.join(published) or 'none'}"
        f" | measured, {measured_on}: {' / '.join(measured) or 'none'} | |",
        "|---|---|---|---|",
    ]
    notes = []
    for row in rows:
        mark = ""
        if row.note:
            notes.append(row.note)
            mark = f" [{len(notes)}]"
        values = [row.published[name] for name in published if name in row.published]
        old = " / ".join(f"{value:.3f}".lstrip("0") for value in values)
        new = ""
        if row.measured:
            cells = [format_mean_std([one[name] for one in row.measured]) for name in measured]
            new = " / ".join(cells)
        dagger = "†" if row.unverified else ""
        state = row.missing if row.status in ("quoted", "finished") else row.status
        lines.append(f"| {row.name}{mark} | {old}{dagger} | {new} | {state} |")
    lines.append("")
    for number, note in enumerate(notes, 1):
        lines.append(f"[{number}] {note}.  ")
    if any(row.unverified for row in rows):
        lines.append(DAGGER)
    return "\n".join([*lines, f"Published figures: {rows[0].source}.", ""])


def measured_names(rows):
    names = {}
    for row in rows:
        for one in row.measured:
            names.update(dict.fromkeys(one))
    return [name for name in names if name != SPEED]


def read_logs(rows):
    """{row: series} of each measured row's first run, if its log has lines."""
    logs = {}
    for row in rows:
        if row.runs and row.measured:
            with contextlib.suppress(InputError):  # a run shorter than --print-freq steps
                logs[row.name] = training_log.series(training_log.read_log(row.runs[0]))
    return logs


def row_record(row):
    """A row for JSON."""
    return {
        "name": row.name,
        "status": row.status,
        "published": row.published,
        "unverified": row.unverified,
        "source": row.source,
        "note": row.note,
        "missing": row.missing,
        "revision": row.revision,
        "measured": row.measured,
        "commands": [shlex.join(command) for command in row.commands],
    }


# --- arguments ----------------------------------------------------------------------------------


def parse_args(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add(
        "--table",
        nargs="+",
        default=["all"],
        metavar="TABLE",
        help="one or more of the tables file's, or all (default all)",
    )
    add(
        "--tables",
        default=TABLES,
        help="file of rows, flags and published figures (default datasets/paper_tables.toml)",
    )
    add("--data", type=Path, required=True, help="folder with a folder for each kind of features")
    add(
        "--set",
        choices=EVALUATION_SETS,
        help="evaluate on this set (default: each table's own)",
    )
    add("--seeds", type=int, default=3, help="runs of each training (default 3)")
    add(
        "--annotation_dir",
        default=ANNOTATION_DIR,
        help="folder of the annotation files (default %(default)s)",
    )
    add(
        "--output",
        type=Path,
        default=Path("results/paper"),
        help="folder of runs, results and tables (default %(default)s)",
    )
    add(
        "--device",
        default=default_device(),
        help="for the commands' --device: a GPU if there is one (default %(default)s)",
    )
    add(
        "--jobs",
        type=int,
        default=1,
        help="commands at a time; with several, set OMP_NUM_THREADS (default 1)",
    )
    add("--estimate", action="store_true", help="measure a few steps, and print how long all takes")
    add("--dry_run", action="store_true", help="print every command and what is missing")
    args = parser.parse_args(argv)
    check_ranges(args, {"seeds": (1, 1000), "jobs": (1, 1000)})
    return args


if __name__ == "__main__":
    run_main(main)
