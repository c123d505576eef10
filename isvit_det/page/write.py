"""Writes reports: of one work directory, or of several side by side."""
import contextlib
import shlex
from pathlib import Path
from typing import Iterator, List, Optional, Sequence

from mmengine.logging import MMLogger

from isvit_det.core.errors import QuantError, describe_error
from isvit_det.core.files import write_atomically
from isvit_det.page.work_dir import RESULTS, read_run

# Name of the report of several runs.
COMPARISON = 'comparison.html'


def page_path(result: Path) -> Path:
    """Path of the report of a result.

    >>> page_path(Path('run/result_packed.json')).as_posix()
    'run/report_packed.html'
    """
    name = result.stem.replace('result', 'report', 1)
    return result.with_name(f'{name}.html')


def write_page(result: Path) -> Path:
    """Write the report of a run; its path.

    Args:
        result: its file of figures; predictions and layers lie beside it.

    Raises:
        QuantError: if the figures cannot be read, or the report not written.
    """
    # matplotlib and Jinja2 take a while, and only reports need them.
    from isvit_det.page.render import render_run
    text = render_run(read_run(result))
    path = page_path(result)
    write_atomically(path, lambda file: file.write(text.encode()))
    return path


def write_pages(work_dir: Path) -> List[Path]:
    """Write the reports of all results in a work directory; their paths.

    Raises:
        QuantError: if there is no result.
    """
    return [write_page(path) for path in _results(work_dir)]


def _results(work_dir: Path) -> List[Path]:
    """The files of figures in a work directory.

    Raises:
        QuantError: if there is none.
    """
    results = [work_dir / name for name in RESULTS]
    found = [path for path in results if path.is_file()]
    if not found:
        raise QuantError(f'{work_dir}: there is no {" and no ".join(RESULTS)}'
                         '; give the work directory of a finished run of '
                         'quantize_det or quantize_cls.')
    return found


def write_comparison(work_dirs: Sequence[Path],
                     out: Optional[Path] = None) -> Path:
    """Write the report of several runs side by side; its path.

    Args:
        work_dirs: at least two, of finished runs.
        out: of the report; default: ``comparison.html`` in the first one.

    Raises:
        QuantError: if one has no result.
    """
    from isvit_det.page.render import render_comparison
    runs = [read_run(_results(work_dir)[0]) for work_dir in work_dirs]
    path = out or work_dirs[0] / COMPARISON
    text = render_comparison(runs)
    write_atomically(path, lambda file: file.write(text.encode()))
    return path


@contextlib.contextmanager
def unless_it_fails(what: str, logger: MMLogger) -> Iterator[None]:
    """Warn of an exception or an interruption in this context, and go on.

    Args:
        what: a sentence on what is lost by it.
        logger: gets the warning.
    """
    try:
        yield
    # A finished run is not lost for its report, whatever is wrong with it.
    except (Exception, KeyboardInterrupt) as error:
        text = ' '.join(str(error).split()) if isinstance(
            error, QuantError) else describe_error(error)
        logger.warning(f'{what}: {text}')


def write_page_or_warn(result: Path, logger: MMLogger) -> Optional[Path]:
    """Write the report of a finished run; None if that failed.

    The warning names the command that makes it again.
    """
    again = shlex.join(
        ['python', '-m', 'isvit_det', 'report',
         str(result.parent)])
    logger.info('writing the report')
    with unless_it_fails(
            f'the report was not written, and "{again}" makes it '
            'again', logger):
        # What an earlier run has left is not of this one.
        page_path(result).unlink(missing_ok=True)
        return write_page(result)
    return None
