"""The demo benchmark: cut the embedded film into clips, make graded copies with FFmpeg's filters and codecs, write annotations.

    python datasets/demo/make_demo.py build --output demo              the benchmark: about two minutes on two cores
    python datasets/demo/make_demo.py film big_buck_bunny.mp4          how film.mp4 was made, from a 1280x720 copy of the film

`build` writes under the output folder
    videos/{train,val,test}/ID.{mp4,mkv,avi,webm}
    annotations/demo.json, demo_ids.txt            the test part in FIVR's form, and every id of its database
    annotations/demo_val.json, demo_val_ids.txt    the validation part
    annotations/demo_train.pickle                  training pairs in VCDB's form, and the film segments of each video
    annotations/demo_segments.json                 for each video: film and video seconds, edits, grade, encoding
The parts use disjoint film. Labels follow from film time alone; the rule is in plan.py. A build that was stopped goes on where
it stood; a complete one is left alone.
"""

import argparse
import dataclasses
import hashlib
import json
import pickle
import signal
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import av
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

import utils
from datasets.demo import edits, plan
from distributed import run_main

FILM = HERE / "film.mp4"
FILM_SECONDS = 490.0  # then come the credits
CREDIT = {  # carried inside film.mp4, so that a copy of it alone still says whose it is
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
VERSION = 1  # raise it when the same plan would give other pixels


def make_film(source, output=FILM, crf=29):
    """film.mp4 from a copy of the film: credits left out, 456x256, 12 frames a second, a keyframe every two seconds."""
    source = utils.require_path(source, "film")
    try:
        encode_film(source, output, crf)
    except (av.FFmpegError, OSError, IndexError) as error:  # IndexError: no video stream
        raise utils.InputError(
            f"film {str(source)!r} cannot be re-encoded ({error}); give a video file"
        ) from None


def encode_film(source, output, crf):
    """The work of `make_film`; raises what FFmpeg raises."""
    filters = [f"fps={edits.FPS}", "scale={}:{}:flags=lanczos".format(*edits.SIZE)]
    with (
        av.open(str(source)) as film,
        utils.atomic(output) as path,
        av.open(str(path), "w", format="mp4") as target,
    ):
        film.streams.video[0].thread_type = "AUTO"
        target.metadata.update(CREDIT)
        options = {"crf": str(crf), "preset": "slower", "g": str(2 * edits.FPS)}
        stream = target.add_stream("libx264", rate=edits.FPS, options=options)
        (stream.width, stream.height), stream.pix_fmt = edits.SIZE, "yuv420p"
        stream.codec_context.thread_count = 2
        progress = tqdm(total=round(FILM_SECONDS * edits.FPS), unit="frame")
        for frame in edits.through(filters, film.decode(video=0)):
            if frame.time >= FILM_SECONDS:
                break
            frame.pict_type = 0
            target.mux(stream.encode(frame))
            progress.update()
        target.mux(stream.encode(None))


def write_annotations(folder, clips, shots):
    """The annotation files of a plan, each written aside and renamed."""
    parts = {part: [clip for clip in clips if clip.part == part] for part in plan.PARTS}
    for part, name in (("test", "demo"), ("val", "demo_val")):
        utils.write_json(folder / f"{name}.json", plan.annotation(parts[part], shots))
        with utils.atomic(folder / f"{name}_ids.txt") as path:
            path.write_text("".join(f"{clip.id}\n" for clip in parts[part]), encoding="utf-8")
    ids = [clip.id for clip in parts["train"]]
    spans = {
        clip.id: [["film", piece.start, piece.end] for piece in clip.pieces]
        for clip in parts["train"]
    }
    training = {
        "video_pairs": plan.training_pairs(parts["train"]),
        "index": ids,
        "negs": list(ids),
        "segments": spans,
    }
    with utils.atomic(folder / "demo_train.pickle") as path:
        path.write_bytes(pickle.dumps(training, protocol=2))
    utils.write_json(
        folder / "demo_segments.json", {clip.id: plan.segments(clip) for clip in clips}
    )


def render_one(clip, output):
    """Worker: one clip to its file."""
    try:
        with utils.atomic(output / clip.file) as path:
            edits.render(clip, FILM, path)
    except (av.FFmpegError, OSError) as error:
        raise utils.InputError(
            f"{output / clip.file} cannot be made ({error}); is the disk full, or film.mp4 damaged?"
        ) from None


def read_manifest(record):
    """What the folder holds by an earlier run: stamp, seed, complete, files. Empty for a new folder."""
    if record.parent.exists() and not record.parent.is_dir():
        raise utils.InputError(f"{record.parent} is a file; name a folder for --output")
    try:
        manifest = json.loads(record.read_text()) if record.exists() else {}
        inside = all(
            Path(name).parts[0] in ("videos", "annotations") and ".." not in name
            for name in manifest.get("files", [])
        )
    except (ValueError, AttributeError, IndexError):
        inside = False
    if not inside:
        raise utils.InputError(
            f"{record} is not a build's record; remove it, or choose another --output"
        )
    return manifest


def clean(output, clips):
    """Remove what a killed run left half-written; `utils.atomic` calls it .NAME.RANDOM.SUFFIX."""
    names = {Path(clip.file).name for clip in clips}
    for left in (output / "videos").glob("*/.*"):
        if left.name[1:].rsplit(".", 2)[0] in names:
            left.unlink()


def render_all(clips, output, workers):
    """Render the clips whose file is not there yet. On Ctrl-C the videos under way are finished and the rest is dropped."""
    clean(output, clips)
    missing = [clip for clip in clips if not (output / clip.file).exists()]
    # Ctrl-C reaches the whole process group: the parent alone answers it
    pool = ProcessPoolExecutor(
        workers, initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN)
    )
    try:
        tasks = [pool.submit(render_one, clip, output) for clip in missing]
        for task in tqdm(as_completed(tasks), total=len(tasks), unit="video", desc="rendering"):
            task.result()
    except BrokenProcessPool:
        raise utils.InputError(
            "a worker was killed, by memory perhaps; run it again with fewer --workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def fingerprint(clips):
    """A hash of all that decides the pixels: film, plan, filters, codecs."""
    film = hashlib.sha256(utils.require_path(FILM, "film").read_bytes()).hexdigest()
    filters = [edit.filters for edit in edits.EDITS.values()]
    text = json.dumps(
        [VERSION, film, filters, edits.CODECS, [dataclasses.asdict(clip) for clip in clips]]
    )
    return hashlib.sha256(text.encode()).hexdigest()


def build(output, seed=0, workers=2, limit=None):
    """Make the benchmark under `output`; `limit` keeps the first few clips of each part. Returns the clips."""
    output, shots = Path(output).expanduser(), plan.read_shots()
    clips = plan.plan(seed, shots)
    if limit is not None:
        clips = [
            clip for part in plan.PARTS for clip in [c for c in clips if c.part == part][:limit]
        ]
    record, stamp = output / "build.json", fingerprint(clips)
    manifest = read_manifest(record)
    if manifest.get("stamp") != stamp:
        for name in manifest.get(
            "files", []
        ):  # an earlier build of another plan: its own files go, and nothing else
            (output / name).unlink(missing_ok=True)
        for clip in clips:  # nor may a file whose record was lost pass for a new one
            for left in (output / clip.file).parent.glob(f"{clip.id}.*"):
                left.unlink()
        files = [clip.file for clip in clips] + [f"annotations/{name}" for name in ANNOTATIONS]
        manifest = {"stamp": stamp, "seed": seed, "complete": False, "files": files}
        utils.write_json(record, manifest)
    if manifest["complete"] and all((output / name).exists() for name in manifest["files"]):
        print(f"{output} holds this build already")
        return clips
    render_all(clips, output, workers)
    write_annotations(output / "annotations", clips, shots)
    utils.write_json(record, {**manifest, "complete": True})
    return clips


def parse():
    parser = utils.Parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser(
        "build", help="make the benchmark", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    make.add_argument(
        "--output",
        required=True,
        help="folder to write to; may hold an earlier or unfinished build",
    )
    make.add_argument(
        "--seed", type=int, default=0, help="another seed gives other windows, edits and encodings"
    )
    make.add_argument("--workers", type=int, default=2, help="processes; one a core")
    make.add_argument(
        "--limit", type=int, help="only the first few videos of each part, to try things out"
    )
    film = commands.add_parser("film", help="make film.mp4 from a copy of the film")
    film.add_argument("source", help="Big Buck Bunny, 1280x720 or larger")
    film.add_argument("--output", default=FILM, help="file to write")
    return parser.parse_args()


def main():
    arguments = parse()
    if arguments.command == "film":
        make_film(arguments.source, arguments.output)
        return
    if arguments.workers < 1 or (arguments.limit is not None and arguments.limit < 1):
        raise utils.InputError("--workers and --limit count from 1; give a larger number")
    clips = build(arguments.output, arguments.seed, arguments.workers, arguments.limit)
    print(
        f"{len(clips)} videos, {sum(clip.duration for clip in clips):.0f} s, under {arguments.output}"
    )


if __name__ == "__main__":
    run_main(main)
