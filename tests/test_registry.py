"""The registry: every set is read from files of its form, and other files are refused by name."""

import pickle

import numpy as np
import pytest
from helpers.feature_files import write_pickle
from helpers.sets import random_table
from helpers.worlds import make_cc_web, make_evve, make_vcdb, write_public_sets

from datasets.registry import EVALUATION_SETS, SEGMENT_SETS, load_evaluation_set, load_segment_set
from utils import InputError

PICKLED = {
    "CC_WEB_VIDEO": ("cc_web_video.pickle", make_cc_web),
    "EVVE": ("evve.pickle", make_evve),
    "VCDB": ("vcdb.pickle", make_vcdb),
}


@pytest.mark.parametrize("name", ["FIVR-5K", "FIVR-200K", "CC_WEB_VIDEO", "EVVE", "VCDB"])
def test_public_set_is_read_and_scored(tmp_path, name):
    write_public_sets(tmp_path)
    evaluation_set = load_evaluation_set(name, tmp_path)
    queries, database = evaluation_set.queries, evaluation_set.database
    table = random_table(np.random.default_rng(0), queries, database)
    metrics = evaluation_set.evaluate_table(queries, database, table)
    assert all(0 < value < 1 for value in metrics.values())


def test_unknown_name_or_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match="'FIVR-6K'.*FIVR-5K"):
        load_evaluation_set("FIVR-6K", tmp_path)
    with pytest.raises(InputError, match="absent"):
        load_evaluation_set("FIVR-5K", tmp_path / "absent")


@pytest.mark.parametrize("name", [*EVALUATION_SETS, *SEGMENT_SETS])
def test_missing_file_or_folder_is_named_with_the_command_to_get_it(tmp_path, name):
    load = load_evaluation_set if name in EVALUATION_SETS else load_segment_set
    command = "make demo" if "DEMO" in name else "python datasets/download.py"
    with pytest.raises(InputError, match=rf"\.(pickle|json|txt|csv).*`{command}`"):
        load(name, tmp_path)
    with pytest.raises(InputError, match=f"folder.*absent.*`{command}`"):
        load(name, tmp_path / "absent")


@pytest.mark.parametrize("name", PICKLED)
def test_broken_pickle_is_refused(tmp_path, name):
    file, make = PICKLED[name]
    data = make(np.random.default_rng(0))
    broken = [[], 5, {}]
    for key in data:
        if key != "negs":  # VCDB's negatives are for training
            broken.append({other: data[other] for other in data if other != key})
            broken.append(data | {key: 5})
    for value in broken:
        write_pickle(tmp_path / file, value)
        with pytest.raises(InputError, match=file):
            load_evaluation_set(name, tmp_path)
    (tmp_path / file).write_bytes(pickle.dumps(data)[:-20])
    with pytest.raises(InputError, match=file):
        load_evaluation_set(name, tmp_path)
