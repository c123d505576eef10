"""Engines whose figures are in the report beside a packed file."""
import json
from pathlib import Path
from typing import Any, List, Mapping, Optional

from torch import nn

from isvit_det.runtime.engine import describe_engine

# Name of the report of a calibration, in the folder of the packed file.
REPORT = 'result.json'


def reported_engines(packed: Path, provenance: Any) -> List[str]:
    """Engines whose figures are in the report beside a packed file.

    Args:
        packed: path of the file.
        provenance: entry of the file; the report of another calibration has
            another one.

    Returns:
        Their names; none where there is no such report.
    """
    try:
        result = json.loads(packed.with_name(REPORT).read_text())
        if result['provenance'] != provenance:
            return []
        every = [result, *result.get('also_evaluated', ())]
        return [each['engine']['engine'] for each in every]
    # What was damaged, or written by an earlier version, says nothing.
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []


def other_engine(model: nn.Module, packed: Path,
                 content: Mapping[str, Any]) -> Optional[str]:
    """A line if a model runs in another engine than its figures are of.

    Args:
        model: of ``attach_runtime_``, calibrated.
        packed: path of the packed file that it has loaded.
        content: of the file.
    """
    reported = reported_engines(packed, content.get('provenance'))
    now = describe_engine(model)['engine']
    if not reported or now in reported:
        return None
    return (f'this test runs in engine {now!r}, the figures in '
            f'{packed.with_name(REPORT)} are of {reported[0]!r}: AP may '
            'differ by some hundredths of a point')
