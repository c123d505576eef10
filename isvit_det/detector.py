"""quantized_detector: a detector of MMDetection with quantized layers."""
from typing import Any, Dict, List, Mapping, Optional, Tuple, Union

from mmcv.cnn.bricks import wrappers
from mmdet.models.mot import BaseMOTModel
from mmdet.registry import MODELS as MMDET_MODELS
from torch import nn

from isvit_det.backbones import QUANTIZED
from isvit_det.backbones.others import advice
from isvit_det.core.errors import QuantError
from isvit_det.core.mixed import set_bits_, settle_protocol
from isvit_det.core.settings import QuantConfig
from isvit_det.core.swap import (QUANTIZED_LAYERS, make_float_,
                                 quantized_version, replace_)
from isvit_det.packed.loading import install_loading_
from isvit_det.registry import MODELS
from isvit_det.runtime.engine import attach_runtime_

# mmcv's layers only add a case for empty inputs.
PLAIN_FORWARDS = [
    layer.forward
    for layer in (nn.Linear, nn.Conv2d, wrappers.Linear, wrappers.Conv2d)
]
# Parameters of torch's modules that are operands of a product.
OPERANDS = ('weight', 'in_proj_weight')
# Names that MMDetection's heads give the layers whose outputs they predict
# with, or lists of these.
PREDICTORS = ('rpn_cls', 'rpn_reg', 'fc_cls', 'fc_reg', 'conv_logits',
              'fc_logits', 'retina_cls', 'retina_reg', 'conv_cls', 'conv_reg',
              'conv_centerness', 'atss_cls', 'atss_reg', 'atss_centerness',
              'gfl_cls', 'gfl_reg', 'vfnet_cls', 'cls_branches',
              'reg_branches')
LANGUAGE = 'a language model, which is not quantized'


@MODELS.register_module()
def quantized_detector(base: Union[str, type],
                       backbone: Mapping[str, Any],
                       quant: Optional[Mapping[str, Any]] = None,
                       float_layers: Optional[Mapping[str, str]] = None,
                       engine: str = 'auto',
                       **kwargs: Any) -> nn.Module:
    """Build a detector of MMDetection with quantized layers.

    This is a function, not a class: the model keeps the class of MMDetection,
    and every tool that builds the model gets the quantized one. With
    ``scope='detector'``, each Conv2d and Linear outside of the backbone is
    replaced by a quantized layer. Language models, transposed and deformable
    convolutions, and subclasses with another forward stay in float. A layer
    whose forward no prediction calls, such as one for training only or one
    whose weight another module uses, is turned back into float at the end of
    the calibration, and named in the run's config and in the packed file.

    Args:
        base: class of the detector or its name, such as ``'MaskRCNN'``.
        backbone: config of a quantized backbone, without ``quant``.
        quant: values of ``QuantConfig``.
        float_layers: layers outside of the backbone that stay in float with
            ``scope='detector'``, and the reason for each. Those of a packed
            file are in its header and need not be given.
        engine: what runs the quantized layers of the calibrated detector on
            a CPU: ``'native'``, integer kernels, wherever they can;
            ``'simulation'``, torch in float; ``'auto'``, the first where it
            is known to be faster. The environment variable
            ``ISVIT_DET_ENGINE`` overrides it.
        **kwargs: arguments of the detector's class.

    Returns:
        The detector. It loads float, calibrated and packed states strictly,
        and has these attributes: ``quant_config``; ``float_layers``, as
        above, to which calibrating or loading a packed file adds layers, and
        in which a language model counts as one; ``products``, the names of
        the modules that multiply activations by activations, or None before
        calibrating or loading a packed file; ``runtime``, whose ``engine``
        may be set at any time.

    Raises:
        QuantError: if ``base``, the backbone, ``float_layers`` or ``engine``
            cannot be used, nothing outside of the backbone could be
            quantized, or an override of bits covers nothing.
    """
    config = QuantConfig.from_dict(quant or {})
    if 'quant' in backbone:
        raise QuantError("model.backbone.quant: give these settings as "
                         "model.quant, where the heads read them too.")
    detector = MMDET_MODELS.get(base) if isinstance(base, str) else base
    if detector is None:
        raise QuantError(f'model.base: {base!r} is not a registered detector; '
                         "give the float config's model.type.")
    if isinstance(detector, type) and issubclass(detector, BaseMOTModel):
        raise QuantError(f'model.base: {base!r} reads videos, and calibration '
                         'and its evaluation read images; give a detector of '
                         'images.')
    name = backbone.get('type')
    kind = MMDET_MODELS.get(name) if isinstance(name, str) else name
    if not hasattr(kind, 'units'):
        instead = advice(name)
        more = f', or in a float config {instead}' if instead else ''
        raise QuantError(f'model.backbone.type: {name!r} is not a quantized '
                         'backbone; use one of '
                         f'{sorted(set(QUANTIZED.values()))}{more}.')
    model = MMDET_MODELS.build(
        dict(
            _without_checkpoints(kwargs),
            type=base,
            backbone=dict(backbone, quant=config)))
    model.float_layers, model.products = {}, None
    is_whole = config.scope == 'detector'
    if is_whole and quantize_layers_(model, model.backbone, config) == 0:
        raise QuantError("quant.scope: 'detector': there is no Conv2d and no "
                         "Linear outside of the backbone; use 'backbone'.")
    config = settle_protocol(model, config, end_layers(model))
    model.quant_config = config
    set_bits_(model, config)
    if is_whole:
        _keep_float_(model, float_layers)
    install_loading_(model, config)
    attach_runtime_(model, engine)
    return model


def _without_checkpoints(parts: Mapping[str, Any]) -> Dict[str, Any]:
    """Arguments without activation checkpointing (``num_cp``).

    It only saves memory in training, wraps the layers, and needs another
    package.
    """
    return {
        name:
        dict(part, num_cp=0)
        if isinstance(part, Mapping) and part.get('num_cp') else part
        for name, part in parts.items()
    }


def quantize_layers_(model: nn.Module, backbone: nn.Module,
                     config: QuantConfig) -> int:
    """Replace the Conv2d and Linear layers of a model but its backbone's.

    Those of a language model are left alone as well. A layer that occurs
    twice is replaced by the same quantized layer at both places.

    Returns:
        The number of layers replaced.
    """
    kept = set(backbone.modules())
    language = language_model(model)
    if language is not None:
        kept.update(language.modules())
    neck = getattr(model, 'neck', None)
    in_neck = set() if neck is None else set(neck.modules())
    replacements: Dict[nn.Module, nn.Module] = {
        layer:
        quantized_version(layer, config,
                          'neck' if layer in in_neck else 'heads')
        for layer in model.modules() if layer not in kept and _is_plain(layer)
    }
    replace_(model, replacements)
    return len(replacements)


def language_model(model: Any) -> Optional[nn.Module]:
    """The language model of a detector with text prompts, else None."""
    return getattr(model, 'language_model', None)


def end_layers(model: Any) -> List[str]:
    """Names of the quantized layers at the two ends of a detector.

    These are those of the backbone's first unit, and the predictors of
    MMDetection's heads, of a list of layers the last of each.
    """
    names = {
        layer: name
        for name, layer in model.named_modules()
        if isinstance(layer, QUANTIZED_LAYERS)
    }
    # An exported backbone has no units.
    units = model.backbone.units()
    first = set(units[0].module.modules()) if units else set()
    ends = [layer for layer in names if layer in first]
    for module in model.modules():
        for key in PREDICTORS:
            for one in _branches(module._modules.get(key)):
                own = [layer for layer in one.modules() if layer in names]
                ends += own[-1:]
    return [names[layer] for layer in dict.fromkeys(ends)]


def _branches(module: Optional[nn.Module]) -> List[nn.Module]:
    if module is None:
        return []
    if isinstance(module, nn.ModuleList):
        return [one for child in module for one in _branches(child)]
    return [module]


def _keep_float_(model: Any, layers: Optional[Mapping[str, str]]) -> None:
    if not isinstance(layers or {}, Mapping):
        raise QuantError(f'model.float_layers: {layers!r} is no dict; give '
                         'the reason for each name of a layer.')
    inside = set(model.backbone.modules())
    known = {
        name
        for name, layer in model.named_modules(remove_duplicate=False)
        if isinstance(layer, QUANTIZED_LAYERS) and layer not in inside
    }
    if language_model(model) is not None:
        known.add('language_model')
        model.float_layers = {'language_model': LANGUAGE}
    unknown = sorted(set(layers or {}) - known)
    if unknown:
        raise QuantError(f'model.float_layers: {unknown} are no Conv2d or '
                         'Linear outside of the backbone; leave them out.')
    model.float_layers.update(layers or {})
    make_float_(model, model.float_layers)


def _is_plain(module: nn.Module) -> bool:
    """Whether a layer computes what nn.Linear or nn.Conv2d computes."""
    # Some subclasses normalise weights, mask inputs or take offsets.
    return getattr(type(module), 'forward', None) in PLAIN_FORWARDS


def float_modules(model: nn.Module) -> List[Tuple[str, str]]:
    """Names and classes of the modules that compute products in float.

    These are the modules with a parameter of two or more dimensions named
    ``weight``, ``in_proj_weight`` or as in ``float_operands`` of their class,
    embeddings excepted; those of ``model.products``, which multiply
    activations by activations; and a language model as a whole.
    """
    in_float = []
    products = set(getattr(model, 'products', None) or ())
    language = language_model(model)
    inside = set() if language is None else set(language.modules())
    for name, module in model.named_modules():
        if module is not language:
            if isinstance(module, (*QUANTIZED_LAYERS, nn.Embedding)):
                continue
            if module in inside:
                continue
            if name not in products and not _holds_operand(module):
                continue
        in_float.append((name, type(module).__name__))
    return in_float


def _holds_operand(module: nn.Module) -> bool:
    own = dict(module.named_parameters(recurse=False))
    keys = (*OPERANDS, *getattr(module, 'float_operands', ()))
    return any(key in own and own[key].ndim >= 2 for key in keys)
