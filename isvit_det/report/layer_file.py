"""The file of layer statistics: what each layer of a quantized model does."""
import io
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Optional

import numpy as np

from isvit_det.core.files import write_atomically

FORMAT_VERSION = 1
# Name of the file, in the work directory.
LAYERS = 'layers.npz'
LAYERS_PACKED = 'layers_packed.npz'
NUM_BINS = 96
MAX_CODES = 256


@dataclass
class SiteRecord:
    """One quantizer of activations, and the values that it was given.

    Attributes:
        place: ``'input'`` of a layer, or ``'left'`` or ``'right'`` operand of
            a product.
        kind: class name of the quantizer.
        bits: width of its codes.
        is_log: whether ``low`` and ``high`` are of -log2 of the values.
        low: left end of the histogram.
        high: right end of the histogram.
        clipped: number of values outside of what the codes represent.
        total: number of values.
        levels: values of the codes, shape (2**bits,); empty if the quantizer
            has a scale for each channel.
        counts: histogram, shape (96,). The first and the last bin have the
            values beyond them, too.
    """
    place: str
    kind: str
    bits: int
    is_log: bool = False
    low: float = 0.
    high: float = 0.
    clipped: int = 0
    total: int = 0
    levels: np.ndarray = field(default_factory=lambda: np.zeros(0))
    counts: np.ndarray = field(
        default_factory=lambda: np.zeros(NUM_BINS, np.int64))

    @property
    def clipped_share(self) -> Optional[float]:
        """Share of the values that are clipped; None without values."""
        return self.clipped / self.total if self.total else None


@dataclass
class LayerRecord:
    """One layer, or one product of activations.

    Attributes:
        name: in the model.
        part: the child of the model that it belongs to.
        kind: ``'linear'``, ``'conv'`` or ``'matmul'``.
        weight_bits: 32 in float; None for a product of activations.
        num_weights: number of its weights.
        macs: multiplications of one image.
        error: squared error of its output relative to the squared norm of
            what it computes from the same input without quantization; None
            in float and where it did not run.
        error_of_acts: the same with quantized activations and weights as
            they were.
        sites: its quantizers of activations, none in float.
        weight_counts: histogram of the weights in units of codes, from -1/2
            to 2**bits - 1/2, shape (96,); empty without weights, and in
            float.
        code_counts: how many weights have each code, shape (2**bits,).
        factor_bits: product of the widths of what is multiplied.
    """
    name: str
    part: str
    kind: str
    weight_bits: Optional[int] = None
    num_weights: int = 0
    macs: float = 0.
    error: Optional[float] = None
    error_of_acts: Optional[float] = None
    sites: List[SiteRecord] = field(default_factory=list)
    weight_counts: np.ndarray = field(default_factory=lambda: np.zeros(0))
    code_counts: np.ndarray = field(default_factory=lambda: np.zeros(0))
    factor_bits: int = 32 * 32

    @property
    def is_quantized(self) -> bool:
        """Whether it has quantizers."""
        return bool(self.sites)

    @property
    def bops(self) -> float:
        """Bit operations of one image."""
        return self.macs * self.factor_bits


@dataclass
class LayerFile:
    """Statistics of all layers of a model.

    Attributes:
        num_images: on which they were measured.
        engine: in which the seconds were measured.
        seconds: of an image, by part of the model, with ``'all'`` for the
            whole; empty if they were not measured.
        layers: in the order of the model.
        key: of the predictions of the model that was measured.
    """
    num_images: int
    key: str = ''
    engine: str = ''
    seconds: Dict[str, float] = field(default_factory=dict)
    layers: List[LayerRecord] = field(default_factory=list)

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        histograms: List[np.ndarray] = []
        codes: List[np.ndarray] = []

        def plain(record: Any) -> Dict[str, Any]:
            kept = asdict(record)
            for key, value in kept.items():
                if isinstance(value, np.ndarray):
                    rows = histograms if len(value) == NUM_BINS else codes
                    width = NUM_BINS if rows is histograms else MAX_CODES
                    row = np.zeros(width)
                    row[:len(value)] = value
                    kept[key] = [rows is histograms, len(rows), len(value)]
                    rows.append(row)
            return kept

        about = dict(
            format_version=FORMAT_VERSION,
            num_images=self.num_images,
            key=self.key,
            engine=self.engine,
            seconds=self.seconds,
            layers=[
                dict(
                    plain(layer), sites=[plain(site) for site in layer.sites])
                for layer in self.layers
            ])
        arrays: Dict[str, Any] = dict(
            about=np.array(json.dumps(about)),
            histograms=np.array(histograms).reshape(-1, NUM_BINS),
            codes=np.array(codes).reshape(-1, MAX_CODES))
        memory = io.BytesIO()
        np.savez_compressed(memory, **arrays)
        write_atomically(path, lambda file: file.write(memory.getvalue()))

    @classmethod
    def load(cls, path: Path) -> 'LayerFile':
        """Read a file.

        Raises:
            UNREADABLE: if it is not there or damaged.
        """
        with np.load(path, allow_pickle=False) as file:
            about = json.loads(str(file['about']))
            tables = {True: file['histograms'], False: file['codes']}
        if about.pop('format_version') != FORMAT_VERSION:
            raise ValueError('it is of another version')

        def whole(kept: Dict[str, Any]) -> Dict[str, Any]:
            arrays = ('counts', 'levels', 'weight_counts', 'code_counts')
            for key in kept.keys() & arrays:
                is_histogram, row, length = kept[key]
                kept[key] = tables[is_histogram][row][:length]
            return kept

        layers = []
        for kept in about.pop('layers'):
            sites = [SiteRecord(**whole(site)) for site in kept.pop('sites')]
            layers.append(LayerRecord(**whole(kept), sites=sites))
        return cls(**about, layers=layers)
