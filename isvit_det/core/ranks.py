"""What the processes of a run know together; alone, what one knows.

Every process calls the same functions in the same order.
"""
import os
from typing import Any, List, Sequence

from torch import Tensor
from torch import distributed as dist


def num_ranks() -> int:
    """Processes that share the work."""
    together = dist.is_available() and dist.is_initialized()
    return dist.get_world_size() if together else 1


def rank() -> int:
    """This process's number among them, from 0."""
    return dist.get_rank() if num_ranks() > 1 else 0


def ranks_here() -> int:
    """Processes of the run on this machine."""
    return int(os.environ.get('LOCAL_WORLD_SIZE', num_ranks()))


def sum_(x: Tensor) -> Tensor:
    """Replace a tensor by its sum over the processes."""
    if num_ranks() > 1:
        dist.all_reduce(x)
    return x


def lowest_(x: Tensor) -> Tensor:
    """Replace a tensor by its least values over the processes."""
    if num_ranks() > 1:
        dist.all_reduce(x, dist.ReduceOp.MIN)
    return x


def highest_(x: Tensor) -> Tensor:
    """Replace a tensor by its largest values over the processes."""
    if num_ranks() > 1:
        dist.all_reduce(x, dist.ReduceOp.MAX)
    return x


def take_first_(tensors: Sequence[Tensor]) -> None:
    """Replace tensors by those of process 0."""
    if num_ranks() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, 0)


def gather(value: Any) -> List[Any]:
    """A value of plain data from every process, in order."""
    if num_ranks() == 1:
        return [value]
    found: List[Any] = [None] * num_ranks()
    dist.all_gather_object(found, value)
    return found


def of_first(value: Any) -> Any:
    """The value of plain data that process 0 has."""
    return gather(value)[0]


def mine(count: int) -> range:
    """This process's share of ``count`` things that are numbered from 0.

    >>> list(mine(3))
    [0, 1, 2]
    """
    return range(rank(), count, num_ranks())


def interleave(parts: Sequence[Sequence[Any]]) -> List[Any]:
    """Things in the order of their numbers, from the shares of ``mine``.

    >>> interleave([['a', 'c', 'e'], ['b', 'd']])
    ['a', 'b', 'c', 'd', 'e']
    """
    longest = max(map(len, parts))
    return [part[i] for i in range(longest) for part in parts if i < len(part)]
