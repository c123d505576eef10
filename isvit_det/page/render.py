"""Renders the report from its parts, by templates that escape all text."""
import warnings
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional

import jinja2

from isvit_det.page.accuracy import describe_accuracy
from isvit_det.page.costs import (describe_layers, describe_parts,
                                  describe_units)
from isvit_det.page.detections import Prediction
from isvit_det.page.disagreement import EXPLAINED, SHOWN, choose
from isvit_det.page.pictures import Picture, make_picture
from isvit_det.page.sides import describe_sides
from isvit_det.page.summary import describe_run
from isvit_det.page.truth import Truth
from isvit_det.page.work_dir import Run
from isvit_det.version import __version__

TEMPLATES = Path(__file__).parent / 'templates'
NUM_MOST, NUM_LEAST = 8, 3
Models = Mapping[str, Mapping[Any, Prediction]]


def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(str(TEMPLATES)),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True)


def _render(template: str, **parts: Any) -> str:
    # Plots of names in other scripts are text, which needs no font here.
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', message='.*missing from.*font.*')
        return _environment().get_template(template).render(
            version=__version__, least_score=SHOWN, **parts)


def render_run(run: Run) -> str:
    """The report of one run, as HTML."""
    result = run.result
    models = {
        one.title: one.predictions
        for one in run.evaluated if one.predictions is not None
    }
    shown = dict(models)
    if len(shown) > 2:
        # Pictures compare the float model with the last one.
        first, *_, last = shown
        shown = {first: shown[first], last: shown[last]}
    size = result['bytes']
    return _render(
        'run.html.j2',
        run=run,
        summary=describe_run(run),
        accuracy=describe_accuracy(models, run.truth),
        pictures=choose_pictures(shown, run.truth, _classes(run)),
        explained=EXPLAINED,
        units=describe_units(result.get('units')),
        layers=describe_layers(run.layers),
        parts=describe_parts(run.layers, size['packed'], size.get('float')),
        file=run.layers)


def render_comparison(runs: List[Run]) -> str:
    """The report of several runs side by side, as HTML."""
    sides = describe_sides(runs)
    return _render(
        'comparison.html.j2',
        sides=sides,
        accuracy=describe_accuracy(sides.models, sides.truth),
        pictures=choose_pictures(sides.models, sides.truth, sides.classes),
        explained=EXPLAINED)


def _classes(run: Run) -> List[str]:
    if run.truth is not None:
        return run.truth.classes
    for one in run.result.get('truth') or ():
        return [str(name) for name in one['classes']]
    return []


def choose_pictures(models: Models, truth: Optional[Truth],
                    classes: List[str]) -> Dict[str, List[Picture]]:
    """Pictures on which the other models differ from the first one.

    Args:
        models: predictions by title. Of a single one, the images with the
            most detections of high score are taken.
        truth: of the images, if there is one.
        classes: names by label.

    Returns:
        Those that differ most, and those that differ least, under ``'most'``
        and ``'least'``.
    """
    found: Dict[str, List[Picture]] = dict(most=[], least=[])
    if not models:
        return found
    titles = list(models)
    first, *others = (models[title] for title in titles)
    if len(models) == 1:
        order = sorted(
            first, key=lambda image: -first[image].objects.scores.sum())
        chosen: Any = (order[:NUM_MOST], [])
    else:
        chosen = choose(first, others, NUM_MOST, NUM_LEAST)
    for key, images in zip(found, chosen):
        found[key] = [
            make_picture(
                first[image], truth, image, {
                    title: models[title][image].objects
                    for title in titles if image in models[title]
                }, classes) for image in images
        ]
    return found
