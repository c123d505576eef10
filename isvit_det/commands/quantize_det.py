"""A detector in low bits, and its AP beside the float one's."""
import argparse
import contextlib
import copy
import os
import sys
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional

from mmcv.ops import get_compiling_cuda_version
from mmdet.utils import setup_cache_size_limit_of_dynamo
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.dist import is_main_process

from isvit_det.checkpoint import (is_packed, read_checkpoint,
                                  refuse_other_layouts)
from isvit_det.commands import parsers
from isvit_det.commands.console import (check_device, given, layer_bits,
                                        run_command, settings, show_files)
from isvit_det.commands.launch import joined
from isvit_det.core.errors import QuantError
from isvit_det.core.files import alone_in, local_checkpoint
from isvit_det.engine.run import QuantizationRun
from isvit_det.host import said_at_import
from isvit_det.inputs.config_forms import as_python
from isvit_det.inputs.configs import (DETECTOR, config_errors, configure_hook_,
                                      is_replaceable, load_config,
                                      quantize_config_)
from isvit_det.packed.state import packed_config
from isvit_det.report.tables import (format_table, further_lines,
                                     protocol_line, silent_sites, table_rows,
                                     write_result)
from isvit_det.runtime import BOTH
from isvit_det.runtime.engine import VARIABLE
from isvit_det.screen.output import say, showing
from isvit_det.sensitivity.budget import parse_budget, parse_choices
from isvit_det.sensitivity.choice import Chooser, choice_lines

# Name of the log in the work directory.
LOG = 'quantize_det.log'


def parse_args(argv: Optional[List[str]]) -> argparse.Namespace:
    argv = sys.argv[1:] if argv is None else argv
    args = parsers.quantize_det().parse_args(argv)
    args.command = ['quantize_det', *argv]
    return args


def configure(args: argparse.Namespace) -> Config:
    """The config of the run that the arguments ask for.

    Raises:
        QuantError: if they, the config or the checkpoint cannot be used.
    """
    more = settings(args.cfg_options)
    cfg = load_config(args.config, more.rest)
    # What has an option of its own is taken from there.
    quant: Dict[str, Any] = {
        **more.quant,
        **given(
            bits=args.bits,
            scope=args.scope,
            method=args.method,
            protocol=args.protocol)
    }
    if args.layer_bits:
        # After those of the config, since the last one decides.
        earlier = quant.get('overrides', quant_of(cfg).get('overrides') or ())
        quant['overrides'] = [*earlier, *layer_bits(args.layer_bits)]
    source = args.checkpoint or cfg.get('load_from')
    if not source:
        raise QuantError('checkpoint: none is given and the config has no '
                         'load_from; add CHECKPOINT to the command.')
    path = local_checkpoint(source)
    content = read_checkpoint(path)
    if is_packed(content):
        packed = packed_config(content['state_dict'], quant)
        # A float config says nothing of quantization and takes the file's;
        # loading compares one of ours with the file's.
        if cfg.get('model', {}).get('type') != DETECTOR:
            quant = packed.to_dict()
    else:
        refuse_other_layouts(content['state_dict'], path)
    quantize_config_(cfg, quant)
    if args.engine != BOTH:
        cfg.model.update(given(engine=args.engine))
    elif os.environ.get(VARIABLE):
        raise QuantError(f'--engine: {BOTH!r} are asked for, and the '
                         f'environment variable {VARIABLE} names one; unset '
                         'it, or leave --engine out.')
    cfg = as_python(cfg)
    sos = given(num_images=args.calib_images, iters=args.iters, seed=args.seed)
    configure_hook_(cfg, {**more.sos, **sos}, args.store_gb)
    cfg.load_from = str(path)
    cfg.resume = False
    cfg.launcher = args.launcher
    if args.launcher != 'none' and get_device() == 'cpu':
        cfg.setdefault('model_wrapper_cfg',
                       dict(type='MMDistributedDataParallel', device_ids=None))
    cfg.work_dir = _work_dir(cfg, args)
    return cfg


def quant_of(cfg: Config) -> Mapping[str, Any]:
    """Settings of the quantization in a config; none in a float one."""
    model = cfg.get('model')
    quant = model.get('quant') if isinstance(model, dict) else None
    return quant if isinstance(quant, dict) else {}


def _work_dir(cfg: Config, args: argparse.Namespace) -> str:
    """Folder of the run: one where its config replaces no other one.

    Raises:
        QuantError: if the folder that was asked for holds a config that no
            run of ours has written there.
    """
    # Runs of other settings do not write over each other.
    folder = cfg.get('work_dir') or f'work_dirs/{Path(args.config).stem}'
    folder = '_'.join([folder, *_given_settings(args).values()])
    name = Path(cfg.filename).name
    if args.work_dir is None:
        # A training keeps its config, and has the same folder by default.
        is_free = is_replaceable(Path(folder) / name)
        return folder if is_free else f'{folder}_quantized'
    if not is_replaceable(Path(args.work_dir) / name):
        raise QuantError(f'--work-dir: {Path(args.work_dir) / name} would be '
                         'replaced by the config of the run; give another '
                         'folder.')
    return args.work_dir


def _given_settings(args: argparse.Namespace) -> Dict[str, str]:
    return given(
        bits=args.bits,
        scope=args.scope,
        method=args.method,
        protocol=args.protocol,
        layers='mixed' if args.layer_bits else None,
        budget='_'.join(args.budget) if args.budget else None)


def choose_device(device: Optional[str], launcher: str) -> Optional[str]:
    """The device to use; None leaves it to MMEngine.

    Raises:
        QuantError: if that device is not available.
    """
    no_operators = get_compiling_cuda_version() == 'not available'
    if launcher != 'none':
        if device is not None:
            raise QuantError('--device: a launcher gives each process its '
                             'own; leave it out.')
        if get_device() == 'cuda' and no_operators:
            raise QuantError("--launcher: mmcv's operators were built without "
                             'CUDA; set CUDA_VISIBLE_DEVICES= to use CPUs.')
        return None
    if device is None:
        if get_device() == 'cuda' and no_operators:
            say("mmcv's operators were built without CUDA: using the CPU")
            return 'cpu'
        return None
    check_device(device)
    if device.startswith('cuda') and no_operators:
        raise QuantError(f"--device: {device!r} needs mmcv's CUDA operators, "
                         'and these were built without; give cpu, or '
                         'install mmcv built with CUDA.')
    return device


def check_budget(args: argparse.Namespace) -> None:
    """Raise unless the options of a budget go together."""
    if not args.budget:
        for name in ('bits_from', 'budget_by', 'budget_images'):
            if getattr(args, name) is not None:
                raise QuantError(f'--{name.replace("_", "-")}: there is no '
                                 '--budget that it could be for; give one.')
        return
    for text in args.budget:
        parse_budget(text)
    if args.layer_bits:
        raise QuantError('--budget: it chooses what --layer-bits gives; leave '
                         'one of them out.')
    if args.protocol == 'practical':
        raise QuantError('--budget: it chooses the bits of first layer and '
                         'predictors too; leave --protocol out.')
    if args.launcher != 'none':
        raise QuantError('--budget: bits are chosen by one process; run '
                         'without --launcher, and give the bits chosen to '
                         'several processes by --layer-bits.')
    images = args.budget_images
    if images is not None and images < 1:
        raise QuantError(f'--budget-images: {images} is not allowed; give a '
                         'number from 1 on.')


def chooser_of(args: argparse.Namespace, run: QuantizationRun) -> Chooser:
    """What chooses bits under the budget of the command line."""
    return Chooser(run, args.budget, parse_choices(args.bits_from
                                                   or '3,4,6,8'),
                   args.budget_by or 'unit', args.budget_images or 32)


def quantize(args: argparse.Namespace) -> None:
    """Do what the arguments ask for and show the table."""
    check_budget(args)
    with contextlib.ExitStack() as held:
        screen = held.enter_context(showing(args.verbose, said_at_import()))
        device = choose_device(args.device, args.launcher)
        with config_errors():
            cfg = configure(args)
        if args.local_rank is not None:
            os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
        setup_cache_size_limit_of_dynamo()
        if held.enter_context(joined(args.launcher)):
            held.enter_context(alone_in(Path(cfg.work_dir)))
            screen.open_log(Path(cfg.work_dir) / LOG)
        else:
            screen.mute()
        chooser = None
        if args.budget:
            chooser = chooser_of(args,
                                 QuantizationRun(copy.deepcopy(cfg), device))
            cfg.model.quant['overrides'] = chooser.choose().overrides
        run = QuantizationRun(cfg, device, args.command)
        result = run.run(
            float_eval=not args.no_float_eval,
            both_engines=args.engine == BOTH)
        if chooser is not None:
            result['choice'] = chooser.report(run.model, run.packed)
            write_result(run.report, result)
        if is_main_process():
            show(run, result)
        page = run.write_page()
        if is_main_process():
            show_files(run.packed, run.report, page)
        run.close()


def show(run: QuantizationRun, result: Mapping[str, Any]) -> None:
    """Show the results of a run."""
    say(f'\n{format_table(table_rows(result))}\n')
    for line in further_lines(result):
        say(line)
    say(protocol_line(run.quant))
    if 'choice' in result:
        for line in choice_lines(result['choice']):
            say(line)
    say('')
    if result['units'] is not None:
        say(f'{result["provenance"]["images_used"]} calibration images, '
            f'{result["iters"]} iterations per unit and stage, learning '
            f'rate {result["lr"]:g}')
    silent = silent_sites(result['sites'])
    if silent:
        say(f'not reached in the evaluation, for want of detections: '
            f'{", ".join(silent)}')
    if result['hooks_left_out']:
        say('left out, since they change weights when a test begins: '
            f'{", ".join(result["hooks_left_out"])}')


def main(argv: Optional[List[str]] = None) -> int:
    """Run the command; the exit status."""
    return run_command(lambda: quantize(parse_args(argv)))
