"""Converting a whole detector checkpoint of another project, or nothing."""
import argparse
import re
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Sequence, Tuple

import torch
from mmdet.registry import DATASETS, MODELS
from mmengine.registry import init_default_scope
from torch import Tensor

from isvit_det.commands.console import run_command
from isvit_det.core.errors import QuantError
from isvit_det.core.files import write_atomically
from isvit_det.core.plain import plain_metainfo
from isvit_det.core.weights import check_finite, check_values
from isvit_det.inputs.configs import config_errors, load_config

# Patterns of our names, and what makes the source's of their groups.
Names = Sequence[Tuple[str, Callable[..., str]]]
# Takes the path to read, the path to write, and the config.
ConvertFile = Callable[[Path, Path, str], None]
SHOWN_NAMES = 5
SHOWN_PROBLEMS = 7


def as_floats(weights: Mapping[str, Tensor]) -> Dict[str, Tensor]:
    """Weights by the same names, with floating tensors in float32.

    Raises:
        QuantError: naming a floating tensor of a type that is not supported.
    """
    floats = {
        name: value.float() if value.is_floating_point() else value
        for name, value in weights.items()
    }
    check_values(weights, floats)
    return floats


def drop_extras_(weights: Dict[str, Tensor], pattern: str) -> List[str]:
    """Remove the known entries that no model needs; their names."""
    extras = [name for name in weights if re.fullmatch(pattern, name)]
    for name in extras:
        del weights[name]
    return extras


def read_target(config: str) -> Tuple[Dict[str, Tensor], Dict[str, Any]]:
    """State dict of a config's model, and the metainfo of its data set."""
    cfg = load_config(config, None)
    with config_errors():
        init_default_scope(cfg.get('default_scope') or 'mmdet')
        dataset = cfg.test_dataloader.dataset
        metainfo = dict(
            DATASETS.get(dataset.type).METAINFO, **dataset.get('metainfo', {}))
        return MODELS.build(cfg.model).state_dict(), metainfo


def source_name(name: str, names: Names) -> str:
    """The source's name of one of our weights; '' if it has none."""
    for pattern, make in names:
        match = re.fullmatch(pattern, name)
        if match is not None:
            return make(*match.groups(default=''))
    return ''


def check_foreign(names: Mapping[str, str], kind: str, advice: str) -> None:
    """Raise if some of our weights, the keys, have no name in the source.

    Args:
        names: the source's name of each of our weights.
        kind: what the source is.
        advice: what to do.
    """
    foreign = [name for name, other in names.items() if not other]
    if foreign:
        raise QuantError(f'config: {len(foreign)} weights that {kind} '
                         f'lacks: {foreign[:SHOWN_NAMES]}; {advice}.')


def check_weights(source: Mapping[str, Tensor],
                  shapes: Mapping[str, Sequence[int]], advice: str) -> None:
    """Raise unless a file has the weights that are needed and no others.

    Args:
        source: the file's weights, extras aside.
        shapes: of the weights that are needed, by the source's names.
        advice: what to do.

    Raises:
        QuantError: naming weights that are missing, left over or of another
            shape.
    """
    missing = [name for name in shapes if name not in source]
    unknown = [name for name in source if name not in shapes]
    problems = [
        f'{len(names)} weights {what}: {names[:SHOWN_NAMES]}'
        for what, names in (('missing', missing), ('unknown', unknown))
        if names
    ]
    problems += [
        f'{name} is {tuple(source[name].shape)} instead of {tuple(shape)}'
        for name, shape in shapes.items()
        if name in source and tuple(source[name].shape) != tuple(shape)
    ]
    if problems:
        raise QuantError(f'checkpoint: {"; ".join(problems[:SHOWN_PROBLEMS])}'
                         f'; {advice}.')


def check_out(source: Path, out: Path) -> None:
    """Raise if the file to be written is a folder, or the file to be read."""
    if source.exists() and out.exists() and source.samefile(out):
        raise QuantError(f'out: {out} is the file that is read; give another '
                         'name.')
    if out.is_dir():
        raise QuantError(f'out: {out} is a folder; give the path of the file '
                         'to write.')


def save_float(path: Path, state: Mapping[str, Tensor],
               metainfo: Mapping[str, Any]) -> None:
    """Write a checkpoint of MMDetection 3, whole or not at all, and say so.

    Raises:
        QuantError: if a weight is NaN or infinite, or nothing can be written.
    """
    for name, value in state.items():
        check_finite(name, value)
    kept = dict(
        state_dict=dict(state),
        meta=dict(dataset_meta=plain_metainfo(metainfo)))
    write_atomically(path, lambda file: torch.save(kept, file))
    print(f'{path}: {len(state)} tensors, {path.stat().st_size / 1e6:.1f} MB')


def run_converter(convert_file: ConvertFile, args: argparse.Namespace) -> int:
    """Run a converter as a command.

    Args:
        convert_file: what it does.
        args: ``source``, ``out`` and ``config``.

    Returns:
        The status: 2 after a line that says what was wrong.
    """

    def work() -> None:
        check_out(args.source, args.out)
        convert_file(args.source, args.out, args.config)

    return run_command(work)
