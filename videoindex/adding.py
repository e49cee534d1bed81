"""Brings an index up to date with files and folders: what `VideoIndex.add` does under its lock."""

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction

from utils import file_sha256
from videoindex.moves import Drives, current_mounts, moved_from, require_sources
from videoindex.parts import FilmParts, remove_orphans, remove_parts
from videoindex.pipeline import Pipeline
from videoindex.results import AddProgress, IndexUpdate
from videoindex.sources import vanished_files
from videoindex.store import FileEntry, IndexStore

CHUNK = 128  # new files that are hashed, then encoded, together
CHUNK_BYTES = 16 << 30  # of these; a minute or two of hashing

Failed = Sequence[tuple[str, str]]  # [(path, reason)]


class Adding:
    """One update of a store, inside `IndexStore.writing`.

    Args:
        get_pipeline: loads the Pipeline; called only if there is something to encode.
        sources: the files and folders that were named.
        on_file, progress, part_seconds: see `VideoIndex.add`.
    """

    def __init__(
        self,
        store: IndexStore,
        get_pipeline: Callable[[], Pipeline],
        sources: Sequence[str | os.PathLike],
        on_file: Callable[[str, str], None],
        progress: AddProgress,
        part_seconds: float,
    ):
        self.store, self.get_pipeline, self.sources = store, get_pipeline, sources
        self.on_file, self.progress, self.part_seconds = on_file, progress, part_seconds
        self.folders = [source for source in sources if os.path.isdir(source)]
        self.known = store.known_files()  # before the update
        self.drives = Drives([])
        self.update = IndexUpdate()

    def run(
        self, found: Sequence[FileEntry], failed: Failed, prune: bool, retry_failed: bool
    ) -> IndexUpdate:
        """Add what is new of the files that were found, and forget what is gone if asked to."""
        if prune:
            require_sources(self.sources, self.known, found, self.store.folder)
        self._remember_mounts(found)
        if prune:
            failed = [*failed, *self.drives.absent_below(self.folders, self.known)]
        for path, reason in failed:
            self._fail(path, reason)
        changed = list(self._changed(found, retry_failed))
        self.progress.on_start([file.path for file in changed])
        for files in cut_chunks(changed):
            self._add_files(files)
        remove_orphans(
            self.store.folder, lambda sha256: self.store.find_content(sha256) is not None
        )
        if prune:
            vanished = vanished_files(self.known, self.sources, found, failed)
            gone = [path for path in vanished if not self.drives.absent_drive(path)]
            self.update.removed = self.store.remove(gone)
        return self.update

    def _remember_mounts(self, found):
        mounts = current_mounts(self.store.settings["mounts"], found)
        if mounts != self.store.settings["mounts"]:
            self.store.update_settings(mounts=mounts)
        self.drives = Drives(mounts)

    def _changed(self, found, retry_failed):
        """Yield the files that are new or changed; count and report the others."""
        failed_before = {} if retry_failed else self.store.failed_files()
        for file in found:
            before = self.known.get(file.path)
            if before and before.unchanged(file.size, file.mtime):
                self.update.unchanged += 1
            elif reason := failed_before.get(file):
                self._fail(file.path, f"{reason} (known; --retry_failed tries it again)")
            else:
                yield file

    def _add_files(self, files):
        """Link the files whose content is stored already; encode and store the others."""
        by_digest = {}  # of new content: {sha256: [FileEntry]}
        for file in files:
            self.progress.on_seconds(file.path, 0.0)
            try:
                digest = file_sha256(file.path)
            except OSError as error:
                self._fail(file.path, error.strerror)
                continue
            if content := self.store.find_content(digest):
                before = self.store.paths(content.id)
                moved = moved_from(before, file.path, self.folders, self.drives)
                self.store.link_files(content, [file], [moved] if moved else [])
                self._count([file], linked=True, moved=bool(moved))
            else:
                by_digest.setdefault(digest, []).append(file)
        if by_digest:
            self._encode_files(by_digest)

    def _encode_files(self, by_digest):
        """Encode and store new content, {sha256: [FileEntry]}."""
        # Of files with the same content, the first is encoded.
        digests = {same[0].path: digest for digest, same in by_digest.items()}
        pipeline, failed = self.get_pipeline(), {}
        rate = float(Fraction(pipeline.identity["fps"]))
        parts = FilmParts(self.store.folder, pipeline, math.ceil(self.part_seconds * rate))
        known_rows = {}
        for path, digest in digests.items():
            rows = parts.load(digest)
            if len(rows):
                known_rows[path] = rows
                self.progress.on_resume(path, len(rows) / rate)

        def on_row(path, rows):
            parts.save(digests[path], by_digest[digests[path]][0], rows)
            self.progress.on_seconds(path, len(rows) / rate)

        for video in pipeline.encode_videos(digests, known_rows, on_row):
            digest = digests[str(video.path)]
            if video.reason:
                for file in by_digest[digest]:
                    failed[file] = video.reason
                    self._fail(file.path, video.reason)
            else:
                self.store.add_content(digest, video, by_digest[digest])
                self._count(by_digest[digest])
            remove_parts(self.store.folder, digest)
        if failed:
            self.store.remember_failed(failed)

    # --- counting and reporting -----------------------------------------------------------------

    def _count(self, files, linked=False, moved=False):
        """Count files of one content; `linked`: the index had it before."""
        for i, file in enumerate(files):
            if moved:
                self.update.moved += 1
            elif file.path in self.known:
                self.update.replaced += 1
            elif linked or i:
                self.update.same_content += 1
            else:
                self.update.added += 1
            self._report(file.path, "")

    def _fail(self, path, reason):
        self.update.failed.append((path, reason))
        self._report(path, reason)

    def _report(self, path, reason):
        self.on_file(path, reason)
        self.progress.on_file(path, reason)


def cut_chunks(files: Iterable[FileEntry]) -> Iterator[list[FileEntry]]:
    """The files in lists of at most CHUNK files, and of CHUNK_BYTES or one file."""
    chunk, size = [], 0
    for file in files:
        if chunk and (len(chunk) == CHUNK or size + file.size > CHUNK_BYTES):
            yield chunk
            chunk, size = [], 0
        chunk.append(file)
        size += file.size
    if chunk:
        yield chunk
