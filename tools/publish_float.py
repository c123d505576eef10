#!/usr/bin/env python
"""Keep of a training checkpoint what a float detector needs, in float32."""
import importlib.util
import sys
from pathlib import Path
from typing import List, Optional

if importlib.util.find_spec('isvit_det') is None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from isvit_det.checkpoint import read_checkpoint
from isvit_det.core.errors import QuantError
from isvit_det.engine.console import Parser, run_command
from isvit_det.engine.conversion import as_floats, save_float


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
    path = find_checkpoint(source)
    content = read_checkpoint(path)
    print(content['taken'])
    meta = content.get('meta')
    known = meta.get('dataset_meta') if isinstance(meta, dict) else None
    save_float(out, as_floats(content['state_dict']),
               known if isinstance(known, dict) else {})


def main(argv: Optional[List[str]] = None) -> int:
    parser = Parser(description=__doc__)
    parser.add_argument(
        'source',
        type=Path,
        help='a checkpoint, or a work directory: its last one')
    parser.add_argument('out', type=Path, help='the file to write')
    args = parser.parse_args(argv)
    return run_command(lambda: publish(args.source, args.out))


if __name__ == '__main__':
    sys.exit(main())
