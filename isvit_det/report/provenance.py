"""Provenance: the versions, settings and data of a calibration."""
import hashlib
import json
import platform
from importlib import import_module
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Protocol, Sequence

import torch

from isvit_det.core.digests import checksum, file_hash
from isvit_det.core.distributed import world_size
from isvit_det.core.plain import plain
from isvit_det.core.settings import SOSConfig
from isvit_det.version import __version__

PACKAGES = ('torch', 'mmengine', 'mmcv', 'mmdet', 'timm')


class DrawnImages(Protocol):
    """Calibration images of any source."""
    asked: int

    def __len__(self) -> int:
        ...

    def ids(self) -> List[Any]:
        ...

    def names(self) -> List[str]:
        ...


def describe_origin(model: Any, checkpoint: Optional[str], images: DrawnImages,
                    sos: SOSConfig) -> Dict[str, Any]:
    """Everything that the codes of a calibration depend on.

    Args:
        model: with float weights, not calibrated.
        checkpoint: path or address of the weights.
        images: the calibration images.
        sos: settings of the run.
    """
    path = Path(checkpoint or '')
    return dict(
        versions=versions(),
        quant=model.quant_config.to_dict(),
        sos=sos.to_dict(),
        seed=sos.seed,
        images_asked=images.asked,
        images_used=len(images),
        image_ids=images.ids(),
        image_files=images.names(),
        float_checkpoint=path.name,
        float_checkpoint_sha256=file_hash(path) if path.is_file() else None,
        float_weights_sha256=checksum(model.state_dict()))


def versions() -> Dict[str, str]:
    """Versions of packages by import name."""
    packages = {name: import_module(name).__version__ for name in PACKAGES}
    return dict(
        packages, isvit_det=__version__, python=platform.python_version())


def fingerprint(origin: Mapping[str, Any], hashes: Sequence[str],
                configs: Sequence[Any], model: Any) -> str:
    """A digest of everything that the codes depend on.

    Args:
        origin: of ``describe_origin``.
        hashes: of the contents of the calibration images.
        configs: of the model and of the preparation of images.
        model: on its device.
    """
    # A renamed or re-saved file has the same weights.
    unnamed = {
        key: value
        for key, value in origin.items()
        if key not in ('float_checkpoint', 'float_checkpoint_sha256')
    }
    depends = [
        unnamed,
        hashes,
        configs,
        # The order of float sums depends on these.
        str(next(model.parameters()).device),
        torch.get_num_threads(),
        world_size()
    ]
    text = json.dumps(plain(depends), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
