"""The parts of the report on calibration units, layers, and parts."""
from dataclasses import dataclass, field
from typing import Any, Dict, List, Mapping, Optional

from markupsafe import Markup

from isvit_det.costs.operations import FLOAT_BITS
from isvit_det.page import plots
from isvit_det.page.table import Table, name, number
from isvit_det.report.layer_file import LayerFile, LayerRecord

# Layers with a plot: of all, and at least of products of attention.
NUM_PLOTS = 12
NUM_ATTENTION = 4
LIMIT = 20
# Bit operations of a multiplication in float32.
FLOAT_FACTOR = FLOAT_BITS**2
STAGES = {
    'before_stage_1': 'stage 1, before',
    'after_stage_1': 'after',
    'after_stage_2': 'stage 2',
    'before_stage_3': 'stage 3, before',
    'after_stage_3': 'after'
}


@dataclass
class Plot:
    """A layer with its histograms."""
    name: str
    note: str
    image: Markup


@dataclass
class Layers:
    """Layers, those with the largest error first."""
    table: Table
    plots: List[Plot] = field(default_factory=list)


def describe_units(
        units: Optional[List[Mapping[str, Any]]]) -> Optional[Table]:
    """Units of the calibration, largest final error first."""
    if not units:
        return None
    last = 'after_stage_3'
    worst = max(unit['errors'].get(last, 0.) for unit in units) or 1.
    rows = []
    for place, unit in sorted(
            enumerate(units, 1),
            key=lambda pair: -pair[1]['errors'].get(last, 0.)):
        errors = unit['errors']
        cells = [number(place, 'd'), name(unit['name'])]
        for stage in STAGES:
            cells.append(number(errors.get(stage), '.3g'))
        cells[-1].share = errors.get(last, 0.) / worst
        seconds = number(unit['seconds'], '.1f')
        if unit.get('resumed'):
            seconds.text += ' (resumed)'
        rows.append([*cells, seconds])
    return Table(['#', 'unit', *STAGES.values(), 'seconds'], rows, limit=LIMIT)


def describe_layers(file: Optional[LayerFile]) -> Optional[Layers]:
    """Quantized layers with errors, clipped shares, widths, and plots."""
    if file is None:
        return None
    layers = [one for one in file.layers if one.is_quantized]
    if not layers:
        return None
    layers.sort(key=lambda one: -(one.error or 0.))
    worst = layers[0].error or 1.
    rows = []
    for one in layers:
        shares = [site.clipped_share for site in one.sites]
        clipped = [share for share in shares if share is not None]
        kinds = [_kind(site.kind) for site in one.sites]
        most = max(clipped) if clipped else None
        rows.append([
            name(one.name),
            name(one.kind),
            name(_widths(one)),
            name(', '.join(dict.fromkeys(kinds))),
            number(one.error, '.3g', share=(one.error or 0.) / worst),
            number(one.error_of_acts, '.3g'),
            number(None if most is None else 100 * most, '.3g', ' %'),
            number(_used(one), 'd')
        ])
    table = Table([
        'layer', 'kind', 'bits', 'activations by', 'error', 'by activations',
        'clipped', 'codes of weights used'
    ],
                  rows,
                  limit=LIMIT)
    chosen = layers[:NUM_PLOTS]
    attention = [one for one in layers if _has_attention(one)]
    chosen += [one for one in attention[:NUM_ATTENTION] if one not in chosen]
    return Layers(table, [
        Plot(one.name, _note(one), plots.layer(one)) for one in chosen if all(
            len(site.levels) and site.total for site in one.sites)
    ])


def _has_attention(record: LayerRecord) -> bool:
    return any(site.is_log for site in record.sites)


def _widths(record: LayerRecord) -> str:
    """Widths, as ``W4A4`` or ``A4A4``."""
    acts = ''.join(f'A{site.bits}' for site in record.sites)
    weight = '' if record.weight_bits is None else f'W{record.weight_bits}'
    return weight + acts


def _kind(kind: str) -> str:
    return {
        'UniformQuantizer': 'range',
        'TableQuantizer': 'table',
        'ShiftUniformLog2Quantizer': 'SULQ',
        'Log2Quantizer': 'log2'
    }.get(kind, kind)


def _used(record: LayerRecord) -> Optional[int]:
    """How many of the codes any weight has."""
    if not len(record.code_counts):
        return None
    return int((record.code_counts > 0).sum())


def _note(record: LayerRecord) -> str:
    error = '' if record.error is None else f', error {record.error:.3g}'
    return f'{_widths(record)}{error}'


def describe_parts(file: Optional[LayerFile], bytes_packed: int,
                   bytes_float: Optional[int]) -> Optional[Table]:
    """Weights, multiplications, bit operations and seconds by part.

    Args:
        file: statistics of the layers.
        bytes_packed: size of the packed file.
        bytes_float: size of the float weights, if known.
    """
    if file is None:
        return None
    parts: Dict[str, List[LayerRecord]] = {}
    for one in file.layers:
        parts.setdefault(one.part, []).append(one)
    rows = []
    total = sum(one.bops for one in file.layers) or 1.
    in_float = sum(one.macs for one in file.layers) * FLOAT_FACTOR or 1.
    whole = file.seconds.get('all')

    def row(title: str, layers: List[LayerRecord],
            seconds: Optional[float]) -> list:
        weights = sum(one.num_weights for one in layers)
        size = sum(one.num_weights * (one.weight_bits or 0)
                   for one in layers) / 8e6
        macs = sum(one.macs for one in layers)
        bops = sum(one.bops for one in layers)
        return [
            name(title),
            number(weights / 1e6, '.3f'),
            number(4 * weights / 1e6, '.2f'),
            number(size, '.2f'),
            number(macs / 1e9, '.3f'),
            number(macs * FLOAT_FACTOR / 1e9, '.0f'),
            number(bops / 1e9, '.1f', share=bops / total),
            number(seconds, '.4f'),
            number(
                None if not whole or seconds is None else 100 * seconds /
                whole, '.0f', ' %')
        ]

    for part, layers in parts.items():
        rows.append(row(part, layers, file.seconds.get(part)))
    for part, seconds in file.seconds.items():
        if part not in parts and part != 'all':
            rows.append(row(part, [], seconds))
    rows.sort(key=lambda cells: -(cells[6].value or 0.))
    if whole is not None:
        known = sum(s for part, s in file.seconds.items() if part != 'all')
        rows.append(row('all else', [], max(0., whole - known)))
    rows.append(row('all', file.layers, whole))
    sizes = [
        f'The packed file has {bytes_packed / 1e6:.2f} MB: weights as '
        'codes, and scales, norms, biases and the header beside them'
    ]
    if bytes_float:
        sizes.append(f'the float weights have {bytes_float / 1e6:.2f} MB')
    return Table([
        'part', 'M weights', 'MB in float', 'MB in codes', 'GMACs',
        'GBOPs in float', 'GBOPs', 's/image', 'of the time'
    ], rows, f'{"; ".join(sizes)}. Bit operations are {total / in_float:.1%} '
                 'of those in float.')
