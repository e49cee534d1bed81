"""What an index may show: files that exist, each once, and no pair that was rejected."""

import os

from utils import file_sha256
from videoindex.moves import distinct_files
from videoindex.pipeline import EncodedVideo
from videoindex.store import IndexStore


class ShownFiles:
    """The files and pairs that the answers of one moment are made of; what it looks up it keeps."""

    def __init__(self, store: IndexStore):
        self.store = store
        self._paths: dict[int, list[str]] = {}
        self._rejected: dict[str, set[str]] = {}  # {sha256: {sha256}}, both ways
        for a, b in store.settings["rejected"]:
            self._rejected.setdefault(a, set()).add(b)
            self._rejected.setdefault(b, set()).add(a)
        self._digests = store.digests() if self._rejected else {}

    def paths(self, number: int) -> list[str]:
        """The files of a content that exist, sorted; links to one file are one."""
        if number not in self._paths:
            self._paths[number] = distinct_files(self.store.paths(number))
        return self._paths[number]

    def shared_contents(self) -> set[int]:
        """The contents that several files have."""
        return {number for number in self.store.shared_contents() if len(self.paths(number)) > 1}

    def may_pair(self, a: int, b: int) -> bool:
        """Whether two contents may be shown as copies: both have files, none said they are not."""
        partners = self._rejected.get(self._digests.get(a, ""), ())
        return self._digests.get(b) not in partners and bool(self.paths(a) and self.paths(b))

    def rejected_for(self, video: EncodedVideo) -> set[int]:
        """The contents that were rejected as matches of a video."""
        digests = rejected_digests(self.store, video.path) if self._rejected else set()
        return {number for number, digest in self._digests.items() if digest in digests}


def rejected_digests(store: IndexStore, path: str | os.PathLike) -> set[str]:
    """The SHA-256 of what was rejected in an index as a match of a file."""
    pairs = store.settings["rejected"]
    try:
        digest = file_sha256(path) if pairs else ""
    except OSError:  # a clip need not be a file
        return set()
    return {other for pair in pairs if digest in pair for other in pair if other != digest}
