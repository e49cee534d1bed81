"""The folder that `search.py` keeps: descriptors, thumbnails and what they belong to, safe against a kill at any moment.

    index.db            SQLite: which files, of which contents, where those lie in the files below; the model's identity
    frames-G.f16        frame descriptors (sum T, D), half precision, read through a memory map
    videos-G.f32        video descriptors (sum P, D), one a window of a video
    thumbnails-G.jpg    JPEGs one after another
    ann-G-*.faiss       a trained FAISS index over videos-G, where `index_type` is not Flat
    lock                held while something writes

Data files only grow: bytes are appended and synced, then one transaction vouches for them; what a killed writer left behind
its end is overwritten. So adding costs what is added. Removing leaves holes; when they are more than half, `compact` writes
generation G + 1 and one transaction turns to it. Two files of the same content share one entry, by their SHA-256.
"""

import contextlib
import fcntl
import json
import os
import sqlite3
import zlib
from pathlib import Path

import numpy as np

import utils
from utils import InputError

VERSION = 1
SCHEMA = """
CREATE TABLE settings (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE contents (
    id INTEGER PRIMARY KEY, sha256 TEXT UNIQUE NOT NULL, seconds REAL NOT NULL,
    frames INTEGER NOT NULL, frame INTEGER NOT NULL,      -- how many rows of frames-G, and the first
    pieces INTEGER NOT NULL, piece INTEGER NOT NULL,      -- the same of videos-G
    sizes BLOB NOT NULL, thumbnail INTEGER NOT NULL,      -- bytes of each JPEG (int32), and where the first begins
    checksum INTEGER NOT NULL);                           -- CRC-32 of all three
CREATE TABLE files (
    path BLOB PRIMARY KEY, size INTEGER NOT NULL, mtime INTEGER NOT NULL, content INTEGER NOT NULL REFERENCES contents);
CREATE INDEX files_by_content ON files (content);
"""
FILES = {"frames": "frames-{}.f16", "videos": "videos-{}.f32", "thumbnails": "thumbnails-{}.jpg"}
BLOCK = 65536  # rows handled at a time


@contextlib.contextmanager
def one_line(folder):
    """Turn what a full disk, a locked or a broken database raises into an InputError."""
    try:
        yield
    except sqlite3.DatabaseError as error:
        raise InputError(
            f"index {str(folder)!r}: {error}; is the disk full, or the index damaged?"
        ) from None
    except OSError as error:
        raise InputError(
            f"index {str(folder)!r}: {error.strerror or error}; what was added before stays good"
        ) from None


class Store:
    """The files of an index. Reading needs no lock; `with store.writing():` holds it, for one process at a time.

    Raises InputError for a folder that is no index, or one that is damaged beyond reading.
    """

    def __init__(self, folder):
        self.folder = utils.require_path(folder, "index")
        if not (self.folder / "index.db").is_file():
            raise InputError(
                f"{str(folder)!r} is no index (it has no index.db); make one with `search.py index`"
            )
        with one_line(folder):
            self.db = sqlite3.connect(self.folder / "index.db", timeout=30, isolation_level=None)
            self.settings = self._settings()
        if self.settings.get("version") != VERSION:
            version = self.settings.get("version")
            raise InputError(
                f"index {str(folder)!r} is of version {version}, this program makes {VERSION}; make it anew"
            )

    @classmethod
    def create(cls, folder, size, settings):
        """A new index in `folder` (which may hold other things) for descriptors of `size`."""
        folder = Path(folder)
        with one_line(folder):
            folder.mkdir(parents=True, exist_ok=True)
            first = {
                "version": VERSION,
                "size": size,
                "generation": 0,
                "ends": [0, 0, 0],
                **settings,
            }
            with utils.atomic(
                folder / "index.db"
            ) as temporary:  # an index is there whole, or not at all
                db = sqlite3.connect(temporary)
                db.executescript(SCHEMA)
                db.executemany(
                    "INSERT INTO settings VALUES (?, ?)",
                    [(k, json.dumps(v)) for k, v in first.items()],
                )
                db.commit()
                db.close()
        return cls(folder)

    def _settings(self):
        return {
            name: json.loads(value)
            for name, value in self.db.execute("SELECT name, value FROM settings")
        }

    def _set(self, **values):
        for name, value in values.items():
            self.db.execute(
                "INSERT OR REPLACE INTO settings VALUES (?, ?)", (name, json.dumps(value))
            )

    def set(self, **values):
        """Change settings, within `writing`."""
        with one_line(self.folder), self._transaction():
            self._set(**values)
        self.settings |= values

    def path(self, kind, generation=None):
        return self.folder / FILES[kind].format(
            self.settings["generation"] if generation is None else generation
        )

    # --- reading -----------------------------------------------------------------------------------------------------

    def rows(self, where="1", values=()):
        """The contents, as sqlite3.Row, in the order they were added."""
        cursor = self.db.cursor()
        cursor.row_factory = sqlite3.Row
        return cursor.execute(f"SELECT * FROM contents WHERE {where} ORDER BY id", values)

    def content(self, number):
        return self.rows("id = ?", (number,)).fetchone()

    def paths(self, content):
        """The files of a content, by name."""
        found = self.db.execute(
            "SELECT path FROM files WHERE content = ? ORDER BY path", (content,)
        )
        return [os.fsdecode(path) for (path,) in found]

    def known(self):
        """{path: (size, mtime, content)} of every file in the index."""
        return {
            os.fsdecode(path): facts
            for path, *facts in self.db.execute("SELECT path, size, mtime, content FROM files")
        }

    def _map(self, kind):
        count, dtype = self._extent(kind)
        if not count:
            return np.empty((0, self.settings["size"]), dtype)
        try:
            return np.memmap(self.path(kind), dtype, "r", shape=(count, self.settings["size"]))
        except (OSError, ValueError) as error:
            raise InputError(
                f"index {str(self.folder)!r}: {self.path(kind).name} is missing or cut short ({error})"
            ) from None

    def _extent(self, kind):
        frames, pieces, _ = self.settings["ends"]
        return {"frames": (frames, np.float16), "videos": (pieces, np.float32)}[kind]

    def frames(self, row):
        """The frame descriptors (T, D) float16 of a content, a view of the memory map."""
        return self._map("frames")[row["frame"] : row["frame"] + row["frames"]]

    def videos(self):
        """All video descriptors (sum P, D) float32, holes included."""
        return self._map("videos")

    def thumbnails(self, row, wanted):
        """The JPEGs of the frames `wanted` of a content."""
        sizes = np.frombuffer(row["sizes"], np.int32)
        starts = row["thumbnail"] + np.cumsum([0, *sizes])
        with one_line(self.folder), open(self.path("thumbnails"), "rb") as file:
            found = []
            for i in wanted:
                file.seek(starts[i])
                found.append(file.read(sizes[i]))
        return found

    def owners(self):
        """(sum P,) int64: which content a row of `videos` belongs to, -1 for a hole."""
        owners = np.full(self._extent("videos")[0], -1)
        for number, piece, pieces in self.db.execute("SELECT id, piece, pieces FROM contents"):
            owners[piece : piece + pieces] = number
        return owners

    # --- writing -----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def writing(self):
        """Hold the index for writing; InputError when another process does."""
        with one_line(self.folder), open(self.folder / "lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(
                    f"index {str(self.folder)!r} is being written by another process; wait for it"
                ) from None
            self.settings = self._settings()
            self._sweep()
            yield self

    @contextlib.contextmanager
    def _transaction(self):
        self.db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self.db.execute("COMMIT")
        except BaseException:
            with contextlib.suppress(sqlite3.Error):
                self.db.execute("ROLLBACK")
            self.settings = self._settings()
            self._cut()  # gives a full disk its space back
            raise

    def _cut(self):
        """Drop what lies past the ends that the database vouches for."""
        frames, pieces, thumbnails = self.settings["ends"]
        size = self.settings["size"]
        for kind, end in (
            ("frames", frames * size * 2),
            ("videos", pieces * size * 4),
            ("thumbnails", thumbnails),
        ):
            if self.path(kind).exists() and self.path(kind).stat().st_size > end:
                os.truncate(self.path(kind), end)

    def _sweep(self):
        """Remove what killed writers left: bytes past the ends, files of other generations."""
        self._cut()
        keep = {self.path(kind).name for kind in FILES}
        for pattern in FILES.values():
            for left in self.folder.glob(pattern.format("*")):
                if left.name not in keep:
                    left.unlink()
        for left in self.folder.glob("ann-*.faiss"):
            if not left.name.startswith(f"ann-{self.settings['generation']}-"):
                left.unlink()
        for left in self.folder.glob(".ann-*.faiss"):
            left.unlink()

    def put(self, sha256, described, files):
        """Add a content with its `files` [(path, size, mtime)], which may replace what the index has of them."""
        frames, pieces = (
            np.ascontiguousarray(described.frames),
            np.ascontiguousarray(described.pieces),
        )
        data = {
            "frames": frames.tobytes(),
            "videos": pieces.tobytes(),
            "thumbnails": b"".join(described.thumbnails),
        }
        sizes = np.array([len(jpeg) for jpeg in described.thumbnails], np.int32).tobytes()
        ends = self.settings["ends"]
        with one_line(self.folder), self._transaction():
            self._append(self.settings["generation"], ends, data)
            row = (
                sha256,
                described.seconds,
                len(frames),
                ends[0],
                len(pieces),
                ends[1],
                sizes,
                ends[2],
                checksum(data),
            )
            number = self.db.execute(
                f"INSERT INTO contents VALUES (NULL{', ?' * 9})", row
            ).lastrowid
            ends = [ends[0] + len(frames), ends[1] + len(pieces), ends[2] + len(data["thumbnails"])]
            self._set(ends=ends)
            self._link(number, files)
        self.settings["ends"] = ends

    def _append(self, generation, ends, data):
        """Write `data` {kind: bytes} at the `ends` of the data files, and wait until it is on the disk."""
        width = self.settings["size"]
        for kind, start in zip(
            FILES, (ends[0] * width * 2, ends[1] * width * 4, ends[2]), strict=True
        ):
            path = self.path(kind, generation)
            with open(path, "r+b" if path.exists() else "w+b") as file:
                file.seek(start)
                file.write(data[kind])
                file.flush()
                os.fsync(file.fileno())

    def link(self, sha256, files):
        """Say that `files` have a content that is here already. False when it is not."""
        row = self.rows("sha256 = ?", (sha256,)).fetchone()
        if row:
            with one_line(self.folder), self._transaction():
                self._link(row["id"], files)
        return row is not None

    def _link(self, number, files):
        before = [content for path, *_ in files for content in self._content_of(path)]
        rows = [(os.fsencode(path), size, mtime, number) for path, size, mtime in files]
        self.db.executemany("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?)", rows)
        self._drop_orphans(before)

    def _content_of(self, path):
        """[the content of a file], [] for one that is not known."""
        return [
            number
            for (number,) in self.db.execute(
                "SELECT content FROM files WHERE path = ?", (os.fsencode(path),)
            )
        ]

    def _drop_orphans(self, numbers):
        """Forget those of the contents that no file has any more."""
        orphan = "DELETE FROM contents WHERE id = ? AND NOT EXISTS (SELECT 1 FROM files WHERE content = contents.id)"
        self.db.executemany(orphan, [(number,) for number in numbers])

    def remove(self, paths):
        """Forget these files; returns how many were known."""
        with one_line(self.folder), self._transaction():
            before = [content for path in paths for content in self._content_of(path)]
            self.db.executemany(
                "DELETE FROM files WHERE path = ?", [(os.fsencode(path),) for path in paths]
            )
            self._drop_orphans(before)
        return len(before)

    def holes(self):
        """The share of the frame rows that belong to nothing."""
        total = self.settings["ends"][0]
        live = self.db.execute("SELECT coalesce(sum(frames), 0) FROM contents").fetchone()[0]
        return 1 - live / total if total else 0.0

    def compact(self):
        """Write the next generation, without holes."""
        old, ends = self.settings["generation"], [0, 0, 0]
        for kind in FILES:
            self.path(kind, old + 1).unlink(missing_ok=True)
        stale = [self.path(kind) for kind in FILES]
        with one_line(self.folder):
            try:
                places = []
                for row in self.rows():
                    data = self.data(row)
                    self._append(old + 1, ends, data)
                    places.append((*ends, row["id"]))
                    ends = [
                        ends[0] + row["frames"],
                        ends[1] + row["pieces"],
                        ends[2] + len(data["thumbnails"]),
                    ]
                with self._transaction():
                    self.db.executemany(
                        "UPDATE contents SET frame = ?, piece = ?, thumbnail = ? WHERE id = ?",
                        places,
                    )
                    self._set(generation=old + 1, ends=ends)
            except BaseException:  # a full disk gets its space back
                for kind in FILES:
                    self.path(kind, old + 1).unlink(missing_ok=True)
                raise
            self.settings = self._settings()
            for path in stale:
                path.unlink(missing_ok=True)
            self._sweep()

    # --- checking ----------------------------------------------------------------------------------------------------

    def data(self, row):
        """{kind: bytes} of a content, as stored."""
        total = int(np.frombuffer(row["sizes"], np.int32).sum())
        with open(self.path("thumbnails"), "rb") as file:
            file.seek(row["thumbnail"])
            thumbnails = file.read(total)
        pieces = self.videos()[row["piece"] : row["piece"] + row["pieces"]]
        return {
            "frames": self.frames(row).tobytes(),
            "videos": pieces.tobytes(),
            "thumbnails": thumbnails,
        }

    def damage(self):
        """Yield a line for everything in the index that is not as it was written."""
        with one_line(self.folder):
            for (line,) in self.db.execute("PRAGMA integrity_check"):
                if line != "ok":
                    yield f"index.db: {line}"
            for row in self.rows():
                try:
                    sound = checksum(self.data(row)) == row["checksum"]
                except (OSError, InputError, ValueError):
                    sound = False
                if not sound:
                    yield f"{'; '.join(map(repr, self.paths(row['id'])))}: its data is damaged; remove it and index it again"

    def size(self):
        """Bytes of all files of the index."""
        return sum(path.stat().st_size for path in self.folder.iterdir() if path.is_file())


def checksum(data):
    value = 0
    for kind in FILES:
        value = zlib.crc32(data[kind], value)
    return value
