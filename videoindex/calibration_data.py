"""What calibrate.py measures on: the demo's videos in an index, and the truth about them."""

import json
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from datasets.demo import edits, plan
from datasets.demo_segments import shared_film, video_time
from datasets.registry import load_evaluation_set
from files import atomic
from retrieval.similarity import similarity_table
from videoindex.index import METRIC, VideoIndex, l2_normalise
from videoindex.pipeline import EncodedVideo

EVALUATION_SETS = {"val": "DEMO-VAL", "test": "DEMO"}
ANNOTATIONS = {"val": "demo_val.json", "test": "demo.json"}
# A kind of edit in the words of users, and the edits of the demo that belong to it.
EDIT_KINDS = {
    "mirrored": ("mirror",),
    "bordered": ("letterbox", "pillarbox", "inset"),
    "captioned": ("caption",),
    "re-coloured": ("hue", "saturation", "grey", "sepia", "balance", "negate"),
    "cropped": ("crop", "crop_centre", "crop_tall"),
    "speed-changed": ("faster", "slower"),
}
# A copy is "trimmed" if at least this share of the query's film is cut from it.
TRIMMED = 0.1


class DemoPart:
    """The val or the test part of the demo, in an index.

    name: "val" or "test"
    set: its EvaluationSet
    labels: {query: {label: [videos]}}
    facts: {video: which film it shows, and how it was made} (demo_segments.json)
    contents: {video: its Content in the index}
    frames: {video: frame descriptors (T, D) float32}
    """

    def __init__(self, demo: Path, name: str, index: VideoIndex):
        annotations = demo / "annotations"
        self.name = name
        self.set = load_evaluation_set(EVALUATION_SETS[name], annotations)
        self.labels = json.loads((annotations / ANNOTATIONS[name]).read_text())
        self.facts = json.loads((annotations / "demo_segments.json").read_text())
        self.index = index
        index.add([demo / "videos" / name])
        self.contents, self.frames = {}, {}
        indexed = contents_by_stem(index)
        for video in self.set.database:
            content = indexed[video]
            self.contents[video] = content
            self.frames[video] = l2_normalise(index.store.frame_descriptors(content))

    def score_table(self, metric: str = METRIC) -> np.ndarray:
        """The frame-level similarities (Q, N) of the queries with the database."""
        queries = [self.frames[video] for video in self.set.queries]
        videos = [self.frames[video] for video in self.set.database]
        return similarity_table(queries, videos, metric)

    def search_rankings(self, shortlist: int) -> dict[str, dict[str, float]]:
        """The rankings of `search.py query` as {query: {video: similarity}}.

        The shortlist comes first, re-ranked; the other videos follow as they were.
        """
        video_of = {content.id: video for video, content in self.contents.items()}
        rankings = {}
        for query in self.set.queries:
            content, store = self.contents[query], self.index.store
            clip = EncodedVideo(
                path=Path(query),
                seconds=content.seconds,
                frame_descriptors=store.frame_descriptors(content),
                window_descriptors=store.window_descriptors(content),
            )
            matches = self.index.query(
                clip,
                top=shortlist,
                threshold=-2,
                shortlist=shortlist,
                metric=METRIC,
                with_segments=False,
            )
            nearest = self.index.nearest.search(clip.window_descriptors, len(video_of))
            order = [match.content for match in matches] + [number for number, _ in nearest]
            order = dict.fromkeys(order)  # each once, at its first place
            rankings[query] = {video_of[number]: -float(rank) for rank, number in enumerate(order)}
        return rankings

    def labelled_scores(self, table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The score and the label of every pair except a video with itself.

        Args:
            table: of `score_table`.

        Returns:
            scores (n,), labels (n,): "ND", "DS", "CS", "IS", "film" for a pair that shares film
            but less than 2 s of it, or "".
        """
        scores, labels = [], []
        for query, row in zip(self.set.queries, table, strict=True):
            label_of = {}
            for label, videos in self.labels[query].items():
                label_of.update(dict.fromkeys(videos, label))
            for video, score in zip(self.set.database, row, strict=True):
                if video == query:
                    continue
                label = label_of.get(video, "")
                if label not in ("ND", "DS") and self.true_segments(query, video):
                    label = "film"
                scores.append(score)
                labels.append(label)
        return np.array(scores), np.array(labels)

    def true_segments(self, query: str, video: str) -> list[tuple[float, float, float, float]]:
        """Where the two show the same film.

        Returns:
            [(query start, query end, video start, video end)] in seconds.
        """
        segments, _ = shared_film(self.facts[query], self.facts[video])
        return [(start, end, begin, stop) for start, begin, end, stop in segments]

    def copies_and_excerpts(
        self, table: np.ndarray, threshold: float
    ) -> Iterator[tuple[str, str, bool]]:
        """Yield (query, a video made from it, whether its score reaches the threshold)."""
        for query, row in zip(self.set.queries, table, strict=True):
            for video, score in zip(self.set.database, row, strict=True):
                if self.facts[video]["source"] == query:
                    yield query, video, bool(score >= threshold)

    def edit_kinds(self, query: str, video: str) -> list[str]:
        """The rows of the recall table in which a video made from a query counts."""
        facts = self.facts[video]
        names = {name for name, _ in facts["edits"]}
        for segment in facts["segments"]:
            names |= {name for name, _ in segment["edits"]}
        kinds = [kind for kind, members in EDIT_KINDS.items() if names & set(members)]
        if facts["role"] != "copy":
            return [*kinds, "excerpts"]
        kinds.append("copies")
        (whole,) = self.facts[query]["segments"]
        shown = sum(end - start for start, end, _, _ in self.true_segments(query, video))
        if shown / whole["video"][1] <= 1 - TRIMMED:
            kinds.append("trimmed")
        return kinds


class SingleEditCopies:
    """For every test query and kind of edit, a copy with that edit alone, rendered and indexed.

    copies: [(kind, query, plan.Clip)]
    frames: {clip id: frame descriptors (T, D) float32}
    """

    def __init__(self, test: DemoPart, folder: Path, index: VideoIndex):
        self.test = test
        self.copies = []
        for query in test.set.queries:
            (whole,) = test.facts[query]["segments"]
            for kind in (*EDIT_KINDS, "trimmed"):
                clip = single_edit_clip(query, kind, *whole["film"])
                self.copies.append((kind, query, clip))
                path = folder / f"{clip.id}.mp4"
                if not path.exists():
                    with atomic(path) as temporary:
                        edits.render(clip, edits.FILM, temporary)
        index.add([folder])
        indexed = contents_by_stem(index)
        self.frames = {}
        for _, _, clip in self.copies:
            descriptors = index.store.frame_descriptors(indexed[clip.id])
            self.frames[clip.id] = l2_normalise(descriptors)

    def true_segment(self, query: str, clip: plan.Clip) -> list[float]:
        """[query start, query end, copy start, copy end] in seconds."""
        (piece,) = clip.pieces
        (whole,) = self.test.facts[query]["segments"]
        length = (piece.end - piece.start) / edits.speed_factor(clip.edits)
        return [video_time(piece.start, whole), video_time(piece.end, whole), 0, length]


def single_edit_clip(query: str, kind: str, start: float, end: float) -> plan.Clip:
    """The clip of film `start` to `end` (s) with one edit of this kind, of middle strength.

    It is drawn from the names of the query and of the kind, so it is always the same.
    """
    rng = random.Random(f"{kind}/{query}")
    chosen = []
    if kind == "trimmed":
        kept = rng.uniform(0.5, 0.8) * (end - start)
        start = plan.to_frame(start + rng.random() * (end - start - kept))
        end = plan.to_frame(start + kept)
    else:
        name = rng.choice(EDIT_KINDS[kind])
        chosen = [[name, edits.draw_parameters(rng, name, (0.2, 0.8))]]
    return plan.Clip(
        id=f"{query} {kind}",
        part="test",
        role="copy",
        source=query,
        grade=1,
        pieces=(plan.Piece(start, end),),
        edits=tuple(chosen),
        encoding={"codec": "h264", "height": 192, "rate": edits.FPS, "bits": 0.15},
    )


def contents_by_stem(index: VideoIndex) -> dict:
    """The contents of an index by the names of their files, without folder and suffix."""
    contents = {}
    for path, known in index.store.known_files().items():
        contents[Path(path).stem] = index.store.content(known.content)
    return contents
