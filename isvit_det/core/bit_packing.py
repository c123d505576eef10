"""Integer codes to dense bytes and back."""
from typing import Sequence

import torch
from torch import Tensor

from isvit_det.core.errors import QuantError


def packed_size(num_codes: int, bits: int) -> int:
    """Bytes that ``num_codes`` codes of ``bits`` bits take."""
    return (num_codes * bits + 7) // 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes densely, the least significant bit first.

    Args:
        codes: integers in ``[0, 2**bits - 1]``, any shape and dtype.
        bits: width of one code, 1..8.

    Returns:
        uint8, shape (ceil(codes.numel() * bits / 8),).

    >>> pack(torch.tensor([1, 2, 3, 4]), bits=4).tolist()
    [33, 67]
    """
    flat = codes.flatten().to(torch.uint8)
    # Eight codes fill `bits` bytes exactly, whatever the width.
    flat = torch.nn.functional.pad(flat, (0, -flat.numel() % 8)).view(-1, 8)
    shifts = torch.arange(bits, device=codes.device, dtype=torch.uint8)
    stream = (flat[..., None] >> shifts & 1).view(-1, bits, 8)
    weights = 2**torch.arange(8, device=codes.device, dtype=torch.uint8)
    dense = (stream * weights).sum(-1, dtype=torch.uint8).flatten()
    return dense[:packed_size(codes.numel(), bits)].contiguous()


def unpack(packed: Tensor, bits: int, shape: Sequence[int]) -> Tensor:
    """Undo ``pack``.

    Args:
        packed: uint8, as ``pack`` returned it.
        bits: width of one code.
        shape: shape of the codes.

    Returns:
        uint8 codes of ``shape``.

    Raises:
        QuantError: if the bytes do not hold just that many codes.

    >>> unpack(torch.tensor([33, 67], dtype=torch.uint8), 4, (2, 2)).tolist()
    [[1, 2], [3, 4]]
    """
    num_codes = int(torch.Size(shape).numel())
    expected = packed_size(num_codes, bits)
    if packed.dtype != torch.uint8 or packed.numel() != expected:
        raise QuantError(
            f'packed codes: {packed.numel()} values of {packed.dtype}, '
            f'expected {expected} bytes for {num_codes} codes of {bits} bits.')
    flat = torch.nn.functional.pad(packed.flatten(),
                                   (0, -packed.numel() % bits))
    shifts = torch.arange(8, device=packed.device, dtype=torch.uint8)
    stream = (flat[:, None] >> shifts & 1).view(-1, 8, bits)
    weights = 2**torch.arange(bits, device=packed.device, dtype=torch.uint8)
    codes = (stream * weights).sum(-1, dtype=torch.uint8).flatten()
    return codes[:num_codes].view(*shape)
