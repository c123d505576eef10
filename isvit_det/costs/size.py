"""Bytes of the packed file, as a whole and by layer."""
import copy
from typing import Any, Iterable, Mapping

import torch
from torch import nn

from isvit_det.checkpoint import packed_content
from isvit_det.core.layers import quantizers
from isvit_det.core.mixed import copy_at, named_parts
from isvit_det.core.settings import QuantConfig
from isvit_det.core.table_quantizer import TableQuantizer

# What torch.save writes for a further tensor beside its values: its records
# in the archive's two lists, its entry in the pickle, and the alignment.
TENSOR_BYTES = 320


class _Counter:
    """A file that counts its bytes and keeps none."""

    def __init__(self) -> None:
        self.total = 0

    def write(self, data: Any) -> int:
        """Count some bytes."""
        size = memoryview(data).nbytes
        self.total += size
        return size

    def flush(self) -> None:
        """Nothing is held back."""


def file_bytes(model: Any, provenance: Mapping[str, Any],
               dataset_meta: Mapping[str, Any]) -> int:
    """Size of the packed file of a model, to the byte, without writing it.

    Args:
        model: of ``quantized_detector``, calibrated; of a model that is not,
            zero points are taken to be in the middle of the codes, where
            those of weights are but for rare channels.
        provenance: as for ``save_packed``.
        dataset_meta: likewise.
    """
    if not all(q.is_fitted for q in quantizers(model).values()):
        model = copy.deepcopy(model)
        every: Iterable[Any] = quantizers(model).values()
        for quantizer in every:
            if quantizer.role == 'weight':
                quantizer.zero_point.fill_(2**(quantizer.bits - 1))
    counter: Any = _Counter()
    torch.save(packed_content(model, provenance, dataset_meta), counter)
    return counter.total


def part_bytes(part: Any, config: QuantConfig) -> int:
    """Bytes of a layer or product in a packed file that its bits decide.

    These are the codes of its weight, their zero points, and the entries of
    tables. Differences between two configs are exact up to the alignment of
    the file to 64 bytes.

    Args:
        part: of ``named_parts``.
        config: the settings of this part.
    """
    total = 0
    weight = getattr(part, 'weight', None)
    if weight is not None:
        total += -(-weight.numel() * config.weight_bits // 8)
        # Zero points up to 127 fit one byte.
        total += len(weight) * (2 if config.weight_bits == 8 else 1)
    for quantizer in copy_at(part, config).children():
        if isinstance(quantizer, TableQuantizer):
            total += len(quantizer.entries) + TENSOR_BYTES
    return total


def mean_bits(model: nn.Module) -> float:
    """Mean width of all quantized weights."""
    widths = [(part.weight.numel(), part.weight_quantizer.bits)
              for _, part in named_parts(model) if hasattr(part, 'weight')]
    return sum(num * bits for num, bits in widths) / sum(num
                                                         for num, _ in widths)
