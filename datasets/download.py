"""Fetch the public annotation files of the evaluation sets into datasets/annotations/.

    python datasets/download.py                        every file, from the public repositories (11 MB)
    python datasets/download.py --only FIVR-5K EVVE    what these sets need; a file's name does too
    python datasets/download.py --from FOLDER          from a copy at hand, no network
    python datasets/download.py --mirror URL           from a server with the public one's paths, REPOSITORY/REVISION/PATH

Each file is pinned by repository, revision and SHA-256 (`FILES`). A file that is there and right is left alone; bytes that are
not the pinned ones are refused, and nothing of them stays. datasets/README.md says what is in them and by whose licence.
"""

import hashlib
import http.client
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from distributed import run_main
from utils import InputError, Parser, atomic, file_sha256, remove_leftovers, require_path

PUBLIC = "https://raw.githubusercontent.com"
TIMEOUT = 30  # seconds without a byte


class Source(NamedTuple):
    """Where a file is public, and what it must be."""

    repository: str
    revision: str
    path: str
    sha256: str


_FIVR = ("MKLab-ITI/FIVR-200K", "77e3d8a9c159eed9a0b9686e2d62bc7ab3106e24")
_DNS = ("mever-team/distill-and-select", "f81a7ebb3afb87a7ecec428157cbddb6c954c659")
_TCA = ("xwen99/temporal_context_aggregation", "0ba11b2c2fff57d484bf2f788072c75f457c804e")
_S2VS = ("gkordo/s2vs", "03eb0c9a9a7455d132c4210b797fa6ef563b52ea")

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
}

SETS = {
    "FIVR-5K": ["fivr.pickle", "fivr_annotation.json"],
    "FIVR-200K": ["fivr_annotation.json", "fivr_youtube_ids.txt"],
    "CC_WEB_VIDEO": ["cc_web_video.pickle"],
    "EVVE": ["evve.pickle"],
    "VCDB": ["vcdb.pickle"],
}


def is_right(path, sha256):
    """Whether the file is there and is the pinned one."""
    if not path.is_file():
        return False
    return file_sha256(path) == sha256


def fetch(source, target, location):
    """Bring one file from `location`, a Path or a URL, to `target`.

    InputError when it cannot be had or is not the pinned one; `target` is then as it was.
    """
    try:
        if isinstance(location, Path):
            stream, size = (
                open(require_path(location, "annotation file"), "rb"),
                location.stat().st_size,
            )
        else:
            stream = urllib.request.urlopen(location, timeout=TIMEOUT)
            size = int(stream.headers.get("Content-Length") or 0) or None
        with stream:
            copy_checked(stream, size, location, source.sha256, target)
    except (
        urllib.error.URLError,
        http.client.HTTPException,
        ConnectionError,
        TimeoutError,
        ValueError,
    ) as error:
        raise InputError(
            f"{target.name} cannot be fetched from {location} ({str(error) or type(error).__name__}); check the network, or"
            " give --from a folder that has it"
        ) from None


def copy_checked(stream, size, location, sha256, target):
    """Write an open stream of `size` bytes (None: unknown) to `target`, if it is the pinned one to its last byte."""
    remove_leftovers(target)
    digest = hashlib.sha256()
    with atomic(target) as temporary, open(temporary, "wb") as file:
        with tqdm(
            total=size, desc=target.name, unit="B", unit_scale=True, leave=False, disable=None
        ) as bar:
            while block := stream.read(1 << 18):
                digest.update(block)
                file.write(block)
                bar.update(len(block))
        if digest.hexdigest() != sha256:
            raise InputError(
                f"{target.name} from {location} is not the pinned file: {file.tell()} bytes came"
                + (f" of {size}" if size else "")
                + f", of SHA-256 {digest.hexdigest()[:12]}... instead of {sha256[:12]}...; cut short or changed, it is not kept"
            )


def chosen(names):
    """The files that sets and file names stand for, each once; all of them for no name."""
    unknown = [name for name in names if name not in SETS and name not in FILES]
    if unknown:
        raise InputError(
            f"--only {unknown[0]!r} is not known; choose from {', '.join([*SETS, *FILES])}"
        )
    return list(dict.fromkeys(file for name in names for file in SETS.get(name, [name]))) or list(
        FILES
    )


def parse(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add(
        "--only",
        nargs="+",
        default=[],
        metavar="NAME",
        help=f"sets ({', '.join(SETS)}) or files; default all files",
    )
    add(
        "--from",
        dest="folder",
        metavar="DIR",
        type=Path,
        help="copy from this folder, where the files have the names used here",
    )
    add(
        "--mirror", default=PUBLIC, metavar="URL", help="server to fetch from (default %(default)s)"
    )
    add(
        "--annotation_dir",
        default=HERE / "annotations",
        type=Path,
        help="folder to fill (default datasets/annotations)",
    )
    args = parser.parse_args(argv)
    if args.folder:
        require_path(args.folder, "--from folder")
    if not args.mirror.startswith(("http://", "https://")):
        raise InputError(f"--mirror {args.mirror!r} is no http address; for a folder use --from")
    return args


def main():
    args = parse()
    for name in chosen(args.only):
        target, source = args.annotation_dir / name, FILES[name]
        if is_right(target, source.sha256):
            print(f"{name}: already there")
            continue
        found = "replaced, it was not the pinned file" if target.exists() else "fetched"
        url = f"{args.mirror.rstrip('/')}/{source.repository}/{source.revision}/{source.path}"
        fetch(source, target, args.folder / name if args.folder else url)
        print(f"{name}: {found}")
    print(f"annotations are in {args.annotation_dir}")


if __name__ == "__main__":
    run_main(main)
