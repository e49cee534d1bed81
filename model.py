"""Video encoders and momentum contrast: sections 3.2 and 3.3 of the TCA paper.

    encoder = TCA(feature_size=1024)
    encoder(x, num_frames)         # (N, D)     one descriptor per video
    encoder.encode(x, num_frames)  # (N, T, D)  one descriptor per frame

N videos in a batch, T frames (padded), C channels of a frame feature, D descriptor size, K entries
of MoCo's queue. A batch is `x (N, T, C)` with `num_frames (N,) int64`, which best stays on the CPU
(see padding.py). Frames at or past `num_frames[i]` are padding and change nothing.
"""

import copy
import inspect
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from padding import encode_by_length, trim_padding, valid_rows
from untrusted import load_torch
from utils import InputError, require_path


class TCA(nn.Module):
    """Temporal Context Aggregation: self-attention relates every frame to all others (section 3.2).

    A Transformer encoder without positional encoding. Its outputs are the frame descriptors (TCA_f,
    TCA_sym), their mean is the video descriptor (TCA_c). Parameters are named as in the released
    model, so its checkpoints load.
    """

    # {argument of the constructor: the command-line flag that sets it}
    flags = {
        "nhead": "nhead",
        "nlayers": "num_layers",
        "dim_feedforward": "dim_feedforward",
        "dropout": "dropout",
        "init": "init",
    }
    has_frame_descriptors = True

    def __init__(
        self,
        feature_size: int = 1024,  # C, which is also D
        nhead: int = 8,
        nlayers: int = 1,
        dim_feedforward: int = 2048,
        dropout: float = 0.2,
        init: str = "paper",  # PyTorch's own; "near_identity": see zero_residual_branches
    ):
        super().__init__()
        if feature_size % nhead:
            raise InputError(
                f"{feature_size} channels cannot be split over {nhead} attention heads; "
                "choose --nhead to divide it"
            )
        self.feature_size = feature_size
        layer = Layer(feature_size, nhead, dim_feedforward, dropout, batch_first=True)
        # The nested-tensor path is off: padding is already trimmed and masked.
        self.transformer_encoder = nn.TransformerEncoder(layer, nlayers, enable_nested_tensor=False)
        if init == "near_identity":
            zero_residual_branches(self.transformer_encoder)

    @property
    def descriptor_size(self) -> int:
        return self.feature_size

    def forward(self, x: Tensor, num_frames: Tensor) -> Tensor:
        """One L2-normalised descriptor per video: (N, D)."""
        out = self.frame_outputs(x, num_frames)
        return video_descriptors(out, num_frames)

    def encode(self, x: Tensor, num_frames: Tensor) -> Tensor:
        """One L2-normalised descriptor per frame: (N, T, D), zero past `num_frames`."""
        out = self.frame_outputs(x, num_frames)
        return frame_descriptors(out, T=x.shape[1])

    def encode_video_and_frames(self, x: Tensor, num_frames: Tensor) -> tuple[Tensor, Tensor]:
        """What `forward` and `encode` return, from one pass."""
        out = self.frame_outputs(x, num_frames)
        return video_descriptors(out, num_frames), frame_descriptors(out, T=x.shape[1])

    def frame_outputs(self, x: Tensor, num_frames: Tensor) -> Tensor:
        """Frames after self-attention: (N, T', D), T' the longest video's; zero at padding."""
        x, mask = trim_padding(x, num_frames)  # (N, T', C), (N, T')
        has_padding = int(num_frames.min()) < x.shape[1]
        padding = ~mask if has_padding else None  # frames that no frame attends to
        out = self.transformer_encoder(x, src_key_padding_mask=padding)  # (N, T', D)
        return out.masked_fill(~mask[..., None], 0.0)


def video_descriptors(out: Tensor, num_frames: Tensor) -> Tensor:
    """Mean over each video's frames, L2-normalised: out (N, T', D), zero at padding -> (N, D)."""
    mean = out.sum(1) / num_frames.to(out.device, non_blocking=True)[:, None]  # (N, D)
    return F.normalize(mean, dim=1)


def frame_descriptors(out: Tensor, T: int) -> Tensor:
    """Every frame L2-normalised, padded again to T frames: out (N, T', D) -> (N, T, D)."""
    frames = F.normalize(out, dim=2)  # zero stays zero
    return F.pad(frames, (0, 0, 0, T - out.shape[1]))


# Without cuDNN's: on a GPU in bfloat16 it plans anew for every shape, and so for each batch.
ATTENTION_KERNELS = [
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


class Layer(nn.TransformerEncoderLayer):
    """PyTorch's encoder layer, with q, k and v laid out per head before they are multiplied.

    PyTorch interleaves the heads. In bfloat16 with dropout and frozen weights this made the layer
    30 times slower than float32 on a CPU. Names and arithmetic are PyTorch's.
    """

    def forward(self, src, src_mask=None, src_key_padding_mask=None, is_causal=False):
        if not torch.is_autocast_enabled("cpu"):
            return super().forward(src, src_mask, src_key_padding_mask, is_causal)
        # PyTorch's fast path does not know a CPU's autocast, and computes layer norms in bfloat16.
        # This is what it replaces, as on a GPU.
        x = self.norm1(src + self._sa_block(src, src_mask, src_key_padding_mask, is_causal))
        return self.norm2(x + self._ff_block(x))

    def _sa_block(self, x, attn_mask, key_padding_mask, is_causal=False):
        attention = self.self_attn
        qkv = F.linear(x, attention.in_proj_weight, attention.in_proj_bias)  # (N, T, 3D)
        qkv = qkv.unflatten(2, (3, attention.num_heads, -1))  # (N, T, 3, heads, D/heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).contiguous()  # (N, heads, T, D/heads) each
        mask = None
        # TransformerEncoder has turned the bool mask into one of 0 and -inf (at padding): (N, T).
        if key_padding_mask is not None:
            mask = key_padding_mask[:, None, None].to(q.dtype).expand(-1, -1, x.shape[1], -1)
        dropout = attention.dropout if self.training else 0.0
        with sdpa_kernel(ATTENTION_KERNELS):
            out = F.scaled_dot_product_attention(q, k, v, mask, dropout)  # (N, heads, T, D/heads)
        out = out.transpose(1, 2).flatten(2)  # (N, T, D)
        return self.dropout1(attention.out_proj(out))


def zero_residual_branches(transformer: nn.TransformerEncoder) -> None:
    """Let no branch add anything at first: outputs are the layer-normalised features."""
    for layer in transformer.layers:
        for end in (layer.self_attn.out_proj, layer.linear2):  # of attention, of feed-forward
            nn.init.zeros_(end.weight)
            nn.init.zeros_(end.bias)


# --- the encoders that the paper compares -------------------------------------------------------


def batch_norm(norm, x):
    """`norm(x)` of rows (S, C), none of them padding; training it needs two rows."""
    if norm.training and len(x) < 2:
        raise InputError(
            "this encoder's batch norm cannot train on one video per step; "
            "raise --batch_sz, or choose tca"
        )
    return norm(x)


def apply_to_valid_frames(function, x, num_frames):
    """Apply `function` (S, C) -> (S, C') to the S frames that are not padding: (N, T, C')."""
    N, T, _ = x.shape
    rows = valid_rows(num_frames, T).to(x.device, non_blocking=True)  # (S,)
    values = function(x.flatten(0, 1).index_select(0, rows))
    out = values.new_zeros(N * T, values.shape[1])
    return out.index_copy(0, rows, values).unflatten(0, (N, T))


class Encoder(nn.Module):
    """Base of the other encoders: a subclass computes `frame_outputs`, the rest is as in TCA."""

    flags = {}
    has_frame_descriptors = True
    forward = TCA.forward
    encode = TCA.encode
    encode_video_and_frames = TCA.encode_video_and_frames

    @property
    def descriptor_size(self) -> int:
        return self.output_dim


class VLAD(Encoder):
    """Base of NetVLAD and NeXtVLAD: sums of residuals to the cluster centres, then a gated layer.

    A subclass computes `cluster_sums(x, mask, num_frames)`, x (N, T, C) and its mask (N, T) ->
    (N, clusters, D'); `size` is D'. The rest is as released. There are no frame descriptors: under
    the name `encode` the released code returned the cluster sums.
    """

    flags = {name: name for name in ("num_clusters", "output_dim", "normalize_input", "dropout")}
    has_frame_descriptors = False

    def __init__(
        self, size, feature_size, num_clusters, output_dim, normalize_input, dropout, reduction
    ):
        super().__init__()
        if output_dim < reduction:
            raise InputError(
                f"--output_dim {output_dim} is too small to gate; choose {reduction} or more"
            )
        self.feature_size = feature_size
        self.num_clusters = num_clusters
        self.output_dim = output_dim
        self.normalize_input = normalize_input
        self.centroids = nn.Parameter(torch.rand(num_clusters, size))
        self.bn2 = nn.BatchNorm1d(num_clusters * size)
        self.drop = nn.Dropout(dropout)
        self.fc1 = nn.Linear(num_clusters * size, output_dim)
        self.bn3 = nn.BatchNorm1d(output_dim)
        self.fc2 = nn.Linear(output_dim, output_dim // reduction)
        self.bn4 = nn.BatchNorm1d(output_dim // reduction)
        self.fc3 = nn.Linear(output_dim // reduction, output_dim)

    def forward(self, x: Tensor, num_frames: Tensor) -> Tensor:
        """One L2-normalised descriptor per video: (N, output_dim)."""
        x, mask = trim_padding(x, num_frames)  # (N, T', C), (N, T')
        sums = self.cluster_sums(x, mask, num_frames)  # (N, clusters, D')
        vlad = F.normalize(sums, dim=2).flatten(1)  # (N, clusters*D'), L2 per cluster
        vlad = self.drop(batch_norm(self.bn2, vlad))
        out = batch_norm(self.bn3, self.fc1(vlad))  # (N, output_dim)
        # Context gating with a bottleneck (NeXtVLAD section 3.3).
        gates = F.relu(batch_norm(self.bn4, self.fc2(out)))
        gates = torch.sigmoid(self.fc3(gates))  # (N, output_dim)
        return F.normalize(out * gates, dim=1)

    def encode(self, x: Tensor, num_frames: Tensor) -> Tensor:
        raise InputError(
            f"{type(self).__name__} gives no frame descriptors; "
            "use a video-level metric (cosine, euclidean)"
        )

    encode_video_and_frames = encode

    def residuals(self, x, assignment):
        """Sums of assignment * (x - centroid) over the S rows of x: (N, clusters, D').

        x (N, S, D'), assignment (N, S, clusters).
        """
        return assignment.mT @ x - self.centroids * assignment.sum(1)[..., None]


class NetVLAD(VLAD):
    """Soft assignment of frames to learned centroids (Arandjelovic et al., CVPR 2016, equation 4).

    Parameters are named and shaped as in the released code: its checkpoints load, and give its
    descriptors in evaluation.
    """

    def __init__(
        self,
        feature_size: int = 1024,
        num_clusters: int = 256,
        output_dim: int = 1024,
        normalize_input: bool = False,  # L2 of every frame, after the batch norm
        dropout: float = 0.5,
        alpha: float = 1.0,
        gating_reduction: int = 8,
    ):
        settings = num_clusters, output_dim, normalize_input, dropout, gating_reduction
        super().__init__(feature_size, feature_size, *settings)
        self.bn1 = nn.BatchNorm1d(feature_size)
        self.conv = nn.Conv1d(feature_size, num_clusters, 1)
        if not self.centroids.is_meta:  # `_check_fit` needs the sizes alone
            with torch.no_grad():
                # As released. The paper's bias is -alpha |c|^2, which differs so much between
                # random centroids that one of them takes all frames.
                self.conv.weight.copy_(2 * alpha * self.centroids[..., None])
                self.conv.bias.copy_(-alpha * self.centroids.norm(dim=1))

    def cluster_sums(self, x, mask, num_frames):
        x = apply_to_valid_frames(lambda frames: batch_norm(self.bn1, frames), x, num_frames)
        if self.normalize_input:
            x = F.normalize(x, dim=2)
        # A convolution of width 1 is a linear layer.
        scores = F.linear(x, self.conv.weight[..., 0], self.conv.bias)  # (N, T, clusters)
        assignment = F.softmax(scores, dim=2) * mask[..., None]  # zero at padding
        return self.residuals(x, assignment)


class NeXtVLAD(VLAD):
    """NetVLAD in groups (Lin et al., ECCV Workshops 2018, section 3.2).

    Frames are widened and split into groups. Each group has a soft assignment and an attention of
    its own. Parameters are named and shaped as in the released code, so its checkpoints load.
    """

    def __init__(
        self,
        feature_size: int = 1024,
        num_clusters: int = 64,
        output_dim: int = 1024,
        normalize_input: bool = False,  # L2 of every frame
        dropout: float = 0.5,
        expansion: int = 2,  # how many times frames are widened
        groups: int = 8,  # G; as released, channel c belongs to group c mod G
        gating_reduction: int = 8,
    ):
        wide = feature_size * expansion
        if wide % groups:
            raise InputError(
                f"{feature_size} channels, widened to {wide}, cannot be split into {groups} groups;"
                " choose tca"
            )
        settings = num_clusters, output_dim, normalize_input, dropout, gating_reduction
        super().__init__(wide // groups, feature_size, *settings)
        self.groups = groups
        self.conv1 = nn.Conv1d(feature_size, wide, 1)
        self.conv2 = nn.Conv1d(wide, groups, 1)
        self.conv3 = nn.Conv1d(wide, num_clusters * groups, 1, bias=False)
        self.bn1 = nn.BatchNorm1d(num_clusters * groups)

    def cluster_sums(self, x, mask, num_frames):
        def scores(frames):  # (S, wide) -> (S, clusters*G)
            return batch_norm(self.bn1, F.linear(frames, self.conv3.weight[..., 0]))

        if self.normalize_input:
            x = F.normalize(x, dim=2)
        x = F.linear(x, self.conv1.weight[..., 0], self.conv1.bias)  # (N, T, wide)
        attention = torch.sigmoid(F.linear(x, self.conv2.weight[..., 0], self.conv2.bias))
        attention = attention * mask[..., None]  # (N, T, G)
        assignment = apply_to_valid_frames(scores, x, num_frames)  # (N, T, clusters*G)
        assignment = assignment.unflatten(2, (self.num_clusters, self.groups))
        assignment = F.softmax(assignment, dim=2) * attention[:, :, None]  # (N, T, clusters, G)
        # Every group of a frame is a row of its own.
        assignment = assignment.transpose(2, 3).flatten(1, 2)  # (N, T*G, clusters)
        x = x.unflatten(2, (-1, self.groups)).transpose(2, 3).flatten(1, 2)  # (N, T*G, D')
        return self.residuals(x, assignment)


class Recurrent(Encoder):
    """Base of LSTM and GRU: batch norm of the channels, then the network over the frames in order.

    `output_dim` is the hidden size; released checkpoints have 1024.
    """

    flags = {"output_dim": "output_dim", "nlayers": "num_layers", "dropout": "dropout"}
    network: type

    def __init__(
        self,
        feature_size: int = 1024,
        output_dim: int = 1024,
        nlayers: int = 2,
        dropout: float = 0.2,
    ):
        super().__init__()
        self.feature_size = feature_size
        self.output_dim = output_dim
        self.bn1 = nn.BatchNorm1d(feature_size)
        dropout = dropout if nlayers > 1 else 0.0  # it acts between layers
        network = self.network(feature_size, output_dim, nlayers, batch_first=True, dropout=dropout)
        # Registered by its own name, LSTM or GRU, as in the released code.
        self.add_module(self.network.__name__, network)

    def frame_outputs(self, x: Tensor, num_frames: Tensor) -> Tensor:
        """The network's outputs (N, T', D), zero at padding."""
        x, _ = trim_padding(x, num_frames)  # (N, T', C)
        x = apply_to_valid_frames(lambda frames: batch_norm(self.bn1, frames), x, num_frames)
        # Packed sequences end where the videos end; PyTorch wants the lengths on the CPU.
        packed = nn.utils.rnn.pack_padded_sequence(
            x, num_frames.cpu(), batch_first=True, enforce_sorted=False
        )
        out, _ = getattr(self, self.network.__name__)(packed)
        out, _ = nn.utils.rnn.pad_packed_sequence(out, batch_first=True)
        return out


class LSTM(Recurrent):
    """Long short-term memory (Hochreiter and Schmidhuber, Neural Computation 1997)."""

    network = nn.LSTM


class GRU(Recurrent):
    """Gated recurrent units (Cho et al., EMNLP 2014)."""

    network = nn.GRU


class Mean(Encoder):
    """No parameters: the mean of the frame features, the untrained row of every table."""

    def __init__(self, feature_size: int = 1024):
        super().__init__()
        self.feature_size = feature_size

    @property
    def descriptor_size(self) -> int:
        return self.feature_size

    def frame_outputs(self, x: Tensor, num_frames: Tensor) -> Tensor:
        """The frames as they are (N, T', C), zero at padding."""
        x, _ = trim_padding(x, num_frames)
        return x


ENCODERS = {
    "tca": TCA,
    "netvlad": NetVLAD,
    "nextvlad": NeXtVLAD,
    "lstm": LSTM,
    "gru": GRU,
    "mean": Mean,
}


def encoder_arguments(name: str, feature_size: int, args) -> dict:
    """Constructor arguments of ENCODERS[name] by parsed flags, as plain values.

    A flag that is None, or that `args` lacks, leaves the constructor's default.
    """
    parameters = inspect.signature(ENCODERS[name]).parameters
    arguments = {argument: parameter.default for argument, parameter in parameters.items()}
    arguments["feature_size"] = feature_size
    for argument, flag in ENCODERS[name].flags.items():
        value = getattr(args, flag, None)
        if value is not None:
            arguments[argument] = value
    return arguments


# --- momentum contrast --------------------------------------------------------------------------


class MoCo(nn.Module):
    """Momentum contrast (He et al., CVPR 2020) with labelled positives (TCA section 3.3).

    q = encoder_q(anchor), keys p = encoder_k(positive) and n = encoder_k(negative), without
    gradient. The logits are [q.p, q.queue] / T. Then the n of all processes enter the queue (the
    bank of negatives), which keeps the newest K.
    """

    def __init__(
        self,
        encoder: nn.Module,
        dim: int = 1024,  # D
        K: int = 4096,  # keys in the queue; 0: the step's own negatives take its place
        m: float = 0.0,  # momentum of the key encoder; 0: it equals the query encoder
        T: float = 1.0,  # temperature
        # gather concatenates a tensor over all processes
        gather: Callable[[Tensor], Tensor] = lambda tensor: tensor,
        amp: torch.dtype | None = None,  # autocast dtype of the encoders; logits stay float32
    ):
        super().__init__()
        self.K, self.m, self.T = K, m, T
        self.gather, self.amp = gather, amp
        self.encoder_q = encoder
        self.encoder_k = copy.deepcopy(encoder).requires_grad_(False)
        # The queue is a ring of keys (D, K), random at first. Each key has its negative's id (-1 at
        # first) and an age in steps. The pointer is where the next is written.
        self.register_buffer("queue", F.normalize(torch.randn(dim, K), dim=0))
        self.register_buffer("queue_ids", torch.full((K,), -1))
        self.register_buffer("queue_age", torch.zeros(K, dtype=torch.long))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))

    def forward(
        self,
        anchors: tuple[Tensor, Tensor],  # (x, num_frames), x (N, T, C) or packed (sum T, C)
        positives: tuple[Tensor, Tensor],  # the same, of N videos
        negatives: tuple[Tensor, Tensor],  # the same, of N*M videos
        negative_ids: Tensor | None = None,  # (N*M,) int64
        is_false_negative: Callable[[Tensor], Tensor] | None = None,  # ids (K,) -> (N, K) bool
    ) -> tuple[Tensor, Tensor]:
        """Logits (N, 1+K), the positive first, and labels (N,), all 0.

        `is_false_negative` is true where a key shows the anchor's own material. Those logits are
        -inf, which every loss leaves out.
        """
        q = self.encode(self.encoder_q, *anchors)  # (N, D)
        with torch.no_grad():  # keys have no gradient
            self.update_key_encoder()
            p = self.encode(self.encoder_k, *positives)  # (N, D)
            n = self.encode(self.encoder_k, *negatives)  # (N*M, D)
            if negative_ids is None:
                negative_ids = torch.full((len(n),), -1, device=n.device)
            n, ids = self.gather(n), self.gather(negative_ids)  # those of all processes

        if self.K:
            # Copies: `enqueue` overwrites the queue, and autograd needs what was multiplied.
            keys, key_ids = self.queue.clone(), self.queue_ids.clone()  # (D, K), (K,)
        else:
            keys, key_ids = n.T, ids  # K is then the negatives of all processes
        positive = (q * p).sum(1, keepdim=True)  # (N, 1)
        negative = q @ keys.to(q.dtype)  # (N, K)
        if is_false_negative is not None:
            negative = negative.masked_fill(is_false_negative(key_ids), -torch.inf)
        logits = torch.cat([positive, negative], 1) / self.T  # (N, 1+K)
        labels = torch.zeros(len(q), dtype=torch.long, device=q.device)

        if self.K:
            self.enqueue(n, ids)  # after the logits: a step does not see its own negatives
        return logits, labels

    @torch.no_grad()
    def update_key_encoder(self) -> None:
        """k <- m k + (1 - m) q, batch statistics included."""
        query, key = self.encoder_q.state_dict(), self.encoder_k.state_dict()
        for name, value in key.items():
            if value.is_floating_point() and self.m:
                value.mul_(self.m).add_(query[name], alpha=1 - self.m)
            else:  # m = 0, or a count of batches
                value.copy_(query[name])

    @torch.no_grad()
    def enqueue(self, keys: Tensor, ids: Tensor) -> None:
        """Write keys (n, D) and ids (n,) at the pointer; if n > K, only the last K are written."""
        # The pointer stays on the device: reading it would wait for a GPU.
        start = self.queue_ptr + max(len(keys) - self.K, 0)  # (1,)
        keys, ids = keys[-self.K :], ids[-self.K :]
        slots = (start + torch.arange(len(keys), device=keys.device)) % self.K  # the ring
        self.queue[:, slots] = keys.T.to(self.queue.dtype)
        self.queue_ids[slots] = ids
        self.queue_age += 1
        self.queue_age.index_fill_(0, slots, 0)
        self.queue_ptr.copy_((start + len(keys)) % self.K)

    def encode(self, encoder: nn.Module, x: Tensor, num_frames: Tensor) -> Tensor:
        """Video descriptors (N, D) in float32, computed under autocast where `amp` is set."""
        with torch.autocast(x.device.type, dtype=self.amp, enabled=self.amp is not None):
            return encode_by_length(encoder, x, num_frames).float()


MAX_FEATURE_SIZE = 1 << 20  # the largest size in a model file that is built: the paper's is 1024

# --- model files --------------------------------------------------------------------------------


def model_file(path: str | Path) -> Path:
    """The file that a model path names: model.pth of a run's folder, or the file itself."""
    path = require_path(path, "model path")
    return path / "model.pth" if path.is_dir() else path


def load_encoder(path: str | Path, nhead: int = 8) -> tuple[str, nn.Module, dict]:
    """Load the encoder of a run's folder, of a model file, or of a bare state dict.

    Returns:
        Its name in ENCODERS, the encoder in eval mode, and the file's description of the features
        that it was trained on (empty for a bare state dict).
    """
    file = model_file(path)
    state = load_torch(file)
    encoder = build_encoder(state, f"model file {str(file)!r}", nhead)
    names = {kind: name for name, kind in ENCODERS.items()}
    features = state.get("features") or {}
    if not isinstance(features, dict):
        raise InputError(f"model file {str(file)!r}: its features are not named; save it again")
    return names[type(encoder)], encoder, features


def build_encoder(state, source: str, nhead: int = 8) -> nn.Module:
    """Build the encoder of a loaded file, in eval mode.

    Args:
        state: what `torch.load` returned: a model.pth or checkpoint.pth of train.py, or a bare
            state dict of a TCA or of a MoCo around one.
        source: the file's name, for messages.
        nhead: attention heads of a bare state dict, which does not store their number.

    Raises:
        InputError: the file is of another kind, or its tensors do not fit.
    """
    if not isinstance(state, dict) or not state:
        raise InputError(
            f"{source} does not hold a model; pass a run's folder, its model.pth,"
            " or a saved state dict"
        )
    if isinstance(name := state.get("encoder"), str):
        # Written by train.py.
        if name not in ENCODERS:
            raise InputError(
                f"{source} holds a {name[:40]!r} encoder, which this code does not have; it has"
                f" {', '.join(ENCODERS)}"
            )
        try:
            kind, arguments = ENCODERS[name], dict(state["arguments"])
            tensors = state["state_dict"] if "state_dict" in state else _encoder_q(state["moco"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(
                f"{source} lacks what rebuilds its encoder: {error!r}; save it again"
            ) from None
    else:
        # A bare state dict, perhaps of a model inside DataParallel.
        tensors = {str(key).removeprefix("module."): value for key, value in state.items()}
        tensors = _encoder_q(tensors)
        kind, arguments = TCA, _tca_arguments(tensors, source, nhead)
    _check_fit(kind, arguments, tensors, source)
    encoder = kind(**arguments)
    encoder.load_state_dict(tensors)
    return encoder.eval()


def _check_fit(kind, arguments, tensors, source):
    """Raise InputError unless an encoder of these arguments has these tensors. It takes no memory.

    What a file declares (a billion layers) is built only if the file holds its tensors.
    """
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) and not value.is_complex()
        for name, value in tensors.items()
    ):
        raise InputError(f"{source}: its weights are not named tensors; save it again")
    parameters = inspect.signature(kind).parameters
    for name, value in arguments.items():
        limit = len(tensors) if "layers" in str(name) else MAX_FEATURE_SIZE
        default = parameters[name].default if name in parameters else value
        kinds = (int, float) if isinstance(default, float) else type(default)
        if not isinstance(value, kinds) or (isinstance(value, int) and value > limit):
            raise InputError(f"{source}: {name} {str(value)[:40]!r} cannot be; save it again")
    try:
        with torch.device("meta"):
            kind(**arguments).load_state_dict(tensors, assign=True)
    except (TypeError, ValueError, AssertionError, ArithmeticError, IndexError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{source} lacks what rebuilds its encoder: {reason}; save it again"
        ) from None
    except RuntimeError as error:
        # PyTorch's message is a headline, then a line for each kind of misfit.
        lines = [line.strip()[:200] for line in str(error).splitlines()]
        reasons = "; ".join(lines[1:3] or lines)
        raise InputError(f"{source} does not fit its encoder: {reasons}") from None


def _encoder_q(tensors):
    """The state dict of `encoder_q` within that of a MoCo; any other state dict as it is."""
    prefix = "encoder_q."
    found = {}
    for key, value in tensors.items():
        if key.startswith(prefix):
            found[key.removeprefix(prefix)] = value
    return found or tensors


def _tca_arguments(tensors, source, nhead):
    """The arguments of a TCA of the sizes that a state dict's tensors have."""
    prefix = "transformer_encoder.layers."
    try:  # the sizes are those of the first layer
        feature_size = tensors[f"{prefix}0.self_attn.in_proj_weight"].shape[1]
        dim_feedforward = tensors[f"{prefix}0.linear1.weight"].shape[0]
    except (KeyError, AttributeError, IndexError):
        some = ", ".join(repr(key[:60]) for key in list(tensors)[:3])
        raise InputError(
            f"{source} is not a TCA model (its first keys: {some}); pass the encoder's state dict"
        ) from None
    layers = {key.removeprefix(prefix).split(".")[0] for key in tensors if key.startswith(prefix)}
    return {
        "feature_size": feature_size,
        "nhead": nhead,
        "nlayers": len(layers),
        "dim_feedforward": dim_feedforward,
    }
