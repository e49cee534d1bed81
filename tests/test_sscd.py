"""SSCD: its forward pass by plain operations, its weight files, and a missing network."""

import http.client

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from features import sscd
from features.backbones import BACKBONES, backbone_settings, build_backbone
from features.pooling import imac
from features.views import View
from untrusted import load_torch
from utils import InputError


@pytest.fixture(scope="module")
def state():
    """A state dict as published: names begin with `backbone.`; made-up values."""
    model = BACKBONES["sscd"]().classifier()
    generator = torch.Generator().manual_seed(3)
    for name, value in model.state_dict().items():
        if name.endswith("running_mean") or name.endswith("bn3.bias"):
            value.uniform_(-0.1, 0.2, generator=generator)
        elif name.endswith("running_var"):
            value.uniform_(0.8, 1.3, generator=generator)
        elif name == "fc.bias":
            value.uniform_(-0.5, 0.5, generator=generator)
    return {f"backbone.{name}": value.clone() for name, value in model.state_dict().items()}


@pytest.fixture(scope="module")
def weights(state, tmp_path_factory):
    path = tmp_path_factory.mktemp("sscd") / "made_up.torchvision.pt"
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def frames():
    generator = torch.Generator().manual_seed(4)
    small = torch.rand((2, 3, 9, 9), generator=generator) * 255
    return F.interpolate(small, (288, 288), mode="bilinear").to(torch.uint8)


def forward_by_hand(state, frames):
    """ResNet-50 (He et al. 2016, stride in the 3 x 3 convolution), GeM with p = 3, linear, L2."""
    w = {name.removeprefix("backbone."): value.double() for name, value in state.items()}

    def conv(x, name, norm, stride=1):
        kernel = w[f"{name}.weight"]
        x = F.conv2d(x, kernel, stride=stride, padding=kernel.shape[-1] // 2)
        mean, var, scale, shift = (
            w[f"{norm}.{part}"][:, None, None]
            for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (var + 1e-5).sqrt() * scale + shift

    mean = torch.tensor([0.485, 0.456, 0.406]).double()[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225]).double()[:, None, None]
    x = (frames.double() / 255 - mean) / std
    x = F.max_pool2d(conv(x, "conv1", "bn1", 2).relu(), 3, 2, 1)
    for layer, blocks in enumerate((3, 4, 6, 3), 1):
        for i in range(blocks):
            name, stride = f"layer{layer}.{i}", 2 if layer > 1 and i == 0 else 1
            y = conv(x, f"{name}.conv1", f"{name}.bn1").relu()
            y = conv(y, f"{name}.conv2", f"{name}.bn2", stride).relu()
            y = conv(y, f"{name}.conv3", f"{name}.bn3")
            if i == 0:
                x = conv(x, f"{name}.downsample.0", f"{name}.downsample.1", stride)
            x = (x + y).relu()
    pooled = x.clamp(min=1e-6).pow(3).mean((2, 3)).pow(1 / 3)  # (B, 2048)
    vectors = pooled @ w["fc.weight"].T + w["fc.bias"]
    return vectors / vectors.norm(dim=1, keepdim=True)


class Published(torch.nn.Module):
    """What the TorchScript file computes: normalised frames -> unit vectors."""

    def __init__(self, state):
        super().__init__()
        self.backbone = BACKBONES["sscd"]().classifier()
        self.load_state_dict(state)

    def forward(self, x):
        backbone = self.backbone
        x = backbone.maxpool(backbone.relu(backbone.bn1(backbone.conv1(x))))
        x = backbone.layer4(backbone.layer3(backbone.layer2(backbone.layer1(x))))
        return F.normalize(backbone.fc(backbone.avgpool(x).flatten(1)))


@pytest.fixture(scope="module")
def torchscript(state, tmp_path_factory):
    path = tmp_path_factory.mktemp("sscd") / "made_up.torchscript.pt"
    model = Published(state).eval()
    torch.jit.trace(model, torch.zeros(1, 3, 64, 64), check_trace=False).save(str(path))
    return path


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_sscd_equals_its_equations_by_both_weight_files(state, weights, torchscript, frames):
    with torch.inference_mode():
        expected = forward_by_hand(state, frames)
    assert (expected[0] - expected[1]).norm() > 1e-3  # the two frames differ
    for path in (weights, torchscript):
        backbone = build_backbone("sscd", path)
        assert (backbone.channels, backbone.gives_vectors) == ([512], True)
        assert backbone.view == View(288, whole=True)
        assert backbone.weights.startswith(f"{path.name} sha256 ")
        (maps,) = backbone(frames)
        assert maps.shape == (2, 512, 1, 1)
        assert torch.allclose(imac(maps).double(), expected, atol=1e-5)

    # A program is run where it is asked for, and nowhere else.
    with pytest.raises(InputError, match="cannot be read"):
        load_torch(torchscript)
    with pytest.raises(InputError, match="cannot be read"):
        build_backbone("resnet50", torchscript)
    with pytest.raises(InputError, match="--stages cannot name"):
        build_backbone("sscd", torchscript, ["fc"])


class Sums(torch.nn.Module):
    def forward(self, x):
        return x.sum()


class Fails(torch.nn.Module):
    def forward(self, x):
        return torch.matmul(x, torch.zeros(7, 7))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("program, message", [(Sums, "does not give a vector"), (Fails, "fails")])
def test_torchscript_that_is_no_such_network_is_refused_in_one_line(tmp_path, program, message):
    torch.jit.script(program()).save(str(tmp_path / "p.pt"))
    with pytest.raises(InputError, match=message) as caught:
        build_backbone("sscd", tmp_path / "p.pt")
    assert "\n" not in str(caught.value)

    data = (tmp_path / "p.pt").read_bytes()
    damaged = data.replace(b"torch", b"tarch")
    (tmp_path / "p.pt").write_bytes(damaged)
    with pytest.raises(InputError) as caught:
        build_backbone("sscd", tmp_path / "p.pt")
    assert "\n" not in str(caught.value)


def test_sscd_weights_of_another_network_are_refused(tmp_path, state):
    torch.save({**state, "backbone.fc.weight": torch.zeros(1024, 2048)}, tmp_path / "w.pt")
    with pytest.raises(InputError, match="do not fit sscd"):
        build_backbone("sscd", tmp_path / "w.pt")


def test_sscd_without_a_network_says_how_to_get_the_weights(tmp_path, monkeypatch):
    """The address refuses connections; then it hangs up."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    url = "http://127.0.0.1:9/sscd_disc_mixup.torchvision.pt"
    monkeypatch.setattr(sscd, "URL", url)
    with pytest.raises(InputError, match=f"cannot be downloaded .*{url}.* --weights FILE") as error:
        sscd.sscd_weights()
    assert "\n" not in str(error.value)

    def hang_up(*_, **__):
        raise http.client.RemoteDisconnected("closed")

    monkeypatch.setattr(torch.hub, "urlopen", hang_up)
    with pytest.raises(InputError, match="closed"):
        sscd.sscd_weights()
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


def test_sscd_weights_are_fetched_once(tmp_path, monkeypatch):
    source = tmp_path / "published" / "made_up.pt"
    source.parent.mkdir()
    source.write_bytes(np.arange(9).tobytes())
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "cache"))
    monkeypatch.setattr(sscd, "URL", source.as_uri())
    path = sscd.sscd_weights()
    assert path == tmp_path / "cache" / "checkpoints" / "made_up.pt"
    assert path.read_bytes() == source.read_bytes()
    source.unlink()
    assert sscd.sscd_weights() == path


def test_sscd_pooling_is_none_and_another_is_refused():
    """The settings of files: what is not of earlier versions is added."""
    backbone = build_backbone("sscd", "random")
    assert backbone_settings(backbone, None, "imac") == {
        "backbone": "sscd",
        "weights": "random",
        "stages": "default",
        "pooling": "none",
        "view": "288 whole",
    }
    with pytest.raises(InputError, match="--pooling gem: sscd gives vectors"):
        backbone_settings(backbone, None, "gem")
