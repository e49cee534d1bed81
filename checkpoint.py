"""A run's folder: the state that a stopped run goes on from, and the encoder to share.

checkpoint.pth is the newest state and checkpoint.prev.pth the one before it; both are written aside and renamed. A file that
was cut short, or that another program wrote, is named on stderr, and the one before it is used.
"""

import os
import sys
from pathlib import Path

from utils import InputError, load_torch, remove_leftovers, save_torch

NEWEST, BEFORE, REFUSED = "checkpoint.pth", "checkpoint.prev.pth", "checkpoint.refused.pth"
FILES = (NEWEST, BEFORE, "model.pth", "args.json", "log.jsonl")  # written by rename

# A resumed run must agree on everything but these: paths, whose content is compared instead, and what does not change the
# result (another device does, in the last bits; a larger step changes it, and is told).
FREE = {
    *("model_path", "annotation_path", "feature_path", "val_feature_path", "annotation_dir"),
    *("num_workers", "num_readers", "print_freq", "save_every", "device", "batch_sz"),
}


def save(folder, state):
    """Write `state` as the newest checkpoint; the newest so far becomes the one before."""
    path = Path(folder) / NEWEST
    fresh = path.with_name(f".{NEWEST}.new")
    save_torch(fresh, state)
    if path.exists():
        os.replace(path, path.with_name(BEFORE))
    os.replace(fresh, path)


def load(folder, keys):
    """The newest whole state in `folder` that holds `keys`, or None when there is no checkpoint.

    InputError when there are checkpoints and none can be used.
    """
    folder = Path(folder)
    for name in FILES:
        remove_leftovers(folder / name)
    remove_leftovers(folder / f".{NEWEST}.new")
    (folder / f".{NEWEST}.new").unlink(missing_ok=True)
    reasons = []
    for path in (folder / NEWEST, folder / BEFORE):
        if not path.exists():
            continue
        try:
            state = load_torch(path, "checkpoint")
            lacking = set(keys) - set(state) if isinstance(state, dict) else keys
            if lacking:
                raise InputError(
                    f"checkpoint {str(path)!r} is not of this program (no {', '.join(sorted(lacking)[:3])})"
                )
        except InputError as error:
            reasons.append(str(error))
            continue
        if reasons:
            os.replace(folder / NEWEST, folder / REFUSED)  # lest it become the one before
            print(
                f"warning: {reasons[0]}; it is now {REFUSED}; going on from {BEFORE}, step {state['step']}",
                file=sys.stderr,
            )
        return state
    if reasons:
        raise InputError(
            f"{'; '.join(reasons)}; choose another --model_path, or remove it to start anew"
        )
    return None


def check(state, args, inputs, folder):
    """InputError when `state` was made with other settings or from other files than `args` and `inputs` {what: digest}."""
    old = state["args"]
    changed = [
        f"--{name} {old.get(name)!r} -> {value!r}"
        for name, value in vars(args).items()
        if name not in FREE and old.get(name) != value
    ]
    where, other_run = f"the checkpoint in {str(folder)!r} was made", "choose another --model_path"
    if changed:
        raise InputError(f"{where} with other settings ({', '.join(changed)}); {other_run}")
    other = [name for name, value in inputs.items() if state["inputs"].get(name) != value]
    if other:
        raise InputError(f"{where} from other {' and '.join(other)} files; {other_run}")


def told_changes(state, batch_sz, world_size, pairs):
    """What a resumed run does otherwise than before, as lines to print: a step of another size."""
    before = state["processes"], state["args"]["batch_sz"]
    if before == (world_size, batch_sz):
        return []
    return [
        f"note: the checkpoint was made by {before[0]} x {before[1]} pairs a step (processes x --batch_sz), this run takes"
        f" {world_size} x {batch_sz}; it goes on after the {state['seen']} of {pairs} pairs that epoch {state['epoch'] + 1}"
        " has seen, with the learning rate of this run's processes"
    ]
