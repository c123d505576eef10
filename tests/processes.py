"""Processes for tests, which need not import the host anew.

A server imports it once; each process is a fork of that server, which has no
threads, CUDA contexts or state of the tests.
"""
import io
import multiprocessing
import sys
import traceback
from contextlib import redirect_stderr, redirect_stdout
from typing import Any, Callable, Tuple

_CONTEXT = multiprocessing.get_context('forkserver')
_CONTEXT.set_forkserver_preload([
    'isvit_det.commands.quantize_det', 'isvit_det.commands.quantize_cls',
    'tests.conftest'
])


def in_process(work: Callable[..., int],
               *args: Any,
               threads: int = 1) -> Tuple[int, str]:
    """Do something in a process of its own.

    Args:
        work: a function of a module, which gives the exit status.
        *args: of the function.
        threads: of torch.

    Returns:
        Exit status, negative for a signal; and what it printed, nothing if it
        was killed.
    """
    receiver, sender = _CONTEXT.Pipe(duplex=False)
    process = _CONTEXT.Process(
        target=_work, args=(sender, threads, work, args))
    process.start()
    sender.close()
    try:
        printed = receiver.recv()
    except EOFError:
        printed = ''
    process.join()
    return process.exitcode, printed


def _work(sender: Any, threads: int, work: Callable[..., int],
          args: Tuple[Any, ...]) -> None:
    import torch

    from tests.conftest import cheap_host
    torch.set_num_threads(threads)
    printed = io.StringIO()
    status = 1
    with cheap_host(), redirect_stdout(printed), redirect_stderr(printed):
        try:
            status = work(*args)
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
        except BaseException:
            traceback.print_exc()
    sender.send(printed.getvalue())
    sys.exit(status)
