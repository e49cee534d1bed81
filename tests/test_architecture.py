"""The rules of the layout, checked on the source: who imports whom, scripts, line length.

A rule is a generator: {module: File} -> offences, each "path:line: what is wrong". Every rule is
tested twice: on this repository, and on small trees that break it.
"""

import ast
import os
import re
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import pytest
from helpers.commands import ROOT

# From the bottom up. A module imports from lower layers and from its own room, which is its folder.
# The modules of the third layer are one room: they are the method, and may import each other.
METHOD = {"model", "losses", "data", "batches", "checkpoint", "training_log", "padding"}
LAYERS = [
    {"processes"},
    {"utils"},
    {"files", "entry"},
    {"distributed", "untrusted"},
    METHOD,
    {"features", "datasets"},  # neither imports the other: features know no protocol
    {"retrieval"},
    {"videoindex"},
    {"benchmarks"},  # what two benchmarks share
]
TOP = len(LAYERS)  # scripts, and hubconf.py, which PyTorch Hub loads

# Modules that also run as a process of their own, by `python -m`.
RUNNABLE_MODULES = {"features.decoding", "videoindex.calibrate"}

MAX_COLUMNS = 100
TEXT = (".py", ".md", ".toml", ".txt", ".sh", ".yml", ".html", ".cff", ".patch", "")


# --- source files -------------------------------------------------------------------------------


@dataclass
class File:
    path: str  # relative to the root, "features/store.py"
    text: str

    @cached_property
    def tree(self):
        return ast.parse(self.text)

    @property
    def module(self):
        """Dotted name, "features.store"; a package is named as its folder."""
        return self.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")

    @property
    def folder(self):
        return self.module.rpartition(".")[0] if "__init__" not in self.path else self.module

    @property
    def room(self):
        return self.module.partition(".")[0]

    @property
    def is_test(self):
        return self.room == "tests"

    @cached_property
    def main_block(self):
        """The statement `if __name__ == "__main__"`, or None."""
        for node in self.tree.body:
            if isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'":
                return node
        return None

    @property
    def is_script(self):
        return self.main_block is not None and self.module not in RUNNABLE_MODULES

    @property
    def layer(self):
        """Index into LAYERS, TOP for scripts, None if the file has no place in the layout."""
        if self.is_script or self.module == "hubconf":
            return TOP
        return next((i for i, rooms in enumerate(LAYERS) if self.room in rooms), None)

    @cached_property
    def definitions(self):
        """The names that this module binds at its top level, other than by an import."""
        names = set()
        pending = list(self.tree.body)
        while pending:
            node = pending.pop()
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                names.add(node.name)  # its body is another scope
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
            elif not isinstance(node, ast.Lambda | ast.ListComp | ast.DictComp | ast.SetComp):
                pending.extend(ast.iter_child_nodes(node))
        return names


@lru_cache
def source_files(suffixes=(".py",)):
    """The text files of this repository, without what a checkout accumulates."""
    accumulated = {"__pycache__", "build", "results", "runs", "shared"}
    files = {}
    for folder, subfolders, names in os.walk(ROOT):
        hidden = {name for name in subfolders if name.startswith(".")} - {".github", ".ci"}
        subfolders[:] = sorted(set(subfolders) - hidden - accumulated)
        for name in sorted(names):
            path = Path(folder, name)
            if path.suffix in suffixes:
                relative = path.relative_to(ROOT).as_posix()
                file = File(relative, path.read_text(encoding="utf-8"))
                files[file.module] = file
    return files


def imports(file, files):
    """Yield (line, module, name) of every import of ours; name is None for a whole module."""
    for node in ast.walk(file.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if module := resolve(alias.name, file, files):
                    yield node.lineno, module, None
        elif isinstance(node, ast.ImportFrom):
            package = node.module or ""
            if node.level:  # relative
                parts = file.folder.split(".")
                package = ".".join([*parts[: len(parts) - node.level + 1], package]).strip(".")
            for alias in node.names:
                submodule = resolve(f"{package}.{alias.name}", file, files)
                if submodule:
                    yield node.lineno, submodule, None
                elif module := resolve(package, file, files):
                    yield node.lineno, module, alias.name


def resolve(name, file, files):
    """Our module of this name, as `file` would find it; None if it is not ours.

    A script finds modules of its own folder; tests find those of tests/ and pre-processing/.
    """
    folders = ["", f"{file.folder}."]
    if file.is_test:
        folders += ["tests.", "pre-processing."]
    return next((folder + name for folder in folders if folder + name in files), None)


# --- the rules ----------------------------------------------------------------------------------


def imports_run_one_way(files):
    for file in files.values():
        if file.is_test:
            continue
        if file.layer is None:
            yield f"{file.path}:1: no layer of LAYERS holds this module"
            continue
        for line, module, _ in imports(file, files):
            other = files[module]
            same_room = file.room == other.room or {file.room, other.room} <= METHOD
            if other.layer is None or other.is_test:
                yield f"{file.path}:{line}: imports {module}, which is not part of the program"
            elif other.layer > file.layer or (other.layer == file.layer < TOP and not same_room):
                yield f"{file.path}:{line}: imports {module}, which is not below it"


def imports_make_no_circle(files):
    graph = {name: [other for _, other, _ in imports(files[name], files)] for name in files}
    finished = set()

    def visit(name, trail):
        if name in trail:
            circle = [*trail[trail.index(name) :], name]
            yield f"{files[name].path}:1: import circle {' -> '.join(circle)}"
        elif name not in finished:
            for other in graph[name]:
                yield from visit(other, [*trail, name])
            finished.add(name)

    for name in graph:
        yield from visit(name, [])


def nobody_imports_a_script(files):
    for file in files.values():
        for line, module, _ in imports(file, files):
            if files[module].is_script and not file.is_test:
                yield f"{file.path}:{line}: imports the script {module}"


def nobody_imports_a_test(files):
    for file in files.values():
        for line, module, _ in imports(file, files):
            if re.search(r"(^|\.)(test_\w+|conftest)$", module):
                yield f"{file.path}:{line}: imports {module}; what tests share is in tests/helpers/"


def names_come_from_their_own_module(files):
    for file in files.values():
        for line, module, name in imports(file, files):
            if name and name not in files[module].definitions:
                yield f"{file.path}:{line}: {name} is not defined in {module}"
        if not file.is_test:
            yield from foreign_attributes(file, files)


def foreign_attributes(file, files):
    """`module.name` where our `module` does not define the name, but imports it from elsewhere."""
    bound = {}  # variable -> our module
    for node in ast.walk(file.tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            package = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            for alias in node.names:
                if module := resolve(package + alias.name, file, files):
                    bound[alias.asname or alias.name] = module
    for node in ast.walk(file.tree):  # a variable or an argument of the same name hides the module
        if isinstance(node, ast.arg):
            bound.pop(node.arg, None)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            bound.pop(node.id, None)
    for node in ast.walk(file.tree):
        if not isinstance(node, ast.Attribute):
            continue
        module = bound.get(ast.unparse(node.value))
        if module:
            submodule = f"{module}.{node.attr}" in files
            if not submodule and node.attr not in files[module].definitions | {"__doc__"}:
                yield f"{file.path}:{node.lineno}: {node.attr} is not defined in {module}"


def sys_path_is_set_by_one_line_of_a_script(files):
    for file in files.values():
        edits = [node for node in ast.walk(file.tree) if is_sys_path_edit(node)]
        allowed = 1 if file.is_script and "/" in file.path else 0
        for node in edits[allowed:]:
            yield f"{file.path}:{node.lineno}: edits sys.path"
        for node in edits[:allowed]:
            if not ast.unparse(node).startswith("sys.path.insert(0, "):
                yield f"{file.path}:{node.lineno}: not `sys.path.insert(0, ROOT)`"


def is_sys_path_edit(node):
    if isinstance(node, ast.Call):
        called = ast.unparse(node.func)
        return bool(re.fullmatch(r"sys\.path\.\w+|(site\.)?addsitedir", called))
    if isinstance(node, ast.Assign | ast.AugAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        return any(ast.unparse(target).startswith("sys.path") for target in targets)
    return False


def scripts_have_main_with_argv(files):
    for file in files.values():
        if not file.is_script:
            continue
        signatures = [
            ast.unparse(node.args)
            for node in file.tree.body
            if isinstance(node, ast.FunctionDef) and node.name == "main"
        ]
        if len(signatures) != 1 or not re.fullmatch(r"argv(: .+)?=None", signatures[0]):
            yield f"{file.path}:1: has no `main(argv=None)`"
        body = [ast.unparse(statement) for statement in file.main_block.body]
        if body != ["run_main(main)"]:
            yield f"{file.path}:{file.main_block.lineno}: does not end with `run_main(main)`"


def lines_are_short(files):
    for file in files.values():
        for number, line in enumerate(file.text.splitlines(), 1):
            if len(line) > MAX_COLUMNS:
                yield f"{file.path}:{number}: {len(line)} columns"


RULES = [
    imports_run_one_way,
    imports_make_no_circle,
    nobody_imports_a_script,
    nobody_imports_a_test,
    names_come_from_their_own_module,
    sys_path_is_set_by_one_line_of_a_script,
    scripts_have_main_with_argv,
    lines_are_short,
]


def no_package_index_is_named(files):
    """Packages come from wherever the user's pip finds them."""
    host = re.compile(r"pypi[.]org|pythonhosted[.]org|pytorch[.]org/whl|index[-_]url", re.I)
    for file in files.values():
        for number, line in enumerate(file.text.splitlines(), 1):
            if host.search(line) and "re.compile" not in line:
                yield f"{file.path}:{number}: names a package index"


# --- the rules, on this repository --------------------------------------------------------------


def assert_none(offences):
    listed = "".join(f"\n{offence}" for offence in dict.fromkeys(offences))
    assert not listed, listed


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_repository(rule):
    assert_none(rule(source_files()))


def test_repository_names_no_package_index():
    assert_none(no_package_index_is_named(source_files(TEXT)))


def test_repository_has_the_files_that_the_rules_speak_of():
    """Otherwise a rule may pass because a file was renamed."""
    files = source_files()
    assert {"train", "evaluation", "search", "reproduce", "visualize", "hubconf"} <= set(files)
    assert all(any(file.room == room for file in files.values()) for room in set().union(*LAYERS))
    assert set(files) >= RUNNABLE_MODULES
    assert sum(file.is_script for file in files.values()) >= 15
    assert sum(1 for file in files.values() for _ in imports(file, files)) >= 200


# --- the rules, on trees that break them --------------------------------------------------------

SCRIPT = "def main(argv=None):\n    pass\n\nif __name__ == '__main__':\n    run_main(main)\n"
PATH_LINE = "import sys\nsys.path.insert(0, str(ROOT))\n"

BROKEN = [
    # Imports against the direction
    (imports_run_one_way, {"utils.py": "import distributed", "distributed.py": ""}),
    (imports_run_one_way, {"model.py": "import features.store", "features/store.py": ""}),
    (imports_run_one_way, {"features/a.py": "from datasets.b import x", "datasets/b.py": "x = 1"}),
    (
        imports_run_one_way,
        {"datasets/a.py": "def f():\n from features import b", "features/b.py": ""},
    ),
    (imports_run_one_way, {"features/a.py": "from retrieval import b", "retrieval/b.py": ""}),
    (imports_run_one_way, {"retrieval/a.py": "import videoindex.b", "videoindex/b.py": ""}),
    (
        imports_run_one_way,
        {"retrieval/a.py": "from train import x", "train.py": "x = 1\n" + SCRIPT},
    ),
    (imports_run_one_way, {"train.py": SCRIPT + "import tests.helpers", "tests/helpers.py": ""}),
    (imports_run_one_way, {"drawer.py": ""}),
    # Circles, of two and of three, at the top of a file and inside a function
    (imports_make_no_circle, {"model.py": "import data", "data.py": "import model"}),
    (
        imports_make_no_circle,
        {
            "features/a.py": "from . import b",
            "features/b.py": "from features.c import x",
            "features/c.py": "def x():\n    import features.a",
        },
    ),
    # Scripts and tests that are imported
    (nobody_imports_a_script, {"reproduce.py": "import train\n" + SCRIPT, "train.py": SCRIPT}),
    (
        nobody_imports_a_script,
        {"benchmarks/a.py": "from b import main\n" + SCRIPT, "benchmarks/b.py": SCRIPT},
    ),
    (nobody_imports_a_script, {"features/a.py": "import train", "train.py": SCRIPT}),
    (
        nobody_imports_a_test,
        {"tests/test_a.py": "from test_b import x", "tests/test_b.py": "x = 1"},
    ),
    (nobody_imports_a_test, {"tests/test_a.py": "import conftest", "tests/conftest.py": ""}),
    # Names by way of another module
    (
        names_come_from_their_own_module,
        {
            "data.py": "from utils import digest",
            "train.py": "from data import digest",
            "utils.py": "def digest():\n    pass",
        },
    ),
    (
        names_come_from_their_own_module,
        {"train.py": "import utils\nutils.np.zeros(3)", "utils.py": "import numpy as np"},
    ),
    (
        names_come_from_their_own_module,
        {
            "train.py": "from features import a as store\nstore.b",
            "features/a.py": "from features.c import b",
            "features/c.py": "b = 1",
        },
    ),
    (
        names_come_from_their_own_module,
        {"tests/test_a.py": "from data import np", "data.py": "import numpy as np"},
    ),
    # sys.path
    (sys_path_is_set_by_one_line_of_a_script, {"features/a.py": PATH_LINE}),
    (sys_path_is_set_by_one_line_of_a_script, {"train.py": PATH_LINE + SCRIPT}),
    (sys_path_is_set_by_one_line_of_a_script, {"benchmarks/a.py": PATH_LINE * 2 + SCRIPT}),
    (
        sys_path_is_set_by_one_line_of_a_script,
        {"benchmarks/a.py": "import sys\nsys.path.append(ROOT)\n" + SCRIPT},
    ),
    (sys_path_is_set_by_one_line_of_a_script, {"tests/test_a.py": "sys.path = ['x', *sys.path]"}),
    (sys_path_is_set_by_one_line_of_a_script, {"tests/test_a.py": "sys.path += ['x']"}),
    # main
    (scripts_have_main_with_argv, {"train.py": SCRIPT.replace("argv=None", "")}),
    (scripts_have_main_with_argv, {"train.py": SCRIPT.replace("argv=None", "argv")}),
    (scripts_have_main_with_argv, {"train.py": SCRIPT.replace("run_main(main)", "main()")}),
    (scripts_have_main_with_argv, {"train.py": "if __name__ == '__main__':\n    print()"}),
    # Line length
    (lines_are_short, {"data.py": "#" * (MAX_COLUMNS + 1)}),
    # Package indexes
    (no_package_index_is_named, {"Makefile": "pip install --index-" + "url https://example.org"}),
    (no_package_index_is_named, {"README.md": "see https://pypi" + ".org/project/x"}),
]

SOUND = {
    "utils.py": "import os\n\nclass InputError(Exception):\n    pass\n",
    "distributed.py": "from utils import InputError\n",
    "model.py": "import utils\n\ndef pad(utils_):\n    raise utils.InputError\n",
    "data.py": "from model import pad\n",
    "features/__init__.py": "",
    "features/a.py": "from . import b\nfrom features.b import x, y\n\ndef f(b):\n    return b.z\n",
    "features/b.py": "try:\n    x, y = 1, 2\nexcept ValueError:\n    x = 3\n",
    "datasets/c.py": "from utils import InputError\n",
    "datasets/get.py": PATH_LINE + "from datasets import c\n" + SCRIPT,
    "retrieval/r.py": "import features.a\nimport datasets.c\n",
    "videoindex/calibrate.py": "import retrieval.r\n\nif __name__ == '__main__':\n    print()\n",
    "train.py": "import data, model\n\n" + SCRIPT,
    "search.py": SCRIPT.replace("argv=None", "argv: list[str] | None = None"),
    "benchmarks/shared.py": "import retrieval.r\n",
    "benchmarks/speed.py": PATH_LINE + "import shared\n" + SCRIPT,
    "hubconf.py": "from model import pad\n",
    "tests/helpers/h.py": "import train\n",
    "tests/test_a.py": "from helpers import h\nfrom features.a import f\n",
}


def tree(sources):
    files = [File(path, text) for path, text in sources.items()]
    return {file.module: file for file in files}


@pytest.mark.parametrize("rule, sources", BROKEN)
def test_rule_reports_a_broken_tree(rule, sources):
    offences = list(rule(tree(sources)))
    assert offences and all(re.match(r"[\w./-]+:\d+: ", offence) for offence in offences)


@pytest.mark.parametrize("rule", [*RULES, no_package_index_is_named])
def test_rule_accepts_a_sound_tree(rule):
    assert list(rule(tree(SOUND))) == []


def test_every_rule_has_a_tree_that_breaks_it():
    assert {rule for rule, _ in BROKEN} == {*RULES, no_package_index_is_named}
