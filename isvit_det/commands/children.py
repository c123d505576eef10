"""Processes of one function, whose memory is that function's alone.

Nothing here imports the host's packages: a new process imports this module
first, and then those packages without what they say.
"""
import importlib
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from typing import Any, Callable

from isvit_det.host import quiet_imports


def call_elsewhere(function: Callable[..., Any], *args: Any) -> Any:
    """What a function returns in a new process, or raises there.

    Args:
        function: of a module that can be imported.
        *args: its arguments, which can be pickled.
    """
    # A forked process would start with the memory of this one.
    context = multiprocessing.get_context('spawn')
    with ProcessPoolExecutor(1, context, _import_quietly,
                             (function.__module__, )) as process:
        return process.submit(function, *args).result()


def _import_quietly(module: str) -> None:
    with quiet_imports():
        importlib.import_module(module)
