"""The released code's way to train and to evaluate, as far as it decides the speed."""

import h5py
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.made_up import LONG
from losses import circle
from model import TCA, MoCo
from retrieval.encode import crop
from utils import seed_torch

# --- training -----------------------------------------------------------------------------------


class PlainStore(dict):
    """Video id -> (T, C), from one HDF5 dataset per video; each process opens the file itself."""

    def __init__(self, path):
        self.path, self.file = path, None
        with h5py.File(path) as file:
            super().__init__(dict.fromkeys(file))

    def __getitem__(self, video):
        if self.file is None:
            self.file = h5py.File(self.path)
        return self.file[video][:]


def pad_all(items):
    """Anchors, positives and negatives, each x (N, 300, C) and a padding mask (N, 300)."""
    _, anchors, positives, _, negatives = zip(*items, strict=True)
    batch = []
    for videos in (anchors, positives, [video for group in negatives for video in group]):
        x = torch.zeros(len(videos), LONG, videos[0].shape[1])
        padding = torch.ones(len(videos), LONG, dtype=torch.bool)
        for i, video in enumerate(videos):
            x[i, : len(video)] = torch.from_numpy(video)
            padding[i, : len(video)] = False
        batch.append((x, padding))
    return batch


class PlainModel(nn.Module):
    """An encoder layer, a masked mean, L2."""

    def __init__(self, channels, dropout):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(channels, 8, 2048, dropout, batch_first=True)

    def forward(self, x, padding):
        out = self.layer(x, src_key_padding_mask=padding).masked_fill(padding[..., None], 0)
        return F.normalize(out.sum(1) / (~padding).sum(1, keepdim=True), dim=1)


class PlainTraining:
    """MoCo with circle loss, from the weights and the bank that train.py --seed 0 starts with."""

    def __init__(self, channels, dropout, bank, device="cpu"):
        seed_torch(0)
        self.device = device
        start = MoCo(TCA(channels, dropout=dropout), channels, bank)
        prefix = "transformer_encoder.layers.0."
        weights = start.encoder_q.state_dict()
        weights = {name.removeprefix(prefix): value for name, value in weights.items()}
        self.query, self.key = (PlainModel(channels, dropout).to(device) for _ in range(2))
        self.query.layer.load_state_dict(weights)
        self.queue, self.pointer = start.queue.to(device), 0
        self.optimizer = torch.optim.Adam(self.query.parameters(), 1e-5, weight_decay=1e-4)

    def to_device(self, batch):
        """The sides of a batch, each x and padding, on the device."""
        return [[part.to(self.device) for part in side] for side in batch]

    def step(self, anchors, positives, negatives):
        """Take a step on a batch of the device; returns the loss."""
        q = self.query(*anchors)
        with torch.no_grad():
            parameters = zip(self.key.parameters(), self.query.parameters(), strict=True)
            for key, query in parameters:
                key.data = key.data * 0.0 + query.data * 1.0
            p, n = self.key(*positives), self.key(*negatives)
        logits = torch.cat([(q * p).sum(1, keepdim=True), q @ self.queue.clone()], 1)
        loss = circle(logits, torch.zeros(len(q), dtype=torch.long, device=self.device))
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.queue[:, self.pointer : self.pointer + len(n)] = n.T
        self.pointer = (self.pointer + len(n)) % self.queue.shape[1]
        return loss.item()


# --- evaluation ---------------------------------------------------------------------------------


@torch.inference_mode()
def encode_plain(
    encoder: nn.Module, rows: np.ndarray, device: str = "cpu"
) -> tuple[Tensor, Tensor]:
    """One video, padded to 300 frames: frame descriptors (T, D), video descriptor (D,)."""
    rows = torch.from_numpy(crop(rows, LONG).astype(np.float32)).to(device)
    T = len(rows)
    x = F.pad(rows, (0, 0, 0, LONG - T))[None]  # (1, 300, C)
    padding = (torch.arange(LONG, device=device) >= T)[None]
    out = encoder.transformer_encoder(x, src_key_padding_mask=padding)[0, :T]
    return F.normalize(out, dim=1), F.normalize(out.mean(0), dim=0)


def compare_plain(query: Tensor, target: Tensor) -> Tensor:
    """Chamfer similarity of two videos' frame descriptors."""
    return torch.einsum("ik,jk->ij", query, target).max(1)[0].mean()
