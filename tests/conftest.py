"""Fixtures that several test files use."""

import os
import random
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.files import write_packed, write_pickle, write_released
from helpers.worlds import make_pairs, make_set, write_set

signal.signal(
    signal.SIGINT, signal.default_int_handler
)  # in the background of a shell it is ignored, here and in scripts
torch.set_num_threads(
    1
)  # as the scripts of helpers.commands: one thread, so that sums have one order


SEED = os.environ.get("TEST_SEED") or str(random.SystemRandom().randrange(2**32))


@pytest.fixture
def kill_rng(request):
    """A random.Random for kill points: of TEST_SEED and the test's name, so that a failure can be repeated."""
    return random.Random(f"{SEED} {request.node.nodeid}")


def pytest_terminal_summary(terminalreporter):
    """Print the seed of the kill points beside failures."""
    if terminalreporter.stats.get("failed"):
        terminalreporter.write_line(f"random kill points: repeat them with TEST_SEED={SEED}")


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Training pairs, a held-out set (DEMO-VAL) and a test set (DEMO) of other films, on disk."""
    folder, draw = tmp_path_factory.mktemp("world"), np.random.default_rng(7)
    noise = 0.6
    pairs, annotation = make_pairs(draw, films=12, copies=4, background=80, noise=noise)
    here = SimpleNamespace(
        folder=folder, annotation=annotation, pairs=pairs, annotations=folder / "annotations"
    )
    here.annotations.mkdir()
    here.train_features = write_packed(
        folder / "train.hdf5", {k: v.astype(np.float16) for k, v in pairs.items()}
    )
    here.vcdb = write_pickle(folder / "vcdb.pickle", annotation)
    for stem, attribute in (("demo", "test"), ("demo_val", "val")):
        features, labels, database = make_set(draw, films=10, copies=4, distractors=40, noise=noise)
        write_set(here.annotations, stem, labels, database)
        setattr(
            here, f"{attribute}_features", write_released(folder / f"{attribute}.hdf5", features)
        )
        setattr(
            here, attribute, SimpleNamespace(features=features, labels=labels, database=database)
        )
    here.train_flags = ["--annotation_path", here.vcdb, "--feature_path", here.train_features]
    return here


@pytest.fixture(scope="session")
def annotations():
    """The folder of the official annotation files, where the environment names one."""
    if not os.environ.get("TCA_ANNOTATIONS"):
        pytest.skip("TCA_ANNOTATIONS does not name the folder of the official annotation files")
    return Path(os.environ["TCA_ANNOTATIONS"])
