"""What torch.hub offers: the TCA encoder, with the shipped weights, those of a file, or none.

    import torch

    tca = torch.hub.load("PATH/OF/THIS/REPOSITORY", "tca", source="local", trust_repo=True)
    frames = tca.encode(x, num_frames)

x (N, T, 512) PCA-whitened features and num_frames (N,) int64 -> (N, T, 512) frame descriptors.

It works beside other modules called utils, model or data, and leaves them as they are. To store
the encoder, save its state_dict.
"""

import contextlib as _contextlib
import sys as _sys
from pathlib import Path as _Path

dependencies = ["torch", "numpy"]

_ROOT = _Path(__file__).resolve().parent


def tca(pretrained=True, nhead=8, **arguments):
    """TCA in eval mode: forward(x (N, T, C), num_frames (N,)) -> (N, D), encode(...) -> (N, T, D).

    Args:
        pretrained: True for the encoder in models/demo, which was trained on three minutes of one
            film, for features projected by the pca.npz beside it. A path for the encoder of a run's
            folder, a model.pth or a released state dict. False for a new encoder.
        nhead: attention heads of a new encoder or of a released state dict.
        arguments: of a new encoder, as in model.TCA: feature_size, nlayers, dim_feedforward,
            dropout, init.
    """
    with _own_modules():
        from model import TCA, load_encoder
        from utils import InputError

        if not pretrained:
            return TCA(nhead=nhead, **arguments).eval()
        if arguments:
            raise InputError(
                f"{', '.join(arguments)}: a pretrained model has its own arguments; leave them out"
            )
        shipped = _ROOT / "models" / "demo"
        _, encoder, _ = load_encoder(shipped if pretrained is True else pretrained, nhead)
        return encoder


@_contextlib.contextmanager
def _own_modules():
    """In this block `import utils` is this repository's; afterwards all is as it was before."""
    names = {path.stem for path in [*_ROOT.glob("*.py"), *_ROOT.glob("*/__init__.py")]}
    names |= {path.parent.name for path in _ROOT.glob("*/__init__.py")}
    before = {}  # modules of these names, and those inside them
    for name, module in _sys.modules.items():
        if name.partition(".")[0] in names:
            before[name] = module
    for name, module in before.items():
        file = getattr(module, "__file__", None)
        if not file or not _Path(file).resolve().is_relative_to(_ROOT):
            del _sys.modules[name]
    _sys.path.insert(0, str(_ROOT))
    try:
        yield
    finally:
        _sys.path.remove(str(_ROOT))
        for name in [name for name in _sys.modules if name.partition(".")[0] in names]:
            del _sys.modules[name]
        _sys.modules.update(before)
