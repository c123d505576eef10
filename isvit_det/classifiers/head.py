"""QuantClassifier: a quantized backbone with a quantized classifier head."""
import copy
from typing import Any, List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from isvit_det.core.layers import QuantLinear
from isvit_det.core.reparam import NormLinear
from isvit_det.core.settings import QuantConfig
from isvit_det.core.units import State, Unit
from isvit_det.packed.loading import install_loading_

IMAGES_PER_STEP = 64


class ClassifierHead(nn.Module):
    """Norm, pooling, norm, and one or more linear layers.

    The layers are copies, because calibration changes them, and the float
    classifier is needed for comparison.

    Args:
        linears: linear layers, each of which reads its own prefix token. A
            single one may instead read the mean of the patches. The copies
            are quantized.
        pool: ``'token'`` or ``'avg'``.
        num_prefix_tokens: number of tokens before the patches.
        norm: before the pooling.
        fc_norm: after the pooling.
        config: bits and quantizers.
    """

    def __init__(self, linears: Sequence[nn.Linear], pool: str,
                 num_prefix_tokens: int, norm: nn.Module, fc_norm: nn.Module,
                 config: QuantConfig) -> None:
        super().__init__()
        self.pool = pool
        self.num_prefix_tokens = num_prefix_tokens
        self.norm = copy.deepcopy(norm)
        self.fc_norm = copy.deepcopy(fc_norm)
        self.num_classes = linears[0].out_features
        self.linears = nn.ModuleList(
            QuantLinear(copy.deepcopy(x), config) for x in linears)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, N, C) to logits (B, classes).

        The logits of several linear layers are averaged.
        """
        x = self.norm(x)
        if self.pool == 'avg':
            x = x[:, self.num_prefix_tokens:].mean(1, keepdim=True)
        x = self.fc_norm(x)
        logits = [linear(x[:, i]) for i, linear in enumerate(self.linears)]
        return logits[0] if len(logits) == 1 else sum(logits) / len(logits)


class ImageItems(NamedTuple):
    """Tokens of whole images, shape (n, N, C)."""
    tokens: Tensor


class HeadUnit(Unit):
    """The head; its items are images."""

    def __init__(self, head: ClassifierHead) -> None:
        super().__init__('head', head, IMAGES_PER_STEP)

    def pairs(self) -> List[NormLinear]:
        norms = [
            norm for norm in (self.module.norm, self.module.fc_norm)
            if isinstance(norm, nn.LayerNorm)
        ]
        # A norm before two layers cannot be folded into one of them. The mean
        # over tokens between norm and layer commutes with the folding.
        if len(norms) != 1 or len(self.module.linears) != 1:
            return []
        return [NormLinear(norms[0], self.module.linears[0])]

    def last_layer(self) -> Optional[QuantLinear]:
        linears = self.module.linears
        return linears[0] if len(linears) == 1 else None

    def forward(self, state: State) -> State:
        return State(self.module(state.x)[:, None], (1, 1))

    def num_items(self, size: Any) -> int:
        return 1

    def gather(self, state: State, items: Tensor) -> ImageItems:
        return ImageItems(state.x.expand(len(items), -1, -1))

    def gather_target(self, state: State, size: Any, items: Tensor) -> Tensor:
        return state.x[0].expand(len(items), -1)

    def run(self, batch: ImageItems) -> Tensor:
        return self.module(batch.tokens)


class QuantClassifier(nn.Module):
    """A quantized classifier, head included.

    Until it is calibrated, its output is that of the float classifier. It
    loads float, calibrated and packed state dicts strictly.

    Args:
        backbone: a quantized backbone, without its final norm.
        head: reads the tokens of the backbone.
        config: the settings that both were built with.
    """

    def __init__(self, backbone: Any, head: ClassifierHead,
                 config: QuantConfig) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.quant_config = config
        install_loading_(self, config)

    def units(self) -> List[Unit]:
        """The parts of the forward pass in order, the head included."""
        return [*self.backbone.units(), HeadUnit(self.head)]

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) of one size to logits (B, classes)."""
        return self.head(self.backbone.tokens(images).x)


@torch.no_grad()
def is_same_function(source: nn.Module, model: nn.Module,
                     size: Tuple[int, int]) -> bool:
    """Whether two classifiers give the same logits for a random image.

    Args:
        source: float, in eval mode.
        model: uncalibrated, in eval mode.
        size: height and width of the image, in pixels.
    """
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, 3, *size, generator=generator)
    expected, actual = source(image), model(image)
    return (expected.shape == actual.shape
            and bool((expected - actual).norm() <= 1e-4 * expected.norm()))
