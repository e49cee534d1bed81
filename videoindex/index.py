"""Search your own videos, as a library.

    from videoindex.index import VideoIndex

    index = VideoIndex("holiday.index")           # opened, or created by the first `add`
    index.add(["holiday/", "film.mp4"])           # files and folders; unchanged files are skipped
    for match in index.query("clip.mp4", top=5):  # Match(path, score, segments in seconds, ...)
        print(f"{match.score:.3f}", match.path, match.segments)
    groups = index.duplicates()                   # which videos share material
    index.save()                                  # fill holes, store a trained FAISS index
    index = VideoIndex.load("holiday.index")      # it must exist

`add` and `remove` store what they do at once; `save` is needed for neither.
"""

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from retrieval.compare import MEMORY
from utils import InputError
from videoindex.adding import Adding
from videoindex.comparison import Comparer, l2_normalise
from videoindex.grouping import JOINING, judge, make_clusters
from videoindex.nearest import NearestVideos
from videoindex.parts import PART_SECONDS
from videoindex.pipeline import (
    EncodedVideo,
    Pipeline,
    calibration_of,
    differing_part,
    options_of,
    package_versions,
)
from videoindex.results import AddProgress, Group, IndexUpdate, Link, Match
from videoindex.shown import ShownFiles
from videoindex.sources import find_files
from videoindex.store import Content, IndexStore, RemovedError
from videoindex.whole_copies import pictures_agree

SHORTLIST = 500  # videos compared frame by frame
MAX_HOLES = 0.5  # the share of holes above which an index is compacted
TRIES = 10  # of a query, while another process removes what it finds


class VideoIndex:
    """An index of videos, in a folder.

    Args:
        folder: opened if it holds an index; otherwise the first `add` creates one.
        index_type: a FAISS factory string for the window descriptors. It is stored; by default
            what was stored, or Flat.
        device, workers: see Pipeline.
        pipeline: one that exists already, instead of options.
        memory: GiB that this process may hold while it compares videos frame by frame.
        options: those of the Pipeline. An index remembers them.

    Raises:
        InputError: if the index was made by another model than the options name.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        index_type: str | None = None,
        device: str | None = None,
        workers: int | None = None,
        pipeline: Pipeline | None = None,
        memory: float = MEMORY,
        **options: Any,
    ):
        self.memory = memory * 2**30  # bytes
        self.folder, self.index_type = Path(folder), index_type
        self._device, self._workers = device, workers
        self._options = {name: value for name, value in options.items() if value is not None}
        self._pipeline = pipeline
        self._nearest: NearestVideos | None = None
        self._nearest_lock = threading.Lock()
        self.store: IndexStore | None = None
        if (self.folder / "index.db").exists():
            self.store = IndexStore(folder)
            if pipeline or self._options:
                self._check_identity(self.pipeline)  # now, not after an hour of work

    def __getstate__(self):  # for another process, which opens the folder itself
        return vars(self) | {"_nearest": None, "_nearest_lock": None}

    def __setstate__(self, state):
        vars(self).update(state, _nearest_lock=threading.Lock())

    @classmethod
    def load(cls, folder: str | os.PathLike, **options: Any) -> "VideoIndex":
        """Open the index in `folder`; raises InputError if there is none."""
        IndexStore(folder)
        return cls(folder, **options)

    @property
    def pipeline(self) -> Pipeline:
        """The Pipeline that made the index, or will make it."""
        if self._pipeline is None:
            stored = {}
            if self.store:
                identity = self.store.settings["identity"]
                stored = options_of(identity) | self.store.settings["options"]
                stored["frames"] = self.store.frame_rule
            self._pipeline = Pipeline(self._device, self._workers, **(stored | self._options))
            if self.store:  # the files that the options name may have changed since
                self._check_identity(self._pipeline)
        return self._pipeline

    def _check_identity(self, pipeline):
        stored = self.store.settings["identity"], self.store.frame_rule
        given = pipeline.identity, pipeline.frame_rule
        if differing := differing_part(stored, given):
            part, value, other = differing
            raise InputError(
                f"index {str(self.folder)!r} was made with {part} {value!r}, this model has"
                f" {other!r}; use the model that made it, or make another index"
            )

    @property
    def calibration(self) -> dict[str, Any]:
        """What was calibrated for this model: threshold, radius, ...; or {}."""
        return calibration_of(self.store.settings) if self.store else {}

    @property
    def fps(self) -> Fraction:
        """Frame descriptors per second."""
        return Fraction(self.store.settings["identity"]["fps"])

    @property
    def nearest(self) -> NearestVideos:
        """The FAISS index of the current contents."""
        with self._nearest_lock:
            state = self.store.window_state()  # another process may have changed it
            index_type = self.index_type or self.store.settings["index_type"]
            if self._nearest is None or self._nearest.state != state:
                self._nearest = NearestVideos(self.store, index_type, self._nearest)
            return self._nearest

    def __len__(self) -> int:
        """The number of files in the index."""
        return self.store.num_files() if self.store else 0

    # --- adding and removing --------------------------------------------------------------------

    def add(
        self,
        sources: Iterable[str | os.PathLike],
        prune: bool = False,
        on_file: Callable[[str, str], None] = lambda path, reason: None,
        retry_failed: bool = False,
        progress: AddProgress | None = None,
        part_seconds: float = PART_SECONDS,
    ) -> IndexUpdate:
        """Bring the index up to date with files and folders.

        Every video is stored as soon as it is encoded, so a killed call can simply be repeated. A
        film that is longer than `part_seconds` goes on where the call was killed, in steps of that
        length. A changed file replaces its old entry. A file that was renamed or moved keeps its
        data. A file that cannot be read is reported and keeps its entry. One that could not be
        encoded is remembered by its size and time, and reported again without being read.

        Args:
            prune: forget files of these folders that no longer exist. Refused for a folder that
                is absent or without videos while the index knows files there: its drive may not
                be mounted. Files on a drive that is not mounted are kept and reported.
            on_file: called as on_file(path, reason) when a file is finished; "" means success.
            retry_failed: try again unchanged files that could not be encoded before.
            progress: is told of every file, and of every second of film.
        """
        sources = list(sources)
        found, failed = find_files(sources, self.folder)
        if self.store is None and not found:
            raise InputError(
                f"nothing to index: {failed[0][0]!r}: {failed[0][1]}"
                if failed
                else "nothing to index: no video in these folders"
            )
        self._open_store()
        with self.store.writing():
            self._nearest = None
            adding = Adding(
                self.store,
                lambda: self.pipeline,
                sources,
                on_file,
                progress or AddProgress(),
                part_seconds,
            )
            update = adding.run(found, failed, prune, retry_failed)
            self._compact_if_sparse()
        return update

    def _open_store(self):
        """Create the store of a new index, or store a new index type."""
        if self.store is None:
            pipeline = self.pipeline
            settings = {
                "identity": pipeline.identity,
                "frame_rule": pipeline.frame_rule,
                "options": pipeline.given,
                "calibration": pipeline.calibration,
                "index_type": self.index_type or "Flat",
                "versions": package_versions(),
            }
            self.store = IndexStore.create(self.folder, pipeline.identity["size"], settings)
            self._check_identity(pipeline)  # another process may have created it meanwhile
        if self.index_type and self.index_type != self.store.settings["index_type"]:
            with self.store.writing():
                self.store.update_settings(index_type=self.index_type)

    def remove(self, paths: Iterable[str | os.PathLike]) -> tuple[int, list[str]]:
        """Forget files, and all files in folders; they need not exist any more.

        Returns:
            the number of files, and those of `paths` that are not in the index.
        """
        known = list(self.store.known_files())
        chosen, unknown_paths = set(), []
        for path in map(os.path.abspath, paths):
            prefix = os.path.join(path, "")
            inside = [name for name in known if name == path or name.startswith(prefix)]
            chosen.update(inside)
            if not inside:
                unknown_paths.append(path)
        with self.store.writing():
            self._nearest = None
            count = self.store.remove(chosen)
            self._compact_if_sparse()
        return count, unknown_paths

    def _compact_if_sparse(self):
        """Compact when holes outgrow the data, so that a video is rewritten about once at most."""
        if self.store.hole_share() > MAX_HOLES:
            self.store.compact()

    def save(self) -> None:
        """Fill the holes that removal left, and store the trained FAISS index."""
        with self.store.writing():
            if self.store.hole_share() > 0:
                self._nearest = None
                self.store.compact()
            self.nearest.save()

    # --- querying -------------------------------------------------------------------------------

    def encode_clips(self, clips: Iterable[str | os.PathLike]) -> Iterator[EncodedVideo]:
        """Yield an EncodedVideo for each of the files, as they are finished.

        Those that cannot be encoded have a `reason`.
        """
        existing = []
        for clip in clips:
            if os.path.isdir(clip):
                yield EncodedVideo(Path(clip), "it is a folder; name video files")
            elif not os.path.exists(clip):
                yield EncodedVideo(Path(clip), "it does not exist; check the path")
            else:
                existing.append(clip)
        if existing:
            yield from self.pipeline.encode_videos(existing)

    def query(
        self,
        clip: str | os.PathLike | EncodedVideo,
        top: int = 10,
        threshold: float | None = None,
        shortlist: int = SHORTLIST,
        skip_start: float = 0.0,
        min_match: float = 0.0,
    ) -> list[Match]:
        """The videos that share most with `clip`, best first; ties in the order of adding.

        The `shortlist` nearest by window descriptors (`top`, if that is more) are compared frame
        by frame (`videoindex.evidence`). A stretch that the clip shares with RECURRING videos and
        more, such as an intro, is no evidence, unless it is half of the clip or of the video.

        Args:
            top: the most matches to return.
            threshold: the lowest score to return; by default the calibrated one. Without either,
                everything that shares two similar frames.
            skip_start: seconds at the start of every video that are no evidence.
            min_match: the least seconds of a stretch.
        """
        video = clip
        if not isinstance(clip, EncodedVideo):
            video = next(iter(self.encode_clips([clip])))
        if video.reason:
            raise InputError(f"clip {str(clip)!r}: {video.reason}")
        size = self.nearest.index.d
        if video.window_descriptors.shape[1] != size:
            raise InputError(
                f"clip {str(video.path)!r} has descriptors of {video.window_descriptors.shape[1]}"
                f" values, the index of {size}; were both made by one model?"
            )
        if threshold is None:
            threshold = self.calibration.get("threshold", 0.0)
        for tries_left in reversed(range(TRIES)):
            try:
                return self._matches(video, top, threshold, shortlist, skip_start, min_match)
            except RemovedError:  # by another process; the next try does not find it
                if not tries_left:
                    raise

    def _matches(self, video, top, threshold, shortlist, skip_start, min_match):
        """`query` by an EncodedVideo; RemovedError if another process removes a match meanwhile."""
        candidates = dict(self.nearest.search(video.window_descriptors, max(shortlist, top)))
        shown = ShownFiles(self.store)
        rejected = shown.rejected_for(video)
        contents = []
        for number in sorted(candidates):  # the order of adding
            content = self.store.content(number)
            if content and number not in rejected:  # another process may have removed it
                contents.append(content)
        if not contents:
            return []
        comparer = self.comparer(skip_start, min_match)
        frames = comparer.frames_of_clip(video)
        least = threshold * float(self.fps)
        by_number = {content.id: content for content in contents}
        found, frames = comparer.compare_without_recurring(frames, contents, least, top)
        matches = []
        for number in sorted(found, key=lambda number: -found[number].evidence)[:top]:
            content = by_number[number]
            self.store.require_intact(content)  # what is shown; `verify` reads everything
            target = comparer.frames_of(content)
            stretches = comparer.all_stretches(found[number], frames, target, least)
            paths = shown.paths(number)
            path, *same_content_paths = paths or self.store.require_paths(number)[:1]
            match = Match(
                path=path,
                similarity=candidates[number],
                seconds=content.seconds,
                content=number,
                same_content_paths=same_content_paths,
                missing=not paths,
                **comparer.findings(stretches, frames, target),
            )
            matches.append(match)
        self.store.release_pages()
        return matches

    def comparer(
        self,
        skip_start: float = 0.0,
        min_match: float = 0.0,
        calibration: dict[str, Any] | None = None,
    ) -> Comparer:
        """What compares videos with this index's contents."""
        calibration = self.calibration if calibration is None else calibration
        return Comparer(self.store, self.fps, calibration, self.memory, skip_start, min_match)

    def frame_similarities(self, frames: np.ndarray, content: Content) -> np.ndarray:
        """The similarities (Tq, Tt) float32 of frame descriptors (Tq, D) with a content's."""
        return l2_normalise(frames) @ l2_normalise(self.store.frame_descriptors(content)).T

    # --- duplicates -----------------------------------------------------------------------------

    def duplicates(
        self,
        threshold: float | None = None,
        radius: float | None = None,
        skip_start: float = 0.0,
        min_match: float = 0.0,
        calibration: dict[str, Any] | None = None,
    ) -> list[Group]:
        """Groups of copies, the largest first (`videoindex.grouping`).

        A member matches the centre of its group, its longest video, over half of both. What matches
        over less, such as an excerpt, is listed as a part. Files with identical content always form
        a group. Files that do not exist now are in no group, links to one file are one file, and
        rejected pairs are not compared.

        Args:
            threshold: the lowest score that joins; by default what is at least `likely`.
            radius: the lowest similarity of window descriptors of videos that are compared; by
                default the calibrated one.
            skip_start, min_match: as for `query`.
            calibration: another than this index's.

        Raises:
            InputError: if the model is not calibrated, and threshold or radius is missing.
        """
        calibration = self.calibration if calibration is None else calibration
        radius = calibration.get("radius") if radius is None else radius
        if radius is None or (threshold is None and "certain" not in calibration):
            raise InputError("this index's model is not calibrated; give --threshold and --radius")
        nearest = self.nearest
        lengths, shown = self.store.frame_counts(), ShownFiles(self.store)
        centres = nearest.centres(radius)
        lengths = {number: lengths[number] for number in lengths if number in centres.rows}
        comparer = self.comparer(skip_start, min_match, calibration)
        lowest = calibration["threshold"] if threshold is None else threshold
        least = lowest * float(self.fps)

        def compare(number, others):
            content = self.store.content(number)
            others = [other for other in others if shown.may_pair(number, other)]
            contents = [found for other in others if (found := self.store.content(other))]
            if content is None or not contents:  # another process may have removed them
                return {}
            return comparer.compare(comparer.frames_of(content), contents, least)

        def joins(stretch, a, b):
            if threshold is not None or comparer.verdict(stretch) in JOINING:
                return True
            pair = [self.store.content(number) for number in (a, b)]
            if lengths[a] != lengths[b] or None in pair:
                return False
            # Two files of one picture, or of one still scene.
            return comparer.verdict_on(stretch, *map(comparer.frames_of, pair)) in JOINING

        groups, alone = [], shown.shared_contents()
        for cluster in make_clusters(lengths, centres, compare, joins, shown.may_pair):
            judge(cluster, compare)
            group = self._group(cluster, comparer, shown, least)
            alone -= group.files.keys() | group.part_files.keys()
            groups.append(group)
        for number in sorted(alone):
            content = self.store.content(number)
            if content:
                groups.append(Group({number: shown.paths(number)}, {number: content.seconds}))
        return sorted(groups, key=lambda group: -len(group.paths))

    def is_same_film(self, a: int, b: int) -> bool:
        """Whether two contents show the same pictures from end to end, by a certain match."""
        comparer, contents = self.comparer(), [self.store.content(number) for number in (a, b)]
        if None in contents:  # another process may have removed one
            return False
        query, target = map(comparer.frames_of, contents)
        comparer.require_memory(query, contents[1])
        for stretch in comparer.stretches(query, target, 0.0, 1):
            word = comparer.verdict_on(stretch, query, target)
            if word == "certain" and comparer.is_same_film(stretch, query, target):
                return pictures_agree(*map(self._all_thumbnails, contents))
        return False

    def _all_thumbnails(self, content):
        return self.store.thumbnails(content, range(content.num_frames))

    def _group(self, cluster, comparer, shown, least):
        """A Cluster with its files and seconds."""
        group = Group(is_doubtful=cluster.is_doubtful)
        centre = self.store.require_content(cluster.centre)
        self.store.require_intact(centre)
        target = comparer.frames_of(centre)
        group.files[centre.id], group.seconds[centre.id] = shown.paths(centre.id), centre.seconds
        copies = cluster.members, group.links, group.files
        parts = cluster.parts, group.parts, group.part_files
        for stretches, links, files in (copies, parts):
            for number, first in stretches.items():
                content = self.store.require_content(number)
                self.store.require_intact(content)
                frames = comparer.frames_of(content)
                found = [first]  # of a copy it is nearly all
                if links is group.parts:
                    found = comparer.all_stretches(first, frames, target, least)
                links.append(Link(number, centre.id, **comparer.findings(found, frames, target)))
                files[number] = shown.paths(number)
                group.seconds[number] = content.seconds
            links.sort(key=lambda link: -link.score)
        self.store.release_pages()
        return group
