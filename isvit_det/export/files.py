"""Exported files: what they say of themselves, and writing them."""
import json
import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Dict, Iterator, Mapping

from isvit_det.core.errors import QuantError
from isvit_det.core.files import check_writable
from isvit_det.export.engines import Loaded
from isvit_det.export.packages import import_extra

FORMAT_VERSION = 1
# Key of the facts in a file's metadata.
FACTS = 'isvit_det'


def facts_text(facts: Mapping[str, Any]) -> Dict[str, str]:
    """Facts as metadata of an ONNX file."""
    return {FACTS: json.dumps(dict(facts, format_version=FORMAT_VERSION))}


def read_facts(loaded: Loaded, path: Path) -> Dict[str, Any]:
    """The facts of a file that an engine has loaded.

    Raises:
        QuantError: if it has none, or those of another version.
    """
    try:
        facts = json.loads(loaded.metadata(FACTS))
        version = facts['format_version']
    except (ValueError, KeyError, TypeError) as error:
        raise QuantError(f'file: {path} was not written by export_det; give '
                         'a file of its own.') from error
    if version != FORMAT_VERSION:
        raise QuantError(f'file: {path} has format version {version}, '
                         f'expected {FORMAT_VERSION}; export it with this '
                         'version of isvit_det.')
    return facts


def save_openvino(content: bytes, facts: Mapping[str, str],
                  path: Path) -> None:
    """Write an ONNX file's content as OpenVINO's IR, beside it its weights.

    Args:
        content: of the ONNX file.
        facts: of ``facts_text``.
        path: of the ``.xml``.
    """
    openvino = import_extra('openvino')
    model = openvino.Core().read_model(content)
    for key, text in facts.items():
        model.set_rt_info(text, [key])
    # By default weights and scales would lose half of their digits.
    openvino.save_model(model, str(path), compress_to_fp16=False)


@contextmanager
def unfinished(folder: Path) -> Iterator[Path]:
    """A folder for files that are moved to ``folder`` if nothing fails.

    Raises:
        QuantError: if they cannot be written.
    """
    check_writable(folder)
    place = Path(tempfile.mkdtemp(prefix='.export.', dir=folder))
    try:
        yield place
        for path in sorted(place.iterdir()):
            with open(path, 'rb') as file:
                os.fsync(file.fileno())
            os.chmod(path, 0o644)
        for path in sorted(place.iterdir()):
            os.replace(path, folder / path.name)
    except (OSError, RuntimeError) as error:
        if isinstance(error, QuantError):
            raise
        first = str(error).strip().splitlines()[0]
        raise QuantError(
            f'{folder}: the file could not be written ({first}); '
            'free some disk, or choose another folder.') from error
    finally:
        shutil.rmtree(place, ignore_errors=True)
