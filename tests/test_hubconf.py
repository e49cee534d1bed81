"""torch.hub.load of this repository: the shipped encoder, one of a file, a new one."""

import torch
from helpers.commands import ROOT

from model import TCA, build_encoder
from untrusted import load_torch
from videoindex.pipeline import SHIPPED


def load(**options):
    return torch.hub.load(str(ROOT), "tca", source="local", trust_repo=True, **options)


def test_hub_gives_the_encoder(tmp_path):
    x, num_frames = torch.randn(2, 5, 512), torch.tensor([5, 3])
    with torch.inference_mode():
        expected = build_encoder(load_torch(SHIPPED / "model.pth"), "")(x, num_frames)
        assert torch.equal(load()(x, num_frames), expected)

        released = TCA(64, nhead=4, dim_feedforward=32).eval()
        torch.save(released.state_dict(), tmp_path / "bare.pth")
        loaded = load(pretrained=str(tmp_path / "bare.pth"), nhead=4)
        expected = released(x[..., :64], num_frames)
        assert torch.equal(loaded(x[..., :64], num_frames), expected)

        new = load(pretrained=False, feature_size=32, nhead=2)
        assert new.encode(x[..., :32], num_frames).shape == (2, 5, 32)
