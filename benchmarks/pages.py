#!/usr/bin/env python
"""Tables of the docs that are made from what they describe.

A page holds each table between two comments, ``<!-- made: NAME -->`` and
``<!-- end -->``; the text around it is written by hand. Without options the
pages are rewritten in place.
"""
import dataclasses
import inspect
import re
import sys
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Sequence, Tuple, Type

from mmengine.fileio import load

from benchmarks import runtime_page
from isvit_det.core.presets import METHODS
from isvit_det.core.settings import QuantConfig, SOSConfig

ROOT = Path(__file__).resolve().parents[1]
METAFILE = ROOT / 'configs/isvit/metafile.yml'
BLOCK = re.compile(r'(<!-- made: (\w+) -->\n).*?(<!-- end -->)', re.DOTALL)
FAMILIES = {
    'mask-rcnn': 'Mask R-CNN',
    'cascade-mask-rcnn': 'Cascade Mask R-CNN'
}
NAMES = {'swin': 'Swin', 'deit': 'DeiT', 'vit': 'ViT'}
# Highest AP that a successor of I&S-ViT reports of itself at 4 bits.
BEST = {
    'mask-rcnn_swin-t': '39.6/38.2 (GLF-Q)',
    'mask-rcnn_swin-s': '44.3/41.1 (GLF-Q)',
    'cascade-mask-rcnn_swin-t': '48.9/42.7 (APHQ-ViT)',
    'cascade-mask-rcnn_swin-s': '50.6/44.0 (GLF-Q)'
}


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, which ends with a new line."""
    lines = [header, ['---'] * len(header), *rows]
    return ''.join(f'| {" | ".join(line)} |\n' for line in lines)


def attributes(cls: Type) -> Dict[str, str]:
    """What a class's docstring says of each attribute, as Markdown."""
    text = inspect.cleandoc(cls.__doc__ or '').split('Attributes:\n')[1]
    entries = re.findall(r'^ {4}(\w+): (.*?)(?=^ {4}\w|\Z)', text,
                         re.DOTALL | re.MULTILINE)
    return {
        name: ' '.join(meaning.split()).replace('``', '`')
        for name, meaning in entries
    }


def show(value: Any) -> str:
    """A value as a config has it."""
    if isinstance(value, (tuple, list)):
        return ', '.join(f'`{one!r}`' if isinstance(one, str) else f'{one:g}'
                         for one in value) or 'none'
    return f'`{value!r}`'


def settings_of(method: str, kind: str = 'detector') -> Dict[str, Any]:
    """Every setting of a method, by its full name.

    Args:
        method: one of ``METHODS``.
        kind: of the model, ``'detector'`` or ``'classifier'``.
    """
    quant = QuantConfig.from_dict(dict(method=method))
    sos = SOSConfig.from_dict({}, quant, kind)
    return {
        f'{name}.{key}': value
        for name, config in (('quant', quant), ('sos', sos))
        for key, value in config.to_dict().items()
    }


def describe(cls: Type, name: str) -> str:
    """Table of a class's fields: default and meaning."""
    meanings = attributes(cls)
    rows = []
    for field in dataclasses.fields(cls):
        shown = show(field.default)
        rows.append([f'`{name}.{field.name}`', shown, meanings[field.name]])
    return table(['setting', 'default', 'meaning'], rows)


def methods() -> str:
    """Table of the settings in which the methods differ."""
    # The default method first.
    columns = {f'`{name}`': settings_of(name) for name in reversed([*METHODS])}
    for name, preset in METHODS.items():
        if preset.classifier_sos:
            columns[f'`{name}`, classifiers'] = settings_of(name, 'classifier')
    rows = []
    for key in next(iter(columns.values())):
        values = [show(column[key]) for column in columns.values()]
        if key != 'quant.method' and len(set(values)) > 1:
            rows.append([f'`{key}`', *values])
    return table(['setting', *columns], rows)


def link(path: str, name: str) -> str:
    """A link from a page in docs/ to a file of the repository."""
    return f'[{name}](../{path})'


def entries() -> Dict[str, Dict[str, Dict]]:
    """The metafile's entries: by detector, then by bits."""
    by_detector: Dict[str, Dict[str, Dict]] = {}
    for model in load(str(METAFILE))['Models']:
        facts = model['Metadata']
        by_detector.setdefault(facts['Detector'], {})[facts['Bits']] = model
    return by_detector


def spell(detector: str) -> Tuple[str, str]:
    """Detector and backbone as people write them.

    >>> spell('cascade-mask-rcnn_swin-t')
    ('Cascade Mask R-CNN', 'Swin-T')
    """
    family, backbone = detector.split('_')
    arch, size = backbone.split('-')
    return FAMILIES[family], f'{NAMES[arch]}-{size.upper()}'


def configs() -> str:
    """Table of the configs in configs/isvit."""
    rows = []
    for detector, of_bits in entries().items():
        facts = next(iter(of_bits.values()))['Metadata']
        base = facts['Float Config']
        shown = 'of MMDetection'
        if not base.startswith('mmdet::'):
            shown = link(base, 'of this project')
        weights = 'to be trained'
        if 'Float Checkpoint' in facts:
            weights = f'[download]({facts["Float Checkpoint"]})'
        if 'Float Converter' in facts:
            weights += f', [convert]({"../" + facts["Float Converter"]})'
        quantized = ' '.join(
            link(model['Config'], bits) for bits, model in of_bits.items())
        rows.append([*spell(detector), shown, weights, quantized])
    return table(
        ['detector', 'backbone', 'float config', 'float weights', 'quantized'],
        rows)


def published() -> str:
    """Table of the published AP at 4 bits, float and quantized."""
    rows = []
    for detector, of_bits in entries().items():
        if detector not in BEST:
            continue
        model = of_bits['w4a4']
        metrics: Dict[str, Any] = {}
        for result in model['Results']:
            metrics.update(result['Metrics'])
        pairs = [
            '/'.join(
                str(metrics[f'{prefix}{kind} AP']) for kind in ('box', 'mask'))
            for prefix in ('Published (I&S-ViT) float ',
                           'Published (I&S-ViT) ')
        ]
        ours = ' / '.join(
            dict.fromkeys(
                str(metrics[f'{kind} AP']) for kind in ('box', 'mask')))
        name = ' '.join(spell(detector))
        rows.append(
            [link(model['Config'], name), *pairs, BEST[detector], ours])
    return table([
        'detector', 'float', 'I&S-ViT', "best successor, by its own paper",
        'this project'
    ], rows)


PAGES: Mapping[str, Mapping[str, Callable[[], str]]] = {
    'docs/settings.md':
    dict(
        quant=lambda: describe(QuantConfig, 'quant'),
        sos=lambda: describe(SOSConfig, 'sos'),
        methods=methods),
    'docs/speed.md':
    dict(
        machines=runtime_page.machines,
        models=runtime_page.models,
        layers=runtime_page.layers,
        memory=runtime_page.memory),
    'docs/zoo.md':
    dict(configs=configs, published=published)
}


def fill(page: str, text: str) -> str:
    """A page's text with its tables as they should be.

    Raises:
        ValueError: if the page lacks one of its tables or has another one.
    """
    blocks = PAGES[page]
    names = [match[2] for match in BLOCK.finditer(text)]
    if sorted(names) != sorted(blocks):
        raise ValueError(f'{page} has the tables {names}, expected '
                         f'{list(blocks)}')
    return BLOCK.sub(lambda match: f'{match[1]}{blocks[match[2]]()}{match[3]}',
                     text)


def main() -> int:
    """Rewrite the pages; the exit status."""
    changed: List[str] = []
    for page in PAGES:
        path = ROOT / page
        text = path.read_text()
        filled = fill(page, text)
        if filled != text:
            path.write_text(filled)
            changed.append(page)
    print(f'rewritten: {", ".join(changed) or "none"}')
    return 0


if __name__ == '__main__':
    sys.exit(main())
