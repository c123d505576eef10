"""Settings of the quantizers and of the calibration: frozen dataclasses."""
import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Mapping, Tuple, Union

from isvit_det.core.checks import (MAX_BITS, MIN_BITS, check_choice,
                                   check_number, from_dict, parse_bits)
from isvit_det.core.errors import QuantError
from isvit_det.core.overrides import Override, bits_at, make_overrides
from isvit_det.core.presets import (KINDS, METHODS, PAPER_ITERS,
                                    PAPER_ITERS_6_BITS, PAPER_LR, PAPER_SHIFTS,
                                    WIDE_PERCENTILES)

SOFTMAX_QUANTIZERS = ('sulq', 'log2', 'log_sqrt2', 'uniform')
EXPONENTS = ('table', 'integer')
SHIFT_ERRORS = ('attention', 'output')
SCOPES = ('backbone', 'detector')
PROTOCOLS = ('literature', 'practical')
ITEMS = ('unit', 'image')
STAGE_ONE_INPUTS = ('float', 'quantized')
TABLE_PLACES = ('norm', 'qkv', 'proj', 'fc2', 'neck', 'heads')
MIN_ENTRY_BITS, MAX_ENTRY_BITS = 3, 7


@dataclass(frozen=True)
class QuantConfig:
    """Settings that decide what is quantized, and how.

    Attributes:
        method: preset that the other settings start from: ``'isvit'``,
            ``'isvit_paper'``, ``'repq'`` or ``'minmax'``.
        weight_bits: bits of weights, 2 to 8; one scale per output channel.
        act_bits: bits of activations, 2 to 8; one scale per tensor.
        input_bits: bits of the patch embedding's input, 2 to 8.
        scope: ``'backbone'``, or ``'detector'`` for neck and heads as well.
        softmax: quantizer of post-softmax attention: ``'sulq'``, ``'log2'``,
            ``'log_sqrt2'`` or ``'uniform'``.
        exponent: how SULQ decodes: ``'table'`` looks up one value for each
            of the 2^bits codes, with exponents that are not rounded;
            ``'integer'`` rounds them, as the paper does.
        shifts: grid that SULQ's shift eta is chosen from.
        shift_error: error that eta minimizes: ``'attention'``, of the
            attention itself, or ``'output'``, of attention times value. In a
            long row many small values hold most of the sum, and only the
            second accounts for them.
        percentiles: grid of percentiles that clipping ranges are chosen
            from, by the squared error. A percentile p keeps the quantiles
            1 - p to p; of attention, which is clipped from above only, the
            share p of the values. 1 is min-max.
        activation_tables: activations with a table of unevenly spaced
            values, one for each of the 2^bits codes: ``'norm'``, after the
            norms of the backbone's blocks and mergings; ``'qkv'``, queries,
            keys and values; ``'proj'``, the input of the projection behind
            the attention; ``'fc2'``, that of an MLP's second layer;
            ``'neck'`` and ``'heads'``, the inputs of all layers there. All
            others have evenly spaced values, and these as well unless there
            are more ``entry_bits`` than ``act_bits``.
        entry_bits: bits of the integers in these tables, 3 to 7.
        channelwise: quantize post-LayerNorm activations per channel first and
            fold the scales into one per tensor (the paper's stage 2).
        overrides: bits of single layers or units, in a list of
            ``dict(match='backbone.stages.0.*', weight_bits=8, act_bits=8)``.
            A pattern may leave out one of the two bits; where several match,
            the last one decides. None changes ``input_bits``.
        protocol: ``'literature'`` gives the first layer and the predictors
            the bits of all others, as published figures do; ``'practical'``
            keeps those of them in 8 bits that cost little size.
    """
    method: str = 'isvit'
    weight_bits: int = 4
    act_bits: int = 4
    input_bits: int = 8
    scope: str = 'backbone'
    softmax: str = 'sulq'
    exponent: str = 'table'
    shifts: Tuple[float, ...] = PAPER_SHIFTS
    shift_error: str = 'output'
    percentiles: Tuple[float, ...] = WIDE_PERCENTILES
    activation_tables: Tuple[str, ...] = ('fc2', 'neck', 'heads')
    entry_bits: int = 7
    channelwise: bool = True
    overrides: Tuple[Override, ...] = ()
    protocol: str = 'literature'

    def __post_init__(self) -> None:
        check_choice('quant.method', self.method, tuple(METHODS))
        for key in ('weight_bits', 'act_bits', 'input_bits'):
            check_number(f'quant.{key}', getattr(self, key), MIN_BITS,
                         MAX_BITS, (int, ))
        check_choice('quant.scope', self.scope, SCOPES)
        check_choice('quant.softmax', self.softmax, SOFTMAX_QUANTIZERS)
        check_choice('quant.exponent', self.exponent, EXPONENTS)
        check_choice('quant.shift_error', self.shift_error, SHIFT_ERRORS)
        if not isinstance(self.activation_tables, tuple):
            raise QuantError('quant.activation_tables: '
                             f'{self.activation_tables!r} is not allowed; '
                             f'expected a list of some of '
                             f'{list(TABLE_PLACES)}, such as [fc2], or [].')
        for place in self.activation_tables:
            check_choice('quant.activation_tables', place, TABLE_PLACES)
        check_number('quant.entry_bits', self.entry_bits, MIN_ENTRY_BITS,
                     MAX_ENTRY_BITS, (int, ))
        check_choice('quant.channelwise', self.channelwise, (True, False))
        for key, low in (('shifts', 1e-9), ('percentiles', .5)):
            grid = getattr(self, key)
            if not isinstance(grid, tuple) or not grid:
                raise QuantError(f'quant.{key}: {grid!r} is not allowed; '
                                 'expected a list of numbers.')
            for value in grid:
                check_number(f'quant.{key}', value, low, 1., (int, float))
        check_choice('quant.protocol', self.protocol, PROTOCOLS)
        object.__setattr__(self, 'overrides', make_overrides(self.overrides))

    @classmethod
    def make(
            cls, value: Union[Mapping[str, Any], 'QuantConfig',
                              None]) -> 'QuantConfig':
        """A config as it is, or one from plain values or from none."""
        if isinstance(value, QuantConfig):
            return value
        return cls.from_dict(value or {})

    @property
    def bits(self) -> str:
        """Bits in the form ``'w4a4'``."""
        return f'w{self.weight_bits}a{self.act_bits}'

    @property
    def label(self) -> str:
        """Bits as tables show them.

        ``'w4a4'``, ``'w4a4 mixed'`` with overrides, or ``'w4a4 practical'``.
        """
        if self.protocol != 'literature':
            return f'{self.bits} {self.protocol}'
        return self.bits + ' mixed' * bool(self.overrides)

    @property
    def lowest_bits(self) -> int:
        """The fewest bits of all weights and activations."""
        every = [self.weight_bits, self.act_bits]
        for one in self.overrides:
            every += [
                bits for bits in (one.weight_bits, one.act_bits)
                if bits is not None
            ]
        return min(every)

    def at(self, name: str) -> 'QuantConfig':
        """The settings of one layer or product.

        Args:
            name: in the whole model.
        """
        return self.of_bits(
            *bits_at(self.overrides, name, (self.weight_bits, self.act_bits)))

    def of_bits(self, weight_bits: int, act_bits: int) -> 'QuantConfig':
        """The same settings with these bits everywhere, and no overrides."""
        return dataclasses.replace(
            self, weight_bits=weight_bits, act_bits=act_bits, overrides=())

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> 'QuantConfig':
        """Build from plain values on top of the preset of ``method``.

        ``bits='w4a4'`` stands for ``weight_bits`` and ``act_bits``.

        Raises:
            QuantError: naming the key, the value and what is allowed.

        >>> QuantConfig.from_dict({'bits': 'w3a8'}).act_bits
        8
        >>> QuantConfig.from_dict({'bit': 4})
        Traceback (most recent call last):
        ...
        isvit_det.core.errors.QuantError: quant: unknown keys ['bit']; \
expected a subset of ['method', 'weight_bits', 'act_bits', 'input_bits', \
'scope', 'softmax', 'exponent', 'shifts', 'shift_error', 'percentiles', \
'activation_tables', 'entry_bits', 'channelwise', 'overrides', 'protocol'].
        """
        values = dict(values)
        method = values.get('method', cls.method)
        check_choice('quant.method', method, tuple(METHODS))
        merged = dict(METHODS[method].quant)
        if 'bits' in values:
            both = sorted({'weight_bits', 'act_bits'} & set(values))
            if both:
                raise QuantError(f'quant: bits {values["bits"]!r} and {both} '
                                 'are both given; leave one out.')
            bits = parse_bits(values.pop('bits'))
            merged['weight_bits'], merged['act_bits'] = bits
        merged.update(values)
        return from_dict(cls, 'quant', merged)

    def to_dict(self) -> dict:
        """Plain values that ``from_dict`` turns into an equal config.

        Overrides are left out where there are none, and the protocol of the
        literature, so that files of one width stay readable by versions that
        know no others.
        """
        values = {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in vars(self).items()
        }
        values['overrides'] = [one.to_dict() for one in self.overrides]
        if not self.overrides:
            del values['overrides']
        if self.protocol == 'literature':
            del values['protocol']
        return values


@dataclass(frozen=True)
class SOSConfig:
    """Settings of the calibration; a packed state does not depend on them.

    Attributes:
        num_images: size of the calibration set, drawn from the training
            split.
        iters: iterations per unit and stage, in the mean of stages 1 and 3;
            0 turns the optimization off.
        lr: initial learning rate of Adam; it falls to 0 along a cosine.
        proportional_lr: a run with fewer iterations gets a learning rate that
            is as many times larger, at most 8 times, so that parameters move
            as far; otherwise by the square root of this, at most 5 times.
        other_lr_ratio: learning rate of norms, biases and tables of relative
            positions, as a multiple of that of weights.
        freeze_single_layers: in stage 3, leave the weights of units that are
            a single layer, such as the patch embedding, as they were rounded
            in closed form, and optimize their norm and bias alone.
        items: what a minibatch is drawn from: ``'unit'`` draws a unit's
            independent items, such as the windows of a block, from all
            images; ``'image'`` draws whole images, as the paper does.
        batch: items, or whole images, per iteration. 0 takes the unit's own
            number of items, and one image.
        items_per_image: items drawn from one image at a time where they share
            most of their computation, such as the query rows of global
            attention. 0 takes the unit's own number.
        stage_one_inputs: inputs with which ranges are chosen and stage 1 is
            optimized: ``'float'`` ones, or ``'quantized'`` ones, which the
            units before have computed.
        stage_one_share: share of the iterations of stages 1 and 3 together
            that stage 1 gets.
        rotate_heads: fold a Hadamard rotation of each attention head's
            channels into the layers around the attention.
        closed_form_start: before stage 3, round the weights column by column
            with error compensation, and fit a unit's last layer by ridge
            regression to all that the unit's output lacks.
        weigh_tokens: weigh the error of tokens before the patches, such as a
            class token, by the gradient of the model's output.
        mirror_images: calibrate the backbone on the mirror image of each
            calibration image too.
        correct_heads: fit the weights of neck and heads to their quantized
            inputs in closed form, in scope ``'detector'``.
        weigh_locations: calibrate the convolutions of dense heads, such as an
            RPN, mostly at locations where these heads find objects.
        roll_back: take back what a stage's iterations have changed where the
            unit's error ends greater than it began. It is measured on every
            eighth image, and minibatches are drawn from the others; from
            fewer than 8 images both are drawn from all.
        leave_out_padding: where maps are padded to whole windows, leave out
            of ranges, tables and corrections what the padding computes for
            itself: its queries, their attention and the result of it. Its
            keys and values count, since the tokens of the map attend to them.
        seed: seed of the choice of images and of minibatches.
    """
    num_images: int = 1024
    iters: int = PAPER_ITERS
    lr: float = PAPER_LR
    proportional_lr: bool = False
    other_lr_ratio: float = 1.
    freeze_single_layers: bool = False
    items: str = 'unit'
    batch: int = 0
    items_per_image: int = 0
    stage_one_inputs: str = 'float'
    stage_one_share: float = .5
    rotate_heads: bool = False
    closed_form_start: bool = False
    weigh_tokens: bool = False
    mirror_images: bool = False
    correct_heads: bool = False
    weigh_locations: bool = False
    roll_back: bool = False
    leave_out_padding: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for key, low in (('num_images', 1), ('iters', 0), ('batch', 0),
                         ('items_per_image', 0), ('seed', 0)):
            check_number(f'sos.{key}', getattr(self, key), low, 2**31, (int, ))
        check_number('sos.lr', self.lr, 0., 1., (int, float))
        check_number('sos.other_lr_ratio', self.other_lr_ratio, 0., 1000.,
                     (int, float))
        check_choice('sos.items', self.items, ITEMS)
        check_choice('sos.stage_one_inputs', self.stage_one_inputs,
                     STAGE_ONE_INPUTS)
        check_number('sos.stage_one_share', self.stage_one_share, 0., 1.,
                     (int, float))
        for key in ('rotate_heads', 'closed_form_start', 'weigh_tokens',
                    'mirror_images', 'correct_heads', 'weigh_locations',
                    'roll_back', 'leave_out_padding', 'proportional_lr',
                    'freeze_single_layers'):
            check_choice(f'sos.{key}', getattr(self, key), (True, False))

    @property
    def num_views(self) -> int:
        """Views of each image: the image, and perhaps its mirror image."""
        return 1 + self.mirror_images

    def iters_of(self, stage: int) -> int:
        """Iterations of stage 1 or 3."""
        first = round(2 * self.iters * self.stage_one_share)
        return first if stage == 1 else 2 * self.iters - first

    @classmethod
    def from_dict(cls,
                  values: Mapping[str, Any],
                  quant: QuantConfig,
                  kind: str = 'detector') -> 'SOSConfig':
        """Build from plain values on top of the preset of ``quant.method``.

        The paper runs 1000 iterations, 200 from 6 bits up, at 4e-5. A run
        that asks for fewer gets a larger learning rate, unless it names its
        own.

        Args:
            values: settings by name.
            quant: settings of the quantizers.
            kind: kind of the model, ``'detector'`` or ``'classifier'``.

        Raises:
            QuantError: naming the key, the value and what is allowed.
        """
        assert kind in KINDS
        merged = dict(METHODS[quant.method].sos_of(kind))
        default = PAPER_ITERS if quant.lowest_bits < 6 else PAPER_ITERS_6_BITS
        merged.setdefault('iters', default)
        merged.update(values)
        config = from_dict(cls, 'sos', merged)
        if 0 < config.iters < default and 'lr' not in values:
            config = dataclasses.replace(
                config,
                lr=short_lr(config.iters, default, config.proportional_lr))
        return config

    def to_dict(self) -> dict:
        """Plain values of every field."""
        return dataclasses.asdict(self)


def short_lr(iters: int,
             default: int = PAPER_ITERS,
             proportional: bool = False) -> float:
    """Learning rate of a run shortened from ``default`` iterations.

    Grows with the square root of the shortening, at most fivefold, or in
    proportion to it, at most eightfold.

    >>> short_lr(1000), short_lr(100), short_lr(1)
    (4e-05, 0.000126, 0.0002)
    >>> short_lr(500, proportional=True), short_lr(100, proportional=True)
    (8e-05, 0.00032)
    """
    shortening = default / iters
    factor = min(8., shortening) if proportional else min(
        5., math.sqrt(shortening))
    return round(PAPER_LR * factor, 6)
