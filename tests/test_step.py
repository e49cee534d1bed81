"""A training step on a GPU only queues work: shown without a GPU, on PyTorch's meta device.

Its tensors have shapes and no values. So it raises where a value is read, where a shape depends on
values, where a tensor is copied back, and where one of the CPU meets one of the device: where a GPU
would be waited for, or would raise.
"""

import contextlib
from types import SimpleNamespace

import pytest
import torch

import train
from batches import collate_pairs
from data import VCDBPairDataset
from distributed import Distributed
from features.on_device import FramesOnDevice
from features.store import FeatureStore
from losses import LOSSES
from model import ENCODERS, MoCo

SIZES = {
    "tca": {"nhead": 4, "dim_feedforward": 64},
    "netvlad": {"num_clusters": 8, "output_dim": 64},
    "nextvlad": {"num_clusters": 8, "output_dim": 64},
}


@pytest.fixture
def no_autocast(monkeypatch):
    """PyTorch has no autocast for the meta device, not even a switched-off one."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())


@pytest.mark.parametrize("features_on", ["host", "device"])
@pytest.mark.parametrize(
    "encoder, loss", [("tca", "circle"), ("netvlad", "triplet"), ("nextvlad", "infonce")]
)
def test_step_never_waits_for_the_gpu(world, no_autocast, encoder, loss, features_on):
    store = FeatureStore(world.train_features)
    data = VCDBPairDataset(world.vcdb, store, neg_num=4, mask_shared=True)
    frames = None
    if features_on == "device":
        frames = FramesOnDevice(store, list(store), "meta")
        data.frames = frames.numbers
    batches = [collate_pairs([data[i] for i in range(start, start + 6)]) for start in (0, 6)]

    built = ENCODERS[encoder](store.feature_size, **SIZES[encoder])
    model = MoCo(built, built.descriptor_size, K=64, m=0.5).to("meta")
    optimizer = torch.optim.Adam(model.encoder_q.parameters())
    steps = []
    run = SimpleNamespace(
        args=SimpleNamespace(device="meta", seed=0),
        dist=Distributed(),
        data=data,
        step=0,
        keep_in_step=iter,
        note_loss=lambda *values: steps.append(values),
        next_step=lambda: None,
        save_if_due=lambda: None,
    )
    log = SimpleNamespace(timed=iter, write_step=lambda *_: None)
    train.train_one_epoch(model, LOSSES[loss], optimizer, batches, frames, run, log)
    assert len(steps) == 2 and all(loss.device.type == "meta" for loss, *_ in steps)


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: bool((x > 0).all()),
        lambda x: x[x > 0],
        lambda x: x.cpu(),
        lambda x: x + torch.ones(3),
    ],
    ids=["item", "tolist", "bool", "index by a mask", "cpu", "a tensor of the CPU"],
)
def test_meta_device_raises_where_a_gpu_would_be_waited_for(wait):
    """The oracle above must see what it is there for."""
    with pytest.raises((NotImplementedError, RuntimeError)):
        wait(torch.zeros(3, device="meta"))
