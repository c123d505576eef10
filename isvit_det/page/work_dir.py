"""Reads what a run has left in its work directory."""
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional

from isvit_det.core.errors import QuantError, describe_error
from isvit_det.evaluation.loop import PREDICTIONS
from isvit_det.evaluation.predictions import UNREADABLE
from isvit_det.page.detections import NotShown, Prediction, read_predictions
from isvit_det.page.truth import Truth, read_truth
from isvit_det.report.layer_file import LAYERS, LAYERS_PACKED, LayerFile

# Files of figures that runs write.
RESULTS = ('result.json', 'result_packed.json')


@dataclass
class Evaluated:
    """One evaluation of a run.

    Attributes:
        title: what tables call it.
        figures: of the evaluation, as in the file of figures.
        predictions: by id of the image; None if they are not there.
        missing: why they are not there, or ''.
    """
    title: str
    figures: Mapping[str, Any]
    predictions: Optional[Dict[Any, Prediction]] = None
    missing: str = ''


@dataclass
class Run:
    """A finished run.

    Attributes:
        path: of the file of figures.
        result: its content.
        evaluated: its evaluations, the float model first if there is one.
        truth: ground truth; None if it is not there.
        layers: statistics of the layers; None if they are not there.
        missing: sentences on what is not there, and why.
    """
    path: Path
    result: Dict[str, Any]
    evaluated: List[Evaluated] = field(default_factory=list)
    truth: Optional[Truth] = None
    layers: Optional[LayerFile] = None
    missing: List[str] = field(default_factory=list)

    @property
    def is_detector(self) -> bool:
        """Whether it is a run of a detector, not of a classifier."""
        return 'scores' not in self.result

    @property
    def float_model(self) -> Optional[Evaluated]:
        """The evaluation of the float model."""
        found = [one for one in self.evaluated if one.title == 'float']
        return found[0] if found else None

    @property
    def last(self) -> Optional[Evaluated]:
        """The last evaluation of the quantized model."""
        found = [one for one in self.evaluated if one.title != 'float']
        return found[-1] if found else None


def read_run(path: Path) -> Run:
    """Read a run with all that lies beside its file of figures.

    What is not there or damaged is listed in ``missing``.

    Args:
        path: of the file of figures.

    Raises:
        QuantError: if that file cannot be read.
    """
    try:
        result = json.loads(path.read_text())
        if not {'bits', 'bytes', 'provenance'} <= set(result):
            raise ValueError('it is not of a run')
    except (OSError, ValueError, TypeError) as error:
        raise QuantError(f'{path}: {describe_error(error)}; give the work '
                         'directory of a finished run.') from error
    run = Run(path, result)
    if run.is_detector:
        _read_evaluations(run)
    _read_layers(run)
    return run


def _read_evaluations(run: Run) -> None:
    result, folder = run.result, run.path.parent / PREDICTIONS
    if result.get('float') is not None:
        run.evaluated.append(
            _read_predictions('float', result['float'], result['float'],
                              folder))
    elif result.get('units') is None:
        run.missing.append(
            'This run evaluated a packed file: there is no float model beside '
            'it, and nothing on its calibration.')
    else:
        run.missing.append(
            'The float model was not evaluated (--no-float-eval): there is '
            'nothing to compare the quantized one with. The same command '
            'without that option evaluates it.')
    every = [*result.get('also_evaluated', ()), result]
    for one in every:
        title = 'quantized'
        if len(every) > 1:
            title = f'quantized, {one["engine"]["engine"]}'
        run.evaluated.append(
            _read_predictions(title, one['quantized'], one, folder))
    run.missing += [
        f'Predictions of the {one.title} model: {one.missing}.'
        for one in run.evaluated if one.missing
    ]
    ids = {key for one in run.evaluated for key in one.predictions or {}}
    if ids:
        run.truth, reason = read_truth(result.get('truth'), ids)
        if reason:
            run.missing.append(f'Ground truth: {reason}.')


def _read_predictions(title: str, figures: Mapping[str, Any],
                      recorded: Mapping[str, Any], folder: Path) -> Evaluated:
    evaluated = Evaluated(title, figures)
    source = recorded.get('predictions')
    if source is None:
        evaluated.missing = ('the figures are of an earlier version, which '
                             'does not say where they are')
        return evaluated
    try:
        evaluated.predictions = read_predictions(folder, source['name'],
                                                 source['key'])
    except NotShown as error:
        evaluated.missing = str(error)
    except (OSError, ValueError) as error:
        evaluated.missing = (
            f'{error}; ' +
            ('delete float_metrics.json and give the same command again to '
             'have them' if title == 'float' else
             'the same command evaluates the model again'))
    return evaluated


def _read_layers(run: Run) -> None:
    packed = run.path.name == RESULTS[1]
    path = run.path.parent / (LAYERS_PACKED if packed else LAYERS)
    key = run.result.get('predictions', {}).get('key', '')
    try:
        layers = LayerFile.load(path)
        if layers.key != key:
            raise ValueError('it is of another run')
        run.layers = layers
    except UNREADABLE as error:
        run.missing.append(f'Statistics of the layers: {path.name} cannot be '
                           f'read ({describe_error(error)}).')
