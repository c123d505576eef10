"""A small backbone of token MLPs that lists units, for tests without mmdet."""
from typing import List, NamedTuple

import torch
from torch import Tensor, nn

from isvit_det.core.layers import QuantLinear
from isvit_det.core.reparam import NormLinear
from isvit_det.core.settings import QuantConfig
from isvit_det.core.units import State, Unit


class Tokens(NamedTuple):
    tokens: Tensor


class Mlp(nn.Module):

    def __init__(self, channels: int, config: QuantConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.fc1 = QuantLinear(
            nn.Linear(channels, 2 * channels), config, 'norm')
        self.fc2 = QuantLinear(
            nn.Linear(2 * channels, channels), config, 'fc2')

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(nn.functional.gelu(self.fc1(self.norm(x))))


class MlpUnit(Unit):

    def pairs(self) -> List[NormLinear]:
        return [NormLinear(self.module.norm, self.module.fc1)]

    def last_layer(self) -> QuantLinear:
        return self.module.fc2

    def forward(self, state: State) -> State:
        x = state.x
        if x.ndim == 4:
            x = x.flatten(2).transpose(1, 2)
        return State(self.module(x), state.size)

    def num_items(self, size) -> int:
        return size[0] * size[1]

    def gather(self, state: State, items: Tensor) -> Tokens:
        x = state.x
        if x.ndim == 4:
            x = x.flatten(2).transpose(1, 2)
        return Tokens(x[0, items])

    def gather_target(self, state: State, size, items: Tensor) -> Tensor:
        return state.x[0, items]

    def run(self, batch: Tokens) -> Tensor:
        return self.module(batch.tokens)


class ToyBackbone(nn.Module):
    """``depth`` units on (1, C, H, W) maps, with uneven channels."""

    def __init__(self, config: QuantConfig, channels=8, depth=3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            Mlp(channels, config) for _ in range(depth))
        for block in self.blocks:
            block.norm.weight.data = torch.rand(channels) * 3 + .1
            block.norm.bias.data = torch.randn(channels)

    def units(self) -> List[Unit]:
        return [
            MlpUnit(f'blocks.{i}', block, 32)
            for i, block in enumerate(self.blocks)
        ]


def toy(method='isvit', bits='w4a4', seed=0, **quant) -> ToyBackbone:
    """A toy backbone with weights of a seed, in eval mode."""
    torch.manual_seed(seed)
    config = QuantConfig.from_dict(dict(method=method, bits=bits, **quant))
    return ToyBackbone(config).eval()


def toy_images(num=6, seed=0) -> List[Tensor]:
    """Maps of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(1, 8, 4 + i % 3, 5, generator=generator)
        for i in range(num)
    ]
