"""reproduce.py: published figures as transcribed, commands that the scripts accept, rows that are kept, failed or ruled out."""

import json
import shlex
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.commands import cli, one_error
from helpers.worlds import C

import evaluation
import reproduce
import train
from distributed import Distributed

TABLES = reproduce.load()
NAMES = list(TABLES["tables"])

SMALL = """
[settings.demo]
widths = {{ l3_imac = {width} }}
annotation = "vcdb.pickle"
train = "--batch_sz 8 --epochs 1 --moco_k 64 --neg_num 4 --dim_feedforward 32 --nhead 4"
[tables.small]
title = "A small table"
source = "made up"
set = "FIVR-5K"
rows = [
  {{ name = "somebody's", published = {{ DSVR = 0.5, CSVR = 0.4, ISVR = 0.3 }}, unverified = true }},
  {{ name = "mean", evaluate = "--encoder mean --metric cosine", published = {{ DSVR = 0.6 }} }},
  {{ name = "trained", train = "--learning_rate 1e-3", evaluate = "--metric cosine", note = "a footnote" }},
  {{ name = "trained alike, other metric", train = "--learning_rate 1e-3", evaluate = "--metric chamfer" }},
  {{ name = "diverges", train = "--optimizer sgd --learning_rate 1e30 --epochs 3", evaluate = "--metric cosine" }},
  {{ name = "needs a file", evaluate = "--metric cosine --encoder mean", needs = "absent.pth" }},
]
"""


@pytest.fixture(scope="module")
def here(world, tmp_path_factory):
    """A folder laid out as --data wants it, and a small tables file."""
    folder = tmp_path_factory.mktemp("reproduce")
    (folder / "data" / "l3_imac").mkdir(parents=True)
    shutil.copy(world.train_features, folder / "data" / "l3_imac" / "train.hdf5")
    shutil.copy(world.test_features, folder / "data" / "l3_imac" / "DEMO.hdf5")
    shutil.copytree(world.annotations, folder / "annotations")
    shutil.copy(world.vcdb, folder / "annotations" / "vcdb.pickle")
    (folder / "tables.toml").write_text(SMALL.format(width=C))
    return folder


def flags(here, output, *more):
    return ["--tables", here / "tables.toml", "--data", here / "data", "--set", "DEMO", "--annotation_dir",
            here / "annotations", "--output", output, "--seeds", 2, *more]  # fmt: skip


@pytest.fixture(scope="module")
def done(here, tmp_path_factory):
    output = tmp_path_factory.mktemp("results")
    result = cli("reproduce.py", *flags(here, output))
    return SimpleNamespace(
        result=result, output=output, table=json.loads((output / "small.json").read_text())
    )


def row(table, name):
    return next(row for row in table["rows"] if row["name"] == name)


@pytest.mark.parametrize("chosen", [None, "FIVR-5K", "DEMO"])
@pytest.mark.parametrize("name", NAMES)
def test_every_command_of_every_row_is_one_that_the_scripts_accept(name, chosen, tmp_path):
    argv = ["--data", str(tmp_path), *(["--set", chosen] if chosen else [])]
    args, tables = reproduce.parse(argv)
    rows = reproduce.plan(tables, name, args)
    measured = [row for row in rows if row.evaluate]
    assert len(measured) == sum("evaluate" in entry for entry in tables["tables"][name]["rows"]) > 0
    for row in measured:
        assert evaluation.parse_args(row.evaluate[1:]).dataset == (
            chosen or tables["tables"][name]["set"]
        )
        given = [train.parse("", command[1:]) for command in row.train]
        assert [args.seed for args in given] in ([], [0, 1, 2])
        notes = [note for args in given for note in train.settle(args, Distributed())]
        assert not notes or (
            chosen == "DEMO" and all("--init" in note for note in notes)
        )  # no flag without a meaning


def test_published_figures_are_those_of_the_field():
    """A few of each kind, typed a second time."""
    published = {
        (name, entry["name"]): list(entry["published"].values())
        for name, table in TABLES["tables"].items()
        for entry in table["rows"]
        if "published" in entry
    }
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


def test_the_unverified_transcriptions_are_marked():
    unverified = {
        name: sum(e.get("unverified", False) for e in table["rows"])
        for name, table in TABLES["tables"].items()
    }
    assert unverified == {
        "model": 4, "feature": 1, "loss": 2, "bank": 3, "momentum": 4, "similarity": 1, "fivr200k": 0, "cc_web": 0, "evve": 8,
        "asked": 0, "speed": 0,
    }  # fmt: skip


def test_a_table_is_run_row_by_row_and_what_fails_does_not_stop_the_rest(done):
    assert done.result.returncode == 3, done.result.stderr
    status = {row["name"]: row["status"] for row in done.table["rows"]}
    assert status["somebody's"] == "quoted"
    assert (
        status["mean"] == status["trained"] == status["trained alike, other metric"] == "finished"
    )
    assert status["diverges"].startswith("failed: train.py: loss is")
    assert status["needs a file"].startswith("not run: absent.pth")
    assert "absent.pth" in done.result.stderr and "needs a file" in done.result.stderr


def test_a_rows_figures_are_those_of_its_own_commands(done):
    trained = row(done.table, "trained")
    command = shlex.split(trained["commands"][-1])
    output = command.index("--output") + 1
    command[output] = str(done.output / "again.json")
    assert cli(*command).returncode == 0
    (again,) = json.loads((done.output / "again.json").read_text())["figures"].values()
    measured = [dict(one) for one in trained["measured"]]
    assert all(one.pop(reproduce.SPEED) > 0 for one in measured)
    assert again == measured and len(again) == 2


def test_rows_of_equal_training_share_their_runs(done):
    assert (
        row(done.table, "trained")["commands"][:2]
        == row(done.table, "trained alike, other metric")["commands"][:2]
    )
    assert (
        len(list((done.output / "runs").iterdir())) == 2
    )  # the shared one, and the one that diverges


def test_the_printed_table_holds_published_and_measured_figures(done):
    text = (done.output / "small.md").read_text()
    assert (
        "| somebody's | .500 / .400 / .300† |" in text
        and reproduce.DAGGER in text
        and "[1] a footnote." in text
    )
    figures = row(done.table, "trained")["measured"]
    cells = [
        f"{np.mean(v):.4f} ± {np.std(v, ddof=1):.4f}"
        for v in ([f[task] for f in figures] for task in ("DSVR", "CSVR", "ISVR"))
    ]
    assert f"| trained [1] |  | {' / '.join(cells)} |" in text
    assert text.splitlines()[0] in done.result.stdout


def test_a_finished_row_is_kept_and_a_failed_one_tried_again(done, here):
    results = done.output / "small" / "trained.json"
    before = results.stat().st_mtime_ns
    again = cli("reproduce.py", *flags(here, done.output))
    assert again.returncode == 3 and results.stat().st_mtime_ns == before
    assert row(json.loads((done.output / "small.json").read_text()), "trained") == row(
        done.table, "trained"
    )


def test_a_dry_run_prints_commands_and_what_is_missing_and_writes_nothing(here, tmp_path):
    result = cli("reproduce.py", *flags(here, tmp_path / "out", "--dry_run"))
    assert result.returncode == 0 and not (tmp_path / "out").exists()
    assert (
        result.stdout.count("python train.py") == 6
        and result.stdout.count("python evaluation.py") == 5
    )
    assert "absent.pth" in result.stderr


def test_features_of_a_wrong_width_fail_before_training_and_name_the_row(here, tmp_path):
    (tmp_path / "tables.toml").write_text(SMALL.format(width=C + 1))
    result = cli(
        "reproduce.py", *flags(here, tmp_path / "out", "--tables", tmp_path / "tables.toml")
    )
    assert f"have width {C}, not {C + 1}; rules out mean, trained" in result.stderr
    assert not (tmp_path / "out" / "runs").exists()


def test_bad_input_is_one_line(here, tmp_path):
    broken = tmp_path / "broken.toml"
    broken.write_text("rows = [")
    assert "broken.toml" in one_error(
        cli("reproduce.py", "--data", here / "data", "--tables", broken)
    )
    assert "nonsense" in one_error(
        cli("reproduce.py", "--data", here / "data", "--table", "nonsense")
    )
