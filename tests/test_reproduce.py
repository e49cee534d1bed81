"""reproduce.py: published figures, commands the scripts accept, rows kept, failed or ruled out."""

import json
import re
import shlex
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.commands import cli, one_error, refused
from helpers.worlds import C

import reproduce
import train
from datasets.paper_tables import plan, read_tables
from distributed import Distributed
from retrieval.evaluation_arguments import parse_args, validate_args
from utils import InputError

TABLES = read_tables()

SMALL = """
[settings.demo]
widths = {{ l3_imac = {width} }}
annotation = "vcdb.pickle"
train = "--batch_sz 8 --epochs 1 --moco_k 64 --neg_num 4 --dim_feedforward 32 --nhead 4"

[tables.small]
title = "A small table"
source = "made up"
set = "FIVR-5K"

[[tables.small.rows]]
name = "somebody's"
published = {{ DSVR = 0.5, CSVR = 0.4, ISVR = 0.3 }}
unverified = true

[[tables.small.rows]]
name = "mean"
evaluate = "--encoder mean --metric cosine"
published = {{ DSVR = 0.6 }}

[[tables.small.rows]]
name = "trained"
train = "--learning_rate 1e-3"
evaluate = "--metric cosine"
note = "a footnote"

[[tables.small.rows]]
name = "trained alike, other metric"
train = "--learning_rate 1e-3"
evaluate = "--metric chamfer"

[[tables.small.rows]]
name = "diverges"
train = "--optimizer sgd --learning_rate 1e30 --epochs 3"
evaluate = "--metric cosine"

[[tables.small.rows]]
name = "needs a file"
evaluate = "--metric cosine --encoder mean"
needs = "absent.pth"
"""


@pytest.fixture(scope="module")
def here(world, tmp_path_factory):
    """A folder laid out as --data expects it, and a small tables file."""
    folder = tmp_path_factory.mktemp("reproduce")
    features = folder / "data" / "l3_imac"
    features.mkdir(parents=True)
    shutil.copy(world.train_features, features / "train.hdf5")
    shutil.copy(world.test_features, features / "DEMO.hdf5")
    shutil.copytree(world.annotations, folder / "annotations")
    shutil.copy(world.vcdb, folder / "annotations" / "vcdb.pickle")
    (folder / "tables.toml").write_text(SMALL.format(width=C))
    return folder


def flags(here, output, *more):
    command = ["--tables", here / "tables.toml", "--data", here / "data", "--set", "DEMO"]
    command += ["--annotation_dir", here / "annotations", "--output", output, "--seeds", 2]
    return [*command, "--device", "cpu", *more]


def run(*arguments):
    return reproduce.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def done(here, tmp_path_factory):
    """The small table, run once."""
    output = tmp_path_factory.mktemp("results")
    result = cli("reproduce.py", *flags(here, output))
    table = json.loads((output / "small.json").read_text())
    return SimpleNamespace(result=result, output=output, table=table)


def row_of(table, name):
    return next(row for row in table["rows"] if row["name"] == name)


# --- the tables file ----------------------------------------------------------------------------


@pytest.mark.parametrize("evaluated_on", [None, "FIVR-5K", "DEMO"])
@pytest.mark.parametrize("name", TABLES["tables"])
def test_commands_are_accepted_by_the_scripts(name, evaluated_on, tmp_path):
    table = TABLES["tables"][name]
    argv = ["--data", str(tmp_path), *(["--set", evaluated_on] if evaluated_on else [])]
    rows = [row for row in plan(TABLES, name, reproduce.parse_args(argv)) if row.evaluate]
    assert len(rows) == sum("evaluate" in entry for entry in table["rows"]) > 0
    for row in rows:
        args = parse_args("", row.evaluate[1:])
        validate_args(args, Distributed())
        expected = evaluated_on or table["set"]
        if name == "vcsl":  # pairs: the demo has its own, FIVR-5K has none
            expected = {"DEMO": "DEMO-SEGMENTS"}.get(evaluated_on, "VCSL")
        assert args.dataset == expected
        seeds = []
        for command in row.train:
            args = train.parse_args(command[1:])
            notes = train.validate_args(args, Distributed())
            # No flag is without a meaning, except that the demo's --init is tca's.
            assert not notes or (evaluated_on == "DEMO" and all("--init" in note for note in notes))
            seeds.append(args.seed)
        assert seeds in ([], [0, 1, 2])


def test_published_figures_are_those_of_the_field():
    """Some of each table, typed a second time."""
    published = {}
    for name, table in TABLES["tables"].items():
        for entry in table["rows"]:
            published[name, entry["name"]] = list(entry.get("published", {}).values())
    assert published["fivr200k", "TCA_c"] == [0.570, 0.553, 0.473]
    assert published["fivr200k", "TCA_f"] == [0.877, 0.830, 0.703]
    assert published["fivr200k", "ViSiL_v"] == [0.892, 0.841, 0.702]
    assert published["cc_web", "TCA_f"] == [0.983, 0.969, 0.994, 0.990]
    assert published["similarity", "chamfer (TCA_f)"] == [0.844, 0.834, 0.763]
    assert published["momentum", "m = .999"] == [0.581, 0.577, 0.520]
    assert published["bank", "K = 65536"] == [0.611, 0.617, 0.574]
    assert published["model", "GRU"] == [0.515, 0.495, 0.415]
    assert published["loss", "InfoNCE, T = .07"] == [0.493, 0.473, 0.394]
    assert published["evve", "TCA_sym"] == [0.630]
    assert published["vcsl", "TransVCL"] == [0.6559, 0.6746, 0.6651]
    assert published["vcsl", "TN"] == [0.7525, 0.5180, 0.6136]


def test_unverified_transcriptions_are_marked():
    counts = {}
    for name, table in TABLES["tables"].items():
        counts[name] = sum(entry.get("unverified", False) for entry in table["rows"])
    assert counts == {
        "model": 4,
        "feature": 1,
        "loss": 2,
        "bank": 3,
        "momentum": 4,
        "similarity": 1,
        "fivr200k": 0,
        "cc_web": 0,
        "evve": 8,
        "asked": 0,
        "speed": 0,
        "vcsl": 0,
    }


# --- a table that is run ------------------------------------------------------------------------


@pytest.mark.slow
def test_failed_row_does_not_stop_the_others(done):
    assert done.result.returncode == 3, done.result.stderr
    status = {row["name"]: row["status"] for row in done.table["rows"]}
    assert status["somebody's"] == "quoted"
    for name in ("mean", "trained", "trained alike, other metric"):
        assert status[name] == "finished"
    assert status["diverges"].startswith("failed: train.py: loss is")
    assert status["needs a file"].startswith("not run: absent.pth")
    assert "absent.pth" in done.result.stderr and "needs a file" in done.result.stderr


@pytest.mark.slow
def test_measured_figures_are_those_of_the_commands(done):
    trained = row_of(done.table, "trained")
    command = shlex.split(trained["commands"][-1])
    output = command.index("--output") + 1
    command[output] = str(done.output / "again.json")
    assert cli(*command).returncode == 0
    (again,) = json.loads((done.output / "again.json").read_text())["figures"].values()
    measured = [dict(one) for one in trained["measured"]]
    assert all(one.pop(reproduce.SPEED) > 0 for one in measured)
    assert again == measured and len(again) == 2


@pytest.mark.slow
def test_rows_of_equal_training_share_their_runs(done):
    trained = row_of(done.table, "trained")["commands"]
    alike = row_of(done.table, "trained alike, other metric")["commands"]
    assert trained[:2] == alike[:2]
    runs = list((done.output / "runs").iterdir())
    assert len(runs) == 2  # the shared one, and the one that diverges


@pytest.mark.slow
def test_printed_table_has_published_and_measured_figures(done):
    text = (done.output / "small.md").read_text()
    assert "| somebody's | .500 / .400 / .300† |" in text
    assert reproduce.DAGGER in text and "[1] a footnote." in text
    cells = []
    for task in ("DSVR", "CSVR", "ISVR"):
        values = [one[task] for one in row_of(done.table, "trained")["measured"]]
        cells.append(f"{np.mean(values):.4f} ± {np.std(values, ddof=1):.4f}")
    assert f"| trained [1] |  | {' / '.join(cells)} |" in text
    assert text.splitlines()[0] in done.result.stdout


@pytest.mark.slow
def test_finished_row_is_kept_and_failed_row_run_again(done, here, capsys):
    results = done.output / "small" / "trained.json"
    before = results.stat().st_mtime_ns
    assert run(*flags(here, done.output)) == 3
    assert results.stat().st_mtime_ns == before
    table = json.loads((done.output / "small.json").read_text())
    assert row_of(table, "trained") == row_of(done.table, "trained")
    assert row_of(table, "diverges")["status"].startswith("failed")
    assert "| trained [1] |" in capsys.readouterr().out


# --- --estimate ----------------------------------------------------------------------------------

FAKE_TRAIN = """
import json, pathlib, signal, sys, time

folder = pathlib.Path(sys.argv[sys.argv.index("--model_path", 3) + 1])  # the last one
assert sys.argv[-2:] == ["--print-freq", "1"]
settings = {"arguments": {"batch_sz": 4, "neg_num": 2}, "steps": 100}
(folder / "args.json").write_text(json.dumps(settings))

def stop(*_):
    (folder / "stopped").touch()
    sys.exit(143)

signal.signal(signal.SIGTERM, stop)
for step, speed in enumerate(SPEEDS, 1):
    with open(folder / "log.jsonl", "a") as log:
        log.write(json.dumps({"step": step, "videos_per_s": speed}) + "\\n")
LAST
"""


def estimated(folder, monkeypatch, speeds, last):
    """The seconds of a training by a script that logs `speeds` and does `last`."""
    monkeypatch.setattr(reproduce, "ROOT", folder)
    script = FAKE_TRAIN.replace("SPEEDS", repr(speeds)).replace("LAST", last)
    (folder / "train.py").write_text(script)
    command = ["train.py", "--model_path", "elsewhere", "--seed", "0"]
    return reproduce.training_seconds(command, folder / "run")


def test_estimated_training_scales_the_logged_steps(tmp_path, monkeypatch):
    """A step has 4 pairs of 4 videos. At 8 videos a second, the first step aside, it takes 2 s."""
    seconds = estimated(tmp_path, monkeypatch, [1, 8, 8, 8, 8], "time.sleep(60)")
    assert seconds == pytest.approx(100 * 2)
    assert (tmp_path / "run" / "stopped").exists()  # by SIGTERM, long before the 60 seconds


def test_estimated_training_of_one_step_uses_that_step(tmp_path, monkeypatch):
    assert estimated(tmp_path, monkeypatch, [4], "pass") == pytest.approx(100 * 4)


def test_estimate_reports_a_training_that_fails(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="^train.py: no such pairs$"):
        estimated(tmp_path, monkeypatch, [4], "sys.exit('error: no such pairs')")


@pytest.mark.slow
def test_estimate_of_every_row_that_can_run(here, tmp_path, capsys):
    tables = (here / "tables.toml").read_text().replace('name = "diverges"', 'name = "sgd"')
    (tmp_path / "tables.toml").write_text(tables.replace("1e30", "1e-5"))
    more = ["--tables", tmp_path / "tables.toml", "--estimate"]
    assert run(*flags(here, tmp_path / "out", *more)) == 0
    lines = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
    assert [what for _, what in lines] == [
        "evaluate mean",
        "train l3_imac_learning_rate_1e_3",
        "evaluate trained",
        "evaluate trained alike, other metric",
        "train l3_imac_optimizer_sgd_learning_rate_1e_5_epochs_3",
        "evaluate sgd",
        "all, one after another",
    ]
    assert all(re.fullmatch(r"\d+:\d\d:\d\d", duration) for duration, _ in lines)
    assert not (tmp_path / "out").exists()


# --- without running ----------------------------------------------------------------------------


def test_dry_run_prints_commands_and_what_is_missing(here, tmp_path, capsys):
    assert run(*flags(here, tmp_path / "out", "--dry_run")) == 0
    printed = capsys.readouterr()
    assert printed.out.count("python train.py") == 6
    assert printed.out.count("python evaluation.py") == 5
    assert "absent.pth" in printed.err
    assert not (tmp_path / "out").exists()


def test_features_of_another_size_rule_out_the_row_before_training(here, tmp_path, capsys):
    (tmp_path / "tables.toml").write_text(SMALL.format(width=C + 1))
    tables = ["--tables", tmp_path / "tables.toml"]
    for more in ([], ["--estimate"]):  # no row is left
        message = refused(reproduce.main, *flags(here, tmp_path / "out", *tables, *more))
        assert "no row can run" in message and str(here / "data") in message
    assert f"have width {C}, not {C + 1}; rules out small\n" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_missing_file_is_printed_once_with_its_tables(here, capsys):
    """A table by its name alone if none of its rows is left."""
    command = ["--data", here / "absent", "--table", "bank", "loss", "asked", "--dry_run"]
    assert run(*command) == 0
    lines = capsys.readouterr().err.splitlines()
    problems = [line.partition("; rules out ")[0] for line in lines]
    assert len(set(problems)) == len(problems)
    (line,) = [line for line in lines if "l3_imac features of the training videos" in line]
    entries = TABLES["tables"]["asked"]["rows"]
    trained = [row["name"] for row in entries if "train" in row]
    assert trained != [row["name"] for row in entries if "evaluate" in row]
    assert line.endswith(f"; rules out bank, loss, asked ({'; '.join(trained)})")


def test_bad_input_is_refused(here, tmp_path):
    (tmp_path / "broken.toml").write_text("rows = [")
    data = ["--data", here / "data"]
    assert "broken.toml" in refused(reproduce.main, *data, "--tables", tmp_path / "broken.toml")
    assert "absent.toml" in refused(reproduce.main, *data, "--tables", tmp_path / "absent.toml")
    assert "--seeds" in refused(reproduce.main, *data, "--seeds", 0)


@pytest.mark.slow
def test_command_line_reports_an_error_in_one_line(here):
    result = cli("reproduce.py", "--data", here / "data", "--table", "nonsense")
    assert "nonsense" in one_error(result)


def test_device_is_by_default_that_of_the_other_scripts(monkeypatch):
    monkeypatch.setattr(reproduce, "default_device", lambda: "cuda")
    assert reproduce.parse_args(["--data", "features"]).device == "cuda"
