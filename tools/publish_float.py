#!/usr/bin/env python
"""Keep of a training checkpoint what a float detector needs, in float32."""
import argparse
import importlib.util
import sys
from pathlib import Path
from typing import List, Optional

import torch

if importlib.util.find_spec('isvit_det') is None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from isvit_det.checkpoint import plain_metainfo, read_checkpoint
from isvit_det.core.errors import QuantError
from isvit_det.core.files import write_atomically


def find_checkpoint(source: Path) -> Path:
    """``source`` itself, or the last checkpoint of a work directory."""
    if not source.is_dir():
        return source
    last = source / 'last_checkpoint'
    if not last.is_file():
        raise QuantError(f'{source} has no last_checkpoint; train first, or '
                         'give the path of a checkpoint.')
    # MMEngine notes the path it wrote to; the folder may have moved since.
    return source / Path(last.read_text().strip()).name


def publish(source: Path, out: Path) -> None:
    """Write weights and class names only, with no trace of the training."""
    content = read_checkpoint(find_checkpoint(source))
    state = {
        key: value.float() if value.is_floating_point() else value
        for key, value in content.get('state_dict', content).items()
    }
    names = plain_metainfo(content.get('meta', {}).get('dataset_meta', {}))
    kept = dict(state_dict=state, meta=dict(dataset_meta=names))
    write_atomically(out, lambda file: torch.save(kept, file))
    print(f'{out}: {len(state)} tensors, {out.stat().st_size / 1e6:.1f} MB')


def main(argv: Optional[List[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        'source',
        type=Path,
        help='a checkpoint, or a work directory: its last one')
    parser.add_argument('out', type=Path, help='the file to write')
    args = parser.parse_args(argv)
    try:
        publish(args.source, args.out)
    except QuantError as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    return 0


if __name__ == '__main__':
    sys.exit(main())
