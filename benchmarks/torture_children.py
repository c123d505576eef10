"""Children of a process that has imported all: started and killed cheaply."""
import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Callable, Dict, List, Mapping, Optional

POLL = .005


def fork(work: Callable[[], int],
         log: Path,
         environment: Optional[Mapping[str, str]] = None) -> int:
    """Do something in a child process; its id.

    Args:
        work: gives the exit status.
        log: file that gets what the child prints, at its end.
        environment: variables that the child has besides.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.environ.update(environment or {})
        status = work()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        # Nothing of the parent's is torn down.
        os._exit(status)


def wait(children: List[int],
         seconds: Optional[float] = None) -> Dict[int, int]:
    """Exit statuses of the children that end in time, negative for signals.

    Args:
        children: their ids; those that have ended are taken off the list.
        seconds: to wait at most; None waits for all.
    """
    ended: Dict[int, int] = {}
    end = None if seconds is None else time.monotonic() + seconds
    while children:
        for child in list(children):
            ended_child, status = os.waitpid(child, os.WNOHANG)
            if ended_child:
                children.remove(child)
                ended[child] = os.waitstatus_to_exitcode(status)
        if end is not None and time.monotonic() >= end:
            break
        if children:
            time.sleep(POLL)
    return ended


def kill(children: List[int]) -> None:
    """SIGKILL children, and wait for them."""
    for child in children:
        os.kill(child, signal.SIGKILL)
    wait(children)


def places(processes: int) -> List[Dict[str, str]]:
    """The variables that torchrun gives to each of a run's processes."""
    if processes == 1:
        return [{}]
    with socket.socket() as free:
        free.bind(('localhost', 0))
        port = str(free.getsockname()[1])
    return [
        dict(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(processes),
            LOCAL_WORLD_SIZE=str(processes),
            MASTER_ADDR='localhost',
            MASTER_PORT=port) for rank in range(processes)
    ]
