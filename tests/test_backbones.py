"""Backbones and pooling: known photographs, plain loops, and refusals of what does not fit."""

import numpy as np
import pytest
import torch
from helpers.commands import python
from helpers.pooling_loops import imac_by_loop, l2, l3_imac_by_loop
from sklearn.datasets import load_sample_image
from torch.nn import functional as F

from features import backbones
from features.backbones import BACKBONES, build_backbone
from features.pooling import POOLINGS, imac, l3_imac
from utils import InputError

PHOTOGRAPHS = ("china.jpg", "flower.jpg")


def normalise(images, spec):
    mean, std = torch.tensor(spec.mean), torch.tensor(spec.std)
    return (images - mean[:, None, None]) / std[:, None, None]


# --- backbones -----------------------------------------------------------------------------------


def test_lite0_published_weights_recognise_photographs():
    spec = BACKBONES["efficientnet_lite0"]()
    model = spec.classifier().eval()
    model.load_state_dict(torch.load(spec.weights(), weights_only=True), strict=True)
    model = spec.finish(model)
    labels = (698, 985)  # ImageNet's palace and daisy
    for name, label in zip(PHOTOGRAPHS, labels, strict=True):
        image = torch.tensor(load_sample_image(name)).permute(2, 0, 1)[None].float()
        image = F.interpolate(image, (256, 384), mode="bicubic", antialias=True)
        image = image[:, :, 16:240, 80:304]  # (1, 3, 224, 224)
        with torch.inference_mode():
            assert model(normalise(image, spec)).argmax() == label


def test_lite0_input_is_that_of_its_training():
    """The stem's outputs on photographs vary as its batch norm recorded in training.

    With ImageNet's mean and deviation they would vary six times as much.
    """
    spec = BACKBONES["efficientnet_lite0"]()
    state = torch.load(spec.weights(), weights_only=True)
    images = np.stack([load_sample_image(name) for name in PHOTOGRAPHS])
    x = normalise(torch.tensor(images).permute(0, 3, 1, 2), spec)
    measured = F.conv2d(x, state["_conv_stem.weight"], stride=2).var((0, 2, 3))
    recorded = state["_bn0.running_var"]
    alive = recorded > 1e-3  # a few filters of the stem are dead
    assert 0.5 < (measured / recorded)[alive].median() < 2


@pytest.mark.parametrize("kernel", [3, 5])
def test_same_padding_in_the_kernel_equals_padding_the_map(kernel):
    """TensorFlow pads an even size by max(k - stride, 0) in all, the smaller half before."""
    conv = torch.nn.Conv2d(6, 6, kernel, 2, kernel // 2, groups=6, bias=False)
    x = torch.randn(2, 6, 14, 14)
    before = (kernel - 2) // 2
    after = (kernel - 2) - before
    padded = F.pad(x, (before, after, before, after))
    expected = F.conv2d(padded, conv.weight, stride=2, groups=6)
    assert torch.allclose(backbones.use_same_padding(conv)(x), expected, atol=1e-6)


@pytest.mark.parametrize("name", ["efficientnet_lite0", "resnet50"])
def test_folded_batch_norm_changes_nothing(tmp_path, name):
    spec = BACKBONES[name]()
    model = spec.classifier()
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # other statistics than the trivial ones
            module.running_mean.uniform_(-0.2, 0.3, generator=generator)
            module.running_var.uniform_(0.7, 1.2, generator=generator)
            module.weight.data.uniform_(0.7, 1.2, generator=generator)
    torch.save(model.state_dict(), tmp_path / "w.pth")
    backbone = build_backbone(name, tmp_path / "w.pth")
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in backbone.modules())

    frames = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8, generator=generator)
    expected = {}
    model = spec.finish(model.eval())
    for stage in spec.stages:

        def note(module, arguments, output, stage=stage):
            expected[stage] = output

        model.get_submodule(stage).register_forward_hook(note)
    with torch.inference_mode():
        model(normalise(frames.float(), spec))
    for stage, ours in zip(spec.stages, backbone(frames), strict=True):
        assert (ours - expected[stage]).abs().max() <= 1e-4 * expected[stage].abs().max()


def test_lite0_needs_no_torchvision():
    """Which takes two seconds to import."""
    code = "import sys; from features.backbones import build_backbone as build\n"
    code += "build('efficientnet_lite0', 'random'); assert 'torchvision' not in sys.modules"
    result = python(code)
    assert result.returncode == 0, result.stderr


def test_backbone_channels():
    assert sum(build_backbone("efficientnet_lite0", "random").channels) == 1752
    assert build_backbone("resnet50", "random").channels == [256, 512, 1024, 2048]
    chosen = build_backbone("resnet18", "random", ["layer2", "layer3"])
    assert chosen.channels == [128, 256]


def test_bfloat16_is_close_to_float32():
    image = load_sample_image("china.jpg")[100:324, 200:424]
    frames = torch.from_numpy(np.stack([image])).permute(0, 3, 1, 2)
    full, half = (
        build_backbone("efficientnet_lite0", amp=amp)(frames) for amp in (None, "bfloat16")
    )
    for x, y in zip(full, half, strict=True):
        assert y.dtype == torch.float32
        assert F.cosine_similarity(imac(x), imac(y)).min() > 0.99


@pytest.mark.parametrize(
    "name, weights, stages, message",
    [
        ("resnet51", None, None, "unknown backbone"),
        ("resnet18", "random", None, "needs --stages.*layer1"),
        ("resnet18", "random", ["layer9"], "layer9"),
        ("resnet18", "random", ["layer2", "fc"], r"\(1000,\) are not all maps"),
        ("swin_t", "random", ["features.1"], r"\(56, 56, 96\) are not all maps"),
        ("resnet50", "nowhere.pth", None, "nowhere.pth"),
    ],
)
def test_backbone_refusals(name, weights, stages, message):
    with pytest.raises(InputError, match=message):
        build_backbone(name, weights, stages)


def test_weights_of_another_model_are_refused(tmp_path):
    torch.save({"layer.weight": torch.zeros(2)}, tmp_path / "w.pth")
    with pytest.raises(InputError, match="do not fit resnet50"):
        build_backbone("resnet50", tmp_path / "w.pth")


# --- torchvision beside a CPU build of torch -----------------------------------------------------


def test_torchvision_extension_is_missing_only_beside_a_cpu_build(monkeypatch, tmp_path):
    (tmp_path / "_C.so").touch()
    spec = type("Spec", (), {"origin": str(tmp_path / "__init__.py")})
    monkeypatch.setattr(backbones.importlib.util, "find_spec", lambda name: spec)
    for kind in ("cuda", "hip"):
        monkeypatch.setattr(torch.version, kind, None)

    def fail(path):
        raise OSError("undefined symbol")

    monkeypatch.setattr(torch.ops, "load_library", fail)
    assert backbones._extension_is_missing()
    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
    assert not backbones._extension_is_missing()
    monkeypatch.setattr(torch.ops, "load_library", fail)
    for kind in ("cuda", "hip"):
        monkeypatch.setattr(torch.version, kind, "12.8")
        assert not backbones._extension_is_missing()
        monkeypatch.setattr(torch.version, kind, None)


IMPORT_TORCHVISION = """
from features import backbones
missing = backbones._extension_is_missing()
for _ in range(2):
    assert backbones.import_torchvision().models.resnet18
    assert len(backbones._declared) == missing
"""


@pytest.mark.slow
def test_torchvision_operators_are_declared_once_and_only_if_missing():
    """In a process of its own: an operator can be declared once in each."""
    result = python(IMPORT_TORCHVISION)
    assert (result.returncode, result.stderr) == (0, "")


# --- pooling -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size, p", [((7, 7), 2), ((14, 14), 4), ((28, 28), 8), ((8, 14), 2), ((3, 3), 1), ((1, 1), 1)]
)
def test_imac_and_l3_imac_equal_plain_loops(size, p):
    x = np.random.default_rng(0).normal(size=(2, 5, *size)) + 0.3
    ours = imac(torch.from_numpy(x)).numpy()
    assert np.allclose(ours, [imac_by_loop(m) for m in x], atol=1e-10)
    ours = l3_imac(torch.from_numpy(x)).numpy()
    assert np.allclose(ours, [l3_imac_by_loop(m, p) for m in x], atol=1e-10)


def test_mac_spoc_and_gem_equal_their_definitions():
    x = np.random.default_rng(0).uniform(0.1, 1, (2, 5, 4, 6))
    positions = x.reshape(2, 5, 24)
    definitions = {
        "mac": positions.max(2),
        "spoc": positions.mean(2),
        "gem": (positions**3).mean(2) ** (1 / 3),
    }
    for name, pooled in definitions.items():
        ours = POOLINGS[name](torch.from_numpy(x))
        assert np.allclose(ours, [l2(row) for row in pooled], atol=1e-10)
