"""The analysis of a detector: what each part loses at some bits."""
import contextlib
import dataclasses
from pathlib import Path
from typing import (Any, Dict, Iterator, List, Mapping, Optional, Sequence,
                    Tuple)

import torch

from isvit_det.core.digests import digest_of
from isvit_det.core.errors import QuantError
from isvit_det.core.files import write_atomically
from isvit_det.core.plain import plain
from isvit_det.engine.images import calibration_images
from isvit_det.engine.run import QuantizationRun
from isvit_det.evaluation.difference import detections, difference
from isvit_det.inputs.datasets import (dataset_of, evaluation_paths,
                                       refuse_overlap)
from isvit_det.report.provenance import describe_origin, fingerprint
from isvit_det.screen.progress import track
from isvit_det.sensitivity.calibrated import (Bits, Drawn, build_twin,
                                              calibrate_alone_,
                                              calibrate_together_)
from isvit_det.sensitivity.measures import (MEASURES, Figure, SubsetAP,
                                            feature_error, kept, means)
from isvit_det.sensitivity.partial import (Recorded, exchange, features,
                                           first_outputs, forwards, predict)
from isvit_det.sensitivity.parts import Part, list_parts

MODES = ('alone', 'rest')
# Folder of the state, in the work directory.
STATE = 'sensitivity'


def name_of(bits: Bits) -> str:
    """``'w4a4'``."""
    return f'w{bits[0]}a{bits[1]}'


class Analysis:
    """Measures the sensitivity of every part of a detector.

    Args:
        run: has the float model; nothing of it is changed.
        pairs: bits of weights and activations to measure at.
        by: ``'unit'`` or ``'layer'``.
        measure: the most costly one of ``MEASURES``; the cheaper ones are
            measured as well.
        num_images: training images to measure on, none of which calibrates.
        modes: ``'alone'`` quantizes a part alone, ``'rest'`` all but it.

    Raises:
        QuantError: if the model is calibrated already, or there are too few
            images.
    """

    def __init__(self,
                 run: QuantizationRun,
                 pairs: Sequence[Bits],
                 by: str = 'unit',
                 measure: str = 'detections',
                 num_images: int = 32,
                 modes: Sequence[str] = MODES) -> None:
        if run.calibrated:
            raise QuantError('checkpoint: a packed file has no float weights '
                             'to analyze; give the float checkpoint.')
        self.run_ = run
        self.model = run.model
        self.logger = run.runner.logger
        self.pairs = list(pairs)
        self.by = by
        self.measure = measure
        self.modes = list(modes)
        self.parts = list_parts(self.model, by)
        self.folder = run.work_dir / STATE
        self.sos = run.hook.sos_config(run.runner)
        self._draw(num_images)
        self.ap = self.subset_ap() if measure == 'ap' else None
        self._twins: Dict[Tuple[str, Bits], Any] = {}
        self.key = digest_of([
            self._fingerprint(), by, measure, self.modes,
            [list(pair) for pair in self.pairs], num_images
        ])

    def _draw(self, num_images: int) -> None:
        """Draw images to calibrate on, as a run does, and others."""
        cfg, loader = self.run_.runner.cfg, self.run_.hook.calib_dataloader
        num = self.sos.num_images
        self.drawn = calibration_images(
            cfg,
            None if loader is None else dataset_of(loader, 'calib_dataloader'),
            num + num_images, self.sos.seed)
        dataset = self.run_.runner.test_loop.dataloader.dataset
        self.hashes = refuse_overlap(self.drawn.paths(),
                                     evaluation_paths(dataset))
        rest = len(self.drawn) - num
        if rest < 1:
            raise QuantError(
                f'--calib-images: {num} of {len(self.drawn)} training images '
                'leave none to measure on; give fewer.')
        if rest < num_images:
            self.logger.warning(f'{num_images} images to measure on asked '
                                f'for, there are {rest}: all are used')
        self.images = Drawn(self.drawn, range(num))
        self.places = list(range(num, len(self.drawn)))

    def subset_ap(self) -> SubsetAP:
        """Measures AP on the images that are measured on."""
        return SubsetAP([self.drawn.picks[place] for place in self.places],
                        getattr(self.model, 'with_mask', False))

    def _fingerprint(self) -> str:
        cfg = self.run_.runner.cfg
        origin = plain(
            describe_origin(self.model, None, self.images, self.sos))
        return fingerprint(origin, self.hashes,
                           [dict(cfg.model), cfg.test_dataloader['dataset']],
                           self.model)

    def run(self) -> Dict[str, Any]:
        """Measure everything that an earlier run has not.

        Returns:
            ``parts``, by name: for each mode and bits the ``Figure`` of each
            measure; ``whole``, the figures of the detector with all parts
            quantized, by bits; ``images``, the number measured on.
        """
        self._check_state()
        todo = [
            index for index in range(len(self.places))
            if self._read(index) is None
        ]
        done = len(self.places) - len(todo)
        if done:
            self.logger.info(f'{done} of {len(self.places)} images are taken '
                             'from an earlier run')
        if todo:
            self._calibrate()
            num = len(self.pairs) * len(self.modes) * len(self.parts)
            self.logger.info(f'measuring {len(self.parts)} parts, each at '
                             f'{", ".join(map(name_of, self.pairs))}, on '
                             f'{len(self.places)} training images')
            with track('sensitivity', num * len(todo), 'runs') as advance:
                for index in todo:
                    rows = []
                    for row in self._measure(index):
                        rows.append(row)
                        advance(row['part'] is not None)
                    self._write(index, rows)
        return self._summary()

    def _calibrate(self) -> None:
        for mode in self.modes:
            for bits in self.pairs:
                self.twin(mode, bits)

    def twin(self, mode: str, bits: Bits) -> Any:
        """A calibrated twin, from an earlier run if there was one."""
        if (mode, bits) not in self._twins:
            self._twins[mode, bits] = self._twin(mode, bits)
        return self._twins[mode, bits]

    def measured(self, num: int) -> Iterator[Dict[str, Any]]:
        """The first of the images that are measured on, as batches."""
        for place in self.places[:num]:
            yield self.drawn.read(place)

    def forget(self) -> None:
        """Remove the calibrated twins, which take room on the disk."""
        for path in self.folder.glob('*_w?a?.pth'):
            path.unlink()

    def _twin(self, mode: str, bits: Bits) -> Any:
        quant = self.model.quant_config.of_bits(*bits)
        twin = build_twin(self.model, self.run_.runner.cfg.model, quant)
        path = self.folder / f'{mode}_{name_of(bits)}.pth'
        if path.exists():
            state = torch.load(path, map_location='cpu', weights_only=True)
            twin.load_state_dict(state)
            return twin
        self.logger.info(f'calibrating {name_of(bits)} in closed form, ' + (
            'each part by itself' if mode == 'alone' else 'as a whole'))
        sos = self.sos
        if mode == 'alone':
            if self.by == 'layer':
                # What corrects for other layers would not be there.
                sos = dataclasses.replace(
                    sos, closed_form_start=False, correct_heads=False)
            calibrate_alone_(twin, self.model, self.images, sos, self.folder,
                             self.logger)
        else:
            calibrate_together_(twin, self.images, sos,
                                self.folder / name_of(bits),
                                f'{self.key} {name_of(bits)}', self.logger)
        write_atomically(path,
                         lambda file: torch.save(twin.state_dict(), file))
        return twin

    def _measure(self, index: int) -> Iterator[Dict[str, Any]]:
        """A row for each run on one image."""
        batch = self.drawn.read(self.places[index])
        recorded = Recorded(self.model, batch)
        maps = features(self.model, batch)
        if self.ap is not None:
            yield dict(
                part=None, mode='float', bits='', sample=kept(recorded.sample))
        for (mode, bits), twin in self._twins.items():
            row = dict(mode=mode, bits=name_of(bits))
            base = recorded
            if mode == 'rest':
                base = Recorded(twin, batch)
                whole = self._figures(base, batch, None, recorded, maps)
                yield dict(row, part=None, **whole)
            for part in self.parts:
                with self._changed(mode, twin, base, part):
                    found = self._figures(base, batch, part, recorded, maps)
                yield dict(row, part=part.name, **found)

    def _changed(self, mode: str, twin: Any, base: Recorded,
                 part: Part) -> Any:
        stack = contextlib.ExitStack()
        by_layer = self.by == 'layer' and part.unit is not None
        stack.enter_context(forwards(base.before(part)))
        if mode == 'alone':
            stack.enter_context(
                exchange(base.model, twin, part, True if by_layer else None))
        elif by_layer:
            stack.enter_context(exchange(twin, twin, part, False))
        else:
            stack.enter_context(exchange(twin, self.model, part))
        return stack

    def _figures(self, base: Recorded, batch: Mapping[str, Any],
                 part: Optional[Part], expected: Recorded,
                 maps: Sequence[torch.Tensor]) -> Dict[str, Any]:
        """The measures of one run, against the float model.

        Args:
            base: of the model that runs, perhaps with a part exchanged.
            batch: of one image.
            part: what is exchanged.
            expected: of the float model.
            maps: that its heads get.
        """
        model = base.model
        is_head = part is not None and part.child not in ('backbone', 'neck')
        found: Dict[str, Any] = {}
        if not is_head:
            found['features'] = feature_error(maps, features(model, batch))
        if self.measure == 'features' and not is_head:
            return found
        with first_outputs(model) as outputs:
            sample = predict(model, batch)
        # With other parts quantized, a head gets other proposals.
        if part is not None and is_head and base is expected:
            names = [
                name for name in part.layers
                if name in outputs and name in expected.layers
                and outputs[name].shape == expected.layers[name].shape
            ]
            found['features'] = feature_error(
                [expected.layers[name].flatten()[None] for name in names],
                [outputs[name].flatten()[None]
                 for name in names]) if names else 0.
        if self.measure != 'features':
            found['detections'] = difference(
                detections(expected.sample), detections(sample))
        if self.ap is not None:
            found['sample'] = kept(sample)
        return found

    def _path(self, index: int) -> Path:
        return self.folder / f'image_{index:05d}.pth'

    def _check_state(self) -> None:
        """Remove what another analysis has left."""
        self.folder.mkdir(parents=True, exist_ok=True)
        note = self.folder / 'key'
        if not note.exists() or note.read_text() != self.key:
            old = list(self.folder.glob('*.pth'))
            for path in old:
                path.unlink()
            if old:
                self.logger.warning('the state found is of another analysis: '
                                    'starting anew')
            note.write_text(self.key)

    def _read(self, index: int) -> Optional[List[Dict[str, Any]]]:
        try:
            return torch.load(self._path(index), weights_only=True)
        # A damaged file is measured again.
        except Exception:
            return None

    def _write(self, index: int, rows: List[Dict[str, Any]]) -> None:
        write_atomically(
            self._path(index), lambda file: torch.save(rows, file))

    def _summary(self) -> Dict[str, Any]:
        by_run: Dict[Tuple[str, str, Optional[str]], List[Any]] = {}
        for index in range(len(self.places)):
            for row in self._read(index) or ():
                key = row['mode'], row['bits'], row['part']
                by_run.setdefault(key, []).append(row)
        before = None
        if self.ap is not None:
            before = self.ap.results(
                [row['sample'] for row in by_run['float', '', None]])
        parts: Dict[str, Any] = {part.name: {} for part in self.parts}
        whole: Dict[str, Any] = {}
        for (mode, bits, part), rows in by_run.items():
            if mode == 'float':
                continue
            figures = means([{
                k: v
                for k, v in row.items() if k in MEASURES
            } for row in rows])
            if self.ap is not None:
                assert before is not None
                after = self.ap.results([row['sample'] for row in rows])
                figures['ap'] = self.ap.loss(before, after)
            if part is None:
                whole[bits] = figures
            else:
                parts[part].setdefault(mode, {})[bits] = figures
        result = dict(
            parts=parts, whole=whole, images=len(self.places), by=self.by)
        if self.ap is not None:
            result['float_ap'] = self.ap.measure(before)  # type: ignore
        return result


def plain_figures(result: Any) -> Any:
    """A result with each ``Figure`` as a dict, for JSON."""
    if isinstance(result, Figure):
        return result._asdict()
    if isinstance(result, Mapping):
        return {key: plain_figures(value) for key, value in result.items()}
    return result
