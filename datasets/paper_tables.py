"""The tables of the paper, row by row: what was published, and the commands that measure it.

`paper_tables.toml` has the rows and explains its keys. reproduce.py runs the commands.
"""

import re
import shlex
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from datasets.registry import SEGMENT_SETS
from untrusted import is_object, read_text, reading
from utils import InputError

TABLES = Path(__file__).resolve().parent / "paper_tables.toml"


class Need(NamedTuple):
    """A file that a row needs. feature_size: what it must have, None if it has no features."""

    path: Path
    what: str
    feature_size: int | None = None


@dataclass
class Row:
    """One row of a table: what was published, the commands that measure it, what they gave.

    status: "quoted" (nothing to run), "finished", "not run: ..." or "failed: ..."; "" in between
    measured: {name: value} of each seed
    missing: a note if much of the set is missing
    revision: of the code that measured
    """

    name: str
    published: dict[str, float]
    unverified: bool
    source: str
    note: str
    train: list[list[str]] = field(default_factory=list)  # a command for each seed
    runs: list[Path] = field(default_factory=list)  # their folders
    evaluate: list[str] = field(default_factory=list)
    results: Path | None = None  # what `evaluate` writes
    needs: list[Need] = field(default_factory=list)
    status: str = "quoted"
    measured: list[dict[str, float]] = field(default_factory=list)
    missing: str = ""
    revision: str = ""

    @property
    def can_run(self) -> bool:
        return bool(self.evaluate) and not self.status.startswith("not run")

    @property
    def commands(self) -> list[list[str]]:
        return [*self.train, self.evaluate] if self.evaluate else []


def read_tables(path: str | Path = TABLES) -> dict:
    """The tables file: "tables" {name: table} and "settings" {paper, demo}."""
    try:
        tables = tomllib.loads(read_text(path, "tables file"))
        _check_tables(tables)
        return tables
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"tables file {str(path)!r}: {type(error).__name__} {error}") from None


def _check_tables(tables):
    """Raise what is wrong with the types of the file's values."""
    kinds = {"name": str, "published": dict, "unverified": bool, "source": str, "note": str}
    kinds |= dict.fromkeys(("features", "evaluate", "needs", "train"), str)
    for table in tables["tables"].values():
        texts = [table["set"], table["source"]]
        for row in table["rows"]:
            texts.append(row["name"])
            for name, value in row.items():
                if not isinstance(value, kinds.get(name, str)):
                    raise TypeError(f"{name} {str(value)[:40]!r}")
            if not is_object(row.get("published", {}), int, float):
                raise TypeError(f"published {str(row['published'])[:40]!r}")
        if not all(isinstance(text, str) for text in texts):
            raise TypeError(f"{str(texts)[:60]!r}")
    for setting, settings in tables["settings"].items():
        if not isinstance(settings["annotation"] + settings["train"], str):
            raise TypeError(setting)
        if not all(isinstance(width, int) for width in settings["widths"].values()):
            raise TypeError(f"widths of {setting}")


def select_tables(names: Sequence[str], tables: dict) -> list[str]:
    """The names of --table, or all of them."""
    known = list(tables["tables"])
    unknown = set(names) - {*known, "all"}
    if unknown:
        raise InputError(
            f"table {', '.join(sorted(unknown))!r} is not known; choose from"
            f" {', '.join(known)}, all"
        )
    return known if "all" in names else list(names)


def plan(tables: dict, name: str, args) -> list[Row]:
    """The rows of table `name`, with the commands that run them on --set."""
    with reading(TABLES, "tables file", f"correct its table {name!r}"):
        return list(_plan_rows(tables, name, args))


def _plan_rows(tables, name, args) -> Iterator[Row]:
    table = tables["tables"][name]
    evaluated_on = args.set or table["set"]
    if table["set"] in SEGMENT_SETS and args.set:
        # A set of queries stands for its pairs, if it has them.
        pairs = f"{args.set}-SEGMENTS"
        evaluated_on = pairs if pairs in SEGMENT_SETS else table["set"]
    setting = "demo" if args.set and args.set.startswith("DEMO") else "paper"
    for entry in table["rows"]:
        row = Row(
            name=entry["name"],
            published=entry.get("published", {}),
            unverified=entry.get("unverified", False),
            source=entry.get("source", table["source"]),
            note=entry.get("note", ""),
        )
        if "evaluate" in entry:
            row.results = args.output / name / f"{slug(row.name)}.json"
            plan_row(row, entry, tables["settings"][setting], setting, evaluated_on, args)
        yield row


def plan_row(row, entry, settings, setting, evaluated_on, args):
    """Add the commands of a row, and the files that they need."""
    notes = [row.note] if row.note else []
    for key in (f"{setting}_train", f"{setting}_evaluate"):
        if key in entry:
            notes.append(f"here with {entry[key]}")
    row.note = "; ".join(notes)

    kind = entry.get("features", "l3_imac")
    feature_size = settings["widths"][kind]
    features = feature_file(args.data / kind, evaluated_on)
    row.needs.append(Need(features, f"{kind} features of {evaluated_on}", feature_size))
    flags = entry.get(f"{setting}_evaluate", entry["evaluate"])
    if "needs" in entry:
        path = args.data / entry["needs"]
        row.needs.append(Need(path, entry["needs"]))
        flags = flags.format(needs=path)
    if "train" in entry:
        train_flags = entry.get(f"{setting}_train", entry["train"])
        plan_training(row, kind, train_flags, settings, args)

    command = ["evaluation.py", "--dataset", evaluated_on, "--annotation_dir", args.annotation_dir]
    command += ["--feature_path", features]
    if row.runs:
        command += ["--model_path", *row.runs]
    command += [*shlex.split(flags), "--device", args.device, "--output", row.results]
    row.evaluate = [str(part) for part in command]


def plan_training(row, kind, flags, settings, args):
    """Add a training command for each seed. Rows of equal flags share their runs."""
    annotation = Path(args.annotation_dir) / settings["annotation"]
    features = args.data / kind / "train.hdf5"
    what = f"{kind} features of the training videos"
    row.needs.append(Need(annotation, "the training pairs"))
    row.needs.append(Need(features, what, settings["widths"][kind]))
    for seed in range(args.seeds):
        folder = args.output / "runs" / slug(f"{kind} {flags}") / f"seed{seed}"
        command = ["train.py", "--annotation_path", annotation, "--feature_path", features]
        command += ["--model_path", folder, "--seed", seed, "--device", args.device]
        command += [*shlex.split(settings["train"]), *shlex.split(flags)]
        row.runs.append(folder)
        row.train.append([str(part) for part in command])


def feature_file(folder, evaluated_on):
    """The features of a set. Those of FIVR-200K have FIVR-5K's videos too.

    A set of segments has the videos of the set of queries that it is named after.
    """
    evaluated_on = evaluated_on.removesuffix("-SEGMENTS")
    whole = folder / "FIVR-200K.hdf5"
    if evaluated_on == "FIVR-5K" and whole.exists():
        return whole
    return folder / f"{evaluated_on}.hdf5"


def slug(text):
    """`text` as the name of a file."""
    return re.sub(r"[^\w.=*]+", "_", text).strip("_")
