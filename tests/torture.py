"""Kill every command at random moments, run it twice at once, and let its disk fill up.

    export PYTHONPATH=.:tests:pre-processing
    python tests/torture.py kill 100       # SIGKILL, then the same command again
    python tests/torture.py pair 5         # two of each command at once, in one place
    python tests/torture.py disk 20        # each command on 20 disks that are too small
    python tests/torture.py disk 20 --only train apply --seed 7

After a kill or a full disk every file is whole, the old one or the new one, and the same command
ends as an unbroken run does. Of two at once one ends so, and the other does too or is told in one
line who is writing. Nothing is left over. Exit status 1, with the seeds, if a promise is broken.

`make torture` does all three; tests/test_durability.py a few of each. A command is
the script's `main` in a forked process: so torch is imported once. `disk` mounts, which needs root.
"""

import argparse
import atexit
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import av
import convert
import extract_features
import h5py
import numpy as np
import pca
import torch
from helpers.clips import textured, write_video
from helpers.feature_files import write_ours, write_pickle
from helpers.worlds import C, make_pairs, make_set, write_set

import evaluation
import reproduce
import search
import train
import visualize
from datasets.demo import make_demo
from distributed import _call_main, run_main
from videoindex import calibrate
from videoindex.store import IndexStore

# Written with times, or by other packages: only whether they are whole is looked at.
UNEQUAL = ("log.jsonl", "args.json", "stderr")
TIMED = {
    "command",
    "compare_seconds",
    "encode_seconds",
    "seconds",
    "measured",
    "machine",
    "revision",
}


# --- what is run ----------------------------------------------------------------------------------


class World:
    """Small inputs of every command, made once."""

    def __init__(self, folder):
        self.folder, rng = folder, np.random.default_rng(0)
        self.clips = folder / "clips"
        self.clips.mkdir()
        for i in range(3):
            write_video(self.clips / f"clip{i}.mkv", textured(i, 40 + 10 * i))
        features, annotation = make_pairs(rng, films=6, copies=3, background=20, noise=0.6)
        self.pairs = write_ours(folder / "train.hdf5", features)
        self.vcdb = write_pickle(folder / "vcdb.pickle", annotation)
        self.annotations = folder / "annotations"
        self.annotations.mkdir()
        features, labels, database = make_set(rng, films=6, copies=4, distractors=20, noise=0.6)
        write_set(self.annotations, "demo", labels, database)
        shutil.copy(self.vcdb, self.annotations / "vcdb.pickle")
        self.test = write_ours(folder / "test.hdf5", features)
        self.shards = []
        names = sorted(features)
        for i in range(2):
            part = {name: features[name] for name in names[i::2]}
            self.shards.append(write_ours(folder / f"s.{i}of2.hdf5", part))
        (folder / "ids").write_text("\n".join(names[:9]) + "\n")
        tables = folder / "data" / "l3_imac"
        tables.mkdir(parents=True)
        shutil.copy(self.pairs, tables / "train.hdf5")
        shutil.copy(self.test, tables / "DEMO.hdf5")
        (folder / "tables.toml").write_text(TABLES.format(width=C))

    def prepare(self, run):
        """What commands make for others."""
        fit = ["fit", self.test, "--components", 8, "--output", self.folder / "pca.npz"]
        run(pca.main, fit)
        run(train.main, [*train_flags(self), "--model_path", self.folder / "run"])
        run(search.main, index_flags(self, self.folder / "index"))


TABLES = """
[settings.demo]
widths = {{ l3_imac = {width} }}
annotation = "vcdb.pickle"
train = "--batch_sz 8 --epochs 1 --moco_k 16 --neg_num 2 --dim_feedforward 16 --nhead 4"

[tables.small]
title = "A small table"
source = "made up"
set = "FIVR-5K"

[[tables.small.rows]]
name = "trained"
train = "--learning_rate 1e-3"
evaluate = "--metric cosine"
"""


def train_flags(world):
    flags = ["--annotation_path", world.vcdb, "--feature_path", world.pairs, "--device", "cpu"]
    flags += ["--nhead", 4, "--dim_feedforward", 16, "--batch_sz", 4, "--neg_num", 2]
    return [*flags, "--moco_k", 16, "--epochs", 3, "--save_every", 2, "--num_workers", 1]


def index_flags(world, folder):
    flags = ["index", world.clips, "--index", folder, "--encoder", "mean", "--weights", "random"]
    return [*flags, "--workers", 1, "--index_type", "HNSW4"]


def evaluate_flags(w, o):
    flags = ["--dataset", "DEMO", "--annotation_dir", w.annotations, "--feature_path", w.test]
    flags += ["--model_path", w.folder / "run", "--metric", "chamfer", "--device", "cpu"]
    flags += ["--cache", o / "cache", "--output", o / "results.json", "--report", o / "report"]
    return [*flags, "--save_similarities", o / "table.json"]


def reproduce_flags(w, o):
    flags = ["--tables", w.folder / "tables.toml", "--data", w.folder / "data", "--set", "DEMO"]
    return [*flags, "--annotation_dir", w.annotations, "--seeds", 1, "--output", o / "tables"]


def extract_flags(w, o):
    flags = [w.clips, "--output", o / "f.hdf5", "--weights", "random", "--device", "cpu"]
    return [*flags, "--workers", 1]


def copy_index(w, o):
    shutil.copytree(w.folder / "index", o / "index")


def copy_index_and_choices(w, o):
    copy_index(w, o)
    pair = [str(w.clips / "clip0.mkv"), str(w.clips / "clip2.mkv")]
    (o / "choices.json").write_text(json.dumps({"not_a_match": [pair]}))


# name: (main, arguments of (world, output folder), what is there before)
COMMANDS = {
    "extract": (extract_features.main, extract_flags, None),
    "fit": (
        pca.main,
        lambda w, o: ["fit", w.test, "--components", 8, "--output", o / "pca.npz"],
        None,
    ),
    "apply": (
        pca.main,
        lambda w, o: ["apply", w.test, "--pca", w.folder / "pca.npz", "--output", o / "p.hdf5"],
        None,
    ),
    "to": (convert.main, lambda w, o: ["to", w.test, o / "x.hdf5", "--dtype", "float32"], None),
    "datasets": (
        convert.main,
        lambda w, o: ["to", w.test, o / "d.hdf5", "--layout", "datasets"],
        None,
    ),
    "npy": (convert.main, lambda w, o: ["to", w.test, o / "npy"], None),
    "merge": (convert.main, lambda w, o: ["merge", *w.shards, "--output", o / "m.hdf5"], None),
    "split": (
        convert.main,
        lambda w, o: (
            ["split", w.test, "--ids", w.folder / "ids", o / "a.hdf5"] + ["--rest", o / "b.hdf5"]
        ),
        None,
    ),
    "train": (train.main, lambda w, o: [*train_flags(w), "--model_path", o / "run"], None),
    "evaluate": (evaluation.main, evaluate_flags, None),
    "reproduce": (reproduce.main, reproduce_flags, None),
    "demo": (
        make_demo.main,
        lambda w, o: ["build", "--output", o / "demo", "--limit", 1, "--workers", 2],
        None,
    ),
    "index": (search.main, lambda w, o: index_flags(w, o / "index"), None),
    "remove": (
        search.main,
        lambda w, o: [
            "remove",
            "--index",
            o / "index",
            w.clips / "clip0.mkv",
            w.clips / "clip2.mkv",
        ],
        copy_index,
    ),
    "query": (
        search.main,
        lambda w, o: (
            ["query", w.clips / "clip1.mkv", "--index", w.folder / "index"]
            + ["--report", o / "q.html"]
        ),
        None,
    ),
    "duplicates": (
        search.main,
        lambda w, o: (
            ["duplicates", "--index", w.folder / "index", "--radius", 0.5]
            + ["--threshold", 0.5, "--report", o / "d.html"]
        ),
        None,
    ),
    "plan": (
        search.main,
        lambda w, o: (
            ["duplicates", "--index", w.folder / "index", "--radius", 0.5, "--threshold", 0.5]
            + ["--plan", o / "plan.csv", "--script", o / "moves.sh", "--into", "dropped"]
        ),
        None,
    ),
    "reject": (
        search.main,
        lambda w, o: (
            ["reject", w.clips / "clip0.mkv", w.clips / "clip2.mkv", "--index", o / "index"]
        ),
        copy_index,
    ),
    "choices": (
        search.main,
        lambda w, o: ["choices", o / "choices.json", "--index", o / "index"],
        copy_index_and_choices,
    ),
    "visualize": (
        visualize.main,
        lambda w, o: (
            ["attention", "q0-0", "--model_path", w.folder / "run"]
            + ["--feature_path", w.test, "--nhead", 4, "--output", o / "a.png"]
        ),
        None,
    ),
    "pack": (
        calibrate.main,
        lambda w, o: (
            ["pack", "--pca", w.folder / "pca.npz", "--model_path", w.folder / "run"]
            + ["--output", o / "packed"]
        ),
        None,
    ),
}


# --- running --------------------------------------------------------------------------------------


@dataclass
class Process:
    """A command in a forked process; its streams go to a file outside the place under test."""

    main: object
    arguments: list
    log: Path = field(default_factory=lambda: Path(tempfile.mkstemp(prefix="torture-")[1]))

    def start(self):
        self.pid = os.fork()
        if self.pid == 0:
            self._work()
        self.status = None
        return self

    def _work(self):
        status = 99
        try:
            os.setpgid(0, 0)
            atexit._clear()  # not what this program would do at its end
            descriptor = os.open(self.log, os.O_WRONLY | os.O_TRUNC)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            sys.stdout, sys.stderr = open(1, "w"), open(2, "w")  # pytest's go elsewhere
            words = [str(argument) for argument in self.arguments]
            sys.argv = [Path(self.main.__code__.co_filename).name, *words]
            status = _call_main(lambda: self.main(words)) or 0
            atexit._run_exitfuncs()
        except BaseException:
            traceback.print_exc()
            status = 1
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def wait(self, limit=120):
        """Its exit status, negative for a signal."""
        deadline = time.monotonic() + limit
        while self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > deadline:
                os.killpg(self.pid, signal.SIGKILL)
                raise AssertionError("it hangs")
            else:
                time.sleep(0.002)
        self.output = self.log.read_text(errors="replace")
        self.log.unlink()
        return self.status

    def alive_children(self):
        """Whether a process of its group lives."""
        try:
            os.killpg(self.pid, 0)
        except (ProcessLookupError, PermissionError):
            return False
        states = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = path.read_bytes().rpartition(b")")[2].split()
            except OSError:
                continue
            if int(fields[2]) == self.pid:
                states.append(fields[0])
        return any(state not in b"ZX" for state in states)


# --- what is left ---------------------------------------------------------------------------------


def content(folder):
    """{path: what is comparable of a file}; raises if a file cannot be read."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and not path.name.startswith("events.out"):
            found[name] = _content_of(path)
    return found


def _content_of(path):
    if path.name in UNEQUAL:
        return None
    if path.suffix == ".hdf5":
        with h5py.File(path, "r") as file:
            parts = {}
            file.visititems(lambda name, item: parts.update({name: _dataset(item)}))
            return parts, sorted((k, str(v)) for k, v in file.attrs.items())
    if path.suffix == ".npz":
        with np.load(path) as file:
            return {name: file[name].tobytes() for name in file.files}
    if path.suffix == ".pth":
        state = torch.load(path, weights_only=True)
        values = state.get("state_dict", state)
        return _tensors(values if isinstance(values, dict) else {})
    if path.suffix == ".json":
        return _without_times(json.loads(path.read_text()))
    if path.name == "index.db":
        store = IndexStore(path.parent)
        assert not list(store.find_damage())
        contents = sorted((store.paths(c.id), c.sha256, c.num_frames) for c in store.contents())
        return contents, store.settings["rejected"]
    if path.suffix in (".webm", ".mkv", ".mp4", ".avi"):  # FFmpeg gives some a random number
        with av.open(str(path)) as video:
            return [frame.pts for frame in video.decode(video=0)]
    data = path.read_bytes()
    if path.suffix in (".png", ".html", ".md", ".faiss"):  # times, random numbers of HNSW
        assert data, path
        return None
    return hashlib.sha256(data).hexdigest()


def _dataset(item):
    if not isinstance(item, h5py.Dataset):
        return None
    return item.asstr()[:].tolist() if h5py.check_string_dtype(item.dtype) else item[:].tobytes()


def _tensors(value):
    if isinstance(value, torch.Tensor):
        return value.float().numpy().round(4).tolist()
    if isinstance(value, dict):
        return {str(key): _tensors(item) for key, item in value.items() if key != "args"}
    return None


def _without_times(value):
    if isinstance(value, dict):
        return {k: _without_times(v) for k, v in value.items() if k not in TIMED}
    return [_without_times(item) for item in value] if isinstance(value, list) else value


def leftovers(folder):
    """Files that a finished command must not leave."""
    marks = (".lock", ".part", ".part.jsonl", ".new")
    names = [path.name for path in folder.rglob("*")]
    return [name for name in names if name.startswith(".") or name.endswith(marks)]


def unlike(found, expected):
    """The names of the files that differ."""
    return sorted(name for name in found | expected if found.get(name, 0) != expected.get(name, 0))


# --- the three trials -----------------------------------------------------------------------------


class Torture:
    def __init__(self, folder, rng, names):
        self.folder, self.rng, self.names = folder, rng, names
        self.output = folder / "output"
        self.counts, self.broken = Counter(), []
        (folder / "world").mkdir()
        self.world = World(folder / "world")
        self.world.prepare(self.must_run)
        self.expected, self.seconds = {}, {}
        for name in names:
            with self.fresh(name):
                start = time.monotonic()
                process = self.process(name).start()
                assert process.wait() == 0, f"{name}: {process.output}"
                self.seconds[name] = time.monotonic() - start
                self.expected[name] = content(self.output)
                assert not leftovers(self.output), (name, leftovers(self.output))

    def must_run(self, main, arguments):
        process = Process(main, arguments).start()
        assert process.wait() == 0, process.output

    def process(self, name):
        main, arguments, _ = COMMANDS[name]
        return Process(main, arguments(self.world, self.output))

    def fresh(self, name):
        """The output folder, with what is there before the command."""
        shutil.rmtree(self.output, ignore_errors=True)
        self.output.mkdir()
        prepare = COMMANDS[name][2]
        if prepare:
            prepare(self.world, self.output)
        return Cleaned(self.output)

    def check(self, name, trial, run):
        """Count a trial; `run` returns what is wrong, or ""."""
        try:
            wrong = run(name)
        except Exception as error:
            wrong = f"{type(error).__name__}: {error}"
        self.counts[f"{trial} {name}"] += 1
        if wrong:
            self.broken.append(f"{trial} {name}: {wrong}")
            print(self.broken[-1], flush=True)

    def ends_as_unbroken(self, name):
        """Run it again: what is wrong with the end, or ""."""
        # These refuse to do again what was done before the kill. An index may still have holes.
        done = {"npy": "npy/store.json", "remove": "index/index.db"}.get(name)
        if done and content(self.output).get(done) == self.expected[name][done]:
            return ""
        process = self.process(name).start()
        if process.wait() != 0:
            return f"the repetition has status {process.status}: {process.output[-1500:]}"
        if different := unlike(content(self.output), self.expected[name]):
            return f"the repetition differs in {different}"
        left = leftovers(self.output)
        return f"it leaves {left}" if left else ""

    def kill(self, name):
        with self.fresh(name):
            process = self.process(name).start()
            time.sleep(self.rng.uniform(0, 1.1 * self.seconds[name]))
            os.kill(process.pid, signal.SIGKILL)
            status = process.wait()
            self.counts["killed before the end"] += status == -signal.SIGKILL
            for _ in range(50):  # on a busy machine a process takes its time to end
                time.sleep(0.1)
                if not process.alive_children():
                    break
            else:
                os.killpg(process.pid, signal.SIGKILL)
                return "its children live on"
            return self.ends_as_unbroken(name)

    def pair(self, name):
        with self.fresh(name):
            processes = [self.process(name).start()]
            time.sleep(self.rng.choice([0, self.rng.uniform(0, self.seconds[name])]))
            processes.append(self.process(name).start())
            statuses = [process.wait() for process in processes]
            for process in processes:
                told = "is being written by" in process.output
                came_later = {"npy": "already exists", "remove": "not in the index"}.get(name)
                told |= came_later is not None and came_later in process.output
                self.counts["told who writes"] += told and process.status == 2
                if process.status != 0 and not (process.status in (2, 3) and told):
                    return f"status {process.status}: {process.output[-1500:]}"
                if "Traceback" in process.output:
                    return process.output[-1500:]
            if 0 not in statuses:
                return f"none of the two ended well: {statuses}"
            if different := unlike(content(self.output), self.expected[name]):
                return f"the end differs in {different}"
            left = leftovers(self.output)
            return f"it leaves {left}" if left else ""

    def disk(self, name):
        peak = self.peak(name)
        least = self.peaks_before[name]
        size = least + max(4096, int(self.rng.uniform(0, 1.1) * (peak - least)))
        with self.mounted(name, size):
            process = self.process(name).start()
            status = process.wait()
            self.counts["disks that were full"] += status != 0
            errors = [line for line in process.output.splitlines() if "error: " in line]
            allowed = (0, 2, 3) if name == "reproduce" else (0, 2)
            if status not in allowed or "Traceback" in process.output or len(errors) > 1:
                return f"on {size} bytes: status {status}: {process.output[-3000:]}"
            self._mount("remount,size=1g")
            wrong = self.ends_as_unbroken(name)
            return f"on {size} bytes: {wrong}" if wrong else ""

    def peak(self, name):
        """The most bytes that the command has on its disk at a time."""
        self.peaks = getattr(self, "peaks", {})
        self.peaks_before = getattr(self, "peaks_before", {})
        if name not in self.peaks:
            with self.mounted(name, 1 << 30):
                self.peaks_before[name] = most = self._used()
                process = self.process(name).start()
                while os.waitpid(process.pid, os.WNOHANG) == (0, 0):
                    most = max(most, self._used())
                    time.sleep(0.001)
                process.log.unlink()
                self.peaks[name] = most + 16384
        return self.peaks[name]

    def _used(self):
        facts = os.statvfs(self.output)
        return (facts.f_blocks - facts.f_bfree) * facts.f_bsize

    def _mount(self, options):
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(self.output)]
        subprocess.run(command, check=True)

    def mounted(self, name, size):
        shutil.rmtree(self.output, ignore_errors=True)
        self.output.mkdir()
        self._mount(f"size={size}")
        prepare = COMMANDS[name][2]
        if prepare:
            prepare(self.world, self.output)
        return Unmounted(self.output)


class Cleaned:
    """At the end of the block, the folder is emptied."""

    def __init__(self, folder):
        self.folder = folder

    def __enter__(self):
        return self.folder

    def __exit__(self, *_):
        shutil.rmtree(self.folder, ignore_errors=True)


class Unmounted(Cleaned):
    """At the end of the block, the disk is unmounted."""

    def __exit__(self, *_):
        subprocess.run(["umount", "-l", str(self.folder)], check=True)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trial", choices=("kill", "pair", "disk"))
    parser.add_argument("count", type=int, help="kill: in all; else of each command")
    parser.add_argument("--only", nargs="+", choices=COMMANDS, default=list(COMMANDS))
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    print(f"--seed {options.seed}", flush=True)
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory(prefix="torture-") as folder:
        torture = Torture(Path(folder), rng, options.only)
        names = [name for name in options.only for _ in range(options.count)]
        if options.trial == "kill":
            names = [rng.choice(options.only) for _ in range(options.count)]
        for name in names:
            torture.check(name, options.trial, getattr(torture, options.trial))
    for name, count in sorted(torture.counts.items()):
        print(f"{count:5} {name}")
    print(f"{len(names)} trials, {len(torture.broken)} broken promises")
    return 1 if torture.broken else 0


if __name__ == "__main__":
    run_main(main)
