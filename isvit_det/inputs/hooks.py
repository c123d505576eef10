"""Errors of the user's hooks, and finding the calibration hook."""
import contextlib
from typing import Any, Iterator, Optional

from mmengine.hooks import Hook

from isvit_det.core.errors import QuantError, describe_with_place
from isvit_det.core.files import disk_error


def failing_hook(error: BaseException) -> Optional[str]:
    """Class and method of the hook that raised an error, None if none did.

    Args:
        error: with its traceback.
    """
    trace, name = error.__traceback__, None
    while trace is not None:
        code, owner = trace.tb_frame.f_code, trace.tb_frame.f_locals.get(
            'self')
        # A hook of this package may call others.
        if isinstance(
                owner,
                Hook) and not type(owner).__module__.startswith('isvit_det.'):
            name = f'{type(owner).__name__}.{code.co_name}'
        trace = trace.tb_next
    return name


@contextlib.contextmanager
def hook_errors() -> Iterator[None]:
    """Turn exceptions of the user's hooks into QuantErrors.

    Raises:
        QuantError: naming the hook, its method and the exception.
    """
    try:
        yield
    except QuantError:
        raise
    except Exception as error:
        name = failing_hook(error)
        if name is None:
            raise
        full = disk_error(error)
        if full is not None:
            raise full from error
        raise QuantError(
            f'hooks: {name} raised {describe_with_place(error)}; mend the '
            'hook or take it out of the config.') from error


def is_calibration_hook(kind: Any) -> bool:
    """Whether a class is ``SOSCalibrationHook`` or a subclass.

    The name decides, since this module must not import the hook's (see
    ``tests/test_floors.py``).
    """
    return any(base.__name__ == 'SOSCalibrationHook'
               for base in getattr(kind, '__mro__', ()))
