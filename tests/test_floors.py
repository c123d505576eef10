"""Imports run downward only; core and calibration need torch alone."""
import ast
import sys
from pathlib import Path
from typing import List

import pytest

import isvit_det

PACKAGE = Path(isvit_det.__file__).parent
# Low to high; parts of one floor do not know each other. '' is the package.
FLOORS = (
    {'version', '__version__', 'scope'},
    {''},
    {'core'},
    {'host'},
    {'registry', 'screen'},
    {'packed'},
    {'calibration', 'backbones', 'necks', 'datasets'},
    {'checkpoint'},
    {'plans'},
    {'runtime', 'costs', 'export'},
    {'detector'},
    {'inputs'},
    {'evaluation'},
    {'report'},
    {'page'},
    {'engine'},
    {'sensitivity'},
    {'classifiers', 'apis'},
    {'commands'},
    {'__main__'},
)
# These run on any network: torch alone, and nothing of the border.
TORCH_ONLY = {'', 'version', 'core', 'packed', 'calibration'}
BORDER = {'host', 'registry'}


def find_violations(module: str, source: str, is_package: bool = False):
    """List the imports of ``source``, the text of ``module``, not allowed.

    Args:
        module: dotted name, such as ``isvit_det.core.layers``.
        source: its text.
        is_package: whether it is an ``__init__.py``, for relative imports.
    """
    part = _second(module)
    found = []
    for name in _imported_names(module, ast.parse(source), is_package):
        top = name.split('.')[0]
        if top == 'isvit_det':
            if not _may_import(part, _second(name)):
                found.append(f'{module} imports {name}, not of a lower floor')
        elif (part in TORCH_ONLY and top != 'torch'
              and top not in sys.stdlib_module_names):
            found.append(f'{module} imports {name}, but is torch only')
    return found


def _second(name: str) -> str:
    return (name.split('.') + [''])[1]


def _imported_names(module: str, tree: ast.AST, is_package: bool) -> List[str]:
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ''
            if node.level:
                up = node.level - is_package
                parents = module.split('.')
                parents = parents[:len(parents) - up]
                base = '.'.join(parents + ([base] if base else []))
            # "from isvit_det import core" names the part in its second half.
            if base == 'isvit_det':
                names += [f'{base}.{alias.name}' for alias in node.names]
            else:
                names.append(base)
    return names


def _may_import(part: str, imported: str) -> bool:
    if part in TORCH_ONLY and imported in BORDER:
        return False
    return part == imported or _floor(imported) < _floor(part)


def _floor(part: str) -> int:
    for level, parts in enumerate(FLOORS):
        if part in parts:
            return level
    raise ValueError(f'isvit_det.{part} has no floor: give it one in FLOORS')


def _modules():
    for path in sorted(PACKAGE.rglob('*.py')):
        parts = path.relative_to(PACKAGE.parent).with_suffix('').parts
        is_package = parts[-1] == '__init__'
        yield '.'.join(parts[:-1] if is_package else parts), path, is_package


@pytest.mark.parametrize(
    'module, path, is_package',
    [pytest.param(*module, id=module[0]) for module in _modules()])
def test_imports_run_downward_only(module, path, is_package):
    _floor(_second(module))
    source = path.read_text(encoding='utf-8')
    assert find_violations(module, source, is_package) == []


@pytest.mark.parametrize('module, source', [
    ('isvit_det.core.layers', 'import mmcv.ops'),
    ('isvit_det.core.layers', 'def f():\n    from timm.layers import Mlp'),
    ('isvit_det.core.layers', 'from isvit_det.registry import MODELS'),
    ('isvit_det.core.layers', 'from isvit_det.host import check_host'),
    ('isvit_det.core.layers', 'from .. import engine'),
    ('isvit_det.core.layers', 'from ..engine import hooks'),
    ('isvit_det.packed.state', 'from isvit_det.calibration import sos'),
    ('isvit_det.packed.loading', 'import mmengine'),
    ('isvit_det.calibration.sos', 'from mmengine import Config'),
    ('isvit_det.calibration.sos', 'from isvit_det.registry import HOOKS'),
    ('isvit_det.calibration.sos', 'import isvit_det.backbones.swin'),
    ('isvit_det.backbones.swin', 'from isvit_det import calibration'),
    ('isvit_det.backbones.swin', 'from isvit_det.detector import build'),
    ('isvit_det.checkpoint', 'from isvit_det.detector import build'),
    ('isvit_det.inputs.configs', 'from isvit_det.evaluation import loop'),
    ('isvit_det.report.tables', 'import isvit_det.engine.run'),
    ('isvit_det.engine.run', 'import isvit_det.commands.console'),
    ('isvit_det.apis', 'import isvit_det.classifiers'),
    ('isvit_det.version', 'import isvit_det'),
    ('isvit_det.calibration.sos', 'import tqdm'),
    ('isvit_det', 'from isvit_det.core import settings'),
])
def test_a_forbidden_import_is_found(module, source):
    assert len(find_violations(module, source)) == 1


@pytest.mark.parametrize('module, source', [
    ('isvit_det.core.layers', 'import math\nimport torch.nn.functional as F'),
    ('isvit_det.core.layers', 'from .settings import QuantConfig'),
    ('isvit_det.core.layers', 'import isvit_det'),
    ('isvit_det.core.layers', 'from isvit_det.version import __version__'),
    ('isvit_det.registry', 'from isvit_det.host import check_host'),
    ('isvit_det.backbones.swin', 'import mmdet, isvit_det.core.units'),
    ('isvit_det.engine.hooks', 'from isvit_det.calibration import sos'),
    ('isvit_det.engine.hooks', 'from isvit_det import __version__, core'),
])
def test_an_allowed_import_is_not(module, source):
    assert find_violations(module, source) == []


def test_a_relative_import_in_a_package_starts_at_itself():
    source = 'from .settings import QuantConfig'
    assert find_violations('isvit_det.core', source, is_package=True) == []


def test_a_new_part_must_be_given_a_floor():
    with pytest.raises(ValueError, match='isvit_det.novel has no floor'):
        find_violations('isvit_det.engine.hooks', 'import isvit_det.novel')
