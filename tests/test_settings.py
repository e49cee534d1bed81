"""Which models evaluation.py takes for seeds of one setting, and how it names the others."""

import json
import shutil

import pytest
import torch
from helpers.commands import call, refused
from helpers.encoders import untrained_tca
from helpers.training import run
from helpers.worlds import C

from evaluation import main
from model import NetVLAD

SIZES = dict(feature_size=C, nhead=4, nlayers=1, dim_feedforward=64, dropout=0.2)


def save_tca(path, seed, processes=1, sizes=SIZES, **arguments):
    """A model file of a run with these arguments."""
    settings = {"arguments": {"seed": seed, **arguments}, "processes": processes, "inputs": {}}
    state = {"encoder": "tca", "arguments": sizes, "settings": settings}
    torch.save(state | {"state_dict": untrained_tca(seed).state_dict()}, path)
    return path


@pytest.fixture
def rows_of(world, tmp_path):
    """Scores models; gives {row: [paths]} and what the command printed."""

    def score(*models, flags=()):
        command = ["--dataset", "DEMO", "--feature_path", world.test_features, "--device", "cpu"]
        command += ["--annotation_dir", world.annotations, "--output", tmp_path / "out.json"]
        result = call(main, *command, *flags, "--model_path", *models)
        record = json.loads((tmp_path / "out.json").read_text())
        for row, paths in record["models_of_rows"].items():
            assert len(record["figures"][row]) == len(paths)
        return record["models_of_rows"], result

    return score


def test_models_that_differ_in_their_seed_share_a_row(rows_of, tmp_path):
    paths = [save_tca(tmp_path / f"{seed}.pth", seed, loss="circle") for seed in range(3)]
    rows, result = rows_of(*paths)
    assert rows == {"TCA_c": list(map(str, paths))}
    assert result.stdout.count("±") == 3 and not result.stderr.count("note")


def test_models_of_two_losses_have_a_row_each(rows_of, tmp_path):
    circle = [save_tca(tmp_path / f"circle{seed}.pth", seed, loss="circle") for seed in range(2)]
    other = save_tca(tmp_path / "infonce.pth", 0, loss="infonce")
    rows, result = rows_of(circle[0], other, circle[1])
    assert rows == {
        "TCA_c (loss circle)": [str(path) for path in circle],
        "TCA_c (loss infonce)": [str(other)],
    }
    line = next(line for line in result.stdout.splitlines() if "infonce" in line)
    assert "±" not in line and result.stdout.count("±") == 3


@pytest.mark.parametrize(
    "first, second, labels",
    [
        ({"moco_m": 0.0}, {"moco_m": 0.99}, ("moco_m 0.0", "moco_m 0.99")),
        ({"mask_shared": True}, {"mask_shared": False}, ("mask_shared", "no mask_shared")),
        ({"amp": None}, {"amp": "bfloat16"}, ("no amp", "amp bfloat16")),
        ({}, {"hard_negatives": 8}, ("no hard_negatives", "hard_negatives 8")),
        ({"processes": 1}, {"processes": 8}, ("processes 1", "processes 8")),
        (
            {"augment": ["crop", "drop"]},
            {"augment": ["crop"]},
            ("augment crop drop", "augment crop"),
        ),
        ({}, {"hard_negatives": 0, "amp": None}, None),  # flags that came later, off
        ({"num_layers": None}, {"num_layers": 1}, None),  # the default, and the same by its flag
    ],
)
def test_rows_are_named_by_what_differs(rows_of, tmp_path, first, second, labels):
    paths = save_tca(tmp_path / "a.pth", 0, **first), save_tca(tmp_path / "b.pth", 1, **second)
    rows, _ = rows_of(*paths)
    assert list(rows) == ([f"TCA_c ({label})" for label in labels] if labels else ["TCA_c"])


def test_model_that_does_not_say_how_it_was_trained_has_its_own_row(rows_of, tmp_path):
    paths = [save_tca(tmp_path / "known.pth", 0, loss="circle")]
    for seed in (1, 2):
        paths.append(tmp_path / f"bare{seed}.pth")
        torch.save(untrained_tca(seed).state_dict(), paths[-1])
    rows, _ = rows_of(*paths, flags=["--nhead", 4])
    assert rows == {f"TCA_c ({path})": [str(path)] for path in paths}
    assert list(rows_of(paths[1], flags=["--nhead", 4])[0]) == ["TCA_c"]  # one needs no name


def test_encoders_have_rows_and_curves_of_their_own(rows_of, tmp_path):
    """Two settings, each with its own trade-off of two-stage search."""
    paths = [save_tca(tmp_path / f"{loss}.pth", 0, loss=loss) for loss in ("circle", "infonce")]
    rows, _ = rows_of(*paths, flags=["--rerank", 4, 20])
    assert len(rows) == 8  # TCA_c, TCA_f and two R, of either loss
    record = json.loads((tmp_path / "out.json").read_text())
    assert list(record["trade_off"]) == ["chamfer (loss circle)", "chamfer (loss infonce)"]
    for curve in record["trade_off"].values():
        assert [line["R"] for line in curve] == [0, 4, 20, 80]
        assert curve[-1]["share"] == 1


def test_repeated_models_and_seeds_are_reported(rows_of, world, tmp_path):
    first = save_tca(tmp_path / "a.pth", 0, loss="circle")
    second = save_tca(tmp_path / "b.pth", 0, loss="circle")
    _, result = rows_of(first, second)
    assert "a.pth" in result.stderr and "same setting and seed" in result.stderr
    command = ["--dataset", "DEMO", "--feature_path", world.test_features]
    command += ["--annotation_dir", world.annotations, "--device", "cpu"]
    twice = tmp_path / "folder" / ".." / "a.pth"
    twice.parent.parent.mkdir()
    assert "twice" in refused(main, *command, "--model_path", first, second, twice)


def test_every_model_is_checked_before_the_first_row(world, tmp_path, capsys):
    good = save_tca(tmp_path / "a.pth", 0)
    vlad = NetVLAD(feature_size=C, num_clusters=4, output_dim=16)
    state = {"encoder": "netvlad", "state_dict": vlad.state_dict()}
    state["arguments"] = dict(feature_size=C, num_clusters=4, output_dim=16)
    torch.save(state, tmp_path / "vlad.pth")
    (tmp_path / "text.pth").write_text("no model")
    command = ["--dataset", "DEMO", "--feature_path", world.test_features]
    command += ["--annotation_dir", world.annotations, "--device", "cpu", "--metric", "chamfer"]
    for bad, mention in (
        ("absent.pth", "absent.pth"),
        ("text.pth", "text.pth"),
        ("vlad.pth", "NetVLAD"),
    ):
        assert mention in refused(main, *command, "--model_path", good, tmp_path / bad)
        assert capsys.readouterr() == ("", "")  # not even the set was announced


@pytest.mark.slow
def test_runs_of_train_py_are_told_apart(rows_of, world, tmp_path):
    """By model.pth; by args.json, which older runs have; and by a copy that has neither."""
    short = ["--epochs", 1]
    run(world, tmp_path / "a", *short, "--seed", 0)
    run(world, tmp_path / "b", *short, "--seed", 1, "--num_workers", 1, "--print-freq", 5)
    run(world, tmp_path / "c", *short, "--seed", 1, "--loss", "infonce")
    a, b, c = (tmp_path / name for name in "abc")
    expected = {"TCA_c (loss circle)": [str(a), str(b)], "TCA_c (loss infonce)": [str(c)]}
    assert rows_of(a, b, c)[0] == expected
    for folder in (a, b, c):
        state = torch.load(folder / "model.pth", weights_only=True)
        assert str(tmp_path) not in repr(state["settings"])  # a model to share names no path
        del state["settings"]
        torch.save(state, folder / "model.pth")
    assert rows_of(a, b, c)[0] == expected
    rows, _ = rows_of(a, b / "checkpoint.pth")
    assert list(rows) == [f"TCA_c ({a})", "TCA_c (step 9)"]
    copy = shutil.copy(a / "model.pth", tmp_path / "copy.pth")
    assert list(rows_of(b, copy)[0]) == [f"TCA_c ({b})", f"TCA_c ({copy})"]
