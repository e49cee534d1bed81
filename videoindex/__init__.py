"""Search your own videos, as a library: `videoindex.index.VideoIndex`."""

from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

for name in ("utils", "untrusted", "files", "distributed", "model", "padding", "features"):
    spec = find_spec(name)
    if spec is None or not Path(spec.origin or "").resolve().is_relative_to(ROOT):
        raise ImportError(
            f"videoindex needs {name!r} of {ROOT}, but {name!r} is {spec and spec.origin} here;"
            f" put {ROOT} first on sys.path, in a process that has not imported the other"
        )
