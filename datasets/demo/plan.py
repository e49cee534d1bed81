"""What the demo benchmark consists of, and what counts as a copy: pure functions of a seed and the shot list, no pixels.

The rule of the labels, from film time alone. For a query and a video let o be the seconds of film that both show:
    ND  near-duplicate:      o >= 60 % of the query's film and o >= 60 % of the video's
    DS  duplicate scene:     otherwise, o >= 2 s
    CS  complementary scene: otherwise, each shows the same place (shots.csv) for 1 s or more
    IS  incident scene:      otherwise, each shows the same sequence of the story for 1 s or more
A video is in one list at most; what edits were made does not enter.
"""

import collections
import csv
import random
from dataclasses import dataclass
from pathlib import Path

from datasets.demo import edits

HERE = Path(__file__).resolve().parent
PARTS = {  # the sequences of shots.csv; alternating, so that every part sees meadow and forest, by day and in shade
    "train": ("titles", "meadow", "bullying", "resolve", "preparations"),
    "val": ("shade", "stone and log"),
    "test": (
        *("awakening", "follow", "mockery", "bow practice", "walking in", "plank trap"),
        *("squirrel escape", "gliding chase", "capture", "finale"),
    ),
}
ND_SHARE, DS_SECONDS, SCENE_SECONDS = 0.6, 2.0, 1.0
EPSILON = 1e-4  # s; all times are whole frames


@dataclass(frozen=True)
class Shot:
    start: float  # s of film
    end: float
    place: str
    sequence: str


@dataclass(frozen=True)
class Piece:
    """A stretch of film, in seconds, with edits of its own: [[name, parameters]]."""

    start: float
    end: float
    edits: tuple = ()


@dataclass(frozen=True)
class Clip:
    """One video: pieces of film one after the other, edits over the whole, and how it is encoded."""

    id: str
    part: str  # train, val, test
    role: str  # query, copy, excerpt, window, plain
    source: str  # the query or training window it was made from, or ""
    grade: int  # 1 one light edit ... 4 a heavy mix
    pieces: tuple
    edits: tuple
    encoding: dict

    @property
    def file(self):
        return f"videos/{self.part}/{self.id}.{edits.CODECS[self.encoding['codec']][0]}"

    @property
    def duration(self):
        return sum(piece.end - piece.start for piece in self.pieces) / edits.speed(self.edits)


def to_frame(time):
    """`time` on the film's grid of frames."""
    return round(round(time * edits.FPS) / edits.FPS, 6)


def read_shots(path=HERE / "shots.csv") -> list:
    with open(path, newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file)
        return [
            Shot(to_frame(float(r["start"])), to_frame(float(r["end"])), r["place"], r["sequence"])
            for r in rows
        ]


# --- labels ----------------------------------------------------------------------------------------------------------


def merged(pieces):
    """The film of some pieces as disjoint intervals, so that film shown twice counts once."""
    spans = []
    for start, end in sorted((piece.start, piece.end) for piece in pieces):
        if spans and start <= spans[-1][1]:
            spans[-1][1] = max(spans[-1][1], end)
        else:
            spans.append([start, end])
    return spans


def seconds(spans):
    return sum(end - start for start, end in spans)


def shared(a, b) -> float:
    """Seconds of film that two clips have in common."""
    pairs = ((x, y) for x in merged(a.pieces) for y in merged(b.pieces))
    return sum(max(0.0, min(x[1], y[1]) - max(x[0], y[0])) for x, y in pairs)


def scenes(clip, shots) -> set:
    """The scenes that a clip shows for SCENE_SECONDS or more: {("place", name), ("sequence", name)}."""
    time = collections.Counter()
    for start, end in merged(clip.pieces):
        for shot in shots:
            common = max(0.0, min(end, shot.end) - max(start, shot.start))
            time["place", shot.place] += common
            time["sequence", shot.sequence] += common
    return {scene for scene, length in time.items() if length >= SCENE_SECONDS - EPSILON}


def label(query, clip, scenes_of):
    """ND, DS, CS, IS or None: the rule at the top of this file. `scenes_of(clip)` is what `scenes` gives for it."""
    common = shared(query, clip)
    if all(common >= ND_SHARE * seconds(merged(side.pieces)) - EPSILON for side in (query, clip)):
        return "ND"
    if common >= DS_SECONDS - EPSILON:
        return "DS"
    kinds = {kind for kind, _ in scenes_of(query) & scenes_of(clip)}
    return "CS" if "place" in kinds else "IS" if kinds else None


def annotation(clips, shots) -> dict:
    """FIVR's form: {query: {"ND": [ids], "DS": [...], "CS": [...], "IS": [...]}} over the clips of one part."""
    seen = {clip.id: scenes(clip, shots) for clip in clips}
    table = {
        clip.id: {"ND": [], "DS": [], "CS": [], "IS": []} for clip in clips if clip.role == "query"
    }
    for query in (clip for clip in clips if clip.id in table):
        for clip in clips:
            kind = label(query, clip, lambda side: seen[side.id])
            if kind and clip is not query:
                table[query.id][kind].append(clip.id)
    return table


# --- the plan --------------------------------------------------------------------------------------------------------


def stretches(shots, part, gap=0.3):
    """The part's film without its black pauses: [(start, end)]."""
    spans = []
    for shot in shots:
        if shot.sequence not in PARTS[part]:
            continue
        if spans and shot.start - spans[-1][1] <= gap:
            spans[-1][1] = shot.end
        else:
            spans.append([shot.start, shot.end])
    return spans


def window(spans, share, length):
    """A window of `length` seconds whose middle lies at `share` (0..1) of the film of `spans`, moved into its stretch."""
    middle = share * seconds(spans)
    for start, end in spans:
        if middle <= end - start or (start, end) == tuple(spans[-1]):
            length = min(length, end - start)
            first = min(max(start, start + middle - length / 2), end - length)
            return to_frame(first), to_frame(first + length)
        middle -= end - start


class Planner:
    """Draws the clips of one part; all randomness comes from one generator seeded by seed and part."""

    def __init__(self, seed, part, shots):
        self.rng, self.part, self.shots = random.Random(f"{seed}/{part}"), part, shots
        self.spans = stretches(shots, part)

    def clip(self, name, role, grade, pieces, source=""):
        drawn = edits.draw(self.rng, grade)
        encoding = edits.draw_encoding(self.rng, grade)
        return Clip(
            f"{self.part}_{name}",
            self.part,
            role,
            source,
            grade,
            tuple(pieces),
            tuple(drawn),
            encoding,
        )

    def label(self, query, clip):
        return label(query, clip, lambda side: scenes(side, self.shots))

    def windows(self, count, low=8.0, high=14.0):
        return [
            window(self.spans, (i + 0.5) / count, self.rng.uniform(low, high)) for i in range(count)
        ]

    def somewhere(self, length):
        return Piece(*window(self.spans, self.rng.random(), length))

    def copy(self, name, grade, original):
        """A near-duplicate of a clip: both ends moved, sometimes a jump cut, then edits of the grade."""
        start, end = original.pieces[0].start, original.pieces[-1].end
        low, high = next(
            span for span in self.spans if span[0] - 0.1 <= start and end <= span[1] + 0.1
        )
        reach = 0.08 * grade * (end - start)
        while True:
            first = to_frame(min(max(low, start + self.rng.uniform(-0.4, 1) * reach), end))
            last = to_frame(max(min(high, end - self.rng.uniform(-0.4, 1) * reach), start))
            pieces = [Piece(first, last)]
            if grade >= 3 and self.rng.random() < 0.25:
                cut = first + self.rng.uniform(0.3, 0.6) * (last - first)
                pieces = [
                    Piece(first, to_frame(cut)),
                    Piece(to_frame(cut + 0.12 * (last - first)), last),
                ]
            made = self.clip(name, "copy", grade, pieces, original.id)
            if last - first >= 4 and self.label(original, made) == "ND":
                return made

    def excerpt(self, name, grade, original):
        """A duplicate scene: 3 to 6 seconds of a clip, edited, inside 6 to 14 seconds of other film of the part."""
        whole = original.pieces[0]
        while True:
            length = self.rng.uniform(3, 6)
            start = to_frame(self.rng.uniform(whole.start, whole.end - length))
            part = Piece(
                start, to_frame(start + length), tuple(edits.draw(self.rng, 2, ("time", "turn")))
            )
            hosts = [self.somewhere(self.rng.uniform(3, 7)) for _ in range(2)]
            pieces = self.rng.choice(
                [[hosts[0], part, hosts[1]], [hosts[0], hosts[1], part], [part, hosts[0], hosts[1]]]
            )
            if (
                sum(shared(original, Clip("", "", "", "", 0, (host,), (), {})) for host in hosts)
                > 0
            ):
                continue
            made = self.clip(name, "excerpt", grade, pieces, original.id)
            if self.label(original, made) == "DS":
                return made


def plan_evaluation(seed, part, shots, queries, copies, excerpts, windows) -> list:
    """Queries, their copies and excerpts, and windows from everywhere in the part, edited alike: a list of Clip."""
    planner = Planner(seed, part, shots)
    rng, clips = planner.rng, []
    for number, span in enumerate(planner.windows(queries)):
        query = planner.clip(f"q{number:02d}", "query", 1, [Piece(*span)])
        clips.append(query)
        grades = [2, 4, 4, 4, 4][:copies]
        clips += [
            planner.copy(f"q{number:02d}_copy{i}", grade, query) for i, grade in enumerate(grades)
        ]
        clips += [planner.excerpt(f"q{number:02d}_in{i}", 2, query) for i in range(excerpts)]
    for number, span in enumerate(planner.windows(windows)):
        clips.append(
            planner.clip(f"w{number:03d}", "window", rng.choice([3, 4, 4, 4]), [Piece(*span)])
        )
    return clips


def plan_training(seed, shots, windows, grades=(3, 4, 4, 4, 4, 4, 4)) -> list:
    """Training windows: each plain, in heavier copies, and as an excerpt inside other training film."""
    planner = Planner(seed, "train", shots)
    clips = []
    for number, span in enumerate(planner.windows(windows)):
        plain = planner.clip(f"w{number:02d}", "plain", 1, [Piece(*span)])
        clips.append(plain)
        clips += [
            planner.copy(f"w{number:02d}_copy{i}", grade, plain) for i, grade in enumerate(grades)
        ]
        clips.append(planner.excerpt(f"w{number:02d}_in", 2, plain))
    return clips


def plan(seed=0, shots=None) -> list:
    """Every clip of the benchmark for a seed."""
    shots = shots or read_shots()
    return [
        *plan_training(seed, shots, windows=55),
        *plan_evaluation(seed, "val", shots, queries=12, copies=4, excerpts=1, windows=18),
        *plan_evaluation(seed, "test", shots, queries=48, copies=5, excerpts=2, windows=76),
    ]


def training_pairs(clips, limit=1500, least=0.3) -> list:
    """VCDB's pairs: videos whose common film is at least `least` of each, `limit` of them drawn evenly over the videos."""
    film = {clip.id: seconds(merged(clip.pieces)) for clip in clips}
    groups = []
    for i, a in enumerate(clips):
        group = []
        for b in clips[i + 1 :]:
            common = shared(a, b)
            overlap = [round(common / film[a.id], 4), round(common / film[b.id], 4)]
            if min(overlap) >= least:
                group.append({"videos": [a.id, b.id], "overlap": overlap})
        random.Random(a.id).shuffle(group)
        groups.append(group)
    turns = [(turn, i, pair) for i, group in enumerate(groups) for turn, pair in enumerate(group)]
    return [pair for _, _, pair in sorted(turns, key=lambda item: item[:2])[:limit]]


def segments(clip) -> dict:
    """Ground truth of one clip: which film is where in it, and what was done to it."""
    rate, at, spans = edits.speed(clip.edits), 0.0, []
    for piece in clip.pieces:
        end = at + (piece.end - piece.start) / rate
        spans.append(
            {
                "film": [piece.start, piece.end],
                "video": [round(at, 4), round(end, 4)],
                "edits": list(piece.edits),
            }
        )
        at = end
    facts = {
        "role": clip.role,
        "source": clip.source,
        "grade": clip.grade,
        "edits": list(clip.edits),
        "encoding": clip.encoding,
    }
    return {"part": clip.part, "file": clip.file, **facts, "segments": spans}
