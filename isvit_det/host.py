"""The check that the packages which isvit_det extends are installed.

They are found by import name, because mmengine, mmcv and mmdet each have two
distributions (OpenMMLab's and the onedl forks) with the same import name.
"""
import contextlib
import importlib
import importlib.util
import io
import re
from typing import Iterator, Optional, Tuple

OLDEST = {
    'torch': '2.0',
    'timm': '0.9.16',
    'mmengine': '0.10',
    'mmcv': '2.0.1',
    'mmdet': '3.3',
}

_said = io.StringIO()


@contextlib.contextmanager
def quiet_imports() -> Iterator[None]:
    """Record what packages print and warn of while they are imported."""
    with contextlib.redirect_stdout(_said), contextlib.redirect_stderr(_said):
        yield


def said_at_import() -> str:
    """All that ``quiet_imports`` has recorded."""
    return _said.getvalue()


def check_host() -> None:
    """Import the host packages and compare their versions with ``OLDEST``.

    Raises:
        ImportError: names every package that is missing, broken or too old.
    """
    problems = [_find_problem(*item) for item in OLDEST.items()]
    if any(problems):
        raise ImportError(
            f'isvit_det cannot run here: {"; ".join(filter(None, problems))}. '
            'Install the versions in its requirements/ folder (its '
            'tools/setup_env.sh does), or newer ones.')


def _find_problem(name: str, oldest: str) -> Optional[str]:
    if importlib.util.find_spec(name) is None:
        return f'{name} is not installed (needs >= {oldest})'
    try:
        version = importlib.import_module(name).__version__
    # Packages of incompatible versions raise any of these at import.
    except (ImportError, AssertionError, RuntimeError) as error:
        return f'{name} cannot be imported ({_first_line(error)})'
    if _version_key(version) < _version_key(oldest):
        return f'{name} {version} is too old (needs >= {oldest})'
    if name == 'mmcv' and importlib.util.find_spec('mmcv._ext') is None:
        return f'mmcv {version} lacks its compiled operators (mmcv._ext)'
    return None


def _first_line(error: Exception) -> str:
    return f'{type(error).__name__}: {error}'.splitlines()[0]


def _version_key(version: str) -> Tuple[int, ...]:
    """A version as numbers that can be compared.

    >>> _version_key('2.12.1+cu130') > _version_key('2.9')
    True
    >>> _version_key('0.10') == _version_key('0.10.0rc1')
    True
    """
    numbers = [int(n) for n in re.findall(r'\d+', version)[:3]]
    return tuple(numbers + [0] * (3 - len(numbers)))
