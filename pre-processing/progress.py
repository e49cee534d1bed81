"""What became of every video of an extraction, kept so that neither a kill nor a later run loses it."""

import contextlib
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import utils  # noqa: E402
from utils import InputError  # noqa: E402


class Report:
    """What became of every video: NAME.json at the end, NAME.json.part until then. An earlier run's rows are read first.

    rows {id: {"path", "source" (its `identity`), "status" ("ok" or "failed"), "frames", "seconds" (None where only an earlier
    run knew), "corrupt_packets", "reason"}}
    Raises InputError where NAME.json is somebody else's.
    """

    def __init__(self, path, settings):
        self.path, self.settings, self._log = path, settings, Path(f"{path}.part")
        self._finished = self._read()
        self.rows = dict(self._finished)
        for line in self._log.read_text(encoding="utf-8").splitlines() if self._log.exists() else ():
            with contextlib.suppress(ValueError):  # a line that was being written when the run was killed
                name, its_settings, row = json.loads(line)
                if its_settings == utils.digest(settings):
                    self.rows[name] = row

    def _read(self):
        """The rows of NAME.json; of other settings they tell nothing."""
        if not self.path.exists():
            return {}
        try:
            report = json.loads(self.path.read_text(encoding="utf-8"))
            return report["videos"] if report["settings"] == self.settings else {}
        except (ValueError, KeyError, TypeError):
            raise InputError(
                f"{str(self.path)!r}, where the report goes, is no report; move it, or name another --output"
            ) from None

    def stored(self, name):
        """The source of what the finished store holds of a video: a killed run's log speaks of its spool."""
        return self._finished.get(name, {}).get("source")

    def failed(self, name, source=None):
        """Whether the latest try failed (and, if given, was of this `source`)."""
        row = self.rows.get(name, {})
        return row.get("status") == "failed" and source in (None, row["source"])

    def add(self, video, source, frames):
        self.rows[video.id] = {
            "path": str(video.path),
            "source": source,
            "status": "failed" if video.reason else "ok",
            "frames": frames,
            "seconds": None if video.seconds is None else round(video.seconds, 3),
            "corrupt_packets": video.corrupt_packets,
            "reason": video.reason,
        }
        with open(self._log, "a", encoding="utf-8") as log:  # the newline first: it ends a line that was cut short
            log.write("\n" + json.dumps([video.id, utils.digest(self.settings), self.rows[video.id]]))

    def write(self, names):
        """The report of the videos `names`, in place of the log, where there is anything new."""
        if not self._log.exists():
            return
        rows = {name: self.rows[name] for name in sorted(names) if name in self.rows}
        utils.write_json(self.path, {**utils.provenance(), "settings": self.settings, "videos": rows})
        self._log.unlink()
