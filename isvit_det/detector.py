"""quantized_detector: a detector of mmdet in low bits, heads included."""
from typing import Any, Dict, List, Mapping, Optional, Tuple, Union

from mmcv.cnn import GeneralizedAttention, NonLocal2d
from mmcv.cnn.bricks import wrappers
from mmcv.ops import MultiScaleDeformableAttention
from mmdet.models.dense_heads import (CondInstMaskHead, DDQDETRHead,
                                      MaskFormerHead, RTMDetInsHead,
                                      SOLOV2Head, YOLACTProtonet)
from mmdet.models.dense_heads.tood_head import TaskDecomposition
from mmdet.models.layers import ConditionalAttention, DynamicConv
from mmdet.models.roi_heads import SparseRoIHead
from mmdet.registry import MODELS as MMDET_MODELS
from torch import nn

from isvit_det.backbones import QUANTIZED
from isvit_det.core.errors import QuantError
from isvit_det.core.layers import QuantConv2d, QuantLinear
from isvit_det.core.spec import QuantConfig
from isvit_det.packed_state import install_loading_
from isvit_det.registry import MODELS

# mmcv's two only add what empty inputs once needed.
PLAIN_FORWARDS = [
    layer.forward
    for layer in (nn.Linear, nn.Conv2d, wrappers.Linear, wrappers.Conv2d)
]
# Parameters that torch's modules multiply by.
OPERANDS = ('weight', 'in_proj_weight')
# Modules that multiply activations by activations, without a weight.
PRODUCTS = (MultiScaleDeformableAttention, ConditionalAttention,
            GeneralizedAttention, NonLocal2d, DynamicConv, MaskFormerHead,
            CondInstMaskHead, RTMDetInsHead, SOLOV2Head, YOLACTProtonet)


@MODELS.register_module()
def quantized_detector(base: Union[str, type],
                       backbone: Mapping[str, Any],
                       quant: Optional[Mapping[str, Any]] = None,
                       **kwargs: Any) -> nn.Module:
    """Build a detector of mmdet in low bits.

    A function and not a class, so that the model keeps mmdet's class and the
    swap happens where every tool builds: with ``scope='detector'`` each
    Conv2d and Linear outside of the backbone is replaced by its quantized
    twin. Transposed and deformable convolutions, layers that compute more
    than these two do and what is inside of ``nn.MultiheadAttention`` stay in
    float, and so do layers that no prediction runs.

    Args:
        base: the detector's class or its name, such as ``'MaskRCNN'``.
        backbone: config of a quantized backbone, without ``quant``.
        quant: values of ``QuantConfig``.
        **kwargs: of the detector's class.

    Returns:
        The detector, with an attribute ``quant_config``. It loads float,
        calibrated and packed states strictly.

    Raises:
        QuantError: if ``base`` or the backbone cannot be used, or nothing
            outside of the backbone could be quantized.
    """
    config = QuantConfig.from_dict(quant or {})
    if 'quant' in backbone:
        raise QuantError("model.backbone.quant: give these settings as "
                         "model.quant, where the heads read them too.")
    if isinstance(base, str) and MMDET_MODELS.get(base) is None:
        raise QuantError(f'model.base: {base!r} is not a registered detector; '
                         "give the float config's model.type.")
    name = backbone.get('type')
    kind = MMDET_MODELS.get(name) if isinstance(name, str) else name
    if not hasattr(kind, 'units'):
        raise QuantError(f'model.backbone.type: {name!r} is not a quantized '
                         'backbone; use one of '
                         f'{sorted(set(QUANTIZED.values()))}.')
    model = MMDET_MODELS.build(
        dict(kwargs, type=base, backbone=dict(backbone, quant=config)))
    model.quant_config = config
    if config.scope == 'detector':
        if quantize_layers_(model, model.backbone, config) == 0:
            raise QuantError("quant.scope: 'detector' found no Conv2d and no "
                             "Linear outside of the backbone; use 'backbone'.")
    install_loading_(model, config)
    return model


def quantize_layers_(model: nn.Module, backbone: nn.Module,
                     config: QuantConfig) -> int:
    """Replace the Conv2d and Linear layers of a model but its backbone's.

    A layer that occurs twice is replaced by one and the same twin.

    Returns:
        The number of layers replaced.
    """
    twins: Dict[Any, nn.Module] = {}
    kept = set(backbone.modules())
    for module in model.modules():
        kept.update(*(part.modules() for part in unrun_parts(module)))
    for parent in list(model.modules()):
        if parent in kept:
            continue
        for name, child in list(parent._modules.items()):
            twin = twins.get(child)
            if twin is None and child not in kept and _is_plain(child):
                twins[child] = twin = _twin(child, config)
            if twin is not None:
                setattr(parent, name, twin)
    return len(twins)


def unrun_parts(module: Any) -> List[nn.Module]:
    """Parts of a module whose own forward no prediction runs.

    Another forward reads their weights, or they are there for training.
    """
    if isinstance(module, nn.MultiheadAttention):
        return [module.out_proj]
    if isinstance(module, TaskDecomposition):
        return [module.reduction_conv]
    if isinstance(module, DDQDETRHead):
        return [
            module.aux_cls_branches, module.aux_reg_branches,
            module.cls_branches[-1], module.reg_branches[-1]
        ]
    if isinstance(module, SparseRoIHead) and module.with_mask:
        return list(module.mask_head[:-1])
    if isinstance(module, YOLACTProtonet):
        return [part for part in [module.segm_branch] if part is not None]
    return []


def _twin(layer: Any, config: QuantConfig) -> nn.Module:
    is_linear = isinstance(layer, nn.Linear)
    twin = (QuantLinear if is_linear else QuantConv2d)(layer, config)
    return twin.train(layer.training)


def _is_plain(module: Optional[nn.Module]) -> bool:
    """Whether a layer computes what nn.Linear or nn.Conv2d computes."""
    # Subclasses normalise weights, mask inputs, take offsets and more.
    return getattr(type(module), 'forward', None) in PLAIN_FORWARDS


def float_modules(model: nn.Module) -> List[Tuple[str, str]]:
    """Modules that hold or compute products in float, with class names.

    Norms and embeddings aside: any module that holds a parameter of two or
    more dimensions named ``weight``, ``in_proj_weight`` or as its class says
    in ``float_operands``, and those that multiply activations by each other.
    """
    found = []
    for name, module in model.named_modules():
        if isinstance(module, (QuantLinear, QuantConv2d, nn.Embedding)):
            continue
        own = dict(module.named_parameters(recurse=False))
        keys = (*OPERANDS, *getattr(module, 'float_operands', ()))
        if isinstance(module, PRODUCTS) or any(
                key in own and own[key].ndim >= 2 for key in keys):
            found.append((name, type(module).__name__))
    return found
