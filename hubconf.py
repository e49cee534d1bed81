"""What torch.hub offers: the TCA encoder, with the shipped weights, those of a file, or none.

    import torch

    tca = torch.hub.load("PATH/OF/THIS/REPOSITORY", "tca", source="local", trust_repo=True)
    frames = tca.encode(x, num_frames)

x (N, T, 512) PCA-whitened features and num_frames (N,) int64 -> (N, T, 512) frame descriptors.
"""

dependencies = ["torch", "numpy"]


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
    _, encoder, _ = load_encoder(shipped if pretrained is True else pretrained, nhead)
    return encoder
