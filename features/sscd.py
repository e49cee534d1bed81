"""SSCD, a network made to find edited copies: its pooling, its weights, its TorchScript form.

Pizzi et al., A Self-Supervised Descriptor for Image Copy Detection, CVPR 2022. `backbones.py` puts
the network together.
"""

import http.client
import sys
import warnings
import zipfile
from pathlib import Path

import torch
from torch import nn

from utils import InputError, one_line

URL = "https://dl.fbaipublicfiles.com/sscd-copy-detection/sscd_disc_mixup.torchvision.pt"


class GeM(nn.Module):
    """Generalised mean over positions at exponent 3 (Radenovic et al. 2018): -> (B, c, 1, 1)."""

    def forward(self, x):  # (B, c, h, w)
        return x.clamp(min=1e-6).pow(3).mean((2, 3), keepdim=True).pow(1 / 3)


def sscd_weights() -> Path:
    """The published file, fetched into torch's cache where it is not there yet."""
    path = Path(torch.hub.get_dir(), "checkpoints", URL.rpartition("/")[2])
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    print(f"sscd: fetching {URL} (100 MB) to {path}", file=sys.stderr)
    try:
        torch.hub.download_url_to_file(URL, str(path))
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        raise InputError(
            f"the weights of sscd cannot be downloaded ({one_line(str(error))}); fetch {URL}"
            " elsewhere and give it by --weights FILE"
        ) from None
    return path


class TorchScriptNetwork(nn.Module):
    """A TorchScript file as a network of one stage. The file is a program, which is run.

    Normalised frames (B, 3, H, W) -> {"fc": (B, c, 1, 1)}.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        with warnings.catch_warnings():  # torch.jit is deprecated; its files are published
            warnings.simplefilter("ignore", DeprecationWarning)
            try:
                self.program = torch.jit.load(str(path), map_location="cpu")
            except (RuntimeError, ValueError) as error:
                raise InputError(
                    f"weights {str(path)!r} are not a TorchScript file ({_last_line(error)}); fetch"
                    " them again"
                ) from None
        self.path = path

    def forward(self, x):
        try:
            vectors = self.program(x)
        except RuntimeError as error:
            raise InputError(
                f"the program of {str(self.path)!r} fails: {_last_line(error)}"
            ) from None
        if not isinstance(vectors, torch.Tensor) or vectors.ndim != 2 or len(vectors) != len(x):
            raise InputError(f"the program of {str(self.path)!r} does not give a vector a frame")
        return {"fc": vectors[:, :, None, None]}


def is_torchscript(path: Path) -> bool:
    """Whether a file holds a program, and not only weights."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _last_line(error):
    """An error of several lines as one; PyTorch's give the reason last."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return one_line(lines[-1])[:200] if lines else type(error).__name__
