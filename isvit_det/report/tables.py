"""The results of a run: a table for people, a JSON file for programs."""
import json
import resource
from pathlib import Path
from typing import (Any, Callable, Dict, Iterable, List, Mapping, Optional,
                    Sequence)

import torch
from mmengine.dist import all_reduce, get_world_size
from torch import Tensor, nn

from isvit_det.core.errors import QuantError, few_names
from isvit_det.core.files import write_atomically
from isvit_det.core.layers import list_sites
from isvit_det.core.mixed import PRACTICAL_BITS
from isvit_det.core.plain import plain
from isvit_det.core.settings import QuantConfig
from isvit_det.evaluation.figures import Figures
from isvit_det.runtime.engine import engine_line

# Most images on which the error of the backbone is measured.
ERROR_IMAGES = 500


@torch.no_grad()
def backbone_error(model: Any, teacher: nn.Module, batches: Iterable[Any],
                   advance: Callable[[int], None]) -> float:
    """Mean relative error of a quantized backbone's output maps.

    ``||quantized - float||^2 / ||float||^2``, averaged over the output maps
    and over the first 500 images of the evaluation.

    Args:
        model: the quantized detector.
        teacher: its float backbone.
        batches: of the data loader of the evaluation.
        advance: is called with the number of further images that are done.
    """
    limit = -(-ERROR_IMAGES // get_world_size())
    errors: List[float] = []
    for batch in batches:
        inputs = model.data_preprocessor(batch, False)['inputs']
        maps = zip(model.backbone(inputs), teacher(inputs))
        each = torch.stack([relative_errors(*pair) for pair in maps])
        errors += each.mean(0).tolist()
        advance(each.shape[1] * get_world_size())
        if len(errors) >= limit:
            break
    total = torch.tensor([sum(errors), len(errors)], dtype=torch.float64)
    all_reduce(total)
    return (total[0] / total[1]).item()


def relative_errors(student: Tensor, teacher: Tensor) -> Tensor:
    """``||student - teacher||^2 / ||teacher||^2`` of each image, (B,).

    >>> relative_errors(torch.tensor([[1., 2.]]), torch.tensor([[0., 2.]]))
    tensor([0.2500], dtype=torch.float64)
    """
    student, teacher = (x.double().flatten(1) for x in (student, teacher))
    return (student - teacher).square().sum(1) / teacher.square().sum(1)


def format_table(rows: Sequence[Mapping[str, str]]) -> str:
    """Rows with the same keys as an aligned Markdown table.

    >>> print(format_table([{'model': 'float', 'AP': '61.2'}]))
    | model |   AP |
    | ----- | ---: |
    | float | 61.2 |
    """
    keys = list(rows[0])
    widths = [max(len(key), *(len(row[key]) for row in rows)) for key in keys]

    def line(cells: Sequence[str]) -> str:
        padded = [cells[0].ljust(widths[0])]
        padded += [c.rjust(w) for c, w in zip(cells[1:], widths[1:])]
        return '| ' + ' | '.join(padded) + ' |'

    rule = ['-' * widths[0]] + ['-' * (w - 1) + ':' for w in widths[1:]]
    body = [line([row[key] for key in keys]) for row in rows]
    return '\n'.join([line(keys), line(rule), *body])


def peak_memory() -> Dict[str, int]:
    """Peak memory of this process in bytes, on the host and on the GPU."""
    peak = {'host': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    if torch.cuda.is_available():
        peak['cuda'] = torch.cuda.max_memory_allocated()
    return peak


def weight_bytes(state: Mapping[str, Tensor]) -> int:
    """Bytes of the tensors of a state dict."""
    return sum(value.numel() * value.element_size()
               for value in state.values())


def count_calls(model: nn.Module) -> Dict[str, int]:
    """Number of calls of every quantizer so far, by name."""
    return {site.name: site.num_calls for site in list_sites(model)}


def list_sites_run(model: nn.Module,
                   before: Mapping[str, int]) -> List[Dict[str, Any]]:
    """Every quantizer, with its number of calls since ``before``.

    Raises:
        QuantError: naming quantizers of the backbone that did not run. Those
            of heads may not run, if nothing is detected.
    """
    sites = [
        dict(site._asdict(), num_calls=site.num_calls - before[site.name])
        for site in list_sites(model)
    ]
    silent = [
        name for name in silent_sites(sites) if name.startswith('backbone.')
    ]
    if silent:
        raise QuantError(f'these did not run quantized in the evaluation, so '
                         f'its AP is not reported: {", ".join(silent)}.')
    return sites


def sum_calls(sites: Sequence[Mapping[str, Any]]) -> List[Dict[str, Any]]:
    """Sites with their numbers of calls summed over all processes."""
    counts = torch.tensor([site['num_calls'] for site in sites])
    all_reduce(counts)
    return [
        dict(site, num_calls=count)
        for site, count in zip(sites, counts.tolist())
    ]


def silent_sites(sites: Iterable[Mapping[str, Any]]) -> List[str]:
    """Names of the quantizers that did not run."""
    return [site['name'] for site in sites if site['num_calls'] == 0]


def write_result(path: Path, result: Mapping[str, Any]) -> None:
    """Write a result as JSON."""
    text = json.dumps(plain(result), indent=1).encode()
    write_atomically(path, lambda file: file.write(text))


def table_rows(result: Mapping[str, Any]) -> List[Dict[str, str]]:
    """The rows of the float model and of each evaluation of the quantized one.

    Args:
        result: of a run, as in ``result.json``.
    """
    seconds = result['seconds']
    unquantized = result['float'] or {}
    also = result['also_evaluated']
    figures = Figures(unquantized, result['quantized'])

    def row(model: str, scores: Mapping[str, Any], memory: Mapping[str, int],
            pace: Optional[float], **more: Optional[str]) -> dict:
        cells = {
            'model':
            model,
            **{
                title: figures.cell(scores, name)
                for title, name in figures.columns.items()
            }, 'bits':
            more.get('bits'),
            'scope':
            more.get('scope'),
            'method':
            more.get('method'),
            'engine':
            more.get('engine'),
            's/image':
            pace and f'{pace:.3g}',
            'backbone error':
            more.get('error'),
            'MB':
            more.get('size'),
            'calibration s':
            more.get('calibration'),
            'evaluation s':
            more.get('evaluation'),
            'peak GB':
            memory and ' + '.join(f'{value / 1e9:.1f} {name}'
                                  for name, value in memory.items())
        }
        return {key: value or '-' for key, value in cells.items()}

    def quantized_row(evaluated: Mapping[str, Any], memory: Mapping[str, int],
                      evaluation: Optional[float],
                      **more: Optional[str]) -> dict:
        return row(
            'quantized',
            evaluated['quantized'],
            memory,
            evaluated['seconds_per_image'],
            bits=result['bits'],
            scope=result['scope'],
            method=result['method'],
            engine=evaluated['engine']['engine'],
            size=_megabytes(result['bytes']['packed']),
            evaluation=_whole(evaluation),
            **more)

    error = result['backbone_error']
    return [
        row('float',
            unquantized,
            unquantized.get('peak_memory', {}),
            unquantized.get('seconds_per_image'),
            bits='32',
            size=_megabytes(result['bytes']['float']),
            evaluation=_whole(seconds.get('float_evaluation'))),
        *(quantized_row(each, {}, each['seconds']) for each in also),
        quantized_row(
            result,
            result['peak_memory'],
            seconds.get('quantized_evaluation'),
            error=None if error is None else f'{error:.4g}',
            calibration=_whole(seconds.get('calibration'))),
    ]


def further_lines(result: Mapping[str, Any]) -> List[str]:
    """Lines below the table: other metrics, the engine, and notes.

    Args:
        result: of a run, as in ``result.json``.
    """
    figures = Figures(result['float'] or {}, result['quantized'])
    lines = figures.list_rest() if figures.rest else []
    # Results of earlier versions name no engine.
    if result.get('engine'):
        lines.append(engine_line(result['engine']))
    return lines + [f'note: {note}' for note in result['notes']]


def protocol_line(quant: QuantConfig) -> str:
    """Which layers have good bits whatever the bits of all others.

    >>> protocol_line(QuantConfig()).split(', ')
    ["protocol literature: the first layer's input in 8 bits", 'all else as \
given']
    """
    text = (f'protocol {quant.protocol}: the first layer\'s input in '
            f'{quant.input_bits} bits')
    if quant.protocol == 'literature':
        return f'{text}, all else as given'
    names = [
        one.match for one in quant.overrides
        if one.weight_bits == PRACTICAL_BITS
    ]
    return f'{text}, and in {PRACTICAL_BITS} bits {few_names(names, 10)}'


def _megabytes(size: Optional[int]) -> Optional[str]:
    return size and f'{size / 1e6:.1f}'  # type: ignore


def _whole(seconds: Optional[float]) -> Optional[str]:
    return None if seconds is None else f'{seconds:.0f}'
