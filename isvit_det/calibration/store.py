"""Activations of the calibration images, within a memory budget."""
import itertools
import math
import os
import shutil
from pathlib import Path
from typing import Dict, Iterator, List, Optional, Tuple, Union

import torch
from torch import Tensor

from isvit_det.core.distributed import local_world_size, own_indices
from isvit_det.core.errors import QuantError
from isvit_det.core.units import State

# (H, W) of the activations of the images of all processes.
Sizes = List[Tuple[int, int]]


class ActivationPool:
    """The memory that the stores of one calibration share.

    Args:
        directory: of the files of tensors beyond the budget; made when
            needed.
        budget_gb: GB (1e9 bytes) of tensors kept in memory; None takes half
            of the available memory, divided among the processes of the run on
            this machine.

    Raises:
        QuantError: if the budget is negative or infinite.
    """

    def __init__(self,
                 directory: Path,
                 budget_gb: Optional[float] = None) -> None:
        self.directory = directory
        if budget_gb is None:
            self.budget = available_memory() // (2 * local_world_size())
        elif 0 <= budget_gb * 1e9 < math.inf:
            self.budget = int(budget_gb * 1e9)
        else:
            raise QuantError(f'store_gb: {budget_gb!r} is not allowed; '
                             'expected a finite number, 0 or more, or leave '
                             'it out.')
        self.used = 0
        self.names = itertools.count()

    def clear(self) -> None:
        """Remove all files, also those that a killed run has left."""
        shutil.rmtree(self.directory, ignore_errors=True)


class ActivationStore:
    """A list of tensors on the CPU, in memory or on the disk.

    Tensors beyond the budget of the pool are written to files, which are
    memory-mapped when they are accessed.

    Args:
        pool: has the budget.
    """

    def __init__(self, pool: ActivationPool) -> None:
        self.pool = pool
        self._name = next(pool.names)
        self._entries: List[Optional[Union[Tensor, Path]]] = []
        self._shapes: Dict[int, torch.Size] = {}
        self._dtypes: Dict[int, torch.dtype] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def append(self, tensor: Tensor) -> None:
        """Add a tensor at the end.

        Raises:
            QuantError: if it must be written to the disk and cannot be.
        """
        tensor = tensor.detach().cpu().contiguous()
        size = tensor.numel() * tensor.element_size()
        if self.pool.used + size <= self.pool.budget:
            self.pool.used += size
            self._entries.append(tensor)
            return
        index = len(self._entries)
        path = self.pool.directory / f'{self._name}_{index}.bin'
        try:
            self.pool.directory.mkdir(parents=True, exist_ok=True)
            with open(path, 'wb') as file:
                file.write(tensor.view(-1).view(torch.uint8).numpy().data)
        except OSError as error:
            raise QuantError(
                f'store: {path} could not be written ({error}); '
                'free some disk, or allow more memory by store_gb.') from error
        self._shapes[index], self._dtypes[index] = tensor.shape, tensor.dtype
        self._entries.append(path)

    def __getitem__(self, index: int) -> Tensor:
        entry = self._entries[index]
        assert entry is not None, 'this tensor was dropped'
        if isinstance(entry, Tensor):
            return entry
        shape = self._shapes[index]
        flat = torch.from_file(
            str(entry), size=shape.numel(), dtype=self._dtypes[index])
        return flat.view(shape)

    def drop(self, index: int) -> None:
        """Free a tensor; the others keep their indices."""
        entry = self._entries[index]
        if isinstance(entry, Tensor):
            self.pool.used -= entry.numel() * entry.element_size()
        elif entry is not None:
            entry.unlink(missing_ok=True)
        self._entries[index] = None

    def close(self) -> None:
        """Free all tensors."""
        for index in range(len(self)):
            self.drop(index)


def own_states(inputs: ActivationStore, sizes: Sizes,
               device: torch.device) -> Iterator[Tuple[int, int, State]]:
    """The states of this process's images, on a device.

    Args:
        inputs: activations of the images of this process.
        sizes: of the activations, for the images of all processes.
        device: of the states.

    Yields:
        The position in ``inputs``, the image's number among those of all
        processes, and the state.
    """
    for position, image in enumerate(own_indices(len(sizes))):
        yield position, image, State(inputs[position].to(device), sizes[image])


def available_memory() -> int:
    """Bytes of memory that can be allocated without swapping."""
    meminfo = Path('/proc/meminfo')
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith('MemAvailable:'):
                return int(line.split()[1]) * 1024
    return os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') // 2
