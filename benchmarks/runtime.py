#!/usr/bin/env python
"""Native layers and detectors against float and simulation, on one thread.

Each line of the table is measured in turns: float, simulation, native, float
again, and so on, in processor seconds of this process, so that a machine with
other work changes the ratios little. The medians are printed.
"""
import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Callable, Dict, List, Optional

import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.registry import init_default_scope
from torch import Tensor, nn

from isvit_det.commands.console import run_command
from isvit_det.commands.parsers import Parser
from isvit_det.core.errors import QuantError
from isvit_det.core.layers import QuantConv2d, QuantLinear, set_precision_
from isvit_det.core.settings import QuantConfig
from isvit_det.inputs.configs import quantize_config_
from isvit_det.registry import MODELS
from isvit_det.report.tables import format_table
from isvit_det.runtime.engine import attach_runtime_

DETECTOR = 'configs/drawn/mask-rcnn_swin-mini_fpn_isvit-w4a4_drawn.py'
LINEARS = ((67200, 96, 384), (4200, 384, 1536), (1050, 3072, 768))
CONVS = ((256, 256, 1, 100, 168), (256, 256, 3, 100, 168), (64, 64, 3, 56, 56))


def parse_args(argv: Optional[List[str]] = None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add('--bits', nargs='+', default=['w4a4', 'w8a8'])
    add('--rounds', type=int, default=7)
    add('--packed',
        type=Path,
        help='a packed file of the demo, for a line on its whole detector')
    return parser.parse_args(argv)


def measure(runs: Dict[str, Callable[[], object]],
            rounds: int) -> Dict[str, float]:
    """Median processor seconds of each run, which take turns."""
    seconds: Dict[str, List[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.process_time()
            run()
            seconds[name].append(time.process_time() - start)
    return {name: statistics.median(found) for name, found in seconds.items()}


def row(what: str, found: Dict[str, float]) -> Dict[str, str]:
    cells = {'': what}
    cells.update(
        (f'{name} ms', f'{1e3 * value:.1f}') for name, value in found.items())
    cells['float / native'] = f'{found["float"] / found["native"]:.2f}'
    return cells


def calibrate_(layer: nn.Module, x: Tensor) -> None:
    """Give a quantized layer the whole range of its weights and inputs."""
    layer.weight_quantizer.fit_tensor_(layer.weight)  # type: ignore
    layer.input_quantizer.fit_tensor_(x)  # type: ignore
    set_precision_(layer, weights=True, acts=True)


def layer_row(what: str, source: nn.Module, x: Tensor, bits: str,
              rounds: int) -> Dict[str, str]:
    config = QuantConfig.from_dict(dict(bits=bits))
    twin = QuantLinear if isinstance(source, nn.Linear) else QuantConv2d
    model = nn.Sequential(twin(source, config)).eval()  # type: ignore
    calibrate_(model[0], x)
    attach_runtime_(model, 'native')

    def run(engine: str) -> Callable[[], object]:

        def work() -> object:
            model.runtime.engine = engine  # type: ignore
            return model(x)

        return work

    return row(
        f'{what} {bits}',
        measure(
            dict(
                float=lambda: source(x),
                simulation=run('simulation'),
                native=run('native')), rounds))


def layer_rows(bits: str, rounds: int) -> List[Dict[str, str]]:
    rows = []
    for tokens, inputs, outputs in LINEARS:
        rows.append(
            layer_row(f'linear {tokens}x{inputs}x{outputs}',
                      nn.Linear(inputs, outputs), torch.randn(tokens, inputs),
                      bits, rounds))
    for inputs, outputs, size, height, width in CONVS:
        conv = nn.Conv2d(inputs, outputs, size, padding=size // 2)
        rows.append(
            layer_row(
                f'conv {size}x{size} {inputs}-{outputs} {height}x{width}',
                conv, torch.randn(1, inputs, height, width), bits, rounds))
    return rows


def detector_row(packed: Path, rounds: int) -> Dict[str, str]:
    """The demo's detector on one random image."""
    content = torch.load(packed, weights_only=True)
    cfg = Config.fromfile(DETECTOR)
    init_default_scope('mmdet')
    quantize_config_(cfg, content['quant'])
    model = MODELS.build(cfg.model).eval()
    model.load_state_dict(content['state_dict'])
    x = torch.randn(1, 3, 224, 224)

    def run(engine: str) -> Callable[[], object]:

        def work() -> object:
            is_float = engine == 'float'
            set_precision_(model, weights=not is_float, acts=not is_float)
            model.runtime.engine = 'auto' if is_float else engine
            return model.rpn_head(model.extract_feat(x))

        return work

    names = ('float', 'simulation', 'native')
    return row('demo: backbone, neck, RPN at 224x224',
               measure({name: run(name)
                        for name in names}, rounds))


@torch.no_grad()
def main() -> None:
    args = parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    # Every change of the engine would be told.
    MMLogger.get_current_instance().setLevel('WARNING')
    probe = nn.Sequential()
    attach_runtime_(probe, 'native')
    choice = probe.runtime.choose()  # type: ignore
    if choice.isa is None:
        raise QuantError(f'runtime: {choice.reason}.')
    print(f'{choice.isa.name} kernels, torch {torch.__version__}, one thread')
    rows = []
    for bits in args.bits:
        rows += layer_rows(bits, args.rounds)
    if args.packed is not None:
        rows.append(detector_row(args.packed, args.rounds))
    print(format_table(rows))


if __name__ == '__main__':
    sys.exit(run_command(main))
