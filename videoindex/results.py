"""What an index answers: matches of a query, groups of duplicates, the outcome of an update."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

# What a score means, in words. The last: the same place or scene at another time, no copy.
VERDICTS = ("certain", "likely", "look yourself", "same place")


class TimeSegment(NamedTuple):
    """A part that two videos share, in seconds: half-open intervals of the query and the target.

    similarity: the mean over the matched frames.
    """

    query_start: float
    query_end: float
    target_start: float
    target_end: float
    similarity: float


@dataclass
class Match:
    """A video of the index that answers a query.

    path: the file
    score: the evidence that it shares film, in seconds (`videoindex.evidence`): 0 for nothing, at
        most `matched_seconds`
    similarity: of the window descriptors, by which the video was shortlisted
    seconds: how long the video plays
    content: its number in the index
    same_content_paths: other files of identical content
    segments: where it matches, best first
    verdict: one of VERDICTS, or "" if the model is not calibrated
    matched_seconds: how much film matches, a still counted once
    missing: there is no file at `path` now, nor another of the same content
    """

    path: str
    score: float
    similarity: float
    seconds: float
    content: int
    same_content_paths: list[str] = field(default_factory=list)
    segments: list[TimeSegment] = field(default_factory=list)
    verdict: str = ""
    matched_seconds: float = 0.0
    missing: bool = False


class Link(NamedTuple):
    """Two contents, by number, that share material; in `segments`, `a` is the query.

    verdict, matched_seconds: as of a Match.
    """

    a: int
    b: int
    score: float
    segments: list[TimeSegment]
    verdict: str = ""
    matched_seconds: float = 0.0


@dataclass
class Group:
    """Copies of one video, and what else shares film with it.

    files: {content: [paths]} of the copies; first the centre, the longest, that the others match
    seconds: {content: how long it plays}, of copies and parts
    links: of each other copy with the centre, best first
    part_files: {content: [paths]} of excerpts, and of videos that share one with the centre
    parts: the links of these with the centre, best first
    is_doubtful: most copies match the centre, but not each other
    """

    files: dict[int, list[str]] = field(default_factory=dict)
    seconds: dict[int, float] = field(default_factory=dict)
    links: list[Link] = field(default_factory=list)
    part_files: dict[int, list[str]] = field(default_factory=dict)
    parts: list[Link] = field(default_factory=list)
    is_doubtful: bool = False

    @property
    def paths(self) -> list[str]:
        """All files of the copies."""
        return [path for paths in self.files.values() for path in paths]


@dataclass
class IndexUpdate:
    """What `VideoIndex.add` did, in numbers of files.

    moved: files whose content was indexed under a path at which there is no file any more
    same_content: files whose content was indexed already under another name
    failed: [(path, reason)]
    """

    added: int = 0
    replaced: int = 0
    moved: int = 0
    same_content: int = 0
    unchanged: int = 0
    removed: int = 0
    failed: list[tuple[str, str]] = field(default_factory=list)


class AddProgress:
    """What `VideoIndex.add` reports while it works. Override what you want to know."""

    def on_start(self, paths: Sequence[str]) -> None:
        """These files are new or have changed; each will be finished once."""

    def on_seconds(self, path: str, seconds: float) -> None:
        """So much of a file is done; 0 when its content is about to be looked up."""

    def on_resume(self, path: str, seconds: float) -> None:
        """So much of a file was done by a run that was stopped."""

    def on_file(self, path: str, reason: str) -> None:
        """A file is finished; `reason` says why it failed, "" if it did not."""
