"""The packages of the extra ``export``, which nothing else imports."""
import importlib
from typing import Any

from isvit_det.core.errors import QuantError


def import_extra(name: str) -> Any:
    """Import a package of the extra ``export``.

    Args:
        name: of the package or of a module of it, such as ``'onnx.checker'``.

    Raises:
        QuantError: if it is not installed, or cannot be imported.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.split('.')[0]
        raise QuantError(
            f'the package {package} cannot be imported ({error}); install '
            "what other engines need: pip install 'isvit_det[export]', or of "
            'a clone, pip install -r requirements/export.txt.') from error
