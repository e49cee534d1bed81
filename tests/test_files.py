"""Files are written whole or not at all, by one process at a time."""

import json
import os
import signal
import stat

import pytest
from helpers.commands import python

from files import atomic, remove_leftovers, write_json
from utils import InputError


def test_atomic_replaces_the_file_only_if_the_block_succeeds(tmp_path):
    path = tmp_path / "deep" / "er" / "x.txt"
    with atomic(path) as temporary:
        assert temporary.parent == path.parent
        assert not path.exists()
        temporary.write_text("old")
    assert path.read_text() == "old"
    assert os.listdir(path.parent) == ["x.txt"]

    with atomic(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert os.listdir(path.parent) == ["x.txt"]


@pytest.mark.parametrize("error", [ValueError, InputError, KeyboardInterrupt, SystemExit])
def test_atomic_keeps_the_old_file_if_the_block_raises(error, tmp_path):
    path = tmp_path / "x.txt"
    with pytest.raises(error), atomic(path) as temporary:
        temporary.write_text("half")
        raise error
    assert not list(tmp_path.iterdir())

    path.write_text("old")
    with pytest.raises(error), atomic(path) as temporary:
        temporary.write_text("half")
        raise error
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_atomic_file_has_the_mode_of_any_new_file(tmp_path):
    write_json(tmp_path / "ours.json", {})
    (tmp_path / "plain.json").write_text("{}")
    ours, plain = ((tmp_path / name).stat().st_mode for name in ("ours.json", "plain.json"))
    assert stat.S_IMODE(ours) == stat.S_IMODE(plain)


def test_remove_leftovers_of_a_killed_run_and_nothing_else(tmp_path):
    path = tmp_path / "a[1].pth"
    code = (
        "import os, signal, sys, files\n"
        "with files.atomic(sys.argv[1]) as temporary:\n"
        "    temporary.write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert python(code, path).returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 1  # SIGKILL leaves it no time to clean up

    others = ["a[1].pth", ".a[1].pth.short.pth", ".a1.pth.12345678.pth", ".a[1].pth.12345678.txt"]
    for name in others:
        (tmp_path / name).touch()
    remove_leftovers(path)
    assert sorted(os.listdir(tmp_path)) == sorted(others)


def test_write_json_round_trip(tmp_path):
    value = {"b": [1, 2.5, None], "a": {"ü": "x"}}
    write_json(tmp_path / "x.json", value)
    assert json.loads((tmp_path / "x.json").read_text(encoding="utf-8")) == value


def test_write_json_nan_becomes_null(tmp_path):
    write_json(tmp_path / "x.json", {"mAP": [float("nan"), (1.0, float("nan"))]})
    assert json.loads((tmp_path / "x.json").read_text()) == {"mAP": [None, [1.0, None]]}
