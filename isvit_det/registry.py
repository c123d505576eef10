"""The registries of isvit_det: children of MMEngine's root ones.

``type='isvit_det.NAME'`` resolves from any config, under any
``default_scope`` and without ``custom_imports``: MMEngine imports the package
named by the scope, then the ``locations`` given here. All other types in our
configs are MMDetection's. Therefore a type without a scope, in a config that
is inherited as ``isvit_det::FOLDER/NAME.py``, is looked up in MMDetection.
"""
from typing import Any, Optional

from isvit_det.host import check_host

check_host()

import mmdet.registry  # noqa: F401
from mmengine import registry as mmengine_registry
from mmengine.registry import Registry


class ScopedRegistry(Registry):
    """Finds types of its own, of MMDetection and of MMEngine, in this order.

    Args:
        parent: the root registry that it is a child of.
        locations: modules to import before types are looked up.
    """

    def __init__(self, parent: Registry, *locations: str) -> None:
        super().__init__(
            parent.name,
            parent=parent,
            scope='isvit_det',
            locations=list(locations))

    def get(self, key: str) -> Optional[Any]:
        self.import_from_location()
        if '.' in key or key in self.module_dict:
            return super().get(key)
        return self.parent.get(f'mmdet.{key}')


MODELS = ScopedRegistry(mmengine_registry.MODELS, 'isvit_det.backbones',
                        'isvit_det.necks', 'isvit_det.detector',
                        'isvit_det.export.engine_backbone')
HOOKS = ScopedRegistry(mmengine_registry.HOOKS, 'isvit_det.engine')
DATASETS = ScopedRegistry(mmengine_registry.DATASETS, 'isvit_det.datasets')
# Registries of kinds in which this package has no types. MMEngine asks each of
# them for a module to import.
OTHERS = [
    ScopedRegistry(root, 'isvit_det.registry')
    for root in vars(mmengine_registry).values()
    if isinstance(root, Registry) and 'isvit_det' not in root.children
]
