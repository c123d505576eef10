#!/usr/bin/env python
"""Native kernels on layers and blocks of random shapes.

Every case is drawn from a number, its seed. Integer sums and codes of every
kernel that this CPU runs are compared with 64-bit arithmetic to the bit, and
what is float in a block with the portable kernels. The first case that differs
is named, with the seed that repeats it.
"""
import argparse
import collections
import random
import sys
import time
from typing import List, Optional

import torch

from benchmarks.fuzz_blocks import (check_merging, check_swin_blocks,
                                    check_vit_blocks)
from benchmarks.fuzz_layers import Mismatch, check_layer, check_product
from isvit_det.commands.console import run_command
from isvit_det.commands.parser import Parser
from isvit_det.core.errors import QuantError
from isvit_det.runtime.build import NoLibrary
from isvit_det.runtime.native import supported_isas

# The cheap ones are many.
CHECKS = (*[check_product] * 6, *[check_layer] * 4, check_swin_blocks,
          check_vit_blocks, check_merging)


def parse_args(argv: Optional[List[str]] = None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add('--seconds', type=float, default=60, help='time to run for')
    add('--first', type=int, help='first seed; default: by the clock')
    add('--seed', type=int, help='the only seed')
    return parser.parse_args(argv)


@torch.no_grad()
def run_case(seed: int) -> str:
    """Run one case on all kernels.

    Returns:
        Its kind.

    Raises:
        Mismatch: if a kernel gives something else than it should.
    """
    draw = random.Random(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return draw.choice(CHECKS)(draw, supported_isas())


def main() -> None:
    args = parse_args()
    try:
        names = [isa.name for isa in supported_isas()]
    except NoLibrary as error:
        raise QuantError(f'fuzz: there is no native library: {error}.')
    seed = args.first if args.first is not None else int(time.time()) * 1000
    if args.seed is not None:
        seed = args.seed
    first = seed
    counts: collections.Counter = collections.Counter()
    end = time.monotonic() + args.seconds
    while True:
        # What kills the process leaves this line behind.
        print(f'seed {seed}', end='\r', flush=True)
        try:
            counts[run_case(seed)] += 1
        except Mismatch as error:
            raise QuantError(
                f'fuzz: {error}; repeat it by --seed {seed}.') from error
        seed += 1
        if args.seed is not None or time.monotonic() > end:
            break
    found = ', '.join(f'{n} {kind}' for kind, n in counts.most_common())
    print(f'seeds {first} to {seed - 1} on {", ".join(names)}: all equal '
          f'({found})')


if __name__ == '__main__':
    sys.exit(run_command(main))
