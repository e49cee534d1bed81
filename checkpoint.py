"""A training run's folder: how far the run is, what it resumes from, and the encoder to share.

checkpoint.pth is the newest state and checkpoint.prev.pth the one before. Each is written to a
temporary file and renamed. A checkpoint that cannot be read is reported on stderr, and the one
before it is used.
"""

import argparse
import contextlib
import math
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from types import NoneType

import torch
from torch import nn

from data import PairDataset
from distributed import Distributed
from files import Lock, remove_leftovers, save_torch, write_json
from processes import STOP_SIGNALS
from untrusted import load_torch, reading
from utils import InputError, provenance

RESTART = 5  # seconds in which the processes of a run whose launcher was killed have ended
REPEAT = 1  # seconds: launchers and `timeout` may pass one Ctrl-C on twice
NOTICE = b"\nstopping after this step; Ctrl-C again ends at once, without a checkpoint\n"
NEWEST, PREVIOUS, REFUSED = "checkpoint.pth", "checkpoint.prev.pth", "checkpoint.refused.pth"
# Files written to a temporary name and renamed.
ATOMIC_FILES = (NEWEST, PREVIOUS, "model.pth", "args.json", "log.jsonl")

VALUE = torch.Tensor | int | float
STATE_TYPES = {
    **dict.fromkeys(("moco", "inputs", "args"), dict),
    **dict.fromkeys(("processes", "step", "epoch", "seen", "best_epoch"), int),
    "best": float | int,
    "best_weights": dict | NoneType,
    "mined": torch.Tensor | NoneType,
    "optimizers": list,
}

# Arguments of which each process may have its own
MAY_DIFFER = {
    # paths: the content of the files is compared instead
    "model_path",
    "annotation_path",
    "feature_path",
    "val_feature_path",
    "annotation_dir",
    # no influence on the result
    "num_workers",
    "num_readers",
    "features_on",
}
MAY_CHANGE_ON_RESUME = MAY_DIFFER | {
    # no influence on the result
    "print_freq",
    "save_every",
    # another one changes the last bits
    "device",
    "tf32",
    "deterministic",
    "batch_sz",  # changes the result; `resume_notes` says so
}

# Arguments that do not make another setting: models that differ in these alone are its seeds, and
# the seed tells them apart.
NOT_A_SETTING = MAY_CHANGE_ON_RESUME - {"batch_sz"}


class Run:
    """A training run that can stop after any step and resume with the same result.

    Every random draw depends on (seed, step) or (seed, epoch, pair), so no generator is saved.
    The constructor makes and locks the folder args.model_path; the end of `with run:` unlocks it.

    Args:
        encoder_info: what rebuilds the encoder: name, arguments, the features it is made for.
        inputs: {"features" | "annotation" | "held_out": content hash} of the files that the result
            depends on.

    Attributes:
        step, epoch: optimiser steps and epochs done.
        seen: pairs seen in the current epoch, by all processes.
        best, best_epoch, best_weights: score, number (from 0) and weights of the epoch that is best
            on the validation set.
        interrupted: the number of the signal that has reached any process, or 0.
    """

    PROGRESS_FIELDS = ("step", "epoch", "seen", "best", "best_epoch", "best_weights")
    STATE_FIELDS = (
        *("encoder", "arguments", "features", "moco", "optimizers", "mined"),
        *("inputs", "args", "processes", *PROGRESS_FIELDS),
    )

    def __init__(
        self,
        args: argparse.Namespace,
        dist: Distributed,
        data: PairDataset,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        encoder_info: dict,
        inputs: dict[str, str],
    ):
        self.args, self.dist, self.folder = args, dist, Path(args.model_path)
        self.data, self.model, self.optimizer = data, model, optimizer
        self.encoder_info, self.inputs = encoder_info, inputs
        self.step = self.epoch = self.seen = 0  # the progress; `resume` may replace it
        self.best, self.best_epoch, self.best_weights = -math.inf, -1, None
        self.interrupted = 0  # on all processes at the same step
        self._signal = 0  # on this process
        self._unchecked = deque()  # (loss, event, step, indices, negative ids) of the newest steps
        self.pairs_per_step = args.batch_sz * dist.world_size
        self._lock = contextlib.nullcontext()
        if dist.is_main:
            self._lock = Lock(self.folder, folder=True, wait=RESTART)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._lock.__exit__(None, None, None)

    # --- progress ---

    @property
    def steps_per_epoch(self) -> int:
        return len(self.data) // self.pairs_per_step

    @property
    def total_steps(self) -> int:
        """Steps of the whole run, without early stopping by --patience."""
        left = (self.args.epochs - self.epoch) * self.steps_per_epoch
        return self.step + left - self.seen // self.pairs_per_step

    @property
    def at_epoch_start(self) -> bool:
        return self.seen == 0

    @property
    def epoch_complete(self) -> bool:
        """Whether too few pairs are left for another step."""
        return self.seen + self.pairs_per_step > len(self.data)

    @property
    def is_complete(self) -> bool:
        """Whether all epochs are done, or --patience ends the run."""
        since_best = self.epoch - 1 - self.best_epoch  # epochs scored since the best
        return self.epoch >= self.args.epochs or 0 < self.args.patience <= since_best

    @property
    def is_written(self) -> bool:
        """Whether the run is complete and its model.pth exists."""
        exists = self.dist.is_main and (self.folder / "model.pth").exists()
        return self.is_complete and self.dist.any(exists)

    def remaining_epochs(self) -> Iterator[int]:
        """Yield the current epoch (from 0) until the run is complete or interrupted."""
        while not (self.is_complete or self.interrupted):
            yield self.epoch

    def next_step(self):
        self.step += 1
        self.seen += self.pairs_per_step

    def next_epoch(self):
        self.epoch, self.seen = self.epoch + 1, 0

    def keep_best(self, score: float):
        """Keep the weights if this epoch, which is complete, scores better than all before it."""
        if score > self.best:
            self.best, self.best_epoch = score, self.epoch
            weights = self.model.encoder_q.state_dict()
            # copies: the next step changes the weights in place
            self.best_weights = {name: value.cpu().clone() for name, value in weights.items()}

    # --- stopping ---

    @contextlib.contextmanager
    def stop_on_signals(self):
        """In this block, a stop signal ends the run after the current step.

        A second Ctrl-C ends it at once, as KeyboardInterrupt.
        """
        first_interrupt = math.inf  # when Ctrl-C came

        def handler(number, _):
            nonlocal first_interrupt
            self._signal = number
            if number == signal.SIGINT:
                now = time.monotonic()
                if now - first_interrupt > REPEAT:
                    raise KeyboardInterrupt
                if first_interrupt == math.inf and self.dist.is_main:
                    os.write(2, NOTICE)  # print could be in the middle of a line
                first_interrupt = min(now, first_interrupt)

        before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
        if before[signal.SIGINT] == signal.SIG_IGN:  # a script's background job
            del before[signal.SIGINT]
        for number in before:
            signal.signal(number, handler)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def keep_in_step(self, batches: Iterator) -> Iterator:
        """Yield the batches as long as no process has failed or received a signal.

        The processes tell each other by one exchange per step. If a batch cannot be read or a loss
        is not finite, all exit. A signal saves a checkpoint, sets `interrupted`, and ends this.
        """
        while True:
            batch = error = None
            try:
                # A GPU may still compute the newest loss: check the one before it.
                self._check_losses(keep=1)
                batch = next(batches, None)
            except InputError as caught:
                error = caught
            self.interrupted = self.dist.agree(error, self._signal)
            if self.interrupted and not self.at_epoch_start:
                self.save()
            if batch is None or self.interrupted:
                return
            yield batch

    def save_if_due(self):
        """After a step: save every --save_every steps.

        The end of an epoch is not saved here but after validation, so no resumed run skips a score.
        """
        if self.step % self.args.save_every == 0 and not self.epoch_complete:
            self.save()

    def note_loss(self, loss: torch.Tensor, indices: list[int], negative_ids: torch.Tensor):
        """Remember this step's loss, to be checked later: no step waits for a GPU."""
        copied = None
        loss = loss.detach().to("cpu", non_blocking=True)  # from a GPU: a queued copy
        if torch.device(self.args.device).type == "cuda":
            copied = torch.cuda.Event()
            copied.record()
        self._unchecked.append((loss, copied, self.step, indices, negative_ids))

    def _check_losses(self, keep: int = 0):
        """InputError if a noted loss is not finite; the newest `keep` are not checked yet."""
        while len(self._unchecked) > keep:
            loss, copied, step, indices, negative_ids = self._unchecked.popleft()
            if copied:
                copied.synchronize()
            if not torch.isfinite(loss):
                pairs = ", ".join("/".join(self.data.pairs[i]) for i in indices)
                negatives = dict.fromkeys(self.data.negatives[i] for i in negative_ids.tolist())
                raise InputError(
                    f"loss is {loss.item()} at step {step}, pairs {pairs},"
                    f" negatives {', '.join(negatives)}; {self._last_checkpoint()}; look for odd"
                    " values in those features, or start again with a lower --learning_rate, in"
                    " another --model_path"
                )

    def _last_checkpoint(self):
        path = self.folder / NEWEST
        if path.exists():
            return f"the last good checkpoint is {str(path)!r}"
        return "there is no checkpoint yet"

    # --- files ---

    def state(self) -> dict:
        """All that a resumed run needs, as plain containers and tensors. Every process calls it.

        Processes have the same state, with two exceptions. Their batch statistics differ: the main
        process's are saved. Under Adasum the optimisers' moments differ: those of all are saved.
        """
        optimizers = [self.optimizer.state_dict()]
        if self.args.use_adasum:
            optimizers = self.dist.gather_to_main(optimizers[0])
        return {
            **self.encoder_info,
            "moco": self.model.state_dict(),
            "optimizers": optimizers,
            "mined": self.data.hard_negatives,  # of the current epoch
            "inputs": self.inputs,
            "args": vars(self.args),
            "processes": self.dist.world_size,
            **{name: getattr(self, name) for name in self.PROGRESS_FIELDS},
        }

    def save(self):
        """Write a checkpoint. Every process calls it."""
        with self.dist.exit_together_on_error():
            self._check_losses()
            weights = self.model.encoder_q.state_dict().values()
            if not all(value.isfinite().all() for value in weights):
                raise InputError(
                    f"the weights are not finite at step {self.step}; {self._last_checkpoint()};"
                    " start again with a lower --learning_rate, in another --model_path"
                )
        state = self.state()
        # A full disk ends all; no process may end the run while the file is written.
        with self.dist.exit_together_on_error():
            if self.dist.is_main:
                write_checkpoint(self.folder, state)

    def require_same_command(self):
        """All exit if a process has other settings, or files of other content, than the main one.

        They would wait for each other in vain, or train on different data. By torchrun each machine
        gets a command line of its own.
        """
        own = {"args": {**vars(self.args)}, "inputs": self.inputs}
        own["args"]["device"] = torch.device(self.args.device).type  # each has its own GPU
        main = self.dist.broadcast(own)
        with self.dist.exit_together_on_error():
            other = changed_arguments(main["args"], own["args"], MAY_DIFFER)
            if other:
                raise InputError(
                    f"other settings than process 0 has ({', '.join(other)}); give the same command"
                    " on every machine"
                )
            other = changed_inputs(main["inputs"], self.inputs)
            if other:
                raise InputError(
                    f"the {' and '.join(other)} files differ from those of process 0; copy those"
                    " to every machine"
                )

    def resume(self):
        """Go on from the folder's checkpoint, if it has one.

        The weights and the bank are those of the main process alone: broadcast the model next.
        InputError if another command made the checkpoint.
        """
        state = optimizers = None
        with self.dist.exit_together_on_error():
            if self.dist.is_main:  # other machines may not see the folder
                state = newest_readable_checkpoint(self.folder, self.STATE_FIELDS)
                if state:
                    check_same_run(state, self.args, self.inputs, self.folder)
                    with self._fitting():
                        self.model.load_state_dict(state.pop("moco"))  # both encoders and the bank
                        self._check_hard_negatives(state["mined"])
                    optimizers = state.pop("optimizers")  # one, or under Adasum one per process
                    state["optimizers"] = len(optimizers)
        state = self.dist.broadcast(state)
        if state is None:
            return
        if state["optimizers"] == self.dist.world_size:
            optimizer = self.dist.scatter_from_main(optimizers)
        else:
            optimizer = self.dist.broadcast(optimizers[0] if optimizers else None)
        with self._fitting():
            self.optimizer.load_state_dict(optimizer)
        self.data.hard_negatives = state["mined"]
        for name in self.PROGRESS_FIELDS:
            setattr(self, name, state[name])
        if self.dist.is_main:
            for note in resume_notes(state, self.args.batch_sz, self.dist, len(self.data)):
                print(note)

    def _fitting(self):
        """In this block, a state that does not fit this run is an InputError."""
        return reading(self.folder / NEWEST, "checkpoint", "choose another --model_path")

    def _check_hard_negatives(self, ids):
        """Raise ValueError unless `ids` are (anchors, H) negatives' ids or -1, or None."""
        if ids is None:
            return
        if ids.ndim != 2 or ids.dtype != torch.int64 or len(ids) != len(self.data.anchors):
            raise ValueError(f"its hard negatives are {ids.dtype} {tuple(ids.shape)}")
        if ids.numel() and not -1 <= int(ids.min()) <= int(ids.max()) < len(self.data.negatives):
            raise ValueError("its hard negatives are of other data")

    def save_encoder(self):
        """Write model.pth: the encoder to share, of the best epoch if there is a validation set."""
        weights = self.best_weights
        if weights is None:
            weights = self.model.encoder_q.state_dict()
            weights = {name: value.cpu() for name, value in weights.items()}
        if self.dist.is_main:
            saved = {
                "args": vars(self.args),
                "processes": self.dist.world_size,
                "inputs": self.inputs,
            }
            state = {**self.encoder_info, "settings": settings_in(saved), "state_dict": weights}
            save_torch(self.folder / "model.pth", state)

    def save_arguments(self):
        """Write args.json: the arguments, the size of the run, the code and the machine."""
        settings = {
            "arguments": dict(sorted(vars(self.args).items())),
            "processes": self.dist.world_size,
            "engine": self.dist.backend,
            "steps": self.total_steps,
        }
        if self.dist.is_main:
            write_json(self.folder / "args.json", settings | provenance())


def settings_in(saved: dict) -> dict | None:
    """What decides the result of a run, from a model file, a checkpoint or an args.json.

    Returns:
        {"arguments": {name: value}, without paths and what has no influence; "processes": count;
        "inputs": {what: content hash}, if known}; None if the file does not say
    """
    if "settings" in saved:
        saved = saved["settings"] if isinstance(saved["settings"], dict) else {}
    arguments = saved.get("args") or saved.get("arguments")
    inputs = saved.get("inputs") or {}
    if not (isinstance(arguments, dict) and isinstance(inputs, dict) and "processes" in saved):
        return None
    kept = {name: value for name, value in arguments.items() if name not in NOT_A_SETTING}
    return {"arguments": kept, "processes": saved["processes"], "inputs": inputs}


def write_checkpoint(folder: str | Path, state: dict):
    """Write `state` as the newest checkpoint; the newest so far becomes the previous one."""
    path, previous = Path(folder) / NEWEST, Path(folder) / PREVIOUS
    # A kill at any point leaves NEWEST whole, or PREVIOUS where there are no hard links.
    fresh, link = (path.with_name(f".{name}.new") for name in (NEWEST, PREVIOUS))
    save_torch(fresh, state)
    if path.exists():
        link.unlink(missing_ok=True)
        try:
            os.link(path, link)
            os.replace(link, previous)
        except OSError:
            os.replace(path, previous)
    os.replace(fresh, path)


def newest_readable_checkpoint(folder: str | Path, keys) -> dict | None:
    """The newest state in `folder` that can be read and has the `keys`; None without a checkpoint.

    InputError when there are checkpoints and none can be used.
    """
    folder = Path(folder)
    # Delete temporary files of killed runs.
    for name in ATOMIC_FILES:
        remove_leftovers(folder / name)
    remove_leftovers(folder / f".{NEWEST}.new")
    (folder / f".{NEWEST}.new").unlink(missing_ok=True)
    errors = []
    for path in (folder / NEWEST, folder / PREVIOUS):
        if not path.exists():
            continue
        try:
            state = read_checkpoint(path, keys)
        except InputError as error:
            errors.append(str(error))
            continue
        if errors:
            os.replace(folder / NEWEST, folder / REFUSED)  # it must not become the previous one
            print(
                f"warning: {errors[0]}; it is now {REFUSED}; resuming from {PREVIOUS},"
                f" step {state['step']}",
                file=sys.stderr,
            )
        return state
    if errors:
        raise InputError(
            f"{'; '.join(errors)}; choose another --model_path, or remove it to start again"
        )
    return None


def read_checkpoint(path: Path, keys) -> dict:
    """The state in a file. InputError if it cannot be read or lacks one of the `keys`."""
    state = load_torch(path, "checkpoint")
    missing = sorted(set(keys) - set(state)) if isinstance(state, dict) else sorted(keys)
    if missing:
        raise InputError(
            f"checkpoint {str(path)!r} was not written by train.py"
            f" (it has no {', '.join(missing[:3])})"
        )
    for name in keys & STATE_TYPES.keys():
        if not isinstance(state[name], STATE_TYPES[name]):
            raise InputError(
                f"checkpoint {str(path)!r} was not written by train.py"
                f" (its {name} is a {type(state[name]).__name__})"
            )
    if not all(map(_is_optimizer_state, state.get("optimizers", ()))):
        raise InputError(
            f"checkpoint {str(path)!r} was not written by train.py (its optimizers are none)"
        )
    return state


def _is_optimizer_state(state):
    """Whether a value is {"state": {parameter: {name: number or tensor}}, "param_groups": []}."""
    if not isinstance(state, dict) or not isinstance(state.get("param_groups"), list):
        return False
    parameters = state.get("state")
    if not isinstance(parameters, dict):
        return False
    return all(
        isinstance(values, dict) and all(isinstance(v, VALUE | None) for v in values.values())
        for values in parameters.values()
    )


def check_same_run(state: dict, args: argparse.Namespace, inputs: dict, folder: Path):
    """InputError if `state` was made with other settings, or from files of other content."""
    changed = changed_arguments(state["args"], vars(args), MAY_CHANGE_ON_RESUME)
    made = f"the checkpoint in {str(folder)!r} was made"
    if changed:
        raise InputError(
            f"{made} with other settings ({', '.join(changed)}); choose another --model_path"
        )
    other = changed_inputs(state["inputs"], inputs)
    if other:
        raise InputError(
            f"{made} from other {' and '.join(other)} files; choose another --model_path"
        )


def changed_arguments(before: dict, now: dict, allowed: set[str]) -> list[str]:
    """["--flag before -> now"] of the arguments that differ, without the `allowed` ones."""
    return [
        f"--{name} {before.get(name)!r} -> {value!r}"
        for name, value in now.items()
        if name not in allowed and before.get(name) != value
    ]


def changed_inputs(before: dict[str, str], now: dict[str, str]) -> list[str]:
    """What the files are ("features", ...) whose content hashes differ."""
    return [name for name, value in now.items() if before.get(name) != value]


def resume_notes(state: dict, batch_sz: int, dist: Distributed, pairs: int) -> list[str]:
    """What a resumed run does differently than before, as lines to print."""
    before = state["processes"], state["args"]["batch_sz"]
    if before == (dist.world_size, batch_sz):
        return []
    return [
        f"note: the checkpoint was made by {before[0]} x {before[1]} pairs per step (processes"
        f" x --batch_sz), this run takes {dist.world_size} x {batch_sz}; it resumes after the"
        f" {state['seen']} of {pairs} pairs that epoch {state['epoch'] + 1} has seen, with the"
        " learning rate of this run's processes"
    ]
