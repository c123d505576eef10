"""Keep of a training checkpoint what a float detector needs, in float32."""
from pathlib import Path
from typing import List, Optional

from isvit_det.checkpoint import is_packed, read_checkpoint
from isvit_det.commands import parsers
from isvit_det.commands.console import run_command
from isvit_det.commands.conversion import as_floats, check_out, save_float
from isvit_det.core.errors import QuantError


def find_checkpoint(source: Path) -> Path:
    """``source`` itself, or the last checkpoint of a work directory."""
    if not source.is_dir():
        return source
    last = source / 'last_checkpoint'
    if not last.is_file():
        raise QuantError(f'{source} has no last_checkpoint; train first, or '
                         'give the path of a checkpoint.')
    # MMEngine notes the path it wrote to; the folder may have moved since.
    name = Path(last.read_text(errors='replace').strip()).name
    # What is no text may hold what no path may.
    if not name or '\0' in name:
        raise QuantError(f'{last} names no checkpoint; give the path of one.')
    return source / name


def publish(source: Path, out: Path) -> None:
    """Write weights and class names only, with no trace of the training.

    Raises:
        QuantError: if there are no finite float weights, or ``out`` is the
            checkpoint itself.
    """
    path = find_checkpoint(source)
    check_out(path, out)
    content = read_checkpoint(path)
    if is_packed(content):
        raise QuantError(f'checkpoint: {path} is a packed one, whose weights '
                         'are codes; give the float one that it was made '
                         'from.')
    print(content['taken'])
    meta = content.get('meta')
    known = meta.get('dataset_meta') if isinstance(meta, dict) else None
    save_float(out, as_floats(content['state_dict']),
               known if isinstance(known, dict) else {})


def main(argv: Optional[List[str]] = None) -> int:
    args = parsers.publish_float().parse_args(argv)
    return run_command(lambda: publish(args.source, args.out))
