"""Several indexes that answer as one, and files that are looked up in them without being added."""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from utils import InputError, file_sha256
from videoindex.index import VideoIndex
from videoindex.moves import distinct_files
from videoindex.pipeline import EncodedVideo, differing_part
from videoindex.results import Match
from videoindex.shown import rejected_digests
from videoindex.sources import find_files
from videoindex.store import IndexStore


def load_indexes(folders: Sequence[str | os.PathLike], **options: Any) -> list[VideoIndex]:
    """Open indexes that are searched together; `options` are those of VideoIndex.

    Raises:
        InputError: they were made by different models, whose scores cannot be compared
    """
    indexes = [VideoIndex.load(folders[0], **options)]
    shared = {name: options[name] for name in ("index_type", "memory") if name in options}
    for folder in folders[1:]:
        _require_one_model(indexes[0].store, IndexStore(folder))
        indexes.append(VideoIndex(folder, pipeline=indexes[0].pipeline, **shared))
    return indexes


def _require_one_model(first, other):
    models = [(store.settings["identity"], store.frame_rule) for store in (first, other)]
    if differing := differing_part(*models):
        part, here, there = differing
        raise InputError(
            f"indexes {str(first.folder)!r} and {str(other.folder)!r} were made with {part}"
            f" {here!r} and {there!r}, so their scores cannot be compared; query one at a time"
        )


def query_indexes(
    indexes: Sequence[VideoIndex], video: EncodedVideo, top: int = 10, **options: Any
) -> list[Match]:
    """The best matches of all indexes, best first; a file that several hold is shown once.

    A match that was rejected in one of them is rejected in all.

    Args:
        options: of `VideoIndex.query`.
    """
    if len(indexes) == 1:
        return indexes[0].query(video, top, **options)
    rejected = set().union(*(rejected_digests(index.store, video.path) for index in indexes))
    matches: list[Match] = []
    for index in indexes:
        digests = index.store.digests() if rejected else {}
        for match in index.query(video, top + len(rejected), **options):
            if digests.get(match.content) not in rejected:
                matches.append(match)
    matches.sort(key=lambda match: -match.score)
    present = [match.path for match in matches if not match.missing]
    distinct, shown = set(distinct_files(present)), set()
    merged = []
    for match in matches:
        if match.path not in shown and (match.missing or match.path in distinct):
            shown.add(match.path)
            merged.append(match)
    return merged[:top]


# --- new files ----------------------------------------------------------------------------------

KNOWN_SHARE = 0.9  # of a file's film, that a certain or likely match has, if it is known


@dataclass
class KnownVideo:
    """What indexes know about a file that need not be in them.

    path: the file
    reason: why it could not be looked up; "" if it was
    seconds: how long it plays
    comparable: seconds of it that are evidence: not black, nor at a start that is skipped
    matches: the videos of the indexes that share film with it
    same_content: whether an index holds its very content
    """

    path: str
    reason: str = ""
    seconds: float = 0.0
    comparable: float = 0.0
    matches: list[Match] = field(default_factory=list)
    same_content: bool = False

    @property
    def state(self) -> str:
        """What the indexes know of the file: "known", "part", "look" or "new".

        A known file has nearly all of its film in one video of an index, by a certain or likely
        match; of another one such a match has a part; other matches are to look at.
        """
        joining = [match for match in self.matches if match.verdict in ("certain", "likely")]
        if self.same_content or any(self.share(match) >= KNOWN_SHARE for match in joining):
            return "known"
        return "part" if joining else "look" if self.matches else "new"

    def share(self, match: Match) -> float:
        """How much of the file a match has, 0 to 1."""
        if not self.seconds:  # a picture
            return 1.0
        seconds, end = 0.0, 0.0
        for segment in sorted(match.segments):
            seconds += max(segment.query_end - max(segment.query_start, end), 0.0)
            end = max(end, segment.query_end)
        return min(seconds / self.comparable, 1.0) if self.comparable else 0.0


def look_up(
    indexes: Sequence[VideoIndex], sources: Iterable[str | os.PathLike], **options: Any
) -> Iterator[KnownVideo]:
    """Yield what the indexes know of files and folders, as they are finished; nothing is added.

    Files whose content an index holds are not decoded.

    Args:
        options: of `VideoIndex.query`.
    """

    def look_up_video(video, same_content=False):
        path = str(video.path)
        if video.reason:
            return KnownVideo(path, video.reason)
        matches = query_indexes(indexes, video, **options)
        frames = indexes[0].comparer(options.get("skip_start", 0.0)).frames_of_clip(video)
        comparable = float(frames.is_evidence.sum() / indexes[0].fps)
        return KnownVideo(path, "", video.seconds, comparable, matches, same_content)

    found, failed = find_files(sources, indexes[0].folder)
    for path, reason in failed:
        yield KnownVideo(path, reason)
    unknown = []
    for file in found:
        try:
            video = _stored_video(indexes, file.path)
        except OSError as error:
            yield KnownVideo(file.path, error.strerror or str(error))
            continue
        if video is None:
            unknown.append(file.path)
        else:
            yield look_up_video(video, same_content=True)
    yield from map(look_up_video, indexes[0].encode_clips(unknown))


def _stored_video(indexes, path):
    """An EncodedVideo of the data that an index holds of a file's content, or None."""
    digest = file_sha256(path)
    for index in indexes:
        content = index.store.find_content(digest)
        if content:
            frames = index.store.frame_descriptors(content)
            windows = index.store.window_descriptors(content)
            thumbnails = index.store.thumbnails(content, range(content.num_frames))
            return EncodedVideo(path, "", content.seconds, frames, windows, thumbnails)
    return None
