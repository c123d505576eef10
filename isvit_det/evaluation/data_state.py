"""State of data: digests by which changed files are recognised."""
import hashlib
import json
import os
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, Optional

from isvit_det.core.digests import file_hash
from isvit_det.core.plain import plain
from isvit_det.evaluation.tasks import OUTPUTS


def dataset_state(dataset: Any) -> Dict[str, Any]:
    """Plain values that change when the files of a data set change.

    Args:
        dataset: a built data set, no wrapper.

    Returns:
        ``files``: SHA-256 of each file that an attribute names (annotations,
        proposals, hierarchies). ``images``: one SHA-256 over the data set's
        information on all images, and over size and modification time of
        their files (images, XML, semantic and panoptic masks).
    """
    read = getattr(dataset, 'get_data_info', None)
    digest = hashlib.sha256()
    for info in map(read, range(len(dataset))) if read else ():
        states = [_state(value) for value in _texts(info.values())]
        # On polygons this is much faster than plain().
        text = json.dumps([info, states], default=plain, skipkeys=True)
        digest.update(f'{text}\n'.encode())
    files = sorted(set(filter(_is_file, _texts(vars(dataset).values()))))
    return dict(
        files=[[path, file_hash(Path(path))] for path in files],
        images=digest.hexdigest())


def metric_state(config: Any) -> List[List[Any]]:
    """Plain values that change when the input files of evaluators change.

    Args:
        config: of one or several evaluators; output files are ignored.

    Returns:
        Each path, with the SHA-256 of a file, or with size and modification
        time of all files in a folder.
    """
    states: List[List[Any]] = []
    for path in sorted(set(_inputs(config))):
        if _is_file(path):
            states.append([path, file_hash(Path(path))])
        elif path and os.path.isdir(path):
            states.append([path, list(_folder_states(path))])
    return states


def _inputs(config: Any) -> Iterator[str]:
    if isinstance(config, str):
        yield config
    elif isinstance(config, Mapping):
        for key, value in config.items():
            if key not in OUTPUTS:
                yield from _inputs(value)
    elif isinstance(config, (list, tuple)):
        for value in config:
            yield from _inputs(value)


def _texts(values: Any) -> Iterator[str]:
    return (value for value in values if isinstance(value, str))


def _is_file(path: str) -> bool:
    # A path has no NUL.
    return '\0' not in path and os.path.isfile(path)


def _folder_states(folder: str) -> Iterator[List[Any]]:
    for place, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            path = os.path.join(place, name)
            yield [os.path.relpath(path, folder), _state(path)]


def _state(path: str) -> Optional[List[int]]:
    """Size and modification time of a file; None if it does not exist."""
    try:
        stat = os.stat(path)
    except (OSError, ValueError):
        return None
    return [stat.st_size, stat.st_mtime_ns]
