"""The Makefile's installation: when .venv is made, what `make search` puts into it.

And that tests go on if Horovod is not built.
"""

import os
import shutil
import subprocess

import pytest
from helpers.commands import ROOT
from helpers.launchers import why_no_horovod

# Stands in for Python VERSION: it makes a .venv of itself, and a pip that writes down its calls.
PYTHON = """#!/bin/sh
case "$1 $2" in
  "-c import sys"*) echo VERSION ;;
  "-m venv") rm -rf .venv; mkdir -p .venv/bin; cp "$0" .venv/bin/python; cp pip .venv/bin/pip ;;
  *) echo "python $@" >> calls ;;
esac
"""
PIP = '#!/bin/sh\necho "pip $@" >> calls\n'

# What `make` and horovod.sh use, without the compiler.
TOOLS = ["bash", "cat", "cp", "cut", "dirname", "echo", "grep", "make", "mkdir", "patch", "rm"]
TOOLS += ["sed", "sh", "tail", "touch"]


def write_script(path, text):
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def checkout(tmp_path):
    """A folder with the Makefile, patches/, and Pythons of which python3 is too old."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("requirements.txt", "requirements-search.txt"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "patches", tmp_path / "patches")
    write_script(tmp_path / "pip", PIP)
    (tmp_path / "bin").mkdir()
    for tool in TOOLS:
        (tmp_path / "bin" / tool).symlink_to(shutil.which(tool))
    for name, version in {"python3": "3.9", "python3.12": "3.12", "python3.13": "3.13"}.items():
        write_script(tmp_path / "bin" / name, PYTHON.replace("VERSION", version))
    return tmp_path


def make(checkout, *arguments):
    command = [checkout / "bin" / "make", *arguments]
    env = {"PATH": str(checkout / "bin")}
    return subprocess.run(command, cwd=checkout, env=env, capture_output=True, text=True)


def calls(checkout):
    """What pip and the .venv's Python were called with since the last question."""
    path = checkout / "calls"
    lines = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return lines


def installed_version(checkout):
    command = [checkout / ".venv" / "bin" / "python", "-c", "import sys"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


INSTALL_SEARCH = ["pip install --quiet -r requirements-search.txt"]
INSTALL_REST = ["pip install --quiet -r requirements.txt"]
INSTALL = INSTALL_SEARCH + INSTALL_REST


def test_venv_is_made_once_and_updated_when_requirements_change(checkout):
    assert make(checkout, ".venv/ready", "PYTHON=python3.12").returncode == 0
    assert calls(checkout) == INSTALL and installed_version(checkout) == "3.12"
    assert make(checkout, ".venv/ready").returncode == 0
    assert calls(checkout) == []
    os.utime(checkout / "requirements.txt", (2**31, 2**31))
    (checkout / ".venv" / "kept").touch()
    assert make(checkout, ".venv/ready").returncode == 0  # although python3 is another version
    assert make(checkout, "-B", ".venv/ready").returncode == 0  # as in make -B horovod
    assert calls(checkout) == INSTALL_REST + INSTALL and (checkout / ".venv" / "kept").exists()


def test_venv_of_make_search_is_completed_by_others(checkout):
    assert make(checkout, "search", "PYTHON=python3.12").returncode == 0
    assert calls(checkout) == INSTALL_SEARCH
    (checkout / ".venv" / "kept").touch()
    assert make(checkout, ".venv/ready").returncode == 0
    assert calls(checkout) == INSTALL_REST and (checkout / ".venv" / "kept").exists()
    assert make(checkout, "search").returncode == 0
    assert calls(checkout) == []


def test_venv_of_another_python_is_made_anew_where_it_is_asked_for(checkout):
    make(checkout, ".venv/ready", "PYTHON=python3.12")
    make(checkout, ".venv/ready", "PYTHON=python3.13")
    assert calls(checkout) == INSTALL * 2 and installed_version(checkout) == "3.13"


def test_venv_whose_python_is_gone_is_made_anew(checkout):
    make(checkout, ".venv/ready", "PYTHON=python3.12")
    (checkout / ".venv" / "bin" / "python").unlink()
    make(checkout, ".venv/ready", "PYTHON=python3.12")
    assert calls(checkout) == INSTALL * 2 and installed_version(checkout) == "3.12"


@pytest.mark.parametrize("python", ["python3", "python3.99"])
def test_unsupported_python_is_refused_and_the_venv_stays(checkout, python):
    make(checkout, ".venv/ready", "PYTHON=python3.13")
    result = make(checkout, ".venv/ready", f"PYTHON={python}")
    assert result.returncode != 0
    assert f"error: {python} is not one of Python 3.11 3.12 3.13" in result.stderr
    assert installed_version(checkout) == "3.13"


def compiler(checkout):
    write_script(checkout / "bin" / "c++", "#!/bin/sh\n")


def test_horovod_without_compiler_fails_and_leaves_the_reason(checkout):
    make(checkout, ".venv/ready", "PYTHON=python3.13")
    result = make(checkout, "horovod")
    assert result.returncode != 0
    assert "error: Horovod was not built: there is no c++" in result.stderr
    reason = why_no_horovod(checkout / ".venv" / "bin")
    assert reason.startswith("Horovod was not built: there is no c++; it needs a C++ compiler")


def test_horovod_failing_step_is_named_with_its_error(checkout):
    make(checkout, ".venv/ready", "PYTHON=python3.13")
    compiler(checkout)
    offline = "#!/bin/sh\necho retrying\necho ERROR: no network >&2\necho end\nexit 1\n"
    write_script(checkout / ".venv" / "bin" / "pip", offline)
    result = make(checkout, "horovod")
    assert result.returncode != 0 and "retrying" in result.stderr
    reason = "packages failed (ERROR: no network); see .venv/horovod/packages.log"
    assert why_no_horovod(checkout / ".venv" / "bin") == f"Horovod was not built: {reason}"
    assert not list((checkout / ".venv").glob("horovod-*.ready"))


def test_why_no_horovod_without_any_build_names_the_target(tmp_path):
    assert why_no_horovod(tmp_path) == "Horovod is not built; `make horovod` builds it"
    (tmp_path / "horovodrun").touch()
    assert why_no_horovod(tmp_path) == ""


def test_make_test_goes_on_without_horovod(checkout):
    make(checkout, ".venv/ready", "PYTHON=python3.13")
    write_script(checkout / ".venv" / "bin" / "ruff", "#!/bin/sh\n")
    calls(checkout)
    result = make(checkout, "test")
    assert result.returncode == 0, result.stderr
    assert "there is no c++" in result.stderr and "going on without Horovod" in result.stdout
    (pytest_call,) = calls(checkout)
    assert pytest_call.startswith("python -m pytest") and "-rsfE" in pytest_call.split()
