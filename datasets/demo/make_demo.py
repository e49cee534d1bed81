"""The demo benchmark: cut the embedded film into clips, make copies, write annotations.

    python datasets/demo/make_demo.py build --output demo        # two minutes on two cores
    python datasets/demo/make_demo.py film big_buck_bunny.mp4    # how film.mp4 was made

`build` writes under the output folder

    videos/{train,val,test}/ID.{mp4,mkv,avi,webm}
    annotations/demo.json, demo_ids.txt          the test part in FIVR's form, its database
    annotations/demo_val.json, demo_val_ids.txt  the validation part
    annotations/demo_train.pickle                training pairs in VCDB's form, each video's film
    annotations/demo_segments.json               film and video seconds, edits, grade, encoding

The parts use disjoint film. Labels follow from film time alone, by the rule in plan.py. A build
that was stopped continues where it was; a complete one is left alone.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import pickle
import signal
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import av
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import utils
from datasets.demo import edits, plan
from distributed import run_main
from files import Lock, atomic, write_json
from processes import end_with_parent

FILM_SECONDS = 490.0  # then the credits begin
CREDIT = {  # stored inside film.mp4, so that a copy of it alone still says whose it is
    "title": "Big Buck Bunny (without credits and sound, 456x256, 12 frames a second)",
    "artist": "Blender Foundation | www.blender.org",
    "copyright": "(c) 2008 Blender Foundation, peach.blender.org, CC BY 3.0",
}
ANNOTATIONS = [
    "demo.json",
    "demo_ids.txt",
    "demo_val.json",
    "demo_val_ids.txt",
    "demo_train.pickle",
    "demo_segments.json",
]
VERSION = 1  # increase it when the same plan would give other pixels


def main(argv=None):
    args = parse_args(argv)
    if args.command == "film":
        make_film(args.source, args.output)
        return
    clips = build(args.output, args.seed, args.workers, args.limit)
    seconds = sum(clip.duration for clip in clips)
    print(f"{len(clips)} videos, {seconds:.0f} s, under {args.output}")


def parse_args(argv=None):
    parser = utils.Parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser(
        "build", help="make the benchmark", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    command.add_argument(
        "--output",
        required=True,
        help="folder to write to; may hold an earlier or unfinished build",
    )
    command.add_argument(
        "--seed", type=int, default=0, help="another seed gives other windows, edits and encodings"
    )
    command.add_argument("--workers", type=int, default=2, help="processes; as many as cores")
    command.add_argument(
        "--limit", type=int, help="only the first videos of each part, this many, to try things out"
    )
    command = commands.add_parser("film", help="make film.mp4 from a copy of the film")
    command.add_argument("source", help="Big Buck Bunny, 1280x720 or larger")
    command.add_argument("--output", default=edits.FILM, help="file to write")
    args = parser.parse_args(argv)
    if args.command == "build" and (
        args.workers < 1 or (args.limit is not None and args.limit < 1)
    ):
        raise utils.InputError("--workers and --limit count from 1; give a larger number")
    return args


# --- film ---------------------------------------------------------------------------------------


def make_film(source: str | Path, output: str | Path = edits.FILM, crf: int = 29) -> None:
    """Make film.mp4: no credits, 456x256, 12 frames a second, a keyframe every two seconds."""
    source = utils.require_path(source, "film")
    try:
        encode_film(source, output, crf)
    except (av.FFmpegError, OSError, IndexError) as error:  # IndexError: no video stream
        raise utils.InputError(
            f"film {str(source)!r} cannot be re-encoded ({error}); give a video file"
        ) from None


def encode_film(source: Path, output: str | Path, crf: int) -> None:
    """The work of `make_film`; raises what FFmpeg raises."""
    width, height = edits.SIZE
    filters = [f"fps={edits.FPS}", f"scale={width}:{height}:flags=lanczos"]
    options = {"crf": str(crf), "preset": "slower", "g": str(2 * edits.FPS)}
    with (
        av.open(str(source)) as film,
        atomic(output) as path,
        av.open(str(path), "w", format="mp4") as target,
    ):
        film.streams.video[0].thread_type = "AUTO"
        target.metadata.update(CREDIT)
        stream = target.add_stream("libx264", rate=edits.FPS, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.thread_count = 2
        progress = tqdm(total=round(FILM_SECONDS * edits.FPS), unit="frame")
        for frame in edits.filter_frames(filters, film.decode(video=0)):
            if frame.time >= FILM_SECONDS:
                break
            frame.pict_type = 0  # the encoder chooses
            target.mux(stream.encode(frame))
            progress.update()
        target.mux(stream.encode(None))


# --- build --------------------------------------------------------------------------------------


def build(
    output: str | Path, seed: int = 0, workers: int = 2, limit: int | None = None
) -> list[plan.Clip]:
    """Make the benchmark under `output`; returns its clips.

    Args:
        workers: processes.
        limit: keep only the first clips of each part, this many.
    """
    output, shots = Path(output).expanduser(), plan.read_shots()
    clips = plan.plan(seed, shots)
    if limit is not None:
        parts = clips_by_part(clips).values()
        clips = [clip for members in parts for clip in members[:limit]]
    if output.exists() and not output.is_dir():
        raise utils.InputError(f"{output} is a file; name a folder for --output")
    with Lock(output, folder=True):
        _build(output, clips, shots, seed, workers)
    return clips


def _build(output, clips, shots, seed, workers):
    """Build what the folder lacks; the caller has locked it."""
    record, stamp = output / "build.json", fingerprint(clips)
    manifest = read_manifest(record)
    if manifest.get("stamp") != stamp:
        remove_other_build(output, manifest, clips)
        files = [clip.file for clip in clips] + [f"annotations/{name}" for name in ANNOTATIONS]
        manifest = {"stamp": stamp, "seed": seed, "complete": False, "files": files}
        write_json(record, manifest)
    if manifest["complete"] and all((output / name).exists() for name in manifest["files"]):
        print(f"{output} holds this build already")
        return
    render_all(clips, output, workers)
    write_annotations(output / "annotations", clips, shots)
    write_json(record, {**manifest, "complete": True})


def clips_by_part(clips: Sequence[plan.Clip]) -> dict[str, list[plan.Clip]]:
    by_part = {part: [] for part in plan.PARTS}
    for clip in clips:
        by_part[clip.part].append(clip)
    return by_part


def fingerprint(clips: Sequence[plan.Clip]) -> str:
    """A hash of everything that decides the pixels: film, filters, codecs, plan."""
    film = hashlib.sha256(utils.require_path(edits.FILM, "film").read_bytes()).hexdigest()
    filters = [edit.filters for edit in edits.EDITS.values()]
    planned = [dataclasses.asdict(clip) for clip in clips]
    text = json.dumps([VERSION, film, filters, edits.CODECS, planned])
    return hashlib.sha256(text.encode()).hexdigest()


def read_manifest(record: Path) -> dict[str, Any]:
    """What an earlier run left in the folder: stamp, seed, complete, files. {} for a new folder."""
    try:
        manifest = json.loads(record.read_text()) if record.exists() else {}
        valid = all(map(_is_built_file, manifest.get("files", [])))
    except (ValueError, AttributeError, IndexError):
        valid = False
    if not valid:
        raise utils.InputError(
            f"{record} is not a build's record; remove it, or choose another --output"
        )
    return manifest


def _is_built_file(name):
    """Whether it is a name that a build may remove: none outside its two folders."""
    return Path(name).parts[0] in ("videos", "annotations") and ".." not in name


def remove_other_build(output: Path, manifest: dict[str, Any], clips: Sequence[plan.Clip]) -> None:
    """Remove the files of an earlier build of another plan, and nothing else."""
    for name in manifest.get("files", []):
        (output / name).unlink(missing_ok=True)
    # A video whose record was lost must not pass for a new one.
    for clip in clips:
        for path in (output / clip.file).parent.glob(f"{clip.id}.*"):
            path.unlink()


def render_all(clips: Sequence[plan.Clip], output: Path, workers: int) -> None:
    """Render the clips whose file does not exist yet.

    On Ctrl-C the videos in progress are finished and the others are dropped.
    """
    missing = [clip for clip in clips if not (output / clip.file).exists()]
    pool = ProcessPoolExecutor(workers, initializer=start_worker, initargs=(os.getpid(),))
    try:
        tasks = [pool.submit(render_one, clip, output) for clip in missing]
        for task in tqdm(as_completed(tasks), total=len(tasks), unit="video", desc="rendering"):
            task.result()
    except BrokenProcessPool:
        raise utils.InputError(
            "a worker was killed, perhaps for lack of memory; run it again with fewer --workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def start_worker(parent: int) -> None:
    """A worker ends with its parent, and leaves Ctrl-C, which reaches the whole group, to it."""
    end_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def render_one(clip: plan.Clip, output: Path) -> None:
    """Render one clip to its file; runs in a worker."""
    try:
        with atomic(output / clip.file) as path:
            edits.render(clip, edits.FILM, path)
    except (av.FFmpegError, OSError) as error:
        raise utils.InputError(
            f"{output / clip.file} cannot be made ({error}); is the disk full, or film.mp4 damaged?"
        ) from None


def write_annotations(folder: Path, clips: Sequence[plan.Clip], shots: Sequence[plan.Shot]) -> None:
    """Write the annotation files of a plan."""
    by_part = clips_by_part(clips)
    for part, name in (("test", "demo"), ("val", "demo_val")):
        write_json(folder / f"{name}.json", plan.annotation(by_part[part], shots))
        with atomic(folder / f"{name}_ids.txt") as path:
            lines = [f"{clip.id}\n" for clip in by_part[part]]
            path.write_text("".join(lines), encoding="utf-8")

    ids, segments = [], {}
    for clip in by_part["train"]:
        ids.append(clip.id)
        segments[clip.id] = [["film", piece.start, piece.end] for piece in clip.pieces]
    training = {
        "video_pairs": plan.training_pairs(by_part["train"]),
        "index": ids,
        "negs": list(ids),
        "segments": segments,
    }
    with atomic(folder / "demo_train.pickle") as path:
        path.write_bytes(pickle.dumps(training, protocol=2))

    truth = {clip.id: plan.ground_truth(clip) for clip in clips}
    write_json(folder / "demo_segments.json", truth)


if __name__ == "__main__":
    run_main(main)
