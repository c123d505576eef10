"""A check of a pickle's memo before it is unpickled."""
import pickle
import pickletools
from typing import BinaryIO

PUTS = ('PUT', 'LONG_BINPUT')


def check_memo(file: BinaryIO) -> None:
    """Raise if the next pickle of a file would fill the memory.

    Python's unpickler allocates its memo for all indices up to the highest
    one in the pickle, which a flipped bit can make tens of GB. An intact
    pickle has no index above its number of bytes.

    Args:
        file: its position stays.

    Raises:
        pickle.UnpicklingError: if an index is higher.
        ValueError: if it is no pickle.
    """
    start = file.tell()
    file.seek(0, 2)
    size = file.tell()
    file.seek(start)
    for opcode, number, _ in pickletools.genops(file):
        if opcode.name in PUTS and (number is None or number > size):
            raise pickle.UnpicklingError(f'value {number} of a file of {size} '
                                         'bytes')
    file.seek(start)
