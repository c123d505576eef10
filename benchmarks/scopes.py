"""A detector of which the backbone alone is quantized, from one that all is.

The backbone is calibrated before neck and heads and does not depend on them,
so that both scopes have the same one: it is calibrated once.
"""
from pathlib import Path
from typing import Any

from mmengine.registry import init_default_scope

from isvit_det.checkpoint import read_checkpoint, save_packed
from isvit_det.inputs.configs import load_config, quantize_config_
from isvit_det.registry import MODELS


def keep_backbone(config: str, weights: Path, packed: Path, out: Path) -> None:
    """Write the packed file that a run of scope ``'backbone'`` would.

    Args:
        config: of the detector, quantized or not.
        weights: float checkpoint that ``packed`` was made from.
        packed: file of scope ``'detector'``.
        out: the file to write.

    Raises:
        QuantError: if a file cannot be read or written.
    """
    content = read_checkpoint(packed)
    whole = _model(config, content['quant'], 'detector')
    whole.load_state_dict(content['state_dict'])
    model = _model(config, content['quant'], 'backbone')
    model.load_state_dict(read_checkpoint(weights)['state_dict'])
    model.backbone.load_state_dict(whole.backbone.state_dict())
    model.products = whole.products
    origin = dict(content['provenance'], quant=model.quant_config.to_dict())
    save_packed(model, out, origin, content['meta']['dataset_meta'])


def _model(config: str, quant: Any, scope: str) -> Any:
    cfg = load_config(config, None)
    init_default_scope(cfg.default_scope)
    quantize_config_(cfg, dict(quant, scope=scope))
    return MODELS.build(cfg.model)
