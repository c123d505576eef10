"""What a pickle asks for before it is unpickled: room for its memo."""
import pickle
import pickletools
from typing import BinaryIO

PUTS = ('PUT', 'LONG_BINPUT')


def check_memo(file: BinaryIO) -> None:
    """Raise if the pickle that a file goes on with would fill the memory.

    Python's unpickler makes room for all numbers below the greatest that a
    pickle calls a value by; a flipped bit can ask for tens of GB. Nobody
    counts higher than the pickle has bytes.

    Args:
        file: goes on where it was afterwards.

    Raises:
        pickle.UnpicklingError: if it counts higher.
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
