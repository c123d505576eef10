"""The exception for wrong input, and texts for messages."""
import traceback
from pathlib import Path
from typing import Sequence


class QuantError(ValueError):
    """The user's input is wrong.

    The message is one line that names what was given, what is allowed and
    what to do. The commands print it and exit with status 2.
    """


def describe_error(error: BaseException) -> str:
    """The class of an exception and the first line of its message.

    >>> describe_error(KeyError('mask'))
    "KeyError: 'mask'"
    >>> import torch
    >>> describe_error(torch.cuda.OutOfMemoryError('full'))
    'torch.OutOfMemoryError: full'
    """
    kind = type(error)
    package = kind.__module__.split('.')[0]
    name = kind.__name__
    if package != 'builtins':
        name = f'{package}.{name}'
    lines = str(error).strip().splitlines() or ['no message']
    return f'{name}: {lines[0]}'


def describe_with_place(error: BaseException) -> str:
    """An exception in one line, with the file and line that raised it."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return (f'{describe_error(error)} '
            f'({Path(frame.filename).name}, line {frame.lineno})')


def few_names(names: Sequence[str], shown: int = 5) -> str:
    """The first of many names, for a message of one line.

    >>> few_names(['conv1', 'conv2', 'fc'], shown=2)
    'conv1, conv2, ...'
    >>> few_names(['conv1', 'conv2'], shown=2)
    'conv1, conv2'
    """
    more = ', ...' if len(names) > shown else ''
    return ', '.join(names[:shown]) + more
