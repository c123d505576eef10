"""The table of a classifier's run."""
from typing import Any, Dict, List, Mapping, Sequence


def classifier_rows(result: Mapping[str, Any]) -> List[Dict[str, str]]:
    """The rows of the float and of the quantized classifier.

    Args:
        result: of a run, as in ``result.json``.
    """
    scores = result['scores']

    def percent(key: str) -> str:
        return f'{100 * scores[key]:.2f}' if key in scores else '-'

    def row(kind: str, bits: str, method: str,
            more: Sequence[str]) -> Dict[str, str]:
        size = result['bytes']['float' if kind == 'float' else 'packed']
        cells = [
            kind, bits, method,
            percent(f'{kind}_top1'),
            percent(f'{kind}_top5'), *more, f'{size / 1e6:.1f}'
        ]
        names = [
            'model', 'bits', 'method', 'top-1', 'top-5', 'agreement', 'KL',
            'MB'
        ]
        return dict(zip(names, cells))

    quantized = [
        percent('agreement'), f'{scores["kl"]:.4f}' if 'kl' in scores else '-'
    ]
    return [
        row('float', '32', '-', ['-', '-']),
        row('quantized', result['bits'], result['method'], quantized)
    ]
