"""Dense codes: size, round trip, and bytes that do not fit."""
import pytest
import torch

from isvit_det.core.bit_packing import pack, packed_size, unpack
from isvit_det.core.errors import QuantError


@pytest.mark.parametrize('bits', range(1, 9))
@pytest.mark.parametrize('shape', [(1, ), (7, ), (8, ), (3, 5, 3, 3), (0, )])
def test_round_trip_and_size(bits, shape):
    codes = torch.randint(0, 2**bits, shape)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.numel() == packed_size(codes.numel(), bits)
    assert packed.numel() == -(-codes.numel() * bits // 8)
    assert torch.equal(unpack(packed, bits, shape), codes.to(torch.uint8))


def test_the_layout_is_the_least_significant_bit_first():
    stream = ''.join(f'{code:03b}'[::-1] for code in (5, 3, 6))
    expected = [
        int(stream[i:i + 8].ljust(8, '0')[::-1], 2) for i in range(0, 9, 8)
    ]
    assert pack(torch.tensor([5, 3, 6]), 3).tolist() == expected


def test_bytes_of_another_length_are_refused():
    packed = pack(torch.arange(8), 3)
    with pytest.raises(QuantError, match='expected 3 bytes for 8 codes'):
        unpack(packed[:-1], 3, (8, ))
