"""What feeds a GPU: batches read ahead of it, and how much of its memory is free.

All questions to CUDA that evaluation asks are in this file.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Batch = TypeVar("Batch")

AHEAD = 2  # batches that are read before they are needed


def is_cuda(device: str | torch.device) -> bool:
    return torch.device(device).type == "cuda"


def free_memory(device: str | torch.device) -> int | None:
    """Bytes that this process may still take on a GPU; None for other devices."""
    if not is_cuda(device):
        return None
    free, _ = torch.cuda.mem_get_info(device)
    # PyTorch keeps what its tensors freed.
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def read_ahead(
    read: Callable[[Item], Batch], items: Iterable[Item], device: str | torch.device
) -> Iterator[Batch]:
    """Yield read(item) of each item. For a GPU, a thread reads the next ones while it computes."""
    if not is_cuda(device):  # the processor is busy with the batch itself
        yield from map(read, items)
        return
    index = torch.device(device).index
    if index is None:
        index = torch.cuda.current_device()
    # A new thread starts on GPU 0, and page-locked memory belongs to a thread's GPU.
    pool = ThreadPoolExecutor(1, initializer=torch.cuda.set_device, initargs=(index,))
    pending = deque()
    with pool:
        for item in items:
            pending.append(pool.submit(read, item))
            if len(pending) > AHEAD:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
