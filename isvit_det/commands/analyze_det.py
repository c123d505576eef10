"""Which parts of a detector low bits hurt."""
import argparse
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional

from isvit_det.commands import parsers
from isvit_det.commands.console import run_command
from isvit_det.commands.quantize_det import choose_device, configure
from isvit_det.core.checks import parse_bits
from isvit_det.core.errors import QuantError
from isvit_det.core.files import alone_in, write_atomically
from isvit_det.engine.run import QuantizationRun
from isvit_det.host import said_at_import
from isvit_det.inputs.configs import config_errors
from isvit_det.report.tables import format_table, write_result
from isvit_det.screen.output import say, showing
from isvit_det.sensitivity.analysis import (MODES, Analysis, name_of,
                                            plain_figures)
from isvit_det.sensitivity.measures import MEASURES, rank_correlation
from isvit_det.sensitivity.page import cell, render, table_of

LOG = 'analyze_det.log'
REPORT, PAGE = 'analysis.json', 'analysis.html'
FORMAT_VERSION = 1


def configured(args: argparse.Namespace) -> argparse.Namespace:
    """The arguments of quantize_det that stand for these."""
    folder = args.work_dir or f'work_dirs/{Path(args.config).stem}_analysis'
    others = parsers.quantize_det().parse_args([args.config])
    return argparse.Namespace(**{
        **vars(others),
        **vars(args), 'bits': None,
        'iters': 0,
        'work_dir': folder
    })


def analyze(args: argparse.Namespace) -> None:
    """Do what the arguments ask for and show the tables."""
    if args.images < 1:
        raise QuantError(f'--images: {args.images} is not allowed; give a '
                         'number from 1 on.')
    pairs = [parse_bits(text) for text in args.bits or ()]
    with showing(args.verbose, said_at_import()) as screen:
        device = choose_device(args.device, 'none')
        with config_errors():
            cfg = configure(configured(args))
        with alone_in(Path(cfg.work_dir)):
            screen.open_log(Path(cfg.work_dir) / LOG)
            run = QuantizationRun(cfg, device)
            quant = run.quant
            pairs = pairs or [(quant.weight_bits, quant.act_bits)]
            modes = MODES if args.mode == 'both' else (args.mode, )
            analysis = Analysis(
                run,
                pairs,
                by=args.by,
                measure=args.measure,
                num_images=args.images,
                modes=modes)
            show(analysis, analysis.run())


def correlations(parts: Mapping[str, Any], mode: str,
                 bits: str) -> Dict[str, Any]:
    """Rank correlations of the measures with the most costly one."""
    rows = [
        figures[mode][bits] for figures in parts.values()
        if bits in figures.get(mode, {})
    ]
    names = [name for name in MEASURES if any(name in row for row in rows)]
    found = {}
    for name in names[:-1]:
        both = [row for row in rows if name in row and names[-1] in row]
        found[f'{name}, {names[-1]}'] = rank_correlation(
            [row[name].value for row in both],
            [row[names[-1]].value for row in both])
    return found


def show(analysis: Analysis, result: Mapping[str, Any]) -> None:
    """Show the tables of an analysis, and write its files."""
    run, pairs = analysis.run_, [name_of(pair) for pair in analysis.pairs]
    lines = [
        f'{result["images"]} training images measured on, none of which is '
        f'among the {len(analysis.images)} that calibrate; figures are means '
        '± their standard errors'
    ]
    if 'float_ap' in result:
        lines.append('AP of the float model on these images: ' +
                     ', '.join(f'{kind} {value:.1f}'
                               for kind, value in result['float_ap'].items()))
    for bits, figures in result['whole'].items():
        text = ', '.join(f'{name} {cell(name, figure)}'
                         for name, figure in figures.items())
        lines.append(f'{bits}, all parts quantized: {text}')
    ranks: Dict[str, Any] = {}
    for mode in analysis.modes:
        for bits in pairs:
            found = correlations(result['parts'], mode, bits)
            ranks.setdefault(mode, {})[bits] = found
            lines += [
                f'{bits}, {mode}: rank correlation of {names} '
                f'{one["value"]:.2f} ({one["low"]:.2f} to {one["high"]:.2f}, '
                f'95 %, {one["parts"]} parts)' for names, one in found.items()
                if one['value'] is not None
            ]
            say(f'\n{bits}, {mode}\n')
            say(format_table(table_of(result['parts'], mode, bits)))
    say('')
    for line in lines:
        say(line)
    report, page = run.work_dir / REPORT, run.work_dir / PAGE
    write_result(
        report,
        dict(
            plain_figures(result),
            format_version=FORMAT_VERSION,
            config=Path(run.runner.cfg.filename).name,
            checkpoint=run.checkpoint.name,
            quant=run.quant.to_dict(),
            measure=analysis.measure,
            calibration_images=len(analysis.images),
            rank_correlations=ranks))
    title = f'Sensitivity of {Path(run.runner.cfg.filename).stem}'
    html = render(title, lines, result, analysis.modes, pairs).encode()
    write_atomically(page, lambda file: file.write(html))
    say(f'page: {page}\nreport: {report}')


def main(argv: Optional[List[str]] = None) -> int:
    """Run the command; the exit status."""
    args = parsers.analyze_det().parse_args(argv)
    return run_command(lambda: analyze(args))
