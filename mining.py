"""Hard negatives: each anchor's nearest background videos by the current encoder."""

import torch

from descriptors import Describer


def nearest_negatives(encoder, data, count, padding_size, device, processes, exclude):
    """(anchors, count) int64 numbers of each anchor's nearest negatives, nearest first, -1 where fewer are left.

    data: a PairDataset; rows are in the order of `data.anchors`. Every process encodes its share of the videos.
    exclude: leave out what `data.shared` says shows the anchor's own material.
    """
    videos = list(dict.fromkeys([*data.anchors, *data.negatives]))
    place = {video: i for i, video in enumerate(videos)}
    described = _describe_together(encoder, data.store, videos, padding_size, device, processes)
    anchors = described[[place[video] for video in data.anchors]]
    negatives = described[[place[video] for video in data.negatives]]
    out = torch.full((len(anchors), count), -1)
    for start in range(0, len(anchors), 256):
        similarities = anchors[start : start + 256] @ negatives.T  # (256, negatives)
        if exclude:
            names = list(data.anchors)[start : start + 256]
            similarities.masked_fill_(torch.stack([data.shared(name)[:-1] for name in names]), -torch.inf)
        values, numbers = similarities.topk(min(count, len(negatives)), dim=1)
        out[start : start + 256, : numbers.shape[1]] = numbers.masked_fill(values == -torch.inf, -1)
    return out


def _describe_together(encoder, store, videos, padding_size, device, processes):
    """Descriptors (N, D) of `videos` on every process. Each encodes some of the batches that one would: the same to the bit."""
    describer = Describer(encoder, store, padding_size, device)
    batches = list(describer.batches(videos))
    dealt = [batches[rank :: processes.size] for rank in range(processes.size)]
    parts = [describer(batch, ["video"])["video"].data for batch in dealt[processes.rank]]
    empty = torch.zeros(0, encoder.descriptor_size, device=device)
    gathered = processes.allgather(torch.cat([empty, *parts])).cpu()
    place = {video: i for i, video in enumerate(video for part in dealt for batch in part for video in batch)}
    return gathered[[place[video] for video in videos]]
