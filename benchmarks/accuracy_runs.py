"""The runs of benchmarks/accuracy.py: models, methods, options, seeds."""
import argparse
import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Iterator, Mapping, Optional, Tuple

from isvit_det.core.checks import parse_bits
from isvit_det.core.settings import QuantConfig, SOSConfig
from isvit_det.inputs.configs import load_config

BITS = ('w3a3', 'w4a4', 'w6a6', 'w8a8')
METHOD_ROWS = ('repq', 'isvit_paper', 'isvit')
# Variants with other numbers of images or of iterations than usual, which are
# run on the first seed.
EXTENTS = (
    ('isvit', 16, None),
    ('isvit', 256, None),
    ('isvit', None, 0),
    ('isvit', None, 500),
    ('isvit, sos.stage_one_share=0.0', None, 500),
    ('isvit_paper', None, 500),
)
# Ablations that give an option a value other than that of isvit_paper.
OTHER_VALUES = {
    'sos.stage_one_share': 0.,
    'sos.rotate_heads': True,
    'sos.mirror_images': True,
}
# Options that do nothing in a scope, '-' being a classifier's.
IDLE = {
    'detector': ('sos.weigh_tokens', ),
    '-': ('sos.correct_heads', 'sos.weigh_locations'),
}


@dataclass(frozen=True)
class Subject:
    """A model whose accuracy is measured.

    Attributes:
        config: of a quantized detector, or the name of a timm classifier.
        weights: file of its float weights.
        scopes: of a detector; none for a classifier.
        ablated: whether single options are tried on it.
        options: settings of the command line.
        images: folder of COCO; None for drawn images.
    """
    config: str
    weights: Path
    scopes: Tuple[str, ...] = ()
    ablated: bool = False
    options: Tuple[str, ...] = ()
    images: Optional[Path] = None


@dataclass(frozen=True)
class Key:
    """What identifies a cell: settings by name.

    Attributes:
        subject: name of the model.
        bits: as of ``--bits``; '32' is float.
        scope: of the quantization, '-' for a classifier.
        variant: a method, or ``isvit`` with one setting changed.
        seed: of the calibration.
        images: number of images to calibrate on.
        iters: iterations per unit and stage.
    """
    subject: str
    bits: str
    scope: str
    variant: str
    seed: int
    images: int
    iters: int

    @property
    def extent(self) -> Tuple[int, int]:
        return self.images, self.iters

    @property
    def option(self) -> str:
        """The setting that is changed, '' if none is."""
        return self.variant.partition(', ')[2]


def subjects(args: argparse.Namespace) -> Dict[str, Subject]:
    """The models whose files exist, by name."""
    existing = {}
    for name, backbone in (('swin', 'swin-mini_fpn'), ('deit',
                                                       'deit-mini_sfpn')):
        config = f'configs/drawn/mask-rcnn_{backbone}_isvit-w4a4_drawn.py'
        existing[name] = Subject(config,
                                 Path(load_config(config, None).load_from),
                                 ('detector', 'backbone'), name == 'swin'
                                 or args.tune)
    images = os.environ.get('COCO_ROOT')
    weights = Path(os.environ.get('DEIT_TINY', ''))
    if images and weights.is_file():
        options = ['--calib', f'{images}/train2017']
        if not args.tune:
            options += ['--val', f'{images}/val2017']
        existing['deit-tiny'] = Subject('deit_tiny_patch16_224', weights,
                                        (), args.tune, tuple(options),
                                        Path(images))
    learned = Path('work_dirs/coco60/float.pth')
    if images and learned.is_file() and not args.tune:
        existing['coco60'] = Subject(
            'configs/coco_subset/'
            'mask-rcnn_deit-t-p16_sfpn_isvit-w4a4_320px_coco60_learned.py',
            learned, ('detector', 'backbone'),
            images=Path(images))
    return {name: existing[name] for name in args.models if name in existing}


def ablations(scope: str) -> Dict[str, Dict[str, Any]]:
    """Settings of every variant of ``isvit`` with one option changed.

    Args:
        scope: of the quantization, '-' for a classifier.
    """
    ours, paper = QuantConfig(), QuantConfig.from_dict(
        dict(method='isvit_paper'))
    pairs = {'quant': (ours, paper)}
    kind = 'classifier' if scope == '-' else 'detector'
    pairs['sos'] = tuple(  # type: ignore
        SOSConfig.from_dict({}, config, kind) for config in (ours, paper))
    changes = {}
    for part, (one, other) in pairs.items():
        for field in dataclasses.fields(one):
            value = getattr(other, field.name)
            key = f'{part}.{field.name}'
            if field.name != 'method' and key not in IDLE.get(
                    scope, ()) and getattr(one, field.name) != value:
                changes[f'isvit, {key} as published'] = {key: value}
    for key, value in OTHER_VALUES.items():
        part, name = key.split('.')
        if getattr(pairs[part][0], name) != value:
            changes[f'isvit, {key}={value}'] = {key: value}
    return changes


def keys(args: argparse.Namespace, known: Mapping[str,
                                                  Subject]) -> Iterator[Key]:
    """All cells, the most important ones first."""
    usual = args.images, args.iters
    for name, subject in known.items():
        if subject.scopes:
            yield Key(name, '32', '-', 'float', 0, *usual)
    for seed in args.seeds:
        for bits in args.bits:
            for name, subject in known.items():
                methods = METHOD_ROWS if is_low(bits) else ('isvit', )
                for scope in subject.scopes or ('-', ):
                    for method in methods:
                        yield Key(name, bits, scope, method, seed, *usual)
    if args.no_ablations:
        return
    for seed in args.seeds:
        for bits in args.bits:
            for name, subject in known.items():
                if is_low(bits) and subject.ablated:
                    scope = 'detector' if subject.scopes else '-'
                    variants = [(variant, *usual)
                                for variant in ablations(scope)]
                    if seed == args.seeds[0]:
                        variants += extents(args)
                    for variant, images, iters in variants:
                        yield Key(name, bits, scope, variant, seed, images,
                                  iters)


def is_low(bits: str) -> bool:
    """Whether methods differ enough at these bits to be compared."""
    return min(parse_bits(bits)) < 6


def extents(args: argparse.Namespace) -> Iterator[Tuple[str, int, int]]:
    """Variants with other numbers of images or of iterations than usual.

    Tuning uses no other number of images, because there a classifier is
    evaluated on the images that its calibration does not use.
    """
    for variant, images, iters in EXTENTS:
        if args.tune and images:
            continue
        extent = (images
                  or args.images, args.iters if iters is None else iters)
        if extent != (args.images, args.iters):
            yield (variant, *extent)
