"""benchmarks/style.py counts what it says, on a small checkout counted by hand."""

import importlib.util
import re
import subprocess

import pytest
from helpers.commands import ROOT, refused

CODE = '''"""Ten lines that are not blank."""

import os  # a comment


def public(a: int, *, b: str = "# no comment") -> list:
    """It is no word, and is whatever."""
    return [x for x in {y: y for y in range(a)}]


class Box:
    def method(self, a):
        return sum(x for x in a)

    def _private(self):
        pass
'''
README = "# Title\n\nFive words stand here.\n\n![picture](a.png)\n\n```\nmake\n```\n"


@pytest.fixture(scope="module")
def style():
    spec = importlib.util.spec_from_file_location("style", ROOT / "benchmarks" / "style.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_style_counts(style, tmp_path, capsys):
    (tmp_path / "model.py").write_text(CODE)
    (tmp_path / "README.md").write_text(README)
    (tmp_path / "package").mkdir()
    long_function = "def long() -> None:\n" + "    pass\n" * 60
    (tmp_path / "package" / "a.py").write_text(f"x = '{'y' * 100}'\n{long_function}")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_a.py").write_text("# left out\n")
    (tmp_path / "untracked.py").write_text("# left out\n")
    git = ["git", "-C", tmp_path]
    subprocess.run([*git, "init", "--quiet"], check=True)
    subprocess.run([*git, "add", "model.py", "README.md", "package", "tests"], check=True)

    style.main([str(tmp_path)])
    table = capsys.readouterr().out.splitlines()
    values = dict(re.split(r"\s{2,}", line.strip()) for line in table)
    lines = 10 + 62
    assert values["Python files at the top level"] == "1"
    assert values["entries at the top level"] == "4"
    assert values["lines of code, comments and docstrings"] == str(lines)
    characters = sum(len(line.strip()) for line in CODE.splitlines())
    characters += len(f"x = '{'y' * 100}'") + len("def long() -> None:") + 60 * len("pass")
    assert values["characters a line"] == f"{characters / lines:.1f}"
    assert values["lines over 100 columns"] == f"{100 / lines:.1f} %"
    assert values["comprehensions per 100 lines"] == f"{300 / lines:.1f}"
    assert values["comments per 100 lines"] == f"{100 / lines:.1f} (model.py 10.0)"
    assert values["dialect words"] == "2 (is no 1, whatever 1)"
    assert values["public functions and methods"] == "3"
    assert values["typed: all parameters and the return"] == "67 %"
    assert values["with a docstring"] == "33 %"
    assert values["functions over 60 lines"] == "package/a.py:long 61"
    assert values["README: words"] == "10"
    assert values["README: pictures"] == "1"
    assert values["README: fenced blocks"] == "1"


def test_style_refuses_a_folder_that_git_does_not_track(style, tmp_path):
    assert str(tmp_path) in refused(style.main, tmp_path)
