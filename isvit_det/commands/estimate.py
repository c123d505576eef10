"""How long runs of quantize_det take, from short runs of the same commands.

A calibration is taken to last a constant, a part for each image and a part
for each iteration, and an evaluation a part for each image. Three short runs
give all of these, and two where nothing is optimized.
"""
from dataclasses import replace
from typing import Mapping, NamedTuple, Sequence

from mmdet.registry import DATASETS
from mmengine.registry import init_default_scope

from isvit_det.commands import quantize_det
from isvit_det.commands.cells import Cell
from isvit_det.core.errors import QuantError
from isvit_det.core.settings import QuantConfig, SOSConfig
from isvit_det.inputs.config_forms import class_of
from isvit_det.inputs.configs import config_errors
from isvit_det.inputs.hooks import is_calibration_hook
from isvit_det.screen.progress import duration

EVALUATED = 2


class Work(NamedTuple):
    """What a run does.

    Attributes:
        images: of the calibration.
        iters: per unit and stage.
        evaluated: images of an evaluation.
    """
    images: int
    iters: int
    evaluated: int


# The short runs; the last one differs in iterations alone.
SHORT = (Work(2, 2, EVALUATED), Work(4, 2, EVALUATED), Work(2, 6, EVALUATED))


class Estimate(NamedTuple):
    """Seconds that a run takes, by what they are spent on."""
    float_evaluation: float
    calibration: float
    quantized_evaluation: float

    @property
    def seconds(self) -> float:
        """All of them."""
        return sum(self)

    def __str__(self) -> str:
        parts = ', '.join(f'{name.replace("_", " ")} {duration(seconds)}'
                          for name, seconds in self._asdict().items())
        return f'{duration(self.seconds)} ({parts})'


def planned(argv: Sequence[str]) -> Work:
    """What quantize_det would do.

    Args:
        argv: its command line.

    Raises:
        QuantError: if it would be refused.
    """
    with config_errors():
        cfg = quantize_det.configure(quantize_det.parse_args(list(argv)))
        hook, = [
            hook for hook in cfg.custom_hooks
            if is_calibration_hook(class_of(hook['type']))
        ]
        sos = SOSConfig.from_dict(hook['sos'],
                                  QuantConfig.from_dict(cfg.model.quant))
        init_default_scope(cfg.get('default_scope') or 'mmdet')
        # Annotations are counted, and no image is read.
        dataset = DATASETS.build(dict(cfg.test_dataloader.dataset))
    return Work(sos.num_images, sos.iters, len(dataset))


def estimate(cell: Cell) -> Estimate:
    """About how long a cell's run of quantize_det takes on this machine.

    The short runs are kept beside the cell's folder and not repeated.

    Raises:
        QuantError: if the run would be refused, or a short run fails.
    """
    work = planned(cell.argv)
    amounts = SHORT if work.iters else tuple(
        one._replace(iters=0) for one in SHORT[:2])
    return extrapolate(
        work, amounts,
        [shortened(cell, one).run()['seconds'] for one in amounts])


def shortened(cell: Cell, work: Work) -> Cell:
    """A cell that does less of the same, and shows nothing.

    Args:
        cell: whose command line may end with ``--cfg-options``.
        work: what it does instead.
    """
    config, weights, *options = cell.argv
    argv = [config, weights, '--calib-images', str(work.images)]
    argv += ['--iters', str(work.iters), *options]
    if '--cfg-options' not in options:
        argv.append('--cfg-options')
    argv.append(f'test_dataloader.dataset.indices={work.evaluated}')
    folder = cell.folder.parent / 'estimates' / cell.folder.name
    return replace(
        cell,
        argv=argv,
        folder=folder / f'{work.images}_images_{work.iters}_iters',
        verbose=False,
        quiet=True)


def extrapolate(work: Work, amounts: Sequence[Work],
                seconds: Sequence[Mapping[str, float]]) -> Estimate:
    """The seconds of a run from those of short ones.

    Args:
        work: of the run.
        amounts: what the short runs did, as in ``SHORT``, maybe without the
            last one.
        seconds: as a report has them, of each short run.

    >>> passes = dict(float_evaluation=4., quantized_evaluation=6.)
    >>> found = extrapolate(
    ...     Work(100, 1000, 50), SHORT,
    ...     [dict(passes, calibration=seconds) for seconds in (9, 13, 10)])
    >>> print(found)
    12 min (float evaluation 100 s, calibration 7.6 min, quantized ...
    """
    first, more_images, *more_iters = [one['calibration'] for one in seconds]
    short = amounts[0]
    # What other work on the machine adds to a run must not count as less.
    images = max(0., more_images - first) / (amounts[1].images - short.images)
    calibration = first + images * (work.images - short.images)
    for taken in more_iters:
        iters = max(0., taken - first) / (amounts[2].iters - short.iters)
        calibration += iters * (work.iters - short.iters)
    passes = work.evaluated / short.evaluated
    return Estimate(passes * seconds[0]['float_evaluation'],
                    max(0., calibration),
                    passes * seconds[0]['quantized_evaluation'])


def announce(cells: Mapping[str, Cell]) -> None:
    """Show about how long cells take, one by one and together.

    A cell of which there is no estimate says why, and is run all the same.

    Args:
        cells: by the names to show.
    """
    print(
        'estimating how long this takes, from runs on '
        f'{SHORT[0].images} and {SHORT[1].images} images',
        flush=True)
    total, unknown = 0., 0
    for name, cell in cells.items():
        try:
            found = estimate(cell)
        except QuantError as error:
            unknown += 1
            print(f'  {name}: no estimate: {" ".join(str(error).split())}')
            continue
        total += found.seconds
        print(f'  {name}: about {found}', flush=True)
    rest = f', and {unknown} without an estimate' if unknown else ''
    print(f'about {duration(total)} in all on this machine{rest}', flush=True)
