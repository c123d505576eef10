"""Activations of all calibration images, within a memory budget."""
import itertools
import math
import os
import shutil
from pathlib import Path
from typing import Dict, List, Optional, Union

import torch
from torch import Tensor

from isvit_det.core.distributed import local_world_size
from isvit_det.core.errors import QuantError


class ActivationPool:
    """The memory that the stores of one calibration share.

    Args:
        directory: where tensors beyond the budget go; made when needed.
        budget_gb: GB (1e9 bytes) of tensors kept in memory; None takes half
            of what the system has available, shared with the other processes
            of the run.
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
        """Remove all files, those of a run that was killed as well."""
        shutil.rmtree(self.directory, ignore_errors=True)


class ActivationStore:
    """A list of tensors, of which the pool's budget decides where they lie.

    Tensors are kept on the CPU, those beyond the budget in files that are
    mapped, not read, when asked for.
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
        """Keep a tensor as the last entry.

        Raises:
            QuantError: if it has to go to the disk, which is full.
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
        assert entry is not None, 'entry was dropped'
        if isinstance(entry, Tensor):
            return entry
        shape = self._shapes[index]
        flat = torch.from_file(
            str(entry), size=shape.numel(), dtype=self._dtypes[index])
        return flat.view(shape)

    def drop(self, index: int) -> None:
        """Free one entry; the others keep their indices."""
        entry = self._entries[index]
        if isinstance(entry, Tensor):
            self.pool.used -= entry.numel() * entry.element_size()
        elif entry is not None:
            entry.unlink(missing_ok=True)
        self._entries[index] = None

    def close(self) -> None:
        """Free all entries."""
        for index in range(len(self)):
            self.drop(index)


def available_memory() -> int:
    """Bytes that can be taken without swapping."""
    meminfo = Path('/proc/meminfo')
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith('MemAvailable:'):
                return int(line.split()[1]) * 1024
    return os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') // 2
