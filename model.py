"""Video encoders and momentum contrast.

N videos in a batch, T frames (padded), C channels of a frame feature, D descriptor size, K queue size. A batch is `x (N, T, C)`
with `num_frames (N,) int64`; frames at or past `num_frames[i]` are padding and change nothing.
"""

import copy

import torch
import torch.nn.functional as F
from torch import nn

from utils import InputError


def frame_mask(num_frames, T):
    """(N, T) bool: true for the real frames."""
    return torch.arange(T, device=num_frames.device) < num_frames[:, None]


class Encoder(nn.Module):
    """Base of the encoders: a subclass gives `frames`, which turns x (N, T, C) into outputs (N, T, D)."""

    feature_size: int

    @property
    def descriptor_size(self):
        return self.feature_size

    def frames(self, x, real):
        """x (N, T, C), real (N, T) bool -> (N, T, D), anything at padding."""
        raise InputError(f"{type(self).__name__} gives no frame descriptors; use a video-level metric (cosine, euclidean)")

    def _outputs(self, x, num_frames):
        """Encoder outputs without the batch's needless padding: (N, max num_frames, D), zero at padding."""
        longest = int(num_frames.max())
        real = frame_mask(num_frames, longest)  # (N, T')
        x = x[:, :longest].masked_fill(~real[..., None], 0.0)  # a weight of 0 times NaN would be NaN
        return self.frames(x, real).masked_fill(~real[..., None], 0.0)

    def forward(self, x, num_frames):
        """One L2-normalised descriptor a video (N, D): the mean of its frames' outputs (TCA section 3.2)."""
        total = self._outputs(x, num_frames).sum(1)  # (N, D)
        return F.normalize(total / num_frames[:, None], dim=1)

    def encode(self, x, num_frames):
        """L2-normalised frame descriptors (N, T, D), zero past `num_frames`."""
        out = F.normalize(self._outputs(x, num_frames), dim=2)
        return F.pad(out, (0, 0, 0, x.shape[1] - out.shape[1]))


class Mean(Encoder):
    """No parameters: the mean of the frame features. The untrained row of every table."""

    def __init__(self, feature_size=1024):
        super().__init__()
        self.feature_size = feature_size

    def frames(self, x, real):
        return x


class TCA(Encoder):
    """Temporal Context Aggregation: self-attention over a video's frames, no positional encoding (TCA section 3.2).

    Parameters are named as in the released model, so its checkpoints load. `init="paper"` is PyTorch's own initialisation;
    `init="near_identity"` zeroes what each residual branch adds, so training starts from layer-normalised features.
    """

    def __init__(self, feature_size=1024, nhead=8, nlayers=1, dim_feedforward=2048, dropout=0.2, init="paper"):
        super().__init__()
        if feature_size % nhead:
            raise InputError(
                f"{feature_size} channels cannot be split over {nhead} attention heads; choose --nhead to divide it"
            )
        self.feature_size = feature_size
        layer = nn.TransformerEncoderLayer(feature_size, nhead, dim_feedforward, dropout, batch_first=True)
        # Nested tensors would drop trailing padding by a second code path; `_outputs` has trimmed it already.
        self.transformer_encoder = nn.TransformerEncoder(layer, nlayers, enable_nested_tensor=False)
        if init == "near_identity":
            for layer in self.transformer_encoder.layers:
                for branch_end in (layer.self_attn.out_proj, layer.linear2):
                    nn.init.zeros_(branch_end.weight)
                    nn.init.zeros_(branch_end.bias)

    def frames(self, x, real):
        return self.transformer_encoder(x, src_key_padding_mask=None if real.all() else ~real)


ENCODERS = {"tca": TCA, "mean": Mean}


def build_encoder(state, source, nhead=8):
    """The encoder of a loaded file, in eval mode: a `model.pth` or `checkpoint.pth` of train.py, or a bare TCA state dict.

    state: what `torch.load` gave; source: the file's name, for messages. A bare state dict does not tell its number of heads:
    `nhead` does. Raises InputError when the file is of another kind or its weights do not fit.
    """
    if not isinstance(state, dict) or not state:
        raise InputError(f"{source} holds no model; pass a run's folder, its model.pth, or a saved state dict")
    if isinstance(state.get("encoder"), str) and state["encoder"] in ENCODERS:
        try:
            encoder = ENCODERS[state["encoder"]](**state["arguments"])
            weights = state["state_dict"] if "state_dict" in state else _query_encoder(state["moco"])
        except (KeyError, TypeError) as error:
            raise InputError(f"{source} lacks what rebuilds its encoder: {error!r}; save it again") from None
    else:
        weights = _query_encoder({str(key).removeprefix("module."): value for key, value in state.items()})
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
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)} or state


def _tca_of(weights, source, nhead):
    """An untrained TCA of the widths that a state dict's tensors have."""
    prefix = "transformer_encoder.layers."
    try:
        feature_size = weights[f"{prefix}0.self_attn.in_proj_weight"].shape[1]
        dim_feedforward = weights[f"{prefix}0.linear1.weight"].shape[0]
    except (KeyError, AttributeError, IndexError):
        some = ", ".join(map(str, list(weights)[:3]))
        raise InputError(f"{source} is no TCA model (its first keys: {some}); pass the encoder's state dict") from None
    nlayers = len({key.removeprefix(prefix).split(".")[0] for key in weights if key.startswith(prefix)})
    return TCA(feature_size, nhead, nlayers, dim_feedforward)


class MoCo(nn.Module):
    """Momentum contrast (He et al., CVPR 2020) with given positives and a bank of negatives (TCA section 3.3).

    q = encoder_q(anchor); keys p = encoder_k(positive), n = encoder_k(negative), without gradient;
    logits = [q.p, q.queue] / T; afterwards the n of all processes enter the queue, a ring that keeps the newest K.
    `K=0` keeps no bank: the negatives of the step itself take its place. `gather` joins tensors (n, ...) over processes.

    Buffers: `queue (D, K)`, `queue_ids (K,)` (the negatives' numbers, -1 for the random start), `queue_ptr (1,)`.
    """

    def __init__(self, encoder, dim=1024, K=4096, m=0.0, T=1.0, gather=lambda tensor: tensor):
        super().__init__()
        self.K, self.m, self.T, self.gather = K, m, T, gather
        self.encoder_q = encoder
        self.encoder_k = copy.deepcopy(encoder).requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(dim, K), dim=0))  # (D, K)
        self.register_buffer("queue_ids", torch.full((K,), -1))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))

    @torch.no_grad()
    def update_key_encoder(self):
        """k <- m k + (1 - m) q, buffers (batch statistics) included."""
        query, key = self.encoder_q.state_dict(), self.encoder_k.state_dict()
        for name, value in key.items():
            if value.is_floating_point():
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
        self.queue_ptr[0] = (start + len(keys)) % self.K

    def forward(self, anchors, positives, negatives, negative_ids=None, shares=None):
        """Logits (N, 1+K) and labels (N,), all 0: the positive is the first column.

        anchors, positives: (x (N, T, C), num_frames (N,)); negatives: the same of M videos; T may differ between the three.
        negative_ids (M,) int64 numbers the negatives; shares(bank_ids (K,)) -> (N, K) bool, true where a bank entry shares
        material with an anchor: those logits are -inf, which every loss leaves out.
        """
        q = self.encoder_q(*anchors)  # (N, D)
        with torch.no_grad():
            self.update_key_encoder()
            p = self.encoder_k(*positives)  # (N, D)
            n = self.gather(encode_by_length(self.encoder_k, *negatives))  # (M of all processes, D)
            if negative_ids is None:
                negative_ids = torch.full((len(negatives[0]),), -1, device=n.device)
            ids = self.gather(negative_ids)
        bank, bank_ids = (self.queue.clone(), self.queue_ids.clone()) if self.K else (n.T, ids)  # (D, K), (K,)
        positive = (q * p).sum(1, keepdim=True)  # (N, 1)
        negative = q @ bank.to(q.dtype)  # (N, K)
        if shares is not None:
            negative = negative.masked_fill(shares(bank_ids), -torch.inf)
        if self.K:
            self.enqueue(n, ids)
        logits = torch.cat([positive, negative], 1) / self.T  # (N, 1+K)
        return logits, torch.zeros(len(q), dtype=torch.long, device=q.device)


def length_batches(lengths, frames=8192, slack=1.25):
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
    """`encoder(x, num_frames)` (N, D), computed in `length_batches`; for where no gradient is wanted."""
    batches = list(length_batches(num_frames.tolist()))
    parts = [encoder(x[batch], num_frames[batch]) for batch in batches]
    back = torch.tensor([i for batch in batches for i in batch], device=x.device).argsort()
    return torch.cat(parts)[back]
