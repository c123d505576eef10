"""Padding of windows: tokens that are computed but are none of the data."""
import contextlib
from typing import Iterator, NamedTuple, Optional, Sequence

from torch import Tensor

from isvit_det.core.quantizers import Quantizer


class Padding(NamedTuple):
    """The padding of the windows of one image.

    Attributes:
        quantizers: whose inputs are windows (windows, ..., N, C), and do not
            reach the unit's output at the places of padding.
        inside: which tokens are of the map, booleans (windows, N).
    """
    quantizers: Sequence[Quantizer]
    inside: Tensor


@contextlib.contextmanager
def leave_out(padding: Optional[Padding]) -> Iterator[None]:
    """In this context, observers and closed forms see no padding.

    What the layers compute stays the same.

    Args:
        padding: None where there is none.
    """
    quantizers = [] if padding is None else padding.quantizers
    try:
        for quantizer in quantizers:
            assert padding is not None
            quantizer.inside_map = padding.inside
        yield
    finally:
        for quantizer in quantizers:
            quantizer.inside_map = None
