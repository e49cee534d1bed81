"""Video encoders and momentum contrast.

N videos in a batch, T frames (padded), C channels of a frame feature, D descriptor size, K queue size. A batch is `x (N, T, C)`
with `num_frames (N,) int64`; frames at or past `num_frames[i]` are padding and change nothing.
"""

import copy
import inspect

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from utils import InputError, load_torch, require_path


def frame_mask(num_frames, T):
    """(N, T) bool: true for the real frames."""
    return torch.arange(T, device=num_frames.device) < num_frames[:, None]


class Encoder(nn.Module):
    """Base of the encoders: a subclass gives `frames`, which turns x (N, T, C) into outputs (N, T, D).

    flags: {argument of the constructor: command-line flag that sets it}.
    """

    flags = {}
    feature_size: int

    @classmethod
    def arguments(cls, feature_size, args):
        """What rebuilds the encoder that parsed flags describe: `cls(**arguments)`, plain values.

        Where a flag is None, or `args` lacks it, the constructor's own default stands.
        """
        defaults = {
            name: parameter.default for name, parameter in inspect.signature(cls).parameters.items()
        }
        given = {argument: getattr(args, flag, None) for argument, flag in cls.flags.items()}
        return (
            defaults
            | {"feature_size": feature_size}
            | {name: value for name, value in given.items() if value is not None}
        )

    @property
    def descriptor_size(self):
        return self.feature_size

    def frames(self, x, real):
        """x (N, T, C), zero at padding, real (N, T) bool -> (N, T, D), anything at padding."""
        raise InputError(
            f"{type(self).__name__} gives no frame descriptors; use a video-level metric (cosine, euclidean)"
        )

    def _trim(self, x, num_frames):
        """x and its mask `real` without the batch's needless padding: (N, T', C), zero at padding, and (N, T') bool."""
        longest = int(num_frames.max())
        real = frame_mask(num_frames, longest)
        return x[:, :longest].masked_fill(
            ~real[..., None], 0.0
        ), real  # a weight of 0 times NaN would be NaN

    def _outputs(self, x, num_frames):
        """Encoder outputs without the batch's needless padding: (N, max num_frames, D), zero at padding."""
        x, real = self._trim(x, num_frames)
        return self.frames(x, real).masked_fill(~real[..., None], 0.0)

    def forward(self, x, num_frames):
        """One L2-normalised descriptor a video (N, D): the mean of its frames' outputs (TCA section 3.2)."""
        return self._video(self._outputs(x, num_frames), num_frames)

    def encode(self, x, num_frames):
        """L2-normalised frame descriptors (N, T, D), zero past `num_frames`."""
        return self._each(self._outputs(x, num_frames), x.shape[1])

    def encode_video_and_frames(self, x, num_frames):
        """What `forward` and `encode` give, (N, D) and (N, T, D), from one pass."""
        out = self._outputs(x, num_frames)
        return self._video(out, num_frames), self._each(out, x.shape[1])

    def _video(self, out, num_frames):
        return F.normalize(out.sum(1) / num_frames[:, None], dim=1)

    def _each(self, out, T):
        return F.pad(F.normalize(out, dim=2), (0, 0, 0, T - out.shape[1]))


class Mean(Encoder):
    """No parameters: the mean of the frame features. The untrained row of every table."""

    def __init__(self, feature_size=1024):
        super().__init__()
        self.feature_size = feature_size

    def frames(self, x, real):
        return x


class Layer(nn.TransformerEncoderLayer):
    """PyTorch's encoder layer, with queries, keys and values laid out per head before they are multiplied.

    As PyTorch leaves them, interleaved, a frozen encoder's products under dropout in bfloat16 first copy them value by value:
    on a CPU thirty times slower than float32's. Names and arithmetic are PyTorch's.
    """

    def _sa_block(self, x, attn_mask, key_padding_mask, is_causal=False):
        attention = self.self_attn
        qkv = F.linear(x, attention.in_proj_weight, attention.in_proj_bias)  # (N, T, 3D)
        q, k, v = (
            qkv.unflatten(2, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4).contiguous()
        )  # (N, heads, T, D/heads)
        mask = None if key_padding_mask is None else key_padding_mask[:, None, None].to(q.dtype)
        mask = None if mask is None else mask.expand(-1, -1, x.shape[1], -1)
        out = F.scaled_dot_product_attention(
            q, k, v, mask, attention.dropout if self.training else 0.0
        )
        return self.dropout1(attention.out_proj(out.transpose(1, 2).flatten(2)))


class TCA(Encoder):
    """Temporal Context Aggregation: self-attention over a video's frames, no positional encoding (TCA section 3.2).

    Parameters are named as in the released model, so its checkpoints load. `init="paper"` is PyTorch's own initialisation;
    `init="near_identity"` zeroes what each residual branch adds, so training starts from layer-normalised features.
    """

    flags = {
        "nhead": "nhead",
        "nlayers": "num_layers",
        "dim_feedforward": "dim_feedforward",
        "dropout": "dropout",
        "init": "init",
    }

    def __init__(
        self, feature_size=1024, nhead=8, nlayers=1, dim_feedforward=2048, dropout=0.2, init="paper"
    ):
        super().__init__()
        if feature_size % nhead:
            raise InputError(
                f"{feature_size} channels cannot be split over {nhead} attention heads; choose --nhead to divide it"
            )
        self.feature_size = feature_size
        layer = Layer(feature_size, nhead, dim_feedforward, dropout, batch_first=True)
        # Nested tensors would drop trailing padding by a second code path; `_outputs` has trimmed it already.
        self.transformer_encoder = nn.TransformerEncoder(layer, nlayers, enable_nested_tensor=False)
        if init == "near_identity":
            for layer in self.transformer_encoder.layers:
                for branch_end in (layer.self_attn.out_proj, layer.linear2):
                    nn.init.zeros_(branch_end.weight)
                    nn.init.zeros_(branch_end.bias)

    def frames(self, x, real):
        return self.transformer_encoder(x, src_key_padding_mask=None if real.all() else ~real)


def batch_norm(norm, x):
    """`norm(x)` of x (S, C), whose rows are all real: padding enters no statistics."""
    if norm.training and len(x) < 2:
        raise InputError(
            "this encoder's batch norm cannot train on one video a step; raise --batch_sz, or choose tca"
        )
    return norm(x)


def apply_to_valid_frames(function, x, real):
    """`function` of the real frames (S, C) alone, put back where they stood: (N, T, C'), zero at padding."""
    values = function(x[real])
    out = values.new_zeros(*real.shape, values.shape[1])
    out[real] = values
    return out


class VLAD(Encoder):
    """Base of the VLAD encoders: a subclass gives `residuals(x, real)`, which turns x (N, T, C), zero at padding, and real
    (N, T) bool into the cluster sums (N, K clusters, D').

    Then, as the released code: L2 per cluster, batch norm and dropout over all of them, a linear layer to `output_dim`, and a
    gate on each of its outputs (context gating with a bottleneck, as NeXtVLAD section 3.3). No frame descriptors: the released
    `encode` gave the K cluster sums under that name.
    """

    flags = {name: name for name in ("num_clusters", "output_dim", "normalize_input", "dropout")}

    def __init__(
        self,
        width,
        feature_size,
        num_clusters,
        output_dim,
        normalize_input,
        dropout,
        gating_reduction,
    ):
        super().__init__()
        if output_dim < gating_reduction:
            raise InputError(
                f"--output_dim {output_dim} is too small to gate; choose {gating_reduction} or more"
            )
        self.feature_size, self.num_clusters, self.output_dim = (
            feature_size,
            num_clusters,
            output_dim,
        )
        self.normalize_input = normalize_input
        self.centroids = nn.Parameter(torch.rand(num_clusters, width))
        self.bn2 = nn.BatchNorm1d(num_clusters * width)
        self.drop = nn.Dropout(dropout)
        self.fc1 = nn.Linear(num_clusters * width, output_dim)
        self.bn3 = nn.BatchNorm1d(output_dim)
        self.fc2 = nn.Linear(output_dim, output_dim // gating_reduction)
        self.bn4 = nn.BatchNorm1d(output_dim // gating_reduction)
        self.fc3 = nn.Linear(output_dim // gating_reduction, output_dim)

    @property
    def descriptor_size(self):
        return self.output_dim

    def forward(self, x, num_frames):
        """One L2-normalised descriptor a video (N, output_dim)."""
        vlad = F.normalize(self.residuals(*self._trim(x, num_frames)), dim=2).flatten(
            1
        )  # (N, K*D')
        out = batch_norm(self.bn3, self.fc1(self.drop(batch_norm(self.bn2, vlad))))
        gates = torch.sigmoid(self.fc3(F.relu(batch_norm(self.bn4, self.fc2(out)))))
        return F.normalize(out * gates, dim=1)


class NetVLAD(VLAD):
    """Soft-assigned residuals to learned centroids (Arandjelovic et al., CVPR 2016, equation 4), gated as in `VLAD`.

    Parameters are named and shaped as in the released code, so its checkpoints load, and give its descriptors in evaluation.
    normalize_input: L2 of every frame, after the batch norm of its channels.
    """

    def __init__(
        self, feature_size=1024, num_clusters=256, output_dim=1024, normalize_input=False, dropout=0.5, alpha=1.0,
        gating_reduction=8,
    ):  # fmt: skip
        super().__init__(
            feature_size,
            feature_size,
            num_clusters,
            output_dim,
            normalize_input,
            dropout,
            gating_reduction,
        )
        self.bn1 = nn.BatchNorm1d(feature_size)
        self.conv = nn.Conv1d(feature_size, num_clusters, 1)
        with torch.no_grad():
            # As released. The paper's bias is -alpha |c|^2: between random centroids it differs so much that one takes all.
            self.conv.weight.copy_(2 * alpha * self.centroids[..., None])
            self.conv.bias.copy_(-alpha * self.centroids.norm(dim=1))

    def residuals(self, x, real):
        x = apply_to_valid_frames(lambda frames: batch_norm(self.bn1, frames), x, real)
        if self.normalize_input:
            x = F.normalize(x, dim=2)
        assigned = (
            F.softmax(F.linear(x, self.conv.weight[..., 0], self.conv.bias), dim=2)
            * real[..., None]
        )  # (N, T, K)
        return assigned.mT @ x - self.centroids * assigned.sum(1)[..., None]  # (N, K, C)


class NeXtVLAD(VLAD):
    """NetVLAD in groups: frames are widened `expansion` times and split into `groups`, each soft-assigned on its own under an
    attention of its own (Lin et al., ECCV Workshops 2018, section 3.2), gated as in `VLAD`.

    Parameters are named and shaped as in the released code, so its checkpoints load; as there, channel c is of group
    c mod `groups`. normalize_input: L2 of every frame.
    """

    def __init__(
        self, feature_size=1024, num_clusters=64, output_dim=1024, normalize_input=False, dropout=0.5, expansion=2, groups=8,
        gating_reduction=8,
    ):  # fmt: skip
        wide = feature_size * expansion
        if wide % groups:
            raise InputError(
                f"{feature_size} channels, widened to {wide}, cannot be split into {groups} groups; choose tca"
            )
        super().__init__(
            wide // groups,
            feature_size,
            num_clusters,
            output_dim,
            normalize_input,
            dropout,
            gating_reduction,
        )
        self.groups = groups
        self.conv1 = nn.Conv1d(feature_size, wide, 1)
        self.conv2 = nn.Conv1d(wide, groups, 1)
        self.conv3 = nn.Conv1d(wide, num_clusters * groups, 1, bias=False)
        self.bn1 = nn.BatchNorm1d(num_clusters * groups)

    def residuals(self, x, real):
        if self.normalize_input:
            x = F.normalize(x, dim=2)
        x = F.linear(x, self.conv1.weight[..., 0], self.conv1.bias)  # (N, T, wide)
        attention = (
            torch.sigmoid(F.linear(x, self.conv2.weight[..., 0], self.conv2.bias)) * real[..., None]
        )  # (N, T, G)
        activation = apply_to_valid_frames(
            lambda frames: batch_norm(self.bn1, F.linear(frames, self.conv3.weight[..., 0])),
            x,
            real,
        ).unflatten(2, (self.num_clusters, self.groups))  # (N, T, K, G)
        assigned = F.softmax(activation, dim=2) * attention[:, :, None]  # (N, T, K, G)
        assigned = assigned.transpose(2, 3).flatten(1, 2)  # (N, T*G, K)
        parts = x.unflatten(2, (-1, self.groups)).transpose(2, 3).flatten(1, 2)  # (N, T*G, D')
        return assigned.mT @ parts - self.centroids * assigned.sum(1)[..., None]  # (N, K, D')


class Recurrent(Encoder):
    """Base of the recurrent encoders: batch norm of the channels, then a recurrent network over the frames in their order.

    Its outputs are the frame descriptors, their mean the video's, as in the released code; its checkpoints load where
    `output_dim`, the hidden size, is its 1024. dropout: between layers.
    """

    flags = {"output_dim": "output_dim", "nlayers": "num_layers", "dropout": "dropout"}
    network: type

    def __init__(self, feature_size=1024, output_dim=1024, nlayers=2, dropout=0.2):
        super().__init__()
        self.feature_size, self.output_dim = feature_size, output_dim
        self.bn1 = nn.BatchNorm1d(feature_size)
        between = dropout if nlayers > 1 else 0.0
        # Registered under its own name, LSTM or GRU, as in the released code.
        self.add_module(
            self.network.__name__,
            self.network(feature_size, output_dim, nlayers, batch_first=True, dropout=between),
        )

    @property
    def descriptor_size(self):
        return self.output_dim

    def frames(self, x, real):
        x = apply_to_valid_frames(lambda frames: batch_norm(self.bn1, frames), x, real)
        packed = nn.utils.rnn.pack_padded_sequence(
            x, real.sum(1).cpu(), batch_first=True, enforce_sorted=False
        )
        out, _ = getattr(self, self.network.__name__)(packed)
        return nn.utils.rnn.pad_packed_sequence(out, batch_first=True)[0]  # (N, T, D)


class LSTM(Recurrent):
    """Long short-term memory (Hochreiter and Schmidhuber, Neural Computation 1997)."""

    network = nn.LSTM


class GRU(Recurrent):
    """Gated recurrent units (Cho et al., EMNLP 2014)."""

    network = nn.GRU


ENCODERS = {
    "tca": TCA,
    "netvlad": NetVLAD,
    "nextvlad": NeXtVLAD,
    "lstm": LSTM,
    "gru": GRU,
    "mean": Mean,
}


def model_file(path):
    """The file that a model path names: model.pth of a run's folder, or the file itself."""
    path = require_path(path, "model path")
    return path / "model.pth" if path.is_dir() else path


def load_encoder(path, nhead=8):
    """The encoder in `path`: a run's folder (its model.pth), a file in it, or a bare state dict.

    Returns (name, encoder in eval mode, what the file says of the features it was trained on).
    """
    file = model_file(path)
    state = load_torch(file)
    encoder = build_encoder(state, f"model file {str(file)!r}", nhead)
    name = next(name for name, kind in ENCODERS.items() if type(encoder) is kind)
    return name, encoder, state.get("features") or {}  # a bare state dict says nothing


def build_encoder(state, source, nhead=8):
    """The encoder of a loaded file, in eval mode: a `model.pth` or `checkpoint.pth` of train.py, or a bare TCA state dict.

    state: what `torch.load` gave; source: the file's name, for messages. A bare state dict does not tell its number of heads:
    `nhead` does. Raises InputError when the file is of another kind or its weights do not fit.
    """
    if not isinstance(state, dict) or not state:
        raise InputError(
            f"{source} holds no model; pass a run's folder, its model.pth, or a saved state dict"
        )
    if isinstance(state.get("encoder"), str) and state["encoder"] in ENCODERS:
        try:
            encoder = ENCODERS[state["encoder"]](**state["arguments"])
            weights = (
                state["state_dict"] if "state_dict" in state else _query_encoder(state["moco"])
            )
        except (KeyError, TypeError) as error:
            raise InputError(
                f"{source} lacks what rebuilds its encoder: {error!r}; save it again"
            ) from None
    else:
        weights = _query_encoder(
            {str(key).removeprefix("module."): value for key, value in state.items()}
        )
        encoder = _tca_of(weights, source, nhead)
    try:
        encoder.load_state_dict(weights)
    except RuntimeError as error:
        reason = "; ".join(line.strip() for line in str(error).splitlines()[1:3])
        raise InputError(f"{source} does not fit its encoder: {reason}") from None
    return encoder.eval()


def _query_encoder(state):
    """The weights of `encoder_q` where a MoCo state dict is given; any other state dict as it is."""
    prefix = "encoder_q."
    return {
        key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)
    } or state


def _tca_of(weights, source, nhead):
    """An untrained TCA of the widths that a state dict's tensors have."""
    prefix = "transformer_encoder.layers."
    try:
        feature_size = weights[f"{prefix}0.self_attn.in_proj_weight"].shape[1]
        dim_feedforward = weights[f"{prefix}0.linear1.weight"].shape[0]
    except (KeyError, AttributeError, IndexError):
        some = ", ".join(map(str, list(weights)[:3]))
        raise InputError(
            f"{source} is no TCA model (its first keys: {some}); pass the encoder's state dict"
        ) from None
    nlayers = len(
        {key.removeprefix(prefix).split(".")[0] for key in weights if key.startswith(prefix)}
    )
    return TCA(feature_size, nhead, nlayers, dim_feedforward)


class MoCo(nn.Module):
    """Momentum contrast (He et al., CVPR 2020) with given positives and a bank of negatives (TCA section 3.3).

    q = encoder_q(anchor); keys p = encoder_k(positive), n = encoder_k(negative), without gradient;
    logits = [q.p, q.queue] / T; afterwards the n of all processes enter the queue, a ring that keeps the newest K.
    `K=0` keeps no bank: the negatives of the step itself take its place. `gather` joins tensors (n, ...) over dist.
    `amp`: the type that the encoders run in under autocast (torch.bfloat16); similarities are float32 all the same.

    Buffers: `queue (D, K)`, `queue_ids (K,)` (the negatives' numbers, -1 for the random start), `queue_age (K,)` (steps since
    an entry came), `queue_ptr (1,)`.
    """

    def __init__(
        self, encoder, dim=1024, K=4096, m=0.0, T=1.0, gather=lambda tensor: tensor, amp=None
    ):
        super().__init__()
        self.K, self.m, self.T, self.gather, self.amp = K, m, T, gather, amp
        self.encoder_q = encoder
        self.encoder_k = copy.deepcopy(encoder).requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(dim, K), dim=0))  # (D, K)
        self.register_buffer("queue_ids", torch.full((K,), -1))
        self.register_buffer("queue_age", torch.zeros(K, dtype=torch.long))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))

    @torch.no_grad()
    def update_key_encoder(self):
        """k <- m k + (1 - m) q, buffers (batch statistics) included."""
        query, key = self.encoder_q.state_dict(), self.encoder_k.state_dict()
        for name, value in key.items():
            if value.is_floating_point() and self.m:
                value.mul_(self.m).add_(query[name], alpha=1 - self.m)
            else:
                value.copy_(query[name])

    @torch.no_grad()
    def enqueue(self, keys, ids):
        """Put keys (n, D) with their numbers (n,) into the ring at the pointer; of more than K, the newest K stay."""
        start = int(self.queue_ptr) + max(len(keys) - self.K, 0)
        keys, ids = keys[-self.K :], ids[-self.K :]
        slots = (start + torch.arange(len(keys), device=keys.device)) % self.K
        self.queue[:, slots] = keys.T.to(self.queue.dtype)
        self.queue_ids[slots] = ids
        self.queue_age += 1
        self.queue_age[slots] = 0
        self.queue_ptr[0] = (start + len(keys)) % self.K

    def describe(self, encoder, x, num_frames):
        """Descriptors (N, D) in float32, computed under autocast where `amp` asks for it."""
        with torch.autocast(x.device.type, dtype=self.amp, enabled=self.amp is not None):
            return encode_by_length(encoder, x, num_frames).float()

    def forward(self, anchors, positives, negatives, negative_ids=None, false_negative_mask=None):
        """Logits (N, 1+K) and labels (N,), all 0: the positive is the first column.

        anchors, positives: (x, num_frames (N,)), x padded (N, T, C) or packed (sum T, C); negatives: the same of M videos.
        negative_ids (M,) int64 numbers the negatives; false_negative_mask(bank_ids (K,)) -> (N, K) bool, true where a bank entry shares
        material with an anchor: those logits are -inf, which every loss leaves out.
        """
        q = self.describe(self.encoder_q, *anchors)  # (N, D)
        with torch.no_grad():
            self.update_key_encoder()
            p = self.describe(self.encoder_k, *positives)  # (N, D)
            n = self.gather(self.describe(self.encoder_k, *negatives))  # (M of all processes, D)
            if negative_ids is None:
                negative_ids = torch.full((len(negatives[1]),), -1, device=n.device)
            ids = self.gather(negative_ids)
        bank, bank_ids = (
            (self.queue.clone(), self.queue_ids.clone()) if self.K else (n.T, ids)
        )  # (D, K), (K,)
        positive = (q * p).sum(1, keepdim=True)  # (N, 1)
        negative = q @ bank.to(q.dtype)  # (N, K)
        if false_negative_mask is not None:
            negative = negative.masked_fill(false_negative_mask(bank_ids), -torch.inf)
        if self.K:
            self.enqueue(n, ids)
        logits = torch.cat([positive, negative], 1) / self.T  # (N, 1+K)
        return logits, torch.zeros(len(q), dtype=torch.long, device=q.device)


def bucket_by_length(lengths, frames=8192, slack=1.25):
    """Split videos into batches of like length: lists of indices, longest first.

    A batch holds at most `frames` frames with its padding (or one video), and its longest video is at most `slack` times its
    shortest, so that padding wastes little and memory stays bounded.
    """
    order, batch = sorted(range(len(lengths)), key=lambda i: -int(lengths[i])), []
    for i in order:
        longest = int(lengths[batch[0]]) if batch else 0
        if batch and ((len(batch) + 1) * longest > frames or int(lengths[i]) * slack < longest):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def encode_by_length(encoder, x, num_frames):
    """`encoder(x, num_frames)` (N, D), computed in `bucket_by_length`, so that little is padded; with gradient where wanted.

    x: padded (N, T, C), or packed (sum T, C), the videos' frames end to end in any floating type. An encoder that takes
    statistics of its batch (BatchNorm in training) gets the whole batch at once: parts of it would have others.
    """
    starts = (num_frames.cumsum(0) - num_frames).tolist()
    lengths = num_frames.tolist()
    whole = encoder.training and any(
        isinstance(module, nn.modules.batchnorm._BatchNorm) for module in encoder.modules()
    )
    batches = [list(range(len(lengths)))] if whole else list(bucket_by_length(lengths))
    parts = []
    for batch in batches:
        videos = (
            x[batch]
            if x.ndim == 3
            else [x[starts[i] : starts[i] + lengths[i]].float() for i in batch]
        )
        padded = (
            videos if x.ndim == 3 else nn.utils.rnn.pad_sequence(videos, batch_first=True)
        )  # (n, T, C)
        parts.append(encoder(padded, num_frames[batch]))
    back = torch.tensor([i for batch in batches for i in batch], device=x.device).argsort()
    return torch.cat(parts)[back]


def pad(videos):
    """A list of (T, C) arrays -> x (N, longest T, C) float32, num_frames (N,) int64."""
    num_frames = torch.tensor([len(video) for video in videos])
    x = np.zeros((len(videos), int(num_frames.max()), videos[0].shape[1]), np.float32)
    for row, video in zip(x, videos, strict=True):
        row[: len(video)] = video
    return torch.from_numpy(x), num_frames


def pack(videos):
    """A list of (T, C) arrays -> x (sum T, C) in their type, end to end without padding; num_frames (N,) int64."""
    return torch.from_numpy(np.concatenate(videos)), torch.tensor([len(video) for video in videos])
