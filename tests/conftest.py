"""Fixtures that several test files use, and the settings of a test process."""

import fcntl
import gc
import os
import random
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.commands import ROOT
from helpers.extraction import ONE_THREAD_PER_BATCH
from helpers.feature_files import write_packed, write_pickle, write_released
from helpers.worlds import make_pairs, make_set, write_set

# A shell ignores SIGINT for what it starts in the background, and our scripts would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

# A forked child frees nothing of its parent's: a frame of PyAV that an earlier test has left waits,
# when it is freed, for threads that the child does not have. It is frozen before the fork, because
# Python's own first steps in the child may collect already.
os.register_at_fork(before=gc.freeze, after_in_parent=gc.unfreeze)

# No test takes a GPU by a script's default. Those of test_gpu.py see the GPUs again.
os.environ.setdefault("TEST_GPUS", os.environ.get("CUDA_VISIBLE_DEVICES", "0,1,2,3,4,5,6,7"))
os.environ["CUDA_VISIBLE_DEVICES"] = ""

# One thread, as in the scripts that `helpers.commands` starts: sums have one order.
torch.set_num_threads(1)

# The seed of random kill points. In the environment, so that all processes of a test run share it.
TEST_SEED = os.environ.setdefault("TEST_SEED", str(random.SystemRandom().randrange(2**32)))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """Run a test marked `distributed` alone, also under pytest -n: it starts several processes."""
    alone = item.get_closest_marker("distributed")
    with open(ROOT / "pyproject.toml") as file:  # locked, but neither read nor changed
        fcntl.flock(file, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        try:
            return (yield)
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)


@pytest.fixture
def kill_rng(request):
    """A random.Random for the moments at which a test kills a process.

    Its seed is TEST_SEED and the name of the test, so that a failure can be repeated.
    """
    return random.Random(f"{TEST_SEED} {request.node.nodeid}")


def pytest_terminal_summary(terminalreporter):
    """Print the seed of the kill points if a test failed."""
    if terminalreporter.stats.get("failed"):
        terminalreporter.write_line(f"random kill points: repeat them with TEST_SEED={TEST_SEED}")


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Files of a small synthetic benchmark: training pairs, DEMO-VAL and DEMO, of other films."""
    folder = tmp_path_factory.mktemp("world")
    rng = np.random.default_rng(7)
    noise = 0.6

    pairs, annotation = make_pairs(rng, films=12, copies=4, background=80, noise=noise)
    stored = {video: frames.astype(np.float16) for video, frames in pairs.items()}
    world = SimpleNamespace(
        folder=folder,
        annotation=annotation,
        pairs=pairs,
        vcdb=write_pickle(folder / "vcdb.pickle", annotation),
        train_features=write_packed(folder / "train.hdf5", stored),
        annotations=folder / "annotations",
    )
    world.train_flags = ["--annotation_path", world.vcdb, "--feature_path", world.train_features]

    def write_evaluation_set(part, stem):
        """Write its annotation files and features; returns the path of the features and the set."""
        features, labels, database = make_set(rng, films=10, copies=4, distractors=40, noise=noise)
        write_set(world.annotations, stem, labels, database)
        made = SimpleNamespace(features=features, labels=labels, database=database)
        return write_released(folder / f"{part}.hdf5", features), made

    world.annotations.mkdir()
    world.test_features, world.test = write_evaluation_set("test", "demo")
    world.val_features, world.val = write_evaluation_set("val", "demo_val")
    return world


@pytest.fixture(scope="session")
def annotations():
    """The folder of the official annotation files, if the environment names one."""
    if not os.environ.get("TCA_ANNOTATIONS"):
        pytest.skip("TCA_ANNOTATIONS does not name the folder of the official annotation files")
    return Path(os.environ["TCA_ANNOTATIONS"])


@pytest.fixture(scope="session")
def pipeline():
    """The shipped model, on the CPU."""
    from videoindex.pipeline import Pipeline

    return Pipeline(device="cpu", workers=1)


@pytest.fixture(scope="session")
def library(tmp_path_factory, pipeline):
    """Ten clips of the demo's film and an index of them, which no test changes."""
    from helpers.library import Library

    return Library(tmp_path_factory.mktemp("library"), pipeline)


@pytest.fixture
def index_copy(library, tmp_path):
    """A copy of the library's index; it knows the same files."""
    from videoindex.index import VideoIndex

    shutil.copytree(library.index, tmp_path / "index")
    return VideoIndex(tmp_path / "index", pipeline=library.pipeline)


@pytest.fixture
def one_thread_per_batch(monkeypatch):
    """Extraction in this process takes ONE_THREAD_PER_BATCH."""
    from features import extraction

    monkeypatch.setattr(extraction, "default_parallelism", lambda *_: ONE_THREAD_PER_BATCH)
