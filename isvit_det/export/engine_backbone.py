"""EngineBackbone: an exported backbone in a detector of MMDetection."""
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import torch
from mmengine.model import BaseModule
from torch import Tensor

from isvit_det.core.errors import QuantError
from isvit_det.core.settings import QuantConfig
from isvit_det.core.units import Unit
from isvit_det.export.backbones import IMAGE
from isvit_det.export.engines import Loaded, load
from isvit_det.export.files import read_facts
from isvit_det.packed.keys import CODES
from isvit_det.registry import MODELS


def _drop_weights(module: Any, state: Dict[str, Tensor], prefix: str, *args:
                  Any) -> None:
    """Take the weights of the backbone out of a state, in place.

    Raises:
        QuantError: if the file that is loaded has quantized heads, and the
            detector float ones. MMEngine would only warn.
    """
    own = [key for key in state if key.startswith(prefix)]
    is_packed = any(key.endswith(f'.{CODES}') for key in own)
    if is_packed and module.in_float and module.facts['scope'] == 'detector':
        raise QuantError(
            'packed file: its neck and heads are quantized, and the config '
            "has a float detector; give model.type='isvit_det.quantized_"
            "detector', as the config beside the packed file has it.")
    for key in own:
        del state[key]


@MODELS.register_module()
class EngineBackbone(BaseModule):
    """Runs a file of ``export_det`` in its engine, one image after another.

    In a config it takes the place of the backbone that was exported; all else
    of the detector stays as it is, and loads the same packed file, whose
    weights of the backbone are not used. Nothing is calibrated or trained
    with it.

    Args:
        file: path of the ``.onnx`` or ``.xml``.
        engine: ``'openvino'`` or ``'onnxruntime'``.
        threads: as many as the engine may use; 0 leaves it to the engine.
        quant: settings of the detector, if it is quantized, whose bits have
            to be those of the file.
        init_cfg: is not used; weights are in the file.

    Raises:
        QuantError: if the file cannot be read by the engine, was not written
            by this version, or has other bits.
    """
    weights_elsewhere = True

    def __init__(self,
                 file: str,
                 engine: str = 'openvino',
                 threads: int = 0,
                 quant: Any = None,
                 init_cfg: Any = None) -> None:
        super().__init__()
        self.file, self.engine, self.threads = Path(file), engine, threads
        self._loaded: Optional[Loaded] = None
        self.facts = read_facts(self.loaded, self.file)
        self.in_float = quant is None
        if quant is not None:
            bits = QuantConfig.make(quant).label
            if bits != self.facts['bits']:
                raise QuantError(
                    f'model.backbone.file: {file} has {self.facts["bits"]}, '
                    f'and the config says {bits}; export the packed file '
                    'that is tested.')
        self._register_load_state_dict_pre_hook(
            _drop_weights, with_module=True)

    @property
    def loaded(self) -> Loaded:
        """The file in its engine."""
        if self._loaded is None:
            self._loaded = load(self.engine, str(self.file), self.threads)
        return self._loaded

    def __getstate__(self) -> Dict[str, Any]:
        # Engines cannot be copied; a copy loads the file again.
        return dict(vars(self), _loaded=None)

    def forward(self, images: Tensor) -> Tuple[Tensor, ...]:
        """Images (B, 3, H, W) to the maps of the backbone.

        Raises:
            QuantError: if the file is for images of another size.
        """
        size, fixed = list(images.shape[-2:]), self.facts['shape']
        if fixed is not None and size != fixed:
            raise QuantError(
                f'model.backbone.file: {self.file} is for images of '
                f'{"x".join(map(str, fixed))}, got {"x".join(map(str, size))};'
                ' export it with this --shape, or with --shape dynamic.')
        pixels = images.detach().float().cpu()
        runs = [
            self.loaded.run({IMAGE: pixels[index:index + 1].numpy()})
            for index in range(len(pixels))
        ]
        return tuple(
            torch.cat([torch.from_numpy(one) for one in maps]).to(images)
            for maps in zip(*runs))

    def units(self) -> List[Unit]:
        """Nothing: what is exported cannot be calibrated."""
        return []
