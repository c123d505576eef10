"""Settings of a run that come with a packed file."""
from typing import Any, Dict, Mapping

from mmengine.config import Config

from isvit_det.core.errors import QuantError
from isvit_det.core.spec import QuantConfig
from isvit_det.engine.configs import DETECTOR
from isvit_det.packed_state import read_header


def packed_settings(cfg: Config, content: Mapping[str, Any],
                    given: Mapping[str, Any]) -> Dict[str, Any]:
    """Settings that a packed file is to be evaluated with.

    A float config says nothing of quantization, so it takes the file's. One
    of ours keeps its own, which loading compares with the file's.

    Args:
        cfg: of the run.
        content: of the packed file.
        given: bits, scope and method that the user gave.

    Raises:
        QuantError: if the user gave others than the file has.
    """
    header = read_header(content['state_dict'])
    found = QuantConfig.from_dict(header['quant'])
    differing = [
        f'{key} {getattr(found, key)} (asked for {value})'
        for key, value in given.items() if getattr(found, key) != value
    ]
    if differing:
        raise QuantError(f'packed file: made with {", ".join(differing)}; '
                         'leave that out, or give a float checkpoint to '
                         'calibrate.')
    if cfg.get('model', {}).get('type') == DETECTOR:
        return dict(given)
    return found.to_dict()
