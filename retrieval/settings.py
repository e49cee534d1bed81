"""Which models are seeds of one setting, and what tells the others apart.

A mean ± deviation over models says something if they differ in their seed alone. train.py stores in
model.pth what a run was trained with. Older runs have it in args.json, beside model.pth.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from checkpoint import settings_in
from model import ENCODERS, model_file
from untrusted import load_torch
from utils import InputError, digest

LONGEST = 3  # differences named by a label


class TrainedModel(NamedTuple):
    """A model to be evaluated.

    path: as the user gave it
    encoder: its name in ENCODERS
    setting: {name: value} of what it was trained with, `seed` included; None if its file does not
        say, as a bare state dict
    """

    path: str
    encoder: str
    setting: dict | None


def read_setting(path: str | Path) -> dict | None:
    """What the model of a run's folder or of a model file was trained with; None if unknown."""
    file = model_file(path)
    state = load_torch(file)
    if not (isinstance(state, dict) and isinstance(state.get("encoder"), str)):
        return None  # a bare state dict
    saved = settings_in(state) or _settings_beside(file)
    if saved is None:
        return None
    setting = {"processes": saved["processes"], **saved["arguments"]}
    flags = ENCODERS[state["encoder"]].flags
    for argument, value in state["arguments"].items():  # of the encoder, defaults filled in
        setting[flags.get(argument, argument)] = value
    setting["features"] = digest(state.get("features") or {})  # what made them
    for name, content in saved["inputs"].items():
        setting[f"content of {name}"] = content
    if "moco" in state:  # a checkpoint
        setting["step"] = state.get("step")
    return setting


def _settings_beside(file):
    """The settings in the args.json of a run's folder, or None."""
    try:
        saved = json.loads((file.parent / "args.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return settings_in(saved) if isinstance(saved, dict) else None


def label_settings(models: Sequence[TrainedModel]) -> list[str]:
    """A label for each model: models of one encoder and label are seeds of one setting.

    The label names what tells a setting from the others of its encoder; "" if there are none.

    Raises:
        InputError: a model is given twice
    """
    resolved = [model_file(model.path).resolve() for model in models]
    for i, path in enumerate(resolved):
        if path in resolved[:i]:
            raise InputError(
                f"--model_path {models[i].path!r} is given twice; give each model once"
            )
    labels = {}
    for encoder in dict.fromkeys(model.encoder for model in models):
        groups = _groups([model for model in models if model.encoder == encoder])
        for group, label in zip(groups, _labels(groups), strict=True):
            labels.update({model.path: label for model in group})
    return [labels[model.path] for model in models]


def repeated_seeds(models: Sequence[TrainedModel], labels: Sequence[str]) -> list[str]:
    """Notes on models of one setting that have the same seed, which are no sample of seeds."""
    first, notes = {}, []
    for model, label in zip(models, labels, strict=True):
        key = model.encoder, label, (model.setting or {}).get("seed")
        if key[2] is not None and key in first:
            notes.append(f"{first[key]!r} and {model.path!r} have the same setting and seed")
        first.setdefault(key, model.path)
    return notes


def _groups(models):
    """Lists of models that agree in all but their seed, in the order of their first model."""
    groups = []
    for model in models:
        for group in groups:
            if model.setting and group[0].setting and not _differing(model, group[0]):
                group.append(model)
                break
        else:
            groups.append([model])
    return groups


def _differing(model, other):
    """The names of the settings in which two models differ."""
    a, b = model.setting, other.setting
    names = []
    for name in {**a, **b}:
        # An older file lacks the flags that came later, all off by default, and some lack the
        # content of what they were trained on.
        unknown = name.startswith("content of") and not (name in a and name in b)
        if name != "seed" and not unknown and (a.get(name) or None) != (b.get(name) or None):
            names.append(name)
    return names


def _labels(groups):
    if len(groups) == 1:
        return [""]
    known = [group[0] for group in groups if group[0].setting]
    names = {}
    for i, model in enumerate(known):
        for other in known[:i]:
            names.update(dict.fromkeys(_differing(model, other)))
    labels = []
    for group in groups:
        parts = _parts(group[0].setting, list(names)[:LONGEST]) if group[0].setting else []
        labels.append(", ".join(parts) or group[0].path)
    # Settings that differ in more than their labels say are named by their first model.
    return [
        group[0].path if labels.count(label) > 1 else label
        for group, label in zip(groups, labels, strict=True)
    ]


def _parts(setting: Mapping, names: Sequence[str]) -> list[str]:
    parts = []
    for name in names:
        value = setting.get(name)
        if isinstance(value, list):
            value = " ".join(map(str, value))
        if value is True:
            parts.append(name)
        elif value is not None and value is not False:
            parts.append(f"{name} {value}")
        elif name != "step":  # a finished model has none
            parts.append(f"no {name}")
    return parts
