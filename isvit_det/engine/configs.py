"""Configs: reading them, and turning a float one into the quantized one."""
import contextlib
import re
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, Optional

from mmdet.evaluation import CocoMetric
from mmdet.registry import METRICS
from mmengine.config import Config
from mmengine.hub import get_config

from isvit_det.backbones import QUANTIZED
from isvit_det.backbones.others import advice
from isvit_det.core.errors import QuantError
from isvit_det.core.files import disk_error
from isvit_det.core.spec import QuantConfig, optimises, parse_bits

DETECTOR = 'isvit_det.quantized_detector'
HOOK = 'isvit_det.SOSCalibrationHook'
# Of mmdet, for measures that this project does not report.
OTHER_METRICS = ('CocoPanopticMetric', 'LVISMetric', 'LVISFixedAPMetric')
# What MMDetection's DETRs write into the config that they are built from, and
# refuse to find there.
WRITTEN = {
    'bbox_head': ('share_pred_layer', 'num_pred_layer', 'as_two_stage'),
    'dn_cfg': ('num_classes', 'embed_dims', 'num_matching_queries')
}
# What MMEngine and the classes it builds raise for a wrong config.
CONFIG_ERRORS = (KeyError, TypeError, ValueError, AttributeError, OSError,
                 AssertionError, ImportError, SyntaxError, NotImplementedError)


def load_config(name: str, overrides: Optional[Mapping[str, Any]]) -> Config:
    """Read a config.

    Args:
        name: path of a file, or ``mmdet::FOLDER/NAME.py``.
        overrides: values by dotted key, as ``--cfg-options`` gives them.

    Raises:
        QuantError: if there is no such config or it cannot be read.
    """
    with config_errors():
        if name.startswith('mmdet::'):
            cfg = get_config(name)
        elif not Path(name).is_file():
            raise QuantError(f'config: there is no file {name}; give the path '
                             'of a config, or mmdet::FOLDER/NAME.py.')
        else:
            cfg = Config.fromfile(name)
        cfg.merge_from_dict(dict(overrides or {}))
    return cfg


@contextlib.contextmanager
def config_errors() -> Iterator[None]:
    """Turn what a wrong config raises into one line for its author."""
    try:
        yield
    except QuantError:
        raise
    except FileNotFoundError as error:
        what = f'there is no {error.filename}' if error.filename else error
        raise QuantError(f'config: {what}; check data_root, ann_file and '
                         '_base_.') from error
    except CONFIG_ERRORS as error:
        _refuse_imports(str(error))
        full = disk_error(error)
        if full is not None:
            raise full from error
        lines = str(error).strip().splitlines() or ['no message']
        raise QuantError(
            f'config: {type(error).__name__}: {lines[0]}') from error
    except RuntimeError as error:
        # mmdet's word on the packages that some of its classes need.
        if 'is not installed' not in str(error):
            raise
        raise QuantError(f'config: {error}') from error


def _refuse_imports(message: str) -> None:
    """Raise if MMEngine says that custom imports of a config failed."""
    found = re.search(r"custom modules from .*'imports': (\[.*?\]|'.*?')",
                      message)
    if found is None:
        return
    more = ''
    if re.search('mmpretrain|mmcls', found[1]):
        more = ("; backbones of theirs are not supported: use MMDetection's "
                "'SwinTransformer' or 'isvit_det.VisionTransformer'")
    raise QuantError(f'custom_imports: {found[1]} cannot be imported; install '
                     f'the package, or take it out of the config{more}.')


def quantize_config_(cfg: Config, quant: Mapping[str, Any]) -> None:
    """Make a config's model quantized, in place.

    A float config with a supported backbone becomes what our own configs
    are, even after a model was built from it; one of ours takes the settings
    over its own.

    Args:
        cfg: a whole config.
        quant: values of ``QuantConfig`` that the user gave.

    Raises:
        QuantError: if there is no model, its backbone is not supported, or
            a setting is wrong.
    """
    model = cfg.get('model')
    if model is None:
        raise QuantError(f'config: {cfg.filename} has no model; give a '
                         "detector's config.")
    if model.get('type') != DETECTOR:
        backbone = model.get('backbone', {})
        name = backbone.get('type')
        if name not in QUANTIZED:
            instead = advice(name) or (
                f'expected one of {sorted(QUANTIZED)}, or one of '
                f'{sorted(set(QUANTIZED.values()))} in a {DETECTOR}')
            raise QuantError(f'model.backbone.type: {name!r} is not '
                             f'supported; {instead}.')
        backbone['type'] = QUANTIZED[name]
        for part, keys in WRITTEN.items():
            for key in keys if isinstance(model.get(part), dict) else ():
                model[part].pop(key, None)
        model['base'] = model['type']
        model['type'] = DETECTOR
    settings = dict(model.get('quant') or {})
    # There are two ways to name bits; the user's one counts.
    if 'bits' in quant:
        settings.pop('weight_bits', None)
        settings.pop('act_bits', None)
    elif 'bits' in settings and {'weight_bits', 'act_bits'} & set(quant):
        both = parse_bits(settings.pop('bits'))
        settings.update(zip(('weight_bits', 'act_bits'), both))
    settings.update(quant)
    QuantConfig.from_dict(settings)
    model['quant'] = settings


def configure_hook_(cfg: Config,
                    sos: Mapping[str, Any],
                    store_gb: Optional[float] = None) -> None:
    """Give a quantized config its calibration hook, in place.

    Iterations that a config asks for are those of a method that optimises:
    one that does not takes none, unless ``sos`` says otherwise.

    Args:
        cfg: a whole config, after ``quantize_config_``.
        sos: values of ``SOSConfig`` that the user gave.
        store_gb: memory for activations; None leaves it as it is.
    """
    hooks: List[Dict[str, Any]] = list(cfg.get('custom_hooks') or [])
    ours = [hook for hook in hooks if hook.get('type') == HOOK]
    if not ours:
        ours = [dict(type=HOOK)]
        hooks += ours
    hook = ours[0]
    settings = dict(hook.get('sos') or {})
    method = cfg['model']['quant'].get('method', QuantConfig.method)
    if not optimises(method):
        settings.pop('iters', None)
        settings.pop('lr', None)
    settings.update(sos)
    hook['sos'] = settings
    if store_gb is not None:
        hook['store_gb'] = store_gb
    cfg['custom_hooks'] = hooks


def check_evaluator(cfg: Config) -> None:
    """Check that a config measures COCO AP of boxes or masks.

    Beside it there may be metrics of other kinds.

    Raises:
        QuantError: naming the metrics if none gives that, or if one is for
            panoptic segmentation or LVIS.
    """
    metrics = cfg.get('test_evaluator')
    if isinstance(metrics, dict):
        metrics = metrics.get('metrics', metrics)
    if not isinstance(metrics, (list, tuple)):
        metrics = [metrics]
    metrics = [dict(metric or {}) for metric in metrics]
    names = [_class_name(metric.get('type')) for metric in metrics]
    refused = [name for name in names if name in OTHER_METRICS]
    if refused:
        raise QuantError(
            f'test_evaluator: {", ".join(refused)} is not supported; give '
            "CocoMetric with metric 'bbox' or 'segm', and a data set with "
            'instance annotations in COCO format.')
    if not any(map(_gives_precision, metrics)):
        raise QuantError(
            f'test_evaluator: {", ".join(names)} gives no AP of boxes or '
            "masks; give CocoMetric with metric 'bbox' or 'segm', and without "
            'format_only.')


def _gives_precision(metric: Mapping[str, Any]) -> bool:
    kind = metric.get('type')
    if isinstance(kind, str):
        kind = METRICS.get(kind)
    measures = metric.get('metric', 'bbox')
    if isinstance(measures, str):
        measures = [measures]
    return (isinstance(kind, type) and issubclass(kind, CocoMetric)
            and not metric.get('format_only')
            and not {'bbox', 'segm'}.isdisjoint(measures))


def _class_name(kind: Any) -> str:
    """Name of a class, which a config gives as such or by its scope."""
    return getattr(kind, '__name__', None) or str(kind).split('.')[-1]
