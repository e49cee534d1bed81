"""What torch.hub offers: the encoder, with the weights that are shipped, those of a file, or none.

import torch

tca = torch.hub.load("PATH/OF/THIS/REPOSITORY", "tca", source="local", trust_repo=True)
frames = tca.encode(x, num_frames)  # x (N, T, 512) PCA-whitened features, num_frames (N,) -> (N, T, 512)
"""

dependencies = ["torch", "numpy"]


def tca(pretrained=True, nhead=8, **arguments):
    """TCA, in eval mode: forward(x (N, T, C), num_frames (N,)) -> (N, D), encode(...) -> (N, T, D).

    pretrained: True for the encoder in models/demo (trained on three minutes of one film, for features projected by the
    pca.npz beside it), the path of a run's folder, a model.pth or a released state dict, or False for a new one with the
    `arguments` of model.TCA (feature_size, nhead, nlayers, dim_feedforward, dropout, init).
    """
    from pathlib import Path

    from model import TCA, load_encoder
    from utils import InputError

    if not pretrained:
        return TCA(nhead=nhead, **arguments).eval()
    if arguments:
        raise InputError(
            f"{', '.join(arguments)}: a pretrained model has its own arguments; leave them out"
        )
    shipped = Path(__file__).resolve().parent / "models" / "demo"
    return load_encoder(shipped if pretrained is True else pretrained, nhead)[1]
