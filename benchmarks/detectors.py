"""Which of MMDetection's detectors with a Swin backbone can be quantized.

Each config is read, its detector made small and random, quantized on two
small images, packed, and loaded again: the two must predict the same.
"""
import copy
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, Dict, List, Mapping, NamedTuple, Sequence, Tuple

import mmdet
import numpy as np
import torch
from mmcv.transforms import Compose
from mmdet.apis import inference_detector, init_detector
from mmdet.registry import MODELS
from mmdet.utils import get_test_pipeline_cfg
from mmengine.config import Config
from mmengine.registry import init_default_scope
from torch import Tensor

from benchmarks.small import (WORDS, same_as, shrink_, swin_configs,
                              write_language_model)
from isvit_det.apis import (quantize_detector, save_detector,
                            without_annotations)
from isvit_det.core.errors import QuantError
from isvit_det.core.settings import SCOPES
from isvit_det.detector import float_modules, language_model
from isvit_det.inputs.configs import config_errors

# Names, since a sentence is not cut into pieces where a config asks for that.
PROMPT = WORDS
# What a trial calibrates on and predicts, and the images' sizes.
SIZES = ((70, 90), (80, 60))
HEADER = f"""\
# Detectors of MMDetection with a Swin backbone

Made by `python -m benchmarks.detectors`, which reads every config of the
installed MMDetection (here mmdet {mmdet.__version__}). Each detector is built
small and with random weights, quantized on two small images, packed and loaded
into a fresh model: `yes` says that this predicts the same to the bit. What
stays in float is that of scope `detector`, as classes and how many of each at
most; a language model counts as one.

A detector that cannot predict in float is refused. So is every Grounding DINO
of mmdet 3.5.1, whose decoder expects encodings of half the length that it is
given; `tests/test_detectors.py` corrects the decoder and tries them in both
scopes."""


class Trial(NamedTuple):
    """What came of a detector in one scope.

    Attributes:
        refusal: the line it is refused with, or ''.
        in_float: classes of what stays in float, and how many of each.
        num_detections: detections on the images.
        same: whether the packed model predicts what the quantized one did.
    """
    refusal: str = ''
    in_float: Mapping[str, int] = {}
    num_detections: int = 0
    same: bool = False


class Trials:
    """Trials of configs; of those with the same small detector there is one.

    Args:
        words: folder of a small language model.
    """

    def __init__(self, words: str) -> None:
        self.words = words
        self._made: Dict[Tuple[str, str], Trial] = {}

    def of(self, cfg: Config, scope: str) -> Trial:
        """The trial of a config, which stays as it is, in a scope."""
        cfg = copy.deepcopy(cfg)
        shrink_(cfg, self.words)
        key = same_as(cfg), scope
        if key not in self._made:
            self._made[key] = try_detector(cfg, scope)
        return self._made[key]


def try_detector(cfg: Config, scope: str) -> Trial:
    """Quantize, pack and load a small detector."""
    images = draw_images()
    try:
        model = random_detector(cfg)
        prompt: Dict[str, Any] = {}
        if language_model(model) is not None:
            prompt = dict(text_prompt=PROMPT, custom_entities=True)
        quantized = quantize_detector(
            model, images, scope=scope, method='minmax', **prompt)
    except QuantError as error:
        return Trial(str(error))
    with tempfile.TemporaryDirectory() as folder:
        config, packed = save_detector(quantized, folder)
        again = init_detector(config, packed, palette='random', device='cpu')
    load = dict(type='mmdet.LoadImageFromNDArray')
    steps = without_annotations(get_test_pipeline_cfg(again.cfg.copy()))
    pipeline = Compose([load, *steps[1:]])
    predicted = [
        values_of(inference_detector(one, images, pipeline, **prompt))
        for one in (quantized, again)
    ]
    same = len(predicted[0]) == len(predicted[1]) and all(
        torch.equal(*pair) for pair in zip(*predicted))
    kinds = Counter(kind for _, kind in float_modules(again))
    return Trial('', kinds, sum(map(len, predicted[0])), same)


def random_detector(cfg: Config) -> Any:
    """A float detector of random weights, as ``init_detector`` gives it."""
    init_default_scope('mmdet')
    torch.manual_seed(0)
    with config_errors():
        model = MODELS.build(copy.deepcopy(cfg.model))
    model.init_weights()
    with torch.no_grad():
        for value in model.parameters():
            value += .03 * torch.randn_like(value)
    model.cfg, model.dataset_meta = cfg, dict(classes=('box', 'disc', 'bar'))
    return model.eval()


def draw_images() -> List[np.ndarray]:
    """Images (H, W, 3) in BGR order."""
    generator = np.random.default_rng(0)
    return [generator.integers(0, 256, (*size, 3), np.uint8) for size in SIZES]


def values_of(samples: Sequence[Any]) -> List[Tensor]:
    """All tensors that predictions hold."""
    tensors = []
    for sample in samples:
        for part in (sample.get('pred_instances'),
                     sample.get('pred_panoptic_seg')):
            for _, value in part.items() if part is not None else ():
                if isinstance(value, Tensor):
                    tensors.append(value)
    return tensors


def table(trials: Trials, configs: Mapping[str, Config]) -> str:
    """A Markdown table with a row for each family of configs, and notes."""
    families: Dict[str, List[Config]] = {}
    for name, cfg in configs.items():
        families.setdefault(name.split('/')[0], []).append(cfg)
    rows = [
        '| family | configs | backbone | detector | stays in float |',
        '| --- | ---: | --- | --- | --- |'
    ]
    notes: List[str] = []
    for family, members in families.items():
        cells = [family, str(len(members))]
        kinds: Counter = Counter()
        for scope in SCOPES:
            results = [trials.of(cfg, scope) for cfg in members]
            cells.append(_outcome(results, notes))
        for result in results:
            kinds |= Counter(result.in_float)
        listed = [f'{kind} {count}' for kind, count in sorted(kinds.items())]
        cells.append(', '.join(listed) or '-')
        rows.append(f'| {" | ".join(cells)} |')
    numbered = [f'{number}. `{note}`' for number, note in enumerate(notes, 1)]
    return '\n'.join([*rows, '', 'Refused with:', '', *numbered])


def _outcome(results: Sequence[Trial], notes: List[str]) -> str:
    """A cell; lines of refusal that it points to are added to the notes."""
    counts = Counter(
        'yes' if result.
        same else result.refusal or 'predicts something else when loaded'
        for result in results)
    words = []
    for outcome, count in counts.items():
        if outcome in {result.refusal for result in results}:
            if outcome not in notes:
                notes.append(outcome)
            outcome = f'refused ({notes.index(outcome) + 1})'
        share = '' if count == len(results) else f'{count} '
        words.append(f'{share}{outcome}')
    return ', '.join(words)


def main() -> int:
    """Write ``docs/detectors.md``."""
    with tempfile.TemporaryDirectory() as folder:
        write_language_model(folder)
        text = table(Trials(folder), swin_configs())
    out = Path('docs/detectors.md')
    out.parent.mkdir(exist_ok=True)
    out.write_text(f'{HEADER}\n\n{text}\n', encoding='utf-8')
    print(f'{text}\n\n{out}')
    return 0


if __name__ == '__main__':
    sys.exit(main())
