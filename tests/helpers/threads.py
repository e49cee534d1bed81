"""Several processes played by threads: exchanges without starting a process."""

import io
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import torch

from distributed import _Exchange


class _NoTensors(pickle.Pickler):
    """Refuses tensors: those of a GPU would be unpickled on the GPU of the process that sent."""

    def reducer_override(self, value):
        assert not isinstance(value, torch.Tensor), "a tensor is pickled"
        return NotImplemented


class _Thread(_Exchange):
    """One of `world_size` threads, which exchange values through a shared list."""

    backend = "threads"

    def __init__(self, rank, values, barrier):
        self.rank, self.world_size = rank, len(values)
        self._values, self._barrier = values, barrier

    def _exchange(self, value):
        self._values[self.rank] = value
        self._barrier.wait()
        values = list(self._values)
        self._barrier.wait()  # nobody writes the next value before all have read
        return values

    def all_gather(self, tensor, same_length=False):
        return torch.cat(self._exchange(tensor.detach()))

    def _broadcast_object(self, value, root):
        file = io.BytesIO()
        _NoTensors(file).dump(value)
        return pickle.loads(self._exchange(file.getvalue())[root])

    def _broadcast_tensor(self, tensor, root):
        tensor.copy_(self._exchange(tensor.clone())[root])


def run_in_threads(world_size, function):
    """[function(dist)] of `world_size` threads, by rank."""
    values, barrier = [None] * world_size, threading.Barrier(world_size, timeout=60)
    dists = [_Thread(rank, values, barrier) for rank in range(world_size)]
    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(function, dists))
