"""A library of short clips cut from the demo's film, and an index of them."""

import contextlib
import io
import resource
import sys
from types import SimpleNamespace

import numpy as np
import pytest

import search
from datasets.demo import edits, plan
from videoindex.index import VideoIndex
from videoindex.store import FileEntry

ODD = 'new\nline, <b>&"Кино" 映画.mp4'
CLIPS = {  # {name: (pieces of the film in seconds, edits)}
    "a.mp4": ([(100, 108)], []),
    "a mirrored.mp4": ([(100, 108)], [["mirror", {}]]),
    "a bordered.mp4": ([(100, 108)], [["letterbox", {"keep": 0.8, "colour": "black"}]]),
    "b.mp4": ([(200, 208)], []),
    "b faster.mp4": ([(200, 208)], [["faster", {"factor": 1.25}]]),
    "c.mp4": ([(300, 308)], []),
    "c inside.mp4": ([(40, 44), (301, 306), (450, 453)], []),
    ODD: ([(150, 154)], []),
    "folder/d.mp4": ([(250, 254)], []),
    "folder/e.mp4": ([(350, 354)], []),
}


def cut_clip(path, pieces, changes=()):
    """Write a clip of the film: pieces [(start, end)] in seconds, and edits over the whole."""
    clip = plan.Clip(
        id="",
        part="",
        role="",
        source="",
        grade=0,
        pieces=tuple(plan.Piece(*piece) for piece in pieces),
        edits=tuple(changes),
        encoding={"codec": "h264", "height": 160, "rate": 12, "bits": 0.2},
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    edits.render(clip, edits.FILM, path)
    return path


class Library:
    """The clips in `videos`, and an index of them in `index`. Not to be changed: copy the index."""

    def __init__(self, folder, pipeline):
        self.videos, self.index, self.pipeline = folder / "videos", folder / "index", pipeline
        self._encoded = {}
        for name, clip in CLIPS.items():
            cut_clip(self.videos / name, *clip)
        self.made = run_search("index", self.videos, "--index", self.index, "--workers", 1)
        assert self.made.returncode == 0, self.made.stderr

    def open(self):
        return VideoIndex(self.index, pipeline=self.pipeline)

    def path(self, name):
        return str(self.videos / name)

    def clip(self, name):
        """The EncodedVideo of a clip, made once."""
        if name not in self._encoded:
            (self._encoded[name],) = self.pipeline.encode_videos([self.path(name)])
        return self._encoded[name]


def stored_data(index):
    """What an index holds, for comparison: {path: (frames, windows, thumbnails)} in bytes."""
    data = {}
    for path, known in index.store.known_files().items():
        content = index.store.content(known.content)
        data[path] = tuple(index.store.stored_bytes(content).values())
    return data


def damage(index):
    return list(index.store.find_damage())


class AlmostEqual:
    """Equal to stored frame descriptors that differ in their last bits.

    Those bits depend on what was encoded in the same batch.
    """

    def __init__(self, data):
        self.values = np.frombuffer(data, np.float16).astype(float)

    def __eq__(self, data):
        return np.frombuffer(data, np.float16).astype(float) == pytest.approx(self.values, abs=2e-3)


def made_up_video(rng, num_windows=1, size=16, num_frames=3):
    """Something like an EncodedVideo, with random descriptors."""

    def unit_rows(n):
        rows = rng.normal(size=(n, size))
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    return SimpleNamespace(
        seconds=float(num_frames),
        frame_descriptors=unit_rows(num_frames).astype(np.float16),
        window_descriptors=unit_rows(num_windows).astype(np.float32),
        thumbnails=[f"jpeg {i}".encode() for i in range(num_frames)],
    )


def add_made_up(store, number, video, folder=None):
    """Add a video to a store, as the file /v{number}; in a `folder`, the file is made."""
    path = f"/v{number}"
    if folder:
        path = f"{folder}/v{number}"
        open(path, "wb").close()
    store.add_content(f"{number:064}", video, [FileEntry(path, 1, 1)])


def run_search(command, *arguments):
    """Run a command of search.py in this process, on the CPU; gives returncode, stdout, stderr."""
    if command in ("index", "query", "against"):
        arguments = (*arguments, "--device", "cpu")
    stdout, stderr = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2))
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        status = search.main([command, *map(str, arguments)])
        sys.stdout.flush()
        sys.stderr.flush()
    return SimpleNamespace(
        returncode=status or 0,
        stdout=stdout.buffer.getvalue().decode(),
        stderr=stderr.buffer.getvalue().decode(),
    )


@contextlib.contextmanager
def largest_file(size):
    """No file may grow beyond `size` bytes: what a full disk does to a write."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
