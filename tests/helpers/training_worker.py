"""What test_distributed.py runs under a launcher: train.py, with a record of each process's steps.

    python tests/helpers/training_worker.py FOLDER train.py's arguments

saves FOLDER/<rank>.pth: [(indices, negative ids, bank ids after, dropout's seed)] by step, the
model at the end, and the hard negatives. PYTHONPATH must name the root and tests/.
"""

import sys
from unittest import mock

import torch

import train
from distributed import detect_launcher, run_main
from helpers.training import recorded_steps


def main(argv=None):
    folder, *arguments = sys.argv[1:] if argv is None else argv
    hard_negatives = []
    find_hard_negatives = train.find_hard_negatives

    def record_hard_negatives(*inputs):
        hard_negatives.append(find_hard_negatives(*inputs))
        return hard_negatives[-1]

    patch = mock.patch.object(train, "find_hard_negatives", record_hard_negatives)
    with patch, recorded_steps() as steps:
        status = train.main(arguments)
    saved = {
        "steps": [(s.indices, s.negative_ids, s.bank_ids_after, s.seed) for s in steps],
        "moco": steps[-1].model.state_dict(),
        "hard_negatives": hard_negatives,
    }
    _, rank, _ = detect_launcher()
    torch.save(saved, f"{folder}/{rank}.pth")
    return status


if __name__ == "__main__":
    run_main(main)
