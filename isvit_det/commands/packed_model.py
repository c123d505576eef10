"""Building the detector of a packed file."""
from typing import Any, Dict, Tuple

from mmengine.config import Config
from mmengine.registry import init_default_scope

from isvit_det.checkpoint import is_packed, read_checkpoint
from isvit_det.core.errors import QuantError
from isvit_det.core.files import local_checkpoint
from isvit_det.inputs.configs import (DETECTOR, config_errors, load_config,
                                      quantize_config_)
from isvit_det.packed.state import packed_config
from isvit_det.registry import MODELS


def load_packed(config: str, checkpoint: str) -> Tuple[Config, Any]:
    """Build a detector, and load its packed weights.

    Args:
        config: float, or of the calibration.
        checkpoint: packed; a path or an address.

    Returns:
        The config of the quantized detector, and the detector in eval mode.

    Raises:
        QuantError: if one of them cannot be used.
    """
    cfg = load_config(config, None)
    path = local_checkpoint(checkpoint)
    content = read_checkpoint(path)
    if not is_packed(content):
        raise QuantError(f'checkpoint: {path} is a float one, whose layers '
                         'have no codes; give the packed file that '
                         'quantize_det made of it.')
    quant: Dict[str, Any] = {}
    if cfg.get('model', {}).get('type') != DETECTOR:
        quant = packed_config(content['state_dict'], {}).to_dict()
    quantize_config_(cfg, quant)
    with config_errors():
        init_default_scope(cfg.get('default_scope') or 'mmdet')
        model = MODELS.build(cfg.model)
    model.load_state_dict(content['state_dict'])
    return cfg, model.eval()
