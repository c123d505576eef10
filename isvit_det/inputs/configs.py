"""Configs: reading them, and turning a float one into a quantized one."""
import contextlib
import importlib
import re
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, Optional

from mmengine.config import Config
from mmengine.hub import get_config

from isvit_det.backbones import QUANTIZED
from isvit_det.backbones.others import advice
from isvit_det.core.checks import parse_bits
from isvit_det.core.errors import (QuantError, describe_error,
                                   describe_with_place)
from isvit_det.core.files import disk_error
from isvit_det.core.presets import optimises
from isvit_det.core.settings import QuantConfig
from isvit_det.inputs.config_forms import (class_of, has_lists, name_types_,
                                           restore_tuples_)
from isvit_det.inputs.hooks import is_calibration_hook
from isvit_det.inputs.overrides import check_overrides

DETECTOR = 'isvit_det.quantized_detector'
HOOK = 'isvit_det.SOSCalibrationHook'
# Endings of the files that MMEngine reads as configs.
FORMATS = ('.py', '.json', '.yaml', '.yml')
# Keys that MMDetection's DETRs add to the config from which they are built,
# and refuse if a config has them.
ADDED_BY_DETRS = {
    'bbox_head': ('share_pred_layer', 'num_pred_layer', 'as_two_stage'),
    'dn_cfg': ('num_classes', 'embed_dims', 'num_matching_queries')
}
# Exceptions of MMEngine, and of the classes that it builds, for wrong configs,
# whose messages are sufficient. For others the place in the code is named.
CONFIG_ERRORS = (KeyError, TypeError, ValueError, AttributeError, OSError,
                 ImportError, SyntaxError)


def load_config(name: str, overrides: Optional[Mapping[str, Any]]) -> Config:
    """Read a config of any format, and normalise it.

    Args:
        name: path of a file, or ``mmdet::FOLDER/NAME.py``, or
            ``isvit_det::FOLDER/NAME.py``.
        overrides: values by dotted key, as in ``--cfg-options``.

    Raises:
        QuantError: if the config does not exist or cannot be read, or an
            override does not fit it.
    """
    overrides = dict(overrides or {})
    with config_errors(), _user_code(name):
        if name.startswith(('mmdet::', 'isvit_det::')):
            cfg = _config_of_package(name)
        else:
            _check_path(name)
            cfg = Config.fromfile(name)
        check_overrides(cfg._cfg_dict, overrides)
        cfg.merge_from_dict(overrides)
        name_types_(cfg)
        if not str(cfg.filename).endswith('.py') or has_lists(overrides):
            restore_tuples_(cfg._cfg_dict)
    return cfg


def _check_path(name: str) -> None:
    """Raise unless a name is the path of a file of a config's format."""
    path = Path(name)
    if not path.is_file():
        fault = (f'{name} is a folder' if name and path.is_dir() else
                 f'there is no file {name or repr(name)}')
        raise QuantError(f'config: {fault}; give the path of a config, '
                         'mmdet::FOLDER/NAME.py or isvit_det::FOLDER/NAME.py.')
    if path.suffix not in FORMATS:
        raise QuantError(f'config: {name} does not end with one of '
                         f'{list(FORMATS)}; give a config of MMEngine.')


def _config_of_package(name: str) -> Config:
    """Read a config that an installed package has."""
    package, _, path = name.partition('::')
    root = importlib.import_module(package).__path__[0]
    folder = Path(root, '.mim', 'configs')
    if not (folder / path).is_file():
        raise QuantError(f'config: {package} has no config {path!r}; give '
                         f'{package}::FOLDER/NAME.py, a file below {folder}.')
    return get_config(name)


@contextlib.contextmanager
def _user_code(name: str) -> Iterator[None]:
    """Name the config in its exceptions; it may run any code."""
    try:
        yield
    except (QuantError, *CONFIG_ERRORS):
        raise
    except Exception as error:
        raise QuantError(f'config: {name} cannot be read: '
                         f'{describe_error(error)}') from error


@contextlib.contextmanager
def config_errors() -> Iterator[None]:
    """Turn exceptions from a wrong config into QuantErrors."""
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
        # MMEngine raises this if there are no images to concatenate.
        if 'at least one array' in str(error):
            raise QuantError('test_dataloader: no image is evaluated; check '
                             'ann_file, indices and filter_cfg.') from error
        raise QuantError(f'config: {describe_error(error)}') from error
    except Exception as error:
        # Messages of MMDetection on packages that some classes need.
        is_plain = any(
            words in str(error)
            for words in ('not installed', 'Failed to import'))
        reason = str(error) if is_plain else describe_with_place(error)
        raise QuantError(f'config: {reason}') from error


def _refuse_imports(message: str) -> None:
    """Raise if the message is of failed custom imports."""
    match = re.search(r"custom modules from .*'imports': (\[.*?\]|'.*?')",
                      message)
    if match is None:
        return
    more = ''
    if re.search('mmpretrain|mmcls', match[1]):
        more = ("; backbones of theirs are not supported: use MMDetection's "
                "'SwinTransformer' or 'isvit_det.VisionTransformer'")
    raise QuantError(f'custom_imports: {match[1]} cannot be imported; install '
                     f'the package, or take it out of the config{more}.')


def quantize_config_(cfg: Config, quant: Mapping[str, Any]) -> None:
    """Make the model of a config quantized, in place.

    A float config with a supported backbone gets the form of this project's
    own configs, also after a model was built from it. In a quantized config,
    ``quant`` replaces settings.

    Args:
        cfg: a whole config.
        quant: values of ``QuantConfig`` that the user gave.

    Raises:
        QuantError: if there is no model, its backbone is not supported, or
            a setting is wrong.
    """
    model = cfg.get('model')
    if not isinstance(model, dict):
        raise QuantError(f'config: {cfg.filename} has no model; give a '
                         "detector's config.")
    if model.get('type') != DETECTOR:
        backbone = model.get('backbone')
        if not isinstance(backbone, dict):
            raise QuantError(f'config: model.backbone: expected a dict, got '
                             f'{backbone!r}.')
        name = backbone.get('type')
        if name not in QUANTIZED:
            instead = advice(name) or (
                f'expected one of {sorted(QUANTIZED)}, or one of '
                f'{sorted(set(QUANTIZED.values()))} in a {DETECTOR}')
            raise QuantError(f'model.backbone.type: {name!r} is not '
                             f'supported; {instead}.')
        backbone['type'] = QUANTIZED[name]
        for part, keys in ADDED_BY_DETRS.items():
            for key in keys if isinstance(model.get(part), dict) else ():
                model[part].pop(key, None)
        model['base'] = model['type']
        model['type'] = DETECTOR
    settings = model.get('quant') or {}
    if not isinstance(settings, dict):
        raise QuantError(
            f'config: model.quant: expected a dict of settings, got '
            f'{settings!r}.')
    settings = dict(settings)
    # Bits can be given in two ways; what the user gave has precedence.
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
    """Add the calibration hook to a quantized config, or change it, in place.

    The iterations in a config are for a method with optimisation. A method
    without ignores them, unless ``sos`` has iterations.

    Args:
        cfg: a whole config, after ``quantize_config_``.
        sos: values of ``SOSConfig`` that the user gave.
        store_gb: memory for activations in GB (1e9 bytes); None keeps the
            value of the config.

    Raises:
        QuantError: if the config's hooks are no list of dicts.
    """
    configured = cfg.get('custom_hooks') or []
    if not isinstance(configured, (list, tuple)) or not all(
            isinstance(hook, dict) for hook in configured):
        raise QuantError(
            f'config: custom_hooks: expected a list of dicts, got '
            f'{configured!r}.')
    hooks: List[Dict[str, Any]] = list(configured)
    calibrating = [
        hook for hook in hooks
        if is_calibration_hook(class_of(hook.get('type')))
    ]
    if not calibrating:
        calibrating = [dict(type=HOOK)]
        hooks += calibrating
    hook = calibrating[0]
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


def is_replaceable(path: Path) -> bool:
    """Whether a config does not exist, or was written by a run."""
    if not path.exists():
        return True
    text = path.read_text(errors='replace')
    return DETECTOR in text and not re.search(r'^_base_|#', text, re.M)
