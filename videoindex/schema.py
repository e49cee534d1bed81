"""The database of an index: its tables, and whether a file that claims to be one has them.

SQLite stores any value in any column, and a file may hold views and triggers in the place of
tables, or beside them. An index that is opened has the tables below and nothing else, values of
the columns' types, and rows that lie in the data files.
"""

import json
import re
import sqlite3
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from features.frame_rules import EARLIER_RULE, FRAME_RULES
from untrusted import is_object
from utils import InputError

VERSION = 1  # of the format
SCHEMA = """
CREATE TABLE settings (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE contents (
    id INTEGER PRIMARY KEY, sha256 TEXT UNIQUE NOT NULL, seconds REAL NOT NULL,
    frames INTEGER NOT NULL, frame INTEGER NOT NULL,      -- how many rows of frames-G, the first
    pieces INTEGER NOT NULL, piece INTEGER NOT NULL,      -- the same of videos-G
    sizes BLOB NOT NULL, thumbnail INTEGER NOT NULL,      -- bytes of each JPEG (int32), the first
    checksum INTEGER NOT NULL);                           -- CRC-32 of all three
CREATE TABLE files (
    path BLOB PRIMARY KEY, size INTEGER NOT NULL, mtime INTEGER NOT NULL,
    content INTEGER NOT NULL REFERENCES contents);
CREATE INDEX files_by_content ON files (content);
"""
# Rows that no index has; ends are those of the data files: frames, windows, bytes of thumbnails.
BAD_ROWS = {
    "contents": """
SELECT 1 FROM contents WHERE typeof(sha256) != 'text' OR typeof(sizes) != 'blob'
    OR typeof(seconds) != 'real' OR NOT seconds BETWEEN 0 AND 1e9
    OR typeof(frames) != 'integer' OR typeof(frame) != 'integer' OR typeof(pieces) != 'integer'
    OR typeof(piece) != 'integer' OR typeof(thumbnail) != 'integer'
    OR typeof(checksum) != 'integer' OR id < 0
    OR frames < 1 OR frame < 0 OR frame > :frames - frames
    OR pieces < 1 OR piece < 0 OR piece > :windows - pieces
    OR length(sizes) != 4 * frames OR NOT thumbnail BETWEEN 0 AND :bytes
    OR NOT EXISTS (SELECT 1 FROM files WHERE content = contents.id) LIMIT 1""",
    "files": """
SELECT 1 FROM files WHERE typeof(path) != 'blob' OR length(path) = 0 OR instr(path, x'00')
    OR typeof(size) != 'integer' OR typeof(mtime) != 'integer'
    OR NOT EXISTS (SELECT 1 FROM contents WHERE id = files.content) LIMIT 1""",
}
MAX_END = 1 << 50  # rows or bytes
FPS = r"\d{1,9}(/[1-9]\d{0,8})?"


def require_own_files(folder: Path) -> None:
    """Raise InputError if a file of an index is a link, a pipe or the like: none is followed."""
    for path in folder.iterdir():
        if not re.match(r"index\.db|\.lock$|(frames|videos|thumbnails|ann|part)-", path.name):
            continue
        try:
            mode = path.lstat().st_mode
        except FileNotFoundError:  # the journal of a writer that has just finished
            continue
        if not stat.S_ISREG(mode):
            raise InputError(
                f"index {str(folder)!r}: {path.name} is a link, or not a file; copy the file there"
            )


def connect(path: Path, patience: float) -> sqlite3.Connection:
    """Open the database of an index, which must exist. Nothing can be written until it is allowed.

    A database that a killed writer left is rolled back, so it is not opened as read-only.
    """
    db = sqlite3.connect(
        f"{path.resolve().as_uri()}?mode=rw",
        uri=True,
        timeout=patience,
        isolation_level=None,
        check_same_thread=False,  # whichever thread comes last closes it
    )
    db.execute("PRAGMA trusted_schema = OFF")
    allow_writing(db, False)
    return db


def allow_writing(db: sqlite3.Connection, allowed: bool) -> None:
    db.execute(f"PRAGMA query_only = {'OFF' if allowed else 'ON'}")


def check_tables(db: sqlite3.Connection, folder: Path) -> None:
    """Raise InputError unless a database has the tables of SCHEMA, and nothing else."""
    expected = sqlite3.connect(":memory:")
    expected.executescript(SCHEMA)
    if _schema_of(db) != _schema_of(expected):
        raise InputError(
            f"index {str(folder)!r}: its index.db has other tables, or views or triggers;"
            " index the videos again"
        )
    expected.close()


def _schema_of(db):
    """{(type, name): its SQL without comments and spaces}."""
    schema = {}
    for kind, name, sql in db.execute("SELECT type, name, sql FROM sqlite_schema"):
        sql = re.sub(r"--[^\n]*", "", sql or "")
        schema[kind, name] = re.sub(r"\s", "", sql)
    return schema


def read_settings(db: sqlite3.Connection, folder: Path) -> dict[str, Any]:
    """The settings {name: value} of an index.

    Raises:
        InputError: one is missing, or has another type
    """
    from videoindex.pipeline import check_calibration  # here: --help needs no index

    settings = {"identity": {"fps": "1"}, "options": {}, "calibration": {}}
    settings |= {"index_type": "Flat", "versions": {}, "frame_rule": EARLIER_RULE, "failed": []}
    settings |= {"mounts": [], "rejected": []}
    try:
        for name, value in db.execute("SELECT name, value FROM settings"):
            settings[name] = json.loads(value)
    except (ValueError, TypeError, RecursionError):
        raise InputError(f"index {str(folder)!r}: its settings are damaged") from None
    if settings.get("version") != VERSION:
        raise InputError(
            f"index {str(folder)!r} has version {settings.get('version')!r} of the format, this"
            f" program writes {VERSION}; index the videos again, into another folder"
        )
    check_calibration(settings["calibration"], f"index {str(folder)!r}: its calibration")
    wrong = [name for name, is_right in SETTINGS.items() if not is_right(settings.get(name))]
    if wrong:
        raise InputError(
            f"index {str(folder)!r}: its setting {wrong[0]} is damaged; index the videos again"
        )
    return settings


def _is_count(value, limit=MAX_END):
    return type(value) is int and 0 <= value <= limit


def _is_identity(value):
    return is_object(value, str, int) and bool(re.fullmatch(FPS, str(value.get("fps"))))


def _is_options(value):
    if not is_object(value, str, int, float, list):
        return False
    texts = [item for part in value.values() if isinstance(part, list) for item in part]
    fps = str(value.get("fps", 1))
    return all(isinstance(text, str) for text in texts) and len(fps) < 20 and "e" not in fps.lower()


def _is_failed(value):
    """Whether a value is [[path, size, time, reason], ...]."""
    rows = value if isinstance(value, list) else [value]
    kinds = [str, int, int, str]
    return all(isinstance(row, list) and list(map(type, row)) == kinds for row in rows)


def _is_rejected(value):
    """Whether a value is [[sha256, sha256], ...]."""
    if not isinstance(value, list):
        return False
    return all(isinstance(pair, list) and list(map(type, pair)) == [str, str] for pair in value)


SETTINGS = {
    "size": lambda value: _is_count(value, 1 << 20) and value > 0,
    "generation": _is_count,
    "ends": lambda value: (
        isinstance(value, list) and len(value) == 3 and all(map(_is_count, value))
    ),
    "identity": _is_identity,
    "options": _is_options,
    "calibration": is_object,
    "frame_rule": lambda value: isinstance(value, str) and value in FRAME_RULES,
    "failed": _is_failed,
    "mounts": lambda value: (
        isinstance(value, list) and all(isinstance(path, str) and path for path in value)
    ),
    "rejected": _is_rejected,
    "index_type": lambda value: isinstance(value, str) and len(value) < 100,
    "versions": lambda value: is_object(value, str),
}


def check_rows(db: sqlite3.Connection, settings: Mapping[str, Any], folder: Path) -> None:
    """Raise InputError if a row has values of other types, or lies outside the data files."""
    ends = dict(zip(("frames", "windows", "bytes"), settings["ends"], strict=True))
    for table, query in BAD_ROWS.items():
        if db.execute(query, ends if table == "contents" else ()).fetchone():
            raise InputError(
                f"index {str(folder)!r}: a row of its table {table!r} is damaged;"
                " index the videos again, into another folder"
            )
