"""The report of an extraction: what became of every video. Neither a kill nor a later run loses it.

The report is NAME.json. While a run works, one line per video is appended to NAME.json.part.
"""

import contextlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from features.decoding import Video
from features.frame_rules import with_current_rule
from files import write_json
from untrusted import is_object, read_json
from utils import InputError, digest, provenance


def file_stamp(path: str | Path) -> str:
    """Size and mtime, to detect a changed file. Empty if stat fails; decoding reports it later."""
    try:
        facts = Path(path).stat()
    except OSError:
        return ""
    return f"{facts.st_size} bytes, {facts.st_mtime_ns}"


def _is_row(row):
    """Whether a value is a row of a report, as far as a later run relies on it."""
    texts = ("path", "source", "status", "reason")
    return isinstance(row, dict) and all(isinstance(row.get(name), str) for name in texts)


class ExtractionReport:
    """The rows of a report, with those of earlier runs of the same settings.

    Attributes:
        rows: {id: row}. A row has
            "path", of the video's file;
            "source", the `file_stamp` of that file;
            "status", "ok" or "failed";
            "frames", how many rows the store holds;
            "seconds" of the video, None where a killed run knew but could not report;
            "corrupt_packets", how many did not decode;
            "reason" of the failure, or "".

    Raises:
        InputError: if NAME.json is not such a report.
    """

    def __init__(self, path: Path, settings: Mapping[str, str]) -> None:
        self.path, self.settings = path, settings
        self._log = Path(f"{path}.part")
        self._finished = self._read()
        self.rows = dict(self._finished)
        if self._log.exists():
            self._replay(self._log.read_text(encoding="utf-8", errors="replace").splitlines())

    def _read(self):
        """The rows of NAME.json; none if it is of other settings."""
        if not self.path.exists():
            return {}
        advice = "it is where the report goes; move it, or name another --output"
        report = read_json(self.path, "file", advice)
        if not (is_object(report) and is_object(report.get("videos"), dict)):
            raise InputError(f"file {str(self.path)!r} is not a report; {advice}")
        if not all(_is_row(row) for row in report["videos"].values()):
            raise InputError(f"file {str(self.path)!r} is not a report of videos; {advice}")
        settings = report.get("settings")
        if is_object(settings):
            settings = with_current_rule(settings)
        return report["videos"] if settings == self.settings else {}

    def _replay(self, lines):
        """Take over the rows that a killed run logged: a line [id, settings digest, row] each."""
        for line in lines:
            with contextlib.suppress(ValueError, TypeError):  # cut short by the kill
                name, settings, row = json.loads(line)
                if settings == digest(self.settings) and isinstance(name, str) and _is_row(row):
                    self.rows[name] = row

    def stored_source(self, name: str) -> str | None:
        """The source of a video's rows in the finished store, None where it is not known.

        By NAME.json alone: the log of a killed run describes its spool, not the finished store.
        """
        return self._finished.get(name, {}).get("source")

    def failed(self, name: str, source: str | None = None) -> bool:
        """Whether the latest try failed; if `source` is given, of that source."""
        row = self.rows.get(name, {})
        return row.get("status") == "failed" and source in (None, row["source"])

    def add(self, video: Video, source: str, frames: int) -> None:
        """Log a video that is through, with the number of rows that are stored."""
        row = {
            "path": str(video.path),
            "source": source,
            "status": "failed" if video.reason else "ok",
            "frames": frames,
            "seconds": None if video.seconds is None else round(video.seconds, 3),
            "corrupt_packets": video.corrupt_packets,
            "reason": video.reason,
        }
        self.rows[video.id] = row
        with open(self._log, "a", encoding="utf-8") as log:
            # The newline comes first: it ends a line that a kill cut short.
            log.write("\n" + json.dumps([video.id, digest(self.settings), row]))

    def write(self, names: Iterable[str]) -> None:
        """Write NAME.json with the videos `names` and remove the log, if there is a log."""
        if not self._log.exists():
            return  # nothing new
        rows = {name: self.rows[name] for name in sorted(names) if name in self.rows}
        write_json(self.path, {**provenance(), "settings": self.settings, "videos": rows})
        self._log.unlink()
