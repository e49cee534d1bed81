"""Arguments, atomic files, untrusted files, seeds, provenance."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.commands import ROOT, python

import untrusted
import utils
from files import save_torch
from utils import InputError

# --- arguments ----------------------------------------------------------------------------------


def test_parser_error_is_one_line_with_the_way_to_help():
    parser = utils.Parser(prog="script.py")
    parser.add_argument("--size", type=int)
    with pytest.raises(InputError, match="invalid int value: 'x'; see script.py --help"):
        parser.parse_args(["--size", "x"])


def test_check_ranges_includes_both_ends():
    parser = utils.Parser()
    parser.add_argument("--batch-sz", type=int)
    for size in (1, 8):
        utils.check_ranges(parser.parse_args(["--batch-sz", str(size)]), {"batch-sz": (1, 8)})
    for size in (0, 9):
        args = parser.parse_args(["--batch-sz", str(size)])
        with pytest.raises(InputError, match=f"--batch-sz {size} is out of range.* 1 to 8"):
            utils.check_ranges(args, {"batch-sz": (1, 8)})


# --- files that others wrote --------------------------------------------------------------------


class Malicious:
    """Creates the file `target` when it is unpickled."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch '{self.target}'",)


def test_load_torch_does_not_run_code(tmp_path):
    target = tmp_path / "owned"
    torch.save({"x": Malicious(target)}, tmp_path / "x.pth")
    with pytest.raises(InputError) as error:
        untrusted.load_torch(tmp_path / "x.pth")
    assert "x.pth" in str(error.value) and "\n" not in str(error.value)
    assert not target.exists()

    torch.load(tmp_path / "x.pth", weights_only=False)
    assert target.exists(), "the file was harmless, so the test above proves nothing"


def test_load_torch_reports_a_broken_or_missing_file(tmp_path):
    path = tmp_path / "x.pth"
    save_torch(path, {"x": torch.randn(1000)})
    whole = path.read_bytes()
    for content in (b"", b"text", whole[:100], whole[:-100]):
        path.write_bytes(content)
        with pytest.raises(InputError) as error:
            untrusted.load_torch(path)
        assert "x.pth" in str(error.value) and "\n" not in str(error.value)
    path.unlink()
    with pytest.raises(InputError, match="x.pth.*does not exist"):
        untrusted.load_torch(path)


def test_save_torch_round_trip(tmp_path):
    value = {
        "x": torch.randn(5),
        "n": 3,
        "best": -float("inf"),
        "none": None,
        "names": ["a", {"b": 1.5}],
    }
    save_torch(tmp_path / "x.pth", value)
    loaded = untrusted.load_torch(tmp_path / "x.pth")
    assert torch.equal(loaded.pop("x"), value.pop("x"))
    assert loaded == value


# --- seeds and provenance -----------------------------------------------------------------------


def test_seeded_rng_depends_on_its_keys_alone():
    def draw(*keys):
        return tuple(utils.seeded_rng(*keys).integers(0, 2**60, 4).tolist())

    np.random.seed(0)
    first = draw(1, 2, 3)
    np.random.seed(1)
    utils.seeded_rng(9).normal(size=100)
    assert draw(1, 2, 3) == first
    for keys in (
        [(0,), (1,), (0, 0), (1, 0)],  # zeros at the end count
        [(0, 1), (1, 0), (1, 2), (2, 1), (12, 3), (1, 23)],
        [(1, 2, 3), (3, 2, 1), (1, 3, 2)],
    ):
        assert len({draw(*key) for key in keys}) == len(keys)


def test_seed_torch_gives_the_same_numbers_after_any_history():
    def draw(*keys):
        utils.seed_torch(*keys)
        return tuple(torch.rand(4).tolist())

    first = draw(1, 2)
    torch.rand(77)
    assert draw(1, 2) == first
    assert len({draw(*keys) for keys in [(0, 1), (1, 0), (1, 2), (2, 1), (1, 3)]}) == 5


def test_provenance_has_command_revision_versions_machine():
    stored = utils.provenance()
    assert set(stored) == {"command", "version", "revision", "versions", "machine"}
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {stored['version']}\n" in citation
    assert stored["versions"]["torch"] == torch.__version__
    assert stored["versions"]["numpy"] == np.__version__

    git = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True)
    expected = git.stdout.strip() if git.returncode == 0 else "unknown"
    assert stored["revision"].removesuffix(" with uncommitted changes") == expected


@pytest.mark.parametrize(
    "changed, mark", [("results/a.md", ""), ("b.py", " with uncommitted changes")]
)
def test_provenance_counts_no_results_as_changes(changed, mark, tmp_path):
    (tmp_path / "results").mkdir()
    for name in ("results/a.md", "b.py"):
        (tmp_path / name).write_text("1\n")
    shutil.copy(utils.__file__, tmp_path)
    git = ["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "1"]):
        subprocess.run([*git, *command], check=True)
    (tmp_path / changed).write_text("2\n")
    code = "import utils; print(utils.provenance()['revision'])"
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
    assert run.stdout == head.stdout.strip() + mark + "\n"


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="not Linux")
def test_results_say_whether_the_processor_has_bfloat16():
    flags = Path("/proc/cpuinfo").read_text().split()
    has = any(flag in flags for flag in ("avx512_bf16", "amx_bf16", "bf16"))
    machine = utils.provenance()["machine"]
    assert "bfloat16" in machine and ("no bfloat16" in machine) != has


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system has no affinity")
def test_available_cores_are_those_of_the_process():
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert utils.available_cores() == 1
        assert ", 1 cores, " in utils.provenance()["machine"]
    finally:
        os.sched_setaffinity(0, before)
    assert utils.available_cores() == len(before)


# --- imports ------------------------------------------------------------------------------------


def test_import_leaves_signals_and_random_state_alone():
    result = python(
        "import signal, sys\n"
        "import torch\n"
        "def state():\n"
        "    handlers = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]\n"
        "    return handlers, torch.get_rng_state().tolist()\n"
        "before = state()\n"
        "import train, evaluation, search, reproduce, visualize\n"
        "import features.extraction, retrieval.report, videoindex.index, datasets.registry\n"
        "sys.exit(before != state())"
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
