"""How the code reads, in numbers: line lengths, comments, comprehensions, typed signatures, README.

    python benchmarks/style.py            # this checkout
    python benchmarks/style.py ../other   # another one, of an earlier revision for example

The numbers are symptoms, for a look now and then. Nothing enforces them. The tests are left out.
"""

import ast
import io
import re
import subprocess
import sys
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from distributed import run_main
from utils import InputError, Parser

COLUMNS = 100
LONG_FUNCTION = 60
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)

# Words of the prose that this project once had, and should not have again.
DIALECT = (
    r"told|asked|asking|stands?|anew|whatever|lest|heedless|(?<!there )(?:is|are) no|settle|goes on"
)


def main(argv=None):
    parser = Parser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT, help="a git checkout")
    folder = parser.parse_args(argv).folder
    paths = tracked_files(folder)
    code = [path for path in paths if path.suffix == ".py" and path.parts[0] != "tests"]
    texts = {str(path): (folder / path).read_text(encoding="utf-8") for path in code}

    rows = layout_rows(paths) + line_rows(texts) + function_rows(texts)
    rows += readme_rows((folder / "README.md").read_text(encoding="utf-8"))
    width = max(len(label) for label, _ in rows)
    for label, value in rows:
        print(f"{label:{width}}  {value}")


def tracked_files(folder):
    """Paths of the files that git tracks, relative to `folder`."""
    listed = subprocess.run(["git", "-C", folder, "ls-files", "-z"], capture_output=True, text=True)
    if listed.returncode:
        raise InputError(f"{str(folder)!r} is not a git checkout; name the folder of one")
    return [Path(name) for name in listed.stdout.split("\0") if name]


def layout_rows(paths):
    entries = {path.parts[0] for path in paths}
    scripts = [name for name in entries if name.endswith(".py")]
    return [
        ("Python files at the top level", len(scripts)),
        ("entries at the top level", len(entries)),
    ]


def line_rows(texts):
    """About lines. Blank lines count nowhere, indentation counts for the columns only."""
    lines = [line for text in texts.values() for line in text.splitlines() if line.strip()]
    trees = [ast.parse(text) for text in texts.values()]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    over = sum(len(line) > COLUMNS for line in lines)
    comprehensions = sum(isinstance(node, COMPREHENSIONS) for node in nodes)
    comments = sum(count_comments(text) for text in texts.values())
    skips = sum(text.count("fmt: " + "skip") for text in texts.values())
    own_list = str(Path(__file__).resolve().relative_to(ROOT))  # it holds the words it looks for
    prose = "\n".join(text for path, text in texts.items() if path != own_list)
    words = re.findall(rf"\b(?:{DIALECT})\b", prose, re.IGNORECASE)

    per_100 = 100 / len(lines)
    commented = []
    for name in ("train.py", "evaluation.py", "model.py"):
        if name in texts:
            count = count_comments(texts[name])
            non_blank = sum(bool(line.strip()) for line in texts[name].splitlines())
            commented.append(f"{name} {100 * count / non_blank:.1f}")
    return [
        ("lines of code, comments and docstrings", len(lines)),
        ("characters a line", f"{sum(len(line.strip()) for line in lines) / len(lines):.1f}"),
        (f"lines over {COLUMNS} columns", f"{over * per_100:.1f} %"),
        ("comprehensions per 100 lines", f"{comprehensions * per_100:.1f}"),
        ("comments per 100 lines", f"{comments * per_100:.1f} ({', '.join(commented)})"),
        ("lines that the formatter skips", skips),
        ("dialect words", f"{len(words)}{most_common(words)}"),
    ]


def count_comments(text):
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return sum(token.type == tokenize.COMMENT for token in tokens)


def most_common(words):
    counts = {}
    for word in map(str.lower, words):
        counts[word] = counts.get(word, 0) + 1
    ranked = sorted(counts, key=counts.get, reverse=True)
    return f" ({', '.join(f'{word} {counts[word]}' for word in ranked[:5])})" if ranked else ""


def function_rows(texts):
    public, typed, documented = 0, 0, 0
    long = []
    for path, text in texts.items():
        for function, is_public in functions(ast.parse(text)):
            length = function.end_lineno - function.lineno + 1
            if length > LONG_FUNCTION:
                long.append(f"{path}:{function.name} {length}")
            if is_public:
                public += 1
                typed += is_typed(function)
                documented += ast.get_docstring(function) is not None
    return [
        ("public functions and methods", public),
        ("  typed: all parameters and the return", f"{100 * typed / public:.0f} %"),
        ("  with a docstring", f"{100 * documented / public:.0f} %"),
        (f"functions over {LONG_FUNCTION} lines", ", ".join(long) or 0),
    ]


def functions(node, is_public=True):
    """Yield (function, whether it is public) of all functions below a node.

    Public is what is reached without an underscore: a function of a module or a method of a class,
    but not a function inside a function, and not a script's `main`. `__init__` is public.
    """
    for child in ast.iter_child_nodes(node):
        if isinstance(child, FUNCTIONS):
            private = re.match(r"_(?!_)", child.name) or child.name == "main"
            yield child, is_public and not private
            yield from functions(child, is_public=False)
        elif isinstance(child, ast.ClassDef):
            yield from functions(child, is_public and not child.name.startswith("_"))
        else:
            yield from functions(child, is_public)


def is_typed(function):
    """Whether every parameter is annotated, but for self and cls, and the return as well.

    `__init__` needs no annotation of its return.
    """
    args = function.args
    parameters = [*args.posonlyargs, *args.args, *args.kwonlyargs, args.vararg, args.kwarg]
    untyped = [arg.arg for arg in parameters if arg is not None and arg.annotation is None]
    returns = function.returns is not None or function.name == "__init__"
    return returns and set(untyped) <= {"self", "cls"}


def readme_rows(text):
    return [
        ("README: words", len(text.split())),
        ("README: pictures", len(re.findall(r"!\[|<img", text))),
        ("README: fenced blocks", len(re.findall(r"^```", text, re.MULTILINE)) // 2),
    ]


if __name__ == "__main__":
    run_main(main)
