"""Fetch the public annotation files of the evaluation sets into datasets/annotations/.

    python datasets/download.py                        # every file, from the public repositories
    python datasets/download.py --only FIVR-5K EVVE    # what these sets need, or files by name
    python datasets/download.py --from FOLDER          # from a copy at hand, without network
    python datasets/download.py --mirror URL           # from a server with the same paths,
                                                       # REPOSITORY/REVISION/PATH

The files are 19 MB in all. Each is pinned by repository, revision and SHA-256 (`FILES`). A file
that is present and correct is left alone. Other bytes are refused, and nothing of them is kept.
datasets/README.md has the content and the licence of each file.
"""

import http.client
import sys
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from distributed import run_main
from files import Lock, atomic
from utils import InputError, Parser, file_sha256, require_path

PUBLIC = "https://raw.githubusercontent.com"
TIMEOUT = 30  # seconds without a byte
BLOCK = 1 << 18  # bytes read at once


class Source(NamedTuple):
    """Where a file is public, and the SHA-256 that it must have."""

    repository: str
    revision: str
    path: str
    sha256: str


_FIVR = ("MKLab-ITI/FIVR-200K", "77e3d8a9c159eed9a0b9686e2d62bc7ab3106e24")
_DNS = ("mever-team/distill-and-select", "f81a7ebb3afb87a7ecec428157cbddb6c954c659")
_TCA = ("xwen99/temporal_context_aggregation", "0ba11b2c2fff57d484bf2f788072c75f457c804e")
_S2VS = ("gkordo/s2vs", "03eb0c9a9a7455d132c4210b797fa6ef563b52ea")
_TRANSVCL = ("transvcl/TransVCL", "4b57976da5ad1b38f999c96aba315e63a272acdf")

FILES = {
    "fivr_annotation.json": Source(
        *_FIVR,
        "dataset/annotation.json",
        "ccd343bd1c442142da3b2ef9e571ae888d44ac039fd02de708b0be820385a3ea",
    ),
    "fivr_youtube_ids.txt": Source(
        *_FIVR,
        "dataset/youtube_ids.txt",
        "6fa192644eb84f4a3b88839d850de9d38ac25de90622ccb8cf4a111a75829c06",
    ),
    "fivr.pickle": Source(
        *_DNS,
        "datasets/fivr.pickle",
        "dce327ab664dfaade878a3fb474f7a598141a513c484572f95629dcbf1c020f3",
    ),
    "cc_web_video.pickle": Source(
        *_DNS,
        "datasets/cc_web_video.pickle",
        "6c33932cfa6ed08eb02fb47189b38bcef124c07794e99adf5c04163dcf4c52fe",
    ),
    "cc_web_video_tca.pickle": Source(
        *_TCA,
        "datasets/cc_web_video.pickle",
        "6166e6d9090f93a10dc4af5827a864e65ee77f8a0992576ab1a0849af47fe20b",
    ),
    "evve.pickle": Source(
        *_TCA,
        "datasets/evve.pickle",
        "0898fafc817b9457be25cafeefa996d78d1021fb4816a9e3c1a14b7493023410",
    ),
    "vcdb.pickle": Source(
        *_TCA,
        "datasets/vcdb.pickle",
        "6cec73506f401c4dc6d0af2757b2927307cff1dcb6f1c5d9d6775e358fefe4bf",
    ),
    "fivr_easy_duplicates.txt": Source(
        *_S2VS,
        "data/fivr_easy_duplicates.txt",
        "b50b7135d68d686c9a09f16196e134cab36d16007377c53f54c49ba83bc7efdb",
    ),
    "vcsl_pairs_test.csv": Source(
        *_TRANSVCL,
        "data/VCSL/pair_file.csv",
        "ed3aa5b1630ed6633157ba0b3046979ba5b8912eac0e0291151393c3bf510129",
    ),
    "vcsl_labels_test.json": Source(
        *_TRANSVCL,
        "data/VCSL/label_file.json",
        "7ed469d66cd026e09733ede19055dcd7d7525fa8d068d68a967bfb1dfe75a308",
    ),
    "vcdb_pairs.csv": Source(
        *_TRANSVCL,
        "data/VCDB/pair_file.csv",
        "ed1ec4bd8dcb3d725ad36897da5448705c4ee59cc34732a85890c1c5d498b577",
    ),
    "vcdb_segments.json": Source(
        *_TRANSVCL,
        "data/VCDB/label_file.json",
        "c1c0f3519e58ecab73ff82ffe6e5c32abb797d1a2400b36677c68e200b13fcd1",
    ),
}

SETS = {
    "FIVR-5K": ["fivr.pickle", "fivr_annotation.json", "fivr_easy_duplicates.txt"],
    "FIVR-200K": ["fivr_annotation.json", "fivr_youtube_ids.txt", "fivr_easy_duplicates.txt"],
    "CC_WEB_VIDEO": ["cc_web_video.pickle"],
    "EVVE": ["evve.pickle"],
    "VCDB": ["vcdb.pickle"],
    "VCSL": ["vcsl_pairs_test.csv", "vcsl_labels_test.json"],
    "VCDB-SEGMENTS": ["vcdb_pairs.csv", "vcdb_segments.json"],
}


def main(argv=None):
    args = parse_args(argv)
    for name in select_files(args.only):
        target, source = args.annotation_dir / name, FILES[name]
        if target.is_file() and file_sha256(target) == source.sha256:
            print(f"{name}: already there")
            continue
        outcome = "replaced, it was not the pinned file" if target.exists() else "fetched"
        location = args.folder / name if args.folder else url_of(source, args.mirror)
        with Lock(target):
            fetch(source, target, location)
        print(f"{name}: {outcome}")
    print(f"annotations are in {args.annotation_dir}")


def select_files(names: Sequence[str]) -> list[str]:
    """The files that names of sets and of files stand for, each once; all files if no name."""
    if not names:
        return list(FILES)
    selected = []
    for name in names:
        if name not in SETS and name not in FILES:
            raise InputError(
                f"--only {name!r} is not known; choose from {', '.join([*SETS, *FILES])}"
            )
        selected += SETS.get(name, [name])
    return list(dict.fromkeys(selected))


def url_of(source: Source, server: str) -> str:
    return f"{server.rstrip('/')}/{source.repository}/{source.revision}/{source.path}"


def fetch(source: Source, target: Path, location: Path | str) -> None:
    """Bring a file from `location`, a Path or a URL, to `target`.

    Raises:
        InputError: it cannot be fetched, or is not the pinned file; `target` is then unchanged
    """
    try:
        if isinstance(location, Path):
            stream = open(require_path(location, "annotation file"), "rb")
            size = location.stat().st_size
        else:
            stream = urllib.request.urlopen(location, timeout=TIMEOUT)
            size = int(stream.headers.get("Content-Length") or 0) or None
        with stream:
            write_pinned(stream, size, target, source.sha256, location)
    except (
        urllib.error.URLError,
        http.client.HTTPException,
        ConnectionError,
        TimeoutError,
        ValueError,  # not a URL
    ) as error:
        reason = str(error) or type(error).__name__
        raise InputError(
            f"{target.name} cannot be fetched from {location} ({reason}); check the network, or"
            " give --from a folder that has it"
        ) from None


def write_pinned(
    stream: BinaryIO, size: int | None, target: Path, sha256: str, location: Path | str
) -> None:
    """Write a stream of `size` bytes (None: unknown) to `target` if it has this SHA-256."""
    with atomic(target) as temporary:
        bar = tqdm(
            total=size, desc=target.name, unit="B", unit_scale=True, leave=False, disable=None
        )
        with bar, open(temporary, "wb") as file:
            while block := stream.read(BLOCK):
                file.write(block)
                bar.update(len(block))
        received = file_sha256(temporary)
        if received != sha256:
            expected_size = f" of {size}" if size else ""
            raise InputError(
                f"{target.name} from {location} is not the pinned file:"
                f" {temporary.stat().st_size} bytes came{expected_size}, with SHA-256"
                f" {received[:12]}... instead of {sha256[:12]}...;"
                " it was cut short or changed, and is not kept"
            )


def parse_args(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add(
        "--only",
        nargs="+",
        default=[],
        metavar="NAME",
        help=f"sets ({', '.join(SETS)}) or files (default: all files)",
    )
    add(
        "--from",
        dest="folder",
        metavar="DIR",
        type=Path,
        help="copy from this folder, in which the files are named as here",
    )
    add("--mirror", default=PUBLIC, metavar="URL", help="server (default %(default)s)")
    add(
        "--annotation_dir",
        default=ROOT / "datasets" / "annotations",
        type=Path,
        help="folder to fill (default datasets/annotations)",
    )
    args = parser.parse_args(argv)
    if args.folder:
        require_path(args.folder, "--from folder")
    if not args.mirror.startswith(("http://", "https://")):
        raise InputError(
            f"--mirror {args.mirror!r} is not an http address; for a folder use --from"
        )
    return args


if __name__ == "__main__":
    run_main(main)
