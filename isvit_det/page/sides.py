"""Several runs side by side: their tables, settings, and predictions."""
from dataclasses import dataclass, field
from typing import Any, Dict, List, Mapping, Optional, Tuple

from isvit_det.page.detections import Prediction
from isvit_det.page.summary import as_table, describe_run
from isvit_det.page.table import Table, name, number
from isvit_det.page.truth import Truth
from isvit_det.page.work_dir import Run
from isvit_det.report.classifier_table import classifier_rows
from isvit_det.report.tables import table_rows

# Units of a table that are not folded.
LIMIT = 20


@dataclass
class Sides:
    """What a comparison shows.

    Attributes:
        titles: of the runs, all different.
        table: results.
        differences: settings and facts that are not the same in all runs.
        units: final errors of the units, by run.
        has_detectors: whether any run is of a detector.
        models: predictions on the images that all have, by title.
        truth: of these images.
        classes: names by label.
        notes: sentences, each with the title of its run.
    """
    titles: List[str]
    table: Table
    differences: Table
    units: Optional[Table]
    has_detectors: bool
    models: Dict[str, Mapping[Any, Prediction]] = field(default_factory=dict)
    truth: Optional[Truth] = None
    classes: List[str] = field(default_factory=list)
    notes: List[Tuple[str, str]] = field(default_factory=list)


def describe_sides(runs: List[Run]) -> Sides:
    """Put runs side by side.

    Args:
        runs: at least two.
    """
    titles = name_runs(runs)
    sides = Sides(titles, _results(runs, titles), _differences(runs, titles),
                  _units(runs, titles), any(run.is_detector for run in runs))
    for title, run in zip(titles, runs):
        sides.notes += [(title, note) for note in run.missing]
    _choose_models_(sides, runs)
    return sides


def name_runs(runs: List[Run]) -> List[str]:
    """Different names for runs: those of their folders, or more of the path.

    >>> from pathlib import Path
    >>> name_runs([Run(Path(f'{f}/result.json'), {}) for f in ('a/x', 'b/x')])
    ['a/x', 'b/x']
    """
    for depth in (1, 2, 3):
        names = [
            '/'.join(run.path.absolute().parent.parts[-depth:]) for run in runs
        ]
        if len(set(names)) == len(names):
            return names
    return [f'{text} ({place})' for place, text in enumerate(names, 1)]


def _results(runs: List[Run], titles: List[str]) -> Table:
    rows: List[Dict[str, str]] = []
    for title, run in zip(titles, runs):
        found = (
            table_rows(run.result)
            if run.is_detector else classifier_rows(run.result))
        rows += [dict(run=title, **row) for row in found]
    keys = list(dict.fromkeys(key for row in rows for key in row))
    return as_table([{key: row.get(key, '-') for key in keys} for row in rows])


def _differences(runs: List[Run], titles: List[str]) -> Table:
    every = []
    for run in runs:
        summary = describe_run(run)
        every.append(dict([*summary.settings, *summary.facts]))
    keys = dict.fromkeys(key for one in every for key in one)
    rows = []
    for key in keys:
        values = [one.get(key, '–') for one in every]
        if len(set(values)) > 1:
            rows.append([name(key), *map(name, values)])
    return Table(['', *titles], rows)


def _units(runs: List[Run], titles: List[str]) -> Optional[Table]:
    every = [{
        unit['name']: unit['errors'].get('after_stage_3')
        for unit in run.result.get('units') or ()
    } for run in runs]
    names = list(dict.fromkeys(key for one in every for key in one))
    if not names:
        return None
    rows = [[name(unit), *(number(one.get(unit), '.3g') for one in every)]
            for unit in names]
    rows.sort(key=lambda cells: -max(cell.value or 0. for cell in cells[1:]))
    return Table(['unit', *titles], rows, limit=LIMIT)


def _choose_models_(sides: Sides, runs: List[Run]) -> None:
    """The first float model, and the last evaluation of each run.

    Runs whose images or classes are others than those of the first one with
    predictions are left out, which a note says.
    """
    chosen: List[Tuple[str, str, Run, Mapping[Any, Prediction]]] = []
    shown = 'float'
    while shown in sides.titles:
        shown += ' model'
    for title, run in zip(sides.titles, runs):
        one = run.float_model
        if one is not None and one.predictions is not None:
            chosen.append((title, shown, run, one.predictions))
            break
    for title, run in zip(sides.titles, runs):
        if run.last is not None and run.last.predictions is not None:
            chosen.append((title, title, run, run.last.predictions))
    if not chosen:
        return
    main = chosen[0][2]
    for title, shown, run, predictions in chosen:
        if _classes(run) != _classes(main):
            sides.notes.append((title, 'its classes are others: it is not '
                                'among the accuracies and pictures.'))
        elif set(predictions) != set(chosen[0][3]):
            sides.notes.append((title, 'its images are others: it is not '
                                'among the accuracies and pictures.'))
        else:
            sides.models[shown] = predictions
    sides.truth, sides.classes = main.truth, _classes(main)


def _classes(run: Run) -> List[str]:
    for one in run.result.get('truth') or ():
        return [str(text) for text in one['classes']]
    return []
