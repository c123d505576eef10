"""The parts of a detector whose sensitivity is measured: units or layers."""
from dataclasses import dataclass
from typing import Any, List, Optional, Tuple

from mmdet.models.roi_heads.base_roi_head import BaseRoIHead

from isvit_det.core.mixed import named_parts


@dataclass(frozen=True)
class Part:
    """A part of a detector that gets bits of its own.

    Attributes:
        name: in the detector.
        layers: names of its quantized layers and products.
        unit: index of the backbone's unit that it is, or is in; None for a
            part of neck or heads.
        child: name of the child of the detector that it is in.
    """
    name: str
    layers: Tuple[str, ...]
    unit: Optional[int]
    child: str


def list_parts(model: Any, by: str = 'unit') -> List[Part]:
    """The parts of a detector, in the order in which they run.

    By unit, these are the units of the backbone's calibration, and with
    ``scope='detector'`` the children of the detector beside it, of a RoI head
    its own children. By layer, they are all quantized layers and products.

    Args:
        model: of ``quantized_detector``.
        by: ``'unit'`` or ``'layer'``.
    """
    prefixes: List[Tuple[str, Optional[int], str]] = [
        (f'backbone.{unit.name}', index, 'backbone')
        for index, unit in enumerate(model.backbone.units())
    ]
    for name, child in model.named_children():
        if name == 'backbone':
            continue
        inner = [name]
        if isinstance(child, BaseRoIHead):
            inner = [f'{name}.{part}' for part, _ in child.named_children()]
        prefixes += [(one, None, name) for one in inner]
    parts: List[Part] = []
    names = [name for name, _ in named_parts(model)]
    for prefix, unit, child in prefixes:
        inside = tuple(name for name in names
                       if name == prefix or name.startswith(f'{prefix}.'))
        if by == 'layer':
            parts += [Part(name, (name, ), unit, child) for name in inside]
        elif inside:
            parts.append(Part(prefix, inside, unit, child))
    return parts
