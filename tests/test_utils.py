"""Exit statuses, files that are whole or not there, files that cannot run code, draws by their keys alone."""

import json
import os
import signal
import stat
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers.commands import ROOT, environment

import utils
from distributed import run_main
from utils import InputError


@pytest.mark.parametrize(
    "main, status, stderr",
    [
        (lambda: None, None, ""),
        (lambda: 0, 0, ""),
        (lambda: 143, 143, ""),
        (
            lambda: (_ for _ in ()).throw(InputError("file 'x' is not there")),
            2,
            "error: file 'x' is not there\n",
        ),
        (lambda: (_ for _ in ()).throw(KeyboardInterrupt), 130, "interrupted\n"),
    ],
    ids=["nothing", "0", "143", "bad input", "Ctrl-C"],
)
def test_run_ends_with_the_status_of_what_happened(main, status, stderr, capsys):
    with pytest.raises(SystemExit) as end:
        run_main(main)
    assert end.value.code == status
    assert capsys.readouterr() == ("", stderr)


def test_a_bug_is_not_dressed_as_bad_input():
    with pytest.raises(ZeroDivisionError):
        run_main(lambda: 1 / 0)


def test_bad_input_is_one_line_on_stderr_of_a_process():
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import utils\n"
        "def main(): raise utils.InputError('no\\nway')\n"
        "run_main(main)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, ROOT], capture_output=True, text=True, env=environment()
    )
    assert (result.returncode, result.stdout, result.stderr) == (2, "", "error: no way\n")


# --- atomic files ----------------------------------------------------------------------------------------------------


def test_atomic_replaces_only_when_the_block_ends_well(tmp_path):
    path = tmp_path / "deep" / "er" / "x.txt"
    with utils.atomic(path) as temporary:
        assert temporary.parent == path.parent and not path.exists()
        temporary.write_text("old")
    assert path.read_text() == "old" and os.listdir(path.parent) == ["x.txt"]
    with utils.atomic(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and os.listdir(path.parent) == ["x.txt"]


@pytest.mark.parametrize("error", [ValueError, InputError, KeyboardInterrupt, SystemExit])
def test_atomic_leaves_the_old_file_and_nothing_else_on_failure(error, tmp_path):
    path = tmp_path / "x.txt"
    with pytest.raises(error), utils.atomic(path) as temporary:
        temporary.write_text("half")
        raise error
    assert not list(tmp_path.iterdir())
    path.write_text("old")
    with pytest.raises(error), utils.atomic(path) as temporary:
        temporary.write_text("half")
        raise error
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_an_atomic_file_is_readable_as_any_other_new_file(tmp_path):
    utils.write_json(tmp_path / "ours.json", {})
    (tmp_path / "plain.json").write_text("{}")
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("ours.json", "plain.json")]
    assert modes[0] == modes[1]


def test_write_json_is_read_back(tmp_path):
    value = {"b": [1, 2.5, None], "a": {"ü": "x"}}
    utils.write_json(tmp_path / "x.json", value)
    assert json.loads((tmp_path / "x.json").read_text(encoding="utf-8")) == value


# --- files of others -------------------------------------------------------------------------------------------------


class Malicious:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch '{self.target}'",)


def test_code_in_a_torch_file_is_refused_and_not_run(tmp_path):
    target = tmp_path / "owned"
    torch.save({"x": Malicious(target)}, tmp_path / "x.pth")
    with pytest.raises(InputError) as error:
        utils.load_torch(tmp_path / "x.pth")
    assert "x.pth" in str(error.value) and "\n" not in str(error.value) and not target.exists()
    torch.load(tmp_path / "x.pth", weights_only=False)
    assert target.exists(), "the file was harmless, so the test above says nothing"


def test_a_torch_file_that_is_absent_broken_or_cut_short_is_refused_by_name(tmp_path):
    path = tmp_path / "x.pth"
    utils.save_torch(path, {"x": torch.randn(1000)})
    whole = path.read_bytes()
    for content in (b"", b"text", whole[:100], whole[:-100]):
        path.write_bytes(content)
        with pytest.raises(InputError) as error:
            utils.load_torch(path)
        assert "x.pth" in str(error.value) and "\n" not in str(error.value)
    path.unlink()
    with pytest.raises(InputError, match="x.pth.*not there"):
        utils.load_torch(path)


def test_save_torch_is_read_back_by_load_torch(tmp_path):
    value = {
        "x": torch.randn(5),
        "n": 3,
        "best": -float("inf"),
        "none": None,
        "names": ["a", {"b": 1.5}],
    }
    utils.save_torch(tmp_path / "x.pth", value)
    found = utils.load_torch(tmp_path / "x.pth")
    assert torch.equal(found.pop("x"), value.pop("x")) and found == value


# --- draws and provenance --------------------------------------------------------------------------------------------


def test_draws_depend_on_their_keys_and_on_nothing_else():
    def draw(*keys):
        return tuple(utils.rng(*keys).integers(0, 2**60, 4).tolist())

    np.random.seed(0)
    first = draw(1, 2, 3)
    np.random.seed(1)
    utils.rng(9).normal(size=100)
    assert draw(1, 2, 3) == first
    for keys in (
        [(0,), (1,)],
        [(0, 1), (1, 0), (1, 2), (2, 1), (12, 3), (1, 23)],
        [(1, 2, 3), (3, 2, 1), (1, 3, 2)],
    ):
        assert len({draw(*key) for key in keys}) == len(keys)


def test_seeding_torch_makes_the_same_draws_after_any_history():
    def draw(*keys):
        utils.seed_torch(*keys)
        return tuple(torch.rand(4).tolist())

    first = draw(1, 2)
    torch.rand(77)
    assert draw(1, 2) == first
    assert len({draw(*keys) for keys in [(0, 1), (1, 0), (1, 2), (2, 1), (1, 3)]}) == 5


def test_provenance_names_the_command_the_versions_and_the_machine():
    found = utils.provenance()
    assert set(found) == {"command", "revision", "versions", "machine"}
    assert (
        found["versions"]["torch"] == torch.__version__
        and found["versions"]["numpy"] == np.__version__
    )
    git = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True)
    expected = git.stdout.strip() if git.returncode == 0 else "unknown"
    assert found["revision"].removesuffix(" with uncommitted changes") == expected


def test_importing_leaves_signals_and_generators_alone():
    code = (
        "import sys, signal, random; sys.path.insert(0, sys.argv[1])\n"
        "import numpy, torch\n"
        "before = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)], torch.get_rng_state().tolist()\n"
        "import utils, data, model, losses, similarity, evaluation, train\n"
        "after = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)], torch.get_rng_state().tolist()\n"
        "sys.exit(before != after)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, ROOT], capture_output=True, text=True, env=environment()
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_output_that_nobody_reads_any_more_ends_a_script_without_a_word():
    """As `script | head -1` does, with more output than a pipe holds."""
    code = "import utils; run_main(lambda: [print('x' * 100) for _ in range(10000)])"
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline().strip() == "x" * 100
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == 128 + signal.SIGPIPE
