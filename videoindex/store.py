"""The folder of an index: descriptors, thumbnails, and the files that they belong to.

    index.db            SQLite: files, contents, where their data lies, settings
    frames-G.f16        frame descriptors (sum T, D), half precision, read through a memory map
    videos-G.f32        window descriptors (sum P, D), one for each window of a video
    thumbnails-G.jpg    JPEGs one after another
    ann-G-*.faiss       a trained FAISS index over videos-G, if `index_type` is not Flat
    .lock               while a process writes: who

The folder is consistent at any moment, also after a kill. Data files only grow: bytes are appended
and synced, then one transaction records the new end. Bytes past the recorded end were left by a
killed writer and are overwritten. So adding a video costs what that video adds, and no more.

Removal leaves holes. If they are more than half of the data, `compact` writes the data files of
generation G + 1, and one transaction switches to them.

Files of identical content (equal SHA-256) share one entry.

A reader needs no lock and lives through what writers do. What it reads of a video is of one moment;
if `compact` has moved the data since, it is read again from where it lies now. An IndexStore may be
used by any thread, and in a process that was forked: each has its own connection to the database.
"""

import contextlib
import json
import mmap
import os
import sqlite3
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import utils
from files import Lock, atomic, remove_leftovers
from utils import InputError, one_line
from videoindex import schema

PATIENCE = 30  # seconds to wait for another process that is writing the database
PAGE = 1000  # contents read at a time: an open cursor would keep writers waiting
# The kinds of data, in the order in which a checksum runs over them.
FILES = {"frames": "frames-{}.f16", "videos": "videos-{}.f32", "thumbnails": "thumbnails-{}.jpg"}


class Content(NamedTuple):
    """A row of the table `contents`: what the index holds of one video content.

    id: its number in the index
    seconds: how long it plays
    num_frames, first_frame: its rows of frames-G (T of them)
    num_windows, first_window: its rows of videos-G (P of them)
    jpeg_sizes: the bytes of each thumbnail, T int32 as a blob
    first_byte: where its first thumbnail begins in thumbnails-G
    generation: G, when the row was read
    """

    id: int
    sha256: str
    seconds: float
    num_frames: int
    first_frame: int
    num_windows: int
    first_window: int
    jpeg_sizes: bytes
    first_byte: int
    checksum: int
    generation: int = 0


class WindowTable(NamedTuple):
    """The window descriptors of an index at one moment.

    generation: of the file that they lie in
    owners: (sum P,) int64, the content that each belongs to, -1 for a hole
    descriptors: (sum P, D) float32, a view of the memory map
    """

    generation: int
    owners: np.ndarray
    descriptors: np.ndarray


class FileEntry(NamedTuple):
    """A file of the index, by its absolute path, as it was when it was indexed."""

    path: str
    size: int  # bytes
    mtime: int  # ns


class KnownFile(NamedTuple):
    """What the index stores about a path."""

    size: int
    mtime: int
    content: int

    def unchanged(self, size: int, mtime: int) -> bool:
        return (self.size, self.mtime) == (size, mtime)


@contextlib.contextmanager
def database_errors(folder: Path) -> Iterator[None]:
    """Raise InputError for a full disk, and for a locked or a broken database."""
    try:
        yield
    except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
        reason = one_line(str(error))[:200]
        raise InputError(f"index {str(folder)!r}: {reason}; {_advice(error)}") from None
    except OSError as error:
        reason = error.strerror or error
        raise InputError(
            f"index {str(folder)!r}: {reason}; what was added before is intact"
        ) from None


def _advice(error):
    """What may be behind an error of SQLite, and what to do."""
    code = (getattr(error, "sqlite_errorcode", None) or 0) & 0xFF  # without its details
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL):
        return (
            "another program holds index.db, or its file system has no locks;"
            " close it there, or copy the index to a local disk"
        )
    if code == sqlite3.SQLITE_FULL:
        return "what was added before is intact; make room and repeat the command"
    return "is the disk full, or the index damaged?"


class RemovedError(InputError):
    """Another process has removed what was to be read; what is asked anew finds it gone."""


class IndexStore:
    """The files of an index.

    Reading needs no lock. Writing happens inside `with store.writing():`, one process at a time.

    Raises:
        InputError: if the folder does not hold an index, or its database cannot be read.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = utils.require_path(folder, "index")
        # The generation and the frame descriptors as they were mapped last.
        self._mapped_frames: tuple[int | None, np.ndarray] = None, np.empty((0, 0))
        if not (self.folder / "index.db").is_file():
            raise InputError(
                f"{str(folder)!r} is not an index (it has no index.db);"
                " make one with `search.py index`"
            )
        with database_errors(folder):
            schema.require_own_files(self.folder)
            self._connections = threading.local()
            schema.check_tables(self.db, self.folder)
            self.db.execute("BEGIN")  # settings and rows of one moment
            self.settings = self._read_settings()
            schema.check_rows(self.db, self.settings, self.folder)
            self.db.execute("COMMIT")

    def __reduce__(self):  # a copy in another process opens the folder there
        return IndexStore, (self.folder,)

    @property
    def db(self) -> sqlite3.Connection:
        """The connection to the database of this thread in this process."""
        mine = self._connections
        if getattr(mine, "process", None) != os.getpid():  # a fork must not use its parent's
            mine.db = schema.connect(self.folder / "index.db", PATIENCE)
            mine.process = os.getpid()
        return mine.db

    @classmethod
    def create(cls, folder: str | os.PathLike, size: int, settings: dict[str, Any]) -> "IndexStore":
        """Create an index for descriptors of `size` values; the folder may hold other files.

        If another process has created one since the caller looked, that one is opened.
        """
        folder = Path(folder)
        initial = {
            "version": schema.VERSION,
            "size": size,
            "generation": 0,
            "ends": [0, 0, 0],  # frames, windows, bytes of thumbnails
            **settings,
        }
        with database_errors(folder):
            with Lock(folder, folder=True):
                if not (folder / "index.db").exists():
                    _write_database(folder / "index.db", initial)
        return cls(folder)

    # --- settings -------------------------------------------------------------------------------

    def _read_settings(self):
        return schema.read_settings(self.db, self.folder)

    def refresh(self) -> None:
        """Read the settings again, which another process may have changed."""
        with database_errors(self.folder):
            self.settings = self._read_settings()

    def _write_settings(self, **values):
        rows = [(name, json.dumps(value)) for name, value in values.items()]
        self.db.executemany("INSERT OR REPLACE INTO settings VALUES (?, ?)", rows)

    def update_settings(self, **values: Any) -> None:
        """Change settings, inside `writing`."""
        with database_errors(self.folder), self._transaction():
            self._write_settings(**values)
        self.settings |= values

    def remember_failed(self, failed: dict[FileEntry, str]) -> None:
        """Add to `failed_files`, inside `writing`; files that changed or are gone are forgotten."""
        paths = {file.path for file in failed}
        kept = {}
        for file, reason in self.failed_files().items():
            if file.path not in paths and os.path.exists(file.path):
                kept[file] = reason
        rows = [[*file, reason] for file, reason in (kept | failed).items()]
        self.update_settings(failed=rows)

    # --- reading --------------------------------------------------------------------------------

    def data_path(self, kind: str, generation: int | None = None) -> Path:
        """The data file of a kind, of the current generation by default."""
        if generation is None:
            generation = self.settings["generation"]
        return self.folder / FILES[kind].format(generation)

    def _contents(self, where, values=(), limit=-1):
        generation = "(SELECT CAST(value AS INTEGER) FROM settings WHERE name = 'generation')"
        query = f"SELECT *, {generation} FROM contents WHERE {where} ORDER BY id LIMIT ?"
        return [Content._make(row) for row in self._rows(query, (*values, limit))]

    def _rows(self, query, values=()):
        """The rows of a query, read at once."""
        with database_errors(self.folder):
            return self.db.execute(query, values).fetchall()

    def contents(self) -> Iterator[Content]:
        """All contents in the order in which they were added."""
        page = self._contents("1", limit=PAGE)
        while page:
            yield from page
            page = self._contents("id > ?", (page[-1].id,), PAGE)

    def content(self, number: int) -> Content | None:
        """The content of this number."""
        return next(iter(self._contents("id = ?", (number,))), None)

    def paths(self, number: int) -> list[str]:
        """The files that have this content, sorted."""
        query = "SELECT path FROM files WHERE content = ? ORDER BY path"
        return [os.fsdecode(path) for (path,) in self._rows(query, (number,))]

    def known_files(self) -> dict[str, KnownFile]:
        """Every file of the index: {path: KnownFile}."""
        rows = self._rows("SELECT path, size, mtime, content FROM files")
        return {os.fsdecode(path): KnownFile(*facts) for path, *facts in rows}

    @property
    def frame_rule(self) -> str:
        """Which frames of a video were taken, an entry of FRAME_RULES."""
        return self.settings["frame_rule"]

    def failed_files(self) -> dict[FileEntry, str]:
        """{file: reason} of the files that could not be encoded, as they were then."""
        failed = {}
        for path, size, mtime, reason in self.settings["failed"]:
            failed[FileEntry(path, size, mtime)] = reason
        return failed

    def num_files(self) -> int:
        return self._rows("SELECT count(*) FROM files")[0][0]

    def totals(self) -> tuple[int, int, float]:
        """How many contents there are, their frames, their seconds."""
        columns = "count(*), coalesce(sum(frames), 0), coalesce(sum(seconds), 0)"
        return self._rows(f"SELECT {columns} FROM contents")[0]

    def frame_counts(self) -> dict[int, int]:
        """The number of frames of every content, by its number."""
        return dict(self._rows("SELECT id, frames FROM contents"))

    def digests(self) -> dict[int, str]:
        """The SHA-256 of every content, by its number."""
        return dict(self._rows("SELECT id, sha256 FROM contents"))

    def shared_contents(self) -> set[int]:
        """The contents that several files have."""
        query = "SELECT content FROM files GROUP BY content HAVING count(*) > 1"
        return {number for (number,) in self._rows(query)}

    def frame_descriptors(self, content: Content) -> np.ndarray:
        """The frame descriptors (T, D) float16 of a content, a view of the memory map."""
        rows = self._read(content, self._frame_rows)
        if len(rows) and not rows[0, 0] and not rows.any():  # lost blocks; no descriptor is zero
            raise InputError(f"index {str(self.folder)!r}: {self._damage(content)}")
        return rows

    def _read(self, content: Content, read: Callable[[Content], Any]) -> Any:
        """`read(content)`; once more if another process has compacted the index meanwhile."""
        while True:
            try:
                return read(content)
            except FileNotFoundError as error:
                now = self.content(content.id)
                if now is None or now.sha256 != content.sha256:
                    raise self._removed() from None
                if now.generation == content.generation:
                    raise InputError(self._cut_short(error)) from None
                content = now

    def _removed(self):
        return RemovedError(
            f"index {str(self.folder)!r}: another process has removed a video meanwhile;"
            " repeat the command"
        )

    def _cut_short(self, error):
        name = os.path.basename(error.filename)
        return f"index {str(self.folder)!r}: {name} is missing or cut short ({error})"

    def _frame_rows(self, content):
        """`frame_descriptors`, unchecked, from where the content says that they lie."""
        end = content.first_frame + content.num_frames
        num_rows = self._end(0, end, content)
        generation, frames = self._mapped_frames
        if generation != content.generation or len(frames) < num_rows:  # mapping costs most of it
            frames = self._map("frames", content.generation, num_rows, np.float16)
            self._mapped_frames = content.generation, frames
        return frames[content.first_frame : end]

    def release_pages(self) -> None:
        """Release the frame descriptors' pages (MADV_DONTNEED): they count as resident memory."""
        _, frames = self._mapped_frames
        if isinstance(frames, np.memmap):
            frames._mmap.madvise(mmap.MADV_DONTNEED)

    def window_table(self) -> WindowTable:
        """The window descriptors of the whole index, holes included, and whose they are."""
        while True:
            with database_errors(self.folder), self._snapshot():
                self.settings = self._read_settings()
                rows = self._rows("SELECT id, piece, pieces FROM contents")
            generation, num_rows = self.settings["generation"], self.settings["ends"][1]
            owners = np.full(num_rows, -1)
            for number, first, count in rows:
                owners[first : first + count] = number
            try:
                descriptors = self._map("videos", generation, num_rows, np.float32)
                return WindowTable(generation, owners, descriptors)
            except FileNotFoundError as error:
                if self._read_settings()["generation"] == generation:
                    raise InputError(self._cut_short(error)) from None

    @contextlib.contextmanager
    def _snapshot(self):
        """In this block, all that is read from the database is of one moment."""
        if self.db.in_transaction:
            yield
            return
        self.db.execute("BEGIN")
        try:
            yield
        finally:
            self.db.execute("COMMIT")

    def window_state(self) -> tuple[int | None, ...]:
        """A value that changes when the window descriptors do. Reads the settings again."""
        with database_errors(self.folder), self._snapshot():
            self.settings = self._read_settings()
            (counts,) = self._rows("SELECT count(*), max(id) FROM contents")
        return self.settings["generation"], *self.settings["ends"], *counts

    def window_descriptors(self, content: Content) -> np.ndarray:
        """The window descriptors (P, D) float32 of a content, a view of the memory map."""
        return self._read(content, self._window_rows)

    def _window_rows(self, content):
        end = content.first_window + content.num_windows
        windows = self._map("videos", content.generation, self._end(1, end, content), np.float32)
        return windows[content.first_window : end]

    def _end(self, kind, end, content):
        """The rows that a data file has at least, so that a file that was cut short is noticed."""
        same = content.generation == self.settings["generation"]
        return max(end, self.settings["ends"][kind]) if same else end

    def _map(self, kind, generation, num_rows, dtype):
        """The first rows of a data file as a memory map (num_rows, D).

        Raises:
            FileNotFoundError: there is no such file (any more).
        """
        shape = num_rows, self.settings["size"]
        if not num_rows:  # the file need not exist yet
            return np.empty(shape, dtype)
        path = self.data_path(kind, generation)
        try:
            return np.memmap(path, dtype, "r", shape=shape)
        except FileNotFoundError:
            raise
        except (OSError, ValueError, OverflowError) as error:
            raise InputError(
                f"index {str(self.folder)!r}: {path.name} is missing or cut short ({error})"
            ) from None

    def thumbnails(self, content: Content, frame_numbers: Iterable[int]) -> list[bytes]:
        """The JPEGs of some frames of a content."""
        with database_errors(self.folder), self._read(content, self._open_thumbnails) as file:
            begin, sizes = file.tell(), self._jpeg_sizes(content, file)
            starts = begin + np.cumsum([0, *sizes])
            jpegs = []
            for i in frame_numbers:
                file.seek(starts[i])
                jpegs.append(file.read(sizes[i]))
        return jpegs

    def _open_thumbnails(self, content):
        """The file of the thumbnails, at the content's first."""
        file = open(self.data_path("thumbnails", content.generation), "rb")
        file.seek(content.first_byte)
        return file

    def _jpeg_sizes(self, content, file):
        """The bytes (T,) int32 of a content's thumbnails, which lie in the open file from here."""
        sizes = np.frombuffer(content.jpeg_sizes, np.int32)
        end = file.tell() + int(sizes.sum(dtype=np.int64))
        if sizes.min() < 0 or end > os.fstat(file.fileno()).st_size:
            raise InputError(
                f"index {str(self.folder)!r}: the thumbnails of video {content.id} are damaged"
            )
        return sizes

    # --- writing --------------------------------------------------------------------------------

    @contextlib.contextmanager
    def writing(self) -> Iterator["IndexStore"]:
        """Lock the index for writing; raises InputError if another process writes."""
        with database_errors(self.folder), Lock(self.folder, folder=True) as lock:
            for path in self.folder.glob(".*"):  # temporary files are .NAME.OWNER.RANDOM.SUFFIX
                remove_leftovers(path.with_name(path.name[1:].rsplit(".", 3)[0]), lock)
            schema.require_own_files(self.folder)
            schema.allow_writing(self.db, True)
            self.settings = self._read_settings()  # another process may have written meanwhile
            self._remove_leftovers()
            try:
                yield self
            finally:
                schema.allow_writing(self.db, False)

    @contextlib.contextmanager
    def _transaction(self):
        self.db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self.db.execute("COMMIT")
        except BaseException:
            with contextlib.suppress(sqlite3.Error):
                self.db.execute("ROLLBACK")
            self.settings = self._read_settings()
            self._truncate_data()  # a full disk gets its space back
            raise

    def _offsets(self, ends):
        """The byte offset in each data file: {kind: bytes} for `ends`, as in the settings."""
        frames, windows, thumbnails = ends
        size = self.settings["size"]
        return {"frames": frames * size * 2, "videos": windows * size * 4, "thumbnails": thumbnails}

    def _truncate_data(self):
        """Cut the data files at the end that the database records."""
        for kind, end in self._offsets(self.settings["ends"]).items():
            path = self.data_path(kind)
            if path.exists() and path.stat().st_size > end:
                os.truncate(path, end)

    def _remove_leftovers(self):
        """Remove what killed writers left: bytes past the ends, files of other generations."""
        self._truncate_data()
        generation = self.settings["generation"]
        for kind, pattern in FILES.items():
            for path in self.folder.glob(pattern.format("*")):
                if path.name != self.data_path(kind).name:
                    path.unlink()
        for path in self.folder.glob("ann-*.faiss"):
            if not path.name.startswith(f"ann-{generation}-"):
                path.unlink()

    def add_content(self, sha256: str, video: Any, files: Sequence[FileEntry]) -> None:
        """Add a video and the files that have it.

        A path that is in the index already is moved to the new content.

        Args:
            video: an EncodedVideo.
        """
        frames = np.ascontiguousarray(video.frame_descriptors)
        windows = np.ascontiguousarray(video.window_descriptors)
        data = {
            "frames": frames.tobytes(),
            "videos": windows.tobytes(),
            "thumbnails": b"".join(video.thumbnails),
        }
        jpeg_sizes = np.array([len(jpeg) for jpeg in video.thumbnails], np.int32)
        starts = self.settings["ends"]
        ends = [
            starts[0] + len(frames),
            starts[1] + len(windows),
            starts[2] + len(data["thumbnails"]),
        ]
        row = (
            sha256,
            video.seconds,
            *(len(frames), starts[0]),
            *(len(windows), starts[1]),
            *(jpeg_sizes.tobytes(), starts[2]),
            checksum(data),
        )
        with database_errors(self.folder), self._transaction():
            self._append_data(self.settings["generation"], starts, data)
            insert = "INSERT INTO contents VALUES (NULL, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
            number = self.db.execute(insert, row).lastrowid
            self._write_settings(ends=ends)
            self._set_content(files, number)
        self.settings["ends"] = ends

    def _append_data(self, generation, starts, data):
        """Write `data` {kind: bytes} at the ends of the data files, and sync it to the disk."""
        for kind, offset in self._offsets(starts).items():
            path = self.data_path(kind, generation)
            with open(path, "r+b" if path.exists() else "w+b") as file:
                file.seek(offset)
                file.write(data[kind])
                file.flush()
                os.fsync(file.fileno())

    def find_content(self, sha256: str) -> Content | None:
        """The content with this digest."""
        return next(iter(self._contents("sha256 = ?", (sha256,))), None)

    def link_files(
        self, content: Content, files: Sequence[FileEntry], moved_from: Sequence[str] = ()
    ) -> None:
        """Add files whose content is stored already, and forget the paths that they had before."""
        with database_errors(self.folder), self._transaction():
            self._set_content(files, content.id)
            rows = [(os.fsencode(path),) for path in moved_from]
            self.db.executemany("DELETE FROM files WHERE path = ?", rows)

    def _set_content(self, files, number):
        """Record that `files` have this content, and forget contents left without a file."""
        before = self._contents_of([file.path for file in files])
        rows = [(os.fsencode(path), size, mtime, number) for path, size, mtime in files]
        self.db.executemany("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?)", rows)
        self._drop_orphans(before)

    def _contents_of(self, paths):
        """The contents of those paths that are in the index."""
        numbers = []
        for path in paths:
            query = "SELECT content FROM files WHERE path = ?"
            numbers += [number for (number,) in self.db.execute(query, (os.fsencode(path),))]
        return numbers

    def _drop_orphans(self, numbers):
        """Delete those of the contents that no file has any more."""
        orphan = "NOT EXISTS (SELECT 1 FROM files WHERE content = contents.id)"
        rows = [(number,) for number in numbers]
        self.db.executemany(f"DELETE FROM contents WHERE id = ? AND {orphan}", rows)

    def remove(self, paths: Iterable[str]) -> int:
        """Forget these files; returns how many of them the index knew."""
        paths = list(paths)
        with database_errors(self.folder), self._transaction():
            before = self._contents_of(paths)
            rows = [(os.fsencode(path),) for path in paths]
            self.db.executemany("DELETE FROM files WHERE path = ?", rows)
            self._drop_orphans(before)
        return len(before)

    # --- compaction -----------------------------------------------------------------------------

    def hole_share(self) -> float:
        """The share of the frame rows that no content uses, 0 to 1."""
        total = self.settings["ends"][0]
        _, used, _ = self.totals()
        return 1 - used / total if total else 0.0

    def compact(self) -> None:
        """Write the next generation of the data files, without holes, and switch to it."""
        old_files = [self.data_path(kind) for kind in FILES]
        with database_errors(self.folder):
            self._write_next_generation()
            self.settings = self._read_settings()
            for path in old_files:
                path.unlink(missing_ok=True)
            self._remove_leftovers()

    def _write_next_generation(self):
        generation = self.settings["generation"] + 1
        new_files = [self.data_path(kind, generation) for kind in FILES]
        for path in new_files:
            path.unlink(missing_ok=True)  # of a compaction that was killed
        ends, moved = [0, 0, 0], []
        try:
            for content in self.contents():
                data = self.stored_bytes(content)
                self._append_data(generation, ends, data)
                moved.append((*ends, content.id))
                ends = [
                    ends[0] + content.num_frames,
                    ends[1] + content.num_windows,
                    ends[2] + len(data["thumbnails"]),
                ]
            with self._transaction():
                update = "UPDATE contents SET frame = ?, piece = ?, thumbnail = ? WHERE id = ?"
                self.db.executemany(update, moved)
                self._write_settings(generation=generation, ends=ends)
        except BaseException:  # a full disk gets its space back
            for path in new_files:
                path.unlink(missing_ok=True)
            raise

    # --- checking -------------------------------------------------------------------------------

    def stored_bytes(self, content: Content) -> dict[str, bytes]:
        """The data of a content as it is stored: {kind: bytes}."""
        return self._read(content, self._stored_bytes)

    def _stored_bytes(self, content):
        with self._open_thumbnails(content) as file:
            thumbnails = file.read(int(self._jpeg_sizes(content, file).sum()))
        return {
            "frames": self._frame_rows(content).tobytes(),
            "videos": self._window_rows(content).tobytes(),
            "thumbnails": thumbnails,
        }

    def is_intact(self, content: Content) -> bool:
        """Whether the data of a content is what was written."""
        try:
            return checksum(self.stored_bytes(content)) == content.checksum
        except (OSError, InputError, ValueError):
            return False

    def _is_stored(self, content):
        """Whether the index holds the content still."""
        now = self.content(content.id)
        return now is not None and now.sha256 == content.sha256

    def require_intact(self, content: Content) -> None:
        """Raise InputError if the data of a content is not what was written."""
        if not self.is_intact(content):
            if not self._is_stored(content):
                raise self._removed()
            raise InputError(f"index {str(self.folder)!r}: {self._damage(content)}")

    def require_content(self, number: int) -> Content:
        """The content of a number; RemovedError if the index has it no longer."""
        content = self.content(number)
        if content is None:
            raise self._removed()
        return content

    def require_paths(self, number: int) -> list[str]:
        """As `paths`, of which a content that is stored has one at least; else RemovedError."""
        if not (paths := self.paths(number)):
            raise self._removed()
        return paths

    def _damage(self, content):
        names = "; ".join(map(repr, self.paths(content.id)))
        return f"{names}: its data is damaged; remove it and index it again"

    def find_damage(self) -> Iterator[str]:
        """Read everything, and yield a line for what differs from what was written."""
        with database_errors(self.folder):
            for (line,) in self._rows("PRAGMA integrity_check"):
                if line != "ok":
                    yield f"index.db: {one_line(line)}"
            for content in self.contents():
                if not self.is_intact(content) and self._is_stored(content):
                    yield self._damage(content)

    def disk_bytes(self) -> int:
        """The size of all files of the index."""
        return sum(path.stat().st_size for path in self.folder.iterdir() if path.is_file())


def _write_database(path, settings):
    """Write the database of an empty index; it appears complete, or not at all."""
    with atomic(path) as temporary:
        db = sqlite3.connect(temporary)
        db.executescript(schema.SCHEMA)
        rows = [(name, json.dumps(value)) for name, value in settings.items()]
        db.executemany("INSERT INTO settings VALUES (?, ?)", rows)
        db.commit()
        db.close()


def checksum(data: dict[str, bytes]) -> int:
    """CRC-32 over the data of a content."""
    value = 0
    for kind in FILES:
        value = zlib.crc32(data[kind], value)
    return value
