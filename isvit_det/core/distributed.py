"""Sums and exchanges between the processes of a run.

Without torch's distributed package, or in a single process, each function
returns what this process has. All processes call the same functions in the
same order.
"""
import os
from typing import Any, List, Sequence

from torch import Tensor
from torch import distributed as dist


def world_size() -> int:
    """Number of processes of the run."""
    is_distributed = dist.is_available() and dist.is_initialized()
    return dist.get_world_size() if is_distributed else 1


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def local_world_size() -> int:
    """Number of processes of the run on this machine."""
    return int(os.environ.get('LOCAL_WORLD_SIZE', world_size()))


def sum_(x: Tensor) -> Tensor:
    """Replace a tensor by its sum over the processes, and return it."""
    if world_size() > 1:
        dist.all_reduce(x)
    return x


def min_(x: Tensor) -> Tensor:
    """Replace a tensor by its minima over the processes, and return it."""
    if world_size() > 1:
        dist.all_reduce(x, dist.ReduceOp.MIN)
    return x


def max_(x: Tensor) -> Tensor:
    """Replace a tensor by its maxima over the processes, and return it."""
    if world_size() > 1:
        dist.all_reduce(x, dist.ReduceOp.MAX)
    return x


def broadcast_(tensors: Sequence[Tensor]) -> None:
    """Replace tensors by those of process 0."""
    if world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, 0)


def all_gather(value: Any) -> List[Any]:
    """Values of plain data of all processes, in the order of their ranks."""
    if world_size() == 1:
        return [value]
    values: List[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast_object(value: Any) -> Any:
    """The value of plain data that process 0 has."""
    return all_gather(value)[0]


def own_indices(count: int) -> range:
    """Indices below ``count`` that this process works on.

    >>> list(own_indices(3))
    [0, 1, 2]
    """
    return range(rank(), count, world_size())


def interleave(parts: Sequence[Sequence[Any]]) -> List[Any]:
    """Values in the order of their indices, from those of every process.

    Args:
        parts: for each process, the values of its ``own_indices``.

    >>> interleave([['a', 'c', 'e'], ['b', 'd']])
    ['a', 'b', 'c', 'd', 'e']
    """
    longest = max(map(len, parts))
    return [part[i] for i in range(longest) for part in parts if i < len(part)]
