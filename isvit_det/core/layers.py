"""Quantized layers, and the modes and fitting of the quantizers of a model."""
import contextlib
from typing import (Any, Callable, Dict, Iterator, List, NamedTuple, Optional,
                    Tuple, Union)

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isvit_det.core.errors import QuantError, few_names
from isvit_det.core.quantizers import (AttentionQuantizer, Quantizer,
                                       UniformQuantizer, attention_quantizer)
from isvit_det.core.settings import QuantConfig
from isvit_det.core.table_quantizer import activation_quantizer

# Computes a layer's output from its input in another way than ``forward``
# does, or gives None where it cannot.
NativeForward = Callable[[nn.Module, Tensor], Optional[Tensor]]


class QuantLinear(nn.Linear):
    """``nn.Linear`` with quantized input and weight.

    Weights are quantized per output channel, inputs per tensor. A layer
    without a bias has a buffer ``offset`` (out_features,), initially 0, to
    which stage 2 adds what it would add to a bias.

    Args:
        source: float layer, whose parameters are shared, not copied.
        config: bits and range search.
        place: of the input, see ``activation_quantizer``.

    Attributes:
        native: runs the layer where it can; None or where it cannot, the
            layer is simulated in float.
    """
    own_buffers = ('offset', )
    offset: Optional[Tensor]
    native: Optional[NativeForward] = None

    def __init__(self,
                 source: nn.Linear,
                 config: QuantConfig,
                 place: str = '') -> None:
        nn.Module.__init__(self)
        self.in_features = source.in_features
        self.out_features = source.out_features
        self.weight = source.weight
        self.bias = source.bias
        offset = None
        if source.bias is None:
            offset = source.weight.new_zeros(source.out_features)
        self.register_buffer('offset', offset)
        self.place = place
        self.make_quantizers_(config)

    def make_quantizers_(self, config: QuantConfig) -> None:
        """Give the layer new quantizers, which are not fitted."""
        self.input_quantizer: Any = activation_quantizer(config, self.place)
        self.weight_quantizer = UniformQuantizer(config.weight_bits, 'weight',
                                                 config.percentiles,
                                                 self.out_features, 0)

    def forward(self, input: Tensor) -> Tensor:
        if self.native is not None:
            output = self.native(self, input)
            if output is not None:
                return output
        out = F.linear(
            self.input_quantizer(input), self.weight_quantizer(self.weight),
            self.bias)
        return out if self.offset is None else out + self.offset


class QuantConv2d(nn.Conv2d):
    """``nn.Conv2d`` with quantized input and weight, as ``QuantLinear``.

    Args:
        source: float layer, whose parameters are shared, not copied.
        config: bits and range search.
        input_bits: bits of the input instead of ``config.act_bits``.
        place: of the input, see ``activation_quantizer``.
    """
    native: Optional[NativeForward] = None

    def __init__(self,
                 source: nn.Conv2d,
                 config: QuantConfig,
                 input_bits: Optional[int] = None,
                 place: str = '') -> None:
        nn.Module.__init__(self)
        # The attributes that nn.Conv2d's forward and repr use.
        for name in ('in_channels', 'out_channels', 'kernel_size', 'stride',
                     'padding', 'dilation', 'transposed', 'output_padding',
                     'groups', 'padding_mode',
                     '_reversed_padding_repeated_twice'):
            setattr(self, name, getattr(source, name))
        self.weight = source.weight
        self.bias = source.bias
        self.place = place
        self.input_bits = input_bits
        self.make_quantizers_(config)

    def make_quantizers_(self, config: QuantConfig) -> None:
        """Give the layer new quantizers, which are not fitted."""
        self.input_quantizer: Any = activation_quantizer(config, self.place)
        if self.input_bits is not None:
            self.input_quantizer = UniformQuantizer(self.input_bits, 'act',
                                                    config.percentiles)
        self.weight_quantizer = UniformQuantizer(config.weight_bits, 'weight',
                                                 config.percentiles,
                                                 self.out_channels, 0)

    def forward(self, input: Tensor) -> Tensor:
        if self.native is not None:
            output = self.native(self, input)
            if output is not None:
                return output
        return self._conv_forward(
            self.input_quantizer(input), self.weight_quantizer(self.weight),
            self.bias)

    def run_patches(self, patches: Tensor) -> Tensor:
        """Output for patches of the size of the kernel.

        This is one matrix product, which on a CPU is several times as fast as
        ``forward``. The order of the sums differs.

        Args:
            patches: shape (n, in_channels, *kernel_size).

        Returns:
            Shape (n, out_channels).
        """
        return F.linear(
            self.input_quantizer(patches).flatten(1),
            self.weight_quantizer(self.weight).flatten(1), self.bias)


class QuantMatMul(nn.Module):
    """``left @ right`` with both operands quantized.

    Args:
        config: bits and quantizers.
        of_attention: whether it is the product of post-softmax attention and
            value, or else that of query and key.
    """

    def __init__(self, config: QuantConfig, of_attention: bool) -> None:
        super().__init__()
        self.of_attention = of_attention
        self.make_quantizers_(config)

    def make_quantizers_(self, config: QuantConfig) -> None:
        """Give the product new quantizers, which are not fitted."""
        self.left_quantizer: Quantizer = (
            attention_quantizer(config)
            if self.of_attention else activation_quantizer(config, 'qkv'))
        self.right_quantizer: Quantizer = activation_quantizer(config, 'qkv')

    @classmethod
    def of_query_key(cls, config: QuantConfig) -> 'QuantMatMul':
        """Product of query and key."""
        return cls(config, False)

    @classmethod
    def of_attention_value(cls, config: QuantConfig) -> 'QuantMatMul':
        """Product of post-softmax attention and value."""
        return cls(config, True)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        """Product of (..., N, K) and (..., K, M), shape (..., N, M)."""
        return self.left_quantizer(left) @ self.right_quantizer(right)


def quantized_layers(
        model: nn.Module) -> List[Union[QuantLinear, QuantConv2d]]:
    """All layers with quantized weights, in definition order."""
    return [
        module for module in model.modules()
        if isinstance(module, (QuantLinear, QuantConv2d))
    ]


@contextlib.contextmanager
def simulation(model: nn.Module) -> Iterator[None]:
    """Simulate all of a model in float in this context.

    Its modules' ``native`` is restored at the end, also after an error.
    """
    before: List[Tuple[Any, Any]] = [(module, module.native)
                                     for module in model.modules()
                                     if hasattr(module, 'native')]
    for module, _ in before:
        module.native = None
    try:
        yield
    finally:
        for module, native in before:
            module.native = native


class Site(NamedTuple):
    """One quantizer of a model, as reports list it."""
    name: str
    bits: int
    granularity: str
    role: str
    kind: str
    num_calls: int


def quantizers(model: nn.Module) -> Dict[str, Quantizer]:
    """All quantizers of a model by name, in definition order."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, Quantizer)
    }


def list_sites(model: nn.Module) -> List[Site]:
    """List every quantizer with its settings and its number of calls."""
    return [
        Site(name, q.bits, q.granularity, q.role,
             type(q).__name__, q.num_calls)
        for name, q in quantizers(model).items()
    ]


def set_precision_(model: nn.Module, weights: bool, acts: bool) -> None:
    """Enable or disable the quantizers of weights and of activations."""
    for quantizer in quantizers(model).values():
        quantizer.enabled = weights if quantizer.role == 'weight' else acts


@contextlib.contextmanager
def precision(model: nn.Module, weights: bool, acts: bool) -> Iterator[None]:
    """Quantize weights, activations, both or neither in this context.

    At the end every quantizer is enabled or disabled as before.
    """
    before = [(q, q.enabled) for q in quantizers(model).values()]
    set_precision_(model, weights, acts)
    try:
        yield
    finally:
        for quantizer, enabled in before:
            quantizer.enabled = enabled


@contextlib.contextmanager
def observe(model: nn.Module) -> Iterator[None]:
    """Observe the inputs of activation quantizers, and fit these at the end.

    Quantizers that did not run are not fitted, and none is after an error.
    The model runs in its present mode meanwhile. The observations of all
    processes are merged.
    """
    observed = [q for q in quantizers(model).values() if q.role == 'act']
    for quantizer in observed:
        quantizer.observer = quantizer.new_observer()
    handles = [
        module.register_forward_pre_hook(_keep_values)
        for module in model.modules() if isinstance(module, QuantMatMul)
    ]
    try:
        with torch.no_grad():
            yield
        for quantizer in observed:
            observer = quantizer.observer
            assert observer is not None
            observer.merge_(
                next(b for b in quantizer.buffers() if b.is_floating_point()))
            if observer.counts is not None:
                quantizer.fit_(observer)
    finally:
        for quantizer in observed:
            quantizer.observer = None
        for handle in handles:
            handle.remove()


def _keep_values(module: nn.Module, operands: tuple) -> None:
    """Give an attention observer the values that the attention multiplies."""
    left = module.left_quantizer
    if isinstance(left, AttentionQuantizer) and left.observer is not None:
        left.observer.keep_(*operands, left.inside_map)  # type: ignore


def fit_weights_(model: nn.Module) -> None:
    """Fit the weight quantizers of all layers."""
    for layer in quantized_layers(model):
        layer.weight_quantizer.fit_tensor_(layer.weight)


def is_calibrated(model: nn.Module) -> bool:
    """Whether all quantizers of a model are fitted.

    Raises:
        QuantError: if only some are, naming the others.
    """
    all_quantizers = quantizers(model)
    unfitted = [n for n, q in all_quantizers.items() if not q.is_fitted]
    if unfitted and len(unfitted) < len(all_quantizers):
        raise QuantError(
            f'the model is calibrated in part: {few_names(unfitted)} have no '
            'range; calibrate it as a whole.')
    return not unfitted
