"""Search your own videos as a library: `VideoIndex`.

from search import VideoIndex

index = VideoIndex("holiday.index")           # opened, or made with the shipped model at the first `add`
index.add(["holiday/", "film.mp4"])           # files and folders; what is unchanged is passed over
for match in index.query("clip.mp4", top=5):  # Match(path, score, stretches in seconds of both, ...)
    print(f"{match.score:.3f}", match.path, match.stretches)
groups = index.duplicates()                   # which videos share material
index.save()                                  # fill holes, keep the trained FAISS index; `add` has saved all else
index = VideoIndex.load("holiday.index")      # must be there
"""

import os
import stat
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from retrieval.alignment import align
from retrieval.similarity import FRAME_METRICS, similarity_table
from utils import InputError, file_sha256
from videoindex.nearest import Nearest
from videoindex.pipeline import EncodedVideo, Model, calibration_folder, read_calibration
from videoindex.store import Store

METRIC = (
    "tn"  # the best of the frame-level measures on the demo, in mAP and in recall at 99 % precision
)
METRICS = [
    name for name in FRAME_METRICS if name != "comparator"
]  # which needs a network of its own
SHORTLIST = 500  # videos compared frame by frame; on the demo 100 of 460 cost three points of mAP
CHUNK = 128  # new files that are hashed, then extracted, together


class Place(NamedTuple):
    """Where two videos match, in seconds of each: [query_start, query_end) shows what [start, end) of the found one does."""

    query_start: float
    query_end: float
    start: float
    end: float
    similarity: float  # mean of the matched frames


@dataclass
class Match:
    """A video of the index that answers a query.

    score: frame-level similarity, 1 for the video itself; similarity: of the video descriptors, by which it was shortlisted;
    also: other files of the very same content; content: its number in the index.
    """

    path: str
    score: float
    similarity: float
    seconds: float
    content: int
    also: list = field(default_factory=list)
    stretches: list = field(default_factory=list)


class Link(NamedTuple):
    """Two contents of a group that share material; stretches: Places, `a` as the query."""

    a: int
    b: int
    score: float
    stretches: list


@dataclass
class Group:
    """Videos that hang together: files {content: [paths]}, seconds {content: s}, and the links between contents."""

    files: dict
    seconds: dict
    links: list

    @property
    def paths(self):
        return [path for paths in self.files.values() for path in paths]


@dataclass
class IndexUpdate:
    """What `add` did, in files. same_content: known under another name, so nothing had to be extracted."""

    added: int = 0
    replaced: int = 0
    same_content: int = 0
    unchanged: int = 0
    removed: int = 0
    failed: list = field(default_factory=list)  # [(path, reason)]


class VideoIndex:
    """Videos to be searched, in a folder. Options are the model's (search_model.DEFAULTS), `device` and `workers`.

    model: a `Model` that is there already, instead of options. index_type: a FAISS factory string for the video descriptors,
    remembered; by default what the index remembers, or Flat.
    Raises InputError where the index was made by another model than the options name.
    """

    def __init__(self, folder, index_type=None, device=None, workers=None, model=None, **options):
        self.folder, self.index_type = Path(folder), index_type
        self._device, self._workers, self._options = device, workers, options
        self._model, self._nearest = model, None
        self.store = Store(folder) if (self.folder / "index.db").exists() else None
        if self.store and (model or any(value is not None for value in options.values())):
            self._refuse_another(
                self.store.settings["identity"], self.model.identity
            )  # now, and not after an hour

    @classmethod
    def load(cls, folder, **options):
        """The index in `folder`; InputError when there is none."""
        Store(folder)
        return cls(folder, **options)

    @property
    def model(self):
        """The Model that made the index, or is to make it."""
        if self._model is None:
            kept = self.store.settings["options"] if self.store else {}
            given = {name: value for name, value in self._options.items() if value is not None}
            self._model = Model(self._device, self._workers, **(kept | given))
            if self.store:  # the files that its options name may have changed since
                self._refuse_another(self.store.settings["identity"], self._model.identity)
        return self._model

    def _refuse_another(self, made_by, here):
        for part in made_by:
            if made_by[part] != here.get(part):
                raise InputError(
                    f"index {str(self.folder)!r} was made with {part} {made_by[part]!r}, this model has {here.get(part)!r};"
                    " use the model that made it, or make another index"
                )

    @property
    def calibration(self):
        """Threshold, radius, metric and alignment as measured for this model (calibrate.py), or {}.

        What stands beside the model's files now, or what stood there when the index was made.
        """
        if self.store is None:
            return {}
        settings = self.store.settings
        return (
            read_calibration(calibration_folder(settings["options"]), settings["identity"])
            or settings["calibration"]
        )

    @property
    def fps(self):
        return Fraction(self.store.settings["identity"]["fps"])

    def __len__(self):
        """The files in the index."""
        return (
            self.store.db.execute("SELECT count(*) FROM files").fetchone()[0] if self.store else 0
        )

    # --- filling -----------------------------------------------------------------------------------------------------

    def add(self, sources, prune=False, done=lambda path, reason: None):
        """Bring the index up to date with files and folders; returns `IndexUpdate`.

        Every video is safe in the index as soon as it is through, so a killed call goes on where it was. A changed file
        replaces its old entry; one that cannot be read is reported and keeps it. prune: forget files in these folders that are
        no longer there. done(path, reason) is called for each file that is through, reason "" for success.
        """
        found, failed = walk(sources, self.folder)
        if self.store is None and not found:
            raise InputError(
                f"nothing to index: {failed[0][0]!r}: {failed[0][1]}"
                if failed
                else "nothing to index: no video there"
            )
        self._create()
        changes = IndexUpdate(failed=list(failed))
        for path, reason in failed:
            done(path, reason)
        with self.store.writing():
            self._nearest = None
            known = self.store.known()
            news = []
            for path, size, mtime in found:
                if known.get(path, [None])[:2] == [size, mtime]:
                    changes.unchanged += 1
                else:
                    news.append((path, size, mtime))
            for start in range(0, len(news), CHUNK):
                self._add_chunk(news[start : start + CHUNK], known, changes, done)
            if prune:
                changes.removed = self.store.remove(missing(known, sources, found, failed))
            self._tidy()
        return changes

    def _create(self):
        if self.store is None:
            model = self.model
            settings = {
                "identity": model.identity,
                "options": model.given,
                "calibration": model.calibration,
                "index_type": self.index_type or "Flat",
                "versions": versions(),
            }
            self.store = Store.create(self.folder, model.identity["size"], settings)
        elif self.index_type and self.index_type != self.store.settings["index_type"]:
            with self.store.writing():
                self.store.set(index_type=self.index_type)

    def _add_chunk(self, news, known, changes, done):
        """Hash new files, link those whose content is here, describe and put the others."""
        waiting = {}  # sha256: [(path, size, mtime)]
        for path, size, mtime in news:
            try:
                digest = file_sha256(path)
            except OSError as error:
                self._fail(path, error.strerror, changes, done)
                continue
            if self.store.link(digest, [(path, size, mtime)]):
                self._count([path], known, changes, done, linked=True)
            else:
                waiting.setdefault(digest, []).append((path, size, mtime))
        by_path = {files[0][0]: (digest, files) for digest, files in waiting.items()}
        for described in self.model.describe(by_path) if by_path else ():
            digest, files = by_path[str(described.path)]
            if described.reason:
                for path, _, _ in files:
                    self._fail(path, described.reason, changes, done)
                continue
            self.store.put(digest, described, files)
            self._count([path for path, _, _ in files], known, changes, done)

    @staticmethod
    def _fail(path, reason, changes, done):
        changes.failed.append((path, reason))
        done(path, reason)

    @staticmethod
    def _count(paths, known, changes, done, linked=False):
        for i, path in enumerate(paths):
            if path in known:
                changes.replaced += 1
            elif linked or i:
                changes.same_content += 1
            else:
                changes.added += 1
            done(path, "")

    def remove(self, paths):
        """Forget files, and all files in folders, whether they still exist or not. Returns (how many, paths not known)."""
        known = list(self.store.known())
        gone, strange = set(), []
        for path in map(os.path.abspath, paths):
            inside = [one for one in known if one == path or one.startswith(os.path.join(path, ""))]
            gone.update(inside)
            if not inside:
                strange.append(path)
        with self.store.writing():
            self._nearest = None
            count = self.store.remove(gone)
            self._tidy()
        return count, strange

    def _tidy(self):
        """Fill holes when they outgrow what is there: so on average a video is rewritten once at most."""
        if self.store.holes() > 0.5:
            self.store.compact()

    def save(self):
        """Fill the holes that removal left, and keep the trained FAISS index, so that loading need not build it."""
        with self.store.writing():
            if self.store.holes() > 0:
                self._nearest = None
                self.store.compact()
            self.nearest.save()

    # --- asking ------------------------------------------------------------------------------------------------------

    @property
    def nearest(self):
        if self._nearest is None:
            self._nearest = Nearest(
                self.store, self.index_type or self.store.settings["index_type"]
            )
        return self._nearest

    def describe(self, clips):
        """Yield a `EncodedVideo` for each of the files `clips`, as they are finished; those without numbers have a `reason`."""
        good = []
        for clip in clips:
            if os.path.isdir(clip):
                yield EncodedVideo(Path(clip), "it is a folder; name video files")
            elif not os.path.exists(clip):
                yield EncodedVideo(Path(clip), "it is not there; check the path")
            else:
                good.append(clip)
        if good:
            yield from self.model.describe(good)

    def query(self, clip, top=10, threshold=None, shortlist=SHORTLIST, metric=None, places=True):
        """The videos most like `clip`, a file or a `EncodedVideo`: a list of `Match`, best first.

        The `shortlist` nearest by video descriptors (`top`, if that is more) are ranked by the frame-level `metric`
        (calibrated: the default); of those that reach `threshold` (default: the calibrated one; all, where there is none) the
        first `top` are returned, with their matching stretches unless `places` is off. Ties go by the order of adding.
        """
        described = clip if isinstance(clip, EncodedVideo) else next(iter(self.describe([clip])))
        if described.reason:
            raise InputError(f"clip {str(clip)!r}: {described.reason}")
        metric = known_metric(metric or self.calibration.get("metric", METRIC))
        threshold = self.calibration.get("threshold", -2.0) if threshold is None else threshold
        near = sorted(
            self.nearest.search(described.pieces, max(shortlist, top))
        )  # in the order in which they were added
        if not near:
            return []
        rows = [self.store.content(number) for number, _ in near]
        scores = similarity_table(
            [unit(described.frames)], [unit(self.store.frames(row)) for row in rows], metric
        )[0]
        matches = []
        for i in np.argsort(-scores, kind="stable")[:top]:
            if scores[i] < threshold:
                break
            row = rows[i]
            path, *also = self.store.paths(row["id"])
            found = self.places(described.frames, described.seconds, row) if places else []
            score = min(float(scores[i]), 1.0)
            matches.append(Match(path, score, near[i][1], row["seconds"], row["id"], also, found))
        return matches

    def places(self, frames, seconds, row):
        """The matching stretches of frames (Tq, D) of a video of `seconds` and a content: list of `Place`, best first."""
        fps, out = float(self.fps), []
        for found in align(self.matrix(frames, row), **self.calibration.get("align", {})):
            ends = min(found.query_end / fps, seconds), min(found.target_end / fps, row["seconds"])
            out.append(
                Place(
                    found.query_start / fps,
                    ends[0],
                    found.target_start / fps,
                    ends[1],
                    found.similarity,
                )
            )
        return out

    def matrix(self, frames, row):
        """Frame similarities (Tq, Tt) float32 of frames (Tq, D) with a content."""
        return unit(frames) @ unit(self.store.frames(row)).T

    def duplicates(self, threshold=None, radius=None, metric=None):
        """Groups of videos that share material, the largest first: list of `Group`.

        Pairs come from a FAISS range search among video descriptors (similarity at least `radius`) and are kept where the
        frame-level similarity reaches `threshold`; the shorter video asks. Files of one content are a group of their own
        accord. Defaults as calibrated (the threshold is stricter than a query's, for groups grow by their weakest link);
        InputError where nothing is.
        """
        metric = known_metric(metric or self.calibration.get("metric", METRIC))
        threshold = self.calibration.get("copies_threshold") if threshold is None else threshold
        radius = self.calibration.get("radius") if radius is None else radius
        if threshold is None or radius is None:
            raise InputError("this index's model is not calibrated; give --threshold and --radius")
        pairs = {}  # the shorter video's content: the others
        lengths = dict(self.store.db.execute("SELECT id, frames FROM contents"))
        for a, b in self.nearest.range_search(radius):
            short, long = sorted((a, b), key=lambda number: (lengths[number], number))
            pairs.setdefault(short, []).append(long)
        links = [
            link
            for short, others in pairs.items()
            for link in self._links(short, others, threshold, metric)
        ]
        return self._groups(links)

    def _links(self, number, others, threshold, metric):
        row, rows = self.store.content(number), [self.store.content(other) for other in others]
        frames = self.store.frames(row)
        scores = similarity_table(
            [unit(frames)], [unit(self.store.frames(other)) for other in rows], metric
        )[0]
        for other, score in zip(rows, scores.tolist(), strict=True):
            if score >= threshold:
                yield Link(
                    number, other["id"], min(score, 1.0), self.places(frames, row["seconds"], other)
                )

    def _groups(self, links):
        """Connected components of the links, and contents of several files."""
        copied = "SELECT content FROM files GROUP BY content HAVING count(*) > 1"
        contents = {number for link in links for number in link[:2]} | {
            number for (number,) in self.store.db.execute(copied)
        }
        if not contents:
            return []
        order = {number: i for i, number in enumerate(sorted(contents))}
        ends = np.array([[order[link.a], order[link.b]] for link in links], int).reshape(-1, 2).T
        graph = coo_array((np.ones(len(links)), ends), shape=(len(order),) * 2)
        labels = connected_components(graph, directed=False)[1]
        groups = [Group({}, {}, []) for _ in range(labels.max() + 1)]
        for number, i in order.items():
            groups[labels[i]].files[number] = self.store.paths(number)
            groups[labels[i]].seconds[number] = self.store.content(number)["seconds"]
        for link in sorted(links, key=lambda link: -link.score):
            groups[labels[order[link.a]]].links.append(link)
        return sorted(groups, key=lambda group: -len(group.paths))


def known_metric(name):
    if name not in METRICS:
        raise InputError(f"metric {name!r} cannot rank here; choose from {', '.join(METRICS)}")
    return name


def unit(x):
    """Rows of x as float32 of unit length: half precision has rounded them."""
    x = np.asarray(x, np.float32)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def versions():
    """The packages that decide the numbers in an index."""
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "av", "numpy", "faiss-cpu")}


def walk(sources, index_folder):
    """The files to index: [(absolute path, bytes, mtime in ns)], and [(path, reason)] of what cannot be looked into.

    A file that is named is taken whatever its suffix; folders are searched as extract_features.py does (no hidden files, no
    suffix that is surely no video, links followed), but each is entered once, by whatever paths it is reached.
    """
    from features.listing import NON_VIDEO_SUFFIXES

    found, failed, entered = {}, [], {inode(index_folder)} if os.path.isdir(index_folder) else set()

    def take(path):
        try:
            facts = os.stat(path)
            if not stat.S_ISREG(facts.st_mode):
                raise OSError(0, "it is no regular file")
            found[path] = (path, facts.st_size, facts.st_mtime_ns)
        except OSError as error:
            failed.append((path, error.strerror))

    def walk_folder(folder):
        def complain(error):
            failed.append((error.filename, error.strerror))

        for top, folders, files in os.walk(folder, followlinks=True, onerror=complain):
            if inode(top) in entered:
                folders.clear()
                continue
            entered.add(inode(top))
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in sorted(files):
                if not name.startswith(".") and Path(name).suffix.lower() not in NON_VIDEO_SUFFIXES:
                    take(os.path.join(top, name))

    for source in map(os.path.abspath, sources):
        walk_folder(source) if os.path.isdir(source) else take(source)
    return list(found.values()), failed


def missing(known, sources, found, failed):
    """The files of `known` in the folders `sources` that `walk` did not meet; not where it could not look."""
    inside = tuple(
        os.path.join(os.path.abspath(source), "") for source in sources if os.path.isdir(source)
    )
    shut = tuple(os.path.join(path, "") for path, _ in failed)
    there = {path for path, _, _ in found} | {path for path, _ in failed}
    return [
        path
        for path in known
        if path not in there and path.startswith(inside) and not path.startswith(shut)
    ]


def inode(path):
    facts = os.stat(path)
    return facts.st_dev, facts.st_ino
