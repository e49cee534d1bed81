"""What documents name exists: links, scripts, targets, flags; and they name what can be chosen."""

import re
import subprocess

import pytest
from helpers.commands import ROOT

from datasets.registry import EVALUATION_SETS
from features.backbones import BACKBONES
from losses import LOSSES
from model import ENCODERS
from retrieval.similarity import METRICS
from utils import VERSION

DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix()
    for path in [
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/*.md"),
        *ROOT.glob("[!.]*/README.md"),
        *ROOT.glob("datasets/demo/README.md"),
        ROOT / "Makefile",
        ROOT / ".github" / "workflows" / "ci.yml",
    ]
)


CODE = [path for folder in (".", "*", "*/*") for path in ROOT.glob(f"{folder}/*.py")]
CODE = [path for path in CODE if path.relative_to(ROOT).parts[0] not in (".venv", "runs", "tests")]

# Flags of programs that are not ours.
FOREIGN_FLAGS = {
    *("--help", "--quiet", "--check", "--clear", "--fix", "--dist", "--gloo", "--dataset_ids"),
    *("--standalone", "--nnodes", "--nproc_per_node", "--rdzv_backend", "--rdzv_endpoint"),
    *("--rdzv_id", "--signals_to_handle", "--shutdown_timeout", "--mpi-args", "--prefix"),
    *("--nodes", "--ntasks-per-node", "--gpus-per-node", "--time", "--signal", "--requeue"),
    *("--open-mode",),
}


def text_of(document):
    return (ROOT / document).read_text(encoding="utf-8")


def targets():
    return set(re.search(r"^\.PHONY:(.*)", text_of("Makefile"), re.MULTILINE)[1].split())


def anchors(text):
    """The anchors that GitHub gives the headings of a Markdown text."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    for heading in re.findall(r"^#+ (.+)", prose, re.MULTILINE):
        yield re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("document", [name for name in DOCUMENTS if name.endswith(".md")])
def test_linked_files_and_headings_exist(document):
    folder = (ROOT / document).parent
    links = re.findall(r"\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"", text_of(document))
    for link in (first or second for first, second in links):
        if re.match(r"[a-z]+:", link):  # https:, mailto:
            continue
        path, _, anchor = link.partition("#")
        target = folder / path if path else ROOT / document
        assert target.exists(), f"{document} links to {link}"
        if anchor:
            headings = list(anchors(target.read_text(encoding="utf-8")))
            assert anchor in headings, f"{document} links to {link}, but there is {headings}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_named_scripts_and_modules_exist(document):
    text = text_of(document)
    run = r"(?:python3?|\$\(RUN\)|torchrun(?: --\S+ \S+)*)"
    scripts = re.findall(rf"{run} ((?:[\w-]+/)*[\w-]+\.py)\b", text)
    modules = re.findall(rf"{run} -m ([\w.]+)", text)
    for script in scripts:
        assert (ROOT / script).exists(), f"{document} runs {script}"
    for module in modules:
        path = ROOT / f"{module.replace('.', '/')}.py"
        assert path.exists() or module in ("pytest", "venv", "pip"), f"{document} runs {module}"
    if document == "Makefile":
        assert len(scripts) > 5 and modules  # the pattern still finds them


@pytest.mark.parametrize("document", DOCUMENTS)
def test_named_make_targets_exist(document):
    """In code: after a backquote, at the start of a line, or in a workflow."""
    named = re.findall(r"(?:`|^#? *|run: )make ([a-z][\w-]*)", text_of(document), re.MULTILINE)
    assert set(named) <= targets()


@pytest.mark.parametrize("document", DOCUMENTS)
def test_named_flags_exist(document):
    code = "\n".join(path.read_text(encoding="utf-8") for path in CODE)
    flags = set(re.findall(r"(?<![\w-])--[a-zA-Z][\w-]*", text_of(document)))
    assert {flag for flag in flags - FOREIGN_FLAGS if f'{flag}"' not in code} == set()


def test_makefile_help_lists_every_target():
    printed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True).stdout
    assert set(re.findall(r"^make ([\w-]+)", printed, re.MULTILINE)) == targets() - {"help"}


@pytest.mark.parametrize(
    "document, names",
    [
        ("docs/training.md", [name for name in ENCODERS if name != "mean"]),
        ("docs/training.md", LOSSES),
        ("docs/evaluation.md", METRICS),
        ("datasets/README.md", EVALUATION_SETS),
        ("docs/pre-processing.md", BACKBONES),
    ],
)
def test_entries_of_registries_are_named(document, names):
    """A new encoder, loss or measure that no document tells of is one that nobody uses."""
    text = text_of(document)
    missing = [
        name for name in names if not re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", text)
    ]
    assert not missing


def test_python_versions_agree():
    """Those of the classifiers, of requires-python, of the Makefile, and of the workflow."""
    project = text_of("pyproject.toml")
    versions = re.findall(r"Python :: (3\.\d+)", project)
    assert re.findall(
        r"\"(3\.\d+)\"", re.search(r"python: \[.*", text_of(".github/workflows/ci.yml"))[0]
    ) == (versions)
    supported = re.search(r"^SUPPORTED := (.*)", text_of("Makefile"), re.MULTILINE)[1]
    assert supported.split() == versions
    lowest, above = re.search(r"requires-python = \">=3\.(\d+),<3\.(\d+)\"", project).groups()
    assert versions == [f"3.{minor}" for minor in range(int(lowest), int(above))]


def test_version_is_the_same_everywhere():
    """In the newest section of CHANGELOG.md and in CITATION.cff; pyproject.toml reads utils.py."""
    assert re.search(r"^## ([\d.]+)", text_of("CHANGELOG.md"), re.MULTILINE)[1] == VERSION
    assert re.search(r"^version: (.+)", text_of("CITATION.cff"), re.MULTILINE)[1] == VERSION
