"""What `make search` installs: all that search.py needs, and nothing that it does not."""

import ast
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from helpers.commands import ROOT, environment

# Named in an error message where they are missing; search.py works without them.
OPTIONAL = {"onnxruntime", "horovod"}


def read_pins(name):
    """{package: version} of a requirements file, names in lower case."""
    lines = (line.partition("#")[0].strip() for line in (ROOT / name).read_text().splitlines())
    return {line.partition("==")[0].lower(): line.partition("==")[2] for line in lines if line}


def test_search_requirements_are_a_part_of_all_with_equal_versions():
    assert read_pins("requirements-search.txt").items() <= read_pins("requirements.txt").items()


def module_path(name):
    """The file of our module of this name, or None."""
    stem = ROOT / name.replace(".", "/")
    return next((p for p in (stem.with_suffix(".py"), stem / "__init__.py") if p.exists()), None)


def imported_names(path):
    """The modules that a file imports, also inside functions, and what may be modules in them."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def third_party_imports(script):
    """The packages that a script and all our modules behind it import: {name: files}."""
    packages, seen, pending = {}, set(), [script]
    while pending:
        path = module_path(pending.pop())
        if path in seen:
            continue
        seen.add(path)
        for name in imported_names(path):
            first = name.partition(".")[0]
            if module_path(name):
                pending.append(name)
            elif not module_path(first) and first not in sys.stdlib_module_names:
                packages.setdefault(first, set()).add(path.name)
    return packages


def test_search_requirements_are_what_search_imports():
    distributions = metadata.packages_distributions()
    imported = third_party_imports("search")
    needed = set()
    for package in imported.keys() - OPTIONAL:
        needed.update(name.lower() for name in distributions[package])
    needed -= {"markupsafe"}  # Jinja2's own
    assert needed == set(read_pins("requirements-search.txt"))


def requirement_closure(names):
    """The installed distributions of these names, and all that they require: {name: it}."""
    from packaging.requirements import Requirement

    found, pending = {}, list(names)
    while pending:
        distribution = metadata.distribution(pending.pop())
        if distribution.metadata["Name"] in found:
            continue
        found[distribution.metadata["Name"]] = distribution
        for line in distribution.requires or []:
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                pending.append(requirement.name)
    return found


@pytest.fixture(scope="module")
def small_python(tmp_path_factory):
    """The Python of an environment that has requirements-search.txt and what they require."""
    folder = tmp_path_factory.mktemp("small") / ".venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    for distribution in requirement_closure(read_pins("requirements-search.txt")).values():
        for first in {file.parts[0] for file in distribution.files}:
            source, link = Path(distribution.locate_file(first)), packages / first
            if first not in ("..", "__pycache__") and source.exists() and not link.exists():
                link.symlink_to(source)
    return folder / "bin" / "python"


@pytest.mark.slow
def test_search_runs_with_its_requirements_alone(small_python, library, tmp_path):
    def search(*arguments):
        command = [small_python, "search.py", *map(str, arguments), "--index", tmp_path / "index"]
        env = environment(CUDA_VISIBLE_DEVICES="")
        result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return result.stdout

    absent = "import importlib.util as u; print([u.find_spec(n) for n in ('pytest', 'sklearn')])"
    assert subprocess.check_output([small_python, "-c", absent], text=True) == "[None, None]\n"
    videos = [library.videos / name for name in ("a.mp4", "b.mp4", "c.mp4")]
    search("index", *videos)
    found = search("query", videos[0], "--report", tmp_path / "matches.html")
    assert str(videos[0]) in found and (tmp_path / "matches.html").exists()
    search("duplicates", "--report", tmp_path / "groups.html", "--plan", tmp_path / "plan.csv")
    search("against", videos[1])
    search("index", library.videos)
    assert "threshold" in search("calibrate", "--count", 4)
    search("verify")
