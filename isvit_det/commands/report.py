"""The report of a finished run, made again; or of several runs."""
import argparse
from pathlib import Path
from typing import List, Optional

from isvit_det.commands import parsers
from isvit_det.commands.console import run_command
from isvit_det.core.errors import QuantError
from isvit_det.page.write import write_comparison, write_pages


def make(args: argparse.Namespace) -> List[Path]:
    """Write what the arguments ask for; the paths.

    Raises:
        QuantError: if a folder has no results, or the arguments do not fit.
    """
    given = [] if args.work_dir is None else [args.work_dir]
    if args.compare:
        folders = given + args.compare
        if len(folders) < 2:
            raise QuantError(f'--compare: {folders[0]} is one run; give two '
                             'work directories or more.')
        return [write_comparison(folders, args.out)]
    if not given:
        raise QuantError('WORK_DIR: none is given; give the work directory of '
                         'a finished run, or several by --compare.')
    if args.out is not None:
        raise QuantError(f'--out: {args.out} is given without --compare; the '
                         'report of one run is WORK_DIR/report.html, so leave '
                         'it out.')
    return write_pages(args.work_dir)


def main(argv: Optional[List[str]] = None) -> int:
    """Run the command; the exit status."""

    def work() -> None:
        for path in make(parsers.report().parse_args(argv)):
            print(f'report: {path}')

    return run_command(work)
