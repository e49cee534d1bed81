"""Pairs of videos that a person said are no match; an index never shows them again.

They are stored by the SHA-256 of both files: so a pair stays rejected when a file is moved, or
removed and indexed again.
"""

import os
from collections.abc import Callable, Iterable

from utils import InputError, file_sha256
from videoindex.store import IndexStore, KnownFile

Pair = tuple[str, str]


def reject(
    store: IndexStore, pairs: Iterable[Pair], on_error: Callable[[InputError], None] | None = None
) -> int:
    """Remember pairs of files as no match; the number of pairs that were not yet known as that.

    Args:
        on_error: called for a pair that cannot be rejected; by default its error is raised.

    Raises:
        InputError: a file is neither in the index nor on the disk, or both have the same content
    """
    with store.writing():
        stored = _stored_pairs(store)
        new = _digests(store, pairs, on_error) - stored
        if new:
            store.update_settings(rejected=sorted(map(list, stored | new)))
    return len(new)


def undo_reject(store: IndexStore, pairs: Iterable[Pair]) -> int:
    """Forget that pairs of files are no match; the number of pairs that were known as that."""
    with store.writing():
        stored = _stored_pairs(store)
        undone = _digests(store, pairs) & stored
        if undone:
            store.update_settings(rejected=sorted(map(list, stored - undone)))
    return len(undone)


def rejected_pairs(store: IndexStore) -> list[tuple[list[str], list[str]]]:
    """The files of both sides of each rejected pair; of one not in the index, "sha256 ..."."""
    store.refresh()
    paths: dict[str, list[str]] = {}
    for number, digest in store.digests().items():
        paths[digest] = store.paths(number)
    pairs = []
    for a, b in sorted(_stored_pairs(store)):
        pairs.append((paths.get(a, [f"sha256 {a}"]), paths.get(b, [f"sha256 {b}"])))
    return pairs


def _stored_pairs(store):
    return {tuple(pair) for pair in store.settings["rejected"]}


def _digests(store, pairs, on_error=None):
    """{(sha256, sha256)} of pairs of files, each pair sorted."""
    known, digests = store.known_files(), store.digests()
    found = set()
    for a, b in pairs:
        try:
            first, second = (_digest(path, known, digests) for path in (a, b))
            if first == second:
                raise InputError(f"{a!r} and {b!r} are the same byte for byte, so they do match")
        except InputError as error:
            if on_error is None:
                raise
            on_error(error)
        else:
            found.add(tuple(sorted((first, second))))
    return found


def _digest(path: str, known: dict[str, KnownFile], digests: dict[int, str]) -> str:
    """The SHA-256 of a file as it is in the index, or of a clip that is not in it."""
    path = os.path.abspath(path)
    if path in known:
        return digests[known[path].content]
    if not os.path.isfile(path):
        raise InputError(f"{path!r} is neither in the index nor a file; check the path")
    return file_sha256(path)
