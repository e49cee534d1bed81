"""Reproduce the paper's tables: published figures beside measured ones. A row is a train.py and an evaluation.py command.

    python reproduce.py --table bank --data features --dry_run             # every command of every row, each to be run alone
    python reproduce.py --table all --data features --set FIVR-5K          # run what the features at hand allow
    python reproduce.py --table all --data features --set FIVR-5K --estimate   # how long that takes, by a few measured steps
    python reproduce.py --table all --data runs/tables --set DEMO --seeds 3    # on the demo's film (`make tables`)

--data holds a folder for each kind of features (l3_imac, imac, l3_imac_full), with train.hdf5 (VCDB's videos) and SET.hdf5 for
each evaluation set. Rows, flags and published figures stand in datasets/paper_tables.toml. What is missing is named first,
with the rows that it rules out. A finished row is kept; a failed one says why, and the rest go on (exit status 3).
"""

import contextlib
import json
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

from tqdm import tqdm

import training_log
from datasets.evaluation_set import missing_note, videos_with_features
from datasets.registry import ANNOTATION_DIR, EVALUATION_SETS, load_evaluation_set
from distributed import run_main
from features.store import FeatureStore
from model import ENCODERS, load_encoder
from retrieval.comparator import load_comparator
from retrieval.compare import Comparison
from retrieval.encode import VideoEncoder
from retrieval.report import format_mean_std
from utils import (
    InputError,
    Parser,
    atomic,
    check_ranges,
    provenance,
    require_path,
    write_json,
)

HERE = Path(__file__).resolve().parent
TABLES = HERE / "datasets" / "paper_tables.toml"
SPEED = "ms_per_query"  # comparing, descriptors at hand
DAGGER = (
    "† unverified transcription: believed to stand in the paper, not seen in a stored copy of it."
)


@dataclass
class Row:
    """One row of a table: what was published, the commands that measure it, and what became of them."""

    name: str
    published: dict
    unverified: bool
    source: str
    note: str
    train: list = field(default_factory=list)  # one command a seed
    runs: list = field(default_factory=list)  # the folders that they fill
    evaluate: list = field(default_factory=list)
    needs: list = field(default_factory=list)  # (path, what it is, width or None)
    results: Path | None = None
    status: str = "quoted"  # quoted, finished, not run: ..., failed: ...
    measured: list = field(default_factory=list)  # {figure: value}, one a seed
    missing: str = ""  # what the figures lack of the set
    revision: str = ""  # of the code that measured


# --- from the data file to commands ----------------------------------------------------------------------------------------


def load(path=TABLES):
    """The data file: `tables` {name: table} and `settings` {paper, demo}."""
    try:
        return tomllib.loads(require_path(path, "tables file").read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"tables file {str(path)!r}: {error}") from None


def plan(tables, name, args):
    """The Rows of table `name` with the commands that run them on --set."""
    table = tables["tables"][name]
    setting = "demo" if args.set and args.set.startswith("DEMO") else "paper"
    return [_row(tables, table, name, entry, setting, args) for entry in table["rows"]]


def _row(tables, table, name, entry, setting, args):
    row = Row(
        entry["name"], entry.get("published", {}), entry.get("unverified", False), entry.get("source", table["source"]),
        entry.get("note", ""),
    )  # fmt: skip
    if "evaluate" not in entry:
        return row
    other = [
        f"here with {entry[key]}"
        for key in (f"{setting}_train", f"{setting}_evaluate")
        if key in entry
    ]
    row.note = "; ".join([*filter(None, [row.note]), *other])
    kind, chosen = entry.get("features", "l3_imac"), args.set or table["set"]
    width = tables["settings"][setting]["widths"][kind]
    features = _features(args.data / kind, chosen)
    row.needs.append((features, f"{kind} features of {chosen}", width))
    extra = entry.get("needs")
    if extra:
        row.needs.append((args.data / extra, extra, None))
    flags = shlex.split(_flags(entry, "evaluate", setting).format(needs=args.data / (extra or "")))
    if "train" in entry:
        _training(tables, row, entry, kind, width, setting, args)
        flags = ["--model_path", *row.runs, *flags]
    row.results = args.output / name / f"{_slug(entry['name'])}.json"
    row.evaluate = [
        "evaluation.py", "--dataset", chosen, "--annotation_dir", args.annotation_dir, "--feature_path", features, *flags,
        "--device", args.device, "--output", row.results,
    ]  # fmt: skip
    row.evaluate = [str(part) for part in row.evaluate]
    return row


def _training(tables, row, entry, kind, width, setting, args):
    """Add a row's training commands, one a seed. Rows of equal flags share their runs."""
    own = _flags(entry, "train", setting)
    annotation = Path(args.annotation_dir) / tables["settings"][setting]["annotation"]
    features = args.data / kind / "train.hdf5"
    row.needs += [
        (annotation, "the training pairs", None),
        (features, f"{kind} features of the training videos", width),
    ]
    row.runs = [
        args.output / "runs" / _slug(f"{kind} {own}") / f"seed{seed}" for seed in range(args.seeds)
    ]
    for seed, folder in enumerate(row.runs):
        command = ["train.py", "--annotation_path", annotation, "--feature_path", features, "--model_path", folder,
                   "--seed", seed, "--device", args.device]  # fmt: skip
        shared = tables["settings"][setting]["train"]
        row.train.append([*map(str, command), *shlex.split(shared), *shlex.split(own)])


def _flags(entry, script, setting):
    return entry.get(f"{setting}_{script}", entry[script])


def _features(folder, chosen):
    """A set's feature file; FIVR-200K's holds FIVR-5K's videos too."""
    whole = folder / "FIVR-200K.hdf5"
    return whole if chosen == "FIVR-5K" and whole.exists() else folder / f"{chosen}.hdf5"


def _slug(text):
    return re.sub(r"[^\w.=*]+", "_", text).strip("_")


# --- running -----------------------------------------------------------------------------------------------------------------


def check(rows):
    """Mark the rows that cannot run. Returns {what is missing or wrong: [row names]}."""
    problems = {}
    for row in rows:
        for path, what, width in row.needs:
            if problem := _problem(path, what, width):
                problems.setdefault(problem, []).append(row.name)
                row.status = (
                    f"{row.status}; {problem}"
                    if row.status.startswith("not run")
                    else f"not run: {problem}"
                )
    return problems


def _problem(path, what, width):
    if not Path(path).exists():
        return f"{what} ({path}) missing"
    if width:
        try:
            channels = FeatureStore(path).feature_size
        except InputError as error:
            return str(error)
        if channels != width:
            return f"{what} ({path}) have width {channels}, not {width}"
    return ""


def execute(rows, jobs=1):
    """Train and evaluate the rows that can run, `jobs` commands at a time; each Row's status and figures are filled in."""
    todo = [
        row
        for row in rows
        if row.evaluate and not row.status.startswith("not run") and not _kept(row)
    ]
    trainings = {
        tuple(command): None for row in todo for command in row.train
    }  # rows of equal flags train once
    with ThreadPoolExecutor(jobs) as pool:
        with tqdm(total=len(trainings), desc="train", unit="run") as bar:
            for command, error in zip(
                trainings, pool.map(lambda command: _call(command, bar), trainings), strict=True
            ):
                trainings[command] = error
        for row in todo:
            errors = list(filter(None, (trainings[tuple(command)] for command in row.train)))
            row.status = f"failed: {errors[0]}" if errors else ""
        todo = [row for row in todo if not row.status]
        with tqdm(total=len(todo), desc="evaluate", unit="row") as bar:
            for row, error in zip(
                todo, pool.map(lambda row: _call(row.evaluate, bar), todo), strict=True
            ):
                row.status = f"failed: {error}" if error else ""
                if not error:
                    _kept(row)


def _kept(row):
    """Whether the row's results are there, by this very command and from files as they are now; takes them."""
    try:
        found = json.loads(row.results.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    newest = max(Path(path).stat().st_mtime for path, _, _ in row.needs)
    if found.get("command") != " ".join(row.evaluate) or newest > row.results.stat().st_mtime:
        return False
    row.status, row.measured, row.missing = (
        "finished",
        _figures(found),
        missing_note(found["coverage"]),
    )
    row.revision = found["revision"]
    return True


def _figures(found):
    """[{figure: value}], one a model, of the last row of evaluation.py's --output: the measure asked for, or its two stages."""
    row = list(found["figures"])[-1]
    queries = found["coverage"]["queries"]
    milliseconds = [1000 * spent / queries for spent in found["compare_seconds"][row]]
    return [
        figures | {SPEED: spent}
        for figures, spent in zip(found["figures"][row], milliseconds, strict=True)
    ]


def _call(command, bar):
    """Run a script of ours; its error line, or None. Its own bars are kept out of ours."""
    done = subprocess.run(
        [sys.executable, str(HERE / command[0]), *command[1:]], capture_output=True, text=True
    )
    bar.update()
    return _last_line(command, done.stderr, done.returncode) if done.returncode else None


def _last_line(command, stderr, status):
    """What a script that failed says last, as one line that names the script."""
    lines = stderr.strip().splitlines() or [f"exit status {status}"]
    return f"{command[0]}: {lines[-1].removeprefix('error: ')}"


# --- how long it will take ------------------------------------------------------------------------------------------------

MEASURED_STEPS = 3  # after the first, which is slower
MEASURED_QUERIES, MEASURED_VIDEOS = 3, 200


def estimate(rows):
    """{what: seconds} of each training (all seeds) and each row's evaluation, from a few measured steps on --device."""
    able = [
        row
        for row in rows
        if row.evaluate and not row.status.startswith("not run") and not _kept(row)
    ]
    seconds = {}
    with tempfile.TemporaryDirectory(prefix="reproduce-") as folder:
        for row in able:
            run = None
            if row.train:
                run = Path(folder) / row.runs[0].parent.name
                training = f"train {run.name}"
                if training not in seconds:  # rows of equal flags share their runs
                    one = training_seconds(row.train[0], run)
                    seconds[training] = len(row.train) * one
            models = max(len(row.train), 1)
            seconds[f"evaluate {row.name}"] = models * evaluation_seconds(row, run)
    return seconds


def training_seconds(command, run):
    """Seconds that a train.py command takes, from its first steps in the folder `run`, which keeps their model.

    The log gives videos per second; a pair of a step brings an anchor, a positive and --neg_num negatives.
    """
    run.mkdir(parents=True)
    command = [
        *command,
        "--model_path",
        str(run),
        "--print-freq",
        "1",
    ]  # the last of two flags wins
    with open(run / "stderr", "w+", encoding="utf-8") as stderr:
        script = [sys.executable, str(HERE / command[0]), *command[1:]]
        process = subprocess.Popen(script, stdout=subprocess.DEVNULL, stderr=stderr)
        try:
            while process.poll() is None and len(_rates(run)) <= MEASURED_STEPS:
                time.sleep(0.1)
        finally:
            process.terminate()  # train.py then writes a checkpoint and ends
            status = process.wait()
        if status not in (0, 128 + signal.SIGTERM, -signal.SIGTERM):
            stderr.seek(0)
            raise InputError(_last_line(command, stderr.read(), status))
    rates = _rates(run)
    rates = rates[1:] or rates
    settings = json.loads((run / "args.json").read_text(encoding="utf-8"))
    videos = settings["arguments"]["batch_sz"] * (2 + settings["arguments"]["neg_num"])
    return settings["steps"] * videos * sum(1 / rate for rate in rates) / len(rates)


def _rates(run):
    """Videos per second of each step that a run has logged so far."""
    try:
        lines = training_log.read_log(run)
    except InputError:  # nothing logged yet
        return []
    return [line["videos_per_s"] for line in lines if "videos_per_s" in line]


def evaluation_seconds(row, run):
    """Seconds that encoding and comparing take for one model of a row, scaled up from a few queries and videos.

    run: the folder of the row's measured training, whose encoder is taken; None: the features are not trained.
    """
    flags = Parser()
    flags.add_argument("--metric", nargs="+")
    flags.add_argument("--rerank", nargs="+", type=int, default=[])
    flags.add_argument("--comparator")
    flags.add_argument("--dataset")
    flags.add_argument("--annotation_dir")
    flags.add_argument("--feature_path")
    flags.add_argument("--device")
    flags, _ = flags.parse_known_args(row.evaluate[1:])
    store = FeatureStore(flags.feature_path)
    queries, database = videos_with_features(
        load_evaluation_set(flags.dataset, flags.annotation_dir, store), store
    )
    if run is None:
        encoder = ENCODERS["mean"](store.feature_size)
    else:
        finished = (run / "model.pth").exists()  # in fewer steps than are measured
        _, encoder, _ = load_encoder(run / ("model.pth" if finished else "checkpoint.pth"))
    few = queries[:MEASURED_QUERIES]
    some = database[:: max(len(database) // MEASURED_VIDEOS, 1)]
    comparator = flags.comparator and load_comparator(flags.comparator)
    began = time.perf_counter()
    comparison = Comparison(
        VideoEncoder(encoder, store, device=flags.device),
        few,
        some,
        flags.metric,
        comparator=comparator,
    )
    comparison.tables(flags.metric)
    encoding = time.perf_counter() - began - comparison.seconds
    encoding *= (len(queries) + len(database)) / (len(few) + len(some))
    compared = len(database)  # videos that a query is compared with
    if len(flags.rerank) == 1:
        compared = min(flags.rerank[0], compared)
    comparing = comparison.seconds * len(queries) * compared / (len(few) * len(some))
    return encoding + comparing


# --- the tables --------------------------------------------------------------------------------------------------------------


def markdown(title, published_on, measured_on, rows, column=None):
    """The table as Markdown: published figures in one cell, measured ones (mean ± sample standard deviation) in another."""
    published = list(dict.fromkeys(key for row in rows for key in row.published))
    measured = (
        [column]
        if column
        else list(
            dict.fromkeys(
                key for row in rows for one in row.measured for key in one if key != SPEED
            )
        )
    )
    lines = [f"### {title}", "", f"| | published, {published_on}: {' / '.join(published) or 'none'} |"
             f" measured, {measured_on}: {' / '.join(measured) or 'none'} | |", "|---|---|---|---|"]  # fmt: skip
    notes = []
    for row in rows:
        dagger = "†" if row.unverified else ""
        old = " / ".join(
            f"{row.published[key]:.3f}".lstrip("0") for key in published if key in row.published
        )
        new = (
            " / ".join(format_mean_std([one[key] for one in row.measured]) for key in measured)
            if row.measured
            else ""
        )
        if row.note:
            notes.append(row.note)
        mark = f" [{len(notes)}]" if row.note else ""
        state = row.missing if row.status in ("quoted", "finished") else row.status
        lines.append(f"| {row.name}{mark} | {old}{dagger} | {new} | {state} |")
    lines += ["", *(f"[{number}] {note}.  " for number, note in enumerate(notes, 1))]
    if any(row.unverified for row in rows):
        lines.append(DAGGER)
    return "\n".join([*lines, f"Published figures: {rows[0].source}.", ""])


def write(name, table, rows, args):
    """NAME.md and NAME.json in --output, and NAME.png, the curves of each row's first seed. Returns the Markdown."""
    chosen = args.set or table["set"]
    text = markdown(table["title"], table["set"], chosen, rows, table.get("column"))
    facts = provenance()
    revisions = ", ".join(sorted({row.revision for row in rows if row.revision})) or "none"
    text += f"\n{args.seeds} seeds; measured at revision {revisions}; {facts['machine']}.\n\n"
    text += "".join(
        f"    python {shlex.join(command)}\n"
        for row in rows
        for command in [*row.train[:1], row.evaluate]
        if command
    )
    if logs := _logs(rows):
        text += f"\n![curves]({name}.png)\n"
        with atomic(args.output / f"{name}.png") as temporary:
            training_log.draw_curves(logs).savefig(temporary, dpi=100)
    with atomic(args.output / f"{name}.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    write_json(
        args.output / f"{name}.json",
        {"table": name, "published_on": table["set"], "measured_on": chosen, "seeds": args.seeds}
        | {"rows": [_as_json(row) for row in rows]}
        | facts,
    )
    return text


def _logs(rows):
    """{row: series} of each measured row's first run, where its log has lines."""
    found = {}
    for row in rows:
        if row.runs and row.measured:
            with contextlib.suppress(
                InputError
            ):  # a run of fewer steps than its log is written for
                found[row.name] = training_log.series(training_log.read_log(row.runs[0]))
    return found


def _as_json(row):
    commands = [shlex.join(command) for command in [*row.train, row.evaluate] if command]
    return {
        "name": row.name, "status": row.status, "published": row.published, "unverified": row.unverified,
        "source": row.source, "note": row.note, "missing": row.missing, "revision": row.revision, "measured": row.measured,
        "commands": commands,
    }  # fmt: skip


# --- the command -------------------------------------------------------------------------------------------------------------


def parse(argv=None):
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
    add(
        "--data",
        type=Path,
        required=True,
        help="folder of the features, a folder for each kind in it",
    )
    add(
        "--set",
        choices=EVALUATION_SETS,
        help="evaluate on this set; FIVR-5K is a day on one GPU (default: each table's own)",
    )
    add(
        "--seeds",
        type=int,
        default=3,
        help="runs of each training; the mean and spread are printed (default 3)",
    )
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
    add("--device", default="cpu", help="for the commands' --device (default cpu)")
    add(
        "--jobs",
        type=int,
        default=1,
        help="commands at a time; with several, set OMP_NUM_THREADS (default 1)",
    )
    add(
        "--estimate",
        action="store_true",
        help="measure a few steps of what is to be run, and say how long all will take",
    )
    add(
        "--dry_run",
        action="store_true",
        help="print every command of every row, and what is missing; run nothing",
    )
    args = parser.parse_args(argv)
    check_ranges(args, {"seeds": (1, 1000), "jobs": (1, 1000)})
    tables = load(args.tables)
    known = list(tables["tables"])
    if unknown := set(args.table) - {*known, "all"}:
        raise InputError(
            f"table {', '.join(sorted(unknown))!r} is not known; choose from {', '.join(known)}, all"
        )
    args.table = known if "all" in args.table else args.table
    return args, tables


def main():
    args, tables = parse()
    plans = {name: plan(tables, name, args) for name in args.table}
    for name, rows in plans.items():
        for problem, names in check(rows).items():
            print(f"{name}: {problem}; rules out {', '.join(names)}", file=sys.stderr)
    if args.dry_run:
        for name, rows in plans.items():
            for row in rows:
                print(f"# {name}: {row.name}" + ("" if row.evaluate else " (quoted)"))
                print(
                    "".join(
                        f"python {shlex.join(command)}\n"
                        for command in [*row.train, row.evaluate]
                        if command
                    )
                )
        return 0
    every = [row for rows in plans.values() for row in rows]
    if args.estimate:
        found = estimate(every)
        for what, seconds in {**found, "all, one after another": sum(found.values())}.items():
            print(f"{timedelta(seconds=round(seconds))}  {what}")
        return 0
    execute(every, args.jobs)
    for name, rows in plans.items():
        print(write(name, tables["tables"][name], rows, args))
    failed = [row for rows in plans.values() for row in rows if row.status.startswith("failed")]
    return 3 if failed else 0


if __name__ == "__main__":
    run_main(main)
