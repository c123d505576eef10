"""State of data: what tells the files of an evaluation from changed ones."""
import hashlib
import json
import os
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, Optional

from isvit_det.core.digests import file_hash
from isvit_det.core.plain import plain
from isvit_det.evaluation.tasks import OUTPUTS


def dataset_state(dataset: Any) -> Dict[str, Any]:
    """What is read of a data set, in plain values that change with it.

    Args:
        dataset: built, no wrapper.

    Returns:
        SHA-256 of the ``files`` that its attributes name (annotations,
        proposals, hierarchies), and one of all ``images``: of what the data
        set knows of each, and of size and time of the picture and of other
        files of it (XML, semantic and panoptic masks).
    """
    read = getattr(dataset, 'get_data_info', None)
    digest = hashlib.sha256()
    for info in map(read, range(len(dataset))) if read else ():
        states = [_state(value) for value in _texts(info.values())]
        # Compared with plain(), this is fast on polygons.
        text = json.dumps([info, states], default=plain, skipkeys=True)
        digest.update(f'{text}\n'.encode())
    files = sorted(set(filter(_is_file, _texts(vars(dataset).values()))))
    return dict(
        files=[[path, file_hash(Path(path))] for path in files],
        images=digest.hexdigest())


def metric_state(config: Any) -> List[List[Any]]:
    """What is read of the files and folders that evaluators name.

    Args:
        config: of one or several evaluators; what it says of files that are
            written is left out.

    Returns:
        Each path, with SHA-256 of a file, or with size and time of all files
        of a folder.
    """
    found: List[List[Any]] = []
    for path in sorted(set(_inputs(config))):
        if _is_file(path):
            found.append([path, file_hash(Path(path))])
        elif path and os.path.isdir(path):
            found.append([path, list(_folder_states(path))])
    return found


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
    # What holds a NUL is no path.
    return '\0' not in path and os.path.isfile(path)


def _folder_states(folder: str) -> Iterator[List[Any]]:
    for place, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            path = os.path.join(place, name)
            yield [os.path.relpath(path, folder), _state(path)]


def _state(path: str) -> Optional[List[int]]:
    """Size and time of change of a file; None if there is none."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    return [found.st_size, found.st_mtime_ns]
