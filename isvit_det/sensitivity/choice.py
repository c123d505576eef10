"""Mixed precision under a budget: analysis, choice, and its report."""
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence

from isvit_det.core.digests import digest_of
from isvit_det.core.errors import QuantError
from isvit_det.core.files import write_atomically
from isvit_det.core.plain import plain
from isvit_det.engine.run import QuantizationRun
from isvit_det.evaluation.tasks import metainfo
from isvit_det.report.provenance import describe_origin
from isvit_det.sensitivity.analysis import Analysis, name_of
from isvit_det.sensitivity.budget import (Bits, Budget, Limit, choose, fall,
                                          parse_budget)
from isvit_det.sensitivity.calibrated import calibrate_together_
from isvit_det.sensitivity.limits import (COUNTED, CostTables, actual_costs,
                                          overrides_of)
from isvit_det.sensitivity.measures import kept
from isvit_det.sensitivity.partial import predict

# Attempts of the search for a size, each a calibration in closed form.
ATTEMPTS = 6
# Most attempts to fit the file to the byte.
FITS = 10


@dataclass
class Choice:
    """Bits chosen for the parts of a detector.

    Attributes:
        overrides: values of ``QuantConfig.overrides``.
        report: the choice in plain values, for ``result.json``.
    """
    overrides: List[Dict[str, Any]]
    report: Dict[str, Any]


class Chooser:
    """Chooses bits of parts under budgets by their sensitivities.

    Args:
        run: has the float model; nothing of it is changed.
        budgets: as the command line has them.
        pairs: bits to choose from.
        by: ``'unit'`` or ``'layer'``.
        num_images: training images to measure on.

    Raises:
        QuantError: if a budget cannot be read, AP is asked for together with
            other budgets, or the config has overrides.
    """

    def __init__(self, run: QuantizationRun, budgets: Sequence[str],
                 pairs: Sequence[Bits], by: str, num_images: int) -> None:
        if run.quant.overrides or run.quant.protocol != 'literature':
            raise QuantError('--budget: the config gives single layers bits '
                             'by quant.overrides or quant.protocol, which a '
                             'budget chooses; leave one of them out.')
        self.budgets = [parse_budget(text) for text in budgets]
        self.texts = list(budgets)
        kinds = [one.kind for one in self.budgets]
        if 'ap' in kinds and len(kinds) > 1:
            raise QuantError('--budget: ap finds the smallest model, and is '
                             'not combined with other budgets; leave one out.')
        if len(set(kinds)) < len(kinds):
            raise QuantError(f'--budget: {list(budgets)} limit the same thing '
                             'twice; leave one out.')
        self.run_ = run
        self.pairs = list(pairs)
        self.logger = run.runner.logger
        self.analysis = Analysis(
            run, pairs, by=by, num_images=num_images, modes=['alone'])
        self.file = self.analysis.folder / 'choice.json'
        self.choice: Optional[Choice] = None

    def choose(self) -> Choice:
        """Analyze and choose, or take the choice of an earlier run."""
        key = digest_of([self.analysis.key, self.texts])
        if self.choice is None:
            self.choice = self._read(key)
            if self.choice is not None:
                self.logger.info('the bits chosen by an earlier run are '
                                 'taken')
        if self.choice is None:
            self.choice = self._choose(key)
        return self.choice

    def _choose(self, key: str) -> Choice:
        result = self.analysis.run()
        harm = {
            part:
            fall({
                bits: figures['alone'][name_of(bits)]['detections'].value
                for bits in self.pairs
            })
            for part, figures in result['parts'].items()
        }
        run = self.run_
        runner = run.runner
        origin = plain(
            describe_origin(run.model, runner.cfg.get('load_from'),
                            run.hook.prepare(runner), self.analysis.sos))
        self.tables = CostTables(self.analysis, self.pairs, origin,
                                 metainfo(runner.test_loop.dataloader.dataset))
        tried: List[Dict[str, float]] = []
        if self.budgets[0].kind == 'ap':
            chosen, limits = self._search(harm, self.budgets[0].amount, tried)
        else:
            limits = [self.tables.limit(budget) for budget in self.budgets]
            chosen = self._fit(harm, limits)
        report = dict(
            budget=self.texts,
            bits_from=[name_of(bits) for bits in self.pairs],
            by=self.analysis.by,
            images=result['images'],
            calibration_images=len(self.analysis.images),
            measure='detections',
            planned={
                limit.budget.kind: self._planned(limit, chosen)
                for limit in limits
            },
            tried=tried,
            parts={
                part:
                dict(
                    bits=name_of(bits),
                    harm={
                        name_of(one): value
                        for one, value in harm[part].items()
                    },
                    error={
                        name: figures['detections'].error
                        for name, figures in result['parts'][part]
                        ['alone'].items()
                    })
                for part, bits in chosen.items()
            })
        overrides = [
            one.to_dict() for one in overrides_of(chosen, self.tables.base)
        ]
        text = json.dumps(
            dict(key=key, overrides=overrides, report=plain(report)))
        write_atomically(self.file, lambda file: file.write(text.encode()))
        self.analysis.forget()
        return Choice(overrides, plain(report))

    def report(self, model: Any, packed: Path) -> Dict[str, Any]:
        """The choice in plain values, with what it costs once calibrated.

        Args:
            model: calibrated with the bits chosen.
            packed: its file.
        """
        choice = self.choose()
        actual = actual_costs(model, list(choice.report['planned']),
                              packed.stat().st_size,
                              list(self.analysis.measured(COUNTED)))
        return dict(choice.report, actual=actual)

    def _read(self, key: str) -> Any:
        try:
            found = json.loads(self.file.read_text())
            if found['key'] == key:
                return Choice(found['overrides'], found['report'])
        # What is missing or damaged is made again.
        except (OSError, ValueError, KeyError, TypeError):
            pass
        return None

    def _planned(self, limit: Limit, chosen: Mapping[str, Bits]) -> float:
        if limit.budget.kind == 'MB':
            return self.tables.file_bytes(chosen)
        return limit.of(chosen)

    def _fit(self, harm: Mapping[str, Mapping[Bits, float]],
             limits: Sequence[Limit]) -> Dict[str, Bits]:
        """The choice; that of a file is checked to the byte.

        The alignment of the file, and its header, in which the choice
        stands, make it larger than its parts together.
        """
        tried = list(limits)
        for _ in range(FITS):
            chosen = choose(harm, tried)
            for place, limit in enumerate(limits):
                if limit.budget.kind == 'MB':
                    excess = (
                        self.tables.file_bytes(chosen) - limit.budget.limit)
                    break
            else:
                return chosen
            if excess <= 0:
                return chosen
            tried[place] = tried[place]._replace(fixed=tried[place].fixed +
                                                 excess)
        raise QuantError('--budget: no choice of bits fits the size; give a '
                         'larger one.')

    def _search(self, harm: Mapping[str, Mapping[Bits, float]], allowed: float,
                tried: List[Dict[str, float]]) -> Any:
        """The smallest file that loses few enough points of box AP.

        Sizes are halved between what is known to lose too much and what is
        not.
        """
        analysis = self.analysis
        metric = analysis.subset_ap()
        num = len(analysis.places)
        before = metric.results([
            kept(predict(analysis.model, batch))
            for batch in analysis.measured(num)
        ])
        limit = self.tables.limit(Budget('MB', 1.))
        low, high = limit.extremes()

        def attempt(size: float) -> Any:
            own = limit._replace(budget=Budget('MB', size / 1e6))
            chosen = self._fit(harm, [own])
            twin = self.tables.mixed(chosen)
            calibrate_together_(twin, analysis.images, analysis.sos,
                                analysis.folder / 'attempt',
                                f'{analysis.key} {len(tried)}', self.logger)
            after = metric.results([
                kept(predict(twin, batch)) for batch in analysis.measured(num)
            ])
            lost = metric.loss(before, after)
            tried.append(
                dict(
                    MB=self.tables.file_bytes(chosen) / 1e6,
                    lost=lost.value,
                    error=lost.error))
            self.logger.info(
                f'{tried[-1]["MB"]:.3g} MB in closed form lose '
                f'{lost.value:.2f} points of box AP on {num} training images')
            return chosen, lost.value

        # Headers differ in length; no choice is cut off by that.
        best, lost = attempt(1.02 * high)
        if lost > allowed:
            raise QuantError(
                f'--budget: ap-{allowed:g} cannot be kept: with the most of '
                f'--bits-from, {lost:.2f} points of box AP are lost on {num} '
                'training images; give more bits to choose from, or more '
                'points.')
        for _ in range(ATTEMPTS):
            middle = (low + high) / 2
            if high - low < .01 * high:
                break
            chosen, lost = attempt(1.002 * middle)
            if lost <= allowed:
                best, high = chosen, middle
            else:
                low = middle
        return best, [limit]


def choice_lines(report: Mapping[str, Any]) -> List[str]:
    """What was chosen, for people.

    Args:
        report: of a ``Choice``, with ``actual`` costs.
    """

    def costs(found: Mapping[str, float]) -> str:
        return ', '.join(
            Budget(kind, 0.).shown(value) for kind, value in found.items())

    by_bits: Dict[str, List[str]] = {}
    for part, one in report['parts'].items():
        by_bits.setdefault(one['bits'], []).append(part)
    lines = [
        f'bits chosen for {" and ".join(report["budget"])} by detections '
        f'changed on {report["images"]} training images: planned '
        f'{costs(report["planned"])}, is {costs(report["actual"])}'
    ]
    lines += [
        f'  {bits}: {", ".join(parts)}' for bits, parts in by_bits.items()
    ]
    lines += [
        f'  tried {one["MB"]:.3g} MB in closed form: {one["lost"]:.2f} points '
        'of box AP lost' for one in report['tried']
    ]
    return lines
