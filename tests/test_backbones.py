"""Backbones and pooling: known photographs, plain loops, and refusals of what does not fit."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers.commands import ROOT
from sklearn.datasets import load_sample_image
from torch.nn import functional as F

from features import backbones, pooling
from utils import InputError

# --- backbones -------------------------------------------------------------------------------------------------------


def test_lite0_with_its_published_weights_recognises_photographs():
    model = backbones.EfficientNetLite0().eval()
    model.load_state_dict(torch.load(backbones._lite0_weights(), weights_only=True), strict=True)
    backbones.use_same_padding(model)
    spec = backbones.BACKBONES["efficientnet_lite0"]()
    for name, label in (("china.jpg", 698), ("flower.jpg", 985)):  # ImageNet's palace and daisy
        image = (
            torch.tensor(load_sample_image(name)).permute(2, 0, 1)[None].float()
        )  # (1, 3, 427, 640)
        image = F.interpolate(image, (256, 384), mode="bicubic", antialias=True)[
            :, :, 16:240, 80:304
        ]
        with torch.inference_mode():
            assert model((image - spec.mean[0]) / spec.std[0]).argmax() == label


def test_lite0_is_given_the_input_it_was_trained_on():
    """On photographs the stem's outputs vary as its batch norm recorded in training; ImageNet's deviations give 6 times it."""
    state, spec = (
        torch.load(backbones._lite0_weights(), weights_only=True),
        backbones.BACKBONES["efficientnet_lite0"](),
    )
    images = torch.tensor(
        np.stack([load_sample_image(name) for name in ("china.jpg", "flower.jpg")])
    ).permute(0, 3, 1, 2)
    x = (images - torch.tensor(spec.mean)[:, None, None]) / torch.tensor(spec.std)[:, None, None]
    measured, recorded = (
        F.conv2d(x, state["_conv_stem.weight"], stride=2).var((0, 2, 3)),
        state["_bn0.running_var"],
    )
    alive = recorded > 1e-3  # a few filters of the stem are dead
    assert 0.5 < (measured / recorded)[alive].median() < 2


@pytest.mark.parametrize("kernel", [3, 5])
def test_same_padding_in_the_kernel_equals_padding_the_map(kernel):
    """TensorFlow's rule: in all max(k - stride, 0) on an even size, the smaller half before."""
    conv = torch.nn.Conv2d(6, 6, kernel, 2, kernel // 2, groups=6, bias=False)
    x = torch.randn(2, 6, 14, 14)
    before, after = (kernel - 2) // 2, (kernel - 2) - (kernel - 2) // 2
    expected = F.conv2d(F.pad(x, (before, after, before, after)), conv.weight, stride=2, groups=6)
    assert torch.allclose(backbones.use_same_padding(conv)(x), expected, atol=1e-6)


@pytest.mark.parametrize("name", ["efficientnet_lite0", "resnet50"])
def test_folding_batch_norm_changes_nothing(tmp_path, name):
    spec = backbones.BACKBONES[name]()
    model = spec.classifier()
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # statistics that are not the trivial ones
            for tensor, low in (
                (module.running_mean, -0.2),
                (module.running_var, 0.7),
                (module.weight.data, 0.7),
            ):
                tensor.uniform_(low, low + 0.5, generator=generator)
    torch.save(model.state_dict(), tmp_path / "w.pth")
    backbone = backbones.build_backbone(name, tmp_path / "w.pth")
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in backbone.modules())
    frames = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8, generator=generator)
    seen = {}
    model = spec.finish(model.eval())
    for stage in spec.stages:
        model.get_submodule(stage).register_forward_hook(
            lambda m, i, out, stage=stage: seen.update({stage: out})
        )
    with torch.inference_mode():
        model(
            (frames.float() - torch.tensor(spec.mean)[:, None, None])
            / torch.tensor(spec.std)[:, None, None]
        )
    for stage, ours in zip(spec.stages, backbone(frames), strict=True):
        assert (ours - seen[stage]).abs().max() <= 1e-4 * seen[stage].abs().max()


def test_stages_have_the_papers_and_our_widths():
    assert sum(backbones.build_backbone("efficientnet_lite0", "random").channels) == 1752
    assert backbones.build_backbone("resnet50", "random").channels == [256, 512, 1024, 2048]
    assert backbones.build_backbone("resnet18", "random", ["layer2", "layer3"]).channels == [
        128,
        256,
    ]


def test_bfloat16_stays_near_float32():
    frames = torch.from_numpy(np.stack([load_sample_image("china.jpg")[100:324, 200:424]])).permute(
        0, 3, 1, 2
    )
    full, half = (
        backbones.build_backbone("efficientnet_lite0", amp=amp)(frames)
        for amp in (None, "bfloat16")
    )
    for x, y in zip(full, half, strict=True):
        assert (
            y.dtype == torch.float32
            and F.cosine_similarity(pooling.imac(x), pooling.imac(y)).min() > 0.99
        )


@pytest.mark.parametrize(
    "name, weights, stages, message",
    [
        ("resnet51", None, None, "unknown backbone"),
        ("resnet18", "random", None, "needs --stages.*layer1"),
        ("resnet18", "random", ["layer9"], "layer9"),
        ("resnet18", "random", ["layer2", "fc"], r"\(1000,\) are not all maps"),
        ("swin_t", "random", ["features.1"], r"\(56, 56, 96\) are not all maps"),
        ("resnet50", "nowhere.pth", None, "does not exist"),
    ],
)
def test_a_wrong_backbone_is_an_input_error(name, weights, stages, message):
    with pytest.raises(InputError, match=message):
        backbones.build_backbone(name, weights, stages)


def test_weights_of_another_model_are_refused(tmp_path):
    torch.save({"layer.weight": torch.zeros(2)}, tmp_path / "w.pth")
    with pytest.raises(InputError, match="do not fit resnet50"):
        backbones.build_backbone("resnet50", tmp_path / "w.pth")


def test_torchvision_operators_are_declared_only_beside_a_cpu_build_that_cannot_load_them(
    monkeypatch, tmp_path
):
    (tmp_path / "_C.so").touch()
    spec = type("Spec", (), {"origin": str(tmp_path / "__init__.py")})
    monkeypatch.setattr(backbones.importlib.util, "find_spec", lambda name: spec)
    for kind in ("cuda", "hip"):
        monkeypatch.setattr(torch.version, kind, None)

    def fails(path):
        raise OSError("undefined symbol")

    monkeypatch.setattr(torch.ops, "load_library", fails)
    assert backbones._extension_is_missing()
    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
    assert not backbones._extension_is_missing()
    monkeypatch.setattr(torch.ops, "load_library", fails)
    for kind in ("cuda", "hip"):
        monkeypatch.setattr(torch.version, kind, "12.8")
        assert not backbones._extension_is_missing()
        monkeypatch.setattr(torch.version, kind, None)


def test_torchvision_imports_and_nothing_is_declared_where_it_need_not_be():
    code = """
import sys; sys.path.insert(0, {root!r})
from features import backbones
missing = backbones._extension_is_missing()
assert backbones.import_torchvision().models.resnet18
assert len(backbones._declared) == missing
""".format(root=str(ROOT))
    code += "backbones.import_torchvision(); assert len(backbones._declared) == missing"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr == ""


# --- pooling ---------------------------------------------------------------------------------------------------------


def l2(x):
    return x / np.sqrt((x * x).sum())


def imac_by_loops(x):  # (c, h, w) -> (c,)
    c, h, w = x.shape
    out = np.full(c, -np.inf)
    for i in range(h):
        for j in range(w):
            out = np.maximum(out, l2(x[:, i, j]))
    return l2(out)


def l3_imac_by_loops(x, p):
    c, h, w = x.shape
    k, total = int(1.5 * p), np.zeros(c)
    for top in range(0, h - k + 1, p):
        for left in range(0, w - k + 1, p):
            region = np.full(c, -np.inf)
            for i in range(top, top + k):
                for j in range(left, left + k):
                    region = np.maximum(region, l2(x[:, i, j]))
            total += l2(region)
    return l2(total)


@pytest.mark.parametrize(
    "size, p", [((7, 7), 2), ((14, 14), 4), ((28, 28), 8), ((8, 14), 2), ((3, 3), 1), ((1, 1), 1)]
)
def test_imac_and_l3_imac_equal_plain_loops(size, p):
    x = np.random.default_rng(0).normal(size=(2, 5, *size)) + 0.3
    for pool, loops in (
        (pooling.imac, imac_by_loops),
        (pooling.l3_imac, lambda m: l3_imac_by_loops(m, p)),
    ):
        ours = pool(torch.from_numpy(x)).numpy()
        assert np.allclose(ours, [loops(m) for m in x], atol=1e-10)


def test_mac_spoc_and_gem_equal_their_definitions():
    x = np.random.default_rng(0).uniform(0.1, 1, (2, 5, 4, 6))
    flat = x.reshape(2, 5, 24)
    for name, pooled in (
        ("mac", flat.max(2)),
        ("spoc", flat.mean(2)),
        ("gem", (flat**3).mean(2) ** (1 / 3)),
    ):
        assert np.allclose(
            pooling.POOLINGS[name](torch.from_numpy(x)), [l2(row) for row in pooled], atol=1e-10
        )
