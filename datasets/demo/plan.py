"""What the demo benchmark consists of, and what counts as a copy.

Pure functions of a seed and the shot list; no pixels.

The labels follow from film time alone. For a query and a video, let o be the seconds of film that
both show:

    ND  near-duplicate       o >= 60 % of the query's film and o >= 60 % of the video's
    DS  duplicate scene      otherwise, o >= 2 s
    CS  complementary scene  otherwise, each shows the same place (shots.csv) for 1 s or more
    IS  incident scene       otherwise, each shows the same sequence of the story for 1 s or more

A video has at most one label for a query. How it was edited does not matter.
"""

import collections
import csv
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets.demo import edits

HERE = Path(__file__).resolve().parent
# The sequences of shots.csv. The parts alternate through the story, so that each shows meadow and
# forest, by day and in shade.
PARTS = {
    "train": ("titles", "meadow", "bullying", "resolve", "preparations"),
    "val": ("shade", "stone and log"),
    "test": (
        *("awakening", "follow", "mockery", "bow practice", "walking in", "plank trap"),
        *("squirrel escape", "gliding chase", "capture", "finale"),
    ),
}
ND_SHARE, DS_SECONDS, SCENE_SECONDS = 0.6, 2.0, 1.0
EPSILON = 1e-4  # seconds; all times are whole frames


@dataclass(frozen=True)
class Shot:
    """A row of shots.csv; times in seconds of film."""

    start: float
    end: float
    place: str
    sequence: str


@dataclass(frozen=True)
class Piece:
    """A part of the film, in seconds, with edits of its own: [[name, parameters]]."""

    start: float
    end: float
    edits: tuple = ()


@dataclass(frozen=True)
class Clip:
    """One video of the benchmark.

    part: train, val or test
    role: query, copy, excerpt, window or plain
    source: the query or training window that it was made from, or ""
    grade: 1 is one light edit, 4 a heavy mixture
    pieces: of film, one after another
    edits: over the whole, [[name, parameters]]
    encoding: of `edits.draw_encoding`
    """

    id: str
    part: str
    role: str
    source: str
    grade: int
    pieces: tuple[Piece, ...]
    edits: tuple
    encoding: dict[str, Any]

    @property
    def file(self) -> str:
        """Its path below the output folder."""
        container = edits.CODECS[self.encoding["codec"]][0]
        return f"videos/{self.part}/{self.id}.{container}"

    @property
    def duration(self) -> float:
        """Seconds that it plays."""
        film_seconds = sum(piece.end - piece.start for piece in self.pieces)
        return film_seconds / edits.speed_factor(self.edits)


def to_frame(time: float) -> float:
    """The time of the film's frame nearest to `time`, in seconds."""
    return round(round(time * edits.FPS) / edits.FPS, 6)


def read_shots(path: str | Path = HERE / "shots.csv") -> list[Shot]:
    shots = []
    with open(path, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            start, end = to_frame(float(row["start"])), to_frame(float(row["end"]))
            shots.append(Shot(start, end, row["place"], row["sequence"]))
    return shots


# --- labels -------------------------------------------------------------------------------------


def merged_spans(pieces: Iterable[Piece]) -> list[list[float]]:
    """The film of some pieces as disjoint [start, end], so that film shown twice counts once."""
    spans = []
    for start, end in sorted((piece.start, piece.end) for piece in pieces):
        if spans and start <= spans[-1][1]:
            spans[-1][1] = max(spans[-1][1], end)
        else:
            spans.append([start, end])
    return spans


def total_seconds(spans: Iterable[Sequence[float]]) -> float:
    return sum(end - start for start, end in spans)


def shared_seconds(a: Clip, b: Clip) -> float:
    """Seconds of film that two clips have in common."""
    total = 0.0
    for a_start, a_end in merged_spans(a.pieces):
        for b_start, b_end in merged_spans(b.pieces):
            total += max(0.0, min(a_end, b_end) - max(a_start, b_start))
    return total


def shown_scenes(clip: Clip, shots: Iterable[Shot]) -> set[tuple[str, str]]:
    """What a clip shows for SCENE_SECONDS or more: {("place", name), ("sequence", name)}."""
    seconds = collections.Counter()
    for start, end in merged_spans(clip.pieces):
        for shot in shots:
            common = max(0.0, min(end, shot.end) - max(start, shot.start))
            seconds["place", shot.place] += common
            seconds["sequence", shot.sequence] += common
    return {scene for scene, shown in seconds.items() if shown >= SCENE_SECONDS - EPSILON}


def label(query: Clip, clip: Clip, scenes_of: Callable[[Clip], set]) -> str | None:
    """ND, DS, CS, IS or None, by the rule at the top of this file.

    Args:
        scenes_of: gives `shown_scenes` of a clip.
    """
    common = shared_seconds(query, clip)
    query_film = total_seconds(merged_spans(query.pieces))
    clip_film = total_seconds(merged_spans(clip.pieces))
    if common >= ND_SHARE * query_film - EPSILON and common >= ND_SHARE * clip_film - EPSILON:
        return "ND"
    if common >= DS_SECONDS - EPSILON:
        return "DS"
    kinds = {kind for kind, _ in scenes_of(query) & scenes_of(clip)}
    if "place" in kinds:
        return "CS"
    return "IS" if kinds else None


def annotation(clips: Sequence[Clip], shots: Sequence[Shot]) -> dict[str, dict[str, list[str]]]:
    """The annotation of the clips of one part, in FIVR's form: {query: {label: [ids]}}."""
    scenes = {clip.id: shown_scenes(clip, shots) for clip in clips}
    table = {}
    for query in clips:
        if query.role != "query":
            continue
        lists = {"ND": [], "DS": [], "CS": [], "IS": []}
        for clip in clips:
            kind = label(query, clip, lambda side: scenes[side.id])
            if kind and clip is not query:
                lists[kind].append(clip.id)
        table[query.id] = lists
    return table


# --- the plan -----------------------------------------------------------------------------------


def film_spans(shots: Iterable[Shot], part: str, max_gap: float = 0.3) -> list[list[float]]:
    """The part's film without its black pauses: [[start, end]]."""
    spans = []
    for shot in shots:
        if shot.sequence not in PARTS[part]:
            continue
        if spans and shot.start - spans[-1][1] <= max_gap:
            spans[-1][1] = shot.end
        else:
            spans.append([shot.start, shot.end])
    return spans


def window_at(spans: Sequence, share: float, length: float) -> tuple[float, float]:
    """A window of `length` seconds inside one of the spans.

    Its middle is at `share` (0 to 1) of all their film, or as near to it as the span allows.
    """
    middle = share * total_seconds(spans)
    for start, end in spans:
        if middle <= end - start or [start, end] == list(spans[-1]):
            length = min(length, end - start)
            first = min(max(start, start + middle - length / 2), end - length)
            return to_frame(first), to_frame(first + length)
        middle -= end - start


class Planner:
    """Draws the clips of one part. All randomness comes from one generator of seed and part."""

    def __init__(self, seed: int, part: str, shots: Sequence[Shot]):
        self.rng = random.Random(f"{seed}/{part}")
        self.part, self.shots = part, shots
        self.spans = film_spans(shots, part)

    def clip(self, name, role, grade, pieces, source=""):
        """A clip of these pieces, with edits and an encoding of the grade."""
        chosen = edits.draw_edits(self.rng, grade)
        encoding = edits.draw_encoding(self.rng, grade)
        return Clip(
            id=f"{self.part}_{name}",
            part=self.part,
            role=role,
            source=source,
            grade=grade,
            pieces=tuple(pieces),
            edits=tuple(chosen),
            encoding=encoding,
        )

    def label(self, query, clip):
        return label(query, clip, lambda side: shown_scenes(side, self.shots))

    def windows(self, count, shortest=8.0, longest=14.0):
        """Windows spread evenly over the part's film: [(start, end)]."""
        windows = []
        for i in range(count):
            length = self.rng.uniform(shortest, longest)
            windows.append(window_at(self.spans, (i + 0.5) / count, length))
        return windows

    def random_piece(self, length):
        return Piece(*window_at(self.spans, self.rng.random(), length))

    def copy(self, name, grade, original):
        """A near-duplicate of a clip: both ends moved, sometimes a jump cut, then the edits."""
        start, end = original.pieces[0].start, original.pieces[-1].end
        lowest, highest = next(
            span for span in self.spans if span[0] - 0.1 <= start and end <= span[1] + 0.1
        )
        reach = 0.08 * grade * (end - start)
        while True:
            first = start + self.rng.uniform(-0.4, 1) * reach
            first = to_frame(min(max(lowest, first), end))
            last = end - self.rng.uniform(-0.4, 1) * reach
            last = to_frame(max(min(highest, last), start))
            pieces = [Piece(first, last)]
            if grade >= 3 and self.rng.random() < 0.25:
                cut = first + self.rng.uniform(0.3, 0.6) * (last - first)
                resume = cut + 0.12 * (last - first)
                pieces = [Piece(first, to_frame(cut)), Piece(to_frame(resume), last)]
            made = self.clip(name, "copy", grade, pieces, original.id)
            if last - first >= 4 and self.label(original, made) == "ND":
                return made

    def excerpt(self, name, grade, original):
        """A duplicate scene: 3 to 6 s of a clip, edited, inside 6 to 14 s of the part's film."""
        whole = original.pieces[0]
        while True:
            length = self.rng.uniform(3, 6)
            start = to_frame(self.rng.uniform(whole.start, whole.end - length))
            own_edits = edits.draw_edits(self.rng, 2, leave_out=("time", "turn"))
            part = Piece(start, to_frame(start + length), tuple(own_edits))
            hosts = [self.random_piece(self.rng.uniform(3, 7)) for _ in range(2)]
            pieces = self.rng.choice(
                [[hosts[0], part, hosts[1]], [hosts[0], hosts[1], part], [part, hosts[0], hosts[1]]]
            )
            host_clip = Clip("", "", "", "", 0, tuple(hosts), (), {})
            if shared_seconds(original, host_clip) > 0:
                continue
            made = self.clip(name, "excerpt", grade, pieces, original.id)
            if self.label(original, made) == "DS":
                return made


def plan_evaluation(
    seed: int,
    part: str,
    shots: Sequence[Shot],
    queries: int,
    copies: int,
    excerpts: int,
    windows: int,
) -> list[Clip]:
    """Queries, each with copies and excerpts; and windows from everywhere in the part.

    The windows are edited like the copies, so that looking edited is not a cue.
    """
    planner = Planner(seed, part, shots)
    clips = []
    for number, span in enumerate(planner.windows(queries)):
        query = planner.clip(f"q{number:02d}", "query", 1, [Piece(*span)])
        clips.append(query)
        for i, grade in enumerate([2, 4, 4, 4, 4][:copies]):
            clips.append(planner.copy(f"q{number:02d}_copy{i}", grade, query))
        for i in range(excerpts):
            clips.append(planner.excerpt(f"q{number:02d}_in{i}", 2, query))
    for number, span in enumerate(planner.windows(windows)):
        grade = planner.rng.choice([3, 4, 4, 4])
        clips.append(planner.clip(f"w{number:03d}", "window", grade, [Piece(*span)]))
    return clips


def plan_training(
    seed: int,
    shots: Sequence[Shot],
    windows: int,
    grades: Sequence[int] = (3, 4, 4, 4, 4, 4, 4),
) -> list[Clip]:
    """Training windows: each plain, in heavier copies, and as an excerpt in other training film."""
    planner = Planner(seed, "train", shots)
    clips = []
    for number, span in enumerate(planner.windows(windows)):
        plain = planner.clip(f"w{number:02d}", "plain", 1, [Piece(*span)])
        clips.append(plain)
        for i, grade in enumerate(grades):
            clips.append(planner.copy(f"w{number:02d}_copy{i}", grade, plain))
        clips.append(planner.excerpt(f"w{number:02d}_in", 2, plain))
    return clips


def plan(seed: int = 0, shots: Sequence[Shot] | None = None) -> list[Clip]:
    """Every clip of the benchmark for a seed."""
    shots = shots or read_shots()
    return [
        *plan_training(seed, shots, windows=55),
        *plan_evaluation(seed, "val", shots, queries=12, copies=4, excerpts=1, windows=18),
        *plan_evaluation(seed, "test", shots, queries=48, copies=5, excerpts=2, windows=76),
    ]


# --- what the annotation files hold -------------------------------------------------------------


def training_pairs(
    clips: Sequence[Clip], limit: int = 1500, min_overlap: float = 0.3
) -> list[dict[str, Any]]:
    """The training pairs in VCDB's form, drawn evenly over the videos.

    A pair's common film is at least `min_overlap` of each video's.
    """
    film = {clip.id: total_seconds(merged_spans(clip.pieces)) for clip in clips}
    turns = []  # (number of pairs of this clip before it, number of the clip, pair)
    for i, a in enumerate(clips):
        pairs = []
        for b in clips[i + 1 :]:
            common = shared_seconds(a, b)
            overlap = [round(common / film[a.id], 4), round(common / film[b.id], 4)]
            if min(overlap) >= min_overlap:
                pairs.append({"videos": [a.id, b.id], "overlap": overlap})
        random.Random(a.id).shuffle(pairs)
        turns += [(turn, i, pair) for turn, pair in enumerate(pairs)]
    turns.sort(key=lambda item: item[:2])  # every clip's first pair, every clip's second, ...
    return [pair for _, _, pair in turns[:limit]]


def ground_truth(clip: Clip) -> dict[str, Any]:
    """The entry of demo_segments.json: which film is where in a clip, and what was done to it."""
    rate = edits.speed_factor(clip.edits)
    start, segments = 0.0, []
    for piece in clip.pieces:
        end = start + (piece.end - piece.start) / rate
        segment = {
            "film": [piece.start, piece.end],
            "video": [round(start, 4), round(end, 4)],
            "edits": list(piece.edits),
        }
        segments.append(segment)
        start = end
    return {
        "part": clip.part,
        "file": clip.file,
        "role": clip.role,
        "source": clip.source,
        "grade": clip.grade,
        "edits": list(clip.edits),
        "encoding": clip.encoding,
        "segments": segments,
    }
