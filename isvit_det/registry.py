"""The registries of isvit_det: children of MMEngine's root ones.

``type='isvit_det.NAME'`` resolves from any config, under any
``default_scope`` and without ``custom_imports``: MMEngine imports the package
named by the scope, then the ``locations`` given here.
"""
from isvit_det.host import check_host

check_host()

from mmengine.registry import DATASETS as MMENGINE_DATASETS
from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import Registry

MODELS = Registry(
    'model',
    parent=MMENGINE_MODELS,
    scope='isvit_det',
    locations=['isvit_det.backbones', 'isvit_det.necks', 'isvit_det.detector'])
HOOKS = Registry(
    'hook',
    parent=MMENGINE_HOOKS,
    scope='isvit_det',
    locations=['isvit_det.engine'])
DATASETS = Registry(
    'dataset',
    parent=MMENGINE_DATASETS,
    scope='isvit_det',
    locations=['isvit_det.datasets'])
